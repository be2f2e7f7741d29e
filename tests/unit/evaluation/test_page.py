"""The page of a stream: every sentence says what the figures say, and the opposite of others."""

import json
import re
import xml.etree.ElementTree as ET
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from fedkola.errors import DataError
from fedkola.evaluation import dynamic, metrics, page, plots
from fedkola.evaluation.page import sections, written
from fedkola.evaluation.page.course import course, tell
from fedkola.evaluation.page.parts import Page
from fedkola.evaluation.setups import SETUPS

R = [[0.8, None], [0.7, 0.6]]
MACHINE = {"cores": 2, "processor": "x86_64", "torch": "2", "python": "3.11", "load": 1.5}


def cell(row: str, seed: int, top1: float, r: Any = None, **changes: Any) -> dict[str, Any]:
    """One measured cell of a stream of two concepts and two windows."""
    r = R if r is None else r
    found = {
        "row": row,
        "seed": seed,
        "untouched": {"top1": top1, "top5": top1, "asked": 500, "nodes": 40},
        "bytes_up": 8e6,
        "bytes_up_per_site_window": 2e6,
        "cpu_s": 10.0,
        "machine": MACHINE,
        "R": r,
        "concepts": ["codes/heart", "codes/lung"],
        "forgetting": metrics.forgetting(r),
        "bwt": metrics.backward_transfer(r),
        "plasticity": metrics.plasticity(r),
        "stream": metrics.stream_average(r),
        "lags": metrics.freshness_lag(r),
        "windows": [{"asked": 10, "top1": 0.8}, {"asked": 20, "top1": 0.65}],
    }
    return found | changes


def pooled(seed: int, top1: float) -> dict[str, Any]:
    streamed = ("R", "concepts", "forgetting", "bwt", "stream", "lags", "windows")
    whole = cell("joint", seed, top1, bytes_up=0, bytes_up_per_site_window=0)
    return {key: value for key, value in whole.items() if key not in streamed}


def result(cells: Sequence[dict[str, Any]], **changes: Any) -> dict[str, Any]:
    rows = list(dict.fromkeys(c["row"] for c in cells))
    return {
        "suite": "dynamic",
        "stream": "clinc150",
        "profile": "standard",
        "question": "Which intent is meant?",
        "machine": MACHINE,
        "rates": {"fedit": 0.001},
        "rows": rows,
        "cells": list(cells),
        "summary": dynamic.summary(cells, rows),
        "targets": [],
    } | changes


def pair(own: Sequence[float], other: Sequence[float], **changes: Any) -> dict[str, Any]:
    """FedKoLa and FedIT with these final accuracies, one a seed; changes are FedKoLa's."""
    return result(
        [cell("fedkola", s, v, **changes) for s, v in enumerate(own, start=1)]
        + [cell("fedit", s, v) for s, v in enumerate(other, start=1)]
    )


def told(given: dict[str, Any], section: str = "") -> str:
    """What a page says: its headline, or the sentences of one section."""
    explained = page.explain(given)
    if not section:
        return explained.headline
    return " ".join(next(s.says for s in explained.sections if s.id == section))


WIN = ([0.70, 0.71, 0.72], [0.60, 0.61, 0.60])
LOSS = (WIN[1], WIN[0])
DRAW = ([0.70, 0.60, 0.65], [0.60, 0.70, 0.66])


# --- headline and comparison ----------------------------------------------------------------------


def test_the_headline_says_ahead_behind_or_not_told_apart_by_the_paired_interval():
    assert "10.7 points [10.0, 12.0] ahead of fedit, the best baseline" in told(pair(*WIN))
    assert "behind fedit" in told(pair(*LOSS))
    assert "ahead" not in told(pair(*LOSS))
    assert "not told apart (difference [" in told(pair(*DRAW))


def test_on_one_seed_no_win_and_no_loss_is_claimed():
    one = pair([0.7], [0.6])
    assert "on one seed 10.0 points above fedit" in told(one)
    assert "on one seed 10.0 points below fedit" in told(pair([0.6], [0.7]))
    assert "level with fedit" in told(pair([0.6], [0.6]))
    assert "ahead" not in told(one)
    assert "one seed: it shows which figure is larger" in told(one, "against")
    assert "loses" not in told(pair([0.6], [0.7]), "against")
    assert "In final top-1 FedKoLa stands behind fedit (10.0 points)" in told(
        pair([0.6], [0.7]), "against"
    )


