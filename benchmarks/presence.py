"""What a change of weights tells: tokens used (A3), membership (A6), planted secrets (A7).

A GPT of 0.16 M parameters with 1,000 pieces, trained a little on public text (WikiText-2 and half
of GHR), goes on at sites that hold GARD answers; the attacker has another half of GHR as text of
its own. Each row is a defence: none, a secure sum of four sites, frozen embeddings, untied
embeddings, DP-SGD at record level with epsilon 3 for the whole run. The nulls and the positive
controls are those of the attacks. Under DP the table also says whether the training learnt
anything: what learns nothing tells nothing.

Writes ``benchmarks/results/presence.json`` and ``presence.md`` after every row, and skips rows that
are there already. Run: ``python benchmarks/presence.py DATA [FOLDER]``, DATA the folder of data
sets (some six minutes on a quiet core).
"""

import gzip
import json
import random
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

from fedkola.audit import shadow
from fedkola.audit.canary import CanaryExposure
from fedkola.audit.evidence import Attack, Evidence, Known, Sequences, Sighting, Truth
from fedkola.audit.membership import OUTSIDE, Membership
from fedkola.audit.one_run import tpr_bound
from fedkola.audit.presence import Presence, embedding
from fedkola.evaluation import machine
from fedkola.privacy.accounting import Limit, noise_for
from fedkola.training import fresh, whole
from fedkola.training.model import Foundation, encode, load
from fedkola.training.whole import Local
from fedkola.types import Scalar

