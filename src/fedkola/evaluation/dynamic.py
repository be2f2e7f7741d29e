"""Suite ``dynamic``: does knowledge stay current, everywhere it may be, without forgetting?

Stream ``icd-chapters``: 46,881 official ICD-10-CM descriptions arrive chapter by chapter at
twelve hospitals; 13,487 inclusion terms, never trained on, ask for one of 285 blocks. A tenth of
them (a hash of the text decides) chose learning rates and read-out constants; figures are quoted
on the untouched nine tenths. Every (method, seed) is a cell with a file of its own, so a killed
benchmark goes on where it stopped and never measures a cell twice.
"""

import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from fedkola import server
from fedkola.errors import UnknownName
from fedkola.evaluation import machine, metrics, oneshot, scoring, tasks
from fedkola.evaluation.demo import pooled
from fedkola.evaluation.readout import adapted_accuracy
from fedkola.knowledge.stream import Stream, hash_share, split_test
from fedkola.ledger import Ledger, RoundRow
from fedkola.plan import Algorithm, Cohort, Knowledge, Plan, Run, Task
from fedkola.server import Federation
from fedkola.training import features, model
from fedkola.types import Dataset, Report

STREAMS = ("icd-chapters",)
METHODS = ("local", "fedit", "fedkola", "joint")
TUNED = ("fedit", "joint")
STREAMED = ("fedkola", "fedit")
"""Methods that live on the stream: measured after every window, and their traffic counted."""
TUNING_SEED = 1000
WATCHED = 0.2
Note = Callable[[str], None]
Progress = Callable[[Report], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class Profile:
    """The size of a benchmark. ``rates`` is the grid that every trained method is tuned on."""

    seeds: int
    sites: int
    windows: int
    per_label: int
    tuning_per_label: int
    features: int
    fedit_epochs: float
    joint_rounds: int
    rates: tuple[float, ...]


PROFILES: Mapping[str, Profile] = {
    "quick": Profile(
        seeds=1,
        sites=5,
        windows=3,
        per_label=4,
        tuning_per_label=0,
        features=512,
        fedit_epochs=1.0,
        joint_rounds=1,
        rates=(1e-3,),
    ),
    "standard": Profile(
        seeds=3,
        sites=12,
        windows=8,
        per_label=0,
        tuning_per_label=20,
        features=4096,
        fedit_epochs=1.0,
        joint_rounds=2,
        rates=(2e-4, 5e-4, 1e-3),
    ),
    "full": Profile(
        seeds=5,
        sites=12,
        windows=8,
        per_label=0,
        tuning_per_label=40,
        features=8192,
        fedit_epochs=4.0,
        joint_rounds=8,
        rates=(2e-4, 5e-4, 1e-3),
    ),
}


def run(
    *,
    stream: str = "icd-chapters",
    profile: str = "standard",
    seeds: int = 0,
    out: Path = Path("benchmarks/results"),
    note: Note,
    progress: Progress,
    methods: Sequence[str] = METHODS,
) -> Mapping[str, Any]:
    """Measure what is not measured yet, then write ``dynamic-STREAM-PROFILE.json`` and ``.md``.

    Raises UnknownName for a stream, profile or method that is not in its table.
    """
    for given, known in ((stream, STREAMS), (profile, tuple(PROFILES))):
        if given not in known:
            raise UnknownName(f"{given!r} was given; the suite dynamic has {', '.join(known)}")
    if unknown := set(methods) - set(METHODS):
        raise UnknownName(f"no method {sorted(unknown)}; the suite dynamic has {METHODS}")
    size = PROFILES[profile]
    cells = out / "cells" / f"dynamic-{stream}-{profile}"
    bench = Bench(profile=size, cells=cells, note=note, progress=progress)
    rates = {name: bench.tuned(name) for name in TUNED if name in methods}
    found = [
        bench.cell(method, seed, rates.get(method, 0.0))
        for method in methods
        for seed in range(1, (seeds or size.seeds) + 1)
    ]
    result = {
        "suite": "dynamic",
        "stream": stream,
        "profile": profile,
        "machine": machine.describe(),
        "rates": rates,
        "cells": found,
        "summary": _summary(found),
        "targets": _targets(found),
    }
    name = f"dynamic-{stream}-{profile}"
    out.mkdir(parents=True, exist_ok=True)
    (out / f"{name}.json").write_text(json.dumps(result, indent=1, sort_keys=True))
    (out / f"{name}.md").write_text(table(result))
    return result


@dataclass(frozen=True, slots=True, kw_only=True)
class Bench:
    """One benchmark in progress: its size, and the folder where finished cells are kept."""

    profile: Profile
    cells: Path
    note: Note
    progress: Progress

    def tuned(self, method: str) -> float:
        """The rate with the best accuracy on the development tenth, on a seed used for nothing
        else; ties go to the smaller rate."""
        size = self.profile
        if len(size.rates) == 1:
            return size.rates[0]
        small = replace(size, per_label=size.tuning_per_label)
        scored = [
            (self._measured(method, TUNING_SEED, rate, small)["dev"]["top1"], -rate)
            for rate in size.rates
        ]
        return -max(scored)[1]

    def cell(self, method: str, seed: int, rate: float) -> dict[str, Any]:
        return self._measured(method, seed, rate, self.profile)

    def _measured(self, method: str, seed: int, rate: float, size: Profile) -> dict[str, Any]:
        name = f"{method}-{seed}" + (f"-{rate:g}" if method in TUNED else "")
        path = self.cells / f"{name}.json"
        if path.exists():
            kept: dict[str, Any] = json.loads(path.read_text())
            return kept
        self.note(f"{method}, seed {seed}" + (f", rate {rate:g}" if method in TUNED else ""))
        found = measure(plan(method, seed, rate, size), self.cells / "work" / name, self.progress)
        found |= {"method": method, "seed": seed, "rate": rate, "machine": machine.describe()}
        draft = path.with_suffix(".tmp")
        draft.write_text(json.dumps(found, indent=1, sort_keys=True))
        draft.replace(path)
        shutil.rmtree(self.cells / "work" / name, ignore_errors=True)
        return found


def plan(method: str, seed: int, rate: float, size: Profile) -> Plan:
    """The plan of one cell: everything but the method is the same for all of them."""
    epochs = size.fedit_epochs if method == "fedit" else 1.0
    return Plan(
        run=Run(
            name=f"{method}-{seed}",
            seed=seed,
            rounds=size.joint_rounds if method == "joint" else 0,
        ),
        task=Task(
            name="icd10cm",
            level="block",
            sites=size.sites,
            windows=size.windows,
            per_label=size.per_label,
        ),
        cohort=Cohort(minimum=3),
        algorithm=Algorithm(name=method, epochs=epochs, batch=32, lr=rate or 1e-3),
        knowledge=Knowledge(
            features=size.features, basis_seed=seed, public_reference=True, slots_max=22
        ),
    )


def measure(chosen: Plan, folder: Path, progress: Progress) -> dict[str, Any]:
    """Run one cell to its end (or from where it was killed) and score it.

    Frozen features are computed anew in every cell, so that CPU time counts them.
    """
    stream = tasks.load(chosen)
    if chosen.algorithm.name == "joint":
        stream = pooled(stream, without={})
    elif chosen.algorithm.name == "local":
        stream = at_once(stream)
    foundation = model.load(chosen.model.name, max_tokens=chosen.model.max_tokens)
    federation = server.assemble(chosen, stream, folder, foundation=foundation)
    dev, untouched = split_test(stream)
    watched = _watched(untouched)
    scopes = list(stream.catalogue.scopes())
    # Test texts have a cache of their own: a site never embeds them.
    scorer = replace(
        federation, trainer=replace(federation.trainer, cache=features.FeatureCache(foundation))
    )

    def observe(number: int, state: Any) -> Mapping[str, float]:
        if chosen.algorithm.name not in STREAMED:
            return {}
        window = min(number, len(stream.windows))
        test = scoring.askable(watched, window)
        found = scoring.accuracy(scorer, state, test, window=window)
        row: dict[str, float] = {"top1": found.top1, "top5": found.top5, "asked": found.asked}
        for scope, (right, asked) in found.scopes.items():
            row[f"right/{scope}"], row[f"asked/{scope}"] = right, asked
        return row

    with Ledger.open(folder, create=True) as ledger:
        state = server.run(federation, ledger, observe=observe, progress=progress)
        rounds = ledger.rounds(chosen.run.name)
    window = len(stream.windows)
    found: dict[str, Any] = {
        **_final(scorer, state, {"untouched": untouched, "dev": dev, "all": stream.test}, window),
        "records": sum(len(data) for data in stream.sites.values()),
        **_costs(chosen, federation, rounds),
    }
    if chosen.algorithm.name in STREAMED:
        r = metrics.matrix([row.report["metrics"] for row in rounds], scopes)
        found |= {
            "R": r,
            "forgetting": metrics.forgetting(r),
            "bwt": metrics.backward_transfer(r),
            "stream": metrics.stream_average(r),
            "lags": metrics.freshness_lag(r),
        }
    if chosen.algorithm.name == "fedkola":
        pooled_sum = oneshot.compare(federation, state)
        joint = scoring.accuracy(
            scorer, pooled_sum.state, scoring.askable(watched, window), window=window
        ).scopes
        j = [joint[s][0] / joint[s][1] if s in joint else None for s in scopes]
        found |= {
            "equal_to_one_shot": pooled_sum.equal,
            "excess_forgetting": metrics.excess_forgetting(r, j),
            "calibration": state.calibration.temperature,
        }
    if chosen.algorithm.name == "joint":
        found["readout"] = adapted_accuracy(federation, state.weights, untouched)
    return found


def at_once(stream: Stream) -> Stream:
    """The same sites with all their records there from the first window on: a hospital that works
    alone ends with the same model, in one round."""
    sites = {name: replace(data, windows=(1,) * len(data)) for name, data in stream.sites.items()}
    test = replace(stream.test, windows=(1,) * len(stream.test))
    return replace(stream, sites=sites, test=test, windows=stream.windows[-1:])


def table(result: Mapping[str, Any]) -> str:
    """The result as Markdown: one row per method, then a verdict per target."""
    rows = [
        f"# Suite dynamic, stream {result['stream']}, profile {result['profile']}",
        "",
        f"285-way top-1 and top-5 on untouched synonyms, mean over seeds with a 95 % bootstrap "
        f"interval; seeds {sorted({c['seed'] for c in result['cells']})}. "
        f"Rates chosen on the development tenth: {result['rates'] or 'none'}.",
        "",
        "| method | top-1 | top-5 | forgetting | MB up, all sites | CPU s |",
        "|---|---|---|---|---|---|",
    ]
    for method, summary in result["summary"].items():
        cells = [
            _interval(summary.get("top1")),
            _interval(summary.get("top5")),
            _interval(summary.get("forgetting")),
            f"{summary['megabytes_up']['mean']:,.0f}",
            f"{summary['cpu_s']['mean']:,.0f}",
        ]
        rows.append(f"| {method} | " + " | ".join(cells) + " |")
    rows += ["", "| target | bound | value | verdict |", "|---|---|---|---|"]
    rows += [
        f"| {t['name']} | {t['bound']} | {t['value']} | {t['verdict']} |" for t in result["targets"]
    ]
    met = sum(t["verdict"] == "met" for t in result["targets"])
    about = result["machine"]
    rows += [
        "",
        f"{met} of {len(result['targets'])} targets met.",
        "",
        f"Measured on {about['cores']} cores ({about['processor']}), torch {about['torch']}, "
        f"Python {about['python']}. Reproduce: `fedkola bench dynamic --stream "
        f"{result['stream']} --profile {result['profile']}`.",
        "",
    ]
    return "\n".join(rows)


# --- private --------------------------------------------------------------------------------------


def _watched(test: Dataset) -> Dataset:
    """The part of the test that is asked after every window; at the end all of it is."""
    kept = [i for i, text in enumerate(test.texts) if hash_share(f"watched {text}") < WATCHED]
    return test.take(kept)


def _final(
    federation: Federation, state: Any, parts: Mapping[str, Dataset], window: int
) -> dict[str, dict[str, float]]:
    askable = {name: scoring.askable(part, window) for name, part in parts.items()}
    whole = scoring.askable(federation.stream.test, window)
    found = scoring.accuracies(federation, state, whole, askable, window=window)
    return {
        name: {"top1": a.top1, "top5": a.top5, "asked": a.asked, "nodes": a.nodes}
        for name, a in found.items()
    }


def _costs(chosen: Plan, federation: Federation, rounds: Sequence[RoundRow]) -> dict[str, Any]:
    # A hospital that works alone, or records that are pooled, send nothing by this protocol.
    counted = chosen.algorithm.name in STREAMED
    up = sum(row.report["bytes_up"] for row in rounds) if counted else 0
    down = sum(row.report["bytes_down"] for row in rounds) if counted else 0
    return {
        "bytes_up": up,
        "bytes_down": down,
        "bytes_up_per_site_window": up / max(1, len(rounds) * len(federation.sites)),
        "cpu_s": sum(row.report["cpu_seconds"] for row in rounds),
        "seconds": sum(row.report["seconds"] for row in rounds),
        "rounds": len(rounds),
    }


def _summary(cells: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    found: dict[str, dict[str, Any]] = {}
    for method in METHODS:
        own = [cell for cell in cells if cell["method"] == method]
        if not own:
            continue
        found[method] = _statistics(own, "untouched")
        if method == "joint":
            found["joint + tree read-out"] = _statistics(own, "readout")
    return found


def _statistics(own: Sequence[Mapping[str, Any]], part: str) -> dict[str, Any]:
    summary: dict[str, Any] = {
        name: metrics.interval([cell[part][name] for cell in own]) for name in ("top1", "top5")
    }
    summary["megabytes_up"] = metrics.interval([cell["bytes_up"] / 1e6 for cell in own])
    summary["cpu_s"] = metrics.interval([cell["cpu_s"] for cell in own])
    if all("forgetting" in cell for cell in own):
        summary["forgetting"] = metrics.interval([cell["forgetting"] for cell in own])
    return summary


def _targets(cells: Sequence[Mapping[str, Any]]) -> list[dict[str, str]]:
    """One line per target of the main job: met, missed or not run, with value and bound."""
    own = {cell["seed"]: cell for cell in cells if cell["method"] == "fedkola"}
    joint = {cell["seed"]: cell for cell in cells if cell["method"] == "joint"}
    if not own:
        return []
    top1 = metrics.interval([cell["untouched"]["top1"] for cell in own.values()])
    top5 = metrics.interval([cell["untouched"]["top5"] for cell in own.values()])
    excess = max(abs(cell["excess_forgetting"]) for cell in own.values())
    lags = [lag for cell in own.values() for lag in cell["lags"] if lag is not None]
    equal = all(cell["equal_to_one_shot"] for cell in own.values())
    found = [
        _target("285-way top-1", ">= 0.70", _interval(top1), top1["low"] >= 0.70),
        _target("285-way top-5", ">= 0.83", _interval(top5), top5["low"] >= 0.83),
        _target("equal bits to one shot", "every seed", str(equal).lower(), equal),
        _target("excess forgetting", "0", f"{excess:g}", excess == 0),
        _target("windows until a chapter answers", "0", f"{max(lags, default=0):g}", not any(lags)),
    ]
    for name, part in (("joint LoRA", "untouched"), ("joint LoRA + tree read-out", "readout")):
        pairs = [
            own[seed]["untouched"]["top1"] - joint[seed][part]["top1"]
            for seed in own
            if seed in joint
        ]
        if pairs:
            gap = metrics.interval(pairs)
            value = _interval(gap)
            found.append(_target(f"top-1 minus {name}", ">= 0", value, gap["mean"] >= 0))
        else:
            found.append(
                {"name": f"top-1 minus {name}", "bound": ">= 0", "value": "", "verdict": "not run"}
            )
    return found


def _target(name: str, bound: str, value: str, met: bool) -> dict[str, str]:
    return {"name": name, "bound": bound, "value": value, "verdict": "met" if met else "missed"}


def _interval(found: Mapping[str, float] | None) -> str:
    if found is None:
        return ""
    if found["n"] == 1:
        return f"{found['mean']:.3f}"
    return f"{found['mean']:.3f} [{found['low']:.3f}, {found['high']:.3f}]"
