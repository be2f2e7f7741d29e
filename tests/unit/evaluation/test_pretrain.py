"""The suite's table and verdict from cells, and its drawings."""

import xml.etree.ElementTree as ElementTree
from typing import Any

import pytest

from fedkola.evaluation import pretrain
from fedkola.evaluation.perplexity import curves as learning
from fedkola.evaluation.plots import curves


def cell(row: str, seed: int, perplexity: float, size: int) -> dict[str, Any]:
    return {
        "row": row,
        "seed": seed,
        "final": {"perplexity": perplexity, "worst": 2 * perplexity},
        "curve": [(100.0, 4 * perplexity), (200.0, perplexity)],
        "clipped": 0.001,
        "exceeded": 0.0,
        "rounds": 10,
        "bytes": size,
    }


BASE = [cell("synchronous", 1, 50.0, 100_000), cell("synchronous", 2, 40.0, 100_000)]


def test_ratios_are_paired_by_seed_and_bytes_counted() -> None:
    found = pretrain.summary([*BASE, cell("ours", 1, 51.0, 1000), cell("ours", 2, 42.0, 1000)])
    assert found["ours"]["ratio"]["mean"] == pytest.approx((51 / 50 + 42 / 40) / 2)
    assert found["ours"]["fewer"] == 100
    assert found["synchronous"]["ratio"]["mean"] == 1.0


@pytest.mark.parametrize(
    ("perplexity", "size", "verdict"),
    [(51.0, 1000, "met"), (51.1, 1000, "missed"), (51.0, 1001, "missed")],
)
def test_the_target_needs_both_the_perplexity_and_the_bytes(
    perplexity: float, size: int, verdict: str
) -> None:
    (target,) = pretrain.judge([BASE[0], cell("ours", 1, perplexity, size)])
    assert target["verdict"] == verdict


def test_a_cheap_row_that_is_worse_does_not_hide_a_good_one() -> None:
    cells = [BASE[0], cell("rare", 1, 90.0, 10), cell("ours", 1, 50.5, 1000)]
    (target,) = pretrain.judge(cells)
    assert target["verdict"] == "met"
    assert "ours" in target["value"]


def test_without_synchronous_training_nothing_is_claimed() -> None:
    (target,) = pretrain.judge([cell("ours", 1, 50.0, 10)])
    assert target["verdict"] == "not run"


def test_drawings_are_well_formed_and_name_their_rows() -> None:
    lines = curves.lines(
        {"all": [(1.0, 90.0), (2.0, 30.0)], "a & b": [(1.0, 80.0)]},
        title="t",
        across="x",
        up="y",
    )
    marks = curves.marks(
        [("ours", 5.0, 51.0, 50.0, 52.0, "own"), ("other", 500.0, 50.0, 50.0, 50.0, "other")],
        title="t",
        across="x",
        up="y",
        bound=(5.0, 51.0),
    )
    for drawing in (lines, marks):
        assert ElementTree.fromstring(str(drawing)).tag == "svg"
    assert "a &amp; b" in lines
    assert "target" in marks
    assert curves.lines({}, title="t", across="x", up="y") == ""


def test_curves_add_up_the_tokens_of_rounds() -> None:
    reports = [
        {"metrics": {"perplexity": 9.0, "perplexity/a": 8.0, "tokens": 10.0}},
        {"metrics": {"perplexity": 7.0, "perplexity/a": 6.0, "tokens": 5.0}},
    ]
    assert learning(reports) == {"all": [(10.0, 9.0), (15.0, 7.0)], "a": [(10.0, 8.0), (15.0, 6.0)]}
