"""How large a bank grows in a hundred windows, and what making it small costs.

Twenty-four scopes of six families arrive over a hundred windows, one every fourth window; each
brings records for twelve windows and falls silent, and the first six come back in window 60.
Scopes of a family have near means and adapters that share most of their product. Cells are sealed
as rounds seal them (rows, router, Gram, LoRA); the bank is kept within bounds after every window.
Measured: hot cells, bytes and slots against a bank that only grows; that the head is the same bit
for bit; the error of every fused adapter as predicted and as measured on full products; that taking
a cell back and adding it up again changes nothing. No model and no data: statistics of random
integer embeddings.

Writes ``benchmarks/results/growth.json`` and ``growth.md`` and prints the table. Run:
``python benchmarks/growth.py`` (about a minute on one core).
"""

import json
import time
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from torch import Tensor

from fedkola.evaluation import machine
from fedkola.knowledge import archive, compact, statistics, upkeep, views
from fedkola.knowledge import bank as banks
from fedkola.knowledge.bank import Bank, Cell, CellKind, KnowledgeCell
from fedkola.knowledge.compact import Policy
from fedkola.knowledge.views import Rule
from fedkola.types import Aggregate, Catalogue, Grid, Label

WINDOWS, SCOPES, FAMILIES, ACTIVE, BACK = 100, 24, 6, 12, 60
WIDTH, FEATURES, LABELS, RECORDS = 32, 64, 3, 40
RANK, FRACTION = 4, 10
TARGETS = {"layer.0.query": (48, 64), "layer.0.value": (48, 64)}
POLICY = Policy(hot_cells=120, recent=4, eps=0.25, slots_max=12, spare=2)
RULE = Rule(merge="mean")
RESULTS = Path(__file__).parent / "results"


def main() -> None:
    torch.set_num_threads(1)
    began = time.perf_counter()
    grown, small = Bank(), Bank()
    windows = []
    with TemporaryDirectory() as place:
        folder = Path(place)
        for number in range(1, WINDOWS + 1):
            for scope in active(number):
                name = f"scope-{scope}"
                small = upkeep.parted(
                    small,
                    POLICY,
                    folder,
                    never,
                    now=number,
                    rule=RULE,
                    targets=TARGETS,
                    scopes=[name],
                )
                small = banks.open_modules(small, [name], round=number, slots_max=POLICY.slots_max)
                grown = banks.open_modules(grown, [name], round=number, slots_max=SCOPES)
                for about, total in window(small, scope, number):
                    small = banks.seal(small, about, total)
                    grown = banks.seal(grown, about, total)
            grown, small = (pooled(bank, number) for bank in (grown, small))
            small = upkeep.tidy(small, POLICY, folder, now=number, rule=RULE, targets=TARGETS)
            archive.sweep(folder, small)
            windows.append(row(number, grown, small, folder))
        result = {
            "machine": machine.describe(),
            "setting": {
                "windows": WINDOWS,
                "scopes": SCOPES,
                "slots_max": POLICY.slots_max,
                "hot_cells": POLICY.hot_cells,
                "recent": POLICY.recent,
                "eps": POLICY.eps,
            },
            "head_equal": same_head(grown, small),
            "taken_out_and_added_again_equal": returns(small, folder),
            "fused": errors(small, folder),
            "windows": windows,
            "seconds": round(time.perf_counter() - began, 1),
        }
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "growth.json").write_text(json.dumps(result, indent=1))
    (RESULTS / "growth.md").write_text(table(result))
    print(table(result))


def active(number: int) -> list[int]:
    """The scopes that bring records in a window."""
    back = range(6) if number == BACK else ()
    return [s for s in range(SCOPES) if 0 <= number - 1 - 4 * s < ACTIVE or s in back]


def never(about: KnowledgeCell) -> Cell:
    raise AssertionError(f"{about.id} was never purged")


