"""Training of a whole language model: every parameter learns, as in pre-training.

A causal model learns the next token, a masked one the tokens that were hidden from it. Sequences
are lists of token ids of at most the model's length; where lengths differ the shorter ones are
padded and the padding is neither read nor predicted. Weights travel as name -> float32 tensor, a
tied tensor once. Dropout is off: equal arguments give equal bits on one kind of machine.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS

from fedkola.errors import DataError, Incompatible, ModelMismatch, StepFailed
from fedkola.training.model import Foundation, quiet, require_bare
from fedkola.types import Weights

IGNORED = -100
MASKED_SHARE = 0.15
FIRST, SECOND, COUNT = "first/", "second/", "count"

Ids = Sequence[int]
Gradient = Callable[[Weights, Sequence[Ids], int], Mapping[str, Tensor]]
"""A gradient of one's own: (weights, batch, number of the step) -> name -> tensor."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Local:
    """How one site trains. ``clip`` bounds the norm of a gradient (0: not at all).

    The rate rises over ``warmup`` steps and falls along a cosine to ``floor`` times ``lr`` at step
    ``total`` (0: it stays). ``start`` is the number of steps done before; the first ``rewarm`` of
    those that follow rise once more. Only matrices decay.
    ``precision`` "bfloat16" computes products in bfloat16 and keeps weights in float32.
    """

    optimiser: Literal["adamw", "sgd"] = "adamw"
    lr: float = 1e-3
    betas: tuple[float, float] = (0.9, 0.95)
    weight_decay: float = 0.1
    clip: float = 1.0
    warmup: int = 0
    total: int = 0
    floor: float = 0.1
    start: int = 0
    rewarm: int = 0
    precision: Literal["float32", "bfloat16"] = "float32"

    def rate(self, step: int) -> float:
        """The learning rate of a step, counted from 0 over the whole run."""
        rise = min(1.0, (step + 1) / self.warmup) if self.warmup else 1.0
        if self.rewarm:
            rise *= min(1.0, (step - self.start + 1) / self.rewarm)
        if not self.total:
            return self.lr * rise
        done = min(step / self.total, 1.0)
        return self.lr * rise * (self.floor + (1 - self.floor) * (1 + math.cos(math.pi * done)) / 2)


def parameters(foundation: Foundation) -> dict[str, Tensor]:
    """Every parameter of the base by its name, tied ones once: float32 copies."""
    require_bare(foundation)
    return {n: p.detach().float().clone() for n, p in foundation.model.named_parameters()}


def tables(foundation: Foundation) -> frozenset[str]:
    """The names of all embeddings and of the output head, whose rows stand for single tokens."""
    model: Any = foundation.model
    held = [m.weight for m in model.modules() if isinstance(m, nn.Embedding)]
    head = getattr(model, "get_output_embeddings", lambda: None)()
    held += [head.weight] if head is not None else []
    ids = {id(weight) for weight in held}
    return frozenset(n for n, p in model.named_parameters() if id(p) in ids)


@contextmanager
def holding(foundation: Foundation, weights: Weights) -> Iterator[nn.Module]:
    """The model with these weights in place of its own, which come back at the end.

    The tensors themselves are held, not copies; they ask for no gradient. Raises ModelMismatch
    unless names and shapes are those of ``parameters``.
    """
    require_bare(foundation)
    own = dict(foundation.model.named_parameters())
    require_shapes(own, weights)
    before = {name: parameter.data for name, parameter in own.items()}
    try:
        for name, parameter in own.items():
            parameter.data = weights[name].detach().float()
        yield foundation.model
    finally:
        for name, parameter in own.items():
            parameter.data = before[name]
            parameter.grad = None
            parameter.requires_grad_(False)


def require_shapes(wanted: Weights, given: Weights) -> None:
    """Raise ModelMismatch unless both have the same names and shapes."""
    odd = sorted(set(wanted) ^ set(given))
    odd += [n for n in wanted if n in given and wanted[n].shape != given[n].shape]
    if odd:
        raise ModelMismatch(
            f"these weights are not those of the model: they differ in {odd[:3]}; give every "
            "parameter of this architecture, in its shape"
        )


def save(foundation: Foundation, weights: Weights, folder: Path) -> None:
    """Write the model with these weights, and its tokenizer, as a folder of transformers."""
    tokenizer: Any = foundation.tokenizer
    # Equal tensors that a ledger reads back are one, which would be saved as tied.
    alone = {name: value.clone() for name, value in weights.items()}
    with holding(foundation, alone) as model, quiet():
        saved: Any = model
        saved.save_pretrained(folder)
        tokenizer.save_pretrained(folder)


