"""Plots of the report, drawn as inline SVG.

A plot is a :class:`markupsafe.Markup` string with a title, a description for screen readers and
class names in place of colours, so that one drawing reads on paper, by day and in the dark. Series
differ by shape or dash as well as by colour. All text is escaped here.
"""

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from itertools import pairwise
from typing import Any

from markupsafe import Markup

WIDTH = 760
STEPS = 7
MANY = 16
DASH = "\N{EN DASH}"
MINUS = "\N{MINUS SIGN}"
ACROSS = 4  # panels side by side
COLUMNS = 20  # of a heat map, so that its numbers stay readable


def accuracy(windows: Sequence[Mapping[str, Any]]) -> Markup:
    """Top-1 and top-5 by window, above the number of labels known; "" when no accuracy is given."""
    top1 = [number(window.get("top1")) for window in windows]
    top5 = [number(window.get("top5")) for window in windows]
    known = [number(window.get("known")) for window in windows]
    shown = [value for value in (*top1, *top5) if value is not None]
    if not shown:
        return Markup("")
    low = max(0.0, math.floor((min(shown) - 0.05) * 5) / 5)
    left, right, upper, lower = 44, WIDTH - 104, 210, 70 if any(known) else 0
    xs = _slots(len(windows), left, right)

    def y(value: float) -> float:
        return 14 + upper * (1 - (value - low) / (1 - low))

    parts = []
    for tick in _ticks(low, 1.0, 0.1 if low >= 0.6 else 0.2):
        parts.append(_line(left, y(tick), right, y(tick), "grid"))
        parts.append(_text(left - 8, y(tick) + 4, percent(tick, 0), "tick end"))
    above = _series(xs, top5, y, name="top-5", kind="c2", shape=_diamond, offset=-10)
    below = _series(xs, top1, y, name="top-1", kind="c1", shape=_disc, offset=19)
    parts += [*above, *below]
    base = 14 + upper
    if lower:
        peak = max(value or 0.0 for value in known) or 1.0
        base += 36 + lower
        width = min(46.0, (right - left) / len(xs) * 0.56)
        for x, value in zip(xs, known, strict=True):
            if value is not None:
                height = lower * value / peak
                parts.append(_box(x - width / 2, base - height, width, height, "quiet"))
                if len(xs) <= MANY:
                    parts.append(_text(x, base - height - 6, count(value), "value mid muted"))
        parts.append(_text(right + 12, base - 4, "labels known", "value muted"))
    parts.append(_line(left, base, right, base, "axis"))
    parts += _names(xs, windows, base + 20, right - left)
    last = [
        f"{name} {percent(_last(values))}" for name, values in (("top-1", top1), ("top-5", top5))
    ]
    about = (
        f"Line plot over {len(windows)} windows. At the end: {', '.join(last)}."
        f" Labels known: {count(_last(known))}."
    )
    return _svg("Accuracy by window, with labels known", about, base + 30, parts)


