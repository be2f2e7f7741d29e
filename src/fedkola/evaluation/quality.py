"""Suite ``quality``: how much of the clean-data result survives wrong labels, without their rate?

A cell is one stream under one noise, one division between ten sites and one seed. Doing nothing is
a family of read-outs; b is the best of them on the noisy records, c the best on the clean ones, and
a method recovers (m - b) / (c - b) of the gap, undefined where c - b is below a point. Ours is the
algorithm ``quality_scan`` through real sites, with one read-out that is fixed beforehand (pooled up
to 25 labels, root above); it is told no rate. Small loss and Co-teaching are told the rate, the
oracle filter is told every wrong record, and each of the three counts with its best read-out.
``scan-names`` also reads what the catalogue says of labels; "nothing, names" adds those texts to
the records and does nothing else. Checked records are of the scene: 200,
with the labels they were given and those that are right; no method learns from them.
"""

import shutil
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fedkola import server
from fedkola.errors import UnknownName
from fedkola.evaluation import machine, metrics, scoring
from fedkola.evaluation.cells import Cells, interval, target, verdict, write
from fedkola.evaluation.noise import co_teaching, confident_joint, scenes, small_loss
from fedkola.evaluation.noise.pool import Pool, accuracies
from fedkola.evaluation.noise.scenes import Scene
from fedkola.federation import Federation
from fedkola.knowledge import statistics
from fedkola.ledger import Ledger
from fedkola.plan import Algorithm as Method
from fedkola.plan import Cohort, Knowledge, Model, Plan, Quality, Run
from fedkola.plan import Demands as Site
from fedkola.quality import kept
from fedkola.training import features, model
from fedkola.training.model import Foundation
from fedkola.types import Report

