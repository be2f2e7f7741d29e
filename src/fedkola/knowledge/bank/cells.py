"""What a bank is made of: cells, modules, labels, fused adapters; names by content."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum

import torch
from torch import Tensor

from fedkola.knowledge.statistics import COUNTS, SUMS
from fedkola.types import Aggregate, Cohort, Scalar


class CellKind(Enum):
    ANALYTIC = "analytic"
    ROUTER = "router"
    LORA = "lora"
    SCATTER = "scatter"


POOL = "scatter"
"""What scatter cells have in place of a module."""


class ModuleState(Enum):
    """A candidate becomes active with its first cell; the version it replaces is superseded then.

    A superseded or retired module has no weight in the present and answers as of earlier times.
    """

    CANDIDATE = "candidate"
    ACTIVE = "active"
    SUPERSEDED = "superseded"
    RETIRED = "retired"
    COMPACTED = "compacted"


class Status(Enum):
    """Where the integers of a cell are: in the bank, nowhere, in cold storage, or gone from it."""

    SEALED = "sealed"
    REVOKED = "revoked"
    ARCHIVED = "archived"
    PURGED = "purged"


@dataclass(frozen=True, slots=True, kw_only=True)
class KnowledgeCell:
    """What a cell is, without its integers. ``words`` is the hash of the exact integer sum.

    ``quality`` holds factors in [0, 1] by name, whose product weighs the cell in every view;
    ``privacy`` the rules it was opened under. ``covers`` names the analytic cells whose records a
    scatter cell sums, ``sources`` the cells that a sum of cells adds up; these stand in
    ``Bank.cold`` meanwhile. ``base`` is the hash of the frozen model, ``deepest`` the records of
    the label that had most when the cell was opened (0 is unknown).
    """

    id: str
    module: str
    kind: CellKind
    round: int
    valid: tuple[float, float | None]
    slot: int | None
    recipe: Mapping[str, Scalar]
    labels: tuple[str, ...]
    cohort: Cohort
    contributors: int
    records: int
    words: str
    quality: Mapping[str, float] = field(default_factory=dict)
    privacy: Mapping[str, Scalar] = field(default_factory=dict)
    status: Status = Status.SEALED
    covers: tuple[str, ...] = ()
    sources: tuple[str, ...] = ()
    base: str = ""
    deepest: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Cell:
    """A sealed sum with everything needed to reuse or undo it."""

    about: KnowledgeCell
    total: Aggregate


@dataclass(frozen=True, slots=True, kw_only=True)
class KnowledgeModule:
    """A unit of knowledge: the cells of one version of one scope; owns a slot of the pinned basis.

    ``access`` names the sites that may hold it (empty is all). ``half_life`` is in rounds; None
    takes that of the view's rule. ``closed`` is the round in which it was superseded or retired,
    ``valid_to`` the world time (in rounds) from which it no longer holds. A compacted module has
    given its slot away, as its LoRA cells answer from a fused adapter.
    """

    id: str
    scope: str
    slot: int | None
    opened: int
    state: ModuleState = ModuleState.ACTIVE
    version: int = 1
    supersedes: str | None = None
    access: tuple[str, ...] = ()
    half_life: float | None = None
    closed: int | None = None
    valid_to: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class LabelEntry:
    """One row of the open label set, with its time of validity in rounds."""

    code: str
    module: str
    valid_from: float
    valid_to: float | None = None
    replaced_by: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class FusedAdapter:
    """One adapter in place of the LoRA cells of several modules: a cache, with its known error.

    It stands for ``sum shares[m] B_m A_m`` over ``modules``, made in ``round`` from ``cells``,
    which are in cold storage; ``adapter`` holds its factors by layer.
    """

    id: str
    modules: tuple[str, ...]
    shares: tuple[float, ...]
    cells: tuple[str, ...]
    slot: int
    round: int
    error: float
    adapter: Mapping[str, Tensor]


@dataclass(frozen=True, slots=True, kw_only=True)
class Bank:
    """``cold`` are cells whose integers are in cold storage, or purged from it."""

    cells: tuple[Cell, ...] = ()
    modules: tuple[KnowledgeModule, ...] = ()
    labels: tuple[LabelEntry, ...] = ()
    revoked: tuple[KnowledgeCell, ...] = ()
    cold: tuple[KnowledgeCell, ...] = ()
    fused: tuple[FusedAdapter, ...] = ()


def cell_id(
    *, module: str, kind: CellKind, round: int, slot: int | None, recipe: Mapping[str, Scalar]
) -> str:
    """The content key of a cell: 16 hex digits of the hash of what it is about."""
    about = {"module": module, "kind": kind.value, "round": round, "slot": slot, **recipe}
    return hashlib.sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()[:16]


def content(labels: Sequence[str], total: Aggregate) -> str:
    """The hash of a cell's integers, as hex.

    Label rows without records are left out: a row that only a removed site had filled is the same
    as a row that was never opened. Cells without rows by label (LoRA) hold their integers alone.
    """
    words = dict(total.words)
    whole = hashlib.sha256()
    filled: list[str] = []
    if COUNTS in words:
        kept = torch.nonzero(words[COUNTS]).flatten()
        filled = [labels[int(i)] for i in kept]
        words |= {COUNTS: words[COUNTS][kept], SUMS: words[SUMS][kept]}
    whole.update(json.dumps(filled).encode())
    for name in sorted(words):
        value = words[name]
        whole.update(f"{name}|{value.dtype}|{tuple(value.shape)}|".encode())
        whole.update(value.contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return whole.hexdigest()


def scope(about: KnowledgeCell) -> str:
    """The scope of a cell's module; scatter cells have none and give ``POOL``."""
    return about.module.rsplit("@", 1)[0]


def cell_bytes(cell: Cell) -> int:
    """Bytes of a cell's integers."""
    return sum(_nbytes(value) for value in cell.total.words.values())


def _nbytes(value: Tensor) -> int:
    return value.numel() * value.element_size()


def is_open(module: KnowledgeModule) -> bool:
    """Whether new cells may join the module."""
    return module.state not in (ModuleState.SUPERSEDED, ModuleState.RETIRED)
