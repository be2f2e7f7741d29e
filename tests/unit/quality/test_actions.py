"""What happens to a record: owner, protection, evidence, in this order; nothing without a gate."""

import pytest
import torch

from fedkola.errors import DataError
from fedkola.quality import actions, belief, findings, kept
from fedkola.quality.actions import Evidence, Scan
from fedkola.types import Catalogue, Label

CATALOGUE = Catalogue(
    system="small",
    levels=("label",),
    labels=tuple(Label(code=code, path=(code,), scope="all") for code in ("B01", "B02", "B03")),
)


def _scan(**changes):  # type: ignore[no-untyped-def]
    about = {
        "id": "scan-1",
        "mode": "filter",
        "absorb": False,
        "alpha": 0.05,
        "min_peers": 5,
        "open": True,
        "noise": (0.2, 0.3),
        "trusted": 100,
    }
    return Scan(**{**about, **changes})


def _evidence():  # type: ignore[no-untyped-def]
    """a: flagged, B02 proposed; b: fine; c: flagged, its label is rare elsewhere; d: flagged."""
    return Evidence(
        records=("a", "b", "c", "d"),
        given=torch.tensor([0, 1, 2, 0]),
        ranks=torch.tensor([0.01, 0.9, 0.01, 0.03], dtype=torch.float64),
        scores=torch.tensor([0.0, 1.0, 0.0, 0.1], dtype=torch.float64),
        targets=torch.tensor([[0, 15, 0], [0, 15, 0], [15, 0, 0], [2, 13, 0]]),
        near=torch.tensor(
            [[3.0, 37.0, 1.0], [0.0, 30.0, 0.0], [2.0, 0, 0], [20.0, 21.0, 0]], dtype=torch.float64
        ),
        peers=torch.tensor([40, 60, 2]),
    )


def test_flagged_records_are_left_out_only_through_an_open_gate():
    closed = actions.decide(_evidence(), {}, _scan(open=False))
    assert [each.weight for each in closed] == [15, 15, 15, 15]
    assert [each.action for each in closed] == ["flag", "keep", "protect", "flag"]
    opened = actions.decide(_evidence(), {}, _scan())
    assert [each.weight for each in opened] == [0, 15, 15, 0]


@pytest.mark.parametrize("mode", ["off", "report"])
def test_a_report_changes_no_weight(mode):
    found = actions.decide(_evidence(), {}, _scan(mode=mode))
    assert [each.weight for each in found] == [15, 15, 15, 15]
    assert found[0].code == "LABEL_DISAGREES"


def test_a_rare_label_is_never_called_bad():
    found = actions.decide(_evidence(), {}, _scan())[2]
    assert (found.code, found.action, found.weight) == ("RARE_UNVERIFIED", "protect", 15)


def test_the_owner_comes_before_evidence_and_protection():
    found = actions.decide(_evidence(), {"a": "keep", "c": "exclude"}, _scan())
    assert (found[0].weight, found[0].decided_by, found[0].pinned) == (15, "owner", True)
    assert (found[2].weight, found[2].action) == (0, "exclude")


def test_another_label_is_proposed_only_where_belief_is_near_certain():
    found = actions.decide(_evidence(), {}, _scan())
    assert [each.proposed for each in found] == [1, -1, -1, -1]


def test_weights_fall_with_the_rank():
    found = actions.decide(_evidence(), {}, _scan(mode="down_weight"))
    assert [each.weight for each in found] == [1, 15, 15, 2]


def test_absorbed_records_count_for_what_they_are_believed_to_say():
    scan = _scan(absorb=True)
    found = actions.decide(_evidence(), {"d": "keep"}, scan)
    targets = actions.final_targets(found, _evidence(), scan)
    assert targets.tolist() == [[0, 15, 0], [0, 15, 0], [0, 0, 15], [15, 0, 0]]
    plain = _scan(absorb=True, open=False)
    kept_all = actions.final_targets(actions.decide(_evidence(), {}, plain), _evidence(), plain)
    assert kept_all.sum(1).tolist() == [15, 15, 15, 15]
    assert kept_all[0].tolist() == [15, 0, 0]


def test_evidence_reads_as_a_sentence_and_hides_small_counts():
    found = actions.decide(_evidence(), {}, _scan())
    document = findings.document(found, _evidence(), _scan(), CATALOGUE)
    rows = {row["record"]: row for row in document["findings"]}
    assert rows["a"]["sentence"] == (
        "Of about 41 records nearest to this one at other sites, 37 carry B02 and fewer than 5 "
        "carry B01; this one carries B01."
    )
    assert rows["a"]["evidence"]["agree"] is None
    assert rows["c"]["sentence"] == (
        "Too few records of other sites carry B03: not verified, kept."
    )
    assert "b" not in rows


def test_neighbours_are_those_of_other_sites():
    unit = 256 * belief.UNIT
    carried = torch.tensor([[10, 0], [4, 6]]) * unit
    mine = torch.tensor([[2, 0], [4, 0]]) * unit
    gamma, regions = torch.tensor([[256, 0]]), torch.tensor([[0, 1]])
    assert findings.neighbours(carried, mine, gamma, regions).tolist() == [[8.0, 0.0]]


def test_a_decision_can_be_taken_back_and_survives_a_scan(tmp_path):
    kept.decide(tmp_path, ["a"], "keep")
    kept.leave_out(tmp_path, ["a", "b"])
    assert kept.left_out(tmp_path) == {"b"}
    kept.decide(tmp_path, ["a"], "")
    assert kept.left_out(tmp_path) == {"a", "b"}
    kept.leave_out(tmp_path, [])
    assert kept.left_out(tmp_path) == frozenset()
    with pytest.raises(DataError, match="is no decision"):
        kept.decide(tmp_path, ["a"], "maybe")


def test_a_table_that_is_damaged_is_named(tmp_path):
    (tmp_path / "quality").mkdir()
    (tmp_path / "quality" / "checked.json").write_text("{not json")
    with pytest.raises(DataError, match="is no JSON"):
        kept.checked(tmp_path)
