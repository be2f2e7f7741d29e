"""Amounts and differences in words."""

from collections.abc import Mapping, Sequence

from fedkola.evaluation import plots
from fedkola.evaluation.cells import Found, uploaded
from fedkola.evaluation.page.course import mean_of


def side(gap: Mapping[str, float], sign: int, *, strict: bool) -> str:
    """ "ahead", "behind" or "level" from a paired difference; on one seed only its sign counts."""
    low, high = sorted((sign * gap["low"], sign * gap["high"]))
    if not strict:
        low = high = sign * gap["mean"]
    return "ahead" if low > 0 else "behind" if high < 0 else "level"


def distance(gap: Mapping[str, float] | None) -> str:
    """A paired difference as words that stand before a name."""
    if gap is None:
        return "on no common seed with"
    size = points(abs(gap["mean"]))
    if gap["mean"] == 0:
        return "level with"
    if gap["n"] == 1:
        return f"on one seed {size} {'above' if gap['mean'] > 0 else 'below'}"
    where, low, high = side(gap, 1, strict=True), gap["low"], gap["high"]
    if where == "behind":  # how far behind
        low, high = -high, -low
    interval = f"[{100 * low:.1f}, {100 * high:.1f}]".replace("-", plots.MINUS)
    if where == "level":
        return f"not told apart (difference {interval} points) from"
    return f"{size} {interval} {'ahead of' if where == 'ahead' else 'behind'}"


def megabytes(cells: Mapping[int, Found]) -> str:
    return plots.megabytes(mean_of(cells, uploaded))


def points(share: float) -> str:
    """0.0172 as "1.7 points"."""
    return f"{100 * share:.1f} points"


def ratio(one: float, other: float) -> str:
    """6.0 to 4.5 as "1.3"; "" where the other is nothing."""
    if other <= 0:
        return ""
    ratio = one / other
    return f"{ratio:,.0f}" if ratio >= 9.95 else f"{ratio:.2g}"


def count(number: float, noun: str) -> str:
    return f"{number:g} {noun}{'' if number == 1 else 's'}"


def listed(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"
