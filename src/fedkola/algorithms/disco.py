"""DISCO-like: one adapter per cluster of tasks, mixed by similarity (Guo et al., ICCV 2025).

server:  task t joins the cluster m with the largest cos(mu_t, mu_m) if that is >= threshold, else
         it opens one;   w_m <- sum_k p_k w_k over the sites of m
         answer x under sum_m g_m B_m A_m,   g = softmax( cos(e(x), mu_m) / temperature )
client:  mu_t = mean e(x) of each task;   w_k = fit(w_m; new records of its tasks in m)

A task is a declared scope at one site, its identity the mean of frozen embeddings; heads are mixed
by the same gate. It asks ``each``, because clusters are found from single sites' means. Use it
where tasks are apart in the embedding; tasks that only disagree in their answers share a cluster.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import ClassVar, Self

import torch
from torch import Tensor
from torch.nn.functional import normalize

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

SUMS, COUNTS, OWNER, CLUSTER = "sums", "counts", "owner", "cluster"


@dataclass(frozen=True, slots=True, kw_only=True)
class Cluster:
    """``sums`` (d,) int64 adds the integer embeddings of all tasks that joined."""

    sums: Tensor
    weights: Weights


@dataclass(frozen=True, slots=True, kw_only=True)
class State:
    """``weights`` are what every cluster starts from."""

    weights: Weights
    clusters: tuple[Cluster, ...] = ()


@dataclass(frozen=True, kw_only=True)
class DISCO:
    needs: ClassVar[Visibility] = Visibility.EACH
    epochs: float
    batch: int
    lr: float
    level: int
    exchanges: int = field(metadata=LOCAL, default=1)
    threshold: float = field(metadata=LOCAL, default=0.9)
    temperature: float = field(metadata=LOCAL, default=0.05)

    @classmethod
    def of(cls, setting: Setting) -> Self:
        a = setting.plan.algorithm
        return cls(
            **training(setting),
            exchanges=a.exchanges,
            threshold=a.threshold,
            temperature=a.temperature,
        )

    def start(self, weights: Weights) -> State:
        return State(weights=weights)

    def round(self, number: int, state: State, cohort: Cohort, clients: Clients) -> State:
        """Sort the round's tasks into clusters, then train every cluster that got some."""
        asked = ask(self, "describe", number, {}, word=32, scale=dict.fromkeys((SUMS, COUNTS), 0))
        found = {update.client: update.tensors for update in clients.each(cohort, asked)}
        there = tuple(site for site in cohort if site in found)
        if not there:
            return state
        sums = torch.stack([found[site][SUMS] for site in there]).to(torch.int64)
        counts = torch.stack([found[site][COUNTS] for site in there]).to(torch.int64)
        means, owner = assign(
            [cluster.sums for cluster in state.clusters], sums, counts, threshold=self.threshold
        )
        for place in torch.unique(owner[owner >= 0]).tolist():
            old = state.clusters[place].weights if place < len(state.clusters) else state.weights
            members = [i for i in range(len(there)) if (owner[i] == place).any()]
            sites = tuple(there[i] for i in members)
            beside = {OWNER: owner[members], CLUSTER: torch.tensor(place)}
            trained, _ = average(self, number, old, sites, clients, beside=beside)
            cluster = Cluster(sums=means[place], weights=trained)
            kept = (*state.clusters[:place], cluster, *state.clusters[place + 1 :])
            state = replace(state, clusters=kept)
        return state

    def answer(
        self, state: State, reader: Reader, texts: Sequence[str], *, site: str = ""
    ) -> Tensor:
        """Scores (n, nodes) under the mix of all clusters that each text's own gate gives."""
        if not state.clusters:
            return torch.full((len(texts), len(reader.nodes)), float("-inf"))
        weights = gate(state.clusters, reader.features(texts), temperature=self.temperature)
        parts = [cluster.weights for cluster in state.clusters]
        return routed.mixed(reader, parts, weights, texts)

    def losses(
        self, state: State, reader: Reader, prompts: Sequence[str], texts: Sequence[str]
    ) -> Tensor:
        if not state.clusters:
            return reader.losses({}, prompts, texts)
        z = reader.features(prompts or texts)
        weights = gate(state.clusters, z, temperature=self.temperature)
        whole = routed.slots([cluster.weights for cluster in state.clusters])
        return reader.losses(whole, prompts, texts, gate=weights)

    def steps(self) -> Steps:
        return {"describe": self.describe, "train": self.train}

    def describe(self, client: Client, asked: Broadcast) -> Update:
        """Summed integer embeddings and counts of the new records, by scope."""
        data = window.pending(client, asked)
        rows = window.scopes(client, data)
        z, num = client.features(data).to(torch.int64), len(client.catalogue.scopes())
        sums = torch.zeros(num, z.shape[1], dtype=torch.int64).index_add_(0, rows, z)
        counts = torch.bincount(rows, minlength=num)
        return Update(client=client.name, tensors={SUMS: sums, COUNTS: counts}, weight=len(data))

    def train(self, client: Client, asked: Broadcast) -> Update:
        """The weighted change by training on the new records of one cluster's scopes."""
        place = int(asked.tensors[CLUSTER])
        own = asked.tensors[OWNER][asked.cohort.index(client.name)] == place
        data = self._chosen(client, asked, own)
        weights = {k: v for k, v in asked.tensors.items() if k not in (OWNER, CLUSTER)}
        return taught(self, client, asked, data, weights, scope=f"disco/{place}")

    def _chosen(self, client: Client, asked: Broadcast, own: Tensor) -> Dataset:
        data = window.pending(client, asked)
        kept = own[window.scopes(client, data)]
        return data.take(torch.nonzero(kept).flatten().tolist())


def assign(
    clusters: Sequence[Tensor], sums: Tensor, counts: Tensor, *, threshold: float
) -> tuple[list[Tensor], Tensor]:
    """Summed embeddings (d,) of all clusters, and the cluster (sites, scopes) of every task.

    ``sums`` (sites, scopes, d) and ``counts`` (sites, scopes) describe the tasks; those without
    records get -1. Tasks are taken site by site, and a cluster's mean moves as they join.
    """
    totals = [total.clone() for total in clusters]
    owner = torch.full(counts.shape, -1, dtype=torch.int64)
    for site, scope in torch.nonzero(counts).tolist():
        task = sums[site, scope]
        alike = _cosines(totals, task)
        place = int(alike.argmax()) if len(alike) else -1
        if place < 0 or float(alike[place]) < threshold:
            place = len(totals)
            totals.append(torch.zeros_like(task))
        totals[place] = totals[place] + task
        owner[site, scope] = place
    return totals, owner


def gate(clusters: Sequence[Cluster], z: Tensor, *, temperature: float) -> Tensor:
    """softmax(cos / temperature) of integer embeddings z with the clusters' means, (n, K)."""
    means = torch.stack([cluster.sums for cluster in clusters]).to(torch.float32)
    alike = normalize(z.to(torch.float32), dim=1) @ normalize(means, dim=1).T
    return torch.softmax(alike / temperature, dim=1)


def _cosines(totals: Sequence[Tensor], task: Tensor) -> Tensor:
    if not totals:
        return torch.zeros(0)
    means = torch.stack(list(totals)).to(torch.float64)
    return normalize(means, dim=1) @ normalize(task.to(torch.float64), dim=0)
