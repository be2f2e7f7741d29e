"""Addends of analytic, scatter and router cells, in exact integers (no gradient, one forward pass).

From the integer embedding z = round(2^10 e) of a record (int16, d numbers) and a public sign
matrix R of shape (d, p)::

    u   = R^T z
    phi = min( floor(max(u, 0) / 2^(12 - bits)), 2^bits - 1 )
    G   = sum_i phi_i phi_i^T        s_c = sum_{y_i = c} phi_i        n_c = sum_{y_i = c} 1

|u| is below 2^24, so float32 products are exact, and a Gram block of m records is exact in
float32 while m (2^bits - 1)^2 < 2^24. G, s and n therefore do not depend on batch size, order or
thread count, and subtraction undoes addition bit for bit. An analytic cell holds (s, n), a scatter
cell G alone: read-outs need G for the scatter within classes, which all labels share, so one pooled
sum serves many cells. Recursive and analytic federated
learning over frozen features: He et al., AFL (CVPR 2025); Zhuang et al., ACIL (NeurIPS 2022).
"""

import hashlib
from functools import lru_cache

import torch
from torch import Tensor

from fedkola.errors import ModelMismatch

GRAM = "gram"
SUMS = "sums"
COUNTS = "counts"
EMBEDDING = 1025
"""The largest number of an integer embedding: 2^10 times a unit vector, rounded."""
_EXACT_FLOAT32 = 1 << 24


def by_label(
    z: Tensor, rows: Tensor, *, num_rows: int, features: int, bits: int, seed: int
) -> dict[str, Tensor]:
    """The addend of one site to one analytic cell.

    ``z`` is int16 of shape (n, d), ``rows`` int64 of shape (n,) with the label row of each record.
    Returns int64 tensors: ``sums`` (num_rows, p), ``counts`` (num_rows,).
    """
    sums = torch.zeros(num_rows, features, dtype=torch.int64)
    counts = torch.bincount(rows, minlength=num_rows).to(torch.int64)
    block = _block(bits)
    for part, labels in zip(torch.split(z, block), torch.split(rows, block), strict=True):
        phi = expand(part, features=features, bits=bits, seed=seed)
        sums += _row_sums(phi, labels, num_rows).to(torch.int64)
    return {SUMS: sums, COUNTS: counts}


