"""Attacks by descent: whole sequences that fit the spans, or whose gradient is the one seen."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from fedkola.audit import layers
from fedkola.audit.evidence import Known, Sequences, Sighting
from fedkola.audit.matching import Matching
from fedkola.audit.subspace import Subspace
from fedkola.errors import DataError, Incompatible, NotFinite
from fedkola.training import fresh, whole
from fedkola.training.model import Foundation, encode, load

TEXT = (
    "the heart pumps blood through the lung and the lung gives air to the blood of the heart "
    "while a nurse writes a note on pain, pressure and the drug that was given in the morning "
)
NOTES = ("the nurse gives the drug", "pain and pressure", "blood of the lung")
SUBSPACE = Subspace(candidates=12, starts=3, steps=40, passes=1, controls=1)
MATCHING = Matching(steps=60, candidates=12, swaps=60, longest=8)


@pytest.fixture(scope="module")
def gpt(tmp_path_factory: pytest.TempPathFactory) -> Foundation:
    folder: Path = tmp_path_factory.mktemp("gpt") / "model"
    shape = fresh.Shape(width=32, layers=2, heads=2, vocabulary=320, length=24)
    fresh.create(folder, shape, [TEXT * 3], seed=0)
    return load(str(folder), max_tokens=24, whole=True)


def rows(foundation: Foundation, texts: tuple[str, ...]) -> Sequences:
    return tuple(tuple(row)[:7] for row in encode(foundation, texts))


def one_gradient(foundation: Foundation, batch: Sequences, number: int = 0) -> Sighting:
    weights = whole.parameters(foundation)
    return Sighting(
        round=number,
        who="site",
        sites=1,
        before=weights,
        change=whole.gradient(foundation, weights, batch),
        protocol={"name": "gradient", "batch": len(batch), "inner_steps": 1},
    )


def three(foundation: Foundation) -> tuple[list[Sighting], dict[tuple[int, str], Sequences]]:
    batches = [rows(foundation, NOTES[i : i + 1]) for i in range(3)]
    seen = [one_gradient(foundation, batch, i) for i, batch in enumerate(batches)]
    return seen, {(i, "site"): batch for i, batch in enumerate(batches)}


def test_a_sequence_is_found_where_all_layers_agree(gpt: Foundation) -> None:
    seen, truth = three(gpt)
    evidence = SUBSPACE.run(seen, Known(foundation=gpt, texts=NOTES), truth)
    assert evidence.control.passed
    place = evidence.measures["place_recall"]
    assert place.null is not None
    assert place.value > place.null + 0.3


def test_a_matching_gradient_gives_tokens(gpt: Foundation) -> None:
    seen, truth = three(gpt)
    evidence = MATCHING.run(seen[:2], Known(foundation=gpt, texts=NOTES), truth)
    assert evidence.control.passed
    recall = evidence.measures["token_recall"]
    assert recall.null is not None
    assert recall.value > recall.null


@pytest.mark.parametrize("attack", [SUBSPACE, MATCHING])
def test_wrong_names_break_the_control(
    attack: Subspace | Matching, gpt: Foundation, monkeypatch: pytest.MonkeyPatch
) -> None:
    right = layers.projections

    def wrong(model: torch.nn.Module) -> tuple[layers.Projection, ...]:
        """Attention of one block taken for that of another, and every row turned round."""
        return tuple(replace(p, depth=p.depth) for p in right(model))

    def turned(projection: layers.Projection, change: dict[str, torch.Tensor]) -> torch.Tensor:
        parts = [change[name].double() for name in projection.weights]
        return torch.cat([part.T if projection.across else part for part in parts]).flip(1)

    monkeypatch.setattr(layers, "projections", wrong)
    monkeypatch.setattr(layers, "stacked", turned)
    if isinstance(attack, Matching):
        from fedkola.audit import matching

        monkeypatch.setattr(matching, "prominence", lambda change: -change.double().norm(dim=1))
    batch = rows(gpt, NOTES[:1])
    known = Known(foundation=gpt, texts=NOTES)
    evidence = attack.run([one_gradient(gpt, batch)], known, {(0, "site"): batch})
    assert not evidence.control.passed


@pytest.mark.parametrize("attack", [SUBSPACE, MATCHING])
def test_a_change_that_is_not_finite_is_refused(
    attack: Subspace | Matching, gpt: Foundation
) -> None:
    batch = rows(gpt, NOTES[:1])
    seen = one_gradient(gpt, batch)
    change = {name: value.clone() for name, value in seen.change.items()}
    change["transformer.ln_f.weight"][0] = float("inf")
    known = Known(foundation=gpt, texts=NOTES)
    with pytest.raises(NotFinite):
        attack.run([replace(seen, change=change)], known, {(0, "site"): batch})


def test_long_sequences_are_not_matched(gpt: Foundation) -> None:
    batch = rows(gpt, (TEXT,))
    with pytest.raises(DataError, match="3 to 5 tokens"):
        replace(MATCHING, longest=5).run(
            [one_gradient(gpt, batch)], Known(foundation=gpt, texts=NOTES), {(0, "site"): batch}
        )


def test_wide_models_are_not_matched(gpt: Foundation) -> None:
    seen, truth = three(gpt)
    with pytest.raises(Incompatible, match="width 16 and less"):
        replace(MATCHING, widest=16).run(seen, Known(foundation=gpt, texts=NOTES), truth)
