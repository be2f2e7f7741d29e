"""Suite ``audit``: what could each observer reconstruct, and what does each defence take away?

Every row is a run of its own through the whole stack: sites train one small GPT, every message is
recorded, and the attacks read the recording as each observer saw it. Rows ``off`` and ``masked``
exchange after a single plain step, which is where text can be read word for word; ``gate on`` is
what the sites' own gate lets pass; ``masked + DP`` adds noise at every site. A network under TLS
looks at the recording of ``off``. Canaries stand in the text of one site in the last two rows.

The quick profile trains on descriptions of ICD-10-CM, which come with the installation; the
standard one on MedQuAD, six NIH sources as sites, from a folder that you have.
"""

import shutil
import time
from collections.abc import Mapping, Sequence
from dataclasses import astuple, dataclass, field, replace
from functools import partial
from pathlib import Path
from random import Random
from typing import Any

import torch

from fedkola import server
from fedkola.errors import PolicyRefused, UnknownName
from fedkola.evaluation import auditing, machine, perplexity, pretrain, tasks
from fedkola.evaluation import cells as marks
from fedkola.evaluation import session as sessions
from fedkola.evaluation.cells import Cells, Found, Note, Progress
from fedkola.evaluation.leakage_table import (
    DELTA,
    DP,
    EPSILON,
    GATE,
    MASKED,
    OFF,
    ROWS,
    TLS,
    judge,
    table,
)
from fedkola.knowledge.stream import Stream
from fedkola.plan import Plan, as_dict, override
from fedkola.training import fresh, model, whole
from fedkola.training.fresh import Shape
from fedkola.training.model import Foundation, encode
from fedkola.training.whole import Local
from fedkola.types import Dataset, Weights

