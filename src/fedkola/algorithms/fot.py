"""FOT, federated orthogonal training (Bakman et al., ICLR 2024), for adapters.

server:  Delta <- sum_k p_k (A_k, B_k) of a fresh adapter,   A <- A (I - U U^T)     so Delta U = 0
         Y = sum_k Y_k,   G ~ Y (Omega^T Y)^+ Y^T,   U <- U and the top eigenvectors of the rest
         of G, until U holds ``threshold`` of tr G
client:  (A_k, B_k, head_k) = fit(A, B, head; new records),   Y_k = X_k^T X_k Omega,   tr X_k^T X_k

Per adapted layer, U spans the inputs of all records so far: what is learnt later cannot change
that layer's answer to them. Sites send a sketch of their inputs' Gram under a public Gaussian
Omega with ``core`` columns, not the inputs; X^T X Omega is one power step beyond the X^T Omega of
a plain range finder, and does not depend on who holds a record. The adapter of a window is frozen
into the base after it; the head is averaged as in FedIT, for its rows belong to labels. Use it
for tasks that come one after the other; room to learn shrinks as U grows.
"""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import ClassVar, Self

import torch
from torch import Tensor

from fedkola import wire
from fedkola.algorithms import window
from fedkola.algorithms.ask import LOCAL, ask
from fedkola.algorithms.learn import taught
from fedkola.algorithms.setting import Setting, training
from fedkola.errors import Incompatible
from fedkola.training.adapters import A, combine
from fedkola.types import Broadcast, Client, Clients, Cohort, Steps, Update, Visibility, Weights

SCOPE = "fot"
PAST = "past"
SKETCH, TRACE = ".sketch", ".trace"
FRACTION = 24


@dataclass(frozen=True, slots=True, kw_only=True)
class State:
    """``past`` is one adapter of rank t r; ``basis`` holds U (d_in, k) float64 by layer."""

    past: Weights = field(default_factory=dict)
    head: Weights = field(default_factory=dict)
    shapes: Weights = field(default_factory=dict)
    basis: Mapping[str, Tensor] = field(default_factory=dict)

    @property
    def weights(self) -> Weights:
        return {**self.past, **self.head}


