"""From a recorded run to numbers and a page: what was seen, attacked, scored and shown."""

import html
import json
from pathlib import Path

import pytest
import small_pretraining as small
import torch

from fedkola import server
from fedkola.audit import transcript, view
from fedkola.audit.dager import Dager
from fedkola.audit.evidence import Control, Evidence, Known, Measure
from fedkola.audit.verdict import Defences, concern, verdict, verdicts
from fedkola.errors import PolicyRefused
from fedkola.evaluation import auditing
from fedkola.evaluation.session import Session
from fedkola.federation import load_state
from fedkola.training import whole


def ran(folder: Path, *settings: str) -> Session:
    session = small.session(folder, *settings)
    with session.ledger:
        server.run(
            session.federation,
            session.ledger,
            observe=lambda number, state: {},
            progress=lambda report: None,
        )
    return session


def seen(session: Session, who: str) -> view.View:
    sites = session.federation.sites
    with session.ledger:
        state, _ = load_state(session.federation, session.ledger)
    return view.view(
        transcript.read(session.folder),
        view.observer(who, tuple(sites)),
        stores={name: site.store for name, site in sites.items()},
        final=dict(state.weights),
    )


@pytest.mark.parametrize("settings", [(), ("pretrain.fragments=2",), ('pretrain.down="change"',)])
def test_a_change_of_pretraining_leads_from_one_broadcast_to_the_next(
    tmp_path: Path, settings: tuple[str, ...]
):
    session = ran(tmp_path, *settings)
    found = {(s.round, s.who): s for s in view.sightings(seen(session, "server"))}
    assert set(found) == {(r, who) for r in (1, 2, 3) for who in (*small.SITES, "sum")}
    one, after = found[1, "sum"], found[2, "sum"].before
    for name, value in one.change.items():
        # The next broadcast may be rounded to 8 bits; float32 is off by its last bit.
        room = 0.02 * float(value.abs().max()) + 1e-6
        assert torch.allclose(one.before[name] + value, after[name], atol=room)
    singles = [found[1, site] for site in small.SITES]
    for name, value in one.change.items():
        mean = torch.stack([s.change[name] for s in singles]).mean(0)
        assert torch.allclose(mean, value, atol=1e-6)


def test_a_site_takes_its_own_part_out_of_what_a_round_added(tmp_path: Path):
    session = ran(tmp_path)
    server_saw = {(s.round, s.who): s for s in view.sightings(seen(session, "server"))}
    for one in view.sightings(seen(session, "site:north")):
        assert (one.who, one.sites) == ("others", 3)
        for name, value in one.change.items():
            rest = [server_saw[one.round, s].change[name] for s in small.SITES if s != "north"]
            assert torch.allclose(torch.stack(rest).mean(0), value, atol=1e-5)


ONE_STEP = (
    "run.rounds=1",
    "pretrain.optimiser=sgd",
    "pretrain.inner_steps=1",
    "pretrain.batch=1",
    "pretrain.weight_decay=0",
    "pretrain.bits=24",
)


def test_one_plain_step_sends_the_gradient_and_the_gate_knows_it(tmp_path: Path):
    session = ran(tmp_path, *ONE_STEP)
    found = seen(session, "server")
    sighted = [one for one in view.sightings(found) if one.who == "north"]
    truth = view.truth({"north": session.federation.sites["north"].store}, sighted, ["north"])
    (one,), (rows,) = sighted, truth.values()
    expected = whole.gradient(session.federation.foundation, one.before, rows)
    size = torch.stack([value.norm() for value in expected.values()]).norm()
    for name, value in one.change.items():
        step = 0.003 * expected[name] / max(1.0, float(size))
        assert float((value + step).abs().max()) < 2e-7, name
    with pytest.raises(PolicyRefused, match="an optimiser that is not adaptive"):
        ran(tmp_path / "gated", *ONE_STEP, "site.waive=[]")


