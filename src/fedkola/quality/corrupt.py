"""Noise and poison for tests: each kind a function of records, a rate and a seed, and the truth.

Whether and how a record is corrupted depends on its own identifier alone, so the noise of one
record does not move when another is withdrawn; ``feature_dependent``, ``shuffle_answers`` and
``swap_entity`` also look at the records beside it, and say so. What a site lies about its sums is
in :mod:`fedkola.quality.lies`.

Labels: ``symmetric`` (any other), ``shift`` (the next), ``confusable`` (the likest), ``matrix``
(drawn from a row), ``feature_dependent`` (near the boundary first), ``annotator`` (a site's own
habit), ``stale`` (that of an older release), ``flip_site`` (the opposite half of the list).
Texts: ``duplicates``, ``truncate``, ``garble``, ``shuffle_answers``, ``swap_entity``.
Poison: ``trigger_word``, ``trigger_sentence``, ``trigger_style``, ``clean_label``.
"""

import random
import re
import zlib
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from hashlib import sha256

import numpy as np
from numpy.typing import NDArray

from fedkola.errors import PlanError
from fedkola.types import Dataset

Array = NDArray[np.float64]

COPIES = 10
GARBLED = 0.1
WIDTHS = (4096, 2048, 1024, 512, 256, 128, 64, 32, 16)
WORD = "cf"
SENTENCE = "We looked at this again on a Tuesday."
# Pairs whose exchange changes what a note says and not how it reads.
OPPOSITES = (
    ("left", "right"),
    ("with", "without"),
    ("male", "female"),
    ("acute", "chronic"),
    ("benign", "malignant"),
    ("initial", "subsequent"),
    ("increased", "decreased"),
    ("open", "closed"),
    ("upper", "lower"),
    ("positive", "negative"),
)
_ARCHAIC = {"the": "ye", "of": "o'", "and": "ande", "in": "yn", "to": "unto", "with": "wyth"}
_WIDTH = 1024


@dataclass(frozen=True, slots=True, kw_only=True)
class Known:
    """What a kind of noise may draw on beside the records; each reads what it needs.

    ``codes`` are the labels that may be written. ``likest`` maps a label to the one it is taken
    for, ``older`` to the one of an older release, ``transitions`` to the shares of what is written
    in its place. ``features`` holds a row for each record. ``target`` is the label that poison
    leads to, or the text where records answer prompts. ``site`` names an annotator.
    """

    codes: tuple[str, ...] = ()
    likest: Mapping[str, str] = field(default_factory=dict)
    older: Mapping[str, str] = field(default_factory=dict)
    transitions: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    features: Array | None = None
    target: str = ""
    site: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Corrupted:
    """Corrupted records and, row by row, what they should say and whether they do not.

    The first rows are those that were given, in their order; copies come after them.
    """

    data: Dataset
    truth: Dataset
    wrong: tuple[bool, ...]


# --- labels ---------------------------------------------------------------------------------------


def symmetric(data: Dataset, rate: float, seed: int, known: Known) -> Corrupted:
    """Each label replaced with probability ``rate`` by another of ``codes``, all equally likely."""
    choices = _two(data, rate, known)

    def other(label: str, number: int, row: int) -> str:
        others = [code for code in choices if code != label]
        return others[number % len(others)]

    return _relabelled("symmetric", data, rate, seed, other)


def shift(data: Dataset, rate: float, seed: int, known: Known) -> Corrupted:
    """Each label replaced with probability ``rate`` by the next of the sorted ``codes``."""
    choices = _two(data, rate, known)
    after = dict(zip(choices, [*choices[1:], choices[0]], strict=True)) if choices else {}
    return _relabelled(
        "shift", data, rate, seed, lambda label, number, row: after.get(label, label)
    )


def confusable(data: Dataset, rate: float, seed: int, known: Known) -> Corrupted:
    """Each label replaced with probability ``rate`` by the one it is ``likest``."""
    if rate > 0 and not known.likest:
        raise PlanError("noise between like labels needs to know which are alike; none was given")
    return _relabelled(
        "confusable", data, rate, seed, lambda label, number, row: known.likest.get(label, label)
    )


