"""The span attack on models made here, and on a pretrained one where the data folder is."""

import gzip
import json
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from small_notes import NOTES, WIDTH, made, one_gradient, rows

from fedkola.audit.dager import Dager
from fedkola.audit.evidence import Known
from fedkola.errors import DataError, ModelMismatch, NotFinite
from fedkola.training.model import Foundation, load


@pytest.fixture(scope="module", params=["gpt2", "llama"])
def decoder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Foundation:
    return made(tmp_path_factory.mktemp(request.param) / "model", request.param, layers=3, heads=4)


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory) -> Foundation:
    return made(tmp_path_factory.mktemp("bert") / "model", "bert", layers=3, heads=4)


@pytest.fixture(scope="module")
def gpt(tmp_path_factory: pytest.TempPathFactory) -> Foundation:
    return made(tmp_path_factory.mktemp("gpt") / "model", "gpt2", layers=3, heads=4)


def test_one_gradient_gives_every_sequence_away_to_its_last_token(decoder: Foundation) -> None:
    batch = rows(decoder, NOTES[:2])
    assert sum(map(len, batch)) < WIDTH
    recovery = Dager().recover(decoder, one_gradient(decoder, batch))
    assert set(recovery.sequences[:2]) == set(batch)


def test_the_number_of_sequences_need_not_be_known(decoder: Foundation) -> None:
    batch = rows(decoder, NOTES[1:3])
    sighting = replace(one_gradient(decoder, batch), protocol={"name": "unknown"})
    assert set(Dager().recover(decoder, sighting).sequences) >= set(batch)


def test_the_sign_and_size_of_a_step_do_not_matter(decoder: Foundation) -> None:
    batch = rows(decoder, NOTES[:1])
    sighting = one_gradient(decoder, batch)
    stepped = {name: -1e-3 * value for name, value in sighting.change.items()}
    assert Dager().recover(decoder, replace(sighting, change=stepped)).sequences[:1] == batch


def test_both_controls_come_with_the_evidence(gpt: Foundation) -> None:
    batches = [rows(gpt, NOTES[i : i + 1]) for i in range(3)]
    seen = [one_gradient(gpt, batch, i) for i, batch in enumerate(batches)]
    truth = {(i, "site"): batch for i, batch in enumerate(batches)}
    evidence = Dager().run(seen, Known(foundation=gpt, texts=NOTES), truth)
    assert evidence.control.passed
    assert evidence.measures["exact"].value == 1.0
    assert evidence.measures["exact"].null == 0.0
    assert evidence.measures["exact"].low < 0.4  # three of three is not proof of more
    assert evidence.measures["rouge_2"].null is not None
    assert evidence.measures["rouge_2"].null < 0.3
    assert evidence.examples[0].truth == evidence.examples[0].got


def test_words_of_the_same_shape_give_nothing(gpt: Foundation) -> None:
    batch = rows(gpt, NOTES[:1])
    sighting = one_gradient(gpt, batch)
    generator = torch.Generator().manual_seed(3)
    random = {n: torch.randn(v.shape, generator=generator) for n, v in sighting.change.items()}
    recovery = Dager().recover(gpt, replace(sighting, change=random))
    assert batch[0] not in recovery.sequences


def test_more_tokens_than_the_width_hide_sequences(gpt: Foundation) -> None:
    batch = rows(
        gpt, tuple(f"{note} and {other}" for note in NOTES for other in NOTES if note != other)
    )
    assert sum(map(len, batch)) > 2 * WIDTH
    recovery = Dager().recover(gpt, one_gradient(gpt, batch))
    assert not set(recovery.sequences) & set(batch)


def broken_names(monkeypatch: pytest.MonkeyPatch) -> None:
    """The attack takes the output projection's gradients for those of query, key and value."""
    from fedkola.audit import layers

    def wrong(projection: layers.Projection, change: dict[str, torch.Tensor]) -> torch.Tensor:
        return change[f"transformer.h.{projection.depth // 2}.attn.c_proj.weight"].double().T

    monkeypatch.setattr(layers, "stacked", wrong)


