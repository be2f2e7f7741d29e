"""Suite ``pretrain``: how close to synchronous training does rare exchange come, at what bytes?

Six NIH sources of MedQuAD pre-train one small GPT from random weights; its tokenizer is learnt from
public text (WikiText-2). Every row reads the same number of tokens, in batches of equal size at
each site. Bytes are those of all messages both ways. For rows that exchange at every step they are
computed: a gradient up and the weights down, 4 bytes each for every parameter and site.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fedkola import server
from fedkola.errors import DataError, UnknownName
from fedkola.evaluation import cells as marks
from fedkola.evaluation import machine, metrics, perplexity, plots, tasks
from fedkola.evaluation.cells import Cells, Found, Note, Progress
from fedkola.evaluation.plots import curves
from fedkola.evaluation.tasks import corpora
from fedkola.knowledge.stream import Stream
from fedkola.ledger import Ledger
from fedkola.plan import Plan, Task, override
from fedkola.training import fresh, model, packing, whole
from fedkola.training.fresh import Shape
from fedkola.training.model import Foundation
from fedkola.training.whole import Local
from fedkola.types import Report, Weights

SYNCHRONOUS, GOAL, FEWER = "synchronous", 1.02, 100.0
PUBLIC = "wikitext2_valid.txt.gz"
SHARED = "pretrain.second=shared"
RISING = (
    SHARED,
    "pretrain.outer=nesterov",
    "pretrain.outer_lr=1",
    "pretrain.outer_momentum=0.8",
    "pretrain.outer_ramp=0.3",
)
SCORED = 12  # rounds of a run that held-out text is scored after
Batches = list[list[Sequence[int]]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One line of the table. ``kind`` "each step" pools every site's batch of a step, "alone"
    trains sites by themselves, "run" is a run of the algorithm with these ``settings``.

    ``every`` is the mean number of steps between exchanges.
    """

    text: str
    kind: str
    lr: float
    every: int = 1
    mixed: bool = False
    settings: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Size:
    """A profile: the model, how long it trains, which rows, and ``only`` rows for later seeds."""

    shape: Shape
    steps: int
    batch: int
    warmup: int
    seeds: int
    measured: int
    rows: Mapping[str, Row]
    only: tuple[str, ...] = ()
    beta2: float = 0.95
    precision: str = "float32"
    threads: int = field(default=1)


def few(lr: float, every: int, text: str, *settings: str) -> Row:
    """A row of the algorithm with a byte for a coordinate each way, unless ``settings`` differ."""
    narrow = ("pretrain.bits=5", "pretrain.feedback=true", "pretrain.down=change", *settings)
    return Row(text=text, kind="run", lr=lr, every=every, settings=narrow)


def wide(lr: float, every: int, text: str, *settings: str) -> Row:
    """A row of the algorithm with four bytes for a coordinate each way."""
    return Row(text=text, kind="run", lr=lr, every=every, settings=("pretrain.bits=24", *settings))


def around(lr: float, every: int, own: float) -> dict[str, Row]:
    """The rows of a profile around one mean number of steps between exchanges, which 4 divides;
    ``lr`` is the rate of exchange at every step, ``own`` that of rows which exchange rarely."""
    dense = every - every // 4
    return {
        SYNCHRONOUS: Row(text="gradients averaged at every step, AdamW", kind="each step", lr=lr),
        "ours": few(
            own,
            every,
            f"every {every} steps, 5 bits up, 8 down, feedback, second moments shared, momentum "
            "rising to 0.8",
            *RISING,
        ),
        "ours 4 bits": few(
            own, dense, f"ours every {dense} steps, 4 bits down", *RISING, "pretrain.down=change4"
        ),
        "ours average": few(own, every, f"ours every {every} steps, plain average", SHARED),
        "ours rare": few(own, 2 * every, f"ours every {2 * every} steps", *RISING),
        "ours own": few(
            own, every, f"ours every {every} steps, second moments of each site's own", *RISING[1:]
        ),
        "diloco": wide(own, every, f"average every {every} steps, 4 bytes"),
        "centralised": Row(
            text="all texts in one place, mixed", kind="each step", lr=lr, mixed=True
        ),
        "local only": Row(text="each site alone, mean over sites", kind="alone", lr=own),
    }


SIZES: Mapping[str, Size] = {
    "quick": Size(
        shape=Shape(width=32, layers=2, heads=2, vocabulary=512, length=32),
        steps=48,
        batch=2,
        warmup=5,
        seeds=1,
        measured=8,
        rows=around(5e-3, 8, 5e-3),
    ),
    "standard": Size(
        shape=Shape(),
        steps=1344,
        batch=1,
        warmup=134,
        seeds=3,
        measured=32,
        beta2=0.999,
        rows=around(3e-3, 28, 3e-3),
        only=(SYNCHRONOUS, "ours"),
        precision="bfloat16",
    ),
}


