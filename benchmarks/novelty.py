"""How well summed statistics tell new knowledge from known, and right labels from changed ones.

Windows: ICD-10-CM descriptions by chapter, statistics from one half of the records, windows from
the other, cut as contiguous ranges of codes as a specialty clinic has them. Each is compared with
all chapters, and again with its own chapter left out. Thresholds come from the other half of the
windows. Conflicts: the same windows with the labels of their chapter permuted, against a view of
the first half. Discovery: CLINC150 domains at twelve sites without declared scopes. Writes
``benchmarks/results/novelty.json`` and ``novelty.md``. Run with FEDKOLA_DATA set:
``python benchmarks/novelty.py`` (minutes; a folder of cached features may follow).
"""

import gzip
import json
import math
import os
import sys
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fedkola.evaluation import machine
from fedkola.evaluation.demo import pooled
from fedkola.evaluation.tasks import load
from fedkola.knowledge import novelty, statistics, views
from fedkola.knowledge.novelty import Reference, Thresholds
from fedkola.knowledge.router import Part
from fedkola.knowledge.stream import hash_share, seeded
from fedkola.plan import Plan, Task
from fedkola.training import features, model
from fedkola.types import Catalogue

RESULTS = Path(__file__).parent / "results"
RECORDS = (32, 96, 384, 1536)
SEEDS = (1, 2, 3)
SETTINGS = ((1, 256), (2, 256), (3, 256))
COLUMNS = ("modules", "purity", "nmi", "delay", "parked")
RULES = ("share above half", "and it was below half")
K_MIN = 3
FEATURES, SEED = 2048, 99
LAST = 8
"""Rounds after the last arrival in which waiting windows are retried."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Records:
    """Embedded records of a task, in the order of their codes."""

    codes: tuple[str, ...]
    modules: tuple[str, ...]
    z: Tensor


def main() -> None:
    torch.set_num_threads(1)
    folder = Path(sys.argv[1]) if sys.argv[1:] else None
    cache = features.FeatureCache(model.load("minilm"), folder)
    stream = pooled(load(Plan(task=Task(overlap=0.0))), without={})
    union, catalogue = stream.sites["union"], stream.catalogue
    held = [hash_share(text) < 0.5 for text in union.texts]
    z = cache.integers(union.texts)
    known, fresh = (_icd(union.labels, z, catalogue, held, half) for half in (True, False))
    whole, others = references(known)
    clinc = _clinc(cache)
    found: dict[str, Any] = {
        "machine": machine.describe(),
        "windows": [window_test(whole, others, fresh, n) for n in RECORDS],
        "conflicts": conflicts(known, fresh, catalogue),
        "discovery": [
            discovery(clinc, at_once=at_once, floor=floor, seed=seed)
            for at_once, floor in SETTINGS
            for seed in SEEDS
        ],
    }
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "novelty.json").write_text(json.dumps(found, indent=1) + "\n")
    text = table(found)
    (RESULTS / "novelty.md").write_text(text)
    print(text)


def table(found: dict[str, Any]) -> str:
    """The results as Markdown."""
    lines = [
        "# Novelty, conflict and discovery from summed statistics",
        "",
        "### Windows of ICD-10-CM chapters",
        "",
        "22 chapters; statistics from one half of the records, windows from the other, contiguous",
        "ranges of codes. False: a window of a known chapter is called new. Missed: a window is",
        "not, with its chapter left out. Thresholds come from the other half of the windows; the",
        "learnt kappa is their 99 % quantile, here however few they are.",
        "",
        "| records | windows | nearest is right | AUC | sampling alone, kappa 2: false |"
        " kappa 2: false / missed | kappa 3 | kappa learnt |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in found["windows"]:
        pairs = [
            f"{row[f'kappa_{k}']['false_novelty']:.2f} / {row[f'kappa_{k}']['missed_novelty']:.2f}"
            for k in ("2", "3", "learnt")
        ]
        lines.append(
            f"| {row['records']} | {row['windows']} | {row['nearest_right']:.3f} |"
            f" {row['auc']:.2f} | {row['sampling_alone']['false_novelty']:.2f} |"
            f" {' | '.join(pairs)} |"
        )
    lines += [
        "",
        "### Labels that changed",
        "",
        "Blocks permuted within their chapter (all of them, or every second record's), against the",
        "share of right answers in the chapter's other windows.",
        "",
        "| records | windows | false conflict | missed | missed, half of the records changed |",
        "|---|---|---|---|---|",
    ]
    lines += [
        f"| {row['records']} | {row['windows']} | {row['false_conflict']:.3f} |"
        f" {row['missed']:.3f} | {row['missed_half']:.2f} |"
        for row in found["conflicts"]["windows"]
    ]
    labels = found["conflicts"]["labels"]
    lines += [
        "",
        f"Single labels: {labels['swapped']} of {labels['labels']} blocks swapped in pairs, the",
        f"records at twelve sites. Flagged without any change: {labels['flagged_without_change']}.",
        "",
        "| rule | flagged | precision | recall |",
        "|---|---|---|---|",
    ]
    lines += [
        f"| {name} | {labels[name]['flagged']} | {labels[name]['precision']:.2f} |"
        f" {labels[name]['recall']:.2f} |"
        for name in RULES
    ]
    lines += [
        "",
        "### Discovery of CLINC150 domains",
        "",
        "Twelve sites, windows of 300 records, nobody names a domain; mean over seeds "
        f"{list(SEEDS)}. Delay: rounds from arrival to the first window in a module.",
        "",
        "| domains a round | floor | modules of 10 | purity | NMI | delay | share left waiting |",
        "|---|---|---|---|---|---|---|",
    ]
    for at_once, floor in SETTINGS:
        rows = [r for r in found["discovery"] if (r["at_once"], r["floor"]) == (at_once, floor)]
        mean = {k: sum(r[k] for r in rows) / len(rows) for k in COLUMNS}
        lines.append(
            f"| {at_once} | {floor} | {mean['modules']:.1f} | {mean['purity']:.3f} |"
            f" {mean['nmi']:.3f} | {mean['delay']:.2f} | {mean['parked']:.3f} |"
        )
    about = found["machine"]
    lines += [
        "",
        f"Measured on {about['cores']} cores ({about['processor']}), torch {about['torch']}, "
        f"Python {about['python']}. Reproduce: `python benchmarks/novelty.py`.",
        "",
    ]
    return "\n".join(lines)


# --- new or known: windows of ICD-10-CM chapters --------------------------------------------------


def references(known: Records) -> tuple[Reference, dict[str, Reference]]:
    """What is known of all modules, and of all but one."""
    parts = []
    for module in dict.fromkeys(known.modules):
        rows = torch.tensor([i for i, m in enumerate(known.modules) if m == module])
        place = torch.zeros(len(rows), dtype=torch.int64)
        words = statistics.router(known.z[rows], place, num_rows=1)
        parts.append(Part(module=module, labels=("all",), words=words, weight=1.0))
    width = known.z.shape[1]
    others = {
        part.module: novelty.reference([p for p in parts if p is not part], width=width)
        for part in parts
    }
    return novelty.reference(parts, width=width), others


def window_test(
    whole: Reference, others: dict[str, Reference], fresh: Records, size: int
) -> dict[str, Any]:
    """One row: windows of ``size`` records against 22 chapters, own chapter in and left out."""
    cut = windows(fresh, size)
    own = [(module, novelty.distances(whole, z)) for module, z in cut]
    away = [novelty.nearest(novelty.distances(others[module], z)) for module, z in cut]
    mine = [next(d for d in found if d.module == module) for module, found in own]
    folds: dict[str, list[tuple[bool, bool, float, float]]] = {"2": [], "3": [], "learnt": []}
    kappas = []
    for fold in (0, 1):
        teach, judge = mine[fold::2], range(1 - fold, len(mine), 2)
        learnt = Thresholds()
        for _ in range(2):
            learnt = novelty.learn(novelty.tally(teach, learnt))
        ratio = novelty.tally(teach, learnt)[novelty.HISTOGRAM]
        kappas.append(novelty.quantile(ratio * 99))
        for name, kappa in (("2", 2.0), ("3", 3.0), ("learnt", kappas[-1])):
            at = replace(learnt, kappa=kappa)
            for i in judge:
                best = novelty.nearest(own[i][1])
                folds[name].append(
                    (
                        not novelty.fits(at, best),
                        novelty.fits(at, away[i]),
                        best.observed / novelty.limit(at, best),
                        away[i].observed / novelty.limit(at, away[i]),
                    )
                )
    return {
        "records": size,
        "windows": len(cut),
        "nearest_right": _share(novelty.nearest(found).module == module for module, found in own),
        "auc": auc([row[3] for row in folds["2"]], [row[2] for row in folds["2"]]),
        "kappa_learnt": kappas,
        **{
            f"kappa_{name}": {
                "false_novelty": _share(row[0] for row in rows),
                "missed_novelty": _share(row[1] for row in rows),
            }
            for name, rows in folds.items()
        },
        "sampling_alone": {
            "false_novelty": _share(
                not novelty.fits(Thresholds(), novelty.nearest(found)) for _, found in own
            )
        },
    }


def windows(records: Records, size: int) -> list[tuple[str, Tensor]]:
    """Contiguous ranges of ``size`` records of one module; a remainder is left out."""
    return [(module, records.z[torch.tensor(rows)]) for module, rows in _ranges(records, size)]


def auc(positive: Sequence[float], negative: Sequence[float]) -> float:
    """The chance that a new window lies further out than a known one; ties count half."""
    high, low = torch.tensor(positive), torch.tensor(negative)
    above = (high[:, None] > low).double() + 0.5 * (high[:, None] == low).double()
    return round(float(above.mean()), 4)


# --- right or changed: labels of ICD-10-CM blocks -------------------------------------------------


def conflicts(known: Records, fresh: Records, catalogue: Catalogue) -> dict[str, Any]:
    """Windows whose blocks are permuted within their chapter, and single blocks swapped."""
    block = {label.code: label.path[1] for label in catalogue.labels}
    nodes, weights, bias = _view([block[c] for c in known.codes], known.z)
    # A block of one record may have it in the other half: nothing is known that it contradicts.
    fresh = _take(fresh, [i for i, code in enumerate(fresh.codes) if block[code] in nodes])
    wanted = [block[code] for code in fresh.codes]
    phi = statistics.expand(fresh.z, features=FEATURES, bits=4, seed=SEED)
    scores = phi @ weights + bias
    owner = {block[c]: m for c, m in zip(known.codes, known.modules, strict=True)}
    inside = torch.tensor([[owner[n] == m for n in nodes] for m in dict.fromkeys(known.modules)])
    place = {m: i for i, m in enumerate(dict.fromkeys(known.modules))}
    allowed = inside[torch.tensor([place[m] for m in fresh.modules])]
    given = [nodes[int(i)] for i in scores.masked_fill(~allowed, -math.inf).argmax(1)]
    moved = {}
    for module in place:
        mine = [n for n in nodes if owner[n] == module]
        moved |= dict(zip(mine, mine[1:] + mine[:1], strict=True))
    several = {m for m, count in Counter(owner.values()).items() if count > 1}
    rows = []
    for size in (32, 96, 384):
        cut = _ranges(fresh, size)
        cut = [(m, mine) for m, mine in cut if m in several]
        right = [sum(given[i] == wanted[i] for i in mine) for _, mine in cut]
        changed = [sum(given[i] == moved[wanted[i]] for i in mine) for _, mine in cut]
        half = [
            sum(given[i] == (moved[wanted[i]] if i % 2 else wanted[i]) for i in mine)
            for _, mine in cut
        ]
        found: dict[str, list[bool]] = {"false_conflict": [], "missed": [], "missed_half": []}
        low = 0
        for k, (module, mine) in enumerate(cut):
            peers = [j for j, (m, _) in enumerate(cut) if m == module and j != k]
            asked = sum(len(cut[j][1]) for j in peers)
            if not asked:
                continue
            usual = sum(right[j] for j in peers) / asked
            low += usual < 0.5
            found["false_conflict"].append(novelty.contradicts(right[k], len(mine), usual))
            found["missed"].append(not novelty.contradicts(changed[k], len(mine), usual))
            found["missed_half"].append(not novelty.contradicts(half[k], len(mine), usual))
        rows.append(
            {
                "records": size,
                "windows": len(found["missed"]),
                "usual_below_half": low,
                **{name: _share(values) for name, values in found.items()},
            }
        )
    return {"windows": rows, "labels": _single_labels(scores, nodes, wanted)}


def _single_labels(scores: Tensor, nodes: Sequence[str], wanted: Sequence[str]) -> dict[str, Any]:
    """Blocks swapped in pairs (one in twenty), records spread over twelve sites: who is flagged?"""
    given = [nodes[int(i)] for i in scores.argmax(1)]
    enough = [n for n, count in Counter(wanted).items() if count >= 32]
    chance = seeded(SEED, "swapped")
    chosen = chance.sample(enough, len(enough) // 20 * 2)
    swapped = dict(zip(chosen[::2], chosen[1::2], strict=True))
    swapped |= {b: a for a, b in swapped.items()}
    place = {n: i for i, n in enumerate(nodes)}
    found = {}
    for name, change in (("before", {}), ("after", swapped)):
        wrong = torch.zeros(len(nodes), dtype=torch.int64)
        asked = torch.zeros(len(nodes), dtype=torch.int64)
        sites: defaultdict[int, set[int]] = defaultdict(set)
        for i in range(0 if name == "before" else 1, len(wanted), 2):
            row = place[change.get(wanted[i], wanted[i])]
            asked[row] += 1
            wrong[row] += given[i] != nodes[row]
            sites[row].add(i // 2 % 12)
        holders = torch.tensor([len(sites[row]) for row in range(len(nodes))])
        flagged = novelty.doubtful(wrong, asked, holders, k_min=K_MIN)
        found[name] = (flagged, 2 * wrong < asked)
    truth = torch.tensor([n in swapped for n in nodes])
    plain = found["after"][0]
    usual = plain & found["before"][1]
    return {
        "labels": len(nodes),
        "swapped": len(swapped),
        "flagged_without_change": int(found["before"][0].sum()),
        **{
            name: {
                "flagged": int(flags.sum()),
                "precision": _ratio(flags & truth, flags),
                "recall": _ratio(flags & truth, truth),
            }
            for name, flags in zip(RULES, (plain, usual), strict=True)
        },
    }


def _view(labels: Sequence[str], z: Tensor) -> tuple[tuple[str, ...], Tensor, Tensor]:
    """The pooled read-out of these records: nodes, weights (p, C) and bias (C,)."""
    nodes = tuple(dict.fromkeys(labels))
    place = {n: i for i, n in enumerate(nodes)}
    rows = torch.tensor([place[label] for label in labels])
    words = statistics.analytic(z, rows, num_rows=len(nodes), features=FEATURES, bits=4, seed=SEED)
    gram = statistics.unpack(words[statistics.GRAM], FEATURES).to(torch.float64)
    sums, counts = (words[name].to(torch.float64) for name in (statistics.SUMS, statistics.COUNTS))
    lam = views.ridge(1e-4, features=FEATURES, records=len(rows))
    weights, bias = views.read_out(gram, sums, counts, rule="pooled", lam=lam)
    return nodes, weights, bias


# --- discovered: CLINC150 domains without declared scopes ----------------------------------------


def discovery(clinc: Records, *, at_once: int, floor: int, seed: int) -> dict[str, Any]:
    """Twelve sites, each domain at six of them: three when it arrives, three two rounds later.

    The first round brings one domain, later ones ``at_once``. Nobody names a domain: windows are
    hits, novel buckets or wait, and a cell or a module opens at three sites.
    """
    chance = seeded(seed, "discovery")
    domains = sorted(set(clinc.modules))
    chance.shuffle(domains)
    waiting: defaultdict[int, list[tuple[int, str, Tensor]]] = defaultdict(list)
    arrived: dict[str, int] = {}
    for k, domain in enumerate(domains):
        arrived[domain] = first = 1 if k == 0 else 2 + (k - 1) // at_once
        rows = [i for i, m in enumerate(clinc.modules) if m == domain]
        chance.shuffle(rows)
        share = len(rows) // 6
        for j, site in enumerate(chance.sample(range(12), 6)):
            z = clinc.z[torch.tensor(rows[j * share : (j + 1) * share])]
            waiting[site].append((first + (0 if j < 3 else 2), domain, z))
    modules: dict[str, list[tuple[str, Tensor]]] = {}
    sums: dict[str, dict[str, Tensor]] = {}
    learnt, known, opened = Thresholds(), None, {}
    for number in range(1, max(arrived.values()) + 2 + LAST + 1):
        ready = [(s, w) for s, ws in waiting.items() for w in ws if w[0] <= number]
        votes: defaultdict[str, list[tuple[int, tuple[int, str, Tensor]]]] = defaultdict(list)
        for site, window in ready:
            votes[_decision(known, learnt, window[2], number, floor)].append((site, window))
        for choice, voters in votes.items():
            if choice == "idle" or len({site for site, _ in voters}) < K_MIN:
                continue
            name = choice if choice in modules else f"found-{len(modules) + 1}@1"
            for site, window in voters:
                modules.setdefault(name, []).append((window[1], window[2]))
                sums[name] = _add(sums.get(name, {}), window[2])
                opened.setdefault(window[1], number)
                waiting[site] = [w for w in waiting[site] if w is not window]
        if modules:
            parts = [Part(module=m, labels=("",), words=w, weight=1.0) for m, w in sums.items()]
            known = novelty.reference(parts, width=clinc.z.shape[1])
            joined = [(name, z) for name, mine in modules.items() for _, z in mine]
            judged = [novelty.accepted(known, name, z) for name, z in joined]
            learnt = novelty.learn(novelty.tally([d for d in judged if d], learnt))
    pairs = Counter((name, domain) for name, mine in modules.items() for domain, _ in mine)
    parked = sum(len(ws) for ws in waiting.values())
    late = [opened[d] - arrived[d] for d in domains if d in opened]
    return {
        "at_once": at_once,
        "floor": floor,
        "seed": seed,
        "domains": len(domains),
        "modules": len(modules),
        "purity": purity(pairs),
        "nmi": nmi(pairs),
        "parked": round(parked / (parked + sum(pairs.values())), 4),
        "domains_opened": len(late),
        "delay": round(sum(late) / len(late), 3) if late else None,
        "kappa": learnt.kappa,
    }


def purity(pairs: Counter[tuple[str, str]]) -> float:
    """Share of windows that are of the most frequent domain of their module."""
    best: defaultdict[str, int] = defaultdict(int)
    for (name, _), count in pairs.items():
        best[name] = max(best[name], count)
    return round(sum(best.values()) / sum(pairs.values()), 4)


def nmi(pairs: Counter[tuple[str, str]]) -> float:
    """Mutual information of module and domain over the mean of their entropies; 1 if both are
    the same partition."""
    total = sum(pairs.values())
    sides: tuple[Counter[str], Counter[str]] = (Counter(), Counter())
    for pair, count in pairs.items():
        for side, name in zip(sides, pair, strict=True):
            side[name] += count
    left, right = (-sum(c / total * math.log(c / total) for c in s.values()) for s in sides)
    shared = sum(
        c / total * math.log(c * total / (sides[0][name] * sides[1][domain]))
        for (name, domain), c in pairs.items()
    )
    return round(2 * shared / (left + right), 4) if left + right else 1.0


def _decision(
    known: Reference | None, learnt: Thresholds, z: Tensor, number: int, floor: int
) -> str:
    if known is None:
        return "bucket-0" if len(z) >= floor else "idle"
    best = novelty.nearest(novelty.distances(known, z))
    if novelty.fits(learnt, best):
        return best.module
    if not novelty.discoverable(learnt, best, floor=floor):
        return "idle"
    return f"bucket-{novelty.sketch(known, z, seed=number)}"


def _add(words: dict[str, Tensor], z: Tensor) -> dict[str, Tensor]:
    """A module's summed router words with one window more."""
    more = statistics.router(z, torch.zeros(len(z), dtype=torch.int64), num_rows=1)
    return {name: words[name] + value for name, value in more.items()} if words else more


