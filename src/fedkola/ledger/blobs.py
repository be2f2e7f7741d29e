"""Tensors as files, each named by the hash of its content."""

import hashlib
import os
from collections.abc import Collection, Iterator, Mapping, MutableMapping
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from sqlalchemy.exc import DBAPIError
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from fedkola.errors import BlobMissing, LedgerError
from fedkola.files import flush

BLOBS = "blobs"

# A mapping costs a system call and a page; small tensors are cheaper to copy.
_MAP_FROM = 1 << 20


class Blobs:
    """The folder of a run's tensors. It knows what it has hashed, by identity: most tensors of a
    round are those of the round before."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        # (version, sum of words, blob) of each.
        self._hashed: MutableMapping[Tensor, tuple[int, int, str]] = WeakTensorKeyDictionary()

    def names(self, tensors: Mapping[str, Tensor]) -> dict[str, str]:
        """The blob that each tensor is kept under."""
        return {name: self._hash(name, tensor) for name, tensor in tensors.items()}

    def store(self, tensors: Mapping[str, Tensor], names: Mapping[str, str]) -> dict[str, int]:
        """Files for tensors that have none, durable on return; the size of every blob."""
        missing: dict[str, Tensor] = {}
        sizes: dict[str, int] = {}
        for name, tensor in tensors.items():
            blob = names[name]
            # A file that lost its end is written again; other damage is found by last().
            sizes[blob] = tensor.numel() * tensor.element_size()
            path = self.folder / blob
            if not path.is_file() or path.stat().st_size <= sizes[blob]:
                missing[blob] = tensor
        for blob, tensor in missing.items():
            _save(self.folder / blob, tensor)
        if missing:
            with disk(self.folder, "saving tensors"):
                flush(self.folder)
        return sizes

    def load(self, blob: str) -> Tensor:
        """One tensor, checked against its name; raises BlobMissing."""
        path = self.folder / blob
        try:
            with safe_open(path, framework="pt") as file:
                tensor: Tensor = file.get_tensor("x")
        except FileNotFoundError as error:
            raise BlobMissing(
                f"tensor file {path} is absent; restore it from a copy of the run folder"
            ) from error
        except (SafetensorError, OSError) as error:
            raise BlobMissing(
                f"tensor file {path} cannot be read ({error}); restore it from a copy"
            ) from error
        content = _bytes(tensor)
        if _content_hash(tensor, content) != blob:
            raise BlobMissing(
                f"tensor file {path} was altered: its content does not have the hash of its name;"
                " restore it from a copy of the run folder"
            )
        if content.numel() < _MAP_FROM:
            tensor = tensor.clone()
        self._hashed[tensor] = (tensor._version, _sum_of_words(_bytes(tensor)), blob)
        return tensor

    def sweep(self) -> None:
        """Delete drafts that a killed writer left."""
        with disk(self.folder, "the start of a run"):
            for leftover in self.folder.glob("*.tmp"):
                leftover.unlink(missing_ok=True)

    def keep_only(self, names: Collection[str]) -> int:
        """Delete every other tensor; returns the bytes freed."""
        freed = 0
        with disk(self.folder, "a purge"):
            for path in self.folder.iterdir():
                if path.name not in names:
                    freed += path.stat().st_size
                    path.unlink()
            flush(self.folder)
        return freed

    def _hash(self, name: str, tensor: Tensor) -> str:
        try:
            content = _bytes(tensor)
        except (RuntimeError, TypeError) as error:
            raise LedgerError(
                f"tensor {name!r} ({tensor.dtype}, {tensor.layout}, {tensor.device}) cannot be"
                f" saved: {error}; give a dense tensor with data"
            ) from error
        # The version counter sees torch's own changes in place. The sum of words also sees those
        # made through numpy or .data, at the speed of memory rather than of SHA-256.
        version = -1 if tensor.is_inference() else tensor._version
        guard = _sum_of_words(content)
        known = self._hashed.get(tensor)
        if known is not None and known[:2] == (version, guard):
            return known[2]
        name = _content_hash(tensor, content)
        self._hashed[tensor] = (version, guard, name)
        return name


@contextmanager
def disk(path: Path, what: str) -> Iterator[None]:
    try:
        yield
    except DBAPIError as error:
        raise LedgerError(
            f"{what} failed in {path}: {error.orig}; check free space, permissions and that no"
            " other process writes this run, then resume"
        ) from error
    except OSError as error:
        raise LedgerError(
            f"{what} failed in {error.filename or path}: {error.strerror}; check free space and"
            " permissions, then resume"
        ) from error


def _save(path: Path, tensor: Tensor) -> None:
    temporary = path.with_name(f"{path.name}.tmp")
    try:
        save_file({"x": tensor.detach().cpu().contiguous()}, temporary)
        flush(temporary)
        os.replace(temporary, path)
    except (OSError, SafetensorError) as error:
        raise LedgerError(
            f"saving a tensor failed in {path}: {error}; check free space and permissions, then"
            " resume"
        ) from error
    finally:
        if temporary.exists():
            temporary.unlink()


def _content_hash(tensor: Tensor, content: Tensor) -> str:
    shape = ",".join(str(size) for size in tensor.shape)
    digest = hashlib.sha256(f"{str(tensor.dtype).removeprefix('torch.')}|{shape}|".encode())
    digest.update(content.numpy().data)
    return digest.hexdigest()


def _bytes(tensor: Tensor) -> Tensor:
    """The content as a flat uint8 tensor, without a copy if it is contiguous and on the CPU."""
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)


def _sum_of_words(content: Tensor) -> int:
    whole = content.numel() // 8 * 8
    if content.data_ptr() % 8:
        return int(content.sum())
    words = int(content[:whole].view(torch.int64).sum())
    return words ^ int(content[whole:].sum())
