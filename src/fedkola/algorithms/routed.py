"""How a state of several adapters with heads answers: each text under one of them, or under a mix.

``choice`` (n,) names one part per text, -1 for none; ``gate`` (n, K) weighs all parts, adapters in
one forward pass and heads by the same weights. Heads have one row per node of the reader.
"""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor
from torch.nn import functional

from fedkola.algorithms.window import factors
from fedkola.training.adapters import combine
from fedkola.training.fit import BIAS, HEAD, SHARPNESS
from fedkola.types import Reader, Weights


def scores(
    reader: Reader, parts: Sequence[Weights], choice: Tensor, texts: Sequence[str]
) -> Tensor:
    """Head scores (n, nodes), each text under the part that ``choice`` names; -inf without one."""
    found = torch.full((len(texts), len(reader.nodes)), float("-inf"))
    for part, rows in _groups(choice):
        if part >= 0:
            found[rows] = reader.scores(parts[part], [texts[i] for i in rows])
    return found


def mixed(reader: Reader, parts: Sequence[Weights], gate: Tensor, texts: Sequence[str]) -> Tensor:
    """Head scores (n, nodes) of sum_j g_j head_j on embeddings under sum_j g_j B_j A_j."""
    e = SHARPNESS * reader.embeddings(slots(parts), texts, gate=gate)
    total = torch.zeros(len(texts), len(reader.nodes))
    for weight, part in zip(gate.T, parts, strict=True):
        total += weight[:, None] * functional.linear(e, part[HEAD], part.get(BIAS))
    return total


def losses(
    reader: Reader,
    parts: Sequence[Weights],
    choice: Tensor,
    prompts: Sequence[str],
    texts: Sequence[str],
) -> Tensor:
    """Nats and tokens (n, 2) of texts after their prompts; under the bare base without a part."""
    found = torch.zeros(len(texts), 2, dtype=torch.float64)
    for part, rows in _groups(choice):
        asked = [prompts[i] for i in rows] if prompts else ()
        weights = parts[part] if part >= 0 else {}
        found[rows] = reader.losses(weights, asked, [texts[i] for i in rows])
    return found


def slots(parts: Sequence[Weights]) -> dict[str, Tensor]:
    """One adapter whose slots are these parts, in order."""
    return combine([(factors(part), 1.0) for part in parts])


def _groups(choice: Tensor) -> Iterator[tuple[int, list[int]]]:
    for part in torch.unique(choice).tolist():
        yield part, torch.nonzero(choice == part).flatten().tolist()
