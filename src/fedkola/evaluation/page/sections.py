"""What a page says of one row: what arrived, what was answered at once, what was lost.

Every sentence is computed, and what was not measured is not mentioned.
"""

import shlex
from collections.abc import Mapping
from statistics import fmean

from fedkola.evaluation import plots
from fedkola.evaluation.cells import Found, about_machine, asked_at_end, paired, top1
from fedkola.evaluation.page import words
from fedkola.evaluation.page.course import (
    Course,
    Told,
    course,
    first_asked,
    matched,
    mean_of,
    moments_of,
    shown,
    texts_of,
)
from fedkola.evaluation.page.parts import Figure, Section, Table
from fedkola.evaluation.setups import SETUPS, is_own


def headline(told: Told) -> str:
    """The result in two sentences: accuracy, distance to the best baseline, price, targets."""
    if not told.own:
        return "No row of this result follows the stream, so there is no course to tell."
    cells = told.rows[told.own]
    text = f"{shown(told.own)} ends at {plots.percent(mean_of(cells, top1))} top-1"
    if told.best:
        gap = paired(cells, told.rows[told.best], top1)
        text += f", {words.distance(gap)} {shown(told.best)}, {told.about}"
    text += f", for {words.megabytes(cells)} MB up a site and window."
    run = [t for t in told.result["targets"] if t["verdict"] != "not run"]
    if is_own(told.own) and run:
        missed = [t for t in run if t["verdict"] == "missed"]
        text += (
            f" It meets {len(run) - len(missed)} of the {words.count(len(run), 'target')} measured"
        )
        text += f" and misses: {'; '.join(t['name'] for t in missed)}." if missed else "."
    return text


def arrivals(told: Told) -> Section | None:
    """What arrived when."""
    if not told.own:
        return None
    cells = told.rows[told.own]
    own = list(cells.values())
    over, windows = course(cells), max(len(cell["R"]) for cell in own)
    texts, moments = texts_of(told), moments_of(told)
    number = len(over.concepts)
    later = windows - len(moments) if moments else 0
    says = [
        f"{words.count(number, 'concept')} arrived over "
        f"{words.count(windows - later, 'window')}. After each window everything was asked that "
        "could be known by then."
        + (f" {words.count(later, 'round')} followed the last one." if later else "")
    ]
    if over.since and len(set(over.since)) == 1:
        says[0] = f"{words.count(number, 'concept')} {'was' if number == 1 else 'were'} there from "
        says[0] += f"window {over.since[0]} on, of {windows}; what changed is their content."
    if any(first_asked(cell) != dict(zip(over.concepts, over.since, strict=True)) for cell in own):
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
            f" {words.listed(gone)}."
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
    own, texts = told.rows[told.own], texts_of(told)
    over = course(own)
    says = [*_fresh(told.own, own, texts)]
    if told.best:
        says += _fresh(told.best, told.rows[told.best], texts)
    for row in (told.own, told.best):
        if row and all("stale" in cell for cell in told.rows[row].values()):
            late = mean_of(told.rows[row], lambda cell: float(cell["stale"]["late"]))
            says.append(
                f"One window or more after an answer changed, {shown(row)} still gave the old one "
                f"to {plots.percent(late)} of the questions that it concerns."
            )
    if all("as_it_arrives" in cell for cell in own.values()):
        share = mean_of(own, lambda cell: float(cell["as_it_arrives"]["share"]))
        says.append(
            f"Of all questions of all windows {shown(told.own)} had {plots.percent(share)} right "
            "when they were asked."
        )
    other = course(told.rows[told.best]) if told.best else None
    beside = matched(over, other) if other else ()
    figure = Figure(
        name="accuracy",
        caption="Accuracy per concept over time, in per cent, on one scale; windows from left to "
        "right",
        drawing=plots.panels(
            [texts[concept] for concept in over.concepts],
            over.matrix,
            beside,
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
    texts, says, figures, tables = texts_of(told), [], [], []
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
        says=(f"Of {words.count(len(given), 'target')}: {', '.join(parts)}.",),
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
        f"{words.count(len(seeds), 'seed')}: {', '.join(map(str, seeds))}. "
        + (f"Rates, chosen on development records: {chosen}." if chosen else "No rate was tuned."),
        about_machine(result["machine"])
        + (f" Load while measuring: {min(loads):.1f} to {max(loads):.1f}." if loads else ""),
        "`fedkola bench report` writes this page from the result.",
    ]
    return Section(id="again", head="How to repeat it", says=tuple(says), code=command)


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
            f"{shown(row)} answered {first} of {words.count(len(judged), 'concept')} in the window "
            "of arrival, to nine tenths of the final accuracy or more"
        )
        worst = max(judged, key=lambda concept: judged[concept])
        if judged[worst] > 0:
            text += (
                f"; the slowest, {texts[worst]}, took {words.count(judged[worst], 'window')} more"
            )
        seen = [over.column(k) for k in range(len(over.concepts)) if over.column(k)]
        start, end = fmean(s[0] for s in seen), fmean(s[-1] for s in seen)
        says.append(
            f"{text}. On average a concept stood at {plots.percent(start)} on arrival and at "
            f"{plots.percent(end)} the last time it was asked"
            + ("; the bar is low because the end is." if end < start / 2 else ".")
        )
    if silent:
        says.append(
            f"{shown(row)} ends without a right answer on "
            f"{words.listed([texts[c] for c in silent])}."
        )
    return says


def _falls(
    row: str, cells: Mapping[int, Found], over: Course, texts: Mapping[str, str]
) -> list[str]:
    """How far a row fell from its best, where most, and how much of it was really lost."""
    fall = mean_of(cells, lambda cell: float(cell["forgetting"]))
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
            f"{shown(row)} fell {words.points(fall)} from its best on the average concept, most on "
            f"{texts[worst]} ({words.points(drops[worst])})."
        )
    says = [text]
    if all("excess_forgetting" in cell for cell in cells.values()):
        excess = mean_of(cells, lambda cell: float(cell["excess_forgetting"]))
        if abs(excess) < 5e-4:
            text = (
                "The same model class, given everything at once, is as good: nothing was lost"
                + ("; the question got harder." if drops[worst] > 0 else ".")
            )
        elif excess > 0:
            text = (
                f"The same model class, given everything at once, is {words.points(excess)} "
                "better: that much was lost to the order of arrival."
            )
        else:
            text = (
                f"The same model class, given everything at once, is {words.points(-excess)} "
                "worse: nothing was lost to the order of arrival."
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
