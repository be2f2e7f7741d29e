"""How rounds are shown: as progress while they run, as a table when they are over."""

import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table

from fedkola.cli.text import number, stdout
from fedkola.errors import RunNotFound

if TYPE_CHECKING:
    from fedkola.types import Report

INTERRUPTED = 130


@contextmanager
def resumable(folder: Path | None, again: str) -> Iterator[None]:
    """On Ctrl-C say what is saved and how to go on, and exit 130.

    ``folder`` is that of a run; None is a suite, which keeps each cell that it has measured.
    """
    try:
        yield
    except KeyboardInterrupt:
        from fedkola.ledger import Ledger

        saved = f"what was measured is kept; go on: {again}"
        try:
            if folder is not None:
                with Ledger.open(folder) as ledger:
                    saved = f"saved at round {ledger.run().round}; resume: {again}"
        except RunNotFound:
            saved = "stopped before anything was saved; give the same command again"
        print(f"\n{saved}", file=sys.stderr)
        raise typer.Exit(INTERRUPTED) from None


@contextmanager
def drawn(
    title: str, total: int | None = None, done: int = 0
) -> Iterator[tuple[Callable[[str], None], Callable[["Report"], None]]]:
    """A bar of rounds, the current one and the ETA on a terminal; nothing without one.

    Yields ``note``, which prints a line and titles what follows, and ``progress``, which prints a
    finished round.
    """
    console = Console(stderr=True, markup=False, highlight=False, emoji=False)
    bars = Progress(
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("ETA"),
        TimeRemainingColumn(),
        console=console,
        disable=not console.is_terminal,
        transient=True,
        # A round may take longer than the default of 30 s over which speed is estimated.
        speed_estimate_period=3600,
    )
    with bars:
        task = bars.add_task(f"{title}: round {done + 1}", total=total, completed=done)

        def note(text: str) -> None:
            nonlocal title
            if console.is_terminal:
                console.print(text)
                title = text.partition(":")[0]
                bars.update(task, description=title)

        def progress(report: "Report") -> None:
            if console.is_terminal:
                console.print(as_line(report))
                bars.update(task, advance=1, description=f"{title}: round {report.round + 1}")

        yield note, progress


def as_line(report: "Report") -> str:
    """One finished round on one line."""
    answered = len([site for site in report.cohort if site not in report.refused])
    parts = [
        f"round {report.round:>2}",
        f"{len(report.cohort)} asked {answered} answered",
        f"{report.seconds:.1f} s",
        *_speed(report.metrics, report.seconds),
        *(f"{name} {number(value)}" for name, value in _metrics(report.metrics).items()),
        *(f"refused: {site} ({why})" for site, why in report.refused.items()),
    ]
    return "  ".join(parts)


def summary(folder: Path, rounds: Sequence[Mapping[str, Any]]) -> None:
    """The final table: one row a round."""
    if not rounds:
        return
    rows = [as_row(report) for report in rounds]
    names = list(dict.fromkeys(name for row in rows for name in row))
    table = Table(title=str(folder), title_justify="left")
    for name in names:
        table.add_column(name, justify="right")
    for row in rows:
        table.add_row(*(row.get(name, "") for name in names))
    stdout().print(table)


def as_row(report: Mapping[str, Any]) -> dict[str, str]:
    """One finished round, title of column -> text."""
    metrics = report.get("metrics", {})
    asked, refused = report.get("cohort", ()), report.get("refused", {})
    return {
        "round": str(report.get("round", "")),
        "asked": str(len(asked)),
        "answered": str(len([site for site in asked if site not in refused])),
        **{name: number(value) for name, value in _metrics(metrics).items()},
        "MB up": f"{report.get('bytes_up', 0) / 1e6:.2f}",
        "MB down": f"{report.get('bytes_down', 0) / 1e6:.2f}",
        "s": f"{report.get('seconds', 0):.1f}",
    }


def _speed(metrics: Mapping[str, float], seconds: float) -> list[str]:
    """Tokens a second, where a round trained on tokens."""
    tokens = metrics.get("tokens", 0.0)
    return [f"{number(tokens / seconds)} tokens/s"] if tokens and seconds else []


def _metrics(metrics: Mapping[str, float]) -> dict[str, float]:
    """Those of the whole, as columns; names with a slash are of single scopes."""
    titles = {"asked": "tested", "nodes": "known", "top1": "top-1", "top5": "top-5"}
    return {titles.get(name, name): v for name, v in metrics.items() if "/" not in name}
