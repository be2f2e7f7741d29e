"""Every plan survives every way of writing it down."""

import json
from math import inf

from hypothesis import given
from hypothesis import strategies as st

from fedkola.plan import (
    Algorithm,
    Audit,
    Cohort,
    Demands,
    Engine,
    Knowledge,
    Model,
    Plan,
    Pretrain,
    Privacy,
    Quality,
    Release,
    Robust,
    Run,
    Scenario,
    Task,
    as_dict,
    digest,
    dump,
    from_dict,
    override,
    parse,
)

texts = st.text(st.characters(exclude_categories=("Cs",)), max_size=12)
counts = st.integers(0, 2**63 - 1)
positive = st.integers(1, 2**63 - 1)
shares = st.floats(0, 1)
above_zero = st.floats(min_value=0, exclude_min=True, allow_infinity=False)

plans = st.builds(
    Plan,
    run=st.builds(
        Run,
        name=st.from_regex(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}", fullmatch=True),
        rounds=counts,
        rounds_per_window=positive,
        seed=counts,
        folder=texts,
    ),
    model=st.builds(
        Model,
        name=texts,
        max_tokens=positive,
        pooling=st.sampled_from(["mean", "last"]),
        batch=positive,
        threads=counts,
    ),
    task=st.builds(
        Task,
        name=texts,
        level=texts,
        sites=positive,
        windows=positive,
        overlap=shares,
        backlog=shares,
        per_label=counts,
        folder=texts,
        order=texts,
        period=st.sampled_from(["year", "quarter"]),
        entities=positive,
        changing=shares,
        train=texts,
        test=texts,
        test_share=shares,
        text=texts,
        encoding=st.sampled_from(["utf-8", "cp1252", "latin-1"]),
        partition=st.sampled_from(["iid", "by-label", "dirichlet:0.5", "dirichlet:1e-3"]),
        labels=st.lists(texts, max_size=3).map(tuple),
        unlabelled=st.booleans(),
    ),
    scenario=st.builds(
        Scenario,
        noisy=st.dictionaries(texts, shares, max_size=3),
        noise=texts,
        target=texts,
        liars=st.dictionaries(texts, texts, max_size=3),
        late=st.dictionaries(texts, positive, max_size=3),
        leave=st.dictionaries(texts, positive, max_size=3),
        quit=st.dictionaries(texts, positive, max_size=3),
        release=st.dictionaries(texts, counts, max_size=3),
        access=st.dictionaries(texts, st.lists(texts, max_size=3).map(tuple), max_size=3),
        budget=st.dictionaries(texts, above_zero, max_size=3),
        availability=st.sampled_from(["full", "bernoulli", "markov", "diurnal"]),
        absent=st.floats(0, 0.5),
        spell=st.floats(1, 1e6),
    ),
    cohort=st.builds(
        Cohort,
        size=st.sampled_from([0, 5, 2**63 - 1]),
        minimum=st.integers(1, 5),
        records=counts,
        groups_of=counts,
    ),
    algorithm=st.builds(
        Algorithm,
        name=texts,
        rank=positive,
        ranks=st.dictionaries(texts, positive, max_size=3),
        alpha=above_zero,
        epochs=above_zero,
        batch=positive,
        lr=above_zero,
        exchanges=positive,
        penalty=st.floats(min_value=0, allow_infinity=False),
        buffer=counts,
        sample=counts,
        threshold=st.floats(allow_nan=False, allow_infinity=False),
        temperature=above_zero,
        core=positive,
        noise=st.floats(min_value=0, allow_infinity=False),
    ),
    pretrain=st.builds(
        Pretrain,
        inner_steps=positive,
        growth=st.floats(0.25, 4),
        batch=positive,
        length=st.integers(2, 2**63 - 1),
        optimiser=st.sampled_from(["adamw", "sgd"]),
        lr=above_zero,
        warmup=counts,
        floor=shares,
        weight_decay=st.floats(min_value=0, allow_infinity=False),
        beta2=st.floats(0, 0.99999),
        second=st.sampled_from(["own", "shared"]),
        bound=st.floats(min_value=0, allow_infinity=False),
        bits=st.integers(2, 24),
        fragments=positive,
        outer=st.sampled_from(["average", "nesterov", "primal", "tune"]),
        outer_lr=above_zero,
        outer_momentum=shares,
        outer_ramp=shares,
        down=st.sampled_from(["float32", "float16", "change", "change4"]),
        feedback=st.booleans(),
        weight=st.sampled_from(["equal", "tokens"]),
        share=positive,
        precision=st.sampled_from(["float32", "bfloat16"]),
        measured=counts,
        prompts=st.lists(texts, max_size=3).map(tuple),
    ),
    knowledge=st.builds(
        Knowledge,
        features=positive,
        bits=st.integers(1, 12),
        readout=texts,
        lam=above_zero,
        lanes=st.lists(texts, max_size=3).map(tuple),
        tau_g=above_zero,
        public_reference=st.booleans(),
        scatter_share=st.floats(0, 1e9),
        scatter_every=st.integers(0, 1000),
        adapt_share=st.floats(0, 1e9),
        adapt_rank=st.integers(1, 4096),
        adapt_energy=st.floats(0, 1),
        spread=st.floats(0.01, 10),
        adapt_shortened=st.floats(0, 1),
        coverage_min=shares,
        half_life=st.none() | above_zero,
        hot_cells=counts,
        compact_eps=shares,
        held_out=shares,
        removal_batch=counts,
        removal_wait=counts,
    ),
    privacy=st.builds(
        Privacy,
        secure_sum=st.booleans(),
        colluders=counts,
        epsilon=above_zero | st.just(inf),
        delta=shares,
        level=st.sampled_from(["record", "pooled", "site"]),
        unit=st.sampled_from(["patient", "record"]),
        clip=above_zero,
        units=counts,
        sequences=positive,
        absent=counts,
    ),
    quality=st.builds(
        Quality,
        mode=st.sampled_from(["off", "report", "filter", "down_weight"]),
        absorb=st.booleans(),
        alpha=st.floats(min_value=1e-6, max_value=0.5),
        act_above=shares,
        trusted_min=st.integers(20, 2**63 - 1),
        regions=st.integers(1, 65536),
        kappa=above_zero,
        refits=st.integers(1, 20),
        names=st.booleans(),
        min_peers=positive,
    ),
    robust=st.builds(
        Robust,
        rule=texts,
        tau=st.floats(min_value=0),
        assume_liars=shares,
        reliability=st.sampled_from(["off", "warn", "regroup"]),
        root=texts,
        momentum=st.floats(0, 0.99),
    ),
    engine=st.builds(Engine, name=texts, order=counts),
    site=st.builds(
        Demands,
        minimum=positive,
        plain=st.booleans(),
        embedding=st.sampled_from(["refuse", "presence-disclosed"]),
        waive=st.lists(st.sampled_from(["gate_span", "gate_adapters"]), max_size=2).map(tuple),
        rehearsal_days=st.floats(0, 1e6),
    ),
    audit=st.builds(
        Audit,
        record=st.booleans(),
        rounds=st.lists(
            st.sampled_from(["all", "first", "middle", "last", "every:7", "12"]), max_size=3
        ).map(tuple),
        canaries=st.integers(0, 16),
    ),
    release=st.builds(
        Release,
        sequences=shares,
        presence_auc=shares,
        canary_epsilon=st.floats(0, 1e6),
        epsilon=above_zero | st.just(inf),
        delta=shares,
        age_days=st.floats(0, 1e6),
    ),
)


@given(plans)
def test_every_plan_reads_back_from_its_text(plan: Plan):
    assert parse(dump(plan)) == plan
    assert dump(parse(dump(plan))) == dump(plan)


@given(plans)
def test_every_plan_reads_back_from_json_with_the_same_digest(plan: Plan):
    again = from_dict(json.loads(json.dumps(as_dict(plan), allow_nan=False)))
    assert again == plan
    assert digest(again) == digest(plan)


@given(plans, plans)
def test_two_plans_have_one_digest_only_if_they_are_equal(one: Plan, other: Plan):
    assert (digest(one) == digest(other)) == (as_dict(one) == as_dict(other))


@given(plans, counts, shares)
def test_a_setting_changes_its_own_key_and_nothing_else(plan: Plan, seed: int, share: float):
    doc = as_dict(plan)
    doc["run"]["seed"] = seed
    doc["scenario"]["noisy"]["north"] = share
    assert override(plan, [f"run.seed={seed}", f"scenario.noisy.north={share!r}"]) == from_dict(doc)
