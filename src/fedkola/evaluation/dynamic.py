"""Suite ``dynamic``: does knowledge stay current, everywhere it may be, without forgetting?

Every stream of :mod:`fedkola.evaluation.setups` is measured in the same way: sites learn window by
window; after each window the part of the test that may be asked by then is asked. Rates are chosen
on development records (a share of the test, by a hash of the text, or a split of its own) on a
seed used for nothing else, and figures are quoted on the rest. Every (row, seed) is a cell with a
file of its own, so a killed benchmark goes on where it stopped.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from math import sqrt
from pathlib import Path
from typing import Any

from fedkola import server
from fedkola.errors import DataError, UnknownName
from fedkola.evaluation import cells as marks
from fedkola.evaluation import generative, machine, metrics, oneshot, scoring, tasks, verdicts
from fedkola.evaluation.cells import Cells, Found, Note, Progress
from fedkola.evaluation.demo import pooled
from fedkola.evaluation.readout import adapted_accuracy
from fedkola.evaluation.setups import (
    MOST_RATE,
    READ_OUT,
    ROWS,
    SETUPS,
    Row,
    Setup,
    Size,
    unread,
)
from fedkola.federation import Federation
from fedkola.knowledge.bank import cell_bytes
from fedkola.knowledge.stream import Stream, hash_share, split_test
from fedkola.ledger import Ledger, RoundRow
from fedkola.plan import Plan, as_dict, override
from fedkola.training import features
from fedkola.types import Dataset

TUNING_SEED = 1000
PROFILES = ("quick", "standard", "full")


def run(
    *,
    stream: str = "icd-chapters",
    profile: str = "standard",
    seeds: int = 0,
    out: Path = Path("benchmarks/results"),
    note: Note,
    progress: Progress,
    rows: Sequence[str] = (),
    measured: bool = False,
) -> Mapping[str, Any]:
    """Measure what is not measured yet, then write ``dynamic-STREAM-PROFILE.json`` and ``.md``.

    With ``measured`` nothing is run: the table is of the cells that there are, so rows may have
    unequal seeds. Raises UnknownName for a stream, profile or row that is not in its table,
    DataError where the stream's data is not on this machine, or nothing is measured yet.
    """
    _known(stream, tuple(SETUPS), "the suite dynamic has the streams")
    setup = SETUPS[stream]
    _known(profile, tuple(setup.sizes), f"stream {stream} has the profiles")
    size = setup.sizes[profile]
    chosen = tuple(rows) or size.rows
    for row in chosen:
        _known(row, tuple(ROWS), "the suite dynamic has the rows")
    name = f"dynamic-{stream}-{profile}"
    bench = Bench(
        setup=setup,
        size=size,
        cells=Cells(folder=out / "cells" / name, note=note, closed=measured),
        progress=progress,
    )
    rates = {row: rate for row in chosen if ROWS[row].tuned and (rate := bench.tuned(row))}
    found = [
        cell
        for row in chosen
        for seed in range(1, (seeds or size.seeds) + 1)
        if (cell := bench.cell(row, seed, rates.get(row, 0.0)))
    ]
    if not found:
        raise DataError(
            f"no cell of stream {stream}, profile {profile} is measured in {out}; run the same "
            "without --measured"
        )
    chosen = tuple(row for row in chosen if any(cell["row"] == row for cell in found))
    result = {
        "suite": "dynamic",
        "stream": stream,
        "question": setup.question,
        "profile": profile,
        "machine": machine.describe(),
        "rates": rates,
        "rows": list(chosen),
        "cells": found,
        "summary": summary(found, chosen),
        "targets": verdicts.judge(stream, found),
    }
    marks.write(result, table(result), out, name)
    return result


@dataclass(frozen=True, slots=True, kw_only=True)
class Bench:
    """One benchmark in progress."""

    setup: Setup
    size: Size
    cells: Cells
    progress: Progress

    def tuned(self, row: str) -> float:
        """The rate with the best accuracy on development records; ties go to the smaller one.

        Where that is the largest of the grid, its double is taken instead if it is better by more
        than a standard error, and so on up to MOST_RATE: tuning runs are small, and a rate that is
        no better in them but larger does worse in the full ones. 0 where a rate of the grid was
        not tried.
        """
        rates = self.size.rates
        if len(rates) == 1:
            return rates[0]
        tried = [self._developed(row, rate) for rate in rates]
        if not all(tried):
            return 0.0
        score, less = max((found["top1"], -rate) for found, rate in zip(tried, rates, strict=True))
        best = -less
        while best >= max(rates) and 2 * best <= MOST_RATE:
            found = self._developed(row, 2 * best)
            if not found or found["top1"] - score <= _error(score, found["asked"]):
                break
            best, score = 2 * best, found["top1"]
        return best

    def _developed(self, row: str, rate: float) -> Found:
        """How a rate does on development records; empty where it is not to be measured now."""
        cell = self._measured(row, TUNING_SEED, rate, self.size.tuning)
        return cell["dev"] if cell else {}

    def cell(self, row: str, seed: int, rate: float) -> Found:
        """One cell of the table; empty where it is not to be measured now."""
        return self._measured(row, seed, rate, ())

    def _measured(self, row: str, seed: int, rate: float, extra: Sequence[str]) -> Found:
        about = plan(self.setup, self.size, row, seed, rate, extra)
        name = f"{row}-{seed}" + (f"-{rate:g}" if ROWS[row].tuned else "")

        def how(folder: Path) -> Found:
            found = measure(about, ROWS[row], folder, self.progress, watched=self.size.watched)
            return found | {"row": row, "seed": seed, "rate": rate}

        return self.cells.measure(
            name, as_dict(about), how, default=as_dict(Plan()), unread=unread(row)
        )


def plan(
    setup: Setup, size: Size, row: str, seed: int, rate: float, extra: Sequence[str] = ()
) -> Plan:
    """The plan of one cell: of one stream all but the row's own settings are the same, and those
    that its method does not read have their defaults."""
    settings = [
        f"run.name={row}-{seed}",
        f"run.seed={seed}",
        f"knowledge.basis_seed={seed}",
        *setup.settings,
        *size.settings,
        *([f"algorithm.lr={rate}"] if rate else []),
        *ROWS[row].settings,
        *extra,
    ]
    left_out = unread(row)
    return override(Plan(), [s for s in settings if s.partition("=")[0] not in left_out])


def measure(
    chosen: Plan, row: Row, folder: Path, progress: Progress, *, watched: float = 1.0
) -> Found:
    """Run one cell to its end (or from where it was killed) and score it.

    ``watched`` is the share of the test that is asked after every window; at the end all of it
    is. Frozen features are computed anew in every cell, so that CPU time counts them.
    """
    whole = tasks.load(chosen)
    stream = whole
    if row.pooled:
        stream = pooled(whole, without={})
    elif not row.streamed:
        stream = at_once(whole)
    foundation = server.load_base(chosen)
    federation = server.assemble(chosen, stream, folder, foundation=foundation)
    # Test texts have a cache of their own: a site never embeds them.
    scorer = replace(
        federation, trainer=replace(federation.trainer, cache=features.FeatureCache(foundation))
    )
    dev, untouched = split_test(stream)
    asked = _watched(untouched, watched)

    def observe(number: int, state: Any) -> Mapping[str, float]:
        last = number % chosen.run.rounds_per_window == 0 or number == federation.rounds
        if not (row.streamed and last):
            return {}
        window = federation.window(number)
        found = scoring.accuracy(
            scorer, state, scoring.askable(asked, window, ends=stream.ends), window=window
        )
        return _flat(found)

    with Ledger.open(folder, create=True) as ledger:
        state = server.run(federation, ledger, observe=observe, progress=progress)
        rounds = ledger.rounds(chosen.run.name)
    window = len(stream.windows)
    found: Found = {
        **_final(scorer, state, {"untouched": untouched, "dev": dev}, window),
        "records": sum(len(data) for data in stream.sites.values()),
        **_costs(row, federation, rounds),
    }
    if row.streamed:
        measured = [entry.report["metrics"] for entry in rounds]
        found |= _over_time([metrics for metrics in measured if metrics])
        found |= {"moments": list(stream.windows), "texts": _texts(stream, found["concepts"])}
    if chosen.algorithm.name == "fedkola" and row.streamed:
        found |= _bank(federation, scorer, state, asked, window, found)
    if stream.test.prompts:
        found["text"] = generative.measure(federation, state, window)
    if row.pooled:
        found["readout"] = adapted_accuracy(federation, state.weights, untouched)
    return found


def at_once(stream: Stream) -> Stream:
    """The same sites with all their records there from the first window on: a hospital that works
    alone ends with the same model, in one round."""
    sites = {name: replace(data, windows=(1,) * len(data)) for name, data in stream.sites.items()}
    test = replace(stream.test, windows=(1,) * len(stream.test))
    return replace(stream, sites=sites, test=test, windows=stream.windows[-1:], ends={})


def summary(cells: Sequence[Found], rows: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Every figure of a row as a mean over seeds with its interval, where the row has it."""
    found: dict[str, dict[str, Any]] = {}
    for row in rows:
        own = [cell for cell in cells if cell["row"] == row]
        if not own:
            continue
        found[row] = {
            name: metrics.interval([of(cell) for cell in own])
            for name, of in FIGURES.items()
            if all(_has(cell, of) for cell in own)
            and (name != "top5" or all(map(marks.asked_at_end, own)))
        }
        if all("readout" in cell for cell in own):
            found[row + READ_OUT] = {
                name: metrics.interval([cell["readout"][name] for cell in own])
                for name in ("top1", "top5")
            } | {name: found[row][name] for name in ("megabytes", "cpu_s")}
    return found


