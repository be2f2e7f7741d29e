"""What iterated baselines share at a site: new records, their note in the journal, Grams.

Nothing here decides anything: which tensors train, what is summed and how it is merged stands in
each method's own file.
"""

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from fedkola.knowledge import journal
from fedkola.training.adapters import A, B
from fedkola.types import Broadcast, Client, Dataset, Weights


def pending(client: Client, asked: Broadcast) -> Dataset:
    """Records that have arrived by this round and were used in no earlier one."""
    return journal.pending(client.store, client.knowledge.until(asked.round), round=asked.round)


def note(
    client: Client, asked: Broadcast, data: Dataset, scope: str, z: Tensor | None = None
) -> None:
    """Journal these records as used in this round, so that no later round uses them again."""
    journal.write(
        client.store,
        journal.Entry(
            round=asked.round,
            scope=scope,
            records=data.records,
            patients=data.patients,
            labels=data.labels,
            windows=data.windows,
            z=torch.zeros(len(data), 0, dtype=torch.int16) if z is None else z,
        ),
    )


def scopes(client: Client, data: Dataset) -> Tensor:
    """The position (n,) in the catalogue's scopes of every record's label."""
    place = {scope: i for i, scope in enumerate(client.catalogue.scopes())}
    of = {label.code: place[label.scope] for label in client.catalogue.labels}
    return torch.tensor([of[code] for code in data.labels], dtype=torch.int64)


def num_steps(data: Dataset, *, epochs: float, batch: int) -> int:
    return math.ceil(epochs * len(data) / batch)


def factors(weights: Weights) -> dict[str, Tensor]:
    """The LoRA factors among these tensors."""
    return {name: value for name, value in weights.items() if name.endswith((A, B))}


def head(weights: Weights) -> dict[str, Tensor]:
    """What is no LoRA factor among these tensors."""
    return {name: value for name, value in weights.items() if not name.endswith((A, B))}


def layers(weights: Weights) -> tuple[str, ...]:
    """The adapted layers, in order of their names."""
    return tuple(sorted(name.removesuffix(A) for name in weights if name.endswith(A)))


def fresh(shapes: Weights, *, seed: int, number: int) -> dict[str, Tensor]:
    """A new adapter of these shapes: A uniform within 1/sqrt(d_in), B zero, by seed and round."""
    drawn: dict[str, Tensor] = {}
    generator = torch.Generator().manual_seed((seed * 1_000_003 + number) % 2**62)
    for name, value in sorted(factors(shapes).items()):
        if name.endswith(B):
            drawn[name] = torch.zeros(value.shape)
        else:
            bound = 1 / math.sqrt(value.shape[1])
            drawn[name] = (torch.rand(value.shape, generator=generator) * 2 - 1) * bound
    return drawn


def shifts(past: Weights, *, scale: float) -> dict[str, Tensor]:
    """``{layer}.delta`` = scale B A for every layer of an adapter that is frozen into the base."""
    return {f"{layer}.delta": scale * (past[layer + B] @ past[layer + A]) for layer in layers(past)}


def input_grams(
    client: Client, weights: Weights, data: Dataset, *, pinned: Weights
) -> dict[str, Tensor]:
    """X^T X (d_in, d_in) float64 of every adapted layer's inputs, each record's tokens averaged.

    The inputs are those under ``weights`` with the base shift in ``pinned``. An identity is put
    under each A, with zero columns beside B: the model stays the same, and the Gram of z = A x
    then holds that of x itself.
    """
    names = layers(weights)
    rank = len(weights[names[0] + A])
    widest = max(weights[layer + A].shape[1] for layer in names)
    tall: dict[str, Tensor] = {}
    wide: dict[str, Tensor] = {}
    for layer in names:
        a, b = weights[layer + A], weights[layer + B]
        below = torch.zeros(widest, a.shape[1])
        below.diagonal().fill_(1)
        tall[layer + A] = torch.cat([a, below])
        wide[layer + B] = torch.cat([b, torch.zeros(len(b), widest)], dim=1)
    found = client.grams(wide, data, pinned={**pinned, **tall})
    return {
        layer: found[f"{layer}.gram"][rank : rank + width, rank : rank + width]
        for layer, width in ((layer, weights[layer + A].shape[1]) for layer in names)
    }


def prefixed(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {f"{prefix}/{name}": value for name, value in tensors.items()}


def under(prefix: str, tensors: Weights) -> dict[str, Tensor]:
    """The tensors that ``prefixed`` put under this prefix, by their own names."""
    start = f"{prefix}/"
    return {name.removeprefix(start): v for name, v in tensors.items() if name.startswith(start)}


def beside(prefix: str, tensors: Weights) -> dict[str, Tensor]:
    """The tensors that are not under this prefix."""
    return {name: v for name, v in tensors.items() if not name.startswith(f"{prefix}/")}
