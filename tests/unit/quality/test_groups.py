"""Groups of sites: who is summed with whom, what one exchange becomes, what is learnt of sites."""

from math import inf

import pytest
import torch

from fedkola.errors import CohortTooSmall, Incompatible, UnknownName
from fedkola.plan import Cohort, Demands, Plan, Privacy, Robust
from fedkola.quality import groups
from fedkola.quality.groups import Row, Standing
from fedkola.quality.rules import RULES

SITES = tuple(f"site-{i}" for i in range(20))


def row(name: str, *numbers: float, count: int = 10) -> Row:
    return Row(sites=(name,), tensors={"x": torch.tensor(numbers)}, count=count)


def test_every_site_is_in_one_group_and_what_is_left_joins_the_last():
    split = groups.assign(SITES, 3, key="a")
    assert sorted(site for group in split for site in group) == sorted(SITES)
    assert [len(group) for group in split] == [3, 3, 3, 3, 4, 4]


def test_groups_are_a_function_of_the_key_and_change_with_it():
    assert groups.assign(SITES, 4, key="a") == groups.assign(SITES, 4, key="a")
    assert groups.assign(SITES, 4, key="a") != groups.assign(SITES, 4, key="b")
    # Not of the order in which sites stand in the cohort.
    turned = groups.assign(SITES[::-1], 4, key="a")
    assert [set(g) for g in turned] == [set(g) for g in groups.assign(SITES, 4, key="a")]


def test_no_groups_and_single_sites_are_groups_too():
    assert groups.assign(SITES, 0, key="a") == (SITES,)
    assert groups.assign(SITES[:2], 1, key="a") == (("site-0",), ("site-1",))


def test_the_share_of_groups_that_hold_a_liar_is_that_of_independent_draws():
    assert groups.contaminated(0.2, 3) == pytest.approx(1 - 0.8**3)
    assert groups.liars(RULES["geometric_median"], 20, 1, 0.2) == 4
    # 6 groups of 3 are expected to hold 2.9 with a liar; no rule bears more than 2.
    assert groups.liars(RULES["geometric_median"], 6, 3, 0.2) == 2
    assert groups.liars(RULES["krum"], 6, 3, 0.2) == 1


# "nnm" alone ends in a mean, where the liar keeps a fifth of its own share.
@pytest.mark.parametrize("rule", sorted(set(RULES) - {"fltrust", "mean", "nnm"}))
def test_every_rule_bears_a_liar_that_ruins_the_mean(rule: str):
    honest = [row(f"s{i}", 1.0 + 0.1 * i, 2.0, 0.1 * (-1) ** i) for i in range(6)]
    rows = [*honest, row("liar", -900.0, -900.0, -900.0)]
    plain = groups.Robust(rule="mean", groups_of=1, tau=inf)
    robust = groups.Robust(rule=rule, groups_of=1, tau=inf, assume_liars=0.15)
    ruined, _ = groups.joined(plain, rows, exchange=0, size=1)
    assert float(ruined["x"][0]) < -100
    found, turn = groups.joined(robust, rows, exchange=0, size=1)
    assert turn.liars == 2
    step = groups.joined(robust, rows, exchange=1, size=1, last=found)[0]
    assert 0.3 < float(step["x"][0]) < 2.0
    assert 0.7 < float(step["x"][1]) < 2.1


def test_a_bound_on_norms_alone_takes_most_of_a_large_lie_away():
    honest = [row(f"s{i}", 1.0, 0.0) for i in range(4)]
    auto = groups.Robust(groups_of=1)
    found, turn = groups.joined(auto, [*honest, row("liar", -900.0, 0.0)], exchange=0, size=1)
    assert turn.tau == pytest.approx(1.2)
    assert found["x"].tolist() == pytest.approx([(4 - 1.2) / 5, 0.0])


def test_fltrust_follows_its_root_and_stops_without_it():
    rows = [row("root", 1.0, 0.0), row("a", 2.0, 0.1), row("b", -5.0, 0.0)]
    robust = groups.Robust(rule="fltrust", groups_of=1, root="root", tau=inf)
    found, _ = groups.joined(robust, rows, exchange=0, size=1)
    assert found["x"].tolist() == pytest.approx([1.0, 0.025], abs=0.01)
    with pytest.raises(CohortTooSmall, match="sent no change in exchange 0"):
        groups.joined(robust, rows[1:], exchange=0, size=1)


def test_nobody_counts_for_more_records_than_the_row_in_the_middle():
    robust = groups.Robust(rule="geometric_median", groups_of=1, tau=inf)
    rows = [row("a", 0.0), row("b", 0.1), row("c", 0.2), row("d", 9.0, count=10**9)]
    found, _ = groups.joined(robust, rows, exchange=0, size=1)
    assert float(found["x"][0]) < 0.3


def test_rows_of_low_weight_and_rows_that_did_not_count_are_named():
    robust = groups.Robust(rule="multi_krum", groups_of=1, assume_liars=0.2, tau=inf)
    rows = [*(row(f"s{i}", 1.0 + 0.01 * i) for i in range(5)), row("odd", 7.0), row("none", 0.0)]
    rows[-1] = row("none", 0.0, count=0)
    _, turn = groups.joined(robust, rows, exchange=2, size=1)
    assert 5 in turn.low
    assert turn.dropped == {"6": "NoWeight"}
    assert turn.exchange == 2


def test_a_row_that_is_not_finite_changes_nothing():
    robust = groups.Robust(rule="geometric_median", groups_of=1, assume_liars=0.2)
    rows = [row(f"s{i}", 1.0 + 0.1 * i, 0.5) for i in range(5)]
    clean, _ = groups.joined(robust, rows, exchange=0, size=1)
    spoilt, turn = groups.joined(robust, [*rows, row("nan", float("nan"), 0.0)], exchange=0, size=1)
    assert turn.dropped == {"5": "NotFinite"}
    assert torch.allclose(clean["x"], spoilt["x"])


