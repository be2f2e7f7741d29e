"""Whether a receipt still stands: every hash it names, against the ledger and the integers on disk.

Nothing is asked of any site. What later rounds or removals changed is said, not held against it.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from fedkola import wire
from fedkola.algorithms.fedkola import State
from fedkola.errors import UnknownCell
from fedkola.knowledge import bank as banks
from fedkola.knowledge import forget
from fedkola.knowledge.forget import ForgetReceipt
from fedkola.ledger import Ledger


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """One thing that a receipt says; ``how`` tells what it was compared with."""

    what: str
    holds: bool
    how: str


def find(ledger: Ledger, run: str, request: str) -> ForgetReceipt:
    """The receipt of a request, or of all that were carried out with it; raises UnknownCell."""
    for row in ledger.removals(run):
        receipt = forget.receipt_from(row["receipt"])
        if receipt.request == request:
            return receipt
        if request in {part.request for part in receipt.parts}:
            return receipt.of(request)
    raise UnknownCell(
        f"no receipt {request!r} in this run; `fedkola bank ls` shows those there are, and a "
        "request that waits has none yet"
    )


def verify(ledger: Ledger, run: str, receipt: ForgetReceipt) -> tuple[Finding, ...]:
    """What became of everything the receipt names. Raises ChainBroken or BlobMissing where the
    ledger itself is not as it was written, UnknownCell if it knows of no such removal."""
    head = ledger.verify(run)
    events, saved = ledger.events(run), ledger.last(run)
    kept = find(ledger, run, receipt.request)
    own = [e for e in events if e.kind == "FORGET" and _same(e.body, kept)]
    if saved is None or not own:
        raise UnknownCell(f"the ledger holds no removal {receipt.request}; it was made elsewhere")
    at = own[0]
    found = [
        Finding(what="chain of events", holds=True, how=f"recomputed, head {head[:16]}"),
        Finding(
            what="receipt",
            holds=_plain(receipt) == _plain(kept),
            how=f"event {at.seq}, round {at.round}",
        ),
    ]
    bank = wire.load(State, saved.state, saved.tensors).bank
    live = {cell.about.id: cell for cell in bank.cells}
    for cell in receipt.cells:
        history = [e for e in events if e.subject == cell.cell and "words" in e.body]
        words = [
            "revoked" if e.kind == "REVOKE" else e.body["words"] for e in history if e.seq < at.seq
        ]
        holds, how = _steps(words, cell.before, cell.after), "chain"
        later = any(e.seq > at.seq for e in history)
        if holds and later:
            how = "chain; changed again since"
        elif holds and cell.cell in live:
            held = live[cell.cell]
            holds = banks.content(held.about.labels, held.total) == cell.after
            how = "chain and integers on disk"
        found.append(Finding(what=f"cell {cell.cell} of {cell.module}", holds=holds, how=how))
    return tuple(found)


def last_word(ledger: Ledger, run: str, receipt: ForgetReceipt) -> bool:
    """Whether nothing has changed the bank since, so that its view must be the receipt's."""
    events = ledger.events(run)
    return bool(events) and events[-1].kind == "FORGET" and _same(events[-1].body, receipt)


# --- private --------------------------------------------------------------------------------------


def _same(body: Any, receipt: ForgetReceipt) -> bool:
    mine = {part.request for part in receipt.parts}
    return {part["request"] for part in body.get("parts", ())} == mine


def _steps(words: Sequence[str], before: str, after: str) -> bool:
    """Whether the last change that the chain knows of is the one from ``before`` to ``after``."""
    changes = [new for old, new in zip([None, *words], words, strict=False) if new != old]
    return changes[-2:] == [before, after]


def _plain(receipt: ForgetReceipt) -> ForgetReceipt:
    return replace(receipt, already=False)
