"""What one run consists of, and the state it last committed."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from fedkola import wire
from fedkola.algorithms.fedkola import State as BankState
from fedkola.audit.transcript import Transcript
from fedkola.client import Site, Trainer
from fedkola.knowledge import archive
from fedkola.knowledge.stream import Stream, first_round, window_of
from fedkola.ledger import Ledger
from fedkola.plan import Plan
from fedkola.training import adapters, whole
from fedkola.training.model import Foundation
from fedkola.types import Algorithm, Clients, Weights


@dataclass(frozen=True, slots=True, kw_only=True)
class Federation:
    """Everything one run needs: the plan, the data of its sites, the model, the algorithm, and the
    transcript where the run is recorded."""

    plan: Plan
    folder: Path
    stream: Stream
    foundation: Foundation
    trainer: Trainer
    sites: Mapping[str, Site]
    clients: Clients
    algorithm: Algorithm[Any]
    level: int
    transcript: Transcript | None = None

    @property
    def rounds(self) -> int:
        return rounds(self.plan, self.stream)

    def window(self, number: int) -> int:
        """The window of the stream that a round belongs to; the last one for rounds after it."""
        return min(window_of(number, self.plan.run.rounds_per_window), len(self.stream.windows))

    @property
    def one_window(self) -> bool:
        """Whether all records are there from the first of several rounds on."""
        return len(self.stream.windows) == 1 < self.rounds

    def moment(self, number: int) -> str:
        """When a round is, in words: the name of its window, if it has one of several."""
        rounds, names = self.plan.run.rounds_per_window, self.stream.windows
        window = window_of(number, rounds)
        if self.one_window or not 0 < window <= len(names):
            return f"round {number}"
        turn = number - first_round(window, rounds) + 1
        return names[window - 1] + (f", round {turn} of {rounds}" if rounds > 1 else "")


def rounds(plan: Plan, stream: Stream) -> int:
    """The rounds of a run: those the plan asks for, or as many as the windows span."""
    return plan.run.rounds or len(stream.windows) * plan.run.rounds_per_window


def load_state(federation: Federation, ledger: Ledger) -> tuple[Any, int]:
    """The last committed state and its round; the initial state and 0 for a fresh run."""
    start = federation.algorithm.start(initial_weights(federation))
    saved = ledger.last(federation.plan.run.name)
    if saved is None:
        return start, 0
    return wire.load(type(start), saved.state, saved.tensors), saved.number


def initial_weights(federation: Federation) -> Weights:
    """LoRA factors of every layer, and for an encoder a head with a row per reported node; every
    parameter of the base where the algorithm trains the whole model."""
    plan, base = federation.plan, federation.foundation
    if getattr(federation.algorithm, "whole", False):
        return whole.parameters(base)
    weights = dict(adapters.weights_template(base, rank=plan.algorithm.rank, seed=plan.run.seed))
    if base.kind == "encoder":
        rows = len(federation.stream.catalogue.nodes(federation.level))
        weights["head.weight"] = torch.zeros(rows, base.width)
        weights["head.bias"] = torch.zeros(rows)
    return weights


def settle_revision(federation: Federation, state: Any) -> None:
    """Let sites drop the old versions that the last committed round took out of the bank; again
    after a crash, where it changes nothing."""
    if isinstance(state, BankState):
        for name in state.revision.sites:
            federation.sites[name].revise(state.revision.places, round=state.number)


def sweep(federation: Federation, state: Any) -> None:
    """Delete cold cells that the committed state does not name: what was removed, or was written
    for a round that never came about."""
    if isinstance(state, BankState):
        archive.sweep(archive.place(federation.folder), state.bank)
