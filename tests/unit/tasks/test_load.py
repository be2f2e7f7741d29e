import pytest

from fedkola.errors import UnknownName
from fedkola.evaluation import tasks
from fedkola.plan import Plan, Scenario, Task

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


def test_an_unknown_task_is_refused_with_those_there_are():
    with pytest.raises(UnknownName, match="set one of files, icd10cm"):
        tasks.load(Plan(task=Task(name="icd11")))


@pytest.mark.parametrize(
    "scenario",
    [
        Scenario(noisy={"oldtown-metabolc": 0.5}),
        Scenario(late={"oldtown-metabolc": 2}),
        Scenario(leave={"oldtown-metabolc": 2}),
    ],
)
def test_a_scenario_about_no_site_is_refused_with_the_nearest(scenario):
    with pytest.raises(UnknownName, match="nearest is oldtown-metabolic"):
        tasks.load(Plan(task=SMALL, scenario=scenario))
