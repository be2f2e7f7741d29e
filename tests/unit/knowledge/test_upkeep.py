"""The hot bank stays within bounds, and what a change needs comes back."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from small_bank import about, catalogue, embeddings, sealed, total

from fedkola.errors import BasisMismatch, ForgetIncomplete, KnowledgeError
from fedkola.knowledge import archive, compact, router, upkeep, views
from fedkola.knowledge import bank as banks
from fedkola.knowledge.bank import Bank, Cell, CellKind, KnowledgeCell, ModuleState
from fedkola.knowledge.compact import Policy
from fedkola.knowledge.views import Rule
from fedkola.types import Aggregate, Grid

TARGETS = {"q": (10, 24)}
RANK = 2
RULE = Rule(merge="mean")
POLICY = Policy(eps=1.0, recent=2, slots_max=4, spare=2)
SCOPES = ("heart", "lung", "bone", "skin")


def deep(bank: Bank, scope: str, number: int, *, code: str = "", seed: int = 0) -> Bank:
    """The bank with a router and a LoRA cell more; scopes with one ``code`` are near."""
    bank = sealed(bank, scope, number, (f"{scope}-1",), [], kinds=[])
    module = banks.module_of(bank, scope)
    assert module is not None
    z = embeddings([code or scope] * 12, seed=seed + number)
    labels = (f"{scope}-1",)
    rows = about(CellKind.ROUTER, module.id, number, labels, records=12)
    bank = banks.seal(bank, rows, total(CellKind.ROUTER, labels, [f"{scope}-1"] * 12, z))
    recipe = {"rank": RANK, "basis_seed": 0}
    lora = replace(
        rows,
        id=banks.cell_id(
            module=module.id, kind=CellKind.LORA, round=number, slot=module.slot, recipe=recipe
        ),
        kind=CellKind.LORA,
        slot=module.slot,
        recipe=recipe,
    )
    chance = torch.Generator().manual_seed(sum(map(ord, scope)))
    b = torch.round(1024 * 12 * torch.randn(10, RANK, generator=chance)).to(torch.int64)
    words = {"q.lora_B": b, "weight": torch.tensor(12), "metric/contributors": torch.tensor(3)}
    grid = Grid(word=64, bits=64, scale={n: 10 if n == "q.lora_B" else 0 for n in words})
    return banks.seal(bank, lora, Aggregate(cohort=("a", "b", "c"), words=words, grid=grid))


def four(*, code: str = "same") -> Bank:
    """Four modules, one a round, near each other if they share a code."""
    bank = Bank()
    for number, scope in enumerate(SCOPES, start=1):
        bank = deep(bank, scope, number, code=code)
    return bank


def tidied(bank: Bank, folder: Path, *, now: int, policy: Policy = POLICY) -> Bank:
    return upkeep.tidy(bank, policy, folder, now=now, rule=RULE, targets=TARGETS)


def apart(bank: Bank, folder: Path, *scopes: str, now: int = 9) -> Bank:
    return upkeep.parted(
        bank, POLICY, folder, away, now=now, rule=RULE, targets=TARGETS, scopes=scopes
    )


def away(about: KnowledgeCell) -> Cell:
    raise ForgetIncomplete(f"the sites of {about.id} are away")


def slots(bank: Bank) -> set[int | None]:
    return {m.slot for m in bank.modules} | {f.slot for f in bank.fused}


def test_near_modules_that_fell_silent_are_fused_once_slots_run_short(tmp_path: Path):
    bank = four()
    small = tidied(bank, tmp_path, now=9)
    assert sum(len(fused.modules) for fused in small.fused) >= 3
    assert len(slots(small) - {None}) == 2
    states = {m.id: m.state for m in small.modules}
    assert all(states[name] is ModuleState.COMPACTED for f in small.fused for name in f.modules)
    assert not any(c.about.module in f.modules for f in small.fused for c in loras(small))
    modules = views.adapters(loras(bank), RULE, {c.about.id: 1.0 for c in loras(bank)}, TARGETS)
    for fused in small.fused:
        exact = compact.measured([modules[n] for n in fused.modules], fused.shares, fused.adapter)
        assert abs(exact - fused.error) < 1e-4
        assert 0 < fused.error < 1
    assert tidied(small, tmp_path, now=10) == small
    kinds = [event["kind"] for event in banks.events(bank, small)]
    assert {"COMPACT", "ARCHIVE", "FUSE"} == set(kinds)


def loras(bank: Bank) -> tuple[Cell, ...]:
    return banks.of_kind(bank, CellKind.LORA)


def test_modules_that_speak_are_far_or_for_others_are_not_fused(tmp_path: Path):
    assert not tidied(four(), tmp_path, now=4).fused[1:]  # bone and skin spoke a moment ago
    far = Bank()
    for number, scope in enumerate(SCOPES, start=1):
        far = deep(far, scope, number)
    assert tidied(far, tmp_path, now=9) == far
    idle = upkeep.tidy(
        far, POLICY, tmp_path, now=9, rule=replace(RULE, half_life=4.0), targets=TARGETS
    )
    assert idle.fused  # silent for a half-life
    bank = four()
    modules = tuple(replace(m, access=(m.scope,)) for m in bank.modules)
    assert not tidied(replace(bank, modules=modules), tmp_path, now=9).fused
    assert not tidied(bank, tmp_path, now=9, policy=replace(POLICY, eps=1e-3)).fused
    with pytest.raises(BasisMismatch, match=r"all 4 slots are taken.*knowledge.compact_eps"):
        banks.open_modules(bank, ["eye"], round=5, slots_max=4)


def test_a_module_that_speaks_again_leaves_its_fused_adapter_and_the_rest_stays(tmp_path: Path):
    bank = four()
    small = tidied(bank, tmp_path, now=9, policy=replace(POLICY, spare=3))
    (fused,) = small.fused
    assert set(fused.modules) == {f"{scope}@1" for scope in SCOPES}
    left = apart(small, tmp_path, "heart")
    assert [set(f.modules) for f in left.fused] == [{"lung@1", "bone@1", "skin@1"}]
    heart = banks.find_module(left, "heart@1")
    assert (heart.state, heart.slot) == (ModuleState.ACTIVE, 0)
    assert apart(left, tmp_path) == left
    newer = banks.supersede(left, "lung", round=10, slots_max=9)
    newer = deep(newer, "lung", 10, code="same")
    with pytest.raises(KnowledgeError, match="reads only some"):
        views.compute(newer, TREE, RULE, now=10, targets=TARGETS)
    again = apart(newer, tmp_path)
    assert [set(f.modules) for f in again.fused] == [{"bone@1", "skin@1"}]
    view = views.compute(again, TREE, RULE, now=10, targets=TARGETS)
    assert set(view.adapters) == {"heart@1", "lung@2", again.fused[0].id}


TREE = catalogue({f"{scope}-1": scope for scope in SCOPES})


def test_a_fused_adapter_takes_the_probability_of_its_modules(tmp_path: Path):
    small = tidied(four(), tmp_path, now=9, policy=replace(POLICY, spare=3))
    grown = views.compute(four(), TREE, RULE, now=9, targets=TARGETS)
    view = views.compute(small, TREE, RULE, now=9, targets=TARGETS)
    assert list(view.adapters) == [small.fused[0].id]
    assert view.id != grown.id
    assert set(view.modules) == set(grown.modules)
    p = router.posterior(view.router, embeddings(["same"]), tau=1.0)
    assert torch.allclose(views.gate(view, p, top_k=3), torch.ones(1, 1))
    assert views.gate(grown, p, top_k=3).count_nonzero() == 3
    document, tensors = views.to_tensors(view)
    assert views.from_tensors(document, tensors).gates == view.gates
    with pytest.raises(KnowledgeError, match="reads only some"):
        views.compute(small, TREE, RULE, now=9, targets=TARGETS, held=["heart@1"])
    only = archive.as_of(small, tmp_path, valid_at=None, known_at=None, held=["heart@1"])
    held = views.compute(only, TREE, RULE, now=9, targets=TARGETS, held=["heart@1"])
    assert list(held.adapters) == ["heart@1"]


def test_purged_cells_are_collected_and_a_failed_collection_changes_nothing(tmp_path: Path):
    bank = four()
    cells = {cell.about.id: cell for cell in bank.cells}
    small = archive.purge(tidied(bank, tmp_path, now=9, policy=replace(POLICY, spare=3)))
    archive.sweep(tmp_path, small)
    name = small.fused[0].cells[0]
    with pytest.raises(ForgetIncomplete, match="are away"):
        upkeep.touch(small, [name], tmp_path, away)
    back = upkeep.touch(
        small, [name], tmp_path, lambda about: replace(cells[about.id], about=about)
    )
    assert {c.about.id: c.about.words for c in back.cells} == {
        n: c.about.words for n, c in cells.items()
    }
    assert [(m.id, m.slot) for m in back.modules] == [(m.id, m.slot) for m in bank.modules]


def test_a_hundred_windows_stay_within_bounds(tmp_path: Path):
    policy = replace(POLICY, hot_cells=30, slots_max=6)
    bank = Bank()
    for number in range(1, 101):
        scope = f"scope-{number // 8}"
        bank = upkeep.parted(
            bank, policy, tmp_path, away, now=number, rule=RULE, targets=TARGETS, scopes=[scope]
        )
        bank = banks.open_modules(bank, [scope], round=number, slots_max=6)
        bank = deep(bank, scope, number, code=f"family-{number // 8 % 2}")
        bank = tidied(bank, tmp_path, now=number, policy=policy)
        assert len(bank.cells) <= 30 + 2
        assert len(slots(bank) - {None}) <= 6
    assert len(bank.modules) == 13
    assert len([a for a in banks.origins(bank) if a.kind is CellKind.ROUTER]) == 100
