"""Whose story a page tells, and its course over the windows as means over seeds."""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from statistics import fmean
from typing import Any

from fedkola.evaluation.cells import Found, top1
from fedkola.evaluation.setups import OWN, SETUPS, is_bound, is_own


@dataclass(frozen=True, slots=True, kw_only=True)
class Told:
    """A result, and whose story is told: ``own`` (the row that the stream is about or FedKoLa where
    it ran, else the best baseline) beside ``best``, a control or the best baseline that lives on
    the stream ("" where there is none). ``about`` says what that one is."""

    result: Mapping[str, Any]
    rows: Mapping[str, Mapping[int, Found]]
    own: str
    best: str
    about: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Course:
    """R[t, k] of one row as means over seeds, concepts in order of arrival (``since``, from 1)."""

    concepts: tuple[str, ...]
    matrix: tuple[tuple[float | None, ...], ...]
    since: tuple[int, ...]

    def column(self, k: int) -> list[float]:
        """What was measured of one concept, from its arrival to the last time it was asked."""
        return [value for row in self.matrix if (value := row[k]) is not None]


def tell(result: Mapping[str, Any]) -> Told:
    rows: dict[str, dict[int, Found]] = {}
    for cell in result["cells"]:
        rows.setdefault(cell["row"], {})[cell["seed"]] = cell
    followed = [row for row in rows if all("R" in cell for cell in rows[row].values())]
    others = [row for row in followed if not is_own(row) and not is_bound(row)]
    best = max(others, key=lambda row: mean_of(rows[row], top1), default="")
    ours = [row for row in followed if is_own(row)]
    setup = SETUPS.get(result["stream"])
    story = setup.story if setup else OWN
    own = next((row for row in (story, OWN, *ours) if row in rows), best)
    control, about = setup.control if setup and own == setup.story else ("", "")
    if control in rows:
        return Told(result=result, rows=rows, own=own, best=control, about=about)
    best = best if best != own else ""
    return Told(result=result, rows=rows, own=own, best=best, about="the best baseline")


def course(cells: Mapping[int, Found]) -> Course:
    """The mean over seeds of R, cell by cell over the seeds that asked there."""
    concepts = list(dict.fromkeys(name for cell in cells.values() for name in cell["concepts"]))
    length = max(len(cell["R"]) for cell in cells.values())
    matrix: list[list[float | None]] = []
    for t in range(length):
        row: list[float | None] = []
        for concept in concepts:
            seen = [
                value
                for cell in cells.values()
                if t < len(cell["R"]) and concept in cell["concepts"]
                if (value := cell["R"][t][cell["concepts"].index(concept)]) is not None
            ]
            row.append(fmean(seen) if seen else None)
        matrix.append(row)
    since = [
        next((t for t, row in enumerate(matrix, start=1) if row[k] is not None), length + 1)
        for k in range(len(concepts))
    ]
    order = sorted(range(len(concepts)), key=lambda k: (since[k], _natural(concepts[k])))
    return Course(
        concepts=tuple(concepts[k] for k in order),
        matrix=tuple(tuple(row[k] for k in order) for row in matrix),
        since=tuple(since[k] for k in order),
    )


def shown(row: str) -> str:
    """A row as readers know it."""
    if row == OWN:
        return "FedKoLa"
    return f"FedKoLa {row.removeprefix(OWN + '-')}" if is_own(row) else row


def first_asked(cell: Found) -> dict[str, int]:
    """The window (from 1) in which one seed first asked each concept that it asked."""
    return {
        concept: next(t for t, row in enumerate(cell["R"], start=1) if row[k] is not None)
        for k, concept in enumerate(cell["concepts"])
        if any(row[k] is not None for row in cell["R"])
    }


def matched(over: Course, other: Course) -> tuple[tuple[float | None, ...], ...]:
    """The other row's matrix with its concepts in the order of the first."""
    at = {concept: k for k, concept in enumerate(other.concepts)}
    return tuple(
        tuple(row[at[concept]] if concept in at else None for concept in over.concepts)
        for row in other.matrix
    )


def texts_of(told: Told) -> dict[str, str]:
    """Concepts in words: as the stream calls them, else the telling end of their id."""
    cells = [cell for seeds in told.rows.values() for cell in seeds.values()]
    given = {c: text for cell in cells for c, text in cell.get("texts", {}).items() if text}
    found: dict[str, str] = {}
    for concept in (c for cell in cells for c in cell.get("concepts", ())):
        tail = re.sub(r"^.*/", "", concept).replace("-", " ").replace("_", " ")
        text = str(given.get(concept) or tail or "(no name)")
        found[concept] = re.sub(r"\s*\([A-Z0-9.]+-[A-Z0-9.]+\)$", "", text)
    return found


def moments_of(told: Told) -> tuple[str, ...]:
    """Names of the windows, where the result holds them and all seeds have the same."""
    named = {tuple(map(str, cell.get("moments", ()))) for cell in told.rows[told.own].values()}
    return named.pop() if len(named) == 1 else ()


def mean_of(cells: Mapping[int, Found], of: Callable[[Found], float]) -> float:
    return fmean(of(cell) for cell in cells.values())


def _natural(text: str) -> list[tuple[int, str]]:
    """Order in which 9 comes before 10."""
    return [(int(part or 0), other) for part, other in re.findall(r"(\d*)(\D*)", text)]
