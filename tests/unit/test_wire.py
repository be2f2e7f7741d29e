"""Messages keep every bit, sums of integers are exact, and what does not fit is refused."""

import json
import struct
import zlib
from dataclasses import dataclass, replace

import pytest
import safetensors.torch
import torch
from torch import Tensor

from fedkola import wire
from fedkola.errors import (
    CohortTooSmall,
    GridOverflow,
    LedgerError,
    NotFinite,
    VersionMismatch,
    WireError,
)
from fedkola.types import Aggregate, Broadcast, Grid, Reply, Update

DTYPES = (
    *(torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64),
    *(torch.float16, torch.bfloat16, torch.float32, torch.float64),
)
GRID = Grid(word=32, bits=32, scale={"weight": 0, "x": 4})


def question(**changes: object) -> Broadcast:
    whole = Broadcast(
        run="r",
        round=3,
        seed=2**62 - 1,
        step="vote",
        cohort=("nord", "süd"),
        tensors={"a": torch.arange(6).reshape(2, 3), "none": torch.zeros(0, 4)},
        grid=Grid(word=64, bits=40, scale={"weight": 0, "a": 20}),
        algorithm={"name": "FedKoLa", "lr": 1e-3, "level": 1, "on": True, "half_life": None},
        guards=({"name": "clip", "bound": 1.0},),
    )
    return replace(whole, **changes)


