"""What the owner of records reads: counts, examples by reason, and evidence in words.

Everything here is made at the site and stays there. A count of other sites' records below
``min_peers`` is told as "fewer than 5"; nothing of a single other site is in it.
"""

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from fedkola.quality.actions import DISAGREES, RARE, Evidence, Finding, Scan
from fedkola.quality.belief import UNIT
from fedkola.quality.geometry import PARTS
from fedkola.types import Catalogue

VERSION = 1
EXAMPLES = 20
MEANING: Mapping[str, str] = {
    DISAGREES: "Records of all sites like this one mostly say something else.",
    RARE: "Too few other sites' records have this label: not verified, kept.",
}


def neighbours(carried: Tensor, mine: Tensor, gamma: Tensor, regions: Tensor) -> Tensor:
    """near (n, C) float64: other sites' records around each record, by the label they carry.

    ``carried`` (C, R) are summed counts with small ones left out, ``mine`` (C, R) the site's own;
    ``gamma`` and ``regions`` are those of the records (see ``geometry.assign``). Counts are those
    of a record's regions, averaged by its shares of them.
    """
    others = (carried - mine).clamp(min=0).T.to(torch.float64) / (PARTS * UNIT)
    near = torch.zeros(len(gamma), carried.shape[0], dtype=torch.float64)
    for k in range(regions.shape[1]):
        near += gamma[:, k : k + 1].to(torch.float64) / PARTS * others[regions[:, k]]
    return near


def sentence(given: str, near: Sequence[tuple[str, float]], *, code: str, min_peers: int) -> str:
    """The evidence about one record in words. ``near`` lists labels around it with the counts of
    other sites' records, largest first."""
    if code == RARE:
        return f"Too few records of other sites carry {given}: not verified, kept."
    total = round(sum(count for _, count in near))
    if total < min_peers or not near:
        return (
            f"Fewer than {min_peers} records of other sites are near this one; what all records "
            f"say together speaks against {given}."
        )
    label, count = near[0]
    most = round(count)
    if label == given:
        agree = _count(most, min_peers)
        return (
            f"Of about {total} records nearest to this one at other sites, {agree} carry {given} "
            "as it does; the ridge over all sites reads its text otherwise."
        )
    own = next((round(c) for name, c in near if name == given), 0)
    return (
        f"Of about {total} records nearest to this one at other sites, {_count(most, min_peers)} "
        f"carry {label} and {_count(own, min_peers)} carry {given}; this one carries {given}."
    )


def document(
    found: Sequence[Finding], evidence: Evidence, scan: Scan, catalogue: Catalogue
) -> dict[str, object]:
    """The findings of one scan as JSON: the scan, counts by code, action and label, and a row for
    every record that something was found about, the surest first."""
    codes = catalogue.codes()
    given = evidence.given.tolist()
    rows = [_row(i, each, evidence, scan, codes) for i, each in enumerate(found) if each.code]
    rows.sort(key=lambda row: (str(row["code"]), float(str(row["u"])), str(row["record"])))
    held = Counter(codes[i] for i in given)
    flagged: Counter[str] = Counter()
    proposed: defaultdict[str, int] = defaultdict(int)
    for i, each in enumerate(found):
        if each.code == DISAGREES:
            flagged[codes[given[i]]] += 1
            proposed[codes[given[i]]] += each.proposed >= 0
    return {
        "version": VERSION,
        "scan": {
            "id": scan.id,
            "mode": scan.mode,
            "absorb": scan.absorb,
            "alpha": scan.alpha,
            "min_peers": scan.min_peers,
            "open": scan.open,
            "trusted": scan.trusted,
            "noise_low": scan.noise[0],
            "noise_high": scan.noise[1],
        },
        "records": len(found),
        "codes": dict(Counter(each.code for each in found if each.code)),
        "meaning": dict(MEANING),
        "actions": dict(Counter(each.action for each in found)),
        "labels": [
            {
                "label": label,
                "records": held[label],
                "flagged": flagged[label],
                "proposed": proposed[label],
            }
            for label in sorted(held, key=lambda label: (-flagged[label], label))
        ],
        "believed": {
            each.record: round(score, 6)
            for each, score in zip(found, evidence.scores.tolist(), strict=True)
        },
        "findings": rows,
    }


def _row(
    i: int, each: Finding, evidence: Evidence, scan: Scan, codes: Sequence[str]
) -> dict[str, object]:
    near = evidence.near[i]
    top = torch.argsort(near, descending=True, stable=True)[:3].tolist()
    given = int(evidence.given[i])
    told = [(codes[c], float(near[c])) for c in dict.fromkeys([*top, given]) if near[c] >= 0.5]
    total = round(float(near.sum()))
    return {
        "record": each.record,
        "code": each.code,
        "label": codes[given],
        "u": round(each.rank, 6),
        "action": each.action,
        "weight": each.weight,
        "by": each.decided_by,
        "pinned": each.pinned,
        "proposed": codes[each.proposed] if each.proposed >= 0 else "",
        "evidence": {
            "near": total if total >= scan.min_peers else None,
            "agree": _told(near[given], scan),
            "most": codes[top[0]],
            "carry": _told(near[top[0]], scan),
            "belief": round(int(evidence.targets[i].max()) / UNIT, 3),
        },
        "sentence": sentence(codes[given], told, code=each.code, min_peers=scan.min_peers),
    }


def _told(count: Tensor, scan: Scan) -> int | None:
    """A count of other sites' records; None where it is too small to be told."""
    whole = round(float(count))
    return whole if whole >= scan.min_peers else None


def _count(number: int, least: int) -> str:
    return str(number) if number >= least else f"fewer than {least}"
