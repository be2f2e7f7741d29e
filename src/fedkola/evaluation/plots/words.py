"""Numbers as text: shares, counts, sizes and times as pages show them."""

import math
import re
from typing import Any

DASH = "\N{EN DASH}"
MINUS = "\N{MINUS SIGN}"


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
