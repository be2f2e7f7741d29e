"""ICD-10-CM as it is revised: January 2021, April 2025, April 2026.

Source: the tabular lists inside three releases of the package simple-icd-10-cm, read straight out
of their wheels, which are pinned by hash and never installed. The hospitals are those of
:mod:`fedkola.evaluation.tasks.icd10cm`. Each release has the same number of windows. A hospital
hears of a description when its code appears; a reworded description arrives again under the
identifier of the record that it replaces, so the site revises what it holds. A code that is new in
a release is at three hospitals at least, for a notice of change goes to all who see the chapter; so
it can be known after one round. A site of ``scenario.release`` hears of it later.

``level = "code"`` has every code as a label, and only the categories that a release has changed
(some 240 of 1,918); the other levels have categories as labels, and all of them. A label that a
release drops has ``valid_to``, the first window without it, and ``replaced_by``: the codes that
took over its synonyms, else the codes with its text, else the new code with the nearest text among
those that stand nearest in the tree.

A synonym is asked under a label in the windows of the releases that have it there. Where a release
moves it to another label, the old one is ``stale``. Concepts of test records: ``moved`` (another
label was right before), ``new`` (of a code that the first release does not have), ``retired`` (of a
code that a later release drops), ``reworded`` (of a code whose description changes), ``added`` (a
new synonym of an old code), ``kept``.
"""

import zipfile
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from difflib import SequenceMatcher
from functools import cache
from hashlib import sha256
from itertools import pairwise
from pathlib import Path
from xml.etree import ElementTree

from fedkola.errors import DataError, PlanError
from fedkola.evaluation.tasks import corpora, icd10cm
from fedkola.evaluation.tasks.corpora import Row
from fedkola.evaluation.tasks.icd10cm import Code
from fedkola.knowledge.stream import Stream, cap, hash_share, seeded
from fedkola.plan import Task
from fedkola.types import Catalogue, Label

NAME = "icd10cm_releases"
LEVELS = ("code", *icd10cm.LEVELS)
NOTIFIED = 3


@dataclass(frozen=True, slots=True, kw_only=True)
class Release:
    """A version of the package, the date of its list, and the SHA-256 of its wheel."""

    version: str
    date: str
    sha256: str

    @property
    def wheel(self) -> str:
        return f"simple_icd_10_cm-{self.version}-py3-none-any.whl"


RELEASES = (
    Release(
        version="1.0.5",
        date="2021-01",
        sha256="cb838d2a8ce48fcdf5dd99d8b509e21c0c1785b7cdb675f6cf842bfdaedb14be",
    ),
    Release(
        version="1.3.0",
        date="2025-04",
        sha256="9b6c022e7de2b59a5c440938e8e62e1b912923d28ac06d66112fdef6ef3949dc",
    ),
    Release(
        version="1.5.0",
        date="2026-04",
        sha256="6d461d71dc26aedc530ae65f02cfb578a154e49507c32e8241e75f701d4b7e42",
    ),
)
Codes = Mapping[str, Code]


@dataclass(frozen=True, slots=True, kw_only=True)
class Asked:
    """A synonym under one label: the first and the last of the releases in a row that have it
    there (counted from 0), and the code that it stands under."""

    text: str
    label: str
    code: str
    first: int
    last: int


def load(task: Task, *, seed: int) -> Stream:
    """The stream of releases; reads ``folder``, ``level``, ``sites`` (at least 4), ``windows`` (3,
    6, 9, ...: as many for each release), ``overlap`` and ``per_label``.

    Raises PlanError for values outside these, DataError where a wheel is absent or another one.
    """
    _check(task)
    return build(lists(task), task, seed=seed)


def lists(task: Task) -> list[tuple[Catalogue, tuple[Code, ...]]]:
    """The tabular lists of RELEASES, out of wheels in the task's folder; DataError as above."""
    where = corpora.folder(task, NAME)
    return [_release(where / release.wheel, release.sha256) for release in RELEASES]


