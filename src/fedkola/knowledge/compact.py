"""Compaction: a hot bank that stays bounded however many windows arrive.

**Sums** are exact. Cells of one module, kind and recipe add up to one cell (``add``): its integers
are those of one shot over all their records, so views do not change by a bit. The parts move to
cold storage, where they keep answering questions as of their own rounds, and a removal first takes
the parts concerned out of the sum (``take_out``), changes them as any cell, and adds up again.

**Fusing** LoRA modules is an approximation whose error is known before it is made. With the
modules' factors side by side, A_cat^T = Q R, shares a_m and C = [a_1 B_1 .. a_K B_K] R^T::

    C^T C = U diag(e) U^T,  e descending        B' = C U_r        A' = U_r^T Q^T
    error = sqrt( sum_{i > r} e_i / sum_i e_i ) = | C Q^T - B' A' |_F / | C Q^T |_F

over all layers together. A' has orthonormal rows; if A_cat has them too, R = I. A fused module
is a cache: its cells stay in cold storage and whatever touches one of them dissolves it.
"""

import json
import math
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from fedkola.errors import BasisMismatch, UnknownCell
from fedkola.knowledge.bank import (
    Bank,
    Cell,
    CellKind,
    FusedAdapter,
    KnowledgeCell,
    KnowledgeModule,
    ModuleState,
    Status,
    cell_id,
    content,
    find,
)
from fedkola.knowledge.basis import A, B
from fedkola.knowledge.statistics import COUNTS, SUMS
from fedkola.types import Aggregate, Grid, Weights

FADED = 8
"""Half-lives after which cells may be added up: by then they weigh less than 2^-8."""

Group = tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Policy:
    """When the hot bank is made smaller, and by how much.

    Cells older than ``recent`` rounds are added up once the bank holds more than ``hot_cells``
    (0 never does). LoRA modules are fused while fewer than ``spare`` of ``slots_max`` slots are
    free, as long as the predicted error stays within ``eps`` (0 never does).
    """

    hot_cells: int = 0
    recent: int = 4
    eps: float = 0.0
    slots_max: int = 48
    spare: int = 2
    half_life: float | None = None


def groups(
    adapters: Mapping[str, Weights],
    records: Mapping[str, int],
    start: Sequence[Group],
    *,
    alike: Callable[[str, str], bool],
    rank: int,
    eps: float,
    want: int,
) -> tuple[Group, ...]:
    """Groups of modules to fuse, so that ``want`` fewer adapters are left, or as many as may be.

    Two groups are joined while every pair of their modules is ``alike`` and the predicted error of
    the whole stays within ``eps``; the smallest error first. ``start`` holds every module once.
    """
    found, freed = list(start), 0
    errors: dict[tuple[Group, Group], float] = {}
    while freed < want:
        best: tuple[float, Group, Group] | None = None
        for i, one in enumerate(found):
            for other in found[i + 1 :]:
                if not all(alike(a, b) for a in one for b in other):
                    continue
                if (one, other) not in errors:
                    both = [*one, *other]
                    chosen = [adapters[name] for name in both]
                    errors[one, other] = predicted(chosen, shares(records, both), rank=rank)
                if errors[one, other] <= eps and (best is None or errors[one, other] < best[0]):
                    best = (errors[one, other], one, other)
        if best is None:
            break
        _, one, other = best
        found = [(*one, *other) if group == one else group for group in found if group != other]
        freed += 1
    return tuple(found)


def shares(records: Mapping[str, int], modules: Sequence[str]) -> tuple[float, ...]:
    """The weight of each module in a fused adapter: its part of their records.

    The router gives the fused adapter the sum of their probabilities, so each keeps its own part
    wherever the input does not tell them apart.
    """
    whole = sum(records[name] for name in modules)
    return tuple(records[name] / whole if whole else 1 / len(modules) for name in modules)


