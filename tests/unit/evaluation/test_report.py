"""The report: every section when its data are there, none when they are not, and nothing active.

``report_fixture.json`` is invented, sized like the demo; its numbers are no results.
"""

import base64
import copy
import hashlib
import json
import re
import xml.etree.ElementTree as ET
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedkola.evaluation import plots
from fedkola.evaluation.report import render

FIXTURE = json.loads(Path(__file__).with_name("report_fixture.json").read_text("utf-8"))
MINIMAL = {"title": "A run", "run": "r1"}
SECTIONS = {
    "timeline": ("windows",),
    "accuracy": ("windows", "matrix"),
    "comparison": ("comparison",),
    "freshness": ("metrics", "matrix"),
    "lineage": ("lineage",),
    "traffic": ("windows",),
    "sites": ("sites",),
    "examples": ("examples",),
    "receipt": ("receipt",),
    "privacy": ("privacy",),
    "next": ("commands",),
    "made": ("machine", "plan"),
}
VOID = {"meta", "br", "link", "img", "hr", "input"}


class Page(HTMLParser):
    """Tags, attributes and text of a page; notes tags that are not closed in order."""

    def __init__(self, page: str) -> None:
        super().__init__(convert_charrefs=True)
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text: list[str] = []
        self.open: list[str] = []
        self.wrong: list[str] = []
        self.feed(page)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        if not self.open or self.open.pop() != tag:
            self.wrong.append(tag)

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] != "style":
            self.text.append(data)

    def ids(self) -> list[str]:
        return [attrs["id"] or "" for _, attrs in self.tags if "id" in attrs]

    def words(self) -> str:
        return re.sub(r"\s+", " ", " ".join(self.text))


def doc(**changes: Any) -> dict[str, Any]:
    return {**copy.deepcopy(FIXTURE), **changes}


def without(*keys: str) -> dict[str, Any]:
    return {key: value for key, value in doc().items() if key not in keys}


# --- sections -------------------------------------------------------------------------------------


def test_a_full_document_has_every_section_once_and_in_order() -> None:
    ids = Page(render(FIXTURE)).ids()
    assert [name for name in ids if name in SECTIONS] == list(SECTIONS)
    assert len(ids) == len(set(ids))


@pytest.mark.parametrize("section", SECTIONS)
def test_a_section_without_data_is_left_out(section: str) -> None:
    page = render(without(*SECTIONS[section]))
    assert section not in Page(page).ids()
    assert f"#{section}" not in re.sub(r"<style>.*?</style>", "", page, flags=re.S)


@pytest.mark.parametrize("section", SECTIONS)
def test_a_section_with_empty_data_is_left_out_too(section: str) -> None:
    empty = {key: type(FIXTURE[key])() for key in SECTIONS[section]}
    assert section not in Page(render(doc(**empty))).ids()


def test_title_and_run_are_enough() -> None:
    page = Page(render(MINIMAL))
    assert not set(page.ids()) & set(SECTIONS)
    assert "A run" in page.words()
    assert "None" not in page.words()


@pytest.mark.parametrize("key", ["title", "run"])
def test_a_document_without_title_or_run_is_refused_by_name(key: str) -> None:
    with pytest.raises(ValueError, match=f"{key} is missing"):
        render({name: value for name, value in MINIMAL.items() if name != key})


def test_rendering_changes_nothing_in_the_document_and_repeats_exactly() -> None:
    given_doc = doc()
    assert render(given_doc) == render(given_doc)
    assert given_doc == FIXTURE


def test_windows_and_examples_with_hardly_any_keys_still_render() -> None:
    page = Page(
        render(
            {
                **MINIMAL,
                "windows": [{"number": 1}, {}],
                "sites": [{"site": "A"}],
                "examples": {"missing": [{"text": "x"}]},
                "receipt": {"request": "f1"},
                "comparison": [{"method": "FedIT"}],
                "scopes": [{"id": "s"}],
                "matrix": [[None], [0.5]],
            }
        )
    )
    assert page.wrong == []
    assert "None" not in page.words()
    assert "nan" not in page.words()


# --- safety ---------------------------------------------------------------------------------------


def poisoned(value: Any, text: str) -> Any:
    """The document with every string replaced, its keys of free text included."""
    if isinstance(value, str):
        return text
    if isinstance(value, list):
        return [poisoned(item, text) for item in value]
    if isinstance(value, dict):
        return {
            (text if key == "Lakeside Psychiatry" else key): poisoned(v, text)
            for key, v in value.items()
        }
    return value