def test_it_says_where_we_lose_and_to_whom_and_when_to_nobody():
    dear = pair(*WIN, bytes_up_per_site_window=6e6, cpu_s=5.0)
    assert "In bytes up FedKoLa loses to fedit (3 times theirs)." in told(dear, "against")
    assert "final top-1" not in told(dear, "against")
    assert "In final top-1 FedKoLa loses to fedit (10.7 points)." in told(pair(*LOSS), "against")
    assert "FedKoLa loses to no row in anything that was measured." in told(pair(*WIN), "against")


def test_a_bound_is_named_as_one_and_is_never_the_best_baseline():
    given = result(
        [cell("fedkola", s, 0.6) for s in (1, 2)]
        + [cell("oracle", s, 0.9) for s in (1, 2)]
        + [pooled(s, 0.8) for s in (1, 2)]
        + [cell("fedit", s, 0.5) for s in (1, 2)]
    )
    assert "fedit, the best baseline" in told(given)
    assert (
        "In final top-1 FedKoLa loses to oracle (30.0 points, a bound) and joint (20.0 points, a "
        "bound)."
    ) in told(given, "against")


def test_a_read_out_of_the_joint_model_is_a_row_of_its_own():
    joint = pooled(1, 0.5) | {"readout": {"top1": 0.8, "top5": 0.9}}
    given = result([cell("fedkola", 1, 0.6), joint])
    assert "joint + tree read-out (20.0 points, a bound)" in told(given, "against")
    assert "joint (" not in told(given, "against").split("In top-5")[0]


def test_the_headline_counts_targets_that_ran_and_names_those_missed():
    met = {"name": "top-1", "bound": ">= 0.5", "value": "0.7", "verdict": "met"}
    missed = {"name": "bytes", "bound": "<= 1", "value": "2", "verdict": "missed"}
    idle = {"name": "wide", "bound": ">= 0.8", "value": "", "verdict": "not run"}
    given = pair(*WIN) | {"targets": [met, missed, idle]}
    assert told(given).endswith("It meets 1 of the 2 targets measured and misses: bytes.")
    assert told(given, "targets") == "Of 3 targets: 1 met, 1 missed, 1 not run."
    whole = pair(*WIN) | {"targets": [met]}
    assert told(whole).endswith("It meets 1 of the 1 target measured.")
    assert "targets" not in [section.id for section in page.explain(pair(*WIN)).sections]


# --- what happened --------------------------------------------------------------------------------


def arrival_rows(given: dict[str, Any]) -> Sequence[Sequence[str]]:
    return page.explain(given).sections[0].tables[0].rows


def test_every_window_names_what_arrived_in_it_and_how_it_was_answered():
    assert arrival_rows(pair(*WIN)) == (
        ("1", "heart", "10", "80.0%"),
        ("2", "lung", "20", "65.0%"),
    )
    named = pair(*WIN, moments=["2021", "2025"], texts={"codes/heart": "Heart (I00-I99)"})
    assert [row[:2] for row in arrival_rows(named)] == [("1 (2021)", "Heart"), ("2 (2025)", "lung")]
    assert told(pair(*WIN), "arrived").startswith("2 concepts arrived over 2 windows.")
    still = pair(*WIN, r=[[0.8, 0.6], [0.7, 0.6]])
    assert told(still, "arrived").startswith("2 concepts were there from window 1 on, of 2;")


def test_concepts_that_are_asked_no_more_and_orders_that_differ_are_said():
    gone = pair(*WIN, r=[[0.8, None], [None, 0.6]])
    assert "1 of them was no longer asked at the end: heart." in told(gone, "arrived")
    assert "no longer asked" not in told(pair(*WIN), "arrived")
    other = cell("fedkola", 2, 0.7, r=[[None, 0.8], [0.7, 0.6]])
    mixed = result([cell("fedkola", 1, 0.7), other])
    assert "order of arrival differs between seeds" in told(mixed, "arrived")
    assert "differs" not in told(pair(*WIN), "arrived")


def test_the_slowest_concept_is_named_when_one_was_slow():
    assert "FedKoLa answered 2 of 2 concepts in the window of arrival" in told(
        pair(*WIN), "at-once"
    )
    assert "the slowest" not in told(pair(*WIN), "at-once")
    slow = pair(*WIN, r=[[0.1, None], [0.8, 0.6]])
    assert "FedKoLa answered 1 of 2 concepts" in told(slow, "at-once")
    assert "the slowest, heart, took 1 window more" in told(slow, "at-once")


