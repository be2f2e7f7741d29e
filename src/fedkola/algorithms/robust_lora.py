"""Robust LoRA: federated averaging of LoRA factors and head where some sites may lie.

server:  groups <- the cohort in parts of g sites, anew at every exchange, by a key of the run
         x_j <- (sum over group j of n_k d_k) / n_j, cut to norm tau        one sum each, or single
         w <- w + rule(x_1 .. x_m)                                          in Gram space
client:  d_k <- beta d_k + (1 - beta) (fit(w; records that arrived) - w)

With ``cohort.groups_of`` 0 there is one sum and the rule is the mean: FedIT. With 1 the server
reads single updates. From 3 on it reads sums of groups alone, and runs under secure aggregation;
what that hides and what it bears is in ``docs/explanation/lying-sites.md``. The momentum beta at
the sites averages their noise away, behind which lies hide (Karimireddy et al., ICML 2021). Rules:
Blanchard et al. (NeurIPS 2017), Allouah et al. (AISTATS 2023) and others, see
:mod:`fedkola.quality.rules`. Use it where sites are not all trusted and records are alike enough to
be learnt by one adapter.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar, Self

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from fedkola import files
from fedkola.algorithms.ask import LOCAL, ask
from fedkola.algorithms.learn import change, learn
from fedkola.algorithms.setting import Setting, training
from fedkola.errors import CohortTooSmall
from fedkola.quality import groups
from fedkola.quality.groups import Robust, Row, Standing, Turn
from fedkola.types import (
    Broadcast,
    Client,
    Clients,
    Cohort,
    Event,
    Steps,
    Update,
    Visibility,
    Weights,
)
from fedkola.wire import WEIGHT, reals

EXCHANGE = "exchange"
MOMENTUM = "momentum"


@dataclass(frozen=True, slots=True, kw_only=True)
class State:
    """Adapter and head, the change of the last exchange, the exchanges of the last round, and the
    evidence about sites."""

    weights: Weights
    last: Weights = field(default_factory=dict)
    number: int = 0
    turns: tuple[Turn, ...] = ()
    standing: Standing = field(default_factory=Standing)


@dataclass(frozen=True, kw_only=True)
class RobustLoRA:
    needs: ClassVar[Visibility] = Visibility.SUM
    epochs: float
    batch: int
    lr: float
    level: int
    momentum: float = 0.0
    exchanges: int = field(metadata=LOCAL, default=1)
    robust: Robust = field(metadata=LOCAL, default_factory=Robust)
    key: str = field(metadata=LOCAL, default="")

    @classmethod
    def of(cls, setting: Setting) -> Self:
        return cls(
            **training(setting),
            momentum=setting.plan.robust.momentum,
            exchanges=setting.plan.algorithm.exchanges,
            robust=groups.settings(setting.plan),
            key=f"{setting.plan.run.seed}",
        )

    def start(self, weights: Weights) -> State:
        return State(weights=weights)

    def round(self, number: int, state: State, cohort: Cohort, clients: Clients) -> State:
        """``exchanges`` times: all train on their new records, a rule makes one change of it."""
        state = replace(state, number=number, turns=())
        for exchange in range(self.exchanges):
            scale = dict.fromkeys(state.weights, 16)
            said = {**state.weights, EXCHANGE: torch.tensor(exchange)}
            asked = ask(self, "train", number, said, scale=scale)
            split = self._split(number, exchange, cohort, state.standing)
            rows, lost = self._rows(split, clients, replace(asked, seed=exchange))
            if any(row.count for row in rows):
                state = self._moved(state, exchange, rows, lost)
        return state

    def steps(self) -> Steps:
        return {"train": self.train}

    def train(self, client: Client, asked: Broadcast) -> Update:
        """The weighted change of all weights after local training on records not used before, in
        the mean with the changes before it."""
        weights = {name: v for name, v in asked.tensors.items() if name != EXCHANGE}
        trained, count = learn(self, client, asked, weights)
        if self.momentum and count:
            place = (asked.round, int(asked.tensors[EXCHANGE]))
            moved = {name: trained[name] - value for name, value in weights.items()}
            moved = _averaged(client.store, place, moved, self.momentum)
            trained = {name: value + moved[name] for name, value in weights.items()}
        return change(client, weights, trained, count)

    def events(self, before: State, after: State) -> tuple[Event, ...]:
        """Every exchange with its groups and their coefficients; groups and sites to look at."""
        if after.number == before.number:
            return ()
        found: list[Event] = []
        for turn in after.turns:
            body = {"round": after.number, **_body(turn)}
            found.append({"kind": "COMBINE", "subject": self.robust.rule, "body": body})
            for i, why in _outliers(turn).items():
                about = {"round": after.number, "exchange": turn.exchange, "why": why}
                subject = ", ".join(turn.groups[i])
                found.append({"kind": "GROUP_OUTLIER", "subject": subject, "body": about})
        if self.robust.reliability != "off":
            for site, z in groups.suspects(after.standing).items():
                about = {"round": after.number, "deviations": round(z, 2)}
                found.append({"kind": "SITE_WARNING", "subject": site, "body": about})
        return tuple(found)

    # --- private ----------------------------------------------------------------------------------

    def _split(
        self, number: int, exchange: int, cohort: Cohort, standing: Standing
    ) -> tuple[Cohort, ...]:
        text = f"fedkola/robust/1/{self.key}/{number}/{exchange}"
        key = hashlib.sha256(text.encode()).hexdigest()
        # In one of four exchanges groups are drawn freely, so that evidence can still change.
        together = self._doubted(standing) if standing.exchanges % 4 else ()
        return groups.assign(cohort, self.robust.groups_of, key=key, together=together)

    def _doubted(self, standing: Standing) -> tuple[str, ...]:
        """Sites to be left out, where the plan lets the evidence decide."""
        if self.robust.reliability != "regroup":
            return ()
        return groups.doubted(standing, self.robust.assume_liars)

    def _rows(
        self, split: Sequence[Cohort], clients: Clients, asked: Broadcast
    ) -> tuple[list[Row], list[Cohort]]:
        """The mean change of every group that answered, and the groups that did not."""
        if self.robust.groups_of == 1:
            cohort = tuple(site for group in split for site in group)
            found = {update.client: update for update in clients.each(cohort, asked)}
            rows = [_single(found[group[0]]) for group in split if group[0] in found]
            return rows, [group for group in split if group[0] not in found]
        rows, lost = [], []
        for group in split:
            try:
                rows.append(_summed(clients, group, asked))
            except CohortTooSmall:
                if len(split) == 1:
                    raise
                lost.append(group)
        return rows, lost

    def _moved(
        self, state: State, exchange: int, rows: Sequence[Row], lost: Sequence[Cohort]
    ) -> State:
        change_, turn = groups.joined(
            self.robust,
            rows,
            exchange=exchange,
            size=self.robust.groups_of,
            last=state.last or None,
            without=self._doubted(state.standing),
            seed=exchange,
        )
        standing = state.standing
        if self.robust.groups_of and self.robust.reliability != "off":
            standing = groups.observed(standing, rows, change_)
        silent = {str(len(rows) + i): "CohortTooSmall" for i in range(len(lost))}
        turn = replace(turn, groups=(*turn.groups, *lost), dropped={**turn.dropped, **silent})
        weights = {name: old + change_[name].to(old.dtype) for name, old in state.weights.items()}
        keeps = self.robust.rule == "centered_clipping"
        return replace(
            state,
            weights=weights,
            last={name: value.float() for name, value in change_.items()} if keeps else {},
            turns=(*state.turns, turn),
            standing=standing,
        )


def _averaged(
    store: Path, place: tuple[int, int], moved: Weights, momentum: float
) -> dict[str, Tensor]:
    """The mean of this change and those before it, older ones counting ``momentum`` times less.

    Means of this round's exchanges and the last of earlier rounds are kept, so that a question
    that comes again finds what it found before.
    """
    folder = store / MOMENTUM
    folder.mkdir(parents=True, exist_ok=True)
    kept = {(int(path.stem[:6]), int(path.stem[7:])): path for path in folder.glob("*.safetensors")}
    before = max((at for at in kept if at < place), default=None)
    found = dict(moved)
    if before is not None:
        old = load_file(kept[before])
        found = {n: momentum * old[n] + (1 - momentum) * v for n, v in moved.items()}
    target = folder / f"{place[0]:06d}-{place[1]:06d}.safetensors"
    draft = target.with_suffix(".tmp")
    save_file({name: value.contiguous() for name, value in found.items()}, draft)
    files.settle(draft, target)
    last = max((at for at in kept if at[0] < place[0]), default=place)
    for at, path in kept.items():
        if at < last and at[0] < place[0]:
            path.unlink()
    return found


def _single(update: Update) -> Row:
    weight = update.weight or 1.0
    means = {name: value / weight for name, value in update.tensors.items()}
    return Row(sites=(update.client,), tensors=means, count=round(update.weight))


def _summed(clients: Clients, group: Cohort, asked: Broadcast) -> Row:
    total = clients.sum(group, asked)
    decoded = reals(total)
    count = round(float(decoded.pop(WEIGHT)))
    means = {name: value / (count or 1) for name, value in decoded.items()}
    return Row(sites=total.cohort, tensors=means, count=count)


def _body(turn: Turn) -> dict[str, Any]:
    return {
        "exchange": turn.exchange,
        "groups": [list(group) for group in turn.groups],
        "records": list(turn.counts),
        "units": list(turn.units),
        "of": turn.of,
        "tau": turn.tau,
        "liars": turn.liars,
        "dropped": dict(turn.dropped),
    }


def _outliers(turn: Turn) -> dict[int, str]:
    """Rows that counted little or not at all, and why; those without records are none."""
    dropped = {int(i): why for i, why in turn.dropped.items() if why != "NoWeight"}
    return {**dropped, **dict.fromkeys(turn.low, "low weight")}
