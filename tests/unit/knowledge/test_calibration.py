"""What summed scores say: a temperature, a threshold for the unknown, and who is asked."""

from pathlib import Path

import pytest
import torch

from fedkola.knowledge import calibration, journal, openings
from fedkola.knowledge.bank import Bank
from fedkola.knowledge.calibration import TEMPERATURES, UNKNOWN_BINS
from fedkola.types import Dataset

SITES = ("A", "B", "C", "D")


def test_the_likeliest_temperature_is_chosen():
    likelihood = torch.zeros(len(TEMPERATURES), dtype=torch.int64)
    likelihood[3] = 1
    histogram = torch.zeros(UNKNOWN_BINS, dtype=torch.int64)
    found = calibration.chosen(likelihood, histogram, 7, width=2)
    assert (found.temperature, found.records) == (TEMPERATURES[3], 7)


def test_the_threshold_leaves_out_one_record_in_twenty():
    # Bins are 1/32 wide and start at -4, so bin 128 starts at 0 and bin 160 at 1.
    histogram = torch.zeros(UNKNOWN_BINS, dtype=torch.int64)
    histogram[128], histogram[160] = 95, 5
    likelihood = torch.zeros(len(TEMPERATURES), dtype=torch.int64)
    found = calibration.chosen(likelihood, histogram, 100, width=10)
    assert found.unknown == pytest.approx(10 / 32)
    histogram[160] = 6
    found = calibration.chosen(likelihood, histogram, 101, width=10)
    assert found.unknown == pytest.approx(10 * 33 / 32)


def test_a_bank_for_all_has_one_audience():
    assert calibration.audiences(Bank(), SITES, k_min=3) == [(None, SITES)]


def test_shortened_records_are_those_that_were_summed_with_half_their_words(tmp_path: Path):
    ids = ("r1", "r2", "r3")
    data = Dataset(
        records=ids,
        texts=("one two three four", "five", "six seven eight"),
        labels=("a", "a", "b"),
        patients=ids,
        windows=(1, 1, 2),
    )
    summed = data.take([0, 1])
    journal.write(
        tmp_path,
        journal.Entry(
            round=1,
            scope="s",
            records=summed.records,
            patients=summed.patients,
            labels=summed.labels,
            windows=summed.windows,
            z=torch.zeros(2, 2, dtype=torch.int16),
        ),
    )
    found = calibration.shortened(tmp_path, data, round=2, seed=5)
    assert found.records == ("r1", "r2")
    assert len(found.texts[0].split()) == 2
    assert found.texts[1] == "five"
    assert calibration.shortened(tmp_path, data, round=2, seed=5) == found


def test_readers_are_named_only_where_some_site_may_not_hold_a_scope():
    access = {"A": ("open", "closed"), "B": ("open",)}
    assert openings.readers(access, ("open", "closed"), ("A", "B")) == {"closed": ("A",)}
    assert openings.readers({"A": ("open",)}, ("closed",), ("A",)) == {"closed": ("",)}
