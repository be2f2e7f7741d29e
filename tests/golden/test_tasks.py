"""Baselines that keep tasks, sites or concepts apart: every aggregation checked by hand.

Three sites hold 1, 2 and 5 records. Adapters stand on two layers that are not square, "q" of 3 to
4 and "c" of 5 to 2, and numbers are halves where a line holds without a tolerance.
"""

from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from small_clients import TableClient, Watched, dataset, joined
from torch import Tensor
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from fedkola import wire
from fedkola.algorithms import afcl, disco, feddrift, fot, hpfl, lorm, o_lora, slao, window
from fedkola.algorithms.afcl import AFCL
from fedkola.algorithms.disco import DISCO
from fedkola.algorithms.feddrift import FedDrift
from fedkola.algorithms.fot import FOT
from fedkola.algorithms.hpfl import HPFL
from fedkola.algorithms.lorm import LoRM
from fedkola.algorithms.o_lora import OLoRA
from fedkola.algorithms.oracle import Oracle
from fedkola.algorithms.slao import SLAO
from fedkola.errors import UpdateHidden
from fedkola.knowledge import statistics
from fedkola.knowledge.views import ridge
from fedkola.training import fit
from fedkola.training.adapters import adapted, targets
from fedkola.training.model import Foundation
from fedkola.types import Catalogue, Dataset, Label, Weights

CATALOGUE = Catalogue(
    system="golden",
    levels=("code", "scope"),
    labels=tuple(
        Label(code=code, path=(code, scope), scope=scope)
        for code, scope in (("a", "s"), ("b", "s"), ("c", "t"))
    ),
)
SIZES = {"A": 1, "B": 2, "C": 5}
SHARES = [num / 8 for num in SIZES.values()]
COHORT = tuple(SIZES)
TABLE = {"t": (700, 0, 10), "u": (0, -700, 20), "v": (300, 0, 900)}
SHAPES = {"q": (4, 3), "c": (2, 5)}
RANK = 2
TRAIN = {"epochs": 1.0, "batch": 4, "lr": 0.1, "level": 0}


def halves(*shape: int, seed: int) -> Tensor:
    return torch.randint(-8, 9, shape, generator=torch.Generator().manual_seed(seed)) / 2


