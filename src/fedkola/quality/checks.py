"""What a site can say about its records without a model: duplicates, contradictions, form, dates.

Every check is a function of the records alone, without randomness or network, and ends in flags
with a reason code and the numbers behind it. Texts are compared normalised (NFKC, lower case,
single blanks) and never changed. A flag is a finding for the owner of a record: nothing is dropped.
"""

import re
import unicodedata
import zlib
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from hashlib import sha256
from math import inf, log

import numpy as np

from fedkola.errors import DataError
from fedkola.types import Label, Scalar

CODES: Mapping[str, str] = {
    "EXACT_DUPLICATE": "Says what a newer record says, word for word and label for label.",
    "CONTRADICTS_TWIN": "Another record has the same text and another label.",
    "NEAR_DUPLICATE": "Most of the text is that of another record.",
    "EMPTY_TARGET": "There is nothing to learn: the label or answer is missing.",
    "GARBLED": "Signs were lost, read in another encoding, or repeat or vary as text does not.",
    "TRUNCATED": "Cut at the width of a field, as other texts are.",
    "FOREIGN_TEXT": "Its letters follow each other as they do in few other texts here.",
    "BOILERPLATE": "Without its numbers it is one of many equal texts.",
    "UNKNOWN_LABEL": "The label is not in the catalogue, or was not valid at the record's date.",
    "BAD_DATE": "The date is missing, in the future, or before the site's first year.",
    "COMMON_ACROSS_SITES": "Other sites have many records like it.",
}
"""What each code means, in words for the owner."""

FATAL = frozenset({"EMPTY_TARGET", "CONTRADICTS_TWIN", "GARBLED", "UNKNOWN_LABEL", "BAD_DATE"})
"""What a record should not be learnt from with. The others are worth a look."""

# Widths at which fields of forms and databases end.
WIDTHS = frozenset(
    {16, 20, 30, 32, 40, 50, 60, 64, 80, 100, 120, 128, 140, 160, 200, 240, 250, 254, 255, 256, 280}
    | {300, 400, 500, 512, 750, 1000, 1023, 1024, 1500, 2000, 2048, 3000, 3999, 4000, 4095, 4096}
    | {5000, 8000, 8191, 8192, 10_000, 16_384, 32_000, 32_767, 32_768, 65_535, 65_536}
)
DAY = 86_400.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Records:
    """Columns of equal length. ``dates`` are seconds (None where there is none that can be read),
    or None where no column holds any; ``targets`` are labels or answers, "" where there is none,
    or None where nothing is labelled."""

    texts: tuple[str, ...]
    targets: tuple[str, ...] | None = None
    dates: tuple[float | None, ...] | None = None

    def __post_init__(self) -> None:
        for column in (self.targets, self.dates):
            if column is not None and len(column) != len(self.texts):
                raise DataError(
                    f"columns of {len(column)} and {len(self.texts)} rows; give one of each a row"
                )


@dataclass(frozen=True, slots=True, kw_only=True)
class Flag:
    """One finding about one row. ``like`` names another row that it is about, or -1."""

    row: int
    code: str
    like: int = -1
    evidence: Mapping[str, Scalar] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """Where a finding begins. Lengths are in characters, shares are of the site's records."""

    long: int = 200
    replaced: float = 0.01
    ratio: tuple[float, float] = (1.2, 6.0)
    quantile: float = 0.001
    deviations: float = 6.0
    letters: int = 20
    enough: int = 200
    same: float = 0.05
    fewest: int = 5
    cut: int = 5


def inspect(
    records: Records,
    *,
    registry: Mapping[str, Label] | None = None,
    now: float = inf,
    first: float = -inf,
    limits: Limits = Limits(),
) -> tuple[Flag, ...]:
    """All findings but near duplicates, by row and then in the order of CODES.

    ``registry`` are the labels that count, with their validity in the unit of the dates (None: all
    labels count); ``now`` and ``first`` bound the dates.
    """
    plain = [normalised(text) for text in records.texts]
    found = [
        *_duplicates(plain, records),
        *_contradictions(plain, records, registry),
        *_empty(records),
        *_garbled(records, limits),
        *_truncated(records, limits),
        *_foreign(plain, limits),
        *_boilerplate(plain, limits),
        *_unknown(records, registry),
        *_dates(records, now, first),
    ]
    order = {code: i for i, code in enumerate(CODES)}
    return tuple(sorted(found, key=lambda flag: (flag.row, order[flag.code])))


