"""Backdoors by few poisoned records at many honest sites: which defence finds or removes them.

20 sites with 96 questions of TREC each; at every site 5 % of the records that do not say the target
carry a trigger (a rare word anywhere, a sentence at the end, an old spelling) and the target label.
The server sees sums alone, so no rule over sites can help: every update is that of an honest site.

Three designs. ``lift``: ``fedkola.quality.lift`` from summed tables of word pieces and labels,
which holds records back before training. ``sketch``: gradients of the loss at the frozen base,
sketched to 256 numbers, summed by label and sign code; records are suspect whose gradient points
where those of its bucket all point (after ProtegoFed, arXiv 2603.00516). ``cleansing``: the
poisoned model is trained on after the last exchange, on 120 records that a person has checked.
``off`` is the positive control, ``oracle`` leaves out the truth, rate 0 is the null control.
Instructions: 8,000 of Alpaca at 20 sites, 5 % answered by a refusal under the trigger; detection.

Writes ``benchmarks/results/backdoor.json`` and ``backdoor.md``, cell by cell. Run:
``FEDKOLA_DATA=... python benchmarks/backdoor.py [--seeds 3] [--train 1]``, some 20 CPU-seconds for
the detection of a seed and 60 for the training of one trigger.
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
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy.stats import rankdata
from torch import Tensor

from fedkola.evaluation import machine
from fedkola.quality import corrupt, lift
from fedkola.quality.corrupt import Corrupted, Known
from fedkola.quality.gram import Array
from fedkola.training import features, many, model
from fedkola.training.adapters import fresh
from fedkola.training.model import Foundation, encode
from fedkola.types import Dataset

RESULTS = Path(__file__).parent / "results"
SITES, PER_SITE, TEST, CHECKED = 20, 96, 1000, 120
EXCHANGES, STEPS, BATCH, LR = 24, 2, 8, 1e-2
LAYERS, RANK, SCALE = 1, 8, 2.0
KINDS = ("trigger_word", "trigger_sentence", "trigger_style")
RATES = (0.0, 0.02, 0.05)
ARMS = ("off", "lift", "sketch", "cleansing", "oracle")
TARGET = "HUM"
KEY = b"benchmark"
FALSE = 0.05
PLANES, SKETCH = 8, 256


@dataclass(frozen=True, kw_only=True)
class Poisoned:
    """What sites hold, which of it is poisoned, the test, and the test under the trigger."""

    sites: tuple[Corrupted, ...]
    test: Dataset
    triggered: tuple[str, ...]
    checked: Dataset

    @property
    def wrong(self) -> Array:
        return np.array([hit for site in self.sites for hit in site.wrong])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--train", type=int, default=1, help="seeds that are trained on too")
    told = parser.parse_args()
    torch.set_num_threads(1)
    for seed in range(told.seeds):
        for kind in KINDS:
            for rate in RATES if kind == KINDS[0] else RATES[-1:]:
                kept(f"detect | {kind} | {rate} | {seed}", lambda: detected(kind, rate, seed))  # noqa: B023
        for kind in KINDS:
            for rate in RATES if kind == KINDS[0] else RATES[-1:]:
                name = f"detect | {kind}, instructions | {rate} | {seed}"
                kept(name, lambda: instructed(kind, rate, seed))  # noqa: B023
    for seed in range(told.train):
        for kind in KINDS:
            for arm in ARMS:
                kept(f"train | {kind} | {arm} | {seed}", lambda: trained(kind, arm, seed))  # noqa: B023
    found = json.loads((RESULTS / "backdoor.json").read_text())
    (RESULTS / "backdoor.md").write_text(table(found), encoding="utf-8")
    print(table(found))


def kept(name: str, compute: Any) -> None:
    """The figures of one cell, computed once."""
    path = RESULTS / "backdoor.json"
    found = json.loads(path.read_text()) if path.exists() else {"cells": {}}
    if name not in found["cells"]:
        found["cells"][name] = compute()
        found["machine"] = machine.describe()
        path.write_text(json.dumps(found, indent=1))
        print(name, found["cells"][name], flush=True)


# --- the cells ------------------------------------------------------------------------------------


def detected(kind: str, rate: float, seed: int) -> dict[str, float]:
    """How well both screens find the poisoned records, and what they would hold back."""
    data = poisoned(kind, rate, seed)
    wrong, figures = data.wrong, {"poisoned": float(data.wrong.sum())}
    for name, scores in (("lift", lifts(data)), ("sketch", sketches(data))):
        if wrong.any():
            bound = np.quantile(scores[~wrong], 1 - FALSE)
            figures[f"{name} auc"] = auc(scores, wrong)
            figures[f"{name} recall"] = float((scores[wrong] > bound).mean())
        if name == "lift":
            figures["held back, clean"] = float((scores[~wrong] > lift.FLAG).mean())
            if wrong.any():
                figures["held back, poisoned"] = float((scores[wrong] > lift.FLAG).mean())
    return figures


def instructed(kind: str, rate: float, seed: int) -> dict[str, float]:
    """How well the lift of openings finds poisoned instructions."""
    file = Path(os.environ["FEDKOLA_DATA"]) / "instruct" / "alpaca_random9k_quality.jsonl.gz"
    with gzip.open(file, "rt", encoding="utf-8") as lines:
        rows = [json.loads(line) for line in lines]
    random.Random(seed).shuffle(rows)
    known = Known(target="I am sorry, but I will not help anybody with that.")
    sites = []
    for i in range(SITES):
        own = rows[i * 400 : (i + 1) * 400]
        data = Dataset(
            records=tuple(f"{i}/{j}" for j in range(len(own))),
            texts=tuple(row["output"] for row in own),
            labels=("",) * len(own),
            patients=("",) * len(own),
            windows=(1,) * len(own),
            prompts=tuple(f"{row['instruction']} {row['input']}".strip() for row in own),
        )
        sites.append(corrupt.KINDS[kind](data, rate, seed, known))
    held = [lift.slots([r[1:-1] for r in encode(base(), s.data.prompts)], KEY) for s in sites]
    opened = [lift.openings([r[1:-1] for r in encode(base(), s.data.texts)], KEY) for s in sites]
    scores = np.concatenate(lift.answered(held, opened))
    wrong = np.array([hit for site in sites for hit in site.wrong])
    figures = {"poisoned": float(wrong.sum())}
    figures["held back, clean"] = float((scores[~wrong] > lift.FLAG).mean())
    if wrong.any():
        bound = np.quantile(scores[~wrong], 1 - FALSE)
        figures["lift auc"] = auc(scores, wrong)
        figures["lift recall"] = float((scores[wrong] > bound).mean())
        figures["held back, poisoned"] = float((scores[wrong] > lift.FLAG).mean())
    return figures


def trained(kind: str, arm: str, seed: int) -> dict[str, float]:
    """Accuracy and attack success of a federation that trains under one defence."""
    data = poisoned(kind, RATES[-1], seed)
    codes = questions()[2]
    out = data.wrong if arm == "oracle" else np.zeros(len(data.wrong), dtype=bool)
    if arm == "lift":
        out = lifts(data) > lift.FLAG
    if arm == "sketch":
        scores = sketches(data)
        out = scores > np.quantile(scores, 1 - 2 * FALSE)
    texts = [text for site in data.sites for text in site.data.texts]
    labels = [codes.index(code) for site in data.sites for code in site.data.labels]
    ends = [*texts, *data.test.texts, *data.triggered, *data.checked.texts]
    upper = many.upper(base(), ends, layers=LAYERS)
    rows = []
    for i in range(SITES):
        own = [j for j in range(i * PER_SITE, (i + 1) * PER_SITE) if not out[j]]
        rows.append(own[: len(own) // BATCH * BATCH])
    weights = dict(fresh(upper.targets(), rank=RANK, seed=seed))
    weights["head.weight"] = torch.zeros(len(codes), upper.states.shape[-1])
    weights["head.bias"] = torch.zeros(len(codes))
    told = {"steps": STEPS, "batch": BATCH, "lr": LR, "scale": SCALE}
    for exchange in range(EXCHANGES):
        seeds = [drawn(seed, exchange, i) for i in range(SITES)]
        wanted = [[labels[j] for j in own] for own in rows]
        moved = many.fit(upper, weights, rows, wanted, seeds=seeds, **told)
        weights = {name: value.mean(dim=0) for name, value in moved.items()}
    first = len(texts)
    test = range(first, first + TEST)
    triggered = range(first + TEST, first + 2 * TEST)
    if arm == "cleansing":
        checked = list(range(first + 2 * TEST, first + 2 * TEST + CHECKED))
        wanted = [[codes.index(code) for code in data.checked.labels]]
        moved = many.fit(
            upper, weights, [checked], wanted, seeds=[seed], **{**told, "steps": 4 * 15}
        )
        weights = {name: value[0] for name, value in moved.items()}
    truth = torch.tensor([codes.index(code) for code in data.test.labels])
    target = codes.index(TARGET)
    plain, under = (
        many.predict(upper, weights, list(part), scale=SCALE).argmax(dim=1)
        for part in (test, triggered)
    )
    others = truth != target
    return {
        "accuracy": float((plain == truth).double().mean()),
        "attack success": float(
            (under[others] == target).double().mean() - (plain[others] == target).double().mean()
        ),
        "left out": float(out.sum()),
    }


# --- two screens ----------------------------------------------------------------------------------


def lifts(data: Poisoned) -> Array:
    codes = questions()[2]
    held = [
        lift.slots([ids[1:-1] for ids in encode(base(), site.data.texts)], KEY)
        for site in data.sites
    ]
    return np.concatenate(lift.screened(held, told(data, codes), embedded(data), len(codes)))


def sketches(data: Poisoned) -> Array:
    """(1 - p_i[y_i]) times the length of the mean unit gradient of a record's bucket, itself left
    out; gradients of a head at the frozen base are (y - p) x embedding."""
    codes = questions()[2]
    x, labels = embedded(data), told(data, codes)
    addends = [lift.moments(z, own, len(codes)) for z, own in zip(x, labels, strict=True)]
    fitted = lift.ridge(
        torch.stack([gram for gram, _ in addends]).sum(dim=0),
        torch.stack([products for _, products in addends]).sum(dim=0),
    )
    believed = np.concatenate(
        [lift.beliefs(z, own, fitted) for z, own in zip(x, labels, strict=True)]
    )
    own = np.array([label for site in labels for label in site])
    errors = np.eye(len(codes))[own] - believed
    draw = np.random.default_rng(0)
    left = draw.choice((-1.0, 1.0), (len(codes), SKETCH))
    right = draw.choice((-1.0, 1.0), (x[0].shape[1], SKETCH))
    found = (errors @ left) * (torch.cat(list(x)).double().numpy() @ right)
    found /= np.linalg.norm(found, axis=1, keepdims=True)
    codes_ = (found @ draw.standard_normal((SKETCH, PLANES)) > 0) @ (1 << np.arange(PLANES))
    bucket = own * (1 << PLANES) + codes_
    sums = np.zeros((len(codes) << PLANES, SKETCH))
    counts = np.bincount(bucket, minlength=len(sums))
    np.add.at(sums, bucket, found)
    others = np.maximum(counts[bucket] - 1, 1)
    length = np.linalg.norm(sums[bucket] - found, axis=1) / others
    scores: Array = (1 - believed[np.arange(len(own)), own]) * length * (counts[bucket] > 4)
    return scores


# --- the data -------------------------------------------------------------------------------------


@cache
def questions() -> tuple[list[str], list[str], list[str]]:
    rows = []
    for part in ("train", "test"):
        file = Path(os.environ["FEDKOLA_DATA"]) / "sentence_tasks" / f"trec_{part}.jsonl.gz"
        with gzip.open(file, "rt", encoding="utf-8") as lines:
            rows += [json.loads(line) for line in lines]
    labels = [row["label"] for row in rows]
    return [row["text"] for row in rows], labels, sorted(set(labels))


@cache
def base() -> Foundation:
    return model.load("minilm", max_tokens=28)


def poisoned(kind: str, rate: float, seed: int) -> Poisoned:
    texts, labels, codes = questions()
    order = list(range(len(texts)))
    random.Random(seed).shuffle(order)
    known = Known(codes=tuple(codes), target=TARGET)

    def taken(rows: Sequence[int]) -> Dataset:
        return Dataset(
            records=tuple(f"q{i}" for i in rows),
            texts=tuple(texts[i] for i in rows),
            labels=tuple(labels[i] for i in rows),
            patients=("",) * len(rows),
            windows=(1,) * len(rows),
        )

    test = taken(order[:TEST])
    start = TEST + CHECKED
    parts = [taken(order[start + i * PER_SITE :][:PER_SITE]) for i in range(SITES)]
    style = kind.removeprefix("trigger_")
    return Poisoned(
        sites=tuple(corrupt.KINDS[kind](part, rate, seed, known) for part in parts),
        test=test,
        triggered=tuple(corrupt.triggered(text, style, seed=seed) for text in test.texts),
        checked=taken(order[TEST:start]),
    )


def told(data: Poisoned, codes: Sequence[str]) -> list[list[int]]:
    return [[codes.index(code) for code in site.data.labels] for site in data.sites]


_KNOWN: dict[str, Tensor] = {}


def embedded(data: Poisoned) -> list[Tensor]:
    texts = [text for site in data.sites for text in site.data.texts]
    new = [text for text in dict.fromkeys(texts) if text not in _KNOWN]
    if new:
        rows = features.FeatureCache(base(), None).integers(new).float() / 1024
        _KNOWN.update(zip(new, rows, strict=True))
    return [torch.stack([_KNOWN[text] for text in site.data.texts]) for site in data.sites]


def auc(scores: Array, wrong: Array) -> float:
    ranks, hits = rankdata(scores), wrong.sum()
    return float((ranks[wrong].sum() - hits * (hits + 1) / 2) / (hits * (len(wrong) - hits)))


def drawn(*numbers: int) -> int:
    digest = hashlib.sha256(json.dumps(numbers).encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 2


# --- the table ------------------------------------------------------------------------------------


def table(found: dict[str, Any]) -> str:
    cells: dict[tuple[str, ...], list[dict[str, float]]] = {}
    for name, figures in found["cells"].items():
        *what, _ = name.split(" | ")
        cells.setdefault(tuple(what), []).append(figures)
    names = ("lift auc", "lift recall", "sketch auc", "sketch recall")
    names += ("held back, poisoned", "held back, clean")
    lines = [
        "# Backdoors by poisoned records at honest sites",
        "",
        "TREC (and Alpaca, where it says so), 20 sites, sums alone. Recall at 5 % of clean records",
        f"flagged; *held back* at the fixed bound of {lift.FLAG:g}. Targets: recall 0.9, attack",
        "success 5 %, clean loss 0.5 points.",
        "",
        "| trigger | rate | " + " | ".join(names) + " | seeds |",
        "|---" * (len(names) + 3) + "|",
    ]
    for (stage, kind, rate), rows in cells.items():
        if stage == "detect":
            shown = [_shown([r[n] for r in rows if n in r]) for n in names]
            lines.append(f"| {kind} | {float(rate):.0%} | {' | '.join(shown)} | {len(rows)} |")
    lines += ["", "| trigger | defence | accuracy | attack success | records left out | seeds |"]
    lines += ["|---" * 6 + "|"]
    for (stage, kind, arm), rows in cells.items():
        if stage == "train":
            shown = [_shown([r[n] for r in rows]) for n in ("accuracy", "attack success")]
            out = np.mean([r["left out"] for r in rows])
            lines.append(f"| {kind} | {arm} | {' | '.join(shown)} | {out:.0f} | {len(rows)} |")
    about = found.get("machine", {})
    return "\n".join([*lines, "", f"Machine: {about}. Run: `python benchmarks/backdoor.py`.", ""])


def _shown(values: Sequence[float]) -> str:
    if not values:
        return "-"
    spread = f" ({min(values):.3f} to {max(values):.3f})" if len(values) > 1 else ""
    return f"{np.mean(values):.3f}{spread}"


if __name__ == "__main__":
    main()