@pytest.mark.parametrize(
    "text",
    [
        "<script>alert(1)</script>",
        "\"><img src=x onerror='alert(1)'>",
        "</style></title><svg onload=alert(1)>",
        "{{ 7 * 7 }}{% raw %}",
        "&lt;b&gt; & co",
    ],
)
def test_every_text_of_the_document_is_shown_as_text(text: str) -> None:
    page = Page(render(poisoned(FIXTURE, text)))
    assert text in "".join(page.text)
    assert not {"script", "img", "iframe", "object"} & {tag for tag, _ in page.tags}
    assert not [name for _, attrs in page.tags for name in attrs if name.startswith("on")]
    assert page.wrong == []


@settings(max_examples=25, deadline=None)
@given(st.text(min_size=1, max_size=40))
def test_no_text_breaks_the_page(text: str) -> None:
    changed = doc(
        title=text,
        scopes=[{"id": text, "text": text, "first_window": 1}],
        matrix=[[0.5], [0.6]],
        sites=[{"site": text, "role": text, "scopes": [text], "records": 1}],
    )
    assert Page(render(changed)).wrong == []


def test_the_page_refers_to_nothing_outside_itself() -> None:
    page = render(FIXTURE)
    assert not re.search(r"https?://|url\(|@import|src=|data:", page)
    links = [a["href"] for tag, a in Page(page).tags if "href" in a]
    assert links
    assert all(link is not None and link.startswith("#") for link in links)


def test_the_policy_admits_this_style_sheet_and_nothing_else() -> None:
    page = render(FIXTURE)
    sheets = re.findall(r"<style>(.*?)</style>", page, flags=re.S)
    digest = base64.b64encode(hashlib.sha256(sheets[0].encode()).digest()).decode()
    policy = next(
        a["content"] for t, a in Page(page).tags if a.get("http-equiv") == "Content-Security-Policy"
    )
    assert len(sheets) == 1
    assert policy is not None
    assert policy.startswith(f"default-src 'none'; style-src 'sha256-{digest}';")
    assert "unsafe" not in policy
    assert not [a for _, a in Page(page).tags if "style" in a]


# --- a page that all can read ---------------------------------------------------------------------


def test_the_page_is_well_formed_with_one_title_and_ordered_headings() -> None:
    page = Page(render(FIXTURE))
    levels = [int(tag[1]) for tag, _ in page.tags if re.fullmatch(r"h[1-6]", tag)]
    assert page.wrong == []
    assert page.open == []
    assert levels.count(1) == 1
    assert all(after - before <= 1 for before, after in pairwise(levels))


def test_every_table_has_a_caption_and_every_plot_a_label() -> None:
    page = Page(render(FIXTURE))
    tags = [tag for tag, _ in page.tags]
    plotted = [a for tag, a in page.tags if tag == "svg" and a.get("class") == "plot"]
    bars = [a for tag, a in page.tags if tag == "svg" and a.get("class") == "bar"]
    assert tags.count("table") == tags.count("caption") == 7
    assert len(plotted) == 4
    assert all(a.get("role") == "img" and len(a.get("aria-label") or "") > 40 for a in plotted)
    assert bars
    assert all(a.get("aria-hidden") == "true" for a in bars)


def test_labels_point_at_ids_that_exist() -> None:
    page = Page(render(FIXTURE))
    ids = set(page.ids())
    for _, attrs in page.tags:
        if "aria-labelledby" in attrs:
            assert attrs["aria-labelledby"] in ids
        if "href" in attrs:
            assert (attrs["href"] or "")[1:] in ids


def luminance(colour: str) -> float:
    parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    red, green, blue = (c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in parts)
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


def contrast(one: str, other: str) -> float:
    low, high = sorted((luminance(one), luminance(other)))
    return (high + 0.05) / (low + 0.05)


@pytest.mark.parametrize("theme", [0, 1], ids=["light", "dark"])
def test_text_and_marks_keep_their_contrast_by_day_and_in_the_dark(theme: int) -> None:
    blocks = re.findall(r":root \{(.*?)\}", render(MINIMAL), flags=re.S)
    colours = dict(re.findall(r"--([\w-]+): (#[0-9a-f]{6})", blocks[theme]))
    text = [
        *((ink, ground) for ink in ("ink", "muted") for ground in ("paper", "panel")),
        *((ink, "paper") for ink in ("accent", "c1", "c2", "warn", "good")),
        ("warn", "warn-bg"),
        ("good", "good-bg"),
        ("muted", "good-bg"),
        ("muted", "warn-bg"),
        *(("on-low", f"s{step}") for step in range(4)),
        *(("on-high", f"s{step}") for step in range(4, plots.STEPS)),
    ]
    for ink, ground in text:
        assert contrast(colours[ink], colours[ground]) >= 4.5, (ink, ground)
    for mark in ("c1", "c2"):
        assert contrast(colours[mark], colours["paper"]) >= 3


