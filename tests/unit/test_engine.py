"""The in-process engine: what a site does wrong is its own refusal, never an error of the round."""

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch

from fedkola import wire
from fedkola.engines import ENGINES
from fedkola.engines.in_process import InProcess
from fedkola.errors import CohortTooSmall, Unreachable
from fedkola.types import Broadcast, Grid, Reply, Update, Weights

GRID = Grid(word=32, bits=32, scale={"weight": 0, "x": 0})
ASKED = Broadcast(round=1, step="count", tensors={}, grid=GRID, algorithm={})
Answer = Callable[[bytes], bytes]


def counting(name: str, number: int) -> Answer:
    """A site that answers a number."""

    def answer(message: bytes) -> bytes:
        asked = wire.unpack_broadcast(message)
        update = Update(client=name, tensors={"x": torch.tensor([number])}, weight=1)
        return answered(message, name, wire.words(update, asked.grid, ("a",)))

    return answer


def answered(message: bytes, name: str, words: Weights) -> bytes:
    return wire.pack_reply(Reply(client=name, question=wire.question(message), words=words))


def three(**others: Answer) -> dict[str, Answer]:
    return {"a": counting("a", 1), "b": counting("b", 10), "c": counting("c", 100), **others}


@pytest.mark.parametrize("order", [0, 1, 2, 17])
def test_the_sum_is_the_same_in_any_order_of_arrival(order: int):
    engine = InProcess(three(), order=order)
    found = engine.sum(("a", "b", "c"), ASKED)
    assert found.cohort == ("a", "b", "c")
    assert found.words["x"].tolist() == [111]
    arrived = [reply.client for reply in engine.replies(("a", "b", "c"), ASKED)]
    assert sorted(arrived) == ["a", "b", "c"]


def test_shuffled_arrival_does_shuffle():
    engine = InProcess(three(), order=3)
    orders = {tuple(r.client for r in engine.replies(("a", "b", "c"), ASKED)) for _ in range(20)}
    assert len(orders) > 2


def test_each_gives_single_answers_as_numbers():
    updates = list(InProcess(three()).each(("b", "a"), ASKED))
    assert [(u.client, u.tensors["x"].tolist(), u.weight) for u in updates] == [
        ("b", [10.0], 1.0),
        ("a", [1.0], 1.0),
    ]


def garbage(message: bytes) -> bytes:
    return b"\x80\x04no message of ours"


def raising(message: bytes) -> bytes:
    raise OSError("disk full")


def of_another_version(message: bytes) -> bytes:
    return b"FKW9" + counting("c", 100)(message)[4:]


def as_someone_else(message: bytes) -> bytes:
    return counting("a", 100)(message)


def with_another_name(message: bytes) -> bytes:
    words = {"y": torch.zeros(1, dtype=torch.int32), "weight": torch.tensor(1, dtype=torch.int32)}
    return answered(message, "c", words)


def in_floats(message: bytes) -> bytes:
    return answered(message, "c", {"x": torch.ones(1), "weight": torch.tensor(1.0)})


def in_another_shape(message: bytes) -> bytes:
    update = Update(client="c", tensors={"x": torch.zeros(5, dtype=torch.int64)}, weight=1)
    return answered(message, "c", wire.words(update, GRID, ("c",)))


def to_another_question(message: bytes) -> bytes:
    return counting("c", 100)(wire.pack_broadcast(replace(ASKED, round=9)))


def refusing(message: bytes) -> bytes:
    return wire.pack_reply(Reply(client="c", refused="PolicyRefused"))


@pytest.mark.parametrize(
    ("answer", "code"),
    [
        (garbage, "WireError"),
        (of_another_version, "VersionMismatch"),
        (as_someone_else, "WireError"),
        (with_another_name, "WireError"),
        (to_another_question, "StaleUpdate"),
        (in_floats, "WireError"),
        (in_another_shape, "WireError"),
        (raising, "Unreachable"),
        (refusing, "PolicyRefused"),
    ],
)
@pytest.mark.parametrize("first", [True, False])
def test_a_site_that_misbehaves_is_refused_and_the_others_are_summed(
    answer: Answer, code: str, first: bool
):
    engine = InProcess(three(c=answer))
    cohort = ("c", "a", "b") if first else ("a", "b", "c")
    found = engine.sum(cohort, ASKED)
    assert found.cohort == ("a", "b")
    assert found.words["x"].tolist() == [11]
    assert engine.tally().refused == {"c": code}


def test_a_site_that_is_not_there_is_unreachable():
    engine = InProcess(three())
    assert engine.sum(("a", "z"), ASKED).cohort == ("a",)
    assert engine.tally().refused == {"z": "Unreachable"}
    with pytest.raises(CohortTooSmall):
        engine.sum(("z",), ASKED)


def test_the_tally_counts_bytes_both_ways_and_starts_again():
    engine = InProcess(three())
    engine.sum(("a", "b", "c"), ASKED)
    tally = engine.tally()
    message = wire.pack_broadcast(ASKED)
    assert tally.bytes_down == 3 * len(message)
    assert tally.bytes_up == sum(len(answer(message)) for answer in three().values())
    assert engine.tally() == type(tally)()


def test_an_engine_without_sites_is_refused():
    with pytest.raises(Unreachable, match="at least one site"):
        InProcess({})


@pytest.mark.parametrize("name", ENGINES)
def test_every_engine_knows_its_roster(name: str):
    assert ENGINES[name](three()).roster() == ("a", "b", "c")
