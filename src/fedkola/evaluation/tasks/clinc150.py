"""CLINC150: 150 intents in ten domains that arrive over the windows, each at three sites.

Source: Larson et al., An Evaluation Dataset for Intent Classification and Out-of-Scope Prediction,
EMNLP 2019 (CC BY 3.0): ``train`` and ``test`` of the full set, and 1,000 questions of no intent,
which :func:`out_of_scope` returns apart. Each domain is one scope. Ten windows bring one domain
each, five bring two at once.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace

from fedkola.errors import DataError, PlanError
from fedkola.evaluation.tasks import corpora
from fedkola.evaluation.tasks.corpora import TEST, TRAIN, Row
from fedkola.knowledge.stream import Stream, arrivals, numbered, seeded
from fedkola.plan import Task
from fedkola.types import Catalogue, Dataset, Label

NAME = "clinc150"
LEVELS = ("intent", "domain")
HOLDERS = 3


def load(task: Task, *, seed: int) -> Stream:
    """The stream of intents; reads ``level``, ``sites`` (at least 3), ``windows`` (1 to 10) and
    ``per_label``. Which sites hold a domain, and its window, are drawn from the seed; a domain's
    records are divided equally among its holders, intent by intent."""
    if task.level not in ("", *LEVELS):
        raise PlanError(f"task.level = {task.level!r} is no level of {NAME}; set one of {LEVELS}")
    if task.sites < HOLDERS:
        raise PlanError(
            f"task.sites = {task.sites}, but a domain has {HOLDERS} sites; set {HOLDERS} or more"
        )
    excluded = {TRAIN: Counter[str](), TEST: Counter[str]()}
    train, domains = _rows(task, TRAIN, excluded[TRAIN])
    test, asked = _rows(task, TEST, excluded[TEST])
    if unknown := sorted(set(asked) - set(domains)):
        raise DataError(f"test intents without a training record: {', '.join(unknown)}; copy again")
    test = corpora.unseen(train, test, excluded[TEST])
    train, test, notices = corpora.capped(train, test, per_label=task.per_label, seed=seed)
    sizes = Counter(domains[row.label] for row in train)
    window = arrivals(sizes, windows=task.windows, seed=seed)
    names = numbered(task.sites)
    held = holders(sorted(sizes), names, seed=seed)
    return corpora.stream(
        catalogue=Catalogue(
            system=NAME,
            levels=LEVELS,
            labels=tuple(
                Label(code=intent, path=(intent, domain), scope=f"{NAME}/{domain}")
                for intent, domain in sorted(domains.items(), key=lambda pair: pair[::-1])
            ),
            texts={intent: intent.replace("_", " ") for intent in domains},
        ),
        specialties={
            name: ", ".join(domain for domain in sorted(sizes) if name in held[domain]) or "none"
            for name in names
        },
        train=[
            replace(row, site=site, window=window[domains[row.label]])
            for row, site in zip(train, _dealt(train, domains, held, seed), strict=True)
        ],
        test=test,
        windows=[
            " and ".join(sorted(d for d, w in window.items() if w == number))
            for number in range(1, task.windows + 1)
        ],
        excluded=excluded,
        notices=notices,
    )


def out_of_scope(task: Task) -> Dataset:
    """Questions that no intent answers, with label "", to ask from window 1 on: what a bank should
    mark as unknown."""
    rows = corpora.read(corpora.folder(task, NAME) / "oos_test.jsonl.gz", "text")
    return corpora.dataset(
        [
            Row(record=f"oos-{i}", text=str(row["text"]), label="", window=1)
            for i, row in enumerate(rows, start=1)
        ]
    )


def holders(domains: Sequence[str], names: Sequence[str], *, seed: int) -> dict[str, list[str]]:
    """Three sites for each domain; the numbers of domains at two sites differ by one at most."""
    chance = seeded(seed, "holders")
    mixed, sites = chance.sample(domains, len(domains)), chance.sample(names, len(names))
    return {
        domain: [sites[(HOLDERS * i + k) % len(sites)] for k in range(HOLDERS)]
        for i, domain in enumerate(mixed)
    }


def _rows(task: Task, part: str, excluded: Counter[str]) -> tuple[list[Row], dict[str, str]]:
    """The rows of a file, and the domain of every intent in it."""
    path = corpora.folder(task, NAME) / f"{part}.jsonl.gz"
    read = corpora.read(path, "text", "intent", "domain")
    usable = corpora.admitted(read, excluded, text="text", label="intent")
    rows = [Row(record=f"{part}-{i + 1}", text=text, label=intent) for i, text, intent in usable]
    return rows, {intent: str(read[i]["domain"]) for i, _, intent in usable}


def _dealt(
    rows: Sequence[Row], domains: dict[str, str], held: dict[str, list[str]], seed: int
) -> list[str]:
    """The site of every row: the holders of its domain in turn, intent by intent."""
    chance = seeded(seed, "split")
    sites = [""] * len(rows)
    passed: Counter[str] = Counter()
    for i in chance.sample(range(len(rows)), len(rows)):
        label = rows[i].label
        sites[i] = held[domains[label]][passed[label] % HOLDERS]
        passed[label] += 1
    return sites
