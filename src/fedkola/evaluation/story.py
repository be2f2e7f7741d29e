"""The result document of a run: what ``result.json`` holds and ``report.html`` shows.

Everything is read from the ledger and measured on the final state; nothing is remembered from
the run itself, so a resumed run tells the same story.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from math import isfinite
from typing import Any

from fedkola.algorithms.fedkola import FedKoLa
from fedkola.algorithms.fedkola import State as BankState
from fedkola.evaluation import (
    answers,
    lineage,
    machine,
    metrics,
    oneshot,
    perplexity,
    scoring,
)
from fedkola.evaluation.answers import Answer
from fedkola.federation import Federation
from fedkola.knowledge.bank import CellKind
from fedkola.knowledge.stream import Records
from fedkola.ledger import EventRow, Ledger, RoundRow
from fedkola.plan import as_dict
from fedkola.quality.corrupt import LABEL_NOISES
from fedkola.types import Dataset, Visibility

OUTSIDE = "quarterly revenue of the shipping company rose by four percent"
AGREEMENT_RECORDS = 2000
CHANGES = 40


def document(federation: Federation, ledger: Ledger, state: Any) -> dict[str, Any]:
    """The document that :func:`fedkola.evaluation.report.render` turns into a page."""
    run = federation.plan.run.name
    rounds, events = ledger.rounds(run), ledger.events(run)
    receipts = [row["receipt"] for row in ledger.removals(run)]
    found: dict[str, Any] = {
        "title": f"{federation.stream.catalogue.system}: {len(federation.sites)} sites, "
        f"{len(rounds)} rounds",
        "run": run,
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "plan": as_dict(federation.plan),
        "machine": machine.describe(),
        "privacy": _privacy(federation, rounds),
        "turn": "round" if federation.one_window else "window",
        "windows": [
            _window(federation, row, events, bank=isinstance(state, BankState)) for row in rounds
        ],
        "excluded": {place: dict(reasons) for place, reasons in federation.stream.excluded.items()},
        "notices": list(federation.stream.notices),
        "parked": dict(state.parked) if isinstance(state, BankState) else {},
        "commands": _commands(federation, receipts),
    }
    if isinstance(state, BankState) and state.bank.modules:
        found["lineage"] = _lineage(federation, state, events)
    if receipts:
        found["receipt"] = _receipt(receipts[-1])
    if perplexity.is_whole(federation):
        found["curves"] = perplexity.curves([row.report for row in rounds])
        found["samples"] = perplexity.samples(federation.folder)
        if rounds:
            found["headline"], found["figures"] = _trained(federation, rounds)
        return found | {"sites": _sites(federation, {})}
    if not rounds or federation.foundation.kind == "causal":
        return found | {"sites": _sites(federation, {})}
    scopes = [s for s in federation.stream.catalogue.scopes() if _first(federation, s)]
    matrix = metrics.matrix([row.report["metrics"] for row in rounds], scopes)
    found |= {
        "scopes": [
            {"id": s, "text": scope_text(federation, s), "first_window": _first(federation, s)}
            for s in scopes
        ],
        "matrix": matrix,
        "metrics": {
            "forgetting": metrics.forgetting(matrix),
            "bwt": metrics.backward_transfer(matrix),
            "stream": metrics.stream_average(matrix),
            "freshness_lag": dict(zip(scopes, _lags(federation, matrix), strict=True)),
        },
    }
    agreement: dict[str, float] = {}
    lanes = federation.plan.knowledge.lanes
    if isinstance(state, BankState) and state.bank.cells and CellKind.ANALYTIC.value in lanes:
        found["examples"] = _examples(federation, state)
        agreement = _agreement(federation, state)
        check = oneshot.compare(federation, state)
        joint = final_row(federation, check.state, scopes)
        # Removal changes what the last window's row was measured on, so both sides are re-measured.
        now = final_row(federation, state, scopes)
        found["metrics"]["excess_forgetting"] = metrics.excess_forgetting([now], joint)
        found["metrics"]["equal_to_one_shot"] = check.equal
    found["sites"] = _sites(federation, agreement)
    found["figures"] = _figures(found, rounds)
    found["headline"] = _headline(federation, found, rounds)
    return found


def final_row(federation: Federation, state: Any, scopes: Sequence[str]) -> list[float | None]:
    """Accuracy per scope of a state on everything that may be asked at the end."""
    window = len(federation.stream.windows)
    test = scoring.askable(federation.stream.test, window)
    found = scoring.accuracy(federation, state, test, window=window).concepts
    return [found[s][0] / found[s][1] if s in found else None for s in scopes]


def scope_text(federation: Federation, scope: str) -> str:
    """A scope in words: the description of its top-level node, or its name."""
    label = next(e for e in federation.stream.catalogue.labels if e.scope == scope)
    return federation.stream.catalogue.texts.get(label.path[-1], scope)


# --- private --------------------------------------------------------------------------------------


def _first(federation: Federation, scope: str) -> int | None:
    codes = {e.code for e in federation.stream.catalogue.labels if e.scope == scope}
    windows = [
        window
        for data in federation.stream.sites.values()
        for code, window in zip(data.labels, data.windows, strict=True)
        if code in codes
    ]
    return min(windows) if windows else None


def _lags(federation: Federation, matrix: metrics.Matrix) -> list[float | None]:
    """Windows until each scope is answered, from one row a round."""
    rounds = federation.plan.run.rounds_per_window
    return [lag and lag / rounds for lag in metrics.freshness_lag(matrix)]


def _window(
    federation: Federation, row: RoundRow, events: Sequence[EventRow], *, bank: bool
) -> dict[str, Any]:
    report, number = row.report, row.number
    here = [event for event in events if event.round == number]
    sealed = [event for event in here if event.kind == "SEAL"]
    known = {e.subject for e in events if e.kind == "LABEL" and e.round <= number}
    opened = [event.subject.rsplit("@", 1)[0] for event in here if event.kind == "OPEN"]
    parked = [event for event in here if event.kind == "PARK"]
    late = {
        site: f"late: answers from round {first}"
        for site, first in federation.plan.scenario.late.items()
        if number < first
    }
    left = {
        site: f"left after round {last}"
        for site, last in federation.plan.scenario.gone.items()
        if number > last
    }
    notes = [f"{site} joins" for site, w in federation.plan.scenario.late.items() if w == number]
    if parked:
        waiting = sum(event.body["records"] for event in parked)
        names_of = ", ".join(scope_text(federation, event.subject) for event in parked)
        few = f"fewer than {federation.plan.knowledge.k_min} sites bring the same"
        notes.append(f"{waiting} records wait at their sites, since {few}: {names_of}")
    notes += [
        f"{event.body['site']} is forgotten: {event.body['records']} records"
        for event in here
        if event.kind == "FORGET"
    ]
    found: dict[str, Any] = {
        "number": number,
        "name": "" if federation.one_window else federation.moment(number),
        "arrived": [scope_text(federation, scope) for scope in opened],
        "asked": len(report["cohort"]) + len(late) + len(left),
        "answered": len(report["cohort"]) - len(report["refused"]),
        "absent": {**late, **left, **report["refused"]},
        "bytes_up": report["bytes_up"],
        "bytes_down": report["bytes_down"],
        "seconds": report["seconds"],
        "notes": notes,
    }
    if bank:
        found["sealed"] = len(sealed)
    if "perplexity" in report["metrics"]:
        found["perplexity"] = report["metrics"]["perplexity"]
    if report.get("spent"):
        found["epsilon"] = report["spent"]["epsilon"]
    if "top1" in report["metrics"]:
        found |= {
            "known": len(known),
            "labels": len(federation.stream.catalogue.labels),
            "top1": report["metrics"]["top1"],
            "top5": report["metrics"]["top5"],
        }
    return found


def _lineage(
    federation: Federation, state: BankState, events: Sequence[EventRow]
) -> dict[str, Any]:
    """The bank's record with its scopes in words; of many changes the last ones."""
    told = lineage.chronicle(state.bank, events)
    known = set(federation.stream.catalogue.scopes())
    versions = [
        {
            **version,
            "text": scope_text(federation, version["scope"])
            if version["scope"] in known
            else version["scope"],
        }
        for version in told["versions"]
    ]
    return {
        "rounds": state.number,
        "versions": versions,
        "changes": told["changes"][-CHANGES:],
        "earlier": max(0, len(told["changes"]) - CHANGES),
    }


