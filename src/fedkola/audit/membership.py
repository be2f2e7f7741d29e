"""A6, membership: was this record among those behind a change, or those behind a model?

(a) Of a model: the record's loss under a reference, trained on public text alone, less its loss
    under the model (Carlini et al., Membership inference attacks from first principles, S&P 2022,
    in its cheapest form).
(b) Of a change D, single or summed: how steeply the record's loss still falls along D at its end,
    -D . g at theta + D, by central differences of the loss. A record that D was made of resists
    overshooting; others are hurt by it. At the beginning, -D . g at theta, members stand out less
    (0.75 against 0.98 after ten epochs on 64 records, 1 of 1 runs), and ``start_auc`` says so.
(c) Of the protocol: guesses about random directions planted as units, and the epsilon they refute
    (:mod:`fedkola.audit.one_run`), in a rehearsal of the same training on the same records.

Records that no site used come from the truth under the name ``OUTSIDE``; without them half of the
attacker's own text must do, and the score then also tells the two corpora apart.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import ClassVar

import numpy as np
import torch
from numpy.typing import NDArray

from fedkola.audit import one_run, shadow
from fedkola.audit.evidence import Control, Evidence, Known, Measure, Sighting, Truth
from fedkola.audit.intervals import auc, auc_interval, mean_interval, rate_interval, tpr_at_fpr
from fedkola.audit.one_run import Game
from fedkola.audit.shadow import Recipe
from fedkola.errors import DataError
from fedkola.training import whole
from fedkola.training.model import Foundation
from fedkola.training.whole import Ids
from fedkola.types import Scalar, Weights

OUTSIDE = "outside"
FLOOR = 0.8
SEPARATED = 1.0
NEAR = 0.05
REFERENCE_STEPS = 300
Scores = NDArray[np.float64]


@dataclass(frozen=True, slots=True, kw_only=True)
class Membership:
    """At most ``members`` of each of ``updates`` and ``outsiders`` in all are scored; ``epochs``
    over ``few`` members make the control. ``game`` without canaries leaves (c) out."""

    name: ClassVar[str] = "membership"
    targets: ClassVar[tuple[str, ...]] = ("single", "sum", "model")
    updates: int = 20
    members: int = 256
    outsiders: int = 1000
    epochs: int = 10
    few: int = 64
    game: Game = field(default_factory=Game)

    def quick(self) -> "Membership":
        return replace(self, updates=3, members=64, outsiders=200, few=32)

    def run(self, seen: Sequence[Sighting], known: Known, truth: Truth) -> Evidence:
        """Raises DataError where no sighting has records behind it, or nobody is an outsider."""
        began = time.perf_counter()
        cases = [s for s in seen if truth.get((s.round, s.who))]
        # Spread over the run.
        cases = cases[:: -(-len(cases) // self.updates)] if cases else []
        if not cases:
            raise DataError(
                f"of {len(seen)} sightings none has records behind it; membership needs the truth"
            )
        outside, reading, notes = _outsiders(self, known, truth, cases[0])
        of_model = not cases[0].change
        table = _Table(attack=self, known=known, outside=outside, reading=reading)
        own = {id(s): _members(self, s, truth, seed=known.seed) for s in cases}
        score = _by_model if of_model else _by_change
        results = [score(table, s, own[id(s)]) for s in cases]
        measures = _measures(results, seed=known.seed)
        how = _recipe(cases[0], truth)
        if how is not None and self.game.canaries:
            records = truth[(cases[0].round, cases[0].who)]
            found = _epsilon(self.game, known, cases[0], how, records)
            measures |= {} if found is None else {"epsilon": found}
            notes += [] if found is not None else ["epsilon: its control failed"]
        control = _control(table, cases[0], own[id(cases[0])], how, of_model)
        return Evidence(
            attack=self.name,
            target="model" if of_model else "single" if _all_single(cases) else "sum",
            updates=len(cases),
            measures=measures,
            control=Control(metric="auc", value=control, floor=FLOOR),
            seconds=time.perf_counter() - began,
            notes="; ".join(notes),
            settings={
                "outsiders": len(outside),
                "members": sum(map(len, own.values())),
                "canaries": self.game.canaries,
                "guesses": self.game.guesses,
            },
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class _Table:
    attack: Membership
    known: Known
    outside: list[Ids]
    reading: list[Ids]


Pair = tuple[Scores, Scores]
"""Scores of members and of outsiders."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Result:
    scores: Pair
    null: Pair
    start: Pair | None = None


