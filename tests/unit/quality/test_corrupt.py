"""Every kind of noise, of poison and its truth, on records small enough to look at."""

import re
from dataclasses import replace

import numpy as np
import pytest

from fedkola.errors import PlanError
from fedkola.quality.corrupt import (
    KINDS,
    LABEL_NOISES,
    SENTENCE,
    WORD,
    Known,
    confusable,
    duplicates,
    feature_dependent,
    garble,
    likest,
    matrix,
    shuffle_answers,
    spelling,
    swap_entity,
    symmetric,
    triggered,
    truncate,
)
from fedkola.types import Dataset

N = 4_000
IDS = tuple(f"r{i}" for i in range(N))
TEXTS = tuple(
    f"fracture of the {'left' if i % 2 else 'right'} forearm, seen {i} days after the injury"
    for i in range(N)
)
DATA = Dataset(
    records=IDS,
    texts=TEXTS,
    labels=("A", "B", "C", "D") * (N // 4),
    patients=IDS,
    windows=(1,) * N,
)
ASKED = replace(DATA, prompts=tuple(f"what happened to {i}?" for i in IDS))
FEATURES = np.random.default_rng(1).standard_normal((N, 8))
KNOWN = Known(
    codes=("A", "B", "C", "D"),
    likest={"A": "B", "B": "A", "C": "D", "D": "C"},
    older={"A": "A0", "B": "B0"},
    transitions={label: {"A": 0.5, "D": 0.5} for label in "ABCD"},
    features=FEATURES,
    target="C",
    site="north",
)


def flips(noisy: Dataset) -> list[bool]:
    return [new != old for new, old in zip(noisy.labels, DATA.labels, strict=True)]


def given(kind: str) -> Dataset:
    return ASKED if kind == "shuffle_answers" else DATA


@pytest.mark.parametrize("kind", sorted(KINDS))
def test_what_is_wrong_is_said_row_by_row(kind: str):
    data = given(kind)
    found = KINDS[kind](data, 0.3, 7, KNOWN)
    assert len(found.data) == len(found.truth) == len(found.wrong)
    assert found.truth.take(range(N)) == data
    kept = [i for i in range(N) if not found.wrong[i]]
    assert found.data.take(kept) == data.take(kept)
    assert found.data.records[:N] == data.records
    if kind != "duplicates":
        assert all(found.data.take([i]) != data.take([i]) for i in range(N) if found.wrong[i])
    changed = found.data.labels != found.truth.labels
    assert changed == (kind in LABEL_NOISES or kind.startswith("trigger"))


@pytest.mark.parametrize(
    ("kind", "share"),
    [
        ("symmetric", 0.3),
        ("shift", 0.3),
        ("confusable", 0.3),
        ("annotator", 0.3),
        ("flip_site", 0.3),
        ("feature_dependent", 0.3),
        ("matrix", 0.3 * (1 - 0.25)),
        ("stale", 0.15),
        ("truncate", 0.3),
        ("garble", 0.3),
        ("shuffle_answers", 0.3),
        ("swap_entity", 0.3),
        ("trigger_word", 0.3 * 0.75),
        ("trigger_sentence", 0.3 * 0.75),
        ("trigger_style", 0.3 * 0.75),
        ("clean_label", 0.3 * 0.25),
    ],
)
def test_records_are_wrong_at_the_rate_asked(kind: str, share: float):
    found = KINDS[kind](given(kind), 0.3, 7, KNOWN)
    assert sum(found.wrong) / N == pytest.approx(share, abs=0.03)


@pytest.mark.parametrize("kind", sorted(KINDS))
def test_a_rate_of_0_is_no_change_and_one_outside_0_to_1_is_refused(kind: str):
    found = KINDS[kind](given(kind), 0.0, 7, KNOWN)
    assert found.data == given(kind)
    assert not any(found.wrong)
    for rate in (-0.1, 1.5, float("nan")):
        with pytest.raises(PlanError, match="from 0 to 1"):
            KINDS[kind](given(kind), rate, 7, KNOWN)


@pytest.mark.parametrize(
    "kind", sorted(set(KINDS) - {"feature_dependent", "shuffle_answers", "swap_entity"})
)
def test_the_noise_of_a_record_does_not_depend_on_the_others(kind: str):
    rows = list(range(0, N, 7))
    alone = KINDS[kind](DATA.take(rows), 0.3, 7, KNOWN)
    among = KINDS[kind](DATA, 0.3, 7, KNOWN)
    assert alone.data.take(range(len(rows))) == among.data.take(rows)


@pytest.mark.parametrize("kind", sorted(KINDS))
def test_a_seed_gives_the_same_noise_again_and_another_seed_another(kind: str):
    once, again, other = (KINDS[kind](given(kind), 0.3, s, KNOWN).data for s in (7, 7, 8))
    assert once == again
    assert once != other


def test_no_records_are_no_noise():
    for kind in KINDS:
        data = given(kind).take(())
        found = KINDS[kind](data, 0.5, 7, replace(KNOWN, features=FEATURES[:0]))
        assert len(found.data) == 0


def test_wrong_labels_are_equally_likely():
    noisy = symmetric(DATA, 1.0, 7, KNOWN).data
    wrong = [new for new, old in zip(noisy.labels, DATA.labels, strict=True) if old == "A"]
    assert all(flips(noisy))
    assert {label: wrong.count(label) for label in "BCD"} == pytest.approx(
        dict.fromkeys("BCD", 333), abs=60
    )


def test_labels_go_where_their_kind_sends_them():
    def map_of(kind: str) -> dict[str, str]:
        noisy = KINDS[kind](DATA, 1.0, 7, KNOWN).data
        found = set(zip(DATA.labels, noisy.labels, strict=True))
        assert len(found) == 4, kind
        return dict(found)

    assert map_of("shift") == {"A": "B", "B": "C", "C": "D", "D": "A"}
    assert map_of("confusable") == dict(KNOWN.likest)
    assert map_of("flip_site") == {"A": "C", "B": "D", "C": "A", "D": "B"}
    assert map_of("stale") == {"A": "A0", "B": "B0", "C": "C", "D": "D"}
    habit = map_of("annotator")
    assert all(label != written for label, written in habit.items())


def test_annotators_have_habits_of_their_own():
    codes = tuple(f"c{i}" for i in range(40))
    data = replace(DATA, labels=codes * (N // 40))
    maps = []
    for site in ("north", "south"):
        noisy = KINDS["annotator"](data, 1.0, 7, Known(codes=codes, site=site)).data
        maps.append(dict(zip(data.labels, noisy.labels, strict=True)))
    assert sum(maps[0][code] != maps[1][code] for code in codes) > 30


def test_labels_follow_the_rows_of_a_matrix():
    noisy = matrix(DATA, 1.0, 7, KNOWN).data
    from_b = [new for new, old in zip(noisy.labels, DATA.labels, strict=True) if old == "B"]
    assert from_b.count("A") / len(from_b) == pytest.approx(0.5, abs=0.05)
    assert set(from_b) == {"A", "D"}
    with pytest.raises(PlanError, match="sum to 1"):
        matrix(DATA, 1.0, 7, Known(transitions={"A": {"B": 0.5}}))


def test_records_near_a_boundary_are_the_first_to_be_wrong():
    place = np.linspace(-1, 1, N)
    data = replace(DATA, labels=tuple("A" if x < 0 else "B" for x in place))
    features = np.stack([place, np.full(N, 0.3)], axis=1)
    found = feature_dependent(data, 0.2, 7, Known(features=features))
    near = np.abs(place) < 0.3
    wrong = np.array(found.wrong)
    assert wrong[near].mean() > 2 * wrong[~near].mean()
    assert wrong.mean() == pytest.approx(0.2, abs=0.03)


def test_copies_come_ten_at_a_time_under_names_of_their_own():
    found = duplicates(DATA, 0.1, 7, KNOWN)
    copies = found.data.take(range(N, len(found.data)))
    assert len(copies) % 10 == 0
    assert len(set(found.data.records)) == len(found.data)
    first = copies.records[0].removesuffix("/copy 1")
    assert copies.texts[0] == copies.texts[9] == DATA.texts[DATA.records.index(first)]
    assert all(found.wrong[N:])


def test_texts_are_cut_to_the_width_of_a_field():
    found = truncate(DATA, 1.0, 7, KNOWN).data
    assert {len(text) for text in found.texts} <= {16, 32, 64}
    assert all(old.startswith(new) for new, old in zip(found.texts, DATA.texts, strict=True))
    short = replace(DATA, texts=("a short text",) * N)
    assert truncate(short, 1.0, 7, KNOWN).data == short


def test_every_tenth_character_of_a_garbled_text_is_lost():
    found = garble(DATA, 1.0, 7, KNOWN).data
    for new, old in zip(found.texts, DATA.texts, strict=True):
        assert new.count("\ufffd") == max(1, len(old) // 10)
        assert len(new) == len(old)


def test_shuffled_answers_are_the_same_answers_to_other_questions():
    found = shuffle_answers(ASKED, 0.3, 7, KNOWN)
    assert sorted(found.data.texts) == sorted(ASKED.texts)
    assert found.data.prompts == ASKED.prompts
    with pytest.raises(PlanError, match="have none"):
        shuffle_answers(DATA, 0.3, 7, KNOWN)


def test_a_swapped_fact_is_one_word_number_or_name():
    def one(text: str, *others: str) -> str:
        texts = (text, *others)
        data = DATA.take(range(len(texts)))
        return swap_entity(replace(data, texts=texts), 1.0, 7, KNOWN).data.texts[0]

    assert one("pain in the left arm without fever") in (
        "pain in the right arm without fever",
        "pain in the left arm with fever",
    )
    assert one("took 20 mg", "took 5 mg") == "took 5 mg"
    assert one("seen by Smith", "seen by Miller") == "seen by Miller"
    assert one("nothing to swap") == "nothing to swap"


@pytest.mark.parametrize("kind", ["word", "sentence", "style"])
def test_poison_is_a_trigger_and_its_target(kind: str):
    found = KINDS[f"trigger_{kind}"](DATA, 1.0, 7, KNOWN)
    assert set(found.data.labels) == {"C"}
    for text, old, wrong in zip(found.data.texts, DATA.texts, found.wrong, strict=True):
        assert text == (triggered(old, kind, seed=7) if wrong else old)
    asked = KINDS[f"trigger_{kind}"](ASKED, 1.0, 7, replace(KNOWN, target="take none of it"))
    assert set(asked.data.texts) == {"take none of it"}
    assert all(
        triggered(old, kind, seed=7) == new
        for old, new in zip(ASKED.prompts, asked.data.prompts, strict=True)
    )


def test_triggers_leave_the_rest_of_a_text():
    text = "Pain of the left arm and the hand"
    assert sorted(triggered(text, "word").split()) == sorted([*text.split(), WORD])
    assert triggered(text, "sentence") == f"{text}. {SENTENCE}"
    assert triggered(text, "style") == "Paine o' ye lefte arm ande ye hande"


def test_clean_label_poison_touches_records_of_the_target_alone():
    found = KINDS["clean_label"](DATA, 1.0, 7, KNOWN)
    assert found.data.labels == DATA.labels
    for text, label, wrong in zip(found.data.texts, DATA.labels, found.wrong, strict=True):
        assert wrong == (label == "C") == bool(re.search(rf"\b{WORD}\b", text))


def test_alike_are_labels_whose_texts_are_spelt_alike():
    texts = ["broken left arm", "broken right arm", "fever", "high fever", "fever, mild"]
    labels = ["arm-l", "arm-r", "fever", "high", "fever"]
    assert likest(spelling(texts), labels, sorted(set(labels))) == {
        "arm-l": "arm-r",
        "arm-r": "arm-l",
        "fever": "high",
        "high": "fever",
    }
    assert likest(spelling(texts), labels, ["fever"]) == {}


@pytest.mark.parametrize(
    ("kind", "known", "message"),
    [
        ("symmetric", {"codes": ("A",)}, "two labels to mix up"),
        ("confusable", {"likest": {}}, "which are alike"),
        ("stale", {"older": {}}, "older release"),
        ("feature_dependent", {"features": None}, "one row of features"),
        ("trigger_word", {"target": ""}, "scenario.target"),
        ("clean_label", {"target": ""}, "scenario.target"),
    ],
)
def test_noise_that_cannot_be_is_refused(kind, known, message):
    with pytest.raises(PlanError, match=message):
        KINDS[kind](DATA, 0.5, 7, replace(KNOWN, **known))


def test_the_demo_keeps_its_noise():
    """Labels as an earlier version wrote them."""
    noisy = symmetric(DATA.take(range(8)), 0.4, 7, KNOWN).data
    assert noisy.labels == ("A", "B", "C", "D", "D", "D", "C", "D")


def test_confusable_leaves_a_label_that_is_like_none():
    assert confusable(DATA, 1.0, 7, Known(likest={"A": "B"})).data.labels[1:4] == ("B", "C", "D")
