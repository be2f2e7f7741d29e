"""Pieces of a drawing in inline SVG.

A plot is a :class:`markupsafe.Markup` string with a title, a description for screen readers and
class names in place of colours, so that one drawing reads on paper, by day and in the dark. Series
differ by shape or dash as well as by colour. All text is escaped here.
"""

import math
import re
from collections.abc import Sequence
from importlib import resources

from markupsafe import Markup

from fedkola.evaluation.plots.words import number

WIDTH = 760
STEPS = 7


def bar(
    value: float | None, *, kind: str = "f1", interval: Sequence[float] | None = None
) -> Markup:
    """A bar of a share between 0 and 1, its interval shaded; the number beside it is the text."""
    if (share := number(value)) is None:
        return Markup("")
    parts = [box(0, 0, 100, 10, "track"), box(0, 0, 100 * min(max(share, 0.0), 1.0), 10, kind)]
    if interval is not None:
        low, high = (100 * edge for edge in interval)
        parts.append(box(low, 0, high - low, 10, "band"))
    return Markup(
        '<svg class="bar" viewBox="0 0 100 10" preserveAspectRatio="none" aria-hidden="true"'
        ' focusable="false">{}</svg>'
    ).format(Markup("").join(parts))


def shades(matrix: Sequence[Sequence[float | None]]) -> tuple[float, float]:
    """The range of shares that the shades of a heat map span, in whole tens of per cent."""
    values = [share for row in matrix for cell in row if (share := number(cell)) is not None]
    if not values:
        return 0.0, 1.0
    low, high = math.floor(min(values) * 10) / 10, math.ceil(max(values) * 10) / 10
    if high > low:
        return low, high
    return (low - 0.1, high) if low > 0 else (0.0, 0.1)


def shade(value: float, low: float, high: float) -> int:
    """The shade of a share, 0 (low) to STEPS - 1 (high)."""
    return min(STEPS - 1, max(0, int(STEPS * (value - low) / (high - low))))


def standalone(plot: Markup) -> str:
    """A drawing as an SVG file of its own, with its colours by day and in the dark."""
    style = resources.files("fedkola.evaluation").joinpath("plots.css").read_text("utf-8")
    frame = re.search(r'viewBox="0 0 ([\d.]+) ([\d.]+)"', plot)
    if frame is None:
        raise ValueError("standalone takes a drawing of this module; an empty one was given")
    width, height = float(frame[1]) + 24, float(frame[2]) + 24
    view = f'xmlns="http://www.w3.org/2000/svg" width="{width:g}" height="{height:g}" '
    view += f'font-family="system-ui, Arial, sans-serif" viewBox="-12 -12 {width:g} {height:g}"'
    head, body = str(plot).replace(frame[0], view, 1).split(">", 1)
    ground = f'<rect class="paper" x="-12" y="-12" width="{width:g}" height="{height:g}"/>'
    return f"{head}><style>{style}</style>{ground}{body}\n"


def svg(title: str, about: str, height: float, parts: Sequence[Markup]) -> Markup:
    return Markup(
        '<svg class="plot" role="img" aria-label="{}. {}" viewBox="0 0 {} {}">'
        "<title>{}</title><desc>{}</desc>{}</svg>"
    ).format(title, about, WIDTH, f"{height:.0f}", title, about, Markup("").join(parts))


def slots(n: int, left: float, right: float) -> list[float]:
    pitch = (right - left) / n
    return [left + pitch * (i + 0.5) for i in range(n)]


def ticks(low: float, high: float, step: float) -> list[float]:
    first = math.ceil(low / step - 1e-9)
    return [step * i for i in range(first, math.floor(high / step + 1e-9) + 1)]


def round_step(size: float) -> float:
    power = 10.0 ** math.floor(math.log10(size))
    return next(power * step for step in (1, 2, 5, 10) if power * step >= size * (1 - 1e-9))


def last(values: Sequence[float | None]) -> float | None:
    return next((value for value in reversed(values) if value is not None), None)


def line(x1: float, y1: float, x2: float, y2: float, kind: str) -> Markup:
    return Markup(f'<line class="{kind}" x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}"/>')


def box(x: float, y: float, width: float, height: float, kind: str) -> Markup:
    return Markup(
        f'<rect class="{kind}" x="{x:.1f}" y="{y:.1f}" width="{width:.2f}" height="{height:.2f}"/>'
    )


def disc(x: float, y: float, kind: str) -> Markup:
    return Markup(f'<circle class="dot {kind}" cx="{x:.1f}" cy="{y:.1f}" r="4.5"/>')


def ring(x: float, y: float, kind: str) -> Markup:
    return Markup(f'<circle class="ring {kind}" cx="{x:.1f}" cy="{y:.1f}" r="5"/>')


def diamond(x: float, y: float, kind: str) -> Markup:
    return Markup(
        f'<path class="dot {kind}" d="M{x:.1f} {y - 5.5:.1f}l5.5 5.5l-5.5 5.5l-5.5 -5.5z"/>'
    )


def text(x: float, y: float, text: str, kind: str) -> Markup:
    return Markup('<text class="{}" x="{}" y="{}">{}</text>').format(
        kind, f"{x:.1f}", f"{y:.1f}", text
    )
