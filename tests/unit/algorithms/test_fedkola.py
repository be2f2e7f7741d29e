"""When a cell opens, what is parked, and what happens when sites vanish in the middle."""

from dataclasses import replace
from pathlib import Path

import pytest
import small_federation as small
import torch

from fedkola import removal
from fedkola.algorithms.fedkola import Calibration, FedKoLa, State
from fedkola.errors import CohortTooSmall, ForgetIncomplete, KnowledgeError
from fedkola.evaluation import oneshot
from fedkola.federation import load_state
from fedkola.knowledge import bank as banks
from fedkola.knowledge import journal
from fedkola.knowledge.bank import Bank, CellKind
from fedkola.knowledge.forget import Request
from fedkola.knowledge.windows import AGAINST, COUNTS
from fedkola.types import Aggregate, Grid

FAST = 'knowledge.lanes=["analytic", "router"]'


def votes(rows: dict[str, tuple[int, int]], holders: dict[str, int]) -> Aggregate:
    """Counts as a vote sums them: (holders, records) by label, holders by scope."""
    label_holders = torch.tensor([rows.get(code, (0, 0))[0] for code in small.CODES])
    label_records = torch.tensor([rows.get(code, (0, 0))[1] for code in small.CODES])
    by_scope = [label_records[i : i + 3].sum() for i in (0, 3, 6)]
    words = {
        "holders": torch.tensor([holders.get(scope, 0) for scope in small.SCOPES]),
        "records": torch.stack(by_scope),
        "label_holders": label_holders,
        "label_records": label_records,
        "weight": label_records.sum(),
    }
    words |= {AGAINST + name: torch.zeros_like(words[name]) for name in COUNTS}
    return Aggregate(cohort=small.SITES, words=words, grid=Grid(word=32, bits=32, scale={}))


@pytest.fixture(scope="module")
def method(tmp_path_factory: pytest.TempPathFactory) -> FedKoLa:
    """k_min 3, label floor 16, and a floor of records of 16 (the width) for router cells."""
    folder = tmp_path_factory.mktemp("method")
    return small.assemble(folder, FAST, "knowledge.public_reference=false").algorithm


def opened(method: FedKoLa, found: Aggregate) -> dict[str, tuple[str, ...]]:
    openings, _ = method.openings(found, Bank())
    return {
        o.scope: tuple(small.CODES[i] for i in o.labels)
        for o in openings
        if o.kind is CellKind.ANALYTIC
    }


def test_a_scope_opens_at_k_min_holders_and_waits_below(method: FedKoLa):
    rows = {"heart-1": (3, 200), "lung-1": (2, 500)}
    found = votes(rows, {"heart": 3, "lung": 2})
    assert opened(method, found) == {"heart": ("heart-1",)}
    assert method.openings(found, Bank())[1] == {"lung": 500}


def test_a_label_row_needs_k_min_holders_and_the_label_floor(method: FedKoLa):
    rows = {"heart-1": (5, 200), "heart-2": (2, 300), "heart-3": (5, 15)}
    found = votes(rows, {"heart": 5})
    assert opened(method, found) == {"heart": ("heart-1",)}
    assert method.openings(found, Bank())[1] == {"heart": 315}
    enough = votes({**rows, "heart-2": (3, 300), "heart-3": (3, 16)}, {"heart": 5})
    assert opened(method, enough) == {"heart": ("heart-1", "heart-2", "heart-3")}
    assert method.openings(enough, Bank())[1] == {}


def test_more_features_ask_for_more_records_in_a_label_row(method: FedKoLa):
    wide = replace(method, features=20 * method.width)
    rows = {"heart-1": (3, 200), "heart-2": (3, 19), "heart-3": (3, 20)}
    assert opened(wide, votes(rows, {"heart": 3})) == {"heart": ("heart-1", "heart-3")}


def test_a_cell_needs_the_floor_of_records_of_its_kinds(method: FedKoLa):
    wide = replace(method, width=128)
    assert opened(wide, votes({"heart-1": (5, 127)}, {"heart": 5})) == {}
    assert opened(wide, votes({"heart-1": (5, 128)}, {"heart": 5})) == {"heart": ("heart-1",)}
    # Rows that stay closed do not count towards the floor of the cell.
    assert opened(wide, votes({"heart-1": (5, 120), "heart-2": (2, 99)}, {"heart": 5})) == {}
    rows = replace(wide, lanes="analytic")
    assert opened(rows, votes({"heart-1": (5, 16)}, {"heart": 5})) == {"heart": ("heart-1",)}
    with_lora = replace(method, lanes="router,lora", rank=20)
    assert with_lora.openings(votes({"heart-1": (5, 319)}, {"heart": 5}), Bank())[0] == ()
    assert len(with_lora.openings(votes({"heart-1": (5, 320)}, {"heart": 5}), Bank())[0]) == 2


