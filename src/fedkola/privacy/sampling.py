"""Which units a step takes: each with the same probability, independently (Poisson sampling)."""

from collections.abc import Sequence

from fedkola.errors import DataError
from fedkola.privacy.noise import Stream

Sequences = Sequence[Sequence[int]]
"""The token ids of one unit."""


def drawn(
    units: Sequence[Sequences], *, rate: float, most: int, key: bytes, step: str = ""
) -> tuple[list[Sequences], int]:
    """A Poisson sample of units with up to ``most`` sequences of each, and a seed for what training
    hides in it (dropout): functions of the key of the exchange and the name of the step in it."""
    own = Stream(key, f"sequences{step}")
    taken: list[Sequences] = []
    for place in poisson(len(units), rate, Stream(key, f"sample{step}")):
        rows = units[place]
        taken.append([rows[i] for i in choose(len(rows), most, own)])
    return taken, int(Stream(key, f"hidden{step}").words(1)[0] >> 2)


def require_units(held: int, declared: int, unit: str) -> None:
    """Raises DataError for fewer units at a site than its plan declares."""
    if held < max(declared, 1):
        raise DataError(
            f"this site has {held} {unit}s, privacy.units declares {max(declared, 1)} at least; "
            "bring more, or lower privacy.units, which adds noise everywhere"
        )


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
