"""The outermost wrapper of every engine: stamps each question, and holds the plan's guards.

A full stack reads ``Guarded(SecureSum(InProcess(sites)))``. A guard is one privacy step with both
halves in one object; none ships yet, so a plan that names one is refused, never run without it.
"""

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import replace

from fedkola.errors import GuardMissing
from fedkola.types import Aggregate, Broadcast, Clients, Cohort, Spec, Tally, Update


class Guarded:
    """Clients that stamp run, seed and cohort on every broadcast before it leaves."""

    def __init__(self, inner: Clients, *, run: str, seed: int, guards: Sequence[Spec] = ()) -> None:
        if guards:
            raise GuardMissing(
                f"the plan asks for {[guard.get('name') for guard in guards]}; this version has "
                "no guards, and a run is never started without one it asks for"
            )
        self._inner = inner
        self._run = run
        self._seed = seed

    def roster(self) -> Cohort:
        return self._inner.roster()

    def sum(self, cohort: Cohort, broadcast: Broadcast) -> Aggregate:
        return self._inner.sum(cohort, self._stamp(cohort, broadcast))

    def each(self, cohort: Cohort, broadcast: Broadcast) -> Iterator[Update]:
        return self._inner.each(cohort, self._stamp(cohort, broadcast))

    def tally(self) -> Tally:
        return self._inner.tally()

    def _stamp(self, cohort: Cohort, broadcast: Broadcast) -> Broadcast:
        text = f"fedkola/seed/1/{self._seed}/{broadcast.round}/{broadcast.seed}".encode()
        seed = int.from_bytes(hashlib.sha256(text).digest()[:8], "little") >> 2
        return replace(broadcast, run=self._run, seed=seed, cohort=cohort)
