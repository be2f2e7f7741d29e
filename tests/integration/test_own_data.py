"""Somebody else's records, with only a plan written: classification through every verb."""

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from fedkola.training import adapters, model

from .conftest import Fedkola

pytestmark = pytest.mark.integration

SYMPTOMS = """
[run]
name = "symptoms"

[model]
max_tokens = 32

[task]
name = "files"
train = "all.jsonl.gz"
sites = 4
windows = 2

[algorithm]
batch = 8

[knowledge]
features = 512
public_reference = true
lanes = ["analytic", "router", "lora"]
lora_records = 8
lora_steps = 1
"""

ABSTRACTS = """
[run]
name = "abstracts"

[model]
max_tokens = 32

[task]
name = "files"
train = "test_split.jsonl.gz"
sites = 4
windows = 5
window = "label"
per_label = 80

[knowledge]
features = 32
"""
# The floor of an analytic cell with 32 features is 128 records: two labels of 80 (less the test).
FLOOR = 128


def folder_with(plan: str, file: Path, to: Path) -> Path:
    if not file.exists():
        pytest.skip(f"{file.name} of {file.parent.name} is absent: set FEDKOLA_DATA")
    to.mkdir()
    shutil.copy(file, to)
    (to / "plan.toml").write_text(plan)
    return to


@pytest.fixture(scope="module")
def symptoms(
    fedkola: Fedkola, data: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, dict[str, Any]]:
    """The folder of a finished run, and what it printed."""
    home = tmp_path_factory.mktemp("own") / "home"
    folder_with(SYMPTOMS, data / "symptom2disease" / "all.jsonl.gz", home)
    document = fedkola("run", home / "plan.toml", "--set", f"run.folder={home}", "--json").json
    return home / "symptoms", document


@pytest.fixture
def copied(symptoms: tuple[Path, dict[str, Any]], tmp_path: Path) -> Path:
    """A copy of the run, to change; its data and plan stay where they are."""
    return Path(shutil.copytree(symptoms[0], tmp_path / "symptoms"))


def test_a_plan_and_a_file_are_enough_for_an_accurate_model(
    symptoms: tuple[Path, dict[str, Any]],
) -> None:
    folder, document = symptoms
    assert document["state"] == "done"
    assert [row["refused"] for row in document["rounds"]] == [{}, {}]
    last = document["rounds"][-1]["metrics"]
    assert last["nodes"] == 24
    assert last["top1"] > 0.85
    assert (folder / "report.html").stat().st_size > 10_000


def test_every_record_is_in_the_bank_the_test_or_the_count_of_exclusions(
    fedkola: Fedkola, symptoms: tuple[Path, dict[str, Any]]
) -> None:
    folder, document = symptoms
    cells = fedkola("bank", "ls", folder, "--json").json["cells"]
    for kind in ("analytic", "router", "lora"):
        held = sum(cell["records"] for cell in cells if cell["kind"] == kind)
        asked = document["rounds"][-1]["metrics"]["asked"]
        left_out = sum(sum(reasons.values()) for reasons in document["excluded"].values())
        assert held + asked + left_out == 1200


def test_predict_answers_with_labels_confidence_coverage_and_date(
    fedkola: Fedkola, symptoms: tuple[Path, dict[str, Any]]
) -> None:
    text = "I have a skin rash on my arms and legs, with red, itchy, dry and scaly patches."
    (answer,) = fedkola("predict", symptoms[0], text, "--top", "3", "--json").json["answers"]
    assert answer["answers"][0]["code"] == "Psoriasis"
    shares = [choice["confidence"] for choice in answer["answers"]]
    assert len(shares) == 3
    assert sum(shares) <= 1
    assert shares == sorted(shares, reverse=True)
    assert answer["coverage"] == 1.0
    assert answer["as_of"] == "window 2"
    shown = fedkola("predict", symptoms[0], text)
    assert "Psoriasis" in shown.out
    assert "as of window 2" in shown.out


def test_a_view_of_an_earlier_round_does_not_know_later_labels(
    fedkola: Fedkola, symptoms: tuple[Path, dict[str, Any]]
) -> None:
    text = "I have a high fever, chills, sweating and muscle pain, and my head hurts."
    words = ("predict", symptoms[0], text, "--top", "24", "--json")
    now, then = fedkola(*words).json, fedkola(*words, "--known-at", "1").json
    codes = [{c["code"] for c in found["answers"][0]["answers"]} for found in (now, then)]
    assert codes[1] < codes[0]
    assert then["answers"][0]["as_of"] == "window 1"
    assert then["answers"][0]["view"] != now["answers"][0]["view"]


