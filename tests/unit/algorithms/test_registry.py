"""The closed table of algorithms, and what a broadcast may carry of one."""

import json

import pytest

from fedkola.algorithms import ALGORITHMS, rebuild
from fedkola.algorithms.ask import ask, spec
from fedkola.algorithms.fedit import FedIT
from fedkola.algorithms.fedkola import FedKoLa
from fedkola.algorithms.joint import Joint
from fedkola.errors import UnknownName
from fedkola.types import Visibility

FEDIT = FedIT(epochs=1.0, batch=8, lr=0.1, level=0, exchanges=3)


def test_a_client_half_is_rebuilt_from_its_name_and_plain_values():
    said = json.loads(json.dumps(dict(spec(FEDIT))))
    assert said == {"name": "FedIT", "epochs": 1.0, "batch": 8, "lr": 0.1, "level": 0}
    again = rebuild(said)
    assert isinstance(again, FedIT)
    assert spec(again) == spec(FEDIT)


def test_what_the_server_keeps_to_itself_is_never_broadcast():
    assert "exchanges" not in spec(FEDIT)
    local = {
        "k_min",
        "label_floor",
        "public_reference",
        "scatter_share",
        "scatter_every",
        "slots_max",
        "lora_floor",
        "rule",
        "catalogue",
        "targets",
        "policy",
        "cold",
        "model",
        "access",
        "tau_g",
        "top_k",
        "factors",
        "scan",
    }
    names = {f for f, about in FedKoLa.__dataclass_fields__.items() if about.metadata}
    assert names == local


@pytest.mark.parametrize(
    "said",
    [{}, {"name": "os.system"}, {"name": "fedit"}, {"name": "FedIT", "shell": "x"}, {"name": 3}],
)
def test_a_name_or_value_outside_the_table_is_refused(said: dict):
    with pytest.raises(UnknownName):
        rebuild(said)


def test_a_question_lists_weight_tensors_and_metrics_on_its_grid():
    asked = ask(FEDIT, "train", 4, {}, scale={"x": 16}, word=64, metrics={"loss": 10})
    assert (asked.round, asked.step) == (4, "train")
    assert (asked.grid.word, asked.grid.bits) == (64, 64)
    assert asked.grid.scale == {"weight": 0, "x": 16, "metric/loss": 10}


def test_only_methods_that_need_the_models_of_single_sites_look_at_single_answers():
    each = {name for name, method in ALGORITHMS.items() if method.needs is Visibility.EACH}
    assert each == {"local", "flora", "disco", "hpfl"}
    assert Joint.needs is Visibility.SUM
