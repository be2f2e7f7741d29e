"""An audit of a finished run: what each observer recorded, what attacks made of it, as a document.

The truth that attacks are scored against lies at the sites. Where the sites of a run are on this
machine it is read from their folders; where they are not, the attacks on their answers are listed
as not run, and the site scores them by running the same audit beside its own folder.
"""

import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from math import isfinite
from pathlib import Path
from typing import Any

from fedkola import __version__
from fedkola import plan as plans
from fedkola.audit import ATTACKS, auditor, release, transcript, verdict, view
from fedkola.audit.canary import CanaryExposure
from fedkola.audit.evidence import Evidence, Known
from fedkola.audit.verdict import Defences
from fedkola.audit.view import Observer, View
from fedkola.errors import PlanError, ReleaseRefused, UnknownName
from fedkola.evaluation import session as sessions
from fedkola.evaluation.audit_page import render
from fedkola.evaluation.session import Session
from fedkola.federation import load_state
from fedkola.files import write_text
from fedkola.plan import Plan, digest
from fedkola.privacy import policy
from fedkola.types import Report

NAMES = ("audit.json", "audit.html")
CANARIES = 4


@dataclass(frozen=True, slots=True, kw_only=True)
class Profile:
    """How thorough: updates attacked per kind of target, texts the attacker has of its own, and
    seconds after which no further attack is begun."""

    updates: int
    texts: int
    seconds: float


PROFILES: Mapping[str, Profile] = {
    "quick": Profile(updates=3, texts=400, seconds=200.0),
    "standard": Profile(updates=20, texts=4000, seconds=3600.0),
}


def audit(
    session: Session,
    *,
    observers: Sequence[str] = (),
    profile: str = "quick",
    attacks: Sequence[str] = (),
    texts: Sequence[str] = (),
    public: bool = False,
    updates: int = 0,
    note: Callable[[str], None] = lambda text: None,
) -> dict[str, Any]:
    """Attack the recorded transcript of a run and write ``audit.json`` and ``audit.html``.

    ``observers`` none is the server, one site and the holder of the model; ``attacks`` none is all
    of them; ``texts`` are public text of the attacker's own, by default the records kept for tests;
    ``updates`` 0 attacks as many of each kind as the profile says.
    True text is shown only where ``public`` or the plan says that the records are. Raises
    TranscriptMissing, ChainBroken, UnknownName.
    """
    began = time.monotonic()
    size = _profile(profile)
    federation, plan = session.federation, session.plan
    chosen = {name: _sized(ATTACKS[name], profile, plan) for name in _known(attacks)}
    roster = tuple(federation.sites)
    who = [view.observer(text, roster) for text in observers or _usual(roster)]
    heads = [
        str(row.sampler["transcript"])
        for row in session.ledger.rounds(plan.run.name)
        if "transcript" in row.sampler
    ]
    recording = transcript.read(session.folder, heads=heads)
    state, _ = load_state(federation, session.ledger)
    stores = {name: site.store for name, site in federation.sites.items()}
    known = Known(
        foundation=federation.foundation,
        texts=tuple(texts or federation.stream.test.texts)[: size.texts],
        seed=plan.run.seed,
    )
    found: list[tuple[Observer, View, list[Evidence], list[auditor.NotRun]]] = []
    for one in who:
        seen = view.view(
            recording,
            one,
            stores=stores,
            final=dict(state.weights),
            mean=plan.pretrain.outer == "average",
        )
        # An open network and the server see the same bytes, so that one attack stands for both.
        if twin := next((f for f in found if {f[0].kind, one.kind} == {"wire", "server"}), None):
            found.append((one, seen, *twin[2:]))
            continue
        sighted = view.sightings(seen)
        truth = view.truth(stores, sighted, [n for n in roster if n not in one.sites])
        evidence, left = auditor.attacked(
            seen,
            sighted,
            known,
            truth,
            chosen,
            most=updates or size.updates,
            until=began + size.seconds,
            note=lambda text, one=one: note(f"{one}: {text}"),  # type: ignore[misc]
        )
        found.append((one, seen, evidence, left))
    document = _document(session, found, recording.head, profile=profile)
    if not (public or plan.knowledge.public_reference):
        for attack in document["attacks"]:
            attack["examples"] = []
    document = release.sign(_plain(document), release.key(session.folder))
    write(session.folder, document)
    return document


def rehearse(
    plan_file: Path,
    *,
    note: Callable[[str], None] = lambda text: None,
    progress: Callable[[Report], None] = lambda report: None,
) -> Path:
    """Run a plan on its own records with recording on, beside its run folder; the new folder.

    The records count as rehearsal data: public or synthetic, as the page will show them. Where
    text is learnt, made-up secrets are planted in it, CANARIES of each kind or as the plan says.
    """
    asked = plans.load(plan_file)
    canaries = asked.audit.canaries
    if asked.algorithm.name == "diloco":
        canaries = canaries or CANARIES
    name = f"{asked.run.name[:54]}-rehearsal"
    plan = replace(
        asked,
        run=replace(asked.run, name=name),
        audit=replace(asked.audit, record=True, canaries=canaries),
    )
    folder = Path(plan.run.folder) / name
    note(f"rehearsing {asked.run.name} in {folder}")
    session = sessions.open_run(plan, folder, cache=folder / "features")
    with session.ledger:
        sessions.execute(session, progress=progress)
    return folder


