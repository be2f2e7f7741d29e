"""Learning curves and the frontier of pre-training, as inline SVG.

Both axes of a curve may be logarithmic. Many series are told apart by the names at their ends: the
first one is drawn strong, the others thin.
"""

import math
from collections.abc import Mapping, Sequence

from markupsafe import Markup

from fedkola.evaluation.plots import draw
from fedkola.evaluation.plots.draw import WIDTH

LEFT, RIGHT, TOP, HEIGHT = 58.0, WIDTH - 150, 26.0, 280.0
BASE = TOP + HEIGHT
Points = Sequence[tuple[float, float]]


def lines(
    series: Mapping[str, Points], *, title: str, across: str, up: str, log_x: bool = False
) -> Markup:
    """One line for each series over a common logarithmic y axis; "" without points."""
    points = [(x, y) for line in series.values() for x, y in line if math.isfinite(y) and y > 0]
    if not points:
        return Markup("")
    spread_x, spread_y = _spread([x for x, _ in points]), _spread([y for _, y in points])
    parts = _frame(spread_x, spread_y, across=across, up=up, log_x=log_x)
    ends: list[tuple[float, str, str]] = []
    for place, (name, line) in enumerate(series.items()):
        at = [
            (_x(x, spread_x, log=log_x), _y(y, spread_y))
            for x, y in line
            if math.isfinite(y) and y > 0
        ]
        if not at:
            continue
        kind, thin = ("c2", " thin") if place else ("c1", "")
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in at)
        parts.append(Markup('<polyline class="line {}{}" points="{}"/>').format(kind, thin, path))
        ends.append((at[-1][1], f"{name} {line[-1][1]:.4g}", kind))
    parts += _ends(ends)
    about = "; ".join(f"{name}: {line[-1][1]:.4g} at the end" for name, line in series.items())
    return draw.svg(title, about, BASE + 46, parts)


def marks(
    rows: Sequence[tuple[str, float, float, float, float, str]],
    *,
    title: str,
    across: str,
    up: str,
    bound: tuple[float, float] | None = None,
) -> Markup:
    """Rows (name, x, y, low, high, kind of mark) on two logarithmic axes; kind "own" is a disc,
    others a diamond. ``bound`` (x, y) marks the corner of a target, met to its lower left."""
    if not rows:
        return Markup("")
    spread_x = _spread([row[1] for row in rows] + ([bound[0]] if bound else []))
    spread_y = _spread([v for row in rows for v in row[2:5]] + ([bound[1]] if bound else []))
    parts = _frame(spread_x, spread_y, across=across, up=up, log_x=True)
    if bound:
        x, y = _x(bound[0], spread_x, log=True), _y(bound[1], spread_y)
        parts += [draw.line(x, y, x, BASE, "bound"), draw.line(LEFT, y, x, y, "bound")]
        parts.append(draw.text(LEFT + 6, y - 6, "target", "small muted"))
    taken: list[float] = []
    for name, cost, value, low, high, kind in sorted(rows, key=lambda row: row[2]):
        x, y = _x(cost, spread_x, log=True), _y(value, spread_y)
        tone = "c1" if kind == "own" else "c2"
        if high > low:
            parts.append(draw.line(x, _y(low, spread_y), x, _y(high, spread_y), f"error {tone}"))
        parts.append(draw.disc(x, y, tone) if kind == "own" else draw.diamond(x, y, tone))
        base = y + 4
        while any(abs(base - other) < 12 for other in taken):
            base -= 12
        taken.append(base)
        if abs(base - 4 - y) > 10:
            parts.append(draw.line(x, y, x + 8, base - 4, "lead-line"))
        parts.append(draw.text(x + 10, base, name, "name strong t1" if kind == "own" else "name"))
    about = "; ".join(f"{row[0]}: {row[2]:.4g} at {row[1]:.3g}" for row in rows)
    return draw.svg(title, about, BASE + 46, parts)


# --- private --------------------------------------------------------------------------------------


def _spread(values: Sequence[float]) -> tuple[float, float]:
    low, high = min(values), max(values)
    return (low, high) if high > low else (low * 0.9, high * 1.1 + 1e-9)


def _x(value: float, spread: tuple[float, float], *, log: bool) -> float:
    low, high = spread
    if log:
        value, low, high = (math.log10(max(v, 1e-12)) for v in (value, low, high))
    return LEFT + 8 + (RIGHT - LEFT - 16) * (value - low) / (high - low)


def _y(value: float, spread: tuple[float, float]) -> float:
    low, high = (math.log(v) for v in spread)
    return BASE - 8 - (HEIGHT - 16) * (math.log(value) - low) / (high - low)


def _frame(
    spread_x: tuple[float, float],
    spread_y: tuple[float, float],
    *,
    across: str,
    up: str,
    log_x: bool,
) -> list[Markup]:
    parts = [draw.text(4, TOP - 12, up, "tick"), draw.text(RIGHT, BASE + 38, across, "tick end")]
    for value in _nice(*spread_y, log=True):
        y = _y(value, spread_y)
        parts += [
            draw.line(LEFT, y, RIGHT, y, "grid"),
            draw.text(LEFT - 6, y + 4, _short(value), "tick end"),
        ]
    for value in _nice(*spread_x, log=log_x):
        x = _x(value, spread_x, log=log_x)
        parts += [
            draw.line(x, BASE, x, BASE + 5, "axis"),
            draw.text(x, BASE + 19, _short(value), "tick mid"),
        ]
    return [*parts, draw.line(LEFT, BASE, RIGHT, BASE, "axis")]


def _nice(low: float, high: float, *, log: bool) -> list[float]:
    """Round numbers inside, about five of them."""
    if log and high / max(low, 1e-12) > 4:
        powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
        steps = (1, 2, 5) if len(powers) <= 3 else (1,)
        return [v for p in powers for s in steps if low <= (v := s * 10.0**p) <= high]
    rough = (high - low) / 4 or 1.0
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(s * power for s in (1, 2, 5, 10) if s * power >= rough)
    first = math.ceil(low / step)
    return [step * n for n in range(first, math.floor(high / step) + 1)]


def _short(value: float) -> str:
    for size, unit in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= size:
            return f"{value / size:.3g} {unit}"
    return f"{value:.3g}"


def _ends(ends: Sequence[tuple[float, str, str]]) -> list[Markup]:
    """Names at the ends of their lines, moved apart where they would meet."""
    parts, last = [], -math.inf
    for y, name, kind in sorted(ends):
        last = max(y, last + 13)
        tone = "value strong t1" if kind == "c1" else "value"
        parts.append(draw.text(RIGHT + 6, last + 4, name, tone))
    return parts
