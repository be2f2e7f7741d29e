"""Whatever one site answers: no crash, no number of it in a sum, its name among the refusals.

Each malformed answer is drawn from a seed; there are some 1,900, in three widths of words.
"""

import gzip
import io
import json
import random
import struct
import zipfile
import zlib
from collections.abc import Callable
from functools import cache

import pytest
import torch
from torch import Tensor

from fedkola import wire
from fedkola.engines.in_process import InProcess
from fedkola.types import Broadcast, Grid, Reply, Update, Weights

COHORT = ("a", "b", "c", "d")
LIAR = "c"
DRAWS = 25
MOST, MAX_BYTES = 1_000, 1 << 16
SCALE = {"weight": 0, "x": 6, "n": 0, "metric/loss": 6}
Bytes = Callable[[random.Random, bytes, Reply, int], bytes]


def asked(word: int) -> Broadcast:
    grid = Grid(word=word, bits=word, scale=SCALE)
    return Broadcast(
        run="r", round=3, step="train", cohort=COHORT, tensors={}, grid=grid, algorithm={}
    )


def honest(name: str, message: bytes) -> Reply:
    question = wire.unpack_broadcast(message)
    number = COHORT.index(name) + 1
    update = Update(
        client=name,
        tensors={"x": torch.full((2, 3), number / 4), "n": torch.tensor([number, 7])},
        weight=number,
        metrics={"loss": 0.5},
    )
    words = wire.words(update, question.grid, question.cohort)
    return Reply(
        client=name,
        question=wire.question(message),
        words=words,
        word=question.grid.word,
    )


# --- malformed answers: (chance, honest bytes, honest reply, word) -> bytes -----------------------


def with_words(reply: Reply, words: Weights, *, word: int = 0) -> bytes:
    """As words lie in memory, which an engine also reads."""
    return wire.pack_reply(
        Reply(client=reply.client, question=reply.question, words=words, word=word)
    )


def named(chance: random.Random, reply: Reply) -> str:
    return chance.choice(sorted(reply.words))


def spoilt(value: float) -> Bytes:
    def make(chance: random.Random, message: bytes, reply: Reply, word: int) -> bytes:
        name = named(chance, reply)
        kind = chance.choice([torch.float16, torch.bfloat16, torch.float32, torch.float64])
        numbers = reply.words[name].to(kind)
        numbers.view(-1)[chance.randrange(numbers.numel())] = value
        return with_words(reply, {**reply.words, name: numbers})

    return make


def missing(chance: random.Random, message: bytes, reply: Reply, word: int) -> bytes:
    gone = chance.sample(sorted(reply.words), chance.randint(1, 4))
    return with_words(reply, {n: v for n, v in reply.words.items() if n not in gone})


def extra(chance: random.Random, message: bytes, reply: Reply, word: int) -> bytes:
    name = chance.choice(["", "y", "X", "x ", "metric/", "metric/x", "\u0000", "x.lora_A"])
    return with_words(reply, {**reply.words, name: reply.words["x"].clone()})


def shaped(chance: random.Random, message: bytes, reply: Reply, word: int) -> bytes:
    name = named(chance, reply)
    shape = [chance.randint(0, 5) for _ in range(chance.randint(0, 5))]
    if tuple(shape) == tuple(reply.words[name].shape):
        shape.append(2)
    # With a weight of none, wrong shapes would be refused for that.
    value = torch.ones(shape, dtype=reply.words[name].dtype)
    return with_words(reply, {**reply.words, name: value})


def typed(chance: random.Random, message: bytes, reply: Reply, word: int) -> bytes:
    name = named(chance, reply)
    kinds = [torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64]
    kinds += [torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.complex64]
    other = [kind for kind in kinds if kind != reply.words[name].dtype]
    return with_words(reply, {**reply.words, name: reply.words[name].to(chance.choice(other))})


def weighing(numbers: Callable[[random.Random, int], int]) -> Bytes:
    def make(chance: random.Random, message: bytes, reply: Reply, word: int) -> bytes:
        largest = torch.iinfo(reply.words["weight"].dtype).max
        number = max(min(numbers(chance, word), largest), -largest - 1)
        weight = torch.full_like(reply.words["weight"], number)
        return with_words(reply, {**reply.words, "weight": weight})

    return make


