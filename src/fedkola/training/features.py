"""Frozen embeddings, with the same bits whoever else is asked, and a cache of their integers.

The analytic lane counts on it: a record embedded alone, in another order or with other records
must give the same integers, else removing it would not subtract what it added. Matrix products
round differently for different shapes, so every forward pass has a shape that depends on one
text alone: texts of exactly L tokens run in passes of 8 x L, the last one filled up with copies.
There is no padding inside a text, hence no mask. Each pass runs on one thread and passes run
side by side: torch splits element-wise work between threads at places where it changes from
vector to scalar arithmetic, so bits would depend on the number of threads (measured). On one
thread that place is the end of the tensor, and 8 rows of a width divisible by 4 have no such end.
Equal bits hold on one kind of machine.
"""

import hashlib
import logging
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fedkola.errors import NotFinite
from fedkola.training.adapters import A, B, adapted
from fedkola.training.model import Foundation, encode
from fedkola.training.threads import equal_lengths, filled, side_by_side
from fedkola.types import Weights

# 8 rows cost 15 % more per token than 32, but a window of 500 texts has about 35 different
# lengths, and every one of them fills up its last pass (measured).
ROWS = 8
VERSION = b"fedkola/features/1"
SEGMENT = 4096

_log = logging.getLogger("fedkola")


def embed(
    foundation: Foundation,
    texts: Sequence[str],
    *,
    batch: int = ROWS,
    adapter: Weights | None = None,
    scale: float = 0.0,
) -> Tensor:
    """Unit-length embeddings under the frozen base, float32 of shape (n, width); with
    ``adapter`` under the base it adapts, y = W x + scale B (A x).

    The mean over a text's tokens of the last hidden state (encoder) or of the middle layer's
    states (causal), or of the latter the one of the last token (``foundation.pooling``). A row has
    the same bits whatever the other texts and the number of threads are, for one ``batch``; a text
    without tokens gives zeros. Raises NotFinite if the base overflows, and StepFailed within an
    ``adapted`` block.
    """
    ids = encode(foundation, texts)
    out = torch.zeros(len(ids), foundation.width)

    def run(rows: list[int]) -> None:
        with torch.inference_mode():
            states = _states(foundation, filled(ids, rows, batch))
            pooled = states.mean(dim=1) if foundation.pooling == "mean" else states[:, -1]
            out[rows] = torch.nn.functional.normalize(pooled, dim=1)[: len(rows)]

    with adapted(foundation, adapter or {}, scale=scale), side_by_side() as each:
        each(run, equal_lengths(ids, batch))
    if not bool(out.isfinite().all()):
        raise NotFinite(f"model {foundation.name} gives an embedding that is not finite")
    return out


def integer_embeddings(e: Tensor) -> Tensor:
    """round(2^10 e) with halves to even, int16 of the same shape."""
    return torch.round(e.double() * 1024).to(torch.int16)


