"""What a guarantee for patients costs: perplexity on held-out answers at several epsilon.

stories260K goes on pre-training on MedQuAD's answers of three sources, GARD, GHR and MedlinePlus,
each a site. The unit is the article of a disease, as a patient; neighbours differ by all text of
one. At the level ``record`` every step at a site carries noise, found from epsilon by each site for
its own number of units, and four rounds of twelve steps are exchanged. At the level ``pooled`` each
of 48 rounds is one step on the secure sum of all sites, which carries the noise once; units are
sampled at the rate of the smallest site. The same seeds and number of steps in every row;
``none`` is the plain run. An answer counts with its first 300 characters. Perplexity is over the
tokens of held-out answers, of which the model has 512.
Writes ``benchmarks/results/dp.json`` and ``dp.md``. Run: ``python benchmarks/dp.py`` (about ten
minutes on one quiet core); FEDKOLA_DATA names the folder with ``medquad`` and ``models``.
"""

import json
import math
import os
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from fedkola import server
from fedkola.evaluation import machine, metrics
from fedkola.evaluation.tasks import load
from fedkola.knowledge.stream import Stream
from fedkola.ledger import Ledger
from fedkola.plan import Plan, override
from fedkola.privacy import accounting
from fedkola.training import packing, whole
from fedkola.training.model import Foundation
from fedkola.types import Dataset

SITES = ("gard", "ghr", "mplus")
ROWS = {
    "none": (
        "privacy.epsilon=inf",
        'site.embedding="presence-disclosed"',
        'site.waive=["gate_span"]',
    ),
    **{f"record, {e}": (f"privacy.epsilon={e}",) for e in (8, 3, 1)},
    **{
        f"pooled, {e}": (
            f"privacy.epsilon={e}",
            'privacy.level="pooled"',
            "privacy.units=787",
            "algorithm.name=ddgauss",
            "run.rounds=48",
            "pretrain.inner_steps=1",
        )
        for e in (8, 3, 1)
    },
}
SEEDS = (1, 2)
DELTA = 1e-4
TESTED = 200
CHARACTERS = 300
RESULTS = Path(__file__).parent / "results"
SETTINGS = (
    "task.name=medquad",
    "task.windows=1",
    "task.unlabelled=true",
    "algorithm.name=diloco",
    "model.max_tokens=64",
    "cohort.minimum=3",
    "run.rounds=4",
    "pretrain.inner_steps=12",
    "pretrain.batch=32",
    "pretrain.length=48",
    "pretrain.lr=0.002",
    "pretrain.warmup=10",
    f"privacy.delta={DELTA}",
    "privacy.sequences=1",
    "privacy.secure_sum=true",
)


def main() -> None:
    torch.set_num_threads(1)
    model = Path(os.environ["FEDKOLA_DATA"]) / "models" / "stories260K"
    base: Foundation | None = None
    cells: list[dict[str, Any]] = []
    for seed in SEEDS:
        plan = override(Plan(), [*SETTINGS, f"run.seed={seed}", f"model.name={model}"])
        stream = only(load(plan))
        base = base or server.load_base(plan)
        for row, settings in ROWS.items():
            cells.append({"row": row, **measure(override(plan, list(settings)), stream, base)})
            print(json.dumps(cells[-1]), flush=True)
    RESULTS.mkdir(exist_ok=True)
    table = summary(cells)
    found = {"machine": machine.describe(), "delta": DELTA, "cells": cells, "table": table}
    (RESULTS / "dp.json").write_text(json.dumps(found, indent=1))
    (RESULTS / "dp.md").write_text(text := page(table))
    print(text)


def only(stream: Stream) -> Stream:
    """The stream of three sources alone, in training and in test."""
    kept = [i for i, r in enumerate(stream.test.records) if r.rsplit("-", 1)[0] in SITES]
    sites = {name: short(stream.sites[name]) for name in SITES}
    return replace(stream, sites=sites, test=short(stream.test.take(kept)))


def short(data: Dataset) -> Dataset:
    return replace(data, texts=tuple(text[:CHARACTERS] for text in data.texts))


def measure(plan: Plan, stream: Stream, base: Foundation) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        federation = server.assemble(plan, stream, Path(folder), foundation=base)
        began = time.process_time()
        with Ledger.open(Path(folder), create=True) as ledger:
            state = server.run(
                federation, ledger, observe=lambda *_: {}, progress=lambda report: None
            )
        seconds = time.process_time() - began
        entries = {name: accounting.entries(site.store) for name, site in federation.sites.items()}
        spent = {
            name: accounting.spent(site.store, unit="patient", delta=DELTA)
            for name, site in federation.sites.items()
            if entries[name]
        }
    held, owners = stream.test.texts[:TESTED], stream.test.patients[:TESTED]
    rows, _ = packing.pack(base, held, owners, length=plan.pretrain.length, apart=False)
    scored = {}
    for name, weights in (("before", whole.parameters(base)), ("after", state.weights)):
        nats, tokens = whole.nll(base, weights, rows).sum(0).tolist()
        scored[name] = math.exp(nats / tokens)
    return {
        "seed": plan.run.seed,
        "epsilon": plan.privacy.epsilon if math.isfinite(plan.privacy.epsilon) else "inf",
        "units": {name: len(set(data.patients)) for name, data in stream.sites.items()},
        "noise": {name: round(e[0].costs[0].noise, 4) for name, e in entries.items() if e},
        "spent": spent,
        "perplexity": scored["after"],
        "before": scored["before"],
        "cpu_seconds": seconds,
    }


def summary(cells: list[dict[str, Any]]) -> list[dict[str, Any]]:
    plain = {cell["seed"]: cell["perplexity"] for cell in cells if cell["row"] == "none"}
    rows = []
    for name in ROWS:
        own = [cell for cell in cells if cell["row"] == name]
        noise = own[0]["noise"]
        rows.append(
            {
                "row": name,
                "noise": noise,
                "perplexity": metrics.interval([cell["perplexity"] for cell in own]),
                "ratio": metrics.interval([c["perplexity"] / plain[c["seed"]] for c in own]),
                "before": own[0]["before"],
                "cpu_seconds": sum(cell["cpu_seconds"] for cell in own) / len(own),
            }
        )
    return rows


def page(table: list[dict[str, Any]]) -> str:
    lines = [
        "# What an epsilon for patients costs in perplexity",
        "",
        "| level, epsilon | noise multiplier | perplexity | over none | CPU s |",
        "|---|---|---|---|---|",
    ]
    for row in table:
        noise = ", ".join(f"{name} {value:.2f}" for name, value in row["noise"].items()) or "none"
        perplexity, ratio = row["perplexity"], row["ratio"]
        lines.append(
            f"| {row['row']} | {noise} | {perplexity['mean']:.2f} [{perplexity['low']:.2f}, "
            f"{perplexity['high']:.2f}] | {ratio['mean']:.2f} [{ratio['low']:.2f}, "
            f"{ratio['high']:.2f}] | {row['cpu_seconds']:.0f} |"
        )
    lines += [
        "",
        f"Before training: {table[0]['before']:.2f}. Seeds {list(SEEDS)}, 95 % bootstrap intervals "
        f"over seeds; delta = {DELTA:g}; unit: all answers about one disease at its source. "
        "Observer: at the level record anyone who sees what a site sends; at the level pooled "
        "anyone who sees the sums, under secure aggregation. 48 steps in every row: 4 exchanges at "
        "the level record, 48 at the level pooled.",
        "",
        "Reproduce: `python benchmarks/dp.py`.",
    ]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