def enormous(chance: random.Random, message: bytes, reply: Reply, word: int) -> bytes:
    name = chance.choice(["x", "n", "metric/loss"])
    limits = torch.iinfo(reply.words[name].dtype)
    share = (2 ** (word - 1) - 1) // len(COHORT)
    value = reply.words[name].clone()
    number = chance.choice([limits.max, limits.min, share + 1, -share - 1])
    value.view(-1)[chance.randrange(value.numel())] = number
    return with_words(reply, {**reply.words, name: value})


def oversized(chance: random.Random, message: bytes, reply: Reply, word: int) -> bytes:
    size = MAX_BYTES // 4 + chance.randrange(10_000)
    value = torch.zeros(size, dtype=reply.words["x"].dtype)
    value = torch.cat([value, value]) if value.dtype == torch.int16 else value
    return with_words(reply, {**reply.words, "x": value})


def truncated(chance: random.Random, message: bytes, reply: Reply, word: int) -> bytes:
    return message[: chance.randrange(len(message))]


def padded(chance: random.Random, message: bytes, reply: Reply, word: int) -> bytes:
    return message + chance.randbytes(chance.randint(1, 50))


def altered(chance: random.Random, message: bytes, reply: Reply, word: int) -> bytes:
    found = bytearray(message)
    for _ in range(chance.randint(1, 8)):
        found[chance.randrange(len(found))] ^= chance.randint(1, 255)
    return bytes(found) if bytes(found) != message else b""


def junk(chance: random.Random, message: bytes, reply: Reply, word: int) -> bytes:
    return chance.choice([b"", b"FKW1", b"\x80\x04N.", chance.randbytes(chance.randrange(300))])


@cache
def pressed(how: str, megabytes: int) -> bytes:
    zeros = bytes(megabytes << 20)
    if how == "zip":
        held = io.BytesIO()
        with zipfile.ZipFile(held, "w", zipfile.ZIP_DEFLATED) as archive:
            archive.writestr("x", zeros)
        return held.getvalue()
    return gzip.compress(zeros) if how == "gzip" else zlib.compress(zeros)


def bomb(chance: random.Random, message: bytes, reply: Reply, word: int) -> bytes:
    """A megabyte or more in some kilobytes, bare or where a body is expected."""
    found = pressed(chance.choice(["zip", "gzip", "zlib"]), chance.randint(1, 4))
    return found if chance.random() < 0.3 else framed(header_of(reply, word), found)


def promised(chance: random.Random, message: bytes, reply: Reply, word: int) -> bytes:
    """A body whose header promises more numbers than there are."""
    count = chance.choice([10, 2**20, 2**40, 2**62])
    about = {"x": {"dtype": "I32", "shape": [count], "data_offsets": [0, 4 * count]}}
    text = json.dumps(about).encode()
    return framed(header_of(reply, word), struct.pack("<Q", len(text)) + text + bytes(64))


def lying_header(chance: random.Random, message: bytes, reply: Reply, word: int) -> bytes:
    header = header_of(reply, word)
    key = chance.choice(sorted(header))
    # A refusal "null" is no refusal, so values of the wrong type are drawn for every key.
    header[key] = chance.choice([None, 1.5, [], {}, [[]] * 3, 10**30, True, {"a": 1}])
    return framed(header, message[12 + struct.unpack_from("<I", message, 4)[0] :])


def deep(chance: random.Random, message: bytes, reply: Reply, word: int) -> bytes:
    depth = chance.choice([1_000, 100_000])
    text = chance.choice([b"[" * depth, b'{"a":' * depth, b"9" * 200_000, b'"' + b"x" * 10**5])
    return framed(text, b"")


def stale(chance: random.Random, message: bytes, reply: Reply, word: int) -> bytes:
    question = chance.choice(["", "0" * 16, reply.question[:-1], reply.question.upper() + "x"])
    return wire.pack_reply(
        Reply(client=reply.client, question=question, words=reply.words, word=reply.word)
    )


def disguised(chance: random.Random, message: bytes, reply: Reply, word: int) -> bytes:
    client = chance.choice(["a", "b", "", "C", "c ", "\u0441", "x" * 1_000])
    return wire.pack_reply(
        Reply(client=client, question=reply.question, words=reply.words, word=reply.word)
    )


