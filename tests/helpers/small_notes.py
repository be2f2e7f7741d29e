"""Made-up notes, small models that know their words, and gradients as an attacker sees them."""

from pathlib import Path

from torch import Tensor

from fedkola.audit.evidence import Sequences, Sighting
from fedkola.training import fresh, whole
from fedkola.training.fresh import Architecture
from fedkola.training.model import Foundation, encode, load

TEXT = (
    "the heart pumps blood through the lung and the lung gives air to the blood of the heart "
    "while a nurse writes a note on pain, pressure and the drug that was given in the morning "
)
NOTES = (
    "the nurse gives the drug in the morning",
    "pain and pressure through the heart",
    "blood of the lung was given a note",
    "while the heart pumps the nurse writes",
)
WIDTH = 32


def made(
    folder: Path, architecture: Architecture = "gpt2", *, layers: int = 2, heads: int = 2
) -> Foundation:
    """A new model of these words, whole."""
    shape = fresh.Shape(
        architecture=architecture,
        width=WIDTH,
        layers=layers,
        heads=heads,
        vocabulary=320,
        length=24,
    )
    fresh.create(folder, shape, [TEXT * 3], seed=0)
    return load(str(folder), max_tokens=24, whole=True)


def rows(foundation: Foundation, texts: tuple[str, ...], *, most: int = 24) -> Sequences:
    return tuple(tuple(row)[:most] for row in encode(foundation, texts))


def sighting(
    foundation: Foundation, change: dict[str, Tensor], batch: int, *, number: int = 0
) -> Sighting:
    """A change of one site, made in one step from so many sequences."""
    return Sighting(
        round=number,
        who="site",
        sites=1,
        before=whole.parameters(foundation),
        change=change,
        protocol={"name": "gradient", "batch": batch, "inner_steps": 1},
    )


def one_gradient(foundation: Foundation, batch: Sequences, number: int = 0) -> Sighting:
    change = whole.gradient(foundation, whole.parameters(foundation), batch)
    return sighting(foundation, dict(change), len(batch), number=number)
