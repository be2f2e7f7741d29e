"""FedEx-LoRA: averaged factors, and in the base what they miss (Singhal et al., ACL 2025).

server:  A = sum_k p_k A_k,   B = sum_k p_k B_k,   W <- W + s (sum_k p_k B_k A_k - B A)
client:  (A_k, B_k, head_k) = fit(A, B, head; base W),   product B_k A_k

The effective weight W + s B A is then exactly the mean of the sites' effective weights. The
residual is added as it stands, (d_out, d_in) like W: transposed it is another matrix, which a
square layer does not show. The paper reads every site's factors; here each site multiplies its own,
so that sums are enough, at d_out d_in numbers a layer instead of r (d_out + d_in). Use it as the
exact reference for FedIT.
"""

from dataclasses import dataclass, field, replace
from typing import ClassVar, Self

import torch

from fedkola.algorithms.ask import LOCAL, ask
from fedkola.algorithms.learn import change, layers, learn, product_addends
from fedkola.algorithms.setting import Setting, training
from fedkola.types import Broadcast, Client, Clients, Cohort, Steps, Update, Visibility, Weights
from fedkola.wire import WEIGHT, mean


@dataclass(frozen=True, slots=True, kw_only=True)
class State:
    """Averaged factors, the residuals in the base as ``{layer}.delta``, and the head."""

    weights: Weights


@dataclass(frozen=True, kw_only=True)
class FedExLoRA:
    needs: ClassVar[Visibility] = Visibility.SUM
    epochs: float
    batch: int
    lr: float
    level: int
    scale: float = field(metadata=LOCAL, default=1.0)
    exchanges: int = field(metadata=LOCAL, default=1)

    @classmethod
    def of(cls, setting: Setting) -> Self:
        a = setting.plan.algorithm
        return cls(
            **training(setting),
            scale=setting.scale,
            exchanges=a.exchanges,
        )

    def start(self, weights: Weights) -> State:
        base = {f"{layer}.delta": torch.zeros(shape) for layer, shape in layers(weights).items()}
        return State(weights={**weights, **base})

    def round(self, number: int, state: State, cohort: Cohort, clients: Clients) -> State:
        """``exchanges`` times: factors and head are averaged, the residual goes into the base."""
        free = [name for name in state.weights if not name.endswith(".delta")]
        products = [f"{layer}.product" for layer in layers(state.weights)]
        scale = dict.fromkeys([*free, *products], 16)
        for exchange in range(self.exchanges):
            asked = ask(self, "train", number, state.weights, scale=scale)
            answer = clients.sum(cohort, replace(asked, seed=exchange))
            # Without a new record anywhere there is no mean of products to come close to.
            if int(answer.words[WEIGHT]):
                state = State(weights=self.corrected(state.weights, mean(answer)))
        return state

    def corrected(self, weights: Weights, step: Weights) -> Weights:
        """Weights after the mean changes and the mean products of one exchange."""
        after = {name: old + step[name] for name, old in weights.items() if name in step}
        for layer in layers(weights):
            residual = (
                step[f"{layer}.product"] - after[f"{layer}.lora_B"] @ after[f"{layer}.lora_A"]
            )
            after[f"{layer}.delta"] = weights[f"{layer}.delta"] + self.scale * residual
        return after

    def steps(self) -> Steps:
        return {"train": self.train}

    def train(self, client: Client, asked: Broadcast) -> Update:
        """The weighted changes of factors and head, and the weighted product of the new factors."""
        base = {name: v for name, v in asked.tensors.items() if name.endswith(".delta")}
        free = {name: v for name, v in asked.tensors.items() if name not in base}
        trained, count = learn(self, client, asked, free, pinned=base)
        update = change(client, free, trained, count)
        return replace(update, tensors={**update.tensors, **product_addends(trained, count)})