def fuse_modules(
    bank: Bank,
    adapters: Mapping[str, Weights],
    records: Mapping[str, int],
    group: Group,
    *,
    rank: int,
    round: int,
) -> tuple[Bank, tuple[Cell, ...]]:
    """The bank with one adapter in place of these modules' LoRA cells, and the cells that go cold.

    The modules give up their slots but the lowest, which the fused adapter takes. Its A lies in
    the span of all of them: a module that reuses one of the others overlaps with it. The cells of
    a sum go with their parts.
    """
    parts = [
        cell
        for cell in bank.cells
        if cell.about.kind is CellKind.LORA and cell.about.module in group
    ]
    weights = shares(records, group)
    made = fuse([adapters[name] for name in group], weights, rank=rank)
    slots = [m.slot for m in bank.modules if m.id in group and m.slot is not None]
    fused = FusedAdapter(
        id="+".join(group),
        modules=group,
        shares=weights,
        cells=tuple(cell.about.id for cell in parts),
        slot=min(slots),
        round=round,
        error=made.error,
        adapter=made.adapter,
    )
    names = {cell.about.id for cell in parts}
    modules = tuple(
        replace(m, slot=None, state=ModuleState.COMPACTED) if m.id in group else m
        for m in bank.modules
    )
    bank = replace(
        bank,
        cells=tuple(cell for cell in bank.cells if cell.about.id not in names),
        modules=modules,
        cold=(*bank.cold, *(_status(cell, Status.ARCHIVED).about for cell in parts)),
        fused=(*bank.fused, fused),
    )
    return bank, tuple(parts)


@dataclass(frozen=True, slots=True, kw_only=True)
class Fused:
    """One adapter in place of several, and its relative error in the Frobenius norm."""

    adapter: Weights
    error: float


def due(bank: Bank, policy: Policy) -> bool:
    """Whether the hot bank holds more cells than it should."""
    return 0 < policy.hot_cells < len(bank.cells)


def summable(bank: Bank, *, before: int, half_life: float | None = None) -> tuple[Group, ...]:
    """Groups of two and more live cells that may be added up: those of rounds before ``before``.

    Of one module, kind, slot and recipe, opened under the same rules, of one quality and without
    an end of validity; analytic cells also under one scatter cell, so that it goes on covering
    whole cells. Under a half-life only cells older than ``FADED`` half-lives are alike enough: in
    a sum all weigh as its newest.
    """
    spans = {m.id: m.half_life for m in bank.modules if m.half_life is not None}
    over = {name: cell.about.id for cell in bank.cells for name in cell.about.covers}
    groups: dict[str, list[str]] = {}
    for cell in bank.cells:
        about = cell.about
        span = None if about.kind is CellKind.SCATTER else spans.get(about.module, half_life)
        last = before if span is None else before - math.ceil(FADED * span)
        uncovered = about.kind is CellKind.ANALYTIC and about.id not in over
        if about.round < last and about.valid[1] is None and not uncovered:
            groups.setdefault(_alike(about, over.get(about.id, "")), []).append(about.id)
    return tuple(tuple(ids) for ids in groups.values() if len(ids) > 1)


def add(bank: Bank, group: Group) -> tuple[Bank, tuple[Cell, ...]]:
    """The bank with these live cells added up, and the cells that go to cold storage for it.

    A sum among them is extended. The new cell dates from the newest, has the rows of all, and as
    contributors the most that any part has: no fewer sites are in it.
    """
    chosen, covers = [find(bank, name) for name in group], _covers(bank)
    parts = [
        replace(c, about=replace(c.about, covers=covers.get(c.about.id, ())))
        for c in chosen
        if not c.about.sources
    ]
    cold = [replace(cell.about, status=Status.ARCHIVED) for cell in parts]
    over = next((c.about.id for c in bank.cells if set(group) & set(c.about.covers)), "")
    whole = _summed(chosen, over=over)
    covers[whole.about.id] = tuple(
        name for cell in chosen for name in covers.get(cell.about.id, ())
    )
    place = next(i for i, cell in enumerate(bank.cells) if cell.about.id in group)
    rest = [[c for c in some if c.about.id not in group] for some in _cut(bank.cells, place)]
    cells = _express((*rest[0], whole, *rest[1]), covers)
    return replace(bank, cells=cells, cold=(*bank.cold, *cold)), tuple(parts)


