"""Subspace optimisation: whole sequences that fit the spans of all layers."""

import pytest
from small_notes import made, one_gradient, rows

from fedkola.audit.evidence import Known, Sequences, Sighting
from fedkola.audit.subspace import Subspace
from fedkola.training.model import Foundation

NOTES = ("the nurse gives the drug", "pain and pressure", "blood of the lung")
SUBSPACE = Subspace(candidates=12, starts=3, steps=40, passes=1, controls=1)


@pytest.fixture(scope="module")
def gpt(tmp_path_factory: pytest.TempPathFactory) -> Foundation:
    return made(tmp_path_factory.mktemp("gpt") / "model")


def three(foundation: Foundation) -> tuple[list[Sighting], dict[tuple[int, str], Sequences]]:
    batches = [rows(foundation, NOTES[i : i + 1], most=7) for i in range(3)]
    seen = [one_gradient(foundation, batch, i) for i, batch in enumerate(batches)]
    return seen, {(i, "site"): batch for i, batch in enumerate(batches)}


def test_a_sequence_is_found_where_all_layers_agree(gpt: Foundation) -> None:
    seen, truth = three(gpt)
    evidence = SUBSPACE.run(seen, Known(foundation=gpt, texts=NOTES), truth)
    assert evidence.control.passed
    place = evidence.measures["place_recall"]
    assert place.null is not None
    assert place.value > place.null + 0.3