RESULTS = Path(__file__).parent / "results"
LENGTH, BATCH, LR = 32, 8, 1e-3
EPSILON, DELTA, UNITS = 3.0, 1e-4, 1000
SEEDS = (1, 2, 3)


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One line of the table. ``steps`` are H; a run has ``rounds`` times as many under DP."""

    attack: str
    sites: int = 1
    steps: int = 8
    private: bool = False
    tied: bool = True
    frozen: bool = False
    rounds: int = 30

    @property
    def name(self) -> str:
        who = "one site" if self.sites == 1 else f"sum of {self.sites}"
        parts = [who, f"H = {self.steps}", "tied" if self.tied else "untied"]
        parts += ["frozen embedding"] * self.frozen + [f"DP, epsilon {EPSILON:g}"] * self.private
        return ", ".join(parts)


ROWS = (
    Row(attack="presence"),
    Row(attack="presence", sites=4),
    Row(attack="presence", private=True),
    Row(attack="presence", sites=4, private=True),
    Row(attack="canary", steps=186),
    Row(attack="canary", steps=186, rounds=1, private=True),
    Row(attack="membership", steps=32),
    Row(attack="membership", steps=32, private=True),
    Row(attack="membership", steps=32, sites=4),
    Row(attack="presence", frozen=True),
    Row(attack="presence", tied=False),
    Row(attack="presence", steps=32),
    Row(attack="presence", steps=32, sites=4),
    Row(attack="presence", sites=4, frozen=True),
    Row(attack="presence", sites=4, tied=False),
    Row(attack="membership", steps=32, sites=4, private=True),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class World:
    """A public model and its weights, text of the attacker, records of the sites."""

    foundation: Foundation
    weights: dict[str, Tensor]
    texts: tuple[str, ...]
    records: Sequences


def main() -> None:
    torch.set_num_threads(1)
    data = Path(sys.argv[1])
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / "presence.json"
    found = json.loads(path.read_text())["rows"] if path.exists() else []
    with TemporaryDirectory() as place:
        folder = Path(sys.argv[2]) if sys.argv[2:] else Path(place)
        worlds: dict[bool, World] = {}
        for row in ROWS:
            if any(asdict(row) == one["row"] for one in found):
                continue
            if row.tied not in worlds:
                worlds[row.tied] = world(folder, data, tied=row.tied)
            began = time.process_time()
            found.append(measured(worlds[row.tied], row))
            found[-1]["cpu_seconds"] = round(time.process_time() - began, 1)
            document = {"machine": machine.describe(), "settings": settings(), "rows": found}
            path.write_text(json.dumps(document, indent=1))
            (RESULTS / "presence.md").write_text(page(document))
            print(line(found[-1]), flush=True)


def settings() -> dict[str, Scalar]:
    return {
        "width": 64, "layers": 2, "vocabulary": 1000, "length": LENGTH, "batch": BATCH, "lr": LR,
        "epsilon": EPSILON, "delta": DELTA, "units": UNITS, "seeds": len(SEEDS),
    }  # fmt: skip


def world(folder: Path, data: Path, *, tied: bool) -> World:
    """The public model, made and trained once per folder."""
    own, public = halves(answers(data, "3_GHR_QA"))
    with gzip.open(data / "pretrain" / "wikitext2_valid.txt.gz", "rt", encoding="utf-8") as file:
        public = [line for line in file.read().split("\n") if len(line) > 200] + public
    place = folder / ("tied" if tied else "untied")
    if not place.exists():
        shape = fresh.Shape(width=64, layers=2, heads=2, vocabulary=1000, length=64)
        fresh.create(place, shape, public, seed=0)
        if not tied:
            config = AutoConfig.from_pretrained(place)
            config.tie_word_embeddings = False
            with torch.random.fork_rng():
                torch.manual_seed(0)
                AutoModelForCausalLM.from_config(config).save_pretrained(place)
    foundation = load(str(place), max_tokens=LENGTH, whole=True)
    records = encode(foundation, public)
    generator = torch.Generator().manual_seed(0)
    batches = [
        [records[i] for i in torch.randint(len(records), (16,), generator=generator).tolist()]
        for _ in range(300)
    ]
    start = whole.parameters(foundation)
    weights, _, _ = whole.train(foundation, start, batches, Local(lr=2e-3, warmup=20))
    sites = encode(foundation, answers(data, "2_GARD_QA"))
    random.Random(0).shuffle(sites)
    return World(
        foundation=foundation,
        weights=weights,
        texts=tuple(own),
        records=tuple(dict.fromkeys(tuple(ids) for ids in sites)),
    )


def answers(data: Path, name: str) -> list[str]:
    with gzip.open(data / "medquad" / f"{name}.jsonl.gz", "rt", encoding="utf-8") as file:
        texts = [json.loads(line)["answer"] or "" for line in file]
    return [text for text in texts if len(text) > 100]


def halves(texts: list[str]) -> tuple[list[str], list[str]]:
    return texts[:500], texts[500:1000]


# --- one row --------------------------------------------------------------------------------------


def measured(here: World, row: Row) -> dict[str, object]:
    run: dict[str, Callable[[World, Row], tuple[Evidence, dict[str, float]]]] = {
        "presence": presence,
        "membership": membership,
        "canary": canary,
    }
    evidence, more = run[row.attack](here, row)
    return {
        "row": asdict(row),
        "name": row.name,
        "measures": {name: asdict(one) for name, one in evidence.measures.items()},
        "control": {**asdict(evidence.control), "passed": evidence.control.passed},
        "updates": evidence.updates,
        "notes": evidence.notes,
        "more": more,
    }


def presence(here: World, row: Row) -> tuple[Evidence, dict[str, float]]:
    return attacked(here, row, Presence(), [exchange(here, row, seed) for seed in SEEDS])


def membership(here: World, row: Row) -> tuple[Evidence, dict[str, float]]:
    """One update, since 1,000 outsiders and 256 members are scored in it; they are of one kind."""
    outside = {(0, OUTSIDE): here.records[-1000:]}
    evidence, more = attacked(here, row, Membership(), [exchange(here, row, 1)], outside)
    if row.private:
        more["tpr_bound"] = tpr_bound(EPSILON, DELTA)
    return evidence, more


def canary(here: World, row: Row) -> tuple[Evidence, dict[str, float]]:
    """Canaries among 400 other records, read twice; under DP a copy is a record of its own."""
    attack = CanaryExposure()
    texts = [one.text for one in attack.canaries() for _ in range(one.repeats)]
    planted = [tuple(ids) for ids in encode(here.foundation, texts)]
    records = [*here.records[:400], *planted]
    random.Random(0).shuffle(records)
    return attacked(here, row, attack, [exchange(here, row, 1, records, lr=3e-3)])


def exchange(
    here: World,
    row: Row,
    seed: int,
    records: Sequence[tuple[int, ...]] = (),
    *,
    lr: float = LR,
) -> tuple[Sighting, Sequences]:
    """A change as the sites of this row make it, and the records behind it."""
    units = len(records) or UNITS
    protocol: dict[str, Scalar] = {
        "name": "rehearsal", "inner_steps": row.steps, "batch": BATCH, "lr": lr,
    }  # fmt: skip
    if row.private:
        limit = Limit(unit="record", epsilon=EPSILON, delta=DELTA)
        count = row.steps * row.rounds
        sigma = noise_for(limit, rate=BATCH / units, count=count)
        protocol |= {"sigma": sigma, "clip": 1.0, "units": units, "delta": DELTA}
    change = dict(here.weights)
    if row.frozen:
        change.pop(embedding(here.foundation))
    seen = Sighting(
        round=1, who=f"update {seed}", sites=row.sites, before=here.weights, change=change,
        protocol=protocol,
    )  # fmt: skip
    how = shadow.recipe(seen)
    own = list(records) or held(here, how.sigma, row, seed)
    pools = [own[site :: row.sites] for site in range(row.sites)]
    made = shadow.shadow(here.foundation, here.weights, how, pools, seed=seed)
    change = {name: value for name, value in made.change.items() if name in change}
    return replace(seen, change=change), made.used


def held(here: World, sigma: float, row: Row, seed: int) -> list[tuple[int, ...]]:
    """Records of the sites of one update: as many as are read once, or UNITS each with DP."""
    wanted = row.sites * (UNITS if sigma else row.steps * BATCH)
    pool = list(here.records[:-1000])
    random.Random(seed).shuffle(pool)
    if wanted > len(pool):
        pool *= -(-wanted // len(pool))
    return pool[:wanted]


def attacked(
    here: World,
    row: Row,
    attack: Attack,
    exchanges: Sequence[tuple[Sighting, Sequences]],
    more: Truth | None = None,
) -> tuple[Evidence, dict[str, float]]:
    truth = {(seen.round, seen.who): used for seen, used in exchanges} | dict(more or {})
    known = Known(foundation=here.foundation, texts=here.texts, seed=0)
    evidence = attack.run([seen for seen, _ in exchanges], known, truth)
    first, used = exchanges[0]
    after = {n: v + first.change.get(n, torch.zeros(())) for n, v in here.weights.items()}
    test = here.records[-200:]
    losses = [whole.nll(here.foundation, w, test).sum(dim=0) for w in (here.weights, after)]
    before, now = (float(found[0] / found[1]) for found in losses)
    said = {"loss_before": before, "loss_after": now, "tokens": float(sum(map(len, used)))}
    sigma = first.protocol.get("sigma")
    return evidence, said | ({"sigma": float(sigma)} if isinstance(sigma, float) else {})


# --- the table ------------------------------------------------------------------------------------

SHOWN = {
    "presence": ("presence_auc", "matched_auc", "unseen_auc", "once_auc", "frequency_auc"),
    "membership": ("auc", "tpr_at_1_fpr", "epsilon"),
    "canary": ("exposure_0", "exposure_1", "exposure_4", "exposure_16", "exposure_64", "top40_64"),
}


def page(document: Mapping[str, Any]) -> str:
    """Every score with its 95 % interval and, after a stroke, its null."""
    about, rows = document["machine"], document["rows"]
    lines = [
        "# What a change of weights tells",
        "",
        "Scores with 95 % intervals, after the stroke their null. *Presence*: AUC over rows of",
        "the vocabulary, over rows that the attacker's text lacks (unseen), over tokens used",
        "once, and by the frequency in its text alone; *matched* compares rows of equal prior",
        "only, so that what is known without the change counts for nothing. *Membership*: AUC,",
        "and true positives at 1 % of 1,000 outsiders; epsilon is refuted below, from 60",
        "guesses about 100 planted directions. *Canary*: exposure in bits of 16 by number of",
        "copies. Epsilon is for one record, and a canary of 64 copies is 64 records. The",
        "control is the attack on the same records with nothing held back. Loss: nats per token",
        "on 200 records of no site, before and after the change.",
        "",
        "| attack | setting | scores [95 %] / null | control | loss |",
        "|---|---|---|---|---|",
        *map(line, rows),
        "",
        f"Measured on {about['cores']} cores ({about['processor']}), torch {about['torch']}, load "
        f"{about['load']:.0f}; {sum(row['cpu_seconds'] for row in rows):.0f} s of one core. "
        "Reproduce: `python benchmarks/presence.py DATA`.",
    ]
    return "\n".join(lines) + "\n"


def line(one: Mapping[str, Any]) -> str:
    """One row of the table."""
    attack, more, control = one["row"]["attack"], one["more"], one["control"]
    scores = [
        f"{name.removesuffix('_auc')} {score(one['measures'][name])}"
        for name in SHOWN[attack]
        if name in one["measures"]
    ]
    if "tpr_bound" in more:
        scores.append(f"bound on TPR {more['tpr_bound']:.3f}")
    passed = "" if control["passed"] else " (failed)"
    return (
        f"| {attack} | {one['name']} | {'; '.join(scores)} | {control['value']:.3f}{passed} | "
        f"{more['loss_before']:.2f} to {more['loss_after']:.2f} |"
    )


def score(measure: Mapping[str, Any]) -> str:
    null = "" if measure["null"] is None else f" / {measure['null']:.3f}"
    return f"{measure['value']:.3f} [{measure['low']:.3f}, {measure['high']:.3f}]{null}"


if __name__ == "__main__":
    main()
