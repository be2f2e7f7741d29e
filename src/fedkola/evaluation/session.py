"""A run in its folder: start it, resume it, ask it, make it forget, export it."""

import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from fedkola import removal, server
from fedkola.algorithms.fedkola import FedKoLa
from fedkola.algorithms.fedkola import State as BankState
from fedkola.audit import release as gate
from fedkola.errors import (
    BasisMismatch,
    KnowledgeError,
    LedgerError,
    ModelMismatch,
    RunNotFound,
    UnknownCell,
    UnknownName,
)
from fedkola.evaluation import answers, generative, perplexity, receipts, scoring, story, tasks
from fedkola.evaluation.answers import Answer
from fedkola.evaluation.receipts import Finding
from fedkola.evaluation.report import render
from fedkola.federation import Federation, load_state
from fedkola.files import write_text
from fedkola.knowledge import bank as banks
from fedkola.knowledge import views
from fedkola.knowledge.compact import Policy
from fedkola.knowledge.forget import ForgetReceipt, Request, Waiting
from fedkola.knowledge.stream import Stream
from fedkola.knowledge.views import View
from fedkola.ledger import Ledger
from fedkola.plan import Plan, digest, dump, from_dict
from fedkola.training import adapters
from fedkola.training.model import Foundation
from fedkola.types import Report


@dataclass(frozen=True, slots=True, kw_only=True)
class Session:
    """One run folder, opened: ledger, sites, model and algorithm."""

    plan: Plan
    folder: Path
    federation: Federation
    ledger: Ledger


def open_run(
    plan: Plan,
    folder: Path,
    *,
    cache: Path | None = None,
    stream: Stream | None = None,
    foundation: Foundation | None = None,
) -> Session:
    """A new run in ``folder``, or the same plan's run again.

    The plan and its data are checked before anything is written. Raises PlanError or DataError,
    LedgerError if the folder holds another run.
    """
    server.check(plan)
    found = stream or tasks.load(plan)
    _same_run(plan, folder)
    federation = server.assemble(plan, found, folder, cache=cache, foundation=foundation)
    ledger = Ledger.open(folder, create=True)
    return Session(plan=plan, folder=folder, federation=federation, ledger=ledger)


def resume(folder: Path, *, cache: Path | None = None) -> Session:
    """The run that this folder holds, with the plan its ledger keeps; raises RunNotFound."""
    ledger = Ledger.open(folder)
    plan = from_dict(ledger.run().plan)
    federation = server.assemble(plan, tasks.load(plan), folder, cache=cache)
    return Session(plan=plan, folder=folder, federation=federation, ledger=ledger)


def execute(session: Session, *, progress: Callable[[Report], None]) -> Any:
    """All remaining rounds; then the view, the plan, ``result.json`` and ``report.html``."""
    state = server.run(
        session.federation, session.ledger, observe=observer(session), progress=progress
    )
    publish(session, state)
    return state


def observer(session: Session) -> server.Observe:
    """Measures every round's state on the test records that may be asked by then."""
    federation = session.federation
    test = federation.stream.test

    def observe(number: int, state: Any) -> Mapping[str, float]:
        window = federation.window(number)
        if perplexity.is_whole(federation):
            perplexity.sample(federation, state, number)
            return perplexity.measure(federation, state, number)
        answered: Mapping[str, float] = {}
        if test.prompts:
            answered = generative.measure(federation, state, window)
        if federation.foundation.kind == "causal":
            return answered or scoring.perplexity(federation, state, test)
        askable = generative.asked(federation.stream, window)
        found = scoring.accuracy(federation, state, askable, window=window)
        metrics: dict[str, float] = {
            "top1": found.top1,
            "top5": found.top5,
            "asked": found.asked,
            "nodes": found.nodes,
        }
        for scope, (right, asked) in found.concepts.items():
            metrics[f"right/{scope}"], metrics[f"asked/{scope}"] = right, asked
        return {**answered, **metrics}

    return observe


def publish(session: Session, state: Any, *, extra: Mapping[str, Any] | None = None) -> None:
    """Write what a person and other programs read: view, plan, result and report."""
    folder = session.folder
    # A view that no cell stands for any more may hold what was just removed.
    shutil.rmtree(folder / "view", ignore_errors=True)
    if isinstance(state, BankState) and state.bank.cells:
        algorithm = _bank_algorithm(session)
        provenance = {
            "run": session.plan.run.name,
            "round": state.number,
            "chain_head": session.ledger.verify(session.plan.run.name),
            "base": session.federation.foundation.hash,
            "calibration": asdict(state.calibration),
        }
        views.save(algorithm.view(state), folder / "view", provenance)
    write_text(folder / "plan.toml", dump(session.plan))
    document = {**story.document(session.federation, session.ledger, state), **(extra or {})}
    write_text(folder / "result.json", json.dumps(document, indent=1, sort_keys=True))
    write_text(folder / "report.html", render(document))


