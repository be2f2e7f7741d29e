"""The verbs of ``fedkola bank`` that remove knowledge and prove it: forget, verify."""

import json
import shutil
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table

from fedkola.cli.opened import features
from fedkola.cli.text import AsJson, Folder, examples, print_json, stdout
from fedkola.errors import KnowledgeError, PlanError

if TYPE_CHECKING:
    from fedkola.knowledge.forget import Foreseen, ForgetReceipt

app = typer.Typer()


@app.command(
    "forget",
    epilog=examples(
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
    from fedkola import removal
    from fedkola.evaluation import session as sessions
    from fedkola.knowledge import forget

    request = forget.Request(kind=kind, site=site, name=name)
    session = sessions.resume(folder, cache=features(folder))
    with session.ledger:
        if foresee:
            steps = removal.foresee(session.federation, session.ledger, request)
            _print_steps(steps, as_json=as_json)
            return
        found = sessions.forget(session, request, recount=recount, now=now, absent=absent)
    # The cache does not know whose embeddings it holds, so none of them may stay.
    shutil.rmtree(features(folder), ignore_errors=True)
    if as_json:
        waits = isinstance(found, forget.Waiting)
        print_json({"waits": waits, **asdict(found)})
    elif isinstance(found, forget.Waiting):
        print(
            f"request {found.request}: accepted in round {found.since}, not carried out yet; it "
            f"waits for {found.lacking} more sites that take something back from the same cells, "
            f"or for round {found.until}; --now does not wait"
        )
    else:
        _print_receipt(found)


@app.command(
    "verify",
    epilog=examples(
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

    session = sessions.resume(folder, cache=features(folder))
    with session.ledger:
        if Path(name).is_file():
            receipt = forget.receipt_from(_json_file(Path(name)))
        else:
            receipt = receipts.find(session.ledger, session.plan.run.name, name)
        found = sessions.verify(session, receipt)
    broken = [finding for finding in found if not finding.holds]
    if as_json:
        findings = [asdict(finding) for finding in found]
        print_json({"request": receipt.request, "holds": not broken, "findings": findings})
    else:
        for finding in found:
            print(f"{'ok' if finding.holds else 'FAIL':<5} {finding.what}: {finding.how}")
    if broken:
        raise typer.Exit(KnowledgeError.exit_code)


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
        print_json({"cells": [asdict(step) for step in steps], "bytes_up": total})
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
    stdout().print(table)
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
