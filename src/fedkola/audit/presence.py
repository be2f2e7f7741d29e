"""A3, learned token presence: which entries of the vocabulary stood in a site's text?

A row of the embedding moves when its token is read, and in a tied model also when it is predicted;
under AdamW every row moves, but not alike. The attacker runs the known protocol on its own text,
describes each row of each change by a few numbers, and teaches a small network which rows belong
to tokens that were there. Embeddings that stay still are read through the matrices around them.

A score counts for little while common words are guessed anyway. So it stands beside the frequency
of tokens in the attacker's text, beside ``prior_auc`` (the same network, blind to the change), and
as ``matched_auc``: only rows of one tenth by that prior are compared, so that 0.5 is a change that
tells nothing.
"""

import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional

from fedkola.audit import shadow
from fedkola.audit.evidence import (
    Control,
    Evidence,
    Known,
    Measure,
    Sequences,
    Sighting,
    Truth,
)
from fedkola.audit.intervals import auc, auc_interval, mean_interval
from fedkola.audit.shadow import Recipe, Shadow
from fedkola.errors import DataError
from fedkola.training.model import Foundation
from fedkola.training.whole import Ids
from fedkola.types import Weights

FLOOR = 0.95
STRATA = 10
LEADING = 4
FEW = 5
Net = nn.Sequential
Rows = NDArray[np.bool_]


@dataclass(frozen=True, slots=True, kw_only=True)
class Presence:
    """``shadows`` exchanges (half of them from 64 local steps on) teach a network of ``hidden``.

    Changes of the last ``rounds`` rounds are attacked, since each round needs its own shadows.
    """

    name: ClassVar[str] = "presence"
    shadows: int = 6
    hidden: int = 32
    steps: int = 300
    lr: float = 3e-3
    weight_decay: float = 1e-4
    rounds: int = 20

    def quick(self) -> "Presence":
        return replace(self, shadows=3, rounds=1)

    def run(self, seen: Sequence[Sighting], known: Known, truth: Truth) -> Evidence:
        """Score every row of the vocabulary in every sighting of which the truth is known.

        Raises DataError if nowhere both FEW tokens were used and FEW were not.
        """
        began = time.perf_counter()
        if not seen:
            raise DataError("no change of weights was seen; presence needs one")
        own = shadow.own_text(known, seen[0].protocol)
        bench = _Bench(attack=self, known=known, own=own)
        fair = [s for s in seen if _fair(bench, truth.get((s.round, s.who), ()))]
        last = sorted({s.round for s in fair})[-self.rounds :]
        fair = [s for s in fair if s.round in last]
        if not fair:
            raise DataError(
                f"of {len(seen)} changes none has {FEW} tokens that were used and {FEW} that were "
                "not; presence needs a larger vocabulary, or updates on less text"
            )
        results = [_attacked(bench, s, truth, fair) for s in fair]
        control = _control(bench, fair[0], truth)
        return Evidence(
            attack=self.name,
            target="single" if all(s.sites == 1 for s in fair) else "sum",
            updates=len(fair),
            measures=_measures(results, seed=known.seed),
            control=Control(metric="presence_auc", value=control, floor=FLOOR),
            seconds=time.perf_counter() - began,
            notes=_notes(bench, fair, len(seen)),
            settings={
                "shadows": self.shadows,
                "hidden": self.hidden,
                "rows": bench.rows,
                "own_sequences": len(bench.own),
            },
        )


_Key = tuple[int, int, Recipe, frozenset[str]]


@dataclass(slots=True, kw_only=True)
class _Bench:
    """The attacker's table: its text, and networks taught so far by round, sites, recipe and the
    tensors that are sent."""

    attack: Presence
    known: Known
    own: list[list[int]]
    taught: dict[_Key, tuple[Net, Net, list[Shadow]]] = field(default_factory=dict)

    @property
    def table(self) -> str:
        return embedding(self.known.foundation)

    @property
    def rows(self) -> int:
        return len(self.known.foundation.model.get_parameter(self.table))

    def counts(self) -> NDArray[np.float64]:
        """How often each token occurs in the attacker's text."""
        return _counts(self.own, self.rows).astype(np.float64)


