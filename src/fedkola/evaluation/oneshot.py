"""The independent check of a bank: all records of all sites summed at once, in one place.

No rounds, no cells, no wire: one call over the union of what the present sites contributed, from
their texts. Records that still wait at their sites belong to neither side. The bank's integers
must equal it bit for bit (its Gram over the records that scatter cells cover), and the model read
from it is the joint model of the same class, against which excess forgetting is measured.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from fedkola.algorithms.fedkola import FedKoLa
from fedkola.algorithms.fedkola import State as BankState
from fedkola.evaluation.scoring import reader
from fedkola.federation import Federation
from fedkola.knowledge import bank as banks
from fedkola.knowledge import journal, statistics
from fedkola.knowledge.bank import Bank, CellKind


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
    parts = {about.id: about for about in state.bank.cold}
    waiting = {cell.about.id for cell in banks.uncovered(state.bank)}
    live = {
        (part.round, banks.scope(part)): (part.cohort, cell.about.id not in waiting)
        for cell in banks.of_kind(state.bank, CellKind.ANALYTIC)
        for part in [parts[name] for name in cell.about.sources] or [cell.about]
    }
    z, rows, under = [], [], []
    for site in federation.sites.values():
        given = {
            version: live[entry.round, entry.scope][1]
            for entry in journal.entries(site.store)
            if (entry.round, entry.scope) in live and site.name in live[entry.round, entry.scope][0]
            for version in zip(entry.records, entry.windows, strict=True)
        }
        whole = site.knowledge.versions()
        versions = list(zip(whole.records, whole.windows, strict=True))
        data = whole.take([i for i, version in enumerate(versions) if version in given])
        z.append(algorithm.embed(state.base, reader(federation), data.questions))
        rows.append(torch.tensor([position[code] for code in data.labels], dtype=torch.int64))
        under.append(torch.tensor([given[v] for v in versions if v in given], dtype=torch.bool))
    records, labels, covered = torch.cat(z), torch.cat(rows), torch.cat(under)
    recipe = {
        "features": algorithm.features,
        "bits": algorithm.bits,
        "seed": algorithm.feature_seed,
    }
    once = statistics.by_label(records, labels, num_rows=len(position), **recipe)
    gram, rest = (
        statistics.scatter(part, **recipe)[statistics.GRAM]
        for part in (records[covered], records[~covered])
    )
    streamed = totals(state.bank, position, algorithm.features)
    pooled = {**once, statistics.GRAM: gram + rest}
    return OneShot(
        equal=all(
            torch.equal(value, streamed[name])
            for name, value in {**once, statistics.GRAM: gram}.items()
        ),
        records=len(labels),
        state=BankState(
            bank=banks.alone("one-shot", pooled, catalogue.codes(), recipe),
            number=state.number,
            base=state.base,
        ),
    )


def totals(bank: Bank, position: dict[str, int], features: int) -> dict[str, Tensor]:
    """The int64 sums over all live analytic and scatter cells, label rows in catalogue order."""
    found = {
        statistics.GRAM: torch.zeros(features * (features + 1) // 2, dtype=torch.int64),
        statistics.SUMS: torch.zeros(len(position), features, dtype=torch.int64),
        statistics.COUNTS: torch.zeros(len(position), dtype=torch.int64),
    }
    for cell in banks.of_kind(bank, CellKind.ANALYTIC):
        index = torch.tensor([position[code] for code in cell.about.labels], dtype=torch.int64)
        for name in (statistics.SUMS, statistics.COUNTS):
            found[name].index_add_(0, index, cell.total.words[name].to(torch.int64))
    for cell in banks.of_kind(bank, CellKind.SCATTER):
        found[statistics.GRAM] += cell.total.words[statistics.GRAM]
    return found
