"""One FedKoLa round worked by hand: vote, fill, publish, remove; and the next one.

R = [[-1, -1, 1], [-1, 1, 1]] is the sign matrix of seed 2, phi = min(floor(max(R'z, 0) / 256), 15):

    t1 = (300, 500)       u = (-800, 200, 800)     phi = (0, 0, 3)
    t2 = (-600, 700)      u = (-100, 1300, 100)    phi = (0, 5, 0)
    t3 = (-1000, -300)    u = (1300, 700, -1300)   phi = (5, 2, 0)

    site A: a t1, b t2        site B: a t1, c t2        site C: a t3, b t2
"""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from small_clients import TableClient, Watched, dataset, joined

from fedkola.algorithms.fedkola import TEMPERATURES, FedKoLa, State
from fedkola.knowledge import basis, forget, statistics
from fedkola.knowledge.bank import Cell
from fedkola.knowledge.forget import Request
from fedkola.knowledge.views import Rule, ridge
from fedkola.types import Catalogue, Label

TABLE = {"t1": (300, 500), "t2": (-600, 700), "t3": (-1000, -300)}
ROWS = {
    "A": [("t1", "a"), ("t2", "b")],
    "B": [("t1", "a"), ("t2", "c")],
    "C": [("t3", "a"), ("t2", "b")],
}
COHORT = ("A", "B", "C")
LABELS = tuple(
    Label(code=code, path=(code, scope), scope=scope)
    for code, scope in (("a", "s"), ("b", "s"), ("c", "t"))
)
CATALOGUE = Catalogue(system="golden", levels=("code", "scope"), labels=LABELS)
TARGETS = {"q": (3, 4)}


def algorithm(**changes: object) -> FedKoLa:
    whole = FedKoLa(
        lanes="analytic,router",
        width=2,
        features=3,
        bits=4,
        feature_seed=2,
        rank=1,
        scale=2.0,
        basis_seed=0,
        merge="gram",
        lora_records=0,
        lora_steps=1,
        batch=1,
        lr=0.1,
        clip=16.0,
        fraction=2,
        level=0,
        k_min=2,
        label_floor=1,
        public_reference=True,
        slots_max=2,
        rule=Rule(readout="pooled"),
        catalogue=CATALOGUE,
        targets=TARGETS,
    )
    return replace(whole, **changes)


def sites(folder: Path) -> list[TableClient]:
    return [
        TableClient(
            name=name,
            data=dataset(name, rows),
            catalogue=CATALOGUE,
            store=folder / name,
            table=TABLE,
            targets=TARGETS,
        )
        for name, rows in ROWS.items()
    ]


def lists(cell: Cell, names: Sequence[str]) -> list[object]:
    return [cell.total.words[name].tolist() for name in names]


ROW_SUMS = ("sums", "counts", "weight", "metric/contributors")
GRAM = ("gram", "weight", "metric/contributors")


def test_the_sign_matrix_is_the_one_this_page_was_worked_with():
    assert statistics.signs(2, 3, 2).tolist() == [[-1, -1, 1], [-1, 1, 1]]


def test_the_vote_counts_holders_and_records_by_scope_and_label(tmp_path: Path):
    clients = joined(sites(tmp_path))
    asked = algorithm()._ask_vote(1, State(), COHORT)
    votes = clients.sum(COHORT, asked)
    assert votes.words["holders"].tolist() == [3, 1]
    assert votes.words["records"].tolist() == [5, 1]
    assert votes.words["label_holders"].tolist() == [3, 2, 1]
    assert votes.words["label_records"].tolist() == [3, 2, 1]
    assert votes.words["weight"].item() == 6


