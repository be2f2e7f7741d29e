"""Local training of many sites at once, for simulations: adapters on the upper layers of BERT.

Sites of one simulation share the frozen base, so its products are taken once over the records of
all of them, and only the thin factors are taken site by site:

    y_k = W x_k + s B_k (A_k x_k)          W (d, d) once, A_k (r, d) and B_k (d, r) per site k

States below the first adapted layer do not change and are kept. The arithmetic is that of
:func:`fedkola.training.fit.fit`, batches and optimiser included; results differ by the rounding of
sums in another order. Real sites do not use it: they have one adapter each.

Shapes: K sites, n records in a batch of one site, T tokens, d width, h heads, r rank, C classes.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from fedkola.errors import ModelMismatch, StepFailed
from fedkola.training.adapters import A, B
from fedkola.training.fit import BIAS, HEAD, batches, logits
from fedkola.training.model import Foundation, encode
from fedkola.types import Weights

ROWS = 256


@dataclass(frozen=True, slots=True, kw_only=True)
class Upper:
    """The last layers of a base, and where their input is kept: ``states`` (N, T, d) float32 of all
    records below them, ``lengths`` in tokens. ``names`` are those of the layers in the model."""

    layers: tuple[nn.Module, ...]
    names: tuple[str, ...]
    states: Tensor
    lengths: tuple[int, ...]
    heads: int

    def targets(self) -> dict[str, tuple[int, int]]:
        """Query and value projections of these layers, name -> (d_out, d_in)."""
        d = self.states.shape[-1]
        return {
            f"{name}.attention.self.{part}": (d, d)
            for name in self.names
            for part in ("query", "value")
        }


def upper(foundation: Foundation, texts: Sequence[str], *, layers: int) -> Upper:
    """The last ``layers`` layers, and the states of ``texts`` below them. Raises ModelMismatch for
    a base that is not built like BERT."""
    stack = getattr(getattr(foundation.model, "encoder", None), "layer", None)
    if stack is None or not 1 <= layers <= len(stack):
        raise ModelMismatch(
            f"{foundation.name} has no {layers} layers under encoder.layer; give a BERT encoder "
            "and fewer layers"
        )
    ids = encode(foundation, texts)
    longest = max(map(len, ids), default=1)
    first = len(stack) - layers
    states = torch.zeros(len(ids), longest, foundation.width)
    order = sorted(range(len(ids)), key=lambda i: len(ids[i]))
    kept: list[Tensor] = []

    def keep(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        kept.append(inputs[0])

    handle = stack[first].register_forward_pre_hook(keep)
    try:
        with torch.inference_mode():
            for at in range(0, len(order), ROWS):
                rows = order[at : at + ROWS]
                width = max(len(ids[i]) for i in rows)
                tokens = torch.tensor([[*ids[i], *[0] * (width - len(ids[i]))] for i in rows])
                mask = torch.tensor([[j < len(ids[i]) for j in range(width)] for i in rows]).long()
                foundation.model(input_ids=tokens, attention_mask=mask)
                states[rows, :width] = kept.pop()
    finally:
        handle.remove()
    return Upper(
        layers=tuple(stack[first:]),
        names=tuple(f"encoder.layer.{i}" for i in range(first, len(stack))),
        states=states.clone(),
        lengths=tuple(map(len, ids)),
        heads=int(cast(Any, stack[first]).attention.self.num_attention_heads),
    )


def fit(
    upper: Upper,
    weights: Weights,
    rows: Sequence[Sequence[int]],
    labels: Sequence[Sequence[int]],
    *,
    steps: int,
    batch: int,
    lr: float,
    seeds: Sequence[int],
    scale: float,
) -> dict[str, Tensor]:
    """The weights of every site, (K, ...), after training from the same ``weights`` on its records.

    ``rows`` are positions in ``upper`` and ``labels`` rows of the head, site by site; every site
    has a full batch at least. Raises StepFailed for a loss that is not finite.
    """
    num = len(rows)
    leaves = {
        # One layout for values and gradients: the fused optimiser goes by places in memory.
        name: nn.Parameter(value.detach().float()[None].repeat(num, *[1] * value.dim()))
        for name, value in weights.items()
    }
    optimiser = torch.optim.AdamW(leaves.values(), lr=lr, weight_decay=0.0, fused=True)
    plans = [
        list(batches([upper.lengths[i] for i in own], batch=batch, steps=steps, seed=seed))
        for own, seed in zip(rows, seeds, strict=True)
    ]
    if any(len(places) != batch for plan in plans for places in plan):
        raise ModelMismatch(
            f"a site has fewer than {batch} records, or a batch that is not full; give every site "
            "a multiple of the batch"
        )
    for step in range(steps):
        chosen = [[own[p] for p in plan[step]] for own, plan in zip(rows, plans, strict=True)]
        wanted = torch.tensor(
            [[own[p] for p in plan[step]] for own, plan in zip(labels, plans, strict=True)]
        )
        scores = _scores(upper, leaves, chosen, scale=scale)
        loss = functional.cross_entropy(scores.flatten(0, 1), wanted.flatten(), reduction="sum")
        if not math.isfinite(loss.item()):
            raise StepFailed(f"the loss is {loss.item()} in step {step + 1}; lower lr (it is {lr})")
        for leaf, gradient in zip(
            leaves.values(), torch.autograd.grad(loss / batch, list(leaves.values())), strict=True
        ):
            leaf.grad = gradient.contiguous()
        optimiser.step()
    return {name: leaf.detach() for name, leaf in leaves.items()}


def predict(upper: Upper, weights: Weights, rows: Sequence[int], *, scale: float) -> Tensor:
    """Class scores (len(rows), C) under one adapter and head."""
    one = {name: value[None] for name, value in weights.items()}
    order = sorted(range(len(rows)), key=lambda i: upper.lengths[rows[i]])
    found = torch.zeros(len(rows), len(weights[HEAD]))
    with torch.inference_mode():
        for at in range(0, len(order), ROWS):
            part = order[at : at + ROWS]
            found[part] = _scores(upper, one, [[rows[i] for i in part]], scale=scale)[0]
    return found


# --- private --------------------------------------------------------------------------------------


def _scores(
    upper: Upper, weights: Weights, rows: Sequence[Sequence[int]], *, scale: float
) -> Tensor:
    """(K, n, C)"""
    width = max(upper.lengths[i] for own in rows for i in own)
    flat = [i for own in rows for i in own]
    lengths = torch.tensor([upper.lengths[i] for i in flat])
    mask = torch.arange(width) < lengths[:, None]
    k, n = len(rows), len(rows[0])
    x = upper.states[flat, :width].view(k, n * width, -1)
    for layer, name in zip(upper.layers, upper.names, strict=True):
        x = _layer(layer, name, x, weights, mask, upper.heads, scale)
    states = x.view(k, n, width, -1)
    shown = mask.view(k, n, width).long()
    return torch.stack(
        [
            logits(
                states[i],
                shown[i],
                {HEAD: weights[HEAD][i], **({BIAS: weights[BIAS][i]} if BIAS in weights else {})},
            )
            for i in range(k)
        ]
    )


def _layer(
    layer: nn.Module,
    name: str,
    x: Tensor,
    weights: Weights,
    mask: Tensor,
    heads: int,
    scale: float,
) -> Tensor:
    """One layer of BERT over (K, n T, d)."""
    block = cast(Any, layer)
    attention = block.attention.self
    k, rows, d = x.shape
    width = mask.shape[1]

    def split(part: str) -> Tensor:
        y: Tensor = getattr(attention, part)(x)
        factor = f"{name}.attention.self.{part}"
        if factor + A in weights:
            low = torch.bmm(x, weights[factor + A].transpose(1, 2))
            y = y + scale * torch.bmm(low, weights[factor + B].transpose(1, 2))
        return y.view(-1, width, heads, d // heads).transpose(1, 2)

    mixed = functional.scaled_dot_product_attention(
        split("query"), split("key"), split("value"), attn_mask=mask[:, None, None, :]
    )
    mixed = mixed.transpose(1, 2).reshape(k, rows, d)
    x = block.attention.output.LayerNorm(block.attention.output.dense(mixed) + x)
    found: Tensor = block.output.LayerNorm(block.output.dense(block.intermediate(x)) + x)
    return found
