"""An embedding is a function of its text, bit for bit: removal by subtraction rests on it."""

import functools
import random

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fedkola.training.features import embed
from fedkola.training.model import Foundation, load

TEXT = (
    "fracture of shaft left femur unspecified encounter for closed with malunion acute chronic "
    "Salmonella meningitis type 2 diabetes mellitus, (suspected) sequela é ü 37.5"
)
WORDS = TEXT.split()


@functools.cache
def minilm() -> Foundation:
    return load("minilm")


texts = st.lists(
    st.lists(st.sampled_from(WORDS), max_size=40).map(" ".join), min_size=1, max_size=12
)


@settings(max_examples=12, deadline=None)
@given(texts=texts, company=texts, seed=st.integers(0, 10**6), threads=st.integers(1, 3))
def test_an_embedding_does_not_depend_on_company_order_or_threads(
    texts: list[str], company: list[str], seed: int, threads: int
) -> None:
    alone = torch.stack([embed(minilm(), [text])[0] for text in texts])
    mixed = [*texts, *company]
    order = list(range(len(mixed)))
    random.Random(seed).shuffle(order)
    try:
        torch.set_num_threads(threads)
        found = embed(minilm(), [mixed[i] for i in order])
    finally:
        torch.set_num_threads(1)
    for place, i in enumerate(order):
        if i < len(texts):
            assert torch.equal(found[place], alone[i])
