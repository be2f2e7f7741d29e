"""LoRM: closed-form merging of adapters over sites and windows (Salami et al., ICLR 2025).

server:  B <- ( sum_k B_k Gamma_k ) ( sum_k Gamma_k )^+,   Gamma_k = A G_k A^T       even exchanges
         A <- ( sum_k A_k G_k ) ( sum_k G_k )^+                                      odd exchanges
         W <- W0 + ( sum_t Delta_t G_t ) ( sum_t G_t )^+,   Delta_t = s B_t A_t      after window t
client:  fit one factor with the other pinned;   G_k = X_k^T X_k of each adapted layer's inputs

Each merge is the least-squares answer to "respond as every site did, on its own inputs", over
sites first and then over windows. Every window starts from a fresh adapter on the frozen base, so
B trains first; with one exchange a window A never moves. The head is averaged as in FedIT. Full
Grams of d_in^2 numbers a layer travel once a window and in odd exchanges: use it where models are
narrow or bytes are cheap.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import ClassVar, Self

import torch
from torch import Tensor

from fedkola import wire
from fedkola.algorithms import window
from fedkola.algorithms.ask import LOCAL, ask
from fedkola.algorithms.learn import change, fit
from fedkola.algorithms.setting import Setting, training
from fedkola.knowledge.statistics import pack, unpack
from fedkola.training.adapters import A, B
from fedkola.types import (
    Aggregate,
    Broadcast,
    Client,
    Clients,
    Cohort,
    Steps,
    Update,
    Visibility,
    Weights,
)

SCOPE = "lorm"
GRAM, PRODUCT = ".gram", ".product"
FRACTION = 24
CUT = 1e-6


@dataclass(frozen=True, slots=True, kw_only=True)
class State:
    """By layer: ``grams`` sum G_t (d_in, d_in) and ``products`` sum Delta_t G_t, both float64."""

    shifts: Weights = field(default_factory=dict)
    head: Weights = field(default_factory=dict)
    shapes: Weights = field(default_factory=dict)
    grams: Mapping[str, Tensor] = field(default_factory=dict)
    products: Mapping[str, Tensor] = field(default_factory=dict)

    @property
    def weights(self) -> Weights:
        return {**self.shifts, **self.head}


@dataclass(frozen=True, kw_only=True)
class LoRM:
    needs: ClassVar[Visibility] = Visibility.SUM
    epochs: float
    batch: int
    lr: float
    level: int
    scale: float = field(metadata=LOCAL, default=1.0)
    exchanges: int = field(metadata=LOCAL, default=1)
    seed: int = field(metadata=LOCAL, default=0)

    @classmethod
    def of(cls, setting: Setting) -> Self:
        a = setting.plan.algorithm
        return cls(
            **training(setting),
            scale=setting.scale,
            exchanges=a.exchanges,
            seed=setting.plan.run.seed,
        )

    def start(self, weights: Weights) -> State:
        return State(head=window.head(weights), shapes=window.factors(weights))

    def round(self, number: int, state: State, cohort: Cohort, clients: Clients) -> State:
        """Train the factors in turn, merge each in closed form, then merge with past windows."""
        adapter = window.fresh(state.shapes, seed=self.seed, number=number)
        head, records = dict(state.head), 0.0
        for exchange in range(self.exchanges):
            moving = B if exchange % 2 == 0 else A
            total = self._train(number, exchange, moving, {**adapter, **head}, cohort, clients)
            records += float(wire.reals(total)[wire.WEIGHT])
            adapter = {**adapter, **merged(wire.reals(total), adapter, moving=moving)}
            step = wire.mean(total)
            head = {name: old + step[name] for name, old in head.items()}
        if not records:
            return state
        seen = self._weigh(number, adapter, cohort, clients)
        grams, products, shifts = {}, {}, {}
        for layer, gram in seen.items():
            delta = self.scale * (adapter[layer + B].double() @ adapter[layer + A].double())
            grams[layer] = state.grams.get(layer, 0) + gram
            products[layer] = state.products.get(layer, 0) + delta @ gram
            shifts[f"{layer}.delta"] = solved(products[layer], grams[layer])
        return replace(state, shifts=shifts, head=head, grams=grams, products=products)

    def _train(
        self,
        number: int,
        exchange: int,
        moving: str,
        tensors: Weights,
        cohort: Cohort,
        clients: Clients,
    ) -> Aggregate:
        ends = (PRODUCT, GRAM)
        names = [layer + end for layer in window.layers(tensors) for end in ends]
        scale = dict.fromkeys([*names, *window.head(tensors)], FRACTION)
        step = "train_b" if moving == B else "train_a"
        asked = ask(self, step, number, tensors, word=64, scale=scale)
        return clients.sum(cohort, replace(asked, seed=exchange))

    def _weigh(
        self, number: int, adapter: Weights, cohort: Cohort, clients: Clients
    ) -> dict[str, Tensor]:
        scale = {layer + GRAM: FRACTION for layer in window.layers(adapter)}
        asked = ask(self, "weigh", number, adapter, word=64, scale=scale)
        found = wire.reals(clients.sum(cohort, asked))
        return {
            layer: unpack(found[layer + GRAM], adapter[layer + A].shape[1])
            for layer in window.layers(adapter)
        }

    def steps(self) -> Steps:
        return {"train_b": self.train_b, "train_a": self.train_a, "weigh": self.weigh}

    def train_b(self, client: Client, asked: Broadcast) -> Update:
        """B_k Gamma_k and Gamma_k of every layer, for a B trained under the pinned A."""
        pinned = {k: v for k, v in asked.tensors.items() if k.endswith(A)}
        update, trained = self._fit(client, asked, pinned)
        data = window.pending(client, asked)
        factors = {name: value for name, value in trained.items() if name.endswith(B)}
        found = client.grams(factors, data, pinned=pinned)
        grams = {name.removesuffix(GRAM): value for name, value in found.items()}
        return replace(update, tensors={**update.tensors, **_addends(factors, grams, B)})

    def train_a(self, client: Client, asked: Broadcast) -> Update:
        """A_k G_k and G_k of every layer, for an A trained under the pinned B."""
        pinned = {k: v for k, v in asked.tensors.items() if k.endswith(B)}
        update, trained = self._fit(client, asked, pinned)
        data = window.pending(client, asked)
        factors = {name: value for name, value in trained.items() if name.endswith(A)}
        grams = window.input_grams(client, {**factors, **pinned}, data, pinned={})
        return replace(update, tensors={**update.tensors, **_addends(factors, grams, A)})

    def weigh(self, client: Client, asked: Broadcast) -> Update:
        """The Grams of this round's records under the merged adapter, upper triangles."""
        data = window.pending(client, asked)
        grams = window.input_grams(client, asked.tensors, data, pinned={})
        return Update(
            client=client.name,
            tensors={layer + GRAM: pack(gram) for layer, gram in grams.items()},
            weight=len(data),
        )

    def _fit(self, client: Client, asked: Broadcast, pinned: Weights) -> tuple[Update, Weights]:
        """The weighted change of the head alone, and all that was trained."""
        data = window.pending(client, asked)
        weights = {name: v for name, v in asked.tensors.items() if name not in pinned}
        trained = fit(self, client, data, weights, seed=asked.seed, pinned=pinned)
        window.note(client, asked, data, SCOPE)
        return change(client, window.head(weights), trained, len(data)), trained


def merged(sums: Weights, adapter: Weights, *, moving: str) -> dict[str, Tensor]:
    """The factor that moved, of every layer; it stays where no site had a record."""
    found = {}
    for layer in window.layers(adapter):
        product, packed = sums[layer + PRODUCT], sums[layer + GRAM]
        gram = unpack(packed, product.shape[1])
        found[layer + moving] = solved(product, gram) if gram.any() else adapter[layer + moving]
    return found


def solved(product: Tensor, gram: Tensor) -> Tensor:
    """product gram^+, float32: least squares, of least norm where the Gram has no say."""
    inverse: Tensor = torch.linalg.pinv(gram, hermitian=True, rtol=CUT)
    return (product @ inverse).to(torch.float32)


def _addends(factors: Weights, grams: Mapping[str, Tensor], end: str) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    for layer, gram in grams.items():
        found[layer + PRODUCT] = factors[layer + end].to(torch.float64) @ gram
        found[layer + GRAM] = pack(gram)
    return found
