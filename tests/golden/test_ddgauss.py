"""The distributed discrete Gaussian: its steps by hand, its noise in a whole run, its refusals."""

from pathlib import Path
from typing import Any

import pytest
import small_private as small
import torch
from small_clients import TableClient, dataset, joined

from fedkola import server
from fedkola.algorithms.ddgauss import BETAS, TINY, DDGauss, State
from fedkola.errors import Incompatible
from fedkola.ledger import Ledger
from fedkola.privacy import accounting
from fedkola.privacy.clip import clip
from fedkola.training import whole
from fedkola.types import Catalogue, Label

CATALOGUE = Catalogue(
    system="golden", levels=("code",), labels=(Label(code="a", path=("a",), scope="s"),)
)
START = {"w": torch.tensor([[1.0, -1.0], [0.5, 0.25]]), "b": torch.tensor([2.0, 4.0])}
STEP = {"A": 0.25, "B": 0.5, "C": 4.0}
PLAN = DDGauss(
    pooled=False,
    rounds=4,
    inner_steps=2,
    batch=2,
    length=16,
    lr=0.25,
    warmup=2,
    floor=0.1,
    weight_decay=0.1,
    bound=2.0,
    precision="float32",
    seed=1,
)
MASKED = ("algorithm.name=ddgauss", "privacy.secure_sum=true", "site.plain=false")
POOLED = (*MASKED, 'privacy.level="pooled"', "pretrain.inner_steps=1")
WHOLE_SITE = (*MASKED, 'privacy.level="site"', "privacy.epsilon=8")


def finished(folder: Path, *settings: str) -> tuple[Any, State]:
    federation = small.federation(folder, *settings)
    with Ledger.open(folder, create=True) as ledger:
        state = server.run(federation, ledger, observe=lambda *_: {}, progress=lambda report: None)
    return federation, state


def test_without_noise_the_model_moves_by_the_mean_of_changes_cut_to_the_bound(tmp_path: Path):
    def moved(client: TableClient, weights: Any) -> Any:
        return {name: value - STEP[client.name] for name, value in weights.items()}

    sites = [
        TableClient(
            name=name,
            data=dataset(name, [("t", "a")]),
            catalogue=CATALOGUE,
            store=tmp_path / name,
            trained=moved,
        )
        for name in STEP
    ]
    state = PLAN.round(1, State(weights=START), tuple(STEP), joined(sites))
    # Six coordinates: the norm of C's change is 4 sqrt(6), cut to 2.
    mean = (0.25 + 0.5 + 2 / 6**0.5) / 3
    for name, value in START.items():
        assert torch.allclose(state.weights[name], value - mean, atol=2.0**-17)
    assert [site.courses[0].start for site in sites] == [0, 0, 0]
    PLAN.round(2, state, tuple(STEP), joined(sites))
    assert [site.courses[1].start for site in sites] == [2, 2, 2]


def test_the_server_steps_as_adamw_does():
    twin = {name: value.clone().requires_grad_() for name, value in START.items()}
    ways = [
        {"params": [twin["w"]], "weight_decay": PLAN.weight_decay},
        {"params": [twin["b"]], "weight_decay": 0.0},
    ]
    adamw = torch.optim.AdamW(ways, lr=1.0, betas=BETAS, eps=TINY)
    state, generator = State(weights=START), torch.Generator().manual_seed(3)
    for number in (1, 2, 3, 4):
        gradient = {n: torch.randn(v.shape, generator=generator) for n, v in START.items()}
        state = PLAN.stepped(number, state, gradient)
        for group in adamw.param_groups:
            group["lr"] = whole.Local(
                lr=PLAN.lr, warmup=PLAN.warmup, total=PLAN.rounds, floor=PLAN.floor
            ).rate(number - 1)
        for name, value in twin.items():
            value.grad = gradient[name]
        adamw.step()
    for name, value in twin.items():
        assert torch.allclose(state.weights[name], value.detach(), rtol=1e-5)


