"""Runs and removals: refused plans, absent and late sites, and forgetting that leaves no trace."""

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import small_federation as small
from safetensors.torch import load_file

from fedkola import removal, server
from fedkola.errors import (
    CohortTooSmall,
    Incompatible,
    KnowledgeError,
    PlanError,
    UnknownCell,
    UnknownName,
)
from fedkola.federation import load_state
from fedkola.knowledge import bank as banks
from fedkola.knowledge import forget, journal
from fedkola.knowledge.bank import CellKind
from fedkola.knowledge.forget import ForgetReceipt, Request
from fedkola.ledger import Ledger
from fedkola.plan import as_dict, digest

FAST = 'knowledge.lanes=["analytic", "router"]'
SITE = Request(kind="site", site="west")
PATIENT = Request(kind="patient", site="north", name="north-p3")
RECORD = Request(kind="record", site="east", name="east-4")


# --- what is refused before round 1 ---------------------------------------------------------------


@pytest.mark.parametrize(
    ("setting", "error", "message"),
    [
        ("algorithm.name=sgd", UnknownName, "algorithm.name = 'sgd'"),
        ("engine.name=flower", UnknownName, "engine.name = 'flower'"),
        ("privacy.epsilon=8", Incompatible, "can promise no epsilon"),
        ("quality.mode=robust", PlanError, "quality.mode was given 'robust'; expected one of off"),
        ("knowledge.membership=enrolled", Incompatible, "padded"),
        ("algorithm.ranks.north=2", Incompatible, "cannot add"),
        ("cohort.minimum=2", Incompatible, "k_min"),
        ("knowledge.slots_max=9", Incompatible, "room for 8"),
        ("task.level=chapter", UnknownName, "task.level"),
    ],
)
def test_a_plan_that_cannot_hold_is_refused_before_anything_runs(
    tmp_path: Path, setting: str, error: type[Exception], message: str
):
    with pytest.raises(error, match=message):
        small.assemble(tmp_path, setting)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (("algorithm.name=flora",), "reads single answers"),
        (("algorithm.name=joint",), "reads single answers"),
        (("algorithm.name=fedit", "cohort.minimum=2"), "cohort.minimum = 2"),
        (("cohort.minimum=4", "privacy.colluders=2"), "k_min = 3"),
    ],
)
def test_secure_aggregation_is_refused_where_single_answers_would_show(
    tmp_path: Path, settings: tuple[str, ...], message: str
):
    with pytest.raises(Incompatible, match=message):
        small.assemble(tmp_path, "privacy.secure_sum=true", *settings)


def test_secure_aggregation_is_refused_below_three_sites(tmp_path: Path):
    two = {name: small.records(name) for name in ("north", "west")}
    with pytest.raises(Incompatible, match="with 2 sites"):
        small.assemble(tmp_path, "privacy.secure_sum=true", sites=two)


# --- rounds ---------------------------------------------------------------------------------------


def reports(folder: Path) -> list[dict[str, Any]]:
    with Ledger.open(folder) as ledger:
        return [dict(row.report) for row in ledger.rounds("small")]


def test_a_round_is_one_row_with_cohort_traffic_and_measures(tmp_path: Path):
    federation = small.assemble(tmp_path, FAST)
    with Ledger.open(tmp_path, create=True) as ledger:
        server.run(
            federation,
            ledger,
            observe=lambda number, state: {"cells": float(len(state.bank.cells))},
            progress=lambda report: None,
        )
        assert ledger.run().state == "done"
        ledger.verify("small")
    rows = reports(tmp_path)
    assert [(row["round"], row["metrics"]) for row in rows] == [
        (1, {"cells": 3.0}),
        (2, {"cells": 8.0}),
        (3, {"cells": 13.0}),
    ]
    assert all(tuple(row["cohort"]) == small.SITES and row["refused"] == {} for row in rows)
    assert all(row["bytes_up"] > 0 < row["bytes_down"] for row in rows)


