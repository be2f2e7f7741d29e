"""Lying sites in a federation: what an engine sees of them, and what stops at its door."""

from pathlib import Path

import pytest
import small_federation as small
import torch

from fedkola import server, wire
from fedkola.engines.in_process import Answer, InProcess
from fedkola.engines.lying import lying
from fedkola.errors import CohortTooSmall, Incompatible, UnknownName
from fedkola.ledger import Ledger
from fedkola.plan import Plan, Privacy, Scenario
from fedkola.quality.lies import LIES
from fedkola.types import Broadcast, Grid, Reply, Update

COHORT = ("a", "b", "c", "d")
GRID = Grid(word=32, bits=24, scale={"weight": 0, "x": 8, "metric/loss": 8})
ASKED = Broadcast(
    round=1, step="train", cohort=COHORT, tensors={}, grid=GRID, algorithm={"name": "test"}
)


def honest(name: str, number: float) -> Answer:
    def answer(message: bytes) -> bytes:
        asked = wire.unpack_broadcast(message)
        x = torch.tensor([number, 1.0])
        update = Update(client=name, tensors={"x": x}, weight=2, metrics={"loss": 0.5})
        words = wire.words(update, asked.grid, asked.cohort)
        return wire.pack_reply(
            Reply(client=name, question=wire.question(message), words=words, word=32)
        )

    return answer


SITES = {name: honest(name, number) for name, number in zip(COHORT, (1, 2, 3, 4), strict=True)}


def test_honest_sites_answer_as_before():
    engine = InProcess(lying(SITES, {"d": "sign"}))
    for reply in engine.replies(("a", "b", "c"), ASKED):
        assert reply.words["x"].tolist()[0] == 256 * (COHORT.index(reply.client) + 1)


def test_a_lie_is_sent_in_place_of_the_answer():
    engine = InProcess(lying(SITES, {"d": "sign"}))
    updates = {update.client: update for update in engine.each(COHORT, ASKED)}
    assert updates["d"].tensors["x"].tolist() == [-12.0, -3.0]
    assert updates["d"].weight == 2
    assert updates["d"].metrics == {"loss": 0.5}


def test_liars_know_the_honest_answers_and_how_many_they_are():
    engine = InProcess(lying(SITES, {"c": "ipm", "d": "ipm"}))
    found = wire.mean(engine.sum(COHORT, ASKED))["x"]
    # Addends 1, 2 and twice -0.5 * 0.75 * 2, over a weight of 8.
    assert found[0].item() == pytest.approx((1 + 2 - 1.5) / 8)


@pytest.mark.parametrize("lie", ["not_finite", "wrong_keys", "huge_weight"])
def test_lies_that_no_honest_library_could_send_are_refused(lie: str):
    engine = InProcess(lying(SITES, {"d": lie}))
    found = engine.sum(COHORT, ASKED)
    assert found.cohort == ("a", "b", "c")
    assert found.words["x"].tolist() == [6 * 256, 3 * 256]
    assert engine.tally().refused == {"d": "WireError"}


def test_plans_name_lies_that_exist_and_sums_that_can_be_seen():
    with pytest.raises(UnknownName, match=r"scenario.liars.a = 'lie'"):
        server.check(Plan(scenario=Scenario(liars={"a": "lie"})))
    with pytest.raises(Incompatible, match="leave one of them out"):
        server.check(Plan(scenario=Scenario(liars={"a": "sign"}), privacy=Privacy(secure_sum=True)))
    for lie in LIES:
        server.check(Plan(scenario=Scenario(liars={"a": lie})))


def reports(folder: Path, *settings: str) -> tuple[list[dict[str, str]], object]:
    """Refusals of each round, and the final weights, of two rounds of averaging."""
    federation = small.assemble(
        folder, "algorithm.name=fedit", "run.rounds=2", "cohort.minimum=3", *settings
    )
    state = small.run(federation)
    with Ledger.open(folder) as ledger:
        rows = ledger.rounds(ledger.run().id)
        return [dict(row.report["refused"]) for row in rows], state


@pytest.mark.parametrize("lie", ["not_finite", "wrong_keys", "huge_weight"])
def test_the_report_of_a_round_names_a_site_whose_lie_was_refused(tmp_path: Path, lie: str):
    refused, state = reports(tmp_path / "a", f"scenario.liars.west={lie}")
    assert refused == [{"west": "WireError"}] * 2
    # The weights are those of a federation in which that site answers garbage.
    garbage, other = reports(tmp_path / "b", "scenario.liars.west=wrong_keys")
    assert garbage == refused
    assert all(torch.equal(v, other.weights[n]) for n, v in state.weights.items())


def test_a_site_that_claims_too_many_records_is_refused(tmp_path: Path):
    assert reports(tmp_path / "a", "cohort.records=30")[0] == [{}] * 2
    with pytest.raises(CohortTooSmall):
        reports(tmp_path / "b", "cohort.records=1")


def test_a_lie_within_bounds_is_summed_and_moves_the_model(tmp_path: Path):
    honest, state = reports(tmp_path / "a")
    lying_, moved = reports(tmp_path / "b", "scenario.liars.west=sign")
    assert honest == lying_ == [{}] * 2
    assert any(not torch.equal(v, moved.weights[n]) for n, v in state.weights.items())
