"""The main job in minutes: twelve hospitals keep an ICD-10-CM coding model current.

A subset of the official descriptions arrives chapter by chapter; one hospital has wrong labels,
one comes late, one leaves and is forgotten with a receipt. Local models, FedIT and joint training
learn from the same records and answer the same clinician synonyms. Every part is a run folder of
its own, so an interrupted demo continues where it stopped.
"""

import json
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from fedkola import server
from fedkola.evaluation import scoring, session, tasks
from fedkola.evaluation.session import Session
from fedkola.knowledge.stream import Stream
from fedkola.ledger import Ledger, RoundRow
from fedkola.plan import Algorithm, Cohort, Knowledge, Plan, Run, Scenario, Task
from fedkola.types import Dataset, Report

UNION = "union"
Note = Callable[[str], None]
Progress = Callable[[Report], None]


def plan() -> Plan:
    """The demo's plan; ``fedkola run`` with it gives the same bank without the comparison."""
    return Plan(
        run=Run(name="demo", seed=7, folder="runs"),
        task=Task(name="icd10cm", level="block", sites=12, windows=8, backlog=0.15, per_label=24),
        scenario=Scenario(
            noisy={"lakeside-eye-ear": 0.4},
            late={"valley-community": 4},
            leave={"meadow-women-children": 6},
        ),
        cohort=Cohort(minimum=3),
        algorithm=Algorithm(name="fedkola", rank=8, alpha=16.0, batch=16, lr=1e-3),
        knowledge=Knowledge(
            features=2048,
            lanes=("analytic", "router", "lora"),
            lora_records=16,
            lora_steps=1,
            lora_floor=128,
            public_reference=True,
        ),
    )


def baselines(whole: Plan) -> dict[str, Plan]:
    """The same records under other methods; rates were chosen on another seed."""
    iterated = Algorithm(name="fedit", rank=8, alpha=16.0, batch=32, lr=5e-4, epochs=2.0)
    return {
        "local": replace(whole, algorithm=replace(whole.algorithm, name="local")),
        "fedit": replace(whole, algorithm=iterated),
        "joint": replace(
            whole,
            run=replace(whole.run, rounds=1),
            scenario=replace(whole.scenario, late={}, leave={}),
            algorithm=replace(iterated, name="joint"),
        ),
    }


def run(
    folder: Path, *, note: Note, progress: Progress, chosen: Plan | None = None
) -> Mapping[str, Any]:
    """Run or continue the demo in ``folder``; returns the document its report shows."""
    whole = chosen or plan()
    cache = folder / "features"
    note("reading ICD-10-CM and dealing it out to the hospitals")
    stream = tasks.load(whole)
    main = session.open_run(whole, folder, cache=cache, stream=stream)
    note("reading every text once with the frozen model")
    embedding_s = embed(main)
    note("FedKoLa: chapters arrive, the bank grows")
    state = server.run(
        main.federation, main.ledger, observe=session.observer(main), progress=progress
    )
    rows = [_row("FedKoLa", main.ledger.rounds(whole.run.name), "one forward pass, then sums")]
    rows[0]["cpu_s"] += embedding_s
    for name, other in baselines(whole).items():
        note(f"{LABELS[name][0]}: {LABELS[name][1]}")
        part = pooled(stream, without=whole.scenario.leave) if name == "joint" else stream
        found = compare(other, folder / "compared" / name, part, main, progress)
        label, what = LABELS[name]
        rows.append(_row(label, found, what, exchanged=name == "fedit"))
    session.publish(main, state, extra={"comparison": sorted(rows, key=_order)})
    note(f"report: {folder / 'report.html'}")
    return session.result(main)


def embed(main: Session) -> float:
    """Fill the shared feature cache in one go; returns the CPU seconds that the sites' texts took.

    A text's integers do not depend on its company, so this changes no bit; hospitals on one
    machine merely share full batches. What it cost is kept for a demo that is resumed.
    """
    kept = main.folder / "embedding.json"
    cache, stream = main.federation.trainer.cache, main.federation.stream
    if kept.exists():
        return float(json.loads(kept.read_text())["cpu_s"])
    began = time.process_time()
    cache.integers([text for data in stream.sites.values() for text in data.texts])
    spent = time.process_time() - began
    cache.integers(stream.test.texts)
    kept.write_text(json.dumps({"cpu_s": spent}))
    return spent


def compare(
    other: Plan, folder: Path, stream: Stream, main: Session, progress: Progress
) -> tuple[RoundRow, ...]:
    """Run one baseline to its end in a folder of its own, measured after its last round."""
    federation = server.assemble(
        other,
        stream,
        folder,
        cache=main.folder / "features",
        foundation=main.federation.foundation,
    )
    with Ledger.open(folder, create=True) as ledger:

        def observe(number: int, state: Any) -> Mapping[str, float]:
            if number < federation.rounds:
                return {}
            window = len(stream.windows)
            test = scoring.askable(stream.test, window)
            found = scoring.accuracy(federation, state, test, window=window)
            return {"top1": found.top1, "top5": found.top5, "asked": found.asked}

        server.run(federation, ledger, observe=observe, progress=progress)
        return ledger.rounds(other.run.name)


def pooled(stream: Stream, *, without: Mapping[str, int]) -> Stream:
    """The same task with all records at one site, there from the first window on."""
    parts = [data for site, data in stream.sites.items() if site not in without]
    union = Dataset(
        records=tuple(r for data in parts for r in data.records),
        texts=tuple(t for data in parts for t in data.texts),
        labels=tuple(c for data in parts for c in data.labels),
        patients=tuple(p for data in parts for p in data.patients),
        windows=(1,) * sum(len(data) for data in parts),
    )
    test = replace(stream.test, windows=(1,) * len(stream.test))
    return replace(stream, sites={UNION: union}, test=test, windows=stream.windows[-1:], about={})


LABELS: Mapping[str, tuple[str, str]] = {
    "local": ("Local only", "every hospital alone, asked about all chapters; mean"),
    "fedit": ("FedIT", "LoRA factors averaged, two local epochs a window"),
    "joint": ("Joint LoRA", "all records pooled at one site, two epochs"),
}


def _row(
    method: str, rounds: tuple[RoundRow, ...], note: str, *, exchanged: bool = True
) -> dict[str, Any]:
    last = rounds[-1].report["metrics"]
    return {
        "method": method,
        "top1": last["top1"],
        "top5": last["top5"],
        "interval": None,
        "bytes_up": sum(row.report["bytes_up"] for row in rounds) if exchanged else 0,
        "cpu_s": sum(row.report["cpu_seconds"] for row in rounds),
        "note": note,
    }


def _order(row: Mapping[str, Any]) -> int:
    return ["Local only", "FedIT", "FedKoLa", "Joint LoRA"].index(row["method"])
