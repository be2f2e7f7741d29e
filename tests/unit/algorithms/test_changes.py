"""Changes of 8 and 4 bits: what is sent is what is held, and what is cut off comes later."""

import pytest
import torch
from torch import Tensor

from fedkola.algorithms import changes

SHAPES = {"even": (4, 6), "odd": (3, 5), "one": (1,), "none": (0,)}


def drawn(scale: float) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(3)
    return {name: scale * torch.randn(shape, generator=generator) for name, shape in SHAPES.items()}


@pytest.mark.parametrize("down", sorted(changes.BITS))
@pytest.mark.parametrize("scale", [1e-7, 1e-3, 3.0])
def test_sites_hold_what_the_server_says_they_hold(down: str, scale: float) -> None:
    weights = drawn(scale)
    held = {name: torch.zeros_like(value) for name, value in weights.items()}
    tensors, after = changes.sent(weights, held, list(weights), down)
    found = changes.received(tensors, held, down)
    assert set(found) == set(weights)
    assert all(torch.equal(found[name], after[name]) for name in weights)
    assert all(tensors[changes.CHANGE + name].dtype == torch.int8 for name in weights)
    limit = 2 ** (changes.BITS[down] - 1) - 1
    for name, value in weights.items():
        if value.numel():
            assert float((after[name] - value).abs().max()) <= 1.01 * scale * 3 / limit


def test_four_bits_take_half_a_byte_and_keep_every_pair_apart() -> None:
    every = torch.cartesian_prod(torch.arange(-7.0, 8), torch.arange(-7.0, 8)).flatten()[:-1]
    held = {"w": torch.zeros_like(every)}
    tensors, after = changes.sent({"w": every}, held, ["w"], "change4")
    assert tensors[changes.CHANGE + "w"].numel() == -(-every.numel() // 2)
    assert torch.equal(after["w"], every)
    assert torch.equal(changes.received(tensors, held, "change4")["w"], every)


def test_a_rare_large_coordinate_is_cut_off_and_follows_in_later_rounds() -> None:
    weights = {"w": torch.cat([torch.full((999,), 0.01), torch.tensor([1.0])])}
    held = {"w": torch.zeros(1000)}
    _, held = changes.sent(weights, held, ["w"], "change4")
    assert float(held["w"][-1]) < 0.02
    assert torch.allclose(held["w"][:-1], weights["w"][:-1], atol=0.002)
    for _ in range(6):
        _, held = changes.sent(weights, held, ["w"], "change4")
    assert torch.allclose(held["w"], weights["w"], atol=0.01)
