"""Keeping the hot bank small between rounds, and getting back what a change needs.

After every round ``tidy`` adds cells up once there are too many, and, once slots run short, fuses
LoRA modules that have fallen silent and are near each other or idle for a half-life. Before a
removal or a revision ``touch`` brings the cells concerned back: from cold storage, or, where that
was purged, by asking the sites that filled a cell to sum their journals once more and comparing the
hash. ``parted`` takes a module out of a fused adapter when its scope speaks again. What was touched
is made small again by the next ``tidy``. Sites never learn of any of this: they are asked about
cells as they were sealed.
"""

from collections.abc import Callable, Collection, Mapping
from pathlib import Path

import torch
from torch import Tensor

from fedkola.knowledge import archive, compact, views
from fedkola.knowledge.bank import (
    Bank,
    Cell,
    CellKind,
    KnowledgeCell,
    KnowledgeModule,
    ModuleState,
    Status,
    of_kind,
    weight,
)
from fedkola.knowledge.compact import Group, Policy
from fedkola.knowledge.views import Rule

Collect = Callable[[KnowledgeCell], Cell]


def tidy(
    bank: Bank,
    policy: Policy,
    folder: Path,
    *,
    now: int,
    rule: Rule,
    targets: Mapping[str, tuple[int, int]],
) -> Bank:
    """The bank within its bounds, its cold cells written to ``folder``; the same bank if it is.

    Exact sums come first; LoRA modules are fused while slots are short and the predicted error
    allows it. Raises KnowledgeError if a fused adapter would have to be made anew from cells that
    were purged.
    """
    if policy.hot_cells and len(bank.cells) > policy.hot_cells:
        # Rows are added up under the sum of their scatter cells, so these go first.
        for _ in range(2):
            for group in compact.summable(
                bank, before=now - policy.recent + 1, half_life=rule.half_life
            ):
                bank, parts = compact.add(bank, group)
                archive.put(folder, parts)
    if policy.eps and _free(bank, policy) < policy.spare:
        bank = _fuse(bank, policy, folder, now=now, rule=rule, targets=targets)
    return bank


def touch(bank: Bank, names: Collection[str], folder: Path | None, collect: Collect) -> Bank:
    """The bank with these cells live and apart, so that they can be changed; see the module.

    ``collect`` sums a purged cell again from its sites' journals. Whatever it raises, and
    BlobMissing for an altered file, leaves the bank as it was.
    """
    wanted = set(compact.needed(bank, names))
    parts = [
        collect(about)
        if about.status is Status.PURGED or folder is None
        else archive.get(folder, about)
        for about in bank.cold
        if about.id in wanted
    ]
    return compact.take_out(bank, parts) if parts else bank


def parted(
    bank: Bank,
    policy: Policy,
    folder: Path | None,
    collect: Collect,
    *,
    now: int,
    rule: Rule,
    targets: Mapping[str, tuple[int, int]],
    scopes: Collection[str] = (),
) -> Bank:
    """The bank with modules taken out of their fused adapters that answer for themselves again:
    those that were superseded or retired, and those of these scopes, which new cells are to come
    to. What they leave behind is fused again, if the error allows it.
    """
    apart = {
        m.id for m in bank.modules if m.state is not ModuleState.COMPACTED or m.scope in scopes
    }
    for fused in bank.fused:
        if not apart & set(fused.modules):
            continue
        bank = touch(bank, fused.cells, folder, collect)
        rest = tuple(name for name in fused.modules if name not in apart)
        if len(rest) > 1 and folder is not None:
            adapters, records = _adapters(bank, now=now, rule=rule, targets=targets)
            chosen = [adapters[name] for name in rest]
            rank = _rank(bank)
            weights = compact.shares(records, rest)
            if compact.predicted(chosen, weights, rank=rank) <= policy.eps:
                bank, gone = compact.fuse_modules(
                    bank, adapters, records, rest, rank=rank, round=now
                )
                archive.put(folder, gone)
    return bank


