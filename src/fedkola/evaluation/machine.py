"""What a result was measured on: provenance that every document carries."""

import os
import platform
from importlib.metadata import version
from typing import Any

import torch


def describe() -> dict[str, Any]:
    """Machine, versions and load; no names of users, hosts or folders."""
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else None
    return {
        "system": platform.system(),
        "processor": platform.machine(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": version("transformers"),
        "peft": version("peft"),
        "load": load,
    }
