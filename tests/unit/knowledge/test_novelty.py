"""A window is compared with what is known by sums alone: hand-computed values and edges."""

import pytest
import torch

from fedkola.errors import KnowledgeError
from fedkola.knowledge import novelty, statistics
from fedkola.knowledge.novelty import Distance, Reference, Thresholds
from fedkola.knowledge.router import Part

# Two modules in the plane, means (0, 0) of 100 and (1, 0) of 50 records, variance 1/4 each way.
KNOWN = Reference(
    modules=("near@1", "far@1"),
    counts=torch.tensor([100.0, 50.0], dtype=torch.float64),
    means=torch.tensor([[0.0, 0.0], [1.0, 0.0]], dtype=torch.float64),
    precision=4.0 * torch.eye(2, dtype=torch.float64),
    effective=2.0,
)


def window(*places: tuple[float, float]) -> torch.Tensor:
    return torch.round(torch.tensor(places, dtype=torch.float64) * 1024).to(torch.int16)


def learnt(excess: float, windows: int, *, records: int, kappa: float = 2.0) -> Thresholds:
    s = novelty.size(records)
    sums = torch.zeros(novelty.SIZES, dtype=torch.float64)
    number = torch.zeros(novelty.SIZES, dtype=torch.int64)
    sums[s], number[s] = excess, windows
    return Thresholds(excess=sums, windows=number, kappa=kappa)


def test_the_distance_and_what_sampling_gives_are_as_computed_by_hand():
    near, far = novelty.distances(KNOWN, window((0.5, 0.0), (0.0, 0.5), (0.25, 0.25), (0.25, 0.25)))
    assert near.observed == pytest.approx(4 * (0.25**2 + 0.25**2))
    assert near.sampling == pytest.approx(2 * (1 / 4 + 1 / 100))
    assert far.observed == pytest.approx(4 * (0.75**2 + 0.25**2))
    assert far.sampling == pytest.approx(2 * (1 / 4 + 1 / 50))


def test_the_nearest_module_has_the_least_excess_not_the_least_distance():
    small = Distance(module="small@1", records=32, observed=3.0, sampling=2.5)
    large = Distance(module="large@1", records=32, observed=2.0, sampling=0.5)
    assert novelty.nearest([large, small]).module == "small@1"


@pytest.mark.parametrize(
    ("records", "size"),
    [(1, 0), (3, 0), (4, 1), (15, 1), (16, 2), (63, 2), (64, 3), (384, 4), (1536, 5), (10**9, 9)],
)
def test_sizes_are_powers_of_four(records, size):
    assert novelty.size(records) == size


def test_b_is_the_mean_excess_of_windows_of_this_size():
    assert novelty.between(learnt(12.0, 8, records=400), 500) == 1.5


def test_a_size_with_fewer_than_eight_windows_takes_b_from_all_sizes():
    few = learnt(7.0, 7, records=400)
    assert novelty.between(few, 500) == novelty.between(few, 20) == 1.0


def test_without_accepted_windows_sampling_alone_decides():
    assert novelty.between(Thresholds(), 100) == 0.0
    inside, outside = (
        Distance(module="m@1", records=100, observed=observed, sampling=0.5)
        for observed in (0.99, 1.01)
    )
    assert novelty.fits(Thresholds(), inside)
    assert not novelty.fits(Thresholds(), outside)


def test_windows_that_vary_less_than_samples_do_not_tighten_the_test_below_sampling():
    assert novelty.between(learnt(-9.0, 9, records=100), 100) == 0.0


def test_an_accepted_window_is_compared_with_its_module_without_it():
    z = window(*[(0.5, 0.0)] * 20)
    found = novelty.accepted(KNOWN, "near@1", z)
    # The other 80 records have the mean (-0.125, 0).
    assert found is not None
    assert found.observed == pytest.approx(4 * 0.625**2)
    assert found.sampling == pytest.approx(2 * (1 / 20 + 1 / 80))


def test_a_module_of_one_window_has_nothing_to_compare_it_with():
    assert novelty.accepted(KNOWN, "far@1", window(*[(1.0, 0.0)] * 50)) is None


def test_a_tally_holds_excess_number_and_ratio_by_size():
    windows = [
        Distance(module="m@1", records=400, observed=3.0, sampling=1.0),
        Distance(module="m@1", records=300, observed=1.1, sampling=1.0),
        Distance(module="m@1", records=20, observed=99.0, sampling=1.0),
    ]
    words = novelty.tally(windows, Thresholds())
    assert words[novelty.EXCESS].tolist()[:5] == pytest.approx([0, 0, 98.0, 0, 2.1])
    assert words[novelty.WINDOWS].tolist()[:5] == [0, 0, 1, 0, 2]
    # T/(E + b) of 3.0, 1.1 and far beyond the histogram, in bins a quarter wide.
    filled = torch.nonzero(words[novelty.HISTOGRAM]).flatten().tolist()
    assert filled == [4, 12, 31]