# --- what the page says ---------------------------------------------------------------------------


def test_numbers_are_written_for_readers() -> None:
    assert plots.percent(0.7043) == "70.4%"
    assert plots.percent(-0.0121) == "\N{MINUS SIGN}1.2%"
    assert plots.percent(-0.0001) == "0.0%"
    assert plots.percent(0.5, 0) == "50%"
    assert plots.count(46881) == "46,881"
    assert [plots.megabytes(n) for n in (0, 120, 42_000, 420_000, 800_000, 4.2e6, 4.2e9)] == [
        "0",
        "<0.001",
        "0.042",
        "0.42",
        "0.80",
        "4.2",
        "4,200",
    ]
    assert [plots.seconds(t) for t in (0.41, 9.97, 61, 148, 7500)] == [
        "0.4 s",
        "10 s",
        "61 s",
        "2 min 28 s",
        "2 h 05 min",
    ]


@pytest.mark.parametrize("value", [None, float("nan"), float("inf"), "x", True])
def test_what_is_not_a_number_is_a_dash(value: Any) -> None:
    shown = {f(value) for f in (plots.percent, plots.count, plots.megabytes, plots.seconds)}
    assert shown == {plots.DASH}


def test_the_first_screen_states_result_and_figures() -> None:
    words = Page(render(FIXTURE)).words()
    start = words[: words.index("What happened, window by window")]
    assert FIXTURE["headline"] in start
    assert all(f["label"] in start and f["value"] in start for f in FIXTURE["figures"])
    assert "22 November 2026, 14:05 UTC" in start


def test_the_timeline_names_what_arrived_and_who_was_away() -> None:
    words = Page(render(FIXTURE)).words()
    assert "Arrived: Certain infectious and parasitic diseases; Diseases of the circ" in words
    assert "Lakeside Psychiatry: late: first answers in window 4" in words
    assert "Westmoor Dermatology left; its 14 cells were removed by subtraction." in words


def test_a_column_that_no_window_fills_is_left_out() -> None:
    bare = [{k: v for k, v in w.items() if k != "sealed"} for w in FIXTURE["windows"]]
    assert "Cells sealed" in render(FIXTURE)
    assert "Cells sealed" not in render(doc(windows=bare))


def test_the_heat_map_is_grey_before_a_chapter_arrives_and_marks_its_arrival() -> None:
    page = render(FIXTURE)
    empty = sum(cell is None for row in FIXTURE["matrix"] for cell in row)
    assert page.count('<td class="before" aria-label="not arrived"></td>') == empty
    assert len(re.findall(r'<td class="s\d first">', page)) == len(FIXTURE["scopes"])


def test_shades_span_the_values_and_stay_inside() -> None:
    low, high = plots.shades([[0.44, None], [0.91, 0.5]])
    assert (low, high) == (0.4, 1.0)
    assert [plots.shade(v, low, high) for v in (0.0, 0.4, 0.7, 1.0, 2.0)] == [0, 0, 3, 6, 6]
    assert plots.shades([[1.0]]) == (0.9, 1.0)
    assert plots.shades([[0.0]]) == (0.0, 0.1)


def test_only_a_site_that_agrees_far_less_stands_out() -> None:
    page = render(FIXTURE)
    assert '<span class="badge warn">noisy</span>' in page
    assert page.count('<span class="warn-text">') == 1
    assert '<strong class="warn-text">Hillcrest Orthopaedics</strong> stands out' in page
    quiet = [{**site, "agreement": 0.9, "role": ""} for site in FIXTURE["sites"]]
    assert "stands out" not in render(doc(sites=quiet))


def test_nothing_is_said_to_be_lost_only_when_nothing_is() -> None:
    assert "nothing is lost" in render(FIXTURE)
    lossy = doc(metrics={"excess_forgetting": 0.02, "forgetting": 0.05})
    assert "nothing is lost" not in render(lossy)
    unknown = doc(metrics={"forgetting": 0.05})
    assert "nothing is lost" not in render(unknown)


