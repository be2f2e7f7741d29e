"""A run whose bank is made small as it goes: the same model, and the same removals."""

from dataclasses import replace
from functools import cache
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

import pytest
import small_federation as small
import torch

from fedkola import removal, server
from fedkola.errors import ForgetIncomplete
from fedkola.federation import Federation, load_state
from fedkola.knowledge import archive
from fedkola.knowledge import bank as banks
from fedkola.knowledge.forget import ForgetReceipt, Request
from fedkola.ledger import Ledger
from fedkola.types import Dataset

ROUNDS = 6
SETTINGS = (
    'knowledge.lanes=["analytic", "router", "lora"]',
    "knowledge.features=16",
    "knowledge.lora_steps=1",
)
GROWN, SMALL = "knowledge.hot_cells=0", "knowledge.hot_cells=12"
GONE = "north-p3"


def spread(data: Dataset) -> Dataset:
    """The same records over six windows."""
    return replace(data, windows=tuple(1 + i // 3 % ROUNDS for i in range(len(data))))


def assembled(folder: Path, *settings: str, gone: bool = False) -> Federation:
    sites = {name: spread(data) for name, data in small.data().items()}
    if gone:
        sites = small.without(sites, "north", patients=(GONE,))
    return small.assemble(folder, *SETTINGS, *settings, sites=sites, rounds=ROUNDS)


@cache
def ran(setting: str, *, gone: bool = False) -> tuple[Federation, Any]:
    """A federation after its six rounds, not to be changed."""
    federation = assembled(Path(mkdtemp()), setting, gone=gone)
    return federation, small.run(federation)


def forgotten(federation: Federation, *, purge: bool = False) -> tuple[ForgetReceipt, Any]:
    with Ledger.open(federation.folder) as ledger:
        if purge:
            server.purge_archive(federation, ledger)
        request = Request(kind="patient", site="north", name=GONE)
        receipt = removal.remove(federation, ledger, request, recount=True)
        return receipt, load_state(federation, ledger)[0]


def head(federation: Federation, state: Any) -> list[torch.Tensor]:
    view = federation.algorithm.view(state)
    return [*view.head.weights, *view.head.bias, view.router.means]


def parts(state: Any) -> dict[str, str]:
    """Every cell as it was sealed, by the hash of its integers."""
    return {about.id: about.words for about in banks.origins(state.bank)}


def test_a_small_bank_is_the_same_model_and_remembers_the_same_cells():
    grown, state = ran(GROWN)
    little, tidy = ran(SMALL)
    assert len(tidy.bank.cells) < len(state.bank.cells) == len(parts(state))
    assert parts(tidy) == parts(state)
    assert all(map(torch.equal, head(grown, state), head(little, tidy)))
    folder = archive.place(little.folder)
    assert len(list(folder.iterdir())) == len(tidy.bank.cold) == 20


@pytest.mark.parametrize("purge", [False, True])
def test_forgetting_from_a_small_bank_gives_the_one_that_never_had_it(purge: bool, tmp_path: Path):
    little = assembled(tmp_path, SMALL)
    small.run(little)
    receipt, after = forgotten(little, purge=purge)
    assert receipt.records == 4
    assert receipt.recount
    _, never = ran(GROWN, gone=True)
    lora = banks.CellKind.LORA
    deep = {about.id for about in banks.origins(never.bank) if about.kind is lora}
    assert {n: w for n, w in parts(after).items() if n not in deep} == {
        n: w for n, w in parts(never).items() if n not in deep
    }
    assert all(map(torch.equal, head(little, after), head(*ran(GROWN, gone=True))))
    # What was removed is on disk no more, and what is left in cold storage is named by the bank.
    cold = [a for a in after.bank.cold if a.status is banks.Status.ARCHIVED]
    place = archive.place(tmp_path)
    assert len(list(place.iterdir()) if place.is_dir() else []) == len(cold)
    assert bool(cold) is not purge


def test_a_purged_cell_whose_site_is_away_cannot_be_changed(tmp_path: Path):
    little = assembled(tmp_path, SMALL)
    small.run(little)
    clients = small.assemble(
        tmp_path,
        *SETTINGS,
        SMALL,
        sites={name: spread(data) for name, data in small.data().items()},
        rounds=ROUNDS,
        wrap={"east": lambda answer: refuse},
    ).clients
    with Ledger.open(tmp_path) as ledger:
        server.purge_archive(little, ledger)
        before = small.fingerprint(load_state(little, ledger)[0])
        request = Request(kind="patient", site="north", name=GONE)
        with pytest.raises(ForgetIncomplete, match="was purged from the archive and cannot be"):
            removal.remove(replace(little, clients=clients), ledger, request)
        assert small.fingerprint(load_state(little, ledger)[0]) == before


def refuse(message: bytes) -> bytes:
    raise ConnectionError("east is away")
