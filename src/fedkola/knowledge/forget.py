"""Removal: what a request concerns, what each site subtracts, and the receipt that says so.

| class | cells | what is done | what is equal afterwards |
|---|---|---|---|
| E0 | sums of integer embeddings | stored embeddings are summed and subtracted | all integers |
| E1 | one-shot LoRA, all that a site added | the stored addend is subtracted | all integers |
| E2 | one-shot LoRA, a part of it | the addend is trained again, same seed | bits on one machine |
| E3 | any, its leaver is away | dropped; the others send their addends again | all integers |
| E4 | cells under an adapted base | as above; the next round learns the base anew | all, by then |
| E5 | cells that nobody can rebuild | none in this version: every cell is one of the above | - |

Equality is to the bank that never had the data, given the recorded opening decisions.

Two states of a bank differ by what was removed between them, so a removal from fewer than k_min
sites shows whoever saw both what those sites had added. Requests therefore wait for each other
(:func:`ripe`), and the receipt says of every removal whether it met that floor.
"""

import hashlib
import hmac
import json
import secrets
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from fedkola.errors import UnknownCell, UnknownName
from fedkola.files import write_private
from fedkola.knowledge import journal
from fedkola.knowledge.bank import CellKind
from fedkola.knowledge.journal import Entry, Place
from fedkola.knowledge.membership import Evidence
from fedkola.types import Dataset

NEXT = ".next"
"""A LoRA receipt ``CELL.BATCH.next`` becomes the receipt when that batch is settled."""

KINDS = ("site", "patient", "record", "window", "label", "module")
SHARED = ("window", "label", "module")
"""Kinds that may concern every site at once; their names are public."""

CLASSES: Mapping[str, str] = {
    "E0": "subtract: stored embeddings are summed and subtracted; equal bit for bit",
    "E1": "subtract the receipt: the stored addend is subtracted; equal bit for bit",
    "E2": "retrain one addend: without the records, from the same seed; equal bits on one machine",
    "E3": "refill one cell: the others send their stored addends again; equal bit for bit",
    "E4": "cascade: subtracted; the next round learns the adapted base anew, and sums all under it",
    "E5": "approximate: cannot occur, every cell of this version can be rebuilt exactly",
}

NOT_COVERED = (
    "the pre-trained base model",
    "views and files that were exported or downloaded before the removal",
    "backups and third-party logs",
    "the decision to open a module or a label row, which the removed records helped to take",
)
BASE = (
    "the adapted base, which has learnt from the removed records until the next round replaces it"
)
"""Not covered either where cells stand on a base that the federation adapted."""


Names = Mapping[str, set[str]]
"""Kind -> names asked for."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """What is to be forgotten: one of KINDS. ``name`` stays at the site.

    A window, a label or a module without ``site`` concerns every site. ``key`` is the site's own
    secret (hex), which :func:`keyed` fills in: without it anyone could find out who was forgotten
    by hashing names of patients.
    """

    kind: str
    site: str = ""
    name: str = ""
    key: str = ""

    @property
    def id(self) -> str:
        """A keyed hash that names the request in the ledger without naming the patient."""
        text = f"fedkola/forget/1/{self.kind}/{self.site}/{self.name}"
        return hmac.new(bytes.fromhex(self.key), text.encode(), "sha256").hexdigest()[:16]

    @property
    def subject(self) -> str:
        """What is asked for, in words for the person who asked."""
        return f"{self.kind} {self.name!r}" if self.name else self.kind


@dataclass(frozen=True, slots=True, kw_only=True)
class CellOutcome:
    """One cell of a removal: its class, the hash of its integers before and after, and how many
    sites' addends the difference is the sum of (0 where the leaver was away: nobody can tell)."""

    cell: str
    module: str
    kind: str
    outcome: str
    before: str
    after: str
    sites: int = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """One of the requests that were carried out together.

    ``released`` says why then: "public" data has nothing to hide, a "batch" of enough sites came
    together, the longest "wait" was over, or the "operator" said so. ``waited`` counts rounds.
    """

    request: str
    kind: str
    site: str
    released: str
    waited: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class ForgetReceipt:
    """What was removed, from which cells, and which view replaced which.

    ``recount`` says whether the remaining sites' journals, summed again from zero, gave exactly
    the integers left in every cell; None if nobody asked them. ``parts`` are the requests that
    were carried out together; ``records``, ``cells`` and ``residual`` are of all of them, since
    nobody but the sites can tell them apart. ``floors`` holds what is true afterwards of every
    cell concerned: "sites" (k_min contributors, or revoked), "records" (the records floor, or
    revoked) and "difference" (k_min sites took something back together). ``already`` marks the
    receipt of an earlier removal, given again.
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
    parts: tuple[Part, ...] = ()
    floors: Mapping[str, bool] = field(default_factory=dict)
    residual: Evidence | None = None
    already: bool = False
    not_covered: tuple[str, ...] = NOT_COVERED

    def of(self, request: str) -> "ForgetReceipt":
        """The receipt as one of its requests reads it."""
        mine = next(part for part in self.parts if part.request == request)
        return replace(self, request=request, kind=mine.kind, site=mine.site, parts=self.parts)


@dataclass(frozen=True, slots=True, kw_only=True)
class Waiting:
    """A request that was accepted and is not carried out yet: it waits for ``lacking`` more
    sites, or until round ``until``. Its records are not contributed any more."""

    request: str
    kind: str
    site: str
    since: int
    until: int
    lacking: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Foreseen:
    """One cell of a removal before it is carried out. ``records`` are those to be forgotten at
    ``sites`` sites, ``asked`` sites answer, ``bytes_up`` is what they send together, ``retrained``
    counts the addends that are trained again."""

    cell: str
    module: str
    kind: str
    round: int
    outcome: str
    records: int
    sites: int
    asked: int
    bytes_up: int
    retrained: int = 0


def checked(request: Request, sites: Collection[str]) -> Request:
    """The request, if it can be understood; raises UnknownName."""
    if request.kind not in KINDS:
        raise UnknownName(f"{request.kind!r} cannot be forgotten; one of {', '.join(KINDS)} can")
    if request.site and request.site not in sites:
        raise UnknownName(f"no site {request.site!r}; this run has {', '.join(sorted(sites))}")
    if not request.site and request.kind not in SHARED:
        raise UnknownName(f"a {request.kind} is forgotten at one site; give its site")
    if request.kind == "module":
        return replace(request, name=request.name.rsplit("@", 1)[0])
    if request.kind == "window" and not request.name.isdecimal():
        raise UnknownName(f"window {request.name!r} was given; expected a number from 1")
    return request


def keyed(store: Path, request: Request) -> Request:
    """The request under the site's key, made at first use. Only patients are a secret."""
    if request.kind in ("site", *SHARED):
        return request
    path = store / "request.key"
    if not path.exists():
        write_private(path, secrets.token_hex(32).encode())
    return replace(request, key=path.read_text())


