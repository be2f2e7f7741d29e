"""What lying sites cost LoRA updates of a real encoder, with and without robust rules.

20 sites with 96 questions of TREC each (6 labels, 1,500 others for the test), i.i.d. or with label
shares of each site drawn from a Dirichlet(0.5); 4 sites lie in every exchange. MiniLM with adapters
of rank 8 on query and value of its last layer and a head; 36 exchanges of 2 local steps of AdamW
in batches of 6 (states below do not change and are kept, see ``fedkola.training.many``). The server
half is that of ``robust_lora``: ``quality.groups``, ``rules`` and ``lies`` as a run has them; liars
know the updates of all honest sites. Sums are in float64 and not on a grid.

``mean`` is the plain mean without a bound: the positive control, where attacks work if they ever
do. ``clip`` bounds norms. Rules read single updates, ``g3`` sums of three sites. ``+`` adds the
standing of sites (``robust.reliability = "regroup"``). The column ``none`` is the null control:
what a defence costs where nobody lies.
Writes ``benchmarks/results/byzantine.json`` and ``byzantine.md``, cell by cell: a run that was
stopped goes on. Run: ``FEDKOLA_DATA=... python benchmarks/byzantine.py [--seeds 3] [--arms all]``;
4 s of one core for each of 14 cells of an arm and seed.
"""

import argparse
import gzip
import hashlib
import json
import os
import random
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from math import inf
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fedkola.evaluation import machine
from fedkola.quality import groups
from fedkola.quality.groups import Robust, Row, Standing
from fedkola.quality.lies import LIES
from fedkola.training import many, model
from fedkola.training.adapters import fresh
from fedkola.types import Update

RESULTS = Path(__file__).parent / "results"
SITES, LIARS, PER_SITE, TEST = 20, 4, 96, 1500
EXCHANGES, STEPS, BATCH, LR = 36, 2, 6, 1e-2
LAYERS, RANK, SCALE, MOMENTUM = 1, 8, 2.0, 0.8
ATTACKS = ("none", "sign", "min_max", "label_flip", "mimic", "ipm", "alie")
SPLITS = {"iid": 0.0, "dirichlet 0.5": 0.5}
LIE = 0.2
NAMES = tuple(f"site-{i:02}" for i in range(SITES))


@dataclass(frozen=True, kw_only=True)
class Arm:
    robust: Robust
    momentum: float = MOMENTUM


def one(rule: str, **more: Any) -> Arm:
    return Arm(robust=Robust(rule=rule, groups_of=1, assume_liars=LIE, **more))


def three(rule: str, **more: Any) -> Arm:
    return Arm(robust=Robust(rule=rule, groups_of=3, assume_liars=LIE, **more))


ARMS = {
    "mean": Arm(robust=Robust(groups_of=1, tau=inf)),
    "clip": Arm(robust=Robust(groups_of=1)),
    "clip +": one("mean", reliability="regroup"),
    "g3 geometric_median +": three("geometric_median", reliability="regroup"),
    "mean, no momentum": Arm(robust=Robust(groups_of=1, tau=inf), momentum=0.0),
    "g3 mean": Arm(robust=Robust(groups_of=3, tau=inf)),
    "nnm_gm": one("nnm_gm"),
    "g3 nnm_gm": three("nnm_gm"),
    **{
        rule: one(rule)
        for rule in (
            *("geometric_median", "multi_krum", "krum", "trimmed_mean", "median"),
            *("centered_clipping", "nnm", "nnm_tm", "flame", "dnc"),
        )
    },
}
MAIN = ("mean", "clip +", "g3 geometric_median +")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--arms", default="main", help='"main", "all" or names, comma-separated')
    parser.add_argument("--splits", default=",".join(SPLITS))
    told = parser.parse_args()
    chosen = {"main": MAIN, "all": tuple(ARMS)}.get(told.arms) or tuple(told.arms.split(","))
    torch.set_num_threads(1)
    for seed in range(told.seeds):
        for attack in ATTACKS:
            for split in told.splits.split(","):
                for arm in chosen:
                    cell(arm, split, attack, seed)
    write()