def window(bank: Bank, scope: int, number: int) -> list[tuple[KnowledgeCell, Aggregate]]:
    """The rows, router and LoRA cells of one scope in one window."""
    module = banks.module_of(bank, f"scope-{scope}")
    assert module is not None
    z, rows = records(scope, number)
    labels = tuple(f"scope-{scope}/{i}" for i in range(LABELS))
    recipe = {"features": FEATURES, "bits": 4, "seed": 0}
    parts = {
        CellKind.ANALYTIC: (statistics.by_label(z, rows, num_rows=LABELS, **recipe), recipe),
        CellKind.ROUTER: (statistics.router(z, rows, num_rows=LABELS), {}),
        CellKind.LORA: (adapter(scope, number), {"rank": RANK, "basis_seed": 0}),
    }
    found = []
    for kind, (words, recipe) in parts.items():
        slot = module.slot if kind is CellKind.LORA else None
        found.append(cell(kind, module.id, number, labels, words, recipe, slot=slot))
    return found


def records(scope: int, number: int) -> tuple[Tensor, Tensor]:
    """Integer embeddings near the centre of the scope's family, and their label rows."""
    chance = torch.Generator().manual_seed(1000 * scope + number)
    family = torch.Generator().manual_seed(scope % FAMILIES)
    centre = torch.randn(WIDTH, generator=family)
    rows = torch.arange(RECORDS) % LABELS
    own = torch.randn(LABELS, WIDTH, generator=torch.Generator().manual_seed(90 + scope))
    noise = torch.randn(RECORDS, WIDTH, generator=chance)
    e = torch.nn.functional.normalize(centre + 0.3 * own[rows] + 0.8 * noise, dim=1)
    return torch.round(1024 * e).to(torch.int16), rows


def adapter(scope: int, number: int) -> dict[str, Tensor]:
    """n B on the grid: mostly the family's B, some of the scope's and of the window's own."""
    words = {}
    for index, (layer, (height, _)) in enumerate(TARGETS.items()):
        seeds = (scope % FAMILIES, 500 + scope, 1000 * scope + number)
        shared, own, now = (
            torch.randn(height, RANK, generator=torch.Generator().manual_seed(7 * s + index))
            for s in seeds
        )
        b = RECORDS * (shared + 0.25 * own + 0.1 * now)
        words[f"{layer}.lora_B"] = torch.round(b * 2**FRACTION).to(torch.int64)
    return words


def cell(kind, module, number, labels, words, recipe, *, slot=None, covers=()):  # type: ignore[no-untyped-def]
    about = KnowledgeCell(
        id=banks.cell_id(module=module, kind=kind, round=number, slot=slot, recipe=recipe),
        module=module,
        kind=kind,
        round=number,
        valid=(0.0 if kind is CellKind.SCATTER else float(number), None),
        slot=slot,
        recipe=recipe,
        labels=labels,
        cohort=("a", "b", "c"),
        contributors=3,
        records=RECORDS,
        words="",
        covers=covers,
    )
    words = {**words, "weight": torch.tensor(RECORDS), "metric/contributors": torch.tensor(3)}
    scale = {name: FRACTION if name.endswith(".lora_B") else 0 for name in words}
    return about, Aggregate(
        cohort=("a", "b", "c"), words=words, grid=Grid(word=64, bits=64, scale=scale)
    )


def pooled(bank: Bank, number: int) -> Bank:
    """The bank with one Gram over the rows of this window."""
    waiting = [c.about for c in banks.uncovered(bank)]
    if not waiting:
        return bank
    z = torch.cat([records(int(a.module.split("-")[1].split("@")[0]), a.round)[0] for a in waiting])
    recipe = {"features": FEATURES, "bits": 4, "seed": 0}
    words = statistics.scatter(z, **recipe)
    covers = tuple(about.id for about in waiting)
    about, total = cell(CellKind.SCATTER, banks.POOL, number, (), words, recipe, covers=covers)
    return banks.seal(bank, replace(about, records=len(z)), total)


