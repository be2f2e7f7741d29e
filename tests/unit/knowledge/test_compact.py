"""Compaction: sums are exact, fused modules have the error that was predicted."""

import json
import random
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from small_bank import about, catalogue, embeddings, pooled, total

from fedkola.errors import BasisMismatch, BlobMissing, KnowledgeError, UnknownCell
from fedkola.knowledge import archive, basis, compact, views
from fedkola.knowledge import bank as banks
from fedkola.knowledge.bank import Bank, Cell, CellKind
from fedkola.types import Aggregate

TARGETS = {"q": (20, 48), "v": (12, 48)}


def adapter(slot: int, *, seed: int, rank: int = 4, like: float = 0.0) -> dict[str, torch.Tensor]:
    """A module of a pinned slot; ``like`` 1 gives every seed the same left factor."""
    own, shared = torch.Generator().manual_seed(seed), torch.Generator().manual_seed(0)
    weights = dict(basis.slot(TARGETS, index=slot, rank=rank, seed=0))
    for layer, (height, _) in TARGETS.items():
        common = torch.randn(height, rank, generator=shared)
        weights[f"{layer}.lora_B"] = like * common + (1 - like) * torch.randn(
            height, rank, generator=own
        )
    return weights


@pytest.mark.parametrize("rank", [1, 4, 7])
@pytest.mark.parametrize("slots", [(0, 1), (0, 3, 5), (2, 2)])
def test_the_error_of_fusing_is_known_before_it_is_made(rank: int, slots: tuple[int, ...]):
    modules = [adapter(slot, seed=i + 1) for i, slot in enumerate(slots)]
    shares = [0.5, 0.3, 0.2][: len(modules)]
    before = compact.predicted(modules, shares, rank=rank)
    fused = compact.fuse(modules, shares, rank=rank)
    assert fused.error == before > 0
    assert abs(compact.measured(modules, shares, fused.adapter) - before) < 1e-4
    for layer in TARGETS:
        rows = fused.adapter[f"{layer}.lora_A"]
        assert torch.allclose(rows @ rows.T, torch.eye(rank), atol=1e-5)


def test_what_two_modules_share_costs_nothing_and_what_they_do_not_share_does():
    # The same B on two slots is B [A_1 + A_2] / 2: of rank 4, though A_1 and A_2 differ.
    same = [adapter(0, seed=1, like=1.0), adapter(1, seed=2, like=1.0)]
    assert compact.predicted(same, [0.5, 0.5], rank=4) < 1e-6
    near = [adapter(0, seed=1, like=0.9), adapter(1, seed=2, like=0.9)]
    far = [adapter(0, seed=1), adapter(1, seed=2)]
    errors = [compact.predicted(pair, [0.5, 0.5], rank=4) for pair in (near, far)]
    assert 0 < errors[0] < 0.2 < 0.4 < errors[1]


def test_full_rank_loses_nothing_and_a_zero_module_is_fused_to_zeros():
    modules = [adapter(0, seed=1), adapter(1, seed=2)]
    fused = compact.fuse(modules, [0.5, 0.5], rank=8)
    assert compact.measured(modules, [0.5, 0.5], fused.adapter) < 1e-6
    zeros = [{n: v * 0 if n.endswith("_B") else v for n, v in m.items()} for m in modules]
    nothing = compact.fuse(zeros, [0.5, 0.5], rank=4)
    assert nothing.error == 0.0
    assert not nothing.adapter["q.lora_B"].any()


def test_modules_of_different_base_models_are_not_fused():
    other = {"q.lora_A": torch.ones(4, 32), "q.lora_B": torch.ones(20, 4)}
    with pytest.raises(BasisMismatch, match="different layers"):
        compact.fuse([adapter(0, seed=1), other], [0.5, 0.5], rank=4)
    wide = {**adapter(1, seed=2), "v.lora_A": torch.ones(4, 32)}
    with pytest.raises(BasisMismatch, match=r"v is \[12\] x \[32, 48\]"):
        compact.fuse([adapter(0, seed=1), wide], [0.5, 0.5], rank=4)


# --- sums -----------------------------------------------------------------------------------------

HEART = ("heart-1", "heart-2", "heart-3")
EVERY = (CellKind.ANALYTIC, CellKind.ROUTER, CellKind.SCATTER)


