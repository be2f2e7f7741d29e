"""FedDrift-LoRA: a module per concept, by drift and loss (Jothimurugesan et al., AISTATS 2023).

server:  opens one module in a round in which any site drifts;   w_m <- sum_k p_k w_k over its sites
         L_ij = mean loss of module j on the data of module i, from sums over sites
         while min_ij D_ij < delta:  merge i and j,   D_ij = max( L_ij - L_ii, L_ji - L_jj )
client:  takes m = argmin_m loss_m(window), or drifts if that loss exceeds the one its last module
         has on its last window by delta;   w_k = fit(w_m; window)

The server learns how many sites take each module, never which. So the sites that drift in one
round open one module together (the paper's FedDrift-Eager), and what they should not have shared
is not taken apart again; modules of different rounds are merged as in FedDrift, the closest pair
first, a merged one being as far from a third as the farther of its parts. A text is answered by
the module with the nearest mean embedding. Use it where whole sites change at different times.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import ClassVar, Self

import torch
from torch import Tensor

from fedkola import wire
from fedkola.algorithms import routed, window
from fedkola.algorithms.ask import LOCAL, ask
from fedkola.algorithms.learn import change, fit
from fedkola.algorithms.setting import Setting, training
from fedkola.files import write_private
from fedkola.knowledge import journal
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

SCOPE = "feddrift"
CHOSEN, LIVE, HEIRS, MODULE = "chosen", "live", "heirs", "module"
SUMS, LOSS, SIZE = "sums", "loss", "size"
COMPARED = 64


@dataclass(frozen=True, slots=True, kw_only=True)
class Module:
    """``number`` counts modules as they open; ``sums`` (d,) adds embeddings of its records."""

    number: int
    weights: Weights
    sums: Tensor
    records: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class State:
    """``weights`` are what every module starts from; ``heirs`` names, for every module ever opened,
    the one it lives on in."""

    weights: Weights
    modules: tuple[Module, ...] = ()
    heirs: tuple[int, ...] = ()


@dataclass(frozen=True, kw_only=True)
class FedDrift:
    needs: ClassVar[Visibility] = Visibility.SUM
    epochs: float
    batch: int
    lr: float
    level: int
    threshold: float
    exchanges: int = field(metadata=LOCAL, default=1)
    width: int = field(metadata=LOCAL, default=0)

    @classmethod
    def of(cls, setting: Setting) -> Self:
        a = setting.plan.algorithm
        return cls(
            **training(setting),
            threshold=a.threshold,
            exchanges=a.exchanges,
            width=setting.width,
        )

    def start(self, weights: Weights) -> State:
        return _opened(State(weights=weights), self.width)

    def round(self, number: int, state: State, cohort: Cohort, clients: Clients) -> State:
        """Ask who takes what, open a module for those who drift, train, compare, merge."""
        asked = ask(self, "choose", number, _everything(state), word=32, scale={CHOSEN: 0})
        chosen = clients.sum(cohort, asked).words[CHOSEN].tolist()
        if chosen[-1]:
            state = _opened(state, self.width)
        for place, sites in enumerate(chosen):
            if sites:
                trained = self._train(number, state, place, cohort, clients)
                kept = (*state.modules[:place], trained, *state.modules[place + 1 :])
                state = replace(state, modules=kept)
        if any(chosen) and len(state.modules) > 1:
            scale = {LOSS: 16, SIZE: 0}
            asked = ask(self, "compare", number, _everything(state), word=64, scale=scale)
            sums = wire.reals(clients.sum(cohort, asked))
            apart = distances(sums[LOSS], sums[SIZE])
            state = merged(state, apart, delta=self.threshold)
        return state

    def answer(
        self, state: State, reader: Reader, texts: Sequence[str], *, site: str = ""
    ) -> Tensor:
        """Scores (n, nodes), each text under the module with the nearest mean embedding."""
        choice = nearest(state.modules, reader.features(texts))
        parts = [module.weights for module in state.modules]
        return routed.scores(reader, parts, choice, texts)

    def losses(
        self, state: State, reader: Reader, prompts: Sequence[str], texts: Sequence[str]
    ) -> Tensor:
        choice = nearest(state.modules, reader.features(prompts or texts))
        parts = [module.weights for module in state.modules]
        return routed.losses(reader, parts, choice, prompts, texts)

    def _train(
        self, number: int, state: State, place: int, cohort: Cohort, clients: Clients
    ) -> Module:
        module = state.modules[place]
        weights, total = dict(module.weights), None
        scale = {**dict.fromkeys(weights, 16), SUMS: 0}
        for exchange in range(self.exchanges):
            tensors = {
                **weights,
                MODULE: torch.tensor(module.number),
                HEIRS: torch.tensor(state.heirs),
            }
            asked = ask(self, "train", number, tensors, word=32, scale=scale)
            total = clients.sum(cohort, replace(asked, seed=exchange))
            step = wire.mean(total)
            weights = {name: old + step[name] for name, old in weights.items()}
        assert total is not None
        return replace(
            module,
            weights=weights,
            sums=module.sums + total.words[SUMS],
            records=module.records + int(total.words[wire.WEIGHT]),
        )

    def steps(self) -> Steps:
        return {"choose": self.choose, "train": self.train, "compare": self.compare}

    def choose(self, client: Client, asked: Broadcast) -> Update:
        """One at the module that this site's window goes to, the last place being a new one."""
        live = asked.tensors[LIVE].tolist()
        chosen = torch.zeros(len(live) + 1, dtype=torch.int64)
        data = window.pending(client, asked)
        if len(data):
            found = [self._loss(client, asked, number, data) for number in live]
            place = min(range(len(live)), key=found.__getitem__)
            known = self._known(client, asked)
            if known is not None and found[place] > known + self.threshold:
                place = len(live)
            # Modules are numbered as they open, so the one to come has the next number.
            number = live[place] if place < len(live) else len(asked.tensors[HEIRS])
            _keep(client.store, asked.round, number)
            chosen[place] = 1
        return Update(client=client.name, tensors={CHOSEN: chosen}, weight=len(data))

    def train(self, client: Client, asked: Broadcast) -> Update:
        """The weighted change of one module if this window went to it, else zeros."""
        own = (MODULE, HEIRS)
        weights = {name: v for name, v in asked.tensors.items() if name not in own}
        data = window.pending(client, asked)
        if _chosen(client.store).get(asked.round) != int(asked.tensors[MODULE]):
            data = data.take([])
        trained = fit(self, client, data, weights, seed=asked.seed)
        if len(data):
            window.note(client, asked, data, SCOPE)
        sums = client.features(data).sum(0, dtype=torch.int64)
        moved = change(client, weights, trained, len(data))
        return replace(moved, tensors={**moved.tensors, SUMS: sums})

    def compare(self, client: Client, asked: Broadcast) -> Update:
        """Loss sums (M, M) and sizes (M,): row i is this site's data of module i under each j.

        At most COMPARED of the newest records of a module are read.
        """
        live = asked.tensors[LIVE].tolist()
        loss = torch.zeros(len(live), len(live), dtype=torch.float64)
        size = torch.zeros(len(live), dtype=torch.int64)
        for i, module in enumerate(live):
            data = self._of_module(client, asked, module)
            if len(data):
                size[i] = len(data)
                for j, other in enumerate(live):
                    loss[i, j] = len(data) * self._loss(client, asked, other, data)
        return Update(client=client.name, tensors={LOSS: loss, SIZE: size}, weight=len(size))

    def _loss(self, client: Client, asked: Broadcast, module: int, data: Dataset) -> float:
        weights = window.under(f"{module}", asked.tensors)
        found = client.evaluate(weights, data, classes=client.catalogue.nodes(self.level))
        return found["loss"] / max(found.get("count", found.get("tokens", 1.0)), 1.0)

    def _known(self, client: Client, asked: Broadcast) -> float | None:
        """The loss on this site's last window under the module it took then; None at first."""
        heirs, chosen = asked.tensors[HEIRS], _chosen(client.store)
        past = [n for n, m in chosen.items() if n < asked.round and m < len(heirs)]
        if not past:
            return None
        data = _recorded(client, asked, [max(past)])
        module = int(heirs[chosen[max(past)]])
        return self._loss(client, asked, module, data) if len(data) else None

    def _of_module(self, client: Client, asked: Broadcast, module: int) -> Dataset:
        heirs = asked.tensors[HEIRS]
        chosen = _chosen(client.store)
        rounds = [n for n, m in chosen.items() if m < len(heirs) and int(heirs[m]) == module]
        data = _recorded(client, asked, rounds)
        return data.take(list(range(max(0, len(data) - COMPARED), len(data))))


