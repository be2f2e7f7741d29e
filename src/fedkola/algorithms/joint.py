"""Joint training: one model trained on the union of all records, the ceiling of every table.

server:  w <- fit(w; everything that has arrived)          one site holds the union
client:  fit

It is no federated method: it shows what would be reached if the records could be pooled. The
cohort must be the one site that holds the union; an average over one site is that site's model.
"""

from dataclasses import dataclass
from typing import ClassVar, Self

from fedkola.algorithms.ask import ask
from fedkola.algorithms.learn import change, fit
from fedkola.algorithms.setting import Setting, training
from fedkola.errors import Incompatible
from fedkola.types import Broadcast, Client, Clients, Cohort, Steps, Update, Visibility, Weights
from fedkola.wire import mean


@dataclass(frozen=True, slots=True, kw_only=True)
class State:
    """LoRA factors of every layer and the head over all labels of the reported level."""

    weights: Weights


@dataclass(frozen=True, kw_only=True)
class Joint:
    needs: ClassVar[Visibility] = Visibility.SUM
    epochs: float
    batch: int
    lr: float
    level: int

    @classmethod
    def of(cls, setting: Setting) -> Self:
        return cls(**training(setting))

    def start(self, weights: Weights) -> State:
        return State(weights=weights)

    def round(self, number: int, state: State, cohort: Cohort, clients: Clients) -> State:
        if len(cohort) != 1:
            raise Incompatible(
                f"joint training pools all records at one site, the cohort has {len(cohort)}"
            )
        scale = dict.fromkeys(state.weights, 30)
        asked = ask(self, "train", number, dict(state.weights), word=64, scale=scale)
        step = mean(clients.sum(cohort, asked))
        return State(weights={name: old + step[name] for name, old in state.weights.items()})

    def steps(self) -> Steps:
        return {"train": self.train}

    def train(self, client: Client, asked: Broadcast) -> Update:
        data = client.knowledge.until(asked.round)
        trained = fit(self, client, data, asked.tensors, seed=asked.seed)
        return change(client, asked.tensors, trained, 1)
