"""One page per stream: what happened, told from the figures of ``dynamic-STREAM-PROFILE.json``.

:func:`pages` turns a folder of results into Markdown, standalone HTML and SVG files. Every sentence
is computed: a win or a loss is claimed only where the paired 95 % interval over seeds excludes zero
(and never on one seed), and what was not measured is not mentioned.
"""

import json
import re
import shlex
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

from markupsafe import Markup

from fedkola.errors import DataError
from fedkola.evaluation import plots, report
from fedkola.evaluation.cells import (
    Found,
    about_machine,
    asked_at_end,
    paired,
    streamed,
    top1,
    uploaded,
)
from fedkola.evaluation.setups import OWN, READ_OUT, SETUPS, is_bound, is_own

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


@dataclass(frozen=True, slots=True, kw_only=True)
class Table:
    head: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    caption: str
    folded: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Figure:
    name: str
    caption: str
    drawing: Markup


@dataclass(frozen=True, slots=True, kw_only=True)
class Section:
    """A heading, sentences, drawings and tables, in this order; ``code`` is a command to type."""

    id: str
    head: str
    says: tuple[str, ...]
    figures: tuple[Figure, ...] = ()
    tables: tuple[Table, ...] = ()
    code: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Page:
    name: str
    title: str
    question: str
    headline: str
    sections: tuple[Section, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Told:
    """A result, and whose story is told: ``own`` (the row that the stream is about or FedKoLa where
    it ran, else the best baseline) beside ``best``, a control or the best baseline that lives on
    the stream ("" where there is none). ``about`` says what that one is."""

    result: Mapping[str, Any]
    rows: Mapping[str, Mapping[int, Found]]
    own: str
    best: str
    about: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Course:
    """R[t, k] of one row as means over seeds, concepts in order of arrival (``since``, from 1)."""

    concepts: tuple[str, ...]
    matrix: tuple[tuple[float | None, ...], ...]
    since: tuple[int, ...]

    def column(self, k: int) -> list[float]:
        """What was measured of one concept, from its arrival to the last time it was asked."""
        return [value for row in self.matrix if (value := row[k]) is not None]


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


def tell(result: Mapping[str, Any]) -> Told:
    rows: dict[str, dict[int, Found]] = {}
    for cell in result["cells"]:
        rows.setdefault(cell["row"], {})[cell["seed"]] = cell
    followed = [row for row in rows if all("R" in cell for cell in rows[row].values())]
    others = [row for row in followed if not is_own(row) and not is_bound(row)]
    best = max(others, key=lambda row: _mean(rows[row], top1), default="")
    ours = [row for row in followed if is_own(row)]
    setup = SETUPS.get(result["stream"])
    story = setup.story if setup else OWN
    own = next((row for row in (story, OWN, *ours) if row in rows), best)
    control, about = setup.control if setup and own == setup.story else ("", "")
    if control in rows:
        return Told(result=result, rows=rows, own=own, best=control, about=about)
    best = best if best != own else ""
    return Told(result=result, rows=rows, own=own, best=best, about="the best baseline")


def course(cells: Mapping[int, Found]) -> Course:
    """The mean over seeds of R, cell by cell over the seeds that asked there."""
    concepts = list(dict.fromkeys(name for cell in cells.values() for name in cell["concepts"]))
    length = max(len(cell["R"]) for cell in cells.values())
    matrix: list[list[float | None]] = []
    for t in range(length):
        row: list[float | None] = []
        for concept in concepts:
            seen = [
                value
                for cell in cells.values()
                if t < len(cell["R"]) and concept in cell["concepts"]
                if (value := cell["R"][t][cell["concepts"].index(concept)]) is not None
            ]
            row.append(fmean(seen) if seen else None)
        matrix.append(row)
    since = [
        next((t for t, row in enumerate(matrix, start=1) if row[k] is not None), length + 1)
        for k in range(len(concepts))
    ]
    order = sorted(range(len(concepts)), key=lambda k: (since[k], _natural(concepts[k])))
    return Course(
        concepts=tuple(concepts[k] for k in order),
        matrix=tuple(tuple(row[k] for k in order) for row in matrix),
        since=tuple(since[k] for k in order),
    )


# --- the sections, in the order of the page -------------------------------------------------------


def headline(told: Told) -> str:
    """The result in two sentences: accuracy, distance to the best baseline, price, targets."""
    if not told.own:
        return "No row of this result follows the stream, so there is no course to tell."
    cells = told.rows[told.own]
    text = f"{shown(told.own)} ends at {plots.percent(_mean(cells, top1))} top-1"
    if told.best:
        gap = paired(cells, told.rows[told.best], top1)
        text += f", {_distance(gap)} {shown(told.best)}, {told.about}"
    text += f", for {_mb(cells)} MB up a site and window."
    run = [t for t in told.result["targets"] if t["verdict"] != "not run"]
    if is_own(told.own) and run:
        missed = [t for t in run if t["verdict"] == "missed"]
        text += f" It meets {len(run) - len(missed)} of the {_count(len(run), 'target')} measured"
        text += f" and misses: {'; '.join(t['name'] for t in missed)}." if missed else "."
    return text


def arrivals(told: Told) -> Section | None:
    """What arrived when."""
    if not told.own:
        return None
    cells = told.rows[told.own]
    own = list(cells.values())
    over, windows = course(cells), max(len(cell["R"]) for cell in own)
    texts, moments = _texts(told), _moments(told)
    number = len(over.concepts)
    later = windows - len(moments) if moments else 0
    says = [
        f"{_count(number, 'concept')} arrived over {_count(windows - later, 'window')}. After each "
        "window everything was asked that could be known by then."
        + (f" {_count(later, 'round')} followed the last one." if later else "")
    ]
    if over.since and len(set(over.since)) == 1:
        says[0] = f"{_count(number, 'concept')} {'was' if number == 1 else 'were'} there from "
        says[0] += f"window {over.since[0]} on, of {windows}; what changed is their content."
    if any(_since(cell) != dict(zip(over.concepts, over.since, strict=True)) for cell in own):
        says.append(
            "The order of arrival differs between seeds: the earliest window is given, and a mean "
            "is over the seeds that asked there."
        )
    gone = [
        texts[concept]
        for k, concept in enumerate(over.concepts)
        if over.matrix and over.matrix[-1][k] is None
    ]
    if gone:
        says.append(
            f"{len(gone)} of them {'was' if len(gone) == 1 else 'were'} no longer asked at the end:"
            f" {_list(gone)}."
        )
    rows = []
    for t in range(1, windows + 1):
        new = [texts[c] for c, since in zip(over.concepts, over.since, strict=True) if since == t]
        if not new and windows > plots.COLUMNS:
            continue
        asked = fmean(cell["windows"][t - 1]["asked"] for cell in cells.values())
        right = fmean(cell["windows"][t - 1]["top1"] for cell in cells.values())
        # A run may go on after its last window, for sites that were away.
        name = f"{t} ({moments[t - 1]})" if t <= len(moments) else str(t)
        rows.append((name, "; ".join(new) or "nothing new", f"{asked:,.0f}", plots.percent(right)))
    end = own[0]["untouched"]
    says.append(
        f"At the end {plots.count(end['asked'])} questions that chose nothing were asked, and "
        f"{plots.count(end['nodes'])} answers competed for each."
        if asked_at_end(own[0])
        else "Every question was asked once, as it arrived: final top-1 is the share that was "
        f"right then. In the end {plots.count(end['nodes'])} answers competed."
    )
    caption = f"The windows, and how {shown(told.own)} answered in each"
    head = ("window", "arrived", "asked", "right")
    return Section(
        id="arrived",
        head="What arrived, and when",
        says=tuple(says),
        tables=(Table(head=head, rows=tuple(rows), caption=caption),),
    )


def at_once(told: Told) -> Section | None:
    """What was answered in the window of its arrival, and whether answers were out of date."""
    if not told.own:
        return None
    own, texts = told.rows[told.own], _texts(told)
    over = course(own)
    says = [*_fresh(told.own, own, texts)]
    if told.best:
        says += _fresh(told.best, told.rows[told.best], texts)
    for row in (told.own, told.best):
        if row and all("stale" in cell for cell in told.rows[row].values()):
            late = _mean(told.rows[row], lambda cell: float(cell["stale"]["late"]))
            says.append(
                f"One window or more after an answer changed, {shown(row)} still gave the old one "
                f"to {plots.percent(late)} of the questions that it concerns."
            )
    if all("as_it_arrives" in cell for cell in own.values()):
        share = _mean(own, lambda cell: float(cell["as_it_arrives"]["share"]))
        says.append(
            f"Of all questions of all windows {shown(told.own)} had {plots.percent(share)} right "
            "when they were asked."
        )
    other = course(told.rows[told.best]) if told.best else None
    matched = _matched(over, other) if other else ()
    figure = Figure(
        name="accuracy",
        caption="Accuracy per concept over time, in per cent, on one scale; windows from left to "
        "right",
        drawing=plots.panels(
            [texts[concept] for concept in over.concepts],
            over.matrix,
            matched,
            who=(shown(told.own), shown(told.best)),
        ),
    )
    return Section(
        id="at-once",
        head="What was answered at once",
        says=tuple(says),
        figures=(figure,) if figure.drawing else (),
    )


def lost(told: Told) -> Section | None:
    """What was known once and is not known now, with the forgetting matrix."""
    if not told.own:
        return None
    texts, says, figures, tables = _texts(told), [], [], []
    rows = [row for row in (told.own, told.best) if row]
    courses = {row: course(told.rows[row]) for row in rows}
    span = plots.shades([line for over in courses.values() for line in over.matrix])
    for row in rows:
        cells, over = told.rows[row], courses[row]
        says += _falls(row, cells, over, texts)
        names = [texts[concept] for concept in over.concepts]
        drawing = plots.heat(names, over.matrix, span=span)
        if not drawing:
            continue
        caption = f"{shown(row)}: accuracy on every concept after every window, in per cent"
        figures.append(Figure(name=f"matrix-{row}", caption=caption, drawing=drawing))
        grouped = plots.grouped(over.matrix)
        tables.append(
            Table(
                head=("concept", *(name for name, _ in grouped)),
                rows=tuple(
                    (name, *(plots.percent(line[k]) for _, line in grouped))
                    for k, name in enumerate(names)
                ),
                caption=f"{shown(row)}: the same as numbers, by window",
                folded=True,
            )
        )
    return Section(
        id="lost",
        head="What was lost",
        says=tuple(says),
        figures=tuple(figures),
        tables=tuple(tables),
    )


def cost(told: Told) -> Section | None:
    """Bytes, time and storage, and the frontier of accuracy against bytes."""
    if not told.own:
        return None
    cells = told.rows[told.own]
    whole = _mean(cells, lambda cell: float(cell["bytes_up"]))
    time = _mean(cells, _cpu)
    says = [
        f"{shown(told.own)} sends {_mb(cells)} MB up a site and window, "
        f"{plots.megabytes(whole)} MB from all sites over the whole stream, and takes "
        f"{plots.seconds(time)} of CPU time."
    ]
    if told.best:
        other = told.rows[told.best]
        ratios = [
            f"{ratio} times the {what}"
            for what, of in (("bytes", uploaded), ("time", _cpu))
            if (ratio := _ratio(_mean(cells, of), _mean(other, of)))
        ]
        if ratios:
            says.append(f"That is {_list(ratios)} of {shown(told.best)}.")
    if all("bank_bytes" in cell for cell in cells.values()):
        size = _mean(cells, lambda cell: float(cell["bank_bytes"]))
        held = _mean(cells, lambda cell: float(cell["bank_cells"]))
        says.append(f"The bank then holds {held:,.0f} cells of {plots.megabytes(size)} MB in all.")
    cheaper = [
        row
        for row in told.rows
        if row != told.own and not is_bound(row)
        if _mean(told.rows[row], uploaded) < _mean(cells, uploaded)
        and _mean(told.rows[row], top1) >= _mean(cells, top1)
    ]
    says.append(
        f"As accurate or better for fewer bytes: {_list([shown(row) for row in cheaper])}."
        if cheaper
        else "No other row that could be deployed is as accurate for fewer bytes."
    )
    figure = Figure(
        name="frontier",
        caption="Final top-1 against bytes, with 95 % intervals; the step joins the rows that no "
        "cheaper row beats",
        drawing=plots.frontier(_marks(told)),
    )
    return Section(id="cost", head="What it cost", says=tuple(says), figures=(figure,))


@dataclass(frozen=True, slots=True, kw_only=True)
class Measure:
    """One figure on which rows are compared; ``sign`` is +1 where more is better."""

    name: str
    key: str
    of: Callable[[Found], float]
    sign: int
    unit: str


def _cpu(cell: Found) -> float:
    return float(cell["cpu_s"])


MEASURES = (
    Measure(name="final top-1", key="untouched", of=top1, sign=1, unit="points"),
    Measure(
        name="top-5",
        key="untouched",
        of=lambda cell: float(cell["untouched"]["top5"]),
        sign=1,
        unit="points",
    ),
    Measure(
        name="accuracy while it streams",
        key="stream",
        of=streamed,
        sign=1,
        unit="points",
    ),
    Measure(
        name="forgetting",
        key="forgetting",
        of=lambda cell: float(cell["forgetting"]),
        sign=-1,
        unit="points",
    ),
    Measure(name="bytes up", key="bytes_up_per_site_window", of=uploaded, sign=-1, unit="times"),
    Measure(name="CPU time", key="cpu_s", of=_cpu, sign=-1, unit="times"),
)


def compared(told: Told) -> Section | None:
    """Where the told row wins and loses, to whom and by how much."""
    if not told.own or len(told.rows) == 1:
        return None
    own = told.rows[told.own]
    rivals = dict(told.rows) | {
        f"{row}{READ_OUT}": {
            seed: {"untouched": cell["readout"], "cpu_s": cell["cpu_s"]}
            for seed, cell in cells.items()
        }
        for row, cells in told.rows.items()
        if all("readout" in cell for cell in cells.values())
    }
    rows, says = [], []
    alone = len(own) == 1
    for measure in MEASURES:
        sides: dict[str, list[str]] = {"behind": [], "level": [], "ahead": []}
        for row, cells in rivals.items():
            if row == told.own or not all(measure.key in cell for cell in cells.values()):
                continue
            if measure.unit == "times" and measure.name == "bytes up" and is_bound(row):
                continue
            gap = paired(own, cells, measure.of)
            if gap is None:
                continue
            size = f"{abs(100 * gap['mean']):.1f} points"
            if measure.unit == "times":
                ratio = _ratio(_mean(own, measure.of), _mean(cells, measure.of))
                size = f"{ratio} times theirs" if ratio else "they send nothing"
            mark = ", a bound" if is_bound(row) else ""
            sides[side(gap, measure.sign, strict=not alone)].append(f"{shown(row)} ({size}{mark})")
        if any(sides.values()):
            rows.append((measure.name, *(", ".join(sides[s]) or plots.DASH for s in sides)))
        if sides["behind"]:
            word = "stands behind" if alone else "loses to"
            says.append(f"In {measure.name} {shown(told.own)} {word} {_list(sides['behind'])}.")
    if not says:
        says.append(
            f"{shown(told.own)} {'stands behind' if alone else 'loses to'} no row in anything that "
            "was measured."
        )
    if alone:
        says.append("This is one seed: it shows which figure is larger, and no more than that.")
    else:
        says.append(
            "A difference counts where the 95 % interval of the differences, paired by seed, "
            "excludes zero."
        )
    caption = (
        f"{shown(told.own)} against the others, with the difference of the means; for bytes and "
        "CPU time, what it takes"
    )
    name = shown(told.own)
    head = ("measure", f"better than {name}", "no difference shown", f"worse than {name}")
    return Section(
        id="against",
        head="Where it loses, and to whom",
        says=tuple(says),
        tables=(Table(head=head, rows=tuple(rows), caption=caption), _figures(told)),
    )


def side(gap: Mapping[str, float], sign: int, *, strict: bool) -> str:
    """ "ahead", "behind" or "level" from a paired difference; on one seed only its sign counts."""
    low, high = sorted((sign * gap["low"], sign * gap["high"]))
    if not strict:
        low = high = sign * gap["mean"]
    return "ahead" if low > 0 else "behind" if high < 0 else "level"


def targets(told: Told) -> Section | None:
    """The targets of the stream, each met, missed or not run."""
    given = told.result["targets"]
    if not given:
        return None
    count = {v: sum(t["verdict"] == v for t in given) for v in ("met", "missed", "not run")}
    parts = [f"{number} {verdict}" for verdict, number in count.items() if number]
    rows = tuple((t["name"], t["bound"], t["value"] or plots.DASH, t["verdict"]) for t in given)
    head = ("target", "bound", "value", "verdict")
    return Section(
        id="targets",
        head="Targets",
        says=(f"Of {_count(len(given), 'target')}: {', '.join(parts)}.",),
        tables=(Table(head=head, rows=rows, caption="Value against bound"),),
    )


def again(told: Told) -> Section:
    """How to get these numbers again, and on what they were measured."""
    result = told.result
    stream, profile = result["stream"], result["profile"]
    size = SETUPS[stream].sizes.get(profile) if stream in SETUPS else None
    seeds = sorted({cell["seed"] for cell in result["cells"]})
    command = f"fedkola bench dynamic --stream {stream} --profile {profile}"
    if size is None or tuple(result["rows"]) != size.rows:
        command += f" --rows {shlex.quote(','.join(result['rows']))}"
    if size is None or len(seeds) != size.seeds:
        command += f" --seeds {len(seeds)}"
    chosen = ", ".join(f"{shown(row)} {rate:g}" for row, rate in result["rates"].items())
    loads = [
        load
        for cell in result["cells"]
        if (load := plots.number((cell.get("machine") or {}).get("load"))) is not None
    ]
    says = [
        f"{_count(len(seeds), 'seed')}: {', '.join(map(str, seeds))}. "
        + (f"Rates, chosen on development records: {chosen}." if chosen else "No rate was tuned."),
        about_machine(result["machine"])
        + (f" Load while measuring: {min(loads):.1f} to {max(loads):.1f}." if loads else ""),
        "`fedkola bench report` writes this page from the result.",
    ]
    return Section(id="again", head="How to repeat it", says=tuple(says), code=command)


# --- as files -------------------------------------------------------------------------------------


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


def shown(row: str) -> str:
    """A row as readers know it."""
    if row == OWN:
        return "FedKoLa"
    return f"FedKoLa {row.removeprefix(OWN + '-')}" if is_own(row) else row


# --- sentences ------------------------------------------------------------------------------------


def _fresh(row: str, cells: Mapping[int, Found], texts: Mapping[str, str]) -> list[str]:
    """How soon a row answered each concept, by its slowest seed."""
    over = course(cells)
    slowest: dict[str, float] = {}
    for cell in cells.values():
        for concept, lag in zip(cell["concepts"], cell["lags"], strict=True):
            if lag is not None:
                slowest[concept] = max(slowest.get(concept, 0.0), lag)
    silent = [c for k, c in enumerate(over.concepts) if c in slowest and over.column(k)[-1] == 0]
    judged = {concept: lag for concept, lag in slowest.items() if concept not in silent}
    says = []
    if judged:
        first = sum(lag == 0 for lag in judged.values())
        text = (
            f"{shown(row)} answered {first} of {_count(len(judged), 'concept')} in the window of "
            "arrival, to nine tenths of the final accuracy or more"
        )
        worst = max(judged, key=lambda concept: judged[concept])
        if judged[worst] > 0:
            text += f"; the slowest, {texts[worst]}, took {_count(judged[worst], 'window')} more"
        seen = [over.column(k) for k in range(len(over.concepts)) if over.column(k)]
        start, end = fmean(s[0] for s in seen), fmean(s[-1] for s in seen)
        says.append(
            f"{text}. On average a concept stood at {plots.percent(start)} on arrival and at "
            f"{plots.percent(end)} the last time it was asked"
            + ("; the bar is low because the end is." if end < start / 2 else ".")
        )
    if silent:
        says.append(
            f"{shown(row)} ends without a right answer on {_list([texts[c] for c in silent])}."
        )
    return says


def _since(cell: Found) -> dict[str, int]:
    """The window (from 1) in which one seed first asked each concept that it asked."""
    return {
        concept: next(t for t, row in enumerate(cell["R"], start=1) if row[k] is not None)
        for k, concept in enumerate(cell["concepts"])
        if any(row[k] is not None for row in cell["R"])
    }


def _falls(
    row: str, cells: Mapping[int, Found], over: Course, texts: Mapping[str, str]
) -> list[str]:
    """How far a row fell from its best, where most, and how much of it was really lost."""
    fall = _mean(cells, lambda cell: float(cell["forgetting"]))
    drops = {
        concept: max(column) - column[-1]
        for k, concept in enumerate(over.concepts)
        if (column := over.column(k))
    }
    worst = max(drops, key=lambda concept: drops[concept])
    if drops[worst] <= 0:
        text = f"{shown(row)} ends at its best on every concept."
    else:
        text = (
            f"{shown(row)} fell {_points(fall)} from its best on the average concept, most on "
            f"{texts[worst]} ({_points(drops[worst])})."
        )
    says = [text]
    if all("excess_forgetting" in cell for cell in cells.values()):
        excess = _mean(cells, lambda cell: float(cell["excess_forgetting"]))
        if abs(excess) < 5e-4:
            text = (
                "The same model class, given everything at once, is as good: nothing was lost"
                + ("; the question got harder." if drops[worst] > 0 else ".")
            )
        elif excess > 0:
            text = (
                f"The same model class, given everything at once, is {_points(excess)} better: "
                "that much was lost to the order of arrival."
            )
        else:
            text = (
                f"The same model class, given everything at once, is {_points(-excess)} worse: "
                "nothing was lost to the order of arrival."
            )
        says.append(text)
    if all("equal_to_one_shot" in cell for cell in cells.values()):
        unequal = [str(seed) for seed, cell in cells.items() if not cell["equal_to_one_shot"]]
        says.append(
            f"Its integers differ from the sum of everything at once in seed {', '.join(unequal)}."
            if unequal
            else "Its integers equal the sum of everything at once, bit for bit, in every seed."
        )
    return says


def _distance(gap: Mapping[str, float] | None) -> str:
    """A paired difference as words that stand before a name."""
    if gap is None:
        return "on no common seed with"
    size = _points(abs(gap["mean"]))
    if gap["mean"] == 0:
        return "level with"
    if gap["n"] == 1:
        return f"on one seed {size} {'above' if gap['mean'] > 0 else 'below'}"
    where, low, high = side(gap, 1, strict=True), gap["low"], gap["high"]
    if where == "behind":  # how far behind
        low, high = -high, -low
    interval = f"[{100 * low:.1f}, {100 * high:.1f}]".replace("-", plots.MINUS)
    if where == "level":
        return f"not told apart (difference {interval} points) from"
    return f"{size} {interval} {'ahead of' if where == 'ahead' else 'behind'}"


def _figures(told: Told) -> Table:
    """Every row with its figures, the best first."""
    heads = {"top1": "final top-1", "stream": "while it streams", "forgetting": "forgetting"}
    heads |= {"megabytes": "MB up, site and window", "cpu_s": "CPU s"}
    summary = told.result["summary"]
    order = sorted(summary, key=lambda row: -summary[row]["top1"]["mean"])

    def text(name: str, found: Mapping[str, float] | None) -> str:
        if found is None:
            return plots.DASH
        if name == "cpu_s":
            return plots.count(found["mean"])
        if name == "megabytes":
            return plots.megabytes(1e6 * found["mean"])
        mean = plots.percent(found["mean"])
        if found["n"] == 1:
            return mean
        low, high = (plots.percent(found[edge])[:-1] for edge in ("low", "high"))
        return f"{mean} [{low}, {high}]"

    rows = tuple(
        (
            shown(row) + (" (bound)" if is_bound(row) else ""),
            *(text(name, summary[row].get(name)) for name in heads),
        )
        for row in order
    )
    caption = "All rows: mean over seeds with a 95 % bootstrap interval"
    return Table(head=("row", *heads.values()), rows=rows, caption=caption)


def _marks(told: Told) -> list[plots.Mark]:
    found = []
    for row, figures in told.result["summary"].items():
        top1, sent = figures["top1"], figures["megabytes"]["mean"]
        kind = "own" if is_own(row) else "bound" if is_bound(row) else "other"
        found.append(
            plots.Mark(
                name=shown(row),
                share=top1["mean"],
                low=top1["low"],
                high=top1["high"],
                megabytes=sent,
                kind=kind,
            )
        )
    return found


def _matched(over: Course, other: Course) -> tuple[tuple[float | None, ...], ...]:
    """The other row's matrix with its concepts in the order of the first."""
    at = {concept: k for k, concept in enumerate(other.concepts)}
    return tuple(
        tuple(row[at[concept]] if concept in at else None for concept in over.concepts)
        for row in other.matrix
    )


# --- words ----------------------------------------------------------------------------------------


def _read(path: Path) -> Mapping[str, Any]:
    try:
        found = json.loads(path.read_text("utf-8"))
    except ValueError as error:
        raise DataError(f"{path} is not JSON ({error}); measure it again or delete it") from error
    if not isinstance(found, dict):
        raise DataError(f"{path} holds no result but a {type(found).__name__}; delete it")
    return found


def _texts(told: Told) -> dict[str, str]:
    """Concepts in words: as the stream calls them, else the telling end of their id."""
    cells = [cell for seeds in told.rows.values() for cell in seeds.values()]
    given = {c: text for cell in cells for c, text in cell.get("texts", {}).items() if text}
    found: dict[str, str] = {}
    for concept in (c for cell in cells for c in cell.get("concepts", ())):
        tail = re.sub(r"^.*/", "", concept).replace("-", " ").replace("_", " ")
        text = str(given.get(concept) or tail or "(no name)")
        found[concept] = re.sub(r"\s*\([A-Z0-9.]+-[A-Z0-9.]+\)$", "", text)
    return found


def _moments(told: Told) -> tuple[str, ...]:
    """Names of the windows, where the result holds them and all seeds have the same."""
    named = {tuple(map(str, cell.get("moments", ()))) for cell in told.rows[told.own].values()}
    return named.pop() if len(named) == 1 else ()


def _mean(cells: Mapping[int, Found], of: Callable[[Found], float]) -> float:
    return fmean(of(cell) for cell in cells.values())


def _mb(cells: Mapping[int, Found]) -> str:
    return plots.megabytes(_mean(cells, uploaded))


def _points(share: float) -> str:
    """0.0172 as "1.7 points"."""
    return f"{100 * share:.1f} points"


def _ratio(one: float, other: float) -> str:
    """6.0 to 4.5 as "1.3"; "" where the other is nothing."""
    if other <= 0:
        return ""
    ratio = one / other
    return f"{ratio:,.0f}" if ratio >= 9.95 else f"{ratio:.2g}"


def _count(number: float, noun: str) -> str:
    return f"{number:g} {noun}{'' if number == 1 else 's'}"


def _list(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"


def _natural(text: str) -> list[tuple[int, str]]:
    """Order in which 9 comes before 10."""
    return [(int(part or 0), other) for part, other in re.findall(r"(\d*)(\D*)", text)]


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
