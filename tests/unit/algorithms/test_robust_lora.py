"""Robust LoRA in a real federation: groups and single updates, liars, masks, the record of it."""

from pathlib import Path
from typing import Any

import pytest
import small_federation as small
import torch

from fedkola import server
from fedkola.algorithms import robust_lora
from fedkola.errors import Incompatible
from fedkola.ledger import Ledger
from fedkola.plan import Algorithm, Cohort, Plan, Robust

METHOD = "algorithm.name=robust_lora"
SITES = {f"s{i:02}": small.records(f"s{i:02}", num=12) for i in range(9)}
GROUPS = (METHOD, "cohort.groups_of=3", "robust.rule=median", "algorithm.exchanges=2")
SINGLE = (METHOD, "cohort.groups_of=1", "robust.assume_liars=0.2", "algorithm.exchanges=2")


def finished(folder: Path, *settings: str) -> tuple[Any, list[Any]]:
    state = small.run(small.assemble(folder, *settings, sites=SITES))
    with Ledger.open(folder) as ledger:
        ledger.verify("small")
        return state, list(ledger.events("small"))


def test_without_groups_it_is_federated_averaging_to_the_bit(tmp_path: Path):
    plain, _ = finished(tmp_path / "a", "algorithm.name=fedit", "algorithm.exchanges=2")
    robust, _ = finished(tmp_path / "b", METHOD, "algorithm.exchanges=2")
    assert all(torch.equal(v, robust.weights[n]) for n, v in plain.weights.items())


def test_masked_groups_give_the_bits_of_plain_ones(tmp_path: Path):
    plain, events = finished(tmp_path / "plain", *GROUPS)
    masked, again = finished(
        tmp_path / "masked", *GROUPS, "privacy.secure_sum=true", "engine.order=3"
    )
    assert small.fingerprint(plain) == small.fingerprint(masked)
    assert [e.body for e in events] == [e.body for e in again]


@pytest.mark.parametrize("settings", [GROUPS, (*SINGLE, "robust.rule=nnm_gm")])
def test_the_ledger_keeps_groups_and_coefficients_of_every_exchange(
    tmp_path: Path, settings: tuple[str, ...]
):
    state, events = finished(tmp_path, *settings)
    found = [e.body for e in events if e.kind == "COMBINE"]
    assert [(b["round"], b["exchange"]) for b in found] == [
        (r, e) for r in (1, 2, 3) for e in (0, 1)
    ]
    for body in found:
        assert sorted(s for group in body["groups"] for s in group) == sorted(SITES)
        assert sum(body["units"]) in (0, body["of"])
    assert state.standing.exchanges == 6
    if settings is GROUPS:
        assert len({str(body["groups"]) for body in found}) == 6


def test_a_lie_that_moves_the_mean_is_given_no_weight_by_a_rule(tmp_path: Path):
    lie = "scenario.liars.s04=replace_model"
    honest, _ = finished(tmp_path / "honest", *SINGLE, "robust.tau=inf")
    ruined, _ = finished(tmp_path / "ruined", *SINGLE, "robust.tau=inf", lie)
    robust, events = finished(tmp_path / "robust", *SINGLE, "robust.rule=multi_krum", lie)

    def apart(state: Any) -> float:
        return sum(float((v - honest.weights[n]).norm()) for n, v in state.weights.items())

    assert apart(ruined) > 3 * apart(robust)
    named = {e.subject for e in events if e.kind == "GROUP_OUTLIER"}
    assert "s04" in named


def test_a_group_of_which_too_few_answer_is_left_out_and_named(tmp_path: Path):
    settings = (*GROUPS, "cohort.minimum=3", "privacy.secure_sum=true")
    federation = small.assemble(
        tmp_path, *settings, sites=SITES, wrap={"s03": small.failing("ms1/ask", times=1)}
    )
    state = small.run(federation)
    with Ledger.open(tmp_path) as ledger:
        events = list(ledger.events("small"))
    lost = [e for e in events if e.kind == "GROUP_OUTLIER" and e.body["why"] == "CohortTooSmall"]
    assert len(lost) == 1
    assert "s03" in lost[0].subject
    assert all(bool(torch.isfinite(v).all()) for v in state.weights.values())


def test_no_other_algorithm_pretends_to_be_robust():
    for plan in (
        Plan(robust=Robust(rule="krum")),
        Plan(cohort=Cohort(groups_of=3), algorithm=Algorithm(name="fedit")),
    ):
        with pytest.raises(Incompatible, match="name to robust_lora"):
            server.check(plan)


def test_too_few_sites_for_the_rule_are_refused_before_round_1(tmp_path: Path):
    with pytest.raises(Incompatible, match="9 sites in groups of 3 are 3 sums, krum"):
        small.assemble(
            tmp_path, *GROUPS, "robust.rule=krum", "robust.assume_liars=0.1", sites=SITES
        )


def test_momentum_keeps_a_mean_of_changes_and_gives_it_again_when_asked_again(tmp_path: Path):
    def moved(number: float) -> dict[str, torch.Tensor]:
        return {"x": torch.tensor([number])}

    def asked(place: tuple[int, int], number: float) -> float:
        return float(robust_lora._averaged(tmp_path, place, moved(number), 0.5)["x"])

    assert asked((1, 0), 4.0) == 4.0
    assert asked((1, 1), 2.0) == 3.0
    assert asked((2, 0), 1.0) == 2.0
    # A round that is repeated after a crash starts from the last change of the round before.
    assert asked((2, 1), 0.0) == 1.0
    assert asked((2, 0), 1.0) == 2.0
    assert asked((3, 0), 2.0) == 1.5
    assert asked((4, 0), 2.5) == 2.0
    assert sorted(p.stem for p in (tmp_path / "momentum").glob("*.safetensors")) == [
        "000003-000000",
        "000004-000000",
    ]


def test_momentum_changes_what_is_learnt_and_leaves_nothing_behind(tmp_path: Path):
    plain, _ = finished(tmp_path / "plain", *SINGLE)
    kept, _ = finished(tmp_path / "kept", *SINGLE, "robust.momentum=0.5")
    again, _ = finished(tmp_path / "again", *SINGLE, "robust.momentum=0.5", "engine.order=3")
    assert small.fingerprint(kept) == small.fingerprint(again) != small.fingerprint(plain)
    assert not list(tmp_path.glob("*/sites/*/momentum"))


def test_sums_of_bad_standing_are_left_out_where_the_plan_says_so(tmp_path: Path):
    settings = (METHOD, "cohort.groups_of=3", "robust.assume_liars=0.12", "robust.tau=inf")
    lie = "scenario.liars.s04=sign"
    more = ("algorithm.exchanges=5", "algorithm.lr=0.002")
    _, warned = finished(tmp_path / "warn", *settings, lie, *more)
    _, acted = finished(tmp_path / "act", *settings, lie, *more, "robust.reliability=regroup")

    def left_out(events: list[Any]) -> list[str]:
        return [e.subject for e in events if e.body.get("why") == "Standing"]

    assert left_out(warned) == []
    assert left_out(acted)
    assert all("s04" in subject for subject in left_out(acted)[-3:])
