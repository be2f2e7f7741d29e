"""The knowledge bank: sealed sums (cells), the modules they belong to, and the label registry.

A bank is a value. ``seal``, ``withdraw``, ``retire`` return a new one; ``events`` is the
difference of two banks, and ``fold`` replays events to the same metadata, so the record in the
ledger cannot disagree with the model. Cells are keyed by what they are about (module, kind,
recipe, round), never by who contributed: a bank that lost a site equals one it never joined.

A scatter cell belongs to no module: it is the Gram of the records of the analytic cells it covers.
A cell is covered at most once.
"""

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from enum import Enum
from math import prod
from typing import Any

import torch
from torch import Tensor

from fedkola.errors import AccessRefused, BasisMismatch, KnowledgeError, UnknownCell
from fedkola.knowledge.statistics import COUNTS, GRAM, SUMS
from fedkola.types import Aggregate, Cohort, Event, Grid, Scalar


class CellKind(Enum):
    ANALYTIC = "analytic"
    ROUTER = "router"
    LORA = "lora"
    SCATTER = "scatter"


POOL = "scatter"
"""What scatter cells have in place of a module."""


class ModuleState(Enum):
    """A candidate becomes active with its first cell; the version it replaces is superseded then.

    A superseded or retired module has no weight in the present and answers as of earlier times.
    """

    CANDIDATE = "candidate"
    ACTIVE = "active"
    SUPERSEDED = "superseded"
    RETIRED = "retired"
    COMPACTED = "compacted"


class Status(Enum):
    """Where the integers of a cell are: in the bank, nowhere, in cold storage, or gone from it."""

    SEALED = "sealed"
    REVOKED = "revoked"
    ARCHIVED = "archived"
    PURGED = "purged"


@dataclass(frozen=True, slots=True, kw_only=True)
class KnowledgeCell:
    """What a cell is, without its integers. ``words`` is the hash of the exact integer sum.

    ``quality`` holds factors in [0, 1] by name, whose product weighs the cell in every view;
    ``privacy`` the rules it was opened under. ``covers`` names the analytic cells whose records a
    scatter cell sums, ``sources`` the cells that a sum of cells adds up; these stand in
    ``Bank.cold`` meanwhile. ``base`` is the hash of the frozen model, ``deepest`` the records of
    the label that had most when the cell was opened (0 is unknown).
    """

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
    quality: Mapping[str, float] = field(default_factory=dict)
    privacy: Mapping[str, Scalar] = field(default_factory=dict)
    status: Status = Status.SEALED
    covers: tuple[str, ...] = ()
    sources: tuple[str, ...] = ()
    base: str = ""
    deepest: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Cell:
    """A sealed sum with everything needed to reuse or undo it."""

    about: KnowledgeCell
    total: Aggregate


@dataclass(frozen=True, slots=True, kw_only=True)
class KnowledgeModule:
    """A unit of knowledge: the cells of one version of one scope; owns a slot of the pinned basis.

    ``access`` names the sites that may hold it (empty is all). ``half_life`` is in rounds; None
    takes that of the view's rule. ``closed`` is the round in which it was superseded or retired,
    ``valid_to`` the world time (in rounds) from which it no longer holds. A compacted module has
    given its slot away, as its LoRA cells answer from a fused adapter.
    """

    id: str
    scope: str
    slot: int | None
    opened: int
    state: ModuleState = ModuleState.ACTIVE
    version: int = 1
    supersedes: str | None = None
    access: tuple[str, ...] = ()
    half_life: float | None = None
    closed: int | None = None
    valid_to: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class LabelEntry:
    """One row of the open label set, with its time of validity in rounds."""

    code: str
    module: str
    valid_from: float
    valid_to: float | None = None
    replaced_by: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class FusedAdapter:
    """One adapter in place of the LoRA cells of several modules: a cache, with its known error.

    It stands for ``sum shares[m] B_m A_m`` over ``modules``, made in ``round`` from ``cells``,
    which are in cold storage; ``adapter`` holds its factors by layer.
    """

    id: str
    modules: tuple[str, ...]
    shares: tuple[float, ...]
    cells: tuple[str, ...]
    slot: int
    round: int
    error: float
    adapter: Mapping[str, Tensor]


