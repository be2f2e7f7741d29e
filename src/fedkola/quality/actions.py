"""What happens to a record: a pure function of evidence, the owner's decisions and the scan.

The owner's decision comes first, then protection of what nobody else can speak about, then the
evidence. Nothing is deleted and no label is changed: a record gets a weight in fifteenths and at
most a proposal. Without an open gate every weight is full.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from fedkola.quality.belief import UNIT
from fedkola.quality.kept import KEEP

MODES = ("off", "report", "filter", "down_weight")
DISAGREES = "LABEL_DISAGREES"
RARE = "RARE_UNVERIFIED"
PROPOSED = 14
"""Fifteenths of belief in another label from which it is proposed (0.93)."""
FULL_RANK = 0.2


@dataclass(frozen=True, slots=True, kw_only=True)
class Scan:
    """What makes findings reproducible. ``noise`` bounds the share of wrong records."""

    id: str
    mode: str
    absorb: bool
    alpha: float
    min_peers: int
    open: bool
    noise: tuple[float, ...]
    trusted: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Evidence:
    """About n records of one site and C labels. ``given`` (n,) are the labels they say, ``ranks``
    (n,) their u, ``scores`` (n,) how far each is believed, ``targets`` (n, C) what they should say,
    in fifteenths; ``near`` (n, C) counts records of other sites around each, by label; ``peers``
    (C,) counts those of other sites by label, 0 where there are too few to be told."""

    records: tuple[str, ...]
    given: Tensor
    ranks: Tensor
    scores: Tensor
    targets: Tensor
    near: Tensor
    peers: Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """About one record; ``code`` "" where there is none. ``proposed`` is the position of a label,
    or -1. ``pinned`` says that the owner decided; ``weight`` is in fifteenths."""

    record: str
    code: str
    action: str
    weight: int
    decided_by: str
    pinned: bool
    rank: float
    proposed: int = -1

    @property
    def acts(self) -> bool:
        """Whether the record counts for less than it did."""
        return self.weight < UNIT


def decide(evidence: Evidence, decisions: Mapping[str, str], scan: Scan) -> tuple[Finding, ...]:
    """One finding per record, in their order. ``decisions`` are the owner's, record -> "keep" or
    "exclude"; they hold whatever the evidence and the mode."""
    given, ranks = evidence.given.tolist(), evidence.ranks.tolist()
    rare = (evidence.peers < scan.min_peers)[evidence.given].tolist()
    others = evidence.targets.clone().scatter_(1, evidence.given[:, None], -1).max(dim=1)
    best, belief = others.indices.tolist(), others.values.tolist()
    known = (evidence.peers >= scan.min_peers).tolist()
    found = []
    for i, record in enumerate(evidence.records):
        flagged = ranks[i] <= scan.alpha
        code = RARE if rare[i] else DISAGREES if flagged else ""
        proposed = -1
        if code == DISAGREES and belief[i] >= PROPOSED and known[best[i]] and best[i] != given[i]:
            proposed = best[i]
        action, weight, by = _action(ranks[i], code, scan)
        if record in decisions:
            by = "owner"
            action, weight = (KEEP, UNIT) if decisions[record] == KEEP else ("exclude", 0)
        found.append(
            Finding(
                record=record,
                code=code,
                action=action,
                weight=weight,
                decided_by=by,
                pinned=record in decisions,
                rank=ranks[i],
                proposed=proposed,
            )
        )
    return tuple(found)


def final_targets(found: tuple[Finding, ...], evidence: Evidence, scan: Scan) -> Tensor:
    """What each record counts for, (n, C) int64: its label times its weight. Where the scan
    absorbs, a record counts for what it is believed to say instead, unless it is protected."""
    size = evidence.targets.shape[1]
    weights = torch.tensor([each.weight for each in found], dtype=torch.int64)
    plain = weights[:, None] * torch.nn.functional.one_hot(evidence.given, size)
    if not (scan.open and scan.absorb and scan.mode in ("filter", "down_weight")):
        return plain
    free = torch.tensor([not each.pinned and each.code != RARE for each in found])
    return torch.where(free[:, None], evidence.targets, plain)


def _action(rank: float, code: str, scan: Scan) -> tuple[str, int, str]:
    if code == RARE:
        return "protect", UNIT, "few peers"
    if not scan.open or scan.mode not in ("filter", "down_weight"):
        return ("flag" if code else KEEP), UNIT, "evidence"
    if scan.mode == "filter":
        return ("filter", 0, "evidence") if code else (KEEP, UNIT, "evidence")
    weight = max(1, round(UNIT * min(1.0, rank / FULL_RANK)))
    return ("down_weight" if weight < UNIT else KEEP), weight, "evidence"
