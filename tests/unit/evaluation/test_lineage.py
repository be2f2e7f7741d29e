"""What the record of a bank says to a person."""

import json
from collections.abc import Sequence

import pytest
from small_bank import embeddings, sealed, total

from fedkola.errors import PlanError, UnknownCell
from fedkola.evaluation import lineage
from fedkola.knowledge import bank as banks
from fedkola.knowledge.bank import Bank
from fedkola.ledger import EventRow

HEART = ("heart-1", "heart-2")
CODES = ["heart-1", "heart-2", "heart-1"]
NOON = 1_795_348_800.0  # 2026-11-22 12:00:00 UTC


def rows(steps: Sequence[Bank]) -> list[EventRow]:
    """The ledger of a bank that went through these states, one round an hour."""
    found: list[EventRow] = []
    for number, (before, after) in enumerate(zip([Bank(), *steps], steps, strict=False), start=1):
        for event in json.loads(json.dumps(banks.events(before, after))):
            found.append(
                EventRow(
                    seq=len(found) + 1,
                    round=number,
                    kind=event["kind"],
                    subject=event["subject"],
                    body=event["body"],
                    prev="",
                    hash=f"{len(found) + 1:064x}",
                    at=NOON + 3600 * number,
                )
            )
    return found


def history() -> list[Bank]:
    """Sealed, superseded by a version that is sealed a round later, then a label retired."""
    first = sealed(Bank(), "heart", 1, HEART, CODES)
    second = sealed(first, "lung", 2, ("lung-1",), ["lung-1"])
    waiting = banks.supersede(second, "heart", round=3, slots_max=9)
    third = sealed(waiting, "heart", 3, HEART, CODES[:2], seed=3)
    return [first, second, third, banks.retire(third, "heart-1", valid_to=4.0)]


def test_a_lineage_names_versions_their_cells_and_who_superseded_whom():
    steps = history()
    document = lineage.lineage(steps[-1], rows(steps), "heart@1")
    assert document == lineage.lineage(steps[-1], rows(steps), "heart")
    first, second = document["versions"]
    assert (first["state"], first["superseded_by"], first["closed"]) == ("superseded", "heart@2", 3)
    assert (second["state"], second["supersedes"], second["records"]) == ("active", "heart@1", 2)
    assert [(c["kind"], c["round"], c["records"]) for c in first["cells"]] == [
        ("analytic", 1, 3),
        ("router", 1, 3),
    ]
    assert {c["sealed"] for c in second["cells"]} == {"2026-11-22 15:00:00"}
    with pytest.raises(UnknownCell, match="no scope or module 'bone'; this bank has heart, lung"):
        lineage.lineage(steps[-1], rows(steps), "bone")


def test_the_past_is_read_from_the_events_up_to_a_round_or_a_date():
    steps = history()
    events = rows(steps)
    then = lineage.as_of(events, round=2)
    assert [(m["id"], m["state"], m["labels"], m["records"]) for m in then["modules"]] == [
        ("heart@1", "active", 2, 3),
        ("lung@1", "active", 1, 1),
    ]
    assert then == {**lineage.as_of(events, date="2026-11-22T14:30"), "when": "after round 2"}
    now = lineage.as_of(events, date="2026-11-22")
    assert [(m["id"], m["state"]) for m in now["modules"]] == [
        ("heart@1", "superseded"),
        ("lung@1", "active"),
        ("heart@2", "active"),
    ]
    assert now["modules"][0]["retired_labels"] == 1
    assert now["chain_head"] == events[-1].hash


def test_a_past_before_the_first_event_and_a_wrong_date_are_refused():
    events = rows(history())
    with pytest.raises(
        PlanError, match=r"knew nothing at 2026-11-21; its first event is 2026-11-22"
    ):
        lineage.as_of(events, date="2026-11-21")
    with pytest.raises(PlanError, match="'last week' is not ISO 8601"):
        lineage.as_of(events, date="last week")
    with pytest.raises(PlanError, match="give a round or a date"):
        lineage.as_of(events)


def test_the_log_says_every_event_in_words_and_can_be_narrowed():
    steps = history()
    revoked = banks.withdraw(
        steps[-1],
        steps[-1].cells[0].about.id,
        total(steps[-1].cells[0].about.kind, HEART, [], embeddings([])),
        records=0,
        contributors=0,
    )
    events = rows([*steps, revoked])
    said = {(row["kind"], row["subject"]): row["what"] for row in lineage.log(events)}
    assert (
        said["SUPERSEDE", "heart@1"]
        == "superseded; it holds until 3 and answers as of earlier times"
    )
    assert said["OPEN", "heart@2"] == "heart opened as version 2 in slot 2, to supersede heart@1"
    assert said["LABEL", "heart-1"] == "closed at 4, replaced by nothing"
    assert "heart@1 (analytic), 3 records of 3 sites, 2 labels" in said.values()
    assert "heart@1 (analytic), 0 records left, too few to stay open" in said.values()
    assert [row["kind"] for row in lineage.log(events, kinds=["revoke"])] == ["REVOKE"]
    assert {row["round"] for row in lineage.log(events, since=3)} == {3, 4, 5}
    assert {row["round"] for row in lineage.log(events, subject="lung")} == {2}
    with pytest.raises(UnknownCell, match="no event of kind PURGE; this run has LABEL, OPEN"):
        lineage.log(events, kinds=["purge"])


def test_labels_are_listed_with_their_records_and_what_replaced_them():
    bank = banks.retire(history()[2], "heart-1", valid_to=9.0, replaced_by=["heart-2"])
    listed = lineage.labels(bank, now=3)
    assert [(row["code"], row["open"], row["records"]) for row in listed] == [
        ("heart-1", True, 3),
        ("heart-2", True, 2),
        ("lung-1", True, 1),
    ]
    (row,) = lineage.labels(bank, now=9, closed=True)
    assert (row["code"], row["open"], row["replaced_by"]) == ("heart-1", False, ["heart-2"])
    assert [row["code"] for row in lineage.labels(bank, scope="lung")] == ["lung-1"]
    with pytest.raises(UnknownCell, match="no scope 'bone'"):
        lineage.labels(bank, scope="bone")


def test_a_chronicle_marks_when_cells_came_and_tells_only_what_is_not_routine():
    steps = history()
    after = steps[-1]
    for about in [cell.about for cell in after.cells[:2]]:
        less = total(about.kind, HEART, ["heart-1"], embeddings(["heart-1"]))
        after = banks.withdraw(after, about.id, less, records=1, contributors=3)
    told = lineage.chronicle(after, rows([*steps, after]))
    marks = {version["id"]: version["marks"] for version in told["versions"]}
    assert marks == {
        "heart@1": [(1, "sealed"), (5, "changed")],
        "heart@2": [(3, "sealed")],
        "lung@1": [(2, "sealed")],
    }
    assert [(c["round"], c["about"], c["what"]) for c in told["changes"]] == [
        (3, "heart@1", "superseded; it holds until 3 and answers as of earlier times"),
        (4, "heart-1", "closed at 4, replaced by nothing"),
        (
            5,
            "heart@1",
            "heart@1 (analytic, router), 1 records of 3 sites left after a removal or a revision",
        ),
    ]


def test_what_was_flagged_is_said_in_words():
    assert "2 windows do not fit" in lineage.sentence("MISFIT", {"windows": 2})
    assert "disagree with this label" in lineage.sentence("DOUBT", {"round": 2})
    assert "records of round 1 arrived anew" in lineage.sentence("REVISE", {"round": 1})
