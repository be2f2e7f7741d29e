"""Calibration of a view on sums: its softmax temperature, and what counts as never seen.

Each site scores shortened records of its own under the published view, and the sums choose. Half of
the words of each record are dropped, as a clinician's wording is shorter than, and different from,
the official one; the full texts were trained on.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from fedkola.knowledge import bank as banks
from fedkola.knowledge import journal, router, views
from fedkola.knowledge.bank import Bank
from fedkola.knowledge.views import View
from fedkola.types import Catalogue, Cohort, Dataset

TEMPERATURES = tuple(0.01 * 10 ** (k / 6) for k in range(13))
UNKNOWN_BINS = 512
UNKNOWN_RANGE = (-4.0, 12.0)  # of the relative distance, in multiples of the width
CALIBRATION_RECORDS = 32


@dataclass(frozen=True, slots=True, kw_only=True)
class Calibration:
    """From sums over shortened records: softmax temperature, and what counts as never seen.

    ``unknown`` is the relative distance that 5 % of the sites' own records exceed.
    """

    temperature: float = 1.0
    unknown: float = float("1e30")
    records: int = 0


def audiences(
    bank: Bank, cohort: Cohort, *, k_min: int
) -> list[tuple[tuple[str, ...] | None, Cohort]]:
    """Held sets and the sites of the cohort that have them, at least ``k_min`` each.

    Fewer sites than that share what all of them may hold; sites that are still too few, or may hold
    no live cell, are not asked.
    """
    groups: dict[tuple[str, ...] | None, list[str]] = {}
    for site in cohort:
        groups.setdefault(banks.held(bank, site), []).append(site)
    if None in groups and len(groups) == 1:
        return [(None, cohort)]
    few = [held for held, sites in groups.items() if len(sites) < k_min]
    if few:
        every = tuple(module.id for module in bank.modules)
        rest = [site for held in few for site in groups.pop(held)]
        common = tuple(m for m in every if all(held is None or m in held for held in few))
        groups.setdefault(common, []).extend(rest)
    live = {cell.about.module for cell in bank.cells}
    return [
        (held, tuple(site for site in cohort if site in sites))
        for held, sites in groups.items()
        if len(sites) >= k_min and (held is None or live & set(held))
    ]


def chosen(likelihood: Tensor, histogram: Tensor, records: int, *, width: int) -> Calibration:
    """The calibration that summed likelihoods and distances of these records, not none, say."""
    low, high = UNKNOWN_RANGE
    exceeded = histogram.flip(0).cumsum(0).flip(0) > 0.05 * int(histogram.sum())
    edge = (int(exceeded.sum()) / UNKNOWN_BINS) * (high - low) + low
    return Calibration(
        temperature=TEMPERATURES[int(likelihood.argmax())], unknown=edge * width, records=records
    )


def scored(
    view: View, z: Tensor, labels: Sequence[str], catalogue: Catalogue, *, level: int
) -> tuple[Tensor, Tensor, int]:
    """Log-likelihood by temperature and histogram of distances of a site's records, at least one,
    under a view with a head; and how many of them have a node in it."""
    assert view.head is not None
    likelihood = torch.zeros(len(TEMPERATURES), dtype=torch.float64)
    histogram = torch.zeros(UNKNOWN_BINS, dtype=torch.int64)
    path = {label.code: label.path[level] for label in catalogue.labels}
    place = {node: i for i, node in enumerate(view.head.nodes[level])}
    rows = [i for i, code in enumerate(labels) if path[code] in place]
    truth = torch.tensor([place[path[labels[i]]] for i in rows], dtype=torch.int64)
    scores = views.scores(view.head, z[torch.tensor(rows, dtype=torch.int64)], level)
    for k, temperature in enumerate(TEMPERATURES):
        taken = torch.log_softmax(scores / temperature, 1)[torch.arange(len(rows)), truth]
        likelihood[k] = taken.clamp(min=-50).sum()
    if view.router:
        low, high = UNKNOWN_RANGE
        share = (router.unknown(view.router, z) / z.shape[1] - low) / (high - low)
        bins = (share * UNKNOWN_BINS).floor().clamp(0, UNKNOWN_BINS - 1).to(torch.int64)
        histogram = torch.bincount(bins, minlength=UNKNOWN_BINS)
    return likelihood, histogram, len(rows)


def shortened(store: Path, whole: Dataset, *, round: int, seed: int) -> Dataset:
    """Of what a site holds now (``whole``) and has summed, a few records with half their words."""
    summed = journal.used(store, before=round + 1)
    # Of what is held now: records under a removal must not even take a place in the draw.
    versions = zip(whole.records, whole.windows, strict=True)
    ids = sorted(record for record, window in versions if summed.get(record) == window)
    generator = torch.Generator().manual_seed(seed % 2**63)
    order = torch.randperm(len(ids), generator=generator)[:CALIBRATION_RECORDS]
    drawn = {ids[int(i)] for i in order}
    data = whole.take([i for i, record in enumerate(whole.records) if record in drawn])
    return replace(data, texts=tuple(_shorten(text, generator) for text in data.texts))


def _shorten(text: str, generator: torch.Generator) -> str:
    words = text.split()
    kept = max(1, math.ceil(len(words) / 2))
    order = sorted(torch.randperm(len(words), generator=generator)[:kept].tolist())
    return " ".join(words[i] for i in order)
