"""Robust rules: how updates of several groups become one although some of them lie.

Most rules are functions of the squared distances D_ij = |x_i - x_j|^2 and of each group's share
p_i of the records alone, and answer with coefficients over the rows; a second pass combines them.
Coefficients are integers over one number, the records where some rows are averaged and else 2^20,
so that what is kept of them replays to the same bits.

=====================  ============================================================================
``mean``               p_i; the only rule that is not robust, and the one that loses nothing
``krum``               the row nearest to its m - f - 2 nearest; ``multi_krum`` the mean of the best
                       m - f (Blanchard et al., NeurIPS 2017)
``nnm``                every row becomes the mean of its m - f nearest (Allouah et al., AISTATS
                       2023), then the mean; ``nnm_gm``, ``nnm_tm``, :func:`mixed` go on from there
``geometric_median``   minimises sum p_i |x_i - z| (RFA; Pillutla et al., IEEE TSP 2022)
``centered_clipping``  v <- v + sum p_i (x_i - v) min(1, radius/|x_i - v|) (Karimireddy et al.,
                       ICML 2021), from the last aggregate
``trimmed_mean``       by column, without the f largest and f smallest; ``median`` by column (Yin et
                       al., ICML 2018)
``fltrust``            relu(cos(x_i, root)), all at the norm of the root's (Cao et al., NDSS 2021)
``flame``              the majority of directions, clipped at the median norm, and noise (Nguyen et
                       al., USENIX Security 2022)
``dnc``                without the f rows farthest along the first principal direction of sampled
                       columns (Shejwalkar and Houmansadr, NDSS 2021)
=====================  ============================================================================

``f`` is how many rows may lie. No rule defends against a majority, and none sees a backdoor that
looks like an honest update. Ties go to the row that comes first.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from math import inf

import numpy as np
import torch
from numpy.typing import NDArray

from fedkola.errors import CohortTooSmall, NotFinite, PlanError, WireError
from fedkola.quality import gram
from fedkola.quality.gram import Array, Row
from fedkola.types import Weights

# At 2^16 a geometric median of numbers around 1 is off by up to 2e-4, at 2^20 by 1e-5.
UNITS = 1 << 20
STEPS = 64
# Of a coefficient: far below one unit, so that rows at any distance leave the sums of the others.
SMALLEST = 2.0**-28
# Of distances that are compared: equal rows tie in spite of the last bits of their products.
BITS = 40


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """What rules may be told; each reads what it needs.

    ``radius`` and ``steps`` are those of ``centered_clipping``, ``neighbours`` those that Krum
    counts (0: m - f - 2), ``noise`` is FLAME's deviation over its clipping norm, ``seed`` draws
    that noise and the ``samples`` of columns of ``dnc``, each a ``share`` of all.
    """

    f: int = 0
    radius: float = 0.0
    steps: int = 3
    neighbours: int = 0
    noise: float = 0.0
    samples: int = 5
    share: float = 0.2
    seed: int = 0

    def __post_init__(self) -> None:
        if min(self.f, self.neighbours, self.seed) < 0 or min(self.steps, self.samples) < 1:
            raise PlanError(
                f"{self} was given; f, neighbours and seed are at least 0, steps and samples 1"
            )
        if not (0 <= self.radius < inf and 0 <= self.noise < inf and 0 < self.share <= 1):
            raise PlanError(
                f"{self} was given; radius and noise are finite and at least 0, share is in (0, 1]"
            )


DEFAULT = Options()


@dataclass(frozen=True, slots=True, kw_only=True)
class Rule:
    """One rule: ``of(distances, shares, options)`` gives coefficients over the rows, or, of a rule
    ``by_column``, ``of(columns, shares, options)`` the numbers themselves, (w, m) -> (w,).

    ``extra`` rows come after the others: "reference", and "origin", the row of zeros. The rule
    needs 2 f + ``more`` rows. ``mixed``: of the means of each row's nearest in place of the rows.
    ``measured``: it reads distances, (m, m); ``sampled``: it reads them by sample of columns,
    (samples, m, m).
    """

    of: Callable[[Array, Array, Options], Array]
    by_column: bool = False
    extra: tuple[str, ...] = ()
    more: int = 1
    mixed: bool = False
    measured: bool = True
    sampled: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Combined:
    """What a rule made of the rows.

    Row i has the coefficient ``units[i] / of``; of a rule that goes on from a reference, that one
    comes last. ``units`` is empty for rules by column. ``dropped`` names the rows that did not
    count: "NotFinite", "NoWeight".
    """

    tensors: Weights
    units: tuple[int, ...]
    of: int
    dropped: Mapping[int, str]


def mixed(rule: Rule) -> Rule:
    """The rule, of the means of each row's m - f nearest in place of the rows (NNM)."""
    return replace(rule, mixed=True, measured=True)


