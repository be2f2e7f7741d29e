"""Noise that is complete only in a sum: shares, bounds, refusals, and what it costs."""

import hashlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy import stats

from fedkola import wire
from fedkola.errors import (
    BudgetExhausted,
    CohortTooSmall,
    DataError,
    GridOverflow,
    GuardMissing,
    PrivacyError,
    SurvivorsChanged,
    UpdateHidden,
)
from fedkola.privacy import accounting, clip
from fedkola.privacy.answering import Answering
from fedkola.privacy.guards import Guarded, spec
from fedkola.privacy.sum_dp import PooledDP, SiteDP, SumDP
from fedkola.types import Aggregate, Broadcast, Grid, Update

PLACES = 4_000
COHORT = ("a", "b", "c", "d")
GRID = Grid(word=64, bits=64, scale={"weight": 0, "w": 20})


def site_dp(**values: Any) -> SiteDP:
    given = {"unit": "site", "epsilon": 1.0, "delta": 1e-3, "clip": 1.0, "releases": 3, **values}
    return SiteDP(**given)


def pooled_dp(**values: Any) -> PooledDP:
    given = {"rate": 0.5, "units": 10, "unit": "patient", **values}
    return PooledDP(**{"epsilon": 1.0, "delta": 1e-3, "clip": 1.0, "releases": 3, **given})


def asked(guard: SumDP, *, grid: Grid = GRID, round: int = 1) -> Broadcast:
    return Broadcast(
        run="r",
        round=round,
        step="change",
        tensors={},
        grid=grid,
        algorithm={},
        cohort=COHORT,
        guards=(spec(guard),),
    )


