"""What a site keeps of scans: checked labels, targets between two exchanges, findings, decisions.

All of it lies in the site's private folder and never leaves it. ``checked.json`` maps a record to
the label that a person found right; ``decisions.json`` maps a record to what its owner decided.
"""

import json
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path

import safetensors.torch
import torch
from torch import Tensor

from fedkola.errors import DataError
from fedkola.files import write_private
from fedkola.types import Dataset

FOLDER = "quality"
CHECKED = "checked.json"
DECISIONS = "decisions.json"
FINDINGS = "findings.json"
LEFT_OUT = "left-out.json"
KEEP = "keep"
DECIDED = (KEEP, "exclude")


def checked(store: Path) -> dict[str, str]:
    """record -> the label that a person found right; empty where nobody looked."""
    return _texts(store / FOLDER / CHECKED)


def check(store: Path, labels: Mapping[str, str]) -> None:
    """Note the right labels of records that a person has looked at; later ones replace earlier."""
    _write(store / FOLDER / CHECKED, checked(store) | dict(labels))


def decisions(store: Path) -> dict[str, str]:
    """record -> "keep" or "exclude", as its owner decided."""
    return _texts(store / FOLDER / DECISIONS)


def decide(store: Path, records: Collection[str], decision: str) -> None:
    """Note what the owner decided on these records; "" takes a decision back."""
    if decision not in ("", *DECIDED):
        raise DataError(f"{decision!r} is no decision; give one of {', '.join(DECIDED)}")
    now = decisions(store)
    for record in records:
        now.pop(record, None)
        if decision:
            now[record] = decision
    _write(store / FOLDER / DECISIONS, now)


def left_out(store: Path) -> frozenset[str]:
    """Records that nothing is learnt from: those of the last scan, as the owner has it."""
    path = store / FOLDER / LEFT_OUT
    chosen = set(json.loads(path.read_text())) if path.exists() else set()
    for record, decision in decisions(store).items():
        (chosen.discard if decision == KEEP else chosen.add)(record)
    return frozenset(chosen)


def learnable(store: Path, data: Dataset) -> Dataset:
    """``data`` without what is left out."""
    gone = left_out(store)
    if not gone:
        return data
    return data.take([i for i, record in enumerate(data.records) if record not in gone])


def leave_out(store: Path, records: Collection[str]) -> None:
    """Replace what the last scan left out; an empty list undoes it."""
    _write(store / FOLDER / LEFT_OUT, sorted(records))


def findings(store: Path) -> dict[str, object]:
    """The findings of the last scan as a document, {} before the first one."""
    path = store / FOLDER / FINDINGS
    found: dict[str, object] = json.loads(path.read_text()) if path.exists() else {}
    return found


def keep_findings(store: Path, document: Mapping[str, object]) -> None:
    _write(store / FOLDER / FINDINGS, dict(document))


def keep_targets(store: Path, name: str, records: Sequence[str], targets: Tensor) -> None:
    """What records (n, C) are summed with, for the next exchange of the same scan."""
    _keep(store / FOLDER / f"{name}.targets", records, targets.to(torch.uint8))


def keep_scores(store: Path, name: str, records: Sequence[str], scores: Tensor) -> None:
    """How far the labels of records (n,) are believed, for the next exchange of the same scan."""
    _keep(store / FOLDER / f"{name}.scores", records, scores)


def targets(store: Path, name: str, records: Sequence[str]) -> Tensor:
    """What ``keep_targets`` kept, int64; raises DataError if the site's records have changed
    since, as a scan is of one moment."""
    return _kept(store / FOLDER / f"{name}.targets", records).to(torch.int64)


def scores(store: Path, name: str, records: Sequence[str]) -> Tensor:
    """What ``keep_scores`` kept; raises what ``targets`` does."""
    return _kept(store / FOLDER / f"{name}.scores", records)


def drop_targets(store: Path) -> None:
    """Delete what a finished scan needed between its exchanges."""
    for path in (store / FOLDER).glob("scan-*"):
        path.unlink()


def _keep(path: Path, records: Sequence[str], values: Tensor) -> None:
    about = {"records": json.dumps(list(records))}
    content = safetensors.torch.save({"values": values.contiguous()}, metadata=about)
    write_private(path, content, durable=False)


def _kept(path: Path, records: Sequence[str]) -> Tensor:
    if not path.exists():
        raise DataError(f"this site has no part {path.stem} of the scan; start the scan anew")
    with safetensors.safe_open(path, framework="pt") as file:
        of = json.loads(file.metadata()["records"])
        found: Tensor = file.get_tensor("values")
    if of != list(records):
        raise DataError("this site's records changed during the scan; start the scan anew")
    return found


def _texts(path: Path) -> dict[str, str]:
    if not path.exists():
        return {}
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise DataError(f"{path} is no JSON ({error}); restore or delete it") from error
    if not isinstance(found, dict) or not all(isinstance(v, str) for v in found.values()):
        raise DataError(f"{path} is no table of text by record; restore or delete it")
    return found


def _write(path: Path, document: object) -> None:
    write_private(path, json.dumps(document, indent=1, sort_keys=True).encode())
