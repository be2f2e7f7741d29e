"""The integers depend on no order, split, block or thread count; subtraction undoes addition."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fedkola.knowledge import statistics
from fedkola.knowledge.statistics import COUNTS, GRAM, SUMS

RECIPE = {"num_rows": 4, "features": 24, "bits": 4, "seed": 0}


@st.composite
def records(draw: st.DrawFn) -> tuple[Tensor, Tensor]:
    num = draw(st.integers(0, 60))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    z = torch.randint(-1024, 1025, (num, 12), generator=generator, dtype=torch.int16)
    return z, torch.randint(0, 4, (num,), generator=generator)


def both(z: Tensor, rows: Tensor) -> list[Tensor]:
    analytic = statistics.analytic(z, rows, **RECIPE)
    router = statistics.router(z, rows, num_rows=4)
    return [part[name] for part in (analytic, router) for name in (GRAM, SUMS, COUNTS)]


def alike(left: list[Tensor], right: list[Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(left, right, strict=True))


@given(site=records(), seed=st.integers(0, 99))
@settings(max_examples=40, deadline=None)
def test_the_order_of_records_does_not_matter(site, seed):
    z, rows = site
    order = torch.randperm(len(z), generator=torch.Generator().manual_seed(seed))
    assert alike(both(z, rows), both(z[order], rows[order]))


@given(site=records(), cut=st.integers(0, 60))
@settings(max_examples=40, deadline=None)
def test_a_stream_of_two_windows_sums_to_one_shot_and_either_can_be_taken_back(site, cut):
    z, rows = site
    whole, first, second = both(z, rows), both(z[:cut], rows[:cut]), both(z[cut:], rows[cut:])
    assert alike(whole, [a + b for a, b in zip(first, second, strict=True)])
    assert alike(first, [a - b for a, b in zip(whole, second, strict=True)])


@given(site=records(), threads=st.sampled_from([2, 3]))
@settings(max_examples=10, deadline=None)
def test_the_number_of_threads_does_not_matter(site, threads):
    expected = both(*site)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        assert alike(both(*site), expected)
    finally:
        torch.set_num_threads(before)


@given(site=records(), block=st.integers(1, 9))
@settings(max_examples=20, deadline=None)
def test_the_size_of_a_block_does_not_matter(site, block):
    z, rows = site
    parts = [
        both(part, labels) for part, labels in zip(z.split(block), rows.split(block), strict=True)
    ]
    assert alike(both(z, rows), [sum(column) for column in zip(*parts, strict=True)])


@given(size=st.integers(1, 12), seed=st.integers(0, 99))
@settings(max_examples=30, deadline=None)
def test_packing_and_unpacking_a_symmetric_matrix_is_the_identity(size, seed):
    generator = torch.Generator().manual_seed(seed)
    half = torch.randint(-(2**40), 2**40, (size, size), generator=generator)
    square = half + half.T
    packed = statistics.pack(square)
    assert packed.shape == (size * (size + 1) // 2,)
    assert torch.equal(statistics.unpack(packed, size), square)


def test_a_long_site_crosses_many_blocks_on_two_threads_exactly():
    generator = torch.Generator().manual_seed(5)
    z = torch.randint(-1024, 1025, (20_000, 12), generator=generator, dtype=torch.int16)
    rows = torch.randint(0, 4, (20_000,), generator=generator)
    u = z.to(torch.int64) @ statistics.signs(12, 24, 0).to(torch.int64)
    phi = (u.clamp(min=0) >> 8).clamp(max=15)
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        got = statistics.analytic(z, rows, **RECIPE)
    finally:
        torch.set_num_threads(before)
    assert torch.equal(got[GRAM], statistics.pack(phi.T @ phi))
    assert torch.equal(got[SUMS], torch.zeros(4, 24, dtype=torch.int64).index_add_(0, rows, phi))
