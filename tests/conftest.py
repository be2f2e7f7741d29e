"""What every test can rely on: no network, and one thread per worker so that bits repeat."""

import os

import pytest
import torch

# Read by transformers and huggingface_hub when they are first imported: models come from folders.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"


@pytest.fixture(autouse=True, scope="session")
def _one_thread() -> None:
    torch.set_num_threads(1)
