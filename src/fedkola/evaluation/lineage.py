"""What a bank's record says to a person: where knowledge comes from, and what was known when.

Everything here reads the ledger's events and the metadata of the last state, never data, a model
or the integers of a cell, so it answers at once and also where a cell was archived or purged.
"""

from collections.abc import Iterable, Mapping, Sequence
from datetime import UTC, datetime
from typing import Any

from fedkola.errors import PlanError, UnknownCell
from fedkola.knowledge import bank as banks
from fedkola.knowledge.bank import Bank, ModuleState
from fedkola.ledger import EventRow

CLOSED = (ModuleState.SUPERSEDED.value, ModuleState.RETIRED.value)
EXPECTED = ("OPEN", "SEAL", "LABEL", "RATE")  # what every round brings; other events are changes


def log(
    events: Sequence[EventRow], *, kinds: Iterable[str] = (), since: int = 0, subject: str = ""
) -> list[dict[str, Any]]:
    """Events in order, each with a sentence; of these kinds, rounds and subjects."""
    wanted = {kind.upper() for kind in kinds}
    known = {event.kind for event in events}
    if wanted - known:
        raise UnknownCell(
            f"no event of kind {', '.join(sorted(wanted - known))}; this run has "
            f"{', '.join(sorted(known)) or 'none'}"
        )
    return [
        {
            "seq": event.seq,
            "round": event.round,
            "at": moment(event.at),
            "kind": event.kind,
            "subject": event.subject,
            "what": sentence(event.kind, event.body),
        }
        for event in events
        if (not wanted or event.kind in wanted)
        and event.round >= since
        and (not subject or subject in _subjects(event))
    ]


def sentence(kind: str, body: Mapping[str, Any]) -> str:
    """One event in words."""
    if kind == "OPEN":
        earlier = f", to supersede {body['supersedes']}" if body.get("supersedes") else ""
        slot = "" if body["slot"] is None else f" in slot {body['slot']}"
        return f"{body['scope']} opened as version {body['version']}{slot}{earlier}"
    if kind in ("SUPERSEDE", "RETIRE"):
        word = "superseded" if kind == "SUPERSEDE" else "retired"
        return f"{word}; it holds until {body['valid_to']:g} and answers as of earlier times"
    if kind == "COMPACT":
        return "its LoRA cells answer from a fused adapter now"
    if kind == "LABEL":
        if body["valid_to"] is None:
            return f"open from {body['valid_from']:g} in {body['module']}"
        heirs = ", ".join(body["replaced_by"]) or "nothing"
        return f"closed at {body['valid_to']:g}, replaced by {heirs}"
    if kind in ("SEAL", "SUM", "WITHDRAW", "RATE", "REVOKE", "ARCHIVE", "RESTORE", "PURGE"):
        about = f"{body['module']} ({body['kind']}), {body['records']} records"
        by = f" of {body['contributors']} sites"
        return {
            "SEAL": f"{about}{by}, {len(body['labels'])} labels",
            "SUM": f"{about}: {len(body.get('sources', ()))} cells added up, exactly",
            "WITHDRAW": f"{about}{by} left after a removal or a revision",
            "RATE": f"{about}: quality {body.get('quality')}",
            "REVOKE": f"{about} left, too few to stay open",
            "ARCHIVE": f"{about} to cold storage",
            "RESTORE": f"{about} back from cold storage",
            "PURGE": f"{about}: deleted from cold storage",
        }[kind]
    if kind == "FUSE":
        error = f"{body['error']:.2%}"
        return f"{len(body['modules'])} modules in one adapter, relative error {error}"
    if kind == "PARK":
        return f"{body['records']} records wait at their sites"
    if kind == "FORGET":
        where = f" at {body['site']}" if body.get("site") else ""
        return f"{body.get('kind')}{where}: {body.get('records')} records removed"
    if kind == "REVISE":
        return f"records of round {body['round']} arrived anew; their old versions were taken back"
    if kind == "MISFIT":
        return f"{body['windows']} windows do not fit what is declared; their sites were told"
    if kind == "DOUBT":
        return "sites disagree with this label more often than not"
    plain = {"SPLIT": "taken apart", "DISSOLVE": "dissolved; its cells answer themselves again"}
    return plain.get(kind, ", ".join(sorted(body)))


