"""A run under a privacy budget, killed anywhere: the same bits, every exchange paid for once."""

import json
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import small_federation as small
import small_private
import torch
from small_private import federation

from fedkola import server, wire
from fedkola.federation import Federation
from fedkola.ledger import Ledger
from fedkola.privacy import accounting
from fedkola.types import Clients, Reply

PLACES = {
    "after the key": 2,
    "before the charge": 4,
    "after the charge": 4,
    "after the outbox": 4,
    "before the commit": 1,
}
# Imports once, then forks a process for every case, which kills itself at call number `after` of
# a function, before or after its work.
PROGRAM = """
import json, os, signal, sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
import torch
torch.set_num_threads(1)
import small_federation as small
import small_private
from fedkola import client, ledger
from fedkola.privacy import accounting, answering

PLACES = {
    "after the key": (answering, "exchange_key"),
    "before the charge": (accounting, "charge"),
    "after the charge": (accounting, "charge"),
    "after the outbox": (client, "write_private"),
    "before the commit": (ledger.Ledger, "commit"),
}

def die_on_call(place, after):
    holder, name = PLACES[place]
    whole, calls = getattr(holder, name), [0]
    def wrapped(*args, **kwargs):
        if calls[0] == after and place.startswith("before"):
            os.kill(os.getpid(), signal.SIGKILL)
        found = whole(*args, **kwargs)
        if calls[0] == after:
            os.kill(os.getpid(), signal.SIGKILL)
        calls[0] += 1
        return found
    setattr(holder, name, wrapped)

small_private.base()
small_private.federation(Path(sys.argv[3]))  # finds the noise once for all
signals = []
for folder, place, after in json.loads(sys.argv[2]):
    child = os.fork()
    if child == 0:
        whole = small_private.federation(Path(folder))
        die_on_call(place, after)
        small.run(whole)
        os._exit(0)
    signals.append(os.WTERMSIG(os.waitpid(child, 0)[1]))
print(json.dumps(signals))
"""


@pytest.fixture(scope="module")
def killed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A folder of a run that was killed, for every place."""
    root = tmp_path_factory.mktemp("killed")
    folders = {place: root / place.replace(" ", "-") for place in PLACES}
    cases = json.dumps([(str(folders[place]), place, after) for place, after in PLACES.items()])
    helpers = str(Path(small.__file__).parent)
    command = [sys.executable, "-c", PROGRAM, helpers, cases, str(root / "first")]
    done = subprocess.run(command, check=True, capture_output=True, timeout=500)
    assert json.loads(done.stdout) == [signal.SIGKILL] * len(PLACES)
    return folders


def accounts(folder: Path) -> dict[str, tuple[accounting.Entry, ...]]:
    return {n: accounting.entries(folder / "sites" / n) for n in small_private.SITES}


@pytest.mark.parametrize("place", PLACES)
def test_a_killed_run_goes_on_and_every_round_is_paid_for_once(
    killed: dict[str, Path], place: str
) -> None:
    folder = killed[place]
    before = accounts(folder)
    assert sum(map(len, before.values())) < 9
    small.run(federation(folder))
    for name, entries in accounts(folder).items():
        assert entries[: len(before[name])] == before[name]
        assert [entry.round for entry in entries] == [1, 2, 3]
        assert len({entry.exchange for entry in entries}) == 3
        assert accounting.spent(folder / "sites" / name, unit="patient", delta=1e-3) <= 2


def test_an_answer_that_was_paid_for_comes_again_to_the_bit(tmp_path: Path) -> None:
    """Two lives of one site hear the same question; in between the outbox was not written."""
    elsewhere = federation(tmp_path / "elsewhere", "run.rounds=1")
    questions: list[bytes] = []
    small.run(replace(elsewhere, clients=listening(elsewhere, questions)))

    def answered() -> Reply:
        site = federation(tmp_path / "here", "run.rounds=1").sites["north"]
        return wire.unpack_reply(site.answer(questions[0]))

    def forget(*kept: str) -> None:
        for path in (tmp_path / "here" / "sites" / "north" / "outbox").rglob("*"):
            if path.is_file() and path.suffix not in kept:
                path.unlink()

    first = answered()
    forget(".key")
    again = answered()
    assert not first.refused
    assert first.words.keys() == again.words.keys()
    assert all(torch.equal(value, again.words[name]) for name, value in first.words.items())
    assert len(accounts(tmp_path / "here")["north"]) == 1
    # Without its key the answer would be another release, for which nothing is left.
    forget()
    assert answered().refused == "BudgetExhausted"
    assert len(accounts(tmp_path / "here")["north"]) == 1


def listening(whole: Federation, questions: list[bytes]) -> Clients:
    answers = {name: site.answer for name, site in whole.sites.items()}

    def north(message: bytes) -> bytes:
        questions.append(message)
        return whole.sites["north"].answer(message)

    return server.connect(whole.plan, {**answers, "north": north})


def test_the_ledger_keeps_a_copy_of_the_account(tmp_path: Path) -> None:
    small.run(federation(tmp_path))
    with Ledger.open(tmp_path) as ledger:
        spent = [row.report["spent"] for row in ledger.rounds("private")]
    assert [one["unit"] for one in spent] == ["patient"] * 3
    assert spent[0]["epsilon"] < spent[1]["epsilon"] < spent[2]["epsilon"] <= 2
    own = accounting.spent(tmp_path / "sites" / "north", unit="patient", delta=1e-3)
    assert spent[2]["epsilon"] == own


def test_a_site_with_a_budget_of_its_own_refuses_with_the_reason_and_the_run_goes_on(
    tmp_path: Path,
) -> None:
    whole = federation(tmp_path, "scenario.budget.north=1.7", "cohort.minimum=2")
    small.run(whole)
    with Ledger.open(tmp_path) as ledger:
        refused = [row.report["refused"] for row in ledger.rounds("private")]
    assert refused == [{}, {}, {"north": "BudgetExhausted"}]
    assert [len(held) for held in accounts(tmp_path).values()] == [2, 3, 3]
