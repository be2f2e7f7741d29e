"""A federation from plain files: JSON lines, CSV, TSV or Parquet, with only a plan written.

*Sites* come from the column ``site``, else each file is one where ``train`` is a pattern, else they
are simulated by ``partition``. *Windows* come from the column
``window``, else from the dates or numbers of the column ``time`` in equal counts, else from the
order of the records; ``window = "label"`` lets labels arrive one group after the other (scopes
where there are several, else single labels). The *test* is a file of its own, else a share of the
records chosen by a hash of the text, so that equal texts stay on one side. Keys of [task] that
concern hospitals alone (``overlap``, ``backlog``) are not read.
"""

import glob
import re
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from math import isfinite, isnan, nan
from pathlib import Path

from fedkola.errors import DataError, Incompatible, PlanError
from fedkola.evaluation.tasks import tables
from fedkola.evaluation.tasks.tables import Table
from fedkola.knowledge.stream import (
    Stream,
    arrivals,
    cap,
    deal,
    first_windows,
    hash_share,
    numbered,
)
from fedkola.plan import Task
from fedkola.quality.intake import admit, plain
from fedkola.types import Catalogue, Dataset, Label

LEVEL = "label"
LABELS_ARRIVE = "label"
BEFORE_SITES = "train"
GAPS = 4  # Whole-number windows keep their gaps while the span is below this many times the count.


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One usable record; ``window`` is 0 until known, ``site`` "" until it has been given one."""

    record: str
    text: str
    label: str
    patient: str
    scope: str
    site: str
    moment: "Moment | None"
    window: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Moment:
    """When a record was made: ``clock`` is "number", "date" or "window", ``text`` its name."""

    clock: str
    value: float
    text: str


class Findings:
    """What was found on the way: exclusions, notices, and where each site's records come from."""

    def __init__(self) -> None:
        self.excluded: defaultdict[str, Counter[str]] = defaultdict(Counter)
        self.notices: list[str] = []
        self.origins: dict[str, str] = {}

    def nothing_left(self, what: str) -> DataError:
        reasons = ", ".join(
            f"{count} {reason}"
            for counts in self.excluded.values()
            for reason, count in sorted(counts.items())
        )
        return DataError(f"{what}: {reasons or 'no record was found'}; check the columns in [task]")


def load(task: Task, *, seed: int) -> Stream:
    """The stream that the files hold; the same for equal ``task``, files and ``seed``.

    Raises DataError for files that cannot be used and PlanError for keys that cannot; single
    records that cannot be used are counted in ``excluded``.
    """
    _check(task)
    found = Findings()
    read = [tables.read(path, encoding=task.encoding) for path in _paths(task)]
    name = read[0].path.parent.name if _is_pattern(task) else read[0].stem
    train = _one_clock(_rows(read, task, name, found), found)
    if not train:
        raise found.nothing_left(f"no usable training record in {task.train}")
    train, test = _test(train, task, name, found)
    catalogue = _catalogue(train, task, name, found)
    train, test = _capped(train, test, task, seed, found)
    train, names = _windowed(train, task, seed, found)
    train = _sited(train, task, seed, found)
    sites = _sites(train, task, found)
    first = first_windows(catalogue, sites)
    return Stream(
        catalogue=catalogue,
        sites=sites,
        test=_dataset([replace(row, window=first.get(row.label, 1)) for row in test]),
        windows=names,
        about=_about(train, found),
        excluded={
            where: dict(sorted(counts.items()))
            for where, counts in sorted(found.excluded.items())
            if counts
        },
        notices=tuple(found.notices),
    )


