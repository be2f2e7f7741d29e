"""What robust rules cost beside byzfl's, and whether both give the same numbers.

32 updates of 5,000,000 float32 numbers, 8 of them a crowd of liars; every measurement is a process
of its own on one core, ours and byzfl's one after the other. Memory is what the peak of the process
grows by during the first call, the result included; CPU time is the median of three calls. byzfl's
nearest-neighbour mixing holds n (n - f) d numbers, so both are given 1,000,000 columns there. Its
geometric median takes 3 steps where ours takes as many as it needs; the difference is that to
byzfl's after 16.
Writes ``benchmarks/results/rules.json`` and ``rules.md``. Run: ``python benchmarks/rules.py`` with
byzfl 0.0.11 installed (``pip install --no-deps byzfl==0.0.11``), some five minutes.

``python benchmarks/rules.py record`` writes what byzfl makes of three small problems to
``tests/golden/byzfl.npz``, which ``tests/golden/test_byzfl.py`` holds ours against.
"""

import importlib
import importlib.util
import json
import os
import resource
import statistics
import subprocess
import sys
import time
import types
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch

from fedkola.evaluation import machine
from fedkola.quality.rules import RULES, Options, combine

M, F, COLUMNS, FEWER = 32, 8, 5_000_000, 1_000_000
CALLS = 3
RADIUS = 1_500.0
RESULTS = Path(__file__).parent / "results"
RECORDED = Path(__file__).parents[1] / "tests" / "golden" / "byzfl.npz"
# byzfl counts one neighbour more than Krum's paper.
LIKE_BYZFL = Options(f=F, neighbours=M - F - 1, radius=RADIUS)
ROWS = {
    "krum": ("Krum", COLUMNS),
    "multi_krum": ("MultiKrum", COLUMNS),
    "geometric_median": ("GeometricMedian", COLUMNS),
    "centered_clipping": ("CenteredClipping", COLUMNS),
    "trimmed_mean": ("TrMean", COLUMNS),
    "median": ("Median", COLUMNS),
    "nnm": ("NNM", FEWER),
    "nnm_gm": ("", COLUMNS),
    "nnm_tm": ("", COLUMNS),
    "fltrust": ("", COLUMNS),
    "flame": ("", COLUMNS),
    "dnc": ("", COLUMNS),
    "mean": ("", COLUMNS),
}


def main() -> None:
    found = {}
    with TemporaryDirectory() as name:
        for rule, (theirs, columns) in ROWS.items():
            cell: dict[str, Any] = {"columns": columns, "ours": _apart("ours", rule, Path(name))}
            if theirs:
                cell["byzfl"] = _apart("byzfl", rule, Path(name))
                if rule == "geometric_median":
                    _apart("converged", rule, Path(name))
                cell["cpu ratio"] = cell["byzfl"]["cpu_s"] / cell["ours"]["cpu_s"]
                cell["memory ratio"] = cell["byzfl"]["extra_mb"] / cell["ours"]["extra_mb"]
                files = [np.load(Path(name) / f"{side}.npy") for side in ("ours", "byzfl")]
                cell["largest difference"] = float(np.abs(files[0] - files[1]).max())
            found[rule] = cell
            print(rule, json.dumps(cell), flush=True)
    result = {"machine": machine.describe(), "updates": M, "f": F, "rules": found}
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "rules.json").write_text(json.dumps(result, indent=1))
    (RESULTS / "rules.md").write_text(table(result))
    print(table(result))


def measure(side: str, rule: str, file: Path) -> dict[str, float]:
    """One rule in this process; the result goes to ``file``."""
    torch.set_num_threads(1)
    call = CALLEES[side](rule)
    x = updates(ROWS[rule][1])
    call(x[:, :64].copy())
    before = _peak()
    seconds, cpu_seconds = [], []
    for _ in range(1 if side == "converged" else CALLS):
        began, cpu_began = time.perf_counter(), time.process_time()
        out = call(x)
        seconds.append(time.perf_counter() - began)
        cpu_seconds.append(time.process_time() - cpu_began)
        if len(seconds) == 1:
            extra = _peak() - before
    np.save(file, out)
    return {
        "cpu_s": statistics.median(cpu_seconds),
        "wall_s": statistics.median(seconds),
        "extra_mb": extra / 1e6,
    }


def updates(columns: int) -> np.ndarray[Any, np.dtype[np.float32]]:
    """Honest updates with something in common, and liars that agree on something else."""
    rng = np.random.default_rng(0)
    x = np.empty((M, columns), dtype=np.float32)
    for i, row in enumerate(x):
        rng.standard_normal(out=row, dtype=np.float32)
        row += 0.3 if i % 4 else -0.6
    return x


def ours(rule: str) -> Callable[[Any], Any]:
    def call(x: Any) -> Any:
        rows = [{"x": torch.from_numpy(row)} for row in x]
        root = rows[1] if rule == "fltrust" else None
        found = combine(RULES[rule], rows, reference=root, options=LIKE_BYZFL)
        return found.tensors["x"].numpy()

    return call


