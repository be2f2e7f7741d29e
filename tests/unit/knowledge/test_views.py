"""A view is a pure function of live cells: the read-outs, the label tree, and times."""

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from small_bank import GRID, WIDTH, about, catalogue, embeddings, pooled, sealed, total
from torch import Tensor

from fedkola.errors import BasisMismatch, UnknownCell
from fedkola.knowledge import bank as banks
from fedkola.knowledge import basis, statistics, views
from fedkola.knowledge.bank import Bank, CellKind, KnowledgeCell
from fedkola.knowledge.views import Head, Rule, View
from fedkola.types import Aggregate

SCOPES = {"heart-1": "heart", "heart-2": "heart", "lung-1": "lung", "lung-2": "lung"}
TREE = catalogue(SCOPES)
HEART, LUNG = ("heart-1", "heart-2"), ("lung-1", "lung-2")
HEART_CODES = ["heart-1", "heart-2"] * 5
LUNG_CODES = ["lung-1", "lung-2"] * 5
MIXED = ("heart-2", "lung-1")
MIXED_CODES = ["heart-2", "lung-1"] * 5
KINDS = (CellKind.ANALYTIC, CellKind.ROUTER, CellKind.SCATTER)


@pytest.fixture(autouse=True)
def _solved_again():
    views._RECENT.clear()


def one_round() -> Bank:
    return sealed(Bank(), "heart", 1, HEART, HEART_CODES, seed=1, kinds=KINDS)


def two_rounds() -> Bank:
    return sealed(one_round(), "lung", 2, LUNG, LUNG_CODES, seed=2, kinds=KINDS)


def answers(view: View, codes: list[str], *, level: int = 0) -> list[str]:
    assert view.head is not None
    best = views.scores(view.head, embeddings(codes, seed=9), level).argmax(1)
    return [view.head.nodes[level][i] for i in best.tolist()]


@pytest.mark.parametrize(("public", "known"), [(False, {"heart-1"}), (True, {*HEART})])
def test_a_label_with_fewer_records_than_its_floor_is_not_answered(public: bool, known: set[str]):
    codes = [*["heart-1"] * 5, *["heart-2"] * 2]
    bank = sealed(Bank(), "heart", 1, HEART, codes, seed=1, kinds=KINDS)
    rules = {"label_floor": 3, "public_reference": public}
    ruled = tuple(replace(c, about=replace(c.about, privacy=rules)) for c in bank.cells)
    view = views.compute(replace(bank, cells=ruled), TREE, Rule(), now=1)
    assert view.head is not None
    assert set(view.head.nodes[0]) == known


# --- read-outs ------------------------------------------------------------------------------------


def shared_scatter() -> tuple[Tensor, Tensor, Tensor]:
    """Three classes of 4, 8 and 20 records with one within-class scatter: phi, rows and means."""
    generator = torch.Generator().manual_seed(0)
    deltas = torch.randint(-3, 4, (2, 6), generator=generator).double()
    spread = torch.cat([deltas, -deltas])
    means = torch.randint(5, 12, (3, 6), generator=generator).double()
    parts = [(mean + spread).repeat(times, 1) for mean, times in zip(means, (1, 2, 5), strict=True)]
    rows = torch.repeat_interleave(torch.arange(3), torch.tensor([4, 8, 20]))
    return torch.cat(parts), rows, means


