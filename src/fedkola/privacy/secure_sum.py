"""MaskedSum v1, the server half: sums over a cohort of which no single addend can be read.

Double masking (Bonawitz et al., CCS 2017) on the sparse graph of Bell et al. (CCS 2020), with
authenticated keys, fresh key pairs per exchange, and everything at a site derived from one epoch
secret. A site sends y = q + PRG(b) + sum of +-PRG(s) over its neighbours, integers mod 2^word; of a
site that answered, the shares of b are revealed, of one that did not, those of its exchange key,
never both. What is left is the sum over the survivors, and the bits of the plain sum.

An epoch belongs to the sites that were asked for an offer: another cohort, or a site of the cohort
without one, opens the next. Below the threshold nothing is decoded.
"""

import hashlib
import json
import logging
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from torch import Tensor

from fedkola import wire
from fedkola.errors import CohortTooSmall, FedKolaError, PrivacyError, UpdateHidden, WireError
from fedkola.files import write_private
from fedkola.privacy import frames, keys, masks, member, shamir
from fedkola.privacy.graph import choose_graph, neighbours
from fedkola.privacy.keys import Roster
from fedkola.privacy.member import (
    ASK,
    FOLDER,
    IDENTITY,
    NO_EPOCH,
    OPEN,
    RELAY,
    REVEAL,
    SHARE,
    Member,
    Rules,
)
from fedkola.types import Aggregate, Broadcast, Cohort, Engine, Grid, Reply, Spec, Tally, Update

logger = logging.getLogger(__name__)

EXCHANGES = 64
"""Exchanges of an epoch, whose keys are prepared together."""

_PROTOCOL: Spec = {"name": "MaskedSum"}


@dataclass(frozen=True, slots=True, kw_only=True)
class _Epoch:
    """An open epoch: its offers by site, who also shared and holds shares, the next exchange."""

    opening: frames.Opening
    cohort: Cohort
    offers: Mapping[int, frames.Offer]
    ready: tuple[int, ...]
    x: int

    @property
    def threshold(self) -> int:
        return choose_graph(len(self.offers))[1]

    def partners(self, roster: Roster) -> dict[int, frozenset[int]]:
        k, _ = choose_graph(len(self.offers))
        return neighbours(roster.hash, sorted(self.offers), k)


@dataclass(slots=True)
class _Sum:
    """Masked answers of one shape, added up as they come."""

    payload: masks.Words
    side: masks.Words
    sites: list[int]


class _EpochOver(CohortTooSmall):
    """No site that was asked has the epoch any more."""

    def __init__(self, sites: set[str]) -> None:
        super().__init__(
            f"none of {', '.join(sorted(sites))} has the epoch that was just opened; see their logs"
        )
        self.sites = sites