def test_a_low_bar_and_a_silent_concept_are_not_passed_off_as_freshness():
    fallen = told(pair(*WIN, r=[[0.8, None], [0.2, 0.2]]), "at-once")
    assert "the bar is low because the end is" in fallen
    assert "the bar is low" not in told(pair(*WIN), "at-once")
    silent = told(pair(*WIN, r=[[0.8, None], [0.7, 0.0]]), "at-once")
    assert "FedKoLa answered 1 of 1 concept in" in silent
    assert "FedKoLa ends without a right answer on lung." in silent


def test_stale_answers_are_told_where_they_were_counted():
    stale = pair(*WIN, stale={"late": 0.25, "all": 0.3, "asked": 8})
    assert "FedKoLa still gave the old one to 25.0% of the questions" in told(stale, "at-once")
    assert "old one" not in told(pair(*WIN), "at-once")


def test_what_was_right_when_it_was_asked_is_told_where_it_was_counted():
    asked = pair(*WIN, as_it_arrives={"share": 0.42, "right": 42, "asked": 100})
    assert "FedKoLa had 42.0% right when they were asked." in told(asked, "at-once")
    assert "when they were asked" not in told(pair(*WIN), "at-once")


def test_losses_are_named_and_told_apart_from_a_harder_question():
    fell = told(pair(*WIN), "lost")
    assert "FedKoLa fell 5.0 points from its best on the average concept" in fell
    assert "most on heart (10.0 points)" in fell
    kept = told(pair(*WIN, r=[[0.6, None], [0.7, 0.6]]), "lost")
    assert "FedKoLa ends at its best on every concept." in kept
    equal = told(pair(*WIN, excess_forgetting=0.0), "lost")
    assert "nothing was lost; the question got harder." in equal
    worse = told(pair(*WIN, excess_forgetting=0.031), "lost")
    assert "is 3.1 points better: that much was lost" in worse
    assert "nothing was lost" not in worse
    better = told(pair(*WIN, excess_forgetting=-0.01), "lost")
    assert "is 1.0 points worse: nothing was lost" in better
    assert "at once" not in fell


def test_equality_with_one_sum_is_claimed_only_for_every_seed():
    assert "bit for bit, in every seed" in told(pair(*WIN, equal_to_one_shot=True), "lost")
    cells = [cell("fedkola", s, 0.7, equal_to_one_shot=s != 2) for s in (1, 2)]
    assert "differ from the sum of everything at once in seed 2." in told(result(cells), "lost")
    assert "integers" not in told(pair(*WIN), "lost")


def test_the_price_is_told_beside_the_best_baseline_and_cheaper_equals_are_named():
    dear = told(pair(*WIN, bytes_up_per_site_window=6e6, cpu_s=25.0), "cost")
    assert "FedKoLa sends 6.0 MB up a site and window" in dear
    assert "3 times the bytes and 2.5 times the time of fedit" in dear
    assert "No other row that could be deployed is as accurate for fewer bytes." in dear
    beaten = told(pair(*LOSS, bytes_up_per_site_window=6e6), "cost")
    assert "As accurate or better for fewer bytes: fedit." in beaten
    assert "The bank" not in dear
    assert "The bank then holds 3 cells of 4.0 MB" in told(
        pair(*WIN, bank_bytes=4_000_000, bank_cells=3), "cost"
    )


def test_a_variant_of_our_own_is_no_baseline():
    given = result([cell("fedkola", 1, 0.5), cell("adapted-wide", 1, 0.6), cell("fedit", 1, 0.4)])
    assert tell(given).best == "fedit"


def test_a_stream_about_absence_tells_of_the_row_that_has_it_beside_one_that_has_not():
    cells = [
        cell(row, seed, top1)
        for row, top1 in (("fedkola", 0.7), ("fedkola-away", 0.6), ("fedkola-forgets", 0.8))
        for seed in (1, 2)
    ]
    given = result(cells, stream="availability")
    assert told(given).startswith(
        "FedKoLa away ends at 60.0% top-1, 10.0 points [10.0, 10.0] behind FedKoLa, whose sites "
        "answer in every round, for 2.0 MB"
    )
    assert "FedKoLa away fell" in told(given, "lost")
    alone = result([one for one in cells if one["row"] == "fedkola"], stream="availability")
    assert told(alone).startswith("FedKoLa ends at 70.0% top-1, for")


