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
    if kind is CellKind.ANALYTIC:
        recipe = {"features": 16, "bits": 4, "seed": 0}
        words = statistics.analytic(z, rows, num_rows=len(labels), **recipe)
    else:
        words = statistics.router(z, rows, num_rows=len(labels))
    words["weight"] = torch.tensor(len(codes))
    words["metric/contributors"] = torch.tensor(sites if codes else 0)
    return Aggregate(cohort=("a", "b", "c"), words=words, grid=GRID)


def about(
    kind: CellKind, module: str, round: int, labels: Sequence[str], *, records: int
) -> KnowledgeCell:
    recipe = RECIPE if kind is CellKind.ANALYTIC else {}
    return KnowledgeCell(
        id=banks.cell_id(module=module, kind=kind, round=round, slot=None, recipe=recipe),
        module=module,
        kind=kind,
        round=round,
        valid=(float(round), None),
        slot=None,
        recipe=recipe,
        labels=tuple(labels),
        cohort=("a", "b", "c"),
        contributors=3,
        records=records,
        words="",
    )


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
    """The bank with one more window of a scope, an analytic and a router cell."""
    bank = banks.open_modules(bank, [scope], round=round, slots_max=99)
    module = banks.module_of(bank, scope)
    assert module is not None
    z = embeddings(codes, seed=seed)
    for kind in kinds:
        cell = about(kind, module.id, round, labels, records=len(codes))
        bank = banks.seal(bank, cell, total(kind, labels, codes, z))
    return bank