def slopes(
    foundation: Foundation, weights: Weights, change: Weights, records: Sequence[Ids]
) -> Scores:
    """(n,) fall of each record's loss, nats per token, along a change at ``weights``: -D . g."""
    sides = [
        {n: v + side * change[n] if n in change else v for n, v in weights.items()}
        for side in (-NEAR, NEAR)
    ]
    behind, ahead = (_losses(foundation, side, records) for side in sides)
    found: Scores = (behind - ahead) / (2 * NEAR)
    return found


# --- private --------------------------------------------------------------------------------------


def _by_change(table: _Table, seen: Sighting, members: list[Ids]) -> _Result:
    """(b); the null is a change made of the attacker's own text."""
    foundation = table.known.foundation
    how = shadow.recipe(replace(seen, protocol=_open(seen)))
    other = shadow.shadow(
        foundation, seen.before, how, [table.reading], seed=table.known.seed + 31
    ).change

    def scored(change: Weights, at: float) -> tuple[Scores, Scores]:
        weights = {n: v + at * change[n] if n in change else v for n, v in seen.before.items()}
        found = slopes(foundation, weights, change, [*members, *table.outside])
        return found[: len(members)], found[len(members) :]

    return _Result(
        scores=scored(seen.change, 1), null=scored(other, 1), start=scored(seen.change, 0)
    )