FIGURES: Mapping[str, Callable[[Found], float]] = {
    "top1": marks.top1,
    "top5": lambda cell: float(cell["untouched"]["top5"]),
    "stream": marks.streamed,
    "forgetting": lambda cell: float(cell["forgetting"]),
    "bwt": lambda cell: float(cell["bwt"]),
    "plasticity": lambda cell: float(cell["plasticity"]),
    "lag": lambda cell: max((lag for lag in cell["lags"] if lag is not None), default=0.0),
    "stale": lambda cell: float(cell["stale"]["late"]),
    "exact": lambda cell: float(cell["text"]["exact"]),
    "perplexity": lambda cell: float(cell["text"]["perplexity"]),
    "megabytes": lambda cell: marks.uploaded(cell) / 1e6,
    "cpu_s": lambda cell: float(cell["cpu_s"]),
}
HEADS = {
    "top1": "final top-1",
    "top5": "top-5",
    "stream": "while it streams",
    "forgetting": "forgetting",
    "bwt": "BWT",
    "plasticity": "when it arrives",
    "lag": "lag",
    "stale": "stale",
    "exact": "exact match",
    "perplexity": "perplexity",
    "megabytes": "MB up, site and window",
    "cpu_s": "CPU s",
}


def table(result: Mapping[str, Any]) -> str:
    """The result as Markdown: one line per row, then a verdict per target."""
    shown = [name for name in HEADS if any(name in s for s in result["summary"].values())]
    seeds = sorted({cell["seed"] for cell in result["cells"]})
    once = not any(map(marks.asked_at_end, result["cells"]))
    lines = [
        f"# Suite dynamic, stream {result['stream']}, profile {result['profile']}",
        "",
        result["question"],
        "",
        f"Mean over seeds {seeds} with a 95 % bootstrap interval, on records that chose nothing. "
        "Rates chosen on development records: "
        + (", ".join(f"{row} {rate:g}" for row, rate in result["rates"].items()) or "none")
        + "."
        + once * " Every record is asked as it arrives: final top-1 is the share right then.",
        "",
        "| row | " + " | ".join(HEADS[name] for name in shown) + " |",
        "|---" * (len(shown) + 1) + "|",
    ]
    for row, figures in result["summary"].items():
        cells = [marks.interval(figures.get(name), digits=_DIGITS.get(name, 3)) for name in shown]
        lines.append(f"| {row} | " + " | ".join(cells) + " |")
    lines += [
        *marks.verdict(result["targets"]),
        "",
        *(f"- {row}: {ROWS[row].about}{_fewer(result, row)}" for row in result["rows"]),
        "",
        marks.about_machine(result["machine"])
        + f" Reproduce: `fedkola bench dynamic --stream {result['stream']} --profile "
        f"{result['profile']}`.",
        "",
    ]
    return "\n".join(lines)


