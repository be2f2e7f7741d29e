"""A site's private record of what it added to which cell: the contract that removal rests on.

One entry per (round, scope): record ids, patient pseudonyms, label codes and the integer
embeddings exactly as they were summed. Removal subtracts the stored z, never a recomputation, as
another batch shape may round differently. Entries are written atomically; nothing here is ever
sent.
"""

import hashlib
import json
import os
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from fedkola.errors import DataError, StaleUpdate
from fedkola.types import Dataset


@dataclass(frozen=True, slots=True, kw_only=True)
class Entry:
    """What one site put into the cells of one scope in one round. ``z`` is int16 (n, d)."""

    round: int
    scope: str
    records: tuple[str, ...]
    patients: tuple[str, ...]
    labels: tuple[str, ...]
    z: Tensor

    def __len__(self) -> int:
        return len(self.records)


def write(store: Path, entry: Entry) -> None:
    """Keep an entry; the same round and scope again replaces it."""
    folder = store / "journal"
    folder.mkdir(parents=True, exist_ok=True)
    path = _path(store, entry.round, entry.scope)
    about = {
        "round": str(entry.round),
        "scope": entry.scope,
        "records": json.dumps(entry.records),
        "patients": json.dumps(entry.patients),
        "labels": json.dumps(entry.labels),
    }
    draft = path.with_suffix(".tmp")
    save_file({"z": entry.z.contiguous()}, draft, metadata=about)
    settle(draft, path)


def settle(draft: Path, path: Path) -> None:
    """Give a finished draft its name so that both survive a power cut: flush, rename, flush."""
    for flushed, rename in ((draft, True), (path.parent, False)):
        handle = os.open(flushed, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
        if rename:
            os.replace(draft, path)


def read(store: Path, round: int, scope: str) -> Entry | None:
    """The entry of this round and scope, None if the site added nothing."""
    path = _path(store, round, scope)
    return _load(path) if path.exists() else None


def entries(store: Path) -> tuple[Entry, ...]:
    """All entries, in order of round and scope."""
    return tuple(_load(path) for path in sorted((store / "journal").glob("*.safetensors")))


def join(found: Sequence[Entry]) -> Entry | None:
    """The records of several entries as one, in the place of the first; None if there are none."""
    full = [entry for entry in found if len(entry)]
    if not full:
        return None
    return Entry(
        round=full[0].round,
        scope=full[0].scope,
        records=tuple(record for entry in full for record in entry.records),
        patients=tuple(patient for entry in full for patient in entry.patients),
        labels=tuple(label for entry in full for label in entry.labels),
        z=torch.cat([entry.z for entry in full]),
    )


def used(store: Path, *, before: int) -> frozenset[str]:
    """Ids of the records that were summed in rounds before this one."""
    found: set[str] = set()
    for path in sorted((store / "journal").glob("*.safetensors")):
        if int(path.name.split("-", 1)[0]) < before:
            found.update(json.loads(_about(path)["records"]))
    return frozenset(found)


def pending(store: Path, data: Dataset, *, round: int) -> Dataset:
    """Records that have arrived and were in no earlier round: new ones, parked ones, late ones."""
    done = used(store, before=round)
    return data.take([i for i, record in enumerate(data.records) if record not in done])


def reconcile(store: Path, sealed: Collection[tuple[int, str]], *, round: int) -> None:
    """Drop entries of this round and earlier whose (round, scope) no sealed cell holds.

    They were written for sums that never came about, as when another site vanished in the middle
    of a round; their records are free to be contributed again. Raises StaleUpdate if the site has
    gone on to a later round: its newer entries would be judged by an older list.
    """
    written = {}
    for path in (store / "journal").glob("*.safetensors"):
        about = _about(path)
        written[path] = (int(about["round"]), about["scope"])
    newest = max((number for number, _ in written.values()), default=0)
    if newest > round:
        raise StaleUpdate(f"this site has journalled round {newest}, the question is of {round}")
    for path, place in written.items():
        if place not in sealed:
            path.unlink()


def keep(entry: Entry, *, without: Collection[str]) -> Entry:
    """The entry without these records."""
    rows = [i for i, record in enumerate(entry.records) if record not in without]
    return _rows(entry, rows)


def only(entry: Entry, *, records: Collection[str]) -> Entry:
    """The part of the entry that holds these records."""
    rows = [i for i, record in enumerate(entry.records) if record in records]
    return _rows(entry, rows)


def delete(store: Path, *, records: Collection[str]) -> None:
    """Drop records from every entry; the last step of a removal."""
    for path in sorted((store / "journal").glob("*.safetensors")):
        entry = _load(path)
        rest = keep(entry, without=records)
        if len(rest) == 0:
            path.unlink()
        elif len(rest) < len(entry):
            write(store, rest)


def _rows(entry: Entry, rows: Sequence[int]) -> Entry:
    return Entry(
        round=entry.round,
        scope=entry.scope,
        records=tuple(entry.records[i] for i in rows),
        patients=tuple(entry.patients[i] for i in rows),
        labels=tuple(entry.labels[i] for i in rows),
        z=entry.z[torch.tensor(rows, dtype=torch.int64)],
    )


def _path(store: Path, round: int, scope: str) -> Path:
    name = hashlib.sha256(scope.encode()).hexdigest()[:16]
    return store / "journal" / f"{round:06d}-{name}.safetensors"


def _about(path: Path) -> dict[str, str]:
    try:
        with safe_open(path, framework="pt") as file:
            return dict(file.metadata())
    except (SafetensorError, OSError) as error:
        raise DataError(
            f"journal entry {path.name} cannot be read ({error}); restore it from a backup, "
            "removal of these records depends on it"
        ) from error


def _load(path: Path) -> Entry:
    about = _about(path)
    with safe_open(path, framework="pt") as file:
        z = file.get_tensor("z")
    return Entry(
        round=int(about["round"]),
        scope=about["scope"],
        records=tuple(json.loads(about["records"])),
        patients=tuple(json.loads(about["patients"])),
        labels=tuple(json.loads(about["labels"])),
        z=z,
    )
