"""The bank is a value: cells sealed, changed and revoked, labels opened and retired."""

from dataclasses import replace

import pytest
import torch
from small_bank import about, embeddings, sealed, total

from fedkola.errors import BasisMismatch, KnowledgeError, UnknownCell
from fedkola.knowledge import bank as banks
from fedkola.knowledge.bank import Bank, CellKind

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
    assert banks.cell_bytes(cell) == 8 * (16 * 17 // 2 + 2 * 16 + 2 + 1 + 1)
