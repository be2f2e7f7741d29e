from pathlib import Path

import peft
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import GPT2Config, GPT2LMHeadModel

from fedkola.errors import Incompatible, ModelMismatch, StepFailed
from fedkola.training.adapters import (
    adapted,
    combine,
    export_peft,
    gated,
    targets,
    weights_template,
)
from fedkola.training.features import embed
from fedkola.training.model import Foundation

IDS = torch.tensor([[2, 5, 7, 3], [2, 8, 9, 3]])
QUERY = "encoder.layer.0.attention.self.query"


def trained(foundation: Foundation, *, rank: int, seed: int) -> dict[str, Tensor]:
    """An adapter whose B is not zero, as after training."""
    generator = torch.Generator().manual_seed(seed)
    return {
        name: value + 0.3 * torch.randn(value.shape, generator=generator)
        for name, value in weights_template(foundation, rank=rank, seed=seed).items()
    }


def hidden(model: torch.nn.Module) -> Tensor:
    with torch.no_grad():
        return model(input_ids=IDS).last_hidden_state


def test_targets_are_query_and_value_projections_with_their_sizes(
    encoder: Foundation, stories: Foundation
) -> None:
    assert targets(encoder) == {
        f"encoder.layer.{layer}.attention.self.{name}": (16, 16)
        for layer in (0, 1)
        for name in ("query", "value")
    }
    found = targets(stories)
    assert len(found) == 10
    assert found["model.layers.0.self_attn.q_proj"] == (64, 64)
    assert found["model.layers.0.self_attn.v_proj"] == (32, 64)


def test_a_model_without_known_projections_is_refused() -> None:
    other = Foundation(
        name="other",
        kind="encoder",
        model=torch.nn.Sequential(torch.nn.Linear(2, 2)),
        tokenizer=list,
        hash="",
        width=2,
        max_tokens=4,
    )
    with pytest.raises(ModelMismatch, match="no query and value projections"):
        targets(other)


def test_a_fresh_adapter_changes_nothing_and_follows_its_seed(encoder: Foundation) -> None:
    fresh = weights_template(encoder, rank=3, seed=5)
    assert fresh[f"{QUERY}.lora_A"].shape == (3, 16)
    assert fresh[f"{QUERY}.lora_A"].abs().max() <= 0.25
    assert torch.equal(fresh[f"{QUERY}.lora_B"], torch.zeros(16, 3))
    again = weights_template(encoder, rank=3, seed=5)
    assert all(torch.equal(fresh[name], again[name]) for name in fresh)
    assert not torch.equal(
        weights_template(encoder, rank=3, seed=6)[f"{QUERY}.lora_A"], fresh[f"{QUERY}.lora_A"]
    )
    with adapted(encoder, fresh, scale=2.0) as model:
        assert torch.equal(hidden(model), hidden(encoder.model))


def test_the_adapted_layer_adds_scale_times_b_a_x(encoder: Foundation) -> None:
    weights = trained(encoder, rank=3, seed=1)
    a, b = weights[f"{QUERY}.lora_A"], weights[f"{QUERY}.lora_B"]
    base = encoder.model.get_submodule(QUERY)
    x = torch.randn(4, 16, generator=torch.Generator().manual_seed(2))
    expected = x @ base.weight.T + base.bias + 0.5 * x @ a.T @ b.T
    with adapted(encoder, weights, scale=0.5) as model, torch.no_grad():
        found = model.get_submodule(QUERY)(x)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_the_base_has_the_same_bits_and_layers_after_an_adapted_block(encoder: Foundation) -> None:
    before = {name: value.clone() for name, value in encoder.model.state_dict().items()}
    layers = [(name, type(module)) for name, module in encoder.model.named_modules()]
    states = hidden(encoder.model)

    def interrupted() -> None:
        with adapted(encoder, trained(encoder, rank=2, seed=1), scale=2.0) as model:
            assert not torch.equal(hidden(model), states)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    after = encoder.model.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[name], before[name]) for name in before)
    assert [(name, type(module)) for name, module in encoder.model.named_modules()] == layers
    assert torch.equal(hidden(encoder.model), states)


def test_the_frozen_base_cannot_be_embedded_with_while_it_carries_an_adapter(
    encoder: Foundation,
) -> None:
    with adapted(encoder, trained(encoder, rank=2, seed=1), scale=2.0):
        with pytest.raises(StepFailed, match="carries an adapter"):
            embed(encoder, ["acute fever"])
        with (
            pytest.raises(StepFailed, match="carries an adapter"),
            adapted(encoder, {}, scale=1.0),
        ):
            pass


def test_no_factors_leave_the_base_as_it_is(encoder: Foundation) -> None:
    with adapted(encoder, {"head.bias": torch.zeros(3)}, scale=2.0) as model:
        assert model is encoder.model


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({f"{QUERY}.lora_B": torch.zeros(16, 5)}, r"expected \(r, 16\) and \(16, r\)"),
        ({"decoder.query.lora_B": torch.zeros(16, 2)}, "does not adapt"),
        ({f"{QUERY}.lora_A": None}, "one factor only"),
        (
            {f"{QUERY}.lora_A": torch.zeros(4, 16), f"{QUERY}.lora_B": torch.zeros(16, 4)},
            r"ranks \[2, 4\]",
        ),
    ],
)
def test_factors_that_do_not_fit_are_refused(
    encoder: Foundation, change: dict[str, Tensor | None], reason: str
) -> None:
    weights = {**weights_template(encoder, rank=2, seed=0), **change}
    kept = {name: value for name, value in weights.items() if value is not None}
    with pytest.raises(ModelMismatch, match=reason), adapted(encoder, kept, scale=1.0):
        pass


