"""Rounds of DiLoCo worked by hand: what is averaged, stepped, rounded, carried over and sent."""

from pathlib import Path

import pytest
import torch
from small_clients import TableClient, Watched, dataset, joined
from torch import Tensor

from fedkola.algorithms import common_grid as grids
from fedkola.algorithms.diloco import SETTINGS, SHARED, DiLoCo, State, fragment
from fedkola.training import pretraining
from fedkola.types import Catalogue, Clients, Cohort, Label, Weights

CATALOGUE = Catalogue(
    system="golden", levels=("code",), labels=(Label(code="a", path=("a",), scope="s"),)
)
SIZES = {"A": 1, "B": 2, "C": 5}
COHORT = tuple(SIZES)
START = {
    "emb": torch.tensor([[1.0, -1.0], [0.5, 0.25]]),
    "h.0.w": torch.tensor([2.0, 4.0, -8.0]),
    "h.1.w": torch.tensor([[0.5]]),
}
PLAN = DiLoCo(
    rounds=4,
    inner_steps=8,
    growth=1.0,
    batch=2,
    length=16,
    lr=0.25,
    warmup=2,
    floor=0.1,
    weight_decay=0.0,
    bound=0.0,
    bits=12,
    fragments=1,
    feedback=False,
    weight="equal",
    share=100,
    precision="float32",
    seed=1,
)


def plan(**changes: object) -> DiLoCo:
    return DiLoCo(**{**vars(PLAN), **changes})  # type: ignore[arg-type]


def moved(site: str, weights: Weights) -> dict[str, Tensor]:
    """Every coordinate down by 1/4, 1/2 or 3/4: multiples of every grid used here."""
    step = {"A": 0.25, "B": 0.5, "C": 0.75}[site]
    return {name: value - step for name, value in weights.items()}


def sites(folder: Path, trained: object = moved) -> list[TableClient]:
    return [
        TableClient(
            name=name,
            data=dataset(name, [("t", "a")] * num),
            catalogue=CATALOGUE,
            store=folder / name,
            trained=lambda client, weights: trained(client.name, weights),  # type: ignore[operator]
        )
        for name, num in SIZES.items()
    ]


def same(left: Weights, right: Weights) -> bool:
    return set(left) == set(right) and all(torch.equal(left[n], right[n]) for n in left)


def shifted(weights: Weights, by: float) -> dict[str, Tensor]:
    return {name: value + by for name, value in weights.items()}


def test_the_model_moves_by_the_mean_of_the_changes(tmp_path: Path) -> None:
    state = PLAN.round(1, State(weights=START), COHORT, joined(sites(tmp_path)))
    assert same(state.weights, shifted(START, -0.5))
    assert state.holders == COHORT
    assert set(state.clipped.values()) == {0.0}


def test_weights_by_tokens_count_a_site_by_its_share(tmp_path: Path) -> None:
    state = plan(weight="tokens").round(1, State(weights=START), COHORT, joined(sites(tmp_path)))
    mean = (409 * 0.25 + 819 * 0.5 + 2047 * 0.75) / (409 + 819 + 2047)
    for name, value in shifted(START, -mean).items():
        assert torch.allclose(state.weights[name], value, atol=2 * 2.0 ** -state.scale[name])


def test_nesterov_runs_ahead_with_its_momentum(tmp_path: Path) -> None:
    method = plan(outer="nesterov", eta=0.5, mu=0.5)
    clients = joined(sites(tmp_path))
    first = method.round(1, State(weights=START), COHORT, clients)
    # m = 0.5, step = 0.5 + 0.5 * 0.5
    assert same(first.weights, shifted(START, -0.5 * 0.75))
    second = method.round(2, first, COHORT, clients)
    # m = 0.5 * 0.5 + 0.5, step = 0.5 + 0.5 * 0.75
    assert same(second.weights, shifted(START, -0.5 * 0.75 - 0.5 * 0.875))


def test_momentum_rises_over_the_first_rounds(tmp_path: Path) -> None:
    """Of four rounds the first two are risen over: mu is 1/4 in round 1, then 1/2."""
    method = plan(outer="nesterov", eta=1.0, mu=0.5, ramp=0.5)
    assert [method.risen(number) for number in range(1, 5)] == [0.25, 0.5, 0.5, 0.5]
    clients = joined(sites(tmp_path))
    first = method.round(1, State(weights=START), COHORT, clients)
    # m = 0.5, step = 0.5 + 0.25 * 0.5
    assert same(first.weights, shifted(START, -0.625))
    second = method.round(2, first, COHORT, clients)
    # m = 0.5 * 0.5 + 0.5, step = 0.5 + 0.5 * 0.75
    assert same(second.weights, shifted(START, -0.625 - 0.875))


