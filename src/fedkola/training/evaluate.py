"""What a model scores on texts, as sums that add up over sites.

Texts run in passes of equal length, as for embeddings, and losses are added exactly: the figures
do not depend on the order of the texts.
"""

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional

from fedkola.errors import ModelMismatch
from fedkola.training.adapters import adapted, gated, stacked
from fedkola.training.fit import HEAD, ROWS, logits, require_head
from fedkola.training.model import Foundation, encode, encode_answers
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
    foundation: Foundation,
    weights: Weights,
    texts: Sequence[str],
    *,
    scale: float,
    gate: Tensor | None = None,
) -> Tensor:
    """Unit-length mean embeddings (n, width) float32 of an encoder under the adapter in
    ``weights`` (none: the frozen base). ``gate`` as for ``losses``."""

    def read(states: Tensor) -> Tensor:
        return functional.normalize(states.mean(dim=1), dim=1)

    return _by_text(
        foundation, weights, texts, read, scale=scale, width=foundation.width, gate=gate
    )


def perplexity(
    foundation: Foundation,
    weights: Weights,
    texts: Sequence[str],
    *,
    scale: float,
    gate: Tensor | None = None,
    prompts: Sequence[str] = (),
) -> dict[str, float]:
    """Sums over the predicted tokens of a causal model: ``loss`` (nats), ``correct``, ``tokens``.

    Perplexity is exp(loss / tokens). Arguments as for ``losses``.
    """
    found = _predicted(foundation, weights, prompts, texts, scale=scale, gate=gate)
    return {
        name: math.fsum(found[:, column].tolist())
        for column, name in enumerate(("loss", "tokens", "correct"))
    }


def losses(
    foundation: Foundation,
    weights: Weights,
    prompts: Sequence[str],
    texts: Sequence[str],
    *,
    scale: float,
    gate: Tensor | None = None,
) -> Tensor:
    """(n, 2) float64 of a causal model: nats and predicted tokens of each text after its prompt.

    Without prompts texts stand alone. With ``gate`` (n, slots) the adapter in ``weights`` is a
    row of slots and each text weighs them by its own row. Raises Incompatible for an encoder.
    """
    return _predicted(foundation, weights, prompts, texts, scale=scale, gate=gate)[:, :2]


def _predicted(
    foundation: Foundation,
    weights: Weights,
    prompts: Sequence[str],
    texts: Sequence[str],
    *,
    scale: float,
    gate: Tensor | None,
) -> Tensor:
    """(n, 3) float64: nats, tokens predicted, and how many of them are the likeliest."""
    ids, first = encode_answers(foundation, prompts, texts)
    out = torch.zeros(len(ids), 3, dtype=torch.float64)

    def score(model: nn.Module, rows: list[int]) -> None:
        tokens = filled(ids, rows, ROWS)
        with torch.inference_mode():
            found = model(input_ids=tokens, use_cache=False).logits[: len(rows), :-1]
            wanted = tokens[: len(rows), 1:]
            nats = functional.cross_entropy(found.transpose(1, 2), wanted, reduction="none")
            right = found.argmax(dim=2) == wanted
        for place, row in enumerate(rows):
            since = first[row] - 1
            each_nats, each_right = nats[place, since:].tolist(), right[place, since:]
            out[row] = torch.tensor(
                [math.fsum(each_nats), len(each_nats), int(each_right.sum())], dtype=torch.float64
            )

    _run(foundation, weights, ids, score, scale=scale, gate=gate)
    return out


def _run(
    foundation: Foundation,
    weights: Weights,
    ids: Sequence[Sequence[int]],
    score: Callable[[nn.Module, list[int]], None],
    *,
    scale: float,
    gate: Tensor | None,
) -> None:
    """``score`` on every pass of equal lengths, under the adapter or under gated slots."""
    passes = equal_lengths(ids, ROWS)
    if gate is None:
        with adapted(foundation, weights, scale=scale) as base, side_by_side() as each:
            each(lambda rows: score(base, rows), passes)
        return
    a_cat, b_cat = stacked(weights)
    # One gate at a time hangs on the model, so these passes run in turn.
    for rows in passes:
        own = gate[[*rows, *[rows[-1]] * (ROWS - len(rows))]]
        with gated(
            foundation, a_cat, b_cat, scale=scale, slots=gate.shape[1], gate=own, shift=weights
        ) as model:
            score(model, rows)


def _by_text(
    foundation: Foundation,
    weights: Weights,
    texts: Sequence[str],
    read: Callable[[Tensor], Tensor],
    *,
    scale: float,
    width: int,
    gate: Tensor | None = None,
) -> Tensor:
    """What ``read`` makes of each text's hidden states, a row (width,) per text."""
    ids = encode(foundation, texts)
    out = torch.zeros(len(ids), width)

    def score(model: nn.Module, rows: list[int]) -> None:
        with torch.inference_mode():
            states = model(input_ids=filled(ids, rows, ROWS)).last_hidden_state
            out[rows] = read(states)[: len(rows)]

    _run(foundation, weights, ids, score, scale=scale, gate=gate)
    return out