def stream(rounds: int, *, without: int = 0) -> Bank:
    """One window of two scopes a round; the round ``without`` never brought its first record."""
    bank = Bank()
    for number in range(1, rounds + 1):
        codes = random.Random(number).choices(HEART, k=5)
        z = embeddings(codes, seed=number)
        if number == without:
            codes, z = codes[1:], z[1:]
        labels = tuple(dict.fromkeys(codes))
        bank = filled(bank, "heart", number, labels, codes, z)
        bank = filled(bank, "lung", number, ("lung-1",), ["lung-1"], embeddings(["lung-1"]))
        waiting = [cell.about.id for cell in banks.uncovered(bank)]
        bank = pooled(bank, number, torch.cat([z, embeddings(["lung-1"])]), waiting)
    return bank


def filled(bank, scope, number, labels, codes, z):  # type: ignore[no-untyped-def]
    bank = banks.open_modules(bank, [scope], round=number, slots_max=9)
    for kind in (CellKind.ANALYTIC, CellKind.ROUTER):
        cell = about(kind, f"{scope}@1", number, labels, records=len(codes))
        bank = banks.seal(bank, cell, total(kind, labels, codes, z))
    return bank


def added(bank: Bank, *, before: int) -> tuple[Bank, dict[str, Cell]]:
    """Everything before a round added up, scatter cells first, and the parts."""
    cold: dict[str, Cell] = {}
    for _ in range(2):
        for group in compact.summable(bank, before=before):
            bank, parts = compact.add(bank, group)
            cold |= {part.about.id: part for part in parts}
    return bank, cold


def kept(bank: Bank) -> dict[tuple[str, str, int], str]:
    return {(c.about.module, c.about.kind.value, c.about.round): c.about.words for c in bank.cells}


def test_cells_added_up_hold_the_integers_of_one_shot():
    bank, cold = added(stream(6), before=7)
    assert len(bank.cells) == 5
    assert len(cold) == 6 * 5
    codes = [code for n in range(1, 7) for code in random.Random(n).choices(HEART, k=5)]
    z = torch.cat([embeddings(codes[5 * n : 5 * n + 5], seed=n + 1) for n in range(6)])
    for cell in bank.cells:
        if cell.about.module == "heart@1":
            shot = total(cell.about.kind, HEART, codes, z)
            for name in ("sums", "counts"):
                order = [HEART.index(code) for code in cell.about.labels]
                assert torch.equal(cell.total.words[name], shot.words[name][order])
            assert (cell.about.records, cell.about.round, cell.about.contributors) == (30, 6, 3)
    (scatter,) = banks.of_kind(bank, CellKind.SCATTER)
    pair = total(
        CellKind.SCATTER, ["any"], ["any"] * 36, torch.cat([z, *[embeddings(["lung-1"])] * 6])
    )
    assert torch.equal(scatter.total.words["gram"], pair.words["gram"])
    assert {c.about.id for c in banks.covered(bank, scatter.about)} == {
        c.about.id for c in banks.of_kind(bank, CellKind.ANALYTIC)
    }


def test_a_view_does_not_change_by_a_bit_when_its_cells_are_added_up():
    bank = stream(6)
    codes = {code: code.split("-")[0] for code in (*HEART, "lung-1")}
    rule = views.Rule()
    before = views.compute(bank, catalogue(codes), rule, now=6).head
    for limit in (3, 5, 7):
        after = views.compute(added(bank, before=limit)[0], catalogue(codes), rule, now=6).head
        assert all(map(torch.equal, before.weights, after.weights))


def test_taking_everything_out_of_a_sum_gives_the_bank_back():
    bank = stream(5)
    small, cold = added(bank, before=5)
    parts = [replace(part, about=a) for a in small.cold for part in [cold[a.id]]]
    again = compact.take_out(small, parts)
    assert kept(again) == kept(bank)
    assert banks.metadata(again)["cells"] == banks.metadata(bank)["cells"]
    assert not again.cold
    with pytest.raises(UnknownCell, match="is not in cold storage"):
        compact.take_out(again, parts[:1])


