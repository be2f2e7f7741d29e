"""Public corpora on disk: where their files are, and their rows as records of a stream.

Shared by the tasks that stream real data. No corpus comes with fedkola: most may be used and not
passed on, so a person copies the files and names their folder.
"""

import os
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import date as Date
from pathlib import Path

from fedkola.errors import DataError
from fedkola.evaluation.tasks import tables
from fedkola.knowledge.stream import Stream, cap, first_windows
from fedkola.plan import Task
from fedkola.quality.intake import admit
from fedkola.types import Catalogue, Dataset

DATA = "FEDKOLA_DATA"
TRAIN, TEST = "train", "test"


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One record. ``window`` 0 is filled in for tests: the first in which the label is anywhere.
    ``patient`` "" means that the record is withdrawn by itself."""

    record: str
    text: str
    label: str
    site: str = ""
    window: int = 0
    patient: str = ""
    prompt: str = ""


def folder(task: Task, name: str) -> Path:
    """Where the files of the corpus ``name`` are; raises DataError saying what to set."""
    above = os.environ.get(DATA, "")
    if not task.folder and not above:
        raise DataError(
            f"task {task.name} reads the corpus {name}, which does not come with fedkola; set "
            f"task.folder to the folder of its files, or {DATA} to the folder above"
        )
    found = Path(task.folder) if task.folder else Path(above) / name
    if not found.is_dir():
        key = "task.folder" if task.folder else DATA
        raise DataError(f"{found} is no folder; copy the corpus {name} there, or correct {key}")
    return found


def read(path: Path, *columns: str) -> list[dict[str, object]]:
    """Every row of a file, these columns of it. Raises DataError for a file or column not there."""
    table = tables.read(path)
    for name in columns:
        if name not in table.columns:
            raise DataError(
                f"{path} has no column {name!r}, only {', '.join(table.columns)}; copy the corpus "
                "again, unchanged"
            )
    return [{name: table.columns[name][i] for name in columns} for i in range(len(table))]


def admitted(
    rows: Sequence[Mapping[str, object]], excluded: Counter[str], *, text: str, label: str
) -> list[tuple[int, str, str]]:
    """(position, text, label) of the usable rows; the others are counted in ``excluded``."""
    found = admit(range(len(rows)), [row[text] for row in rows], [row[label] for row in rows])
    excluded.update(found.excluded)
    return list(zip(found.rows, found.texts, found.labels, strict=True))


def unseen(train: Sequence[Row], test: Sequence[Row], excluded: Counter[str]) -> list[Row]:
    """Test rows whose text is not trained on; the others are counted in ``excluded``."""
    texts = {row.text for row in train}
    kept = [row for row in test if row.text not in texts]
    if len(kept) < len(test):
        excluded["text of a training record"] += len(test) - len(kept)
    return kept


def capped(
    train: Sequence[Row], test: Sequence[Row], *, per_label: int, seed: int
) -> tuple[list[Row], list[Row], tuple[str, ...]]:
    """Both under the cap of [task] (0 is none), and the notice that says so."""
    kept, asked = cap(
        [row.label for row in train], [row.label for row in test], per_label=per_label, seed=seed
    )
    notice = (
        f"task.per_label = {per_label} leaves out {len(train) - len(kept)} training and "
        f"{len(test) - len(asked)} test records"
    )
    notices = (notice,) if len(kept) < len(train) else ()
    return [train[i] for i in kept], [test[i] for i in asked], notices


def calendar(dates: Sequence[str], period: str) -> tuple[str, ...]:
    """Every year, or quarter, from the first of these ISO dates to the last, empty ones too."""
    first, last = min(dates), max(dates)
    years = range(int(first[:4]), int(last[:4]) + 1)
    if period == "year":
        return tuple(str(year) for year in years)
    names = [f"{year}-Q{quarter}" for year in years for quarter in range(1, 5)]
    start, end = names.index(within(first, period)), names.index(within(last, period))
    return tuple(names[start : end + 1])


def within(date: str, period: str) -> str:
    """The year, or quarter, of an ISO date."""
    return date[:4] if period == "year" else f"{date[:4]}-Q{(int(date[5:7]) + 2) // 3}"


def is_date(text: str) -> bool:
    """Whether a text is an ISO date."""
    try:
        return len(text) == 10 and bool(Date.fromisoformat(text))
    except ValueError:
        return False


def dataset(rows: Sequence[Row]) -> Dataset:
    """The rows by window, in their order within it."""
    ordered = sorted(rows, key=lambda row: row.window)
    prompts = tuple(row.prompt for row in ordered)
    return Dataset(
        records=tuple(row.record for row in ordered),
        texts=tuple(row.text for row in ordered),
        labels=tuple(row.label for row in ordered),
        patients=tuple(row.patient or row.record for row in ordered),
        windows=tuple(row.window for row in ordered),
        prompts=prompts if any(prompts) else (),
    )


def stream(
    *,
    catalogue: Catalogue,
    specialties: Mapping[str, str],
    train: Sequence[Row],
    test: Sequence[Row],
    windows: Sequence[str],
    excluded: Mapping[str, Mapping[str, int]],
    notices: Sequence[str] = (),
    ends: Mapping[str, int] | None = None,
    stale: Mapping[str, tuple[str, ...]] | None = None,
    concepts: Mapping[str, str] | None = None,
    choices: Mapping[str, tuple[str, ...]] | None = None,
) -> Stream:
    """The stream of these rows; sites come in the order of ``specialties``, empty ones too."""
    by_site: dict[str, list[Row]] = {name: [] for name in specialties}
    for row in train:
        by_site[row.site].append(row)
    sites = {name: dataset(rows) for name, rows in by_site.items()}
    first = first_windows(catalogue, sites)
    scope = {label.code: label.scope for label in catalogue.labels}
    held: defaultdict[str, set[str]] = defaultdict(set)
    for row in train:
        held[row.site].add(scope[row.label])
    return Stream(
        catalogue=catalogue,
        sites=sites,
        test=dataset([replace(row, window=row.window or first[row.label]) for row in test]),
        windows=tuple(windows),
        about={
            name: {"specialty": told, "scopes": tuple(sorted(held[name]))}
            for name, told in specialties.items()
        },
        excluded={
            where: dict(sorted(counts.items())) for where, counts in excluded.items() if counts
        },
        notices=tuple(notices),
        ends=ends or {},
        stale=stale or {},
        concepts=concepts or {},
        choices=choices or {},
    )