def _check(task: Task) -> None:
    if not task.train:
        raise PlanError('task.train is empty; set a file, or a pattern such as "data/*.jsonl"')
    if task.level not in ("", LEVEL):
        raise PlanError(f'task.level = {task.level!r}, but files have one level; set "{LEVEL}"')
    if not task.test and not 0 < task.test_share < 1:
        raise PlanError(
            f"task.test_share = {task.test_share} leaves no test or no training; "
            "set a share between 0 and 1, or task.test"
        )
    if len(set(task.labels)) < len(task.labels):
        raise PlanError(f"task.labels names a label twice: {', '.join(task.labels)}; drop one")
    if task.unlabelled and (task.window == LABELS_ARRIVE or task.partition != "iid"):
        raise Incompatible(
            "task.unlabelled has no labels to arrive or to split by; leave task.window = "
            '"label" out and set task.partition = "iid"'
        )


def _paths(task: Task) -> list[Path]:
    """The training files, sorted by name."""
    if not _is_pattern(task):
        return [Path(task.train)]
    paths = [Path(path) for path in sorted(glob.glob(task.train, recursive=True))]
    paths = [path for path in paths if path.is_file()]
    if not paths:
        raise DataError(f"no file matches task.train = {task.train!r}; check folder and pattern")
    return paths


def _is_pattern(task: Task) -> bool:
    """A file that exists is taken by its name, brackets and all."""
    return not Path(task.train).exists() and glob.has_magic(task.train)


# --- rows -----------------------------------------------------------------------------------------


def _rows(read: Sequence[Table], task: Task, name: str, found: Findings) -> list[Row]:
    """Usable records of all files; identifiers are unique at a site, or in a file that is split."""
    stems = [table.stem for table in read]
    if len(set(stems)) < len(stems):
        stems = [f"{table.path.parent.name}-{table.stem}" for table in read]
    files = _slugs(stems) if _is_pattern(task) else [""]  # One file is split, or has a column.
    by_site: defaultdict[str, list[tuple[Table, int]]] = defaultdict(list)
    slug = _site_slugs(read, task)
    found.origins.update((own, given) for given, own in slug.items())
    if _is_pattern(task) and not task.site:
        found.origins.update(
            (file, str(table.path.name)) for table, file in zip(read, files, strict=True)
        )
    for table, file in zip(read, files, strict=True):
        names = table.column(task.site, "task.site") if task.site else None
        for i in range(len(table)):
            site, problem = plain(names[i]) if names is not None else (file, "")
            if problem:
                found.excluded[BEFORE_SITES][f"{problem} site"] += 1
            else:
                by_site[slug.get(site, site)].append((table, i))
    rows: list[Row] = []
    for site, places in by_site.items():
        rows += _usable(places, site, task, name, found)
    return rows


def _usable(
    places: Sequence[tuple[Table, int]], site: str, task: Task, name: str, found: Findings
) -> list[Row]:
    """Usable records of one site (all records where sites are simulated)."""
    where = site or BEFORE_SITES
    texts = _column(places, task.text, "task.text")
    labels = None if task.unlabelled else _column(places, task.label, "task.label")
    admitted = admit(
        _column(places, task.record, "task.record")
        if task.record
        else [f"{table.stem}-{table.lines[i]}" for table, i in places],
        texts,
        labels,
        known=frozenset(task.labels) or None,
    )
    found.excluded[where].update(admitted.excluded)
    patients = _column(places, task.patient, "task.patient") if task.patient else None
    scopes = _column(places, task.scope, "task.scope") if task.scope else None
    moments = _moments(places, task)
    rows: list[Row] = []
    anonymous = 0
    for k, i in enumerate(admitted.rows):
        scope, problem = plain(scopes[i]) if scopes is not None else (name, "")
        if problem:
            found.excluded[where][f"{problem} scope"] += 1
            continue
        if moments is not None and moments[i] is None:
            found.excluded[where][_no_moment(task)] += 1
            continue
        patient = plain(patients[i])[0] if patients is not None else ""
        anonymous += patients is not None and not patient
        rows.append(
            Row(
                record=admitted.records[k],
                text=admitted.texts[k],
                # Text of a language model stands under its scope, the only label there is.
                label=scope if task.unlabelled else admitted.labels[k],
                # Without a person to withdraw, a record is withdrawn by itself.
                patient=patient or admitted.records[k],
                scope=scope,
                site=site,
                moment=moments[i] if moments is not None else None,
            )
        )
    if anonymous:
        found.notices.append(
            f"{where}: {anonymous} records name no patient; each is withdrawn by its own identifier"
        )
    return rows


