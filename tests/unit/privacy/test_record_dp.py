"""DP-SGD at one site: what it samples, adds, divides by, refuses and is charged for."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy import stats
from torch import Tensor

from fedkola.errors import BudgetExhausted, BudgetUnreachable, DataError, GuardMissing, PrivacyError
from fedkola.privacy import accounting
from fedkola.privacy.answering import Answering
from fedkola.privacy.guards import spec
from fedkola.privacy.record_dp import RecordDP
from fedkola.types import Broadcast, Grid, Update, Weights

GRID = Grid(word=32, bits=32, scale={"weight": 0})
UNITS = [[[unit, row] for row in range(6)] for unit in range(400)]


def guard(**values: Any) -> RecordDP:
    given = {
        "unit": "patient",
        "epsilon": 1.0,
        "delta": 1e-4,
        "clip": 0.5,
        "batch": 40,
        "steps": 20,
        **values,
    }
    return RecordDP(**given)


def asked(*guards: RecordDP, round: int = 1) -> Broadcast:
    return Broadcast(
        run="r",
        round=round,
        step="train",
        tensors={},
        grid=GRID,
        algorithm={},
        guards=tuple(map(spec, guards)),
    )


def answering(store: Path, *guards: RecordDP, round: int = 1, **values: Any) -> Answering:
    question = asked(*(guards or (guard(),)), round=round)
    return Answering(question, store=store, key=store / f"q{round}.key", **values)


def ones(weights: Weights, units: Sequence[Any], seed: int) -> Mapping[str, Tensor]:
    """A sum in which every unit has the gradient (1, 0, 0, ...) cut to the bound of 0.5."""
    total = torch.zeros(5_000, dtype=torch.float64)
    total[0] = 0.5 * len(units)
    return {"w": total}


def test_a_step_is_the_clipped_sum_with_noise_over_the_expected_count(tmp_path):
    # Under a key of its own the test meets or misses its thresholds for good.
    (tmp_path / "q1.key").write_bytes(bytes(range(32)))
    noisy = answering(tmp_path).gradient(UNITS, 3, ones)
    found = [noisy({}, None, step)["w"].numpy() for step in range(3)]
    sigma = guard().noise(len(UNITS)) * 0.5 / 40
    for values in found:
        assert stats.kstest(values[1:] / sigma, "norm").pvalue > 1e-3
    # Other steps have other noise.
    assert abs(np.corrcoef(found[0][1:], found[1][1:])[0, 1]) < 0.06
    assert found[0][0] == pytest.approx(0.5, abs=0.5)


def test_without_noise_one_unit_more_moves_the_sum_by_exactly_the_bound(tmp_path):
    # Positive control: what the noise has to hide is there.
    heard: list[int] = []

    def summed(weights: Weights, units: Sequence[Any], seed: int) -> Mapping[str, Tensor]:
        heard.append(len(units))
        return ones(weights, units, seed)

    one, other = guard(batch=400), guard(batch=400)
    with_all = answering(tmp_path / "a", one).gradient(UNITS, 1, summed)({}, None, 0)
    without = answering(tmp_path / "b", other).gradient(UNITS[1:], 1, summed)({}, None, 0)
    assert heard == [400, 399]  # at rate 1 everyone is sampled
    clean = [ones({}, UNITS[:n], 0)["w"] for n in heard]
    assert float((clean[0] - clean[1]).norm()) == pytest.approx(0.5)
    # With noise the same difference is far below one standard deviation of it.
    moved = float((with_all["w"] - without["w"])[0])
    assert abs(moved) < 8 * one.noise(399) * 0.5 / 400
    assert one.noise(399) > 1


def test_an_empty_sample_still_makes_a_step(tmp_path):
    seen: list[int] = []

    def summed(weights: Weights, units: Sequence[Any], seed: int) -> Mapping[str, Tensor]:
        seen.append(len(units))
        return ones(weights, units, seed)

    noisy = answering(tmp_path, guard(batch=1, steps=40)).gradient(UNITS, 40, summed)
    found = [noisy({}, None, step)["w"] for step in range(40)]
    assert 0 in seen
    assert all(float(values.norm()) > 0 for values in found)


def test_a_unit_brings_at_most_so_many_sequences_of_its_own(tmp_path):
    def summed(weights: Weights, units: Sequence[Any], seed: int) -> Mapping[str, Tensor]:
        for unit in units:
            assert len(unit) == 4
            assert len({row[0] for row in unit}) == 1
            assert len({row[1] for row in unit}) == 4
        return ones(weights, units, seed)

    noisy = answering(tmp_path).gradient(UNITS, 5, summed)
    for step in range(5):
        noisy({}, None, step)


def test_the_same_question_gets_the_same_noise_and_another_one_never(tmp_path):
    def drawn(store: Path, round: int = 1) -> Tensor:
        return answering(store, round=round).gradient(UNITS, 1, ones)({}, None, 0)["w"]

    assert torch.equal(drawn(tmp_path), drawn(tmp_path))
    assert not torch.equal(drawn(tmp_path), drawn(tmp_path, round=2))
    assert not torch.equal(drawn(tmp_path), drawn(tmp_path / "other"))


def test_one_noise_serves_one_gradient(tmp_path):
    noisy = answering(tmp_path).gradient(UNITS, 2, ones)
    noisy({}, None, 0)
    with pytest.raises(PrivacyError, match="one noise serves one gradient"):
        noisy({}, None, 0)


def told(**metrics: float) -> Update:
    return Update(client="a", tensors={"w": torch.zeros(2)}, weight=1, metrics=metrics)


def test_an_update_without_noise_does_not_leave(tmp_path):
    with pytest.raises(GuardMissing, match="without the noisy steps"):
        answering(tmp_path).update(told())


def test_a_loss_on_private_text_does_not_leave(tmp_path):
    one = answering(tmp_path)
    noisy = one.gradient(UNITS, 1, ones)
    noisy({}, None, 0)
    noisy.done()
    with pytest.raises(PrivacyError, match="loss"):
        one.update(told(loss=3.0))
    assert one.update(told()).tensors


def test_a_round_costs_its_steps_once(tmp_path):
    for _ in range(2):  # killed before the outbox, answered again
        one = answering(tmp_path)
        noisy = one.gradient(UNITS, 4, ones)
        for step in range(4):
            noisy({}, None, step)
        noisy.done()
        one.update(told())
        one.charge()
    (entry,) = accounting.entries(tmp_path)
    assert entry.costs == (guard().event(len(UNITS), 4),)
    assert (entry.run, entry.round) == ("r", 1)


def run_rounds(store: Path, rounds: int, **values: Any) -> int:
    """Rounds of 5 steps until one is refused; how many were answered."""
    for number in range(1, rounds + 1):
        one = answering(store, round=number, **values)
        noisy = one.gradient(UNITS, 5, ones)
        for step in range(5):
            noisy({}, None, step)
        noisy.done()
        one.charge()
    return rounds


def test_all_steps_of_the_run_fit_the_budget_and_not_one_round_more(tmp_path):
    assert run_rounds(tmp_path, 4) == 4  # guard().steps = 20
    used = accounting.spent(tmp_path, unit="patient", delta=1e-4)
    assert 0.97 < used <= 1.0
    with pytest.raises(BudgetExhausted, match="round 5 of r"):
        answering(tmp_path, round=5).gradient(UNITS, 5, ones)
    assert accounting.spent(tmp_path, unit="patient", delta=1e-4) == used


def test_a_site_with_a_smaller_budget_of_its_own_stops_earlier(tmp_path):
    with pytest.raises(BudgetExhausted):
        run_rounds(tmp_path, 4, budget=0.75)
    answered = len(accounting.entries(tmp_path))
    assert 0 < answered < 4
    assert accounting.spent(tmp_path, unit="patient", delta=1e-4) <= 0.75


def test_a_site_with_few_units_adds_more_noise():
    small, large = guard().noise(200), guard().noise(len(UNITS))
    assert small > 1.5 * large
    # A declared number is the same for all, and bounds what a larger site spends.
    declared = guard(units=200)
    assert declared.noise(len(UNITS)) == declared.noise(200) == small
    assert declared.rate(len(UNITS)) == 0.2


@pytest.mark.parametrize(
    ("values", "held", "error", "says"),
    [
        ({"units": 500}, 400, DataError, "privacy.units"),
        ({}, 0, DataError, "0 patients"),
        ({"delta": 0.01}, 400, BudgetUnreachable, "privacy.delta"),
        ({"epsilon": 0.001, "steps": 10_000}, 400, BudgetUnreachable, "larger epsilon"),
    ],
)
def test_what_cannot_be_promised_is_refused(values, held, error, says):
    with pytest.raises(error, match=says):
        guard(**values).noise(held)


def test_without_a_guard_nothing_is_noted_or_charged(tmp_path):
    question = Broadcast(round=1, step="s", tensors={}, grid=GRID, algorithm={})
    one = Answering(question, store=tmp_path, key=tmp_path / "q.key")
    update = told(loss=1.0)
    assert one.update(update) is update
    one.charge()
    assert not list(tmp_path.iterdir())
    with pytest.raises(GuardMissing):
        one.gradient(UNITS, 1, ones)
