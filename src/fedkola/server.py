"""The coordinator: check the plan, build the federation, run its rounds, remove what must go.

A run is a folder: ``ledger.db`` and ``blobs/`` are the server's, ``sites/NAME/`` belongs to each
site. One transaction per round holds state, report, sampler and events, so killing the process at
any instant leaves round n or round n + 1, and resuming gives the bits of an undisturbed run.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from math import isfinite
from pathlib import Path
from typing import Any

import torch

from fedkola import wire
from fedkola.algorithms import ALGORITHMS
from fedkola.algorithms.fedkola import FedKoLa
from fedkola.algorithms.fedkola import State as BankState
from fedkola.algorithms.setting import Setting
from fedkola.client import Site, Trainer
from fedkola.engines import ENGINES
from fedkola.errors import (
    CohortTooSmall,
    Incompatible,
    KnowledgeError,
    ModelMismatch,
    UnknownCell,
    UnknownName,
)
from fedkola.knowledge import archive, availability, forget, upkeep
from fedkola.knowledge import bank as banks
from fedkola.knowledge.availability import Pattern
from fedkola.knowledge.compact import Policy
from fedkola.knowledge.forget import CellOutcome, ForgetReceipt, Request
from fedkola.knowledge.stream import Stream
from fedkola.ledger import Ledger
from fedkola.plan import Plan, as_dict, digest
from fedkola.privacy.guards import Guarded
from fedkola.training import adapters, features, model
from fedkola.training.model import Foundation
from fedkola.types import Algorithm, Catalogue, Clients, Cohort, Event, Report, Weights

CLIP = 16.0

Observe = Callable[[int, Any], Mapping[str, float]]
Progress = Callable[[Report], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class Federation:
    """Everything one run needs: the plan, the data of its sites, the model, the algorithm."""

    plan: Plan
    folder: Path
    stream: Stream
    foundation: Foundation
    trainer: Trainer
    sites: Mapping[str, Site]
    clients: Clients
    algorithm: Algorithm[Any]
    level: int

    @property
    def rounds(self) -> int:
        return self.plan.run.rounds or len(self.stream.windows)


def check(plan: Plan) -> None:
    """Refuse before round 1 what could not hold: unknown names, protections this version lacks."""
    _known("algorithm.name", plan.algorithm.name, ALGORITHMS)
    _known("engine.name", plan.engine.name, ENGINES)
    if plan.privacy.secure_sum:
        raise Incompatible(
            "privacy.secure_sum = true: this version has no secure aggregation, and a run is never "
            "started with less protection than its plan asks for; set it to false knowingly"
        )
    if isfinite(plan.privacy.epsilon):
        raise Incompatible(
            f"privacy.epsilon = {plan.privacy.epsilon}: this version adds no noise and can promise "
            "no epsilon; set it to inf knowingly"
        )
    if plan.quality.mode != "off":
        raise Incompatible(f"quality.mode = {plan.quality.mode!r}: this version only has 'off'")
    if plan.knowledge.membership != "padded":
        raise Incompatible(
            f"knowledge.membership = {plan.knowledge.membership!r}: this version only has 'padded'"
        )
    if plan.algorithm.name == "fedkola" and plan.cohort.minimum < plan.knowledge.k_min:
        raise Incompatible(
            f"cohort.minimum = {plan.cohort.minimum} is below knowledge.k_min = "
            f"{plan.knowledge.k_min}; no cell could ever open in such a round"
        )


def assemble(
    plan: Plan,
    stream: Stream,
    folder: Path,
    *,
    cache: Path | None = None,
    foundation: Foundation | None = None,
) -> Federation:
    """Load the model, give every site its records and folder, and build the algorithm.

    ``cache`` keeps frozen features between runs; ``foundation`` saves loading the model again.
    """
    check(plan)
    if plan.model.threads:
        torch.set_num_threads(plan.model.threads)
    base = foundation or load_base(plan)
    if base.pooling != plan.model.pooling:
        raise ModelMismatch(
            f"the model given was loaded with pooling {base.pooling!r} and model.pooling = "
            f"{plan.model.pooling!r}; load it with load_base(plan)"
        )
    trainer = Trainer(
        foundation=base,
        cache=features.FeatureCache(base, cache),
        targets=adapters.targets(base),
        scale=plan.algorithm.alpha / plan.algorithm.rank,
        clip=CLIP,
    )
    sites = {
        name: Site(
            name,
            data,
            catalogue=stream.catalogue,
            trainer=trainer,
            store=folder / "sites" / name,
        )
        for name, data in stream.sites.items()
    }
    answers = {name: site.answer for name, site in sites.items()}
    engine = ENGINES[plan.engine.name](answers, order=plan.engine.order)
    level = report_level(plan, stream.catalogue)
    return Federation(
        plan=plan,
        folder=folder,
        stream=stream,
        foundation=base,
        trainer=trainer,
        sites=sites,
        clients=Guarded(engine, run=plan.run.name, seed=plan.run.seed),
        algorithm=build(plan, stream.catalogue, trainer, level, folder),
        level=level,
    )


def load_base(plan: Plan) -> Foundation:
    """The frozen model that the plan names, embedding as it says."""
    m = plan.model
    return model.load(
        m.name, max_tokens=m.max_tokens, pooling="last" if m.pooling == "last" else "mean"
    )


def report_level(plan: Plan, catalogue: Catalogue) -> int:
    """The position of the reported level; ICD-10-CM reports blocks unless the plan says else."""
    name = plan.task.level or ("block" if "block" in catalogue.levels else catalogue.levels[0])
    if name not in catalogue.levels:
        raise UnknownName(f"task.level = {name!r}; this task has the levels {catalogue.levels}")
    return catalogue.levels.index(name)


def build(
    plan: Plan, catalogue: Catalogue, trainer: Trainer, level: int, folder: Path
) -> Algorithm[Any]:
    """The algorithm that the plan names, with its hyper-parameters; raises Incompatible."""
    setting = Setting(
        plan=plan,
        catalogue=catalogue,
        level=level,
        width=trainer.foundation.width,
        targets=trainer.targets,
        scale=trainer.scale,
        clip=trainer.clip,
        base=trainer.foundation.hash,
        cold=archive.place(folder),
    )
    algorithm: Algorithm[Any] = ALGORITHMS[plan.algorithm.name].of(setting)
    return algorithm


def initial_weights(federation: Federation) -> Weights:
    """LoRA factors of every layer, and for an encoder a head with a row per reported node."""
    plan, base = federation.plan, federation.foundation
    weights = dict(adapters.weights_template(base, rank=plan.algorithm.rank, seed=plan.run.seed))
    if base.kind == "encoder":
        rows = len(federation.stream.catalogue.nodes(federation.level))
        weights["head.weight"] = torch.zeros(rows, base.width)
        weights["head.bias"] = torch.zeros(rows)
    return weights


def run(federation: Federation, ledger: Ledger, *, observe: Observe, progress: Progress) -> Any:
    """All rounds from the last committed one on; returns the final state.

    ``observe`` measures a state after its round (its numbers go into the report and nowhere else),
    ``progress`` is told of every committed round. Raises CohortTooSmall if fewer sites than the
    plan's minimum are there or answer; what was committed stays and the run can be resumed.
    """
    plan, algorithm, clients = federation.plan, federation.algorithm, federation.clients
    name = plan.run.name
    ledger.start(name, as_dict(plan), digest(plan), now=time.time())
    _finish_removals(federation, ledger)
    state, done = load_state(federation, ledger)
    _settle_revision(federation, state)
    state = _due(federation, ledger, state, done)
    for number in range(done + 1, federation.rounds + 1):
        cohort = draw(federation, number)
        began, cpu_began = time.perf_counter(), time.process_time()
        after = algorithm.round(number, state, cohort, clients)
        seconds, cpu_seconds = time.perf_counter() - began, time.process_time() - cpu_began
        tally = clients.tally()
        _demand(plan, number, [site for site in cohort if site not in tally.refused])
        report = Report(
            round=number,
            cohort=cohort,
            refused=tally.refused,
            metrics=observe(number, after),
            bytes_down=tally.bytes_down,
            bytes_up=tally.bytes_up,
            seconds=seconds,
            cpu_seconds=cpu_seconds,
        )
        document, tensors = wire.dump(after)
        events = getattr(algorithm, "events", _no_events)(state, after)
        ledger.commit(
            name,
            number,
            state=document,
            tensors=tensors,
            report=asdict(report),
            sampler={"seed": plan.run.seed, "round": number},
            events=events,
            now=time.time(),
        )
        _settle_revision(federation, after)
        _sweep(federation, after)
        state = _due(federation, ledger, after, number)
        progress(report)
    ledger.finish(name, "done")
    for site in federation.sites.values():
        site.finish()
    ledger.purge(name, now=time.time())
    return state


def load_state(federation: Federation, ledger: Ledger) -> tuple[Any, int]:
    """The last committed state and its round; the initial state and 0 for a fresh run."""
    start = federation.algorithm.start(initial_weights(federation))
    saved = ledger.last(federation.plan.run.name)
    if saved is None:
        return start, 0
    return wire.load(type(start), saved.state, saved.tensors), saved.number


def draw(federation: Federation, number: int) -> Cohort:
    """The cohort of a round; raises CohortTooSmall below the plan's minimum."""
    plan = federation.plan
    cohort = availability.cohort(
        federation.clients.roster(),
        size=plan.cohort.size,
        seed=plan.run.seed,
        round=number,
        late=plan.scenario.late,
        left=plan.scenario.leave,
        pattern=Pattern(
            name=plan.scenario.availability,
            absent=plan.scenario.absent,
            spell=plan.scenario.spell,
        ),
    )
    if plan.scenario.availability != "full" and len(cohort) < _least(plan):
        raise CohortTooSmall(
            f"round {number} finds {len(cohort)} of {len(federation.clients.roster())} sites, as "
            f"scenario.availability = {plan.scenario.availability!r} keeps a share of "
            f"{plan.scenario.absent:g} away, and cohort.minimum asks for {_least(plan)}; the same "
            "seed draws the same absences, so start anew with a lower scenario.absent or "
            "cohort.minimum, more sites, or another run.seed"
        )
    _demand(plan, number, cohort)
    return cohort


