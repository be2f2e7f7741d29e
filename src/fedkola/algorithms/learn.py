"""What iterated baselines share: sites train on records not used before, changes are averaged.

Baselines differ in what is trained, what stays pinned and what becomes of the result; that stands
in their own files.
"""

from collections.abc import Collection
from dataclasses import replace
from typing import Protocol

import torch

from fedkola.algorithms import window
from fedkola.algorithms.ask import Asker, ask
from fedkola.knowledge import journal
from fedkola.types import Broadcast, Client, Clients, Cohort, Dataset, Penalty, Update, Weights
from fedkola.wire import WEIGHT, mean

SCOPE = "model"


class Recipe(Protocol):
    """How long and how fast to train; ``level`` is that of the head's rows."""

    @property
    def epochs(self) -> float: ...
    @property
    def batch(self) -> int: ...
    @property
    def lr(self) -> float: ...
    @property
    def level(self) -> int: ...


class Averaging(Asker, Protocol):
    """A method that averages its sites' changes this many times a round."""

    @property
    def exchanges(self) -> int: ...


def average(
    algorithm: Averaging,
    number: int,
    weights: Weights,
    cohort: Cohort,
    clients: Clients,
    *,
    beside: Weights | None = None,
) -> tuple[dict[str, torch.Tensor], int]:
    """Federated averaging: the step "train" is asked for changes of ``weights``, again and again.

    ``beside`` is said with them and stays as it is. Returns the weights, and how many records
    they were trained on, each counted once an exchange.
    """
    current, records = dict(weights), 0
    scale = dict.fromkeys(current, 16)
    for exchange in range(algorithm.exchanges):
        asked = ask(algorithm, "train", number, {**current, **(beside or {})}, scale=scale)
        total = clients.sum(cohort, replace(asked, seed=exchange))
        records += int(total.words[WEIGHT])
        step = mean(total)
        current = {name: old + step[name] for name, old in current.items()}
    return current, records


def learn(
    recipe: Recipe,
    client: Client,
    asked: Broadcast,
    weights: Weights,
    *,
    pinned: Weights | None = None,
    penalty: Penalty | None = None,
    again: Collection[str] = (),
) -> tuple[Weights, int]:
    """``weights`` after training on records that no earlier round used, and how many they were.

    Every exchange of one round trains on the same records. Those named ``again`` are trained on
    and counted with them, but only new ones are journalled, once training has succeeded.
    """
    new = window.pending(client, asked)
    data = new
    if again:
        whole, chosen = client.knowledge.until(asked.round), {*new.records, *again}
        data = whole.take([i for i, record in enumerate(whole.records) if record in chosen])
    trained = fit(recipe, client, data, weights, seed=asked.seed, pinned=pinned, penalty=penalty)
    window.note(client, asked, new, SCOPE)
    return trained, len(data)


def taught(
    recipe: Recipe,
    client: Client,
    asked: Broadcast,
    data: Dataset,
    weights: Weights,
    *,
    scope: str,
    pinned: Weights | None = None,
    penalty: Penalty | None = None,
) -> Update:
    """The weighted change of ``weights`` by training on ``data``, noted as used for ``scope``."""
    trained = fit(recipe, client, data, weights, seed=asked.seed, pinned=pinned, penalty=penalty)
    window.note(client, asked, data, scope)
    return change(client, weights, trained, len(data))


def fit(
    recipe: Recipe,
    client: Client,
    data: Dataset,
    weights: Weights,
    *,
    seed: int,
    pinned: Weights | None = None,
    penalty: Penalty | None = None,
) -> Weights:
    """``epochs`` passes over ``data``, with a row of the head for each node of the level."""
    return client.fit(
        weights,
        data,
        steps=window.num_steps(data, epochs=recipe.epochs, batch=recipe.batch),
        batch=recipe.batch,
        lr=recipe.lr,
        seed=seed,
        classes=client.catalogue.nodes(recipe.level),
        pinned=pinned,
        penalty=penalty,
    )


def learnt(client: Client, asked: Broadcast) -> Dataset:
    """The records that were new to the site in this round, once it has trained on them."""
    entry = journal.read(client.store, asked.round, SCOPE)
    chosen = frozenset(entry.records if entry else ())
    whole = client.knowledge.until(asked.round)
    return whole.take([i for i, record in enumerate(whole.records) if record in chosen])


def change(client: Client, old: Weights, new: Weights, count: int) -> Update:
    """The addend of a mean by records: n_k times how far each tensor has moved."""
    moved = {name: count * (new[name] - value) for name, value in old.items()}
    return Update(client=client.name, tensors=moved, weight=count)


def product_addends(trained: Weights, count: int) -> dict[str, torch.Tensor]:
    """``{layer}.product``: n_k B_k A_k of every layer, whose mean is not that of the factors."""
    return {
        f"{layer}.product": count * (trained[f"{layer}.lora_B"] @ trained[f"{layer}.lora_A"])
        for layer in layers(trained)
    }


def ending(weights: Weights, *ends: str) -> dict[str, torch.Tensor]:
    """The tensors whose names end in one of these, such as ".lora_A"."""
    return {name: value for name, value in weights.items() if name.endswith(ends)}


def layers(weights: Weights) -> dict[str, tuple[int, int]]:
    """Adapted layers, name -> (d_out, d_in), from their factors."""
    return {
        name.removesuffix(".lora_A"): (len(weights[name.removesuffix("A") + "B"]), a.shape[1])
        for name, a in weights.items()
        if name.endswith(".lora_A")
    }
