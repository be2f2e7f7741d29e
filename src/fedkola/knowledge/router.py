"""Which modules an input belongs to, and whether the knowledge to answer it is there at all.

From summed moments of the integer embeddings (n, sum z, sum z z^T, and sum z by label)::

    p(m|x)      = softmax over all modules of ( -T_m(x) / (2 tau) + log n_m / n )
    coverage(x) = sum of p(m|x) over the modules that the site holds
    unknown(x)  = min_c (x - mu_c)' S_w^-1 (x - mu_c)  -  (x - mu)' S_t^-1 (x - mu)

T_m is the Mahalanobis distance to the module's mean under the pooled within-module covariance;
``unknown`` is the relative Mahalanobis distance of Ren et al. (2021) over label means.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fedkola.knowledge.statistics import COUNTS, GRAM, SUMS, unpack

RIDGE = 1e-2


@dataclass(frozen=True, slots=True, kw_only=True)
class Router:
    """Means and precisions in units of the embedding (z / 1024), float32.

    ``means`` (M, d) by module, ``label_means`` (C, d), ``within``, ``by_label`` and ``background``
    (d, d) are inverse covariances, ``centre`` (d,) is the overall mean.
    """

    modules: tuple[str, ...]
    log_prior: Tensor
    means: Tensor
    label_means: Tensor
    centre: Tensor
    within: Tensor
    by_label: Tensor
    background: Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """One router cell as it enters a view: its integers by label row, and its weight."""

    module: str
    labels: Sequence[str]
    words: Mapping[str, Tensor]
    weight: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Moments:
    """Sums over router cells in units of the embedding (z / 1024), float64.

    ``count`` (M,) and ``sums`` (M, d) by module, ``moment`` (d, d) of e e^T over all of them.
    """

    modules: tuple[str, ...]
    count: Tensor
    sums: Tensor
    moment: Tensor

    def means(self) -> Tensor:
        """(M, d)."""
        return self.sums / self.count[:, None]

    def within(self) -> Tensor:
        """The pooled covariance (d, d) of records around the mean of their module."""
        means, share = self.means(), self.count / self.count.sum()
        return self.moment / self.count.sum() - (means.T * share) @ means


def moments(parts: Sequence[Part], *, width: int) -> Moments:
    """Weighted sums by module. Cells of one module add up, in the order of first appearance."""
    modules = tuple(dict.fromkeys(part.module for part in parts))
    count = torch.zeros(len(modules), dtype=torch.float64)
    sums = torch.zeros(len(modules), width, dtype=torch.float64)
    moment = torch.zeros(width, width, dtype=torch.float64)
    for part in parts:
        words, weight, row = part.words, part.weight, modules.index(part.module)
        count[row] += weight * float(words[COUNTS].sum())
        sums[row] += weight * words[SUMS].sum(0).to(torch.float64) / 1024
        moment += weight * unpack(words[GRAM], width).to(torch.float64) / 1024**2
    return Moments(modules=modules, count=count, sums=sums, moment=moment)


def build(parts: Sequence[Part], *, width: int) -> Router:
    """A router from the sums of router cells. A label that filled rows of several cells has one
    mean, so that a stream of windows gives what one shot would."""
    rows = [torch.nonzero(part.words[COUNTS]).flatten() for part in parts]
    filled = [[p.labels[i] for i in kept.tolist()] for p, kept in zip(parts, rows, strict=True)]
    place = {code: i for i, code in enumerate(sorted({code for some in filled for code in some}))}
    whole = moments(parts, width=width)
    label_counts = torch.zeros(len(place), dtype=torch.float64)
    label_sums = torch.zeros(len(place), width, dtype=torch.float64)
    for part, kept, codes in zip(parts, rows, filled, strict=True):
        index = torch.tensor([place[code] for code in codes], dtype=torch.int64)
        count, sums = part.words[COUNTS][kept], part.words[SUMS][kept].to(torch.float64)
        label_counts.index_add_(0, index, part.weight * count.to(torch.float64))
        label_sums.index_add_(0, index, part.weight * sums / 1024)
    label_means = label_sums / label_counts[:, None]
    total = whole.count.sum()
    centre = whole.sums.sum(0) / total
    second = whole.moment / total
    return Router(
        modules=whole.modules,
        log_prior=(whole.count / total).log().to(torch.float32),
        means=whole.means().to(torch.float32),
        label_means=label_means.to(torch.float32),
        centre=centre.to(torch.float32),
        within=precision(whole.within()).to(torch.float32),
        by_label=precision(second - (label_means.T * (label_counts / total)) @ label_means).to(
            torch.float32
        ),
        background=precision(second - torch.outer(centre, centre)).to(torch.float32),
    )


def posterior(router: Router, z: Tensor, *, tau: float) -> Tensor:
    """p(m|x) of shape (n, M) for integer embeddings z (n, d)."""
    distance = _mahalanobis(z.to(torch.float32) / 1024, router.means, router.within)
    return torch.softmax(-distance / (2 * tau) + router.log_prior, dim=1)


def coverage(router: Router, z: Tensor, *, held: Sequence[str] | None, tau: float) -> Tensor:
    """Share of the posterior that falls on held modules, (n,); 1 when everything is held."""
    p = posterior(router, z, tau=tau)
    if held is None:
        return p.sum(1)
    kept = torch.tensor([module in held for module in router.modules])
    return p[:, kept].sum(1)


def gates(p: Tensor, *, top_k: int) -> Tensor:
    """Top-K of the posterior, renormalised; zeros elsewhere. Shape (n, M)."""
    best = p.topk(min(top_k, p.shape[1]), dim=1)
    gate = torch.zeros_like(p).scatter_(1, best.indices, best.values)
    return gate / gate.sum(1, keepdim=True)


def unknown(router: Router, z: Tensor) -> Tensor:
    """Relative Mahalanobis distance to the nearest label mean, (n,); large means never seen."""
    e = z.to(torch.float32) / 1024
    nearest = _mahalanobis(e, router.label_means, router.by_label).amin(1)
    return nearest - _mahalanobis(e, router.centre[None], router.background)[:, 0]


def precision(covariance: Tensor) -> Tensor:
    """The inverse of a covariance (d, d) with a ridge of 1 % of its mean variance, float64."""
    ridge = RIDGE * covariance.diagonal().mean().clamp(min=1e-12)
    whole = covariance + ridge * torch.eye(len(covariance), dtype=covariance.dtype)
    inverse: Tensor = torch.linalg.inv((whole + whole.T) / 2)
    return inverse


def _mahalanobis(e: Tensor, means: Tensor, precision: Tensor) -> Tensor:
    """Squared distances of shape (n, M)."""
    projected = e @ precision
    cross = projected @ means.T
    own = ((means @ precision) * means).sum(1)
    return (projected * e).sum(1, keepdim=True) - 2 * cross + own
