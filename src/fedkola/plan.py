"""The plan of a run: a tree of frozen dataclasses, and the same tree as TOML.

``load`` and ``parse`` read a plan, ``override`` applies ``--set a.b=c``, ``dump`` writes it back
and ``digest`` names it. A key that does not exist is refused with the nearest one that does, a
value of the wrong type with what was expected; nothing is guessed. Names of tasks, models and
algorithms are closed tables elsewhere: here they are only text.
"""

import codecs
import glob
import hashlib
import json
import os
import re
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields
from difflib import SequenceMatcher
from math import inf, isinf
from pathlib import Path
from types import UnionType
from typing import Any, get_args, get_origin, get_type_hints

from fedkola.errors import Incompatible, PlanError, UnknownKey


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
    that one of them may answer for (0 is any number)."""

    size: int = 0
    minimum: int = 3
    records: int = 0


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
    rarer with time; ``length`` counts tokens. ``second`` says whether second moments of AdamW,
    which keep ``beta2`` of themselves a step, are each site's "own" or "shared". ``bound`` is the
    greatest norm of a delta (0: any), ``bits`` those of one of its coordinates, ``fragments`` the
    parts that take turns. ``down`` is how weights come back: "float32", "float16" or "change".
    ``weight`` is "equal" or "tokens", in units of ``share`` tokens. ``measured`` held-out sequences
    of a site are scored after each round (0: all), and ``prompts`` continued.
    """

    inner_steps: int = 32
    growth: float = 1.0
    batch: int = 8
    length: int = 128
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
    one wait for theirs: 0 is every round, 1 is rounds 1, 2, 4, 8 of equal windows."""

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
    mode: str = "off"


@dataclass(frozen=True, slots=True, kw_only=True)
class Engine:
    """``order`` 0 keeps the order of the cohort, else it is the seed that shuffles arrival."""

    name: str = "in_process"
    order: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Site:
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
    others only headers: "first", "middle", "last", "every:10", "all" or the number of a round."""

    record: bool = False
    rounds: tuple[str, ...] = ("first", "middle", "last", "every:10")


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
    engine: Engine = field(default_factory=Engine)
    site: Site = field(default_factory=Site)
    audit: Audit = field(default_factory=Audit)

    def __post_init__(self) -> None:
        _check(self)


_SECTIONS: Mapping[str, type] = get_type_hints(Plan)
_HINTS: Mapping[str, Mapping[str, Any]] = {
    name: get_type_hints(section) for name, section in _SECTIONS.items()
}
_KEYS = tuple(f"{section}.{key}" for section, hints in _HINTS.items() for key in hints)

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
    "engine.order": (0, _WORD),
    "site.minimum": (1, _WORD),
    "site.rehearsal_days": (0, _HUGE),
}
_LEVELS = ("record", "pooled", "site")
_UNITS = ("patient", "record")
_AVAILABILITY = ("full", "bernoulli", "markov", "diurnal")
_POOLINGS = ("mean", "last")
_OUTER = ("average", "nesterov", "primal", "tune")
_DOWN = ("float32", "float16", "change")
_MOMENTS = ("own", "shared")
_WEIGHTS = ("equal", "tokens")
_PRECISIONS = ("float32", "bfloat16")
_PERIODS = ("year", "quarter")
_RUN_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
_EMBEDDINGS = ("refuse", "presence-disclosed")
_WAIVABLE = ("gate_span", "gate_adapters")
_ROUNDS = re.compile(r"all|first|middle|last|(every:)?[1-9]\d{0,8}")
_PARTITION = re.compile(r"iid|by-label|dirichlet:(\d+(?:\.\d*)?(?:e[+-]?\d+)?)")
_OVERRIDE = re.compile(
    r"""\s*(?P<section>[\w-]+)\.(?P<key>[\w-]+)
        (?:\.(?P<entry>"[^"]*"|'[^']*'|[^=]+?))?\s*=(?P<value>.*)""",
    re.VERBOSE | re.DOTALL,
)


