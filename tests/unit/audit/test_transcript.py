"""A transcript holds the bytes that travelled, verifies itself, and survives being killed."""

import json
import os
import signal
import stat
import struct
from collections.abc import Callable
from pathlib import Path

import pytest
import small_federation as small
import torch

from fedkola import wire
from fedkola.audit import transcript
from fedkola.audit.tap import SumTap, Tap
from fedkola.audit.transcript import Recording, Transcript
from fedkola.engines.in_process import InProcess
from fedkola.errors import ChainBroken, TranscriptMissing
from fedkola.ledger import Ledger
from fedkola.types import Broadcast, Grid, Reply, Update

Answer = Callable[[bytes], bytes]


def asked(word: int, *, round: int = 1) -> Broadcast:
    grid = Grid(word=word, bits=word, scale={"weight": 0, "x": 0, "y": 0})
    before = {"x": torch.tensor([1.5, -2.0]), "y": torch.ones(2, 3, dtype=torch.bfloat16)}
    return Broadcast(round=round, step="count", tensors=before, grid=grid, algorithm={"name": "n"})


def site(name: str, number: int, seen: list[tuple[str, bytes, bytes]]) -> Answer:
    """A site that answers its number and notes the bytes of both ways."""

    def answer(message: bytes) -> bytes:
        broadcast = wire.unpack_broadcast(message)
        tensors = {"y": torch.full((2, 3), -number), "x": torch.tensor([number, 2])}
        words = wire.words(
            Update(client=name, tensors=tensors, weight=3), broadcast.grid, ("a", "b")
        )
        reply = wire.pack_reply(
            Reply(
                client=name,
                question=wire.question(message),
                words=words,
                word=broadcast.grid.word,
            )
        )
        seen.append((name, message, reply))
        return reply

    return answer


def write(folder: Path, *, rounds: int = 3) -> list[tuple[str, bytes, bytes]]:
    """Some rounds of two sites, recorded; returns what the sites saw."""
    seen: list[tuple[str, bytes, bytes]] = []
    file = Transcript(folder / transcript.NAME, keep=lambda round: True, clock=lambda: 5.0)
    engine = Tap(InProcess({name: site(name, i, seen) for i, name in enumerate("ab")}), file)
    for round in range(1, rounds + 1):
        SumTap(engine, file).sum(("a", "b"), asked(32, round=round))
    return seen


@pytest.mark.parametrize("word", [16, 24, 32, 40, 64])
def test_the_recorded_bytes_are_those_that_the_sites_saw(tmp_path: Path, word: int):
    seen: list[tuple[str, bytes, bytes]] = []
    file = Transcript(tmp_path / transcript.NAME, keep=lambda round: True)
    engine = Tap(InProcess({name: site(name, 7, seen) for name in "ab"}), file)
    bare = InProcess({name: site(name, 7, []) for name in "ab"}).sum(("a", "b"), asked(word))
    found = engine.sum(("a", "b"), asked(word))
    assert {n: v.tolist() for n, v in found.words.items()} == {
        n: v.tolist() for n, v in bare.words.items()
    }
    recorded = transcript.read(tmp_path)
    assert [(f.direction, f.peer) for f in recorded.frames] == [
        ("down", "a"),
        ("down", "b"),
        ("up", "a"),
        ("up", "b"),
    ]
    payloads = [recorded.payload(frame) for frame in recorded.frames]
    assert payloads[:2] == [message for _, message, _ in seen]
    assert payloads[2:] == [reply for _, _, reply in seen]
    assert len({frame.question for frame in recorded.frames}) == 1


def test_a_payload_for_many_is_kept_once_and_of_other_rounds_only_headers(tmp_path: Path):
    file = Transcript(tmp_path / transcript.NAME, keep=transcript.kept_rounds(("last",), 2))
    for round in (1, 2):
        for peer in ("a", "b"):
            file.append(
                b"x" * 1000,
                at="wire",
                direction="down",
                peer=peer,
                round=round,
                step="s",
                question="q",
                sites=("a", "b"),
            )
    recorded = transcript.read(tmp_path)
    assert (tmp_path / transcript.NAME).stat().st_size < 1000 + 4 * 500
    assert [recorded.holds(frame) for frame in recorded.frames] == [False, False, True, True]
    assert [frame.size for frame in recorded.frames] == [1000] * 4
    assert recorded.payload(recorded.frames[3]) == b"x" * 1000
    with pytest.raises(TranscriptMissing, match=r"round 1 only headers .* audit\.rounds"):
        recorded.payload(recorded.frames[0])


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (("first", "middle", "last", "every:10"), [1, 10, 12, 20, 23]),
        (("all",), list(range(1, 24))),
        (("5", "22"), [5, 22]),
        ((), []),
    ],
)
def test_the_rounds_that_keep_their_payloads(names: tuple[str, ...], expected: list[int]):
    keep = transcript.kept_rounds(names, 23)
    assert [round for round in range(1, 24) if keep(round)] == expected


def test_a_torn_last_frame_is_not_read_and_is_cut_off_when_the_run_goes_on(tmp_path: Path):
    write(tmp_path)
    path = tmp_path / transcript.NAME
    whole = transcript.read(tmp_path)
    size = path.stat().st_size
    last = size - whole.places[-1] + 100
    for lost in (1, 17, last, 8):
        with path.open("r+b") as file:
            file.truncate(path.stat().st_size - lost)
        frames = transcript.read(tmp_path).frames
        assert frames == whole.frames[: len(frames)]
        assert len(frames) < len(whole.frames)
    again = Transcript(path, keep=lambda round: True)
    again.append(
        b"next",
        at="wire",
        direction="up",
        peer="a",
        round=4,
        step="s",
        question="q",
        sites=("a",),
    )
    read = transcript.read(tmp_path)
    assert read.payload(read.frames[-1]) == b"next"
    assert read.head == again.head