def summed(phi: Tensor, rows: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    counts = torch.bincount(rows).double()
    return phi.T @ phi, torch.zeros(3, 6, dtype=torch.float64).index_add_(0, rows, phi), counts


def test_pooled_equals_the_ridge_that_weighs_every_record_by_its_class_size():
    phi, rows, means = shared_scatter()
    gram, sums, counts = summed(phi, rows)
    weight = 1 / counts[rows]
    h = phi.T @ (phi * weight[:, None])
    targets = torch.nn.functional.one_hot(rows, 3).double() * weight[:, None]
    ridge = 1e-3 * h.diagonal().mean() * torch.eye(6, dtype=torch.float64)
    explicit = torch.linalg.solve(h + ridge, phi.T @ targets)
    within = views.scatter(gram, sums, counts)
    got, bias = views.read_out(within, sums, counts, rule="pooled", lam=1e-3)
    assert torch.allclose(sums / counts[:, None], means)
    assert torch.allclose(got.double(), explicit, rtol=1e-4, atol=1e-6)
    assert bias.tolist() == [0, 0, 0]


def test_a_small_spread_trusts_the_means_of_labels():
    phi, rows, means = shared_scatter()
    gram, sums, counts = summed(phi, rows)
    within = views.scatter(gram, sums, counts)
    h = 0.2 * 3 * within + means.T @ means
    h += 1e-3 * h.diagonal().mean() * torch.eye(6, dtype=torch.float64)
    got, _ = views.read_out(within.clone(), sums, counts, rule="pooled", lam=1e-3, spread=0.2)
    assert torch.allclose(got.double(), torch.linalg.solve(h, means.T), rtol=1e-4, atol=1e-6)

    def off(spread: float) -> float:
        """How far the means are from being told apart exactly."""
        v, _ = views.read_out(within.clone(), sums, counts, rule="pooled", lam=1e-6, spread=spread)
        return float((means @ v.double() - torch.eye(3, dtype=torch.float64)).abs().max())

    assert off(0.01) < off(0.2) < off(1.0)


def test_lda_and_root_are_their_formulas():
    phi, rows, means = shared_scatter()
    gram, sums, counts = summed(phi, rows)
    eye = torch.eye(6, dtype=torch.float64)
    centred = phi - means[rows]
    within = centred.T @ centred / len(phi)
    floor = 1e-6 * gram.diagonal().mean() / 6
    v = torch.linalg.solve(within + (0.1 * within.diagonal().mean() + floor) * eye, means.T)
    scatter = views.scatter(gram, sums, counts)
    assert torch.allclose(scatter, within)
    got, bias = views.read_out(scatter, sums, counts, rule="lda", lam=0.1)
    assert torch.allclose(got.double(), v, rtol=1e-4, atol=1e-6)
    assert torch.allclose(bias.double(), -(means * v.T).sum(1) / 2, rtol=1e-4, atol=1e-4)
    v = torch.linalg.solve(
        gram + 0.1 * gram.diagonal().mean() * eye, (sums / counts.sqrt()[:, None]).T
    )
    got, bias = views.read_out(within, sums, counts, rule="root", lam=0.1)
    assert torch.allclose(got.double(), v, rtol=1e-4, atol=1e-6)
    assert not bias.any()


def test_one_record_per_label_still_has_a_read_out():
    means = torch.tensor([[1.0, 0.0], [0.0, 2.0]], dtype=torch.float64)
    for rule in ("pooled", "lda", "root"):
        counts = torch.ones(2, dtype=torch.float64)
        within = views.scatter(means.T @ means, means, counts)
        got, _ = views.read_out(within, means, counts, rule=rule, lam=1e-3)
        assert bool(torch.isfinite(got).all())


# --- the label tree -------------------------------------------------------------------------------


def hand_made(successor: list[int]) -> Head:
    """Labels a, b in group g, c in group h, with raw scores 1, 7, 5 and 10, 20 for any input."""
    return Head(
        features=2,
        bits=4,
        seed=0,
        nodes=(("a", "b", "c"), ("g", "h")),
        weights=(torch.zeros(2, 3), torch.zeros(2, 2)),
        bias=(torch.tensor([1.0, 7.0, 5.0]), torch.tensor([10.0, 20.0])),
        parents=(torch.tensor([0, 1, 2]), torch.tensor([0, 0, 1])),
        successor=torch.tensor(successor),
        up=0.5,
        down=2.0,
    )


def score(head: Head, level: int) -> list[float]:
    (row,) = views.scores(head, torch.zeros(1, WIDTH, dtype=torch.int16), level).tolist()
    return row


def test_a_label_scores_its_own_and_a_share_of_its_group():
    assert score(hand_made([0, 1, 2]), 0) == [1 + 5, 7 + 5, 5 + 10]


def test_a_group_scores_its_own_and_the_best_below_it():
    assert score(hand_made([0, 1, 2]), 1) == [10 + 2 * 7, 20 + 2 * 5]


def test_a_retired_label_is_masked_and_its_score_is_its_successors():
    # b is retired and c answers for it: c now scores the 7 that b had, and so does c's group.
    head = hand_made([0, 2, 2])
    assert score(head, 0) == [1 + 5, float("-inf"), 7 + 10]
    assert score(head, 1) == [10 + 2 * 1, 20 + 2 * 7]


def test_a_label_without_a_successor_is_masked_with_its_empty_group():
    assert score(hand_made([0, 1, -1]), 0)[2] == float("-inf")
    assert score(hand_made([0, 1, -1]), 1) == [10 + 2 * 7, float("-inf")]


def test_a_head_of_one_level_scores_groups_by_their_best_label():
    head = hand_made([0, 1, 2])
    flat = replace(head, weights=(head.weights[0], torch.zeros(0)))
    assert score(flat, 0) == [1, 7, 5]
    assert score(flat, 1) == [7, 5]


def test_a_middle_level_hears_from_above_and_below():
    head = replace(
        hand_made([0, 1, 2]),
        nodes=(("a", "b", "c"), ("g", "h"), ("root",)),
        weights=(torch.zeros(2, 3), torch.zeros(2, 2), torch.zeros(2, 1)),
        bias=(torch.tensor([1.0, 7.0, 5.0]), torch.tensor([10.0, 20.0]), torch.tensor([4.0])),
        parents=(torch.tensor([0, 1, 2]), torch.tensor([0, 0, 1]), torch.tensor([0, 0, 0])),
    )
    assert score(head, 1) == [10 + 14 + 2, 20 + 10 + 2]
    assert score(head, 0) == [1 + 5 + 2, 7 + 5 + 2, 5 + 10 + 2]


# --- from cells to a model ------------------------------------------------------------------------


def test_a_view_answers_at_every_level_of_the_tree():
    view = views.compute(two_rounds(), TREE, Rule(), now=2)
    asked = [*HEART, *LUNG]
    assert answers(view, asked) == asked
    assert answers(view, asked, level=1) == ["heart", "heart", "lung", "lung"]
    assert view.head is not None
    assert view.head.nodes == (("heart-1", "heart-2", "lung-1", "lung-2"), ("heart", "lung"))
    assert view.modules == ("heart@1", "lung@1")


def test_windows_of_one_scope_give_the_model_of_one_shot_bit_for_bit():
    labels = tuple(SCOPES)
    codes = HEART_CODES + LUNG_CODES
    z = embeddings(codes, seed=4)
    once = stream = Bank()
    for part, number in ((slice(0, 7), 1), (slice(7, None), 2)):
        stream = put(stream, number, labels, codes[part], z[part])
    once = put(once, 1, labels, codes, z)
    left, right = (views.compute(bank, TREE, Rule(), now=2) for bank in (stream, once))
    assert left.id != right.id
    assert left.head is not None
    assert right.head is not None
    for name in ("weights", "bias", "parents"):
        pairs = zip(getattr(left.head, name), getattr(right.head, name), strict=True)
        assert all(torch.equal(a, b) for a, b in pairs)


def put(bank: Bank, number: int, labels: tuple[str, ...], codes: list[str], z: Tensor) -> Bank:
    cell = about(CellKind.ANALYTIC, "all@1", number, labels, records=len(codes))
    bank = banks.seal(bank, cell, total(CellKind.ANALYTIC, labels, codes, z))
    return pooled(bank, number, z, [cell.id])


def test_the_past_is_a_view_of_what_was_known_and_of_what_held_then():
    bank = two_rounds()
    then = views.compute(one_round(), TREE, Rule(), now=1)
    for asof in ({"known_at": 1}, {"valid_at": 1.0}, {"known_at": 1, "valid_at": 1.9}):
        view = views.compute(bank, TREE, Rule(), now=2, **asof)
        # What held in window 1 is told apart with the scatter that is known now.
        assert (view.id == then.id) == ("known_at" in asof)
        assert (view.known_at, view.valid_at) == (asof.get("known_at"), asof.get("valid_at"))
        assert set(answers(view, list(LUNG))) <= set(HEART)
    assert views.compute(bank, TREE, Rule(), now=2).id != then.id
    with pytest.raises(UnknownCell, match="known_at 0"):
        views.compute(bank, TREE, Rule(), now=2, known_at=0)


def test_a_held_set_answers_from_what_it_holds_alone():
    bank = two_rounds()
    view = views.compute(bank, TREE, Rule(), now=2, held=["lung@1"])
    assert view.modules == ("lung@1",)
    assert set(answers(view, list(HEART))) <= set(LUNG)
    everything = views.compute(bank, TREE, Rule(), now=2, held=["lung@1", "heart@1"])
    assert everything.id == views.compute(bank, TREE, Rule(), now=2, held=["heart@1", "lung@1"]).id
    assert everything.id not in (view.id, views.compute(bank, TREE, Rule(), now=2).id)
    with pytest.raises(UnknownCell, match="held"):
        views.compute(bank, TREE, Rule(), now=2, held=["bone@1"])


def test_retiring_a_label_changes_the_answer_from_its_day_on_and_not_before():
    bank = two_rounds()
    now = views.compute(bank, TREE, Rule(), now=2)
    retired = banks.retire(bank, "lung-1", valid_to=3.0, replaced_by=["lung-2"])
    after = views.compute(retired, TREE, Rule(), now=3)
    assert answers(now, ["lung-1", "lung-2"]) == ["lung-1", "lung-2"]
    assert answers(after, ["lung-1", "lung-2"]) == ["lung-2", "lung-2"]
    assert after.id != now.id
    assert answers(views.compute(retired, TREE, Rule(), now=3, valid_at=2.5), ["lung-1"]) == [
        "lung-1"
    ]
    assert views.compute(retired, TREE, Rule(), now=3, known_at=2).id == now.id
    gone = banks.retire(bank, "lung-1", valid_to=3.0)
    assert "lung-1" not in answers(views.compute(gone, TREE, Rule(), now=3), ["lung-1"] * 3)


def test_a_split_label_is_answered_by_the_successor_that_was_opened_first():
    bank = banks.retire(two_rounds(), "heart-1", valid_to=3.0, replaced_by=["lung-2", "heart-2"])
    view = views.compute(bank, TREE, Rule(), now=3)
    assert answers(view, ["heart-1"]) == ["heart-2"]


def test_half_life_halves_what_is_one_half_life_older():
    z = torch.cat([embeddings(HEART_CODES, seed=1), embeddings(MIXED_CODES, seed=2)])
    bank = sealed(Bank(), "heart", 1, HEART, HEART_CODES, seed=1, kinds=[CellKind.ANALYTIC])
    bank = sealed(bank, "lung", 3, MIXED, MIXED_CODES, seed=2, kinds=[CellKind.ANALYTIC])
    bank = pooled(bank, 3, z, [cell.about.id for cell in bank.cells])
    rule = Rule(readout="pooled", half_life=2.0)
    aged = views.compute(bank, TREE, rule, now=3)
    old, new, pool = (cell.total.words for cell in bank.cells)

    def rows(weight: float) -> tuple[Tensor, Tensor]:
        (s1, n1), (s2, n2) = ((w["sums"].double(), w["counts"].double()) for w in (old, new))
        sums = torch.stack([weight * s1[0], weight * s1[1] + s2[0], s2[1]])
        return sums, torch.stack([weight * n1[0], weight * n1[1] + n2[0], n2[1]])

    # The means age, the scatter is that of all the records it covers.
    within = views.scatter(statistics.unpack(pool["gram"], 16).double(), *rows(1.0))
    lam = views.ridge(rule.lam, features=16, records=20.0)
    expected, _ = views.read_out(within, *rows(0.5), rule="pooled", lam=lam)
    assert aged.head is not None
    assert torch.equal(aged.head.weights[0], expected)
    ageless = views.compute(bank, TREE, replace(rule, half_life=None), now=3)
    assert ageless.id == views.compute(bank, TREE, replace(rule, half_life=None), now=9).id
    assert aged.id != views.compute(bank, TREE, rule, now=5).id


def test_cells_of_two_recipes_make_no_view():
    bank = two_rounds()
    cell = bank.cells[0]
    other = replace(cell, about=replace(cell.about, recipe={**cell.about.recipe, "bits": 8}))
    with pytest.raises(BasisMismatch, match="different recipes"):
        views.compute(replace(bank, cells=(other, *bank.cells[1:])), TREE, Rule(), now=2)


@pytest.mark.parametrize("readout", ["tree", "pooled", "lda", "root"])
def test_a_view_is_the_same_after_saving_and_loading(tmp_path: Path, readout: str):
    bank = with_lora(two_rounds())
    rule = Rule(readout=readout)
    view = views.compute(
        bank, TREE, rule, now=2, targets=TARGETS, held=["heart@1", "lung@1"], valid_at=5.0
    )
    views.save(view, tmp_path, {"run": "r", "round": 2})
    again, provenance = views.load(tmp_path)
    assert provenance == {"run": "r", "round": 2}
    assert views.to_tensors(again)[0] == views.to_tensors(view)[0]
    left, right = views.to_tensors(again)[1], views.to_tensors(view)[1]
    assert set(left) == set(right)
    assert all(torch.equal(left[name], right[name]) for name in left)
    assert again.head is not None
    assert view.head is not None
    z = embeddings(list(SCOPES), seed=9)
    for level in (0, 1):
        assert torch.equal(views.scores(again.head, z, level), views.scores(view.head, z, level))


def test_a_folder_without_a_view_says_what_to_do(tmp_path: Path):
    with pytest.raises(UnknownCell, match="fedkola run"):
        views.load(tmp_path)


# --- the pooled scatter -----------------------------------------------------------------------


def test_before_the_first_scatter_cell_labels_are_told_apart_by_their_means():
    bank = sealed(Bank(), "heart", 1, HEART, HEART_CODES, seed=1)
    bank = sealed(bank, "lung", 2, LUNG, LUNG_CODES, seed=2)
    view = views.compute(bank, TREE, Rule(), now=2)
    asked = [*HEART, *LUNG]
    assert answers(view, asked) == asked
    assert view.id != views.compute(two_rounds(), TREE, Rule(), now=2).id


def test_labels_newer_than_the_last_scatter_cell_use_the_scatter_there_is():
    bank = sealed(one_round(), "lung", 2, LUNG, LUNG_CODES, seed=2)
    view = views.compute(bank, TREE, Rule(readout="pooled"), now=2)
    assert answers(view, [*HEART, *LUNG]) == [*HEART, *LUNG]
    old, new = (cell.total.words for cell in banks.select(bank, CellKind.ANALYTIC))
    (pool,) = banks.select(bank, CellKind.SCATTER)
    gram = statistics.unpack(pool.total.words["gram"], 16).double()
    within = views.scatter(gram, old["sums"].double(), old["counts"].double())
    sums, counts = (torch.cat([old[n], new[n]]).double() for n in ("sums", "counts"))
    lam = views.ridge(1e-4, features=16, records=10.0)
    expected, _ = views.read_out(within, sums, counts, rule="pooled", lam=lam)
    assert view.head is not None
    assert torch.equal(view.head.weights[0], expected)


def test_a_held_set_has_the_scatter_of_all_and_the_means_of_its_own():
    bank = two_rounds()
    view = views.compute(bank, TREE, Rule(readout="pooled"), now=2, held=["lung@1"])
    scatters = {cell.about.id for cell in banks.select(bank, CellKind.SCATTER)}
    assert scatters < set(view.cells)
    assert view.modules == ("lung@1",)
    grams = [cell.total.words["gram"] for cell in banks.select(bank, CellKind.SCATTER)]
    parts = [cell.total.words for cell in banks.select(bank, CellKind.ANALYTIC)]
    sums, counts = (torch.cat([part[n] for part in parts]).double() for n in ("sums", "counts"))
    within = views.scatter(statistics.unpack(sum(grams), 16).double(), sums, counts)
    lam = views.ridge(1e-4, features=16, records=20.0)
    expected, _ = views.read_out(within, sums[2:], counts[2:], rule="pooled", lam=lam)
    assert view.head is not None
    assert torch.equal(view.head.weights[0], expected)


def test_a_bank_of_scatter_alone_has_no_view():
    bank = two_rounds()
    rest = tuple(cell for cell in bank.cells if cell.about.kind is CellKind.SCATTER)
    with pytest.raises(UnknownCell, match="no cell is live"):
        views.compute(replace(bank, cells=rest), TREE, Rule(), now=2)


# --- LoRA cells -----------------------------------------------------------------------------------

TARGETS = {"q": (2, 4)}


def lora(
    round: int, b: list[list[float]], gram: list[list[float]], *, num: int, merge: str = "gram"
) -> tuple[KnowledgeCell, Aggregate]:
    """A cell whose sums are these numbers on a grid of 4 fractional bits."""
    words = {
        "q.lora_B": torch.tensor(b, dtype=torch.float64).mul(16).to(torch.int32),
        "q.gram": torch.tensor(gram, dtype=torch.float64).mul(16).to(torch.int32),
        "weight": torch.tensor(num, dtype=torch.int32),
        "metric/contributors": torch.tensor(3, dtype=torch.int32),
    }
    if merge == "mean":
        del words["q.gram"]
    grid = replace(GRID, scale={name: 4 if "q." in name else 0 for name in words})
    recipe = {"rank": 1, "basis_seed": 0, "merge": merge}
    slot = 2
    about = KnowledgeCell(
        id=banks.cell_id(
            module="heart@1", kind=CellKind.LORA, round=round, slot=slot, recipe=recipe
        ),
        module="heart@1",
        kind=CellKind.LORA,
        round=round,
        valid=(float(round), None),
        slot=slot,
        recipe=recipe,
        labels=HEART,
        cohort=("a", "b", "c"),
        contributors=3,
        records=num,
        words="",
    )
    return about, Aggregate(cohort=("a", "b", "c"), words=words, grid=grid)


def with_lora(bank: Bank) -> Bank:
    bank = banks.seal(bank, *lora(1, [[2.0], [0.0]], [[1.0]], num=1))
    return banks.seal(bank, *lora(2, [[0.0], [12.0]], [[3.0]], num=3))


def test_the_gram_merge_by_hand():
    # B_1 = (2, 0) with Gamma_1 = 1 and B_2 = (0, 4) with Gamma_2 = 3: sums (2, 12) and 4.
    rule = Rule(merge="gram", merge_lam=0.0)
    view = views.compute(with_lora(Bank()), TREE, rule, now=2, targets=TARGETS)
    assert view.adapters["heart@1"]["q.lora_B"].tolist() == [[0.5], [3.0]]
    pinned = basis.slot(TARGETS, index=2, rank=1, seed=0)["q.lora_A"]
    assert torch.equal(view.adapters["heart@1"]["q.lora_A"], pinned)
    # lam tau = 1.0 * 4 doubles the denominator.
    rule = Rule(merge="gram", merge_lam=1.0)
    view = views.compute(with_lora(Bank()), TREE, rule, now=2, targets=TARGETS)
    assert view.adapters["heart@1"]["q.lora_B"].tolist() == [[0.25], [1.5]]


def test_the_gram_merge_of_a_matrix_by_hand():
    # S = (2, 12) and Gamma = [[2, 1], [1, 3]]: B Gamma = S has the solution (-6/5, 22/5).
    about, total = lora(1, [[2.0, 12.0], [0.0, 0.0]], [[2.0, 1.0], [1.0, 3.0]], num=1)
    about = replace(about, recipe={**about.recipe, "rank": 2}, slot=0)
    bank = banks.seal(Bank(), about, total)
    rule = Rule(merge="gram", merge_lam=0.0)
    view = views.compute(bank, TREE, rule, now=1, targets=TARGETS)
    expected = torch.tensor([[-6 / 5, 22 / 5], [0.0, 0.0]])
    assert torch.allclose(view.adapters["heart@1"]["q.lora_B"], expected, atol=1e-6)


def test_the_mean_merge_weighs_factors_by_records():
    # Sums of n B: 1 (2, 0) and 3 (0, 4); the mean over 4 records is (0.5, 3).
    bank = banks.seal(Bank(), *lora(1, [[2.0], [0.0]], [[0.0]], num=1, merge="mean"))
    bank = banks.seal(bank, *lora(2, [[0.0], [12.0]], [[0.0]], num=3, merge="mean"))
    view = views.compute(bank, TREE, Rule(merge="mean"), now=2, targets=TARGETS)
    assert view.adapters["heart@1"]["q.lora_B"].tolist() == [[0.5], [3.0]]


def test_slots_of_several_modules_stand_side_by_side():
    bank = with_lora(Bank())
    view = views.compute(bank, TREE, Rule(merge_lam=0.0), now=2, targets=TARGETS)
    one = view.adapters["heart@1"]
    both = views.slots(replace(view, adapters={"x": one, "y": one}), ["x", "y"])
    assert both["q.lora_A"].shape == (2, 4)
    assert both["q.lora_B"].tolist() == [[0.5, 0.5], [3.0, 3.0]]


def test_quality_weighs_a_cell_and_zero_leaves_it_out():
    bank = sealed(Bank(), "heart", 1, ("heart-1",), ["heart-1", "heart-1"])
    bank = sealed(bank, "lung", 2, ("lung-1",), ["lung-1"])
    codes = catalogue({"heart-1": "heart", "lung-1": "lung"})
    plain = views.compute(bank, codes, Rule(), now=2)
    lung = [cell.about.id for cell in bank.cells if cell.about.module == "lung@1"]
    for cell in lung:
        bank = banks.rate(bank, cell, {"agreement": 0.5})
    halved = views.compute(bank, codes, Rule(), now=2)
    assert halved.id != plain.id
    assert float(halved.router.log_prior[1]) == pytest.approx(math.log(0.5 / 2.5))
    for cell in lung:
        bank = banks.rate(bank, cell, {"agreement": 0.0})
    assert views.compute(bank, codes, Rule(), now=2).modules == ("heart@1",)


def test_a_module_ages_by_its_own_half_life_and_as_of_the_time_asked_for():
    bank = sealed(Bank(), "heart", 1, ("heart-1",), ["heart-1"])
    bank = sealed(bank, "lung", 1, ("lung-1",), ["lung-1"])
    modules = (replace(bank.modules[0], half_life=1.0), bank.modules[1])
    bank = replace(bank, modules=modules)
    codes = catalogue({"heart-1": "heart", "lung-1": "lung"})
    now = views.compute(bank, codes, Rule(), now=3)
    assert float(now.router.log_prior[0]) == pytest.approx(math.log(0.25 / 1.25))
    then = views.compute(bank, codes, Rule(), now=3, known_at=1)
    assert float(then.router.log_prior[0]) == pytest.approx(math.log(0.5))
