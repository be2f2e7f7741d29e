"""Shadow exchanges: the known protocol run on text of the attacker's own.

An adversary that keeps the protocol knows everything about a site's training but its records: the
weights it began from, steps, batch, optimiser, clipping and the level of the noise. So it can make
as many changes with known records as it likes, and learn from them what records do to a change.
"""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields, replace
from typing import Any

import torch
from torch import Generator, Tensor

from fedkola.algorithms.diloco import DiLoCo
from fedkola.audit.evidence import Known, Sequences, Sighting
from fedkola.errors import DataError
from fedkola.privacy.accounting import Limit, noise_for
from fedkola.privacy.clip import factor, norm
from fedkola.training import whole
from fedkola.training.model import Foundation, encode
from fedkola.training.packing import pack
from fedkola.training.per_unit import clipped_sum
from fedkola.training.whole import Ids, Local
from fedkola.types import Scalar, Spec, Weights


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """How every site trains between two exchanges.

    ``steps`` batches of ``batch`` sequences. With ``sigma`` above 0 a batch is a Poisson sample of
    the ``units`` records at a site, of ``batch`` on average; each record's gradient is cut to the
    norm ``bound``, and Gaussian noise of standard deviation ``sigma * bound`` joins their sum.
    ``warm`` says that the optimiser has run before. ``frozen`` tensors stay as they are.
    """

    steps: int
    batch: int
    local: Local
    sigma: float = 0.0
    bound: float = 1.0
    units: int = 0
    warm: bool = False
    frozen: frozenset[str] = frozenset()

    def open(self) -> "Recipe":
        """The same training, defence off: every tensor learns, no noise, no record is cut."""
        return replace(self, sigma=0.0, frozen=frozenset())


@dataclass(frozen=True, slots=True, kw_only=True)
class Shadow:
    """A change made by the attacker, mean over its sites, and the sequences behind it."""

    change: Weights
    used: Sequences


def recipe(sighting: Sighting, *, held: int = 0) -> Recipe:
    """What the protocol of a sighting says of local training.

    Of DiLoCo it is the course of the round, of others ``inner_steps``, ``batch`` and ``lr``
    (required), ``rounds`` and fields of ``Local``; of the guard ``record_dp`` ``clip``, ``units``
    and ``sigma``, or what sigma follows from (``unit``, ``epsilon``, ``delta``, ``steps``).
    ``held`` is how many units a site holds, where the guard declares none. Tensors without a change
    are frozen, unless fragments take turns. Raises DataError for a protocol that does not train so.
    """
    spec = sighting.protocol
    absent = [name for name in ("inner_steps", "batch", "lr") if not number(spec.get(name))]
    if absent:
        raise DataError(
            f"the protocol {spec.get('name')!r} of round {sighting.round} has no {absent}; shadow "
            "exchanges need inner_steps, batch and lr, as of diloco"
        )
    steps, local = _course(spec, max(sighting.round, 1))
    batch = int(number(spec["batch"]))
    units = int(number(spec.get("units"))) or held
    parts = number(spec.get("fragments")) > 1  # what is not sent now is trained all the same
    sigma = _sigma(spec, batch, units)
    return Recipe(
        steps=steps,
        batch=batch,
        local=local,
        sigma=sigma,
        bound=(number(spec.get("clip")) or 1.0) if sigma else 1.0,
        units=units,
        warm=sighting.round > 1 and local.optimiser == "adamw",
        frozen=frozenset() if parts else frozenset(still(sighting.before, sighting.change)),
    )


def still(before: Weights, change: Weights) -> list[str]:
    """Tensors that were not sent, or did not move at all."""
    return [name for name in before if name not in change or not bool(change[name].any())]


def undecayed(seen: Sighting) -> Sighting:
    """The sighting without weight decay, which shrinks matrices by a share that the protocol tells:
    1 less the product of (1 - rate x decay) over its steps. As it is where that is not told."""
    spec = seen.protocol
    if any(not number(spec.get(name)) for name in ("inner_steps", "batch", "lr")):
        return seen
    steps, local = _course(spec, max(seen.round, 1))
    kept = math.prod(1 - local.rate(local.start + s) * local.weight_decay for s in range(steps))
    change = {
        name: value + (1 - kept) * seen.before[name] if value.dim() > 1 else value
        for name, value in seen.change.items()
    }
    return replace(seen, change=change)


def own_text(known: Known, protocol: Spec) -> list[list[int]]:
    """The attacker's texts as sequences, packed to the protocol's ``length`` where it has one.

    Raises DataError if there is none of two tokens.
    """
    length = int(number(protocol.get("length")))
    if length:
        units = [""] * len(known.texts)
        return _some(
            pack(known.foundation, known.texts, units, length=length, apart=False)[0], known
        )
    return _some([ids for ids in encode(known.foundation, known.texts) if len(ids) > 1], known)


def shadow(
    foundation: Foundation,
    before: Weights,
    how: Recipe,
    pools: Sequence[Sequence[Ids]],
    *,
    seed: int,
) -> Shadow:
    """One exchange of as many sites as there are pools of sequences: the mean of their changes."""
    total: dict[str, Tensor] = {n: torch.zeros_like(v) for n, v in before.items()}
    used: list[tuple[int, ...]] = []
    for site, pool in enumerate(pools):
        generator = torch.Generator().manual_seed(seed * 1009 + site)
        moments: Weights | None = None
        if how.warm:
            earlier = replace(how.local, start=max(how.local.start - how.steps, 0))
            before_it = replace(how, local=earlier)
            moments = _site(foundation, before, before_it, pool, generator, None)[1]
        after, _, read = _site(foundation, before, how, pool, generator, moments)
        used += read
        for name, value in after.items():
            total[name] += (value - before[name]) / len(pools)
    return Shadow(change=total, used=tuple(used))


