"""The nouns of fedkola: what travels, what is summed, and the seams between the parts.

Everything the server learns from sites is a sum of fixed-point integers over a cohort. The types
here name that path once: a :class:`Broadcast` goes down, each site answers with an
:class:`Update` that becomes the integers of a :class:`Reply`, and the server sees an
:class:`Aggregate`. This module imports nothing from fedkola.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path
from typing import Any, ClassVar, Literal, Protocol, TypeVar

from torch import Tensor

Weights = Mapping[str, Tensor]
Cohort = tuple[str, ...]
Scalar = str | int | float | bool | None
Spec = Mapping[str, Scalar]


class Visibility(Enum):
    """What an algorithm reads: sums over cohorts, or single updates."""

    SUM = "sum"
    EACH = "each"


# --- what is known: labels and records -----------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class Label:
    """One leaf of a code system, with its place in the tree and its time of validity.

    ``path`` runs from the label itself to the root, one name per level of the catalogue.
    ``scope`` is the piece of knowledge (the module) that the label belongs to.
    """

    code: str
    path: tuple[str, ...]
    scope: str
    valid_from: float = float("-inf")
    valid_to: float | None = None
    replaced_by: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Catalogue:
    """The public list of labels of a task. Sites and server index labels by their position."""

    system: str
    levels: tuple[str, ...]
    labels: tuple[Label, ...]
    texts: Mapping[str, str] = field(default_factory=dict)

    def codes(self) -> tuple[str, ...]:
        return tuple(label.code for label in self.labels)

    def scopes(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(label.scope for label in self.labels))

    def nodes(self, level: int) -> tuple[str, ...]:
        """Names at one level (0 is the leaf), in order of first appearance."""
        return tuple(dict.fromkeys(label.path[level] for label in self.labels))


@dataclass(frozen=True, slots=True, kw_only=True)
class Dataset:
    """Records of one site, column by column; all columns have the same length.

    ``labels`` holds codes of the catalogue ("" for unlabelled text of a generative task),
    ``patients`` the pseudonym whose withdrawal removes the record, ``windows`` the number of the
    window in which the record reached the site (1 is the first round). ``prompts`` is empty, or
    holds what a generative record answers to: a model learns the text after its prompt.
    """

    records: tuple[str, ...]
    texts: tuple[str, ...]
    labels: tuple[str, ...]
    patients: tuple[str, ...]
    windows: tuple[int, ...]
    prompts: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.records)

    @property
    def questions(self) -> tuple[str, ...]:
        """What a model reads before it answers: the prompts where there are some, else texts."""
        return self.prompts or self.texts

    def take(self, rows: Sequence[int]) -> "Dataset":
        """The rows at these positions, in this order."""
        return Dataset(
            records=tuple(self.records[i] for i in rows),
            texts=tuple(self.texts[i] for i in rows),
            labels=tuple(self.labels[i] for i in rows),
            patients=tuple(self.patients[i] for i in rows),
            windows=tuple(self.windows[i] for i in rows),
            prompts=tuple(self.prompts[i] for i in rows) if self.prompts else (),
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Penalty:
    """What local training is held back by, added to the mean loss of a batch.

    ``strength / 2 * sum F (w - w_0)^2`` over the tensors of ``importance`` F and ``anchor`` w_0
    (EWC; Kirkpatrick et al., PNAS 2017), and ``strength * sum |A' A^T|_F^2`` over the tensors A of
    ``apart`` A' (O-LoRA; Wang et al., EMNLP 2023). Names are those of the trained tensors.
    """

    strength: float
    importance: Weights = field(default_factory=dict)
    anchor: Weights = field(default_factory=dict)
    apart: Weights = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class Course:
    """How a site pre-trains between two exchanges: ``steps`` batches of ``batch`` sequences of
    ``length`` tokens, from step ``start`` of ``total`` on.

    The rate rises to ``lr`` over ``warmup`` steps and falls along a cosine to ``floor`` times it;
    ``rewarm`` more steps of rise follow an absence. ``clip`` bounds the norm of a gradient,
    ``beta2`` is what the second moments keep at a step. ``optimiser`` is "adamw" or "sgd".
    """

    steps: int
    start: int
    total: int
    batch: int
    length: int
    lr: float
    warmup: int = 0
    rewarm: int = 0
    floor: float = 0.1
    weight_decay: float = 0.1
    clip: float = 1.0
    beta2: float = 0.95
    precision: str = "float32"
    optimiser: str = "adamw"


# --- what travels ---------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class Grid:
    """How real numbers become integers; fixed by the server before anyone answers.

    Sums live in the ring Z_2^word. ``scale`` gives the fractional bits of every tensor, of the
    weight (key ``weight``) and of every metric; integer tensors use 0. An addend may take its
    share of the word, so that any sum over the cohort fits; where the server knows that the sum
    itself fits (``bounded``), it may take all of the word. Words of
    8 bits are the bytes of a protocol and are never summed.
    """

    word: Literal[8, 16, 24, 32, 40, 64]
    bits: int
    scale: Mapping[str, int]
    bounded: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Broadcast:
    """One question to a cohort. ``algorithm`` names code and hyper-parameters, it is never code.
    ``weightless`` says that answers are no means over records: counts that stand beside a weight
    of 0, or what is taken back, under a weight below 0. Other answers are refused without one."""

    run: str = ""
    round: int
    seed: int = 0
    step: str
    cohort: Cohort = ()
    tensors: Weights
    grid: Grid
    algorithm: Spec
    guards: tuple[Spec, ...] = ()
    weightless: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Update:
    """One site's addends as real numbers, before the grid. A delta is already weighted."""

    client: str
    tensors: Weights
    weight: float
    metrics: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class Reply:
    """What an engine carried: integer words, or the reason why there are none. ``question`` names
    the message it answers, so that an answer to another question cannot be summed. ``word`` is
    the size of a word on its way, 0 as it lies in memory."""

    client: str
    question: str = ""
    words: Weights = field(default_factory=dict)
    refused: str = ""
    word: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Aggregate:
    """The exact sum over a cohort: what the bank keeps and what removal subtracts from."""

    cohort: Cohort
    words: Weights
    grid: Grid


