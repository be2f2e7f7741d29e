"""A site's part of pre-training: pack its texts once, train on from where it stopped.

What a site keeps between exchanges is a flat map of tensors: the moments of its optimiser, the
cursor of its data (batches read so far) and the last round it took part in. It is kept under the
number of the round it belongs to, and a round always reads what an earlier one left, so that a
round that is computed again after a crash gives the same bits.
"""

from collections.abc import Sequence
from pathlib import Path

import safetensors.torch
import torch
from torch import Tensor

from fedkola.files import write_private
from fedkola.training import packing, whole
from fedkola.training.model import Foundation
from fedkola.training.whole import COUNT, FIRST, SECOND, Local
from fedkola.types import Course, Weights

CURSOR = "cursor"
FOLDER = "pretrain"


def drawn(
    sequences: Sequence[Sequence[int]], course: Course, *, kept: Weights, seed: int
) -> list[list[Sequence[int]]]:
    """The batches of a course, from where ``kept`` says that the site stopped reading.

    Raises DataError for a site without a sequence.
    """
    rows = packing.batches(
        len(sequences), size=course.batch, start=_cursor(kept), steps=course.steps, seed=seed
    )
    return [[sequences[row] for row in batch] for batch in rows]


def advance(
    foundation: Foundation,
    weights: Weights,
    batches: Sequence[Sequence[Sequence[int]]],
    course: Course,
    *,
    kept: Weights,
    seed: int,
    gradient: whole.Gradient | None = None,
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """A step for each batch from ``kept`` on: the weights, and what to keep for the next time.

    ``gradient`` takes the place of that of the mean loss, as for ``whole.train``.
    """
    cursor = _cursor(kept)
    local = Local(
        optimiser="sgd" if course.optimiser == "sgd" else "adamw",
        lr=course.lr,
        betas=(0.9, course.beta2),
        weight_decay=course.weight_decay,
        clip=course.clip,
        warmup=course.warmup,
        total=course.total,
        floor=course.floor,
        start=course.start,
        rewarm=course.rewarm,
        precision="bfloat16" if course.precision == "bfloat16" else "float32",
    )
    moments = {n: v for n, v in kept.items() if n == COUNT or n.startswith((FIRST, SECOND))}
    trained, moments, _ = whole.train(
        foundation,
        weights,
        batches,
        local,
        moments,
        seed=seed + cursor,
        gradient=gradient,
    )
    return trained, {**moments, CURSOR: torch.tensor(cursor + len(batches))}


def remembered(store: Path, *, before: int) -> tuple[dict[str, Tensor], int]:
    """What the newest round before this one left, and its number; nothing and 0 if none did."""
    numbers = [number for number in _numbers(store) if number < before]
    if not numbers:
        return {}, 0
    return safetensors.torch.load_file(_path(store, max(numbers))), max(numbers)


def remember(store: Path, number: int, kept: Weights) -> None:
    """Keep this for the rounds after ``number``; older than the round before it is deleted."""
    path = _path(store, number)
    write_private(path, safetensors.torch.save({n: v.contiguous() for n, v in kept.items()}))
    older = sorted(found for found in _numbers(store) if found < number)
    for old in older[:-1]:
        _path(store, old).unlink()


# --- private --------------------------------------------------------------------------------------


def _cursor(kept: Weights) -> int:
    return int(kept[CURSOR]) if CURSOR in kept else 0


def _path(store: Path, number: int) -> Path:
    return store / FOLDER / f"after-{number}.safetensors"


def _numbers(store: Path) -> list[int]:
    found = (store / FOLDER).glob("after-*.safetensors")
    return [int(path.stem.removeprefix("after-")) for path in found]
