import pytest

from fedkola.errors import UnknownName
from fedkola.evaluation import tasks
from fedkola.knowledge.stream import Stream
from fedkola.plan import Plan, Scenario, Task
from fedkola.quality.corrupt import KINDS
from fedkola.types import Catalogue, Dataset

SMALL = Task(per_label=4, windows=6)


def test_a_noisy_site_has_wrong_labels_and_says_how_many():
    clean = tasks.load(Plan(task=SMALL))
    noisy = tasks.load(Plan(task=SMALL, scenario=Scenario(noisy={"oldtown-metabolic": 0.5})))
    site = "oldtown-metabolic"
    flips = sum(
        new != old
        for new, old in zip(noisy.sites[site].labels, clean.sites[site].labels, strict=True)
    )

    assert flips / len(clean.sites[site]) == pytest.approx(0.5, abs=0.15)
    assert noisy.about[site]["noise"] == 0.5
    assert noisy.about[site]["replaced"] == flips
    assert noisy.test == clean.test
    assert noisy.sites["westside-general"] == clean.sites["westside-general"]


def test_noise_never_makes_a_label_arrive_before_its_window():
    clean = tasks.load(Plan(task=SMALL))
    noisy = tasks.load(Plan(task=SMALL, scenario=Scenario(noisy={"westside-general": 1.0})))
    arriving = {
        (label, window)
        for data in clean.sites.values()
        for label, window in zip(data.labels, data.windows, strict=True)
    }
    data = noisy.sites["westside-general"]

    assert set(zip(data.labels, data.windows, strict=True)) <= arriving


@pytest.mark.parametrize("kind", sorted(set(KINDS) - {"matrix", "shuffle_answers", "stale"}))
def test_every_kind_of_noise_is_an_entry_of_a_plan(kind: str):
    clean = tasks.load(Plan(task=SMALL))
    site, target = "oldtown-metabolic", clean.sites["oldtown-metabolic"].labels[0]
    # Of one label there are few records, which clean-label poison has to be among.
    noisy = tasks.load(
        Plan(task=SMALL, scenario=Scenario(noisy={site: 1.0}, noise=kind, target=target))
    )
    before, after = clean.sites[site], noisy.sites[site]

    assert noisy.about[site]["kind"] == kind
    assert noisy.about[site]["replaced"] > 0
    assert after.records[: len(before)] == before.records
    assert after.windows[: len(before)] == before.windows
    changed = sum(after.take([i]) != before.take([i]) for i in range(len(before)))
    changed += len(after) - len(before)
    assert changed == noisy.about[site]["replaced"]
    assert noisy.sites["westside-general"] == clean.sites["westside-general"]


@pytest.mark.parametrize("kind", ["matrix", "gaussian", ""])
def test_noise_that_a_plan_cannot_name_is_refused(kind: str):
    with pytest.raises(UnknownName, match="is no noise; set one of annotator"):
        tasks.load(Plan(task=SMALL, scenario=Scenario(noise=kind)))


def test_an_unknown_task_is_refused_with_those_there_are():
    with pytest.raises(UnknownName, match="set one of facts, files, icd10cm"):
        tasks.load(Plan(task=Task(name="icd11")))


@pytest.mark.parametrize(
    "scenario",
    [
        Scenario(noisy={"oldtown-metabolc": 0.5}),
        Scenario(late={"oldtown-metabolc": 2}),
        Scenario(leave={"oldtown-metabolc": 2}),
        Scenario(release={"oldtown-metabolc": 2}),
        Scenario(access={"oldtown-metabolc": ()}),
    ],
)
def test_a_scenario_about_no_site_is_refused_with_the_nearest(scenario):
    with pytest.raises(UnknownName, match="nearest is oldtown-metabolic"):
        tasks.load(Plan(task=SMALL, scenario=scenario))


def test_a_site_with_a_later_release_hears_of_everything_but_the_start_later():
    clean = tasks.load(Plan(task=SMALL))
    delayed = tasks.load(Plan(task=SMALL, scenario=Scenario(release={"oldtown-metabolic": 2})))
    site = "oldtown-metabolic"
    before = dict(zip(clean.sites[site].records, clean.sites[site].windows, strict=True))
    after = dict(zip(delayed.sites[site].records, delayed.sites[site].windows, strict=True))

    assert after == {r: w if w == 1 else min(w + 2, 6) for r, w in before.items()}
    assert list(delayed.sites[site].windows) == sorted(after.values())
    assert delayed.about[site]["release"] == 2
    assert delayed.sites["westside-general"] == clean.sites["westside-general"]
    assert delayed.test == clean.test


def test_of_two_revisions_that_a_delay_brings_together_the_newer_is_kept():
    data = Dataset(
        records=("a", "b", "a", "a"),
        texts=("first", "other", "second", "third"),
        labels=("x", "x", "x", "x"),
        patients=("a", "b", "a", "a"),
        windows=(1, 2, 2, 3),
    )
    stream = Stream(
        catalogue=Catalogue(system="s", levels=("label",), labels=()),
        sites={"north": data},
        test=data.take([]),
        windows=("w1", "w2", "w3"),
        about={"north": {}},
    )
    found = tasks._released(stream, {"north": 1}).sites["north"]

    assert found.texts == ("first", "other", "third")
    assert found.windows == (1, 3, 3)


def test_access_is_told_of_the_site_and_an_unknown_scope_is_refused():
    scope = "icd10cm/chapter-4"
    site = "oldtown-metabolic"
    told = tasks.load(Plan(task=SMALL, scenario=Scenario(access={site: (scope,)}))).about

    assert told[site]["access"] == (scope,)
    assert "access" not in told["westside-general"]
    with pytest.raises(UnknownName, match=r"scenario\.access.*nearest is icd10cm/chapter-4"):
        tasks.load(Plan(task=SMALL, scenario=Scenario(access={site: ("icd10cm/chapter4",)})))