def load(path: Path | str) -> Plan:
    """The plan in a TOML file.

    Relative files of [task], and a model folder that exists, are taken from the folder of the plan
    file. Raises PlanError if the file cannot be read or its content is not a plan.
    """
    path = Path(path)
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except OSError as error:
        raise PlanError(
            f"plan file {path} cannot be read ({error.strerror}); give the path of a TOML file"
        ) from error
    except UnicodeDecodeError as error:
        raise PlanError(f"plan file {path} is not UTF-8 text; save it as UTF-8") from error
    try:
        doc = as_dict(parse(text))
    except UnknownKey as error:
        raise UnknownKey(f"{path}: {error}") from error
    except Incompatible as error:
        raise Incompatible(f"{path}: {error}") from error
    except PlanError as error:
        raise PlanError(f"{path}: {error}") from error
    folder = str(path.resolve().parent)
    for key in ("train", "test", "folder"):
        if doc["task"][key]:
            doc["task"][key] = _beside(folder, doc["task"][key])
    model = doc["model"]["name"]
    if model != Model().name and os.path.isdir(os.path.join(folder, model)):
        doc["model"]["name"] = os.path.normpath(os.path.join(folder, model))
    return from_dict(doc)


def parse(text: str) -> Plan:
    """The plan in a TOML text; paths stay as they are written. Raises PlanError."""
    try:
        doc = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise PlanError(f"the plan is not TOML: {error}") from error
    return from_dict(doc)


def dump(plan: Plan) -> str:
    """TOML with every key written out; ``parse(dump(plan)) == plan``."""
    lines = []
    for section, values in as_dict(plan).items():
        lines.append(f"[{section}]")
        for key, value in values.items():
            # TOML has no null: the one value that is left out is None, which is then the default.
            if value is not None:
                is_number = _HINTS[section][key] in (float, float | None)
                lines.append(f"{key} = {value if is_number else _toml(value)}")
        lines.append("")
    return "\n".join(lines)


def override(plan: Plan, settings: Sequence[str]) -> Plan:
    """The plan with settings of the form ``section.key=value`` applied in order.

    Values are TOML; text needs no quotes and a list may be written ``a,b``. One entry of a map is
    ``scenario.noisy.north=0.3``, a whole map ``scenario.noisy={north = 0.3}``. The result is
    checked once, after the last setting. Raises UnknownKey or PlanError.
    """
    doc = as_dict(plan)
    for setting in settings:
        match = _OVERRIDE.fullmatch(setting)
        if match is None:
            if re.match(r"[\w-]+\s*=", setting):
                raise _unknown(setting.partition("=")[0].strip())
            raise PlanError(
                f"setting {setting!r} was given; expected section.key=value, such as cohort.size=8"
            )
        section, key, entry = match["section"], match["key"], match["entry"]
        name = f"{section}.{key}"
        if name not in _KEYS:
            raise _unknown(name)
        hint, value = _HINTS[section][key], match["value"].strip()
        if entry is None:
            doc[section][key] = _literal(value, hint)
        elif get_origin(hint) is Mapping:
            inner = get_args(hint)[1]
            doc[section][key][entry.strip().strip("\"'")] = _literal(value, inner)
        else:
            raise UnknownKey(f"unknown key {name}.{entry}; nearest is {name}")
    return from_dict(doc)


def digest(plan: Plan) -> str:
    """SHA-256, in hex, of the canonical JSON of the resolved plan."""
    text = json.dumps(
        as_dict(plan), sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False
    )
    return hashlib.sha256(text.encode()).hexdigest()


def as_dict(plan: Plan) -> dict[str, dict[str, Any]]:
    """The plan as JSON values, section by section; an infinite number is the text "inf"."""
    return {
        section: {key: _plain(getattr(getattr(plan, section), key)) for key in _HINTS[section]}
        for section in _SECTIONS
    }


def from_dict(doc: Mapping[str, Any]) -> Plan:
    """The plan in a document such as ``as_dict`` writes; absent keys take their defaults.

    Raises UnknownKey naming the nearest key, or PlanError for a wrong type or range.
    """
    sections: dict[str, Any] = {}
    for section, values in doc.items():
        if section not in _SECTIONS:
            raise _unknown(section)
        if not isinstance(values, Mapping):
            raise PlanError(f"{section} was given {values!r}; expected a section [{section}]")
        for key in values:
            if key not in _HINTS[section]:
                raise _unknown(f"{section}.{key}")
        read = {
            key: _read(value, _HINTS[section][key], f"{section}.{key}")
            for key, value in values.items()
        }
        sections[section] = _SECTIONS[section](**read)
    return Plan(**sections)


def _beside(folder: str, value: str) -> str:
    # In a pattern the folder stands for itself, whatever characters its name holds.
    if any(character in value for character in "*?["):
        folder = glob.escape(folder)
    return os.path.normpath(os.path.join(folder, value))


