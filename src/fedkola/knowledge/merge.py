"""Two banks become one: cells are a set, joined without asking who came first.

A cell is added once (SEAL), its integers are amended (WITHDRAW) and it is removed (REVOKE). With
E the pairs (cell, hash) that a bank has held and replaced since::

    live(a + b)    = ( live(a) + live(b) )  -  ( E(a) + E(b) )  -  revoked(a) - revoked(b)
    E(a + b)       = E(a) + E(b)                              + is union

Every part is a union or a least value, so merging is commutative, associative and idempotent (an
observed-remove set; Shapiro et al., SSS 2011), and a removal that one side knows of is never
undone by the other. A cell that is left with two different sums was changed on both sides and is
refused: only its sites can say what their difference is.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any, TypeVar

from fedkola.errors import BasisMismatch, KnowledgeError
from fedkola.knowledge.bank import (
    Bank,
    Cell,
    CellKind,
    KnowledgeCell,
    KnowledgeModule,
    LabelEntry,
    ModuleState,
    cell_id,
)

T = TypeVar("T")


@dataclass(frozen=True, slots=True, kw_only=True)
class Branch:
    """A bank and what it knows of the past: (cell, hash of integers) pairs that it replaced."""

    bank: Bank
    earlier: frozenset[tuple[str, str]] = frozenset()


def branch(bank: Bank, history: Iterable[tuple[str, str, Mapping[str, Any]]]) -> Branch:
    """A bank with the past that its events (kind, subject, body) tell of."""
    held = {(cell.about.id, cell.about.words) for cell in bank.cells}
    seen = {(subject, body["words"]) for _, subject, body in history if "words" in body}
    return Branch(bank=bank, earlier=frozenset(seen - held))


def merge(a: Branch, b: Branch) -> Branch:
    """The bank that knows what either knows, in an order that depends on neither.

    Both must be hot throughout: sums and fused adapters are taken apart first. Raises
    BasisMismatch for another base model, recipe or slot, KnowledgeError for a cell that both
    changed, for modules of different access or half-life, and for a bank that is not hot.
    """
    a, b = _named(a), _named(b)
    _demand_hot(a.bank, b.bank)
    _demand_same_basis(a.bank, b.bank)
    earlier = a.earlier | b.earlier
    revoked = _joined([(about.id, about) for about in (*a.bank.revoked, *b.bank.revoked)], _least)
    gone = {about.id for about in revoked}
    live: dict[str, Cell] = {}
    for cell in (*a.bank.cells, *b.bank.cells):
        about = cell.about
        if about.id not in gone and (about.id, about.words) not in earlier:
            live[about.id] = _same(live[about.id], cell) if about.id in live else cell
    modules = _joined([(m.id, m) for m in (*a.bank.modules, *b.bank.modules)], _one_module)
    labels = _joined([(entry.code, entry) for entry in (*a.bank.labels, *b.bank.labels)], _label)
    bank = Bank(
        cells=tuple(sorted(live.values(), key=_place)),
        modules=tuple(sorted(modules, key=lambda m: (m.opened, m.id))),
        labels=tuple(sorted(labels, key=lambda entry: (entry.valid_from, entry.code))),
        revoked=tuple(sorted(revoked, key=lambda about: (about.round, about.id))),
    )
    _demand_slots(bank)
    return Branch(bank=bank, earlier=earlier)


# --- private --------------------------------------------------------------------------------------


def _named(branch: Branch) -> Branch:
    """Scatter cells named by what they cover, as each federation has one a round."""
    names = {
        cell.about.id: cell_id(
            module=cell.about.module,
            kind=cell.about.kind,
            round=cell.about.round,
            slot=None,
            recipe={**cell.about.recipe, "covers": " ".join(sorted(cell.about.covers))},
        )
        for cell in branch.bank.cells
        if cell.about.kind is CellKind.SCATTER
    }
    cells = tuple(
        replace(cell, about=replace(cell.about, id=names.get(cell.about.id, cell.about.id)))
        for cell in branch.bank.cells
    )
    earlier = frozenset((names.get(name, name), words) for name, words in branch.earlier)
    return Branch(bank=replace(branch.bank, cells=cells), earlier=earlier)


def _demand_hot(*both: Bank) -> None:
    for bank in both:
        if bank.cold or bank.fused:
            raise KnowledgeError(
                f"a bank with {len(bank.cold)} cells in cold storage was given; take them out of "
                "it first (archive.thaw), as sums of different cells cannot be joined"
            )


def _demand_same_basis(a: Bank, b: Bank) -> None:
    """One base model for all cells, and one recipe for those that a view adds up."""
    for what in ("base", "head", "basis"):
        one, other = (_bases(bank)[what] for bank in (a, b))
        if one and other and one != other:
            raise BasisMismatch(
                f"the banks have different {_BASES[what]}: {sorted(one)} and {sorted(other)}; run "
                "one of them again under the other's plan ([model] and [knowledge]), then merge"
            )


_BASES = {"base": "base models", "head": "feature recipes", "basis": "LoRA bases"}


def _bases(bank: Bank) -> dict[str, set[str]]:
    found: dict[str, set[str]] = {name: set() for name in _BASES}
    for cell in bank.cells:
        recipe = cell.about.recipe
        found["base"].add(cell.about.base)
        if "features" in recipe:
            found["head"].add(
                f"features {recipe['features']}, bits {recipe['bits']}, seed {recipe['seed']}"
            )
        if "rank" in recipe:
            found["basis"].add(f"rank {recipe['rank']}, seed {recipe['basis_seed']}")
    return found


def _joined(named: Iterable[tuple[str, T]], join: Callable[[T, T], T]) -> tuple[T, ...]:
    """One element for each name."""
    found: dict[str, T] = {}
    for name, each in named:
        found[name] = join(found[name], each) if name in found else each
    return tuple(found.values())


def _place(cell: Cell) -> tuple[int, str, int, str]:
    about = cell.about
    return about.round, about.module, tuple(CellKind).index(about.kind), about.id


def _least(one: KnowledgeCell, other: KnowledgeCell) -> KnowledgeCell:
    return min(one, other, key=lambda about: (about.words, about.records, about.cohort))


def _same(one: Cell, other: Cell) -> Cell:
    """One cell of two with one sum; the stricter of what the two sides say about it."""
    a, b = one.about, other.about
    if a.words != b.words:
        raise KnowledgeError(
            f"cell {a.id} of {a.module}, round {a.round}, holds {a.words[:16]} in one bank and "
            f"{b.words[:16]} in the other, and neither replaced the other; ask for the same "
            "removals in both runs, or keep one of the two"
        )
    names = sorted({*a.quality, *b.quality})
    about = replace(
        a,
        quality={n: min(a.quality.get(n, 1.0), b.quality.get(n, 1.0)) for n in names},
        cohort=tuple(sorted(set(a.cohort) & set(b.cohort))) if a.cohort != b.cohort else a.cohort,
    )
    return replace(one, about=about)


def _one_module(one: KnowledgeModule, other: KnowledgeModule) -> KnowledgeModule:
    for name in ("scope", "version", "supersedes", "access", "half_life"):
        a, b = getattr(one, name), getattr(other, name)
        if a != b:
            raise KnowledgeError(
                f"module {one.id} has {name} = {a!r} in one bank and {b!r} in the other; agree on "
                "one, as a merge may neither widen access nor change weights"
            )
    ends = [m for m in (one, other) if m.closed is not None]
    end = min(ends, key=lambda m: (m.closed, m.valid_to, m.state.value), default=None)
    known = [m.slot for m in (one, other) if m.slot is not None]
    active = ModuleState.ACTIVE in (one.state, other.state)
    return replace(
        one,
        opened=min(one.opened, other.opened),
        slot=min(known, default=None),
        state=end.state if end else ModuleState.ACTIVE if active else one.state,
        closed=end.closed if end else None,
        valid_to=end.valid_to if end else None,
    )


def _label(one: LabelEntry, other: LabelEntry) -> LabelEntry:
    """Open since the earlier of both; what one side closed is closed."""

    def end(entry: LabelEntry) -> tuple[float, tuple[str, ...], str]:
        to = float("inf") if entry.valid_to is None else entry.valid_to
        return to, entry.replaced_by, entry.module

    return replace(min(one, other, key=end), valid_from=min(one.valid_from, other.valid_from))


def _demand_slots(bank: Bank) -> None:
    """Every slot holds the LoRA cells of one module, and a module has one slot."""
    owner: dict[int | None, str] = {}
    slots: dict[str, int | None] = {}
    for cell in bank.cells:
        about = cell.about
        if about.kind is CellKind.LORA:
            mine = owner.setdefault(about.slot, about.module)
            slot = slots.setdefault(about.module, about.slot)
            if mine != about.module or slot != about.slot:
                raise BasisMismatch(
                    f"LoRA cells of {about.module} are in slot {about.slot}, where the other bank "
                    f"has {mine if mine != about.module else f'its own in slot {slot}'}; adapters "
                    "of two runs merge if their modules were opened in one order: export them apart"
                )
