"""The leakage gate: what a site refuses to let out, by which rule, and what the report says."""

import json
import time
from dataclasses import replace
from pathlib import Path

import pytest
import small_pretraining as small

from fedkola import server, wire
from fedkola.audit import transcript
from fedkola.errors import CohortTooSmall, PolicyRefused
from fedkola.plan import Demands
from fedkola.privacy import policy
from fedkola.privacy.behind import Behind
from fedkola.privacy.policy import Answer

GOOD = Answer(
    sites=3,
    masked=True,
    noisy=False,
    tables=(),
    width=16,
    rank=0,
    behind=Behind(kind="whole", sequences=((1,) * 64,), steps=8, adaptive=True),
)
PASSED = {"protocol": "p", "passed": True, "at": 1000.0}


def code(answer: Answer, demands: Demands = Demands(), **given: object) -> str:  # noqa: B008
    """The rule that refused, "" for none."""
    arguments = {"protocol": "p", "rehearsal": None, "now": 2000.0, **given}
    try:
        policy.gate(demands, answer, **arguments)
    except PolicyRefused as error:
        return error.code
    return ""


def trained(**changes: object) -> Answer:
    return replace(GOOD, behind=replace(GOOD.behind, **changes))


def test_an_answer_that_every_rule_lets_through():
    assert code(GOOD) == ""


@pytest.mark.parametrize(
    ("answer", "refused"),
    [
        (replace(GOOD, masked=False), "gate_cohort"),
        (replace(GOOD, sites=2), "gate_cohort"),
        (replace(GOOD, masked=False, noisy=True), "gate_cohort"),
        (trained(sequences=((1,) * 63,)), "gate_span"),
        (trained(steps=7), "gate_span"),
        (trained(adaptive=False), "gate_span"),
        (replace(GOOD, tables=("wte",)), "gate_embedding"),
    ],
)
def test_each_rule_refuses_at_its_bound(answer: Answer, refused: str):
    assert code(answer) == refused


@pytest.mark.parametrize(
    ("answer", "demands"),
    [
        (replace(GOOD, masked=False, sites=1), Demands(plain=True)),
        (trained(steps=1), Demands(waive=("gate_span",))),
        (replace(trained(steps=1, sequences=()), noisy=True), Demands()),
        (replace(GOOD, tables=("wte",)), Demands(embedding="presence-disclosed")),
        (replace(GOOD, tables=("wte",), noisy=True), Demands()),
    ],
)
def test_only_the_rule_that_is_named_is_lifted(answer: Answer, demands: Demands):
    assert code(answer, demands) == ""
    assert code(answer) != "" or answer.noisy


def test_adapters_of_a_language_model_need_more_tokens_than_their_rank_times_four():
    adapter = replace(trained(kind="adapter", sequences=((1,) * 31,)), rank=8)
    assert code(adapter) == "gate_adapters"
    assert code(adapter, Demands(waive=("gate_adapters",))) == ""
    assert code(replace(adapter, rank=7)) == ""
    assert code(replace(adapter, rank=0)) == ""


@pytest.mark.parametrize(
    ("rehearsal", "refused"),
    [
        (PASSED, ""),
        (None, "gate_rehearsal"),
        ({**PASSED, "protocol": "q"}, "gate_rehearsal"),
        ({**PASSED, "passed": False}, "gate_rehearsal"),
        ({**PASSED, "at": 2000.0 - 2 * policy.DAY - 1}, "gate_rehearsal"),
        ({**PASSED, "at": 3000.0}, "gate_rehearsal"),
    ],
)
def test_a_rehearsal_must_be_of_this_protocol_young_and_passed(
    rehearsal: dict[str, object] | None, refused: str
):
    assert code(GOOD, Demands(rehearsal_days=2), rehearsal=rehearsal) == refused


def test_a_statistic_behind_which_no_training_stands_is_not_governed():
    assert code(replace(GOOD, masked=False, tables=("wte",), behind=Behind())) == ""


LONG = ("pretrain.inner_steps=8", "pretrain.batch=4", "site.waive=[]")


@pytest.mark.parametrize(
    ("settings", "refused"),
    [
        (("site.plain=false",), "gate_cohort"),
        (('site.embedding="refuse"',), "gate_embedding"),
        (("site.waive=[]",), "gate_span"),
    ],
)
def test_a_plan_that_every_site_would_refuse_is_refused_before_round_1(
    settings: tuple[str, ...], refused: str
):
    with pytest.raises(PolicyRefused) as caught:
        server.check(small.plan(*settings))
    assert caught.value.code == refused


def test_a_refused_answer_stays_at_its_site_and_its_code_reaches_the_report(tmp_path: Path):
    session = small.session(tmp_path, *LONG, "run.rounds=1")
    north = session.federation.sites["north"]
    north._demands = replace(north._demands, rehearsal_days=1.0)
    reports = []
    with session.ledger:
        server.run(
            session.federation,
            session.ledger,
            observe=lambda number, state: {},
            progress=reports.append,
        )
    assert reports[0].refused == {"north": "gate_rehearsal"}
    assert not list((north.store / "outbox").glob("*/*"))
    recorded = transcript.read(session.folder)
    sums = [f for f in recorded.frames if f.at == "sums" and f.direction == "up"]
    assert [f.sites for f in sums] == [("south", "east", "west")]


def test_a_rehearsal_opens_the_gate(tmp_path: Path):
    session = small.session(tmp_path, *LONG, "run.rounds=1", "site.rehearsal_days=1")
    with session.ledger, pytest.raises(CohortTooSmall):
        run(session)
    recorded = transcript.read(session.folder)
    asked = recorded.payload(recorded.frames[0])
    broadcast = wire.unpack_broadcast(asked)
    told = policy.protocol_hash(broadcast.algorithm, broadcast.guards)
    for site in session.federation.sites.values():
        document = {"protocol": told, "passed": True, "at": time.time() - 5}
        (site.store / policy.REHEARSAL).write_text(json.dumps(document))
    session.federation.clients.tally()
    with session.ledger:
        run(session)


def run(session: object) -> None:
    server.run(
        session.federation,
        session.ledger,
        observe=lambda number, state: {},
        progress=lambda report: None,
    )
