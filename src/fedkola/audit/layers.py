"""What the linear layers of a transformer read, one after the other, for any tokens we like.

The gradient of a projection is the sum over tokens of error times input, so its row space is
spanned by what the projection read. An attacker who knows the weights computes the same inputs for
tokens of its own choice: with the model's own code, stopped as soon as the layer asked for is
reached. Learned, rotary and no positions, tied heads, grouped keys, Conv1D and Linear, decoders
and encoders all follow from the model at hand. Shapes: n sequences, T tokens, d width.
"""

import copy
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from fedkola.errors import Incompatible, ModelMismatch, NotFinite
from fedkola.training.model import Foundation
from fedkola.types import Weights

_ATTENTION = re.compile(
    r"(?:^|\.)(\d+)\..*?\b"
    r"(q_proj|k_proj|v_proj|query|key|value|q_lin|k_lin|v_lin|c_attn|query_key_value|qkv_proj)$"
)
_WIDENING = re.compile(
    r"(?:^|\.)(\d+)\..*?\b"
    r"(c_fc|gate_proj|up_proj|fc1|fc_in|lin1|dense_h_to_4h|gate_up_proj|intermediate\.dense)$"
)
_MOST_POSITIONS = 4096


@dataclass(frozen=True, slots=True, kw_only=True)
class Projection:
    """Linear layers of one block that read the same input: query, key and value, or the first of
    its MLP.

    ``depth`` is twice the block's number, plus one for the MLP: what is read at 0 depends on one
    token alone. ``weights`` are names in a state, ``across`` whether these are stored (d_in, d_out)
    as GPT-2's Conv1D does, ``first`` is the module where the input is read.
    """

    depth: int
    weights: tuple[str, ...]
    across: bool
    first: str


def at(foundation: Foundation, weights: Weights) -> nn.Module:
    """A copy of the model that carries ``weights``; names as in its state, tied tensors once.

    Raises ModelMismatch for a name or a shape that the model does not have, NotFinite for a value
    that is none.
    """
    model = copy.deepcopy(foundation.model)
    own = model.state_dict()
    for name, tensor in weights.items():
        if name not in own or own[name].shape != tensor.shape:
            has = tuple(own[name].shape) if name in own else "no tensor of that name"
            raise ModelMismatch(
                f"weights {name} of shape {tuple(tensor.shape)} were seen, but model "
                f"{foundation.name} has {has}; give the model folder the run started from"
            )
    require_finite(weights)
    model.load_state_dict(dict(weights), strict=False)
    return model.eval().requires_grad_(False)


def require_finite(weights: Weights) -> None:
    for name, tensor in weights.items():
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
            raise NotFinite(
                f"{name} holds NaN or infinity; an attack reads finite numbers: see why the run "
                "sent it, or leave this round out"
            )


def tied(model: nn.Module) -> bool:
    """Whether the head is the embedding table itself."""
    table, head = embedding(model), _head(model)
    return head is not None and head.weight is table.weight


def require_change(model: nn.Module, change: Weights) -> None:
    """Raise unless the change is one of this model: NotFinite for values that are none,
    ModelMismatch for other names or shapes, or a head of its own that the model ties."""
    own = dict(model.named_parameters())
    head = head_name(model)
    if tied(model) and head in change and embedding_name(model) in change:
        raise ModelMismatch(
            f"the change moves {head} by itself, but this model ties its head to the embedding; "
            "give the configuration of the run (tie_word_embeddings)"
        )
    for name, tensor in change.items():
        if name not in own or own[name].shape != tensor.shape:
            has = tuple(own[name].shape) if name in own else "no tensor of that name"
            raise ModelMismatch(
                f"the change holds {name} of shape {tuple(tensor.shape)}, but the model has {has}; "
                "give the model folder the run started from"
            )
    require_finite(change)


def embedding(model: nn.Module) -> nn.Embedding:
    table = cast(Any, model).get_input_embeddings()
    if not isinstance(table, nn.Embedding):
        raise Incompatible("this model reads no token ids; the attack needs an embedding table")
    return table


def embedding_name(model: nn.Module) -> str:
    """The name of the embedding table's weight in a state."""
    return _named(model, embedding(model))


def head_name(model: nn.Module) -> str | None:
    """The name of the head's weight in a state; none for a model without a head."""
    head = _head(model)
    return None if head is None else _named(model, head)


def positions_name(model: nn.Module) -> str | None:
    """The name of the learned positions' weight in a state; none if there are none."""
    for name, module in model.named_modules():
        if isinstance(module, nn.Embedding) and re.search(r"(^|\.)(wpe|\w*positions?\w*)$", name):
            return f"{name}.weight"
    return None


