"""Three small lists in the XML of the CDC, and the three real ones where their wheels are."""

import zipfile
from collections import Counter
from xml.etree import ElementTree

import pytest

from fedkola.errors import DataError, PlanError
from fedkola.evaluation import tasks
from fedkola.evaluation.tasks import icd10cm, icd_releases
from fedkola.knowledge.stream import Stream
from fedkola.plan import Plan, Scenario, Task

Entries = dict[str, tuple[str, tuple[str, ...]]]
FIRST: Entries = {
    "A10": ("Cough", ("barking",)),
    "A10.1": ("Dry cough", ("hacking", "tickle")),
    "A10.7X": ("Cough by smoke", ("smoker's cough",)),
    "A11": ("Fever", ("heat",)),
    "A12": ("Rash", ("spots",)),
}
SECOND: Entries = {
    "A10": ("Cough", ("barking",)),
    "A10.1": ("Dry coughing", ("hacking",)),
    "A10.2": ("Wet cough", ("tickle", "phlegm")),
    "A10.71": ("Cough by smoke of tobacco", ()),
    "A10.72": ("Cough by smoke of fires", ("smoker's cough",)),
    "A11": ("Fever", ("heat",)),
    "A12": ("Rash", ("spots",)),
}
THIRD: Entries = {**SECOND, "A10.1": ("Dry cough", ("hacking",)), "A13": ("Itch", ("itching",))}


def listed(entries: Entries):
    """A list of one chapter and one block; codes stand below their category."""
    root = ElementTree.Element("root")
    chapter = ElementTree.SubElement(root, "chapter")
    for tag, text in (("name", "1"), ("desc", "Signs")):
        ElementTree.SubElement(chapter, tag).text = text
    section = ElementTree.SubElement(chapter, "section", id="A10-A13")
    ElementTree.SubElement(section, "desc").text = "All signs"
    above = {}
    for code, (text, synonyms) in entries.items():
        diag = ElementTree.SubElement(above.get(code[:3], section), "diag")
        above.setdefault(code[:3], diag)
        ElementTree.SubElement(diag, "name").text = code
        ElementTree.SubElement(diag, "desc").text = text
        if synonyms:
            terms = ElementTree.SubElement(diag, "inclusionTerm")
            for synonym in synonyms:
                ElementTree.SubElement(terms, "note").text = synonym
    return icd10cm.parse(root)


LISTS = [listed(entries) for entries in (FIRST, SECOND, THIRD)]


def small(level: str = "code", **keys: object) -> Stream:
    task = Task(name="icd-releases", level=level, **{"sites": 4, "windows": 3, **keys})
    return icd_releases.build(LISTS, task, seed=1)


def heard(stream: Stream, code: str) -> list[tuple[str, int]]:
    """(text, window) of a code's records at one of the sites that hold it."""
    for site, data in stream.sites.items():
        rows = [i for i, name in enumerate(data.records) if name == f"{site}/{code}"]
        if rows:
            return [(data.texts[i], data.windows[i]) for i in rows]
    return []


def asked(stream: Stream, text: str) -> list[tuple[str, int, int | None, tuple[str, ...], str]]:
    """(label, window, last window, stale labels, concept) of a synonym's test records."""
    test = stream.test
    return [
        (
            test.labels[i],
            test.windows[i],
            stream.ends.get(test.records[i]),
            stream.stale.get(test.records[i], ()),
            stream.concepts[test.records[i]],
        )
        for i in range(len(test))
        if test.texts[i] == text
    ]


def test_a_reworded_description_revises_the_record_that_the_site_holds():
    assert heard(small(), "A10.1") == [("Dry cough", 1), ("Dry coughing", 2), ("Dry cough", 3)]


def test_a_new_code_is_heard_of_in_its_release_and_an_old_one_once():
    assert heard(small(), "A10.2") == [("Wet cough", 2)]
    assert heard(small(), "A13") == [("Itch", 3)]
    assert heard(small(), "A10") == [("Cough", 1)]


def test_a_new_code_is_at_three_hospitals_and_an_old_one_at_one():
    stream = small(overlap=0.0)
    holders = Counter(
        record.split("/")[1] for data in stream.sites.values() for record in set(data.records)
    )
    assert {holders[code] for code in ("A10.2", "A10.71", "A10.72", "A13")} == {3}
    assert {holders[code] for code in ("A10", "A10.1", "A10.7X")} == {1}


def test_a_synonym_that_moves_leaves_its_old_label_stale():
    assert asked(small(), "tickle") == [
        ("A10.1", 1, 1, (), "reworded"),
        ("A10.2", 2, None, ("A10.1",), "moved"),
    ]


