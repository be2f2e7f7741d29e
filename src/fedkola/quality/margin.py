"""What would a ridge over all sites say of a record, had it not seen that record? No second pass.

With the summed Gram G and label sums s, M = (G + lam mean(diag G) I)^-1 and targets t_i (one-hot
rows, or weights below 1)::

    f_i  = phi_i' M [ s_c ],   s_c = sum_i t_ic phi_i,   h_i = phi_i' M phi_i
    f_-i = ( f_i - h_i t_i ) / ( 1 - h_i )                    the ridge without record i, exactly

The identity is that of leave-one-out residuals of a linear smoother (Allen, PRESS, 1974). A site
needs M and the read-out alone; both are functions of sums.
"""

import torch
from torch import Tensor

from fedkola.errors import DataError

LAM = 1e-2
LEVERAGE = 0.99
"""A record of more leverage is alone in its direction, and is judged as if it had this much."""


def inverse(gram: Tensor, *, lam: float = LAM) -> Tensor:
    """M (p, p) float64 from a summed Gram (p, p); raises DataError if it holds nothing."""
    size = float(gram.diagonal().mean())
    if not size > 0:
        raise DataError("a Gram without records was given; a scan needs at least one record")
    ridge = gram.to(torch.float64).clone()
    ridge.diagonal().add_(lam * size)
    return torch.cholesky_inverse(torch.linalg.cholesky(ridge))


def leverage(phi: Tensor, inverse: Tensor) -> Tensor:
    """h (n,) float64 of records phi (n, p); only those under an M made with them are meaningful."""
    wide = phi.to(torch.float64)
    return ((wide @ inverse) * wide).sum(1)


def without_self(scores: Tensor, leverages: Tensor, targets: Tensor) -> Tensor:
    """f_-i (n, C) from f (n, C), h (n,) and what each record was itself fitted to, t (n, C)."""
    h = leverages.clamp(max=LEVERAGE)[:, None]
    return (scores - h * targets) / (1 - h)


def margins(scores: Tensor, rows: Tensor) -> Tensor:
    """f[y] - max over other labels, (n,); positive where a record's label leads. One label only
    gives infinity."""
    own = scores.gather(1, rows[:, None])[:, 0]
    rest = scores.clone()
    rest.scatter_(1, rows[:, None], float("-inf"))
    return own - rest.max(dim=1).values