def shuffled_truth(monkeypatch: pytest.MonkeyPatch) -> None:
    """The score is taken against the truth turned round."""
    from fedkola.audit import scoring

    right = scoring.scores
    monkeypatch.setattr(
        scoring,
        "scores",
        lambda got, truth, bag: right(got, tuple(row[::-1] for row in truth), bag=bag),
    )


@pytest.mark.parametrize("breaking", [broken_names, shuffled_truth])
def test_a_broken_attack_is_told_by_its_control(
    gpt: Foundation,
    monkeypatch: pytest.MonkeyPatch,
    breaking: Callable[[pytest.MonkeyPatch], None],
) -> None:
    batch = rows(gpt, NOTES[:1])
    breaking(monkeypatch)
    known = Known(foundation=gpt, texts=NOTES)
    evidence = Dager().run([one_gradient(gpt, batch)], known, {(0, "site"): batch})
    assert not evidence.control.passed


def test_an_encoder_gives_its_places_away(bert: Foundation) -> None:
    batch = rows(bert, NOTES[:1])
    evidence = Dager().run(
        [one_gradient(bert, batch)], Known(foundation=bert, texts=NOTES), {(0, "site"): batch}
    )
    # Tokens that were hidden or replaced for the loss do not stand in the input.
    assert evidence.control.passed
    assert evidence.measures["place_recall"].value >= 0.75
    assert evidence.measures["place_recall"].null is not None
    assert evidence.measures["place_recall"].null < 0.3


def test_a_change_that_is_not_finite_is_refused(gpt: Foundation) -> None:
    sighting = one_gradient(gpt, rows(gpt, NOTES[:1]))
    change = {n: v.clone() for n, v in sighting.change.items()}
    change["transformer.ln_f.weight"][0] = float("nan")
    with pytest.raises(NotFinite, match=r"ln_f.weight holds NaN"):
        Dager().recover(gpt, replace(sighting, change=change))


def test_a_change_without_blocks_cannot_be_tried(gpt: Foundation) -> None:
    sighting = one_gradient(gpt, rows(gpt, NOTES[:1]))
    change = {n: v for n, v in sighting.change.items() if "attn" not in n and "mlp" not in n}
    with pytest.raises(DataError, match="no attention and no MLP"):
        Dager().recover(gpt, replace(sighting, change=change))


def test_a_head_of_its_own_is_refused_for_a_tied_model(gpt: Foundation) -> None:
    sighting = one_gradient(gpt, rows(gpt, NOTES[:1]))
    change = {**sighting.change, "lm_head.weight": sighting.change["transformer.wte.weight"]}
    with pytest.raises(ModelMismatch, match="tie_word_embeddings"):
        Dager().recover(gpt, replace(sighting, change=change))


def test_another_model_is_refused(gpt: Foundation, bert: Foundation) -> None:
    sighting = one_gradient(gpt, rows(gpt, NOTES[:1]))
    with pytest.raises(ModelMismatch, match="give the model folder"):
        Dager().recover(bert, sighting)


def test_no_truth_no_score(gpt: Foundation) -> None:
    sighting = one_gradient(gpt, rows(gpt, NOTES[:1]))
    with pytest.raises(DataError, match="truth of none"):
        Dager().run([sighting], Known(foundation=gpt, texts=NOTES), {})


def test_sentences_leave_a_pretrained_model_whole() -> None:
    default = Path(__file__).parents[4] / "shared" / "data"
    data = Path(os.environ.get("FEDKOLA_DATA", default))
    if not data.is_dir():
        pytest.skip("the real data sets are absent: set FEDKOLA_DATA to their folder")
    base = load(str(data / "models" / "stories260K"), max_tokens=64)
    with gzip.open(data / "sentence_tasks" / "cola_dev.jsonl.gz", "rt") as file:
        texts = tuple(json.loads(next(file))["text"] for _ in range(4))
    for batch in (rows(base, texts[:2]), rows(base, texts[2:3])):
        assert sum(map(len, batch)) < base.width
        recovery = Dager().recover(base, one_gradient(base, batch))
        assert set(recovery.sequences[: len(batch)]) == set(batch)
