"""The coordinator: check the plan, build the federation, run its rounds, keep its bank small.

A run is a folder: ``ledger.db`` and ``blobs/`` are the server's, ``sites/NAME/`` belongs to each
site. One transaction per round holds state, report, sampler and events, so killing the process at
any instant leaves round n or round n + 1, and resuming gives the bits of an undisturbed run.
"""

import hashlib
import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from math import inf
from pathlib import Path
from typing import Any

import torch

from fedkola import removal, wire
from fedkola.algorithms import ALGORITHMS
from fedkola.algorithms.fedkola import FedKoLa
from fedkola.algorithms.fedkola import State as BankState
from fedkola.algorithms.quality_scan import QualityScan
from fedkola.algorithms.robust_lora import RobustLoRA
from fedkola.algorithms.setting import Setting
from fedkola.audit import transcript as transcripts
from fedkola.audit.tap import SumTap, Tap
from fedkola.audit.transcript import Transcript
from fedkola.client import Site, Trainer
from fedkola.engines import ENGINES
from fedkola.engines.in_process import Answer
from fedkola.engines.lying import lying
from fedkola.errors import (
    CohortTooSmall,
    Incompatible,
    KnowledgeError,
    ModelMismatch,
    UnknownCell,
    UnknownName,
)
from fedkola.federation import Federation, load_state, rounds, settle_revision, sweep
from fedkola.knowledge import archive, availability, membership, upkeep
from fedkola.knowledge import bank as banks
from fedkola.knowledge.availability import Pattern
from fedkola.knowledge.compact import Policy
from fedkola.knowledge.stream import Stream, in_rounds
from fedkola.ledger import Ledger
from fedkola.plan import Plan, Robust, as_dict, digest
from fedkola.privacy import guards, policy, secure_sum
from fedkola.privacy.behind import Behind
from fedkola.privacy.guards import Guarded
from fedkola.privacy.member import LEAST, Rules
from fedkola.privacy.record_dp import RecordDP
from fedkola.privacy.secure_sum import EXCHANGES, Enrolled
from fedkola.privacy.sum_dp import PooledDP, SiteDP
from fedkola.quality import groups
from fedkola.quality.lies import LIES
from fedkola.training import adapters, features, model
from fedkola.training.model import Foundation
from fedkola.types import (
    Algorithm,
    Catalogue,
    Clients,
    Cohort,
    Engine,
    Event,
    Report,
    Spent,
    Visibility,
)

CLIP = 16.0

Observe = Callable[[int, Any], Mapping[str, float]]
Progress = Callable[[Report], None]


def _scans(plan: Plan) -> None:
    """Refuse a scan of records that nobody runs, or that would spend an epsilon unseen."""
    if plan.quality.mode == "off":
        return
    if not issubclass(ALGORITHMS[plan.algorithm.name], FedKoLa | QualityScan):
        raise Incompatible(
            f"quality.mode = {plan.quality.mode!r} is read by fedkola and quality_scan, not by "
            f'{plan.algorithm.name}; set quality.mode = "off" or another algorithm.name'
        )
    if plan.quality.absorb and not issubclass(ALGORITHMS[plan.algorithm.name], QualityScan):
        raise Incompatible(
            "quality.absorb is read by quality_scan alone: cells hold records under their labels; "
            "leave it out"
        )
    if plan.privacy.epsilon != inf:
        raise Incompatible(
            f"every exchange of a scan is a query and privacy.epsilon = {plan.privacy.epsilon:g} "
            'covers none of them; set quality.mode = "off" or privacy.epsilon = inf'
        )


