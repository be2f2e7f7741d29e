"""Outdated, noisy or novel: what dates tell of records that no longer fit, or never did.

The categories of ICD-10-CM that any of three releases touched (2021, 2025, 2026), descriptions and
synonyms, dated by the release that brings them, at ten sites: a record of 2021 at one or two of the
three holders of its category, later ones at all three. A share of the labels is wrong, of any date:
any code of that day (symmetric), or another code of the category (confusable). The truth of a
record today: ``noisy``; ``superseded`` (its text stands under another code now, or its code is
retired); ``novel`` (of a code that the last release brings); ``fine``.

Evidence is the leave-one-out margin of categories at 1,024 features with three refits, ranked by
500 trusted records, alpha 0.05; then ``quality.ageing`` with the registry of codes and dates, with
dates alone, and, for comparison, the evidence without dates. Nothing was tuned on these records.
Writes ``benchmarks/results/ageing.json`` and ``ageing.md``. Run with FEDKOLA_DATA set:
``python benchmarks/ageing.py`` (ten minutes; a folder of cached features may follow).
"""

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fedkola.audit.intervals import auc_interval
from fedkola.evaluation import machine, metrics
from fedkola.evaluation.tasks import icd_releases
from fedkola.evaluation.tasks.icd10cm import Code
from fedkola.knowledge import statistics
from fedkola.plan import Task
from fedkola.quality import ageing, corrupt, geometry, margin, trusted
from fedkola.quality.ageing import Dated, Registry
from fedkola.quality.corrupt import Known
from fedkola.training import features, model
from fedkola.types import Dataset

RESULTS = Path(__file__).parent / "results"
NOISE = (("symmetric", 0.2), ("symmetric", 0.4), ("confusable", 0.2))
RULES = ("registry and dates", "dates alone", "no dates")
FATES = ("fine", "noisy", "superseded", "novel")
CODES = {
    ageing.FINE: "fine",
    ageing.DISAGREES: "noisy",
    ageing.UNCONFIRMED: "noisy",
    ageing.SUPERSEDED: "superseded",
    ageing.NOVEL: "novel",
}
SEEDS = (1, 2, 3, 4, 5)
SITES, HOLDERS, TRUSTED, ALPHA = 10, 3, 500, 0.05
FEATURES, BITS, FEATURE_SEED, REGIONS = 1024, 4, 7, 512
NOW = 3
TARGET = 0.8
Release = dict[str, Code]


@dataclass(frozen=True, slots=True, kw_only=True)
class Lists:
    """What the three releases say: ``pairs`` (normalised text, code) of each, the touched
    categories, and the category of every code."""

    releases: tuple[Release, ...]
    pairs: tuple[frozenset[tuple[str, str]], ...]
    category: dict[str, str]

    def on(self, window: int) -> list[str]:
        return [c for c in self.category if c in self.releases[window - 1]]

    def fate(self, text: str, code: str, window: int) -> str:
        last = self.pairs[-1]
        if (text, code) not in last and (
            code not in self.releases[-1] or any((text, c) in last for c in self.category)
        ):
            return "superseded"
        new = window == NOW and code not in self.releases[-2]
        return "novel" if new else "fine"


@dataclass(frozen=True, slots=True, kw_only=True)
class Records:
    """All records of the federation, (n,) each; labels are positions in ``codes``."""

    codes: tuple[str, ...]
    text: np.ndarray[Any, Any]
    label: np.ndarray[Any, Any]
    window: np.ndarray[Any, Any]
    site: np.ndarray[Any, Any]
    fate: np.ndarray[Any, Any]


def main() -> None:
    torch.set_num_threads(1)
    lists = read()
    texts = sorted({text for pairs in lists.pairs for text, _ in pairs})
    folder = Path(sys.argv[1]) if sys.argv[1:] else None
    z = features.FeatureCache(model.load("minilm"), folder).integers(texts)
    book = codebook(z)
    cells = []
    for kind, rate in NOISE:
        for seed in SEEDS:
            records = drawn(lists, texts, kind, rate, seed)
            cells += [
                {"noise": kind, "rate": rate, "seed": seed, **found}
                for found in judged(lists, records, z, book, seed)
            ]
            print(json.dumps(cells[-len(RULES)]), flush=True)
    RESULTS.mkdir(exist_ok=True)
    found = {"machine": machine.describe(), "texts": len(texts), "cells": cells}
    (RESULTS / "ageing.json").write_text(json.dumps(found, indent=1) + "\n")
    (RESULTS / "ageing.md").write_text(text := page(cells))
    print(text)


