"""The guards of one question at a site: from the key of its noise to its place in the account.

The order is what makes a charge neither lost nor doubled. The key is on the disk before it is
used; the budget is asked before anything is trained; the account is on the disk before the answer
is kept or sent. A process killed anywhere in between finds the same key, computes the same answer
and enters the same charge, which stands there already.
"""

import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from torch import Tensor

from fedkola.errors import GuardMissing, PrivacyError
from fedkola.privacy import accounting
from fedkola.privacy.accounting import Cost, Entry
from fedkola.privacy.clip import factor
from fedkola.privacy.exchange import Exchange
from fedkola.privacy.guards import Guard, read
from fedkola.privacy.noise import exchange_key
from fedkola.privacy.record_dp import NoisyGradient, RecordDP, Summed
from fedkola.privacy.sampling import Sequences
from fedkola.privacy.sum_dp import PooledDP, SumDP
from fedkola.types import Broadcast, Update, Weights


class Answering:
    """One question under its guards; without guards everything passes as it is.

    ``store`` holds the account of the site, ``key`` is where the noise key of this question lies,
    ``budget`` the epsilon that the site itself allows, whatever the plan does.
    """

    def __init__(
        self, asked: Broadcast, *, store: Path, key: Path, budget: float = math.inf
    ) -> None:
        """Raises GuardMissing for a guard that is unknown here, BudgetExhausted where the noise
        of a sum costs more than is left."""
        self._asked = asked
        self._store = store
        self._budget = budget
        self._guards: list[Guard] = [read(spec) for spec in asked.guards]
        self._exchange = Exchange(key=exchange_key(key)) if self._guards else None
        for guard in self._guards:
            if isinstance(guard, SumDP):
                self._demand(guard, guard.event())

    @property
    def unit(self) -> str:
        """Whose guarantee single gradients are clipped for, "patient" or "record"; "" for none."""
        return next((g.unit for g in self._guards if isinstance(g, RecordDP | PooledDP)), "")

    def shorten(self, norms: Tensor) -> Tensor:
        """What to multiply gradients of single units of these norms by, so that they keep within
        the bound of the guard that clips them."""
        bound = next(g.clip for g in self._guards if isinstance(g, RecordDP | PooledDP))
        return factor(norms, bound)

    def trains_under(self) -> RecordDP | None:
        """The guard that local steps add noise for."""
        return next((guard for guard in self._guards if isinstance(guard, RecordDP)), None)

    def gradient(self, units: Sequence[Sequences], steps: int, summed: Summed) -> NoisyGradient:
        """The noisy gradient of so many steps over these units.

        Raises GuardMissing without such a guard, BudgetExhausted before anything is trained, and
        BudgetUnreachable where no noise keeps the plan's epsilon with so few units.
        """
        guard, exchange = self.trains_under(), self._exchange
        if guard is None or exchange is None:
            raise GuardMissing("no guard of this question adds noise to local steps")
        self._demand(guard, *exchange.costs, guard.event(len(units), steps))
        return NoisyGradient(guard, units, exchange, summed)

    def sampled(self, units: Sequence[Sequences]) -> tuple[list[Sequences], int]:
        """The units of one noisy sum and a seed of it; raises GuardMissing without such a guard."""
        guard = next((guard for guard in self._guards if isinstance(guard, PooledDP)), None)
        if guard is None:
            raise GuardMissing("no guard of this question samples units for a sum")
        return guard.sampled(units, self._known())

    def update(self, update: Update) -> Update:
        """What leaves as real numbers, after the client half of every guard."""
        for guard in self._guards:
            update = guard.client(update, self._asked, self._known())
        return update

    def words(self, words: Weights) -> Weights:
        """What leaves as integers, with the shares of noise that belong to it."""
        for guard in self._guards:
            words = guard.addend(words, self._asked, self._known())
        return words

    def charge(self) -> None:
        """Enter what the answer costs, durably; to be called before the answer is kept."""
        if self._guards:
            accounting.charge(self._store, self._entry(*self._known().costs))

    # --- private ----------------------------------------------------------------------------------

    def _demand(self, guard: RecordDP | SumDP, *costs: Cost) -> None:
        limit = replace(guard.limit, epsilon=min(guard.epsilon, self._budget))
        accounting.demand(self._store, limit, self._entry(*costs))

    def _entry(self, *costs: Cost) -> Entry:
        return Entry(
            exchange=self._known().name,
            run=self._asked.run,
            round=self._asked.round,
            costs=tuple(costs),
        )

    def _known(self) -> Exchange:
        if self._exchange is None:
            raise PrivacyError("this question has no guard, hence no key and no cost")
        return self._exchange