def lineage(bank: Bank, events: Sequence[EventRow], name: str) -> dict[str, Any]:
    """Where the knowledge of one scope comes from: its versions, their cells, and what became of
    each. ``name`` is a scope or a module of it; raises UnknownCell."""
    chosen = [module for module in bank.modules if name in (module.id, module.scope)]
    if not chosen:
        known = ", ".join(dict.fromkeys(module.scope for module in bank.modules)) or "none"
        raise UnknownCell(f"no scope or module {name!r}; this bank has {known}")
    metadata = banks.metadata(bank)
    every = [*metadata["cells"].values(), *metadata["cold"].values(), *metadata["revoked"].values()]
    home = {part: cell["id"] for cell in every for part in cell["sources"]}
    home |= {cell: fused.id for fused in bank.fused for cell in fused.cells}
    heirs = {module.supersedes: module.id for module in bank.modules if module.supersedes}
    versions = []
    for module in bank.modules:
        if module.scope != chosen[0].scope:
            continue
        cells = [
            {
                "id": cell["id"],
                "kind": cell["kind"],
                "round": cell["round"],
                "records": cell["records"],
                "sites": cell["contributors"],
                "status": cell["status"],
                "inside": home.get(cell["id"], ""),
                "sealed": _at(events, "SEAL", cell["id"]),
            }
            for cell in every
            if cell["module"] == module.id and not cell["sources"]
        ]
        versions.append(
            {
                **metadata["modules"][module.id],
                "superseded_by": heirs.get(module.id, "") if module.closed is not None else "",
                "opened_at": _at(events, "OPEN", module.id),
                "records": _records(cells),
                "labels": sum(entry.module == module.id for entry in bank.labels),
                "cells": sorted(cells, key=lambda cell: (cell["round"], cell["kind"])),
            }
        )
    return {"scope": chosen[0].scope, "versions": versions}


def chronicle(bank: Bank, events: Sequence[EventRow]) -> dict[str, Any]:
    """The lineage of every scope in one list, oldest scope first, and what changed later.

    A version has ``marks``, (round, "sealed" or "changed") of its cells. ``changes`` are the events
    that not every round brings, each with a sentence; those of a module's lanes are one.
    """
    marks: dict[str, list[tuple[int, str]]] = {}
    for event in events:
        if event.kind != "RATE" and event.body.get("kind") and event.body.get("module"):
            kind = "sealed" if event.kind == "SEAL" else "changed"
            found = marks.setdefault(str(event.body["module"]), [])
            if (event.round, kind) not in found:
                found.append((event.round, kind))
    versions = [
        {**version, "marks": marks.get(version["id"], [])}
        for scope in dict.fromkeys(module.scope for module in bank.modules)
        for version in lineage(bank, events, scope)["versions"]
    ]
    grouped: dict[tuple[int, str, str], list[EventRow]] = {}
    for event in events:
        closing = event.kind == "LABEL" and event.body["valid_to"] is not None
        module = "" if closing else str(event.body.get("module", ""))
        if (event.kind not in EXPECTED or closing) and module != banks.POOL:
            grouped.setdefault((event.round, event.kind, module or event.subject), []).append(event)
    changes = []
    for (number, kind, about), alike in grouped.items():
        body = dict(alike[0].body)
        if about == body.get("module") and kind != "LABEL":
            body["kind"] = ", ".join(dict.fromkeys(str(e.body.get("kind", "")) for e in alike))
            body["records"] = max(e.body.get("records", 0) for e in alike)
        changes.append({"round": number, "about": about, "what": sentence(kind, body)})
    return {"versions": versions, "changes": changes}