# --- private --------------------------------------------------------------------------------------


def _free(bank: Bank, policy: Policy) -> int:
    taken = {m.slot for m in bank.modules} | {fused.slot for fused in bank.fused}
    return policy.slots_max - len(taken - {None})


def _fuse(
    bank: Bank,
    policy: Policy,
    folder: Path,
    *,
    now: int,
    rule: Rule,
    targets: Mapping[str, tuple[int, int]],
) -> Bank:
    """Fewer adapters: existing groups are taken apart and fused anew from their own cells, so the
    error is always that against the modules themselves."""
    old = [fused.modules for fused in bank.fused]
    bank = archive.thaw(bank, folder, [name for fused in bank.fused for name in fused.cells])
    adapters, records = _adapters(bank, now=now, rule=rule, targets=targets)
    modules = {m.id: m for m in bank.modules if m.id in adapters and m.closed is None}
    start: list[Group] = [tuple(n for n in group if n in modules) for group in old]
    start = [group for group in start if group]
    grouped = {name for group in start for name in group}
    start += [(name,) for name in modules if name not in grouped]
    if not start:
        return bank
    rank, close = _rank(bank), _near(bank)
    newest = {m: max(c.about.round for c in bank.cells if c.about.module == m) for m in modules}

    def alike(one: str, other: str) -> bool:
        a, b = modules[one], modules[other]
        silent = all(now - newest[m.id] >= policy.recent for m in (a, b))
        idle = all(_idle(m, newest[m.id], rule, now) for m in (a, b))
        near = frozenset((one, other)) in close
        return silent and a.access == b.access and (idle or near)

    # Taken apart, the old groups hold a slot for every module again.
    others = {m.slot for m in bank.modules if m.id not in modules} - {None}
    short = policy.spare - (policy.slots_max - len(start) - len(others))
    groups = compact.groups(
        adapters,
        records,
        start,
        alike=alike,
        rank=rank,
        eps=policy.eps,
        want=max(short, 0),
    )
    for group in groups:
        if len(group) > 1:
            bank, gone = compact.fuse_modules(bank, adapters, records, group, rank=rank, round=now)
            archive.put(folder, gone)
    return bank


def _adapters(
    bank: Bank, *, now: int, rule: Rule, targets: Mapping[str, tuple[int, int]]
) -> tuple[dict[str, dict[str, Tensor]], dict[str, int]]:
    """Every module's own adapter and the records behind it, from live LoRA cells."""
    cells = of_kind(bank, CellKind.LORA)
    weights = {c.about.id: weight(bank, c, now=now, half_life=rule.half_life) for c in cells}
    adapters = views.adapters(cells, rule, weights, targets)
    records = dict.fromkeys(adapters, 0)
    for cell in cells:
        records[cell.about.module] += cell.about.records
    return adapters, records


def _rank(bank: Bank) -> int:
    """The rank of the modules' adapters, which fused ones keep."""
    return int(of_kind(bank, CellKind.LORA)[0].about.recipe["rank"] or 0)


def _idle(module: KnowledgeModule, newest: int, rule: Rule, now: int) -> bool:
    """No cell for a half-life; without a half-life nothing is ever idle."""
    span = module.half_life or rule.half_life
    return span is not None and now - newest >= span


def _near(bank: Bank) -> frozenset[frozenset[str]]:
    """Pairs of modules whose means are closer than a member is to its own mean on average.

    In units of the pooled within-module covariance: |mu_a - mu_b|^2 <= d.
    """
    cells = of_kind(bank, CellKind.ROUTER)
    if not cells:
        return frozenset()
    found = views.router_of(cells, {cell.about.id: 1.0 for cell in cells})
    gap = found.means[:, None] - found.means[None]
    distance = torch.einsum("abd,de,abe->ab", gap, found.within, gap)
    names = found.modules
    return frozenset(
        frozenset((names[i], names[j]))
        for i in range(len(names))
        for j in range(i)
        if float(distance[i, j]) <= found.means.shape[1]
    )
