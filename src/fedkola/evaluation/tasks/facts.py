"""A stream of generated facts that change: entity, attribute, value; the value changes at t.

Nothing here is real: clinics have made-up names, and what is told of them is drawn by the seed. It
is used where the truth must be known exactly, namely which answers were right before and are not
now. Half of the entities are known from window 1, the others arrive over the following windows; in
every later window a share of the known facts takes a value that it never had. Each entity is held
by three or four sites, which all learn of a change in the window in which it happens
(``scenario.release`` delays it site by site).

A record is one phrasing of one fact at one site, and a change brings it again under its id with
the new value: a revision. Tests ask in a phrasing that no site holds, in every window while a value
is valid. The question is the prompt and the value the text, so that encoders classify questions
and causal models answer them. A fact's concept is ``evolved`` if it changes within the stream,
else ``stable``.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from random import Random

from fedkola.errors import PlanError
from fedkola.knowledge.stream import Stream, hash_share, seeded
from fedkola.plan import Task
from fedkola.types import Catalogue, Dataset, Label

LEVELS = ("value", "attribute")
HOLDERS = 3
PHRASINGS = 2  # of four, drawn per site and fact
FIRST = 0.5  # share of entities known from window 1
SYLLABLES = tuple(c + v for c in "bdfgklmnprstvz" for v in "aeiou")


@dataclass(frozen=True, slots=True)
class Attribute:
    """What can be said of an entity: its values, how sites ask for it, how the test does."""

    values: tuple[str, ...]
    asked: tuple[str, ...]
    tested: str


def _words(text: str) -> tuple[str, ...]:
    return tuple(text.split())


ATTRIBUTES: Mapping[str, Attribute] = {
    "director": Attribute(
        _words("Adler Brook Castle Dunn Ellis Frost Grant Hayes Irwin Jonas Keller Lowe"),
        (
            "Who is the director of {}?",
            "Who leads the clinic {}?",
            "{} is led by whom?",
            "Name the director of the clinic {}.",
        ),
        "Who is the head of the clinic {}?",
    ),
    "city": Attribute(
        _words("Lisbon Oslo Madrid Vienna Athens Dublin Prague Rome Helsinki Warsaw Geneva Riga"),
        (
            "In which city is {}?",
            "Where is the clinic {} located?",
            "{} is in which city?",
            "Name the city of the clinic {}.",
        ),
        "Which city is the clinic {} in?",
    ),
    "drug": Attribute(
        _words(
            "ibuprofen heparin insulin aspirin morphine digoxin "
            "lithium warfarin penicillin ketamine codeine quinine"
        ),
        (
            "Which drug does {} study?",
            "What drug is tested at the clinic {}?",
            "{} runs a trial of which drug?",
            "Name the drug studied at {}.",
        ),
        "What drug does the clinic {} test?",
    ),
    "language": Attribute(
        _words(
            "Basque Czech Danish Finnish French German Greek Irish Italian Latvian Polish Spanish"
        ),
        (
            "Which language is spoken at {}?",
            "What language does the clinic {} use?",
            "{} works in which language?",
            "Name the language of the clinic {}.",
        ),
        "What language is spoken at the clinic {}?",
    ),
    "speciality": Attribute(
        _words(
            "surgery oncology cardiology neurology urology geriatrics "
            "radiology psychiatry obstetrics paediatrics dentistry nephrology"
        ),
        (
            "What is the speciality of {}?",
            "Which speciality does the clinic {} have?",
            "{} is known for which speciality?",
            "Name the speciality of the clinic {}.",
        ),
        "Which speciality is the clinic {} known for?",
    ),
    "supplier": Attribute(
        _words(
            "Acorn Beacon Cedar Delta Ember Falcon Harbour Ivory Juniper Lantern Meridian Orchard"
        ),
        (
            "Who is the supplier of {}?",
            "Which company supplies the clinic {}?",
            "{} is supplied by whom?",
            "Name the supplier of the clinic {}.",
        ),
        "Which supplier does the clinic {} have?",
    ),
    "device": Attribute(
        _words(
            "scanner ventilator laser incubator microscope centrifuge "
            "endoscope dialyser defibrillator monitor pump scale"
        ),
        (
            "What device did {} buy?",
            "Which device was bought by the clinic {}?",
            "{} has bought which device?",
            "Name the device that {} bought.",
        ),
        "Which device did the clinic {} buy?",
    ),
    "colour": Attribute(
        _words("red blue green white black yellow orange purple brown grey pink silver"),
        (
            "What colour is the door of {}?",
            "Which colour has the door of the clinic {}?",
            "The door of {} has which colour?",
            "Name the colour of the door of {}.",
        ),
        "What colour has the door of the clinic {}?",
    ),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Fact:
    """One attribute of one entity; ``versions`` holds (window from which it is right, value)."""

    entity: str
    attribute: str
    versions: tuple[tuple[int, str], ...]

    @property
    def id(self) -> str:
        return f"{self.entity.replace(' ', '-').lower()}/{self.attribute}"


def load(task: Task, *, seed: int) -> Stream:
    """The stream; the same for equal ``task`` and ``seed``.

    Reads ``level``, ``sites`` (3 at least), ``windows``, ``entities`` and ``changing``. Raises
    PlanError for values outside these.
    """
    _check(task)
    names = entities(task.entities, seed=seed)
    facts = list(_facts(names, task, seed))
    holders = {name: _holders(name, task, seed) for name in names}
    sites = {site: _dataset(site, facts, holders, seed) for site in _sites(task)}
    asked = [(fact, number) for fact in facts for number in range(len(fact.versions))]
    record = {(fact.id, number): f"{fact.id}/{number + 1}" for fact, number in asked}
    test = Dataset(
        records=tuple(record[fact.id, number] for fact, number in asked),
        prompts=tuple(ATTRIBUTES[fact.attribute].tested.format(fact.entity) for fact, _ in asked),
        texts=tuple(fact.versions[number][1] for fact, number in asked),
        labels=tuple(code(fact.attribute, fact.versions[number][1]) for fact, number in asked),
        patients=("",) * len(asked),
        windows=tuple(fact.versions[number][0] for fact, number in asked),
    )
    return Stream(
        catalogue=catalogue(),
        sites=sites,
        test=test,
        windows=tuple(f"{2026 + i // 12}-{i % 12 + 1:02d}" for i in range(task.windows)),
        about={
            site: {
                "specialty": "clinics of its region",
                "scopes": tuple(f"facts/{name}" for name in ATTRIBUTES),
            }
            for site in sites
        },
        notices=(
            "every fact of this stream is generated; no clinic, person or drug trial is real",
        ),
        ends={
            record[fact.id, number]: fact.versions[number + 1][0] - 1
            for fact, number in asked
            if number + 1 < len(fact.versions)
        },
        stale={
            record[fact.id, number]: tuple(
                code(fact.attribute, value) for _, value in fact.versions[:number]
            )
            for fact, number in asked
            if number
        },
        concepts={
            record[fact.id, number]: "evolved" if len(fact.versions) > 1 else "stable"
            for fact, number in asked
        },
        choices={
            record[fact.id, number]: ATTRIBUTES[fact.attribute].values for fact, number in asked
        },
    )


def catalogue() -> Catalogue:
    """All values of all attributes: the public list that everybody knows beforehand."""
    labels = tuple(
        Label(code=code(name, value), path=(code(name, value), name), scope=f"facts/{name}")
        for name, attribute in ATTRIBUTES.items()
        for value in attribute.values
    )
    texts = {code(name, v): v for name, attribute in ATTRIBUTES.items() for v in attribute.values}
    return Catalogue(system="facts", levels=LEVELS, labels=labels, texts=texts)


def code(attribute: str, value: str) -> str:
    """The label of a value: values may share their names between attributes."""
    return f"{attribute}/{value}"


def entities(count: int, *, seed: int, public: bool = False) -> tuple[str, ...]:
    """``count`` different made-up names. Those for pre-training a model (``public``) are never
    among those of a stream, whatever the seeds: a hash of the name decides."""
    chance = seeded(seed, "entities", "public" if public else "stream")
    found: dict[str, None] = {}
    while len(found) < count:
        name = f"{_word(chance)} {_word(chance)}"
        if (hash_share(name) < 0.5) == public:
            found[name] = None
    return tuple(found)


def vocabulary() -> tuple[str, ...]:
    """Every word of questions and values in lower case, and the syllables of names."""
    words = {
        word
        for attribute in ATTRIBUTES.values()
        for text in (*attribute.asked, attribute.tested, *attribute.values)
        for word in text.lower().replace("{}", " ").replace("?", " ? ").replace(".", " . ").split()
    }
    return (*sorted(words), *SYLLABLES)


# --- private --------------------------------------------------------------------------------------


def _check(task: Task) -> None:
    if task.level not in ("", *LEVELS):
        raise PlanError(
            f"task.level = {task.level!r} is no level of facts; set {' or '.join(LEVELS)}"
        )
    if task.sites < HOLDERS:
        raise PlanError(
            f"task.sites = {task.sites}, but every fact is held by {HOLDERS} sites at least; set "
            f"task.sites to {HOLDERS} or more"
        )


def _word(chance: Random) -> str:
    return "".join(chance.choices(SYLLABLES, k=chance.choice((2, 3)))).capitalize()


def _sites(task: Task) -> tuple[str, ...]:
    width = len(str(task.sites))
    return tuple(f"region-{i:0{width}d}" for i in range(1, task.sites + 1))


def _holders(entity: str, task: Task, seed: int) -> frozenset[str]:
    chance = seeded(seed, "holders", entity)
    names = _sites(task)
    return frozenset(chance.sample(names, min(len(names), chance.choice((HOLDERS, HOLDERS + 1)))))


def _facts(names: Sequence[str], task: Task, seed: int) -> Iterator[Fact]:
    """Facts with their history, entity by entity."""
    chance = seeded(seed, "arrival")
    known = max(1, round(FIRST * len(names))) if task.windows > 1 else len(names)
    # The others arrive evenly, so that every later window brings some where there are enough.
    later = [2 + i % (task.windows - 1) for i in range(len(names) - known)]
    arrival = dict(zip(chance.sample(names, len(names)), [1] * known + later, strict=True))
    for name in names:
        for attribute, about in ATTRIBUTES.items():
            own = seeded(seed, "history", name, attribute)
            left = own.sample(about.values, len(about.values))
            versions = [(arrival[name], left.pop())]
            for window in range(arrival[name] + 1, task.windows + 1):
                if left and own.random() < task.changing:
                    versions.append((window, left.pop()))
            yield Fact(entity=name, attribute=attribute, versions=tuple(versions))


def _dataset(
    site: str, facts: Sequence[Fact], holders: Mapping[str, frozenset[str]], seed: int
) -> Dataset:
    """A site's records by window, then fact; each clinic is one patient of the site."""
    rows: list[tuple[int, str, str, str, str, str]] = []
    for fact in facts:
        if site not in holders[fact.entity]:
            continue
        asked = ATTRIBUTES[fact.attribute].asked
        chosen = sorted(
            seeded(seed, "phrasing", site, fact.id).sample(range(len(asked)), PHRASINGS)
        )
        for window, value in fact.versions:
            for k in chosen:
                rows.append(
                    (
                        window,
                        f"{site}/{fact.id}/{k + 1}",
                        asked[k].format(fact.entity),
                        value,
                        code(fact.attribute, value),
                        f"{site}/{fact.id.split('/')[0]}",
                    )
                )
    rows.sort()
    return Dataset(
        records=tuple(row[1] for row in rows),
        prompts=tuple(row[2] for row in rows),
        texts=tuple(row[3] for row in rows),
        labels=tuple(row[4] for row in rows),
        patients=tuple(row[5] for row in rows),
        windows=tuple(row[0] for row in rows),
    )
