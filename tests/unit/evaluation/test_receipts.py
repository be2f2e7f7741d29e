"""A receipt is held to the ledger: every hash it names, and nothing that it does not."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import small_federation as small

from fedkola import removal
from fedkola.errors import UnknownCell
from fedkola.evaluation import receipts
from fedkola.knowledge import forget
from fedkola.knowledge.forget import Request
from fedkola.ledger import Ledger

FAST = ('knowledge.lanes=["analytic", "router"]', "knowledge.features=8")
PATIENT = Request(kind="patient", site="north", name="north-p3")


@pytest.fixture
def federation(tmp_path: Path) -> small.Federation:
    found = small.assemble(tmp_path, *FAST)
    small.run(found)
    return found


def test_a_receipt_holds_and_says_so_of_every_cell(federation: small.Federation):
    with Ledger.open(federation.folder) as ledger:
        receipt = removal.remove(federation, ledger, PATIENT)
        again = forget.receipt_from(json.loads(json.dumps(forget.document(receipt))))
        found = receipts.verify(ledger, "small", again)
        assert receipts.last_word(ledger, "small", receipt)
        assert receipts.find(ledger, "small", receipt.request) == receipt
    assert all(finding.holds for finding in found)
    assert len(found) == 2 + len(receipt.cells)
    assert {finding.how for finding in found[2:]} == {"chain and integers on disk"}


def test_what_changed_since_is_said_and_not_held_against_the_receipt(
    federation: small.Federation,
):
    with Ledger.open(federation.folder) as ledger:
        first = removal.remove(federation, ledger, PATIENT)
        removal.remove(federation, ledger, Request(kind="site", site="west"))
        found = receipts.verify(ledger, "small", first)
        assert not receipts.last_word(ledger, "small", first)
    assert all(finding.holds for finding in found)
    assert "chain; changed again since" in {finding.how for finding in found}


def test_a_receipt_with_another_hash_does_not_hold(federation: small.Federation):
    with Ledger.open(federation.folder) as ledger:
        receipt = removal.remove(federation, ledger, PATIENT)
        forged = replace(
            receipt, cells=(replace(receipt.cells[0], after="0" * 64), *receipt.cells[1:])
        )
        found = receipts.verify(ledger, "small", forged)
    assert [finding.what for finding in found if not finding.holds] == [
        "receipt",
        f"cell {receipt.cells[0].cell} of {receipt.cells[0].module}",
    ]


def test_one_of_a_batch_and_a_revoked_cell_hold_too(federation: small.Federation):
    requests = [Request(kind="module", name="lung"), PATIENT]
    with Ledger.open(federation.folder) as ledger:
        first, second = removal.remove_together(federation, ledger, requests)
        for receipt in (first, second):
            assert all(finding.holds for finding in receipts.verify(ledger, "small", receipt))
        assert receipts.find(ledger, "small", second.request) == second
    assert "revoked" in {cell.after for cell in first.cells}


def test_a_receipt_of_another_run_is_unknown(federation: small.Federation):
    with Ledger.open(federation.folder) as ledger:
        receipt = removal.remove(federation, ledger, PATIENT)
        with pytest.raises(UnknownCell, match="no receipt 'abc'"):
            receipts.verify(ledger, "small", replace(receipt, request="abc"))