def test_a_chapter_that_never_became_answerable_is_said_to_be_missing() -> None:
    lags = {**FIXTURE["metrics"]["freshness_lag"], "icd10cm/chapter-2": float("inf")}
    words = Page(render(doc(metrics={"freshness_lag": lags}))).words()
    assert "20 of 22" in words
    assert "not yet" in words
    assert "1 had not reached nine tenths" in words


@pytest.mark.parametrize(
    ("equal", "says"),
    [
        (True, "✓ Equal to never having joined"),
        (False, "✗ Not equal to never having joined"),
        (None, "Not compared with never having joined"),
    ],
)
def test_the_receipt_claims_equality_only_when_it_was_shown(equal: bool | None, says: str) -> None:
    receipt = {**FIXTURE["receipt"], "equal_to_never_joined": equal}
    words = Page(render(doc(receipt=receipt))).words()
    assert says in words
    assert ("both hashes are the same" in words) is (equal is True)


def test_the_receipt_shortens_hashes_and_explains_only_its_own_classes() -> None:
    words = Page(render(FIXTURE)).words()
    before = FIXTURE["receipt"]["cells"][0]["before"]
    assert f"{before[:8]}…{before[-4:]}" in words
    assert before not in words
    assert "E0 : subtracted from the sum" in words
    assert "retrained without the data" not in words
    assert all(line in words for line in FIXTURE["receipt"]["not_covered"])


def test_reasons_for_missing_knowledge_are_told_in_words() -> None:
    words = Page(render(FIXTURE)).words()
    assert "this reader's view does not hold it" in words
    assert "No site has taught the model about this." in words
    assert "not_held" not in words


def test_the_lineage_draws_every_version_and_what_superseded_it() -> None:
    page = render(FIXTURE)
    words = Page(page).words()
    assert "The bank holds 6 module versions, 5 of them current; 1 was superseded" in words
    assert "superseded by icd10cm/chapter-10@2" in words
    assert page.count('class="heir"') == 1
    assert "12 records wait at their sites" in words
    plain = [v for v in FIXTURE["lineage"]["versions"] if v["closed"] is None]
    alone = doc(lineage={"rounds": 8, "versions": plain[:1], "changes": []})
    assert "1 module version, 1 of them current." in Page(render(alone)).words()
    assert "superseded" not in Page(render(alone)).words()
    assert 'class="heir"' not in render(alone)
    assert "waits or was flagged" not in render(alone)


# --- plots ----------------------------------------------------------------------------------------


def parsed(plot: str) -> ET.Element:
    return ET.fromstring(plot)


def test_plots_are_well_formed_and_carry_title_and_description() -> None:
    windows = FIXTURE["windows"]
    rows = [{"number": "1", "text": "A & <b>", "first": 0.8, "last": 0.7, "lag": "", "late": False}]
    for plot in (plots.accuracy(windows), plots.traffic(windows), plots.arrivals(rows)):
        root = parsed(plot)
        assert root.find("title") is not None
        assert (root.findtext("desc") or "").endswith(".")


def test_marks_stay_inside_their_plot() -> None:
    for n in (1, 3, 8, 60):
        windows = (FIXTURE["windows"] * 8)[:n]
        for root in (parsed(plots.accuracy(windows)), parsed(plots.traffic(windows))):
            _, _, width, height = map(float, root.attrib["viewBox"].split())
            for box in root.iter("rect"):
                assert 0 <= float(box.attrib["x"]) <= width
                assert float(box.attrib["y"]) >= 0
                assert float(box.attrib["y"]) + float(box.attrib["height"]) <= height + 0.1
            for dot in root.iter("circle"):
                assert 0 <= float(dot.attrib["cy"]) <= height


def test_a_plot_without_values_is_empty() -> None:
    assert plots.accuracy([]) == plots.traffic([{}]) == plots.arrivals([]) == plots.bar(None) == ""
    assert plots.accuracy([{"known": 3}]) == ""


def test_a_long_name_is_cut_at_a_word_that_can_end_it() -> None:
    assert plots.clip("Neoplasms", 38) == "Neoplasms"
    assert plots.clip("Diseases of the blood and organs", 27) == "Diseases of the blood…"
    assert (
        plots.clip("Mental and Neurodevelopmental disorders", 27) == "Mental and Neurodevelopmen…"
    )
    assert plots.clip("x" * 50, 10) == "x" * 9 + "…"
