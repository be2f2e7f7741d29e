"""Training many sites at once gives each what it would have trained alone."""

import pytest
import small_federation as small
import torch

from fedkola.errors import ModelMismatch
from fedkola.training import fit, many
from fedkola.training.adapters import fresh

DATA = [small.records(f"s{i}", num=16) for i in range(3)]
TEXTS = [text for data in DATA for text in data.texts]
LABELS = [[small.CODES.index(code) for code in data.labels] for data in DATA]
ROWS = [list(range(16 * i, 16 * i + 16)) for i in range(3)]


def start(upper: many.Upper) -> dict[str, torch.Tensor]:
    weights = fresh(upper.targets(), rank=2, seed=1)
    generator = torch.Generator().manual_seed(2)
    for name in weights:
        weights[name] = torch.randn(weights[name].shape, generator=generator) / 4
    head = torch.zeros(len(small.CODES), 16)
    return {**weights, "head.weight": head, "head.bias": torch.zeros(len(head))}


@pytest.mark.parametrize("layers", [1, 2])
def test_every_site_gets_what_it_would_have_trained_alone(layers: int):
    base = small.foundation()
    upper = many.upper(base, TEXTS, layers=layers)
    weights = start(upper)
    told = {"steps": 5, "batch": 4, "lr": 0.01, "scale": 2.0}
    together = many.fit(upper, weights, ROWS, LABELS, seeds=(5, 6, 7), **told)
    for i, data in enumerate(DATA):
        alone = fit.fit(base, weights, data.texts, LABELS[i], seed=5 + i, **told)
        assert set(alone) == set(together)
        for name, value in alone.items():
            assert torch.allclose(together[name][i], value, atol=2e-4)
            assert float((value - weights[name]).abs().max()) > 0.01


def test_scores_are_those_of_one_adapter():
    upper = many.upper(small.foundation(), TEXTS, layers=2)
    weights = start(upper)
    weights["head.weight"] = torch.eye(16)[: len(small.CODES)]
    found = many.predict(upper, weights, [7, 0, 20], scale=2.0)
    alone = [many.predict(upper, weights, [i], scale=2.0)[0] for i in (7, 0, 20)]
    assert torch.allclose(found, torch.stack(alone), atol=1e-4)
    assert float(found.std()) > 0.1


def test_what_it_cannot_do_is_refused():
    base = small.foundation()
    with pytest.raises(ModelMismatch, match="no 3 layers"):
        many.upper(base, TEXTS, layers=3)
    upper = many.upper(base, TEXTS, layers=1)
    with pytest.raises(ModelMismatch, match="not full"):
        many.fit(
            upper, start(upper), ROWS, LABELS, steps=4, batch=5, lr=0.1, seeds=(1, 2, 3), scale=1.0
        )