FEATURES = 1024
SEED = 0
POOLED_UP_TO = 25
RATE = 0.4
TRUSTED = 200
RARE = 32
LISTED = 20
BASELINES: Mapping[str, Callable[[Pool], torch.Tensor]] = {
    "small loss (rate known)": small_loss.weights,
    "co-teaching (rate known)": co_teaching.weights,
    "confident joint": confident_joint.weights,
}
OURS = ("scan", "scan-names")
Note = Callable[[str], None]
Progress = Callable[[Report], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class Profile:
    """``records`` and ``tests`` bound the size of a scene; cells are (stream, noise, division)."""

    seeds: tuple[int, ...]
    records: int
    tests: int
    cells: tuple[tuple[str, str, str], ...]
    refits: int = 5


_NOISES = ("none", "symmetric", "shift", "confusable")
PROFILES: Mapping[str, Profile] = {
    "quick": Profile(
        seeds=(1,),
        records=3000,
        tests=1500,
        cells=tuple(("icd-22", kind, "iid") for kind in ("none", "symmetric", "shift")),
        refits=3,
    ),
    "standard": Profile(
        seeds=(1, 2, 3, 4, 5),
        records=16000,
        tests=6000,
        cells=(
            *((name, kind, "iid") for name in ("icd-22", "agnews", "trec") for kind in _NOISES),
            *(("icd-22", kind, "dirichlet:0.1") for kind in _NOISES),
            *(("yoruba", "real", "iid"), ("isbook", "real", "iid")),
            *((name, kind, "iid") for name in ("icd-278", "icd-1918") for kind in _NOISES),
        ),
    ),
}


def run(
    *,
    profile: str = "standard",
    seeds: int = 0,
    rows: Sequence[str] = (),
    out: Path = Path("benchmarks/results"),
    note: Note,
    progress: Progress,
) -> Mapping[str, Any]:
    """Measure what is not measured yet, then write ``quality-PROFILE.json`` and ``.md``.

    ``rows`` are streams, all of the profile if empty; ``seeds`` 0 is the profile's own number.
    Raises UnknownName for a profile or stream that the suite does not have.
    """
    if profile not in PROFILES:
        known = ", ".join(PROFILES)
        raise UnknownName(f"profile {profile!r} was given; the suite quality has {known}")
    size = PROFILES[profile]
    streams = tuple(dict.fromkeys(stream for stream, _, _ in size.cells))
    for stream in rows:
        if stream not in streams:
            raise UnknownName(
                f"stream {stream!r} was given; quality, profile {profile}, has {', '.join(streams)}"
            )
    folder = out / "cells" / f"quality-{profile}"
    folder.mkdir(parents=True, exist_ok=True)
    cells = Cells(folder=folder, note=note)
    opened = cache(lambda: _Bench.open(out / "cells" / "quality-features", progress))

    def measured(about: Mapping[str, Any], work: Path) -> dict[str, Any]:
        return opened().cell(about, work)

    found = []
    for seed in size.seeds[: seeds or None]:
        for stream, kind, division in size.cells:
            if rows and stream not in rows:
                continue
            about = {
                "stream": stream,
                "noise": kind,
                "division": division,
                "seed": seed,
                "records": size.records,
                "tests": size.tests,
                "refits": size.refits,
            }
            name = f"{stream}-{kind}-{division.replace(':', '-')}-{seed}"
            found.append(cells.measure(name, about, partial(measured, about)))
    document = {
        "suite": "quality",
        "profile": profile,
        "machine": machine.describe(),
        "cells": found,
        "targets": targets(found),
    }
    write(document, table(document), out, f"quality-{profile}")
    return document


@dataclass(frozen=True, slots=True, kw_only=True)
class _Bench:
    """What all cells share: the frozen base and the embeddings of texts met so far."""

    foundation: Foundation
    embeddings: features.FeatureCache
    folder: Path
    progress: Progress

    @classmethod
    def open(cls, folder: Path, progress: Progress) -> "_Bench":
        foundation = model.load("minilm", max_tokens=Model().max_tokens)
        return cls(
            foundation=foundation,
            embeddings=features.FeatureCache(foundation, folder),
            folder=folder,
            progress=progress,
        )

    def cell(self, about: Mapping[str, Any], work: Path) -> dict[str, Any]:
        """One cell: every row on the same scene."""
        scene = scenes.scene(
            about["stream"],
            about["noise"],
            rate=RATE,
            partition=about["division"],
            records=about["records"],
            tests=about["tests"],
            trusted=TRUSTED,
            seed=about["seed"],
            embed=lambda texts: self.embeddings.integers(texts).numpy().astype(np.float64),
        )
        pool = self.pool(scene)
        found: dict[str, Any] = {"about_pool": _described(scene, pool)}
        ones = torch.ones(len(pool.given))
        found["nothing"] = {"top1": accuracies(pool, pool.given, ones)}
        if scene.stream.catalogue.texts:
            told = self.with_names(scene, pool)
            alike = torch.ones(len(told.given))
            found["nothing, names"] = {"top1": accuracies(told, told.given, alike)}
        found["clean"] = {"top1": accuracies(pool, pool.truth, ones)}
        oracle = (pool.given == pool.truth).to(torch.float32)
        found["oracle filter"] = {"top1": accuracies(pool, pool.given, oracle)}
        for name, how in BASELINES.items():
            weights = how(pool)
            found[name] = {
                "top1": accuracies(pool, pool.given, weights),
                **_agreement(weights, pool.given != pool.truth),
            }
        for name in OURS:
            if name == "scan-names" and not scene.stream.catalogue.texts:
                continue
            found[name] = self.scanned(scene, name, about, work / name)
        return found

    def pool(self, scene: Scene) -> Pool:
        """The records that a scan scans, at one place."""
        codes = {code: i for i, code in enumerate(scene.stream.catalogue.codes())}
        rows = [
            (text, label, scene.truth[record])
            for site, data in scene.stream.sites.items()
            for record, text, label in zip(data.records, data.texts, data.labels, strict=True)
            if record not in scene.checked[site]
        ]
        given = torch.tensor([codes[label] for _, label, _ in rows])
        truth = torch.tensor([codes[label] for _, _, label in rows])
        return Pool(
            phi=self._phi([text for text, _, _ in rows]),
            given=given,
            truth=truth,
            rate=float((given != truth).double().mean()),
            num_labels=len(codes),
            asked=self._phi(scene.stream.test.texts),
            right=torch.tensor([codes[label] for label in scene.stream.test.labels]),
        )

    def with_names(self, scene: Scene, pool: Pool) -> Pool:
        """The pool with what the catalogue says of labels as further records."""
        lines = [
            (i, line)
            for i, code in enumerate(scene.stream.catalogue.codes())
            for line in scene.stream.catalogue.texts.get(code, "").split("\n")
        ]
        rows = torch.tensor([i for i, _ in lines])
        return replace(
            pool,
            phi=torch.cat([pool.phi, self._phi([line for _, line in lines])]),
            given=torch.cat([pool.given, rows]),
            truth=torch.cat([pool.truth, rows]),
        )

    def scanned(
        self, scene: Scene, name: str, about: Mapping[str, Any], work: Path
    ) -> dict[str, Any]:
        """Our row: the scan through real sites, its answers and its findings."""
        few = len(scene.stream.catalogue.labels) <= POOLED_UP_TO
        plan = Plan(
            run=Run(name="scan", rounds=1, seed=about["seed"]),
            algorithm=Method(name="quality_scan"),
            knowledge=Knowledge(
                features=FEATURES,
                basis_seed=SEED,
                public_reference=True,
                readout="pooled" if few else "root",
            ),
            quality=Quality(
                mode="filter",
                absorb=True,
                names=name == "scan-names",
                regions=1024 if few else 2048,
                refits=about["refits"],
            ),
            cohort=Cohort(minimum=3),
            site=Site(plain=True),
        )
        shutil.rmtree(work, ignore_errors=True)
        federation = server.assemble(
            plan, scene.stream, work, cache=self.folder, foundation=self.foundation
        )
        for site, labels in scene.checked.items():
            kept.check(federation.sites[site].store, labels)
        began = time.process_time()
        with Ledger.open(work, create=True) as ledger:
            state = server.run(
                federation, ledger, observe=lambda number, held: {}, progress=self.progress
            )
            report = ledger.rounds("scan")[-1].report
        spent = time.process_time() - began
        nodes = scene.stream.catalogue.nodes(0)
        scores = scoring.scores_of(federation, state, scene.stream.test, nodes)
        right = [nodes[i] for i in scores.argmax(1).tolist()]
        hits = [a == b for a, b in zip(right, scene.stream.test.labels, strict=True)]
        return {
            "top1": {"fixed": sum(hits) / max(len(hits), 1)},
            "report": dict(state.report),
            "why": state.why,
            "cpu_seconds": spent,
            "bytes_up": report["bytes_up"],
            "bytes_down": report["bytes_down"],
            **_found(federation, scene),
        }

    def _phi(self, texts: Sequence[str]) -> torch.Tensor:
        z = self.embeddings.integers(texts)
        return statistics.expand(z, features=FEATURES, bits=4, seed=SEED) / 15


def recovered(cell: Mapping[str, Any], row: str) -> float | None:
    """The share of the gap that a row recovers; None where there is no gap of a point."""
    low, high = (max(cell[name]["top1"].values()) for name in ("nothing", "clean"))
    if row not in cell or high - low < 0.01:
        return None
    return float((max(cell[row]["top1"].values()) - low) / (high - low))


def harm(cell: Mapping[str, Any], row: str) -> float | None:
    """Accuracy lost on clean records against the same fixed read-out without a scan."""
    if row not in cell:
        return None
    few = cell["about_pool"]["labels"] <= POOLED_UP_TO
    return float(cell["clean"]["top1"]["pooled" if few else "root"] - cell[row]["top1"]["fixed"])


def table(result: Mapping[str, Any]) -> str:
    """The result as Markdown: a line per cell, means over seeds with their intervals."""
    groups: dict[tuple[str, str, str], list[Mapping[str, Any]]] = {}
    for cell in result["cells"]:
        about = cell["about"]
        groups.setdefault((about["stream"], about["noise"], about["division"]), []).append(cell)
    rows = ["nothing", "nothing, names", *OURS, *BASELINES, "oracle filter", "clean"]
    lines = [
        f"# Suite quality, profile {result['profile']}",
        "",
        "Top-1 in %, and in brackets the share of the gap between doing nothing (best read-out) "
        "and clean records (best read-out) that is recovered. Small loss, Co-teaching and the "
        "oracle filter know what no site knows.",
        "",
        "| stream | noise | division | seeds | " + " | ".join(rows) + " | AUC scan, names |",
        "|---" * (len(rows) + 5) + "|",
    ]
    for (stream, kind, division), cells in groups.items():
        told = [_cell(cells, row) for row in rows]
        aucs = ", ".join(_mean([c[r].get("auc") for c in cells if r in c]) for r in OURS)
        lines.append(
            f"| {stream} | {kind} | {division} | {len(cells)} | "
            + " | ".join(told)
            + f" | {aucs} |"
        )
    lines += [
        "",
        "| stream | noise | division | row | rate | gate open | bound | flagged right, common | "
        "flagged right, rare | precision@20 | CPU-s | MB up |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for (stream, kind, division), cells in groups.items():
        for row in OURS:
            some = [cell for cell in cells if row in cell]
            if some:
                lines.append(f"| {stream} | {kind} | {division} | {row} | " + _scan_line(some, row))
    return "\n".join([*lines, *verdict(result["targets"]), ""])


def targets(cells: Sequence[Mapping[str, Any]]) -> list[dict[str, str]]:
    """The verdict lines of what was run: real noise, made-up noise, harm and the owner's list."""
    found = []
    few, many = ("icd-22", "agnews", "trec"), ("icd-278", "icd-1918")
    for streams, bounds in (
        (few, {"symmetric": 0.8, "shift": 0.7, "confusable": 0.7}),
        (many, {"symmetric": 0.5, "shift": 0.5, "confusable": 0.5}),
        (("yoruba", "isbook"), {"real": 0.7}),
    ):
        for stream in streams:
            for kind, bound in bounds.items():
                for row in OURS:
                    found += _gap_target(cells, stream, kind, row, bound)
    clean = [cell for cell in cells if cell["about"]["noise"] == "none"]
    worst = [x for cell in clean for row in OURS if (x := harm(cell, row)) is not None]
    if worst:
        value = max(worst)
        found.append(
            target("harm on clean data, worst cell", "<= 0.005", f"{value:.4f}", value <= 0.005)
        )
    noisy = [c for c in cells if c["about"]["noise"] != "none" and "scan" in c]
    common = [c["scan"]["fpr_common"] for c in noisy if c["scan"]["fpr_rare"] is not None]
    rare = [c["scan"]["fpr_rare"] for c in noisy if c["scan"]["fpr_rare"] is not None]
    if rare and sum(common):
        value = sum(rare) / sum(common)
        found.append(
            target("right records flagged, rare over common", "<= 2", f"{value:.2f}", value <= 2)
        )
    listed = [
        c["scan"]["precision"]
        for c in noisy
        if c["about_pool"]["rate"] >= 0.2 and c["scan"]["precision"] is not None
    ]
    if listed:
        value = sum(listed) / len(listed)
        found.append(
            target(
                "precision of the 20 records listed first", ">= 0.9", f"{value:.3f}", value >= 0.9
            )
        )
    return found


# --- private --------------------------------------------------------------------------------------


def _gap_target(
    cells: Sequence[Mapping[str, Any]], stream: str, kind: str, row: str, bound: float
) -> list[dict[str, str]]:
    some = [
        value
        for cell in cells
        if cell["about"]["stream"] == stream and cell["about"]["noise"] == kind
        for value in [recovered(cell, row)]
        if value is not None
    ]
    if not some:
        return []
    mean = sum(some) / len(some)
    name = f"gap recovered, {stream}, {kind}, {row}"
    return [target(name, f">= {bound:.0%}", f"{mean:.0%} over {len(some)} cells", mean >= bound)]


def _described(scene: Scene, pool: Pool) -> dict[str, Any]:
    return {
        "records": len(pool.given),
        "labels": pool.num_labels,
        "tests": len(pool.right),
        "rate": pool.rate,
        "checked": sum(map(len, scene.checked.values())),
    }


def _agreement(weights: torch.Tensor, wrong: torch.Tensor) -> dict[str, float]:
    """Precision and recall of what a baseline leaves out."""
    gone = weights < 0.5
    hit = float((gone & wrong).sum())
    return {
        "precision": hit / max(float(gone.sum()), 1.0),
        "recall": hit / max(float(wrong.sum()), 1.0),
    }


def _found(federation: Federation, scene: Scene) -> dict[str, Any]:
    """What findings at the sites say, judged by the truth."""
    believed: dict[str, float] = {}
    flagged: set[str] = set()
    label: dict[str, str] = {}
    precisions = []
    for name, site in federation.sites.items():
        document: Any = kept.findings(site.store)
        if not document:
            continue
        believed |= document["believed"]
        data = scene.stream.sites[name]
        label |= dict(zip(data.records, data.labels, strict=True))
        listed = [r["record"] for r in document["findings"] if r["code"] == "LABEL_DISAGREES"]
        flagged.update(listed)
        first = listed[:LISTED]
        if len(first) == LISTED:
            precisions.append(sum(label[r] != scene.truth[r] for r in first) / LISTED)
    wrong = {record: label[record] != scene.truth[record] for record in believed}
    held = Counter(label[record] for record in believed)
    rare = [r for r in believed if not wrong[r] and held[label[r]] <= RARE]
    common = [r for r in believed if not wrong[r] and held[label[r]] > RARE]
    bad = sum(wrong.values())
    return {
        "auc": _auc([-believed[r] for r in believed], [wrong[r] for r in believed]),
        "found": sum(wrong[r] for r in flagged) / bad if bad else None,
        "fpr_common": sum(r in flagged for r in common) / len(common) if common else None,
        "fpr_rare": sum(r in flagged for r in rare) / len(rare) if rare else None,
        "precision": sum(precisions) / len(precisions) if precisions else None,
    }


def _auc(scores: Sequence[float], wrong: Sequence[bool]) -> float | None:
    bad = sum(wrong)
    if not bad or bad == len(wrong):
        return None
    _, place, counts = np.unique(np.array(scores), return_inverse=True, return_counts=True)
    ranks = (np.cumsum(counts) - (counts - 1) / 2)[place]
    return float((ranks[np.array(wrong)].sum() - bad * (bad + 1) / 2) / (bad * (len(wrong) - bad)))


def _cell(cells: Sequence[Mapping[str, Any]], row: str) -> str:
    values = [100 * max(cell[row]["top1"].values()) for cell in cells if row in cell]
    if not values:
        return ""
    text = interval(metrics.interval(values), digits=1)
    gaps = [gap for cell in cells if (gap := recovered(cell, row)) is not None]
    if row in ("nothing", "clean") or not gaps:
        return text
    return f"{text} ({100 * sum(gaps) / len(gaps):.0f} %)"


def _scan_line(cells: Sequence[Mapping[str, Any]], row: str) -> str:
    rows = [cell[row] for cell in cells]
    told = [
        _mean([cell["about_pool"]["rate"] for cell in cells]),
        f"{sum(r['report'].get('open', 0) for r in rows):.0f} of {len(rows)}",
        _mean([r["report"].get("noise_low") for r in rows]),
        _mean([r["fpr_common"] for r in rows]),
        _mean([r["fpr_rare"] for r in rows]),
        _mean([r["precision"] for r in rows]),
        f"{sum(r['cpu_seconds'] for r in rows) / len(rows):.0f}",
        f"{sum(r['bytes_up'] for r in rows) / len(rows) / 1e6:.1f}",
    ]
    return " | ".join(told) + " |"


def _mean(values: Sequence[float | None]) -> str:
    known = [value for value in values if value is not None]
    return f"{sum(known) / len(known):.3f}" if known else ""