def test_a_site_that_raises_and_one_that_answers_garbage_are_refused_rows(tmp_path: Path):
    def raises(answer: small.Answer) -> small.Answer:
        def reply(message: bytes) -> bytes:
            raise MemoryError("out of memory")

        return reply

    def garbage(answer: small.Answer) -> small.Answer:
        return lambda message: b"\x00" * 50

    wrap = {"west": raises, "east": garbage}
    state = small.run(small.assemble(tmp_path / "bad", FAST, wrap=wrap))
    refused = {"west": "Unreachable", "east": "WireError"}
    assert [row["refused"] for row in reports(tmp_path / "bad")] == [refused] * 3
    honest = {site: small.records(site) for site in ("north", "south", "centre")}
    alone = small.run(small.assemble(tmp_path / "alone", FAST, sites=honest))
    assert small.cells(state) == small.cells(alone)


def test_a_site_whose_records_break_its_step_is_refused_by_its_code(tmp_path: Path):
    sites = small.data()
    whole = sites["west"]
    sites["west"] = small.replace(whole, labels=("no such label", *whole.labels[1:]))
    state = small.run(small.assemble(tmp_path, FAST, sites=sites))
    assert [row["refused"] for row in reports(tmp_path)] == [{"west": "StepFailed"}] * 3
    assert {cell.about.contributors for cell in state.bank.cells} == {4}


def test_fewer_answers_than_the_minimum_stop_the_run_and_it_can_go_on(tmp_path: Path):
    dead = dict.fromkeys(("east", "west"), lambda answer: lambda message: b"")
    settings = (FAST, "cohort.minimum=4")
    with pytest.raises(CohortTooSmall, match=r"round 1 finds 3 sites, cohort\.minimum asks for 4"):
        small.run(small.assemble(tmp_path / "a", *settings, wrap=dead))
    resumed = small.run(small.assemble(tmp_path / "a", *settings))
    undisturbed = small.run(small.assemble(tmp_path / "b", *settings))
    assert small.fingerprint(resumed) == small.fingerprint(undisturbed)


@pytest.mark.parametrize("name", ["fedkola", "fedit", "local"])
def test_a_cohort_below_the_minimum_is_not_even_asked(tmp_path: Path, name: str):
    late = "scenario.late={north=3, south=3, east=3}"
    with pytest.raises(CohortTooSmall, match="round 1 finds 2 sites"):
        small.run(small.assemble(tmp_path, FAST, late, f"algorithm.name={name}"))


def test_a_late_site_contributes_all_it_holds_in_its_first_round(tmp_path: Path):
    late = small.run(small.assemble(tmp_path, FAST, "scenario.late={west=2}"))
    cohorts = [tuple(row["cohort"]) for row in reports(tmp_path)]
    assert cohorts == [tuple(s for s in small.SITES if s != "west"), small.SITES, small.SITES]
    west = small.records("west")
    heart = [c for c in late.bank.cells if c.about.module == "heart@1"]
    records = {(c.about.round, c.about.kind): c.about.records for c in heart}
    others = [small.records(site) for site in cohorts[0]]
    new = sum(
        label.startswith("heart") and window == 2
        for data in others
        for label, window in zip(data.labels, data.windows, strict=True)
    )
    backlog = sum(
        label.startswith("heart") and window <= 2
        for label, window in zip(west.labels, west.windows, strict=True)
    )
    assert records[2, CellKind.ANALYTIC] == new + backlog
    punctual = small.run(small.assemble(tmp_path / "p", FAST))
    assert total_records(late) == total_records(punctual)


def total_records(state: Any) -> int:
    return sum(c.about.records for c in state.bank.cells if c.about.kind is CellKind.ANALYTIC)


def test_a_sampled_cohort_is_drawn_from_seed_and_round_alone(tmp_path: Path):
    first = small.run(small.assemble(tmp_path / "a", FAST, "cohort.size=4"))
    again = small.run(small.assemble(tmp_path / "b", FAST, "cohort.size=4"))
    cohorts = [tuple(row["cohort"]) for row in reports(tmp_path / "a")]
    assert [len(cohort) for cohort in cohorts] == [4, 4, 4]
    assert cohorts == [tuple(row["cohort"]) for row in reports(tmp_path / "b")]
    assert small.fingerprint(first) == small.fingerprint(again)


