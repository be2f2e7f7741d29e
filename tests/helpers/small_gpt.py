"""A random GPT of a few thousand parameters, and made-up text of rare and common words."""

import random
from pathlib import Path

from fedkola.training import fresh
from fedkola.training.model import Foundation, load

SYLLABLES = tuple(c + v for c in "bcdfghjklmnpqrst" for v in "ae")


def sentences(count: int, *, seed: int, words: int = 12) -> list[str]:
    """Sentences of invented words: few of 600 words are frequent, most are rare (Zipf)."""
    lexicon = random.Random(0)
    known = ["".join(lexicon.choices(SYLLABLES, k=lexicon.choice((2, 3)))) for _ in range(600)]
    weights = [1 / (rank + 3) for rank in range(len(known))]
    chance = random.Random(seed)
    return [" ".join(chance.choices(known, weights, k=words)) for _ in range(count)]


def small_gpt(
    folder: Path, *, width: int = 32, vocabulary: int = 600, length: int = 32
) -> Foundation:
    """A new GPT in ``folder`` whose tokenizer knows the invented words."""
    shape = fresh.Shape(width=width, layers=2, heads=2, vocabulary=vocabulary, length=length)
    fresh.create(folder, shape, sentences(400, seed=1), seed=0)
    return load(str(folder), max_tokens=length - 8, whole=True)
