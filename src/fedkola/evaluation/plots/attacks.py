"""Scores of attacks beside what knowing nothing scores and what they reach undefended."""

from collections.abc import Sequence
from dataclasses import dataclass

from markupsafe import Markup

from fedkola.evaluation.plots import draw
from fedkola.evaluation.plots.draw import WIDTH
from fedkola.evaluation.plots.words import clip, percent


@dataclass(frozen=True, slots=True, kw_only=True)
class Scored:
    """A score between 0 and 1 with its interval, what no information would score (``null``), and
    what the same attack reached with the defence off (``control``) and had to (``floor``)."""

    name: str
    about: str
    value: float
    low: float
    high: float
    null: float | None
    control: float | None
    floor: float | None
    broken: bool = False


def intervals(rows: Sequence[Scored]) -> Markup:
    """One line a score: its interval, its null as a ring, its control as a diamond; "" without."""
    if not rows:
        return Markup("")
    left, right, top, step = 250, WIDTH - 24, 34, 40

    def x(value: float) -> float:
        return left + (right - left) * min(1.0, max(0.0, value))

    parts = [
        draw.disc(left + 4, 10, "c1"),
        draw.text(left + 14, 14, "score, 95 % interval", "value muted"),
    ]
    parts += [
        draw.ring(left + 154, 10, "c1"),
        draw.text(left + 164, 14, "knows nothing", "value muted"),
    ]
    parts += [
        draw.diamond(left + 274, 10, "c2"),
        draw.text(left + 284, 14, "control, defence off", "value muted"),
    ]
    base = top + step * len(rows)
    for tick in draw.ticks(0.0, 1.0, 0.25):
        parts.append(draw.line(x(tick), top - 8, x(tick), base, "grid"))
        parts.append(draw.text(x(tick), base + 18, percent(tick, 0), "tick mid"))
    for i, row in enumerate(rows):
        y = top + step * i + 14
        parts.append(draw.text(left - 14, y, clip(row.name, 38), "name end"))
        parts.append(draw.text(left - 14, y + 14, clip(row.about, 42), "small muted end"))
        if row.floor is not None:
            parts.append(draw.line(x(row.floor), y - 8, x(row.floor), y + 16, "bound"))
        if row.control is not None:
            parts.append(draw.diamond(x(row.control), y + 4, "c2"))
        if row.null is not None:
            parts.append(draw.ring(x(row.null), y + 4, "c1"))
        parts.append(draw.line(x(row.low), y + 4, x(row.high), y + 4, "error c1"))
        parts.append(draw.disc(x(row.value), y + 4, "f0" if row.broken else "c1"))
    told = "; ".join(f"{row.name}, {row.about}: {percent(row.value)}" for row in rows)
    return draw.svg("Scores of attacks, with null and control", told + ".", base + 28, parts)
