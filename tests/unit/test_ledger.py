import hashlib
import json
import sqlite3
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from fedkola.errors import BlobMissing, ChainBroken, LedgerError, RunNotFound
from fedkola.ledger import Ledger, RunRow
from fedkola.types import Event

PLAN = {"run": {"name": "spring"}, "privacy": {"epsilon": "inf"}}
PLAN_HASH = "9c" * 32
SEAL: Event = {"kind": "SEAL", "subject": "cell-1", "body": {"sites": 3, "label": "façade"}}


@pytest.fixture
def ledger(tmp_path: Path) -> Iterator[Ledger]:
    with Ledger.open(tmp_path / "spring", create=True) as opened:
        opened.start("spring", PLAN, PLAN_HASH, now=1.5)
        yield opened


def commit(
    ledger: Ledger,
    number: int,
    *,
    tensors: Mapping[str, Tensor] | None = None,
    events: Sequence[Event] = (SEAL,),
    report: Mapping[str, Any] | None = None,
) -> str:
    return ledger.commit(
        "spring",
        number,
        state={"round": number},
        tensors={"x": torch.tensor([float(number)])} if tensors is None else tensors,
        report={"metrics": {"correct": number}} if report is None else report,
        sampler={"seed": number},
        events=events,
        now=100.25 + number,
    )


def files(ledger: Ledger) -> set[str]:
    return {path.name for path in (ledger.folder / "blobs").iterdir()}


def rewrite(ledger: Ledger, *statements: str) -> None:
    """Change rows behind the ledger's back, as somebody with the file can."""
    connection = sqlite3.connect(ledger.folder / "ledger.db")
    connection.execute("DROP TRIGGER IF EXISTS events_no_update")
    connection.execute("DROP TRIGGER IF EXISTS events_no_delete")
    for statement in statements:
        connection.execute(statement)
    connection.commit()
    connection.close()


# --- opening and starting -------------------------------------------------------------------------