class FeatureCache:
    """Integer embeddings by text, kept in memory and, where a folder is given, on disk.

    A file holds up to 4,096 texts' integers under a checksum and appears whole or not at all, so
    a killed process loses one file's work at most and several processes may share a folder. A
    file that does not match its checksum is deleted, reported in ``damaged`` and to the log, and
    its texts are embedded again when they are next asked for. A folder that cannot be written is
    reported to the log, and the cache goes on in memory. Embeddings under an adapter have a cache
    of their own below this one, which forgets with it.
    """

    def __init__(
        self,
        foundation: Foundation,
        folder: Path | None = None,
        *,
        adapter: Weights | None = None,
        scale: float = 0.0,
        base: str = "",
    ) -> None:
        self.foundation = foundation
        self.folder = folder
        self.damaged: tuple[str, ...] = ()
        self._adapter, self._scale, self._base = adapter, scale, base
        self._under: dict[str, FeatureCache] = {}
        self._rows: dict[bytes, np.ndarray] = {}
        if folder is not None:
            folder.mkdir(parents=True, exist_ok=True)
            self._read(folder)

    def __len__(self) -> int:
        return len(self._rows)

    def under(self, adapter: Weights, *, scale: float) -> "FeatureCache":
        """The cache of embeddings under this adapter; without a factor in it, this cache."""
        if not any(name.endswith((A, B)) for name in adapter):
            return self
        base = adapter_digest(adapter, scale=scale)
        if base not in self._under:
            self._under[base] = FeatureCache(
                self.foundation,
                self.folder / base if self.folder is not None else None,
                adapter=adapter,
                scale=scale,
                base=base,
            )
        return self._under[base]

    def integers(self, texts: Sequence[str]) -> Tensor:
        """round(2^10 e) of each text, int16 of shape (n, width); only new texts are embedded."""
        keys = [self._key(text) for text in texts]
        wanted = dict(zip(keys, texts, strict=True))
        missing = [(key, text) for key, text in wanted.items() if key not in self._rows]
        # By length, so that files stay whole and the passes of embed full.
        missing.sort(key=lambda item: (len(item[1]), item[0]))
        for start in range(0, len(missing), SEGMENT):
            part = missing[start : start + SEGMENT]
            embedded = embed(
                self.foundation,
                [text for _, text in part],
                adapter=self._adapter,
                scale=self._scale,
            )
            found = integer_embeddings(embedded).numpy()
            self._rows.update(zip((key for key, _ in part), found, strict=True))
            if self.folder is not None:
                self._keep([key for key, _ in part], found)
        if not keys:
            return torch.zeros(0, self.foundation.width, dtype=torch.int16)
        return torch.from_numpy(np.stack([self._rows[key] for key in keys]))

    def forget(self, texts: Sequence[str]) -> None:
        """Drop the integers of these texts from memory and from every file of the folder.

        A text that is asked for again is embedded again, to the same integers.
        """
        gone = {self._key(text) for text in texts}
        for key in gone:
            self._rows.pop(key, None)
        for cache in self._under.values():
            cache.forget(texts)
        if self.folder is None:
            return
        for folder in self.folder.iterdir():
            if folder.is_dir() and folder.name not in self._under:
                FeatureCache(self.foundation, folder, base=folder.name).forget(texts)
        for path in sorted(self.folder.glob("*.features")):
            try:
                found = dict(_entries(path.read_bytes(), self.foundation.width))
            except (FileNotFoundError, _Damaged):
                continue
            kept = {key: row for key, row in found.items() if key not in gone}
            if len(kept) < len(found):
                if kept:
                    self._keep(list(kept), np.stack(list(kept.values())))
                path.unlink(missing_ok=True)

    def _keep(self, keys: Sequence[bytes], rows: np.ndarray) -> None:
        assert self.folder is not None
        try:
            _write(self.folder, keys, rows)
        except OSError as error:
            _log.warning("features stay in memory, %s cannot be written: %s", self.folder, error)
            self.folder = None

    def _key(self, text: str) -> bytes:
        recipe = f"{self.foundation.hash}/{self.foundation.max_tokens}/{ROWS}{self._base}".encode()
        content = text.encode("utf-8", "surrogatepass")
        return hashlib.sha256(VERSION + b"\0" + recipe + b"\0" + content).digest()

    def _read(self, folder: Path) -> None:
        for path in sorted(folder.glob("*.features")):
            try:
                self._rows.update(_entries(path.read_bytes(), self.foundation.width))
            except FileNotFoundError:
                # Another process found it damaged first.
                continue
            except _Damaged as reason:
                self.damaged += (f"{path.name}: {reason}",)
                _log.warning("feature file %s: %s; embedding its texts again", path.name, reason)
                path.unlink(missing_ok=True)


def adapter_digest(adapter: Weights, *, scale: float) -> str:
    """A SHA-256, in hex, over an adapter's factors and scale: equal digests, equal embeddings."""
    whole = hashlib.sha256(f"fedkola/adapter/1/{scale!r}".encode())
    for name in sorted(name for name in adapter if name.endswith((A, B))):
        value = adapter[name].to(torch.float32).contiguous()
        whole.update(f"{name}|{tuple(value.shape)}|".encode() + value.numpy().tobytes())
    return whole.hexdigest()


class _Damaged(Exception):
    pass


_HEADER = len(VERSION) + 2 * 8
_DIGEST = 32


def _write(folder: Path, keys: Sequence[bytes], rows: np.ndarray) -> None:
    """One file: version, count, width, keys, int16 rows, SHA-256 of all that; then renamed."""
    sizes = len(keys).to_bytes(8, "little") + rows.shape[1].to_bytes(8, "little")
    body = VERSION + sizes + b"".join(keys) + rows.astype("<i2").tobytes()
    digest = hashlib.sha256(body)
    path = folder / f"{digest.hexdigest()}.features"
    unfinished = folder / f"{digest.hexdigest()}.{os.getpid()}.unfinished"
    try:
        unfinished.write_bytes(body + digest.digest())
        unfinished.replace(path)
    finally:
        unfinished.unlink(missing_ok=True)


def _entries(content: bytes, width: int) -> Iterator[tuple[bytes, np.ndarray]]:
    body, digest = content[:-_DIGEST], content[-_DIGEST:]
    if not content.startswith(VERSION) or len(content) < _HEADER + _DIGEST:
        raise _Damaged("not a feature file of this version")
    if hashlib.sha256(body).digest() != digest:
        raise _Damaged("its checksum does not match")
    count, columns = (
        int.from_bytes(body[at : at + 8], "little") for at in (len(VERSION), len(VERSION) + 8)
    )
    if columns != width:
        # Written for another model; its keys can never be asked for here.
        return iter(())
    rows = _HEADER + _DIGEST * count
    keys = (body[at : at + _DIGEST] for at in range(_HEADER, rows, _DIGEST))
    table = np.frombuffer(body, "<i2", offset=rows).astype(np.int16).reshape(count, columns)
    return zip(keys, table, strict=True)


def _states(foundation: Foundation, ids: Tensor) -> Tensor:
    """Hidden states of shape (rows, tokens, width) under the base, every token being real."""
    if foundation.kind == "encoder":
        states: Tensor = foundation.model(input_ids=ids).last_hidden_state
        return states
    # Without its language head, which would be most of the work for a large vocabulary.
    decoder: Any = foundation.model.base_model
    seen = decoder(input_ids=ids, output_hidden_states=True, use_cache=False).hidden_states
    middle: Tensor = seen[len(seen) // 2]
    return middle
