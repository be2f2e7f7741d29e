"""What passed on the wire of one run, as an append-only file of frames that verifies itself.

A frame is ``u64 length | JSON header | newline | payload``, little-endian, where the length counts
everything after it. The header holds sequence number, time, direction, peer, round, step, size and
SHA-256 of the payload, and the SHA-256 of the header before it, so that no frame can be altered,
dropped or moved without breaking the chain. Every header is kept; payloads are kept for the rounds
that ``audit.rounds`` names, and of the questions after them; what went to several peers is kept
once.

A process that is killed may leave a torn last frame: it is cut off when the run goes on and not
read before. Frames are handed to the operating system one by one; a power failure may lose the
last ones, which the heads that the ledger keeps of committed rounds would show.
"""

import hashlib
import json
import os
import struct
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

from fedkola.errors import ChainBroken, TranscriptMissing

NAME = "transcript.bin"
GENESIS = "0" * 64
_LENGTH = struct.Struct("<Q")
_MAX_HEADER = 1 << 20
# Kept payloads are looked up among this many, enough for all peers of one question.
_RECENT = 256


@dataclass(frozen=True, slots=True, kw_only=True)
class Frame:
    """One message and where it was seen.

    ``at`` is "wire" for what travels between server and sites, "sums" for what the algorithm asks
    and reads. ``direction`` is "down" to a site and "up" from it, ``peer`` the site ("sum" for a
    sum). ``question`` names the broadcast that this is or answers, ``sites`` whom it concerns: the
    cohort asked, or the sites whose answers a sum holds. ``stored`` says that the payload follows
    in the file, ``same`` is the sequence number of an earlier frame with the same payload, or -1.
    """

    sequence: int
    time: float
    at: str
    direction: str
    peer: str
    round: int
    step: str
    question: str
    sites: tuple[str, ...]
    refused: str
    size: int
    sha256: str
    stored: bool
    same: int
    previous: str


class Transcript:
    """The file of one run, to append to. A torn end is cut off at the first use."""

    def __init__(
        self,
        path: Path,
        *,
        keep: Callable[[int], bool],
        clock: Callable[[], float] = time.time,
    ) -> None:
        """``keep`` says of a round whether its payloads stay."""
        self.path = path
        self._keep = keep
        self._clock = clock
        self._begun = False
        self._head = GENESIS
        self._next = 0
        self._recent: dict[str, int] = {}

    @property
    def head(self) -> str:
        """The SHA-256 of the last header: it stands for everything that was recorded."""
        self._begin()
        return self._head

    def append(
        self,
        payload: bytes,
        *,
        at: Literal["wire", "sums"],
        direction: Literal["down", "up"],
        peer: str,
        round: int,
        step: str,
        question: str,
        sites: Sequence[str],
        refused: str = "",
    ) -> None:
        """Write one frame behind all others."""
        self._begin()
        digest = hashlib.sha256(payload).hexdigest()
        # The question of the next round says what a kept round came to.
        wanted = self._keep(round) or (direction == "down" and self._keep(round - 1))
        same = self._recent.get(digest, -1) if wanted else -1
        frame = Frame(
            sequence=self._next,
            time=self._clock(),
            at=at,
            direction=direction,
            peer=peer,
            round=round,
            step=step,
            question=question,
            sites=tuple(sites),
            refused=refused,
            size=len(payload),
            sha256=digest,
            stored=wanted and same < 0,
            same=same,
            previous=self._head,
        )
        header = _header(frame)
        body = payload if frame.stored else b""
        with self.path.open("ab") as file:
            file.write(_LENGTH.pack(len(header) + 1 + len(body)) + header + b"\n")
            file.write(body)
        if frame.stored:
            self._recent[digest] = frame.sequence
            if len(self._recent) > _RECENT:
                del self._recent[next(iter(self._recent))]
        self._head, self._next = _digest(header), self._next + 1

    def _begin(self) -> None:
        if self._begun:
            return
        self._begun = True
        self.path.parent.mkdir(parents=True, exist_ok=True)
        # Only the owner reads it: of a plain run it holds what single sites answered.
        descriptor = os.open(self.path, os.O_RDWR | os.O_CREAT, 0o600)
        with os.fdopen(descriptor, "r+b") as file:
            whole = 0
            for frame, header, end in _walk(self.path):
                self._head, self._next, whole = _digest(header), frame.sequence + 1, end
            file.truncate(whole)