def test_public_data_opens_at_k_min_holders_whatever_the_rows_hold(method: FedKoLa):
    public = replace(method, public_reference=True)
    rows = {"heart-1": (1, 1), "heart-2": (3, 2), "lung-1": (2, 50)}
    found = votes(rows, {"heart": 3, "lung": 2})
    assert opened(public, found) == {"heart": ("heart-1", "heart-2")}
    assert public.openings(found, Bank())[1] == {"lung": 50}


def test_what_is_parked_is_told_once_and_opens_later(tmp_path: Path):
    # Only "bone" is held by fewer than k_min sites until the last window.
    sites = small.data()
    for site in ("north", "south", "east"):
        whole = sites[site]
        windows = [
            4 if label.startswith("bone") else window
            for label, window in zip(whole.labels, whole.windows, strict=True)
        ]
        sites[site] = replace(whole, windows=tuple(windows))
    federation = small.assemble(tmp_path, FAST, sites=sites, rounds=4)
    state = small.run(federation)
    with small.Ledger.open(tmp_path) as ledger:
        events = [e for e in ledger.events("small") if e.kind in ("PARK", "OPEN")]
    parked = {(e.round, e.subject): e.body for e in events if e.kind == "PARK"}
    assert parked == {(3, "bone"): {"records": 20}}
    assert [(e.round, e.subject) for e in events if e.kind == "OPEN"][-1] == (4, "bone@1")
    assert state.parked == {}
    bone = [c.about for c in state.bank.cells if c.about.module == "bone@1"]
    assert {(cell.round, cell.records, cell.contributors) for cell in bone} == {(4, 50, 5)}


def test_private_floors_hold_in_a_whole_run_and_records_wait_for_them(tmp_path: Path):
    settings = (FAST, "knowledge.public_reference=false", "knowledge.features=4")
    federation = small.assemble(tmp_path, *settings, "knowledge.label_floor=5")
    state = small.run(federation)
    rows = {}
    for cell in state.bank.cells:
        assert cell.about.contributors >= 3
        assert cell.about.records >= 16
        if cell.about.kind is CellKind.SCATTER:
            continue
        counts = cell.total.words["counts"].tolist()
        rows |= dict(zip(cell.about.labels, counts, strict=True))
        assert min(counts) >= 5
    assert "bone-3" not in rows  # one site holds it
    waiting = sum(label == "bone-3" for label in small.records("west").labels)
    assert waiting > 0
    assert state.parked["bone"] >= waiting
    done = journal.used(federation.sites["west"].store, before=99)
    left = [
        label
        for record, label in zip(
            small.records("west").records, small.records("west").labels, strict=True
        )
        if record not in done
    ]
    assert left.count("bone-3") == waiting


def test_fewer_voters_than_k_min_open_nothing(tmp_path: Path):
    federation = small.assemble(tmp_path, FAST)
    with pytest.raises(CohortTooSmall, match="2 sites voted, 3 are needed"):
        federation.algorithm.round(1, State(), ("north", "south"), federation.clients)


@pytest.mark.parametrize("step", ["vote", "fill"])
def test_a_site_that_vanishes_from_a_round_is_left_out_and_contributes_in_the_next(
    tmp_path: Path, step: str
):
    federation = small.assemble(tmp_path, FAST, wrap={"west": small.failing(step, times=1)})
    method, clients = federation.algorithm, federation.clients
    state = method.round(1, State(), small.SITES, clients)
    assert clients.tally().refused == {"west": "WireError"}
    others = tuple(site for site in small.SITES if site != "west")
    assert all(cell.about.cohort == others for cell in state.bank.cells)
    assert {cell.about.contributors for cell in state.bank.cells} == {4}
    after = method.round(2, state, small.SITES, clients)
    assert clients.tally().refused == {}
    # Everything of both windows is there exactly once, west's first window in round 2.
    expected = sum(window <= 2 for site in small.SITES for window in small.records(site).windows)
    held = sum(c.about.records for c in after.bank.cells if c.about.kind is CellKind.ANALYTIC)
    assert held == expected


