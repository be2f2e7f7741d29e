import os
from pathlib import Path

import pytest
import torch
from torch.nn import functional

from fedkola.errors import Incompatible, NotFinite
from fedkola.training import adapters
from fedkola.training.features import FeatureCache, embed, integer_embeddings
from fedkola.training.model import Foundation, encode, load

TEXTS = [
    "acute fever",
    "fracture of left arm",
    "chronic kidney failure",
    "heart failure with infection of right lung",
    "fever",
    "infection due to other unspecified fever, left leg",
]


def test_embeddings_are_the_normalised_mean_of_the_last_hidden_state(encoder: Foundation) -> None:
    e = embed(encoder, ["acute fever"])
    ids = torch.tensor([[2, 5, 7, 3]])
    with torch.no_grad():
        mean = encoder.model(input_ids=ids).last_hidden_state.mean(dim=1)
    torch.testing.assert_close(e, mean / mean.norm(), rtol=1e-5, atol=1e-6)


def test_a_text_has_the_same_bits_alone_in_company_and_in_another_order(
    encoder: Foundation,
) -> None:
    together = embed(encoder, TEXTS * 5)
    assert all(torch.equal(embed(encoder, [t])[0], together[i]) for i, t in enumerate(TEXTS))
    assert torch.equal(embed(encoder, TEXTS[::-1]).flip(0), together[: len(TEXTS)])


def test_embeddings_do_not_depend_on_the_number_of_threads(
    minilm: Foundation, stories: Foundation
) -> None:
    for foundation in (minilm, stories):
        one = embed(foundation, TEXTS)
        torch.set_num_threads(3)
        three = embed(foundation, TEXTS)
        assert torch.get_num_threads() == 3
        torch.set_num_threads(1)
        assert torch.equal(one, three)


def test_a_causal_model_embeds_by_the_mean_of_its_middle_layer(stories: Foundation) -> None:
    e = embed(stories, ["Once upon a time"])
    ids = torch.tensor([[1, 403, 407, 261, 378]])
    with torch.no_grad():
        states = stories.model(input_ids=ids, output_hidden_states=True).hidden_states
    mean = states[3].mean(dim=1)
    torch.testing.assert_close(e, mean / mean.norm(), rtol=1e-5, atol=1e-6)


def test_no_texts_give_no_rows_and_an_empty_text_gives_a_row(encoder: Foundation) -> None:
    assert embed(encoder, []).shape == (0, 16)
    assert embed(encoder, [""]).norm(dim=1).item() == pytest.approx(1)


def test_integers_round_halves_to_even() -> None:
    e = torch.tensor([0.5, 1.5, 2.5, -0.5, -1.5, 1024.0]) / 1024
    assert integer_embeddings(e).tolist() == [0, 2, 2, 0, -2, 1024]
    assert integer_embeddings(e).dtype == torch.int16


def test_an_embedding_that_is_not_finite_stops_here(encoder_folder: Path) -> None:
    broken = load(str(encoder_folder), max_tokens=24)
    broken.model.get_parameter("embeddings.LayerNorm.weight").fill_(float("nan"))
    with pytest.raises(NotFinite):
        embed(broken, TEXTS)


def test_the_cache_gives_the_integers_of_the_embeddings_and_computes_each_text_once(
    encoder: Foundation, tmp_path: Path
) -> None:
    cache = FeatureCache(encoder, tmp_path)
    found = cache.integers([*TEXTS, TEXTS[0]])
    assert torch.equal(found, integer_embeddings(embed(encoder, [*TEXTS, TEXTS[0]])))
    assert found.dtype == torch.int16
    assert len(cache) == len(TEXTS)
    assert cache.integers([]).shape == (0, 16)


def test_a_second_cache_on_the_folder_reads_what_the_first_wrote(
    encoder: Foundation, tmp_path: Path
) -> None:
    found = FeatureCache(encoder, tmp_path).integers(TEXTS)
    again = FeatureCache(encoder, tmp_path)
    assert len(again) == len(TEXTS)
    assert torch.equal(again.integers(TEXTS), found)
    assert len(list(tmp_path.iterdir())) == 1


def test_a_cache_without_a_folder_lives_in_memory(encoder: Foundation) -> None:
    cache = FeatureCache(encoder)
    assert torch.equal(cache.integers(TEXTS), cache.integers(TEXTS))


@pytest.mark.parametrize("damage", ["cut", "flipped", "emptied"])
def test_a_damaged_file_is_reported_removed_and_computed_again(
    encoder: Foundation, tmp_path: Path, damage: str
) -> None:
    found = FeatureCache(encoder, tmp_path).integers(TEXTS)
    [path] = tmp_path.iterdir()
    content = bytearray(path.read_bytes())
    content[70] ^= 1
    path.write_bytes({"cut": content[:-7], "flipped": content, "emptied": b""}[damage])
    cache = FeatureCache(encoder, tmp_path)
    assert len(cache) == 0
    assert cache.damaged[0].startswith(path.name)
    assert torch.equal(cache.integers(TEXTS), found)
    assert len(FeatureCache(encoder, tmp_path)) == len(TEXTS)


