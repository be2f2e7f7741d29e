"""Outdated, noisy or novel: what dates add to the evidence against a record (specification of
imperfect data, section 6).

Noise is spread over time, outdated knowledge is monotone in age, novel knowledge is young and
repeats. Evidence is used in this order: the registry of labels, a newer version of the same text at
the same site, a change of what a region of embeddings is called, and how many sites carry the same.
A record whose label never fitted, not even at its date, stays in doubt whatever its age.

Counts are integer sums over sites. A record speaks for nothing but itself at its own site.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.stats import chi2

Ints = NDArray[np.int64]
Bools = NDArray[np.bool_]
Names = NDArray[Any]

FINE = ""
DISAGREES = "LABEL_DISAGREES"
SUPERSEDED = "SUPERSEDED"
NOVEL = "NOVEL"
UNCONFIRMED = "UNCONFIRMED"

UNIT = 256
"""The sum of a record's integers over regions, ``gamma`` of section 3.1."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Dated:
    """Records of one site, (n,) each: ``label`` and ``region`` are positions, ``window`` counts
    from 1, equal ``text`` means equal normalised input. ``flagged``: evidence of today disagrees
    (u_i <= alpha)."""

    label: Ints
    region: Ints
    window: Ints
    text: Ints
    flagged: Bools


@dataclass(frozen=True, slots=True, kw_only=True)
class Registry:
    """The first and the last window of every label, (C,) each; a label that is still in use has a
    last window in the future. Without a registry the first window is where counts begin."""

    opened: Ints
    closed: Ints

    @classmethod
    def of_counts(cls, counts: Ints) -> "Registry":
        """What window counts (C, R, T) tell alone: when a label began, and no end."""
        seen = counts.sum(axis=1) > 0
        windows = seen.shape[1]
        opened = np.where(seen.any(axis=1), seen.argmax(axis=1) + 1, windows + 1)
        return cls(opened=opened.astype(np.int64), closed=np.full(len(seen), windows + 1))


@dataclass(frozen=True, slots=True, kw_only=True)
class Change:
    """Regions where labels changed, (R,): ``split`` is the first window of the new ones, 0 where
    nothing changed; ``before`` and ``after`` are the label that most records had, (R,) each."""

    split: Ints
    before: Ints
    after: Ints


def changes(
    counts: Ints, holders: Ints, *, k_min: int = 3, level: float = 0.01, least: int = 30
) -> Change:
    """Where the labels of a region are not those of earlier windows.

    ``counts`` (C, R, T) are summed integers, UNIT a record; ``holders`` (R, T) how many sites hold
    records of a region in a window. The split has the largest G statistic; its p-value is taken
    times the number of splits, and Benjamini-Hochberg holds false changes at ``level`` over
    regions. Either side has ``least`` records and ``k_min`` sites, in one window at least.
    """
    _, regions, windows = counts.shape
    split, best = np.zeros(regions, np.int64), np.ones(regions)
    records = counts / UNIT
    for window in range(2, windows + 1):
        sides = [records[:, :, : window - 1].sum(axis=2), records[:, :, window - 1 :].sum(axis=2)]
        held = [holders[:, : window - 1].max(axis=1), holders[:, window - 1 :].max(axis=1)]
        enough = np.logical_and.reduce(
            [side.sum(axis=0) >= least for side in sides] + [one >= k_min for one in held]
        )
        statistic, freedom = _g(sides[0], sides[1])
        p = np.minimum(1.0, (windows - 1) * chi2.sf(statistic, np.maximum(freedom, 1)))
        better = enough & (freedom > 0) & (p < best)
        split, best = np.where(better, window, split), np.where(better, p, best)
    kept = _benjamini_hochberg(best, level)
    split = np.where(kept, split, 0)
    old = np.arange(1, windows + 1) < split[:, None]
    before = (records * old).sum(axis=2).argmax(axis=0)
    after = (records * ~old).sum(axis=2).argmax(axis=0)
    return Change(split=split, before=before, after=after)


def carriers(records: Dated, *, now: int, labels: int, regions: int) -> Ints:
    """A site's addend, (C, R) of 0 and 1: what it carries in the newest window. Summed, the number
    of sites that say the same."""
    found = np.zeros((labels, regions), np.int64)
    young = records.window == now
    found[records.label[young], records.region[young]] = 1
    return found


def verdicts(
    records: Dated,
    *,
    registry: Registry,
    change: Change,
    carried: Ints,
    now: int,
    sites: int = 2,
    patience: int = 4,
) -> Names:
    """A code for every record of a site, (n,); FINE where there is nothing to say.

    ``carried`` (C, R) is the sum of ``carriers`` over sites. What ``sites`` sites carry in the
    newest window is novel rather than wrong. A label that began in the last ``patience`` windows
    is UNCONFIRMED where fewer carry it; labels of the first window began before it.
    """
    r, label = records, records.label
    split, opened, closed = change.split[r.region], registry.opened[label], registry.closed[label]
    was_right = (split > 0) & (r.window < split) & (label == change.before[r.region])
    is_right = (split > 0) & (r.window >= split) & (label == change.after[r.region])
    fitted = ~r.flagged | was_right
    retired = (closed < now) & (r.window <= closed)
    told = carried[label, r.region]
    young = r.window == now
    begun = (opened > max(1, now - patience)) & (told < sites)

    found: Names = np.full(len(label), FINE, dtype=object)
    found[r.flagged] = DISAGREES
    found[r.flagged & begun & (now - r.window < patience)] = UNCONFIRMED
    found[r.flagged & (is_right | (young & (told >= sites)))] = NOVEL
    found[~r.flagged & young & (opened == now) & (told >= sites)] = NOVEL
    found[r.flagged & was_right] = SUPERSEDED
    found[fitted & (retired | _replaced(records))] = SUPERSEDED
    return found


# --- private --------------------------------------------------------------------------------------


def _replaced(records: Dated) -> Bools:
    """Whether the newest record of the same text that nothing speaks against has another label."""
    kept = np.flatnonzero(~records.flagged)
    newest: dict[int, int] = {}
    for row in kept[np.argsort(records.window[kept], kind="stable")].tolist():
        newest[int(records.text[row])] = row
    last = np.array([newest.get(text, -1) for text in records.text.tolist()], dtype=np.int64)
    later: Bools = (last >= 0) & (records.window[last] > records.window)
    later &= records.label[last] != records.label
    return later


def _g(one: NDArray[np.float64], other: NDArray[np.float64]) -> tuple[NDArray[np.float64], Ints]:
    """The G statistic of labels by side for every region, (R,), and its degrees of freedom."""
    total = one + other
    whole = np.maximum(total.sum(axis=0), 1e-12)
    statistic = np.zeros(total.shape[1])
    for side in (one, other):
        expected = total * (side.sum(axis=0) / whole)
        ratio = np.divide(side, expected, out=np.ones_like(side), where=(side > 0) & (expected > 0))
        statistic += 2 * (side * np.log(ratio)).sum(axis=0)
    return statistic, (total > 0).sum(axis=0) - 1


def _benjamini_hochberg(p: NDArray[np.float64], level: float) -> Bools:
    order = np.argsort(p, kind="stable")
    passed = p[order] <= level * np.arange(1, len(p) + 1) / max(len(p), 1)
    last = int(np.flatnonzero(passed).max()) + 1 if passed.any() else 0
    kept = np.zeros(len(p), dtype=np.bool_)
    kept[order[:last]] = True
    return kept
