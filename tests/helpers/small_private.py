"""A federation that pre-trains a tiny GPT under a privacy budget: three sites, three rounds."""

import tempfile
from functools import cache
from pathlib import Path
from typing import Any

from small_gpt import sentences, small_gpt

from fedkola import plan as plans
from fedkola import server
from fedkola.federation import Federation
from fedkola.knowledge.stream import Stream
from fedkola.plan import Plan
from fedkola.training.model import Foundation
from fedkola.types import Catalogue, Dataset, Label

SITES = {"north": 60, "south": 50, "east": 40}
"""Patients of every site; each has two records."""
SETTINGS = (
    "run.name=private",
    "run.rounds=3",
    "model.name=small",
    "model.max_tokens=24",
    "algorithm.name=diloco",
    "pretrain.inner_steps=2",
    "pretrain.batch=8",
    "pretrain.length=16",
    "pretrain.warmup=0",
    "privacy.epsilon=2",
    "privacy.delta=0.001",
    "privacy.units=40",
    "site.plain=true",
)
CATALOGUE = Catalogue(
    system="made up", levels=("code",), labels=(Label(code="t", path=("t",), scope="s"),)
)


@cache
def base() -> Foundation:
    return small_gpt(Path(tempfile.mkdtemp()) / "gpt", width=16, vocabulary=400)


def records(site: str, patients: int) -> Dataset:
    texts = sentences(2 * patients, seed=len(site) + patients)
    return Dataset(
        records=tuple(f"{site}-{i}" for i in range(len(texts))),
        texts=tuple(texts),
        labels=("t",) * len(texts),
        patients=tuple(f"{site}-p{i // 2}" for i in range(len(texts))),
        windows=(1,) * len(texts),
    )


def plan(*settings: str) -> Plan:
    return plans.override(Plan(), [*SETTINGS, *settings])


def federation(folder: Path, *settings: str, **changes: Any) -> Federation:
    sites = {name: records(name, patients) for name, patients in SITES.items()}
    stream = Stream(
        catalogue=CATALOGUE,
        sites={**sites, **changes},
        test=records("test", 4),
        windows=("w1",),
    )
    return server.assemble(plan(*settings), stream, folder, foundation=base())
