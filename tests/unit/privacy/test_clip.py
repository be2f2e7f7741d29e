"""Nothing is longer than the bound after clipping, and nothing short is touched."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fedkola.errors import Incompatible, NotFinite
from fedkola.privacy.clip import clip, factor, norm


@given(
    st.lists(
        st.floats(-(2.0**50), 2.0**50, width=32, allow_subnormal=False), min_size=1, max_size=20
    ),
    st.floats(1e-6, 1e6),
)
def test_no_vector_is_longer_than_the_bound(values, bound):
    whole = {"a": torch.tensor(values), "b": torch.tensor(values[:1]).half().float()}
    whole = {n: v.nan_to_num(posinf=0, neginf=0) for n, v in whole.items()}
    before = norm(whole)
    after = clip(whole, bound)
    assert norm(after) <= bound
    if before <= bound:
        assert all(torch.equal(after[n], whole[n]) for n in whole)
    else:
        assert norm(after) == pytest.approx(bound, rel=3e-6, abs=1e-30)


def test_a_vector_without_a_norm_counts_nothing_among_others_and_stops_alone():
    norms = torch.tensor([2.0, math.inf, math.nan, 0.5])
    assert factor(norms, 1.0).tolist() == pytest.approx([0.5, 0, 0, 1], rel=1e-5)
    with pytest.raises(NotFinite, match="nothing leaves"):
        clip({"a": torch.tensor([1.0, math.nan])}, 1.0)


@pytest.mark.parametrize("bound", [0.0, -1.0, math.inf, math.nan])
def test_a_bound_that_bounds_nothing_is_refused(bound):
    with pytest.raises(Incompatible, match=r"privacy\.clip"):
        factor(torch.ones(1), bound)
