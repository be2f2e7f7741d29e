"""Tables from files: JSON lines, CSV, TSV and Parquet, plain or gzip, with errors that help.

A table that cannot be read whole is refused with the place of the defect; single values are judged
later, by the intake.
"""

import csv
import gzip
import io
import json
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from difflib import SequenceMatcher
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from fedkola.errors import DataError, PlanError

LONGEST_FIELD = 1 << 30


@dataclass(frozen=True, slots=True, kw_only=True)
class Table:
    """Columns of one file by name, as read; ``lines`` numbers the rows as the file does."""

    path: Path
    columns: Mapping[str, Sequence[object]]
    lines: Sequence[int]

    @property
    def stem(self) -> str:
        """The name of the file without ``.gz`` and without its format."""
        return self.path.name.removesuffix(".gz").rpartition(".")[0] or self.path.name

    def __len__(self) -> int:
        return len(self.lines)

    def column(self, name: str, key: str) -> Sequence[object]:
        """The column that plan key ``key`` names. Raises DataError naming those that exist."""
        if name not in self.columns:
            raise DataError(
                f"{self.path} has no column {name!r}; its columns are "
                f"{', '.join(self.columns)}; nearest is {nearest(name, self.columns)}; set {key}"
            )
        return self.columns[name]


def read(path: Path, *, encoding: str = "utf-8") -> Table:
    """The table in a file; its format is told by the end of its name.

    Raises DataError for what is absent, empty, malformed or in another encoding, PlanError for an
    encoding that does not exist.
    """
    suffix = path.name.removesuffix(".gz").rpartition(".")[2].lower()
    if suffix not in FORMATS:
        raise DataError(
            f"{path} is of no known format; give a file ending in "
            f"{', '.join(f'.{known}' for known in FORMATS)}, with .gz or without"
        )
    data = _bytes(path)
    if not data.strip():
        raise DataError(f"{path} is empty; give a file with at least one record")
    table = FORMATS[suffix](path, data, encoding)
    if not len(table):
        raise DataError(f"{path} has no records; give a file with at least one")
    return table


def nearest(name: str, names: Sequence[str] | Mapping[str, object]) -> str:
    """Of ``names`` the one most like ``name``."""
    return max(names, key=lambda n: SequenceMatcher(None, name.lower(), n.lower()).ratio())


def _bytes(path: Path) -> bytes:
    if path.is_dir():
        raise DataError(f"{path} is a folder; give a file, or a pattern such as {path}/*.jsonl")
    try:
        data = path.read_bytes()
        return gzip.decompress(data) if path.name.endswith(".gz") else data
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise DataError(
            f"{path} is not a whole gzip file ({error}); copy it again, or drop .gz from its name"
        ) from error
    except OSError as error:
        raise DataError(f"{path} cannot be read ({error.strerror}); check the path") from error


def _decoded(path: Path, data: bytes, encoding: str) -> str:
    try:
        return data.decode(encoding).removeprefix("\ufeff")
    except UnicodeDecodeError as error:
        utf16 = data.startswith((b"\xff\xfe", b"\xfe\xff"))
        raise DataError(
            f"{path} is not {encoding}: byte {error.start} is 0x{data[error.start]:02x} "
            f"({error.reason}); set task.encoding, such as {'utf-16' if utf16 else 'cp1252'}"
        ) from error
    except LookupError as error:
        raise PlanError(
            f"task.encoding = {encoding!r} is no encoding; set one such as utf-8 or cp1252"
        ) from error


def _json_lines(path: Path, data: bytes, encoding: str) -> Table:
    rows: list[Mapping[str, object]] = []
    lines: list[int] = []
    # Not splitlines(): JSON strings may hold the other line separators of Unicode.
    for number, line in enumerate(_decoded(path, data, encoding).split("\n"), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError as error:
            raise DataError(
                f"{path}, line {number} is not JSON ({error}); give one JSON object a line"
            ) from error
        if not isinstance(row, dict):
            raise DataError(
                f"{path}, line {number} is a JSON {type(row).__name__}; give one object a line"
            )
        rows.append(row)
        lines.append(number)
    names = dict.fromkeys(name for row in rows for name in row)
    return Table(
        path=path, columns={name: [row.get(name) for row in rows] for name in names}, lines=lines
    )


def _separated(path: Path, data: bytes, encoding: str, delimiter: str) -> Table:
    # The limit is the module's; documents are longer than its default of 128 kB.
    csv.field_size_limit(LONGEST_FIELD)
    source = io.StringIO(_decoded(path, data, encoding), newline="")
    reader = csv.reader(source, delimiter=delimiter, strict=True)
    rows: list[list[str]] = []
    lines: list[int] = []
    try:
        names = next((row for row in reader if row), [])
        if len(set(names)) < len(names):
            raise DataError(f"{path} names a column twice: {', '.join(names)}; rename one")
        for row in reader:
            if row and len(row) != len(names):
                raise DataError(
                    f"{path}, line {reader.line_num} has {len(row)} fields and the header has "
                    f"{len(names)}; quote fields that hold the separator or a line break"
                )
            if row:
                rows.append(row)
                lines.append(reader.line_num)
    except csv.Error as error:
        raise DataError(
            f"{path}, line {reader.line_num} is malformed ({error}); double the quotes inside "
            "quoted fields and close every quote"
        ) from error
    columns = {name: [row[i] for row in rows] for i, name in enumerate(names)}
    return Table(path=path, columns=columns, lines=lines)


def _csv(path: Path, data: bytes, encoding: str) -> Table:
    return _separated(path, data, encoding, ",")


def _tsv(path: Path, data: bytes, encoding: str) -> Table:
    return _separated(path, data, encoding, "\t")


def _parquet(path: Path, data: bytes, encoding: str) -> Table:
    try:
        table = pq.read_table(pa.BufferReader(data))
    except (pa.ArrowException, OSError) as error:
        raise DataError(
            f"{path} is not a readable Parquet file ({error}); write it again"
        ) from error
    return Table(
        path=path,
        columns={name: table.column(name).to_pylist() for name in table.column_names},
        lines=range(1, table.num_rows + 1),
    )


FORMATS: Mapping[str, Callable[[Path, bytes, str], Table]] = {
    "jsonl": _json_lines,
    "csv": _csv,
    "tsv": _tsv,
    "parquet": _parquet,
}