def test_a_one_hot_gate_is_that_slot_alone(encoder: Foundation) -> None:
    slots = [trained(encoder, rank=2, seed=seed) for seed in (1, 2, 3)]
    whole = combine([(slot, 1.0) for slot in slots])
    a_cat = {name[:-7]: value for name, value in whole.items() if name.endswith(".lora_A")}
    b_cat = {name[:-7]: value for name, value in whole.items() if name.endswith(".lora_B")}
    gate = torch.tensor([[0.0, 1.0, 0.0], [0.0, 0.0, 1.0]])
    with gated(encoder, a_cat, b_cat, scale=1.5, slots=3, gate=gate) as model:
        found = hidden(model)
    for row, slot in enumerate(slots[1:]):
        with adapted(encoder, slot, scale=1.5) as model:
            torch.testing.assert_close(found[row], hidden(model)[row], rtol=1e-5, atol=1e-5)


def test_a_gate_of_ones_is_the_sum_of_all_slots_and_no_gate_remains(encoder: Foundation) -> None:
    whole = combine([(trained(encoder, rank=2, seed=seed), 1.0) for seed in (1, 2)])
    a_cat = {name[:-7]: value for name, value in whole.items() if name.endswith(".lora_A")}
    b_cat = {name[:-7]: value for name, value in whole.items() if name.endswith(".lora_B")}
    before = hidden(encoder.model)
    with gated(encoder, a_cat, b_cat, scale=1.0, slots=2, gate=torch.ones(2, 2)) as model:
        found = hidden(model)
    with adapted(encoder, whole, scale=1.0) as model:
        torch.testing.assert_close(found, hidden(model), rtol=1e-5, atol=1e-5)
    assert torch.equal(hidden(encoder.model), before)


def test_a_gate_of_another_number_of_slots_is_refused(encoder: Foundation) -> None:
    a = {QUERY: torch.zeros(4, 16)}
    b = {QUERY: torch.zeros(16, 4)}
    with (
        pytest.raises(Incompatible, match="expected \\(batch, slots\\)"),
        gated(encoder, a, b, scale=1.0, slots=2, gate=torch.ones(2, 3)),
    ):
        pass


def test_adapters_of_different_layers_do_not_combine(encoder: Foundation) -> None:
    one = weights_template(encoder, rank=2, seed=0)
    other = {name: value for name, value in one.items() if "layer.0" in name}
    with pytest.raises(Incompatible, match="different layers"):
        combine([(one, 1.0), (other, 1.0)])
    assert combine([]) == {}


def test_an_export_holds_alpha_scale_times_rank_and_no_head(
    encoder: Foundation, tmp_path: Path
) -> None:
    weights = {**trained(encoder, rank=3, seed=1), "head.bias": torch.zeros(2)}
    export_peft(encoder, weights, scale=2.0, folder=tmp_path / "out")
    config = peft.LoraConfig.from_pretrained(str(tmp_path / "out"))
    assert (config.r, config.lora_alpha, config.bias) == (3, 6, "none")
    tensors = load_file(tmp_path / "out" / "adapter_model.safetensors")
    assert len(tensors) == 8
    assert torch.equal(
        tensors[f"base_model.model.{QUERY}.lora_A.weight"], weights[f"{QUERY}.lora_A"]
    )


def test_without_factors_there_is_nothing_to_export(encoder: Foundation, tmp_path: Path) -> None:
    with pytest.raises(ModelMismatch, match="no adapter to export"):
        export_peft(encoder, {}, scale=2.0, folder=tmp_path)


def test_a_transposed_conv1d_layer_is_adapted_by_the_same_product() -> None:
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=11, n_embd=8, n_layer=1, n_head=2, n_positions=16)
    model = GPT2LMHeadModel(config).eval().requires_grad_(False)
    gpt2 = Foundation(
        name="gpt2", kind="causal", model=model, tokenizer=list, hash="", width=8, max_tokens=16
    )
    layer = "transformer.h.0.attn.c_attn"
    assert targets(gpt2) == {layer: (24, 8)}
    weights = trained(gpt2, rank=2, seed=3)
    x = torch.randn(5, 8, generator=torch.Generator().manual_seed(1))
    base = model.get_submodule(layer)
    product = weights[f"{layer}.lora_B"] @ weights[f"{layer}.lora_A"]
    expected = x @ base.weight + base.bias + 2 * x @ product.T
    with adapted(gpt2, weights, scale=2.0) as found, torch.no_grad():
        torch.testing.assert_close(found.get_submodule(layer)(x), expected)
    with gated(
        gpt2,
        {layer: weights[f"{layer}.lora_A"]},
        {layer: weights[f"{layer}.lora_B"]},
        scale=2.0,
        slots=1,
        gate=torch.ones(1, 1),
    ) as found:
        torch.testing.assert_close(found.get_submodule(layer)(x[None])[0], expected)