def test_a_folder_without_a_run_is_not_found(tmp_path: Path):
    with pytest.raises(RunNotFound, match=r"expected a file ledger\.db"):
        Ledger.open(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_ledger_that_was_never_filled_is_not_a_run(tmp_path: Path):
    (tmp_path / "ledger.db").touch()
    with pytest.raises(RunNotFound, match="is empty"):
        Ledger.open(tmp_path)
    with Ledger.open(tmp_path, create=True) as ledger, pytest.raises(RunNotFound):
        ledger.run()


def test_a_started_run_is_read_back(ledger: Ledger):
    assert ledger.run() == RunRow(id="spring", plan=PLAN, plan_hash=PLAN_HASH, state="new", round=0)
    assert ledger.last("spring") is None
    assert ledger.rounds("spring") == ()
    assert ledger.events("spring") == ()
    assert ledger.removals("spring") == ()
    assert ledger.verify("spring") == "00" * 32


def test_starting_again_with_the_same_plan_changes_nothing(ledger: Ledger):
    commit(ledger, 1)
    ledger.start("spring", PLAN, PLAN_HASH, now=99)
    assert ledger.run().round == 1


@pytest.mark.parametrize(("run", "plan_hash"), [("spring", "11" * 32), ("autumn", PLAN_HASH)])
def test_a_folder_holds_one_run_with_one_plan(ledger: Ledger, run: str, plan_hash: str):
    with pytest.raises(LedgerError, match=r"holds run 'spring' with plan 9c9c9c9c"):
        ledger.start(run, PLAN, plan_hash, now=2)


def test_another_run_than_that_of_the_folder_is_not_found(ledger: Ledger):
    for ask in (ledger.last, ledger.rounds, ledger.events, ledger.removals, ledger.verify):
        with pytest.raises(RunNotFound, match=r"holds run 'spring'"):
            ask("autumn")


def test_a_file_that_is_no_database_is_named(tmp_path: Path):
    (tmp_path / "ledger.db").write_bytes(b"not a database, but long enough to look like one" * 40)
    with pytest.raises(LedgerError, match=r"ledger\.db: file is not a database"):
        Ledger.open(tmp_path)


def test_a_newer_schema_is_refused(ledger: Ledger):
    rewrite(ledger, "PRAGMA user_version = 2")
    with pytest.raises(LedgerError, match="has schema 2, this fedkola knows up to 1"):
        Ledger.open(ledger.folder)


def test_a_folder_with_odd_characters_in_its_name_holds_a_run(tmp_path: Path):
    folder = tmp_path / "a?b #c%20[1]"
    with Ledger.open(folder, create=True) as ledger:
        ledger.start("r", {}, PLAN_HASH, now=0)
    assert (folder / "ledger.db").is_file()


def test_a_folder_that_cannot_be_made_is_a_ledger_error(tmp_path: Path):
    (tmp_path / "file").touch()
    with pytest.raises(LedgerError, match="cannot be made"):
        Ledger.open(tmp_path / "file" / "run", create=True)


def test_the_database_is_durable_and_checks_its_references(ledger: Ledger):
    with ledger._read() as connection:
        for pragma, value in [
            ("journal_mode", "wal"),
            ("synchronous", 2),
            ("foreign_keys", 1),
            ("busy_timeout", 5000),
            ("user_version", 1),
        ]:
            assert connection.exec_driver_sql(f"PRAGMA {pragma}").scalar_one() == value


# --- rounds ---------------------------------------------------------------------------------------


def test_the_last_round_is_all_that_resuming_needs(ledger: Ledger):
    commit(ledger, 1)
    head = commit(ledger, 2, tensors={"a": torch.arange(6).reshape(2, 3)})
    with Ledger.open(ledger.folder) as again:
        saved = again.last("spring")
        assert saved is not None
        assert saved.number == 2
        assert saved.state == {"round": 2}
        assert saved.report == {"metrics": {"correct": 2}}
        assert saved.sampler == {"seed": 2}
        assert saved.chain_head == head
        assert list(saved.tensors) == ["a"]
        assert torch.equal(saved.tensors["a"], torch.tensor([[0, 1, 2], [3, 4, 5]]))
        assert (again.run().state, again.run().round) == ("running", 2)


def test_rounds_are_listed_in_order_with_their_times(ledger: Ledger):
    heads = [commit(ledger, 1), commit(ledger, 2)]
    rows = ledger.rounds("spring")
    assert [row.number for row in rows] == [1, 2]
    assert [row.committed_at for row in rows] == [101.25, 102.25]
    assert [row.chain_head for row in rows] == heads
    assert rows[1].report == {"metrics": {"correct": 2}}
    assert rows[1].sampler == {"seed": 2}


def test_the_first_round_may_be_the_state_before_any_training(ledger: Ledger):
    commit(ledger, 0)
    commit(ledger, 1)
    assert [row.number for row in ledger.rounds("spring")] == [0, 1]


@pytest.mark.parametrize("number", [0, 1, 4, -1])
def test_rounds_have_no_gaps_and_do_not_go_back(ledger: Ledger, number: int):
    commit(ledger, 1)
    commit(ledger, 2)
    with pytest.raises(LedgerError, match=f"round {number} "):
        commit(ledger, number, tensors={"x": torch.tensor([9.0])})
    assert ledger.run().round == 2


def test_the_same_round_with_the_same_state_is_accepted_once(ledger: Ledger):
    head = commit(ledger, 1)
    assert commit(ledger, 1) == head
    assert len(ledger.events("spring")) == 1


def test_the_same_round_with_another_state_is_refused(ledger: Ledger):
    commit(ledger, 1)
    with pytest.raises(LedgerError, match="already saved with another state"):
        commit(ledger, 1, tensors={"x": torch.tensor([9.0])})
    saved = ledger.last("spring")
    assert saved is not None
    assert saved.tensors["x"].tolist() == [1.0]


def test_a_round_without_a_run_is_refused(tmp_path: Path):
    with Ledger.open(tmp_path, create=True) as ledger, pytest.raises(RunNotFound, match="no run"):
        commit(ledger, 1)


def test_a_round_that_cannot_be_written_down_leaves_nothing(ledger: Ledger):
    commit(ledger, 1)
    with pytest.raises(LedgerError, match="cannot be written as JSON"):
        commit(ledger, 2, events=[SEAL, {"kind": "SEAL", "subject": "", "body": {"x": object()}}])
    with pytest.raises(LedgerError, match="event SEAL cannot be written as JSON"):
        commit(ledger, 2, events=[{"kind": "SEAL", "subject": "", "body": {"x": float("nan")}}])
    with pytest.raises(LedgerError, match="expected kind, subject and body"):
        commit(ledger, 2, events=[{"kind": "SEAL", "topic": "cell-1"}])
    assert ledger.run().round == 1
    assert len(ledger.events("spring")) == 1
    assert ledger.verify("spring") == ledger.rounds("spring")[0].chain_head


def test_a_report_may_hold_a_metric_that_is_no_number(ledger: Ledger):
    commit(ledger, 1, report={"loss": float("inf")})
    assert ledger.rounds("spring")[0].report == {"loss": float("inf")}


@pytest.mark.parametrize("content", ['{"round":2}', "'{}'", "'half'", "X'FF'"])
def test_an_altered_state_is_found(ledger: Ledger, content: str):
    commit(ledger, 1)
    if content.startswith("{"):
        change = f"replace(state, '{{\"round\":1}}', '{content}')"
    else:
        change = f"CAST({content} AS TEXT)"
    rewrite(ledger, f"UPDATE rounds SET state = {change}")
    with pytest.raises(LedgerError, match=r"altered|decode"):
        ledger.last("spring")


def test_a_run_ends_in_one_of_three_ways(ledger: Ledger):
    for state in ("stopped", "failed", "done"):
        ledger.finish("spring", state)
        assert ledger.run().state == state
    with pytest.raises(LedgerError, match="expected done, failed or stopped"):
        ledger.finish("spring", "finished")


def test_a_second_writer_waits_and_then_sees_the_first(ledger: Ledger):
    with Ledger.open(ledger.folder) as other:
        commit(ledger, 1)
        with pytest.raises(LedgerError, match="already saved with another state"):
            commit(other, 1, tensors={"x": torch.tensor([7.0])})
        commit(other, 2)
    assert ledger.run().round == 2


# --- tensors --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "tensor",
    [
        torch.tensor([1.5, -2.25], dtype=torch.bfloat16),
        torch.tensor([[1, -2], [3, 4]], dtype=torch.int16),
        torch.tensor([2**31 - 1, -(2**31)], dtype=torch.int32),
        torch.tensor([2**63 - 1, -(2**63)], dtype=torch.int64),
        torch.tensor([1e-300, float("nan"), float("-inf")], dtype=torch.float64),
        torch.tensor([True, False, True]),
        torch.zeros(0, 3),
        torch.tensor(2.5),
        torch.arange(12.0).reshape(3, 4).T,
        torch.arange(9.0)[1:],
        torch.nn.Parameter(torch.tensor([1.0])),
    ],
    ids=str,
)
def test_every_kind_of_tensor_comes_back_bit_for_bit(ledger: Ledger, tensor: Tensor):
    commit(ledger, 1, tensors={"x": tensor})
    with Ledger.open(ledger.folder) as again:
        saved = again.last("spring")
    assert saved is not None
    back = saved.tensors["x"]
    assert (back.dtype, back.shape) == (tensor.dtype, tensor.shape)
    plain = tensor.detach().contiguous().reshape(-1).view(torch.uint8)
    assert torch.equal(back.reshape(-1).view(torch.uint8), plain)


