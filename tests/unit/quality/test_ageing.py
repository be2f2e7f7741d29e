"""Each line of the table of verdicts by hand, and changes of a region against chance."""

from typing import Any

import numpy as np
import pytest

from fedkola.quality import ageing
from fedkola.quality.ageing import (
    DISAGREES,
    FINE,
    NOVEL,
    SUPERSEDED,
    UNCONFIRMED,
    UNIT,
    Change,
    Dated,
    Registry,
)

# Labels: OLD ended with window 2, NEW began in window 4, the others are as old as the federation.
OLD, NEW, HEART, LUNG = range(4)
REGISTRY = Registry(opened=np.array([1, 4, 1, 1]), closed=np.array([2, 9, 9, 9]))
# Region 1 called its records HEART before window 3 and LUNG from then on.
CHANGE = Change(split=np.array([0, 3]), before=np.array([0, HEART]), after=np.array([0, LUNG]))
NOW = 4


def verdict(
    label: int, window: int, *, region: int = 0, flagged: bool = False, told: int = 0
) -> str:
    """What becomes of one record at a site, where so many sites carry the same."""
    records = dated([(label, region, window, 0, flagged)])
    carried = np.zeros((4, 2), np.int64)
    carried[label, region] = told
    found = ageing.verdicts(records, registry=REGISTRY, change=CHANGE, carried=carried, now=NOW)
    return str(found[0])


def dated(rows: list[tuple[int, int, int, int, bool]]) -> Dated:
    label, region, window, text, flagged = (np.array(column) for column in zip(*rows, strict=True))
    return Dated(label=label, region=region, window=window, text=text, flagged=flagged)


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        # An ordinary record, and one that disagrees with what everybody knows.
        ({"label": HEART, "window": 1}, FINE),
        ({"label": HEART, "window": 1, "flagged": True}, DISAGREES),
        ({"label": HEART, "window": NOW, "flagged": True, "told": 1}, DISAGREES),
        # The label ended. One that never fitted is wrong, not outdated.
        ({"label": OLD, "window": 2}, SUPERSEDED),
        ({"label": OLD, "window": 3}, FINE),
        ({"label": OLD, "window": 2, "flagged": True}, DISAGREES),
        # A region changed its name.
        ({"label": HEART, "window": 2, "region": 1, "flagged": True}, SUPERSEDED),
        ({"label": HEART, "window": 3, "region": 1, "flagged": True}, DISAGREES),
        ({"label": LUNG, "window": 3, "region": 1, "flagged": True}, NOVEL),
        ({"label": LUNG, "window": 2, "region": 1, "flagged": True}, DISAGREES),
        # Young: two sites that say the same are believed, one waits where its label is young too.
        ({"label": HEART, "window": NOW, "flagged": True, "told": 2}, NOVEL),
        ({"label": HEART, "window": NOW - 1, "flagged": True, "told": 2}, DISAGREES),
        ({"label": NEW, "window": NOW, "flagged": True, "told": 1}, UNCONFIRMED),
        ({"label": NEW, "window": NOW, "told": 2}, NOVEL),
        ({"label": NEW, "window": NOW, "told": 1}, FINE),
    ],
)
def test_every_line_of_the_table(given: dict[str, Any], expected: str):
    assert verdict(**given) == expected


def test_a_newer_version_of_the_same_text_replaces_the_old_one_unless_it_is_in_doubt():
    rows = [(HEART, 0, 1, 7, False), (LUNG, 0, 3, 7, False), (HEART, 0, 1, 8, False)]
    carried = np.zeros((4, 2), np.int64)
    found = [
        ageing.verdicts(
            dated(given), registry=REGISTRY, change=CHANGE, carried=carried, now=NOW
        ).tolist()
        for given in (rows, [rows[0], (LUNG, 0, 3, 7, True), rows[2]])
    ]
    assert found == [[SUPERSEDED, FINE, FINE], [FINE, DISAGREES, FINE]]


def test_carriers_are_counted_by_site_and_only_where_they_are_young():
    records = dated([(HEART, 0, NOW, 0, False)] * 3 + [(LUNG, 1, NOW - 1, 1, False)])
    found = ageing.carriers(records, now=NOW, labels=4, regions=2)
    assert found[HEART, 0] == 1
    assert found.sum() == 1


def test_without_a_registry_labels_begin_where_their_counts_do_and_never_end():
    counts = np.zeros((3, 2, 4), np.int64)
    counts[0, 1, 0], counts[1, 0, 2:] = 5, 7
    registry = Registry.of_counts(counts)
    assert registry.opened.tolist() == [1, 3, 5]
    assert (registry.closed > 4).all()


def drawn(seed: int, *, moves: int) -> tuple[ageing.Ints, ageing.Ints]:
    """60 regions over 6 windows, each with its own mix of 5 labels; ``moves`` of them have another
    mix from window 4 on."""
    random = np.random.default_rng(seed)
    counts = np.zeros((5, 60, 6), np.int64)
    for region in range(60):
        mixes = [random.dirichlet(np.ones(5)), random.dirichlet(np.ones(5))]
        if region < moves:
            mixes = [np.array([0.9, 0.1, 0, 0, 0]), np.array([0, 0.1, 0.9, 0, 0])]
        for window in range(6):
            mix = mixes[1] if region < moves and window >= 3 else mixes[0]
            counts[:, region, window] = UNIT * random.multinomial(40, mix)
    return counts, np.full((60, 6), 4)


def test_regions_that_change_are_found_with_their_window_and_few_others_are():
    found = [ageing.changes(*drawn(seed, moves=6)) for seed in range(10)]
    for change in found:
        assert change.split[:6].tolist() == [4] * 6
        assert set(change.before[:6]) == {0}
        assert set(change.after[:6]) == {2}
    assert sum(int((change.split[6:] > 0).sum()) for change in found) <= 5


def test_without_any_change_hardly_a_region_changes():
    found = [ageing.changes(*drawn(seed, moves=0)).split for seed in range(20)]
    assert sum(int((split > 0).sum()) for split in found) <= 3


def test_a_change_that_too_few_sites_or_records_show_is_none():
    counts, holders = drawn(0, moves=6)
    assert (ageing.changes(counts, holders, k_min=5).split == 0).all()
    assert (ageing.changes(counts // 40, holders).split == 0).all()
