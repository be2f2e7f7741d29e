"""Bad input through the command line: a named error with its exit code, or a counted exclusion.

What is excluded is said on stdout and in the JSON, and the records that are left add up.
"""

import json
import shutil
import signal
import sqlite3
import time
from pathlib import Path
from typing import Any

import pytest

from .conftest import Fedkola, Process, Write, notes, write_jsonl

pytestmark = pytest.mark.integration


def refused(fedkola: Fedkola, *words: str | Path, error: str, code: int, says: str) -> None:
    """The command ends with this error on one line of stderr, and no traceback."""
    done = fedkola(*words)
    assert done.err.startswith(f"{error}: "), done.err
    assert says in done.err
    assert done.code == code
    assert "Traceback" not in done.err


def records(document: dict[str, Any], fedkola: Fedkola) -> int:
    """Records in analytic cells plus those that wait."""
    bank = fedkola("bank", "ls", document["folder"], "--json").json
    held = sum(cell["records"] for cell in bank["cells"] if cell["kind"] == "analytic")
    return held + sum(bank["parked"].values())


def test_a_missing_column_is_named_with_the_columns_there_are(
    fedkola: Fedkola, plan_of: Write
) -> None:
    plan = plan_of(task='text = "body"')
    refused(fedkola, "run", plan, error="DataError", code=3, says="has no column 'body'")
    assert not Path("runs").exists()


def test_an_empty_file_is_refused(fedkola: Fedkola, plan_of: Write) -> None:
    plan = plan_of([])
    refused(fedkola, "run", plan, error="DataError", code=3, says="is empty")


def test_a_file_of_another_encoding_is_refused_with_the_byte(
    fedkola: Fedkola, plan_of: Write
) -> None:
    plan = plan_of()
    Path("notes.jsonl").write_bytes('{"text": "Übelkeit", "label": "x"}\n'.encode("cp1252"))
    refused(fedkola, "run", plan, error="DataError", code=3, says="byte 10 is 0xdc")


def test_an_unknown_label_at_test_time_is_counted_and_the_rest_is_asked(
    fedkola: Fedkola, plan_of: Write
) -> None:
    test = [*notes(40, seed=9), {"id": "x", "text": "cough", "label": "liver", "patient": "p"}]
    plan = plan_of(task='test = "test.jsonl"')
    write_jsonl(Path("test.jsonl"), test)
    document = fedkola("run", plan, "--json").json
    assert document["excluded"]["test"] == {"unknown label": 1}
    assert document["rounds"][-1]["metrics"]["asked"] == 40
    assert records(document, fedkola) == 160


def test_nan_text_empty_labels_and_duplicate_ids_are_counted_by_site(
    fedkola: Fedkola, plan_of: Write
) -> None:
    good = [{**row, "house": "north"} for row in notes(160)]
    bad = [
        {**good[0], "id": "a", "text": float("nan")},
        {**good[0], "id": "b", "text": "  "},
        {**good[0], "id": "c", "label": None},
        good[1],
    ]
    rows = [*good, *bad, *({**row, "house": "south"} for row in notes(40, seed=1))]
    rows += [{**row, "house": "west"} for row in notes(40, seed=2)]
    plan = plan_of(rows, task='site = "house"\ntest = "test.jsonl"')
    write_jsonl(Path("test.jsonl"), notes(20, seed=9))
    done = fedkola("run", plan)
    assert done.code == 0, done.err
    said = next(line for line in done.out.splitlines() if line.startswith("excluded: north"))
    assert set(said.removeprefix("excluded: north: ").split(", ")) == {
        "1 NaN text",
        "1 empty text",
        "1 missing label",
        "1 duplicate id",
    }
    assert records({"folder": "runs/r"}, fedkola) == 240


