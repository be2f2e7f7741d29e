"""What each stream of suite ``dynamic`` must show: its targets, with the value and the bound."""

from collections.abc import Callable, Mapping, Sequence

from fedkola.evaluation import metrics
from fedkola.evaluation.cells import Found, interval, paired, target, top1, uploaded
from fedkola.evaluation.setups import is_bound, is_own

Verdicts = list[dict[str, str]]
COSTLY = ("fedkola-wide", "adapted", "adapted-wide")
"""Rows that may send what they like."""


def judge(stream: str, cells: Sequence[Found]) -> Verdicts:
    """One line per target of a stream: met, missed or not run."""
    rows: dict[str, dict[int, Found]] = {}
    for cell in cells:
        rows.setdefault(cell["row"], {})[cell["seed"]] = cell
    return TARGETS[stream](rows) if stream in TARGETS else []


Rows = Mapping[str, Mapping[int, Found]]


def _chapters(rows: Rows) -> Verdicts:
    own = rows.get("fedkola", {})
    found = [
        _mean(rows, "fedkola", "285-way top-1 at <= 35 MB a site and window", top1, ">=", 0.735),
        _mean(rows, "fedkola", "MB up a site and window", _megabytes, "<=", 35.0),
    ]
    costly = [row for row in COSTLY if row in rows] or [COSTLY[-1]]
    found += [_mean(rows, row, "285-way top-1 at any cost", top1, ">=", 0.76) for row in costly]
    if own:
        equal = all(cell["equal_to_one_shot"] for cell in own.values())
        found.append(target("equal bits to one shot", "every seed", str(equal).lower(), equal))
    excess = [abs(100 * cell["excess_forgetting"]) for cell in own.values()]
    found.append(_most("excess forgetting, points", excess, 0.5))
    lags = [lag for cell in own.values() for lag in cell["lags"] if lag is not None]
    found.append(_most("windows until a chapter answers", lags, 0.0))
    joint = {
        seed: max(top1(cell), cell["readout"]["top1"])
        for seed, cell in rows.get("joint", {}).items()
        if "readout" in cell
    }
    for row in ("fedkola", *costly):
        gaps = [
            top1(cell) - joint[seed] for seed, cell in rows.get(row, {}).items() if seed in joint
        ]
        gap = metrics.interval(gaps) if gaps else None
        met = None if gap is None else gap["mean"] >= -0.01
        found.append(target(f"{row} minus best joint", ">= -0.010", interval(gap), met))
    return found


def _releases(rows: Rows) -> Verdicts:
    def new(cell: Found) -> float:
        return _concept(cell, "new")

    own, joint = rows.get("fedkola", {}), rows.get("joint", {})
    best = {
        seed: max(new(cell), float(cell["readout"]["concepts"].get("new", 0.0)))
        for seed, cell in joint.items()
    }
    shares = [new(own[seed]) / best[seed] for seed in own if best.get(seed)]
    ratio = metrics.interval(shares) if shares else None
    met = None if ratio is None else ratio["mean"] >= 0.95
    return [
        target("new codes, share of joint", ">= 0.95", interval(ratio), met),
        _mean(rows, "fedkola", "retired or superseded, of all answers", _outdated, "<=", 0.01),
        _mean(rows, "fedkola", "the same, of answers that had changed", _stale, "<=", 0.01),
    ]


def _who(rows: Rows) -> Verdicts:
    return [_mean(rows, "fedkola", "as it arrives, 2012-18", _late_years, ">=", 0.80)]


def _orders(rows: Rows) -> Verdicts:
    """Best, or within the interval of the best baseline; forgetting; at most half of the bytes."""
    others = {
        name: cells for name, cells in rows.items() if not is_own(name) and not is_bound(name)
    }
    own = rows.get("fedkola", {})
    if not own or not others:
        return [target("final top-1 against the best baseline", ">= 0", "", None)]
    best = max(
        others, key=lambda name: metrics.interval([top1(c) for c in others[name].values()])["mean"]
    )
    gap = paired(own, others[best], top1)
    met = None if gap is None else gap["high"] >= 0
    found = [
        target(f"final top-1 minus {best} (best)", "interval reaches 0", interval(gap), met),
        _mean(rows, "fedkola", "excess forgetting, points", _excess, "<=", 2.0),
    ]
    fedit = rows.get("fedit", {})
    shares = [own[s]["bytes_up"] / fedit[s]["bytes_up"] for s in own if s in fedit]
    share = metrics.interval(shares) if shares else None
    found.append(
        target(
            "bytes up, share of FedIT's",
            "<= 0.5",
            interval(share),
            None if share is None else share["mean"] <= 0.5,
        )
    )
    return found


