"""Oracle routing: one adapter and head for every piece of knowledge, chosen by the truth.

server:  w_m <- sum_k p_k w_k   over the sites that hold new records of scope m
         answer x under w_m of the scope that x truly belongs to
client:  w_k = fit(w_m; new records of scope m)

No method: a text's scope is not known when it is asked. It is the upper row of every table with
routing, and what other rows lack against it is the price of their routers. Without the truth it
cannot answer, so it has ``routed`` in the place of ``answer``.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import ClassVar, Self

import torch
from torch import Tensor

from fedkola.algorithms import routed, window
from fedkola.algorithms.ask import LOCAL, ask
from fedkola.algorithms.learn import average, taught
from fedkola.algorithms.setting import Setting, training
from fedkola.types import (
    Broadcast,
    Client,
    Clients,
    Cohort,
    Dataset,
    Reader,
    Steps,
    Update,
    Visibility,
    Weights,
)

COUNTS, MODULE = "counts", "module"


@dataclass(frozen=True, slots=True, kw_only=True)
class State:
    """``weights`` are what every module starts from; ``modules`` adapter and head by scope."""

    weights: Weights
    modules: Mapping[str, Weights] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Oracle:
    needs: ClassVar[Visibility] = Visibility.SUM
    epochs: float
    batch: int
    lr: float
    level: int
    exchanges: int = field(metadata=LOCAL, default=1)
    scopes: tuple[str, ...] = field(metadata=LOCAL, default=())

    @classmethod
    def of(cls, setting: Setting) -> Self:
        a = setting.plan.algorithm
        return cls(
            **training(setting),
            exchanges=a.exchanges,
            scopes=setting.catalogue.scopes(),
        )

    def start(self, weights: Weights) -> State:
        return State(weights=weights)

    def round(self, number: int, state: State, cohort: Cohort, clients: Clients) -> State:
        """Federated averaging of every scope that has new records anywhere."""
        asked = ask(self, "count", number, {}, word=32, scale={COUNTS: 0})
        counts = clients.sum(cohort, asked).words[COUNTS]
        modules = dict(state.modules)
        for index in torch.nonzero(counts).flatten().tolist():
            scope, beside = self.scopes[index], {MODULE: torch.tensor(index)}
            start = modules.get(scope, state.weights)
            modules[scope], _ = average(self, number, start, cohort, clients, beside=beside)
        return replace(state, modules=modules)

    def routed(
        self, state: State, reader: Reader, texts: Sequence[str], scopes: Sequence[str]
    ) -> Tensor:
        """Scores (n, nodes), each text under the module of its true scope; -inf without one."""
        parts = list(state.modules.values())
        return routed.scores(reader, parts, _places(state, scopes), texts)

    def routed_losses(
        self,
        state: State,
        reader: Reader,
        prompts: Sequence[str],
        texts: Sequence[str],
        scopes: Sequence[str],
    ) -> Tensor:
        parts = list(state.modules.values())
        return routed.losses(reader, parts, _places(state, scopes), prompts, texts)

    def steps(self) -> Steps:
        return {"count": self.count, "train": self.train}

    def count(self, client: Client, asked: Broadcast) -> Update:
        """New records by scope."""
        data = window.pending(client, asked)
        num = len(client.catalogue.scopes())
        counts = torch.bincount(window.scopes(client, data), minlength=num)
        return Update(client=client.name, tensors={COUNTS: counts}, weight=len(data))

    def train(self, client: Client, asked: Broadcast) -> Update:
        """The weighted change by training on the new records of one scope; zeros without any."""
        index = int(asked.tensors[MODULE])
        data = _of_scope(client, window.pending(client, asked), index)
        weights = {name: v for name, v in asked.tensors.items() if name != MODULE}
        return taught(self, client, asked, data, weights, scope=f"oracle/{index}")


def _of_scope(client: Client, data: Dataset, index: int) -> Dataset:
    rows = window.scopes(client, data) == index
    return data.take(torch.nonzero(rows).flatten().tolist())


def _places(state: State, scopes: Sequence[str]) -> Tensor:
    place = {scope: i for i, scope in enumerate(state.modules)}
    return torch.tensor([place.get(scope, -1) for scope in scopes], dtype=torch.int64)
