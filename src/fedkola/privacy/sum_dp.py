"""Noise inside the sum: each site adds a share, and only all shares together are the noise.

share:  a discrete Gaussian of variance (sigma Delta)^2 / (n - absent - colluders), in grid steps
(Kairouz, Liu and Steinke, The distributed discrete Gaussian mechanism, ICML 2021). The sum then
carries what a trusted server would add. Delta is the bound on one unit's norm in steps of the grid
plus the square root of the number of coordinates, since rounding moves each by at most one. A sum
of discrete Gaussians is accounted as a Gaussian: their difference is below 10 n exp(-pi^2 s^2) for
shares of scale s, nothing in float64 at LEAST_SHARE.

``site_dp`` hides a site's whole contribution, its norm bounded here; ``pooled_dp`` hides one unit
of any site, in a sum of clipped gradients of sampled units. A single addend has too little noise:
both need secure aggregation, and a sum that lacks more than ``absent`` of its n addends is refused.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from fedkola.errors import (
    CohortTooSmall,
    GridOverflow,
    GuardMissing,
    PrivacyError,
    SurvivorsChanged,
)
from fedkola.privacy import accounting, clip
from fedkola.privacy.accounting import Cost, Limit
from fedkola.privacy.exchange import Exchange
from fedkola.privacy.noise import Stream, discrete_gaussian
from fedkola.privacy.sampling import Sequences, drawn, require_units
from fedkola.types import Aggregate, Broadcast, Grid, Update, Weights
from fedkola.wire import METRIC, WEIGHT

LEAST_SHARE = 16.0
TAIL = 12.0


@dataclass(frozen=True, slots=True, kw_only=True)
class SumDP:
    """``releases`` sums in a run, each over units that are in it with probability ``rate``. The
    noise is complete though ``absent`` addends are missing and ``colluders`` tell their share."""

    name: ClassVar[str] = ""
    needs_sum: ClassVar[bool] = True
    unit: str
    epsilon: float
    delta: float
    clip: float
    releases: int
    rate: float = 1.0
    absent: int = 0
    colluders: int = 0

    @property
    def limit(self) -> Limit:
        return Limit(unit=self.unit, epsilon=self.epsilon, delta=self.delta)

    @property
    def noise(self) -> float:
        """The noise multiplier of the sum; raises BudgetUnreachable."""
        return accounting.noise_for(self.limit, rate=self.rate, count=self.releases)

    def shares(self, cohort: int) -> int:
        """How many shares make up the noise; raises CohortTooSmall if none is left."""
        found = cohort - self.absent - self.colluders
        if found < 1:
            raise CohortTooSmall(
                f"{cohort} sites are asked, of which privacy.absent = {self.absent} may be missing "
                f"and privacy.colluders = {self.colluders} tell their noise; ask more sites"
            )
        return found

    def event(self, releases: int = 1) -> Cost:
        return Cost(unit=self.unit, noise=self.noise, rate=self.rate, count=releases)

    def client(self, update: Update, asked: Broadcast, exchange: Exchange) -> Update:
        """The update, noted at the exchange. Raises PrivacyError for a weight or a metric that
        the noise does not cover."""
        if update.metrics or update.weight != 1:
            raise PrivacyError(
                f"step {asked.step!r} answers a weight of {update.weight:g} and metrics "
                f"{sorted(update.metrics)[:3]}, which carry no noise; answer weight 1 and none"
            )
        if not exchange.costs:
            exchange.costs.append(self.event())
        return update

    def addend(self, words: Weights, asked: Broadcast, exchange: Exchange) -> Weights:
        """The words with this site's share of noise. Raises GridOverflow where the sum could
        leave its word, and GuardMissing for a grid on which shares are no Gaussian."""
        shares = self.shares(len(asked.cohort))
        scale = self.share(asked.grid, words, shares)
        source = Stream(exchange.key, "share")
        out = dict(words)
        for name in self._noisy(words):
            drawn = discrete_gaussian(scale, words[name].numel(), source)
            whole = words[name].long() + torch.from_numpy(drawn).reshape(words[name].shape)
            _require_room(whole, scale * math.sqrt(shares), len(asked.cohort), asked.grid)
            out[name] = whole.to(words[name].dtype)
        return out

    def server(self, aggregate: Aggregate, asked: Broadcast) -> Aggregate:
        """The sum, if enough shares of noise are in it; raises SurvivorsChanged."""
        least = len(asked.cohort) - self.absent
        if len(aggregate.cohort) < least:
            raise SurvivorsChanged(
                f"{len(aggregate.cohort)} of {len(asked.cohort)} sites answered, and the noise is "
                f"complete from {least} on; the sum is not used: raise privacy.absent, or wait for "
                "more sites and resume",
                code="noise_short",
            )
        return aggregate

    def share(self, grid: Grid, words: Mapping[str, Tensor], shares: int) -> float:
        """The standard deviation of one of so many shares in steps of the grid."""
        names = self._noisy(words)
        scales = {grid.scale[name] for name in names}
        if len(scales) != 1:
            raise GuardMissing(
                f"tensors stand on grids of {sorted(scales)} fractional bits; noise inside the sum "
                "needs one grid for all"
            )
        places = sum(words[name].numel() for name in names)
        reach = self.clip * 2.0 ** scales.pop() + math.sqrt(places)
        scale = self.noise * reach / math.sqrt(shares)
        if scale < LEAST_SHARE:
            raise GuardMissing(
                f"a share of noise has a scale of {scale:.3g} steps of the grid, where "
                f"{LEAST_SHARE:g} are needed to account for it; use more fractional bits"
            )
        return scale

    def _noisy(self, words: Mapping[str, Tensor]) -> list[str]:
        return sorted(n for n in words if n != WEIGHT and not n.startswith(METRIC))


@dataclass(frozen=True, slots=True, kw_only=True)
class SiteDP(SumDP):
    """Hides everything that one site contributed to a sum, whose norm is bounded by ``clip``."""

    name: ClassVar[str] = "site_dp"

    def client(self, update: Update, asked: Broadcast, exchange: Exchange) -> Update:
        # No zero-argument super(): slots make dataclass build the class anew.
        checked = SumDP.client(self, update, asked, exchange)
        return replace(checked, tensors=clip.clip(checked.tensors, self.clip))


@dataclass(frozen=True, slots=True, kw_only=True)
class PooledDP(SumDP):
    """Hides one unit of any site in a sum of clipped gradients of sampled units, each of which
    brings up to ``sequences`` sequences; every site has ``units`` of them at least."""

    name: ClassVar[str] = "pooled_dp"
    units: int = 1
    sequences: int = 4

    def sampled(
        self, units: Sequence[Sequences], exchange: Exchange
    ) -> tuple[list[Sequences], int]:
        """The units of this sum, and a seed for it; the cost is noted at the exchange.

        Raises DataError for fewer units than declared, PrivacyError for a second sample.
        """
        require_units(len(units), self.units, self.unit)
        if exchange.costs:
            raise PrivacyError("a sample was taken already; one noise serves one sum")
        exchange.costs.append(self.event())
        return drawn(units, rate=self.rate, most=self.sequences, key=exchange.key)

    def client(self, update: Update, asked: Broadcast, exchange: Exchange) -> Update:
        """Raises GuardMissing for a sum that was not made of clipped gradients of a sample."""
        if self.event() not in exchange.costs:
            raise GuardMissing(
                f"step {asked.step!r} answers without clipping single units, which {self.name} "
                "needs; ask for client.clipped"
            )
        return SumDP.client(self, update, asked, exchange)


def _require_room(whole: Tensor, total: float, cohort: int, grid: Grid) -> None:
    largest = int(whole.abs().max()) if whole.numel() else 0
    if cohort * largest + TAIL * total > 2 ** (grid.word - 1) - 1:
        raise GridOverflow(
            f"addends up to {largest} from each of {cohort} sites with noise of scale {total:.3g} "
            f"could leave a word of {grid.word} bits; use fewer fractional bits or a larger word",
            code="grid_overflow",
        )
