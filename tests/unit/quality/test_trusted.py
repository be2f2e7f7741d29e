"""Ranks against trusted records, and the gate before any action."""

import pytest
import torch

from fedkola.errors import DataError
from fedkola.quality import trusted


def test_a_rank_counts_trusted_scores_no_higher():
    histogram = trusted.histogram(torch.tensor([0.1, 0.5, 0.9]))
    u = trusted.ranks(torch.tensor([0.05, 0.1, 0.6, 1.0]), histogram)
    assert u.tolist() == [0.25, 0.5, 0.75, 1.0]


def test_correct_records_are_flagged_no_more_often_than_said():
    """u is super-uniform: at most 5 % over 400 draws of trusted records, give or take 0.4."""
    generator = torch.Generator().manual_seed(5)
    shares = []
    for _ in range(400):
        held = trusted.histogram(torch.rand(100, generator=generator))
        u = trusted.ranks(torch.rand(500, generator=generator), held)
        shares.append(float((u <= 0.05).double().mean()))
    assert sum(shares) / len(shares) <= 0.054


def test_ranks_do_not_depend_on_how_sites_share_the_trusted_records():
    scores = torch.rand(90, generator=torch.Generator().manual_seed(6))
    whole = trusted.histogram(scores)
    assert torch.equal(whole, trusted.histogram(scores[:13]) + trusted.histogram(scores[13:]))


def test_the_gate_stays_closed_on_clean_records():
    """The bound is of 95 %: of 300 clean federations at most 8 % open, and by little."""
    generator = torch.Generator().manual_seed(7)
    opened = 0
    for _ in range(300):
        held = trusted.histogram(torch.rand(200, generator=generator))
        u = trusted.ranks(torch.rand(4000, generator=generator), held)
        found = trusted.gate(int((u <= trusted.LEVEL).sum()), 4000, 200)
        opened += found.open
        assert found.noise_low < 0.06
    assert opened / 300 < 0.08


def test_the_gate_opens_on_noise_and_bounds_it():
    generator = torch.Generator().manual_seed(8)
    held = trusted.histogram(torch.rand(200, generator=generator))
    good = torch.rand(2400, generator=generator)
    bad = 0.05 * torch.rand(1600, generator=generator)
    u = trusted.ranks(torch.cat([good, bad]), held)
    found = trusted.gate(int((u <= trusted.LEVEL).sum()), 4000, 200)
    assert found.open
    assert found.noise_low <= 0.4 <= found.noise_high
    assert found.noise_low > 0.3


def test_few_trusted_records_never_open_the_gate():
    found = trusted.gate(3000, 4000, 99)
    assert not found.open
    assert "99 trusted records, 100 are needed" in found.why


def test_no_records_say_nothing():
    found = trusted.gate(0, 0, 200)
    assert (found.open, found.noise_low, found.noise_high) == (False, 0.0, 1.0)


def test_impossible_counts_are_refused():
    with pytest.raises(DataError, match="no more records are flagged than there are"):
        trusted.gate(5, 4, 200)