def test_a_sum_that_lost_a_record_is_the_sum_that_never_had_it():
    small, cold = added(stream(6), before=6)
    touched = [c.id for c in small.cold if (c.module, c.round) == ("heart@1", 3)]
    names = compact.needed(small, touched)
    assert len(names) == 4  # with the scatter cell and all that it covers
    assert set(touched) < set(names)
    bank = compact.take_out(small, [cold[name] for name in names])
    never = stream(6, without=3)
    for cell in never.cells:
        if cell.about.id in names:
            same = banks.find(bank, cell.about.id).about
            bank = banks.withdraw(
                bank,
                same.id,
                aligned(cell, same.labels),
                records=cell.about.records,
                contributors=3,
                covers=same.covers,
            )
    again, _ = added(bank, before=6)
    assert kept(again) == kept(added(never, before=6)[0])
    for cell in again.cells:
        assert banks.content(cell.about.labels, cell.total) == cell.about.words


def test_a_live_cell_brings_back_the_scatter_cell_that_was_added_up_over_it():
    bank = filled(Bank(), "heart", 1, HEART[:1], [HEART[0]], embeddings([HEART[0]]))
    bank = pooled(bank, 1, embeddings([HEART[0]]), [banks.uncovered(bank)[0].about.id])
    bank = filled(bank, "lung", 2, ("lung-1",), ["lung-1"], embeddings(["lung-1"]))
    bank = pooled(bank, 2, embeddings(["lung-1"]), [banks.uncovered(bank)[0].about.id])
    small, _ = added(bank, before=3)
    assert [cell.kind for cell in small.cold] == [CellKind.SCATTER] * 2
    first = banks.of_kind(small, CellKind.ANALYTIC)[0].about.id
    assert compact.needed(small, [first]) == (small.cold[0].id,)
    assert compact.needed(small, []) == ()


def aligned(cell: Cell, labels: tuple[str, ...]) -> Aggregate:
    return replace(cell.total, words=compact._rows(cell, labels))


def test_a_sum_is_extended_by_the_cells_that_come_later():
    once, _ = added(stream(8), before=8)
    twice, _ = added(stream(5), before=4)
    # Rounds 6 to 8 arrive at a bank that was made small after round 5.
    for cell in stream(8).cells:
        if cell.about.round > 5:
            twice = banks.seal(twice, replace(cell.about, sources=()), cell.total)
    twice, _ = added(twice, before=8)
    assert kept(twice) == kept(once)
    sums = {c.about.kind: len(c.about.sources) for c in twice.cells if c.about.sources}
    assert sums == {CellKind.ANALYTIC: 7, CellKind.ROUTER: 7, CellKind.SCATTER: 7}


def test_cells_of_different_quality_versions_or_recipes_stay_apart():
    bank = stream(3)
    heart = next(c for c in bank.cells if c.about.module == "heart@1")
    rated = banks.rate(bank, heart.about.id, {"agreement": 0.5})
    sizes = [sorted(map(len, compact.summable(b, before=4))) for b in (bank, rated)]
    assert sizes == [[3, 3, 3], [3, 3, 3]]  # routers and the scatter; rows wait for it
    for one, before in ((bank, 4), (rated, 4), (bank, 2)):
        small, _ = added(one, before=before)
        assert [c.about.round for c in small.cells if c.about.module == "heart@1"].count(3) >= 1
    assert len(added(rated, before=4)[0].cells) == len(added(bank, before=4)[0].cells) + 1
    newer = banks.supersede(bank, "heart", round=4, slots_max=9)
    newer = filled_version(newer, 4)
    assert {c.about.module for c in added(newer, before=5)[0].cells} == {
        "heart@1",
        "heart@2",
        "lung@1",
        banks.POOL,
    }


def filled_version(bank: Bank, number: int) -> Bank:
    z = embeddings(["heart-1"])
    for kind in (CellKind.ANALYTIC, CellKind.ROUTER):
        cell = about(kind, "heart@2", number, ("heart-1",), records=1)
        bank = banks.seal(bank, cell, total(kind, ("heart-1",), ["heart-1"], z))
    return pooled(bank, number, z, [c.about.id for c in banks.uncovered(bank)])


def test_under_a_half_life_only_faded_cells_are_added_up():
    bank = stream(20)
    assert compact.summable(bank, before=20, half_life=None)
    groups = compact.summable(bank, before=20, half_life=2.0)
    rounds = {banks.find(bank, name).about.round for group in groups for name in group}
    kinds = {banks.find(bank, name).about.kind for group in groups for name in group}
    assert kinds == {CellKind.ROUTER, CellKind.SCATTER}
    routers = [g for g in groups if banks.find(bank, g[0]).about.kind is CellKind.ROUTER]
    assert {banks.find(bank, n).about.round for g in routers for n in g} == {1, 2, 3}
    assert max(rounds) == 19  # the scatter does not age


