"""A real federation that runs in about a second: random encoder, five sites, three windows.

Texts are sentences of a made-up language in which every label has words of its own. Scopes arrive
over time (heart, then lung, then bone), "west" is the only site with the label bone-3, and every
patient has records of several labels and windows.
"""

import hashlib
import json
import random
import tempfile
from collections.abc import Callable, Mapping, Sequence
from contextlib import redirect_stderr
from dataclasses import replace
from functools import cache
from io import StringIO
from pathlib import Path
from typing import Any

import torch
from transformers import BertConfig, BertForMaskedLM, BertModel

from fedkola import plan as plans
from fedkola import server, wire
from fedkola.algorithms import ALGORITHMS
from fedkola.federation import Federation
from fedkola.knowledge.stream import Stream
from fedkola.ledger import Ledger
from fedkola.plan import Plan
from fedkola.training import model
from fedkola.training.model import Foundation
from fedkola.types import Catalogue, Dataset, Label

SITES = ("north", "south", "east", "west", "centre")
SCOPES = {"heart": 3, "lung": 3, "bone": 3}
CODES = tuple(f"{scope}-{i}" for scope, num in SCOPES.items() for i in range(1, num + 1))
OWN_WORDS = {code: (f"{code[:2]}{code[-1]}ka", f"{code[:2]}{code[-1]}mo") for code in CODES}
FILLER = ("ra", "to", "ni", "su", "be")
VOCABULARY = (
    *("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"),
    *FILLER,
    *(word for words in OWN_WORDS.values() for word in words),
)
SETTINGS = (
    "run.name=small",
    "model.name=small",
    "model.max_tokens=16",
    "algorithm.rank=2",
    "algorithm.alpha=4",
    "algorithm.batch=8",
    "algorithm.lr=0.01",
    "knowledge.features=32",
    'knowledge.lanes=["analytic", "router", "lora"]',
    "knowledge.slots_max=8",
    "knowledge.lora_steps=2",
    "knowledge.public_reference=true",
    "site.plain=true",
    'site.embedding="presence-disclosed"',
    'site.waive=["gate_span"]',
    "pretrain.length=16",
    "pretrain.inner_steps=3",
    "pretrain.batch=4",
)
Answer = Callable[[bytes], bytes]
Data = Mapping[str, Dataset]


@cache
def foundation(*, whole: bool = False) -> Foundation:
    """Two layers of width 16 with seeded random weights; ``whole`` has a head for hidden words."""
    with (
        tempfile.TemporaryDirectory() as name,
        torch.random.fork_rng(),
        redirect_stderr(StringIO()),
    ):
        torch.manual_seed(0)
        config = BertConfig(
            vocab_size=len(VOCABULARY),
            hidden_size=16,
            num_hidden_layers=2,
            num_attention_heads=2,
            intermediate_size=32,
            max_position_embeddings=32,
            initializer_range=0.5,
        )
        (BertForMaskedLM if whole else BertModel)(config).save_pretrained(name)
        (Path(name) / "vocab.txt").write_text("\n".join(VOCABULARY) + "\n", encoding="utf-8")
        return replace(model.load(name, max_tokens=16, whole=whole), name="small")


def catalogue(**ends: tuple[float, tuple[str, ...]]) -> Catalogue:
    """Nine labels in three scopes; ``ends`` retires labels: heart_1=(3.0, ("heart-2",))."""
    labels = []
    for code in CODES:
        scope = code.split("-")[0]
        valid_to, heirs = ends.get(code.replace("-", "_"), (None, ()))
        labels.append(
            Label(code=code, path=(code, scope), scope=scope, valid_to=valid_to, replaced_by=heirs)
        )
    return Catalogue(system="small", levels=("code", "scope"), labels=tuple(labels))


def records(site: str, *, num: int = 30) -> Dataset:
    """The records of one site; a function of its name."""
    chance = random.Random(f"small/{site}")
    rows = []
    for i in range(num):
        scope = ("heart", "lung", "bone")[i % 3]
        code = f"{scope}-{chance.randint(1, 3)}"
        if code == "bone-3" and site != "west":
            code = "bone-2"
        first = {"heart": 1, "lung": 2, "bone": 3}[scope]
        words = [*chance.choices(FILLER, k=3), *chance.choices(OWN_WORDS[code], k=3)]
        chance.shuffle(words)
        rows.append((f"{site}-{i}", " ".join(words), code, f"{site}-p{i % 7}", first + i % 2))
    columns = tuple(zip(*rows, strict=True))
    return Dataset(
        records=columns[0],
        texts=columns[1],
        labels=columns[2],
        patients=columns[3],
        windows=tuple(min(window, 3) for window in columns[4]),
    )


