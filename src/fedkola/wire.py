"""Messages to bytes and back; real numbers to integers and back; states to documents and back.

A message is ``FKW1 | header length (u32) | CRC-32 of the rest (u32) | JSON header | safetensors
body``. Nothing else is ever read from a peer: no pickle, no code, no file names. Lengths are
checked before anything is parsed; the checksum finds accidents, authenticity is the transport's.

Addends become words of the ring Z_2^word by ``round_half_even(v * 2^scale)``; an integer tensor
passes with scale 0. A value that is not finite, or so large that the sum over the cohort could
leave its word, is refused where it arises; nothing is clipped silently.
"""

import dataclasses
import hashlib
import json
import math
import re
import struct
import types
import typing
import zlib
from collections.abc import Iterable, Iterator, Mapping
from enum import Enum
from typing import Any, TypeVar, cast

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor

from fedkola.errors import (
    CohortTooSmall,
    GridOverflow,
    LedgerError,
    NotFinite,
    VersionMismatch,
    WireError,
)
from fedkola.types import Aggregate, Broadcast, Cohort, Grid, Reply, Scalar, Update, Weights

VERSION = 1
MAGIC = b"FKW"
MAX_HEADER_BYTES = 1 << 20
MAX_BODY_BYTES = 1 << 34
MAX_TENSORS = 100_000
MAX_DIMENSIONS = 8
MAX_FRACTION = 62
WEIGHT = "weight"
METRIC = "metric/"
_PREFIX = struct.Struct("<4sII")
# Words of 24 and 40 bits lie in memory as 32 and 64, and are three and five bytes on their way.
_WORDS = {
    8: torch.uint8,
    16: torch.int16,
    24: torch.int32,
    32: torch.int32,
    40: torch.int64,
    64: torch.int64,
}
_PACKED = (24, 40)
# What a site may refuse by: the name of an error, or a code of the protocol.
_CODE = re.compile(r"[A-Za-z_]{1,64}")
T = TypeVar("T")


# --- messages -------------------------------------------------------------------------------------


def pack_broadcast(broadcast: Broadcast) -> bytes:
    """The bytes of one question; ``unpack_broadcast`` returns an equal value."""
    header = {
        "kind": "broadcast",
        "run": broadcast.run,
        "round": broadcast.round,
        "seed": broadcast.seed,
        "step": broadcast.step,
        "cohort": list(broadcast.cohort),
        "grid": _grid_document(broadcast.grid),
        "algorithm": dict(broadcast.algorithm),
        "guards": [dict(guard) for guard in broadcast.guards],
    }
    if broadcast.weightless:
        header["weightless"] = True
    return _frame(header, broadcast.tensors)


def unpack_broadcast(message: bytes, *, max_bytes: int = MAX_BODY_BYTES) -> Broadcast:
    """Raises WireError or VersionMismatch for anything that ``pack_broadcast`` did not write."""
    header, tensors = _unframe(message, "broadcast", max_bytes)
    return Broadcast(
        run=_field(header, "run", str),
        round=_field(header, "round", int),
        seed=_field(header, "seed", int),
        step=_field(header, "step", str),
        cohort=tuple(_each(header, "cohort", str)),
        tensors=tensors,
        grid=_grid(_field(header, "grid", dict)),
        algorithm=_spec(_field(header, "algorithm", dict)),
        guards=tuple(map(_spec, _each(header, "guards", dict))),
        weightless=_field({"weightless": False} | header, "weightless", bool),
    )


def pack_reply(reply: Reply) -> bytes:
    """The bytes of one site's answer: words, or a refusal code."""
    header = {
        "kind": "reply",
        "client": reply.client,
        "question": reply.question,
        "refused": reply.refused,
        "word": reply.word,
    }
    words = reply.words
    if reply.word in _PACKED:
        words = {name: _narrow(value, reply.word) for name, value in words.items()}
    return _frame(header, words)