def test_a_file_left_unfinished_by_a_killed_process_is_ignored(
    encoder: Foundation, tmp_path: Path
) -> None:
    (tmp_path / f"abc.{os.getpid()}.unfinished").write_bytes(b"half a fi")
    cache = FeatureCache(encoder, tmp_path)
    assert (len(cache), cache.damaged) == (0, ())


def test_a_folder_that_cannot_be_written_is_reported_and_the_cache_goes_on(
    encoder: Foundation, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = tmp_path / "cache"
    cache = FeatureCache(encoder, folder)
    folder.rmdir()
    folder.write_text("a file where the folder was")
    found = cache.integers(TEXTS)
    assert torch.equal(found, integer_embeddings(embed(encoder, TEXTS)))
    assert "features stay in memory" in caplog.text
    assert torch.equal(cache.integers(TEXTS[:2]), found[:2])


def test_models_and_lengths_do_not_share_entries(
    encoder: Foundation, encoder_folder: Path, stories: Foundation, tmp_path: Path
) -> None:
    long = " ".join(TEXTS)
    one = FeatureCache(encoder, tmp_path).integers([long])
    shorter = load(str(encoder_folder), max_tokens=5)
    assert not torch.equal(FeatureCache(shorter, tmp_path).integers([long]), one)
    assert FeatureCache(stories, tmp_path).integers([long]).shape == (1, 64)


def test_a_forgotten_text_leaves_memory_and_every_file(encoder: Foundation, tmp_path: Path) -> None:
    cache = FeatureCache(encoder, tmp_path)
    before = cache.integers(["fever", "cough", "headache"])

    cache.forget(["cough", "never seen"])

    assert len(cache) == 2
    assert len(FeatureCache(encoder, tmp_path)) == 2
    assert torch.equal(cache.integers(["fever", "cough", "headache"]), before)


def adapter(encoder: Foundation, seed: int) -> dict[str, torch.Tensor]:
    fresh = adapters.weights_template(encoder, rank=2, seed=seed)
    generator = torch.Generator().manual_seed(seed)
    return {
        name: torch.randn(value.shape, generator=generator) if name.endswith("lora_B") else value
        for name, value in fresh.items()
    }


def test_a_text_has_other_integers_under_an_adapter_and_the_same_in_any_company(
    encoder: Foundation, tmp_path: Path
) -> None:
    texts = ["acute fever", "fever", "chronic kidney failure"]
    cache = FeatureCache(encoder, tmp_path)
    frozen = cache.integers(texts)
    under = cache.under(adapter(encoder, 1), scale=2.0)
    found = under.integers(texts)
    assert not torch.equal(found, frozen)
    assert torch.equal(under.integers(texts[2:]), found[2:])
    assert torch.equal(FeatureCache(encoder).integers(texts), frozen)
    # Another process, another cache: the same integers, from the files of this one.
    again = FeatureCache(encoder, tmp_path).under(adapter(encoder, 1), scale=2.0)
    assert len(again) == 3
    assert torch.equal(again.integers(texts), found)
    assert cache.under(adapter(encoder, 1), scale=2.0) is under
    assert cache.under(adapter(encoder, 2), scale=2.0) is not under
    assert cache.under({}, scale=2.0) is cache


def test_what_is_forgotten_is_forgotten_under_every_adapter(
    encoder: Foundation, tmp_path: Path
) -> None:
    cache = FeatureCache(encoder, tmp_path)
    cache.under(adapter(encoder, 1), scale=2.0).integers(["acute fever", "fever"])
    later = FeatureCache(encoder, tmp_path)
    later.integers(["acute fever"])
    later.forget(["acute fever"])
    rest = FeatureCache(encoder, tmp_path)
    assert len(rest) == 0
    assert len(rest.under(adapter(encoder, 1), scale=2.0)) == 1


def test_a_causal_model_may_embed_by_its_last_state(stories_folder: Path) -> None:
    mean, last = (load(str(stories_folder), pooling=pooling) for pooling in ("mean", "last"))
    text = "Once upon a time there was a dog"
    ids = torch.tensor(encode(last, [text]))
    with torch.no_grad():
        states = last.model(input_ids=ids, output_hidden_states=True).hidden_states
    by_hand = functional.normalize(states[len(states) // 2][:, -1], dim=1)
    torch.testing.assert_close(embed(last, [text]), by_hand, rtol=1e-4, atol=1e-5)
    assert torch.equal(embed(last, ["A cat", text, "The dog ran"])[1:2], embed(last, [text]))
    assert not torch.allclose(embed(mean, [text]), by_hand, atol=1e-2)
    # Integers of one must never be added to those of the other.
    assert mean.hash != last.hash


def test_an_encoder_has_no_last_state_to_embed_by(encoder_folder: Path) -> None:
    with pytest.raises(Incompatible, match=r'set model\.pooling = "mean"'):
        load(str(encoder_folder), max_tokens=24, pooling="last")
