"""Absence is a function of seed, site and round, at the rate that the plan says."""

from itertools import groupby

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedkola.knowledge.availability import Pattern, away, cohort

SITES = tuple(f"site-{i}" for i in range(12))
names = st.sampled_from(["bernoulli", "markov", "diurnal"])
patterns = st.builds(
    Pattern, name=names, absent=st.floats(0, 0.5), spell=st.floats(1, 20, allow_nan=False)
)
seeds = st.integers(0, 2**63 - 1)


def missed(pattern: Pattern, *, sites: int, rounds: int) -> list[list[bool]]:
    return [
        [away(pattern, f"s{i}", seed=3, round=number) for number in range(1, rounds + 1)]
        for i in range(sites)
    ]


@given(patterns, seeds, st.permutations(range(1, 12)))
def test_a_resumed_run_draws_the_rounds_that_the_first_one_drew(pattern, seed, order):
    def drawn(number: int) -> tuple[str, ...]:
        settings = {"size": 5, "seed": seed, "late": {}, "left": {}, "pattern": pattern}
        return cohort(SITES, round=number, **settings)

    assert {n: drawn(n) for n in range(1, 12)} == {n: drawn(n) for n in order}


@given(patterns, seeds, st.integers(1, 40))
def test_one_site_does_not_move_another(pattern, seed, number):
    few = cohort(SITES[:3], size=0, seed=seed, round=number, late={}, left={}, pattern=pattern)
    many = cohort(SITES, size=0, seed=seed, round=number, late={}, left={}, pattern=pattern)
    assert few == tuple(site for site in many if site in SITES[:3])


@given(names, seeds, st.integers(1, 10**6))
def test_nobody_is_away_at_rate_0_and_everybody_at_rate_1_but_for_markov(name, seed, number):
    never, always = (Pattern(name=name, absent=rate, spell=2.0) for rate in (0.0, 1.0))
    assert not away(never, "a", seed=seed, round=min(number, 50))
    if name != "markov":
        assert away(always, "a", seed=seed, round=number)


@pytest.mark.parametrize("name", ["bernoulli", "markov", "diurnal"])
@pytest.mark.parametrize("absent", [0.1, 0.3, 0.5])
def test_the_share_of_missed_rounds_is_the_rate_in_every_round(name, absent):
    rows = missed(Pattern(name=name, absent=absent, spell=3.0), sites=2000, rounds=20)
    for column in zip(*rows, strict=True):
        assert sum(column) / 2000 == pytest.approx(absent, abs=0.05)
    assert sum(map(sum, rows)) / 40_000 == pytest.approx(absent, abs=0.015)


@pytest.mark.parametrize(("name", "spell"), [("markov", 4.0), ("diurnal", 4.0)])
def test_an_absence_lasts_as_long_as_the_spell_says(name, spell):
    lengths = []
    for row in missed(Pattern(name=name, absent=0.3, spell=spell), sites=100, rounds=300):
        runs = [(gone, len(list(run))) for gone, run in groupby(row)]
        lengths += [length for gone, length in runs[1:-1] if gone]  # The ends may be cut short.
    assert sum(lengths) / len(lengths) == pytest.approx(spell, rel=0.1)


def test_sites_sleep_at_different_times():
    pattern = Pattern(name="diurnal", absent=0.5, spell=6.0)
    hours = {tuple(row) for row in missed(pattern, sites=12, rounds=12)}
    assert len(hours) > 6
