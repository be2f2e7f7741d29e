"""A representation that the sites adapt together, beside the frozen one.

``base`` is a LoRA adapter of the frozen model, A and B of every target layer, with the scale of all
adapters of the run. What enters cells is the frozen embedding with the adapted one beside it, so
that nothing the frozen base tells apart is ever lost.
"""

import hashlib
from dataclasses import dataclass, replace
from random import Random

import torch
from torch import Tensor

from fedkola.knowledge.basis import A, B
from fedkola.knowledge.stream import seeded
from fedkola.types import Dataset, Weights

PREFIX = "base."


def digest(base: Weights) -> str:
    """16 hex digits that name a base by the bits of its factors."""
    sha = hashlib.sha256(b"fedkola/base/1")
    for name in sorted(base):
        value = base[name].to(torch.float32).contiguous()
        sha.update(f"{name}|{tuple(value.shape)}|".encode() + value.numpy().tobytes())
    return sha.hexdigest()[:16]


def carried(base: Weights) -> dict[str, Tensor]:
    """An adapter as tensors of a question."""
    return {PREFIX + name: value for name, value in base.items()}


def split(tensors: Weights) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The adapter that a question carries, and its other tensors."""
    base = {n.removeprefix(PREFIX): v for n, v in tensors.items() if n.startswith(PREFIX)}
    return base, {n: v for n, v in tensors.items() if not n.startswith(PREFIX)}


def anchors(sums: Tensor, counts: Tensor) -> Tensor:
    """Unit-length mean embeddings (C, d) from sums of integer embeddings; zeros without a record.

    A node that nobody holds must not draw anything, so its score is 0 for every text.
    """
    means = sums.to(torch.float32) / counts.clamp(min=1)[:, None].to(torch.float32)
    return torch.nn.functional.normalize(means, dim=1)


def needed(base: Weights, *, energy: float) -> dict[str, Tensor]:
    """The factors of the least rank that keeps this share of the energy |B A|^2 in every layer.

    The best approximation of a layer's product by a rank is its truncated singular value
    decomposition (Eckart and Young, 1936). One adapter has one rank: that of the neediest layer.
    At 1 the factors are returned as they are.
    """
    if energy >= 1:
        return dict(base)
    layers = [name.removesuffix(A) for name in base if name.endswith(A)]
    parts = {x: torch.linalg.svd((base[x + B] @ base[x + A]).double()) for x in layers}
    rank = 1
    for _, sizes, _ in parts.values():
        share = sizes.square().cumsum(0) / sizes.square().sum().clamp(min=1e-30)
        rank = max(rank, min(int((share < energy).sum()) + 1, len(base[layers[0] + A])))
    found = {}
    for layer, (left, sizes, right) in parts.items():
        root = sizes[:rank].sqrt()
        found[layer + B] = (left[:, :rank] * root).float()
        found[layer + A] = (root[:, None] * right[:rank]).float()
    return found


def lesson(data: Dataset, *, share: float, shortened: float, seed: int, site: str) -> Dataset:
    """A share of a site's records by seed, some of them shortened to a part of their words.

    Whoever asks is terser than an official description, and words it in another way.
    """
    chance = seeded(seed, "lesson", site)
    rows = [i for i in range(len(data)) if chance.random() < share]
    chosen = data.take(rows)
    return replace(chosen, texts=tuple(_shorter(text, shortened, chance) for text in chosen.texts))


def _shorter(text: str, share: float, chance: Random) -> str:
    words = text.split()
    if chance.random() >= share or len(words) < 2:
        return text
    kept = max(1, round(len(words) * chance.uniform(0.3, 0.9)))
    return " ".join(words[i] for i in sorted(chance.sample(range(len(words)), kept)))


def beside(frozen: Tensor, adapted: Tensor) -> Tensor:
    """Integer embeddings (n, 2 d): the frozen ones with the adapted ones to their right."""
    return torch.cat([frozen, adapted], dim=1)


@dataclass(frozen=True, slots=True, kw_only=True)
class Adam:
    """Adam's moments (Kingma and Ba, ICLR 2015), kept at the server: it sees whole gradients."""

    first: Weights
    second: Weights
    steps: int = 0

    def step(
        self, weights: Weights, gradients: Weights, *, lr: float
    ) -> tuple[dict[str, Tensor], "Adam"]:
        """The weights one step on, float32, and the moments after it."""
        number = self.steps + 1
        first = {n: 0.9 * self.first[n] + 0.1 * g for n, g in gradients.items()}
        second = {n: 0.99 * self.second[n] + 0.01 * g * g for n, g in gradients.items()}
        moved = {}
        for name, value in weights.items():
            mean = first[name] / (1 - 0.9**number)
            size = (second[name] / (1 - 0.99**number)).sqrt() + 1e-8
            moved[name] = (value.to(torch.float64) - lr * mean / size).to(torch.float32)
        return moved, Adam(first=first, second=second, steps=number)


def adam(weights: Weights) -> Adam:
    zeros = {name: torch.zeros(value.shape, dtype=torch.float64) for name, value in weights.items()}
    return Adam(first=zeros, second=dict(zeros))


def schedule(step: int, steps: int, lr: float) -> float:
    """A rate that rises over a tenth of the steps and falls to nothing at the end."""
    return lr * min(1.0, step / max(1.0, steps / 10)) * (1 - (step - 1) / steps)
