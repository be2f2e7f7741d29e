"""The figures of a stream, worked out by hand on a matrix of three windows and three concepts."""

import pytest

from fedkola.evaluation import metrics

# Concept a arrives in window 1 and fades, b in window 2 and is learnt late, c never arrives.
R = (
    (0.9, None, None),
    (0.8, 0.2, None),
    (0.6, 0.7, None),
)


def test_forgetting_is_the_best_minus_the_last():
    assert metrics.forgetting(R) == pytest.approx((0.3 + 0.0) / 2)


def test_backward_transfer_and_plasticity_start_where_a_concept_arrives():
    assert metrics.backward_transfer(R) == pytest.approx((-0.3 + 0.5) / 2)
    assert metrics.plasticity(R) == pytest.approx((0.9 + 0.2) / 2)


def test_what_the_joint_model_loses_too_is_no_excess():
    assert metrics.excess_forgetting(R, (0.6, 0.8, 0.9)) == pytest.approx((0.0 + 0.1) / 2)


def test_the_stream_counts_every_window_once():
    assert metrics.stream_average(R) == pytest.approx((0.9 + 0.5 + 0.65) / 3)


def test_a_concept_is_fresh_when_nine_tenths_of_it_are_there():
    assert metrics.freshness_lag(R) == [0.0, 1.0, None]


def test_an_interval_holds_its_mean_and_narrows_with_seeds():
    few, many = metrics.interval([0.1, 0.3]), metrics.interval([0.1, 0.3] * 20)
    for found in (few, many):
        assert found["mean"] == pytest.approx(0.2)
        assert found["low"] <= found["mean"] <= found["high"]
    assert many["high"] - many["low"] < few["high"] - few["low"]
    assert metrics.interval([0.5])["n"] == 1
