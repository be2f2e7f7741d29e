"""Banks as events: the difference of two, and their replay to the same metadata."""

from collections.abc import Iterable, Mapping
from dataclasses import asdict, replace
from enum import Enum
from typing import Any

from fedkola.knowledge.bank.cells import Bank, FusedAdapter, KnowledgeCell, ModuleState, Status
from fedkola.types import Event


def events(before: Bank, after: Bank) -> tuple[Event, ...]:
    """The knowledge events that lead from one bank to the other, in ledger form."""
    found: list[Event] = []
    held = {module.id: module for module in before.modules}
    for module in after.modules:
        known = held.get(module.id)
        if known != module:
            closed = known is None or known.state is not module.state
            kind = _CLOSINGS.get(module.state, "OPEN") if closed else "OPEN"
            found.append(_event(kind, module.id, asdict(module)))
    old_labels = {entry.code: entry for entry in before.labels}
    for entry in after.labels:
        if old_labels.get(entry.code) != entry:
            found.append(_event("LABEL", entry.code, asdict(entry)))
    old_cells, new_cells = _every_cell(before), _every_cell(after)
    for name, about in new_cells.items():
        if old_cells.get(name) != about:
            found.append(_event(_change(old_cells.get(name), about), name, asdict(about)))
    found += [_event("SPLIT", name, {}) for name in old_cells if name not in new_cells]
    old_fused = {each.id: _fused_document(each) for each in before.fused}
    new_fused = {each.id: _fused_document(each) for each in after.fused}
    for name, document in new_fused.items():
        if old_fused.get(name) != document:
            found.append(_event("FUSE", name, document))
    found += [_event("DISSOLVE", name, {}) for name in old_fused if name not in new_fused]
    return tuple(found)


def fold(history: Iterable[tuple[str, str, Mapping[str, Any]]]) -> dict[str, dict[str, Any]]:
    """Replay (kind, subject, body) to the bank's metadata, as ``metadata`` gives it."""
    modules: dict[str, Any] = {}
    labels: dict[str, Any] = {}
    cells: dict[str, Any] = {}
    fused: dict[str, Any] = {}
    for kind, subject, body in history:
        if kind in ("OPEN", *_CLOSINGS.values()):
            modules[subject] = body
        elif kind == "LABEL":
            labels[subject] = body
        elif kind in _CELL_EVENTS:
            cells[subject] = body
        elif kind == "FUSE":
            fused[subject] = body
        elif kind == "SPLIT":
            cells.pop(subject, None)
        elif kind == "DISSOLVE":
            fused.pop(subject, None)
    places: dict[str, dict[str, Any]] = {"cells": {}, "revoked": {}, "cold": {}}
    for subject, body in cells.items():
        places[_PLACES[Status(body["status"])]][subject] = body
    return {"modules": modules, "labels": labels, **places, "fused": fused}


def metadata(bank: Bank) -> dict[str, dict[str, Any]]:
    """What ``fold`` of a bank's own history returns."""
    return {
        "modules": {module.id: _plain(asdict(module)) for module in bank.modules},
        "labels": {entry.code: _plain(asdict(entry)) for entry in bank.labels},
        "cells": {cell.about.id: _plain(asdict(cell.about)) for cell in bank.cells},
        "revoked": {about.id: _plain(asdict(about)) for about in bank.revoked},
        "cold": {about.id: _plain(asdict(about)) for about in bank.cold},
        "fused": {each.id: _plain(_fused_document(each)) for each in bank.fused},
    }


_CLOSINGS = {
    ModuleState.SUPERSEDED: "SUPERSEDE",
    ModuleState.RETIRED: "RETIRE",
    ModuleState.COMPACTED: "COMPACT",
}

_CELL_EVENTS = ("SEAL", "SUM", "WITHDRAW", "RATE", "REVOKE", "ARCHIVE", "RESTORE", "PURGE")
_PLACES = {
    Status.SEALED: "cells",
    Status.REVOKED: "revoked",
    Status.ARCHIVED: "cold",
    Status.PURGED: "cold",
}


def _every_cell(bank: Bank) -> dict[str, KnowledgeCell]:
    return {
        about.id: about for about in (*(c.about for c in bank.cells), *bank.cold, *bank.revoked)
    }


def _change(old: KnowledgeCell | None, new: KnowledgeCell) -> str:
    """The name of the event that made one cell into the other."""
    moved = old is None or old.status is not new.status
    if moved and new.status is not Status.SEALED:
        return {"revoked": "REVOKE", "archived": "ARCHIVE", "purged": "PURGE"}[new.status.value]
    if old is None or new.sources != old.sources:
        return "SUM" if new.sources else "SEAL"
    if moved and old.words == new.words:
        return "RESTORE"
    return "RATE" if replace(old, quality=new.quality) == new else "WITHDRAW"


def _fused_document(fused: FusedAdapter) -> dict[str, Any]:
    """A fused adapter in ledger form: what it stands for, without its factors."""
    return {
        "id": fused.id,
        "modules": fused.modules,
        "shares": fused.shares,
        "cells": fused.cells,
        "slot": fused.slot,
        "round": fused.round,
        "error": fused.error,
    }


def _event(kind: str, subject: str, body: Mapping[str, Any]) -> Event:
    return {"kind": kind, "subject": subject, "body": _plain(body)}


def _plain(value: Any) -> Any:
    if isinstance(value, Enum):
        return value.value
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, tuple | list):
        return [_plain(item) for item in value]
    return value
