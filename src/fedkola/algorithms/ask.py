"""How an algorithm asks: one broadcast from its name, its hyper-parameters and a few tensors."""

from collections.abc import Mapping
from dataclasses import Field, fields
from typing import Any, ClassVar, Protocol

from fedkola.types import Broadcast, Grid, Scalar, Spec, Weights
from fedkola.wire import METRIC, WEIGHT

LOCAL = {"wire": False}
"""Metadata of a field that stays at the server: not a hyper-parameter, never broadcast."""


class Asker(Protocol):
    """An algorithm: a dataclass whose fields are its hyper-parameters."""

    __dataclass_fields__: ClassVar[dict[str, Field[Any]]]


def ask(
    algorithm: Asker | Spec,
    step: str,
    number: int,
    tensors: Weights,
    *,
    scale: Mapping[str, int],
    word: int = 32,
    metrics: Mapping[str, int] | None = None,
    bounded: bool = False,
) -> Broadcast:
    """One question of an algorithm, which may be given as its ``spec``.

    ``scale`` lists the fractional bits of every tensor of the answer, ``metrics`` likewise; the
    weight is a whole number. ``word`` is a width that Grid takes; ``bounded`` says that
    the sum is known to fit it.
    """
    named = algorithm if isinstance(algorithm, Mapping) else spec(algorithm)
    listed = {METRIC + name: bits for name, bits in (metrics or {}).items()}
    scales = {WEIGHT: 0, **scale, **listed}
    grid = Grid(word=_word(word), bits=word, scale=scales, bounded=bounded)
    return Broadcast(round=number, step=step, tensors=tensors, grid=grid, algorithm=named)


def spec(algorithm: Asker) -> Spec:
    """Class name and hyper-parameters: all that a site needs to rebuild the client half."""
    values: dict[str, Scalar] = {"name": type(algorithm).__name__}
    for f in fields(algorithm):
        if f.metadata.get("wire", True):
            values[f.name] = getattr(algorithm, f.name)
    return values


def _word(word: int) -> Any:
    return word
