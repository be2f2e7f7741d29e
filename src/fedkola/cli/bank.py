"""The group ``fedkola bank`` and its verbs that look and change nothing."""

import json
from collections.abc import Mapping
from typing import Annotated, Any

import typer

from fedkola.cli.opened import Opened, listing, open_bank, print_cells, print_parked
from fedkola.cli.text import AsJson, Folder, examples, plain, print_json, print_table
from fedkola.errors import UnknownCell

app = typer.Typer(
    help="Look into the knowledge bank of a run, make it forget, export it.", no_args_is_help=True
)


@app.command("ls", epilog=examples("fedkola bank ls runs/demo", "fedkola bank ls runs/demo --json"))
def bank_ls(folder: Folder, as_json: AsJson = False) -> None:
    """List the modules of the bank, what waits at the sites, and what was forgotten.

    Single cells are in bank lineage. The chain of events and the hashes of all
    tensors are verified on the way.
    """
    with open_bank(folder) as opened:
        document = listing(opened)
    if as_json:
        print_json(document)
        return
    print_cells(document)
    print_parked(document["parked"])
    for removal in document["removals"]:
        print(
            f"forgotten: {removal['kind']} at {removal['site']}, {removal['records']} records, "
            f"receipt {removal['request']}"
        )
    print(f"chain of {document['events']} events verified, head {document['chain_head'][:16]}")


@app.command(
    "show",
    epilog=examples(
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
    with open_bank(folder) as opened:
        document = _shown(opened, name)
    if as_json:
        print_json(document)
        return
    for key, value in document.items():
        if key == "history":
            for event in value:
                print(f"round {event['round']}: {event['kind']} {event['subject']}")
        else:
            print(f"{key}: {value if isinstance(value, str) else json.dumps(plain(value))}")


@app.command(
    "lineage",
    epilog=examples(
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

    with open_bank(folder) as opened:
        document = lineage.lineage(opened.state.bank, opened.events, name)
    if as_json:
        print_json(document)
        return
    _print_lineage(document)


@app.command(
    "asof",
    epilog=examples(
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

    with open_bank(folder) as opened:
        document = lineage.as_of(opened.events, round=round, date=date)
    if as_json:
        print_json(document)
        return
    _print_asof(document)


@app.command(
    "labels",
    epilog=examples(
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

    with open_bank(folder) as opened:
        now = opened.state.number
        rows = lineage.labels(opened.state.bank, scope=scope, now=now, closed=closed)
    if as_json:
        print_json({"labels": rows})
        return
    ended = sum(not row["open"] for row in rows)
    print_table(
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


@app.command(
    "log",
    epilog=examples(
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

    with open_bank(folder) as opened:
        rows = lineage.log(opened.events, kinds=kind or (), since=since, subject=about)
        head = opened.chain_head
    if as_json:
        print_json({"events": rows, "chain_head": head})
        return
    print_table(
        f"{len(rows)} events, chain verified, head {head[:16]}",
        ("no.", "round", "when (UTC)", "event", "about", "what"),
        [
            (str(r["seq"]), str(r["round"]), r["at"], r["kind"], r["subject"], r["what"])
            for r in rows
        ],
        right=("no.", "round"),
    )


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
        print_table(
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
    print_table(
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
