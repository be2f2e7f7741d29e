"""``report.html``: the page that a data manager and a coordinator read after a run.

:func:`render` turns one plain document into one file that opens offline: no script, no font, no
link to anything outside. Its content security policy admits its own style sheet, by hash, and
nothing else. A section without data is left out.
"""

import base64
import hashlib
import re
import statistics
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from importlib import resources
from typing import Any

from jinja2 import Environment
from markupsafe import Markup

from fedkola.evaluation import plots
from fedkola.evaluation.plots import curves

CLASSES = {
    "E0": "subtracted from the sum; equal bit for bit",
    "E1": "the site's stored addend was subtracted; equal bit for bit",
    "E2": "one addend was retrained without the data",
    "E3": "the cell was dropped and refilled by the other sites",
    "E4": "cells that depended on it were collected again",
    "E5": "approximate only; what remains was measured",
}
REASONS = {
    "not_held": "The federation knows about this, but this reader's view does not hold it.",
    "unknown": "No site has taught the model about this.",
}
METRICS = {
    "final": "mean accuracy of the chapters now",
    "stream": "mean accuracy over the whole stream",
    "bwt": "change since arrival (backward transfer)",
    "fwt": "head start before arrival (forward transfer)",
    "knowledge_missing_auroc": "telling missing knowledge from known (AUROC)",
}
ROOM = 10  # characters of a window's name in a narrow column
# (heading, key of a window, how it is shown, key of the whole it is a part of)
COLUMNS: tuple[tuple[str, str, Callable[[Any], str], str], ...] = (
    ("Sites answered", "answered", plots.count, "asked"),
    ("Late or away", "absent", lambda absent: plots.count(len(absent or ())), ""),
    ("Cells sealed", "sealed", plots.count, ""),
    ("Labels known", "known", plots.count, "labels"),
    ("Top-1", "top1", plots.percent, ""),
    ("Top-5", "top5", plots.percent, ""),
    ("Perplexity", "perplexity", lambda value: f"{value:.4g}", ""),
    ("Epsilon, at most", "epsilon", lambda value: f"{value:.3g}", ""),
    ("MB up", "bytes_up", plots.megabytes, ""),
    ("MB down", "bytes_down", plots.megabytes, ""),
    ("Time", "seconds", plots.seconds, ""),
)


def render(doc: Mapping[str, Any]) -> str:
    """The report as one HTML file.

    ``doc`` needs ``title`` and ``run``; everything else is optional. All text is escaped, shares
    are between 0 and 1, sizes are in bytes and times in seconds. Raises ValueError when title or
    run is missing.
    """
    if missing := [key for key in ("title", "run") if not doc.get(key)]:
        raise ValueError(
            f"a report needs title and run, {' and '.join(missing)} is missing; add it to doc"
        )
    return write("report.html.j2", _page(doc))


def write(template: str, values: Mapping[str, Any]) -> str:
    """A template of this package as one file that opens offline, its style sheet inside."""
    files = resources.files("fedkola.evaluation")
    sheets = [files.joinpath(name).read_text("utf-8") for name in ("plots.css", "page.css")]
    environment = Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    environment.filters.update(
        percent=plots.percent,
        count=plots.count,
        megabytes=plots.megabytes,
        seconds=plots.seconds,
        policy=_policy,
    )
    text = environment.from_string(files.joinpath(template).read_text("utf-8"))
    return text.render(style=Markup("\n" + "".join(sheets)), **values) + "\n"


# --- the parts of the page, in its order ----------------------------------------------------------


