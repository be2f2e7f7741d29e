"""The outermost wrapper of every engine: stamps each question, and holds the plan's guards.

A full stack reads ``Guarded(SecureSum(Tap(InProcess(sites))))``. A guard is one privacy step in one
object: what a site does to its update and to its integers before they leave, what the server does
to the sum, and the event that it costs. A question carries its guards by name; a site that does
not know one refuses, and nothing is ever asked or answered without a guard that the plan names.
"""

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import MISSING, asdict, fields, replace
from math import isfinite
from typing import Any, Protocol

from fedkola.errors import GuardMissing, Incompatible, UpdateHidden
from fedkola.plan import Plan
from fedkola.privacy import accounting
from fedkola.privacy.exchange import Exchange
from fedkola.privacy.record_dp import RecordDP
from fedkola.privacy.sum_dp import PooledDP, SiteDP
from fedkola.types import (
    Aggregate,
    Broadcast,
    Clients,
    Cohort,
    Spec,
    Spent,
    Tally,
    Update,
    Weights,
)


class Guard(Protocol):
    """``needs_sum`` says that its guarantee is one of sums, so that single updates stay hidden."""

    @property
    def name(self) -> str: ...
    @property
    def needs_sum(self) -> bool: ...
    def client(self, update: Update, asked: Broadcast, exchange: Exchange) -> Update: ...
    def addend(self, words: Weights, asked: Broadcast, exchange: Exchange) -> Weights: ...
    def server(self, aggregate: Aggregate, asked: Broadcast) -> Aggregate: ...


GUARDS: Mapping[str, type[Any]] = {cls.name: cls for cls in (RecordDP, SiteDP, PooledDP)}


def read(spec: Spec) -> Guard:
    """The guard that a question names. Raises GuardMissing for one that is not in the table, or
    is given other values than it has."""
    name = str(spec.get("name"))
    if name not in GUARDS:
        raise GuardMissing(
            f"the plan asks for the guard {name!r}; this version has {', '.join(sorted(GUARDS))}, "
            "and a run is never started without one it asks for"
        )
    known = {f.name: f for f in fields(GUARDS[name])}
    given = {key: value for key, value in spec.items() if key != "name"}
    odd = set(given) - set(known)
    lacking = {k for k, f in known.items() if f.default is MISSING and k not in given}
    wrong = {k for k in given if k in known and not _fits(given[k], known[k].type)}
    if odd or lacking or wrong:
        raise GuardMissing(
            f"the guard {name} was given {sorted(odd)} too much, {sorted(lacking)} too little and "
            f"{sorted(wrong)} of another type; upgrade the older side"
        )
    guard: Guard = GUARDS[name](**given)
    return guard


def spec(guard: Guard) -> Spec:
    """Name and values: what a question carries of a guard."""
    return {"name": guard.name, **asdict(guard)}  # type: ignore[call-overload]


def demanded(plan: Plan) -> str:
    """The name of the guard that a plan asks for; "" where epsilon is infinite."""
    return f"{plan.privacy.level}_dp" if isfinite(plan.privacy.epsilon) else ""