def test_sites_that_are_away_are_not_asked_and_what_they_hold_comes_later(tmp_path: Path):
    settings = (FAST, "scenario.availability=markov", "scenario.absent=0.3", "run.seed=10")
    away = small.run(small.assemble(tmp_path / "a", *settings))
    cohorts = [tuple(row["cohort"]) for row in reports(tmp_path / "a")]
    assert [len(cohort) for cohort in cohorts] == [4, 3, 3]
    held = sum(len(small.records(site)) for site in set(small.SITES) - set(cohorts[2]))
    assert 150 - held <= total_records(away) < 150
    again = small.run(small.assemble(tmp_path / "b", *settings))
    assert small.fingerprint(again) == small.fingerprint(away)


def test_windows_of_two_rounds_leave_the_bank_of_one_where_everybody_is_there(tmp_path: Path):
    once = small.run(small.assemble(tmp_path / "once", FAST))
    federation = small.assemble(tmp_path / "twice", FAST, "run.rounds_per_window=2")
    twice = small.run(federation)
    rows = reports(tmp_path / "twice")

    assert [row["round"] for row in rows] == [1, 2, 3, 4, 5, 6]
    assert [federation.moment(n) for n in (1, 4, 7)] == [
        "w1, round 1 of 2",
        "w2, round 2 of 2",
        "round 7",
    ]
    assert [federation.window(n) for n in (1, 2, 3, 6, 9)] == [1, 1, 2, 3, 3]
    assert sums(twice) == sums(once)
    # Nothing waits in the second round of a window: it takes a vote and the publishing of a view.
    assert {cell.about.round for cell in twice.bank.cells} == {1, 3, 5}
    up = [row["bytes_up"] for row in rows]
    assert all(later < first for first, later in zip(up[::2], up[1::2], strict=True))


def sums(state: Any) -> list[tuple[str, str, str]]:
    return sorted((c.about.module, c.about.kind.value, c.about.words) for c in state.bank.cells)


def test_what_waits_for_company_enters_in_the_second_round_of_its_window(tmp_path: Path):
    def only(site: str, data: small.Dataset) -> small.Dataset:
        keep = site in ("north", "south", "east")
        return data.take([i for i, c in enumerate(data.labels) if keep or c[:4] != "lung"])

    sites = {site: only(site, data) for site, data in small.data().items()}
    late = (FAST, "scenario.late={east=4}", "run.rounds_per_window=2")
    state = small.run(small.assemble(tmp_path, *late, sites=sites))
    lung = [c.about for c in state.bank.cells if c.about.module == "lung@1"]

    assert min(about.round for about in lung) == 4
    assert all(len(about.cohort) == 5 and about.contributors >= 3 for about in lung)
    assert total_records(state) < sum(map(len, sites.values()))  # a part of east still waits


def test_a_label_is_retired_when_its_last_window_ends_not_before(tmp_path: Path):
    labels = small.catalogue(heart_1=(2.0, ("heart-2",)))
    federation = small.assemble(tmp_path, FAST, "run.rounds_per_window=2", labels=labels)
    (closed,) = [e for e in small.run(federation).bank.labels if e.code == "heart-1"]

    assert closed.valid_to == 3.0


def test_too_few_sites_by_the_scenario_are_refused_with_what_to_change(tmp_path: Path):
    settings = (FAST, "scenario.availability=bernoulli", "scenario.absent=1")
    with pytest.raises(CohortTooSmall, match=r"0 of 5 sites.*lower scenario\.absent"):
        small.run(small.assemble(tmp_path, *settings))


# --- forgetting -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a finished run with analytic, router and LoRA cells."""
    folder = tmp_path_factory.mktemp("finished")
    small.run(small.assemble(folder))
    return folder


@pytest.fixture(scope="module")
def never(tmp_path_factory: pytest.TempPathFactory) -> Callable[[Request], Any]:
    """The final state of the federation that never had what a request names."""
    known: dict[str, Any] = {}

    def state(request: Request) -> Any:
        if request.id not in known:
            sites = small.data()
            if request.kind == "site":
                del sites[request.site]
            elif request.kind == "patient":
                sites = small.without(sites, request.site, patients=(request.name,))
            else:
                sites = small.without(sites, request.site, ids=(request.name,))
            folder = tmp_path_factory.mktemp("never")
            known[request.id] = small.run(small.assemble(folder, sites=sites))
        return known[request.id]

    return state


