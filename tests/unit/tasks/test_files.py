import json
import os
from collections import Counter
from pathlib import Path

import pytest

from fedkola.errors import DataError, Incompatible, PlanError
from fedkola.evaluation.tasks import files
from fedkola.knowledge.stream import Stream, hash_share
from fedkola.plan import Task

DATA = Path(os.environ.get("FEDKOLA_DATA", Path(__file__).parents[4] / "shared" / "data"))


def data(path: str) -> str:
    if not (DATA / path).exists():
        pytest.skip(f"{path} is not in FEDKOLA_DATA or ../shared/data")
    return str(DATA / path)


def save(path: Path, rows: list[dict[str, object]]) -> str:
    path.parent.mkdir(exist_ok=True, parents=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def notes(count: int, **columns: object) -> list[dict[str, object]]:
    """Records with labels A, B, C in turn; a column is a value or a function of the number."""
    return [
        {"text": f"note {i}", "label": "ABC"[i % 3]}
        | {name: value(i) if callable(value) else value for name, value in columns.items()}
        for i in range(count)
    ]


@pytest.fixture
def test_file(tmp_path):
    return save(
        tmp_path / "test.jsonl", [{"text": f"ask {i}", "label": "ABC"[i]} for i in range(3)]
    )


def load(train: str, test: str = "", **keys: object) -> Stream:
    return files.load(Task(name="files", train=train, test=test, **keys), seed=7)


def size(stream: Stream) -> int:
    return sum(len(own) for own in stream.sites.values())


# --- real data ------------------------------------------------------------------------------------


def test_symptoms_become_a_federation_with_nothing_but_a_file():
    stream = load(data("symptom2disease/all.jsonl.gz"), sites=5, windows=3)

    assert size(stream) + len(stream.test) == 1_200
    assert len(stream.catalogue.labels) == 24
    assert stream.catalogue.scopes() == ("all",)
    assert list(stream.sites) == ["site-1", "site-2", "site-3", "site-4", "site-5"]
    assert len(stream.test) == pytest.approx(240, abs=40)
    assert stream.excluded == {}
    assert max(map(len, stream.sites.values())) - min(map(len, stream.sites.values())) <= 1


def test_equal_texts_of_symptoms_stay_on_one_side_of_the_split():
    stream = load(data("symptom2disease/all.jsonl.gz"))
    train = {text for own in stream.sites.values() for text in own.texts}

    assert not train & set(stream.test.texts)


def test_abstracts_arrive_label_by_label():
    stream = load(data("medical_abstracts/test_split.jsonl.gz"), window="label", sites=4)
    arrival = {
        (label, window)
        for own in stream.sites.values()
        for label, window in zip(own.labels, own.windows, strict=True)
    }

    assert size(stream) + len(stream.test) == 2_888
    assert len(arrival) == 5
    assert {window for _, window in arrival} == set(range(1, 6))
    assert set(zip(stream.test.labels, stream.test.windows, strict=True)) == arrival
    assert "5 labels arrive over 5 windows, not over task.windows = 8" in stream.notices


# --- sites ----------------------------------------------------------------------------------------


def test_a_column_gives_the_sites(tmp_path, test_file):
    train = save(
        tmp_path / "a.jsonl", notes(9, site=lambda i: ["WHO Europe", "who-europe", "Río"][i // 3])
    )

    stream = load(train, test_file, site="site")

    assert {name: len(own) for name, own in stream.sites.items()} == {
        "rio": 3,
        "who-europe": 3,
        "who-europe-2": 3,
    }
    assert stream.about["rio"] == {"specialty": "Río", "scopes": ("a",)}


def test_each_file_of_a_pattern_is_a_site(tmp_path, test_file):
    for site in ("north", "south"):
        save(tmp_path / "parts" / f"{site}.jsonl", notes(6))

    stream = load(str(tmp_path / "parts" / "*.jsonl"), test_file)

    assert {name: len(own) for name, own in stream.sites.items()} == {"north": 6, "south": 6}
    assert stream.catalogue.scopes() == ("parts",)
    assert stream.sites["north"].records == tuple(f"north-{i}" for i in range(1, 7))


def test_files_of_one_name_are_told_apart_by_their_folders(tmp_path, test_file):
    for site in ("north", "south"):
        save(tmp_path / site / "notes.jsonl", notes(6))

    stream = load(str(tmp_path / "*" / "notes.jsonl"), test_file)

    assert list(stream.sites) == ["north-notes", "south-notes"]


@pytest.mark.parametrize("partition", ["iid", "by-label", "dirichlet:0.5", "dirichlet:0.0001"])
def test_a_simulated_split_keeps_every_record_once(tmp_path, test_file, partition):
    train = save(tmp_path / "a.jsonl", notes(60))

    stream = load(train, test_file, sites=4, partition=partition)
    records = [record for own in stream.sites.values() for record in own.records]

    assert sorted(records) == sorted(f"a-{i}" for i in range(1, 61))
    assert list(stream.sites) == ["site-1", "site-2", "site-3", "site-4"]
    assert stream == load(train, test_file, sites=4, partition=partition)


def test_by_label_gives_a_site_its_own_labels(tmp_path, test_file):
    train = save(tmp_path / "a.jsonl", notes(60))

    few = load(train, test_file, sites=2, partition="by-label")
    many = load(train, test_file, sites=6, partition="by-label")

    assert sorted(len(set(own.labels)) for own in few.sites.values()) == [1, 2]
    assert [len(set(own.labels)) for own in many.sites.values()] == [1] * 6
    assert [len(own) for own in many.sites.values()] == [10] * 6


def test_a_site_of_one_label_and_one_of_none_are_noticed_not_refused(tmp_path, test_file):
    rows = [*notes(9, site="north"), {"text": "x", "label": "A", "site": "south"}]
    rows.append({"text": "", "label": "A", "site": "west"})

    stream = load(save(tmp_path / "a.jsonl", rows), test_file, site="site")

    assert "south holds one label only: A" in stream.notices
    assert "west has no training record" in stream.notices
    assert len(stream.sites["west"]) == 0
    assert stream.excluded == {"west": {"empty text": 1}}


# --- windows --------------------------------------------------------------------------------------


def windows_of(stream: Stream) -> dict[str, int]:
    return {
        text: window
        for own in stream.sites.values()
        for text, window in zip(own.texts, own.windows, strict=True)
    }


def test_records_arrive_in_their_order_where_nothing_else_is_said(tmp_path, test_file):
    stream = load(save(tmp_path / "a.jsonl", notes(12)), test_file, windows=4)

    assert windows_of(stream) == {f"note {i}": 1 + i // 3 for i in range(12)}
    assert stream.windows == ("window 1", "window 2", "window 3", "window 4")


def test_each_site_has_an_order_of_its_own(tmp_path, test_file):
    train = save(tmp_path / "a.jsonl", notes(12, site=lambda i: "ab"[i // 6]))

    stream = load(train, test_file, windows=2, site="site")

    assert [own.windows for own in stream.sites.values()] == [(1, 1, 1, 2, 2, 2)] * 2


@pytest.mark.parametrize(
    "time",
    [
        lambda i: f"2026-01-{12 - i:02d}",
        lambda i: f"2026-01-01T{12 - i:02d}:30:00Z",
        lambda i: 2012 - i,
        lambda i: str(0.5 - i),
    ],
)
def test_dates_and_numbers_sort_records_into_equal_windows(tmp_path, test_file, time):
    stream = load(
        save(tmp_path / "a.jsonl", notes(12, when=time)), test_file, windows=4, time="when"
    )

    assert windows_of(stream) == {f"note {i}": 4 - i // 3 for i in range(12)}
    assert stream.windows[0] == f"from {str(time(11))[:10]}"


def test_records_of_one_moment_stay_in_one_window_and_the_empty_one_is_kept(tmp_path, test_file):
    train = save(tmp_path / "a.jsonl", notes(8, when=lambda i: 2020 if i < 6 else 2021))

    stream = load(train, test_file, windows=4, time="when")

    assert Counter(windows_of(stream).values()) == {1: 6, 4: 2}
    assert stream.windows == ("from 2020", "window 2", "window 3", "from 2021")
    assert "windows without a record, kept: window 2, window 3" in stream.notices


def test_a_record_without_a_date_is_counted(tmp_path, test_file):
    when = ["2026-01-01", "yesterday", None, "2026", "2026-02-01", "2026-03-01"]

    train = save(tmp_path / "a.jsonl", notes(6, when=lambda i: when[i]))
    stream = load(train, test_file, time="when", windows=2)

    assert size(stream) == 3
    assert stream.excluded == {"train": {"bad date": 3}}


def test_a_column_of_windows_is_taken_as_it_is_and_a_gap_stays_a_window(tmp_path, test_file):
    train = save(tmp_path / "a.jsonl", notes(6, year=lambda i: [1998, 1996, 1999][i % 3]))

    stream = load(train, test_file, window="year")

    assert stream.windows == ("1996", "1997", "1998", "1999")
    assert windows_of(stream)["note 1"] == 1
    assert "windows without a record, kept: 1997" in stream.notices


def test_names_of_windows_sort_as_text(tmp_path, test_file):
    train = save(tmp_path / "a.jsonl", notes(6, month=lambda i: ["2026-02", "2026-01"][i % 2]))

    stream = load(train, test_file, window="month")

    assert stream.windows == ("2026-01", "2026-02")
    assert windows_of(stream)["note 0"] == 2


def test_scopes_arrive_whole_where_there_are_several(tmp_path, test_file):
    scope = {"A": "lungs", "B": "lungs", "C": "heart"}
    train = save(tmp_path / "a.jsonl", notes(12, organ=lambda i: scope["ABC"[i % 3]]))

    stream = load(train, test_file, window="label", scope="organ", windows=2)
    windows = windows_of(stream)

    assert stream.catalogue.scopes() == ("lungs", "heart")
    assert windows["note 0"] == windows["note 1"] != windows["note 2"]


# --- labels, patients, test -----------------------------------------------------------------------


def test_labels_of_the_plan_are_the_catalogue(tmp_path, test_file):
    train = save(tmp_path / "a.jsonl", notes(9))

    stream = load(train, test_file, labels=("B", "A", "Z"))

    assert stream.catalogue.codes() == ("B", "A", "Z")
    assert stream.excluded == {"test": {"unknown label": 1}, "train": {"unknown label": 3}}
    assert stream.notices[0] == "labels of the plan without a training record: Z"


def test_an_unknown_label_in_the_test_is_counted(tmp_path):
    train = save(tmp_path / "a.jsonl", notes(9))
    test = save(tmp_path / "t.jsonl", [{"text": "x", "label": "A"}, {"text": "y", "label": "Q"}])

    stream = load(train, test)

    assert stream.test.labels == ("A",)
    assert stream.excluded == {"test": {"unknown label": 1}}


def test_the_hashed_share_is_the_same_for_every_seed(tmp_path):
    train = save(tmp_path / "a.jsonl", notes(50))
    task = Task(name="files", train=train)

    one, two = files.load(task, seed=1), files.load(task, seed=2)

    assert one.test.texts == two.test.texts
    assert set(one.test.texts) == {
        f"note {i}" for i in range(50) if hash_share(f"note {i}") < task.test_share
    }
    assert one.sites != two.sites


def test_patients_and_records_keep_their_names(tmp_path, test_file):
    rows = notes(4, who=lambda i: ["p1", "p1", "p2", None][i], key=lambda i: 100 + i)

    stream = load(save(tmp_path / "a.jsonl", rows), test_file, patient="who", record="key", sites=1)

    assert stream.sites["site-1"].records == ("100", "101", "102", "103")
    assert stream.sites["site-1"].patients == ("p1", "p1", "p2", "103")
    assert "1 records name no patient" in stream.notices[0]


def test_duplicate_identifiers_count_within_a_site_alone(tmp_path, test_file):
    rows = notes(8, site=lambda i: "ab"[i // 4], key=lambda i: i % 4)
    train = save(tmp_path / "a.jsonl", rows)

    assert load(train, test_file, site="site", record="key").excluded == {}
    assert load(train, test_file, record="key").excluded == {"train": {"duplicate id": 4}}


def test_nothing_is_dropped_in_silence(tmp_path, test_file):
    rows = [
        *notes(6),
        {"text": float("nan"), "label": "A"},
        {"text": None, "label": "A"},
        {"text": " ", "label": "A"},
        {"text": "x", "label": ""},
        {"text": "x", "label": None},
    ]

    stream = load(save(tmp_path / "a.jsonl", rows), test_file)

    assert size(stream) + sum(stream.excluded["train"].values()) == len(rows)


def test_a_cap_is_noticed(tmp_path, test_file):
    stream = load(save(tmp_path / "a.jsonl", notes(30)), test_file, per_label=5)

    assert size(stream) == 15
    assert stream.notices[0] == "task.per_label = 5 leaves out 15 training and 0 test records"


def test_unlabelled_text_needs_no_label_column_and_stands_under_its_scope(tmp_path):
    rows = [{"text": f"once upon a time {i}"} for i in range(40)]

    stream = load(save(tmp_path / "tales.jsonl", rows), unlabelled=True, sites=3, windows=2)

    assert size(stream) + len(stream.test) == 40
    assert stream.catalogue.codes() == ("tales",)
    assert {label for own in stream.sites.values() for label in own.labels} == {"tales"}
    assert stream.about["site-1"]["scopes"] == ("tales",)
    assert set(stream.test.windows) == {1}


# --- refused --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("keys", "error", "message"),
    [
        ({"text": "txt"}, DataError, "no column 'txt'; its columns are text, label; nearest is"),
        ({"label": "labels"}, DataError, "nearest is label; set task.label"),
        ({"patient": "person"}, DataError, "set task.patient"),
        ({"level": "block"}, PlanError, "files have one level"),
        ({"labels": ("A", "A")}, PlanError, "names a label twice"),
        ({"labels": ("Y", "Z")}, DataError, "no usable training record .*9 unknown label"),
        ({"unlabelled": True, "window": "label"}, Incompatible, "no labels to arrive"),
        ({"time": "label"}, DataError, "no usable training record .*9 bad date"),
    ],
)
def test_keys_that_do_not_fit_the_file_are_refused(tmp_path, test_file, keys, error, message):
    with pytest.raises(error, match=message):
        load(save(tmp_path / "a.jsonl", notes(9)), test_file, **keys)


def test_a_label_of_two_scopes_is_refused(tmp_path, test_file):
    train = save(tmp_path / "a.jsonl", notes(9, organ=lambda i: f"organ {i % 2}"))

    with pytest.raises(
        DataError, match="label 'A' stands under the scopes 'organ 0' and 'organ 1'"
    ):
        load(train, test_file, scope="organ")


def test_no_file_no_test_and_no_share_are_refused(tmp_path):
    train = save(tmp_path / "a.jsonl", notes(2))

    with pytest.raises(PlanError, match=r"task.train is empty"):
        load("")
    with pytest.raises(DataError, match="no file matches"):
        load(str(tmp_path / "*.csv"))
    with pytest.raises(DataError, match="cannot be read"):
        load(str(tmp_path / "absent.csv"))
    with pytest.raises(PlanError, match=r"set a share between 0 and 1, or task.test"):
        load(train, test_share=0.0)
    with pytest.raises(DataError, match=r"give task.test, or another task.test_share"):
        load(train, test_share=0.001)


def test_a_test_of_unknown_labels_alone_is_refused_with_the_count(tmp_path):
    train = save(tmp_path / "a.jsonl", notes(9))
    test = save(tmp_path / "t.jsonl", [{"text": "x", "label": "Q"}])

    with pytest.raises(DataError, match="no usable test record: 1 unknown label"):
        load(train, test)
