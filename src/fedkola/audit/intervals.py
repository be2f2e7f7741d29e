"""How sure a score is: 95 % intervals for what an attack measured.

- :func:`bootstrap`, over victim *updates*, since records of one update are not independent
  (Efron 1979, percentiles);
- :func:`auc_interval`, for one ranking of positives and negatives (DeLong, DeLong and
  Clarke-Pearson 1988; midranks after Sun and Xu 2014);
- :func:`rate_interval`, for hits among trials (Clopper and Pearson 1934), never below its coverage;
- :func:`tpr_at_fpr`, the share of positives found where few negatives are taken for one.

Scores are higher for what an attack calls positive. All raise DataError on no data or NaN.
"""

from collections.abc import Callable, Sequence
from statistics import NormalDist
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray
from scipy.special import betaincinv

from fedkola.audit.evidence import Measure
from fedkola.errors import DataError

LEVEL = 0.95
RESAMPLES = 2000

Floats = NDArray[np.float64]
T = TypeVar("T")


def bootstrap(
    updates: Sequence[T],
    statistic: Callable[[Sequence[T]], float],
    *,
    seed: int = 0,
    resamples: int = RESAMPLES,
    null: float | None = None,
) -> Measure:
    """``statistic`` of the updates, with percentiles over resamples of whole updates.

    One update gives an interval of no width, which says nothing: report such a score with the
    interval of its own kind instead.
    """
    _require(len(updates) > 0, "no update to resample")
    generator = np.random.default_rng(seed)
    drawn = generator.integers(0, len(updates), size=(resamples, len(updates)))
    values = [statistic([updates[i] for i in row]) for row in drawn]
    low, high = np.quantile(values, _tails())
    value = statistic(updates)
    return Measure(value=value, low=float(low), high=float(high), null=null)


def mean_interval(values: Sequence[float], *, seed: int = 0, null: float | None = None) -> Measure:
    """The mean of one value per update, bootstrapped over updates in one array."""
    seen = _scores(values)
    generator = np.random.default_rng(seed)
    means = seen[generator.integers(0, len(seen), size=(RESAMPLES, len(seen)))].mean(axis=1)
    low, high = np.quantile(means, _tails())
    return Measure(value=float(seen.mean()), low=float(low), high=float(high), null=null)


def auc(positive: Sequence[float], negative: Sequence[float]) -> float:
    """The chance that a positive scores above a negative; ties count half."""
    above, _ = _placements(_scores(positive), _scores(negative))
    return float(above.mean())


def auc_interval(
    positive: Sequence[float], negative: Sequence[float], *, null: float | None = None
) -> Measure:
    """Area under the curve with its DeLong interval, cut to [0, 1].

    Where every pair is in order the estimated variance is zero; then the bound is that of the
    min(m, n) disjoint pairs, all in order: independent trials of chance AUC. With a single
    positive or negative there is no variance either, and the interval is [0, 1].
    """
    first, second = _scores(positive), _scores(negative)
    above, below = _placements(first, second)
    value = float(above.mean())
    pairs = min(len(first), len(second))
    if value in (0.0, 1.0):
        exact = rate_interval(pairs if value else 0, pairs)
        return Measure(value=value, low=exact.low, high=exact.high, null=null)
    if pairs < 2:
        return Measure(value=value, low=0.0, high=1.0, null=null)
    variance = above.var(ddof=1) / len(above) + below.var(ddof=1) / len(below)
    wide = NormalDist().inv_cdf((1 + LEVEL) / 2) * float(np.sqrt(variance))
    return Measure(value=value, low=max(0.0, value - wide), high=min(1.0, value + wide), null=null)


def rate_interval(hits: int, trials: int, *, null: float | None = None) -> Measure:
    """``hits / trials`` with its exact two-sided interval."""
    _require(0 <= hits <= trials and trials > 0, f"{hits} hits of {trials} trials")
    tail, rest = _tails()
    low = float(betaincinv(hits, trials - hits + 1, tail)) if hits else 0.0
    high = float(betaincinv(hits + 1, trials - hits, rest)) if hits < trials else 1.0
    return Measure(value=hits / trials, low=low, high=high, null=null)


def tpr_at_fpr(
    positive: Sequence[float],
    negative: Sequence[float],
    *,
    fpr: float = 0.01,
    null: float | None = None,
) -> Measure:
    """Share of positives above a threshold that at most ``fpr`` of the negatives pass.

    The interval is Clopper-Pearson's over the positives, the threshold taken as given; with fewer
    than 1 / fpr negatives the threshold is their largest score.
    """
    first, second = _scores(positive), np.sort(_scores(negative))[::-1]
    threshold = second[int(fpr * len(second))] if fpr * len(second) < len(second) else -np.inf
    return rate_interval(int((first > threshold).sum()), len(first), null=null)


def _placements(positive: Floats, negative: Floats) -> tuple[Floats, Floats]:
    """For each positive the share of negatives below it, for each negative of positives above."""

    def share_below(values: Floats, others: Floats) -> Floats:
        there = np.sort(others)
        under = np.searchsorted(there, values, side="left")
        upto = np.searchsorted(there, values, side="right")
        return (under + upto) / (2.0 * len(there))

    return share_below(positive, negative), 1.0 - share_below(negative, positive)


def _scores(values: Sequence[float]) -> Floats:
    found = np.asarray(values, dtype=np.float64)
    _require(found.size > 0, "no scores")
    _require(not np.isnan(found).any(), f"{int(np.isnan(found).sum())} scores that are NaN")
    return found


def _tails() -> tuple[float, float]:
    return (1 - LEVEL) / 2, (1 + LEVEL) / 2


def _require(holds: bool, given: str) -> None:
    if not holds:
        raise DataError(f"an interval was asked for {given}; give at least one finite score")
