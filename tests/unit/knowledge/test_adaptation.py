import torch

from fedkola.knowledge import adaptation
from fedkola.types import Dataset


def records(count: int) -> Dataset:
    return Dataset(
        records=tuple(f"r{i}" for i in range(count)),
        texts=("fracture of the left forearm",) * count,
        labels=("a",) * count,
        patients=tuple(f"p{i}" for i in range(count)),
        windows=(1,) * count,
    )


def test_the_server_steps_as_adam_does():
    generator = torch.Generator().manual_seed(0)
    start = torch.randn(3, 4, generator=generator)
    leaf = torch.nn.Parameter(start.double())
    optimiser = torch.optim.Adam([leaf], lr=0.02, betas=(0.9, 0.99), eps=1e-8)
    weights, moments = {"a": start}, adaptation.adam({"a": start})
    for _ in range(4):
        gradient = torch.randn(3, 4, generator=generator, dtype=torch.float64)
        leaf.grad = gradient
        optimiser.step()
        weights, moments = moments.step(weights, {"a": gradient}, lr=0.02)
    torch.testing.assert_close(weights["a"].double(), leaf.detach(), rtol=1e-5, atol=1e-6)


def test_a_rate_rises_and_falls_to_nothing():
    rates = [adaptation.schedule(step, 20, 1.0) for step in range(1, 21)]
    assert rates[0] < rates[1] == max(rates)
    assert rates[1:] == sorted(rates[1:], reverse=True)
    assert 0 < rates[-1] < 0.06


def test_a_lesson_is_a_share_of_the_records_with_some_of_their_words():
    data = records(400)
    given = adaptation.lesson(data, share=0.25, shortened=0.5, seed=3, site="north")
    assert 60 < len(given) < 140
    whole = sum(text == data.texts[0] for text in given.texts)
    assert 0.3 < whole / len(given) < 0.7
    words = data.texts[0].split()
    assert all([w for w in words if w in text.split()] == text.split() for text in given.texts)
    assert given == adaptation.lesson(data, share=0.25, shortened=0.5, seed=3, site="north")
    assert given != adaptation.lesson(data, share=0.25, shortened=0.5, seed=3, site="south")


def test_a_base_keeps_the_rank_that_it_needs():
    generator = torch.Generator().manual_seed(1)
    strong, weak = torch.randn(8, 2, generator=generator), torch.randn(8, 4, generator=generator)
    base = {
        "q.lora_A": torch.randn(4, 6, generator=generator),
        "q.lora_B": weak * torch.tensor([3.0, 1.0, 0.1, 0.1]),
        "v.lora_A": torch.randn(4, 6, generator=generator),
        "v.lora_B": torch.cat([strong, torch.zeros(8, 2)], dim=1),
    }
    assert adaptation.needed(base, energy=1.0) == base
    ranks = []
    for energy in (0.5, 0.9, 0.99, 0.999999):
        found = adaptation.needed(base, energy=energy)
        ranks.append({value.shape[0] for name, value in found.items() if name.endswith("A")})
        for layer in ("q", "v"):
            whole = base[f"{layer}.lora_B"] @ base[f"{layer}.lora_A"]
            lost = whole - found[f"{layer}.lora_B"] @ found[f"{layer}.lora_A"]
            assert float(lost.square().sum()) <= (1 - energy) * float(whole.square().sum()) + 1e-6
    assert all(len(rank) == 1 for rank in ranks)
    assert min(ranks[0]) < 4
    assert ranks[3] == {4}


def test_nodes_without_records_draw_nothing():
    anchors = adaptation.anchors(torch.tensor([[3, 4], [0, 0]]), torch.tensor([5, 0]))
    torch.testing.assert_close(anchors, torch.tensor([[0.6, 0.8], [0.0, 0.0]]))


def test_a_base_is_named_by_its_bits():
    base = {"q.lora_A": torch.ones(2, 3), "q.lora_B": torch.zeros(3, 2)}
    assert adaptation.digest(base) == adaptation.digest(dict(reversed(base.items())))
    assert adaptation.digest(base) != adaptation.digest(base | {"q.lora_B": torch.ones(3, 2)})
    carried = adaptation.carried(base) | {"labels": torch.tensor([1])}
    found, rest = adaptation.split(carried)
    assert list(rest) == ["labels"]
    assert adaptation.digest(found) == adaptation.digest(base)
