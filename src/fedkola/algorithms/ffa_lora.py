"""FFA-LoRA: federated averaging with a frozen A (Sun et al., ICLR 2024).

server:  B <- sum_k p_k B_k,   head <- sum_k p_k head_k,   p_k = n_k / n
client:  (B_k, head_k) = fit(B, head; A frozen, records that arrived)

With one A for all the mean of products is the product of means: B A = sum_k p_k B_k A. A is made
from a public seed at both ends (rows of a random orthogonal matrix), so it never travels, and a
round costs half of FedIT's bytes. Use it where exact averages matter more than what A could learn.
"""

from dataclasses import dataclass, field
from typing import ClassVar, Self

from fedkola.algorithms.ask import LOCAL
from fedkola.algorithms.learn import average, change, layers, learn
from fedkola.algorithms.setting import Setting, training
from fedkola.knowledge import basis
from fedkola.types import Broadcast, Client, Clients, Cohort, Steps, Update, Visibility, Weights


@dataclass(frozen=True, slots=True, kw_only=True)
class State:
    """The frozen A, the averaged B and the head."""

    weights: Weights


@dataclass(frozen=True, kw_only=True)
class FFALoRA:
    needs: ClassVar[Visibility] = Visibility.SUM
    rank: int
    basis_seed: int
    epochs: float
    batch: int
    lr: float
    level: int
    exchanges: int = field(metadata=LOCAL, default=1)

    @classmethod
    def of(cls, setting: Setting) -> Self:
        a = setting.plan.algorithm
        return cls(
            rank=a.rank,
            basis_seed=setting.plan.knowledge.basis_seed,
            **training(setting),
            exchanges=a.exchanges,
        )

    def start(self, weights: Weights) -> State:
        frozen = basis.slot(layers(weights), index=0, rank=self.rank, seed=self.basis_seed)
        return State(weights={**weights, **frozen})

    def round(self, number: int, state: State, cohort: Cohort, clients: Clients) -> State:
        """``exchanges`` times: everyone trains B and head, the changes are averaged."""
        free = {n: v for n, v in state.weights.items() if not n.endswith(".lora_A")}
        moved, _ = average(self, number, free, cohort, clients)
        return State(weights={**state.weights, **moved})

    def steps(self) -> Steps:
        return {"train": self.train}

    def train(self, client: Client, asked: Broadcast) -> Update:
        frozen = basis.slot(client.targets, index=0, rank=self.rank, seed=self.basis_seed)
        trained, count = learn(self, client, asked, asked.tensors, pinned=frozen)
        return change(client, asked.tensors, trained, count)
