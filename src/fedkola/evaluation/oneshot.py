"""The independent check of a bank: all records of all sites summed at once, in one place.

No rounds, no cells, no wire: one call over the union of what the present sites contributed, from
their texts. Records that still wait at their sites belong to neither side. The bank's integers
must equal it bit for bit, and the model read from it is the joint model of the same class,
against which excess forgetting is measured.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from fedkola.algorithms.fedkola import FedKoLa
from fedkola.algorithms.fedkola import State as BankState
from fedkola.knowledge import bank as banks
from fedkola.knowledge import journal, statistics
from fedkola.knowledge.bank import Bank, CellKind, KnowledgeCell
from fedkola.server import Federation
from fedkola.types import Aggregate, Grid


@dataclass(frozen=True, slots=True, kw_only=True)
class OneShot:
    """``equal``: the streamed integers are these integers, bit for bit. ``state`` holds them."""

    equal: bool
    records: int
    state: BankState


def compare(federation: Federation, state: BankState) -> OneShot:
    """Sum everything that present sites contributed, and compare with the bank's totals."""
    algorithm, catalogue = federation.algorithm, federation.stream.catalogue
    assert isinstance(algorithm, FedKoLa)
    position = {code: i for i, code in enumerate(catalogue.codes())}
    z, rows = [], []
    for site in federation.sites.values():
        given = journal.used(site.store, before=state.number + 1)
        whole = site.knowledge.until(state.number)
        data = whole.take([i for i, record in enumerate(whole.records) if record in given])
        z.append(federation.trainer.cache.integers(data.texts))
        rows.append(torch.tensor([position[code] for code in data.labels], dtype=torch.int64))
    labels = torch.cat(rows)
    pooled = statistics.analytic(
        torch.cat(z),
        labels,
        num_rows=len(position),
        features=algorithm.features,
        bits=algorithm.bits,
        seed=algorithm.feature_seed,
    )
    streamed = totals(state.bank, position, algorithm.features)
    return OneShot(
        equal=all(torch.equal(pooled[name], streamed[name]) for name in pooled),
        records=len(labels),
        state=BankState(bank=_bank(algorithm, pooled, catalogue.codes()), number=state.number),
    )


def totals(bank: Bank, position: dict[str, int], features: int) -> dict[str, Tensor]:
    """The int64 sums over all live analytic cells, label rows in catalogue order."""
    found = {
        statistics.GRAM: torch.zeros(features * (features + 1) // 2, dtype=torch.int64),
        statistics.SUMS: torch.zeros(len(position), features, dtype=torch.int64),
        statistics.COUNTS: torch.zeros(len(position), dtype=torch.int64),
    }
    for cell in banks.select(bank, CellKind.ANALYTIC):
        index = torch.tensor([position[code] for code in cell.about.labels], dtype=torch.int64)
        words = cell.total.words
        found[statistics.GRAM] += words[statistics.GRAM]
        for name in (statistics.SUMS, statistics.COUNTS):
            found[name].index_add_(0, index, words[name].to(torch.int64))
    return found


def _bank(algorithm: FedKoLa, pooled: dict[str, Tensor], codes: tuple[str, ...]) -> Bank:
    kept = torch.nonzero(pooled[statistics.COUNTS]).flatten()
    words = {
        statistics.GRAM: pooled[statistics.GRAM],
        statistics.SUMS: pooled[statistics.SUMS][kept],
        statistics.COUNTS: pooled[statistics.COUNTS][kept],
    }
    about = KnowledgeCell(
        id="one-shot",
        module="one-shot",
        kind=CellKind.ANALYTIC,
        round=1,
        valid=(1.0, None),
        slot=None,
        recipe={
            "features": algorithm.features,
            "bits": algorithm.bits,
            "seed": algorithm.feature_seed,
        },
        labels=tuple(codes[int(i)] for i in kept),
        cohort=(),
        contributors=1,
        records=int(pooled[statistics.COUNTS].sum()),
        words="",
    )
    grid = Grid(word=64, bits=64, scale=dict.fromkeys(words, 0))
    return banks.seal(Bank(), about, Aggregate(cohort=(), words=words, grid=grid))
