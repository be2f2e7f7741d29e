from collections import Counter

import pytest

from fedkola.errors import PlanError, UnknownName
from fedkola.evaluation.tasks import cl_text
from fedkola.knowledge.stream import Stream
from fedkola.plan import Task

FILES = sorted({file for pair in cl_text.SETS.values() for file in pair if file})


def rows(file: str, count: int = 40) -> list[dict[str, str]]:
    return [{"text": f"{file} {i}", "label": ("good", "bad")[i % 2]} for i in range(count)]


@pytest.fixture
def folder(corpus):
    files = {f"{file}.jsonl.gz": rows(file) for file in FILES}
    files["agnews_dev.jsonl.gz"].append({"text": "agnews_train 0", "label": "good"})
    files["amazon_dev.jsonl.gz"].append({"text": " ", "label": "good"})
    return corpus(files)


def load(folder: str, **keys: object) -> Stream:
    return cl_text.load(Task(name="cl-text", folder=folder, **{"sites": 4, **keys}), seed=1)


def test_each_set_arrives_in_its_window_in_the_order_asked_for(folder):
    stream = load(folder, order="order-5")
    assert stream.windows == ("sst-2", "dbpedia", "agnews", "yelp", "amazon")
    found = {
        (label.split("/")[0], window)
        for data in (*stream.sites.values(), stream.test)
        for label, window in zip(data.labels, data.windows, strict=True)
    }
    assert found == {(name, n) for n, name in enumerate(stream.windows, start=1)}


def test_equal_labels_of_two_sets_are_two_labels_in_two_scopes(folder):
    labels = {label.code: label for label in load(folder).catalogue.labels}
    assert labels["amazon/good"].scope == "cl-text/amazon"
    assert labels["yelp/good"].path == ("yelp/good", "yelp")
    assert len(labels) == 10


def test_a_set_without_a_test_is_split_by_its_texts_alike_for_every_seed(folder):
    stream, again = load(folder), load(folder, order="yelp,dbpedia", sites=3)
    held = {record for data in stream.sites.values() for record in data.records}
    assert not held & set(stream.test.records)
    split = {record for record in stream.test.records if record.startswith("yelp")}
    assert 0 < len(split) < 20
    assert split == {record for record in again.test.records if record.startswith("yelp")}


def test_a_test_text_that_is_trained_on_and_an_empty_one_are_counted(folder):
    assert load(folder).excluded == {"test": {"empty text": 1, "text of a training record": 1}}


def test_every_record_is_at_one_site_whatever_the_partition(folder):
    for partition in ("iid", "by-label", "dirichlet:0.1"):
        stream = load(folder, partition=partition)
        records = [record for data in stream.sites.values() for record in data.records]
        assert len(records) == len(set(records))
        assert len(records) == 200 - sum(
            record.startswith(("yelp", "dbpedia")) for record in stream.test.records
        )


@pytest.mark.parametrize(
    ("keys", "error", "message"),
    [
        ({"order": "order-9"}, UnknownName, "nearest is order-"),
        ({"order": "yelp,agnew"}, UnknownName, "nearest is agnews"),
        ({"order": "yelp,yelp"}, PlanError, "twice"),
        ({"test_share": 1.0}, PlanError, "between 0 and 1"),
        ({"level": "stars"}, PlanError, "no level"),
    ],
)
def test_what_cannot_be_built_is_refused(folder, keys, error, message):
    with pytest.raises(error, match=message):
        load(folder, **keys)


def test_every_order_has_every_set_once():
    assert all(sorted(sets) == sorted(cl_text.SETS) for sets in cl_text.ORDERS.values())


def test_the_real_sets_have_their_labels_and_sizes(real):
    stream = load(real("cl_benchmark"), partition="dirichlet:0.5", sites=12)
    labels = Counter(label.scope for label in stream.catalogue.labels)
    assert labels == {
        "cl-text/agnews": 4,
        "cl-text/amazon": 5,
        "cl-text/dbpedia": 14,
        "cl-text/sst-2": 2,
        "cl-text/yelp": 5,
    }
    trained = sum(len(data) for data in stream.sites.values())
    excluded = sum(count for counts in stream.excluded.values() for count in counts.values())
    assert trained + len(stream.test) + excluded == 39_672
