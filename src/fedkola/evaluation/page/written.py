"""Results to pages, and pages to Markdown, standalone HTML and SVG files."""

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from markupsafe import Markup

from fedkola.errors import DataError
from fedkola.evaluation import plots, report
from fedkola.evaluation.page.compared import compared, cost
from fedkola.evaluation.page.course import tell
from fedkola.evaluation.page.parts import Page
from fedkola.evaluation.page.sections import again, arrivals, at_once, headline, lost, targets

SMALL = "quick"
NEEDED = (
    "question",
    "stream",
    "profile",
    "cells",
    "rows",
    "summary",
    "targets",
    "machine",
    "rates",
)

NOTE = "<!-- Written by `fedkola bench report`. Change the results, not this page. -->\n"


def pages(results: Path, *, profile: str = "") -> dict[str, str]:
    """Every file of ``docs/results``: path within it -> content. ``profile`` chooses one; without
    it the quick ones are left out.

    Raises DataError where the folder holds no result of the suite ``dynamic`` that can be told, or
    one that is not JSON.
    """
    found: dict[str, str] = {}
    told: list[Page] = []
    skipped: list[tuple[str, str]] = []
    for path in sorted(results.glob("dynamic-*.json")):
        result = _read(path)
        if result.get("profile") != profile if profile else result.get("profile") == SMALL:
            continue
        if why := unreadable(result):
            skipped.append((path.stem, why))
            continue
        page = explain(result)
        told.append(page)
        found[f"{page.name}.md"] = markdown(page)
        found[f"{page.name}.html"] = html(page)
        for section in page.sections:
            for figure in section.figures:
                found[f"{page.name}/{figure.name}.svg"] = plots.standalone(figure.drawing)
    if not told and not skipped:
        raise DataError(
            f"{results} holds no dynamic-STREAM-PROFILE.json"
            + (f" of profile {profile}" if profile else " that is not quick")
            + "; measure one with `fedkola bench dynamic`, or name its profile"
        )
    return {"README.md": index(told, skipped), **found}


def unreadable(result: Mapping[str, Any]) -> str:
    """Why a result cannot be told ("" if it can): files of earlier versions lack parts."""
    if lacking := [key for key in NEEDED if key not in result]:
        return f"it was written by an earlier version and has no {', '.join(lacking)}"
    if not all("row" in cell for cell in result["cells"]):
        return "it was written by an earlier version, whose cells name no row"
    return "" if result["cells"] else "it has no cells"


def explain(result: Mapping[str, Any]) -> Page:
    """The page of one result."""
    told = tell(result)
    sections = [
        arrivals(told),
        at_once(told),
        lost(told),
        cost(told),
        compared(told),
        targets(told),
        again(told),
    ]
    return Page(
        name=f"dynamic-{result['stream']}-{result['profile']}",
        title=f"{result['stream']}, profile {result['profile']}",
        question=result["question"],
        headline=headline(told),
        sections=tuple(section for section in sections if section is not None),
    )


def markdown(page: Page) -> str:
    """The page in Markdown, its drawings as files in a folder of its name."""
    lines = [NOTE, f"# {page.title}", "", _safe(page.question), "", f"**{_safe(page.headline)}**"]
    for section in page.sections:
        lines += ["", f"## {section.head}"]
        for sentence in section.says:
            lines += ["", _safe(sentence)]
        if section.code:
            lines += ["", "```console", f"$ {section.code}", "```"]
        for figure in section.figures:
            alt = re.sub(r"[\[\]]", "", _description(figure.drawing))
            lines += ["", f"![{_safe(alt)}]({page.name}/{figure.name}.svg)"]
            lines += ["", f"*{_safe(figure.caption)}.*"]
        for table in section.tables:
            drawn = [
                f"| {' | '.join(map(_safe, table.head))} |",
                "|---" * len(table.head) + "|",
                *(f"| {' | '.join(map(_safe, row))} |" for row in table.rows),
            ]
            if table.folded:
                summary = Markup("<summary>{}</summary>").format(table.caption)
                drawn = ["<details>", str(summary), "", *drawn, "", "</details>"]
            lines += ["", *drawn]
    lines += ["", f"The same [as one HTML file]({page.name}.html)."]
    return "\n".join(lines) + "\n"


def html(page: Page) -> str:
    """The page as one file that opens offline, by day and in the dark."""
    return report.write("page.html.j2", {"page": page, "coded": _coded})


def index(told: Sequence[Page], skipped: Sequence[tuple[str, str]]) -> str:
    """The first page of the folder: one line a stream."""
    lines = [
        NOTE,
        "# Results",
        "",
        "One page a stream, written from the files in `benchmarks/results`; every sentence on them "
        "is computed.",
        "",
    ]
    for page in told:
        lines += [f"- [{page.title}]({page.name}.md): {_safe(page.headline)}"]
    for name, why in skipped:
        lines += [f"- {name}: not told, since {why}. Measure it again."]
    return "\n".join(lines) + "\n"


def _read(path: Path) -> Mapping[str, Any]:
    try:
        found = json.loads(path.read_text("utf-8"))
    except ValueError as error:
        raise DataError(f"{path} is not JSON ({error}); measure it again or delete it") from error
    if not isinstance(found, dict):
        raise DataError(f"{path} holds no result but a {type(found).__name__}; delete it")
    return found


def _safe(text: str) -> str:
    """Text that Markdown shows as it is; words in backquotes stay code."""
    parts = re.split(r"(`[^`]*`)", text)
    return "".join(
        part if part.startswith("`") else re.sub(r"([\\*_|<>\[\]])", r"\\\1", part)
        for part in parts
    )


def _coded(text: str) -> Markup:
    """Text for HTML; words in backquotes become code."""
    parts = re.split(r"`([^`]*)`", text)
    return Markup("").join(
        Markup("<code>{}</code>").format(part) if at % 2 else part for at, part in enumerate(parts)
    )


def _description(drawing: Markup) -> str:
    found = re.search(r"<title>(.*?)</title><desc>(.*?)</desc>", drawing)
    return Markup(f"{found[1]}. {found[2]}").unescape() if found else ""