def drawn(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def start() -> dict[str, Tensor]:
    weights = {}
    for layer, (d_out, d_in) in SHAPES.items():
        weights[f"{layer}.lora_A"] = halves(RANK, d_in, seed=1)
        weights[f"{layer}.lora_B"] = torch.zeros(d_out, RANK)
    return {**weights, "head.weight": torch.zeros(3, 3), "head.bias": torch.zeros(3)}


def result(site: str, *, number: int = 0) -> dict[str, Tensor]:
    """What training at a site returns, whatever it started from."""
    seed = 1000 * number + ord(site)
    return {
        name: halves(*value.shape, seed=seed + 100 * i)
        for i, (name, value) in enumerate(start().items())
    }


def sites(folder: Path, **rows: list[tuple[str, str]]) -> list[TableClient]:
    members = []
    for name, num in SIZES.items():
        member = TableClient(
            name=name,
            data=dataset(name, rows.get(name, [("t", "a")] * num)),
            catalogue=CATALOGUE,
            store=folder / name,
            table=TABLE,
            targets=SHAPES,
            trained=lambda client, weights: {k: result(client.name)[k] for k in weights},
            grammed=grams,
        )
        member.store.mkdir()
        members.append(member)
    return members


def arrives(member: TableClient, rows: list[tuple[str, str]], *, window: int) -> None:
    """More records for a site."""
    new = dataset(f"{member.name}w{window}-", rows, window=window)
    old = member.data
    member.data = Dataset(
        records=old.records + new.records,
        texts=old.texts + new.texts,
        labels=old.labels + new.labels,
        patients=old.patients + new.patients,
        windows=old.windows + new.windows,
    )


def inputs(client: TableClient, data: Dataset, layer: str) -> Tensor:
    """The inputs (n, d_in) of a layer at a site: a direction of its own plus its place."""
    base = drawn(5, SHAPES[layer][1], seed=ord(client.name) + len(layer) + SHAPES[layer][1])
    return base[: len(data)] if len(data) <= 5 else base.repeat(len(data) // 5 + 1, 1)[: len(data)]


def grams(client: TableClient, data: Dataset, weights: Weights) -> dict[str, Tensor]:
    found = {}
    for layer in window.layers(weights):
        z = inputs(client, data, layer) @ weights[f"{layer}.lora_A"].double().T
        found[f"{layer}.gram"] = z.T @ z
    return found


@dataclass
class Table:
    """A reader with embeddings from the table; adapters leave them as they are."""

    catalogue: Catalogue = CATALOGUE
    nodes: tuple[str, ...] = ("a", "b", "c")

    def features(self, texts: list[str], *, adapter: Weights | None = None) -> Tensor:
        return torch.tensor([TABLE[text] for text in texts], dtype=torch.int16)

    def embeddings(
        self, weights: Weights, texts: list[str], *, gate: Tensor | None = None
    ) -> Tensor:
        return torch.nn.functional.normalize(self.features(texts).float(), dim=1)

    def scores(self, weights: Weights, texts: list[str]) -> Tensor:
        e = fit.SHARPNESS * self.embeddings(weights, texts)
        return e @ weights["head.weight"].T + weights["head.bias"]

    def losses(
        self,
        weights: Weights,
        prompts: list[str],
        texts: list[str],
        *,
        gate: Tensor | None = None,
    ) -> Tensor:
        shift = float(weights["q.lora_B"].sum()) if weights else 0.0
        return torch.tensor([[shift, 1.0]] * len(texts), dtype=torch.float64)


# --- AFCL -----------------------------------------------------------------------------------------


def ridge_federation(folder: Path) -> list[TableClient]:
    members = sites(
        folder,
        A=[("t", "a")],
        B=[("u", "b"), ("t", "a")],
        C=[("u", "b"), ("v", "c"), ("v", "c"), ("t", "a"), ("u", "b")],
    )
    arrives(members[0], [("v", "c"), ("u", "b")], window=2)
    return members


def afcl_algorithm() -> AFCL:
    return AFCL(features=6, bits=4, feature_seed=2, level=0, lam=1e-3)


def pooled(members: list[TableClient]) -> dict[str, Tensor]:
    texts = [text for member in members for text in member.data.texts]
    codes = [code for member in members for code in member.data.labels]
    return statistics.analytic(
        torch.tensor([TABLE[text] for text in texts], dtype=torch.int16),
        torch.tensor([CATALOGUE.codes().index(code) for code in codes]),
        num_rows=3,
        features=6,
        bits=4,
        seed=2,
    )


def test_afcls_streamed_sums_are_the_centralised_ones_bit_for_bit(tmp_path: Path):
    members = ridge_federation(tmp_path)
    clients, algorithm = joined(members), afcl_algorithm()
    state = algorithm.start({})
    for number in (1, 2, 3):
        state = algorithm.round(number, state, COHORT, clients)
    whole = pooled(members)
    assert set(state.sums) == set(whole)
    assert all(torch.equal(state.sums[name], whole[name]) for name in whole)
    assert int(state.sums["counts"].sum()) == 10


def test_afcls_head_is_the_ridge_over_all_records_to_1e_8(tmp_path: Path):
    members = ridge_federation(tmp_path)
    whole = pooled(members)
    solved, known = afcl.head(whole, torch.tensor([0, 1, 2]), num_nodes=3, lam=1e-3)
    texts = [text for member in members for text in member.data.texts]
    codes = [code for member in members for code in member.data.labels]
    z = torch.tensor([TABLE[text] for text in texts], dtype=torch.int16)
    phi = statistics.expand(z, features=6, bits=4, seed=2).double()
    y = torch.nn.functional.one_hot(
        torch.tensor([CATALOGUE.codes().index(c) for c in codes])
    ).double()
    gamma = ridge(1e-3, features=6, records=10) * float((phi.T @ phi).diagonal().mean())
    stacked = torch.cat([phi, gamma**0.5 * torch.eye(6, dtype=torch.float64)])
    expected = torch.linalg.lstsq(
        stacked, torch.cat([y, torch.zeros(6, 3, dtype=torch.float64)]), driver="gelsd"
    ).solution
    assert known.tolist() == [0, 1, 2]
    assert (solved - expected).abs().max() < 1e-8


def test_afcl_answers_with_the_ridge_and_not_for_nodes_without_records(tmp_path: Path):
    members = sites(tmp_path, B=[("u", "b"), ("u", "b")])
    algorithm = afcl_algorithm()
    state = algorithm.round(1, algorithm.start({}), COHORT, joined(members))
    scores = algorithm.answer(state, Table(), ["t", "u"])
    assert scores[:, :2].argmax(1).tolist() == [0, 1]
    assert scores[:, 2].tolist() == [float("-inf")] * 2
    assert algorithm.answer(algorithm.start({}), Table(), ["t"]).tolist() == [[float("-inf")] * 3]


# --- O-LoRA and SLAO ------------------------------------------------------------------------------


def o_lora_algorithm(**changes: int) -> OLoRA:
    return OLoRA(**TRAIN, scale=0.5, penalty=0.5, **changes)


def test_o_loras_penalty_has_no_gradient_where_a_is_orthogonal_to_the_past():
    past = {"q.lora_A": torch.tensor([[1.0, 1.0, 0.0]]), "q.lora_B": torch.ones(4, 1)}
    penalty = o_lora.apart(past, strength=0.5)
    orthogonal = torch.tensor([[1.0, -1.0, 3.0], [0.0, 0.0, 1.0]])
    assert fit.penalty_gradient(penalty, "q.lora_A", orthogonal).abs().max() == 0
    a = torch.tensor([[1.0, 2.0, 0.0], [0.0, 0.0, 1.0]], requires_grad=True)
    (expected,) = torch.autograd.grad(0.5 * (a @ past["q.lora_A"].T).square().sum(), a)
    assert torch.equal(fit.penalty_gradient(penalty, "q.lora_A", a.detach()), expected)
    assert expected.abs().max() == 3
    assert o_lora.apart({}, strength=0.5) is None


def test_o_lora_averages_a_window_like_fedit_and_adds_its_product_to_the_past(tmp_path: Path):
    members = sites(tmp_path)
    clients, algorithm = joined(members), o_lora_algorithm()
    first = algorithm.round(1, algorithm.start(start()), COHORT, clients)
    mean = {
        name: sum(p * result(s)[name] for p, s in zip(SHARES, COHORT, strict=True))
        for name in start()
    }
    for name in start():
        torch.testing.assert_close(first.weights[name], mean[name], atol=1e-4, rtol=0)
    for member in members:
        arrives(member, [("u", "b")] * SIZES[member.name], window=2)
        member.trained = lambda client, weights: {
            k: result(client.name, number=2)[k] for k in weights
        }
    second = algorithm.round(2, first, COHORT, clients)
    for layer in SHAPES:
        newer = {
            end: sum(
                p * result(s, number=2)[layer + end] for p, s in zip(SHARES, COHORT, strict=True)
            )
            for end in (".lora_A", ".lora_B")
        }
        whole = second.past[f"{layer}.lora_B"] @ second.past[f"{layer}.lora_A"]
        expected = mean[f"{layer}.lora_B"] @ mean[f"{layer}.lora_A"]
        expected = expected + newer[".lora_B"] @ newer[".lora_A"]
        torch.testing.assert_close(whole, expected, atol=1e-2, rtol=0)
        assert second.past[f"{layer}.lora_A"].shape == (2 * RANK, SHAPES[layer][1])
    assert algorithm.round(3, second, COHORT, clients) is second


def test_o_lora_trains_beside_the_frozen_past_and_held_apart_from_it(tmp_path: Path):
    members, given = sites(tmp_path), []
    clients, algorithm = joined(members), o_lora_algorithm()
    first = algorithm.round(1, algorithm.start(start()), COHORT, clients)

    def fitted(weights: Weights, data: Dataset, **rest: object) -> Weights:
        given.append(rest)
        return weights

    arrives(members[0], [("u", "b")], window=2)
    members[0].fit = fitted
    algorithm.round(2, first, ("A",), clients)
    past = first.past
    assert given[0]["penalty"].strength == 0.5
    assert set(given[0]["penalty"].apart) == {"q.lora_A", "c.lora_A"}
    assert torch.equal(given[0]["penalty"].apart["c.lora_A"], past["c.lora_A"])
    assert set(given[0]["pinned"]) == {"q.delta", "c.delta"}
    expected = 0.5 * past["c.lora_B"] @ past["c.lora_A"]
    torch.testing.assert_close(given[0]["pinned"]["c.delta"], expected)


def test_the_mean_of_orthogonal_factors_is_orthogonal_to_the_past_but_not_of_orthonormal_rows():
    past = torch.tensor([[0.0, 0.0, 1.0]])
    parts = [torch.tensor([[1.0, 0.0, 0.0]]), torch.tensor([[0.0, 1.0, 0.0]])]
    mean = (parts[0] + 3 * parts[1]) / 4
    assert mean @ past.T == 0
    assert float(mean @ mean.T) == pytest.approx(0.625)
    # Sites reach the penalty's zero only in part; what is left does not cancel in the mean.
    left = [part + 0.5 * past for part in parts]
    assert float((left[0] + 3 * left[1]) @ past.T) / 4 == 0.5


def test_slao_starts_a_task_on_orthonormal_rows_of_the_same_space():
    tuned = {"c.lora_A": halves(2, 5, seed=3), "c.lora_B": halves(2, 2, seed=4)}
    begun = slao.orthogonal(tuned)
    a = begun["c.lora_A"].double()
    torch.testing.assert_close(a @ a.T, torch.eye(2).double(), atol=1e-6, rtol=0)
    old = tuned["c.lora_A"].double()
    torch.testing.assert_close((old @ a.T) @ a, old, atol=1e-5, rtol=0)
    assert torch.equal(begun["c.lora_B"], tuned["c.lora_B"])


def test_slao_merges_b_with_the_inverse_root_of_the_task_and_takes_a_as_it_is(tmp_path: Path):
    members = sites(tmp_path)
    seen: list[Tensor] = []

    def trained(client: TableClient, weights: Weights) -> dict[str, Tensor]:
        seen.append(weights["q.lora_A"])
        return result(client.name, number=len(seen) // 4)

    for member in members:
        member.trained = trained
    clients, algorithm = joined(members), SLAO(**TRAIN)
    first = algorithm.round(1, algorithm.start(start()), COHORT, clients)
    for member in members:
        arrives(member, [("u", "b")] * SIZES[member.name], window=2)
    second = algorithm.round(2, first, COHORT, clients)
    means = [
        {
            name: sum(p * result(s, number=n)[name] for p, s in zip(SHARES, COHORT, strict=True))
            for name in start()
        }
        for n in (0, 1)
    ]
    assert all(torch.equal(first.weights[name], means[0][name]) for name in start())
    assert second.tasks == 2
    for name in start():
        old, new = means[0][name], second.tuned.get(name, second.weights[name])
        torch.testing.assert_close(new, means[1][name], atol=1e-4, rtol=0)
        expected = old + (new - old) / 2**0.5 if name.endswith("lora_B") else new
        torch.testing.assert_close(second.weights[name], expected)
    started = slao.orthogonal(window.factors(means[0]))["q.lora_A"]
    torch.testing.assert_close(seen[3], started)


# --- FOT ------------------------------------------------------------------------------------------


def fot_algorithm(**changes: float) -> FOT:
    return FOT(**{**TRAIN, "scale": 0.5, "core": 4, "sketch_seed": 3, "threshold": 1.0, **changes})


def test_fots_subspace_is_the_centralised_one_where_inputs_have_low_rank():
    parts = [drawn(n, 2, seed=n) @ drawn(2, 7, seed=99) for n in (3, 4, 9)]
    omega = fot.gaussian("q", 7, 4, 3)
    grams = [x.T @ x for x in parts]
    u = fot.extended(
        None,
        sum(g @ omega for g in grams),
        omega,
        trace=sum(float(g.trace()) for g in grams),
        share=1.0,
    )
    assert u.shape == (7, 2)
    v = torch.linalg.svd(torch.cat(parts), full_matrices=False).Vh[:2].T
    torch.testing.assert_close(u @ u.T, v @ v.T, atol=1e-8, rtol=0)


def test_fots_subspace_grows_by_what_is_missing_and_stops_at_the_share():
    first = torch.diag(torch.tensor([8.0, 1.0, 0.0, 0.0]).double())
    second = torch.diag(torch.tensor([5.0, 0.0, 4.0, 1.0]).double())
    omega = torch.eye(4).double()
    u = fot.extended(None, first @ omega, omega, trace=9.0, share=0.8)
    assert u.abs().round().tolist() == [[1], [0], [0], [0]]
    grown = fot.extended(u, second @ omega, omega, trace=10.0, share=0.8)
    assert grown.abs().round().tolist() == [[1, 0], [0, 0], [0, 1], [0, 0]]
    assert torch.equal(fot.extended(grown, first @ omega, omega, trace=9.0, share=0.8), grown)
    whole = fot.extended(grown, second @ omega, omega, trace=10.0, share=1.0)
    torch.testing.assert_close(whole.T @ whole, torch.eye(3).double())


def test_fot_learns_nothing_that_earlier_inputs_can_see(tmp_path: Path):
    members = sites(tmp_path)
    clients = Watched(joined(members))
    algorithm = fot_algorithm()
    first = algorithm.round(1, algorithm.start(start()), COHORT, clients)
    assert clients.asked == [("sum", "train", COHORT), ("sum", "sketch", COHORT)]
    # One record at A, two at B and five at C span all of R^3, so layer q can learn no more.
    assert first.basis["q"].shape == (3, 3)
    assert first.basis["c"].shape[1] == 4
    for member in members:
        arrives(member, [("u", "b")] * SIZES[member.name], window=2)
    second = algorithm.round(2, first, COHORT, clients)
    for layer in SHAPES:
        old, new = (
            state.past[f"{layer}.lora_B"] @ state.past[f"{layer}.lora_A"]
            for state in (first, second)
        )
        change = (new - old).double()
        assert (change @ first.basis[layer]).abs().max() < 1e-5
    assert (new - old).abs().max() > 0.1  # c has a direction left
    assert first.past["q.lora_B"].abs().max() > 0


# --- LoRM -----------------------------------------------------------------------------------------


def addends(factors: list[dict[str, Tensor]], xs: list[Tensor], a: Tensor, end: str) -> Weights:
    """Summed products and Grams of layer c, as three sites send them."""
    total = {"c.product": 0, "c.gram": 0}
    for weights, x in zip(factors, xs, strict=True):
        z = x @ a.double().T if end == ".lora_B" else x
        total["c.product"] = total["c.product"] + weights["c" + end].double() @ (z.T @ z)
        total["c.gram"] = total["c.gram"] + statistics.pack(z.T @ z)
    return total


@pytest.mark.parametrize("end", [".lora_B", ".lora_A"])
def test_lorms_merge_is_least_squares_on_the_stacked_inputs_of_all_sites(end: str):
    xs = [drawn(n, 5, seed=n) for n in (4, 6, 9)]
    trained = [result(site) for site in COHORT]
    a = halves(RANK, 5, seed=1)
    adapter = {"c.lora_A": a, "c.lora_B": halves(2, RANK, seed=2)}
    found = lorm.merged(addends(trained, xs, a, end), adapter, moving=end)
    assert list(found) == ["c" + end]
    # Every site's own answer to its own inputs; z is what the factor that moved reads.
    seen = [x @ a.double().T if end == ".lora_B" else x for x in xs]
    wanted = [z @ w["c" + end].double().T for z, w in zip(seen, trained, strict=True)]
    expected = torch.linalg.lstsq(torch.cat(seen), torch.cat(wanted)).solution.T
    torch.testing.assert_close(found["c" + end].double(), expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("end", [".lora_B", ".lora_A"])
def test_lorms_merge_is_the_mean_where_sites_have_equal_grams(end: str):
    x = drawn(8, 5, seed=1)
    trained = [result(site) for site in COHORT]
    a = halves(RANK, 5, seed=1)
    found = lorm.merged(addends(trained, [x] * 3, a, end), {"c.lora_A": a}, moving=end)
    expected = sum(w["c" + end] for w in trained) / 3
    torch.testing.assert_close(found["c" + end], expected, atol=1e-5, rtol=0)


def test_a_window_of_lorm_trains_b_then_a_and_merges_windows_by_their_grams(tmp_path: Path):
    members = sites(tmp_path)
    clients = Watched(joined(members))
    algorithm = LoRM(**TRAIN, scale=0.5, exchanges=2)
    first = algorithm.round(1, algorithm.start(start()), COHORT, clients)
    assert [step for _, step, _ in clients.asked] == ["train_b", "train_a", "weigh"]
    xs = [inputs(member, member.data, "c") for member in members]
    fresh = window.fresh(start(), seed=0, number=1)["c.lora_A"].double()
    zs = [x @ fresh.T for x in xs]
    b = torch.linalg.lstsq(
        torch.cat(zs),
        torch.cat([z @ result(s)["c.lora_B"].double().T for z, s in zip(zs, COHORT, strict=True)]),
    ).solution.T
    ys = [x @ result(s)["c.lora_A"].double().T for x, s in zip(xs, COHORT, strict=True)]
    a = (torch.linalg.pinv(torch.cat(xs)) @ torch.cat(ys)).T
    answers = torch.cat(xs) @ (0.5 * b @ a).T
    torch.testing.assert_close(
        torch.cat(xs) @ first.shifts["c.delta"].double().T, answers, atol=1e-4, rtol=0
    )
    assert first.shifts["c.delta"].shape == (2, 5)
    torch.testing.assert_close(first.grams["c"], torch.cat(xs).T @ torch.cat(xs), atol=1e-5, rtol=0)
    assert algorithm.round(2, first, COHORT, clients) is first


# --- the layers of real models --------------------------------------------------------------------


def model_of(kind: str) -> Foundation:
    """One layer of GPT-2 (Conv1D of 8 to 24), or of Llama with one key head (Linear of 8 to 4)."""
    torch.manual_seed(0)
    if kind == "conv1d":
        model = GPT2LMHeadModel(
            GPT2Config(vocab_size=12, n_embd=8, n_layer=1, n_head=2, n_positions=16)
        )
    else:
        model = LlamaForCausalLM(
            LlamaConfig(
                vocab_size=12,
                hidden_size=8,
                intermediate_size=8,
                num_hidden_layers=1,
                num_attention_heads=2,
                num_key_value_heads=1,
                max_position_embeddings=16,
            )
        )
    return Foundation(
        name=kind,
        kind="causal",
        model=model.eval().requires_grad_(False),
        tokenizer=lambda texts: {"input_ids": [[1 + len(w) for w in t.split()] for t in texts]},
        hash="",
        width=8,
        max_tokens=16,
    )


@dataclass
class Real:
    """A client whose Grams come from a real model."""

    foundation: Foundation

    def grams(self, weights: Weights, data: Dataset, *, pinned: Weights) -> Weights:
        own = {name: value for name, value in weights.items() if name.endswith(".lora_B")}
        return fit.grams(self.foundation, own, data.texts, pinned=pinned, scale=0.5)


def adapter_of(foundation: Foundation, *, seed: int) -> dict[str, Tensor]:
    weights = {}
    for i, (layer, (d_out, d_in)) in enumerate(targets(foundation).items()):
        weights[f"{layer}.lora_A"] = drawn(2, d_in, seed=seed + i).float()
        weights[f"{layer}.lora_B"] = drawn(d_out, 2, seed=seed + 10 + i).float()
    return weights


@pytest.mark.parametrize("kind", ["conv1d", "linear"])
def test_the_gram_of_a_layers_inputs_is_that_of_the_adapted_model(
    kind: str, monkeypatch: pytest.MonkeyPatch
):
    foundation = model_of(kind)
    weights = adapter_of(foundation, seed=1)
    texts = ["a bb ccc", "dddd e", "ff"]
    monkeypatch.setattr(
        fit, "encode", lambda _, texts, *__: foundation.tokenizer(texts)["input_ids"]
    )
    data = dataset("A", [(text, "a") for text in texts])
    found = window.input_grams(Real(foundation), weights, data, pinned={})
    seen: dict[str, list[Tensor]] = {layer: [] for layer in targets(foundation)}
    with adapted(foundation, weights, scale=0.5) as model, torch.no_grad():
        for layer in seen:
            module = model.get_submodule(layer)
            module.register_forward_hook(
                lambda m, args, out, layer=layer: seen[layer].append(args[0][0].double())
            )
        for text in texts:
            model(input_ids=torch.tensor(foundation.tokenizer([text])["input_ids"]))
    for layer, (d_out, d_in) in targets(foundation).items():
        assert found[layer].shape == (d_in, d_in)
        expected = sum(x.T @ x / len(x) for x in seen[layer])
        torch.testing.assert_close(found[layer], expected, atol=1e-4, rtol=1e-4)
        assert kind == "linear" or d_out == 3 * d_in


@pytest.mark.parametrize("kind", ["conv1d", "linear"])
def test_outside_the_subspace_a_layer_keeps_its_answers_to_old_inputs(kind: str):
    foundation = model_of(kind)
    basis = {
        layer: torch.linalg.qr(drawn(d_in, 3, seed=i)).Q
        for i, (layer, (_, d_in)) in enumerate(targets(foundation).items())
    }
    learnt = fot.outside(adapter_of(foundation, seed=5), basis)
    shift = window.shifts(learnt, scale=0.5)
    for layer in targets(foundation):
        old = (drawn(6, 3, seed=7) @ basis[layer].T).float()
        new = drawn(6, len(basis[layer]), seed=8).float()
        module = foundation.model.get_submodule(layer)
        before = module(old), module(new)
        for weights in (learnt, shift):
            with adapted(foundation, weights, scale=0.5) as model, torch.no_grad():
                after = model.get_submodule(layer)(old), model.get_submodule(layer)(new)
            torch.testing.assert_close(after[0], before[0], atol=1e-5, rtol=0)
            assert (after[1] - before[1]).abs().max() > 0.1


# --- HPFL -----------------------------------------------------------------------------------------


def hpfl_algorithm(*, noise: float = 0.0) -> HPFL:
    return HPFL(**TRAIN, exchanges=1, noise=noise)


def apart_in_text(folder: Path) -> list[TableClient]:
    return sites(folder, A=[("t", "a")], B=[("u", "b")] * 2, C=[("v", "c")] * 5)


def test_without_noise_each_site_finds_its_own_plug_in_with_its_bits_unchanged(tmp_path: Path):
    members = apart_in_text(tmp_path)
    clients = Watched(joined(members), sums_hidden=True)
    with pytest.raises(UpdateHidden):
        clients.sum(COHORT, None)
    algorithm = hpfl_algorithm()
    state = algorithm.round(1, algorithm.start(start()), COHORT, clients)
    assert clients.asked == [("each", "plug", COHORT)]
    choice = hpfl.nearest(state.store, Table().features(["t", "u", "v"]))
    assert [state.store[i].site for i in choice.tolist()] == ["A", "B", "C"]
    assert hpfl.nearest(state.store, Table().features(["v", "t"])).tolist() == [2, 0]
    for plugin in state.store:
        own = result(plugin.site)
        assert all(torch.equal(plugin.weights[name], own[name]) for name in own)
    arrives(members[1], [("v", "c")], window=2)
    later = algorithm.round(2, state, COHORT, clients)
    assert [(p.site, p.round) for p in later.store] == [("A", 1), ("B", 1), ("C", 1), ("B", 2)]
    assert later.store[:3] == state.store


def test_hpfl_answers_each_text_under_its_nearest_plug_in(tmp_path: Path):
    algorithm = hpfl_algorithm()
    state = algorithm.start(start())
    assert algorithm.answer(state, Table(), ["t"]).tolist() == [[float("-inf")] * 3]
    state = algorithm.round(1, state, COHORT, joined(apart_in_text(tmp_path)))
    scores = algorithm.answer(state, Table(), ["v", "t"])
    e = Table().embeddings({}, ["v", "t"])
    for row, site in enumerate("CA"):
        own = result(site)
        expected = fit.SHARPNESS * own["head.weight"] @ e[row] + own["head.bias"]
        torch.testing.assert_close(scores[row], expected)
    expected = [[float(result(site)["q.lora_B"].sum()), 1.0] for site in "CA"]
    assert algorithm.losses(state, Table(), ["v", "t"], ["u", "u"]).tolist() == expected
    assert algorithm.losses(state, Table(), (), ["v", "t"]).tolist() == expected


def test_the_noise_of_a_marker_has_the_asked_size_and_repeats():
    z = torch.zeros(4, 4000, dtype=torch.int16)
    found = hpfl.marker(z, noise=0.25, seed=5)
    assert float(found.std()) == pytest.approx(0.25, rel=0.05)
    assert torch.equal(found, hpfl.marker(z, noise=0.25, seed=5))
    assert not torch.equal(found, hpfl.marker(z, noise=0.25, seed=6))
    exact = torch.tensor([[512, 1024], [0, 0]], dtype=torch.int16)
    assert hpfl.marker(exact, noise=0.0, seed=5).tolist() == [0.25, 0.5]


# --- DISCO ----------------------------------------------------------------------------------------


def disco_algorithm(**changes: float) -> DISCO:
    return DISCO(**{**TRAIN, "threshold": 0.9, "temperature": 0.05, **changes})


def test_two_planted_tasks_give_two_clusters_whose_adapters_average_their_own_sites(tmp_path: Path):
    members = sites(
        tmp_path, A=[("t", "a")], B=[("u", "c")] * 2, C=[("t", "a")] * 3 + [("u", "c")] * 2
    )
    clients = Watched(joined(members))
    algorithm = disco_algorithm()
    state = algorithm.round(1, algorithm.start(start()), COHORT, clients)
    assert clients.asked == [
        ("each", "describe", COHORT),
        ("sum", "train", ("A", "C")),
        ("sum", "train", ("B", "C")),
    ]
    assert len(state.clusters) == 2
    assert state.clusters[0].sums.tolist() == [4 * n for n in TABLE["t"]]
    assert state.clusters[1].sums.tolist() == [4 * n for n in TABLE["u"]]
    for name in start():
        a, b, c = (result(site)[name] for site in COHORT)
        torch.testing.assert_close(state.clusters[0].weights[name], (a + 3 * c) / 4)
        torch.testing.assert_close(state.clusters[1].weights[name], (b + c) / 2)
    before = len(clients.asked)
    assert algorithm.round(2, state, COHORT, clients) is state
    assert clients.asked[before:] == [("each", "describe", COHORT)]


def test_a_task_joins_the_closest_cluster_above_the_threshold_and_else_opens_one():
    known = [torch.tensor([100, 0]), torch.tensor([0, 100])]
    tasks = torch.tensor([[[90, 10], [0, 0]], [[60, 50], [1, 30]]])
    counts = torch.tensor([[1, 0], [2, 3]])
    totals, owner = disco.assign(known, tasks, counts, threshold=0.9)
    assert owner.tolist() == [[0, -1], [2, 1]]
    assert [t.tolist() for t in totals] == [[190, 10], [1, 130], [60, 50]]
    assert [t.tolist() for t in known] == [[100, 0], [0, 100]]


def test_discos_gate_sums_to_one_and_is_the_softmax_of_cosines():
    clusters = [
        disco.Cluster(sums=torch.tensor(total), weights={}) for total in ([3, 0], [0, 5], [2, 2])
    ]
    gate = disco.gate(
        clusters, torch.tensor([[100, 0], [0, -7]], dtype=torch.int16), temperature=0.05
    )
    torch.testing.assert_close(gate.sum(1), torch.ones(2))
    cosines = torch.tensor([[1.0, 0.0, 0.5**0.5], [0.0, -1.0, -(0.5**0.5)]])
    torch.testing.assert_close(gate, torch.softmax(cosines / 0.05, dim=1))


def test_disco_mixes_heads_by_the_gate(tmp_path: Path):
    members = sites(tmp_path, B=[("u", "c")] * 2)
    algorithm = disco_algorithm(temperature=1.0)
    state = algorithm.round(1, algorithm.start(start()), COHORT, joined(members))
    gate = disco.gate(state.clusters, Table().features(["v"]), temperature=1.0)[0]
    e = Table().embeddings({}, ["v"])[0]
    expected = sum(
        g * (fit.SHARPNESS * cluster.weights["head.weight"] @ e + cluster.weights["head.bias"])
        for g, cluster in zip(gate, state.clusters, strict=True)
    )
    torch.testing.assert_close(algorithm.answer(state, Table(), ["v"])[0], expected)


# --- FedDrift -------------------------------------------------------------------------------------


def feddrift_algorithm(**changes: float) -> FedDrift:
    return FedDrift(**{**TRAIN, "threshold": 0.5, "width": 3, **changes})


def test_feddrifts_distances_and_merges_are_those_by_hand():
    # Rows are data of a module, columns modules; 2, 4 and 1 records.
    loss = torch.tensor([[2.0, 3.0, 8.0], [2.4, 2.0, 6.0], [5.0, 2.2, 2.0]]).double()
    size = torch.tensor([2.0, 4.0, 1.0]).double()
    apart = feddrift.distances(loss, size)
    inf = float("inf")
    expected = [[inf, 0.5, 3.0], [0.5, inf, 1.0], [3.0, 1.0, inf]]
    torch.testing.assert_close(apart, torch.tensor(expected).double())
    none = feddrift.distances(loss, torch.tensor([2.0, 0.0, 1.0]).double())
    assert none[0, 1] == none[1, 2] == inf
    assert none[0, 2] == 3.0

    state = feddrift.State(
        weights={},
        modules=tuple(
            feddrift.Module(
                number=i,
                weights={"w": torch.tensor(float(i))},
                sums=torch.tensor([i]),
                records=records,
            )
            for i, records in enumerate((2, 6, 1))
        ),
        heirs=(0, 1, 2),
    )
    pair = feddrift.merged(state, apart, delta=0.6)
    assert [m.number for m in pair.modules] == [0, 2]
    assert float(pair.modules[0].weights["w"]) == 6 / 8
    assert (pair.modules[0].records, pair.modules[0].sums.tolist()) == (8, [1])
    assert pair.heirs == (0, 0, 2)
    # The merged pair is as far from the third as its farther part: 3, not 1.
    assert feddrift.merged(state, apart, delta=2.0) == pair
    assert len(feddrift.merged(state, apart, delta=3.1).modules) == 1
    assert feddrift.merged(state, apart, delta=0.5) is state


def concept(client: TableClient, data: Dataset, weights: Weights) -> float:
    """A module's first bias number is the concept it knows; "b" records are of concept 2."""
    knows = float(weights["head.bias"][0])
    return sum(abs(knows - (2.0 if code == "b" else 1.0)) for code in data.labels) / len(data)


def learnt(client: TableClient, weights: Weights) -> dict[str, Tensor]:
    newest = max(client.data.windows)
    codes = [c for c, w in zip(client.data.labels, client.data.windows, strict=True) if w == newest]
    known = 2.0 if codes[0] == "b" else 1.0
    return {**weights, "head.bias": torch.tensor([known, 0.0, 0.0])}


def test_two_concepts_that_reach_sites_one_after_the_other_give_two_modules(tmp_path: Path):
    members = sites(tmp_path)
    for member in members:
        member.trained, member.judged = learnt, concept
    clients, algorithm = Watched(joined(members)), feddrift_algorithm()
    state = algorithm.round(1, algorithm.start(start()), COHORT, clients)
    assert len(state.modules) == 1
    assert state.modules[0].records == 8
    # In window 2 the concept changes at C alone, in window 3 at B; A keeps the first one.
    for number, drifted in ((2, "C"), (3, "BC")):
        for member in members:
            code = "b" if member.name in drifted else "a"
            arrives(member, [("t", code)] * SIZES[member.name], window=number)
        state = algorithm.round(number, state, COHORT, clients)
        assert len(state.modules) == 2
    assert [m.number for m in state.modules] == [0, 1]
    assert [float(m.weights["head.bias"][0]) for m in state.modules] == [1.0, 2.0]
    assert [m.records for m in state.modules] == [8 + 1 + 2 + 1, 5 + 2 + 5]
    assert all(question == "sum" for question, _, _ in clients.asked)


def test_sites_that_drift_to_a_known_concept_in_other_rounds_are_merged_into_it(tmp_path: Path):
    members = sites(tmp_path)
    for member in members:
        member.trained, member.judged = learnt, concept
    clients, algorithm = joined(members), feddrift_algorithm()
    state = algorithm.round(1, algorithm.start(start()), COHORT, clients)
    twin = replace(state.modules[0], number=1)
    state = replace(state, modules=(*state.modules, twin), heirs=(0, 1))
    for member in members:
        arrives(member, [("t", "a")], window=2)
    # Nobody has data of the twin yet, so nothing says that it is the same.
    state = algorithm.round(2, state, COHORT, clients)
    assert len(state.modules) == 2


def test_a_site_whose_choice_was_lost_goes_on_without_a_last_window(tmp_path: Path):
    members = sites(tmp_path)
    for member in members:
        member.trained, member.judged = learnt, concept
    (members[0].store / "feddrift.json").write_text('{"0": 9}', encoding="utf-8")
    clients = joined(members)
    state = feddrift_algorithm().round(1, feddrift_algorithm().start(start()), COHORT, clients)
    assert clients.tally().refused == {}
    assert state.modules[0].records == 8


def test_feddrift_answers_under_the_module_with_the_nearest_mean():
    modules = [
        feddrift.Module(number=i, weights=result(site), sums=torch.tensor(TABLE[text]), records=1)
        for i, (site, text) in enumerate((("A", "t"), ("B", "u")))
    ]
    empty = feddrift.Module(number=2, weights=result("C"), sums=torch.tensor(TABLE["v"]))
    state = feddrift.State(weights=start(), modules=(empty, *modules), heirs=(0, 1, 2))
    assert feddrift.nearest(state.modules, Table().features(["u", "v"])).tolist() == [2, 1]
    scores = feddrift_algorithm().answer(state, Table(), ["u"])
    e = Table().embeddings({}, ["u"])[0]
    expected = fit.SHARPNESS * result("B")["head.weight"] @ e + result("B")["head.bias"]
    torch.testing.assert_close(scores[0], expected)


# --- oracle routing -------------------------------------------------------------------------------


def test_oracle_routing_averages_each_scope_and_answers_under_the_true_one(tmp_path: Path):
    members = sites(tmp_path, B=[("u", "c")] * 2, C=[("t", "a")] * 3 + [("u", "c")] * 2)
    clients = Watched(joined(members))
    algorithm = Oracle(**TRAIN, scopes=CATALOGUE.scopes())
    state = algorithm.round(1, algorithm.start(start()), COHORT, clients)
    assert {question for question, _, _ in clients.asked} == {"sum"}
    assert list(state.modules) == ["s", "t"]
    a, b, c = (result(site)["head.weight"] for site in COHORT)
    torch.testing.assert_close(state.modules["s"]["head.weight"], (a + 3 * c) / 4)
    torch.testing.assert_close(state.modules["t"]["head.weight"], (b + c) / 2)
    scopes = ["t", "s"]
    scores = algorithm.routed(state, Table(), ["t", "t"], scopes)
    e = Table().embeddings({}, ["t"])[0]
    for row, scope in enumerate(scopes):
        weights = state.modules[scope]
        expected = fit.SHARPNESS * weights["head.weight"] @ e + weights["head.bias"]
        torch.testing.assert_close(scores[row], expected)
    assert algorithm.routed(state, Table(), ["t"], ["nowhere"]).tolist() == [[float("-inf")] * 3]
    later = algorithm.round(2, state, COHORT, clients)
    assert later.modules == state.modules


# --- all of them ----------------------------------------------------------------------------------


def several() -> dict[str, object]:
    return {
        "afcl": afcl_algorithm(),
        "o_lora": o_lora_algorithm(exchanges=2),
        "slao": SLAO(**TRAIN, exchanges=2),
        "fot": fot_algorithm(exchanges=2),
        "lorm": LoRM(**TRAIN, scale=0.5, exchanges=2),
        "hpfl": hpfl_algorithm(noise=0.1),
        "disco": disco_algorithm(exchanges=2),
        "feddrift": feddrift_algorithm(exchanges=2),
        "oracle": Oracle(**TRAIN, exchanges=2, scopes=CATALOGUE.scopes()),
    }


def bits(state: object) -> tuple[object, dict[str, list[float]]]:
    document, tensors = wire.dump(state)
    return document, {name: value.tolist() for name, value in tensors.items()}


@pytest.mark.parametrize("method", list(several()))
def test_a_round_that_is_asked_again_and_a_state_that_was_saved_give_the_same_bits(
    tmp_path: Path, method: str
):
    algorithm, members = several()[method], sites(tmp_path)
    for member in members:
        member.trained, member.judged = learnt, concept
    clients = joined(members)
    before = algorithm.round(1, algorithm.start(start()), COHORT, clients)
    arrives(members[1], [("u", "b"), ("v", "c")], window=2)
    arrives(members[2], [("u", "b")], window=2)
    after = algorithm.round(2, before, COHORT, clients)
    assert clients.tally().refused == {}
    assert bits(after) != bits(before)
    saved = wire.load(type(before), *wire.dump(before))
    assert bits(algorithm.round(2, saved, COHORT, clients)) == bits(after)


@pytest.mark.parametrize("method", list(several()))
def test_a_round_without_new_records_changes_nothing(tmp_path: Path, method: str):
    algorithm, members = several()[method], sites(tmp_path)
    for member in members:
        member.trained, member.judged = learnt, concept
    clients = joined(members)
    state = algorithm.round(1, algorithm.start(start()), COHORT, clients)
    assert bits(algorithm.round(2, state, COHORT, clients)) == bits(state)