def test_a_killed_writer_leaves_whole_frames(tmp_path: Path):
    child = os.fork()
    if child == 0:
        file = Transcript(tmp_path / transcript.NAME, keep=lambda round: True)
        for round in range(1, 100):
            file.append(
                bytes(round),
                at="wire",
                direction="up",
                peer="a",
                round=round,
                step="s",
                question="q",
                sites=("a",),
            )
            if round == 40:
                os.kill(os.getpid(), signal.SIGKILL)
    os.waitpid(child, 0)
    recorded = transcript.read(tmp_path)
    assert [recorded.payload(frame) for frame in recorded.frames] == [
        bytes(r) for r in range(1, 41)
    ]


def frames_of(content: bytes) -> list[bytes]:
    found, place = [], 0
    while place < len(content):
        (length,) = struct.unpack_from("<Q", content, place)
        found.append(content[place : place + 8 + length])
        place += 8 + length
    return found


def with_header(frame: bytes, **changes: object) -> bytes:
    header, _, payload = frame[8:].partition(b"\n")
    text = json.dumps({**json.loads(header), **changes}, sort_keys=True, separators=(",", ":"))
    body = text.encode() + b"\n" + payload
    return struct.pack("<Q", len(body)) + body


def flipped(frame: bytes) -> bytes:
    return frame[:-1] + bytes([frame[-1] ^ 1])


@pytest.mark.parametrize(
    ("alter", "says"),
    [
        (lambda f: [flipped(f[0]), *f[1:]], "frame 0 .* payload was altered"),
        (lambda f: [f[0], f[3], f[2], f[1], *f[4:]], "frame 1 .* does not follow"),
        (lambda f: f[:2] + f[3:], "frame 2 .* does not follow"),
        (lambda f: [*f[:3], with_header(f[3], peer="b"), *f[4:]], "frame 4 .* does not follow"),
        (lambda f: [f[0], with_header(f[1], size=7), *f[2:]], "frame 2 .* does not follow"),
        (lambda f: [*f[:4], f[4][:8] + b"x" + f[4][9:], *f[5:]], "frame 4 .* cannot be read"),
        (lambda f: [with_header(f[0], extra=1), *f[1:]], "frame 0 .* cannot be read"),
        (lambda f: [with_header(f[0], size=7), *f[1:]], "frame 0 .* length does not fit"),
    ],
)
def test_an_altered_transcript_is_refused(
    tmp_path: Path, alter: Callable[[list[bytes]], list[bytes]], says: str
):
    write(tmp_path)
    path = tmp_path / transcript.NAME
    path.write_bytes(b"".join(alter(frames_of(path.read_bytes()))))
    with pytest.raises(ChainBroken, match=says):
        transcript.read(tmp_path)


def test_an_end_that_is_cut_off_shows_against_the_heads_of_the_ledger(tmp_path: Path):
    write(tmp_path)
    path = tmp_path / transcript.NAME
    head = transcript.read(tmp_path).head
    path.write_bytes(b"".join(frames_of(path.read_bytes())[:-1]))
    transcript.read(tmp_path)
    with pytest.raises(ChainBroken, match="cut off"):
        transcript.read(tmp_path, heads=[head])


def test_a_run_that_was_not_recorded_says_what_to_do(tmp_path: Path):
    with pytest.raises(TranscriptMissing, match=r"audit\.record = true"):
        transcript.read(tmp_path)


def recorded(folder: Path, *settings: str) -> tuple[str, Recording]:
    state = small.run(small.assemble(folder, *settings))
    with Ledger.open(folder) as ledger:
        heads = [row.sampler["transcript"] for row in ledger.rounds("small")]
    return small.fingerprint(state), transcript.read(folder, heads=heads)


@pytest.mark.parametrize("method", ["fedkola", "fedit", "flora"])
def test_recording_changes_no_bit_of_a_run(tmp_path: Path, method: str):
    name = f"algorithm.name={method}"
    plain = small.fingerprint(small.run(small.assemble(tmp_path / "plain", name)))
    found, recording = recorded(tmp_path / "taped", name, "audit.record=true")
    assert found == plain
    assert not (tmp_path / "plain" / transcript.NAME).exists()
    assert stat.S_IMODE((tmp_path / "taped" / transcript.NAME).stat().st_mode) == 0o600
    assert {frame.at for frame in recording.frames} == (
        {"wire"} if method == "flora" else {"wire", "sums"}
    )
    assert {frame.peer for frame in recording.frames} >= set(small.SITES)


def test_the_recorded_traffic_is_that_of_the_report(tmp_path: Path):
    _, recording = recorded(tmp_path, "algorithm.name=fedit", "audit.record=true")
    with Ledger.open(tmp_path) as ledger:
        for row in ledger.rounds("small"):
            mine = [f for f in recording.frames if f.round == row.number and f.at == "wire"]
            down, up = (sum(f.size for f in mine if f.direction == way) for way in ("down", "up"))
            assert (row.report["bytes_down"], row.report["bytes_up"]) == (down, up)


def test_a_site_whose_answer_is_no_message_is_refused_as_without_a_tap(tmp_path: Path):
    file = Transcript(tmp_path / transcript.NAME, keep=lambda round: True)
    engine = Tap(InProcess({"north": lambda message: b"garbage"}), file)
    replies = list(engine.replies(("north",), asked(32)))
    assert [reply.refused for reply in replies] == ["WireError"]
    assert engine.tally().refused == {"north": "WireError"}
    assert transcript.read(tmp_path).frames[-1].refused == "WireError"
