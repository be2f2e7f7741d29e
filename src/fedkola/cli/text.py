"""What verbs share when they read arguments and print: options, tables, numbers, JSON."""

import json
import math
import sys
from collections.abc import Iterable, Mapping, Sequence
from enum import Enum
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

Folder = Annotated[Path, typer.Argument(help="Folder of a run, as printed when it started.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout.")]


def examples(*lines: str) -> str:
    """The epilog of a verb."""
    # An empty line between any two keeps each on a line of its own.
    return "\n\n".join(("Examples:", *lines))


def print_table(
    title: str,
    columns: Sequence[str],
    rows: Iterable[Sequence[str]],
    *,
    right: Sequence[str] = (),
) -> None:
    """On stdout; the columns named in ``right`` are aligned there."""
    # A title inside the table is folded to its width.
    if title:
        print(title)
    table = Table()
    for name in columns:
        table.add_column(name, justify="right" if name in right else "left", overflow="fold")
    for row in rows:
        table.add_row(*row)
    sys.stdout.flush()
    stdout().print(table)


def stdout() -> Console:
    """A console that prints text as it is."""
    # Without a terminal rich assumes 80 columns and folds the table.
    width = None if sys.stdout.isatty() else 140
    return Console(markup=False, highlight=False, emoji=False, width=width)


def number(value: float) -> str:
    """A metric in few digits."""
    if isinstance(value, int):
        return str(value)
    if abs(value) <= 1:
        return f"{value:.3f}"
    return f"{value:.0f}" if value.is_integer() else f"{value:.4g}"


def print_json(document: Mapping[str, Any]) -> None:
    """The one JSON object on stdout."""
    print(json.dumps(plain(document), ensure_ascii=False, allow_nan=False))


def plain(value: Any) -> Any:
    """JSON values; what JSON cannot say (NaN, infinity) is null."""
    if isinstance(value, Enum):
        return value.value
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    return value
