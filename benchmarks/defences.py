"""What each defence takes from each attack, one at a time: a table, measured.

Attacks: whole sequences and their tokens (A1, the span attack), words used (A3), membership (A6)
of the changes that sites send, and made-up secrets (A7) in the model that comes out. Defences:
rounding to fewer bits, more local steps, sums over more sites, frozen embeddings, masks, and DP-SGD
at record level with epsilon 8, 3 and 1 for 30 exchanges.

A1, A3 and A6 attack single exchanges of the GPT and the texts of ``presence.py`` (GARD answers,
with GHR answers and WikiText-2 as what the attacker knows). A7 attacks the last weights of runs
through the whole stack, as of ``fedkola bench audit --profile quick``: there every copy of a secret
has its own patient, or all 64 have one.

Writes ``benchmarks/results/defences.json`` and ``defences.md`` after every cell, and skips cells
that are there already. Run: ``python benchmarks/defences.py DATA [FOLDER [ATTACK...]]``, DATA the
folder of data sets (some ten minutes on a quiet core).
"""

import json
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from presence import World, world
from torch import Tensor

from fedkola.algorithms import common_grid as grids
from fedkola.audit import shadow
from fedkola.audit.dager import Dager
from fedkola.audit.evidence import Evidence, Known, Sequences, Sighting
from fedkola.audit.membership import OUTSIDE, Membership
from fedkola.audit.presence import Presence, embedding
from fedkola.evaluation import leakage, machine
from fedkola.evaluation.cells import Cells
from fedkola.evaluation.leakage_table import DP, GATE
from fedkola.privacy.accounting import Limit, noise_for
from fedkola.types import Scalar

RESULTS = Path(__file__).parent / "results"
DELTA, UNITS, ROUNDS = 1e-4, 1000, 30


@dataclass(frozen=True, slots=True, kw_only=True)
class Defence:
    """One thing done against an attacker; ``settings`` are those of a run."""

    name: str
    bits: int = 0
    longer: int = 1
    sites: int = 1
    frozen: bool = False
    masked: bool = False
    epsilon: float = 0.0
    settings: tuple[str, ...] = ()
    run: bool = True


