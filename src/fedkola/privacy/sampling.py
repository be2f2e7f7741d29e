"""Which units a step takes: each with the same probability, independently (Poisson sampling)."""

from collections.abc import Sequence

from fedkola.privacy.noise import Stream

Sequences = Sequence[Sequence[int]]
"""The token ids of one unit."""


def poisson(units: int, rate: float, stream: Stream) -> list[int]:
    """Positions from 0 to ``units`` - 1, each taken with probability ``rate``; perhaps none."""
    taken = stream.uniforms(units) < rate
    return [place for place, chosen in enumerate(taken.tolist()) if chosen]


def choose(held: int, most: int, stream: Stream) -> list[int]:
    """``most`` positions below ``held`` without replacement, ascending; all if there are fewer."""
    places = list(range(held))
    for at in range(min(most, held - 1)):
        other = at + stream.below(held - at)
        places[at], places[other] = places[other], places[at]
    return sorted(places[:most])