def remove(
    federation: Federation, ledger: Ledger, request: Request, *, recount: bool = False
) -> ForgetReceipt:
    """Forget a site, a patient or a record in the last committed state; returns the receipt.

    The site accepts the request, every site of the roster answers the removal (zeros where it
    has nothing), the new integers are committed, and only then are the site's own rows deleted.
    A request that is done already returns the receipt it had. Raises UnknownCell if the site
    contributed nothing under the request.
    ``recount`` also asks the remaining sites to sum their journals again and compares; it shows
    the difference of two sums, so it is for public data and for tests.
    """
    algorithm, plan = federation.algorithm, federation.plan
    if not isinstance(algorithm, FedKoLa):
        raise KnowledgeError(
            f"{plan.algorithm.name} keeps no cells, so nothing can be subtracted; only fedkola can "
            "forget without training again"
        )
    if request.site not in federation.sites:
        raise UnknownName(f"no site {request.site!r}; this run has {sorted(federation.sites)}")
    request = forget.keyed(federation.sites[request.site].store, request)
    _finish_removals(federation, ledger)
    done = _removed(federation, ledger)
    if request.id in done:
        return forget.receipt_from(done[request.id])
    state, number = load_state(federation, ledger)
    _settle_revision(federation, state)
    if number == 0:
        raise UnknownCell("no round is committed yet, so there is nothing to forget; run it first")
    receipt, after = _subtract(federation, algorithm, state, request, recount=recount)
    document, tensors = wire.dump(after)
    written = forget.document(receipt)
    event = {"kind": "FORGET", "subject": request.id, "body": written}
    ledger.amend(
        plan.run.name,
        number,
        state=document,
        tensors=tensors,
        events=(*algorithm.events(state, after), event),
        removal={**written, "scope": {"request": request.id}},
        now=time.time(),
    )
    federation.sites[request.site].settle(request)
    ledger.purge(plan.run.name, now=time.time())
    _sweep(federation, after)
    return receipt