def _toml(value: Any) -> str:
    if isinstance(value, str):
        # JSON's escapes are TOML's; only DEL is allowed bare in the one and not in the other.
        return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
    if isinstance(value, list):
        return "[" + ", ".join(_toml(item) for item in value) + "]"
    if isinstance(value, dict):
        pairs = (f"{_toml(key)} = {_toml(value[key])}" for key in sorted(value))
        return "{" + ", ".join(pairs) + "}"
    return str(value).lower() if isinstance(value, bool) else repr(value)


def _plain(value: Any) -> Any:
    if isinstance(value, float) and isinf(value):
        return "inf" if value > 0 else "-inf"
    if isinstance(value, tuple):
        return list(value)
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    return value


def _literal(text: str, hint: Any) -> Any:
    """What a setting's text means where ``hint`` is expected; text that means nothing stays."""
    if hint == float | None and text.lower() == "none":
        return None
    try:
        read = tomllib.loads(f"x = {text}")
    except tomllib.TOMLDecodeError:
        read = {}
    # More keys than one mean that the text held line breaks: it is no TOML value.
    value = read["x"] if len(read) == 1 else text
    if hint is str and not isinstance(value, str):
        return text
    if get_origin(hint) is tuple and not isinstance(value, list):
        return [part.strip() for part in text.split(",") if part.strip()]
    return value


def _read(value: Any, hint: Any, name: str) -> Any:
    """``value`` as the type of the key ``name``; raises PlanError."""
    if isinstance(hint, UnionType):
        return None if value is None else _read(value, get_args(hint)[0], name)
    if get_origin(hint) is Mapping:
        if not isinstance(value, Mapping) or not all(isinstance(key, str) for key in value):
            raise _wrong(name, value, "a table such as {north = 1}")
        inner = get_args(hint)[1]
        return {
            _text(key, name): _read(item, inner, f"{name}.{key}") for key, item in value.items()
        }
    if get_origin(hint) is tuple:
        if not isinstance(value, list | tuple):
            raise _wrong(name, value, 'a list of texts such as ["a", "b"]')
        return tuple(_read(item, str, name) for item in value)
    if hint is bool:
        if not isinstance(value, bool):
            raise _wrong(name, value, "true or false")
        return value
    if hint is int:
        if not isinstance(value, int) or isinstance(value, bool):
            raise _wrong(name, value, "a whole number")
        return int(value)
    if hint is float:
        if value in ("inf", "-inf"):
            return float(value)
        if not isinstance(value, int | float) or isinstance(value, bool):
            raise _wrong(name, value, "a number")
        try:
            return float(value)
        except OverflowError as error:
            raise _wrong(name, value, "a number below 1.8e308") from error
    if not isinstance(value, str):
        raise _wrong(name, value, "text in quotes")
    return _text(value, name)


def _text(value: str, name: str) -> str:
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise _wrong(name, value, "text that UTF-8 can write") from error
    return value


def _wrong(name: str, value: Any, expected: str) -> PlanError:
    return PlanError(f"{name} was given {value!r} ({type(value).__name__}); expected {expected}")


def _unknown(name: str) -> UnknownKey:
    if "." not in name and _closeness(name, best := max(_SECTIONS, key=_by(name))) >= 0.6:
        return UnknownKey(f"unknown section {name}; nearest is {best}")
    return UnknownKey(f"unknown key {name}; nearest is {max(_KEYS, key=_by(name))}")


def _by(name: str) -> Any:
    return lambda candidate: _closeness(name, candidate)


def _closeness(given: str, candidate: str) -> float:
    """Likeness of the whole names, or of their last parts: a key may be right and its section
    wrong."""
    whole = SequenceMatcher(None, given, candidate).ratio()
    last = SequenceMatcher(None, given.split(".")[-1], candidate.split(".")[-1]).ratio()
    return max(whole, last - 0.01)


def _check(plan: Plan) -> None:
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
        ("pretrain.outer", plan.pretrain.outer, _OUTER),
        ("pretrain.second", plan.pretrain.second, _MOMENTS),
        ("pretrain.down", plan.pretrain.down, _DOWN),
        ("pretrain.weight", plan.pretrain.weight, _WEIGHTS),
        ("pretrain.precision", plan.pretrain.precision, _PRECISIONS),
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


def _numbers(plan: Plan) -> Iterator[tuple[str, float]]:
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
