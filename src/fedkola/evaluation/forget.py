"""Suite ``forget``: is what was removed really gone, and what does removing it cost?

Stream ``icd-chapters`` without overlap between hospitals. Half of all records (a hash of the text
decides) is kept from everybody: these are the never-seen records, drawn like those that are
forgotten, so that a view without a trace gives a membership AUC of 0.5. Two scenarios: four of
twelve hospitals leave together; a fifth of the patients of all hospitals withdraw together. Four
ways to forget are compared with the federation that never had the records, which is trained from
scratch and is also the way called full retrain:

- exact subtraction: ``removal.remove_together``;
- cell retrain: every cell concerned is dropped and summed again by those who stay;
- gradient unlearning: ascent on the forgotten records with descent on the others (NegGrad+;
  Kurmanji et al., Towards Unbounded Machine Unlearning, NeurIPS 2023) on the read-outs of the
  view, its rate chosen where half of the never-seen records give the AUC closest to 0.5.

Embeddings are ready before any clock starts. Every seed is a cell with a file of its own, so a
killed benchmark goes on where it stopped.
"""

import json
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fedkola import removal, server
from fedkola.algorithms.fedkola import FedKoLa
from fedkola.errors import UnknownName
from fedkola.evaluation import machine, metrics, scoring, tasks
from fedkola.federation import Federation, load_state
from fedkola.files import write_text
from fedkola.knowledge import forget, membership, statistics, views
from fedkola.knowledge.forget import Request
from fedkola.knowledge.stream import Stream, hash_share, split_test
from fedkola.knowledge.views import Head, View
from fedkola.ledger import Ledger
from fedkola.plan import Cohort, Knowledge, Plan, Run, Task
from fedkola.training import features, model
from fedkola.training.model import Foundation
from fedkola.types import Dataset, Report