def take_out(bank: Bank, parts: Sequence[Cell]) -> Bank:
    """The bank with cells back from cold storage: hot again, and gone from the sums they were in.

    Fused adapters made from one of them are dissolved. Raises UnknownCell for a cell that is not
    cold.
    """
    back = {part.about.id: _status(part, Status.SEALED) for part in parts}
    known = {about.id: about for about in bank.cold}
    for name in back:
        if name not in known:
            raise UnknownCell(f"cell {name} is not in cold storage; it is live or was revoked")
    covers = _covers(bank)
    cold = {name: about for name, about in known.items() if name not in back}
    sums = [back.pop(name) for name in tuple(back) if back[name].about.sources]
    gone = [fused for fused in bank.fused if {part.about.id for part in parts} & set(fused.cells)]
    cells: list[Cell] = []
    for cell in (*bank.cells, *sums):
        mine = [back.pop(name) for name in cell.about.sources if name in back]
        lost = {name for part in mine for name in part.about.covers}
        covers[cell.about.id] = tuple(
            name for name in covers.get(cell.about.id, ()) if name not in lost
        )
        covers |= {part.about.id: part.about.covers for part in mine}
        left = [cold[name] for name in cell.about.sources if name in cold]
        cells += [_less(cell, mine, left)] if mine and left else [] if mine else [cell]
        cells += mine
    bank = replace(
        bank,
        cells=_express((*cells, *back.values()), covers),
        cold=tuple(cold.values()),
        fused=tuple(fused for fused in bank.fused if fused not in gone),
    )
    return _owning(bank, {name for fused in gone for name in fused.modules})


def needed(bank: Bank, names: Collection[str]) -> tuple[str, ...]:
    """The cold cells that must come back before these cells can be changed.

    With a cell come the scatter cells that cover it, with a scatter cell all that it covers, with
    a part of an archived sum that sum, and with a cell of a fused adapter all of its cells.
    """
    cold = {about.id: about for about in bank.cold}
    wanted: set[str] = set()
    waiting = list(names)
    while waiting:
        name = waiting.pop()
        if name not in wanted:
            wanted.add(name)
            waiting += [a.id for a in cold.values() if name in a.covers or name in a.sources]
            waiting += cold[name].covers if name in cold else ()
            waiting += [n for fused in bank.fused if name in fused.cells for n in fused.cells]
    return tuple(name for name in cold if name in wanted)


def predicted(adapters: Sequence[Weights], shares: Sequence[float], *, rank: int) -> float:
    """The relative error that ``fuse`` would make, without making it: from singular values."""
    tail = whole = 0.0
    for layer in _layers(adapters):
        energies = _spectrum(*_factors(adapters, shares, layer))[0]
        tail += float(energies[rank:].sum())
        whole += float(energies.sum())
    return (tail / whole) ** 0.5 if whole else 0.0


def fuse(adapters: Sequence[Weights], shares: Sequence[float], *, rank: int) -> Fused:
    """The best adapter of this rank in place of ``sum_m shares[m] B_m A_m``.

    ``adapters`` hold ``{layer}.lora_A`` (r_m, d_in) and ``{layer}.lora_B`` (d_out, r_m) for the
    same layers. Raises BasisMismatch if their layers or widths differ.
    """
    made: dict[str, Tensor] = {}
    tail = whole = 0.0
    for layer in _layers(adapters):
        narrow, rows = _factors(adapters, shares, layer)
        energies, directions = _spectrum(narrow, rows)
        top = directions[:, :rank]
        made[layer + B] = (narrow @ top).to(torch.float32).contiguous()
        made[layer + A] = (top.T @ rows).to(torch.float32).contiguous()
        tail += float(energies[rank:].sum())
        whole += float(energies.sum())
    return Fused(adapter=made, error=(tail / whole) ** 0.5 if whole else 0.0)


