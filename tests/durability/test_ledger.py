"""The ledger when its process is killed, its disk is full or its folder is read-only.

Each test runs a small program of its own, since limits and signals belong to a process.
"""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

PRELUDE = """
import json, os, random, resource, signal, sys, time
from pathlib import Path
import torch
from fedkola.errors import LedgerError, RunNotFound
from fedkola.ledger import Ledger
torch.set_num_threads(1)
folder = Path(sys.argv[1])

def commit(ledger, number, *, size=100, report=None):
    return ledger.commit(
        "r", number, state={"round": number, "amended": False},
        tensors={"sum": torch.full((size, 100), float(number)), "kept": torch.ones(100)},
        report=report or {}, sampler={"seed": number},
        events=[{"kind": "OPEN", "subject": "a", "body": {}},
                {"kind": "SEAL", "subject": "a", "body": {"round": number}}],
        now=float(number),
    )

def attempt(action):
    try:
        action()
    except LedgerError as error:
        return str(error)
    return ""

def seen(ledger):
    saved = ledger.last("r")
    return {
        "number": saved.number, "round": ledger.run().round, "state": saved.state,
        "sum": sorted(set(saved.tensors["sum"].flatten().tolist())),
        "rounds": [row.number for row in ledger.rounds("r")],
        "kinds": [event.kind for event in ledger.events("r")],
        "removals": len(ledger.removals("r")),
        "verified": ledger.verify("r") == saved.chain_head,
        "temporary": [path.name for path in folder.rglob("*.tmp")],
    }
"""

KILLED = """
def write(pipe):
    with Ledger.open(folder, create=True) as ledger:
        ledger.start("r", {}, "00" * 32, now=0)
        saved = ledger.last("r")
        number = 0 if saved is None else saved.number
        while True:
            number += 1
            commit(ledger, number)
            os.write(pipe, b"%d\\n" % number)
            ledger.amend(
                "r", number, state={"round": number, "amended": True},
                tensors={"sum": torch.full((100, 100), -float(number))},
                events=[{"kind": "FORGET", "subject": "a", "body": {}}],
                removal={"scope": "a"}, now=float(number),
            )

waits = random.Random(int(sys.argv[2]))
kills = reached = 0
# At least 24 kills, and on a busy machine as many more as it takes to get anywhere.
while kills < 24 or (reached <= 24 and kills < 400):
    kills += 1
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            write(writer)
        finally:
            os._exit(1)
    os.close(writer)
    time.sleep(waits.uniform(0, 0.12))
    os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    with os.fdopen(reader) as pipe:
        told = [int(line) for line in pipe]
    with Ledger.open(folder, create=True) as ledger:
        try:
            ledger.run()
        except RunNotFound:
            found = None
        else:
            found = None if ledger.last("r") is None else seen(ledger)
    killed = os.WIFSIGNALED(status)
    reached = 0 if found is None else found["number"]
    print(json.dumps({"told": told[-1] if told else None, "found": found, "killed": killed}))
"""

FULL = """
def limit(size):
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))

with Ledger.open(folder, create=True) as ledger:
    ledger.start("r", {}, "00" * 32, now=0)
    commit(ledger, 1)
    limit(128 * 1024)
    blob = attempt(lambda: commit(ledger, 2, size=1000))
    after_blob = seen(ledger)
    database = attempt(lambda: commit(ledger, 2, report={"notes": "x" * 400_000}))
    after_database = seen(ledger)
    limit(resource.RLIM_INFINITY)
    commit(ledger, 2, report={"notes": "x" * 400_000})
with Ledger.open(folder) as ledger:
    print(json.dumps({"blob": blob, "after_blob": after_blob, "database": database,
                      "after_database": after_database, "finally": seen(ledger)}))
"""

