"""What noisy releases cost: from events to epsilon, from epsilon to noise, and a site's account.

A :class:`Cost` is a release as data: so many sums of clipped units, each unit taken with a
probability, plus Gaussian noise. ``epsilon`` composes costs with the privacy loss distributions of
dp-accounting (Poisson sampling; neighbours differ by one unit added or removed), and ``noise_for``
inverts that.

The account of a site is a file beside its outbox. A cost is entered, and flushed to disk, before
the answer that caused it is kept or sent, under the name of the key that its noise was drawn from:
the same question brings the same key, the same bytes and no second charge, and a process killed
between charge and answer repeats both. The server's account is a copy and decides nothing.
"""

import json
import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from fedkola.errors import BudgetExhausted, BudgetUnreachable, PrivacyError
from fedkola.files import write_private

ACCOUNT = "account.json"
VERSION = 1
LEAST_NOISE, MOST_NOISE = 0.5, 128.0
TOLERANCE = 2e-3
FINE, COARSE = 1e-4, 1e-3
# From the finest to the coarsest: what hides a whole patient also hides each of its records.
UNITS = ("record", "patient", "site")


@dataclass(frozen=True, slots=True, kw_only=True)
class Cost:
    """``count`` releases of a sum over units of norm 1 with Gaussian noise.

    ``noise`` is the standard deviation over the bound on one unit's norm, ``rate`` the probability
    with which a unit is in one sum, independently of the others (1: always).
    """

    unit: str
    noise: float
    rate: float
    count: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Limit:
    """The most that may be spent: (epsilon, delta) for one unit, "record", "patient" or "site"."""

    unit: str
    epsilon: float
    delta: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Entry:
    """One answer that left or is about to: the name of its noise key, run, round and costs."""

    exchange: str
    run: str
    round: int
    costs: tuple[Cost, ...]


def epsilon(costs: Iterable[Cost], *, unit: str, delta: float) -> float:
    """The epsilon of all these releases together for one ``unit`` at ``delta``.

    Infinite if a release protects less than the unit asked for, as one record of a patient, or
    adds no noise. A finer unit is protected by what protects a coarser one.
    """
    merged: Counter[tuple[float, float]] = Counter()
    for cost in costs:
        if cost.count and cost.rate:
            if UNITS.index(cost.unit) < UNITS.index(unit) or cost.noise <= 0:
                return math.inf
            merged[cost.noise, cost.rate] += cost.count
    releases = tuple(sorted((noise, rate, count) for (noise, rate), count in merged.items()))
    return _composed(releases, delta, FINE)


def noise_for(limit: Limit, *, rate: float, count: int) -> float:
    """The least noise multiplier that keeps ``count`` sums at ``rate`` within the limit.

    Found to 0.2 % by a bracket that narrows, and never below. Raises BudgetUnreachable, saying what
    to change, if that takes more than MOST_NOISE.
    """

    def spent(noise: float) -> float:
        # Coarser steps of the loss are ten times as fast, and err to the safe side.
        return _composed(((noise, rate, count),), limit.delta, COARSE)

    if math.isinf(limit.epsilon):
        return LEAST_NOISE
    if spent(MOST_NOISE) > limit.epsilon:
        raise BudgetUnreachable(
            f"epsilon = {limit.epsilon:g} at delta = {limit.delta:g} cannot be kept over {count} "
            f"sums that take a {limit.unit} with probability {rate:.3g}: noise of {MOST_NOISE:g} "
            f"times the clipping bound still costs {spent(MOST_NOISE):.3g}; use more {limit.unit}s,"
            " fewer rounds or steps, a smaller batch, or a larger epsilon"
        )
    # Downwards: distributions of little noise over many sums are long, and slow to compose.
    high = MOST_NOISE
    while (low := high / 2) >= LEAST_NOISE and spent(low) <= limit.epsilon:
        high = low
    if low < LEAST_NOISE:
        return high
    while high / low > 1 + TOLERANCE:
        # Epsilon falls nearly along a power of the noise: guess there, a little to the safe side.
        fall = math.log(spent(low) / spent(high))
        part = math.log(spent(low) / limit.epsilon) / fall if fall else 0.5
        guess = low * (high / low) ** part * (1 + TOLERANCE / 3)
        edge = (high / low) ** 0.02
        middle = min(max(guess, low * edge), high / edge)
        low, high = (low, middle) if spent(middle) <= limit.epsilon else (middle, high)
        if spent(below := max(low, high / (1 + TOLERANCE))) > limit.epsilon:
            low = below
    return high


