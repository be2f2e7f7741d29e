from collections import Counter
from dataclasses import replace

import pytest

from fedkola.errors import PlanError
from fedkola.knowledge.stream import (
    Records,
    Stream,
    arrivals,
    cap,
    deal,
    first_windows,
    hash_share,
    in_rounds,
    numbered,
    split_test,
)
from fedkola.types import Catalogue, Dataset, Label

DATA = Dataset(
    records=("r1", "r2", "r3", "r4"),
    texts=("fever", "cough", "rash", "ache"),
    labels=("A", "A", "B", "B"),
    patients=("p1", "p2", "p1", "p3"),
    windows=(1, 1, 2, 3),
)
CATALOGUE = Catalogue(
    system="tiny",
    levels=("label",),
    labels=tuple(
        Label(code=code, path=(code,), scope=scope)
        for code, scope in (("A", "s"), ("B", "s"), ("C", "s"), ("D", "far"))
    ),
)


def stream(test: Dataset) -> Stream:
    return Stream(catalogue=CATALOGUE, sites={"north": DATA}, test=test, windows=("1", "2", "3"))


def test_a_window_holds_what_arrived_in_it_and_until_adds_what_came_before():
    records = Records(DATA)

    assert records.at(2).records == ("r3",)
    assert records.until(2).records == ("r1", "r2", "r3")
    assert len(records.at(9)) == 0


def test_the_records_of_a_window_of_three_rounds_arrive_in_the_first_of_them():
    records = Records(DATA, rounds=3)

    assert [records.at(n).records for n in (3, 4, 5)] == [(), ("r3",), ()]
    assert [len(records.until(n)) for n in (3, 4, 6, 7)] == [2, 3, 3, 4]
    assert records.without(records=["r2"]).at(4).records == ("r3",)
    assert records.of(DATA.take([3])).until(6).records == ()


def test_a_window_delivered_twice_is_counted_in_its_first_round_alone():
    twice = replace(
        DATA, records=("r1", "r1", "r3", "r4"), texts=("fever", "fever", "rash", "ache")
    )
    again = replace(twice, labels=("A", "A", "B", "B"), windows=(1, 2, 3, 4), patients=("p",) * 4)

    assert [Records(again, rounds=2).repeats(n) for n in (1, 2, 3, 4)] == [0, 0, 1, 0]


@pytest.mark.parametrize(("rounds", "until"), [(1, 3.0), (2, 5.0), (4, 9.0)])
def test_labels_end_in_the_first_round_of_the_window_that_ends_them(rounds: int, until: float):
    ending = Label(code="A", path=("A",), scope="s", valid_from=1.0, valid_to=3.0)
    ends, stays = in_rounds(replace(CATALOGUE, labels=(ending, CATALOGUE.labels[1])), rounds).labels

    assert (ends.valid_from, ends.valid_to) == (1.0, until)
    assert stays == CATALOGUE.labels[1]


def test_a_withdrawn_patient_takes_all_records_along():
    left = Records(DATA).without(patients=["p1"])

    assert left.data.records == ("r2", "r4")
    assert left.data.windows == (1, 3)


def test_a_withdrawal_may_be_asked_for_twice():
    once = Records(DATA).without(records=["r2"])

    assert once.data.records == ("r1", "r3", "r4")
    assert once.without(records=["r2"]) == once


def test_the_test_splits_into_two_parts_that_are_together_the_whole():
    texts = tuple(f"synonym {i}" for i in range(2_000))
    ids = tuple(str(i) for i in range(2_000))
    whole = Dataset(
        records=ids, texts=texts, labels=("A",) * 2_000, patients=ids, windows=(1,) * 2_000
    )

    dev, untouched = split_test(stream(whole))

    assert sorted((*dev.records, *untouched.records)) == sorted(ids)
    assert len(dev) == pytest.approx(600, abs=60)


def test_a_text_is_split_the_same_in_every_subset_and_twins_stay_together():
    twins = replace(DATA, texts=("fever", "cough", "fever", "cough"))

    dev, untouched = split_test(stream(twins), share=0.5)

    assert not set(dev.texts) & set(untouched.texts)
    assert split_test(stream(twins.take([2, 3])), share=0.5)[0].texts == dev.texts[:1]


