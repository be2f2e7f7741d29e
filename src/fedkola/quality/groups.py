"""Who is summed with whom, and what a robust rule makes of the sums: a round against lying sites.

Sites are assigned to groups anew at every exchange, by a key that only the run has. Each group's
sum is one row of a rule; nothing but these sums is read. A liar then spoils its group, and with a
share b of liars a group of g holds one with probability 1 - (1 - b)^g: privacy asks for large
groups and robustness for small ones, and both cannot be had. Single updates (g = 1) are rows too.

What is learnt over many exchanges is a ranking of sites: a site whose groups stand apart again and
again, in other company each time, is named to the steward. Where the plan says so, suspects are
then summed with each other, and left out; so many as may lie, and no more.
"""

import hashlib
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from math import ceil, inf

import numpy as np
import torch
from torch import Tensor

from fedkola.errors import CohortTooSmall, Incompatible, UnknownName
from fedkola.plan import Plan
from fedkola.quality import rules
from fedkola.quality.gram import Array
from fedkola.quality.rules import RULES, Options, Rule
from fedkola.types import Cohort, Weights

LEAST = 3
"""With fewer sites in a sum, a site that subtracts its own addend reads another's."""
SLACK = 1.2
LOW = 0.5
"""A row is named as of low weight below this share of the weight that its records would give it."""
DECAY = 0.98
RIDGE = 0.3
CLAMP = 4.0
WARN = 3.0
# Of single sites and of groups of 3: liars stood at 1.9 to 4.6, honest sites up to 1.8, and up to
# 2.4 where a liar copied one of them (measured, TREC, momentum 0.8, i.i.d. and Dirichlet 0.5).
DOUBT, APART = 1.9, 1.5
EARLIEST = 4


@dataclass(frozen=True, slots=True, kw_only=True)
class Robust:
    """How a cohort is split and combined, as the plan says; see ``docs/reference/plan.md``."""

    rule: str = "mean"
    groups_of: int = 0
    tau: float = 0.0
    assume_liars: float = 0.0
    reliability: str = "warn"
    root: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """The mean change of the sites that answered in one group, and the records behind it."""

    sites: Cohort
    tensors: Weights
    count: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Turn:
    """What became of the rows of one exchange: what the ledger keeps of it.

    Row i has the coefficient ``units[i] / of`` (none for rules by column). ``norms`` are lengths
    before the bound ``tau``; ``low`` are the positions of rows of low weight, ``dropped`` says why
    others did not count, by position.
    """

    exchange: int
    groups: tuple[Cohort, ...]
    counts: tuple[int, ...]
    norms: tuple[float, ...]
    tau: float
    liars: int
    units: tuple[int, ...]
    of: int
    low: tuple[int, ...] = ()
    dropped: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class Standing:
    """Evidence about sites, as sums over exchanges: ``normal`` (n, n) and ``moment`` (n,) of the
    ridge regression of what groups showed on who was in them."""

    sites: Cohort = ()
    normal: Tensor = field(default_factory=lambda: torch.zeros(0, 0, dtype=torch.float64))
    moment: Tensor = field(default_factory=lambda: torch.zeros(0, dtype=torch.float64))
    exchanges: int = 0


# --- before round 1 -------------------------------------------------------------------------------


def settings(plan: Plan) -> Robust:
    """What the plan says. Raises UnknownName for a rule that does not exist, Incompatible for what
    could not hold in any round."""
    r, g = plan.robust, plan.cohort.groups_of
    if r.rule not in RULES:
        raise UnknownName(f"robust.rule = {r.rule!r}; this version knows {', '.join(RULES)}")
    found = Robust(
        rule=r.rule,
        groups_of=g,
        tau=r.tau,
        assume_liars=r.assume_liars,
        reliability=r.reliability,
        root=r.root,
    )
    _check(plan, found)
    return found


def contaminated(share: float, size: int) -> float:
    """The share of groups of this size that hold a liar, where a ``share`` of the sites lie."""
    return 1.0 - (1.0 - share) ** max(size, 1)