def result(session: Session) -> dict[str, Any]:
    """The document that was last written to ``result.json``."""
    found: dict[str, Any] = json.loads((session.folder / "result.json").read_text("utf-8"))
    return found


def predict(
    session: Session,
    texts: Sequence[str],
    *,
    top_k: int = 5,
    level: str = "",
    valid_at: float | None = None,
    known_at: int | None = None,
    held: Sequence[str] | None = None,
    site: str = "",
) -> tuple[Answer, ...]:
    """Codes for texts, from the last committed state, as of a time and with the held modules.

    ``site`` answers as that site may. Raises AccessRefused for a held module that it may not have.
    """
    state, algorithm = _bank_state(session), _bank_algorithm(session)
    modules = _held(session, state, held, site)
    view = algorithm.view(state, valid_at=valid_at, known_at=known_at, held=modules)
    whole = algorithm.view(state, valid_at=valid_at, known_at=known_at)
    last = min(known_at or state.number, state.number)
    moment = session.federation.moment(last)
    return answers.answer(
        session.federation,
        view,
        texts,
        temperature=state.calibration.temperature,
        unknown=state.calibration.unknown,
        whole=whole,
        as_of=moment if valid_at is None else f"{moment}, valid at {valid_at:g}",
        top_k=top_k,
        level=level,
        base=state.base,
    )


def view(
    session: Session,
    *,
    valid_at: float | None = None,
    known_at: int | None = None,
    held: Sequence[str] | None = None,
) -> View:
    """The view of the last committed state, as of a world time and a knowledge time."""
    state = _bank_state(session)
    modules = None if held is None else _modules(state, held)
    return _bank_algorithm(session).view(state, valid_at=valid_at, known_at=known_at, held=modules)


def compact(session: Session, *, eps: float) -> BankState:
    """Add up what can be, and fuse LoRA modules within ``eps``; then write view and report anew."""
    before = _bank_state(session)
    knowledge = session.plan.knowledge
    # As small as may be: one cell a group, and no slot more than eps demands.
    policy = Policy(
        hot_cells=1, recent=0, eps=eps, slots_max=knowledge.slots_max, spare=knowledge.slots_max
    )
    after = server.compact(session.federation, session.ledger, policy)
    return _republished(session, before, after)


def archive(session: Session, *, purge: bool) -> BankState:
    """Move cells that no view of the present reads to cold storage; with ``purge`` give it up."""
    before = _bank_state(session)
    after = server.freeze_unused(session.federation, session.ledger)
    if purge:
        after = server.purge_archive(session.federation, session.ledger)
    return _republished(session, before, after)


def forget(
    session: Session,
    request: Request,
    *,
    recount: bool = False,
    now: bool = False,
    absent: bool = False,
) -> ForgetReceipt | Waiting:
    """Accept a removal, carry it out where it need not wait, and write view and report anew.

    ``now`` carries it out whatever two states of the bank then show, ``absent`` without the site.
    Raises KnowledgeError for ``absent`` or ``recount`` without ``now``, unless the data is public:
    both show the difference of two sums.
    """
    _bank_algorithm(session)
    federation, ledger = session.federation, session.ledger
    public = session.plan.knowledge.public_reference
    if (recount or absent) and not (now or public):
        raise KnowledgeError(
            "--recount and --absent show the difference of two sums over other sites, and this "
            "data is not declared public; give --now as well to accept that"
        )
    if now or public:
        found = removal.remove(federation, ledger, request, recount=recount, absent=absent)
    else:
        waits = removal.request_removal(federation, ledger, request)
        if isinstance(waits, Waiting):
            return waits
        found = waits
    _republish(session, load_state(federation, ledger)[0])
    return found


def verify(session: Session, receipt: ForgetReceipt) -> tuple[Finding, ...]:
    """Every hash of a receipt, recomputed; the view's too, if nothing has changed since."""
    name = session.plan.run.name
    found = receipts.verify(session.ledger, name, receipt)
    if not receipts.last_word(session.ledger, name, receipt):
        return found
    state, _ = load_state(session.federation, session.ledger)
    now = _bank_algorithm(session).view(state).id if state.bank.cells else ""
    same = now == receipt.view_after
    return (*found, Finding(what="view", holds=same, how="computed from the integers on disk"))


