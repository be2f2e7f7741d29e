"""Mask streams: one per key, and none that a search over short seeds finds."""

import numpy as np
import pytest

from fedkola.privacy import masks

WORDS = 64
BITS = 12


def test_each_flip_of_a_key_bit_changes_the_mask():
    key = bytes(range(32))
    first = masks.stream(key, 64)
    for bit in range(256):
        other = (int.from_bytes(key, "big") ^ (1 << bit)).to_bytes(32, "big")
        assert masks.stream(other, 64) != first


def test_a_hundred_thousand_keys_give_as_many_first_blocks():
    source = np.random.default_rng(5)
    keys = source.integers(0, 256, size=(100_000, 32), dtype=np.uint8)
    assert len({key.tobytes() for key in keys}) == len(keys)
    assert len({masks.stream(key.tobytes(), 16) for key in keys}) == len(keys)


def test_keys_of_equal_xor_fold_give_different_masks():
    source = np.random.default_rng(6)
    for _ in range(100):
        parts = source.integers(0, 2**32, size=(2, 8), dtype=np.uint32)
        parts[1, 7] = np.bitwise_xor.reduce(parts[0]) ^ np.bitwise_xor.reduce(parts[1, :7])
        one, other = (part.tobytes() for part in parts)
        assert folded(one) == folded(other)
        assert (folded_mask(one, WORDS) == folded_mask(other, WORDS)).all()  # the control
        assert masks.stream(one, 64) != masks.stream(other, 64)


# --- the search -----------------------------------------------------------------------------------


def folded(key: bytes) -> int:
    return int(np.bitwise_xor.reduce(np.frombuffer(key, dtype="<u4")))


def folded_mask(key: bytes, length: int) -> np.ndarray:
    """A mask as a library that folds its keys to 32 bits makes it: MT19937, 16-bit words."""
    return np.frombuffer(np.random.RandomState(folded(key)).bytes(2 * length), dtype="<u2")


def first_words(seeds: np.ndarray) -> np.ndarray:
    """The first four 16-bit words of MT19937 for each seed, without the rest of its state."""
    state, kept = seeds.astype(np.uint32), {}
    for place in range(1, 400):
        kept[place - 1] = state
        state = np.uint32(1812433253) * (state ^ (state >> np.uint32(30))) + np.uint32(place)
        for old in (place - 4,):
            if old > 2:
                kept.pop(old, None)
    kept[399] = state
    found = []
    for i in range(2):
        y = (kept[i] & np.uint32(0x80000000)) | (kept[i + 1] & np.uint32(0x7FFFFFFF))
        odd = np.where(kept[i + 1] & np.uint32(1), np.uint32(0x9908B0DF), np.uint32(0))
        y = kept[397 + i] ^ (y >> np.uint32(1)) ^ odd
        y ^= y >> np.uint32(11)
        y ^= (y << np.uint32(7)) & np.uint32(0x9D2C5680)
        y ^= (y << np.uint32(15)) & np.uint32(0xEFC60000)
        y ^= y >> np.uint32(18)
        found += [y & np.uint32(0xFFFF), y >> np.uint32(16)]
    return np.stack(found, axis=1).astype(np.uint16)


def search(seen: np.ndarray, seeds: np.ndarray) -> list[tuple[int, np.ndarray]]:
    """Seeds under which a masked vector unmasks to words of BITS bits, and the words."""
    found = []
    small = 1 << (BITS - 1)
    for part in np.array_split(seeds, max(1, len(seeds) >> 16)):
        rest = (seen[:4] - first_words(part)).astype(np.int16)
        for seed in part[(np.abs(rest.astype(np.int32)) < small).all(1)]:
            mask = np.random.RandomState(int(seed)).bytes(2 * len(seen))
            words = (seen - np.frombuffer(mask, dtype="<u2")).astype(np.int16)
            if (np.abs(words.astype(np.int32)) < small).all():
                found.append((int(seed), words))
    return found


def planted(seed: int) -> bytes:
    """A key of 256 random-looking bits that folds to this seed."""
    parts = np.random.default_rng(seed).integers(0, 2**32, size=8, dtype=np.uint32)
    parts[7] = np.bitwise_xor.reduce(parts[:7]) ^ np.uint32(seed)
    return parts.tobytes()


def update() -> np.ndarray:
    return np.random.default_rng(9).integers(-2047, 2048, size=WORDS).astype(np.int16)


def test_the_first_words_of_the_fixture_are_those_of_numpy():
    seeds = np.array([0, 1, 65_535, 2**32 - 1], dtype=np.uint32)
    for seed, words in zip(seeds, first_words(seeds), strict=True):
        content = np.random.RandomState(int(seed)).bytes(8)
        assert words.tolist() == np.frombuffer(content, dtype="<u2").tolist()


def test_a_search_breaks_a_folded_seed_and_finds_nothing_in_ours():
    key, wanted, seeds = planted(0xBEEF), update(), np.arange(2**16, dtype=np.uint32)
    weak = wanted.view(np.uint16) + folded_mask(key, WORDS)
    ((seed, words),) = search(weak, seeds)
    assert (seed, words.tolist()) == (0xBEEF, wanted.tolist())
    ours = wanted.view(np.uint16).copy()
    masks.add_streams(ours, plus=[key])
    assert search(ours, seeds) == []
    # Nor is a short seed, padded to a key, ever one of ours.
    for short in range(2**16):
        guess = masks.stream(short.to_bytes(32, "little"), 8)
        rest = (ours[:4] - np.frombuffer(guess, dtype="<u2")).astype(np.int16)
        assert (np.abs(rest.astype(np.int32)) >= 1 << (BITS - 1)).any() or short_fails(ours, short)


def short_fails(seen: np.ndarray, short: int) -> bool:
    mask = masks.stream(short.to_bytes(32, "little"), 2 * len(seen))
    words = (seen - np.frombuffer(mask, dtype="<u2")).astype(np.int16)
    return bool((np.abs(words.astype(np.int32)) >= 1 << (BITS - 1)).any())


@pytest.mark.slow
def test_a_search_over_28_bits_breaks_what_base64_keys_leave():
    """Keys that travel as base64 text set no top bit of any byte: 2^28 folds are left."""
    seed = 0x5A3C6F17
    key, wanted = planted(seed), update()
    weak = wanted.view(np.uint16) + folded_mask(key, WORDS)
    ours = wanted.view(np.uint16).copy()
    masks.add_streams(ours, plus=[key])
    hits: list[list[tuple[int, np.ndarray]]] = [[], []]
    low = np.arange(2**14, dtype=np.uint32)
    low = (low & np.uint32(0x7F)) | ((low & np.uint32(0x3F80)) << np.uint32(1))
    for high in range(2**14):
        top = (high & 0x7F) | ((high & 0x3F80) << 1)
        seeds = low | np.uint32(top << 16)
        for of, seen in enumerate((weak, ours)):
            hits[of] += search(seen, seeds)
    ((found, words),) = hits[0]
    assert (found, words.tolist(), hits[1]) == (seed, wanted.tolist(), [])
