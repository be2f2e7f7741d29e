"""A8, transcript checks: what the masked bytes themselves must never show.

Under MaskedSum v1 every masked word is uniform and every other field is a function of plan, roster
and keys. Each check counts what breaks that:

- ``uniform``: bytes of a masked section that are not uniform (chi-square over 256 values);
- ``related``: masked words of two sites, or of one site in two exchanges, that correlate, or whose
  difference is not uniform, as when a stream is used twice;
- ``repeated``: two masked answers of one site under one exchange number that differ;
- ``fields``: a field, a length or a shape that differs between the sites of one exchange;
- ``clear``: a tensor or a header field of an answer that no masked answer has;
- ``folded``: a section that a search over folded seeds opens (flwr 1.41 folds its keys by XOR to 32
  bits for MT19937); 2^16 seeds are searched here.

A p-value below 1e-9 per look counts, so that a sound run of thousands of messages passes. The
positive control plants each fault in words of the same shape and must find all; the null is the
same checks on words that are uniform by construction.
"""

import itertools
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray
from scipy.special import chdtrc, ndtr

from fedkola import wire
from fedkola.audit.evidence import Control, Evidence, Measure
from fedkola.audit.view import View
from fedkola.errors import DataError
from fedkola.privacy import frames, masks
from fedkola.privacy.member import ASK

CHECKS = ("uniform", "related", "repeated", "fields", "clear", "folded")
RARE = 1e-9
SEEDS = 1 << 16
_HEADER = frozenset({"client", "question", "refused", "word", "kind"})
_PARTS = frozenset({"frame", "payload", "side"})
# A search looks at so many words: the chance that uniform ones pass is 2^-64 and less a seed.
_WORDS = 32
LOOKED = 2
"""Answers that the search for a folded seed looks at."""

Bytes = NDArray[np.uint8]


