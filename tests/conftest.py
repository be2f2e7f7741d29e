"""What every test can rely on: no network, and one thread per worker so that bits repeat."""

import os

import pytest
import torch
from hypothesis import HealthCheck, settings

# How fast a machine is says nothing of the code: no test fails for being slow.
settings.register_profile("any speed", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("any speed")

# Read by transformers and huggingface_hub when they are first imported: models come from folders.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
# Their mere presence makes typer draw colours into a pipe; tests read plain text.
for _name in ("PY_COLORS", "FORCE_COLOR", "GITHUB_ACTIONS"):
    os.environ.pop(_name, None)


@pytest.fixture(autouse=True, scope="session")
def _one_thread() -> None:
    torch.set_num_threads(1)