def test_rounds_after_the_last_window_have_a_number_and_no_moment():
    given = result([cell("fedkola", 1, 0.5, moments=["2026-01"])])
    assert "over 1 window. After each" in told(given, "arrived")
    assert "known by then. 1 round followed the last one." in told(given, "arrived")
    (table,) = sections.arrivals(tell(given)).tables
    assert [row[0] for row in table.rows] == ["1 (2026-01)", "2"]


def test_the_command_repeats_exactly_what_was_measured():
    size = SETUPS["clinc150"].sizes["standard"]
    whole = result([cell(row, s, 0.5) for row in size.rows for s in range(1, size.seeds + 1)])
    assert sections.again(tell(whole)).code == (
        "fedkola bench dynamic --stream clinc150 --profile standard"
    )
    fewer = sections.again(tell({**pair(*WIN), "stream": "icd-small"})).code
    assert fewer.endswith("--stream icd-small --profile standard --rows fedkola,fedit --seeds 3")


def test_a_result_without_our_row_tells_of_the_best_one_and_one_without_any_says_so():
    given = result([cell("fedit", 1, 0.5), cell("flora", 1, 0.6)])
    assert told(given).startswith("flora ends at 60.0% top-1, for")
    assert told(result([pooled(1, 0.5)])).startswith("No row of this result follows the stream")


# --- the course over seeds ------------------------------------------------------------------------


def test_a_course_is_the_mean_over_the_seeds_that_asked_in_order_of_arrival():
    one = cell("fedkola", 1, 0.7, r=[[None, 0.4], [0.7, 0.6]])
    two = cell("fedkola", 2, 0.7, r=[[None, 0.6], [0.9, None]])
    over = course({1: one, 2: two})
    assert over.concepts == ("codes/lung", "codes/heart")
    assert over.since == (1, 2)
    assert over.matrix == ((0.5, None), (0.6, 0.8))


# --- files ----------------------------------------------------------------------------------------


def saved(folder: Path, *results: dict[str, Any]) -> Path:
    for one in results:
        name = f"dynamic-{one['stream']}-{one['profile']}.json"
        (folder / name).write_text(json.dumps(one))
    return folder


def test_a_folder_becomes_an_index_and_three_kinds_of_files_and_links_lead_somewhere(
    tmp_path: Path,
):
    found = page.pages(saved(tmp_path, pair(*WIN)))
    name = "dynamic-clinc150-standard"
    assert list(found)[:3] == ["README.md", f"{name}.md", f"{name}.html"]
    linked = re.findall(r"\]\(([^)]+)\)", found["README.md"] + found[f"{name}.md"])
    assert set(linked) <= set(found)
    assert len([link for link in linked if link.endswith(".svg")]) == 4
    assert found == page.pages(tmp_path)


def test_quick_results_are_told_only_when_asked_for(tmp_path: Path):
    saved(tmp_path, pair(*WIN), pair(*WIN) | {"profile": "quick"})
    assert "dynamic-clinc150-quick.md" not in page.pages(tmp_path)
    assert "dynamic-clinc150-quick.md" in page.pages(tmp_path, profile="quick")
    with pytest.raises(DataError, match="of profile full"):
        page.pages(tmp_path, profile="full")


def test_results_of_earlier_versions_are_named_and_others_refused(tmp_path: Path):
    old = {k: v for k, v in pair(*WIN).items() if k != "question"}
    assert "no question. Measure it again." in page.pages(saved(tmp_path, old))["README.md"]
    (tmp_path / "dynamic-x-standard.json").write_text("[1]")
    with pytest.raises(DataError, match="holds no result but a list"):
        page.pages(tmp_path)
    (tmp_path / "dynamic-x-standard.json").write_text("{")
    with pytest.raises(DataError, match="is not JSON"):
        page.pages(tmp_path)


def test_the_html_is_one_file_without_script_and_shows_text_as_text():
    given = pair(*WIN, texts={"codes/heart": "<script>x</script>|*a*"})
    explained: Page = page.explain(given)
    text = written.html(explained)
    assert "<script>" not in text
    assert "&lt;script&gt;" in text
    assert not re.search(r"https?://(?!www\.w3\.org/2000/svg)|src=|@import|url\(", text)
    assert "prefers-color-scheme: dark" in text
    assert r"\<script\>x\</script\>\|\*a\*" in written.markdown(explained)
    assert text.count("<h1") == 1
    assert text.count("<section") == text.count("</section>") == len(explained.sections)


