"""A6: members of an open change stand out, those of a change they are not in do not."""

from dataclasses import replace

import pytest
import torch
from small_gpt import sentences, small_gpt

from fedkola.audit import shadow
from fedkola.audit.canary import after
from fedkola.audit.evidence import Known, Sequences, Sighting, Truth
from fedkola.audit.membership import OUTSIDE, Membership
from fedkola.audit.one_run import Game
from fedkola.audit.shadow import Recipe
from fedkola.errors import DataError
from fedkola.training import whole
from fedkola.training.model import Foundation, encode
from fedkola.training.whole import Local

ATTACK = Membership(members=40, outsiders=120, few=16, game=Game(canaries=0, guesses=0))
PROTOCOL = {"name": "DiLoCo", "inner_steps": 5, "batch": 8, "lr": 3e-3, "rounds": 1}


@pytest.fixture(scope="module")
def gpt(tmp_path_factory: pytest.TempPathFactory) -> Foundation:
    return small_gpt(tmp_path_factory.mktemp("gpt") / "model")


@pytest.fixture(scope="module")
def known(gpt: Foundation) -> Known:
    return Known(foundation=gpt, texts=tuple(sentences(60, seed=2)))


def records(gpt: Foundation, seed: int, count: int = 40) -> Sequences:
    return tuple(tuple(ids) for ids in encode(gpt, sentences(count, seed=seed)))


@pytest.fixture(scope="module")
def update(gpt: Foundation) -> tuple[Sighting, Truth]:
    """One pass over 40 records; 120 of the same kind were left out."""
    before = whole.parameters(gpt)
    how = Recipe(steps=5, batch=8, local=Local(lr=3e-3))
    made = shadow.shadow(gpt, before, how, [records(gpt, 3)], seed=1)
    seen = Sighting(round=1, who="a", sites=1, before=before, change=made.change, protocol=PROTOCOL)
    return seen, {(1, "a"): made.used, (0, OUTSIDE): records(gpt, 9, 120)}


def test_the_records_behind_an_open_change_lie_along_it(
    known: Known, update: tuple[Sighting, Truth]
) -> None:
    seen, truth = update
    found = ATTACK.run([seen], known, truth)
    auc = found.measures["auc"]
    assert found.control.passed
    assert auc.low > 0.6
    assert auc.null is not None
    assert abs(auc.null - 0.5) < 0.13
    assert found.measures["tpr_at_1_fpr"].value >= 0
    assert (found.target, found.settings["outsiders"]) == ("single", 120)


def test_a_change_without_them_says_nothing_of_them(
    gpt: Foundation, known: Known, update: tuple[Sighting, Truth]
) -> None:
    seen, truth = update
    generator = torch.Generator().manual_seed(0)
    noise = {n: torch.randn(v.shape, generator=generator) for n, v in seen.change.items()}
    found = ATTACK.run([replace(seen, change=noise)], known, truth)
    assert found.control.passed
    assert found.measures["auc"].low < 0.5 < found.measures["auc"].high


def test_a_model_remembers_what_it_read_ten_times(
    gpt: Foundation, known: Known, update: tuple[Sighting, Truth]
) -> None:
    seen, truth = update
    how = Recipe(steps=50, batch=8, local=Local(lr=3e-3))
    trained = shadow.shadow(gpt, seen.before, how, [records(gpt, 3)], seed=1)
    model = Sighting(
        round=0, who="model", sites=0,
        before=after(replace(seen, change=trained.change)), change={}, protocol=PROTOCOL,
    )  # fmt: skip
    found = ATTACK.run([model], known, {(0, "model"): trained.used, **truth})
    assert (found.target, found.control.passed) == ("model", True)
    auc = found.measures["auc"]
    assert auc.low > 0.75
    assert auc.null is not None
    assert abs(auc.null - 0.5) < 0.13


def test_a_broken_control_is_reported(known: Known, update: tuple[Sighting, Truth]) -> None:
    seen, truth = update
    idle = replace(seen, protocol={**PROTOCOL, "lr": 1e-12, "weight_decay": 1e-3})
    found = replace(ATTACK, epochs=1).run([idle], known, truth)
    assert not found.control.passed


def test_canaries_of_an_open_protocol_refute_small_epsilons(
    known: Known, update: tuple[Sighting, Truth]
) -> None:
    seen, truth = update
    attack = replace(ATTACK, game=Game(canaries=60, guesses=40))
    found = attack.run([replace(seen, protocol={**PROTOCOL, "batch": 32})], known, truth)
    epsilon = found.measures["epsilon"]
    assert epsilon.value > 1
    assert epsilon.null is not None
    assert epsilon.null < 1


def test_without_outsiders_the_attackers_text_must_do_and_that_is_noted(
    known: Known, update: tuple[Sighting, Truth]
) -> None:
    seen, truth = update
    found = ATTACK.run([seen], known, {(1, "a"): truth[(1, "a")]})
    assert "corpora" in found.notes
    with pytest.raises(DataError, match="records behind"):
        ATTACK.run([seen], known, {})
