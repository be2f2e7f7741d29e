"""What the values of a plan may be: intervals of numbers, closed sets of words, forms of text."""

import codecs
import re
from collections.abc import Iterator, Mapping
from dataclasses import fields
from math import inf
from typing import TYPE_CHECKING

from fedkola.errors import Incompatible, PlanError

if TYPE_CHECKING:
    from fedkola.plan.tree import Plan

# Closed intervals; for maps they bound every value. An open end is written as the nearest float.
_TINY = 5e-324
_HUGE = 1.7976931348623157e308
_WORD = 2**63 - 1
_RANGES: Mapping[str, tuple[float, float]] = {
    "run.rounds": (0, _WORD),
    "run.rounds_per_window": (1, _WORD),
    "run.seed": (0, _WORD),
    "model.max_tokens": (1, _WORD),
    "model.batch": (1, _WORD),
    "model.threads": (0, _WORD),
    "task.sites": (1, _WORD),
    "task.windows": (1, _WORD),
    "task.overlap": (0, 1),
    "task.backlog": (0, 1),
    "task.per_label": (0, _WORD),
    "task.entities": (1, _WORD),
    "task.changing": (0, 1),
    "task.test_share": (0, 1),
    "scenario.noisy": (0, 1),
    "scenario.late": (1, _WORD),
    "scenario.leave": (1, _WORD),
    "scenario.quit": (1, _WORD),
    "scenario.release": (0, _WORD),
    "scenario.budget": (_TINY, inf),
    "scenario.absent": (0, 1),
    "scenario.spell": (1, _HUGE),
    "cohort.size": (0, _WORD),
    "cohort.minimum": (1, _WORD),
    "cohort.records": (0, _WORD),
    "cohort.groups_of": (0, _WORD),
    "algorithm.rank": (1, _WORD),
    "algorithm.ranks": (1, _WORD),
    "algorithm.alpha": (_TINY, _HUGE),
    "algorithm.epochs": (0, _HUGE),
    "algorithm.batch": (1, _WORD),
    "algorithm.lr": (_TINY, _HUGE),
    "algorithm.exchanges": (1, _WORD),
    "algorithm.penalty": (0, _HUGE),
    "algorithm.buffer": (0, _WORD),
    "algorithm.sample": (0, _WORD),
    "algorithm.threshold": (-_HUGE, _HUGE),
    "algorithm.temperature": (_TINY, _HUGE),
    "algorithm.core": (1, _WORD),
    "algorithm.noise": (0, _HUGE),
    "pretrain.inner_steps": (1, _WORD),
    "pretrain.growth": (0.25, 4),
    "pretrain.batch": (1, _WORD),
    "pretrain.length": (2, _WORD),
    "pretrain.lr": (_TINY, _HUGE),
    "pretrain.warmup": (0, _WORD),
    "pretrain.floor": (0, 1),
    "pretrain.weight_decay": (0, _HUGE),
    "pretrain.beta2": (0, 0.99999),
    "pretrain.bound": (0, _HUGE),
    "pretrain.bits": (2, 24),
    "pretrain.fragments": (1, _WORD),
    "pretrain.outer_lr": (_TINY, _HUGE),
    "pretrain.outer_momentum": (0, 1),
    "pretrain.outer_ramp": (0, 1),
    "pretrain.share": (1, _WORD),
    "pretrain.measured": (0, _WORD),
    "knowledge.features": (1, _WORD),
    "knowledge.bits": (1, 12),
    "knowledge.lam": (_TINY, _HUGE),
    "knowledge.slots_max": (1, _WORD),
    "knowledge.basis_seed": (0, _WORD),
    "knowledge.merge_lam": (0, _HUGE),
    "knowledge.lora_records": (0, _WORD),
    "knowledge.lora_steps": (0, _WORD),
    "knowledge.lora_floor": (0, _WORD),
    "knowledge.k_min": (1, _WORD),
    "knowledge.label_floor": (0, _WORD),
    "knowledge.scatter_share": (0, _HUGE),
    "knowledge.scatter_every": (0, 1000),
    "knowledge.spread": (_TINY, _HUGE),
    "knowledge.adapt_share": (0, _HUGE),
    "knowledge.adapt_rank": (1, _WORD),
    "knowledge.adapt_energy": (0, 1),
    "knowledge.adapt_shortened": (0, 1),
    "knowledge.top_k": (1, _WORD),
    "knowledge.tau_g": (_TINY, _HUGE),
    "knowledge.coverage_min": (0, 1),
    "knowledge.half_life": (_TINY, _HUGE),
    "knowledge.hot_cells": (0, _WORD),
    "knowledge.compact_eps": (0, 1),
    "knowledge.held_out": (0, 1),
    "knowledge.removal_batch": (0, _WORD),
    "knowledge.removal_wait": (0, _WORD),
    "privacy.colluders": (0, _WORD),
    "privacy.epsilon": (_TINY, inf),
    "privacy.delta": (0, 1),
    "privacy.clip": (_TINY, _HUGE),
    "privacy.units": (0, _WORD),
    "privacy.sequences": (1, _WORD),
    "privacy.absent": (0, _WORD),
    "quality.alpha": (_TINY, 0.5),
    "quality.act_above": (0, 1),
    "quality.trusted_min": (20, _WORD),
    "quality.regions": (1, 65536),
    "quality.kappa": (_TINY, _HUGE),
    "quality.refits": (1, 20),
    "quality.min_peers": (1, _WORD),
    "robust.tau": (0, inf),
    "robust.assume_liars": (0, 1),
    "robust.momentum": (0, 0.99),
    "engine.order": (0, _WORD),
    "site.minimum": (1, _WORD),
    "site.rehearsal_days": (0, _HUGE),
    "audit.canaries": (0, 16),
    "release.sequences": (0, 1),
    "release.presence_auc": (0, 1),
    "release.canary_epsilon": (0, _HUGE),
    "release.epsilon": (_TINY, inf),
    "release.delta": (0, 1),
    "release.age_days": (0, _HUGE),
}
_LEVELS = ("record", "pooled", "site")
_UNITS = ("patient", "record")
_AVAILABILITY = ("full", "bernoulli", "markov", "diurnal")
_POOLINGS = ("mean", "last")
_OUTER = ("average", "nesterov", "primal", "tune")
_OPTIMISERS = ("adamw", "sgd")
_DOWN = ("float32", "float16", "change", "change4")
_MOMENTS = ("own", "shared")
_WEIGHTS = ("equal", "tokens")
_PRECISIONS = ("float32", "bfloat16")
_QUALITY = ("off", "report", "filter", "down_weight")
_RELIABILITY = ("off", "warn", "regroup")
_PERIODS = ("year", "quarter")
_RUN_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
_EMBEDDINGS = ("refuse", "presence-disclosed")
_WAIVABLE = ("gate_span", "gate_adapters")
_ROUNDS = re.compile(r"all|first|middle|last|(every:)?[1-9]\d{0,8}")
_PARTITION = re.compile(r"iid|by-label|dirichlet:(\d+(?:\.\d*)?(?:e[+-]?\d+)?)")


