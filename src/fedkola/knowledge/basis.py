"""The pinned basis: for every adapted layer an orthogonal matrix whose rows are cut into slots.

Slot j of rank r is the rows jr .. (j+1)r - 1 of a Haar-distributed orthogonal Q made from a public
seed. A slot never trains, so for i != j the products B_i A_i and B_j A_j are orthogonal whatever
the B are, and averaging factors B over sites averages the products B A exactly.
"""

import hashlib
from collections.abc import Mapping
from functools import lru_cache

import torch
from torch import Tensor

from fedkola.errors import BasisMismatch

A, B = ".lora_A", ".lora_B"
"""How the names of the two factors of a layer end."""


def slot(
    targets: Mapping[str, tuple[int, int]], *, index: int, rank: int, seed: int
) -> dict[str, Tensor]:
    """``{layer}.lora_A`` of shape (rank, d_in) with orthonormal rows for every target layer.

    Raises BasisMismatch if a layer is too narrow to hold that slot.
    """
    chosen = {}
    for layer, (_, width) in targets.items():
        if (index + 1) * rank > width:
            raise BasisMismatch(
                f"slot {index} of rank {rank} needs {(index + 1) * rank} rows, {layer} has "
                f"{width}; lower knowledge.slots_max or algorithm.rank"
            )
        rows = orthogonal(width, layer, seed)[index * rank : (index + 1) * rank]
        chosen[layer + A] = rows.clone()
    return chosen


def capacity(targets: Mapping[str, tuple[int, int]], *, rank: int) -> int:
    """How many slots every target layer can hold."""
    return min(width // rank for _, width in targets.values())


def digest(targets: Mapping[str, tuple[int, int]], *, seed: int) -> str:
    """A hash of the basis; sites compare it, as LAPACK may round differently elsewhere."""
    whole = hashlib.sha256()
    for layer, (_, width) in sorted(targets.items()):
        whole.update(layer.encode())
        whole.update(orthogonal(width, layer, seed).numpy().tobytes())
    return whole.hexdigest()


@lru_cache(maxsize=256)
def orthogonal(width: int, layer: str, seed: int) -> Tensor:
    """Q of shape (width, width), float32: QR of a seeded Gaussian with the signs of R fixed."""
    name = hashlib.sha256(f"fedkola/basis/1/{seed}/{layer}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(name[:8], "little") >> 1)
    gaussian = torch.randn(width, width, generator=generator, dtype=torch.float64)
    q, r = torch.linalg.qr(gaussian)
    # Fixing the signs makes Q Haar-distributed and independent of LAPACK's choice of sign.
    haar: Tensor = (q * torch.sign(r.diagonal())).T
    return haar.to(torch.float32).contiguous()
