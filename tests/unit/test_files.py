"""Files that are there whole or not at all, and whom they can be read by."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from fedkola.files import settle, write_private, write_text

KILLED = """
import os, signal, sys
from pathlib import Path
from fedkola import files
files.os.replace = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
files.write_private(Path(sys.argv[1]), b"new", durable=sys.argv[2] == "durable")
"""


def mode(path: Path) -> int:
    return path.stat().st_mode & 0o777


@pytest.mark.parametrize("durable", [True, False])
def test_a_private_file_is_its_owners_alone_and_so_is_the_folder_made_for_it(
    tmp_path: Path, durable: bool
) -> None:
    path = tmp_path / "store" / "secret"
    old = os.umask(0)
    try:
        write_private(path, b"old", durable=durable)
        write_private(path, b"new", durable=durable)
    finally:
        os.umask(old)
    assert path.read_bytes() == b"new"
    assert (mode(path), mode(path.parent)) == (0o600, 0o700)
    assert os.listdir(path.parent) == ["secret"]


@pytest.mark.parametrize("how", ["durable", "quick"])
def test_a_kill_leaves_the_old_content_and_a_draft_that_nobody_else_reads(
    tmp_path: Path, how: str
) -> None:
    path = tmp_path / "secret"
    write_private(path, b"old")
    done = subprocess.run([sys.executable, "-c", KILLED, path, how])
    assert done.returncode == -signal.SIGKILL
    assert path.read_bytes() == b"old"
    draft = next(one for one in tmp_path.iterdir() if one != path)
    assert mode(draft) == 0o600
    # Left by a version that was less careful, it would hand its mode on.
    draft.chmod(0o644)
    write_private(path, b"newer")
    assert (path.read_bytes(), mode(path)) == (b"newer", 0o600)
    assert not draft.exists()


def test_a_text_for_people_replaces_the_last_one_whole(tmp_path: Path) -> None:
    path = tmp_path / "report.html"
    write_text(path, "a longer text")
    write_text(path, "ä")
    assert path.read_text("utf-8") == "ä"
    assert os.listdir(tmp_path) == ["report.html"]


def test_a_finished_draft_takes_its_name(tmp_path: Path) -> None:
    draft = tmp_path / "x.tmp"
    draft.write_bytes(b"x")
    settle(draft, tmp_path / "x")
    assert (tmp_path / "x").read_bytes() == b"x"
    assert not draft.exists()
