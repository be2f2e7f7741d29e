"""Greedy answers of a causal model, with a key-value cache and one gate for the whole answer.

Prompts run in passes of equal length, as for embeddings, without padding: an answer does not
depend on which other prompts are asked with it.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fedkola.training.adapters import adapted, gated, stacked
from fedkola.training.model import Foundation, encode_prompts
from fedkola.training.threads import equal_lengths, filled, side_by_side
from fedkola.types import Weights

ROWS = 8


def generate(
    foundation: Foundation,
    weights: Weights,
    prompts: Sequence[str],
    *,
    max_new_tokens: int,
    scale: float,
    gate: Tensor | None = None,
) -> list[str]:
    """The likeliest next token, again and again, until the model's end token or the limit.

    Texts come back without special tokens and without space at either end. With ``gate`` (n,
    slots) the adapter in ``weights`` is a row of slots; a prompt's own row weighs them from its
    first token to the last of its answer, so what the cache holds stays valid. Raises
    Incompatible for an encoder, or if ``max_new_tokens`` leave no room for a prompt.
    """
    ids = encode_prompts(foundation, prompts, room=max_new_tokens)
    answers: list[list[int]] = [[] for _ in ids]

    def answer(model: nn.Module, rows: list[int]) -> None:
        found = _continued(model, filled(ids, rows, ROWS), max_new_tokens, foundation.end)
        for place, row in enumerate(rows):
            tokens = found[place].tolist()
            stop = tokens.index(foundation.end) if foundation.end in tokens else len(tokens)
            answers[row] = tokens[:stop]

    passes = equal_lengths(ids, ROWS)
    if gate is None:
        with adapted(foundation, weights, scale=scale) as base, side_by_side() as each:
            each(lambda rows: answer(base, rows), passes)
    else:
        a_cat, b_cat = stacked(weights)
        for rows in passes:
            own = gate[[*rows, *[rows[-1]] * (ROWS - len(rows))]]
            with gated(
                foundation, a_cat, b_cat, scale=scale, slots=gate.shape[1], gate=own, shift=weights
            ) as model:
                answer(model, rows)
    tokenizer: Any = foundation.tokenizer
    return [tokenizer.decode(row, skip_special_tokens=True).strip() for row in answers]


def _continued(model: nn.Module, tokens: Tensor, limit: int, end: int | None) -> Tensor:
    """The next ``limit`` tokens (rows, limit) at most; fewer if all rows have ended."""
    found: list[Tensor] = []
    ended = torch.zeros(len(tokens), dtype=torch.bool)
    cache: Any = None
    with torch.inference_mode():
        while len(found) < limit and not bool(ended.all()):
            out: Any = model(input_ids=tokens, past_key_values=cache, use_cache=True)
            cache = out.past_key_values
            tokens = out.logits[:, -1].argmax(dim=1, keepdim=True)
            found.append(tokens)
            if end is not None:
                ended |= tokens[:, 0] == end
    if not found:
        return torch.zeros(len(tokens), 0, dtype=torch.int64)
    return torch.cat(found, dim=1)
