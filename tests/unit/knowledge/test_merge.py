"""What a merge keeps, and what it refuses."""

from dataclasses import replace

import pytest
from small_bank import embeddings, sealed, total

from fedkola.errors import BasisMismatch, KnowledgeError
from fedkola.knowledge import bank as banks
from fedkola.knowledge import merge
from fedkola.knowledge.bank import Bank, CellKind
from fedkola.knowledge.merge import Branch

HEART = ("heart-1", "heart-2")
CODES = ["heart-1", "heart-2", "heart-1"]


def smaller(bank: Bank, codes: list[str], *, seed: int = 0) -> Bank:
    """The bank whose first cell was left with these records."""
    about = bank.cells[0].about
    rest = total(about.kind, about.labels, codes, embeddings(codes, seed=seed), sites=3)
    return banks.withdraw(bank, about.id, rest, records=len(codes), contributors=len(codes))


def branch(*states: Bank) -> Branch:
    """The last of these banks, with the past that the others are."""
    history = [
        (event["kind"], event["subject"], event["body"])
        for before, after in zip([Bank(), *states], states, strict=False)
        for event in banks.events(before, after)
    ]
    return merge.branch(states[-1], history)


def test_knowledge_of_both_is_kept_and_a_removal_of_one_side_holds():
    trunk = sealed(Bank(), "heart", 1, HEART, CODES)
    removed = smaller(trunk, CODES[:1])
    grown = sealed(trunk, "lung", 2, ("lung-1",), ["lung-1"])
    for whole in (
        merge.merge(branch(trunk, removed), branch(trunk, grown)).bank,
        merge.merge(branch(trunk, grown), branch(trunk, removed)).bank,
    ):
        words = {cell.about.id: cell.about.words for cell in whole.cells}
        assert words[trunk.cells[0].about.id] == removed.cells[0].about.words
        assert [cell.about.round for cell in whole.cells] == [1, 1, 2, 2]
        assert [module.id for module in whole.modules] == ["heart@1", "lung@1"]


def test_a_revoked_cell_stays_revoked():
    trunk = sealed(Bank(), "heart", 1, HEART, CODES)
    whole = merge.merge(branch(trunk, smaller(trunk, [])), branch(trunk)).bank
    assert [cell.about.kind for cell in whole.cells] == [CellKind.ROUTER]
    assert [about.id for about in whole.revoked] == [trunk.cells[0].about.id]


def test_two_sums_under_one_name_are_refused():
    one = sealed(Bank(), "heart", 1, HEART, CODES)
    other = sealed(Bank(), "heart", 1, HEART, CODES, seed=1)
    with pytest.raises(KnowledgeError, match="neither replaced the other"):
        merge.merge(branch(one), branch(other))
    left, right = smaller(one, CODES[:1]), smaller(one, CODES[:2])
    with pytest.raises(KnowledgeError, match="ask for the same removals in both runs"):
        merge.merge(branch(one, left), branch(one, right))


def rebased(bank: Bank, **changes: object) -> Bank:
    cells = tuple(
        replace(cell, about=replace(cell.about, **changes))  # type: ignore[arg-type]
        for cell in bank.cells
    )
    return replace(bank, cells=cells)


def test_banks_of_different_bases_are_refused():
    one = rebased(sealed(Bank(), "heart", 1, HEART, CODES), base="aa")
    other = rebased(sealed(Bank(), "lung", 1, ("lung-1",), ["lung-1"]), base="bb")
    with pytest.raises(BasisMismatch, match=r"different base models: \['aa'\] and \['bb'\]"):
        merge.merge(branch(one), branch(other))
    merge.merge(branch(one), branch(rebased(other, base="aa")))
    wide = rebased(other, base="aa", recipe={"features": 32, "bits": 4, "seed": 0})
    with pytest.raises(BasisMismatch, match=r"features 16, bits 4, seed 0.*under the other's plan"):
        merge.merge(branch(one), branch(wide))


def test_modules_must_agree_on_who_may_hold_them():
    one = banks.open_modules(Bank(), ["heart"], round=1, slots_max=4)
    other = banks.open_modules(Bank(), ["heart"], round=1, slots_max=4, access={"heart": ["north"]})
    with pytest.raises(KnowledgeError, match=r"access = \(\) in one bank and \('north',\)"):
        merge.merge(branch(one), branch(other))


def test_adapters_of_two_modules_in_one_slot_are_refused():
    def deep(scope: str, slot: int) -> Bank:
        bank = sealed(Bank(), scope, 1, HEART, CODES, kinds=[CellKind.ROUTER])
        return rebased(bank, kind=CellKind.LORA, slot=slot)

    merge.merge(branch(deep("heart", 0)), branch(deep("lung", 1)))
    with pytest.raises(BasisMismatch, match="are in slot 0, where the other bank has heart@1"):
        merge.merge(branch(deep("heart", 0)), branch(deep("lung", 0)))


def test_a_superseded_module_stays_superseded():
    trunk = sealed(Bank(), "heart", 1, HEART, CODES)
    newer = sealed(banks.supersede(trunk, "heart", round=2, slots_max=9), "heart", 2, HEART, CODES)
    late = sealed(trunk, "heart", 3, HEART, CODES, seed=3)
    whole = merge.merge(branch(trunk, newer), branch(trunk, late)).bank
    assert [(m.id, m.state.value, m.closed) for m in whole.modules] == [
        ("heart@1", "superseded", 2),
        ("heart@2", "active", None),
    ]
    assert [c.about.round for c in banks.select(whole, CellKind.ROUTER)] == [2]