@dataclass(frozen=True, kw_only=True)
class FOT:
    needs: ClassVar[Visibility] = Visibility.SUM
    epochs: float
    batch: int
    lr: float
    level: int
    scale: float
    core: int
    sketch_seed: int
    threshold: float = field(metadata=LOCAL, default=0.95)
    exchanges: int = field(metadata=LOCAL, default=1)

    @classmethod
    def of(cls, setting: Setting) -> Self:
        a = setting.plan.algorithm
        if not 0 < a.threshold <= 1:
            raise Incompatible(
                f"algorithm.threshold = {a.threshold} is for fot the share of the inputs' energy "
                "to protect; give more than 0 and at most 1"
            )
        return cls(
            **training(setting),
            scale=setting.scale,
            core=a.core,
            sketch_seed=setting.plan.run.seed,
            threshold=a.threshold,
            exchanges=a.exchanges,
        )

    def start(self, weights: Weights) -> State:
        return State(head=window.head(weights), shapes=window.factors(weights))

    def round(self, number: int, state: State, cohort: Cohort, clients: Clients) -> State:
        """Train outside U, freeze what was learnt, then let U grow by the window's inputs."""
        fresh = window.fresh(state.shapes, seed=self.sketch_seed, number=number)
        current = {**outside(fresh, state.basis), **state.head}
        scale, records = dict.fromkeys(current, 16), 0.0
        for exchange in range(self.exchanges):
            tensors = {**current, **window.prefixed(PAST, state.past)}
            asked = ask(self, "train", number, tensors, word=32, scale=scale)
            total = clients.sum(cohort, replace(asked, seed=exchange))
            records += float(wire.reals(total)[wire.WEIGHT])
            step = wire.mean(total)
            moved = {name: old + step[name] for name, old in current.items()}
            current = outside(moved, state.basis)
        if not records:
            return state
        parts = [(state.past, 1.0)] if state.past else []
        past = combine([*parts, (window.factors(current), 1.0)])
        seen = self._sketch(number, past, cohort, clients)
        basis = {
            layer: extended(
                state.basis.get(layer),
                seen[layer + SKETCH],
                gaussian(layer, len(seen[layer + SKETCH]), self.core, self.sketch_seed),
                trace=float(seen[layer + TRACE]),
                share=self.threshold,
            )
            for layer in window.layers(past)
        }
        return replace(state, past=past, head=window.head(current), basis=basis)

    def _sketch(
        self, number: int, past: Weights, cohort: Cohort, clients: Clients
    ) -> dict[str, Tensor]:
        names = [layer + end for layer in window.layers(past) for end in (SKETCH, TRACE)]
        scale = dict.fromkeys(names, FRACTION)
        asked = ask(self, "sketch", number, past, word=64, scale=scale)
        return wire.reals(clients.sum(cohort, asked))

    def steps(self) -> Steps:
        return {"train": self.train, "sketch": self.sketch}

    def train(self, client: Client, asked: Broadcast) -> Update:
        """The weighted change of the current adapter and head on top of the frozen past."""
        past = window.under(PAST, asked.tensors)
        return taught(
            self,
            client,
            asked,
            window.pending(client, asked),
            window.beside(PAST, asked.tensors),
            scope=SCOPE,
            pinned=window.shifts(past, scale=self.scale),
        )

    def sketch(self, client: Client, asked: Broadcast) -> Update:
        """Sketch and trace of the Gram of each adapted layer's inputs on this round's records."""
        data = window.pending(client, asked)
        tensors = {}
        for layer, gram in window.input_grams(client, asked.tensors, data, pinned={}).items():
            omega = gaussian(layer, len(gram), self.core, self.sketch_seed)
            tensors[layer + SKETCH] = gram @ omega
            tensors[layer + TRACE] = gram.trace()
        return Update(client=client.name, tensors=tensors, weight=len(data))


def outside(weights: Weights, basis: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The same with A (I - U U^T) for every layer that has a U; then B A U = 0 for any B."""
    found = dict(weights)
    for layer, u in basis.items():
        a = found[layer + A].to(torch.float64)
        found[layer + A] = (a - (a @ u) @ u.T).to(torch.float32)
    return found


def extended(
    basis: Tensor | None, sketch: Tensor, omega: Tensor, *, trace: float, share: float
) -> Tensor:
    """U (d, k) float64 with the directions that are missing to hold ``share`` of ``trace``.

    ``sketch`` is G Omega (d, s) of a positive semidefinite G with this trace; G is read back as
    sketch (Omega^T sketch)^+ sketch^T, exactly so where its rank is at most s.
    """
    old = torch.zeros(len(sketch), 0, dtype=torch.float64) if basis is None else basis
    core = omega.T @ sketch
    values, vectors = torch.linalg.eigh((core + core.T) / 2)
    kept = values > 1e-10 * values.abs().max().clamp(min=1e-300)
    half = sketch @ (vectors[:, kept] / values[kept].sqrt())
    inside = old.T @ half
    rest = half - old @ inside
    # A second pass takes away what rounding left along U.
    rest = rest - old @ (old.T @ rest)
    new, sizes, _ = torch.linalg.svd(rest, full_matrices=False)
    held = float(inside.square().sum())
    energy = torch.cumsum(sizes.square(), 0) + held
    enough = int((energy < share * trace).sum()) + 1 if held < share * trace else 0
    real = int((sizes.square() > 1e-10 * trace).sum())
    room = len(sketch) - old.shape[1]
    return torch.cat([old, new[:, : min(enough, real, room)]], dim=1)


def gaussian(layer: str, width: int, columns: int, seed: int) -> Tensor:
    """The public Omega (width, columns) float64 of a layer; no more columns than rows."""
    name = hashlib.sha256(f"fedkola/fot/1/{seed}/{layer}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(name[:8], "little") >> 1)
    return torch.randn(width, min(width, columns), generator=generator, dtype=torch.float64)
