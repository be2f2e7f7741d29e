"""How weights come back to sites that hold those of the round before: as their change, rounded.

A tensor's change becomes integers on a grid of 8 bits, or of 4 with two coordinates in a byte. At
8 bits the grid holds the largest coordinate; at 4 it is as fine as leaves at most one in a hundred
out, which is cut off. What rounding and cutting lose stays between the server's weights and those
that sites hold, so that the next change carries it.
"""

import math
from collections.abc import Collection, Mapping

import torch
from torch import Tensor

from fedkola.types import Weights

CHANGE, CHANGES = "change/", "side/change"
BITS: Mapping[str, int] = {"change": 8, "change4": 4}
CUT = 0.01  # the share of coordinates that 4 bits may cut off
_SAMPLE = 1 << 16


def sent(
    weights: Weights, held: Weights, names: Collection[str], down: str
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The tensors that bring ``names`` from ``held`` towards ``weights``, and what is held then."""
    bits = BITS[down]
    limit = (1 << (bits - 1)) - 1
    tensors, after, exponents = {}, dict(held), []
    for name in sorted(names):
        step = weights[name] - held[name]
        exponent = _finest(step, bits)
        whole = torch.round(step * 2.0**exponent).clamp(-limit, limit)
        tensors[CHANGE + name] = whole.to(torch.int8) if bits == 8 else _paired(whole)
        after[name] = held[name] + whole * 2.0**-exponent
        exponents.append(exponent)
    tensors[CHANGES] = torch.tensor(exponents, dtype=torch.int16)
    return tensors, after


def names(tensors: Weights) -> list[str]:
    """What a question brings changes of, in the order of their exponents."""
    return sorted(n.removeprefix(CHANGE) for n in tensors if n.startswith(CHANGE))


def received(tensors: Weights, held: Weights, down: str) -> dict[str, Tensor]:
    """The weights named by ``names`` after the change that a question brings."""
    found = {}
    # A message keeps the names of tensors and not their order.
    for name, exponent in zip(names(tensors), tensors[CHANGES].tolist(), strict=True):
        whole, old = tensors[CHANGE + name], held[name]
        step = whole.float() if BITS[down] == 8 else _parted(whole, old.shape)
        found[name] = old + step * 2.0**-exponent
    return found


# --- private --------------------------------------------------------------------------------------


def _finest(step: Tensor, bits: int) -> int:
    """The exponent of the finest grid that holds a change, or all of it but the share CUT."""
    size = step.abs().flatten()
    if not size.numel():
        return 0
    reach = float(size.max())
    if bits < 8:
        some = size[:: -(-size.numel() // _SAMPLE)]
        rank = max(1, math.ceil((1 - CUT) * some.numel()))
        reach = float(some.kthvalue(rank).values) or reach
    limit = (1 << (bits - 1)) - 1
    return min(max(math.floor(math.log2(limit / reach)), 0), 60) if reach else 0


def _paired(whole: Tensor) -> Tensor:
    """Integers of -7 to 7, two in a byte: int8, flat."""
    flat = torch.nn.functional.pad(whole.flatten(), (0, whole.numel() % 2)).to(torch.int8)
    return flat[0::2] + 16 * flat[1::2]


def _parted(pairs: Tensor, shape: torch.Size) -> Tensor:
    """The inverse of ``_paired``: float32 of this shape."""
    both = pairs.to(torch.int16)
    low = (both + 8).remainder(16) - 8
    return torch.stack([low, (both - low) // 16], 1).flatten()[: shape.numel()].view(shape).float()
