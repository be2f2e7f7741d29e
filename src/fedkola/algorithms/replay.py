"""Replay: FedIT with a reservoir of old records at every site (Vitter 1985; Rolnick et al. 2019).

server:  A <- sum_k p_k A_k,   B <- sum_k p_k B_k,   head <- sum_k p_k head_k,   p_k = n_k / n
client:  (A_k, B_k, head_k) = fit(A, B, head; records that arrived and those of the reservoir)
         reservoir <- the ``buffer`` records of lowest rank among reservoir and new ones

A record's rank is a hash of run, site and record, as if drawn uniformly: whatever the order in
which records arrive, each one seen so far is kept with equal probability buffer / seen. Old
records never leave their site. Use it where a site may rehearse what it holds; only their ids are
stored, so a record that the site was asked to forget is not rehearsed again.
"""

import hashlib
import json
from collections.abc import Collection
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar, Self

from fedkola.algorithms.ask import LOCAL
from fedkola.algorithms.learn import average, change, learn, learnt
from fedkola.algorithms.setting import Setting, training
from fedkola.errors import DataError
from fedkola.files import write_private
from fedkola.types import Broadcast, Client, Clients, Cohort, Steps, Update, Visibility, Weights


@dataclass(frozen=True, slots=True, kw_only=True)
class State:
    """LoRA factors of every layer and the head over all labels of the reported level."""

    weights: Weights


@dataclass(frozen=True, kw_only=True)
class Replay:
    needs: ClassVar[Visibility] = Visibility.SUM
    buffer: int
    epochs: float
    batch: int
    lr: float
    level: int
    exchanges: int = field(metadata=LOCAL, default=1)

    @classmethod
    def of(cls, setting: Setting) -> Self:
        a = setting.plan.algorithm
        return cls(
            buffer=a.buffer,
            **training(setting),
            exchanges=a.exchanges,
        )

    def start(self, weights: Weights) -> State:
        return State(weights=weights)

    def round(self, number: int, state: State, cohort: Cohort, clients: Clients) -> State:
        """``exchanges`` times: everyone trains on new and kept records, changes are averaged."""
        weights, _ = average(self, number, state.weights, cohort, clients)
        return State(weights=weights)

    def steps(self) -> Steps:
        return {"train": self.train}

    def train(self, client: Client, asked: Broadcast) -> Update:
        """The weighted change of all weights; a site without new records rehearses its old ones."""
        kept = reservoir(client.store, before=asked.round)
        trained, count = learn(self, client, asked, asked.tensors, again=kept)
        held = frozenset(client.knowledge.until(asked.round).records)
        seen = {*(record for record in kept if record in held), *learnt(client, asked).records}
        source = f"{asked.run}/{client.name}"
        _keep(client.store, asked.round, lowest(seen, size=self.buffer, source=source))
        return change(client, asked.tensors, trained, count)


def lowest(records: Collection[str], *, size: int, source: str) -> tuple[str, ...]:
    """The ``size`` records of lowest rank: a uniform draw without replacement, by hashes.

    The lowest of a union are the lowest of its parts' lowest, so nothing else need be kept.
    """

    def rank(record: str) -> bytes:
        return hashlib.sha256(f"fedkola/reservoir/1/{source}/{record}".encode()).digest()

    return tuple(sorted(records, key=rank)[:size])


def reservoir(store: Path, *, before: int) -> tuple[str, ...]:
    """Records kept after the last round before this one; a round asked again finds the same.

    Raises DataError if the site's file cannot be read.
    """
    rounds = [int(path.stem) for path in (store / "reservoir").glob("*.json")]
    earlier = [number for number in rounds if number < before]
    if not earlier:
        return ()
    path = _path(store, max(earlier))
    try:
        return tuple(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError) as error:
        raise DataError(
            f"the reservoir {path} cannot be read ({error}); delete it to go on without old records"
        ) from error


def _keep(store: Path, round: int, records: tuple[str, ...]) -> None:
    """Write the reservoir after this round; of earlier ones only the last is still needed."""
    path = _path(store, round)
    write_private(path, json.dumps(records).encode())
    earlier = sorted(old for old in path.parent.glob("*.json") if int(old.stem) < round)
    for old in earlier[:-1]:
        old.unlink()


def _path(store: Path, round: int) -> Path:
    return store / "reservoir" / f"{round:06d}.json"
