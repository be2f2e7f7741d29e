"""Who is there: which sites have joined, which are away, which have left, and whom a round asks.

Everything is a function of its arguments, so a resumed run draws the cohorts of the run it
continues. Absence is drawn for each site and round (``pattern``), at the same long-run rate:

- ``full``: nobody is away.
- ``bernoulli``: every round anew.
- ``markov``: a chain with two states, started in its stationary distribution; absences last
  ``spell`` rounds on average, geometrically.
- ``diurnal``: every site has a clock with a phase of its own and sleeps through the same part of
  each day; a day has ``spell / absent`` rounds, so a sleep lasts ``spell`` rounds on average.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from fedkola.knowledge.stream import seeded
from fedkola.types import Cohort


@dataclass(frozen=True, slots=True, kw_only=True)
class Pattern:
    """How sites come and go: a name above, the share of rounds missed, the mean length of an
    absence in rounds. ``absent * (spell + 1) <= spell`` must hold for ``markov``."""

    name: str = "full"
    absent: float = 0.0
    spell: float = 1.0


FULL = Pattern()


def online(scenario_late: Mapping[str, int], site: str, round: int) -> bool:
    """Whether the site answers in this round: late sites from the round named for them on."""
    return round >= scenario_late.get(site, 1)


def away(pattern: Pattern, site: str, *, seed: int, round: int) -> bool:
    """Whether the site misses this round; rounds count from 1."""
    if pattern.name == "full" or pattern.absent == 0:
        return False
    if pattern.name == "bernoulli":
        return seeded(seed, "away", site, str(round)).random() < pattern.absent
    if pattern.name == "diurnal":
        phase = seeded(seed, "clock", site).random()
        return (phase + round * pattern.absent / pattern.spell) % 1.0 < pattern.absent
    chance = seeded(seed, "spells", site)
    returns = 1 / pattern.spell
    leaves = pattern.absent * returns / (1 - pattern.absent)
    gone = chance.random() < pattern.absent
    for _ in range(1, round):
        gone = chance.random() >= returns if gone else chance.random() < leaves
    return gone


def cohort(
    roster: Sequence[str],
    *,
    size: int,
    seed: int,
    round: int,
    late: Mapping[str, int],
    left: Mapping[str, int],
    pattern: Pattern = FULL,
) -> Cohort:
    """The sites to ask in a round, in the order of the roster.

    ``late`` gives the first round of a site, ``left`` the last one after which it is gone,
    ``pattern`` who is away. Of the sites that remain, ``size`` are drawn from seed and round; 0,
    or fewer sites than that, asks all of them. May be empty: the floor on cohorts is the server's.
    """
    there = [
        site
        for site in roster
        if online(late, site, round)
        and round <= left.get(site, round)
        and not away(pattern, site, seed=seed, round=round)
    ]
    if not 0 < size < len(there):
        return tuple(there)
    drawn = set(seeded(seed, "cohort", str(round)).sample(sorted(there), size))
    return tuple(site for site in there if site in drawn)