def gradient(
    foundation: Foundation, weights: Weights, sequences: Sequence[Ids], *, seed: int = 0
) -> dict[str, Tensor]:
    """The gradient at ``weights`` of the mean loss over the predicted tokens of one batch."""
    with holding(foundation, weights) as model:
        leaves = _leaves(model)
        loss, _ = _loss(foundation, model, sequences, seed)
        found = torch.autograd.grad(loss, list(leaves.values()), allow_unused=True)
    return {
        name: torch.zeros_like(leaf) if g is None else g.detach()
        for (name, leaf), g in zip(leaves.items(), found, strict=True)
    }


def train(
    foundation: Foundation,
    weights: Weights,
    batches: Iterable[Sequence[Ids]],
    local: Local,
    moments: Weights | None = None,
    *,
    seed: int = 0,
    gradient: Gradient | None = None,
) -> tuple[dict[str, Tensor], dict[str, Tensor], list[float]]:
    """One step of the optimiser per batch: the weights, its moments, and the loss of each batch.

    ``moments`` are those an earlier call returned (None: zero). ``gradient`` replaces that of the
    mean loss, as where noise is added; losses are then empty and nothing is clipped here. Raises
    StepFailed for a loss that is not finite.
    """
    start = {name: value.detach().float().clone() for name, value in weights.items()}
    losses: list[float] = []
    with holding(foundation, start) as model:
        leaves = _leaves(model)
        optimiser = _optimiser(leaves, local, moments or {})
        for number, batch in enumerate(batches):
            for group in optimiser.param_groups:
                group["lr"] = local.rate(local.start + number)
            if gradient is None:
                losses.append(_step_loss(foundation, model, batch, seed + number, local))
                if local.clip:
                    nn.utils.clip_grad_norm_(list(leaves.values()), local.clip)
            else:
                held = {name: leaf.detach() for name, leaf in leaves.items()}
                own = gradient(held, batch, number)
                for name, leaf in leaves.items():
                    leaf.grad = own[name].to(leaf.dtype)
            optimiser.step()
            optimiser.zero_grad(set_to_none=True)
        trained = {name: leaf.detach().clone() for name, leaf in leaves.items()}
        kept = _moments(leaves, optimiser)
    return trained, kept, losses


def nll(
    foundation: Foundation,
    weights: Weights,
    sequences: Sequence[Ids],
    *,
    seed: int = 0,
    rows: int = 16,
) -> Tensor:
    """(n, 2) float64: nats and predicted tokens of each sequence."""
    out = torch.zeros(len(sequences), 2, dtype=torch.float64)
    order = sorted(range(len(sequences)), key=lambda row: len(sequences[row]))
    with holding(foundation, weights) as model, torch.inference_mode():
        for at in range(0, len(order), rows):
            part = order[at : at + rows]
            logits, wanted = _predicted(foundation, model, [sequences[row] for row in part], seed)
            nats = functional.cross_entropy(
                logits.transpose(1, 2), wanted, ignore_index=IGNORED, reduction="none"
            )
            out[part, 0] = nats.double().sum(1)
            out[part, 1] = (wanted != IGNORED).double().sum(1)
    return out


# --- private --------------------------------------------------------------------------------------


def _leaves(model: nn.Module) -> dict[str, nn.Parameter]:
    leaves = dict(model.named_parameters())
    for leaf in leaves.values():
        leaf.requires_grad_(True)
    return leaves


def _step_loss(
    foundation: Foundation, model: nn.Module, batch: Sequence[Ids], seed: int, local: Local
) -> float:
    """The loss of one batch, whose gradient is left in the parameters."""
    with _narrow(model, local.precision):
        loss, _ = _loss(foundation, model, batch, seed)
    value = loss.item()
    if not math.isfinite(value):
        raise StepFailed(f"the loss of a batch is {value}; lower pretrain.lr (it is {local.lr})")
    loss.backward()  # type: ignore[no-untyped-call]
    return value


@contextmanager
def _narrow(model: nn.Module, precision: str) -> Iterator[None]:
    """Products in bfloat16, attention in float32: its backward pass in bfloat16 takes eight times
    as long on a processor (torch 2.13, measured)."""
    if precision == "float32":
        yield
        return
    config: Any = model.config
    before = config._attn_implementation
    config._attn_implementation = _WIDE
    try:
        with torch.autocast("cpu", torch.bfloat16):
            yield
    finally:
        config._attn_implementation = before


def _wide_attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, **other: Any
) -> Any:
    with torch.autocast("cpu", enabled=False):
        wide = mask.float() if mask is not None and mask.is_floating_point() else mask
        return sdpa_attention_forward(
            module, query.float(), key.float(), value.float(), wide, **other
        )


