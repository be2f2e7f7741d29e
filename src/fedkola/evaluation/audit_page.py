"""``audit.html``: what an adversary got from a run, for the people whose text it is.

One file that opens offline, made from the document of ``audit.json``: who could see what, the true
text beside what came out, every score with its null and its control, and what was not tried.
"""

import re
from collections.abc import Mapping, Sequence
from typing import Any

from markupsafe import Markup, escape

from fedkola.evaluation import plots
from fedkola.evaluation.plots import Scored
from fedkola.evaluation.report import write

CONCERNS = (
    ("attributable", "Text of one site"),
    ("sum_sequences", "Text in sums"),
    ("sum_presence", "Words in sums"),
    ("membership", "Who was in it"),
    ("memory", "Planted secrets"),
    ("transcript", "The bytes"),
)
# verdict -> (badge, warns, in a sentence)
VERDICTS: Mapping[str, tuple[str, bool, str]] = {
    "recovered": ("text recovered", True, "whole sequences of the true text were written down"),
    "above_null": ("leaks", True, "something leaks that nobody agreed to"),
    "broken": ("attack broken", True, "the attack failed its own control and counts as not run"),
    "disclosed": ("disclosed", False, "leaks, and every site agreed to it beforehand"),
    "bounded": ("within epsilon", False, "leaks no more than the claimed epsilon allows"),
    "at_null": ("nothing found", False, "no better than an attacker who saw nothing"),
    "not_run": ("not tried", False, "no attack of this kind was run"),
}
OBSERVERS = {
    "wire": "the network, without TLS",
    "server": "the coordinating server",
    "tls": "the network, with TLS: no content",
    "site": "another site of the federation",
    "coalition": "the server together with sites",
    "model": "whoever gets the model",
}
MEASURES = {
    "exact": "whole sequences recovered",
    "token_recall": "tokens recovered",
    "presence_auc": "telling used words from others (AUC)",
    "matched_auc": "the same among equally common words",
    "auc": "telling members from others (AUC)",
    "tpr_at_1_fpr": "members found at 1 % false alarms",
    "violations": "rules broken",
}
GATES = {
    "gate_span": "too little text behind an answer, or too few or non-adaptive steps",
    "gate_cohort": "too few sites, or no secure sum",
    "gate_embedding": "the answer holds embeddings",
    "gate_adapters": "too little text behind an adapter",
    "gate_rehearsal": "no young rehearsal of this plan that passed",
}
ROWS, SHOWN = 24, 8


def render(doc: Mapping[str, Any]) -> str:
    """The page of one audit document, which ``evaluation.auditing`` makes."""
    return write("audit.html.j2", page(doc))


def page(doc: Mapping[str, Any]) -> dict[str, Any]:
    """What the template reads, in its order."""
    attacks = list(doc["attacks"])
    verdicts = doc["verdicts"]
    return {
        "title": "Leakage audit",
        "run": doc["run"],
        "created": doc["created"].replace("T", " ")[:16],
        "headline": headline(verdicts, attacks),
        "figures": _figures(doc, attacks),
        "concerns": [name for _, name in CONCERNS],
        "threats": [_threat(view, attacks, doc["not_run"]) for view in doc["views"]],
        "legend": [
            {"badge": _badge(word), "what": says} for word, (_, _, says) in VERDICTS.items()
        ],
        "examples": _examples(attacks),
        "hidden": bool(attacks) and not any(attack["examples"] for attack in attacks),
        "plot": plots.intervals(_scored(attacks)),
        "scores": [_score(attack) for attack in attacks],
        "defences": _defences(doc),
        "not_run": [
            (f"{one['name']} on {one['target']}, as {one['observer']}", one["reason"])
            for one in doc["not_run"]
        ],
        "made": _made(doc),
    }


def headline(verdicts: Mapping[str, str], attacks: Sequence[Mapping[str, Any]]) -> str:
    """The finding in one sentence."""
    if not attacks:
        return "No attack could be tried on this run."
    exact = max((_leading(a, "exact") for a in attacks if a["verdict"] == "recovered"), default=0.0)
    if exact:
        return (
            f"An attacker wrote down {plots.percent(exact, 0)} of the true sequences of an update."
        )
    words = set(verdicts.values())
    if "above_null" in words:
        return "No whole text came out, but something leaks that nobody agreed to."
    if "broken" in words:
        return "Some attacks failed their own control: this audit says less than it seems to."
    if "disclosed" in words:
        return "No text came out; the words that were used show, as the sites agreed."
    return "Every attack that was tried did no better than one that saw nothing."