# --- private --------------------------------------------------------------------------------------

_DIGITS = {"megabytes": 2, "cpu_s": 0, "lag": 1}


def _error(share: float, asked: int) -> float:
    """The standard error of a share of so many records."""
    return sqrt(share * (1 - share) / asked)


def _fewer(result: Mapping[str, Any], row: str) -> str:
    """Says how many seeds a row has, if others have more."""
    seeds = {name: sum(cell["row"] == name for cell in result["cells"]) for name in result["rows"]}
    return f" (seeds: {seeds[row]})" if seeds[row] < max(seeds.values()) else ""


def _known(given: str, known: Sequence[str], what: str) -> None:
    if given not in known:
        raise UnknownName(f"{given!r} was given; {what} {', '.join(known)}")


def _has(cell: Found, of: Callable[[Found], float]) -> bool:
    try:
        of(cell)
    except KeyError:
        return False
    return True


def _watched(test: Dataset, share: float) -> Dataset:
    """The part of the test that is asked after every window; at the end all of it is."""
    kept = [i for i, text in enumerate(test.questions) if hash_share(f"watched {text}") < share]
    return test.take(kept)


def _flat(found: scoring.Accuracy) -> dict[str, float]:
    """An accuracy as the numbers of a report."""
    row: dict[str, float] = {
        "top1": found.top1,
        "top5": found.top5,
        "asked": found.asked,
        "former": found.former,
        "stale": found.stale,
        "late_former": found.late_former,
        "late_stale": found.late_stale,
    }
    for concept, (right, asked) in found.concepts.items():
        row[f"right/{concept}"], row[f"asked/{concept}"] = right, asked
    return row


