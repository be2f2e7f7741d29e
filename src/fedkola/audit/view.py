"""What one observer saw of a recorded run, frame by frame, and the changes it can read from that.

- ``wire``: every message on an open network; the protocol gives the server no secret, so this is
  what the server sees.
- ``server``: the same.
- ``tls``: a network that carries TLS: who spoke to whom, when and how much, and no content.
- ``site:NAME`` (or ``client:NAME``): what this site was asked and what it answered. Consecutive
  broadcasts differ by what the round added, so it can read sums of the others.
- ``coalition:A,B``: the server and these sites, which take their own part out of every sum.
- ``model``: the last weights alone.

Under secure aggregation a single answer is uniform words. It is decoded as the attacker would
decode it, so that attacks on it are measured and not assumed to fail.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from fedkola import wire
from fedkola.algorithms import changes, rebuild
from fedkola.algorithms.diloco import EXPONENTS, HISTOGRAM, DiLoCo
from fedkola.audit.evidence import Sequences, Sighting, Truth
from fedkola.audit.transcript import Frame, Recording
from fedkola.errors import UnknownName
from fedkola.privacy import behind, frames, masks, member
from fedkola.privacy.member import ASK, OPEN, RELAY, REVEAL, SHARE
from fedkola.types import Aggregate, Broadcast, Grid, Reply, Scalar, Weights

Kind = Literal["wire", "server", "tls", "site", "coalition", "model"]
KINDS: tuple[Kind, ...] = ("wire", "server", "tls", "site", "coalition", "model")

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
    it has them. ``mean`` says that the server takes the plain mean of what sites answer, which the
    plan tells everybody."""

    observer: Observer
    recording: Recording
    frames: tuple[Frame, ...]
    secrets: Mapping[str, Path]
    final: Weights
    mean: bool = True


