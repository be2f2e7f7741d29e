"""The window test keeps its rate of false alarms, and sees what is really elsewhere."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fedkola.knowledge import novelty, statistics
from fedkola.knowledge.novelty import Thresholds
from fedkola.knowledge.router import Part

WIDTH, MODULE = 12, 2000


def draw(
    num: int, centre: torch.Tensor, spread: torch.Tensor, generator: torch.Generator
) -> torch.Tensor:
    e = centre + torch.randn(num, WIDTH, generator=generator) @ spread
    return torch.round(e * 1024).to(torch.int16)


def world(seed: int) -> tuple[novelty.Reference, torch.Tensor, torch.Tensor, torch.Generator]:
    """One correlated Gaussian module, known by a router cell of 2,000 records."""
    generator = torch.Generator().manual_seed(seed)
    spread = 0.05 * torch.randn(WIDTH, WIDTH, generator=generator)
    centre = 0.2 * torch.randn(WIDTH, generator=generator)
    z = draw(MODULE, centre, spread, generator)
    words = statistics.router(z, torch.zeros(MODULE, dtype=torch.int64), num_rows=1)
    part = Part(module="m@1", labels=("a",), words=words, weight=1.0)
    return novelty.reference([part], width=WIDTH), centre, spread, generator


@given(seed=st.integers(0, 2**31), records=st.sampled_from([8, 32, 128]))
@settings(max_examples=12, deadline=None)
def test_gaussian_windows_have_the_distance_that_sampling_gives(seed, records):
    known, centre, spread, generator = world(seed)
    found = [
        novelty.distances(known, draw(records, centre, spread, generator))[0] for _ in range(300)
    ]
    ratio = sum(window.observed for window in found) / sum(window.sampling for window in found)
    # T has a relative deviation of about sqrt(2 / d_eff) = 0.4, hence 0.03 for a mean of 300; the
    # module's own mean is shared by all windows.
    assert 0.75 < ratio < 1.35


@given(seed=st.integers(0, 2**31))
@settings(max_examples=8, deadline=None)
def test_with_kappa_learnt_one_gaussian_window_in_a_hundred_is_a_false_alarm(seed):
    known, centre, spread, generator = world(seed)

    def windows(num: int) -> list[novelty.Distance]:
        return [
            novelty.distances(known, draw(32, centre, spread, generator))[0] for _ in range(num)
        ]

    learnt = Thresholds()
    for _ in range(2):  # b first, then the quantile of T/(E + b)
        learnt = novelty.learn(novelty.tally(windows(400), learnt))
    alarms = sum(not novelty.fits(learnt, window) for window in windows(500))
    assert alarms <= 20  # nominal 5


@given(seed=st.integers(0, 2**31), num_sites=st.integers(1, 5))
@settings(max_examples=20, deadline=None)
def test_thresholds_do_not_depend_on_which_site_held_a_window(seed, num_sites):
    known, centre, spread, generator = world(seed)
    windows = [
        novelty.distances(known, draw(10 + 7 * i, centre, spread, generator))[0] for i in range(20)
    ]
    whole = novelty.tally(windows, Thresholds())
    parts = [novelty.tally(windows[k::num_sites], Thresholds()) for k in range(num_sites)]
    for name in (novelty.WINDOWS, novelty.HISTOGRAM):
        assert torch.equal(
            whole[name], sum((p[name] for p in parts), torch.zeros_like(whole[name]))
        )
    excess = sum(
        (p[novelty.EXCESS] for p in parts), torch.zeros(novelty.SIZES, dtype=torch.float64)
    )
    assert torch.allclose(excess, whole[novelty.EXCESS])


@given(seed=st.integers(0, 2**31))
@settings(max_examples=20, deadline=None)
def test_an_accepted_window_is_judged_as_if_it_had_never_joined(seed):
    known, centre, spread, generator = world(seed)
    z = draw(50, centre, spread, generator)
    joined = novelty.Reference(
        modules=known.modules,
        counts=known.counts + 50,
        means=(known.means * known.counts + z.to(torch.float64).sum(0) / 1024)
        / (known.counts + 50),
        precision=known.precision,
        effective=known.effective,
    )
    before, after = novelty.distances(known, z)[0], novelty.accepted(joined, "m@1", z)
    assert after is not None
    assert abs(after.observed - before.observed) < 1e-8 * (1 + before.observed)
    assert abs(after.sampling - before.sampling) < 1e-12


@given(st.integers(1, 400), st.floats(0.01, 0.99), st.data())
@settings(max_examples=60, deadline=None)
def test_the_binomial_tail_is_a_distribution(asked, share, data):
    right = data.draw(st.integers(0, asked))
    p = novelty.at_most(right, asked, share)
    assert 0.0 <= p <= 1.0
    if right < asked:
        assert p <= novelty.at_most(right + 1, asked, share) + 1e-12
    assert abs(novelty.at_most(asked, asked, share) - 1.0) < 1e-9
