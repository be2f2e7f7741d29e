"""Confident learning (Northcutt et al., JAIR 2021): prune what the confident joint says is wrong.

From probabilities that no record took part in, a label's threshold is the mean probability of it
over records that carry it; a record is wrong if another label passes its own threshold and is the
likeliest of those that do.
"""

import torch
from torch import Tensor

from fedkola.evaluation.noise.pool import Pool
from fedkola.quality import margin

SHARPNESS = 8.0


def weights(pool: Pool) -> Tensor:
    """0 for records that the joint counts as another label."""
    one_hot = torch.nn.functional.one_hot(pool.given, pool.num_labels).to(torch.float64)
    phi = pool.phi.to(torch.float64)
    inverse = margin.inverse(phi.T @ phi)
    scores = phi @ (inverse @ (phi.T @ one_hot))
    scores = margin.without_self(scores, margin.leverage(pool.phi, inverse), one_hot)
    chances = torch.softmax(SHARPNESS * scores, dim=1)
    counts = one_hot.sum(0)
    thresholds = (chances * one_hot).sum(0) / counts.clamp(min=1)
    sure = (chances >= thresholds) & (counts > 0)
    likeliest = chances.masked_fill(~sure, -1).argmax(dim=1)
    wrong = sure.any(dim=1) & (likeliest != pool.given)
    return (~wrong).to(torch.float32)
