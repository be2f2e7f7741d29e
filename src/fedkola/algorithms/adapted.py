"""FedKoLa on a representation that the federation adapts as its knowledge grows.

server:  head <- mean frozen embedding of every node                      lesson 1, a sum
         (A, B, head) <- Adam on sum_k grad_k / sum_k n_k, step by step   lesson 2, sums
         bank <- empty; vote and fill under (frozen, adapted)             consolidation
client:  grad_k of cross-entropy on a share of its records, half of them shortened

Sums of gradients are those of one site with all records, whatever labels a site holds. Averaged
local steps are not: with specialties as sites, texts become alike (docs/decisions/0006).
Consolidation comes when the records have grown by ``adapt_share`` since the last one. The adapter
always starts anew and learns from everything that sites hold by then, so it does not depend on
older ones; every site sums its records anew under it, which is exact. A site that is away sums its
records when it returns. Use it where frozen features are the limit. What it gives up is that
removal reaches the adapter only with the next consolidation. Sources: FedSGD (McMahan et al.,
AISTATS 2017), LoRA (Hu et al., ICLR 2022).
"""

import math
from dataclasses import dataclass, field, fields, replace
from typing import Self

import torch

from fedkola import wire
from fedkola.algorithms import questions
from fedkola.algorithms.ask import LOCAL, ask
from fedkola.algorithms.fedkola import FedKoLa, State
from fedkola.algorithms.setting import Setting
from fedkola.errors import CohortTooSmall, Incompatible
from fedkola.knowledge import adaptation
from fedkola.knowledge import bank as banks
from fedkola.knowledge.bank import Bank, CellKind, KnowledgeCell
from fedkola.training import adapters
from fedkola.training.fit import HEAD
from fedkola.types import (
    Aggregate,
    Broadcast,
    Client,
    Clients,
    Cohort,
    Dataset,
    Steps,
    Update,
    Weights,
)

GRID = 18
# A head of length 20 / 64 makes logits of 20 times the cosine, for local training multiplies by 64.
# Beside the frozen embeddings, top-1 on development synonyms at p = 4,096: 0.746 at 20, 0.731 at
# 64, 0.729 without adaptation (central, one seed each).
LENGTH = 20 / 64
KINDS = (CellKind.ANALYTIC, CellKind.ROUTER, CellKind.SCATTER)