def test_a_blob_is_named_by_dtype_shape_and_bytes(ledger: Ledger):
    commit(ledger, 1, tensors={"x": torch.tensor([[1, 2]], dtype=torch.int16)})
    name = hashlib.sha256(b"int16|1,2|\x01\x00\x02\x00").hexdigest()
    assert files(ledger) == {name}
    stored = load_file(ledger.folder / "blobs" / name)
    assert stored["x"].tolist() == [[1, 2]]


def test_equal_tensors_share_a_file_and_unequal_shapes_do_not(ledger: Ledger):
    commit(
        ledger,
        1,
        tensors={
            "a": torch.zeros(2, 3),
            "b": torch.zeros(2, 3),
            "c": torch.zeros(3, 2),
            "d": torch.zeros(2, 3, dtype=torch.int32),
        },
    )
    assert len(files(ledger)) == 3
    saved = ledger.last("spring")
    assert saved is not None
    assert [tuple(tensor.shape) for tensor in saved.tensors.values()] == [(2, 3)] * 2 + [
        (3, 2),
        (2, 3),
    ]


def test_a_tensor_that_stays_is_written_once(ledger: Ledger):
    kept = torch.arange(4.0)
    commit(ledger, 1, tensors={"kept": kept})
    (path,) = (ledger.folder / "blobs").iterdir()
    written = path.stat().st_mtime_ns
    commit(ledger, 2, tensors={"kept": kept, "also": kept.clone()})
    assert [path.stat().st_mtime_ns for path in (ledger.folder / "blobs").iterdir()] == [written]


