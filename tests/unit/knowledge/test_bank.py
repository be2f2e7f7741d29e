"""The bank is a value: cells sealed, changed and revoked, labels opened and retired."""

from dataclasses import replace

import pytest
import torch
from small_bank import about, embeddings, sealed, total

from fedkola.errors import AccessRefused, BasisMismatch, KnowledgeError, UnknownCell
from fedkola.knowledge import bank as banks
from fedkola.knowledge.bank import Bank, CellKind, ModuleState, Status

HEART = ("heart-1", "heart-2")
CODES = ["heart-1", "heart-2", "heart-1"]


def analytic(bank: Bank) -> banks.Cell:
    return next(cell for cell in bank.cells if cell.about.kind is CellKind.ANALYTIC)


@pytest.mark.parametrize("kind", [CellKind.ANALYTIC, CellKind.ROUTER])
def test_a_row_without_records_does_not_change_the_hash_of_a_cell(kind: CellKind):
    z = embeddings(CODES)
    narrow = banks.content(HEART, total(kind, HEART, CODES, z))
    wide_labels = ("heart-0", "heart-1", "heart-2", "heart-9")
    assert banks.content(wide_labels, total(kind, wide_labels, CODES, z)) == narrow
    other_labels = ("heart-1", "heart-3")
    other_codes = [code.replace("heart-2", "heart-3") for code in CODES]
    assert banks.content(other_labels, total(kind, other_labels, other_codes, z)) != narrow


def test_a_cell_without_rows_by_label_is_hashed_by_its_integers_alone():
    whole = replace(
        total(CellKind.ANALYTIC, HEART, CODES, embeddings(CODES)),
        words={"q.lora_B": torch.ones(2, 2, dtype=torch.int32)},
    )
    assert banks.content(HEART, whole) == banks.content(("heart-1",), whole)


def test_every_bit_of_the_integers_is_in_the_hash_of_a_cell():
    z = embeddings(CODES)
    whole = total(CellKind.ANALYTIC, HEART, CODES, z)
    before = banks.content(HEART, whole)
    for name in whole.words:
        changed = {**whole.words, name: whole.words[name].clone()}
        changed[name].view(-1)[-1] += 1
        assert banks.content(HEART, replace(whole, words=changed)) != before


def test_a_cell_is_named_by_what_it_is_about_and_not_by_who_contributed():
    first = about(CellKind.ANALYTIC, "heart@1", 1, HEART, records=3)
    second = about(CellKind.ANALYTIC, "heart@1", 1, ("heart-1",), records=9)
    assert first.id == second.id
    assert first.id != about(CellKind.ANALYTIC, "heart@1", 2, HEART, records=3).id
    assert first.id != about(CellKind.ROUTER, "heart@1", 1, HEART, records=3).id


def test_the_label_set_grows_as_cells_are_sealed():
    bank = sealed(Bank(), "heart", 1, ("heart-1",), ["heart-1"])
    bank = sealed(bank, "heart", 2, HEART, CODES)
    assert [(entry.code, entry.valid_from) for entry in bank.labels] == [
        ("heart-1", 1.0),
        ("heart-2", 2.0),
    ]
    assert [module.id for module in bank.modules] == ["heart@1"]


def test_a_cell_is_sealed_once():
    bank = sealed(Bank(), "heart", 1, HEART, CODES)
    with pytest.raises(KnowledgeError, match="sealed already"):
        sealed(bank, "heart", 1, HEART, CODES)


def test_modules_take_the_lowest_free_slot_and_are_refused_when_there_is_none():
    bank = banks.open_modules(Bank(), ["a", "b", "a"], round=1, slots_max=3)
    bank = banks.open_modules(bank, ["b", "c"], round=2, slots_max=3)
    assert [(m.id, m.slot, m.opened) for m in bank.modules] == [
        ("a@1", 0, 1),
        ("b@1", 1, 1),
        ("c@1", 2, 2),
    ]
    with pytest.raises(BasisMismatch, match="all 3 slots are taken, d needs one"):
        banks.open_modules(bank, ["d"], round=3, slots_max=3)


def test_withdrawing_keeps_the_cell_until_no_record_is_left():
    bank = sealed(Bank(), "heart", 1, HEART, CODES)
    cell = analytic(bank)
    rest = total(CellKind.ANALYTIC, HEART, CODES[:1], embeddings(CODES)[:1], sites=1)
    smaller = banks.withdraw(bank, cell.about.id, rest, records=1, contributors=1)
    changed = banks.find(smaller, cell.about.id).about
    assert (changed.records, changed.contributors) == (1, 1)
    assert changed.words == banks.content(HEART, rest) != cell.about.words
    nothing = total(CellKind.ANALYTIC, HEART, [], embeddings([]))
    empty = banks.withdraw(smaller, cell.about.id, nothing, records=0, contributors=0)
    assert [revoked.id for revoked in empty.revoked] == [cell.about.id]
    with pytest.raises(UnknownCell, match=cell.about.id):
        banks.find(empty, cell.about.id)
    assert analytic(bank).about == cell.about  # the old bank is still what it was