@dataclass(frozen=True, slots=True, kw_only=True)
class Recording:
    """A transcript as it is read: every frame, and where its payload lies."""

    path: Path
    frames: tuple[Frame, ...]
    places: tuple[int, ...]
    head: str

    def holds(self, frame: Frame) -> bool:
        """Whether the payload of this frame was kept."""
        return frame.stored or frame.same >= 0

    def payload(self, frame: Frame) -> bytes:
        """The bytes that passed; raises TranscriptMissing where only the header was kept."""
        if not self.holds(frame):
            raise TranscriptMissing(
                f"of round {frame.round} only headers were kept; name the round in audit.rounds "
                "and run again"
            )
        place = self.places[frame.sequence if frame.stored else frame.same]
        with self.path.open("rb") as file:
            file.seek(place)
            found = file.read(frame.size)
        if hashlib.sha256(found).hexdigest() != frame.sha256:
            raise _broken(frame.sequence, "its payload was altered")
        return found


def read(folder: Path, *, heads: Collection[str] = ()) -> Recording:
    """The verified transcript of a run folder.

    ``heads`` are those that the ledger noted at its commits; each must be in the chain, or the end
    was cut off. Raises TranscriptMissing if nothing was recorded, ChainBroken if a header or a
    payload was altered, dropped, moved or cut off.
    """
    path = folder / NAME
    if not path.exists():
        raise TranscriptMissing(
            f"{folder} holds no transcript: the run was not recorded; set audit.record = true in "
            "its plan and run it again, or rehearse the plan with fedkola audit --rehearse"
        )
    frames: list[Frame] = []
    places: list[int] = []
    head = GENESIS
    seen = {GENESIS}
    for frame, header, end in _walk(path):
        if frame.previous != head or frame.sequence != len(frames):
            raise _broken(len(frames), "its header does not follow the one before")
        frames.append(frame)
        places.append(end - frame.size if frame.stored else end)
        head = _digest(header)
        seen.add(head)
    lost = sorted(set(heads) - seen)
    if lost:
        raise ChainBroken(
            f"{path} does not hold the head {lost[0][:16]} that the ledger noted: it was cut off "
            "or written anew; the audit of this run cannot be trusted, run it again"
        )
    recording = Recording(path=path, frames=tuple(frames), places=tuple(places), head=head)
    for frame in recording.frames:
        if frame.same >= 0 and not (
            frame.same < frame.sequence and frames[frame.same].sha256 == frame.sha256
        ):
            raise _broken(frame.sequence, "it refers to a payload that is not its own")
        if frame.stored:
            recording.payload(frame)
    return recording


def kept_rounds(names: Sequence[str], total: int) -> Callable[[int], bool]:
    """Which of rounds 1 to ``total`` keep payloads: "all", "first", "middle", "last", "every:N", a
    number. The plan has checked the names."""
    numbers = {"first": 1, "middle": (total + 1) // 2, "last": total}
    chosen = {numbers[name] for name in names if name in numbers}
    chosen |= {int(name) for name in names if name.isdigit()}
    steps = [int(name.removeprefix("every:")) for name in names if name.startswith("every:")]
    everything = "all" in names

    def keep(round: int) -> bool:
        return everything or round in chosen or any(round % step == 0 for step in steps)

    return keep


# --- private --------------------------------------------------------------------------------------


def _walk(path: Path) -> Iterator[tuple[Frame, bytes, int]]:
    """Every whole frame with the bytes of its header and the place where it ends.

    A last frame that is not whole ends the walk; anything else that is no frame is ChainBroken.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        place, count = 0, 0
        while place + _LENGTH.size <= size:
            (length,) = _LENGTH.unpack(file.read(_LENGTH.size))
            end = place + _LENGTH.size + length
            if end > size:
                return
            header = file.readline(min(length, _MAX_HEADER))
            frame = _frame(header, count)
            if len(header) + (frame.size if frame.stored else 0) != length:
                raise _broken(count, "its length does not fit its header")
            file.seek(end)
            yield frame, header[:-1], end
            place, count = end, count + 1


def _header(frame: Frame) -> bytes:
    return json.dumps(asdict(frame), sort_keys=True, separators=(",", ":")).encode()


def _frame(header: bytes, number: int) -> Frame:
    try:
        fields = json.loads(header)
        found = Frame(**{**fields, "sites": tuple(fields["sites"])})
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise _broken(number, "its header cannot be read") from error
    if not header.endswith(b"\n") or _header(found) != header[:-1]:
        raise _broken(number, "its header is not written as a transcript writes it")
    if type(found.size) is not int or found.size < 0:
        raise _broken(number, "its size is no size")
    return found


def _digest(header: bytes) -> str:
    return hashlib.sha256(header).hexdigest()


def _broken(number: int, what: str) -> ChainBroken:
    return ChainBroken(
        f"frame {number} of the transcript does not verify: {what}; the audit of this run cannot "
        "be trusted, run it again"
    )
