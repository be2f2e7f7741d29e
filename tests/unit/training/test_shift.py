"""Base shifts and cores: what they compute, and that the base has its bits again."""

from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import GPT2Config, GPT2LMHeadModel

from fedkola.errors import Incompatible, ModelMismatch, StepFailed
from fedkola.training import evaluate
from fedkola.training.adapters import (
    adapted,
    combine,
    export_peft,
    folded,
    gated,
    targets,
    weights_template,
)
from fedkola.training.features import embed
from fedkola.training.fit import fit
from fedkola.training.model import Foundation

QUERY = "encoder.layer.0.attention.self.query"
TEXTS = ["acute fever", "fracture of left arm", "heart failure"]


@pytest.fixture(scope="module")
def gpt() -> Foundation:
    """One GPT-2 layer, whose fused projection is a Conv1D of 16 to 48."""
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=20, n_embd=16, n_layer=1, n_head=2, n_positions=16)
    return Foundation(
        name="gpt",
        kind="causal",
        model=GPT2LMHeadModel(config).eval().requires_grad_(False),
        tokenizer=list,
        hash="",
        width=16,
        max_tokens=16,
    )


def noise(*shape: int, seed: int) -> Tensor:
    return 0.3 * torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def some(foundation: Foundation, *, rank: int = 2) -> dict[str, Tensor]:
    template = weights_template(foundation, rank=rank, seed=1)
    return {
        name: value + noise(*value.shape, seed=i)
        for i, (name, value) in enumerate(template.items())
    }


def test_a_shift_of_a_conv1d_is_added_as_d_out_by_d_in_and_taken_back_bit_for_bit(gpt: Foundation):
    (layer, shape) = next(iter(targets(gpt).items()))
    assert shape == (48, 16)
    delta, x = noise(*shape, seed=3), noise(5, 16, seed=4)
    module = gpt.model.get_submodule(layer)
    before, parameter = module.weight.clone(), module.weight
    plain = module(x)
    with adapted(gpt, {f"{layer}.delta": delta}, scale=7.0) as model:
        torch.testing.assert_close(model.get_submodule(layer)(x), plain + x @ delta.T)
    assert module.weight is parameter
    assert torch.equal(module.weight, before)


def test_a_shift_and_an_adapter_add_up_on_a_linear_layer(encoder: Foundation):
    weights = {**some(encoder), f"{QUERY}.delta": noise(16, 16, seed=9)}
    a, b = weights[f"{QUERY}.lora_A"], weights[f"{QUERY}.lora_B"]
    x, module = noise(4, 16, seed=5), encoder.model.get_submodule(QUERY)
    expected = x @ (module.weight + weights[f"{QUERY}.delta"] + 0.5 * b @ a).T + module.bias
    with adapted(encoder, weights, scale=0.5) as model, torch.no_grad():
        torch.testing.assert_close(model.get_submodule(QUERY)(x), expected, rtol=1e-5, atol=1e-5)


def test_a_shift_stands_under_a_gate_too(encoder: Foundation):
    weights = {**some(encoder), f"{QUERY}.delta": noise(16, 16, seed=9)}
    a = {layer: weights[f"{layer}.lora_A"] for layer in targets(encoder)}
    b = {layer: weights[f"{layer}.lora_B"] for layer in targets(encoder)}
    ids, open_ = torch.tensor([[2, 5, 7, 3]]), torch.ones(1, 1)
    with adapted(encoder, weights, scale=0.5) as model, torch.no_grad():
        expected = model(input_ids=ids).last_hidden_state
    with (
        torch.no_grad(),
        gated(encoder, a, b, scale=0.5, slots=1, gate=open_, shift=weights) as model,
    ):
        found = model(input_ids=ids).last_hidden_state
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_nothing_is_embedded_while_the_base_is_shifted(encoder: Foundation):
    with (
        adapted(encoder, {f"{QUERY}.delta": noise(16, 16, seed=9)}, scale=1.0),
        pytest.raises(StepFailed),
    ):
        embed(encoder, TEXTS)
    embed(encoder, TEXTS)


