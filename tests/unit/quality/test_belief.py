"""Beliefs: whole fifteenths, tables of how labels are written, weights of the evidence."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fedkola.errors import DataError
from fedkola.quality import belief


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 10_000), labels=st.integers(1, 40))
def test_fifteenths_are_whole_and_sum_to_fifteen(seed: int, labels: int):
    generator = torch.Generator().manual_seed(seed)
    share = torch.rand(20, labels, generator=generator, dtype=torch.float64) ** 4
    share /= share.sum(1, keepdim=True)
    parts = belief.whole(share)
    assert parts.sum(1).tolist() == [15] * 20
    assert int(parts.min()) >= 0
    assert float((parts - 15 * share).abs().max()) <= 1 + 1e-9
    assert torch.equal(parts[3:4], belief.whole(share[3:4]))


def test_a_table_learns_which_label_is_written_for_which():
    checked = torch.tensor([[6, 4], [0, 10]])
    table = belief.first_table(checked, torch.tensor([60, 140]))
    assert table.sum(1).tolist() == pytest.approx([1, 1])
    assert table[0, 1] > 0.3
    assert table[1, 0] < 0.1


def test_beliefs_follow_the_table_where_scores_are_even():
    log_p = torch.log(torch.tensor([[0.5, 0.5]], dtype=torch.float64))
    table = torch.tensor([[0.6, 0.4], [0.0, 1.0]])
    said_first = belief.believed(log_p, table, torch.tensor([0]))
    said_second = belief.believed(log_p, table, torch.tensor([1]))
    assert said_first[0].tolist() == pytest.approx([1.0, 0.0], abs=1e-4)
    assert said_second[0].tolist() == pytest.approx([0.4 / 1.4, 1.0 / 1.4], abs=1e-4)


def test_a_label_without_records_is_never_believed():
    log_p = belief.blend(
        [torch.tensor([[1.0, 5.0, 0.0]])], [1.0], torch.tensor([True, False, True])
    )
    assert log_p[0, 1] == float("-inf")
    assert float(log_p.exp().sum()) == pytest.approx(1.0)


def test_the_likeliest_weights_are_chosen_from_sums():
    scores = torch.tensor([[1.0, 0.0], [0.0, 1.0]] * 20)
    noise = torch.tensor([[0.0, 1.0], [1.0, 0.0]] * 20)
    rows, known = torch.tensor([0, 1] * 20), torch.tensor([True, True])
    summed = belief.likelihoods([scores, noise, None], rows, known)
    ridge, regions, _ = belief.chosen(summed)
    assert ridge == max(belief.RIDGE)
    assert regions == 0.0
    assert belief.chosen(torch.zeros(len(belief.GRID))) == (8.0, 0.75, 0.0)


def test_names_are_compared_line_by_line():
    z = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    names = torch.tensor([[1.0, 1.0], [1.0, 0.0], [0.0, 1.0]])
    found = belief.nearest_names(z, names, torch.tensor([0, 0, 2]), num_labels=3)
    assert found[0].tolist() == pytest.approx([1.0, -1.0, 0.0])
    assert found[1].tolist() == pytest.approx([2**-0.5, -1.0, 1.0])


def test_no_evidence_is_refused():
    with pytest.raises(DataError, match="no evidence"):
        belief.blend([None], [1.0], torch.tensor([True]))
