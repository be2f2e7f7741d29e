"""AFCL: one ridge over everything on frozen features (Tang et al., 2025; He et al., CVPR 2025).

server:  G <- G + sum_k G_k,   S <- S + sum_k S_k,   W = (G + gamma I)^-1 S
client:  G_k = sum phi phi^T,   S_k = sum phi y^T    over the records not used before

y is the one-hot node of the reported level, and every record weighs the same: the published
read-out on the features of FedKoLa's analytic lane. The sums do not depend on who holds a record
or when it arrives, so the model is that of pooled data. gamma follows FedKoLa's ridge rule, a
multiple of the mean diagonal of G that grows where records are few. Use it where frozen features
suffice; it keeps no versions, and truth that changes is averaged.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import ClassVar, Self

import torch
from torch import Tensor

from fedkola.algorithms import window
from fedkola.algorithms.ask import LOCAL, ask
from fedkola.algorithms.setting import Setting
from fedkola.knowledge import statistics
from fedkola.knowledge.statistics import COUNTS, GRAM, SUMS
from fedkola.knowledge.views import ridge
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

SCOPE = "afcl"
CHUNK = 4096


@dataclass(frozen=True, slots=True, kw_only=True)
class State:
    """``sums`` holds int64 totals: gram p(p+1)/2, sums (labels, p), counts (labels,)."""

    sums: Mapping[str, Tensor] = field(default_factory=dict)

    @property
    def weights(self) -> Weights:
        return {}


@dataclass(frozen=True, kw_only=True)
class AFCL:
    needs: ClassVar[Visibility] = Visibility.SUM
    features: int
    bits: int
    feature_seed: int
    level: int = field(metadata=LOCAL, default=0)
    lam: float = field(metadata=LOCAL, default=1e-4)

    @classmethod
    def of(cls, setting: Setting) -> Self:
        knowledge = setting.plan.knowledge
        statistics.check_exact(
            width=setting.width,
            features=knowledge.features,
            bits=knowledge.bits,
            seed=knowledge.basis_seed,
        )
        return cls(
            features=knowledge.features,
            bits=knowledge.bits,
            feature_seed=knowledge.basis_seed,
            level=setting.level,
            lam=knowledge.lam,
        )

    def start(self, weights: Weights) -> State:
        return State()

    def round(self, number: int, state: State, cohort: Cohort, clients: Clients) -> State:
        asked = ask(self, "add", number, {}, word=32, scale=dict.fromkeys((GRAM, SUMS, COUNTS), 0))
        new = clients.sum(cohort, asked).words
        return State(
            sums={
                name: new[name].to(torch.int64) + state.sums.get(name, 0)
                for name in (GRAM, SUMS, COUNTS)
            }
        )

    def answer(
        self, state: State, reader: Reader, texts: Sequence[str], *, site: str = ""
    ) -> Tensor:
        """Ridge scores (n, nodes) of the texts; -inf for nodes without records."""
        found = torch.full((len(texts), len(reader.nodes)), float("-inf"))
        if not state.sums or not state.sums[COUNTS].any():
            return found
        place = {node: i for i, node in enumerate(reader.nodes)}
        owner = [place[label.path[self.level]] for label in reader.catalogue.labels]
        solved, known = head(state.sums, torch.tensor(owner), num_nodes=len(place), lam=self.lam)
        z, solved = reader.features(texts), solved.to(torch.float32)
        for start in range(0, len(texts), CHUNK):
            phi = statistics.expand(
                z[start : start + CHUNK],
                features=self.features,
                bits=self.bits,
                seed=self.feature_seed,
            )
            found[start : start + CHUNK, known] = phi @ solved
        return found

    def steps(self) -> Steps:
        return {"add": self.add}

    def add(self, client: Client, asked: Broadcast) -> Update:
        """The statistics of the records that have arrived and were in no earlier round."""
        data = window.pending(client, asked)
        z = client.features(data)
        window.note(client, asked, data, SCOPE, z)
        position = {code: i for i, code in enumerate(client.catalogue.codes())}
        addend = statistics.analytic(
            z,
            torch.tensor([position[code] for code in data.labels], dtype=torch.int64),
            num_rows=len(position),
            features=self.features,
            bits=self.bits,
            seed=self.feature_seed,
        )
        return Update(client=client.name, tensors=addend, weight=len(data))


def head(
    sums: Mapping[str, Tensor], owner: Tensor, *, num_nodes: int, lam: float
) -> tuple[Tensor, Tensor]:
    """W (p, C) float64 of the C nodes that have records, and their positions (C,).

    ``owner`` (labels,) gives each label's node.
    """
    p = sums[SUMS].shape[1]
    counts = torch.zeros(num_nodes, dtype=torch.int64).index_add_(0, owner, sums[COUNTS])
    known = torch.nonzero(counts).flatten()
    right = torch.zeros(num_nodes, p, dtype=torch.int64).index_add_(0, owner, sums[SUMS])[known]
    gram = statistics.unpack(sums[GRAM].to(torch.float64), p)
    gamma = ridge(lam, features=p, records=float(counts.sum())) * float(gram.diagonal().mean())
    gram.diagonal().add_(gamma)
    factor = torch.linalg.cholesky(gram)
    return torch.cholesky_solve(right.T.to(torch.float64).contiguous(), factor), known
