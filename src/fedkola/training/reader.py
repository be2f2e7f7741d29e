"""The frozen base as it is used when a state answers: :class:`fedkola.types.Reader`."""

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from fedkola.training import evaluate
from fedkola.training import generate as generation
from fedkola.training.features import FeatureCache
from fedkola.training.model import Foundation
from fedkola.types import Catalogue, Weights


@dataclass(frozen=True, slots=True, kw_only=True)
class BaseReader:
    """``nodes`` are those of the reported level; ``scale`` multiplies every adapter."""

    catalogue: Catalogue
    nodes: tuple[str, ...]
    foundation: Foundation
    cache: FeatureCache
    scale: float

    def features(self, texts: Sequence[str], *, adapter: Weights | None = None) -> Tensor:
        return self.cache.under(adapter or {}, scale=self.scale).integers(texts)

    def embeddings(
        self, weights: Weights, texts: Sequence[str], *, gate: Tensor | None = None
    ) -> Tensor:
        return evaluate.embeddings(self.foundation, weights, texts, scale=self.scale, gate=gate)

    def scores(self, weights: Weights, texts: Sequence[str]) -> Tensor:
        return evaluate.scores(self.foundation, weights, texts, scale=self.scale)

    def losses(
        self,
        weights: Weights,
        prompts: Sequence[str],
        texts: Sequence[str],
        *,
        gate: Tensor | None = None,
    ) -> Tensor:
        return evaluate.losses(
            self.foundation, weights, prompts, texts, scale=self.scale, gate=gate
        )

    def generate(
        self,
        weights: Weights,
        prompts: Sequence[str],
        *,
        max_new_tokens: int,
        gate: Tensor | None = None,
    ) -> list[str]:
        return generation.generate(
            self.foundation,
            weights,
            prompts,
            max_new_tokens=max_new_tokens,
            scale=self.scale,
            gate=gate,
        )
