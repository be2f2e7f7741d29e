"""A site's private record of what it added to which cell: the contract that removal rests on.

One entry per (round, scope): record ids, patient pseudonyms, label codes, the window of the version
that was summed, and the integer embeddings exactly as they were summed. Removal subtracts the
stored z, never a recomputation, as another batch shape may round differently. Entries are written
atomically; nothing here is ever sent.
"""

import hashlib
import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from fedkola.errors import DataError, StaleUpdate
from fedkola.files import settle, write_private
from fedkola.types import Dataset

REVISION = "revision-"
Place = tuple[int, str]
"""Round and scope: where a cell's records stand in the journals."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Entry:
    """What one site put into the cells of one scope in one round. ``z`` is int16 (n, d)."""

    round: int
    scope: str
    records: tuple[str, ...]
    patients: tuple[str, ...]
    labels: tuple[str, ...]
    windows: tuple[int, ...]
    z: Tensor

    def __len__(self) -> int:
        return len(self.records)


def write(store: Path, entry: Entry) -> None:
    """Keep an entry; the same round and scope again replaces it."""
    folder = store / "journal"
    folder.mkdir(parents=True, exist_ok=True)
    path = path_of(store, entry.round, entry.scope)
    about = {
        "round": str(entry.round),
        "scope": entry.scope,
        "records": json.dumps(entry.records),
        "patients": json.dumps(entry.patients),
        "labels": json.dumps(entry.labels),
        "windows": json.dumps(entry.windows),
    }
    draft = path.with_suffix(".tmp")
    save_file({"z": entry.z.contiguous()}, draft, metadata=about)
    settle(draft, path)


def path_of(store: Path, round: int, scope: str) -> Path:
    """Where the entry of this round and scope is, or would be."""
    name = hashlib.sha256(scope.encode()).hexdigest()[:16]
    return store / "journal" / f"{round:06d}-{name}.safetensors"


def read(store: Path, round: int, scope: str) -> Entry | None:
    """The entry of this round and scope, None if the site added nothing."""
    path = path_of(store, round, scope)
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
        windows=tuple(window for entry in full for window in entry.windows),
        z=torch.cat([entry.z for entry in full]),
    )


def used(store: Path, *, before: int) -> dict[str, int]:
    """Records that were summed in rounds before this one: id -> window of the newest version."""
    found: dict[str, int] = {}
    for about in _abouts(store, before=before):
        for record, window in _versions(about):
            found[record] = max(window, found.get(record, window))
    return found


def pending(store: Path, data: Dataset, *, round: int) -> Dataset:
    """Of the newest versions ``data``, those that were in no earlier round: new ones, parked ones,
    late ones, and those that replace a version that was. A version older than what was summed
    comes too late and is never summed."""
    done = used(store, before=round)
    rows = enumerate(zip(data.records, data.windows, strict=True))
    return data.take([i for i, (record, window) in rows if window > done.get(record, window - 1)])


def superseded(store: Path, data: Dataset, *, before: int) -> dict[Place, frozenset[str]]:
    """Records summed before this round of which ``data`` holds a newer version, by place."""
    newest = dict(zip(data.records, data.windows, strict=True))
    found: dict[Place, frozenset[str]] = {}
    for about in _abouts(store, before=before):
        old = frozenset(r for r, window in _versions(about) if window < newest.get(r, window))
        if old:
            found[int(about["round"]), about["scope"]] = old
    return found


def mark(store: Path, stale: Mapping[Place, Collection[str]], *, round: int) -> None:
    """Note which records this round may take back, before anybody is told how many there are."""
    rows = [[*place, sorted(records)] for place, records in sorted(stale.items())]
    document = {"round": round, "stale": rows}
    write_private(store / "stale.json", json.dumps(document).encode())


def marked(store: Path, *, round: int) -> dict[Place, frozenset[str]]:
    """What ``mark`` noted for this round; nothing if the last note is of another one."""
    path = store / "stale.json"
    noted = json.loads(path.read_text()) if path.exists() else {}
    if noted.get("round") != round:
        return {}
    return {(number, scope): frozenset(records) for number, scope, records in noted["stale"]}


def unmark(store: Path) -> None:
    """Drop the note, which names records; the next vote writes another."""
    (store / "stale.json").unlink(missing_ok=True)


def revision(round: int) -> str:
    """The name of what a round takes back because newer versions arrived."""
    return f"{REVISION}{round}"


def revise(store: Path, places: Collection[Place], *, round: int) -> None:
    """Drop what was marked in this round in these places, after the bank has changed."""
    for place, records in marked(store, round=round).items():
        entry = read(store, *place) if place in places else None
        if entry:
            _rewrite(store, entry, keep(entry, without=records))


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


def owners(store: Path) -> tuple[tuple[str, str], ...]:
    """(record, patient) of every version that was summed, without reading embeddings."""
    abouts = [_about(path) for path in sorted((store / "journal").glob("*.safetensors"))]
    return tuple(
        pair
        for about in abouts
        for pair in zip(json.loads(about["records"]), json.loads(about["patients"]), strict=True)
    )


def keep(entry: Entry, *, without: Collection[str]) -> Entry:
    """The entry without these records."""
    rows = [i for i, record in enumerate(entry.records) if record not in without]
    return _rows(entry, rows)


def only(entry: Entry, *, records: Collection[str]) -> Entry:
    """The part of the entry that holds these records."""
    rows = [i for i, record in enumerate(entry.records) if record in records]
    return _rows(entry, rows)


def delete(store: Path, gone: Mapping[Place, Collection[str]]) -> None:
    """Drop records from their places; the last step of a removal."""
    for place, records in gone.items():
        entry = read(store, *place)
        if entry:
            _rewrite(store, entry, keep(entry, without=records))


def _rewrite(store: Path, entry: Entry, rest: Entry) -> None:
    if len(rest) == 0:
        path_of(store, entry.round, entry.scope).unlink()
    elif len(rest) < len(entry):
        write(store, rest)


def _rows(entry: Entry, rows: Sequence[int]) -> Entry:
    return Entry(
        round=entry.round,
        scope=entry.scope,
        records=tuple(entry.records[i] for i in rows),
        patients=tuple(entry.patients[i] for i in rows),
        labels=tuple(entry.labels[i] for i in rows),
        windows=tuple(entry.windows[i] for i in rows),
        z=entry.z[torch.tensor(rows, dtype=torch.int64)],
    )


def _abouts(store: Path, *, before: int) -> list[dict[str, str]]:
    paths = sorted((store / "journal").glob("*.safetensors"))
    return [_about(path) for path in paths if int(path.name.split("-", 1)[0]) < before]


def _versions(about: Mapping[str, str]) -> list[tuple[str, int]]:
    pairs = zip(json.loads(about["records"]), json.loads(about["windows"]), strict=True)
    return list(pairs)


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
        windows=tuple(json.loads(about["windows"])),
        z=z,
    )