def _by_model(table: _Table, seen: Sighting, members: list[Ids]) -> _Result:
    """(a); the null is a second reference in place of the model."""
    foundation = table.known.foundation
    base = whole.parameters(foundation)
    how = shadow.recipe(replace(seen, round=1, protocol=_open(seen), before=base, change=base))
    steps = min(REFERENCE_STEPS, max(how.steps, 2 * len(table.reading) // how.batch))
    losses = []
    for turn in range(2):
        made = shadow.shadow(
            foundation,
            base,
            replace(how, steps=steps),
            [table.reading],
            seed=table.known.seed + turn,
        )
        weights = {name: value + made.change[name] for name, value in base.items()}
        losses.append(_losses(foundation, weights, [*members, *table.outside]))
    under = _losses(foundation, seen.before, [*members, *table.outside])
    scores, null, num = losses[0] - under, losses[0] - losses[1], len(members)
    return _Result(scores=(scores[:num], scores[num:]), null=(null[:num], null[num:]))


def _losses(foundation: Foundation, weights: Weights, records: Sequence[Ids]) -> Scores:
    """Nats per token of each record."""
    found = whole.nll(foundation, weights, records)
    losses: Scores = (found[:, 0] / found[:, 1].clamp(min=1)).numpy()
    return losses


def _measures(results: Sequence[_Result], *, seed: int) -> dict[str, Measure]:
    """Over updates: the mean AUC, and members found at 1 % of outsiders taken for one."""
    level = sum(_auc(r.null) for r in results) / len(results)
    found = {"auc": _area([r.scores for r in results], seed=seed, null=level)}
    rates = [tpr_at_fpr(*_lists(r.scores)) for r in results]
    nulls = [tpr_at_fpr(*_lists(r.null)).value for r in results]
    sizes = [len(r.scores[0]) for r in results]
    hits = sum(round(rate.value * size) for rate, size in zip(rates, sizes, strict=True))
    null = sum(nulls) / len(nulls)
    found["tpr_at_1_fpr"] = rate_interval(hits, sum(sizes), null=null)
    starts = [r.start for r in results if r.start is not None]
    if starts:
        found["start_auc"] = _area(starts, seed=seed)
    return found


def _area(pairs: Sequence[Pair], *, seed: int, null: float | None = None) -> Measure:
    if len(pairs) == 1:
        return auc_interval(*_lists(pairs[0]), null=null)
    return mean_interval([_auc(pair) for pair in pairs], seed=seed, null=null)


def _auc(pair: Pair) -> float:
    return auc(*_lists(pair))


def _lists(pair: Pair) -> tuple[list[float], list[float]]:
    return pair[0].tolist(), pair[1].tolist()


def _epsilon(
    game: Game, known: Known, seen: Sighting, how: Recipe, records: Sequence[Ids]
) -> Measure | None:
    """(c), with the game on the open protocol as its control and an idle one as its null."""
    delta = shadow.number(seen.protocol.get("delta"))

    def bound(recipe: Recipe, seed: int, *, planted: bool = True) -> float:
        correct = one_run.played(
            known.foundation, seen.before, recipe, records, game, seed=seed, planted=planted
        )
        return one_run.epsilon_at_least(
            correct, guesses=game.guesses, canaries=game.canaries, delta=delta
        )

    certain = replace(how.open(), units=how.batch)  # each canary in every step
    if bound(certain, known.seed + 1) < SEPARATED:
        return None
    value = bound(how, known.seed)
    return Measure(
        value=value, low=value, high=value, null=bound(how, known.seed + 2, planted=False)
    )


def _control(
    table: _Table, seen: Sighting, members: list[Ids], how: Recipe | None, of_model: bool
) -> float:
    """The AUC on an open training of some epochs over a few members."""
    attack, foundation = table.attack, table.known.foundation
    few = members[: attack.few]
    base = whole.parameters(foundation) if of_model else seen.before
    local = whole.Local() if how is None else replace(how.local, start=0, warmup=0, total=0)
    batch = 8 if how is None else how.batch
    many = Recipe(steps=max(1, attack.epochs * len(few) // batch), batch=batch, local=local)
    made = shadow.shadow(foundation, base, many, [few], seed=table.known.seed + 17)
    records = [*few, *table.outside[: 4 * attack.few]]
    after = {name: value + made.change[name] for name, value in base.items()}
    if of_model:
        scores = _losses(foundation, base, records) - _losses(foundation, after, records)
    else:
        scores = slopes(foundation, after, made.change, records)
    return _auc((scores[: len(few)], scores[len(few) :]))


def _outsiders(
    attack: Membership, known: Known, truth: Truth, seen: Sighting
) -> tuple[list[Ids], list[Ids], list[str]]:
    """Records that nobody used, text for shadows and references, and what is to be noted."""
    own: list[Ids] = list(shadow.own_text(known, seen.protocol))
    used = {record for (_, who), part in truth.items() if who != OUTSIDE for record in part}
    given = [r for (_, who), part in truth.items() if who == OUTSIDE for r in part]
    outside: list[Ids] = list(dict.fromkeys(record for record in given if record not in used))
    notes = []
    if not outside:
        outside, own = own[::2], own[1::2]
        notes.append("outsiders are the attacker's own text: the score also tells corpora apart")
    if not outside or not own:
        raise DataError(
            f"there are {len(outside)} records that no site used and {len(own)} for shadows; give "
            "the attacker more public text"
        )
    return _some(outside, attack.outsiders, seed=known.seed), own, notes


def _members(attack: Membership, seen: Sighting, truth: Truth, *, seed: int) -> list[Ids]:
    distinct = [
        record for record in dict.fromkeys(truth[(seen.round, seen.who)]) if len(record) > 1
    ]
    return _some(distinct, attack.members, seed=seed)


def _some(records: Sequence[Ids], most: int, *, seed: int) -> list[Ids]:
    order = torch.randperm(len(records), generator=torch.Generator().manual_seed(seed))
    return [records[row] for row in order[:most].tolist()]


def _recipe(seen: Sighting, truth: Truth) -> Recipe | None:
    """How sites train; None where the protocol does not say it."""
    distinct = len(set(truth[(seen.round, seen.who)]))
    try:
        moving = replace(seen, change=seen.change or dict(seen.before))
        return shadow.recipe(moving, held=max(1, distinct // max(seen.sites, 1)))
    except DataError:
        return None


def _open(seen: Sighting) -> dict[str, Scalar]:
    """The protocol without its noise."""
    hidden = ("epsilon", "sigma")
    return {key: value for key, value in seen.protocol.items() if key not in hidden}


def _all_single(cases: Sequence[Sighting]) -> bool:
    return all(seen.sites == 1 for seen in cases)
