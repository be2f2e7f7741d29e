"""Completions against the plain loss of whole sequences, and continuations against the logits."""

from itertools import product
from pathlib import Path

import pytest
import torch
from small_gpt import small_gpt

from fedkola.errors import DataError, Incompatible
from fedkola.training import fresh, whole
from fedkola.training.completions import Completions, completion_nll, sample
from fedkola.training.model import Foundation, load

PREFIX = [5, 17, 30, 8]


@pytest.fixture(scope="module", params=["gpt2", "llama"])
def base(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Foundation:
    folder = tmp_path_factory.mktemp(request.param) / "model"
    if request.param == "gpt2":
        return small_gpt(folder, width=16, vocabulary=300)
    shape = fresh.Shape(architecture="llama", width=16, layers=2, heads=2, vocabulary=300)
    fresh.create(folder, shape, ["the heart and the lung and the heart"], seed=0)
    return load(str(folder), max_tokens=32, whole=True)


def every_token(base: Foundation) -> list[list[int]]:
    return [[token] for token in range(len(base.model.get_input_embeddings().weight))]  # type: ignore[operator]


def test_the_loss_of_a_completion_is_that_of_the_sequence_less_that_of_its_prefix(
    base: Foundation,
) -> None:
    weights = whole.parameters(base)
    completions = [list(ids) for ids in product([3, 4, 9], [3, 11], [2, 7, 20])]
    completions += [[6], [6, 3], [9, 9, 9, 9, 9]]
    found = completion_nll(base, weights, PREFIX, Completions.of(completions))
    prefix = whole.nll(base, weights, [PREFIX])[0, 0]
    whole_nats = whole.nll(base, weights, [PREFIX + ids for ids in completions])[:, 0]
    assert torch.allclose(found, whole_nats - prefix, atol=1e-4)
    again = completion_nll(base, weights, PREFIX, Completions.of(completions[::-1]))
    assert torch.allclose(again.flip(0), found, atol=1e-6)


def test_more_completions_than_one_pass_holds(base: Foundation) -> None:
    weights = whole.parameters(base)
    completions = [list(ids) for ids in product(range(40), range(20), [1, 2])]
    found = completion_nll(base, weights, PREFIX, Completions.of(completions))
    picked = list(range(0, len(completions), 97))
    alone = torch.cat(
        [completion_nll(base, weights, PREFIX, Completions.of([completions[i]])) for i in picked]
    )
    assert torch.allclose(found[picked], alone, atol=1e-4)


def test_the_greedy_continuation_takes_the_likeliest_token_each_time(base: Foundation) -> None:
    weights = whole.parameters(base)
    (found,) = sample(base, weights, PREFIX, length=3)
    so_far = list(PREFIX)
    for token in found:
        every = completion_nll(base, weights, so_far, Completions.of(every_token(base)))
        assert float(every[token]) == float(every.min())
        so_far.append(token)


def test_samples_stay_among_the_likeliest(base: Foundation) -> None:
    weights = whole.parameters(base)
    generator = torch.Generator().manual_seed(0)
    found = sample(base, weights, PREFIX, length=1, count=200, top=5, generator=generator)
    every = completion_nll(base, weights, PREFIX, Completions.of(every_token(base)))
    likeliest = set(every.argsort()[:5].tolist())
    assert {row[0] for row in found} <= likeliest
    assert len({row[0] for row in found}) == 5


def test_nothing_is_completed_without_a_prefix_or_beyond_the_model(base: Foundation) -> None:
    weights = whole.parameters(base)
    with pytest.raises(DataError, match="at least one of each"):
        completion_nll(base, weights, [], Completions.of([[1]]))
    with pytest.raises(DataError, match="max_tokens"):
        completion_nll(base, weights, PREFIX, Completions.of([[1] * 40]))


def test_a_completion_has_a_token() -> None:
    with pytest.raises(DataError, match="at least one token"):
        Completions.of([[1], []])


def test_an_encoder_completes_nothing(encoder: Foundation, tmp_path: Path) -> None:
    with pytest.raises(Incompatible, match="continues no text"):
        sample(encoder, {}, PREFIX, length=2)
