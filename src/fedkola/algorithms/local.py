"""Local only: every site keeps its own read-out of its own records, nothing is shared.

server:  model_k <- read-out(G_k, s_k, n_k)                 one model per site, never summed
client:  (G_k, s_k, n_k) of everything that has arrived

The floor of every table, with the same frozen features and the same read-out as FedKoLa. It asks
``each`` so that the benchmark can score the models; a hospital that works alone sends nothing,
and tables count its traffic as zero.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import ClassVar, Self

import torch
from torch import Tensor

from fedkola.algorithms.ask import LOCAL, ask
from fedkola.algorithms.setting import Setting
from fedkola.algorithms.setting import rule as planned_rule
from fedkola.errors import KnowledgeError
from fedkola.knowledge import bank as banks
from fedkola.knowledge import statistics, views
from fedkola.knowledge.bank import Bank
from fedkola.knowledge.views import Rule, View
from fedkola.types import (
    Broadcast,
    Catalogue,
    Client,
    Clients,
    Cohort,
    Reader,
    Steps,
    Update,
    Visibility,
    Weights,
)


@dataclass(frozen=True, slots=True, kw_only=True)
class State:
    """One bank per site, each of a single cell."""

    sites: Mapping[str, Bank] = field(default_factory=dict)

    @property
    def weights(self) -> Weights:
        return {}


@dataclass(frozen=True, kw_only=True)
class Local:
    needs: ClassVar[Visibility] = Visibility.EACH
    personal: ClassVar[bool] = True
    features: int
    bits: int
    feature_seed: int
    level: int = field(metadata=LOCAL, default=0)
    rule: Rule = field(metadata=LOCAL, default_factory=Rule)
    catalogue: Catalogue | None = field(metadata=LOCAL, default=None)

    @classmethod
    def of(cls, setting: Setting) -> Self:
        k = setting.plan.knowledge
        return cls(
            features=k.features,
            bits=k.bits,
            feature_seed=k.basis_seed,
            level=setting.level,
            rule=planned_rule(setting.plan),
            catalogue=setting.catalogue,
        )

    def start(self, weights: Weights) -> State:
        return State()

    def round(self, number: int, state: State, cohort: Cohort, clients: Clients) -> State:
        names = (statistics.GRAM, statistics.SUMS, statistics.COUNTS)
        asked = ask(self, "own", number, {}, word=32, scale=dict.fromkeys(names, 0))
        recipe = {"features": self.features, "bits": self.bits, "seed": self.feature_seed}
        codes, sites = self._catalogue().codes(), dict(state.sites)
        for update in clients.each(cohort, asked):
            sites[update.client] = banks.alone(update.client, update.tensors, codes, recipe)
        return State(sites=sites)

    def view(self, state: State, site: str) -> View:
        """The model of one site; raises UnknownCell if it holds no records yet."""
        return views.compute(state.sites.get(site, Bank()), self._catalogue(), self.rule, now=0)

    def answer(
        self, state: State, reader: Reader, texts: Sequence[str], *, site: str = ""
    ) -> Tensor:
        """Scores (n, nodes) of one site's model; -inf for nodes it has never seen."""
        if site not in state.sites or not state.sites[site].cells:
            return torch.full((len(texts), len(reader.nodes)), float("-inf"))
        return views.answer(
            self.view(state, site), reader.features(texts), reader.nodes, self.level
        )

    def steps(self) -> Steps:
        return {"own": self.own}

    def own(self, client: Client, asked: Broadcast) -> Update:
        """The analytic statistics of all records that have arrived at this site."""
        data = client.knowledge.until(asked.round)
        position = {code: i for i, code in enumerate(client.catalogue.codes())}
        addend = statistics.analytic(
            client.features(data),
            torch.tensor([position[code] for code in data.labels], dtype=torch.int64),
            num_rows=len(position),
            features=self.features,
            bits=self.bits,
            seed=self.feature_seed,
        )
        return Update(client=client.name, tensors=addend, weight=len(data))

    def _catalogue(self) -> Catalogue:
        if self.catalogue is None:
            raise KnowledgeError("the server half needs the task's catalogue of labels")
        return self.catalogue