def row(number: int, grown: Bank, small: Bank, folder: Path) -> dict[str, float]:
    """One window: sizes of both banks."""
    return {
        "window": number,
        "grown_cells": len(grown.cells),
        "grown_bytes": sum(banks.cell_bytes(c) for c in grown.cells),
        "hot_cells": len(small.cells),
        "hot_bytes": sum(banks.cell_bytes(c) for c in small.cells)
        + sum(v.numel() * v.element_size() for f in small.fused for v in f.adapter.values()),
        "cold_bytes": archive.size(folder),
        "modules": len(small.modules),
        "slots": len({m.slot for m in small.modules if m.slot is not None}) + len(small.fused),
        "fused": len(small.fused),
    }


def same_head(grown: Bank, small: Bank) -> bool:
    """Whether both banks read out the same head, bit for bit."""
    codes = [f"scope-{s}/{i}" for s in range(SCOPES) for i in range(LABELS)]
    labels = tuple(Label(code=c, path=(c,), scope=c.split("/")[0]) for c in codes)
    catalogue = Catalogue(system="growth", levels=("code",), labels=labels)
    heads = [
        views.compute(bank, catalogue, RULE, now=WINDOWS, targets=TARGETS).head
        for bank in (grown, small)
    ]
    return all(map(torch.equal, heads[0].weights, heads[1].weights))


def returns(small: Bank, folder: Path) -> bool:
    """Whether cells that come back and are added up again give the sums they came from."""
    first = [about.id for about in small.cold if about.kind is CellKind.ROUTER][:3]
    found = []
    for bank in (small, archive.thaw(small, folder, first)):
        for _ in range(2):
            for group in compact.summable(bank, before=WINDOWS):
                bank, _ = compact.add(bank, group)
        found.append({c.about.id: c.about.words for c in bank.cells})
    return found[0] == found[1]


def errors(small: Bank, folder: Path) -> list[dict[str, object]]:
    """Every fused adapter: its modules, and its error as predicted and on full products."""
    found = []
    for fused in small.fused:
        apart = archive.thaw(small, folder, fused.cells)
        cells = [c for c in apart.cells if c.about.kind is CellKind.LORA]
        adapters = views.adapters(cells, RULE, {c.about.id: 1.0 for c in cells}, TARGETS)
        exact = compact.measured(
            [adapters[module] for module in fused.modules], fused.shares, fused.adapter
        )
        found.append(
            {
                "modules": list(fused.modules),
                "predicted": round(fused.error, 9),
                "measured": round(exact, 9),
            }
        )
    return found


def table(result) -> str:  # type: ignore[no-untyped-def]
    chosen = [r for r in result["windows"] if r["window"] in (1, 10, 25, 50, 75, 100)]
    lines = [
        "# Growth of the bank over a hundred windows",
        "",
        "| window | cells, only growing | MB | hot cells | hot MB | cold MB | modules | slots |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for r in chosen:
        sizes = [f"{r[k] / 1e6:.2f}" for k in ("grown_bytes", "hot_bytes", "cold_bytes")]
        lines.append(
            f"| {r['window']} | {r['grown_cells']} | {sizes[0]} | {r['hot_cells']} | {sizes[1]} | "
            f"{sizes[2]} | {r['modules']} | {r['slots']} |"
        )
    most = max(r["hot_cells"] for r in result["windows"])
    slots = max(r["slots"] for r in result["windows"])
    gap = max((abs(f["predicted"] - f["measured"]) for f in result["fused"]), default=0.0)
    worst = max((f["measured"] for f in result["fused"]), default=0.0)
    limits = result["setting"]
    lines += [
        "",
        f"At most {most} hot cells (bound {limits['hot_cells']}) and {slots} slots "
        f"(of {limits['slots_max']}) in {limits['windows']} windows; head equal bit for bit: "
        f"{result['head_equal']}; cells taken out and added again equal: "
        f"{result['taken_out_and_added_again_equal']}. {len(result['fused'])} fused adapters, "
        f"largest relative error {worst:.4f} (allowed {limits['eps']}), predicted and measured "
        f"differ by at most {gap:.1e}.",
        "",
        f"Synthetic statistics, one thread, {result['seconds']} s, load "
        f"{result['machine']['load']:.1f}.",
        "",
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    main()