def read() -> Lists:
    parsed = icd_releases.lists(Task(name="icd-releases"))
    releases = tuple({code.code: code for code in codes} for _, codes in parsed)
    touched = icd_releases.touched(releases)
    category = {c.code: c.category for r in releases for c in r.values() if c.category in touched}
    pairs = tuple(
        frozenset(
            (" ".join(text.lower().split()), code.code)
            for code in release.values()
            if code.code in category
            for text in (code.text, *code.synonyms)
        )
        for release in releases
    )
    return Lists(releases=releases, pairs=pairs, category=dict(sorted(category.items())))


def drawn(lists: Lists, texts: Sequence[str], kind: str, rate: float, seed: int) -> Records:
    """The federation's records with noise; each release brings what the one before lacks."""
    random = np.random.default_rng(seed)
    homes = {
        category: random.choice(SITES, HOLDERS, replace=False).tolist()
        for category in sorted(set(lists.category.values()))
    }
    rows: list[tuple[str, str, int, int, str]] = []
    for window in range(1, NOW + 1):
        before = lists.pairs[window - 2] if window > 1 else frozenset()
        fresh = []
        for text, code in sorted(lists.pairs[window - 1] - before):
            home = homes[lists.category[code]]
            number = HOLDERS if window > 1 else 1 + int(random.random() < 0.5)
            kept = random.choice(home, number, replace=False).tolist()
            fresh += [(text, code, site) for site in kept]
        said = noisy(lists, fresh, window, kind, rate, seed)
        rows += [
            (text, new, window, site, "noisy" if new != code else lists.fate(text, code, window))
            for (text, code, site), new in zip(fresh, said, strict=True)
        ]
    codes, place = tuple(lists.category), {text: i for i, text in enumerate(texts)}
    at = {code: i for i, code in enumerate(codes)}
    return Records(
        codes=codes,
        text=np.array([place[text] for text, *_ in rows]),
        label=np.array([at[code] for _, code, *_ in rows]),
        window=np.array([window for _, _, window, *_ in rows]),
        site=np.array([site for *_, site, _ in rows]),
        fate=np.array([fate for *_, fate in rows]),
    )


def noisy(
    lists: Lists,
    fresh: Sequence[tuple[str, str, int]],
    window: int,
    kind: str,
    rate: float,
    seed: int,
) -> tuple[str, ...]:
    """The labels of a window's records after the noise; wrong ones are codes of that day."""
    data = Dataset(
        records=tuple(f"{site}-{window}-{i}" for i, (*_, site) in enumerate(fresh)),
        texts=tuple(text for text, *_ in fresh),
        labels=tuple(code for _, code, _ in fresh),
        patients=tuple(str(i) for i in range(len(fresh))),
        windows=(window,) * len(fresh),
    )
    valid = lists.on(window)
    siblings: dict[str, list[str]] = {}
    for code in valid:
        siblings.setdefault(lists.category[code], []).append(code)
    following = {
        code: group[(i + 1) % len(group)]
        for group in siblings.values()
        for i, code in enumerate(group)
    }
    known = Known(codes=tuple(valid), likest=following)
    return getattr(corrupt, kind)(data, rate, seed, known).data.labels  # type: ignore[no-any-return]


