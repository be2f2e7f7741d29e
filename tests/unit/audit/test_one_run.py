"""Empirical epsilon: the bound against its plain form, and games with a known end."""

import math
from dataclasses import replace
from statistics import mean

import numpy as np
import pytest
from scipy import stats
from small_gpt import sentences, small_gpt

from fedkola.audit.one_run import Game, epsilon_at_least, played, tpr_bound
from fedkola.audit.shadow import Recipe
from fedkola.errors import DataError
from fedkola.training import whole
from fedkola.training.model import Foundation, encode
from fedkola.training.whole import Local


@pytest.fixture(scope="module")
def gpt(tmp_path_factory: pytest.TempPathFactory) -> Foundation:
    return small_gpt(tmp_path_factory.mktemp("gpt") / "model", width=16, vocabulary=300)


def test_without_delta_it_is_the_one_sided_bound_of_clopper_and_pearson() -> None:
    for correct, guesses in [(60, 60), (50, 60), (75, 100)]:
        accuracy = stats.beta.ppf(0.05, correct, guesses - correct + 1)
        found = epsilon_at_least(correct, guesses=guesses, canaries=guesses, delta=0.0)
        assert found == pytest.approx(math.log(accuracy / (1 - accuracy)), abs=1e-4)
    assert epsilon_at_least(60, guesses=60, canaries=100, delta=0.0) == pytest.approx(
        -math.log(0.05 ** (-1 / 60) - 1), abs=1e-4
    )
    assert epsilon_at_least(30, guesses=60, canaries=100, delta=0.0) == 0.0


def test_delta_costs_what_the_plain_sum_says() -> None:
    def chance(correct: int, guesses: int, canaries: int, epsilon: float, delta: float) -> float:
        law = stats.binom(guesses, 1 / (1 + math.exp(-epsilon)))
        worst = max(
            (law.cdf(correct - 1) - law.cdf(correct - 1 - i)) / i for i in range(1, correct + 1)
        )
        return float(law.sf(correct - 1) + 2 * canaries * delta * worst)

    found = epsilon_at_least(55, guesses=60, canaries=100, delta=1e-4)
    assert chance(55, 60, 100, found, 1e-4) == pytest.approx(0.05, abs=1e-4)
    assert found < epsilon_at_least(55, guesses=60, canaries=100, delta=0.0)
    assert epsilon_at_least(55, guesses=60, canaries=100, delta=1e-2) < found


def test_randomised_response_is_refuted_below_its_epsilon_and_almost_never_above() -> None:
    chance = np.random.default_rng(0)
    truth = 1.0
    bounds = [
        epsilon_at_least(
            int(chance.binomial(400, 1 / (1 + math.exp(-truth)))),
            guesses=400, canaries=400, delta=0.0,
        )
        for _ in range(200)
    ]  # fmt: skip
    assert mean(bound > truth for bound in bounds) < 0.09
    assert mean(bounds) > 0.7


def test_the_bound_on_true_positives() -> None:
    assert tpr_bound(0.0, 0.0) == pytest.approx(0.01)
    assert tpr_bound(1.0, 1e-5) == pytest.approx(math.e * 0.01 + 1e-5)
    assert tpr_bound(3.0, 1e-5) == pytest.approx(math.exp(3) * 0.01 + 1e-5)
    # Far out the other side binds: 1 - e^-8 (1 - delta - 0.01).
    assert tpr_bound(8.0, 1e-5) == pytest.approx(1 - math.exp(-8) * (0.99 - 1e-5))
    assert tpr_bound(math.inf, 0.0) == 1.0


def test_an_open_training_gives_its_canaries_away_and_an_idle_game_gives_nothing(
    gpt: Foundation,
) -> None:
    before, records = whole.parameters(gpt), encode(gpt, sentences(64, seed=3))
    how = Recipe(steps=6, batch=8, local=Local(lr=1e-3), units=8)
    game = Game(canaries=60, guesses=40)
    correct = played(gpt, before, how, records, game, seed=0)
    assert epsilon_at_least(correct, guesses=40, canaries=60, delta=0.0) > 1.5
    idle = [played(gpt, before, how, records, game, seed=s, planted=False) for s in range(4)]
    assert 0.38 < mean(idle) / 40 < 0.62


def test_private_noise_keeps_guesses_within_its_epsilon(gpt: Foundation) -> None:
    before, records = whole.parameters(gpt), encode(gpt, sentences(64, seed=3))
    how = Recipe(steps=4, batch=8, local=Local(lr=1e-3), units=64, sigma=4.0)
    game = Game(canaries=60, guesses=40)
    correct = [played(gpt, before, how, records, game, seed=s) for s in range(3)]
    assert mean(correct) / 40 < 0.7
    open_correct = played(gpt, before, replace(how, sigma=0.0, units=8), records, game, seed=0)
    assert open_correct > max(correct)


def test_more_right_answers_than_guesses_are_refused() -> None:
    with pytest.raises(DataError, match="correct of"):
        epsilon_at_least(61, guesses=60, canaries=100, delta=0.0)