def test_a_tensor_changed_in_place_is_saved_as_it_is_now(ledger: Ledger):
    x = torch.zeros(3)
    commit(ledger, 1, tensors={"x": x})
    x.add_(1)
    commit(ledger, 2, tensors={"x": x})
    x.data.add_(1)
    commit(ledger, 3, tensors={"x": x})
    x.numpy()[0] = 7
    commit(ledger, 4, tensors={"x": x})
    saved = ledger.last("spring")
    assert saved is not None
    assert saved.tensors["x"].tolist() == [7.0, 2.0, 2.0]
    assert len(files(ledger)) == 4


def test_a_loaded_tensor_may_be_changed_without_touching_the_file(ledger: Ledger):
    big = torch.zeros(1 << 19)
    commit(ledger, 1, tensors={"small": torch.zeros(2), "big": big})
    saved = ledger.last("spring")
    assert saved is not None
    for tensor in saved.tensors.values():
        tensor.add_(1)
    again = ledger.last("spring")
    assert again is not None
    assert not again.tensors["big"].any()
    assert not again.tensors["small"].any()
    commit(ledger, 2, tensors=saved.tensors)
    last = ledger.last("spring")
    assert last is not None
    assert last.tensors["big"].all()


def test_a_tensor_without_data_is_refused(ledger: Ledger):
    with pytest.raises(LedgerError, match=r"tensor 'x' .* give a dense tensor with data"):
        commit(ledger, 1, tensors={"x": torch.zeros(2, device="meta")})
    with pytest.raises(LedgerError, match="give a dense tensor"):
        commit(ledger, 1, tensors={"x": torch.zeros(2, 2).to_sparse()})


def test_an_absent_blob_is_missing(ledger: Ledger):
    commit(ledger, 1)
    (name,) = files(ledger)
    (ledger.folder / "blobs" / name).unlink()
    with pytest.raises(BlobMissing, match=f"{name} is absent"):
        ledger.last("spring")


@pytest.mark.parametrize("position", [0, 4, 20, -1])
def test_an_altered_blob_is_missing(ledger: Ledger, position: int):
    commit(ledger, 1, tensors={"x": torch.arange(8.0)})
    (name,) = files(ledger)
    content = bytearray((ledger.folder / "blobs" / name).read_bytes())
    content[position] ^= 1
    (ledger.folder / "blobs" / name).write_bytes(content)
    with pytest.raises(BlobMissing, match=name):
        ledger.last("spring")


@pytest.mark.parametrize("length", [0, 5, 70])
def test_a_truncated_blob_is_missing(ledger: Ledger, length: int):
    commit(ledger, 1, tensors={"x": torch.arange(64.0)})
    (name,) = files(ledger)
    content = (ledger.folder / "blobs" / name).read_bytes()
    (ledger.folder / "blobs" / name).write_bytes(content[:length])
    with pytest.raises(BlobMissing, match=name):
        ledger.last("spring")


