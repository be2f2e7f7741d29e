"""The verbs ``fedkola audit``, which attacks what a run recorded, and ``fedkola release``, which
lets a model leave if an audit allows it."""

import shlex
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from fedkola.cli.opened import features
from fedkola.cli.rounds import drawn, resumable
from fedkola.cli.text import AsJson, examples, print_json, print_table
from fedkola.errors import PlanError

app = typer.Typer()


@app.command(
    epilog=examples(
        "fedkola audit runs/small",
        "fedkola audit runs/small --observer server --observer site:north",
        "fedkola audit runs/small --observer coalition:north,south --profile standard",
        "fedkola audit --rehearse plan.toml",
    )
)
def audit(
    folder: Annotated[
        Path | None, typer.Argument(metavar="[RUN]", help="Folder of a recorded run.")
    ] = None,
    observer: Annotated[
        list[str] | None,
        typer.Option(
            help="Who looks: wire, server, tls, site:NAME, coalition:A,B or model; repeatable."
        ),
    ] = None,
    rehearse: Annotated[
        Path | None,
        typer.Option(help="Run this plan first, recorded, and audit it; its records are shown."),
    ] = None,
    attack: Annotated[
        list[str] | None, typer.Option(help="Only this attack; repeatable. Default: all.")
    ] = None,
    texts: Annotated[
        Path | None,
        typer.Option(help="The attacker's own public text, one a line. Default: test records."),
    ] = None,
    profile: Annotated[str, typer.Option(help="Size: quick or standard.")] = "quick",
    as_json: AsJson = False,
) -> None:
    """Attack the recorded bytes of a run, and say what an adversary got from them.

    Writes audit.json and audit.html into the run folder. True text is shown
    only if the plan declares the records public, or in a rehearsal. A run is
    recorded if its plan says audit.record = true.
    """
    if (folder is None) == (rehearse is None):
        given = "neither" if folder is None else "both"
        raise PlanError(
            f"a run folder or --rehearse PLAN is needed, {given} was given; "
            "try `fedkola audit runs/NAME` or `fedkola audit --rehearse plan.toml`"
        )
    from fedkola.evaluation import auditing
    from fedkola.evaluation import session as sessions

    own = _lines(texts)
    again = "fedkola audit " + shlex.quote(str(folder or f"--rehearse {rehearse}"))
    with resumable(None, again), drawn("audit") as (note, progress):
        if rehearse is not None:
            folder = auditing.rehearse(rehearse, note=note, progress=progress)
        assert folder is not None
        session = sessions.resume(folder, cache=features(folder))
        with session.ledger:
            document = auditing.audit(
                session,
                observers=observer or (),
                profile=profile,
                attacks=attack or (),
                texts=own,
                public=rehearse is not None,
                note=note,
            )
    if as_json:
        print_json({"folder": str(folder), **document})
        return
    _print(document)
    print(f"report: {folder / 'audit.html'}")
    print(f"numbers: {folder / 'audit.json'}")


@app.command(
    epilog=examples(
        "fedkola release runs/private --to models/private",
        "fedkola release --verify models/private --key 1f0c...",
    )
)
def release(
    folder: Annotated[
        Path | None, typer.Argument(metavar="[RUN]", help="Folder of an audited run.")
    ] = None,
    to: Annotated[Path | None, typer.Option(help="New folder for the model.")] = None,
    verify: Annotated[
        Path | None, typer.Option(help="Check the files of a released folder instead.")
    ] = None,
    key: Annotated[str, typer.Option(help="With --verify: public key of the signer, in hex.")] = "",
    as_json: AsJson = False,
) -> None:
    """Let a pre-trained model leave with a signed certificate, or say what holds it back.

    Reads the audit.json of the run; its findings, its age and the run's
    epsilon must be within [release] of the plan. What is refused is not
    written. The release becomes an event of the ledger.
    """
    if (verify is None) == (folder is None or to is None):
        raise PlanError(
            "a run folder with --to, or --verify alone, is needed; try `fedkola release runs/NAME "
            "--to models/NAME` or `fedkola release --verify models/NAME`"
        )
    from fedkola.audit import release as gate
    from fedkola.evaluation import auditing
    from fedkola.evaluation import session as sessions

    if verify is not None:
        found = gate.checked(verify, key=key)
    else:
        assert folder is not None
        assert to is not None
        session = sessions.resume(folder, cache=features(folder))
        with session.ledger:
            document = auditing.read(session.folder)
            found = sessions.release(session, to, document, now=time.time())
    if as_json:
        print_json(found)
        return
    epsilon = found["epsilon"]
    print(f"{'holds' if verify else 'released'}: run {found['run']}, round {found['round']}")
    print(f"epsilon: {'no bound is claimed' if epsilon is None else f'{epsilon:g}'}")
    for name, word in found["verdicts"].items():
        print(f"{name}: {word}")
    print(f"signed by: {found['key']}")


def _lines(path: Path | None) -> list[str]:
    if path is None:
        return []
    try:
        found = [line.strip() for line in path.read_text("utf-8").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise PlanError(
            f"--texts {path} cannot be read ({error}); give a UTF-8 file with one text a line"
        ) from error
    if not found:
        raise PlanError(f"--texts {path} holds no text; give one text a line")
    return found


def _print(document: Mapping[str, Any]) -> None:
    rows = []
    for attack in document["attacks"]:
        name = next(iter(attack["leading"]), "")
        value = attack["metrics"].get(name, {})
        score = f"{value['value']:.3f} ({value['low']:.3f}-{value['high']:.3f})" if value else "-"
        null = f"{value['null']:.3f}" if "null" in value else "-"
        control = attack["positive_control"]
        rows.append(
            (
                attack["observer"],
                attack["name"],
                attack["target"],
                f"{name} {score}",
                null,
                f"{control['value']:.2f}" + ("" if control["passed"] else " failed"),
                attack["verdict"],
            )
        )
    columns = ("observer", "attack", "target", "score", "null", "control", "verdict")
    if rows:
        print_table(f"audit of {document['run']}", columns, rows, right=("null", "control"))
    for one in document["not_run"]:
        print(f"not run: {one['name']} on {one['target']}, as {one['observer']}: {one['reason']}")
    for name, word in document["verdicts"].items():
        print(f"{name}: {word}")
