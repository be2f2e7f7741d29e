"""Passes over updates that are too many to copy: squared distances, combinations, sorted columns.

Rows are updates, columns their numbers in the order of the tensors' names. A pass goes through all
rows in chunks of columns, in float64, and keeps nothing of a chunk: memory does not grow with the
number of columns, rows are only read, and may lie in a file that is mapped.
"""

from collections.abc import Callable, Iterator, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fedkola.types import Weights

Array = NDArray[np.float64]
Row = Weights | None
"""An update; None stands for one of zeros."""

COLUMNS = 1 << 18
# float64 numbers of a chunk: 4 MB, which a core's cache holds. Chunks of 2^18 columns of 32 rows,
# 67 MB, take 3.6 times as long.
NUMBERS = 1 << 19


def chunks(rows: Sequence[Row]) -> Iterator[tuple[str, int, Array]]:
    """(name, first column in the flat tensor, chunk (m, w)); the chunk is overwritten by the next.

    Rows have the same names and shapes, and one at least is no None.
    """
    known = next(row for row in rows if row is not None)
    width = max(1, min(COLUMNS, NUMBERS // len(rows)))
    longest = max((value.numel() for value in known.values()), default=0)
    buffer = torch.zeros(len(rows), min(width, longest), dtype=torch.float64)
    for name in sorted(known):
        flat = [None if row is None else row[name].reshape(-1) for row in rows]
        for start in range(0, known[name].numel(), width):
            chunk = buffer[:, : min(width, known[name].numel() - start)]
            for target, row in zip(chunk, flat, strict=True):
                if row is None:
                    target.zero_()
                else:
                    target.copy_(row[start : start + chunk.shape[1]])
            yield name, start, chunk.numpy()


def distances(
    rows: Sequence[Row], *, samples: int = 0, share: float = 1.0, seed: int = 0
) -> tuple[Array, NDArray[np.bool_]]:
    """Squared distances between rows, (1, m, m), and which rows are finite, (m,).

    With ``samples`` their number comes first, (samples, m, m), each over another ``share`` of the
    columns, drawn by ``seed``. What is said of a row that is not finite, or whose squares leave
    float64, means nothing; all else is as if it were not there.
    """
    m = len(rows)
    products = np.zeros((max(samples, 1), m, m))
    finite = np.ones(m, dtype=np.bool_)
    draws = [np.random.PCG64([seed, i]) for i in range(samples)]
    with np.errstate(over="ignore", invalid="ignore"):
        for _, _, chunk in chunks(rows):
            squares = np.einsum("ij,ij->i", chunk, chunk)
            bad = ~np.isfinite(squares)
            finite &= ~bad
            chunk[bad] = 0.0
            # Distances do not change when all rows are moved alike, but lose fewer digits near 0.
            # The row of median norm is near the others even where some are far away.
            chunk -= chunk[np.argsort(squares + np.where(bad, np.inf, 0.0))[finite.sum() // 2]]
            if not samples:
                products[0] += chunk @ chunk.T
            for i, bits in enumerate(draws):
                drawn = chunk[:, _sample(bits, chunk.shape[1], share)]
                products[i] += drawn @ drawn.T
    norms = np.einsum("sii->si", products)
    return np.maximum(norms[:, :, None] + norms[:, None, :] - 2.0 * products, 0.0), finite


def finite(rows: Sequence[Row]) -> NDArray[np.bool_]:
    """Which rows hold neither NaN nor infinity, (m,)."""
    found = np.ones(len(rows), dtype=np.bool_)
    with np.errstate(over="ignore", invalid="ignore"):
        for _, _, chunk in chunks(rows):
            found &= np.isfinite(chunk.sum(axis=1))
    return found


def combine(rows: Sequence[Row], coefficients: Sequence[float]) -> dict[str, Tensor]:
    """sum_i coefficients_i rows_i; rows with coefficient 0 are not read."""
    read = [(row, c) for row, c in zip(rows, coefficients, strict=True) if row is not None and c]
    weights = np.array([c for _, c in read])
    return _each([row for row, _ in read] or [_known(rows)], lambda x: weights @ x[: len(weights)])


def columns(
    rows: Sequence[Row], of: Callable[[Array], Array], *, mixing: Array | None = None
) -> dict[str, Tensor]:
    """``of`` (w, m) -> (w,) of every column, or of those of ``mixing`` (k, m) times the rows."""
    if mixing is None:
        return _each(rows, lambda x: of(x.T.copy()))
    return _each(rows, lambda x: of((mixing @ x).T.copy()))


def _each(rows: Sequence[Row], of: Callable[[Array], Array]) -> dict[str, Tensor]:
    """A tensor per name, of the rows' own type; integers become float64."""
    out = {
        name: torch.zeros(
            value.shape, dtype=value.dtype if value.is_floating_point() else torch.float64
        )
        for name, value in _known(rows).items()
    }
    for name, start, chunk in chunks(rows):
        found = torch.from_numpy(of(chunk))
        out[name].view(-1)[start : start + chunk.shape[1]] = found
    return out


def _known(rows: Sequence[Row]) -> Weights:
    return next(row for row in rows if row is not None)


def _sample(bits: np.random.PCG64, width: int, share: float) -> NDArray[np.intp]:
    """Columns without repetition, at least one, in order. Raw bits: numpy promises that these stay
    the same from version to version."""
    size = max(1, round(share * width))
    return np.sort(np.argsort(bits.random_raw(width), kind="stable")[:size])
