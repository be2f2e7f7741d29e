"""``fedkola audit`` on real runs: what it needs, what it refuses, what it writes."""

import json
from pathlib import Path

import pytest

from fedkola.audit import transcript
from fedkola.errors import ChainBroken, ReleaseRefused, TranscriptMissing, UnknownName

from .conftest import Fedkola, Write

pytestmark = pytest.mark.integration


@pytest.fixture
def recorded(fedkola: Fedkola, plan_of: Write) -> Path:
    """A finished run of adapters, recorded."""
    plan = plan_of(algorithm='name = "fedit"', audit="record = true")
    assert fedkola("run", plan).code == 0
    return Path("runs/r")


def test_an_audit_says_what_it_tried_and_what_it_could_not(fedkola: Fedkola, recorded: Path):
    document = fedkola("audit", recorded, "--json").json
    assert document["observer"].split() == ["server", "site:site-1", "model"]
    assert document["attacks"] == []
    assert {one["name"] for one in document["not_run"]} >= {"presence"}
    assert all(one["reason"] for one in document["not_run"])
    assert set(document["verdicts"].values()) == {"not_run"}
    page = (recorded / "audit.html").read_text()
    assert "No attack could be tried on this run." in page
    assert "<script" not in page
    assert json.loads((recorded / "audit.json").read_text())["run"] == "r"
    assert "not run: presence on sum" in fedkola("audit", recorded, "--observer", "wire").out


@pytest.mark.parametrize(
    ("observer", "says"),
    [
        ("eve", "expected wire, server, tls, site:NAME, coalition:A,B or model"),
        ("site:nowhere", "there is no site 'nowhere' in this run; it has site-1, site-2, site-3"),
        ("coalition:site-1,nowhere", "there is no site 'nowhere'"),
        ("site", "site takes one site, as site:NAME"),
    ],
)
def test_an_observer_that_is_not_there_is_named(
    fedkola: Fedkola, recorded: Path, observer: str, says: str
):
    done = fedkola("audit", recorded, "--observer", observer)
    assert (done.code, done.err.split(":")[0]) == (UnknownName.exit_code, "UnknownName")
    assert says in done.err
    assert not (recorded / "audit.json").exists()


def test_a_run_without_a_transcript_says_how_to_record_one(fedkola: Fedkola, plan_of: Write):
    fedkola("run", plan_of(algorithm='name = "fedit"'))
    done = fedkola("audit", "runs/r")
    assert (done.code, done.err.split(":")[0]) == (
        TranscriptMissing.exit_code,
        "TranscriptMissing",
    )
    assert "audit.record = true" in done.err


def test_an_altered_transcript_is_refused(fedkola: Fedkola, recorded: Path):
    path = recorded / transcript.NAME
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    done = fedkola("audit", recorded)
    assert (done.code, done.err.split(":")[0]) == (ChainBroken.exit_code, "ChainBroken")


def test_a_transcript_that_lost_its_end_is_refused(fedkola: Fedkola, recorded: Path):
    path = recorded / transcript.NAME
    path.write_bytes(path.read_bytes()[:-5000])
    done = fedkola("audit", recorded)
    assert done.err.startswith("ChainBroken")
    assert "that the ledger noted" in done.err


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ((), "neither was given"),
        (("runs/r", "--rehearse", "plan.toml"), "both was given"),
        (("runs/r", "--profile", "huge"), "expected quick or standard"),
        (("runs/r", "--attack", "magic"), "known are"),
        (("runs/r", "--texts", "nowhere.txt"), "cannot be read"),
    ],
)
def test_a_wrong_command_line_says_what_was_expected(
    fedkola: Fedkola, recorded: Path, words: tuple[str, ...], says: str
):
    done = fedkola("audit", *words)
    assert done.code == 2
    assert says in done.err


def test_a_rehearsal_runs_the_plan_recorded_and_beside_the_run(fedkola: Fedkola, plan_of: Write):
    plan = plan_of(algorithm='name = "fedit"')
    document = fedkola("audit", "--rehearse", plan, "--json").json
    assert document["folder"] == "runs/r-rehearsal"
    assert (Path("runs/r-rehearsal") / transcript.NAME).exists()
    assert not Path("runs/r").exists()


def test_a_model_without_an_audit_or_a_bound_stays(fedkola: Fedkola, recorded: Path):
    done = fedkola("release", recorded, "--to", "out")
    assert (done.code, done.err.split(":")[0]) == (ReleaseRefused.exit_code, "ReleaseRefused")
    assert "audit the run first" in done.err
    fedkola("audit", recorded)
    assert "epsilon claimed is none" in fedkola("release", recorded, "--to", "out").err
    path = recorded / "audit.json"
    path.write_text(path.read_text().replace('"epsilon": null', '"epsilon": 0.5'))
    assert "signature of the audit" in fedkola("release", recorded, "--to", "out").err
    path.write_text("[1]")
    assert "cannot be read" in fedkola("release", recorded, "--to", "out").err
    assert not Path("out").exists()


@pytest.mark.parametrize(
    ("words", "code", "says"),
    [
        ((), 2, "--to, or --verify alone"),
        (("runs/r",), 2, "--to, or --verify alone"),
        (("runs/r", "--to", "out", "--verify", "out"), 2, "--to, or --verify alone"),
        (("--verify", "nowhere"), ReleaseRefused.exit_code, "holds no certificate"),
    ],
)
def test_a_wrong_release_says_what_was_expected(
    fedkola: Fedkola, words: tuple[str, ...], code: int, says: str
):
    done = fedkola("release", *words)
    assert (done.code, says in done.err) == (code, True)
