"""Gradients of single units, shortened and summed: the data's part of DP-SGD (Abadi et al., 2016).

A unit (a patient, or a record) brings a few sequences; its loss is the mean over all tokens that
it predicts, so that it pulls once, however much it says. The gradient of every unit is computed by
itself: ``vmap(grad(loss))`` over a functional call with tied weights tied, which needs no support
by the layers and none of hooks. Units run in chunks that fit a given memory; sums are float64.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.func import functional_call, grad, vmap
from torch.nn import functional

from fedkola.errors import DataError, Incompatible
from fedkola.training.model import Foundation, require_bare
from fedkola.training.whole import IGNORED, Ids, hide, require_shapes
from fedkola.types import Weights

ROOM = 1 << 29  # bytes
Unit = Sequence[Ids]
Shorten = Callable[[Tensor], Tensor]
"""What to multiply vectors of these norms by: (n,) float64 to (n,)."""


def clipped_sum(
    foundation: Foundation,
    weights: Weights,
    units: Sequence[Unit],
    shorten: Shorten,
    *,
    seed: int = 0,
    room: int = ROOM,
) -> tuple[dict[str, Tensor], int]:
    """The sum over units of ``shorten(|g|) g``, g the gradient of the unit's mean loss at
    ``weights``; float64 by tensor, zeros for no unit, and the number of units.

    ``seed`` hides tokens from a masked model. Raises ModelMismatch, DataError for a unit without a
    token, and Incompatible for an encoder without the head that predicts hidden tokens.
    """
    require_bare(foundation)
    require_shapes(dict(foundation.model.named_parameters()), weights)
    held = {name: value.detach().float() for name, value in weights.items()}
    total = {n: torch.zeros(v.shape, dtype=torch.float64) for n, v in held.items()}
    if any(not unit or any(not row for row in unit) for unit in units):
        raise DataError("a unit without tokens was given; give sequences of one token and more")
    if foundation.kind == "encoder" and foundation.masked is None:
        raise Incompatible(
            f"model {foundation.name} is an encoder without the head that predicts hidden tokens; "
            "load it with whole=True"
        )
    single = vmap(grad(_loss(foundation)), in_dims=(None, 0, 0, 0))
    for chunk in _chunks(foundation, held, units, room):
        with _eager(foundation):
            found = single(held, *_read(foundation, chunk, seed))
        squares = [g.flatten(1).double().square().sum(1) for g in found.values()]
        times = shorten(torch.stack(squares).sum(0).sqrt())
        for name, g in found.items():
            # 0 times NaN is NaN: a unit that was left out is left out of the product too.
            kept = torch.where((times > 0).reshape(-1, *[1] * (g.dim() - 1)), g, 0.0)
            total[name] += torch.tensordot(times, kept.double(), dims=1)
    return total, len(units)


# --- private --------------------------------------------------------------------------------------


def _loss(foundation: Foundation) -> Callable[[Weights, Tensor, Tensor, Tensor], Tensor]:
    """The mean loss of one unit: tokens (S, L), those wanted at each place, and which are real."""

    def loss(weights: Weights, tokens: Tensor, wanted: Tensor, real: Tensor) -> Tensor:
        called: dict[str, Any] = {"input_ids": tokens}
        if foundation.kind == "causal":
            # Padding stands at the end, where no token that counts looks.
            called["use_cache"] = False
        else:
            width = tokens.shape[1]
            hidden = torch.where(real[:, None, None, :], 0.0, torch.finfo(torch.float32).min)
            called["attention_mask"] = hidden.expand(-1, 1, width, width)
        model = foundation.model
        logits = functional_call(model, dict(weights), (), called, tie_weights=True).logits
        nats = functional.cross_entropy(
            logits.flatten(0, 1), wanted.flatten(), ignore_index=IGNORED, reduction="sum"
        )
        return nats / (wanted != IGNORED).sum().clamp(min=1)

    return loss


@contextmanager
def _eager(foundation: Foundation) -> Iterator[None]:
    """Attention written out: the fused kernel has no rule for a batch of gradients."""
    model: Any = foundation.model
    before = model.config._attn_implementation
    model.set_attn_implementation("eager")
    try:
        yield
    finally:
        model.set_attn_implementation(before)


def _read(
    foundation: Foundation, units: Sequence[Unit], seed: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Tokens, wanted tokens and which are real, each (U, S, L), of units padded alike."""
    rows, longest = max(map(len, units)), max(len(row) for unit in units for row in unit)
    tokens = torch.zeros(len(units), rows, longest, dtype=torch.long)
    real = torch.zeros(tokens.shape, dtype=torch.bool)
    for place, unit in enumerate(units):
        for row, ids in enumerate(unit):
            tokens[place, row, : len(ids)] = torch.tensor(ids)
            real[place, row, : len(ids)] = True
    if foundation.kind == "causal":
        wanted = torch.full_like(tokens, IGNORED)
        wanted[..., :-1] = tokens[..., 1:].masked_fill(~real[..., 1:], IGNORED)
        return tokens, wanted, real
    flat, shown = tokens.flatten(0, 1), real.flatten(0, 1)
    hidden, wanted = hide(foundation, flat, shown, seed)
    wanted = wanted.masked_fill(~shown, IGNORED)
    return hidden.view_as(tokens), wanted.view_as(tokens), real


def _chunks(
    foundation: Foundation, weights: Weights, units: Sequence[Unit], room: int
) -> Iterator[list[Unit]]:
    """Units of like length together, as many at a time as the room holds, one at least."""
    config: Any = foundation.model.config
    layers = int(getattr(config, "num_hidden_layers", 12))
    vocabulary = int(foundation.model.get_input_embeddings().num_embeddings)  # type: ignore[operator]
    # Gradients once as they are and a tensor of them in float64; about 40 floats of activations
    # and their gradients per layer, place and width, and four per logit.
    fixed = 4 * sum(v.numel() for v in weights.values())
    fixed += 8 * max(v.numel() for v in weights.values())
    place = 4 * (40 * layers * foundation.width + 4 * vocabulary)
    chunk: list[Unit] = []
    size = 0
    for unit in sorted(units, key=lambda unit: (max(map(len, unit)), len(unit))):
        rows = max([len(unit), *map(len, chunk)])
        size = rows * max(map(len, unit))
        if chunk and (len(chunk) + 1) * (fixed + place * size) > room:
            yield chunk
            chunk = []
        chunk.append(unit)
    if chunk:
        yield chunk
