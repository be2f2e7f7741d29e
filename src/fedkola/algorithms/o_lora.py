"""O-LoRA, federated: an adapter per window, orthogonal to the old (Wang et al., EMNLP 2023).

server:  A_t <- sum_k p_k A_k,   B_t <- sum_k p_k B_k,   head <- sum_k p_k head_k
         W <- W + s B_t A_t after the window; A_t joins A_1 .. A_{t-1}
client:  (A_k, B_k, head_k) = fit(A_t, B_t, head; loss + strength * sum_i |A_t A_i^T|^2)

Old adapters stay frozen and are all used. The penalty is pulled at each site and the factors are
averaged, which is exact for neither: products are missed as in FedIT, and the mean of A_k that
are orthogonal to A_i is again so only as far as each of them is. Use it for tasks that come one
after the other; rank, and with it the download, grows by one adapter per window.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import ClassVar, Self

from torch import Tensor

from fedkola.algorithms import window
from fedkola.algorithms.ask import LOCAL
from fedkola.algorithms.learn import average, taught
from fedkola.algorithms.setting import Setting, training
from fedkola.training.adapters import A, combine
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

SCOPE = "o_lora"
PAST = "past"


@dataclass(frozen=True, slots=True, kw_only=True)
class State:
    """``past`` is one adapter of rank t r, ``head`` what is no adapter, ``shapes`` a fresh one."""

    past: Weights = field(default_factory=dict)
    head: Weights = field(default_factory=dict)
    shapes: Weights = field(default_factory=dict)

    @property
    def weights(self) -> Weights:
        return {**self.past, **self.head}


@dataclass(frozen=True, kw_only=True)
class OLoRA:
    needs: ClassVar[Visibility] = Visibility.SUM
    epochs: float
    batch: int
    lr: float
    level: int
    scale: float
    penalty: float
    exchanges: int = field(metadata=LOCAL, default=1)
    seed: int = field(metadata=LOCAL, default=0)

    @classmethod
    def of(cls, setting: Setting) -> Self:
        a = setting.plan.algorithm
        return cls(
            **training(setting),
            scale=setting.scale,
            penalty=a.penalty,
            exchanges=a.exchanges,
            seed=setting.plan.run.seed,
        )

    def start(self, weights: Weights) -> State:
        return State(head=window.head(weights), shapes=window.factors(weights))

    def round(self, number: int, state: State, cohort: Cohort, clients: Clients) -> State:
        """Train a fresh adapter beside the old ones; a window without new records adds none."""
        fresh = window.fresh(state.shapes, seed=self.seed, number=number)
        start, past = {**fresh, **state.head}, window.prefixed(PAST, state.past)
        current, records = average(self, number, start, cohort, clients, beside=past)
        if not records:
            return state
        parts = [(state.past, 1.0)] if state.past else []
        past = combine([*parts, (window.factors(current), 1.0)])
        return replace(state, past=past, head=window.head(current))

    def steps(self) -> Steps:
        return {"train": self.train}

    def train(self, client: Client, asked: Broadcast) -> Update:
        """The weighted change of the current adapter and head, held apart from the past ones."""
        past = window.under(PAST, asked.tensors)
        return taught(
            self,
            client,
            asked,
            window.pending(client, asked),
            window.beside(PAST, asked.tensors),
            scope=SCOPE,
            pinned=window.shifts(past, scale=self.scale),
            penalty=apart(past, strength=self.penalty),
        )


def apart(past: Mapping[str, Tensor], *, strength: float) -> Penalty | None:
    """strength * sum_i |A A_i^T|_F^2 for every layer; None before there is a past."""
    held = {name: value for name, value in past.items() if name.endswith(A)}
    return Penalty(strength=strength, apart=held) if held else None
