from collections import Counter

import pytest

from fedkola.errors import DataError, PlanError
from fedkola.evaluation.tasks import questions, realtimeqa, situatedqa
from fedkola.evaluation.tasks.questions import Told, versions
from fedkola.knowledge.stream import Stream
from fedkola.plan import Task


def told(answer: str, window: int, site: str = "north") -> Told:
    return Told(question="who", answer=answer, site=site, window=window)


def test_a_question_has_a_version_for_every_change_of_its_answer():
    found = versions([told("Ann", 1), told("ann", 2), told("Bo", 4), told("Ann", 6)])
    assert [(v.told.answer, v.window, v.last, v.stale) for v in found] == [
        ("Ann", 1, 3, ()),
        ("Bo", 4, 5, ("ann",)),
        ("Ann", 6, None, ("bo",)),
    ]


def test_of_two_answers_in_one_window_the_later_told_counts():
    assert [v.told.answer for v in versions([told("Ann", 2), told("Bo", 2)])] == ["Bo"]


def row(question: str, date: str, *answers: str) -> dict[str, object]:
    return {"question": question, "date": date, "answer": list(answers)}


TRAIN = [
    row("who leads", "2015", "Ann"),
    row("who leads", "March 21, 2020", "Bo"),
    row("who leads", "2020", "Ann"),
    row("who leads", "2021", "Bo", "Cy"),
    row("what river", "1990", "Nile"),
    row("what river", "2021", "nile", "Amazon", "Amazon"),
    row("who won", "2021", "Di", "Ed", "ed"),
    row("who knows", "some day", "Flo"),
    row("who else", "2020"),
]


@pytest.fixture
def situated(corpus):
    return corpus({"train.jsonl.gz": TRAIN, "dev.jsonl.gz": [row("what year", "2019", "2018")]})


def load(folder: str, **keys: object) -> Stream:
    task = Task(name="situatedqa", folder=folder, **{"sites": 3, "windows": 4, **keys})
    return situatedqa.load(task, seed=1)


def by_text(stream: Stream, text: str) -> dict[str, tuple[str, int, int | None]]:
    test = stream.test
    return {
        test.records[i]: (test.labels[i], test.windows[i], stream.ends.get(test.records[i]))
        for i in range(len(test))
        if test.questions[i] == text
    }


def test_an_answer_is_asked_while_it_is_right_and_stale_afterwards(situated):
    stream = load(situated)
    assert stream.windows == ("until 2018", "2019", "2020", "2021")
    found = by_text(stream, "who leads")
    assert list(found.values()) == [("ann", 1, 2), ("bo", 3, None)]
    first, second = found
    assert stream.stale == {second: ("ann",)}
    assert {stream.concepts[record] for record in (first, second)} == {"evolved"}


def test_a_changed_answer_is_a_revision_of_the_record_that_the_site_holds(situated):
    stream = load(situated)
    revised = [
        (site, record, count)
        for site, data in stream.sites.items()
        for record, count in Counter(data.records).items()
        if count > 1
    ]
    ((site, record, count),) = revised
    assert count == 2
    data = stream.sites[site]
    rows = [i for i, name in enumerate(data.records) if name == record]
    assert [(data.labels[i], data.windows[i]) for i in rows] == [("ann", 1), ("bo", 3)]
    assert record == questions.identifier("Who  leads")


def test_an_answer_that_stays_among_the_right_ones_has_not_changed(situated):
    stream = load(situated)
    assert list(by_text(stream, "what river").values()) == [("nile", 1, None)]
    assert list(by_text(stream, "who won").values()) == [("ed", 4, None)]
    concepts = {text: stream.concepts[next(iter(by_text(stream, text)))] for text in
                ("what river", "who won", "what year")}  # fmt: skip
    assert concepts == {"what river": "stable", "who won": "uncharted", "what year": "uncharted"}


def test_rows_without_a_date_or_an_answer_are_counted(situated):
    assert load(situated).excluded == {"train": {"bad date": 1, "no answer": 1}}


def test_a_language_model_learns_the_answer_after_the_question(situated):
    stream = load(situated)
    (second,) = stream.stale
    assert [stream.catalogue.texts[code] for code in stream.stale[second]] == ["Ann"]
    answers = dict(zip(stream.test.records, stream.test.texts, strict=True))
    assert answers[second] == "Bo"
    assert {len(data.prompts) == len(data) for data in stream.sites.values()} == {True}


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("2018", (2018, 0, 0)),
        ("March 07, 2021", (2021, 3, 7)),
        ("Marz 7, 2021", None),
        ("2021-03-07", None),
        ("", None),
    ],
)
def test_a_date_is_read_or_refused(text, found):
    assert situatedqa.date(text) == found


def test_no_usable_question_is_refused(corpus):
    files = {"train.jsonl.gz": TRAIN[-2:], "dev.jsonl.gz": TRAIN[-1:]}
    with pytest.raises(DataError, match="no usable question"):
        load(corpus(files))


def test_the_real_questions_change_as_their_authors_count(real):
    stream = load(real("situatedqa_temporal"), sites=12, windows=8)
    assert len({record.split("@")[0] for record in stream.test.records}) == 3_845
    assert set(Counter(stream.concepts.values())) == {"stable", "evolved", "uncharted"}
    assert len(stream.stale) >= 600
    for record, last in stream.ends.items():
        assert last < 8, record


QUIZ = [
    {
        "date": f"2021-0{month}-05",
        "source": source,
        "question": f"what happened in {place}?",
        "choices": ["War", "Peace", "Nothing"],
        "answer": [answer],
    }
    for month, source, place, answer in [
        (1, "CNN", "Rome", "War"),
        (2, "THE WEEK", "Rome", "Peace"),
        (5, "CNN", "Rome", "Peace"),
        (5, "USAtoday", "Oslo", "Nothing"),
        (6, "BBC", "Oslo", "Nothing"),
    ]
]


def quiz(folder: str, **keys: object) -> Stream:
    task = Task(name="realtimeqa", folder=folder, **{"period": "quarter", **keys})
    return realtimeqa.load(task, seed=1)


def test_each_source_hears_of_its_own_news_and_the_newest_answer_is_true(corpus):
    stream = quiz(corpus({realtimeqa.FILE: QUIZ}))
    assert stream.windows == ("2021-Q1", "2021-Q2")
    assert list(zip(stream.sites["cnn"].labels, stream.sites["cnn"].windows, strict=True)) == [
        ("war", 1),
        ("peace", 2),
    ]
    assert stream.sites["cnn"].prompts[0] == "what happened in Rome?"
    assert list(by_text(stream, "what happened in Rome?").values()) == [("peace", 1, None)]
    assert set(stream.choices.values()) == {("War", "Peace", "Nothing")}
    assert stream.excluded == {"train": {"unknown source": 1}}


def test_a_level_that_is_none_is_refused(corpus):
    with pytest.raises(PlanError, match="no level"):
        quiz(corpus({realtimeqa.FILE: QUIZ}), level="block")


def test_the_real_quizzes_are_all_used(real):
    stream = quiz(real("realtimeqa"))
    assert len(stream.windows) == 16
    assert len(stream.test) == 5_100
    assert set(stream.choices) == set(stream.test.records)
    answered = zip(stream.test.records, stream.test.texts, strict=True)
    missing = sum(answer not in stream.choices[record] for record, answer in answered)
    assert missing <= 5
