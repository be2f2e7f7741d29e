"""A run killed at any instant goes on to the bits of one that was left alone.

A process of its own runs the federation and kills itself with SIGKILL at a chosen place: after so
many answers of sites, or between the steps of a removal.
"""

import json
import random
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import small_federation as small

from fedkola import removal
from fedkola.federation import load_state
from fedkola.knowledge import forget, journal
from fedkola.knowledge.forget import Request
from fedkola.ledger import Ledger

LEAVE = "scenario.leave={west=2}"
METHODS = {
    "fedkola": (LEAVE,),
    "fedit": ("algorithm.name=fedit", "algorithm.exchanges=2"),
    "replay": ("algorithm.name=replay", "algorithm.exchanges=2", "algorithm.buffer=3"),
    "ewc": ("algorithm.name=ewc", "algorithm.sample=2"),
    "revised": (),
}
CASES_OF_A_RUN = [
    # Between the steps of the removal that is due after round 2.
    ("fedkola", "Ledger.amend", 0),
    ("fedkola", "Site.settle", 0),
    ("fedkola", "Ledger.purge", 0),
    # Between a round's last answer and its commit, and after the last commit.
    ("fedkola", "Ledger.commit", 2),
    ("fedkola", "Ledger.finish", 0),
    # In the revision of round 2 (of LoRA cells, of the Gram), before its commit, and before and
    # between the deletions of its sites.
    ("revised", "client.write_private", 47),
    ("revised", "client.write_private", 52),
    ("revised", "Ledger.commit", 1),
    ("revised", "Site.revise", 0),
    ("revised", "Site.revise", 2),
]
FAST = 'knowledge.lanes=["analytic", "router"]'
PATIENT = Request(kind="patient", site="north", name="north-p3")

# Imports once, then forks a process for every case, which kills itself before call number `after`
# of the function `where`; prints the signals that ended them.
PROGRAM = """
import json, os, signal, sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
import torch
torch.set_num_threads(1)
import small_federation as small
from fedkola import client, ledger, removal
from fedkola.knowledge.forget import Request

def die_on_call(where, after):
    place, name = where.split(".")
    holder = {"Site": client.Site, "Ledger": ledger.Ledger, "client": client}[place]
    whole, calls = getattr(holder, name), [0]
    def wrapped(*args, **kwargs):
        if calls[0] == after:
            os.kill(os.getpid(), signal.SIGKILL)
        calls[0] += 1
        return whole(*args, **kwargs)
    setattr(holder, name, wrapped)

small.foundation()
signals = []
for folder, where, after, settings, patient, revised in json.loads(sys.argv[2]):
    child = os.fork()
    if child == 0:
        sites = small.revised(small.data()) if revised else None
        federation = small.assemble(Path(folder), *settings, sites=sites)
        die_on_call(where, after)
        if patient:
            request = Request(kind="patient", site="north", name=patient)
            with ledger.Ledger.open(Path(folder)) as opened:
                removal.remove(federation, opened, request)
        else:
            small.run(federation)
        os._exit(0)
    signals.append(os.WTERMSIG(os.waitpid(child, 0)[1]))
print(json.dumps(signals))
"""


def kill(cases: list[tuple[Path, str, int, tuple[str, ...], str, bool]]) -> None:
    """Run every case to its death; each must have died of SIGKILL."""
    helpers = str(Path(small.__file__).parent)
    said = json.dumps([(str(folder), *rest) for folder, *rest in cases])
    command = [sys.executable, "-c", PROGRAM, helpers, said]
    done = subprocess.run(command, check=True, capture_output=True, timeout=300)
    assert json.loads(done.stdout) == [signal.SIGKILL] * len(cases)


def outcome(
    folder: Path, *settings: str, revised: bool = False
) -> tuple[str, list[Any], list[Any]]:
    """The final state's hash, the events without their times, and the removals."""
    sites = small.revised(small.data()) if revised else None
    federation = small.assemble(folder, *settings, sites=sites)
    state = small.run(federation)
    with Ledger.open(folder) as ledger:
        ledger.verify("small")
        events = [
            (e.seq, e.round, e.kind, e.subject, {**e.body, "seconds": 0})
            for e in ledger.events("small")
        ]
        requests = [row["receipt"]["request"] for row in ledger.removals("small")]
        saved = ledger.last("small")
    assert saved is not None
    return small.fingerprint(state), json.loads(json.dumps(events)), requests


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return {
        name: outcome(tmp_path_factory.mktemp(name), *settings, revised=name == "revised")
        for name, settings in METHODS.items()
    }