def build(parsed: Sequence[tuple[Catalogue, Sequence[Code]]], task: Task, *, seed: int) -> Stream:
    """The stream of these parsed lists, one for each of RELEASES."""
    releases = [{code.code: code for code in codes} for _, codes in parsed]
    by_code = task.level == "code"
    newest = _newest(releases)
    if by_code:
        changed = touched(releases)
        newest = {name: code for name, code in newest.items() if code.category in changed}
    level = icd10cm.LEVELS.index("category" if by_code else task.level or "block")
    above = _categories(parsed)
    node = {name: above[code.category].path[level] for name, code in newest.items()}
    asked = _asked(releases, newest, by_code=by_code)
    kept, kept_asked = cap(
        [name if by_code else node[name] for name in newest],
        [one.label if by_code else node[one.code] for one in asked],
        per_label=task.per_label,
        seed=seed,
    )
    everything = list(newest.values())
    houses = icd10cm.hospitals(task.sites)
    held = icd10cm.divide([everything[i] for i in kept], houses, task, seed=seed)
    _notify(held, houses, releases[0], seed=seed)
    share = task.windows // len(RELEASES)
    train = [
        row
        for site, codes in held.items()
        for code in codes
        for row in _revisions(site, code.code, releases, share=share, by_code=by_code)
    ]
    catalogue = _catalogue(parsed, releases, newest, share=share, by_code=by_code)
    test, ends, stale, concepts = _test(
        [asked[i] for i in kept_asked], asked, releases, train, share=share
    )
    return corpora.stream(
        catalogue=catalogue,
        specialties={name: house.specialty for name, house in houses.items()},
        train=train,
        test=test,
        windows=[
            release.date + (f" ({k}/{share})" if share > 1 else "")
            for release in RELEASES
            for k in range(1, share + 1)
        ],
        excluded={},
        notices=_notices(task, len(newest) - len(kept), releases),
        ends=ends,
        stale=stale,
        concepts=concepts,
    )


def touched(releases: Sequence[Codes]) -> frozenset[str]:
    """Categories with a code that any release brings, drops or rewords."""
    found = set()
    for before, after in pairwise(releases):
        for name in before.keys() | after.keys():
            old, new = before.get(name), after.get(name)
            if old is None or new is None or old.text != new.text:
                found.add((new or before[name]).category)
    return frozenset(found)


def successors(name: str, before: Codes, after: Codes) -> tuple[str, ...]:
    """The codes of a release that answer for one that it drops."""
    code = before[name]
    heirs = [c.code for c in after.values() if set(c.synonyms) & set(code.synonyms)]
    heirs = heirs or [c.code for c in after.values() if c.text.lower() == code.text.lower()]
    if heirs:
        return tuple(heirs)
    new = [c for c in after.values() if c.code not in before and c.category == code.category]
    new = new or [c for c in after.values() if c.category == code.category]
    if not new:
        return ()
    nearest = max(
        new,
        key=lambda c: (
            _shared(c.code, name),
            SequenceMatcher(None, c.text.lower(), code.text.lower()).ratio(),
        ),
    )
    return (nearest.code,)


# --- private --------------------------------------------------------------------------------------


@cache
def _release(path: Path, digest: str) -> tuple[Catalogue, tuple[Code, ...]]:
    """The tabular list in a wheel; raises DataError unless it is the wheel that is pinned."""
    try:
        found = sha256(path.read_bytes()).hexdigest()
    except OSError as error:
        raise DataError(
            f"{path} cannot be read ({error.strerror}); fetch the three wheels with `python "
            f"benchmarks/fetch_releases.py {path.parent}`"
        ) from error
    if found != digest:
        raise DataError(
            f"{path} has the SHA-256 {found}, not {digest}; delete it and fetch it again with "
            f"`python benchmarks/fetch_releases.py {path.parent}`"
        )
    with zipfile.ZipFile(path) as wheel:
        (tabular,) = (name for name in wheel.namelist() if name.endswith(".xml"))
        return icd10cm.parse(ElementTree.fromstring(wheel.read(tabular)))


