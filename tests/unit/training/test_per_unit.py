"""Clipped sums of gradients of single units, against a loop, against opacus, and at their bound."""

import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional
from transformers import LlamaConfig, LlamaForCausalLM

from fedkola.errors import DataError, Incompatible, ModelMismatch
from fedkola.privacy import clip
from fedkola.training import fresh, per_unit, whole
from fedkola.training.model import Foundation, load
from fedkola.types import Weights

TEXT = "the heart pumps blood through the lung and the lung gives air to the blood of the heart "
UNITS = [
    [[5, 9, 12, 7, 30, 31], [8, 8, 11]],
    [[40, 2]],
    [[3, 3, 3, 3], [17, 60, 2, 9, 1, 4, 4, 12], [6, 7], [90, 91, 92]],
    [[8]],
]
SHARP = 0.05


def shorten(bound: float) -> Callable[[Tensor], Tensor]:
    return partial(clip.factor, bound=bound)


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


@pytest.fixture(scope="module", params=["gpt2", "llama"])
def causal(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Foundation:
    return made(tmp_path_factory.mktemp(request.param) / "model", request.param)


@pytest.fixture(scope="module")
def gpt(tmp_path_factory: pytest.TempPathFactory) -> Foundation:
    return made(tmp_path_factory.mktemp("gpt") / "model", "gpt2")


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory) -> Foundation:
    return made(tmp_path_factory.mktemp("bert") / "model", "bert")


def looped(
    base: Foundation, weights: Weights, units: Sequence[per_unit.Unit], bound: float
) -> dict[str, Tensor]:
    """The slow way: one backward pass of plain autograd for every unit."""
    total = {n: torch.zeros(v.shape, dtype=torch.float64) for n, v in weights.items()}
    for unit in units:
        single = clip.clip(whole.gradient(base, weights, unit), bound)
        for name, value in single.items():
            total[name] += value.double()
    return total


def distance(one: Weights, other: Weights) -> float:
    assert set(one) == set(other)
    return clip.norm({n: one[n] - other[n] for n in one}) / clip.norm(other)


@pytest.mark.parametrize("bound", [SHARP, 1e6])
@pytest.mark.parametrize("room", [per_unit.ROOM, 1])
def test_the_sum_is_that_of_a_loop_over_units(causal: Foundation, bound: float, room: int) -> None:
    weights = whole.parameters(causal)
    found, count = per_unit.clipped_sum(causal, weights, UNITS, shorten(bound), room=room)
    assert count == 4
    assert distance(found, looped(causal, weights, UNITS, bound)) < 1e-6


def test_a_masked_model_is_clipped_alike(bert: Foundation) -> None:
    weights = whole.parameters(bert)
    for unit in UNITS[:3]:
        found, _ = per_unit.clipped_sum(bert, weights, [unit], shorten(SHARP), seed=3)
        whole_unit = whole.gradient(bert, weights, unit, seed=3)
        assert distance(found, clip.clip(whole_unit, SHARP)) < 1e-6


def test_a_real_pretrained_model_with_tied_embeddings_is_clipped_alike(
    stories_folder: Path,
) -> None:
    base = load(str(stories_folder), max_tokens=48)
    weights = whole.parameters(base)
    assert not [name for name in weights if name.startswith("lm_head")]
    units = [[[1, 40 + 7 * i, 300 - i, 60], [1, 99, 17 * i + 1]] for i in range(6)]
    found, _ = per_unit.clipped_sum(base, weights, units, shorten(1.0))
    assert distance(found, looped(base, weights, units, 1.0)) < 1e-6


def test_opacus_computes_the_same_gradients_of_single_units(gpt: Foundation) -> None:
    """opacus clips records, one sequence each, on models it supports: those with nothing tied."""
    from opacus import GradSampleModule

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        intermediate_size=48,
        max_position_embeddings=32,
        tie_word_embeddings=False,
    )
    model = LlamaForCausalLM(config).train()
    base = replace(gpt, model=model, width=32)
    ids = torch.randint(0, 64, (5, 11))
    weights = {n: p.detach().clone() for n, p in model.named_parameters()}
    bound = 3.0
    found, _ = per_unit.clipped_sum(base, weights, [[row] for row in ids.tolist()], shorten(bound))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        hooked = GradSampleModule(model, loss_reduction="sum")
        logits = hooked(input_ids=ids, use_cache=False).logits[:, :-1]
        nats = functional.cross_entropy(logits.transpose(1, 2), ids[:, 1:], reduction="none")
        nats.mean(1).sum().backward()
    samples = {n: p.grad_sample for n, p in model.named_parameters()}
    norms = torch.stack([g.flatten(1).square().sum(1) for g in samples.values()]).sum(0).sqrt()
    assert norms.min() < bound < norms.max()
    times = (bound / norms).clamp(max=1)
    oracle = {n: torch.tensordot(times, g, dims=1).double() for n, g in samples.items()}
    # We shorten by one part in a million more than opacus does.
    assert distance(found, oracle) < 2e-6


@settings(
    max_examples=10, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    st.lists(
        st.lists(st.lists(st.integers(0, 60), min_size=1, max_size=9), min_size=1, max_size=3),
        min_size=1,
        max_size=4,
    ),
    st.floats(1e-3, 10),
    st.floats(0.1, 30),
)
def test_no_unit_moves_a_sum_by_more_than_the_bound(
    gpt: Foundation, units: list[list[list[int]]], bound: float, size: float
) -> None:
    weights = {name: size * value for name, value in whole.parameters(gpt).items()}
    with_all, _ = per_unit.clipped_sum(gpt, weights, units, shorten(bound))
    without, _ = per_unit.clipped_sum(gpt, weights, units[1:], shorten(bound))
    moved = clip.norm({n: with_all[n] - without[n] for n in with_all})
    # Rounding of the others' gradients, which run in other chunks, comes on top.
    assert moved <= bound * (1 + 1e-5 * len(units))
    alone, _ = per_unit.clipped_sum(gpt, weights, units[:1], shorten(bound))
    assert clip.norm(alone) <= bound


def test_a_unit_whose_gradient_is_not_finite_counts_nothing(gpt: Foundation) -> None:
    weights = whole.parameters(gpt)
    weights["transformer.wte.weight"][250] = math.inf
    good, _ = per_unit.clipped_sum(gpt, whole.parameters(gpt), UNITS[:1], shorten(SHARP))
    assert clip.norm(good) > 0
    found, count = per_unit.clipped_sum(gpt, weights, [*UNITS[:1], [[250, 3]]], shorten(SHARP))
    assert count == 2
    assert all(bool(torch.isfinite(v).all()) for v in found.values())


def test_no_unit_at_all_gives_zeros(gpt: Foundation) -> None:
    found, count = per_unit.clipped_sum(gpt, whole.parameters(gpt), [], shorten(1))
    assert count == 0
    assert clip.norm(found) == 0


def test_what_cannot_be_summed_is_refused(gpt: Foundation, encoder: Foundation) -> None:
    weights = whole.parameters(gpt)
    with pytest.raises(DataError, match="unit without tokens"):
        per_unit.clipped_sum(gpt, weights, [[]], shorten(1))
    with pytest.raises(DataError, match="unit without tokens"):
        per_unit.clipped_sum(gpt, weights, [[[1], []]], shorten(1))
    with pytest.raises(ModelMismatch):
        per_unit.clipped_sum(gpt, {"x": torch.ones(1)}, [], shorten(1))
    with pytest.raises(Incompatible, match="whole=True"):
        per_unit.clipped_sum(encoder, whole.parameters(encoder), UNITS, shorten(1))