def test_decay_that_the_protocol_tells_hides_nothing(tmp_path: Path):
    session = ran(tmp_path, *ONE_STEP, "pretrain.weight_decay=0.1")
    found = seen(session, "server")
    sighted = [one for one in view.sightings(found) if one.who == "north"]
    truth = view.truth({"north": session.federation.sites["north"].store}, sighted, ["north"])
    known = Known(foundation=session.federation.foundation, texts=())
    evidence = Dager().quick().run(sighted, known, truth)
    assert evidence.measures["exact"].value == 1.0


@pytest.mark.slow
def test_an_audit_writes_numbers_and_a_page_that_show_the_text(tmp_path: Path):
    session = ran(tmp_path, "run.rounds=1", "pretrain.inner_steps=1", "pretrain.batch=1")
    with session.ledger:
        document = auditing.audit(session, observers=["server"], attacks=["dager"])
    kept = json.loads((session.folder / "audit.json").read_text())
    assert kept == json.loads(json.dumps(document))
    assert {a["target"] for a in kept["attacks"]} == {"single", "sum"}
    assert all(a["positive_control"]["passed"] for a in kept["attacks"])
    page = (session.folder / "audit.html").read_text()
    for attack in kept["attacks"]:
        for example in attack["examples"]:
            assert html.escape(example["truth"].strip()[:12]) in page
    assert "The true text, and what the attacker got" in page


def evidence(
    attack: str = "dager",
    *,
    target: str = "single",
    control: float = 1.0,
    **measures: tuple[float, float, float, float | None],
) -> Evidence:
    return Evidence(
        attack=attack,
        target=target,
        updates=20,
        measures={
            name: Measure(value=v, low=low, high=high, null=null)
            for name, (v, low, high, null) in measures.items()
        },
        control=Control(metric="exact", value=control, floor=0.9),
        seconds=1.0,
    )


NOTHING = {"exact": (0.0, 0.0, 0.05, 0.0), "token_recall": (0.1, 0.08, 0.12, 0.1)}


@pytest.mark.parametrize(
    ("found", "defences", "word"),
    [
        (evidence(control=0.5, exact=(0.0, 0.0, 0.1, 0.0)), Defences(), "broken"),
        (evidence(**NOTHING), Defences(), "at_null"),
        (evidence(exact=(0.9, 0.8, 1.0, 0.0)), Defences(), "recovered"),
        (
            evidence(exact=(0.0, 0.0, 0.1, 0.0), token_recall=(0.7, 0.6, 0.8, 0.1)),
            Defences(),
            "above_null",
        ),
        (
            evidence("presence", target="sum", presence_auc=(0.9, 0.85, 0.95, 0.5)),
            Defences(),
            "above_null",
        ),
        (
            evidence("presence", target="sum", presence_auc=(0.9, 0.85, 0.95, 0.5)),
            Defences(embedding="presence-disclosed"),
            "disclosed",
        ),
        (evidence("membership", target="sum", auc=(0.5, 0.4, 0.6, None)), Defences(), "at_null"),
        # A null below a coin makes a coin no finding.
        (evidence("membership", auc=(0.5, 0.48, 0.52, 0.3)), Defences(), "at_null"),
        # A noisy null of one update: two hundredths above it says nothing.
        (evidence(token_recall=(0.11, 0.11, 0.11, 0.1)), Defences(), "at_null"),
    ],
)
def test_a_verdict_is_read_off_interval_null_and_control(
    found: Evidence, defences: Defences, word: str
):
    assert verdict(found, defences) == word


def test_the_worst_verdict_of_each_concern_counts():
    pairs = [
        (evidence(**NOTHING), "at_null"),
        (evidence("presence", presence_auc=(0.9, 0.8, 1.0, 0.5)), "above_null"),
        (evidence(target="sum", **NOTHING), "at_null"),
    ]
    assert [concern(e) for e, _ in pairs] == ["attributable", "attributable", "sum_sequences"]
    found = verdicts(pairs)
    assert found["attributable"] == "above_null"
    assert found["sum_sequences"] == "at_null"
    assert found["sum_presence"] == "not_run"
