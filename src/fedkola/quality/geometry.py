"""Does a record's neighbourhood say its label? Counts of all sites by region, itself left out.

A public codebook of R unit vectors mu_r cuts the space of embeddings into regions. With z_i
centred and of unit length, and w_i in {0, 1}::

    gamma_ir = softmax over the 8 nearest r of kappa mu_r' z_i, in integers of sum 256
    N[c,r]   = sum_i w_i gamma_ir [y_i = c]
    q_i[c]   = sum_r gamma_ir (N[c,r] - w_i gamma_ir [y_i = c] + 128 / C)
                             / (sum_c N[c,r] - w_i gamma_ir + 128)        divided by 256
    a_i      = q_i[y_i] / max_c q_i[c]

a_i is 1 where the regions around a record say what it says. N is a sum of integers over sites, and
no record is part of what it is judged by. The mixture of directions is that of FedRG (CVPR 2026,
arXiv 2603.19722); its statistics as sums, with one record left out, are ours.
"""

import torch
from torch import Tensor

from fedkola.errors import DataError

PARTS = 256
NEAREST = 8
KAPPA = 20.0
SMOOTHING = 128
CHUNK = 4096


def directions(z: Tensor, centre: Tensor) -> Tensor:
    """Embeddings (n, d) about a public ``centre`` (d,), float32 of unit length; zeros stay."""
    return torch.nn.functional.normalize(z.to(torch.float32) - centre.to(torch.float32), dim=1)


def assign(z: Tensor, codebook: Tensor, *, kappa: float = KAPPA) -> tuple[Tensor, Tensor]:
    """gamma (n, k) int64, each row of sum 256, and the regions (n, k) it is of, nearest first.

    ``z`` (n, d) and ``codebook`` (R, d) hold unit rows; k = min(8, R). Largest remainders get what
    rounding leaves, so that a row does not depend on other rows.
    """
    if not len(codebook):
        raise DataError("a codebook without regions was given; give at least one unit vector")
    parts, regions = [], []
    for part in torch.split(z, CHUNK):
        near, where = (part @ codebook.T).topk(min(NEAREST, len(codebook)), dim=1)
        share = torch.softmax(kappa * near.to(torch.float64), dim=1) * PARTS
        whole = share.floor()
        left = PARTS - whole.sum(1).to(torch.int64)
        rank = (share - whole).argsort(dim=1, descending=True, stable=True).argsort(dim=1)
        parts.append(whole.to(torch.int64) + (rank < left[:, None]))
        regions.append(where)
    if not parts:
        k = min(NEAREST, len(codebook))
        return torch.zeros(0, k, dtype=torch.int64), torch.zeros(0, k, dtype=torch.int64)
    return torch.cat(parts), torch.cat(regions)


def counts(gamma: Tensor, regions: Tensor, targets: Tensor, *, size: int) -> Tensor:
    """The addend of one site: N (C, size) int64 of its records.

    ``targets`` (n, C) int64 is how much of each label a record counts for: a one-hot row of 0 and 1
    while labels are taken as they are given.
    """
    total = torch.zeros(size, targets.shape[1], dtype=torch.int64)
    for k in range(regions.shape[1]):
        total.index_add_(0, regions[:, k], gamma[:, k : k + 1] * targets)
    return total.T.contiguous()


def agreement(
    total: Tensor, gamma: Tensor, regions: Tensor, rows: Tensor, targets: Tensor
) -> Tensor:
    """a_i (n,) float64 in [0, 1] of records with labels ``rows`` under the summed ``total`` (C, R).

    ``targets`` are those with which each record entered the sum, zeros for one that did not.
    """
    q = label_map(total, gamma, regions, targets)
    return q.gather(1, rows[:, None])[:, 0] / q.max(dim=1).values


def label_map(
    total: Tensor, gamma: Tensor, regions: Tensor, targets: Tensor, *, unit: int = 1
) -> Tensor:
    """q (n, C) float64: what the regions around each record say without it; rows sum to 1.

    ``unit`` is what the targets of one record sum to.
    """
    num_labels = total.shape[0]
    by_region = total.T.to(torch.float64)
    all_labels = by_region.sum(1)
    own = targets.to(torch.float64)
    smoothing = SMOOTHING * unit
    q = torch.zeros(len(gamma), num_labels, dtype=torch.float64)
    for k in range(regions.shape[1]):
        share = gamma[:, k : k + 1].to(torch.float64)
        seen = by_region[regions[:, k]] - share * own + smoothing / num_labels
        rest = all_labels[regions[:, k]][:, None] - share * own.sum(1, keepdim=True)
        q += share * seen / (rest + smoothing)
    return q / PARTS


def moved(codebook: Tensor, z: Tensor) -> tuple[Tensor, Tensor]:
    """One site's addend to a step of spherical k-means: sums (R, d) of round(2^10 z), and counts.

    Each unit row of ``z`` goes to its nearest region.
    """
    nearest = torch.cat(
        [(part @ codebook.T).argmax(1) for part in torch.split(z, CHUNK)]
        or [torch.zeros(0, dtype=torch.int64)]
    )
    whole = torch.round(z.double() * 1024).to(torch.int64)
    sums = torch.zeros(codebook.shape, dtype=torch.int64).index_add_(0, nearest, whole)
    return sums, torch.bincount(nearest, minlength=len(codebook))


def settled(codebook: Tensor, sums: Tensor) -> Tensor:
    """The codebook after a step: directions of the sums; a region nobody is in stays."""
    moved_to = torch.nn.functional.normalize(sums.to(torch.float32), dim=1)
    return torch.where((sums != 0).any(1, keepdim=True), moved_to, codebook)