def _page(doc: Mapping[str, Any]) -> dict[str, Any]:
    scopes = list(doc.get("scopes") or ())
    windows = list(doc.get("windows") or ())
    names = {scope["id"]: str(scope.get("text") or scope["id"]) for scope in scopes}
    turn = str(doc.get("turn") or "window")
    return {
        "title": doc["title"],
        "run": doc["run"],
        "created": _date(doc.get("created")),
        "headline": doc.get("headline"),
        "figures": [
            {**figure, "value": _value(figure.get("value"))} for figure in doc.get("figures") or ()
        ],
        "turn": turn,
        "noun": "chapter" if any("chapter" in str(id_) for id_ in names) else "topic",
        "timeline": _timeline(windows, names),
        "grows": _grows(windows),
        "accuracy": plots.accuracy(windows),
        "heat": _heat(doc.get("matrix") or (), scopes, windows),
        "comparison": _comparison(doc.get("comparison") or ()),
        "freshness": _freshness(doc, scopes, windows),
        "lineage": _lineage(doc.get("lineage") or {}),
        "traffic": plots.traffic(windows, turn=turn),
        "curves": curves.lines(
            doc.get("curves") or {},
            title="Held-out perplexity over tokens trained on",
            across="tokens trained on",
            up="perplexity (log)",
        ),
        "samples": _samples(doc.get("samples") or ()),
        "totals": _totals(windows),
        "sites": _sites(doc.get("sites") or (), names),
        "left_out": _left_out(doc),
        "examples": _examples(doc.get("examples") or {}),
        "receipt": _receipt(doc.get("receipt") or {}),
        "privacy": [part for part in re.split(r"\n\s*\n", str(doc.get("privacy") or "")) if part],
        "commands": list(doc.get("commands") or ()),
        "machine": [(_words(key), _value(v)) for key, v in (doc.get("machine") or {}).items()],
        "plan": _flat(doc.get("plan") or {}),
    }