def embedding(foundation: Foundation) -> str:
    """The name of the tensor whose rows are the input tokens."""
    weight = foundation.model.get_input_embeddings().weight  # type: ignore[operator]
    return next(name for name, p in foundation.model.named_parameters() if p is weight)


def described(before: Weights, change: Weights, table: str) -> Tensor:
    """Numbers (V, columns) of every row: 11, their squares and logarithms, standardised.

    Norm, maximum and spread of the row's change D; D along the mean change and along the row E
    itself; the norm of E and E along the mean row; D on four leading directions of change, signs
    set so that they are positive on average. Of an embedding that stays, E seen through the change
    of every matrix of its width instead.
    """
    own = before[table].float()
    moved = change.get(table)
    if moved is not None and bool(moved.any()):
        found = _moved(own, moved.float())
    else:
        found = _through(own, {n: v for n, v in change.items() if n != table})
    raw = torch.stack([*found, own.norm(dim=1), own @ _unit(own.mean(dim=0))], dim=1)
    level = _standard(raw)
    return torch.cat([level, _standard(level.square()), _standard(level.abs().log1p())], dim=1)


# --- private --------------------------------------------------------------------------------------


def _moved(own: Tensor, moved: Tensor) -> list[Tensor]:
    scaled = moved / moved.square().mean().sqrt().clamp_min(1e-30)
    _, _, right = torch.linalg.svd(scaled, full_matrices=False)
    leading = scaled @ right[:LEADING].T
    leading = leading * torch.where(leading.mean(dim=0) < 0, -1.0, 1.0)
    return [
        scaled.norm(dim=1),
        scaled.abs().amax(dim=1),
        scaled.std(dim=1),
        scaled @ _unit(scaled.mean(dim=0)),
        (scaled * own).sum(dim=1),
        *leading.T,
    ]


def _through(own: Tensor, change: Weights) -> list[Tensor]:
    """Norms of every row as the changed matrices read or write it."""
    seen = own - own.mean(dim=1, keepdim=True)
    seen = seen / seen.norm(dim=1, keepdim=True).clamp_min(1e-12)
    found = []
    for value in change.values():
        if value.dim() != 2 or not bool(value.any()):
            continue
        matrix = value.float() / value.float().square().mean().sqrt()
        if matrix.shape[0] == own.shape[1]:
            found.append((seen @ matrix).norm(dim=1))
        if matrix.shape[1] == own.shape[1]:
            found.append((seen @ matrix.T).norm(dim=1))
    return found


def _unit(vector: Tensor) -> Tensor:
    unit: Tensor = vector / vector.norm().clamp_min(1e-30)
    return unit


def _standard(columns: Tensor) -> Tensor:
    centred = columns - columns.mean(dim=0)
    return centred / centred.std(dim=0).clamp_min(1e-9)


def _described(bench: _Bench, seen: Sighting, change: Weights) -> Tensor:
    """The rows as far as the sighting shows tensors."""
    shown = {name: value for name, value in change.items() if name in seen.change}
    return described(seen.before, shown, bench.table)


def _prior(bench: _Bench, before: Weights) -> Tensor:
    """What is known of every row without the change: the model's own, and the public frequency."""
    own = before[bench.table].float()
    frequency = torch.from_numpy(bench.counts()).float().log1p()
    level = _standard(
        torch.stack([own.norm(dim=1), own @ _unit(own.mean(dim=0)), frequency], dim=1)
    )
    return torch.cat([level, _standard(level.square())], dim=1)


