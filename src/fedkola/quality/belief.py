"""What should a record say, given all other records and the way labels go wrong? Noise without its
rate.

Scores of single records are turned into a belief about the label that is right, by Bayes' rule with
a table A of how a right label c is written as y (Dawid and Skene, 1979). A is learnt on the way,
from the beliefs themselves::

    P_i(c)  = softmax_c ( b f_-i(c) + k log q_-i(c) + v s_i(c) )      ridge, regions, label names
    t_ic    = P_i(c) A[c, y_i] / sum_c' P_i(c') A[c', y_i]            belief of record i
    A[c,y] <- ( sum_i t_ic [y_i = y] + a A_0[c,y] ) / ( sum_i t_ic + a )
    A_0     = ( checked[c,y] + m (1 - e) [c = y] + m e n_y / n ) / ( checked[c] + m )

f and q are the next refit of the ridge and of the regions to t instead of to the labels. checked
counts the records that a person has looked at: what each said (y) and what is right (c); e is the
share of them that was wrong. b, k and v are the grid point under which the checked labels are
likeliest. All of it is sums over sites. A belief is held in whole fifteenths, so that sums are of
integers.
"""

from collections.abc import Sequence
from itertools import product

import torch
from torch import Tensor

from fedkola.errors import DataError

UNIT = 15
RIDGE = (0.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0)
REGIONS = (0.0, 0.25, 0.5, 0.75, 1.0, 1.5)
NAMES = (0.0, 5.0, 10.0, 20.0)
GRID = tuple(product(RIDGE, REGIONS, NAMES))
PRIOR = 5.0
STRENGTH = 20.0
LEAST = 1e-6
WORST = -30.0


def blend(parts: Sequence[Tensor | None], weights: Sequence[float], known: Tensor) -> Tensor:
    """log P (n, C) float64 of the evidence ``parts``, each (n, C) or None where there is none.

    ``known`` (C,) are labels that somebody has a record of; the others get -inf.
    """
    given = [part for part in parts if part is not None]
    if not given or not bool(known.any()):
        raise DataError("no evidence, or no known label, was given; a scan needs one record")
    total = torch.zeros_like(given[0], dtype=torch.float64)
    for part, weight in zip(parts, weights, strict=True):
        if part is not None and weight:
            total = total + weight * part.to(torch.float64)
    return torch.log_softmax(total.masked_fill(~known, float("-inf")), dim=1)


def likelihoods(parts: Sequence[Tensor | None], rows: Tensor, known: Tensor) -> Tensor:
    """(len(GRID),) float64: log-likelihood of checked labels at every grid point; a site's addend.

    One record counts for no less than -30, so that none decides alone.
    """
    if not len(rows):
        return torch.zeros(len(GRID), dtype=torch.float64)
    found = [
        blend(parts, weights, known).gather(1, rows[:, None]).clamp(min=WORST).sum()
        for weights in GRID
    ]
    return torch.stack(found)


def chosen(summed: Tensor) -> tuple[float, float, float]:
    """The likeliest grid point; without checked records (all zeros) a plain one in the middle."""
    if not bool(summed.any()):
        return 8.0, 0.75, 0.0
    return GRID[int(summed.argmax())]


def believed(log_p: Tensor, table: Tensor, rows: Tensor) -> Tensor:
    """t (n, C) float64 of records that say ``rows``, under A (C, C)."""
    joint = log_p.exp() * (table.T[rows].to(torch.float64) + LEAST)
    total: Tensor = joint / joint.sum(1, keepdim=True)
    return total


def whole(belief: Tensor) -> Tensor:
    """A belief in fifteenths, (n, C) int64, each row of sum 15; largest remainders get the rest."""
    share = belief * UNIT
    low = share.floor()
    left = UNIT - low.sum(1).to(torch.int64)
    # At most 15 remainders are taken, so a full sort of thousands of labels is not needed.
    count = min(UNIT, belief.shape[1])
    places = (share - low).topk(count, dim=1).indices
    more = (torch.arange(count) < left[:, None]).to(torch.int64)
    return low.to(torch.int64).scatter_add_(1, places, more)


def first_table(checked: Tensor, counts: Tensor) -> Tensor:
    """A_0 (C, C) float64 from ``checked`` (C, C), right label by given one, and counts (C,)."""
    pairs = checked.to(torch.float64)
    num_labels = len(counts)
    wrong = float(pairs.sum() - pairs.diagonal().sum())
    share = (wrong + 0.5) / (float(pairs.sum()) + 1)
    usual = counts.to(torch.float64) / max(float(counts.sum()), 1.0)
    prior = torch.eye(num_labels, dtype=torch.float64) * (1 - share) + share * usual
    return (pairs + PRIOR * prior) / (pairs.sum(1, keepdim=True) + PRIOR)


def next_table(written: Tensor, first: Tensor) -> Tensor:
    """A (C, C) from ``written`` (C, C), summed beliefs in fifteenths by given label, and A_0."""
    seen = written.to(torch.float64) / UNIT
    return (seen + STRENGTH * first) / (seen.sum(1, keepdim=True) + STRENGTH)


def written(targets: Tensor, rows: Tensor) -> Tensor:
    """A site's addend to the next table: (C, C) int64, beliefs by the label that was given."""
    num_labels = targets.shape[1]
    by_given = torch.zeros(num_labels, num_labels, dtype=torch.int64)
    return by_given.index_add_(0, rows, targets).T.contiguous()


def nearest_names(z: Tensor, names: Tensor, owner: Tensor, *, num_labels: int) -> Tensor:
    """s (n, C) float64: the cosine of each record (n, d) to the nearest text of each label.

    ``names`` (m, d) are embeddings of what the catalogue says, ``owner`` (m,) whose text each is;
    a label without one gets -1.
    """
    if not len(z):
        return torch.zeros(0, num_labels, dtype=torch.float64)
    here = torch.nn.functional.normalize(z.to(torch.float64), dim=1)
    there = torch.nn.functional.normalize(names.to(torch.float64), dim=1)
    found = torch.full((len(z), num_labels), -1.0, dtype=torch.float64)
    return found.scatter_reduce_(1, owner.expand(len(z), -1), here @ there.T, reduce="amax")
