"""LoRA on a frozen base through peft: y = W x + s B (A x), and what may be done with factors.

Adapters travel as plain tensors, ``{layer}.lora_A`` (r, d_in) and ``{layer}.lora_B`` (d_out, r)
for every target layer, one rank for all. Sums of products are kept by concatenation,
sum_i w_i B_i A_i = [w_1 B_1 ... w_n B_n] [A_1; ...; A_n]; averaging the factors instead is another
matrix, which is why peft's other ways to combine adapters are refused.

Two tensors more may come with a layer: ``{layer}.lora_R`` (r, r), a core between the factors,
y = W x + s B R A x; and ``{layer}.delta`` (d_out, d_in), added to W itself and not scaled, for
methods that merge what they learnt into the base.
"""

import math
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import peft
import safetensors.torch
import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from fedkola.errors import Incompatible, ModelMismatch
from fedkola.training.model import Foundation, require_bare
from fedkola.types import Weights

# Query and value projections by the last part of their names; fused ones are adapted whole.
TARGETS = frozenset(
    {"query", "value", "q_proj", "v_proj", "q_lin", "v_lin", "query_key_value", "qkv_proj"}
    | {"c_attn", "Wqkv"}
)
A, B, R = ".lora_A", ".lora_B", ".lora_R"
DELTA = ".delta"


def targets(foundation: Foundation) -> dict[str, tuple[int, int]]:
    """Query and value projections, name -> (d_out, d_in); ModelMismatch if there are none."""
    found = {
        name: (module.nf, module.nx)
        if isinstance(module, Conv1D)
        else (module.out_features, module.in_features)
        for name, module in foundation.model.named_modules()
        if name.rpartition(".")[2] in TARGETS and isinstance(module, nn.Linear | Conv1D)
    }
    if not found:
        raise ModelMismatch(
            f"model {foundation.name} has no query and value projections under a known name "
            f"({', '.join(sorted(TARGETS))}); choose another base model"
        )
    return found


def weights_template(foundation: Foundation, *, rank: int, seed: int) -> dict[str, Tensor]:
    """A fresh adapter for every target layer; see ``fresh``."""
    return fresh(targets(foundation), rank=rank, seed=seed)


def fresh(layers: Mapping[str, tuple[int, int]], *, rank: int, seed: int) -> dict[str, Tensor]:
    """A uniform within 1/sqrt(d_in) as in peft, B zero, so that B A = 0; name -> (d_out, d_in)."""
    generator = torch.Generator().manual_seed(seed)
    made: dict[str, Tensor] = {}
    for layer, (d_out, d_in) in layers.items():
        a = torch.empty(rank, d_in)
        made[layer + A] = nn.init.kaiming_uniform_(a, a=math.sqrt(5), generator=generator)
        made[layer + B] = torch.zeros(d_out, rank)
    return made


@contextmanager
def adapted(foundation: Foundation, weights: Weights, *, scale: float) -> Iterator[nn.Module]:
    """The model with y = (W + delta) x + scale B (R (A x)), while the block lasts, all frozen.

    Layers without lora_R have R = 1, those without delta their own W, which has its bits again
    after the block. Other tensors of ``weights`` are ignored; without any of these it is the base
    itself. One block at a time for one foundation, else StepFailed. Raises ModelMismatch for
    tensors that do not fit.
    """
    require_bare(foundation)
    rank = _rank(foundation, weights)
    with _shifted(foundation, weights):
        if rank == 0:
            yield foundation.model
            return
        config = _config(foundation, weights, rank=rank, scale=scale)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # deprecations between peft and transformers
            model = peft.get_peft_model(foundation.model, config)
        inner = foundation.model
        try:
            for name, value in _factors(weights).items():
                factor(inner, name).requires_grad_(False).copy_(value)
            for name, value in weights.items():
                if name.endswith(R):
                    _insert_core(inner, name.removesuffix(R), value)
            yield inner
        finally:
            model.unload()


def factor(model: nn.Module, name: str) -> nn.Parameter:
    """The parameter that holds the factor or core ``name`` in what ``adapted`` gave."""
    if name.endswith(R):
        return model.get_parameter(f"{name.removesuffix(R)}.lora_A.default.core")
    return model.get_parameter(f"{name}.default.weight")


def folded(weights: Weights) -> dict[str, Tensor]:
    """The same adapter without cores: B R in the place of B, other tensors as they are."""
    return {
        name: value @ weights[name.removesuffix(B) + R]
        if name.endswith(B) and name.removesuffix(B) + R in weights
        else value
        for name, value in weights.items()
        if not name.endswith(R)
    }