@pytest.mark.parametrize("bound", [0.1, 1.0, 3.0, 40.0])
def test_the_grid_holds_the_bound_with_a_million_steps(bound: float):
    method = DDGauss(**{**vars(PLAN), "bound": bound})
    assert 2**19 < bound * 2.0 ** method.fraction() <= 2**20


def test_a_masked_run_carries_the_noise_that_its_epsilon_needs(tmp_path: Path):
    still = ("pretrain.lr=1e-9", "run.rounds=1")
    federation, state = finished(tmp_path, *WHOLE_SITE, *still)
    guard = server.guard(federation.plan)
    assert guard is not None
    before = whole.parameters(federation.foundation)
    drift = torch.cat([(state.weights[n] - before[n]).double().flatten() for n in sorted(before)])
    # Sites hardly move, so what moved is noise: sigma C over three sites, measured on many
    # coordinates to within six standard deviations of its estimate.
    expected = guard.noise * guard.clip / len(small.SITES)
    error = 6 / (2 * drift.numel()) ** 0.5
    assert error < 0.1
    assert abs(float(drift.std()) / expected - 1) < error
    assert abs(float(drift.mean())) < 6 * expected / drift.numel() ** 0.5
    # Null control: without a guarantee the same run hardly moves.
    free = finished(
        tmp_path / "free",
        *MASKED,
        "privacy.epsilon=inf",
        "pretrain.lr=1e-9",
        "run.rounds=1",
        'site.embedding="presence-disclosed"',
        'site.waive=["gate_span"]',
    )[1]
    moved = max(float((free.weights[n] - before[n]).abs().max()) for n in before)
    assert moved < 1e-3 * expected


def test_pooled_noise_is_charged_at_every_site_and_the_ledger_holds_a_copy(tmp_path: Path):
    federation, state = finished(tmp_path, *POOLED)
    plan = federation.plan
    held = [
        accounting.spent(site.store, unit="patient", delta=plan.privacy.delta)
        for site in federation.sites.values()
    ]
    assert len(set(held)) == 1
    assert 0.9 * plan.privacy.epsilon < held[0] <= plan.privacy.epsilon
    with Ledger.open(tmp_path) as ledger:
        assert ledger.rounds(plan.run.name)[-1].report["spent"]["epsilon"] == held[0]
    before = whole.parameters(federation.foundation)
    assert all(not torch.equal(state.weights[n], before[n]) for n in before)


def test_a_pooled_sum_is_made_of_gradients_cut_for_each_unit(tmp_path: Path):
    """Positive control of the bound: one unit's gradient alone is longer than it."""
    federation = small.federation(tmp_path, *POOLED)
    site, clip_at = federation.sites["north"], federation.plan.privacy.clip
    weights = whole.parameters(federation.foundation)
    text = federation.foundation.tokenizer(site.knowledge.until(1).texts[0])["input_ids"][:16]
    alone = whole.gradient(federation.foundation, weights, [text])
    norm = sum(float(v.square().sum()) for v in alone.values()) ** 0.5
    assert norm > clip_at
    cut = clip(alone, clip_at)
    assert sum(float(v.square().sum()) for v in cut.values()) ** 0.5 <= clip_at * (1 + 1e-5)


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        (("privacy.secure_sum=false", "site.plain=true"), r"privacy\.secure_sum"),
        (("pretrain.inner_steps=2",), r"pretrain\.inner_steps = 2; set it to 1"),
        (("privacy.units=0",), r"privacy\.units"),
        (('privacy.level="record"',), r"algorithm\.name to diloco"),
    ],
)
def test_a_plan_that_could_not_keep_its_promise_is_refused_before_the_first_round(
    tmp_path: Path, settings: tuple[str, ...], says: str
):
    with pytest.raises(Incompatible, match=says):
        small.federation(tmp_path, *POOLED, *settings)