def _shared(one: str, other: str) -> int:
    """How many characters two codes begin with alike: how near they stand in the tree."""
    same = [a == b for a, b in zip(one, other, strict=False)]
    return same.index(False) if False in same else len(same)


def _check(task: Task) -> None:
    if task.level not in ("", *LEVELS):
        raise PlanError(
            f"task.level = {task.level!r} is no level of this task; set {', '.join(LEVELS)}"
        )
    if task.sites < icd10cm.HOLDERS:
        raise PlanError(
            f"task.sites = {task.sites} is too few hospitals: every chapter has {icd10cm.HOLDERS} "
            f"holders; set task.sites to {icd10cm.HOLDERS} or more"
        )
    if task.windows % len(RELEASES):
        raise PlanError(
            f"task.windows = {task.windows}, but {len(RELEASES)} releases have as many windows "
            "each; set 3, 6, 9, ..."
        )


def _newest(releases: Sequence[Codes]) -> dict[str, Code]:
    """Every code that was ever in the list, as the last release that has it words it."""
    found: dict[str, Code] = {}
    for codes in reversed(releases):
        found |= {name: code for name, code in codes.items() if name not in found}
    return found


def _notify(
    held: Mapping[str, list[Code]],
    houses: Mapping[str, icd10cm.Hospital],
    first: Codes,
    *,
    seed: int,
) -> None:
    """Give codes that are not in the first release to three hospitals of their chapter."""
    owners: defaultdict[str, set[str]] = defaultdict(set)
    new = {code.code: code for codes in held.values() for code in codes if code.code not in first}
    for site, codes in held.items():
        for code in codes:
            owners[code.code].add(site)
    for name, code in new.items():
        others = [
            site
            for site, house in houses.items()
            if code.chapter in house.chapters and site not in owners[name]
        ]
        missing = max(0, NOTIFIED - len(owners[name]))
        for site in seeded(seed, "notice", name).sample(others, min(missing, len(others))):
            held[site].append(code)


def _revisions(
    site: str, name: str, releases: Sequence[Codes], *, share: int, by_code: bool
) -> list[Row]:
    """The record of a code at a hospital: once when it appears, again when it is reworded."""
    found: list[Row] = []
    # The part of a release in which the code is heard of, the same in every release.
    part = 1 + int(share * hash_share(name))
    for number, codes in enumerate(releases):
        code = codes.get(name)
        if code is not None and (not found or found[-1].text != code.text):
            found.append(
                Row(
                    record=f"{site}/{name}",
                    text=code.text,
                    label=name if by_code else code.category,
                    site=site,
                    window=number * share + part,
                )
            )
    return found


def _asked(releases: Sequence[Codes], chosen: Codes, *, by_code: bool) -> list[Asked]:
    """Every synonym under every label that it ever stood under."""
    present: defaultdict[tuple[str, str], dict[int, str]] = defaultdict(dict)
    for number, codes in enumerate(releases):
        for code in codes.values():
            if code.code not in chosen:
                continue
            for text in code.synonyms:
                label = code.code if by_code else code.category
                present[text, label].setdefault(number, code.code)
    found = []
    for (text, label), by_release in present.items():
        for first in by_release:
            if first - 1 in by_release:
                continue
            last = first
            while last + 1 in by_release:
                last += 1
            found.append(
                Asked(text=text, label=label, code=by_release[first], first=first, last=last)
            )
    return found


