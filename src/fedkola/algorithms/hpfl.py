"""HPFL-like: a store of personal plug-ins, found by noised markers (Shen et al., ICLR 2025).

server:  store <- store + {(plug-in_k, marker_k)};   answer x under argmin_k |e(x) - marker_k|
client:  plug-in_k = fit(A, B, head; new records),   marker_k = mean e(x) + N(0, noise^2)

The frozen base is the shared backbone, a site's adapter and head of one window are a plug-in. It
asks ``each``, because a plug-in is one site's own model and is never summed. The marker is the
mean embedding, for which the distance of the paper's maximum mean discrepancy with a linear
kernel is the distance of means; a text is routed by itself. The noise of a marker is drawn from
the run's seed, so that runs repeat; whoever knows the seed can take it away, and no privacy is
claimed. Use it where sites differ and stay apart; its store grows by sites times windows.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar, Self

import torch
from torch import Tensor

from fedkola.algorithms import routed, window
from fedkola.algorithms.ask import ask
from fedkola.algorithms.learn import fit
from fedkola.algorithms.setting import Setting, training
from fedkola.types import (
    Broadcast,
    Client,
    Clients,
    Cohort,
    Reader,
    Steps,
    Update,
    Visibility,
    Weights,
)

SCOPE = "hpfl"
MARKER = "marker"


@dataclass(frozen=True, slots=True, kw_only=True)
class Plugin:
    """One site's adapter and head of one window; ``marker`` (d,) in units of the embedding."""

    site: str
    round: int
    marker: Tensor
    weights: Weights


@dataclass(frozen=True, slots=True, kw_only=True)
class State:
    """``weights`` are what every plug-in starts from."""

    weights: Weights
    store: tuple[Plugin, ...] = ()


@dataclass(frozen=True, kw_only=True)
class HPFL:
    needs: ClassVar[Visibility] = Visibility.EACH
    epochs: float
    batch: int
    lr: float
    level: int
    exchanges: int
    noise: float

    @classmethod
    def of(cls, setting: Setting) -> Self:
        a = setting.plan.algorithm
        return cls(
            **training(setting),
            exchanges=a.exchanges,
            noise=a.noise,
        )

    def start(self, weights: Weights) -> State:
        return State(weights=weights)

    def round(self, number: int, state: State, cohort: Cohort, clients: Clients) -> State:
        """Every site with new records adds one plug-in; what is in the store stays as it is."""
        scale = {**dict.fromkeys(state.weights, 20), MARKER: 20}
        asked = ask(self, "plug", number, dict(state.weights), word=32, scale=scale)
        found = {update.client: update for update in clients.each(cohort, asked)}
        new = [
            Plugin(
                site=site,
                round=number,
                marker=found[site].tensors[MARKER].to(torch.float32),
                weights={
                    name: old + found[site].tensors[name].to(torch.float32)
                    for name, old in state.weights.items()
                },
            )
            for site in cohort
            if site in found and found[site].weight > 0
        ]
        return replace(state, store=(*state.store, *new))

    def answer(
        self, state: State, reader: Reader, texts: Sequence[str], *, site: str = ""
    ) -> Tensor:
        """Scores (n, nodes), each text under the plug-in with the nearest marker."""
        choice = nearest(state.store, reader.features(texts))
        parts = [plugin.weights for plugin in state.store]
        return routed.scores(reader, parts, choice, texts)

    def losses(
        self, state: State, reader: Reader, prompts: Sequence[str], texts: Sequence[str]
    ) -> Tensor:
        choice = nearest(state.store, reader.features(prompts or texts))
        parts = [plugin.weights for plugin in state.store]
        return routed.losses(reader, parts, choice, prompts, texts)

    def steps(self) -> Steps:
        return {"plug": self.plug}

    def plug(self, client: Client, asked: Broadcast) -> Update:
        """The change of all weights by training on new records alone, and their marker."""
        data = window.pending(client, asked)
        whole = replace(self, epochs=self.epochs * self.exchanges)
        trained = fit(whole, client, data, asked.tensors, seed=asked.seed)
        window.note(client, asked, data, SCOPE)
        changes = {name: trained[name] - old for name, old in asked.tensors.items()}
        seed = _seed(asked.seed, client.name)
        # A site without news has no marker either, and says nothing.
        noise = self.noise if len(data) else 0.0
        changes[MARKER] = marker(client.features(data), noise=noise, seed=seed)
        return Update(client=client.name, tensors=changes, weight=len(data))


def marker(z: Tensor, *, noise: float, seed: int) -> Tensor:
    """The mean of integer embeddings z (n, d) in units of the embedding, plus Gaussian noise."""
    mean = z.to(torch.float64).sum(0) / (1024 * max(len(z), 1))
    drawn = torch.randn(len(mean), generator=torch.Generator().manual_seed(seed))
    return (mean + noise * drawn.to(torch.float64)).to(torch.float32)


def nearest(store: Sequence[Plugin], z: Tensor) -> Tensor:
    """The place (n,) in the store of the nearest marker of each integer embedding; -1 if none."""
    if not store:
        return torch.full((len(z),), -1)
    markers = torch.stack([plugin.marker for plugin in store])
    e = z.to(torch.float32) / 1024
    # |e|^2 is the same for every marker and is left out.
    return ((markers * markers).sum(1) - 2 * e @ markers.T).argmin(1)


def _seed(seed: int, site: str) -> int:
    digest = hashlib.sha256(f"fedkola/hpfl/1/{seed}/{site}".encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 2
