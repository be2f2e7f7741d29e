"""DP-SGD in every silo (Abadi et al., CCS 2016): noise at the site, before anything leaves it.

step:  g <- (sum over sampled units of clip(grad of the unit's loss, C) + sigma C z) / batch

Every unit, a patient or a record, is sampled with the same probability ``batch / N``. The divisor
is the expected count and public, so a step without any unit still steps. N is the number of units
that every site is declared to have at least (``units``), or, where that is 0, the site's own, which
is then taken to be no secret. Each site finds its own sigma before its first step, so that all
steps of the run together stay within epsilon: who has few units adds more noise.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from fedkola.errors import BudgetUnreachable, GuardMissing, PrivacyError
from fedkola.privacy import accounting
from fedkola.privacy.accounting import Cost, Limit
from fedkola.privacy.exchange import Exchange
from fedkola.privacy.noise import Stream
from fedkola.privacy.sampling import Sequences, drawn, require_units
from fedkola.types import Aggregate, Broadcast, Update, Weights

Summed = Callable[[Weights, Sequence[Sequences], int], Mapping[str, Tensor]]
"""The sum of the clipped gradients of units at some weights: (weights, units, seed)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RecordDP:
    """``batch`` units are expected in a step, of which a run has ``steps``; each brings up to
    ``sequences`` sequences. ``unit`` is "patient" or "record". ``sigma`` is the noise multiplier
    where ``units`` makes it public; 0 leaves it to each site."""

    name: ClassVar[str] = "record_dp"
    needs_sum: ClassVar[bool] = False
    unit: str
    epsilon: float
    delta: float
    clip: float
    batch: int
    steps: int
    units: int = 0
    sequences: int = 4
    sigma: float = 0.0

    @property
    def limit(self) -> Limit:
        return Limit(unit=self.unit, epsilon=self.epsilon, delta=self.delta)

    def rate(self, held: int) -> float:
        """The probability with which a unit of a site that holds so many is in a step.

        Raises DataError for fewer units than declared, BudgetUnreachable for a delta too large.
        """
        require_units(held, self.units, self.unit)
        accounting.require_delta(self.limit, held)
        return min(1.0, self.batch / (self.units or held))

    def noise(self, held: int) -> float:
        """The noise multiplier of a site that holds so many units.

        Raises BudgetUnreachable, also for a public ``sigma`` that would not keep epsilon.
        """
        if not self.sigma:
            return accounting.noise_for(self.limit, rate=self.rate(held), count=self.steps)
        cost = Cost(unit=self.unit, noise=self.sigma, rate=self.rate(held), count=self.steps)
        need = accounting.epsilon([cost], unit=self.unit, delta=self.delta)
        if need > self.epsilon:
            raise BudgetUnreachable(
                f"{self.steps} steps with noise of {self.sigma:g} cost epsilon = {need:.4g}, and "
                f"the plan promises {self.epsilon:g}; ask with the noise that the plan needs"
            )
        return self.sigma

    def event(self, held: int, steps: int) -> Cost:
        """What so many steps cost one unit of a site that holds so many."""
        return Cost(unit=self.unit, noise=self.noise(held), rate=self.rate(held), count=steps)

    def client(self, update: Update, asked: Broadcast, exchange: Exchange) -> Update:
        """The update as it is, once it is sure that it was made with noise and says no more.

        Raises GuardMissing for tensors that no noisy step made, PrivacyError for metrics, which
        would be computed from private text without noise.
        """
        if update.metrics:
            raise PrivacyError(
                f"step {asked.step!r} answers {sorted(update.metrics)[:3]} without noise; under "
                "a finite privacy.epsilon measure on public text at the server"
            )
        if not exchange.costs:
            raise GuardMissing(
                f"step {asked.step!r} answers without the noisy steps of {self.name}; use an "
                "algorithm that trains under it, or set privacy.epsilon to inf knowingly"
            )
        return update

    def addend(self, words: Weights, asked: Broadcast, exchange: Exchange) -> Weights:
        return words

    def server(self, aggregate: Aggregate, asked: Broadcast) -> Aggregate:
        return aggregate


class NoisyGradient:
    """The gradient of DP-SGD, as training asks for it step by step: (weights, batch, step).

    ``read`` lists the sequences that were sampled, for the site's own eyes.
    """

    def __init__(
        self, guard: RecordDP, units: Sequence[Sequences], exchange: Exchange, summed: Summed
    ) -> None:
        self._guard = guard
        self._units = units
        self._exchange = exchange
        self._summed = summed
        self._rate = guard.rate(len(units))
        self._noise = guard.noise(len(units))
        self._place = len(exchange.costs)
        self.read: list[Sequence[int]] = []
        self._steps: list[int] = []

    def __call__(self, weights: Weights, batch: object, number: int) -> dict[str, Tensor]:
        """The noisy mean gradient, float64 by tensor. ``batch`` is not read: units are sampled
        here. Raises PrivacyError for a step whose noise is used up."""
        if number in self._steps:
            raise PrivacyError(f"step {number} was taken already; one noise serves one gradient")
        self._steps.append(number)
        key, step = self._exchange.key, f"/{self._place}/{number}"
        units, seed = drawn(
            self._units, rate=self._rate, most=self._guard.sequences, key=key, step=step
        )
        self.read += [row for unit in units for row in unit]
        total = self._summed(weights, units, seed)
        source = Stream(key, f"noise{step}")
        size = self._noise * self._guard.clip
        return {
            name: (total[name] + _normal(total[name], source) * size) / self._guard.batch
            for name in sorted(total)
        }

    def done(self) -> None:
        """Note at the exchange what the steps cost."""
        cost = self._guard.event(len(self._units), len(self._steps))
        self._exchange.costs.append(cost)


def _normal(like: Tensor, source: Stream) -> Tensor:
    return torch.from_numpy(source.normals(like.numel())).reshape(like.shape)