def check(plan: Plan) -> None:
    """Refuse before round 1 what could not hold: unknown names, protections this version lacks."""
    _known("algorithm.name", plan.algorithm.name, ALGORITHMS)
    _known("engine.name", plan.engine.name, ENGINES)
    for site, lie in plan.scenario.liars.items():
        _known(f"scenario.liars.{site}", lie, LIES)
    if plan.scenario.liars and plan.privacy.secure_sum:
        raise Incompatible(
            "scenario.liars needs to see the sums of single sites and privacy.secure_sum hides "
            "them; leave one of them out"
        )
    _scans(plan)
    if plan.knowledge.membership != "padded":
        raise Incompatible(
            f"knowledge.membership = {plan.knowledge.membership!r}: this version only has 'padded'"
        )
    method = ALGORITHMS[plan.algorithm.name]
    if plan.algorithm.ranks and not getattr(method, "unequal_ranks", False):
        able = [name for name, one in ALGORITHMS.items() if getattr(one, "unequal_ranks", False)]
        raise Incompatible(
            f"algorithm.ranks gives sites ranks of their own, which {plan.algorithm.name} cannot "
            f"add; leave it out, or set algorithm.name to {', '.join(able)}"
        )
    if issubclass(method, FedKoLa) and plan.cohort.minimum < plan.knowledge.k_min:
        raise Incompatible(
            f"cohort.minimum = {plan.cohort.minimum} is below knowledge.k_min = "
            f"{plan.knowledge.k_min}; no cell could ever open in such a round"
        )
    if issubclass(method, RobustLoRA):
        groups.settings(plan)
    elif plan.robust != Robust() or plan.cohort.groups_of:
        raise Incompatible(
            f"{plan.algorithm.name} adds updates up and reads neither [robust] nor "
            "cohort.groups_of; leave them out, or set algorithm.name to robust_lora"
        )
    if plan.privacy.secure_sum:
        _check_secure(plan)
    if getattr(method, "whole", False):
        _check_gate(plan)
    guard(plan)


def guard(plan: Plan) -> RecordDP | SiteDP | PooledDP | None:
    """The guard that keeps the plan's epsilon, None where it promises none.

    Raises Incompatible for an algorithm that cannot work under it, BudgetUnreachable where the
    plan alone shows that no noise is enough.
    """
    method, name = ALGORITHMS[plan.algorithm.name], guards.demanded(plan)
    if name and name not in getattr(method, "guards", ()):
        able = [one for one, cls in ALGORITHMS.items() if name in getattr(cls, "guards", ())]
        raise Incompatible(
            f'privacy.epsilon = {plan.privacy.epsilon:g} with privacy.level = "'
            f'{plan.privacy.level}": {plan.algorithm.name} adds no such noise and can promise no '
            f"epsilon; set algorithm.name to {', '.join(able)}, or epsilon to inf knowingly"
        )
    return guards.of(plan, method.releases(plan)) if name else None


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
    share = plan.knowledge.held_out
    parts = {name: membership.hold_out(data, share) for name, data in stream.sites.items()}
    if share:
        stream = replace(stream, sites={name: kept for name, (kept, _) in parts.items()})
    if issubclass(ALGORITHMS[plan.algorithm.name], RobustLoRA):
        groups.require(groups.settings(plan), plan.cohort.size or len(parts))
    keep = _kept(plan, stream)
    secured = enrolled(plan, folder, tuple(parts), base)
    sites = {
        name: Site(
            name,
            kept,
            catalogue=stream.catalogue,
            trainer=trainer,
            store=folder / "sites" / name,
            held_out=never,
            remembers=keep,
            demands=plan.site,
            budget=plan.scenario.budget.get(name, inf),
            member=secured.member(name, folder / "sites" / name) if secured else None,
            rounds=plan.run.rounds_per_window,
        )
        for name, (kept, never) in parts.items()
    }
    valid = in_rounds(stream.catalogue, plan.run.rounds_per_window)
    answers = lying({name: site.answer for name, site in sites.items()}, plan.scenario.liars)
    transcript = Transcript(folder / transcripts.NAME, keep=keep) if keep else None
    level = report_level(plan, stream.catalogue)
    return Federation(
        plan=plan,
        folder=folder,
        stream=stream,
        foundation=base,
        trainer=trainer,
        sites=sites,
        clients=connect(plan, answers, secured=secured, transcript=transcript),
        algorithm=build(plan, valid, trainer, level, folder),
        level=level,
        transcript=transcript,
    )


