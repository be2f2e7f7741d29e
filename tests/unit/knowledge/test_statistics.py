"""Statistics in exact integers: what a slow reference gives, in any order and block."""

import pytest
import torch
from torch import Tensor

from fedkola.errors import ModelMismatch
from fedkola.knowledge import statistics
from fedkola.knowledge.statistics import COUNTS, GRAM, SUMS
from fedkola.training.features import integer_embeddings

WIDTH = 24
SIGNS_4_8_7 = [0, 1, 1, 0, 0, 0, 0, 1]


def records(num: int, *, seed: int = 0, num_rows: int = 5) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    z = torch.randint(-1024, 1025, (num, WIDTH), generator=generator, dtype=torch.int16)
    return z, torch.randint(0, num_rows, (num,), generator=generator)


def slow(z: Tensor, rows: Tensor, *, num_rows: int, features: int, bits: int, seed: int):
    """The formula of the module docstring, record by record in Python integers."""
    r = statistics.signs(z.shape[1], features, seed).to(torch.int64)
    gram = torch.zeros(features, features, dtype=torch.int64)
    sums = torch.zeros(num_rows, features, dtype=torch.int64)
    counts = torch.zeros(num_rows, dtype=torch.int64)
    for one, row in zip(z.to(torch.int64), rows.tolist(), strict=True):
        u = (one @ r).tolist()
        phi = torch.tensor([min(max(value, 0) // 2 ** (12 - bits), 2**bits - 1) for value in u])
        gram += torch.outer(phi, phi)
        sums[row] += phi
        counts[row] += 1
    packed = [gram[i, j].item() for i in range(features) for j in range(i, features)]
    return {GRAM: torch.tensor(packed), SUMS: sums, COUNTS: counts}


def equal(left: dict[str, Tensor], right: dict[str, Tensor]) -> bool:
    return set(left) == set(right) and all(torch.equal(left[name], right[name]) for name in left)


@pytest.mark.parametrize("bits", [1, 4, 8, 12])
def test_analytic_statistics_equal_a_slow_integer_reference(bits: int):
    z, rows = records(40)
    recipe = {"num_rows": 6, "features": 32, "bits": bits, "seed": 3}
    got = statistics.analytic(z, rows, **recipe)
    assert equal(got, slow(z, rows, **recipe))
    assert {value.dtype for value in got.values()} == {torch.int64}
    assert got[SUMS].shape == (6, 32)
    assert got[COUNTS][5] == 0


def test_one_record_by_hand():
    # A single coordinate of 1000: u = +-1000, so phi is floor(1000 / 256) = 3 or nothing.
    z = torch.tensor([[1000]], dtype=torch.int16)
    positive = statistics.signs(1, 8, 0)[0] > 0
    phi = positive.to(torch.int64) * 3
    got = statistics.analytic(z, torch.tensor([1]), num_rows=2, features=8, bits=4, seed=0)
    assert statistics.expand(z, features=8, bits=4, seed=0)[0].tolist() == phi.tolist()
    assert got[SUMS].tolist() == [[0] * 8, phi.tolist()]
    assert got[COUNTS].tolist() == [0, 1]
    assert got[GRAM].sum() == 9 * positive.sum() * (positive.sum() + 1) // 2


def test_router_moments_equal_a_slow_integer_reference():
    z, rows = records(30)
    got = statistics.router(z, rows, num_rows=5)
    wide = z.to(torch.int64)
    assert torch.equal(statistics.unpack(got[GRAM], WIDTH), wide.T @ wide)
    for row in range(5):
        assert torch.equal(got[SUMS][row], wide[rows == row].sum(0))
        assert got[COUNTS][row] == (rows == row).sum()


def test_the_largest_embeddings_do_not_lose_a_bit():
    # All coordinates at 1024 and a matrix row of equal signs would be the largest |u| there is.
    z = torch.full((9000, WIDTH), 1024, dtype=torch.int16)
    rows = torch.zeros(9000, dtype=torch.int64)
    recipe = {"num_rows": 1, "features": 16, "bits": 12, "seed": 1}
    one = slow(z[:1], rows[:1], **recipe)
    got = statistics.analytic(z, rows, **recipe)
    assert torch.equal(got[GRAM], 9000 * one[GRAM])
    assert torch.equal(got[SUMS], 9000 * one[SUMS])
    moments = statistics.router(z, rows, num_rows=1)
    assert moments[GRAM].tolist() == [9000 * 1024**2] * (WIDTH * (WIDTH + 1) // 2)


def test_no_records_are_zeros_of_the_right_shape():
    z, rows = records(0)
    got = statistics.analytic(z, rows, num_rows=3, features=16, bits=4, seed=0)
    assert [tuple(got[name].shape) for name in (GRAM, SUMS, COUNTS)] == [(136,), (3, 16), (3,)]
    moments = statistics.router(z, rows, num_rows=3)
    assert moments[GRAM].shape == (WIDTH * (WIDTH + 1) // 2,)
    assert not any(bool(value.any()) for value in (*got.values(), *moments.values()))


def test_packing_keeps_the_upper_triangle_row_by_row():
    square = torch.tensor([[1, 2, 3], [2, 4, 5], [3, 5, 6]])
    assert statistics.pack(square).tolist() == [1, 2, 3, 4, 5, 6]
    assert torch.equal(statistics.unpack(torch.tensor([1, 2, 3, 4, 5, 6]), 3), square)


def test_the_signs_are_public_and_depend_on_nothing_but_their_name():
    # These numbers are part of the protocol: every site must make the same matrix.
    r = statistics.signs(4, 8, 7)
    assert r.unique().tolist() == [-1.0, 1.0]
    assert (r[0] > 0).int().tolist() == SIGNS_4_8_7
    assert not torch.equal(r, statistics.signs(4, 8, 8))
    assert abs(float(statistics.signs(64, 256, 0).mean())) < 0.03


def test_this_machine_multiplies_small_integers_exactly():
    statistics.check_exact(width=384, features=256, bits=4, seed=0)


def test_a_machine_with_inexact_products_is_refused(monkeypatch: pytest.MonkeyPatch):
    def reduced(z: Tensor, *, features: int, bits: int, seed: int) -> Tensor:
        u = z.to(torch.bfloat16).to(torch.float32) @ statistics.signs(z.shape[1], features, seed)
        return u.clamp(min=0).mul(2.0 ** (bits - 12)).floor().clamp(max=2**bits - 1)

    monkeypatch.setattr(statistics, "expand", reduced)
    with pytest.raises(ModelMismatch, match="not exact"):
        statistics.check_exact(width=384, features=256, bits=4, seed=0)


@pytest.mark.parametrize(
    ("largest", "records", "word"),
    [
        (15, 2184, 16),  # 32,760 of 32,767
        (15, 2185, 24),
        (225, 37_282, 24),  # 8,388,450 of 8,388,607
        (225, 37_283, 32),
        (1025**2, 2_044, 32),
        (1025**2, 2_045, 40),
        (1025**2, 600_000, 64),
        (15, 0, 16),
    ],
)
def test_a_word_is_as_narrow_as_the_largest_sum_allows(largest: int, records: int, word: int):
    assert statistics.word(largest, records=records) == word


def test_no_embedding_exceeds_the_number_that_words_are_chosen_for():
    axis = torch.eye(3) * torch.tensor([1.0, -1.0, 1.0])[:, None]
    z = integer_embeddings(axis)
    assert int(z.abs().max()) <= statistics.EMBEDDING