def _availability(rows: Rows) -> Verdicts:
    return [
        _behind(rows, "fedkola-away", "fedkola", "top-1 minus full availability"),
        _behind(rows, "fedkola-away-twice", "fedkola", "the same, two rounds a window"),
        _behind(rows, "fedkola-forgets", "fedkola", "the same, the leaver forgotten"),
    ]


def _static(rows: Rows) -> Verdicts:
    return [_at_bytes(rows, row) for row in ("fedkola", "adapted-narrow")]


def _facts(rows: Rows) -> Verdicts:
    own = rows.get("fedkola", {})
    lags = [lag for cell in own.values() for lag in cell["lags"] if lag is not None]
    kept = [100 * _lost(cell, "stable") for cell in own.values()]
    return [
        _mean(rows, "fedkola", "stale answers one window after the change", _stale, "<=", 0.02),
        _most("freshness lag, windows", lags, 1.0),
        _most("points that unchanged facts lose", kept, 1.0),
    ]


TARGETS: Mapping[str, Callable[[Rows], Verdicts]] = {
    "icd-chapters": _chapters,
    "icd-releases": _releases,
    "who-don": _who,
    "availability": _availability,
    "static-iid": _static,
    "cl-text": _orders,
    "clinc150": _orders,
    "facts": _facts,
    "facts-lm": _facts,
}


# --- private --------------------------------------------------------------------------------------


def _mean(
    rows: Rows, row: str, name: str, value: Callable[[Found], float], sign: str, bound: float
) -> dict[str, str]:
    own = [value(cell) for cell in rows.get(row, {}).values()]
    text = f"{sign} {bound:g}"
    if not own:
        return target(f"{name} ({row})", text, "", None)
    found = metrics.interval(own)
    met = found["mean"] >= bound if sign == ">=" else found["mean"] <= bound
    return target(f"{name} ({row})", text, interval(found), met)


def _behind(rows: Rows, row: str, other: str, name: str) -> dict[str, str]:
    """Final top-1 of a row minus another's, by seed, which may be one point below."""
    gap = paired(rows.get(row, {}), rows.get(other, {}), top1)
    met = None if gap is None else gap["mean"] >= -0.01
    return target(f"{name} ({row})", ">= -0.010", interval(gap), met)


def _at_bytes(rows: Rows, row: str) -> dict[str, str]:
    """A row minus FedEx-LoRA, with the share of its bytes that it sent."""
    own, other = rows.get(row, {}), rows.get("fedex_lora", {})
    found = _behind(rows, row, "fedex_lora", "top-1 minus FedEx-LoRA")
    share = [own[seed]["bytes_up"] / other[seed]["bytes_up"] for seed in own if seed in other]
    if share:
        found["value"] += f" at {metrics.interval(share)['mean']:.2f} x bytes"
    return found


def _most(name: str, values: Sequence[float], bound: float) -> dict[str, str]:
    """The worst of all seeds against a bound from above."""
    if not values:
        return target(name, f"<= {bound:g}", "", None)
    return target(name, f"<= {bound:g}", f"{max(values):.3g}", max(values) <= bound)


def _megabytes(cell: Found) -> float:
    return uploaded(cell) / 1e6


def _excess(cell: Found) -> float:
    return 100 * float(cell["excess_forgetting"])


def _stale(cell: Found) -> float:
    return float(cell["stale"]["late"]) if "stale" in cell else 0.0


def _outdated(cell: Found) -> float:
    """The share of all answers over all windows that were right once and are not any more."""
    asked = sum(window["asked"] for window in cell["windows"])
    return float(sum(window["stale"] for window in cell["windows"]) / max(1, asked))


def _late_years(cell: Found) -> float:
    """The share of reports of 2012 to 2018 that were right when they came in."""
    years = [cell["asked_of"][year] for year in cell["asked_of"] if "2012" <= year <= "2018"]
    return float(sum(right for right, _ in years) / max(1, sum(asked for _, asked in years)))


def _concept(cell: Found, concept: str) -> float:
    return float(cell["concepts_final"].get(concept, 0.0))


def _lost(cell: Found, concept: str) -> float:
    """Best accuracy on a concept at any window, minus the last."""
    column = [row[cell["concepts"].index(concept)] for row in cell["R"]]
    seen = [value for value in column if value is not None]
    return float(max(seen) - seen[-1])
