"""How the read-out's constants were chosen: ridge rule, spread, tree weights, on held-out synonyms.

Uses the development part of the ICD-10-CM synonyms only (three tenths, a hash of the text decides),
seeds of the features that no benchmark uses. Writes ``benchmarks/results/readout.json`` and prints
three tables. Run: ``python benchmarks/readout.py`` (about fifteen minutes on two cores).
"""

import json
import sys
from dataclasses import replace
from pathlib import Path

import torch

from fedkola.evaluation import machine
from fedkola.evaluation.demo import pooled
from fedkola.evaluation.tasks import load
from fedkola.knowledge import statistics, views
from fedkola.knowledge.stream import seeded, split_test
from fedkola.plan import Plan, Task
from fedkola.training import features, model

SEED = 99
CAPS = (4, 8, 12, 20, 40, 100, 0)
RIDGES = (1e-4, 1e-3, 1e-2, 1e-1, 3e-1)
SPREADS = (1.0, 0.5, 0.3, 0.2, 0.1, 0.03)
SPREAD = 0.2
RESULTS = Path(__file__).parent / "results"


def main() -> None:
    cache = features.FeatureCache(model.load("minilm"), Path(sys.argv[1]) if sys.argv[1:] else None)
    stream = pooled(load(Plan(task=Task(overlap=0.0))), without={})
    dev, _ = split_test(stream)
    data = stream.sites["union"]
    catalogue = stream.catalogue
    path = {label.code: label.path for label in catalogue.labels}
    blocks = [path[code][1] for code in data.labels]
    z, z_dev = cache.integers(data.texts), cache.integers(dev.texts)
    wanted = [path[code][1] for code in dev.labels]
    found: dict[str, object] = {
        "machine": machine.describe(),
        "ridge": [],
        "spread": [],
        "tree": [],
    }
    for cap in CAPS:
        rows = _capped(blocks, cap)
        for p in (1024,) if cap else (1024, 4096):
            whole = _statistics([path[c] for c in data.labels], z, rows, p)
            accuracy = {
                str(lam): _accuracy(whole, z_dev, wanted, lam=lam, up=0.2, down=1.0)
                for lam in (*RIDGES, views.ridge(1e-4, features=p, records=len(rows)))
            }
            line = {"p": p, "records": len(rows), "accuracy": accuracy}
            found["ridge"].append(line)  # type: ignore[attr-defined]
            print(json.dumps(line), flush=True)
            lam = views.ridge(1e-4, features=p, records=len(rows))
            accuracy = {
                str(spread): _accuracy(
                    whole, z_dev, wanted, lam=lam, up=0.2, down=1.0, spread=spread
                )
                for spread in SPREADS
            }
            line = {"p": p, "records": len(rows), "accuracy": accuracy}
            found["spread"].append(line)  # type: ignore[attr-defined]
            print(json.dumps({"spread": line}), flush=True)
    whole = _statistics([path[c] for c in data.labels], z, list(range(len(blocks))), 4096)
    lam = views.ridge(1e-4, features=4096, records=len(blocks))
    for up, down in (
        (0.0, 0.0),
        (0.0, 1.0),
        (0.2, 0.0),
        (0.2, 0.7),
        (0.2, 1.0),
        (0.2, 1.5),
        (0.4, 1.0),
    ):
        line = {
            "up": up,
            "down": down,
            "top1": _accuracy(whole, z_dev, wanted, lam=lam, up=up, down=down),
        }
        found["tree"].append(line)  # type: ignore[attr-defined]
        print(json.dumps(line), flush=True)
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "readout.json").write_text(json.dumps(found, indent=1))


def _capped(blocks: list[str], cap: int) -> list[int]:
    order = list(range(len(blocks)))
    seeded(SEED, "readout").shuffle(order)
    taken: dict[str, int] = {}
    kept = []
    for i in order:
        taken[blocks[i]] = taken.get(blocks[i], 0) + 1
        if not cap or taken[blocks[i]] <= cap:
            kept.append(i)
    return sorted(kept)


def _statistics(paths: list[tuple[str, ...]], z, rows: list[int], p: int):  # type: ignore[no-untyped-def]
    leaves = list(dict.fromkeys(paths[i] for i in rows))
    place = {leaf: i for i, leaf in enumerate(leaves)}
    labels = torch.tensor([place[paths[i]] for i in rows])
    return leaves, statistics.analytic(
        z[rows], labels, num_rows=len(leaves), features=p, bits=4, seed=SEED
    )


def _accuracy(whole, z, wanted, *, lam, up, down, spread=SPREAD, level=1):  # type: ignore[no-untyped-def]
    leaves, words = whole
    p = words[statistics.SUMS].shape[1]
    gram = statistics.unpack(words[statistics.GRAM], p).to(torch.float64)
    nodes, parents, weights, biases = [], [], [], []
    for depth in range(3):
        order = {n: i for i, n in enumerate(dict.fromkeys(leaf[depth] for leaf in leaves))}
        index = torch.tensor([order[leaf[depth]] for leaf in leaves])
        sums = torch.zeros(len(order), p, dtype=torch.float64)
        sums.index_add_(0, index, words[statistics.SUMS].to(torch.float64))
        counts = torch.zeros(len(order), dtype=torch.float64)
        counts.index_add_(0, index, words[statistics.COUNTS].to(torch.float64))
        within = views.scatter(gram, sums, counts)
        solved, bias = views.read_out(within, sums, counts, rule="pooled", lam=lam, spread=spread)
        nodes.append(tuple(order))
        parents.append(index)
        weights.append(solved)
        biases.append(bias)
    head = views.Head(
        features=p,
        bits=4,
        seed=SEED,
        nodes=tuple(nodes),
        weights=tuple(weights),
        bias=tuple(biases),
        parents=tuple(parents),
        successor=torch.arange(len(leaves)),
        up=up,
        down=down,
    )
    if not down:
        head = replace(head, down=0.0)
    scores = views.scores(head, z, level)
    given = [head.nodes[level][int(i)] for i in scores.argmax(1)]
    return round(sum(a == b for a, b in zip(given, wanted, strict=True)) / len(wanted), 4)


if __name__ == "__main__":
    main()
