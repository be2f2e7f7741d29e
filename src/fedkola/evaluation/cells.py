"""A benchmark as a set of cells that are measured once each: killed, it goes on where it stopped.

A cell is one row of a table under one seed. Its result is a file of its own that appears whole or
not at all; a run that was cut in the middle resumes from its ledger.
"""

import json
import shutil
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedkola.evaluation import machine, metrics
from fedkola.files import write_text
from fedkola.types import Report

Note = Callable[[str], None]
Progress = Callable[[Report], None]
Found = dict[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class Cells:
    """Finished cells in ``folder``; ``note`` says in a line what is measured next. With ``closed``
    nothing is measured: a cell that is not kept is empty."""

    folder: Path
    note: Note
    closed: bool = False

    def measure(
        self,
        name: str,
        about: Mapping[str, Any],
        how: Callable[[Path], Found],
        *,
        default: Mapping[str, Any] | None = None,
        unread: Collection[str] = (),
    ) -> Found:
        """The result kept under ``name``, else that of ``how`` in a work folder of its own.

        What was measured under another ``about`` is measured anew. A setting that an older version
        did not know is no difference where it has its ``default``, nor is one that is ``unread``
        ("section.key").
        """
        path = self.folder / f"{name}.json"
        kept: Found = json.loads(path.read_text()) if path.exists() else {}
        then, now = (_without(one, unread) for one in (kept.get("about"), _plain(about)))
        if kept and _same(then, now, _plain(default or {})):
            return kept
        if self.closed:
            return {}
        self.note(name)
        work = self.folder / "work" / name
        marker = work / "about.json"
        if work.exists() and (not marker.exists() or json.loads(marker.read_text()) != about):
            shutil.rmtree(work)
        work.mkdir(parents=True, exist_ok=True)
        marker.write_text(json.dumps(_plain(about)))
        found = how(work) | {"about": _plain(about), "machine": machine.describe()}
        write_text(path, json.dumps(found, indent=1, sort_keys=True))
        shutil.rmtree(work)
        return found


def write(result: Mapping[str, Any], table: str, out: Path, name: str) -> None:
    """``NAME.json`` with every cell, and ``NAME.md`` as people read it."""
    out.mkdir(parents=True, exist_ok=True)
    (out / f"{name}.json").write_text(json.dumps(result, indent=1, sort_keys=True))
    (out / f"{name}.md").write_text(table)


def asked_at_end(cell: Found) -> bool:
    """Whether any record is still asked after the last window; not if each is asked as it comes."""
    return bool(cell["untouched"].get("asked", 1))


def top1(cell: Found) -> float:
    """What a row is judged by: the share right at the end, on records that chose nothing. Where
    nothing is asked then, the share that was right when it arrived."""
    found = cell["untouched"]["top1"] if asked_at_end(cell) else cell["as_it_arrives"]["share"]
    return float(found)


def uploaded(cell: Found) -> float:
    """Bytes that a site sends in a window: those of a round that it is asked in, times the rounds
    that there are to a window, with those after the last one."""
    rounds = int(cell.get("rounds", 1))
    windows = len(cell.get("moments", ())) or rounds
    return float(cell["bytes_up_per_site_window"]) * rounds / windows


def streamed(cell: Found) -> float:
    """Mean accuracy over the windows of the stream, without the rounds that follow the last one."""
    return metrics.stream_average(cell["R"][: len(cell.get("moments", ())) or None])


def target(name: str, bound: str, value: str, met: bool | None) -> dict[str, str]:
    """One line of a verdict; ``met`` None where it was not run."""
    verdict = "not run" if met is None else "met" if met else "missed"
    return {"name": name, "bound": bound, "value": value, "verdict": verdict}


def verdict(targets: Sequence[Mapping[str, str]]) -> list[str]:
    """The targets as a Markdown table and one headline."""
    if not targets:
        return ["", "This stream has no targets of its own in this profile."]
    lines = ["", "| target | bound | value | verdict |", "|---|---|---|---|"]
    lines += [f"| {t['name']} | {t['bound']} | {t['value']} | {t['verdict']} |" for t in targets]
    met = sum(t["verdict"] == "met" for t in targets)
    return [*lines, "", f"{met} of {len(targets)} targets met."]


def interval(found: Mapping[str, float] | None, *, digits: int = 3) -> str:
    """A mean with its 95 % interval, as text; empty where nothing was measured."""
    if found is None:
        return ""
    mean = f"{found['mean']:.{digits}f}"
    if found["n"] == 1:
        return mean
    return f"{mean} [{found['low']:.{digits}f}, {found['high']:.{digits}f}]"


def paired(
    own: Mapping[int, Found],
    other: Mapping[int, Found],
    value: Callable[[Found], float],
) -> dict[str, float] | None:
    """own - other by seed, with its bootstrap interval; None where no seed has both."""
    pairs = [value(own[seed]) - value(other[seed]) for seed in own if seed in other]
    return metrics.interval(pairs) if pairs else None


def about_machine(about: Mapping[str, Any]) -> str:
    return (
        f"Measured on {about['cores']} cores ({about['processor']}), torch {about['torch']}, "
        f"Python {about['python']}."
    )


def _same(kept: Any, about: Any, default: Any) -> bool:
    if not (isinstance(kept, dict) and isinstance(about, dict) and isinstance(default, dict)):
        return bool(kept == about)
    if not kept.keys() <= about.keys():
        return False
    return all(
        _same(kept[key], value, default.get(key, {}))
        if key in kept
        else key in default and value == default[key]
        for key, value in about.items()
    )


def _without(about: Any, unread: Collection[str]) -> Any:
    """A plan without these keys; what is no plan stays."""
    if not isinstance(about, dict):
        return about
    return {
        section: {key: v for key, v in values.items() if f"{section}.{key}" not in unread}
        if isinstance(values, dict)
        else values
        for section, values in about.items()
    }


def _plain(about: Mapping[str, Any]) -> Any:
    return json.loads(json.dumps(about))
