"""Answers as text and their probability, against values worked out by hand."""

import math

import pytest
import torch

from fedkola.knowledge.candidates import TRUST, mixed, replies

INF = float("inf")


def test_the_reply_is_the_text_of_the_best_label() -> None:
    scores = torch.tensor([[0.1, 0.9, -INF], [0.5, -INF, -INF], [-INF, -INF, -INF]])
    assert replies(scores, ["a", "b", "c"], {"a": "red", "b": "blue"}) == ["blue", "red", ""]
    assert replies(scores[:1], ["a", "b", "c"], {}) == ["b"]
    assert replies(torch.zeros(2, 0), [], {}) == ["", ""]


def test_an_answer_is_as_likely_as_two_models_say_together() -> None:
    nats = torch.tensor([math.log(4.0)] * 2, dtype=torch.float64)
    # At temperature 0.5 the labels weigh exp(2), exp(0), exp(0); two of them read "red".
    scores = torch.tensor([[1.0, 0.0, 0.0]] * 2)
    found = mixed(
        nats,
        scores,
        ["red", "red"],
        ["blue", "red", "red"],
        temperature=0.5,
        known=torch.tensor([True, False]),
    )
    p = 2 / (math.exp(2) + 2)
    assert found[0].item() == pytest.approx(-math.log((1 - TRUST) / 4 + TRUST * p))
    assert found[1].item() == pytest.approx(-math.log(TRUST / 4 + (1 - TRUST) * p))


def test_probabilities_of_all_answers_add_up_to_one() -> None:
    # A language model over exactly the three answers there are.
    p_lm = torch.tensor([0.2, 0.3, 0.5], dtype=torch.float64)
    scores = torch.tensor([[0.3, -0.2, 0.1]] * 3)
    answers = ["red", "blue", "grey"]
    for known in (True, False):
        found = mixed(
            -p_lm.log(),
            scores,
            answers,
            answers,
            temperature=0.1,
            known=torch.tensor([known] * 3),
        )
        assert (-found).exp().sum().item() == pytest.approx(1.0)


def test_what_no_label_says_is_left_to_the_language_model() -> None:
    nats = torch.tensor([2.0, 3.0], dtype=torch.float64)
    scores = torch.tensor([[0.0, 1.0], [-INF, -INF]])
    found = mixed(
        nats, scores, ["green", "red"], ["red", "blue"], temperature=1.0, known=torch.ones(2) > 0
    )
    assert found[0].item() == pytest.approx(2.0 - math.log(1 - TRUST))
    assert found[1].item() == pytest.approx(3.0)
