"""ICD-10-CM as twelve hospitals see it: official descriptions train, clinicians' synonyms test.

Source: the tabular list in the package simple-icd-10-cm. Every code contributes its description
as a training record and its inclusion terms as test records; the label is the category (three
characters), below a block, below a chapter. Each chapter is one scope.

Synthetic here, and drawn from the seed: which hospital of a chapter holds which record, the window
in which a chapter arrives, and the patients. The list has no patients; each hospital's records are
given to pseudonyms, one to six records each, so that the withdrawal of a person can be shown.
"""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from random import Random
from xml.etree import ElementTree

from fedkola.errors import DataError, PlanError
from fedkola.knowledge.stream import Stream, arrivals, cap, first_windows, seeded
from fedkola.plan import Task
from fedkola.types import Catalogue, Dataset, Label

LEVELS = ("category", "block", "chapter")
HOLDERS = 4  # One may leave and a chapter still has the three that a cell needs.
MOST_RECORDS = 6


@dataclass(frozen=True, slots=True, kw_only=True)
class Hospital:
    """A specialty, the chapters it sees most (``home``) and all the chapters that it sees."""

    specialty: str
    home: frozenset[int]
    chapters: frozenset[int]


@dataclass(frozen=True, slots=True, kw_only=True)
class Code:
    """One entry of the tabular list."""

    code: str
    text: str
    synonyms: tuple[str, ...]
    category: str
    block: str
    chapter: int


def _hospital(specialty: str, home: Sequence[int], further: Sequence[int]) -> Hospital:
    return Hospital(
        specialty=specialty, home=frozenset(home), chapters=frozenset((*home, *further))
    )


HOSPITALS: Mapping[str, Hospital] = {
    "central-university": _hospital(
        "general, university", (), (1, 2, 4, 5, 6, 7, 8, 9, 10, 11, 13, 15, 16, 17, 19, 22)
    ),
    "westside-general": _hospital(
        "general", (), (1, 2, 4, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16, 18, 19, 20)
    ),
    "valley-community": _hospital(
        "general, rural", (), (3, 5, 6, 7, 10, 11, 15, 16, 18, 20, 21, 22)
    ),
    "harbour-infectious": _hospital("infectious diseases", (1, 22), (3, 10, 11, 12, 18)),
    "riverside-oncology": _hospital("oncology and haematology", (2, 3), (12, 14, 18, 21)),
    "northgate-heart-lung": _hospital("cardiology and pneumology", (9, 10), (1, 4, 18, 22)),
    "eastfield-trauma": _hospital("trauma", (19, 20), (6, 13, 21)),
    "lakeside-eye-ear": _hospital("eye and ear", (7, 8), (2, 17, 19)),
    "hilltop-neuro-psychiatry": _hospital("neurology and psychiatry", (5, 6), (8, 20, 21)),
    "meadow-women-children": _hospital("obstetrics and paediatrics", (15, 16), (5, 14, 17, 21)),
    "southbank-orthopaedics": _hospital("orthopaedics", (13,), (12, 17, 19, 20)),
    "oldtown-metabolic": _hospital("gastroenterology and endocrinology", (4, 11), (3, 9, 14)),
}


def load(task: Task, *, seed: int) -> Stream:
    """The hospitals' stream; the same for equal ``task`` and ``seed``.

    Reads ``level``, ``sites`` (at least 4), ``windows`` (1 to 22), ``overlap`` (share of records
    that a second hospital holds as well), ``backlog`` (share that is coded late and arrives in the
    last window) and ``per_label``. Raises PlanError for values outside these, DataError where the
    package is missing.
    """
    check(task)
    catalogue, everything = tabular()
    codes, asked = _subset(task, seed)
    chapters: defaultdict[int, list[Code]] = defaultdict(list)
    for code in codes:
        chapters[code.chapter].append(code)
    arrival = arrivals(
        {chapter_name(number): len(rows) for number, rows in chapters.items()},
        windows=task.windows,
        seed=seed,
    )
    houses = hospitals(task.sites)
    held = divide(codes, houses, task, seed=seed)
    sites = {name: _dataset(name, rows, arrival, task, seed) for name, rows in held.items()}
    first = first_windows(catalogue, sites)
    return Stream(
        catalogue=catalogue,
        sites=sites,
        test=Dataset(
            records=tuple(record for record, _, _ in asked),
            texts=tuple(text for _, text, _ in asked),
            labels=tuple(category for _, _, category in asked),
            patients=("",) * len(asked),
            windows=tuple(first[category] for _, _, category in asked),
        ),
        windows=tuple(f"{2026 + i // 12}-{i % 12 + 1:02d}" for i in range(task.windows)),
        about={
            name: {
                "specialty": house.specialty,
                "scopes": tuple(scope(number) for number in sorted(house.chapters)),
            }
            for name, house in houses.items()
        },
        notices=_notices(task, len(everything) - len(codes)),
    )