_WIDE = "fedkola_float32"
AttentionInterface.register(_WIDE, _wide_attention)
AttentionMaskInterface.register(_WIDE, ALL_MASK_ATTENTION_FUNCTIONS["sdpa"])


def _loss(
    foundation: Foundation, model: nn.Module, sequences: Sequence[Ids], seed: int
) -> tuple[Tensor, int]:
    """Mean nats over the predicted tokens, and how many they are."""
    logits, wanted = _predicted(foundation, model, sequences, seed)
    count = int((wanted != IGNORED).sum())
    flat, targets = logits.flatten(0, 1).float(), wanted.flatten()
    total = functional.cross_entropy(flat, targets, ignore_index=IGNORED, reduction="sum")
    return total / max(count, 1), count


def _predicted(
    foundation: Foundation, model: nn.Module, sequences: Sequence[Ids], seed: int
) -> tuple[Tensor, Tensor]:
    """Logits (n, L, vocabulary) and the token wanted at each of them, IGNORED where there is none.

    Raises DataError for no sequence or an empty one, Incompatible for an encoder without a head.
    """
    if not sequences or any(not row for row in sequences):
        raise DataError("a batch without tokens was given; give sequences of one token and more")
    lengths = torch.tensor([len(row) for row in sequences])
    longest = int(lengths.max())
    tokens = torch.tensor([[*row, *[0] * (longest - len(row))] for row in sequences])
    real = torch.arange(longest) < lengths[:, None]
    # Without padding there is nothing to hide, and attention takes its fast path.
    mask = None if bool(real.all()) else real.long()
    if foundation.kind == "causal":
        found: Any = model(input_ids=tokens, attention_mask=mask, use_cache=False)
        wanted = tokens[:, 1:].masked_fill(~real[:, 1:], IGNORED)
        return found.logits[:, :-1], wanted
    if foundation.masked is None:
        raise Incompatible(
            f"model {foundation.name} is an encoder without the head that predicts hidden tokens; "
            "load it with whole=True"
        )
    hidden, wanted = hide(foundation, tokens, real, seed)
    found = model(input_ids=hidden, attention_mask=mask)
    return found.logits, wanted


def hide(foundation: Foundation, tokens: Tensor, real: Tensor, seed: int) -> tuple[Tensor, Tensor]:
    """BERT's masking (Devlin et al., 2019): of 15 % of the tokens 80 % become the mask, 10 % any
    token, 10 % stay; at least one in every sequence."""
    generator = torch.Generator().manual_seed(seed)
    chance = torch.rand(tokens.shape, generator=generator).masked_fill(~real, 2.0)
    chosen = (chance < MASKED_SHARE) | (chance == chance.min(dim=1, keepdim=True).values)
    fate = torch.rand(tokens.shape, generator=generator)
    size = int(foundation.model.get_input_embeddings().num_embeddings)  # type: ignore[operator]
    other = torch.randint(size, tokens.shape, generator=generator)
    mask = torch.full_like(tokens, int(foundation.masked or 0))
    hidden = torch.where(chosen & (fate < 0.8), mask, tokens)
    hidden = torch.where(chosen & (fate >= 0.9), other, hidden)
    return hidden, tokens.masked_fill(~chosen, IGNORED)


def _optimiser(
    leaves: Mapping[str, nn.Parameter], local: Local, moments: Weights
) -> torch.optim.Optimizer:
    matrices = [leaf for leaf in leaves.values() if leaf.dim() > 1]
    others = [leaf for leaf in leaves.values() if leaf.dim() <= 1]
    groups = [
        {"params": matrices, "weight_decay": local.weight_decay},
        {"params": others, "weight_decay": 0.0},
    ]
    if local.optimiser == "sgd":
        return torch.optim.SGD(groups, lr=local.lr)
    optimiser = torch.optim.AdamW(groups, lr=local.lr, betas=local.betas, fused=True)
    for name, leaf in leaves.items():
        if FIRST + name in moments:
            optimiser.state[leaf] = {
                "step": moments[COUNT].float().reshape(()).clone(),
                "exp_avg": moments[FIRST + name].clone(),
                "exp_avg_sq": moments[SECOND + name].clone(),
            }
    return optimiser


def _moments(
    leaves: Mapping[str, nn.Parameter], optimiser: torch.optim.Optimizer
) -> dict[str, Tensor]:
    """Both moments of every tensor by name and the number of steps; nothing for SGD."""
    kept: dict[str, Tensor] = {}
    for name, leaf in leaves.items():
        state = optimiser.state.get(leaf, {})
        if "exp_avg" in state:
            kept[FIRST + name] = state["exp_avg"].clone()
            kept[SECOND + name] = state["exp_avg_sq"].clone()
            kept[COUNT] = state["step"].clone()
    return kept
