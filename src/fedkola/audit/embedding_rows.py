"""A2, embedding rows: which tokens were used, from which rows of the embedding table moved how.

Untied, a row of the input table moves only if its token was read, or parallel to itself by weight
decay; the head's rows tell the targets. Tied, or at the head, every row moves a little along a
common direction (the mean state, weighted by the softmax), and rows of tokens that were used stand
out of it (after Melis et al., "Exploiting unintended feature leakage in collaborative learning",
S&P 2019). With learned positions and a single sequence, the row of a place is the error at it, and
the token whose row points the same way stood there.
"""

import math
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from fedkola.audit import layers, trial
from fedkola.audit.evidence import Evidence, Known, Sighting, Truth
from fedkola.audit.trial import Recovery
from fedkola.errors import DataError
from fedkola.training.model import Foundation

_DECADE = math.log(10)
_TINY = 1e-7
_GAP = 0.06


@dataclass(frozen=True, slots=True, kw_only=True)
class EmbeddingRows:
    """``outlier`` is in robust standard deviations; ``untied`` and ``tied`` are the token recalls
    that the positive control must reach."""

    name: ClassVar[str] = "embedding_rows"
    outlier: float = 4.0
    controls: int = 3
    untied: float = 1.0
    tied: float = 0.8

    def quick(self) -> "EmbeddingRows":
        """The same attack with one update in its control."""
        return replace(self, controls=1)

    def run(self, seen: Sequence[Sighting], known: Known, truth: Truth) -> Evidence:
        """Attack every sighting. Raises DataError without one or where no table was sent."""
        began = time.perf_counter()
        floor = self.tied if layers.tied(known.foundation.model) else self.untied
        return trial.tried(
            self.name,
            seen,
            known,
            truth,
            lambda sighting: self.recover(known.foundation, sighting),
            began=began,
            control=trial.Floor(metric="token_recall", floor=floor, updates=self.controls),
            settings=asdict(self),
            metrics=("token_recall", "token_precision", "place_recall"),
        )

    def recover(self, foundation: Foundation, sighting: Sighting) -> Recovery:
        """The tokens used, and for a single sequence with learned positions their places."""
        model = layers.at(foundation, sighting.before)
        layers.require_change(model, sighting.change)
        table, head = layers.embedding_name(model), layers.head_name(model)
        change = sighting.change.get(table)
        if change is None:
            raise DataError(
                f"the change holds no {table}: the embeddings were frozen or not due in this "
                "round; attack one that sends them"
            )
        rows = change.double()
        if head is None or head == table or layers.tied(model):
            used = standing_out(rows, self.outlier)
        else:
            used = moved(rows, sighting.before[table].double())
            if head in sighting.change:
                used = used | standing_out(sighting.change[head].double(), self.outlier)
        bag = used.nonzero()[:, 0]
        places = layers.positions_name(model)
        single = trial.sequences(sighting.protocol, sighting.sites) == 1
        if places is None or not single or places not in sighting.change or not len(bag):
            return Recovery(sequences=(), bag=tuple(bag.tolist()))
        row = placed(rows, bag, sighting.change[places].double())
        return Recovery(sequences=(row,), bag=tuple(bag.tolist()))


def moved(change: Tensor, before: Tensor) -> Tensor:
    """Which rows (V, d) moved other than along themselves, as weight decay moves them all."""
    along = (change * before).sum(1, keepdim=True) / (before**2).sum(1, keepdim=True)
    beside = torch.linalg.vector_norm(change - along.nan_to_num() * before, dim=1)
    # What subtracting two states leaves of rounding.
    floor = _TINY * torch.linalg.vector_norm(before, dim=1).clamp_min(1e-30)
    level = beside.clamp_min(1e-30).log()
    order = level.argsort(descending=True)
    gaps = -level[order].diff()
    still: Tensor = beside <= floor
    if bool(still.any()):
        return ~still
    if not float(gaps.max()) > _DECADE:
        # Every row moved alike, as under noise: nothing is told, so nothing is claimed.
        return still
    found = torch.zeros(len(level), dtype=torch.bool)
    found[order[: int(gaps.argmax()) + 1]] = True
    return found


def prominence(change: Tensor) -> Tensor:
    """How far each row (V, d) lies beside the direction that all rows share, as a logarithm."""
    rows = change.double()
    size = torch.linalg.vector_norm(rows, dim=1, keepdim=True)
    common = (rows / size.clamp_min(1e-30)).median(dim=0).values
    common = common / torch.linalg.vector_norm(common).clamp_min(1e-30)
    beside = rows - (rows @ common)[:, None] * common
    level: Tensor = torch.linalg.vector_norm(beside, dim=1).clamp_min(1e-30).log()
    return level


def standing_out(change: Tensor, outlier: float) -> Tensor:
    """Which rows (V, d) stand out of the direction that all rows share.

    Rows that were used lie above a gap in the order of all rows, wherever a trained model leaves
    the others far apart; without a gap those count that are outliers.
    """
    level = prominence(change)
    order = level.argsort(descending=True)
    half = max(1, len(order) // 2)
    gaps = -level[order].diff()[:half]
    # A gap below many rows is rarer by chance than one between the first few.
    place = int((gaps * torch.arange(1, len(gaps) + 1).sqrt()).argmax()) if len(gaps) else 0
    if len(gaps) and float(gaps[place]) > _GAP:
        found = torch.zeros(len(level), dtype=torch.bool)
        found[order[: place + 1]] = True
        return found
    middle = level.median()
    spread = 1.4826 * (level - middle).abs().median().clamp_min(0.02)
    out: Tensor = level > middle + outlier * spread
    return out


def placed(rows: Tensor, tokens: Tensor, places: Tensor) -> tuple[int, ...]:
    """The token at every place that learned: that whose row (V, d) is most like the place's."""
    size = torch.linalg.vector_norm(places, dim=1)
    count = int((size > 1e-6 * size.max()).nonzero()[-1]) + 1 if float(size.max()) > 0 else 0
    own, other = rows[tokens], places[:count]
    like = torch.nn.functional.normalize(other, dim=1) @ torch.nn.functional.normalize(own, dim=1).T
    return tuple(tokens[like.argmax(1)].tolist())
