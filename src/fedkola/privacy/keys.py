"""Keys of MaskedSum v1: identities, the pinned roster, and all that one epoch secret stands for.

Every key is HKDF-SHA256 of a secret under the salt ``run || roster_hash`` and an info that begins
with "fedkola/ms1/" and a label, so that no key has two uses. A site keeps one secret E per epoch;
its key pairs, self seeds and polynomials are functions of it, hence a restart repeats its bytes.
Numbers are little-endian. Identities are Ed25519, agreements X25519, shares travel in
ChaCha20-Poly1305.
"""

import hashlib
import struct
import tomllib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from cryptography.exceptions import InvalidSignature, InvalidTag
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.ciphers.aead import ChaCha20Poly1305
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from fedkola.errors import PrivacyError
from fedkola.files import write_private
from fedkola.privacy import shamir

PREFIX = b"fedkola/ms1/"
KEY_BYTES = 32
SIGNATURE_BYTES = 64
SELF, PAIR = b"b", b"a"
"""The kinds of shared secret: the self seed b, and the private exchange key a."""

_NONCE = bytes(12)  # One message per key.
_COEFFICIENT_BYTES = 80


@dataclass(frozen=True)
class Roster:
    """Who takes part in a run: its 16 bytes, the server's public key, sites by id with theirs.

    A site's index is its place in the order of the ids.
    """

    run: bytes
    server: bytes
    sites: tuple[tuple[str, bytes], ...]

    @cached_property
    def hash(self) -> bytes:
        listed = b"".join(
            struct.pack("<H", len(name.encode())) + name.encode() + key for name, key in self.sites
        )
        return hashlib.sha256(PREFIX + b"roster\0" + listed).digest()

    @cached_property
    def salt(self) -> bytes:
        return self.run + self.hash

    @cached_property
    def names(self) -> tuple[str, ...]:
        return tuple(name for name, _ in self.sites)

    def index(self, name: str) -> int:
        """Raises PrivacyError for a site that is not pinned."""
        if name not in self.names:
            raise PrivacyError(
                f"{name!r} is not among the {len(self.sites)} pinned sites; pin its key in "
                "site.toml at every site before it takes part",
                code="unknown_site",
            )
        return self.names.index(name)

    def key(self, index: int) -> bytes:
        """Raises PrivacyError for an index beyond the roster."""
        if index >= len(self.sites):
            raise PrivacyError(
                f"index {index}, but {len(self.sites)} sites are pinned", code="unknown_site"
            )
        return self.sites[index][1]


def roster(run: bytes, server: bytes, sites: Iterable[tuple[str, bytes]]) -> Roster:
    return Roster(run=run, server=server, sites=tuple(sorted(sites)))


@dataclass(frozen=True, slots=True, kw_only=True)
class Epoch:
    """One site's secret for the exchanges ``first`` to ``first + count - 1``."""

    roster: Roster
    number: int
    first: int
    count: int
    secret: bytes

    def channel(self) -> bytes:
        """The private key c that shares are sealed with."""
        return kdf(self.roster, self.secret, "chan", _u32(self.number))

    def pair(self, x: int) -> bytes:
        """The private key a of exchange x."""
        return kdf(self.roster, self.secret, "pair", _u32(self.number) + _u32(x))

    def own(self, x: int) -> bytes:
        """The self seed b of exchange x."""
        return kdf(self.roster, self.secret, "self", _u32(self.number) + _u32(x))

    def shares(self, x: int, kind: bytes, threshold: int, holders: Sequence[int]) -> list[bytes]:
        """The shares of b or a of exchange x, one for each holder."""
        secret = int.from_bytes(self.own(x) if kind == SELF else self.pair(x), "big")
        fields = _u32(self.number) + _u32(x) + kind
        coefficients = [
            int.from_bytes(
                kdf(self.roster, self.secret, "coef", fields + _u16(m), _COEFFICIENT_BYTES), "big"
            )
            % shamir.PRIME
            for m in range(1, threshold)
        ]
        return [shamir.share(secret, coefficients, holder) for holder in holders]


def kdf(roster: Roster, secret: bytes, label: str, fields: bytes, length: int = KEY_BYTES) -> bytes:
    info = PREFIX + label.encode() + b"\0" + fields
    return HKDF(algorithm=SHA256(), length=length, salt=roster.salt, info=info).derive(secret)


def stream_key(roster: Roster, seed: bytes, epoch: int, x: int, section: int) -> bytes:
    """The key of one mask; section 0 is the payload, 1 the side values."""
    return kdf(roster, seed, "stream", _u32(epoch) + _u32(x) + _u16(section))


def pair_seed(
    roster: Roster, private: bytes, public: bytes, epoch: int, x: int, i: int, j: int
) -> bytes:
    """The seed that sites i and j share for exchange x, from either one's private key."""
    fields = _u32(epoch) + _u32(x) + _u16(min(i, j)) + _u16(max(i, j))
    return kdf(roster, agreed(private, public), "mask", fields)


