"""What a bank holds: cells and labels by name, by kind, by holder and by time."""

from collections.abc import Iterable, Mapping, Sequence
from math import prod

from fedkola.errors import AccessRefused, KnowledgeError, UnknownCell
from fedkola.knowledge.bank.cells import (
    Bank,
    Cell,
    CellKind,
    KnowledgeCell,
    KnowledgeModule,
    LabelEntry,
    is_open,
)
from fedkola.knowledge.statistics import COUNTS


def module_of(bank: Bank, scope: str) -> KnowledgeModule | None:
    """The module that new cells of a scope go to: its newest version that is not closed."""
    open_ = [m for m in bank.modules if m.scope == scope and is_open(m)]
    return max(open_, key=lambda module: module.version, default=None)


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


def weight(bank: Bank, cell: Cell, *, now: int, half_life: float | None) -> float:
    """rho_c = q_c 2^(-(now - t_c) / h_m): what a cell weighs in a view of round ``now``.

    ``half_life`` in rounds is used for modules that have none of their own.
    """
    own = next((m.half_life for m in bank.modules if m.id == cell.about.module), None)
    span = half_life if own is None else own
    age = 0.0 if span is None else max(now - cell.about.round, 0) / span
    return float(prod(cell.about.quality.values()) * 2.0**-age)


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


def answers_then(module: KnowledgeModule, *, valid_at: float | None, known_at: int | None) -> bool:
    """Whether a module has weight in a view as of these times."""
    if module.closed is None or module.valid_to is None:
        return True
    unknown_then = known_at is not None and known_at < module.closed
    return unknown_then or (valid_at is not None and valid_at < module.valid_to)


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
