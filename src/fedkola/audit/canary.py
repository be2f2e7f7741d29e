"""A7, canaries: made-up secrets planted in the records, and what the trained model tells of them.

"Patient NAME, record DIGITS" stands 0, 1, 4, 16 and 64 times in the text (Carlini et al., The
secret sharer, USENIX Security 2019). Its exposure is 16 - log2 of the rank of its digits among
65,536 fillings by their likelihood: 16 bits for the likeliest, 1.44 on average for one that was
never read. Extraction asks the model itself: the greedy continuation, and 100 samples from the 40
likeliest tokens (Carlini et al., Extracting training data, USENIX Security 2021).

A copy is a unit of its own, as when many patients tell the same; a guarantee for one unit says
nothing of 64. So some canaries stand 64 times in the text of one patient alone ("unit_64"), which
is what such a guarantee must hide, beside those that stand once. The null is exact: digits are
drawn without regard to any model, so ranks of what was never read are uniform and exposures
exponential; it is what so many of them stay below in 95 % of cases.
"""

import math
import random
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from scipy.special import gammaincinv
from torch import Tensor

from fedkola.audit import shadow
from fedkola.audit.evidence import (
    Control,
    Evidence,
    Example,
    Known,
    Measure,
    Sighting,
    Truth,
)
from fedkola.audit.intervals import mean_interval, rate_interval
from fedkola.errors import DataError
from fedkola.training.completions import Completions, completion_nll, sample
from fedkola.training.model import Foundation, encode
from fedkola.training.whole import Ids
from fedkola.types import Weights

SHARE = 10 / 16
SAMPLES, TOP = 100, 40
MOST, KINDS = 16, 6
RARE = 0.05
FIRST = ("Anna", "Boris", "Clara", "David", "Elena", "Felix", "Greta", "Hugo", "Irene", "Jonas")
LAST = ("Adler", "Brandt", "Castro", "Dumas", "Engel", "Fischer", "Garcia", "Huber", "Ives", "Jung")


@dataclass(frozen=True, slots=True, kw_only=True)
class Canary:
    """One secret and how often it is planted; ``together`` all of it in the text of one unit."""

    name: str
    digits: str
    repeats: int
    together: bool = False

    @property
    def kind(self) -> str:
        return f"unit_{self.repeats}" if self.together else f"{self.repeats}"

    @property
    def prefix(self) -> str:
        return f"Patient {self.name}, record"

    @property
    def text(self) -> str:
        return f"{self.prefix} {self.digits}"


@dataclass(frozen=True, slots=True, kw_only=True)
class CanaryExposure:
    """``each`` canaries for every number of repeats, each copy a unit, and for those ``together``
    in one unit; and as many that are never planted.

    ``secret`` decides names and digits; plant the texts of :meth:`canaries` in the records. A
    secret has ``digits`` digits and is ranked among 2^``bits`` of them.
    """

    name: ClassVar[str] = "canary"
    targets: ClassVar[tuple[str, ...]] = ("sum", "model")
    repeats: tuple[int, ...] = (1, 4, 16, 64)
    together: tuple[int, ...] = (64,)
    each: int = 4
    secret: int = 0
    digits: int = 5
    bits: int = 16

    def quick(self) -> "CanaryExposure":
        return replace(self, each=2)

    def canaries(self) -> tuple[Canary, ...]:
        """Every canary, the ones that are never planted last."""
        counts = (*self.repeats, 0, *self.together)
        found = made(counts, self.each, digits=self.digits, seed=self.secret)
        apart, rest = len(self.repeats) * self.each, (len(self.repeats) + 1) * self.each
        whole = tuple(replace(canary, together=True) for canary in found[rest:])
        return (*found[:apart], *whole, *found[apart:rest])

    def run(self, seen: Sequence[Sighting], known: Known, truth: Truth) -> Evidence:
        """Exposure under the newest weights that can be seen: those after the last change.

        Raises DataError if no canary is among the records, or if digits have no tokens of their
        own in this tokenizer.
        """
        began = time.perf_counter()
        if not seen:
            raise DataError("no weights were seen; canaries need a change or a model to ask")
        last = max(seen, key=lambda sighting: sighting.round)
        canaries = self.canaries()
        _require_planted(known.foundation, canaries, truth)
        book = _Book.of(known.foundation, digits=self.digits, bits=self.bits)
        weights = after(last)
        bits = [exposure(known.foundation, weights, book, one, seed=known.seed) for one in canaries]
        greedy, sampled, said = [], [], []
        for one in canaries:
            answers = _asked(known.foundation, weights, book, one, seed=known.seed)
            greedy.append(answers[0] == book.ids(one.digits))
            sampled.append(book.ids(one.digits) in answers[1:])
            said.append(answers[0])
        return Evidence(
            attack=self.name,
            target="model" if not last.change else "single" if last.sites == 1 else "sum",
            updates=1,
            measures=_measures(canaries, bits, greedy, sampled, seed=known.seed),
            control=_control(self, book, last, known, truth),
            seconds=time.perf_counter() - began,
            examples=_examples(known.foundation, canaries, said),
            notes=f"interval over {self.each} canaries of each kind, one model",
            settings={"each": self.each, "fillings": 2**self.bits, "samples": SAMPLES, "top": TOP},
        )