def test_evidence_over_exchanges_finds_the_site_that_sets_its_groups_apart():
    generator = torch.Generator().manual_seed(0)
    standing = Standing()
    for exchange in range(30):
        rows = []
        for group in groups.assign(SITES, 4, key=str(exchange)):
            value = torch.ones(8) + 0.2 * torch.randn(8, generator=generator)
            if "site-7" in group:
                value = value - 1.0
            rows.append(Row(sites=group, tensors={"x": value}, count=len(group)))
        standing = groups.observed(standing, rows, {"x": torch.ones(8)})
        if exchange < groups.EARLIEST - 1:
            assert groups.suspects(standing) == {}
    worth = groups.scores(standing)
    assert max(worth, key=worth.__getitem__) == "site-7"
    assert list(groups.suspects(standing)) == ["site-7"]


def test_without_a_liar_nobody_stands_far_out():
    generator = torch.Generator().manual_seed(1)
    standing = Standing()
    for exchange in range(30):
        rows = [
            Row(sites=g, tensors={"x": 1 + 0.2 * torch.randn(8, generator=generator)}, count=4)
            for g in groups.assign(SITES, 4, key=str(exchange))
        ]
        standing = groups.observed(standing, rows, {"x": torch.ones(8)})
    assert len(groups.suspects(standing)) <= 1


def standing(exchanges: int = 9, **worth: float) -> Standing:
    """In which every site stands as given, and others near 0."""
    values = [worth.get(site.replace("-", "_"), 0.01 * i) for i, site in enumerate(SITES)]
    return Standing(
        sites=SITES,
        normal=torch.eye(20, dtype=torch.float64),
        moment=(1 + groups.RIDGE) * torch.tensor(values, dtype=torch.float64),
        exchanges=exchanges,
    )


def test_doubted_sites_are_the_worst_and_no_more_than_may_lie():
    known = standing(site_2=3.0, site_9=2.5, site_14=4.0, site_5=1.8)
    assert groups.doubted(known, 0.2) == ("site-14", "site-2", "site-9")
    assert groups.doubted(known, 0.1) == ("site-14", "site-2")
    assert groups.doubted(known, 0.0) == ()
    assert groups.doubted(standing(exchanges=2, site_2=3.0), 0.2) == ()


def test_doubted_sites_share_groups_and_are_left_out():
    split = groups.assign(SITES, 3, key="a", together=("site-14", "site-2", "site-9"))
    assert split[0] == ("site-2", "site-9", "site-14")
    rows = [
        Row(sites=g, tensors={"x": torch.full((2,), float(i))}, count=3)
        for i, g in enumerate(split)
    ]
    robust = groups.Robust(groups_of=3, tau=inf)
    found, turn = groups.joined(robust, rows, exchange=0, size=3, without=("site-2",))
    assert found["x"].tolist() == [3.0, 3.0]
    assert turn.dropped == {"0": "Standing"}
    assert groups.joined(robust, rows, exchange=0, size=3, without=SITES)[1].dropped == {}


@pytest.mark.parametrize(
    ("robust", "cohort", "secure", "why"),
    [
        (Robust(rule="krum"), Cohort(), False, "needs more than one sum"),
        (Robust(rule="krum"), Cohort(groups_of=2), True, "below the floor of 3"),
        (Robust(rule="krum"), Cohort(groups_of=1), True, "below the floor of 3"),
        (Robust(), Cohort(groups_of=9, size=8), False, "more than cohort.size"),
        (Robust(rule="fltrust"), Cohort(groups_of=1), False, "set robust.root"),
        (Robust(rule="fltrust", root="a"), Cohort(groups_of=3), False, "groups_of = 1"),
        (Robust(root="a"), Cohort(groups_of=1), False, "read by fltrust alone"),
        (Robust(rule="nnm", assume_liars=0.3), Cohort(groups_of=3), False, "no rule bears"),
        (Robust(reliability="regroup"), Cohort(groups_of=3), False, "as many sums as may lie"),
        (Robust(rule="krum"), Cohort(groups_of=3, size=6), False, "6 sites in groups of 3"),
    ],
)
def test_plans_that_could_not_hold_are_refused(
    robust: Robust, cohort: Cohort, secure: bool, why: str
):
    plan = Plan(robust=robust, cohort=cohort, privacy=Privacy(secure_sum=secure))
    with pytest.raises(Incompatible, match=why):
        groups.settings(plan)


def test_the_floor_of_a_group_is_the_highest_of_those_that_hold():
    plan = Plan(
        cohort=Cohort(groups_of=4), privacy=Privacy(secure_sum=True), site=Demands(minimum=5)
    )
    with pytest.raises(Incompatible, match="below the floor of 5"):
        groups.settings(plan)


def test_a_rule_that_does_not_exist_is_named():
    with pytest.raises(UnknownName, match="this version knows mean, krum"):
        groups.settings(Plan(robust=Robust(rule="kum"), cohort=Cohort(groups_of=1)))


def test_what_groups_hide_and_bear_is_said_in_words():
    said = groups.statement(groups.Robust(groups_of=3, assume_liars=0.2), 20)
    assert said == (
        "6 sums of 3 sites each: a site hides among 3, not among 20; with 20% of sites lying, 49% "
        "of the rows hold a liar"
    )
    assert "none is hidden" in groups.statement(groups.Robust(groups_of=1), 20)
    assert "every site among all" in groups.statement(groups.Robust(), 20)