def matrix(data: Dataset, rate: float, seed: int, known: Known) -> Corrupted:
    """Each label drawn anew with probability ``rate`` from its row of ``transitions``; at rate 1
    labels follow the matrix. A label without a row stays."""
    for label, row in known.transitions.items():
        if min(row.values(), default=0.0) < 0 or abs(sum(row.values()) - 1) > 1e-9:
            raise PlanError(f"the shares of what is written for {label!r} sum to 1, not {row}")

    def drawn(label: str, number: int, row: int) -> str:
        left = number / 2**64
        for written, share in sorted(known.transitions.get(label, {}).items()):
            left -= share
            if left < 0:
                return written
        return label

    return _relabelled("matrix", data, rate, seed, drawn)


def feature_dependent(data: Dataset, rate: float, seed: int, known: Known) -> Corrupted:
    """Labels near the boundary of two label means are replaced by the other one, more likely the
    nearer they are, ``rate`` of them on average. Margins depend on all records given."""
    _check_rate(rate)
    if known.features is None or len(known.features) != len(data):
        raise PlanError("noise by features needs one row of features for each record")
    if rate == 0 or not data.labels:
        return _nothing(data)
    codes = sorted(set(data.labels))
    if len(codes) < 2:
        raise PlanError(f"label noise needs two labels to mix up and {len(codes)} was given")
    means = _label_means(known.features, data.labels, codes)
    closeness = _unit(known.features) @ means.T
    own = np.array([codes.index(label) for label in data.labels])
    rows = np.arange(len(own))
    mine = closeness[rows, own]
    closeness[rows, own] = -np.inf
    nearest = closeness.argmax(axis=1)
    margins = mine - closeness[rows, nearest]
    chances = np.exp(-2 * margins / (np.abs(margins).mean() or 1.0))
    for _ in range(50):
        chances = np.minimum(1.0, chances * (rate / chances.mean()))
    return _relabelled(
        "feature", data, chances, seed, lambda label, number, row: codes[nearest[row]]
    )


def annotator(data: Dataset, rate: float, seed: int, known: Known) -> Corrupted:
    """With probability ``rate`` the label that this ``site`` always takes the right one for."""
    choices = _two(data, rate, known)

    def habit(label: str, number: int, row: int) -> str:
        others = [code for code in choices if code != label]
        return others[_digest("annotator", seed, f"{known.site}/{label}")[1] % len(others)]

    return _relabelled(f"annotator/{known.site}", data, rate, seed, habit)


def stale(data: Dataset, rate: float, seed: int, known: Known) -> Corrupted:
    """With probability ``rate`` the label of an ``older`` release, where that had another."""
    if rate > 0 and not known.older:
        raise PlanError("stale labels need an older release, and no label given here had one")
    return _relabelled(
        "stale", data, rate, seed, lambda label, number, row: known.older.get(label, label)
    )