def normalised(text: str) -> str:
    """NFKC, lower case, single blanks: what is compared, never what is stored."""
    return " ".join(unicodedata.normalize("NFKC", text).lower().split())


def digest(text: str, target: str) -> bytes:
    """SHA-256 of the normalised text and target: equal for exact duplicates and nothing else."""
    both = f"{len(text)}/{text}{target}".encode("utf-8", "surrogatepass")
    return sha256(both).digest()


# --- private --------------------------------------------------------------------------------------

_MOJIBAKE = re.compile(r"[\u00c2-\u00f4][\u0080-\u00bf\u0152-\u2122]")


def _targets(records: Records) -> Sequence[str]:
    return records.targets if records.targets is not None else [""] * len(records.texts)


def _duplicates(plain: Sequence[str], records: Records) -> list[Flag]:
    """Of equal records the newest is kept, of equally new ones the last."""
    groups: defaultdict[bytes, list[int]] = defaultdict(list)
    for row, (text, target) in enumerate(zip(plain, _targets(records), strict=True)):
        groups[digest(text, normalised(target))].append(row)
    found = []
    for rows in groups.values():
        kept = max(rows, key=lambda row: (_date(records, row), row))
        found += [
            Flag(row=row, code="EXACT_DUPLICATE", like=kept, evidence={"records": len(rows)})
            for row in rows
            if row != kept
        ]
    return found


def _contradictions(
    plain: Sequence[str], records: Records, registry: Mapping[str, Label] | None
) -> list[Flag]:
    """Both sides, unless their labels were never valid at one time."""
    if records.targets is None:
        return []
    groups: defaultdict[str, list[int]] = defaultdict(list)
    for row, text in enumerate(plain):
        if records.targets[row].strip():
            groups[text].append(row)
    found = []
    for rows in groups.values():
        said = {records.targets[row] for row in rows}
        if len(said) < 2:
            continue
        for row in rows:
            others = [
                other
                for other in rows
                if normalised(records.targets[other]) != normalised(records.targets[row])
                and _overlap(records.targets[other], records.targets[row], registry)
            ]
            if others:
                evidence: dict[str, Scalar] = {
                    "says": records.targets[others[0]],
                    "against": len(others),
                }
                found.append(
                    Flag(row=row, code="CONTRADICTS_TWIN", like=others[0], evidence=evidence)
                )
    return found


def _overlap(one: str, other: str, registry: Mapping[str, Label] | None) -> bool:
    if registry is None or one not in registry or other not in registry:
        return True
    a, b = registry[one], registry[other]
    ends = [inf if label.valid_to is None else label.valid_to for label in (a, b)]
    return max(a.valid_from, b.valid_from) < min(ends)


def _empty(records: Records) -> list[Flag]:
    targets = records.targets or ()
    return [Flag(row=i, code="EMPTY_TARGET") for i, t in enumerate(targets) if not t.strip()]


def _garbled(records: Records, limits: Limits) -> list[Flag]:
    found = []
    for row, text in enumerate(records.texts):
        evidence: dict[str, Scalar] = {}
        lost = text.count("\ufffd") / max(len(text), 1)
        if lost > limits.replaced:
            evidence["lost"] = round(lost, 4)
        elif twice := _decoded_twice(text):
            evidence["reads"] = twice
        elif len(text) >= limits.long:
            raw = text.encode("utf-8", "surrogatepass")
            ratio = len(raw) / len(zlib.compress(raw, 6))
            if not limits.ratio[0] <= ratio <= limits.ratio[1]:
                evidence["ratio"] = round(ratio, 2)
        if evidence:
            found.append(Flag(row=row, code="GARBLED", evidence=evidence))
    return found


def _decoded_twice(text: str) -> str:
    """The first word of UTF-8 that was read as a Western encoding, as it should read, or ""."""
    for word in text.split():
        if _MOJIBAKE.search(word):
            for encoding in ("cp1252", "latin-1"):
                try:
                    return word.encode(encoding).decode("utf-8")
                except UnicodeError:
                    continue
    return ""