def as_of(
    events: Sequence[EventRow], *, round: int | None = None, date: str = ""
) -> dict[str, Any]:
    """What the bank's record said after a round, or at a date (ISO 8601, UTC unless it says else).

    A date without a time means its end. Raises PlanError unless exactly one is given and the bank
    had begun by then.
    """
    if (round is None) == (not date):
        raise PlanError("give a round or a date to look back to, for example --round 3")
    if round is not None:
        then = [event for event in events if event.round <= round]
        when = f"after round {round}"
    else:
        limit = _limit(date)
        then = [event for event in events if event.at <= limit]
        when = f"at {date}"
    if not then:
        first = f"; its first event is {moment(events[0].at)}" if events else ""
        raise PlanError(f"this bank knew nothing {when}{first}")
    record = banks.fold((event.kind, event.subject, event.body) for event in then)
    cells = [*record["cells"].values(), *record["cold"].values()]
    sealed = [cell for cell in cells if not cell["sources"]]
    now = max(event.round for event in then)
    modules = []
    for module in record["modules"].values():
        mine = [cell for cell in sealed if cell["module"] == module["id"]]
        entries = [e for e in record["labels"].values() if e["module"] == module["id"]]
        modules.append(
            {
                **module,
                "labels": sum(e["valid_to"] is None or e["valid_to"] > now for e in entries),
                "retired_labels": sum(
                    e["valid_to"] is not None and e["valid_to"] <= now for e in entries
                ),
                "cells": len(mine),
                "records": _records(mine),
            }
        )
    return {
        "when": when,
        "round": now,
        "events": len(then),
        "last_event": moment(then[-1].at),
        "chain_head": then[-1].hash,
        "modules": modules,
        "removals_since": sum(e.kind == "FORGET" for e in events)
        - sum(e.kind == "FORGET" for e in then),
    }


def labels(
    bank: Bank, *, scope: str = "", now: float = float("inf"), closed: bool = False
) -> list[dict[str, Any]]:
    """The label registry, in the order in which labels were opened.

    Of one scope if given; only those that were retired or replaced if ``closed``. ``records`` are
    those in live cells. Raises UnknownCell for an unknown scope.
    """
    modules = {module.id: module.scope for module in bank.modules}
    if scope and scope not in modules.values():
        raise UnknownCell(f"no scope {scope!r}; this bank has {', '.join(modules.values())}")
    counted = banks.label_records(bank)
    return [
        {
            "code": entry.code,
            "scope": modules.get(entry.module, entry.module),
            "valid_from": entry.valid_from,
            "valid_to": entry.valid_to,
            "replaced_by": list(entry.replaced_by),
            "open": entry.valid_to is None or entry.valid_to > now,
            "records": counted.get(entry.code, 0),
        }
        for entry in bank.labels
        if (not scope or modules.get(entry.module) == scope)
        and (not closed or entry.valid_to is not None)
    ]


def moment(at: float) -> str:
    """Seconds since 1970 as UTC, to the second."""
    return datetime.fromtimestamp(at, UTC).strftime("%Y-%m-%d %H:%M:%S")


def _limit(date: str) -> float:
    try:
        found = datetime.fromisoformat(date)
    except ValueError as error:
        raise PlanError(
            f"date {date!r} is not ISO 8601; give 2026-11-22 or 2026-11-22T14:00"
        ) from error
    if len(date) == len("2026-11-22"):
        found = found.replace(hour=23, minute=59, second=59, microsecond=999999)
    return (found if found.tzinfo else found.replace(tzinfo=UTC)).timestamp()


def _records(cells: Sequence[Mapping[str, Any]]) -> int:
    """Records behind cells: lanes sum the same ones, so the lane with most of them counts."""
    by_kind: dict[str, int] = {}
    for cell in cells:
        if cell.get("status") != "revoked":
            by_kind[cell["kind"]] = by_kind.get(cell["kind"], 0) + cell["records"]
    return max(by_kind.values(), default=0)


def _subjects(event: EventRow) -> tuple[str, ...]:
    module = str(event.body.get("module", ""))
    return (event.subject, module, module.rsplit("@", 1)[0], str(event.body.get("scope", "")))


def _at(events: Sequence[EventRow], kind: str, subject: str) -> str:
    return next((moment(e.at) for e in events if (e.kind, e.subject) == (kind, subject)), "")
