"""The last token of a decoder's sequence: no later place reads it, so only its prediction is left.

The head's input is h = w * x (+ b), x normalised, and the loss at a place has the gradient
g = W^T (softmax - onehot(y)) in h, hence g * x in w. Summed over places that is linear in the
one-hot vectors: with all tokens but the last known, the last is the one for which the sum points
where the seen change of the last norm does. Whatever the learning rate, only the direction counts.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any, cast

import torch
from torch import Tensor, nn

from fedkola.audit.evidence import Sequences
from fedkola.types import Weights

_PASSES = 6
_MOST = 16
_ALIKE = 1 - 1e-9


def completed(
    model: nn.Module, change: Weights, prefixes: Sequences, count: int | None
) -> Sequences:
    """Each of the first ``count`` prefixes with its last token; all of them as they were where the
    head does not read a norm, or the norm was not in the change.

    Without a count, the number of prefixes that explains the change best.
    """
    norm = _last_norm(model, prefixes)
    if norm is None or f"{norm[0]}.weight" not in change:
        return prefixes
    seen = _seen(change, norm[0])
    sizes = [min(count, len(prefixes))] if count else range(1, min(len(prefixes), _MOST) + 1)
    parts = [_part(model, norm[1], prefix, seen) for prefix in prefixes[: max(sizes)]]
    best: tuple[float, list[int]] = (-1.0, [])
    for size in sizes:
        found = _fitted(parts[:size], seen)
        best = max(best, found, key=lambda item: item[0])
        if best[0] > _ALIKE:
            break
    ends = best[1]
    return (
        *((*prefix, end) for prefix, end in zip(prefixes, ends, strict=False)),
        *prefixes[len(ends) :],
    )


# --- private --------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _Part:
    """What one sequence adds to the norm's gradient: ``known`` (m,), and ``ends`` (V, m), what each
    last token would add."""

    known: Tensor
    ends: Tensor


def _seen(change: Weights, name: str) -> Tensor:
    parts = [change[f"{name}.weight"]]
    if f"{name}.bias" in change:
        parts.append(change[f"{name}.bias"])
    return torch.cat([part.double() for part in parts])


@torch.no_grad()
def _part(model: nn.Module, norm: nn.Module, prefix: Sequence[int], seen: Tensor) -> _Part:
    inputs, logits = _run(model, prefix)
    weight = cast(Tensor, norm.weight).double()
    bias = getattr(norm, "bias", None)
    states = (inputs - (0.0 if bias is None else cast(Tensor, bias).double())) / weight
    head = cast(Any, model).get_output_embeddings().weight.double()
    mean = logits.softmax(-1) @ head
    wide = len(seen) > len(weight)

    def moved(back: Tensor, state: Tensor) -> Tensor:
        return torch.cat([back * state, back], -1) if wide else back * state

    targets = head[torch.tensor(prefix[1:], dtype=torch.long)]
    known = moved(mean[:-1] - targets, states[:-1]).sum(0)
    return _Part(known=known, ends=moved(mean[-1] - head, states[-1]))


def _fitted(parts: Sequence[_Part], seen: Tensor) -> tuple[float, list[int]]:
    """Last tokens chosen one after the other, then again in turn and exchanged in pairs, and how
    well they point."""
    known = torch.stack([part.known for part in parts]).sum(0)
    ends: list[int] = []
    order = _order(parts, known, seen)
    total = known
    for i in order:
        ends.append(int(_likeness(total + parts[i].ends, seen).argmax()))
        total = total + parts[i].ends[ends[-1]]
    ends = [ends[order.index(i)] for i in range(len(parts))]
    best = float(_likeness(total, seen))
    for _ in range(_PASSES):
        before = best
        for i, part in enumerate(parts):
            rest = _sum(parts, ends, known) - part.ends[ends[i]]
            likeness = _likeness(rest + part.ends, seen)
            ends[i], best = int(likeness.argmax()), float(likeness.max())
        for i, j in combinations(range(len(parts)), 2):
            other = list(ends)
            other[i], other[j] = ends[j], ends[i]
            swapped = float(_likeness(_sum(parts, other, known), seen))
            if swapped > best:
                ends, best = other, swapped
        if best <= before:
            break
    return best, ends


def _sum(parts: Sequence[_Part], ends: Sequence[int], known: Tensor) -> Tensor:
    return known + torch.stack([part.ends[end] for part, end in zip(parts, ends, strict=True)]).sum(
        0
    )


def _order(parts: Sequence[_Part], known: Tensor, seen: Tensor) -> list[int]:
    """Sequences whose last token shows most come first."""
    gains = [float(_likeness(known + part.ends, seen).max()) for part in parts]
    return sorted(range(len(parts)), key=lambda i: -gains[i])


def _likeness(rows: Tensor, seen: Tensor) -> Tensor:
    """|cosine| of each row with the seen change: the sign is the optimiser's."""
    size: Tensor = torch.linalg.vector_norm(rows, dim=-1) * torch.linalg.vector_norm(seen)
    return (rows @ seen).abs() / size.clamp_min(1e-300)


def _run(model: nn.Module, prefix: Sequence[int]) -> tuple[Tensor, Tensor]:
    """The head's inputs (T, d) and outputs (T, V), float64."""
    held: list[Tensor] = []
    head = cast(Any, model).get_output_embeddings()
    hook = head.register_forward_pre_hook(lambda module, given: held.append(given[0]))
    try:
        found = cast(Any, model)(input_ids=torch.tensor([list(prefix)]))
    finally:
        hook.remove()
    return held[0][0].double(), found.logits[0].double()


@torch.no_grad()
def _last_norm(model: nn.Module, prefixes: Sequences) -> tuple[str, nn.Module] | None:
    """The norm whose output is the head's input, if there is one."""
    head: Any = cast(Any, model).get_output_embeddings()
    if head is None or not prefixes:
        return None
    outputs: dict[str, Tensor] = {}
    wanted: list[Tensor] = []
    hooks = [head.register_forward_pre_hook(lambda module, given: wanted.append(given[0]))]
    for name, module in model.named_modules():
        weight = getattr(module, "weight", None)
        if isinstance(weight, Tensor) and weight.ndim == 1:

            def keep(
                module: nn.Module, given: tuple[Tensor, ...], out: Tensor, name: str = name
            ) -> None:
                outputs[name] = out

            hooks.append(module.register_forward_hook(keep))
    try:
        cast(Any, model)(input_ids=torch.tensor([list(prefixes[0])]))
    finally:
        for hook in hooks:
            hook.remove()
    fits = [name for name, out in outputs.items() if wanted and torch.equal(out, wanted[0])]
    return (fits[0], model.get_submodule(fits[0])) if fits else None
