"""What is read back from a ledger."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class RunRow:
    """``state`` is new, running, stopped, done or failed; ``round`` the last one committed."""

    id: str
    plan: Mapping[str, Any]
    plan_hash: str
    state: str
    round: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Saved:
    """The last committed round: all that resuming needs."""

    number: int
    state: Mapping[str, Any]
    tensors: Mapping[str, Tensor]
    report: Mapping[str, Any]
    sampler: Mapping[str, Any]
    chain_head: str


@dataclass(frozen=True, slots=True, kw_only=True)
class RoundRow:
    """One round without its tensors; ``committed_at`` in seconds."""

    number: int
    report: Mapping[str, Any]
    sampler: Mapping[str, Any]
    committed_at: float
    chain_head: str


@dataclass(frozen=True, slots=True, kw_only=True)
class EventRow:
    """One knowledge event; ``prev`` and ``hash`` in hex, ``at`` in seconds."""

    seq: int
    round: int
    kind: str
    subject: str
    body: Mapping[str, Any]
    prev: str
    hash: str
    at: float
