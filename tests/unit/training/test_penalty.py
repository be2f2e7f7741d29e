"""Penalties and the Fisher information that some of them weigh by, against plain formulas."""

import pytest
import torch
from torch import Tensor

from fedkola.errors import ModelMismatch
from fedkola.training.adapters import adapted, weights_template
from fedkola.training.fit import fit, importance, logits, penalty_gradient
from fedkola.training.model import Foundation, encode
from fedkola.types import Penalty

TEXTS = ["acute fever", "fracture of left arm", "heart failure", "fracture of right leg"]
LABELS = [0, 1, 0, 1]
A = "encoder.layer.1.attention.self.value.lora_A"


def start(foundation: Foundation) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    weights = {
        **weights_template(foundation, rank=2, seed=0),
        "head.weight": torch.zeros(2, foundation.width),
        "head.bias": torch.zeros(2),
    }
    return {
        name: value + 0.2 * torch.randn(value.shape, generator=generator)
        for name, value in weights.items()
    }


def train(foundation: Foundation, weights: dict[str, Tensor], penalty: Penalty | None, **changes):
    options = {"steps": 6, "batch": 4, "lr": 1e-2, "seed": 3, "scale": 2.0, **changes}
    return fit(foundation, weights, TEXTS, LABELS, penalty=penalty, **options)


def test_the_gradient_of_a_penalty_is_that_of_its_formula():
    generator = torch.Generator().manual_seed(1)
    value = torch.randn(2, 5, generator=generator, requires_grad=True)
    f, anchor, other = (torch.rand(n, 5, generator=generator) for n in (2, 2, 3))
    penalty = Penalty(strength=0.7, importance={"x": f}, anchor={"x": anchor}, apart={"x": other})
    loss = 0.35 * (f * (value - anchor) ** 2).sum() + 0.7 * (other @ value.T).square().sum()
    (expected,) = torch.autograd.grad(loss, value)
    torch.testing.assert_close(penalty_gradient(penalty, "x", value.detach()), expected)
    assert not penalty_gradient(penalty, "y", value.detach()).any()


def test_following_the_penalty_reaches_the_exact_minimiser_of_a_quadratic_loss():
    h, c = torch.tensor([1.0, 4.0]), torch.tensor([3.0, -1.0])
    f, anchor = torch.tensor([2.0, 0.0]), torch.tensor([0.0, 5.0])
    penalty = Penalty(strength=0.5, importance={"x": f}, anchor={"x": anchor})
    x = torch.zeros(2)
    for _ in range(200):
        x -= 0.2 * (h * (x - c) + penalty_gradient(penalty, "x", x))
    torch.testing.assert_close(x, (h * c + 0.5 * f * anchor) / (h + 0.5 * f))


def test_a_penalty_without_weight_changes_no_bit_of_training(encoder: Foundation):
    weights = start(encoder)
    zeros = {name: torch.zeros_like(value) for name, value in weights.items()}
    idle = Penalty(strength=3.0, importance=zeros, anchor=weights, apart={A: torch.zeros(1, 16)})
    with_it, without = train(encoder, weights, idle), train(encoder, weights, None)
    assert all(torch.equal(with_it[name], without[name]) for name in weights)


def test_a_strong_penalty_holds_important_weights_and_leaves_the_others_free(encoder: Foundation):
    weights = start(encoder)
    strong = Penalty(strength=1e4, importance={A: torch.ones(2, 16)}, anchor={A: weights[A]})
    free = train(encoder, weights, None, steps=40)
    held = train(encoder, weights, strong, steps=40)
    assert (held[A] - weights[A]).norm() < 0.2 * (free[A] - weights[A]).norm()
    assert (held["head.weight"] - weights["head.weight"]).norm() > 0.05


