"""What an algorithm is built from: the plan, the public catalogue, and the shape of the base."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TypedDict

from fedkola.knowledge.views import Rule
from fedkola.plan import Plan
from fedkola.types import Catalogue


@dataclass(frozen=True, slots=True, kw_only=True)
class Setting:
    """Everything a constructor ``of`` may look at.

    ``level`` is the position of the reported level, ``width`` the size of a hidden state,
    ``targets`` the layers that may carry an adapter, name -> (d_out, d_in). An adapter adds
    ``scale`` B A to its layer; entries of A x are clamped to +-``clip`` in Grams. ``base`` is the
    hash of the frozen model, ``cold`` the folder for cells that no present view reads.
    """

    plan: Plan
    catalogue: Catalogue
    level: int
    width: int
    targets: Mapping[str, tuple[int, int]]
    scale: float
    clip: float
    base: str = ""
    cold: Path | None = None


class Training(TypedDict):
    """How long and how fast sites train, and the level that the rows of the head stand for."""

    epochs: float
    batch: int
    lr: float
    level: int


def training(setting: Setting) -> Training:
    """The hyper-parameters that every method with local training has."""
    a = setting.plan.algorithm
    return Training(epochs=a.epochs, batch=a.batch, lr=a.lr, level=setting.level)


def rule(plan: Plan) -> Rule:
    """How the plan wants views to be read from cells."""
    k = plan.knowledge
    return Rule(
        readout=k.readout,
        lam=k.lam,
        spread=k.spread,
        merge=k.merge,
        merge_lam=k.merge_lam,
        half_life=k.half_life and k.half_life * plan.run.rounds_per_window,
    )