def told(chance: random.Random, message: bytes, reply: Reply, word: int) -> bytes:
    text = chance.choice(["<script>alert(1)</script>", "a b", "x" * 500, "../../etc", "\u202e"])
    return wire.pack_reply(Reply(client=reply.client, refused=text, words=reply.words))


def mispacked(chance: random.Random, message: bytes, reply: Reply, word: int) -> bytes:
    """Words said to be packed in a way that they are not."""
    claimed = chance.choice([w for w in (24, 40) if w != word])
    fields = {**header_of(reply, word), "word": claimed}
    return framed(fields, message[12 + struct.unpack_from("<I", message, 4)[0] :])


FAMILIES: dict[str, Bytes] = {
    "NaN": spoilt(float("nan")),
    "infinity": spoilt(float("inf")),
    "minus infinity": spoilt(float("-inf")),
    "missing keys": missing,
    "extra keys": extra,
    "wrong shapes": shaped,
    "wrong types": typed,
    "weight 0": weighing(lambda chance, word: 0),
    "negative weight": weighing(lambda chance, word: -chance.randint(1, 10**6)),
    "weight 1e12": weighing(lambda chance, word: 10**12),
    "too many records": weighing(lambda chance, word: MOST + chance.randint(1, 10**4)),
    "enormous numbers": enormous,
    "oversized": oversized,
    "truncated": truncated,
    "padded": padded,
    "altered": altered,
    "junk": junk,
    "compressed bomb": bomb,
    "promised bytes": promised,
    "lying header": lying_header,
    "deep header": deep,
    "another question": stale,
    "another site": disguised,
    "told text": told,
    "mispacked": mispacked,
}
WORDS = (16, 24, 32)


def header_of(reply: Reply, word: int) -> dict[str, object]:
    return {
        "kind": "reply",
        "client": reply.client,
        "question": reply.question,
        "refused": "",
        "word": word,
    }


def framed(header: object, body: bytes) -> bytes:
    """A message with a right checksum around any header and body."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    crc = zlib.crc32(body, zlib.crc32(text))
    return struct.pack("<4sII", b"FKW1", len(text), crc) + text + body


# --- the test -------------------------------------------------------------------------------------


def engine(make: Callable[[bytes], bytes] | None) -> InProcess:
    sites = {
        name: lambda message, name=name: wire.pack_reply(honest(name, message)) for name in COHORT
    }
    return InProcess(sites | ({LIAR: make} if make else {}), most=MOST, max_bytes=MAX_BYTES)


def numbers(words: Weights) -> dict[str, list[int]]:
    return {name: Tensor.tolist(value.reshape(-1)) for name, value in words.items()}


@pytest.mark.parametrize("word", WORDS)
def test_an_honest_answer_is_summed(word: int):
    found = engine(None).sum(COHORT, asked(word))
    assert found.cohort == COHORT
    assert numbers(found.words) == {
        "x": [(1 + 2 + 3 + 4) * 16] * 6,
        "n": [10, 28],
        "weight": [10],
        "metric/loss": [128],
    }


def test_there_are_more_than_a_thousand_malformed_answers():
    assert len(FAMILIES) * len(WORDS) * DRAWS >= 1_000


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("word", WORDS)
def test_a_malformed_answer_is_refused_by_name_and_never_summed(family: str, word: int):
    others = tuple(name for name in COHORT if name != LIAR)
    expected = {"x": [7 * 16] * 6, "n": [7, 21], "weight": [7], "metric/loss": [96]}
    distinct = set()
    for draw in range(DRAWS):
        chance = random.Random(f"{family}/{word}/{draw}")

        def make(message: bytes, chance: random.Random = chance) -> bytes:
            reply = honest(LIAR, message)
            made = FAMILIES[family](chance, wire.pack_reply(reply), reply, word)
            distinct.add(made)
            return made

        tried = engine(make)
        found = tried.sum(COHORT, asked(word))
        where = f"{family}, {word} bits, draw {draw}"
        assert found.cohort == others, where
        assert numbers(found.words) == expected, where
        refused = tried.tally().refused
        assert set(refused) == {LIAR}, where
        assert refused[LIAR] in {"WireError", "StaleUpdate", "VersionMismatch"}, where
    assert len(distinct) > 1 or family.startswith("weight") or family == "mispacked"