# Root passes permissions by; without these two capabilities it is held to them like anybody.
READ_ONLY = """
import ctypes, stat

def obey_permissions():
    libc = ctypes.CDLL(None, use_errno=True)
    header = (ctypes.c_uint32 * 2)(0x20080522, 0)
    data = (ctypes.c_uint32 * 6)()
    assert libc.capget(header, data) == 0
    data[0] &= ~0b110  # effective
    data[1] &= ~0b110  # permitted
    assert libc.capset(header, data) == 0

def protect(path, mode):
    for name in [path, *path.rglob("*")]:
        name.chmod(mode if name.is_dir() else mode & 0o666)

run, blobs = folder / "run", folder / "run" / "blobs"
with Ledger.open(run, create=True) as ledger:
    ledger.start("r", {}, "00" * 32, now=0)
    commit(ledger, 1)
obey_permissions()
blobs.chmod(0o555)
with Ledger.open(run) as ledger:
    blob = attempt(lambda: commit(ledger, 2))
    after_blob = seen(ledger)
protect(run, 0o555)
with Ledger.open(run) as ledger:
    database = attempt(lambda: ledger.append("r", 1, [{"kind": "SEAL"}], now=1))
    again = attempt(lambda: commit(ledger, 2))
    after_database = seen(ledger)
create = attempt(lambda: Ledger.open(run / "inner", create=True))
protect(run, 0o755)
with Ledger.open(run) as ledger:
    commit(ledger, 2)
    print(json.dumps({"blob": blob, "after_blob": after_blob, "database": database,
                      "again": again, "after_database": after_database, "create": create,
                      "finally": seen(ledger)}))
"""


def run(program: str, *arguments: str) -> list[Any]:
    """What a program printed, line by line."""
    done = subprocess.run(
        [sys.executable, "-c", PRELUDE + program, *arguments],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


@pytest.mark.parametrize("seed", [1, 2])
def test_a_killed_writer_leaves_round_n_or_n_plus_1_and_a_chain_that_verifies(
    tmp_path: Path, seed: int
):
    before = 0
    for observation in run(KILLED, str(tmp_path), str(seed)):
        assert observation["killed"]
        found, told = observation["found"], observation["told"]
        number = 0 if found is None else found["number"]
        acknowledged = before if told is None else told
        assert number in (acknowledged, acknowledged + 1)
        if found is not None:
            amended = found["state"]["amended"]
            forgotten = number if amended else number - 1
            assert found["state"] == {"round": number, "amended": amended}
            assert found["sum"] == [-number if amended else number]
            assert found["round"] == number
            # A resumed writer goes on after the last round, also if that one was not yet amended.
            assert found["rounds"] == list(range(1, number + 1))
            assert found["kinds"].count("SEAL") == found["kinds"].count("OPEN") == number
            assert found["kinds"].count("FORGET") == found["removals"] <= forgotten
            assert found["verified"]
        before = number
    assert before > 24


def test_a_full_disk_is_a_ledger_error_and_the_previous_round_stands(tmp_path: Path):
    (outcome,) = run(FULL, str(tmp_path))
    assert "saving a tensor failed in " in outcome["blob"]
    assert str(tmp_path / "blobs") in outcome["blob"]
    assert outcome["database"].startswith(f"round 2 failed in {tmp_path / 'ledger.db'}: ")
    for after in (outcome["after_blob"], outcome["after_database"]):
        assert after["number"] == after["round"] == 1
        assert after["sum"] == [1.0]
        assert after["kinds"] == ["OPEN", "SEAL"]
        assert after["verified"]
        assert after["temporary"] == []
    assert outcome["finally"]["number"] == 2
    assert outcome["finally"]["sum"] == [2.0]
    assert outcome["finally"]["verified"]


def test_a_read_only_folder_can_be_read_and_refuses_a_round(tmp_path: Path):
    (outcome,) = run(READ_ONLY, str(tmp_path))
    assert "saving a tensor failed in " in outcome["blob"]
    assert "attempt to write a readonly database" in outcome["database"]
    assert "failed in " in outcome["again"]
    assert "cannot be made" in outcome["create"]
    for after in (outcome["after_blob"], outcome["after_database"]):
        assert after["number"] == 1
        assert after["kinds"] == ["OPEN", "SEAL"]
        assert after["verified"]
        assert after["temporary"] == []
    assert outcome["finally"]["number"] == 2
