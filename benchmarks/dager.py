"""What the span attack (DAGER) reconstructs, and where it ends.

First part: plain gradients of real sentences with fewer tokens than the model is wide, on a
pretrained Llama of width 64 (rotary positions, tied, grouped keys) and on a GPT of width 128 made
here from public text, batches of 1, 2 and 4 sentences. A sentence counts as exact if every token is
right, the last one included. Second part, on the GPT and pieces of notes of 32 tokens: more tokens
in a step, more local steps, sums of sites, AdamW, rounding, noise. Intervals: bootstrap over
updates, Clopper-Pearson for whole sentences. The null is the better of two: scored against another
update's truth, and random words of the same shape.

Writes ``benchmarks/results/dager.json`` and ``dager.md`` and prints the table. Run:
``python benchmarks/dager.py [UPDATES] [REGION_UPDATES]`` (some fifteen minutes on one core; the
data folder is read from FEDKOLA_DATA).
"""

import gzip
import json
import os
import random
import re
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor

from fedkola.audit import scoring, trial
from fedkola.audit.dager import Dager
from fedkola.audit.evidence import Sequences, Sighting
from fedkola.evaluation import machine
from fedkola.training import fresh, whole
from fedkola.training.model import Foundation, encode, load
from fedkola.training.whole import Local

DATA = Path(os.environ.get("FEDKOLA_DATA", Path(__file__).parents[2] / "shared" / "data"))
RESULTS = Path(__file__).parent / "results"
SEED = 4
SETS = {
    "CoLA": "cola_dev",
    "SST-2": "sst2_dev",
    "Rotten Tomatoes": "rotten_tomatoes",
    "ACI-Bench notes": "",
}
STEPS, PIECE = 150, 32
SGD = Local(optimiser="sgd", lr=0.1, weight_decay=0.0, clip=0.0)
ADAMW = Local(lr=1e-3)
SHOWN = ("token_recall", "token_precision", "exact", "rouge_2", "rouge_l")
Words = dict[str, Tensor]


def main() -> None:
    torch.set_num_threads(1)
    updates = int(sys.argv[1]) if sys.argv[1:] else 24
    region = int(sys.argv[2]) if sys.argv[2:] else 10
    began = time.process_time()
    rows = []
    with TemporaryDirectory() as place:
        tiny = load(str(DATA / "models" / "stories260K"), max_tokens=128)
        gpt, weights = made(Path(place) / "gpt")
        for label, base, held in (
            ("stories260K, d 64", tiny, whole.parameters(tiny)),
            ("GPT, d 128", gpt, weights),
        ):
            for name in SETS:
                targets = list(plain(base, held, name, updates))
                rows.append(row(f"{label}", name, base, targets))
                show(rows[-1])
        for name, targets in arms(gpt, weights, region):
            rows.append(row("GPT, d 128", name, gpt, targets))
            show(rows[-1])
    result = {
        "machine": machine.describe(),
        "seed": SEED,
        "cpu_seconds": round(time.process_time() - began, 1),
        "rows": rows,
    }
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "dager.json").write_text(json.dumps(result, indent=1) + "\n")
    (RESULTS / "dager.md").write_text(table(result, len(SETS) * 2))
    print(table(result, len(SETS) * 2))


# --- models and texts -----------------------------------------------------------------------------


def made(folder: Path) -> tuple[Foundation, Words]:
    """A GPT of four layers and 4,096 tokens, and its weights after some steps on public text."""
    with gzip.open(DATA / "pretrain" / "wikitext2_valid.txt.gz", "rt") as file:
        text = re.sub(r"\s*<unk>|@(.)@", r"\1", file.read())
    paragraphs = [line for line in text.splitlines() if len(line) > 200]
    shape = fresh.Shape(width=128, layers=4, heads=4, vocabulary=4096, length=128)
    fresh.create(folder, shape, paragraphs, seed=SEED)
    base = load(str(folder), max_tokens=128)
    ids = encode(base, paragraphs)
    chance = random.Random(SEED)
    batches = ([row[:64] for row in chance.sample(ids, 8)] for _ in range(STEPS))
    local = Local(lr=2e-3, warmup=20)
    weights, _, losses = whole.train(base, whole.parameters(base), batches, local)
    print(f"GPT trained to a loss of {sum(losses[-10:]) / 10:.2f}", flush=True)
    return base, weights


