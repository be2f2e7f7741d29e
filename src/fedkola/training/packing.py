"""Texts to sequences of one length, and the order in which a site reads them.

Texts follow one another with the model's end token between them and are cut every ``length``
tokens, so that no token is padding. With ``apart`` the texts of a unit (a patient) are packed
alone: no sequence holds two units, which guarantees for single units need.
"""

from collections.abc import Iterator, Sequence
from functools import lru_cache
from typing import Any

import torch

from fedkola.errors import DataError
from fedkola.training.model import Foundation

Ids = list[int]


def pack(
    foundation: Foundation,
    texts: Sequence[str],
    units: Sequence[str],
    *,
    length: int,
    apart: bool,
) -> tuple[list[Ids], list[str]]:
    """Sequences of ``length`` tokens and, with ``apart``, the unit of each ("" otherwise).

    A rest of fewer than two tokens is dropped, since nothing in it can be predicted. Raises
    DataError if the model reads fewer tokens, or if there is not one unit for each text.
    """
    if not 2 <= length <= foundation.max_tokens:
        raise DataError(
            f"pretrain.length = {length}, but the model reads 2 to {foundation.max_tokens} tokens; "
            "set it within that range, or raise model.max_tokens"
        )
    if len(texts) != len(units):
        raise DataError(f"{len(units)} units for {len(texts)} texts; give every text its unit")
    streams: dict[str, Ids] = {}
    for unit, ids in zip(units, _tokens(foundation, texts), strict=True):
        streams.setdefault(unit if apart else "", []).extend(ids)
    sequences, owners = [], []
    for unit, stream in streams.items():
        for at in range(0, len(stream), length):
            if len(stream) - at >= 2:
                sequences.append(stream[at : at + length])
                owners.append(unit)
    return sequences, owners


def batches(num: int, *, size: int, start: int, steps: int, seed: int) -> Iterator[list[int]]:
    """The rows of ``steps`` batches from batch number ``start`` on, of a site with ``num`` rows.

    Every epoch is a permutation of its own, a function of seed and epoch, so that the cursor is
    one number. A batch may reach into the next epoch; of fewer rows than a batch all are taken.
    """
    if num < 1:
        raise DataError("this site has no sequence of two tokens; it needs some text to train on")
    size = min(size, num)
    for number in range(start, start + steps):
        places = range(number * size, (number + 1) * size)
        yield [_order(num, seed, place // num)[place % num] for place in places]


# --- private --------------------------------------------------------------------------------------


def _tokens(foundation: Foundation, texts: Sequence[str]) -> Iterator[Ids]:
    """Token ids of each text between the model's own marks: one before it, or one around it."""
    if not texts:
        return
    tokenizer: Any = foundation.tokenizer
    causal = foundation.kind == "causal"
    found = tokenizer(list(texts), padding=False, add_special_tokens=not causal, verbose=False)
    for ids in found["input_ids"]:
        yield [foundation.start, *ids] if causal and foundation.start is not None else list(ids)


@lru_cache(maxsize=64)
def _order(num: int, seed: int, epoch: int) -> list[int]:
    generator = torch.Generator().manual_seed((seed * 1_000_003 + epoch) % (1 << 62))
    order: list[int] = torch.randperm(num, generator=generator).tolist()
    return order
