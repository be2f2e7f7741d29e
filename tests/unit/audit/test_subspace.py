"""Subspace optimisation: whole sequences that fit the spans of all layers."""

from pathlib import Path

import pytest

from fedkola.audit.evidence import Known, Sequences, Sighting
from fedkola.audit.subspace import Subspace
from fedkola.training import fresh, whole
from fedkola.training.model import Foundation, encode, load

TEXT = (
    "the heart pumps blood through the lung and the lung gives air to the blood of the heart "
    "while a nurse writes a note on pain, pressure and the drug that was given in the morning "
)
NOTES = ("the nurse gives the drug", "pain and pressure", "blood of the lung")
SUBSPACE = Subspace(candidates=12, starts=3, steps=40, passes=1, controls=1)


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
