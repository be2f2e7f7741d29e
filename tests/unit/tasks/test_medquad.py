from collections import Counter, defaultdict

import pytest

from fedkola.errors import DataError, PlanError
from fedkola.evaluation.tasks import medquad
from fedkola.knowledge.stream import Stream
from fedkola.plan import Task


def rows(site: str, articles: int = 10) -> list[dict[str, str]]:
    return [
        {
            "qid": f"{article:03d}-{k}",
            "qtype": kind,
            "question": f"What about the {kind} of disease {article} ?",
            "answer": f"{site} says this on the {kind} of disease {article}.",
        }
        for article in range(articles)
        for k, kind in enumerate(("symptoms", "treatment", "outlook"), start=1)
    ]


@pytest.fixture
def folder(corpus):
    files = {f"{file}.jsonl.gz": rows(site) for site, (file, _) in medquad.SOURCES.items()}
    files["2_GARD_QA.jsonl.gz"][0]["answer"] = ""
    return corpus(files)


def load(folder: str, **keys: object) -> Stream:
    return medquad.load(Task(name="medquad", folder=folder, windows=4, **keys), seed=1)


def test_each_source_is_a_site_and_every_answer_is_somewhere(folder):
    stream = load(folder)
    assert list(stream.sites) == ["cancergov", "gard", "ghr", "mplus", "niddk", "ninds"]
    assert stream.excluded == {"train": {"empty text": 1}}
    assert sum(len(data) for data in stream.sites.values()) + len(stream.test) == 6 * 30 - 1
    assert set(stream.concepts.values()) == set(stream.sites)


def test_an_article_arrives_whole_and_is_withdrawn_as_a_patient_is(folder):
    data = load(folder).sites["ghr"]
    window = defaultdict(set)
    for patient, when in zip(data.patients, data.windows, strict=True):
        window[patient].add(when)
    assert all(len(when) == 1 for when in window.values())
    assert len(window) == 10
    assert set(data.windows) == {1, 2, 3, 4}


def test_the_question_is_the_prompt_of_a_language_model(folder):
    stream = load(folder, unlabelled=True)
    assert stream.catalogue.codes() == ("medquad",)
    assert stream.test.prompts[0].startswith("What about the")
    assert all(len(data.prompts) == len(data) for data in stream.sites.values())
    assert load(folder).test.prompts == ()


def test_what_cannot_be_built_is_refused(folder, tmp_path):
    with pytest.raises(PlanError, match="between 0 and 1"):
        load(folder, test_share=0.0)
    (tmp_path / "3_GHR_QA.jsonl.gz").unlink()
    with pytest.raises(DataError, match="cannot be read"):
        load(folder)


def test_a_file_with_other_columns_is_refused(corpus):
    files = {f"{file}.jsonl.gz": [{"qid": "1-1"}] for file, _ in medquad.SOURCES.values()}
    with pytest.raises(DataError, match="has no column 'qtype', only qid"):
        load(corpus(files))


def test_the_real_corpus_has_its_published_sizes(real):
    stream = load(real("medquad"))
    assert sum(len(data) for data in stream.sites.values()) + len(stream.test) == 14_809
    kinds = Counter(label for data in stream.sites.values() for label in data.labels)
    assert len(kinds) == 15
    assert set(stream.sites["mplus"].labels) == {"information"}
