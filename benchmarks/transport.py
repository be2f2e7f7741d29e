"""What is lost if old statistics are carried to an adapted base by a linear map, not summed anew.

An adapter moves every embedding, z -> z'. Sites that have left cannot sum their records again. The
approximation is that a linear map carries old sums over: T minimises |z T - z'|^2 + lam |T|^2 over
the records of sites that are there, and
    s' ~ s T        G' ~ T^T G T + n R        R = mean residual (z T - z')^T (z T - z')
The map costs one sum of d x d numbers more. Half of the windows of the chapter stream count as old;
the read-out is the linear one of the embeddings themselves, at the level of blocks.
Writes ``benchmarks/results/transport.json`` and prints a table.
Run: ``python benchmarks/transport.py`` (about five minutes on two cores).
"""

import json
from collections import Counter
from pathlib import Path

import torch
from torch import Tensor

from fedkola.evaluation import machine, metrics
from fedkola.evaluation.demo import pooled
from fedkola.evaluation.tasks import load
from fedkola.knowledge import views
from fedkola.knowledge.stream import split_test
from fedkola.plan import Plan, Run, Task
from fedkola.training import adapters, evaluate, features, fit, model
from fedkola.training.fit import HEAD
from fedkola.types import Weights

SEEDS = (1, 2, 3)
PER_LABEL = 20
RANK, SCALE, RATE, BATCH = 16, 2.0, 1e-3, 32
RIDGE = 1e-3
RESULTS = Path(__file__).parent / "results"
Sums = tuple[Tensor, Tensor, Tensor]


def main() -> None:
    foundation = model.load("minilm", max_tokens=32)
    cells = [measure(foundation, seed) for seed in SEEDS]
    rows = list(cells[0]["top1"])
    table = {row: metrics.interval([cell["top1"][row] for cell in cells]) for row in rows}
    RESULTS.mkdir(exist_ok=True)
    found = {"machine": machine.describe(), "cells": cells, "table": table}
    (RESULTS / "transport.json").write_text(json.dumps(found, indent=1))
    for row, value in table.items():
        print(f"{row:48} {value['mean']:.4f} [{value['low']:.4f}, {value['high']:.4f}]")


def measure(foundation: model.Foundation, seed: int) -> dict[str, object]:
    plan = Plan(run=Run(seed=seed), task=Task(level="block", per_label=PER_LABEL, overlap=0.0))
    apart = load(plan)
    arrived = [window for site in apart.sites.values() for window in site.windows]
    stream = pooled(apart, without={})
    dev, _ = split_test(stream)
    data = stream.sites["union"]
    path = {label.code: label.path for label in stream.catalogue.labels}
    nodes = list(dict.fromkeys(path[code][1] for code in data.labels))
    place = {node: i for i, node in enumerate(nodes)}
    rows = torch.tensor([place[path[code][1]] for code in data.labels])
    wanted = torch.tensor([place.get(path[code][1], -1) for code in dev.labels])
    adapter = _adapted(foundation, data.texts, rows.tolist(), len(nodes), seed)

    def embedded(texts: tuple[str, ...], weights: Weights) -> Tensor:
        e = evaluate.embeddings(foundation, weights, texts, scale=SCALE)
        return features.integer_embeddings(e).to(torch.float64)

    frozen, moved = embedded(data.texts, {}), embedded(data.texts, adapter)
    dev_frozen, dev_moved = embedded(dev.texts, {}), embedded(dev.texts, adapter)
    old = torch.tensor([window <= max(arrived) // 2 for window in arrived])

    def sums(z: Tensor, chosen: Tensor) -> Sums:
        s = torch.zeros(len(nodes), z.shape[1], dtype=torch.float64)
        s.index_add_(0, rows[chosen], z[chosen])
        counts = torch.bincount(rows[chosen], minlength=len(nodes)).to(torch.float64)
        return z[chosen].T @ z[chosen], s, counts

    def top1(known: Sums, asked: Tensor) -> float:
        gram, s, counts = known
        there = counts.nonzero().flatten()  # without old sums some nodes have no records
        s, counts = s[there], counts[there]
        within = views.scatter(gram, s, counts)
        solved, bias = views.read_out(within, s, counts, rule="pooled", lam=1e-4)
        scores = asked.to(torch.float32) @ solved.to(torch.float32) + bias.to(torch.float32)
        return float((there[scores.argmax(1)] == wanted).to(torch.float64).mean())

    everything = torch.ones_like(old)
    new = sums(moved, ~old)
    found = {
        "frozen base": top1(sums(frozen, everything), dev_frozen),
        "adapted base, all summed anew": top1(sums(moved, everything), dev_moved),
        "old sums as they were": top1(_together(sums(frozen, old), new), dev_moved),
        "old sums left out": top1(new, dev_moved),
    }
    errors = {}
    exact = sums(moved, old)
    for name, seen in (("new records", ~old), ("all records", everything)):
        carried = _carried(sums(frozen, old), frozen[seen], moved[seen])
        found[f"old sums carried by a map of {name}"] = top1(_together(carried, new), dev_moved)
        known = exact[2] > 0
        means, true = (part[1][known] / part[2][known, None] for part in (carried, exact))
        errors[name] = float((means - true).norm() / true.norm())
    return {
        "seed": seed,
        "records": dict(Counter("old" if o else "new" for o in old.tolist())),
        "top1": found,
        "relative error of old label means": errors,
    }


def _adapted(
    foundation: model.Foundation, texts: tuple[str, ...], rows: list[int], nodes: int, seed: int
) -> Weights:
    """One pass over all records, which is the best base that there could be."""
    start = adapters.fresh(adapters.targets(foundation), rank=RANK, seed=seed)
    head = {HEAD: torch.zeros(nodes, foundation.width)}
    trained = fit.fit(
        foundation,
        {**start, **head},
        texts,
        rows,
        steps=len(texts) // BATCH,
        batch=BATCH,
        lr=RATE,
        seed=seed,
        scale=SCALE,
    )
    return {name: value for name, value in trained.items() if name != HEAD}


def _carried(sums: Sums, frozen: Tensor, moved: Tensor) -> Sums:
    """Sums of the frozen base as those of the adapted one, by a ridge map of these records."""
    gram, s, counts = sums
    inner = frozen.T @ frozen
    inner.diagonal().add_(RIDGE * float(inner.diagonal().mean()))
    map_ = torch.linalg.solve(inner, frozen.T @ moved)
    rest = frozen @ map_ - moved
    residual = rest.T @ rest / len(rest)
    return map_.T @ gram @ map_ + counts.sum() * residual, s @ map_, counts


def _together(left: Sums, right: Sums) -> Sums:
    return left[0] + right[0], left[1] + right[1], left[2] + right[2]


if __name__ == "__main__":
    main()