# --- drawings -------------------------------------------------------------------------------------


def parsed(plot: str) -> ET.Element:
    return ET.fromstring(plot)


def texts_of(plot: str) -> list[str]:
    return [found.text or "" for found in parsed(plot).iter("text")]


def test_the_heat_map_prints_numbers_marks_arrivals_and_tells_gaps_from_not_yet():
    plot = plots.heat(
        ["heart", "lung"], [[0.8, None], [0.7, 0.6], [None, 0.5]], span=plots.shades(R)
    )
    assert [t for t in texts_of(plot) if re.fullmatch(r"\d\d", t)] == ["80", "70", "60", "50"]
    kinds = [box.attrib["class"] for box in parsed(plot).iter("rect")]
    assert kinds.count("come") == 2 + 1  # one in the key
    assert kinds.count("before") == 2 + 1
    assert texts_of(plot).count(plots.DASH) == 1
    assert plots.heat(["a"], [[None]], span=(0, 1)) == ""


def test_many_windows_are_averaged_in_named_groups():
    groups = plots.grouped([[0.1 * (t % 2)] for t in range(45)])
    assert [name for name, _ in groups][:2] == [f"1{plots.DASH}3", f"4{plots.DASH}6"]
    assert len(groups) == 15
    assert groups[0][1] == [pytest.approx(0.1 / 3)]
    drawn = plots.heat(["a"], [[0.1 * (t % 2)] for t in range(45)], span=(0.0, 0.1))
    assert texts_of(drawn)[:3] == ["mean of 3 windows from", "1", "4"]
    assert plots.grouped([[0.5], [None]]) == [("1", [0.5]), ("2", [None])]


def test_panels_break_a_line_where_nothing_was_asked_and_ring_the_arrival():
    own = [[0.5, None], [0.6, None], [None, 0.4], [0.5, 0.4], [0.7, 0.3]]
    root = parsed(plots.panels(["a", "b"], own, (), who=("FedKoLa", "")))
    lines = [line for line in root.iter("polyline") if line.attrib["class"] == "line c1"]
    assert len(lines) == 1 + 2 + 1  # key, two stretches of a, one of b
    rings = [c for c in root.iter("circle") if "ring" in c.attrib["class"]]
    assert len(rings) == 2 + 1
    assert "a ends at 70.0%; b ends at 30.0%" in (root.findtext("desc") or "")
    assert plots.panels(["a"], [[None]], (), who=("x", "")) == ""


def mark(name: str, share: float, megabytes: float, kind: str = "other") -> plots.Mark:
    return plots.Mark(
        name=name, share=share, low=share - 0.01, high=share + 0.01, megabytes=megabytes, kind=kind
    )


def test_the_frontier_joins_rows_that_no_cheaper_one_beats_and_keeps_names_apart():
    marks = [mark(f"method-{i}", 0.5 + 0.001 * i, 1.0) for i in range(6)]
    marks += [mark("FedKoLa", 0.8, 5.0, "own"), mark("joint", 0.9, 0.0, "bound")]
    root = parsed(plots.frontier(marks))
    step = next(p for p in root.iter("polyline") if p.attrib["class"] == "edge")
    assert len(step.attrib["points"].split()) == 4  # method-5, up to FedKoLa, to the edge
    named = [t for t in root.iter("text") if t.attrib["class"].startswith("name")]
    assert {t.text for t in named} == {m.name for m in marks}
    boxes = [
        (float(t.attrib["x"]), float(t.attrib["y"]) - 10, 7 * len(t.text or "")) for t in named
    ]
    for i, (x, y, wide) in enumerate(boxes):
        for other_x, other_y, other_wide in boxes[i + 1 :]:
            assert x + wide <= other_x or other_x + other_wide <= x or abs(y - other_y) >= 13
    assert "nothing sent" in texts_of(plots.frontier(marks))
    assert "nothing sent" not in texts_of(plots.frontier(marks[:-1]))
    assert plots.frontier([]) == ""


def test_a_drawing_stands_alone_with_its_own_colours():
    text = plots.standalone(plots.frontier([mark("a", 0.5, 1.0)]))
    assert ET.fromstring(text).tag == "{http://www.w3.org/2000/svg}svg"
    assert "prefers-color-scheme: dark" in text
    with pytest.raises(ValueError, match="an empty one was given"):
        plots.standalone(plots.frontier([]))
