"""Cold storage: the integers of cells that no present view reads, one file each, beside the run.

A file is named by its cell and the hash of its integers, and holds exactly these; reading checks
the hash. Files are flushed before the round that names them is committed, and ``sweep`` deletes
those that no committed bank names, so that what was removed is on disk no more. Purging keeps the
bank's record of a cell and gives its file up: as-of questions that need it are refused then, and a
removal must ask its sites to sum their journals again.
"""

import json
from collections.abc import Collection, Iterable
from dataclasses import asdict, replace
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file

from fedkola.errors import BlobMissing, KnowledgeError
from fedkola.files import settle
from fedkola.knowledge import compact
from fedkola.knowledge.bank import (
    Bank,
    Cell,
    KnowledgeCell,
    ModuleState,
    Status,
    answers_then,
    content,
    find_module,
    read_then,
)
from fedkola.types import Aggregate, Grid


def place(run: Path) -> Path:
    """The folder of cold storage in the folder of a run."""
    return run / "archive"


def put(folder: Path, cells: Iterable[Cell]) -> None:
    """Write cells to cold storage; a file that is there already is the same."""
    for cell in cells:
        path = _path(folder, cell.about)
        if path.exists():
            continue
        folder.mkdir(parents=True, exist_ok=True)
        draft = path.with_suffix(".tmp")
        # Copies: equal tensors that come from one file of the ledger share their memory.
        words = {name: value.contiguous().clone() for name, value in cell.total.words.items()}
        about = {
            "grid": json.dumps(asdict(cell.total.grid)),
            "cohort": json.dumps(cell.total.cohort),
        }
        save_file(words, draft, metadata=about)
        settle(draft, path)


def get(folder: Path, about: KnowledgeCell) -> Cell:
    """A cell out of cold storage; raises KnowledgeError if it was purged, BlobMissing if its file
    is absent or altered."""
    path = _path(folder, about)
    if about.status is Status.PURGED:
        raise KnowledgeError(
            f"cell {about.id} of {about.module}, round {about.round}, was purged from the archive; "
            "its sites hold what it was summed from, nobody else does"
        )
    try:
        with safe_open(path, framework="pt") as file:
            kept = file.metadata()
        words = load_file(path)
    except (OSError, SafetensorError) as error:
        raise BlobMissing(
            f"archived cell {path.name} cannot be read ({error}); restore it from a copy"
        ) from error
    total = Aggregate(
        cohort=tuple(json.loads(kept["cohort"])), words=words, grid=Grid(**json.loads(kept["grid"]))
    )
    if content(about.labels, total) != about.words:
        raise BlobMissing(
            f"archived cell {path.name} does not hold the integers it is named by; restore it "
            "from a copy"
        )
    return Cell(about=about, total=total)


def thaw(bank: Bank, folder: Path, names: Collection[str]) -> Bank:
    """The bank with these cells hot again, and every cold cell that changes with them.

    Names of live cells are let be. Raises KnowledgeError for a purged one.
    """
    wanted = set(compact.needed(bank, names))
    parts = [get(folder, about) for about in bank.cold if about.id in wanted]
    return compact.take_out(bank, parts) if parts else bank


def as_of(
    bank: Bank,
    folder: Path,
    *,
    valid_at: float | None,
    known_at: int | None,
    held: Collection[str] | None = None,
) -> Bank:
    """The bank with all cells apart that a view of that time, or of these held modules, does not
    read as a whole.

    Raises KnowledgeError if one of them was purged: which rounds can still be asked is in it.
    """
    if valid_at is None and known_at is None and (held is None or not bank.fused):
        return bank
    cold = {about.id: about for about in bank.cold}
    parts = {cell.about.id: cell.about.sources for cell in bank.cells if cell.about.sources}
    parts |= {about.id: about.sources for about in bank.cold if about.sources}
    for fused in bank.fused:
        parts[fused.id] = tuple(n for c in fused.cells for n in parts.get(c) or (c,))
    wanted: set[str] = set()
    for names in parts.values():
        then = {n: read_then(cold[n], valid_at=valid_at, known_at=known_at) for n in names}
        if len(set(then.values())) > 1:
            wanted.update(name for name, read in then.items() if not read)
    for fused in bank.fused:
        if held is not None and 0 < len(set(held) & set(fused.modules)) < len(fused.modules):
            wanted.update(fused.cells)
    # What was archived by itself is read again where its module answered then.
    inside = {name for names in parts.values() for name in names}
    inside.update(name for fused in bank.fused for name in fused.cells)
    wanted.update(
        about.id
        for about in bank.cold
        if about.id not in inside
        and answers_then(find_module(bank, about.module), valid_at=valid_at, known_at=known_at)
        and read_then(about, valid_at=valid_at, known_at=known_at)
    )
    try:
        return thaw(bank, folder, wanted)
    except KnowledgeError as error:
        if valid_at is None and known_at is None:
            raise KnowledgeError(
                f"the bank cannot answer with some modules of a fused adapter: {error}; ask with "
                "all of them or none, see `fedkola bank ls`"
            ) from error
        first = max((a.round for a in bank.cold if a.status is Status.PURGED), default=0)
        times = {"round": known_at, "valid time": valid_at}
        asked = " and ".join(f"{name} {at:g}" for name, at in times.items() if at is not None)
        raise KnowledgeError(
            f"the bank cannot answer as of {asked}: {error}; times from round {first} on can be "
            "asked"
        ) from error


def unused(bank: Bank) -> tuple[str, ...]:
    """Live cells that no view of the present reads: those of superseded and retired modules."""
    over = {m.id for m in bank.modules if m.closed is not None and m.state in _OVER}
    return tuple(c.about.id for c in bank.cells if c.about.module in over)


def freeze(bank: Bank, names: Collection[str]) -> tuple[Bank, tuple[Cell, ...]]:
    """The bank without the integers of these live cells, and the cells, to be ``put``.

    Analytic cells that a scatter cell covers stay, as the Gram is read with them.
    """
    covered = {name for cell in bank.cells for name in cell.about.covers}
    gone = [c for c in bank.cells if c.about.id in names and c.about.id not in covered]
    left = tuple(c for c in bank.cells if c not in gone)
    cold = tuple(replace(c.about, status=Status.ARCHIVED) for c in gone)
    return replace(bank, cells=left, cold=(*bank.cold, *cold)), tuple(gone)


def purge(bank: Bank) -> Bank:
    """The bank after its cold storage is given up; ``sweep`` deletes the files afterwards."""
    cold = tuple(replace(about, status=Status.PURGED) for about in bank.cold)
    return replace(bank, cold=cold)


def sweep(folder: Path, bank: Bank) -> int:
    """Delete the files that this committed bank does not name; returns the bytes freed."""
    if not folder.is_dir():
        return 0
    named = {_path(folder, about).name for about in bank.cold if about.status is Status.ARCHIVED}
    freed = 0
    for path in folder.iterdir():
        if path.name not in named:
            freed += path.stat().st_size
            path.unlink()
    return freed


def size(folder: Path) -> int:
    """Bytes in cold storage."""
    return sum(path.stat().st_size for path in folder.iterdir()) if folder.is_dir() else 0


_OVER = (ModuleState.SUPERSEDED, ModuleState.RETIRED)


def _path(folder: Path, about: KnowledgeCell) -> Path:
    return folder / f"{about.id}-{about.words[:16]}.safetensors"