def _truncated(records: Records, limits: Limits) -> list[Flag]:
    """Texts of one round length that several share, far more than the lengths beside it, and that
    do not end a sentence."""
    texts = [text.rstrip("\n") for text in records.texts]
    lengths = Counter(len(text) for text in texts)
    cut = set()
    for width in WIDTHS & set(lengths):
        beside = sum(lengths[width + step] for step in range(-5, 6) if step) / 10
        if lengths[width] >= limits.cut * max(1.0, beside):
            cut.add(width)
    return [
        Flag(
            row=row,
            code="TRUNCATED",
            evidence={"characters": len(text), "records": lengths[len(text)]},
        )
        for row, text in enumerate(texts)
        if len(text) in cut and text.rstrip()[-1:] not in {".", "!", "?", ")", '"', "”"}
    ]


def _foreign(plain: Sequence[str], limits: Limits) -> list[Flag]:
    """Mean log-likelihood of a text's characters after two others, its own counts taken out; far
    below the others and below their lowest quantile."""
    rows = [row for row, text in enumerate(plain) if len(text) >= limits.letters]
    if len(rows) < limits.enough:
        return []
    own = [Counter(text[i : i + 3] for i in range(len(text) - 2)) for text in plain]
    three: Counter[str] = Counter()
    two: Counter[str] = Counter()
    for grams in own:
        three.update(grams)
        for gram, count in grams.items():
            two[gram[:2]] += count
    letters = len({letter for text in plain for letter in text})
    scores = np.zeros(len(rows))
    for place, row in enumerate(rows):
        mine: Counter[str] = Counter()
        for gram, count in own[row].items():
            mine[gram[:2]] += count
        summed = sum(
            count * log((three[g] - count + 0.5) / (two[g[:2]] - mine[g[:2]] + 0.5 * (letters + 1)))
            for g, count in own[row].items()
        )
        scores[place] = summed / own[row].total()
    usual = float(np.median(scores))
    spread = 1.4826 * float(np.median(np.abs(scores - usual)))
    bound = min(float(np.quantile(scores, limits.quantile)), usual - limits.deviations * spread)
    return [
        Flag(
            row=row,
            code="FOREIGN_TEXT",
            evidence={"likelihood": round(float(score), 2), "usual": round(usual, 2)},
        )
        for row, score in zip(rows, scores, strict=True)
        if score <= bound
    ]


def _boilerplate(plain: Sequence[str], limits: Limits) -> list[Flag]:
    """Different texts that are one text without their numbers."""
    groups: defaultdict[str, list[int]] = defaultdict(list)
    for row, text in enumerate(plain):
        groups[" ".join(re.sub(r"\d+", "", text).split())].append(row)
    least = max(limits.same * len(plain), limits.fewest - 1)
    return [
        Flag(row=row, code="BOILERPLATE", like=rows[0], evidence={"records": len(rows)})
        for rows in groups.values()
        if len(rows) > least and len({plain[row] for row in rows}) > 1
        for row in rows
    ]


def _unknown(records: Records, registry: Mapping[str, Label] | None) -> list[Flag]:
    if registry is None or records.targets is None:
        return []
    found = []
    for row, target in enumerate(records.targets):
        if not target.strip():
            continue
        label = registry.get(target)
        date = records.dates[row] if records.dates is not None else None
        if label is None:
            found.append(Flag(row=row, code="UNKNOWN_LABEL", evidence={"label": target}))
        elif date is not None and not (
            label.valid_from <= date < (inf if label.valid_to is None else label.valid_to)
        ):
            evidence: dict[str, Scalar] = {
                "label": target,
                "from": label.valid_from,
                "to": label.valid_to,
            }
            found.append(Flag(row=row, code="UNKNOWN_LABEL", evidence=evidence))
    return found


def _dates(records: Records, now: float, first: float) -> list[Flag]:
    found = []
    for row, date in enumerate(records.dates or ()):
        # A day of grace: the zones of a record and of this clock may differ.
        problem = (
            "missing"
            if date is None
            else "in the future"
            if date > now + DAY
            else "too early"
            if date < first
            else ""
        )
        if problem:
            found.append(Flag(row=row, code="BAD_DATE", evidence={"date": date, "is": problem}))
    return found


def _date(records: Records, row: int) -> float:
    date = records.dates[row] if records.dates is not None else None
    return -inf if date is None else date
