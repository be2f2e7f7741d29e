"""The site half of MaskedSum v1: what a site answers, what it keeps, and what it refuses.

A site keeps, below ``secure_sum/`` in its own folder and readable by nobody else: its identity, the
secret and shares of the current epoch, the last masked answer, and a log of what it answered and
revealed, flushed before anything is sent. So a site that was killed repeats its bytes, and never
reveals both secrets of one site and exchange. The secret of an epoch is deleted with its end.
"""

import hashlib
import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from fedkola import wire
from fedkola.errors import (
    GridOverflow,
    NotFinite,
    PolicyRefused,
    PrivacyError,
    SurvivorsChanged,
    UpdateHidden,
    WireError,
)
from fedkola.files import flush, write_private
from fedkola.privacy import frames, keys, masks, shamir
from fedkola.privacy.graph import choose_graph, neighbours
from fedkola.privacy.keys import Epoch, Roster
from fedkola.types import Broadcast, Grid, Reply, Weights

OPEN, SHARE, RELAY, ASK, REVEAL = (f"ms1/{s}" for s in ("open", "share", "relay", "ask", "reveal"))
NO_EPOCH = "no_epoch"
FOLDER, IDENTITY, PINNED = "secure_sum", "identity.key", "site.toml"
LEAST = 3
"""With fewer sites, a site that subtracts its own addend from the sum reads another's."""

_MAX_EXCHANGES = 1024
_SHARES_BYTES = 2 * shamir.SHARE_BYTES
_DONE = b"\1"


@dataclass(frozen=True, slots=True, kw_only=True)
class Rules:
    """What a site holds a run to.

    ``shapes`` are those of the model's tensors by name, None for a size that is not fixed;
    ``minimum`` is the least number of sites by the site's policy, ``colluders`` how many may work
    together with the server.
    """

    plan_hash: bytes
    manifest_hash: bytes
    shapes: Mapping[str, tuple[int | None, ...]] = field(default_factory=dict)
    minimum: int = LEAST
    colluders: int = 0

    @property
    def least(self) -> int:
        return max(LEAST, self.colluders + 2, self.minimum)


@dataclass(frozen=True, slots=True, kw_only=True)
class _State:
    """The current epoch as it is kept: own secret, everybody's offers, shares held for others."""

    epoch: Epoch
    offers: Mapping[int, frames.Offer]
    shares: Mapping[int, bytes]

    @property
    def threshold(self) -> int:
        return choose_graph(len(self.offers))[1]

    @property
    def partners(self) -> Mapping[int, frozenset[int]]:
        k, _ = choose_graph(len(self.offers))
        return neighbours(self.epoch.roster.hash, sorted(self.offers), k)

    def holders(self, index: int) -> frozenset[int]:
        return holders(self.partners, index)


def holders(partners: Mapping[int, frozenset[int]], index: int) -> frozenset[int]:
    """Who holds the shares of a site: its neighbours, and itself in a complete graph."""
    own = {index} if len(partners[index]) == len(partners) - 1 else set()
    return partners[index] | own