def projections(model: nn.Module) -> tuple[Projection, ...]:
    """Attention and MLP of every block, in the order they are read; Incompatible if none is found.

    An MLP that reads what its attention reads, as in parallel blocks, is left out.
    """
    found: dict[int, list[str]] = {}
    for name, module in model.named_modules():
        weight = getattr(module, "weight", None)
        if isinstance(weight, Tensor) and weight.ndim == 2:
            for extra, pattern in enumerate((_ATTENTION, _WIDENING)):
                match = pattern.search(name)
                if match:
                    found.setdefault(2 * int(match[1]) + extra, []).append(name)
    if 0 not in found:
        raise Incompatible(
            f"no query, key or value projection was found in a {type(model).__name__}; expected "
            "layers named as in GPT-2, Llama, BERT or ViT"
        )
    every = tuple(
        Projection(
            depth=depth,
            weights=tuple(f"{name}.weight" for name in names),
            across=type(model.get_submodule(names[0])).__name__ == "Conv1D",
            first=names[0],
        )
        for depth, names in sorted(found.items())
    )
    parallel = 1 in found and not _looks_back(model, every[1])
    return tuple(p for p in every if p.depth % 2 == 0) if parallel else every


def stacked(projection: Projection, change: Weights) -> Tensor | None:
    """The change of these projections, (outputs, d) in float64; none if it is not whole."""
    parts = [change.get(name) for name in projection.weights]
    if any(part is None for part in parts):
        return None
    rows = [cast(Tensor, part).double() for part in parts]
    return torch.cat([row.T if projection.across else row for row in rows])


@torch.no_grad()
def inputs(
    model: nn.Module,
    projection: Projection,
    ids: Tensor,
    *,
    positions: Tensor | None = None,
    mask: Tensor | None = None,
    embedded: Tensor | None = None,
) -> Tensor:
    """What the projection reads, (n, T, d) in float64, for token ids (n, T).

    ``mask`` is 2-D (1 to attend) or 4-D and additive.
    """
    return read(model, projection, ids, positions=positions, mask=mask).double()


def read(
    model: nn.Module,
    projection: Projection,
    ids: Tensor | None = None,
    *,
    vectors: Tensor | None = None,
    positions: Tensor | None = None,
    mask: Tensor | None = None,
) -> Tensor:
    """As ``inputs``, in the model's precision and differentiable; ``vectors`` (n, T, d) stand in
    for the rows of the embedding table."""
    given: dict[str, Any] = {"input_ids": ids} if vectors is None else {"inputs_embeds": vectors}
    if positions is not None:
        given["position_ids"] = positions
    if mask is not None:
        given["attention_mask"] = mask
    with _stopping(model, projection) as seen:
        model(**given)
    if not seen:
        raise Incompatible(f"the model never reached {projection.first}; is the layer in use?")
    return seen[0]


def tokens_at(model: nn.Module, projection: Projection, tokens: Tensor, position: int) -> Tensor:
    """What the first layer reads for each of ``tokens`` (n,) standing at one place, (n, d)."""
    where = torch.full((len(tokens), 1), position)
    return inputs(model, projection, tokens[:, None], positions=where)[:, 0]


def has_positions(model: nn.Module, projection: Projection) -> bool:
    """Whether the first layer reads another vector for the same token at another place."""
    token = torch.tensor([1])
    one, other = (tokens_at(model, projection, token, place) for place in (0, 1))
    return not torch.allclose(one, other, rtol=1e-6, atol=1e-9)


def extended(
    model: nn.Module, projection: Projection, prefixes: Tensor, candidates: Tensor
) -> Tensor:
    """What the projection reads at the place after each prefix (n, T), for each of its candidates
    (n, C): (n, C, d). Candidates stand side by side and see their prefix and themselves alone."""
    n, length = prefixes.shape
    count = candidates.shape[1]
    total = length + count
    mask = torch.full((total, total), torch.finfo(torch.float32).min)
    mask[:length, :length].triu_(1)
    mask[length:, :length] = 0.0
    mask.diagonal().zero_()
    positions = torch.cat([torch.arange(length), torch.full((count,), length)])
    ids = torch.cat([prefixes, candidates], 1)
    found = inputs(
        model,
        projection,
        ids,
        positions=positions.expand(n, -1),
        mask=mask.expand(n, 1, total, total),
    )
    return found[:, length:]


def longest(foundation: Foundation) -> int:
    """How many tokens a sequence of this model has at most."""
    return min(foundation.max_tokens, _MOST_POSITIONS)


# --- private --------------------------------------------------------------------------------------


class _Reached(Exception):
    """Stops a forward pass where the layer asked for has been read."""


@contextmanager
def _stopping(model: nn.Module, projection: Projection) -> Iterator[list[Tensor]]:
    seen: list[Tensor] = []

    def stop(module: nn.Module, given: tuple[Tensor, ...]) -> None:
        seen.append(given[0])
        raise _Reached

    hook = model.get_submodule(projection.first).register_forward_pre_hook(stop)
    try:
        yield seen
    except _Reached:
        pass
    finally:
        hook.remove()


def _looks_back(model: nn.Module, projection: Projection) -> bool:
    """Whether what is read at a token depends on the others."""
    one, other = (inputs(model, projection, torch.tensor([row])) for row in ((1, 1), (2, 1)))
    return not torch.allclose(one[0, 1], other[0, 1], rtol=1e-6, atol=1e-9)


def _head(model: nn.Module) -> Any:
    head = cast(Any, model).get_output_embeddings()
    return head if isinstance(getattr(head, "weight", None), Tensor) else None


def _named(model: nn.Module, wanted: nn.Module) -> str:
    return next(f"{name}.weight" for name, module in model.named_modules() if module is wanted)
