"""Poisson samples take each unit with its probability, and depend on nothing but the key."""

import numpy as np
from scipy import stats

from fedkola.privacy.noise import Stream
from fedkola.privacy.sampling import choose, poisson

KEY = bytes(range(32))


def test_every_unit_is_taken_with_the_same_probability_and_by_itself():
    draws = np.zeros((4_000, 30))
    stream = Stream(KEY, "s")
    for row in draws:
        row[poisson(30, 0.1, stream)] = 1
    assert stats.binomtest(int(draws.sum()), draws.size, 0.1).pvalue > 1e-3
    assert stats.chisquare(draws.sum(0)).pvalue > 1e-3
    # The size of a sample is binomial: a fixed size would have no variance at all.
    sizes = np.bincount(draws.sum(1).astype(int), minlength=31)[:9]
    expected = stats.binom.pmf(np.arange(9), 30, 0.1) * len(draws)
    assert stats.chisquare(sizes, expected * sizes.sum() / expected.sum()).pvalue > 1e-3


def test_a_sample_may_be_empty_and_at_rate_one_is_everyone():
    assert poisson(5, 1e-12, Stream(KEY, "s")) == []
    assert poisson(5, 1.0, Stream(KEY, "s")) == [0, 1, 2, 3, 4]


def test_a_sample_is_a_function_of_its_key():
    assert poisson(50, 0.3, Stream(KEY, "s")) == poisson(50, 0.3, Stream(KEY, "s"))
    assert poisson(50, 0.3, Stream(KEY, "s")) != poisson(50, 0.3, Stream(KEY[::-1], "s"))


def test_sequences_are_chosen_without_replacement_and_evenly():
    stream = Stream(KEY, "c")
    counts = np.zeros(6)
    for _ in range(3_000):
        chosen = choose(6, 4, stream)
        assert len(set(chosen)) == 4
        assert chosen == sorted(chosen)
        counts[chosen] += 1
    # Without replacement counts vary less than independent ones; evenness is what is asked.
    assert np.abs(counts / 3_000 - 4 / 6).max() < 0.04
    assert choose(3, 4, stream) == [0, 1, 2]
    assert choose(1, 4, stream) == [0]
    assert choose(0, 4, stream) == []