def made(counts: Sequence[int], each: int, *, digits: int, seed: int) -> tuple[Canary, ...]:
    """``each`` canaries for every count of repeats, names and digits by the seed; the first few of
    a count do not depend on ``each``. Raises DataError for more than there are names for."""
    if each > MOST or len(counts) > KINDS:
        raise DataError(
            f"{each} canaries of {len(counts)} kinds were asked for; there are names for {MOST} of "
            f"{KINDS} kinds"
        )
    chance = random.Random(f"fedkola/canary/1/{seed}")
    names = chance.sample([f"{first} {last}" for first in FIRST for last in LAST], KINDS * MOST)
    numbers = chance.sample(range(10**digits), KINDS * MOST)
    return tuple(
        Canary(name=names[place], digits=f"{numbers[place]:0{digits}d}", repeats=count)
        for group, count in enumerate(counts)
        for place in range(group * MOST, group * MOST + each)
    )


def after(seen: Sighting) -> dict[str, Tensor]:
    """The weights after a change."""
    return {
        name: value.float() + seen.change[name].float() if name in seen.change else value.float()
        for name, value in seen.before.items()
    }


@dataclass(frozen=True, slots=True, kw_only=True)
class _Book:
    """The tokens of every filling, in the order of its number; the same after every prefix."""

    fillings: Completions
    bits: int

    @classmethod
    def of(cls, foundation: Foundation, *, digits: int, bits: int) -> "_Book":
        # The last word of every prefix is the same, so one short prefix stands for all.
        rows = encode(foundation, [f"record {number:0{digits}d}" for number in range(10**digits)])
        least, most = min(rows), max(rows)
        shared = next(
            (i for i, pair in enumerate(zip(least, most, strict=False)) if pair[0] != pair[1]), 0
        )
        fillings = {tuple(row[shared:]) for row in rows} - {()}
        if len(fillings) < len(rows):
            raise DataError(
                f"the tokenizer of {foundation.name} gives different digits the same tokens, or "
                "cuts them off; canaries need a tokenizer that knows digits and a longer text"
            )
        return cls(fillings=Completions.of([row[shared:] for row in rows]), bits=bits)

    def ids(self, digits: str) -> list[int]:
        return list(self.fillings.ids[int(digits)])

    def prefix(self, foundation: Foundation, canary: Canary) -> list[int]:
        """Tokens before the digits. Raises DataError if digits join what is before them."""
        (whole,), own = encode(foundation, [canary.text]), self.ids(canary.digits)
        if whole[-len(own) :] != own:
            raise DataError(
                f"the tokens of {canary.text!r} do not end with those of its digits; canaries need "
                "a tokenizer that splits at spaces, and a model of at least "
                f"{len(whole) + len(own)} tokens"
            )
        return whole[: -len(own)]


def exposure(
    foundation: Foundation, weights: Weights, book: _Book, canary: Canary, *, seed: int
) -> float:
    """Bits of the book less log2 of the rank of the true digits among as many, their own in it."""
    nats = completion_nll(foundation, weights, book.prefix(foundation, canary), book.fillings)
    own = int(canary.digits)
    generator = torch.Generator().manual_seed(seed * 100_003 + own)
    order = torch.randperm(len(nats), generator=generator)
    others = nats[order[order != own][: 2**book.bits - 1]]
    before = float((others < nats[own]).sum()) + 0.5 * float((others == nats[own]).sum())
    return book.bits - math.log2(1 + before)


