"""Generated facts: who holds them, when they change, what is asked and what is stale."""

import pytest

from fedkola.errors import PlanError
from fedkola.evaluation import tasks
from fedkola.evaluation.tasks import facts
from fedkola.knowledge.stream import Stream
from fedkola.plan import Plan, Run, Scenario, Task

SMALL = Task(name="facts", sites=5, windows=5, entities=12, changing=0.2)


def stream(*, seed: int = 7, **changes: object) -> Stream:
    values = {"sites": 5, "windows": 5, "entities": 12, "changing": 0.2, **changes}
    return facts.load(Task(name="facts", **values), seed=seed)  # type: ignore[arg-type]


def test_a_stream_is_a_function_of_task_and_seed() -> None:
    assert stream() == stream()
    assert stream() != stream(seed=8)
    assert tasks.load(Plan(task=SMALL, run=Run(seed=7))) == stream()


def test_at_least_three_sites_hold_every_fact_and_agree_on_it_in_every_window() -> None:
    found = stream()
    for window in range(1, 6):
        told: dict[str, dict[str, str]] = {}
        for site, data in found.sites.items():
            latest: dict[str, str] = {}
            for record, label, since in zip(data.records, data.labels, data.windows, strict=True):
                if since <= window:
                    latest[record] = label
            for record, label in latest.items():
                fact = record.removeprefix(f"{site}/").rpartition("/")[0]
                assert told.setdefault(fact, {}).setdefault(site, label) == label
        right = {
            record.rpartition("/")[0]: label
            for record, label, since in zip(
                found.test.records, found.test.labels, found.test.windows, strict=True
            )
            if since <= window <= found.ends.get(record, window)
        }
        assert {fact: set(sites.values()) for fact, sites in told.items()} == {
            fact: {label} for fact, label in right.items()
        }
        assert all(len(sites) >= 3 for sites in told.values())


def test_one_answer_is_right_at_a_time_and_former_ones_are_stale() -> None:
    found = stream()
    by_fact: dict[str, list[int]] = {}
    for i, record in enumerate(found.test.records):
        by_fact.setdefault(record.rpartition("/")[0], []).append(i)
    assert len(by_fact) == 12 * len(facts.ATTRIBUTES)
    changed = 0
    for rows in by_fact.values():
        labels = [found.test.labels[i] for i in rows]
        assert len(set(labels)) == len(labels)
        for number, i in enumerate(rows):
            record = found.test.records[i]
            assert found.stale.get(record, ()) == tuple(labels[:number])
            assert found.concepts[record] == ("evolved" if len(rows) > 1 else "stable")
            last = number + 1 == len(rows)
            until = None if last else found.test.windows[rows[number + 1]] - 1
            assert found.ends.get(record) == until
            changed += not last
    # 0.2 of what is known in each of four windows: about 12 * 8 * 0.2 * (1/2 * 4 + 1/2 * 1.5).
    assert 30 < changed < 75


def test_tests_ask_in_words_that_no_site_holds() -> None:
    found = stream()
    trained = {prompt for data in found.sites.values() for prompt in data.prompts}
    assert not trained & set(found.test.prompts)
    pairs = zip(found.test.records, found.test.texts, strict=True)
    assert all(text in found.choices[record] for record, text in pairs)


def test_entities_arrive_in_every_window() -> None:
    found = stream(changing=0.0)
    assert [found.test.windows.count(w) // 8 for w in range(1, 6)] == [6, 2, 2, 1, 1]
    assert found.stale == found.ends == {}
    assert set(found.concepts.values()) == {"stable"}


def test_names_for_pre_training_are_never_those_of_a_stream() -> None:
    public = {name for seed in range(3) for name in facts.entities(200, seed=seed, public=True)}
    own = {name for seed in range(3) for name in facts.entities(200, seed=seed)}
    assert not public & own
    assert len(own) > 590


def test_a_noisy_site_gives_wrong_texts_with_its_wrong_labels() -> None:
    clean = tasks.load(Plan(task=SMALL))
    noisy = tasks.load(Plan(task=SMALL, scenario=Scenario(noisy={"region-1": 0.5})))
    data = noisy.sites["region-1"]
    names = clean.catalogue.texts
    assert data.labels != clean.sites["region-1"].labels
    assert data.texts == tuple(names[label] for label in data.labels)


def test_values_out_of_range_are_refused_with_what_to_do() -> None:
    with pytest.raises(PlanError, match=r"set task\.sites to 3 or more"):
        stream(sites=2)
    with pytest.raises(PlanError, match="set value or attribute"):
        stream(level="block")
