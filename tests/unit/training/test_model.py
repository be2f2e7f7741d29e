import shutil
import time
from pathlib import Path

import pytest
import torch
from torch import nn

from fedkola.errors import ModelMismatch
from fedkola.training.model import Foundation, FrozenLinear, encode, load


def test_minilm_comes_from_the_installed_package_and_keeps_its_hash(minilm: Foundation) -> None:
    assert (minilm.kind, minilm.width, minilm.max_tokens) == ("encoder", 384, 64)
    assert minilm.hash == "d739ef13dbb1fae39728a82aaceb8a224bc5a886135ae87f759392ec298e01df"
    assert encode(minilm, ["Cholera"])[0][0] == 101
    assert not any(p.requires_grad for p in minilm.model.parameters())
    assert not minilm.model.training


def test_a_folder_is_an_encoder_or_a_causal_model_by_its_configuration(
    encoder: Foundation, stories: Foundation
) -> None:
    assert (encoder.kind, encoder.width) == ("encoder", 16)
    assert (stories.kind, stories.width) == ("causal", 64)


def test_texts_of_a_causal_model_begin_with_its_start_token_and_are_cut(
    stories: Foundation,
) -> None:
    assert stories.start == 1
    assert encode(stories, ["", "Once upon a time"])[0] == [1]
    assert len(encode(stories, ["once " * 500])[0]) == 96


def test_texts_of_an_encoder_are_cut_at_max_tokens(encoder: Foundation) -> None:
    assert [len(row) for row in encode(encoder, ["fever", "fever " * 99])] == [3, 24]
    assert encode(encoder, []) == []


def test_the_hash_is_of_contents_and_follows_every_file(
    encoder: Foundation, encoder_folder: Path, tmp_path: Path
) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(encoder_folder, copy)
    assert load(str(copy), max_tokens=24).hash == encoder.hash
    words = (copy / "vocab.txt").read_text()
    (copy / "vocab.txt").write_text(words.replace("fever", "fewer"))
    assert load(str(copy), max_tokens=24).hash != encoder.hash


@pytest.mark.parametrize(
    ("absent", "named"),
    [
        ("vocab.txt", "tokenizer.json"),
        ("config.json", "config.json"),
        ("model.safetensors", "model.safetensors"),
    ],
)
def test_a_folder_that_lacks_a_file_is_refused_by_the_files_name(
    encoder_folder: Path, tmp_path: Path, absent: str, named: str
) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(encoder_folder, copy)
    (copy / absent).unlink()
    with pytest.raises(ModelMismatch, match=named):
        load(str(copy))


def test_damaged_weights_are_refused(encoder_folder: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(encoder_folder, copy)
    content = (copy / "model.safetensors").read_bytes()
    (copy / "model.safetensors").write_bytes(content[: len(content) // 2])
    with pytest.raises(ModelMismatch, match="cannot be read"):
        load(str(copy), max_tokens=24)


def test_weights_of_another_model_are_refused_rather_than_filled_in_at_random(
    encoder_folder: Path, tmp_path: Path
) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(encoder_folder, copy)
    config = (copy / "config.json").read_text()
    (copy / "config.json").write_text(
        config.replace('"num_hidden_layers": 2', '"num_hidden_layers": 3')
    )
    with pytest.raises(ModelMismatch, match="do not fit"):
        load(str(copy), max_tokens=24)


def test_a_configuration_that_is_no_text_model_is_refused(
    encoder_folder: Path, tmp_path: Path
) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(encoder_folder, copy)
    (copy / "config.json").write_text('{"model_type": "no-such-model"}')
    with pytest.raises(ModelMismatch, match=r"config\.json is not the configuration"):
        load(str(copy))


@pytest.mark.parametrize("name", ["somebody/no-such-model", "no-such-model"])
def test_an_unknown_hub_id_is_refused_at_once_and_says_what_to_do(name: str) -> None:
    start = time.perf_counter()
    with pytest.raises(ModelMismatch, match=f"hf download {name}"):
        load(name)
    assert time.perf_counter() - start < 1


def test_a_path_that_does_not_exist_is_named(tmp_path: Path) -> None:
    with pytest.raises(ModelMismatch, match="there is no model folder"):
        load(str(tmp_path / "nowhere"))


def test_more_tokens_than_the_model_has_positions_are_refused(encoder_folder: Path) -> None:
    with pytest.raises(ModelMismatch, match="reads 1 to 40 tokens"):
        load(str(encoder_folder), max_tokens=41)


def test_the_fast_frozen_layer_gives_the_plain_layers_output_and_gradient() -> None:
    torch.manual_seed(3)
    plain = nn.Linear(24, 40).requires_grad_(False)
    fast = nn.Linear(24, 40).requires_grad_(False)
    fast.load_state_dict(plain.state_dict())
    fast.__class__ = FrozenLinear
    x = torch.randn(2, 5, 24, requires_grad=True)
    y = x.detach().clone().requires_grad_()
    torch.testing.assert_close(fast(x), plain(y), rtol=1e-5, atol=1e-5)
    fast(x).square().sum().backward()
    plain(y).square().sum().backward()
    torch.testing.assert_close(x.grad, y.grad, rtol=1e-4, atol=1e-4)
