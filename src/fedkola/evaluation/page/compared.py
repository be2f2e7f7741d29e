"""What a row cost, and where it wins and loses.

A win or a loss is claimed only where the paired 95 % interval over seeds excludes zero, and never
on one seed.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from fedkola.evaluation import plots
from fedkola.evaluation.cells import Found, paired, streamed, top1, uploaded
from fedkola.evaluation.page import words
from fedkola.evaluation.page.course import Told, mean_of, shown
from fedkola.evaluation.page.parts import Figure, Section, Table
from fedkola.evaluation.setups import READ_OUT, is_bound, is_own


def cost(told: Told) -> Section | None:
    """Bytes, time and storage, and the frontier of accuracy against bytes."""
    if not told.own:
        return None
    cells = told.rows[told.own]
    whole = mean_of(cells, lambda cell: float(cell["bytes_up"]))
    time = mean_of(cells, _cpu)
    says = [
        f"{shown(told.own)} sends {words.megabytes(cells)} MB up a site and window, "
        f"{plots.megabytes(whole)} MB from all sites over the whole stream, and takes "
        f"{plots.seconds(time)} of CPU time."
    ]
    if told.best:
        other = told.rows[told.best]
        ratios = [
            f"{ratio} times the {what}"
            for what, of in (("bytes", uploaded), ("time", _cpu))
            if (ratio := words.ratio(mean_of(cells, of), mean_of(other, of)))
        ]
        if ratios:
            says.append(f"That is {words.listed(ratios)} of {shown(told.best)}.")
    if all("bank_bytes" in cell for cell in cells.values()):
        size = mean_of(cells, lambda cell: float(cell["bank_bytes"]))
        held = mean_of(cells, lambda cell: float(cell["bank_cells"]))
        says.append(f"The bank then holds {held:,.0f} cells of {plots.megabytes(size)} MB in all.")
    cheaper = [
        row
        for row in told.rows
        if row != told.own and not is_bound(row)
        if mean_of(told.rows[row], uploaded) < mean_of(cells, uploaded)
        and mean_of(told.rows[row], top1) >= mean_of(cells, top1)
    ]
    says.append(
        f"As accurate or better for fewer bytes: {words.listed([shown(row) for row in cheaper])}."
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
                ratio = words.ratio(mean_of(own, measure.of), mean_of(cells, measure.of))
                size = f"{ratio} times theirs" if ratio else "they send nothing"
            mark = ", a bound" if is_bound(row) else ""
            sides[words.side(gap, measure.sign, strict=not alone)].append(
                f"{shown(row)} ({size}{mark})"
            )
        if any(sides.values()):
            rows.append((measure.name, *(", ".join(sides[s]) or plots.DASH for s in sides)))
        if sides["behind"]:
            word = "stands behind" if alone else "loses to"
            says.append(
                f"In {measure.name} {shown(told.own)} {word} {words.listed(sides['behind'])}."
            )
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
