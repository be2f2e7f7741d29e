"""RoLoRA: the two factors learn in turn (Chen et al., NeurIPS 2025).

server:  odd exchanges   B <- sum_k p_k B_k        even exchanges   A <- sum_k p_k A_k
client:  odd exchanges   B_k = fit(B; A frozen)    even exchanges   A_k = fit(A; B frozen)

One factor is the same at all sites in every exchange, so the mean of products is the product of
means, as in FFA-LoRA, yet both factors learn. B comes first: while it is zero, A has no gradient.
The head trains with either factor. Exchanges are counted over the whole run.
"""

from dataclasses import dataclass, field, replace
from typing import ClassVar, Self

from fedkola.algorithms.ask import LOCAL, ask
from fedkola.algorithms.learn import change, ending, learn
from fedkola.algorithms.setting import Setting, training
from fedkola.types import Broadcast, Client, Clients, Cohort, Steps, Update, Visibility, Weights
from fedkola.wire import mean


@dataclass(frozen=True, slots=True, kw_only=True)
class State:
    """Both factors, the head, and how many exchanges there were."""

    weights: Weights
    exchanges: int = 0


@dataclass(frozen=True, kw_only=True)
class RoLoRA:
    needs: ClassVar[Visibility] = Visibility.SUM
    epochs: float
    batch: int
    lr: float
    level: int
    exchanges: int = field(metadata=LOCAL, default=1)

    @classmethod
    def of(cls, setting: Setting) -> Self:
        a = setting.plan.algorithm
        return cls(**training(setting), exchanges=a.exchanges)

    def start(self, weights: Weights) -> State:
        return State(weights=weights)

    def round(self, number: int, state: State, cohort: Cohort, clients: Clients) -> State:
        """``exchanges`` times: everyone trains one factor and the head, changes are averaged."""
        for exchange in range(self.exchanges):
            step = ("train_b", "train_a")[state.exchanges % 2]
            free = _free(state.weights, step)
            asked = ask(self, step, number, state.weights, scale=dict.fromkeys(free, 16))
            moved = mean(clients.sum(cohort, replace(asked, seed=exchange)))
            state = State(
                weights={**state.weights, **{n: old + moved[n] for n, old in free.items()}},
                exchanges=state.exchanges + 1,
            )
        return state

    def steps(self) -> Steps:
        return {"train_b": self.train, "train_a": self.train}

    def train(self, client: Client, asked: Broadcast) -> Update:
        """The weighted change of one factor and the head, the other factor frozen."""
        free = _free(asked.tensors, asked.step)
        frozen = {name: value for name, value in asked.tensors.items() if name not in free}
        trained, count = learn(self, client, asked, free, pinned=frozen)
        return change(client, free, trained, count)


def _free(weights: Weights, step: str) -> Weights:
    """What trains in a step: one factor of every layer, and the head."""
    frozen = ending(weights, ".lora_A" if step == "train_b" else ".lora_B")
    return {name: value for name, value in weights.items() if name not in frozen}
