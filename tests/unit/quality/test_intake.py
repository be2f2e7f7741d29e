from datetime import date

import pytest

from fedkola.quality.intake import admit, plain


def test_usable_rows_come_back_in_order_with_their_positions():
    admitted = admit(["a", "b"], [" fever ", "cough"], ["X", 3])

    assert admitted.rows == (0, 1)
    assert admitted.records == ("a", "b")
    assert admitted.texts == ("fever", "cough")
    assert admitted.labels == ("X", "3")
    assert admitted.excluded == {}


def test_every_row_is_kept_or_counted_under_one_reason():
    texts = ["ok", "", "  ", None, float("nan"), "NaN", "None", ["ok"], b"ok", "\ud800", "ok", "ok"]
    labels = ["X"] * 10 + [None, ""]

    admitted = admit(range(12), texts, labels)

    assert admitted.rows == (0,)
    assert admitted.excluded == {
        "NaN text": 2,
        "broken text": 1,
        "empty label": 1,
        "empty text": 2,
        "missing label": 1,
        "missing text": 2,
        "nested text": 2,
    }
    assert len(admitted.rows) + sum(admitted.excluded.values()) == 12


def test_labels_outside_the_catalogue_are_counted():
    admitted = admit("ab", ["one", "two"], ["X", "Y"], known={"X"})

    assert admitted.rows == (0,)
    assert admitted.excluded == {"unknown label": 1}


def test_of_equal_identifiers_the_first_usable_record_stays():
    admitted = admit(["a", "a", "a", None], ["", "second", "third", "x"], ["X"] * 4)

    assert admitted.texts == ("second",)
    assert admitted.excluded == {"duplicate id": 1, "empty text": 1, "missing record": 1}


def test_unlabelled_text_has_empty_labels():
    assert admit("ab", ["one", "two"], None).labels == ("", "")


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (" A00 ", ("A00", "")),
        (4, ("4", "")),
        (4.0, ("4", "")),
        (0.5, ("0.5", "")),
        (True, ("True", "")),
        (date(2026, 1, 31), ("2026-01-31", "")),
        ("none", ("none", "")),
        ("<NA>", ("", "NaN")),
        ({"a": 1}, ("", "nested")),
    ],
)
def test_values_become_plain_text_or_say_what_is_wrong(value, expected):
    assert plain(value) == expected
