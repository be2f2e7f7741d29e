"""The bank is the fold of its events, in any order that keeps each cell's and label's own."""

import json
import random

from hypothesis import given, settings
from hypothesis import strategies as st
from small_bank import embeddings, sealed, total

from fedkola.knowledge import bank as banks
from fedkola.knowledge.bank import Bank, CellKind

LABELS = ("x-1", "x-2", "x-3")
steps = st.lists(
    st.tuples(
        st.sampled_from(["seal", "withdraw", "empty", "retire", "supersede", "close", "rate"]),
        st.integers(0, 99),
        st.sampled_from(["heart", "lung"]),
    ),
    max_size=12,
)


def after(bank: Bank, number: int, step: tuple[str, int, str]) -> Bank:
    what, seed, scope = step
    codes = random.Random(seed).choices(LABELS, k=3)
    labels = tuple(f"{scope}/{label}" for label in LABELS)
    if what == "seal" or not bank.cells:
        return sealed(bank, scope, number, labels, [f"{scope}/{code}" for code in codes], seed=seed)
    if what == "supersede" and banks.module_of(bank, scope):
        return banks.supersede(bank, scope, round=number, slots_max=99)
    if what in ("supersede", "close"):
        module = bank.modules[seed % len(bank.modules)].id
        return banks.retire_module(bank, module, round=number)
    if what == "rate":
        cell = bank.cells[seed % len(bank.cells)].about.id
        return banks.rate(bank, cell, {"agreement": seed / 99})
    if what == "retire":
        code = bank.labels[seed % len(bank.labels)].code
        return banks.retire(bank, code, valid_to=number + 0.5, replaced_by=[labels[0]])
    cell = bank.cells[seed % len(bank.cells)].about
    left = [] if what == "empty" else [cell.labels[0]]
    words = total(cell.kind, cell.labels, left, embeddings(left), sites=1)
    return banks.withdraw(bank, cell.id, words, records=len(left), contributors=len(left))


@given(steps=steps, chance=st.randoms(use_true_random=False))
@settings(max_examples=60, deadline=None)
def test_folding_any_interleaving_of_the_events_gives_the_bank(steps, chance):
    bank, history = Bank(), []
    for number, step in enumerate(steps, start=1):
        changed = after(bank, number, step)
        history += banks.events(bank, changed)
        bank = changed
    lines: dict[str, list] = {}
    for event in json.loads(json.dumps(history)):
        lines.setdefault(event["subject"], []).append(event)
    shuffled = []
    while lines:
        subject = chance.choice(sorted(lines))
        shuffled.append(lines[subject].pop(0))
        if not lines[subject]:
            del lines[subject]
    told = [(event["kind"], event["subject"], event["body"]) for event in shuffled]
    assert banks.fold(told) == json.loads(json.dumps(banks.metadata(bank)))


@given(
    first=st.lists(st.sampled_from(LABELS), max_size=8),
    second=st.lists(st.sampled_from(LABELS), min_size=1, max_size=8),
    kind=st.sampled_from([CellKind.ANALYTIC, CellKind.ROUTER]),
)
@settings(max_examples=60, deadline=None)
def test_a_cell_that_lost_records_has_the_hash_of_one_that_never_had_them(first, second, kind):
    z = embeddings([*first, *second], seed=1)
    everything = total(kind, LABELS, [*first, *second], z)
    gone = total(kind, LABELS, first, z[: len(first)])
    left = {name: everything.words[name] - gone.words[name] for name in everything.words}
    left["metric/contributors"] = everything.words["metric/contributors"]
    opened = tuple(dict.fromkeys(second))  # without the other rows and in another order
    never = total(kind, LABELS, second, z[len(first) :])
    kept = [i for i, label in enumerate(LABELS) if label in opened]
    narrow = {**never.words, "sums": never.words["sums"][kept]}
    narrow["counts"] = never.words["counts"][kept]
    names = tuple(LABELS[i] for i in kept)
    one = type(everything)(cohort=("a",), words=left, grid=everything.grid)
    other = type(everything)(cohort=("b",), words=narrow, grid=everything.grid)
    assert banks.content(LABELS, one) == banks.content(names, other)
