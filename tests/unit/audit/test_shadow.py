"""Shadow exchanges: the training of a site, step by step, on text of the attacker's own."""

import pytest
import torch
from small_gpt import sentences, small_gpt

from fedkola.audit import shadow
from fedkola.audit.evidence import Sighting
from fedkola.audit.shadow import Recipe
from fedkola.errors import DataError
from fedkola.privacy.accounting import Limit, noise_for
from fedkola.privacy.clip import norm
from fedkola.privacy.guards import spec
from fedkola.privacy.record_dp import RecordDP
from fedkola.training import whole
from fedkola.training.model import Foundation, encode
from fedkola.training.whole import Local


@pytest.fixture(scope="module")
def gpt(tmp_path_factory: pytest.TempPathFactory) -> Foundation:
    return small_gpt(tmp_path_factory.mktemp("gpt") / "model", width=16, vocabulary=300)


def test_a_shadow_is_the_training_of_its_batches(gpt: Foundation) -> None:
    before, records = whole.parameters(gpt), encode(gpt, sentences(8, seed=3))
    how = Recipe(steps=2, batch=4, local=Local(lr=1e-3))
    made = shadow.shadow(gpt, before, how, [records], seed=1)
    assert sorted(made.used) == sorted(tuple(ids) for ids in records)
    after, _, _ = whole.train(gpt, before, [made.used[:4], made.used[4:]], how.local)
    for name, value in made.change.items():
        assert torch.allclose(value, after[name] - before[name], atol=1e-7)


def test_a_shadow_of_two_sites_is_the_mean_of_both(gpt: Foundation) -> None:
    before, records = whole.parameters(gpt), encode(gpt, sentences(8, seed=3))
    how = Recipe(steps=1, batch=4, local=Local(optimiser="sgd", lr=0.1, clip=0.0))
    both = shadow.shadow(gpt, before, how, [records[:4], records[4:]], seed=1)
    halves = [whole.gradient(gpt, before, part) for part in (records[:4], records[4:])]
    name = "transformer.h.0.mlp.c_fc.weight"
    decayed = before[name] * 0.1  # weight decay
    step = -0.1 * ((halves[0][name] + halves[1][name]) / 2 + decayed)
    assert torch.allclose(both.change[name], step, atol=1e-7)


def test_frozen_tensors_stay_and_the_others_train_as_if_alone(gpt: Foundation) -> None:
    before, records = whole.parameters(gpt), encode(gpt, sentences(8, seed=3))
    table = "transformer.wte.weight"
    how = Recipe(steps=3, batch=2, local=Local(lr=1e-2), frozen=frozenset({table}))
    made = shadow.shadow(gpt, before, how, [records], seed=1)
    assert not bool(made.change[table].any())
    assert all(bool(value.any()) for name, value in made.change.items() if name != table)


def test_a_private_gradient_without_noise_is_the_sum_of_cut_gradients(gpt: Foundation) -> None:
    before, records = whole.parameters(gpt), encode(gpt, sentences(3, seed=3))
    how = Recipe(steps=1, batch=5, local=Local(), sigma=1e-12, bound=0.5)
    found = shadow.noisy(gpt, how, before, records, torch.Generator().manual_seed(0))
    singles = [whole.gradient(gpt, before, [ids]) for ids in records]
    assert all(norm(single) > 0.5 for single in singles)
    for name, value in found.items():
        cut = sum(0.5 / norm(single) * single[name] for single in singles)
        assert torch.allclose(value, cut / 5, atol=1e-6)


def test_noise_has_the_deviation_of_the_protocol(gpt: Foundation) -> None:
    before = whole.parameters(gpt)
    how = Recipe(steps=1, batch=4, local=Local(), sigma=2.0, bound=0.5)
    found = shadow.noisy(gpt, how, before, [], torch.Generator().manual_seed(0))
    values = torch.cat([value.flatten() for value in found.values()])
    assert values.std().item() == pytest.approx(2.0 * 0.5 / 4, rel=0.03)


def test_poisson_samples_hold_the_batch_on_average(gpt: Foundation) -> None:
    records = encode(gpt, sentences(40, seed=3))
    local = Local(optimiser="sgd", lr=0.0)
    how = Recipe(steps=20, batch=4, local=local, sigma=1.0, units=20)
    made = shadow.shadow(gpt, whole.parameters(gpt), how, [records], seed=1)
    assert 50 < len(made.used) < 110
    assert len(set(made.used)) <= 20


def test_noise_follows_from_the_guard_as_a_site_finds_it(gpt: Foundation) -> None:
    before = whole.parameters(gpt)
    asked = RecordDP(unit="record", epsilon=3.0, delta=1e-4, clip=0.5, batch=50, steps=60)
    guard = {key: value for key, value in spec(asked).items() if key != "name"}
    protocol = {"name": "DiLoCo", "inner_steps": 20, "lr": 0.01, "rounds": 3, **guard}
    seen = Sighting(round=1, who="a", sites=1, before=before, change=before, protocol=protocol)
    limit = Limit(unit="record", epsilon=3.0, delta=1e-4)
    found = shadow.recipe(seen, held=500)
    assert found.sigma == noise_for(limit, rate=0.1, count=60) == asked.noise(500)
    assert (found.bound, found.units) == (0.5, 500)
    with pytest.raises(DataError, match=r"privacy\.units"):
        shadow.recipe(seen)


def test_a_recipe_reads_the_protocol_and_the_round(gpt: Foundation) -> None:
    before = whole.parameters(gpt)
    table = "transformer.wte.weight"
    protocol = {"name": "diloco", "inner_steps": 8, "batch": 4, "lr": 0.01, "weight_decay": 0.0}
    change = {name: torch.ones_like(value) for name, value in before.items()}
    change[table] = torch.zeros_like(before[table])
    seen = Sighting(
        round=3, who="sum", sites=2, before=before, change=change,
        protocol={**protocol, "sigma": 0.8, "clip": 0.5, "units": 90},
    )  # fmt: skip
    found = shadow.recipe(seen)
    assert found.local == Local(lr=0.01, weight_decay=0.0, start=16)
    assert (found.steps, found.batch, found.units) == (8, 4, 90)
    assert (found.sigma, found.bound, found.warm) == (0.8, 0.5, True)
    assert found.frozen == {table}
    assert found.open() == Recipe(
        steps=8, batch=4, local=found.local, bound=0.5, units=90, warm=True
    )
