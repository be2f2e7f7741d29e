import math

import pytest
import torch
from torch.nn import functional

from fedkola.errors import Incompatible, ModelMismatch
from fedkola.training.adapters import combine, weights_template
from fedkola.training.evaluate import classify, perplexity, scores
from fedkola.training.features import embed
from fedkola.training.model import Foundation, encode

TEXTS = ["acute fever", "fracture of left arm", "heart failure with infection", "fever"]
LABELS = [0, 1, 1, 0]


def test_loss_correct_and_count_match_the_embeddings_by_hand(encoder: Foundation) -> None:
    head = {"head.weight": torch.randn(3, 16, generator=torch.Generator().manual_seed(0))}
    scores = 64 * embed(encoder, TEXTS) @ head["head.weight"].T
    wanted = torch.tensor(LABELS)
    found = classify(encoder, head, TEXTS, LABELS, scale=1.0)
    assert found["loss"] == pytest.approx(
        functional.cross_entropy(scores, wanted, reduction="sum").item(), rel=1e-5
    )
    assert found["correct"] == int((scores.argmax(dim=1) == wanted).sum())
    assert found["count"] == 4


def test_sums_of_parts_are_the_sum_of_the_whole_in_any_order(encoder: Foundation) -> None:
    head = {"head.weight": torch.randn(3, 16, generator=torch.Generator().manual_seed(0))}
    whole = classify(encoder, head, TEXTS, LABELS, scale=1.0)
    assert classify(encoder, head, TEXTS[::-1], LABELS[::-1], scale=1.0) == whole
    parts = [
        classify(encoder, head, TEXTS[i:j], LABELS[i:j], scale=1.0) for i, j in ((0, 1), (1, 4))
    ]
    assert sum(part["correct"] for part in parts) == whole["correct"]
    assert sum(part["loss"] for part in parts) == pytest.approx(whole["loss"], rel=1e-12)


def test_scores_are_the_heads_and_each_row_stands_alone(encoder: Foundation) -> None:
    head = {
        "head.weight": torch.randn(3, 16, generator=torch.Generator().manual_seed(0)),
        "head.bias": torch.tensor([1.0, 0.0, -1.0]),
    }
    found = scores(encoder, head, TEXTS, scale=1.0)
    by_hand = 64 * embed(encoder, TEXTS) @ head["head.weight"].T + head["head.bias"]
    torch.testing.assert_close(found, by_hand, rtol=1e-5, atol=1e-4)
    assert torch.equal(scores(encoder, head, TEXTS[2:3], scale=1.0)[0], found[2])
    with pytest.raises(ModelMismatch, match=r"head\.weight"):
        scores(encoder, {}, TEXTS, scale=1.0)


def test_no_texts_score_nothing(encoder: Foundation) -> None:
    head = {"head.weight": torch.zeros(3, 16)}
    assert classify(encoder, head, [], [], scale=1.0) == {"loss": 0, "correct": 0, "count": 0}


def test_the_loss_of_a_causal_model_is_the_negative_log_probability_of_its_texts(
    stories: Foundation,
) -> None:
    text = "Once upon a time, there was a little girl named Lily."
    found = perplexity(stories, {}, [text], scale=1.0)
    ids = torch.tensor(encode(stories, [text]))
    with torch.no_grad():
        by_hand = stories.model(input_ids=ids, labels=ids).loss.item()
    assert found["tokens"] == ids.shape[1] - 1
    assert found["loss"] / found["tokens"] == pytest.approx(by_hand, rel=1e-5)
    assert math.exp(found["loss"] / found["tokens"]) < 3


def test_a_one_hot_gate_scores_as_its_slot(stories: Foundation) -> None:
    generator = torch.Generator().manual_seed(0)
    one, two = (
        {
            name: value + 0.1 * torch.randn(value.shape, generator=generator)
            for name, value in weights_template(stories, rank=2, seed=seed).items()
        }
        for seed in (1, 2)
    )
    texts = ["Once upon a time", "The drug was new."]
    gate = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    whole = combine([(one, 1.0), (two, 1.0)])
    found = perplexity(stories, whole, texts, scale=2.0, gate=gate)
    alone = [
        perplexity(stories, slot, [text], scale=2.0)["loss"]
        for slot, text in zip((one, two), texts, strict=True)
    ]
    assert found["loss"] == pytest.approx(sum(alone), rel=1e-5)


def test_an_encoder_has_no_perplexity(encoder: Foundation) -> None:
    with pytest.raises(Incompatible, match="is an encoder"):
        perplexity(encoder, {}, TEXTS, scale=1.0)
