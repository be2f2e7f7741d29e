import pytest
import torch
from torch import Tensor

from fedkola.errors import DataError, ModelMismatch, StepFailed
from fedkola.training import evaluate
from fedkola.training.adapters import adapted, weights_template
from fedkola.training.fit import fit, grams
from fedkola.training.model import Foundation, encode

TEXTS = ["acute fever", "fracture of left arm", "heart failure", "fracture of right leg"] * 10
LABELS = [0, 1, 0, 1] * 10


def start(foundation: Foundation, *, classes: int = 2, seed: int = 0) -> dict[str, Tensor]:
    return {
        **weights_template(foundation, rank=2, seed=seed),
        "head.weight": torch.zeros(classes, foundation.width),
        "head.bias": torch.zeros(classes),
    }


def train(
    foundation: Foundation, weights: dict[str, Tensor], **changes: object
) -> dict[str, Tensor]:
    options = {"steps": 12, "batch": 20, "lr": 1e-2, "seed": 3, "scale": 2.0, **changes}
    return fit(foundation, weights, TEXTS, LABELS, **options)  # type: ignore[arg-type]


def test_training_lowers_the_loss_and_moves_every_tensor(encoder: Foundation) -> None:
    before = start(encoder)
    after = train(encoder, before)
    assert set(after) == set(before)
    assert all(not torch.equal(after[name], before[name]) for name in before)
    first = evaluate.classify(encoder, before, TEXTS, LABELS, scale=2.0)
    last = evaluate.classify(encoder, after, TEXTS, LABELS, scale=2.0)
    assert last["loss"] < 0.5 * first["loss"]
    assert last["correct"] == last["count"] == 40


def test_equal_arguments_give_equal_bits_whatever_the_number_of_threads(
    encoder: Foundation,
) -> None:
    once, again = train(encoder, start(encoder)), train(encoder, start(encoder))
    torch.set_num_threads(3)
    three = train(encoder, start(encoder))
    torch.set_num_threads(1)
    assert all(torch.equal(once[name], again[name]) for name in once)
    assert all(torch.equal(once[name], three[name]) for name in once)


def test_another_seed_gives_another_result(encoder: Foundation) -> None:
    once, other = train(encoder, start(encoder)), train(encoder, start(encoder), seed=4)
    assert not torch.equal(once["head.weight"], other["head.weight"])


def test_the_given_tensors_and_the_base_keep_their_bits(encoder: Foundation) -> None:
    base = {name: value.clone() for name, value in encoder.model.state_dict().items()}
    weights = start(encoder)
    kept = {name: value.clone() for name, value in weights.items()}
    train(encoder, weights)
    assert all(torch.equal(weights[name], kept[name]) for name in kept)
    after = encoder.model.state_dict()
    assert all(torch.equal(after[name], base[name]) for name in base)


def test_pinned_tensors_are_used_but_neither_trained_nor_returned(encoder: Foundation) -> None:
    whole = start(encoder)
    pinned = {name: value for name, value in whole.items() if name.endswith(".lora_A")}
    free = {name: value for name, value in whole.items() if name not in pinned}
    after = train(encoder, free, pinned=pinned)
    assert set(after) == set(free)
    other = {name: 2 * value for name, value in pinned.items()}
    assert not torch.equal(train(encoder, free, pinned=other)["head.weight"], after["head.weight"])


def test_one_step_is_adamws_on_the_gradient_of_the_mean_loss(encoder: Foundation) -> None:
    weights = start(encoder)
    weights["head.weight"] += 0.1 * torch.randn(
        weights["head.weight"].shape, generator=torch.Generator().manual_seed(0)
    )
    found = train(encoder, weights, steps=1, batch=40)
    head = {name: weights[name].clone().requires_grad_() for name in ("head.weight", "head.bias")}
    states = []
    with torch.no_grad(), adapted(encoder, weights, scale=2.0) as model:
        for row in encode(encoder, TEXTS):
            mean = model(input_ids=torch.tensor([row])).last_hidden_state.mean(dim=1)
            states.append(64 * mean / mean.norm())
    scores = torch.cat(states) @ head["head.weight"].T + head["head.bias"]
    torch.nn.functional.cross_entropy(scores, torch.tensor(LABELS)).backward()
    optimiser = torch.optim.AdamW(head.values(), lr=1e-2, weight_decay=0.0)
    optimiser.step()
    for name, value in head.items():
        torch.testing.assert_close(found[name], value.detach(), rtol=1e-4, atol=1e-6)


