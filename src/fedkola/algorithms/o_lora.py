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

from fedkola import wire
from fedkola.algorithms import window
from fedkola.algorithms.ask import LOCAL, ask
from fedkola.algorithms.setting import Setting
from fedkola.algorithms.window import A
from fedkola.training.adapters import combine
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
            epochs=a.epochs,
            batch=a.batch,
            lr=a.lr,
            level=setting.level,
            scale=setting.scale,
            penalty=a.penalty,
            exchanges=a.exchanges,
            seed=setting.plan.run.seed,
        )

    def start(self, weights: Weights) -> State:
        adapter = window.factors(weights)
        head = {name: value for name, value in weights.items() if name not in adapter}
        return State(head=head, shapes=adapter)

    def round(self, number: int, state: State, cohort: Cohort, clients: Clients) -> State:
        """Train a fresh adapter beside the old ones; a window without new records adds none."""
        current = {**window.fresh(state.shapes, seed=self.seed, number=number), **state.head}
        scale, records = dict.fromkeys(current, 16), 0.0
        for exchange in range(self.exchanges):
            tensors = {**current, **window.prefixed(PAST, state.past)}
            asked = ask(self, "train", number, tensors, word=32, scale=scale)
            total = clients.sum(cohort, replace(asked, seed=exchange))
            records += float(wire.reals(total)[wire.WEIGHT])
            step = wire.mean(total)
            current = {name: old + step[name] for name, old in current.items()}
        if not records:
            return state
        adapter = window.factors(current)
        parts = [(state.past, 1.0)] if state.past else []
        return replace(
            state,
            past=combine([*parts, (adapter, 1.0)]),
            head={name: value for name, value in current.items() if name not in adapter},
        )

    def steps(self) -> Steps:
        return {"train": self.train}

    def train(self, client: Client, asked: Broadcast) -> Update:
        """The weighted change of the current adapter and head, held apart from the past ones."""
        past = window.under(PAST, asked.tensors)
        current = {k: v for k, v in asked.tensors.items() if not k.startswith(f"{PAST}/")}
        data = window.pending(client, asked)
        trained = client.fit(
            current,
            data,
            steps=window.num_steps(data, epochs=self.epochs, batch=self.batch),
            batch=self.batch,
            lr=self.lr,
            seed=asked.seed,
            classes=client.catalogue.nodes(self.level),
            pinned=window.shifts(past, scale=self.scale),
            penalty=apart(past, strength=self.penalty),
        )
        window.note(client, asked, data, SCOPE)
        changes = {name: len(data) * (trained[name] - old) for name, old in current.items()}
        return Update(client=client.name, tensors=changes, weight=len(data))


def apart(past: Mapping[str, Tensor], *, strength: float) -> Penalty | None:
    """strength * sum_i |A A_i^T|_F^2 for every layer; None before there is a past."""
    held = {name: value for name, value in past.items() if name.endswith(A)}
    return Penalty(strength=strength, apart=held) if held else None
