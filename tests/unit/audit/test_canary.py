"""A7: a secret that was read often is ranked first, one that was never read like any other."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from small_gpt import sentences, small_gpt

from fedkola.audit import shadow
from fedkola.audit.canary import CanaryExposure, chance_level
from fedkola.audit.evidence import Known, Sighting, Truth
from fedkola.audit.shadow import Recipe
from fedkola.errors import DataError
from fedkola.training import whole
from fedkola.training.model import Foundation, encode
from fedkola.training.whole import Local

# 512 of 1,000 fillings, so that a test takes a second.
ATTACK = CanaryExposure(repeats=(1, 40), together=(), each=4, digits=3, bits=9)


@pytest.fixture(scope="module")
def gpt(tmp_path_factory: pytest.TempPathFactory) -> Foundation:
    return small_gpt(tmp_path_factory.mktemp("gpt") / "model", length=48)


@pytest.fixture(scope="module")
def planted(gpt: Foundation) -> tuple[Sighting, Truth]:
    """A site that trained on ordinary text with canaries in it, nothing held back."""
    texts = sentences(80, seed=3)
    texts += [canary.text for canary in ATTACK.canaries() for _ in range(canary.repeats)]
    records = encode(gpt, texts)
    before = whole.parameters(gpt)
    local = Local(lr=5e-3)
    how = Recipe(steps=2 * len(records) // 8, batch=8, local=local)
    made = shadow.shadow(gpt, before, how, [records], seed=1)
    protocol = {"name": "diloco", "inner_steps": how.steps, "batch": 8, "lr": local.lr}
    seen = Sighting(round=1, who="a", sites=1, before=before, change=made.change, protocol=protocol)
    return seen, {(1, "a"): made.used}


def test_what_was_read_forty_times_is_exposed_and_what_was_never_read_is_not(
    gpt: Foundation, planted: tuple[Sighting, Truth]
) -> None:
    seen, truth = planted
    found = ATTACK.run([seen], Known(foundation=gpt, texts=()), truth)
    assert found.control.passed
    often, once, never = (found.measures[f"exposure_{count}"] for count in (40, 1, 0))
    assert often.value > 7
    assert often.null == chance_level(4)
    assert never.value < 4
    assert once.value < often.value - 3
    assert found.measures["top40_40"].value > 0.5
    assert len(found.examples) == 4
    assert found.examples[0].truth.startswith("Patient ")


def test_a_model_that_never_read_them_is_at_the_null(
    gpt: Foundation, planted: tuple[Sighting, Truth]
) -> None:
    seen, truth = planted
    generator = torch.Generator().manual_seed(0)
    noise = {
        name: 0.02 * torch.randn(value.shape, generator=generator)
        for name, value in seen.change.items()
    }
    found = ATTACK.run([replace(seen, change=noise)], Known(foundation=gpt, texts=()), truth)
    assert found.control.passed
    # A rank of no meaning gives 1.44 bits on average with as many of spread; here of 12 canaries.
    values = [found.measures[f"exposure_{count}"].value for count in (0, 1, 40)]
    assert abs(sum(values) / 3 - 1.44) < 1.3
    assert found.measures["exposure_40"].value < 4
    assert found.measures["greedy_40"].value == 0.0


def test_the_newest_weights_are_asked(gpt: Foundation, planted: tuple[Sighting, Truth]) -> None:
    seen, truth = planted
    trained = {name: value + seen.change[name] for name, value in seen.before.items()}
    model = replace(seen, round=2, who="model", before=trained, change={})
    found = ATTACK.run([seen, model], Known(foundation=gpt, texts=()), truth)
    assert found.target == "model"
    assert found.measures["exposure_40"].value > 7


def test_a_control_that_learns_nothing_marks_the_attack_as_broken(
    gpt: Foundation, planted: tuple[Sighting, Truth]
) -> None:
    seen, truth = planted
    lazy = replace(seen, protocol={**seen.protocol, "lr": 1e-9})
    found = ATTACK.run([lazy], Known(foundation=gpt, texts=()), truth)
    assert not found.control.passed


def test_without_a_planted_canary_nothing_is_tried(
    gpt: Foundation, planted: tuple[Sighting, Truth]
) -> None:
    seen, _ = planted
    clean: Truth = {(1, "a"): tuple(tuple(ids) for ids in encode(gpt, sentences(5, seed=9)))}
    with pytest.raises(DataError, match="plant"):
        ATTACK.run([seen], Known(foundation=gpt, texts=()), clean)
    with pytest.raises(DataError, match="no weights"):
        ATTACK.run([], Known(foundation=gpt, texts=()), clean)


def test_canaries_are_the_same_for_one_secret_and_others_for_another() -> None:
    assert ATTACK.canaries() == ATTACK.canaries()
    other = {canary.digits for canary in replace(ATTACK, secret=1).canaries()}
    assert other != {canary.digits for canary in ATTACK.canaries()}
    assert set(ATTACK.quick().canaries()) < set(ATTACK.canaries())
    names = [canary.name for canary in ATTACK.canaries()]
    assert len(set(names)) == len(names) == 12


def test_digits_beyond_the_reach_of_the_model_are_named(tmp_path: Path) -> None:
    model = small_gpt(tmp_path / "model", length=48)
    (ids,) = encode(model, [ATTACK.canaries()[0].text])
    short = replace(model, max_tokens=10)
    weights = whole.parameters(short)
    seen = Sighting(round=1, who="a", sites=1, before=weights, change={}, protocol={})
    with pytest.raises(DataError, match="at least"):
        ATTACK.run([seen], Known(foundation=short, texts=()), {(1, "a"): (tuple(ids),)})