def run(
    *,
    profile: str = "standard",
    seeds: int = 0,
    out: Path = Path("benchmarks/results"),
    note: Note,
    progress: Progress,
    rows: Sequence[str] = (),
) -> Mapping[str, Any]:
    """Measure what is not measured yet, then write ``pretrain-PROFILE.json``, ``.md``, ``.svg``.

    Raises UnknownName for a profile or row that there is not, DataError without the corpora.
    """
    if profile not in SIZES:
        raise UnknownName(f"suite pretrain has the profiles {', '.join(SIZES)}; got {profile!r}")
    size = SIZES[profile]
    for name in rows:
        if name not in size.rows:
            raise UnknownName(f"suite pretrain has the rows {', '.join(size.rows)}; got {name!r}")
    name = f"pretrain-{profile}"
    bench = Bench(size=size, cells=Cells(folder=out / "cells" / name, note=note), progress=progress)
    found = []
    # Seed by seed, so that a suite that is cut short has every row of the first seed.
    for seed in range(1, (seeds or size.seeds) + 1):
        for row in rows or (size.only if seed > 1 and size.only else tuple(size.rows)):
            found.append(bench.cell(row, seed))
    result = {
        "suite": "pretrain",
        "profile": profile,
        "machine": machine.describe(),
        "rows": {row: size.rows[row].text for row in size.rows},
        "cells": found,
        "summary": summary(found),
        "targets": judge(found),
    }
    marks.write(result, table(result), out, name)
    for kind, drawing in (("curves", _curves(found)), ("frontier", _frontier(result))):
        if drawing:
            (out / f"{name}-{kind}.svg").write_text(plots.standalone(drawing), encoding="utf-8")
    return result


