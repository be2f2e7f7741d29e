"""``fedkola site check`` on files as sites have them: card, codes, exit code, no text outside."""

import csv
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from fedkola.cli import main

ROWS = [
    ["r1", "Fever since three days and some cough.", "J20", "2024-01-03"],
    ["r2", "Pain of the left arm after a fall.", "S52", "2024-02-03"],
    ["r3", "Headache, worse in bright light.", "G43", "2023-02-03"],
]
BAD = [
    ["b1", "Headache, worse in bright light.", "S52", "2024-03-03"],
    ["b2", "Schr\u00c3\u00b6der, <script>alert('x')</script>", "G43", "2024-03-04"],
    ["b3", "A visit without a code.", "", "2024-03-05"],
    ["b4", "", "G43", "2024-03-06"],
    ["b5", "A visit to come.", "G43", "2999-03-06"],
]
OPTIONS = ("--text", "note", "--label", "code", "--record", "id", "--time", "seen")


def written(folder: Path, rows: Sequence[Sequence[str]], name: str = "notes.csv") -> Path:
    path = folder / name
    with path.open("w", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows([["id", "note", "code", "seen"], *rows])
    return path


def check(capsys: Any, *arguments: object) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as ended:
        main(["site", "check", *map(str, arguments)])
    printed = capsys.readouterr()
    return int(ended.value.code or 0), printed.out, printed.err


def test_good_records_exit_0_and_have_a_card(tmp_path, capsys):
    out = tmp_path / "cards" / "card.html"
    rc, printed, _ = check(capsys, written(tmp_path, ROWS), *OPTIONS, "--out", out)
    assert rc == 0
    assert "All 3 records are ready: no check found anything." in printed
    doc = json.loads(out.with_suffix(".json").read_text("utf-8"))
    assert (doc["version"], doc["ok"], doc["ready"], doc["findings"]) == (1, True, 3, [])
    assert doc["dates"]["first"] == "2023-02-03"
    assert "All 3 records are ready" in out.read_text("utf-8")


def test_bad_records_exit_3_each_under_its_reason(tmp_path, capsys):
    out = tmp_path / "card.html"
    labels = tmp_path / "labels.txt"
    labels.write_text("J20\nS52\n", "utf-8")
    data = written(tmp_path, [*ROWS, *BAD])
    rc, printed, _ = check(capsys, data, *OPTIONS, "--labels", labels, "--out", out, "--json")
    assert rc == 3
    doc = json.loads(printed)
    assert doc["unusable"] == {"empty text": 1}
    found = {
        finding["code"]: [example["record"] for example in finding["examples"]]
        for finding in doc["findings"]
    }
    assert found == {
        "CONTRADICTS_TWIN": ["r3", "b1"],
        "EMPTY_TARGET": ["b3"],
        "GARBLED": ["b2"],
        "UNKNOWN_LABEL": ["r3", "b2", "b5"],
        "BAD_DATE": ["b5"],
    }
    assert doc["rows"] == 8
    assert doc["ready"] + doc["to_fix"] + doc["to_look_at"] == doc["records"] == 7
    assert json.loads(out.with_suffix(".json").read_text("utf-8"))["findings"] == doc["findings"]


def test_a_tolerated_share_is_no_failure(tmp_path, capsys):
    data = written(tmp_path, [*ROWS, BAD[2]])
    out = tmp_path / "card.html"
    assert check(capsys, data, *OPTIONS, "--out", out)[0] == 3
    assert check(capsys, data, *OPTIONS, "--out", out, "--tolerate", "0.25")[0] == 0


def test_the_page_is_one_file_and_escapes_what_records_say(tmp_path, capsys):
    out = tmp_path / "card.html"
    check(capsys, written(tmp_path, [*ROWS, *BAD]), *OPTIONS, "--out", out)
    page = out.read_text("utf-8")
    assert "<script" not in page
    assert "&lt;script&gt;" in page
    assert not re.search(r"(?:src|href)=\"(?!#)", page)
    assert "http" not in page.replace("http-equiv", "")


def test_a_card_without_quotes_holds_no_text_and_no_label_of_a_record(tmp_path, capsys):
    out = tmp_path / "card.html"
    data = written(tmp_path, [*ROWS, *BAD])
    check(capsys, data, *OPTIONS, "--out", out, "--no-quotes")
    for path in (out, out.with_suffix(".json")):
        said = path.read_text("utf-8")
        assert "CONTRADICTS_TWIN" in said
        for secret in ("Headache", "Schr", "alert", "G43", "S52", "without a code"):
            assert secret not in said


def test_questions_and_answers_of_several_files_are_checked(tmp_path, capsys):
    for name, answer in (("a", "Rest and drink."), ("b", "Go to a doctor.")):
        rows = [{"question": "What helps with fever?", "answer": answer}]
        rows += [{"question": f"What is {name}{i}?", "answer": f"{name} {i}."} for i in range(3)]
        lines = "\n".join(json.dumps(row) for row in rows)
        (tmp_path / f"{name}.jsonl").write_text(lines, "utf-8")
    rc, printed, _ = check(
        capsys,
        tmp_path / "*.jsonl",
        *("--text", "question", "--label", "answer", "--out", tmp_path / "card.html", "--json"),
    )
    doc = json.loads(printed)
    assert rc == 3
    assert [file["name"] for file in doc["files"]] == ["a.jsonl", "b.jsonl"]
    assert [e["record"] for e in doc["findings"][0]["examples"]] == ["a-1", "b-1"]


def test_labels_may_be_a_table_with_their_time(tmp_path, capsys):
    labels = tmp_path / "codes.csv"
    labels.write_text(
        "code,valid_from,valid_to\nJ20,,\nS52,2020-01-01,2024-02-01\nG43,,\n", "utf-8"
    )
    _, printed, _ = check(
        capsys,
        written(tmp_path, ROWS),
        *(*OPTIONS, "--labels", labels, "--out", tmp_path / "card.html", "--json"),
    )
    (finding,) = json.loads(printed)["findings"]
    assert finding["code"] == "UNKNOWN_LABEL"
    assert [(e["record"], e["says"]) for e in finding["examples"]] == [
        ("r2", "Not valid at the record's date.")
    ]


def test_texts_without_labels_or_dates_say_what_was_not_looked_at(tmp_path, capsys):
    _, printed, _ = check(
        capsys,
        written(tmp_path, ROWS),
        *("--text", "note", "--label", "", "--out", tmp_path / "card.html", "--json"),
    )
    skipped = {one["code"]: one["skipped"] for one in json.loads(printed)["checked"]}
    assert skipped["EMPTY_TARGET"] == "needs labels or answers"
    assert skipped["BAD_DATE"] == "needs a column of dates"
    assert skipped["EXACT_DUPLICATE"] == ""


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--text", "nte"), "nearest is note; set --text"),
        (("--text", "note", "--label", "code", "--out", "card.pdf"), "ends in .html"),
        (("--text", "note", "--label", "code", "--labels", "no.txt"), "cannot be read"),
    ],
)
def test_what_cannot_be_checked_is_refused_with_what_to_do(tmp_path, capsys, arguments, message):
    rc, _, err = check(capsys, written(tmp_path, ROWS), *arguments)
    assert rc == 3
    assert err.startswith("DataError: ")
    assert message in err


def test_a_file_that_is_not_there_is_refused(tmp_path, capsys):
    rc, _, err = check(capsys, tmp_path / "none.csv")
    assert rc == 3
    assert "none.csv" in err
    rc, _, err = check(capsys, tmp_path / "none*.csv")
    assert "no file matches" in err