def _test(
    chosen: Sequence[Asked],
    everything: Sequence[Asked],
    releases: Sequence[Codes],
    train: Sequence[Row],
    *,
    share: int,
) -> tuple[list[Row], dict[str, int], dict[str, tuple[str, ...]], dict[str, str]]:
    """Test rows, and by record the last window, the labels that were right before, the concept."""
    first: dict[str, int] = {}
    for row in train:
        first[row.label] = min(row.window, first.get(row.label, row.window))
    by_text: defaultdict[str, list[Asked]] = defaultdict(list)
    for one in everything:
        by_text[one.text].append(one)
    rows: list[Row] = []
    ends: dict[str, int] = {}
    stale: dict[str, tuple[str, ...]] = {}
    concepts: dict[str, str] = {}
    for one in chosen:
        opens = one.first * share + 1
        window = max(opens, first.get(one.label, opens))
        last = (one.last + 1) * share
        if window > last:
            continue
        name = sha256(one.text.encode()).hexdigest()[:10]
        record = f"{one.label}/synonym-{name}-{RELEASES[one.first].date}"
        rows.append(Row(record=record, text=one.text, label=one.label, window=window))
        if one.last < len(releases) - 1:
            ends[record] = last
        others = by_text[one.text]
        now = {o.label for o in others if o.first <= one.first <= o.last}
        before = dict.fromkeys(o.label for o in others if o.last < one.first and o.label not in now)
        if before:
            stale[record] = tuple(before)
        concepts[record] = _concept(one, releases, moved=bool(before))
    return rows, ends, stale, concepts


def _concept(one: Asked, releases: Sequence[Codes], *, moved: bool) -> str:
    since = next(number for number, codes in enumerate(releases) if one.code in codes)
    if moved:
        return "moved"
    if since > 0:
        return "new"
    if one.code not in releases[-1]:
        return "retired"
    if len({codes[one.code].text for codes in releases if one.code in codes}) > 1:
        return "reworded"
    return "added" if one.first > since else "kept"


def _categories(lists: Sequence[tuple[Catalogue, Sequence[Code]]]) -> dict[str, Label]:
    """Every category that was ever there, where the last release that has it puts it: in the
    order of the last release, those it has dropped after them."""
    found: dict[str, Label] = {}
    for catalogue, _ in reversed(lists):
        found |= {label.code: label for label in catalogue.labels if label.code not in found}
    return found


def _catalogue(
    lists: Sequence[tuple[Catalogue, Sequence[Code]]],
    releases: Sequence[Codes],
    chosen: Codes,
    *,
    share: int,
    by_code: bool,
) -> Catalogue:
    """The labels of the stream with their time of validity."""
    texts = {name: code.text for name, code in chosen.items()}
    for catalogue, _ in lists:
        texts |= catalogue.texts
    above = _categories(lists)
    labels = (
        [
            replace(above[code.category], code=name, path=(name, *above[code.category].path))
            for name, code in chosen.items()
        ]
        if by_code
        else list(above.values())
    )
    # A category has an entry of its own under its name, so a label is a code either way.
    labels = [_dated(label, releases, chosen, share=share) for label in labels]
    used = {name for label in labels for name in label.path}
    return Catalogue(
        system="icd10cm",
        levels=LEVELS if by_code else icd10cm.LEVELS,
        labels=tuple(labels),
        texts={name: text for name, text in texts.items() if name in used},
    )


def _dated(label: Label, releases: Sequence[Codes], chosen: Codes, *, share: int) -> Label:
    """The label with its time of validity in windows, and who answers for it afterwards."""
    there = [number for number, codes in enumerate(releases) if label.code in codes]
    since, until = there[0], there[-1]
    label = replace(label, valid_from=since * share + 1.0 if since else float("-inf"))
    if until == len(releases) - 1:
        return label
    heirs = successors(label.code, releases[until], releases[until + 1])
    return replace(
        label,
        valid_to=(until + 1) * share + 1.0,
        replaced_by=tuple(heir for heir in heirs if heir in chosen),
    )


def _notices(task: Task, left_out: int, releases: Sequence[Codes]) -> tuple[str, ...]:
    found = []
    for release, (before, after) in zip(RELEASES[1:], pairwise(releases), strict=True):
        both = before.keys() & after.keys()
        reworded = sum(before[name].text != after[name].text for name in both)
        found.append(
            f"{release.date}: {len(after.keys() - before.keys())} codes new, "
            f"{len(before.keys() - after.keys())} retired, {reworded} reworded"
        )
    if task.level == "code":
        found.append("only categories that a release has changed are in the stream")
    if left_out:
        found.append(
            f"task.per_label = {task.per_label} leaves out {left_out} of the codes, and synonyms "
            "in proportion"
        )
    return tuple(found)
