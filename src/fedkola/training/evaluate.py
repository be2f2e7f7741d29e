"""What a model scores on texts, as sums that add up over sites.

Texts run in passes of equal length, as for embeddings, and losses are added exactly: the figures
do not depend on the order of the texts.
"""

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional

from fedkola.errors import Incompatible, ModelMismatch
from fedkola.training.adapters import A, B, adapted, gated
from fedkola.training.fit import HEAD, ROWS, logits, require_head
from fedkola.training.model import Foundation, encode
from fedkola.training.threads import equal_lengths, filled, side_by_side
from fedkola.types import Weights


def classify(
    foundation: Foundation,
    weights: Weights,
    texts: Sequence[str],
    labels: Sequence[int],
    *,
    scale: float,
) -> dict[str, float]:
    """Sums over texts: ``loss`` (cross-entropy in nats), ``correct`` (top-1) and ``count``.

    ``weights`` hold head.weight, perhaps head.bias, and an adapter or none; ``labels`` are rows
    of the head. Raises ModelMismatch and DataError.
    """
    require_head(weights, labels, len(texts))
    found = scores(foundation, weights, texts, scale=scale)
    wanted = torch.tensor(labels, dtype=torch.long)
    losses = functional.cross_entropy(found.double(), wanted, reduction="none")
    return {
        "loss": math.fsum(losses.tolist()),
        "correct": float((found.argmax(dim=1) == wanted).sum()),
        "count": float(len(texts)),
    }


def scores(
    foundation: Foundation, weights: Weights, texts: Sequence[str], *, scale: float
) -> Tensor:
    """Class scores (n, classes) float32 of every text, in the order of ``texts``."""
    if HEAD not in weights:
        raise ModelMismatch(f"scores need {HEAD}; the weights hold {sorted(weights)[:5]}")

    def read(states: Tensor) -> Tensor:
        return logits(states, None, weights)

    return _by_text(foundation, weights, texts, read, scale=scale, width=len(weights[HEAD]))


def embeddings(
    foundation: Foundation, weights: Weights, texts: Sequence[str], *, scale: float
) -> Tensor:
    """Unit-length mean embeddings (n, width) float32 of an encoder under the adapter in
    ``weights`` (none: the frozen base)."""

    def read(states: Tensor) -> Tensor:
        return functional.normalize(states.mean(dim=1), dim=1)

    return _by_text(foundation, weights, texts, read, scale=scale, width=foundation.width)


def perplexity(
    foundation: Foundation,
    weights: Weights,
    texts: Sequence[str],
    *,
    scale: float,
    gate: Tensor | None = None,
) -> dict[str, float]:
    """Sums over the predicted tokens of a causal model: ``loss`` (nats), ``correct``, ``tokens``.

    Perplexity is exp(loss / tokens). With ``gate`` (texts, slots) the adapter in ``weights`` is a
    row of slots and each text weighs them by its own row.
    """
    if foundation.kind != "causal":
        raise Incompatible(f"model {foundation.name} is an encoder; it predicts no next token")
    ids = encode(foundation, texts)
    a_cat = {name.removesuffix(A): value for name, value in weights.items() if name.endswith(A)}
    b_cat = {name.removesuffix(B): value for name, value in weights.items() if name.endswith(B)}

    def score(model: nn.Module, rows: list[int]) -> tuple[list[float], int]:
        tokens = filled(ids, rows, ROWS)
        with torch.inference_mode():
            found = model(input_ids=tokens, use_cache=False).logits[: len(rows), :-1]
            wanted = tokens[: len(rows), 1:]
            losses = functional.cross_entropy(found.transpose(1, 2), wanted, reduction="none")
            return losses.flatten().tolist(), int((found.argmax(dim=2) == wanted).sum())

    def score_gated(rows: list[int]) -> tuple[list[float], int]:
        assert gate is not None
        own = gate[[*rows, *[rows[-1]] * (ROWS - len(rows))]]
        with gated(foundation, a_cat, b_cat, scale=scale, slots=gate.shape[1], gate=own) as model:
            return score(model, rows)

    passes = equal_lengths(ids, ROWS)
    if gate is not None:
        # One gate at a time hangs on the model, so these passes run in turn.
        found = [score_gated(rows) for rows in passes]
    else:
        with adapted(foundation, weights, scale=scale) as base, side_by_side() as each:
            found = each(lambda rows: score(base, rows), passes)
    return {
        "loss": math.fsum(loss for losses, _ in found for loss in losses),
        "correct": float(sum(correct for _, correct in found)),
        "tokens": float(sum(len(losses) for losses, _ in found)),
    }


def _by_text(
    foundation: Foundation,
    weights: Weights,
    texts: Sequence[str],
    read: Callable[[Tensor], Tensor],
    *,
    scale: float,
    width: int,
) -> Tensor:
    """What ``read`` makes of each text's hidden states, a row (width,) per text."""
    ids = encode(foundation, texts)
    out = torch.zeros(len(ids), width)

    def run(rows: list[int]) -> None:
        with torch.inference_mode():
            states = model(input_ids=filled(ids, rows, ROWS)).last_hidden_state
            out[rows] = read(states)[: len(rows)]

    with adapted(foundation, weights, scale=scale) as model, side_by_side() as each:
        each(run, equal_lengths(ids, ROWS))
    return out
