"""Small private files that survive a killed process and a lost power supply."""

import os
from pathlib import Path


def write_durably(path: Path, content: bytes) -> None:
    """Put ``content`` into ``path``, readable by its owner alone: after a crash at any instant the
    file holds the old content or the new, and on return it is on the disk."""
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(f"{path.name}.draft")
    draft.unlink(missing_ok=True)
    descriptor = os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with os.fdopen(descriptor, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    os.replace(draft, path)
    flush_folder(path.parent)


def flush_folder(folder: Path) -> None:
    """Put the names of a folder on the disk."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