def observer(text: str, roster: Sequence[str]) -> Observer:
    """The observer that a text names; raises UnknownName for a kind or a site that is not there."""
    kind, _, names = text.partition(":")
    kind = "site" if kind == "client" else kind
    sites = tuple(name.strip() for name in names.split(",") if name.strip())
    wants = {"site": 1, "coalition": 2}.get(kind, 0)
    found = next((known for known in KINDS if known == kind), None)
    if found is None:
        raise UnknownName(
            f"observer {text!r} was given; expected wire, server, tls, site:NAME, coalition:A,B or "
            "model"
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
    recording: Recording,
    observer: Observer,
    *,
    stores: Mapping[str, Path],
    final: Weights,
    mean: bool = True,
) -> View:
    """Exactly the frames and secrets of an observer; ``stores`` are the private folders of sites
    that lie on this machine."""
    whole = observer.kind in ("wire", "server", "coalition")
    sealed = observer.kind == "tls"
    frames = (
        frame
        for frame in recording.frames
        if whole or (frame.at == "wire" and (sealed or frame.peer in observer.sites))
    )
    return View(
        observer=observer,
        recording=recording,
        frames=tuple(replace(f, stored=False, same=-1) if sealed else f for f in frames),
        secrets={name: stores[name] for name in observer.sites if name in stores},
        final={} if sealed else final,
        mean=mean,
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


def first_question(recording: Recording) -> Broadcast | None:
    """The first question of the run whose bytes were kept, without its masks."""
    for frame in recording.frames:
        if frame.direction == "down" and frame.step not in _SETUP and recording.holds(frame):
            asked = wire.unpack_broadcast(recording.payload(frame))
            if frame.step == ASK:
                return wire.unpack_broadcast(_bytes(asked.tensors["question"]))
            return asked
    return None


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
    for asked, before, answers in _exchanges(seen):
        for frame in answers:
            if frame.refused or frame.peer in seen.observer.sites:
                continue
            own = _own(seen, asked) if frame.peer == SUM else {}
            who = OTHERS if own else frame.peer
            change, left = _change(seen, asked, frame, own, before)
            if not change or (asked.round, who) in done or left < 1:
                continue
            done.add((asked.round, who))
            yield Sighting(
                round=asked.round,
                who=who,
                sites=left,
                before=before,
                change=change,
                protocol=_spec(asked),
            )


def _read_by_site(seen: View) -> Iterator[Sighting]:
    """Consecutive broadcasts, and the last weights after the last of them."""
    asked: dict[int, tuple[Broadcast, Weights]] = {}
    for broadcast, held, _ in _exchanges(seen):
        asked.setdefault(broadcast.round, (broadcast, held))
    last = max((frame.round for frame in seen.frames), default=0)
    for number, (question, before) in asked.items():
        after = asked[number + 1][1] if number + 1 in asked else None
        if after is None and number == last:
            after = seen.final
        if not after:
            continue
        names = [n for n, v in before.items() if n in after and v.is_floating_point()]
        moved = {name: after[name].float() - before[name].float() for name in names}
        own, others = _own(seen, question), len(question.cohort) - 1
        # The mean over all, times how many they are, less the own part, over the rest.
        if own and others > 0 and seen.mean:
            part = _real(question, next(iter(own.values())), before)
            moved = {
                name: (value * (others + 1) - part.get(name, torch.zeros(()))) / others
                for name, value in moved.items()
            }
        else:
            own = {}
        if any(bool(value.any()) for value in moved.values()):
            yield Sighting(
                round=number,
                who=OTHERS if own else SUM,
                sites=others if own else len(question.cohort),
                before=before,
                change=moved,
                protocol=_spec(question),
            )


def _exchanges(seen: View) -> Iterator[tuple[Broadcast, Weights, list[Frame]]]:
    """Every question whose bytes were kept, the weights its cohort held then, and its kept answers,
    in the order asked."""
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
    held: dict[str, tuple[int, Weights]] = {}
    for key, frame in down.items():
        if not seen.recording.holds(frame):
            continue
        broadcast = wire.unpack_broadcast(seen.recording.payload(frame))
        if frame.step == ASK:
            broadcast = wire.unpack_broadcast(_bytes(broadcast.tensors["question"]))
        before = _held(broadcast, held.get(frame.at))
        if before:
            held[frame.at] = broadcast.round, before
            yield broadcast, before, list(up.get(key, {}).values())


def _held(asked: Broadcast, old: tuple[int, Weights] | None) -> Weights:
    """The weights that a question leaves its cohort with: those it brings, or an earlier round's
    with the part or the change that it brings; none where the earlier round was not kept."""
    if asked.algorithm.get("name") != "DiLoCo":
        return asked.tensors
    if asked.step != "train":
        return {}
    brought = {n: v.float() for n, v in asked.tensors.items() if not n.startswith("side/")}
    changed = changes.names(asked.tensors)
    last, known = old or (0, {})
    if changed:
        if last != asked.round - 1 or not set(changed) <= set(known):
            return {}
        down = str(asked.algorithm["down"])
        return {**known, **changes.received(asked.tensors, known, down)}
    return {**known, **brought}


def _change(
    seen: View, asked: Broadcast, frame: Frame, own: Mapping[str, Weights], before: Weights
) -> tuple[dict[str, Tensor], int]:
    """How far the weights moved by this answer, and how many sites it stands for."""
    reply = wire.unpack_reply(seen.recording.payload(frame))
    words = masked(reply, asked.grid) if frame.step == ASK else reply.words
    parts = [part for name, part in own.items() if name in frame.sites]
    for part in parts:
        words = {name: value - part[name] for name, value in words.items()}
    return _real(asked, words, before), len(frame.sites) - len(parts)


def _real(asked: Broadcast, words: Weights, before: Weights) -> dict[str, Tensor]:
    """How far weights moved by these words as an attacker reads them: the mean over the weight
    that stands beside them."""
    algorithm = rebuild(asked.algorithm)
    if isinstance(algorithm, DiLoCo):
        return _descended(algorithm, asked, words, before)
    names = [
        name
        for name, value in asked.tensors.items()
        if name in words and value.is_floating_point() and words[name].shape == value.shape
    ]
    if not names or not set(words) <= set(asked.grid.scale):
        return {}
    reals = wire.reals(Aggregate(cohort=asked.cohort, words=words, grid=asked.grid))
    weight = float(reals[wire.WEIGHT]) if wire.WEIGHT in reals else 1.0
    return {name: (reals[name] / (weight or 1.0)).float() for name in names}


def _descended(
    algorithm: DiLoCo, asked: Broadcast, words: Weights, before: Weights
) -> dict[str, Tensor]:
    """DiLoCo answers how far weights went down, on a grid of its own, several to a word."""
    if asked.step != "train" or not set(words) >= {wire.WEIGHT, HISTOGRAM}:
        return {}
    due = algorithm.due(asked.round, before)
    scale = dict(zip(due, asked.tensors[EXPONENTS].tolist(), strict=True))
    answer = Aggregate(cohort=asked.cohort, words=words, grid=asked.grid)
    delta, _ = algorithm.heard(asked.round, scale, answer, before, len(asked.cohort))
    return {name: -value for name, value in delta.items()}


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
    algorithm = rebuild(asked.algorithm)
    steps = {}
    if isinstance(algorithm, DiLoCo):
        course = algorithm.course(asked.round)
        steps = {"inner_steps": course.steps, "total": course.total}
    noise = [guard for guard in asked.guards if guard.get("name") == "record_dp"]
    merged = {key: value for guard in noise for key, value in guard.items() if key != "name"}
    return {**asked.algorithm, **steps, **merged}


def _protocol(seen: View) -> dict[str, Scalar]:
    asked = first_question(seen.recording)
    return {} if asked is None else _spec(asked)


def _sequences(entries: Sequence[behind.Entry], seen: Sighting) -> Sequences:
    """What one site read for a change; for the model every sequence of every kept round, once."""
    if seen.who == MODEL:
        return tuple(dict.fromkeys(row for entry in entries for row in entry.sequences))
    first = next((entry for entry in entries if entry.round == seen.round), None)
    return first.sequences if first else ()
