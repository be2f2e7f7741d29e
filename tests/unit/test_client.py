"""A site answers bytes with bytes, says the same thing twice, and lets no text of an error out."""

from dataclasses import replace
from pathlib import Path

import pytest
import small_federation as small
import torch

from fedkola import wire
from fedkola.algorithms import questions
from fedkola.algorithms.fedkola import State
from fedkola.client import Site
from fedkola.errors import DataError, StepFailed, UnknownCell
from fedkola.federation import initial_weights
from fedkola.knowledge import journal, openings
from fedkola.knowledge.bank import Bank
from fedkola.knowledge.forget import Request
from fedkola.types import Broadcast

COHORT = ("north", "south", "east")


@pytest.fixture
def federation(tmp_path: Path) -> small.Federation:
    return small.assemble(tmp_path, 'knowledge.lanes=["analytic", "router"]')


def vote(federation: small.Federation, round: int, cohort: tuple[str, ...] = COHORT) -> Broadcast:
    asked = federation.algorithm._ask_vote(round, State(), cohort)
    return replace(asked, cohort=cohort, seed=5, run="small")


def fill(federation: small.Federation, round: int, cohort: tuple[str, ...] = COHORT) -> Broadcast:
    """Ask for the analytic cell of the scope heart."""
    method = federation.algorithm
    opening = next(
        o
        for o in method.openings(federation.clients.sum(cohort, vote(federation, round)), Bank())[0]
        if o.scope == "heart"
    )
    terms = method.terms
    about = openings.described(terms, round, replace(opening, slot=0), cohort)
    place = questions.place(terms.catalogue, about)
    return replace(
        questions.about_cell(terms, "fill", about, [place]),
        cohort=cohort,
        seed=5,
        run="small",
    )


def ask(site: Site, asked: Broadcast) -> bytes:
    return site.answer(wire.pack_broadcast(asked))


def outbox(site: Site) -> list[Path]:
    return sorted(path for path in (site.store / "outbox").rglob("*") if path.is_file())


def test_a_question_is_answered_once_and_repeated_byte_for_byte(federation: small.Federation):
    site = federation.sites["north"]
    first = ask(site, vote(federation, 1))
    (kept,) = outbox(site)
    kept.write_bytes(first[:-1] + b"!")
    assert ask(site, vote(federation, 1)) == first[:-1] + b"!"
    assert wire.unpack_reply(first).client == "north"


def test_a_restarted_site_finds_its_answer(federation: small.Federation):
    first = ask(federation.sites["north"], vote(federation, 1))
    again = small.assemble(federation.folder, 'knowledge.lanes=["analytic", "router"]')
    (kept,) = outbox(again.sites["north"])
    before = kept.stat().st_mtime_ns
    assert ask(again.sites["north"], vote(federation, 1)) == first
    assert kept.stat().st_mtime_ns == before


def test_answers_of_earlier_rounds_are_dropped_and_later_ones_kept(federation: small.Federation):
    site = federation.sites["north"]
    ask(site, vote(federation, 2))
    ask(site, vote(federation, 1))
    assert len(outbox(site)) == 2
    ask(site, vote(federation, 3))
    assert len(outbox(site)) == 1


def test_a_round_that_is_voted_on_again_starts_over_in_outbox_and_journal(
    federation: small.Federation,
):
    site = federation.sites["north"]
    ask(site, fill(federation, 1))
    assert len(journal.entries(site.store)) == 1
    ask(site, vote(federation, 1, ("north", "south")))
    assert journal.entries(site.store) == ()
    assert len(outbox(site)) == 1
    ask(site, vote(federation, 1))
    assert len(outbox(site)) == 1


def test_a_step_name_cannot_choose_a_path(federation: small.Federation, tmp_path: Path):
    site = federation.sites["north"]
    before = set(tmp_path.rglob("*"))
    reply = wire.unpack_reply(ask(site, replace(vote(federation, 1), step="../../../escaped")))
    assert reply.refused == "UnknownName"
    new = set(tmp_path.rglob("*")) - before
    assert all(path.is_relative_to(site.store) for path in new)


@pytest.mark.parametrize("round", [-5, 10**15])
def test_an_odd_round_number_does_no_harm(federation: small.Federation, round: int):
    site = federation.sites["north"]
    assert wire.unpack_reply(ask(site, vote(federation, round))).client == "north"
    assert not wire.unpack_reply(ask(site, vote(federation, 10**15))).refused


def test_an_error_leaves_the_site_as_a_code_and_its_text_stays(tmp_path: Path):
    secret = "Jane Doe"
    north = small.records("north")
    sites = {**small.data(), "north": replace(north, labels=(secret, *north.labels[1:]))}
    federation = small.assemble(tmp_path, sites=sites)
    site = federation.sites["north"]
    answer = ask(site, vote(federation, 1))
    assert wire.unpack_reply(answer).refused == "StepFailed"
    assert secret.encode() not in answer
    assert secret in (site.store / "site.log").read_text()
    assert outbox(site) == []


