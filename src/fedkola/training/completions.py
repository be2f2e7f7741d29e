"""How likely a model finds each of very many completions of one prefix, and what it would say.

The prefix is read once; completions share their contexts, and each context is read once: all
100,000 numbers of five digits have 10,000. Causal models only.
"""

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Generator, Tensor, nn

from fedkola.errors import DataError, Incompatible
from fedkola.training.model import Foundation
from fedkola.training.whole import Ids, holding
from fedkola.types import Weights

ROWS = 512


@dataclass(frozen=True, slots=True, kw_only=True)
class _Group:
    """Completions of one length: ``contexts`` are their distinct beginnings, ``place`` says which
    is whose, in ascending order."""

    rows: Tensor
    wanted: Tensor
    contexts: Tensor
    place: Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class Completions:
    """Completions sorted by length and beginning, once for any number of prefixes and models."""

    ids: tuple[tuple[int, ...], ...]
    groups: tuple[_Group, ...]

    @classmethod
    def of(cls, completions: Sequence[Ids]) -> "Completions":
        """Raises DataError unless every completion has a token."""
        if not completions or not all(completions):
            raise DataError(
                f"{len(completions)} completions were given, of at least 0 tokens; give some, and "
                "at least one token in each"
            )
        by_length: dict[int, list[int]] = {}
        for row, ids in enumerate(completions):
            by_length.setdefault(len(ids), []).append(row)
        groups = tuple(_group(completions, rows) for rows in by_length.values())
        return cls(ids=tuple(tuple(ids) for ids in completions), groups=groups)


def completion_nll(
    foundation: Foundation, weights: Weights, prefix: Ids, completions: Completions
) -> Tensor:
    """(n,) float64: nats of each completion after ``prefix``.

    Raises DataError for an empty prefix or one too long, Incompatible for an encoder.
    """
    _check(foundation, prefix, max(group.wanted.shape[1] for group in completions.groups))
    found = torch.zeros(len(completions.ids), dtype=torch.float64)
    with holding(foundation, weights) as model, torch.inference_mode():
        first, cache = _read(model, prefix)
        for group in completions.groups:
            likely = first[group.wanted[:, 0]]
            if group.wanted.shape[1] > 1:
                likely = likely + _rest(model, cache, group)
            found[group.rows] = likely
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
    _check(foundation, prefix, length)
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


def _group(completions: Sequence[Ids], rows: Sequence[int]) -> _Group:
    wanted = torch.tensor([list(completions[row]) for row in rows])
    contexts, place = wanted[:1, :-1], torch.zeros(len(wanted), dtype=torch.long)
    if wanted.shape[1] > 1:
        contexts, place = torch.unique(wanted[:, :-1], dim=0, return_inverse=True)
    order = place.argsort(stable=True)
    return _Group(
        rows=torch.tensor(list(rows))[order],
        wanted=wanted[order],
        contexts=contexts,
        place=place[order],
    )


def _rest(model: nn.Module, cache: Any, group: _Group) -> Tensor:
    """Log-probability of all tokens of each completion but the first."""
    found = torch.zeros(len(group.wanted), dtype=torch.float64)
    starts = torch.searchsorted(group.place, torch.arange(len(group.contexts) + 1)).tolist()
    columns = torch.arange(group.contexts.shape[1]).unsqueeze(0)
    for at in range(0, len(group.contexts), ROWS):
        part = group.contexts[at : at + ROWS]
        own = copy.deepcopy(cache)
        own.batch_repeat_interleave(len(part))
        out: Any = model(input_ids=part, past_key_values=own, use_cache=True)
        logits = out.logits.float()
        inside = slice(starts[at], starts[at + len(part)])
        context = (group.place[inside] - at).unsqueeze(1)
        likely = logits[context, columns, group.wanted[inside, 1:]]
        likely = likely - logits.logsumexp(dim=2)[context, columns]
        found[inside] = likely.double().sum(dim=1)
    return found


def _check(foundation: Foundation, prefix: Ids, length: int) -> None:
    if foundation.kind != "causal":
        raise Incompatible(f"model {foundation.name} is an encoder; it continues no text")
    longest = len(prefix) + length
    if not prefix or length < 1 or longest > foundation.max_tokens:
        raise DataError(
            f"a prefix of {len(prefix)} tokens and {length} more were given; expected at least one "
            f"of each and at most the {foundation.max_tokens} that the model reads; give shorter "
            "ones or raise model.max_tokens"
        )