def traffic(windows: Sequence[Mapping[str, Any]], *, turn: str = "window") -> Markup:
    """Megabytes up and down by window, or by another ``turn``, as paired bars; "" when no bytes are
    given."""
    up = [number(window.get("bytes_up")) for window in windows]
    down = [number(window.get("bytes_down")) for window in windows]
    peak = max((value for value in (*up, *down) if value is not None), default=0.0)
    if peak <= 0:
        return Markup("")
    left, right, height, top = 44, WIDTH - 104, 150, 24
    base = top + height
    xs = _slots(len(windows), left, right)
    width = min(30.0, (right - left) / len(xs) * 0.36)
    step = _round_step(peak / 4e6) * 1e6
    peak = step * math.ceil(peak / step - 1e-9)
    parts = []
    for tick in _ticks(0.0, peak, step):
        y = base - height * tick / peak
        parts.append(_line(left, y, right, y, "grid"))
        parts.append(_text(left - 8, y + 4, f"{tick / 1e6:g}", "tick end"))
    for x, sent, received in zip(xs, up, down, strict=True):
        for value, at, kind in ((sent, x - width - 1, "f1"), (received, x + 1, "f2")):
            if value is None:
                continue
            tall = height * value / peak
            parts.append(_box(at, base - tall, width, tall, kind))
            if len(xs) <= MANY // 2:
                label = megabytes(value)
                parts.append(_text(at + width / 2, base - tall - 5, label, "small mid muted"))
    parts.append(_line(left, base, right, base, "axis"))
    for row, (name, kind) in enumerate((("up, from sites", "f1"), ("down, to sites", "f2"))):
        parts.append(_box(right + 12, top + 22 * row, 11, 11, kind))
        parts.append(_text(right + 28, top + 10 + 22 * row, name, "small muted"))
    parts.append(_text(right + 12, top + 54, "all in MB", "small muted"))
    parts += _names(xs, windows, base + 20, right - left)
    about = (
        f"Bar plot over {len(windows)} {turn}s."
        f" In all {megabytes(sum(v or 0 for v in up))} MB went up from the sites"
        f" and {megabytes(sum(v or 0 for v in down))} MB came down."
    )
    return _svg(f"Megabytes by {turn}", about, base + 30, parts)


def arrivals(rows: Sequence[Mapping[str, Any]]) -> Markup:
    """For each scope, accuracy on arrival and at the end, and its freshness lag in words.

    A row holds ``number`` and ``text`` of the scope, ``first`` and ``last`` (shares, or None),
    ``lag`` (words, may be "") and ``late`` (whether the lag deserves the reader's eye).
    "" when no row has an accuracy.
    """
    rows = [row for row in rows if row["first"] is not None and row["last"] is not None]
    if not rows:
        return Markup("")
    lags = any(row["lag"] for row in rows)
    left, right = 286, WIDTH - (126 if lags else 24)
    top, pitch = 54, 23
    low: float = max(
        0.0, math.floor((min(min(r["first"], r["last"]) for r in rows) - 0.02) * 10) / 10
    )
    base = top + pitch * len(rows)

    def x(value: float) -> float:
        return left + (right - left) * (value - low) / (1 - low)

    parts = [
        _ring(left + 6, 12, "c2"),
        _text(left + 18, 16, "on arrival", "small muted"),
        _disc(left + 102, 12, "c1"),
        _text(left + 114, 16, "now", "small muted"),
    ]
    if lags:
        parts.append(_text(right + 16, 16, "answerable", "small muted"))
    for tick in _ticks(low, 1.0, 0.1 if low >= 0.4 else 0.2):
        parts.append(_line(x(tick), top - 12, x(tick), base, "grid"))
        parts.append(_text(x(tick), top - 18, percent(tick, 0), "tick mid"))
    for row, item in enumerate(rows):
        y = top + pitch * row + pitch / 2 - 4
        parts.append(_text(14, y + 4, clip(item["number"], 6), "muted end"))
        parts.append(_text(22, y + 4, clip(item["text"], 40), "name"))
        parts.append(_line(x(item["first"]), y, x(item["last"]), y, "span"))
        parts.append(_ring(x(item["first"]), y, "c2"))
        parts.append(_disc(x(item["last"]), y, "c1"))
        kind = "small strong t2" if item["late"] else "small muted"
        parts.append(_text(right + 16, y + 4, item["lag"], kind))
    start = sum(row["first"] for row in rows) / len(rows)
    end = sum(row["last"] for row in rows) / len(rows)
    about = (
        f"Dot plot of {len(rows)} scopes. On average {percent(start)} on arrival"
        f" and {percent(end)} now."
    )
    return _svg("Accuracy of each scope on arrival and now", about, base + 6, parts)


