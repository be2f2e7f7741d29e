"""What an attack had before it, what it knows beforehand, and what it got: scored, never claimed.

No score stands without both controls. The positive control is the same attack on the same records
with the defence off and must reach its floor, or the attack is broken and counts as not run; the
null is its score against the truth of another update, or on random words of the same shape.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import ClassVar, Protocol

from fedkola.training.model import Foundation
from fedkola.types import Spec, Weights

Sequences = tuple[tuple[int, ...], ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Sighting:
    """One change of weights that an observer could read: of one site, or of a sum.

    ``before`` are the weights of the broadcast, ``change`` how far they moved, as real numbers: for
    a sum its mean over the weight. ``who`` is the site's name, "sum" for a sum of ``sites`` sites.
    ``protocol`` is the algorithm of the broadcast, name and hyper-parameters.
    """

    round: int
    who: str
    sites: int
    before: Weights
    change: Weights
    protocol: Spec


@dataclass(frozen=True, slots=True, kw_only=True)
class Known:
    """What the adversary knows beforehand: the model, public text of its own, a seed."""

    foundation: Foundation
    texts: tuple[str, ...]
    seed: int = 0


Truth = Mapping[tuple[int, str], Sequences]
"""Token ids behind each sighting, by (round, who). It never leaves its site on a real run."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Measure:
    """A score with its 95 % interval, and the score of the null control where there is one."""

    value: float
    low: float
    high: float
    null: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Control:
    """The positive control: ``value`` of ``metric`` with the defence off, and its ``floor``."""

    metric: str
    value: float
    floor: float

    @property
    def passed(self) -> bool:
        return self.value >= self.floor


@dataclass(frozen=True, slots=True, kw_only=True)
class Example:
    """The true text, and what the attacker got; only of public or synthetic records."""

    truth: str
    got: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Evidence:
    """One attack on one kind of target: "single" changes, the "sum", the "model", "transcript"."""

    attack: str
    target: str
    updates: int
    measures: Mapping[str, Measure]
    control: Control
    seconds: float
    examples: tuple[Example, ...] = ()
    notes: str = ""
    settings: Spec = field(default_factory=dict)


class Attack(Protocol):
    """A frozen dataclass of hyper-parameters; one file, one attack."""

    name: ClassVar[str]

    def run(self, seen: Sequence[Sighting], known: Known, truth: Truth) -> Evidence:
        """Attack every sighting; controls included. Raises DataError where nothing can be tried."""
        ...
