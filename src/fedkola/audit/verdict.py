"""What a score means: one word for each attack, for each thing an operator worries about, and one
document that says how it was reached.

- ``broken``: the attack failed on the undefended records of its own control; it counts as not run.
- ``at_null``: its score is not above that of an attacker who learnt nothing.
- ``bounded``: above the null, and within what the claimed epsilon allows.
- ``disclosed``: above the null, and every site agreed beforehand to disclose it.
- ``above_null``: something leaks that nobody agreed to.
- ``recovered``: whole sequences of the true text were written down.

An attack that finds nothing proves nothing: it says what this attack could not do.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from fedkola.audit.evidence import Evidence, Measure

SCHEMA = "fedkola.audit/1"
# From worst to best, "broken" where nothing worse is known.
ORDER = ("recovered", "above_null", "broken", "disclosed", "bounded", "at_null", "not_run")
# A score must stand this far above its null: the null is an estimate too.
MARGIN = 0.02
SEQUENCES, PRESENCE, MEMBERSHIP = "sequences", "presence", "membership"
MEMORY, TRANSCRIPT, LENGTHS = "memory", "transcript", "lengths"


@dataclass(frozen=True, slots=True, kw_only=True)
class Reading:
    """How the scores of one attack are read: what it is about, and the measures that decide, the
    first that is there leading. ``claimed`` decide instead where an epsilon is claimed: those of
    one unit, which is all that it speaks of."""

    concern: str
    measures: tuple[str, ...]
    claimed: tuple[str, ...] = ()


READINGS: Mapping[str, Reading] = {
    "dager": Reading(concern=SEQUENCES, measures=("exact", "token_recall")),
    "subspace": Reading(concern=SEQUENCES, measures=("exact", "token_recall")),
    "matching": Reading(concern=SEQUENCES, measures=("exact", "token_recall")),
    "patches": Reading(concern=SEQUENCES, measures=("exact", "patch_recall")),
    "embedding_rows": Reading(concern=PRESENCE, measures=("token_recall",)),
    "presence": Reading(concern=PRESENCE, measures=("presence_auc", "matched_auc")),
    "membership": Reading(concern=MEMBERSHIP, measures=("auc", "tpr_at_1_fpr")),
    "canary": Reading(
        concern=MEMORY,
        measures=("exposure_64", "greedy_64", "exposure_16", "greedy_16", "exposure_unit_64"),
        claimed=("exposure_unit_64", "exposure_1", "greedy_unit_64", "greedy_1"),
    ),
    "checks": Reading(concern=TRANSCRIPT, measures=("violations",)),
    "sizes": Reading(concern=LENGTHS, measures=("violations",)),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Defences:
    """What stood against the attacks, as the plan and the sites say: ``secure_sum`` "off" or the
    protocol, the least survivors of a sum, ``epsilon`` None where no bound is claimed, and what
    sites declared of their embeddings."""

    secure_sum: str = "off"
    survivors_min: int = 0
    epsilon: float | None = None
    delta: float | None = None
    embedding: str = "refuse"
    waived: tuple[str, ...] = ()


def verdict(evidence: Evidence, defences: Defences) -> str:
    """One word for one attack; see the head of this file."""
    if not evidence.control.passed:
        return "broken"
    reading = read(evidence)
    shown = leading(evidence, defences)
    if not any(above(evidence.measures[name], chance=_chance(name)) for name in shown):
        return "at_null"
    exact = evidence.measures.get("exact")
    if reading.concern == SEQUENCES and exact is not None and above(exact):
        return "recovered"
    if reading.concern == PRESENCE and defences.embedding == "presence-disclosed":
        return "disclosed"
    claimed, found = defences.epsilon, evidence.measures.get("epsilon")
    if claimed is not None and found is not None and found.low <= claimed:
        return "bounded"
    return "above_null"


def above(measure: Measure, *, chance: float = 0.0) -> bool:
    """Whether the whole interval lies above the null and above ``chance``: of a few records a null
    may fall below what a coin scores, which makes a coin no finding."""
    return measure.low > max(chance, measure.null or 0.0) + MARGIN


def read(evidence: Evidence) -> Reading:
    """How this attack is read; one of a stranger is about sequences by all its measures."""
    known = READINGS.get(evidence.attack)
    return known or Reading(concern=SEQUENCES, measures=tuple(evidence.measures))


def leading(evidence: Evidence, defences: Defences) -> list[str]:
    """The measures that decide a verdict, of those that are there."""
    reading = read(evidence)
    chosen = reading.claimed if defences.epsilon is not None else ()
    return [name for name in chosen or reading.measures if name in evidence.measures]


def concern(evidence: Evidence) -> str:
    """The row of the verdicts that an attack belongs to: "attributable" for single answers, the sum
    by what is claimed of it, the model and the transcript by theirs."""
    about = read(evidence).concern
    if about in (MEMBERSHIP, MEMORY, TRANSCRIPT, LENGTHS):
        return about
    return "attributable" if evidence.target == "single" else f"sum_{about}"


def verdicts(found: Sequence[tuple[Evidence, str]]) -> dict[str, str]:
    """The worst verdict of each concern; "not_run" where nothing was tried."""
    rows = (
        "attributable",
        "sum_sequences",
        "sum_presence",
        MEMBERSHIP,
        MEMORY,
        TRANSCRIPT,
        LENGTHS,
    )
    return {
        row: min(
            (word for evidence, word in found if concern(evidence) == row),
            key=ORDER.index,
            default="not_run",
        )
        for row in rows
    }


def passed(words: Mapping[str, str], *, masked: bool) -> bool:
    """Whether a rehearsal may open the gate: single answers and sequences at null, nothing broken
    or undisclosed, and masked bytes checked where there are masks."""
    needed = {"attributable", "sum_sequences"} | ({TRANSCRIPT} if masked else set())
    fine = {"at_null", "bounded", "disclosed", "not_run"}
    return all(words[row] == "at_null" for row in needed) and set(words.values()) <= fine


def attack_document(evidence: Evidence, *, observer: str, defences: Defences) -> dict[str, Any]:
    """One attack as it stands in ``audit.json``."""
    control = evidence.control
    return {
        "name": evidence.attack,
        "observer": observer,
        "target": evidence.target,
        "concern": concern(evidence),
        "updates": evidence.updates,
        "verdict": verdict(evidence, defences),
        "seconds": round(evidence.seconds, 2),
        "leading": leading(evidence, defences),
        "metrics": {name: _measure(value) for name, value in evidence.measures.items()},
        "positive_control": {
            "metric": control.metric,
            "value": control.value,
            "floor": control.floor,
            "passed": control.passed,
        },
        "notes": evidence.notes,
        "settings": dict(evidence.settings),
        "examples": [{"truth": one.truth, "got": one.got} for one in evidence.examples],
    }


def _chance(name: str) -> float:
    """What a coin scores."""
    return 0.5 if name.endswith("auc") else 0.0


def _measure(value: Measure) -> dict[str, float]:
    shown = {"value": value.value, "low": value.low, "high": value.high}
    return shown if value.null is None else {**shown, "null": value.null}