def places() -> list[tuple[str, str, int]]:
    """Three random instants of each method, counted in writes of answers to an outbox."""
    chance = random.Random(20261122)
    answers = {"fedkola": 110, "fedit": 30, "replay": 30, "ewc": 30, "revised": 110}
    return [
        (name, "client.write_private", at)
        for name, most in answers.items()
        for at in sorted(chance.sample(range(1, most), 3))
    ]


CASES = [*places(), *CASES_OF_A_RUN]


@pytest.fixture(scope="module")
def killed(tmp_path_factory: pytest.TempPathFactory) -> dict[Any, Path]:
    """The folder that each killed run left behind, and of two that are to forget a patient."""
    folders = {
        case: tmp_path_factory.mktemp("killed") for case in (*CASES, "removal", "interrupted")
    }
    small.run(small.assemble(folders["removal"], FAST))
    kill(
        [
            *((folders[m, w, at], w, at, METHODS[m], "", m == "revised") for m, w, at in CASES),
            (folders["removal"], "Site.settle", 0, (FAST,), PATIENT.name, False),
            (folders["interrupted"], "Ledger.commit", 1, (FAST,), "", False),
        ]
    )
    return folders


@pytest.mark.parametrize(("method", "where", "after"), CASES)
def test_a_killed_run_resumes_to_the_bits_of_an_undisturbed_one(
    killed: dict[Any, Path],
    undisturbed: dict[str, Any],
    method: str,
    where: str,
    after: int,
):
    folder = killed[method, where, after]
    assert outcome(folder, *METHODS[method], revised=method == "revised") == undisturbed[method]
    if method == "revised":
        for site in small.SITES:
            kept = journal.join(journal.entries(folder / "sites" / site))
            assert kept is not None
            assert len(set(kept.records)) == len(kept)  # no old version is left
    if method == "fedkola":
        assert journal.entries(folder / "sites" / "west") == ()
        assert forget.posted(folder / "sites" / "west") == ()


def test_a_finished_run_that_is_run_again_asks_nobody_and_changes_nothing(tmp_path: Path):
    first = outcome(tmp_path, FAST, LEAVE)

    def silent(answer: small.Answer) -> small.Answer:
        def reply(message: bytes) -> bytes:
            raise AssertionError("a finished run asked a site")

        return reply

    again = small.assemble(tmp_path, FAST, LEAVE, wrap=dict.fromkeys(small.SITES, silent))
    assert small.fingerprint(small.run(again)) == first[0]


@pytest.fixture(scope="module")
def without_the_patient(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The final state of the federation that never had the patient."""
    clean = small.without(small.data(), PATIENT.site, patients=(PATIENT.name,))
    return small.run(small.assemble(tmp_path_factory.mktemp("never"), FAST, sites=clean))


def test_a_removal_killed_between_its_commit_and_the_sites_deletion_is_finished_and_not_repeated(
    killed: dict[Any, Path], without_the_patient: Any
):
    federation = small.assemble(killed["removal"], FAST)
    store = federation.sites["north"].store
    assert any(PATIENT.name in entry.patients for entry in journal.entries(store))
    with Ledger.open(federation.folder) as ledger:
        committed = small.cells(load_state(federation, ledger)[0])
        receipt = removal.remove(federation, ledger, PATIENT)
        assert small.cells(load_state(federation, ledger)[0]) == committed
        (row,) = ledger.removals("small")
        saved = ledger.last("small")
    assert receipt.already
    assert forget.receipt_from(row["receipt"]) == replace(receipt, already=False)
    assert not any(PATIENT.name in entry.patients for entry in journal.entries(store))
    assert committed == small.cells(without_the_patient)
    assert saved is not None
    blobs = {path.name for path in (federation.folder / "blobs").iterdir()}
    assert len(blobs) <= len(saved.tensors)  # the sums that held the patient are purged


def test_records_accepted_for_removal_are_not_in_a_round_that_was_interrupted(
    killed: dict[Any, Path], without_the_patient: Any
):
    federation = small.assemble(killed["interrupted"], FAST)
    with Ledger.open(federation.folder) as ledger:
        assert ledger.run().round == 1  # round 2 is answered by every site and not committed
        removal.remove(federation, ledger, PATIENT)
    state = small.run(federation)
    assert small.cells(state) == small.cells(without_the_patient)
    assert state.calibration == without_the_patient.calibration