@dataclass(frozen=True, slots=True, kw_only=True)
class Bank:
    """``cold`` are cells whose integers are in cold storage, or purged from it."""

    cells: tuple[Cell, ...] = ()
    modules: tuple[KnowledgeModule, ...] = ()
    labels: tuple[LabelEntry, ...] = ()
    revoked: tuple[KnowledgeCell, ...] = ()
    cold: tuple[KnowledgeCell, ...] = ()
    fused: tuple[FusedAdapter, ...] = ()


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


def open_modules(
    bank: Bank,
    scopes: Iterable[str],
    *,
    round: int,
    slots_max: int,
    access: Mapping[str, Sequence[str]] | None = None,
) -> Bank:
    """Give every scope without an open module one on the lowest free slot.

    ``access`` names, by scope, the sites that may hold it. Raises BasisMismatch when all slots are
    taken.
    """
    for scope in scopes:
        if module_of(bank, scope) is None:
            sites = tuple((access or {}).get(scope, ()))
            bank = _add_module(bank, scope, None, sites, round=round, slots_max=slots_max)
    return bank


def supersede(bank: Bank, scope: str, *, round: int, slots_max: int) -> Bank:
    """Open the next version of a scope as a candidate; what is sealed next goes to it.

    The version in force answers until the candidate has its first cell: a version that too few
    sites can fill never silences the one before it. A second call finds the candidate and changes
    nothing. Raises UnknownCell for a scope without a module, BasisMismatch without a free slot.
    """
    current = module_of(bank, scope)
    if current is None:
        raise UnknownCell(
            f"scope {scope} has no open module to supersede; it opens with its first cell"
        )
    if current.state is ModuleState.CANDIDATE:
        return bank
    return _add_module(bank, scope, current, current.access, round=round, slots_max=slots_max)


def module_of(bank: Bank, scope: str) -> KnowledgeModule | None:
    """The module that new cells of a scope go to: its newest version that is not closed."""
    open_ = [m for m in bank.modules if m.scope == scope and _open(m)]
    return max(open_, key=lambda module: module.version, default=None)


def retire_module(bank: Bank, module: str, *, round: int, valid_to: float | None = None) -> Bank:
    """Close a module without a successor; it answers as of earlier times. Raises UnknownCell."""
    held = find_module(bank, module)
    return _changed(bank, _closed(held, ModuleState.RETIRED, round, valid_to))


def find_module(bank: Bank, module: str) -> KnowledgeModule:
    """The module of this id; raises UnknownCell."""
    for held in bank.modules:
        if held.id == module:
            return held
    known = ", ".join(m.id for m in bank.modules) or "none"
    raise UnknownCell(f"no module {module!r}; this bank has {known}")


def held(bank: Bank, site: str) -> tuple[str, ...] | None:
    """The modules that a site may hold (its held set V_k); None means every module."""
    if all(not module.access or site in module.access for module in bank.modules):
        return None
    return tuple(m.id for m in bank.modules if not m.access or site in m.access)


def demand_held(bank: Bank, site: str, modules: Sequence[str]) -> None:
    """Raises AccessRefused if one of these modules is not for this site."""
    for name in modules:
        module = find_module(bank, name)
        if module.access and site not in module.access:
            raise AccessRefused(
                f"{site or 'this reader'} may not hold {name}, which is for "
                f"{', '.join(module.access)}; ask for modules of its own, or change scenario.access"
            )


def rate(bank: Bank, cell: str, quality: Mapping[str, float]) -> Bank:
    """Set quality factors of a live cell; its integers do not change. Raises KnowledgeError."""
    for name, value in quality.items():
        if not 0 <= value <= 1:
            raise KnowledgeError(f"quality {name} = {value} of cell {cell}; expected 0 to 1")
    known = find(bank, cell)
    about = replace(known.about, quality={**known.about.quality, **quality})
    cells = tuple(replace(c, about=about) if c is known else c for c in bank.cells)
    return replace(bank, cells=cells)


def weight(bank: Bank, cell: Cell, *, now: int, half_life: float | None) -> float:
    """rho_c = q_c 2^(-(now - t_c) / h_m): what a cell weighs in a view of round ``now``.

    ``half_life`` in rounds is used for modules that have none of their own.
    """
    own = next((m.half_life for m in bank.modules if m.id == cell.about.module), None)
    span = half_life if own is None else own
    age = 0.0 if span is None else max(now - cell.about.round, 0) / span
    return float(prod(cell.about.quality.values()) * 2.0**-age)