def test_a_round_fills_what_two_sites_hold_and_parks_what_one_holds(tmp_path: Path):
    clients = Watched(joined(sites(tmp_path)))
    state = algorithm().round(1, State(), COHORT, clients)
    steps = ("vote", "fill", "fill", "fill", "publish")
    assert clients.asked == [("sum", step, COHORT) for step in steps]
    assert state.parked == {"t": 1}
    analytic, router, scatter = state.bank.cells
    assert (analytic.about.module, analytic.about.labels) == ("s@1", ("a", "b"))
    assert lists(analytic, ROW_SUMS) == [[[5, 2, 6], [0, 10, 0]], [3, 2], 5, 3]
    assert (scatter.about.module, scatter.about.covers) == ("scatter", (analytic.about.id,))
    assert lists(scatter, GRAM) == [[25, 10, 0, 54, 0, 18], 5, 3]
    assert lists(router, ("gram", *ROW_SUMS)) == [
        [1_900_000, -240_000, 1_570_000],
        [[-400, 700], [-1200, 1400]],
        [3, 2],
        5,
        3,
    ]
    assert {cell.about.records for cell in state.bank.cells} == {5}
    events = algorithm().events(State(), state)
    assert [(event["kind"], event["subject"]) for event in events] == [
        ("OPEN", "s@1"),
        ("LABEL", "a"),
        ("LABEL", "b"),
        ("SEAL", analytic.about.id),
        ("SEAL", router.about.id),
        ("SEAL", scatter.about.id),
        ("PARK", "t"),
    ]
    assert events[-1]["body"] == {"records": 1}
    assert state.calibration.records == 5
    assert state.calibration.temperature in TEMPERATURES


def test_the_published_view_is_the_pooled_read_out_of_those_sums(tmp_path: Path):
    state = algorithm().round(1, State(), COHORT, joined(sites(tmp_path)))
    gram = torch.tensor([[25, 10, 0], [10, 54, 0], [0, 0, 18]], dtype=torch.float64)
    sums = torch.tensor([[5, 2, 6], [0, 10, 0]], dtype=torch.float64)
    counts = torch.tensor([3, 2], dtype=torch.float64)
    mu = sums / counts[:, None]
    scatter = (gram - sums.T @ (sums / counts[:, None])) / 5
    h = mu.T @ mu + 2 * scatter
    lam = ridge(1e-4, features=3, records=5)
    v = torch.linalg.solve(h + lam * h.diagonal().mean() * torch.eye(3).double(), mu.T)
    head = algorithm().view(state).head
    assert head is not None
    assert head.nodes[0] == ("a", "b")
    assert torch.allclose(head.weights[0].double(), v, rtol=1e-5, atol=1e-7)


def test_removing_a_site_leaves_the_sums_of_the_other_two(tmp_path: Path):
    members = sites(tmp_path)
    clients = joined(members)
    state = algorithm().round(1, State(), COHORT, clients)
    request = Request(kind="site", site="C")
    forget.post(members[2].store, request)
    names = [cell.about.id for cell in state.bank.cells[:2]]
    after, before, records = algorithm().remove(
        state, names, request.id, COHORT, clients, leavers=("C",)
    )
    analytic, router, scatter = after.bank.cells
    assert lists(analytic, ROW_SUMS) == [[[0, 0, 6], [0, 5, 0]], [2, 1], 3, 2]
    assert lists(scatter, GRAM) == [[0, 0, 0, 25, 0, 18], 3, 2]
    assert {cell.about.cohort for cell in after.bank.cells} == {("A", "B")}
    assert lists(router, ("gram", *ROW_SUMS)) == [
        [540_000, -120_000, 990_000],
        [[600, 1000], [-600, 700]],
        [2, 1],
        3,
        2,
    ]
    assert records == 2
    assert before == state.bank.cells
    kinds = [event["kind"] for event in algorithm().events(state, after)]
    assert kinds == ["WITHDRAW", "WITHDRAW", "WITHDRAW"]
    names = [cell.about.id for cell in before]
    assert algorithm().recount(after, names, request.id, ("A", "B"), clients)
    assert not algorithm().recount(state, names, request.id, ("A", "B"), clients)


