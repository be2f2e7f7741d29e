"""Whether a window of records is new, fits what is known, or contradicts it.

A window has n records with mean embedding m; module k has the mean mu_k of its n_k records. With
S the pooled covariance within modules (ridge included in the inverse) and d_eff = tr(S^-1 S)::

    T_k  = (m - mu_k)' S^-1 (m - mu_k)
    E_k  = d_eff (1/n + 1/n_k)                                   what sampling alone gives
    b[s] = mean of T - E over accepted windows of size s = floor(log4 n)      between windows
    k*   = argmin (T_k - E_k);       the window fits iff T_k* <= kappa (E_k* + b[s])

b is needed because a window of a real site is no random sample of its module, and is one number
per size, since one per module makes modules incomparable. kappa is the 99 % quantile of T/(E + b)
over accepted windows. A window contradicts its module if far fewer of its labels than usual agree
with the published view. Everything here is a function of router cells and of sums of votes, so
what a removal subtracts leaves no trace in later decisions.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from fedkola.errors import KnowledgeError
from fedkola.knowledge import router
from fedkola.knowledge.router import Part
from fedkola.knowledge.statistics import signs

SIZES = 10
"""Sizes s of windows: 1-3, 4-15, 16-63, ... records; the last one has no end."""
BINS = 32
BIN_WIDTH = 0.25
KAPPA = 2.0
KAPPA_WINDOWS = 50
KAPPA_SHARE = 0.99
ACCEPTED_MIN = 8
YOUNG_MIN = 3
BUCKETS = 64
_HYPERPLANES = 6

EXCESS = "window_excess"
WINDOWS = "window_count"
HISTOGRAM = "window_ratio"
EXCESS_BITS = 12
"""Fractional bits of the summed excess: 0.0002 apart, up to 524,288 over a cohort at 32 bits."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Reference:
    """Live modules as the window test sees them, in units of the embedding (z / 1024), float64.

    ``counts`` (M,), ``means`` (M, d), ``precision`` (d, d) the inverse of the ridged covariance
    within modules, ``effective`` its effective dimension d_eff.
    """

    modules: tuple[str, ...]
    counts: Tensor
    means: Tensor
    precision: Tensor
    effective: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Thresholds:
    """What accepted windows have taught: per size their summed excess (SIZES,) and number
    (SIZES,), and the multiple ``kappa`` of the expected distance that still fits."""

    excess: Tensor = field(default_factory=lambda: torch.zeros(SIZES, dtype=torch.float64))
    windows: Tensor = field(default_factory=lambda: torch.zeros(SIZES, dtype=torch.int64))
    kappa: float = KAPPA


@dataclass(frozen=True, slots=True, kw_only=True)
class Distance:
    """One window against one module: T, and the expectation E of sampling alone."""

    module: str
    records: int
    observed: float
    sampling: float

    @property
    def excess(self) -> float:
        return self.observed - self.sampling


# --- the window test ------------------------------------------------------------------------------


def reference(parts: Sequence[Part], *, width: int) -> Reference:
    """Means and the pooled covariance of the modules of router cells.

    Raises KnowledgeError without any cell: nothing is known that a window could be compared with.
    """
    if not parts:
        raise KnowledgeError(
            "the window test was asked for without a router cell; add the lane router to "
            "knowledge.lanes, or ask after the first module has opened"
        )
    whole = router.moments(parts, width=width)
    within = whole.within()
    precision = router.precision(within)
    return Reference(
        modules=whole.modules,
        counts=whole.count,
        means=whole.means(),
        precision=precision,
        effective=float((precision * within).sum()),
    )


