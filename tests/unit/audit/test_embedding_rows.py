"""Tokens read off the rows of embedding tables, tied and untied."""

from collections.abc import Callable
from dataclasses import replace

import pytest
import small_notes
import torch
from small_notes import made, one_gradient, rows, sighting
from transformers import GPT2LMHeadModel

from fedkola.audit.embedding_rows import EmbeddingRows
from fedkola.audit.evidence import Known, Sequences
from fedkola.errors import DataError, NotFinite
from fedkola.training import whole
from fedkola.training.model import Foundation
from fedkola.training.whole import Local

NOTES = small_notes.NOTES[:3]


@pytest.fixture(scope="module")
def tied(tmp_path_factory: pytest.TempPathFactory) -> Foundation:
    return made(tmp_path_factory.mktemp("gpt") / "model")


@pytest.fixture(scope="module")
def untied(tied: Foundation) -> Foundation:
    torch.manual_seed(2)
    config = type(tied.model.config).from_dict(
        {**tied.model.config.to_dict(), "tie_word_embeddings": False}
    )
    return replace(tied, model=GPT2LMHeadModel(config).eval().requires_grad_(False))


def used(batch: Sequences) -> set[int]:
    return {token for row in batch for token in row}


def test_untied_rows_name_every_token_and_no_other(untied: Foundation) -> None:
    batch = rows(untied, NOTES)
    recovery = EmbeddingRows().recover(untied, one_gradient(untied, batch))
    assert set(recovery.bag) == used(batch)


@pytest.mark.parametrize("decay", [0.0, 0.1])
def test_untied_rows_name_tokens_after_many_steps_of_adamw(
    untied: Foundation, decay: float
) -> None:
    batch = rows(untied, NOTES)
    weights = whole.parameters(untied)
    local = Local(lr=1e-3, weight_decay=decay)
    moved, _, _ = whole.train(untied, weights, [[row] for row in batch], local)
    change = {name: moved[name] - weights[name] for name in weights}
    del change["lm_head.weight"]
    recovery = EmbeddingRows().recover(untied, sighting(untied, change, 3))
    inputs = {token for row in batch for token in row[:-1]}
    assert set(recovery.bag) == inputs


def test_a_single_sequence_is_put_in_order_by_learned_positions(untied: Foundation) -> None:
    batch = rows(untied, NOTES[1:2])
    recovery = EmbeddingRows().recover(untied, one_gradient(untied, batch))
    (row,) = recovery.sequences
    assert sum(a == b for a, b in zip(row, batch[0], strict=False)) >= len(batch[0]) - 2


@pytest.mark.parametrize("which", ["tied", "untied"])
def test_both_controls_come_with_the_evidence(which: str, request: pytest.FixtureRequest) -> None:
    base: Foundation = request.getfixturevalue(which)
    batches = [rows(base, NOTES[i : i + 1]) for i in range(3)]
    seen = [replace(one_gradient(base, batch), round=i) for i, batch in enumerate(batches)]
    truth = {(i, "site"): batch for i, batch in enumerate(batches)}
    evidence = EmbeddingRows().run(seen, Known(foundation=base, texts=NOTES), truth)
    assert evidence.control.passed
    recall = evidence.measures["token_recall"]
    assert recall.null is not None
    assert recall.value > recall.null + 0.3


def test_rows_turned_round_break_the_control(
    untied: Foundation, monkeypatch: pytest.MonkeyPatch
) -> None:
    from fedkola.audit import embedding_rows

    def turned(right: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
        return lambda *given: right(*given).flip(0)

    for name in ("moved", "standing_out"):
        monkeypatch.setattr(embedding_rows, name, turned(getattr(embedding_rows, name)))
    batch = rows(untied, NOTES[:1])
    evidence = EmbeddingRows().run(
        [one_gradient(untied, batch)], Known(foundation=untied, texts=NOTES), {(0, "site"): batch}
    )
    assert not evidence.control.passed


def test_frozen_embeddings_cannot_be_tried(tied: Foundation) -> None:
    seen = one_gradient(tied, rows(tied, NOTES[:1]))
    change = {name: value for name, value in seen.change.items() if "wte" not in name}
    with pytest.raises(DataError, match="the embeddings were frozen"):
        EmbeddingRows().recover(tied, replace(seen, change=change))


def test_a_row_that_is_not_finite_is_refused(tied: Foundation) -> None:
    seen = one_gradient(tied, rows(tied, NOTES[:1]))
    change = {name: value.clone() for name, value in seen.change.items()}
    change["transformer.wte.weight"][3] = float("inf")
    with pytest.raises(NotFinite, match="wte"):
        EmbeddingRows().recover(tied, replace(seen, change=change))
