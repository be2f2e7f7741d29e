"""FedIT: federated averaging of LoRA factors and head (Zhang et al., ICASSP 2024; McMahan 2017).

server:  A <- sum_k p_k A_k,   B <- sum_k p_k B_k,   head <- sum_k p_k head_k,   p_k = n_k / n
client:  (A_k, B_k, head_k) = fit(A, B, head; records that arrived)

The mean of factors is not the mean of products: sum p B_k A_k - B A = sum p (B_k - B)(A_k - A).
Use it for knowledge that is alike at all sites and still; it has one adapter for everything.
"""

from dataclasses import dataclass, field
from typing import ClassVar, Self

from fedkola.algorithms.ask import LOCAL
from fedkola.algorithms.learn import average, change, learn
from fedkola.algorithms.setting import Setting, training
from fedkola.types import Broadcast, Client, Clients, Cohort, Steps, Update, Visibility, Weights


@dataclass(frozen=True, slots=True, kw_only=True)
class State:
    """LoRA factors of every layer and the head over all labels of the reported level."""

    weights: Weights


@dataclass(frozen=True, kw_only=True)
class FedIT:
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
        """``exchanges`` times: everyone trains on its new records, the changes are averaged."""
        weights, _ = average(self, number, state.weights, cohort, clients)
        return State(weights=weights)

    def steps(self) -> Steps:
        return {"train": self.train}

    def train(self, client: Client, asked: Broadcast) -> Update:
        """The weighted change of all weights after local training on records not used before."""
        trained, count = learn(self, client, asked, asked.tensors)
        return change(client, asked.tensors, trained, count)