def test_a_sum_that_never_came_about_is_never_subtracted(tmp_path: Path):
    federation = small.assemble(
        tmp_path, FAST, "run.rounds=1", wrap={"west": small.failing("fill", times=1)}
    )
    state = small.run(federation)
    request = Request(kind="site", site="west")
    assert journal.entries(federation.sites["west"].store)
    with small.Ledger.open(tmp_path) as ledger:
        receipt = removal.remove(federation, ledger, request)
        after, _ = load_state(federation, ledger)
    assert (receipt.cells, receipt.records) == ((), 0)
    assert receipt.view_before == receipt.view_after
    assert small.cells(after) == small.cells(state)


def test_a_retried_round_leaves_no_journal_of_the_attempt_that_failed(tmp_path: Path):
    # Without west, only two sites hold heart in round 1: the second vote parks it.
    sites = small.data()
    for site in ("north", "south"):
        whole = sites[site]
        windows = [max(window, 2) for window in whole.windows]
        sites[site] = replace(whole, windows=tuple(windows))
    federation = small.assemble(
        tmp_path, FAST, sites=sites, wrap={"west": small.failing("fill", times=1)}
    )
    method, clients = federation.algorithm, federation.clients
    state = method.round(1, State(), small.SITES, clients)
    assert state.bank.cells == ()
    assert set(state.parked) == {"heart"}
    after = method.round(2, state, small.SITES, clients)
    held = sum(c.about.records for c in after.bank.cells if c.about.kind is CellKind.ANALYTIC)
    assert held == sum(window <= 2 for data in sites.values() for window in data.windows)


def test_a_removal_that_a_site_does_not_answer_changes_nothing_and_can_be_asked_again(
    tmp_path: Path,
):
    federation = small.assemble(tmp_path, FAST, wrap={"east": small.failing("remove", times=1)})
    state = small.run(federation)
    request = Request(kind="patient", site="north", name="north-p3")
    with small.Ledger.open(tmp_path) as ledger:
        with pytest.raises(ForgetIncomplete, match=r"\['east'\] did not answer"):
            removal.remove(federation, ledger, request)
        unchanged, _ = load_state(federation, ledger)
        assert small.fingerprint(unchanged) == small.fingerprint(state)
        # Another removal at the same site in between must not settle or repeat the first.
        other = Request(kind="patient", site="north", name="north-p4")
        removal.remove(federation, ledger, other)
        receipt = removal.remove(federation, ledger, request, recount=True)
        after, _ = load_state(federation, ledger)
    assert receipt.recount is True
    never = small.without(small.data(), "north", patients=("north-p3", "north-p4"))
    assert small.cells(after) == small.cells(
        small.run(small.assemble(tmp_path / "n", FAST, sites=never))
    )


def test_a_journal_that_does_not_match_its_cell_cannot_push_a_count_below_zero(tmp_path: Path):
    federation = small.assemble(tmp_path, FAST)
    state = small.run(federation)
    site = federation.sites["north"]
    entry = journal.entries(site.store)[0]
    again = replace(
        entry,
        **{f: getattr(entry, f) * 9 for f in ("records", "patients", "labels", "windows")},
        z=entry.z.repeat(9, 1),
    )
    journal.write(site.store, again)
    with (
        small.Ledger.open(tmp_path) as ledger,
        pytest.raises(ForgetIncomplete, match="negative count"),
    ):
        removal.remove(federation, ledger, Request(kind="site", site="north"))
    with small.Ledger.open(tmp_path) as ledger:
        assert small.cells(load_state(federation, ledger)[0]) == small.cells(state)