def bar(
    value: float | None, *, kind: str = "f1", interval: Sequence[float] | None = None
) -> Markup:
    """A bar of a share between 0 and 1, its interval shaded; the number beside it is the text."""
    if (share := number(value)) is None:
        return Markup("")
    parts = [_box(0, 0, 100, 10, "track"), _box(0, 0, 100 * min(max(share, 0.0), 1.0), 10, kind)]
    if interval is not None:
        low, high = (100 * edge for edge in interval)
        parts.append(_box(low, 0, high - low, 10, "band"))
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


# --- drawings of a benchmark ----------------------------------------------------------------------


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
        _ring(WIDTH - 150, 14, "c2"),
        _text(WIDTH - 139, 18, "window of its arrival", "small muted"),
    ]
    for k, name in enumerate(names):
        x0, y0 = left + (k % ACROSS) * (width + gap), top + (k // ACROSS) * pitch

        def x(t: int, x0: float = x0) -> float:
            return x0 + width * t / (slots - 1)

        def y(v: float, y0: float = y0) -> float:
            return y0 + tall * (1 - v / high)

        parts.append(_text(x0, y0 - 8, clip(name, 24), "small strong"))
        for v in (0.0, high / 2, high):
            parts.append(_line(x0, y(v), x0 + width, y(v), "axis" if v == 0 else "grid"))
        if k % ACROSS == 0:
            parts.append(_text(x0 - 6, y(high) + 4, percent(high, 0), "tick end"))
            parts.append(_text(x0 - 6, y(0) + 4, "0", "tick end"))
        parts.append(_text(x0, y(0) + 14, "1", "tick mid"))
        parts.append(_text(x0 + width, y(0) + 14, str(len(own)), "tick mid"))
        ends = []
        for r, kind in ((other, "c2"), (own, "c1")):
            column = [number(row[k]) for row in r]
            for run in _runs(column):
                path = " ".join(f"{x(t):.1f},{y(v):.1f}" for t, v in run)
                parts.append(Markup('<polyline class="line {}" points="{}"/>').format(kind, path))
            if points := [(t, v) for t, v in enumerate(column) if v is not None]:
                ends.append((points[-1], kind))
                if len(points) == 1:
                    shape = _disc if kind == "c1" else _diamond
                    parts.append(shape(x(points[0][0]), y(points[0][1]), kind))
        seen = [(t, v) for t, row in enumerate(own) if (v := number(row[k])) is not None]
        if seen:
            parts.append(_ring(x(seen[0][0]), y(seen[0][1]), "c2"))
        parts += _ends(ends, x, y)
    about = (
        f"{len(names)} line plots, one a concept, over {len(own)} windows. "
        + "; ".join(
            f"{name} ends at {percent(_last(_column(own, k)))}" for k, name in enumerate(names)
        )
        + f" ({who[0]})."
    )
    height = top + pitch * math.ceil(len(names) / ACROSS)
    return _svg("Accuracy per concept over time", about, height - 12, parts)


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
    parts = [_text(left - 10, top - 10, head, "tick end")]
    for at, (label, _) in enumerate(columns):
        parts.append(_text(left + width * (at + 0.5), top - 10, label.split(DASH)[0], "tick mid"))
    for k, name in enumerate(names):
        y = top + tall * k
        parts.append(_text(left - 10, y + 15, clip(name, 33), "name end"))
        cells = [number(row[k]) for _, row in columns]
        first = next((at for at, cell in enumerate(cells) if cell is not None), len(cells))
        for at, cell in enumerate(cells):
            x = left + width * at
            if cell is None:
                parts.append(_box(x + 1, y + 1, width - 2, tall - 2, "before"))
                if at > first:
                    parts.append(_text(x + width / 2, y + 15, DASH, "small mid muted"))
                continue
            step = shade(cell, low, high)
            parts.append(_box(x + 1, y + 1, width - 2, tall - 2, f"s{step}"))
            if at == first:
                parts.append(_box(x + 2, y + 2, width - 4, tall - 4, "come"))
            ink = "high" if step > STEPS // 2 else "low"
            parts.append(_text(x + width / 2, y + 15, f"{100 * cell:.0f}", f"small mid {ink}"))
    y = top + tall * len(names) + 12
    parts += _ramp(left, y, low, high)
    shown = [v for _, row in columns for c in row if (v := number(c)) is not None]
    about = (
        f"Heat map of {len(names)} concepts over {len(matrix)} windows, from "
        f"{percent(min(shown))} to {percent(max(shown))}. The table below it holds every number."
    )
    return _svg("Accuracy of every concept after every window", about, y + 22, parts)


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
        _text(4, top - 12, "final top-1", "tick"),
        _disc(right - 268, top - 16, "c1"),
        _text(right - 258, top - 12, "FedKoLa", "small muted"),
        _diamond(right - 190, top - 16, "c2"),
        _text(right - 180, top - 12, "other method", "small muted"),
        _ring(right - 88, top - 16, "c1"),
        _text(right - 78, top - 12, "bound", "small muted"),
    ]
    for tick in _ticks(y_low, y_high, _round_step((y_high - y_low) / 6)):
        parts.append(_line(48, y(tick), right, y(tick), "grid"))
        parts.append(_text(42, y(tick) + 4, percent(tick, 0), "tick end"))
    for value in _decades(10**x_low, 10**x_high) if sent else []:
        at = left + (right - left) * (math.log10(value) - x_low) / (x_high - x_low)
        parts.append(_line(at, base, at, base + 5, "axis"))
        parts.append(_text(at, base + 19, f"{value:g}", "tick mid"))
    parts.append(_line(48, base, right, base, "axis"))
    if silent:
        parts.append(_line(left - 12, top, left - 12, base, "bound"))
        parts.append(_text(left / 2 + 18, base + 19, "nothing sent", "tick mid"))
    parts.append(_text(right, base + 38, "MB up, a site and window (log)", "tick end"))
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
    shapes = {"own": (_disc, "c1"), "other": (_diamond, "c2"), "bound": (_ring, "c1")}
    for mark in marks:
        shape, kind = shapes[mark.kind]
        if mark.high > mark.low:
            parts.append(_line(x(mark), y(mark.low), x(mark), y(mark.high), f"error {kind}"))
        parts.append(shape(x(mark), y(mark.share), kind))
    for mark in sorted(marks, key=lambda m: (m.kind != "own", -m.share)):
        parts += _label(mark.name, x(mark), y(mark.share), taken, (50, top, right, base), mark.kind)
    about = "; ".join(
        f"{m.name} {percent(m.share)} at {megabytes(1e6 * m.megabytes)} MB"
        for m in sorted(marks, key=lambda m: -m.share)
    )
    return _svg("Accuracy against bytes", f"{about}.", base + 46, parts)


