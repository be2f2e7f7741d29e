"""What suite ``dynamic`` measures: the streams with their sizes, and the rows of their tables.

A setup is plan settings, so that every cell of a table is a plan that ``fedkola run`` accepts.
All rows of a stream have the same model, data, order of arrival and number of exchanges a window;
every trained method is tuned on the same grid of rates, on a seed that is used for nothing else.
"""

from collections.abc import Mapping
from dataclasses import dataclass, fields

from fedkola.plan import Knowledge

MOST_RATE = 8e-3
OWN = "fedkola"
READ_OUT = " + tree read-out"
"""What a row is called that reads another one's representation with our head."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One line of a table: a method with its settings.

    ``tuned`` rows have a rate to be chosen; ``streamed`` ones live on the stream: they are measured
    after every window and their traffic is counted. ``pooled`` ones see the union of all records.
    ``reads`` names the keys of [knowledge] that the method reads, which only then enter its plan
    and say whether a cell must be measured anew; None is all of them.
    """

    settings: tuple[str, ...]
    about: str
    reads: tuple[str, ...] | None = None
    tuned: bool = False
    streamed: bool = True
    pooled: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Size:
    """How large a profile is. ``tuning`` makes the runs smaller that choose a rate: of ``rates``,
    and of their doubles up to MOST_RATE while the largest one tried is clearly the best."""

    seeds: int
    settings: tuple[str, ...]
    rows: tuple[str, ...]
    rates: tuple[float, ...] = (1e-3,)
    tuning: tuple[str, ...] = ()
    watched: float = 1.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Setup:
    """One stream: the question it asks, the settings of all its plans, and its profiles.

    ``story`` is the row whose story its page tells, ``control`` the row to be held against it and
    what that one is; without it that is the best baseline.
    """

    question: str
    settings: tuple[str, ...]
    sizes: Mapping[str, Size]
    story: str = OWN
    control: tuple[str, str] = ("", "")


# What the server itself reads, and the seed of features and pinned factors.
_ALWAYS = ("basis_seed", "held_out", "membership")
_RIDGE = (*_ALWAYS, "features", "bits", "lam")


def _trained(name: str, about: str, *settings: str) -> Row:
    return Row(
        settings=(f"algorithm.name={name}", *settings), about=about, tuned=True, reads=_ALWAYS
    )


# Steps and rate of the shared adaptation were chosen on three tenths of the synonyms of the chapter
# stream, centrally: about a thousand records a step. The base adapts anew with every third more
# records, as it helps little with chapters that it has not seen.
_ADAPTED = (
    "algorithm.name=adapted",
    'knowledge.lanes=["analytic"]',
    "knowledge.adapt_rank=16",
    "knowledge.adapt_share=0.333",
    "algorithm.exchanges=48",
    "algorithm.epochs=1",
    "algorithm.lr=2e-3",
)

# What waits for company gets eight rounds after the last window, cheap ones where nothing opens.
_AWAY = (
    "algorithm.name=fedkola",
    "scenario.availability=bernoulli",
    "scenario.absent=0.3",
)
_ONCE = (
    *_AWAY,
    "run.rounds=16",
    'scenario.late={"harbour-infectious"=3, "oldtown-metabolic"=4}',
)

