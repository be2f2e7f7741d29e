"""The data-quality report of one site: what the last scan found, in words, for the owner.

Made from the site's own folder, at the site. It quotes counts of other sites only from
``min_peers`` on, and texts only where the owner gives the file that holds them.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fedkola.errors import DataError
from fedkola.evaluation import plots, report
from fedkola.quality import kept
from fedkola.quality.findings import EXAMPLES

VERSION = 1
LABELS = 30
NOT_LOOKED_FOR = (
    "Wrong texts under right labels, and answers of generative records.",
    "Labels that were right at their time: no dates were read.",
    "Triggers planted on purpose (poison) that do not disagree with their label.",
    "Labels that fewer records of other sites carry than a count is told of.",
)


def examine(store: Path, *, texts: Mapping[str, str] | None = None) -> dict[str, Any]:
    """The report as a document; ``texts`` maps records to what may be quoted of them.

    Raises DataError where the site was never scanned.
    """
    found: Any = kept.findings(store)
    if not found:
        raise DataError(
            f'{store} holds no findings; run a plan with quality.mode = "report" or more, then '
            "name the site's folder (runs/NAME/sites/SITE)"
        )
    decisions, gone = kept.decisions(store), kept.left_out(store)
    groups = []
    for code, number in sorted(found["codes"].items()):
        rows = [row for row in found["findings"] if row["code"] == code]
        listed = [
            {
                **row,
                "decision": decisions.get(row["record"], ""),
                "left_out": row["record"] in gone,
                "text": (texts or {}).get(row["record"], ""),
            }
            for row in rows[:EXAMPLES]
        ]
        groups.append(
            {
                "code": code,
                "meaning": found["meaning"].get(code, ""),
                "records": number,
                "share": number / max(found["records"], 1),
                "proposed": sum(bool(row["proposed"]) for row in rows),
                "examples": listed,
            }
        )
    return {
        "version": VERSION,
        "site": store.name,
        "scan": found["scan"],
        "records": found["records"],
        "codes": found["codes"],
        "actions": found["actions"],
        "left_out": len(gone),
        "decided": len(decisions),
        "checked": len(kept.checked(store)),
        "labels": found["labels"],
        "groups": groups,
        "not_looked_for": list(NOT_LOOKED_FOR),
        "quotes": bool(texts),
    }


def headline(doc: Mapping[str, Any]) -> str:
    """The report in a sentence or two."""
    flagged = doc["codes"].get("LABEL_DISAGREES", 0)
    scan = doc["scan"]
    here = f"{flagged:,} of {doc['records']:,} records here disagree with all others."
    if not scan["open"]:
        return (
            f"{here} Nothing was acted on: {scan['trusted']:,} checked records show that at least "
            f"{scan['noise_low']:.1%} of all sites' records are wrong, which is too few to act."
        )
    done = (
        f"{doc['left_out']:,} are left out of learning"
        if doc["left_out"]
        else "none is left out of learning"
    )
    return f"{here} At least {scan['noise_low']:.1%} of all sites' records are wrong; {done}."


def render(doc: Mapping[str, Any]) -> str:
    """The report as one HTML file without script and anything from outside; text is escaped."""
    most = max((label["flagged"] / label["records"] for label in doc["labels"]), default=0.0)
    return report.write(
        "quality.html.j2",
        {
            "doc": doc,
            "headline": headline(doc),
            "groups": [
                {**group, "bar": plots.bar(group["share"], kind="f2")} for group in doc["groups"]
            ],
            "labels": [
                {
                    **label,
                    "share": label["flagged"] / label["records"],
                    "bar": plots.bar(label["flagged"] / label["records"] / most) if most else "",
                }
                for label in doc["labels"][:LABELS]
            ],
        },
    )