def test_as_of_times_and_held_modules_choose_the_cells():
    bank = sealed(Bank(), "heart", 1, HEART, CODES)
    bank = sealed(bank, "lung", 2, ("lung-1",), ["lung-1"])

    def chosen(**asof: object) -> list[str]:
        return [c.about.module for c in banks.select(bank, CellKind.ROUTER, **asof)]

    assert chosen() == ["heart@1", "lung@1"]
    assert chosen(known_at=1) == ["heart@1"]
    assert chosen(known_at=0) == []
    assert chosen(valid_at=1.5) == ["heart@1"]
    assert chosen(valid_at=2.0) == ["heart@1", "lung@1"]
    assert chosen(held=["lung@1"]) == ["lung@1"]
    assert chosen(held=["lung@1"], known_at=1) == []


def test_a_retired_label_is_answered_by_its_successor_from_then_on():
    bank = sealed(Bank(), "heart", 1, HEART, CODES)
    bank = banks.retire(bank, "heart-1", valid_to=3.0, replaced_by=["heart-2"])
    assert banks.valid_labels(bank) == {"heart-2": ("heart-2", "heart-1")}
    before = {"heart-1": ("heart-1",), "heart-2": ("heart-2",)}
    assert banks.valid_labels(bank, valid_at=2.0) == before
    assert banks.valid_labels(bank, valid_at=3.0) == {"heart-2": ("heart-2", "heart-1")}
    assert banks.valid_labels(bank, known_at=2) == before


def test_successors_of_successors_answer_and_a_circle_answers_nothing():
    bank = sealed(Bank(), "heart", 1, ("a", "b", "c", "d", "e"), ["a", "b", "c", "d", "e"])
    bank = banks.retire(bank, "a", valid_to=2.0, replaced_by=["b"])
    bank = banks.retire(bank, "b", valid_to=3.0, replaced_by=["c"])
    bank = banks.retire(bank, "d", valid_to=2.0, replaced_by=["e"])
    bank = banks.retire(bank, "e", valid_to=2.0, replaced_by=["d"])
    assert banks.valid_labels(bank, valid_at=2.0) == {"b": ("b", "a"), "c": ("c",)}
    assert banks.valid_labels(bank, valid_at=4.0) == {"c": ("c", "a", "b")}


def test_a_split_label_is_listed_with_both_of_its_successors():
    bank = sealed(Bank(), "heart", 1, ("a", "b", "c"), ["a", "b", "c"])
    bank = banks.retire(bank, "a", valid_to=2.0, replaced_by=["c", "b", "never-opened"])
    assert list(banks.valid_labels(bank).items()) == [("b", ("b", "a")), ("c", ("c", "a"))]


def test_a_label_that_never_arrived_cannot_be_retired():
    with pytest.raises(UnknownCell, match="heart-9 is not in the bank"):
        banks.retire(sealed(Bank(), "heart", 1, HEART, CODES), "heart-9", valid_to=2.0)


def test_events_tell_what_changed_and_nothing_else():
    first = sealed(Bank(), "heart", 1, HEART, CODES)
    kinds = [event["kind"] for event in banks.events(Bank(), first)]
    assert kinds == ["OPEN", "LABEL", "LABEL", "SEAL", "SEAL"]
    assert banks.events(first, first) == ()
    cell = analytic(first).about.id
    rest = total(CellKind.ANALYTIC, HEART, CODES[:1], embeddings(CODES)[:1], sites=1)
    second = banks.withdraw(first, cell, rest, records=1, contributors=1)
    (event,) = banks.events(first, second)
    assert (event["kind"], event["subject"], event["body"]["records"]) == ("WITHDRAW", cell, 1)
    nothing = total(CellKind.ANALYTIC, HEART, [], embeddings([]))
    third = banks.withdraw(second, cell, nothing, records=0, contributors=0)
    assert [event["kind"] for event in banks.events(second, third)] == ["REVOKE"]
    fourth = banks.retire(third, "heart-1", valid_to=2.0)
    (event,) = banks.events(third, fourth)
    assert (event["kind"], event["subject"], event["body"]["valid_to"]) == ("LABEL", "heart-1", 2.0)


def test_the_bytes_of_a_cell_are_those_of_its_integers():
    cell = analytic(sealed(Bank(), "heart", 1, HEART, CODES))
    assert banks.cell_bytes(cell) == 8 * (2 * 16 + 2 + 1 + 1)


def versions(*steps: int) -> Bank:
    """heart@1 sealed in round 1, superseded and filled again in each of these rounds."""
    bank = sealed(Bank(), "heart", 1, HEART, CODES)
    for number in steps:
        bank = banks.supersede(bank, "heart", round=number, slots_max=9)
        bank = sealed(bank, "heart", number, HEART, CODES, seed=number)
    return bank