def hospitals(sites: int) -> dict[str, Hospital]:
    """``sites`` hospitals by name, every chapter with at least four of them.

    Up to twelve come from the table, general ones first; beyond that each name comes back with a
    number. Where hospitals are too few for their specialties, those with the fewest chapters see
    more.
    """
    names = list(HOSPITALS)
    houses = {
        names[i % len(names)] + (f"-{i // len(names) + 1}" if i >= len(names) else ""): HOSPITALS[
            names[i % len(names)]
        ]
        for i in range(sites)
    }
    for number in range(1, 23):
        while sum(number in house.chapters for house in houses.values()) < HOLDERS:
            name = min(
                (n for n, house in houses.items() if number not in house.chapters),
                key=lambda n: len(houses[n].chapters),
            )
            house = houses[name]
            houses[name] = Hospital(
                specialty=house.specialty, home=house.home, chapters=house.chapters | {number}
            )
    return houses


def divide(
    codes: Sequence[Code], houses: Mapping[str, Hospital], task: Task, *, seed: int
) -> dict[str, list[Code]]:
    """Which hospital holds which codes: each is at one that sees its chapter, a share
    ``task.overlap`` at two."""
    chapters: defaultdict[int, list[Code]] = defaultdict(list)
    for code in codes:
        chapters[code.chapter].append(code)
    held: dict[str, list[Code]] = {name: [] for name in houses}
    for number, rows in chapters.items():
        chance = seeded(seed, "split", str(number))
        for name, share in _split(rows, _weights(houses, number, chance), task, chance).items():
            held[name] += share
    return held


@cache
def tabular() -> tuple[Catalogue, tuple[Code, ...]]:
    """The catalogue of all categories with data and every code, in the order of the list.

    Raises DataError if the package or its file is absent.
    """
    return parse(_read())


def parse(root: ElementTree.Element) -> tuple[Catalogue, tuple[Code, ...]]:
    """Catalogue and codes of a tabular list in the XML of the CDC."""
    codes: list[Code] = []
    labels: list[Label] = []
    texts: dict[str, str] = {}
    for chapter in root.iter("chapter"):
        number = int(_text(chapter, "name"))
        name = chapter_name(number)
        texts[name] = _text(chapter, "desc")
        for section in chapter.iter("section"):
            block = section.attrib["id"]
            for top in section.findall("diag"):
                category = _text(top, "name")
                texts[block] = _text(section, "desc")
                texts[category] = _text(top, "desc")
                labels.append(
                    Label(code=category, path=(category, block, name), scope=scope(number))
                )
                codes += [
                    Code(
                        code=_text(diag, "name"),
                        text=_text(diag, "desc"),
                        synonyms=_synonyms(diag),
                        category=category,
                        block=block,
                        chapter=number,
                    )
                    for diag in top.iter("diag")
                ]
    catalogue = Catalogue(system="icd10cm", levels=LEVELS, labels=tuple(labels), texts=texts)
    return catalogue, tuple(codes)


def _read() -> ElementTree.Element:
    spec = find_spec("simple_icd_10_cm")
    folders = spec.submodule_search_locations if spec else None
    files = sorted(Path(folders[0]).glob("data/icd10c-tabular*.xml")) if folders else []
    if not files:
        raise DataError(
            "the ICD-10-CM tabular list is not installed; run pip install simple-icd-10-cm==1.5.0"
        )
    return ElementTree.parse(files[-1]).getroot()


def _text(element: ElementTree.Element, tag: str) -> str:
    return " ".join((element.findtext(tag) or "").split())


def _synonyms(diag: ElementTree.Element) -> tuple[str, ...]:
    return tuple(
        " ".join((note.text or "").split())
        for tag in ("inclusionTerm", "includes")
        for terms in diag.findall(tag)
        for note in terms.findall("note")
    )


def chapter_name(number: int) -> str:
    return f"chapter-{number}"


def scope(number: int) -> str:
    return f"icd10cm/{chapter_name(number)}"


