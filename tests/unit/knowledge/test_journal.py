"""The journal keeps what was summed, and lets go of what was not."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from fedkola.errors import DataError, StaleUpdate
from fedkola.knowledge import journal
from fedkola.knowledge.journal import Entry
from fedkola.types import Dataset


def entry(round: int, scope: str, *records: str) -> Entry:
    return Entry(
        round=round,
        scope=scope,
        records=records,
        patients=tuple(f"p{record}" for record in records),
        labels=tuple(f"{scope}-1" for _ in records),
        windows=tuple(1 for _ in records),
        z=torch.arange(3 * len(records), dtype=torch.int16).reshape(-1, 3),
    )


def places(store: Path) -> list[tuple[int, str]]:
    return [(found.round, found.scope) for found in journal.entries(store)]


def test_an_entry_reads_back_with_every_bit(tmp_path: Path):
    written = entry(2, "Herz/Kreislauf ♥", "r1", "r2")
    journal.write(tmp_path, written)
    found = journal.read(tmp_path, 2, "Herz/Kreislauf ♥")
    assert found is not None
    assert torch.equal(found.z, written.z)
    assert replace(found, z=written.z) == written
    assert journal.read(tmp_path, 1, "Herz/Kreislauf ♥") is None


def test_writing_a_round_and_scope_again_replaces_the_entry(tmp_path: Path):
    journal.write(tmp_path, entry(1, "heart", "r1", "r2"))
    journal.write(tmp_path, entry(1, "heart", "r1"))
    assert [found.records for found in journal.entries(tmp_path)] == [("r1",)]


def test_a_record_that_was_summed_is_not_pending_in_a_later_round(tmp_path: Path):
    data = Dataset(
        records=("r1", "r2", "r3"),
        texts=("", "", ""),
        labels=("a", "a", "a"),
        patients=("p", "p", "p"),
        windows=(1, 1, 1),
    )
    journal.write(tmp_path, entry(1, "heart", "r1"))
    journal.write(tmp_path, entry(2, "heart", "r3"))
    assert journal.pending(tmp_path, data, round=1).records == ("r1", "r2", "r3")
    assert journal.pending(tmp_path, data, round=2).records == ("r2", "r3")
    assert journal.pending(tmp_path, data, round=3).records == ("r2",)


def test_deleting_records_leaves_the_rest_of_their_entries(tmp_path: Path):
    journal.write(tmp_path, entry(1, "heart", "r1", "r2", "r3"))
    journal.write(tmp_path, entry(1, "lung", "r4"))
    journal.delete(tmp_path, {(1, "heart"): {"r2"}, (1, "lung"): {"r4"}, (2, "none"): {"r1"}})
    (left,) = journal.entries(tmp_path)
    assert left.records == ("r1", "r3")
    assert left.patients == ("pr1", "pr3")
    assert left.z.tolist() == [[0, 1, 2], [6, 7, 8]]
    assert not any(b"r4" in path.read_bytes() for path in (tmp_path / "journal").iterdir())


def test_entries_of_sums_that_never_came_about_are_dropped(tmp_path: Path):
    for number, scope in ((1, "heart"), (1, "lung"), (2, "heart"), (3, "heart")):
        journal.write(tmp_path, entry(number, scope, f"{number}{scope}"))
    journal.reconcile(tmp_path, {(1, "heart"), (2, "heart")}, round=3)
    assert places(tmp_path) == [(1, "heart"), (2, "heart")]


def test_a_question_of_an_earlier_round_does_not_touch_later_entries(tmp_path: Path):
    journal.write(tmp_path, entry(1, "heart", "r1"))
    journal.write(tmp_path, entry(4, "heart", "r2"))
    with pytest.raises(StaleUpdate, match="round 4"):
        journal.reconcile(tmp_path, set(), round=3)
    assert places(tmp_path) == [(1, "heart"), (4, "heart")]


def test_a_damaged_entry_is_named_and_not_skipped(tmp_path: Path):
    journal.write(tmp_path, entry(1, "heart", "r1"))
    (path,) = (tmp_path / "journal").iterdir()
    path.write_bytes(path.read_bytes()[:20])
    with pytest.raises(DataError, match=f"{path.name}.*backup"):
        journal.entries(tmp_path)


def test_keeping_and_taking_parts_of_an_entry_are_complements():
    whole = entry(1, "heart", "r1", "r2", "r3")
    rest, part = journal.keep(whole, without={"r2"}), journal.only(whole, records={"r2"})
    assert (rest.records, part.records) == (("r1", "r3"), ("r2",))
    assert part.z.tolist() == [[3, 4, 5]]
    assert len(journal.keep(whole, without={"r1", "r2", "r3"})) == 0