def of(plan: Plan, releases: int) -> RecordDP | SiteDP | PooledDP | None:
    """The guard that a plan asks for, None where epsilon is infinite. ``releases`` counts the noisy
    steps, or the noisy sums, of the whole run.

    Raises BudgetUnreachable where the plan alone shows that no noise keeps its epsilon, and
    Incompatible for a demand that nothing could meet.
    """
    p = plan.privacy
    if not isfinite(p.epsilon):
        return None
    if p.level == "record":
        record = RecordDP(
            unit=p.unit,
            epsilon=p.epsilon,
            delta=p.delta,
            clip=p.clip,
            batch=plan.pretrain.batch,
            steps=releases,
            units=p.units,
            sequences=p.sequences,
        )
        # Where each site takes its own number of units, each finds its own noise, or refuses.
        return replace(record, sigma=record.noise(p.units)) if p.units else record
    if not p.secure_sum:
        raise Incompatible(
            f'privacy.level = "{p.level}" puts noise into the sum, and without secure aggregation '
            "the server reads addends that carry a share of it alone; set privacy.secure_sum = "
            'true, or privacy.level = "record"'
        )
    if p.level == "pooled" and not p.units:
        raise Incompatible(
            'privacy.level = "pooled" samples the units of all sites at one public rate; set '
            "privacy.units to a number of units that every site has at least"
        )
    whole = SiteDP(
        unit="site",
        epsilon=p.epsilon,
        delta=p.delta,
        clip=p.clip,
        releases=releases,
        absent=p.absent,
        colluders=p.colluders,
    )
    found: SiteDP | PooledDP = whole if p.level == "site" else _pooled(plan, whole)
    accounting.require_delta(found.limit, max(p.units, 2))
    accounting.noise_for(found.limit, rate=found.rate, count=releases)
    return found


def spent(guard: RecordDP | SiteDP | PooledDP, releases: int) -> Spent:
    """The server's copy of the account after so many steps or sums: what a site that took part in
    all of them has spent at most. Where sites keep their number of units to themselves, that is
    the whole of the plan's epsilon at any time."""
    limit = guard.limit
    if isinstance(guard, RecordDP):
        cost = guard.event(guard.units, releases) if guard.units else None
    else:
        cost = guard.event(releases)
    used = limit.epsilon
    if cost is not None:
        used = accounting.epsilon([cost], unit=limit.unit, delta=limit.delta)
    return Spent(unit=limit.unit, epsilon=used, delta=limit.delta)


class Guarded:
    """Clients that stamp run, seed, cohort and guards on every broadcast before it leaves, and
    apply the server half of every guard to each sum."""

    def __init__(self, inner: Clients, *, run: str, seed: int, guards: Sequence[Spec] = ()) -> None:
        self._guards = [read(guard) for guard in guards]
        self._specs = tuple(spec(guard) for guard in self._guards)
        self._inner = inner
        self._run = run
        self._seed = seed

    def roster(self) -> Cohort:
        return self._inner.roster()

    def sum(self, cohort: Cohort, broadcast: Broadcast) -> Aggregate:
        asked = self._stamp(cohort, broadcast)
        found = self._inner.sum(cohort, asked)
        for guard in self._guards:
            found = guard.server(found, asked)
        return found

    def each(self, cohort: Cohort, broadcast: Broadcast) -> Iterator[Update]:
        hidden = [guard.name for guard in self._guards if guard.needs_sum]
        if hidden:
            raise UpdateHidden(
                f"single updates were asked for under {hidden}, whose noise is complete in a sum "
                'alone; use an algorithm that asks for sums, or privacy.level = "record"'
            )
        return self._inner.each(cohort, self._stamp(cohort, broadcast))

    def tally(self) -> Tally:
        return self._inner.tally()

    def _stamp(self, cohort: Cohort, broadcast: Broadcast) -> Broadcast:
        text = f"fedkola/seed/1/{self._seed}/{broadcast.round}/{broadcast.seed}".encode()
        seed = int.from_bytes(hashlib.sha256(text).digest()[:8], "little") >> 2
        return replace(broadcast, run=self._run, seed=seed, cohort=cohort, guards=self._specs)


def _pooled(plan: Plan, like: SiteDP) -> PooledDP:
    p = plan.privacy
    values = {f.name: getattr(like, f.name) for f in fields(like)}
    rate = min(1.0, plan.pretrain.batch / p.units)
    given = {**values, "unit": p.unit, "rate": rate, "units": p.units, "sequences": p.sequences}
    return PooledDP(**given)


def _fits(value: Any, kind: Any) -> bool:
    if kind is float:
        return type(value) in (float, int)
    return type(value) is kind
