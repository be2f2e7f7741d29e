"""The group ``fedkola bench``: run a frozen suite, write its results as pages."""

import shlex
from pathlib import Path
from types import ModuleType
from typing import Annotated

import typer

from fedkola.cli.rounds import drawn, resumable
from fedkola.cli.text import AsJson, examples, print_json

app = typer.Typer(
    help="Run a frozen evaluation suite, or write its results as pages.", no_args_is_help=True
)
RESULTS = Path("benchmarks/results")
Asked = dict[str, str | int | tuple[str, ...]]
Seeds = Annotated[int, typer.Option(min=0, help="Seeds to run; 0 is the profile's own.")]
Rows = Annotated[str, typer.Option(help="Rows of the table, a,b; empty is the profile's.")]
Out = Annotated[Path, typer.Option(help="Folder for the results.")]


@app.command(
    epilog=examples(
        "fedkola bench dynamic --profile quick",
        "fedkola bench dynamic --stream clinc150 --profile standard",
        "fedkola bench dynamic --stream icd-chapters --rows fedkola,joint --seeds 1",
        "fedkola bench dynamic --stream icd-chapters --measured",
    )
)
def dynamic(
    stream: Annotated[str, typer.Option(help="Stream of the suite.")] = "icd-chapters",
    profile: Annotated[str, typer.Option(help="Size: quick, standard or full.")] = "standard",
    seeds: Seeds = 0,
    rows: Rows = "",
    measured: Annotated[
        bool, typer.Option("--measured", help="Run nothing: a table of what is measured already.")
    ] = False,
    out: Out = RESULTS,
    as_json: AsJson = False,
) -> None:
    """Does knowledge stay current, everywhere it may be, without forgetting?"""
    from fedkola.evaluation import dynamic as suite

    asked: Asked = {"stream": stream, "profile": profile, "seeds": seeds, "rows": _names(rows)}
    _show(suite, asked | {"measured": measured}, out, as_json=as_json)


@app.command(
    "forget",
    epilog=examples(
        "fedkola bench forget --profile quick",
        "fedkola bench forget --profile standard --seeds 1",
    ),
)
def bench_forget(
    profile: Annotated[str, typer.Option(help="Size: quick or standard.")] = "standard",
    seeds: Seeds = 0,
    out: Out = RESULTS,
    as_json: AsJson = False,
) -> None:
    """Is what was removed really gone, and what does removing it cost?"""
    from fedkola.evaluation import forget as suite

    _show(suite, {"profile": profile, "seeds": seeds}, out, as_json=as_json)


@app.command(
    epilog=examples(
        "fedkola bench pretrain --profile quick",
        "fedkola bench pretrain --rows synchronous,ours --seeds 1",
    )
)
def pretrain(
    profile: Annotated[str, typer.Option(help="Size: quick or standard.")] = "standard",
    seeds: Seeds = 0,
    rows: Rows = "",
    out: Out = RESULTS,
    as_json: AsJson = False,
) -> None:
    """How close does rare exchange come to synchronous training, and at what bytes?"""
    from fedkola.evaluation import pretrain as suite

    _show(suite, {"profile": profile, "seeds": seeds, "rows": _names(rows)}, out, as_json=as_json)


@app.command(
    epilog=examples(
        "fedkola bench audit --profile quick",
        "fedkola bench audit --seeds 1",
    )
)
def audit(
    profile: Annotated[str, typer.Option(help="Size: quick or standard.")] = "standard",
    seeds: Annotated[int, typer.Option(min=0, help="Seeds to run; 0 is the profile's own.")] = 0,
    rows: Annotated[str, typer.Option(help="Rows of the table, a,b; empty is all.")] = "",
    out: Annotated[Path, typer.Option(help="Folder for JSON and tables.")] = RESULTS,
    as_json: AsJson = False,
) -> None:
    """What could each observer reconstruct, and what does each defence take away?"""
    from fedkola.evaluation import leakage as suite
    from fedkola.evaluation.leakage_table import table

    again = (
        f"fedkola bench audit --profile {profile} --seeds {seeds} "
        + (f"--rows {shlex.quote(rows)} " if rows else "")
        + f"--out {shlex.quote(str(out))}"
    )
    with resumable(None, again), drawn("audit") as (note, progress):
        result = suite.run(
            profile=profile,
            seeds=seeds,
            out=out,
            note=note,
            progress=progress,
            chosen=tuple(row.strip() for row in rows.split(",") if row.strip()),
        )
    if as_json:
        print_json(dict(result))
        return
    print(table(result))
    print(f"results: {out}")


@app.command(
    epilog=examples(
        "fedkola bench quality --profile quick",
        "fedkola bench quality --rows trec,agnews --seeds 2",
    )
)
def quality(
    profile: Annotated[str, typer.Option(help="Size: quick or standard.")] = "standard",
    seeds: Seeds = 0,
    rows: Annotated[str, typer.Option(help="Streams, a,b; empty is the profile's.")] = "",
    out: Out = RESULTS,
    as_json: AsJson = False,
) -> None:
    """How much of the clean-data result survives wrong labels, without their rate?"""
    from fedkola.evaluation import quality as suite

    _show(suite, {"profile": profile, "seeds": seeds, "rows": _names(rows)}, out, as_json=as_json)


@app.command(
    epilog=examples(
        "fedkola bench report",
        "fedkola bench report --profile quick --out pages",
    )
)
def report(
    results: Annotated[Path, typer.Option(help="Folder with the JSON of a suite.")] = RESULTS,
    out: Annotated[Path, typer.Option(help="Folder for the pages.")] = Path("docs/results"),
    profile: Annotated[
        str, typer.Option(help="Only results of this size; empty: all but quick ones.")
    ] = "",
    as_json: AsJson = False,
) -> None:
    """Write one page a stream from its results: what happened, what was lost, what it cost.

    As Markdown, as standalone HTML, and its plots as SVG. Nothing is measured.
    """
    from fedkola.evaluation import page

    written = page.pages(results, profile=profile)
    for name, text in written.items():
        path = out / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    if as_json:
        print_json({"out": str(out), "files": list(written)})
        return
    print(f"{sum(name.endswith('.html') for name in written)} pages: {out / 'README.md'}")


def _show(suite: ModuleType, asked: Asked, out: Path, *, as_json: bool) -> None:
    """Run a suite as asked and print its table; when interrupted, the command that goes on."""
    name = suite.__name__.rpartition(".")[2]
    again = ["fedkola", "bench", name]
    for key, value in {**asked, "out": str(out)}.items():
        text = ",".join(value) if isinstance(value, tuple) else str(value)
        if text and not isinstance(value, bool):
            again += [f"--{key}", text]
        elif value is True:
            again.append(f"--{key}")
    with resumable(None, shlex.join(again)), drawn(name) as (note, progress):
        result = suite.run(**asked, out=out, note=note, progress=progress)
    if as_json:
        print_json(dict(result))
        return
    print(suite.table(result))
    print(f"results: {out}")


def _names(text: str) -> tuple[str, ...]:
    return tuple(name.strip() for name in text.split(",") if name.strip())
