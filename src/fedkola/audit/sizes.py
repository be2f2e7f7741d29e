"""A8 under TLS: what lengths alone tell a network that can read nothing.

Lengths follow from the plan alone if every site is asked with as many bytes as the others of its
question, and answers with as many, its own name apart. Each question whose messages differ by more
counts. Times are not judged: how long a site trains shows how fast it is.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

from fedkola.audit.evidence import Control, Evidence, Measure
from fedkola.audit.transcript import Frame
from fedkola.audit.view import View
from fedkola.errors import DataError


@dataclass(frozen=True, slots=True, kw_only=True)
class Sizes:
    """Lengths of all messages. The positive control pads one answer by a byte."""

    name: ClassVar[str] = "sizes"
    targets: ClassVar[tuple[str, ...]] = ("transcript",)
    observers: ClassVar[tuple[str, ...]] = ("tls",)

    def examine(self, seen: View, *, seed: int = 0) -> Evidence:
        """Raises DataError where no question went to two sites."""
        began = time.perf_counter()
        groups = list(exchanged(seen.frames).values())
        if not any(len(group) > 1 for group in groups):
            raise DataError(
                f"of {len(groups)} kinds of message none went to two sites; lengths of one site "
                "have nothing to be compared with"
            )
        found = float(sum(map(unequal, groups)))
        first = next(group for group in groups if len(group) > 1)
        padded = [replace(first[0], size=first[0].size + 1), *first[1:]]
        return Evidence(
            attack=self.name,
            target="transcript",
            updates=len(groups),
            measures={"violations": Measure(value=found, low=found, high=found, null=0.0)},
            control=Control(metric="fault found", value=float(unequal(padded)), floor=1.0),
            seconds=time.perf_counter() - began,
            notes=f"{len(seen.frames)} messages, no content",
        )


def exchanged(frames: Sequence[Frame]) -> dict[tuple[str, str], list[Frame]]:
    """Messages that should be alike, by question and direction; refusals left out."""
    found: dict[tuple[str, str], list[Frame]] = {}
    for frame in frames:
        if not frame.refused:
            found.setdefault((frame.question, frame.direction), []).append(frame)
    return found


def unequal(group: Sequence[Frame]) -> bool:
    """Whether lengths differ by more than the names that stand in answers."""
    lengths = {f.size - len(f.peer.encode()) * (f.direction == "up") for f in group}
    return len(lengths) > 1