def test_primal_averaging_keeps_fast_weights_and_hands_out_their_average(tmp_path: Path) -> None:
    method = plan(outer="primal", eta=2.0, mu=0.5)
    clients = joined(sites(tmp_path))
    first = method.round(1, State(weights=START), COHORT, clients)
    assert same(first.momentum, shifted(START, -1.0))
    assert same(first.weights, shifted(START, -0.5))
    second = method.round(2, first, COHORT, clients)
    assert same(second.momentum, shifted(START, -2.0))
    assert same(second.weights, shifted(START, -1.25))


def test_tuning_takes_the_setting_that_held_out_loss_prefers(tmp_path: Path) -> None:
    members = sites(tmp_path)
    for member in members:
        # The further down the better.
        member.judged = lambda client, data, weights: float(weights["emb"].sum())
    method, watched = plan(outer="tune"), Watched(inner=joined(members))
    state = State(weights=START)
    for number in range(1, 5):
        state = method.round(number, state, COHORT, watched)
    assert state.setting == 0
    assert same(state.weights, shifted(START, -2.0))
    after = method.round(5, state, COHORT, watched)
    assert [step for _, step, _ in watched.asked] == ["train"] * 5 + ["judge"]
    m = [0.0] * len(SETTINGS)
    for _ in range(5):
        m = [mu * old + 0.5 for old, (_, mu) in zip(m, SETTINGS, strict=True)]
    steps = [eta * (0.5 + mu * one) for one, (eta, mu) in zip(m, SETTINGS, strict=True)]
    assert after.setting == steps.index(max(steps))
    best = shifted(state.weights, -max(steps))
    assert all(torch.allclose(after.weights[n], best[n], atol=1e-6) for n in best)


def test_a_site_that_fails_is_left_out_of_the_mean(tmp_path: Path) -> None:
    members = sites(tmp_path)

    def broken(message: bytes) -> bytes:
        raise OSError("disk full")

    members[2].answer = broken  # type: ignore[method-assign]
    state = PLAN.round(1, State(weights=START), COHORT, joined(members))
    assert same(state.weights, shifted(START, -0.375))
    assert state.holders == ("A", "B")


@pytest.mark.parametrize(("bits", "size"), [(24, 4.0), (12, 2.0), (5, 1.0), (2, 0.5)])
def test_few_bits_make_small_answers_and_feedback_loses_nothing(
    tmp_path: Path, bits: int, size: float
) -> None:
    """Sites that always move by the same amount: with feedback the sum of what the server heard
    stays within one step of the grid of what they moved."""
    wide = {"w": torch.zeros(4000)}

    def steady(site: str, weights: Weights) -> dict[str, Tensor]:
        generator = torch.Generator().manual_seed(ord(site))
        return {"w": weights["w"] - torch.randn(4000, generator=generator) * 0.01}

    method = plan(bits=bits, feedback=True, lr=0.001, rounds=12)
    names = tuple("ABCDEF")
    members = [
        TableClient(
            name=name,
            data=dataset(name, [("t", "a")]),
            catalogue=CATALOGUE,
            store=tmp_path / name,
            trained=lambda client, weights: steady(client.name, weights),
        )
        for name in names
    ]
    clients = joined(members)
    state = State(weights=wide)
    for number in range(1, 13):
        state = method.round(number, state, names, clients)
    tally = clients.tally()
    assert tally.bytes_up / 12 / 6 == pytest.approx(4000 * size, rel=0.6, abs=2200)
    truth = sum(steady(name, wide)["w"] for name in names) / 6 * 12
    step = 2.0 ** -state.scale["w"]
    assert float((state.weights["w"] - truth).abs().mean()) < 0.6 * step


def test_the_bound_shortens_a_delta_and_keeps_its_direction(tmp_path: Path) -> None:
    norm = {"A": 0.25, "B": 0.5, "C": 0.75}
    count = sum(value.numel() for value in START.values())
    bound = 0.25 * count**0.5
    state = plan(bound=bound).round(1, State(weights=START), COHORT, joined(sites(tmp_path)))
    assert norm["A"] == 0.25  # A is within the bound, B and C are cut to it
    for name, value in shifted(START, -0.25).items():
        assert torch.allclose(state.weights[name], value, atol=0.005)