def seal(bank: Bank, about: KnowledgeCell, total: Aggregate) -> Bank:
    """Add a sealed cell and open its label rows; its module becomes active if it waited for it.

    Raises KnowledgeError for a cell that the bank holds, or of a module that is closed.
    """
    if any(cell.about.id == about.id for cell in bank.cells):
        raise KnowledgeError(
            f"cell {about.id} of {about.module} is sealed already; a round seals a cell once"
        )
    if any(m.id == about.module and not _open(m) for m in bank.modules):
        raise KnowledgeError(
            f"module {about.module} is closed and takes no cell; new knowledge of its scope "
            "goes to a newer version"
        )
    known = {entry.code for entry in bank.labels}
    opened = tuple(
        LabelEntry(code=code, module=about.module, valid_from=about.valid[0])
        for code in about.labels
        if code not in known
    )
    cell = Cell(about=replace(about, words=content(about.labels, total)), total=total)
    bank = replace(bank, cells=(*bank.cells, cell), labels=bank.labels + opened)
    return _activated(bank, about.module, round=about.round, valid_from=about.valid[0])


def alone(
    name: str, words: Mapping[str, Tensor], codes: Sequence[str], recipe: Mapping[str, Scalar]
) -> Bank:
    """A bank of one analytic cell and its scatter whose sums no federation gathered (one site, or
    a union), to be read like one that was. ``codes`` names the rows; rows without records are left
    out."""
    kept = torch.nonzero(words[COUNTS]).flatten()
    if not len(kept):
        return Bank()
    rows = KnowledgeCell(
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
    pooled = replace(
        rows, id=f"{name}-{POOL}", module=POOL, kind=CellKind.SCATTER, labels=(), covers=(name,)
    )
    bank = Bank()
    for about, chosen in (
        (rows, {SUMS: words[SUMS][kept], COUNTS: words[COUNTS][kept]}),
        (pooled, {GRAM: words[GRAM]}),
    ):
        exact = {key: value.to(torch.int64) for key, value in chosen.items()}
        grid = Grid(word=64, bits=64, scale=dict.fromkeys(exact, 0))
        bank = seal(bank, about, Aggregate(cohort=(name,), words=exact, grid=grid))
    return bank


def withdraw(
    bank: Bank,
    cell: str,
    total: Aggregate,
    *,
    records: int,
    contributors: int,
    k_min: int = 1,
    floor: int = 1,
    covers: tuple[str, ...] = (),
) -> Bank:
    """Replace the integers of one cell after a removal, and what it still ``covers``.

    A cell left with fewer records than ``floor``, or with fewer contributors than ``k_min``, is
    revoked: it would never have been opened. What remaining sites put into it waits there for the
    next cell.
    """
    held = find(bank, cell)
    about = replace(
        held.about,
        words=content(held.about.labels, total),
        records=records,
        contributors=contributors,
        covers=covers,
    )
    if records < max(floor, 1) or contributors < k_min:
        return _revoke(bank, about)
    cells = tuple(Cell(about=about, total=total) if c is held else c for c in bank.cells)
    return replace(bank, cells=cells)


def revoke(bank: Bank, cell: str) -> Bank:
    """The bank without this cell. What it covered is free to be covered again."""
    return _revoke(bank, find(bank, cell).about)


def leave(bank: Bank, site: str) -> Bank:
    """The bank after everything of a site was withdrawn: it no longer stands in any cohort."""
    cells = tuple(
        replace(cell, about=replace(cell.about, cohort=_without(cell.about.cohort, site)))
        for cell in bank.cells
    )
    cold = tuple(replace(about, cohort=_without(about.cohort, site)) for about in bank.cold)
    return replace(bank, cells=cells, cold=cold)


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


def parts_of(bank: Bank, about: KnowledgeCell) -> tuple[KnowledgeCell, ...]:
    """A cell as it was sealed: itself, or the cells that a sum adds up."""
    if not about.sources:
        return (about,)
    return tuple(part for part in bank.cold if part.id in about.sources)


def origins(bank: Bank) -> tuple[KnowledgeCell, ...]:
    """Every cell that was sealed and not revoked, wherever its integers are now.

    It is what sites' journals speak of: they never learn that cells were added up or archived.
    """
    every = (*(cell.about for cell in bank.cells), *bank.cold)
    return tuple(about for about in every if not about.sources)


def find(bank: Bank, cell: str) -> Cell:
    """The live cell of this id; raises UnknownCell."""
    for held in bank.cells:
        if held.about.id == cell:
            return held
    raise UnknownCell(f"no live cell {cell}; `fedkola bank ls` shows the cells of a run")


def covering(bank: Bank, cells: Iterable[str]) -> tuple[Cell, ...]:
    """Live scatter cells that sum records of any of these analytic cells."""
    wanted = set(cells)
    return tuple(cell for cell in bank.cells if wanted & set(cell.about.covers))


def covered(bank: Bank, scatter: KnowledgeCell) -> tuple[Cell, ...]:
    """The live analytic cells whose records a scatter cell sums; raises UnknownCell."""
    return tuple(find(bank, cell) for cell in scatter.covers)


def uncovered(bank: Bank) -> tuple[Cell, ...]:
    """Analytic cells, superseded ones too, whose records no scatter cell sums."""
    done = {cell for held in bank.cells for cell in held.about.covers}
    return tuple(c for c in of_kind(bank, CellKind.ANALYTIC) if c.about.id not in done)


def of_kind(bank: Bank, kind: CellKind) -> tuple[Cell, ...]:
    """Every cell of one kind that the bank holds, whatever time it answers for."""
    return tuple(cell for cell in bank.cells if cell.about.kind is kind)


def read_then(about: KnowledgeCell, *, valid_at: float | None, known_at: int | None) -> bool:
    """Whether a cell was known by a round, and holds at a world time (None is any)."""
    start, end = about.valid
    known = known_at is None or about.round <= known_at
    holds = valid_at is None or (start <= valid_at and (end is None or valid_at < end))
    return known and holds


def all_then(
    bank: Bank, about: KnowledgeCell, *, valid_at: float | None, known_at: int | None
) -> bool:
    """``read_then`` of a cell or of all parts of a sum; raises KnowledgeError if only of some."""
    if not about.sources or (valid_at is None and known_at is None):
        return read_then(about, valid_at=valid_at, known_at=known_at)
    parts = [part for part in bank.cold if part.id in about.sources]
    then = [read_then(part, valid_at=valid_at, known_at=known_at) for part in parts]
    if any(then) and not all(then):
        raise KnowledgeError(
            f"cell {about.id} of {about.module} adds up rounds {min(p.round for p in parts)} to "
            f"{about.round}, and valid_at={valid_at}, known_at={known_at} lies within; take its "
            "parts out of cold storage first (archive.as_of)"
        )
    return all(then)


def select(
    bank: Bank,
    kind: CellKind,
    *,
    valid_at: float | None = None,
    known_at: int | None = None,
    held: Sequence[str] | None = None,
) -> tuple[Cell, ...]:
    """Live cells of one kind as of a world time and a knowledge time, of the held modules.

    Cells of a superseded or retired module are left out unless the time asked for is before its
    end, or before the end was known. Scatter cells belong to no module and serve every held set.
    Raises KnowledgeError for a sum of cells of which that time
    knew a part: its parts must come back from cold storage first.
    """
    over = {m.id for m in bank.modules if not answers_then(m, valid_at=valid_at, known_at=known_at)}
    return tuple(
        cell
        for cell in bank.cells
        if cell.about.kind is kind
        and cell.about.module not in over
        and (held is None or kind is CellKind.SCATTER or cell.about.module in held)
        and all_then(bank, cell.about, valid_at=valid_at, known_at=known_at)
    )


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
        known = held.get(module.id)
        if known != module:
            closed = known is None or known.state is not module.state
            kind = _CLOSINGS.get(module.state, "OPEN") if closed else "OPEN"
            found.append(_event(kind, module.id, asdict(module)))
    old_labels = {entry.code: entry for entry in before.labels}
    for entry in after.labels:
        if old_labels.get(entry.code) != entry:
            found.append(_event("LABEL", entry.code, asdict(entry)))
    old_cells, new_cells = _every_cell(before), _every_cell(after)
    for name, about in new_cells.items():
        if old_cells.get(name) != about:
            found.append(_event(_change(old_cells.get(name), about), name, asdict(about)))
    found += [_event("SPLIT", name, {}) for name in old_cells if name not in new_cells]
    old_fused = {each.id: _fused_document(each) for each in before.fused}
    new_fused = {each.id: _fused_document(each) for each in after.fused}
    for name, document in new_fused.items():
        if old_fused.get(name) != document:
            found.append(_event("FUSE", name, document))
    found += [_event("DISSOLVE", name, {}) for name in old_fused if name not in new_fused]
    return tuple(found)


def fold(history: Iterable[tuple[str, str, Mapping[str, Any]]]) -> dict[str, dict[str, Any]]:
    """Replay (kind, subject, body) to the bank's metadata, as ``metadata`` gives it."""
    modules: dict[str, Any] = {}
    labels: dict[str, Any] = {}
    cells: dict[str, Any] = {}
    fused: dict[str, Any] = {}
    for kind, subject, body in history:
        if kind in ("OPEN", *_CLOSINGS.values()):
            modules[subject] = body
        elif kind == "LABEL":
            labels[subject] = body
        elif kind in _CELL_EVENTS:
            cells[subject] = body
        elif kind == "FUSE":
            fused[subject] = body
        elif kind == "SPLIT":
            cells.pop(subject, None)
        elif kind == "DISSOLVE":
            fused.pop(subject, None)
    places: dict[str, dict[str, Any]] = {"cells": {}, "revoked": {}, "cold": {}}
    for subject, body in cells.items():
        places[_PLACES[Status(body["status"])]][subject] = body
    return {"modules": modules, "labels": labels, **places, "fused": fused}


def metadata(bank: Bank) -> dict[str, dict[str, Any]]:
    """What ``fold`` of a bank's own history returns."""
    return {
        "modules": {module.id: _plain(asdict(module)) for module in bank.modules},
        "labels": {entry.code: _plain(asdict(entry)) for entry in bank.labels},
        "cells": {cell.about.id: _plain(asdict(cell.about)) for cell in bank.cells},
        "revoked": {about.id: _plain(asdict(about)) for about in bank.revoked},
        "cold": {about.id: _plain(asdict(about)) for about in bank.cold},
        "fused": {each.id: _plain(_fused_document(each)) for each in bank.fused},
    }


def label_records(bank: Bank) -> dict[str, int]:
    """Records by label, from the lane of live cells that has most of them."""
    lanes: dict[CellKind, dict[str, int]] = {}
    for cell in bank.cells:
        counts = cell.total.words.get(COUNTS)
        if counts is not None:
            lane = lanes.setdefault(cell.about.kind, {})
            for code, count in zip(cell.about.labels, counts.tolist(), strict=True):
                lane[code] = lane.get(code, 0) + count
    return {
        code: max(lane.get(code, 0) for lane in lanes.values())
        for code in dict.fromkeys(code for lane in lanes.values() for code in lane)
    }


def scope(about: KnowledgeCell) -> str:
    """The scope of a cell's module; scatter cells have none and give ``POOL``."""
    return about.module.rsplit("@", 1)[0]


def cell_bytes(cell: Cell) -> int:
    """Bytes of a cell's integers."""
    return sum(_nbytes(value) for value in cell.total.words.values())


_CLOSINGS = {
    ModuleState.SUPERSEDED: "SUPERSEDE",
    ModuleState.RETIRED: "RETIRE",
    ModuleState.COMPACTED: "COMPACT",
}
_CELL_EVENTS = ("SEAL", "SUM", "WITHDRAW", "RATE", "REVOKE", "ARCHIVE", "RESTORE", "PURGE")
_PLACES = {
    Status.SEALED: "cells",
    Status.REVOKED: "revoked",
    Status.ARCHIVED: "cold",
    Status.PURGED: "cold",
}
_CLOSED = (ModuleState.SUPERSEDED, ModuleState.RETIRED)


def _every_cell(bank: Bank) -> dict[str, KnowledgeCell]:
    return {
        about.id: about for about in (*(c.about for c in bank.cells), *bank.cold, *bank.revoked)
    }


def _change(old: KnowledgeCell | None, new: KnowledgeCell) -> str:
    """The name of the event that made one cell into the other."""
    moved = old is None or old.status is not new.status
    if moved and new.status is not Status.SEALED:
        return {"revoked": "REVOKE", "archived": "ARCHIVE", "purged": "PURGE"}[new.status.value]
    if old is None or new.sources != old.sources:
        return "SUM" if new.sources else "SEAL"
    if moved and old.words == new.words:
        return "RESTORE"
    return "RATE" if replace(old, quality=new.quality) == new else "WITHDRAW"


def _fused_document(fused: FusedAdapter) -> dict[str, Any]:
    """A fused adapter in ledger form: what it stands for, without its factors."""
    return {
        "id": fused.id,
        "modules": fused.modules,
        "shares": fused.shares,
        "cells": fused.cells,
        "slot": fused.slot,
        "round": fused.round,
        "error": fused.error,
    }


def _open(module: KnowledgeModule) -> bool:
    return module.state not in _CLOSED


def _closed(
    module: KnowledgeModule, state: ModuleState, round: int, valid_to: float | None
) -> KnowledgeModule:
    end = float(round) if valid_to is None else valid_to
    return replace(module, state=state, closed=round, valid_to=end)


def answers_then(module: KnowledgeModule, *, valid_at: float | None, known_at: int | None) -> bool:
    """Whether a module has weight in a view as of these times."""
    if module.closed is None or module.valid_to is None:
        return True
    unknown_then = known_at is not None and known_at < module.closed
    return unknown_then or (valid_at is not None and valid_at < module.valid_to)


def _add_module(
    bank: Bank,
    scope: str,
    earlier: KnowledgeModule | None,
    access: tuple[str, ...],
    *,
    round: int,
    slots_max: int,
) -> Bank:
    version = 1 + max((m.version for m in bank.modules if m.scope == scope), default=0)
    module = KnowledgeModule(
        id=f"{scope}@{version}",
        scope=scope,
        slot=_free_slot(bank, scope, slots_max),
        opened=round,
        state=ModuleState.CANDIDATE if earlier else ModuleState.ACTIVE,
        version=version,
        supersedes=earlier.id if earlier else None,
        access=access,
        half_life=earlier.half_life if earlier else None,
    )
    return replace(bank, modules=(*bank.modules, module))


def _free_slot(bank: Bank, scope: str, slots_max: int) -> int:
    taken = {module.slot for module in bank.modules} | {each.slot for each in bank.fused}
    free = next((i for i in range(slots_max) if i not in taken), None)
    if free is None:
        raise BasisMismatch(
            f"all {slots_max} slots are taken, {scope} needs one; raise knowledge.slots_max, or "
            "knowledge.compact_eps so that near modules are fused"
        )
    return free


def records(bank: Bank) -> int:
    """Records in live analytic cells."""
    return sum(cell.about.records for cell in of_kind(bank, CellKind.ANALYTIC))


def open_rows(bank: Bank) -> tuple[str, ...]:
    """Labels with records in live analytic cells, in the order in which they were opened."""
    filled = {
        code
        for cell in of_kind(bank, CellKind.ANALYTIC)
        for code, count in zip(cell.about.labels, cell.total.words[COUNTS].tolist(), strict=True)
        if count
    }
    return tuple(entry.code for entry in bank.labels if entry.code in filled)


def emptied(bank: Bank, kinds: Sequence[CellKind]) -> Bank:
    """The bank without live cells of these kinds: what they held is about to be summed anew."""
    for cell in bank.cells:
        if cell.about.kind in kinds:
            bank = _revoke(bank, cell.about)
    return bank


def _changed(bank: Bank, module: KnowledgeModule) -> Bank:
    modules = tuple(module if m.id == module.id else m for m in bank.modules)
    return replace(bank, modules=modules)


def _activated(bank: Bank, module: str, *, round: int, valid_from: float) -> Bank:
    """The bank after the first cell of a candidate: it is active, its predecessor superseded."""
    waiting = [m for m in bank.modules if m.id == module and m.state is ModuleState.CANDIDATE]
    for candidate in waiting:
        bank = _changed(bank, replace(candidate, state=ModuleState.ACTIVE))
        for earlier in bank.modules:
            if earlier.id == candidate.supersedes:
                old = _closed(earlier, ModuleState.SUPERSEDED, round, valid_from)
                bank = _changed(bank, old)
    return bank


def _revoke(bank: Bank, about: KnowledgeCell) -> Bank:
    """The bank without a live cell. With a sum go its parts, under whose names it was sealed."""
    rest = tuple(cell for cell in bank.cells if cell.about.id != about.id)
    gone = parts_of(bank, about)
    names = {part.id for part in gone}
    revoked = tuple(replace(part, status=Status.REVOKED) for part in gone)
    cold = tuple(part for part in bank.cold if part.id not in names)
    return replace(bank, cells=rest, cold=cold, revoked=(*bank.revoked, *revoked))


def _without(cohort: Cohort, site: str) -> Cohort:
    return tuple(name for name in cohort if name != site)


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