def unpack_reply(message: bytes, *, max_bytes: int = MAX_BODY_BYTES) -> Reply:
    """Raises WireError or VersionMismatch for anything that ``pack_reply`` did not write."""
    header, words = _unframe(message, "reply", max_bytes)
    word = _field(header, "word", int)
    return Reply(
        client=_field(header, "client", str),
        question=_field(header, "question", str),
        words={n: _widen(v, word) if word in _PACKED else v for n, v in words.items()},
        refused=_field(header, "refused", str),
        word=word,
    )


def headline(message: bytes) -> dict[str, Any]:
    """The header of a message that was read before: everything beside its tensors."""
    _, length, _ = _PREFIX.unpack_from(message)
    found: dict[str, Any] = json.loads(message[_PREFIX.size : _PREFIX.size + length])
    return found


def question(message: bytes) -> str:
    """The name of a question, which its answers carry: 16 hex digits of the hash of its bytes."""
    return hashlib.sha256(message).hexdigest()[:16]


# --- reals and integers ---------------------------------------------------------------------------


def words(update: Update, grid: Grid, cohort: Cohort) -> dict[str, Tensor]:
    """The integer addend of one site: every tensor, the weight and every metric.

    Raises NotFinite for NaN or infinity, GridOverflow if ``len(cohort)`` such addends could leave
    the word, WireError unless the grid lists exactly the names of the answer.
    """
    reals: dict[str, Tensor] = dict(update.tensors)
    reals[WEIGHT] = torch.tensor(update.weight, dtype=torch.float64)
    for name, value in update.metrics.items():
        reals[METRIC + name] = torch.tensor(value, dtype=torch.float64)
    if set(reals) != set(grid.scale):
        odd = sorted(set(reals) ^ set(grid.scale))[:3]
        raise WireError(f"the answer and its grid differ in the names {odd}; answer what is asked")
    return {name: _quantise(name, value, grid, len(cohort)) for name, value in reals.items()}


def total(replies: Iterable[Reply], grid: Grid, cohort: Cohort) -> Aggregate:
    """Add the words of all answering sites; refusals are left out and not in its ``cohort``.

    Replies are consumed one by one, so memory does not grow with the cohort. The grid does not fix
    shapes: where they differ, those of most sites count and the others are left out, so that one
    site can neither spoil a sum nor decide it by answering first. Raises CohortTooSmall if nobody
    answered, WireError if no shapes are those of most, GridOverflow if a sum leaves its word.
    """
    if grid.word == 8:
        raise WireError("bytes of a protocol cannot be summed; ask for words of 16 bits or more")
    sums: dict[tuple[tuple[str, torch.Size], ...], tuple[dict[str, Tensor], list[str]]] = {}
    for reply in replies:
        if reply.refused:
            continue
        shapes = tuple(sorted((name, value.shape) for name, value in reply.words.items()))
        if shapes not in sums:
            # A sum does not show how narrow its words were: it is hashed, and more may be added.
            wide = _WORDS[max(grid.word, 32)]
            first = {name: value.to(wide, copy=True) for name, value in reply.words.items()}
            sums[shapes] = (first, [])
        else:
            for name, value in reply.words.items():
                sums[shapes][0][name] += value
        sums[shapes][1].append(reply.client)
    if not sums:
        raise CohortTooSmall(
            f"none of the {len(cohort)} sites asked answered; look at the refusals of this round"
        )
    ranked = sorted(sums.values(), key=lambda found: -len(found[1]))
    words, answered = ranked[0]
    if len(ranked) > 1 and len(ranked[1][1]) == len(answered):
        raise WireError(
            f"{answered} and {ranked[1][1]} answered in different shapes and none of them are "
            "most of the sites; nothing is summed"
        )
    order = tuple(name for name in cohort if name in set(answered))
    if grid.word not in (32, 64):  # Those wrap in memory as they do in the ring.
        for name, value in words.items():
            _check_limit(name, _largest(value), 2 ** (grid.word - 1) - 1, 1)
    return Aggregate(cohort=order, words=words, grid=grid)