def write(folder: Path, document: Mapping[str, Any]) -> None:
    """``audit.json`` for programs and ``audit.html`` for people."""
    for name, text in zip(
        NAMES, (json.dumps(document, indent=1, sort_keys=True), render(document)), strict=True
    ):
        write_text(folder / name, text)


def read(folder: Path) -> dict[str, Any]:
    """The document of the last audit of a run; raises ReleaseRefused for none that can be read."""
    path = folder / NAMES[0]
    try:
        found: dict[str, Any] = dict(json.loads(path.read_text("utf-8")))
    except (OSError, ValueError, TypeError) as error:
        raise ReleaseRefused(
            f"{path} cannot be read ({error}); audit the run first with `fedkola audit {folder}`"
        ) from error
    return found


def defences(plan: Plan) -> Defences:
    """What the plan set against an attacker."""
    epsilon = plan.privacy.epsilon
    return Defences(
        secure_sum="ms1" if plan.privacy.secure_sum else "off",
        survivors_min=plan.cohort.minimum,
        epsilon=epsilon if isfinite(epsilon) else None,
        delta=plan.privacy.delta if isfinite(epsilon) else None,
        embedding=plan.site.embedding,
        waived=(*plan.site.waive, *(("gate_cohort",) if plan.site.plain else ())),
    )


# --- private --------------------------------------------------------------------------------------


def _plain(document: Mapping[str, Any]) -> dict[str, Any]:
    """As it will be read again: what is signed must be what lies on the disk."""
    found: dict[str, Any] = json.loads(json.dumps(document))
    return found


def _usual(roster: Sequence[str]) -> tuple[str, ...]:
    return ("server", f"site:{min(roster)}", "model")


def _profile(name: str) -> Profile:
    if name not in PROFILES:
        raise UnknownName(f"profile {name!r} was given; expected {' or '.join(PROFILES)}")
    return PROFILES[name]


def _known(names: Sequence[str]) -> tuple[str, ...]:
    for name in names:
        if name not in ATTACKS:
            raise UnknownName(f"attack {name!r} was given; known are {', '.join(ATTACKS)}")
    if not ATTACKS:
        raise PlanError("this version has no attacks")
    return tuple(names or ATTACKS)


def _sized(attack: type[Any], profile: str, plan: Plan) -> Any:
    """The attack at the size of a profile, one that knows no sizes as it is; of canaries no more
    than were planted."""
    whole = attack()
    sized = whole.quick() if profile == "quick" and hasattr(whole, "quick") else whole
    if isinstance(sized, CanaryExposure) and plan.audit.canaries:
        return replace(sized, each=plan.audit.canaries)
    return sized


def _document(
    session: Session,
    found: Sequence[tuple[Observer, View, list[Evidence], list[auditor.NotRun]]],
    head: str,
    *,
    profile: str,
) -> dict[str, Any]:
    plan, federation = session.plan, session.federation
    against = defences(plan)
    scored = [(e, verdict.verdict(e, against)) for _, _, evidence, _ in found for e in evidence]
    rows = session.ledger.rounds(plan.run.name)
    words = verdict.verdicts(scored)
    return {
        "schema": verdict.SCHEMA,
        "run": plan.run.name,
        "plan": f"sha256:{digest(plan)}",
        "transcript": f"sha256:{head}",
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "version": __version__,
        "profile": profile,
        "observer": " ".join(str(one) for one, _, _, _ in found),
        "rounds": sorted(
            {s.round for _, seen, _, _ in found for s in seen.frames if seen.recording.holds(s)}
        ),
        "algorithm": plan.algorithm.name,
        "sites": sorted(federation.sites),
        "model": {
            "name": Path(federation.foundation.name).name,
            "width": federation.foundation.width,
            "parameters": sum(p.numel() for p in federation.foundation.model.parameters()),
        },
        "canaries": plan.audit.canaries,
        "defences": asdict(against),
        "gate": _refusals([row.report for row in rows]),
        "views": [_seen(one, seen) for one, seen, _, _ in found],
        "attacks": [
            verdict.attack_document(e, observer=str(one), defences=against)
            for one, _, evidence, _ in found
            for e in evidence
        ],
        "verdicts": words,
        "passed": verdict.passed(words, masked=plan.privacy.secure_sum),
        "protocol": _protocol(found),
        "at": time.time(),
        "not_run": [
            {"observer": str(one), "name": n.attack, "target": n.target, "reason": n.reason}
            for one, _, _, left in found
            for n in left
        ],
    }


def _protocol(
    found: Sequence[tuple[Observer, View, list[Evidence], list[auditor.NotRun]]],
) -> str:
    """The hash by which a site knows that a rehearsal was of the protocol it is asked under."""
    for _, seen, _, _ in found:
        if asked := view.first_question(seen.recording):
            return policy.protocol_hash(asked.algorithm, asked.guards)
    return ""


def _seen(one: Observer, seen: View) -> dict[str, Any]:
    held = [frame for frame in seen.frames if seen.recording.holds(frame)]
    return {
        "observer": str(one),
        "frames": len(seen.frames),
        "bytes": sum(frame.size for frame in seen.frames),
        "readable": len(held),
        "secrets": sorted(seen.secrets),
    }


def _refusals(reports: Sequence[Mapping[str, Any]]) -> dict[str, int]:
    """How often each rule of a leakage gate refused an answer in this run."""
    counts: dict[str, int] = {}
    for report in reports:
        for code in dict(report.get("refused", {})).values():
            if str(code).startswith("gate_"):
                counts[str(code)] = counts.get(str(code), 0) + 1
    return counts
