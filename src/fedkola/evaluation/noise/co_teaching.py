"""Co-teaching for read-outs (Han et al., NeurIPS 2018): two learners that choose for each other.

Two ridges start on two halves of the records; in epoch t of T each keeps, for the other one, the
share 1 - rate min(t / T_k, 1) of smallest loss, over all records. The rate is told by an oracle.
"""

import torch
from torch import Tensor

from fedkola.evaluation.noise.pool import Pool, in_sample
from fedkola.evaluation.noise.small_loss import largest
from fedkola.quality.margin import margins

EPOCHS = 5
RAMP = 3


def weights(pool: Pool) -> Tensor:
    """The mean of what the two keep after the last epoch."""
    generator = torch.Generator().manual_seed(0)
    half = (torch.rand(len(pool.given), generator=generator) < 0.5).to(torch.float32)
    mine, theirs = half, 1 - half
    for epoch in range(1, EPOCHS + 1):
        share = 1 - pool.rate * min(epoch / RAMP, 1.0)
        first = margins(in_sample(pool, pool.given, mine), pool.given)
        second = margins(in_sample(pool, pool.given, theirs), pool.given)
        mine, theirs = largest(second, share), largest(first, share)
    return (mine + theirs) / 2
