"""A row reads what it says it reads, so its cells are measured anew for nothing else."""

from dataclasses import replace
from pathlib import Path

import pytest
import small_federation as small

from fedkola import server
from fedkola.evaluation import dynamic, setups
from fedkola.evaluation.cells import Cells, Found
from fedkola.plan import Knowledge, Plan, as_dict, override
from fedkola.types import Algorithm

BASELINES = sorted(row for row in setups.ROWS if setups.ROWS[row].reads is not None)
# Another value for every setting of [knowledge] that a method may or may not read.
OTHER = Knowledge(
    features=48,
    bits=3,
    readout="pooled",
    lam=0.5,
    spread=0.25,
    lanes=("analytic",),
    slots_max=5,
    basis_seed=9,
    merge="mean",
    merge_lam=0.5,
    lora_records=7,
    lora_steps=5,
    lora_floor=4,
    k_min=2,
    label_floor=3,
    public_reference=False,
    scatter_share=1.0,
    scatter_every=3,
    adapt_share=0.5,
    adapt_rank=3,
    adapt_energy=0.5,
    adapt_shortened=0.25,
    top_k=2,
    tau_g=0.5,
    coverage_min=0.25,
    half_life=2.0,
    hot_cells=9,
    compact_eps=0.5,
    removal_batch=4,
    removal_wait=3,
)


def built(plan: Plan, folder: Path) -> Algorithm[object]:
    return server.assemble(plan, small.stream(), folder, foundation=small.foundation()).algorithm


def changed(plan: Plan, *keys: str) -> Plan:
    """The plan with other values for these settings of [knowledge]."""
    other = {key: getattr(OTHER, key) for key in keys}
    return replace(plan, knowledge=replace(plan.knowledge, **other))


@pytest.mark.parametrize("row", BASELINES)
def test_a_baseline_is_the_same_whatever_the_settings_it_does_not_read(row: str, tmp_path: Path):
    plan = override(small.plan(), setups.ROWS[row].settings)
    keys = tuple(key.removeprefix("knowledge.") for key in setups.unread(row))

    assert built(changed(plan, *keys), tmp_path / "a") == built(plan, tmp_path / "b")


@pytest.mark.parametrize(
    ("row", "key"), [("afcl", "lam"), ("local", "spread"), ("ewc", "basis_seed")]
)
def test_a_baseline_is_another_one_under_settings_that_it_reads(row: str, key: str, tmp_path: Path):
    plan = override(small.plan(), setups.ROWS[row].settings)

    assert built(changed(plan, key), tmp_path / "a") != built(plan, tmp_path / "b")


def test_a_bank_that_changes_leaves_the_cells_of_baselines_as_they_are(tmp_path: Path):
    setup = setups.SETUPS["clinc150"]
    size = setup.sizes["standard"]
    wider = replace(setup, settings=(*setup.settings, "knowledge.features=999"))

    def anew(row: str) -> list[str]:
        noted: list[str] = []
        bench = dynamic.Bench(
            setup=setup,
            size=size,
            cells=Cells(folder=tmp_path, note=noted.append),
            progress=lambda report: None,
        )
        for one in (setup, wider):
            about = as_dict(dynamic.plan(one, size, row, 1, 1e-3))
            bench.cells.measure("x", about, lambda folder: {}, unread=setups.unread(row))
        return noted

    assert anew("fedit") == ["x"]
    assert dynamic.plan(wider, size, "fedit", 1, 1e-3).knowledge.features == Knowledge().features
    (tmp_path / "x.json").unlink()
    assert anew("afcl") == ["x", "x"]
    (tmp_path / "x.json").unlink()
    assert anew("fedkola") == ["x", "x"]


def kept(folder: Path, row: str, dev: dict[float, float]) -> float:
    """The rate chosen where these accuracies on development records are measured."""
    setup = setups.SETUPS["clinc150"]
    size = setup.sizes["standard"]
    cells = Cells(folder=folder, note=print)
    for rate, top1 in dev.items():
        about = as_dict(dynamic.plan(setup, size, row, dynamic.TUNING_SEED, rate, size.tuning))
        found: Found = {"dev": {"top1": top1, "asked": 100}}
        cells.measure(f"{row}-{dynamic.TUNING_SEED}-{rate:g}", about, lambda work, f=found: f)
    closed = replace(cells, closed=True)
    bench = dynamic.Bench(setup=setup, size=size, cells=closed, progress=lambda report: None)
    return bench.tuned(row)


@pytest.mark.parametrize(
    ("dev", "chosen"),
    [
        ((0.1, 0.3, 0.2, 0.2), 5e-4),
        ((0.3, 0.3, 0.2, 0.2), 2.5e-4),
        ((0.1, 0.1, 0.2, 0.3), 2e-3),  # its double is not measured
        ((0.1, 0.1, 0.2, 0.3, 0.2), 2e-3),
        ((0.1, 0.1, 0.2, 0.3, 0.34), 2e-3),  # within a standard error
        ((0.1, 0.1, 0.2, 0.3, 0.4), 4e-3),
        ((0.1, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6), 8e-3),  # the end of the grid
        ((0.1, 0.1, 0.2), 0.0),
    ],
)
def test_rates_are_doubled_for_as_long_as_the_largest_is_clearly_the_best(
    tmp_path: Path, dev: tuple[float, ...], chosen: float
):
    rates = (2.5e-4, 5e-4, 1e-3, 2e-3, 4e-3, 8e-3, 1.6e-2)
    assert kept(tmp_path, "replay", dict(zip(rates, dev, strict=False))) == chosen
