"""How an attack that claims sequences is tried: on every sighting, with both its controls.

The positive control is the same attack on plain gradients of single true sequences, short enough
for it to work. The null is the better of two: what was got from one update scored against the truth
of another, and the attack on random words of the same shape scored against the truth.
"""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import torch

from fedkola.audit import scoring
from fedkola.audit.evidence import (
    Control,
    Evidence,
    Example,
    Known,
    Measure,
    Sequences,
    Sighting,
    Truth,
)
from fedkola.audit.intervals import mean_interval, rate_interval
from fedkola.errors import DataError
from fedkola.training.model import Foundation, encode
from fedkola.training.whole import gradient
from fedkola.types import Spec

_NULLS = 3
_EXAMPLES = 3


@dataclass(frozen=True, slots=True, kw_only=True)
class Recovery:
    """What an attack claims of one update: sequences, likeliest first, and tokens that were used
    beside theirs."""

    sequences: Sequences
    bag: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Floor:
    """What the positive control must reach, on how many updates, of at most ``share`` d tokens."""

    metric: str
    floor: float
    updates: int
    share: float = 0.5


Recover = Callable[[Sighting], Recovery]


def tried(
    name: str,
    seen: Sequence[Sighting],
    known: Known,
    truth: Truth,
    recover: Recover,
    *,
    began: float,
    control: Floor,
    settings: Spec,
    metrics: Sequence[str] = scoring.METRICS,
    notes: str = "",
) -> Evidence:
    """The evidence of one attack over all sightings. Raises DataError for none to try."""
    targets = [s for s in seen if truth.get((s.round, s.who))]
    if not targets:
        raise DataError(
            f"attack {name} was given {len(seen)} changes and the truth of none of them; give the "
            "token ids behind at least one"
        )
    truths = [truth[(s.round, s.who)] for s in targets]
    got = [recover(s) for s in targets]
    rows = [scored(g, t) for g, t in zip(got, truths, strict=True)]
    nulls = null(targets, truths, got, recover, seed=known.seed)
    return Evidence(
        attack=name,
        target="single" if all(s.sites == 1 for s in targets) else "sum",
        updates=len(targets),
        measures=measured(rows, truths, nulls, metrics),
        control=controlled(control, targets[0], known, truths, recover),
        seconds=time.perf_counter() - began,
        examples=tuple(examples(known.foundation, got, truths)),
        notes=notes or _size(known.foundation, truths),
        settings=settings,
    )


def scored(got: Recovery, truth: Sequences) -> dict[str, float]:
    return scoring.scores(got.sequences, truth, bag=got.bag)


def measured(
    rows: Sequence[Mapping[str, float]],
    truths: Sequence[Sequences],
    nulls: Mapping[str, float],
    metrics: Sequence[str],
) -> dict[str, Measure]:
    """Means over updates, bootstrapped; whole sequences are counted and get an exact interval."""
    found = {key: mean_interval([row[key] for row in rows], null=nulls.get(key)) for key in metrics}
    if "exact" in found:
        hits = sum(round(row["exact"] * len(t)) for row, t in zip(rows, truths, strict=True))
        found["exact"] = rate_interval(hits, sum(map(len, truths)), null=nulls.get("exact"))
    return found


def null(
    targets: Sequence[Sighting],
    truths: Sequence[Sequences],
    got: Sequence[Recovery],
    recover: Recover,
    *,
    seed: int,
) -> dict[str, float]:
    """The mean score without any information: the better of the two nulls, metric by metric."""
    others = [
        scored(g, truths[(i + 1) % len(truths)])
        for i, g in enumerate(got)
        if truths[(i + 1) % len(truths)] != truths[i]
    ]
    random = [
        scored(recover(noise(s, seed + i)), t)
        for i, (s, t) in enumerate(zip(targets[:_NULLS], truths, strict=False))
    ]
    means = [scoring.mean(rows) for rows in (others, random) if rows]
    return {key: max(row[key] for row in means) for key in means[0]}


def noise(sighting: Sighting, seed: int) -> Sighting:
    """The sighting with random words of the same shape and size in place of its change."""
    generator = torch.Generator().manual_seed(seed)
    change = {
        name: torch.randn(tensor.shape, generator=generator) * float(tensor.float().std() + 1e-12)
        for name, tensor in sorted(sighting.change.items())
    }
    return replace(sighting, change=change)


def controlled(
    control: Floor, like: Sighting, known: Known, truths: Sequence[Sequences], recover: Recover
) -> Control:
    """The attack on plain gradients of single true sequences: what it must be able to do."""
    rows = []
    for sequence in _short(known, truths, control):
        plain = replace(
            like,
            who="control",
            sites=1,
            change=gradient(known.foundation, like.before, [sequence]),
            protocol={"name": "gradient", "batch": 1, "inner_steps": 1},
        )
        rows.append(scored(recover(plain), (sequence,)))
    return Control(
        metric=control.metric, value=scoring.mean(rows)[control.metric], floor=control.floor
    )


def sequences(protocol: Spec, sites: int) -> int | None:
    """How many sequences stand behind a change, where the protocol tells: batch x steps x sites."""
    batch, steps = protocol.get("batch"), protocol.get("inner_steps", 1)
    if not isinstance(batch, int) or not isinstance(steps, int):
        return None
    return batch * steps * sites


def examples(
    foundation: Foundation, got: Sequence[Recovery], truths: Sequence[Sequences]
) -> Iterator[Example]:
    """The first true sequences as text, and the hypothesis nearest to each."""
    decode = foundation.tokenizer.decode  # type: ignore[attr-defined]
    for recovery, truth in list(zip(got, truths, strict=True))[:_EXAMPLES]:
        nearest = max(
            recovery.sequences, key=lambda row: scoring.overlap(row, truth[0]), default=()
        )
        yield Example(truth=str(decode(list(truth[0]))), got=str(decode(list(nearest))))


# --- private --------------------------------------------------------------------------------------


def _short(known: Known, truths: Sequence[Sequences], control: Floor) -> list[tuple[int, ...]]:
    """True sequences, or public ones without a truth, cut below the share of the width."""
    most = max(2, int(control.share * known.foundation.width) - 1)
    rows = [row for truth in truths for row in truth if len(row) > 2]
    rows += [tuple(row) for row in encode(known.foundation, known.texts[: control.updates])]
    if not rows:
        raise DataError(
            "no sequence of three tokens and more is there for the positive control; give texts"
        )
    return [tuple(row[:most]) for row in dict.fromkeys(rows)][: control.updates]


def _size(foundation: Foundation, truths: Sequence[Sequences]) -> str:
    counts = [sum(map(len, truth)) for truth in truths]
    return f"{min(counts)} to {max(counts)} tokens an update, width {foundation.width}"
