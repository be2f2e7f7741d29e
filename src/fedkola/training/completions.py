"""How likely a model finds each of very many completions of one prefix, and what it would say.

The prefix is read once; completions share their contexts, and each context is read once: all
100,000 numbers of five digits have 10,000. Causal models only.
"""

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import Generator, Tensor, nn

from fedkola.errors import DataError, Incompatible
from fedkola.training.model import Foundation
from fedkola.training.whole import Ids, holding
from fedkola.types import Weights

ROWS = 512


def completion_nll(
    foundation: Foundation, weights: Weights, prefix: Ids, completions: Sequence[Ids]
) -> Tensor:
    """(n,) float64: nats of each completion after ``prefix``.

    Raises DataError for an empty prefix or completion, Incompatible for an encoder.
    """
    _check(foundation, prefix, completions)
    found = torch.zeros(len(completions), dtype=torch.float64)
    lengths = torch.tensor([len(ids) for ids in completions])
    with holding(foundation, weights) as model, torch.inference_mode():
        first, cache = _read(model, prefix)
        for length in lengths.unique().tolist():
            rows = (lengths == length).nonzero().flatten()
            wanted = torch.tensor([completions[row] for row in rows.tolist()])
            found[rows] = first[wanted[:, 0]]
            if length > 1:
                contexts, place = wanted[:, :-1].unique(dim=0, return_inverse=True)
                found[rows] += _rest(model, cache, contexts, place, wanted[:, 1:])
    return -found


def sample(
    foundation: Foundation,
    weights: Weights,
    prefix: Ids,
    *,
    length: int,
    count: int = 1,
    top: int = 1,
    generator: Generator | None = None,
) -> list[list[int]]:
    """``count`` continuations of ``length`` tokens, each token drawn from the ``top`` likeliest.

    With ``top`` 1 every one is the greedy continuation.
    """
    _check(foundation, prefix, [[0] * length])
    tokens = torch.tensor([list(prefix)] * count)
    with holding(foundation, weights) as model, torch.inference_mode():
        for _ in range(length):
            inner: Any = model
            logits = inner(input_ids=tokens, use_cache=False).logits[:, -1].float()
            best = logits.topk(min(top, logits.shape[1]), dim=1)
            chosen = torch.multinomial(best.values.softmax(dim=1), 1, generator=generator)
            tokens = torch.cat([tokens, best.indices.gather(1, chosen)], dim=1)
    rows: list[list[int]] = tokens[:, len(prefix) :].tolist()
    return rows


# --- private --------------------------------------------------------------------------------------


def _read(model: nn.Module, prefix: Ids) -> tuple[Tensor, Any]:
    """Log-probabilities of the token after the prefix, and the cache that holds the prefix."""
    out: Any = model(input_ids=torch.tensor([list(prefix)]), use_cache=True)
    return out.logits[0, -1].double().log_softmax(dim=0), out.past_key_values


def _rest(model: nn.Module, cache: Any, contexts: Tensor, place: Tensor, wanted: Tensor) -> Tensor:
    """Log-probability of all tokens but the first; ``place`` is the context of each completion."""
    found = torch.zeros(len(wanted), dtype=torch.float64)
    order = place.argsort(stable=True)
    starts = torch.searchsorted(place[order], torch.arange(len(contexts) + 1))
    for at in range(0, len(contexts), ROWS):
        part = contexts[at : at + ROWS]
        own = copy.deepcopy(cache)
        own.batch_repeat_interleave(len(part))
        out: Any = model(input_ids=part, past_key_values=own, use_cache=True)
        chances = out.logits.float().log_softmax(dim=2)
        rows = order[starts[at] : starts[min(at + ROWS, len(contexts))]]
        seen = chances[place[rows] - at]
        found[rows] = seen.gather(2, wanted[rows].unsqueeze(2))[:, :, 0].double().sum(dim=1)
    return found


def _check(foundation: Foundation, prefix: Ids, completions: Sequence[Ids]) -> None:
    if foundation.kind != "causal":
        raise Incompatible(f"model {foundation.name} is an encoder; it continues no text")
    if not prefix or not completions or not all(completions):
        raise DataError(
            f"a prefix of {len(prefix)} tokens and {len(completions)} completions were given; "
            "expected at least one token in each"
        )
    longest = len(prefix) + max(len(ids) for ids in completions)
    if longest > foundation.max_tokens:
        raise DataError(
            f"prefix and completion have {longest} tokens, the model reads "
            f"{foundation.max_tokens}; give shorter ones or raise model.max_tokens"
        )
