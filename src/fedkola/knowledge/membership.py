"""Is it gone? Forgotten records against records that no model has ever seen.

A model that has learnt a record scores the record's own label higher than it scores a label of a
record like it. The margin of a record is the score of its label minus the best score of any other
label, at the leaves of the tree; an attacker who guesses "member" above a threshold is measured by
the AUC of margins (Yeom et al., Privacy Risk in Machine Learning, CSF 2018). An AUC of 0.5 is a
view that cannot tell forgotten records from never-seen ones.

A site counts margins in bins, so that what leaves it is a sum. Two controls stand beside every
result: the same records under the view before the removal (a test that cannot see members says
nothing about their absence), and never-seen records against other never-seen ones.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from fedkola.knowledge import views
from fedkola.knowledge.stream import hash_share
from fedkola.knowledge.views import View
from fedkola.types import Dataset

BINS = 1024
GROUPS = 3
"""Rows of a count: forgotten records, and never-seen ones in two halves for the null control."""
LEAST = 32
"""Below this many records of either kind an AUC says nothing, and none is reported."""
_DRAWS = 1000
_BLOCK = 4096


@dataclass(frozen=True, slots=True, kw_only=True)
class Evidence:
    """AUC of forgotten against never-seen records under the view after a removal, with a 95 %
    bootstrap interval; ``before`` is the same under the view before it, ``null`` one half of the
    never-seen records against the other. ``forgotten`` and ``never`` count the records."""

    auc: float
    low: float
    high: float
    before: float
    null: float
    forgotten: int
    never: int


def hold_out(data: Dataset, share: float, *, salt: str = "") -> tuple[Dataset, Dataset]:
    """The records to learn from, and about ``share`` of them to keep from it. A hash of the text
    decides, so that equal texts stay together at every site."""
    out = [hash_share(f"held out {salt} {text}") < share for text in data.texts]
    kept = [i for i, gone in enumerate(out) if not gone]
    return data.take(kept), data.take([i for i, gone in enumerate(out) if gone])


def margins(view: View, z: Tensor, codes: Sequence[str]) -> Tensor:
    """Score of each record's own label minus the best of the others, float32 of shape (n,).

    ``z`` holds integer embeddings (n, d); -inf where the view does not know the label.
    """
    found = torch.full((len(z),), float("-inf"))
    if view.head is None:
        return found
    place = {code: i for i, code in enumerate(view.head.nodes[0])}
    own = torch.tensor([place.get(code, -1) for code in codes], dtype=torch.int64)
    known = torch.nonzero(own >= 0).flatten()
    for rows in torch.split(known, _BLOCK):
        scores = views.scores(view.head, z[rows], 0)
        mine = scores.gather(1, own[rows, None])
        others = scores.scatter(1, own[rows, None], float("-inf"))
        found[rows] = (mine - others.amax(1, keepdim=True))[:, 0]
    return found.nan_to_num(nan=float("-inf"), posinf=float("inf"), neginf=float("-inf"))


def counted(margins: Tensor) -> Tensor:
    """How many margins fall into each bin, int64 of shape (BINS,); the order is kept."""
    clear = margins.to(torch.float64)
    share = torch.where(clear.isfinite(), clear / (1 + clear.abs()), clear.sign())
    bins = ((share + 1) / 2 * BINS).floor().clamp(0, BINS - 1).to(torch.int64)
    return torch.bincount(bins, minlength=BINS)


def auc(members: Tensor, others: Tensor) -> float:
    """P(member scores above other) + P(equal) / 2 from two rows of counts; 0.5 for empty ones."""
    if not int(members.sum()) or not int(others.sum()):
        return 0.5
    return float(_auc(members[None].numpy(), others[None].numpy())[0])


def interval(members: Tensor, others: Tensor, *, seed: int = 0) -> tuple[float, float]:
    """95 % bootstrap interval of the AUC of two rows of counts, neither of them empty."""
    generator = np.random.default_rng(seed)
    drawn = [
        generator.multinomial(int(counts.sum()), counts.numpy() / int(counts.sum()), _DRAWS)
        for counts in (members, others)
    ]
    low, high = np.quantile(_auc(*drawn), [0.025, 0.975])
    return float(low), float(high)


def halves(records: Sequence[str]) -> tuple[list[int], list[int]]:
    """Rows of the two halves of never-seen records; a hash of the record's id decides."""
    first = [i for i, record in enumerate(records) if hash_share(f"half {record}") < 0.5]
    chosen = set(first)
    return first, [i for i in range(len(records)) if i not in chosen]


def evidence(before: Tensor, after: Tensor, *, seed: int = 0) -> Evidence | None:
    """What counts (GROUPS, BINS) under the views before and after say; None if they are few."""
    forgotten, never = after[0], after[1] + after[2]
    sizes = int(forgotten.sum()), int(never.sum())
    if min(sizes) < LEAST:
        return None
    low, high = interval(forgotten, never, seed=seed)
    return Evidence(
        auc=auc(forgotten, never),
        low=low,
        high=high,
        before=auc(before[0], before[1] + before[2]),
        null=auc(after[1], after[2]),
        forgotten=sizes[0],
        never=sizes[1],
    )


def _auc(members: np.ndarray, others: np.ndarray) -> np.ndarray:
    """Row by row; each row counts the same number of records."""
    below = others.cumsum(1) - others / 2
    pairs = members.sum(1).astype(np.float64) * others.sum(1)
    found: np.ndarray = (members * below).sum(1) / pairs
    return found