@dataclass(frozen=True, slots=True, kw_only=True)
class Tally:
    """What an engine carried since it was last asked: bytes both ways, refusals by site."""

    bytes_down: int = 0
    bytes_up: int = 0
    refused: Mapping[str, str] = field(default_factory=dict)


# --- the seams ------------------------------------------------------------------------------------


class Clients(Protocol):
    """The server half's whole view of the federation. The question asked is the visibility."""

    def roster(self) -> Cohort: ...

    def sum(self, cohort: Cohort, broadcast: Broadcast) -> Aggregate:
        """The integer sum of the answers of ``cohort``; raises CohortTooSmall if nobody answers."""
        ...

    def each(self, cohort: Cohort, broadcast: Broadcast) -> Iterator[Update]:
        """Single answers as real numbers. A plan with secure aggregation refuses this question."""
        ...

    def tally(self) -> Tally:
        """Traffic and refusals since the last call."""
        ...


class Engine(Clients, Protocol):
    """Where sites live. Wrappers read replies; algorithms are typed not to see them."""

    def replies(self, cohort: Cohort, broadcast: Broadcast) -> Iterator[Reply]: ...


class Knowledge(Protocol):
    """A site's own records as they arrive."""

    def at(self, round: int) -> Dataset:
        """Records that reached the site in this round, new or in a new version."""
        ...

    def until(self, round: int) -> Dataset:
        """The newest version of every record that reached the site by this round."""
        ...

    def versions(self) -> Dataset:
        """Every version of every record; a record and a window name one of them."""
        ...

    def repeats(self, round: int) -> int:
        """Rows that arrived in this round and changed nothing."""
        ...

    def of(self, data: Dataset) -> "Knowledge":
        """Other records, as they arrive by the same calendar."""
        ...


class Client(Protocol):
    """A site, as a client step sees it."""

    @property
    def name(self) -> str: ...
    @property
    def knowledge(self) -> Knowledge: ...
    @property
    def held_out(self) -> Dataset:
        """The site's records that nothing may learn from; tests of removals compare with them."""
        ...

    @property
    def catalogue(self) -> Catalogue: ...
    @property
    def targets(self) -> Mapping[str, tuple[int, int]]:
        """Linear layers that may carry an adapter: name -> (d_out, d_in)."""
        ...

    @property
    def store(self) -> Path:
        """The site's private folder; survives restarts (journal, receipts, outbox)."""
        ...

    def fit(
        self,
        weights: Weights,
        data: Dataset,
        *,
        steps: int,
        batch: int,
        lr: float,
        seed: int,
        classes: Sequence[str] = (),
        pinned: Weights | None = None,
        penalty: Penalty | None = None,
    ) -> Weights:
        """Train ``weights`` on ``data`` and return them; ``pinned`` tensors stay as given.

        ``classes`` names the rows of ``head.weight``: labels, or nodes of a higher level. Names
        are ``{layer}.lora_A``, ``.lora_B``, a core ``.lora_R`` between them, and a pinned
        ``.delta`` that is added to the frozen weight.
        """
        ...

    def gradients(
        self,
        weights: Weights,
        data: Dataset,
        *,
        classes: Sequence[str],
    ) -> Weights:
        """The gradient of an encoder's summed loss over ``data`` at ``weights``."""
        ...

    def importance(
        self,
        weights: Weights,
        data: Dataset,
        *,
        seed: int,
        records: int,
        classes: Sequence[str] = (),
        pinned: Weights | None = None,
    ) -> Weights:
        """Squared gradients of single records' losses, summed over at most ``records`` of them."""
        ...

    def grams(self, weights: Weights, data: Dataset, *, pinned: Weights) -> Weights:
        """Per adapted layer the r x r Gram of z = A x, each record's tokens averaged first."""
        ...

    def features(self, data: Dataset, *, adapter: Weights | None = None) -> Tensor:
        """Integer embeddings round(2^10 e), int16 of shape (n, d), of the frozen base, or of the
        base under an adapter."""
        ...

    def evaluate(
        self, weights: Weights, data: Dataset, *, classes: Sequence[str] = ()
    ) -> Mapping[str, float]:
        """Additive metrics under ``weights``: loss, correct, count."""
        ...

    def pretrain(
        self,
        weights: Weights,
        data: Dataset,
        course: Course,
        *,
        kept: Weights,
        seed: int,
    ) -> tuple[Weights, Weights]:
        """Train the whole model on packed texts: its weights, and what to keep for the next time.

        ``kept`` is what an earlier call returned ({}: nothing yet). Where a guard of the question
        says so, every gradient carries noise and no sequence holds two units.
        """
        ...

    def clipped(self, weights: Weights, data: Dataset, *, length: int) -> Weights:
        """The sum over sampled units of ``data`` of their clipped gradients at ``weights``;
        sampling and bound are those of the guard of the question, without which it is refused."""
        ...

    def nll(self, weights: Weights, data: Dataset, *, length: int, rows: int) -> Tensor:
        """(n, 2) float64 of the whole model ``weights``: nats and tokens of the first ``rows``
        sequences of ``data``."""
        ...

    def tokens(self, data: Dataset, *, length: int) -> int:
        """Tokens of the packed texts of ``data``."""
        ...


