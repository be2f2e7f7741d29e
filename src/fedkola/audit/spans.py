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

CLEAN = 2e-7
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

    A sum of products in float32 errs in proportion to itself, so rows are first brought to one
    size: query and key rows, far smaller than value rows, know the directions these blur. Where
    that shows no end of the spectrum, rows stay as they are and directions get weights. All layers
    share the greatest rank found: the last directions of single layers are lost first. Raises
    DataError for a change of zeros.
    """
    if any(not bool((change != 0).any()) for change in changes):
        raise DataError(
            "the change of a layer is zero: nothing was trained there; attack a round in which it "
            "took part"
        )
    even = [_spectrum(_even(change)) for change in changes]
    ranks = [rank for values, _ in even if (rank := end(values)) is not None]
    if len(ranks) == len(even):
        return tuple(_sharp(max(ranks), values, rows) for values, rows in even)
    found = []
    for change in changes:
        values, rows = _spectrum(change)
        rank = cliff(values)
        found.append(
            _soft(noise_edge(change.shape[0], change.shape[1], values), values, rows)
            if rank is None
            else _sharp(rank, values, rows)
        )
    return tuple(found)


def end(values: Tensor) -> int | None:
    """How many singular values lie above float32's own noise; None if all do."""
    count = int((values > CLEAN * values[0]).sum())
    return count if count < len(values) else None


def cliff(values: Tensor) -> int | None:
    """Where a full spectrum falls by a factor of 30 between neighbours, as several small steps make
    it, whose drift follows: for it 0.08 d more directions are kept. None where no cliff is seen."""
    d = len(values)
    most = d - max(2, round(d / 38))
    steps = values[:-1] / values[1:].clamp_min(1e-300)
    place = int(steps[:most].argmax())
    return min(most, place + 1 + round(0.08 * d)) if float(steps[place]) >= _CLIFF else None


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


def _even(change: Tensor) -> Tensor:
    size: Tensor = torch.linalg.vector_norm(change, dim=1, keepdim=True)
    return torch.where(size > 0, change / size.clamp_min(1e-300), change)


def _spectrum(change: Tensor) -> tuple[Tensor, Tensor]:
    """Singular values and right singular vectors (as rows)."""
    _, values, rows = torch.linalg.svd(change, full_matrices=False)
    return values, rows


def _sharp(rank: int, values: Tensor, rows: Tensor) -> Span:
    weights = (torch.arange(len(values)) < rank).to(values.dtype)
    return Span(directions=rows.T.contiguous(), weights=weights)


def _soft(edge: float, values: Tensor, rows: Tensor) -> Span:
    return Span(directions=rows.T.contiguous(), weights=values**2 / (values**2 + edge**2))