ROWS: Mapping[str, Row] = {
    "local": Row(
        settings=("algorithm.name=local",),
        about="every site alone, the mean of their answers; nothing is sent",
        reads=(*_RIDGE, "spread", "readout", "merge", "merge_lam", "half_life"),
        streamed=False,
    ),
    "fedit": _trained("fedit", "A, B and head averaged"),
    "ffa_lora": _trained("ffa_lora", "A frozen, B averaged"),
    "rolora": _trained("rolora", "A and B in turn"),
    "flora": _trained("flora", "factors stacked, merged into the base"),
    "fedex_lora": _trained("fedex_lora", "FedIT and the exact residual"),
    "fed_sb": _trained("fed_sb", "a core between pinned factors"),
    "o_lora": _trained("o_lora", "a new adapter a window, orthogonal to the old ones"),
    "slao": _trained("slao", "orthogonal starts, merges weighted by time"),
    "fot": _trained("fot", "updates off the subspace of old inputs"),
    "lorm": _trained("lorm", "closed-form merge of A and B"),
    "disco": _trained("disco", "an adapter a cluster of tasks, mixed by likeness"),
    "hpfl": _trained("hpfl", "a store of sites' own adapters, the nearest answers"),
    "feddrift": _trained("feddrift", "models split where losses drift apart"),
    "replay": _trained("replay", "FedIT with a reservoir of old records at every site"),
    "ewc": _trained("ewc", "FFA-LoRA held to its old weights by summed Fisher"),
    "afcl": Row(
        settings=("algorithm.name=afcl",),
        about="one sample-weighted ridge on frozen features",
        reads=_RIDGE,
    ),
    "fedkola": Row(settings=("algorithm.name=fedkola",), about="the bank, analytic lane"),
    "adapted": Row(
        settings=(*_ADAPTED, "knowledge.scatter_every=0"),
        about="the bank on a base that the sites adapt together",
    ),
    "adapted-wide": Row(
        settings=(*_ADAPTED, "knowledge.features=12288", "knowledge.scatter_every=0"),
        about="the bank on a base that the sites adapt together, 12,288 features",
    ),
    "adapted-narrow": Row(
        settings=(*_ADAPTED, "knowledge.features=2048", "algorithm.epochs=6"),
        about="the bank on a base adapted in six passes, 2,048 features",
    ),
    "fedkola-cheap": Row(
        settings=("algorithm.name=fedkola", "knowledge.features=1024"),
        about="the bank, analytic lane, 1,024 features",
    ),
    "fedkola-wide": Row(
        settings=("algorithm.name=fedkola", "knowledge.features=8192"),
        about="the bank, analytic lane, 8,192 features",
    ),
    "fedkola-lora": Row(
        settings=("algorithm.name=fedkola", 'knowledge.lanes=["router", "lora"]'),
        about="the bank, LoRA modules chosen by the router",
        tuned=True,
    ),
    "fedkola-away": Row(
        settings=(*_ONCE, 'scenario.quit={"lakeside-eye-ear"=6}'),
        about="the bank where three of ten sites miss each round, two come late, one quits",
    ),
    "fedkola-away-twice": Row(
        settings=(
            *_AWAY,
            "run.rounds_per_window=2",
            "run.rounds=24",
            'scenario.late={"harbour-infectious"=5, "oldtown-metabolic"=7}',
            'scenario.quit={"lakeside-eye-ear"=12}',
        ),
        about="the same with two rounds a window",
    ),
    "fedkola-forgets": Row(
        settings=(*_ONCE, 'scenario.leave={"lakeside-eye-ear"=6}'),
        about="the bank where three of ten miss each round, two come late, one is forgotten",
    ),
    "oracle": _trained("oracle", "an adapter per true scope, routed by the truth"),
    "joint": Row(
        settings=("algorithm.name=joint",),
        about="one model on the union of all records",
        reads=(*_RIDGE, "spread"),
        tuned=True,
        streamed=False,
        pooled=True,
    ),
}


def is_own(row: str) -> bool:
    """Our own method with its variants, on the frozen base or on an adapted one."""
    return row.split("-")[0] in (OWN, "adapted")


def is_bound(row: str) -> bool:
    """Rows that no deployment could be: records pooled, or the truth told."""
    about = ROWS.get(row.removesuffix(READ_OUT))
    return row == "oracle" or (about is not None and about.pooled)


def unread(row: str) -> tuple[str, ...]:
    """Keys of a plan that this row does not read, as "section.key"."""
    reads = ROWS[row].reads
    keys = (key.name for key in fields(Knowledge))
    return () if reads is None else tuple(f"knowledge.{key}" for key in keys if key not in reads)


ALL = tuple(row for row in ROWS if row == OWN or not is_own(row))

_COMMON = ("cohort.minimum=3", "knowledge.public_reference=true")
# Synonyms are worded otherwise than descriptions: chosen on three tenths of them (readout.py).
_SYNONYMS = ("task.name=icd10cm", "task.level=block", "knowledge.spread=0.2")
_RATES = (2.5e-4, 5e-4, 1e-3, 2e-3)
# Few labels a window: a small Gram at growing intervals, and no router between scopes.
_CHEAP = ('knowledge.lanes=["analytic"]', "knowledge.scatter_share=1")

