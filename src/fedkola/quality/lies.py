"""Lying sites for tests: what a site sends in place of its own sum.

Each lie takes the liar's own update, those of the honest sites of the round (liars are taken to
know them, the strongest case) and the number of liars, and returns the update that is sent. Tensors
of an update are already weighted; lies are about the mean, and come back at the liar's own weight.

``sign`` -3 times its own; ``ipm`` -0.5 times the honest mean (Xie et al., UAI 2019); ``alie`` the
mean less z deviations, z as large as a majority bears (Baruch et al., NeurIPS 2019); ``min_max``
as far against the mean as the widest pair of honest sites is apart (Shejwalkar and Houmansadr, NDSS
2021); ``mimic`` one honest site's (Karimireddy et al., ICLR 2022); ``replace_model`` its own, so
large that the mean becomes it (Bagdasaryan et al., AISTATS 2020); ``same_value`` one number
everywhere; ``huge_weight`` its own under 10^12 records; ``not_finite`` with one NaN; ``wrong_keys``
under a name that nobody asked for. A site whose labels are wrong is ``corrupt.flip_site``.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from statistics import NormalDist

import torch
from torch import Tensor

from fedkola.types import Update

Lie = Callable[[Update, Sequence[Update], int], Update]

SIGN, IPM, VALUE, WEIGHT = 3.0, 0.5, 100.0, 1e12


def sign(own: Update, honest: Sequence[Update], liars: int) -> Update:
    return _sent(own, {name: -SIGN * value for name, value in own.tensors.items()})


def ipm(own: Update, honest: Sequence[Update], liars: int) -> Update:
    return _about(own, [-IPM * mean for mean in _means(own, honest).values()])


def alie(own: Update, honest: Sequence[Update], liars: int) -> Update:
    n = len(honest) + liars
    supporters = n // 2 + 1 - liars
    share = min(max((n - liars - supporters) / max(n - liars, 1), 1e-3), 1 - 1e-3)
    z = NormalDist().inv_cdf(share)
    found = []
    for name, mean in _means(own, honest).items():
        apart = torch.stack([_mean(update, name) - mean for update in honest or [own]])
        found.append(mean - z * apart.square().mean(dim=0).sqrt())
    return _about(own, found)


def min_max(own: Update, honest: Sequence[Update], liars: int) -> Update:
    means = _means(own, honest)
    flat = [torch.cat([_mean(u, name).reshape(-1) for name in means]) for u in honest or [own]]
    centre = torch.cat([mean.reshape(-1) for mean in means.values()])
    length = centre.norm()
    if float(length) == 0.0:
        return _about(own, list(means.values()))
    against = -centre / length
    widest = max((float((a - b).norm()) for a in flat for b in flat), default=0.0)
    reach = []
    for one in flat:
        # |centre + t against - one| = widest, for the larger t.
        apart = centre - one
        along = float(apart @ against)
        reach.append(-along + max(along**2 - float(apart @ apart) + widest**2, 0.0) ** 0.5)
    moved = centre + max(min(reach), 0.0) * against
    sizes = [mean.numel() for mean in means.values()]
    parts = torch.split(moved, sizes)
    return _about(
        own, [part.view(mean.shape) for part, mean in zip(parts, means.values(), strict=True)]
    )


def mimic(own: Update, honest: Sequence[Update], liars: int) -> Update:
    seen = honest[0] if honest else own
    return _about(own, [_mean(seen, name) for name in own.tensors])


def replace_model(own: Update, honest: Sequence[Update], liars: int) -> Update:
    total = own.weight * liars + sum(update.weight for update in honest)
    factor = total / (own.weight * liars) if own.weight else 1.0
    return _sent(own, {name: factor * value for name, value in own.tensors.items()})


def same_value(own: Update, honest: Sequence[Update], liars: int) -> Update:
    return _about(
        own, [torch.full(value.shape, VALUE, dtype=torch.float64) for value in own.tensors.values()]
    )


def huge_weight(own: Update, honest: Sequence[Update], liars: int) -> Update:
    return replace(own, weight=WEIGHT)


def not_finite(own: Update, honest: Sequence[Update], liars: int) -> Update:
    spoilt = {name: value.to(torch.float64, copy=True) for name, value in own.tensors.items()}
    for value in spoilt.values():
        if value.numel():
            value.view(-1)[0] = torch.nan
            break
    return replace(own, tensors=spoilt)


def wrong_keys(own: Update, honest: Sequence[Update], liars: int) -> Update:
    first, *others = own.tensors.items()
    return replace(own, tensors={f"{first[0]}.more": first[1], **dict(others)})


LIES: Mapping[str, Lie] = {
    "sign": sign,
    "ipm": ipm,
    "alie": alie,
    "min_max": min_max,
    "mimic": mimic,
    "replace_model": replace_model,
    "same_value": same_value,
    "huge_weight": huge_weight,
    "not_finite": not_finite,
    "wrong_keys": wrong_keys,
}


# --- private --------------------------------------------------------------------------------------


def _mean(update: Update, name: str) -> Tensor:
    return update.tensors[name].to(torch.float64) / (update.weight or 1.0)


def _means(own: Update, honest: Sequence[Update]) -> dict[str, Tensor]:
    """By tensor, the plain mean of the honest sites' means; of the liar's own where it is alone."""
    told = honest or [own]
    return {
        name: torch.stack([_mean(update, name) for update in told]).mean(dim=0)
        for name in own.tensors
    }


def _about(own: Update, means: Sequence[Tensor]) -> Update:
    weight = own.weight or 1.0
    return _sent(own, {n: mean * weight for n, mean in zip(own.tensors, means, strict=True)})


def _sent(own: Update, tensors: Mapping[str, Tensor]) -> Update:
    """Tensors that are whole numbers stay so."""
    found = {}
    for name, value in tensors.items():
        kind = own.tensors[name].dtype
        whole = not kind.is_floating_point
        found[name] = (torch.round(value) if whole else value).to(kind)
    return replace(own, tensors=found)