def connect(
    plan: Plan,
    answers: Mapping[str, Answer],
    *,
    secured: Enrolled | None = None,
    transcript: Transcript | None = None,
) -> Clients:
    """The server's view of sites that answer in bytes, in the wrappers that the plan asks for."""
    engine: Engine = ENGINES[plan.engine.name](
        answers, order=plan.engine.order, most=plan.cohort.records
    )
    if transcript is not None:
        engine = Tap(engine, transcript)
    # A group is asked once: the keys of more exchanges would be made for nothing.
    ahead = 1 if plan.cohort.groups_of else EXCHANGES
    clients: Clients = secured.over(engine, exchanges=ahead) if secured else engine
    if transcript is not None:
        clients = SumTap(clients, transcript)
    held = guard(plan)
    specs = () if held is None else (guards.spec(held),)
    return Guarded(clients, run=plan.run.name, seed=plan.run.seed, guards=specs)


def enrolled(plan: Plan, folder: Path, names: Sequence[str], base: Foundation) -> Enrolled | None:
    """Who takes part in secure aggregation, where the plan asks for it; keys are made once.

    Raises Incompatible below three sites.
    """
    if not plan.privacy.secure_sum:
        return None
    rules = Rules(
        plan_hash=bytes.fromhex(digest(plan)),
        manifest_hash=_manifest_hash(base),
        shapes=_shapes(base),
        colluders=plan.privacy.colluders,
    )
    if len(names) < rules.least:
        raise Incompatible(
            f"privacy.secure_sum = true with {len(names)} sites: {rules.least} are needed, or a "
            "site reads another's addend out of the sum; add sites or set it to false knowingly"
        )
    stores = {name: folder / "sites" / name for name in names}
    return secure_sum.enrol(folder / "secure_sum", stores, rules)


def load_base(plan: Plan) -> Foundation:
    """The frozen model that the plan names, embedding as it says."""
    m = plan.model
    return model.load(
        m.name,
        max_tokens=m.max_tokens,
        pooling="last" if m.pooling == "last" else "mean",
        whole=getattr(ALGORITHMS[plan.algorithm.name], "whole", False),
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


def run(federation: Federation, ledger: Ledger, *, observe: Observe, progress: Progress) -> Any:
    """All rounds from the last committed one on; returns the final state.

    ``observe`` measures a state after its round (its numbers go into the report and nowhere else),
    ``progress`` is told of every committed round. Raises CohortTooSmall if fewer sites than the
    plan's minimum are there or answer; what was committed stays and the run can be resumed.
    """
    plan, algorithm, clients = federation.plan, federation.algorithm, federation.clients
    name, held = plan.run.name, guard(plan)
    ledger.start(name, as_dict(plan), digest(plan), now=time.time())
    removal.finish(federation, ledger)
    state, done = load_state(federation, ledger)
    settle_revision(federation, state)
    state = removal.due(federation, ledger, state, done, last=done == federation.rounds)
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
            spent=_spent(held, algorithm, number),
        )
        document, tensors = wire.dump(after)
        events = getattr(algorithm, "events", _no_events)(state, after)
        ledger.commit(
            name,
            number,
            state=document,
            tensors=tensors,
            report=asdict(report),
            sampler={"seed": plan.run.seed, "round": number, **_recorded(federation)},
            events=events,
            now=time.time(),
        )
        settle_revision(federation, after)
        sweep(federation, after)
        state = removal.due(federation, ledger, after, number, last=number == federation.rounds)
        progress(report)
    ledger.finish(name, "done")
    for site in federation.sites.values():
        site.finish()
    ledger.purge(name, now=time.time())
    return state


