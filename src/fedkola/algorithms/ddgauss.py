"""One noisy sum a round: the distributed discrete Gaussian (Kairouz, Liu and Steinke, ICML 2021).

server:  pooled: g = sum_k s_k / (n batch), theta <- AdamW(theta, g)
         site:   theta <- theta - sum_k d_k / n
client:  pooled: s_k = sum over sampled units of clip(gradient, C) + share of noise
         site:   d_k = clip(theta - AdamW^H(theta), C) + share of noise

The shares are whole numbers on a grid with C 2^e = 2^20 and come from the guards ``pooled_dp`` and
``site_dp``: the sum carries the noise that a trusted server would add, and no addend can be read
under secure aggregation. ``pooled`` hides one patient or record of any site, at one exchange a
step; ``site`` hides all that a site has, for which it takes a hundred sites and more. Without a
finite epsilon no share is added, and the second form is plain federated averaging of the model.
"""

import math
from dataclasses import dataclass, field, replace
from typing import ClassVar, Self

import torch

from fedkola.algorithms.ask import ask
from fedkola.algorithms.setting import Setting
from fedkola.errors import Incompatible
from fedkola.plan import Plan
from fedkola.privacy.clip import clip
from fedkola.training.whole import Local
from fedkola.types import (
    Broadcast,
    Client,
    Clients,
    Cohort,
    Course,
    Steps,
    Update,
    Visibility,
    Weights,
)
from fedkola.wire import reals

REACH = 20
BETAS, TINY = (0.9, 0.95), 1e-8


@dataclass(frozen=True, slots=True, kw_only=True)
class State:
    """The model, and the moments of the server's AdamW by tensor."""

    weights: Weights
    first: Weights = field(default_factory=dict)
    second: Weights = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class DDGauss:
    needs: ClassVar[Visibility] = Visibility.SUM
    whole: ClassVar[bool] = True
    guards: ClassVar[tuple[str, ...]] = ("pooled_dp", "site_dp")
    pooled: bool
    rounds: int
    inner_steps: int
    batch: int
    length: int
    lr: float
    warmup: int
    floor: float
    weight_decay: float
    bound: float
    precision: str
    seed: int

    @classmethod
    def of(cls, setting: Setting) -> Self:
        """Raises Incompatible for more steps a round than the pooled form has."""
        plan, p = setting.plan, setting.plan.pretrain
        pooled = plan.privacy.level == "pooled" and math.isfinite(plan.privacy.epsilon)
        if pooled and p.inner_steps != 1:
            raise Incompatible(
                f'privacy.level = "pooled" sums gradients of one step, and pretrain.inner_steps = '
                f"{p.inner_steps}; set it to 1, or privacy.level to another"
            )
        return cls(
            pooled=pooled,
            rounds=cls.releases(plan),
            inner_steps=p.inner_steps,
            batch=p.batch,
            length=p.length,
            lr=p.lr,
            warmup=p.warmup,
            floor=p.floor,
            weight_decay=p.weight_decay,
            bound=plan.privacy.clip,
            precision=p.precision,
            seed=plan.run.seed,
        )

    @staticmethod
    def releases(plan: Plan) -> int:
        """Sums of a whole run: what a guarantee is spread over."""
        return plan.run.rounds or plan.task.windows

    def steps_until(self, number: int) -> int:
        """Sums asked for by the end of a round."""
        return number

    def start(self, weights: Weights) -> State:
        return State(weights=dict(weights))

    def round(self, number: int, state: State, cohort: Cohort, clients: Clients) -> State:
        scale = dict.fromkeys(state.weights, self.fraction())
        # A site's sum of gradients may hold many units; a change is bounded as a whole.
        word = 64 if self.pooled else 32
        step = "gradient" if self.pooled else "change"
        asked = ask(self, step, number, state.weights, scale=scale, word=word)
        answer = clients.sum(cohort, asked)
        total, heard = reals(answer), len(answer.cohort)
        if self.pooled:
            mean = {n: (total[n] / (heard * self.batch)).float() for n in state.weights}
            return self.stepped(number, state, mean)
        return replace(
            state, weights={n: v - (total[n] / heard).float() for n, v in state.weights.items()}
        )

    def stepped(self, number: int, state: State, gradient: Weights) -> State:
        """The model after one step of AdamW; matrices decay."""
        rate = Local(lr=self.lr, warmup=self.warmup, total=self.rounds, floor=self.floor).rate(
            number - 1
        )
        weights, first, second = {}, {}, {}
        for name, g in gradient.items():
            old = state.weights[name]
            first[name] = torch.lerp(g, state.first.get(name, torch.zeros_like(g)), BETAS[0])
            second[name] = torch.lerp(g * g, state.second.get(name, torch.zeros_like(g)), BETAS[1])
            mean, size = (
                moments[name] / (1 - beta**number)
                for moments, beta in ((first, BETAS[0]), (second, BETAS[1]))
            )
            decay = self.weight_decay if old.dim() > 1 else 0.0
            weights[name] = old * (1 - rate * decay) - rate * mean / (size.sqrt() + TINY)
        return State(weights=weights, first=first, second=second)

    def fraction(self) -> int:
        """Fractional bits at which the bound is about 2^REACH steps of the grid."""
        return max(0, REACH - math.ceil(math.log2(self.bound)))

    def steps(self) -> Steps:
        return {"gradient": self.gradient, "change": self.change}

    def gradient(self, client: Client, asked: Broadcast) -> Update:
        """The sum of clipped gradients of sampled units."""
        data = client.knowledge.until(asked.round)
        total = client.clipped(asked.tensors, data, length=self.length)
        return Update(client=client.name, tensors=total, weight=1)

    def change(self, client: Client, asked: Broadcast) -> Update:
        """How far local training moves, cut to the bound."""
        data = client.knowledge.until(asked.round)
        start = (asked.round - 1) * self.inner_steps
        course = Course(
            steps=self.inner_steps,
            start=start,
            total=self.rounds * self.inner_steps,
            batch=self.batch,
            length=self.length,
            lr=self.lr,
            warmup=self.warmup,
            floor=self.floor,
            weight_decay=self.weight_decay,
            precision=self.precision,
        )
        own = client.pretrain(asked.tensors, data, course, kept={}, seed=self.seed + asked.round)[0]
        moved = {name: value - own[name] for name, value in asked.tensors.items()}
        return Update(client=client.name, tensors=clip(moved, self.bound), weight=1)
