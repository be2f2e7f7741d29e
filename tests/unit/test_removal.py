"""Removals of every kind: what is equal afterwards, what waits for what, and what is refused."""

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import small_federation as small
import torch

from fedkola import removal, server
from fedkola.errors import ForgetIncomplete, KnowledgeError, UnknownCell, UnknownName
from fedkola.federation import load_state
from fedkola.knowledge import forget, journal, membership, statistics
from fedkola.knowledge.bank import CellKind
from fedkola.knowledge.forget import ForgetReceipt, Request, Waiting
from fedkola.ledger import Ledger
from fedkola.types import Dataset

FAST = ('knowledge.lanes=["analytic", "router"]', "knowledge.features=8")
PRIVATE = (
    *FAST,
    "knowledge.features=4",
    "knowledge.public_reference=false",
    "knowledge.label_floor=1",
)
"""No public data: the floors hold, and a removal waits for others."""


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("finished")
    small.run(small.assemble(folder, *FAST))
    return folder


@pytest.fixture
def federation(finished: Path, tmp_path: Path) -> small.Federation:
    shutil.copytree(finished, tmp_path / "run")
    return small.assemble(tmp_path / "run", *FAST)


@pytest.fixture(scope="module")
def finished_private(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("private")
    small.run(small.assemble(folder, *PRIVATE))
    return folder


@pytest.fixture
def private(finished_private: Path, tmp_path: Path) -> small.Federation:
    shutil.copytree(finished_private, tmp_path / "run")
    return small.assemble(tmp_path / "run", *PRIVATE)


def state_of(federation: small.Federation) -> Any:
    with Ledger.open(federation.folder) as ledger:
        return load_state(federation, ledger)[0]


def removed(federation: small.Federation, *requests: Request, **how: bool) -> list[ForgetReceipt]:
    with Ledger.open(federation.folder) as ledger:
        receipts = [removal.remove(federation, ledger, request, **how) for request in requests]
        ledger.verify("small")
        return receipts


def never(folder: Path, sites: small.Data, *settings: str) -> Any:
    return small.run(small.assemble(folder, *settings, sites=sites))


def filtered(sites: small.Data, keep: Any) -> dict[str, Dataset]:
    """The sites' data, of which only the rows stay that ``keep(site, data, row)`` keeps."""
    return {
        name: data.take([i for i in range(len(data)) if keep(name, data, i)])
        for name, data in sites.items()
    }


# --- kinds ----------------------------------------------------------------------------------------

KEEP = {
    "window of a site": (
        Request(kind="window", site="north", name="2"),
        lambda site, data, i: site != "north" or data.windows[i] != 2,
    ),
    "window of all": (
        Request(kind="window", name="2"),
        lambda site, data, i: data.windows[i] != 2,
    ),
    "label": (
        Request(kind="label", name="heart-2"),
        lambda site, data, i: data.labels[i] != "heart-2",
    ),
    "label of a site": (
        Request(kind="label", site="south", name="heart-2"),
        lambda site, data, i: site != "south" or data.labels[i] != "heart-2",
    ),
    "module": (
        Request(kind="module", name="lung@1"),
        lambda site, data, i: not data.labels[i].startswith("lung"),
    ),
}


@pytest.mark.parametrize("name", KEEP)
def test_a_window_a_label_and_a_module_leave_the_bank_that_never_had_them(
    federation: small.Federation, tmp_path: Path, name: str
):
    request, keep = KEEP[name]
    (receipt,) = removed(federation, request, recount=True)
    after = state_of(federation)
    clean = never(tmp_path / "never", filtered(small.data(), keep), *FAST)
    assert small.cells(after) == small.cells(clean)
    view = federation.algorithm.view
    assert view(after).id == view(clean).id == receipt.view_after
    assert after.calibration == clean.calibration
    assert receipt.recount is True
    assert receipt.records == sum(
        not keep(site, data, i) for site, data in small.data().items() for i in range(len(data))
    )
    assert {cell.outcome for cell in receipt.cells} == {"E0"}


def test_a_label_that_is_forgotten_everywhere_is_retired_and_never_comes_back(tmp_path: Path):
    federation = small.assemble(tmp_path, *FAST, "run.rounds=2")
    small.run(federation)
    removed(federation, Request(kind="label", name="heart-2"))
    state = state_of(federation)
    (entry,) = [e for e in state.bank.labels if e.code == "heart-2"]
    assert entry.valid_to == 2.0
    third = federation.algorithm.round(3, state, small.SITES, federation.clients)
    held = {
        code
        for cell in third.bank.cells
        if cell.about.kind is CellKind.ANALYTIC
        for code, n in zip(
            cell.about.labels, cell.total.words[statistics.COUNTS].tolist(), strict=True
        )
        if n
    }
    assert "heart-2" not in held
    assert "heart-1" in held


def test_the_cells_of_a_forgotten_module_are_revoked(federation: small.Federation):
    (receipt,) = removed(federation, Request(kind="module", name="lung"))
    # The Grams over all labels lose its share and stay.
    fate = {(cell.kind == "scatter", cell.after == "revoked") for cell in receipt.cells}
    assert fate == {(False, True), (True, False)}
    state = state_of(federation)
    assert "lung@1" not in {cell.about.module for cell in state.bank.cells}
    (module,) = [m for m in state.bank.modules if m.id == "lung@1"]
    assert module.state.value == "retired"


@pytest.mark.parametrize(
    ("request_", "error", "message"),
    [
        (Request(kind="town", site="north"), UnknownName, "'town' cannot be forgotten"),
        (Request(kind="patient", name="x"), UnknownName, "a patient is forgotten at one site"),
        (Request(kind="site"), UnknownName, "a site is forgotten at one site"),
        (Request(kind="window", name="May"), UnknownName, "window 'May'"),
        (
            Request(kind="window", name="9"),
            UnknownCell,
            "every site has no record for window '9'",
        ),
        (Request(kind="label", site="north", name="bone-3"), UnknownCell, "label 'bone-3'"),
    ],
)
def test_a_request_that_means_nothing_changes_nothing(
    federation: small.Federation, request_: Request, error: type[Exception], message: str
):
    before = small.fingerprint(state_of(federation))
    with pytest.raises(error, match=message):
        removed(federation, request_)
    assert small.fingerprint(state_of(federation)) == before
    assert all(forget.accepted(site.store) == () for site in federation.sites.values())


# --- together -------------------------------------------------------------------------------------


def test_requests_that_are_carried_out_together_equal_one_after_the_other(
    finished: Path, federation: small.Federation, tmp_path: Path
):
    requests = (
        Request(kind="patient", site="north", name="north-p3"),
        Request(kind="record", site="north", name="north-3"),  # of that patient
        Request(kind="record", site="south", name="south-6"),
        Request(kind="site", site="west"),
    )
    shutil.copytree(finished, tmp_path / "other")
    other = small.assemble(tmp_path / "other", *FAST)
    with Ledger.open(federation.folder) as ledger:
        receipts = removal.remove_together(federation, ledger, requests, recount=True)
        (row,) = ledger.removals("small")
    removed(other, *requests)
    assert small.cells(state_of(federation)) == small.cells(state_of(other))
    assert [receipt.kind for receipt in receipts] == ["patient", "record", "record", "site"]
    assert len({receipt.request for receipt in receipts}) == 4
    assert {receipt.records for receipt in receipts} == {row["receipt"]["records"]}
    assert row["receipt"]["kind"] == "batch"
    assert all(receipt.recount for receipt in receipts)
    for site in ("north", "south", "west"):
        assert forget.posted(federation.sites[site].store) == ()


def test_lora_cells_of_a_batch_are_retrained_once_without_any_of_its_records(tmp_path: Path):
    federation = small.assemble(tmp_path / "run")
    small.run(federation)
    requests = [
        Request(kind="patient", site="north", name="north-p3"),
        Request(kind="patient", site="north", name="north-p4"),
    ]
    with Ledger.open(federation.folder) as ledger:
        (first, _) = removal.remove_together(federation, ledger, requests, recount=True)
    sites = small.without(small.data(), "north", patients=("north-p3", "north-p4"))
    assert small.cells(state_of(federation)) == small.cells(never(tmp_path / "never", sites))
    assert {c.outcome for c in first.cells if c.kind == "lora"} == {"E2"}
    # A second removal from the same cells subtracts from the receipts that the first left.
    (again,) = removed(federation, Request(kind="site", site="north"), recount=True)
    assert again.recount is True


def test_all_that_a_site_added_to_a_lora_cell_is_subtracted_without_training(tmp_path: Path):
    federation = small.assemble(tmp_path / "run")
    small.run(federation)
    request = Request(kind="module", site="north", name="heart")
    (receipt,) = removed(federation, request, recount=True)
    assert {c.outcome for c in receipt.cells if c.kind == "lora"} == {"E1"}
    assert receipt.recount is True


# --- what was forgotten before --------------------------------------------------------------------


def test_a_record_of_a_patient_that_is_forgotten_already_gives_that_receipt(
    federation: small.Federation,
):
    patient = Request(kind="patient", site="north", name="north-p3")
    (first,) = removed(federation, patient)
    (second,) = removed(federation, Request(kind="record", site="north", name="north-3"))
    assert second.already
    assert (second.request, second.kind) == (first.request, "patient")
    with Ledger.open(federation.folder) as ledger:
        assert len(ledger.removals("small")) == 1


def test_what_is_left_under_an_overlapping_request_is_removed(
    federation: small.Federation, tmp_path: Path
):
    removed(federation, Request(kind="record", site="north", name="north-3"))
    patient = Request(kind="patient", site="north", name="north-p3")
    (receipt,) = removed(federation, patient)
    assert not receipt.already
    assert receipt.records == small.data()["north"].patients.count("north-p3") - 1
    clean = never(
        tmp_path / "never", small.without(small.data(), "north", patients=("north-p3",)), *FAST
    )
    assert small.cells(state_of(federation)) == small.cells(clean)


# --- a leaver that is away ------------------------------------------------------------------------


def refuses(answer: small.Answer) -> small.Answer:
    def reply(message: bytes) -> bytes:
        raise ConnectionError("away")

    return reply


@pytest.mark.parametrize("lanes", [FAST, ()], ids=["fast", "with lora"])
def test_a_leaver_that_is_away_is_removed_by_the_others_alone(tmp_path: Path, lanes: Any):
    small.run(small.assemble(tmp_path / "run", *lanes))
    federation = small.assemble(tmp_path / "run", *lanes, wrap={"west": refuses})
    west = Request(kind="site", site="west")
    with pytest.raises(ForgetIncomplete, match="'west'"):
        removed(federation, west)
    (receipt,) = removed(federation, west, absent=True)
    sites = small.data()
    del sites["west"]
    clean = never(tmp_path / "never", sites, *lanes)
    assert small.cells(state_of(federation)) == small.cells(clean)
    assert receipt.records == 30
    assert {cell.outcome for cell in receipt.cells} == {"E3"}
    assert receipt.floors["difference"] is False
    # It is not waited for any more, and brings nothing back if it returns.
    (other,) = removed(federation, Request(kind="record", site="north", name="north-3"))
    assert other.records == 1
    assert len(federation.sites["west"].knowledge.until(3)) == 0
    assert journal.entries(federation.sites["west"].store) == ()


def test_only_a_whole_site_can_be_removed_while_it_is_away(federation: small.Federation):
    patient = Request(kind="patient", site="north", name="north-p3")
    with pytest.raises(KnowledgeError, match="only a whole site"):
        removed(federation, patient, absent=True)


# --- waiting, and what two states of a bank show --------------------------------------------------


def shared_records() -> list[Request]:
    """One record of heart in window 1 at each of three sites."""
    found = []
    for site in ("north", "south", "east"):
        data = small.data()[site]
        i = next(
            i
            for i in range(len(data))
            if data.windows[i] == 1 and data.labels[i].startswith("heart")
        )
        found.append(Request(kind="record", site=site, name=data.records[i]))
    return found


def difference(before: Any, after: Any) -> dict[str, torch.Tensor]:
    """What somebody who keeps both states subtracts: the heart rows of round 1."""

    def words(state: Any) -> Any:
        (cell,) = [
            c
            for c in state.bank.cells
            if (c.about.module, c.about.round, c.about.kind) == ("heart@1", 1, CellKind.ROUTER)
        ]
        return cell.total.words

    old, new = words(before), words(after)
    return {name: old[name] - new[name] for name in (statistics.SUMS, statistics.COUNTS)}


def addend(federation: small.Federation, request: Request) -> torch.Tensor:
    """The embedding of one record, as its site holds it."""
    entry = journal.read(federation.sites[request.site].store, 1, "heart")
    assert entry is not None
    return entry.z[entry.records.index(request.name)].to(torch.int64)


def test_a_removal_on_its_own_shows_the_record_and_a_batch_shows_only_the_sum(
    private: small.Federation, finished_private: Path, tmp_path: Path
):
    requests = shared_records()
    embeddings = [addend(private, request) for request in requests]
    # The attack: without waiting, the difference of two states is the record itself.
    shutil.copytree(finished_private, tmp_path / "alone")
    alone = small.assemble(tmp_path / "alone", *PRIVATE)
    before = state_of(alone)
    (receipt,) = removed(alone, requests[0])
    seen = difference(before, state_of(alone))
    assert torch.equal(seen[statistics.SUMS].sum(0), embeddings[0])
    assert receipt.floors == {"sites": True, "records": True, "difference": False}
    # With waiting nothing moves until three sites give something back to the same cells.
    before = state_of(private)
    with Ledger.open(private.folder) as ledger:
        first = removal.request_removal(private, ledger, requests[0])
        second = removal.request_removal(private, ledger, requests[1])
        assert isinstance(first, Waiting)
        assert isinstance(second, Waiting)
        assert (first.lacking, second.lacking) == (2, 1)
        assert small.fingerprint(state_of(private)) == small.fingerprint(before)
        assert len(removal.waiting(private, ledger)) == 2
        third = removal.request_removal(private, ledger, requests[2])
        assert isinstance(third, ForgetReceipt)
        assert removal.waiting(private, ledger) == ()
        ledger.verify("small")
    seen = difference(before, state_of(private))
    assert torch.equal(seen[statistics.SUMS].sum(0), torch.stack(embeddings).sum(0))
    assert int(seen[statistics.COUNTS].sum()) == 3
    assert third.floors["difference"] is True
    assert {part.released for part in third.parts} == {"batch"}
    assert {cell.sites for cell in third.cells} == {3}


def test_a_record_that_waits_is_not_contributed_any_more_and_goes_after_the_longest_wait(
    tmp_path: Path,
):
    request = shared_records()[0]
    federation = small.assemble(tmp_path, *PRIVATE, "knowledge.removal_wait=1")
    with Ledger.open(tmp_path, create=True) as ledger:
        name, plan = federation.plan.run.name, federation.plan

        def stop_after_one(report: Any) -> None:
            raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            server.run(federation, ledger, observe=lambda *_: {}, progress=stop_after_one)
        found = removal.request_removal(federation, ledger, request)
        assert isinstance(found, Waiting)
        assert (found.since, found.until, found.lacking) == (1, 2, 2)
        again = removal.request_removal(federation, ledger, request)
        assert again == found
        assert [e.kind for e in ledger.events(name)].count("REQUEST") == 1
        assert request.name not in federation.sites["north"].knowledge.until(3).records
    small.run(small.assemble(tmp_path, *PRIVATE, "knowledge.removal_wait=1"))
    with Ledger.open(tmp_path) as ledger:
        (row,) = ledger.removals(plan.run.name)
        rounds = {e.kind: e.round for e in ledger.events(name) if e.kind in ("REQUEST", "FORGET")}
    receipt = forget.receipt_from(row["receipt"])
    assert rounds == {"REQUEST": 1, "FORGET": 2}
    assert [(part.released, part.waited) for part in receipt.parts] == [("wait", 1)]
    assert receipt.floors["difference"] is False


def test_when_a_run_ends_no_request_is_left_waiting(tmp_path: Path):
    settings = (*PRIVATE, "scenario.leave={west=3}", "knowledge.removal_wait=9")
    state = small.run(small.assemble(tmp_path, *settings))
    with Ledger.open(tmp_path) as ledger:
        (row,) = ledger.removals("small")
    receipt = forget.receipt_from(row["receipt"])
    assert (receipt.site, receipt.parts[0].released) == ("west", "wait")
    assert {cell.about.contributors for cell in state.bank.cells} == {4}


def test_a_cell_that_falls_below_the_records_floor_is_revoked(private: small.Federation):
    floor = private.algorithm.floor
    assert (floor(), floor(CellKind.SCATTER)) == (16, 16)
    before = {cell.about.id: cell.about.records for cell in state_of(private).bank.cells}
    assert min(before.values()) >= 16
    receipts = removed(
        private, Request(kind="window", name="2"), Request(kind="site", site="north")
    )
    after = state_of(private).bank
    left = {about.id: about.records for about in after.revoked}
    assert left
    assert max(left.values()) < 16 < max(before[name] for name in left)
    assert all(cell.about.records >= 16 for cell in after.cells)
    assert all(receipt.floors["records"] for receipt in receipts)


def test_three_sites_are_ripe_only_where_they_share_every_cell():
    heart, lung = (1, "heart"), (2, "lung")
    wanted = {
        "a": {heart: {"north"}},
        "b": {heart: {"south"}, lung: {"south"}},
        "c": {heart: {"east"}},
        "d": {heart: {"west"}},
    }
    ready, lacking = forget.ripe(wanted, least=3)
    assert ready == {"a", "c", "d"}
    assert lacking == {"b": 2}
    ready, lacking = forget.ripe({k: wanted[k] for k in "abc"}, least=3)
    assert ready == frozenset()
    assert lacking == {"a": 1, "b": 2, "c": 1}
    everyone = {"e": {heart: {"north", "south", "east"}}}
    assert forget.ripe(everyone, least=3) == ({"e"}, {})


def test_records_that_still_wait_for_their_cell_are_forgotten_too(tmp_path: Path):
    # Only two sites have met "bone" by round 3, so it waits there.
    sites = small.data()
    for site in ("north", "south", "east"):
        held = sites[site]
        windows = [
            4 if label.startswith("bone") else window
            for label, window in zip(held.labels, held.windows, strict=True)
        ]
        sites[site] = replace(held, windows=tuple(windows))
    gone = next(label for label in sites["west"].labels if label.startswith("bone"))
    federation = small.assemble(tmp_path / "with", *FAST, "run.rounds=3", sites=sites)
    state = small.run(federation)
    assert state.parked["bone"] > 0
    (receipt,) = removed(federation, Request(kind="label", name=gone))
    assert (receipt.cells, receipt.records) == ((), 0)
    state = state_of(federation)
    after = federation.algorithm.round(4, state, small.SITES, federation.clients)
    never = {
        site: data.take([i for i, label in enumerate(data.labels) if label != gone])
        for site, data in sites.items()
    }
    other = small.assemble(tmp_path / "never", *FAST, "run.rounds=3", sites=never)
    clean = other.algorithm.round(4, small.run(other), small.SITES, other.clients)
    assert any(cell.about.module == "bone@1" for cell in after.bank.cells)
    assert small.cells(after) == small.cells(clean)


# --- before it is done ----------------------------------------------------------------------------


def test_what_is_foreseen_is_what_the_receipt_then_says(tmp_path: Path):
    federation = small.assemble(tmp_path)
    small.run(federation)
    request = Request(kind="patient", site="north", name="north-p3")
    before = small.fingerprint(state_of(federation))
    with Ledger.open(tmp_path) as ledger:
        steps = removal.foresee(federation, ledger, request)
        assert small.fingerprint(state_of(federation)) == before
        assert forget.accepted(federation.sites["north"].store) == ()
        federation.clients.tally()
        receipt = removal.remove(federation, ledger, request)
    assert [(s.cell, s.outcome) for s in steps] == [(c.cell, c.outcome) for c in receipt.cells]
    assert sum(step.records for step in steps if step.kind == "analytic") == receipt.records
    assert all(step.asked == 5 and step.sites == 1 for step in steps)
    assert {step.retrained for step in steps if step.kind == "lora"} == {1}
    assert all(step.bytes_up > 0 for step in steps)
    with Ledger.open(tmp_path) as ledger, pytest.raises(UnknownCell, match="has no record"):
        removal.foresee(federation, ledger, Request(kind="patient", site="north", name="nobody"))


# --- cells that stand on a base the federation learnt ---------------------------------------------


def test_a_removal_under_an_adapted_base_cascades_with_the_next_round(tmp_path: Path):
    adapted = (*FAST, "algorithm.name=adapted", "knowledge.adapt_rank=2", "run.rounds=2")
    federation = small.assemble(tmp_path / "run", *adapted)
    small.run(federation)
    request = Request(kind="patient", site="north", name="north-p3")
    (receipt,) = removed(federation, request)
    assert {cell.outcome for cell in receipt.cells} == {"E4"}
    assert forget.BASE in receipt.not_covered
    state = state_of(federation)
    third = federation.algorithm.round(3, state, small.SITES, federation.clients)
    sites = small.without(small.data(), "north", patients=("north-p3",))
    never = small.assemble(tmp_path / "never", *adapted, sites=sites)
    clean = never.algorithm.round(
        3, replace(small.run(never), consolidated=0), small.SITES, never.clients
    )
    assert third.base.keys() == clean.base.keys()
    assert all(torch.equal(third.base[name], clean.base[name]) for name in third.base)
    assert any(not torch.equal(third.base[name], state.base[name]) for name in third.base)
    assert small.cells(third) == small.cells(clean)


# --- the residual test ----------------------------------------------------------------------------


def test_a_receipt_compares_forgotten_with_never_seen_records_under_both_views(tmp_path: Path):
    settings = (*FAST, "knowledge.held_out=0.5")
    sites = {site: small.records(site, num=150) for site in small.SITES}
    federation = small.assemble(tmp_path / "run", *settings, sites=sites)
    state = small.run(federation)
    site = federation.sites["north"]
    assert len(site.held_out) + len(site.knowledge.until(3)) == 150
    assert set(site.held_out.texts).isdisjoint(site.knowledge.until(3).texts)
    forgotten, unseen = site.knowledge.until(3), site.held_out
    (receipt,) = removed(federation, Request(kind="site", site="north"))
    found = receipt.residual
    assert found is not None
    assert (found.forgotten, found.never) == (len(forgotten), len(unseen))
    cache = federation.trainer.cache

    def auc(view: Any) -> float:
        counts = [
            membership.counted(membership.margins(view, cache.integers(d.texts), d.labels))
            for d in (forgotten, unseen)
        ]
        return membership.auc(*counts)

    del sites["north"]
    clean = never(tmp_path / "never", sites, *settings)
    view = federation.algorithm.view
    assert found.auc == auc(view(clean))
    assert found.before == auc(view(state))
    assert found.low <= found.auc <= found.high
    with Ledger.open(federation.folder) as ledger:
        (row,) = ledger.removals("small")
    assert forget.receipt_from(row["receipt"]).residual == found


def test_few_records_or_none_held_out_give_no_evidence(
    federation: small.Federation, tmp_path: Path
):
    (receipt,) = removed(federation, Request(kind="site", site="north"))
    assert receipt.residual is None
    other = small.assemble(tmp_path / "other", *FAST, "knowledge.held_out=0.5")
    small.run(other)
    (receipt,) = removed(other, Request(kind="site", site="north"))
    assert receipt.residual is None  # some fifteen records
