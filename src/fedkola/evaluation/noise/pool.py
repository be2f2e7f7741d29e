"""All sites' records at one place, as baselines see them, and the family of doing nothing.

A baseline is a function of a pool that returns weights (n,) of its records. What it learns is read
by every read-out of the family, and its best one counts.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from fedkola.knowledge import views

LAM = 1e-4


@dataclass(frozen=True, slots=True, kw_only=True)
class Pool:
    """``phi`` (n, p) float32 in [0, 1], ``given`` and ``truth`` (n,) rows of labels; ``rate`` is
    the share of wrong ones, for baselines that must know it. ``asked`` (m, p) and ``right`` (m,)
    are the test."""

    phi: Tensor
    given: Tensor
    truth: Tensor
    rate: float
    num_labels: int
    asked: Tensor
    right: Tensor


def accuracies(pool: Pool, rows: Tensor, weights: Tensor) -> dict[str, float]:
    """Top-1 of the test under each read-out of weighted records with labels ``rows``."""
    phi = pool.phi.to(torch.float64)
    share = weights.to(torch.float64)
    gram = phi.T @ (phi * share[:, None])
    size = pool.num_labels
    counts = torch.zeros(size, dtype=torch.float64).index_add_(0, rows, share)
    sums = torch.zeros(size, phi.shape[1], dtype=torch.float64)
    sums.index_add_(0, rows, phi * share[:, None])
    known = torch.nonzero(counts > 0.5).flatten()
    lam = views.ridge(LAM, features=phi.shape[1], records=float(share.sum()))
    found = {"unbalanced": _score(pool, _ridge(gram, sums[known], lam), known)}
    for rule in ("root", "pooled"):
        within = views.scatter(gram, sums, counts)
        solved, bias = views.read_out(within, sums[known], counts[known], rule=rule, lam=lam)
        found[rule] = _score(pool, solved, known, bias)
    return found


def in_sample(pool: Pool, rows: Tensor, weights: Tensor) -> Tensor:
    """Scores (n, C) of the records under the ridge that they are part of, labels weighing alike."""
    phi = pool.phi.to(torch.float64)
    share = weights.to(torch.float64)
    counts = torch.zeros(pool.num_labels, dtype=torch.float64).index_add_(0, rows, share)
    sums = torch.zeros(pool.num_labels, phi.shape[1], dtype=torch.float64)
    sums.index_add_(0, rows, phi * share[:, None])
    gram = phi.T @ (phi * share[:, None])
    solved = _ridge(gram, sums / counts.clamp(min=0.5).sqrt()[:, None], LAM)
    return (pool.phi @ solved).masked_fill(counts == 0, float("-inf"))


def _ridge(gram: Tensor, sums: Tensor, lam: float) -> Tensor:
    size = gram.clone()
    size.diagonal().add_(lam * float(gram.diagonal().mean()))
    solved: Tensor = torch.cholesky_solve(sums.T.contiguous(), torch.linalg.cholesky(size))
    return solved.to(torch.float32)


def _score(pool: Pool, solved: Tensor, known: Tensor, bias: Tensor | None = None) -> float:
    scores = pool.asked @ solved + (0 if bias is None else bias)
    return float((known[scores.argmax(1)] == pool.right).double().mean())