def test_a_shift_that_fits_no_layer_is_refused_before_anything_changes(encoder: Foundation):
    for name, shape in (("elsewhere", (16, 16)), (QUERY, (16, 17))):
        with (
            pytest.raises(ModelMismatch, match="expected \\(d_out, d_in\\)"),
            adapted(encoder, {f"{name}.delta": torch.zeros(shape)}, scale=1.0),
        ):
            pass
    embed(encoder, TEXTS)


def test_a_core_stands_between_the_factors(encoder: Foundation):
    weights = some(encoder)
    core = noise(2, 2, seed=6)
    cored = {**weights, f"{QUERY}.lora_R": core}
    a, b = weights[f"{QUERY}.lora_A"], weights[f"{QUERY}.lora_B"]
    x, module = noise(4, 16, seed=5), encoder.model.get_submodule(QUERY)
    expected = x @ (module.weight + 0.5 * b @ core @ a).T + module.bias
    with adapted(encoder, cored, scale=0.5) as model, torch.no_grad():
        torch.testing.assert_close(model.get_submodule(QUERY)(x), expected, rtol=1e-5, atol=1e-5)
    assert torch.equal(folded(cored)[f"{QUERY}.lora_B"], b @ core)
    whole = combine([(cored, 1.0)])
    assert torch.equal(whole[f"{QUERY}.lora_B"] @ whole[f"{QUERY}.lora_A"], (b @ core) @ a)


def test_a_core_trains_alone_between_pinned_factors(encoder: Foundation):
    pinned = some(encoder)
    cores = {f"{layer}.lora_R": torch.zeros(2, 2) for layer in targets(encoder)}
    head = {"head.weight": noise(2, 16, seed=2), "head.bias": torch.zeros(2)}
    texts, labels = TEXTS * 4, [0, 1, 0] * 4
    after = fit(
        encoder, {**cores, **head}, texts, labels,
        steps=8, batch=12, lr=1e-2, seed=1, scale=2.0, pinned=pinned,
    )  # fmt: skip
    assert set(after) == {*cores, *head}
    assert all(bool(after[name].any()) for name in cores)
    first = evaluate.classify(encoder, {**pinned, **cores, **head}, texts, labels, scale=2.0)
    last = evaluate.classify(encoder, {**pinned, **after}, texts, labels, scale=2.0)
    assert last["loss"] < first["loss"]


def test_a_core_without_factors_or_of_another_rank_is_refused(encoder: Foundation):
    lonely = {f"{QUERY}.lora_R": torch.zeros(2, 2)}
    for weights in (lonely, {**some(encoder), f"{QUERY}.lora_R": torch.zeros(3, 3)}):
        with pytest.raises(ModelMismatch, match="lora_R"), adapted(encoder, weights, scale=1.0):
            pass


def test_a_shift_does_not_train_and_cannot_be_exported_as_an_adapter(
    encoder: Foundation, tmp_path: Path
):
    shifted = {
        **some(encoder),
        f"{QUERY}.delta": torch.zeros(16, 16),
        "head.weight": torch.zeros(2, 16),
    }
    with pytest.raises(ModelMismatch, match="give it as pinned"):
        fit(encoder, shifted, ["fever"], [0], steps=1, batch=1, lr=1.0, seed=0, scale=1.0)
    with pytest.raises(Incompatible, match="cannot carry"):
        export_peft(encoder, shifted, scale=1.0, folder=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_training_on_a_shifted_base_is_training_on_that_base(encoder: Foundation):
    shift = {f"{QUERY}.delta": noise(16, 16, seed=9)}
    weights = {**some(encoder), "head.weight": torch.zeros(2, 16)}
    options = {"steps": 3, "batch": 3, "lr": 1e-2, "seed": 1, "scale": 2.0}
    plain = fit(encoder, weights, TEXTS, [0, 1, 0], **options)
    other = fit(encoder, weights, TEXTS, [0, 1, 0], pinned=shift, **options)
    zero = {name: torch.zeros_like(value) for name, value in shift.items()}
    same = fit(encoder, weights, TEXTS, [0, 1, 0], pinned=zero, **options)
    assert set(other) == set(weights)
    assert not torch.equal(other["head.weight"], plain["head.weight"])
    assert all(torch.equal(same[name], plain[name]) for name in plain)