class SecureSum:
    """Clients over an engine, by whose replies the messages of the protocol travel."""

    def __init__(
        self,
        inner: Engine,
        *,
        roster: Roster,
        key: Ed25519PrivateKey,
        folder: Path,
        rules: Rules,
        exchanges: int = EXCHANGES,
    ) -> None:
        """``key`` is the server's, ``folder`` holds its count of epochs and exchanges."""
        self._inner = inner
        self._roster = roster
        self._key = key
        self._counter = folder / "counter.json"
        self._rules = rules
        self._exchanges = exchanges
        self._epoch: _Epoch | None = None
        self._refused: dict[str, str] = {}
        self._reopened: set[str] = set()

    def roster(self) -> Cohort:
        return self._inner.roster()

    def each(self, cohort: Cohort, broadcast: Broadcast) -> Iterator[Update]:
        raise UpdateHidden(
            f"{broadcast.algorithm.get('name')} asks for single answers at {broadcast.step!r}; "
            "under secure aggregation only sums exist; choose an algorithm that needs sums"
        )

    def tally(self) -> Tally:
        """Traffic and refusals of all messages of the protocol since the last call."""
        found = self._inner.tally()
        over = {name: code for name, code in found.refused.items() if code != NO_EPOCH}
        left = dict.fromkeys(found.refused.keys() - over.keys() - self._reopened, NO_EPOCH)
        refused = {**over, **left, **self._refused}
        self._refused, self._reopened = {}, set()
        return replace(found, refused=refused)

    def sum(self, cohort: Cohort, broadcast: Broadcast) -> Aggregate:
        """The sum over the sites of the cohort that answered.

        Raises CohortTooSmall if too few sites offered, answered or revealed, with nothing decoded;
        GridOverflow if the grid cannot hold the sum; PrivacyError for shares that contradict.
        """
        self._demand(len(cohort), "asked")
        member.check_grid(broadcast.grid, len(cohort))
        try:
            epoch, ask, shapes, found = self._asked(cohort, broadcast)
        except _EpochOver as error:
            # Sites end an epoch with the run; what is asked afterwards, as a removal, opens one.
            self._reopened |= error.sites
            epoch, ask, shapes, found = self._asked(cohort, broadcast)
        survivors = sorted(found.sites)
        self._check_survivors(epoch, ask.sites, survivors)
        self._unmask(epoch, ask, found, self._reveal(epoch, ask, survivors, broadcast))
        answered = {self._roster.names[i] for i in survivors}
        return Aggregate(
            cohort=tuple(name for name in cohort if name in answered),
            words=_shaped(shapes, found, broadcast.grid),
            grid=broadcast.grid,
        )

    # --- an epoch ---------------------------------------------------------------------------------

    def _ready(self, cohort: Cohort, broadcast: Broadcast) -> _Epoch:
        """The epoch with a free exchange in which every site of this cohort can be asked; the next
        one if there is none, for those of the cohort that are there."""
        epoch, wanted = self._epoch, sorted(map(self._roster.index, cohort))
        if (
            epoch is None
            or list(epoch.ready) != wanted
            or epoch.x >= epoch.opening.first + epoch.opening.count
        ):
            self._epoch = None
            epoch = self._opened(cohort, broadcast)
        self._demand(len(epoch.ready), "offered keys", epoch.threshold)
        return epoch

    def _opened(self, cohort: Cohort, broadcast: Broadcast) -> _Epoch:
        opening = self._next_opening()
        signed = self._offers(opening, cohort, broadcast)
        self._demand(len(signed), "offered keys")
        offers = {i: offer for i, (offer, _) in signed.items()}
        epoch = _Epoch(opening=opening, cohort=cohort, offers=offers, ready=(), x=opening.first)
        names = tuple(self._roster.names[i] for i in sorted(offers))
        frame = frames.pack_offers({i: whole for i, (_, whole) in signed.items()})
        sealed: dict[int, dict[int, bytes]] = {}
        for i, answer in self._exchange(SHARE, names, broadcast, frame=frame):
            with self._refusing(i):
                sealed[i] = frames.unpack_sealed(answer, opening.count)
        ready = []
        for j in sorted(sealed):
            mine = frames.pack_sealed({i: sealed[i][j] for i in sealed if j in sealed[i]})
            one = (self._roster.names[j],)
            ready += [i for i, _ in self._exchange(RELAY, one, broadcast, frame=mine)]
        return replace(epoch, ready=tuple(ready))

    def _offers(
        self, opening: frames.Opening, cohort: Cohort, broadcast: Broadcast
    ) -> dict[int, tuple[frames.Offer, bytes]]:
        """Offers that every site will accept, and their signed bytes."""
        found: dict[int, tuple[frames.Offer, bytes]] = {}
        frame = opening.pack()
        replies = self._exchange(
            OPEN, cohort, broadcast, frame=frame, signature=self._sign("open", frame)
        )
        for i, whole in replies:
            with self._refusing(i):
                body, signature = whole[: -keys.SIGNATURE_BYTES], whole[-keys.SIGNATURE_BYTES :]
                offer = frames.Offer.unpack(body)
                member.check_offer(self._roster, offer, body, signature)
                member.check_terms(offer, self._rules.plan_hash, self._rules.manifest_hash)
                of = (offer.site, offer.epoch, offer.first, len(offer.exchanges))
                if of != (i, opening.epoch, opening.first, opening.count):
                    raise WireError("an offer of another site or epoch; not taken")
                found[i] = (offer, whole)
        return found

    def _next_opening(self) -> frames.Opening:
        """Numbers are written down before they are used, so that none is used again."""
        kept = {"epoch": 0, "first": 0}
        if self._counter.exists():
            kept = json.loads(self._counter.read_text(encoding="ascii"))
        opening = frames.Opening(epoch=kept["epoch"], first=kept["first"], count=self._exchanges)
        after = {"epoch": opening.epoch + 1, "first": opening.first + opening.count}
        write_private(self._counter, json.dumps(after).encode())
        return opening

    # --- an exchange ------------------------------------------------------------------------------

    def _asked(
        self, cohort: Cohort, broadcast: Broadcast
    ) -> "tuple[_Epoch, _Asked, frames.Shapes, _Sum]":
        """One exchange up to the masked sum of the answers."""
        epoch = self._ready(cohort, broadcast)
        self._epoch = replace(epoch, x=epoch.x + 1)
        ask = self._ask(epoch, broadcast)
        return epoch, ask, *self._answers(epoch, ask, broadcast)

    def _ask(self, epoch: _Epoch, broadcast: Broadcast) -> "_Asked":
        question = wire.pack_broadcast(broadcast)
        ask = frames.Ask(
            x=epoch.x,
            sites=epoch.ready,
            plan_hash=self._rules.plan_hash,
            question=hashlib.sha256(question).digest(),
        )
        return _Asked(x=epoch.x, sites=epoch.ready, frame=ask.pack(), question=question)

    def _answers(
        self, epoch: _Epoch, ask: "_Asked", broadcast: Broadcast
    ) -> tuple[frames.Shapes, _Sum]:
        """The masked sum of the answers that have the shapes of most."""
        names = tuple(self._roster.names[i] for i in ask.sites)
        signature = self._sign("ask", frames.offers_hash(epoch.offers), ask.frame)
        asked = _message(
            ASK, broadcast, names, frame=ask.frame, signature=signature, question=ask.question
        )
        asked = replace(asked, grid=_grid("frame", "payload", "side"))
        sums: dict[frames.Shapes, _Sum] = {}
        ended: set[str] = set()
        for reply in self._inner.replies(names, asked):
            if reply.refused:
                ended |= {reply.client} if reply.refused == NO_EPOCH else set()
                continue
            index = self._roster.index(reply.client)
            with self._refusing(index):
                shapes, payload, side = _read(reply, ask, broadcast.grid)
                if shapes not in sums:
                    sums[shapes] = _Sum(payload=payload.copy(), side=side.copy(), sites=[index])
                else:
                    one = sums[shapes]
                    np.add(one.payload, payload, out=one.payload)
                    np.add(one.side, side, out=one.side)
                    one.sites.append(index)
        if ended:
            self._epoch = None
        if ended == set(names):
            raise _EpochOver(ended)
        if not sums:
            raise CohortTooSmall(
                f"none of the {len(names)} sites asked answered; look at the refusals of this round"
            )
        ranked = sorted(sums.items(), key=lambda found: -len(found[1].sites))
        if len(ranked) > 1 and len(ranked[1][1].sites) == len(ranked[0][1].sites):
            raise WireError(
                "sites answered in different shapes and none of them are those of most; nothing "
                "is decoded"
            )
        for _, odd in ranked[1:]:
            for index in odd.sites:
                self._refused.setdefault(self._roster.names[index], "WireError")
        return ranked[0]

    def _check_survivors(
        self, epoch: _Epoch, asked: Sequence[int], survivors: Sequence[int]
    ) -> None:
        """Before any secret is asked for: every one that is needed has enough holders."""
        self._demand(len(survivors), "answered")
        partners = epoch.partners(self._roster)
        there = set(survivors)
        for j in asked:
            held = len(member.holders(partners, j) & there)
            if held < epoch.threshold and (j in there or partners[j] & there):
                raise CohortTooSmall(
                    f"{held} of the sites that hold shares of {self._roster.names[j]} answered, "
                    f"{epoch.threshold} are needed; nothing is decoded, repeat the round when more "
                    "sites are there"
                )

    def _reveal(
        self, epoch: _Epoch, ask: "_Asked", survivors: Sequence[int], broadcast: Broadcast
    ) -> dict[int, bytes]:
        """The secret of every site asked: b of survivors, the exchange key of those lost."""
        frame = frames.pack_sites(ask.x, survivors)
        digest, there = hashlib.sha256(frame).digest(), set(survivors)
        partners = epoch.partners(self._roster)
        held: dict[int, dict[int, bytes]] = {
            j: {} for j in ask.sites if j in there or partners[j] & there
        }
        names = tuple(self._roster.names[i] for i in survivors)
        signature = self._sign("survivors", frame)
        for i, whole in self._exchange(REVEAL, names, broadcast, frame=frame, signature=signature):
            with self._refusing(i):
                for j, share in self._checked(i, whole, ask.x, digest, there).items():
                    if j in held and i in member.holders(partners, j):
                        held[j][i] = share
        secrets = {}
        for j, shares in held.items():
            if len(shares) < epoch.threshold:
                raise CohortTooSmall(
                    f"{len(shares)} sites revealed their share of a secret of "
                    f"{self._roster.names[j]}, {epoch.threshold} are needed; nothing is decoded, "
                    "repeat the round when more sites are there"
                )
            secret = shamir.joined(shares, epoch.threshold)
            if secret >= 1 << (8 * keys.KEY_BYTES):
                raise PrivacyError("shares that join to no key", code="bad_share")
            secrets[j] = secret.to_bytes(keys.KEY_BYTES, "big")
            if j not in there and keys.public_of(secrets[j]) != epoch.offers[j].public(ask.x):
                raise PrivacyError("shares that join to another key", code="bad_share")
        return secrets

    def _checked(
        self, i: int, whole: bytes, x: int, digest: bytes, there: set[int]
    ) -> dict[int, bytes]:
        """The shares that site i returned; raises PrivacyError if they are not for this."""
        body, signature = whole[: -keys.SIGNATURE_BYTES], whole[-keys.SIGNATURE_BYTES :]
        message = frames.signed("revealed", self._roster, body)
        keys.check_signature(self._roster.key(i), signature, message, f"what site {i} revealed")
        found = frames.Revealed.unpack(body)
        right = all(
            kind == (keys.SELF if j in there else keys.PAIR)
            for j, (kind, _) in found.shares.items()
        )
        if (found.x, found.survivors) != (x, digest) or not right:
            raise PrivacyError(
                f"site {i} returned shares of another exchange, other survivors or another kind",
                code="bad_share",
            )
        return {j: share for j, (_, share) in found.shares.items()}

    def _unmask(
        self, epoch: _Epoch, ask: "_Asked", found: _Sum, secrets: Mapping[int, bytes]
    ) -> None:
        """Take the masks that do not cancel out of a sum, in place."""
        partners, there, number = (
            epoch.partners(self._roster),
            set(found.sites),
            epoch.opening.epoch,
        )
        plus: list[bytes] = []
        minus = [secrets[i] for i in found.sites]
        for j in sorted(set(ask.sites) - there):
            for i in sorted(partners[j] & there):
                public = epoch.offers[i].public(ask.x)
                seed = keys.pair_seed(self._roster, secrets[j], public, number, ask.x, i, j)
                (minus if j > i else plus).append(seed)
        for section, part in enumerate((found.payload, found.side)):
            streams = [
                [keys.stream_key(self._roster, seed, number, ask.x, section) for seed in seeds]
                for seeds in (plus, minus)
            ]
            masks.add_streams(part, plus=streams[0], minus=streams[1])

    # --- messages ---------------------------------------------------------------------------------

    def _exchange(
        self, step: str, names: Cohort, broadcast: Broadcast, **parts: bytes
    ) -> Iterator[tuple[int, bytes]]:
        """One message to these sites: index and frame of every answer."""
        for reply in self._inner.replies(names, _message(step, broadcast, names, **parts)):
            if not reply.refused:
                yield self._roster.index(reply.client), reply.words["frame"].numpy().tobytes()

    def _sign(self, kind: str, *parts: bytes) -> bytes:
        return self._key.sign(frames.signed(kind, self._roster, *parts))

    def _refusing(self, index: int) -> "_Refusing":
        return _Refusing(self._refused, self._roster.names[index])

    def _demand(self, count: int, what: str, least: int = 0) -> None:
        least = max(least, self._rules.least)
        if count < least:
            raise CohortTooSmall(
                f"{count} sites {what}, secure aggregation needs {least}; nothing is decoded, wait "
                "for more sites and resume"
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class _Asked:
    x: int
    sites: tuple[int, ...]
    frame: bytes
    question: bytes


class _Refusing:
    """What goes wrong with one site's answer is a refusal of that site, never of the round."""

    def __init__(self, refused: dict[str, str], name: str) -> None:
        self._refused = refused
        self._name = name

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> bool:
        if isinstance(error, FedKolaError):
            logger.warning("site %s: %s: %s", self._name, type(error).__name__, error)
            self._refused[self._name] = error.code or type(error).__name__
            return True
        return False


@dataclass(frozen=True, slots=True, kw_only=True)
class Enrolled:
    """A run whose sites lie on one machine: roster, rules, and the server's key and folder."""

    roster: Roster
    rules: Rules
    key: Ed25519PrivateKey
    folder: Path

    def member(self, name: str, store: Path) -> Member:
        """The half of one site, which keeps its secrets below ``store``."""
        return Member(name, store, self.roster, self.rules)

    def over(self, engine: Engine, *, exchanges: int = EXCHANGES) -> SecureSum:
        """The half of the server; an epoch prepares the keys of so many exchanges."""
        return SecureSum(
            engine,
            roster=self.roster,
            key=self.key,
            folder=self.folder,
            rules=self.rules,
            exchanges=exchanges,
        )


def enrol(folder: Path, stores: Mapping[str, Path], rules: Rules) -> Enrolled:
    """Make identities and the name of the run, at the first call; they are kept.

    Sites of other machines exchange their public keys by hand instead.
    """
    key = keys.identity(folder / "server.key")
    run = folder / "run.id"
    if not run.exists():
        write_private(run, os.urandom(16))
    own = {name: keys.identity(store / FOLDER / IDENTITY) for name, store in stores.items()}
    sites = [(name, one.public_key().public_bytes_raw()) for name, one in own.items()]
    roster = keys.roster(run.read_bytes(), key.public_key().public_bytes_raw(), sites)
    return Enrolled(roster=roster, rules=rules, key=key, folder=folder)


def _grid(*names: str) -> Grid:
    return Grid(word=8, bits=8, scale=dict.fromkeys(names, 0))


def _message(step: str, broadcast: Broadcast, names: Cohort, **parts: bytes) -> Broadcast:
    return Broadcast(
        run=broadcast.run,
        round=broadcast.round,
        step=step,
        cohort=names,
        tensors={name: member.as_tensor(content) for name, content in parts.items()},
        grid=_grid("frame"),
        algorithm=_PROTOCOL,
    )


def _read(reply: Reply, ask: _Asked, grid: Grid) -> tuple[frames.Shapes, masks.Words, masks.Words]:
    """Shapes, payload and side of a masked answer; raises WireError if they do not fit."""
    x, asked, shapes = frames.unpack_answer(reply.words["frame"].numpy().tobytes())
    if x != ask.x or asked != hashlib.sha256(ask.frame).digest():
        raise WireError("a masked answer to another question; not summed")
    if {name for name, _ in shapes} != set(grid.scale):
        raise WireError("a masked answer with other names than asked; not summed")
    found = []
    for name, word, side in (("payload", grid.word, False), ("side", 64, True)):
        content = np.ascontiguousarray(reply.words[name].numpy().reshape(-1))
        sizes = [int(np.prod(shape)) for one, shape in shapes if member.is_side(one) == side]
        if len(content) != sum(sizes) * word // 8:
            raise WireError(f"{len(content)} bytes of {name} do not fit its shapes; not summed")
        found.append(masks.from_bytes(content, word))
    return shapes, found[0], found[1]


def _shaped(shapes: frames.Shapes, found: _Sum, grid: Grid) -> dict[str, Tensor]:
    """The unmasked sum by name, in the type that a plain sum has."""
    wide = np.int32 if grid.word <= 32 else np.int64
    parts = {
        False: masks.signed(found.payload, grid.word),
        True: masks.signed(found.side, 64),
    }
    start = {False: 0, True: 0}
    words = {}
    for name, shape in shapes:
        side = member.is_side(name)
        size = int(np.prod(shape))
        values = parts[side][start[side] : start[side] + size].astype(wide)
        words[name] = torch.from_numpy(values).reshape(shape)
        start[side] += size
    return words
