"""A4, subspace optimisation: whole sequences moved until all layers find them in their spans.

In the spirit of TIGER (arXiv 2606.18312); ours. Where noise or rounding blurs the spans, no token
alone is told from the others, but a sequence must fit every layer at every place at once. Softmax
weights over the likeliest tokens of each place are moved by first derivatives to minimise

    sum over layers l and places p of log(|x_lp - P_l x_lp| / |x_lp|)

with P_l the weighted projection of spans.py, x_lp what layer l reads, from several random starts
and with a falling temperature; then single tokens are exchanged while that lowers the sum.
"""

import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor, nn

from fedkola.audit import lasts, layers, shadow, trial
from fedkola.audit.dager import read_spans
from fedkola.audit.evidence import Evidence, Known, Sighting, Truth
from fedkola.audit.layers import Projection
from fedkola.audit.scoring import overlap
from fedkola.audit.spans import Span
from fedkola.audit.trial import Recovery
from fedkola.errors import DataError
from fedkola.training.model import Foundation


@dataclass(frozen=True, slots=True, kw_only=True)
class Subspace:
    """``candidates`` tokens a place, ``starts`` restarts of ``steps`` steps of Adam at ``lr``, the
    temperature falling from 1 to ``coldest``; ``depth`` layers; ``passes`` of single exchanges."""

    name: ClassVar[str] = "subspace"
    candidates: int = 64
    starts: int = 8
    steps: int = 300
    lr: float = 0.05
    coldest: float = 0.1
    depth: int = 3
    passes: int = 2
    controls: int = 2
    floor: float = 0.8

    def quick(self) -> "Subspace":
        """The same attack with fewer candidates, starts and steps."""
        return replace(self, candidates=32, starts=4, steps=100, passes=1, controls=1)

    def run(self, seen: Sequence[Sighting], known: Known, truth: Truth) -> Evidence:
        """Attack every sighting. Raises DataError without one or without blocks in the change."""
        began = time.perf_counter()
        return trial.tried(
            self.name,
            seen,
            known,
            truth,
            lambda sighting: self.recover(known.foundation, shadow.undecayed(sighting), known.seed),
            began=began,
            control=trial.Floor(
                metric="place_recall", floor=self.floor, updates=self.controls, share=0.25
            ),
            settings=asdict(self),
        )

    def recover(self, foundation: Foundation, sighting: Sighting, seed: int = 0) -> Recovery:
        """The sequences that fit best, as many as the protocol tells, of one length for all."""
        model = layers.at(foundation, sighting.before)
        layers.require_change(model, sighting.change)
        at = read_spans(model, sighting.change)
        if at[0][0].depth:
            raise DataError(
                "the change leaves out the first attention layer, whose span lists the candidates; "
                "attack one that carries it"
            )
        count = trial.sequences(sighting.protocol, sighting.sites) or 1
        deeper = at[1 : 1 + self.depth] or at
        length = max(2, min(layers.longest(foundation), round(deeper[0][1].rank / count)))
        choices = _choices(model, at[0], length, self.candidates)
        generator = torch.Generator().manual_seed(seed)
        rows = self._moved(model, at[: 1 + self.depth], choices, generator)
        fits = _fits(model, deeper, rows)
        rows, fits = self._exchanged(model, deeper, choices, rows, fits)
        kept: list[tuple[int, ...]] = []
        for i in fits.argsort().tolist():
            row = tuple(rows[i].tolist())
            if all(overlap(row, other) < 0.7 * len(row) for other in kept):
                kept.append(row)
        sequences = tuple(kept[:count])
        if foundation.kind == "causal":
            sequences = lasts.completed(model, sighting.change, sequences, len(sequences))
        return Recovery(sequences=sequences)

    def _moved(
        self,
        model: nn.Module,
        at: Sequence[tuple[Projection, Span]],
        choices: Tensor,
        generator: torch.Generator,
    ) -> Tensor:
        """The token of greatest weight at every place, (starts, T), after descent."""
        table = layers.embedding(model).weight.detach()
        vectors = table[choices]
        logits = torch.randn(self.starts, *choices.shape, generator=generator).mul_(0.5)
        # The list is ordered: its head is likelier.
        logits -= torch.linspace(0, 1, choices.shape[1])
        logits.requires_grad_(True)
        optimiser = torch.optim.Adam([logits], lr=self.lr)
        for step in range(self.steps):
            heat = self.coldest ** (step / max(1, self.steps - 1))
            weights = (logits / heat).softmax(-1)
            mixed = torch.einsum("stc,tcd->std", weights, vectors)
            total = torch.zeros(())
            for projection, span in at:
                read = layers.read(model, projection, vectors=mixed).double()
                total = total + span.residual(read).clamp_min(1e-6).log().mean()
            optimiser.zero_grad()
            total.backward()  # type: ignore[no-untyped-call]
            optimiser.step()
        best = logits.detach().argmax(-1)
        return choices[torch.arange(len(choices)), best]

    def _exchanged(
        self,
        model: nn.Module,
        deeper: Sequence[tuple[Projection, Span]],
        choices: Tensor,
        rows: Tensor,
        fits: Tensor,
    ) -> tuple[Tensor, Tensor]:
        """The better half of the rows, each place taking its best token in turn."""
        order = fits.argsort()[: max(1, len(rows) // 2)]
        rows, fits = rows[order].clone(), fits[order].clone()
        for _ in range(self.passes):
            for i in range(len(rows)):
                for place, tokens in enumerate(choices):
                    tried = rows[i].expand(len(tokens), -1).clone()
                    tried[:, place] = tokens
                    levels = _fits(model, deeper, tried)
                    if float(levels.min()) < float(fits[i]):
                        rows[i], fits[i] = tried[levels.argmin()], levels.min()
        return rows, fits


def _choices(model: nn.Module, first: tuple[Projection, Span], length: int, count: int) -> Tensor:
    """The ``count`` tokens nearest the first span at every place, (T, C), nearest first."""
    projection, span = first
    tokens = torch.arange(layers.embedding(model).num_embeddings)
    alike = not layers.has_positions(model, projection)
    rows = []
    for place in range(1 if alike else length):
        residual = span.residual(layers.tokens_at(model, projection, tokens, place))
        rows.append(residual.argsort()[:count])
    return torch.stack(rows).expand(length, -1)


def _fits(model: nn.Module, deeper: Sequence[tuple[Projection, Span]], rows: Tensor) -> Tensor:
    """Mean log residual over layers and places of each sequence (n, T)."""
    total = torch.zeros(len(rows), dtype=torch.float64)
    for projection, span in deeper:
        read = layers.inputs(model, projection, rows)
        total += span.residual(read).clamp_min(1e-6).log().mean(1)
    return total / len(deeper)
