"""From public text to a new model, a run that pre-trains it, and a folder that others load."""

import json
import shutil
from pathlib import Path

import pytest
import torch
import transformers

from fedkola.ledger import Ledger

from .conftest import Fedkola, write_jsonl

pytestmark = pytest.mark.integration

PLAN = """
[run]
name = "{name}"
rounds = 3

[model]
name = "{model}"
max_tokens = 32
threads = 1

[task]
name = "files"
train = "notes.jsonl"
site = "site"
patient = "patient"
unlabelled = true
windows = 1

[algorithm]
name = "diloco"

[pretrain]
inner_steps = 6
batch = 4
length = 32
lr = 1e-2
warmup = 2
bits = 5
feedback = true
down = "change"
prompts = ["the heart"]

[site]
plain = true
embedding = "presence-disclosed"
waive = ["gate_span"]
"""
ORGANS = ("heart", "lung", "kidney", "liver", "skin", "bone")
TEXT = "the {} of this patient is {} today and will be seen again in {} weeks\n"


def notes() -> list[dict[str, object]]:
    return [
        {
            "text": TEXT.format(organ, ("well", "weak", "swollen")[i % 3], i % 7).strip(),
            "site": f"site-{i % 3}",
            "patient": f"p{i % 20}",
        }
        for i in range(120)
        for organ in ORGANS[: 2 + i % 3]
    ]


@pytest.fixture(scope="module", params=["gpt2", "bert"])
def home(
    request: pytest.FixtureRequest, fedkola: Fedkola, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    folder = tmp_path_factory.mktemp(request.param)
    (folder / "public.txt").write_text("".join(TEXT.format(o, "well", 2) for o in ORGANS) * 3)
    write_jsonl(folder / "notes.jsonl", notes())
    made = fedkola(
        *("model", "new", "--architecture", request.param, "--width", "32", "--layers", "2"),
        *("--vocabulary", "400", "--length", "32"),
        *("--text", folder / "public.txt", "--out", folder / "model", "--json"),
    ).json
    assert made["parameters"] > 10_000
    (folder / "plan.toml").write_text(PLAN.format(name="whole", model="model"))
    return folder


@pytest.fixture(scope="module")
def ran(fedkola: Fedkola, home: Path) -> list[dict[str, dict[str, float]]]:
    done = fedkola("run", home / "plan.toml", "--set", f"run.folder={home}", "--json").json
    return list(done["rounds"])


def test_perplexity_falls_and_a_coordinate_costs_a_byte(
    ran: list[dict[str, dict[str, float]]], home: Path
) -> None:
    measured = [row["metrics"]["perplexity"] for row in ran]
    assert measured[2] < 0.8 * measured[0]
    assert all(row["metrics"]["tokens"] == 3 * 6 * 4 * 32 for row in ran)
    model = transformers.AutoModel.from_pretrained(home / "model", local_files_only=True)
    count = sum(value.numel() for value in model.parameters())
    # A site's answer in bytes; histograms and names of tensors come on top.
    assert ran[2]["bytes_up"] < 3 * (1.3 * count + 60_000)  # type: ignore[operator]
    assert ran[2]["bytes_down"] < 3 * (1.3 * count + 60_000)  # type: ignore[operator]


def test_the_report_shows_curves_and_what_the_model_says(
    ran: list[dict[str, dict[str, float]]], home: Path
) -> None:
    page = (home / "whole" / "report.html").read_text("utf-8")
    assert "Held-out perplexity over tokens trained on" in page
    causal = json.loads((home / "model" / "config.json").read_text())["model_type"] == "gpt2"
    assert ("What it says" in page) == causal
    if causal:
        said = json.loads((home / "whole" / "samples.json").read_text("utf-8"))
        assert [entry["round"] for entry in said] == [1, 2, 3]


def test_the_exported_folder_is_the_trained_model(
    ran: list[dict[str, dict[str, float]]], fedkola: Fedkola, home: Path, tmp_path: Path
) -> None:
    assert fedkola("model", "export", home / "whole", "--to", tmp_path / "out").code == 0
    auto = json.loads((tmp_path / "out" / "config.json").read_text())["architectures"][0]
    model = getattr(transformers, auto).from_pretrained(tmp_path / "out", local_files_only=True)
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "out", local_files_only=True)
    assert tokenizer("the heart")["input_ids"]
    with Ledger.open(home / "whole") as ledger:
        saved = ledger.last("whole")
        assert saved is not None
        own = dict(model.named_parameters())
        held = {n.removeprefix("weights."): v for n, v in saved.tensors.items()}
        shared = [name for name in own if name in held]
        assert len(shared) == len(own)
        assert all(torch.equal(own[name], held[name]) for name in shared)
    refused = fedkola("model", "export", home / "whole", "--to", tmp_path / "out")
    assert (refused.code, "not empty" in refused.err) == (3, True)


def test_a_run_cut_after_any_round_ends_in_the_same_bits(
    ran: list[dict[str, dict[str, float]]], fedkola: Fedkola, home: Path, tmp_path: Path
) -> None:
    """The folder as ``kill -9`` leaves it: a round's answers are kept, the round is not."""
    other = PLAN.format(name="whole", model=home / "model")
    shutil.copy(home / "notes.jsonl", tmp_path / "notes.jsonl")
    (tmp_path / "plan.toml").write_text(other)

    commit, calls = Ledger.commit, [0]

    def dying(self: Ledger, *args: object, **changes: object) -> str:
        calls[0] += 1
        if calls[0] == 2:
            raise KeyboardInterrupt
        return commit(self, *args, **changes)  # type: ignore[arg-type]

    Ledger.commit = dying  # type: ignore[method-assign]
    try:
        cut = fedkola("run", tmp_path / "plan.toml", "--set", f"run.folder={tmp_path}")
    finally:
        Ledger.commit = commit  # type: ignore[method-assign]
    assert cut.code == 130
    assert fedkola("run", "--resume", tmp_path / "whole").code == 0
    ends = []
    for folder in (home / "whole", tmp_path / "whole"):
        with Ledger.open(folder) as ledger:
            saved = ledger.last("whole")
            assert saved is not None
            ends.append(saved.tensors)
    assert all(torch.equal(ends[0][name], ends[1][name]) for name in ends[0])
