"""Two run folders become a third: bank, chain of events, and what their sites must keep.

The merged bank is that of ``knowledge.merge``. In this version the sites of a run live in its
folder, so their journals and receipts come along: of a cell that one run changed, those of that
run, so that removals go on being exact. What a site was asked to forget in one run is then removed
from what came in with the other.
"""

import json
import shutil
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from fedkola import removal, server, wire
from fedkola.algorithms.fedkola import FedKoLa
from fedkola.algorithms.fedkola import State as BankState
from fedkola.errors import Incompatible, KnowledgeError, LedgerError, UnknownCell
from fedkola.evaluation import tasks
from fedkola.federation import load_state
from fedkola.knowledge import archive, forget, journal
from fedkola.knowledge import bank as banks
from fedkola.knowledge.bank import Bank, CellKind, KnowledgeCell
from fedkola.knowledge.merge import Branch, branch, merge
from fedkola.knowledge.stream import Stream
from fedkola.ledger import Ledger
from fedkola.plan import Plan, as_dict, digest, from_dict
from fedkola.training.model import Foundation
from fedkola.types import Event


@dataclass(frozen=True, slots=True, kw_only=True)
class Source:
    """One run that is merged: its branch is hot throughout."""

    folder: Path
    plan: Plan
    state: BankState
    branch: Branch
    chain_head: str


def merge_runs(
    one: Path,
    other: Path,
    into: Path,
    *,
    stream: Stream | None = None,
    foundation: Foundation | None = None,
) -> BankState:
    """Write the run ``into`` from two others, which stay as they are; its state.

    Both must have the same [task] and [model], as labels and embeddings are theirs. Raises
    Incompatible otherwise, LedgerError if ``into`` is not empty, and what ``merge`` refuses.
    """
    if into.exists() and any(into.iterdir()):
        raise LedgerError(f"{into} is not empty; give a new folder for the merged run")
    both = [_open(folder) for folder in (one, other)]
    plans = [source.plan for source in both]
    for section in ("task", "model"):
        if getattr(plans[0], section) != getattr(plans[1], section):
            raise Incompatible(
                f"the two runs have different [{section}] sections, so they do not name the same "
                "things; run one of them again under the other's, then merge"
            )
    merged = merge(both[0].branch, both[1].branch)
    run = replace(plans[0].run, name=into.name, folder=str(into.parent))
    plan = replace(plans[0], run=run)
    number = max(source.state.number for source in both)
    state = replace(both[0].state, bank=merged.bank, number=number, parked=_parked(both))
    _bring_sites(both, merged.bank, into)
    federation = server.assemble(plan, stream or tasks.load(plan), into, foundation=foundation)
    algorithm = federation.algorithm
    assert isinstance(algorithm, FedKoLa)
    if len(federation.clients.roster()) >= algorithm.k_min:
        state = algorithm.calibrate(state, federation.clients.roster(), federation.clients)
        federation.clients.tally()
    with Ledger.open(into, create=True) as ledger:
        ledger.start(run.name, as_dict(plan), digest(plan), now=time.time())
        _commit(ledger, run.name, both, state)
        for site in federation.sites.values():
            for request in forget.accepted(site.store):
                # Nothing of it may have come in with the other run, whose site did not know.
                with suppress(UnknownCell):
                    removal.remove(federation, ledger, request)
        ledger.finish(run.name, "done")
        merged_state, _ = load_state(federation, ledger)
    assert isinstance(merged_state, BankState)
    return merged_state


# --- private --------------------------------------------------------------------------------------


def _open(folder: Path) -> Source:
    with Ledger.open(folder) as ledger:
        run = ledger.run()
        plan = from_dict(run.plan)
        if plan.algorithm.name != "fedkola":
            raise KnowledgeError(
                f"the run in {folder} used {plan.algorithm.name}; only banks of fedkola merge"
            )
        head, saved = ledger.verify(run.id), ledger.last(run.id)
        if saved is None:
            raise UnknownCell(f"the run in {folder} has not finished a round; run it first")
        state = wire.load(BankState, saved.state, saved.tensors)
        history = [(e.kind, e.subject, e.body) for e in ledger.events(run.id)]
        # Tensors of the ledger are mapped from files; the merged run writes its own.
        bank = archive.thaw(
            state.bank, archive.place(folder), [about.id for about in state.bank.cold]
        )
    return Source(
        folder=folder, plan=plan, state=state, branch=branch(bank, history), chain_head=head
    )