def _sites(federation: Federation, agreement: Mapping[str, float]) -> list[dict[str, Any]]:
    scenario = federation.plan.scenario
    found = []
    for name, data in federation.stream.sites.items():
        roles = []
        if name in scenario.noisy:
            what = "labels" if scenario.noise in LABEL_NOISES else "records"
            kind = "" if scenario.noise == "symmetric" else f" ({scenario.noise})"
            roles.append(f"noisy: {scenario.noisy[name]:.0%} of its {what} are wrong{kind}")
        if name in scenario.liars:
            roles.append(f"lies about its sums: {scenario.liars[name]}")
        if name in scenario.late:
            roles.append(f"late: answers from round {scenario.late[name]}")
        if name in scenario.leave:
            roles.append(f"left after round {scenario.leave[name]}, and was forgotten")
        if name in scenario.quit:
            roles.append(f"left after round {scenario.quit[name]}; what it gave stays")
        about = federation.stream.about.get(name, {})
        found.append(
            {
                "site": name,
                "specialty": about.get("specialty", ""),
                "scopes": list(about.get("scopes", ())),
                "records": len(data),
                "role": "; ".join(roles),
                "agreement": agreement.get(name),
            }
        )
    return found


def _agreement(federation: Federation, state: BankState) -> dict[str, float]:
    """Share of each site's own labels that the federation's model gives too, as each site could
    measure at home with the view it downloads."""
    nodes = scoring.arrived(federation, federation.window(state.number))
    found = {}
    for name, whole in federation.stream.sites.items():
        if name in federation.plan.scenario.leave:
            continue
        data = Records(whole).until(federation.window(state.number))
        step = max(1, len(data) // AGREEMENT_RECORDS)
        sample = data.take(range(0, len(data), step))
        scores = scoring.scores_of(federation, state, sample, nodes)
        given = scoring.truth(federation.stream.catalogue, federation.level, sample)
        best = [nodes[int(i)] for i in scores.argmax(1)]
        found[name] = sum(a == b for a, b in zip(best, given, strict=True)) / max(len(sample), 1)
    return found


def _examples(federation: Federation, state: BankState) -> dict[str, list[dict[str, Any]]]:
    """A few answers, right and wrong, and some that the reader's view cannot give."""
    algorithm = federation.algorithm
    assert isinstance(algorithm, FedKoLa)
    test = scoring.askable(federation.stream.test, len(federation.stream.windows))
    step = max(1, len(test) // 400)
    sample = test.take(range(0, len(test), step))
    view = algorithm.view(state)
    found = _ask(federation, state, list(sample.texts))
    wanted = scoring.truth(federation.stream.catalogue, federation.level, sample)
    right = [i for i, a in enumerate(found) if a.answers and a.answers[0].code == wanted[i]]
    wrong = [i for i in range(len(found)) if i not in set(right)]
    examples = {
        "right": [_example(federation, found[i], wanted[i]) for i in _spread(right, 4)],
        "wrong": [_example(federation, found[i], wanted[i]) for i in _spread(wrong, 4)],
        "missing": [],
    }
    if view.router is None or len(view.modules) < 2:
        return examples
    without, rows = _largest_scope(federation, sample)
    # Who may not hold one module of a fused adapter holds none: their parts may be purged.
    apart = {module for module in view.modules if module.rsplit("@", 1)[0] == without}
    apart.update(
        m for fused in state.bank.fused if apart & set(fused.modules) for m in fused.modules
    )
    held = [module for module in view.modules if module not in apart]
    asked = _ask(federation, state, [sample.texts[i] for i in rows[:12]], held=held)
    pairs = [(a, wanted[i]) for a, i in zip(asked, rows, strict=False) if a.missing == "not_held"]
    examples["missing"] = [_example(federation, a, node) for a, node in pairs[:2]]
    outside = _ask(federation, state, [OUTSIDE])[0]
    if outside.missing:
        examples["missing"].append(_example(federation, outside, ""))
    return examples


def _largest_scope(federation: Federation, sample: Dataset) -> tuple[str, list[int]]:
    scope_of = {e.code: e.scope for e in federation.stream.catalogue.labels}
    scopes = [scope_of[code] for code in sample.labels]
    largest = Counter(scopes).most_common(1)[0][0]
    return largest, [i for i, scope in enumerate(scopes) if scope == largest]


def _ask(
    federation: Federation,
    state: BankState,
    texts: Sequence[str],
    held: Sequence[str] | None = None,
) -> tuple[Answer, ...]:
    algorithm = federation.algorithm
    assert isinstance(algorithm, FedKoLa)
    return answers.answer(
        federation,
        algorithm.view(state, held=held),
        texts,
        temperature=state.calibration.temperature,
        unknown=state.calibration.unknown,
        whole=algorithm.view(state),
        as_of=federation.moment(state.number),
        top_k=3,
        base=state.base,
    )


def _example(federation: Federation, found: Answer, truth: str) -> dict[str, Any]:
    return {
        "text": found.text,
        "truth": truth,
        "truth_text": federation.stream.catalogue.texts.get(truth, ""),
        "answers": [
            {"code": c.code, "text": c.text, "confidence": c.confidence} for c in found.answers
        ],
        "coverage": found.coverage,
        "reason": found.missing,
    }


def _spread(rows: Sequence[int], count: int) -> list[int]:
    return [rows[i] for i in range(0, len(rows), max(1, len(rows) // count))][:count]


def _receipt(receipt: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "request": receipt["request"],
        "scope": {"kind": receipt["kind"], "id": receipt["site"]},
        "cells": [
            {
                "cell": f"{cell['module'].rsplit('@', 1)[0]} ({cell['kind']})",
                "class": cell["outcome"],
                "before": cell["before"],
                "after": cell["after"],
            }
            for cell in receipt["cells"]
        ],
        "view_before": receipt["view_before"],
        "view_after": receipt["view_after"],
        "equal_to_never_joined": receipt["recount"],
        "seconds": receipt["seconds"],
        "not_covered": list(receipt["not_covered"]),
    }


def _figures(found: Mapping[str, Any], rounds: Sequence[RoundRow]) -> list[dict[str, str]]:
    last = rounds[-1].report
    lags = [lag for lag in found["metrics"]["freshness_lag"].values() if lag is not None]
    up = sum(row.report["bytes_up"] for row in rounds)
    figures = [
        {
            "label": "right at first answer",
            "value": f"{last['metrics']['top1']:.1%}",
            "note": f"of {int(last['metrics']['asked']):,} questions never trained on",
        },
        {
            "label": "right among five",
            "value": f"{last['metrics']['top5']:.1%}",
            "note": f"{int(last['metrics']['nodes'])} codes compete",
        },
    ]
    if lags:
        slowest = max(lags)
        figures.append(
            {
                "label": "until new knowledge answers",
                "value": "same window" if slowest == 0 else f"{slowest:g} windows",
                "note": "the slowest scope, to 90 % of its final accuracy",
            }
        )
    if "excess_forgetting" in found["metrics"]:
        excess = found["metrics"]["excess_forgetting"]
        figures.append(
            {
                "label": "lost to forgetting",
                "value": f"{excess:.3f}" if abs(excess) > 1e-12 else "0",
                "note": "against training on everything at once",
            }
        )
    else:
        figures.append({"label": "sent by all sites", "value": f"{up / 1e6:,.0f} MB", "note": ""})
    return figures


def _trained(
    federation: Federation, rounds: Sequence[RoundRow]
) -> tuple[str, list[dict[str, str]]]:
    """The headline and the key figures of a run that trains a whole model."""
    last, spent = rounds[-1].report["metrics"], rounds[-1].report.get("spent")
    tokens = sum(row.report["metrics"].get("tokens", 0.0) for row in rounds)
    moved = sum(row.report["bytes_up"] + row.report["bytes_down"] for row in rounds)
    headline = (
        f"In {len(rounds)} rounds, {len(federation.sites)} sites that never shared a record have "
        f"trained one model to a perplexity of {last['perplexity']:.4g} on text held out."
    )
    figures = [
        {
            "label": "perplexity on held-out text",
            "value": f"{last['perplexity']:.4g}",
            "note": f"the worst site {last['worst']:.4g}",
        },
        {"label": "tokens trained on", "value": f"{tokens:,.0f}", "note": "by all sites together"},
        {"label": "sent, both ways", "value": f"{moved / 1e6:,.0f} MB", "note": "by all sites"},
    ]
    if spent:
        note = f"delta {spent['delta']:g}, for one {spent['unit']}"
        figures.append(
            {"label": "epsilon spent at most", "value": f"{spent['epsilon']:.3g}", "note": note}
        )
    return headline, figures


def _headline(federation: Federation, found: Mapping[str, Any], rounds: Sequence[RoundRow]) -> str:
    last, windows = rounds[-1].report["metrics"], federation.window(rounds[-1].number)
    text = (
        f"After {windows} windows, {len(federation.sites)} sites that never shared a record "
        f"answer {last['top1']:.0%} of unseen questions right at the first try, "
        f"{last['top5']:.0%} within five."
    )
    if "receipt" in found and found["receipt"]["equal_to_never_joined"]:
        who = found["receipt"]["scope"]["id"]
        text += f" {who} left and was forgotten: what remains equals never having had it."
    return text


def _privacy(federation: Federation, rounds: Sequence[RoundRow]) -> str:
    """What leaves a site, who can see it, and what is promised; paragraphs."""
    if federation.algorithm.needs is Visibility.EACH:
        text = (
            "Records never leave a site. Each site sends what it has trained, and the coordinator "
            "reads it site by site."
        )
    else:
        trained, sums = "how its text moved the model", "integer sums over its records"
        text = (
            f"Records never leave a site. Each site sends "
            f"{trained if perplexity.is_whole(federation) else sums}; the coordinator uses nothing "
            "but the sum over all sites asked. "
        )
        text += (
            "Secure aggregation hides what one site sent: the machine that adds reads masked words "
            "and the sum."
            if federation.plan.privacy.secure_sum
            else "This run has no secure aggregation: the machine that adds can see what each site "
            "sent before adding."
        )
    text += "\n\n" + _promise(federation, rounds)
    if federation.plan.knowledge.public_reference:
        text += (
            "\n\nThis run declares its data to be a public reference (public_reference = true), "
            "so the floors on records and holders per label are off. Do not do this with records "
            "of patients."
        )
    return text


def _promise(federation: Federation, rounds: Sequence[RoundRow]) -> str:
    p = federation.plan.privacy
    if not isfinite(p.epsilon):
        return (
            "No noise is added, and no bound is claimed against anyone: what is sent, and its sum, "
            "can reveal what went into it, above all if that is little."
        )
    hidden, where = {
        "record": (f"one {p.unit} of a site", "added at every site before anything leaves"),
        "pooled": (f"one {p.unit} of any site", "in every sum"),
        "site": ("all that one site has", "in every sum"),
    }[p.level]
    text = (
        f"Noise is {where}: it hides {hidden} from everyone else by epsilon {p.epsilon:g} and "
        f"delta {p.delta:g} over the whole run"
    )
    spent = rounds[-1].report.get("spent") if rounds else None
    return text + (f", of which {spent['epsilon']:.3g} is spent at most." if spent else ".")


def _commands(
    federation: Federation, receipts: Sequence[Mapping[str, Any]]
) -> list[dict[str, str]]:
    folder = str(federation.folder)
    if federation.foundation.kind == "causal":
        text = "text"
    else:
        text = federation.stream.test.texts[0].replace('"', "'")
    if perplexity.is_whole(federation):
        return [
            {"command": f"fedkola model export {folder} --to MODEL", "what": "use the model"},
            {"command": f"fedkola run --resume {folder}", "what": "go on with the run"},
        ]
    gone = {receipt["site"] for receipt in receipts}
    site = next((name for name in federation.sites if name not in gone), "SITE")
    found = [
        {"command": f'fedkola predict {folder} "{text}"', "what": "ask the model"},
        {"command": f"fedkola bank ls {folder}", "what": "see what it knows, and since when"},
        {
            "command": f"fedkola bank forget {folder} --site {site}",
            "what": "make it forget a site; prints a receipt",
        },
    ]
    if "lora" in federation.plan.knowledge.lanes:
        found.append(
            {
                "command": f"fedkola bank export {folder} --to {folder}/peft",
                "what": "write a folder that peft loads",
            }
        )
    return found