def test_a_patient_and_then_the_whole_site_are_forgotten_with_a_receipt(
    fedkola: Fedkola, copied: Path
) -> None:
    before = fedkola("bank", "ls", copied, "--json").json
    record = symptoms_record(copied)
    words = ("bank", "forget", copied, "--site", "site-2", "--recount", "--json")
    patient = fedkola(*words, "--patient", record).json
    assert (patient["kind"], patient["records"], patient["recount"]) == ("patient", 1, True)
    assert {cell["outcome"] for cell in patient["cells"]} == {"E0", "E2"}
    assert record not in str(patient)
    site = fedkola(*words).json
    assert (site["kind"], site["recount"]) == ("site", True)
    assert {cell["outcome"] for cell in site["cells"]} == {"E0", "E1"}
    after = fedkola("bank", "ls", copied, "--json").json
    held = [sum(c["records"] for c in bank["cells"]) for bank in (before, after)]
    # Rows, routers, adapters and Grams: four cells hold every record.
    assert held[0] - held[1] == 4 * (1 + site["records"])
    assert [removal["request"] for removal in after["removals"]] == [
        patient["request"],
        site["request"],
    ]
    assert fedkola("bank", "show", copied, site["request"], "--json").json["records"] > 200
    assert list((copied / "sites" / "site-2" / "journal").glob("*")) == []
    assert not (copied / "features").exists()
    text = fedkola("predict", copied, "a dry cough and wheezing").out
    assert site["view_after"][:16] in text


def symptoms_record(run: Path) -> str:
    """A record of site-2 as its own journal has it; without a patient column it is its patient."""
    from fedkola.knowledge import journal

    return journal.entries(run / "sites" / "site-2")[0].patients[0]


def test_the_exported_bank_gives_the_same_states_through_stock_peft(
    fedkola: Fedkola, symptoms: tuple[Path, dict[str, Any]], tmp_path: Path
) -> None:
    peft = pytest.importorskip("peft")
    done = fedkola("bank", "export", symptoms[0], "--to", tmp_path / "out", "--json").json
    assert {"adapter_config.json", "adapter_model.safetensors", "provenance.json"} <= set(
        done["files"]
    )
    base = model.load("minilm", max_tokens=32)
    ids = {"input_ids": torch.tensor([[101, 1045, 2031, 1037, 9016, 102]])}
    with torch.no_grad():
        frozen = base.model(**ids).last_hidden_state
        loaded = peft.PeftModel.from_pretrained(base.model, tmp_path / "out")
        from_peft = loaded(**ids).last_hidden_state
        loaded.unload()
        template = adapters.weights_template(base, rank=8, seed=0)
        from safetensors.torch import load_file

        stored = load_file(tmp_path / "out" / "adapter_model.safetensors")
        ours = {
            name: stored[f"base_model.model.{name}.weight"]
            for name in template
            if name.endswith((".lora_A", ".lora_B"))
        }
        with adapters.adapted(base, ours, scale=2.0) as adapted:
            expected = adapted(**ids).last_hidden_state
    assert torch.allclose(from_peft, expected, atol=1e-5)
    assert not torch.allclose(from_peft, frozen, atol=1e-4)
    refused = fedkola("bank", "export", symptoms[0], "--to", tmp_path / "out")
    assert (refused.code, refused.err.split(":")[0]) == (9, "BasisMismatch")


def test_under_the_real_floors_what_is_too_little_waits_and_is_reported(
    fedkola: Fedkola, data: Path, tmp_path: Path
) -> None:
    """Labels arrive one after the other; a router needs as many records as an embedding is wide,
    so that four of them wait and five together open."""
    home = tmp_path / "home"
    folder_with(ABSTRACTS, data / "medical_abstracts" / "test_split.jsonl.gz", home)
    words = ("run", home / "plan.toml", "--set", f"run.folder={home}", "--json")
    early = fedkola(*words, "--set", "run.name=early", "--set", "run.rounds=4").json
    assert early["parked"] == {"test_split": 320}
    parked = fedkola("bank", "ls", home / "early").out
    assert "parked: test_split: 320 records" in parked
    done = fedkola(*words).json
    bank = fedkola("bank", "ls", home / "abstracts", "--json").json
    cells = [cell for cell in bank["cells"] if cell["kind"] == "analytic"]
    assert {cell["round"]: cell["records"] for cell in cells} == {5: 400}
    assert all(cell["records"] >= FLOOR and cell["contributors"] == 4 for cell in cells)
    assert bank["parked"] == done["parked"] == {}
    shown = fedkola("bank", "show", home / "abstracts", "test_split", "--json").json
    assert shown["parked"] == 0
    # Its label rows and its router; the Gram belongs to no scope.
    assert [event["kind"] for event in shown["history"]].count("SEAL") == 2
    assert any("per_label" in notice for notice in done["notices"])
    assert done["rounds"][-1]["metrics"]["nodes"] == 5