def distances(loss: Tensor, size: Tensor) -> Tensor:
    """D (M, M) float64 of modules by summed losses (data, module) and records; inf without data."""
    mean = loss / size[:, None].clamp(min=1)
    worse = mean - mean.diagonal()[:, None]
    apart = torch.maximum(worse, worse.T)
    empty = size == 0
    apart[empty] = float("inf")
    apart[:, empty] = float("inf")
    return apart.fill_diagonal_(float("inf"))


def merged(state: State, apart: Tensor, *, delta: float) -> State:
    """Merge the closest modules as long as they are closer than delta."""
    apart = apart.clone()
    while len(state.modules) > 1 and float(apart.min()) < delta:
        i, j = sorted(divmod(int(apart.argmin()), len(apart)))
        state = _merge(state, i, j)
        farther = torch.maximum(apart[i], apart[j])
        apart[i], apart[:, i] = farther, farther
        apart[i, i] = float("inf")
        rest = [k for k in range(len(apart)) if k != j]
        apart = apart[rest][:, rest]
    return state


def nearest(modules: Sequence[Module], z: Tensor) -> Tensor:
    """The place (n,) of the module with the nearest mean; -1 where none has records yet."""
    places = [i for i, module in enumerate(modules) if module.records]
    if not places:
        return torch.full((len(z),), -1)
    means = torch.stack([modules[i].sums.to(torch.float32) / modules[i].records for i in places])
    distance = (means * means).sum(1) - 2 * z.to(torch.float32) @ means.T
    return torch.tensor(places)[distance.argmin(1)]


