"""What goes into the ledger comes out of it, and one changed byte does not go unnoticed."""

import sqlite3
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fedkola.errors import ChainBroken
from fedkola.ledger import Ledger

COLUMNS = ("run", "kind", "subject", "body", "prev", "hash", "round", "at", "seq")

scalars = (
    st.none()
    | st.booleans()
    | st.integers(-(2**53), 2**53)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(st.characters(exclude_categories=("Cs",)), max_size=8)
)
names = st.text(st.characters(exclude_categories=("Cs",)), max_size=8)
documents = st.dictionaries(
    names,
    st.recursive(scalars, lambda inner: st.lists(inner, max_size=3), max_leaves=4),
    max_size=3,
)
events = st.lists(
    st.fixed_dictionaries({"kind": names, "subject": names, "body": documents}), max_size=3
)
dtypes = st.sampled_from(
    [torch.int16, torch.int32, torch.int64, torch.bfloat16, torch.float32, torch.float64]
)
shapes = st.lists(st.integers(0, 3), max_size=3)


@st.composite
def tensors(draw: st.DrawFn) -> torch.Tensor:
    values = torch.randint(
        -50, 50, draw(shapes), generator=torch.Generator().manual_seed(draw(st.integers(0, 99)))
    )
    return values.to(draw(dtypes))


@given(
    rounds=st.lists(
        st.tuples(documents, st.dictionaries(names, tensors(), max_size=3), events),
        min_size=1,
        max_size=3,
    )
)
@settings(max_examples=25, deadline=None)
def test_a_run_reads_back_as_it_was_written(rounds: Sequence[tuple[Any, Any, Any]]):
    with tempfile.TemporaryDirectory() as folder:
        with Ledger.open(Path(folder), create=True) as ledger:
            ledger.start("r", {}, "00" * 32, now=0)
            for number, (state, arrays, happened) in enumerate(rounds, start=1):
                head = ledger.commit(
                    "r",
                    number,
                    state=state,
                    tensors=arrays,
                    report=state,
                    sampler={},
                    events=happened,
                    now=number,
                )
        with Ledger.open(Path(folder)) as again:
            saved = again.last("r")
            assert again.verify("r") == head
            rows = again.events("r")
    state, arrays, _ = rounds[-1]
    assert saved is not None
    assert (saved.number, saved.state, saved.report) == (len(rounds), state, state)
    assert set(saved.tensors) == set(arrays)
    for name, tensor in arrays.items():
        assert saved.tensors[name].dtype == tensor.dtype
        assert torch.equal(saved.tensors[name], tensor)
    written = [event for _, _, happened in rounds for event in happened]
    assert [{"kind": row.kind, "subject": row.subject, "body": row.body} for row in rows] == written


@given(
    seq=st.integers(1, 6),
    column=st.sampled_from(COLUMNS),
    position=st.integers(0, 10**6),
    flip=st.integers(1, 255),
)
@settings(max_examples=60, deadline=None)
def test_one_changed_byte_in_any_event_breaks_the_chain(
    seq: int, column: str, position: int, flip: int
):
    with tempfile.TemporaryDirectory() as folder:
        with Ledger.open(Path(folder), create=True) as ledger:
            ledger.start("run", {}, "00" * 32, now=0)
            for number in (1, 2, 3):
                ledger.commit(
                    "run",
                    number,
                    state={"round": number},
                    tensors={},
                    report={},
                    sampler={},
                    events=[
                        {"kind": "OPEN", "subject": f"cell-{number}", "body": {}},
                        {"kind": "SEAL", "subject": f"cell-{number}", "body": {"n": 1.5, "é": [1]}},
                    ],
                    now=number,
                )
        change_one_byte(Path(folder) / "ledger.db", seq, column, position, flip)
        with Ledger.open(Path(folder)) as ledger, pytest.raises(ChainBroken) as error:
            ledger.verify("run")
        if column != "seq":
            assert f"event {seq} of" in str(error.value)


def change_one_byte(database: Path, seq: int, column: str, position: int, flip: int) -> None:
    connection = sqlite3.connect(database)
    connection.execute("DROP TRIGGER events_no_update")
    connection.text_factory = bytes
    (value,) = connection.execute(f"SELECT {column} FROM events WHERE seq = {seq}").fetchone()
    if isinstance(value, int):
        changed: Any = value ^ (flip << 8 * (1 + position % 3))
        expression = "?"
    else:
        content = bytearray(value)
        content[position % len(content)] ^= flip
        changed = bytes(content)
        expression = "?" if column in ("prev", "hash") else "CAST(? AS TEXT)"
    connection.execute(f"UPDATE events SET {column} = {expression} WHERE seq = {seq}", (changed,))
    connection.commit()
    connection.close()
