"""Trusted records: what a score means, and whether there is anything to act on at all.

A person has checked these records; nothing was fitted to them. With e their scores, n of them::

    u_i     = (1 + #{trusted j: e_j <= e_i}) / (n + 1)               flagged = [u_i <= alpha]
    phi     = share of records with u_i <= level                     level = 0.10
    alpha_U = 95 % quantile of Beta(k, n - k + 1),  k = floor(level (n + 1))
    eta_L   = max(0, (phi - alpha_U) / (1 - alpha_U))

If correct and trusted records are exchangeable, u of a correct record is super-uniform: it is
flagged with probability at most alpha (split-conformal ranks; Vovk et al., 2005). phi of correct
records is then Beta-distributed over draws of trusted ones, and eta_L is a lower bound of the share
of wrong records. Ranks come from a histogram summed over sites; rounding to bins only raises u.
"""

from dataclasses import dataclass

import torch
from scipy.stats import beta, norm
from torch import Tensor

from fedkola.errors import DataError

BINS = 1024
LEVEL = 0.10


@dataclass(frozen=True, slots=True, kw_only=True)
class Gate:
    """What the federation may conclude. ``noise_low`` is eta_L, ``noise_high`` an upper bound on
    the share of records that do not look right, ``open`` whether records may be acted on, and
    ``why`` says so in words."""

    open: bool
    why: str
    trusted: int
    flagged: float
    noise_low: float
    noise_high: float


def histogram(scores: Tensor) -> Tensor:
    """Counts (BINS,) int64 of scores in [0, 1]: a site's addend."""
    return torch.bincount(_bin(scores), minlength=BINS)


def ranks(scores: Tensor, trusted: Tensor) -> Tensor:
    """u (n,) float64 of scores in [0, 1] under the summed histogram of trusted ones."""
    below = torch.cumsum(trusted.to(torch.float64), dim=0)
    return (1 + below[_bin(scores)]) / (below[-1] + 1)


def gate(
    flagged: int,
    records: int,
    trusted: int,
    *,
    at_least: float = 0.05,
    trusted_min: int = 100,
    level: float = LEVEL,
) -> Gate:
    """Whether to act: ``flagged`` of ``records`` have u <= ``level`` under ``trusted`` ones.

    Raises DataError for counts that no records can have.
    """
    if not 0 <= flagged <= records or trusted < 0:
        raise DataError(
            f"{flagged} of {records} records and {trusted} trusted ones were given; counts start "
            "at 0 and no more records are flagged than there are"
        )
    share = flagged / records if records else 0.0
    low, high = noise(flagged, records, trusted, level=level)
    if trusted < trusted_min:
        why = (
            f"{trusted} trusted records, {trusted_min} are needed: findings are reported and "
            "nothing is acted on"
        )
        return _closed(why, trusted, share, low, high)
    if low < at_least:
        why = (
            f"at least {low:.1%} of the records are wrong as far as can be shown, {at_least:.1%} "
            "is where acting begins: findings are reported and nothing is acted on"
        )
        return _closed(why, trusted, share, low, high)
    why = f"at least {low:.1%} of the records are wrong; acting begins at {at_least:.1%}"
    return Gate(open=True, why=why, trusted=trusted, flagged=share, noise_low=low, noise_high=high)


def noise(flagged: int, records: int, trusted: int, *, level: float = LEVEL) -> tuple[float, float]:
    """Bounds of the share of wrong records: eta_L, and the Wilson 95 % bound of what is flagged
    above the fewest correct ones that could be. (0, 1) where nothing can be said."""
    k = int(level * (trusted + 1))
    if not records or k < 1:
        return 0.0, 1.0
    most = float(beta.ppf(0.95, k, trusted - k + 1))
    fewest = float(beta.ppf(0.05, k, trusted - k + 1))
    share = flagged / records
    z = float(norm.ppf(0.95))
    middle = share + z * z / (2 * records)
    half = z * (share * (1 - share) / records + z * z / (4 * records * records)) ** 0.5
    upper = min(1.0, (middle + half) / (1 + z * z / records))
    return (
        max(0.0, (share - most) / (1 - most)),
        min(1.0, max(0.0, (upper - fewest) / (1 - fewest))),
    )


def _closed(why: str, trusted: int, share: float, low: float, high: float) -> Gate:
    return Gate(open=False, why=why, trusted=trusted, flagged=share, noise_low=low, noise_high=high)


def _bin(scores: Tensor) -> Tensor:
    return (scores.to(torch.float64) * BINS).floor().clamp(0, BINS - 1).to(torch.int64)