def test_sums_of_tallies_are_the_thresholds_of_all_windows():
    first = [Distance(module="m@1", records=70, observed=2.0, sampling=1.0)] * 5
    second = [Distance(module="m@1", records=90, observed=4.0, sampling=1.0)] * 5
    both = [novelty.tally(part, Thresholds()) for part in (first, second)]
    found = novelty.learn({name: both[0][name] + both[1][name] for name in both[0]})
    assert novelty.between(found, 64) == 2.0
    assert found.kappa == novelty.KAPPA  # ten windows are too few for a quantile


def test_kappa_is_the_edge_that_99_of_100_windows_stay_below():
    ratio = torch.zeros(novelty.BINS, dtype=torch.int64)
    ratio[3], ratio[9], ratio[20] = 90, 9, 1
    assert novelty.quantile(ratio) == 2.5
    ratio[20] = 2
    assert novelty.quantile(ratio) == 5.25
    assert novelty.quantile(ratio // 3) == 2.0


@pytest.mark.parametrize(
    ("windows", "records", "observed", "new"),
    [
        (8, 384, 2.1, True),
        (8, 383, 9.0, False),  # too small: it waits
        (7, 384, 3.9, False),  # b is uncertain, and this is less than twice the limit of 2
        (7, 384, 4.1, True),
        (2, 384, 99.0, False),  # nothing to judge by
    ],
)
def test_small_windows_and_a_young_bank_are_careful_with_novelty(windows, records, observed, new):
    window = Distance(module="m@1", records=records, observed=observed, sampling=1.0)
    assert novelty.discoverable(learnt(0.0, windows, records=20), window, floor=384) is new


def test_two_novelties_fall_into_two_buckets_and_equal_ones_into_one():
    left, right = window(*[(0.0, 1.0)] * 4), window(*[(0.1, -1.0)] * 4)
    for seed in range(4):
        assert novelty.sketch(KNOWN, left, seed=seed) == novelty.sketch(KNOWN, left, seed=seed)
    codes = {novelty.sketch(KNOWN, left, seed=seed) for seed in range(8)}
    assert len(codes) > 1  # the hyperplanes are drawn anew
    assert all(0 <= code < novelty.BUCKETS for code in codes)
    assert any(
        novelty.sketch(KNOWN, left, seed=s) != novelty.sketch(KNOWN, right, seed=s)
        for s in range(8)
    )


def test_the_reference_is_that_of_the_records_of_router_cells():
    z = window((0.1, 0.2), (0.3, 0.1), (0.8, 0.5), (0.7, 0.9))
    parts = [
        Part(
            module=module,
            labels=("a",),
            words=statistics.router(z[rows], torch.zeros(2, dtype=torch.int64), num_rows=1),
            weight=1.0,
        )
        for module, rows in (("m@1", [0, 1]), ("n@1", [2, 3]))
    ]
    known = novelty.reference(parts, width=2)
    e = z.to(torch.float64) / 1024
    within = (e[:2] - e[:2].mean(0)).T @ (e[:2] - e[:2].mean(0))
    within = (within + (e[2:] - e[2:].mean(0)).T @ (e[2:] - e[2:].mean(0))) / 4
    ridged = within + 1e-2 * within.diagonal().mean() * torch.eye(2, dtype=torch.float64)
    assert known.modules == ("m@1", "n@1")
    assert torch.allclose(known.means[1], e[2:].mean(0))
    assert torch.allclose(known.precision @ ridged, torch.eye(2, dtype=torch.float64))
    assert known.effective == pytest.approx(float((torch.linalg.inv(ridged) @ within).trace()))


def test_without_router_cells_there_is_no_reference():
    with pytest.raises(KnowledgeError, match="lane router"):
        novelty.reference([], width=2)


def test_the_binomial_tail_is_as_computed_by_hand():
    assert novelty.at_most(1, 3, 0.5) == pytest.approx(0.5)
    assert novelty.at_most(0, 2, 0.9) == pytest.approx(0.01)
    assert novelty.at_most(3, 3, 0.7) == pytest.approx(1.0)
    assert novelty.at_most(2, 3, 1.0) == 0.0
    assert novelty.at_most(0, 3, 0.0) == 1.0
    assert novelty.at_most(3000, 10000, 0.5) == pytest.approx(0.0, abs=1e-100)


@pytest.mark.parametrize(
    ("right", "asked", "usual", "conflict"),
    [
        (6, 30, 0.8, True),
        (6, 29, 0.8, False),  # fewer than 30 records
        (12, 30, 0.8, False),  # half of the usual share is not less than half
        (0, 30, 0.49, False),  # nothing to contradict: the view is seldom right here
        (7, 30, 0.5, False),  # less than half of it, and not improbable enough
        (3, 30, 0.5, True),
    ],
)
def test_a_conflict_needs_records_a_usual_share_and_improbability(right, asked, usual, conflict):
    assert novelty.contradicts(right, asked, usual) is conflict


def test_a_label_is_doubtful_when_most_of_its_records_at_enough_holders_disagree():
    wrong = torch.tensor([9, 8, 20, 15, 0])
    asked = torch.tensor([16, 16, 30, 15, 0])
    holders = torch.tensor([3, 3, 2, 3, 0])
    # In turn: flagged; half is not more than half; two holders; fifteen records; nobody asked.
    found = novelty.doubtful(wrong, asked, holders, k_min=3)
    assert found.tolist() == [True, False, False, False, False]