def require_delta(limit: Limit, units: int) -> None:
    """Raise BudgetUnreachable where delta is so large that publishing a unit would keep it."""
    if limit.delta * units >= 1 or limit.delta <= 0:
        raise BudgetUnreachable(
            f"privacy.delta = {limit.delta:g} promises nothing to {units} {limit.unit}s: to "
            f"publish one of them at random would keep it; set it above 0 and below {1 / units:.2g}"
            f", or bring more {limit.unit}s"
        )


def event(costs: Sequence[Cost]) -> Any:
    """The costs as one DpEvent of dp-accounting."""
    import dp_accounting as dp  # takes a second to import, which a plan without noise should not

    def one(cost: Cost) -> Any:
        gaussian = dp.GaussianDpEvent(cost.noise)
        sampled = gaussian if cost.rate == 1 else dp.PoissonSampledDpEvent(cost.rate, gaussian)
        return dp.SelfComposedDpEvent(sampled, cost.count)

    return dp.ComposedDpEvent([one(cost) for cost in costs])


# --- the account of a site ------------------------------------------------------------------------


def entries(store: Path) -> tuple[Entry, ...]:
    """Everything this site was charged for. Raises PrivacyError for an account that is damaged."""
    path = store / ACCOUNT
    if not path.exists():
        return ()
    try:
        return _read(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise PrivacyError(
            f"the privacy account {path} cannot be read ({error!r}); restore it from a copy: "
            "nothing is answered from data whose spent budget is unknown"
        ) from error


def spent(store: Path, *, unit: str, delta: float) -> float:
    """The epsilon that this site has spent for one unit."""
    return epsilon(_costs(entries(store)), unit=unit, delta=delta)


def demand(store: Path, limit: Limit, new: Entry) -> None:
    """Raise BudgetExhausted if the account with ``new`` in it would pass the limit.

    An exchange that was charged before costs nothing again.
    """
    held = entries(store)
    if any(entry.exchange == new.exchange for entry in held):
        return
    costs = _costs(held)
    need = epsilon([*costs, *new.costs], unit=limit.unit, delta=limit.delta)
    if need > limit.epsilon:
        before = epsilon(costs, unit=limit.unit, delta=limit.delta)
        raise BudgetExhausted(
            f"round {new.round} of {new.run} would bring this site to epsilon = {need:.4g} for one "
            f"{limit.unit} at delta = {limit.delta:g}; it has spent {before:.4g} of "
            f"{limit.epsilon:.4g}; plan fewer rounds or more noise, or raise the site's limit"
        )


def charge(store: Path, new: Entry) -> None:
    """Enter one exchange, durably; an exchange that stands there already is left as it is.

    Raises PrivacyError if it stands there with another cost.
    """
    held = entries(store)
    for entry in held:
        if entry.exchange == new.exchange:
            if entry.costs != new.costs:
                raise PrivacyError(
                    f"exchange {new.exchange} was charged as {entry.costs} and now costs "
                    f"{new.costs}; one noise serves one release"
                )
            return
    document = {"version": VERSION, "entries": [asdict(entry) for entry in (*held, new)]}
    write_private(store / ACCOUNT, json.dumps(document, indent=1).encode())


# --- private --------------------------------------------------------------------------------------


@lru_cache(maxsize=4096)
def _composed(
    releases: tuple[tuple[float, float, int], ...], delta: float, interval: float
) -> float:
    """The epsilon of (noise, rate, count) releases; pessimistic, as dp-accounting rounds losses up
    to multiples of ``interval``."""
    if not releases:
        return 0.0
    from dp_accounting.pld import PLDAccountant

    costs = [Cost(unit="", noise=s, rate=r, count=n) for s, r, n in releases]
    accountant = PLDAccountant(value_discretization_interval=interval)
    accountant.compose(event(costs))
    return float(accountant.get_epsilon(delta))


def _read(document: Mapping[str, Any]) -> tuple[Entry, ...]:
    if document["version"] != VERSION:
        raise ValueError(f"version {document['version']!r}")
    return tuple(_entry(row) for row in document["entries"])


def _entry(row: Mapping[str, Any]) -> Entry:
    return Entry(
        exchange=str(row["exchange"]),
        run=str(row["run"]),
        round=int(row["round"]),
        costs=tuple(map(_cost, row["costs"])),
    )


def _cost(row: Mapping[str, Any]) -> Cost:
    if row["unit"] not in UNITS:
        raise ValueError(f"unit {row['unit']!r}")
    return Cost(
        unit=row["unit"],
        noise=float(row["noise"]),
        rate=float(row["rate"]),
        count=int(row["count"]),
    )


def _costs(held: Iterable[Entry]) -> list[Cost]:
    return [cost for entry in held for cost in entry.costs]
