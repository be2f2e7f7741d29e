"""Files that are there whole or not at all, after a killed process and after a lost power supply.

What a site or a key ring keeps is readable by its owner alone; what a run shows to people is not
held back.
"""

import os
from pathlib import Path


def write_private(path: Path, content: bytes, *, durable: bool = True) -> None:
    """Put ``content`` into ``path``, readable by its owner alone: after a crash at any instant the
    file holds the old content or the new. On return it is on the disk, unless it need not be
    ``durable``: then a power cut may also leave it short."""
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    draft = path.with_name(f".{path.name}.draft")
    # A draft that was left over may be readable by others, and would stay so.
    draft.unlink(missing_ok=True)
    descriptor = os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with os.fdopen(descriptor, "wb") as file:
        file.write(content)
    if durable:
        settle(draft, path)
    else:
        os.replace(draft, path)


def write_text(path: Path, text: str) -> None:
    """Put ``text`` into ``path`` for people; readers and other writers find one whole text."""
    draft = path.with_name(f".{path.name}.{os.getpid()}.draft")
    draft.write_text(text, encoding="utf-8")
    os.replace(draft, path)


def settle(draft: Path, path: Path) -> None:
    """Give a finished draft its name so that both survive a power cut."""
    flush(draft)
    os.replace(draft, path)
    flush(path.parent)


def flush(path: Path) -> None:
    """Put a file, or the names in a folder, on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
