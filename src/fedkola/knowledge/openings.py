"""When cells open, whom they are for, and when labels close: rules on sums, without any site.

A scope opens at k_min holders. Unless the data is declared public, each label row needs k_min
holders and ``label_floor`` records, and the cell the records floor of its kinds.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from fedkola.knowledge import bank as banks
from fedkola.knowledge import windows
from fedkola.knowledge.bank import Bank, CellKind, KnowledgeCell
from fedkola.knowledge.terms import Terms, floor, row_floor, rules, shared
from fedkola.types import Aggregate, Catalogue, Cohort


@dataclass(frozen=True, slots=True, kw_only=True)
class Opening:
    """One cell to fill: scope and label positions in the catalogue, and its place in the bank.

    ``against`` says that it is filled with what contradicts the version in force, which its module
    supersedes.
    """

    scope: str
    module: str
    kind: CellKind
    slot: int
    labels: tuple[int, ...]
    records: int
    deepest: int
    against: bool = False


def openings(
    terms: Terms, votes: Aggregate, bank: Bank
) -> tuple[tuple[Opening, ...], dict[str, int]]:
    """Cells to fill and scopes to park (scope -> records): a pure function of sums.

    What contradicts a module opens its next version by the same rules if more sites say so than
    bring records that agree with it; those then wait for one round.
    """
    opened: list[Opening] = []
    parked: dict[str, int] = {}
    for_it, against = _counted(terms, votes, ""), _counted(terms, votes, windows.AGAINST)
    for index, scope in enumerate(terms.catalogue.scopes()):
        module = banks.module_of(bank, scope)
        more = against.holders[index] > for_it.holders[index]
        turns = module is not None and more and bool(against.kinds[index])
        counted = against if turns else for_it
        total = sum(counted.rows[index].values()) if counted.kinds[index] else 0
        waiting = for_it.records[index] + against.records[index] - total
        if waiting:
            parked[scope] = waiting
        newest = max((m.version for m in bank.modules if m.scope == scope), default=0)
        held = module if module and not turns else None
        opened += [
            Opening(
                scope=scope,
                module=held.id if held else f"{scope}@{newest + 1}",
                kind=kind,
                slot=held.slot if held and held.slot is not None else -1,
                labels=tuple(counted.rows[index]),
                records=total,
                deepest=max(counted.rows[index].values()),
                against=turns,
            )
            for kind in counted.kinds[index]
        ]
    return tuple(opened), parked


def described(terms: Terms, number: int, opening: Opening, cohort: Cohort) -> KnowledgeCell:
    """The record of the cell that an opening asks to fill."""
    recipe = shared(terms.recipe, opening.kind)
    slot = opening.slot if opening.kind is CellKind.LORA else None
    codes = terms.catalogue.codes()
    return KnowledgeCell(
        id=banks.cell_id(
            module=opening.module, kind=opening.kind, round=number, slot=slot, recipe=recipe
        ),
        module=opening.module,
        kind=opening.kind,
        round=number,
        valid=(float(number), None),
        slot=slot,
        recipe=recipe,
        labels=tuple(codes[i] for i in opening.labels),
        cohort=cohort,
        contributors=0,
        records=opening.records,
        words="",
        privacy=rules(terms),
        base=terms.model,
        deepest=opening.deepest,
    )


def pooled(terms: Terms, number: int, bank: Bank, cohort: Cohort) -> KnowledgeCell | None:
    """The scatter cell to fill at the end of a round, if one is due.

    It covers every analytic cell without a Gram whose whole cohort is asked, so that the sums of
    both are over the same records. It is due at the records floor (waived for public data) and at
    ``scatter_share`` times the records covered so far: at 0 every round has one, at 1 they come at
    growing intervals, and views use the Gram there is in the meantime. ``scatter_every`` n above 0
    replaces the share: the first round that can, and every n-th one.
    """
    waiting = [
        cell.about for cell in banks.uncovered(bank) if set(cell.about.cohort) <= set(cohort)
    ]
    records = sum(about.records for about in waiting)
    scatters = banks.of_kind(bank, CellKind.SCATTER)
    if terms.scatter_every:
        due = not scatters or number % terms.scatter_every == 0
    else:
        covered = sum(cell.about.records for cell in scatters)
        due = records >= terms.scatter_share * covered
    if not waiting or not due or records < floor(terms, CellKind.SCATTER):
        return None
    recipe = shared(terms.recipe, CellKind.SCATTER)
    return KnowledgeCell(
        id=banks.cell_id(
            module=banks.POOL, kind=CellKind.SCATTER, round=number, slot=None, recipe=recipe
        ),
        module=banks.POOL,
        kind=CellKind.SCATTER,
        round=number,
        valid=(0.0, None),
        slot=None,
        recipe=recipe,
        labels=(),
        cohort=cohort,
        contributors=0,
        records=records,
        words="",
        covers=tuple(about.id for about in waiting),
        privacy=rules(terms),
        base=terms.model,
    )


def readers(
    access: Mapping[str, Sequence[str]], scopes: Sequence[str], roster: Cohort
) -> dict[str, Cohort]:
    """The sites that may hold each scope, where some may not; ``access`` is site -> scopes."""
    found = {
        scope: tuple(site for site in roster if scope in access.get(site, (scope,)))
        for scope in scopes
    }
    # No name at all would mean everybody; nobody is called "".
    return {scope: sites or ("",) for scope, sites in found.items() if sites != roster}


def retired(bank: Bank, catalogue: Catalogue, number: int) -> Bank:
    """The bank with every open label closed whose end in the catalogue has come."""
    still_open = {entry.code for entry in bank.labels if entry.valid_to is None}
    for label in catalogue.labels:
        ended = label.valid_to is not None and label.valid_to <= number
        if ended and label.code in still_open:
            assert label.valid_to is not None
            bank = banks.retire(
                bank, label.code, valid_to=label.valid_to, replaced_by=label.replaced_by
            )
    return bank


# --- private --------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class _Counted:
    """Summed votes by position of the scope: sites, records, records by label row that may open,
    and the kinds of cells that may."""

    holders: Sequence[int]
    records: Sequence[int]
    rows: Sequence[Mapping[int, int]]
    kinds: Sequence[tuple[CellKind, ...]]


def _counted(terms: Terms, votes: Aggregate, prefix: str) -> _Counted:
    place = {scope: i for i, scope in enumerate(terms.catalogue.scopes())}
    holders, records, label_holders, label_records = (
        votes.words[prefix + name].tolist() for name in windows.COUNTS
    )
    rows: list[dict[int, int]] = [{} for _ in place]
    for i, label in enumerate(terms.catalogue.labels):
        enough = label_holders[i] >= terms.k_min and label_records[i] >= row_floor(terms)
        if label_records[i] > 0 and (terms.public_reference or enough):
            rows[place[label.scope]][i] = label_records[i]
    kinds: list[tuple[CellKind, ...]] = []
    for index, mine in enumerate(rows):
        total = sum(mine.values())
        open_ = holders[index] >= terms.k_min and total >= floor(terms)
        deep = total >= terms.lora_floor
        allowed = [kind for kind in terms.kinds if deep or kind is not CellKind.LORA]
        kinds.append(tuple(allowed) if open_ else ())
    return _Counted(holders=holders, records=records, rows=rows, kinds=kinds)
