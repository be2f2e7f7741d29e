"""Robust rules on the numbers that byzfl 0.0.11 gave: ``python benchmarks/rules.py record``."""

from pathlib import Path

import numpy as np
import pytest
import torch

from fedkola.quality.rules import RULES, Options, combine, mixed

RECORDED = np.load(Path(__file__).parent / "byzfl.npz")
PROBLEMS = ("around 0", "around 100", "three liars")
# byzfl counts one neighbour more than Krum's paper.
OURS = {
    "krum": (RULES["krum"], Options(f=3, neighbours=8)),
    "multi_krum": (RULES["multi_krum"], Options(f=3, neighbours=8)),
    "trimmed_mean": (RULES["trimmed_mean"], Options(f=3)),
    "median": (RULES["median"], Options()),
    "geometric_median": (RULES["geometric_median"], Options()),
    "centered_clipping": (RULES["centered_clipping"], Options(radius=15.0)),
    "nnm": (RULES["nnm"], Options(f=3)),
    "nnm_tm": (RULES["nnm_tm"], Options(f=3)),
    "nnm, then the median": (mixed(RULES["median"]), Options(f=3)),
}


@pytest.mark.parametrize("problem", PROBLEMS)
@pytest.mark.parametrize("name", OURS)
def test_a_rule_gives_the_numbers_of_byzfl(name: str, problem: str):
    rule, options = OURS[name]
    rows = [{"x": torch.from_numpy(row)} for row in RECORDED[f"x/{problem}"]]
    found = combine(rule, rows, options=options).tensors["x"].numpy()
    assert np.abs(found - RECORDED[f"{name}/{problem}"]).max() <= 1e-4


def test_every_recorded_result_is_compared():
    pairs = {f"{name}/{problem}" for name in ("x", *OURS) for problem in PROBLEMS}
    assert pairs == set(RECORDED.files)
