"""Who is there: which sites have joined, which have left, and whom a round asks.

Everything is a function of its arguments, so a resumed run draws the cohorts of the run it
continues.
"""

from collections.abc import Mapping, Sequence

from fedkola.knowledge.stream import seeded
from fedkola.types import Cohort


def online(scenario_late: Mapping[str, int], site: str, round: int) -> bool:
    """Whether the site answers in this round: late sites from the round named for them on."""
    return round >= scenario_late.get(site, 1)


def cohort(
    roster: Sequence[str],
    *,
    size: int,
    seed: int,
    round: int,
    late: Mapping[str, int],
    left: Mapping[str, int],
) -> Cohort:
    """The sites to ask in a round, in the order of the roster.

    ``late`` gives the first round of a site, ``left`` the last one after which it is gone. Of the
    sites that remain, ``size`` are drawn from seed and round; 0, or fewer sites than that, asks
    all of them. May be empty: the floor on cohorts is the server's.
    """
    there = [
        site for site in roster if online(late, site, round) and round <= left.get(site, round)
    ]
    if not 0 < size < len(there):
        return tuple(there)
    drawn = set(seeded(seed, "cohort", str(round)).sample(sorted(there), size))
    return tuple(site for site in there if site in drawn)
