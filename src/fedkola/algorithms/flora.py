"""FLoRA: stack all factors, merge them into the base, start over (Wang et al., NeurIPS 2024).

server:  A = [A_1; ..; A_K],  B = [p_1 B_1 .. p_K B_K],  W <- W + s B A,   head <- sum_k p_k head_k
client:  (A_k, B_k, head_k) = fit(fresh A, B = 0, head; base W, records that arrived)

Stacking gives the mean of products exactly, B A = sum_k p_k B_k A_k, and lets sites have unequal
ranks; p_k stands in one factor only, in both it would count twice. The server reads every site's
factors, so it asks ``each`` and cannot run under secure aggregation. Use it where ranks must
differ and the server may see single updates. What was merged travels down as one dense matrix a
layer.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import ClassVar, Self

import torch

from fedkola.algorithms.ask import LOCAL, ask
from fedkola.algorithms.learn import change, ending, layers, learn
from fedkola.algorithms.setting import Setting, training
from fedkola.training.adapters import combine, fresh
from fedkola.types import Broadcast, Client, Clients, Cohort, Steps, Update, Visibility, Weights

RANKS = "ranks"


@dataclass(frozen=True, slots=True, kw_only=True)
class State:
    """What was merged into the base of every layer, as ``{layer}.delta``, and the head."""

    weights: Weights


@dataclass(frozen=True, kw_only=True)
class FLoRA:
    needs: ClassVar[Visibility] = Visibility.EACH
    unequal_ranks: ClassVar[bool] = True
    rank: int
    epochs: float
    batch: int
    lr: float
    level: int
    ranks: Mapping[str, int] = field(metadata=LOCAL, default_factory=dict)
    scale: float = field(metadata=LOCAL, default=1.0)
    exchanges: int = field(metadata=LOCAL, default=1)

    @classmethod
    def of(cls, setting: Setting) -> Self:
        a = setting.plan.algorithm
        return cls(
            rank=a.rank,
            **training(setting),
            ranks=a.ranks,
            scale=setting.scale,
            exchanges=a.exchanges,
        )

    def start(self, weights: Weights) -> State:
        head = {name: value for name, value in weights.items() if ".lora_" not in name}
        base = {f"{layer}.delta": torch.zeros(shape) for layer, shape in layers(weights).items()}
        return State(weights={**head, **base})

    def round(self, number: int, state: State, cohort: Cohort, clients: Clients) -> State:
        """``exchanges`` times: everyone trains a fresh adapter, and all go into the base."""
        base = ending(state.weights, ".delta")
        factors = [
            name.removesuffix("delta") + end for name in base for end in ("lora_A", "lora_B")
        ]
        head = [name for name in state.weights if name not in base]
        scale = {**dict.fromkeys(factors, 20), **dict.fromkeys(head, 16)}
        for exchange in range(self.exchanges):
            own = torch.tensor([self.ranks.get(site, self.rank) for site in cohort])
            asked = ask(self, "train", number, {**state.weights, RANKS: own}, scale=scale)
            found = {u.client: u for u in clients.each(cohort, replace(asked, seed=exchange))}
            # In the order of the cohort: a sum of reals depends on the order of its terms.
            answers = [found[site] for site in cohort if site in found]
            state = State(weights=self.merge(state.weights, answers))
        return state

    def merge(self, weights: Weights, answers: Sequence[Update]) -> Weights:
        """Base and head after everyone's factors; without any new record they stay as they are."""
        answers = [answer for answer in answers if answer.weight > 0]
        total = sum(answer.weight for answer in answers)
        stack = combine([(answer.tensors, answer.weight / total) for answer in answers])
        merged = dict(weights)
        for layer, _ in layers(stack).items():
            product = stack[f"{layer}.lora_B"] @ stack[f"{layer}.lora_A"]
            merged[f"{layer}.delta"] = (weights[f"{layer}.delta"] + self.scale * product).float()
        for answer in answers:
            for name in weights:
                if not name.endswith(".delta"):
                    merged[name] = merged[name] + answer.tensors[name] / total
        return {name: value.float() for name, value in merged.items()}

    def steps(self) -> Steps:
        return {"train": self.train}

    def train(self, client: Client, asked: Broadcast) -> Update:
        """A fresh adapter's factors as they are, and the weighted change of the head."""
        base = ending(asked.tensors, ".delta")
        head = {n: v for n, v in asked.tensors.items() if n not in base and n != RANKS}
        rank = int(asked.tensors[RANKS][asked.cohort.index(client.name)])
        start = fresh(client.targets, rank=rank, seed=asked.seed)
        trained, count = learn(self, client, asked, {**start, **head}, pinned=base)
        update = change(client, head, trained, count)
        factors = ending(trained, ".lora_A", ".lora_B")
        return replace(update, tensors={**update.tensors, **factors})
