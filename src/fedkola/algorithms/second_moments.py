"""Second moments of AdamW that sites share by the means of their rows and columns.

Sites with different texts scale the same gradient differently, so that the mean of their steps is
no step of AdamW on the mean of their losses. After an exchange each site brings its second moments
v of a matrix to the level of all: v <- v * (r c^T / |r|) / (r_k c_k^T / |r_k|), where r and c are
the means of the rows and of the columns over all sites, r_k and c_k its own (the factors of
Adafactor; Shazeer & Stern, ICML 2018). Moments are corrected for their start at zero first. A
matrix of m x n costs m + n numbers instead of m n; vectors stay as they are.

What is shared is a sum over sites like every answer. It tells which rows of an embedding had
gradients, as the change of the weights does.
"""

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from fedkola.training.whole import COUNT, SECOND
from fedkola.types import Weights

FRACTION = 44  # a mean of squares counts in 2^-44: gradients are clipped, so none reaches 2^4
_LARGEST = 2**48 - 1
_LEAST = 1e-30


def matrices(weights: Weights) -> list[str]:
    """Names of the tensors whose moments are shared, in order."""
    return sorted(name for name, value in weights.items() if value.dim() == 2)


def counted(moments: Weights, names: Sequence[str], beta2: float, weight: float) -> Tensor:
    """Means of all rows, then of all columns, matrix by matrix, times ``weight``: int64 in 2^-44.

    (sum of m + n over the matrices,). Matrices without moments count as zero.
    """
    level = _level(moments, beta2)
    parts = [torch.cat(_means(moments[SECOND + name])) / level for name in names]
    whole = torch.round(torch.cat(parts).double() * (weight * 2.0**FRACTION))
    return whole.clamp(0, _LARGEST).to(torch.int64)


def pulled(
    moments: Weights, names: Sequence[str], beta2: float, shared: Tensor
) -> dict[str, Tensor]:
    """``moments`` with second moments at the level of ``shared``, laid out as by ``counted``."""
    found, level, place = dict(moments), _level(moments, beta2), 0
    for name in names:
        own = moments[SECOND + name]
        rows, columns = own.shape
        target = shared[place : place + rows], shared[place + rows : place + rows + columns]
        place += rows + columns
        rise = _outer(*target) / _outer(*(part / level for part in _means(own)))
        found[SECOND + name] = own * rise.clamp(0, 1 / _LEAST)
    return found


# --- private --------------------------------------------------------------------------------------


def _level(moments: Mapping[str, Tensor], beta2: float) -> float:
    """What the moments are short of because they started at zero."""
    return 1 - math.pow(beta2, float(moments[COUNT]))


def _means(value: Tensor) -> tuple[Tensor, Tensor]:
    return value.mean(1), value.mean(0)


def _outer(rows: Tensor, columns: Tensor) -> Tensor:
    """The matrix of rank one with these means."""
    return rows[:, None] * columns[None] / rows.mean().clamp(min=_LEAST) + 1e-16
