"""What a run folder holds: its bank as last committed, read without data or model."""

import shlex
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedkola.cli.text import print_table
from fedkola.errors import KnowledgeError, UnknownCell

if TYPE_CHECKING:
    from fedkola.algorithms.fedkola import State
    from fedkola.ledger import EventRow, Ledger, RunRow

WAITS = "waits at its sites: too few of them, or too few records; asked again every round"


@dataclass(frozen=True, slots=True, kw_only=True)
class Opened:
    """The last state of a bank and its verified history, read without data or model."""

    run: "RunRow"
    state: "State"
    events: "tuple[EventRow, ...]"
    removals: tuple[Mapping[str, Any], ...]
    chain_head: str
    cold_bytes: int


def features(folder: Path) -> Path:
    """Where the frozen embeddings of a run are kept, so that resuming need not compute them."""
    return folder / "features"


@contextmanager
def open_bank(folder: Path) -> Iterator[Opened]:
    """Raises KnowledgeError for a run without a bank, UnknownCell before its first round."""
    from fedkola.ledger import Ledger

    with Ledger.open(folder) as ledger:
        yield _read(ledger, folder)


def listing(opened: Opened) -> dict[str, Any]:
    """What ``bank ls --json`` prints."""
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


def print_cells(document: Mapping[str, Any]) -> None:
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
    print_table(
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


def print_parked(parked: Mapping[str, int]) -> None:
    """One line for each scope whose records wait."""
    for scope, records in parked.items():
        print(f"parked: {scope}: {records} records; {WAITS}")


def _read(ledger: "Ledger", folder: Path) -> Opened:
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