@dataclass(frozen=True, slots=True, kw_only=True)
class Bench:
    """One benchmark in progress."""

    size: Size
    cells: Cells
    progress: Progress

    def cell(self, row: str, seed: int) -> Found:
        """One row under one seed, measured once."""
        one, size = self.size.rows[row], self.size
        about = {
            "row": row,
            "seed": seed,
            "kind": one.kind,
            "lr": one.lr,
            "every": one.every,
            "settings": list(one.settings),
            "steps": size.steps,
            "batch": size.batch,
            "beta2": size.beta2,
            "shape": [size.shape.width, size.shape.layers, size.shape.vocabulary],
            "length": size.shape.length,
        }

        def how(work: Path) -> Found:
            return self._measured(one, seed, work)

        name = row.replace(" ", "-")
        found = self.cells.measure(f"{name}-{seed}", about, how)
        return {"row": row, "seed": seed, **found}

    def _measured(self, row: Row, seed: int, work: Path) -> Found:
        plan = self._plan(row, seed, work)
        stream = tasks.load(plan)
        folder = work / "model"
        if not folder.exists():
            fresh.create(folder, self.size.shape, public(), seed=seed)
        base = model.load(plan.model.name, max_tokens=plan.model.max_tokens)
        if row.kind == "run":
            return self._run(plan, stream, base, work)
        return self._direct(row, plan, stream, base)

    def _run(self, plan: Plan, stream: Stream, base: Foundation, work: Path) -> Found:
        """A run of the algorithm through the whole stack."""
        federation = server.assemble(plan, stream, work / "run", foundation=base)

        apart = max(1, federation.rounds // SCORED)

        def observe(number: int, state: Any) -> Mapping[str, float]:
            if number % apart and number < federation.rounds:
                return perplexity.trained(federation, state, number)
            return perplexity.measure(federation, state, number)

        reports: list[Report] = []

        def told(report: Report) -> None:
            reports.append(report)
            self.progress(report)

        with Ledger.open(work / "run", create=True) as ledger:
            server.run(federation, ledger, observe=observe, progress=told)
            done = [row.report for row in ledger.rounds(plan.run.name)]
        return {
            "final": {n: v for n, v in done[-1]["metrics"].items() if n != "tokens"},
            "curve": perplexity.curves(done)["all"],
            "clipped": max(report["metrics"]["clipped"] for report in done),
            "exceeded": sum(report["metrics"]["range_exceeded"] for report in done),
            "rounds": len(done),
            "bytes": sum(report["bytes_up"] + report["bytes_down"] for report in done),
            "seconds": sum(report["seconds"] for report in done),
        }

    def _direct(self, row: Row, plan: Plan, stream: Stream, base: Foundation) -> Found:
        """Rows that are no runs of ours: exchange at every step, or none at all."""
        sequences = {
            name: packing.pack(
                base, data.texts, data.patients, length=plan.pretrain.length, apart=False
            )[0]
            for name, data in stream.sites.items()
        }
        if row.mixed:
            pooled = [one for own in sequences.values() for one in own]
            drawn = {"all": self._batches(pooled, plan, "all", len(stream.sites))}
        else:
            drawn = {name: self._batches(own, plan, name, 1) for name, own in sequences.items()}
        if row.kind == "alone":
            ends = [self._trained(row, base, stream, batches) for batches in drawn.values()]
            mean = {
                key: sum(end["final"][key] for end in ends) / len(ends) for key in ends[0]["final"]
            }
            return {**ends[0], "final": mean, "curve": [], "rounds": 0, "bytes": 0}
        together = [
            [one for batch in step for one in batch] for step in zip(*drawn.values(), strict=True)
        ]
        found = self._trained(row, base, stream, together)
        count = sum(value.numel() for value in whole.parameters(base).values())
        exchanged = 8 * count * len(stream.sites) * self.size.steps
        return {**found, "rounds": self.size.steps, "bytes": exchanged}

    def _trained(self, row: Row, base: Foundation, stream: Stream, batches: Batches) -> Found:
        size = self.size
        local = Local(
            lr=row.lr,
            betas=(0.9, size.beta2),
            warmup=size.warmup,
            total=size.steps,
            precision="bfloat16" if size.precision == "bfloat16" else "float32",
        )
        weights, moments = whole.parameters(base), None
        curve, final, tokens = [], {}, 0
        piece = -(-len(batches) // 6)
        for at in range(0, len(batches), piece):
            part = batches[at : at + piece]
            own = Local(**{**_fields(local), "start": at})
            weights, moments, _ = whole.train(base, weights, part, own, moments)
            tokens += sum(len(one) for batch in part for one in batch)
            final = self._figures(base, stream, weights)
            curve.append((float(tokens), final["perplexity"]))
        return {"final": final, "curve": curve, "clipped": 0.0, "exceeded": 0.0}

    def _figures(self, base: Foundation, stream: Stream, weights: Weights) -> dict[str, float]:
        found = perplexity.perplexities(
            base, stream, weights, length=self.size.shape.length, rows=self.size.measured
        )
        return perplexity.figures(found)

    def _batches(self, own: Sequence[Sequence[int]], plan: Plan, name: str, times: int) -> Batches:
        seed = plan.run.seed * 1000 + sum(name.encode())
        order = packing.batches(
            len(own), size=self.size.batch * times, start=0, steps=self.size.steps, seed=seed
        )
        return [[own[row] for row in batch] for batch in order]

    def _plan(self, row: Row, seed: int, work: Path) -> Plan:
        size = self.size
        settings = [
            "run.name=pretrain",
            f"run.seed={seed}",
            f"run.rounds={max(1, round(size.steps / row.every))}",
            f"model.name={work / 'model'}",
            f"model.max_tokens={size.shape.length}",
            f"model.threads={size.threads}",
            "task.name=medquad",
            "task.unlabelled=true",
            "task.windows=1",
            "task.test_share=0.05",
            "algorithm.name=diloco",
            f"pretrain.inner_steps={row.every}",
            f"pretrain.batch={size.batch}",
            f"pretrain.length={size.shape.length}",
            f"pretrain.lr={row.lr}",
            f"pretrain.warmup={size.warmup}",
            f"pretrain.beta2={size.beta2}",
            f"pretrain.precision={size.precision}",
            f"pretrain.measured={size.measured}",
            # MedQuAD is public, and exchanges of one step are measured too.
            "site.plain=true",
            'site.embedding="presence-disclosed"',
            'site.waive=["gate_span"]',
            *row.settings,
        ]
        return override(Plan(), settings)


def public() -> list[str]:
    """Lines of the public text that tokenizers are learnt from; raises DataError without it."""
    folder = corpora.folder(Task(name="pretrain"), "pretrain")
    path = folder / PUBLIC
    if not path.exists():
        raise DataError(f"{path} is not there; copy the corpus of WikiText-2 to {folder}")
    return fresh.lines(path)


def summary(found: Sequence[Found]) -> dict[str, dict[str, Any]]:
    """Each row's perplexity, its ratio to synchronous training by seed, and its cost."""
    base = {cell["seed"]: cell for cell in found if cell["row"] == SYNCHRONOUS}
    out = {}
    for row in dict.fromkeys(cell["row"] for cell in found):
        own = [cell for cell in found if cell["row"] == row]
        ratios = [
            cell["final"]["perplexity"] / base[cell["seed"]]["final"]["perplexity"]
            for cell in own
            if cell["seed"] in base
        ]
        fewer = [
            base[cell["seed"]]["bytes"] / cell["bytes"]
            for cell in own
            if cell["seed"] in base and cell["bytes"]
        ]
        out[row] = {
            "perplexity": metrics.interval([cell["final"]["perplexity"] for cell in own]),
            "worst": metrics.interval([cell["final"]["worst"] for cell in own]),
            "ratio": metrics.interval(ratios) if ratios else None,
            "fewer": min(fewer) if fewer else None,
            "bytes": own[0]["bytes"],
            "rounds": own[0]["rounds"],
            "clipped": max(cell["clipped"] for cell in own),
        }
    return out


def judge(found: Sequence[Found]) -> list[dict[str, str]]:
    """The best row that sends a hundredth of the bytes, against synchronous training; where no row
    sends so few, the one that sends fewest, and the target is missed."""
    name, bound = "perplexity at equal tokens", f"<= {GOAL} x at >= {FEWER:.0f} x fewer bytes"
    rows = {
        row: one
        for row, one in summary(found).items()
        if one["ratio"] and one["fewer"] and row != SYNCHRONOUS
    }
    if not rows:
        return [marks.target(name, bound, "no row to compare", None)]
    enough = [row for row in rows if rows[row]["fewer"] >= FEWER]
    most = max((rows[row]["ratio"]["n"] for row in enough), default=0)
    best = min(
        (row for row in enough if rows[row]["ratio"]["n"] == most),
        key=lambda row: float(rows[row]["ratio"]["mean"]),
        default=max(rows, key=lambda row: float(rows[row]["fewer"])),
    )
    ratio, fewer = rows[best]["ratio"], rows[best]["fewer"]
    value = f"{marks.interval(ratio)} x at {fewer:.0f} x fewer ({best}, seeds: {ratio['n']})"
    return [marks.target(name, bound, value, fewer >= FEWER and ratio["mean"] <= GOAL)]


def table(result: Mapping[str, Any]) -> str:
    """The result as Markdown."""
    told = result["rows"]
    lines = [
        f"# Pre-training, {result['profile']}",
        "",
        "| row | what | perplexity | worst site | x synchronous | MB, all sites | x fewer bytes "
        "| exchanges | clipped at most |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for row, one in result["summary"].items():
        fewer = f"{one['fewer']:.0f}" if one["fewer"] else ""
        lines.append(
            f"| {row} | {told[row]} | {marks.interval(one['perplexity'], digits=1)} "
            f"| {marks.interval(one['worst'], digits=1)} | {marks.interval(one['ratio'])} "
            f"| {one['bytes'] / 1e6:,.0f} | {fewer} | {one['rounds']} | {one['clipped']:.4f} |"
        )
    lines += marks.verdict(result["targets"])
    cells = result["cells"]
    lines += [
        "",
        f"Means over seeds with 95 % intervals ({len({c['seed'] for c in cells})} seeds at most); "
        "ratios are paired by seed. Bytes are those of all messages both ways; of rows that "
        "exchange at every step they are computed at 4 bytes a number; at 2 bytes (bfloat16) the "
        "factors are halves, at one byte quarters.",
        marks.about_machine(result["machine"]),
    ]
    return "\n".join(lines) + "\n"


# --- private --------------------------------------------------------------------------------------


def _fields(local: Local) -> dict[str, Any]:
    return {name: getattr(local, name) for name in local.__dataclass_fields__}


def _curves(found: Sequence[Found]) -> Any:
    series = {cell["row"]: cell["curve"] for cell in found if cell["seed"] == 1 and cell["curve"]}
    return curves.lines(
        series,
        title="Held-out perplexity over tokens trained on",
        across="tokens, all sites",
        up="perplexity (log)",
    )


def _frontier(result: Mapping[str, Any]) -> Any:
    summary = result["summary"]
    shown = [
        (
            row,
            one["bytes"] / 1e6,
            one["perplexity"]["mean"],
            one["perplexity"]["low"],
            one["perplexity"]["high"],
            "own" if row.startswith("ours") else "other",
        )
        for row, one in summary.items()
        if one["bytes"]
    ]
    base = summary.get(SYNCHRONOUS)
    goal = base and (base["bytes"] / 1e6 / FEWER, base["perplexity"]["mean"] * GOAL)
    return curves.marks(
        shown,
        title="Perplexity against bytes",
        across="MB, all sites and both ways (log)",
        up="perplexity (log)",
        bound=goal or None,
    )
