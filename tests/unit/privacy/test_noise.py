"""Noise has the distribution it claims, and is a function of its key."""

import os
import stat
from fractions import Fraction

import numpy as np
import pytest
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from scipy import stats

from fedkola.errors import PrivacyError
from fedkola.privacy.noise import (
    Stream,
    discrete_gaussian,
    exact_discrete_gaussian,
    exchange_key,
)

KEY = bytes(range(32))
# Tests are seeded by KEY: a threshold of 1e-3 is met or missed for good.
LEAST_P = 1e-3


def chances(sigma2: float, reach: int) -> np.ndarray:
    """P(-reach..reach) of the discrete Gaussian."""
    k = np.arange(-reach, reach + 1)
    found = np.exp(-(k**2) / (2 * sigma2))
    return found / found.sum()


def chi_square_p(draws: np.ndarray, sigma2: float) -> float:
    """Against the exact distribution, with cells of at least five expected draws."""
    reach = int(9 * sigma2**0.5) + 2
    expected = chances(sigma2, reach) * len(draws)
    seen = np.bincount(np.asarray(draws) + reach, minlength=2 * reach + 1)
    inner = expected >= 5
    tails = [(~inner) & (np.arange(2 * reach + 1) < reach), (~inner)]
    tails[1] &= ~tails[0]
    cells = [*seen[inner], *(seen[tail].sum() for tail in tails)]
    wanted = [*expected[inner], *(expected[tail].sum() for tail in tails)]
    statistic = sum((a - b) ** 2 / b for a, b in zip(cells, wanted, strict=True) if b > 1e-9)
    return float(stats.chi2.sf(statistic, len(cells) - 1))


def test_a_stream_is_a_function_of_key_and_label_and_does_not_repeat_itself():
    first = Stream(KEY, "a").words(100)
    assert (first == Stream(KEY, "a").words(100)).all()
    assert not (first == Stream(KEY, "b").words(100)).any()
    assert not (first == Stream(KEY[::-1], "a").words(100)).any()
    parts = Stream(KEY, "a")
    assert (np.concatenate([parts.words(33), parts.words(67)]) == first).all()
    assert len(set(Stream(KEY, "a").words(100_000).tolist())) == 100_000


def test_a_stream_is_aes_in_counter_mode_under_the_key_of_hkdf():
    # HKDF-SHA256 written out with hmac: extract with a zero salt, expand one block.
    import hashlib
    import hmac

    secret = hmac.digest(bytes(32), KEY, hashlib.sha256)
    own = hmac.digest(secret, b"fedkola/noise/1\0a\x01", hashlib.sha256)
    block = Cipher(algorithms.AES256(own), modes.ECB()).encryptor().update(bytes(16))
    assert Stream(KEY, "a").words(2).tobytes() == block


def test_normals_are_standard_normal_in_centre_and_tail():
    drawn = Stream(KEY, "n").normals(400_000)
    assert stats.kstest(drawn, "norm").pvalue > LEAST_P
    beyond = int((np.abs(drawn) > 3).sum())
    assert stats.binomtest(beyond, len(drawn), 2 * stats.norm.sf(3)).pvalue > LEAST_P
    assert abs(np.corrcoef(drawn[:-1], drawn[1:])[0, 1]) < 4 / len(drawn) ** 0.5


def test_uniforms_never_reach_an_end_where_the_inverse_normal_is_infinite():
    drawn = Stream(KEY, "u").uniforms(100_000)
    assert drawn.min() > 0
    assert drawn.max() < 1
    assert stats.kstest(drawn, "uniform").pvalue > LEAST_P


def test_whole_numbers_below_a_bound_are_equally_likely():
    stream = Stream(KEY, "w")
    counts = np.bincount([stream.below(7) for _ in range(14_000)], minlength=7)
    assert stats.chisquare(counts).pvalue > LEAST_P
    assert stream.below(1) == 0


@pytest.mark.parametrize("variance", [Fraction(1, 2), Fraction(4), Fraction(81, 4)])
def test_the_exact_discrete_gaussian_has_its_distribution(variance):
    draws = exact_discrete_gaussian(variance, 4_000, Stream(KEY, "d"))
    assert chi_square_p(np.array(draws), float(variance)) > LEAST_P


@pytest.mark.parametrize("sigma", [0.7, 3.0, 40.5])
def test_the_fast_discrete_gaussian_has_the_same_distribution(sigma):
    draws = discrete_gaussian(sigma, 300_000, Stream(KEY, "f"))
    assert chi_square_p(draws, sigma**2) > LEAST_P


def test_the_test_of_the_distribution_notices_two_per_cent_of_scale():
    # Positive control: the same test refuses a sampler that is slightly wrong.
    draws = discrete_gaussian(3.06, 300_000, Stream(KEY, "f"))
    assert chi_square_p(draws, 9.0) < 1e-9


def test_a_wide_discrete_gaussian_is_a_gaussian_and_shares_add_up_to_one():
    sigma = 2.0**20
    draws = discrete_gaussian(sigma, 200_000, Stream(KEY, "g"))
    assert stats.kstest(draws / sigma, "norm").pvalue > LEAST_P
    shares = [discrete_gaussian(sigma / 2, 50_000, Stream(KEY, f"share {i}")) for i in range(4)]
    assert stats.kstest(sum(shares) / sigma, "norm").pvalue > LEAST_P


@pytest.mark.parametrize("sigma", [0.0, 0.4, 2.0**41, float("nan")])
def test_a_scale_that_the_sampler_cannot_keep_is_refused(sigma):
    with pytest.raises(PrivacyError, match="discrete Gaussian"):
        discrete_gaussian(sigma, 1, Stream(KEY, "x"))


def test_a_key_is_made_once_and_private(tmp_path):
    path = tmp_path / "outbox" / "q.key"
    key = exchange_key(path)
    assert key == exchange_key(path) != exchange_key(tmp_path / "other.key")
    assert stat.S_IMODE(os.stat(path).st_mode) == 0o600
    path.write_bytes(b"short")
    with pytest.raises(PrivacyError, match="5 bytes"):
        exchange_key(path)
