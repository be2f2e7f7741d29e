"""Empirical epsilon from one run: how many of many planted units can be guessed?

Each of 100 random directions joins the training as one more unit, or not, as a coin decides; the
attacker sees the change of the weights and guesses the coins it is surest of. If the training is
(epsilon, delta) private, no guesser is right much more often than e^epsilon / (1 + e^epsilon) of
the time, so many right guesses refute a small epsilon (Steinke, Nasr and Jagielski, Privacy
auditing with one (1) training run, NeurIPS 2023, theorem 5.2). A lower bound at 95 % confidence:
it can refute a claimed epsilon and never prove one.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from scipy.stats import binom
from torch import Generator, Tensor

from fedkola.audit import shadow
from fedkola.audit.shadow import Recipe
from fedkola.errors import DataError
from fedkola.training import whole
from fedkola.training.model import Foundation
from fedkola.training.whole import Ids
from fedkola.types import Weights

LEVEL = 0.05
MOST = 50.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Game:
    """``canaries`` coins, of which ``guesses`` are guessed, half "in" and half "out"."""

    canaries: int = 100
    guesses: int = 60
    exchanges: int = 1


def epsilon_at_least(correct: int, *, guesses: int, canaries: int, delta: float) -> float:
    """The largest epsilon that so many correct guesses refute at 95 % confidence, or 0.

    Raises DataError unless 0 <= correct <= guesses <= canaries.
    """
    if not 0 <= correct <= guesses <= canaries or not guesses:
        raise DataError(
            f"{correct} correct of {guesses} guesses about {canaries} canaries were given; "
            "expected 0 <= correct <= guesses <= canaries"
        )
    low, high = 0.0, MOST
    if _chance(correct, guesses, canaries, low, delta) > LEVEL:
        return 0.0
    while high - low > 1e-6:
        middle = (low + high) / 2
        if _chance(correct, guesses, canaries, middle, delta) > LEVEL:
            high = middle
        else:
            low = middle
    return low


def tpr_bound(epsilon: float, delta: float, *, fpr: float = 0.01) -> float:
    """The highest true positive rate of any membership test at this false positive rate.

    Both e^epsilon FPR + delta and 1 - e^-epsilon (1 - delta - FPR) bound it (Kairouz, Oh and
    Viswanath, ICML 2015).
    """
    if math.isinf(epsilon):
        return 1.0
    first = math.exp(min(epsilon, 700.0)) * fpr + delta
    second = 1 - math.exp(-epsilon) * (1 - delta - fpr)
    return max(0.0, min(first, second, 1.0))


def played(
    foundation: Foundation,
    before: Weights,
    how: Recipe,
    records: Sequence[Ids],
    game: Game,
    *,
    seed: int,
    planted: bool = True,
) -> int:
    """Correct guesses about one training of a site with these records.

    A canary is a unit like any other: of the norm that the protocol allows one, in a step with the
    probability of one. With ``planted`` false none takes part, and guesses are idle.
    """
    generator = torch.Generator().manual_seed(seed)
    size = sum(value.numel() for value in before.values())
    signs = torch.randint(0, 2, (game.canaries, size), generator=generator, dtype=torch.int8)
    directions = _Directions(signs=signs * 2 - 1)
    coins = torch.rand(game.canaries, generator=generator) < 0.5
    taking = coins.nonzero().flatten() if planted else torch.zeros(0, dtype=torch.long)
    after = _trained(foundation, before, how, records, game, directions, taking, generator)
    moved = torch.cat([(before[name] - after[name]).flatten() for name in before])
    scores = directions.along(moved)
    order = scores.argsort(descending=True)
    half = game.guesses // 2
    inside, outside = coins[order[:half]], coins[order[len(order) - (game.guesses - half) :]]
    return int(inside.sum()) + int((~outside).sum())


# --- private --------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class _Directions:
    """Unit vectors as signs (m, size), one byte for each entry."""

    signs: Tensor

    def total(self, rows: Sequence[int], like: Weights) -> dict[str, Tensor]:
        """The sum of these directions by tensor."""
        size = self.signs.shape[1]
        flat = self.signs[list(rows)].sum(dim=0, dtype=torch.float32) / math.sqrt(size)
        parts = torch.split(flat, [value.numel() for value in like.values()])
        return {n: p.view(v.shape) for (n, v), p in zip(like.items(), parts, strict=True)}

    def along(self, vector: Tensor) -> Tensor:
        """(m,) inner products with a vector."""
        return torch.stack([row.float() @ vector for row in self.signs])


def _trained(
    foundation: Foundation,
    before: Weights,
    how: Recipe,
    records: Sequence[Ids],
    game: Game,
    directions: _Directions,
    taking: Tensor,
    generator: Generator,
) -> dict[str, Tensor]:
    rate = min(1.0, how.batch / max(how.units or len(records), 1))

    def gradient(held: Weights, batch: Sequence[Ids], number: int) -> dict[str, Tensor]:
        if how.sigma:
            own = shadow.noisy(foundation, how, held, batch, generator)
        else:
            own = whole.gradient(foundation, held, batch)
        drawn = taking[torch.rand(len(taking), generator=generator) < rate]
        extra = directions.total(drawn.tolist(), held)
        return {name: own[name] + how.bound / how.batch * extra[name] for name in own}

    steps = replace(how, steps=how.steps * game.exchanges, frozen=frozenset())
    batches = shadow.batches(steps, records, generator)
    after, _, _ = whole.train(foundation, before, batches, how.local, gradient=gradient)
    return after


def _chance(correct: int, guesses: int, canaries: int, epsilon: float, delta: float) -> float:
    """The highest probability of so many correct guesses under (epsilon, delta)."""
    accuracy = 1 / (1 + math.exp(-epsilon))
    tail = float(binom.sf(correct - 1, guesses, accuracy))
    if not delta:
        return tail
    below = binom.pmf(np.arange(correct - 1, -1, -1), guesses, accuracy).cumsum()
    worst = float((below / np.arange(1, correct + 1)).max()) if correct else 0.0
    return min(1.0, tail + 2 * canaries * delta * worst)
