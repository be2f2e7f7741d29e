"""The wire whatever arrives on it, and sums whoever answers first."""

import struct
import zlib
from collections.abc import Sequence

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fedkola import wire
from fedkola.errors import VersionMismatch, WireError
from fedkola.types import Aggregate, Broadcast, Grid, Reply, Update

DTYPES = [torch.bfloat16, torch.float16, torch.float32, torch.float64, torch.int16, torch.int64]
GRID = Grid(word=32, bits=32, scale={"weight": 0, "x": 8, "n": 0})
MESSAGES = (
    wire.pack_reply(Reply(client="site", words={"x": torch.arange(6, dtype=torch.int32)})),
    wire.pack_broadcast(
        Broadcast(
            round=1,
            step="vote",
            cohort=("a", "b"),
            tensors={"y": torch.ones(2, 2).bfloat16()},
            grid=GRID,
            algorithm={"name": "FedKoLa", "lr": 0.5},
        )
    ),
)
READERS = (wire.unpack_reply, wire.unpack_broadcast)

texts = st.text(st.characters(exclude_categories=("Cs",)), max_size=6)


@st.composite
def tensors(draw: st.DrawFn) -> torch.Tensor:
    shape = draw(st.lists(st.integers(0, 3), max_size=4))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    return torch.randint(-99, 99, shape, generator=generator).to(draw(st.sampled_from(DTYPES)))


@given(client=texts, words=st.dictionaries(texts, tensors(), max_size=3), refused=texts)
@settings(max_examples=60, deadline=None)
def test_any_answer_reads_back_as_it_was_packed(client, words, refused):
    got = wire.unpack_reply(wire.pack_reply(Reply(client=client, words=words, refused=refused)))
    assert (got.client, got.refused, set(got.words)) == (client, refused, set(words))
    for name, sent in words.items():
        assert (got.words[name].dtype, got.words[name].shape) == (sent.dtype, sent.shape)
        assert torch.equal(got.words[name], sent)


@st.composite
def mutations(draw: st.DrawFn) -> tuple[int, bytes]:
    """A message with bytes overwritten, removed or put in; sometimes under a right checksum."""
    which = draw(st.integers(0, 1))
    message = bytearray(MESSAGES[which])
    for _ in range(draw(st.integers(1, 3))):
        start = draw(st.integers(0, len(message)))
        removed = draw(st.integers(0, 8))
        message[start : start + removed] = draw(st.binary(max_size=8))
    if draw(st.booleans()) and len(message) >= 12:
        message[8:12] = struct.pack("<I", zlib.crc32(bytes(message[12:])))
    return which, bytes(message)


@given(mutation=mutations())
@settings(max_examples=600, deadline=None)
def test_altered_bytes_are_a_wire_error_or_a_message_and_never_anything_else(mutation):
    which, message = mutation
    try:
        got = READERS[which](message)
    except (WireError, VersionMismatch):
        return
    assert isinstance(got, Reply if which == 0 else Broadcast)


@given(which=st.integers(0, 1), place=st.floats(0, 1, exclude_max=True), bit=st.integers(0, 7))
@settings(max_examples=300, deadline=None)
def test_one_flipped_bit_anywhere_is_noticed(which, place, bit):
    message = bytearray(MESSAGES[which])
    message[int(place * len(message))] ^= 1 << bit
    try:
        READERS[which](bytes(message))
    except (WireError, VersionMismatch):
        return
    raise AssertionError("an altered message was read")


@given(junk=st.binary(max_size=200))
@settings(max_examples=200, deadline=None)
def test_junk_is_a_wire_error(junk):
    for read in READERS:
        for message in (junk, MESSAGES[0][:12] + junk):
            try:
                read(message)
            except WireError:
                continue
            raise AssertionError("junk was read")


addends = st.lists(
    st.tuples(st.lists(st.floats(-1e3, 1e3), min_size=3, max_size=3), st.integers(-500, 500)),
    min_size=1,
    max_size=6,
)


def replies(values: Sequence[tuple[list[float], int]]) -> list[Reply]:
    cohort = tuple(f"s{i}" for i in range(len(values)))
    return [
        Reply(
            client=name,
            words=wire.words(
                Update(
                    client=name,
                    tensors={"x": torch.tensor(x, dtype=torch.float64), "n": torch.tensor([n])},
                    weight=i,
                ),
                GRID,
                cohort,
            ),
        )
        for i, (name, (x, n)) in enumerate(zip(cohort, values, strict=True))
    ]


@given(values=addends, chance=st.randoms(use_true_random=False))
@settings(max_examples=60, deadline=None)
def test_a_sum_is_the_same_whoever_answers_first(values, chance):
    answers = replies(values)
    cohort = tuple(reply.client for reply in answers)
    expected = wire.total(answers, GRID, cohort)
    chance.shuffle(answers)
    got = wire.total(answers, GRID, cohort)
    assert got.cohort == expected.cohort == cohort
    assert all(torch.equal(got.words[name], expected.words[name]) for name in ("x", "n", "weight"))


@given(values=addends, gone=st.data())
@settings(max_examples=60, deadline=None)
def test_adding_an_addend_and_removing_it_leaves_the_sum_of_the_others(values, gone):
    answers = replies(values)
    leaver = gone.draw(st.sampled_from(answers))
    rest = [reply for reply in answers if reply is not leaver]
    everyone = wire.total(answers, GRID, tuple(reply.client for reply in answers))
    negative = Aggregate(
        cohort=(leaver.client,),
        words={name: -value for name, value in leaver.words.items()},
        grid=GRID,
    )
    left = wire.add(everyone, negative)
    for name in ("x", "n", "weight"):
        of_the_rest = sum((r.words[name] for r in rest), torch.zeros_like(left.words[name]))
        assert torch.equal(left.words[name], of_the_rest)


@given(values=addends)
@settings(max_examples=60, deadline=None)
def test_a_word_is_within_half_a_step_of_its_number(values):
    for reply, (x, n) in zip(replies(values), values, strict=True):
        error = (reply.words["x"].double() / 256 - torch.tensor(x, dtype=torch.float64)).abs()
        assert float(error.max()) <= 1 / 512
        assert reply.words["n"].tolist() == [n]
