"""What one observer saw of a recorded run, frame by frame, and the changes it can read from that.

- ``wire``: every message on an open network; the protocol gives the server no secret, so this is
  what the server sees.
- ``server``: the same.
- ``site:NAME``: what this site was asked and what it answered. Consecutive broadcasts differ by
  what the round added, so it can read sums of the others.
- ``coalition:A,B``: the server and these sites, which take their own part out of every sum.
- ``model``: the last weights alone.

Under secure aggregation a single answer is uniform words. It is decoded as the attacker would
decode it, so that attacks on it are measured and not assumed to fail.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from fedkola import wire
from fedkola.audit.evidence import Sequences, Sighting, Truth
from fedkola.audit.transcript import Frame, Recording
from fedkola.errors import UnknownName
from fedkola.privacy import behind, frames, masks, member
from fedkola.privacy.member import ASK, OPEN, RELAY, REVEAL, SHARE
from fedkola.types import Aggregate, Broadcast, Grid, Reply, Scalar, Weights

Kind = Literal["wire", "server", "site", "coalition", "model"]
KINDS: tuple[Kind, ...] = ("wire", "server", "site", "coalition", "model")

# Algorithms whose answer is how far weights went down, not up.
DESCENDING = frozenset({"DiLoCo"})
_SETUP = frozenset({OPEN, SHARE, RELAY, REVEAL})
SUM, OTHERS, MODEL = "sum", "others", "model"


@dataclass(frozen=True, slots=True, kw_only=True)
class Observer:
    """Who looks; ``sites`` are those it holds the secrets of."""

    kind: Kind
    sites: tuple[str, ...] = ()

    def __str__(self) -> str:
        return f"{self.kind}:{','.join(self.sites)}" if self.sites else self.kind


@dataclass(frozen=True, slots=True, kw_only=True)
class View:
    """The frames that an observer saw, the private folders it can read, and the last weights where
    it has them."""

    observer: Observer
    recording: Recording
    frames: tuple[Frame, ...]
    secrets: Mapping[str, Path]
    final: Weights


def observer(text: str, roster: Sequence[str]) -> Observer:
    """The observer that a text names; raises UnknownName for a kind or a site that is not there."""
    kind, _, names = text.partition(":")
    sites = tuple(name.strip() for name in names.split(",") if name.strip())
    wants = {"site": 1, "coalition": 2}.get(kind, 0)
    found = next((known for known in KINDS if known == kind), None)
    if found is None:
        raise UnknownName(
            f"observer {text!r} was given; expected wire, server, site:NAME, coalition:A,B or model"
        )
    if (wants == 0) != (not sites) or (wants == 1 and len(sites) != 1):
        expected = {"site": "one site, as site:NAME", "coalition": "sites, as coalition:A,B"}
        raise UnknownName(
            f"observer {text!r} was given; {kind} takes {expected.get(kind, 'no names')}"
        )
    absent = [name for name in sites if name not in roster]
    if absent:
        raise UnknownName(
            f"observer {text!r}: there is no site {absent[0]!r} in this run; it has "
            f"{', '.join(sorted(roster))}"
        )
    return Observer(kind=found, sites=tuple(dict.fromkeys(sites)))


def view(
    recording: Recording, observer: Observer, *, stores: Mapping[str, Path], final: Weights
) -> View:
    """Exactly the frames and secrets of an observer; ``stores`` are the private folders of sites
    that lie on this machine."""
    whole = observer.kind in ("wire", "server", "coalition")
    return View(
        observer=observer,
        recording=recording,
        frames=tuple(
            frame
            for frame in recording.frames
            if whole or (frame.at == "wire" and frame.peer in observer.sites)
        ),
        secrets={name: stores[name] for name in observer.sites if name in stores},
        final=final,
    )


def sightings(seen: View) -> tuple[Sighting, ...]:
    """Every change that the observer can read, of rounds whose payloads were kept.

    Of a round with several exchanges the first counts. Single answers carry the site's name, sums
    "sum", and what is left of a sum without the observer's own part "others".
    """
    if seen.observer.kind == "model":
        return (
            Sighting(
                round=0,
                who=MODEL,
                sites=0,
                before=seen.final,
                change={},
                protocol=_protocol(seen),
            ),
        )
    if seen.observer.kind == "site":
        return tuple(_read_by_site(seen))
    return tuple(_read_by_server(seen))


def truth(stores: Mapping[str, Path], seen: Sequence[Sighting], sites: Sequence[str]) -> Truth:
    """The token ids behind each sighting, from the journals of the sites that lie here.

    A sum has those of all sites, what others did has those of all but the observer's.
    """
    journals = {name: behind.read(stores[name]) for name in sites if name in stores}
    found: dict[tuple[int, str], Sequences] = {}
    for one in seen:
        own = {name: _sequences(entries, one) for name, entries in journals.items()}
        if one.who in own:
            found[one.round, one.who] = own[one.who]
        else:
            found[one.round, one.who] = tuple(row for rows in own.values() for row in rows)
    return found


def masked(reply: Reply, grid: Grid) -> dict[str, Tensor]:
    """The words of one masked answer by name, as if they were no mask: uniform, for who lacks the
    keys."""
    _, _, shapes = frames.unpack_answer(_bytes(reply.words["frame"]))
    found = {}
    for part, word, side in (("payload", grid.word, False), ("side", 64, True)):
        content = reply.words[part].reshape(-1).contiguous().numpy()
        values = torch.from_numpy(masks.signed(masks.from_bytes(content, word), word).copy())
        mine = [(name, shape) for name, shape in shapes if member.is_side(name) == side]
        sizes = [math.prod(shape) for _, shape in mine]
        for (name, shape), value in zip(mine, torch.split(values, sizes), strict=True):
            found[name] = value.reshape(shape)
    return found


# --- private --------------------------------------------------------------------------------------


def _read_by_server(seen: View) -> Iterator[Sighting]:
    done: set[tuple[int, str]] = set()
    for asked, answers in _exchanges(seen):
        for frame in answers:
            if frame.refused or frame.peer in seen.observer.sites:
                continue
            own = _own(seen, asked) if frame.peer == SUM else {}
            who = OTHERS if own else frame.peer
            change, left = _change(seen, asked, frame, own)
            if not change or (asked.round, who) in done or left < 1:
                continue
            done.add((asked.round, who))
            yield Sighting(
                round=asked.round,
                who=who,
                sites=left,
                before=asked.tensors,
                change=change,
                protocol=_spec(asked),
            )


def _read_by_site(seen: View) -> Iterator[Sighting]:
    """Consecutive broadcasts, and the last weights after the last of them."""
    asked: dict[int, Broadcast] = {}
    for broadcast, _ in _exchanges(seen):
        asked.setdefault(broadcast.round, broadcast)
    last = max((frame.round for frame in seen.frames), default=0)
    for number, before in asked.items():
        after = seen.final if number == last else None
        if number + 1 in asked:
            after = asked[number + 1].tensors
        if after is None:
            continue
        names = [n for n, v in before.tensors.items() if n in after and v.is_floating_point()]
        moved = {name: after[name].float() - before.tensors[name].float() for name in names}
        own, others = _own(seen, before), len(before.cohort) - 1
        averaged = before.algorithm.get("outer", "average") == "average"
        if own and others > 0 and averaged:
            # The mean over all, times how many they are, less the own part, over the rest.
            part = _real(before, next(iter(own.values())))
            moved = {
                name: (value * (others + 1) - part.get(name, torch.zeros(()))) / others
                for name, value in moved.items()
            }
        if any(bool(value.any()) for value in moved.values()):
            yield Sighting(
                round=number,
                who=OTHERS if own else SUM,
                sites=others if own else len(before.cohort),
                before=before.tensors,
                change=moved,
                protocol=_spec(before),
            )


def _exchanges(seen: View) -> Iterator[tuple[Broadcast, list[Frame]]]:
    """Every question whose bytes were kept, with its kept answers, in the order asked."""
    down: dict[tuple[str, str], Frame] = {}
    up: dict[tuple[str, str], dict[str, Frame]] = {}
    for frame in seen.frames:
        if frame.step in _SETUP:
            continue
        key = (frame.at, frame.question)
        if frame.direction == "down":
            down.setdefault(key, frame)
        elif seen.recording.holds(frame):
            # A round that was asked again after a crash got the same answers again.
            up.setdefault(key, {})[frame.peer] = frame
    for key, frame in down.items():
        if seen.recording.holds(frame):
            broadcast = wire.unpack_broadcast(seen.recording.payload(frame))
            if frame.step == ASK:
                broadcast = wire.unpack_broadcast(_bytes(broadcast.tensors["question"]))
            yield broadcast, list(up.get(key, {}).values())


def _change(
    seen: View, asked: Broadcast, frame: Frame, own: Mapping[str, Weights]
) -> tuple[dict[str, Tensor], int]:
    """How far the weights moved by this answer, and how many sites it stands for."""
    reply = wire.unpack_reply(seen.recording.payload(frame))
    words = masked(reply, asked.grid) if frame.step == ASK else reply.words
    parts = [part for name, part in own.items() if name in frame.sites]
    for part in parts:
        words = {name: value - part[name] for name, value in words.items()}
    return _real(asked, words), len(frame.sites) - len(parts)


def _real(asked: Broadcast, words: Weights) -> dict[str, Tensor]:
    """Words as an attacker reads them: the mean over the weight that stands beside them."""
    names = [
        name
        for name, value in asked.tensors.items()
        if name in words and value.is_floating_point() and words[name].shape == value.shape
    ]
    if not names or not set(words) <= set(asked.grid.scale):
        return {}
    reals = wire.reals(Aggregate(cohort=asked.cohort, words=words, grid=asked.grid))
    weight = float(reals[wire.WEIGHT]) if wire.WEIGHT in reals else 1.0
    sign = -1.0 if asked.algorithm.get("name") in DESCENDING else 1.0
    return {name: (sign * reals[name] / (weight or 1.0)).float() for name in names}


def _bytes(tensor: Tensor) -> bytes:
    return tensor.contiguous().numpy().tobytes()


def _own(seen: View, asked: Broadcast) -> dict[str, Weights]:
    """What the observer's own sites added to this exchange, from their journals."""
    found = {}
    for name, store in seen.secrets.items():
        for entry in behind.read(store):
            if entry.round == asked.round and entry.step == asked.step and name not in found:
                found[name] = entry.words
    return found


def _spec(asked: Broadcast) -> dict[str, Scalar]:
    """The protocol that everybody knows: the algorithm and, under its own names, its noise."""
    noise = [guard for guard in asked.guards if guard.get("name") == "record_dp"]
    merged = {key: value for guard in noise for key, value in guard.items() if key != "name"}
    return {**asked.algorithm, **merged}


def _protocol(seen: View) -> dict[str, Scalar]:
    for frame in seen.recording.frames:
        if frame.direction == "down" and seen.recording.holds(frame):
            return _spec(wire.unpack_broadcast(seen.recording.payload(frame)))
    return {}


def _sequences(entries: Sequence[behind.Entry], seen: Sighting) -> Sequences:
    """What one site read for a change; for the model every sequence of every kept round, once."""
    if seen.who == MODEL:
        return tuple(dict.fromkeys(row for entry in entries for row in entry.sequences))
    first = next((entry for entry in entries if entry.round == seen.round), None)
    return first.sequences if first else ()