def left_out(found: Aggregate, cohort: Cohort) -> dict[str, str]:
    """Sites of the cohort that are not in its sum, with the error that engines count them under
    where they gave none of their own."""
    return {name: "WireError" for name in cohort if name not in found.cohort}


def check_reply(reply: Reply, asked: Broadcast, *, most: int = 0) -> None:
    """Raises WireError unless an honest site could have answered so.

    That is: a refusal in one word; or exactly the grid's names in words of its size, none beyond
    what :func:`words` lets a site of this cohort add; a weight of at most ``most`` records (0: any
    number), and unless the question is ``weightless`` of at least 0, and above 0 beside numbers.
    Whatever passes can be summed without leaving its word. It may still be a lie.
    """
    if reply.refused:
        if not _CODE.fullmatch(reply.refused):
            raise WireError(f"{reply.client[:80]!r} refused by {reply.refused[:40]!r}, no code")
        return
    _check_grid(reply, asked.grid)
    if asked.grid.word == 8:
        return
    limit = _limit(asked.grid, len(asked.cohort))
    for name, value in reply.words.items():
        if (largest := _largest(value)) > limit:
            raise WireError(
                f"{reply.client} sent {largest} in {name}, {limit} is the most of one of "
                f"{len(asked.cohort)} sites; not summed"
            )
    weight = reply.words.get(WEIGHT)
    if weight is None:
        return
    if weight.dim():
        raise WireError(f"{reply.client} sent {weight.numel()} weights; one is asked for")
    records = int(weight) / 2 ** asked.grid.scale[WEIGHT]
    # The noise of a guard may stand without records, and in a weight.
    free = asked.weightless or bool(asked.guards)
    if (records < 0 and not free) or abs(records) > (most or abs(records)):
        raise WireError(
            f"{reply.client} answered for {records:g} records, expected 0 to {most or 'any'}; not "
            "summed"
        )
    if free:
        return
    addends = (v for n, v in reply.words.items() if n != WEIGHT and not n.startswith(METRIC))
    if records == 0 and any(bool(value.any()) for value in addends):
        raise WireError(f"{reply.client} sent numbers of no record at all; not summed")


def add(left: Aggregate, right: Aggregate) -> Aggregate:
    """The sum of two sums over the same names and grid; removal adds a negative.

    Raises WireError if they do not belong together, GridOverflow if the sum leaves its word.
    """
    shapes = [{name: value.shape for name, value in side.words.items()} for side in (left, right)]
    if left.grid != right.grid or shapes[0] != shapes[1]:
        raise WireError("two sums of different grids, names or shapes cannot be added")
    summed = {name: value + right.words[name] for name, value in left.words.items()}
    for name, value in summed.items():
        # A sum wrapped if and only if its sign differs from that of both its terms.
        if bool((((left.words[name] ^ value) & (right.words[name] ^ value)) < 0).any()):
            raise GridOverflow(f"{name} leaves its word of {left.grid.word} bits; use a larger one")
    return dataclasses.replace(left, words=summed)


def reals(aggregate: Aggregate) -> dict[str, Tensor]:
    """Summed tensors as float64, undivided; weight and metrics included."""
    return {
        name: value.to(torch.float64) / 2 ** _fraction(aggregate.grid, name)
        for name, value in aggregate.words.items()
    }


def mean(aggregate: Aggregate) -> dict[str, Tensor]:
    """Summed tensors over the summed weight, float32; zeros if the weight is zero."""
    decoded = reals(aggregate)
    weight = float(decoded[WEIGHT])
    return {
        name: (value / weight if weight else torch.zeros_like(value)).to(torch.float32)
        for name, value in decoded.items()
        if name != WEIGHT and not name.startswith(METRIC)
    }