SCENARIOS = ("sites", "patients")
METHODS = ("exact subtraction", "cell retrain", "full retrain", "gradient unlearning")
EXACT = METHODS[:2]
HELD_OUT = 0.5
LEAVING = 3
"""Every third hospital leaves."""
WITHDRAWN = 0.2
NEAR = 0.02
SEEN = 0.55
RATES = (1e-3, 3e-3, 1e-2)
STEPS = 20
BATCH = 1024
TEMPERATURE = 0.05
Note = Callable[[str], None]
Progress = Callable[[Report], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class Profile:
    """The size of a benchmark; ``per_label`` 0 takes every record."""

    seeds: int
    windows: int
    per_label: int
    features: int


PROFILES: Mapping[str, Profile] = {
    "quick": Profile(seeds=1, windows=3, per_label=24, features=512),
    "standard": Profile(seeds=3, windows=8, per_label=100, features=2048),
}


def run(
    *,
    profile: str = "standard",
    seeds: int = 0,
    out: Path = Path("benchmarks/results"),
    note: Note,
    progress: Progress,
) -> Mapping[str, Any]:
    """Measure what is not measured yet, then write ``forget-icd-chapters-PROFILE.json`` and
    ``.md``; raises UnknownName for an unknown profile."""
    if profile not in PROFILES:
        known = ", ".join(PROFILES)
        raise UnknownName(f"profile {profile!r} was given; the suite forget has {known}")
    size = PROFILES[profile]
    name = f"forget-icd-chapters-{profile}"
    found = []
    for seed in range(1, (seeds or size.seeds) + 1):
        path = out / "cells" / name / f"{seed}.json"
        if not path.exists():
            note(f"seed {seed}")
            work = path.with_suffix(".work")
            shutil.rmtree(work, ignore_errors=True)
            cell = {"seed": seed, **measure(size, seed, work, note, progress)}
            write_text(path, json.dumps(cell, indent=1, sort_keys=True))
            shutil.rmtree(work)
        found.append(json.loads(path.read_text()))
    result = {
        "suite": "forget",
        "stream": "icd-chapters",
        "profile": profile,
        "machine": machine.describe(),
        "cells": found,
        "targets": _targets(found),
    }
    (out / f"{name}.json").write_text(json.dumps(result, indent=1, sort_keys=True))
    (out / f"{name}.md").write_text(table(result))
    return result


def measure(size: Profile, seed: int, work: Path, note: Note, progress: Progress) -> dict[str, Any]:
    """Every scenario and method on one seed."""
    plan = _plan(size, seed)
    whole = tasks.load(plan)
    stream, never = hold_out(whole, seed)
    foundation = model.load(plan.model.name, max_tokens=plan.model.max_tokens)
    bench = _Bench(plan=plan, work=work, foundation=foundation, progress=progress)
    bench.embed(whole)
    note(f"seed {seed}: everybody")
    base = bench.federation(stream, "everybody")
    state, seconds = bench.trained(base)
    found: dict[str, Any] = {
        "records": sum(len(data) for data in stream.sites.values()),
        "never_seen": sum(len(data) for data in never.values()),
        "train_seconds": seconds,
        "view": _bank(base).view(state).id,
    }
    for scenario in SCENARIOS:
        note(f"seed {seed}: {scenario}")
        found[scenario] = bench.scenario(base, state, stream, never, scenario)
    return found


def hold_out(stream: Stream, seed: int) -> tuple[Stream, dict[str, Dataset]]:
    """The stream without its never-seen records, and those by site. Equal texts stay together."""
    kept, never = {}, {}
    for name, data in stream.sites.items():
        kept[name], never[name] = membership.hold_out(data, HELD_OUT, salt=str(seed))
    return replace(stream, sites=kept), never


def requests(stream: Stream, scenario: str) -> tuple[Request, ...]:
    """Who asks to be forgotten in a scenario."""
    if scenario == "sites":
        return tuple(Request(kind="site", site=name) for name in list(stream.sites)[::LEAVING])
    return tuple(
        Request(kind="patient", site=name, name=patient)
        for name, data in stream.sites.items()
        for patient in dict.fromkeys(data.patients)
        if hash_share(f"withdrawn {patient}") < WITHDRAWN
    )


def unlearned(head: Head, phi: Tensor, rows: Tensor, gone: Tensor, *, rate: float) -> Head:
    """Read-outs after NegGrad+ steps: cross-entropy of records that stay minus that of those in
    ``gone`` (a mask). ``phi`` is (n, p), ``rows`` (n,) the position of each record's label."""
    generator = torch.Generator().manual_seed(0)
    stay, go = torch.nonzero(~gone).flatten(), torch.nonzero(gone).flatten()
    weights = []
    for level, start in enumerate(head.weights):
        if not start.numel():
            weights.append(start)
            continue
        trained = start.clone().requires_grad_()
        # The size of a read-out's entries sets the size of a step.
        step = rate * float(start.norm())
        for _ in range(STEPS):
            loss = torch.zeros(())
            for part, sign in ((stay, 1.0), (go, -1.0)):
                drawn = part[torch.randint(len(part), (BATCH,), generator=generator)]
                scores = (phi[drawn] @ trained + head.bias[level]) / TEMPERATURE
                truth = head.parents[level][rows[drawn]]
                loss = loss + sign * torch.nn.functional.cross_entropy(scores, truth)
            (gradient,) = torch.autograd.grad(loss, [trained])
            with torch.no_grad():
                trained -= step * gradient / gradient.norm().clamp(min=1e-12)
        weights.append(trained.detach())
    return replace(head, weights=tuple(weights))


def table(result: Mapping[str, Any]) -> str:
    """The result as Markdown: one row per scenario and method, then a verdict per target."""
    cells = result["cells"]
    rows = [
        f"# Suite forget, stream {result['stream']}, profile {result['profile']}",
        "",
        f"Seeds {[cell['seed'] for cell in cells]}; {cells[0]['records']:,} records learnt and "
        f"{cells[0]['never_seen']:,} never seen. AUC: can margins under the view tell forgotten "
        "records from never-seen ones? 0.5 is no. In brackets the 95 % bootstrap interval of the "
        "first seed.",
        "",
        "| scenario | method | records | view equals never-joined | AUC before | AUC after "
        "| null control | top-1 minus never-joined | s | of full retrain |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for scenario in SCENARIOS:
        for method in METHODS:
            own = [cell[scenario][method] for cell in cells]
            first = own[0]["membership"]
            equal = all(row["equal"] for row in own)
            rows.append(
                f"| {scenario} | {method} | {cells[0][scenario]['records']:,} "
                f"| {'yes' if equal else 'no'} | {_mean(own, 'before'):.3f} "
                f"| {_mean(own, 'auc'):.3f} [{first['low']:.3f}, {first['high']:.3f}] "
                f"| {_mean(own, 'null'):.3f} "
                f"| {_average([row['top1'] - row['top1_never'] for row in own]):+.4f} "
                f"| {_average([row['seconds'] for row in own]):.1f} "
                f"| {_average([row['ratio'] for row in own]):.3f} |"
            )
    rows += ["", "| target | bound | value | verdict |", "|---|---|---|---|"]
    rows += [
        f"| {t['name']} | {t['bound']} | {t['value']} | {t['verdict']} |" for t in result["targets"]
    ]
    met = sum(t["verdict"] == "met" for t in result["targets"])
    about = result["machine"]
    rows += [
        "",
        f"{met} of {len(result['targets'])} targets met.",
        "",
        f"Measured on {about['cores']} cores ({about['processor']}), torch {about['torch']}, "
        f"Python {about['python']}. Reproduce: `fedkola bench forget --profile "
        f"{result['profile']}`.",
        "",
    ]
    return "\n".join(rows)


# --- private --------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class _Bench:
    """One seed in progress; what every federation of it shares is the plan and the embeddings."""

    plan: Plan
    work: Path
    foundation: Foundation
    progress: Progress

    def embed(self, stream: Stream) -> None:
        """All embeddings once, on disk: records, never-seen ones and the test."""
        cache = features.FeatureCache(self.foundation, self.work / "features")
        texts = [text for data in (*stream.sites.values(), stream.test) for text in data.texts]
        cache.integers(texts)

    def federation(self, stream: Stream, name: str) -> Federation:
        """A federation in a folder of its own, with its own copy of the embeddings, since those
        of forgotten records are deleted."""
        folder = self.work / name
        shutil.copytree(self.work / "features", folder / "features")
        cache = folder / "features"
        return server.assemble(self.plan, stream, folder, cache=cache, foundation=self.foundation)

    def trained(self, federation: Federation) -> tuple[Any, float]:
        """The state after all rounds, and the seconds of the exchanges alone."""
        with Ledger.open(federation.folder, create=True) as ledger:
            state = server.run(
                federation, ledger, observe=lambda number, state: {}, progress=self.progress
            )
            rounds = ledger.rounds(self.plan.run.name)
        return state, sum(row.report["seconds"] for row in rounds)

    def scenario(
        self,
        base: Federation,
        state: Any,
        stream: Stream,
        never: Mapping[str, Dataset],
        scenario: str,
    ) -> dict[str, Any]:
        asked = requests(stream, scenario)
        scopes = {label.code: label.scope for label in stream.catalogue.labels}
        forgotten, kept = {}, {}
        for name, data in stream.sites.items():
            rows = set(forget.left(data, [r for r in asked if r.site == name], scopes))
            kept[name] = data.take(sorted(rows))
            forgotten[name] = data.take([i for i in range(len(data)) if i not in rows])
        stays = {name: data for name, data in kept.items() if len(data)}
        concerned = [name for name in forgotten if len(forgotten[name])]
        before = _bank(base).view(state)
        joined = self.federation(replace(stream, sites=stays), f"never-{scenario}")
        clean, retrain = self.trained(joined)
        target = _bank(joined).view(clean)
        judge = _Judge(
            embeddings=features.FeatureCache(base.foundation, self.work / "features"),
            forgotten=_known(target, [forgotten[name] for name in concerned]),
            never=_known(target, [never[name] for name in concerned]),
            federation=base,
        )
        row = {"seconds": retrain, "equal": True, **judge.scored(before, target, target)}
        found: dict[str, Any] = {"records": len(judge.forgotten), "full retrain": row}
        for method, way in (("exact subtraction", _subtracted), ("cell retrain", _refilled)):
            federation = self._copy(base, stream, f"{scenario}-{method.split()[0]}")
            view, seconds, share = way(federation, asked)
            found[method] = {
                "seconds": seconds,
                "share": share,
                "equal": view.id == target.id,
                **judge.scored(before, view, target),
            }
        view, seconds, rate = judge.ascended(before, _known(before, list(stays.values())))
        found["gradient unlearning"] = {
            "seconds": seconds,
            "rate": rate,
            "equal": False,
            **judge.scored(before, view, target),
        }
        for method in METHODS:
            found[method]["ratio"] = found[method]["seconds"] / retrain
        return found

    def _copy(self, base: Federation, stream: Stream, name: str) -> Federation:
        for part in ("ledger.db", "blobs", "sites"):
            source = base.folder / part
            if source.is_dir():
                shutil.copytree(source, self.work / name / part)
            else:
                (self.work / name).mkdir(parents=True)
                shutil.copy(source, self.work / name / part)
        return self.federation(stream, name)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Judge:
    """Membership and accuracy of any view, from embeddings that no removal deletes."""

    embeddings: features.FeatureCache
    forgotten: Dataset
    never: Dataset
    federation: Federation

    def scored(self, before: View, after: View, target: View) -> dict[str, Any]:
        found = membership.evidence(self.counts(before), self.counts(after))
        assert found is not None
        low, high = membership.interval(*self.counts(after)[1:])
        return {
            "membership": {
                "auc": found.auc,
                "low": found.low,
                "high": found.high,
                "before": found.before,
                "null": found.null,
                "null_low": low,
                "null_high": high,
                "forgotten": found.forgotten,
                "never": found.never,
            },
            "top1": self.top1(after),
            "top1_never": self.top1(target),
        }

    def counts(self, view: View) -> Tensor:
        """Binned margins of forgotten records and of the two halves of the never-seen ones."""
        halves = membership.halves(self.never.records)
        parts = (self.forgotten, *(self.never.take(rows) for rows in halves))
        return torch.stack(
            [membership.counted(membership.margins(view, self.z(p), p.labels)) for p in parts]
        )

    def top1(self, view: View) -> float:
        """At the reported level, on synonyms that chose nothing."""
        federation, level = self.federation, self.federation.level
        _, test = split_test(federation.stream)
        assert view.head is not None
        truth = scoring.truth(federation.stream.catalogue, level, test)
        z, nodes, right = self.z(test), view.head.nodes[level], 0
        for start in range(0, len(test), 4096):
            best = views.scores(view.head, z[start : start + 4096], level).argmax(1).tolist()
            pairs = zip(best, truth[start : start + 4096], strict=True)
            right += sum(nodes[i] == node for i, node in pairs)
        return right / max(1, len(test))

    def ascended(self, view: View, stay: Dataset) -> tuple[View, float, float]:
        """The view after gradient unlearning; its seconds are those of the chosen rate alone."""
        assert view.head is not None
        place = {code: i for i, code in enumerate(view.head.nodes[0])}
        data = _joined([stay, self.forgotten])
        phi = statistics.expand(
            self.z(data), features=view.head.features, bits=view.head.bits, seed=view.head.seed
        )
        rows = torch.tensor([place[code] for code in data.labels])
        gone = torch.arange(len(data)) >= len(stay)
        tried = []
        for rate in RATES:
            began = time.perf_counter()
            head = unlearned(view.head, phi, rows, gone, rate=rate)
            seconds = time.perf_counter() - began
            changed = replace(view, id=f"{view.id}/{rate}", head=head)
            counts = self.counts(changed)
            tried.append((abs(membership.auc(counts[0], counts[1]) - 0.5), seconds, rate, changed))
        _, seconds, rate, best = min(tried, key=lambda item: item[0])
        return best, seconds, rate

    def z(self, data: Dataset) -> Tensor:
        return self.embeddings.integers(data.texts)


def _subtracted(federation: Federation, asked: Sequence[Request]) -> tuple[View, float, float]:
    """The view after a removal, its seconds, and the share of the live cells it concerned."""
    with Ledger.open(federation.folder) as ledger:
        held, _ = load_state(federation, ledger)
        began = time.perf_counter()
        receipt = removal.remove_together(federation, ledger, asked)[0]
        seconds = time.perf_counter() - began
        state, _ = load_state(federation, ledger)
    return _bank(federation).view(state), seconds, len(receipt.cells) / len(held.bank.cells)


def _refilled(federation: Federation, asked: Sequence[Request]) -> tuple[View, float, float]:
    """The same by dropping the cells concerned: those who stay sum their journals again."""
    algorithm = _bank(federation)
    with Ledger.open(federation.folder) as ledger:
        state, _ = load_state(federation, ledger)
    began = time.perf_counter()
    cells, roster, ids = removal.accept(federation, state, asked)
    leavers = [request.site for request in asked if request.kind == "site"]
    after, before, _ = algorithm.refill(
        state, cells, ids, roster, federation.clients, leavers=leavers
    )
    after = algorithm.calibrate(after, roster, federation.clients)
    view = algorithm.view(after)
    return view, time.perf_counter() - began, len(before) / len(state.bank.cells)


def _bank(federation: Federation) -> FedKoLa:
    assert isinstance(federation.algorithm, FedKoLa)
    return federation.algorithm


def _plan(size: Profile, seed: int) -> Plan:
    return Plan(
        run=Run(name=f"forget-{seed}", seed=seed),
        task=Task(
            name="icd10cm",
            level="block",
            sites=12,
            windows=size.windows,
            per_label=size.per_label,
            overlap=0.0,
        ),
        cohort=Cohort(minimum=3),
        knowledge=Knowledge(
            features=size.features, basis_seed=seed, public_reference=True, slots_max=22
        ),
    )


def _known(view: View, parts: Sequence[Dataset]) -> Dataset:
    """The records whose label the view knows.

    The view must be one that has seen neither forgotten nor never-seen records: a label that is
    known because of a forgotten record would set the two apart.
    """
    assert view.head is not None
    whole, known = _joined(parts), set(view.head.nodes[0])
    return whole.take([i for i, code in enumerate(whole.labels) if code in known])


def _joined(parts: Sequence[Dataset]) -> Dataset:
    return Dataset(
        records=tuple(x for part in parts for x in part.records),
        texts=tuple(x for part in parts for x in part.texts),
        labels=tuple(x for part in parts for x in part.labels),
        patients=tuple(x for part in parts for x in part.patients),
        windows=tuple(x for part in parts for x in part.windows),
    )


def _targets(cells: Sequence[Mapping[str, Any]]) -> list[dict[str, str]]:
    found = []
    for scenario in SCENARIOS:
        for method in EXACT:
            own = [cell[scenario][method] for cell in cells]
            equal = all(row["equal"] for row in own)
            name = f"{scenario}, {method}"
            found.append(_target(f"{name}: view", "equal to never-joined", str(equal), equal))
        own = [cell[scenario]["exact subtraction"] for cell in cells]
        auc, before = _mean(own, "auc"), _mean(own, "before")
        low = min(row["membership"]["null_low"] for row in own)
        high = max(row["membership"]["null_high"] for row in own)
        loss = max(abs(row["top1"] - row["top1_never"]) for row in own)
        ratio = _average([row["ratio"] for row in own])
        refill = [cell[scenario]["cell retrain"] for cell in cells]
        cost, share = (_average([row[key] for row in refill]) for key in ("ratio", "share"))
        found += [
            _target(
                f"{scenario}: membership AUC", "0.5 +- 0.02", f"{auc:.3f}", abs(auc - 0.5) <= NEAR
            ),
            _target(
                f"{scenario}: AUC before (control)", f">= {SEEN}", f"{before:.3f}", before >= SEEN
            ),
            _target(
                f"{scenario}: null control",
                "interval holds 0.5",
                f"[{low:.3f}, {high:.3f}]",
                low <= 0.5 <= high,
            ),
            _target(f"{scenario}: top-1 lost to never-joined", "0", f"{loss:g}", loss == 0),
            _target(f"{scenario}: subtraction, of full retrain", "< 1", f"{ratio:.3f}", ratio < 1),
            _target(
                f"{scenario}: cell retrain, of full retrain",
                f"<= share of cells, {share:.3f}",
                f"{cost:.3f}",
                cost <= share,
            ),
        ]
    return found


def _target(name: str, bound: str, value: str, met: bool) -> dict[str, str]:
    return {"name": name, "bound": bound, "value": value, "verdict": "met" if met else "missed"}


def _mean(rows: Sequence[Mapping[str, Any]], name: str) -> float:
    return _average([row["membership"][name] for row in rows])


def _average(values: Sequence[float]) -> float:
    return metrics.interval(values)["mean"]
