"""Cells and banks made of a few records, without a federation."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from fedkola.knowledge import bank as banks
from fedkola.knowledge import statistics
from fedkola.knowledge.bank import Bank, CellKind, KnowledgeCell
from fedkola.types import Aggregate, Catalogue, Grid, Label, Scalar

WIDTH = 8
RECIPE: Mapping[str, Scalar] = {"features": 16, "bits": 4, "seed": 0}
GRID = Grid(word=64, bits=64, scale={})


def catalogue(codes: Mapping[str, str]) -> Catalogue:
    """A two-level catalogue: code -> scope."""
    labels = tuple(Label(code=c, path=(c, scope), scope=scope) for c, scope in codes.items())
    return Catalogue(system="small", levels=("code", "scope"), labels=labels)


def embeddings(codes: Sequence[str], *, seed: int = 0) -> Tensor:
    """One integer embedding per record, near a centre that depends on its code alone."""
    noise = torch.Generator().manual_seed(seed)
    rows = []
    for code in codes:
        place = torch.Generator().manual_seed(sum(map(ord, code)) * 7919)
        centre = torch.randn(WIDTH, generator=place)
        e = torch.nn.functional.normalize(centre + 0.2 * torch.randn(WIDTH, generator=noise), dim=0)
        rows.append(torch.round(e * 1024).to(torch.int16))
    return torch.stack(rows) if rows else torch.zeros(0, WIDTH, dtype=torch.int16)


def total(
    kind: CellKind, labels: Sequence[str], codes: Sequence[str], z: Tensor, *, sites: int = 3
) -> Aggregate:
    """The integer sum of a cell over these records."""
    rows = torch.tensor([labels.index(code) for code in codes], dtype=torch.int64)
    recipe = {"features": 16, "bits": 4, "seed": 0}
    if kind is CellKind.ANALYTIC:
        words = statistics.by_label(z, rows, num_rows=len(labels), **recipe)
    elif kind is CellKind.SCATTER:
        words = statistics.scatter(z, **recipe)
    else:
        words = statistics.router(z, rows, num_rows=len(labels))
    words["weight"] = torch.tensor(len(codes))
    words["metric/contributors"] = torch.tensor(sites if codes else 0)
    return Aggregate(cohort=("a", "b", "c"), words=words, grid=GRID)


def about(
    kind: CellKind,
    module: str,
    round: int,
    labels: Sequence[str],
    *,
    records: int,
    covers: tuple[str, ...] = (),
) -> KnowledgeCell:
    recipe = {} if kind is CellKind.ROUTER else RECIPE
    return KnowledgeCell(
        id=banks.cell_id(module=module, kind=kind, round=round, slot=None, recipe=recipe),
        module=module,
        kind=kind,
        round=round,
        valid=(0.0 if kind is CellKind.SCATTER else float(round), None),
        slot=None,
        recipe=recipe,
        labels=tuple(labels),
        cohort=("a", "b", "c"),
        contributors=3,
        records=records,
        words="",
        covers=covers,
    )


def pooled(bank: Bank, round: int, z: Tensor, cells: Sequence[str]) -> Bank:
    """The bank with a scatter cell over the records ``z`` of these analytic cells."""
    cell = about(CellKind.SCATTER, banks.POOL, round, (), records=len(z), covers=tuple(cells))
    labels = ["any"] * len(z)
    return banks.seal(bank, cell, total(CellKind.SCATTER, ["any"], labels, z))


def sealed(
    bank: Bank,
    scope: str,
    round: int,
    labels: Sequence[str],
    codes: Sequence[str],
    *,
    kinds: Sequence[CellKind] = (CellKind.ANALYTIC, CellKind.ROUTER),
    seed: int = 0,
) -> Bank:
    """The bank with one more window of a scope, an analytic and a router cell; with a scatter cell
    over that window if asked for."""
    bank = banks.open_modules(bank, [scope], round=round, slots_max=99)
    module = banks.module_of(bank, scope)
    assert module is not None
    z = embeddings(codes, seed=seed)
    for kind in kinds:
        if kind is CellKind.SCATTER:
            bank = pooled(bank, round, z, [cell.about.id for cell in banks.uncovered(bank)])
        else:
            cell = about(kind, module.id, round, labels, records=len(codes))
            bank = banks.seal(bank, cell, total(kind, labels, codes, z))
    return bank
