"""Noise that a site can repeat and nobody else can predict.

Every number is a function of a 32-byte key that the operating system gave when an exchange was
first seen and that was on the disk before it was used. A process killed halfway draws the same
noise again, so one release never has two noises, whose mean would have less of it. The key goes
through HKDF-SHA256 with a label into AES-256 in counter mode.

Gaussian noise is the inverse normal of 53-bit uniforms, in float64 and added in float64; its tail
ends at 8.2 standard deviations, which a sum of 2^40 draws meets less than once, and privacy is
analysed over the reals (Mironov, CCS 2012, on what that leaves out). The discrete Gaussian is over
the integers: exact by rejection with rational arithmetic (Canonne, Kamath and Steinke, The discrete
Gaussian for differential privacy, NeurIPS 2020, algorithms 1-3), or for long vectors the same
rejection in numpy with acceptance in float64.
"""

import os
from fractions import Fraction
from math import floor, isqrt
from pathlib import Path

import numpy as np
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF
from numpy.typing import NDArray
from scipy.special import ndtri

from fedkola.errors import PrivacyError
from fedkola.files import write_private

KEY_BYTES = 32
CHUNK = 1 << 20
Floats = NDArray[np.float64]
Integers = NDArray[np.int64]


def exchange_key(path: Path) -> bytes:
    """The key of an exchange: the one in ``path``, or a new one that is on disk before it returns.

    Raises PrivacyError for a file that holds no key.
    """
    if not path.exists():
        write_private(path, os.urandom(KEY_BYTES))
    key = path.read_bytes()
    if len(key) != KEY_BYTES:
        raise PrivacyError(
            f"{path} holds {len(key)} bytes, a noise key has {KEY_BYTES}; restore it from a copy, "
            "or start the round anew"
        )
    return key


class Stream:
    """Random numbers of one purpose: a function of key and label, read from the front."""

    def __init__(self, key: bytes, label: str) -> None:
        if len(key) != KEY_BYTES:
            raise PrivacyError(f"a key of {len(key)} bytes was given; a noise key has {KEY_BYTES}")
        info = b"fedkola/noise/1\0" + label.encode()
        own = HKDF(algorithm=SHA256(), length=KEY_BYTES, salt=None, info=info).derive(key)
        self._cipher = Cipher(algorithms.AES256(own), modes.CTR(bytes(16))).encryptor()
        self._spare, self._left = 0, 0

    def words(self, count: int) -> NDArray[np.uint64]:
        """The next ``count`` 64-bit words."""
        return np.frombuffer(self._cipher.update(bytes(8 * count)), dtype="<u8")

    def uniforms(self, count: int) -> Floats:
        """Uniform numbers strictly between 0 and 1: odd multiples of 2^-54."""
        return ((self.words(count) >> np.uint64(11)).astype(np.float64) + 0.5) * 2.0**-53

    def normals(self, count: int) -> Floats:
        """Standard normal numbers."""
        normal: Floats = ndtri(self.uniforms(count))
        return normal

    def below(self, bound: int) -> int:
        """A whole number from 0 to ``bound`` - 1, all of them equally likely."""
        bits = (bound - 1).bit_length()
        while True:
            value = self._bits(bits)
            if value < bound:
                return value

    def _bits(self, count: int) -> int:
        while self._left < count:
            self._spare |= int(self.words(1)[0]) << self._left
            self._left += 64
        value = self._spare & ((1 << count) - 1)
        self._spare >>= count
        self._left -= count
        return value


# --- the discrete Gaussian, exactly ---------------------------------------------------------------


def exact_discrete_gaussian(variance: Fraction, count: int, stream: Stream) -> list[int]:
    """``count`` draws with P(k) proportional to exp(-k^2 / (2 variance)), without any rounding."""
    scale = isqrt(floor(variance)) + 1
    found: list[int] = []
    while len(found) < count:
        k = _discrete_laplace(scale, stream)
        off = Fraction(abs(k)) - variance / scale
        if _bernoulli_exp(off * off / (2 * variance), stream):
            found.append(k)
    return found


def _discrete_laplace(scale: int, stream: Stream) -> int:
    """P(k) proportional to exp(-|k| / scale)."""
    while True:
        low = stream.below(scale)
        if not _bernoulli_exp(Fraction(low, scale), stream):
            continue
        high = 0
        while _bernoulli_exp(Fraction(1), stream):
            high += 1
        size = low + scale * high
        negative = bool(stream.below(2))
        if size or not negative:
            return -size if negative else size


def _bernoulli_exp(gamma: Fraction, stream: Stream) -> bool:
    """True with probability exp(-gamma), for gamma of at least 0."""
    while gamma > 1:
        if not _bernoulli_exp(Fraction(1), stream):
            return False
        gamma -= 1
    k = 1
    while _bernoulli(gamma / k, stream):
        k += 1
    return k % 2 == 1


def _bernoulli(chance: Fraction, stream: Stream) -> bool:
    return stream.below(chance.denominator) < chance.numerator


# --- the discrete Gaussian, quickly ---------------------------------------------------------------


def discrete_gaussian(sigma: float, count: int, stream: Stream) -> Integers:
    """``count`` draws as int64; proposals and acceptance as in the exact form, in float64.

    ``sigma`` may be from 0.5 to 2^40: beyond, whole numbers of float64 run out.
    """
    if not 0.5 <= sigma <= 2.0**40:
        raise PrivacyError(
            f"a discrete Gaussian of scale {sigma:.6g} was asked for, expected 0.5 to 2^40; use a "
            "grid of other fractional bits"
        )
    out = np.empty(count, dtype=np.int64)
    filled = 0
    while filled < count:
        drawn = _accepted(sigma, min(CHUNK, int((count - filled) * 1.4) + 64), stream)
        taken = drawn[: count - filled]
        out[filled : filled + len(taken)] = taken
        filled += len(taken)
    return out


def _accepted(sigma: float, tries: int, stream: Stream) -> Integers:
    scale = floor(sigma) + 1
    size = np.floor(-scale * np.log(stream.uniforms(tries)))
    negative = (stream.words(tries) & np.uint64(1)).astype(bool)
    off = size - sigma * sigma / scale
    keep = stream.uniforms(tries) < np.exp(-off * off / (2 * sigma * sigma))
    keep &= ~(negative & (size == 0))
    signed: Integers = np.where(negative, -size, size)[keep].astype(np.int64)
    return signed
