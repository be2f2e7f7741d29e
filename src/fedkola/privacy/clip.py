"""How far one unit or one site can move a sum: tensors cut to a norm.

The norm is that of all tensors together as one vector, in float64. What is cut is made shorter by
one part in a million more, so that rounding to float32 cannot carry it over the bound.
"""

import math

import torch
from torch import Tensor

from fedkola.errors import Incompatible, NotFinite
from fedkola.types import Weights

MARGIN = 1 - 2.0**-20


def norm(tensors: Weights) -> float:
    """The Euclidean norm of all tensors as one vector."""
    return math.sqrt(math.fsum(float(t.double().square().sum()) for t in tensors.values()))


def factor(norms: Tensor, bound: float) -> Tensor:
    """What to multiply vectors of these norms by, so that none is longer than ``bound``.

    0 for a norm that is not finite: such a vector says nothing, and to stop at it would tell that
    it was there.
    """
    require_bound(bound)
    found = torch.where(norms > bound, MARGIN * bound / norms, torch.ones_like(norms))
    return torch.where(torch.isfinite(norms), found, torch.zeros_like(found))


def clip(tensors: Weights, bound: float) -> dict[str, Tensor]:
    """The tensors, all multiplied by one number so that their norm is at most ``bound``.

    Raises NotFinite for a norm that is not finite.
    """
    length = norm(tensors)
    if not math.isfinite(length):
        raise NotFinite("a tensor holds NaN or infinity and has no norm; nothing leaves the site")
    times = float(factor(torch.tensor(length, dtype=torch.float64), bound))
    return {n: value if times == 1 else value * times for n, value in tensors.items()}


def require_bound(bound: float) -> None:
    if not 0 < bound < math.inf:
        raise Incompatible(f"privacy.clip = {bound:g} bounds nothing; set it above 0 and finite")
