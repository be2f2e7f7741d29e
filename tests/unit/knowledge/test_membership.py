"""The residual test: what it must see in a memorising model, and what it must not see in chance."""

import math

import small_bank as small
import torch

from fedkola.knowledge import membership, views
from fedkola.knowledge.bank import Bank
from fedkola.knowledge.membership import BINS, counted
from fedkola.knowledge.views import Rule

CODES = ("a", "b", "c", "d")


def counts(*values: float) -> torch.Tensor:
    return counted(torch.tensor(values))


def test_an_auc_by_hand_with_a_tie():
    # Of six pairs (2 or 0) x (1, 0, -3): 2 wins three, 0 wins one and ties one.
    assert membership.auc(counts(2, 0), counts(1, 0, -3)) == 4.5 / 6
    assert membership.auc(counts(1, 0, -3), counts(2, 0)) == 1.5 / 6
    assert membership.auc(counts(), counts(1)) == 0.5


def test_bins_keep_the_order_and_take_every_margin():
    values = [-math.inf, -1e9, -1.0, -0.01, 0.0, 0.01, 1.0, 1e9, math.inf]
    bins = [int(counts(value).argmax()) for value in values]
    assert bins == sorted(bins)
    assert (bins[0], bins[-1]) == (0, BINS - 1)
    assert int(counts(*values).sum()) == len(values)


def test_a_margin_is_the_distance_to_the_best_other_label():
    codes = list(CODES) * 6
    bank = small.sealed(Bank(), "s", 1, CODES, codes)
    catalogue = small.catalogue(dict.fromkeys(CODES, "s"))
    view = views.compute(bank, catalogue, Rule(readout="pooled"), now=1)
    z = small.embeddings(["a", "b", "?"], seed=3)
    found = membership.margins(view, z, ["a", "c", "unheard"])
    assert view.head is not None
    scores = views.scores(view.head, z, 0)
    assert found[0] == scores[0, 0] - scores[0, 1:].max()
    assert found[1] == scores[1, 2] - scores[1, [0, 1, 3]].max()
    assert found[1] < 0 < found[0]
    assert found[2] == -math.inf


def test_a_view_with_one_label_has_no_other_to_compare_with():
    bank = small.sealed(Bank(), "s", 1, ("a",), ["a"] * 4)
    view = views.compute(bank, small.catalogue({"a": "s"}), Rule(), now=1)
    assert membership.margins(view, small.embeddings(["a"]), ["a"]).tolist() == [math.inf]


def test_members_of_a_memorising_view_are_seen_and_forgotten_ones_are_not():
    """Labels at random: whatever the view knows of a record, it has learnt by heart."""
    chance = torch.Generator().manual_seed(5)
    z = torch.randint(-300, 301, (240, small.WIDTH), generator=chance, dtype=torch.int16)
    drawn = torch.randint(0, len(CODES), (240,), generator=chance).tolist()
    codes = [CODES[i] for i in drawn]
    catalogue = small.catalogue(dict.fromkeys(CODES, "s"))

    def view(rows: slice) -> views.View:
        bank = small.banks.open_modules(Bank(), ["s"], round=1, slots_max=1)
        about = small.about(small.CellKind.ANALYTIC, "s@1", 1, CODES, records=60)
        total = small.total(small.CellKind.ANALYTIC, CODES, codes[rows], z[rows])
        return views.compute(small.banks.seal(bank, about, total), catalogue, Rule(), now=1)

    def counts_under(model: views.View) -> torch.Tensor:
        parts = (slice(0, 60), slice(60, 120), slice(120, 180))
        found = [counted(membership.margins(model, z[p], codes[p])) for p in parts]
        return torch.stack(found)

    before = counts_under(view(slice(0, 60)))
    result = membership.evidence(before, before)
    assert result is not None
    assert result.low > 0.55
    gone = membership.evidence(before, counts_under(view(slice(180, 240))), seed=1)
    assert gone is not None
    assert gone.before == result.auc
    assert gone.low < 0.5 < gone.high
    assert (gone.forgotten, gone.never) == (60, 120)


def test_too_few_records_give_no_evidence():
    few = torch.zeros(3, BINS, dtype=torch.int64)
    few[:, 7] = 31
    assert membership.evidence(few, few) is None
    few[:, 7] = 32
    found = membership.evidence(few, few)
    assert found is not None
    assert (found.auc, found.null, found.never) == (0.5, 0.5, 64)
