"""Metrics of a stream from R[t, k]: accuracy after window t on scope k (dynamic-knowledge metrics).

R is a list of rows, one per window, with None before a scope has arrived.
"""

from collections.abc import Iterable, Mapping, Sequence
from statistics import fmean, stdev

import numpy as np

Matrix = Sequence[Sequence[float | None]]


def forgetting(r: Matrix) -> float:
    """F = mean_k ( max_t R[t, k] - R[T, k] ): falls also because the question gets harder."""
    return _mean(max(seen) - seen[-1] for seen in _columns(r))


def backward_transfer(r: Matrix) -> float:
    """BWT = mean_k ( R[T, k] - R[t_k, k] ), t_k the window in which scope k arrived."""
    return _mean(seen[-1] - seen[0] for seen in _columns(r))


def plasticity(r: Matrix) -> float:
    """mean_k R[t_k, k]: how well a scope is known in the window in which it arrives."""
    return _mean(seen[0] for seen in _columns(r))


def excess_forgetting(r: Matrix, joint: Sequence[float | None]) -> float:
    """mean_k ( J[T, k] - R[T, k] ): what the same model class trained jointly would have kept."""
    last = r[-1]
    pairs = zip(joint, last, strict=True)
    return _mean(j - now for j, now in pairs if j is not None and now is not None)


def stream_average(r: Matrix) -> float:
    """Mean over windows of the mean over the scopes that have arrived."""
    return _mean(_mean(x for x in row if x is not None) for row in r)


def freshness_lag(r: Matrix) -> list[float | None]:
    """Windows from first arrival until R >= 0.9 R[T, k], per scope; None if it never arrived."""
    lags: list[float | None] = []
    for k in range(len(r[0])):
        seen = [row[k] for row in r if row[k] is not None]
        if not seen:
            lags.append(None)
            continue
        values = [x for x in seen if x is not None]
        lags.append(float(next(t for t, x in enumerate(values) if x >= 0.9 * values[-1])))
    return lags


def interval(values: Sequence[float], *, seed: int = 0, draws: int = 2000) -> dict[str, float]:
    """Mean over seeds with a 95 % bootstrap interval and the standard deviation."""
    if len(values) == 1:
        return {"mean": values[0], "low": values[0], "high": values[0], "sd": 0.0, "n": 1}
    generator = np.random.default_rng(seed)
    means = generator.choice(np.array(values), size=(draws, len(values))).mean(axis=1)
    low, high = np.quantile(means, [0.025, 0.975])
    return {
        "mean": fmean(values),
        "low": float(low),
        "high": float(high),
        "sd": stdev(values),
        "n": len(values),
    }


def matrix(
    rounds: Sequence[Mapping[str, float]], scopes: Sequence[str]
) -> list[list[float | None]]:
    """R from the ``right/SCOPE`` and ``asked/SCOPE`` metrics of every round."""
    found: list[list[float | None]] = []
    for metrics in rounds:
        row: list[float | None] = []
        for scope in scopes:
            asked = metrics.get(f"asked/{scope}", 0)
            row.append(metrics[f"right/{scope}"] / asked if asked else None)
        found.append(row)
    return found


def _columns(r: Matrix) -> list[list[float]]:
    columns = [[row[k] for row in r if row[k] is not None] for k in range(len(r[0]))]
    return [[x for x in column if x is not None] for column in columns if column]


def _mean(values: Iterable[float]) -> float:
    found = list(values)
    return fmean(found) if found else 0.0