def sentences(name: str) -> list[str]:
    """The sentences of one set, in one fixed order without repeats."""
    if SETS[name]:
        with gzip.open(DATA / "sentence_tasks" / f"{SETS[name]}.jsonl.gz", "rt") as file:
            texts = [json.loads(line)["text"] for line in file]
    else:
        texts = [text for note in notes() for text in re.split(r"(?<=[.?!])\s+|\n+", note)]
    found = [text for text in dict.fromkeys(texts) if len(text) > 20]
    random.Random(SEED).shuffle(found)
    return found


def notes() -> list[str]:
    with gzip.open(DATA / "aci_bench" / "encounters.jsonl.gz", "rt") as file:
        return [json.loads(line)["note"] for line in file]


def plain(
    base: Foundation, weights: Words, name: str, updates: int
) -> Iterator[tuple[Sighting, Sequences]]:
    """One gradient of 1, 2 or 4 sentences each, with fewer tokens than the width in all."""
    left = [tuple(ids) for ids in encode(base, sentences(name)) if len(ids) < base.width]
    for number in range(updates):
        batch: list[tuple[int, ...]] = []
        room = base.width - 1
        for ids in list(left):
            if len(batch) == (1, 2, 4)[number % 3]:
                break
            if len(ids) <= room:
                left.remove(ids)
                batch.append(ids)
                room -= len(ids)
        change = whole.gradient(base, weights, batch)
        yield sighting(weights, change, number, batch=len(batch)), tuple(batch)


def pieces(base: Foundation) -> list[tuple[int, ...]]:
    """Pieces of notes, of 32 tokens each."""
    rows = []
    for ids in encode(base, notes()):
        rows += [tuple(ids[i : i + PIECE]) for i in range(0, len(ids) - PIECE + 1, PIECE)]
    random.Random(SEED).shuffle(rows)
    return rows


# --- where it ends --------------------------------------------------------------------------------


def arms(
    base: Foundation, weights: Words, updates: int
) -> Iterator[tuple[str, list[tuple[Sighting, Sequences]]]]:
    """Every arm of the second part with its updates; the pieces are the same in each."""
    rows = pieces(base)

    def tried(
        count: int, change: Callable[[Sequences, int], Words], **protocol: int
    ) -> list[tuple[Sighting, Sequences]]:
        found = []
        for number in range(updates):
            mine = tuple(rows[(number * 8 + i) % len(rows)] for i in range(count))
            seen = sighting(weights, change(mine, number), number, **protocol)
            found.append((seen, mine))
        return found

    def gradient(mine: Sequences, number: int) -> Words:
        return whole.gradient(base, weights, mine)

    def steps(local: Local) -> Callable[[Sequences, int], Words]:
        def change(mine: Sequences, number: int) -> Words:
            moved, _, _ = whole.train(base, weights, [[ids] for ids in mine], local)
            return {name: moved[name] - weights[name] for name in weights}

        return change

    for count in (1, 2, 3, 4, 6, 8):
        label = f"one gradient, {PIECE * count} tokens"
        yield label, tried(count, gradient, batch=count)
    for count in (2, 3, 4, 8):
        yield f"SGD delta, H = {count}", tried(count, steps(SGD), batch=1, inner_steps=count)
    for count in (2, 3, 4, 6):
        yield f"sum of {count} sites' SGD steps", tried(count, gradient, batch=count)
    for count in (1, 4):
        yield f"AdamW delta, H = {count}", tried(count, steps(ADAMW), batch=1, inner_steps=count)
    for bits in (20, 16, 12, 8):
        yield f"{bits} bits", tried(1, lambda m, n, b=bits: rounded(gradient(m, n), b, n), batch=1)
    for kind in (torch.float16, torch.bfloat16):
        label = str(kind).removeprefix("torch.")
        yield label, tried(1, lambda m, n, k=kind: cast(gradient(m, n), k), batch=1)
    for size in (1e-5, 1e-4, 1e-3):
        label = f"noise {size:g} |g| a coordinate"
        yield label, tried(1, lambda m, n, s=size: noisy(gradient(m, n), s, n), batch=1)