def _column(places: Sequence[tuple[Table, int]], name: str, key: str) -> list[object]:
    return [table.column(name, key)[i] for table, i in places]


def _site_slugs(read: Sequence[Table], task: Task) -> dict[str, str]:
    """Site names fit for a wire and a folder, by the name in the column."""
    if not task.site:
        return {}
    values = (plain(value) for table in read for value in table.column(task.site, "task.site"))
    names = sorted({value for value, problem in values if not problem})
    return dict(zip(names, _slugs(names), strict=True))


def _slugs(names: Sequence[str]) -> list[str]:
    """Names of the form [a-z0-9-]{1,32}; a number tells apart those that would be equal."""
    taken: set[str] = set()
    slugs = []
    for name in names:
        ascii_name = unicodedata.normalize("NFKD", name).encode("ascii", "ignore").decode()
        base = re.sub(r"[^a-z0-9]+", "-", ascii_name.lower()).strip("-")[:32] or "site"
        slug, number = base, 1
        while slug in taken:
            number += 1
            slug = f"{base[: 31 - len(str(number))]}-{number}"
        taken.add(slug)
        slugs.append(slug)
    return slugs


# --- test and labels ------------------------------------------------------------------------------


def _test(
    train: Sequence[Row], task: Task, name: str, found: Findings
) -> tuple[list[Row], list[Row]]:
    """Training rows and test rows; labels of the test are still unchecked."""
    if task.test:
        table = tables.read(Path(task.test), encoding=task.encoding)
        record = task.record if task.record in table.columns else ""
        bare = replace(task, record=record, patient="", scope="", time="", window="", labels=())
        own = Findings()
        test = _usable([(table, i) for i in range(len(table))], "", bare, name, own)
        found.excluded["test"].update(own.excluded[BEFORE_SITES])
        return list(train), test
    held_out = [row for row in train if hash_share(row.text) < task.test_share]
    rest = [row for row in train if hash_share(row.text) >= task.test_share]
    if not held_out or not rest:
        raise DataError(
            f"a share of {task.test_share} of {len(train)} records leaves {len(rest)} to train "
            f"and {len(held_out)} to test; give task.test, or another task.test_share"
        )
    return rest, held_out


def _catalogue(train: Sequence[Row], task: Task, name: str, found: Findings) -> Catalogue:
    scopes: dict[str, str] = {}
    for row in train:
        if scopes.setdefault(row.label, row.scope) != row.scope:
            raise DataError(
                f"label {row.label!r} stands under the scopes {scopes[row.label]!r} and "
                f"{row.scope!r}; give each scope labels of its own, or leave task.scope out"
            )
    codes = task.labels or tuple(sorted(scopes))
    unused = [code for code in codes if code not in scopes]
    if unused:
        found.notices.append(f"labels of the plan without a training record: {', '.join(unused)}")
    return Catalogue(
        system=name,
        levels=(LEVEL,),
        labels=tuple(
            Label(code=code, path=(code,), scope=scopes.get(code, name)) for code in codes
        ),
    )


def _capped(
    train: Sequence[Row], test: Sequence[Row], task: Task, seed: int, found: Findings
) -> tuple[list[Row], list[Row]]:
    """Training and test rows under the cap, the test without labels that nothing can teach."""
    if not task.unlabelled:
        known = set(task.labels) or {row.label for row in train}
        unknown = sum(row.label not in known for row in test)
        if unknown:
            found.excluded["test"]["unknown label"] += unknown
        test = [row for row in test if row.label in known]
    if not test:
        raise found.nothing_left("no usable test record")
    kept, kept_test = cap(
        [row.label for row in train],
        [row.label for row in test],
        per_label=task.per_label,
        seed=seed,
    )
    if len(kept) < len(train):
        found.notices.append(
            f"task.per_label = {task.per_label} leaves out {len(train) - len(kept)} training and "
            f"{len(test) - len(kept_test)} test records"
        )
    return [train[i] for i in kept], [test[i] for i in kept_test]


