"""Every reason code of the intake, where it begins and where it does not."""

import random

import pytest

from fedkola.errors import DataError
from fedkola.quality.checks import CODES, FATAL, Flag, Records, digest, inspect, normalised
from fedkola.types import Label

WORDS = ("pain", "fever", "cough", "left", "arm", "since", "days", "and", "no", "improving")


def sentences(number: int, seed: int = 1) -> list[str]:
    """Different ordinary texts, their lengths spread."""
    chance = random.Random(seed)
    return [
        f"patient {'abcdefghij'[i % 10]}{'klmnopqrst'[i // 10 % 10]} has "
        + " ".join(chance.choices(WORDS, k=chance.randint(6, 30)))
        for i in range(number)
    ]


def codes(records: Records, **more: object) -> list[tuple[int, str]]:
    return [(flag.row, flag.code) for flag in inspect(records, **more)]


def flags(records: Records, code: str, **more: object) -> list[Flag]:
    return [flag for flag in inspect(records, **more) if flag.code == code]


def test_ordinary_records_have_no_finding():
    texts = tuple(sentences(300))
    records = Records(
        texts=texts, targets=("A", "B", "C") * 100, dates=tuple(float(i) for i in range(300))
    )
    registry = {code: Label(code=code, path=(code,), scope="") for code in "ABC"}
    assert inspect(records, registry=registry, now=300.0, first=0.0) == ()


def test_every_code_has_a_meaning_and_the_fatal_ones_are_codes():
    assert set(CODES) > FATAL
    assert all(meaning.endswith(".") for meaning in CODES.values())


def test_comparison_ignores_case_blanks_and_width():
    assert normalised("  The\u00a0LEFT \uff21rm\n") == "the left arm"
    assert digest("a", "b") != digest("ab", "")


def test_of_exact_duplicates_the_newest_is_kept():
    records = Records(
        texts=("Fever ", "fever", "FEVER", "cough"),
        targets=("A", "A", "a", "A"),
        dates=(3.0, 9.0, 5.0, 1.0),
    )
    found = flags(records, "EXACT_DUPLICATE")
    assert [(flag.row, flag.like, flag.evidence["records"]) for flag in found] == [
        (0, 1, 3),
        (2, 1, 3),
    ]
    undated = Records(texts=("fever", "fever"), targets=None)
    assert [(flag.row, flag.like) for flag in flags(undated, "EXACT_DUPLICATE")] == [(0, 1)]


def test_both_sides_of_a_contradiction_are_flagged():
    records = Records(texts=("fever", "Fever", "cough"), targets=("A", "B", "A"))
    found = flags(records, "CONTRADICTS_TWIN")
    assert [(f.row, f.like, f.evidence["says"]) for f in found] == [(0, 1, "B"), (1, 0, "A")]


def test_labels_that_were_never_valid_at_one_time_do_not_contradict():
    def registry(end: float) -> dict[str, Label]:
        return {
            "A": Label(code="A", path=("A",), scope="", valid_to=end),
            "B": Label(code="B", path=("B",), scope="", valid_from=10.0),
        }

    records = Records(texts=("fever", "fever"), targets=("A", "B"))
    assert codes(records, registry=registry(10.0)) == []
    assert codes(records, registry=registry(11.0)) == [
        (0, "CONTRADICTS_TWIN"),
        (1, "CONTRADICTS_TWIN"),
    ]


def test_a_missing_target_is_flagged_and_contradicts_nothing():
    records = Records(texts=("fever", "fever"), targets=("A", " "))
    assert codes(records) == [(1, "EMPTY_TARGET")]


@pytest.mark.parametrize(
    ("text", "evidence"),
    [
        ("fever \ufffd and cough", {"lost": 0.0588}),
        ("Schr\u00c3\u00b6der has fever", {"reads": "Schröder"}),
        ("the patient\u00e2\u20ac\u2122s arm", {"reads": "patient’s"}),
        ("ab " * 200, {"ratio": 35.0}),
    ],
)
def test_garbled_texts_are_told_by_lost_signs_encoding_or_compression(text, evidence):
    (found,) = flags(Records(texts=(text,)), "GARBLED")
    assert set(found.evidence) == set(evidence)
    for key, value in evidence.items():
        assert found.evidence[key] == (pytest.approx(value, rel=0.3) if key == "ratio" else value)


