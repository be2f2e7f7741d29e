"""The knowledge bank: sealed sums (cells), the modules they belong to, and the label registry.

A bank is a value. ``seal``, ``withdraw``, ``retire`` return a new one; ``events`` is the
difference of two banks, and ``fold`` replays events to the same metadata, so the record in the
ledger cannot disagree with the model. Cells are keyed by what they are about (module, kind,
recipe, round), never by who contributed: a bank that lost a site equals one it never joined.
"""

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from enum import Enum
from typing import Any

import torch
from torch import Tensor

from fedkola.errors import BasisMismatch, KnowledgeError, UnknownCell
from fedkola.knowledge.statistics import COUNTS, GRAM, SUMS
from fedkola.types import Aggregate, Cohort, Event, Grid, Scalar


class CellKind(Enum):
    ANALYTIC = "analytic"
    ROUTER = "router"
    LORA = "lora"


class ModuleState(Enum):
    ACTIVE = "active"
    RETIRED = "retired"


@dataclass(frozen=True, slots=True, kw_only=True)
class KnowledgeCell:
    """What a cell is, without its integers. ``words`` is the hash of the exact integer sum."""

    id: str
    module: str
    kind: CellKind
    round: int
    valid: tuple[float, float | None]
    slot: int | None
    recipe: Mapping[str, Scalar]
    labels: tuple[str, ...]
    cohort: Cohort
    contributors: int
    records: int
    words: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Cell:
    """A sealed sum with everything needed to reuse or undo it."""

    about: KnowledgeCell
    total: Aggregate


@dataclass(frozen=True, slots=True, kw_only=True)
class KnowledgeModule:
    """A unit of knowledge: the cells of one scope; owns one slot of the pinned basis."""

    id: str
    scope: str
    slot: int
    opened: int
    state: ModuleState = ModuleState.ACTIVE


@dataclass(frozen=True, slots=True, kw_only=True)
class LabelEntry:
    """One row of the open label set, with its time of validity in rounds."""

    code: str
    module: str
    valid_from: float
    valid_to: float | None = None
    replaced_by: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Bank:
    cells: tuple[Cell, ...] = ()
    modules: tuple[KnowledgeModule, ...] = ()
    labels: tuple[LabelEntry, ...] = ()
    revoked: tuple[KnowledgeCell, ...] = ()


def cell_id(
    *, module: str, kind: CellKind, round: int, slot: int | None, recipe: Mapping[str, Scalar]
) -> str:
    """The content key of a cell: 16 hex digits of the hash of what it is about."""
    about = {"module": module, "kind": kind.value, "round": round, "slot": slot, **recipe}
    return hashlib.sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()[:16]