# --- private --------------------------------------------------------------------------------------


def _figures(doc: Mapping[str, Any], attacks: Sequence[Mapping[str, Any]]) -> list[dict[str, str]]:
    passed = sum(attack["positive_control"]["passed"] for attack in attacks)
    exact = [a for a in attacks if "exact" in a["metrics"] and a["verdict"] != "broken"]
    worst = max((a["metrics"]["exact"]["high"] for a in exact), default=None)
    epsilon = doc["defences"]["epsilon"]
    return [
        {
            "value": f"{len(attacks)}",
            "label": "attacks made",
            "note": f"{passed} passed their own control",
        },
        {
            "value": plots.percent(worst, 0) if worst is not None else plots.DASH,
            "label": "of sequences at most",
            "note": "upper end of the highest 95 % interval of exact recovery",
        },
        {
            "value": str(len(doc["rounds"])),
            "label": "rounds attacked",
            "note": f"payloads kept of {_list(doc['rounds'])}",
        },
        {
            "value": "none" if epsilon is None else f"{epsilon:g}",
            "label": "epsilon",
            "note": "no formal bound is claimed"
            if epsilon is None
            else f"per unit, delta {doc['defences']['delta']:g}",
        },
    ]


def _threat(
    view: Mapping[str, Any],
    attacks: Sequence[Mapping[str, Any]],
    not_run: Sequence[Mapping[str, Any]],
) -> dict[str, Any]:
    """One row of the threat table: what an observer held, and a verdict for each concern."""
    # Everybody who takes part has the last weights too.
    mine = [
        attack
        for attack in attacks
        if attack["observer"] == view["observer"]
        or (attack["target"] == "model" and view["observer"] != "tls")
    ]
    cells = []
    for concern, _ in CONCERNS:
        also = "lengths" if concern == "transcript" else concern
        own = [attack for attack in mine if attack["concern"] in (concern, also)]
        worst = min(own, key=lambda attack: list(VERDICTS).index(attack["verdict"]), default=None)
        if worst is None:
            cells.append({"badge": _badge("not_run"), "note": ""})
            continue
        name = next(iter(worst["leading"]), "")
        value = worst["metrics"].get(name)
        note = f"{worst['name']}: {_number(name, value)}" if value else worst["name"]
        cells.append({"badge": _badge(worst["verdict"]), "note": note})
    frames = f"{plots.count(view['frames'])} messages, {plots.megabytes(view['bytes'])} MB"
    if not view["frames"]:
        frames = "the last weights alone"
    return {
        "name": view["observer"],
        "who": OBSERVERS.get(view["observer"].split(":")[0], ""),
        "frames": frames,
        "cells": cells,
    }


def _badge(word: str) -> Markup:
    text, warns, _ = VERDICTS[word]
    kind = "badge warn" if warns else "badge good" if word == "at_null" else "badge"
    return Markup('<span class="{}">{}</span>').format(kind, text)