def check(task: Task) -> None:
    """Raise PlanError for levels, sites and windows that 22 chapters at hospitals cannot have."""
    if task.level not in ("", *LEVELS):
        raise PlanError(
            f"task.level = {task.level!r} is no level of ICD-10-CM; set {', '.join(LEVELS)}"
        )
    if task.sites < HOLDERS:
        raise PlanError(
            f"task.sites = {task.sites} is too few hospitals: every chapter has {HOLDERS} holders; "
            f"set task.sites to {HOLDERS} or more"
        )
    if not 1 <= task.windows <= 22:
        raise PlanError(
            f"task.windows = {task.windows}, but 22 chapters fill 1 to 22 windows; "
            "set task.windows to one of these"
        )


def _subset(task: Task, seed: int) -> tuple[list[Code], list[tuple[str, str, str]]]:
    """Codes under the cap, and (record, text, category) of the synonyms asked. Synonyms are drawn
    apart from codes: they ask for the label, not for the code that they stand under."""
    catalogue, codes = tabular()
    level = LEVELS.index(task.level or "block")
    reported = {label.code: label.path[level] for label in catalogue.labels}
    asked = [
        (f"{code.code}/synonym-{k}", text, code.category)
        for code in codes
        for k, text in enumerate(code.synonyms, start=1)
    ]
    keep, keep_asked = cap(
        [reported[code.category] for code in codes],
        [reported[category] for _, _, category in asked],
        per_label=task.per_label,
        seed=seed,
    )
    return [codes[i] for i in keep], [asked[i] for i in keep_asked]


def _notices(task: Task, left_out: int) -> tuple[str, ...]:
    if not left_out:
        return ()
    return (
        f"task.per_label = {task.per_label} leaves out {left_out} of the descriptions, and "
        "synonyms in proportion",
    )


def _weights(houses: Mapping[str, Hospital], number: int, chance: Random) -> dict[str, float]:
    """How much of a chapter each of its holders sees, before normalisation."""
    return {
        name: (3.0 if number in house.home else 1.0) * chance.uniform(0.6, 1.4)
        for name, house in houses.items()
        if number in house.chapters
    }


def _split(
    rows: Sequence[Code], weights: Mapping[str, float], task: Task, chance: Random
) -> dict[str, list[Code]]:
    """The codes of one chapter by holder. The first three of a category go to the three holders
    that are furthest behind their share, so that no category hangs on one hospital; the others
    are drawn with preferences of their own per category, as hospitals differ in what they see."""
    held: dict[str, list[Code]] = {name: [] for name in weights}
    categories: defaultdict[str, list[Code]] = defaultdict(list)
    for code in rows:
        categories[code.category].append(code)
    for members in categories.values():
        behind = sorted(weights, key=lambda name: len(held[name]) / weights[name])
        taste = [weight * chance.gammavariate(2.0, 0.5) for weight in weights.values()]
        mixed = chance.sample(members, len(members))
        homes = behind[:3][: len(mixed)]
        homes += chance.choices(list(weights), taste, k=len(mixed) - len(homes))
        for code, name in zip(mixed, homes, strict=True):
            held[name].append(code)
    first = [(name, code) for name, codes in held.items() for code in codes]
    for name, code in chance.sample(first, round(task.overlap * len(first))):
        others = {other: weight for other, weight in weights.items() if other != name}
        held[chance.choices(list(others), list(others.values()))[0]].append(code)
    return held


def _dataset(
    name: str, rows: Sequence[Code], arrival: Mapping[str, int], task: Task, seed: int
) -> Dataset:
    """A hospital's records by window, then code, each with a made-up patient."""
    window = _arrivals(name, rows, arrival, task, seed)
    order = sorted(range(len(rows)), key=lambda i: (window[i], rows[i].code))
    codes = [rows[i] for i in order]
    chance = seeded(seed, "patients", name)
    patients = [""] * len(codes)
    left = number = 0
    for i in chance.sample(range(len(codes)), len(codes)):
        if not left:
            left = chance.randint(1, MOST_RECORDS)
            number += 1
        patients[i] = f"{name}/patient-{number:05d}"
        left -= 1
    return Dataset(
        records=tuple(f"{name}/{code.code}" for code in codes),
        texts=tuple(code.text for code in codes),
        labels=tuple(code.category for code in codes),
        patients=tuple(patients),
        windows=tuple(window[i] for i in order),
    )


def _arrivals(
    name: str, rows: Sequence[Code], arrival: Mapping[str, int], task: Task, seed: int
) -> list[int]:
    """The window of every record: its chapter's, or the last one for the backlog. The first
    record of a category at a hospital is never late, so a chapter is known when it arrives."""
    chance = seeded(seed, "backlog", name)
    seen: set[str] = set()
    windows = []
    for code in rows:
        late = code.category in seen and chance.random() < task.backlog
        windows.append(task.windows if late else arrival[chapter_name(code.chapter)])
        seen.add(code.category)
    return windows
