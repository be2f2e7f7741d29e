"""Near duplicates against counted similarity, and counts of others' records against the truth."""

import random

import torch

from fedkola.quality.checks import digest
from fedkola.quality.near import MIN_PEERS, common, jaccard, near_duplicates, sketch

KEY = b"known to sites alone"


def text(seed: int, words: int = 60) -> str:
    chance = random.Random(seed)
    return " ".join(
        "".join(chance.choices("abcdefghijklmnopqrstuvwxyz", k=chance.randint(3, 9)))
        for _ in range(words)
    )


def edited(base: str, words: int, seed: int) -> str:
    chance, parts = random.Random(seed), base.split()
    for i in chance.sample(range(len(parts)), words):
        parts[i] = "changed"
    return " ".join(parts)


def test_a_long_text_with_a_few_words_changed_is_found_both_ways():
    base = text(1)
    texts = [text(2), base, text(3), edited(base, 3, 4)]
    found = near_duplicates(texts)
    assert [(flag.row, flag.like) for flag in found] == [(1, 3), (3, 1)]
    assert found[0].evidence["alike"] == round(jaccard(texts[1], texts[3]), 3) > 0.8


def test_nearly_all_pairs_well_above_the_threshold_are_found_and_none_below():
    texts = []
    for i in range(150):
        base = text(i)
        texts += [base, edited(base, 1 + i % 20, 1_000 + i)]
    truth = {i for i in range(len(texts)) if jaccard(texts[i], texts[i ^ 1]) >= 0.8}
    sure = {i for i in truth if jaccard(texts[i], texts[i ^ 1]) >= 0.9}
    found = {flag.row for flag in near_duplicates(texts)}
    assert len(sure) > 20
    assert found <= truth
    assert len(found & sure) >= 0.98 * len(sure)


def test_short_texts_and_equal_texts_are_none():
    assert near_duplicates(["fever since 3 days", "fever since 4 days"]) == ()
    assert near_duplicates([text(1), text(1).upper()]) == ()
    assert near_duplicates([]) == ()


def test_counts_of_others_are_never_too_low_and_seldom_too_high():
    chance = random.Random(5)
    mine = [digest(f"record {i}", "A") for i in range(300)]
    copies = [chance.choice([0, 1, 4, 5, 9]) for _ in mine]
    theirs = [d for d, n in zip(mine, copies, strict=True) for _ in range(n)]
    theirs += [digest(f"another {i}", "B") for i in range(5_000)]
    own = sketch(mine, KEY)
    found = {f.row: f.evidence["peers"] for f in common(mine, KEY, own, own + sketch(theirs, KEY))}
    assert set(found) >= {i for i, n in enumerate(copies) if n >= MIN_PEERS}
    assert all(found[i] >= copies[i] for i in found)
    assert sum(found.get(i, 0) > max(n, MIN_PEERS - 1) for i, n in enumerate(copies)) <= 3


def test_sketches_are_addends_and_mean_nothing_under_another_key():
    a, b = [digest("x", "A")] * 6, [digest("y", "A")]
    assert torch.equal(sketch(a, KEY) + sketch(b, KEY), sketch(a + b, KEY))
    own = sketch(b, KEY)
    assert common(b, b"another key", own, own + sketch([digest("y", "A")] * 9, KEY)) == ()
