"""A ridge without one record, compared with the ridge that was never given it."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fedkola.errors import DataError
from fedkola.quality import margin


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 10_000), row=st.integers(0, 39))
def test_scores_are_those_of_a_ridge_that_never_saw_the_record(seed: int, row: int):
    generator = torch.Generator().manual_seed(seed)
    phi = torch.randint(16, (40, 12), generator=generator).to(torch.float64)
    targets = torch.rand(40, 3, generator=generator, dtype=torch.float64)
    lam = 0.1
    gram = phi.T @ phi
    found = margin.inverse(gram, lam=lam)
    scores = margin.without_self(
        phi @ found @ phi.T @ targets, margin.leverage(phi, found), targets
    )
    kept = torch.arange(40) != row
    # The ridge is that of all records: its size is public and changes by one part in forty.
    ridge = lam * float(gram.diagonal().mean()) * torch.eye(12, dtype=torch.float64)
    fresh = torch.linalg.solve(phi[kept].T @ phi[kept] + ridge, phi[kept].T @ targets[kept])
    assert torch.allclose(scores[row], phi[row] @ fresh, atol=1e-8)


def test_a_margin_is_the_lead_over_the_best_other_label():
    scores = torch.tensor([[0.9, 0.4, 0.1], [0.2, 0.5, 0.6]])
    assert margin.margins(scores, torch.tensor([0, 1])).tolist() == pytest.approx([0.5, -0.1])


def test_one_label_alone_leads_by_infinity():
    assert margin.margins(torch.tensor([[0.3]]), torch.tensor([0])).tolist() == [float("inf")]


def test_a_gram_of_nothing_is_refused():
    with pytest.raises(DataError, match="at least one record"):
        margin.inverse(torch.zeros(3, 3, dtype=torch.float64))
