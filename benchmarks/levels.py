"""The bank's read-out at every level of the code tree: 22 chapters, 285 blocks, 1,918 categories.

One sum over all descriptions of ICD-10-CM, which is what a stream of them ends with, at the number
of features of the chapter stream's row; top-1 on the synonyms that chose nothing (seven tenths).
Writes ``benchmarks/results/levels.json`` and ``levels.md``. Run: ``python benchmarks/levels.py``
(minutes; a folder of cached features may follow).
"""

import json
import sys
from pathlib import Path

import readout
import torch

from fedkola.evaluation import machine
from fedkola.evaluation.demo import pooled
from fedkola.evaluation.tasks import load
from fedkola.knowledge import views
from fedkola.knowledge.stream import split_test
from fedkola.plan import Plan, Task
from fedkola.training import features, model

FEATURES = 6528
LEVELS = ("category", "block", "chapter")


def main() -> None:
    folder = Path(sys.argv[1]) if sys.argv[1:] else None
    cache = features.FeatureCache(model.load("minilm"), folder)
    stream = pooled(load(Plan(task=Task(overlap=0.0))), without={})
    _, test = split_test(stream)
    data = stream.sites["union"]
    path = {label.code: label.path for label in stream.catalogue.labels}
    z, asked = cache.integers(data.texts), cache.integers(test.texts)
    paths = [path[code] for code in data.labels]
    whole = readout._statistics(paths, z, list(range(len(paths))), FEATURES)
    lam = views.ridge(1e-4, features=FEATURES, records=len(paths))
    found = []
    for level, name in enumerate(LEVELS):
        wanted = [path[code][level] for code in test.labels]
        top1 = readout._accuracy(whole, asked, wanted, lam=lam, up=0.2, down=1.0, level=level)
        found.append({"level": name, "labels": len({p[level] for p in paths}), "top1": top1})
        print(json.dumps(found[-1]), flush=True)
    result = {"machine": machine.describe(), "features": FEATURES, "asked": len(asked)}
    out = readout.RESULTS
    (out / "levels.json").write_text(json.dumps({**result, "levels": found}, indent=1) + "\n")
    rows = [f"| {one['level']} | {one['labels']:,} | {one['top1']:.3f} |" for one in found]
    (out / "levels.md").write_text(
        "\n".join(
            [
                "# One bank, asked at three levels",
                "",
                "| level | labels | top-1 |",
                "|---|---|---|",
                *rows,
                "",
                f"{len(asked):,} synonyms that chose nothing, {FEATURES:,} features of the frozen "
                "base, one seed.",
                "",
                "Reproduce: `python benchmarks/levels.py`.",
                "",
            ]
        )
    )


if __name__ == "__main__":
    torch.set_num_threads(2)
    main()