def chance_level(count: int) -> float:
    """Bits that the mean exposure of ``count`` canaries that were never read exceeds in 5 % of
    cases."""
    return float(gammaincinv(count, 1 - RARE)) / count / math.log(2)


# --- private --------------------------------------------------------------------------------------


def _asked(
    foundation: Foundation, weights: Weights, book: _Book, canary: Canary, *, seed: int
) -> list[list[int]]:
    """The greedy continuation, then samples from the likeliest tokens."""
    prefix, length = book.prefix(foundation, canary), len(book.ids(canary.digits))
    generator = torch.Generator().manual_seed(seed)
    greedy = sample(foundation, weights, prefix, length=length)
    return greedy + sample(
        foundation, weights, prefix, length=length, count=SAMPLES, top=TOP, generator=generator
    )


def _measures(
    canaries: Sequence[Canary],
    bits: Sequence[float],
    greedy: Sequence[bool],
    sampled: Sequence[bool],
    *,
    seed: int,
) -> dict[str, Measure]:
    def of(values: Sequence[float], kind: str) -> list[float]:
        rows = zip(canaries, values, strict=True)
        return [value for canary, value in rows if canary.kind == kind]

    kinds = [kind for kind in dict.fromkeys(canary.kind for canary in canaries) if kind != "0"]
    found = {"exposure_0": mean_interval(of(bits, "0"), seed=seed)}
    for kind in kinds:
        own = of(bits, kind)
        found[f"exposure_{kind}"] = mean_interval(own, seed=seed, null=chance_level(len(own)))
    for name, values in (("greedy", greedy), ("top40", sampled)):
        for kind in kinds:
            hits, misses = of(values, kind), of(values, "0")
            found[f"{name}_{kind}"] = rate_interval(
                int(sum(hits)), len(hits), null=sum(misses) / len(misses)
            )
    return found


def _control(
    attack: CanaryExposure, book: _Book, last: Sighting, known: Known, truth: Truth
) -> Control:
    """Other canaries, most often repeated, trained in the open among as many other records."""
    foundation, most = known.foundation, max(attack.repeats)
    fresh = made([most], 2, digits=attack.digits, seed=attack.secret + 7919)
    texts = [canary.text for canary in fresh for _ in range(most)]
    others = [ids for records in truth.values() for ids in records][: len(texts)]
    records: list[Ids] = [*encode(foundation, texts), *others]
    how = shadow.recipe(replace(last, change=last.before)).open()
    local = replace(how.local, start=0, warmup=0, total=0)
    how = replace(how, steps=-(-len(records) // how.batch), warm=False, local=local)
    trained = shadow.shadow(foundation, last.before, how, [records], seed=known.seed)
    weights = {name: value + trained.change[name] for name, value in last.before.items()}
    bits = [exposure(foundation, weights, book, one, seed=known.seed) for one in fresh]
    return Control(
        metric=f"exposure_{most}", value=sum(bits) / len(bits), floor=SHARE * attack.bits
    )


def _require_planted(foundation: Foundation, canaries: Sequence[Canary], truth: Truth) -> None:
    """Raise DataError unless some canary stands in some record."""
    tokenizer: Any = foundation.tokenizer
    records = list(dict.fromkeys(record for part in truth.values() for record in part))
    texts = "\n".join(tokenizer.decode(list(record)) for record in records)
    if not any(canary.text in texts for canary in canaries if canary.repeats):
        raise DataError(
            f"none of {len(canaries)} canaries stands in the {len(records)} records; plant the "
            "texts of CanaryExposure.canaries() before the run"
        )


def _examples(
    foundation: Foundation, canaries: Sequence[Canary], said: Sequence[Sequence[int]]
) -> tuple[Example, ...]:
    """The most repeated canaries and the greedy answers to them."""
    tokenizer: Any = foundation.tokenizer
    rows = sorted(zip(canaries, said, strict=True), key=lambda row: -row[0].repeats)[:4]
    return tuple(
        Example(truth=canary.text, got=f"{canary.prefix}{tokenizer.decode(list(tokens))}")
        for canary, tokens in rows
    )