def scatter(z: Tensor, *, features: int, bits: int, seed: int) -> dict[str, Tensor]:
    """The addend of one site to one scatter cell, whatever the labels of its records.

    ``z`` is int16 of shape (n, d). Returns int64 ``gram``, the packed upper triangle p(p+1)/2.
    """
    if not len(z):
        return {GRAM: torch.zeros(features * (features + 1) // 2, dtype=torch.int64)}
    gram = torch.zeros(features, features, dtype=torch.int64)
    for part in torch.split(z, _block(bits)):
        phi = expand(part, features=features, bits=bits, seed=seed)
        gram += (phi.T @ phi).to(torch.int64)
    return {GRAM: pack(gram)}


def analytic(
    z: Tensor, rows: Tensor, *, num_rows: int, features: int, bits: int, seed: int
) -> dict[str, Tensor]:
    """``by_label`` and ``scatter`` of the same records, where nobody sums them apart."""
    recipe = {"features": features, "bits": bits, "seed": seed}
    return {**scatter(z, **recipe), **by_label(z, rows, num_rows=num_rows, **recipe)}


def records_floor(features: int, width: int) -> int:
    """Records below which a Gram of ``features`` columns comes too close to showing them.

    n records have n d unknowns and G has p(p+1)/2 equations: max(4p, p^2 / 2d), a heuristic.
    """
    return max(4 * features, features**2 // (2 * width))


def word(largest: int, *, records: int) -> int:
    """The narrowest word that holds a sum over so many records of numbers up to ``largest``."""
    most = largest * max(records, 1)
    return next(width for width in (16, 24, 32, 40, 64) if most < 2 ** (width - 1))


def router(z: Tensor, rows: Tensor, *, num_rows: int) -> dict[str, Tensor]:
    """The addend of one site to one router cell: moments of the integer embeddings.

    Returns int64 tensors: ``gram`` packed upper triangle d(d+1)/2 of sum z z^T, ``sums``
    (num_rows, d) of sum z by label, ``counts`` (num_rows,). The module's own sum is the sum of
    its rows.
    """
    width = z.shape[1]
    counts = torch.bincount(rows, minlength=num_rows).to(torch.int64)
    moment = torch.zeros(width, width, dtype=torch.int64)
    sums = torch.zeros(num_rows, width, dtype=torch.int64)
    # float64 products of 16-bit integers are exact far beyond any block of 2^20 records.
    for part, labels in zip(torch.split(z, 1 << 16), torch.split(rows, 1 << 16), strict=True):
        wide = part.to(torch.float64)
        moment += (wide.T @ wide).to(torch.int64)
        sums += _row_sums(wide, labels, num_rows).to(torch.int64)
    return {GRAM: pack(moment), SUMS: sums, COUNTS: counts}


def expand(z: Tensor, *, features: int, bits: int, seed: int) -> Tensor:
    """phi of shape (n, features): small non-negative integers held in float32."""
    projected = z.to(torch.float32) @ signs(z.shape[1], features, seed)
    return projected.clamp_(min=0).mul_(2.0 ** (bits - 12)).floor_().clamp_(max=2**bits - 1)


@lru_cache(maxsize=4)
def signs(width: int, features: int, seed: int) -> Tensor:
    """The public matrix R in {-1, +1}^(width x features), the same on every platform."""
    name = f"fedkola/signs/1/{width}/{features}/{seed}".encode()
    bits = hashlib.shake_256(name).digest(width * features // 8 + 1)
    flat = torch.frombuffer(bytearray(bits), dtype=torch.uint8)
    each = (flat[:, None] >> torch.arange(8, dtype=torch.uint8)) & 1
    return each.reshape(-1)[: width * features].reshape(width, features).to(torch.float32) * 2 - 1


def pack(square: Tensor) -> Tensor:
    """The upper triangle of a symmetric (p, p) tensor as p(p+1)/2 numbers, row by row."""
    return square[_triangle(square.shape[0])]


def unpack(packed: Tensor, size: int) -> Tensor:
    """The symmetric (size, size) tensor whose upper triangle was packed."""
    square = torch.zeros(size, size, dtype=packed.dtype)
    square[_triangle(size)] = packed
    return square + square.T - torch.diag(square.diagonal())


def check_exact(*, width: int, features: int, bits: int, seed: int) -> None:
    """Compare one block with an int64 reference; raises ModelMismatch if products are not exact.

    TF32 and bfloat16 matrix modes break exactness, and with it removal by subtraction.
    """
    generator = torch.Generator().manual_seed(seed)
    z = torch.randint(-300, 301, (64, width), generator=generator, dtype=torch.int16)
    rows = torch.zeros(64, dtype=torch.int64)
    got = analytic(z, rows, num_rows=1, features=features, bits=bits, seed=seed)
    u = z.to(torch.int64) @ signs(width, features, seed).to(torch.int64)
    phi = (u.clamp(min=0) >> (12 - bits)).clamp(max=2**bits - 1)
    if not torch.equal(got[GRAM], pack(phi.T @ phi)) or not torch.equal(got[SUMS][0], phi.sum(0)):
        raise ModelMismatch(
            "float32 matrix products on this machine are not exact for small integers; switch "
            "off TF32 and reduced-precision matmul modes before contributing statistics"
        )


def _block(bits: int) -> int:
    """Records whose Gram is exact in float32."""
    largest: int = (2**bits - 1) ** 2
    return max(1, min(8192, (_EXACT_FLOAT32 - 1) // largest))


def _row_sums(values: Tensor, rows: Tensor, num_rows: int) -> Tensor:
    # Sums of a block stay below 2^24 in float32, so index_add_ is exact in any order.
    return torch.zeros(num_rows, values.shape[1], dtype=values.dtype).index_add_(0, rows, values)


@lru_cache(maxsize=3)
def _triangle(size: int) -> Tensor:
    return torch.ones(size, size, dtype=torch.bool).triu_()