SETUPS: Mapping[str, Setup] = {
    "icd-chapters": Setup(
        question="The 22 chapters of ICD-10-CM arrive at twelve hospitals over eight windows; "
        "which of 285 blocks does a clinician's synonym belong to?",
        settings=(*_COMMON, *_SYNONYMS, "knowledge.slots_max=22"),
        sizes={
            "quick": Size(
                seeds=1,
                settings=(
                    "task.sites=5",
                    "task.windows=3",
                    "task.per_label=3",
                    "knowledge.features=512",
                    "model.max_tokens=32",
                ),
                rows=ALL,
            ),
            "standard": Size(
                seeds=5,
                settings=(
                    "task.sites=12",
                    "task.windows=8",
                    "knowledge.features=6528",
                    'knowledge.lanes=["analytic"]',
                    "knowledge.scatter_share=0.3",
                    "knowledge.scatter_every=4",
                ),
                rows=(
                    "local",
                    "fedkola-cheap",
                    "fedkola",
                    "fedkola-wide",
                    "adapted",
                    "adapted-wide",
                    "joint",
                ),
                tuning=("task.per_label=20",),
                rates=(2e-4, 5e-4, 1e-3),
                watched=0.2,
            ),
        },
    ),
    "icd-small": Setup(
        question="The chapter stream with at most 20 descriptions of a block, small enough for "
        "every method: which of 285 blocks does a clinician's synonym belong to?",
        settings=(
            *_COMMON,
            *_SYNONYMS,
            "task.sites=12",
            "task.windows=8",
            "task.per_label=20",
            "knowledge.slots_max=22",
            "algorithm.exchanges=2",
        ),
        sizes={"standard": Size(seeds=5, settings=(), rows=ALL, rates=_RATES, watched=0.2)},
    ),
    "availability": Setup(
        question="Three of ten hospitals miss each round, two join in windows 3 and 4, one is gone "
        "after window 6: what is lost eight rounds after the last window?",
        story="fedkola-away",
        control=(OWN, "whose sites answer in every round"),
        settings=(
            *_COMMON,
            *_SYNONYMS,
            "task.sites=12",
            "task.windows=8",
            "run.rounds=10",
            "knowledge.slots_max=22",
        ),
        sizes={
            "quick": Size(
                seeds=1,
                settings=("task.per_label=5", "knowledge.features=512"),
                rows=("fedkola", "fedkola-away"),
            ),
            "standard": Size(
                seeds=5,
                settings=("knowledge.features=2048",),
                rows=("fedkola", "fedkola-away", "fedkola-away-twice", "fedkola-forgets"),
                watched=0.2,
            ),
        },
    ),
    "static-iid": Setup(
        question="Nothing arrives later and every site holds the same mixture: what does a bank "
        "lose to trained adapters that send as many bytes?",
        settings=(
            *_COMMON,
            "task.name=cl-text",
            "task.order=agnews",
            "task.partition=iid",
            'knowledge.lanes=["analytic"]',
            "knowledge.features=5120",
        ),
        sizes={
            "standard": Size(
                seeds=5,
                settings=("task.per_label=250", "algorithm.exchanges=6"),
                rows=("fedkola", "adapted-narrow", "fedit", "ffa_lora", "fedex_lora"),
                rates=_RATES,
            )
        },
    ),
    "icd-releases": Setup(
        question="Releases of ICD-10-CM of 2021, 2025 and 2026 follow each other: are new codes "
        "answered at once, and retired ones no more?",
        settings=(
            *_COMMON,
            "task.name=icd-releases",
            "task.level=code",
            "task.windows=3",
            "knowledge.slots_max=32",
            "knowledge.features=2048",
            "knowledge.scatter_share=0.3",
        ),
        sizes={"standard": Size(seeds=5, settings=(), rows=("local", "fedkola", "joint"))},
    ),
    "who-don": Setup(
        question="Outbreak news of the WHO arrive by date and are asked before they are learnt: "
        "which disease does a report of 2012 to 2018 tell of?",
        settings=(
            *_COMMON,
            "task.name=who-don",
            "task.period=quarter",
            "knowledge.features=1024",
            "knowledge.scatter_share=0.3",
        ),
        sizes={
            "standard": Size(
                seeds=5,
                settings=(),
                rows=("fedit", "replay", "afcl", "fedkola"),
                rates=(1e-3, 2e-3),
            )
        },
    ),
    "cl-text": Setup(
        question="AG News, Amazon, Yelp, DBpedia and SST-2 arrive one after the other.",
        settings=(
            *_COMMON,
            *_CHEAP,
            "task.name=cl-text",
            "knowledge.features=512",
            "algorithm.exchanges=2",
        ),
        sizes={
            "standard": Size(
                seeds=3,
                settings=("task.per_label=40", "model.max_tokens=64"),
                rows=ALL,
                rates=_RATES,
                tuning=("task.per_label=16",),
                watched=0.3,
            )
        },
    ),
    "clinc150": Setup(
        question="Ten domains of CLINC150 arrive at twelve sites: which of 150 intents is meant?",
        settings=(
            *_COMMON,
            *_CHEAP,
            "task.name=clinc150",
            "knowledge.features=768",
            "algorithm.exchanges=2",
        ),
        sizes={
            "standard": Size(
                seeds=3,
                settings=("task.per_label=20",),
                rows=ALL,
                rates=_RATES,
                tuning=("task.per_label=8",),
                watched=0.3,
            )
        },
    ),
    "facts-lm": Setup(
        question="The same with a causal model, which `python benchmarks/pretrain_facts.py "
        ".cache/facts-base` makes: it knows the language and no fact.",
        settings=(
            *_COMMON,
            "task.name=facts",
            "model.name=.cache/facts-base",
            "model.pooling=last",
            "knowledge.features=1024",
        ),
        sizes={
            "standard": Size(
                seeds=3,
                settings=(),
                rows=("fedit", "replay", "fedkola", "fedkola-lora", "joint"),
                rates=_RATES,
            )
        },
    ),
    "facts": Setup(
        question="Generated facts of which a share changes in every window: is the new value "
        "answered, the old one no more, and the rest kept?",
        settings=(*_COMMON, "task.name=facts"),
        sizes={
            "quick": Size(
                seeds=1,
                settings=("task.windows=4", "knowledge.features=512"),
                rows=("local", "fedit", "fedkola", "joint"),
            ),
            "standard": Size(
                seeds=5,
                settings=("knowledge.features=2048",),
                rows=("local", "fedit", "replay", "afcl", "fedkola", "joint"),
                rates=_RATES,
            ),
        },
    ),
}