def together(ids: Collection[str]) -> str:
    """The name of requests that are carried out together; that of one request is its own."""
    if len(ids) == 1:
        return next(iter(ids))
    return hashlib.sha256("+".join(sorted(ids)).encode()).hexdigest()[:16]


def concerned(
    store: Path, request: Request, entries: Sequence[Entry] | None = None
) -> dict[Place, frozenset[str]]:
    """(round, scope) -> record ids under the request, from the site's own journal.

    ``entries`` saves reading the journal again. Raises UnknownCell if the site never contributed
    such a record.
    """
    read = journal.entries(store) if entries is None else entries
    pairs = (pair for e in read for pair in zip(e.records, e.patients, strict=True))
    asked = names((request,), pairs)
    found = {(e.round, e.scope): chosen for e in read if (chosen := under(e, asked))}
    if not found:
        raise UnknownCell(
            f"site {request.site} contributed nothing for {request.subject}; "
            "check the identifier as it stands in the site's data"
        )
    return found


def names(requests: Sequence[Request], owners: Iterable[tuple[str, str]]) -> Names:
    """Kind -> names asked for, so that one pass over records serves any number of requests.

    ``owners`` are (record, patient) of all versions: what was once a patient's goes with the
    patient, in every version.
    """
    found: dict[str, set[str]] = {kind: set() for kind in KINDS}
    for request in requests:
        found[request.kind].add(request.name)
    found["record"] |= {record for record, patient in owners if patient in found["patient"]}
    return found


def under(entry: Entry, asked: Names) -> frozenset[str]:
    """Ids of the records of one journal entry that the requests behind ``asked`` concern."""
    rows = zip(entry.records, entry.labels, entry.windows, strict=True)
    return frozenset(
        record for record, label, window in rows if _hit(asked, record, label, window, entry.scope)
    )


def left(data: Dataset, requests: Sequence[Request], scopes: Mapping[str, str]) -> list[int]:
    """Rows of a site's data that no request concerns. ``scopes`` gives the scope of a label."""
    asked = _of(data, requests)
    return [i for i in range(len(data)) if not _row(asked, data, i, scopes)]


def covering(
    data: Dataset, request: Request, requests: Sequence[Request], scopes: Mapping[str, str]
) -> Request | None:
    """An earlier one of ``requests`` under which records of this request were forgotten already;
    None if this site's data has no such record, or one that is still free."""
    asked = _of(data, (request,))
    rows = [i for i in range(len(data)) if _row(asked, data, i, scopes)]
    others = [other for other in requests if other.id != request.id]
    gone = _of(data, others)
    if not rows or not all(_row(gone, data, i, scopes) for i in rows):
        return None
    return next(other for other in others if _row(_of(data, (other,)), data, rows[0], scopes))


def classify(kind: CellKind, *, whole: bool, absent: bool = False, adapted: bool = False) -> str:
    """The forgetting class of one cell. ``whole``: every site concerned takes back all it added;
    ``absent``: the leaver cannot; ``adapted``: the cell stands on a base that was learnt."""
    if adapted:
        return "E4"
    if absent:
        return "E3"
    if kind is not CellKind.LORA:
        return "E0"
    return "E1" if whole else "E2"