def lives(rows: Sequence[Mapping[str, Any]], rounds: int) -> Markup:
    """Where a bank's knowledge comes from: one lane a module version, over the rounds.

    A row holds ``name``, ``opened`` and ``closed`` (rounds, closed may be None), ``marks`` as
    (round, kind) with kind "sealed" or "changed", ``heir`` (index of the row that superseded it,
    or None) and ``says`` (text at its end). "" without rows.
    """
    if not rows:
        return Markup("")
    left, right, top, tall = 246, WIDTH - 124, 46, 23
    slots = max(2, rounds)

    def x(number: float) -> float:
        return left + (right - left) * (min(max(number, 1), slots) - 1) / (slots - 1)

    def y(row: int) -> float:
        return top + tall * row

    parts = [
        _disc(left + 4, 12, "c1"),
        _text(left + 15, 16, "sealed", "small muted"),
        _diamond(left + 74, 12, "c2"),
        _text(left + 85, 16, "changed or taken out", "small muted"),
        _text(left - 12, top - 14, "round", "tick end"),
    ]
    for at in range(1, rounds + 1, max(1, math.ceil(rounds / 20))):
        parts.append(_text(x(at), top - 14, str(at), "tick mid"))
        parts.append(_line(x(at), top - 8, x(at), y(len(rows)) - 10, "grid"))
    for at, row in enumerate(rows):
        end = rounds if row["closed"] is None else row["closed"]
        start = x(row["opened"])
        width = max(6.0, x(end) - start)
        past = "" if row["closed"] is None else " past"
        parts.append(_text(left - 12, y(at) + 4, clip(row["name"], 33), "name end"))
        parts.append(_box(start - 3, y(at) - 5, width + 6, 10, f"life{past}"))
        if row["heir"] is not None:
            path = f"M{x(end):.1f} {y(at):.1f}V{y(row['heir']):.1f}"
            parts.append(Markup('<path class="heir" d="{}"/>').format(path))
        sealed = {when for when, kind in row["marks"] if kind == "sealed"}
        for when, kind in row["marks"]:
            if kind == "sealed":
                parts.append(_disc(x(when), y(at), "c1"))
            else:
                parts.append(_diamond(x(when) + 11 * (when in sealed), y(at), "c2"))
        parts.append(_text(right + 20, y(at) + 4, row["says"], "small muted"))
    current = sum(row["closed"] is None for row in rows)
    about = f"{len(rows)} module versions over {rounds} rounds, {current} of them current."
    return _svg("Lineage of the bank", about, y(len(rows)), parts)


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

    parts = [_disc(left + 4, 10, "c1"), _text(left + 14, 14, "score, 95 % interval", "value muted")]
    parts += [_ring(left + 154, 10, "c1"), _text(left + 164, 14, "knows nothing", "value muted")]
    parts += [
        _diamond(left + 274, 10, "c2"),
        _text(left + 284, 14, "control, defence off", "value muted"),
    ]
    base = top + step * len(rows)
    for tick in _ticks(0.0, 1.0, 0.25):
        parts.append(_line(x(tick), top - 8, x(tick), base, "grid"))
        parts.append(_text(x(tick), base + 18, percent(tick, 0), "tick mid"))
    for i, row in enumerate(rows):
        y = top + step * i + 14
        parts.append(_text(left - 14, y, clip(row.name, 38), "name end"))
        parts.append(_text(left - 14, y + 14, clip(row.about, 42), "small muted end"))
        if row.floor is not None:
            parts.append(_line(x(row.floor), y - 8, x(row.floor), y + 16, "bound"))
        if row.control is not None:
            parts.append(_diamond(x(row.control), y + 4, "c2"))
        if row.null is not None:
            parts.append(_ring(x(row.null), y + 4, "c1"))
        parts.append(_line(x(row.low), y + 4, x(row.high), y + 4, "error c1"))
        parts.append(_disc(x(row.value), y + 4, "f0" if row.broken else "c1"))
    told = "; ".join(f"{row.name}, {row.about}: {percent(row.value)}" for row in rows)
    return _svg("Scores of attacks, with null and control", told + ".", base + 28, parts)