def dealt(sequences: Sequence[Ids], sites: int, *, seed: int) -> list[list[Ids]]:
    """The sequences in random order, dealt to as many sites."""
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(sequences), generator=generator).tolist()
    hands: list[list[Ids]] = [[sequences[i] for i in order[site::sites]] for site in range(sites)]
    return [hand or list(sequences) for hand in hands]


def noisy(
    foundation: Foundation, how: Recipe, weights: Weights, units: Sequence[Ids], source: Generator
) -> dict[str, Tensor]:
    """A private gradient: the records' own, each cut, their sum with noise, over ``batch``."""
    total, _ = clipped_sum(
        foundation, weights, [[unit] for unit in units], lambda norms: factor(norms, how.bound)
    )
    spread = how.sigma * how.bound
    return {
        name: (
            (total[name] + spread * torch.randn(value.shape, generator=source)) / how.batch
        ).float()
        for name, value in weights.items()
    }


def batches(how: Recipe, pool: Sequence[Ids], generator: Generator) -> list[list[Ids]]:
    """Batches in random order without repeats until the pool is read; Poisson samples with DP."""
    order = torch.randperm(len(pool), generator=generator).tolist()
    if how.sigma:
        units = [pool[i] for i in order[: how.units or len(order)]]
        rate = min(1.0, how.batch / len(units))
        drawn = torch.rand(how.steps, len(units), generator=generator) < rate
        return [[units[i] for i in row.nonzero().flatten().tolist()] for row in drawn]
    wanted = how.steps * how.batch
    while len(order) < wanted:
        order += torch.randperm(len(pool), generator=generator).tolist()
    return [[pool[i] for i in order[at : at + how.batch]] for at in range(0, wanted, how.batch)]


def number(value: Scalar) -> float:
    """A value of a protocol as a number; 0 for anything else."""
    return float(value) if isinstance(value, int | float) and not isinstance(value, bool) else 0.0


# --- private --------------------------------------------------------------------------------------


def _some(found: list[list[int]], known: Known) -> list[list[int]]:
    if not found:
        raise DataError(
            f"the attacker has {len(known.texts)} texts and none of two tokens; give it public "
            "text, or nothing can be learnt from shadow exchanges"
        )
    return found


def _course(spec: Spec, round: int) -> tuple[int, Local]:
    """Steps of a round and how they are made."""
    if spec.get("name") == "DiLoCo" and "growth" in spec:
        own: dict[str, Any] = {f.name: spec[f.name] for f in fields(DiLoCo) if f.name in spec}
        course: dict[str, Any] = asdict(DiLoCo(**own).course(round))
        chosen = {f.name: course[f.name] for f in fields(Local) if f.name in course}
        return int(course["steps"]), replace(Local(), **chosen)
    steps = int(number(spec["inner_steps"]))
    # A guard's clip is that of records; without one gradients are cut as Local says.
    known = {f.name for f in fields(Local)} - {"start", "betas", "clip", "total"}
    given: dict[str, Any] = {name: value for name, value in spec.items() if name in known}
    start, total = (round - 1) * steps, int(number(spec.get("rounds"))) * steps
    return steps, replace(Local(), start=start, total=total, **given)


def _site(
    foundation: Foundation,
    before: Weights,
    how: Recipe,
    pool: Sequence[Ids],
    generator: Generator,
    moments: Weights | None,
) -> tuple[dict[str, Tensor], dict[str, Tensor], list[tuple[int, ...]]]:
    drawn = batches(how, pool, generator)
    read = [tuple(ids) for batch in drawn for ids in batch]

    def private(held: Weights, batch: Sequence[Ids], number: int) -> dict[str, Tensor]:
        return noisy(foundation, how, held, batch, generator)

    def partial(held: Weights, batch: Sequence[Ids], number: int) -> dict[str, Tensor]:
        own = private(held, batch, number) if how.sigma else whole.gradient(foundation, held, batch)
        own |= {name: torch.zeros_like(own[name]) for name in how.frozen}
        cut = min(1.0, how.local.clip / max(norm(own), 1e-12)) if how.local.clip else 1.0
        return own if how.sigma else {name: cut * value for name, value in own.items()}

    if not how.frozen:
        rule = private if how.sigma else None
        after, kept, _ = whole.train(foundation, before, drawn, how.local, moments, gradient=rule)
        return after, kept, read
    # One step at a time: decay would move a frozen tensor, so it is set back after each.
    after, kept = dict(before), dict(moments or {})
    for number, batch in enumerate(drawn):
        local = replace(how.local, start=how.local.start + number)
        after, kept, _ = whole.train(foundation, after, [batch], local, kept, gradient=partial)
        after |= {name: before[name] for name in how.frozen}
    return after, kept, read


def _sigma(spec: Spec, batch: int, units: int) -> float:
    """The noise of a site that holds so many units, as it finds it itself; 0 without a guard."""
    known, epsilon = number(spec.get("sigma")), number(spec.get("epsilon"))
    # A guard that leaves its noise to each site carries a sigma of 0.
    if known or not epsilon or math.isinf(epsilon):
        return known
    if not units:
        raise DataError(
            "the noise of a site follows from how many units it holds, and neither the guard nor "
            "the records tell; set privacy.units in the plan"
        )
    limit = Limit(
        unit=str(spec.get("unit")),
        epsilon=epsilon,
        delta=number(spec.get("delta")),
    )
    rate = min(1.0, batch / units)
    return noise_for(limit, rate=rate, count=int(number(spec.get("steps"))))