def data() -> dict[str, Dataset]:
    return {site: records(site) for site in SITES}


def revised(sites: Data) -> dict[str, Dataset]:
    """The same sites, where records of the first window arrive again with another label and text:
    one of every site in window 2, and one of "north" in windows 2 and 3."""
    return {site: _revised(site, whole) for site, whole in sites.items()}


def _revised(site: str, whole: Dataset) -> Dataset:
    first = [i for i, window in enumerate(whole.windows) if window == 1][:2]
    rows = [(first[0], "lung-1", 2)]
    if site == "north":
        rows += [(first[1], "lung-2", 2), (first[1], "bone-1", 3)]
    return with_rows(
        whole,
        [
            (whole.records[i], " ".join(OWN_WORDS[code]), code, whole.patients[i], window)
            for i, code, window in rows
        ],
    )


def with_rows(whole: Dataset, rows: Sequence[tuple[str, str, str, str, int]]) -> Dataset:
    """A dataset with more rows: (record, text, label, patient, window)."""
    columns = ("records", "texts", "labels", "patients", "windows")
    added = zip(columns, zip(*rows, strict=True), strict=True) if rows else ()
    return replace(whole, **{name: getattr(whole, name) + column for name, column in added})


def without(
    sites: Data, site: str, *, patients: tuple[str, ...] = (), ids: tuple[str, ...] = ()
) -> dict[str, Dataset]:
    """The same sites, one of which never had these patients' or these records."""
    whole = sites[site]
    kept = [
        i
        for i in range(len(whole))
        if whole.patients[i] not in patients and whole.records[i] not in ids
    ]
    return {**sites, site: whole.take(kept)}


def plan(*settings: str) -> Plan:
    return plans.override(Plan(), [*SETTINGS, *settings])


def stream(
    *, sites: Data | None = None, labels: Catalogue | None = None, rounds: int = 3
) -> Stream:
    """The records of all sites with a test, in so many windows."""
    return Stream(
        catalogue=labels or catalogue(),
        sites=data() if sites is None else dict(sites),
        test=records("test"),
        windows=tuple(f"w{i}" for i in range(1, rounds + 1)),
    )


def assemble(
    folder: Path,
    *settings: str,
    sites: Data | None = None,
    labels: Catalogue | None = None,
    wrap: Mapping[str, Callable[[Answer], Answer]] | None = None,
    rounds: int = 3,
) -> Federation:
    """The federation in ``folder``; ``wrap`` puts something between single sites and the engine."""
    held = stream(sites=sites, labels=labels, rounds=rounds)
    chosen = plan(*settings)
    base = foundation(whole=getattr(ALGORITHMS.get(chosen.algorithm.name), "whole", False))
    whole = server.assemble(chosen, held, folder, foundation=base)
    if not wrap:
        return whole
    answers = {
        name: wrap[name](site.answer) if name in wrap else site.answer
        for name, site in whole.sites.items()
    }
    secured = server.enrolled(whole.plan, folder, tuple(answers), foundation())
    return replace(whole, clients=server.connect(whole.plan, answers, secured=secured))


def failing(step: str, *, times: int) -> Callable[[Answer], Answer]:
    """A site that answers garbage the first ``times`` that it is asked this step."""

    def wrap(answer: Answer) -> Answer:
        left = [times]

        def reply(message: bytes) -> bytes:
            asked = wire.unpack_broadcast(message)
            if asked.step == step and left[0]:
                left[0] -= 1
                answer(message)  # the site did its part; its bytes are lost on the way
                return b"garbage"
            return answer(message)

        return reply

    return wrap


def run(federation: Federation) -> Any:
    """All rounds (or the rest of them); the final state."""
    with Ledger.open(federation.folder, create=True) as ledger:
        return server.run(
            federation, ledger, observe=lambda number, state: {}, progress=lambda report: None
        )


def fingerprint(state: Any) -> str:
    """A hash over every number and every bit of every tensor of a state."""
    document, tensors = wire.dump(state)
    whole = hashlib.sha256(json.dumps(document, sort_keys=True).encode())
    for name in sorted(tensors):
        value = tensors[name].contiguous()
        whole.update(f"{name}|{value.dtype}|{tuple(value.shape)}|".encode())
        whole.update(value.reshape(-1).view(torch.uint8).numpy().tobytes())
    return whole.hexdigest()


def cells(state: Any) -> dict[str, str]:
    """Every live cell's id and the hash of its integers."""
    return {cell.about.id: cell.about.words for cell in state.bank.cells}
