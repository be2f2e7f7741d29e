"""The public grid: what is rounded, shared in words and counted comes back exactly in sums."""

import pytest
import torch

from fedkola.algorithms import common_grid as grids
from fedkola.errors import GridOverflow, NotFinite


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(
    ("bits", "num", "width"),
    [(12, 6, 16), (12, 16, 16), (12, 17, 32), (5, 6, 8), (2, 6, 4), (2, 8, 8), (24, 200, 32)],
)
def test_a_coordinate_takes_the_narrowest_lane_that_holds_the_sum(
    bits: int, num: int, width: int
) -> None:
    assert grids.lane(bits, num) == width


def test_no_lane_is_wide_enough_for_too_many_sites() -> None:
    with pytest.raises(GridOverflow, match=r"lower pretrain\.bits"):
        grids.lane(24, 300)


@pytest.mark.parametrize(("bits", "num"), [(12, 6), (5, 6), (5, 8), (2, 6), (2, 7), (24, 3)])
def test_sums_of_shared_words_are_the_words_of_sums(bits: int, num: int) -> None:
    limit, width = grids.levels(bits), grids.lane(bits, num)
    generator = torch.Generator().manual_seed(bits)
    parts = torch.randint(-limit, limit + 1, (num, 3, 7), generator=generator)
    parts[:, 0, 0], parts[:, 0, 1] = limit, -limit
    words = [grids.join(part, width) for part in parts]
    largest = 2 ** (31 if width == 32 else 15) - 1
    assert all(int(word.abs().max()) <= largest // num for word in words)
    summed = torch.stack(words).sum(0)
    assert torch.equal(grids.split(summed, width, parts[0].shape), parts.sum(0))


@pytest.mark.parametrize("num", [1, 3, 6, 100, 5000])
def test_counts_come_back_from_sums_of_digits(num: int) -> None:
    counts = torch.tensor([0, 1, 2047, 2048, 123_456_789, 2**40 // num])
    one = grids.digits(counts, num)
    assert int(one.max()) * num <= 32767
    assert torch.equal(grids.undigits(one * num, num), counts * num)


def test_stochastic_rounding_is_unbiased_and_within_one_step() -> None:
    value = torch.full((200_000,), 0.3)
    whole = grids.rounded(value, 0, 12, torch.Generator().manual_seed(3))
    assert set(whole.tolist()) == {0, 1}
    assert float(whole.float().mean()) == pytest.approx(0.3, abs=0.005)
    exact = grids.rounded(torch.tensor([0.5, -0.25]), 2, 12, torch.Generator())
    assert exact.tolist() == [2, -1]


def test_what_leaves_the_range_is_clipped_and_counted() -> None:
    value = torch.tensor([0.0, 5.0, -7.0, 0.5])
    assert grids.rounded(value, 0, 3, torch.Generator()).tolist()[1:3] == [3, -3]
    counts = grids.histogram(value, 0, 3)
    assert int(counts[: grids.BINS].sum()) == 4
    assert int(counts[grids.BINS]) == 2
    assert grids.clipped({"a": counts}) == {"a": 0.5}
    assert int(counts[-grids.LOWEST + 2]) == 2  # 5 and 7 lie in [4, 8)
    assert int(counts[-grids.LOWEST - 1]) == 1  # 0.5
    assert int(counts[0]) == 1


def test_a_delta_that_is_not_finite_stays() -> None:
    with pytest.raises(NotFinite, match=r"lower pretrain\.lr"):
        grids.rounded(torch.tensor([float("nan")]), 0, 12, torch.Generator())


@pytest.mark.parametrize("bits", [5, 8, 12])
def test_the_grid_follows_deltas_of_any_size_and_then_stays(bits: int) -> None:
    for size in (1e-4, 1e-2, 3.0):
        value = random(50_000) * size
        exponent = grids.first(bits, 0.05)
        for _ in range(12):
            counts = grids.histogram(value, exponent, bits)
            exponent = grids.following(exponent, counts[: grids.BINS], bits)
        counts = grids.histogram(value, exponent, bits)
        assert grids.following(exponent, counts[: grids.BINS], bits) == exponent
        assert int(counts[grids.BINS]) <= (1e-4 if bits > 9 else 2e-3) * len(value)
        # Two bits finer would cut off what lies within four standard deviations.
        assert size * 4 * 2.0 ** (exponent + 3) > grids.levels(bits)


def test_one_outlier_in_many_does_not_coarsen_the_grid_but_a_share_of_them_does() -> None:
    value = random(100_000) * 1e-3
    value[:5] = 1.0
    fine = torch.tensor([grids.following(8, grids.histogram(value, 8, 12)[:32], 12)])
    value[:500] = 1.0
    coarse = grids.following(8, grids.histogram(value, 8, 12)[:32], 12)
    assert int(fine) > coarse


def test_zeros_leave_the_grid_where_it_is() -> None:
    counts = grids.histogram(torch.zeros(10), 9, 12)
    assert grids.following(9, counts[: grids.BINS], 12) == 9
