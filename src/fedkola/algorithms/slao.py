"""SLAO, federated: one adapter on an orthogonal start, merged (Qiao and Mahdavi, ICLR 2026).

server:  start of window t:   A_t = Q^T of A_{t-1}^T = Q R,   B_t = B_{t-1}
         A_t, B_t, head <- sum_k p_k of what the sites trained
         A <- A_t,   B <- B + (B_t - B) / sqrt(t)             the adapter that answers
client:  (A_k, B_k, head_k) = fit(A_t, B_t, head; new records)

A_t has orthonormal rows at its start, and its row space is that of the window before; the factor B
of all windows is an average in which later ones weigh less and less. Averaging over sites is that
of FedIT. Use it where tasks follow each other and memory must not grow with them.
"""

import math
from dataclasses import dataclass, field
from typing import ClassVar, Self

import torch
from torch import Tensor

from fedkola.algorithms import window
from fedkola.algorithms.ask import LOCAL
from fedkola.algorithms.learn import average, taught
from fedkola.algorithms.setting import Setting, training
from fedkola.training.adapters import A, B
from fedkola.types import Broadcast, Client, Clients, Cohort, Steps, Update, Visibility, Weights

SCOPE = "slao"


@dataclass(frozen=True, slots=True, kw_only=True)
class State:
    """``weights`` answer; ``tuned`` are the factors that the last window trained; ``tasks`` = t."""

    weights: Weights
    tuned: Weights
    tasks: int = 0


@dataclass(frozen=True, kw_only=True)
class SLAO:
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
        return State(weights=weights, tuned=window.factors(weights))

    def round(self, number: int, state: State, cohort: Cohort, clients: Clients) -> State:
        """One window is one task; a window without new records is none."""
        start, head = state.tuned, window.head(state.weights)
        if state.tasks:
            start = orthogonal(start)
        current, records = average(self, number, {**start, **head}, cohort, clients)
        if not records:
            return state
        tuned, task = window.factors(current), state.tasks + 1
        return State(weights=merged(state.weights, current, task=task), tuned=tuned, tasks=task)

    def steps(self) -> Steps:
        return {"train": self.train}

    def train(self, client: Client, asked: Broadcast) -> Update:
        """The weighted change of adapter and head by training on records not used before."""
        data = window.pending(client, asked)
        return taught(self, client, asked, data, asked.tensors, scope=SCOPE)


def orthogonal(tuned: Weights) -> dict[str, Tensor]:
    """A with orthonormal rows that span the same space, and B as it was.

    Columns of Q are turned so that R has a positive diagonal: the basis then does not depend on
    the signs that LAPACK chose.
    """
    found = dict(tuned)
    for layer in window.layers(tuned):
        q, r = torch.linalg.qr(tuned[layer + A].T.to(torch.float64))
        signs = torch.where(r.diagonal() < 0, -1.0, 1.0).to(torch.float64)
        found[layer + A] = (q * signs).T.to(torch.float32).contiguous()
    return found


def merged(old: Weights, current: Weights, *, task: int) -> dict[str, Tensor]:
    """The adapter and head that answer after a task: only B looks back."""
    share = 1 / math.sqrt(task)
    return {
        name: old[name] + share * (value - old[name]) if name.endswith(B) else value
        for name, value in current.items()
    }