def measured(adapters: Sequence[Weights], shares: Sequence[float], adapter: Weights) -> float:
    """The relative error of ``adapter`` from the full products, the slow way: the oracle."""
    gap = whole = 0.0
    for layer in _layers(adapters):
        exact = sum(
            (
                share * (each[layer + B].to(torch.float64) @ each[layer + A].to(torch.float64))
                for each, share in zip(adapters, shares, strict=True)
            ),
            start=torch.zeros((), dtype=torch.float64),
        )
        made = adapter[layer + B].to(torch.float64) @ adapter[layer + A].to(torch.float64)
        gap += float((exact - made).square().sum())
        whole += float(exact.square().sum())
    return (gap / whole) ** 0.5 if whole else 0.0


# --- private --------------------------------------------------------------------------------------


def _alike(about: KnowledgeCell, over: str) -> str:
    """What cells must share to be added up, as a key."""
    rest = (about.recipe, about.privacy, about.quality)
    key = (about.module, about.kind.value, about.slot, over, *(sorted(r.items()) for r in rest))
    return json.dumps(key)


def _covers(bank: Bank) -> dict[str, tuple[str, ...]]:
    """What each live scatter cell covers, in ids of cells as they were sealed."""
    sources = {cell.about.id: cell.about.sources for cell in bank.cells}
    return {
        cell.about.id: tuple(
            origin for name in cell.about.covers for origin in sources.get(name) or (name,)
        )
        for cell in bank.cells
        if cell.about.covers
    }


def _express(cells: Iterable[Cell], covers: Mapping[str, tuple[str, ...]]) -> tuple[Cell, ...]:
    """The cells, scatter cells naming the live ones that hold the origins they cover."""
    cells = tuple(cells)
    home = {origin: c.about.id for c in cells for origin in c.about.sources or (c.about.id,)}
    return tuple(
        replace(
            cell,
            about=replace(
                cell.about,
                covers=tuple(
                    dict.fromkeys(home[o] for o in covers.get(cell.about.id, ()) if o in home)
                ),
            ),
        )
        for cell in cells
    )


def _summed(cells: Sequence[Cell], *, over: str) -> Cell:
    """One cell over all records of these."""
    first = cells[0].about
    labels = tuple(dict.fromkeys(code for cell in cells for code in cell.about.labels))
    words: dict[str, Tensor] = {}
    for cell in cells:
        for name, value in _rows(cell, labels).items():
            words[name] = words[name] + value if name in words else value
    name = cell_id(
        module=first.module,
        kind=first.kind,
        round=0,
        slot=first.slot,
        recipe={**first.recipe, "sum": _alike(first, over)},
    )
    return _described(cells[0], name, words, labels, [cell.about for cell in cells])


def _less(cell: Cell, parts: Sequence[Cell], left: Sequence[KnowledgeCell]) -> Cell:
    """A sum without some of its parts; ``left`` describes the parts that stay."""
    labels = tuple(code for code in cell.about.labels if any(code in a.labels for a in left))
    wide = cell.about.labels
    words = dict(cell.total.words)
    for part in parts:
        words = {name: words[name] - value for name, value in _rows(part, wide).items()}
    narrow = replace(cell, total=replace(cell.total, words=words))
    return _described(cell, cell.about.id, _rows(narrow, labels), labels, left)


