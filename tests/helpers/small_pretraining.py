"""A real pre-training run that takes seconds: a tiny random GPT, four sites of made-up text."""

from pathlib import Path

from small_gpt import sentences, small_gpt

from fedkola import plan as plans
from fedkola.evaluation import session as sessions
from fedkola.evaluation.session import Session
from fedkola.knowledge.stream import Stream
from fedkola.plan import Plan
from fedkola.training.model import Foundation
from fedkola.types import Catalogue, Dataset

SITES = ("north", "south", "east", "west")
SETTINGS = (
    "run.name=small",
    "run.rounds=3",
    "model.name=small",
    "model.max_tokens=24",
    "algorithm.name=diloco",
    "pretrain.inner_steps=2",
    "pretrain.batch=2",
    "pretrain.length=16",
    "pretrain.lr=0.003",
    "pretrain.warmup=0",
    "pretrain.bits=12",
    "knowledge.public_reference=true",
    "site.plain=true",
    'site.embedding="presence-disclosed"',
    'site.waive=["gate_span"]',
    "audit.record=true",
    'audit.rounds=["all"]',
)


def plan(*settings: str) -> Plan:
    return plans.override(plans.Plan(), [*SETTINGS, *settings])


def records(site: str, *, num: int = 40, seed: int = 0) -> Dataset:
    """Sentences of one site; another seed gives other ones."""
    texts = sentences(num, seed=1000 * seed + 7 + sum(site.encode()))
    return Dataset(
        records=tuple(f"{site}-{i}" for i in range(num)),
        texts=tuple(texts),
        labels=("",) * num,
        patients=tuple(f"{site}-p{i}" for i in range(num)),
        windows=(1,) * num,
    )


def stream(*, seed: int = 0) -> Stream:
    return Stream(
        catalogue=Catalogue(system="text", levels=("code",), labels=()),
        sites={site: records(site, seed=seed) for site in SITES},
        test=records("test", num=60, seed=seed),
        windows=("all",),
    )


def session(folder: Path, *settings: str, foundation: Foundation | None = None) -> Session:
    """An opened run, its model made in the folder unless it is given."""
    base = foundation or small_gpt(folder / "model")
    return sessions.open_run(plan(*settings), folder / "run", stream=stream(), foundation=base)