def compact(federation: Federation, ledger: Ledger, policy: Policy) -> BankState:
    """Make the last committed bank small by this policy, outside of a round; the new state."""
    algorithm, state, number = _last_bank(federation, ledger)
    place = archive.place(federation.folder)
    bank = upkeep.tidy(
        state.bank, policy, place, now=number, rule=algorithm.rule, targets=algorithm.targets
    )
    return _upkept(federation, ledger, state, replace(state, bank=bank), number)


def freeze_unused(federation: Federation, ledger: Ledger) -> BankState:
    """Move cells that no view of the present reads to cold storage; the new state."""
    _, state, number = _last_bank(federation, ledger)
    bank, gone = archive.freeze(state.bank, archive.unused(state.bank))
    archive.put(archive.place(federation.folder), gone)
    return _upkept(federation, ledger, state, replace(state, bank=bank), number)


def purge_archive(federation: Federation, ledger: Ledger) -> BankState:
    """Give cold storage up, which the ledger says of every cell; the new state."""
    _, state, number = _last_bank(federation, ledger)
    after = replace(state, bank=archive.purge(state.bank))
    return _upkept(federation, ledger, state, after, number)


# --- private --------------------------------------------------------------------------------------


def _last_bank(federation: Federation, ledger: Ledger) -> tuple[FedKoLa, BankState, int]:
    """The algorithm, the last committed state and its round; raises KnowledgeError, UnknownCell."""
    algorithm = federation.algorithm
    if not isinstance(algorithm, FedKoLa):
        raise KnowledgeError(
            f"this run used {federation.plan.algorithm.name}, which keeps no knowledge bank"
        )
    state, number = load_state(federation, ledger)
    if number == 0:
        raise UnknownCell("no round is committed yet, so the bank is empty; run it first")
    return algorithm, state, number