@pytest.fixture
def deep(finished: Path, tmp_path: Path) -> small.Federation:
    shutil.copytree(finished, tmp_path / "run")
    return small.assemble(tmp_path / "run")


@pytest.fixture(scope="module")
def finished_fast(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same without LoRA cells."""
    folder = tmp_path_factory.mktemp("fast")
    small.run(small.assemble(folder, FAST))
    return folder


@pytest.fixture
def federation(finished_fast: Path, tmp_path: Path) -> small.Federation:
    shutil.copytree(finished_fast, tmp_path / "run")
    return small.assemble(tmp_path / "run", FAST)


def removed(
    federation: small.Federation, *requests: Request, recount: bool = True
) -> tuple[list[ForgetReceipt], Any]:
    with Ledger.open(federation.folder) as ledger:
        receipts = [removal.remove(federation, ledger, r, recount=recount) for r in requests]
        ledger.verify("small")
        return receipts, load_state(federation, ledger)[0]


@pytest.mark.parametrize(
    ("request_", "classes"),
    [
        (SITE, {"analytic": "E0", "scatter": "E0", "router": "E0", "lora": "E1"}),
        (PATIENT, {"analytic": "E0", "scatter": "E0", "router": "E0", "lora": "E2"}),
        (RECORD, {"analytic": "E0", "scatter": "E0", "router": "E0", "lora": "E2"}),
    ],
    ids=["site", "patient", "record"],
)
def test_after_a_removal_every_cell_and_the_view_are_those_of_a_federation_that_never_had_it(
    deep: small.Federation, never: Any, request_: Request, classes: dict[str, str]
):
    (receipt,), after = removed(deep, request_)
    clean = never(request_)
    view = deep.algorithm.view
    assert small.cells(after) == small.cells(clean)
    assert view(after).id == view(clean).id == receipt.view_after != receipt.view_before
    assert after.calibration == clean.calibration
    counts = {c.about.id: (c.about.records, c.about.contributors) for c in after.bank.cells}
    assert counts == {c.about.id: (c.about.records, c.about.contributors) for c in clean.bank.cells}
    assert {(cell.kind, cell.outcome) for cell in receipt.cells} == set(classes.items())
    assert receipt.recount is True
    assert receipt.records > 0
    for cell in receipt.cells:
        assert cell.before != cell.after == small.cells(after)[cell.cell]


def test_a_removal_changes_no_cell_that_it_does_not_concern(
    finished_fast: Path, federation: small.Federation
):
    with Ledger.open(finished_fast) as ledger:
        before = small.cells(load_state(federation, ledger)[0])
    (receipt,), after = removed(federation, RECORD)
    concerned = {cell.cell for cell in receipt.cells}
    assert sorted(cell.kind for cell in receipt.cells) == ["analytic", "router", "scatter"]
    assert receipt.records == 1
    for cell, words in small.cells(after).items():
        assert (words == before[cell]) == (cell not in concerned)


def test_the_ledger_keeps_the_receipt_and_the_events_of_a_removal(federation: small.Federation):
    (receipt,), after = removed(federation, PATIENT)
    with Ledger.open(federation.folder) as ledger:
        (row,) = ledger.removals("small")
        events = ledger.events("small")
    assert forget.receipt_from(row["receipt"]) == receipt
    assert (events[-1].kind, events[-1].subject, events[-1].round) == ("FORGET", receipt.request, 3)
    withdrawn = {e.subject: e.body["words"] for e in events if e.kind == "WITHDRAW"}
    assert withdrawn == {cell.cell: cell.after for cell in receipt.cells}
    history = [(e.kind, e.subject, e.body) for e in events]
    assert banks.fold(history) == json.loads(json.dumps(banks.metadata(after.bank)))
    assert PATIENT.name not in json.dumps([dict(e.body) for e in events])


def test_nothing_of_a_removed_patient_is_left_in_journals_receipts_outbox_and_blobs(
    deep: small.Federation,
):
    site = deep.sites["north"]
    blobs = deep.folder / "blobs"
    before = {path.name for path in blobs.iterdir()}
    receipts = site.store / "receipts"
    addends = {path.name: load_file(path) for path in receipts.iterdir()}
    (receipt,), _ = removed(deep, PATIENT)
    for entry in journal.entries(site.store):
        assert PATIENT.name not in entry.patients
    for path in (site.store / "journal").iterdir():
        assert PATIENT.name.encode() not in path.read_bytes()
    assert not (site.store / "outbox").exists()
    assert {path.name for path in receipts.iterdir()} <= set(addends)
    changed = [
        name
        for name, old in addends.items()
        if int(load_file(receipts / name)["weight"]) < int(old["weight"])
    ]
    assert len(changed) == sum(cell.kind == "lora" for cell in receipt.cells) > 0
    with Ledger.open(deep.folder) as ledger:
        saved = ledger.last("small")
    assert saved is not None
    kept = {path.name for path in blobs.iterdir()}
    assert before - kept  # the old sums are gone from the disk
    assert len(kept) <= len(saved.tensors)


def test_nothing_of_a_removed_site_is_left_at_the_site(deep: small.Federation):
    removed(deep, SITE)
    store = deep.sites["west"].store
    assert list((store / "journal").iterdir()) == []
    assert list((store / "receipts").iterdir()) == []
    assert not (store / "outbox").exists()


def test_asking_twice_removes_once_and_returns_the_same_receipt(federation: small.Federation):
    (first,), after = removed(federation, PATIENT)
    (second,), again = removed(federation, PATIENT)
    assert second.already
    assert first == replace(second, already=False)
    assert small.fingerprint(after) == small.fingerprint(again)
    with Ledger.open(federation.folder) as ledger:
        assert len(ledger.removals("small")) == 1


def test_two_removals_in_either_order_leave_one_bank(
    finished: Path, deep: small.Federation, tmp_path: Path
):
    same_site = Request(kind="patient", site="north", name="north-p4")
    other_site = Request(kind="record", site="south", name="south-6")
    shutil.copytree(finished, tmp_path / "other")
    other = small.assemble(tmp_path / "other")
    requests = (PATIENT, same_site, other_site)
    receipts, one = removed(deep, *requests)
    _, two = removed(other, *reversed(requests))
    assert small.cells(one) == small.cells(two)
    assert small.fingerprint(one.calibration) == small.fingerprint(two.calibration)
    shared = set.intersection(*({cell.cell for cell in r.cells} for r in receipts))
    assert shared  # all three took from one cell in turn, each its own


def test_two_sites_remove_from_one_cell_in_turn(federation: small.Federation, never: Any):
    requests = [Request(kind="site", site=site) for site in ("west", "east")]
    receipts, after = removed(federation, *requests)
    assert [receipt.recount for receipt in receipts] == [True, True]
    assert {c.cell for c in receipts[0].cells} == {c.cell for c in receipts[1].cells}
    assert receipts[0].records == receipts[1].records == 30
    assert {cell.about.contributors for cell in after.bank.cells} == {3}
    assert total_records(after) == 90


def test_removing_everyone_leaves_an_empty_bank(federation: small.Federation):
    requests = [Request(kind="site", site=site) for site in small.SITES]
    receipts, after = removed(federation, *requests, recount=False)
    assert after.bank.cells == ()
    assert len(after.bank.revoked) == 13
    assert after.calibration == type(after.calibration)()
    assert receipts[-1].view_after == ""
    # With the third site gone two are left, below k_min: every cell is revoked there and then.
    assert {cell.after for cell in receipts[2].cells} == {"revoked"}
    assert receipts[3].cells == receipts[4].cells == ()
    with pytest.raises(UnknownCell, match="no cell is live"):
        federation.algorithm.view(after)
    with Ledger.open(federation.folder) as ledger:
        kinds = [event.kind for event in ledger.events("small")]
    assert kinds.count("REVOKE") == 13


def test_a_cell_below_k_min_is_revoked_and_its_records_wait_for_the_next_one(tmp_path: Path):
    federation = small.assemble(
        tmp_path, FAST, "run.rounds=2", "knowledge.k_min=4", "cohort.minimum=4"
    )
    small.run(federation)
    requests = [Request(kind="site", site=site) for site in ("west", "east")]
    receipts, after = removed(federation, *requests)
    assert {cell.after for cell in receipts[1].cells} == {"revoked"}
    assert after.bank.cells == ()

    lower = small.assemble(tmp_path, FAST, "run.rounds=3", "knowledge.k_min=3")
    number = after.number + 1
    staying = ("north", "south", "centre")
    again = lower.algorithm.round(number, after, staying, lower.clients)
    assert {cell.about.round for cell in again.bank.cells} == {number}
    assert total_records(again) == sum(len(lower.stream.sites[site]) for site in staying)


def test_removed_records_never_come_back_in_later_rounds(tmp_path: Path):
    federation = small.assemble(tmp_path, FAST, "run.rounds=2")
    small.run(federation)
    removed(federation, PATIENT)
    with Ledger.open(tmp_path) as ledger:
        state, _ = load_state(federation, ledger)
    third = federation.algorithm.round(3, state, small.SITES, federation.clients)
    clean = small.without(small.data(), "north", patients=(PATIENT.name,))
    assert small.cells(third) == small.cells(
        small.run(small.assemble(tmp_path / "n", FAST, sites=clean))
    )


def test_a_leaver_is_removed_after_its_last_round_and_not_asked_again(tmp_path: Path):
    settings = (FAST, "scenario.leave={west=2}")
    state = small.run(small.assemble(tmp_path / "a", *settings))
    assert ["west" in row["cohort"] for row in reports(tmp_path / "a")] == [True, True, False]
    with Ledger.open(tmp_path / "a") as ledger:
        (row,) = ledger.removals("small")
    receipt = forget.receipt_from(row["receipt"])
    assert (receipt.site, receipt.kind, receipt.recount) == ("west", "site", True)
    sites = small.data()
    del sites["west"]
    clean = small.run(small.assemble(tmp_path / "b", FAST, sites=sites))
    assert small.cells(state) == small.cells(clean)
    assert state.calibration == clean.calibration


def test_a_site_that_quits_is_asked_no_more_and_what_it_gave_stays(tmp_path: Path):
    quits = small.run(small.assemble(tmp_path / "quits", FAST, "scenario.quit={west=1}"))
    sites = small.data()
    first = [i for i, window in enumerate(sites["west"].windows) if window <= 1]
    sites["west"] = sites["west"].take(first)
    stays = small.run(small.assemble(tmp_path / "stays", FAST, sites=sites))
    assert small.cells(quits) == small.cells(stays)
    cohorts = {cell.about.round: "west" in cell.about.cohort for cell in quits.bank.cells}
    assert cohorts == {1: True, 2: False, 3: False}
    with Ledger.open(tmp_path / "quits") as ledger:
        assert ledger.removals("small") == ()


def test_a_leaver_that_never_contributed_is_no_error(tmp_path: Path):
    settings = (FAST, "scenario.late={west=3}", "scenario.leave={west=2}")
    small.run(small.assemble(tmp_path, *settings))
    with Ledger.open(tmp_path) as ledger:
        (row,) = ledger.removals("small")
        assert forget.receipt_from(row["receipt"]).cells == ()
        assert ledger.run().state == "done"


@pytest.mark.parametrize(
    ("request_", "error", "message"),
    [
        (Request(kind="site", site="nowhere"), UnknownName, "no site 'nowhere'"),
        (Request(kind="patient", site="north", name="p"), UnknownCell, "check the identifier"),
    ],
)
def test_a_request_for_what_was_never_there_changes_nothing(
    federation: small.Federation, request_: Request, error: type[Exception], message: str
):
    with Ledger.open(federation.folder) as ledger:
        with pytest.raises(error, match=message):
            removal.remove(federation, ledger, request_)
        assert ledger.removals("small") == ()
    assert all(forget.accepted(site.store) == () for site in federation.sites.values())


def test_methods_without_a_bank_cannot_forget_and_say_so(tmp_path: Path):
    federation = small.assemble(tmp_path, "algorithm.name=fedit")
    with Ledger.open(tmp_path, create=True) as ledger, pytest.raises(KnowledgeError, match="fedit"):
        removal.remove(federation, ledger, SITE)


def test_nothing_can_be_forgotten_before_the_first_round(tmp_path: Path):
    federation = small.assemble(tmp_path, FAST)
    plan = federation.plan
    with Ledger.open(tmp_path, create=True) as ledger:
        ledger.start("small", as_dict(plan), digest(plan), now=0)
        with pytest.raises(UnknownCell, match="no round is committed"):
            removal.remove(federation, ledger, SITE)