def _opened(state: State, width: int) -> State:
    module = Module(
        number=len(state.heirs),
        weights=dict(state.weights),
        sums=torch.zeros(width, dtype=torch.int64),
    )
    return replace(state, modules=(*state.modules, module), heirs=(*state.heirs, module.number))


def _merge(state: State, i: int, j: int) -> State:
    left, right = state.modules[i], state.modules[j]
    records = left.records + right.records
    share = left.records / records if records else 0.5
    whole = replace(
        left,
        weights={k: share * v + (1 - share) * right.weights[k] for k, v in left.weights.items()},
        sums=left.sums + right.sums,
        records=records,
    )
    kept = [whole if k == i else m for k, m in enumerate(state.modules) if k != j]
    heirs = tuple(left.number if heir == right.number else heir for heir in state.heirs)
    return replace(state, modules=tuple(kept), heirs=heirs)


def _everything(state: State) -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = {
        LIVE: torch.tensor([module.number for module in state.modules]),
        HEIRS: torch.tensor(state.heirs),
    }
    for module in state.modules:
        tensors |= window.prefixed(f"{module.number}", module.weights)
    return tensors


def _recorded(client: Client, asked: Broadcast, rounds: Sequence[int]) -> Dataset:
    """This site's records of these rounds, as far as it still holds them."""
    entries = [journal.read(client.store, number, SCOPE) for number in sorted(rounds)]
    wanted = {record for entry in entries if entry for record in entry.records}
    data = client.knowledge.until(asked.round)
    return data.take([i for i, record in enumerate(data.records) if record in wanted])


def _chosen(store: Path) -> Mapping[int, int]:
    """The module that this site's window of each round went to."""
    path = store / "feddrift.json"
    if not path.exists():
        return {}
    return {int(key): value for key, value in json.loads(path.read_text("utf-8")).items()}


def _keep(store: Path, number: int, module: int) -> None:
    path = store / "feddrift.json"
    write_private(path, json.dumps({**_chosen(store), number: module}).encode())