def _parked(both: Sequence[Source]) -> dict[str, int]:
    """What waits in either run; where both know of a scope, the larger count."""
    parked: dict[str, int] = {}
    for source in both:
        for scope, records in source.state.parked.items():
            parked[scope] = max(records, parked.get(scope, 0))
    return parked


def _bring_sites(both: Sequence[Source], merged: Bank, into: Path) -> None:
    """Every site's folder: that of the first run, and from the second what its cells rest on."""
    first, second = both
    if (first.folder / "sites").is_dir():
        shutil.copytree(first.folder / "sites", into / "sites")
    words = {cell.about.id: cell.about.words for cell in merged.cells}
    mine = {cell.about.id: cell.about.words for cell in first.branch.bank.cells}
    theirs = [
        cell.about
        for cell in second.branch.bank.cells
        if cell.about.kind is not CellKind.SCATTER
        and words.get(cell.about.id) == cell.about.words != mine.get(cell.about.id)
    ]
    for store in sorted((second.folder / "sites").glob("*")):
        target = into / "sites" / store.name
        if not target.exists():
            shutil.copytree(store, target)
            continue
        for about in theirs:
            _bring(store, target, about)
        _bring_requests(store, target)


def _bring(store: Path, target: Path, about: KnowledgeCell) -> None:
    """The journal entry and receipts of one cell, from one folder of a site to another."""
    entry = journal.path_of(store, about.round, banks.scope(about))
    there = journal.path_of(target, about.round, banks.scope(about))
    there.parent.mkdir(parents=True, exist_ok=True)
    if entry.exists():
        shutil.copy2(entry, there)
    else:
        there.unlink(missing_ok=True)
    for receipt in (store / "receipts").glob(f"{about.round:06d}-*"):
        (target / "receipts").mkdir(exist_ok=True)
        shutil.copy2(receipt, target / "receipts" / receipt.name)


def _bring_requests(store: Path, target: Path) -> None:
    """Removals that either run's site accepted hold in the merged run."""
    found: dict[str, Any] = {}
    for folder in (store, target):
        path = folder / "removals.json"
        found |= json.loads(path.read_text()) if path.exists() else {}
    if found:
        (target / "removals.json").write_text(json.dumps(found, indent=1, sort_keys=True))
    if (store / "request.key").exists() and not (target / "request.key").exists():
        shutil.copy2(store / "request.key", target / "request.key")


def _commit(ledger: Ledger, run: str, both: Sequence[Source], state: BankState) -> None:
    """The rounds of the merged run: each event in the round it belongs to, the state at the end."""
    by_round: dict[int, list[Event]] = {}
    for event in banks.events(Bank(), state.bank):
        by_round.setdefault(_round(event, state.number), []).append(event)
    merged = {
        "kind": "MERGE",
        "subject": run,
        "body": {source.plan.run.name: source.chain_head for source in both},
    }
    by_round.setdefault(state.number, []).append(merged)
    reports = _reports(both)
    for number in range(1, state.number + 1):
        last = number == state.number
        document, tensors = wire.dump(state if last else BankState(number=number))
        ledger.commit(
            run,
            number,
            state=document,
            tensors=tensors,
            report=reports[number],
            sampler={"seed": both[0].plan.run.seed, "round": number},
            events=by_round.get(number, []),
            now=time.time(),
        )


def _round(event: Event, last: int) -> int:
    """The round an event belongs to, at most the last."""
    body: Mapping[str, Any] = event["body"]
    found = body.get("round", body.get("opened", body.get("valid_from", last)))
    return max(1, min(int(found), last))


def _reports(both: Sequence[Source]) -> dict[int, Mapping[str, Any]]:
    """The report of each round, from the first run that had it."""
    found: dict[int, Mapping[str, Any]] = {}
    for source in reversed(both):
        with Ledger.open(source.folder) as ledger:
            found |= {row.number: row.report for row in ledger.rounds(ledger.run().id)}
    return found