@pytest.mark.parametrize("absent", ["", "north"])
def test_a_cell_that_is_revoked_leaves_the_gram_and_waits_for_the_next_one(
    tmp_path: Path, absent: str
):
    # Bone, which arrives in window 3, is held by three sites; east leaves.
    sites = {}
    for site, whole in small.data().items():
        bone = [label.startswith("bone") for label in whole.labels]
        holds = site in ("east", "west", "centre")
        sites[site] = whole.take([i for i in range(len(whole)) if holds or not bone[i]])
    federation = small.assemble(tmp_path, FAST, sites=sites)
    state = small.run(federation)
    method, clients, east = federation.algorithm, federation.clients, federation.sites["east"]
    request = Request(kind="site", site="east")
    names = [c.about.id for c in state.bank.cells if c.about.kind is not CellKind.SCATTER]
    east.post(request)
    asked = tuple(site for site in small.SITES if site != absent)
    after, _, _ = method.remove(state, names, request.id, asked, clients, leavers=("east",))
    east.settle(request)
    revoked = {about.module for about in after.bank.revoked}
    # With a site away that contributed to the revoked cell, the Gram goes as a whole.
    assert revoked == ({"bone@1", "scatter"} if absent else {"bone@1"})
    rounds = [c.about.round for c in banks.of_kind(after.bank, CellKind.SCATTER)]
    assert rounds == ([1, 2] if absent else [1, 2, 3])
    assert oneshot.compare(federation, after).equal
    left = tuple(site for site in small.SITES if site != "east")
    again = method.round(4, after, left, clients)
    waiting = sum(label.startswith("bone") for s in ("west", "centre") for label in sites[s].labels)
    assert again.parked == {"bone": waiting}
    assert oneshot.compare(federation, again).equal
    assert banks.uncovered(again.bank) == ()


@pytest.mark.parametrize(
    ("share", "every", "public", "rounds"),
    [
        (0.0, 0, True, [1, 2, 3]),
        (1.5, 0, True, [1, 2]),
        (9.0, 0, True, [1]),
        (0.0, 0, False, [2, 3]),
        (9.0, 2, True, [1, 2]),
        (9.0, 3, True, [1, 3]),
        (0.0, 9, True, [1]),
        (9.0, 3, False, [2, 3]),
    ],
)
def test_a_gram_is_summed_when_enough_records_wait_for_one_or_it_is_time(
    tmp_path: Path, share: float, every: int, public: bool, rounds: list[int]
):
    # 25, 50 and 75 records arrive; 16 features make the private floor 64.
    settings = ["knowledge.features=16", 'knowledge.lanes=["analytic"]', "knowledge.label_floor=1"]
    settings += [f"knowledge.scatter_share={share}", f"knowledge.scatter_every={every}"]
    settings += [f"knowledge.public_reference={str(public).lower()}"]
    state = small.run(small.assemble(tmp_path, *settings))
    found = [cell.about for cell in banks.of_kind(state.bank, CellKind.SCATTER)]
    assert [about.round for about in found] == rounds


def test_a_cell_whose_cohort_is_not_all_there_waits_for_its_gram(tmp_path: Path):
    federation = small.assemble(tmp_path, FAST, "knowledge.scatter_share=9")
    method, clients = federation.algorithm, federation.clients
    state = method.round(1, State(), small.SITES, clients)
    state = method.round(2, state, small.SITES, clients)
    eager = replace(method, scatter_share=0.0)
    early = [cell.about for cell in banks.uncovered(state.bank)]
    assert {about.round for about in early} == {2}
    state = eager.round(3, state, small.SITES[:4], clients)
    assert [cell.about for cell in banks.uncovered(state.bank)] == early
    state = eager.round(4, state, small.SITES, clients)
    assert banks.uncovered(state.bank) == ()
    assert oneshot.compare(federation, state).equal


def test_a_label_that_the_catalogue_ends_is_retired_when_it_is_open(tmp_path: Path):
    ends = small.catalogue(heart_1=(2.5, ("heart-2",)))
    federation = small.assemble(tmp_path, FAST, labels=ends)
    state = small.run(federation)
    entry = next(e for e in state.bank.labels if e.code == "heart-1")
    assert (entry.valid_to, entry.replaced_by) == (2.5, ("heart-2",))
    assert "heart-1" not in banks.valid_labels(state.bank)
    assert "heart-1" in banks.valid_labels(state.bank, valid_at=2.0)
    assert "heart-1" in banks.valid_labels(state.bank, known_at=2)


def test_the_server_half_needs_its_catalogue(method: FedKoLa):
    with pytest.raises(KnowledgeError, match="catalogue"):
        replace(method, catalogue=None).openings(votes({}, {}), Bank())


def test_a_bank_without_cells_has_no_calibration(method: FedKoLa):
    stale = State(calibration=Calibration(temperature=0.1, unknown=1.0, records=9))
    assert method.calibrate(stale, (), None).calibration == Calibration()
