"""The frames of MaskedSum v1 as bytes, and back. Numbers are little-endian.

Everything here is a function of plan, roster and keys; of what sites know, only masked words
travel, and those lie beside these frames.
"""

import hashlib
import json
import struct
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from fedkola.errors import WireError
from fedkola.privacy import shamir
from fedkola.privacy.keys import KEY_BYTES, PREFIX, SIGNATURE_BYTES, Roster

Shapes = tuple[tuple[str, tuple[int, ...]], ...]

_OFFER = struct.Struct("<16s32sIIHH32s")
_OPEN = struct.Struct("<IIH")
_COUNTED = struct.Struct("<IH")
_ASK = struct.Struct("<32s32s")
_HASHED = struct.Struct("<I32s")
_ENTRY = struct.Struct(f"<Hc{shamir.SHARE_BYTES}s")
_TAG_BYTES = 16
_HASH_BYTES = 32
_MAX_SHAPES_BYTES = 1 << 24


@dataclass(frozen=True, slots=True, kw_only=True)
class Opening:
    """The server opens an epoch: its number, first exchange, and how many it may hold."""

    epoch: int
    first: int
    count: int

    def pack(self) -> bytes:
        return _OPEN.pack(self.epoch, self.first, self.count)

    @staticmethod
    def unpack(frame: bytes) -> "Opening":
        epoch, first, count = _unpacked(_OPEN, frame)
        return Opening(epoch=epoch, first=first, count=count)


@dataclass(frozen=True, slots=True, kw_only=True)
class Offer:
    """A site's public keys of one epoch: of its channel, and of every exchange."""

    run: bytes
    roster_hash: bytes
    epoch: int
    first: int
    site: int
    channel: bytes
    exchanges: tuple[bytes, ...]
    plan_hash: bytes
    manifest_hash: bytes

    def pack(self) -> bytes:
        head = _OFFER.pack(
            self.run,
            self.roster_hash,
            self.epoch,
            self.first,
            len(self.exchanges),
            self.site,
            self.channel,
        )
        keys = b"".join(self.exchanges)
        return PREFIX + b"offer\0" + head + keys + self.plan_hash + self.manifest_hash

    def public(self, x: int) -> bytes:
        return self.exchanges[x - self.first]

    @staticmethod
    def unpack(frame: bytes) -> "Offer":
        label = PREFIX + b"offer\0"
        if not frame.startswith(label):
            raise WireError("these bytes are not an offer; drop them")
        rest = frame[len(label) :]
        run, roster_hash, epoch, first, count, site, channel = _unpacked(
            _OFFER, rest[: _OFFER.size]
        )
        rest = rest[_OFFER.size :]
        if len(rest) != KEY_BYTES * count + 2 * _HASH_BYTES:
            raise WireError(f"an offer of {count} keys in {len(rest)} bytes; drop it")
        keys = [rest[KEY_BYTES * i : KEY_BYTES * (i + 1)] for i in range(count)]
        hashes = rest[KEY_BYTES * count :]
        return Offer(
            run=run,
            roster_hash=roster_hash,
            epoch=epoch,
            first=first,
            site=site,
            channel=channel,
            exchanges=tuple(keys),
            plan_hash=hashes[:_HASH_BYTES],
            manifest_hash=hashes[_HASH_BYTES:],
        )


def offers_hash(offers: Mapping[int, Offer]) -> bytes:
    """What sites must agree on: the public keys of all, in the order of their indices."""
    keys = b"".join(offers[i].channel + b"".join(offers[i].exchanges) for i in sorted(offers))
    return hashlib.sha256(keys).digest()


def pack_offers(signed: Mapping[int, bytes]) -> bytes:
    """All signed offers, which have one length, behind their number."""
    return struct.pack("<H", len(signed)) + b"".join(signed[i] for i in sorted(signed))


def unpack_offers(frame: bytes) -> list[tuple[Offer, bytes, bytes]]:
    """Every offer with its signed bytes and its signature."""
    count = int.from_bytes(frame[:2], "little")
    if len(frame) < 2 or not count or (len(frame) - 2) % count:
        raise WireError("these bytes are not a list of offers; drop them")
    size = (len(frame) - 2) // count
    found = []
    for place in range(2, len(frame), size):
        one = frame[place : place + size]
        body, signature = one[:-SIGNATURE_BYTES], one[-SIGNATURE_BYTES:]
        found.append((Offer.unpack(body), body, signature))
    return found


def pack_sealed(sealed: Mapping[int, bytes]) -> bytes:
    """Sealed shares by site, which have one length: u16 count, then u16 index and bytes each."""
    parts = [struct.pack("<H", i) + sealed[i] for i in sorted(sealed)]
    return struct.pack("<H", len(sealed)) + b"".join(parts)


