"""The reservoir of the replay baseline: uniform, bounded, the same when a round is asked again."""

import json
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch
from small_clients import TableClient, joined

from fedkola.algorithms.replay import Replay, State, lowest, reservoir
from fedkola.errors import DataError
from fedkola.types import Catalogue, Dataset, Label, Weights

CATALOGUE = Catalogue(
    system="test", levels=("code",), labels=(Label(code="a", path=("a",), scope="s"),)
)
START = State(weights={"head.bias": torch.zeros(1)})


@dataclass(kw_only=True)
class Noting(TableClient):
    """A site that notes which records it trains on."""

    seen: list[set[str]] = field(default_factory=list)

    def fit(self, weights: Weights, data: Dataset, **_: object) -> Weights:
        self.seen.append(set(data.records))
        return weights


def arriving(windows: int, each: int = 4) -> Dataset:
    pairs = [(f"w{w}-{i}", w) for w in range(1, windows + 1) for i in range(each)]
    return Dataset(
        records=tuple(name for name, _ in pairs),
        texts=("t",) * len(pairs),
        labels=("a",) * len(pairs),
        patients=tuple(name for name, _ in pairs),
        windows=tuple(window for _, window in pairs),
    )


def site(folder: Path, data: Dataset) -> Noting:
    return Noting(name="north", data=data, catalogue=CATALOGUE, store=folder)


def replay(buffer: int, **changes: int) -> Replay:
    return Replay(buffer=buffer, epochs=1.0, batch=4, lr=0.1, level=0, **changes)


def test_every_record_is_kept_with_equal_probability():
    records = [f"r{i}" for i in range(10)]
    kept = dict.fromkeys(records, 0)
    for source in range(3000):
        for record in lowest(records, size=3, source=str(source)):
            kept[record] += 1
    # 3,000 draws at 0.3: a standard deviation is 25.
    assert all(abs(count - 900) < 100 for count in kept.values())
    assert sum(kept.values()) == 9000


def test_records_that_came_early_and_late_are_kept_alike():
    early, late = [f"e{i}" for i in range(5)], [f"l{i}" for i in range(5)]
    num_early = 0
    for source in map(str, range(2000)):
        first = lowest(early, size=3, source=source)
        kept = lowest({*first, *late}, size=3, source=source)
        assert kept == lowest({*early, *late}, size=3, source=source)
        num_early += sum(record in early for record in kept)
    # 6,000 kept in all: half of them early, a standard deviation is about 33.
    assert abs(num_early - 3000) < 130


def test_a_site_rehearses_what_it_kept_and_never_keeps_more_than_the_bound(tmp_path: Path):
    member = site(tmp_path, arriving(4))
    method, state = replay(3), START
    for number in (1, 2, 3, 4):
        kept = set(reservoir(tmp_path, before=number))
        state = method.round(number, state, ("north",), joined([member]))
        new = {f"w{number}-{i}" for i in range(4)}
        assert member.seen[-1] == new | kept
        assert len(kept) == (3 if number > 1 else 0)
    assert kept <= {f"w{w}-{i}" for w in (1, 2, 3) for i in range(4)}
    state = method.round(5, state, ("north",), joined([member]))
    assert member.seen[-1] == set(reservoir(tmp_path, before=5))  # nothing new: rehearse alone
    assert len(list((tmp_path / "reservoir").iterdir())) == 2


def test_a_round_that_is_asked_again_finds_the_reservoir_it_found_before(tmp_path: Path):
    member = site(tmp_path, arriving(3))
    method = replay(2, exchanges=2)
    for number in (1, 2, 3, 3):
        method.round(number, START, ("north",), joined([member]))
    again = site(tmp_path, arriving(3))  # another process, the same folder
    method.round(3, START, ("north",), joined([again]))
    assert member.seen[4:6] == member.seen[6:8] == again.seen
    assert member.seen[2] == member.seen[3]  # both exchanges of round 2


def test_a_record_that_the_site_no_longer_holds_is_not_rehearsed_or_kept(tmp_path: Path):
    member = site(tmp_path, arriving(2))
    method = replay(4)
    method.round(1, START, ("north",), joined([member]))
    gone = reservoir(tmp_path, before=2)[0]
    whole = arriving(3)
    member.data = whole.take([i for i, record in enumerate(whole.records) if record != gone])
    method.round(2, START, ("north",), joined([member]))
    assert gone not in member.seen[-1]
    assert gone not in reservoir(tmp_path, before=3)


def test_no_buffer_keeps_nothing(tmp_path: Path):
    member = site(tmp_path, arriving(2))
    for number in (1, 2):
        replay(0).round(number, START, ("north",), joined([member]))
    assert reservoir(tmp_path, before=9) == ()
    assert member.seen[-1] == {f"w2-{i}" for i in range(4)}


def test_a_damaged_reservoir_is_a_named_error(tmp_path: Path):
    folder = tmp_path / "reservoir"
    folder.mkdir()
    (folder / "000001.json").write_text(json.dumps(["a"])[:-2])
    with pytest.raises(DataError, match="delete it"):
        reservoir(tmp_path, before=2)
