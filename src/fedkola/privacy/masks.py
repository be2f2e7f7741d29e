"""Masks: streams of AES-256-CTR added to integer words in place.

A stream key is used once: zero counter block, output read as little-endian words. Words of 24 and
40 bits lie in memory as 32 and 64 and are reduced at the end, which is the same, as a power of two
divides the larger one. A mask is never whole in memory: it is made in chunks that stay in cache.
"""

from collections.abc import Sequence

import numpy as np
from cryptography.hazmat.primitives.ciphers import Cipher
from cryptography.hazmat.primitives.ciphers.algorithms import AES256
from cryptography.hazmat.primitives.ciphers.modes import CTR
from numpy.typing import NDArray

Words = NDArray[np.unsignedinteger]

CHUNK_BYTES = 1 << 18
MEMORY = {16: np.uint16, 24: np.uint32, 32: np.uint32, 40: np.uint64, 64: np.uint64}
"""How words of a ring lie in memory."""

_SIGNED = {np.dtype(np.uint16): np.int16, np.dtype(np.uint32): np.int32}
_COUNTER = bytes(16)
_ZEROS = memoryview(bytes(CHUNK_BYTES))


def stream(key: bytes, num_bytes: int) -> bytes:
    """The first bytes of a mask."""
    return Cipher(AES256(key), CTR(_COUNTER)).encryptor().update(bytes(num_bytes))


def add_streams(words: Words, *, plus: Sequence[bytes], minus: Sequence[bytes] = ()) -> None:
    """Add the masks of some stream keys to 1-D ``words`` and subtract those of others, in place."""
    added = [Cipher(AES256(key), CTR(_COUNTER)).encryptor() for key in plus]
    taken = [Cipher(AES256(key), CTR(_COUNTER)).encryptor() for key in minus]
    buffer = bytearray(CHUNK_BYTES)
    mask = np.frombuffer(buffer, dtype=words.dtype)
    step = len(mask)
    for start in range(0, len(words), step):
        chunk = words[start : start + step]
        zeros, part = _ZEROS[: chunk.nbytes], mask[: len(chunk)]
        for one in added:
            one.update_into(zeros, buffer)
            np.add(chunk, part, out=chunk)
        for one in taken:
            one.update_into(zeros, buffer)
            np.subtract(chunk, part, out=chunk)


def to_bytes(words: Words, word: int) -> NDArray[np.uint8]:
    """Words mod 2^word as bytes, the lowest first; a view where the ring fills its memory."""
    wide = words.view(np.uint8).reshape(-1, words.itemsize)
    size = word // 8
    return wide.reshape(-1) if size == words.itemsize else wide[:, :size].reshape(-1)


def from_bytes(content: NDArray[np.uint8], word: int) -> Words:
    """The inverse of ``to_bytes``; a view where the ring fills its memory and bytes are aligned."""
    kind, size = np.dtype(MEMORY[word]), word // 8
    if size == kind.itemsize:
        return np.frombuffer(content, dtype=kind)
    wide = np.zeros((len(content) // size, kind.itemsize), dtype=np.uint8)
    wide[:, :size] = content.reshape(-1, size)
    return wide.reshape(-1).view(kind)


def signed(words: Words, word: int) -> NDArray[np.signedinteger]:
    """Words mod 2^word read as signed integers, of the size in which they lie in memory."""
    spare = 8 * words.itemsize - word
    values = words.view(_SIGNED.get(words.dtype, np.int64))
    return values if not spare else (values << spare) >> spare