def codebook(z: Tensor) -> Tensor:
    """REGIONS directions: spherical k-means of every third text, five steps."""
    unit = geometry.directions(z, z.double().mean(0))
    book = unit[:: max(len(unit) // REGIONS, 1)][:REGIONS].clone()
    for _ in range(5):
        book = geometry.settled(book, geometry.moved(book, unit[::3])[0])
    return book


def judged(
    lists: Lists, records: Records, z: Tensor, book: Tensor, seed: int
) -> list[dict[str, Any]]:
    flagged, ranks = evidence(lists, records, z, seed)
    region = nearest(z, book)[records.text]
    own = [
        Dated(
            label=records.label[rows],
            region=region[rows],
            window=records.window[rows],
            text=records.text[rows],
            flagged=flagged[rows],
        )
        for rows in (records.site == site for site in range(SITES))
    ]
    size = {"labels": len(records.codes), "regions": len(book)}
    counts = np.zeros((*size.values(), NOW), np.int64)
    np.add.at(counts, (records.label, region, records.window - 1), ageing.UNIT)
    held = np.zeros((len(book), NOW, SITES), np.int64)
    held[region, records.window - 1, records.site] = 1
    change = ageing.changes(counts, held.sum(axis=2))
    carried = np.sum([ageing.carriers(one, now=NOW, **size) for one in own], axis=0)
    registries = {RULES[0]: registry(lists), RULES[1]: Registry.of_counts(counts)}
    wrong = records.fate == "noisy"
    common = {
        "records": len(wrong),
        "share": {fate: int((records.fate == fate).sum()) for fate in FATES},
        "auc": auc_interval((-ranks[wrong]).tolist(), (-ranks[~wrong]).tolist()).value,
    }
    found = []
    for rule in RULES:
        said = np.where(flagged, "noisy", "fine").astype(object)
        if rule in registries:
            for site, one in enumerate(own):
                codes = ageing.verdicts(
                    one, registry=registries[rule], change=change, carried=carried, now=NOW
                )
                said[records.site == site] = [CODES[code] for code in codes]
        f1 = {fate: f1_of(records.fate == fate, said == fate) for fate in FATES}
        found.append({"rule": rule, **common, "f1": f1, "macro": sum(f1.values()) / len(f1)})
    return found


def evidence(lists: Lists, records: Records, z: Tensor, seed: int) -> tuple[Any, Any]:
    """Which records disagree with all others of today, (n,), and their ranks u."""
    categories = sorted(set(lists.category.values()))
    above = np.array([categories.index(lists.category[code]) for code in records.codes])
    rows = torch.from_numpy(above[records.label])
    phi = statistics.expand(z, features=FEATURES, bits=BITS, seed=FEATURE_SEED)
    phi = phi[torch.from_numpy(records.text)].double()
    random = np.random.default_rng(seed + 100)
    right = np.flatnonzero(records.fate != "noisy")
    checked = torch.from_numpy(random.choice(right, TRUSTED, replace=False))
    weight = torch.ones(len(rows), dtype=torch.float64)
    weight[checked] = 0.0  # Trusted records are never used to fit.
    ranks = weight
    for _ in range(3):
        target = torch.nn.functional.one_hot(rows, len(categories)) * weight[:, None]
        inverse = margin.inverse(phi.T @ (phi * weight[:, None]))
        scores = margin.without_self(
            phi @ (inverse @ (phi.T @ target)), margin.leverage(phi, inverse) * weight, target
        )
        score = (margin.margins(scores, rows).clamp(-2, 2) + 2) / 4
        ranks = trusted.ranks(score, trusted.histogram(score[checked]))
        weight = (ranks > ALPHA).double()
        weight[checked] = 0.0
    return (ranks <= ALPHA).numpy(), ranks.numpy()


def nearest(z: Tensor, book: Tensor) -> Any:
    unit = geometry.directions(z, z.double().mean(0))
    return (unit @ book.T).argmax(1).numpy()


def registry(lists: Lists) -> Registry:
    """When each code is in the list; windows count releases."""
    present = np.array([[code in r for r in lists.releases] for code in lists.category])
    last = NOW - present[:, ::-1].argmax(axis=1)
    return Registry(opened=present.argmax(axis=1) + 1, closed=np.where(last == NOW, NOW + 1, last))


def f1_of(truth: Any, said: Any) -> float:
    return float(2 * (truth & said).sum() / max(truth.sum() + said.sum(), 1))


def page(cells: Sequence[dict[str, Any]]) -> str:
    lines = [
        "# Outdated, noisy or novel",
        "",
        f"Macro-F1 over {', '.join(FATES)}; target {TARGET} for noise over all codes.",
        "",
        "| noise | rule | macro-F1 | " + " | ".join(FATES) + " | AUC of noise |",
        "|---|---|---|" + "---|" * (len(FATES) + 1),
    ]
    for kind, rate in NOISE:
        for rule in RULES:
            own = [c for c in cells if (c["noise"], c["rate"], c["rule"]) == (kind, rate, rule)]
            marks = [_with_interval([c["macro"] for c in own])]
            marks += [_with_interval([c["f1"][fate] for c in own]) for fate in FATES]
            marks.append(_with_interval([c["auc"] for c in own]))
            lines.append(f"| {kind} {rate:g} | {rule} | " + " | ".join(marks) + " |")
    first = cells[0]
    shares = ", ".join(f"{number:,} {fate}" for fate, number in first["share"].items())
    lines += [
        "",
        f"{first['records']:,} records at {SITES} sites ({shares} in the first run), "
        f"{len(SEEDS)} seeds, 95 % bootstrap intervals.",
        "",
        "Reproduce: `python benchmarks/ageing.py`.",
    ]
    return "\n".join(lines) + "\n"


def _with_interval(values: Sequence[float]) -> str:
    found = metrics.interval(values)
    return f"{found['mean']:.3f} [{found['low']:.3f}, {found['high']:.3f}]"


if __name__ == "__main__":
    main()