def test_a_blob_of_another_shape_or_name_is_missing(ledger: Ledger):
    commit(ledger, 1, tensors={"x": torch.arange(8.0)})
    (name,) = files(ledger)
    for content in ({"x": torch.arange(8.0).reshape(2, 4)}, {"y": torch.arange(8.0)}):
        save_file(content, ledger.folder / "blobs" / name)
        with pytest.raises(BlobMissing, match=name):
            ledger.last("spring")


def test_a_truncated_blob_is_written_again_by_the_next_round(ledger: Ledger):
    kept = torch.arange(64.0)
    commit(ledger, 1, tensors={"x": kept})
    (name,) = files(ledger)
    (ledger.folder / "blobs" / name).write_bytes(b"")
    commit(ledger, 2, tensors={"x": kept})
    saved = ledger.last("spring")
    assert saved is not None
    assert torch.equal(saved.tensors["x"], kept)


def test_leftovers_of_a_killed_writer_are_cleared_at_the_start(ledger: Ledger):
    (ledger.folder / "blobs" / "half.tmp").write_bytes(b"half")
    ledger.start("spring", PLAN, PLAN_HASH, now=3)
    assert files(ledger) == set()


# --- events ---------------------------------------------------------------------------------------


def test_events_are_chained_by_hash(ledger: Ledger):
    head = commit(ledger, 1, events=[SEAL, {"kind": "OPEN", "subject": "cell-2", "body": {}}])
    first, second = ledger.events("spring")
    assert (first.seq, first.round, first.kind, first.subject) == (1, 1, "SEAL", "cell-1")
    assert first.body == {"sites": 3, "label": "façade"}
    assert first.at == 101.25
    assert first.prev == "00" * 32
    assert second.prev == first.hash
    assert second.hash == head == ledger.verify("spring")
    # Worked by hand, so that another program can verify the chain.
    text = (
        '{"at":101250000,"body":{"label":"façade","sites":3},"kind":"SEAL",'
        '"round":1,"run":"spring","seq":1,"subject":"cell-1"}'
    )
    expected = hashlib.sha256(b"fedkola/event/1\x00" + bytes(32) + text.encode()).hexdigest()
    assert first.hash == expected


def test_a_round_without_events_keeps_the_head(ledger: Ledger):
    head = commit(ledger, 1)
    assert commit(ledger, 2, events=[]) == head
    assert ledger.verify("spring") == head


def test_events_can_be_appended_after_the_last_round(ledger: Ledger):
    commit(ledger, 1)
    commit(ledger, 2)
    head = ledger.append("spring", 2, [{"kind": "WEIGH", "subject": "c", "body": {}}], now=7)
    assert [(event.seq, event.round) for event in ledger.events("spring")] == [
        (1, 1),
        (2, 2),
        (3, 2),
    ]
    assert ledger.verify("spring") == head == ledger.rounds("spring")[-1].chain_head
    with pytest.raises(LedgerError, match="only the last can be changed"):
        ledger.append("spring", 1, [SEAL], now=8)
    commit(ledger, 3)
    ledger.verify("spring")


def test_events_cannot_be_changed_or_deleted(ledger: Ledger):
    commit(ledger, 1)
    connection = sqlite3.connect(ledger.folder / "ledger.db")
    for statement in ("UPDATE events SET subject = 'x'", "DELETE FROM events"):
        with pytest.raises(sqlite3.IntegrityError, match="events are append-only"):
            connection.execute(statement)
    connection.close()


@pytest.mark.parametrize(
    "change",
    [
        "subject = 'cell-9'",
        "kind = 'OPEN'",
        "round = 3",
        "at = at + 1",
        "seq = 7",
        "body = '{}'",
        "body = replace(body, ',', ', ')",
        "body = CAST(X'FF' AS TEXT)",
        "body = 'null'",
        "kind = CAST(X'C328' AS TEXT)",
        "at = 'soon'",
        "hash = zeroblob(32)",
        "prev = X'01'",
        "hash = 'text'",
    ],
)
def test_a_changed_event_breaks_the_chain_at_its_place(ledger: Ledger, change: str):
    for number in (1, 2, 3):
        commit(ledger, number)
    rewrite(ledger, f"UPDATE events SET {change} WHERE seq = 2")
    with pytest.raises(ChainBroken, match=r"event 2 of 'spring'"):
        ledger.verify("spring")


