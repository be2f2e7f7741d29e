"""One round of every baseline worked by hand.

FedIT averages factors, and its mean of products is missed by exactly sum p (B_k - B)(A_k - A).
All numbers are halves and whole weights, so that every line below holds without a tolerance.
"""

from pathlib import Path

import pytest
import torch
from small_clients import TableClient, Watched, dataset, joined
from torch import Tensor

from fedkola.algorithms.fedit import FedIT
from fedkola.algorithms.fedit import State as FedITState
from fedkola.algorithms.joint import Joint
from fedkola.algorithms.joint import State as JointState
from fedkola.algorithms.local import Local
from fedkola.errors import Incompatible, UnknownCell, UpdateHidden
from fedkola.knowledge.views import Rule
from fedkola.types import Catalogue, Label

CATALOGUE = Catalogue(
    system="golden",
    levels=("code",),
    labels=tuple(Label(code=code, path=(code,), scope="s") for code in ("a", "b")),
)
SIZES = {"A": 1, "B": 2, "C": 5}
COHORT = tuple(SIZES)
START = {
    "q.lora_A": torch.tensor([[1.0, 0.0, 2.0], [0.0, 1.0, 0.0]]),  # r = 2, d_in = 3
    "q.lora_B": torch.zeros(4, 2),  # d_out = 4
    "head.bias": torch.tensor([0.5, -0.5]),
}


def halves(*shape: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(-8, 9, shape, generator=generator) / 2


def result(site: str) -> dict[str, Tensor]:
    """What training at a site returns, whatever it started from."""
    seed = ord(site)
    return {
        "q.lora_A": halves(2, 3, seed=seed),
        "q.lora_B": halves(4, 2, seed=seed + 100),
        "head.bias": halves(2, seed=seed + 200),
    }


def sites(folder: Path) -> list[TableClient]:
    return [
        TableClient(
            name=name,
            data=dataset(name, [("t", "a")] * num),
            catalogue=CATALOGUE,
            store=folder / name,
            table={"t": (700, 0), "u": (0, -700)},
            trained=lambda client, weights: result(client.name),
        )
        for name, num in SIZES.items()
    ]


def fedit(**changes: int) -> FedIT:
    return FedIT(epochs=1.0, batch=4, lr=0.1, level=0, **changes)


def test_fedit_averages_every_tensor_by_records(tmp_path: Path):
    state = fedit().round(1, FedITState(weights=START), COHORT, joined(sites(tmp_path)))
    parts = {name: [result(site)[name] for site in COHORT] for name in START}
    for name, (a, b, c) in parts.items():
        assert torch.equal(state.weights[name], (1 * a + 2 * b + 5 * c) / 8)
    bias = [tensor.tolist() for tensor in parts["head.bias"]]
    by_hand = [(1 * bias[0][i] + 2 * bias[1][i] + 5 * bias[2][i]) / 8 for i in range(2)]
    assert state.weights["head.bias"].tolist() == by_hand


def test_fedits_mean_of_factors_misses_the_mean_of_products_by_the_covariance(tmp_path: Path):
    state = fedit().round(1, FedITState(weights=START), COHORT, joined(sites(tmp_path)))
    a, b = state.weights["q.lora_A"], state.weights["q.lora_B"]
    shares = [num / 8 for num in SIZES.values()]
    trained = [result(site) for site in COHORT]
    products = sum(
        p * (w["q.lora_B"] @ w["q.lora_A"]) for p, w in zip(shares, trained, strict=True)
    )
    covariance = sum(
        p * ((w["q.lora_B"] - b) @ (w["q.lora_A"] - a))
        for p, w in zip(shares, trained, strict=True)
    )
    assert torch.equal(products - b @ a, covariance)
    assert float(covariance.abs().max()) > 1
    assert covariance.shape == (4, 3)


def test_fedit_trains_on_what_is_new_in_every_exchange_and_never_again(tmp_path: Path):
    members = sites(tmp_path)
    seen: list[tuple[str, float]] = []

    def trained(client: TableClient, weights: object) -> dict[str, Tensor]:
        seen.append((client.name, float(weights["head.bias"][0])))
        return result(client.name)

    for member in members:
        member.trained = trained
    clients = joined(members)
    state = fedit(exchanges=2).round(1, FedITState(weights=START), COHORT, clients)
    assert [name for name, _ in seen] == [*COHORT, *COHORT]
    assert len({bias for _, bias in seen}) == 2  # the second exchange starts from the first mean
    again = fedit().round(2, state, COHORT, clients)
    assert len(seen) == 6
    assert all(torch.equal(again.weights[name], state.weights[name]) for name in START)


def test_fedit_goes_on_without_a_site_that_fails(tmp_path: Path):
    members = sites(tmp_path)

    def broken(message: bytes) -> bytes:
        raise OSError("disk full")

    members[2].answer = broken
    clients = joined(members)
    state = fedit().round(1, FedITState(weights=START), COHORT, clients)
    expected = (1 * result("A")["q.lora_B"].double() + 2 * result("B")["q.lora_B"]) / 3
    assert torch.equal(state.weights["q.lora_B"], expected.float())
    assert clients.tally().refused == {"C": "Unreachable"}


def test_joint_training_has_the_weights_of_its_one_site(tmp_path: Path):
    union = sites(tmp_path)[2]
    joint = Joint(epochs=1.0, batch=4, lr=0.1, level=0)
    state = joint.round(1, JointState(weights=START), ("C",), joined([union]))
    assert all(torch.equal(state.weights[name], result("C")[name]) for name in START)
    with pytest.raises(Incompatible, match="the cohort has 3"):
        joint.round(1, JointState(weights=START), COHORT, joined(sites(tmp_path)))


def local() -> Local:
    rule = Rule(readout="pooled")
    return Local(features=3, bits=4, feature_seed=2, rule=rule, catalogue=CATALOGUE)


def test_local_keeps_a_model_per_site_and_asks_for_no_sum(tmp_path: Path):
    members = sites(tmp_path)
    members[0].data = dataset("A", [("t", "a"), ("u", "b"), ("u", "b")])
    members[1].data = dataset("B", [])
    clients = Watched(joined(members), sums_hidden=True)
    with pytest.raises(UpdateHidden):
        clients.sum(COHORT, None)
    state = local().round(1, local().start({}), COHORT, clients)
    assert clients.asked == [("each", "own", COHORT)]
    # The text t gives phi = (0, 0, 2), u gives (2, 0, 0) twice.
    own = {site: bank.cells[0] for site, bank in state.sites.items() if bank.cells}
    assert set(own) == {"A", "C"}
    assert own["A"].about.labels == ("a", "b")
    assert own["A"].total.words["sums"].tolist() == [[0, 0, 2], [4, 0, 0]]
    scatter = state.sites["A"].cells[1]
    assert scatter.about.covers == (own["A"].about.id,)
    assert scatter.total.words["gram"].tolist() == [8, 0, 0, 0, 0, 4]
    assert own["C"].about.labels == ("a",)
    assert own["C"].total.words["counts"].tolist() == [5]
    assert local().view(state, "A").head is not None
    for without_records in ("B", "never seen"):
        with pytest.raises(UnknownCell):
            local().view(state, without_records)