def test_no_texts_or_no_steps_leave_the_weights_unchanged(encoder: Foundation) -> None:
    weights = start(encoder)
    for texts, labels, steps in (([], [], 5), (TEXTS, LABELS, 0)):
        after = fit(
            encoder, weights, texts, labels, steps=steps, batch=4, lr=1.0, seed=0, scale=2.0
        )
        assert all(torch.equal(after[name], weights[name]) for name in weights)


def test_a_loss_that_is_not_finite_stops_training(encoder: Foundation) -> None:
    weights = start(encoder)
    weights["head.bias"] = torch.tensor([float("nan"), 0.0])
    with pytest.raises(StepFailed, match="training step 1 of 12"):
        train(encoder, weights)


def test_labels_outside_the_head_are_refused(encoder: Foundation) -> None:
    weights = start(encoder)
    for labels in ([2], [-1], []):
        with pytest.raises(DataError, match=r"expected one label in 0\.\.1"):
            fit(encoder, weights, ["fever"], labels, steps=1, batch=1, lr=1.0, seed=0, scale=1.0)
    with pytest.raises(ModelMismatch, match=r"head\.weight"):
        fit(encoder, {}, ["fever"], [0], steps=1, batch=1, lr=1.0, seed=0, scale=1.0)


def test_a_causal_model_learns_its_texts_and_ignores_padding(stories: Foundation) -> None:
    texts = ["Once upon a time there was a drug.", "The drug was good.", ""] * 4
    weights = weights_template(stories, rank=4, seed=0)
    after = fit(stories, weights, texts, None, steps=20, batch=6, lr=1e-2, seed=1, scale=2.0)
    first = evaluate.perplexity(stories, weights, texts, scale=2.0)
    last = evaluate.perplexity(stories, after, texts, scale=2.0)
    assert first["tokens"] == 4 * sum(len(row) - 1 for row in encode(stories, texts[:2]))
    assert last["loss"] < 0.7 * first["loss"]


def test_texts_of_one_token_have_no_next_one_to_learn(stories: Foundation) -> None:
    weights = weights_template(stories, rank=2, seed=0)
    after = fit(stories, weights, ["", ""], None, steps=3, batch=2, lr=1.0, seed=0, scale=2.0)
    assert all(torch.equal(after[name], weights[name]) for name in weights)


def test_grams_match_a_hand_computation(encoder: Foundation) -> None:
    generator = torch.Generator().manual_seed(1)
    weights = {
        name: value + 0.3 * torch.randn(value.shape, generator=generator)
        for name, value in weights_template(encoder, rank=2, seed=0).items()
    }
    b = {name: value for name, value in weights.items() if name.endswith(".lora_B")}
    a = {name: value for name, value in weights.items() if name.endswith(".lora_A")}
    texts = ["acute fever", "fracture of left arm", "fever"]
    found = grams(encoder, b, texts, pinned=a, scale=2.0)

    # The input of layer 0 is the embedding of the tokens, whatever the adapter.
    first, last = "encoder.layer.0.attention.self.query", "encoder.layer.1.attention.self.value"
    by_hand = {first: torch.zeros(2, 2), last: torch.zeros(2, 2)}
    with torch.no_grad(), adapted(encoder, weights, scale=2.0) as model:
        for row in encode(encoder, texts):
            states = model(input_ids=torch.tensor([row]), output_hidden_states=True).hidden_states
            for layer, x in ((first, states[0][0]), (last, states[1][0])):
                for token in x:
                    z = weights[f"{layer}.lora_A"] @ token
                    by_hand[layer] += torch.outer(z, z) / len(row)
    for layer, gram in by_hand.items():
        assert found[f"{layer}.gram"].dtype == torch.float64
        torch.testing.assert_close(found[f"{layer}.gram"], gram.double(), rtol=1e-4, atol=1e-4)
    assert len(found) == 4


def test_grams_clip_entries_and_are_zero_without_texts(encoder: Foundation) -> None:
    weights = weights_template(encoder, rank=2, seed=0)
    clipped = grams(encoder, weights, TEXTS, pinned={}, scale=2.0, clip=1e-3)
    assert all(float(gram.abs().max()) <= 1.001e-6 * len(TEXTS) for gram in clipped.values())
    empty = grams(encoder, weights, [], pinned={}, scale=2.0)
    assert all(torch.equal(gram, torch.zeros(2, 2, dtype=torch.float64)) for gram in empty.values())