def test_a_growing_schedule_exchanges_often_at_first() -> None:
    method = plan(growth=2.0, rounds=4, inner_steps=16)
    courses = [method.course(number) for number in range(1, 5)]
    assert [(c.start, c.steps) for c in courses] == [(0, 4), (4, 12), (16, 20), (36, 28)]
    assert all(c.total == 64 for c in courses)
    steep = plan(growth=4.0, rounds=8, inner_steps=4)
    assert all(steep.course(number).steps >= 1 for number in range(1, 9))
    assert sum(steep.course(number).steps for number in range(1, 9)) == 32


def run(
    folder: Path, method: DiLoCo, cohorts: list[Cohort], start: Weights = START
) -> tuple[State, Clients, list[int]]:
    clients, state, down = joined(sites(folder)), State(weights=start), []
    for number, cohort in enumerate(cohorts, start=1):
        state = method.round(number, state, cohort, clients)
        tally = clients.tally()
        assert not tally.refused
        down.append(tally.bytes_down // len(cohort))
    return state, clients, down


def test_fragments_in_turn_reach_what_the_whole_reaches(tmp_path: Path) -> None:
    """A fragment is exchanged every second round with what two rounds moved it by."""
    method = plan(fragments=2, rounds=8)
    state, _, _ = run(tmp_path, method, [COHORT] * 4)
    assert [fragment(name, 2) for name in START] == [0, 0, 1]
    # Round 1 carries fragment 1 with one round's steps, round 3 with two more; 0 in 2 and 4.
    assert same(
        state.weights,
        {name: value - (2.0 if fragment(name, 2) == 0 else 1.5) for name, value in START.items()},
    )


def test_a_site_that_returns_is_sent_the_whole_model(tmp_path: Path) -> None:
    method = plan(fragments=2, rounds=8)
    some = ("A", "B")
    state, _, _ = run(tmp_path, method, [COHORT, some, COHORT, COHORT])
    assert state.holders == COHORT


def test_changes_are_sent_in_a_byte_and_what_they_lose_is_carried_over(tmp_path: Path) -> None:
    big = {"w": torch.linspace(-3, 3, 20_000)}
    exact, _, full = run(tmp_path / "a", plan(rounds=9), [COHORT] * 6, big)
    near, _, small = run(tmp_path / "b", plan(rounds=9, down="change"), [COHORT] * 6, big)
    half, _, narrow = run(tmp_path / "c", plan(rounds=9, down="float16"), [COHORT] * 6, big)
    assert narrow[1] == pytest.approx(full[1] / 2, rel=0.1)
    assert small[1] == pytest.approx(full[1] / 4, rel=0.15)
    assert float((near.weights["w"] - exact.weights["w"]).abs().max()) < 0.01
    assert float((half.weights["w"] - exact.weights["w"]).abs().max()) < 0.02
    # What sites hold stays within one step of what the server has.
    _, held, _ = plan(rounds=9, down="change").question(7, near, COHORT)
    assert 0 < float((held["w"] - near.weights["w"]).abs().max()) < 0.01


def test_half_a_byte_a_coordinate_comes_as_near_in_the_end(tmp_path: Path) -> None:
    """The model stops moving after round 5; what sites hold goes on to come nearer."""

    def still(site: str, weights: Weights) -> dict[str, Tensor]:
        return dict(weights) if rounds > 5 else moved(site, weights)

    start = {"w": torch.linspace(-3, 3, 20_001).reshape(3, 6667)}
    method, state = plan(rounds=20, down="change4"), State(weights=start)
    clients, down, far = joined(sites(tmp_path, still)), [0], []
    for rounds in range(1, 21):
        state = method.round(rounds, state, COHORT, clients)
        down.append(clients.tally().bytes_down // 3)
        far.append(float((state.held["w"] - state.weights["w"]).abs().max()))
    assert not clients.tally().refused
    # Two bytes a coordinate in the first round, half a byte in each that follows.
    assert down[1] == pytest.approx(2 * 20_001, rel=0.1)
    assert down[-1] == pytest.approx(20_001 / 2, rel=0.1)
    assert max(far[1:]) > 0.01
    assert far[-1] < 0.01


def test_every_tensor_has_a_grid_of_its_own_both_ways(tmp_path: Path) -> None:
    """Twenty tensors of very different sizes, whose order a message does not keep."""
    sizes = {f"t{number}": 2.0 ** (number - 17) for number in range(20)}

    def scaled(site: str, weights: Weights) -> dict[str, Tensor]:
        step = {"A": 0.25, "B": 0.5, "C": 0.75}[site]
        return {name: value - step * sizes[name] for name, value in weights.items()}

    method = plan(rounds=9, down="change")
    clients = joined(sites(tmp_path, scaled))
    state = State(weights={name: torch.zeros(50) for name in sizes})
    for number in range(1, 7):
        state = method.round(number, state, COHORT, clients)
    assert not clients.tally().refused
    step = {name: 2.0**-exponent for name, exponent in state.scale.items()}
    for name, size in sizes.items():
        # The grid of small tensors is still coming down from the first one, by two bits a round.
        assert torch.allclose(
            state.weights[name], torch.tensor(-3.0 * size), atol=0.05 * size + 0.04, rtol=0.02
        ), (name, size, step[name])
    _, held, _ = method.question(7, state, COHORT)
    for name in sizes:
        near = float((held[name] - state.weights[name]).abs().max())
        assert near <= 0.01 * float(state.weights[name].abs().max()) + 1e-6


def test_a_change_is_only_sent_to_sites_that_hold_what_it_changes(tmp_path: Path) -> None:
    method = plan(rounds=9, down="change")
    big = {"w": torch.linspace(-3, 3, 20_000)}
    _, _, down = run(tmp_path, method, [COHORT, COHORT, ("A", "B"), COHORT, COHORT], big)
    assert [size > 30_000 for size in down] == [True, False, False, True, False]


def test_the_same_round_again_gives_the_same_bits(tmp_path: Path) -> None:
    """A round computed twice, as after a crash before its answer was kept."""
    method = plan(fragments=2, feedback=True, bits=5, down="change", outer="nesterov", mu=0.5)
    members = sites(tmp_path)
    state = method.round(1, State(weights=START), COHORT, joined(members))
    once = method.round(2, state, COHORT, joined(members))
    twice = method.round(2, state, COHORT, joined(members))
    assert same(once.weights, twice.weights)
    assert same(once.held, twice.held)
    third = method.round(3, once, COHORT, joined(members))
    again = method.round(3, twice, COHORT, joined(members))
    assert same(third.weights, again.weights)


def test_a_site_away_for_long_warms_up_again(tmp_path: Path) -> None:
    members = sites(tmp_path)
    clients, state = joined(members), State(weights=START)
    cohorts = {1: COHORT, 2: COHORT, 3: ("B", "C"), 8: COHORT}
    for number in range(1, 10):
        state = PLAN.round(number, state, cohorts.get(number, ("B", "C")), clients)
    a, b = members[0].courses, members[1].courses
    assert [course.rewarm for course in a] == [0, 0, 2]
    assert [course.rewarm for course in b] == [0] * 9


def test_the_range_marks_what_it_cuts_off(tmp_path: Path) -> None:
    state = plan(lr=1e-4).round(1, State(weights=START), COHORT, joined(sites(tmp_path)))
    assert state.exceeded
    assert set(state.clipped.values()) == {1.0}
    later = state
    for number in range(2, 9):
        later = plan(lr=1e-4).round(number, later, COHORT, joined(sites(tmp_path)))
    assert not later.exceeded
    assert all(grids.levels(12) * 2.0**-e >= 0.75 for e in later.scale.values())


def test_shared_second_moments_are_means_over_sites_in_rows_and_columns(tmp_path: Path) -> None:
    method = plan(second="shared", beta2=0.5)
    clients = joined(sites(tmp_path))
    for name, level in (("A", 1.0), ("B", 2.0), ("C", 6.0)):
        # One step at beta2 = 0.5 leaves half of the squared gradient.
        own = {n: torch.full_like(v, level / 2) for n, v in START.items()}
        kept = {"second/" + n: v for n, v in own.items()} | {"count": torch.tensor(1.0)}
        pretraining.remember(tmp_path / name, 0, kept)
    after = method.round(1, State(weights=START), COHORT, clients)
    # emb is 2 x 2 and h.1.w 1 x 1: 2 + 2 and 1 + 1 numbers, each (1 + 2 + 6) / 3.
    assert after.second[SHARED].tolist() == pytest.approx([3.0] * 6)
    # In the next round every site trains on from the level of all; its vectors stay its own.
    method.round(2, after, COHORT, clients)
    for name, level in (("A", 1.0), ("B", 2.0), ("C", 6.0)):
        kept, _ = pretraining.remembered(tmp_path / name, before=3)
        assert kept["second/emb"].flatten().tolist() == pytest.approx([1.5] * 4)
        assert kept["second/h.0.w"].tolist() == [level / 2] * 3
