"""A cell is measured once, and again only when something that it was measured under has changed."""

from pathlib import Path
from typing import Any

from fedkola.evaluation.cells import Cells

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
