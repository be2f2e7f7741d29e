"""Training of whole models: gradients against plain autograd, training in pieces against one."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch.nn import functional

from fedkola.errors import DataError, Incompatible, ModelMismatch, StepFailed
from fedkola.training import fresh, whole
from fedkola.training.model import Foundation, load
from fedkola.training.whole import Local

TEXT = "the heart pumps blood through the lung and the lung gives air to the blood of the heart "
BATCH = [[5, 9, 12, 7, 30, 31], [8, 8, 11], [40, 2]]


def made(folder: Path, architecture: str) -> Foundation:
    shape = fresh.Shape(
        architecture=architecture,  # type: ignore[arg-type]
        width=16,
        layers=2,
        heads=2,
        vocabulary=300,
        length=32,
    )
    fresh.create(folder, shape, [TEXT * 3], seed=0)
    return load(str(folder), max_tokens=32, whole=True)


@pytest.fixture(scope="module", params=["gpt2", "llama", "bert"])
def base(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Foundation:
    return made(tmp_path_factory.mktemp(request.param) / "model", request.param)


@pytest.fixture(scope="module")
def gpt(tmp_path_factory: pytest.TempPathFactory) -> Foundation:
    return made(tmp_path_factory.mktemp("gpt") / "model", "gpt2")


def test_a_tied_embedding_is_one_parameter(base: Foundation) -> None:
    names = list(whole.parameters(base))
    assert len(names) == len(set(names))
    assert not [name for name in names if "lm_head" in name or "decoder.weight" in name]


def test_the_gradient_of_a_padded_batch_is_that_of_its_sequences_alone(gpt: Foundation) -> None:
    weights = whole.parameters(gpt)
    together = whole.gradient(gpt, weights, BATCH)
    counts = [len(row) - 1 for row in BATCH]
    alone = [whole.gradient(gpt, weights, [row]) for row in BATCH]
    for name, value in together.items():
        mixed = sum(n * g[name] for n, g in zip(counts, alone, strict=True)) / sum(counts)
        assert torch.allclose(value, mixed, atol=1e-6)


def test_the_gradient_is_that_of_the_next_token_loss(gpt: Foundation) -> None:
    weights = whole.parameters(gpt)
    moved = {name: value + 1e-3 * torch.randn_like(value) for name, value in weights.items()}
    found = whole.gradient(gpt, moved, BATCH[:1])
    with whole.holding(gpt, moved) as model:
        leaf = model.transformer.wte.weight.requires_grad_(True)  # type: ignore[union-attr]
        logits = model(input_ids=torch.tensor(BATCH[:1])).logits[0, :-1]
        functional.cross_entropy(logits, torch.tensor(BATCH[0][1:])).backward()
        assert torch.allclose(leaf.grad, found["transformer.wte.weight"], atol=1e-6)


def test_the_base_keeps_its_bits(base: Foundation) -> None:
    before = whole.parameters(base)
    local = Local(lr=1e-2)
    trained, _, losses = whole.train(base, before, [BATCH] * 3, local)
    assert all(torch.equal(v, whole.parameters(base)[n]) for n, v in before.items())
    assert any(not torch.equal(v, trained[n]) for n, v in before.items())
    assert len(losses) == 3
    assert not any(p.requires_grad for p in base.model.parameters())


def test_training_learns_what_it_reads(base: Foundation) -> None:
    start = whole.parameters(base)
    trained, _, _ = whole.train(base, start, [BATCH] * 60, Local(lr=1e-2, warmup=5))
    before, after = (whole.nll(base, w, BATCH).sum(0) for w in (start, trained))
    assert after[0] / after[1] < 0.5 * before[0] / before[1]


def test_training_in_two_pieces_is_training_in_one(base: Foundation) -> None:
    start = whole.parameters(base)
    local = Local(lr=1e-2, warmup=4, total=6)
    batches = [BATCH, BATCH[:1], BATCH[1:], BATCH, BATCH[:2], BATCH]
    once, moments, losses = whole.train(base, start, batches, local)
    half, kept, first = whole.train(base, start, batches[:3], local)
    again, final, second = whole.train(
        base, half, batches[3:], replace(local, start=3), kept, seed=3
    )
    assert all(torch.equal(once[name], again[name]) for name in once)
    assert all(torch.equal(moments[name], final[name]) for name in moments)
    assert losses == first + second


def test_a_step_of_sgd_is_the_gradient_times_the_rate(gpt: Foundation) -> None:
    start = whole.parameters(gpt)
    slope = whole.gradient(gpt, start, BATCH)
    local = Local(optimiser="sgd", lr=0.5, weight_decay=0.0, clip=0.0)
    after, moments, _ = whole.train(gpt, start, [BATCH], local)
    assert moments == {}
    assert all(torch.allclose(start[n] - after[n], 0.5 * slope[n], atol=1e-6) for n in start)


def test_a_gradient_of_ones_own_takes_the_place_of_the_loss(gpt: Foundation) -> None:
    start = whole.parameters(gpt)
    seen: list[int] = []

    def ones(weights: whole.Weights, batch: object, number: int) -> dict[str, torch.Tensor]:
        seen.append(number)
        return {name: torch.ones_like(value) for name, value in weights.items()}

    local = Local(optimiser="sgd", lr=0.25, weight_decay=0.0, clip=1.0)
    after, _, losses = whole.train(gpt, start, [BATCH, BATCH], local, gradient=ones)
    assert seen == [0, 1]
    assert losses == []
    assert all(torch.allclose(start[n] - after[n], torch.tensor(0.5)) for n in start)


def test_the_rate_rises_and_falls() -> None:
    local = Local(lr=1.0, warmup=4, total=8)
    assert local.rate(0) == pytest.approx(0.25 * 1.0)
    assert local.rate(8) == pytest.approx(0.1)
    assert local.rate(100) == pytest.approx(0.1)
    assert Local(lr=0.5).rate(7) == 0.5


def test_a_loss_per_sequence_does_not_depend_on_its_neighbours(gpt: Foundation) -> None:
    weights = whole.parameters(gpt)
    together = whole.nll(gpt, weights, BATCH, rows=2)
    alone = torch.cat([whole.nll(gpt, weights, [row]) for row in BATCH])
    assert torch.allclose(together, alone, atol=1e-4)
    assert together[:, 1].tolist() == [5, 2, 1]


def test_products_in_bfloat16_stay_near_those_in_float32(gpt: Foundation) -> None:
    start = whole.parameters(gpt)
    _, _, plain = whole.train(gpt, start, [BATCH] * 4, Local(lr=1e-2))
    after, _, narrow = whole.train(gpt, start, [BATCH] * 4, Local(lr=1e-2, precision="bfloat16"))
    assert narrow == pytest.approx(plain, rel=0.02)
    assert narrow != plain
    assert all(value.dtype == torch.float32 for value in after.values())


def test_what_cannot_be_trained_is_refused_with_a_reason(
    gpt: Foundation, encoder: Foundation
) -> None:
    weights = whole.parameters(gpt)
    with pytest.raises(ModelMismatch, match="not those of the model"):
        whole.nll(gpt, {**weights, "extra": torch.zeros(2)}, BATCH)
    with pytest.raises(DataError, match="without tokens"):
        whole.gradient(gpt, weights, [[]])
    with pytest.raises(Incompatible, match="whole=True"):
        whole.nll(encoder, whole.parameters(encoder), BATCH)
    broken = {name: value * float("nan") for name, value in weights.items()}
    with pytest.raises(StepFailed, match=r"pretrain\.lr"):
        whole.train(gpt, broken, [BATCH], Local())
