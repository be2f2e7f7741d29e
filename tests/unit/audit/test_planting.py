"""Made-up secrets among the records of a site: how many, of whom, and what a guarantee says."""

import itertools
import math
import random
from collections import Counter

import pytest
import small_pretraining as small

from fedkola import plan as plans
from fedkola.audit.canary import CanaryExposure, chance_level
from fedkola.audit.planting import planted
from fedkola.audit.verdict import Defences, leading, verdict
from fedkola.errors import DataError, Incompatible, PlanError
from fedkola.evaluation import tasks

from .test_auditing import evidence

SECRETS = CanaryExposure(each=2).canaries()


def test_every_copy_is_a_record_and_64_of_them_may_be_one_patient():
    data = small.records("north")
    found = planted(data, SECRETS)
    texts = Counter(found.texts)
    for secret in SECRETS:
        assert texts[secret.text] == secret.repeats
        owners = {p for p, t in zip(found.patients, found.texts, strict=True) if t == secret.text}
        assert len(owners) == (1 if secret.together else secret.repeats)
    rest = [i for i, record in enumerate(found.records) if not record.startswith("canary")]
    assert found.take(rest) == data
    assert len(set(found.records)) == len(found.records)


def test_copies_of_one_secret_lie_far_apart():
    found = planted(small.records("north", num=200), SECRETS)
    (often, *_) = [secret for secret in SECRETS if secret.kind == "64"]
    places = [i for i, text in enumerate(found.texts) if text == often.text]
    assert min(b - a for a, b in itertools.pairwise(places)) > 1
    assert max(places) - min(places) > 0.8 * len(found)


def test_nothing_is_planted_among_nothing():
    with pytest.raises(DataError, match="no records"):
        planted(small.records("north").take(()), SECRETS)


def test_a_plan_plants_at_the_largest_site_and_says_so():
    plan = small.plan("audit.canaries=2")
    stream = small.stream()
    found = tasks.with_canaries(stream, plan)
    (site,) = [name for name, told in found.about.items() if "canaries" in told]
    assert found.about[site]["canaries"] == 2 * (1 + 4 + 16 + 64 + 64)
    assert len(found.sites[site]) == len(stream.sites[site]) + 2 * 149
    assert tasks.with_canaries(stream, small.plan()) is stream


def test_a_method_that_learns_no_text_is_given_none():
    plan = plans.override(small.plan("audit.canaries=2"), ["algorithm.name=fedit"])
    with pytest.raises(Incompatible, match=r"audit\.canaries = 0"):
        tasks.with_canaries(small.stream(), plan)
    with pytest.raises(PlanError, match="from 0 to 16"):
        small.plan("audit.canaries=17")


def test_canaries_never_read_stay_below_their_level_nineteen_times_in_twenty():
    assert chance_level(1) == pytest.approx(-math.log2(0.05))
    chance = random.Random(0)
    means = [sum(-math.log2(1 - chance.random()) for _ in range(8)) / 8 for _ in range(4000)]
    assert sum(mean > chance_level(8) for mean in means) / 4000 == pytest.approx(0.05, abs=0.02)


def test_an_epsilon_speaks_of_one_unit_and_not_of_sixty_four():
    found = evidence(
        "canary",
        target="model",
        exposure_64=(9.0, 8.0, 10.0, 2.8),
        exposure_unit_64=(1.2, 0.4, 2.0, 2.8),
        exposure_1=(1.0, 0.2, 1.9, 2.8),
    )
    private = Defences(epsilon=3.0)
    assert leading(found, private) == ["exposure_unit_64", "exposure_1"]
    assert (verdict(found, private), verdict(found, Defences())) == ("at_null", "above_null")
