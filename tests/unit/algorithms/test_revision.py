"""A record that arrives anew replaces what it said before, exactly and in the same round."""

from collections import Counter
from pathlib import Path

import pytest
import small_federation as small

from fedkola import removal, server
from fedkola.algorithms.fedkola import State
from fedkola.evaluation import oneshot
from fedkola.federation import load_state
from fedkola.knowledge import journal
from fedkola.knowledge.forget import Request
from fedkola.ledger import Ledger

FAST = 'knowledge.lanes=["analytic", "router"]'
PRIVATE = (FAST, "knowledge.public_reference=false", "knowledge.label_floor=1")


def newest(sites: small.Data, number: int) -> Counter[str]:
    """Records by label, of the newest version of each as of a window."""
    found: dict[tuple[str, str], tuple[int, str]] = {}
    for site, data in sites.items():
        for row in zip(data.records, data.windows, data.labels, strict=True):
            if row[1] <= number:
                found[site, row[0]] = max(found.get((site, row[0]), (0, "")), row[1:])
    return Counter(label for _, label in found.values())


def counts(state: State) -> Counter[str]:
    totals = oneshot.totals(state.bank, {code: i for i, code in enumerate(small.CODES)}, 32)
    return Counter(
        {code: n for code, n in zip(small.CODES, totals["counts"].tolist(), strict=True) if n}
    )


def never_said(sites: small.Data) -> dict[str, small.Dataset]:
    """The sites of which each record only ever had its last version, in its last window."""
    found = {}
    for site, data in sites.items():
        pairs = list(zip(data.records, data.windows, strict=True))
        last = dict(sorted(pairs, key=lambda pair: pair[1]))
        rows = enumerate(pairs)
        found[site] = data.take([i for i, (record, window) in rows if last[record] == window])
    return found


def test_after_every_round_the_bank_holds_the_newest_version_of_each_record(tmp_path: Path):
    sites = small.revised(small.data())
    federation = small.assemble(tmp_path, FAST, sites=sites)
    seen = []

    def observe(number: int, state: State) -> dict[str, float]:
        assert counts(state) == newest(sites, number)
        seen.append((state.revision.records, state.revision.waiting))
        return {}

    with Ledger.open(tmp_path, create=True) as ledger:
        state = server.run(federation, ledger, observe=observe, progress=lambda report: None)
        events = [e for e in ledger.events("small") if e.kind == "REVISE"]
        ledger.verify("small")
    assert seen == [(0, 0), (6, 0), (1, 0)]
    assert [(e.round, e.subject, e.body["round"]) for e in events] == [
        (2, "heart", 1),
        (3, "lung", 2),
    ]
    assert oneshot.compare(federation, state).equal


@pytest.mark.parametrize("setting", ["knowledge.merge=gram", "knowledge.scatter_share=1"])
def test_every_cell_is_that_of_a_federation_where_the_old_version_was_never_said(
    tmp_path: Path, setting: str
):
    sites = small.revised(small.data())
    state = small.run(small.assemble(tmp_path / "a", setting, sites=sites))
    clean = small.run(small.assemble(tmp_path / "b", setting, sites=never_said(sites)))
    assert small.cells(state) == small.cells(clean)
    assert state.calibration == clean.calibration


def test_old_versions_leave_the_journal_and_the_receipts_of_their_site(tmp_path: Path):
    sites = small.revised(small.data())
    federation = small.assemble(tmp_path, sites=sites)
    small.run(federation)
    for name, site in federation.sites.items():
        kept = journal.join(journal.entries(site.store))
        assert kept is not None
        versions = zip(kept.records, kept.windows, strict=True)
        data = site.knowledge.until(3)
        assert sorted(versions) == sorted(zip(data.records, data.windows, strict=True)), name
        assert not list((site.store / "receipts").glob("*revision*"))


def test_a_window_that_is_delivered_twice_changes_nothing_and_is_counted(tmp_path: Path):
    sites = small.data()
    whole = sites["north"]
    first = [i for i, window in enumerate(whole.windows) if window == 1]
    rows = [
        (whole.records[i], whole.texts[i], whole.labels[i], whole.patients[i], window)
        for i in first
        for window in (1, 2)
    ]
    twice = {**sites, "north": small.with_rows(whole, rows)}
    federation = small.assemble(tmp_path / "a", FAST, sites=twice)
    method, clients = federation.algorithm, federation.clients
    state = method.round(1, State(), small.SITES, clients)
    assert state.revision.repeats == len(first)
    after = method.round(2, state, small.SITES, clients)
    assert after.revision.repeats == len(first)
    assert after.revision.records == 0
    once = small.run(small.assemble(tmp_path / "b", FAST, "run.rounds=2"))
    assert small.cells(after) == small.cells(once)


def test_private_old_versions_wait_until_enough_sites_have_some(tmp_path: Path):
    one = {**small.data(), "north": small.revised(small.data())["north"]}
    state = small.run(small.assemble(tmp_path / "a", *PRIVATE, "run.rounds=2", sites=one))
    assert (state.revision.records, state.revision.waiting) == (0, 2)
    all_ = small.revised(small.data())
    state = small.run(small.assemble(tmp_path / "b", *PRIVATE, "run.rounds=2", sites=all_))
    assert (state.revision.records, state.revision.waiting) == (6, 0)


def test_a_site_that_vanishes_from_a_revision_is_revised_when_it_is_back(tmp_path: Path):
    sites = small.revised(small.data())
    federation = small.assemble(
        tmp_path, FAST, sites=sites, wrap={"west": small.failing("revise", times=1)}
    )
    state = small.run(federation)
    assert state.revision.records == 2  # the one of round 2 that west still owed, and that of north
    # What west alone has of a scope in round 3 waits for others, in no version at all.
    assert counts(state) < newest(sites, 3)
    assert (newest(sites, 3) - counts(state)).total() == sum(state.parked.values())
    assert oneshot.compare(federation, state).equal
    with Ledger.open(tmp_path) as ledger:
        rows = [dict(row.report)["refused"] for row in ledger.rounds("small")]
    assert rows == [{}, {"west": "WireError"}, {}]


def test_forgetting_a_record_forgets_all_its_versions(tmp_path: Path):
    sites = small.revised(small.data())
    record = sites["north"].records[-1]
    federation = small.assemble(tmp_path / "a", sites=sites)
    small.run(federation)
    request = Request(kind="record", site="north", name=record)
    with Ledger.open(tmp_path / "a") as ledger:
        receipt = removal.remove(federation, ledger, request, recount=True)
        state, _ = load_state(federation, ledger)
    assert receipt.recount is True
    clean = small.run(
        small.assemble(tmp_path / "b", sites=small.without(sites, "north", ids=(record,)))
    )
    assert small.cells(state) == small.cells(clean)


def test_a_cell_that_a_revision_leaves_below_k_min_is_revoked_and_filled_anew(tmp_path: Path):
    sites = {name: small.data()[name] for name in ("north", "south", "east")}
    whole = sites["east"]
    first = [i for i, window in enumerate(whole.windows) if window == 1]
    moved = [
        (whole.records[i], " ".join(small.OWN_WORDS["bone-1"]), "bone-1", whole.patients[i], 2)
        for i in first
    ]
    sites["east"] = small.with_rows(whole, moved)
    federation = small.assemble(tmp_path, FAST, sites=sites)
    state = small.run(federation)
    assert {about.round for about in state.bank.revoked if about.module == "heart@1"} == {1}
    assert oneshot.compare(federation, state).equal
    assert sum(counts(state).values()) + sum(state.parked.values()) == 90
