"""Regions: a record never supports itself, and nothing depends on batch, order or who holds it."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fedkola.errors import DataError
from fedkola.quality import geometry


def _scene(seed: int, n: int = 60, labels: int = 4, regions: int = 10):  # type: ignore[no-untyped-def]
    generator = torch.Generator().manual_seed(seed)
    z = torch.nn.functional.normalize(torch.randn(n, 16, generator=generator), dim=1)
    book = torch.nn.functional.normalize(torch.randn(regions, 16, generator=generator), dim=1)
    rows = torch.randint(labels, (n,), generator=generator)
    weights = torch.randint(2, (n,), generator=generator)
    return z, book, rows, weights[:, None] * torch.nn.functional.one_hot(rows, labels)


def test_shares_are_whole_and_sum_to_256():
    z, book, _, _ = _scene(1)
    gamma, regions = geometry.assign(z, book)
    assert gamma.dtype == torch.int64
    assert gamma.sum(1).unique().tolist() == [geometry.PARTS]
    assert regions.shape == (60, geometry.NEAREST)
    assert int(gamma.min()) >= 0


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 10_000), row=st.integers(0, 59))
def test_a_record_never_supports_itself(seed: int, row: int):
    """Its score under all records is the one under all others, where it has no weight."""
    z, book, rows, targets = _scene(seed)
    gamma, regions = geometry.assign(z, book)
    size = {"size": len(book)}
    total = geometry.counts(gamma, regions, targets, **size)
    without = targets.clone()
    without[row] = 0
    others = geometry.counts(gamma, regions, without, **size)
    one = slice(row, row + 1)
    args = gamma[one], regions[one], rows[one]
    inside = geometry.agreement(total, *args, targets[one])
    outside = geometry.agreement(others, *args, torch.zeros(1, 4, dtype=torch.int64))
    assert torch.equal(inside, outside)


@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 10_000), cut=st.integers(1, 59))
def test_sums_and_scores_do_not_depend_on_order_or_on_who_holds_a_record(seed: int, cut: int):
    z, book, rows, targets = _scene(seed)
    gamma, regions = geometry.assign(z, book)
    size = {"size": len(book)}
    total = geometry.counts(gamma, regions, targets, **size)
    parts = [slice(0, cut), slice(cut, 60)]
    sites = []
    for part in parts:
        g, r = geometry.assign(z[part], book)
        sites.append(geometry.counts(g, r, targets[part], **size))
    assert torch.equal(total, sites[0] + sites[1])
    order = torch.randperm(60, generator=torch.Generator().manual_seed(seed))
    scores = geometry.agreement(total, gamma, regions, rows, targets)
    mixed = geometry.agreement(total, gamma[order], regions[order], rows[order], targets[order])
    assert torch.equal(scores[order], mixed)


def test_a_record_among_others_of_another_label_scores_low():
    book = torch.eye(4)
    z = torch.eye(4)[torch.tensor([0] * 20 + [1] * 20)]
    rows = torch.tensor([0] * 20 + [1] * 19 + [0])
    targets = torch.nn.functional.one_hot(rows)
    gamma, regions = geometry.assign(z, book, kappa=100.0)
    total = geometry.counts(gamma, regions, targets, size=4)
    a = geometry.agreement(total, gamma, regions, rows, targets)
    assert a[:39].tolist() == [1.0] * 39
    assert a[39] < 0.05


def test_a_codebook_moves_to_the_directions_of_its_records():
    z = torch.nn.functional.normalize(torch.tensor([[1.0, 0.1], [1.0, -0.1], [0.0, 1.0]]), dim=1)
    book = torch.nn.functional.normalize(torch.tensor([[1.0, 0.5], [0.2, 1.0], [-1.0, 0]]), dim=1)
    sums, held = geometry.moved(book, z)
    assert held.tolist() == [2, 1, 0]
    after = geometry.settled(book, sums)
    assert torch.allclose(after[:2], torch.tensor([[1.0, 0.0], [0.0, 1.0]]), atol=1e-3)
    assert torch.equal(after[2], book[2])


def test_a_codebook_without_regions_is_refused():
    with pytest.raises(DataError, match="at least one unit vector"):
        geometry.assign(torch.zeros(1, 3), torch.zeros(0, 3))
