from collections import Counter, defaultdict

import pytest

from fedkola.errors import DataError, PlanError
from fedkola.evaluation.tasks import clinc150
from fedkola.knowledge.stream import Stream
from fedkola.plan import Task

DOMAINS = {"bank": ("balance", "transfer"), "home": ("lights", "music"), "work": ("leave", "pay")}


def rows(count: int, start: int = 0) -> list[dict[str, str]]:
    return [
        {"text": f"{intent} question {i}", "intent": intent, "domain": domain}
        for domain, intents in DOMAINS.items()
        for intent in intents
        for i in range(start, start + count)
    ]


@pytest.fixture
def folder(corpus):
    oos = [{"text": f"odd question {i}", "intent": "oos", "domain": "oos"} for i in range(4)]
    test = [*rows(2, start=9), {"text": "pay question 0", "intent": "pay", "domain": "work"}]
    files = {"train.jsonl.gz": rows(9), "test.jsonl.gz": test, "oos_test.jsonl.gz": oos}
    return corpus(files)


def load(folder: str, seed: int = 1, **keys: object) -> Stream:
    task = Task(name="clinc150", folder=folder, **{"sites": 5, "windows": 3, **keys})
    return clinc150.load(task, seed=seed)


def test_a_domain_is_at_three_sites_that_share_every_intent_equally(folder):
    stream = load(folder)
    held = Counter((label, site) for site, data in stream.sites.items() for label in data.labels)
    assert set(held.values()) == {3}
    homes = defaultdict(set)
    for label, site in held:
        homes[label].add(site)
    assert all(len(sites) == 3 for sites in homes.values())
    assert homes["balance"] == homes["transfer"]
    records = [record for data in stream.sites.values() for record in data.records]
    assert len(records) == len(set(records)) == 54


def test_a_domain_arrives_at_once_and_two_windows_bring_two_domains(folder):
    stream = load(folder, windows=2)
    window = {
        label: w
        for data in stream.sites.values()
        for label, w in zip(data.labels, data.windows, strict=True)
    }
    assert Counter(window.values()) in (Counter({1: 4, 2: 2}), Counter({1: 2, 2: 4}))
    assert any(" and " in name for name in stream.windows)
    asked = dict(zip(stream.test.labels, stream.test.windows, strict=True))
    assert asked == window


def test_a_question_that_is_trained_on_is_not_asked(folder):
    stream = load(folder)
    assert stream.excluded == {"test": {"text of a training record": 1}}
    assert len(stream.test) == 12


def test_seeds_differ_and_repeat(folder):
    assert load(folder) == load(folder)
    assert load(folder).sites != load(folder, seed=2).sites


def test_questions_out_of_scope_stand_apart_without_a_label(folder):
    found = clinc150.out_of_scope(Task(name="clinc150", folder=folder))
    assert (len(found), set(found.labels), set(found.windows)) == (4, {""}, {1})


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"sites": 2}, "set 3 or more"),
        ({"windows": 4}, "windows from 1 to 3"),
        ({"level": "block"}, "no level"),
    ],
)
def test_what_cannot_be_built_is_refused(folder, keys, message):
    with pytest.raises(PlanError, match=message):
        load(folder, **keys)


def test_an_intent_that_nothing_teaches_is_refused(corpus):
    test = [{"text": "t", "intent": "dance", "domain": "home"}]
    with pytest.raises(DataError, match="dance"):
        load(corpus({"train.jsonl.gz": rows(3), "test.jsonl.gz": test}))


def test_the_real_corpus_has_its_published_sizes(real):
    stream = load(real("clinc150"), sites=12, windows=10)
    assert len(stream.catalogue.labels) == 150
    assert sum(len(data) for data in stream.sites.values()) == 15_000
    assert len(stream.test) == 4_498  # Two of the 4,500 are training texts.
    assert {len(told["scopes"]) for told in stream.about.values()} == {2, 3}
    assert len(clinc150.out_of_scope(Task(name="clinc150", folder=real("clinc150")))) == 1_000
