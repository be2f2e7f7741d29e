"""Intervals against values known from elsewhere, and their coverage in simulation."""

from statistics import NormalDist, mean

import numpy as np
import pytest
from scipy import stats

from fedkola.audit.intervals import (
    auc,
    auc_interval,
    bootstrap,
    mean_interval,
    rate_interval,
    tpr_at_fpr,
)
from fedkola.errors import DataError


def test_rates_have_the_interval_of_clopper_and_pearson():
    for hits, trials in [(0, 59), (1, 20), (7, 20), (20, 20), (500, 1000)]:
        known = stats.binomtest(hits, trials).proportion_ci(0.95, method="exact")
        found = rate_interval(hits, trials)
        assert (found.value, found.low) == (hits / trials, pytest.approx(known.low, abs=1e-12))
        assert found.high == pytest.approx(known.high, abs=1e-12)
    # By hand: no hit of n has the upper end 1 - 0.025^(1/n).
    assert rate_interval(0, 59).high == pytest.approx(1 - 0.025 ** (1 / 59))


def test_the_area_under_the_curve_counts_pairs_in_order():
    assert auc([3, 2], [1, 2.5]) == 0.75
    assert auc([1, 1], [1, 1]) == 0.5
    assert auc([0], [1]) == 0.0
    first, second = np.random.default_rng(0).integers(0, 9, (2, 40))
    known = stats.mannwhitneyu(first, second).statistic / 1600
    assert auc(list(first), list(second)) == pytest.approx(known)


def test_delong_by_hand():
    # Placements 1, 1/2 of the positives and 1, 1/2 of the negatives: variance 1/8 each, 1/8 in all.
    found = auc_interval([3, 2], [1, 2.5])
    half = NormalDist().inv_cdf(0.975) * 0.125**0.5
    assert found.low == pytest.approx(max(0, 0.75 - half))
    assert found.high == 1.0
    wide = auc_interval([3, 2] * 8, [1, 2.5] * 8)
    # Sample variance of eight times 1 and eight times 1/2 is 1/15; two of them over 16.
    half = NormalDist().inv_cdf(0.975) * (2 / 15 / 16) ** 0.5
    assert (wide.low, wide.high) == (pytest.approx(0.75 - half), pytest.approx(0.75 + half))


def test_delong_agrees_with_the_covariance_of_all_pairs():
    generator = np.random.default_rng(1)
    first, second = generator.normal(1, 1, 30), generator.normal(0, 1, 50)
    kernel = (first[:, None] > second) + 0.5 * (first[:, None] == second)
    variance = np.var(kernel.mean(1), ddof=1) / 30 + np.var(kernel.mean(0), ddof=1) / 50
    found = auc_interval(list(first), list(second))
    half = 1.959964 * variance**0.5
    assert found.low == pytest.approx(kernel.mean() - half, abs=1e-6)
    assert found.high == pytest.approx(min(1, kernel.mean() + half), abs=1e-6)


def test_a_perfect_ranking_of_few_does_not_claim_certainty():
    found = auc_interval([3, 4, 5], [0, 1])
    assert (found.value, found.high) == (1.0, 1.0)
    assert found.low == pytest.approx(0.025**0.5)
    assert auc_interval([0.0], [1.0]).high == pytest.approx(0.975)
    one = auc_interval([2.0], [1.0, 3.0])
    assert (one.value, one.low, one.high) == (0.5, 0.0, 1.0)


def test_about_19_of_20_delong_intervals_hold_the_truth():
    truth = NormalDist().cdf(1 / 2**0.5)
    generator = np.random.default_rng(2)
    held = []
    for _ in range(400):
        found = auc_interval(list(generator.normal(1, 1, 60)), list(generator.normal(0, 1, 60)))
        held.append(found.low <= truth <= found.high)
    assert 0.92 <= mean(held) <= 0.98


def test_the_bootstrap_resamples_updates_and_not_records():
    # Records of one update are copies: 20 updates of 50 records know no more than 20 numbers.
    values = np.random.default_rng(3).normal(0, 1, 20)
    updates = [[value] * 50 for value in values]
    found = bootstrap(updates, lambda some: mean(mean(update) for update in some), seed=1)
    half = stats.t.ppf(0.975, 19) * values.std(ddof=1) / 20**0.5
    assert found.value == pytest.approx(values.mean())
    assert (found.high - found.low) / 2 == pytest.approx(half, rel=0.15)
    assert found == bootstrap(updates, lambda some: mean(mean(u) for u in some), seed=1)
    quick = mean_interval(list(values), seed=1)
    assert (quick.low, quick.high) == (pytest.approx(found.low), pytest.approx(found.high))


def test_the_mean_interval_agrees_with_the_percentile_bootstrap_of_scipy():
    values = list(np.random.default_rng(4).exponential(1, 25))
    known = stats.bootstrap(
        (values,), np.mean, n_resamples=20000, method="percentile", rng=np.random.default_rng(0)
    ).confidence_interval
    found = mean_interval(values)
    assert (found.low, found.high) == (
        pytest.approx(known.low, abs=0.03),
        pytest.approx(known.high, abs=0.03),
    )


def test_true_positives_are_counted_where_at_most_one_negative_in_a_hundred_passes():
    negative = list(range(1000))  # ten may pass: the threshold is 989
    found = tpr_at_fpr([989, 989.5, 2000, 5], negative)
    assert found.value == 0.5
    assert (found.low, found.high) == (rate_interval(2, 4).low, rate_interval(2, 4).high)
    assert sum(score > 989 for score in negative) == 10
    assert tpr_at_fpr([3], [1, 2]).value == 1.0
    assert tpr_at_fpr([2], [1, 2]).value == 0.0


@pytest.mark.parametrize(
    "ask",
    [
        lambda: rate_interval(1, 0),
        lambda: rate_interval(3, 2),
        lambda: auc([], [1.0]),
        lambda: auc_interval([1.0], [float("nan")]),
        lambda: mean_interval([]),
        lambda: bootstrap([], len),
    ],
)
def test_no_interval_is_made_of_nothing(ask):
    with pytest.raises(DataError, match="an interval was asked for"):
        ask()