def ripe(
    wanted: Mapping[str, Mapping[Place, Collection[str]]], *, least: int
) -> tuple[frozenset[str], dict[str, int]]:
    """Requests that may be carried out together now, and what each of the others lacks.

    ``wanted`` maps a request to the places it concerns and the sites that give something back
    there. Those are ripe whose every place is shared by ``least`` sites of ripe requests; for the
    others the second value says how many sites are missing where most are.
    """
    chosen = set(wanted)
    while True:
        sharing: dict[Place, set[str]] = {}
        for name in chosen:
            for place, sites in wanted[name].items():
                sharing.setdefault(place, set()).update(sites)
        short = {n for n in chosen if any(len(sharing[p]) < least for p in wanted[n])}
        if not short:
            break
        chosen -= short
    lacking = {}
    for name in wanted:
        if name not in chosen:
            counts = [
                len({s for other in wanted.values() for s in other.get(place, ())})
                for place in wanted[name]
            ]
            lacking[name] = max(1, least - min(counts, default=0))
    return frozenset(chosen), lacking


def post(store: Path, *requests: Request) -> None:
    """Keep requests at their site until they are settled; they survive restarts."""
    new = {request.id: _entry(request, settled=False) for request in requests}
    _write(store / "removals.json", {**_read(store), **new})


def posted(store: Path) -> tuple[Request, ...]:
    """Requests that were accepted at this site and are not settled yet."""
    return tuple(_request(doc) for doc in _read(store).values() if not doc["settled"])


def accepted(store: Path) -> tuple[Request, ...]:
    """All requests of this site, settled or not: their records are never contributed again."""
    return tuple(_request(doc) for doc in _read(store).values())


def settle(store: Path, *requests: Request, batch: str = "") -> None:
    """Delete the journal rows under these requests; the last step, after the bank has changed.

    ``batch`` names all the requests that were carried out together, as :func:`together` does;
    without it they were these alone.
    """
    asked = names(requests, journal.owners(store))
    entries = journal.entries(store)
    journal.delete(store, {(e.round, e.scope): under(e, asked) for e in entries})
    if any(request.kind == "site" for request in requests):
        for receipt in (store / "receipts").glob("*"):
            receipt.unlink()
    adopt(store, batch or together([request.id for request in requests]))
    journal.unmark(store)
    done = {request.id: _entry(request, settled=True) for request in requests}
    _write(store / "removals.json", {**_read(store), **done})


def adopt(store: Path, name: str) -> None:
    """Receipts of LoRA cells that were retrained under this name become the receipts."""
    for draft in (store / "receipts").glob(f"*.{name}{NEXT}"):
        draft.replace(draft.with_name(draft.name.split(".")[0] + ".safetensors"))


def document(receipt: ForgetReceipt) -> dict[str, Any]:
    """The receipt as a JSON document."""
    return asdict(receipt)


def receipt_from(document: Mapping[str, Any]) -> ForgetReceipt:
    """The inverse of ``document``; whatever else the ledger keeps beside it is left out."""
    values = {f.name: document[f.name] for f in fields(ForgetReceipt) if f.name in document}
    cells = tuple(CellOutcome(**cell) for cell in document["cells"])
    residual = document.get("residual")
    return ForgetReceipt(
        **values
        | {
            "cells": cells,
            "parts": tuple(Part(**part) for part in document.get("parts", ())),
            "residual": Evidence(**residual) if residual else None,
            "not_covered": tuple(document["not_covered"]),
        }
    )


def summary(cells: Sequence[CellOutcome] | Sequence[Foreseen]) -> str:
    """For example "9 cells: 6 E0, 3 E1"."""
    counts = {name: sum(c.outcome == name for c in cells) for name in CLASSES}
    parts = ", ".join(f"{count} {name}" for name, count in counts.items() if count)
    return f"{len(cells)} cells: {parts}" if parts else "0 cells"


def _of(data: Dataset, requests: Sequence[Request]) -> Names:
    return names(requests, zip(data.records, data.patients, strict=True))


def _hit(asked: Names, record: str, label: str, window: int, scope: str) -> bool:
    return bool(
        asked["site"]
        or record in asked["record"]
        or label in asked["label"]
        or scope in asked["module"]
        or str(window) in asked["window"]
    )


def _row(asked: Names, data: Dataset, row: int, scopes: Mapping[str, str]) -> bool:
    label = data.labels[row]
    return _hit(asked, data.records[row], label, data.windows[row], scopes.get(label, ""))


def _entry(request: Request, *, settled: bool) -> dict[str, Any]:
    return {**asdict(request), "settled": settled}


def _request(entry: Mapping[str, Any]) -> Request:
    return Request(kind=entry["kind"], site=entry["site"], name=entry["name"], key=entry["key"])


def _read(store: Path) -> dict[str, Any]:
    path = store / "removals.json"
    found: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
    return found


def _write(path: Path, content: Mapping[str, Any]) -> None:
    write_private(path, json.dumps(content, indent=1, sort_keys=True).encode())
