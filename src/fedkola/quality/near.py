"""Near duplicates within a site, and how many records like one's own other sites have.

Within a site: MinHash of character 5-shingles finds candidates, whose Jaccard similarity is then
counted exactly. Only texts of 200 characters or more: of short ones too many are alike by nature.
Across sites: keyed hashes of exact duplicates in a count-min sketch, which is summed.
"""

import hmac
from collections.abc import Sequence
from hashlib import sha256

import numpy as np
import torch
from datasketch import MinHash, MinHashLSH
from torch import Tensor

from fedkola.quality.checks import Flag, normalised

PERMUTATIONS, SHINGLE, ALIKE, LONG = 128, 5, 0.8, 200
# 21 bands of 6 find 99.8 % of pairs at 0.8, where datasketch's choice for 0.8, 9 of 13, finds 40 %;
# what they find beside is counted and dropped.
BANDS, CANDIDATES = (21, 6), 100
ROWS, WIDTH = 4, 1 << 16
MIN_PEERS = 5


def near_duplicates(texts: Sequence[str], *, alike: float = ALIKE) -> tuple[Flag, ...]:
    """A flag for each long text with a near, not equal, one: its likest and their similarity."""
    plain = [normalised(text) for text in texts]
    rows = [row for row, text in enumerate(plain) if len(text) >= LONG]
    index = MinHashLSH(num_perm=PERMUTATIONS, params=BANDS)
    sketches = {}
    for row in rows:
        sketch = MinHash(num_perm=PERMUTATIONS, seed=1)
        sketch.update_batch([shingle.encode("utf-8") for shingle in sorted(shingles(plain[row]))])
        sketches[row] = sketch
        index.insert(row, sketch)
    found = []
    for row in rows:
        others = [other for other in index.query(sketches[row]) if plain[other] != plain[row]]
        # Of many texts of one form any will do.
        twins = {o: jaccard(plain[row], plain[o]) for o in sorted(others)[:CANDIDATES]}
        if twins and max(twins.values()) >= alike:
            like = max(twins, key=lambda other: twins[other])
            evidence = {"alike": round(twins[like], 3)}
            found.append(Flag(row=row, code="NEAR_DUPLICATE", like=like, evidence=evidence))
    return tuple(found)


def jaccard(one: str, other: str) -> float:
    """The share of the 5-shingles of either text that both have."""
    a, b = shingles(one), shingles(other)
    return len(a & b) / len(a | b)


def shingles(text: str) -> set[str]:
    return {text[i : i + SHINGLE] for i in range(max(1, len(text) - SHINGLE + 1))}


def sketch(digests: Sequence[bytes], key: bytes) -> Tensor:
    """Counts of keyed hashes of records, (4, 2^16) int64: an addend. The key is the sites' own."""
    found = np.zeros((ROWS, WIDTH), dtype=np.int64)
    for digest in digests:
        found[np.arange(ROWS), _places(digest, key)] += 1
    return torch.from_numpy(found)


def common(
    digests: Sequence[bytes], key: bytes, own: Tensor, total: Tensor, *, least: int = MIN_PEERS
) -> tuple[Flag, ...]:
    """A flag for each record that other sites have at least ``least`` times, with about how often.

    Counts are never too low, and too high by more than e/2^16 of all records with probability e^-4.
    """
    others = (total - own).numpy()
    found = []
    for row, digest in enumerate(digests):
        peers = int(others[np.arange(ROWS), _places(digest, key)].min())
        if peers >= least:
            found.append(Flag(row=row, code="COMMON_ACROSS_SITES", evidence={"peers": peers}))
    return tuple(found)


def _places(digest: bytes, key: bytes) -> list[int]:
    keyed = hmac.new(key, digest, sha256).digest()
    return [int.from_bytes(keyed[2 * i : 2 * i + 2]) for i in range(ROWS)]