@pytest.mark.parametrize(
    ("change", "code"),
    [
        ({"algorithm": {"name": "os.system"}}, "UnknownName"),
        ({"algorithm": {"name": "FedKoLa", "evil": 1}}, "UnknownName"),
        ({"step": "round"}, "UnknownName"),
        ({"tensors": {}}, "StepFailed"),
    ],
)
def test_what_a_server_may_not_ask_is_refused_by_name(
    federation: small.Federation, change: dict, code: str
):
    answer = ask(federation.sites["north"], replace(vote(federation, 1), **change))
    assert wire.unpack_reply(answer).refused == code


def test_bytes_that_are_no_question_are_refused(federation: small.Federation):
    site = federation.sites["north"]
    assert wire.unpack_reply(site.answer(b"junk")).refused == "WireError"
    whole = wire.pack_broadcast(vote(federation, 1))
    assert wire.unpack_reply(site.answer(b"FKW7" + whole[4:])).refused == "VersionMismatch"


def test_records_under_a_request_are_never_contributed_again(federation: small.Federation):
    site = federation.sites["north"]
    ask(site, fill(federation, 1))
    request = Request(kind="patient", site="north", name="north-p3")
    whole = site.knowledge.until(3)
    concerned = site.post(request)
    assert set(concerned) == {(1, "heart")}
    left = site.knowledge.until(3)
    assert "north-p3" in whole.patients
    assert "north-p3" not in left.patients
    assert len(left) == len(whole) - whole.patients.count("north-p3")
    site.settle(request)
    assert len(site.knowledge.until(3)) == len(left)
    site.post(Request(kind="record", site="north", name="north-0"))
    assert "north-0" not in site.knowledge.until(3).records
    site.post(Request(kind="site", site="north"))
    assert len(site.knowledge.until(3)) == 0


def test_an_accepted_request_drops_answers_that_hold_the_records(federation: small.Federation):
    site = federation.sites["north"]
    asked = fill(federation, 1)
    before = wire.unpack_reply(ask(site, asked)).words["weight"].item()
    site.post(Request(kind="patient", site="north", name="north-p3"))
    assert outbox(site) == []
    after = wire.unpack_reply(ask(site, asked)).words["weight"].item()
    assert 0 < after < before


def test_a_request_for_another_site_or_for_nobody_is_refused(federation: small.Federation):
    site = federation.sites["north"]
    with pytest.raises(DataError, match="this is north, the request is for south"):
        site.post(Request(kind="site", site="south"))
    with pytest.raises(UnknownCell):
        site.post(Request(kind="patient", site="north", name="nobody"))
    assert len(site.knowledge.until(3)) == 30


def test_records_that_were_never_asked_for_can_be_refused_for_good(federation: small.Federation):
    site = federation.sites["north"]
    assert site.post(Request(kind="patient", site="north", name="north-p3")) == {}
    assert "north-p3" not in site.knowledge.until(3).patients


def test_two_sites_train_from_different_seeds_and_each_repeats_its_own(
    federation: small.Federation,
):
    north, south = federation.sites["north"], federation.sites["south"]
    data = north.knowledge.until(1)
    weights = {
        **initial_weights(federation),
        "head.weight": torch.zeros(9, 16),
        "head.bias": torch.zeros(9),
    }

    def trained(site: Site) -> torch.Tensor:
        got = site.fit(weights, data, steps=2, batch=4, lr=0.1, seed=3, classes=small.CODES)
        return got["head.weight"]

    assert torch.equal(trained(north), trained(north))
    assert not torch.equal(trained(north), trained(south))


def test_an_encoder_without_a_head_learns_nothing_and_says_so_in_its_weights(
    federation: small.Federation,
):
    site = federation.sites["north"]
    weights = {"x.lora_B": torch.ones(2, 2)}
    same = site.fit(weights, site.knowledge.until(1), steps=2, batch=4, lr=0.1, seed=0)
    assert same == weights


def test_a_loss_that_is_not_finite_is_this_sites_failure(federation: small.Federation):
    site = federation.sites["north"]
    weights = {"head.weight": torch.full((9, 16), float("nan")), "head.bias": torch.zeros(9)}
    with pytest.raises(StepFailed, match="loss"):
        site.fit(
            {**initial_weights(federation), **weights},
            site.knowledge.until(1),
            steps=1,
            batch=4,
            lr=0.1,
            seed=0,
            classes=small.CODES,
        )


def test_evaluation_adds_up_over_records(federation: small.Federation):
    site = federation.sites["north"]
    data = site.knowledge.until(3)
    weights = {
        **initial_weights(federation),
        "head.weight": torch.randn(9, 16, generator=torch.Generator().manual_seed(0)),
        "head.bias": torch.zeros(9),
    }
    whole = site.evaluate(weights, data, classes=small.CODES)
    parts = [
        site.evaluate(weights, data.take(rows), classes=small.CODES)
        for rows in (range(10), range(10, 30))
    ]
    assert whole["count"] == 30
    assert whole["correct"] == parts[0]["correct"] + parts[1]["correct"]
    assert whole["loss"] == pytest.approx(parts[0]["loss"] + parts[1]["loss"], rel=1e-6)