class Reader(Protocol):
    """The frozen base as it is used when a state answers; texts are whoever asks's own."""

    @property
    def catalogue(self) -> Catalogue: ...
    @property
    def nodes(self) -> tuple[str, ...]:
        """The nodes of the reported level, in the order of the catalogue: columns of answers."""
        ...

    def features(self, texts: Sequence[str], *, adapter: Weights | None = None) -> Tensor:
        """Integer embeddings round(2^10 e), int16 of shape (n, d), of the frozen base, or of the
        base under an adapter."""
        ...

    def embeddings(
        self, weights: Weights, texts: Sequence[str], *, gate: Tensor | None = None
    ) -> Tensor:
        """Unit-length embeddings (n, d) under an adapter; with ``gate`` (n, K) under K slots."""
        ...

    def scores(self, weights: Weights, texts: Sequence[str]) -> Tensor:
        """Class scores (n, rows of head.weight) under one adapter and one head."""
        ...

    def losses(
        self,
        weights: Weights,
        prompts: Sequence[str],
        texts: Sequence[str],
        *,
        gate: Tensor | None = None,
    ) -> Tensor:
        """(n, 2) float64 of a causal model: nats and tokens of each text after its prompt."""
        ...

    def generate(
        self,
        weights: Weights,
        prompts: Sequence[str],
        *,
        max_new_tokens: int,
        gate: Tensor | None = None,
    ) -> list[str]:
        """The likeliest next tokens of a causal model after each prompt, as text."""
        ...


class State(Protocol):
    """An algorithm's own frozen dataclass; the ledger saves it and resuming loads it."""

    @property
    def weights(self) -> Weights: ...


S = TypeVar("S", bound=State)
Steps = Mapping[str, Callable[[Client, Broadcast], Update]]


class Algorithm(Protocol[S]):
    """Server half, then client half, of one published method.

    A method whose state is more than one adapter with one head also has
    ``answer(state, reader, texts, *, site="") -> Tensor (n, len(reader.nodes))``, -inf where it
    does not know a node, and for a causal model ``losses(state, reader, prompts, texts)`` and
    ``generate(state, reader, prompts, *, max_new_tokens)`` as of a reader. With ``personal =
    True`` every site has a model of its own, which ``site`` names. The constructor ``of(setting)``
    takes what it needs from the plan.
    """

    needs: ClassVar[Visibility]

    def start(self, weights: Weights) -> S: ...
    def round(self, number: int, state: S, cohort: Cohort, clients: Clients) -> S: ...
    def steps(self) -> Steps: ...


Rule = Callable[[Sequence[Aggregate]], Weights]


@dataclass(frozen=True, slots=True, kw_only=True)
class Spent:
    """The server's copy of the privacy account: the most that a site which answered every round
    so far has spent for one unit. Sites keep accounts of their own, and those decide."""

    unit: str
    epsilon: float
    delta: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """One row per round, the same for every engine. Times are those of the exchanges alone, in
    seconds of the clock and of all processor cores together; measuring is not counted. ``spent``
    is None where no epsilon is claimed."""

    round: int
    cohort: Cohort
    refused: Mapping[str, str]
    metrics: Mapping[str, float]
    bytes_down: int
    bytes_up: int
    seconds: float
    cpu_seconds: float
    spent: Spent | None = None


Event = Mapping[str, Any]
"""A knowledge event: ``{"kind": "SEAL", "subject": cell id, "body": {...}}``, JSON only."""