@dataclass(frozen=True, slots=True, kw_only=True)
class Masked:
    """One masked answer as it travelled: site, exchange, size of a word, how many bits an addend
    may fill, and its two sections as bytes."""

    site: str
    exchange: int
    word: int
    bits: int
    shapes: frames.Shapes
    payload: Bytes
    side: Bytes
    fields: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Checks:
    """Checks of every masked answer whose payload was kept; at most ``most`` pairs are compared."""

    name: ClassVar[str] = "checks"
    targets: ClassVar[tuple[str, ...]] = ("transcript",)
    most: int = 400
    seeds: int = SEEDS

    def examine(self, seen: View, *, seed: int = 0) -> Evidence:
        """Raises DataError if the run was plain, or if no masked payload was kept."""
        began = time.perf_counter()
        answers = list(masked_answers(seen))
        if not answers:
            raise DataError(
                "no masked answer was recorded: the run was plain, or audit.rounds kept none; "
                "there are no masks to check"
            )
        counted = self.count(answers)
        looks = max(len(answers), 1)
        control = self.control(answers, seed=seed)
        return Evidence(
            attack=self.name,
            target="transcript",
            updates=looks,
            measures={
                name: Measure(value=float(found), low=float(found), high=float(found), null=0.0)
                for name, found in {"violations": sum(counted.values()), **counted}.items()
            },
            control=Control(metric="faults found", value=control, floor=1.0),
            seconds=time.perf_counter() - began,
            notes=f"{looks} masked answers, {sum(a.payload.nbytes for a in answers)} bytes",
            settings={"seeds": self.seeds, "p": RARE},
        )

    def count(self, answers: Sequence[Masked], only: Sequence[str] = CHECKS) -> dict[str, int]:
        """Violations of each check."""
        ways: Mapping[str, Callable[[], int]] = {
            "uniform": lambda: sum(
                _odd(part) for answer in answers for part in (answer.payload, answer.side)
            ),
            "related": lambda: sum(itertools.islice(_related(answers), self.most)),
            "repeated": lambda: _repeated(answers),
            "fields": lambda: _unequal(answers),
            "clear": lambda: sum(bool(answer.fields) for answer in answers),
            "folded": lambda: sum(
                search(answer, seeds=self.seeds) is not None for answer in answers[:LOOKED]
            ),
        }
        return {name: ways[name]() for name in only}

    def control(self, answers: Sequence[Masked], *, seed: int = 0) -> float:
        """The share of planted faults that are found; one false alarm on uniform words is 0."""
        sound = _like(answers[0], seed=seed)
        if any(self.count(sound).values()):
            return 0.0
        first, second, *_ = sound
        payload = _addend(first, seed=seed)
        faults = {
            "uniform": [_with(first, payload)],
            "related": [first, _with(second, _added(first.payload, payload, first.word))],
            "repeated": [first, _with(second, site=first.site, exchange=first.exchange)],
            "fields": [first, _with(second, second.payload[: -first.word // 8])],
            "clear": [_with(first, fields=("loss",))],
            "folded": [_with(first, _added(payload, folded(self.seeds // 3, first), first.word))],
        }
        found = [self.count(planted, (name,))[name] > 0 for name, planted in faults.items()]
        return sum(found) / len(found)


def masked_answers(seen: View) -> Iterator[Masked]:
    """Every masked answer in what an observer saw, of rounds whose payloads were kept."""
    grids: dict[str, tuple[int, int]] = {}
    for frame in seen.frames:
        if frame.step != ASK or not seen.recording.holds(frame) or frame.refused:
            continue
        content = seen.recording.payload(frame)
        if frame.direction == "down":
            if frame.question not in grids:
                question = wire.unpack_broadcast(content).tensors["question"]
                grid = wire.unpack_broadcast(question.numpy().tobytes()).grid
                grids[frame.question] = (grid.word, grid.bits)
            continue
        reply = wire.unpack_reply(content)
        word, bits = grids.get(frame.question, (0, 0))
        if not word or not set(reply.words) >= _PARTS:
            continue
        exchange, _, shapes = frames.unpack_answer(reply.words["frame"].numpy().tobytes())
        stray = (set(reply.words) - _PARTS) | (set(wire.headline(content)) - _HEADER)
        yield Masked(
            site=frame.peer,
            exchange=exchange,
            word=word,
            bits=bits,
            shapes=shapes,
            payload=reply.words["payload"].numpy().reshape(-1),
            side=reply.words["side"].numpy().reshape(-1),
            fields=tuple(sorted(stray)),
        )


def distinguished(first: Sequence[Masked], second: Sequence[Masked]) -> tuple[list[float], ...]:
    """Scores of a classifier of two runs of equal plan and other data, for each run's blocks.

    It learns the mean byte histogram of either run from every second answer. The others are cut
    into blocks of 64 bytes, each scored by how much nearer it lies to the first run's histogram.
    Uniform bytes give the blocks of both runs one distribution, and the classifier guesses.
    """
    runs = [[_blocks(answer.payload) for answer in run] for run in (first, second)]
    if min(map(len, runs)) < 2:
        raise DataError("each run needs two masked answers to tell them apart")
    centres = [np.concatenate(run[::2]).mean(axis=0) for run in runs]
    scores = []
    for run in runs:
        blocks = np.concatenate(run[1::2])
        near = [np.square(blocks - centre).sum(axis=1) for centre in centres]
        scores.append((near[1] - near[0]).tolist())
    return scores[0], scores[1]


def search(answer: Masked, *, seeds: int = SEEDS) -> int | None:
    """The folded seed whose stream leaves small words, added or subtracted; None if there is none.

    What an eavesdropper does to one mask whose seed was folded. It must fail on sound masks.
    """
    looked = masks.from_bytes(answer.payload[: _WORDS * answer.word // 8], answer.word)
    # An addend never fills its word: there must be room for a sum.
    room = min(answer.bits, answer.word - 2)
    if len(looked) * (answer.word - room) < 48:
        raise DataError(
            f"{len(looked)} masked words of {answer.word} bits are too few to know an addend by"
        )
    limit = 1 << (room - 1)
    streams = _streams(seeds, len(looked), answer.word)
    for left in (looked[None] - streams, looked[None] + streams):
        values = masks.signed(left, answer.word)
        small = ((values < limit) & (values > -limit)).all(axis=1)
        if small.any():
            return int(small.argmax())
    return None


def folded(seed: int, like: Masked) -> Bytes:
    """The stream of a folded seed over a whole payload: the fault that flwr 1.41 ships."""
    count = len(like.payload) * 8 // like.word
    return masks.to_bytes(_drawn(np.random.RandomState(0), seed, count, like.word), like.word)


# --- private --------------------------------------------------------------------------------------


@lru_cache(maxsize=2)
def _streams(seeds: int, count: int, word: int) -> masks.Words:
    """The first words of every folded stream: (seeds, count)."""
    state = np.random.RandomState(0)
    return np.stack([_drawn(state, seed, count, word) for seed in range(seeds)])


def _drawn(state: np.random.RandomState, seed: int, count: int, word: int) -> masks.Words:
    state.seed(seed)
    content = np.frombuffer(state.bytes(count * word // 8), dtype=np.uint8)
    return masks.from_bytes(content, word).copy()


def _odd(content: Bytes) -> bool:
    """Whether bytes are not uniform; too few of them tell nothing."""
    if len(content) < 5 * 256:
        return False
    counts = np.bincount(content, minlength=256)
    expected = len(content) / 256
    return bool(chdtrc(255, float(np.square(counts - expected).sum() / expected)) < RARE)


def _related(answers: Sequence[Masked]) -> Iterator[bool]:
    """Pairs of one exchange and pairs of one site, whether they show each other."""
    for one, other in itertools.combinations(answers, 2):
        same = one.site == other.site
        if same == (one.exchange == other.exchange) or one.word != other.word:
            continue
        left, right = (masks.from_bytes(a.payload, a.word) for a in (one, other))
        count = min(len(left), len(right))
        if count < 2:
            continue
        left, right = left[:count], right[:count]
        difference = masks.to_bytes(np.ascontiguousarray(left - right), one.word)
        yield _odd(difference) or _correlated(left, right)


def _correlated(left: masks.Words, right: masks.Words) -> bool:
    x, y = (
        values.astype(np.float64) - values.astype(np.float64).mean() for values in (left, right)
    )
    spread = float(np.sqrt(np.square(x).sum() * np.square(y).sum()))
    if not spread:
        return True
    z = abs(float((x * y).sum()) / spread) * len(left) ** 0.5
    # Of few words the correlation is not normal; a bound that is exact for none is enough there.
    return len(left) >= 64 and 2 * float(ndtr(-z)) < RARE


def _repeated(answers: Sequence[Masked]) -> int:
    first: dict[tuple[str, int], bytes] = {}
    found = 0
    for answer in answers:
        content = answer.payload.tobytes() + answer.side.tobytes()
        found += first.setdefault((answer.site, answer.exchange), content) != content
    return found


def _unequal(answers: Sequence[Masked]) -> int:
    """Exchanges whose answers differ in lengths, words, shapes or fields."""
    seen: dict[int, set[tuple[object, ...]]] = {}
    for a in answers:
        shape = (a.word, a.shapes, len(a.payload), len(a.side), a.fields)
        seen.setdefault(a.exchange, set()).add(shape)
    return sum(len(shapes) > 1 for shapes in seen.values())


def _like(answer: Masked, *, seed: int) -> list[Masked]:
    """Two answers of one exchange and one of another, uniform, large enough to judge."""
    generator = np.random.default_rng(seed)
    size = answer.word // 8
    payload = max(len(answer.payload), 16384) // size * size
    return [
        Masked(
            site=site,
            exchange=exchange,
            word=answer.word,
            bits=answer.bits,
            shapes=answer.shapes,
            payload=generator.integers(0, 256, payload, dtype=np.uint8),
            side=generator.integers(0, 256, len(answer.side), dtype=np.uint8),
        )
        for site, exchange in (("a", 1), ("b", 1), ("a", 2))
    ]


def _addend(like: Masked, *, seed: int) -> Bytes:
    """Words of an addend as training makes them: small and bell-shaped."""
    generator = np.random.default_rng(seed + 1)
    spread = 2.0 ** min(like.bits - 4, like.word - 6, 40)
    values = generator.normal(0, spread, len(like.payload) * 8 // like.word).astype(np.int64)
    return masks.to_bytes(values.astype(masks.MEMORY[like.word]), like.word)


def _added(left: Bytes, right: Bytes, word: int) -> Bytes:
    pair = [masks.from_bytes(np.ascontiguousarray(part), word) for part in (left, right)]
    return masks.to_bytes(pair[0] + pair[1], word)


def _with(
    answer: Masked,
    payload: Bytes | None = None,
    *,
    site: str = "",
    exchange: int = 0,
    fields: tuple[str, ...] = (),
) -> Masked:
    return Masked(
        site=site or answer.site,
        exchange=exchange or answer.exchange,
        word=answer.word,
        bits=answer.bits,
        shapes=answer.shapes,
        payload=answer.payload if payload is None else payload,
        side=answer.side,
        fields=fields,
    )


def _blocks(content: Bytes) -> NDArray[np.float64]:
    """Byte histograms of a payload's whole blocks, (blocks, 256); a short payload is one block."""
    size = min(64, len(content))
    rows = content[: len(content) // size * size].reshape(-1, size)
    return np.stack([np.bincount(row, minlength=256) for row in rows]) / size
