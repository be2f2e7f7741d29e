"""Plots of the report, drawn as inline SVG.

A plot is a :class:`markupsafe.Markup` string with a title, a description for screen readers and
class names in place of colours, so that one drawing reads on paper, by day and in the dark. Series
differ by shape or dash as well as by colour. All text is escaped here.
"""

import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from markupsafe import Markup

WIDTH = 760
STEPS = 7
MANY = 16
DASH = "\N{EN DASH}"
MINUS = "\N{MINUS SIGN}"


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


def traffic(windows: Sequence[Mapping[str, Any]]) -> Markup:
    """Megabytes up and down by window as paired bars; "" when no bytes are given."""
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
        f"Bar plot over {len(windows)} windows."
        f" In all {megabytes(sum(v or 0 for v in up))} MB went up from the sites"
        f" and {megabytes(sum(v or 0 for v in down))} MB came down."
    )
    return _svg("Megabytes by window", about, base + 30, parts)


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