def test_a_site_of_one_class_takes_part_and_is_noticed(fedkola: Fedkola, plan_of: Write) -> None:
    rows = [
        {**row, "house": row["label"] if i < 80 else "mixed"} for i, row in enumerate(notes(160))
    ]
    plan = plan_of(rows, task='site = "house"', cohort="minimum = 3", knowledge="k_min = 1")
    document = fedkola("run", plan, "--json").json
    assert any("heart holds one label only: heart" in text for text in document["notices"])
    assert document["rounds"][-1]["refused"] == {}
    assert document["rounds"][-1]["metrics"]["top1"] > 0.5


def test_a_window_without_records_is_a_round_without_change(
    fedkola: Fedkola, plan_of: Write
) -> None:
    rows = [{**row, "month": 1 if i < 80 else 3} for i, row in enumerate(notes(160))]
    plan = plan_of(rows, task='window = "month"')
    document = fedkola("run", plan, "--json").json
    assert document["windows"] == ["1", "2", "3"]
    assert any("windows without a record, kept: 2" in text for text in document["notices"])
    cells = fedkola("bank", "ls", "runs/r", "--json").json["cells"]
    assert {cell["round"] for cell in cells} == {1, 3}


def test_a_model_folder_without_tokenizer_is_refused(
    fedkola: Fedkola, plan_of: Write, encoder: Path
) -> None:
    shutil.copytree(encoder, "bare")
    Path("bare/vocab.txt").unlink()
    plan = plan_of()
    words = ("run", plan, "--set", f"model.name={Path('bare').resolve()}")
    refused(fedkola, *words, error="ModelMismatch", code=3, says="has no tokenizer.json")


def test_an_unknown_key_names_the_nearest(fedkola: Fedkola, plan_of: Write) -> None:
    plan = plan_of(knowledge="feature = 3")
    refused(fedkola, "run", plan, error="UnknownKey", code=2, says="nearest is knowledge.features")
    words = ("run", plan_of(), "--set", "privacy.epsilno=3")
    refused(fedkola, *words, error="UnknownKey", code=2, says="nearest is privacy.epsilon")


def test_a_demand_for_privacy_that_cannot_be_met_is_refused_before_anything_is_written(
    fedkola: Fedkola, plan_of: Write
) -> None:
    words = ("run", plan_of(), "--set", "privacy.epsilon=3")
    refused(fedkola, *words, error="Incompatible", code=2, says="adds no such noise")
    assert not Path("runs").exists()


def test_the_folder_of_another_plan_is_refused_and_stays_as_it_was(
    fedkola: Fedkola, plan_of: Write
) -> None:
    plan = plan_of()
    before = fedkola("run", plan, "--json").json
    sites = sorted(path.name for path in Path("runs/r/sites").iterdir())
    words = ("run", plan, "--set", "task.sites=4")
    refused(fedkola, *words, error="LedgerError", code=8, says="give another folder")
    assert sorted(path.name for path in Path("runs/r/sites").iterdir()) == sites
    assert fedkola("bank", "ls", "runs/r", "--json").json["chain_head"] == before["chain_head"]
    again = fedkola("run", plan, "--json").json
    assert (again["round"], again["view"]) == (2, before["view"])