def known_key(path: Path) -> Path:
    """A key that a name gives instead of the operating system, where a test judges the draws: a
    threshold is then met or missed for good."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(hashlib.sha256(path.parent.name.encode()).digest())
    return path


def answered(
    store: Path, question: Broadcast, values: torch.Tensor, *, known: bool = False
) -> dict[str, torch.Tensor]:
    key = store / f"{question.round}.key"
    one = Answering(question, store=store, key=known_key(key) if known else key)
    update = one.update(Update(client="a", tensors={"w": values}, weight=1))
    words = one.words(wire.words(update, question.grid, question.cohort))
    one.charge()
    return dict(words)


def test_the_sum_carries_the_noise_of_a_trusted_server_and_an_addend_a_share(tmp_path):
    guard = site_dp()
    replies = [
        answered(tmp_path / name, asked(guard), torch.zeros(PLACES), known=True) for name in COHORT
    ]
    total = sum(words["w"] for words in replies).double().numpy() / 2**20
    reach = 1 + np.sqrt(PLACES) / 2**20
    assert stats.kstest(total / (guard.noise * reach), "norm").pvalue > 1e-3
    alone = replies[0]["w"].double().numpy() / 2**20
    assert stats.kstest(alone / (guard.noise * reach / 2), "norm").pvalue > 1e-3
    assert all(int(words["weight"]) == 1 for words in replies)


def test_noise_is_still_complete_without_those_that_may_be_missing_or_tell(tmp_path):
    guard = site_dp(absent=1, colluders=1)
    assert guard.shares(4) == 2
    two = [
        answered(tmp_path / name, asked(guard), torch.zeros(PLACES), known=True)
        for name in COHORT[:2]
    ]
    total = sum(words["w"] for words in two).double().numpy() / 2**20
    assert np.std(total) == pytest.approx(guard.noise, rel=0.05)
    with pytest.raises(CohortTooSmall, match=r"privacy\.absent"):
        guard.shares(2)


def test_a_change_is_cut_to_the_bound_and_without_noise_it_would_be_read(tmp_path):
    big = torch.full((PLACES,), 3.0)
    question = asked(site_dp())
    words = answered(tmp_path, question, big)["w"].double() / 2**20
    # Positive control: what is hidden has exactly the bound as its norm.
    cut = clip.clip({"w": big}, 1.0)["w"]
    assert float(cut.norm()) == pytest.approx(1.0, rel=1e-5)
    again = answered(tmp_path / "zero", question, torch.zeros(PLACES))["w"].double() / 2**20
    assert float((words - again).norm()) > 10 * float(cut.norm())


def test_the_same_question_has_the_same_noise_and_one_charge(tmp_path):
    first = answered(tmp_path, asked(site_dp()), torch.ones(PLACES))
    assert torch.equal(first["w"], answered(tmp_path, asked(site_dp()), torch.ones(PLACES))["w"])
    assert len(accounting.entries(tmp_path)) == 1
    other = answered(tmp_path, asked(site_dp(), round=2), torch.ones(PLACES))
    assert not torch.equal(first["w"], other["w"])
    assert len(accounting.entries(tmp_path)) == 2


def test_all_sums_of_the_run_fit_and_not_one_more(tmp_path):
    for number in (1, 2, 3):
        answered(tmp_path, asked(site_dp(), round=number), torch.ones(10))
    assert 0.97 < accounting.spent(tmp_path, unit="site", delta=1e-3) <= 1.0
    with pytest.raises(BudgetExhausted, match="round 4"):
        answered(tmp_path, asked(site_dp(), round=4), torch.ones(10))


def test_too_few_addends_are_no_sum():
    guard = site_dp(absent=1)
    question = asked(guard)

    def heard(*names: str) -> Aggregate:
        return Aggregate(cohort=names, words={}, grid=GRID)

    assert guard.server(heard("a", "b", "c"), question).cohort == ("a", "b", "c")
    with pytest.raises(SurvivorsChanged, match=r"privacy\.absent") as refused:
        guard.server(heard("a", "b"), question)
    assert refused.value.code == "noise_short"


@pytest.mark.parametrize(
    ("grid", "error", "says"),
    [
        (Grid(word=64, bits=64, scale={"weight": 0, "w": 1}), GuardMissing, "fractional bits"),
        (Grid(word=16, bits=16, scale={"weight": 0, "w": 12}), GridOverflow, "larger word"),
    ],
)
def test_a_grid_that_cannot_carry_the_noise_is_refused(tmp_path, grid, error, says):
    with pytest.raises(error, match=says):
        answered(tmp_path, asked(site_dp(), grid=grid), torch.zeros(4))


def test_tensors_on_different_grids_are_refused(tmp_path):
    grid = Grid(word=64, bits=64, scale={"weight": 0, "w": 20, "v": 18})
    one = Answering(asked(site_dp(), grid=grid), store=tmp_path, key=tmp_path / "k")
    words = {"w": torch.zeros(2).long(), "v": torch.zeros(2).long()}
    one.update(Update(client="a", tensors={}, weight=1))
    with pytest.raises(GuardMissing, match="one grid for all"):
        one.words(words)


@pytest.mark.parametrize("values", [{"weight": 2}, {"weight": 1, "metrics": {"loss": 1.0}}])
def test_what_the_noise_does_not_cover_does_not_leave(tmp_path, values):
    one = Answering(asked(site_dp()), store=tmp_path, key=tmp_path / "k")
    with pytest.raises(PrivacyError, match="no noise"):
        one.update(Update(client="a", tensors={"w": torch.zeros(2)}, **values))


def test_a_pooled_sum_samples_units_and_is_refused_without_a_sample(tmp_path):
    units = [[[unit, row] for row in range(6)] for unit in range(40)]
    key = known_key(tmp_path / "north" / "k")
    one = Answering(asked(pooled_dp()), store=tmp_path, key=key)
    update = Update(client="a", tensors={"w": torch.zeros(2)}, weight=1)
    with pytest.raises(GuardMissing, match="without clipping single units"):
        one.update(update)
    taken, _ = one.sampled(units)
    assert 8 < len(taken) < 32
    assert all(len(unit) == 4 for unit in taken)
    assert one.update(update) is update
    with pytest.raises(PrivacyError, match="one noise serves one sum"):
        one.sampled(units)
    one.charge()
    (entry,) = accounting.entries(tmp_path)
    assert entry.costs == (pooled_dp().event(),)


def test_a_site_with_fewer_units_than_declared_gives_no_sample(tmp_path):
    one = Answering(asked(pooled_dp()), store=tmp_path, key=tmp_path / "k")
    with pytest.raises(DataError, match=r"privacy\.units"):
        one.sampled([[[1]]] * 9)


def test_single_updates_stay_hidden_where_only_a_sum_has_noise():
    clients = Guarded(object(), run="r", seed=0, guards=(spec(site_dp()),))  # type: ignore[arg-type]
    with pytest.raises(UpdateHidden, match="site_dp"):
        clients.each(COHORT, asked(site_dp()))
