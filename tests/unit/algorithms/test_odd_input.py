"""What sites may bring that a round did not expect: each has a rule, and none spoils a sum."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import small_federation as small

from fedkola import wire
from fedkola.algorithms.fedkola import State
from fedkola.errors import KnowledgeError
from fedkola.evaluation import oneshot
from fedkola.knowledge import bank as banks
from fedkola.knowledge import views
from fedkola.types import Dataset

FAST = 'knowledge.lanes=["analytic", "router"]'


def rounds(federation: small.Federation, *numbers: int, state: State | None = None) -> State:
    state = state or State()
    for number in numbers:
        state = federation.algorithm.round(number, state, small.SITES, federation.clients)
    return state


def replaying(step: str) -> Callable[[small.Answer], small.Answer]:
    """A site that from round 2 on answers a step with what it said in round 1."""

    def wrap(answer: small.Answer) -> small.Answer:
        said: list[bytes] = []

        def reply(message: bytes) -> bytes:
            asked = wire.unpack_broadcast(message)
            honest = answer(message)
            if asked.step != step:
                return honest
            if asked.round == 1:
                said.append(honest)
                return honest
            return said[-1]

        return reply

    return wrap


def test_an_answer_about_another_cell_is_not_summed(tmp_path: Path):
    # The last fill of round 1 is the Gram, which has the same shape in every round.
    federation = small.assemble(tmp_path / "a", FAST, wrap={"west": replaying("fill")})
    state = rounds(federation, 1, 2)
    assert federation.clients.tally().refused == {"west": "StaleUpdate"}
    second = [cell.about for cell in state.bank.cells if cell.about.round == 2]
    assert second
    assert all("west" not in about.cohort for about in second)
    assert oneshot.compare(federation, state).equal


def test_a_closed_module_takes_no_cell_and_its_scope_goes_on_in_a_new_version(tmp_path: Path):
    federation = small.assemble(tmp_path, FAST)
    state = rounds(federation, 1)
    closed = banks.retire_module(state.bank, "heart@1", round=1)
    old = state.bank.cells[0]
    late = replace(old.about, id="late", round=2)
    with pytest.raises(KnowledgeError, match="heart@1 is closed"):
        banks.seal(closed, late, old.total)
    after = rounds(federation, 2, state=replace(state, bank=closed))
    heart = {
        (cell.about.module, cell.about.round)
        for cell in after.bank.cells
        if banks.scope(cell.about) == "heart"
    }
    assert heart == {("heart@1", 1), ("heart@2", 2)}


def moved(data: Dataset, start: int, end: int) -> Dataset:
    """The records of one window dated into another."""
    return replace(data, windows=tuple(end if w == start else w for w in data.windows))


def test_records_dated_after_the_round_have_not_arrived_and_wait_for_their_window(tmp_path: Path):
    ahead = {**small.data(), "north": moved(small.records("north"), 1, 2)}
    federation = small.assemble(tmp_path, FAST, sites=ahead)
    state = rounds(federation, 1)
    assert {cell.about.contributors for cell in state.bank.cells} == {4}
    state = rounds(federation, 2, state=state)
    punctual = rounds(small.assemble(tmp_path / "p", FAST), 1, 2)
    assert _records(state) == _records(punctual)


def test_records_that_come_after_their_window_has_passed_are_summed_in_the_next_round(
    tmp_path: Path,
):
    whole = small.records("north")
    early = whole.take([i for i, window in enumerate(whole.windows) if window != 1])
    late = small.assemble(tmp_path, FAST, sites={**small.data(), "north": early})
    state = rounds(late, 1)
    assert {cell.about.contributors for cell in state.bank.cells} == {4}
    # The same site, to which a delivery of window 1 has come in the meantime.
    arrived = small.assemble(tmp_path, FAST)
    state = rounds(arrived, 2, state=state)
    expected = sum(w <= 2 for site in small.SITES for w in small.records(site).windows)
    assert _records(state) == expected
    assert oneshot.compare(arrived, state).equal


def test_a_version_older_than_what_is_summed_comes_too_late(tmp_path: Path):
    # A record of north: version of window 2 first, then a delivery that is dated window 1.
    whole = small.records("north")
    (record, *_) = (r for r, w in zip(whole.records, whole.windows, strict=True) if w == 2)
    federation = small.assemble(tmp_path, FAST)
    state = rounds(federation, 1, 2)
    row = (record, "ra to ni", "heart-1", "north-p0", 1)
    older = {**small.data(), "north": small.with_rows(whole, [row])}
    after = rounds(small.assemble(tmp_path, FAST, sites=older), 3, state=state)
    assert (after.revision.records, after.revision.waiting) == (0, 0)
    assert small.cells(after) == small.cells(rounds(small.assemble(tmp_path / "n", FAST), 1, 2, 3))


def _records(state: State) -> int:
    cells = banks.of_kind(state.bank, banks.CellKind.ANALYTIC)
    return sum(cell.about.records for cell in cells)


def test_a_window_with_a_single_class_is_summed_trained_on_and_answered(tmp_path: Path):
    sites = {}
    for site, data in small.data().items():
        first = [w == 1 for w in data.windows]
        labels = ["heart-1" if f else c for f, c in zip(first, data.labels, strict=True)]
        sites[site] = replace(data, labels=tuple(labels))
    federation = small.assemble(tmp_path, sites=sites)
    state = rounds(federation, 1)
    view = federation.algorithm.view(state)
    assert view.head is not None
    assert view.head.nodes[0] == ("heart-1",)
    z = federation.trainer.cache.integers(small.records("test").texts)
    assert views.scores(view.head, z, 0).isfinite().all()
    # One class is nothing to learn from: the factors stay zero, the model is the base.
    (adapter,) = view.adapters.values()
    assert not any(value.any() for name, value in adapter.items() if name.endswith(".lora_B"))
    after = rounds(federation, 2, state=state)
    assert len(federation.algorithm.view(after).head.nodes[0]) > 1


def test_a_concept_of_fewer_sites_than_k_min_waits_at_its_sites_and_is_in_no_cell(tmp_path: Path):
    sites = {}
    for site, data in small.data().items():
        bone = [label.startswith("bone") for label in data.labels]
        keep = [i for i in range(len(data)) if not bone[i] or site in ("north", "south")]
        sites[site] = data.take(keep)
    federation = small.assemble(tmp_path, FAST, sites=sites)
    state = rounds(federation, 1, 2, 3)
    assert state.parked == {"bone": 20}
    assert {banks.scope(cell.about) for cell in state.bank.cells} == {"heart", "lung", "scatter"}
    assert all(module.scope != "bone" for module in state.bank.modules)
    assert all(not entry.code.startswith("bone") for entry in state.bank.labels)
    assert oneshot.compare(federation, state).records == 100