def _taught(
    bench: _Bench, seen: Sighting, how: Recipe, sites: int
) -> tuple[Net, Net, list[Shadow]]:
    """The network, its blind twin and the shadows behind both, made once."""
    key = (seen.round, sites, how, frozenset(seen.change))
    if key in bench.taught:
        return bench.taught[key]
    attack, known = bench.attack, bench.known
    number = attack.shadows if how.steps < 64 else max(2, attack.shadows // 2)
    made = []
    for turn in range(number):
        seed = known.seed * 101 + turn
        pools = shadow.dealt(bench.own, sites, seed=seed)
        made.append(shadow.shadow(known.foundation, seen.before, how, pools, seed=seed))
    wanted = torch.from_numpy(np.stack([_present(s.used, bench.rows) for s in made])).float()
    sighted = torch.stack([_described(bench, seen, s.change) for s in made])
    blind = _prior(bench, seen.before).expand(number, -1, -1)
    bench.taught[key] = (
        _fitted(attack, sighted, wanted, seed=known.seed),
        _fitted(attack, blind, wanted, seed=known.seed),
        made,
    )
    return bench.taught[key]


def _fitted(attack: Presence, inputs: Tensor, wanted: Tensor, *, seed: int) -> Net:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        net = nn.Sequential(
            nn.Linear(inputs.shape[-1], attack.hidden), nn.ReLU(), nn.Linear(attack.hidden, 1)
        )
    flat, targets = inputs.flatten(0, 1), wanted.flatten()
    optimiser = torch.optim.Adam(net.parameters(), lr=attack.lr, weight_decay=attack.weight_decay)
    for _ in range(attack.steps):
        optimiser.zero_grad()
        loss = functional.binary_cross_entropy_with_logits(net(flat)[:, 0], targets)
        loss.backward()  # type: ignore[no-untyped-call]
        optimiser.step()
    return net


def _scored(net: Net, inputs: Tensor) -> NDArray[np.float64]:
    with torch.inference_mode():
        scores: NDArray[np.float64] = net(inputs)[:, 0].double().numpy()
    return scores


def _attacked(
    bench: _Bench, seen: Sighting, truth: Truth, fair: Sequence[Sighting]
) -> dict[str, Measure]:
    net, blind, made = _taught(bench, seen, _recipe(seen, truth), seen.sites)
    scores = _scored(net, _described(bench, seen, seen.change))
    prior = _scored(blind, _prior(bench, seen.before))
    own = truth[(seen.round, seen.who)]
    others = [s for s in fair if (s.round, s.who) != (seen.round, seen.who)]
    other = truth[(others[0].round, others[0].who)] if others else made[0].used
    return _measured(bench, scores, prior, own, other)


def _measured(
    bench: _Bench,
    scores: NDArray[np.float64],
    prior: NDArray[np.float64],
    own: Sequences,
    other: Sequences,
) -> dict[str, Measure]:
    there, elsewhere = _present(own, bench.rows), _present(other, bench.rows)
    frequency = bench.counts()
    once = _counts(own, bench.rows) == 1
    unseen = frequency == 0
    found = {
        "presence_auc": _area(scores, there, ~there, null=_plain(scores, elsewhere)),
        "matched_auc": _matched(scores, prior, there, null=_matched(scores, prior, elsewhere)),
        "unseen_auc": _area(scores, there & unseen, ~there & unseen),
        "once_auc": _area(scores, once, ~there),
        "prior_auc": _area(prior, there, ~there),
        "frequency_auc": _area(frequency, there, ~there),
    }
    return {name: measure for name, measure in found.items() if measure is not None}


def _area(
    scores: NDArray[np.float64], positive: Rows, negative: Rows, null: float | None = None
) -> Measure | None:
    """None where either side has too few rows to say anything."""
    if min(int(positive.sum()), int(negative.sum())) < FEW:
        return None
    return auc_interval(scores[positive].tolist(), scores[negative].tolist(), null=null)


def _plain(scores: NDArray[np.float64], there: Rows) -> float | None:
    if there.all() or not there.any():
        return None
    return auc(scores[there].tolist(), scores[~there].tolist())


def _matched(
    scores: NDArray[np.float64],
    prior: NDArray[np.float64],
    there: Rows,
    null: Measure | None = None,
) -> Measure | None:
    """The AUC over pairs of one stratum of the prior, DeLong variances of the strata added up."""
    order = np.argsort(np.argsort(prior, kind="stable"), kind="stable")
    stratum = order * STRATA // len(prior)
    parts = []
    for number in range(STRATA):
        inside = stratum == number
        positive, negative = scores[there & inside], scores[~there & inside]
        if min(len(positive), len(negative)) >= 2:
            parts.append((len(positive) * len(negative), auc_interval(positive, negative)))
    if sum(pairs for pairs, _ in parts) < FEW * FEW:
        return None
    whole = sum(pairs for pairs, _ in parts)
    value = sum(pairs * part.value for pairs, part in parts) / whole
    spread = [(pairs * (part.high - part.low) / 2) ** 2 for pairs, part in parts]
    wide = float(sum(spread)) ** 0.5 / whole
    return Measure(
        value=value,
        low=max(0.0, value - wide),
        high=min(1.0, value + wide),
        null=None if null is None else null.value,
    )


def _measures(results: Sequence[dict[str, Measure]], *, seed: int) -> dict[str, Measure]:
    """Means over updates with the bootstrap over them; of one update its own intervals."""
    if len(results) == 1:
        return results[0]
    names = dict.fromkeys(name for result in results for name in result)
    found = {}
    for name in names:
        parts = [result[name] for result in results if name in result]
        nulls = [part.null for part in parts if part.null is not None]
        null = sum(nulls) / len(nulls) if nulls else None
        measure = mean_interval([part.value for part in parts], seed=seed, null=null)
        found[name] = measure if len(parts) > 1 else replace(parts[0], null=null)
    return found


def _control(bench: _Bench, seen: Sighting, truth: Truth) -> float:
    """The same attack on an exchange of one site on these records, with the defence off.

    Records are taken until half of the rows are used, so that there are rows to tell apart.
    """
    how = _recipe(seen, truth).open()
    seen = replace(seen, change=dict(seen.before))  # every tensor is sent
    records: list[Ids] = []
    for record in truth[(seen.round, seen.who)]:
        if _present([*records, record], bench.rows).mean() > 0.5 and records:
            break
        records.append(record)
    how = replace(how, steps=min(how.steps, max(1, -(-len(records) // how.batch))))
    net, _, _ = _taught(bench, seen, how, 1)
    made = shadow.shadow(
        bench.known.foundation, seen.before, how, [records], seed=bench.known.seed + 7919
    )
    there = _present(made.used, bench.rows)
    scores = _scored(net, _described(bench, seen, made.change))
    return auc(scores[there].tolist(), scores[~there].tolist())


def _recipe(seen: Sighting, truth: Truth) -> Recipe:
    """How many records a site holds is taken to be public."""
    distinct = len(set(truth[(seen.round, seen.who)]))
    return shadow.recipe(seen, held=max(1, distinct // max(seen.sites, 1)))


def _fair(bench: _Bench, records: Sequences) -> bool:
    there = _present(records, bench.rows)
    return min(int(there.sum()), int((~there).sum())) >= FEW


def _present(records: Sequence[Ids], rows: int) -> Rows:
    return _counts(records, rows) > 0


def _counts(records: Sequence[Ids], rows: int) -> NDArray[np.int64]:
    counted = Counter(token for record in records for token in record)
    found = np.zeros(rows, dtype=np.int64)
    for token, number in counted.items():
        found[token] = number
    return found


def _notes(bench: _Bench, fair: Sequence[Sighting], seen: int) -> str:
    parts = []
    if len(fair) < seen:
        parts.append(f"{seen - len(fair)} changes used nearly all tokens, or none")
    if bench.table in shadow.still(fair[0].before, fair[0].change):
        parts.append("the embedding stayed; rows were read through the other matrices")
    return "; ".join(parts)