def metrics(aggregate: Aggregate) -> dict[str, float]:
    """Summed metrics by name, undivided."""
    decoded = reals(aggregate)
    return {
        name.removeprefix(METRIC): float(value)
        for name, value in decoded.items()
        if name.startswith(METRIC)
    }


def single(reply: Reply, grid: Grid) -> Update:
    """One site's words as the real numbers they stand for (the question ``each``)."""
    decoded = reals(Aggregate(cohort=(reply.client,), words=reply.words, grid=grid))
    return Update(
        client=reply.client,
        tensors={
            name: value
            for name, value in decoded.items()
            if name != WEIGHT and not name.startswith(METRIC)
        },
        weight=float(decoded[WEIGHT]),
        metrics={
            name.removeprefix(METRIC): float(value)
            for name, value in decoded.items()
            if name.startswith(METRIC)
        },
    )


def singles(replies: Iterable[Reply], grid: Grid) -> Iterator[Update]:
    """The answers one by one as they come, without refusals."""
    return (single(reply, grid) for reply in replies if not reply.refused)


# --- states ---------------------------------------------------------------------------------------


def dump(state: object) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """A frozen dataclass tree as a JSON document and its tensors, keyed by their place."""
    tensors: dict[str, Tensor] = {}
    return cast(dict[str, Any], _to_document(state, "", tensors)), tensors


def load(kind: type[T], document: Mapping[str, Any], tensors: Weights) -> T:
    """The inverse of ``dump`` for a dataclass type; raises LedgerError if they do not fit."""
    try:
        return cast(T, _from_document(kind, document, tensors))
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise LedgerError(
            f"the saved state does not fit {kind.__name__} ({error!r}); it was written by another "
            "version of fedkola or altered; resume with that version"
        ) from error


# --- private --------------------------------------------------------------------------------------


def _grid_document(grid: Grid) -> dict[str, Any]:
    return {
        "word": grid.word,
        "bits": grid.bits,
        "scale": dict(grid.scale),
        "bounded": grid.bounded,
    }


def _grid(document: Mapping[str, Any]) -> Grid:
    word, bits = _field(document, "word", int), _field(document, "bits", int)
    scale = _field(document, "scale", dict)
    if word not in _WORDS or not 1 <= bits <= word:
        raise WireError(f"a grid of {bits} bits in words of {word}; drop the message")
    if not all(type(f) is int and 0 <= f <= MAX_FRACTION for f in scale.values()):
        raise WireError(f"a scale outside 0..{MAX_FRACTION} fractional bits; drop the message")
    bounded = _field(document, "bounded", bool)
    return Grid(word=cast(Any, word), bits=bits, scale=scale, bounded=bounded)


def _field(document: Mapping[str, Any], name: str, kind: type[T]) -> T:
    """The header's field, if it is there and exactly of this type (a bool is no int)."""
    value = document.get(name)
    if type(value) is not kind:
        raise WireError(f"{name} is {value!r:.80}, expected {kind.__name__}; drop the message")
    return value


def _each(document: Mapping[str, Any], name: str, kind: type[T]) -> list[T]:
    values = _field(document, name, list)
    return [_field({name: value}, name, kind) for value in values]


def _spec(document: Mapping[str, Any]) -> dict[str, Scalar]:
    if not all(
        value is None or isinstance(value, str | int | float) for value in document.values()
    ):
        raise WireError(f"{document!r:.80} holds more than plain values; drop the message")
    return dict(document)


def _frame(header: Mapping[str, Any], tensors: Weights) -> bytes:
    text = json.dumps(header, sort_keys=True, separators=(",", ":"), allow_nan=False).encode()
    if len(text) > MAX_HEADER_BYTES:
        raise WireError(f"header of {len(text)} bytes, at most {MAX_HEADER_BYTES} are allowed")
    _check_counts(tensors)
    seen: set[int] = set()
    alone: dict[str, Tensor] = {}
    for name, value in tensors.items():
        # safetensors refuses two names for one storage.
        place = value.untyped_storage().data_ptr()
        alone[name] = value.clone().contiguous() if place in seen else value.contiguous()
        seen.add(place)
    body = safetensors.torch.save(alone)
    crc = zlib.crc32(body, zlib.crc32(text))
    return b"".join((_PREFIX.pack(MAGIC + str(VERSION).encode(), len(text), crc), text, body))


