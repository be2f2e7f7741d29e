"""A model leaves with a signed certificate in the ledger's chain, or it stays."""

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fedkola.audit import release as gate
from fedkola.errors import ReleaseRefused
from fedkola.ledger import Ledger
from fedkola.plan import Release

PLAN = "ab" * 32
HEAD = "cd" * 32


def attack(name: str, concern: str, **metrics: dict[str, float]) -> dict[str, Any]:
    return {
        "name": name,
        "concern": concern,
        "verdict": "at_null",
        "metrics": metrics,
        "positive_control": {"value": 1.0, "floor": 0.9, "passed": True},
    }


DOCUMENT: dict[str, Any] = {
    "schema": "fedkola.audit/1",
    "at": 2.5,
    "plan": f"sha256:{PLAN}",
    "transcript": f"sha256:{HEAD}",
    "defences": {"secure_sum": "ms1", "epsilon": 3.0, "delta": 1e-5, "embedding": "refuse"},
    "verdicts": {
        "attributable": "at_null",
        "sum_sequences": "at_null",
        "sum_presence": "at_null",
        "membership": "bounded",
        "memory": "at_null",
        "transcript": "at_null",
    },
    "attacks": [
        attack("dager", "attributable", exact={"value": 0.0, "low": 0.0, "high": 0.2}),
        attack("dager", "sum_sequences", exact={"value": 0.0, "low": 0.0, "high": 0.04}),
        attack("presence", "sum_presence", presence_auc={"value": 0.5, "low": 0.4, "high": 0.58}),
        attack("membership", "membership", epsilon={"value": 0.5, "low": 0.2, "high": 0.9}),
    ],
}


@pytest.fixture
def ledger(tmp_path: Path):
    with Ledger.open(tmp_path, create=True) as found:
        found.start("r", {"run": {"name": "r"}}, PLAN, now=1.0)
        found.commit(
            "r",
            1,
            state={},
            tensors={},
            report={},
            sampler={"transcript": HEAD},
            events=(),
            now=2.0,
        )
        yield found


def write(to: Path) -> None:
    to.mkdir()
    (to / "model").write_text("weights")


def released(ledger: Ledger, to: Path, document: dict[str, Any]) -> dict[str, Any]:
    key = gate.key(to.parent)
    signed = gate.sign(document, key)
    return gate.release(write, to, signed, Release(), ledger=ledger, key=key, now=3.0)


def test_a_release_writes_the_model_and_a_signed_certificate_into_the_chain(
    ledger: Ledger, tmp_path: Path
):
    certificate = released(ledger, tmp_path / "out", DOCUMENT)
    assert (tmp_path / "out" / "model").read_text() == "weights"
    assert json.loads((tmp_path / "out" / "certificate.json").read_text()) == certificate
    assert gate.verify(certificate)
    assert not gate.verify({**certificate, "epsilon": 0.1})
    (event,) = ledger.events("r")
    assert (event.kind, event.body) == ("RELEASE", certificate)
    ledger.verify("r")
    assert (tmp_path / gate.KEY).stat().st_mode & 0o777 == 0o600


def change(*path: Any, to: Any) -> Callable[[dict[str, Any]], None]:
    def apply(document: dict[str, Any]) -> None:
        place = document
        for part in path[:-1]:
            place = place[part]
        place[path[-1]] = to

    return apply


@pytest.mark.parametrize(
    ("alter", "says"),
    [
        (change("at", to=3.0 - 31 * gate.DAY), "age of the audit in days is 31.000"),
        (change("defences", "epsilon", to=None), "epsilon claimed is none"),
        (change("defences", "epsilon", to=3.1), "epsilon claimed is 3.100"),
        (change("defences", "delta", to=1e-3), "delta claimed is 0.001"),
        (change("plan", to="sha256:00"), "plan of the audit"),
        (change("transcript", to="sha256:00"), "transcript of the audit"),
        (change("schema", to="other"), "schema of the audit"),
        (change("attacks", 0, "positive_control", "passed", to=False), "control of dager"),
        (change("verdicts", "attributable", to="above_null"), "attributable is above_null"),
        (change("verdicts", "attributable", to="not_run"), "attributable is not_run"),
        (change("verdicts", "transcript", to="above_null"), "transcript is above_null"),
        (change("verdicts", "transcript", to="not_run"), "transcript is not_run"),
        (change("attacks", 1, "metrics", "exact", "high", to=0.06), "sequences recovered is 0.060"),
        (change("attacks", 2, "metrics", "presence_auc", "high", to=0.61), "presence AUC is 0.610"),
        (change("attacks", 3, "metrics", "epsilon", "low", to=1.1), "empirical epsilon is 1.100"),
    ],
)
def test_a_model_stays_with_the_measure_its_value_and_its_bound(
    ledger: Ledger, tmp_path: Path, alter: Callable[[dict[str, Any]], None], says: str
):
    document = copy.deepcopy(DOCUMENT)
    alter(document)
    with pytest.raises(ReleaseRefused, match=says):
        released(ledger, tmp_path / "out", document)
    assert not (tmp_path / "out").exists()
    assert ledger.events("r") == ()


def test_what_every_site_disclosed_does_not_hold_a_model_back(ledger: Ledger, tmp_path: Path):
    document = copy.deepcopy(DOCUMENT)
    change("attacks", 2, "metrics", "presence_auc", "high", to=0.99)(document)
    change("attacks", 2, "verdict", to="disclosed")(document)
    assert gate.verify(released(ledger, tmp_path / "out", document))


def test_an_audit_that_was_altered_after_it_was_signed_is_refused(ledger: Ledger, tmp_path: Path):
    key = gate.key(tmp_path)
    signed = gate.sign(DOCUMENT, key)
    stranger = gate.sign(DOCUMENT, gate.key(tmp_path / "elsewhere"))
    for bad in ({**signed, "at": 2.6}, {**signed, "signature": "00"}, DOCUMENT, stranger):
        with pytest.raises(ReleaseRefused, match="signature of the audit"):
            gate.release(write, tmp_path / "out", bad, Release(), ledger=ledger, key=key, now=3.0)


def test_a_run_without_a_bound_leaves_only_where_the_plan_says_so(ledger: Ledger, tmp_path: Path):
    document = copy.deepcopy(DOCUMENT)
    change("defences", "epsilon", to=None)(document)
    key = gate.key(tmp_path)
    signed, open_ = gate.sign(document, key), Release(epsilon=float("inf"))
    to = tmp_path / "out"
    found = gate.release(write, to, signed, open_, ledger=ledger, key=key, now=3.0)
    assert found["epsilon"] is None


def test_a_released_folder_is_checked_file_by_file(ledger: Ledger, tmp_path: Path):
    to = tmp_path / "out"
    certificate = released(ledger, to, DOCUMENT)
    assert gate.checked(to) == gate.checked(to, key=certificate["key"]) == certificate
    with pytest.raises(ReleaseRefused, match="signer of the certificate"):
        gate.checked(to, key="00" * 32)
    (to / "model").write_text("other weights")
    with pytest.raises(ReleaseRefused, match="hash of model"):
        gate.checked(to)
    (to / "model").unlink()
    with pytest.raises(ReleaseRefused, match="file model is absent"):
        gate.checked(to)
    (to / "certificate.json").write_text("{")
    with pytest.raises(ReleaseRefused, match="no certificate"):
        gate.checked(to)
