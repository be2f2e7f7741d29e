"""A representation that the sites adapt together, beside the frozen one.

An adapter ``base`` is its factors B alone: A is pinned, slot 0 of an orthogonal basis of its own,
so the mean of B over sites is the mean of the products B A (FFA-LoRA; Sun et al., ICLR 2024). Local
training pulls embeddings to the mean frozen embedding of their node, which stays fixed: sites that
hold different nodes then pull towards one geometry. What enters cells is the frozen embedding with
the adapted one beside it, so that nothing the frozen base tells apart is ever lost.
"""

import hashlib
import math
from collections.abc import Mapping
from dataclasses import replace
from random import Random

import torch
from torch import Tensor

from fedkola.knowledge import basis
from fedkola.knowledge.stream import seeded
from fedkola.types import Dataset, Weights

PREFIX = "base."
SEED = 1 << 40  # Apart from the slots of modules under any seed that a plan may name.


def pinned(targets: Mapping[str, tuple[int, int]], *, rank: int, seed: int) -> dict[str, Tensor]:
    """The factors A that every site makes for itself."""
    return basis.slot(targets, index=0, rank=rank, seed=SEED + seed)


def zero(targets: Mapping[str, tuple[int, int]], *, rank: int) -> dict[str, Tensor]:
    """The factors B of no adaptation."""
    return {f"{layer}.lora_B": torch.zeros(out, rank) for layer, (out, _) in targets.items()}


def whole(base: Weights, targets: Mapping[str, tuple[int, int]], *, seed: int) -> dict[str, Tensor]:
    """A and B of an adapter that is named by its B; empty where there is none."""
    if not base:
        return {}
    rank = next(iter(base.values())).shape[1]
    return {**pinned(targets, rank=rank, seed=seed), **base}


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


def lesson(data: Dataset, *, share: float, shortened: float, seed: int) -> Dataset:
    """A share of the records by seed, some of them shortened to a part of their words.

    Whoever asks is terser than an official description, and words it in another way.
    """
    chance = seeded(seed, "lesson")
    rows = sorted(chance.sample(range(len(data)), math.ceil(share * len(data))))
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
