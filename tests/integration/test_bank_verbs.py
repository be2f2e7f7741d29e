"""The bank verbs on a run of real files: make it small, look back, forget, purge, merge."""

import shutil
from pathlib import Path
from typing import Any

import pytest

from .conftest import TOPICS, Fedkola, Write, notes

WINDOWS = 6
COMMON = '["heart", "lung", "bone"]'


@pytest.fixture
def run(fedkola: Fedkola, plan_of: Write) -> Path:
    """A run of six windows; only three of the five sites may hold skin."""
    rows = [
        {
            **row,
            "window": f"w{1 + i // 4 % WINDOWS}",
            "site": f"s{i // 24 % 5}",
            "scope": row["label"],
            "label": f"{row['label']}-{i // 120}",
        }
        for i, row in enumerate(notes(240))
    ]
    plan = plan_of(
        rows,
        algorithm="rank = 2\nlr = 0.05",
        task='window = "window"\nsite = "site"\nscope = "scope"',
        knowledge='lanes = ["analytic", "router", "lora"]\nslots_max = 8\nlora_steps = 1',
        **{"scenario.access": f"s3 = {COMMON}\ns4 = {COMMON}"},
    )
    done = fedkola("run", plan, "--json")
    assert done.code == 0, done.err
    return Path("runs/r")


def test_a_bank_is_made_small_asked_about_the_past_and_forgets(fedkola: Fedkola, run: Path):
    texts = [words.split()[0] for words in TOPICS.values()]
    now = fedkola("predict", run, *texts, "--json").json["answers"]
    then = fedkola("predict", run, *texts, "--known-at", "2", "--json").json["answers"]
    grown = fedkola("bank", "ls", run, "--json").json
    sizes = fedkola("bank", "compact", run, "--json").json
    assert sizes["before"]["hot_cells"] == len(grown["cells"]) == 4 * 3 * WINDOWS + WINDOWS
    assert sizes["after"]["hot_cells"] == 4 * 3 + 1
    assert sizes["after"]["cold_cells"] == sizes["before"]["hot_cells"]

    def same(after: list[Any], before: list[Any]) -> bool:
        return [a["answers"] for a in after] == [b["answers"] for b in before]

    assert same(fedkola("predict", run, *texts, "--json").json["answers"], now)
    again = fedkola("predict", run, *texts, "--known-at", "2", "--json").json["answers"]
    assert same(again, then)
    told = fedkola("bank", "lineage", run, "heart")
    assert "archived, counted in" in told.out
    receipt = fedkola(
        "bank", "forget", run, "--site", "s0", "--patient", "p-0", "--recount", "--json"
    )
    assert receipt.json["recount"] is True
    purged = fedkola("bank", "archive", run, "--purge", "--json").json
    assert purged["after"]["cold_bytes"] == 0 < purged["before"]["cold_bytes"]
    refused = fedkola("predict", run, texts[0], "--known-at", "2")
    assert refused.code == 9
    assert "was purged from the archive" in refused.err
    kinds = {row["kind"] for row in fedkola("bank", "log", run, "--json").json["events"]}
    assert {"SUM", "ARCHIVE", "RESTORE", "WITHDRAW", "PURGE", "FORGET"} <= kinds
    # The sites sum purged cells again, so that even now a removal is exact.
    receipt = fedkola(
        "bank", "forget", run, "--site", "s1", "--patient", "p-4", "--recount", "--json"
    )
    assert receipt.json["recount"] is True


def test_fusing_says_its_error_and_frees_slots(fedkola: Fedkola, run: Path):
    document = fedkola("bank", "compact", run, "--eps", "1", "--json").json
    assert document["fused"]
    assert document["after"]["slots"] < document["before"]["slots"] == 4
    for fused in document["fused"]:
        assert 0 < fused["error"] < 1
        assert "skin@1" not in fused["modules"]  # others may hold it
    listed = fedkola("bank", "ls", run)
    assert "relative error" in listed.out
    receipt = fedkola("bank", "forget", run, "--site", "s0", "--recount", "--json").json
    assert receipt["recount"] is True


def test_a_fused_adapter_outlives_its_parts(fedkola: Fedkola, run: Path):
    fused = fedkola("bank", "compact", run, "--eps", "1", "--json").json["fused"]
    now = fedkola("predict", run, "rash", "--json").json["answers"]
    purged = fedkola("bank", "archive", run, "--purge")
    assert purged.code == 0, purged.err
    assert fedkola("run", "--resume", run).code == 0
    again = fedkola("predict", run, "rash", "--json").json["answers"]
    assert [a["answers"] for a in again] == [a["answers"] for a in now]
    part = fused[0]["modules"][0].split("@")[0]
    refused = fedkola("predict", run, "rash", "--held", part)
    assert refused.code == 9
    assert "cannot answer with some modules of a fused adapter" in refused.err


def test_a_site_answers_with_what_it_may_hold(fedkola: Fedkola, run: Path):
    def codes(*words: str) -> set[str]:
        asked = ("predict", run, "rash", "--json", *words)
        return {
            choice["code"].split("-")[0] for choice in fedkola(*asked).json["answers"][0]["answers"]
        }

    assert "skin" in codes("--site", "s0")
    assert codes("--site", "s3") == {"heart", "lung", "bone"}
    refused = fedkola("predict", run, "rash", "--site", "s3", "--held", "skin")
    assert (refused.code, refused.err.split(":")[0]) == (5, "AccessRefused")
    assert "s3 may not hold skin@1, which is for s0, s1, s2" in refused.err
    assert fedkola("predict", run, "rash", "--site", "s9").code == 2


def test_two_run_folders_merge_into_a_third(fedkola: Fedkola, run: Path, tmp_path: Path):
    shutil.copytree(run, tmp_path / "fork")
    assert fedkola("bank", "forget", run, "--site", "s0", "--patient", "p-0").code == 0
    merged = fedkola("bank", "merge", run, "fork", "--into", "runs/both", "--json").json
    words = {cell["id"]: cell["words"] for cell in merged["cells"] if cell["kind"] != "scatter"}
    alone = fedkola("bank", "ls", run, "--json").json
    assert words == {c["id"]: c["words"] for c in alone["cells"] if c["kind"] != "scatter"}
    assert fedkola("predict", "runs/both", "rash").code == 0
    again = fedkola("bank", "merge", run, "fork", "--into", "runs/both")
    assert (again.code, again.err.split(":")[0]) == (8, "LedgerError")