OPEN = ('site.embedding="presence-disclosed"', 'site.waive=["gate_span"]')
# What is kept of an attack in the results; true text is not.
KEPT = (
    *("name", "observer", "target", "concern", "updates", "verdict", "seconds", "leading"),
    *("metrics", "positive_control", "notes"),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Size:
    """A profile: data, model, how sites train in rows of one step and in rows of many.

    ``records`` are the most of a site (0: all), ``warm`` steps of training on public text come
    before any run. Of each kind ``updates`` are attacked in rows of one step, ``few`` in rows of
    many. ``extra`` settings come last.
    """

    data: str
    shape: Shape
    warm: int
    records: int
    seeds: int
    short: int
    once: int
    rounds: int
    inner_steps: int
    batch: int
    lr: float
    canaries: int
    updates: int
    few: int
    texts: int
    profile: str
    extra: tuple[str, ...] = field(default=())


SIZES: Mapping[str, Size] = {
    "quick": Size(
        data="icd10cm",
        shape=Shape(width=64, layers=2, heads=2, vocabulary=1000, length=32),
        warm=150,
        records=700,
        seeds=1,
        short=16,
        once=6,
        rounds=16,
        inner_steps=12,
        batch=8,
        lr=3e-3,
        canaries=4,
        updates=24,
        few=4,
        texts=400,
        profile="quick",
    ),
    "standard": Size(
        data="medquad",
        shape=Shape(width=64, layers=2, heads=2, vocabulary=1000, length=32),
        warm=300,
        records=3000,
        seeds=3,
        short=16,
        once=10,
        rounds=24,
        inner_steps=16,
        batch=16,
        lr=3e-3,
        canaries=8,
        updates=60,
        few=12,
        texts=1000,
        profile="standard",
    ),
}


def run(
    *,
    profile: str = "standard",
    seeds: int = 0,
    out: Path = Path("benchmarks/results"),
    note: Note,
    progress: Progress,
    chosen: Sequence[str] = (),
) -> Mapping[str, Any]:
    """Measure what is not measured yet, then write ``audit-PROFILE.json`` and ``.md``.

    Raises UnknownName for a profile or row that there is not, DataError without the corpora.
    """
    if profile not in SIZES:
        raise UnknownName(f"suite audit has the profiles {', '.join(SIZES)}; got {profile!r}")
    runs = [row for row in ROWS if row != TLS]
    for name in chosen:
        if name not in runs:
            raise UnknownName(f"suite audit has the rows {', '.join(runs)}; got {name!r}")
    size, name = SIZES[profile], f"audit-{profile}"
    bench = Bench(size=size, cells=Cells(folder=out / "cells" / name, note=note), progress=progress)
    bench.models.mkdir(parents=True, exist_ok=True)
    found = [
        bench.cell(row, seed)
        for seed in range(1, (seeds or size.seeds) + 1)
        for row in (chosen or runs)
    ]
    shutil.rmtree(bench.models)
    result = {
        "suite": "audit",
        "profile": profile,
        "machine": machine.describe(),
        "rows": dict(ROWS),
        "cells": found,
        "targets": judge(found),
    }
    marks.write(result, table(result), out, name)
    return result


@dataclass(frozen=True, slots=True, kw_only=True)
class Bench:
    """One benchmark in progress; ``attacks`` none is all."""

    size: Size
    cells: Cells
    progress: Progress
    attacks: tuple[str, ...] = ()

    @property
    def models(self) -> Path:
        """Public models, one a seed, while the suite runs."""
        return self.cells.folder / "models"

    def cell(self, row: str, seed: int) -> Found:
        """One row under one seed, run, recorded and attacked once."""
        plan, size = self.plan(row, seed), self.size
        about = {
            "plan": {k: v for k, v in as_dict(plan).items() if k != "model"},
            "size": [*astuple(size.shape), size.warm, size.records, size.texts],
            "updates": [size.updates, size.few],
            "profile": size.profile,
            "attacks": list(self.attacks),
        }
        name = row.replace(" + ", "-").replace(" ", "-")
        how = partial(self._measured, row, plan)
        return {"row": row, "seed": seed, **self.cells.measure(f"{name}-{seed}", about, how)}

    def plan(self, row: str, seed: int) -> Plan:
        """The plan of a row; its model is made later, in the folder of the run."""
        size, masked = self.size, row != OFF
        once = row in (OFF, MASKED)
        settings = [
            f"run.name={row.split()[0]}",
            f"run.seed={seed}",
            f"run.rounds={size.once if once else size.rounds}",
            f"model.max_tokens={size.shape.length}",
            "model.threads=1",
            f"task.name={size.data}",
            f"task.unlabelled={'true' if size.data == 'medquad' else 'false'}",
            "task.windows=1",
            "task.sites=4",
            "task.test_share=0.2",
            "algorithm.name=diloco",
            "knowledge.public_reference=true",
            f"privacy.secure_sum={'true' if masked else 'false'}",
            f"site.plain={'false' if masked else 'true'}",
            "audit.record=true",
            'audit.rounds=["all"]',
            "pretrain.bits=24",
            f"pretrain.lr={size.lr}",
            "pretrain.warmup=4",
        ]
        settings += OPEN[:1] if row == GATE else OPEN if once else ()
        if once:
            settings += [
                "pretrain.optimiser=sgd",
                "pretrain.inner_steps=1",
                "pretrain.batch=1",
                "pretrain.weight_decay=0",
                f"pretrain.length={size.short}",
            ]
        else:
            settings += [
                f"pretrain.inner_steps={size.inner_steps}",
                f"pretrain.batch={size.batch}",
                f"pretrain.length={size.shape.length}",
                f"audit.canaries={size.canaries}",
            ]
        if row == DP:
            settings += [f"privacy.epsilon={EPSILON}", f"privacy.delta={DELTA}"]
        return override(Plan(), [*settings, *size.extra])

    def _measured(self, row: str, plan: Plan, work: Path) -> Found:
        torch.set_num_threads(1)
        made = world(plan, self.size)
        stream = tasks.with_canaries(made.stream, plan)
        folder = self.models / f"{plan.run.seed}"
        base = self._base(folder, made.public, plan.run.seed)
        plan = override(plan, [f"model.name={folder}"])
        refused = "" if row not in (OFF, MASKED) else _refused(plan)
        began = time.perf_counter()
        session = sessions.open_run(plan, work / "run", stream=stream, foundation=base)
        with session.ledger:
            state = sessions.execute(session, progress=self.progress)
            trained = time.perf_counter() - began
            began = time.perf_counter()
            observers = ["wire", "server", f"client:{min(stream.sites)}", "model"]
            document = auditing.audit(
                session,
                observers=["tls", *observers] if row == OFF else observers,
                profile=self.size.profile,
                attacks=self.attacks,
                texts=stream.test.texts[: self.size.texts],
                updates=self.size.updates if row in (OFF, MASKED) else self.size.few,
                note=self.cells.note,
            )
        ends = [_figure(base, stream, w, plan) for w in (whole.parameters(base), state.weights)]
        return {
            "attacks": [{key: one[key] for key in KEPT} for one in document["attacks"]],
            "views": document["views"],
            "verdicts": document["verdicts"],
            "passed": document["passed"],
            "not_run": document["not_run"],
            "refused": refused,
            "run_seconds": trained,
            "audit_seconds": time.perf_counter() - began,
            "before": ends[0],
            "after": ends[1],
        }

    def _base(self, folder: Path, own: list[str], seed: int) -> Foundation:
        """A small GPT with a tokenizer of public text, trained on that text a little."""
        if not folder.exists():
            draft = folder.with_suffix(".tmp")
            shutil.rmtree(draft, ignore_errors=True)
            fresh.create(draft, self.size.shape, own, seed=seed)
            base = model.load(str(draft), max_tokens=self.size.shape.length, whole=True)
            rows = [ids for ids in encode(base, own) if len(ids) > 1]
            chance = Random(seed)
            batches = [chance.sample(rows, 16) for _ in range(self.size.warm)]
            weights, _, _ = whole.train(
                base, whole.parameters(base), batches, Local(lr=2e-3, warmup=10)
            )
            whole.save(base, weights, draft)
            draft.rename(folder)
        return model.load(str(folder), max_tokens=self.size.shape.length, whole=True)


@dataclass(frozen=True, slots=True, kw_only=True)
class World:
    """What sites hold, and the public text that everybody has."""

    stream: Stream
    public: list[str]


def world(plan: Plan, size: Size) -> World:
    """The sites' texts of a profile, cut to its size. Raises DataError without the corpora.

    Of ICD-10-CM every record is a patient and every fifth is held out; what clinicians call the
    codes is public. Of MedQuAD a disease is a patient; public are lines of WikiText-2.
    """
    whole_stream = tasks.load(replace(plan, audit=replace(plan.audit, canaries=0)))
    chance = Random(plan.run.seed)
    names = sorted(whole_stream.sites)
    if size.data != "icd10cm":
        sites = {n: _some(whole_stream.sites[n], size.records, chance) for n in names}
        return World(stream=replace(whole_stream, sites=sites), public=pretrain.public())
    drawn = {n: _some(whole_stream.sites[n], size.records, chance) for n in names}
    alone = {n: replace(d, patients=d.records, windows=(1,) * len(d)) for n, d in drawn.items()}
    sites = {n: d.take([i for i in range(len(d)) if i % 5]) for n, d in alone.items()}
    held = [d.take(range(0, len(d), 5)) for d in alone.values()]
    rows = [(d, i) for d in held for i in range(len(d))]
    chance.shuffle(rows)
    test = Dataset(
        records=tuple(d.records[i] for d, i in rows),
        texts=tuple(d.texts[i] for d, i in rows),
        labels=tuple(d.labels[i] for d, i in rows),
        patients=tuple(d.patients[i] for d, i in rows),
        windows=(1,) * len(rows),
    )
    stream = replace(whole_stream, sites=sites, test=test)
    return World(stream=stream, public=list(whole_stream.test.texts))


# --- private --------------------------------------------------------------------------------------


def _figure(base: Foundation, stream: Stream, weights: Weights, plan: Plan) -> float:
    """Held-out perplexity."""
    length = plan.pretrain.length
    found = perplexity.perplexities(base, stream, weights, length=length, rows=200)
    return perplexity.figures(found)["perplexity"]


def _refused(plan: Plan) -> str:
    """The code by which a gate that waives nothing refuses a plan; empty if it does not."""
    strict = replace(plan, site=replace(plan.site, waive=()))
    try:
        server.check(strict)
    except PolicyRefused as error:
        return error.code
    return ""


def _some(data: Dataset, most: int, chance: Random) -> Dataset:
    rows = list(range(len(data)))
    chance.shuffle(rows)
    return data.take(sorted(rows[: most or None]))