def _over_time(rounds: Sequence[Mapping[str, float]]) -> Found:
    """What only the whole stream shows: R by concept, what was asked while it was current, and
    how often an answer was out of date (``late``: one window after the change or later)."""
    concepts = sorted({name[6:] for row in rounds for name in row if name.startswith("asked/")})
    r = metrics.matrix(rounds, concepts)
    asked = sum(row["asked"] for row in rounds)
    right = sum(row["top1"] * row["asked"] for row in rounds)
    found: Found = {
        "concepts": concepts,
        "R": r,
        "forgetting": metrics.forgetting(r),
        "bwt": metrics.backward_transfer(r),
        "plasticity": metrics.plasticity(r),
        "stream": metrics.stream_average(r),
        "lags": metrics.freshness_lag(r),
        "as_it_arrives": {"right": right, "asked": asked, "share": right / max(asked, 1)},
        "asked_of": {
            name: [sum(row.get(f"{of}/{name}", 0) for row in rounds) for of in ("right", "asked")]
            for name in concepts
        },
        "windows": [
            {name: row[name] for name in ("top1", "asked", "stale", "former")} for row in rounds
        ],
    }
    former = sum(row["former"] for row in rounds)
    late = sum(row["late_former"] for row in rounds)
    if former:
        found["stale"] = {
            "all": sum(row["stale"] for row in rounds) / former,
            "late": sum(row["late_stale"] for row in rounds) / max(late, 1),
            "asked": former,
        }
    return found


def _texts(stream: Stream, concepts: Sequence[str]) -> dict[str, str]:
    """Concepts in words, where they are scopes whose top-level node is described."""
    tops = {entry.scope: entry.path[-1] for entry in stream.catalogue.labels}
    texts = stream.catalogue.texts
    return {c: texts[tops[c]] for c in concepts if c in tops and tops[c] in texts}


def _final(federation: Federation, state: Any, parts: Mapping[str, Dataset], window: int) -> Found:
    ends = federation.stream.ends
    askable = {name: scoring.askable(part, window, ends=ends) for name, part in parts.items()}
    whole = scoring.askable(federation.stream.test, window, ends=ends)
    found = scoring.accuracies(federation, state, whole, askable, window=window)
    parts_found: Found = {
        name: {"top1": a.top1, "top5": a.top5, "asked": a.asked, "nodes": a.nodes}
        for name, a in found.items()
    }
    concepts = found["untouched"].concepts
    return parts_found | {
        "concepts_final": {name: right / asked for name, (right, asked) in concepts.items()}
    }


def _bank(
    federation: Federation,
    scorer: Federation,
    state: Any,
    asked: Dataset,
    window: int,
    found: Found,
) -> Found:
    """What a bank promises: the integers of the one-shot sum, and no forgetting beyond the joint
    model of the same class."""
    whole = oneshot.compare(federation, state)
    test = scoring.askable(asked, window, ends=federation.stream.ends)
    joint = scoring.accuracy(scorer, whole.state, test, window=window).concepts
    j = [joint[c][0] / joint[c][1] if c in joint else None for c in found["concepts"]]
    return {
        "equal_to_one_shot": whole.equal,
        "excess_forgetting": metrics.excess_forgetting(found["R"], j),
        "calibration": state.calibration.temperature,
        "bank_bytes": sum(cell_bytes(cell) for cell in state.bank.cells),
        "bank_cells": len(state.bank.cells),
    }


def _costs(row: Row, federation: Federation, rounds: Sequence[RoundRow]) -> Found:
    # A hospital that works alone, or records that are pooled, send nothing by this protocol.
    counted = 1 if row.streamed else 0
    up = counted * sum(entry.report["bytes_up"] for entry in rounds)
    asked = sum(len(entry.report["cohort"]) for entry in rounds)
    return {
        "bytes_up": up,
        "bytes_down": counted * sum(entry.report["bytes_down"] for entry in rounds),
        "bytes_up_per_site_window": up / max(1, asked),
        "bytes_up_worst_window": counted
        * max(entry.report["bytes_up"] / max(1, len(entry.report["cohort"])) for entry in rounds),
        "cpu_s": sum(entry.report["cpu_seconds"] for entry in rounds),
        "seconds": sum(entry.report["seconds"] for entry in rounds),
        "rounds": len(rounds),
        "refused": sum(len(entry.report["refused"]) for entry in rounds),
    }