def framed(header: object, body: bytes = b"", *, version: bytes = b"1") -> bytes:
    """A message with a right checksum around whatever header and body are given."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    body = body or wire.pack_reply(Reply(client="s"))[-16:]
    crc = zlib.crc32(body, zlib.crc32(text))
    return b"FKW" + version + struct.pack("<II", len(text), crc) + text + body


def header_of(message: bytes) -> dict:
    (length,) = struct.unpack("<I", message[4:8])
    return json.loads(message[12 : 12 + length])


def addend(value: float, *, client: str, weight: float = 1.0) -> Reply:
    update = Update(client=client, tensors={"x": torch.tensor([value * weight])}, weight=weight)
    return Reply(client=client, words=wire.words(update, GRID, ("a", "b", "c")))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_dtype_crosses_the_wire_bit_for_bit(dtype: torch.dtype):
    sent = (torch.arange(24).reshape(2, 3, 4) % 5).to(dtype)
    got = wire.unpack_reply(wire.pack_reply(Reply(client="s", words={"x": sent}))).words["x"]
    assert got.dtype == dtype
    assert got.shape == sent.shape
    assert torch.equal(got, sent)


def test_extreme_bfloat16_and_negative_zero_keep_their_bits():
    sent = torch.tensor([-0.0, 3.3895e38, 9.2e-41, float("inf"), float("nan")]).bfloat16()
    got = wire.unpack_reply(wire.pack_reply(Reply(client="s", words={"x": sent}))).words["x"]
    assert torch.equal(got.view(torch.int16), sent.view(torch.int16))


def test_a_question_crosses_the_wire_whole():
    asked = question()
    got = wire.unpack_broadcast(wire.pack_broadcast(asked))
    assert replace(got, tensors={}) == replace(asked, tensors={})
    assert set(got.tensors) == {"a", "none"}
    assert torch.equal(got.tensors["a"], asked.tensors["a"])
    assert got.tensors["none"].shape == (0, 4)


def test_one_question_has_one_form_in_bytes():
    first = question(algorithm={"name": "FedIT", "lr": 0.1})
    second = question(algorithm={"lr": 0.1, "name": "FedIT"})
    assert wire.pack_broadcast(first) == wire.pack_broadcast(second)


def test_two_names_for_one_tensor_both_arrive():
    x = torch.arange(4.0)
    sent = {"a": x, "b": x, "half": x[:2], "turned": x.reshape(2, 2).T}
    got = wire.unpack_reply(wire.pack_reply(Reply(client="s", words=sent))).words
    assert all(torch.equal(got[name], value) for name, value in sent.items())


def test_another_version_is_named_as_such():
    message = wire.pack_reply(Reply(client="s"))
    with pytest.raises(VersionMismatch, match="this side speaks 1"):
        wire.unpack_reply(message[:3] + b"2" + message[4:])


def test_a_message_that_was_cut_at_any_place_is_refused():
    message = wire.pack_reply(Reply(client="s", words={"x": torch.arange(5)}))
    for length in range(len(message)):
        with pytest.raises(WireError):
            wire.unpack_reply(message[:length])
    with pytest.raises(WireError):
        wire.unpack_reply(message + b"\0")


def test_a_message_beyond_the_limit_is_refused_before_it_is_read():
    message = wire.pack_reply(Reply(client="s", words={"x": torch.zeros(1000)}))
    assert wire.unpack_reply(message, max_bytes=8000).client == "s"
    with pytest.raises(WireError, match="at most 3000"):
        wire.unpack_reply(message, max_bytes=3000)


def test_a_header_length_that_lies_is_refused():
    message = wire.pack_reply(Reply(client="s"))
    for length in (2**32 - 1, wire.MAX_HEADER_BYTES + 1, len(message)):
        with pytest.raises(WireError, match="header length"):
            wire.unpack_reply(message[:4] + struct.pack("<I", length) + message[8:])


def test_a_question_is_not_an_answer():
    with pytest.raises(WireError, match="expected a reply"):
        wire.unpack_reply(wire.pack_broadcast(question()))
    with pytest.raises(WireError, match="expected a broadcast"):
        wire.unpack_broadcast(wire.pack_reply(Reply(client="s")))


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("round", float("inf")),
        ("round", "3"),
        ("round", True),
        ("seed", None),
        ("step", ["vote"]),
        ("cohort", "abc"),
        ("cohort", [1, 2]),
        ("cohort", {"a": 1}),
        ("algorithm", [["name", "x"]]),
        ("algorithm", {"name": {"nested": 1}}),
        ("guards", [[]]),
        ("grid", []),
        ("grid", {"word": 24, "bits": 24, "scale": {}}),
        ("grid", {"word": 32, "bits": 33, "scale": {}}),
        ("grid", {"word": [32], "bits": 32, "scale": {}}),
        ("grid", {"word": 32, "bits": 32, "scale": ["x"]}),
        ("grid", {"word": 32, "bits": 32, "scale": {"x": 10**6}}),
        ("grid", {"word": 32, "bits": 32, "scale": {"x": -1}}),
        ("grid", {"word": 32, "bits": 32, "scale": {"x": 1.5}}),
    ],
)
def test_a_header_with_a_wrong_field_is_refused(field: str, value: object):
    header = header_of(wire.pack_broadcast(question())) | {field: value}
    with pytest.raises(WireError, match=r"drop the message"):
        wire.unpack_broadcast(framed(header))


@pytest.mark.parametrize(
    "header", [b"", b"\xff\xfe", b"[1]", b"null", b"[" * 100_000, b"9" * 10_000, b"{"]
)
def test_a_header_that_is_no_object_is_refused(header: bytes):
    with pytest.raises(WireError):
        wire.unpack_reply(framed(header))


def test_a_body_that_is_no_safetensors_is_refused():
    header = {"kind": "reply", "client": "s", "question": "", "refused": "", "word": 0}
    assert wire.unpack_reply(framed(header)).client == "s"
    for body in (b"\x80\x04K\x01.", b"\xff" * 64, struct.pack("<Q", 2**63) + b"{}"):
        with pytest.raises(WireError):
            wire.unpack_reply(framed(header, body))


def test_more_dimensions_than_any_tensor_of_ours_are_refused():
    with pytest.raises(WireError, match="8 dimensions"):
        wire.pack_reply(Reply(client="s", words={"x": torch.zeros(*[1] * 9)}))


# --- fixed point ----------------------------------------------------------------------------------


def test_halves_go_to_the_even_integer():
    grid = Grid(word=16, bits=16, scale={"weight": 0, "x": 1})
    halves = torch.tensor([0.25, 0.75, 1.25, -0.25, -0.75, 1.26], dtype=torch.float64)
    got = wire.words(Update(client="s", tensors={"x": halves}, weight=2), grid, ("s",))
    assert got["x"].tolist() == [0, 2, 2, 0, -2, 3]
    assert got["x"].dtype == torch.int16
    assert got["weight"].item() == 2


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_a_value_that_is_not_finite_stays_at_its_site(value: float):
    for update in (
        Update(client="s", tensors={"x": torch.tensor([1.0, value])}, weight=1),
        Update(client="s", tensors={"x": torch.tensor([1.0])}, weight=value),
    ):
        with pytest.raises(NotFinite, match="stays at its site"):
            wire.words(update, GRID, ("s",))


@pytest.mark.parametrize(("word", "dtype"), [(24, torch.int32), (40, torch.int64)])
def test_words_of_odd_sizes_are_as_many_bytes_on_their_way(word: int, dtype: torch.dtype):
    value = torch.tensor([[0, 1, -1], [2 ** (word - 1) - 1, -(2 ** (word - 1)), 77]], dtype=dtype)
    sent = wire.pack_reply(Reply(client="s", words={"x": value, "n": value[0, 1]}, word=word))
    got = wire.unpack_reply(sent)
    assert torch.equal(got.words["x"], value)
    assert got.words["x"].dtype == dtype
    assert got.words["n"].item() == 1
    large = torch.zeros(1000, dtype=dtype)
    packed = len(wire.pack_reply(Reply(client="s", words={"x": large}, word=word)))
    plain = len(wire.pack_reply(Reply(client="s", words={"x": large})))
    assert plain - packed == pytest.approx(1000 * (dtype.itemsize - word // 8), abs=8)


@pytest.mark.parametrize("words", [{"x": torch.zeros(3)}, {"x": torch.zeros(4, 2).byte()}])
def test_a_body_that_is_not_of_24_bits_is_refused(words: dict[str, torch.Tensor]):
    header = {"kind": "reply", "client": "s", "question": "", "refused": "", "word": 24}
    with pytest.raises(WireError, match="24 bits"):
        wire.unpack_reply(framed(header, safetensors.torch.save(words)))


def test_an_addend_may_fill_a_word_whose_sum_is_bounded():
    grid = Grid(word=24, bits=24, scale={"weight": 0, "x": 0}, bounded=True)
    cohort = ("a", "b", "c")

    def reply(name: str, value: int) -> Reply:
        update = Update(client=name, tensors={"x": torch.tensor([value])}, weight=0)
        return Reply(client=name, words=wire.words(update, grid, cohort), word=24)

    most = 2**23 - 1
    found = wire.total([reply("a", most - 1), reply("b", 1)], grid, cohort)
    assert found.words["x"].tolist() == [most]
    with pytest.raises(GridOverflow):
        wire.total([reply("a", most), reply("b", 1)], grid, cohort)
    with pytest.raises(GridOverflow):
        reply("a", most + 1)
    with pytest.raises(GridOverflow):
        wire.words(
            Update(client="a", tensors={"x": torch.tensor([most])}, weight=0),
            replace(grid, bounded=False),
            cohort,
        )


@pytest.mark.parametrize(("word", "dtype"), [(16, torch.int16), (32, torch.int32)])
def test_the_largest_addend_is_the_one_the_whole_cohort_can_send(word: int, dtype: torch.dtype):
    grid = Grid(word=word, bits=word, scale={"weight": 0, "x": 0})
    cohort = ("a", "b", "c")
    most = (2 ** (word - 1) - 1) // 3
    replies = [
        Reply(
            client=name,
            words=wire.words(
                Update(client=name, tensors={"x": torch.tensor([sign * most])}, weight=0),
                grid,
                cohort,
            ),
        )
        for sign in (1, -1)
        for name in cohort
    ]
    assert wire.total(replies[:3], grid, cohort).words["x"].item() == 3 * most
    assert wire.total(replies[3:], grid, cohort).words["x"].item() == -3 * most
    for too_large in (torch.tensor([most + 1]), torch.tensor([-most - 1.0], dtype=torch.float64)):
        with pytest.raises(GridOverflow, match="3 sites"):
            wire.words(Update(client="a", tensors={"x": too_large}, weight=0), grid, cohort)


def test_a_number_beyond_the_widest_word_is_refused_and_does_not_wrap():
    grid = Grid(word=64, bits=64, scale={"weight": 0, "x": 0})
    for value in (torch.tensor([2.0**63]), torch.tensor([1e300], dtype=torch.float64)):
        with pytest.raises(GridOverflow):
            wire.words(Update(client="a", tensors={"x": value}, weight=0), grid, ("a",))
    least = torch.tensor([-(2**63)])
    with pytest.raises(GridOverflow):
        wire.words(Update(client="a", tensors={"x": least}, weight=0), grid, ("a",))


def test_fewer_bits_than_the_word_bound_every_addend():
    grid = Grid(word=32, bits=8, scale={"weight": 0, "x": 0})
    fits = Update(client="a", tensors={"x": torch.tensor([127, -127])}, weight=0)
    assert wire.words(fits, grid, ("a",))["x"].tolist() == [127, -127]
    with pytest.raises(GridOverflow, match="128"):
        wire.words(replace(fits, tensors={"x": torch.tensor([128])}), grid, ("a",))


def test_an_answer_must_hold_exactly_the_names_that_were_asked():
    for tensors in ({}, {"x": torch.zeros(1), "y": torch.zeros(1)}):
        with pytest.raises(WireError, match="differ in the names"):
            wire.words(Update(client="a", tensors=tensors, weight=1), GRID, ("a",))
    update = Update(client="a", tensors={"x": torch.zeros(1)}, weight=1, metrics={"loss": 1.0})
    with pytest.raises(WireError, match="metric/loss"):
        wire.words(update, GRID, ("a",))


def test_an_integer_tensor_passes_unscaled_or_not_at_all():
    with pytest.raises(WireError, match="its scale must be 0"):
        wire.words(Update(client="a", tensors={"x": torch.tensor([1])}, weight=1), GRID, ("a",))


# --- sums -----------------------------------------------------------------------------------------


def test_the_mean_is_weighted():
    replies = [addend(1.0, client="a", weight=1), addend(4.0, client="b", weight=3)]
    found = wire.mean(wire.total(replies, GRID, ("a", "b")))
    assert set(found) == {"x"}
    assert found["x"].dtype == torch.float32
    assert found["x"].tolist() == [3.25]


def test_the_mean_of_no_weight_is_zero():
    found = wire.mean(wire.total([addend(5.0, client="a", weight=0)], GRID, ("a",)))
    assert found["x"].tolist() == [0.0]


def test_metrics_are_summed_and_kept_apart():
    grid = Grid(word=32, bits=32, scale={"weight": 0, "x": 0, "metric/loss": 3})
    replies = [
        Reply(
            client=name,
            words=wire.words(
                Update(client=name, tensors={"x": torch.ones(1)}, weight=2, metrics={"loss": loss}),
                grid,
                ("a", "b"),
            ),
        )
        for name, loss in (("a", 0.5), ("b", 1.25))
    ]
    total = wire.total(replies, grid, ("a", "b"))
    assert wire.metrics(total) == {"loss": 1.75}
    assert set(wire.mean(total)) == {"x"}
    one = wire.single(replies[1], grid)
    assert (one.client, one.weight, dict(one.metrics)) == ("b", 2.0, {"loss": 1.25})
    assert one.tensors["x"].tolist() == [1.0]


def test_a_refusal_is_left_out_and_not_counted_in_the_cohort():
    replies = [addend(1.0, client="c"), Reply(client="a", refused="StepFailed")]
    total = wire.total(replies, GRID, ("a", "b", "c"))
    assert total.cohort == ("c",)
    assert total.words["x"].tolist() == [16]


def test_nobody_answering_is_an_error():
    with pytest.raises(CohortTooSmall, match="none of the 2 sites"):
        wire.total([Reply(client="a", refused="NotFinite")], GRID, ("a", "b"))


def test_a_sum_does_not_change_the_answers_it_was_made_of():
    replies = [addend(1.0, client="a"), addend(2.0, client="b")]
    wire.total(replies, GRID, ("a", "b"))
    assert replies[0].words["x"].tolist() == [16]


@pytest.mark.parametrize("first", [0, 1, 2])
def test_one_answer_of_another_shape_is_left_out_whenever_it_comes(first: int):
    odd = Reply(
        client="odd", words={"x": torch.zeros(7, dtype=torch.int32), "weight": torch.ones(1)}
    )
    replies = [addend(1.0, client="a"), addend(2.0, client="b")]
    replies.insert(first, odd)
    total = wire.total(replies, GRID, ("odd", "a", "b"))
    assert total.cohort == ("a", "b")
    assert total.words["x"].tolist() == [48]


def test_two_answers_of_two_shapes_are_no_sum():
    odd = Reply(client="odd", words={"x": torch.zeros(7, dtype=torch.int32)})
    with pytest.raises(WireError, match="different shapes"):
        wire.total([addend(1.0, client="a"), odd], GRID, ("odd", "a"))


def asking(grid: Grid, *, weightless: bool = False) -> Broadcast:
    return Broadcast(
        round=1,
        step="s",
        cohort=("a", "b"),
        tensors={},
        grid=grid,
        algorithm={},
        weightless=weightless,
    )


def test_an_answer_in_other_words_than_the_grid_is_refused():
    right = addend(1.0, client="a")
    wire.check_reply(right, asking(GRID))
    wide = {name: value.to(torch.int64) for name, value in right.words.items()}
    real = {name: value.to(torch.float32) for name, value in right.words.items()}
    more = {**right.words, "y": torch.zeros(1, dtype=torch.int32)}
    for words in (wide, real, more, {}):
        with pytest.raises(WireError, match="not summed"):
            wire.check_reply(Reply(client="a", words=words), asking(GRID))


def of(number: int, weight: int) -> Reply:
    words = {"x": torch.tensor([number], dtype=torch.int32)}
    words["weight"] = torch.tensor(weight, dtype=torch.int32)
    return Reply(client="a", words=words)


def test_an_answer_beyond_what_a_site_may_add_is_refused():
    grid = Grid(word=32, bits=32, scale={"weight": 0, "x": 4})
    most = (2**31 - 1) // 2
    wire.check_reply(of(most, 1), asking(grid))
    wire.check_reply(of(-most, most), asking(grid))
    for number, weight in ((most + 1, 1), (-most - 1, 1), (0, most + 1), (-(2**31), 1)):
        with pytest.raises(WireError, match="not summed"):
            wire.check_reply(of(number, weight), asking(grid))
    wire.check_reply(of(most + 1, 1), asking(replace(grid, bounded=True)))


def test_a_weight_below_0_or_beyond_the_most_records_is_refused():
    grid = Grid(word=32, bits=32, scale={"weight": 2, "x": 4})
    wire.check_reply(of(1, 40), asking(grid), most=10)
    for weight in (41, -4):
        with pytest.raises(WireError, match="expected 0 to 10"):
            wire.check_reply(of(1, weight), asking(grid), most=10)
    with pytest.raises(WireError, match="expected 0 to any"):
        wire.check_reply(of(1, -4), asking(grid))
    wire.check_reply(of(1, -4), asking(grid, weightless=True), most=10)
    with pytest.raises(WireError, match="answered for -11 records"):
        wire.check_reply(of(1, -44), asking(grid, weightless=True), most=10)


def test_numbers_of_no_record_are_refused_unless_something_is_taken_back():
    wire.check_reply(of(0, 0), asking(GRID))
    with pytest.raises(WireError, match="no record at all"):
        wire.check_reply(of(1, 0), asking(GRID))
    wire.check_reply(of(1, 0), asking(GRID, weightless=True))


def test_a_refusal_is_one_word_and_no_text():
    wire.check_reply(Reply(client="a", refused="PolicyRefused"), asking(GRID))
    for refused in ("<script>", "a b", "x" * 65):
        with pytest.raises(WireError, match="no code"):
            wire.check_reply(Reply(client="a", refused=refused), asking(GRID))


def test_a_question_says_only_where_it_is_so_that_answers_take_back():
    plain, back = asking(GRID), asking(GRID, weightless=True)
    assert b"weightless" not in wire.pack_broadcast(plain)
    assert wire.unpack_broadcast(wire.pack_broadcast(plain)).weightless is False
    assert wire.unpack_broadcast(wire.pack_broadcast(back)).weightless is True


def test_a_sum_that_leaves_its_word_is_refused_and_does_not_wrap():
    def whole(value: int) -> Aggregate:
        return Aggregate(
            cohort=("a",), words={"x": torch.tensor([0, value], dtype=torch.int32)}, grid=GRID
        )

    assert wire.add(whole(2**31 - 2), whole(1)).words["x"].tolist() == [0, 2**31 - 1]
    assert wire.add(whole(-(2**31)), whole(2**31 - 1)).words["x"].tolist() == [0, -1]
    for left, right in ((2**31 - 1, 1), (-(2**31), -1)):
        with pytest.raises(GridOverflow, match="leaves its word"):
            wire.add(whole(left), whole(right))


def test_sums_of_other_names_shapes_or_grids_are_not_added():
    one = Aggregate(cohort=("a",), words={"x": torch.zeros(2, dtype=torch.int32)}, grid=GRID)
    for other in (
        replace(one, words={"y": torch.zeros(2, dtype=torch.int32)}),
        replace(one, words={"x": torch.zeros(1, dtype=torch.int32)}),
        replace(one, grid=replace(GRID, bits=31)),
    ):
        with pytest.raises(WireError, match="cannot be added"):
            wire.add(one, other)


# --- states ---------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Leaf:
    name: str
    span: tuple[float, float | None]
    x: Tensor


@dataclass(frozen=True, kw_only=True)
class Tree:
    leaves: tuple[Leaf, ...]
    by_name: dict[str, Leaf]
    grid: Grid | None = None


def test_a_state_is_the_same_after_saving_and_loading():
    leaf = Leaf(name="a", span=(1.0, None), x=torch.tensor([1, 2]))
    tree = Tree(leaves=(leaf, replace(leaf, name="b", span=(0.0, 2.5))), by_name={"k": leaf})
    document, tensors = wire.dump(tree)
    again = wire.load(Tree, json.loads(json.dumps(document)), tensors)
    assert again.leaves[1].span == (0.0, 2.5)
    assert again.leaves[0].span == (1.0, None)
    assert again.grid is None
    assert torch.equal(again.by_name["k"].x, leaf.x)
    assert wire.dump(again)[0] == document
    assert wire.load(Tree, wire.dump(replace(tree, grid=GRID))[0], tensors).grid == GRID


def test_a_state_that_does_not_fit_is_an_error_of_the_ledger():
    leaf = Leaf(name="a", span=(1.0, None), x=torch.tensor([1, 2]))
    document, tensors = wire.dump(Tree(leaves=(leaf,), by_name={}))
    for broken in (
        {},
        {**document, "leaves": [{}]},
        {**document, "leaves": 3},
        {**document, "by_name": []},
        {**document, "grid": {"word": 32}},
    ):
        with pytest.raises(LedgerError, match="does not fit Tree"):
            wire.load(Tree, broken, tensors)
    with pytest.raises(LedgerError):
        wire.load(Tree, document, {})


def test_what_a_state_cannot_keep_is_refused_when_it_is_saved():
    leaf = Leaf(name="a", span=(float("inf"), None), x=torch.tensor([1]))
    with pytest.raises(LedgerError, match=r"span\.0 holds inf"):
        wire.dump(leaf)
    x = torch.tensor([1])
    with pytest.raises(LedgerError, match="one place"):
        wire.dump({"a.b": x, "a": {"b": x}})