def combine(
    rule: Rule,
    rows: Sequence[Weights],
    *,
    counts: Sequence[int] = (),
    reference: Weights | None = None,
    options: Options = DEFAULT,
) -> Combined:
    """One update of many; ``counts`` are the records behind each row (all alike by default).

    ``reference`` is the last aggregate of ``centered_clipping`` (zeros by default) or the root's
    update of ``fltrust``. Rows are not changed. A row with NaN or infinity, or of count 0, is
    dropped and named, and nothing else changes. Raises CohortTooSmall if too few rows are left for
    ``f``, WireError for rows of different names or shapes, PlanError where the rule lacks what it
    needs, NotFinite for a reference that is not.
    """
    _check(rule, rows, counts, reference, options)
    weights = list(counts) or [1] * len(rows)
    extra: list[Row] = [{"reference": reference, "origin": None}[name] for name in rule.extra]
    kept, dropped, d2 = _survey(rule, rows, weights, extra, options)
    total = sum(weights[i] for i in kept)
    shares = np.array([weights[i] / total for i in kept])
    left: list[Row] = [*(rows[i] for i in kept), *extra]
    near = _neighbour_means(d2.sum(axis=0), shares, options) if rule.mixed else None
    if rule.by_column:
        numbers = gram.columns(left, lambda x: rule.of(x, shares, options), mixing=near)
        return Combined(tensors=numbers, units=(), of=UNITS, dropped=dropped)
    if near is not None:
        d2 = np.stack([_moved(one, near) for one in d2])
    found = rule.of(d2 if rule.sampled else d2[0], shares, options)
    if near is not None:
        found = found @ near[: len(found), : len(found)]
    if not rule.mixed and not rule.extra and _is_average(found, shares):
        units = [weights[i] * bool(c) for i, c in zip(kept, found, strict=True)]
        of = sum(units)
    else:
        units, of = _rounded(found, affine="origin" not in rule.extra), UNITS
    tensors: Weights = gram.combine(left[: len(units)], [unit / of for unit in units])
    if rule.of is flame and options.noise:
        tensors = _noised(tensors, options.noise * _median_norm(d2[0]), options.seed)
    place = dict(zip(kept, units, strict=False))
    return Combined(
        tensors=tensors,
        units=(*(place.get(i, 0) for i in range(len(rows))), *units[len(kept) :]),
        of=of,
        dropped=dropped,
    )


# --- the rules ------------------------------------------------------------------------------------


def mean(d2: Array, shares: Array, options: Options) -> Array:
    return shares


def krum(d2: Array, shares: Array, options: Options) -> Array:
    found = np.zeros(len(d2))
    found[_krum_order(d2, options)[0]] = 1.0
    return found


def multi_krum(d2: Array, shares: Array, options: Options) -> Array:
    return _only(shares, _krum_order(d2, options)[: len(d2) - options.f])


def geometric_median(d2: Array, shares: Array, options: Options) -> Array:
    """Weiszfeld's steps, w_j ~ p_j / r_j, at most 64 of them, with a floor under r that keeps a
    row at the centre from taking all."""
    if not d2.any():
        return shares
    apart = d2[~np.eye(len(d2), dtype=np.bool_)]
    floor = 1e-6 * np.sqrt(np.median(apart) / 2 or apart.mean() / 2)
    w = shares
    for _ in range(STEPS):
        before = w
        w = shares / np.maximum(_radii(d2, w), floor)
        w /= w.sum()
        w[w < SMALLEST] = 0.0
        w /= w.sum()
        if np.abs(w - before).max() < 1e-9:
            break
    return w


def centered_clipping(d2: Array, shares: Array, options: Options) -> Array:
    """The reference is the last row, and where the steps begin."""
    w = np.zeros(len(d2))
    w[-1] = 1.0
    for _ in range(options.steps):
        radii = _radii(d2, w)[:-1]
        step = shares * options.radius / np.maximum(radii, options.radius)
        w = w * (1.0 - step.sum())
        w[:-1] += step
    return w


def trimmed_mean(columns: Array, shares: Array, options: Options) -> Array:
    f, m = options.f, columns.shape[1]
    if np.ptp(shares) == 0.0:
        columns.sort(axis=1)
        middle: Array = columns[:, f : m - f].mean(axis=1)
        return middle
    order = np.argsort(columns, axis=1, kind="stable")[:, f : m - f]
    weights = shares[order]
    summed: Array = (np.take_along_axis(columns, order, axis=1) * weights).sum(axis=1)
    summed /= weights.sum(axis=1)
    return summed


