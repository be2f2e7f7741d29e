"""The data card of a site: what its records are, and which of them need a look before training.

:func:`examine` reads a table and runs the checks of :mod:`fedkola.quality.checks` and near
duplicates; what comes back is a plain document, the same as JSON. :func:`render` writes it as one
page that opens offline. Both quote records unless told not to, so they are the site's own.
"""

import glob
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from hashlib import sha256
from math import inf
from pathlib import Path
from statistics import median
from typing import Any

from fedkola import __version__
from fedkola.errors import DataError
from fedkola.evaluation import plots, report
from fedkola.evaluation.tasks import tables
from fedkola.evaluation.tasks.files import timestamp
from fedkola.quality.checks import CODES, FATAL, Flag, Limits, Records, inspect
from fedkola.quality.intake import admit, plain
from fedkola.quality.near import near_duplicates
from fedkola.types import Label

VERSION = 1
EXAMPLES, LABELS, QUOTE = 20, 25, 160
LIMITS = Limits()
RARE = 16
"""A label with fewer records has none of its own in the knowledge bank (knowledge.label_floor)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Columns:
    """Names of columns; "" where there is none. ``label`` may also hold the answers to texts."""

    text: str = "text"
    label: str = "label"
    record: str = ""
    time: str = ""


def examine(
    data: str,
    columns: Columns,
    *,
    now: float,
    registry: Mapping[str, Label] | None = None,
    encoding: str = "utf-8",
    first_year: int = 0,
    tolerate: float = 0.0,
    quotes: bool = True,
    limits: Limits = LIMITS,
) -> dict[str, Any]:
    """The card of a file, or of all files of a pattern, as one document of JSON values.

    ``ok`` is whether the share of rows that cannot be used, or not be learnt from, is at most
    ``tolerate``; ``now`` is in seconds since 1970. Raises DataError as the reader of tables does.
    """
    read = [tables.read(path, encoding=encoding) for path in _paths(data)]
    places = [(table, i) for table in read for i in range(len(table))]

    def column(name: str, option: str) -> list[object]:
        return [table.column(name, option)[i] for table, i in places]

    several = len(read) > 1
    admitted = admit(
        column(columns.record, "--record")
        if columns.record
        else [
            f"{table.stem}-{table.lines[i]}" if several else table.lines[i] for table, i in places
        ],
        column(columns.text, "--text"),
        None,
    )
    said = column(columns.label, "--label") if columns.label else None
    times = column(columns.time, "--time") if columns.time else None
    clock, dates = _dates([times[i] for i in admitted.rows]) if times else ("", None)
    records = Records(
        texts=admitted.texts,
        targets=tuple(plain(said[i])[0] for i in admitted.rows) if said else None,
        dates=dates,
    )
    first = datetime(first_year, 1, 1, tzinfo=UTC).timestamp() if first_year else -inf
    flags = (
        *inspect(
            records,
            registry=registry,
            now=now if clock == "date" else inf,
            first=first if clock == "date" else (first_year or -inf),
            limits=limits,
        ),
        *near_duplicates(records.texts),
    )
    fatal = {flag.row for flag in flags if flag.code in FATAL}
    unusable = len(places) - len(admitted.rows)
    bad = (len(fatal) + unusable) / len(places)
    return {
        "version": VERSION,
        "fedkola": __version__,
        "created": datetime.fromtimestamp(now, UTC).isoformat(timespec="seconds"),
        "files": [
            {
                "name": table.path.name,
                "sha256": sha256(table.path.read_bytes()).hexdigest(),
                "rows": len(table),
                "columns": list(table.columns),
            }
            for table in read
        ],
        "columns": {
            "text": columns.text,
            "label": columns.label,
            "record": columns.record,
            "time": columns.time,
        },
        "rows": len(places),
        "unusable": dict(admitted.excluded),
        "records": len(admitted.rows),
        "to_fix": len(fatal),
        "to_look_at": len({flag.row for flag in flags} - fatal),
        "ready": len(admitted.rows) - len({flag.row for flag in flags}),
        "share_to_fix": bad,
        "tolerate": tolerate,
        "ok": bad <= tolerate,
        "quotes": quotes,
        "checked": _checked(records, registry, limits),
        "findings": _findings(flags, records, admitted.records, quotes),
        "labels": _labels(records, quotes),
        "lengths": _lengths(records.texts),
        "dates": _years(records, clock),
    }


def catalogue(path: Path, *, encoding: str = "utf-8") -> dict[str, Label]:
    """Labels that count: one a line of a text file, or a table of ``code`` and, where it has them,
    ``valid_from`` and ``valid_to``. Raises DataError."""
    if path.suffix.lower() == ".txt":
        try:
            lines = path.read_text(encoding).splitlines()
        except (OSError, UnicodeError) as error:
            raise DataError(f"{path} cannot be read ({error}); give a file of labels") from error
        codes = [line.strip() for line in lines if line.strip()]
        rows: list[tuple[str, object, object]] = [(code, None, None) for code in codes]
    else:
        table = tables.read(path, encoding=encoding)
        nothing = [None] * len(table)
        rows = [
            (plain(code)[0], start, end)
            for code, start, end in zip(
                table.column("code", "--labels"),
                table.columns.get("valid_from", nothing),
                table.columns.get("valid_to", nothing),
                strict=True,
            )
        ]
    if not rows:
        raise DataError(f"{path} holds no label; give a file with one a line")
    found = {}
    for code, start, end in rows:
        begins, ends = timestamp(start), timestamp(end)
        found[code] = Label(
            code=code,
            path=(code,),
            scope="",
            valid_from=begins.value if begins else -inf,
            valid_to=ends.value if ends else None,
        )
    return found


def render(doc: Mapping[str, Any]) -> str:
    """The card as one HTML file without anything from outside; all text is escaped."""
    most = max((label["records"] for label in doc["labels"].get("most", ())), default=1)
    busiest = max((year["records"] for year in doc["dates"].get("years", ())), default=1)
    return report.write(
        "card.html.j2",
        {
            "card": doc,
            "headline": headline(doc),
            "findings": [
                {
                    **finding,
                    "bar": plots.bar(finding["share"], kind="f2" if finding["fatal"] else "f1"),
                }
                for finding in doc["findings"]
            ],
            "labels": [
                {**label, "bar": plots.bar(label["records"] / most)}
                for label in doc["labels"].get("most", ())
            ],
            "years": [
                {**year, "bar": plots.bar(year["records"] / busiest)}
                for year in doc["dates"].get("years", ())
            ],
        },
    )


def headline(doc: Mapping[str, Any]) -> str:
    """One sentence: how many records can be used as they are, and how many cannot."""
    rows, bad = doc["rows"], doc["to_fix"] + sum(doc["unusable"].values())
    if not bad and not doc["to_look_at"]:
        return f"All {rows:,} records are ready: no check found anything."
    told = f"{doc['ready']:,} of {rows:,} records are ready as they are"
    parts = [
        f"{number:,} {what}"
        for number, what in (
            (bad, "should be fixed or left out"),
            (doc["to_look_at"], "are worth a look"),
        )
        if number
    ]
    return f"{told}; {' and '.join(parts)}."


# --- private --------------------------------------------------------------------------------------


def _paths(data: str) -> list[Path]:
    """A file by its name, or those that match a pattern."""
    if Path(data).exists() or not glob.has_magic(data):
        return [Path(data)]
    paths = [Path(path) for path in sorted(glob.glob(data, recursive=True)) if Path(path).is_file()]
    if not paths:
        raise DataError(f"no file matches {data!r}; check folder and pattern")
    return paths


def _dates(values: Sequence[object]) -> tuple[str, tuple[float | None, ...]]:
    """The clock that most values have, "date" or "number", and each value in it."""
    moments = [timestamp(value) for value in values]
    clocks = Counter(moment.clock for moment in moments if moment)
    usual = max(clocks, key=lambda clock: clocks[clock], default="date")
    return usual, tuple(m.value if m and m.clock == usual else None for m in moments)


def _checked(
    records: Records, registry: Mapping[str, Label] | None, limits: Limits
) -> list[dict[str, Any]]:
    """Each code that could have been found here, or why not."""
    skipped = {
        "COMMON_ACROSS_SITES": "needs a sum over sites",
        **({} if registry is not None else {"UNKNOWN_LABEL": "needs the list of labels"}),
        **({} if records.dates is not None else {"BAD_DATE": "needs a column of dates"}),
        **(
            {}
            if records.targets is not None
            else dict.fromkeys(("EMPTY_TARGET", "CONTRADICTS_TWIN"), "needs labels or answers")
        ),
        **(
            {}
            if sum(len(text) >= limits.letters for text in records.texts) >= limits.enough
            else {"FOREIGN_TEXT": f"needs {limits.enough} texts"}
        ),
    }
    return [{"code": code, "skipped": skipped.get(code, "")} for code in CODES]


def _findings(
    flags: Sequence[Flag], records: Records, names: Sequence[str], quotes: bool
) -> list[dict[str, Any]]:
    """By code, most serious first: how many, and some of them in words."""
    by_code: defaultdict[str, list[Flag]] = defaultdict(list)
    for flag in flags:
        by_code[flag.code].append(flag)
    found = []
    for code in sorted(by_code, key=lambda code: (code not in FATAL, list(CODES).index(code))):
        mine = by_code[code]
        found.append(
            {
                "code": code,
                "meaning": CODES[code],
                "fatal": code in FATAL,
                "records": len({flag.row for flag in mine}),
                "share": len({flag.row for flag in mine}) / max(len(records.texts), 1),
                "examples": [
                    {
                        "record": names[flag.row],
                        "says": sentence(flag, names, quotes=quotes),
                        "text": _quoted(records.texts[flag.row]) if quotes else "",
                        "label": _target(records, flag.row) if quotes else "",
                        "evidence": {
                            key: value
                            for key, value in flag.evidence.items()
                            if quotes or not isinstance(value, str)
                        },
                    }
                    for flag in mine[:EXAMPLES]
                ],
            }
        )
    return found


def sentence(flag: Flag, names: Sequence[str], *, quotes: bool = True) -> str:
    """A finding in words: the numbers of its evidence, and the record that it is about."""
    e: Mapping[str, Any] = flag.evidence
    like = names[flag.like] if flag.like >= 0 else ""
    match flag.code:
        case "EXACT_DUPLICATE":
            return f"{e['records']} records say this; {like} is the newest."
        case "CONTRADICTS_TWIN":
            other = f" and says {e['says']!r:.80}" if quotes else " and says something else"
            more = {1: "", 2: ", as does another"}.get(
                e["against"], f", as do {e['against'] - 1} others"
            )
            return f"{like} has the same text{other}{more}."
        case "NEAR_DUPLICATE":
            return f"{e['alike']:.0%} of its text is that of {like}."
        case "EMPTY_TARGET":
            return "No label or answer."
        case "GARBLED" if "lost" in e:
            return f"{e['lost']:.1%} of its signs are lost."
        case "GARBLED" if "reads" in e:
            word = f"; one word should be {e['reads']!r}" if quotes else ""
            return f"Read in a wrong encoding{word}."
        case "GARBLED":
            what = "repeats itself" if e["ratio"] > 2 else "does not repeat"
            return f"It {what} as text does not: packed it is {e['ratio']:g} times smaller."
        case "TRUNCATED":
            return f"{e['records']} texts end after exactly {e['characters']} characters."
        case "FOREIGN_TEXT":
            less = e["usual"] - e["likelihood"]
            return f"Its letters are {less:.1f} nats a letter less likely than usual here."
        case "BOILERPLATE":
            return f"{e['records']} records differ in numbers only."
        case "UNKNOWN_LABEL":
            known = "from" in e
            return "Not valid at the record's date." if known else "Not in the list of labels."
        case "BAD_DATE":
            return f"The date is {e['is']}."
        case _:
            return f"Other sites hold about {e['peers']} like it."


def _quoted(text: str) -> str:
    flat = " ".join(text.split())
    return flat if len(flat) <= QUOTE else flat[: QUOTE - 1] + "…"


def _target(records: Records, row: int) -> str:
    return _quoted(records.targets[row]) if records.targets is not None else ""


def _labels(records: Records, quotes: bool) -> dict[str, Any]:
    """The commonest labels, how many there are and how many are rare; of answers, only how many
    differ."""
    if records.targets is None:
        return {}
    counts = Counter(target for target in records.targets if target)
    answers = len(counts) > max(LABELS, len(records.texts) / 2)
    return {
        "different": len(counts),
        "rare": 0 if answers else sum(number < RARE for number in counts.values()),
        "answers": answers,
        "most": []
        if answers or not quotes
        else [
            {"label": _quoted(label), "records": number, "share": number / counts.total()}
            for label, number in sorted(counts.items(), key=lambda item: (-item[1], item[0]))[
                :LABELS
            ]
        ],
    }


def _lengths(texts: Sequence[str]) -> dict[str, int]:
    lengths = sorted(len(text) for text in texts)
    if not lengths:
        return {}
    return {
        "shortest": lengths[0],
        "median": int(median(lengths)),
        "most": lengths[min(len(lengths) - 1, int(0.95 * len(lengths)))],
        "longest": lengths[-1],
    }


def _years(records: Records, clock: str) -> dict[str, Any]:
    known = [date for date in records.dates or () if date is not None]
    if not known or clock != "date":
        return {}
    days = [datetime.fromtimestamp(date, UTC) for date in sorted(known)]
    years = Counter(day.year for day in days)
    return {
        "first": days[0].date().isoformat(),
        "last": days[-1].date().isoformat(),
        "years": [{"year": year, "records": years[year]} for year in sorted(years)],
    }
