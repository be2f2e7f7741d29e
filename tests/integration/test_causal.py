"""One round on a real causal language model, from unlabelled text and a plan."""

import random
from pathlib import Path

import pytest

from fedkola import server
from fedkola.evaluation import scoring
from fedkola.evaluation.tasks import load as load_task
from fedkola.ledger import Ledger
from fedkola.plan import load as load_plan
from fedkola.plan import override
from fedkola.training import evaluate, model

from .conftest import Fedkola, write_jsonl

pytestmark = pytest.mark.integration

PLAN = """
[run]
name = "stories"

[model]
name = "{model}"
max_tokens = 64

[task]
name = "files"
train = "stories.jsonl"
unlabelled = true
sites = 3
windows = 1

[algorithm]
rank = 4
batch = 8
lr = 1e-2

[knowledge]
lanes = ["lora", "router"]
public_reference = true
slots_max = 8
"""


@pytest.fixture(scope="module")
def home(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    base = data / "models" / "stories260K"
    if not base.is_dir():
        pytest.skip("stories260K is absent: set FEDKOLA_DATA to the folder that holds models/")
    folder = tmp_path_factory.mktemp("stories")
    write_jsonl(folder / "stories.jsonl", ({"text": story} for story in stories(150)))
    (folder / "plan.toml").write_text(PLAN.format(model=base.resolve()))
    return folder


def stories(count: int) -> list[str]:
    chance = random.Random(3)
    names, pets = ["Lily", "Tom", "Ben", "Mia"], ["dog", "cat", "bird", "fish"]
    things, places = ["red ball", "big box", "blue car"], ["park", "garden", "forest"]
    return [
        f"{chance.choice(names)} and a {chance.choice(pets)} went to the {chance.choice(places)}."
        f" They found a {chance.choice(things)} by the {chance.choice(['tree', 'road'])}."
        for _ in range(count)
    ]


def test_one_round_lowers_the_perplexity_of_a_real_language_model(
    fedkola: Fedkola, home: Path, tmp_path: Path
) -> None:
    document = fedkola("run", home / "plan.toml", "--set", f"run.folder={home}", "--json").json
    (only,) = document["rounds"]
    plan = load_plan(home / "plan.toml")
    base = model.load(plan.model.name, max_tokens=plan.model.max_tokens)
    untouched = evaluate.perplexity(base, {}, load_task(plan).test.texts, scale=1.0)
    assert only["refused"] == {}
    assert only["metrics"]["tokens"] == untouched["tokens"]
    assert only["metrics"]["loss"] < 0.9 * untouched["loss"] / untouched["tokens"]
    assert "perplexity" in fedkola("run", "--resume", home / "stories").out

    cells = fedkola("bank", "ls", home / "stories", "--json").json["cells"]
    assert {cell["kind"] for cell in cells} == {"lora", "router"}
    exported = fedkola("bank", "export", home / "stories", "--to", tmp_path / "out", "--json").json
    assert "adapter_model.safetensors" in exported["files"]
    asked = fedkola("predict", home / "stories", "Lily")
    assert (asked.code, asked.err.split(":")[0]) == (9, "KnowledgeError")
    receipt = fedkola(
        "bank", "forget", home / "stories", "--site", "site-3", "--recount", "--json"
    ).json
    assert receipt["recount"] is True


@pytest.mark.parametrize(
    "method", ["fedit", "ffa_lora", "rolora", "flora", "fedex_lora", "fed_sb", "replay", "ewc"]
)
def test_every_averaging_baseline_teaches_a_language_model(
    home: Path, tmp_path: Path, method: str
) -> None:
    settings = [f"algorithm.name={method}", "algorithm.exchanges=2", "algorithm.core=4"]
    plan = override(load_plan(home / "plan.toml"), settings)
    federation = server.assemble(plan, load_task(plan), tmp_path)
    test = federation.stream.test
    with Ledger.open(tmp_path, create=True) as ledger:
        state = server.run(
            federation, ledger, observe=lambda number, state: {}, progress=lambda report: None
        )
    base = evaluate.perplexity(federation.foundation, {}, test.texts, scale=1.0)
    found = scoring.perplexity(federation, state, test)
    assert found["tokens"] == base["tokens"]
    assert found["loss"] < 0.95 * base["loss"] / base["tokens"]
    assert not any(name.startswith("head") for name in state.weights)
