"""A5, gradient matching: a sequence moved until its own gradient is the one that was seen.

Deng et al., "TAG: Gradient attack on transformer-based language models" (2021); Balunovic et al.,
"LAMP: Extracting text from gradients with language model priors" (NeurIPS 2022). Softmax weights
over candidate tokens give inputs and targets at every place; Adam lowers the distance of the
gradients of all block matrices to those seen, and then tokens are exchanged, moved and replaced
while distance and the model's own loss, as a prior for language, fall. One short sequence and a
narrow model: it is the baseline, and the span attack is stronger wherever that applies.
"""

import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from fedkola.audit import layers, trial
from fedkola.audit.embedding_rows import prominence
from fedkola.audit.evidence import Evidence, Known, Sighting, Truth
from fedkola.audit.trial import Recovery
from fedkola.errors import DataError, Incompatible
from fedkola.training.model import Foundation


@dataclass(frozen=True, slots=True, kw_only=True)
class Matching:
    """``steps`` of Adam at ``lr`` over ``candidates`` tokens, then ``swaps`` discrete proposals
    under a prior of weight ``prior``; at most ``longest`` tokens and ``widest`` d."""

    name: ClassVar[str] = "matching"
    steps: int = 300
    lr: float = 0.1
    candidates: int = 32
    swaps: int = 200
    prior: float = 0.02
    longest: int = 16
    widest: int = 128
    controls: int = 1
    floor: float = 0.5

    targets: ClassVar[tuple[str, ...]] = ("single",)

    def quick(self) -> "Matching":
        """The same attack with fewer steps and proposals."""
        return replace(self, steps=120, candidates=16, swaps=60)

    def run(self, seen: Sequence[Sighting], known: Known, truth: Truth) -> Evidence:
        """Attack every sighting of one short sequence. Raises DataError if there is none,
        Incompatible for a wide model or an encoder."""
        began = time.perf_counter()
        base = known.foundation
        if base.kind != "causal" or base.width > self.widest:
            raise Incompatible(
                f"a {base.kind} model of width {base.width}; gradient matching is tried on causal "
                f"models of width {self.widest} and less"
            )
        short = [s for s in seen if self._fits(truth.get((s.round, s.who), ()))]
        if not short:
            raise DataError(
                f"no change of one sequence of 3 to {self.longest} tokens was seen; gradient "
                "matching is tried on those alone"
            )
        lengths = {(s.round, s.who): len(truth[(s.round, s.who)][0]) for s in short}
        own = self.longest
        return trial.tried(
            self.name,
            short,
            known,
            truth,
            lambda s: self.recover(base, s, lengths.get((s.round, s.who), own), known.seed),
            began=began,
            control=trial.Floor(
                metric="token_recall",
                floor=self.floor,
                updates=self.controls,
                share=(self.longest + 1) / base.width,
            ),
            settings=asdict(self),
            notes="the length is taken as known",
        )

    def _fits(self, rows: Sequence[Sequence[int]]) -> bool:
        return len(rows) == 1 and 3 <= len(rows[0]) <= self.longest

    def recover(
        self, foundation: Foundation, sighting: Sighting, length: int, seed: int = 0
    ) -> Recovery:
        """One sequence of ``length`` tokens whose gradient is nearest to the change."""
        model = layers.at(foundation, sighting.before)
        layers.require_change(model, sighting.change)
        table = layers.embedding_name(model)
        if table not in sighting.change:
            raise DataError(
                f"the change holds no {table}, whose rows list the candidates; attack one that "
                "sends the embeddings"
            )
        names = [
            name
            for projection in layers.projections(model)
            for name in projection.weights
            if name in sighting.change
        ]
        target = _Target(
            model=model,
            held={n: p.detach().requires_grad_(n in names) for n, p in model.named_parameters()},
            seen={name: sighting.change[name].float() for name in names},
        )
        tokens = prominence(sighting.change[table]).argsort(descending=True)[: self.candidates]
        generator = torch.Generator().manual_seed(seed)
        with sdpa_kernel(SDPBackend.MATH):
            row = self._moved(target, tokens, length, generator)
            row = self._proposed(target, tokens, row, generator)
        return Recovery(sequences=(tuple(row.tolist()),))

    def _moved(
        self, target: "_Target", tokens: Tensor, length: int, generator: torch.Generator
    ) -> Tensor:
        logits = 0.1 * torch.randn(length, len(tokens), generator=generator)
        logits.requires_grad_(True)
        optimiser = torch.optim.Adam([logits], lr=self.lr)
        for _ in range(self.steps):
            distance, _ = target.distance(logits.softmax(-1), tokens, graph=True)
            optimiser.zero_grad()
            (found,) = torch.autograd.grad(distance, [logits])
            logits.grad = found
            optimiser.step()
        return tokens[logits.detach().argmax(-1)]

    def _proposed(
        self, target: "_Target", tokens: Tensor, row: Tensor, generator: torch.Generator
    ) -> Tensor:
        """Exchanges, moves and replacements that lower the score."""

        def drawn(most: int) -> int:
            return int(torch.randint(most, (), generator=generator))

        best = target.score(row, self.prior)
        for number in range(self.swaps):
            other, i, j = row.clone(), drawn(len(row)), drawn(len(row))
            if number % 3 == 0:
                other[[i, j]] = row[[j, i]]
            elif number % 3 == 1:
                rest = torch.cat([row[:i], row[i + 1 :]])
                other = torch.cat([rest[:j], row[i : i + 1], rest[j:]])
            else:
                other[i] = tokens[drawn(len(tokens))]
            score = target.score(other, self.prior)
            if score < best:
                row, best = other, score
        return row


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _Target:
    """The gradients that were seen, and the model that makes such gradients."""

    model: nn.Module
    held: Mapping[str, Tensor]
    seen: Mapping[str, Tensor]

    def distance(self, weights: Tensor, tokens: Tensor, *, graph: bool) -> tuple[Tensor, Tensor]:
        """Mean over tensors of 1 - |cosine| of the gradients, and the loss, for inputs and targets
        that mix ``tokens`` (C,) with ``weights`` (T, C). A sign is the optimiser's."""
        table = layers.embedding(self.model).weight.detach()
        mixed = (weights @ table[tokens])[None]
        call: Any = torch.func.functional_call
        logits = call(self.model, dict(self.held), (), {"inputs_embeds": mixed}).logits[0, :-1]
        loss = -(weights[1:] * logits.log_softmax(-1)[:, tokens]).sum(1).mean()
        wanted = [self.held[name] for name in self.seen]
        found = torch.autograd.grad(loss, wanted, create_graph=graph)
        parts = [
            1 - nn.functional.cosine_similarity(g.flatten(), s.flatten(), dim=0).abs()
            for g, s in zip(found, self.seen.values(), strict=True)
        ]
        return torch.stack(parts).mean(), loss

    def score(self, row: Tensor, prior: float) -> float:
        """The distance of a sequence's gradient, with the model's loss on it as a prior."""
        tokens, places = torch.unique(row, return_inverse=True)
        weights = nn.functional.one_hot(places, len(tokens)).float()
        distance, loss = self.distance(weights, tokens, graph=False)
        return float(distance + prior * loss.detach())