def test_a_new_code_is_asked_from_its_release_and_a_retired_one_until_then():
    assert asked(small(), "phlegm") == [("A10.2", 2, None, (), "new")]
    assert asked(small(), "itching") == [("A13", 3, None, (), "new")]
    assert asked(small(), "smoker's cough") == [
        ("A10.7X", 1, 1, (), "retired"),
        ("A10.72", 2, None, ("A10.7X",), "moved"),
    ]
    assert asked(small(), "barking") == [("A10", 1, None, (), "kept")]


def test_a_retired_code_has_an_end_and_an_heir_and_a_new_one_a_beginning():
    labels = {label.code: label for label in small().catalogue.labels}
    retired = labels["A10.7X"]
    assert (retired.valid_to, retired.replaced_by) == (2.0, ("A10.72",))
    assert retired.path == ("A10.7X", "A10", "A10-A13", "chapter-1")
    assert labels["A13"].valid_from == 3.0
    assert {label.valid_to for label in labels.values()} == {None, 2.0}


def test_heirs_are_found_by_synonym_then_by_text_then_by_place_in_the_tree():
    first, second = ({code.code: code for code in codes} for _, codes in LISTS[:2])
    assert icd_releases.successors("A10.7X", first, second) == ("A10.72",)
    bare = {**second}
    del bare["A10.72"]
    assert icd_releases.successors("A10.7X", first, bare) == ("A10.71",)
    del bare["A10.71"]
    assert icd_releases.successors("A10.7X", first, bare) == ("A10.2",)
    assert icd_releases.successors("A12", first, {}) == ()


def test_codes_are_the_labels_of_the_categories_that_changed_alone():
    categories = {label.path[1] for label in small().catalogue.labels}
    assert categories == {"A10", "A13"}
    assert small(level="category").catalogue.codes() == ("A10", "A11", "A12", "A13")


def test_above_codes_a_move_within_a_category_changes_nothing():
    stream = small(level="block")
    assert asked(stream, "tickle") == [("A10", 1, None, (), "reworded")]
    assert stream.stale == {}
    assert stream.catalogue.levels == ("category", "block", "chapter")


def test_a_release_of_two_windows_tells_of_a_code_in_the_same_half_every_time():
    stream = small(windows=6)
    texts, windows = zip(*heard(stream, "A10.1"), strict=True)
    assert texts == ("Dry cough", "Dry coughing", "Dry cough")
    assert windows in ((1, 3, 5), (2, 4, 6))
    assert stream.windows[:2] == ("2021-01 (1/2)", "2021-01 (2/2)")
    last = {window for _, _, window, _, _ in asked(stream, "tickle")}
    assert last == {2, None}


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"windows": 8}, "set 3, 6, 9"),
        ({"sites": 3}, "sites to 4 or more"),
        ({"level": "leaf"}, "code, category, block, chapter"),
    ],
)
def test_what_cannot_be_built_is_refused(tmp_path, keys, message):
    task = Task(name="icd-releases", folder=str(tmp_path), **{"windows": 3, **keys})
    with pytest.raises(PlanError, match=message):
        icd_releases.load(task, seed=1)


def test_an_absent_wheel_and_another_one_are_refused(tmp_path):
    task = Task(name="icd-releases", folder=str(tmp_path), windows=3)
    with pytest.raises(DataError, match=r"cannot be read.*fetch_releases"):
        icd_releases.load(task, seed=1)
    with zipfile.ZipFile(tmp_path / icd_releases.RELEASES[0].wheel, "w") as wheel:
        wheel.writestr("data/tabular.xml", "<root/>")
    with pytest.raises(DataError, match="has the SHA-256"):
        icd_releases.load(task, seed=1)


def test_the_real_releases_differ_as_measured(releases):
    stream = icd_releases.load(
        Task(name="icd-releases", folder=releases, level="code", windows=3), seed=1
    )
    assert stream.notices[:2] == (
        "2025-04: 1488 codes new, 7 retired, 85 reworded",
        "2026-04: 383 codes new, 0 retired, 20 reworded",
    )
    retired = {
        label.code: label.replaced_by
        for label in stream.catalogue.labels
        if label.valid_to is not None
    }
    assert len(retired) == 7
    assert retired["T40.7X1"] == ("T40.711",)
    assert set().union(*retired.values()) <= set(stream.catalogue.codes())
    revised = Counter(
        record.split("/")[1]
        for data in stream.sites.values()
        for record, count in Counter(data.records).items()
        if count > 1
    )
    assert len(revised) == 105
    assert len(stream.stale) > 100


def test_a_hospital_may_take_up_a_release_later(releases):
    task = Task(name="icd-releases", folder=releases, windows=3, per_label=20)
    scenario = Scenario(release={"eastfield-trauma": 1})
    late = tasks.load(Plan(task=task, scenario=scenario)).sites["eastfield-trauma"]
    prompt = tasks.load(Plan(task=task)).sites["eastfield-trauma"]
    assert set(late.windows) == {1, 3}
    assert set(late.records) == set(prompt.records)
    assert len(set(zip(late.records, late.windows, strict=True))) == len(late)
