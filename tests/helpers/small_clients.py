"""Sites small enough to work a round by hand: features from a table, training from a function."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from fedkola import wire
from fedkola.algorithms import rebuild
from fedkola.engines.in_process import InProcess
from fedkola.errors import UpdateHidden
from fedkola.knowledge.stream import Records
from fedkola.privacy.guards import Guarded
from fedkola.types import (
    Aggregate,
    Broadcast,
    Catalogue,
    Clients,
    Cohort,
    Course,
    Dataset,
    Reply,
    Tally,
    Update,
    Weights,
)

Rows = Sequence[tuple[str, str]]
"""(text, label) of every record; its id is the site's name and its position."""


@dataclass(kw_only=True)
class TableClient:
    """A site whose embeddings are given by text and whose training is given as a function."""

    name: str
    data: Dataset
    catalogue: Catalogue
    store: Path
    table: Mapping[str, Sequence[int]] = field(default_factory=dict)
    targets: Mapping[str, tuple[int, int]] = field(default_factory=dict)
    trained: Callable[["TableClient", Weights], Weights] | None = None
    gram: Mapping[str, Tensor] = field(default_factory=dict)
    grammed: Callable[["TableClient", Dataset, Weights], Weights] | None = None
    judged: Callable[["TableClient", Dataset, Weights], float] | None = None
    squares: Mapping[str, Tensor] = field(default_factory=dict)
    courses: list[Course] = field(default_factory=list)

    @property
    def held_out(self) -> Dataset:
        return self.data

    @property
    def knowledge(self) -> Records:
        return Records(self.data)

    def fit(self, weights: Weights, data: Dataset, **_: object) -> Weights:
        assert self.trained is not None
        return self.trained(self, weights) if len(data) else weights

    def importance(self, weights: Weights, data: Dataset, **_: object) -> Weights:
        zeros = {name: torch.zeros_like(value) for name, value in weights.items()}
        return {**zeros, **self.squares} if len(data) else zeros

    def grams(self, weights: Weights, data: Dataset, *, pinned: Weights) -> Weights:
        if self.grammed is None:
            return self.gram
        return self.grammed(self, data, {**weights, **pinned})

    def features(self, data: Dataset, *, adapter: Weights | None = None) -> Tensor:
        width = len(next(iter(self.table.values())))
        rows = [self.table[text] for text in data.texts]
        return torch.tensor(rows, dtype=torch.int16).reshape(-1, width)

    def evaluate(
        self, weights: Weights, data: Dataset, *, classes: Sequence[str] = ()
    ) -> Mapping[str, float]:
        loss = self.judged(self, data, weights) if self.judged else 0.0
        return {"loss": loss * len(data), "count": float(len(data))}

    def pretrain(
        self, weights: Weights, data: Dataset, course: Course, *, kept: Weights, **_: object
    ) -> tuple[Weights, Weights]:
        assert self.trained is not None
        self.courses.append(course)
        moments = {n: v for n, v in kept.items() if n == "count" or n.startswith("second/")}
        done = {"cursor": torch.tensor(course.start + course.steps)}
        return self.trained(self, weights), {**moments, **done}

    def nll(self, weights: Weights, data: Dataset, *, length: int, rows: int) -> Tensor:
        """Four sequences of ten tokens, judged as ``evaluate`` does."""
        assert self.judged is not None
        loss = self.judged(self, data, weights)
        return torch.tensor([[10 * loss, 10.0]] * 4, dtype=torch.float64)

    def tokens(self, data: Dataset, *, length: int) -> int:
        return 40_940 * len(data)

    def answer(self, message: bytes) -> bytes:
        asked = wire.unpack_broadcast(message)
        update = rebuild(asked.algorithm).steps()[asked.step](self, asked)
        words = wire.words(update, asked.grid, asked.cohort)
        question = wire.question(message)
        return wire.pack_reply(Reply(client=self.name, question=question, words=words))


def dataset(site: str, rows: Rows, *, window: int = 1) -> Dataset:
    return Dataset(
        records=tuple(f"{site}{i}" for i in range(len(rows))),
        texts=tuple(text for text, _ in rows),
        labels=tuple(label for _, label in rows),
        patients=tuple(f"{site}-p{i}" for i in range(len(rows))),
        windows=tuple(window for _ in rows),
    )


def joined(clients: Sequence[TableClient], *, order: int = 0) -> Clients:
    """The server's view of these sites."""
    engine = InProcess({client.name: client.answer for client in clients}, order=order)
    return Guarded(engine, run="golden", seed=7)


@dataclass
class Watched:
    """Clients that note which questions were asked, and can hide sums."""

    inner: Clients
    asked: list[tuple[str, str, Cohort]] = field(default_factory=list)
    sums_hidden: bool = False

    def roster(self) -> Cohort:
        return self.inner.roster()

    def sum(self, cohort: Cohort, broadcast: Broadcast) -> Aggregate:
        if self.sums_hidden:
            raise UpdateHidden("this test allows no sum")
        self.asked.append(("sum", broadcast.step, cohort))
        return self.inner.sum(cohort, broadcast)

    def each(self, cohort: Cohort, broadcast: Broadcast) -> Iterator[Update]:
        self.asked.append(("each", broadcast.step, cohort))
        return self.inner.each(cohort, broadcast)

    def tally(self) -> Tally:
        return self.inner.tally()
