"""Forgetting from the command line: foreseen, carried out or waiting, and held to its receipt."""

import json
from pathlib import Path

import pytest

from .conftest import Fedkola, Write

pytestmark = pytest.mark.integration

PRIVATE = "public_reference = false\nlabel_floor = 1\nfeatures = 8"


def test_a_removal_is_foreseen_carried_out_and_verified(fedkola: Fedkola, plan_of: Write):
    assert fedkola("run", plan_of()).code == 0
    words = ("bank", "forget", "runs/r", "--site", "site-1", "--window", "1")
    foreseen = fedkola(*words, "--plan", "--json").json
    assert {cell["outcome"] for cell in foreseen["cells"]} == {"E0"}
    assert foreseen["bytes_up"] > 0
    shown = fedkola(*words, "--plan").out
    assert "nothing has been changed" in shown
    assert "E5: approximate: cannot occur" in shown
    receipt = fedkola(*words, "--recount", "--json").json
    assert (receipt["waits"], receipt["kind"], receipt["recount"]) == (False, "window", True)
    assert [c["cell"] for c in receipt["cells"]] == [c["cell"] for c in foreseen["cells"]]
    again = fedkola(*words).out
    assert "forgotten already" in again
    found = fedkola("bank", "verify", "runs/r", receipt["request"], "--json").json
    assert found["holds"]
    assert found["findings"][-1]["what"] == "view"
    forged = {**receipt, "records": receipt["records"] + 1}
    Path("receipt.json").write_text(json.dumps(forged))
    done = fedkola("bank", "verify", "runs/r", "receipt.json")
    assert done.code == 9
    assert "FAIL  receipt" in done.out


def test_a_label_and_a_module_are_forgotten_at_every_site(fedkola: Fedkola, plan_of: Write):
    assert fedkola("run", plan_of()).code == 0
    label = fedkola("bank", "forget", "runs/r", "--label", "heart", "--json").json
    assert (label["kind"], label["site"]) == ("label", "")
    shown = fedkola("bank", "show", "runs/r", "heart", "--json").json
    assert shown["valid_to"] is not None
    out = fedkola("bank", "forget", "runs/r", "--label", "heart").out
    assert "label at every site, forgotten already" in out


def test_private_data_waits_and_now_does_not(fedkola: Fedkola, plan_of: Write):
    assert fedkola("run", plan_of(knowledge=PRIVATE)).code == 0
    words = ("bank", "forget", "runs/r", "--site", "site-1", "--patient", "p-1")
    waits = fedkola(*words, "--json").json
    assert (waits["waits"], waits["lacking"]) == (True, 2)
    assert "waits for 2 more sites" in fedkola(*words).out
    refused = fedkola(*words, "--recount")
    assert refused.code == 9
    assert "give --now as well" in refused.err
    done = fedkola(*words, "--now", "--recount").out
    assert "released: operator" in done
    assert "floors not met: difference" in done


def test_a_request_that_is_half_said_is_refused(fedkola: Fedkola, plan_of: Write):
    assert fedkola("run", plan_of()).code == 0
    for words, message in (
        (("--patient", "p-1"), "a patient is forgotten at one site; give --site"),
        ((), "a site is forgotten at one site"),
        (("--label", "heart", "--window", "1"), "--window and --label were given together"),
    ):
        done = fedkola("bank", "forget", "runs/r", *words)
        assert done.code == 2
        assert message in done.err
    assert "no receipt 'x'" in fedkola("bank", "verify", "runs/r", "x").err
    Path("broken.json").write_text("{")
    assert fedkola("bank", "verify", "runs/r", "broken.json").code == 2