def _examples(attacks: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """True text beside what came out, the best first, one of each update."""
    found = []
    for attack in attacks:
        for example in attack["examples"]:
            truth, got = example["truth"].strip(), example["got"].strip()
            found.append(
                {
                    "attack": attack["name"],
                    "target": attack["target"],
                    "observer": attack["observer"],
                    "truth": truth,
                    "got": _marked(got, truth),
                    "share": _shared(got, truth),
                    "whole": bool(got) and got == truth,
                }
            )
    found.sort(key=lambda one: (-one["whole"], -one["share"]))
    # One line for each true text: the best that anybody got of it.
    best: dict[str, dict[str, Any]] = {}
    for one in found:
        best.setdefault(one["truth"], one)
    return list(best.values())[:SHOWN]


def _words(text: str) -> list[str]:
    """Words and signs, without the marks that a tokenizer sets between texts."""
    return re.findall(r"\w+", re.sub(r"<[|/]?\w+[|]?>", " ", text.lower()))


def _shared(got: str, truth: str) -> float:
    wanted = set(_words(truth))
    return len(wanted & set(_words(got))) / max(len(wanted), 1)


def _marked(got: str, truth: str) -> Markup:
    """What came out, with the words that stand in the true text marked."""
    wanted = set(_words(truth))
    parts = []
    for piece in re.split(r"(\w+)", got):
        shown = escape(piece)
        parts.append(Markup("<mark>{}</mark>").format(shown) if piece.lower() in wanted else shown)
    return Markup("").join(parts)


def _scored(attacks: Sequence[Mapping[str, Any]]) -> list[Scored]:
    """The leading scores that are shares; the control beside the measure that it is of."""
    rows = []
    for attack in attacks:
        control = attack["positive_control"]
        for name in attack["leading"]:
            value = attack["metrics"][name]
            if not 0 <= value["value"] <= 1:
                continue
            same = control["metric"] == name
            rows.append(
                Scored(
                    name=f"{attack['name']}: {MEASURES.get(name, name)}",
                    about=f"{attack['target']}, {attack['observer']}, {attack['updates']} updates",
                    value=value["value"],
                    low=value["low"],
                    high=value["high"],
                    null=value.get("null"),
                    control=control["value"] if same else None,
                    floor=control["floor"] if same else None,
                    broken=not control["passed"],
                )
            )
    return rows[:ROWS]


def _score(attack: Mapping[str, Any]) -> dict[str, Any]:
    control = attack["positive_control"]
    return {
        "name": attack["name"],
        "where": f"{attack['target']}, {attack['observer']}",
        "updates": attack["updates"],
        "badge": _badge(attack["verdict"]),
        "metrics": [
            (MEASURES.get(name, name.replace("_", " ")), _number(name, value), value.get("null"))
            for name, value in attack["metrics"].items()
        ],
        "control": f"{control['metric'].replace('_', ' ')} {control['value']:.2f}, "
        f"needs {control['floor']:.2f}",
        "passed": control["passed"],
        "seconds": plots.seconds(attack["seconds"]),
        "notes": attack["notes"],
    }


def _number(name: str, value: Mapping[str, float]) -> str:
    low, high = value["low"], value["high"]
    return f"{value['value']:.3f} ({low:.3f} to {high:.3f})"


def _leading(attack: Mapping[str, Any], name: str) -> float:
    return float(attack["metrics"].get(name, {}).get("value", 0.0))


def _defences(doc: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    """(value, name, note) of everything that stood against the attacks."""
    against, gate = doc["defences"], doc["gate"]
    epsilon = against["epsilon"]
    refused = ", ".join(f"{GATES.get(code, code)}: {n}" for code, n in gate.items())
    return [
        (
            "on" if against["secure_sum"] != "off" else "off",
            "secure aggregation",
            f"sums of at least {against['survivors_min']} sites"
            if against["secure_sum"] != "off"
            else "the server reads every single answer",
        ),
        (
            "none" if epsilon is None else f"{epsilon:g}",
            "differential privacy, epsilon",
            "what sums say is not bounded" if epsilon is None else "per unit, at every sum",
        ),
        (
            str(sum(gate.values())),
            "answers refused by the leakage gate",
            refused or "a heuristic, not a guarantee",
        ),
        (
            against["embedding"].replace("-", " "),
            "sites say of their embeddings",
            "the words that were used are disclosed knowingly"
            if against["embedding"] == "presence-disclosed"
            else "no leave to disclose which words were used",
        ),
        *(
            [(", ".join(against["waived"]), "rules waived by name", "for this run's records alone")]
            if against["waived"]
            else []
        ),
    ]


def _made(doc: Mapping[str, Any]) -> list[tuple[str, str]]:
    model = doc["model"]
    return [
        ("algorithm", doc["algorithm"]),
        ("sites", str(len(doc["sites"]))),
        ("model", f"{model['name']}, width {model['width']}, {plots.count(model['parameters'])}"),
        ("profile", doc["profile"]),
        *([("planted secrets", _planted(doc))] if doc.get("canaries") else []),
        ("plan", doc["plan"][:23]),
        ("transcript", doc["transcript"][:23]),
        ("fedkola", doc["version"]),
    ]


def _planted(doc: Mapping[str, Any]) -> str:
    return f"{doc['canaries']} of each kind, made up, in the text of one site"


def _list(rounds: Sequence[int]) -> str:
    shown = [str(number) for number in rounds[:6]]
    return ", ".join(shown) + (", ..." if len(rounds) > 6 else "")
