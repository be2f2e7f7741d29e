"""Robust rules on a case worked out by hand, and what they refuse."""

import pytest
import torch

from fedkola.errors import CohortTooSmall, NotFinite, PlanError, WireError
from fedkola.quality.rules import RULES, UNITS, Options, combine, mixed
from fedkola.types import Weights

# Four groups around (1, 1, 1) and one far away. Squared distances between the first four, rows
# times rows: 0 1 1 2 / 1 0 2 1 / 1 2 0 1 / 2 1 1 0; to the last 3 * 99^2 and near it.
ROWS = [
    {"x": torch.tensor(row)}
    for row in ([1.0, 1.0, 1.0], [2.0, 1.0, 1.0], [1.0, 2.0, 1.0], [2.0, 2.0, 1.0], [99.0] * 3)
]
THREE = [{"x": torch.tensor([value])} for value in (0.0, 1.0, 5.0)]


def value(name: str, rows: list[Weights], **options: float) -> list[float]:
    reference = options.pop("reference", None)
    found = combine(RULES[name], rows, reference=reference, options=Options(**options))
    return pytest.approx(found.tensors["x"].tolist(), abs=1e-4)


def test_the_mean_is_exact_and_as_heavy_as_its_records():
    found = combine(RULES["mean"], THREE, counts=[1, 10**12, 1])
    assert found.units == (1, 10**12, 1)
    assert found.of == 10**12 + 2
    assert found.tensors["x"].item() == pytest.approx(1.0)


def test_krum_takes_the_row_with_the_nearest_neighbours_and_the_first_of_equals():
    # m - f - 2 = 2 neighbours: 2 for each of the first four.
    assert combine(RULES["krum"], ROWS, options=Options(f=1)).units == (1, 0, 0, 0, 0)


def test_krum_counts_as_many_neighbours_as_it_is_told():
    rows = [{"x": torch.tensor([v])} for v in (0.0, 0.9, 2.0, 3.0, 4.0)]
    # One neighbour: 0 and 0.9 tie at 0.81. Three: 0 has 13.81, 0.9 has 6.43, 2 has 6.21.
    assert value("krum", rows, f=1, neighbours=1) == [0.0]
    assert value("krum", rows, f=1, neighbours=3) == [2.0]


def test_multi_krum_averages_all_but_the_f_worst():
    assert value("multi_krum", ROWS, f=1) == [1.5, 1.5, 1.0]


def test_nearest_neighbour_mixing_leaves_the_far_row_one_part_in_four_of_one_row():
    # Each of the four averages the four; the last averages itself and its nearest three.
    far = [(2 + 1 + 2 + 99) / 4, (2 + 2 + 1 + 99) / 4, (1 + 1 + 1 + 99) / 4]
    assert combine(RULES["nnm"], ROWS, options=Options(f=1)).tensors["x"].tolist() == pytest.approx(
        [(4 * 1.5 + far[0]) / 5, (4 * 1.5 + far[1]) / 5, (4 * 1.0 + far[2]) / 5], abs=1e-4
    )
    assert value("nnm_tm", ROWS, f=1) == [1.5, 1.5, 1.0]
    assert value("nnm_gm", ROWS, f=1) == [1.5, 1.5, 1.0]