class Member:
    """One site of a roster. ``answer`` is its whole interface."""

    def __init__(self, name: str, store: Path, roster: Roster, rules: Rules) -> None:
        """Pins the roster; raises PrivacyError if another one, or another own key, is pinned."""
        keys.pin(store / PINNED, roster)
        self.name = name
        self._index = roster.index(name)
        self._roster = roster
        self._rules = rules
        self._folder = store / FOLDER
        self._identity = keys.identity(self._folder / IDENTITY)
        self._state: _State | None = None
        self._noted: _Log | None = None
        if self._identity.public_key().public_bytes_raw() != roster.key(self._index):
            raise PrivacyError(
                f"the roster pins another key for {name} than it has; enrol it anew at every site",
                code="roster_mismatch",
            )

    def answer(self, asked: Broadcast, message: bytes, words: Callable[[bytes], Weights]) -> bytes:
        """The answer to one message of the protocol.

        ``words`` gives this site's integer addend to a plain question in bytes. Raises
        PolicyRefused or PrivacyError with the code of the rule that refused.
        """
        if asked.step not in (OPEN, SHARE, RELAY, ASK, REVEAL):
            raise UpdateHidden(
                f"asked for {asked.step!r} in the clear; this site answers under secure "
                "aggregation only, as its plan says"
            )
        if asked.step == ASK:
            return self._answer(asked, message, words)
        frame = _bytes(asked, "frame")
        if asked.step == OPEN:
            found = self._open(frame, _bytes(asked, "signature"))
        elif asked.step == SHARE:
            found = self._share(frame)
        elif asked.step == RELAY:
            found = self._relay(frame)
        else:
            found = self._reveal(frame, _bytes(asked, "signature"))
        return self._packed(message, {"frame": as_tensor(found)})

    def finish(self) -> None:
        """Erase the secret of the epoch, and only then its log and the kept answer."""
        self._epoch_path.unlink(missing_ok=True)
        flush(self._folder)
        self._forget_log()
        self._state = None

    # --- the messages -----------------------------------------------------------------------------

    def _open(self, frame: bytes, signature: bytes) -> bytes:
        self._check_server("open", signature, frame)
        opening = frames.Opening.unpack(frame)
        if not 1 <= opening.count <= _MAX_EXCHANGES:
            raise WireError(f"an epoch of {opening.count} exchanges; drop the message")
        state = self._read()
        if state is None or opening != _opening(state.epoch):
            if state is not None:
                old = state.epoch
                if opening.epoch <= old.number or opening.first < old.first + old.count:
                    raise PrivacyError(
                        f"epoch {opening.epoch} from exchange {opening.first}, after epoch "
                        f"{old.number} up to {old.first + old.count - 1}: numbers only grow",
                        code="exchange_reused",
                    )
            epoch = Epoch(
                roster=self._roster,
                number=opening.epoch,
                first=opening.first,
                count=opening.count,
                secret=os.urandom(keys.KEY_BYTES),
            )
            state = _State(epoch=epoch, offers={}, shares={})
            # The old secret is gone for good before its log is: the log guards its masks.
            self._write(state, durable=True)
            self._forget_log()
        body = self._offer(state.epoch).pack()
        return body + self._identity.sign(body)

    def _share(self, frame: bytes) -> bytes:
        state = self._current()
        offers = self._checked_offers(state.epoch, frame)
        if not state.offers:
            state = replace(state, offers=offers)
            self._write(state)
        elif state.offers != offers:
            raise PrivacyError(
                "other offers come in an epoch whose shares are sent; open a new epoch",
                code="exchange_reused",
            )
        epoch, digest = state.epoch, frames.offers_hash(offers)
        others = sorted(state.holders(self._index) - {self._index})
        plain = dict.fromkeys(others, b"")
        for x in range(epoch.first, epoch.first + epoch.count):
            for kind in (keys.SELF, keys.PAIR):
                shares = epoch.shares(x, kind, state.threshold, others)
                for holder, share in zip(others, shares, strict=True):
                    plain[holder] += share
        return frames.pack_sealed(
            {
                j: keys.seal(epoch, plain[j], self._index, j, offers[j].channel, digest)
                for j in others
            }
        )

    def _relay(self, frame: bytes) -> bytes:
        state = self._current(offered=True)
        digest = frames.offers_hash(state.offers)
        shares = dict(state.shares)
        for i, sealed in frames.unpack_sealed(frame, state.epoch.count).items():
            if i not in state.offers or self._index not in state.holders(i) - {i}:
                raise PrivacyError(f"shares of site {i}, not a neighbour", code="unknown_site")
            public = state.offers[i].channel
            shares[i] = keys.unseal(state.epoch, sealed, i, self._index, public, digest)
        self._write(replace(state, shares=shares))
        return _DONE

    def _answer(self, asked: Broadcast, message: bytes, words: Callable[[bytes], Weights]) -> bytes:
        state = self._current(offered=True)
        frame, question = _bytes(asked, "frame"), _bytes(asked, "question")
        digest = frames.offers_hash(state.offers)
        self._check_server("ask", _bytes(asked, "signature"), digest, frame)
        ask = frames.Ask.unpack(frame)
        if hashlib.sha256(question).digest() != ask.question:
            raise PrivacyError("the question is not the one that is signed", code="bad_signature")
        asked_digest = hashlib.sha256(frame).digest()
        kept = self._kept_answer(state, ask.x, asked_digest)
        if kept.exists():
            self._note_answer(ask, frame)
            return kept.read_bytes()
        inner = wire.unpack_broadcast(question)
        self._check_ask(state, ask, inner)
        try:
            addend = words(question)
        except (GridOverflow, NotFinite) as error:
            error.code = "grid_overflow" if isinstance(error, GridOverflow) else "not_finite"
            raise
        shapes, payload, side = self._masked(state, ask, addend, inner.grid)
        answer = self._packed(
            message,
            {
                "frame": as_tensor(frames.pack_answer(ask.x, asked_digest, shapes)),
                "payload": torch.from_numpy(masks.to_bytes(payload, inner.grid.word)),
                "side": torch.from_numpy(masks.to_bytes(side, 64)),
            },
        )
        self._keep(kept, answer)
        self._note_answer(ask, frame, absent=_absent(inner))
        return answer

    def _masked(
        self, state: _State, ask: frames.Ask, addend: Weights, grid: Grid
    ) -> tuple[frames.Shapes, masks.Words, masks.Words]:
        shapes, payload, side = flattened(addend, grid)
        for section, part in enumerate((payload, side)):
            plus, minus = self._streams(state, ask, section)
            masks.add_streams(part, plus=plus, minus=minus)
        return shapes, payload, side

    def _reveal(self, frame: bytes, signature: bytes) -> bytes:
        state = self._current(offered=True)
        self._check_server("survivors", signature, frame)
        x, survivors = frames.unpack_sites(frame)
        log = self._log()
        if x not in log.answered:
            raise PrivacyError(
                f"exchange {x} is none that this site answered in this epoch; it reveals nothing",
                code="not_a_survivor",
            )
        known = log.answered[x]
        if not set(survivors) <= set(known.sites):
            raise PrivacyError("a survivor that was not asked", code="unknown_site")
        if self._index not in survivors:
            raise PrivacyError(
                f"this site answered exchange {x} and is not counted", code="not_a_survivor"
            )
        self._check_count(len(survivors), "survive")
        self._check_holders(state, survivors)
        if known.absent is not None and len(survivors) < len(known.sites) - known.absent:
            raise PolicyRefused(
                f"{len(survivors)} of {len(known.sites)} sites survive; their noise was sized for "
                f"at most {known.absent} absent ones",
                code="noise_short",
            )
        mine = [j for j in known.sites if self._index in state.holders(j)]
        kinds = {j: keys.SELF if j in survivors else keys.PAIR for j in mine}
        digest = hashlib.sha256(frame).digest()
        if x in log.revealed:
            before, told = log.revealed[x]
            clash = [j for j in kinds if told.get(j, kinds[j]) != kinds[j]]
            if clash:
                raise PrivacyError(
                    f"the other secret of sites {clash} in exchange {x} was revealed before; both "
                    "would open their answers",
                    code="both_secrets",
                )
            if before != digest:
                raise SurvivorsChanged(
                    f"other survivors than before are named for exchange {x}: two sums would "
                    "differ by single sites",
                    code="survivors_changed",
                )
        else:
            named = {str(j): kind.decode() for j, kind in kinds.items()}
            self._note({"x": x, "survivors": digest.hex(), "kinds": named})
        shares = {
            j: (kind, self._held(state, j, x, kind))
            for j, kind in kinds.items()
            if j == self._index or j in state.shares
        }
        body = frames.Revealed(x=x, survivors=digest, shares=shares).pack()
        return body + self._identity.sign(frames.signed("revealed", self._roster, body))

    # --- checks -----------------------------------------------------------------------------------

    def _check_server(self, kind: str, signature: bytes, *parts: bytes) -> None:
        message = frames.signed(kind, self._roster, *parts)
        keys.check_signature(self._roster.server, signature, message, f"the server's {kind!r}")

    def _checked_offers(self, epoch: Epoch, frame: bytes) -> dict[int, frames.Offer]:
        found: dict[int, frames.Offer] = {}
        for offer, body, signature in frames.unpack_offers(frame):
            check_offer(self._roster, offer, body, signature)
            if _opening_of(offer) != _opening(epoch) or offer.site in found:
                raise PrivacyError(
                    f"the offer of site {offer.site} is of another epoch, or comes twice",
                    code="exchange_reused",
                )
            check_terms(offer, self._rules.plan_hash, self._rules.manifest_hash)
            found[offer.site] = offer
        if found.get(self._index) != self._offer(epoch):
            raise PrivacyError("this site's own offer is not among them", code="bad_signature")
        self._check_count(len(found), "offer")
        return found

    def _check_ask(self, state: _State, ask: frames.Ask, inner: Broadcast) -> None:
        if ask.plan_hash != self._rules.plan_hash:
            raise PolicyRefused("asked under another plan than was offered", code="plan_mismatch")
        if not set(ask.sites) <= set(state.offers) or self._index not in ask.sites:
            raise PrivacyError(
                "sites are asked that made no offer, or this one is not among them",
                code="unknown_site",
            )
        names = {self._roster.names[i] for i in ask.sites}
        if not names <= set(inner.cohort):
            raise PrivacyError(
                "the cohort of the question is not the one that masks", code="roster_mismatch"
            )
        self._check_count(len(ask.sites), "are asked")
        self._check_holders(state, ask.sites)
        check_grid(inner.grid, len(inner.cohort))
        for name, value in inner.tensors.items():
            known = self._rules.shapes.get(name)
            if known is not None and not _fits(value.shape, known):
                raise PolicyRefused(
                    f"{name} comes as {tuple(value.shape)}, the model's is {known}",
                    code="manifest_mismatch",
                )

    def _check_count(self, count: int, what: str) -> None:
        if count < self._rules.least:
            raise PolicyRefused(
                f"{count} sites {what}, this site wants {self._rules.least} at least; ask more",
                code="cohort_too_small",
            )

    def _check_holders(self, state: _State, sites: Sequence[int]) -> None:
        there = state.holders(self._index) & set(sites)
        if len(there) < state.threshold:
            raise PolicyRefused(
                f"{len(there)} holders of this site's shares are there, {state.threshold} are "
                "needed; wait for more sites",
                code="below_threshold",
            )

    # --- secrets ----------------------------------------------------------------------------------

    def _offer(self, epoch: Epoch) -> frames.Offer:
        return frames.Offer(
            run=self._roster.run,
            roster_hash=self._roster.hash,
            epoch=epoch.number,
            first=epoch.first,
            site=self._index,
            channel=keys.public_of(epoch.channel()),
            exchanges=tuple(
                keys.public_of(epoch.pair(x)) for x in range(epoch.first, epoch.first + epoch.count)
            ),
            plan_hash=self._rules.plan_hash,
            manifest_hash=self._rules.manifest_hash,
        )

    def _streams(
        self, state: _State, ask: frames.Ask, section: int
    ) -> tuple[list[bytes], list[bytes]]:
        """The stream keys that this site adds, and those that it subtracts."""
        epoch, x, i = state.epoch, ask.x, self._index
        plus: list[bytes] = [epoch.own(x)]
        minus: list[bytes] = []
        private = epoch.pair(x)
        for j in sorted(state.partners[i] & set(ask.sites)):
            public = state.offers[j].public(x)
            seed = keys.pair_seed(self._roster, private, public, epoch.number, x, i, j)
            (plus if j > i else minus).append(seed)

        def streams(seeds: Sequence[bytes]) -> list[bytes]:
            return [keys.stream_key(self._roster, s, epoch.number, x, section) for s in seeds]

        return streams(plus), streams(minus)

    def _held(self, state: _State, j: int, x: int, kind: bytes) -> bytes:
        """This site's share of a secret of site j, which may be itself."""
        epoch = state.epoch
        if j == self._index:
            return epoch.shares(x, kind, state.threshold, [j])[0]
        start = (x - epoch.first) * _SHARES_BYTES
        start += 0 if kind == keys.SELF else _SHARES_BYTES // 2
        return state.shares[j][start : start + _SHARES_BYTES // 2]

    # --- what is kept -----------------------------------------------------------------------------

    @property
    def _epoch_path(self) -> Path:
        return self._folder / "epoch.json"

    @property
    def _log_path(self) -> Path:
        return self._folder / "log.jsonl"

    def _current(self, *, offered: bool = False) -> _State:
        state = self._read()
        if state is None or (offered and not state.offers):
            raise PrivacyError(
                "this site has no open epoch, or has not seen its offers; open a new one",
                code=NO_EPOCH,
            )
        return state

    def _read(self) -> _State | None:
        if self._state is not None or not self._epoch_path.exists():
            return self._state
        try:
            kept = json.loads(self._epoch_path.read_bytes())
        except ValueError:  # cut off by a power failure: the epoch is lost, and with it its masks
            return None
        self._state = _State(
            epoch=Epoch(
                roster=self._roster,
                number=kept["number"],
                first=kept["first"],
                count=kept["count"],
                secret=bytes.fromhex(kept["secret"]),
            ),
            offers={
                int(i): frames.Offer.unpack(bytes.fromhex(body))
                for i, body in kept["offers"].items()
            },
            shares={int(i): bytes.fromhex(value) for i, value in kept["shares"].items()},
        )
        return self._state

    def _write(self, state: _State, *, durable: bool = False) -> None:
        epoch = state.epoch
        kept = {
            "number": epoch.number,
            "first": epoch.first,
            "count": epoch.count,
            "secret": epoch.secret.hex(),
            "offers": {i: offer.pack().hex() for i, offer in state.offers.items()},
            "shares": {i: value.hex() for i, value in state.shares.items()},
        }
        write_private(self._epoch_path, json.dumps(kept).encode(), durable=durable)
        self._state = state

    def _kept_answer(self, state: _State, x: int, digest: bytes) -> Path:
        """Where the answer to this ask is kept; raises PrivacyError for an x that is used."""
        if not state.epoch.first <= x < state.epoch.first + state.epoch.count:
            raise PrivacyError(f"exchange {x} is not of this epoch", code=NO_EPOCH)
        path = self._folder / f"answer-{x}-{digest.hex()}"
        last = max(self._log().answered, default=-1)
        if not path.exists() and (x <= last or any(self._folder.glob(f"answer-{x}-*"))):
            raise PrivacyError(
                f"exchange {x} or a later one was answered, to another question; a mask is used "
                "once",
                code="exchange_reused",
            )
        return path

    def _keep(self, path: Path, answer: bytes) -> None:
        for old in self._folder.glob("answer-*"):
            old.unlink()
        write_private(path, answer, durable=False)

    def _note_answer(self, ask: frames.Ask, frame: bytes, *, absent: int | None = None) -> None:
        if ask.x not in self._log().answered:
            digest = hashlib.sha256(frame).hexdigest()
            self._note({"x": ask.x, "asked": digest, "sites": ask.sites, "absent": absent})

    def _note(self, line: Mapping[str, object]) -> None:
        """Append to the log and flush it to the disk: only then may anything be sent."""
        flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND
        descriptor = os.open(self._log_path, flags, 0o600)
        with os.fdopen(descriptor, "ab") as file:
            file.write(json.dumps(line).encode() + b"\n")
            file.flush()
            os.fsync(file.fileno())
        self._noted = None

    def _forget_log(self) -> None:
        for path in (self._log_path, *self._folder.glob("answer-*")):
            path.unlink(missing_ok=True)
        self._noted = None

    def _log(self) -> "_Log":
        if self._noted is None:
            self._noted = _Log(answered={}, revealed={})
            content = self._log_path.read_bytes() if self._log_path.exists() else b""
            whole = content[: content.rfind(b"\n") + 1]
            if len(whole) < len(content):
                # Killed while it wrote: nothing was sent for this line.
                os.truncate(self._log_path, len(whole))
            for line in whole.splitlines():
                entry = json.loads(line)
                if "sites" in entry:
                    answered = _Answered(sites=tuple(entry["sites"]), absent=entry["absent"])
                    self._noted.answered[entry["x"]] = answered
                else:
                    kinds = {int(j): kind.encode() for j, kind in entry["kinds"].items()}
                    told = (bytes.fromhex(entry["survivors"]), kinds)
                    self._noted.revealed[entry["x"]] = told
        return self._noted

    def _packed(self, message: bytes, words: Weights) -> bytes:
        question = wire.question(message)
        return wire.pack_reply(Reply(client=self.name, question=question, words=words, word=8))


@dataclass(frozen=True, slots=True)
class _Answered:
    sites: tuple[int, ...]
    absent: int | None


@dataclass(frozen=True, slots=True)
class _Log:
    answered: dict[int, _Answered]
    revealed: dict[int, tuple[bytes, dict[int, bytes]]]


# --- shared with the server -----------------------------------------------------------------------


def check_offer(roster: Roster, offer: frames.Offer, body: bytes, signature: bytes) -> None:
    """Raises PrivacyError unless a pinned site signed this offer for this run and roster."""
    public = roster.key(offer.site)
    keys.check_signature(public, signature, body, f"the offer of site {offer.site}")
    if (offer.run, offer.roster_hash) != (roster.run, roster.hash):
        raise PrivacyError(
            f"site {offer.site} takes part in another run or pins another roster",
            code="roster_mismatch",
        )


def check_terms(offer: frames.Offer, plan_hash: bytes, manifest_hash: bytes) -> None:
    """Raises PolicyRefused if a site works under another plan or on another model."""
    if offer.plan_hash != plan_hash:
        raise PolicyRefused(f"site {offer.site} has another plan", code="plan_mismatch")
    if offer.manifest_hash != manifest_hash:
        raise PolicyRefused(f"site {offer.site} has another model", code="manifest_mismatch")


def check_grid(grid: Grid, num_sites: int) -> None:
    """Raises GridOverflow if addends of ``bits`` bits could leave the word: masks wrap silently.

    Where ``bits`` fill the word, an addend may take its share of it (see wire), and where the sum
    is ``bounded`` it is known to fit.
    """
    if (
        not grid.bounded
        and grid.bits < grid.word
        and num_sites << (grid.bits - 1) > 1 << (grid.word - 1)
    ):
        raise GridOverflow(
            f"{num_sites} addends of {grid.bits} bits can leave a word of {grid.word}; use a "
            "larger word or fewer bits",
            code="grid_overflow",
        )


def is_side(name: str) -> bool:
    """Whether a value is summed in Z_2^64, beside the payload: the weight and metrics."""
    return name == wire.WEIGHT or name.startswith(wire.METRIC)


def flattened(words: Weights, grid: Grid) -> tuple[frames.Shapes, masks.Words, masks.Words]:
    """Integer words as the shapes by name, the payload in the grid's ring, the side in Z_2^64."""
    order = sorted(words)
    shapes = tuple((name, tuple(words[name].shape)) for name in order)
    parts: list[masks.Words] = []
    for kind, side in ((masks.MEMORY[grid.word], False), (np.uint64, True)):
        names = [name for name in order if is_side(name) == side]
        flat = np.empty(sum(words[name].numel() for name in names), dtype=kind)
        signed, start = masks.signed(flat, 8 * flat.itemsize), 0
        for name in names:
            values = words[name].reshape(-1).numpy()
            signed[start : start + len(values)] = values
            start += len(values)
        parts.append(flat)
    return shapes, parts[0], parts[1]


def as_tensor(content: bytes) -> Tensor:
    return torch.frombuffer(bytearray(content), dtype=torch.uint8)


def _bytes(asked: Broadcast, name: str) -> bytes:
    value = asked.tensors.get(name)
    if value is None or value.dtype != torch.uint8 or value.dim() != 1:
        raise WireError(f"{asked.step} comes without {name}; drop the message")
    return value.numpy().tobytes()


def _opening(epoch: Epoch) -> frames.Opening:
    return frames.Opening(epoch=epoch.number, first=epoch.first, count=epoch.count)


def _opening_of(offer: frames.Offer) -> frames.Opening:
    return frames.Opening(epoch=offer.epoch, first=offer.first, count=len(offer.exchanges))


def _absent(inner: Broadcast) -> int | None:
    """How many sites may be missing, where noise inside the sum was sized for that."""
    named = [guard["absent"] for guard in inner.guards if "absent" in guard]
    return min((one for one in named if isinstance(one, int)), default=None)


def _fits(shape: Sequence[int], known: Sequence[int | None]) -> bool:
    return len(shape) == len(known) and all(
        want in (None, have) for have, want in zip(shape, known, strict=True)
    )