def standalone(plot: Markup) -> str:
    """A drawing as an SVG file of its own, with its colours by day and in the dark."""
    style = resources.files("fedkola.evaluation").joinpath("plots.css").read_text("utf-8")
    box = re.search(r'viewBox="0 0 ([\d.]+) ([\d.]+)"', plot)
    if box is None:
        raise ValueError("standalone takes a drawing of this module; an empty one was given")
    width, height = float(box[1]) + 24, float(box[2]) + 24
    view = f'xmlns="http://www.w3.org/2000/svg" width="{width:g}" height="{height:g}" '
    view += f'font-family="system-ui, Arial, sans-serif" viewBox="-12 -12 {width:g} {height:g}"'
    head, body = str(plot).replace(box[0], view, 1).split(">", 1)
    ground = f'<rect class="paper" x="-12" y="-12" width="{width:g}" height="{height:g}"/>'
    return f"{head}><style>{style}</style>{ground}{body}\n"


# --- numbers as text ------------------------------------------------------------------------------


def number(value: Any) -> float | None:
    """A finite number, or None for everything else; flags are not numbers."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    return float(value) if math.isfinite(value) else None


def percent(value: Any, digits: int = 1) -> str:
    """0.7043 as "70.4%"; a dash for a number that is absent or not finite."""
    share = number(value)
    if share is None:
        return DASH
    return f"{round(100 * share, digits) + 0.0:.{digits}f}%".replace("-", MINUS)


def count(value: Any) -> str:
    """46881 as "46,881"; a dash for a number that is absent or not finite."""
    amount = number(value)
    return DASH if amount is None else f"{amount:,.0f}".replace("-", MINUS)


def megabytes(value: Any) -> str:
    """Bytes in MB (10^6): "0.042", "0.42", "4.2", "42.0", "4,200"; a dash when absent."""
    amount = number(value)
    if amount is None:
        return DASH
    size = amount / 1e6
    if size == 0:
        return "0"
    if size >= 99.5:
        return f"{size:,.0f}"
    if size >= 0.0995:
        return f"{size:.1f}" if size >= 0.995 else f"{size:.2f}"
    return f"{size:.3f}" if size >= 0.0005 else "<0.001"


def seconds(value: Any) -> str:
    """A duration for readers: "0.4 s", "21 s", "3 min 20 s", "2 h 05 min"; a dash when absent."""
    time = number(value)
    if time is None:
        return DASH
    if time < 9.95:
        return f"{time:.1f} s"
    whole = round(time)
    if whole < 100:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"


def clip(text: str, length: int) -> str:
    """The text, cut to ``length`` characters, at a word that can end it where one is near."""
    if len(text) <= length:
        return text
    cut = text[: length - 1]
    words = re.sub(r"(?:[ ,;:(]|\b(?:and|of|the|in|with|to))+$", "", cut.rsplit(" ", 1)[0])
    return (words if len(cut) - len(words) <= 10 else cut.rstrip()) + "…"


# --- pieces of a drawing --------------------------------------------------------------------------


def _svg(title: str, about: str, height: float, parts: Sequence[Markup]) -> Markup:
    return Markup(
        '<svg class="plot" role="img" aria-label="{}. {}" viewBox="0 0 {} {}">'
        "<title>{}</title><desc>{}</desc>{}</svg>"
    ).format(title, about, WIDTH, f"{height:.0f}", title, about, Markup("").join(parts))


def _series(
    xs: Sequence[float],
    values: Sequence[float | None],
    y: Callable[[float], float],
    *,
    name: str,
    kind: str,
    shape: Callable[[float, float, str], Markup],
    offset: float,
) -> list[Markup]:
    points = [(x, v) for x, v in zip(xs, values, strict=True) if v is not None]
    if not points:
        return []
    path = " ".join(f"{x:.1f},{y(v):.1f}" for x, v in points)
    parts = [Markup('<polyline class="line {}" points="{}"/>').format(kind, path)]
    for x, v in points:
        parts.append(shape(x, y(v), kind))
        if len(xs) <= MANY and x != points[-1][0]:
            parts.append(_text(x, y(v) + offset, f"{100 * v:.1f}", "small mid muted"))
    x, v = points[-1]
    parts.append(_text(x + 14, y(v) + 4, f"{name} {percent(v)}", f"value strong t{kind[1]}"))
    return parts


def _names(
    xs: Sequence[float], windows: Sequence[Mapping[str, Any]], y: float, width: float
) -> list[Markup]:
    room = int(width / len(xs) / 7)
    names = [str(w.get("name") or w.get("number") or i) for i, w in enumerate(windows, 1)]
    if max(map(len, names)) > room:
        names = [str(w.get("number") or i) for i, w in enumerate(windows, 1)]
    every = math.ceil(len(xs) * 26 / width)
    return [_text(x, y, name, "tick mid") for x, name in list(zip(xs, names, strict=True))[::every]]


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
        _text(x_, y_ + 4, text, f"small strong t{kind[1]}")
        for y_, x_, text, kind in ((y_, x_ + 9, text, kind) for y_, x_, text, kind in at)
    ]


def _key(x: float, y: float, names: Sequence[tuple[str, str]]) -> list[Markup]:
    parts = []
    for name, kind in names:
        path = f"{x:.1f},{y:.1f} {x + 22:.1f},{y:.1f}"
        parts.append(Markup('<polyline class="line {}" points="{}"/>').format(kind, path))
        parts.append(_text(x + 28, y + 4, name, f"small strong t{kind[1]}"))
        x += 46 + 7 * len(name)
    return parts


def _ramp(x: float, y: float, low: float, high: float) -> list[Markup]:
    parts = [_text(x, y + 11, percent(low, 0), "tick")]
    x += 30
    for step in range(STEPS):
        parts.append(_box(x, y, 22, 13, f"s{step}"))
        x += 23
    parts.append(_text(x + 6, y + 11, percent(high, 0), "tick"))
    parts.append(_box(x + 52, y + 1, 16, 11, "come"))
    parts.append(_text(x + 74, y + 11, "arrived in this window", "tick"))
    parts.append(_box(x + 206, y, 16, 13, "before"))
    parts.append(_text(x + 228, y + 11, "not asked", "tick"))
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
        parts.append(_line(x, y, edge, base - 4, "lead-line"))
    return [*parts, _text(left, base, name, f"name {tone}")]


def _column(matrix: Sequence[Sequence[float | None]], k: int) -> list[float | None]:
    return [number(row[k]) for row in matrix]


def _slots(n: int, left: float, right: float) -> list[float]:
    pitch = (right - left) / n
    return [left + pitch * (i + 0.5) for i in range(n)]


def _ticks(low: float, high: float, step: float) -> list[float]:
    first = math.ceil(low / step - 1e-9)
    return [step * i for i in range(first, math.floor(high / step + 1e-9) + 1)]


def _round_step(size: float) -> float:
    power = 10.0 ** math.floor(math.log10(size))
    return next(power * step for step in (1, 2, 5, 10) if power * step >= size * (1 - 1e-9))


def _last(values: Sequence[float | None]) -> float | None:
    return next((value for value in reversed(values) if value is not None), None)


def _line(x1: float, y1: float, x2: float, y2: float, kind: str) -> Markup:
    return Markup(f'<line class="{kind}" x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}"/>')


def _box(x: float, y: float, width: float, height: float, kind: str) -> Markup:
    return Markup(
        f'<rect class="{kind}" x="{x:.1f}" y="{y:.1f}" width="{width:.2f}" height="{height:.2f}"/>'
    )


def _disc(x: float, y: float, kind: str) -> Markup:
    return Markup(f'<circle class="dot {kind}" cx="{x:.1f}" cy="{y:.1f}" r="4.5"/>')


def _ring(x: float, y: float, kind: str) -> Markup:
    return Markup(f'<circle class="ring {kind}" cx="{x:.1f}" cy="{y:.1f}" r="5"/>')


def _diamond(x: float, y: float, kind: str) -> Markup:
    return Markup(
        f'<path class="dot {kind}" d="M{x:.1f} {y - 5.5:.1f}l5.5 5.5l-5.5 5.5l-5.5 -5.5z"/>'
    )


def _text(x: float, y: float, text: str, kind: str) -> Markup:
    return Markup('<text class="{}" x="{}" y="{}">{}</text>').format(
        kind, f"{x:.1f}", f"{y:.1f}", text
    )