def byzfl(rule: str, **settings: Any) -> Callable[[Any], Any]:
    """As torch tensors, its faster path; its median of an even number is right in numpy alone."""
    rules = _aggregators()
    if rule == "nnm":
        mix, mean = rules.NNM(F), rules.Average()
        return lambda x: mean(mix(torch.from_numpy(x))).numpy()
    given = {"centered_clipping": {"L": 3, "tau": RADIUS}, "median": {}, "geometric_median": {}}
    make = getattr(rules, ROWS[rule][0])
    arguments = {**given.get(rule, {"f": F}), **settings}
    if rule == "median":
        return lambda x: make()(x)
    return lambda x: make(**arguments)(torch.from_numpy(x)).numpy()


CALLEES: dict[str, Callable[[str], Callable[[Any], Any]]] = {
    "ours": ours,
    "byzfl": byzfl,
    "converged": lambda rule: byzfl(rule, T=16),
}


def record() -> None:
    """Rows "x/PROBLEM", (12, 256) float32, and what each of byzfl's rules makes of them, (256,)."""
    b = _aggregators()
    rules: dict[str, Callable[[Any], Any]] = {
        "krum": b.Krum(3),
        "multi_krum": b.MultiKrum(3),
        "trimmed_mean": b.TrMean(3),
        "median": b.Median(),
        "geometric_median": b.GeometricMedian(nu=1e-9, T=200),
        # byzfl's goes on from its last answer: a new one begins at zeros.
        "centered_clipping": lambda x: b.CenteredClipping(L=3, tau=15.0)(x),
        "nnm": lambda x: b.Average()(b.NNM(3)(x)),
        "nnm_tm": lambda x: b.TrMean(3)(b.NNM(3)(x)),
        "nnm, then the median": lambda x: b.Median()(b.NNM(3)(x)),
    }
    x = np.random.default_rng(5).standard_normal((12, 256), dtype=np.float32)
    crowd = x.copy()
    crowd[::4] -= 3
    files = {}
    for problem, rows in (("around 0", x), ("around 100", x + 100), ("three liars", crowd)):
        files[f"x/{problem}"] = rows
        for rule, call in rules.items():
            files[f"{rule}/{problem}"] = np.asarray(call(rows.copy()), dtype=np.float32)
    np.savez_compressed(RECORDED, **files)


def table(result: dict[str, Any]) -> str:
    where = result["machine"]
    lines = [
        "# Robust rules beside byzfl",
        "",
        f"{result['updates']} updates of float32 with f = {result['f']} liars, 640 MB at 5,000,000 "
        "columns; CPU in seconds, extra peak memory in MB, of which the result is 20.",
        "",
        "| rule | columns | CPU, ours | CPU, byzfl | times less | extra MB, ours | extra MB, byzfl "
        "| times less | largest difference |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for rule, cell in result["rules"].items():
        mine, theirs = cell["ours"], cell.get("byzfl")
        others = ("-", "-", "-", "-", "-")
        if theirs:
            others = (
                f"{theirs['cpu_s']:.2f}",
                f"{cell['cpu ratio']:.1f}",
                f"{theirs['extra_mb']:,.0f}",
                f"{cell['memory ratio']:.0f}",
                f"{cell['largest difference']:.1e}",
            )
        lines.append(
            f"| `{rule}` | {cell['columns']:,} | {mine['cpu_s']:.2f} | {others[0]} | {others[1]} | "
            f"{mine['extra_mb']:.0f} | {others[2]} | {others[3]} | {others[4]} |"
        )
    lines += [
        "",
        f"Measured on {where['cores']} cores ({where['processor']}), one used, torch "
        f"{where['torch']}, Python {where['python']}, load {where['load']:.1f}; byzfl 0.0.11, of "
        "which no rule was run where its columns are empty. Reproduce: `python "
        "benchmarks/rules.py`.",
        "",
    ]
    return "\n".join(lines)


def _apart(side: str, rule: str, folder: Path) -> dict[str, float]:
    file = folder / f"{'byzfl' if side == 'converged' else side}.npy"
    threads = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1")
    done = subprocess.run(
        [sys.executable, __file__, side, rule, str(file)],
        env={**os.environ, **threads},
        check=True,
        stdout=subprocess.PIPE,
        text=True,
    )
    found: dict[str, float] = json.loads(done.stdout)
    return found


def _aggregators() -> Any:
    """byzfl's rules alone: the package itself also imports data sets and a plotting library."""
    spec = importlib.util.find_spec("byzfl")
    if spec is None or spec.submodule_search_locations is None:
        raise SystemExit("byzfl is not installed: pip install --no-deps byzfl==0.0.11")
    package = types.ModuleType("byzfl")
    package.__path__ = list(spec.submodule_search_locations)
    sys.modules["byzfl"] = package
    return importlib.import_module("byzfl.aggregators")


def _peak() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


if __name__ == "__main__":
    if sys.argv[1:] == ["record"]:
        record()
    elif sys.argv[1:]:
        print(json.dumps(measure(sys.argv[1], sys.argv[2], Path(sys.argv[3]))))
    else:
        main()