def _unframe(message: bytes, kind: str, max_bytes: int) -> tuple[dict[str, Any], dict[str, Tensor]]:
    start = _PREFIX.size
    if len(message) < start or message[:3] != MAGIC:
        raise WireError("these bytes are not a fedkola message; drop them")
    if message[3:4] != str(VERSION).encode():
        raise VersionMismatch(
            f"wire version {message[3:4]!r}, this side speaks {VERSION}; upgrade the older side"
        )
    _, length, crc = _PREFIX.unpack_from(message)
    if length > MAX_HEADER_BYTES or start + length > len(message):
        raise WireError(f"header length {length} does not fit the message; drop it")
    if len(message) - start - length > max_bytes:
        raise WireError(f"message of {len(message)} bytes, at most {max_bytes} are allowed")
    if zlib.crc32(memoryview(message)[start:]) != crc:
        raise WireError("the message was cut or altered on its way; drop it and ask again")
    try:
        header = json.loads(message[start : start + length])
        tensors = safetensors.torch.load(message[start + length :])
    except (ValueError, RecursionError, SafetensorError, KeyError) as error:
        raise WireError(f"message cannot be decoded ({type(error).__name__}); drop it") from error
    if not isinstance(header, dict) or header.get("kind") != kind:
        raise WireError(f"expected a {kind}, got another message; drop it")
    _check_counts(tensors)
    return header, tensors


def _check_counts(tensors: Weights) -> None:
    if len(tensors) > MAX_TENSORS or any(t.dim() > MAX_DIMENSIONS for t in tensors.values()):
        raise WireError(f"more than {MAX_TENSORS} tensors or {MAX_DIMENSIONS} dimensions; drop it")


def _fraction(grid: Grid, name: str) -> int:
    if name not in grid.scale:
        raise WireError(f"the grid lists no scale for {name!r}; it lists {sorted(grid.scale)[:5]}")
    return grid.scale[name]


def _check_grid(reply: Reply, grid: Grid) -> None:
    if set(reply.words) != set(grid.scale):
        odd = sorted(set(reply.words) ^ set(grid.scale))[:3]
        raise WireError(f"{reply.client} answered with other names than asked: {odd}; not summed")
    if reply.word not in (0, grid.word):
        raise WireError(f"{reply.client} sent words of {reply.word} bits, asked for {grid.word}")
    for name, value in reply.words.items():
        if value.dtype != _WORDS[grid.word]:
            raise WireError(
                f"{reply.client} sent {name} as {value.dtype}, asked for {_WORDS[grid.word]}; "
                "not summed"
            )


