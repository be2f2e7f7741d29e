"""What releases cost, and an account that neither loses nor doubles a charge."""

import json
import os
import signal
import subprocess
import sys

import dp_accounting
import pytest
from dp_accounting.pld import PLDAccountant
from dp_accounting.rdp import RdpAccountant

from fedkola.errors import BudgetExhausted, BudgetUnreachable, PrivacyError
from fedkola.privacy import accounting
from fedkola.privacy.accounting import Cost, Entry, Limit

# Units, batch, steps, delta, noise multiplier -> epsilon, from the table of the design.
TABLE = [
    (50_000, 256, 2_000, 1e-6, 1.0, 1.44),
    (50_000, 256, 2_000, 1e-6, 2.0, 0.50),
    (5_000, 128, 500, 1e-5, 0.6, 12.8),
    (5_000, 128, 500, 1e-5, 1.0, 3.62),
    (5_000, 256, 500, 1e-5, 0.8, 12.4),
    (1_000, 64, 300, 1e-4, 0.6, 20.6),
    (1_000, 64, 300, 1e-4, 2.0, 2.15),
    (40_000, 1_024, 500, 1e-6, 0.8, 6.90),
    (40_000, 1_024, 500, 1e-6, 2.0, 1.39),
]


def cost(*, unit: str = "patient", noise: float = 1.0, rate: float = 0.05, count: int = 8) -> Cost:
    return Cost(unit=unit, noise=noise, rate=rate, count=count)


def entry(exchange: str, *, round: int = 1, **values: float) -> Entry:
    return Entry(exchange=exchange, run="r", round=round, costs=(cost(**values),))


def limit(epsilon: float, *, unit: str = "patient", delta: float = 1e-5) -> Limit:
    return Limit(unit=unit, epsilon=epsilon, delta=delta)


@pytest.mark.parametrize(("units", "batch", "steps", "delta", "noise", "expected"), TABLE)
def test_epsilon_is_that_of_the_table_of_the_design(units, batch, steps, delta, noise, expected):
    found = accounting.epsilon(
        [cost(noise=noise, rate=batch / units, count=steps)], unit="patient", delta=delta
    )
    assert found == pytest.approx(expected, rel=0.005, abs=0.005)


def test_epsilon_is_what_dp_accounting_says_of_the_same_events():
    rounds = [cost(noise=1.1, count=4)] * 3 + [cost(noise=5.0, rate=1, count=2)]
    oracle = PLDAccountant()
    for one in rounds:
        event = dp_accounting.GaussianDpEvent(one.noise)
        if one.rate < 1:
            event = dp_accounting.PoissonSampledDpEvent(one.rate, event)
        oracle.compose(event, count=one.count)
    found = accounting.epsilon(rounds, unit="patient", delta=1e-5)
    assert found == pytest.approx(oracle.get_epsilon(1e-5), rel=1e-3)
    loose = RdpAccountant().compose(accounting.event(rounds)).get_epsilon(1e-5)
    assert 0.7 * loose < found < loose


def test_a_gaussian_without_sampling_costs_what_its_closed_form_says():
    # delta = Phi(1/(2s) - eps s) - e^eps Phi(-1/(2s) - eps s), Balle and Wang, ICML 2018, at s = 1.
    found = accounting.epsilon([cost(rate=1, count=1)], unit="patient", delta=0.12693673750664397)
    assert found == pytest.approx(1.0, abs=1e-3)


def test_nothing_costs_nothing_and_no_noise_costs_everything():
    assert accounting.epsilon([], unit="record", delta=1e-5) == 0
    assert accounting.epsilon([cost(count=0)], unit="record", delta=1e-5) == 0
    assert accounting.epsilon([cost(noise=0)], unit="record", delta=1e-5) == float("inf")


def test_hiding_a_record_does_not_hide_a_patient_but_the_other_way_round_it_does():
    assert accounting.epsilon([cost(unit="record")], unit="patient", delta=1e-5) == float("inf")
    whole = accounting.epsilon([cost(unit="patient")], unit="patient", delta=1e-5)
    assert accounting.epsilon([cost(unit="site")], unit="record", delta=1e-5) == whole