def liars(rule: Rule, rows: int, size: int, share: float) -> int:
    """How many of the rows a rule is told may lie: those expected, as far as it can bear them."""
    expected = ceil(rows * contaminated(share, size) - 1e-9)
    return max(0, min(expected, (rows - rule.more) // 2))


def require(robust: Robust, sites: int) -> None:
    """Raises Incompatible where so many sites make too few rows for the rule."""
    if not robust.groups_of or robust.rule == "mean":
        return
    rule, rows = RULES[robust.rule], sites // robust.groups_of
    share = contaminated(robust.assume_liars, robust.groups_of)
    least = 2 * max(1, round(rows * share)) * bool(share) + rule.more
    if rows < least:
        raise Incompatible(
            f"{sites} sites in groups of {robust.groups_of} are {rows} sums, {robust.rule} with "
            f"robust.assume_liars = {robust.assume_liars:g} needs {least}; lower "
            "cohort.groups_of or robust.assume_liars, or ask more sites"
        )


def statement(robust: Robust, sites: int) -> str:
    """What the size of the groups hides and bears, in a sentence for whoever starts the run."""
    g = robust.groups_of
    if g == 0:
        return "one sum over all sites: it hides every site among all, and no rule can act on it"
    share = contaminated(robust.assume_liars, g)
    bears = f"with {robust.assume_liars:.0%} of sites lying, {share:.0%} of the rows hold a liar"
    if g == 1:
        return f"single updates of {sites} sites are read, none is hidden; {bears}"
    return (
        f"{sites // g} sums of {g} sites each: a site hides among {g}, not among {sites}; {bears}"
    )


# --- an exchange ----------------------------------------------------------------------------------


def assign(
    cohort: Cohort, size: int, *, key: str, together: Collection[str] = ()
) -> tuple[Cohort, ...]:
    """Disjoint groups of at least ``size`` sites, by ``key`` alone; what is left joins the last.

    Sites stand in the order of the cohort within a group. ``together`` are summed with each other.
    """
    if size == 0 or len(cohort) < size:
        return (cohort,)
    if size == 1:
        return tuple((site,) for site in cohort)
    place = {site: i for i, site in enumerate(cohort)}

    def drawn(site: str) -> bytes:
        return hashlib.sha256(f"fedkola/groups/1/{key}/{site}".encode()).digest()

    order = sorted(cohort, key=drawn)
    order.sort(key=lambda site: site not in together)
    num = len(order) // size
    taken = [order[i * size : (i + 1) * size] for i in range(num)]
    for i, site in enumerate(order[num * size :]):
        taken[-1 - i % num].append(site)
    return tuple(tuple(sorted(group, key=place.__getitem__)) for group in taken)


def joined(
    robust: Robust,
    rows: Sequence[Row],
    *,
    exchange: int,
    size: int,
    last: Weights | None = None,
    without: Collection[str] = (),
    seed: int = 0,
) -> tuple[Weights, Turn]:
    """One change out of the rows, each cut to tau first, and what became of every row.

    ``last`` is the change of the exchange before, where centered clipping starts. Rows
    that hold a site of ``without`` are left out, unless none would be left. Raises CohortTooSmall
    if too few rows count for the rule.
    """
    rule = RULES[robust.rule]
    root = [i for i, row in enumerate(rows) if row.sites == (robust.root,)]
    norms = [_norm(row.tensors) for row in rows]
    counts = [row.count for row in rows]
    there = [norm for norm, count in zip(norms, counts, strict=True) if count and norm < inf]
    tau = robust.tau or SLACK * float(np.median(there or [0.0]))
    cut = [_cut(row.tensors, norm, tau) for row, norm in zip(rows, norms, strict=True)]
    reference = last
    if robust.rule == "fltrust":
        if not root or not counts[root[0]]:
            raise CohortTooSmall(
                f"robust.root = {robust.root!r} sent no change in exchange {exchange}, and fltrust "
                "trusts what is like it; wait for that site and resume"
            )
        reference = cut[root[0]]
    left_out = {i for i, row in enumerate(rows) if not set(row.sites).isdisjoint(without)}
    if len(left_out) == len(rows):
        left_out = set()
    counts = [0 if i in left_out else count for i, count in enumerate(counts)]
    number = liars(rule, sum(map(bool, counts)), size, robust.assume_liars)
    options = Options(f=number, radius=_radius(cut, counts, last), seed=seed)
    # Nobody's word is taken for how many records it has, beyond those of the row in the middle.
    most = int(np.median([count for count in counts if count] or [0]))
    told = counts if robust.rule == "mean" else [min(count, most) for count in counts]
    found = rules.combine(rule, cut, counts=told, reference=reference, options=options)
    total = sum(told[i] for i in range(len(told)) if i not in found.dropped)
    low = [
        i
        for i, unit in enumerate(found.units[: len(rows)])
        if i not in found.dropped and unit * total < LOW * told[i] * found.of
    ]
    return found.tensors, Turn(
        exchange=exchange,
        groups=tuple(row.sites for row in rows),
        counts=tuple(row.count for row in rows),
        norms=tuple(norm if norm < inf else -1.0 for norm in norms),
        tau=tau if tau < inf else -1.0,
        liars=number,
        units=found.units,
        of=found.of,
        low=tuple(low),
        dropped={str(i): "Standing" if i in left_out else why for i, why in found.dropped.items()},
    )


# --- over exchanges -------------------------------------------------------------------------------


def observed(standing: Standing, rows: Sequence[Row], centre: Weights) -> Standing:
    """The evidence with that of one more exchange: how far each row lies from the ``centre`` and
    how little it points there, against the row in the middle."""
    good = [row for row in rows if row.count and _norm(row.tensors) < inf]
    if len(good) < 3:
        return standing
    known = dict.fromkeys((*standing.sites, *(site for row in good for site in row.sites)))
    place = {site: i for i, site in enumerate(known)}
    who = torch.zeros(len(good), len(place), dtype=torch.float64)
    for i, row in enumerate(good):
        who[i, [place[site] for site in row.sites]] = 1.0 / len(row.sites)
    shown = torch.tensor(_evidence([row.tensors for row in good], centre), dtype=torch.float64)
    n, old = len(place), len(standing.sites)
    normal, moment = torch.zeros(n, n, dtype=torch.float64), torch.zeros(n, dtype=torch.float64)
    normal[:old, :old], moment[:old] = standing.normal, standing.moment
    return Standing(
        sites=tuple(known),
        normal=DECAY * normal + who.T @ who,
        moment=DECAY * moment + who.T @ shown,
        exchanges=standing.exchanges + 1,
    )


def scores(standing: Standing) -> dict[str, float]:
    """How much each site's presence sets its groups apart; 0 on average."""
    if not standing.sites:
        return {}
    ridge = RIDGE * torch.eye(len(standing.sites), dtype=torch.float64)
    found = torch.linalg.solve(standing.normal + ridge, standing.moment)
    return dict(zip(standing.sites, found.tolist(), strict=True))


def doubted(standing: Standing, share: float) -> tuple[str, ...]:
    """Sites that stand clearly worse than the others, worst first: at most a ``share`` of them."""
    found = scores(standing)
    if standing.exchanges < EARLIEST or not share:
        return ()
    apart = _standardised(np.array(list(found.values())))
    clear = {
        site: s
        for (site, s), z in zip(found.items(), apart, strict=True)
        if s > DOUBT and z > APART
    }
    worst = sorted(clear, key=lambda site: -clear[site])
    return tuple(worst[: ceil(share * len(found) - 1e-9)])


def suspects(standing: Standing) -> dict[str, float]:
    """Sites to be looked at, and by how many deviations they stand out; none before enough
    exchanges. It finds the blatant ones: some liars hide near the centre."""
    found = scores(standing)
    if standing.exchanges < EARLIEST or len(found) < 4:
        return {}
    values = np.array(list(found.values()))
    apart = _standardised(values)
    return {site: float(z) for site, z in zip(found, apart, strict=True) if z > WARN}


# --- private --------------------------------------------------------------------------------------


def _check(plan: Plan, robust: Robust) -> None:
    g, why = robust.groups_of, ""
    floor = max(LEAST, plan.privacy.colluders + 2, plan.site.minimum)
    size = plan.cohort.size or inf
    if g == 0 and robust.rule != "mean":
        why = (
            f'robust.rule = "{robust.rule}" needs more than one sum to choose from; set '
            "cohort.groups_of, to 1 for single updates"
        )
    elif plan.privacy.secure_sum and 0 < g < floor:
        why = (
            f"cohort.groups_of = {g} is below the floor of {floor} sites that a secure sum must "
            "hide one among; raise it, or set privacy.secure_sum = false knowingly"
        )
    elif g > size:
        why = f"cohort.groups_of = {g} is more than cohort.size = {size}; lower it"
    elif robust.rule == "fltrust" and (g != 1 or not robust.root):
        why = (
            "fltrust compares with the change of one trusted site; set robust.root to its name and "
            "cohort.groups_of = 1"
        )
    elif robust.root and robust.rule != "fltrust":
        why = f'robust.root is read by fltrust alone, and robust.rule is "{robust.rule}"'
    elif g and contaminated(robust.assume_liars, g) >= 0.5:
        why = (
            f"robust.assume_liars = {robust.assume_liars:g} in groups of {g} puts a liar into "
            f"{contaminated(robust.assume_liars, g):.0%} of them, and no rule bears a majority; "
            "lower one of the two"
        )
    elif robust.reliability == "regroup" and not (g and robust.assume_liars):
        why = (
            'robust.reliability = "regroup" leaves out as many sums as may lie; set '
            "cohort.groups_of and robust.assume_liars"
        )
    if why:
        raise Incompatible(why)
    if g and plan.cohort.size:
        require(robust, plan.cohort.size)


def _norm(tensors: Weights) -> float:
    found = _inner(tensors, tensors) ** 0.5
    return found if np.isfinite(found) else inf


def _inner(left: Weights, right: Weights) -> float:
    # By name: masked and plain sums list tensors in other orders, and a sum of reals has one.
    return sum(
        float((left[name].to(torch.float64) * right[name].to(torch.float64)).sum())
        for name in sorted(left)
    )


def _cut(tensors: Weights, norm: float, tau: float) -> Weights:
    if norm <= tau or norm == inf:
        return tensors
    return {name: value * (tau / norm) for name, value in tensors.items()}


def _radius(rows: Sequence[Weights], counts: Sequence[int], last: Weights | None) -> float:
    """The distance of the row in the middle from where centered clipping starts."""
    apart = []
    for row, count in zip(rows, counts, strict=True):
        less = {n: v - last[n] for n, v in row.items()} if last is not None else row
        norm = _norm(less)
        if count and norm < inf:
            apart.append(norm)
    return float(np.median(apart)) if apart else 0.0


def _evidence(rows: Sequence[Weights], centre: Weights) -> list[float]:
    length = _norm(centre)
    apart, along = [], []
    for row in rows:
        apart.append(_norm({name: value - centre[name] for name, value in row.items()}))
        scale = length * _norm(row)
        along.append(_inner(row, centre) / scale if scale else 0.0)
    middle = float(np.median(apart)) or 1.0
    shown = np.array(apart) / middle - np.array(along)
    return [float(z) for z in np.clip(_standardised(shown), -CLAMP, CLAMP)]


def _standardised(values: Array) -> Array:
    middle = np.median(values)
    spread = 1.4826 * float(np.median(np.abs(values - middle)))
    found: Array = (values - middle) / (spread or 1.0)
    return found