def rounded(change: Words, bits: int, seed: int) -> Words:
    """Stochastic rounding to the common grid, whose range holds the largest entry of a tensor."""
    generator = torch.Generator().manual_seed(seed)
    found = {}
    for name, value in change.items():
        step = float(value.abs().max()) / (2 ** (bits - 1) - 1) or 1.0
        spread = torch.rand(value.shape, generator=generator)
        found[name] = (value / step + spread).floor() * step
    return found


def cast(change: Words, kind: torch.dtype) -> Words:
    return {name: value.to(kind).float() for name, value in change.items()}


def noisy(change: Words, size: float, seed: int) -> Words:
    generator = torch.Generator().manual_seed(seed)
    norm = float(torch.cat([value.flatten() for value in change.values()]).norm())
    return {
        name: value + size * norm * torch.randn(value.shape, generator=generator)
        for name, value in change.items()
    }


# --- scores ---------------------------------------------------------------------------------------


def sighting(weights: Words, change: Words, number: int, **protocol: int) -> Sighting:
    return Sighting(
        round=number,
        who="site",
        sites=1,
        before=weights,
        change=change,
        protocol={"name": "sgd", **protocol},
    )


def row(
    model: str, name: str, base: Foundation, targets: Sequence[tuple[Sighting, Sequences]]
) -> dict[str, Any]:
    """Scores of one arm: means with intervals over updates, and the null."""
    began = time.process_time()
    attack = Dager()
    seen = [s for s, _ in targets]
    truths = [t for _, t in targets]
    got = [attack.recover(base, s) for s in seen]
    took = time.process_time() - began
    scores = [trial.scored(g, t) for g, t in zip(got, truths, strict=True)]
    nulls = trial.null(seen, truths, got, lambda s: attack.recover(base, s), seed=SEED)
    measures = trial.measured(scores, truths, nulls, scoring.METRICS)
    tokens = [sum(map(len, truth)) for truth in truths]
    return {
        "model": model,
        "name": name,
        "updates": len(seen),
        "sequences": sum(map(len, truths)),
        "tokens": [min(tokens), max(tokens)],
        "width": base.width,
        "cpu_seconds_an_update": round(took / len(seen), 2),
        "measures": {
            key: {"value": m.value, "low": m.low, "high": m.high, "null": m.null}
            for key, m in measures.items()
        },
    }


def show(found: dict[str, Any]) -> None:
    values = ", ".join(f"{key} {found['measures'][key]['value']:.3f}" for key in SHOWN)
    print(
        f"{found['model']}; {found['name']}: {values}; {found['cpu_seconds_an_update']} s",
        flush=True,
    )


def table(result: dict[str, Any], first: int) -> str:
    head = (
        "| model | {} | updates | tokens | exact sequences | token recall | precision | ROUGE-2 "
        "| null recall | CPU s |\n|---|---|---|---|---|---|---|---|---|---|\n"
    )
    lines = [[], []]
    for number, found in enumerate(result["rows"]):
        of = found["measures"]
        low, high = found["tokens"]
        cells = [
            found["model"],
            found["name"],
            str(found["updates"]),
            f"{low} to {high}" if low < high else str(low),
            *(interval(of[key]) for key in ("exact", "token_recall", "token_precision", "rouge_2")),
            f"{of['token_recall']['null']:.2f}",
            f"{found['cpu_seconds_an_update']:.1f}",
        ]
        lines[number >= first].append("| " + " | ".join(cells) + " |")
    return (
        "# What the span attack reconstructs\n\n"
        "## One gradient, fewer tokens than the width\n\n"
        + head.format("sentences")
        + "\n".join(lines[0])
        + "\n\n## Where it ends\n\n"
        + head.format("change")
        + "\n".join(lines[1])
        + f"\n\n95 % intervals; {result['cpu_seconds']:.0f} CPU seconds on one thread.\n"
    )


def interval(measure: dict[str, float]) -> str:
    return f"{measure['value']:.2f} [{measure['low']:.2f}, {measure['high']:.2f}]"


if __name__ == "__main__":
    main()