def unpack_sealed(frame: bytes, count: int) -> dict[int, bytes]:
    """Sealed shares of ``count`` exchanges by site."""
    size = 2 + 2 * shamir.SHARE_BYTES * count + _TAG_BYTES
    number = int.from_bytes(frame[:2], "little")
    if len(frame) != 2 + number * size:
        raise WireError(f"{number} sealed shares in {len(frame)} bytes; drop the message")
    parts = [frame[2 + size * i : 2 + size * (i + 1)] for i in range(number)]
    found = {int.from_bytes(part[:2], "little"): part[2:] for part in parts}
    if len(found) != number:
        raise WireError("two sealed shares for one site; drop the message")
    return found


@dataclass(frozen=True, slots=True, kw_only=True)
class Ask:
    """Exchange x: who masks, under which plan, and the hash of the question."""

    x: int
    sites: tuple[int, ...]
    plan_hash: bytes
    question: bytes

    def pack(self) -> bytes:
        return pack_sites(self.x, self.sites) + _ASK.pack(self.plan_hash, self.question)

    @staticmethod
    def unpack(frame: bytes) -> "Ask":
        x, sites = unpack_sites(frame[: -_ASK.size])
        plan_hash, question = _unpacked(_ASK, frame[-_ASK.size :])
        return Ask(x=x, sites=sites, plan_hash=plan_hash, question=question)


def pack_sites(x: int, sites: Sequence[int]) -> bytes:
    """The frame that names survivors."""
    return _COUNTED.pack(x, len(sites)) + b"".join(struct.pack("<H", i) for i in sites)


def unpack_sites(frame: bytes) -> tuple[int, tuple[int, ...]]:
    x, count = _unpacked(_COUNTED, frame[: _COUNTED.size])
    rest = frame[_COUNTED.size :]
    if len(rest) != 2 * count:
        raise WireError(f"{count} sites in {len(rest)} bytes; drop the message")
    sites = struct.unpack(f"<{count}H", rest)
    if list(sites) != sorted(set(sites)):
        raise WireError("sites twice or out of order; drop the message")
    return x, sites


def signed(kind: str, roster: Roster, *parts: bytes) -> bytes:
    """What is signed of a frame: its kind, its run and roster, and what it hangs on."""
    return PREFIX + kind.encode() + b"\0" + roster.salt + b"".join(parts)


@dataclass(frozen=True, slots=True, kw_only=True)
class Revealed:
    """Shares that a site returns: by site of the roster, the kind of secret and the share."""

    x: int
    survivors: bytes
    shares: Mapping[int, tuple[bytes, bytes]]

    def pack(self) -> bytes:
        entries = [_ENTRY.pack(i, *self.shares[i]) for i in sorted(self.shares)]
        return _HASHED.pack(self.x, self.survivors) + b"".join(entries)

    @staticmethod
    def unpack(frame: bytes) -> "Revealed":
        x, survivors = _unpacked(_HASHED, frame[: _HASHED.size])
        rest = frame[_HASHED.size :]
        if len(rest) % _ENTRY.size:
            raise WireError(f"shares in {len(rest)} bytes; drop the message")
        entries = list(_ENTRY.iter_unpack(rest))
        if [i for i, _, _ in entries] != sorted({i for i, _, _ in entries}):
            raise WireError("shares twice or out of order; drop the message")
        shares = {i: (kind, share) for i, kind, share in entries}
        return Revealed(x=x, survivors=survivors, shares=shares)


def pack_answer(x: int, asked: bytes, shapes: Shapes) -> bytes:
    """What stands before the masked words: x, the hash of the frame that asked, and the shapes,
    compressed, as names of layers repeat."""
    listed = json.dumps([[name, list(shape)] for name, shape in shapes], separators=(",", ":"))
    return _HASHED.pack(x, asked) + zlib.compress(listed.encode(), 9)


def unpack_answer(frame: bytes) -> tuple[int, bytes, Shapes]:
    x, asked = _unpacked(_HASHED, frame[: _HASHED.size])
    try:
        reader = zlib.decompressobj()
        content = reader.decompress(frame[_HASHED.size :], _MAX_SHAPES_BYTES)
        if not reader.eof or reader.unused_data:
            raise WireError("the shapes of an answer are cut off, or too many; drop it")
        listed = json.loads(content)
        shapes = tuple((name, tuple(shape)) for name, shape in listed)
        ordered = [name for name, _ in shapes] == sorted({name for name, _ in shapes})
        sizes = all(type(size) is int and size >= 0 for _, shape in shapes for size in shape)
    except (zlib.error, ValueError, TypeError, RecursionError) as error:
        raise WireError("the shapes of an answer cannot be read; drop it") from error
    if not ordered or not sizes or not all(type(name) is str for name, _ in shapes):
        raise WireError("the shapes of an answer cannot be read; drop it")
    return x, asked, shapes


def _unpacked(form: struct.Struct, frame: bytes) -> tuple[Any, ...]:
    if len(frame) != form.size:
        raise WireError(f"a frame of {len(frame)} bytes, expected {form.size}; drop the message")
    return form.unpack(frame)
