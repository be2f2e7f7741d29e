"""The plan of a run: a tree of frozen dataclasses, and the same tree as TOML.

``load`` and ``parse`` read a plan, ``override`` applies ``--set a.b=c``, ``dump`` writes it back
and ``digest`` names it.
"""

from fedkola.plan.document import as_dict, digest, dump, from_dict, load, override, parse
from fedkola.plan.tree import (
    Algorithm,
    Audit,
    Cohort,
    Demands,
    Engine,
    Knowledge,
    Model,
    Plan,
    Pretrain,
    Privacy,
    Quality,
    Release,
    Robust,
    Run,
    Scenario,
    Task,
)

__all__ = [
    "Algorithm",
    "Audit",
    "Cohort",
    "Demands",
    "Engine",
    "Knowledge",
    "Model",
    "Plan",
    "Pretrain",
    "Privacy",
    "Quality",
    "Release",
    "Robust",
    "Run",
    "Scenario",
    "Task",
    "as_dict",
    "digest",
    "dump",
    "from_dict",
    "load",
    "override",
    "parse",
]