# --- windows --------------------------------------------------------------------------------------


def _moments(places: Sequence[tuple[Table, int]], task: Task) -> list[Moment | None] | None:
    """When each record was made, None where that cannot be read; None if no column tells."""
    if task.window and task.window != LABELS_ARRIVE:
        return [_window_value(v) for v in _column(places, task.window, "task.window")]
    if task.time and not task.window:
        return [timestamp(v) for v in _column(places, task.time, "task.time")]
    return None


def _no_moment(task: Task) -> str:
    return "missing window" if task.window else "bad date"


def _window_value(value: object) -> Moment | None:
    text, problem = plain(value)
    if problem:
        return None
    whole = re.fullmatch(r"-?\d{1,15}", text)
    return Moment(clock="window", value=int(text) if whole else nan, text=text)


def timestamp(value: object) -> Moment | None:
    """A number, or an ISO date in seconds; one without a zone is read as UTC."""
    text, problem = plain(value)
    if problem:
        return None
    try:
        number = float(text)
        return Moment(clock="number", value=number, text=text) if isfinite(number) else None
    except ValueError:
        pass  # Not a number: it may be a date.
    try:
        moment = datetime.fromisoformat(text)
    except ValueError:
        return None
    if moment.tzinfo is None:
        moment = moment.replace(tzinfo=UTC)
    return Moment(clock="date", value=moment.timestamp(), text=moment.date().isoformat())


def _one_clock(rows: Sequence[Row], found: Findings) -> list[Row]:
    """Rows whose time is of the kind that most have: numbers and dates do not compare."""
    clocks = Counter(row.moment.clock for row in rows if row.moment)
    if len(clocks) < 2:
        return list(rows)
    usual = max(clocks, key=lambda clock: clocks[clock])
    for row in rows:
        if row.moment and row.moment.clock != usual:
            found.excluded[row.site or BEFORE_SITES]["bad date"] += 1
    return [row for row in rows if row.moment and row.moment.clock == usual]


def _windowed(
    rows: Sequence[Row], task: Task, seed: int, found: Findings
) -> tuple[list[Row], tuple[str, ...]]:
    """The rows with their windows, and the names of the windows."""
    if task.window == LABELS_ARRIVE:
        windows, names = _by_label(rows, task, seed, found)
    elif task.window:
        windows, names = _by_value(rows)
    elif task.time:
        windows, names = _by_time(rows, task)
    else:
        windows, names = _by_order(rows, task)
    empty = [name for number, name in enumerate(names, start=1) if number not in set(windows)]
    if empty:
        found.notices.append(f"windows without a record, kept: {', '.join(empty)}")
    return [replace(row, window=w) for row, w in zip(rows, windows, strict=True)], names


def _by_label(
    rows: Sequence[Row], task: Task, seed: int, found: Findings
) -> tuple[list[int], tuple[str, ...]]:
    several = len({row.scope for row in rows}) > 1
    groups = [row.scope if several else row.label for row in rows]
    sizes = Counter(groups)
    count = min(task.windows, len(sizes))
    if count < task.windows:
        found.notices.append(
            f"{len(sizes)} {'scopes' if several else 'labels'} arrive over {count} windows, "
            f"not over task.windows = {task.windows}"
        )
    arrival = arrivals(sizes, windows=count, seed=seed)
    return [arrival[group] for group in groups], _numbered(count)