DEFENCES = (
    Defence(name="none"),
    Defence(name="12 bits", bits=12, settings=("pretrain.bits=12",)),
    Defence(name="8 bits", bits=8, settings=("pretrain.bits=8",)),
    Defence(name="5 bits", bits=5, settings=("pretrain.bits=5", "pretrain.feedback=true")),
    Defence(name="4 x the local steps", longer=4, run=False),
    Defence(name="sum of 4 sites", sites=4, run=False),
    Defence(name="sum of 16 sites", sites=16, run=False),
    Defence(name="frozen embeddings", frozen=True, run=False),
    Defence(name="masks, on one answer", masked=True, run=False),
    Defence(name="DP, epsilon 8", epsilon=8.0, settings=("privacy.epsilon=8",)),
    Defence(name="DP, epsilon 3", epsilon=3.0, settings=("privacy.epsilon=3",)),
    Defence(name="DP, epsilon 1", epsilon=1.0, settings=("privacy.epsilon=1",)),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Target:
    """An attack and the exchange that it likes best: without any defence."""

    attack: Any
    steps: int
    batch: int
    updates: int
    optimiser: str = "adamw"
    lr: float = 1e-3


TARGETS: Mapping[str, Target] = {
    "dager": Target(attack=Dager(), steps=1, batch=1, updates=12, optimiser="sgd", lr=0.1),
    "presence": Target(attack=Presence(), steps=8, batch=8, updates=3),
    "membership": Target(attack=replace(Membership(), outsiders=600), steps=16, batch=8, updates=2),
}
SHOWN: Mapping[str, tuple[str, ...]] = {
    "dager": ("exact", "token_recall"),
    "presence": ("matched_auc", "presence_auc"),
    "membership": ("auc", "tpr_at_1_fpr", "epsilon"),
    "canary": ("exposure_64", "exposure_unit_64", "exposure_1"),
}


def main() -> None:
    torch.set_num_threads(1)
    data, path = Path(sys.argv[1]), RESULTS / "defences.json"
    asked = [(a, d) for a in sys.argv[3:] or (*TARGETS, "canary") for d in DEFENCES]
    with TemporaryDirectory() as place:
        folder = Path(sys.argv[2]) if sys.argv[2:] else Path(place)
        here: list[World] = []
        for attack, defence in asked:
            done = {(one["attack"], one["defence"]) for one in measured(path)}
            if (attack, defence.name) in done or (attack == "canary" and not defence.run):
                continue
            began = time.process_time()
            if attack == "canary":
                found = told(defence, folder)
            else:
                here = here or [world(folder, data, tied=True)]
                found = tried(here[0], TARGETS[attack], defence)
            found |= {"attack": attack, "defence": defence.name}
            found |= {"cpu_seconds": round(time.process_time() - began, 1)}
            # Attacks may be measured by several processes, so what is there is read again.
            cells = [*measured(path), found]
            document = {"machine": machine.describe(), "settings": settings(), "cells": cells}
            path.write_text(json.dumps(document, indent=1))
            (RESULTS / "defences.md").write_text(page(document))
            print(attack, defence.name, shown(found), flush=True)


def measured(path: Path) -> list[dict[str, Any]]:
    """Cells that are there already."""
    found: list[dict[str, Any]] = json.loads(path.read_text())["cells"] if path.exists() else []
    return found


def settings() -> dict[str, Any]:
    return {
        "width": 64, "layers": 2, "vocabulary": 1000, "length": 32, "delta": DELTA, "units": UNITS,
        "exchanges": ROUNDS,
        "attacks": {name: {"steps": one.steps, "batch": one.batch, "updates": one.updates,
                           "optimiser": one.optimiser} for name, one in TARGETS.items()},
    }  # fmt: skip


# --- exchanges ------------------------------------------------------------------------------------


def tried(here: World, target: Target, defence: Defence) -> dict[str, Any]:
    """An attack on exchanges under one defence."""
    exchanges = [exchange(here, target, defence, seed) for seed in range(1, target.updates + 1)]
    truth = {(seen.round, seen.who): used for seen, used in exchanges}
    if isinstance(target.attack, Membership):
        truth[0, OUTSIDE] = here.records[-600:]
    known = Known(foundation=here.foundation, texts=here.texts, seed=0)
    evidence: Evidence = target.attack.run([seen for seen, _ in exchanges], known, truth)
    return {
        "measures": {name: asdict(one) for name, one in evidence.measures.items()},
        "control": {**asdict(evidence.control), "passed": evidence.control.passed},
        "updates": evidence.updates,
        "tokens": sum(len(row) for row in exchanges[0][1]),
    }


def exchange(
    here: World, target: Target, defence: Defence, seed: int
) -> tuple[Sighting, Sequences]:
    """A change as sites make it under a defence, and the sequences behind it."""
    protocol: dict[str, Scalar] = {
        "name": "rehearsal",
        "inner_steps": target.steps * defence.longer,
        "batch": target.batch,
        "lr": target.lr,
        "optimiser": target.optimiser,
        "weight_decay": 0.0,
    }
    if defence.epsilon:
        limit = Limit(unit="record", epsilon=defence.epsilon, delta=DELTA)
        count = target.steps * ROUNDS
        sigma = noise_for(limit, rate=target.batch / UNITS, count=count)
        protocol |= {"sigma": sigma, "clip": 1.0, "units": UNITS, "delta": DELTA}
    table = embedding(here.foundation)
    moving = {n: v for n, v in here.weights.items() if not (defence.frozen and n == table)}
    seen = Sighting(
        round=1, who=f"update {seed}", sites=defence.sites, before=here.weights, change=moving,
        protocol=protocol,
    )  # fmt: skip
    how = shadow.recipe(seen)
    pools = held(here, how, defence.sites, seed)
    made = shadow.shadow(here.foundation, here.weights, how, pools, seed=seed)
    change = {name: made.change[name] for name in moving}
    return replace(seen, change=travelled(change, defence, target, seed)), made.used


def travelled(
    change: Mapping[str, Tensor], defence: Defence, target: Target, seed: int
) -> dict[str, Tensor]:
    """A change after it was rounded to the common grid, or masked."""
    chance = torch.Generator().manual_seed(seed)
    if defence.masked:
        # Words of a masked answer are uniform; the attacker reads them on the grid.
        spread = {n: float(v.abs().max()) or 1.0 for n, v in change.items()}
        return {
            n: (torch.rand(v.shape, generator=chance) * 2 - 1) * spread[n]
            for n, v in change.items()
        }
    if not defence.bits:
        return dict(change)
    out = {}
    for name, value in change.items():
        exponent = grids.first(defence.bits, float(value.abs().max()))
        whole = grids.rounded(value, exponent, defence.bits, chance)
        out[name] = (whole.double() * 2.0**-exponent).float()
    return out


def held(here: World, how: shadow.Recipe, sites: int, seed: int) -> list[list[tuple[int, ...]]]:
    """Records of each site: as many as are read once, or UNITS with noise."""
    generator = torch.Generator().manual_seed(seed)
    pool = here.records[:-600]
    order = torch.randperm(len(pool), generator=generator).tolist()
    each = UNITS if how.sigma else how.steps * how.batch
    while len(order) < sites * each:
        order += order
    return [[pool[i] for i in order[at * each : (at + 1) * each]] for at in range(sites)]


# --- runs -----------------------------------------------------------------------------------------


def told(defence: Defence, folder: Path) -> dict[str, Any]:
    """Secrets in the last weights of a run through the whole stack, by how many patients told."""
    size = replace(leakage.SIZES["quick"], canaries=8, extra=defence.settings)
    name = defence.name.replace(" ", "-").replace(",", "")
    cells = Cells(folder=folder / "runs" / name, note=lambda text: None)
    bench = leakage.Bench(size=size, cells=cells, progress=lambda report: None, attacks=("canary",))
    bench.models.mkdir(parents=True, exist_ok=True)
    cell = bench.cell(DP if defence.epsilon else GATE, 1)
    (found,) = [
        one for one in cell["attacks"] if one["name"] == "canary" and one["target"] == "model"
    ]
    return {
        "measures": found["metrics"],
        "control": found["positive_control"],
        "updates": found["updates"],
        "perplexity": [cell["before"], cell["after"]],
    }


# --- the table ------------------------------------------------------------------------------------

COLUMNS: Sequence[tuple[str, str, str]] = (
    ("sequences", "dager", "exact"),
    ("tokens", "dager", "token_recall"),
    ("words", "presence", "matched_auc"),
    ("members", "membership", "auc"),
    ("epsilon refuted", "membership", "epsilon"),
    ("secret, 64 patients", "canary", "exposure_64"),
    ("secret, 1 patient", "canary", "exposure_unit_64"),
    ("secret, told once", "canary", "exposure_1"),
)


def page(document: Mapping[str, Any]) -> str:
    """A row a defence, a column an attack."""
    about, cells = document["machine"], document["cells"]
    lines = [
        "# What each defence takes from each attack",
        "",
        "| defence | " + " | ".join(name for name, _, _ in COLUMNS) + " |",
        "|---" * (len(COLUMNS) + 1) + "|",
    ]
    for defence in DEFENCES:
        row = [_cell(cells, defence.name, attack, measure) for _, attack, measure in COLUMNS]
        if any(row):
            lines.append(f"| {defence.name} | " + " | ".join(row) + " |")
    once = TARGETS["dager"]
    lines += [
        "",
        "Each defence alone, against what the attack likes best; scores with 95 % intervals and,",
        "after the stroke, the null. *Sequences* and *tokens*: share recovered by the span attack",
        f"from {once.steps} plain step on {once.batch} sequence of 32 tokens, width 64. *Words*:",
        "AUC of telling used words from others of equal prior, 8 steps of AdamW. *Members*: AUC of",
        "telling records read in 16 steps from others, and the epsilon that guesses refute.",
        "*Secrets*: bits of 16 that the released model tells of made-up digits, 64 copies with a",
        "patient each, 64 copies of one patient, and one copy; the null is what those never read",
        "stay below in 95 % of cases. A single answer is seen by the server, and by a network",
        "without TLS, unless it is masked; sums are seen by both and by every site; the model by",
        "whoever gets it. Epsilon is for one patient or record and 30 exchanges. Empty: does not",
        "apply, as a model says the same whoever saw the answers.",
        "",
        f"Measured on {about['cores']} cores ({about['processor']}), torch {about['torch']}, load "
        f"{about['load']:.0f}; {sum(one['cpu_seconds'] for one in cells):.0f} s of one core. "
        "Reproduce: `python benchmarks/defences.py DATA`.",
    ]
    return "\n".join(lines) + "\n"


def shown(cell: Mapping[str, Any]) -> str:
    """One cell as a line."""
    scores = [
        f"{n} {score(cell['measures'][n])}" for n in SHOWN[cell["attack"]] if n in cell["measures"]
    ]
    return "; ".join(scores) + ("" if cell["control"]["passed"] else " BROKEN")


def score(measure: Mapping[str, Any]) -> str:
    null = measure.get("null")
    said = f"{measure['value']:.2f} [{measure['low']:.2f}, {measure['high']:.2f}]"
    return said if null is None else f"{said} / {null:.2f}"


def _cell(cells: Sequence[Mapping[str, Any]], defence: str, attack: str, measure: str) -> str:
    for one in cells:
        if (one["attack"], one["defence"]) == (attack, defence) and measure in one["measures"]:
            return score(one["measures"][measure]) + (
                "" if one["control"]["passed"] else " (broken)"
            )
    return ""


if __name__ == "__main__":
    main()
