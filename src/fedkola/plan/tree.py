"""The tree of a plan: a frozen dataclass for each section, and ``Plan`` that holds them all.

Names of tasks, models and algorithms are closed tables elsewhere: here they are only text.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from math import inf

from fedkola.plan.ranges import check


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """A window of the stream spans ``rounds_per_window`` rounds: its records reach their sites in
    the first one, and in the others sites are asked again for what still waits. ``rounds`` 0 means
    as many as the windows span; more of them follow the last window."""

    name: str = "run"
    rounds: int = 0
    rounds_per_window: int = 1
    seed: int = 7
    folder: str = "runs"


@dataclass(frozen=True, slots=True, kw_only=True)
class Model:
    """``name`` is "minilm", a folder or a Hugging Face id; ``threads`` 0 leaves torch's default.
    ``pooling`` is "mean" or, for a causal model, "last"."""

    name: str = "minilm"
    max_tokens: int = 64
    pooling: str = "mean"
    batch: int = 32
    threads: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Task:
    """Where records come from. Keys from ``train`` on are read by the task "files" alone, except
    ``test_share`` and ``partition``, which other tasks read where their data leaves them open.

    ``level`` is the level reported ("" is the leaf), ``per_label`` caps the training records of a
    reported label (0 is no cap). ``folder`` holds the files of a public corpus; "" looks below the
    folder that the environment variable FEDKOLA_DATA names. ``order`` is the order in which the
    sets of ``cl-text`` arrive, ``period`` the length of a window where records have dates ("year"
    or "quarter"). ``entities`` are those of ``facts``, ``changing`` the share of their facts that
    change in a window. ``train`` is a file, or a pattern where each file is one site.
    ``text``, ``label``, ``time``, ``patient``, ``record``, ``site``, ``scope`` and ``window`` name
    columns; "" means that there is no such column. ``partition`` is "iid", "by-label" or
    "dirichlet:" and a concentration. ``unlabelled`` is the text of a causal language model.
    """

    name: str = "icd10cm"
    level: str = ""
    sites: int = 12
    windows: int = 8
    overlap: float = 0.1
    backlog: float = 0.0
    per_label: int = 0
    folder: str = ""
    order: str = ""
    period: str = "year"
    entities: int = 64
    changing: float = 0.1
    train: str = ""
    test: str = ""
    test_share: float = 0.2
    text: str = "text"
    label: str = "label"
    time: str = ""
    patient: str = ""
    record: str = ""
    site: str = ""
    scope: str = ""
    window: str = ""
    encoding: str = "utf-8"
    partition: str = "iid"
    labels: tuple[str, ...] = ()
    unlabelled: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Scenario:
    """What goes wrong. By site: the share of records that are wrong (``noise`` says how, ``target``
    where poison leads), what it lies about its sums (``liars``), the first round it answers, the
    round after which it leaves and is forgotten, or only answers no more (``quit``), the windows
    by which news reaches it later (``release``), the scopes it may use (``access``; a site that is
    not named may use all), the epsilon that it may spend at most (``budget``).

    ``availability`` says how sites come and go: "full", "bernoulli", "markov" or "diurnal", with
    ``absent`` the long-run share of rounds that a site misses and ``spell`` the mean length of an
    absence in rounds ("markov" and "diurnal").
    """

    noisy: Mapping[str, float] = field(default_factory=dict)
    noise: str = "symmetric"
    target: str = ""
    liars: Mapping[str, str] = field(default_factory=dict)
    late: Mapping[str, int] = field(default_factory=dict)
    leave: Mapping[str, int] = field(default_factory=dict)
    quit: Mapping[str, int] = field(default_factory=dict)
    release: Mapping[str, int] = field(default_factory=dict)
    access: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    budget: Mapping[str, float] = field(default_factory=dict)
    availability: str = "full"
    absent: float = 0.3
    spell: float = 3.0

    @property
    def gone(self) -> Mapping[str, int]:
        """The last round that a site answers, for sites that leave or quit."""
        return {**self.quit, **self.leave}


@dataclass(frozen=True, slots=True, kw_only=True)
class Cohort:
    """Sites asked in a round (0 is all of them), the least that must answer, and the most records
    that one of them may answer for (0 is any number). ``groups_of`` sites are summed at a time
    where the algorithm combines sums by a rule (0: all of them, 1: single updates)."""

    size: int = 0
    minimum: int = 3
    records: int = 0
    groups_of: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Algorithm:
    """``exchanges`` counts the training exchanges per round of iterated methods. ``ranks`` gives
    sites a rank of their own, where a method can add adapters of unequal ranks. Baselines read the
    last ones, each its own: the weight of a penalty, the records a site keeps for replay (0
    keeps none), the records it draws for an estimate (0 draws all), a threshold between tasks or
    modules, the temperature of a gate, the size of a core between pinned factors, the noise of a
    marker."""

    name: str = "fedkola"
    rank: int = 8
    ranks: Mapping[str, int] = field(default_factory=dict)
    alpha: float = 16.0
    epochs: float = 1.0
    batch: int = 32
    lr: float = 1e-3
    exchanges: int = 1
    penalty: float = 1.0
    buffer: int = 64
    sample: int = 64
    threshold: float = 0.9
    temperature: float = 0.05
    core: int = 32
    noise: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Pretrain:
    """Training of the whole model, read by the algorithm "diloco" alone.

    ``inner_steps`` is the mean number of steps between exchanges, ``growth`` above 1 makes them
    rarer with time; ``length`` counts tokens. ``optimiser`` is "adamw", or "sgd", of which single
    steps are FedSGD. ``second`` says whether second moments of AdamW, which keep ``beta2`` of
    themselves a step, are each site's "own" or "shared". ``bound`` is the
    greatest norm of a delta (0: any), ``bits`` those of one of its coordinates, ``fragments`` the
    parts that take turns. ``outer_momentum`` rises over the first ``outer_ramp`` of the rounds.
    ``down`` is how weights come back: "float32", "float16", "change" or
    "change4". ``weight`` is "equal" or "tokens", in units of ``share`` tokens. ``measured``
    held-out sequences of a site are scored after each round (0: all), and ``prompts`` continued.
    """

    inner_steps: int = 32
    growth: float = 1.0
    batch: int = 8
    length: int = 128
    optimiser: str = "adamw"
    lr: float = 1e-3
    warmup: int = 20
    floor: float = 0.1
    weight_decay: float = 0.1
    beta2: float = 0.95
    second: str = "own"
    bound: float = 0.0
    bits: int = 12
    fragments: int = 1
    outer: str = "average"
    outer_lr: float = 0.7
    outer_momentum: float = 0.5
    outer_ramp: float = 0.0
    down: str = "float32"
    feedback: bool = False
    weight: str = "equal"
    share: int = 1024
    precision: str = "float32"
    measured: int = 32
    prompts: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Knowledge:
    """The bank of cells. ``half_life`` is in windows (None never ages); ``lora_records`` 0 trains
    on all records, ``lora_steps`` 0 passes once over them; cells of fewer than ``lora_floor``
    records have no LoRA lane. A Gram is summed when ``scatter_share`` times the records that have
    one wait for theirs: 0 is every round, 1 is rounds 1, 2, 4, 8 of equal windows. With
    ``scatter_every`` above 0 it is summed in every such round instead, and in the first."""

    features: int = 4096
    bits: int = 4
    readout: str = "tree"
    lam: float = 1e-4
    spread: float = 1.0
    lanes: tuple[str, ...] = ("analytic", "router")
    slots_max: int = 48
    basis_seed: int = 0
    merge: str = "gram"
    merge_lam: float = 1e-3
    lora_records: int = 0
    lora_steps: int = 0
    lora_floor: int = 0
    k_min: int = 3
    label_floor: int = 16
    public_reference: bool = False
    scatter_share: float = 0.0
    scatter_every: int = 0
    adapt_share: float = 1.0
    adapt_rank: int = 32
    adapt_energy: float = 1.0
    adapt_shortened: float = 0.5
    membership: str = "padded"
    top_k: int = 3
    tau_g: float = 1.0
    coverage_min: float = 0.5
    half_life: float | None = None
    hot_cells: int = 256
    compact_eps: float = 0.0
    held_out: float = 0.0
    removal_batch: int = 0
    removal_wait: int = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Privacy:
    """``epsilon`` inf makes no formal claim. A finite one needs a ``level``: "record" adds noise
    at each site for every ``unit`` ("patient" or "record") of it, "pooled" hides a unit and "site"
    a whole site by noise inside a secure sum, of which ``absent`` addends may be missing. ``clip``
    bounds the norm of one unit's gradient or one site's change, ``sequences`` how many sequences
    of a unit a step reads. ``units`` is the public number of units that every site has at least
    (0: each takes its own number for no secret). ``colluders`` is the number of sites that may
    work together with the server under secure aggregation."""

    secure_sum: bool = False
    colluders: int = 0
    epsilon: float = inf
    delta: float = 1e-6
    level: str = "record"
    unit: str = "patient"
    clip: float = 1.0
    units: int = 0
    sequences: int = 4
    absent: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Quality:
    """What is done about imperfect records (see ``algorithms.quality_scan``).

    ``mode`` is "off", "report", "filter" or "down_weight"; the last two act only where at least
    ``act_above`` of the records are shown to be wrong by ``trusted_min`` records that people have
    checked. ``alpha`` is the share of correct records that may be flagged. ``absorb`` lets a record
    count for what it is believed to say. ``names`` reads what the catalogue says of labels. Counts
    of other sites below ``min_peers`` are not told."""

    mode: str = "off"
    absorb: bool = False
    alpha: float = 0.05
    act_above: float = 0.05
    trusted_min: int = 100
    regions: int = 512
    kappa: float = 20.0
    refits: int = 5
    names: bool = False
    min_peers: int = 5


@dataclass(frozen=True, slots=True, kw_only=True)
class Robust:
    """How updates are combined where some sites lie, read by the algorithm "robust_lora" alone.

    ``tau`` bounds the norm of an update (0: 1.2 times that of the one in the middle, inf: none),
    ``assume_liars`` is the share of sites that the rule is told to expect, ``root`` the site that
    "fltrust" trusts. ``reliability`` says what evidence about sites does: "off", "warn" or
    "regroup"; ``momentum`` what a site's change keeps of those before it."""

    rule: str = "mean"
    tau: float = 0.0
    assume_liars: float = 0.0
    reliability: str = "warn"
    root: str = ""
    momentum: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Engine:
    """``order`` 0 keeps the order of the cohort, else it is the seed that shuffles arrival."""

    name: str = "in_process"
    order: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Demands:
    """What the sites of an in-process run demand, where one person speaks for all of them; a site
    behind a network reads its own file and never this. ``minimum`` sites must be asked under
    secure aggregation unless ``plain`` runs are named; ``embedding`` is "refuse" or
    "presence-disclosed"; ``waive`` lifts "gate_span" or "gate_adapters" for public records;
    ``rehearsal_days`` is the greatest age of a rehearsal (0 asks for none)."""

    minimum: int = 3
    plain: bool = False
    embedding: str = "refuse"
    waive: tuple[str, ...] = ()
    rehearsal_days: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Audit:
    """``record`` writes the transcript that an audit attacks; ``rounds`` keep their payloads, all
    others only headers: "first", "middle", "last", "every:10", "all" or the number of a round.
    ``canaries`` made-up secrets of each kind are planted in the text of one site (see
    ``audit.canary``)."""

    record: bool = False
    rounds: tuple[str, ...] = ("first", "middle", "last", "every:10")
    canaries: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Release:
    """What an audit may have found at most if the model is to leave (see ``audit.release``): whole
    ``sequences`` in sums and the AUC of ``presence``, by the upper ends of their intervals, and the
    epsilon that an attack refuted. ``epsilon`` and ``delta`` are the most that the run may claim;
    epsilon inf lets a model leave that was trained without a bound. ``age_days`` is the greatest
    age of the audit."""

    sequences: float = 0.05
    presence_auc: float = 0.6
    canary_epsilon: float = 1.0
    epsilon: float = 3.0
    delta: float = 1e-5
    age_days: float = 30.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """Everything that decides a run. A value out of range raises PlanError on construction."""

    run: Run = field(default_factory=Run)
    model: Model = field(default_factory=Model)
    task: Task = field(default_factory=Task)
    scenario: Scenario = field(default_factory=Scenario)
    cohort: Cohort = field(default_factory=Cohort)
    algorithm: Algorithm = field(default_factory=Algorithm)
    pretrain: Pretrain = field(default_factory=Pretrain)
    knowledge: Knowledge = field(default_factory=Knowledge)
    privacy: Privacy = field(default_factory=Privacy)
    quality: Quality = field(default_factory=Quality)
    robust: Robust = field(default_factory=Robust)
    engine: Engine = field(default_factory=Engine)
    site: Demands = field(default_factory=Demands)
    audit: Audit = field(default_factory=Audit)
    release: Release = field(default_factory=Release)

    def __post_init__(self) -> None:
        check(self)
