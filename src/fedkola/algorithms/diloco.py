"""Masked DiLoCo: rare exchange of rounded deltas, asking for sums alone (Douillard et al., 2023;
fragments after Douillard et al., 2025, Streaming DiLoCo).

server:  D = sum_k w_k d_k / sum_k w_k,   m <- mu m + D,   theta <- theta - eta (D + mu m)
client:  phi <- theta;  H times: phi <- AdamW(phi, a batch);   d_k = theta - phi + residual

The sum is exact: every d_k is rounded to one public grid (see ``common_grid``) before it leaves.
``outer`` is "average" (eta 1, mu 0), "nesterov" (eta, mu of the plan; mu rises over the share
``ramp`` of the rounds, as early changes agree and need no momentum), "primal" (Defazio et al.,
2025: sites start from an average theta of the fast weights z, z <- z - eta D, theta <- mu theta +
(1 - mu) z) or "tune", which keeps a buffer for each of four settings, as all are functions of
public sums, and in some rounds lets the sites' held-out loss choose. ``growth`` g > 1 makes
exchanges frequent early and rare late, when rates are low: round r ends at step S (r / R)^g, in
the spirit of the quadratic synchronisation rule (Gu et al., ICLR 2024).

With P fragments a round carries one of them, taking turns. ``down`` is how weights come back: in
float32, in float16, or as the change since the last round on a grid of 8 or 4 bits ("change",
"change4"; see ``changes``), to sites that answered that round. ``feedback`` makes sites carry over
what rounding and clipping lost. With ``second`` "shared" AdamW's second moments follow those
of all sites (see ``second_moments``). With ``optimiser`` "sgd" the inner step is plain, and one
step a round is FedSGD. Pre-train with it; adapt a model with the other methods.
"""

import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import ClassVar, Self

import torch
from torch import Tensor

from fedkola.algorithms import changes
from fedkola.algorithms import common_grid as grids
from fedkola.algorithms import second_moments as moments
from fedkola.algorithms.ask import LOCAL, ask
from fedkola.algorithms.setting import Setting
from fedkola.errors import GuardMissing, Incompatible, StaleUpdate
from fedkola.plan import Plan
from fedkola.privacy.clip import clip
from fedkola.training import pretraining
from fedkola.training.pretraining import CURSOR
from fedkola.training.whole import SECOND
from fedkola.types import (
    Aggregate,
    Broadcast,
    Client,
    Clients,
    Cohort,
    Course,
    Dataset,
    Steps,
    Update,
    Visibility,
    Weights,
)
from fedkola.wire import WEIGHT, metrics

HISTOGRAM, EXPONENTS = "side/histogram", "side/exponents"
SHARED = "side/second"
HELD, FAST, RESIDUAL = "held/", "fast/", "residual/"
SETTINGS = ((1.0, 0.0), (1.0, 0.5), (0.7, 0.5), (0.7, 0.9))
FORGIVEN = 4  # rounds missed after which a site's moments are too old to go on with
EXCEEDED = 0.01
JUDGED = 64  # held-out sequences of a site that choose an outer setting


@dataclass(frozen=True, slots=True, kw_only=True)
class State:
    """The model, the outer optimiser's memory and the grid.

    ``momentum`` maps a tensor's name to its buffer ("setting/name" for "tune", the fast weights
    for "primal"), ``scale`` to the exponent of its grid, ``clipped`` to the share of its
    coordinates that the last exchange cut off. ``held`` is what sites hold of the model where
    that is not the model itself, ``second`` the shared means of second moments (under one name),
    ``holders`` who answered the last round.
    """

    weights: Weights
    momentum: Weights = field(default_factory=dict)
    scale: Mapping[str, int] = field(default_factory=dict)
    held: Weights = field(default_factory=dict)
    second: Weights = field(default_factory=dict)
    holders: tuple[str, ...] = ()
    setting: int = 0
    clipped: Mapping[str, float] = field(default_factory=dict)

    @property
    def exceeded(self) -> bool:
        """Whether more than one coordinate in a hundred of some tensor left the range."""
        return max(self.clipped.values(), default=0.0) > EXCEEDED


