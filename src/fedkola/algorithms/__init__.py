"""One file, one paper. ``ALGORITHMS`` is a closed table: a server's name for it chooses code."""

from collections.abc import Mapping
from typing import Any

from fedkola.algorithms.adapted import Adapted
from fedkola.algorithms.afcl import AFCL
from fedkola.algorithms.ddgauss import DDGauss
from fedkola.algorithms.diloco import DiLoCo
from fedkola.algorithms.disco import DISCO
from fedkola.algorithms.ewc import EWC
from fedkola.algorithms.fed_sb import FedSB
from fedkola.algorithms.feddrift import FedDrift
from fedkola.algorithms.fedex_lora import FedExLoRA
from fedkola.algorithms.fedit import FedIT
from fedkola.algorithms.fedkola import FedKoLa
from fedkola.algorithms.ffa_lora import FFALoRA
from fedkola.algorithms.flora import FLoRA
from fedkola.algorithms.fot import FOT
from fedkola.algorithms.hpfl import HPFL
from fedkola.algorithms.joint import Joint
from fedkola.algorithms.local import Local
from fedkola.algorithms.lorm import LoRM
from fedkola.algorithms.o_lora import OLoRA
from fedkola.algorithms.oracle import Oracle
from fedkola.algorithms.quality_scan import QualityScan
from fedkola.algorithms.replay import Replay
from fedkola.algorithms.robust_lora import RobustLoRA
from fedkola.algorithms.rolora import RoLoRA
from fedkola.algorithms.slao import SLAO
from fedkola.errors import UnknownName
from fedkola.types import Algorithm, Spec

ALGORITHMS: Mapping[str, type[Any]] = {
    "fedkola": FedKoLa,
    "adapted": Adapted,
    "fedit": FedIT,
    "robust_lora": RobustLoRA,
    "ffa_lora": FFALoRA,
    "rolora": RoLoRA,
    "flora": FLoRA,
    "fedex_lora": FedExLoRA,
    "fed_sb": FedSB,
    "replay": Replay,
    "ewc": EWC,
    "local": Local,
    "joint": Joint,
    "afcl": AFCL,
    "o_lora": OLoRA,
    "slao": SLAO,
    "fot": FOT,
    "lorm": LoRM,
    "disco": DISCO,
    "hpfl": HPFL,
    "feddrift": FedDrift,
    "oracle": Oracle,
    "diloco": DiLoCo,
    "ddgauss": DDGauss,
    "quality_scan": QualityScan,
}


def rebuild(spec: Spec) -> Algorithm[Any]:
    """The client half that a broadcast names; raises UnknownName for anything not in the table."""
    classes = {cls.__name__: cls for cls in ALGORITHMS.values()}
    name = str(spec.get("name"))
    if name not in classes:
        raise UnknownName(f"no algorithm {name!r}; this site knows {', '.join(sorted(classes))}")
    values = {key: value for key, value in spec.items() if key != "name"}
    try:
        algorithm: Algorithm[Any] = classes[name](**values)
    except TypeError as error:
        raise UnknownName(f"{name} does not take these hyper-parameters: {error}") from error
    return algorithm