def _upkept(
    federation: Federation, ledger: Ledger, before: BankState, after: BankState, number: int
) -> BankState:
    """Commit a bank that was moved about but says the same; ``before`` is returned if it is."""
    events = banks.events(before.bank, after.bank)
    if not events:
        return before
    document, tensors = wire.dump(after)
    ledger.amend(
        federation.plan.run.name,
        number,
        state=document,
        tensors=tensors,
        events=events,
        removal=None,
        now=time.time(),
    )
    ledger.purge(federation.plan.run.name, now=time.time())
    _sweep(federation, after)
    return after


def _no_events(before: Any, after: Any) -> tuple[Event, ...]:
    return ()


def _subtract(
    federation: Federation,
    algorithm: FedKoLa,
    state: BankState,
    request: Request,
    *,
    recount: bool,
) -> tuple[ForgetReceipt, BankState]:
    began = time.perf_counter()
    clients = federation.clients
    concerned = federation.sites[request.site].post(request)
    names = [
        about.id
        for about in banks.origins(state.bank)
        if (about.round, banks.scope(about)) in concerned and request.site in about.cohort
    ]
    there = availability.cohort(
        clients.roster(),
        size=0,
        seed=0,
        round=state.number,
        late=federation.plan.scenario.late,
        left=federation.plan.scenario.leave,
    )
    roster = tuple(name for name in clients.roster() if name in there or name == request.site)
    staying = roster if request.kind != "site" else _without(roster, request.site)
    leaver = request.site if request.kind == "site" else ""
    after, before, records = algorithm.remove(
        state, names, request.id, roster, clients, leaver=leaver
    )
    same = None
    if recount:
        names = [cell.about.id for cell in before]
        same = algorithm.recount(after, names, request.id, staying, clients)
    after = algorithm.calibrate(after, staying, clients)
    live = {cell.about.id: cell.about.words for cell in after.bank.cells}
    outcomes = tuple(
        CellOutcome(
            cell=cell.about.id,
            module=cell.about.module,
            kind=cell.about.kind.value,
            outcome=forget.classify(cell.about.kind, request),
            before=cell.about.words,
            after=live.get(cell.about.id, "revoked"),
        )
        for cell in before
    )
    receipt = ForgetReceipt(
        request=request.id,
        kind=request.kind,
        site=request.site,
        records=records,
        cells=outcomes,
        view_before=algorithm.view(state).id if state.bank.cells else "",
        view_after=algorithm.view(after).id if after.bank.cells else "",
        recount=same,
        seconds=time.perf_counter() - began,
    )
    clients.tally()
    return receipt, after


