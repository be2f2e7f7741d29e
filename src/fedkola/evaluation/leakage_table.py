"""The verdict of the suite ``audit`` and its table, from cells that were measured."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from fedkola.audit.intervals import rate_interval
from fedkola.audit.one_run import tpr_bound
from fedkola.evaluation import cells as marks
from fedkola.evaluation import metrics
from fedkola.evaluation.cells import Found

OFF, TLS, MASKED, GATE, DP = "off", "TLS", "masked", "gate on", "masked + DP"
ROWS: Mapping[str, str] = {
    OFF: "plain sums, one plain step between exchanges",
    TLS: "the recording of off, as a network under TLS sees it",
    MASKED: "the same in secure sums",
    GATE: "secure sums, rare exchange, the gate waives nothing",
    DP: "the same with noise at every site",
}
EPSILON, DELTA = 3.0, 1e-4
EXACT, PRESENCE, SECONDS = 0.95, 0.6, 300.0


def judge(found: Sequence[Found]) -> list[dict[str, str]]:
    """The lines of a suite: what must hold of the rows that were run."""
    by = {row: [cell for cell in found if cell["row"] == row] for row in ROWS}
    return [
        _read_off(by[OFF]),
        _chance(by[MASKED] + by[GATE] + by[DP]),
        *_sums(by[MASKED], by[GATE]),
        _sealed(by[OFF]),
        _gated(by[OFF] + by[MASKED]),
        _presence(by[DP]),
        _memory(by[DP], by[GATE]),
        _members(by[DP]),
        _timed(found),
        _controlled(found),
    ]


def _read_off(cells: Sequence[Found]) -> dict[str, str]:
    name, bound = "sequences read from single answers, nothing held back", f">= {EXACT}"
    told = _of(cells, "dager", "single", "wire")
    if not told:
        return marks.target(name, bound, "", None)
    count = sum(one["updates"] for one in told)
    hits = round(sum(one["metrics"]["exact"]["value"] * one["updates"] for one in told))
    rate = rate_interval(hits, count)
    value = f"{_interval(asdict(rate))}, {count} answers of one sequence"
    return marks.target(name, bound, value, rate.value >= EXACT)


def _chance(cells: Sequence[Found]) -> dict[str, str]:
    name, bound = "attacks on single masked answers, wire and server", "all at chance"
    told = [one for cell in cells for one in _in(cell, target="single")]
    if not told:
        return marks.target(name, bound, "", None)
    fine = [one for one in told if one["verdict"] == "at_null"]
    odd = [f"{one['name']} {one['verdict']}" for one in told if one["verdict"] != "at_null"]
    value = f"{len(fine)} of {len(told)} at chance{': ' if odd else ''}{', '.join(odd[:3])}"
    return marks.target(name, bound, value, len(fine) == len(told))


def _sums(once: Sequence[Found], rare: Sequence[Found]) -> list[dict[str, str]]:
    """What a sum still tells has no bound where the gate was waived; it has one under the gate."""
    lines = []
    for name, bound, cells in (
        ("sequences read from secure sums of one plain step", "stated", once),
        ("sequences read from secure sums that the gate lets pass", "<= 0.05", rare),
    ):
        told = _of(cells, "dager", "sum", "server")
        if not told:
            lines.append(marks.target(name, bound, "", None))
            continue
        exact = max(one["metrics"]["exact"]["value"] for one in told)
        recall = max(one["metrics"]["token_recall"]["value"] for one in told)
        value = f"{exact:.3f} exact, {recall:.3f} of tokens"
        lines.append(marks.target(name, bound, value, bound == "stated" or exact <= 0.05))
    return lines


def _sealed(cells: Sequence[Found]) -> dict[str, str]:
    name, bound = "what a network under TLS can read", "no content, equal lengths"
    views = [view for cell in cells for view in cell["views"] if view["observer"] == "tls"]
    told = _of(cells, "sizes", "transcript", "tls")
    if not views or not told:
        return marks.target(name, bound, "", None)
    unequal = sum(one["metrics"]["violations"]["value"] for one in told)
    readable = sum(view["readable"] for view in views)
    frames = sum(view["frames"] for view in views)
    value = f"{readable} of {frames} messages, {unequal:.0f} questions of unequal lengths"
    return marks.target(name, bound, value, not readable and not unequal)


def _gated(cells: Sequence[Found]) -> dict[str, str]:
    name, bound = "the gate on plans of one plain step", "refused"
    codes = sorted({cell["refused"] or "let pass" for cell in cells})
    return marks.target(name, bound, ", ".join(codes), codes == ["gate_span"] if cells else None)


def _presence(cells: Sequence[Found]) -> dict[str, str]:
    name = f"telling used words from others in sums, epsilon {EPSILON:g} (AUC, equal priors)"
    told = _of(cells, "presence", "sum", "server")
    if not told:
        return marks.target(name, f"<= {PRESENCE}", "", None)
    values = [one["metrics"]["matched_auc"] for one in told]
    worst = max(values, key=lambda value: value["value"])
    every = max(one["metrics"]["presence_auc"]["value"] for one in told)
    nulls = max(one["metrics"]["presence_auc"]["null"] for one in told)
    value = (
        f"{_interval(worst)}; over all words {every:.3f} where knowing nothing gives {nulls:.3f}"
    )
    return marks.target(name, f"<= {PRESENCE}", value, worst["value"] <= PRESENCE)


def _memory(private: Sequence[Found], open_: Sequence[Found]) -> dict[str, str]:
    name, bound = f"bits of a secret of one patient, 64 copies, epsilon {EPSILON:g}", "at its null"
    told, other = (_of(cells, "canary", "model", "model") for cells in (private, open_))
    if not told or not other:
        return marks.target(name, bound, "", None)
    ours = [one["metrics"]["exposure_unit_64"] for one in told]
    theirs = [one["metrics"]["exposure_unit_64"] for one in other]
    learnt = all(one["low"] > one["null"] for one in theirs)
    value = f"{max(one['value'] for one in ours):.2f} of 16 bits, the null reaches "
    value += f"{ours[0]['null']:.2f}; without noise {min(one['value'] for one in theirs):.2f}"
    met = all(one["value"] <= one["null"] for one in ours)
    return marks.target(name, bound, value, met if learnt else None)


def _members(cells: Sequence[Found]) -> dict[str, str]:
    limit = tpr_bound(EPSILON, DELTA)
    name = f"members found at 1 % false alarms, epsilon {EPSILON:g}"
    told = [
        one for cell in cells for one in _in(cell, name="membership") if one["target"] != "single"
    ]
    if not told:
        return marks.target(name, f"<= {limit:.3f}", "", None)
    worst = max((one["metrics"]["tpr_at_1_fpr"] for one in told), key=lambda found: found["value"])
    value = _interval(worst)
    return marks.target(name, f"<= {limit:.3f}", value, worst["value"] <= limit)


def _timed(cells: Sequence[Found]) -> dict[str, str]:
    longest = max((cell["audit_seconds"] for cell in cells), default=None)
    value = "" if longest is None else f"{longest:.0f} s"
    met = None if longest is None else longest <= SECONDS
    return marks.target("longest audit of a run", f"<= {SECONDS:.0f} s", value, met)


def _controlled(cells: Sequence[Found]) -> dict[str, str]:
    told = [one for cell in cells for one in cell["attacks"]]
    good = sum(one["positive_control"]["passed"] for one in told)
    broken = sorted({one["name"] for one in told if not one["positive_control"]["passed"]})
    value = f"{good} of {len(told)}{': broken ' if broken else ''}{', '.join(broken)}"
    met = good == len(told) if told else None
    return marks.target("attacks that succeed with the defence off", "all", value, met)


# --- the table ------------------------------------------------------------------------------------

# Column -> (attack, target, measure).
COLUMNS: Mapping[str, tuple[str, str, str]] = {
    "one answer: sequences": ("dager", "single", "exact"),
    "tokens": ("embedding_rows", "single", "token_recall"),
    "sum: sequences": ("dager", "sum", "exact"),
    "words used": ("presence", "sum", "matched_auc"),
    "membership": ("membership", "sum", "auc"),
    "model: membership": ("membership", "model", "auc"),
    "secret, 64 patients": ("canary", "model", "exposure_64"),
    "secret, 1 patient": ("canary", "model", "exposure_unit_64"),
}


def table(result: Mapping[str, Any]) -> str:
    """The result as Markdown."""
    cells = result["cells"]
    lines = [
        f"# What observers get from a run, {result['profile']}",
        "",
        "| row | observer | " + " | ".join(COLUMNS) + " | perplexity |",
        "|---" * (len(COLUMNS) + 3) + "|",
    ]
    for row in ROWS:
        own = [cell for cell in cells if cell["row"] == (OFF if row == TLS else row)]
        if not own:
            continue
        shown = [view["observer"] for view in own[0]["views"]]
        for who in ["tls"] if row == TLS else [one for one in shown if one not in ("tls", "wire")]:
            name = "wire, server" if who == "server" else who
            scores = [_score(own, *column, who) for column in COLUMNS.values()]
            learnt = "" if row == TLS else _perplexity(own)
            lines.append(f"| {row} | {name} | " + " | ".join(scores) + f" | {learnt} |")
    lines += ["", *(f"- *{row}*: {what}." for row, what in result["rows"].items())]
    lines += marks.verdict(result["targets"])
    lines += [
        "",
        "Scores with 95 % intervals and, after the stroke, what an attacker scores who saw nothing "
        "(of secrets: what those never read stay below in 95 % of cases). Of several seeds "
        f"({len({cell['seed'] for cell in cells})}) the mean, with an interval over seeds. "
        "Sequences are whole ones; tokens, those of the embedding rows that moved; words used, the "
        "AUC among words of equal prior; secrets in bits of 16. A dash: this observer has nothing "
        "of the kind. Wire and server see the same bytes, as no TLS is counted on.",
        marks.about_machine(result["machine"]),
    ]
    return "\n".join(lines) + "\n"


# --- private --------------------------------------------------------------------------------------


def _in(cell: Found, *, name: str = "", target: str = "", who: str = "") -> list[Found]:
    return [
        one
        for one in cell["attacks"]
        if name in ("", one["name"])
        and target in ("", one["target"])
        and who in ("", one["observer"])
    ]


def _of(cells: Sequence[Found], name: str, target: str, who: str) -> list[Found]:
    return [one for cell in cells for one in _in(cell, name=name, target=target, who=who)]


def _score(cells: Sequence[Found], name: str, target: str, measure: str, who: str) -> str:
    told = [one for one in _of(cells, name, target, who) if measure in one["metrics"]]
    if not told:
        return "–"
    found = [one["metrics"][measure] for one in told]
    value = metrics.interval([one["value"] for one in found]) if len(found) > 1 else None
    shown = marks.interval(value) if value else _interval(found[0])
    nulls = [one["null"] for one in found if "null" in one]
    broken = "" if all(one["positive_control"]["passed"] for one in told) else " (broken)"
    return shown + (f" / {sum(nulls) / len(nulls):.3f}" if nulls else "") + broken


def _interval(found: Mapping[str, float]) -> str:
    return f"{found['value']:.3f} [{found['low']:.3f}, {found['high']:.3f}]"


def _perplexity(cells: Sequence[Found]) -> str:
    before, after = (sum(cell[k] for cell in cells) / len(cells) for k in ("before", "after"))
    return f"{before:.0f} to {after:.0f}"