def export(session: Session, to: Path, *, modules: Sequence[str] = ()) -> Path:
    """Write the bank as a folder that ``peft`` loads, with head, router and provenance beside it.

    Modules are composed with a flat gate (each weighs 1/K), which is what the router says when it
    knows nothing. Raises UnknownCell for an unknown module, BasisMismatch without LoRA cells or
    if ``to`` is not empty.
    """
    state, algorithm = _bank_state(session), _bank_algorithm(session)
    whole = algorithm.view(state)
    chosen = _modules(state, modules) if modules else tuple(whole.adapters)
    if not chosen or any(module not in whole.adapters for module in chosen):
        raise BasisMismatch(
            "this bank has no LoRA cells of these modules, and peft loads nothing else; add "
            '"lora" to knowledge.lanes and run again'
        )
    if to.exists() and any(to.iterdir()):
        raise BasisMismatch(f"{to} is not empty; give a new folder")
    share = 1 / len(chosen)
    adapter = adapters.combine([(whole.adapters[module], share) for module in chosen])
    adapters.export_peft(
        session.federation.foundation, adapter, scale=session.federation.trainer.scale, folder=to
    )
    provenance = {
        "run": session.plan.run.name,
        "round": state.number,
        "base": session.federation.foundation.hash,
        "modules": list(chosen),
        "gate": share,
        "calibration": asdict(state.calibration),
        "exported": datetime.now(UTC).isoformat(timespec="seconds"),
    }
    views.save(whole, to / "view", provenance)
    write_text(to / "provenance.json", json.dumps({**provenance, "view": whole.id}, indent=1))
    return to


def export_model(session: Session, to: Path) -> Path:
    """Write the model that a run has pre-trained as a folder that transformers loads; raises
    KnowledgeError if it trained none, ModelMismatch if the folder is not empty."""
    state, number = load_state(session.federation, session.ledger)
    return perplexity.export(session.federation, state, to, number=number)


def release(
    session: Session, to: Path, document: Mapping[str, Any], *, now: float
) -> dict[str, Any]:
    """Export the model with a signed certificate, if its audit meets [release] of the plan; raises
    ReleaseRefused and writes nothing otherwise."""
    if to.exists() and any(to.iterdir()):
        raise ModelMismatch(f"{to} is not empty; give a new folder")
    return gate.release(
        lambda folder: export_model(session, folder),
        to,
        document,
        session.plan.release,
        ledger=session.ledger,
        key=gate.key(session.folder),
        now=now,
    )


# --- private --------------------------------------------------------------------------------------


def _republish(session: Session, state: BankState) -> None:
    """Write view and report anew; baselines are not run again, what they reached stays."""
    kept = result(session) if (session.folder / "result.json").exists() else {}
    publish(session, state, extra={key: kept[key] for key in ("comparison",) if key in kept})


def _republished(session: Session, before: BankState, after: BankState) -> BankState:
    changed = banks.metadata(after.bank) != banks.metadata(before.bank)
    if changed and (session.folder / "view").is_dir():
        _republish(session, after)
    return after


def _same_run(plan: Plan, folder: Path) -> None:
    """Refuse a folder that holds another run before sites make their folders in it."""
    try:
        with Ledger.open(folder) as ledger:
            held = ledger.run()
    except RunNotFound:
        return
    if (held.id, held.plan_hash) != (plan.run.name, digest(plan)):
        raise LedgerError(
            f"{folder} holds run {held.id!r} with plan {held.plan_hash[:8]}, and run "
            f"{plan.run.name!r} with plan {digest(plan)[:8]} was given; resume that one with "
            f"`fedkola run --resume {folder}`, or give another folder with run.name"
        )


def _bank_algorithm(session: Session) -> FedKoLa:
    algorithm = session.federation.algorithm
    if not isinstance(algorithm, FedKoLa):
        raise KnowledgeError(
            f"this run used {session.plan.algorithm.name}, which keeps no knowledge bank"
        )
    return algorithm


def _bank_state(session: Session) -> BankState:
    _bank_algorithm(session)
    state, number = load_state(session.federation, session.ledger)
    assert isinstance(state, BankState)
    if not number or not state.bank.cells:
        raise UnknownCell(
            f"the bank in {session.folder} is still empty; run more rounds with "
            f"`fedkola run --resume {session.folder}`"
        )
    return state


def _modules(state: BankState, names: Sequence[str]) -> tuple[str, ...]:
    """Module ids from module ids or scopes."""
    found = []
    for name in names:
        match = [m.id for m in state.bank.modules if name in (m.id, m.scope)]
        if not match:
            known = ", ".join(m.scope for m in state.bank.modules)
            raise UnknownCell(f"no module {name!r}; this bank has {known}")
        found += match
    return tuple(found)


def _held(
    session: Session, state: BankState, names: Sequence[str] | None, site: str
) -> tuple[str, ...] | None:
    """The modules to answer with: those named, or all that a site may hold; None is every one."""
    if site and site not in session.federation.sites:
        raise UnknownName(
            f"no site {site!r}; this run has {', '.join(sorted(session.federation.sites))}"
        )
    if names is None:
        return banks.held(state.bank, site) if site else None
    modules = _modules(state, names)
    if site:
        banks.demand_held(state.bank, site, modules)
    return modules
