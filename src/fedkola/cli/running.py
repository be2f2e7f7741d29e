"""The verbs that run a federation and ask it: demo, run, predict."""

import json
import shlex
import sys
from collections.abc import Iterable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table

from fedkola.cli.opened import features, print_parked
from fedkola.cli.rounds import drawn, resumable, summary
from fedkola.cli.text import AsJson, Folder, examples, print_json, stdout
from fedkola.errors import PlanError, RunNotFound

if TYPE_CHECKING:
    from fedkola.evaluation.answers import Answer
    from fedkola.evaluation.session import Session
    from fedkola.plan import Plan

app = typer.Typer()


@app.command(
    epilog=examples(
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
    with resumable(folder, again), drawn("demo", total, done) as (note, progress):
        result = demonstration.run(folder, note=note, progress=progress)
    if as_json:
        print_json({"folder": str(folder), "report": str(folder / "report.html"), **result})
        return
    with Ledger.open(folder) as ledger:
        summary(folder, [row.report for row in ledger.rounds(ledger.run().id)])
    _comparison(result.get("comparison", ()))
    print(f"report: {folder / 'report.html'}")
    print(f"run folder: {folder}")
    print(f'ask it: fedkola predict {shlex.quote(str(folder))} "broken left forearm"')


@app.command(
    epilog=examples(
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
    with resumable(folder, again):
        session = (
            sessions.open_run(plan, folder, cache=features(folder))
            if plan
            else sessions.resume(folder, cache=features(folder))
        )
        with session.ledger:
            if not as_json:
                _introduce(session)
            with drawn(session.plan.run.name, session.federation.rounds, _committed(folder)) as (
                _,
                progress,
            ):
                state = sessions.execute(session, progress=progress)
            document = _result(session, state)
    if as_json:
        print_json(document)
        return
    summary(folder, document["rounds"])
    print_parked(document["parked"])
    if document["parked"] and not document["view"]:
        print("no cell is open, so this run cannot answer yet; see knowledge.k_min and floors")
    print(f"report: {document['report']}")
    print(f"run folder: {folder}")


@app.command(
    epilog=examples(
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
    session = sessions.resume(folder, cache=features(folder))
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
        print_json({"answers": answers})
        return
    for answer in found:
        _print_answer(answer)


def _committed(folder: Path) -> int:
    from fedkola.ledger import Ledger

    try:
        with Ledger.open(folder) as ledger:
            return ledger.run().round
    except RunNotFound:
        return 0


def _introduce(session: "Session") -> None:
    """What is about to run, what was left out of the data, and what is not promised."""
    from fedkola.plan import digest

    plan, stream = session.plan, session.federation.stream
    records = sum(len(data) for data in stream.sites.values())
    print(
        f"plan {digest(plan)[:8]} checked: {plan.algorithm.name}, {session.federation.rounds} "
        f"rounds, {len(stream.sites)} sites, {records:,} records, {len(stream.test):,} to test; "
        f"{_promise(plan)}"
    )
    for place, reasons in stream.excluded.items():
        print(f"excluded: {place}: " + ", ".join(f"{n} {why}" for why, n in reasons.items()))
    for notice in stream.notices:
        print(f"notice: {notice}")
    sys.stdout.flush()


def _promise(plan: "Plan") -> str:
    """What the run claims about privacy, with the noise where the plan alone decides it."""
    from fedkola.privacy.record_dp import RecordDP
    from fedkola.server import guard

    summed = "secure sum" if plan.privacy.secure_sum else "no secure sum"
    held = guard(plan)
    if held is None:
        return f"{summed}, epsilon inf: this run makes no formal privacy claim"
    sigma = held.sigma if isinstance(held, RecordDP) else held.noise
    noise = f"noise {sigma:.3g} times the bound" if sigma else "noise found by each site"
    return (
        f"{summed}, epsilon {held.epsilon:g} at delta {held.delta:g} for one {held.unit}, whoever "
        f"looks: {noise}"
    )


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
    stdout().print(table)


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
