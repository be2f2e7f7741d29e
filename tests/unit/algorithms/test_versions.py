"""Knowledge that turns: what contradicts a module opens its next version, or waits."""

import random
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import pytest
import small_federation as small

from fedkola import removal
from fedkola.algorithms.fedkola import FedKoLa, State
from fedkola.federation import load_state
from fedkola.knowledge import bank as banks
from fedkola.knowledge import views, windows
from fedkola.knowledge.bank import CellKind, ModuleState
from fedkola.knowledge.forget import Request
from fedkola.ledger import Ledger
from fedkola.types import Dataset

FAST = 'knowledge.lanes=["analytic", "router"]'
TURNED = {"heart-1": "heart-2", "heart-2": "heart-3", "heart-3": "heart-1"}
PER_WINDOW = 36


def records(site: str, turned: Mapping[int, Mapping[str, str]], *, rounds: int = 4) -> Dataset:
    """Heart in every window and some lung in the first; ``turned`` relabels heart by window."""
    chance = random.Random(f"versions/{site}")
    rows = []
    for window in range(1, rounds + 1):
        scopes = ["heart"] * PER_WINDOW + ["lung"] * (12 if window == 1 else 0)
        for scope in scopes:
            code = f"{scope}-{chance.randint(1, 3)}"
            words = [
                *chance.choices(small.FILLER, k=1),
                *chance.choices(small.OWN_WORDS[code], k=4),
            ]
            label = turned.get(window, {}).get(code, code)
            name = f"{site}-{len(rows)}"
            rows.append((name, " ".join(words), label, f"{name}-p", window))
    names, texts, labels, patients, at = zip(*rows, strict=True)
    return Dataset(records=names, texts=texts, labels=labels, patients=patients, windows=at)


def federation(
    folder: Path, turned: Mapping[str, Mapping[int, Mapping[str, str]]], *settings: str, rounds=4
) -> small.Federation:
    sites = {site: records(site, turned.get(site, {}), rounds=rounds) for site in small.SITES}
    return small.assemble(folder, FAST, *settings, sites=sites, rounds=rounds)


def versions(state: State) -> dict[str, ModuleState]:
    return {module.id: module.state for module in state.bank.modules}


def shares(fed: small.Federation, state: State) -> tuple[float, float]:
    """How often the heart texts of one site are answered as they were labelled at first, and as
    they are labelled once they have turned."""
    assert isinstance(fed.algorithm, FedKoLa)
    head = fed.algorithm.view(state).head
    assert head is not None
    data = records("north", {})
    heart = data.take([i for i in range(len(data)) if data.labels[i] in TURNED])
    z = fed.trainer.cache.integers(heart.texts)
    given = [head.nodes[0][int(i)] for i in views.scores(head, z, 0).argmax(1)]
    old = sum(a == b for a, b in zip(given, heart.labels, strict=True)) / len(heart)
    new = sum(a == TURNED[b] for a, b in zip(given, heart.labels, strict=True)) / len(heart)
    return old, new


ALL = {site: {4: TURNED} for site in small.SITES}


def test_labels_that_turn_at_every_site_open_the_next_version(tmp_path: Path):
    fed = federation(tmp_path, ALL)
    state = small.run(fed)
    assert versions(state)["heart@1"] is ModuleState.SUPERSEDED
    assert versions(state)["heart@2"] is ModuleState.ACTIVE
    assert versions(state)["lung@1"] is ModuleState.ACTIVE
    new = [cell.about for cell in state.bank.cells if cell.about.module == "heart@2"]
    assert {about.kind for about in new} == {CellKind.ANALYTIC, CellKind.ROUTER}
    assert {(about.round, about.records, about.contributors) for about in new} == {
        (4, 5 * PER_WINDOW, 5)
    }
    old, new = shares(fed, state)
    assert new > 0.5 > 2 * old
    # The earlier version still answers as of its time.
    assert isinstance(fed.algorithm, FedKoLa)
    past = fed.algorithm.view(state, known_at=3)
    assert "heart@1" in past.modules
    assert "heart@2" not in past.modules


def test_without_a_change_there_is_one_version_and_no_finding(tmp_path: Path):
    fed = federation(tmp_path, {})
    state = small.run(fed)
    assert set(versions(state)) == {"heart@1", "lung@1"}
    assert state.parked == {}
    assert state.doubtful == ()
    right, asked = state.usual["heart"]
    assert asked == 5 * 3 * PER_WINDOW  # every window but the first, before it was summed
    assert right > 0.5 * asked


