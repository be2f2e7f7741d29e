"""EWC: weights that earlier rounds needed are held back (Kirkpatrick et al., PNAS 2017).

server:  B <- sum_k p_k B_k,   F <- F + sum_k F_k / n,   B_old <- B,   and the head likewise
client:  (B_k, head_k) = fit(B, head; A frozen) with + penalty / 2 * sum F (B - B_old)^2
         F_k = sum over new records of the squared gradient of each one's loss

FFA-LoRA with a quadratic penalty: the diagonal of the Fisher information at the weights that a
round ended with, a mean over its records, summed over sites and rounds. There is one anchor, the
last weights: an anchor for each earlier round would count its data more than once (Huszar 2018).
Use it where knowledge comes in turns and nothing old may be kept at all.
"""

from dataclasses import dataclass, field
from typing import ClassVar, Self

import torch

from fedkola.algorithms.ask import LOCAL, ask
from fedkola.algorithms.learn import average, change, layers, learn, learnt
from fedkola.algorithms.setting import Setting, training
from fedkola.knowledge import basis
from fedkola.types import (
    Broadcast,
    Client,
    Clients,
    Cohort,
    Penalty,
    Steps,
    Update,
    Visibility,
    Weights,
)
from fedkola.wire import mean

FISHER, ANCHOR = "fisher/", "anchor/"


@dataclass(frozen=True, slots=True, kw_only=True)
class State:
    """The frozen A, the averaged B and head, and the importance of each number of these two."""

    weights: Weights
    fisher: Weights


@dataclass(frozen=True, kw_only=True)
class EWC:
    needs: ClassVar[Visibility] = Visibility.SUM
    rank: int
    basis_seed: int
    penalty: float
    sample: int
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
            penalty=a.penalty,
            sample=a.sample,
            **training(setting),
            exchanges=a.exchanges,
        )

    def start(self, weights: Weights) -> State:
        frozen = basis.slot(layers(weights), index=0, rank=self.rank, seed=self.basis_seed)
        free = {name: value for name, value in weights.items() if name not in frozen}
        return State(
            weights={**weights, **frozen},
            fisher={name: torch.zeros_like(value) for name, value in free.items()},
        )

    def round(self, number: int, state: State, cohort: Cohort, clients: Clients) -> State:
        """``exchanges`` times: train under the penalty; then sum how much each number matters."""
        anchor = {ANCHOR + name: state.weights[name] for name in state.fisher}
        fisher = {FISHER + name: value for name, value in state.fisher.items()}
        free = {name: state.weights[name] for name in state.fisher}
        free, _ = average(self, number, free, cohort, clients, beside={**anchor, **fisher})
        # Squared gradients span many orders of magnitude, hence the wide words.
        asked = ask(self, "weigh", number, free, word=64, scale=dict.fromkeys(free, 30))
        found = mean(clients.sum(cohort, asked))
        return State(
            weights={**state.weights, **free},
            fisher={name: old + found[name] for name, old in state.fisher.items()},
        )

    def steps(self) -> Steps:
        return {"train": self.train, "weigh": self.weigh}

    def train(self, client: Client, asked: Broadcast) -> Update:
        """The weighted change of B and head after training under the penalty."""
        anchor, fisher = _part(asked.tensors, ANCHOR), _part(asked.tensors, FISHER)
        free = {name: asked.tensors[name] for name in fisher}
        held = Penalty(strength=self.penalty, importance=fisher, anchor=anchor)
        trained, count = learn(self, client, asked, free, pinned=self._frozen(client), penalty=held)
        return change(client, free, trained, count)

    def weigh(self, client: Client, asked: Broadcast) -> Update:
        """Squared gradients, summed over ``sample`` of the records that this round trained on."""
        data = learnt(client, asked)
        squares = client.importance(
            asked.tensors,
            data,
            seed=asked.seed,
            records=self.sample,
            classes=client.catalogue.nodes(self.level),
            pinned=self._frozen(client),
        )
        count = min(self.sample, len(data)) if self.sample else len(data)
        return Update(client=client.name, tensors=squares, weight=count)

    def _frozen(self, client: Client) -> Weights:
        return basis.slot(client.targets, index=0, rank=self.rank, seed=self.basis_seed)


def _part(tensors: Weights, prefix: str) -> Weights:
    return {name.removeprefix(prefix): v for name, v in tensors.items() if name.startswith(prefix)}
