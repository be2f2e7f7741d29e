"""Drawings of a benchmark: accuracy by concept, the forgetting matrix, accuracy against bytes."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise

from markupsafe import Markup

from fedkola.evaluation.plots import draw
from fedkola.evaluation.plots.draw import STEPS, WIDTH, shade
from fedkola.evaluation.plots.words import DASH, clip, megabytes, number, percent

ACROSS = 4  # panels side by side
COLUMNS = 20  # of a heat map, so that its numbers stay readable


@dataclass(frozen=True, slots=True, kw_only=True)
class Mark:
    """A row on the frontier: a share with its interval, at a cost in MB (0: nothing is sent).

    ``kind`` is "own", "other", or "bound" for a row that no deployment could be.
    """

    name: str
    share: float
    low: float
    high: float
    megabytes: float
    kind: str


def panels(
    names: Sequence[str],
    own: Sequence[Sequence[float | None]],
    other: Sequence[Sequence[float | None]],
    *,
    who: tuple[str, str],
) -> Markup:
    """One small panel a concept: its accuracy by window under two methods, its arrival marked.

    ``own`` and ``other`` are R[t, k] with concepts in the order of ``names``; ``other`` may be
    empty. A gap in a line: the concept was not asked then. "" when nothing was measured.
    """
    if not any(number(cell) is not None for row in own for cell in row):
        return Markup("")
    left, gap, tall, pitch, top = 36, 34, 62, 106, 52
    width = (WIDTH - left - gap * ACROSS) / ACROSS
    peak = max(v for r in (own, other) for row in r for c in row if (v := number(c)) is not None)
    high = min(1.0, max(0.1, math.ceil(peak * 10 - 1e-9) / 10))
    slots = max(2, len(own))
    parts = [
        *_key(left, 14, ((who[0], "c1"), (who[1], "c2")) if other else ((who[0], "c1"),)),
        draw.ring(WIDTH - 150, 14, "c2"),
        draw.text(WIDTH - 139, 18, "window of its arrival", "small muted"),
    ]
    for k, name in enumerate(names):
        x0, y0 = left + (k % ACROSS) * (width + gap), top + (k // ACROSS) * pitch

        def x(t: int, x0: float = x0) -> float:
            return x0 + width * t / (slots - 1)

        def y(v: float, y0: float = y0) -> float:
            return y0 + tall * (1 - v / high)

        parts.append(draw.text(x0, y0 - 8, clip(name, 24), "small strong"))
        for v in (0.0, high / 2, high):
            parts.append(draw.line(x0, y(v), x0 + width, y(v), "axis" if v == 0 else "grid"))
        if k % ACROSS == 0:
            parts.append(draw.text(x0 - 6, y(high) + 4, percent(high, 0), "tick end"))
            parts.append(draw.text(x0 - 6, y(0) + 4, "0", "tick end"))
        parts.append(draw.text(x0, y(0) + 14, "1", "tick mid"))
        parts.append(draw.text(x0 + width, y(0) + 14, str(len(own)), "tick mid"))
        ends = []
        for r, kind in ((other, "c2"), (own, "c1")):
            column = [number(row[k]) for row in r]
            for run in _runs(column):
                path = " ".join(f"{x(t):.1f},{y(v):.1f}" for t, v in run)
                parts.append(Markup('<polyline class="line {}" points="{}"/>').format(kind, path))
            if points := [(t, v) for t, v in enumerate(column) if v is not None]:
                ends.append((points[-1], kind))
                if len(points) == 1:
                    shape = draw.disc if kind == "c1" else draw.diamond
                    parts.append(shape(x(points[0][0]), y(points[0][1]), kind))
        seen = [(t, v) for t, row in enumerate(own) if (v := number(row[k])) is not None]
        if seen:
            parts.append(draw.ring(x(seen[0][0]), y(seen[0][1]), "c2"))
        parts += _ends(ends, x, y)
    about = (
        f"{len(names)} line plots, one a concept, over {len(own)} windows. "
        + "; ".join(
            f"{name} ends at {percent(draw.last(_column(own, k)))}" for k, name in enumerate(names)
        )
        + f" ({who[0]})."
    )
    height = top + pitch * math.ceil(len(names) / ACROSS)
    return draw.svg("Accuracy per concept over time", about, height - 12, parts)


def heat(
    names: Sequence[str], matrix: Sequence[Sequence[float | None]], *, span: tuple[float, float]
) -> Markup:
    """R[t, k] as shaded numbers, one row a concept, one column a window; "" when it is empty.

    Shades darken (in the dark: lighten) over ``span``, so that the order survives without colour.
    More than COLUMNS windows are averaged in groups, each named by its first window.
    """
    columns = grouped(matrix)
    if not any(number(cell) is not None for _, row in columns for cell in row):
        return Markup("")
    left, right, top, tall = 236, WIDTH - 4, 34, 22
    width = (right - left) / len(columns)
    low, high = span
    size = math.ceil(len(matrix) / len(columns))
    head = "window" if size == 1 else f"mean of {size} windows from"
    parts = [draw.text(left - 10, top - 10, head, "tick end")]
    for at, (label, _) in enumerate(columns):
        parts.append(
            draw.text(left + width * (at + 0.5), top - 10, label.split(DASH)[0], "tick mid")
        )
    for k, name in enumerate(names):
        y = top + tall * k
        parts.append(draw.text(left - 10, y + 15, clip(name, 33), "name end"))
        cells = [number(row[k]) for _, row in columns]
        first = next((at for at, cell in enumerate(cells) if cell is not None), len(cells))
        for at, cell in enumerate(cells):
            x = left + width * at
            if cell is None:
                parts.append(draw.box(x + 1, y + 1, width - 2, tall - 2, "before"))
                if at > first:
                    parts.append(draw.text(x + width / 2, y + 15, DASH, "small mid muted"))
                continue
            step = shade(cell, low, high)
            parts.append(draw.box(x + 1, y + 1, width - 2, tall - 2, f"s{step}"))
            if at == first:
                parts.append(draw.box(x + 2, y + 2, width - 4, tall - 4, "come"))
            ink = "high" if step > STEPS // 2 else "low"
            parts.append(draw.text(x + width / 2, y + 15, f"{100 * cell:.0f}", f"small mid {ink}"))
    y = top + tall * len(names) + 12
    parts += _ramp(left, y, low, high)
    shown = [v for _, row in columns for c in row if (v := number(c)) is not None]
    about = (
        f"Heat map of {len(names)} concepts over {len(matrix)} windows, from "
        f"{percent(min(shown))} to {percent(max(shown))}. The table below it holds every number."
    )
    return draw.svg("Accuracy of every concept after every window", about, y + 22, parts)


def grouped(
    matrix: Sequence[Sequence[float | None]],
) -> list[tuple[str, list[float | None]]]:
    """Rows of R with their names: as they are, or the means of consecutive windows where there are
    more than COLUMNS."""
    size = math.ceil(len(matrix) / COLUMNS)
    found = []
    for start in range(0, len(matrix), max(1, size)):
        rows = matrix[start : start + size]
        name = str(start + 1) if size == 1 else f"{start + 1}{DASH}{start + len(rows)}"
        means: list[float | None] = []
        for column in zip(*rows, strict=True):
            seen = [v for cell in column if (v := number(cell)) is not None]
            means.append(sum(seen) / len(seen) if seen else None)
        found.append((name, means))
    return found


def frontier(marks: Sequence[Mark]) -> Markup:
    """Accuracy against megabytes sent by a site in a window, on a log scale; "" without rows.

    Rows that send nothing stand in a column of their own at the left. The stepped line joins the
    rows that no cheaper row beats, rows that are bounds left out.
    """
    if not marks:
        return Markup("")
    sent = [m.megabytes for m in marks if m.megabytes > 0]
    silent = [m for m in marks if m.megabytes <= 0]
    lowest, highest = (min(sent), max(sent)) if sent else (1.0, 1.0)
    x_low, x_high = math.log10(lowest) - 0.15, math.log10(highest) + 0.35
    left = 90.0 + 7 * max(len(m.name) for m in silent) if silent else 48.0
    right, top, height = WIDTH - 16, 26, 300
    base = top + height
    y_low = max(0.0, math.floor((min(m.low for m in marks) - 0.02) * 20) / 20)
    y_high = min(1.0, math.ceil((max(m.high for m in marks) + 0.02) * 20) / 20)

    def x(mark: Mark) -> float:
        if mark.megabytes <= 0:
            return 62.0
        return left + (right - left) * (math.log10(mark.megabytes) - x_low) / (x_high - x_low)

    def y(share: float) -> float:
        return top + height * (1 - (share - y_low) / (y_high - y_low))

    parts = [
        draw.text(4, top - 12, "final top-1", "tick"),
        draw.disc(right - 268, top - 16, "c1"),
        draw.text(right - 258, top - 12, "FedKoLa", "small muted"),
        draw.diamond(right - 190, top - 16, "c2"),
        draw.text(right - 180, top - 12, "other method", "small muted"),
        draw.ring(right - 88, top - 16, "c1"),
        draw.text(right - 78, top - 12, "bound", "small muted"),
    ]
    for tick in draw.ticks(y_low, y_high, draw.round_step((y_high - y_low) / 6)):
        parts.append(draw.line(48, y(tick), right, y(tick), "grid"))
        parts.append(draw.text(42, y(tick) + 4, percent(tick, 0), "tick end"))
    for value in _decades(10**x_low, 10**x_high) if sent else []:
        at = left + (right - left) * (math.log10(value) - x_low) / (x_high - x_low)
        parts.append(draw.line(at, base, at, base + 5, "axis"))
        parts.append(draw.text(at, base + 19, f"{value:g}", "tick mid"))
    parts.append(draw.line(48, base, right, base, "axis"))
    if silent:
        parts.append(draw.line(left - 12, top, left - 12, base, "bound"))
        parts.append(draw.text(left / 2 + 18, base + 19, "nothing sent", "tick mid"))
    parts.append(draw.text(right, base + 38, "MB up, a site and window (log)", "tick end"))
    steps: list[tuple[float, float]] = []
    best = 0.0
    for mark in sorted(marks, key=lambda m: (m.megabytes, -m.share)):
        if mark.kind != "bound" and mark.megabytes > 0 and mark.share > best:
            steps += [(x(mark), y(best)), (x(mark), y(mark.share))]
            best = mark.share
    taken = [(x(m) - 7, y(m.share) - 7, x(m) + 7, y(m.share) + 7) for m in marks]
    if steps:
        steps = [*steps[1:], (right, y(best))]
        taken += [
            (min(a, c), min(b, d), max(a, c), max(b, d)) for (a, b), (c, d) in pairwise(steps)
        ]
        path = " ".join(f"{a:.1f},{b:.1f}" for a, b in steps)
        parts.append(Markup('<polyline class="edge" points="{}"/>').format(path))
    shapes = {"own": (draw.disc, "c1"), "other": (draw.diamond, "c2"), "bound": (draw.ring, "c1")}
    for mark in marks:
        shape, kind = shapes[mark.kind]
        if mark.high > mark.low:
            parts.append(draw.line(x(mark), y(mark.low), x(mark), y(mark.high), f"error {kind}"))
        parts.append(shape(x(mark), y(mark.share), kind))
    for mark in sorted(marks, key=lambda m: (m.kind != "own", -m.share)):
        parts += _label(mark.name, x(mark), y(mark.share), taken, (50, top, right, base), mark.kind)
    about = "; ".join(
        f"{m.name} {percent(m.share)} at {megabytes(1e6 * m.megabytes)} MB"
        for m in sorted(marks, key=lambda m: -m.share)
    )
    return draw.svg("Accuracy against bytes", f"{about}.", base + 46, parts)


def _runs(column: Sequence[float | None]) -> list[list[tuple[int, float]]]:
    """Stretches without a gap, of two points or more."""
    found: list[list[tuple[int, float]]] = [[]]
    for t, value in enumerate(column):
        if value is None:
            found.append([])
        else:
            found[-1].append((t, value))
    return [run for run in found if len(run) > 1]


def _ends(
    ends: Sequence[tuple[tuple[int, float], str]],
    x: Callable[[int], float],
    y: Callable[[float], float],
) -> list[Markup]:
    """The last value of each line beside it, moved apart where two would meet."""
    at = [(y(v), x(t), f"{100 * v:.0f}", kind) for (t, v), kind in ends]
    at.sort()
    if len(at) == 2 and at[1][0] - at[0][0] < 12:
        middle = (at[0][0] + at[1][0]) / 2
        at = [(middle - 6, *at[0][1:]), (middle + 6, *at[1][1:])]
    return [
        draw.text(x_, y_ + 4, text, f"small strong t{kind[1]}")
        for y_, x_, text, kind in ((y_, x_ + 9, text, kind) for y_, x_, text, kind in at)
    ]


def _key(x: float, y: float, names: Sequence[tuple[str, str]]) -> list[Markup]:
    parts = []
    for name, kind in names:
        path = f"{x:.1f},{y:.1f} {x + 22:.1f},{y:.1f}"
        parts.append(Markup('<polyline class="line {}" points="{}"/>').format(kind, path))
        parts.append(draw.text(x + 28, y + 4, name, f"small strong t{kind[1]}"))
        x += 46 + 7 * len(name)
    return parts


def _ramp(x: float, y: float, low: float, high: float) -> list[Markup]:
    parts = [draw.text(x, y + 11, percent(low, 0), "tick")]
    x += 30
    for step in range(STEPS):
        parts.append(draw.box(x, y, 22, 13, f"s{step}"))
        x += 23
    parts.append(draw.text(x + 6, y + 11, percent(high, 0), "tick"))
    parts.append(draw.box(x + 52, y + 1, 16, 11, "come"))
    parts.append(draw.text(x + 74, y + 11, "arrived in this window", "tick"))
    parts.append(draw.box(x + 206, y, 16, 13, "before"))
    parts.append(draw.text(x + 228, y + 11, "not asked", "tick"))
    return parts


def _decades(low: float, high: float) -> list[float]:
    """1, 2 and 5 times the powers of ten inside, or those powers alone where they are many."""
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    steps = (1, 2, 5) if len(powers) <= 5 else (1,)
    return [v for p in powers for s in steps if low <= (v := s * 10.0**p) <= high]


def _label(
    name: str,
    x: float,
    y: float,
    taken: list[tuple[float, float, float, float]],
    room: tuple[float, float, float, float],
    kind: str,
) -> list[Markup]:
    """The name near its mark, where it covers no other; a thin line leads to it from afar."""
    width = (7.8 if kind == "own" else 7.0) * len(name)
    spots = [
        (x + sign * (9 + reach) - (width if sign < 0 else 0), y + 4 + lift)
        for reach in (0, 14, 40, 70)
        for lift in (0, -13, 13, -26, 26, -40, 40, -56, 56)
        for sign in (1, -1)
    ]
    free = (
        (left, base)
        for left, base in spots
        if room[0] <= left
        and left + width <= room[2]
        and room[1] - 8 <= base - 10
        and base + 3 <= room[3]
        and not any(
            left < box[2] and box[0] < left + width and base - 10 < box[3] and box[1] < base + 3
            for box in taken
        )
    )
    left, base = next(free, spots[0])
    taken.append((left, base - 10, left + width, base + 3))
    tone = {"own": "strong t1", "other": "", "bound": "muted"}[kind]
    parts = []
    near = min(abs(left - x), abs(left + width - x))
    if near > 12 or abs(base - 4 - y) > 14:
        edge = left - 2 if left > x else left + width + 2
        parts.append(draw.line(x, y, edge, base - 4, "lead-line"))
    return [*parts, draw.text(left, base, name, f"name {tone}")]


def _column(matrix: Sequence[Sequence[float | None]], k: int) -> list[float | None]:
    return [number(row[k]) for row in matrix]
