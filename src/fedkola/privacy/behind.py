"""What stands behind one answer of a site: the text it was trained on, and how.

A leakage gate asks for it before the answer leaves. Where a run is recorded for an audit, the site
also keeps it, with the integers it added: the truth that attacks are scored against. It lies in
the private folder of the site and never leaves it.
"""

import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import safetensors.torch
import torch
from torch import Tensor

from fedkola.errors import DataError
from fedkola.files import write_private
from fedkola.types import Weights

FOLDER = "behind"
Kind = Literal["", "adapter", "whole"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Behind:
    """Training behind one answer: ``kind`` "" is none at all, "adapter" a few factors, "whole" all
    parameters. ``sequences`` are token ids in the order read, ``steps`` those of the optimiser,
    ``adaptive`` says that its step does not grow with the gradient (Adam and its kin)."""

    kind: Kind = ""
    sequences: tuple[tuple[int, ...], ...] = ()
    steps: int = 0
    adaptive: bool = False

    @property
    def tokens(self) -> int:
        return sum(map(len, self.sequences))

    def and_then(self, later: "Behind") -> "Behind":
        """Both trainings of one answer; the more dangerous property of the two counts."""
        if not self.kind:
            return later
        return Behind(
            kind="whole" if "whole" in (self.kind, later.kind) else self.kind,
            sequences=self.sequences + later.sequences,
            steps=self.steps + later.steps,
            adaptive=self.adaptive and later.adaptive,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Entry:
    """One answer as its site remembers it."""

    round: int
    step: str
    sequences: tuple[tuple[int, ...], ...]
    words: Weights


def keep(
    store: Path, *, round: int, step: str, question: str, behind: Behind, words: Weights
) -> None:
    """Write one entry, mode 0600; the same answer again replaces it."""
    lengths = [len(row) for row in behind.sequences]
    tensors: dict[str, Tensor] = {
        "tokens": torch.tensor([t for row in behind.sequences for t in row], dtype=torch.int32),
        "lengths": torch.tensor(lengths, dtype=torch.int32),
        **{f"words/{name}": value.clone().contiguous() for name, value in words.items()},
    }
    about = json.dumps({"round": round, "step": step})
    content = safetensors.torch.save(tensors, metadata={"about": about})
    path = store / FOLDER / f"{round:06d}-{question}.safetensors"
    write_private(path, content, durable=False)


def read(store: Path) -> tuple[Entry, ...]:
    """Every entry of a site in the order of rounds; raises DataError for a file that is none."""
    found = []
    for path in sorted((store / FOLDER).glob("*.safetensors")):
        try:
            with safetensors.safe_open(path, framework="pt") as file:
                about = json.loads((file.metadata() or {})["about"])
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            rows = torch.split(tensors["tokens"], tensors["lengths"].tolist())
            entry = Entry(
                round=about["round"],
                step=about["step"],
                sequences=tuple(tuple(row.tolist()) for row in rows),
                words=_words(tensors),
            )
        except (safetensors.SafetensorError, KeyError, ValueError, RuntimeError) as error:
            raise DataError(
                f"{path} is not what a site keeps of its answers ({error!r}); delete the folder "
                f"{FOLDER} and run again"
            ) from error
        found.append(entry)
    return tuple(found)


def erase(store: Path) -> None:
    """Delete all entries, as when records behind them were removed."""
    shutil.rmtree(store / FOLDER, ignore_errors=True)


def _words(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {n.removeprefix("words/"): v for n, v in tensors.items() if n.startswith("words/")}