@pytest.mark.parametrize("sites", [("north",), ("north", "west")])
def test_what_fewer_than_k_min_sites_contradict_waits_there(tmp_path: Path, sites):
    fed = federation(tmp_path, {site: {4: TURNED} for site in sites})
    state = small.run(fed)
    assert set(versions(state)) == {"heart@1", "lung@1"}
    assert state.parked == {"heart": len(sites) * PER_WINDOW}
    last = [c.about for c in state.bank.cells if c.about.round == 4]
    assert {about.contributors for about in last} == {
        5 - len(sites),
    }
    found = windows.findings(fed.sites["north"].store, 4)["heart"]
    assert found.decision == windows.CONFLICT
    assert "contradict heart" in found.note
    assert windows.findings(fed.sites["south"].store, 4)["heart"].decision == windows.HIT


def test_a_majority_turns_a_module_and_the_others_wait_for_a_round(tmp_path: Path):
    turned = {site: {4: TURNED} for site in ("north", "south", "east")}
    state = small.run(federation(tmp_path, turned))
    assert versions(state)["heart@2"] is ModuleState.ACTIVE
    (cell,) = (
        c.about
        for c in state.bank.cells
        if c.about.round == 4 and c.about.kind is CellKind.ANALYTIC
    )
    assert (cell.module, cell.contributors, cell.records) == ("heart@2", 3, 3 * PER_WINDOW)
    assert state.parked == {"heart": 2 * PER_WINDOW}


def test_laggards_do_not_turn_a_module_back(tmp_path: Path):
    # Three sites turn in window 4, two repeat the old labels in 4 and 5 and are then joined.
    early: Mapping[int, Mapping[str, str]] = {4: TURNED, 5: TURNED, 6: TURNED}
    turned = dict.fromkeys(("north", "south", "east"), early)
    turned |= {site: {6: TURNED} for site in ("west", "centre")}
    fed = federation(tmp_path, turned, rounds=6)
    state = small.run(fed)
    assert versions(state)["heart@2"] is ModuleState.ACTIVE
    assert "heart@3" not in versions(state)


def test_a_window_declared_as_something_else_is_flagged_counted_and_not_moved(tmp_path: Path):
    sites = {site: records(site, {}) for site in small.SITES}
    whole = sites["north"]
    texts = tuple(
        f"{text} {small.OWN_WORDS['bone-1'][0]}" if window == 4 else text
        for text, window in zip(whole.texts, whole.windows, strict=True)
    )
    sites["north"] = replace(whole, texts=texts)
    fed = small.assemble(tmp_path, FAST, sites=sites, rounds=4)
    state = small.run(fed)
    assert state.misfits == {"heart": 1}
    found = windows.findings(fed.sites["north"].store, 4)["heart"]
    assert (found.decision, found.misfit) == (windows.HIT, True)
    assert "declared heart" in found.note
    last = [c.about for c in state.bank.cells if c.about.round == 4]
    assert {about.records for about in last} == {5 * PER_WINDOW}
    with Ledger.open(fed.folder) as ledger:
        told = [(event.kind, event.subject) for event in ledger.events("small")]
    assert ("MISFIT", "heart") in told


def test_conflicting_labels_for_the_same_text_are_found_and_settled_by_the_larger_camp(
    tmp_path: Path,
):
    # From window 4 on two camps label the same texts differently; the larger one stays in force.
    sites = {site: records("same", {}) for site in small.SITES}
    for site, camp in (("east", {4: TURNED}), ("west", {4: TURNED})):
        sites[site] = records("same", camp)
    sites = {
        site: replace(data, records=tuple(f"{site}-{i}" for i in range(len(data))))
        for site, data in sites.items()
    }
    fed = small.assemble(tmp_path, FAST, sites=sites, rounds=4)
    state = small.run(fed)
    assert set(versions(state)) == {"heart@1", "lung@1"}
    assert state.parked == {"heart": 2 * PER_WINDOW}
    old, new = shares(fed, state)
    assert old > 0.5 > 2 * new


def test_a_single_label_that_turns_is_doubted_by_name(tmp_path: Path):
    swap = {"heart-1": "heart-2"}
    state = small.run(federation(tmp_path, {site: {4: swap} for site in small.SITES}))
    assert state.doubtful == ("heart-2",)
    assert set(versions(state)) == {"heart@1", "lung@1"}


def test_a_site_leaves_every_version_it_is_in(tmp_path: Path):
    fed = federation(tmp_path / "with", ALL)
    small.run(fed)
    with Ledger.open(fed.folder) as ledger:
        removal.remove(fed, ledger, Request(kind="site", site="west"), recount=True)
        state, _ = load_state(fed, ledger)
    sites = {site: records(site, ALL[site]) for site in small.SITES if site != "west"}
    never = small.run(small.assemble(tmp_path / "never", FAST, sites=sites, rounds=4))
    assert small.cells(state) == small.cells(never)
    kept = "".join(path.read_text() for path in (fed.sites["west"].store / "findings").iterdir())
    assert "west-" not in kept
    assert banks.module_of(state.bank, "heart") is not None
