"""The stamp on every question, and the refusal to run without a guard that was asked for."""

import pytest
import torch

from fedkola import wire
from fedkola.engines.in_process import InProcess
from fedkola.errors import GuardMissing
from fedkola.privacy.guards import Guarded
from fedkola.types import Broadcast, Grid, Reply

GRID = Grid(word=32, bits=32, scale={"weight": 0})


def asked(round: int, *, seed: int = 0) -> Broadcast:
    return Broadcast(round=round, step="s", seed=seed, tensors={}, grid=GRID, algorithm={})


def heard(*questions: Broadcast, seed: int = 7, run: str = "r") -> list[Broadcast]:
    """The questions as they reach a site."""
    got: list[Broadcast] = []

    def answer(message: bytes) -> bytes:
        got.append(wire.unpack_broadcast(message))
        words = {"weight": torch.tensor(1).int()}
        return wire.pack_reply(Reply(client="a", question=wire.question(message), words=words))

    clients = Guarded(InProcess({"a": answer}), run=run, seed=seed)
    for question in questions:
        clients.sum(("a",), question)
        assert [update.weight for update in clients.each(("a",), question)] == [1.0]
    assert clients.roster() == ("a",)
    assert clients.tally().bytes_up > 0
    return got


def test_every_question_carries_run_cohort_and_a_seed_of_its_own():
    summed, single, next_round, _ = heard(asked(1), asked(2))
    assert (summed.run, summed.cohort) == ("r", ("a",))
    assert summed.seed == single.seed != next_round.seed


def test_the_seed_is_a_function_of_plan_round_and_exchange():
    seeds = [q.seed for q in heard(asked(1), asked(2), asked(2, seed=1))]
    assert seeds == [q.seed for q in heard(asked(1), asked(2), asked(2, seed=1), run="other")]
    assert len(set(seeds)) == 3
    assert not set(seeds) & {q.seed for q in heard(asked(1), asked(2), seed=8)}
    assert all(0 <= seed < 2**63 for seed in seeds)


def test_a_guard_that_does_not_exist_stops_the_run_before_it_starts():
    with pytest.raises(GuardMissing, match="clip"):
        Guarded(InProcess({"a": bytes}), run="r", seed=0, guards=({"name": "clip"},))