@contextmanager
def gated(
    foundation: Foundation,
    a_cat: Mapping[str, Tensor],
    b_cat: Mapping[str, Tensor],
    *,
    scale: float,
    slots: int,
    gate: Tensor,
    shift: Mapping[str, Tensor] | None = None,
) -> Iterator[nn.Module]:
    """The model with y = (W + delta) x + scale B_cat (g * (A_cat x)) while the block lasts.

    ``a_cat`` (slots r, d_in) and ``b_cat`` (d_out, slots r) by layer; ``gate`` (batch, slots)
    holds one row per text of every batch that is run. Slots of unequal ranks are filled up with
    zero rows of A and columns of B, which changes nothing. The deltas among ``shift`` are added
    as in ``adapted``. Raises ModelMismatch or Incompatible.
    """
    require_bare(foundation)
    named = {layer + A: a for layer, a in a_cat.items()}
    rank = _rank(foundation, {**named, **{layer + B: b for layer, b in b_cat.items()}})
    if gate.ndim != 2 or gate.shape[1] != slots or rank % max(slots, 1):
        raise Incompatible(
            f"a gate of shape {tuple(gate.shape)} for {slots} slots of a rank-{rank} adapter; "
            f"expected (batch, slots), and a rank that is a multiple of slots"
        )
    spread = gate.float().repeat_interleave(rank // slots, dim=1)[:, None, :] if rank else gate
    with _shifted(foundation, shift or {}):
        hooks = [
            foundation.model.get_submodule(layer).register_forward_hook(
                _gated_hook(a_cat[layer], b_cat[layer], spread, scale)
            )
            for layer in a_cat
        ]
        try:
            yield foundation.model
        finally:
            for hook in hooks:
                hook.remove()


def stacked(weights: Weights) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The factors by layer, A and B apart and cores in B, as ``gated`` takes them."""
    weights = folded(weights)
    return (
        {name.removesuffix(A): value for name, value in weights.items() if name.endswith(A)},
        {name.removesuffix(B): value for name, value in weights.items() if name.endswith(B)},
    )


def combine(parts: Sequence[tuple[Weights, float]]) -> dict[str, Tensor]:
    """One adapter of rank sum r_i whose products are exactly sum_i w_i B_i A_i.

    Cores are multiplied into B; other tensors are left out. Raises Incompatible if layers differ.
    """
    if not parts:
        return {}
    parts = [(folded(weights), share) for weights, share in parts]
    names = sorted(_factors(parts[0][0]))
    for weights, _ in parts:
        if sorted(_factors(weights)) != names:
            raise Incompatible("adapters of different layers cannot be combined; use one base")
    return {
        name: torch.cat([weights[name] for weights, _ in parts], dim=0)
        if name.endswith(A)
        else torch.cat([share * weights[name] for weights, share in parts], dim=1)
        for name in names
    }


def weighted(
    model: peft.PeftModel,
    adapters: Sequence[str],
    weights: Sequence[float],
    name: str,
    combination_type: str,
) -> None:
    """peft's add_weighted_adapter, restricted to "cat".

    Any other type mixes factors, which is not the weighted sum of products: Incompatible.
    """
    if combination_type != "cat":
        raise Incompatible(
            f'combination_type "{combination_type}" does not give sum_i w_i B_i A_i; use "cat"'
        )
    lora: Any = model.base_model
    lora.add_weighted_adapter(list(adapters), list(weights), name, combination_type="cat")


def export_peft(foundation: Foundation, weights: Weights, *, scale: float, folder: Path) -> None:
    """Write a folder that ``PeftModel.from_pretrained(base, folder)`` loads.

    adapter_config.json and adapter_model.safetensors; cores are multiplied into B, a head has no
    place in it and is left out. Raises Incompatible for weights with a delta: it belongs to the
    base, and an adapter without it would be another model.
    """
    if any(name.endswith(DELTA) for name in weights):
        raise Incompatible(
            "these weights change the base itself (they hold a delta), which a LoRA adapter cannot "
            "carry; export a method that trains factors alone"
        )
    weights = folded(weights)
    rank = _rank(foundation, weights)
    if rank == 0:
        raise ModelMismatch("there is no adapter to export: no lora_A and lora_B among the weights")
    folder.mkdir(parents=True, exist_ok=True)
    config = _config(foundation, weights, rank=rank, scale=scale)
    config.inference_mode = True
    config.save_pretrained(str(folder))
    tensors = {
        f"base_model.model.{name}.weight": value.to(torch.float32).contiguous().clone()
        for name, value in _factors(weights).items()
    }
    safetensors.torch.save_file(
        tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"}
    )


def _config(
    foundation: Foundation, weights: Weights, *, rank: int, scale: float
) -> peft.LoraConfig:
    layers = sorted(name.removesuffix(A) for name in weights if name.endswith(A))
    transposed = isinstance(foundation.model.get_submodule(layers[0]), Conv1D)
    alpha = scale * rank
    return peft.LoraConfig(
        r=rank,
        lora_alpha=int(alpha) if float(alpha).is_integer() else alpha,  # type: ignore[arg-type]
        target_modules=layers,
        lora_dropout=0.0,
        bias="none",
        fan_in_fan_out=transposed,
        task_type=peft.TaskType.CAUSAL_LM
        if foundation.kind == "causal"
        else peft.TaskType.FEATURE_EXTRACTION,
        base_model_name_or_path=foundation.name,
    )


def _factors(weights: Weights) -> dict[str, Tensor]:
    return {name: value for name, value in weights.items() if name.endswith((A, B))}


@contextmanager
def _shifted(foundation: Foundation, weights: Weights) -> Iterator[None]:
    """Frozen weights plus the deltas among ``weights``; the very same parameters afterwards."""
    deltas = {name.removesuffix(DELTA): v for name, v in weights.items() if name.endswith(DELTA)}
    known = targets(foundation) if deltas else {}
    for layer, delta in deltas.items():
        if delta.shape != known.get(layer):
            raise ModelMismatch(
                f"{layer}{DELTA} of shape {tuple(delta.shape)} does not fit model "
                f"{foundation.name}; expected (d_out, d_in) = {known.get(layer)} of a target layer"
            )
    if not deltas:
        yield
        return
    model: Any = foundation.model
    kept = {layer: model.get_submodule(layer).weight for layer in deltas}
    model.shifted = True
    try:
        for layer, delta in deltas.items():
            module = model.get_submodule(layer)
            # Conv1D keeps its weight as (d_in, d_out).
            added = delta.T if isinstance(module, Conv1D) else delta
            module.weight = nn.Parameter(kept[layer] + added, requires_grad=False)
        yield
    finally:
        for layer, weight in kept.items():
            model.get_submodule(layer).weight = weight
        del model.shifted


def _insert_core(model: nn.Module, layer: str, core: Tensor) -> None:
    # Both end with the adapter's modules, which live as long as the block.
    inner = model.get_submodule(f"{layer}.lora_A.default")
    inner.register_parameter("core", nn.Parameter(core.detach().clone(), requires_grad=False))
    inner.register_forward_hook(_core_hook)


def _core_hook(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
    return nn.functional.linear(output, module.get_parameter("core"))


def _rank(foundation: Foundation, weights: Weights) -> int:
    """The one rank of all factors, 0 if there are none; ModelMismatch if they do not fit."""
    factors = _factors(weights)
    cores = {name.removesuffix(R): v for name, v in weights.items() if name.endswith(R)}
    for layer in cores:
        if layer + A not in factors:
            raise ModelMismatch(f"{layer}{R} has no factors around it; give lora_A and lora_B")
    if not factors:
        return 0
    known = targets(foundation)
    ranks = set()
    for layer in {name[: -len(A)] for name in factors}:
        if layer not in known:
            raise ModelMismatch(
                f"the adapter names layer {layer}, which model {foundation.name} does not adapt; "
                f"it was made for another base model"
            )
        a, b = factors.get(layer + A), factors.get(layer + B)
        if a is None or b is None:
            raise ModelMismatch(f"layer {layer} has one factor only; give lora_A and lora_B")
        d_out, d_in = known[layer]
        rank = a.shape[0]
        if a.shape[1:] != (d_in,) or b.shape != (d_out, rank):
            raise ModelMismatch(
                f"layer {layer} has lora_A {tuple(a.shape)} and lora_B {tuple(b.shape)}; expected "
                f"(r, {d_in}) and ({d_out}, r)"
            )
        if layer in cores and cores[layer].shape != (rank, rank):
            raise ModelMismatch(
                f"{layer}{R} has shape {tuple(cores[layer].shape)} between factors of rank {rank}; "
                f"expected ({rank}, {rank})"
            )
        ranks.add(rank)
    if len(ranks) > 1:
        raise ModelMismatch(f"layers of one adapter have ranks {sorted(ranks)}; expected one rank")
    return int(ranks.pop())


def _gated_hook(a: Tensor, b: Tensor, gate: Tensor, scale: float) -> Any:
    def add(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        return output + scale * ((inputs[0] @ a.T) * gate) @ b.T

    return add