@dataclass(frozen=True, kw_only=True)
class Adapted(FedKoLa):
    epochs: float
    shortened: float
    adapt_rank: int
    exchanges: int
    adapt_energy: float = field(metadata=LOCAL, default=1.0)
    adapt_share: float = field(metadata=LOCAL, default=1.0)
    until: int | None = field(metadata=LOCAL, default=None)

    @classmethod
    def of(cls, setting: Setting) -> Self:
        """Raises Incompatible with a LoRA lane: its modules would be slots of a base that moves."""
        k, a = setting.plan.knowledge, setting.plan.algorithm
        if "lora" in k.lanes:
            raise Incompatible(
                'algorithm.name = adapted moves the base, so knowledge.lanes cannot have "lora"; '
                "use one or the other"
            )
        plain = FedKoLa.of(setting)
        return cls(
            **{f.name: getattr(plain, f.name) for f in fields(plain)},
            epochs=a.epochs,
            exchanges=max(a.exchanges, 1),
            shortened=k.adapt_shortened,
            adapt_rank=k.adapt_rank,
            adapt_energy=k.adapt_energy,
            adapt_share=k.adapt_share,
        )

    # --- server half ------------------------------------------------------------------------------

    def round(self, number: int, state: State, cohort: Cohort, clients: Clients) -> State:
        """A round of FedKoLa; and where the bank has grown enough, a consolidation."""
        due = math.ceil((1 + self.adapt_share) * state.consolidated) or 1
        method = replace(self, until=due).on(state.base)
        after, survivors = method.collect(number, state, cohort, clients)
        if banks.records(after.bank) < due:
            return self.calibrate(after, survivors, clients)
        return self.consolidate(after, survivors, clients)

    def consolidate(self, state: State, cohort: Cohort, clients: Clients) -> State:
        """Adapt the base anew to what this cohort holds now, and sum everything under it."""
        base = self.adapt(state, cohort, clients)
        empty = replace(state, bank=banks.emptied(state.bank, KINDS), base=base)
        after, survivors = self.on(base).collect(state.number, empty, cohort, clients)
        after = replace(after, consolidated=banks.records(after.bank))
        return self.calibrate(after, survivors, clients)

    def adapt(self, state: State, cohort: Cohort, clients: Clients) -> Weights:
        """The factors of a new base. Only labels with an open row take part."""
        position = {code: i for i, code in enumerate(self._catalogue().codes())}
        rows = [position[code] for code in banks.open_rows(state.bank)]
        open_labels = torch.tensor(rows, dtype=torch.int64)
        asked = ask(
            self,
            "anchors",
            state.number,
            {"labels": open_labels},
            word=64,
            scale={"sums": 0, "counts": 0},
        )
        seen = self._enough(clients.sum(cohort, asked)).words
        weights: Weights = {
            **adapters.fresh(self.targets, rank=self.adapt_rank, seed=self.basis_seed),
            HEAD: LENGTH * adaptation.anchors(seen["sums"], seen["counts"]),
        }
        moments = adaptation.adam(weights)
        for step in range(1, self.exchanges + 1):
            asked = ask(
                self,
                "learn",
                state.number,
                {"labels": open_labels, **weights},
                word=32,
                scale=dict.fromkeys(weights, GRID),
            )
            found = self._enough(clients.sum(cohort, replace(asked, seed=step)))
            if not int(found.words[wire.WEIGHT]):
                continue
            rate = adaptation.schedule(step, self.exchanges, self.lr)
            weights, moments = moments.step(weights, wire.mean(found), lr=rate)
        base = {name: value for name, value in weights.items() if name != HEAD}
        return adaptation.needed(base, energy=self.adapt_energy)

    def pooling(self, number: int, bank: Bank, cohort: Cohort) -> KnowledgeCell | None:
        """No Gram of cells that a consolidation is about to sum anew."""
        if self.until is not None and banks.records(bank) >= self.until:
            return None
        return super().pooling(number, bank, cohort)

    def _enough(self, found: Aggregate) -> Aggregate:
        if len(found.cohort) < self.k_min:
            raise CohortTooSmall(
                f"{len(found.cohort)} sites answered a lesson, {self.k_min} are needed for any sum "
                "to be opened; wait for more sites or lower knowledge.k_min"
            )
        return found

    # --- client half ------------------------------------------------------------------------------

    def steps(self) -> Steps:
        return {**super().steps(), "anchors": self.anchors, "learn": self.learn}

    def anchors(self, client: Client, asked: Broadcast) -> Update:
        """Sums of frozen integer embeddings by node, and how many there are."""
        data = self._held(client, asked)
        rows = torch.tensor(self._nodes(client, data), dtype=torch.int64)
        z = client.features(data).to(torch.int64)
        count = len(client.catalogue.nodes(self.level))
        return Update(
            client=client.name,
            weight=len(data),
            tensors={
                "sums": torch.zeros(count, self.width, dtype=torch.int64).index_add_(0, rows, z),
                "counts": torch.bincount(rows, minlength=count),
            },
        )

    def learn(self, client: Client, asked: Broadcast) -> Update:
        """The gradient of the summed loss over this step's share of the records."""
        data = adaptation.lesson(
            self._held(client, asked),
            share=min(1.0, self.epochs / self.exchanges),
            shortened=self.shortened,
            seed=asked.seed,
            site=client.name,
        )
        weights = {name: value for name, value in asked.tensors.items() if name != "labels"}
        gradients = client.gradients(weights, data, classes=client.catalogue.nodes(self.level))
        return Update(client=client.name, tensors=gradients, weight=len(data))

    def _held(self, client: Client, asked: Broadcast) -> Dataset:
        """Everything that has arrived under the labels asked for, in the order of arrival."""
        codes = set(questions.codes(asked, client.catalogue))
        data = client.knowledge.until(asked.round)
        return data.take([i for i, code in enumerate(data.labels) if code in codes])

    def _nodes(self, client: Client, data: Dataset) -> list[int]:
        place = {node: i for i, node in enumerate(client.catalogue.nodes(self.level))}
        path = {label.code: label.path[self.level] for label in client.catalogue.labels}
        return [place[path[code]] for code in data.labels]