def _samples(entries: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """What the model said to each prompt: after the first round, half way and at the end."""
    if not entries:
        return []
    chosen = sorted({0, len(entries) // 2, len(entries) - 1})
    return [
        {
            "prompt": prompt,
            "said": [
                (f"round {entries[at]['round']}", entries[at]["texts"][place]) for at in chosen
            ],
        }
        for place, prompt in enumerate(entries[-1]["prompts"])
    ]


def _timeline(
    windows: Sequence[Mapping[str, Any]], names: Mapping[str, str]
) -> dict[str, Any] | None:
    """One row a window; a column that no window fills is left out."""
    if not windows:
        return None
    columns = [column for column in COLUMNS if any(column[1] in window for window in windows)]
    rows = []
    for at, window in enumerate(windows):
        arrived = window.get("arrived") or ()
        rows.append(
            {
                "name": _head(windows, at)[1],
                "cells": [
                    (show(window.get(key)), plots.count(window[of]) if window.get(of) else "")
                    for _, key, show, of in columns
                ],
                "arrived": [_short(names.get(scope, str(scope))) for scope in arrived],
                "absent": list((window.get("absent") or {}).items()),
                "notes": list(window.get("notes") or ()),
            }
        )
    totals = _totals(windows)
    return {
        "heads": [name for name, *_ in columns],
        "long": any(len(row["name"]) > ROOM for row in rows),
        "rows": rows,
        "totals": [show(totals[key]) if key in totals else "" for _, key, show, _ in columns],
    }


def _grows(windows: Sequence[Mapping[str, Any]]) -> bool:
    known = [amount for w in windows if (amount := plots.number(w.get("known"))) is not None]
    return len(known) > 1 and known[-1] > known[0]


def _comparison(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any] | None:
    if not rows:
        return None
    return {
        "rows": [_method(row) for row in rows],
        "bytes": any(plots.number(row.get("bytes_up")) is not None for row in rows),
        "cpu": any(plots.number(row.get("cpu_s")) is not None for row in rows),
        "interval": any(row.get("interval") for row in rows),
    }


def _left_out(doc: Mapping[str, Any]) -> list[str]:
    """What was not used, and why: exclusions by place, records that wait, other notices."""
    excluded = [
        f"{place}: " + ", ".join(f"{number} with {why}" for why, number in reasons.items())
        for place, reasons in (doc.get("excluded") or {}).items()
    ]
    parked = [
        f"{scope}: {records} records wait at their sites, which are too few or hold too little"
        for scope, records in (doc.get("parked") or {}).items()
    ]
    return [*excluded, *parked, *(str(notice) for notice in doc.get("notices") or ())]


def _heat(
    matrix: Sequence[Sequence[float | None]],
    scopes: Sequence[Mapping[str, Any]],
    windows: Sequence[Mapping[str, Any]],
) -> dict[str, Any] | None:
    """Rows of cells (kind, text), one row a scope: before its arrival, not measured, or a shade."""
    if not scopes or not any(plots.number(cell) is not None for row in matrix for cell in row):
        return None
    low, high = plots.shades(matrix)
    heads = [_head(windows, at) for at in range(len(matrix))]
    rows = []
    for column, scope in enumerate(scopes):
        first = plots.number(scope.get("first_window"))
        cells = []
        for (moment, _), row in zip(heads, matrix, strict=True):
            share = plots.number(row[column]) if column < len(row) else None
            if share is not None:
                kind = f"s{plots.shade(share, low, high)}" + (" first" if moment == first else "")
                cells.append((kind, plots.percent(share, 0)[:-1]))
            elif first is not None and moment < first:
                cells.append(("before", ""))
            else:
                cells.append(("none", plots.DASH))
        name = str(scope.get("text") or scope["id"])
        number = _tail(scope["id"]) if scope.get("text") else ""
        rows.append({"number": number, "text": _short(name), "cells": cells})
    return {
        "heads": [name if len(name) <= ROOM else f"{moment:g}" for moment, name in heads],
        "rows": rows,
        "low": low,
        "high": high,
        "steps": range(plots.STEPS),
    }


def _method(row: Mapping[str, Any]) -> dict[str, Any]:
    ours = str(row.get("method", "")).lower().startswith("fedkola")
    kind = "f1" if ours else "f0"
    edges = [plots.number(edge) for edge in row.get("interval") or ()]
    low, high = edges if len(edges) == 2 else (None, None)
    interval = None if low is None or high is None else (low, high)
    return {
        **row,
        "ours": ours,
        "interval": interval,
        "bar1": plots.bar(row.get("top1"), kind=kind, interval=interval),
        "bar5": plots.bar(row.get("top5"), kind=kind),
    }


def _freshness(
    doc: Mapping[str, Any],
    scopes: Sequence[Mapping[str, Any]],
    windows: Sequence[Mapping[str, Any]],
) -> dict[str, Any] | None:
    metrics = doc.get("metrics") or {}
    matrix = doc.get("matrix") or ()
    lags = metrics.get("freshness_lag")
    lags = dict(lags) if isinstance(lags, Mapping) else {}
    rows = []
    for column, scope in enumerate(scopes):
        cells = [plots.number(row[column]) for row in matrix if column < len(row)]
        shares = [share for share in cells if share is not None]
        rows.append(
            {
                "number": _tail(scope["id"]) if scope.get("text") else "",
                "text": _short(str(scope.get("text") or scope["id"])),
                "first": shares[0] if shares else None,
                "last": shares[-1] if shares else None,
                "lag": _lag(lags[scope["id"]]) if scope["id"] in lags else "",
                "late": plots.number(lags.get(scope["id"], 0)) != 0,
            }
        )
    plot = plots.arrivals(rows) if len(matrix) > 1 else Markup("")
    others = [
        (METRICS.get(key, _words(key)), f"{share:.3f}".replace("-", plots.MINUS))
        for key, value in metrics.items()
        if key not in ("excess_forgetting", "forgetting", "freshness_lag")
        and (share := plots.number(value)) is not None
    ]
    excess = plots.number(metrics.get("excess_forgetting"))
    classical = plots.number(metrics.get("forgetting"))
    if not (plot or lags or others) and excess is None and classical is None:
        return None
    return {
        "lags": len(lags),
        "at_once": sum(plots.number(lag) == 0 for lag in lags.values()),
        "never": sum(plots.number(lag) is None for lag in lags.values()),
        "worst": max((lag for v in lags.values() if (lag := plots.number(v))), default=0.0),
        "excess": excess,
        "classical": classical,
        "plot": plot,
        "others": others,
    }


def _lineage(lineage: Mapping[str, Any]) -> dict[str, Any] | None:
    """Versions of modules as lanes and as rows, and what became of them."""
    versions = list(lineage.get("versions") or ())
    if not versions:
        return None
    several = Counter(version["scope"] for version in versions)
    at = {version["id"]: row for row, version in enumerate(versions)}
    rows = []
    for version in versions:
        name = _short(str(version.get("text") or version["scope"]))
        heir = version.get("superseded_by") or ""
        if several[version["scope"]] > 1:
            name = f"{plots.clip(name, 29)} v{version['version']}"
        records = plots.count(version["records"])
        rows.append(
            {
                "name": name,
                "opened": version["opened"],
                "closed": version["closed"],
                "marks": version["marks"],
                "heir": at.get(heir),
                "says": f"{records} record{'' if version['records'] == 1 else 's'}",
                "state": f"superseded by {heir}" if heir else version["state"],
                "cells": len(version["cells"]),
                "records": records,
                "labels": plots.count(version["labels"]),
                "id": version["id"],
            }
        )
    return {
        "plot": plots.lives(rows, int(lineage["rounds"])),
        "rows": rows,
        "changes": list(lineage.get("changes") or ()),
        "earlier": lineage.get("earlier") or 0,
        "superseded": sum(row["heir"] is not None for row in rows),
        "current": sum(row["closed"] is None for row in rows),
    }


def _totals(windows: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    keys = ("bytes_up", "bytes_down", "seconds")
    return {key: sum(plots.number(w.get(key)) or 0.0 for w in windows) for key in keys}


def _role(role: str) -> tuple[str, str]:
    """ "late: joins in window 4" as ("late", "joins in window 4"); other roles stay whole."""
    known = re.match(r"(noisy|late|left|leaves)\b[\s:,(]*(.*?)\)?$", role, re.IGNORECASE)
    return (known[1], known[2]) if known else (role, "")


def _sites(sites: Sequence[Mapping[str, Any]], names: Mapping[str, str]) -> dict[str, Any] | None:
    """Rows of sites; a site stands out when it agrees far less with the others than they do."""
    if not sites:
        return None
    known = [a for site in sites if (a := plots.number(site.get("agreement"))) is not None]
    middle = statistics.median(known) if known else 0.0
    spread = statistics.median(abs(a - middle) for a in known) if known else 0.0
    floor = middle - max(0.1, 4 * spread)
    rows = []
    for site in sites:
        agreement = plots.number(site.get("agreement"))
        low = agreement is not None and agreement < floor
        role = str(site.get("role") or "")
        badge, detail = _role(role)
        rows.append(
            {
                **site,
                "scopes": _scopes(site.get("scopes") or (), names),
                "badge": badge,
                "detail": detail,
                "tone": "warn" if low or "noisy" in role.lower() else "plain",
                "low": low,
                "agreement": agreement,
                "bar": plots.bar(agreement, kind="f2" if low else "f0"),
            }
        )
    return {
        "rows": rows,
        "scopes": len({scope for site in sites for scope in site.get("scopes") or ()}) > 1,
        "agreement": bool(known),
        "records": sum(plots.number(site.get("records")) or 0 for site in sites),
        "low": [row["site"] for row in rows if row["low"]],
    }


def _examples(examples: Mapping[str, Any]) -> list[dict[str, Any]]:
    groups = (
        ("right", "Right", "The expected code came first."),
        ("wrong", "Wrong", "Another code came first; the expected one is marked where it follows."),
        ("missing", "Knowledge missing", "The model says that it should not be trusted here."),
    )
    return [
        {"kind": kind, "name": name, "lead": lead, "cases": [_example(e) for e in examples[kind]]}
        for kind, name, lead in groups
        if examples.get(kind)
    ]


def _example(example: Mapping[str, Any]) -> dict[str, Any]:
    answers = []
    for answer in example.get("answers") or ():
        expected = bool(example.get("truth")) and answer.get("code") == example.get("truth")
        drawn = plots.bar(answer.get("confidence"), kind="f1" if expected else "f0")
        answers.append({**answer, "expected": expected, "bar": drawn})
    reason = str(example.get("reason") or "")
    return {**example, "answers": answers, "reason": REASONS.get(reason, reason)}


def _receipt(receipt: Mapping[str, Any]) -> dict[str, Any] | None:
    if not receipt:
        return None
    cells = [
        {**cell, "before": _hash(cell.get("before")), "after": _hash(cell.get("after"))}
        for cell in receipt.get("cells") or ()
    ]
    used = sorted({str(cell.get("class", "")) for cell in cells})
    equal = receipt.get("equal_to_never_joined")
    return {
        **receipt,
        "scope": receipt.get("scope") or {},
        "cells": cells,
        "classes": [(name, CLASSES[name]) for name in used if name in CLASSES],
        "view_before": _hash(receipt.get("view_before")),
        "view_after": _hash(receipt.get("view_after")),
        "verdict": "unchecked" if equal is None else "equal" if equal is True else "unequal",
    }


# --- words ----------------------------------------------------------------------------------------


def _head(windows: Sequence[Mapping[str, Any]], at: int) -> tuple[float, str]:
    window = windows[at] if at < len(windows) else {}
    number = plots.number(window.get("number")) or float(at + 1)
    return number, str(window.get("name") or f"{number:g}")


def _lag(value: Any) -> str:
    lag = plots.number(value)
    if lag is None:
        return "not yet"
    return "on arrival" if lag == 0 else f"after {lag:g} window{'s' if lag != 1 else ''}"


def _tail(scope: str) -> str:
    """The telling end of a scope: "9" for icd10cm/chapter-9."""
    return re.sub(r"^.*/(?:chapter-)?", "", str(scope))


def _short(text: str) -> str:
    """A text without the range of codes at its end."""
    return re.sub(r"\s*\([A-Z0-9.]+-[A-Z0-9.]+\)$", "", text)


def _scopes(scopes: Sequence[str], names: Mapping[str, str]) -> list[tuple[str, str]]:
    return [(_tail(scope), _short(names.get(scope, str(scope)))) for scope in scopes]


def _hash(value: Any) -> str:
    text = str(value or "")
    return text if len(text) <= 20 else f"{text[:8]}…{text[-4:]}"


def _value(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return plots.count(value)
    if isinstance(value, float):
        return plots.DASH if plots.number(value) is None else f"{value:,.4g}"
    if isinstance(value, Sequence) and not isinstance(value, str):
        return ", ".join(map(str, value))
    return plots.DASH if value is None else str(value)


def _words(key: str) -> str:
    return key.replace("_", " ")


def _date(created: Any) -> tuple[str, str] | None:
    """(machine-readable, for readers); text that is not a date is shown as it is."""
    if not created:
        return None
    try:
        moment = datetime.fromisoformat(str(created))
    except ValueError:
        return "", str(created)
    shown = f"{moment.day} {moment:%B %Y, %H:%M}"
    if moment.tzinfo is not None:
        shown += " UTC" if moment.utcoffset() == UTC.utcoffset(None) else f" {moment:%z}"
    return str(created), shown


def _flat(tree: Mapping[str, Any], stem: str = "") -> list[tuple[str, str]]:
    """Leaves of the plan as (dotted key, value as written in TOML)."""
    rows = []
    for key, value in tree.items():
        name = f"{stem}{key}"
        if isinstance(value, Mapping):
            rows += _flat(value, f"{name}.")
        elif isinstance(value, Sequence) and not isinstance(value, str):
            rows.append((name, f"[{', '.join(map(str, value))}]"))
        else:
            rows.append((name, str(value).lower() if isinstance(value, bool) else str(value)))
    return rows


def _policy(style: Markup) -> str:
    """The content security policy of a page whose only resource is this style sheet."""
    digest = base64.b64encode(hashlib.sha256(str(style).encode()).digest()).decode()
    return f"default-src 'none'; style-src 'sha256-{digest}'; base-uri 'none'; form-action 'none'"