def test_a_version_answers_until_its_successor_has_a_cell():
    bank = banks.supersede(versions(), "heart", round=2, slots_max=9)
    assert banks.supersede(bank, "heart", round=3, slots_max=9) == bank
    assert [(m.id, m.state) for m in bank.modules] == [
        ("heart@1", ModuleState.ACTIVE),
        ("heart@2", ModuleState.CANDIDATE),
    ]
    assert [c.about.module for c in banks.select(bank, CellKind.ROUTER)] == ["heart@1"]
    bank = sealed(bank, "heart", 3, HEART, CODES)
    first, second = bank.modules
    assert (first.state, first.closed, first.valid_to) == (ModuleState.SUPERSEDED, 3, 3.0)
    assert (second.state, second.version, second.supersedes) == (ModuleState.ACTIVE, 2, "heart@1")
    assert [c.about.module for c in banks.select(bank, CellKind.ROUTER)] == ["heart@2"]


def test_superseded_knowledge_is_answered_as_of_its_own_time():
    bank = versions(3, 5)

    def chosen(**asof: object) -> list[str]:
        return [c.about.module for c in banks.select(bank, CellKind.ANALYTIC, **asof)]

    assert chosen() == ["heart@3"]
    assert chosen(valid_at=2.9) == ["heart@1"]
    assert chosen(valid_at=3.0) == ["heart@2"]
    assert chosen(valid_at=5.0) == ["heart@3"]
    assert chosen(known_at=2) == ["heart@1"]
    assert chosen(known_at=4) == ["heart@2"]
    assert chosen(known_at=4, valid_at=1.0) == ["heart@1"]


def test_a_closed_module_takes_no_cell_and_its_scope_goes_on_in_a_new_version():
    bank = banks.retire_module(versions(), "heart@1", round=2)
    assert banks.select(bank, CellKind.ROUTER) == ()
    assert len(banks.select(bank, CellKind.ROUTER, known_at=1)) == 1
    late = about(CellKind.ROUTER, "heart@1", 2, HEART, records=3)
    with pytest.raises(KnowledgeError, match="heart@1 is closed and takes no cell"):
        banks.seal(bank, late, total(CellKind.ROUTER, HEART, CODES, embeddings(CODES)))
    bank = sealed(bank, "heart", 3, HEART, CODES)
    assert [c.about.module for c in banks.select(bank, CellKind.ROUTER)] == ["heart@2"]
    with pytest.raises(UnknownCell, match="lung has no open module"):
        banks.supersede(bank, "lung", round=3, slots_max=9)


def test_a_cell_weighs_its_quality_times_its_freshness():
    bank = versions()
    cell = analytic(bank)
    assert banks.weight(bank, cell, now=9, half_life=None) == 1.0
    assert banks.weight(bank, cell, now=3, half_life=2.0) == 0.5
    rated = banks.rate(bank, cell.about.id, {"agreement": 0.5, "review": 0.5})
    assert banks.weight(rated, analytic(rated), now=3, half_life=2.0) == 0.125
    modules = (replace(rated.modules[0], half_life=1.0),)
    assert banks.weight(replace(rated, modules=modules), analytic(rated), now=3, half_life=9) == (
        0.0625
    )
    assert analytic(rated).about.words == cell.about.words
    (event,) = banks.events(bank, rated)
    assert event["kind"] == "RATE"
    with pytest.raises(KnowledgeError, match=r"agreement = 1\.5"):
        banks.rate(bank, cell.about.id, {"agreement": 1.5})


def test_a_site_holds_what_its_access_lists_allow():
    bank = banks.open_modules(
        Bank(), ["a", "b"], round=1, slots_max=9, access={"b": ("north", "south")}
    )
    assert banks.held(bank, "north") is None
    assert banks.held(bank, "west") == ("a@1",)
    banks.demand_held(bank, "north", ["a@1", "b@1"])
    with pytest.raises(AccessRefused, match="west may not hold b@1, which is for north, south"):
        banks.demand_held(bank, "west", ["a@1", "b@1"])
    newer = banks.supersede(bank, "b", round=2, slots_max=9)
    assert banks.held(newer, "west") == ("a@1",)
    with pytest.raises(UnknownCell, match="no module 'c'; this bank has a@1, b@1"):
        banks.demand_held(bank, "west", ["c"])


def test_superseding_and_retiring_are_events():
    first = versions()
    second = sealed(banks.supersede(first, "heart", round=2, slots_max=9), "heart", 2, HEART, CODES)
    kinds = [(event["kind"], event["subject"]) for event in banks.events(first, second)]
    assert kinds[:2] == [("SUPERSEDE", "heart@1"), ("OPEN", "heart@2")]
    (event,) = banks.events(second, banks.retire_module(second, "heart@2", round=3))
    assert (event["kind"], event["body"]["closed"]) == ("RETIRE", 3)


def test_a_revoked_cell_says_so():
    bank = versions()
    nothing = total(CellKind.ANALYTIC, HEART, [], embeddings([]))
    bank = banks.withdraw(bank, analytic(bank).about.id, nothing, records=0, contributors=0)
    assert [gone.status for gone in bank.revoked] == [Status.REVOKED]
