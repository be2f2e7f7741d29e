"""Which records a bank gets to see where sites come and go, by how many rounds there are for them.

A scope opens for the records of a round if ``knowledge.k_min`` sites bring some; what is too few
waits. This counts, without any model, what is summed in the stream ``availability`` of suite
``dynamic``: the absences are those of its rows, seed by seed, so a chapter that is missing here is
one that the measured bank does not know. Shared among rows is all but the rounds.
Writes ``benchmarks/results/waiting.json`` and ``.md``, and prints the table.
Run: ``python benchmarks/waiting.py`` (about two minutes on one core).
"""

import json
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from fedkola.evaluation import cells as marks
from fedkola.evaluation import dynamic, machine, metrics, tasks
from fedkola.evaluation.setups import SETUPS
from fedkola.knowledge import availability
from fedkola.knowledge.availability import Pattern
from fedkola.knowledge.stream import Stream, first_round
from fedkola.plan import Plan

SEEDS = range(1, 31)
# Words of the table, the row that says who is away, and its settings.
ROWS: Mapping[str, tuple[str, tuple[str, ...]]] = {
    "one round a window, 2 after the last": ("fedkola-away", ("run.rounds=10",)),
    "one round a window, 8 after the last": ("fedkola-away", ("run.rounds=16",)),
    "one round a window, 16 after the last": ("fedkola-away", ("run.rounds=24",)),
    "two rounds a window, none after the last": ("fedkola-away-twice", ("run.rounds=16",)),
    "two rounds a window, 4 after the last": ("fedkola-away-twice", ("run.rounds=20",)),
    "two rounds a window, 8 after the last": ("fedkola-away-twice", ("run.rounds=24",)),
}
RESULTS = Path(__file__).parent / "results"


@dataclass(frozen=True, slots=True, kw_only=True)
class Seen:
    """What a bank of one seed has at the end: the share of records, chapters without any, and the
    mean time until a chapter opens, in windows (to the end for one that never does)."""

    records: float
    missing: tuple[str, ...]
    lag: float


def main() -> None:
    found = {
        name: [seen(plan(row, more, seed)) for seed in SEEDS] for name, (row, more) in ROWS.items()
    }
    lines = [
        "# Records that wait for company",
        "",
        f"Counted on the stream `availability`, seeds {SEEDS[0]} to {SEEDS[-1]}: who is there "
        "decides what is summed. Mean with a 95 % bootstrap interval.",
        "",
        "| rounds | records summed | chapters missing at the end | seeds that miss one "
        "| windows until a chapter opens |",
        "|---|---|---|---|---|",
    ]
    for name, seeds in found.items():
        shown = [
            marks.interval(metrics.interval(values))
            for values in (
                [one.records for one in seeds],
                [float(len(one.missing)) for one in seeds],
                [one.lag for one in seeds],
            )
        ]
        lost = sum(bool(one.missing) for one in seeds)
        lines.append(f"| {name} | {shown[0]} | {shown[1]} | {lost} of {len(seeds)} | {shown[2]} |")
    lines += ["", "Reproduce: `python benchmarks/waiting.py`.", ""]
    RESULTS.mkdir(exist_ok=True)
    document = {
        "machine": machine.describe(),
        "rows": {
            name: [
                {"seed": s, "records": one.records, "missing": one.missing, "lag": one.lag}
                for s, one in zip(SEEDS, seeds, strict=True)
            ]
            for name, seeds in found.items()
        },
    }
    (RESULTS / "waiting.json").write_text(json.dumps(document, indent=1))
    (RESULTS / "waiting.md").write_text("\n".join(lines))
    print("\n".join(lines))


def plan(row: str, more: Sequence[str], seed: int) -> Plan:
    setup = SETUPS["availability"]
    return dynamic.plan(setup, setup.sizes["standard"], row, seed, 0.0, more)


def seen(chosen: Plan) -> Seen:
    """Count the openings of one run."""
    stream, rounds = _stream(chosen.run.seed), chosen.run.rounds_per_window
    scope = {label.code: label.scope for label in stream.catalogue.labels}
    waiting: dict[str, Counter[tuple[int, str]]] = {
        site: Counter(
            (first_round(window, rounds), scope[code])
            for code, window in zip(data.labels, data.windows, strict=True)
        )
        for site, data in stream.sites.items()
    }
    since = {name: first for counted in waiting.values() for first, name in counted}
    total = sum(counted.total() for counted in waiting.values())
    opened: dict[str, int] = {}
    for number in range(1, chosen.run.rounds + 1):
        brings: defaultdict[str, set[str]] = defaultdict(set)
        for site in _there(chosen, tuple(stream.sites), number):
            for first, name in waiting[site]:
                if first <= number:
                    brings[name].add(site)
        for name, sites in brings.items():
            if len(sites) >= chosen.knowledge.k_min:
                opened.setdefault(name, number)
                for site in sites:
                    for key in [
                        key for key in waiting[site] if key[1] == name and key[0] <= number
                    ]:
                        del waiting[site][key]
    left = sum(counted.total() for counted in waiting.values())
    late = [opened.get(name, chosen.run.rounds) - first for name, first in since.items()]
    return Seen(
        records=1 - left / total,
        missing=tuple(sorted(since.keys() - opened.keys())),
        lag=sum(late) / len(late) / rounds,
    )


@cache
def _stream(seed: int) -> Stream:
    return tasks.load(plan("fedkola", (), seed))


def _there(chosen: Plan, roster: tuple[str, ...], number: int) -> tuple[str, ...]:
    scenario = chosen.scenario
    pattern = Pattern(name=scenario.availability, absent=scenario.absent, spell=scenario.spell)
    return availability.cohort(
        roster,
        size=0,
        seed=chosen.run.seed,
        round=number,
        late=scenario.late,
        left=scenario.gone,
        pattern=pattern,
    )


if __name__ == "__main__":
    main()
