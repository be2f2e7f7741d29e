"""Canaries among the records of a site, for a rehearsal: each copy a patient of its own, or all
copies of one secret a single patient (see ``canary``)."""

from collections.abc import Sequence
from dataclasses import replace

from fedkola.audit.canary import Canary
from fedkola.errors import DataError
from fedkola.types import Dataset

MARK = "canary"


def planted(data: Dataset, canaries: Sequence[Canary]) -> Dataset:
    """The records with every copy of every canary, spread evenly among them.

    A copy is a record like its neighbour, of the same label and window, and answers no prompt.
    Raises DataError where there are no records.
    """
    copies = [(one, number) for one in canaries for number in range(one.repeats)]
    if not len(data):
        raise DataError(f"{len(copies)} canaries were to be planted among no records; give text")
    # Copies of one canary lie far apart: the step between them has no factor in common with all.
    order = sorted(range(len(copies)), key=lambda i: (i * 0.6180339887498949) % 1.0)
    rows = [(at + 0.5, -1) for at in range(len(data))]
    rows += [(place * len(data) / max(len(copies), 1), i) for place, i in enumerate(order)]
    rows.sort()
    like = data.take([min(int(at), len(data) - 1) for at, _ in rows])
    told = [copies[i] if i >= 0 else None for _, i in rows]

    def column(old: Sequence[str], new: Sequence[str]) -> tuple[str, ...]:
        return tuple(n or o for o, n in zip(old, new, strict=True))

    return replace(
        like,
        texts=column(like.texts, [one[0].text if one else "" for one in told]),
        records=column(like.records, [_name(one, alone=False) for one in told]),
        patients=column(like.patients, [_name(one, alone=True) for one in told]),
        prompts=tuple("" if one else p for one, p in zip(told, like.prompts, strict=False)),
    )


# --- private --------------------------------------------------------------------------------------


def _name(one: tuple[Canary, int] | None, *, alone: bool) -> str:
    """The record of a copy, or with ``alone`` the patient that it belongs to."""
    if one is None:
        return ""
    canary, number = one
    name = f"{MARK}-{canary.name.replace(' ', '-').lower()}"
    return name if alone and canary.together else f"{name}-{number}"
