"""The whole table of attacks on what one observer saw."""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import inf
from typing import Any

from fedkola.audit.evidence import Evidence, Known, Sighting, Truth
from fedkola.audit.view import MODEL, View
from fedkola.errors import FedKolaError

TARGETS = ("single", "sum", "model")
# Who sees the frames of all sites, and reads them.
READERS = ("wire", "server", "coalition")
# Attacks on what the model itself remembers; the others are on changes.
OF_MODELS: Mapping[str, tuple[str, ...]] = {"canary": ("model",)}


@dataclass(frozen=True, slots=True, kw_only=True)
class NotRun:
    """An attack that could not be tried on a target, and why."""

    attack: str
    target: str
    reason: str


def attacked(
    seen: View,
    sighted: Sequence[Sighting],
    known: Known,
    truth: Truth,
    attacks: Mapping[str, Any],
    *,
    most: int,
    until: float = inf,
    clock: Callable[[], float] = time.monotonic,
    note: Callable[[str], None] = lambda text: None,
) -> tuple[list[Evidence], list[NotRun]]:
    """Every attack on every kind of target that is there, on at most ``most`` updates of each.

    An attack has ``run``, for changes, or ``examine``, for the frames themselves, of the kinds of
    observers that it names.

    What an attack itself refuses to try is listed with its reason, never left out silently; so is
    what was not begun by the time ``until`` of ``clock``.
    """
    found: list[Evidence] = []
    left: list[NotRun] = []
    groups = {target: chosen(sighted, target, most) for target in TARGETS}
    for name, attack in attacks.items():
        if hasattr(attack, "examine"):
            if seen.observer.kind not in getattr(attack, "observers", READERS):
                continue
            note(f"{name} on the transcript")
            try:
                found.append(attack.examine(seen, seed=known.seed))
            except FedKolaError as error:
                left.append(NotRun(attack=name, target="transcript", reason=str(error)))
            continue
        targets = OF_MODELS.get(name, getattr(attack, "targets", ("single", "sum")))
        for target, part in groups.items():
            if target not in targets or not part:
                continue
            if clock() > until:
                reason = "the time of this profile was used up; give a larger profile"
                left.append(NotRun(attack=name, target=target, reason=reason))
                continue
            note(f"{name} on {target}, {len(part)} updates")
            try:
                found.append(attack.run(part, known, truth))
            except FedKolaError as error:
                left.append(NotRun(attack=name, target=target, reason=str(error)))
        if not any(groups[target] for target in targets):
            reason = f"this observer has no {' and no '.join(targets)} to attack"
            left.append(NotRun(attack=name, target="/".join(targets), reason=reason))
    return found, left


def kind(sighting: Sighting) -> str:
    """What a sighting is a change of: a single answer, a sum, or the model as released."""
    if sighting.who == MODEL:
        return "model"
    return "single" if sighting.sites == 1 else "sum"


def chosen(seen: Sequence[Sighting], target: str, most: int) -> list[Sighting]:
    """At most ``most`` sightings of a kind, spread over the run."""
    mine = [one for one in seen if kind(one) == target]
    if len(mine) <= most:
        return mine
    return [mine[round(i * (len(mine) - 1) / max(most - 1, 1))] for i in range(most)]
