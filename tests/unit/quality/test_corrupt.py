from dataclasses import replace

import pytest

from fedkola.errors import PlanError
from fedkola.quality.corrupt import symmetric
from fedkola.types import Dataset

N = 4_000
IDS = tuple(f"r{i}" for i in range(N))
DATA = Dataset(
    records=IDS, texts=IDS, labels=("A", "B", "C", "D") * (N // 4), patients=IDS, windows=(1,) * N
)


def flips(noisy: Dataset) -> list[bool]:
    return [new != old for new, old in zip(noisy.labels, DATA.labels, strict=True)]


def test_labels_change_at_the_rate_asked_and_nothing_else_does():
    noisy = symmetric(DATA, 0.3, "ABCD", seed=7)

    assert sum(flips(noisy)) / N == pytest.approx(0.3, abs=0.03)
    assert replace(noisy, labels=DATA.labels) == DATA


def test_wrong_labels_are_equally_likely():
    noisy = symmetric(DATA, 1.0, "ABCD", seed=7)
    wrong = [new for new, old in zip(noisy.labels, DATA.labels, strict=True) if old == "A"]

    assert all(flips(noisy))
    assert {label: wrong.count(label) for label in "BCD"} == pytest.approx(
        dict.fromkeys("BCD", 333), abs=60
    )


def test_no_noise_is_no_change():
    assert symmetric(DATA, 0.0, "A", seed=7) == DATA


def test_the_noise_of_a_record_does_not_depend_on_the_others():
    rows = list(range(0, N, 7))

    assert symmetric(DATA.take(rows), 0.3, "ABCD", seed=7) == symmetric(
        DATA, 0.3, "ABCD", seed=7
    ).take(rows)


def test_another_seed_is_other_noise():
    assert symmetric(DATA, 0.3, "ABCD", seed=7) != symmetric(DATA, 0.3, "ABCD", seed=8)


@pytest.mark.parametrize(
    ("rate", "codes", "message"), [(1.5, "AB", "from 0 to 1"), (0.5, "A", "two labels to mix up")]
)
def test_noise_that_cannot_be_is_refused(rate, codes, message):
    with pytest.raises(PlanError, match=message):
        symmetric(DATA, rate, codes, seed=7)