def _clinc(cache: features.FeatureCache) -> Records:
    rows = []
    for name in ("train", "val"):
        path = Path(os.environ["FEDKOLA_DATA"]) / "clinc150" / f"{name}.jsonl.gz"
        with gzip.open(path, "rt", encoding="utf-8") as lines:
            rows += [json.loads(line) for line in lines]
    return Records(
        codes=tuple(row["intent"] for row in rows),
        modules=tuple(row["domain"] for row in rows),
        z=cache.integers([row["text"] for row in rows]),
    )


def _icd(
    labels: Sequence[str], z: Tensor, catalogue: Catalogue, held: Sequence[bool], half: bool
) -> Records:
    scope = {label.code: label.scope for label in catalogue.labels}
    place = {code: i for i, code in enumerate(catalogue.codes())}
    rows = [i for i in range(len(labels)) if held[i] is half]
    rows.sort(key=lambda i: place[labels[i]])
    codes = tuple(labels[i] for i in rows)
    return Records(codes=codes, modules=tuple(scope[c] for c in codes), z=z[torch.tensor(rows)])


def _share(hits: Any) -> float:
    values = list(hits)
    return round(sum(values) / len(values), 4)


def _ranges(records: Records, size: int) -> list[tuple[str, list[int]]]:
    rows: defaultdict[str, list[int]] = defaultdict(list)
    for i, module in enumerate(records.modules):
        rows[module].append(i)
    return [
        (module, mine[start : start + size])
        for module, mine in rows.items()
        for start in range(0, len(mine) - size + 1, size)
    ]


def _take(records: Records, rows: Sequence[int]) -> Records:
    return Records(
        codes=tuple(records.codes[i] for i in rows),
        modules=tuple(records.modules[i] for i in rows),
        z=records.z[torch.tensor(rows)],
    )


def _ratio(part: Tensor, whole: Tensor) -> float | None:
    return round(int(part.sum()) / int(whole.sum()), 4) if int(whole.sum()) else None


if __name__ == "__main__":
    main()
