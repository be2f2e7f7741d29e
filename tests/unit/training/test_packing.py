"""Packing loses no token and mixes no units when it must not; batches follow one cursor."""

import pytest

from fedkola.errors import DataError
from fedkola.training import fresh, packing
from fedkola.training.model import Foundation, load

TEXTS = ["aa bb cc dd ee ff gg hh", "one two", "three four five six seven eight", "x"]
UNITS = ["p1", "p2", "p1", "p3"]


@pytest.fixture(scope="module")
def gpt(tmp_path_factory: pytest.TempPathFactory) -> Foundation:
    folder = tmp_path_factory.mktemp("gpt") / "model"
    shape = fresh.Shape(width=16, layers=1, heads=2, vocabulary=280, length=16)
    fresh.create(folder, shape, ["one two three one two three"] * 4, seed=0)
    return load(str(folder), max_tokens=16)


def test_packed_together_only_the_last_sequence_is_short(gpt: Foundation) -> None:
    found, owners = packing.pack(gpt, TEXTS, UNITS, length=8, apart=False)
    assert [len(row) for row in found[:-1]] == [8] * (len(found) - 1)
    assert set(owners) == {""}
    flat = [token for row in found for token in row]
    assert flat.count(gpt.start or 0) == len(TEXTS)


def test_packed_apart_no_sequence_holds_two_units(gpt: Foundation) -> None:
    found, owners = packing.pack(gpt, TEXTS, UNITS, length=8, apart=True)
    for unit in ("p1", "p2", "p3"):
        own = [t for t, u in zip(TEXTS, UNITS, strict=True) if u == unit]
        alone, _ = packing.pack(gpt, own, [unit] * len(own), length=8, apart=False)
        assert [row for row, owner in zip(found, owners, strict=True) if owner == unit] == alone


def test_batches_go_on_from_a_cursor_and_every_epoch_reads_everything() -> None:
    whole = list(packing.batches(7, size=3, start=0, steps=7, seed=1))
    parts = [
        *packing.batches(7, size=3, start=0, steps=2, seed=1),
        *packing.batches(7, size=3, start=2, steps=5, seed=1),
    ]
    assert whole == parts
    read = [row for batch in whole for row in batch]
    assert sorted(read[:7]) == sorted(read[7:14]) == sorted(read[14:]) == list(range(7))
    assert read[:7] != read[7:14]
    assert list(packing.batches(2, size=5, start=0, steps=1, seed=1)) in ([[0, 1]], [[1, 0]])


def test_what_cannot_be_packed_is_refused(gpt: Foundation) -> None:
    with pytest.raises(DataError, match=r"pretrain\.length = 32"):
        packing.pack(gpt, TEXTS, UNITS, length=32, apart=False)
    with pytest.raises(DataError, match="1 units for 4 texts"):
        packing.pack(gpt, TEXTS, ["p"], length=8, apart=False)
    with pytest.raises(DataError, match="needs some text"):
        list(packing.batches(0, size=1, start=0, steps=1, seed=0))
