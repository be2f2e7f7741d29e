"""The grid that all sites round their deltas to, public and adapted from sums alone.

A coordinate v becomes q = floor(v 2^e + u), u uniform in [0, 1): unbiased, and the sum of many is
more exact than each. e is one number per tensor, known to all before anyone answers. q is clipped
to +-L, L = 2^(bits-1) - 1, and what was clipped is counted. Sites add to their answer a histogram
of floor(log2 |v|) over each tensor; from its sum the server picks the next e, so that it follows
the deltas as they shrink without anyone showing a delta.

Words are of 16 bits. Where n L fits fewer bits, several coordinates share a word: with n = 6, bits
= 12 takes a word each, bits = 5 half a word, bits = 2 a quarter. Sums of such words are the words
of the sums, so masks and engines see nothing but integers. Counts that may be larger than a word
travel as digits.
"""

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from fedkola.errors import GridOverflow, NotFinite

LANES = (4, 8, 16, 32)
BINS = 32
LOWEST = -24  # the exponent of the first bin; it also takes whatever is smaller
TAILS = ((10, 1e-4), (5, 2e-3), (2, 2e-2))  # from so many bits on: the share that may be cut off
MOVE = 2
MAX_EXPONENT = 40
COUNTED = 48  # bits that a count may have


def levels(bits: int) -> int:
    """The largest integer that a coordinate may become."""
    return (1 << (bits - 1)) - 1


def lane(bits: int, num: int) -> int:
    """Bits of a word that one coordinate takes in a sum over ``num`` sites; GridOverflow if none
    of 4, 8, 16 and 32 is enough."""
    for width in LANES:
        if num * levels(bits) <= 2 ** (width - 1) - 1:
            return width
    raise GridOverflow(
        f"{bits} bits from each of {num} sites do not fit a word of 32; lower pretrain.bits to "
        f"{31 - num.bit_length()} or less, or ask fewer sites"
    )


def first(bits: int, reach: float) -> int:
    """The exponent whose range just holds ``reach``."""
    return _bounded(math.floor(math.log2(levels(bits) / reach)))


def following(now: int, counts: Tensor, bits: int) -> int:
    """The exponent after summed histogram counts (BINS,), at most MOVE bits away from ``now``.

    The finest whose range leaves out at most a share (see TAILS) of the coordinates, with a bit of
    room where there are bits to spare; of nothing but zeros the present one. Few bits go further
    with a finer grid, since feedback carries over what it cuts off.
    """
    total = int(counts.sum())
    if total == int(counts[0]):
        return now
    tail = next(share for least, share in TAILS if bits >= least)
    above, top = 0, BINS - 1
    while top > 0 and above + int(counts[top]) <= tail * total:
        above += int(counts[top])
        top -= 1
    room = 1 if bits >= 10 else 0
    wanted = math.floor(math.log2(levels(bits))) - (LOWEST + top + 1) - room
    return _bounded(min(max(wanted, now - MOVE), now + MOVE))


def rounded(value: Tensor, exponent: int, bits: int, generator: torch.Generator) -> Tensor:
    """Integers (of the value's shape, int32) by stochastic rounding, clipped to the levels.

    Raises NotFinite for NaN or infinity.
    """
    if not bool(torch.isfinite(value).all()):
        raise NotFinite("a delta holds NaN or infinity; it stays at its site: lower pretrain.lr")
    wide = value.double() if bits > 16 else value.float()
    chance = torch.rand(value.shape, generator=generator, dtype=wide.dtype)
    limit = levels(bits)
    return torch.floor(wide * 2.0**exponent + chance).clamp(-limit, limit).to(torch.int32)


def histogram(value: Tensor, exponent: int, bits: int) -> Tensor:
    """(BINS + 1,) int64: coordinates by floor(log2 |v|), and how many the range cuts off."""
    size = value.abs().flatten()
    power = torch.frexp(size).exponent - 1
    place = (power - LOWEST).clamp(0, BINS - 1).masked_fill(size == 0, 0).long()
    counts = torch.bincount(place, minlength=BINS)
    cut = (size * 2.0**exponent > levels(bits)).sum()
    return torch.cat([counts, cut[None]])


def join(whole: Tensor, width: int) -> Tensor:
    """Integers as words: as they are at 16 and 32, several in each word (flat) below."""
    if width >= 16:
        return whole
    per = 16 // width
    flat = torch.nn.functional.pad(whole.flatten().long(), (0, -whole.numel() % per))
    place = 2 ** (width * torch.arange(per))
    return (flat.reshape(-1, per) * place).sum(1).to(torch.int32)


def split(words: Tensor, width: int, shape: torch.Size) -> Tensor:
    """The inverse of ``join`` for words that may be sums: int64 of this shape."""
    left = words.long()
    if width >= 16:
        return left.reshape(shape)
    base, half, found = 2**width, 2 ** (width - 1), []
    for _ in range(16 // width):
        digit = (left + half).remainder(base) - half
        left = (left - digit) // base
        found.append(digit)
    return torch.stack(found, 1).flatten()[: shape.numel()].reshape(shape)


def digits(counts: Tensor, num: int) -> Tensor:
    """Counts as digits small enough that those of ``num`` sites add up within 16 bits: one more
    dimension, the lowest digit first."""
    width = _digit(num)
    place = torch.arange(-(-COUNTED // width)) * width
    mask = (1 << width) - 1
    return torch.bitwise_right_shift(counts[..., None], place).bitwise_and(mask)


def undigits(summed: Tensor, num: int) -> Tensor:
    """Summed counts (int64) from sums of digits."""
    place = torch.arange(summed.shape[-1]) * _digit(num)
    found: Tensor = torch.bitwise_left_shift(summed.long(), place).sum(dim=-1)
    return found


def clipped(counts: Mapping[str, Tensor]) -> dict[str, float]:
    """The share of each tensor's coordinates that the range cut off."""
    return {name: int(one[BINS]) / max(int(one[:BINS].sum()), 1) for name, one in counts.items()}


# --- private --------------------------------------------------------------------------------------


def _digit(num: int) -> int:
    """The width of a digit whose sum over ``num`` sites stays below 2^15."""
    return max(1, (32767 // num + 1).bit_length() - 1)


def _bounded(exponent: int) -> int:
    return min(max(exponent, 0), MAX_EXPONENT)
