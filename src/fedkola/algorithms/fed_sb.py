"""Fed-SB: only a small core between two pinned factors learns (Singhal et al., 2025, on LoRA-SB).

server:  first   U S V' = svd(sum_k p_k B_k A_k),   B = U_r,  A = V_r',  R = S_r
         then    R <- sum_k p_k R_k,   head <- sum_k p_k head_k
client:  first   (A_k, B_k, head_k) = fit(A, B, head)
         then    (R_k, head_k) = fit(R, head; A and B pinned),   W + s B R A

With B and A the same for all the mean of products is exact: B R A = sum_k p_k B R_k A, at r^2
numbers a layer. The pinned factors span what a first exchange of ordinary adapters moved, summed
as dense products, as LoRA-SB spans the first step of full training; that exchange is the only
large one. Use it where bytes are scarce: ranks can be higher than elsewhere.
"""

from dataclasses import dataclass, field, replace
from typing import ClassVar, Self

import torch

from fedkola.algorithms.ask import LOCAL, ask
from fedkola.algorithms.learn import change, ending, layers, learn, product_addends
from fedkola.algorithms.setting import Setting, training
from fedkola.types import Broadcast, Client, Clients, Cohort, Steps, Update, Visibility, Weights
from fedkola.wire import WEIGHT, mean


@dataclass(frozen=True, slots=True, kw_only=True)
class State:
    """Ordinary factors until the first exchange, pinned ones with a core from then on; the head."""

    weights: Weights
    pinned: bool = False


@dataclass(frozen=True, kw_only=True)
class FedSB:
    needs: ClassVar[Visibility] = Visibility.SUM
    epochs: float
    batch: int
    lr: float
    level: int
    core: int = field(metadata=LOCAL, default=32)
    exchanges: int = field(metadata=LOCAL, default=1)

    @classmethod
    def of(cls, setting: Setting) -> Self:
        a = setting.plan.algorithm
        return cls(
            **training(setting),
            core=a.core,
            exchanges=a.exchanges,
        )

    def start(self, weights: Weights) -> State:
        return State(weights=weights)

    def round(self, number: int, state: State, cohort: Cohort, clients: Clients) -> State:
        """``exchanges`` times; the first one of a run finds the pinned factors."""
        for exchange in range(self.exchanges):
            step = "train" if state.pinned else "span"
            free = _free(state.weights) if state.pinned else _head(state.weights)
            products = [] if state.pinned else [f"{n}.product" for n in layers(state.weights)]
            scale = dict.fromkeys([*free, *products], 16)
            asked = ask(self, step, number, state.weights, scale=scale)
            answer = clients.sum(cohort, replace(asked, seed=exchange))
            moved = mean(answer)
            after = {**state.weights, **{name: old + moved[name] for name, old in free.items()}}
            if state.pinned:
                state = replace(state, weights=after)
            elif int(answer.words[WEIGHT]):
                found = pinned({name: moved[name] for name in products}, core=self.core)
                state = State(weights={**_head(after), **found}, pinned=True)
        return state

    def steps(self) -> Steps:
        return {"span": self.span, "train": self.train}

    def span(self, client: Client, asked: Broadcast) -> Update:
        """The weighted product of an ordinary adapter's factors, and the head's change."""
        trained, count = learn(self, client, asked, asked.tensors)
        update = change(client, _head(asked.tensors), trained, count)
        return replace(update, tensors={**update.tensors, **product_addends(trained, count)})

    def train(self, client: Client, asked: Broadcast) -> Update:
        """The weighted change of cores and head."""
        free, factors = _free(asked.tensors), ending(asked.tensors, ".lora_A", ".lora_B")
        trained, count = learn(self, client, asked, free, pinned=factors)
        return change(client, free, trained, count)


def pinned(products: Weights, *, core: int) -> Weights:
    """Factors and core of rank ``core`` at most: B R A is the best approximation of each product.

    Every layer gets the same rank, which no layer is too small for.
    """
    rank = min([core, *(size for product in products.values() for size in product.shape)])
    found: dict[str, torch.Tensor] = {}
    for name, product in products.items():
        layer = name.removesuffix(".product")
        u, s, v = torch.linalg.svd(product.double(), full_matrices=False)
        found[f"{layer}.lora_B"] = u[:, :rank].float().contiguous()
        found[f"{layer}.lora_A"] = v[:rank].float().contiguous()
        found[f"{layer}.lora_R"] = s[:rank].diag().float()
    return found


def _free(weights: Weights) -> Weights:
    return {**ending(weights, ".lora_R"), **_head(weights)}


def _head(weights: Weights) -> Weights:
    return {name: value for name, value in weights.items() if ".lora_" not in name}