def size(records: int) -> int:
    """The size s = floor(log4 n) of a window of at least one record, capped at the last one."""
    return min((records.bit_length() - 1) // 2, SIZES - 1)


def distances(known: Reference, z: Tensor) -> tuple[Distance, ...]:
    """A window of integer embeddings z (n, d), n >= 1, against every module."""
    gap = z.to(torch.float64).mean(0) / 1024 - known.means
    observed = ((gap @ known.precision) * gap).sum(1)
    return tuple(
        Distance(
            module=module,
            records=len(z),
            observed=float(observed[k]),
            sampling=known.effective * (1 / len(z) + 1 / float(known.counts[k])),
        )
        for k, module in enumerate(known.modules)
    )


def nearest(found: Sequence[Distance]) -> Distance:
    """The module with the least excess; raises ValueError if there is none."""
    return min(found, key=lambda distance: distance.excess)


def accepted(known: Reference, module: str, z: Tensor) -> Distance | None:
    """A window that is already part of a module, against the module without it.

    None if nothing of the module remains.
    """
    k = known.modules.index(module)
    rest = float(known.counts[k]) - len(z)
    if rest < 1:
        return None
    mean = z.to(torch.float64).mean(0) / 1024
    gap = (mean - known.means[k]) * (float(known.counts[k]) / rest)
    return Distance(
        module=module,
        records=len(z),
        observed=float(gap @ known.precision @ gap),
        sampling=known.effective * (1 / len(z) + 1 / rest),
    )


def between(learnt: Thresholds, records: int) -> float:
    """b for a window of this many records; that of all sizes together where its own size has
    fewer than eight accepted windows, and 0 where no window has been accepted at all."""
    s = size(records)
    windows, excess = int(learnt.windows[s]), float(learnt.excess[s])
    if windows < ACCEPTED_MIN:
        windows, excess = int(learnt.windows.sum()), float(learnt.excess.sum())
    return max(0.0, excess / windows) if windows else 0.0


def limit(learnt: Thresholds, distance: Distance) -> float:
    """The largest T at which a window of this size still fits."""
    return learnt.kappa * (distance.sampling + between(learnt, distance.records))


def fits(learnt: Thresholds, distance: Distance) -> bool:
    return distance.observed <= limit(learnt, distance)


def discoverable(learnt: Thresholds, distance: Distance, *, floor: int) -> bool:
    """Whether a window that does not fit its nearest module may be called new; it waits if not.

    It needs ``floor`` records. Between three and eight accepted windows, when b is uncertain, it
    must lie beyond twice the limit; with fewer there is nothing to judge by.
    """
    windows = int(learnt.windows.sum())
    if distance.records < floor or windows < YOUNG_MIN:
        return False
    return windows >= ACCEPTED_MIN or distance.observed > 2 * limit(learnt, distance)


# --- what is learnt, from sums --------------------------------------------------------------------


def tally(windows: Sequence[Distance], learnt: Thresholds) -> dict[str, Tensor]:
    """One site's accepted windows as addends: excess and number by size, histogram of T/(E + b).

    The last bin of the histogram holds everything beyond it.
    """
    excess = torch.zeros(SIZES, dtype=torch.float64)
    number = torch.zeros(SIZES, dtype=torch.int64)
    ratio = torch.zeros(BINS, dtype=torch.int64)
    for window in windows:
        s = size(window.records)
        excess[s] += window.excess
        number[s] += 1
        expected = window.sampling + between(learnt, window.records)
        ratio[min(int(window.observed / expected / BIN_WIDTH), BINS - 1)] += 1
    return {EXCESS: excess, WINDOWS: number, HISTOGRAM: ratio}


def learn(sums: Mapping[str, Tensor]) -> Thresholds:
    """Thresholds from the summed addends of :func:`tally`; ``sums[EXCESS]`` in real units."""
    return Thresholds(
        excess=sums[EXCESS].to(torch.float64),
        windows=sums[WINDOWS].to(torch.int64),
        kappa=quantile(sums[HISTOGRAM]),
    )


def quantile(ratio: Tensor) -> float:
    """kappa: the upper edge of the bin that 99 % of accepted windows do not exceed; 2 until there
    are fifty of them."""
    windows = int(ratio.sum())
    if windows < KAPPA_WINDOWS:
        return KAPPA
    within = ratio.cumsum(0) >= KAPPA_SHARE * windows
    return (int(within.to(torch.int64).argmax()) + 1) * BIN_WIDTH


# --- where undeclared novelty is counted ----------------------------------------------------------


def sketch(known: Reference, z: Tensor, *, seed: int) -> int:
    """The bucket of a window that fits nothing: on which sides of six public hyperplanes its
    whitened mean lies. Equal knowledge can fall to two sides of one; another ``seed`` (the round)
    draws other hyperplanes, so that it meets in one bucket some rounds later."""
    centre = (known.counts / known.counts.sum()) @ known.means
    gap = z.to(torch.float64).mean(0) / 1024 - centre
    whitened = torch.linalg.cholesky(known.precision).T @ gap
    sides = whitened @ signs(len(gap), _HYPERPLANES, seed).to(torch.float64) > 0
    return sum(1 << i for i, side in enumerate(sides.tolist()) if side)


# --- conflict -------------------------------------------------------------------------------------


def contradicts(right: int, asked: int, usual: float) -> bool:
    """Whether a window's labels disagree with a view that usually agrees with a share ``usual``.

    At least 30 records of a module with ``usual`` >= 0.5; less than half of the usual share; and
    so few by chance with a probability below 1e-3 only.
    """
    return (
        asked >= 30
        and usual >= 0.5
        and right < asked * usual / 2
        and at_most(right, asked, usual) < 1e-3
    )


def at_most(right: int, asked: int, share: float) -> float:
    """P[Bin(asked, share) <= right], for a share strictly between 0 and 1; 1 otherwise unless no
    draw could be that low."""
    if share >= 1.0:
        return 1.0 if right >= asked else 0.0
    if share <= 0.0:
        return 1.0
    logs = [
        math.lgamma(asked + 1)
        - math.lgamma(k + 1)
        - math.lgamma(asked - k + 1)
        + k * math.log(share)
        + (asked - k) * math.log1p(-share)
        for k in range(min(right, asked) + 1)
    ]
    return min(1.0, math.fsum(math.exp(value) for value in logs))


def doubtful(
    wrong: Tensor, asked: Tensor, holders: Tensor, *, k_min: int, records: int = 16
) -> Tensor:
    """Labels (C,) bool whose meaning may have changed: more than half of the records that at
    least ``k_min`` holders brought disagree with the view. Their owners decide."""
    return (holders >= k_min) & (asked >= records) & (2 * wrong > asked)
