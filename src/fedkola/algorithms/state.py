"""What the server keeps between rounds beside the bank, and what the ledger is told of a round."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from torch import Tensor

from fedkola import wire
from fedkola.knowledge import bank as banks
from fedkola.knowledge import novelty, windows
from fedkola.knowledge.bank import Bank
from fedkola.knowledge.calibration import Calibration
from fedkola.knowledge.novelty import Thresholds
from fedkola.types import Aggregate, Catalogue, Cohort, Event, Weights


@dataclass(frozen=True, slots=True, kw_only=True)
class Revision:
    """What a round took back because newer versions had arrived: the old versions of ``records``
    at ``sites`` (all that were asked) in ``places``, (round, scope). ``waiting`` old versions are
    still summed, as fewer than k_min sites have any in their place; ``repeats`` rows changed
    nothing."""

    sites: Cohort = ()
    places: tuple[tuple[int, str], ...] = ()
    records: int = 0
    waiting: int = 0
    repeats: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class State:
    """The bank, its calibration, the scopes that wait for enough sites (scope -> records), and what
    the last round revised.

    ``learnt``, ``usual`` (scope -> labels that agreed, labels asked), ``misfits`` (scope -> windows
    that do not fit it) and ``doubtful`` (labels) are what the sums of the last vote say of windows;
    ``published`` names the view that sites hold.
    """

    bank: Bank = field(default_factory=Bank)
    calibration: Calibration = field(default_factory=Calibration)
    parked: Mapping[str, int] = field(default_factory=dict)
    number: int = 0
    revision: Revision = field(default_factory=Revision)
    base: Mapping[str, Tensor] = field(default_factory=dict)
    consolidated: int = 0
    learnt: Thresholds = field(default_factory=Thresholds)
    usual: Mapping[str, tuple[int, int]] = field(default_factory=dict)
    misfits: Mapping[str, int] = field(default_factory=dict)
    doubtful: tuple[str, ...] = ()
    published: str = ""

    @property
    def weights(self) -> Weights:
        return {}


def heard(state: State, votes: Aggregate, catalogue: Catalogue, *, k_min: int) -> State:
    """The state with what these votes say of windows."""
    scopes, codes = catalogue.scopes(), catalogue.codes()
    right, asked = (votes.words[name].tolist() for name in (windows.RIGHT, windows.ASKED))
    misfits = votes.words[windows.MISFITS].tolist()
    return replace(
        state,
        learnt=novelty.learn(wire.reals(votes)),
        usual={s: (r, a) for s, r, a in zip(scopes, right, asked, strict=True) if a},
        misfits={scope: num for scope, num in zip(scopes, misfits, strict=True) if num},
        doubtful=tuple(codes[i] for i in windows.doubtful(votes.words, k_min=k_min)),
    )


def events(before: State, after: State) -> tuple[Event, ...]:
    """What the ledger records of one round: the difference of two banks, and what waits."""
    parked = tuple(
        {"kind": "PARK", "subject": scope, "body": {"records": records}}
        for scope, records in after.parked.items()
        if before.parked.get(scope) != records
    )
    revised = tuple(
        {"kind": "REVISE", "subject": scope, "body": {"round": round}}
        for round, scope in after.revision.places
        if after.number != before.number
    )
    misfits = tuple(
        {"kind": "MISFIT", "subject": scope, "body": {"windows": num}}
        for scope, num in after.misfits.items()
        if before.misfits.get(scope) != num
    )
    doubts = tuple(
        {"kind": "DOUBT", "subject": code, "body": {"round": after.number}}
        for code in after.doubtful
        if code not in before.doubtful
    )
    found = banks.events(before.bank, after.bank)
    return revised + found + parked + misfits + doubts
