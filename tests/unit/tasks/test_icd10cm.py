import re
import time
from collections import Counter, defaultdict

import pytest

from fedkola.errors import PlanError
from fedkola.evaluation.tasks import icd10cm
from fedkola.plan import Task
from fedkola.types import Dataset

FULL = icd10cm.load(Task(), seed=7)
SMALL = icd10cm.load(Task(per_label=4, windows=6), seed=7)


def chapter_of() -> dict[str, str]:
    return {label.code: label.scope for label in FULL.catalogue.labels}


def holders(column: dict[str, str]) -> dict[str, set[str]]:
    found: defaultdict[str, set[str]] = defaultdict(set)
    for site, data in FULL.sites.items():
        for label in data.labels:
            found[column[label]].add(site)
    return found


def codes(data: Dataset) -> list[str]:
    return [record.rsplit("/", 1)[1] for record in data.records]


def test_the_list_has_the_sizes_of_the_april_2026_release():
    catalogue, entries = icd10cm.tabular()

    assert len(entries) == 46_881
    assert sum(len(entry.synonyms) for entry in entries) == 13_487
    assert [len(catalogue.nodes(level)) for level in range(3)] == [1_918, 285, 22]
    assert catalogue.levels == ("category", "block", "chapter")


def test_a_label_knows_its_place_and_its_words():
    catalogue, _ = icd10cm.tabular()
    cholera = catalogue.labels[0]

    assert cholera.code == "A00"
    assert cholera.path == ("A00", "A00-A09", "chapter-1")
    assert cholera.scope == "icd10cm/chapter-1"
    assert catalogue.texts["A00"] == "Cholera"
    assert catalogue.texts["A00-A09"] == "Intestinal infectious diseases (A00-A09)"
    assert catalogue.texts["chapter-1"].startswith("Certain infectious and parasitic diseases")
    assert set(catalogue.texts) == {name for label in catalogue.labels for name in label.path}


def test_every_description_is_at_a_hospital_and_a_tenth_at_two():
    counts = Counter(code for data in FULL.sites.values() for code in codes(data))

    assert len(counts) == 46_881
    assert set(counts.values()) == {1, 2}
    assert Counter(counts.values())[2] / 46_881 == pytest.approx(0.1, abs=0.001)


def test_record_identifiers_are_unique_in_the_whole_federation():
    records = [record for data in FULL.sites.values() for record in data.records]

    assert len(records) == len(set(records))


def test_every_chapter_survives_the_loss_of_a_hospital():
    by_chapter = holders(chapter_of())

    assert len(by_chapter) == 22
    assert min(len(sites) for sites in by_chapter.values()) >= 4


def test_a_category_of_three_records_is_at_three_hospitals():
    _, entries = icd10cm.tabular()
    sizes = Counter(entry.category for entry in entries)
    by_category = holders({label.code: label.code for label in FULL.catalogue.labels})

    assert all(len(by_category[code]) >= min(3, size) for code, size in sizes.items())


def test_twelve_hospitals_have_proper_names_and_sizes_of_their_own():
    assert len(FULL.sites) == 12
    assert all(re.fullmatch(r"[a-z0-9-]{1,32}", name) for name in FULL.sites)
    assert len({len(data) for data in FULL.sites.values()}) == 12
    special = [h for h in icd10cm.HOSPITALS.values() if h.home]
    general = [h for h in icd10cm.HOSPITALS.values() if not h.home]
    assert all(4 <= len(house.chapters) <= 9 for house in special)
    assert min(len(house.chapters) for house in general) > 9


def test_a_hospital_holds_the_scopes_it_says_it_does():
    chapter = chapter_of()

    for site, data in FULL.sites.items():
        assert {chapter[label] for label in data.labels} == set(FULL.about[site]["scopes"])
        assert FULL.about[site]["specialty"]


def test_a_chapter_arrives_at_all_its_hospitals_at_once_and_no_window_is_empty():
    chapter = chapter_of()
    arrival = defaultdict(set)
    for data in FULL.sites.values():
        for label, window in zip(data.labels, data.windows, strict=True):
            arrival[chapter[label]].add(window)

    assert all(len(windows) == 1 for windows in arrival.values())
    assert {w for windows in arrival.values() for w in windows} == set(range(1, 9))
    assert FULL.windows == tuple(f"2026-{month:02d}" for month in range(1, 9))
    assert all(
        {window} == arrival[chapter[label]]
        for label, window in zip(FULL.test.labels, FULL.test.windows, strict=True)
    )


def test_patients_are_of_one_hospital_and_have_up_to_six_records():
    for site, data in FULL.sites.items():
        counts = Counter(data.patients)
        assert all(patient.startswith(f"{site}/patient-") for patient in counts)
        assert max(counts.values()) == 6


def test_the_same_seed_gives_the_same_stream_and_another_seed_another():
    again = icd10cm.load(Task(per_label=4, windows=6), seed=7)
    other = icd10cm.load(Task(per_label=4, windows=6), seed=8)

    assert again == SMALL
    assert other.sites != SMALL.sites
    assert other.test.records != SMALL.test.records


def test_a_cap_holds_per_block_and_shrinks_the_test_with_it():
    block = {label.code: label.path[1] for label in SMALL.catalogue.labels}
    distinct = {code for data in SMALL.sites.values() for code in codes(data)}
    counts = Counter(block[code.split(".")[0]] for code in distinct)

    assert len(counts) == 285
    assert max(counts.values()) == 4
    assert 0 < len(SMALL.test) < 1_000
    assert SMALL.catalogue == FULL.catalogue
    assert "task.per_label = 4 leaves out" in SMALL.notices[0]


def test_the_level_reported_decides_what_is_capped():
    stream = icd10cm.load(Task(per_label=4, windows=6, level="chapter", overlap=0.0), seed=7)

    assert sum(len(data) for data in stream.sites.values()) == 22 * 4


@pytest.mark.parametrize("sites", [4, 7, 12, 13, 30])
def test_any_number_of_hospitals_keeps_four_holders_of_each_chapter(sites):
    houses = icd10cm.hospitals(sites)

    assert len(houses) == sites
    assert all(re.fullmatch(r"[a-z0-9-]{1,32}", name) for name in houses)
    for number in range(1, 23):
        assert sum(number in house.chapters for house in houses.values()) >= 4


@pytest.mark.parametrize(
    ("task", "message"),
    [
        (Task(level="codes"), "set category, block, chapter"),
        (Task(sites=3), "4 or more"),
        (Task(windows=23), "22 chapters fill 1 to 22 windows"),
    ],
)
def test_what_cannot_be_built_is_refused_with_what_can(task, message):
    with pytest.raises(PlanError, match=message):
        icd10cm.load(task, seed=7)


def test_reading_the_list_takes_seconds():
    icd10cm.tabular.cache_clear()
    start = time.process_time()

    icd10cm.load(Task(), seed=3)

    assert time.process_time() - start < 10


def test_a_backlog_arrives_in_the_last_window_and_never_delays_a_category():
    on_time = icd10cm.load(Task(per_label=8, windows=6), seed=7)
    late = icd10cm.load(Task(per_label=8, windows=6, backlog=0.5), seed=7)

    moved = sum(
        sum(w == 6 for w in late.sites[name].windows) - sum(w == 6 for w in data.windows)
        for name, data in on_time.sites.items()
    )
    assert moved > 100
    assert late.test.windows == on_time.test.windows
    for name, data in on_time.sites.items():
        assert sorted(late.sites[name].records) == sorted(data.records)