def test_any_rule_can_follow_nearest_neighbour_mixing():
    found = combine(mixed(RULES["median"]), ROWS, options=Options(f=1))
    assert found.tensors["x"].tolist() == [1.5, 1.5, 1.0]
    found = combine(mixed(RULES["multi_krum"]), ROWS, options=Options(f=1))
    assert found.units == (UNITS // 4,) * 4 + (0,)


def test_the_geometric_median_on_a_line_is_the_median():
    assert value("geometric_median", THREE) == [1.0]


def test_the_geometric_median_of_equal_rows_is_that_row():
    assert value("geometric_median", [ROWS[1]] * 4) == [2.0, 1.0, 1.0]


def test_centred_clipping_moves_by_the_radius_towards_a_far_row():
    # From 0: 0, 1 and 5 pull by 0, 1 and 2 (the radius): one step ends at 1.
    assert value("centered_clipping", THREE, radius=2.0, steps=1) == [1.0]
    # From 1: -1, 0 and 2, thirds of them: 4/3.
    assert value("centered_clipping", THREE, radius=2.0, steps=2) == [4 / 3]
    start = {"x": torch.tensor([10.0])}
    assert value("centered_clipping", THREE, radius=2.0, steps=1, reference=start) == [8.0]


def test_the_reference_of_centred_clipping_has_the_last_coefficient():
    found = combine(
        RULES["centered_clipping"],
        THREE,
        reference={"x": torch.tensor([10.0])},
        options=Options(radius=2.0, steps=1),
    )
    assert len(found.units) == 4
    assert sum(found.units) == UNITS
    assert found.units[3] == pytest.approx(UNITS * (1 - (2 / 10 + 2 / 9 + 2 / 5) / 3), abs=1)


def test_the_trimmed_mean_and_the_median_by_hand():
    assert value("trimmed_mean", ROWS, f=1) == [5 / 3, 5 / 3, 1.0]
    assert value("trimmed_mean", ROWS) == [105 / 5, 105 / 5, 103 / 5]
    assert value("median", ROWS) == [2.0, 2.0, 1.0]
    assert value("median", ROWS[:4]) == [1.5, 1.5, 1.0]


def test_rules_by_column_weigh_rows_by_their_records():
    heavy = combine(RULES["median"], THREE, counts=[1, 1, 3])
    assert heavy.tensors["x"].item() == 5.0
    halves = combine(RULES["median"], THREE, counts=[1, 1, 2])
    assert halves.tensors["x"].item() == 3.0
    four = [*THREE, {"x": torch.tensor([9.0])}]
    found = combine(RULES["trimmed_mean"], four, counts=[7, 1, 3, 9], options=Options(f=1))
    assert found.tensors["x"].item() == 4.0


def test_fltrust_trusts_directions_of_the_root_and_takes_its_norm():
    root = {"x": torch.tensor([2.0, 0.0])}
    rows = [{"x": torch.tensor(v)} for v in ([10.0, 0.0], [0.0, 5.0], [-3.0, 0.0], [3.0, 3.0])]
    # Cosines 1, 0, -1 and 0.7071; norms become 2.
    half = 0.5**0.5
    x = (1 * 2.0 + half * 2.0 * half) / (1 + half)
    y = half * 2.0 * half / (1 + half)
    found = combine(RULES["fltrust"], rows, reference=root)
    assert found.tensors["x"].tolist() == pytest.approx([x, y], abs=1e-4)
    nothing = combine(RULES["fltrust"], rows[1:3], reference=root)
    assert nothing.tensors["x"].tolist() == [0.0, 0.0]


def test_flame_keeps_the_majority_of_directions_and_clips_at_the_median_norm():
    rows = [{"x": torch.tensor(v)} for v in ([1.0, 0.0], [4.0, 0.0], [0.0, 9.0], [2.0, 0.0])]
    # The median norm of 1, 2, 4 and 9 is 3; the third row points elsewhere.
    assert value("flame", rows) == [(1 + 3 + 2) / 3, 0.0]


def test_noise_of_flame_is_that_of_its_seed_and_in_proportion_to_the_clipping_norm():
    rows = [{"x": torch.full((4_000,), 1.0)} for _ in range(3)]
    plain, once, again, other = (
        combine(RULES["flame"], rows, options=Options(noise=noise, seed=seed)).tensors["x"]
        for noise, seed in ((0.0, 1), (0.01, 1), (0.01, 1), (0.01, 2))
    )
    assert torch.equal(once, again)
    assert not torch.equal(once, other)
    assert (once - plain).std().item() == pytest.approx(0.01 * 4_000**0.5, rel=0.1)


def test_dnc_drops_the_row_farthest_along_the_first_direction():
    assert combine(RULES["dnc"], ROWS, options=Options(f=1, share=1.0)).units[-1] == 0
    assert value("dnc", ROWS, f=1, share=1.0) == [1.5, 1.5, 1.0]


def test_other_seeds_of_dnc_draw_other_columns():
    generator = torch.Generator().manual_seed(0)
    rows = [{"x": torch.randn(400, generator=generator)} for _ in range(9)]
    found = {combine(RULES["dnc"], rows, options=Options(f=3, seed=s)).units for s in range(6)}
    assert len(found) > 1


def test_coefficients_are_counted_in_units_that_sum_to_one():
    for name in ("geometric_median", "nnm_gm", "nnm"):
        found = combine(RULES[name], ROWS, options=Options(f=1))
        assert sum(found.units) == found.of == UNITS


def test_an_average_of_some_rows_is_exact_in_their_records():
    found = combine(RULES["multi_krum"], ROWS, counts=[3, 1, 1, 5, 7], options=Options(f=1))
    assert (found.units, found.of) == ((3, 1, 1, 5, 0), 10)


def test_a_row_that_is_not_finite_or_empty_is_dropped_and_named():
    nan = {"x": torch.tensor([1.0, float("nan"), 1.0])}
    inf = {"x": torch.tensor([float("inf"), 1.0, 1.0])}
    found = combine(RULES["multi_krum"], [nan, *ROWS, inf, ROWS[0]], counts=[1] * 7 + [0])
    assert found.dropped == {0: "NotFinite", 6: "NotFinite", 7: "NoWeight"}
    alone = combine(RULES["multi_krum"], ROWS)
    assert torch.equal(found.tensors["x"], alone.tensors["x"])
    assert found.units == (0, *alone.units, 0, 0)


def test_tensors_keep_their_names_shapes_and_types():
    rows = [{"b": torch.ones(2, 3), "a": torch.full((), i, dtype=torch.int64)} for i in range(3)]
    for name in ("mean", "median"):
        found = combine(RULES[name], rows).tensors
        assert found["b"].shape == (2, 3)
        assert found["b"].dtype == torch.float32
        assert found["a"].item() == 1.0
        assert found["a"].dtype == torch.float64


@pytest.mark.parametrize("name", ["krum", "trimmed_mean", "nnm", "dnc", "median", "mean"])
def test_too_few_rows_for_f_are_refused(name: str):
    with pytest.raises(CohortTooSmall, match="lower f"):
        combine(RULES[name], ROWS[:3], options=Options(f=2))
    with pytest.raises(CohortTooSmall):
        combine(RULES[name], [])


@pytest.mark.parametrize(
    ("name", "more", "error", "message"),
    [
        ("fltrust", {}, PlanError, "trusted root"),
        ("centered_clipping", {}, PlanError, "radius above 0"),
        ("mean", {"counts": [1, 2]}, PlanError, "one of at least 0"),
        ("mean", {"counts": [1, 2, -3]}, PlanError, "one of at least 0"),
        ("fltrust", {"reference": {"x": torch.tensor([torch.nan])}}, NotFinite, "finite one"),
        ("fltrust", {"reference": {"y": torch.tensor([1.0])}}, WireError, "names or shapes"),
    ],
)
def test_what_a_rule_cannot_use_is_refused(name, more, error, message):
    with pytest.raises(error, match=message):
        combine(RULES[name], THREE, **more)


def test_rows_that_differ_in_shape_are_refused():
    with pytest.raises(WireError, match="names or shapes"):
        combine(RULES["mean"], [ROWS[0], THREE[0]])


@pytest.mark.parametrize("options", [{"f": -1}, {"radius": -1.0}, {"noise": float("nan")}])
def test_options_that_cannot_be_are_refused(options: dict[str, float]):
    with pytest.raises(PlanError, match="was given"):
        Options(**options)