def _limit(grid: Grid, cohort: int) -> int:
    """The largest word that one of so many sites may add."""
    shares = 1 if grid.bounded else max(cohort, 1)
    return int(min(2 ** (grid.bits - 1) - 1, (2 ** (grid.word - 1) - 1) // shares))


def _quantise(name: str, value: Tensor, grid: Grid, cohort: int) -> Tensor:
    limit = _limit(grid, cohort)
    fraction = _fraction(grid, name)
    if value.is_floating_point():
        if not bool(torch.isfinite(value).all()):
            raise NotFinite(f"{name} holds NaN or infinity; the addend stays at its site")
        scaled = torch.round(value.to(torch.float64) * 2.0**fraction)
        # Compared before the cast: a float beyond the word would wrap without a trace.
        _check_limit(name, float(scaled.abs().max()) if scaled.numel() else 0.0, limit, cohort)
        return scaled.to(_WORDS[grid.word])
    if fraction:
        raise WireError(f"{name} is an integer tensor, its scale must be 0 and is {fraction}")
    _check_limit(name, _largest(value), limit, cohort)
    return value.to(_WORDS[grid.word])


def _largest(value: Tensor) -> int:
    return max(-int(value.min()), int(value.max())) if value.numel() else 0


def _narrow(value: Tensor, word: int) -> Tensor:
    """Words as bytes, the lowest first: integers (...) to uint8 (..., word / 8)."""
    return value.contiguous()[..., None].view(torch.uint8)[..., : word // 8].contiguous()


def _widen(value: Tensor, word: int) -> Tensor:
    """The inverse of ``_narrow``. Raises WireError for anything else."""
    if value.dtype != torch.uint8 or value.dim() < 1 or value.shape[-1] != word // 8:
        raise WireError(
            f"words of {word} bits sent as {value.dtype} {tuple(value.shape)}; drop the message"
        )
    wide = _WORDS[word]
    spare = wide.itemsize - word // 8
    high = torch.zeros(*value.shape[:-1], wide.itemsize, dtype=torch.uint8)
    high[..., spare:] = value
    # The sign bit is at the top now; the shift takes it along.
    return high.view(wide)[..., 0] >> 8 * spare


def _check_limit(name: str, largest: float, limit: int, cohort: int) -> None:
    if largest > limit:
        raise GridOverflow(
            f"{name} reaches {largest:.6g} on the grid, {limit} is the most that {cohort} sites "
            "can add without overflow; use a larger word or fewer fractional bits"
        )


def _to_document(value: Any, place: str, tensors: dict[str, Tensor]) -> Any:
    if isinstance(value, Tensor):
        if place in tensors:
            raise LedgerError(f"two tensors of a state have one place, {place}; rename a key")
        tensors[place] = value
        return {"tensor": place}
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {
            f.name: _to_document(getattr(value, f.name), f"{place}.{f.name}".lstrip("."), tensors)
            for f in dataclasses.fields(value)
        }
    if isinstance(value, Enum):
        return value.value
    if isinstance(value, Mapping):
        return {k: _to_document(v, f"{place}.{k}", tensors) for k, v in value.items()}
    if isinstance(value, tuple | list):
        return [_to_document(v, f"{place}.{i}", tensors) for i, v in enumerate(value)]
    if value is None or isinstance(value, str | bool | int):
        return value
    if isinstance(value, float) and math.isfinite(value):
        return value
    raise LedgerError(f"{place} holds {value!r}, which a state cannot keep")


def _from_document(kind: Any, document: Any, tensors: Weights) -> Any:
    origin = typing.get_origin(kind)
    if kind is Tensor:
        return tensors[document["tensor"]]
    if dataclasses.is_dataclass(kind):
        hints = typing.get_type_hints(kind)
        fields = [f.name for f in dataclasses.fields(kind)]
        values = {name: _from_document(hints[name], document[name], tensors) for name in fields}
        return cast(Any, kind)(**values)
    if isinstance(kind, type) and issubclass(kind, Enum):
        return kind(document)
    if origin in (typing.Union, types.UnionType):
        if document is None:
            return None
        options = [option for option in typing.get_args(kind) if option is not type(None)]
        structured = [o for o in options if dataclasses.is_dataclass(o) or typing.get_origin(o)]
        if structured and isinstance(document, dict | list):
            return _from_document(structured[0], document, tensors)
        return document
    if origin is tuple:
        inner = typing.get_args(kind)
        if len(inner) == 2 and inner[1] is Ellipsis:
            return tuple(_from_document(inner[0], item, tensors) for item in document)
        return tuple(
            _from_document(i, item, tensors) for i, item in zip(inner, document, strict=True)
        )
    if isinstance(origin, type) and issubclass(origin, Mapping):
        return {
            k: _from_document(typing.get_args(kind)[1], v, tensors) for k, v in document.items()
        }
    return document
