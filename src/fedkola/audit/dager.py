"""A1, the span attack: token by token, which sequences lie in the span of the gradients.

Petrov et al., "DAGER: Exact gradient inversion for large language models" (NeurIPS 2024). With
R_0 the span of what the first attention read, R_1, R_2, ... those of the first MLP, the second
attention and so on (spans.py), and f_l(s, p) what is read there at place p of s:

    1. tokens    v with f_0(v, p) in R_0, for every place p if the model has learned positions
    2. decoders  grow prefixes s by every v left, and keep s + v while f_1(s + v, |s|) is in R_1
       encoders  fill all places of a length at once so that f_1(s, .) is in R_1 everywhere
    3. the last token of a decoder's sequence is read by nobody and only predicted: it is the one
       for which the gradient of the last norm, linear in it, points where the seen one does

"In the span" is an outlier of five robust standard deviations of the log residual among tokens that
cannot all be there; it needs no threshold, and holds for noisy changes as for clean ones, where
residuals fall from 0.5 to 1e-6. Beyond the paper: the MLP, whose errors no attention averages, so
that its span is sharp where that of the second attention is lost in float32; evened rows, weighted
directions under noise, means over several layers, rotary positions and grouped heads, missing
layers, the last token. It needs fewer tokens in the update than the model is wide.
"""

import math
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor, nn

from fedkola.audit import lasts, layers, shadow, trial
from fedkola.audit.evidence import Evidence, Known, Sequences, Sighting, Truth
from fedkola.audit.layers import Projection
from fedkola.audit.scoring import overlap
from fedkola.audit.spans import Span, spans
from fedkola.audit.trial import Recovery
from fedkola.errors import DataError
from fedkola.training.model import Foundation
from fedkola.types import Weights

_RANKED = 12
_CHUNK = 8192
_STRANGERS = 64
_FLOOR = 1e-6
_DECADE = math.log(10)
_NEAR = math.log(100)
_CLEAR = math.log(1e-4)
_BLURRED = 32


@dataclass(frozen=True, slots=True, kw_only=True)
class Dager:
    """``beam`` prefixes are kept, residuals averaged over ``depth`` layers after the first.

    ``outlier`` is in robust standard deviations, ``combinations`` bounds what is tried for one
    length of an encoder's sequence, ``controls`` is the number of updates of the positive control.
    """

    name: ClassVar[str] = "dager"
    beam: int = 64
    depth: int = 3
    outlier: float = 5.0
    combinations: int = 4096
    controls: int = 3
    floor: float = 0.9

    def quick(self) -> "Dager":
        """The same attack with a narrow beam and one update in its control."""
        return replace(self, beam=16, controls=1)

    def run(self, seen: Sequence[Sighting], known: Known, truth: Truth) -> Evidence:
        """Attack every sighting. Raises DataError without one, ModelMismatch for another model."""
        began = time.perf_counter()
        return trial.tried(
            self.name,
            seen,
            known,
            truth,
            lambda sighting: self.recover(known.foundation, shadow.undecayed(sighting)),
            began=began,
            control=trial.Floor(
                metric="exact" if known.foundation.kind == "causal" else "place_recall",
                floor=self.floor if known.foundation.kind == "causal" else 0.75,
                updates=self.controls,
            ),
            settings=asdict(self),
        )

    def recover(self, foundation: Foundation, sighting: Sighting) -> Recovery:
        """The sequences behind one change, likeliest first, and the tokens found."""
        model = layers.at(foundation, sighting.before)
        layers.require_change(model, sighting.change)
        at = read_spans(model, sighting.change)
        search = _Search(
            model=model,
            first=at[0] if at[0][0].depth == 0 else None,
            deeper=self._deeper(at),
            length=layers.longest(foundation),
            attack=self,
        )
        candidates = search.candidates()
        count = trial.sequences(sighting.protocol, sighting.sites)
        if foundation.kind == "causal":
            prefixes = _distinct(search.grown(candidates), count)
            kept = lasts.completed(model, sighting.change, prefixes, count)
        else:
            kept = _distinct(search.filled(candidates, _separator(foundation)), count)
        bag = sorted({int(t) for row in candidates for t in row})
        return Recovery(sequences=kept, bag=tuple(bag) if at[0][0].depth == 0 else ())

    def _deeper(self, at: Sequence[tuple[Projection, Span]]) -> tuple[tuple[Projection, Span], ...]:
        """The layers residuals are averaged over; one is enough where spans are sharp."""
        later = tuple(pair for pair in at if pair[0].depth > 0)
        return later[:1] if all(span.sharp for _, span in later) else later[: self.depth]


