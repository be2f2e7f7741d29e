"""What a request concerns at a site, and what is left of it there afterwards."""

import json
from pathlib import Path

import pytest
import torch

from fedkola.errors import UnknownCell
from fedkola.knowledge import forget, journal
from fedkola.knowledge.bank import CellKind
from fedkola.knowledge.forget import CellOutcome, ForgetReceipt, Request
from fedkola.knowledge.journal import Entry


@pytest.fixture
def store(tmp_path: Path) -> Path:
    """Two rounds; patient p1 has records in both, p2 in the second."""
    for number, scope, rows in (
        (1, "heart", (("r1", "p1"), ("r2", "p3"))),
        (2, "heart", (("r3", "p1"), ("r4", "p2"))),
        (2, "lung", (("r5", "p2"),)),
    ):
        journal.write(
            tmp_path,
            Entry(
                round=number,
                scope=scope,
                records=tuple(record for record, _ in rows),
                patients=tuple(patient for _, patient in rows),
                labels=tuple("x" for _ in rows),
                windows=tuple(number for _ in rows),
                z=torch.zeros(len(rows), 2, dtype=torch.int16),
            ),
        )
    return tmp_path


SITE = Request(kind="site", site="north")
P1 = Request(kind="patient", site="north", name="p1")
R4 = Request(kind="record", site="north", name="r4")


def test_a_request_concerns_all_records_of_its_subject(store: Path):
    assert forget.concerned(store, P1) == {(1, "heart"): {"r1"}, (2, "heart"): {"r3"}}
    assert forget.concerned(store, R4) == {(2, "heart"): {"r4"}}
    assert forget.concerned(store, SITE) == {
        (1, "heart"): {"r1", "r2"},
        (2, "heart"): {"r3", "r4"},
        (2, "lung"): {"r5"},
    }


def test_a_subject_that_is_unknown_here_is_an_error_and_not_an_empty_removal(store: Path):
    with pytest.raises(UnknownCell, match="nothing for patient 'p9'"):
        forget.concerned(store, Request(kind="patient", site="north", name="p9"))
    with pytest.raises(UnknownCell, match="site north contributed nothing for site"):
        forget.concerned(store / "empty", SITE)


def test_a_request_is_named_without_naming_the_patient():
    assert P1.id == Request(kind="patient", site="north", name="p1").id
    assert len({P1.id, R4.id, SITE.id, Request(kind="record", site="north", name="p1").id}) == 4
    assert "p1" not in P1.id


def test_a_posted_request_waits_until_it_is_settled_and_is_remembered_for_ever(store: Path):
    forget.post(store, P1)
    forget.post(store, R4)
    assert set(forget.posted(store)) == {P1, R4}
    forget.settle(store, P1)
    assert forget.posted(store) == (R4,)
    assert set(forget.accepted(store)) == {P1, R4}


def test_settling_deletes_the_rows_of_the_subject_and_no_others(store: Path):
    forget.post(store, P1)
    forget.settle(store, P1)
    left = [record for entry in journal.entries(store) for record in entry.records]
    assert left == ["r2", "r4", "r5"]
    forget.settle(store, P1)  # killed in between, settled again
    assert [r for entry in journal.entries(store) for r in entry.records] == left


def test_settling_a_site_leaves_no_journal_and_no_receipt(store: Path):
    (store / "receipts").mkdir()
    for name in ("000001-0.safetensors", f"000001-0.{P1.id}.next", "000002-0.tmp"):
        (store / "receipts" / name).write_text("x")
    forget.post(store, SITE)
    forget.settle(store, SITE)
    assert list((store / "journal").iterdir()) == []
    assert list((store / "receipts").iterdir()) == []


def test_settling_one_request_leaves_the_unsettled_receipt_of_another(store: Path):
    receipts = store / "receipts"
    receipts.mkdir()
    (receipts / "000001-0.safetensors").write_text("old")
    (receipts / "000002-0.safetensors").write_text("old")
    (receipts / f"000001-0.{P1.id}.next").write_text("without p1")
    (receipts / f"000002-0.{R4.id}.next").write_text("without r4")
    forget.post(store, P1)
    forget.post(store, R4)
    forget.settle(store, R4)
    assert {path.name: path.read_text() for path in receipts.iterdir()} == {
        "000001-0.safetensors": "old",
        "000002-0.safetensors": "without r4",
        f"000001-0.{P1.id}.next": "without p1",
    }


def test_the_class_of_a_removal_depends_on_the_cell_and_on_what_is_left_of_an_addend():
    for whole in (True, False):
        assert forget.classify(CellKind.ANALYTIC, whole=whole) == "E0"
        assert forget.classify(CellKind.ROUTER, whole=whole) == "E0"
    assert forget.classify(CellKind.LORA, whole=True) == "E1"
    assert forget.classify(CellKind.LORA, whole=False) == "E2"


def outcome(kind: str) -> CellOutcome:
    return CellOutcome(
        cell="c", module="m@1", kind="lora", outcome=kind, before="a" * 8, after="b" * 8
    )


def test_a_receipt_reads_back_from_json_with_what_the_ledger_adds():
    receipt = ForgetReceipt(
        request=P1.id,
        kind="patient",
        site="north",
        records=2,
        cells=(outcome("E0"), outcome("E2")),
        view_before="v1",
        view_after="v2",
        recount=None,
        seconds=0.5,
    )
    kept = json.loads(json.dumps(forget.document(receipt) | {"scope": {"request": P1.id}}))
    assert forget.receipt_from(kept) == receipt


def test_a_summary_counts_classes():
    cells = [outcome("E0")] * 6 + [outcome("E1")] * 3
    assert forget.summary(cells) == "9 cells: 6 E0, 3 E1"
    assert forget.summary([]) == "0 cells"
