"""A cell is measured once, and again only when something that it was measured under has changed."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from fedkola.errors import DataError
from fedkola.evaluation import dynamic
from fedkola.evaluation.cells import Cells, streamed, top1, uploaded
from fedkola.evaluation.setups import SETUPS
from fedkola.plan import as_dict

ABOUT = {"task": {"sites": 3}, "seed": 1}
DEFAULT = {"task": {"sites": 12, "quiet": False}, "seed": 0}


def measured(folder: Path, about: dict[str, Any]) -> list[str]:
    """The names that had to be measured for this cell."""
    noted: list[str] = []
    cells = Cells(folder=folder, note=noted.append)
    found = cells.measure("one", about, lambda work: {"top1": 0.5}, default=DEFAULT)
    assert found["top1"] == 0.5
    assert not (folder / "work" / "one").exists()
    return noted


def test_a_cell_is_measured_once(tmp_path: Path):
    assert measured(tmp_path, ABOUT) == ["one"]
    assert measured(tmp_path, ABOUT) == []


def test_a_changed_setting_is_measured_anew(tmp_path: Path):
    measured(tmp_path, ABOUT)
    assert measured(tmp_path, {**ABOUT, "seed": 2}) == ["one"]
    assert measured(tmp_path, {"task": {"sites": 4}, "seed": 2}) == ["one"]


def test_a_setting_that_came_later_is_no_difference_at_its_default(tmp_path: Path):
    measured(tmp_path, ABOUT)
    assert measured(tmp_path, {"task": {"sites": 3, "quiet": False}, "seed": 1}) == []
    assert measured(tmp_path, {"task": {"sites": 3, "quiet": True}, "seed": 1}) == ["one"]
    # A setting that is gone meant something then.
    assert measured(tmp_path, ABOUT) == ["one"]


def test_a_table_of_what_is_measured_runs_nothing(tmp_path: Path):
    setup = SETUPS["static-iid"]
    about = dynamic.plan(setup, setup.sizes["standard"], "fedkola", 1, 0.0)
    cells = Cells(folder=tmp_path / "cells" / "dynamic-static-iid-standard", note=print)
    end = {"top1": 0.5, "top5": 0.75, "asked": 4, "nodes": 2}
    figures = {"row": "fedkola", "seed": 1, "bytes_up_per_site_window": 1e6, "untouched": end}
    cells.measure("fedkola-1", as_dict(about), lambda folder: figures)

    def table(*rows: str) -> Mapping[str, Any]:
        return dynamic.run(
            stream="static-iid",
            profile="standard",
            out=tmp_path,
            note=lambda line: pytest.fail(line),
            progress=lambda report: None,
            rows=rows,
            measured=True,
        )

    found = table("fedkola", "fedex_lora")
    assert found["rows"] == ["fedkola"]
    assert found["summary"]["fedkola"]["top1"]["mean"] == 0.5
    with pytest.raises(DataError, match="run the same without --measured"):
        table("fedex_lora")


def test_records_that_are_asked_once_are_judged_as_they_arrive():
    arrived = {"share": 0.75, "asked": 8, "right": 6}
    end = {"asked": 0, "top1": 0.0}
    assert top1({"untouched": end, "as_it_arrives": arrived}) == 0.75
    assert top1({"untouched": {"asked": 4, "top1": 0.5}, "as_it_arrives": arrived}) == 0.5


def test_rounds_after_the_last_window_count_for_its_bytes_and_not_for_the_time_it_streams():
    cell = {
        "bytes_up_per_site_window": 3e6,
        "rounds": 6,
        "moments": ["w1", "w2", "w3"],
        "R": [[0.5, None], [0.5, 0.7], [0.6, 0.8], [0.9, 0.9]],
    }

    assert uploaded(cell) == 6e6
    assert streamed(cell) == pytest.approx((0.5 + 0.6 + 0.7) / 3)
    # Without names of windows every round is one.
    del cell["moments"]
    assert uploaded(cell) == 3e6
    assert streamed(cell) == pytest.approx((0.5 + 0.6 + 0.7 + 0.9) / 4)