def read_spans(model: nn.Module, change: Weights) -> list[tuple[Projection, Span]]:
    """The layers that the change moved and the span of what each read, first layers first."""
    read = [
        (projection, rows)
        for projection in layers.projections(model)
        if (rows := layers.stacked(projection, change)) is not None
    ][:_RANKED]
    if not read:
        raise DataError(
            "the change holds no attention and no MLP of any block: this exchange left all of "
            "them out; attack one that carries them"
        )
    found = spans([rows for _, rows in read])
    return [(projection, span) for (projection, _), span in zip(read, found, strict=True)]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _Search:
    """One change being searched: ``first`` is the layer that reads single tokens, where seen."""

    model: nn.Module
    first: tuple[Projection, Span] | None
    deeper: tuple[tuple[Projection, Span], ...]
    length: int
    attack: Dager

    @property
    def sharp(self) -> bool:
        return all(span.sharp for _, span in self.deeper)

    @property
    def size(self) -> int:
        return layers.embedding(self.model).num_embeddings

    def candidates(self) -> list[Tensor]:
        """Tokens in the first layer's span: a list per place, or one where places are alike."""
        if self.first is None:
            return [torch.arange(self.size)]
        if not layers.has_positions(self.model, self.first[0]):
            return [self._tokens(0)]
        found: list[Tensor] = []
        for place in range(self.length):
            tokens = self._tokens(place)
            if not len(tokens):
                break
            found.append(tokens)
        return found or [torch.empty(0, dtype=torch.long)]

    def _tokens(self, place: int) -> Tensor:
        assert self.first is not None
        projection, span = self.first
        residual = torch.cat(
            [
                span.residual(layers.tokens_at(self.model, projection, part, place))
                for part in torch.split(torch.arange(self.size), _CHUNK)
            ]
        )
        level = _log(residual)
        order = level.argsort()
        least = order[_outlying(level, self.attack.outlier, sharp=span.sharp)[order]]
        kept = least[: _cut(level[least])]
        return kept if span.sharp else kept[:_BLURRED]

    # --- decoders: prefixes --------------------------------------------------------------------

    def grown(self, candidates: list[Tensor]) -> list[tuple[float, tuple[int, ...]]]:
        """Sequences that no token extends any more, with the evidence for each."""
        if not self.deeper or not len(candidates[0]):
            return []
        prefixes = torch.empty((1, 0), dtype=torch.long)
        levels = torch.zeros(1, dtype=torch.float64)
        ended: list[tuple[float, tuple[int, ...]]] = []
        for place in range(self.length):
            here = candidates[min(place, len(candidates) - 1)]
            if len(candidates) > 1 and place >= len(candidates):
                here = here[:0]
            kept = self._extended(prefixes, levels, place, here)
            alive = {row for row, _, _ in kept}
            ended += [
                (-float(levels[row]), tuple(prefixes[row].tolist()))
                for row in range(len(prefixes))
                if row not in alive and place
            ]
            if not kept:
                return ended
            best = sorted(kept, key=lambda item: item[2])[: self.attack.beam]
            prefixes = torch.stack(
                [torch.cat([prefixes[row], torch.tensor([token])]) for row, token, _ in best]
            )
            levels = torch.tensor([level for _, _, level in best], dtype=torch.float64)
        return ended + [
            (-float(level), tuple(row.tolist()))
            for level, row in zip(levels, prefixes, strict=True)
        ]

    def _extended(
        self, prefixes: Tensor, levels: Tensor, place: int, here: Tensor
    ) -> list[tuple[int, int, float]]:
        """(row of the prefix, token, sum of log residuals) of every extension in the span."""
        if not len(here):
            return []
        columns = torch.cat([here, self._strangers(here)]).expand(len(prefixes), -1)
        level = self._levels(prefixes, columns)
        hits: list[tuple[float, int, int]] = []
        for row in range(len(prefixes)):
            run = _run(prefixes[row])
            outlying = _outlying(level[row], self.attack.outlier, sharp=self.sharp)[: len(here)]
            near = level[row, : len(here)] < (float(levels[row]) / place + _NEAR if place else 0.0)
            hits += [
                (float(level[row, i]), row, int(here[i]))
                for i in (outlying & near).nonzero()[:, 0].tolist()
                if int(here[i]) != run
            ]
        hits.sort()
        kept = hits[: _cut(torch.tensor([step for step, _, _ in hits]))]
        return [(row, token, float(levels[row]) + step) for step, row, token in kept]

    def _levels(self, prefixes: Tensor, columns: Tensor) -> Tensor:
        """Mean log residual over the deeper layers, (prefixes, columns)."""
        total = torch.zeros(columns.shape, dtype=torch.float64)
        for projection, span in self.deeper:
            read = layers.extended(self.model, projection, prefixes, columns)
            total += _log(span.residual(read))
        return total / len(self.deeper)

    def _strangers(self, tokens: Tensor) -> Tensor:
        """Other tokens, so that there is a crowd to stand out of."""
        generator = torch.Generator().manual_seed(int(tokens.sum()))
        drawn = torch.randperm(self.size, generator=generator)[: _STRANGERS + len(tokens)]
        return drawn[~torch.isin(drawn, tokens)][:_STRANGERS]

    # --- encoders: all places at once ----------------------------------------------------------

    def filled(
        self, candidates: list[Tensor], separator: int | None
    ) -> list[tuple[float, tuple[int, ...]]]:
        """The best fillings of every length: up to a separator, or as far as tokens were found."""
        if not self.deeper or not len(candidates[0]):
            return []
        lengths = {
            place + 1
            for place, tokens in enumerate(candidates)
            if separator is None or separator in tokens.tolist()
        }
        generator = torch.Generator().manual_seed(len(candidates))
        found: dict[tuple[int, ...], float] = {}
        for length in sorted(lengths | {len(candidates)}):
            choices = list(candidates[:length])
            if separator is not None and separator in choices[-1].tolist():
                choices[-1] = torch.tensor([separator])
            if math.prod(map(len, choices)) <= self.attack.combinations:
                found |= self._fits(torch.cartesian_prod(*choices).reshape(-1, length))
            else:
                found |= self._climbed(choices, generator)
        return [(-level, row) for row, level in found.items()]

    def _fits(self, rows: Tensor) -> dict[tuple[int, ...], float]:
        """The mean log residual of each whole sequence (n, T)."""
        found: dict[tuple[int, ...], float] = {}
        for part in torch.split(rows, max(1, _CHUNK // rows.shape[1])):
            total = torch.zeros(len(part), dtype=torch.float64)
            for projection, span in self.deeper:
                read = layers.inputs(self.model, projection, part)
                total += _log(span.residual(read)).mean(1)
            level = (total / len(self.deeper)).tolist()
            found |= {tuple(row): fit for row, fit in zip(part.tolist(), level, strict=True)}
        return found

    def _climbed(
        self, choices: list[Tensor], generator: torch.Generator
    ) -> dict[tuple[int, ...], float]:
        """Local optima: from random fillings, one place after the other takes its best token."""
        found: dict[tuple[int, ...], float] = {}
        spent = 0
        while spent < self.attack.combinations:
            row = torch.stack([c[torch.randint(len(c), (), generator=generator)] for c in choices])
            level = math.inf
            while True:
                before = level
                for place, tokens in enumerate(choices):
                    if len(tokens) > 1:
                        tried = row.expand(len(tokens), -1).clone()
                        tried[:, place] = tokens
                        fits = self._fits(tried)
                        spent += len(tokens)
                        best = min(fits, key=fits.__getitem__)
                        row, level = torch.tensor(best), fits[best]
                if level >= before:
                    break
            found[tuple(row.tolist())] = level
        return found


def _separator(foundation: Foundation) -> int | None:
    """The token that ends a sequence of an encoder, where its tokenizer has one."""
    found = getattr(foundation.tokenizer, "sep_token_id", None)
    return int(found) if found is not None else None


def _distinct(found: list[tuple[float, tuple[int, ...]]], count: int | None) -> Sequences:
    """Best first; where more than ``count`` are left, none shares 70 % with a better one."""
    ranked = [row for _, row in sorted(found, key=lambda item: -item[0])]
    if count is None or len(ranked) <= count:
        return tuple(ranked)
    kept: list[tuple[int, ...]] = []
    for row in ranked:
        if all(overlap(row, other) < 0.7 * len(row) for other in kept):
            kept.append(row)
    return tuple(kept)


def _cut(ordered: Tensor) -> int:
    """How many of these ascending log residuals stand before a gap of a decade, if one is there."""
    gaps = ordered.diff()
    if not len(gaps) or float(gaps.max()) < _DECADE:
        return len(ordered)
    return int(gaps.argmax()) + 1


def _run(prefix: Tensor) -> int | None:
    """The token that all of two places and more hold, if one does: without learned positions a run
    from the start reads the same vector at every place, so nothing tells where it ends."""
    same = len(prefix) > 1 and bool((prefix == prefix[0]).all())
    return int(prefix[0]) if same else None


def _log(residual: Tensor) -> Tensor:
    """Log residuals; those below float32's own error count as equal."""
    return residual.clamp_min(_FLOOR).log()


def _outlying(level: Tensor, outlier: float, *, sharp: bool) -> Tensor:
    """Which values lie far below the others, by median and median absolute deviation; and in a
    sharp span those that only float32's error keeps from zero, however the others are spread."""
    middle = level.median()
    spread = 1.4826 * (level - middle).abs().median().clamp_min(0.02)
    edge = float(middle - outlier * spread)
    return level < (max(edge, _CLEAR) if sharp else edge)