def test_what_was_parked_opens_as_soon_as_a_second_site_holds_it(tmp_path: Path):
    members = sites(tmp_path)
    clients = joined(members)
    state = algorithm().round(1, State(), COHORT, clients)
    late = dataset("late", [("t3", "c")], window=2)
    whole = members[0].data
    columns = ("records", "texts", "labels", "patients", "windows")
    both = {name: getattr(whole, name) + getattr(late, name) for name in columns}
    members[0].data = type(whole)(**both)
    state = algorithm().round(2, state, COHORT, clients)
    analytic, scatter = state.bank.cells[3], state.bank.cells[5]
    assert (analytic.about.module, analytic.about.round) == ("t@1", 2)
    # B's t2 of round 1, (0, 5, 0), and A's new t3, (5, 2, 0).
    assert lists(analytic, ROW_SUMS) == [[[5, 7, 0]], [2], 2, 2]
    assert lists(scatter, GRAM) == [[25, 10, 0, 29, 0, 0], 2, 2]
    assert state.parked == {}


def test_a_lora_cell_by_hand(tmp_path: Path):
    # B_A = 1, B_B = 2, B_C = 4 (times (1, 0, -1)) with Gamma 1, 2, 1: S = 9 (1, 0, -1), Gamma = 4.
    members = sites(tmp_path)
    for member, factor, gram in zip(members, (1.0, 2.0, 4.0), (1.0, 2.0, 1.0), strict=True):
        b = factor * torch.tensor([[1.0], [0.0], [-1.0]])
        member.trained = lambda client, weights, b=b: {**weights, "q.lora_B": b}
        member.gram = {"q.gram": torch.tensor([[gram]], dtype=torch.float64)}
    clients = joined(members)
    method = algorithm(lanes="analytic,lora", rule=Rule(merge="gram", merge_lam=0.0))
    state = method.round(1, State(), COHORT, clients)
    cell = state.bank.cells[1]
    names = ("q.lora_B", "q.gram", "weight", "metric/contributors")
    assert lists(cell, names) == [[[36], [0], [-36]], [[16]], 5, 3]  # on a grid of quarters
    adapter = method.view(state).adapters["s@1"]
    assert adapter["q.lora_B"].tolist() == [[2.25], [0.0], [-2.25]]
    pinned = basis.slot(TARGETS, index=0, rank=1, seed=0)
    assert torch.equal(adapter["q.lora_A"], pinned["q.lora_A"])

    request = Request(kind="site", site="B")
    forget.post(members[1].store, request)
    names_of_cells = [held.about.id for held in state.bank.cells[:2]]
    after, _, records = method.remove(state, names_of_cells, request.id, COHORT, clients)
    # Without B: S = 5 (1, 0, -1), Gamma = 2.
    assert lists(after.bank.cells[1], names) == [[[20], [0], [-20]], [[8]], 4, 2]
    assert method.view(after).adapters["s@1"]["q.lora_B"].tolist() == [[2.5], [0.0], [-2.5]]
    assert records == 1


def test_the_mean_of_lora_factors_by_hand(tmp_path: Path):
    members = sites(tmp_path)
    for member, factor in zip(members, (1.0, 2.0, 4.0), strict=True):
        b = factor * torch.tensor([[1.0], [0.0], [-1.0]])
        member.trained = lambda client, weights, b=b: {**weights, "q.lora_B": b}
    method = algorithm(lanes="analytic,lora", merge="mean", rule=Rule(merge="mean"))
    state = method.round(1, State(), COHORT, joined(members))
    # Records of scope s: 2, 1 and 2, so the mean of B is (2 * 1 + 1 * 2 + 2 * 4) / 5.
    cell = state.bank.cells[1]
    assert lists(cell, ("q.lora_B", "weight")) == [[[48], [0], [-48]], 5]
    (b,) = [method.view(state).adapters["s@1"]["q.lora_B"]]
    assert torch.allclose(b, torch.tensor([[2.4], [0.0], [-2.4]]))


@pytest.mark.parametrize("order", [1, 2, 3])
def test_the_order_of_answers_does_not_change_a_number(tmp_path: Path, order: int):
    first = algorithm().round(1, State(), COHORT, joined(sites(tmp_path / "0")))
    other = algorithm().round(1, State(), COHORT, joined(sites(tmp_path / "1"), order=order))
    assert [c.about for c in first.bank.cells] == [c.about for c in other.bank.cells]
    assert first.calibration == other.calibration
