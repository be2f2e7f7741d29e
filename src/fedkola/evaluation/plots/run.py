"""Drawings of one run: accuracy, traffic, what became of each scope, and of each module."""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from markupsafe import Markup

from fedkola.evaluation.plots import draw
from fedkola.evaluation.plots.draw import WIDTH
from fedkola.evaluation.plots.words import clip, count, megabytes, number, percent

MANY = 16


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
    xs = draw.slots(len(windows), left, right)

    def y(value: float) -> float:
        return 14 + upper * (1 - (value - low) / (1 - low))

    parts = []
    for tick in draw.ticks(low, 1.0, 0.1 if low >= 0.6 else 0.2):
        parts.append(draw.line(left, y(tick), right, y(tick), "grid"))
        parts.append(draw.text(left - 8, y(tick) + 4, percent(tick, 0), "tick end"))
    above = _series(xs, top5, y, name="top-5", kind="c2", shape=draw.diamond, offset=-10)
    below = _series(xs, top1, y, name="top-1", kind="c1", shape=draw.disc, offset=19)
    parts += [*above, *below]
    base = 14 + upper
    if lower:
        peak = max(value or 0.0 for value in known) or 1.0
        base += 36 + lower
        width = min(46.0, (right - left) / len(xs) * 0.56)
        for x, value in zip(xs, known, strict=True):
            if value is not None:
                height = lower * value / peak
                parts.append(draw.box(x - width / 2, base - height, width, height, "quiet"))
                if len(xs) <= MANY:
                    parts.append(draw.text(x, base - height - 6, count(value), "value mid muted"))
        parts.append(draw.text(right + 12, base - 4, "labels known", "value muted"))
    parts.append(draw.line(left, base, right, base, "axis"))
    parts += _names(xs, windows, base + 20, right - left)
    last = [
        f"{name} {percent(draw.last(values))}"
        for name, values in (("top-1", top1), ("top-5", top5))
    ]
    about = (
        f"Line plot over {len(windows)} windows. At the end: {', '.join(last)}."
        f" Labels known: {count(draw.last(known))}."
    )
    return draw.svg("Accuracy by window, with labels known", about, base + 30, parts)


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
    xs = draw.slots(len(windows), left, right)
    width = min(30.0, (right - left) / len(xs) * 0.36)
    step = draw.round_step(peak / 4e6) * 1e6
    peak = step * math.ceil(peak / step - 1e-9)
    parts = []
    for tick in draw.ticks(0.0, peak, step):
        y = base - height * tick / peak
        parts.append(draw.line(left, y, right, y, "grid"))
        parts.append(draw.text(left - 8, y + 4, f"{tick / 1e6:g}", "tick end"))
    for x, sent, received in zip(xs, up, down, strict=True):
        for value, at, kind in ((sent, x - width - 1, "f1"), (received, x + 1, "f2")):
            if value is None:
                continue
            tall = height * value / peak
            parts.append(draw.box(at, base - tall, width, tall, kind))
            if len(xs) <= MANY // 2:
                label = megabytes(value)
                parts.append(draw.text(at + width / 2, base - tall - 5, label, "small mid muted"))
    parts.append(draw.line(left, base, right, base, "axis"))
    for row, (name, kind) in enumerate((("up, from sites", "f1"), ("down, to sites", "f2"))):
        parts.append(draw.box(right + 12, top + 22 * row, 11, 11, kind))
        parts.append(draw.text(right + 28, top + 10 + 22 * row, name, "small muted"))
    parts.append(draw.text(right + 12, top + 54, "all in MB", "small muted"))
    parts += _names(xs, windows, base + 20, right - left)
    about = (
        f"Bar plot over {len(windows)} {turn}s."
        f" In all {megabytes(sum(v or 0 for v in up))} MB went up from the sites"
        f" and {megabytes(sum(v or 0 for v in down))} MB came down."
    )
    return draw.svg(f"Megabytes by {turn}", about, base + 30, parts)


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
        draw.ring(left + 6, 12, "c2"),
        draw.text(left + 18, 16, "on arrival", "small muted"),
        draw.disc(left + 102, 12, "c1"),
        draw.text(left + 114, 16, "now", "small muted"),
    ]
    if lags:
        parts.append(draw.text(right + 16, 16, "answerable", "small muted"))
    for tick in draw.ticks(low, 1.0, 0.1 if low >= 0.4 else 0.2):
        parts.append(draw.line(x(tick), top - 12, x(tick), base, "grid"))
        parts.append(draw.text(x(tick), top - 18, percent(tick, 0), "tick mid"))
    for row, item in enumerate(rows):
        y = top + pitch * row + pitch / 2 - 4
        parts.append(draw.text(14, y + 4, clip(item["number"], 6), "muted end"))
        parts.append(draw.text(22, y + 4, clip(item["text"], 40), "name"))
        parts.append(draw.line(x(item["first"]), y, x(item["last"]), y, "span"))
        parts.append(draw.ring(x(item["first"]), y, "c2"))
        parts.append(draw.disc(x(item["last"]), y, "c1"))
        kind = "small strong t2" if item["late"] else "small muted"
        parts.append(draw.text(right + 16, y + 4, item["lag"], kind))
    start = sum(row["first"] for row in rows) / len(rows)
    end = sum(row["last"] for row in rows) / len(rows)
    about = (
        f"Dot plot of {len(rows)} scopes. On average {percent(start)} on arrival"
        f" and {percent(end)} now."
    )
    return draw.svg("Accuracy of each scope on arrival and now", about, base + 6, parts)


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
        draw.disc(left + 4, 12, "c1"),
        draw.text(left + 15, 16, "sealed", "small muted"),
        draw.diamond(left + 74, 12, "c2"),
        draw.text(left + 85, 16, "changed or taken out", "small muted"),
        draw.text(left - 12, top - 14, "round", "tick end"),
    ]
    for at in range(1, rounds + 1, max(1, math.ceil(rounds / 20))):
        parts.append(draw.text(x(at), top - 14, str(at), "tick mid"))
        parts.append(draw.line(x(at), top - 8, x(at), y(len(rows)) - 10, "grid"))
    for at, row in enumerate(rows):
        end = rounds if row["closed"] is None else row["closed"]
        start = x(row["opened"])
        width = max(6.0, x(end) - start)
        past = "" if row["closed"] is None else " past"
        parts.append(draw.text(left - 12, y(at) + 4, clip(row["name"], 33), "name end"))
        parts.append(draw.box(start - 3, y(at) - 5, width + 6, 10, f"life{past}"))
        if row["heir"] is not None:
            path = f"M{x(end):.1f} {y(at):.1f}V{y(row['heir']):.1f}"
            parts.append(Markup('<path class="heir" d="{}"/>').format(path))
        sealed = {when for when, kind in row["marks"] if kind == "sealed"}
        for when, kind in row["marks"]:
            if kind == "sealed":
                parts.append(draw.disc(x(when), y(at), "c1"))
            else:
                parts.append(draw.diamond(x(when) + 11 * (when in sealed), y(at), "c2"))
        parts.append(draw.text(right + 20, y(at) + 4, row["says"], "small muted"))
    current = sum(row["closed"] is None for row in rows)
    about = f"{len(rows)} module versions over {rounds} rounds, {current} of them current."
    return draw.svg("Lineage of the bank", about, y(len(rows)), parts)


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
            parts.append(draw.text(x, y(v) + offset, f"{100 * v:.1f}", "small mid muted"))
    x, v = points[-1]
    parts.append(draw.text(x + 14, y(v) + 4, f"{name} {percent(v)}", f"value strong t{kind[1]}"))
    return parts


def _names(
    xs: Sequence[float], windows: Sequence[Mapping[str, Any]], y: float, width: float
) -> list[Markup]:
    room = int(width / len(xs) / 7)
    names = [str(w.get("name") or w.get("number") or i) for i, w in enumerate(windows, 1)]
    if max(map(len, names)) > room:
        names = [str(w.get("number") or i) for i, w in enumerate(windows, 1)]
    every = math.ceil(len(xs) * 26 / width)
    return [
        draw.text(x, y, name, "tick mid") for x, name in list(zip(xs, names, strict=True))[::every]
    ]
