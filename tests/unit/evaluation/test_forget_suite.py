"""The parts of the suite forget that decide what its figures mean."""

from pathlib import Path

import pytest
import small_bank as small
import small_federation as federation
import torch

from fedkola.errors import UnknownName
from fedkola.evaluation import forget as suite
from fedkola.knowledge import membership, statistics, views
from fedkola.knowledge.bank import Bank
from fedkola.knowledge.stream import Stream
from fedkola.knowledge.views import Rule

CODES = ("a", "b", "c", "d")


def stream() -> Stream:
    sites = {site: federation.records(site, num=60) for site in federation.SITES}
    return Stream(
        catalogue=federation.catalogue(),
        sites=sites,
        test=federation.records("test"),
        windows=("w1", "w2", "w3"),
    )


def test_never_seen_records_are_nobodys_and_half_of_all():
    kept, never = suite.hold_out(stream(), seed=1)
    learnt = {text for data in kept.sites.values() for text in data.texts}
    unseen = {text for data in never.values() for text in data.texts}
    assert learnt.isdisjoint(unseen)
    assert 0.4 < sum(len(data) for data in never.values()) / 300 < 0.6
    assert suite.hold_out(stream(), seed=2)[1] != never


def test_every_third_site_leaves_and_a_fifth_of_the_patients_withdraw():
    assert [r.site for r in suite.requests(stream(), "sites")] == ["north", "west"]
    asked = suite.requests(stream(), "patients")
    assert all(r.kind == "patient" and r.name.startswith(r.site) for r in asked)
    assert len(asked) == 7  # of 35


def test_gradient_unlearning_pushes_forgotten_records_down_and_keeps_the_shape():
    codes = [CODES[i % 4] for i in range(80)]
    z = small.embeddings(codes, seed=4)
    bank = small.sealed(Bank(), "s", 1, CODES, codes)
    view = views.compute(bank, small.catalogue(dict.fromkeys(CODES, "s")), Rule(), now=1)
    head = view.head
    assert head is not None
    phi = statistics.expand(z, features=head.features, bits=head.bits, seed=head.seed)
    gone = torch.arange(80) % 8 == 0  # half of the records of label a
    rows = torch.arange(80) % 4
    changed = suite.unlearned(head, phi, rows, gone, rate=0.05)
    assert [w.shape for w in changed.weights] == [w.shape for w in head.weights]

    def mean_score(found: views.Head) -> float:
        return float((phi[gone] @ found.weights[0])[:, 0].mean())

    assert mean_score(changed) < mean_score(head)


def test_a_target_is_missed_where_it_is_missed():
    row = {
        "equal": True,
        "seconds": 1.0,
        "ratio": 0.5,
        "share": 0.4,
        "top1": 0.7,
        "top1_never": 0.7,
        "membership": {
            "auc": 0.53,
            "low": 0.5,
            "high": 0.56,
            "before": 0.9,
            "null": 0.5,
            "null_low": 0.45,
            "null_high": 0.55,
        },
    }
    cell = {scenario: dict.fromkeys(suite.METHODS, row) for scenario in suite.SCENARIOS}
    verdict = {t["name"]: t["verdict"] for t in suite._targets([cell])}
    assert verdict["sites, exact subtraction: view"] == "met"
    assert verdict["sites: membership AUC"] == "missed"
    assert verdict["sites: cell retrain, of full retrain"] == "missed"
    assert list(verdict.values()).count("missed") == 4


def test_a_profile_that_is_not_there_is_named(tmp_path: Path):
    with pytest.raises(UnknownName, match="quick, standard"):
        suite.run(profile="huge", out=tmp_path, note=print, progress=print)


def test_evidence_of_a_view_that_saw_neither_is_near_chance():
    counts = torch.zeros(membership.GROUPS, membership.BINS, dtype=torch.int64)
    counts[:, 500] = counts[:, 520] = 400
    found = membership.evidence(counts, counts)
    assert found is not None
    assert (found.auc, found.null) == (0.5, 0.5)
    assert found.high - found.low < 0.06
