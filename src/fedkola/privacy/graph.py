"""Who masks with whom: everybody up to 64 sites, then a sparse circulant graph.

Bell et al., CCS 2020, "Secure single-server aggregation with (poly)logarithmic overhead": a site
that masks with k neighbours and shares its secrets among them is as safe as one that masks with
all, but for a chance that k makes small.
"""

import hashlib
from collections.abc import Sequence
from functools import cache
from math import comb

COMPLETE = 64
SECRECY = 2.0**-40
LOST_ROUND = 2.0**-20


@cache
def choose_graph(n: int, *, colluding: float = 0.2, absent: float = 0.1) -> tuple[int, int]:
    """Neighbours of a site and the threshold of its shares, (k, t), for n sites.

    Up to 64 sites, and where no sparse graph does: all others, and t = floor(2n/3) + 1 of n holders
    with the site itself. Else the least even k with t = floor(2k/3) + 1 of k holders such that, by
    union bounds, no secrecy is lost but for a chance of 2^-40 (t colluding neighbours of one site,
    or two gaps of k/2 neighbours that part the honest sites) and no round but for 2^-20.
    """
    if n > COMPLETE:
        bad, away = int(colluding * n), int(absent * n)
        for k in range(2, n - 1, 2):
            t = 2 * k // 3 + 1
            gaps = comb(n, 2) * _all_of(k, bad + away, n - 1)
            if (
                n * _at_least(t, k, bad, n - 1) < SECRECY
                and gaps < SECRECY
                and n * _at_least(k - t + 1, k, away, n - 1) < LOST_ROUND
            ):
                return k, t
    return n - 1, 2 * n // 3 + 1


def neighbours(roster_hash: bytes, members: Sequence[int], k: int) -> dict[int, frozenset[int]]:
    """By member, those it masks with: k/2 on either side in an order that nobody chose."""
    if k >= len(members) - 1:
        return {one: frozenset(members) - {one} for one in members}
    label = b"fedkola/ms1/graph\0" + roster_hash
    ring = sorted(members, key=lambda i: hashlib.sha256(label + i.to_bytes(2, "little")).digest())
    reach = range(1, k // 2 + 1)
    return {
        one: frozenset(ring[(at + side * far) % len(ring)] for far in reach for side in (-1, 1))
        for at, one in enumerate(ring)
    }


def _at_least(count: int, drawn: int, marked: int, total: int) -> float:
    """The chance that ``drawn`` of ``total`` sites hold at least ``count`` of the marked ones."""
    ways = sum(
        comb(marked, hit) * comb(total - marked, drawn - hit)
        for hit in range(count, min(drawn, marked) + 1)
    )
    return ways / comb(total, drawn)


def _all_of(drawn: int, marked: int, total: int) -> float:
    return comb(marked, drawn) / comb(total, drawn)