def public_of(private: bytes) -> bytes:
    return X25519PrivateKey.from_private_bytes(private).public_key().public_bytes_raw()


def agreed(private: bytes, public: bytes) -> bytes:
    """X25519; raises PrivacyError for a public key that gives zero whatever the private one is."""
    try:
        return X25519PrivateKey.from_private_bytes(private).exchange(
            X25519PublicKey.from_public_bytes(public)
        )
    except ValueError as error:
        raise PrivacyError(
            "a key agreement gave zero: the other site's public key has low order; leave it out",
            code="bad_signature",
        ) from error


# --- sealed shares --------------------------------------------------------------------------------


def seal(epoch: Epoch, plain: bytes, i: int, j: int, public: bytes, offers_hash: bytes) -> bytes:
    """Shares of site i for holder j, under j's channel key and what i saw of all offers."""
    key = _share_key(epoch, i, j, public)
    return ChaCha20Poly1305(key).encrypt(_NONCE, plain, _bound(epoch, i, j, offers_hash))


def unseal(epoch: Epoch, sealed: bytes, i: int, j: int, public: bytes, offers_hash: bytes) -> bytes:
    """The shares of site i at holder j; raises PrivacyError if they are not what i sealed, or if i
    saw other offers."""
    key = _share_key(epoch, i, j, public)
    try:
        return ChaCha20Poly1305(key).decrypt(_NONCE, sealed, _bound(epoch, i, j, offers_hash))
    except InvalidTag as error:
        raise PrivacyError(
            f"the shares of site {i} do not open: they were altered, or it was shown other offers "
            "than this site; trust the server only after an inquiry",
            code="bad_signature",
        ) from error


def _share_key(epoch: Epoch, i: int, j: int, public: bytes) -> bytes:
    fields = _u32(epoch.number) + _u16(i) + _u16(j)
    return kdf(epoch.roster, agreed(epoch.channel(), public), "aead", fields)


def _bound(epoch: Epoch, i: int, j: int, offers_hash: bytes) -> bytes:
    return PREFIX + b"share\0" + _u32(epoch.number) + _u16(i) + _u16(j) + offers_hash


# --- identities -----------------------------------------------------------------------------------


def identity(path: Path) -> Ed25519PrivateKey:
    """The key pair kept in a file of mode 0600, made at the first use.

    Raises PrivacyError for a file that holds none.
    """
    if not path.exists():
        write_private(path, Ed25519PrivateKey.generate().private_bytes_raw())
    kept = path.read_bytes()
    if len(kept) != KEY_BYTES:
        raise PrivacyError(
            f"{path} holds {len(kept)} bytes, a private key has {KEY_BYTES}; restore it from a "
            "copy, for a new one is pinned nowhere"
        )
    return Ed25519PrivateKey.from_private_bytes(kept)


def check_signature(public: bytes, signature: bytes, message: bytes, who: str) -> None:
    """Raises PrivacyError unless the owner of a pinned key signed this message."""
    try:
        Ed25519PublicKey.from_public_bytes(public).verify(signature, message)
    except InvalidSignature as error:
        raise PrivacyError(
            f"{who} is not signed by its pinned key; drop it and find out who sent it",
            code="bad_signature",
        ) from error


def pin(path: Path, roster: Roster) -> None:
    """Keep the roster in a site's file, once: another one is refused with PrivacyError."""
    if path.exists():
        if pinned(path) != roster:
            raise PrivacyError(
                f"{path} pins another roster than this run has; a site never exchanges pinned keys "
                "by itself: check them with the other sites, then replace the file by hand",
                code="roster_mismatch",
            )
        return
    lines = [
        "# Who takes part in this run. Check the keys with the other sites.",
        f'run = "{roster.run.hex()}"',
        f'server = "{roster.server.hex()}"',
        "",
        "[sites]",
        *(f'{_quoted(name)} = "{key.hex()}"' for name, key in roster.sites),
    ]
    write_private(path, ("\n".join(lines) + "\n").encode())


def pinned(path: Path) -> Roster:
    """The roster in a site's file; raises PrivacyError if it cannot be read."""
    try:
        found = tomllib.loads(path.read_text(encoding="utf-8"))
        return roster(
            bytes.fromhex(found["run"]),
            bytes.fromhex(found["server"]),
            [(name, bytes.fromhex(key)) for name, key in found["sites"].items()],
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise PrivacyError(
            f"{path} holds no roster ({error!r}); restore it from a copy", code="roster_mismatch"
        ) from error


def _quoted(name: str) -> str:
    escaped = "".join(f"\\u{ord(c):04x}" if ord(c) < 0x20 or c in '"\\\x7f' else c for c in name)
    return f'"{escaped}"'


def _u32(value: int) -> bytes:
    return value.to_bytes(4, "little")


def _u16(value: int) -> bytes:
    return value.to_bytes(2, "little")