def _due(federation: Federation, ledger: Ledger, state: Any, number: int) -> Any:
    """Carry out removals of sites that left up to this round, once each."""
    done = _removed(federation, ledger)
    changed = False
    for site, last in sorted(federation.plan.scenario.leave.items()):
        request = Request(kind="site", site=site)
        if last > number or request.id in done or not isinstance(federation.algorithm, FedKoLa):
            continue
        # A site that left before anything of it was sealed has nothing to take back.
        with suppress(UnknownCell):
            remove(federation, ledger, request, recount=federation.plan.knowledge.public_reference)
            changed = True
    return load_state(federation, ledger)[0] if changed else state


def _finish_removals(federation: Federation, ledger: Ledger) -> None:
    """Settle and purge what was committed when the process was killed before it could do so."""
    done = _removed(federation, ledger)
    for site in federation.sites.values():
        for request in forget.posted(site.store):
            if request.id in done:
                site.settle(request)
    if done:
        ledger.purge(federation.plan.run.name, now=time.time())
    _sweep(federation, load_state(federation, ledger)[0])


def _sweep(federation: Federation, state: Any) -> None:
    """Delete cold cells that the committed state does not name: what was removed, or was written
    for a round that never came about."""
    if isinstance(state, BankState):
        archive.sweep(archive.place(federation.folder), state.bank)


def _settle_revision(federation: Federation, state: Any) -> None:
    """Let sites drop the old versions that the last committed round took out of the bank; again
    after a crash, where it changes nothing."""
    if isinstance(state, BankState):
        for name in state.revision.sites:
            federation.sites[name].revise(state.revision.places, round=state.number)


def _removed(federation: Federation, ledger: Ledger) -> dict[str, Mapping[str, Any]]:
    """Receipts of the removals that are committed, by request."""
    rows = ledger.removals(federation.plan.run.name)
    return {row["receipt"]["request"]: row["receipt"] for row in rows}


def _demand(plan: Plan, number: int, sites: Sequence[str]) -> None:
    if len(sites) < _least(plan):
        raise CohortTooSmall(
            f"round {number} finds {len(sites)} sites, cohort.minimum asks for {_least(plan)}; "
            "wait for more sites and resume"
        )


def _least(plan: Plan) -> int:
    return 1 if plan.algorithm.name == "joint" else plan.cohort.minimum


def _without(roster: Sequence[str], site: str) -> Cohort:
    return tuple(name for name in roster if name != site)


def _known(key: str, name: str, table: Mapping[str, object]) -> None:
    if name not in table:
        raise UnknownName(f"{key} = {name!r}; this version knows {sorted(table)}")