def content(labels: Sequence[str], total: Aggregate) -> str:
    """The hash of a cell's integers, as hex.

    Label rows without records are left out: a row that only a removed site had filled is the same
    as a row that was never opened. Cells without rows by label (LoRA) hold their integers alone.
    """
    words = dict(total.words)
    whole = hashlib.sha256()
    filled: list[str] = []
    if COUNTS in words:
        kept = torch.nonzero(words[COUNTS]).flatten()
        filled = [labels[int(i)] for i in kept]
        words |= {COUNTS: words[COUNTS][kept], SUMS: words[SUMS][kept]}
    whole.update(json.dumps(filled).encode())
    for name in sorted(words):
        value = words[name]
        whole.update(f"{name}|{value.dtype}|{tuple(value.shape)}|".encode())
        whole.update(value.contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return whole.hexdigest()


def open_modules(bank: Bank, scopes: Iterable[str], *, round: int, slots_max: int) -> Bank:
    """Give every new scope a module on the lowest free slot; raises BasisMismatch when full."""
    modules = list(bank.modules)
    for scope in scopes:
        if any(module.scope == scope for module in modules):
            continue
        taken = {module.slot for module in modules}
        free = next((i for i in range(slots_max) if i not in taken), None)
        if free is None:
            raise BasisMismatch(
                f"all {slots_max} slots are taken, {scope} needs one; raise knowledge.slots_max"
            )
        modules.append(KnowledgeModule(id=f"{scope}@1", scope=scope, slot=free, opened=round))
    return replace(bank, modules=tuple(modules))


def seal(bank: Bank, about: KnowledgeCell, total: Aggregate) -> Bank:
    """Add a sealed cell and open its label rows; raises KnowledgeError for a cell it holds."""
    if any(cell.about.id == about.id for cell in bank.cells):
        raise KnowledgeError(
            f"cell {about.id} of {about.module} is sealed already; a round seals a cell once"
        )
    known = {entry.code for entry in bank.labels}
    opened = tuple(
        LabelEntry(code=code, module=about.module, valid_from=about.valid[0])
        for code in about.labels
        if code not in known
    )
    cell = Cell(about=replace(about, words=content(about.labels, total)), total=total)
    return replace(bank, cells=(*bank.cells, cell), labels=bank.labels + opened)


def alone(
    name: str, words: Mapping[str, Tensor], codes: Sequence[str], recipe: Mapping[str, Scalar]
) -> Bank:
    """A bank of one analytic cell whose sums no federation gathered (one site, or a union), to be
    read like one that was. ``codes`` names the rows; rows without records are left out."""
    kept = torch.nonzero(words[COUNTS]).flatten()
    if not len(kept):
        return Bank()
    chosen = {GRAM: words[GRAM], SUMS: words[SUMS][kept], COUNTS: words[COUNTS][kept]}
    about = KnowledgeCell(
        id=name,
        module=name,
        kind=CellKind.ANALYTIC,
        round=1,
        valid=(1.0, None),
        slot=None,
        recipe=recipe,
        labels=tuple(codes[int(i)] for i in kept),
        cohort=(name,),
        contributors=1,
        records=int(words[COUNTS].sum()),
        words="",
    )
    exact = {key: value.to(torch.int64) for key, value in chosen.items()}
    grid = Grid(word=64, bits=64, scale=dict.fromkeys(exact, 0))
    return seal(Bank(), about, Aggregate(cohort=(name,), words=exact, grid=grid))


def withdraw(
    bank: Bank, cell: str, total: Aggregate, *, records: int, contributors: int, k_min: int = 1
) -> Bank:
    """Replace the integers of one cell after a removal.

    A cell left without records, or with fewer contributors than ``k_min``, is revoked: it would
    never have been opened. What remaining sites put into it waits there for the next cell.
    """
    held = find(bank, cell)
    about = replace(
        held.about,
        words=content(held.about.labels, total),
        records=records,
        contributors=contributors,
    )
    if records == 0 or contributors < k_min:
        rest = tuple(c for c in bank.cells if c.about.id != cell)
        return replace(bank, cells=rest, revoked=(*bank.revoked, about))
    cells = tuple(Cell(about=about, total=total) if c is held else c for c in bank.cells)
    return replace(bank, cells=cells)


def retire(bank: Bank, code: str, *, valid_to: float, replaced_by: Sequence[str] = ()) -> Bank:
    """Close a label from ``valid_to`` on. Its mass stays; later views answer its successors."""
    if all(entry.code != code for entry in bank.labels):
        raise UnknownCell(f"label {code} is not in the bank; it opens when records of it arrive")
    labels = tuple(
        replace(entry, valid_to=valid_to, replaced_by=tuple(replaced_by))
        if entry.code == code
        else entry
        for entry in bank.labels
    )
    return replace(bank, labels=labels)


def find(bank: Bank, cell: str) -> Cell:
    """The live cell of this id; raises UnknownCell."""
    for held in bank.cells:
        if held.about.id == cell:
            return held
    raise UnknownCell(f"no live cell {cell}; `fedkola bank ls` shows the cells of a run")


def select(
    bank: Bank,
    kind: CellKind,
    *,
    valid_at: float | None = None,
    known_at: int | None = None,
    held: Sequence[str] | None = None,
) -> tuple[Cell, ...]:
    """Live cells of one kind as of a world time and a knowledge time, of the held modules."""
    chosen = []
    for cell in bank.cells:
        start, end = cell.about.valid
        if (
            cell.about.kind is kind
            and (known_at is None or cell.about.round <= known_at)
            and (valid_at is None or (start <= valid_at and (end is None or valid_at < end)))
            and (held is None or cell.about.module in held)
        ):
            chosen.append(cell)
    return tuple(chosen)


def valid_labels(
    bank: Bank, *, valid_at: float | None = None, known_at: int | None = None
) -> dict[str, tuple[str, ...]]:
    """Open labels as of a time, each with the retired codes that it answers for (itself first).

    In the order in which they were opened. Without ``valid_at`` the present is meant, which is
    ``known_at`` for a view of the past. Successors that are retired too are followed to theirs.
    """
    now = valid_at if valid_at is not None else known_at if known_at is not None else float("inf")
    seen = {e.code: e for e in bank.labels if known_at is None or e.valid_from <= known_at}
    live = [
        e.code
        for e in seen.values()
        if e.valid_from <= now and (e.valid_to is None or now < e.valid_to)
    ]
    answers: dict[str, tuple[str, ...]] = {code: (code,) for code in live}
    for code in seen:
        for heir in () if code in live else _heirs(seen, code, live):
            answers[heir] = (*answers[heir], code)
    return answers


def events(before: Bank, after: Bank) -> tuple[Event, ...]:
    """The knowledge events that lead from one bank to the other, in ledger form."""
    found: list[Event] = []
    held = {module.id: module for module in before.modules}
    for module in after.modules:
        if held.get(module.id) != module:
            found.append(_event("OPEN", module.id, asdict(module)))
    old_labels = {entry.code: entry for entry in before.labels}
    for entry in after.labels:
        if old_labels.get(entry.code) != entry:
            found.append(_event("LABEL", entry.code, asdict(entry)))
    old_cells = {cell.about.id: cell.about for cell in before.cells}
    for cell in after.cells:
        known = old_cells.get(cell.about.id)
        if known is None:
            found.append(_event("SEAL", cell.about.id, asdict(cell.about)))
        elif known.words != cell.about.words:
            found.append(_event("WITHDRAW", cell.about.id, asdict(cell.about)))
    gone = {about.id for about in before.revoked}
    for about in after.revoked:
        if about.id not in gone:
            found.append(_event("REVOKE", about.id, asdict(about)))
    return tuple(found)


def fold(history: Iterable[tuple[str, str, Mapping[str, Any]]]) -> dict[str, dict[str, Any]]:
    """Replay (kind, subject, body) to the bank's metadata: modules, labels, live cells, revoked."""
    modules: dict[str, Any] = {}
    labels: dict[str, Any] = {}
    cells: dict[str, Any] = {}
    revoked: dict[str, Any] = {}
    for kind, subject, body in history:
        if kind == "OPEN":
            modules[subject] = body
        elif kind == "LABEL":
            labels[subject] = body
        elif kind in ("SEAL", "WITHDRAW"):
            cells[subject] = body
        elif kind == "REVOKE":
            cells.pop(subject, None)
            revoked[subject] = body
    return {"modules": modules, "labels": labels, "cells": cells, "revoked": revoked}


def metadata(bank: Bank) -> dict[str, dict[str, Any]]:
    """What ``fold`` of a bank's own history returns."""
    return {
        "modules": {module.id: _plain(asdict(module)) for module in bank.modules},
        "labels": {entry.code: _plain(asdict(entry)) for entry in bank.labels},
        "cells": {cell.about.id: _plain(asdict(cell.about)) for cell in bank.cells},
        "revoked": {about.id: _plain(asdict(about)) for about in bank.revoked},
    }


def cell_bytes(cell: Cell) -> int:
    """Bytes of a cell's integers."""
    return sum(_nbytes(value) for value in cell.total.words.values())


def _heirs(entries: Mapping[str, LabelEntry], code: str, live: Sequence[str]) -> list[str]:
    """The live labels that a retired one leads to, through its successors and theirs."""
    found, visited, waiting = [], {code}, list(entries[code].replaced_by)
    while waiting:
        heir = waiting.pop(0)
        if heir in live:
            found.append(heir)
        elif heir in entries and heir not in visited:
            waiting += entries[heir].replaced_by
        visited.add(heir)
    return list(dict.fromkeys(found))


def _nbytes(value: Tensor) -> int:
    return value.numel() * value.element_size()


def _event(kind: str, subject: str, body: Mapping[str, Any]) -> Event:
    return {"kind": kind, "subject": subject, "body": _plain(body)}


def _plain(value: Any) -> Any:
    if isinstance(value, Enum):
        return value.value
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, tuple | list):
        return [_plain(item) for item in value]
    return value
