"""The space that the inputs of a layer span, read off the change of its projections.

The rows of a change are combinations of what the layer read, so an input that took part lies in
their span and any other stands out of it, as long as fewer vectors took part than the width d.
In float32 the spectrum of one gradient falls by four to six decades where the vectors end. Noise,
rounding and further steps fill it up; then each direction counts by how far it stands above the
edge of a random matrix (Marchenko and Pastur, 1967).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from fedkola.errors import DataError

CLEAN = 1e-6
_CLIFF = 30.0


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Span:
    """Orthonormal ``directions`` (d, r) with a weight each (r,), both float64."""

    directions: Tensor
    weights: Tensor

    @property
    def rank(self) -> float:
        return float(self.weights.sum())

    @property
    def sharp(self) -> bool:
        """Whether a direction is either in or out."""
        return bool(((self.weights == 0) | (self.weights == 1)).all())

    def residual(self, x: Tensor) -> Tensor:
        """|x - P x| / |x| for the last axis of ``x``: 0 inside the span, 1 outside."""
        inside = x @ self.directions * self.weights
        out: Tensor = torch.linalg.vector_norm(x - inside @ self.directions.T, dim=-1)
        size: Tensor = torch.linalg.vector_norm(x, dim=-1)
        return out / size.clamp_min(torch.finfo(x.dtype).tiny)


def spans(changes: Sequence[Tensor]) -> tuple[Span, ...]:
    """One span for each change (outputs, d) of a layer.

    All share the greatest rank found: the last directions of single layers are lost first. Where
    no cliff is in a spectrum its directions are weighted. Raises DataError for a change of zeros.
    """
    parts = []
    for change in changes:
        _, values, rows = torch.linalg.svd(change, full_matrices=False)
        if not float(values[0]) > 0:
            raise DataError(
                "the change of an attention layer is zero: nothing was trained there; attack a "
                "round in which this layer took part"
            )
        parts.append((change.shape, values, rows))
    ranks = [cliff(values) for _, values, _ in parts]
    known = [rank for rank in ranks if rank is not None]
    shared = max(known) if len(known) == len(ranks) else None
    found = []
    for shape, values, rows in parts:
        if shared is not None:
            weights = torch.zeros_like(values)
            weights[:shared] = 1.0
        else:
            weights = values**2 / (values**2 + noise_edge(shape[0], shape[1], values) ** 2)
        found.append(Span(directions=rows.T.contiguous(), weights=weights))
    return tuple(found)


def cliff(values: Tensor) -> int | None:
    """How many singular values stand before the end of the spectrum; None where none is seen.

    Values below 1e-6 of the first are float32's own noise. A cliff higher up, of a factor 30
    between neighbours, is where several small steps end; those after it are their drift, and 0.08 d
    more directions are kept for it.
    """
    d = len(values)
    most = d - max(2, round(d / 38))
    count = int((values > CLEAN * values[0]).sum())
    if count <= most:
        return count
    steps = values[:-1] / values[1:].clamp_min(CLEAN * float(values[0]))
    place = int(steps[:most].argmax())
    if float(steps[place]) < _CLIFF:
        return None
    return min(most, place + 1 + round(0.08 * d))


def noise_edge(outputs: int, width: int, values: Tensor) -> float:
    """The largest singular value that noise alone would have, from the lower half of ``values``."""
    reference = _reference(outputs, width)
    half = len(values) // 2
    scale = float(values[half:].median() / reference[half:].median())
    return scale * float(outputs**0.5 + width**0.5)


@cache
def _reference(outputs: int, width: int) -> Tensor:
    """Singular values of a matrix of standard normal numbers."""
    generator = torch.Generator().manual_seed(0)
    matrix = torch.randn(outputs, width, generator=generator, dtype=torch.float64)
    values: Tensor = torch.linalg.svd(matrix, full_matrices=False)[1]
    return values