def test_a_folder_without_a_run_cannot_be_resumed_or_asked(
    fedkola: Fedkola, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("empty").mkdir()
    for words in (
        ("run", "--resume", "empty"),
        ("run", "--resume", "absent"),
        ("predict", "absent", "cough"),
        ("bank", "ls", "empty"),
        ("bank", "forget", "absent", "--site", "north"),
        ("bank", "export", "absent", "--to", "out"),
    ):
        refused(fedkola, *words, error="RunNotFound", code=8, says="give the folder of a run")
    assert list(Path("empty").iterdir()) == []
    assert not Path("absent").exists()


def test_a_flipped_bit_in_a_checkpoint_is_found_by_every_verb(
    fedkola: Fedkola, plan_of: Write
) -> None:
    fedkola("run", plan_of(), "--json")
    blob = max(Path("runs/r/blobs").iterdir(), key=lambda path: path.stat().st_size)
    content = bytearray(blob.read_bytes())
    content[-9] ^= 1
    blob.write_bytes(content)
    for words in (
        ("bank", "ls", "runs/r"),
        ("run", "--resume", "runs/r"),
        ("predict", "runs/r", "cough"),
        ("bank", "forget", "runs/r", "--site", "site-1"),
    ):
        refused(fedkola, *words, error="BlobMissing", code=8, says=blob.name[:8])
    content[-9] ^= 1
    blob.write_bytes(content)
    assert fedkola("predict", "runs/r", "cough").code == 0


def test_an_altered_event_is_found(fedkola: Fedkola, plan_of: Write) -> None:
    fedkola("run", plan_of(), "--json")
    with sqlite3.connect("runs/r/ledger.db") as database:
        database.execute("DROP TRIGGER events_no_update")
        database.execute("UPDATE events SET subject = 'other' WHERE seq = 2")
    database.close()
    refused(fedkola, "bank", "ls", "runs/r", error="ChainBroken", code=8, says="2")


def test_a_full_disk_stops_the_run_at_a_whole_round_and_resuming_gives_the_same_bits(
    fedkola: Fedkola, process: Process, plan_of: Write
) -> None:
    """Many labels, so that the database outgrows every other file of the run."""
    rows = [{**row, "label": f"label-{i % 240:03d}"} for i, row in enumerate(notes(960))]
    plan = plan_of(rows, task='windows = 4\ntest = "test.jsonl"', knowledge="features = 8")
    write_jsonl(Path("test.jsonl"), rows[:20])
    stopped = process("run", plan, limit=200_000)
    _, err = stopped.communicate(timeout=120)
    assert "LedgerError: " in err, err
    assert stopped.returncode == 8
    resumed = fedkola("run", "--resume", "runs/r", "--json").json
    undisturbed = fedkola("run", plan, "--set", "run.folder=other", "--json").json
    assert resumed["state"] == "done"
    assert [row["cohort"] for row in resumed["rounds"]] == [["site-1", "site-2", "site-3"]] * 4
    assert resumed["view"] == undisturbed["view"] != ""


def test_control_c_says_how_to_resume_and_the_resumed_run_has_the_same_bits(
    fedkola: Fedkola, process: Process, plan_of: Write
) -> None:
    plan = plan_of(notes(960), task="windows = 40")
    running = process("run", plan)
    deadline = time.monotonic() + 100
    while committed(Path("runs/r/ledger.db")) < 2 and time.monotonic() < deadline:
        time.sleep(0.02)
    running.send_signal(signal.SIGINT)
    _, err = running.communicate(timeout=60)
    assert running.returncode == 130, err
    assert "saved at round " in err
    assert err.strip().endswith("resume: fedkola run --resume runs/r")
    assert 2 <= committed(Path("runs/r/ledger.db")) < 40
    resumed = fedkola("run", "--resume", "runs/r", "--json").json
    undisturbed = fedkola("run", plan, "--set", "run.folder=other", "--json").json
    assert (resumed["state"], resumed["round"]) == ("done", 40)
    assert resumed["view"] == undisturbed["view"] != ""


def committed(database: Path) -> int:
    """Rounds in the ledger; 0 while there is none."""
    if not database.exists():
        return 0
    connection = sqlite3.connect(f"file:{database}?mode=ro", uri=True)
    try:
        return int(connection.execute("SELECT count(*) FROM rounds").fetchone()[0])
    except sqlite3.OperationalError:
        return 0
    finally:
        connection.close()


def test_requests_that_make_no_sense_are_named(fedkola: Fedkola, plan_of: Write) -> None:
    plan = plan_of()
    assert fedkola("run", plan, "--json").code == 0
    for words, error, code, says in (
        (("run",), "PlanError", 2, "neither was given"),
        (("run", plan, "--resume", "runs/r"), "PlanError", 2, "both was given"),
        (("run", "--resume", "runs/r", "--set", "run.seed=8"), "PlanError", 2, "run.name"),
        (("run", "absent.toml"), "PlanError", 2, "cannot be read"),
        (("predict", "runs/r", "x", "--level", "block"), "UnknownName", 2, "'block'"),
        (("predict", "runs/r", "x", "--held", "mars"), "UnknownCell", 9, "'mars'"),
        (("bank", "show", "runs/r", "zzz"), "UnknownCell", 9, "no 'zzz'"),
        (("bank", "forget", "runs/r", "--site", "north"), "UnknownName", 2, "'north'"),
        (
            ("bank", "forget", "runs/r", "--site", "site-1", "--patient", "nobody"),
            "UnknownCell",
            9,
            "'nobody'",
        ),
        (
            ("bank", "forget", "runs/r", "--site", "site-1", "--patient", "a", "--record", "b"),
            "PlanError",
            2,
            "give one",
        ),
        (("bank", "export", "runs/r", "--to", "out"), "BasisMismatch", 9, '"lora"'),
        (("bench", "dynamic", "--stream", "mars"), "UnknownName", 2, "icd-chapters"),
    ):
        refused(fedkola, *words, error=error, code=code, says=says)
    assert not Path("out").exists()


def test_a_baseline_keeps_no_bank_and_says_so(fedkola: Fedkola, plan_of: Write) -> None:
    plan = plan_of(algorithm='name = "local"')
    document = fedkola("run", plan, "--json").json
    assert document["parked"] == {}
    assert document["view"] == ""
    for words in (
        ("bank", "ls", "runs/r"),
        ("predict", "runs/r", "cough"),
        ("bank", "forget", "runs/r", "--site", "site-1"),
    ):
        refused(fedkola, *words, error="KnowledgeError", code=9, says="local")


def test_the_result_on_disk_says_what_was_left_out(fedkola: Fedkola, plan_of: Write) -> None:
    rows = [*notes(160), {"id": "x", "text": "", "label": "skin", "patient": "p"}]
    assert fedkola("run", plan_of(rows)).code == 0
    document = json.loads(Path("runs/r/result.json").read_text())
    assert document["excluded"] == {"train": {"empty text": 1}}
    assert "empty text" in Path("runs/r/report.html").read_text()


def test_a_bank_in_which_everything_waits_is_reported_and_can_be_looked_at(
    fedkola: Fedkola, plan_of: Write
) -> None:
    plan = plan_of(knowledge="public_reference = false\nlabel_floor = 1000")
    done = fedkola("run", plan)
    assert done.code == 0, done.err
    assert "parked: notes: " in done.out
    assert "no cell is open, so this run cannot answer yet" in done.out
    bank = fedkola("bank", "ls", "runs/r", "--json").json
    assert bank["cells"] == []
    trained = 160 - int(fedkola("run", plan, "--json").json["rounds"][-1]["metrics"]["asked"])
    assert bank["parked"] == {"notes": trained}
    assert "records wait at their sites" in Path("runs/r/report.html").read_text()
    refused(fedkola, "predict", "runs/r", "x", error="UnknownCell", code=9, says="still empty")


def test_a_bank_that_forgot_every_site_holds_and_shows_nothing(
    fedkola: Fedkola, plan_of: Write
) -> None:
    asked = fedkola("run", plan_of(), "--json").json["rounds"][-1]["metrics"]["asked"]
    receipts = [
        fedkola("bank", "forget", "runs/r", "--site", f"site-{i}", "--json").json for i in (1, 2, 3)
    ]
    # Of three sites two are left, below k_min: the first removal revokes every cell.
    assert {cell["after"] for cell in receipts[0]["cells"]} == {"revoked"}
    assert receipts[0]["records"] > 0
    assert [receipt["view_after"] for receipt in receipts] == ["", "", ""]
    assert [receipt["cells"] for receipt in receipts[1:]] == [[], []]
    assert asked > 0
    assert fedkola("bank", "ls", "runs/r", "--json").json["cells"] == []
    assert not Path("runs/r/view").exists()
    refused(fedkola, "predict", "runs/r", "x", error="UnknownCell", code=9, says="empty")
