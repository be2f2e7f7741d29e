"""Epsilon moves the right way: down with noise, up with steps, rate and a smaller delta."""

from hypothesis import given, settings
from hypothesis import strategies as st

from fedkola.privacy import accounting
from fedkola.privacy.accounting import Cost

noises = st.floats(1.0, 20.0)
rates = st.floats(0.001, 0.3)
counts = st.integers(1, 100)
deltas = st.floats(1e-9, 1e-3)


def spent(noise: float, rate: float, count: int, delta: float) -> float:
    cost = Cost(unit="patient", noise=noise, rate=rate, count=count)
    return accounting.epsilon([cost], unit="patient", delta=delta)


@settings(max_examples=5, deadline=None)
@given(noises, rates, counts, deltas, st.floats(1.05, 2))
def test_epsilon_is_monotone(noise, rate, count, delta, more):
    base = spent(noise, rate, count, delta)
    # dp-accounting rounds losses up to multiples of 1e-4, once for each release.
    slack = 1e-3 + 1e-2 * base
    assert spent(noise * more, rate, count, delta) <= base + slack
    assert spent(noise, rate * more, count, delta) >= base - slack
    assert spent(noise, rate, 2 * count, delta) >= base - slack
    assert spent(noise, rate, count, delta / more) >= base - slack
