"""The suite of attacks: its verdict from cells, and rows that are real runs."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from fedkola.audit.dager import Dager
from fedkola.audit.trial import Recovery
from fedkola.errors import UnknownName
from fedkola.evaluation import leakage
from fedkola.evaluation.leakage_table import DP, GATE, MASKED, OFF, judge, table
from fedkola.plan import Plan


def metric(value: float, low: float, high: float, null: float = 0.0) -> dict[str, float]:
    return {"value": value, "low": low, "high": high, "null": null}


def attack(
    name: str,
    target: str,
    who: str = "server",
    *,
    word: str = "at_null",
    good: bool = True,
    **of: Any,
) -> dict[str, Any]:
    return {
        "name": name,
        "target": target,
        "observer": who,
        "verdict": word,
        "updates": 24,
        "metrics": of,
        "positive_control": {"metric": "exact", "value": float(good), "floor": 0.9, "passed": good},
    }


def cell(row: str, *attacks: dict[str, Any], **more: Any) -> dict[str, Any]:
    views = [{"observer": who, "readable": 0, "frames": 9} for who in ("tls", "server", "model")]
    return {
        "row": row,
        "seed": 1,
        "attacks": list(attacks),
        "views": views,
        "refused": "gate_span",
        "audit_seconds": 9.0,
        "before": 90.0,
        "after": 30.0,
        **more,
    }


def lines(*cells: dict[str, Any]) -> dict[str, str]:
    return {line["name"]: line["verdict"] for line in judge(cells)}


def line(start: str, *cells: dict[str, Any]) -> str:
    (found,) = [word for name, word in lines(*cells).items() if name.startswith(start)]
    return found


READ = attack("dager", "single", "wire", word="recovered", exact=metric(0.96, 0.79, 1.0))

HALF = {**READ, "metrics": {"exact": metric(0.5, 0.3, 0.7)}}
NULL = attack("dager", "single")


@pytest.mark.parametrize(
    ("start", "cells", "verdict"),
    [
        ("sequences read from single", [cell(OFF, READ)], "met"),
        ("sequences read from single", [cell(OFF, HALF)], "missed"),
        ("attacks on single", [cell(MASKED, NULL)], "met"),
        ("attacks on single", [cell(MASKED, {**NULL, "verdict": "above_null"})], "missed"),
        ("attacks on single", [cell(MASKED, {**NULL, "verdict": "broken"})], "missed"),
        ("the gate", [cell(OFF)], "met"),
        ("the gate", [cell(OFF), cell(MASKED, refused="")], "missed"),
        ("attacks that succeed", [cell(OFF, READ)], "met"),
        ("attacks that succeed", [cell(OFF, attack("dager", "single", good=False))], "missed"),
        ("longest audit", [cell(OFF, audit_seconds=301.0)], "missed"),
    ],
)  # fmt: skip
def test_a_line_of_the_verdict_follows_from_the_cells(
    start: str, cells: list[dict[str, Any]], verdict: str
) -> None:
    assert line(start, *cells) == verdict


def secret(bits: float) -> dict[str, Any]:
    found = metric(bits, bits - 1, bits + 1, 2.8)
    return attack("canary", "model", "model", exposure_unit_64=found, exposure_64=found)


@pytest.mark.parametrize(
    ("with_noise", "without", "verdict"),
    [(1.5, 12.0, "met"), (5.0, 12.0, "missed"), (1.5, 2.0, "not run")],
)
def test_a_secret_must_be_learnt_without_noise_before_its_absence_says_anything(
    with_noise: float, without: float, verdict: str
) -> None:
    cells = [cell(DP, secret(with_noise)), cell(GATE, secret(without))]
    assert line("bits of a secret", *cells) == verdict


def test_what_was_not_run_is_said_and_not_counted_as_met() -> None:
    assert set(lines().values()) == {"not run"}
    result = {
        "profile": "quick",
        "rows": {OFF: "nothing held back"},
        "cells": [cell(OFF, READ)],
        "targets": judge([]),
        "machine": {"cores": 2, "processor": "x", "torch": "2", "python": "3"},
    }
    text = table(result)
    assert "0.960 [0.790, 1.000]" not in text  # of the wire, which stands with the server
    assert "| off | wire, server |" in text
    assert "0 of 11 targets met." in text


def test_a_profile_or_row_that_is_not_there_is_named(tmp_path: Path) -> None:
    def quiet(*_: object) -> None: ...

    with pytest.raises(UnknownName, match="quick, standard"):
        leakage.run(profile="huge", out=tmp_path, note=quiet, progress=quiet)
    with pytest.raises(UnknownName, match="off, masked, gate on"):
        leakage.run(profile="quick", out=tmp_path, note=quiet, progress=quiet, chosen=("none",))


@pytest.fixture
def tiny(tmp_path: Path) -> leakage.Bench:
    """The row ``off`` at its smallest: two rounds, twelve records a site."""
    size = replace(leakage.SIZES["quick"], warm=3, records=40, once=2, updates=4, texts=60)
    cells = leakage.Cells(folder=tmp_path / "cells", note=lambda text: None)
    bench = leakage.Bench(
        size=size, cells=cells, progress=lambda report: None, attacks=("dager", "sizes")
    )
    bench.models.mkdir(parents=True)
    return bench


def test_a_row_is_a_run_and_a_broken_attack_is_told_by_its_control(
    tiny: leakage.Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    good = tiny.cell(OFF, 1)
    (found,) = [
        one
        for one in good["attacks"]
        if (one["name"], one["target"], one["observer"]) == ("dager", "single", "wire")
    ]
    assert (found["verdict"], found["positive_control"]["passed"]) == ("recovered", True)
    assert "examples" not in found
    assert line("what a network under TLS", good) == "met"

    def blind(self: Dager, *_: object, **__: object) -> Recovery:
        """An attack with a fault in it: it never finds anything."""
        return Recovery(sequences=())

    monkeypatch.setattr(Dager, "recover", blind)
    bad = tiny.cell(OFF, 2)
    words = {one["verdict"] for one in bad["attacks"] if one["name"] == "dager"}
    assert words == {"broken"}
    assert not bad["passed"]
    assert line("attacks that succeed", bad) == "missed"


@pytest.mark.parametrize("row", [OFF, MASKED, GATE, DP])
def test_every_row_has_a_plan_of_its_own(tiny: leakage.Bench, row: str) -> None:
    plan: Plan = tiny.plan(row, 3)
    assert plan.privacy.secure_sum == (row != OFF)
    assert (plan.privacy.epsilon == 3.0) == (row == DP)
    assert (plan.site.waive == ()) == (row in (GATE, DP))
    assert (plan.site.embedding == "refuse") == (row == DP)
