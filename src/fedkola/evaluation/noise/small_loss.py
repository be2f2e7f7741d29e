"""Keep the records of smallest loss, as many as are known to be right (Han et al., NeurIPS 2018,
without the second network): the usual score, and the rate told by an oracle."""

import torch
from torch import Tensor

from fedkola.evaluation.noise.pool import Pool, in_sample
from fedkola.quality.margin import margins


def weights(pool: Pool) -> Tensor:
    """1 for the share 1 - rate of records that lead most by their own label, in sample."""
    lead = margins(in_sample(pool, pool.given, torch.ones(len(pool.given))), pool.given)
    return largest(lead, 1 - pool.rate)


def largest(scores: Tensor, share: float) -> Tensor:
    """1 for this share of the records, those of largest score, and 0 for the others."""
    kept = torch.zeros(len(scores))
    kept[scores.argsort(descending=True, stable=True)[: round(share * len(scores))]] = 1.0
    return kept
