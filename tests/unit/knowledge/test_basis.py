"""Slots of the pinned basis: public, orthogonal, and safe to average over."""

import pytest
import torch

from fedkola.errors import BasisMismatch
from fedkola.knowledge import basis

TARGETS = {"query": (6, 16), "value": (16, 12)}


def test_a_slot_has_orthonormal_rows_of_the_layers_input_width():
    slot = basis.slot(TARGETS, index=1, rank=4, seed=0)
    assert {name: tuple(a.shape) for name, a in slot.items()} == {
        "query.lora_A": (4, 16),
        "value.lora_A": (4, 12),
    }
    for a in slot.values():
        assert torch.allclose(a @ a.T, torch.eye(4), atol=1e-6)


def test_products_in_two_slots_are_orthogonal_whatever_was_trained():
    generator = torch.Generator().manual_seed(1)
    for layer, (d_out, _) in TARGETS.items():
        products = [
            torch.randn(d_out, 4, generator=generator)
            @ basis.slot(TARGETS, index=index, rank=4, seed=0)[f"{layer}.lora_A"]
            for index in range(3)
        ]
        for i in range(3):
            for j in range(i):
                assert abs(float((products[i] * products[j]).sum())) < 1e-4
            assert float(products[i].square().sum()) > 1


def test_averaging_trained_factors_averages_the_products_exactly():
    # Small integers over a power of two: every product and sum below is exact in float32.
    a = torch.round(basis.slot(TARGETS, index=0, rank=4, seed=0)["query.lora_A"] * 64) / 64
    generator = torch.Generator().manual_seed(2)
    factors = [torch.randint(-8, 9, (6, 4), generator=generator).float() for _ in range(3)]
    shares = (0.5, 0.25, 0.25)
    averaged = sum(p * b for p, b in zip(shares, factors, strict=True)) @ a
    products = sum(p * (b @ a) for p, b in zip(shares, factors, strict=True))
    assert torch.equal(averaged, products)


def test_the_basis_is_a_function_of_its_public_seed():
    first = basis.digest(TARGETS, seed=0)
    basis.orthogonal.cache_clear()
    assert basis.digest(dict(reversed(TARGETS.items())), seed=0) == first
    assert basis.digest(TARGETS, seed=1) != first
    assert not torch.equal(basis.orthogonal(12, "value", 0), basis.orthogonal(12, "query", 0))


def test_a_slot_beyond_the_narrowest_layer_is_refused():
    assert basis.capacity(TARGETS, rank=4) == 3
    basis.slot(TARGETS, index=2, rank=4, seed=0)
    with pytest.raises(BasisMismatch, match=r"needs 16 rows, value has 12"):
        basis.slot(TARGETS, index=3, rank=4, seed=0)
