"""Moves the fragments of this folder into CHANGELOG.md as one release.

``python changelog.d/release.py VERSION DATE`` writes the section, deletes the fragments and prints
what it wrote.
"""

import argparse
from pathlib import Path

FRAGMENTS = Path(__file__).parent
KINDS = ("security", "added", "changed", "fixed", "removed")
MARK = "<!-- releases below -->\n"


def main() -> None:
    parser = argparse.ArgumentParser(description="Move changelog fragments into CHANGELOG.md.")
    parser.add_argument("version", help="such as 0.2.0")
    parser.add_argument("date", help="such as 2026-12-31")
    asked = parser.parse_args()
    changelog = FRAGMENTS.parent / "CHANGELOG.md"
    text, section = changelog.read_text(), release(asked.version, asked.date)
    if MARK not in text or f"## {asked.version} " in text:
        raise SystemExit(f"{changelog.name} lacks the line {MARK!r} or has {asked.version} already")
    changelog.write_text(text.replace(MARK, MARK + "\n" + section))
    for fragment in fragments():
        fragment.unlink()
    print(section)


def release(version: str, date: str) -> str:
    """The section of one release: fragments by kind, by issue within a kind."""
    lines = [f"## {version} ({date})"]
    for kind in KINDS:
        texts = [
            path.read_text().strip() for path in fragments() if path.name.split(".")[1] == kind
        ]
        if texts:
            lines += ["", f"### {kind.capitalize()}", "", *texts]
    if len(lines) == 1:
        raise SystemExit("there are no fragments in changelog.d; nothing to release")
    return "\n".join(lines) + "\n"


def fragments() -> list[Path]:
    return sorted(FRAGMENTS.glob("[0-9]*.md"))


if __name__ == "__main__":
    main()
