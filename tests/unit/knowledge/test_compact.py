"""Compaction: sums are exact, fused modules have the error that was predicted."""

import pytest
import torch

from fedkola.errors import BasisMismatch
from fedkola.knowledge import basis, compact

TARGETS = {"q": (20, 48), "v": (12, 48)}


def adapter(slot: int, *, seed: int, rank: int = 4, like: float = 0.0) -> dict[str, torch.Tensor]:
    """A module of a pinned slot; ``like`` 1 gives every seed the same left factor."""
    own, shared = torch.Generator().manual_seed(seed), torch.Generator().manual_seed(0)
    weights = dict(basis.slot(TARGETS, index=slot, rank=rank, seed=0))
    for layer, (height, _) in TARGETS.items():
        common = torch.randn(height, rank, generator=shared)
        weights[f"{layer}.lora_B"] = like * common + (1 - like) * torch.randn(
            height, rank, generator=own
        )
    return weights


@pytest.mark.parametrize("rank", [1, 4, 7])
@pytest.mark.parametrize("slots", [(0, 1), (0, 3, 5), (2, 2)])
def test_the_error_of_fusing_is_known_before_it_is_made(rank: int, slots: tuple[int, ...]):
    modules = [adapter(slot, seed=i + 1) for i, slot in enumerate(slots)]
    shares = [0.5, 0.3, 0.2][: len(modules)]
    before = compact.predicted(modules, shares, rank=rank)
    fused = compact.fuse(modules, shares, rank=rank)
    assert fused.error == before > 0
    assert abs(compact.measured(modules, shares, fused.adapter) - before) < 1e-4
    for layer in TARGETS:
        rows = fused.adapter[f"{layer}.lora_A"]
        assert torch.allclose(rows @ rows.T, torch.eye(rank), atol=1e-5)


def test_what_two_modules_share_costs_nothing_and_what_they_do_not_share_does():
    # The same B on two slots is B [A_1 + A_2] / 2: of rank 4, though A_1 and A_2 differ.
    same = [adapter(0, seed=1, like=1.0), adapter(1, seed=2, like=1.0)]
    assert compact.predicted(same, [0.5, 0.5], rank=4) < 1e-6
    near = [adapter(0, seed=1, like=0.9), adapter(1, seed=2, like=0.9)]
    far = [adapter(0, seed=1), adapter(1, seed=2)]
    errors = [compact.predicted(pair, [0.5, 0.5], rank=4) for pair in (near, far)]
    assert 0 < errors[0] < 0.2 < 0.4 < errors[1]


def test_full_rank_loses_nothing_and_a_zero_module_is_fused_to_zeros():
    modules = [adapter(0, seed=1), adapter(1, seed=2)]
    fused = compact.fuse(modules, [0.5, 0.5], rank=8)
    assert compact.measured(modules, [0.5, 0.5], fused.adapter) < 1e-6
    zeros = [{n: v * 0 if n.endswith("_B") else v for n, v in m.items()} for m in modules]
    nothing = compact.fuse(zeros, [0.5, 0.5], rank=4)
    assert nothing.error == 0.0
    assert not nothing.adapter["q.lora_B"].any()


def test_modules_of_different_base_models_are_not_fused():
    other = {"q.lora_A": torch.ones(4, 32), "q.lora_B": torch.ones(20, 4)}
    with pytest.raises(BasisMismatch, match="different layers"):
        compact.fuse([adapter(0, seed=1), other], [0.5, 0.5], rank=4)
    wide = {**adapter(1, seed=2), "v.lora_A": torch.ones(4, 32)}
    with pytest.raises(BasisMismatch, match=r"v is \[12\] x \[32, 48\]"):
        compact.fuse([adapter(0, seed=1), wide], [0.5, 0.5], rank=4)
