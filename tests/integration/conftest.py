"""The real command line on real files: plans and records in a folder, a tiny encoder beside them.

Verbs run in this process, which saves importing torch again; what needs a process of its own
(signals, limits) starts the installed command.
"""

import contextlib
import io
import json
import os
import random
import signal
import subprocess
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import pytest
import torch
from transformers import BertConfig, BertModel

from fedkola import cli

COMMAND = Path(sys.executable).with_name("fedkola")
TOPICS = {
    "heart": "chest pain pulse pressure palpitation murmur valve rhythm",
    "lung": "cough breath wheeze sputum asthma oxygen airway phlegm",
    "skin": "rash itch blister scaly redness eczema lesion patch",
    "bone": "fracture cast joint swelling wrist ankle splint sprain",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Done:
    """What a command left: its exit code and its two streams."""

    code: int
    out: str
    err: str

    @property
    def json(self) -> dict[str, Any]:
        """The one JSON object on stdout."""
        assert self.code == 0, self.err
        document: dict[str, Any] = json.loads(self.out)
        return document


class Fedkola(Protocol):
    def __call__(self, *words: str | Path) -> Done: ...


@pytest.fixture(scope="session")
def fedkola() -> Fedkola:
    """The command line in this process: the same entry point that is installed."""

    def call(*words: str | Path) -> Done:
        out, err = io.StringIO(), io.StringIO()
        code = 0
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            try:
                cli.main([str(word) for word in words])
            except SystemExit as end:
                code = int(end.code or 0)
        return Done(code=code, out=out.getvalue(), err=err.getvalue())

    return call


class Process(Protocol):
    def __call__(self, *words: str | Path, limit: int = 0) -> "subprocess.Popen[str]": ...


@pytest.fixture(scope="session")
def process() -> Process:
    """The installed command as a process; ``limit`` bounds the bytes of every file it writes."""

    def start(*words: str | Path, limit: int = 0) -> "subprocess.Popen[str]":
        command = [str(word) for word in (COMMAND, *words)]
        if limit:
            setting = f"import resource as r; r.setrlimit(r.RLIMIT_FSIZE, ({limit}, -1)); "
            program = setting + "from fedkola.cli import main; main()"
            command = [sys.executable, "-c", program, *command[1:]]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
        return subprocess.Popen(
            command,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=environment,
            # A shell's background job ignores Ctrl-C, and so would everything it starts.
            preexec_fn=_heed_control_c,
        )

    return start


def _heed_control_c() -> None:
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session")
def data() -> Path:
    """The folder of real data sets, beside the repository or where FEDKOLA_DATA says."""
    given = os.environ.get("FEDKOLA_DATA")
    folder = Path(given) if given else Path(__file__).parents[3] / "shared" / "data"
    if not folder.is_dir():
        pytest.skip("the real data sets are absent: set FEDKOLA_DATA to their folder")
    return folder


@pytest.fixture(scope="session")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A two-layer encoder with random weights that knows the words of TOPICS."""
    folder = tmp_path_factory.mktemp("models") / "encoder"
    folder.mkdir()
    words = dict.fromkeys(" ".join(TOPICS.values()).split())
    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *words]
    torch.manual_seed(5)
    config = BertConfig(
        vocab_size=len(vocabulary),
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=24,
        initializer_range=0.4,
    )
    BertModel(config).save_pretrained(folder)
    (folder / "vocab.txt").write_text("\n".join(vocabulary) + "\n")
    return folder


def notes(count: int, *, seed: int = 0) -> list[dict[str, Any]]:
    """``count`` notes with a topic as label, six a patient; different for every seed."""
    chance = random.Random(seed)
    names = list(TOPICS)
    rows = []
    for i in range(count):
        label = names[i % len(names)]
        text = " ".join(chance.choices(TOPICS[label].split(), k=5))
        row = {"id": f"n-{seed}-{i}", "text": text, "label": label, "patient": f"p-{i // 6}"}
        rows.append(row)
    return rows


def write_jsonl(path: Path, rows: Iterable[Mapping[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


class Write(Protocol):
    def __call__(self, rows: Iterable[Mapping[str, Any]] | None = None, **changes: str) -> Path: ...


@pytest.fixture
def plan_of(tmp_path: Path, encoder: Path, monkeypatch: pytest.MonkeyPatch) -> Write:
    """Writes records and a plan for the tiny encoder; ``changes`` are lines by section."""
    monkeypatch.chdir(tmp_path)

    def write(rows: Iterable[Mapping[str, Any]] | None = None, **changes: str) -> Path:
        write_jsonl(tmp_path / "notes.jsonl", notes(160) if rows is None else rows)
        sections = {
            "run": 'name = "r"',
            "model": f'name = "{encoder}"\nmax_tokens = 16',
            "task": 'name = "files"\ntrain = "notes.jsonl"\nrecord = "id"\npatient = "patient"\n'
            "sites = 3\nwindows = 2",
            "knowledge": 'features = 32\npublic_reference = true\nlanes = ["analytic", "router"]',
        }
        for section, lines in changes.items():
            sections[section] = f"{sections.get(section, '')}\n{lines}"
        text = ""
        for section, lines in sections.items():
            last = {line.split(" = ")[0]: line for line in lines.splitlines() if line}
            text += "\n".join([f"[{section}]", *last.values(), ""])
        path = tmp_path / "plan.toml"
        path.write_text(text)
        return path

    return write