def check(plan: "Plan") -> None:
    """Raise PlanError for a value out of its range, Incompatible for two that are at odds."""
    for name, value in _numbers(plan):
        key = ".".join(name.split(".", 2)[:2])
        low, high = _RANGES[key]
        # Written so that NaN, which compares as false, is refused.
        if not low <= value <= high:
            raise PlanError(f"{name} was given {value}; expected {_interval(low, high)}")
    if not _RUN_NAME.fullmatch(plan.run.name):
        raise PlanError(
            f"run.name was given {plan.run.name!r}; expected up to 64 letters, digits, '.', '_' or"
            " '-', as it names a folder"
        )
    partition = _PARTITION.fullmatch(plan.task.partition)
    if partition is None or (partition[1] is not None and float(partition[1]) <= 0):
        raise PlanError(
            f"task.partition was given {plan.task.partition!r};"
            ' expected "iid", "by-label" or "dirichlet:0.5" with a number above 0'
        )
    for given in plan.audit.rounds:
        if not _ROUNDS.fullmatch(given):
            raise PlanError(
                f"audit.rounds was given {given!r};"
                ' expected "first", "middle", "last", "every:10", "all" or the number of a round'
            )
    try:
        codecs.lookup(plan.task.encoding)
    except (LookupError, ValueError) as error:
        raise PlanError(
            f"task.encoding was given {plan.task.encoding!r};"
            ' expected an encoding that Python knows, such as "utf-8" or "cp1252"'
        ) from error
    for key, given, known in (
        ("model.pooling", plan.model.pooling, _POOLINGS),
        ("task.period", plan.task.period, _PERIODS),
        ("pretrain.optimiser", plan.pretrain.optimiser, _OPTIMISERS),
        ("pretrain.outer", plan.pretrain.outer, _OUTER),
        ("pretrain.second", plan.pretrain.second, _MOMENTS),
        ("pretrain.down", plan.pretrain.down, _DOWN),
        ("pretrain.weight", plan.pretrain.weight, _WEIGHTS),
        ("pretrain.precision", plan.pretrain.precision, _PRECISIONS),
        ("quality.mode", plan.quality.mode, _QUALITY),
        ("robust.reliability", plan.robust.reliability, _RELIABILITY),
        ("privacy.level", plan.privacy.level, _LEVELS),
        ("privacy.unit", plan.privacy.unit, _UNITS),
        ("scenario.availability", plan.scenario.availability, _AVAILABILITY),
        ("site.embedding", plan.site.embedding, _EMBEDDINGS),
        *(("site.waive", code, _WAIVABLE) for code in plan.site.waive),
    ):
        if given not in known:
            raise PlanError(f"{key} was given {given!r}; expected one of {', '.join(known)}")
    absent, spell = plan.scenario.absent, plan.scenario.spell
    # After an absence a site is there for a round at least, or the spells would run together.
    if plan.scenario.availability == "markov" and absent * (spell + 1) > spell:
        longest = f"{absent / (1 - absent):g} or more" if absent < 1 else "no length at all"
        raise Incompatible(
            f"scenario.absent = {absent:g} with absences of scenario.spell = {spell:g} rounds "
            f"leaves no round between two absences; lower absent, or make spell {longest}"
        )
    if 0 < plan.cohort.size < plan.cohort.minimum:
        raise Incompatible(
            f"cohort.size {plan.cohort.size} is below cohort.minimum {plan.cohort.minimum};"
            " raise the size (0 asks all sites) or lower the minimum"
        )


def _numbers(plan: "Plan") -> Iterator[tuple[str, float]]:
    """Every number of the plan by its dotted name, entries of maps included."""
    for section in fields(plan):
        part = getattr(plan, section.name)
        for key in fields(part):
            value, name = getattr(part, key.name), f"{section.name}.{key.name}"
            entries = value if isinstance(value, Mapping) else {"": value}
            for entry, number in entries.items():
                if isinstance(number, int | float) and not isinstance(number, bool):
                    yield f"{name}.{entry}".rstrip("."), number


def _interval(low: float, high: float) -> str:
    floor = "above 0" if low == _TINY else f"of at least {low:g}"
    if high == _WORD:
        return f"a whole number {floor} and below 2^63"
    if high in (_HUGE, inf):
        return f"a {'finite ' if high == _HUGE else ''}number {floor}"
    return f"a number from {low:g} to {high:g}"