def cell(arm: str, split: str, attack: str, seed: int) -> float:
    """The accuracy of one run, computed once and kept."""
    path = RESULTS / "byzantine.json"
    kept = json.loads(path.read_text()) if path.exists() else {"cells": {}}
    name = f"{arm} | {split} | {attack} | {seed}"
    if name not in kept["cells"]:
        kept["cells"][name] = run(ARMS[arm], SPLITS[split], attack, seed)
        kept["machine"] = machine.describe()
        RESULTS.mkdir(exist_ok=True)
        path.write_text(json.dumps(kept, indent=1))
        print(name, kept["cells"][name], flush=True)
    found: float = kept["cells"][name]
    return found


def run(arm: Arm, concentration: float, attack: str, seed: int) -> float:
    """Accuracy on the test after all exchanges."""
    upper, labels, num = questions()
    parts, test = divided(labels, num, seed, concentration)
    told = [[labels[i] for i in part] for part in parts]
    liars = random.Random(1000 + seed).sample(range(SITES), LIARS) if attack != "none" else []
    if attack == "label_flip":
        for i in liars:
            told[i] = [(label + num // 2) % num for label in told[i]]
    weights = dict(fresh(upper.targets(), rank=RANK, seed=seed))
    weights["head.weight"] = torch.zeros(num, upper.states.shape[-1])
    weights["head.bias"] = torch.zeros(num)
    robust, standing = arm.robust, Standing()
    kept: dict[str, Tensor] = {}
    last: dict[str, Tensor] | None = None
    for exchange in range(EXCHANGES):
        trained = many.fit(
            upper,
            weights,
            parts,
            told,
            steps=STEPS,
            batch=BATCH,
            lr=LR,
            seeds=[drawn(seed, exchange, i) for i in range(SITES)],
            scale=SCALE,
        )
        moved = {name: value - weights[name] for name, value in trained.items()}
        if kept:
            beta = arm.momentum
            moved = {name: beta * kept[name] + (1 - beta) * v for name, v in moved.items()}
        kept = moved
        sent = lied(moved, attack, liars)
        without = ()
        if robust.reliability == "regroup":
            without = groups.doubted(standing, robust.assume_liars)
        together = without if standing.exchanges % 4 else ()
        key = f"{seed}/{exchange}"
        rows = [
            summed([sent[site] for site in group])
            for group in groups.assign(NAMES, robust.groups_of, key=key, together=together)
        ]
        last, _ = groups.joined(
            robust,
            rows,
            exchange=exchange,
            size=robust.groups_of,
            last=last,
            without=without,
            seed=exchange,
        )
        standing = groups.observed(standing, rows, last)
        weights = {name: old + last[name].float() for name, old in weights.items()}
    scores = many.predict(upper, weights, test, scale=SCALE)
    right = scores.argmax(dim=1) == torch.tensor([labels[i] for i in test])
    return float(right.double().mean())


def lied(moved: dict[str, Tensor], attack: str, liars: Sequence[int]) -> dict[str, Update]:
    # Tensors of an update are weighted by its records.
    updates = [
        Update(client=site, tensors={n: PER_SITE * v[i] for n, v in moved.items()}, weight=PER_SITE)
        for i, site in enumerate(NAMES)
    ]
    if attack in LIES:
        honest = [u for i, u in enumerate(updates) if i not in liars]
        for i in liars:
            updates[i] = LIES[attack](updates[i], honest, len(liars))
    return {u.client: u for u in updates}


def summed(updates: Sequence[Update]) -> Row:
    count = sum(u.weight for u in updates)
    return Row(
        sites=tuple(u.client for u in updates),
        tensors={
            name: torch.stack([u.tensors[name].double() for u in updates]).sum(dim=0) / count
            for name in updates[0].tensors
        },
        count=round(count),
    )


@cache
def questions() -> tuple[many.Upper, list[int], int]:
    """TREC under the frozen lower layers, the label of every question, and their number."""
    rows = []
    for part in ("train", "test"):
        file = Path(os.environ["FEDKOLA_DATA"]) / "sentence_tasks" / f"trec_{part}.jsonl.gz"
        with gzip.open(file, "rt", encoding="utf-8") as lines:
            rows += [json.loads(line) for line in lines]
    names = sorted({row["label"] for row in rows})
    base = model.load("minilm", max_tokens=10)
    upper = many.upper(base, [row["text"] for row in rows], layers=LAYERS)
    return upper, [names.index(row["label"]) for row in rows], len(names)


def divided(
    labels: Sequence[int], num: int, seed: int, concentration: float
) -> tuple[list[list[int]], list[int]]:
    """Positions of each site's records, equally many, and of the test's."""
    order = list(range(len(labels)))
    random.Random(seed).shuffle(order)
    test, pool = order[:TEST], order[TEST:]
    if not concentration:
        return [pool[i * PER_SITE : (i + 1) * PER_SITE] for i in range(SITES)], test
    draw = np.random.default_rng(seed)
    left = [[i for i in pool if labels[i] == label] for label in range(num)]
    parts = []
    for _ in range(SITES):
        shares, part = draw.dirichlet(np.full(num, concentration)), []
        while len(part) < PER_SITE:
            there = np.array([bool(records) for records in left])
            open_ = shares * there if (shares * there).any() else there.astype(float)
            part.append(left[int(draw.choice(num, p=open_ / open_.sum()))].pop())
        parts.append(part)
    return parts, test


def drawn(*numbers: int) -> int:
    digest = hashlib.sha256(json.dumps(numbers).encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 2


def write() -> None:
    kept = json.loads((RESULTS / "byzantine.json").read_text())
    (RESULTS / "byzantine.md").write_text(table(kept), encoding="utf-8")
    print(table(kept))


def table(kept: dict[str, Any]) -> str:
    found: dict[tuple[str, str], dict[str, dict[int, float]]] = {}
    for name, value in kept["cells"].items():
        arm, split, attack, seed = name.split(" | ")
        found.setdefault((split, arm), {}).setdefault(attack, {})[int(seed)] = 100 * value
    lines = [
        "# Lying sites: 4 of 20, LoRA updates of MiniLM on TREC",
        "",
        "Accuracy in %, mean over seeds; behind it what is lost to the plain mean without liars on",
        "the same seed, mean with its 95 % bootstrap interval over seeds. Target: 1.5 points. A",
        "dash is a cell that was not run yet.",
    ]
    for split in SPLITS:
        free = found.get((split, "mean"), {}).get("none", {})
        lines += ["", f"## {split}", "", "| | " + " | ".join(ATTACKS) + " | worst | seeds |"]
        lines += ["|---" * (len(ATTACKS) + 3) + "|"]
        for arm in ARMS:
            cells = found.get((split, arm), {})
            if not cells:
                continue
            losses = {a: [free[s] - v for s, v in cells[a].items() if s in free] for a in cells}
            row = [
                f"{np.mean(list(cells[a].values())):.1f} ({_shown(losses[a])})"
                if losses.get(a)
                else "-"
                for a in ATTACKS
            ]
            worst = max(float(np.mean(losses[a])) for a in cells)
            seeds = len({seed for one in cells.values() for seed in one})
            lines.append(f"| {arm} | {' | '.join(row)} | {worst:.1f} | {seeds} |")
    about = kept.get("machine", {})
    return "\n".join([*lines, "", f"Machine: {about}. Run: `python benchmarks/byzantine.py`.", ""])


def _shown(losses: Sequence[float]) -> str:
    """The mean and its percentile bootstrap interval."""
    values = np.array(losses)
    if len(values) < 2:
        return f"{values.mean():+.1f}"
    draws = np.random.default_rng(0).integers(0, len(values), (2000, len(values)))
    low, high = np.quantile(values[draws].mean(axis=1), (0.025, 0.975))
    return f"{values.mean():+.1f}, {low:+.1f} to {high:+.1f}"


if __name__ == "__main__":
    main()
