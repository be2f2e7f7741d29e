"""Masks cancel for any number of sites, ring, order of arrival and loss, or nothing is decoded."""

import tempfile
from pathlib import Path

import masked_sites as sites
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fedkola import wire
from fedkola.errors import CohortTooSmall
from fedkola.privacy.graph import choose_graph, neighbours
from fedkola.types import Aggregate, Reply

WORDS = (16, 24, 32, 40, 64)


@st.composite
def cases(draw: st.DrawFn) -> dict:
    n, word = draw(st.integers(3, 9)), draw(st.sampled_from(WORDS))
    limit = (2 ** (word - 1) - 1) // n
    length = draw(st.integers(0, 5))
    value = st.integers(-limit, limit)
    return {
        "word": word,
        "order": draw(st.integers(0, 3)),
        "x": [draw(st.lists(value, min_size=length, max_size=length)) for _ in range(n)],
        "weights": [draw(st.integers(0, limit)) for _ in range(n)],
        "lost": {
            i: draw(st.sampled_from(["ms1/open", "ms1/share", "ms1/relay", "ms1/ask"]))
            for i in draw(st.sets(st.integers(0, n - 1), max_size=n - 1))
        },
        "mute": draw(st.sets(st.integers(0, n - 1), max_size=n - 1)),
    }


@settings(max_examples=40, deadline=None)
@given(case=cases())
def test_the_sum_is_exact_or_nothing_is_decoded(case: dict):
    word, n = case["word"], len(case["x"])
    addends = [
        sites.addend(x, word=word, weight=weight, n=-i)
        for i, (x, weight) in enumerate(zip(case["x"], case["weights"], strict=True))
    ]
    with tempfile.TemporaryDirectory() as folder:
        run = sites.masked(Path(folder), addends, order=case["order"], exchanges=2)
        for i, step in case["lost"].items():
            run.sites[run.names[i]].away = {step}
        for i in case["mute"]:
            run.sites[run.names[i]].away |= {sites.REVEAL}
        asked = sites.question(run.names, word=word)
        offered = n - sum(step == "ms1/open" for step in case["lost"].values())
        there = [i for i in range(n) if i not in case["lost"]]
        revealing = [i for i in there if i not in case["mute"]]
        if offered < 3 or len(revealing) < choose_graph(offered)[1]:
            with pytest.raises(CohortTooSmall, match=r"nothing is decoded|none of the"):
                run.clients.sum(run.names, asked)
            return
        found = run.clients.sum(run.names, asked)
    same(found, plain(run.names, addends, there, asked))


def plain(names: tuple[str, ...], addends: list, there: list[int], asked) -> Aggregate:
    replies = [Reply(client=names[i], words=addends[i], word=asked.grid.word) for i in there]
    return wire.total(replies, asked.grid, names)


def same(found: Aggregate, wanted: Aggregate) -> None:
    assert (found.cohort, found.grid) == (wanted.cohort, wanted.grid)
    assert set(found.words) == set(wanted.words)
    for name, value in wanted.words.items():
        assert found.words[name].dtype == value.dtype
        assert torch.equal(found.words[name], value)


def test_above_64_sites_each_masks_with_some_and_the_sum_is_exact(tmp_path: Path):
    n = 65
    k, t = choose_graph(n)
    assert (k, t) == (20, 14)
    addends = [sites.addend([i, -i, 2 * i], word=16, weight=i) for i in range(n)]
    run = sites.masked(tmp_path, addends, exchanges=1)
    for i in (3, 40):
        run.sites[run.names[i]].away = {sites.ASK}
    for i in (7, 22, 61):
        run.sites[run.names[i]].away = {sites.REVEAL}
    asked = sites.question(run.names, word=16)
    found = run.clients.sum(run.names, asked)
    same(found, plain(run.names, addends, [i for i in range(n) if i not in (3, 40)], asked))


@pytest.mark.parametrize(
    ("n", "k", "t"),
    [
        (3, 2, 3),
        (4, 3, 3),
        (8, 7, 6),
        (16, 15, 11),
        (64, 63, 43),
        (100, 32, 22),
        (200, 50, 34),
        (500, 70, 47),
        (1000, 80, 54),
    ],
)
def test_the_graph_is_as_sparse_as_secrecy_allows(n: int, k: int, t: int):
    assert choose_graph(n) == (k, t)


@given(n=st.integers(65, 300))
def test_neighbours_are_mutual_and_as_many_as_chosen(n: int):
    k, _ = choose_graph(n)
    partners = neighbours(b"roster", range(n), k)
    assert all(len(others) == k for others in partners.values())
    assert all(i in partners[j] for i, others in partners.items() for j in others)


def test_every_exchange_has_masks_of_its_own(tmp_path: Path):
    addends = [sites.addend([0] * 64) for _ in range(3)]
    run = sites.masked(tmp_path, addends, exchanges=2)
    for round in range(1, 5):  # twice as many exchanges as an epoch has
        found = run.clients.sum(run.names, sites.question(run.names, round=round))
        assert int(found.words["x"].abs().max()) == 0
    sent = [
        wire.unpack_reply(answer).words["payload"].numpy().tobytes()
        for site in run.sites.values()
        for asked, _, answer in site.heard
        if asked.step == sites.ASK
    ]
    assert len(set(sent)) == len(sent) == 12
