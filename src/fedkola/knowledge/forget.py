"""Removal: what a request concerns, what each site subtracts, and the receipt that says so.

| class | cells | what is done | what is equal afterwards |
|---|---|---|---|
| E0 | analytic, router | stored embeddings are summed and subtracted | all integers, bit for bit |
| E1 | one-shot LoRA, a whole site | the stored addend is subtracted | all integers, bit for bit |
| E2 | one-shot LoRA, a patient or record | retrained without it, same seed | bits on one machine |

Equality is to the bank that never had the data, given the recorded opening decisions.
"""

import hmac
import json
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

from fedkola.errors import UnknownCell
from fedkola.knowledge import journal
from fedkola.knowledge.bank import CellKind

NEXT = ".next"
"""A LoRA receipt ``CELL.REQUEST.next`` becomes the receipt when that request is settled."""

NOT_COVERED = (
    "the pre-trained base model",
    "views and files that were exported or downloaded before the removal",
    "backups and third-party logs",
    "the decision to open a module or a label row, which the removed records helped to take",
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """Who is to be forgotten. ``kind`` is site, patient or record; ``name`` stays at the site.

    ``key`` is the site's own secret (hex), which :func:`keyed` fills in: without it anyone could
    find out who was forgotten by hashing names of patients.
    """

    kind: str
    site: str
    name: str = ""
    key: str = ""

    @property
    def id(self) -> str:
        """A keyed hash that names the request in the ledger without naming the patient."""
        text = f"fedkola/forget/1/{self.kind}/{self.site}/{self.name}"
        return hmac.new(bytes.fromhex(self.key), text.encode(), "sha256").hexdigest()[:16]


@dataclass(frozen=True, slots=True, kw_only=True)
class CellOutcome:
    """One cell of a removal: its class E0..E2 and the hash of its integers before and after."""

    cell: str
    module: str
    kind: str
    outcome: str
    before: str
    after: str


@dataclass(frozen=True, slots=True, kw_only=True)
class ForgetReceipt:
    """What was removed, from which cells, and which view replaced which.

    ``recount`` says whether the remaining sites' journals, summed again from zero, gave exactly
    the integers left in every cell; None if nobody asked them.
    """

    request: str
    kind: str
    site: str
    records: int
    cells: tuple[CellOutcome, ...]
    view_before: str
    view_after: str
    recount: bool | None
    seconds: float
    not_covered: tuple[str, ...] = NOT_COVERED


def keyed(store: Path, request: Request) -> Request:
    """The request under the site's key, made at first use. Leaving sites are no secret."""
    if request.kind == "site":
        return request
    path = store / "request.key"
    if not path.exists():
        store.mkdir(parents=True, exist_ok=True)
        draft = path.with_suffix(".tmp")
        draft.touch(mode=0o600)
        draft.write_text(secrets.token_hex(32))
        journal.settle(draft, path)
    return replace(request, key=path.read_text())


def concerned(store: Path, request: Request) -> dict[tuple[int, str], frozenset[str]]:
    """(round, scope) -> record ids under the request, from the site's own journal.

    Raises UnknownCell if the site never contributed such a record.
    """
    found: dict[tuple[int, str], frozenset[str]] = {}
    entries = journal.entries(store)
    pairs = [pair for e in entries for pair in zip(e.records, e.patients, strict=True)]
    # A record that was once the patient's goes in all its versions.
    patients = {record for record, patient in pairs if patient == request.name}
    for entry in entries:
        if request.kind == "site":
            chosen = frozenset(entry.records)
        elif request.kind == "patient":
            chosen = frozenset(entry.records) & patients
        else:
            chosen = frozenset(entry.records) & {request.name}
        if chosen:
            found[entry.round, entry.scope] = chosen
    if not found:
        what = f"{request.kind} {request.name!r}".replace(" ''", "")
        raise UnknownCell(
            f"site {request.site} contributed nothing for {what}; "
            "check the identifier as it stands in the site's data"
        )
    return found


def classify(kind: CellKind, request: Request) -> str:
    """The forgetting class of one cell under a request."""
    if kind is not CellKind.LORA:
        return "E0"
    return "E1" if request.kind == "site" else "E2"


def post(store: Path, request: Request) -> None:
    """Keep a request at its site until it is settled; it survives restarts."""
    _write(store / "removals.json", {**_read(store), request.id: _entry(request, settled=False)})


def posted(store: Path) -> tuple[Request, ...]:
    """Requests that were accepted at this site and are not settled yet."""
    return tuple(_request(doc) for doc in _read(store).values() if not doc["settled"])


def accepted(store: Path) -> tuple[Request, ...]:
    """All requests of this site, settled or not: their records are never contributed again."""
    return tuple(_request(doc) for doc in _read(store).values())


def settle(store: Path, request: Request) -> None:
    """Delete the journal rows under a request; the last step, after the bank has changed."""
    try:
        chosen = concerned(store, request)
    except UnknownCell:
        chosen = {}
    for records in chosen.values():
        journal.delete(store, records=records)
    for receipt in (store / "receipts").glob("*"):
        if request.kind == "site":
            receipt.unlink()
    adopt(store, request.id)
    journal.unmark(store)
    _write(store / "removals.json", {**_read(store), request.id: _entry(request, settled=True)})


def adopt(store: Path, name: str) -> None:
    """Receipts of LoRA cells that were retrained under this name become the receipts."""
    for draft in (store / "receipts").glob(f"*.{name}{NEXT}"):
        draft.replace(draft.with_name(draft.name.split(".")[0] + ".safetensors"))


def document(receipt: ForgetReceipt) -> dict[str, Any]:
    """The receipt as a JSON document."""
    return asdict(receipt)


def receipt_from(document: Mapping[str, Any]) -> ForgetReceipt:
    """The inverse of ``document``; whatever else the ledger keeps beside it is left out."""
    values = {f.name: document[f.name] for f in fields(ForgetReceipt)}
    cells = tuple(CellOutcome(**cell) for cell in document["cells"])
    not_covered = tuple(document["not_covered"])
    return ForgetReceipt(**values | {"cells": cells, "not_covered": not_covered})


def summary(cells: Sequence[CellOutcome]) -> str:
    """For example "9 cells: 6 E0, 3 E1"."""
    counts = {name: sum(c.outcome == name for c in cells) for name in ("E0", "E1", "E2")}
    parts = ", ".join(f"{count} {name}" for name, count in counts.items() if count)
    return f"{len(cells)} cells: {parts}" if parts else "0 cells"


def _entry(request: Request, *, settled: bool) -> dict[str, Any]:
    return {**asdict(request), "settled": settled}


def _request(entry: Mapping[str, Any]) -> Request:
    return Request(kind=entry["kind"], site=entry["site"], name=entry["name"], key=entry["key"])


def _read(store: Path) -> dict[str, Any]:
    path = store / "removals.json"
    found: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
    return found


def _write(path: Path, content: Mapping[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_suffix(".tmp")
    draft.write_text(json.dumps(content, indent=1, sort_keys=True))
    journal.settle(draft, path)