@pytest.mark.parametrize("target", [1.0, 8.0])
def test_calibrated_noise_keeps_the_limit_and_hardly_less_would(target):
    noise = accounting.noise_for(limit(target), rate=0.05, count=100)
    at = [
        accounting.epsilon([cost(noise=n, count=100)], unit="patient", delta=1e-5)
        for n in (noise, 0.99 * noise)
    ]
    assert at[0] <= target < at[1]


def test_an_epsilon_out_of_reach_is_refused_with_what_to_change():
    with pytest.raises(BudgetUnreachable, match=r"more patients, fewer rounds.*larger epsilon"):
        accounting.noise_for(limit(0.01), rate=1, count=10_000)


@pytest.mark.parametrize("delta", [0.0, 1e-3, 0.5])
def test_a_delta_that_promises_nothing_to_so_few_units_is_refused(delta):
    with pytest.raises(BudgetUnreachable, match=r"privacy\.delta"):
        accounting.require_delta(limit(1, delta=delta), 1000)
    accounting.require_delta(limit(1, delta=1e-4), 1000)


def test_an_account_adds_rounds_up_and_outlives_the_process(tmp_path):
    for number in range(1, 4):
        accounting.charge(tmp_path, entry(f"x{number}", round=number))
    whole = accounting.epsilon([cost(count=24)], unit="patient", delta=1e-5)
    assert accounting.spent(tmp_path, unit="patient", delta=1e-5) == whole
    assert [one.round for one in accounting.entries(tmp_path)] == [1, 2, 3]
    assert (tmp_path / accounting.ACCOUNT).stat().st_mode & 0o777 == 0o600


def test_an_exchange_is_charged_once_however_often_it_is_answered(tmp_path):
    for _ in range(3):
        accounting.charge(tmp_path, entry("x"))
    assert len(accounting.entries(tmp_path)) == 1
    with pytest.raises(PrivacyError, match="one noise serves one release"):
        accounting.charge(tmp_path, entry("x", count=9))


def test_the_round_that_would_pass_the_limit_is_refused_before_anything_is_charged(tmp_path):
    one = accounting.epsilon([cost()], unit="patient", delta=1e-5)
    two = accounting.epsilon([cost(count=16)], unit="patient", delta=1e-5)
    held = limit((one + two) / 2)
    accounting.demand(tmp_path, held, entry("x1"))
    accounting.charge(tmp_path, entry("x1"))
    with pytest.raises(BudgetExhausted, match="round 2 of r"):
        accounting.demand(tmp_path, held, entry("x2", round=2))
    # The question that was paid for may be answered again.
    accounting.demand(tmp_path, held, entry("x1"))
    assert len(accounting.entries(tmp_path)) == 1


@pytest.mark.parametrize("text", ["", "{}", '{"version": 2, "entries": []}', '{"version": 1'])
def test_a_damaged_account_stops_the_site(tmp_path, text):
    (tmp_path / accounting.ACCOUNT).write_text(text)
    with pytest.raises(PrivacyError, match="restore it from a copy"):
        accounting.demand(tmp_path, limit(8), entry("x"))


CHARGE = """
import os, signal, sys
from pathlib import Path
from fedkola import files
from fedkola.privacy import accounting
from fedkola.privacy.accounting import Cost, Entry
real = os.replace
def replace(*args):
    if sys.argv[2] == "before": os.kill(os.getpid(), signal.SIGKILL)
    real(*args)
    if sys.argv[2] == "after": os.kill(os.getpid(), signal.SIGKILL)
files.os.replace = replace
cost = Cost(unit="patient", noise=1.0, rate=0.05, count=8)
accounting.charge(Path(sys.argv[1]), Entry(exchange="x2", run="r", round=2, costs=(cost,)))
"""


@pytest.mark.parametrize(("when", "kept"), [("before", ["x1"]), ("after", ["x1", "x2"])])
def test_a_kill_leaves_the_account_before_or_after_the_charge(tmp_path, when, kept):
    accounting.charge(tmp_path, entry("x1"))
    done = subprocess.run([sys.executable, "-c", CHARGE, tmp_path, when], env={**os.environ})
    assert done.returncode == -signal.SIGKILL
    assert [one.exchange for one in accounting.entries(tmp_path)] == kept
    accounting.charge(tmp_path, entry("x2", round=2))
    assert [one.exchange for one in accounting.entries(tmp_path)] == ["x1", "x2"]
    document = json.loads((tmp_path / accounting.ACCOUNT).read_text())
    assert document["version"] == accounting.VERSION