def test_a_missing_event_breaks_the_chain(ledger: Ledger):
    for number in (1, 2, 3):
        commit(ledger, number)
    rewrite(ledger, "DELETE FROM events WHERE seq = 1")
    with pytest.raises(ChainBroken, match=r"event 1 of 'spring'"):
        ledger.verify("spring")


def test_cutting_off_the_last_event_is_found(ledger: Ledger):
    for number in (1, 2, 3):
        commit(ledger, number)
    rewrite(ledger, "DELETE FROM events WHERE seq = 3")
    with pytest.raises(ChainBroken, match="round 3 of 'spring' recorded another chain head"):
        ledger.verify("spring")


def test_an_event_of_a_round_that_never_was_is_found(ledger: Ledger):
    commit(ledger, 1)
    commit(ledger, 2)
    rewrite(ledger, "DELETE FROM rounds WHERE number = 2")
    with pytest.raises(ChainBroken, match="never committed"):
        ledger.verify("spring")


# --- removals -------------------------------------------------------------------------------------


def test_a_removal_replaces_the_last_state_in_one_step(ledger: Ledger):
    commit(ledger, 1, tensors={"sum": torch.tensor([5])})
    head = ledger.amend(
        "spring",
        1,
        state={"round": 1, "left": ["north"]},
        tensors={"sum": torch.tensor([3])},
        events=[{"kind": "FORGET", "subject": "north", "body": {"cells": 1}}],
        removal={"scope": "site north", "cells": 1},
        now=9.5,
    )
    saved = ledger.last("spring")
    assert saved is not None
    assert saved.number == 1
    assert saved.state == {"round": 1, "left": ["north"]}
    assert saved.tensors["sum"].tolist() == [3]
    assert saved.report == {"metrics": {"correct": 1}}
    assert saved.chain_head == head == ledger.verify("spring")
    assert ledger.removals("spring") == (
        {
            "id": 1,
            "scope_hash": hashlib.sha256(json.dumps("site north").encode()).hexdigest(),
            "state": "done",
            "receipt": {"scope": "site north", "cells": 1},
            "at": 9.5,
        },
    )
    commit(ledger, 2)
    assert [event.kind for event in ledger.events("spring")] == ["SEAL", "FORGET", "SEAL"]


def test_only_the_last_round_can_be_amended(ledger: Ledger):
    commit(ledger, 1)
    commit(ledger, 2)
    for number in (1, 3):
        with pytest.raises(LedgerError, match="only the last can be changed"):
            ledger.amend("spring", number, state={}, tensors={}, events=[], removal=None, now=1)
    assert ledger.removals("spring") == ()


def test_a_purge_leaves_nothing_of_what_was_removed(ledger: Ledger):
    shared = torch.arange(3)
    commit(ledger, 1, tensors={"sum": torch.tensor([5]), "shared": shared})
    commit(ledger, 2, tensors={"sum": torch.tensor([6]), "shared": shared})
    ledger.amend(
        "spring",
        2,
        state={},
        tensors={"sum": torch.tensor([3]), "shared": shared},
        events=[],
        removal={"scope": "site north"},
        now=3,
    )
    assert len(files(ledger)) == 4
    freed = ledger.purge("spring", now=4)
    assert freed > 0
    assert len(files(ledger)) == 2
    assert ledger.purge("spring", now=5) == 0
    saved = ledger.last("spring")
    assert saved is not None
    assert saved.tensors["sum"].tolist() == [3]
    assert len(ledger.rounds("spring")) == 2
    # Content that comes back is written again.
    commit(ledger, 3, tensors={"sum": torch.tensor([5])})
    again = ledger.last("spring")
    assert again is not None
    assert again.tensors["sum"].tolist() == [5]