def draw(federation: Federation, number: int) -> Cohort:
    """The cohort of a round; raises CohortTooSmall below the plan's minimum."""
    plan = federation.plan
    cohort = availability.cohort(
        federation.clients.roster(),
        size=plan.cohort.size,
        seed=plan.run.seed,
        round=number,
        late=plan.scenario.late,
        left=plan.scenario.gone,
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
    sweep(federation, after)
    return after


def _kept(plan: Plan, stream: Stream) -> Callable[[int], bool] | None:
    """Which rounds of a recorded run keep their payloads; None where nothing is recorded."""
    kept = transcripts.kept_rounds
    return kept(plan.audit.rounds, rounds(plan, stream)) if plan.audit.record else None


def _recorded(federation: Federation) -> dict[str, str]:
    """The head of the transcript, which the ledger keeps so that none of it can be cut off."""
    found = federation.transcript
    return {} if found is None else {"transcript": found.head}


def _spent(held: RecordDP | SiteDP | PooledDP | None, algorithm: Any, number: int) -> Spent | None:
    return None if held is None else guards.spent(held, algorithm.steps_until(number))


def _no_events(before: Any, after: Any) -> tuple[Event, ...]:
    return ()


def _demand(plan: Plan, number: int, sites: Sequence[str]) -> None:
    if len(sites) < _least(plan):
        raise CohortTooSmall(
            f"round {number} finds {len(sites)} sites, cohort.minimum asks for {_least(plan)}; "
            "wait for more sites and resume"
        )


def _least(plan: Plan) -> int:
    return 1 if plan.algorithm.name == "joint" else plan.cohort.minimum


def _check_secure(plan: Plan) -> None:
    method, least = ALGORITHMS[plan.algorithm.name], max(LEAST, plan.privacy.colluders + 2)
    why = ""
    if method.needs is Visibility.EACH or plan.algorithm.name == "joint":
        able = [
            name
            for name, one in ALGORITHMS.items()
            if one.needs is Visibility.SUM and name != "joint"
        ]
        why = (
            f"{plan.algorithm.name} reads single answers, which then nobody can; set "
            f"algorithm.name to {', '.join(able)}"
        )
    elif plan.cohort.minimum < least:
        why = (
            f"cohort.minimum = {plan.cohort.minimum}, and a sum must be over {least} sites at "
            "least; raise it"
        )
    elif issubclass(method, FedKoLa) and plan.knowledge.k_min < least:
        why = (
            f"knowledge.k_min = {plan.knowledge.k_min} would ask for sums over fewer than {least} "
            "sites; raise it"
        )
    if why:
        raise Incompatible(f"privacy.secure_sum = true: {why}")


def _manifest_hash(base: Foundation) -> bytes:
    text = json.dumps([base.hash, sorted(_shapes(base).items())])
    return hashlib.sha256(f"fedkola/manifest/1/{text}".encode()).digest()


def _shapes(base: Foundation) -> dict[str, tuple[int | None, ...]]:
    """Shapes of the model's own tensors, and of the adapters its layers may carry."""
    shapes: dict[str, tuple[int | None, ...]] = {
        name: tuple(value.shape) for name, value in base.model.state_dict().items()
    }
    for name, (d_out, d_in) in adapters.targets(base).items():
        shapes |= {f"{name}.lora_A": (None, d_in), f"{name}.lora_B": (d_out, None)}
    return shapes


def _check_gate(plan: Plan) -> None:
    """Refuse what every site would refuse, as far as the plan alone tells; the tokens behind an
    answer and a rehearsal are for the sites to judge. Raises PolicyRefused."""
    own = plan.pretrain
    behind = Behind(kind="whole", steps=own.inner_steps, adaptive=own.optimiser == "adamw")
    policy.gate(
        replace(plan.site, rehearsal_days=0.0),
        policy.Answer(
            sites=plan.cohort.size or plan.site.minimum,
            masked=plan.privacy.secure_sum,
            noisy=bool(guards.demanded(plan)),
            tables=("embeddings",),
            width=0,
            rank=0,
            behind=behind,
        ),
        protocol="",
        rehearsal=None,
        now=0.0,
    )


def _known(key: str, name: str, table: Mapping[str, object]) -> None:
    if name not in table:
        raise UnknownName(f"{key} = {name!r}; this version knows {sorted(table)}")
