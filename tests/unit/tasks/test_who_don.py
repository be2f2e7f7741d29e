from collections import Counter

import pytest

from fedkola.errors import DataError, PlanError
from fedkola.evaluation.tasks import corpora, who_don
from fedkola.knowledge.stream import Stream
from fedkola.plan import Task

HOMES = {"africa": "COD", "americas": "BRA", "europe": "FRA", "western-pacific": "CHN"}


def report(number: int, date: str, *countries: str, **changes: object) -> dict[str, object]:
    return {
        "id": f"DON{number:04d}",
        "date": date,
        "diseases": ["Cholera"],
        "icd11_block": ["Gut"],
        "countries": list(countries),
        "text": f"report {number}",
        **changes,
    }


REPORTS = [
    report(1, "2001-02-03", "COD", "BRA", "AGO"),
    report(2, "2001-12-31", "BRA"),
    report(3, "2002-01-01", "COD", diseases=["Plague"], icd11_block=["Bite"]),
    report(4, "2004-07-01", "FRA", diseases=["Measles"], icd11_block=[""]),
    report(5, "2004-07-02", "CHN", diseases=[]),
    report(6, "2004-07-03", "CHN", diseases=["Plague", "Cholera"]),
    report(7, "soon", "CHN"),
    report(8, "2004-07-04", "XXX"),
]


@pytest.fixture
def folder(corpus):
    return corpus({who_don.FILE: REPORTS})


def load(folder: str, **keys: object) -> Stream:
    return who_don.load(Task(name="who-don", folder=folder, **{"sites": 6, **keys}), seed=1)


def test_a_report_is_asked_about_before_the_window_in_which_it_is_learnt(folder):
    stream = load(folder)
    learnt = {
        record: window
        for data in stream.sites.values()
        for record, window in zip(data.records, data.windows, strict=True)
    }
    assert stream.windows == ("2001", "2002", "2003", "2004")
    assert learnt == {"DON0001": 1, "DON0002": 1, "DON0003": 2, "DON0004": 4}
    asked = dict(zip(stream.test.records, stream.test.windows, strict=True))
    assert asked == stream.ends == {"DON0003": 1, "DON0004": 3}
    assert stream.concepts == {"DON0003": "2002", "DON0004": "2004"}


def test_a_report_is_at_the_region_of_most_of_its_countries(folder):
    stream = load(folder)
    assert stream.sites["africa"].records == ("DON0001", "DON0003")
    assert stream.sites["americas"].records == ("DON0002",)
    assert len(stream.sites["south-east-asia"]) == 0
    assert stream.about["africa"]["specialty"] == "WHO region africa"


def test_what_has_not_one_disease_a_date_and_a_country_is_counted(folder):
    assert load(folder).excluded["train"] == {
        "bad date": 1,
        "no country of a WHO region": 1,
        "no disease": 1,
        "several diseases": 1,
    }


def test_a_disease_stands_below_its_group(folder):
    paths = {label.code: label.path[1] for label in load(folder).catalogue.labels}
    assert paths == {"Cholera": "Gut", "Measles": "unspecified", "Plague": "Bite"}


def test_quarters_keep_those_without_a_report():
    dates = ["2001-02-03", "2001-12-31", "2002-04-01"]
    names = corpora.calendar(dates, "quarter")
    assert names == ("2001-Q1", "2001-Q2", "2001-Q3", "2001-Q4", "2002-Q1", "2002-Q2")
    assert [corpora.within(date, "quarter") for date in dates] == [names[0], names[3], names[5]]
    assert corpora.calendar(dates, "year") == ("2001", "2002")


def test_large_regions_are_divided_by_country():
    countries = ["COD"] * 5 + ["AGO"] * 4 + ["GIN"] * 3 + ["CHN"] * 2
    homes, members = who_don.divided(countries, 7)
    assert list(members) == [
        *("africa", "africa-2", "americas", "eastern-mediterranean"),
        *("europe", "south-east-asia", "western-pacific"),
    ]
    assert (homes["COD"], homes["AGO"], homes["GIN"]) == ("africa", "africa-2", "africa-2")
    assert members["africa-2"] == "AGO, GIN"


def test_no_country_is_in_two_regions():
    counts = Counter(code for codes in who_don.REGIONS.values() for code in codes)
    assert max(counts.values()) == 1
    assert all(len(code) == 3 and code.isupper() for code in counts)


@pytest.mark.parametrize(
    ("keys", "message"),
    [({"sites": 5}, "6 regions"), ({"level": "block"}, "no level")],
)
def test_what_cannot_be_built_is_refused(folder, keys, message):
    with pytest.raises(PlanError, match=message):
        load(folder, **keys)


def test_a_corpus_without_a_usable_report_is_refused(corpus):
    with pytest.raises(DataError, match="no report of one disease"):
        load(corpus({who_don.FILE: REPORTS[4:]}))


def test_the_real_reports_are_all_used_but_those_without_one_disease(real):
    stream = load(real("who_don"), sites=12)
    assert stream.excluded == {"train": {"no disease": 99, "several diseases": 8}}
    assert sum(len(data) for data in stream.sites.values()) == 2_366
    assert len(stream.windows) == 23
    assert len(stream.test) == 2_260
    assert min(len(data) for data in stream.sites.values()) > 150
    late = [year for year in stream.concepts.values() if "2012" <= year <= "2018"]
    assert len(late) == 846
