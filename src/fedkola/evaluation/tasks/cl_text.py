"""Five text classification sets, one a window: the continual-learning benchmark of O-LoRA in part.

Source: AG News, DBpedia, Amazon, Yelp and SST-2 as Wang et al. (O-LoRA, Findings of EMNLP 2023)
distribute them. Yahoo is absent, and so are the test of Yelp and the training set of DBpedia: these
two are split by a hash of the text (``task.test_share``). The orders are ours: those of the paper,
as we recall them, reduced to the sets that are here, the sets that an order lacks at its end. So
figures are *not comparable* with published tables. A question does not say which set it is from,
and the stars of Amazon and Yelp are labels of their own, in scopes of their own.
"""

from collections import Counter
from collections.abc import Mapping
from dataclasses import replace

from fedkola.errors import PlanError, UnknownName
from fedkola.evaluation.tasks import corpora
from fedkola.evaluation.tasks.corpora import TEST, TRAIN, Row
from fedkola.evaluation.tasks.tables import nearest
from fedkola.knowledge.stream import Stream, deal, hash_share, numbered
from fedkola.plan import Task
from fedkola.types import Catalogue, Label

NAME = "cl_benchmark"
LEVELS = ("label", "set")
SETS: Mapping[str, tuple[str, str]] = {
    "agnews": ("agnews_train", "agnews_dev"),
    "amazon": ("amazon_train", "amazon_dev"),
    "dbpedia": ("dbpedia_dev", ""),
    "sst-2": ("sst-2_train", "sst-2_dev"),
    "yelp": ("yelp_train", ""),
}
ORDERS: Mapping[str, tuple[str, ...]] = {
    "order-1": ("dbpedia", "amazon", "agnews", "yelp", "sst-2"),
    "order-3": ("amazon", "agnews", "dbpedia", "yelp", "sst-2"),
    "order-4": ("yelp", "amazon", "sst-2", "dbpedia", "agnews"),
    "order-5": ("sst-2", "dbpedia", "agnews", "yelp", "amazon"),
}


def load(task: Task, *, seed: int) -> Stream:
    """The stream of sets; reads ``level``, ``sites``, ``partition``, ``order`` (a name of ORDERS,
    or sets separated by commas), ``test_share`` and ``per_label``. There are as many windows as
    sets in the order; ``windows`` is not read."""
    if task.level not in ("", *LEVELS):
        raise PlanError(f"task.level = {task.level!r} is no level of cl-text; set one of {LEVELS}")
    if not 0 < task.test_share < 1:
        raise PlanError(f"task.test_share = {task.test_share}; set a share between 0 and 1")
    sets = order(task)
    excluded = {TRAIN: Counter[str](), TEST: Counter[str]()}
    train: list[Row] = []
    test: list[Row] = []
    for number, name in enumerate(sets, start=1):
        own, asked = _set(task, name, excluded)
        train += [replace(row, window=number) for row in own]
        test += corpora.unseen(own, asked, excluded[TEST])
    train, test, notices = corpora.capped(train, test, per_label=task.per_label, seed=seed)
    names = numbered(task.sites)
    drawn = deal([row.label for row in train], names, partition=task.partition, seed=seed)
    codes = dict.fromkeys(row.label for row in (*train, *test))
    return corpora.stream(
        catalogue=Catalogue(
            system="cl-text",
            levels=LEVELS,
            labels=tuple(
                Label(code=code, path=(code, code.split("/")[0]), scope=f"cl-text/{_set_of(code)}")
                for code in sorted(codes, key=lambda code: (sets.index(_set_of(code)), code))
            ),
            texts={code: code.split("/", 1)[1] for code in codes},
        ),
        specialties=dict.fromkeys(names, f"simulated, {task.partition}"),
        train=[replace(row, site=site) for row, site in zip(train, drawn, strict=True)],
        test=test,
        windows=sets,
        excluded=excluded,
        notices=notices,
    )


def order(task: Task) -> tuple[str, ...]:
    """The sets in the order in which they arrive; raises UnknownName or PlanError."""
    given = task.order or next(iter(ORDERS))
    sets = ORDERS.get(given) or tuple(part.strip() for part in given.split(","))
    known = {**ORDERS, **SETS}
    for name in sets:
        if name not in SETS:
            raise UnknownName(
                f"task.order names {name!r}; nearest is {nearest(name, known)}; set one of "
                f"{', '.join(ORDERS)}, or sets among {', '.join(SETS)}"
            )
    if len(set(sets)) < len(sets):
        raise PlanError(f"task.order names a set twice: {given}; name each once")
    return sets


def _set_of(code: str) -> str:
    return code.split("/", 1)[0]


def _set(
    task: Task, name: str, excluded: Mapping[str, Counter[str]]
) -> tuple[list[Row], list[Row]]:
    train_file, test_file = SETS[name]
    rows = _rows(task, name, train_file, excluded[TRAIN])
    if test_file:
        return rows, _rows(task, name, test_file, excluded[TEST])
    held_out = [row for row in rows if hash_share(row.text) < task.test_share]
    return [row for row in rows if hash_share(row.text) >= task.test_share], held_out


def _rows(task: Task, name: str, file: str, excluded: Counter[str]) -> list[Row]:
    read = corpora.read(corpora.folder(task, NAME) / f"{file}.jsonl.gz", "text", "label")
    return [
        Row(record=f"{file}-{i + 1}", text=text, label=f"{name}/{label}")
        for i, text, label in corpora.admitted(read, excluded, text="text", label="label")
    ]