def _by_value(rows: Sequence[Row]) -> tuple[list[int], tuple[str, ...]]:
    """One window per value of the column, in order; whole numbers keep small gaps as empty
    windows, so that a month without records stays a month."""
    moments = [row.moment for row in rows if row.moment]
    values = {moment.text: moment.value for moment in moments}
    if any(isnan(value) for value in values.values()):
        names = sorted(values)
    else:
        low, high = int(min(values.values())), int(max(values.values()))
        names = sorted(values, key=lambda text: (values[text], text))
        if high - low < GAPS * len(set(values.values())):
            names = [str(number) for number in range(low, high + 1)]
            return [int(moment.value) - low + 1 for moment in moments], tuple(names)
    place = {name: number for number, name in enumerate(names, start=1)}
    return [place[moment.text] for moment in moments], tuple(names)


def _by_time(rows: Sequence[Row], task: Task) -> tuple[list[int], tuple[str, ...]]:
    """Windows of equal counts. Records of one moment stay together, in the window of the first."""
    moments = [row.moment for row in rows if row.moment]
    first: dict[float, int] = {}
    names = list(_numbered(task.windows))
    named: set[int] = set()
    for rank, moment in enumerate(sorted(moments, key=lambda m: m.value)):
        window = first.setdefault(moment.value, 1 + rank * task.windows // len(moments))
        if window not in named:
            named.add(window)
            names[window - 1] = f"from {moment.text}"
    return [first[moment.value] for moment in moments], tuple(names)


def _by_order(rows: Sequence[Row], task: Task) -> tuple[list[int], tuple[str, ...]]:
    """Equal counts in the order of the records: of the file, or of each site that has its own."""
    sizes = Counter(row.site for row in rows)
    passed: Counter[str] = Counter()
    windows = []
    for row in rows:
        windows.append(1 + passed[row.site] * task.windows // sizes[row.site])
        passed[row.site] += 1
    return windows, _numbered(task.windows)


def _numbered(count: int) -> tuple[str, ...]:
    return tuple(f"window {number}" for number in range(1, count + 1))


# --- sites ----------------------------------------------------------------------------------------


def _sited(rows: Sequence[Row], task: Task, seed: int, found: Findings) -> list[Row]:
    """The rows, each with a site: its own, or one of ``task.sites`` that are simulated."""
    if found.origins:
        return list(rows)
    names = numbered(task.sites)
    found.origins.update((name, f"simulated, {task.partition}") for name in names)
    drawn = deal([row.label for row in rows], names, partition=task.partition, seed=seed)
    return [replace(row, site=site) for row, site in zip(rows, drawn, strict=True)]


def _sites(rows: Sequence[Row], task: Task, found: Findings) -> dict[str, Dataset]:
    by_site: dict[str, list[Row]] = {site: [] for site in found.origins}
    for row in rows:
        by_site[row.site].append(row)
    for site, own in by_site.items():
        labels = {row.label for row in own}
        if not own:
            found.notices.append(f"{site} has no training record")
        elif len(labels) == 1 and not task.unlabelled:
            found.notices.append(f"{site} holds one label only: {own[0].label}")
    return {site: _dataset(own) for site, own in sorted(by_site.items())}


def _dataset(rows: Sequence[Row]) -> Dataset:
    """The rows by window, in their order within it."""
    ordered = sorted(rows, key=lambda row: row.window)
    return Dataset(
        records=tuple(row.record for row in ordered),
        texts=tuple(row.text for row in ordered),
        labels=tuple(row.label for row in ordered),
        patients=tuple(row.patient for row in ordered),
        windows=tuple(row.window for row in ordered),
    )


def _about(rows: Sequence[Row], found: Findings) -> dict[str, dict[str, object]]:
    scopes: dict[str, set[str]] = {site: set() for site in found.origins}
    for row in rows:
        scopes[row.site].add(row.scope)
    return {
        site: {"specialty": found.origins[site], "scopes": tuple(sorted(own))}
        for site, own in sorted(scopes.items())
    }
