"""What lying sites send, against the formulas of the papers on small numbers."""

from statistics import NormalDist

import pytest
import torch

from fedkola.quality.lies import LIES
from fedkola.types import Update


def update(client: str, x: list[float], weight: float = 1.0, n: int = 4) -> Update:
    tensors = {"x": torch.tensor(x, dtype=torch.float64) * weight, "n": torch.tensor([n])}
    return Update(client=client, tensors=tensors, weight=weight)


OWN = update("liar", [1.0, 2.0], weight=2.0)
HONEST = [
    update("a", [1.0, 0.0], weight=1.0, n=3),
    update("b", [3.0, 0.0], weight=5.0, n=20),
    update("c", [2.0, 3.0], weight=2.0, n=8),
    update("d", [2.0, -3.0], weight=2.0, n=8),
]


def mean_sent(lie: str, liars: int = 1, honest: list[Update] = HONEST) -> list[float]:
    found = LIES[lie](OWN, honest, liars)
    assert found.weight == OWN.weight
    return pytest.approx((found.tensors["x"] / found.weight).tolist(), abs=1e-12)


def test_sign_is_three_times_the_other_way():
    assert mean_sent("sign") == [-3.0, -6.0]
    assert LIES["sign"](OWN, HONEST, 1).tensors["n"].tolist() == [-12]


def test_ipm_is_half_the_honest_mean_the_other_way():
    assert mean_sent("ipm") == [-1.0, 0.0]


def test_alie_stays_within_what_a_majority_of_deviations_covers():
    # n = 6, two liars: two supporters are needed, z = the quantile of (6 - 2 - 2) / (6 - 2) = 0.
    assert mean_sent("alie", liars=2) == [2.0, 0.0]
    # n = 5, one liar: (5 - 1 - 2) / 4, again half.
    assert mean_sent("alie", liars=1) == [2.0, 0.0]
    # n = 7, three liars: (7 - 3 - 1) / 4.
    z = NormalDist().inv_cdf(0.75)
    deviations = [0.5**0.5, 4.5**0.5]
    assert mean_sent("alie", liars=3) == [2.0 - z * deviations[0], -z * deviations[1]]


def test_min_max_goes_as_far_as_honest_sites_are_apart():
    sent = LIES["min_max"](OWN, HONEST, 1)
    n = [u.tensors["n"].double() / u.weight for u in HONEST]
    flat = [torch.cat([u.tensors["x"] / u.weight, m]) for u, m in zip(HONEST, n, strict=True)]
    widest = max(float((a - b).norm()) for a in flat for b in flat)
    # The integer is rounded, so the distance is widest up to half a record.
    got = torch.cat([sent.tensors["x"] / 2, sent.tensors["n"].double() / 2])
    assert max(float((got - one).norm()) for one in flat) == pytest.approx(widest, abs=0.25)
    mean = torch.stack(flat).mean(dim=0)
    assert float((got - mean) @ mean) < 0


def test_mimic_sends_what_the_first_honest_site_means():
    assert mean_sent("mimic") == [1.0, 0.0]


def test_a_replaced_model_becomes_the_mean_if_the_others_do_not_move():
    still = [update("a", [0.0, 0.0], weight=3.0), update("b", [0.0, 0.0], weight=5.0)]
    found = LIES["replace_model"](OWN, still, 1)
    total = found.tensors["x"] + sum(u.tensors["x"] for u in still)
    assert (total / 10).tolist() == [1.0, 2.0]


def test_plain_lies():
    assert LIES["same_value"](OWN, HONEST, 1).tensors["x"].tolist() == [200.0, 200.0]
    assert LIES["huge_weight"](OWN, HONEST, 1).weight == 1e12
    assert LIES["not_finite"](OWN, HONEST, 1).tensors["x"].isnan().any()
    assert set(LIES["wrong_keys"](OWN, HONEST, 1).tensors) == {"x.more", "n"}


@pytest.mark.parametrize("lie", sorted(LIES))
def test_a_lie_needs_no_honest_site_and_changes_no_input(lie: str):
    before = [value.clone() for u in [OWN, *HONEST] for value in u.tensors.values()]
    LIES[lie](OWN, HONEST, 1)
    LIES[lie](OWN, [], 1)
    after = [value for u in [OWN, *HONEST] for value in u.tensors.values()]
    assert all(torch.equal(old, new) for old, new in zip(before, after, strict=True))


@pytest.mark.parametrize("lie", sorted(set(LIES) - {"not_finite", "wrong_keys"}))
def test_integers_stay_integers(lie: str):
    assert LIES[lie](OWN, HONEST, 2).tensors["n"].dtype == torch.int64
