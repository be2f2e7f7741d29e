"""Metrics of generated answers, against values worked out by hand."""

import math

import pytest

from fedkola.errors import DataError
from fedkola.evaluation import text
from fedkola.knowledge.stream import Stream
from fedkola.types import Catalogue, Dataset


def test_articles_case_punctuation_and_space_do_not_count() -> None:
    assert text.normalised("  The Cat, an 'old' one; sat on a\tmat. ") == "cat old one sat on mat"
    assert text.normalised("Theatre anthem — aorta") == "theatre anthem aorta"
    assert text.exact_match("The  Café!", ["a tea", "café"])
    assert not text.exact_match("cafe", ["café"])
    assert not text.exact_match("anything", [])


def test_token_f1_counts_words_in_common_as_often_as_both_have_them() -> None:
    # 2 shared of 3 and 4 words: P = 2/3, R = 1/2, F1 = 4/7.
    assert text.token_f1("red red ball", ["big red ball here"]) == pytest.approx(4 / 7)
    assert text.token_f1("blue", ["red"]) == 0.0
    assert text.token_f1("the", ["a"]) == 1.0
    assert text.token_f1("blue", []) == 0.0
    assert text.token_f1("north wing", ["south", "north wing"]) == 1.0


def test_rouge_l_respects_order_where_f1_does_not() -> None:
    # Longest common subsequence of "c a b" and "a b c" is "a b"; "a" is an article, so use others.
    assert text.rouge_l("z x y", ["x y z"]) == pytest.approx(2 / 3)
    assert text.token_f1("z x y", ["x y z"]) == 1.0
    # police killed gunman / police kill gunman: 2 of 3 and 3.
    assert text.rouge_l("police kill the gunman", ["police killed the gunman"]) == 2 / 3
    assert text.rouge_l("", ["x"]) == 0.0


def test_perplexity_is_exp_of_the_mean_over_tokens_not_over_answers() -> None:
    assert text.perplexity([math.log(2), 3 * math.log(4)], [1, 3]) == pytest.approx(2 ** (7 / 4))
    assert text.perplexity([1e6], [1]) == math.inf
    with pytest.raises(DataError, match="no tokens"):
        text.perplexity([], [])


def test_a_choice_is_made_by_likelihood_per_token() -> None:
    # 6 nats over 4 tokens is likelier per token than 2 over 1.
    assert text.choose([2.0, 6.0, 9.0], [1, 4, 3]) == 1
    assert text.choose([2.0, 2.0], [1, 1]) == 0
    with pytest.raises(DataError, match="1 likelihoods and 2 lengths"):
        text.choose([1.0], [1, 2])


def test_stale_is_what_was_right_and_is_not_now() -> None:
    assert text.stale("The north wing.", ["south wing"], ["north wing"])
    assert not text.stale("south wing", ["south wing"], ["north wing"])
    assert not text.stale("east wing", ["south wing"], ["north wing"])
    # What was right twice is right now.
    assert not text.stale("north wing", ["north wing"], ["south wing", "north wing"])


def test_scores_are_means_over_answers() -> None:
    found = text.scores(
        {"one": "red", "two": "old", "three": "big dog", "four": "nothing"},
        {"one": ["red"], "two": ["new"], "three": ["big cat"], "four": ["grey"]},
        {"two": ["old"]},
    )
    assert found == {"exact": 0.25, "f1": 0.375, "rouge": 0.375, "stale": 0.25}
    assert text.scores({}, {}, {}) == {"exact": 0.0, "f1": 0.0, "rouge": 0.0, "stale": 0.0}
    with pytest.raises(DataError, match="'one'"):
        text.scores({"one": "red"}, {"one": []}, {})


def test_facts_are_stable_evolved_or_uncharted_as_of_a_window() -> None:
    # "a" is known from window 1 and changes in 3; "b" is known from window 2 and never changes.
    test = Dataset(
        records=("a/1", "a/2", "b/1"),
        prompts=("what is a?", "what is a?", "what is b?"),
        texts=("x", "y", "z"),
        labels=("x", "y", "z"),
        patients=("", "", ""),
        windows=(1, 3, 2),
    )
    stream = Stream(
        catalogue=Catalogue(system="s", levels=("l",), labels=()),
        sites={},
        test=test,
        windows=("1", "2", "3"),
        ends={"a/1": 2},
        stale={"a/2": ("x",)},
    )
    assert text.kinds(stream, 1) == {"a/1": "stable", "b/1": "uncharted"}
    assert text.kinds(stream, 2) == {"a/1": "stable", "b/1": "stable"}
    assert text.kinds(stream, 3) == {"a/2": "evolved", "b/1": "stable"}