@dataclass(frozen=True, kw_only=True)
class DiLoCo:
    needs: ClassVar[Visibility] = Visibility.SUM
    whole: ClassVar[bool] = True
    guards: ClassVar[tuple[str, ...]] = ("record_dp",)
    rounds: int
    inner_steps: int
    growth: float
    batch: int
    length: int
    lr: float
    warmup: int
    floor: float
    weight_decay: float
    bound: float
    bits: int
    fragments: int
    feedback: bool
    weight: str
    share: int
    precision: str
    seed: int
    down: str = "float32"
    beta2: float = 0.95
    second: str = "own"
    optimiser: str = "adamw"
    outer: str = field(metadata=LOCAL, default="average")
    eta: float = field(metadata=LOCAL, default=1.0)
    mu: float = field(metadata=LOCAL, default=0.0)
    ramp: float = field(metadata=LOCAL, default=0.0)

    @classmethod
    def of(cls, setting: Setting) -> Self:
        """Raises Incompatible for "tune" without held-out records to tune on, and for what would
        tell of private text without noise where the plan promises an epsilon."""
        plan, p = setting.plan, setting.plan.pretrain
        if math.isfinite(plan.privacy.epsilon) and (p.outer == "tune" or p.weight != "equal"):
            raise Incompatible(
                f"privacy.epsilon = {plan.privacy.epsilon:g} covers noisy gradients alone; "
                f'pretrain.outer = "{p.outer}" and pretrain.weight = "{p.weight}" would send '
                'held-out losses or token counts: set outer to "average", "nesterov" or "primal" '
                'and weight to "equal"'
            )
        if p.outer == "tune" and not plan.knowledge.held_out:
            raise Incompatible(
                'pretrain.outer = "tune" compares settings on records that sites hold out, and '
                "knowledge.held_out = 0; set it to a share such as 0.02, or name a setting"
            )
        if p.optimiser == "sgd" and p.second == "shared":
            raise Incompatible(
                'pretrain.second = "shared" shares second moments, and pretrain.optimiser = "sgd" '
                'has none; set second to "own", or optimiser to "adamw"'
            )
        return cls(
            rounds=plan.run.rounds or plan.task.windows,
            inner_steps=p.inner_steps,
            growth=p.growth,
            batch=p.batch,
            length=p.length,
            lr=p.lr,
            warmup=p.warmup,
            floor=p.floor,
            weight_decay=p.weight_decay,
            bound=p.bound,
            bits=p.bits,
            fragments=p.fragments,
            feedback=p.feedback,
            weight=p.weight,
            share=p.share,
            precision=p.precision,
            seed=plan.run.seed,
            outer=p.outer,
            eta=p.outer_lr,
            mu=p.outer_momentum,
            ramp=p.outer_ramp,
            down=p.down,
            beta2=p.beta2,
            second=p.second,
            optimiser=p.optimiser,
        )

    @staticmethod
    def releases(plan: Plan) -> int:
        """Gradients of a site in a whole run: what a guarantee is spread over."""
        return (plan.run.rounds or plan.task.windows) * plan.pretrain.inner_steps

    def start(self, weights: Weights) -> State:
        return State(weights=dict(weights))

    def round(self, number: int, state: State, cohort: Cohort, clients: Clients) -> State:
        asked, held, scale = self.question(number, state, cohort)
        answer = clients.sum(cohort, asked)
        delta, counts = self.heard(number, scale, answer, state.weights, len(cohort))
        after = self.stepped(number, state, delta)
        moved = {
            name: grids.following(scale[name], counts[name][: grids.BINS], self.bits)
            for name in delta
        }
        after = replace(
            after,
            scale={**scale, **moved},
            second=self.shared(answer, len(cohort)) or state.second,
            held=held if self.down in changes.BITS else {},
            holders=answer.cohort,
            clipped=grids.clipped(counts),
        )
        if self.outer == "tune" and (number in (5, 15, 40) or number % 50 == 0):
            return self.tuned(number, state, after, delta, cohort, clients)
        return after

    def question(
        self, number: int, state: State, cohort: Cohort
    ) -> tuple[Broadcast, Weights, dict[str, int]]:
        """The broadcast of a round, what sites hold after it, and the exponents of its grid."""
        due = self.due(number, state.weights)
        scale = {**self._first_scale(number, due), **state.scale}
        tensors, held = self._sent(number, state, cohort)
        tensors[EXPONENTS] = torch.tensor([scale[name] for name in due], dtype=torch.int16)
        tensors |= state.second
        word = 32 if grids.lane(self.bits, len(cohort)) == 32 else 16
        told = [HISTOGRAM, SHARED] if self.second == "shared" else [HISTOGRAM]
        zero = dict.fromkeys([*due, *told], 0)
        asked = ask(self, "train", number, tensors, scale=zero, word=word)
        return asked, held, scale

    def heard(
        self, number: int, scale: Mapping[str, int], answer: Aggregate, like: Weights, asked: int
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """The mean delta of every tensor due, float32, and its summed histogram."""
        due, width = self.due(number, like), grids.lane(self.bits, asked)
        total = int(answer.words[WEIGHT]) / self._unit()
        if not total:
            return {name: torch.zeros_like(like[name]) for name in due}, {
                name: torch.zeros(grids.BINS + 1, dtype=torch.int64) for name in due
            }
        delta = {}
        for name in due:
            whole = grids.split(answer.words[name], width, like[name].shape)
            delta[name] = (whole.double() * 2.0 ** -scale[name] / total).float()
        counts = grids.undigits(answer.words[HISTOGRAM], asked)
        return delta, {name: counts[place] for place, name in enumerate(due)}

    def shared(self, answer: Aggregate, asked: int) -> dict[str, Tensor]:
        """The mean over sites of the means of their second moments, float32; none if none came."""
        total = int(answer.words[WEIGHT]) / self._unit()
        if SHARED not in answer.words or not total:
            return {}
        counts = grids.undigits(answer.words[SHARED], asked)
        return {SHARED: (counts.double() * (2.0**-moments.FRACTION / total)).float()}

    def stepped(self, number: int, state: State, delta: Weights) -> State:
        """The model after the outer step."""
        if self.outer == "average":
            return replace(state, weights=_less(state.weights, delta, 1.0))
        if self.outer == "primal":
            fast = {**state.weights, **state.momentum}
            fast = {name: v - self.eta * delta.get(name, zero(v)) for name, v in fast.items()}
            weights = {
                name: torch.lerp(fast[name], old, self.mu) if name in delta else old
                for name, old in state.weights.items()
            }
            return replace(state, weights=weights, momentum=fast)
        if self.outer == "nesterov":
            mu = self.risen(number)
            momentum = _heavier(state.momentum, delta, mu, "")
            step = _ahead(momentum, delta, mu, "")
            weights = _less(state.weights, step, self.eta)
            return replace(state, weights=weights, momentum=momentum)
        momentum = dict(state.momentum)
        for place, (_, mu) in enumerate(SETTINGS):
            momentum |= _heavier(state.momentum, delta, mu, f"{place}/")
        after = replace(state, momentum=momentum)
        return replace(after, weights=self._candidate(state, after, delta, state.setting))

    def tuned(
        self,
        number: int,
        before: State,
        after: State,
        delta: Weights,
        cohort: Cohort,
        clients: Clients,
    ) -> State:
        """The state under the setting whose held-out loss is lower by two standard errors."""
        names = [f"{kind}{place}" for place in range(len(SETTINGS)) for kind in ("sum", "square")]
        tensors = {
            f"{place}/{name}": value
            for place in range(len(SETTINGS))
            for name, value in self._candidate(before, after, delta, place).items()
        }
        scale = {**dict.fromkeys(names, 24), "count": 0}
        asked = ask(self, "judge", number, tensors, scale={}, word=64, metrics=scale)
        present = torch.tensor([before.setting], dtype=torch.int16)
        asked = replace(asked, tensors={**asked.tensors, "present": present})
        heard = metrics(clients.sum(cohort, asked))
        best, chosen = 0.0, before.setting
        for place in range(len(SETTINGS)):
            gain = heard[f"sum{place}"] / max(heard["count"], 1.0)
            spread = heard[f"square{place}"] / max(heard["count"], 1.0) - gain**2
            error = math.sqrt(max(spread, 0.0) / max(heard["count"], 1.0))
            if gain + 2 * error < 0 and gain < best:
                best, chosen = gain, place
        weights = self._candidate(before, after, delta, chosen)
        return replace(after, setting=chosen, weights=weights)

    def steps(self) -> Steps:
        return {"train": self.train, "judge": self.judge}

    def train(self, client: Client, asked: Broadcast) -> Update:
        """The rounded change of the fragment due, the weight, and the histograms of the change."""
        number, num = asked.round, len(asked.cohort)
        if asked.guards and self.weight != "equal":
            raise GuardMissing(
                f'pretrain.weight = "{self.weight}" tells how much text this site has, which no '
                'guard covers; ask with "equal"'
            )
        kept, last = pretraining.remembered(client.store, before=number)
        held, fast = self._received(asked, kept, last)
        data = client.knowledge.until(number)
        away = number - last - 1 if last else 0
        matrices = moments.matrices(held)
        if SHARED in asked.tensors and any(name.startswith(SECOND) for name in kept):
            kept = moments.pulled(kept, matrices, self.beta2, asked.tensors[SHARED].float())
        trained, after = client.pretrain(
            fast,
            data,
            self.course(number, rewarm=not last or away > FORGIVEN),
            kept={n: v for n, v in kept.items() if n == CURSOR} if away > FORGIVEN else kept,
            seed=self.seed,
        )
        due = self.due(number, held)
        weight = self._weight(client, data)
        residual = {n: kept[RESIDUAL + n] for n in due if RESIDUAL + n in kept}
        delta = {name: held[name] - trained[name] + residual.get(name, 0) for name in due}
        bounded = clip(delta, self.bound) if self.bound else delta
        tensors, side, keep = {}, [], {n: v for n, v in kept.items() if n.startswith(RESIDUAL)}
        chance = torch.Generator().manual_seed(_own_seed(asked.seed, client.name))
        width = grids.lane(self.bits, num)
        for name, exponent in zip(due, asked.tensors[EXPONENTS].tolist(), strict=True):
            addend = bounded[name] * (weight / self._unit())
            whole = grids.rounded(addend, exponent, self.bits, chance)
            tensors[name] = grids.join(whole, width)
            side.append(grids.histogram(addend, exponent, self.bits))
            if self.feedback:
                said = whole.double() * (2.0**-exponent * self._unit() / weight)
                keep[RESIDUAL + name] = (bounded[name] - said).float()
        tensors[HISTOGRAM] = grids.digits(torch.stack(side), num)
        if self.second == "shared":
            counts = moments.counted(after, matrices, self.beta2, weight / self._unit())
            tensors[SHARED] = grids.digits(counts, num)
        if self.fragments > 1 or self.down in changes.BITS:
            keep |= {HELD + name: value for name, value in held.items()}
        if self.fragments > 1:
            keep |= {FAST + name: value for name, value in trained.items()}
        pretraining.remember(client.store, number, {**after, **keep})
        return Update(client=client.name, tensors=tensors, weight=weight)

    def judge(self, client: Client, asked: Broadcast) -> Update:
        """Differences of held-out loss between candidates and the present setting, summed."""
        losses = []
        for place in range(len(SETTINGS)):
            own = {
                name.partition("/")[2]: value
                for name, value in asked.tensors.items()
                if name.startswith(f"{place}/")
            }
            found = client.nll(own, client.held_out, length=self.length, rows=JUDGED)
            losses.append(found[:, 0] / found[:, 1].clamp(min=1))
        present = losses[int(asked.tensors["present"])]
        told = {"count": float(len(present))}
        for place, loss in enumerate(losses):
            told[f"sum{place}"] = float((loss - present).sum())
            told[f"square{place}"] = float((loss - present).square().sum())
        return Update(client=client.name, tensors={}, weight=1, metrics=told)

    def course(self, number: int, *, rewarm: bool = False) -> Course:
        """What a site trains in a round."""
        start, end = self.steps_until(number - 1), self.steps_until(number)
        return Course(
            steps=end - start,
            start=start,
            total=self.steps_until(self.rounds),
            batch=self.batch,
            length=self.length,
            lr=self.lr,
            warmup=self.warmup,
            rewarm=self.warmup if rewarm and number > 1 else 0,
            floor=self.floor,
            weight_decay=self.weight_decay,
            beta2=self.beta2,
            precision=self.precision,
            optimiser=self.optimiser,
        )

    def risen(self, number: int) -> float:
        """The momentum of a round: it rises in a line over the first ``ramp`` of the rounds."""
        whole = self.ramp * self.rounds
        return self.mu * min(1.0, number / whole) if whole else self.mu

    def due(self, number: int, weights: Weights) -> list[str]:
        """The names of the fragment that a round carries, in order."""
        return sorted(n for n in weights if fragment(n, self.fragments) == number % self.fragments)

    def steps_until(self, number: int) -> int:
        """Steps done after a round; every round has one at least."""
        total = self.rounds * self.inner_steps
        if number >= self.rounds:
            return total + (number - self.rounds) * self.inner_steps
        share = math.pow(number / self.rounds, self.growth)
        return max(round(total * share), number)

    # --- private ----------------------------------------------------------------------------------

    def _unit(self) -> int:
        """What an integer weight is divided by: the addend of a site is its share of the grid."""
        return 1 if self.weight == "equal" else grids.levels(min(self.bits, 12))

    def _weight(self, client: Client, data: Dataset) -> int:
        if self.weight == "equal":
            return 1
        tokens = client.tokens(data, length=self.length)
        return min(max(round(tokens / self.share), 1), self._unit())

    def _first_scale(self, number: int, due: Sequence[str]) -> dict[str, int]:
        """A range of twice the sum of the rates since the fragment's last turn: AdamW moves a
        coordinate by about the rate."""
        since = max(number - self.fragments, 0)
        steps = self.steps_until(number) - self.steps_until(since)
        return {name: grids.first(self.bits, 2 * self.lr * steps) for name in due}

    def _sent(self, number: int, state: State, cohort: Cohort) -> tuple[dict[str, Tensor], Weights]:
        """Tensors of a broadcast, and what sites hold after it."""
        everyone = number > 1 and set(cohort) <= set(state.holders)
        names = list(state.weights)
        if everyone and self.fragments > 1:
            names = self.due(number - 1, state.weights)
        if self.down not in changes.BITS:
            narrow = torch.float16 if self.down == "float16" else torch.float32
            return {name: state.weights[name].to(narrow) for name in names}, {}
        if not everyone:
            sent = {name: state.weights[name].half() for name in names}
            return sent, {name: value.float() for name, value in sent.items()}
        return changes.sent(state.weights, state.held, names, self.down)

    def _received(
        self, asked: Broadcast, kept: Weights, last: int
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """The weights a delta counts from, and those that training goes on with.

        Raises StaleUpdate where the server sent a part only and this site lacks the rest.
        """
        follows = last == asked.round - 1
        old = {n.removeprefix(HELD): v for n, v in kept.items() if n.startswith(HELD)}
        own = {n.removeprefix(FAST): v for n, v in kept.items() if n.startswith(FAST)}
        changed = changes.names(asked.tensors)
        given = {n: v.float() for n, v in asked.tensors.items() if not n.startswith("side/")}
        part = bool(changed) or (self.fragments > 1 and follows and set(given) < set(old))
        if part and not (follows and old):
            raise StaleUpdate(
                f"round {asked.round} brought a part of the model, and this site last answered "
                f"round {last}; it is sent the whole in the next round"
            )
        if changed:
            given = changes.received(asked.tensors, old, self.down)
        held = {**old, **given} if part else given
        if self.fragments == 1 or not (follows and own):
            return held, dict(held)
        new = set(self.due(asked.round - 1, held))
        return (
            {name: held[name] if name in new else old[name] for name in held},
            {name: held[name] if name in new else own[name] for name in held},
        )

    def _candidate(self, before: State, after: State, delta: Weights, place: int) -> Weights:
        eta, mu = SETTINGS[place]
        return _less(before.weights, _ahead(after.momentum, delta, mu, f"{place}/"), eta)


def fragment(name: str, num: int) -> int:
    """The fragment of a tensor: layers in turn, embeddings and head in the first."""
    layer = next((int(part) for part in name.split(".") if part.isdigit()), 0)
    return layer % num


def zero(like: Tensor) -> Tensor:
    return torch.zeros_like(like)


def _less(weights: Weights, step: Weights, rate: float) -> dict[str, Tensor]:
    return {n: v - rate * step[n] if n in step else v for n, v in weights.items()}


def _heavier(momentum: Weights, delta: Weights, mu: float, under: str) -> dict[str, Tensor]:
    moved = {
        under + name: mu * momentum.get(under + name, zero(value)) + value
        for name, value in delta.items()
    }
    return {**momentum, **moved} if not under else moved


def _ahead(momentum: Weights, delta: Weights, mu: float, under: str) -> dict[str, Tensor]:
    return {name: value + mu * momentum[under + name] for name, value in delta.items()}


def _own_seed(seed: int, name: str) -> int:
    digest = hashlib.sha256(f"fedkola/rounding/1/{seed}/{name}".encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 2
