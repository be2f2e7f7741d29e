"""Banks that grew apart merge to one, whoever is merged with whom first."""

import json
import random

from hypothesis import given, settings
from hypothesis import strategies as st
from small_bank import embeddings, sealed, total

from fedkola.knowledge import bank as banks
from fedkola.knowledge import merge
from fedkola.knowledge.bank import Bank
from fedkola.knowledge.merge import Branch

LABELS = ("x-1", "x-2", "x-3")
steps = st.lists(
    st.tuples(
        st.sampled_from(["seal", "withdraw", "empty", "retire", "rate"]),
        st.integers(0, 99),
        st.sampled_from(["heart", "lung", "bone"]),
    ),
    max_size=5,
)


def grown(start: Bank, steps: list, *, number: int, third: int) -> tuple[Bank, list]:
    """The bank after these steps and its events. Cells are changed by one branch of three each:
    two different changes of one cell are refused, which is another test."""
    bank, history = start, []
    for what, seed, scope in steps:
        number += 3
        before = bank
        mine = [cell.about for cell in bank.cells if int(cell.about.id, 16) % 3 == third]
        codes = [f"{scope}/{code}" for code in random.Random(seed).choices(LABELS, k=3)]
        labels = tuple(f"{scope}/{label}" for label in LABELS)
        if what == "seal":
            bank = sealed(bank, scope, number, labels, codes, seed=seed)
        elif what == "retire" and bank.labels:
            code = bank.labels[seed % len(bank.labels)].code
            bank = banks.retire(bank, code, valid_to=float(seed), replaced_by=[labels[0]])
        elif what == "rate" and mine:
            bank = banks.rate(bank, mine[seed % len(mine)].id, {"agreement": seed / 99})
        elif what in ("withdraw", "empty") and mine:
            about = mine[seed % len(mine)]
            left = [] if what == "empty" else [about.labels[0]]
            words = total(about.kind, about.labels, left, embeddings(left, seed=seed), sites=1)
            count = len(left)
            bank = banks.withdraw(bank, about.id, words, records=count, contributors=count)
        history += banks.events(before, bank)
    return bank, history


def known(branch: Branch) -> str:
    """Everything that two equal branches have in common, integers by their hashes."""
    return json.dumps([banks.metadata(branch.bank), sorted(branch.earlier)], sort_keys=True)


@given(trunk=steps, ends=st.tuples(steps, steps, steps))
@settings(max_examples=40, deadline=None)
def test_merging_is_commutative_associative_and_idempotent(trunk, ends):
    start, past = grown(Bank(), trunk, number=0, third=0)
    a, b, c = (
        merge.branch(bank, [(e["kind"], e["subject"], e["body"]) for e in past + history])
        for third, end in enumerate(ends)
        for bank, history in [grown(start, end, number=100 + third, third=third)]
    )
    assert known(merge.merge(a, b)) == known(merge.merge(b, a))
    assert known(merge.merge(merge.merge(a, b), c)) == known(merge.merge(a, merge.merge(b, c)))
    whole = merge.merge(a, b)
    assert known(merge.merge(whole, whole)) == known(whole)
    assert known(merge.merge(whole, a)) == known(whole)
    for cell in whole.bank.cells:
        assert banks.content(cell.about.labels, cell.total) == cell.about.words
    revoked = {about.id for side in (a, b) for about in side.bank.revoked}
    assert not revoked & {cell.about.id for cell in whole.bank.cells}