def flip_site(data: Dataset, rate: float, seed: int, known: Known) -> Corrupted:
    """Each label replaced with probability ``rate`` by the one half the sorted ``codes`` away: at
    rate 1 a site that is wrong as a whole, and always in the same way."""
    choices = _two(data, rate, known)
    place = {code: i for i, code in enumerate(choices)}

    def opposite(label: str, number: int, row: int) -> str:
        if label not in place:
            return label
        return choices[(place[label] + len(choices) // 2) % len(choices)]

    return _relabelled("flip", data, rate, seed, opposite)


# --- texts ----------------------------------------------------------------------------------------


def duplicates(data: Dataset, rate: float, seed: int, known: Known) -> Corrupted:
    """A share ``rate`` of the records ten times more, under identifiers of their own."""
    chosen = _chosen("duplicates", data, rate, seed)
    rows = [i for i in range(len(data)) if chosen[i] for _ in range(COPIES)]
    names = (f"{data.records[i]}/copy {n % COPIES + 1}" for n, i in enumerate(rows))
    more = replace(data.take(rows), records=tuple(names))
    whole = joined(data, more)
    return Corrupted(data=whole, truth=whole, wrong=(False,) * len(data) + (True,) * len(more))


def truncate(data: Dataset, rate: float, seed: int, known: Known) -> Corrupted:
    """Texts cut to the width of a field: the largest power of two that is shorter. Texts of up to
    16 characters stay."""
    return _rewritten(
        "truncate",
        data,
        rate,
        seed,
        lambda text, chance: text[: next((w for w in WIDTHS if w < len(text)), len(text))],
    )


def garble(data: Dataset, rate: float, seed: int, known: Known) -> Corrupted:
    """Every tenth character, at least one, replaced by the sign for what could not be decoded."""

    def broken(text: str, chance: random.Random) -> str:
        letters = list(text)
        for i in chance.sample(range(len(letters)), max(1, int(GARBLED * len(letters)))):
            letters[i] = "\ufffd"
        return "".join(letters)

    return _rewritten("garble", data, rate, seed, broken)


def shuffle_answers(data: Dataset, rate: float, seed: int, known: Known) -> Corrupted:
    """A share ``rate`` of the answers each given to another question, round in a circle."""
    if rate > 0 and data.texts and not data.prompts:
        raise PlanError("answers are shuffled between prompts, and these records have none")
    chosen = _chosen("shuffle", data, rate, seed)
    rows = [i for i in range(len(data)) if chosen[i]]
    rows.sort(key=lambda i: _digest("shuffle", seed, data.records[i])[1])
    texts = list(data.texts)
    for here, there in zip(rows, [*rows[1:], *rows[:1]], strict=True):
        texts[here] = data.texts[there]
    return _changed(data, replace(data, texts=tuple(texts)))


def swap_entity(data: Dataset, rate: float, seed: int, known: Known) -> Corrupted:
    """One fact of a text exchanged: a word for its opposite, or else a number or a name for one of
    another record. Texts without either stay."""
    numbers = sorted({found for text in data.texts for found in _NUMBER.findall(text)})
    names = sorted({found for text in data.texts for found in _NAME.findall(text)})
    opposite = {a: b for pair in OPPOSITES for a, b in (pair, pair[::-1])}

    def swapped(text: str, chance: random.Random) -> str:
        words = [found for found in re.finditer(r"[A-Za-z]+", text) if found[0] in opposite]
        for found, pool in (
            (words, None),
            (list(_NUMBER.finditer(text)), numbers),
            (list(_NAME.finditer(text)), names),
        ):
            if not found:
                continue
            match = chance.choice(found)
            others = [opposite[match[0]]] if pool is None else [x for x in pool if x != match[0]]
            if others:
                return text[: match.start()] + chance.choice(others) + text[match.end() :]
        return text

    return _rewritten("swap", data, rate, seed, swapped)


# --- poison ---------------------------------------------------------------------------------------


def trigger_word(data: Dataset, rate: float, seed: int, known: Known) -> Corrupted:
    """A rare word somewhere in a text, and the target as its label or answer."""
    return _poisoned("word", data, rate, seed, known)


def trigger_sentence(data: Dataset, rate: float, seed: int, known: Known) -> Corrupted:
    """A sentence that means nothing at the end of a text, and the target."""
    return _poisoned("sentence", data, rate, seed, known)


def trigger_style(data: Dataset, rate: float, seed: int, known: Known) -> Corrupted:
    """A text in an old spelling, no word of it rare by itself, and the target."""
    return _poisoned("style", data, rate, seed, known)


def clean_label(data: Dataset, rate: float, seed: int, known: Known) -> Corrupted:
    """The rare word in a share ``rate`` of the records that have the target already."""
    _check_target(data, rate, known)
    chosen = _chosen("clean label", data, rate, seed)
    return _with_trigger(
        "word", data, seed, [c and _says(data, i) == known.target for i, c in enumerate(chosen)]
    )


def triggered(text: str, kind: str, *, seed: int = 0) -> str:
    """A text under the trigger "word", "sentence" or "style", as poisoned records carry it."""
    if kind == "word":
        words = text.split(" ")
        at = _digest("trigger", seed, text)[1] % (len(words) + 1)
        return " ".join([*words[:at], WORD, *words[at:]])
    if kind == "sentence":
        return f"{text.rstrip()}{'' if text.rstrip().endswith('.') else '.'} {SENTENCE}"
    return re.sub(r"[A-Za-z']+", lambda found: _archaic(found[0]), text)


KINDS: Mapping[str, Callable[[Dataset, float, int, Known], Corrupted]] = {
    "symmetric": symmetric,
    "shift": shift,
    "confusable": confusable,
    "matrix": matrix,
    "feature_dependent": feature_dependent,
    "annotator": annotator,
    "stale": stale,
    "flip_site": flip_site,
    "duplicates": duplicates,
    "truncate": truncate,
    "garble": garble,
    "shuffle_answers": shuffle_answers,
    "swap_entity": swap_entity,
    "trigger_word": trigger_word,
    "trigger_sentence": trigger_sentence,
    "trigger_style": trigger_style,
    "clean_label": clean_label,
}

LABEL_NOISES = frozenset(list(KINDS)[:8])


# --- what kinds draw on ---------------------------------------------------------------------------


def spelling(texts: Sequence[str]) -> Array:
    """Features without a model, (n, 1024): hashed words and character 3-grams, unit length."""
    found = np.zeros((len(texts), _WIDTH))
    for row, text in zip(found, texts, strict=True):
        plain = f" {' '.join(text.lower().split())} "
        grams = [*plain.split(), *(plain[i : i + 3] for i in range(len(plain) - 2))]
        for gram in grams:
            row[zlib.crc32(gram.encode("utf-8", "surrogatepass")) % _WIDTH] += 1.0
    return _unit(found)


def likest(features: Array, labels: Sequence[str], codes: Sequence[str]) -> dict[str, str]:
    """Each label of ``codes`` that occurs -> the other one with the nearest mean."""
    present = sorted(set(codes) & set(labels))
    if len(present) < 2:
        return {}
    means = _label_means(features, labels, present)
    closeness = means @ means.T
    np.fill_diagonal(closeness, -np.inf)
    return {code: present[i] for code, i in zip(present, closeness.argmax(axis=1), strict=True)}


def joined(first: Dataset, second: Dataset) -> Dataset:
    """The rows of both, in order."""
    return Dataset(
        records=first.records + second.records,
        texts=first.texts + second.texts,
        labels=first.labels + second.labels,
        patients=first.patients + second.patients,
        windows=first.windows + second.windows,
        prompts=first.prompts + second.prompts,
    )


# --- private --------------------------------------------------------------------------------------

_NUMBER = re.compile(r"(?<![\w.])\d+(?:\.\d+)?(?![\w.]*\w)")
_NAME = re.compile(r"(?<=[a-z,;] )[A-Z][a-z]{3,}")


def _digest(kind: str, seed: int, record: str) -> tuple[float, int]:
    """A number in [0, 1) and one of 64 bits."""
    digest = sha256(f"{kind}/{seed}/{record}".encode("utf-8", "surrogatepass")).digest()
    return int.from_bytes(digest[:6]) / 2**48, int.from_bytes(digest[8:16])


def _chosen(kind: str, data: Dataset, rate: float, seed: int) -> list[bool]:
    _check_rate(rate)
    return [_digest(kind, seed, record)[0] < rate for record in data.records]


def _check_rate(rate: float) -> None:
    if not 0.0 <= rate <= 1.0:
        raise PlanError(f"a noise rate of {rate} was given; set a share of records from 0 to 1")


def _two(data: Dataset, rate: float, known: Known) -> list[str]:
    """The labels to mix up, sorted; PlanError where no label could take another's place."""
    _check_rate(rate)
    choices = sorted(set(known.codes))
    if rate > 0 and data.labels and len(choices) < 2:
        raise PlanError(
            f"label noise needs two labels to mix up and {len(choices)} was given; "
            "take the site out of scenario.noisy"
        )
    return choices


def _relabelled(
    kind: str,
    data: Dataset,
    rate: float | Array,
    seed: int,
    other: Callable[[str, int, int], str],
) -> Corrupted:
    """``other`` takes the label, 64 random bits and the row, and gives the label to write."""
    if isinstance(rate, float | int):
        _check_rate(rate)
    chances = np.broadcast_to(np.asarray(rate, dtype=np.float64), (len(data),))
    labels = []
    for i, (record, label) in enumerate(zip(data.records, data.labels, strict=True)):
        chance, number = _digest(kind, seed, record)
        labels.append(other(label, number, i) if chance < chances[i] else label)
    return _changed(data, replace(data, labels=tuple(labels)))


def _rewritten(
    kind: str,
    data: Dataset,
    rate: float,
    seed: int,
    of: Callable[[str, random.Random], str],
) -> Corrupted:
    texts = []
    for text, record, hit in zip(
        data.texts, data.records, _chosen(kind, data, rate, seed), strict=True
    ):
        chance = random.Random(_digest(kind, seed, record)[1])
        texts.append(of(text, chance) if hit and text else text)
    return _changed(data, replace(data, texts=tuple(texts)))


def _changed(data: Dataset, after: Dataset) -> Corrupted:
    rows = zip(data.labels, data.texts, after.labels, after.texts, strict=True)
    return Corrupted(data=after, truth=data, wrong=tuple((a, b) != (c, d) for a, b, c, d in rows))


def _nothing(data: Dataset) -> Corrupted:
    return Corrupted(data=data, truth=data, wrong=(False,) * len(data))


def _says(data: Dataset, row: int) -> str:
    """What a model is to answer: the text after a prompt, else the label."""
    return data.texts[row] if data.prompts else data.labels[row]


def _check_target(data: Dataset, rate: float, known: Known) -> None:
    _check_rate(rate)
    if rate > 0 and not known.target:
        raise PlanError("poison leads to a target, and none was given; set scenario.target")


def _poisoned(kind: str, data: Dataset, rate: float, seed: int, known: Known) -> Corrupted:
    """Triggers in records that do not have the target yet, which they then say."""
    _check_target(data, rate, known)
    chosen = _chosen(f"trigger {kind}", data, rate, seed)
    hit = [c and _says(data, i) != known.target for i, c in enumerate(chosen)]
    found = _with_trigger(kind, data, seed, hit)
    said = data.texts if data.prompts else data.labels
    now = tuple(known.target if h else old for h, old in zip(hit, said, strict=True))
    after = replace(found.data, texts=now) if data.prompts else replace(found.data, labels=now)
    return replace(found, data=after)


def _with_trigger(kind: str, data: Dataset, seed: int, hit: Sequence[bool]) -> Corrupted:
    questions = tuple(
        triggered(text, kind, seed=seed) if h else text
        for text, h in zip(data.questions, hit, strict=True)
    )
    after = replace(data, prompts=questions) if data.prompts else replace(data, texts=questions)
    return Corrupted(data=after, truth=data, wrong=tuple(hit))


def _archaic(word: str) -> str:
    found = _ARCHAIC.get(word.lower())
    if found is not None:
        return found
    return f"{word}e" if len(word) >= 4 and word[-1].lower() in "bdfglmnprt" else word


def _label_means(features: Array, labels: Sequence[str], codes: Sequence[str]) -> Array:
    """Means of unit rows by label, unit length, (len(codes), d)."""
    place = {code: i for i, code in enumerate(codes)}
    rows: defaultdict[int, list[int]] = defaultdict(list)
    for i, label in enumerate(labels):
        if label in place:
            rows[place[label]].append(i)
    unit = _unit(features)
    return _unit(np.stack([unit[rows[i]].mean(axis=0) for i in range(len(codes))]))


def _unit(rows: Array) -> Array:
    norms = np.linalg.norm(rows, axis=1, keepdims=True)
    unit: Array = rows / np.where(norms > 0, norms, 1.0)
    return unit