def test_random_letters_do_not_pack_and_texts_in_other_languages_are_not_garbled():
    chance = random.Random(4)
    noise = "".join(chr(chance.randint(0x21, 0x7E)) for _ in range(300))
    assert flags(Records(texts=(noise,)), "GARBLED")
    good = ("Größe und Maß der Österreicher, à côté", "これは熱があります", "boîte Ã la carte")
    assert flags(Records(texts=good), "GARBLED") == []
    one_lost = "x" * 20 + " and the fever went on for " + "days " * 20 + "\ufffd"
    assert flags(Records(texts=(one_lost,)), "GARBLED") == []


def test_texts_cut_at_the_width_of_a_field_are_found():
    cut = [f"{text} and on with it for ever {text} {text}"[:100] for text in sentences(8, seed=2)]
    ended = cut[0][:99] + "."
    found = flags(Records(texts=(*sentences(200), *cut, ended)), "TRUNCATED")
    # An ordinary text of just this length looks the same; one that ends its sentence does not.
    chance = [i for i, text in enumerate(sentences(200)) if len(text) == 100]
    assert [flag.row for flag in found] == [*chance, *range(200, 208)]
    assert len(chance) <= 3
    assert found[0].evidence == {"characters": 100, "records": 9 + len(chance)}
    # Four could be chance, and so could many where many lengths occur.
    assert flags(Records(texts=tuple(cut[:4])), "TRUNCATED") == []
    dense = tuple("x y " * 23 + "z" * i for i in range(1, 16) for _ in range(9))
    assert flags(Records(texts=dense), "TRUNCATED") == []


def test_a_text_in_foreign_letters_is_far_below_the_others():
    odd = "qxzw vkjq pfzx gwqj zzkx vvqp jxkw"
    found = flags(Records(texts=(*sentences(300), odd)), "FOREIGN_TEXT")
    assert [flag.row for flag in found] == [300]
    assert found[0].evidence["likelihood"] < found[0].evidence["usual"] - 1
    # Of few texts nothing is usual yet.
    assert flags(Records(texts=(*sentences(100), odd)), "FOREIGN_TEXT") == []


def test_boilerplate_differs_in_numbers_alone():
    forms = tuple(f"Visit {i} on day {i * 7}: nothing new." for i in range(20))
    found = flags(Records(texts=(*sentences(200), *forms)), "BOILERPLATE")
    assert [flag.row for flag in found] == list(range(200, 220))
    assert found[0].evidence == {"records": 20}
    assert flags(Records(texts=(*sentences(400), *forms)), "BOILERPLATE") == []
    # Equal texts are duplicates, not a form.
    same = Records(texts=("Nothing new.",) * 20)
    assert flags(same, "BOILERPLATE") == []


def test_labels_outside_the_catalogue_or_their_time_are_unknown():
    registry = {
        "A": Label(code="A", path=("A",), scope="", valid_from=5.0, valid_to=10.0),
    }
    records = Records(
        texts=("a", "b", "c", "d", "e"),
        targets=("A", "Z", "A", "A", "A"),
        dates=(7.0, 7.0, 4.9, 10.0, None),
    )
    found = flags(records, "UNKNOWN_LABEL", registry=registry)
    assert [flag.row for flag in found] == [1, 2, 3]
    assert found[1].evidence == {"label": "A", "from": 5.0, "to": 10.0}


def test_dates_are_there_and_neither_in_the_future_nor_too_early():
    day = 86_400.0
    records = Records(texts=tuple("abcd"), dates=(None, 100 * day, 100.5 * day, 98 * day))
    found = flags(records, "BAD_DATE", now=99.4 * day, first=99 * day)
    assert [(flag.row, flag.evidence["is"]) for flag in found] == [
        (0, "missing"),
        (2, "in the future"),
        (3, "too early"),
    ]


def test_columns_of_unequal_length_are_refused():
    with pytest.raises(DataError, match="2 and 1 rows"):
        Records(texts=("a",), targets=("A", "B"))


def test_findings_depend_on_no_order_of_the_records():
    texts = [*sentences(250), "fever", "fever", "Schr\u00c3\u00b6der", "qxzw vkjq pfzx gwqj zzkx"]
    targets = ["A"] * 250 + ["A", "B", "A", ""]
    order = list(range(len(texts)))
    random.Random(3).shuffle(order)
    straight = codes(Records(texts=tuple(texts), targets=tuple(targets)))
    shuffled = codes(
        Records(texts=tuple(texts[i] for i in order), targets=tuple(targets[i] for i in order))
    )
    assert sorted((order[row], code) for row, code in shuffled) == sorted(straight)
    assert len(straight) >= 5