def _described(
    like: Cell,
    name: str,
    words: Mapping[str, Tensor],
    labels: Sequence[str],
    parts: Sequence[KnowledgeCell],
) -> Cell:
    cohort = tuple(sorted({site for about in parts for site in about.cohort}))
    scale = dict(like.total.grid.scale)
    total = Aggregate(cohort=cohort, words=words, grid=Grid(word=64, bits=64, scale=scale))
    about = replace(
        like.about,
        id=name,
        round=max(about.round for about in parts),
        valid=(max(about.valid[0] for about in parts), None),
        labels=tuple(labels),
        cohort=cohort,
        contributors=max(about.contributors for about in parts),
        records=sum(about.records for about in parts),
        sources=tuple(origin for about in parts for origin in about.sources or (about.id,)),
        words=content(labels, total),
    )
    return Cell(about=about, total=total)


def _rows(cell: Cell, labels: Sequence[str]) -> dict[str, Tensor]:
    """The int64 words of a cell with its label rows in this order; rows it lacks are zero."""
    words = {name: value.to(torch.int64) for name, value in cell.total.words.items()}
    if COUNTS not in words:
        return words
    place = {code: i for i, code in enumerate(cell.about.labels)}
    for name in (SUMS, COUNTS):
        old = words[name]
        wide = torch.zeros((len(labels), *old.shape[1:]), dtype=torch.int64)
        held = [(row, place[code]) for row, code in enumerate(labels) if code in place]
        if held:
            to, at = torch.tensor(held).T
            wide[to] = old[at]
        words[name] = wide
    return words


def _status(cell: Cell, status: Status) -> Cell:
    return replace(cell, about=replace(cell.about, status=status))


def _cut(cells: Sequence[Cell], place: int) -> tuple[Sequence[Cell], Sequence[Cell]]:
    return cells[:place], cells[place:]


def _owning(bank: Bank, modules: Collection[str]) -> Bank:
    """The bank with slots given back to modules whose fused adapter was dissolved.

    A module goes on in the slot of its cells. Another may have taken it since: the two overlap
    then, which costs orthogonality and nothing else, until they are fused again.
    """
    slots = {c.about.module: c.about.slot for c in bank.cells if c.about.kind is CellKind.LORA}

    def owner(module: KnowledgeModule) -> KnowledgeModule:
        if module.id not in modules or module.slot is not None:
            return module
        state = ModuleState.ACTIVE if module.state is ModuleState.COMPACTED else module.state
        return replace(module, slot=slots.get(module.id), state=state)

    return replace(bank, modules=tuple(map(owner, bank.modules)))


def _layers(adapters: Sequence[Weights]) -> list[str]:
    found = [sorted(n.removesuffix(B) for n in each if n.endswith(B)) for each in adapters]
    if not found or any(layers != found[0] for layers in found):
        raise BasisMismatch(
            "adapters of different layers cannot be fused; they belong to different base models"
        )
    return found[0]


def _factors(
    adapters: Sequence[Weights], shares: Sequence[float], layer: str
) -> tuple[Tensor, Tensor]:
    """C (d_out, R) and orthonormal rows Q^T (R, d_in), whose product is the weighted sum."""
    widths = {each[layer + A].shape[1] for each in adapters}
    heights = {each[layer + B].shape[0] for each in adapters}
    if len(widths) > 1 or len(heights) > 1:
        raise BasisMismatch(
            f"{layer} is {sorted(heights)} x {sorted(widths)} in different adapters; they belong "
            "to different base models"
        )
    rows = torch.cat([each[layer + A].to(torch.float64) for each in adapters])
    columns = torch.cat(
        [
            share * each[layer + B].to(torch.float64)
            for each, share in zip(adapters, shares, strict=True)
        ],
        1,
    )
    q, r = torch.linalg.qr(rows.T)
    return columns @ r.T, q.T


def _spectrum(narrow: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
    """Energies e (descending, clamped at 0) and the directions U of C^T C."""
    energies, directions = torch.linalg.eigh(narrow.T @ narrow)
    return energies.flip(0).clamp(min=0), directions.flip(1)