def median(columns: Array, shares: Array, options: Options) -> Array:
    """The number with half of the records on either side; between two, their mean."""
    if np.ptp(shares) == 0.0:
        columns.sort(axis=1)
        m = columns.shape[1]
        return (columns[:, (m - 1) // 2] + columns[:, m // 2]) / 2
    order = np.argsort(columns, axis=1, kind="stable")
    below = np.cumsum(shares[order], axis=1)
    ends = [(below < 0.5 + eps).sum(axis=1) for eps in (-1e-12, 1e-12)]
    rows = np.arange(len(columns))
    low, high = (columns[rows, order[rows, end]] for end in ends)
    middle: Array = (low + high) / 2
    return middle


def fltrust(d2: Array, shares: Array, options: Options) -> Array:
    """The root's update is the last row but one, zeros the last. No trust at all is no step."""
    norms = np.sqrt(d2[:-2, -1])
    root = np.sqrt(d2[-2, -1])
    if root == 0.0:
        return np.zeros(len(norms))
    there = norms > 0
    inner = (d2[:-2, -1] + d2[-2, -1] - d2[:-2, -2]) / 2
    cosines = np.divide(inner, norms * root, out=np.zeros(len(norms)), where=there)
    trust = shares * np.maximum(cosines, 0.0)
    if not trust.any():
        return np.zeros(len(norms))
    found: Array = np.divide(
        trust / trust.sum() * root, norms, out=np.zeros(len(norms)), where=there
    )
    return found


def flame(d2: Array, shares: Array, options: Options) -> Array:
    """Zeros are the last row. Average linkage of directions stops once a cluster is the majority;
    the noise is added to the combination."""
    norms = np.sqrt(d2[:-1, -1])
    scale = np.outer(norms, norms)
    inner = (d2[:-1, -1:] + d2[:-1, -1] - d2[:-1, :-1]) / 2
    apart = 1.0 - np.divide(inner, scale, out=np.zeros_like(scale), where=scale > 0)
    clip = _median_norm(d2)
    return _only(shares, _majority(apart)) * np.minimum(1.0, clip / np.maximum(norms, clip or 1.0))


def dnc(d2: Array, shares: Array, options: Options) -> Array:
    """Kept are the rows that no sample drops; where there are none, those that fewest drop."""
    drops = np.zeros(d2.shape[1])
    for one in d2:
        values, vectors = np.linalg.eigh(_centred(one))
        drops[_first(-values[-1] * vectors[:, -1] ** 2)[: options.f]] += 1
    return _only(shares, np.flatnonzero(drops == drops.min()))


RULES: Mapping[str, Rule] = {
    "mean": Rule(of=mean, measured=False),
    "krum": Rule(of=krum, more=3),
    "multi_krum": Rule(of=multi_krum, more=3),
    "nnm": Rule(of=mean, mixed=True),
    "nnm_gm": Rule(of=geometric_median, mixed=True),
    "nnm_tm": Rule(of=trimmed_mean, by_column=True, mixed=True),
    "geometric_median": Rule(of=geometric_median),
    "centered_clipping": Rule(of=centered_clipping, extra=("reference",)),
    "trimmed_mean": Rule(of=trimmed_mean, by_column=True, measured=False),
    "median": Rule(of=median, by_column=True, measured=False),
    "fltrust": Rule(of=fltrust, extra=("reference", "origin")),
    "flame": Rule(of=flame, extra=("origin",)),
    "dnc": Rule(of=dnc, sampled=True),
}


# --- private --------------------------------------------------------------------------------------


def _check(
    rule: Rule,
    rows: Sequence[Weights],
    counts: Sequence[int],
    reference: Weights | None,
    options: Options,
) -> None:
    shapes = [{name: value.shape for name, value in row.items()} for row in rows]
    if reference is not None:
        shapes.append({name: value.shape for name, value in reference.items()})
    if any(shape != shapes[0] for shape in shapes):
        raise WireError("updates of different names or shapes cannot be combined; drop the odd one")
    if counts and (len(counts) != len(rows) or min(counts) < 0):
        raise PlanError(
            f"counts of {list(counts)} were given for {len(rows)} updates; give one of at least 0 "
            "for each"
        )
    if rule.of is fltrust and reference is None:
        raise PlanError("fltrust needs the update of a trusted root as its reference")
    if rule.of is centered_clipping and options.radius == 0:
        raise PlanError("centered_clipping needs a radius above 0")


def _survey(
    rule: Rule,
    rows: Sequence[Weights],
    weights: Sequence[int],
    extra: Sequence[Row],
    options: Options,
) -> tuple[list[int], dict[int, str], Array]:
    """Which rows count, why others do not, and the distances between those that do, extra too."""
    dropped = {i: "NoWeight" for i, count in enumerate(weights) if count == 0}
    kept = [i for i in range(len(rows)) if i not in dropped]
    asked: list[Row] = [*(rows[i] for i in kept), *extra]
    d2, finite = np.zeros((1, 0, 0)), np.zeros(0, dtype=np.bool_)
    if kept and rule.measured and rule.sampled:
        d2, finite = gram.distances(
            asked, samples=options.samples, share=options.share, seed=options.seed
        )
    elif kept and rule.measured:
        d2, finite = gram.distances(asked)
    elif kept:
        finite = gram.finite(asked)
    if not finite[len(kept) :].all():
        raise NotFinite("the reference of a robust rule holds NaN or infinity; give a finite one")
    dropped |= {i: "NotFinite" for i, good in zip(kept, finite, strict=False) if not good}
    kept = [i for i in kept if i not in dropped]
    least = 2 * options.f + rule.more
    if len(kept) < least:
        raise CohortTooSmall(
            f"{len(kept)} of {len(rows)} updates are left (dropped: {dropped}), this rule with "
            f"f = {options.f} needs {least}; ask more groups or lower f"
        )
    return kept, dropped, d2[:, finite][:, :, finite] if rule.measured else d2


def _krum_order(d2: Array, options: Options) -> NDArray[np.intp]:
    """Rows by the summed distances to their nearest, best first."""
    count = options.neighbours or len(d2) - options.f - 2
    return _first(np.sort(d2, axis=1)[:, 1 : 1 + count].sum(axis=1))


def _neighbour_means(d2: Array, shares: Array, options: Options) -> Array:
    """(m + e, m + e): row i averages the m - f rows nearest to i; extra rows stay."""
    m = len(shares)
    near = np.eye(len(d2))
    for i in range(m):
        near[i, :m] = _only(shares, _first(d2[i, :m])[: m - options.f])
    return near


def _moved(d2: Array, near: Array) -> Array:
    """The distances between the rows of ``near`` times the rows."""
    # Products from a row in the middle: one from the mean would lose digits to a far outlier.
    middle = int(np.argmin(np.median(d2, axis=1)))
    inner = near @ ((d2[:, middle, None] + d2[middle] - d2) / 2) @ near.T
    norms = np.diagonal(inner)
    moved: Array = np.maximum(norms[:, None] + norms - 2 * inner, 0.0)
    return moved


def _radii(d2: Array, w: Array) -> Array:
    """Distances of the rows from their combination w, which sums to 1."""
    to = d2 @ w
    return np.sqrt(np.maximum(to - to @ w / 2, 0.0))


def _centred(d2: Array) -> Array:
    """The products of the rows less their mean."""
    of_row = d2.mean(axis=1)
    products: Array = (of_row[:, None] + of_row - d2 - of_row.mean()) / 2
    return products


def _median_norm(d2: Array) -> float:
    return float(np.median(np.sqrt(d2[:-1, -1])))


def _majority(apart: Array) -> list[int]:
    """Clusters joined by least average distance until one holds more than half of the rows."""
    clusters = [[i] for i in range(len(apart))]
    while all(2 * len(cluster) <= len(apart) for cluster in clusters):
        means = np.full((len(clusters), len(clusters)), inf)
        for i, left in enumerate(clusters):
            for j in range(i + 1, len(clusters)):
                means[i, j] = apart[np.ix_(left, clusters[j])].mean()
        i, j = divmod(int(_first(means.reshape(-1))[0]), len(clusters))
        clusters[i] = sorted(clusters[i] + clusters.pop(j))
    return max(clusters, key=len)


def _only(shares: Array, rows: Sequence[int] | NDArray[np.intp]) -> Array:
    """The shares of these rows among themselves, 0 elsewhere."""
    found = np.zeros(len(shares))
    found[rows] = shares[rows]
    shared: Array = found / found.sum()
    return shared


def _is_average(found: Array, shares: Array) -> bool:
    return np.array_equal(found, _only(shares, np.flatnonzero(found)))


def _first(values: Array) -> NDArray[np.intp]:
    """Positions from the smallest value on; equal ones, up to their last bits, in order."""
    mantissa, exponent = np.frexp(values)
    return np.argsort(np.ldexp(np.rint(np.ldexp(mantissa, BITS)), exponent), kind="stable")


def _rounded(coefficients: Array, *, affine: bool) -> list[int]:
    """In units; where they sum to 1 they go on doing so (largest remainders first)."""
    exact = coefficients * UNITS
    if not affine:
        return [int(unit) for unit in np.rint(exact)]
    units = np.floor(exact).astype(np.int64)
    units[_first(units - exact)[: UNITS - int(units.sum())]] += 1
    return [int(unit) for unit in units]


def _noised(tensors: Weights, deviation: float, seed: int) -> Weights:
    generator = torch.Generator().manual_seed(seed)
    return {
        name: value + deviation * torch.randn(value.shape, generator=generator).to(value.dtype)
        for name, value in sorted(tensors.items())
    }