def test_a_penalty_turns_a_away_from_other_directions(encoder: Foundation):
    weights = start(encoder)
    other = weights[A].clone()
    apart = train(encoder, weights, Penalty(strength=10.0, apart={A: other}), steps=60)
    free = train(encoder, weights, None, steps=60)
    assert (other @ apart[A].T).norm() < 0.3 * (other @ free[A].T).norm()


def test_a_penalty_about_something_that_does_not_train_is_refused(encoder: Foundation):
    weights = start(encoder)
    one = torch.ones(2, 16)
    for wrong in (
        Penalty(strength=1.0, importance={"x": one}, anchor={"x": one}),
        Penalty(strength=1.0, importance={A: one}),
        Penalty(strength=1.0, importance={A: torch.ones(3, 16)}, anchor={A: one}),
        Penalty(strength=1.0, apart={A: torch.ones(3, 17)}),
    ):
        with pytest.raises(ModelMismatch, match="penalty"):
            train(encoder, weights, wrong)


def by_hand(foundation: Foundation, weights: dict[str, Tensor], rows: list[int]) -> Tensor:
    """Squared gradients in head.weight, one record at a time and without padding."""
    total = torch.zeros_like(weights["head.weight"], dtype=torch.float64)
    head = {name: weights[name].clone().requires_grad_() for name in ("head.weight", "head.bias")}
    for row in rows:
        with torch.no_grad(), adapted(foundation, weights, scale=2.0) as model:
            ids = torch.tensor([encode(foundation, TEXTS)[row]])
            states = model(input_ids=ids).last_hidden_state
        loss = torch.nn.functional.cross_entropy(
            logits(states, None, head), torch.tensor([LABELS[row]])
        )
        (gradient,) = torch.autograd.grad(loss, head["head.weight"])
        total += gradient.double() ** 2
    return total


def test_importance_sums_the_squares_of_single_records_gradients(encoder: Foundation):
    weights = start(encoder)
    found = importance(encoder, weights, TEXTS, LABELS, records=0, seed=1, scale=2.0)
    assert set(found) == set(weights)
    torch.testing.assert_close(
        found["head.weight"], by_hand(encoder, weights, [0, 1, 2, 3]), rtol=1e-4, atol=1e-6
    )
    assert found[A].dtype == torch.float64
    assert bool(found[A].any())


def test_importance_draws_at_most_so_many_records_by_its_seed(encoder: Foundation):
    weights = start(encoder)
    singles = [by_hand(encoder, weights, [row]) for row in range(4)]
    drawn = set()
    for seed in range(12):
        found = importance(encoder, weights, TEXTS, LABELS, records=1, seed=seed, scale=2.0)
        (row,) = [
            i for i, one in enumerate(singles)
            if torch.allclose(found["head.weight"], one, rtol=1e-4, atol=1e-6)
        ]  # fmt: skip
        drawn.add(row)
    assert len(drawn) > 1
    none = importance(encoder, weights, [], [], records=5, seed=0, scale=2.0)
    assert not any(value.any() for value in none.values())


def test_importance_has_the_same_bits_on_any_number_of_threads(encoder: Foundation):
    weights = start(encoder)
    one = importance(encoder, weights, TEXTS * 5, LABELS * 5, records=0, seed=1, scale=2.0)
    torch.set_num_threads(3)
    three = importance(encoder, weights, TEXTS * 5, LABELS * 5, records=0, seed=1, scale=2.0)
    torch.set_num_threads(1)
    assert all(torch.equal(one[name], three[name]) for name in one)


def test_importance_of_a_causal_model_needs_no_labels(stories: Foundation):
    weights = weights_template(stories, rank=2, seed=0)
    a = {name: value for name, value in weights.items() if name.endswith(".lora_A")}
    b = {name: value for name, value in weights.items() if name.endswith(".lora_B")}
    found = importance(
        stories, b, ["Once upon a time", ""], None, records=0, seed=0, scale=2.0, pinned=a
    )
    assert set(found) == set(b)
    assert all(bool(value.any()) for value in found.values())