def test_questions_with_one_answer_do_not_all_fall_on_one_side():
    ids = tuple(f"q{i}" for i in range(200))
    test = Dataset(
        records=ids,
        texts=("Oslo",) * 200,
        labels=("A",) * 200,
        patients=ids,
        windows=(1,) * 200,
        prompts=tuple(f"where is clinic {i}?" for i in range(200)),
    )
    dev, untouched = split_test(stream(test), share=0.5)

    assert 60 < len(dev) < 140
    assert not set(dev.prompts) & set(untouched.prompts)


@pytest.mark.parametrize("partition", ["iid", "by-label", "dirichlet:0.3"])
def test_every_record_is_dealt_to_a_site_and_the_seed_decides(partition):
    labels = ["A", "B", "C", "D", "E"] * 60
    names = numbered(10)
    drawn = deal(labels, names, partition=partition, seed=1)

    assert len(drawn) == 300
    assert set(drawn) <= set(names)
    assert drawn == deal(labels, names, partition=partition, seed=1)
    assert drawn != deal(labels, names, partition=partition, seed=2)
    if partition == "iid":
        assert set(Counter(drawn).values()) == {30}


def test_names_of_sites_have_one_length():
    assert (numbered(2), numbered(10)[0]) == (["site-1", "site-2"], "site-01")


def test_the_hash_of_a_text_never_changes():
    assert hash_share("Cholera") == pytest.approx(0.934149, abs=1e-6)


def test_a_share_beyond_the_whole_is_refused():
    with pytest.raises(PlanError, match="from 0 to 1"):
        split_test(stream(DATA), share=1.5)


def test_windows_are_balanced_and_none_is_empty():
    sizes = {f"chapter-{i}": 100 for i in range(22)}

    window = arrivals(sizes, windows=8, seed=7)

    assert set(window) == set(sizes)
    assert sorted(Counter(window.values()).values()) == [2, 2, 3, 3, 3, 3, 3, 3]


def test_a_giant_group_gets_a_window_of_its_own():
    window = arrivals({"giant": 1_000, "a": 10, "b": 10, "c": 10}, windows=2, seed=1)

    assert window["a"] == window["b"] == window["c"] != window["giant"]


def test_seeds_mix_arrival_differently():
    sizes = {f"chapter-{i}": 10 + i for i in range(22)}

    assert arrivals(sizes, windows=8, seed=1) == arrivals(sizes, windows=8, seed=1)
    assert arrivals(sizes, windows=8, seed=1) != arrivals(sizes, windows=8, seed=2)


@pytest.mark.parametrize("windows", [0, 3])
def test_more_windows_than_groups_are_refused(windows):
    with pytest.raises(PlanError, match=r"set task.windows from 1 to 2"):
        arrivals({"a": 1, "b": 1}, windows=windows, seed=7)


def test_a_label_arrives_with_its_first_record_or_with_its_scope():
    south = replace(DATA, windows=(4, 4, 1, 1))

    first = first_windows(CATALOGUE, {"north": DATA, "south": south})

    assert first == {"A": 1, "B": 1, "C": 1, "D": 1}
    assert first_windows(CATALOGUE, {"south": south}) == {"A": 4, "B": 1, "C": 1, "D": 1}


def test_a_cap_keeps_so_many_of_each_label_and_shrinks_its_test():
    train = ["A"] * 10 + ["B"] * 2
    test = ["A"] * 20 + ["B"] * 3 + ["new"]

    kept, kept_test = cap(train, test, per_label=5, seed=7)

    assert Counter(train[i] for i in kept) == {"A": 5, "B": 2}
    assert Counter(test[i] for i in kept_test) == {"A": 10, "B": 3, "new": 1}
    assert kept == sorted(kept)


def test_no_cap_keeps_everything():
    assert cap(["A", "B"], ["A"], per_label=0, seed=7) == ([0, 1], [0])
