from collections import Counter
from pathlib import Path

import pytest

from fedkola.errors import DataError
from fedkola.evaluation import tasks
from fedkola.evaluation.tasks import corpora
from fedkola.evaluation.tasks.corpora import Row
from fedkola.plan import Plan, Task

OF_CORPORA = [name for name in tasks.TASKS if name not in ("files", "icd10cm", "facts")]


@pytest.mark.parametrize("name", OF_CORPORA)
def test_a_corpus_that_is_not_there_says_what_to_set(name, monkeypatch):
    monkeypatch.delenv(corpora.DATA, raising=False)
    with pytest.raises(DataError, match=r"set task\.folder .* or FEDKOLA_DATA"):
        tasks.load(Plan(task=Task(name=name, windows=3)))


def test_a_folder_that_is_none_names_the_key_that_is_wrong(monkeypatch, tmp_path):
    monkeypatch.setenv(corpora.DATA, str(tmp_path))
    with pytest.raises(DataError, match=r"medquad is no folder.*correct FEDKOLA_DATA"):
        corpora.folder(Task(name="medquad"), "medquad")
    with pytest.raises(DataError, match=r"correct task\.folder"):
        corpora.folder(Task(name="medquad", folder=str(tmp_path / "x")), "medquad")


def test_the_folder_of_the_task_goes_before_the_environment(monkeypatch, tmp_path):
    monkeypatch.setenv(corpora.DATA, "/nowhere")
    assert corpora.folder(Task(folder=str(tmp_path)), "medquad") == Path(tmp_path)


def test_a_record_without_a_patient_is_withdrawn_by_itself():
    rows = [
        Row(record="b", text="2", label="x", window=2, patient="p"),
        Row(record="a", text="1", label="x", window=1),
    ]
    data = corpora.dataset(rows)
    assert (data.records, data.patients, data.prompts) == (("a", "b"), ("a", "p"), ())


def test_a_test_text_that_is_trained_on_is_left_out_and_counted():
    train = [Row(record="a", text="same", label="x")]
    test = [Row(record="b", text="same", label="y"), Row(record="c", text="other", label="x")]
    excluded = Counter()
    assert [row.record for row in corpora.unseen(train, test, excluded)] == ["c"]
    assert excluded == {"text of a training record": 1}


@pytest.mark.parametrize("text", ["2021-02-29", "2021-2-9", "20210209", "", "yesterday!"])
def test_what_is_no_date_is_told(text):
    assert not corpora.is_date(text)
    assert corpora.is_date("2020-02-29")
