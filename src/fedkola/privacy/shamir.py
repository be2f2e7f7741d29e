"""Sharing a secret among holders, any t of whom give it back (Shamir, CACM 1979).

Arithmetic is over the prime p = 2^521 - 1, so a 32-byte secret fits with room. The holder with
index j gets the value of the polynomial at j + 1; the secret is its value at 0.
"""

from collections.abc import Mapping, Sequence

from fedkola.errors import PrivacyError

PRIME = 2**521 - 1
SHARE_BYTES = 66


def share(secret: int, coefficients: Sequence[int], holder: int) -> bytes:
    """The share of a holder, 66 bytes big-endian; ``coefficients`` are those of degree 1 and up."""
    value = 0
    for coefficient in reversed(coefficients):
        value = (value + coefficient) * (holder + 1) % PRIME
    return ((value + secret) % PRIME).to_bytes(SHARE_BYTES, "big")


def joined(shares: Mapping[int, bytes], threshold: int) -> int:
    """The secret behind shares by holder: read from the first t, checked against the others.

    Raises PrivacyError below the threshold or if a share does not lie on the polynomial.
    """
    if len(shares) < threshold:
        raise PrivacyError(
            f"{len(shares)} shares of a secret that takes {threshold}; nothing is decoded",
            code="below_threshold",
        )
    values = {holder: int.from_bytes(value, "big") for holder, value in shares.items()}
    points = list(values)[:threshold]
    secret = _at(-1, points, values)
    for holder in list(values)[threshold:]:
        if _at(holder, points, values) != values[holder]:
            raise PrivacyError(
                "the shares of a secret contradict each other: one of the sites sent a wrong one; "
                "nothing is decoded, repeat the exchange",
                code="bad_share",
            )
    return secret


def _at(place: int, points: Sequence[int], values: Mapping[int, int]) -> int:
    """The value at holder ``place`` of the polynomial through the shares of ``points``."""
    total = 0
    for one in points:
        above = below = 1
        for other in points:
            if other != one:
                above = above * (place - other) % PRIME
                below = below * (one - other) % PRIME
        total += values[one] * above * pow(below, -1, PRIME)
    return total % PRIME
