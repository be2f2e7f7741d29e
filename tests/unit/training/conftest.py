"""A two-layer encoder of width 16 in a folder, and where the tiny causal model lies."""

import os
from pathlib import Path

import pytest
import torch
from transformers import BertConfig, BertModel

from fedkola.training.model import Foundation, load

TEXT = (
    "[PAD] [UNK] [CLS] [SEP] [MASK] acute chronic fever fracture of left right arm leg heart lung "
    "kidney failure with without and infection due to other unspecified ##s ##al , a b c d e"
)
WORDS = TEXT.split()


def write_encoder(folder: Path, *, seed: int = 0) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(seed)
    config = BertConfig(
        vocab_size=len(WORDS),
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=40,
        initializer_range=0.5,
    )
    BertModel(config).save_pretrained(folder)
    (folder / "vocab.txt").write_text("\n".join(WORDS) + "\n", encoding="utf-8")
    return folder


@pytest.fixture(scope="session")
def encoder_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_encoder(tmp_path_factory.mktemp("encoder"))


@pytest.fixture(scope="session")
def encoder(encoder_folder: Path) -> Foundation:
    return load(str(encoder_folder), max_tokens=24)


@pytest.fixture(scope="session")
def minilm() -> Foundation:
    return load("minilm")


@pytest.fixture(scope="session")
def stories_folder() -> Path:
    data = os.environ.get("FEDKOLA_DATA")
    root = Path(data) if data else Path(__file__).parents[4] / "shared" / "data"
    folder = root / "models" / "stories260K"
    if not folder.is_dir():
        pytest.skip("stories260K is absent: set FEDKOLA_DATA to the folder that holds models/")
    return folder


@pytest.fixture(scope="session")
def stories(stories_folder: Path) -> Foundation:
    return load(str(stories_folder), max_tokens=96)
