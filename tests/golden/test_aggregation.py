"""What the federated LoRA baselines make of three sites' factors, exactly.

Three sites of unequal weight, layers that are not square, one square one (which hides a transposed
matrix from shapes) and a Conv1D, which keeps its weight the other way round. Effective weights are
read from a real model by sending the identity through each layer. Numbers are halves and weights
are whole, so that sums on the grid are exact.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from small_clients import TableClient, dataset, joined
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from fedkola.algorithms.ewc import EWC
from fedkola.algorithms.fed_sb import FedSB, pinned
from fedkola.algorithms.fedex_lora import FedExLoRA
from fedkola.algorithms.fedit import FedIT
from fedkola.algorithms.ffa_lora import FFALoRA
from fedkola.algorithms.flora import FLoRA
from fedkola.algorithms.replay import Replay
from fedkola.algorithms.rolora import RoLoRA
from fedkola.training.adapters import adapted, fresh, targets
from fedkola.training.model import Foundation
from fedkola.types import Catalogue, Dataset, Label, Penalty, Weights

CATALOGUE = Catalogue(
    system="golden",
    levels=("code",),
    labels=tuple(Label(code=code, path=(code,), scope="s") for code in ("a", "b")),
)
SIZES = {"A": 1, "B": 2, "C": 5}
SHARES = {site: num / 8 for site, num in SIZES.items()}
COHORT = tuple(SIZES)
LAYERS = {"q_proj": (48, 32), "c_attn": (24, 32), "v_proj": (32, 32)}
SCALE = 2.0
COMMON = {"epochs": 1.0, "batch": 4, "lr": 0.1, "level": 0}


class Layers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q_proj = nn.Linear(32, 48)
        self.c_attn = Conv1D(24, 32)
        self.v_proj = nn.Linear(32, 32)


@pytest.fixture(scope="module")
def base() -> Foundation:
    torch.manual_seed(0)
    return Foundation(
        name="layers",
        kind="encoder",
        model=Layers().eval().requires_grad_(False),
        tokenizer=list,
        hash="",
        width=32,
        max_tokens=4,
    )


def effective(base: Foundation, weights: Weights) -> dict[str, Tensor]:
    """W (d_out, d_in) of every layer, as the model uses it."""
    found = {}
    with torch.no_grad(), adapted(base, weights, scale=SCALE) as model:
        for layer, (_, d_in) in LAYERS.items():
            module = model.get_submodule(layer)
            found[layer] = (module(torch.eye(d_in)) - module(torch.zeros(1, d_in))).T
    return found


def halves(*shape: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(-4, 5, shape, generator=generator) / 2


def factors(site: str, *, rank: int = 3) -> dict[str, Tensor]:
    found = {}
    for i, (layer, (d_out, d_in)) in enumerate(LAYERS.items()):
        found[f"{layer}.lora_A"] = halves(rank, d_in, seed=100 * ord(site) + i)
        found[f"{layer}.lora_B"] = halves(d_out, rank, seed=100 * ord(site) + i + 50)
        found[f"{layer}.lora_R"] = halves(rank, rank, seed=100 * ord(site) + i + 70)
    return found


def result(site: str, weights: Weights, *, rank: int = 3) -> dict[str, Tensor]:
    """What training returns at a site: all that was asked for, whatever it started from."""
    own = {**factors(site, rank=rank), "head.bias": halves(2, seed=ord(site))}
    return {name: own[name] for name in weights}


def start() -> dict[str, Tensor]:
    return {**fresh(LAYERS, rank=3, seed=1), "head.bias": torch.zeros(2)}


def sites(
    folder: Path, trained: Callable[[Any, Weights], Weights] | None = None
) -> list[TableClient]:
    return [
        TableClient(
            name=name,
            data=dataset(name, [("t", "a")] * num),
            catalogue=CATALOGUE,
            store=folder / name,
            targets=LAYERS,
            trained=trained or (lambda client, weights: result(client.name, weights)),
        )
        for name, num in SIZES.items()
    ]


def mean_product(own: Mapping[str, Weights], layer: str) -> Tensor:
    """sum_k p_k B_k A_k."""
    total = torch.zeros(LAYERS[layer])
    for site, share in SHARES.items():
        total += share * (own[site][f"{layer}.lora_B"] @ own[site][f"{layer}.lora_A"])
    return total


def check(found: Mapping[str, Tensor], base: Foundation, ideal: Mapping[str, Tensor]) -> None:
    plain = effective(base, {})
    for layer in LAYERS:
        torch.testing.assert_close(
            found[layer], plain[layer] + SCALE * ideal[layer], rtol=1e-5, atol=1e-4
        )


def test_the_model_of_these_tests_has_the_layers_that_are_adapted(base: Foundation):
    assert targets(base) == LAYERS


METHODS: dict[str, Any] = {
    "fedit": FedIT(**COMMON),
    "ffa_lora": FFALoRA(**COMMON, rank=3, basis_seed=0),
    "rolora": RoLoRA(**COMMON),
    "flora": FLoRA(**COMMON, rank=3, scale=SCALE),
    "fedex_lora": FedExLoRA(**COMMON, scale=SCALE),
    "fed_sb": FedSB(**COMMON, core=3),
    "replay": Replay(**COMMON, buffer=2),
    "ewc": EWC(**COMMON, rank=3, basis_seed=0, penalty=1.0, sample=0),
}


@pytest.mark.parametrize("name", METHODS)
def test_every_site_counts_by_its_share(tmp_path: Path, name: str):
    """A mean that keeps only its last or its first term is caught at the other sites."""
    method, moved = METHODS[name], torch.tensor([1.0, -4.0])

    def after(folder: Path, pushed: str) -> Tensor:
        def trained(client: TableClient, weights: Weights) -> Weights:
            own = result(client.name, weights)
            shift = moved if client.name == pushed else torch.zeros(2)
            return {**own, "head.bias": own["head.bias"] + shift}

        clients = joined(sites(folder, trained))
        return method.round(1, method.start(start()), COHORT, clients).weights["head.bias"]

    plain = after(tmp_path / "plain", "")
    for site, share in SHARES.items():
        pushed = after(tmp_path / f"push-{site}", site)
        assert torch.equal(pushed - plain, share * moved)


@pytest.mark.parametrize("name", [name for name in METHODS if name != "replay"])
def test_a_round_without_new_records_changes_nothing(tmp_path: Path, name: str):
    method, clients = METHODS[name], joined(sites(tmp_path))
    once = method.round(1, method.start(start()), COHORT, clients)
    again = method.round(2, once, COHORT, clients)
    for key, value in once.weights.items():
        torch.testing.assert_close(again.weights[key], value, rtol=0, atol=1e-6)


def test_fedits_product_misses_the_mean_of_products(tmp_path: Path, base: Foundation):
    fedit = METHODS["fedit"]
    state = fedit.round(1, fedit.start(start()), COHORT, joined(sites(tmp_path)))
    own = {site: factors(site) for site in COHORT}
    found, plain = effective(base, state.weights), effective(base, {})
    for layer in LAYERS:
        ideal = SCALE * mean_product(own, layer)
        assert (found[layer] - plain[layer] - ideal).norm() > 0.5 * ideal.norm()


def test_ffa_loras_average_is_exact_and_its_a_never_travels(tmp_path: Path, base: Foundation):
    ffa = METHODS["ffa_lora"]
    begun = ffa.start(start())
    asked: list[set[str]] = []

    def trained(client: TableClient, weights: Weights) -> Weights:
        asked.append(set(weights))
        return result(client.name, weights)

    state = ffa.round(1, begun, COHORT, joined(sites(tmp_path, trained)))
    own = {}
    for site in COHORT:
        own[site] = {**factors(site)}
        for layer in LAYERS:
            a = begun.weights[f"{layer}.lora_A"]
            own[site][f"{layer}.lora_A"] = a
            assert torch.equal(state.weights[f"{layer}.lora_A"], a)
            torch.testing.assert_close(a @ a.T, torch.eye(3))
    check(effective(base, state.weights), base, {n: mean_product(own, n) for n in LAYERS})
    assert asked == [{*(f"{layer}.lora_B" for layer in LAYERS), "head.bias"}] * 3


def test_rolora_trains_b_and_a_in_turn_over_rounds_and_both_averages_are_exact(
    tmp_path: Path, base: Foundation
):
    rolora = METHODS["rolora"]
    free: list[set[str]] = []

    def trained(client: TableClient, weights: Weights) -> Weights:
        free.append({name.rpartition(".")[2] for name in weights if ".lora_" in name})
        return result(client.name, weights)

    members = sites(tmp_path, trained)
    for member in members:
        # New records in both rounds, of unequal number again.
        late = dataset(f"{member.name}2", [("t", "a")] * len(member.data), window=2)
        member.data = Dataset(
            **{
                column: (*getattr(member.data, column), *getattr(late, column))
                for column in ("records", "texts", "labels", "patients", "windows")
            }
        )
    begun = rolora.start(start())
    one = rolora.round(1, begun, COHORT, joined(members))
    own = {s: {**factors(s), **{n: v for n, v in begun.weights.items() if n.endswith("A")}}
           for s in COHORT}  # fmt: skip
    check(effective(base, one.weights), base, {n: mean_product(own, n) for n in LAYERS})
    two = rolora.round(2, one, COHORT, joined(members))
    own = {s: {**factors(s), **{n: v for n, v in one.weights.items() if n.endswith("B")}}
           for s in COHORT}  # fmt: skip
    check(effective(base, two.weights), base, {n: mean_product(own, n) for n in LAYERS})
    assert free == [{"lora_B"}] * 3 + [{"lora_A"}] * 3
    assert two.exchanges == 2


def test_rolora_alternates_within_a_round_too(tmp_path: Path):
    twice = RoLoRA(**COMMON, exchanges=2)
    begun = twice.start(start())
    state = twice.round(1, begun, COHORT, joined(sites(tmp_path)))
    assert all(not torch.equal(state.weights[n], begun.weights[n]) for n in begun.weights)


def test_flora_stacks_factors_of_unequal_ranks_and_counts_each_share_once(
    tmp_path: Path, base: Foundation
):
    flora, ranks = METHODS["flora"], {"A": 1, "B": 4, "C": 3}

    def trained(client: TableClient, weights: Weights) -> Weights:
        return result(client.name, weights, rank=ranks[client.name])

    begun = flora.start(start())
    state = flora.round(1, begun, COHORT, joined(sites(tmp_path, trained)))
    own = {site: factors(site, rank=ranks[site]) for site in COHORT}
    ideal = {layer: mean_product(own, layer) for layer in LAYERS}
    check(effective(base, state.weights), base, ideal)
    assert not any(".lora_" in name for name in state.weights)
    # In another order of arrival the sum of reals has the same bits.
    shuffled = joined(sites(tmp_path / "again", trained), order=3)
    again = flora.round(1, begun, COHORT, shuffled)
    assert all(torch.equal(again.weights[n], state.weights[n]) for n in state.weights)


def test_flora_asks_every_site_for_the_rank_it_was_given(tmp_path: Path, base: Foundation):
    flora = FLoRA(**COMMON, rank=3, ranks={"B": 1, "C": 4}, scale=SCALE)
    begun: dict[str, set[int]] = {}

    def trained(client: TableClient, weights: Weights) -> Weights:
        begun[client.name] = {v.shape[0] for n, v in weights.items() if n.endswith("lora_A")}
        return result(client.name, weights, rank=next(iter(begun[client.name])))

    state = flora.round(1, flora.start(start()), COHORT, joined(sites(tmp_path, trained)))
    assert begun == {"A": {3}, "B": {1}, "C": {4}}
    own = {site: factors(site, rank=rank) for site, (rank,) in begun.items()}
    check(
        effective(base, state.weights), base, {layer: mean_product(own, layer) for layer in LAYERS}
    )


def test_flora_starts_over_from_the_merged_base(tmp_path: Path, base: Foundation):
    flora = FLoRA(**COMMON, rank=3, scale=SCALE, exchanges=2)
    began: list[dict[str, Tensor]] = []

    def trained(client: TableClient, weights: Weights) -> Weights:
        began.append(dict(weights))
        return result(client.name, weights)

    state = flora.round(1, flora.start(start()), COHORT, joined(sites(tmp_path, trained)))
    own = {site: factors(site) for site in COHORT}
    check(
        effective(base, state.weights),
        base,
        {layer: 2 * mean_product(own, layer) for layer in LAYERS},
    )
    for weights in began:
        assert not any(weights[f"{layer}.lora_B"].any() for layer in LAYERS)
    assert not torch.equal(began[0]["q_proj.lora_A"], began[3]["q_proj.lora_A"])


def test_fedex_loras_effective_weight_is_the_mean_of_the_sites_effective_weights(
    tmp_path: Path, base: Foundation
):
    fedex = METHODS["fedex_lora"]
    state = fedex.round(1, fedex.start(start()), COHORT, joined(sites(tmp_path)))
    own = {site: factors(site) for site in COHORT}
    ideal = {layer: mean_product(own, layer) for layer in LAYERS}
    found, plain = effective(base, state.weights), effective(base, {})
    check(found, base, ideal)

    def error(weights: Weights, layer: str) -> float:
        miss = effective(base, weights)[layer] - plain[layer] - SCALE * ideal[layer]
        return float(miss.norm() / (SCALE * ideal[layer]).norm())

    # What the two known defects would give, on the square layer where shapes do not tell.
    delta = "v_proj.delta"
    turned = {**state.weights, delta: state.weights[delta].T}
    without = {**state.weights, delta: torch.zeros(32, 32)}
    assert error(state.weights, "v_proj") < 1e-5
    assert error(turned, "v_proj") > 0.5
    assert error(without, "v_proj") > 0.5


def test_fedex_loras_residuals_add_up_over_exchanges(tmp_path: Path, base: Foundation):
    fedex = FedExLoRA(**COMMON, scale=SCALE, exchanges=2)

    def trained(client: TableClient, weights: Weights) -> Weights:
        first = not weights["q_proj.lora_B"].any()
        other = chr(ord(client.name) + 10)
        return result(client.name if first else other, weights)

    state = fedex.round(1, fedex.start(start()), COHORT, joined(sites(tmp_path, trained)))
    first = {site: factors(site) for site in COHORT}
    second = {site: factors(chr(ord(site) + 10)) for site in COHORT}
    # The first exchange leaves its residual in the base; the second is the mean over that base.
    ideal = {}
    for layer in LAYERS:
        b, a = (
            sum(SHARES[s] * first[s][f"{layer}.{end}"] for s in COHORT)
            for end in ("lora_B", "lora_A")
        )
        ideal[layer] = mean_product(first, layer) - b @ a + mean_product(second, layer)
    check(effective(base, state.weights), base, ideal)


def test_fed_sbs_core_is_averaged_exactly_between_its_pinned_factors(
    tmp_path: Path, base: Foundation
):
    fed_sb = FedSB(**COMMON, core=9, exchanges=2)

    def trained(client: TableClient, weights: Weights) -> Weights:
        return result(client.name, weights, rank=9 if "q_proj.lora_R" in weights else 3)

    members = sites(tmp_path, trained)
    first = FedSB(**COMMON, core=9).round(1, fed_sb.start(start()), COHORT, joined(members))
    own = {site: factors(site) for site in COHORT}
    # Three sites of rank 3 move a space of rank 9 at most: the core holds all of the first mean.
    check(effective(base, first.weights), base, {n: mean_product(own, n) for n in LAYERS})
    state = fed_sb.round(1, fed_sb.start(start()), COHORT, joined(sites(tmp_path / "2", trained)))
    ideal = {}
    for layer in LAYERS:
        b, a = state.weights[f"{layer}.lora_B"], state.weights[f"{layer}.lora_A"]
        assert torch.equal(b, first.weights[f"{layer}.lora_B"])
        assert torch.equal(a, first.weights[f"{layer}.lora_A"])
        ideal[layer] = torch.zeros(LAYERS[layer])
        for site, share in SHARES.items():
            ideal[layer] += share * (b @ factors(site, rank=9)[f"{layer}.lora_R"] @ a)
    check(effective(base, state.weights), base, ideal)


def test_fed_sbs_factors_are_the_best_of_their_rank():
    product = halves(24, 32, seed=5)
    found = pinned({"x.product": product}, core=4)
    approximation = found["x.lora_B"] @ found["x.lora_R"] @ found["x.lora_A"]
    rest = torch.linalg.svdvals(product)[4:]
    assert float((product - approximation).norm()) == pytest.approx(float(rest.norm()), rel=1e-5)
    narrow = pinned({"x.product": product, "y.product": halves(2, 32, seed=6)}, core=4)
    assert narrow["x.lora_R"].shape == narrow["y.lora_R"].shape == (2, 2)


@dataclass(kw_only=True)
class Quadratic(TableClient):
    """A site whose loss is h/2 (w - c)^2 in every number: training finds the exact minimum."""

    curve: float
    goal: float
    held: list[Penalty] = field(default_factory=list)

    def fit(
        self, weights: Weights, data: Dataset, *, penalty: Penalty | None = None, **_: object
    ) -> Weights:
        assert penalty is not None
        self.held.append(penalty)
        found = {}
        for name in weights:
            f = penalty.strength * penalty.importance[name]
            anchor = penalty.anchor[name]
            found[name] = (self.curve * self.goal + f * anchor) / (self.curve + f)
        return found if len(data) else weights


def test_ewc_sums_what_matters_and_minimises_loss_and_penalty_together(tmp_path: Path):
    ewc = METHODS["ewc"]
    goals = {"A": 8.0, "B": -4.0, "C": 2.0}
    members = [
        Quadratic(
            name=name,
            data=dataset(name, [("t", "a")] * num),
            catalogue=CATALOGUE,
            store=tmp_path / name,
            targets=LAYERS,
            squares={"head.bias": torch.tensor([8.0 * num, 0.0], dtype=torch.float64)},
            curve=8.0,
            goal=goals[name],
        )
        for name, num in SIZES.items()
    ]
    clients = joined(members)
    one = ewc.round(1, ewc.start(start()), COHORT, clients)
    mean = sum(SHARES[site] * goals[site] for site in COHORT)
    assert one.weights["head.bias"].tolist() == [mean, mean]
    # A mean over the records of all sites: (8 x 1 + 8 x 2 + 8 x 5) / 8.
    assert one.fisher["head.bias"].tolist() == [8.0, 0.0]
    assert not one.fisher["q_proj.lora_B"].any()
    for member in members:
        member.data = dataset(f"{member.name}2", [("t", "a")] * len(member.data), window=2)
        member.goal += 10.0
    two = ewc.round(2, one, COHORT, clients)
    # Where the first round's records care, half way back to its end; where not, the new goal.
    expected = [(8 * (mean + 10) + 8 * mean) / 16, mean + 10]
    assert two.weights["head.bias"].tolist() == pytest.approx(expected, abs=1e-4)
    assert two.fisher["head.bias"].tolist() == [16.0, 0.0]
    assert members[0].held[1].strength == 1.0
    assert torch.equal(members[0].held[1].anchor["head.bias"], one.weights["head.bias"])


def test_ewc_that_nothing_matters_to_is_ffa_lora(tmp_path: Path):
    ewc, ffa = METHODS["ewc"], METHODS["ffa_lora"]
    one = ewc.round(1, ewc.start(start()), COHORT, joined(sites(tmp_path / "ewc")))
    other = ffa.round(1, ffa.start(start()), COHORT, joined(sites(tmp_path / "ffa")))
    assert set(one.weights) == set(other.weights)
    assert all(torch.equal(one.weights[name], other.weights[name]) for name in one.weights)
