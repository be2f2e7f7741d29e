"""What changes a bank: modules opened and closed, cells sealed, taken out and taken back."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from fedkola.errors import BasisMismatch, KnowledgeError, UnknownCell
from fedkola.knowledge.bank.cells import (
    POOL,
    Bank,
    Cell,
    CellKind,
    KnowledgeCell,
    KnowledgeModule,
    LabelEntry,
    ModuleState,
    Status,
    content,
    is_open,
)
from fedkola.knowledge.bank.choice import find, find_module, module_of, parts_of
from fedkola.knowledge.statistics import COUNTS, GRAM, SUMS
from fedkola.types import Aggregate, Cohort, Grid, Scalar


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


def retire_module(bank: Bank, module: str, *, round: int, valid_to: float | None = None) -> Bank:
    """Close a module without a successor; it answers as of earlier times. Raises UnknownCell."""
    held = find_module(bank, module)
    return _changed(bank, _closed(held, ModuleState.RETIRED, round, valid_to))


def rate(bank: Bank, cell: str, quality: Mapping[str, float]) -> Bank:
    """Set quality factors of a live cell; its integers do not change. Raises KnowledgeError."""
    for name, value in quality.items():
        if not 0 <= value <= 1:
            raise KnowledgeError(f"quality {name} = {value} of cell {cell}; expected 0 to 1")
    known = find(bank, cell)
    about = replace(known.about, quality={**known.about.quality, **quality})
    cells = tuple(replace(c, about=about) if c is known else c for c in bank.cells)
    return replace(bank, cells=cells)


def seal(bank: Bank, about: KnowledgeCell, total: Aggregate) -> Bank:
    """Add a sealed cell and open its label rows; its module becomes active if it waited for it.

    Raises KnowledgeError for a cell that the bank holds, or of a module that is closed.
    """
    if any(cell.about.id == about.id for cell in bank.cells):
        raise KnowledgeError(
            f"cell {about.id} of {about.module} is sealed already; a round seals a cell once"
        )
    if any(m.id == about.module and not is_open(m) for m in bank.modules):
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


def _closed(
    module: KnowledgeModule, state: ModuleState, round: int, valid_to: float | None
) -> KnowledgeModule:
    end = float(round) if valid_to is None else valid_to
    return replace(module, state=state, closed=round, valid_to=end)


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
