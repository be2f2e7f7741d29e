"""New models: equal arguments give equal files, and what cannot be is refused."""

from dataclasses import replace
from pathlib import Path

import pytest

from fedkola.errors import DataError, ModelMismatch, PlanError
from fedkola.training import fresh
from fedkola.training.model import load

TEXT = "fever and cough and fever again, with a cough at night and a fever by day " * 4
SHAPE = fresh.Shape(width=16, layers=1, heads=2, vocabulary=300, length=24)


@pytest.mark.parametrize("architecture", fresh.ARCHITECTURES)
def test_a_new_folder_loads_and_its_tokenizer_keeps_every_text(
    tmp_path: Path, architecture: fresh.Architecture
) -> None:
    shape = replace(SHAPE, architecture=architecture)
    count = fresh.create(tmp_path / "m", shape, [TEXT], seed=1)
    base = load(str(tmp_path / "m"), max_tokens=24, whole=True)
    assert count == sum(value.numel() for value in base.model.parameters())
    assert base.kind == ("encoder" if architecture == "bert" else "causal")
    assert (base.masked is None) == (architecture != "bert")
    ids = base.tokenizer(["Fièvre 39°C ☃"])["input_ids"][0]
    assert base.tokenizer.decode(ids, skip_special_tokens=True) == "Fièvre 39°C ☃"  # type: ignore[attr-defined]


def test_the_seed_decides_the_weights_and_nothing_else_does(tmp_path: Path) -> None:
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        fresh.create(tmp_path / name, SHAPE, [TEXT], seed=seed)
    hashes = [load(str(tmp_path / name), max_tokens=24).hash for name in "abc"]
    assert hashes[0] == hashes[1] != hashes[2]


def test_what_cannot_be_made_is_refused(tmp_path: Path) -> None:
    with pytest.raises(PlanError, match="heads divide"):
        fresh.create(tmp_path / "m", replace(SHAPE, width=18, heads=4), [TEXT], seed=0)
    with pytest.raises(PlanError, match="vocabulary 100"):
        fresh.create(tmp_path / "m", replace(SHAPE, vocabulary=100), [TEXT], seed=0)
    with pytest.raises(DataError, match="more public text"):
        fresh.create(tmp_path / "m", SHAPE, [""], seed=0)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "a").write_text("a")
    with pytest.raises(ModelMismatch, match="not empty"):
        fresh.create(tmp_path / "full", SHAPE, [TEXT], seed=0)
