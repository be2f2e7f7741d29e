"""Every algorithm on every engine, plain and masked: the same bits in any order, every time."""

from pathlib import Path
from typing import Any

import pytest
import small_federation as small

from fedkola.algorithms import ALGORITHMS
from fedkola.engines import ENGINES
from fedkola.ledger import Ledger
from fedkola.types import Visibility

SUMS = [
    method
    for method, kind in ALGORITHMS.items()
    if kind.needs is Visibility.SUM and method != "joint"
]
PAIRS = [(method, engine) for method in ALGORITHMS for engine in ENGINES]


def finished(
    folder: Path, method: str, engine: str, order: int, *more: str
) -> tuple[str, list[Any]]:
    """The hash of the final state, and the knowledge events without their times."""
    sites = {"union": small.records("union", num=40)} if method == "joint" else None
    settings: tuple[str, ...] = (
        f"algorithm.name={method}",
        f"engine.name={engine}",
        f"engine.order={order}",
        *more,
    )
    if method == "adapted":
        # Its base moves, so it has no slots for modules.
        settings += ('knowledge.lanes=["analytic", "router"]', "knowledge.adapt_rank=2")
    state = small.run(small.assemble(folder, *settings, sites=sites))
    with Ledger.open(folder) as ledger:
        ledger.verify("small")
        events = [(e.seq, e.round, e.kind, e.subject, e.body) for e in ledger.events("small")]
    return small.fingerprint(state), events


@pytest.mark.parametrize(("method", "engine"), PAIRS)
def test_the_same_plan_gives_the_same_bits_in_any_order_of_arrival(
    tmp_path: Path, method: str, engine: str
):
    first = finished(tmp_path / "0", method, engine, 0)
    assert finished(tmp_path / "again", method, engine, 0) == first
    assert finished(tmp_path / "shuffled", method, engine, 3) == first


@pytest.mark.parametrize("method", SUMS)
def test_masked_sums_give_the_bits_of_plain_ones(tmp_path: Path, method: str):
    plain = finished(tmp_path / "plain", method, "in_process", 0)
    masked = finished(tmp_path / "masked", method, "in_process", 3, "privacy.secure_sum=true")
    assert masked == plain


@pytest.mark.parametrize("method", ["fedkola", "fedit"])
def test_another_seed_gives_other_bits(tmp_path: Path, method: str):
    hashes = {
        small.fingerprint(
            small.run(
                small.assemble(tmp_path / f"{seed}", f"algorithm.name={method}", f"run.seed={seed}")
            )
        )
        for seed in (1, 2)
    }
    assert len(hashes) == 2
