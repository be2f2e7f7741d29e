"""Robust rules against the formulas of their papers, written plainly over whole arrays."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from scipy.cluster import hierarchy
from scipy.spatial import distance

from fedkola.quality import gram
from fedkola.quality.rules import RULES, UNITS, Options, combine
from fedkola.types import Weights

Matrix = np.ndarray[Any, np.dtype[np.float64]]
RADIUS = 0.7
REFERENCED = {"centered_clipping", "fltrust"}


# --- the oracles: rows x (m, d) in, the aggregate (d,) out ----------------------------------------


def krum_scores(x: Matrix, f: int) -> Matrix:
    d2 = distance.cdist(x, x, "sqeuclidean")
    others = [np.sort(np.delete(row, i)) for i, row in enumerate(d2)]
    return np.array([row[: len(x) - f - 2].sum() for row in others])


def krum(x: Matrix, f: int, start: Matrix) -> Matrix:
    return x[krum_scores(x, f).argmin()]


def multi_krum(x: Matrix, f: int, start: Matrix) -> Matrix:
    return x[np.argsort(krum_scores(x, f), kind="stable")[: len(x) - f]].mean(axis=0)


def nearest(x: Matrix, f: int) -> Matrix:
    return np.stack(
        [
            x[np.linalg.norm(x - row, axis=1).argsort(kind="stable")[: len(x) - f]].mean(0)
            for row in x
        ]
    )


def geometric_median(x: Matrix, f: int, start: Matrix) -> Matrix:
    z = x.mean(axis=0)
    for _ in range(64):
        w = 1 / np.maximum(np.linalg.norm(x - z, axis=1), 1e-9)
        z = (w[:, None] * x).sum(axis=0) / w.sum()
    return z


def centered_clipping(x: Matrix, f: int, start: Matrix) -> Matrix:
    v = start
    for _ in range(3):
        radii = np.linalg.norm(x - v, axis=1, keepdims=True)
        v = v + ((x - v) * np.minimum(1, RADIUS / np.maximum(radii, 1e-300))).mean(axis=0)
    return v


def trimmed_mean(x: Matrix, f: int, start: Matrix) -> Matrix:
    return np.sort(x, axis=0)[f : len(x) - f].mean(axis=0)


def fltrust(x: Matrix, f: int, start: Matrix) -> Matrix:
    root = np.linalg.norm(start)
    trust = [max(0.0, row @ start / (np.linalg.norm(row) * root)) for row in x]
    if not sum(trust):
        return np.zeros_like(start)
    scaled = [t * row * root / np.linalg.norm(row) for t, row in zip(trust, x, strict=True)]
    return np.sum(scaled, axis=0) / sum(trust)


def flame(x: Matrix, f: int, start: Matrix) -> Matrix:
    tree = hierarchy.linkage(x, method="average", metric="cosine")
    clusters = {i: [i] for i in range(len(x))}
    for step, (left, right, _, _) in enumerate(tree):
        together = clusters[int(left)] + clusters[int(right)]
        clusters[len(x) + step] = together
        if len(together) > len(x) / 2:
            break
    norms = np.linalg.norm(x, axis=1, keepdims=True)
    return (x * np.minimum(1, np.median(norms) / norms))[together].mean(axis=0)


def dnc(x: Matrix, f: int, start: Matrix) -> Matrix:
    """With all columns in the one sample."""
    centred = x - x.mean(axis=0)
    direction = np.linalg.svd(centred, full_matrices=False)[2][0]
    return x[np.argsort((centred @ direction) ** 2, kind="stable")[: len(x) - f]].mean(axis=0)


ORACLES: dict[str, Callable[[Matrix, int, Matrix], Matrix]] = {
    "mean": lambda x, f, start: x.mean(axis=0),
    "krum": krum,
    "multi_krum": multi_krum,
    "nnm": lambda x, f, start: nearest(x, f).mean(axis=0),
    "nnm_gm": lambda x, f, start: geometric_median(nearest(x, f), f, start),
    "nnm_tm": lambda x, f, start: trimmed_mean(nearest(x, f), f, start),
    "geometric_median": geometric_median,
    "centered_clipping": centered_clipping,
    "trimmed_mean": trimmed_mean,
    "median": lambda x, f, start: np.median(x, axis=0),
    "fltrust": fltrust,
    "flame": flame,
    "dnc": dnc,
}


def test_every_rule_has_an_oracle():
    assert set(ORACLES) == set(RULES)


# --- equality -------------------------------------------------------------------------------------


def rows_of(x: Matrix) -> list[Weights]:
    return [{"x": torch.from_numpy(row.copy())} for row in x]


def ours(name: str, x: Matrix, f: int, start: Matrix, counts: tuple[int, ...] = ()) -> Matrix:
    found = combine(
        RULES[name],
        rows_of(x),
        counts=counts,
        reference={"x": torch.from_numpy(start)} if name in REFERENCED else None,
        options=Options(f=f, radius=RADIUS, samples=1, share=1.0),
    )
    return found.tensors["x"].numpy()


@st.composite
def problems(draw: st.DrawFn) -> tuple[Matrix, int, Matrix]:
    """Rows of all scales and offsets around a reference; ties do not arise by chance."""
    m, d = draw(st.integers(5, 12)), draw(st.integers(2, 40))
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    x = draw(st.sampled_from([0.0, 0.3, 10.0])) + rng.standard_normal((m, d))
    x[: draw(st.integers(0, (m - 3) // 2))] *= draw(st.sampled_from([-3.0, 0.1, 50.0]))
    return x, draw(st.integers(0, (m - 3) // 2)), rng.standard_normal(d)


@pytest.mark.parametrize("name", sorted(RULES))
@given(problem=problems())
@settings(max_examples=40, deadline=None)
def test_a_rule_equals_its_formula_up_to_the_units_of_its_coefficients(name, problem):
    x, f, start = problem
    expected = ORACLES[name](x, f, start)
    # Each of up to 13 coefficients is off by a unit at most.
    slack = 13 * np.abs(x).max() / UNITS
    assert np.abs(ours(name, x, f, start) - expected).max() <= (
        1e-9 if RULES[name].by_column else slack
    )


@pytest.mark.parametrize("name", sorted(set(RULES) - {"trimmed_mean", "median", "nnm_tm", "mean"}))
@given(problem=problems())
@settings(max_examples=25, deadline=None)
def test_coefficients_before_they_are_rounded_give_the_formula_within_one_in_a_million(
    name, problem
):
    x, f, start = problem
    rule = RULES[name]
    after = {"reference": {"x": torch.from_numpy(start)}, "origin": None}
    options = Options(f=f, radius=RADIUS)
    d2, finite = gram.distances([*rows_of(x), *(after[extra] for extra in rule.extra)])
    shares = np.full(len(x), 1 / len(x))
    assert finite.all()
    if rule.mixed:
        x = nearest(x, f)
        d2 = distance.cdist(x, x, "sqeuclidean")[None]
    found = rule.of(d2 if rule.sampled else d2[0], shares, options)
    after_mixing = {"nnm": "mean", "nnm_gm": "geometric_median"}
    expected = ORACLES[after_mixing.get(name, name)](x, f, start)
    got = found @ np.vstack([x, start])[: len(found)]
    assert np.abs(got - expected).max() <= 1e-6 * max(1.0, np.abs(x).max())


@pytest.mark.parametrize("name", sorted(RULES))
@given(problem=problems(), chance=st.randoms(use_true_random=False))
@settings(max_examples=25, deadline=None)
def test_the_order_of_the_rows_does_not_matter(name, problem, chance):
    x, f, start = problem
    order = list(range(len(x)))
    chance.shuffle(order)
    slack = 1e-9 if RULES[name].by_column else 13 * np.abs(x).max() / UNITS
    assert np.abs(ours(name, x, f, start) - ours(name, x[order], f, start)).max() <= slack


@pytest.mark.parametrize("name", sorted(RULES))
@given(problem=problems(), place=st.integers(0, 5), bad=st.sampled_from([np.nan, np.inf, -np.inf]))
@settings(max_examples=25, deadline=None)
def test_a_row_with_one_number_that_is_none_changes_nothing(name, problem, place, bad):
    x, f, start = problem
    spoilt = np.insert(x, place, x[0], axis=0)
    spoilt[place, len(start) // 2] = bad
    assert np.array_equal(ours(name, spoilt, f, start), ours(name, x, f, start))


@pytest.mark.parametrize("name", sorted(RULES))
@given(problem=problems())
@settings(max_examples=15, deadline=None)
def test_rows_are_read_and_never_written(name, problem):
    x, f, start = problem
    rows, before = rows_of(x), x.copy()
    root = torch.from_numpy(start.copy())
    combine(
        RULES[name],
        rows,
        reference={"x": root} if name in REFERENCED else None,
        options=Options(f=f, radius=RADIUS),
    )
    assert np.array_equal(np.stack([row["x"].numpy() for row in rows]), before)
    assert np.array_equal(root.numpy(), start)


@pytest.mark.parametrize(
    "name", ["mean", "geometric_median", "centered_clipping", "median", "fltrust"]
)
@given(problem=problems(), chance=st.randoms(use_true_random=False))
@settings(max_examples=25, deadline=None)
def test_a_row_of_weight_three_counts_as_three_rows(name, problem, chance):
    x, _, start = problem
    counts = tuple(chance.choice([1, 2, 3]) for _ in x)
    apart = np.repeat(x, counts, axis=0)
    slack = 1e-9 if RULES[name].by_column else 40 * np.abs(x).max() / UNITS
    weighted, repeated = ours(name, x, 0, start, counts), ours(name, apart, 0, start)
    assert np.abs(weighted - repeated).max() <= slack


@pytest.mark.parametrize("name", sorted(RULES))
def test_chunks_do_not_show(name, monkeypatch):
    rng = np.random.default_rng(3)
    x, start = rng.standard_normal((9, 1_000)) + 5, rng.standard_normal(1_000)
    whole = ours(name, x, 3, start)
    monkeypatch.setattr(gram, "NUMBERS", 9 * 64)
    assert np.allclose(ours(name, x, 3, start), whole, atol=1e-12)


# --- what f outliers can do -----------------------------------------------------------------------


@pytest.mark.parametrize(
    "name",
    ["krum", "multi_krum", "nnm_gm", "nnm_tm", "geometric_median", "trimmed_mean", "median", "dnc"],
)
@given(
    honest=st.integers(7, 12),
    liars=st.integers(1, 3),
    far=st.sampled_from([1e2, 1e4, 1e8, 1e15, 1e30]),
    together=st.booleans(),
    seed=st.integers(0, 2**32),
)
@settings(max_examples=40, deadline=None)
def test_f_outliers_cannot_carry_a_rule_away_from_the_honest_rows(
    name, honest, liars, far, together, seed
):
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((honest, 20))
    lies = rng.standard_normal((liars, 20)) * far
    # The first principal direction shows one crowd of liars, not several.
    if together or name == "dnc":
        lies[:] = lies[0]
    found = ours(name, np.vstack([lies, x]), liars, np.zeros(20))
    spread = np.linalg.norm(x - x.mean(axis=0), axis=1).max()
    # All honest rows lie within the spread; of these rules the geometric median has the largest
    # constant, 2 (1 - b) / (1 - 2 b) for a share b of liars (Pillutla et al., lemma 2).
    b = liars / (honest + liars)
    assert np.linalg.norm(found - x.mean(axis=0)) <= 2 * (1 - b) / (1 - 2 * b) * spread + 1e-3


@given(far=st.floats(1e2, 1e30), seed=st.integers(0, 2**32))
@settings(max_examples=30, deadline=None)
def test_one_outlier_moves_centred_clipping_by_its_share_of_the_radius_a_step(far, seed):
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((8, 20)) * 0.01
    lie = rng.standard_normal((1, 20)) * far
    found = ours("centered_clipping", np.vstack([lie, x]), 1, np.zeros(20))
    assert np.linalg.norm(found) <= 3 * RADIUS / 9 + 0.2


def test_the_mean_is_carried_away_by_one_outlier():
    x = np.random.default_rng(0).standard_normal((8, 20))
    found = ours("mean", np.vstack([np.full((1, 20), 1e4), x]), 1, np.zeros(20))
    assert np.linalg.norm(found - x.mean(axis=0)) > 1e3


def test_drawn_problems_hold_outliers_and_offsets():
    """The problems above are worth their names."""
    seen = set()

    @given(problem=problems())
    @settings(max_examples=60, deadline=None, derandomize=True)
    def look(problem):
        x, f, _ = problem
        assume(len(x) > 2)
        seen.add((f > 0, bool(np.abs(x).max() > 20)))

    look()
    assert {(True, True), (True, False), (False, False)} <= seen