def test_a_time_within_a_sum_is_refused_and_answered_from_cold_storage(tmp_path: Path):
    bank = stream(6)
    small, cold = added(bank, before=6)
    archive.put(tmp_path, cold.values())
    assert banks.select(small, CellKind.ROUTER, known_at=0) == ()
    assert len(banks.select(small, CellKind.ROUTER, known_at=5)) == 2
    with pytest.raises(
        KnowledgeError, match=r"adds up rounds 1 to 5, and .*known_at=3 lies within"
    ):
        banks.select(small, CellKind.ROUTER, known_at=3)
    then = archive.as_of(small, tmp_path, valid_at=None, known_at=3)
    codes = {code: code.split("-")[0] for code in (*HEART, "lung-1")}
    views_then = [
        views.compute(b, catalogue(codes), views.Rule(), now=3, known_at=3).head
        for b in (bank, then)
    ]
    assert all(map(torch.equal, views_then[0].weights, views_then[1].weights))


def test_cold_storage_keeps_what_it_is_named_by_and_nothing_else(tmp_path: Path):
    small, cold = added(stream(4), before=4)
    archive.put(tmp_path, cold.values())
    assert len(list(tmp_path.iterdir())) == len(small.cold) == 15
    name = small.cold[0].id
    assert (
        kept(archive.thaw(small, tmp_path, [name])).items()
        >= {
            (c.about.module, c.about.kind.value, c.about.round): c.about.words for c in [cold[name]]
        }.items()
    )
    (tmp_path / "left-by-a-killed-writer.tmp").write_text("x")
    assert archive.sweep(tmp_path, small) == 1
    assert archive.size(tmp_path) > 0
    path = next(tmp_path.glob(f"{name}-*"))
    path.write_bytes(path.read_bytes()[:-8] + bytes(8))
    with pytest.raises(BlobMissing, match="does not hold the integers it is named by"):
        archive.thaw(small, tmp_path, [name])
    path.unlink()
    with pytest.raises(BlobMissing, match="cannot be read"):
        archive.thaw(small, tmp_path, [name])


def test_a_purged_archive_says_so(tmp_path: Path):
    small, cold = added(stream(4), before=4)
    archive.put(tmp_path, cold.values())
    purged = archive.purge(small)
    assert archive.sweep(tmp_path, purged) > 0 == archive.size(tmp_path)
    with pytest.raises(KnowledgeError, match="was purged from the archive; its sites hold"):
        archive.thaw(purged, tmp_path, [small.cold[0].id])
    with pytest.raises(KnowledgeError, match="times from round 3 on can be asked"):
        archive.as_of(purged, tmp_path, valid_at=None, known_at=2)
    assert archive.as_of(purged, tmp_path, valid_at=None, known_at=3) == purged
    kinds = {event["kind"] for event in banks.events(small, purged)}
    assert kinds == {"PURGE"}


def test_a_sum_is_revoked_with_its_parts():
    small, _ = added(stream(4), before=4)
    router = next(c.about for c in small.cells if c.about.kind is CellKind.ROUTER)
    less = banks.revoke(small, router.id)
    assert {about.id for about in less.revoked} == set(router.sources)
    assert len(less.cold) == len(small.cold) - 3
    kinds = [event["kind"] for event in banks.events(small, less)]
    assert sorted(kinds) == ["REVOKE", "REVOKE", "REVOKE", "SPLIT"]


def test_the_events_of_compaction_fold_to_the_bank(tmp_path: Path):
    bank = stream(4)
    small, cold = added(bank, before=4)
    thawed = compact.take_out(small, [cold[n] for n in compact.needed(small, [small.cold[0].id])])
    states = [Bank(), bank, small, thawed, added(thawed, before=4)[0], archive.purge(small)]
    history = [
        (event["kind"], event["subject"], event["body"])
        for one, two in pairwise(states)
        for event in banks.events(one, two)
    ]
    assert {"SUM", "ARCHIVE", "RESTORE", "PURGE"} <= {kind for kind, _, _ in history}
    assert banks.fold(json.loads(json.dumps(history))) == json.loads(
        json.dumps(banks.metadata(states[-1]))
    )
