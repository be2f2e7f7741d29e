"""What a user asks a bank: texts in; codes with confidence, coverage and as-of date out."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fedkola.algorithms.fedkola import FedKoLa
from fedkola.errors import KnowledgeError, UnknownName
from fedkola.evaluation.scoring import reader
from fedkola.federation import Federation
from fedkola.knowledge import router, views
from fedkola.knowledge.views import View
from fedkola.types import Weights


@dataclass(frozen=True, slots=True, kw_only=True)
class Choice:
    """One answer; ``confidence`` sums to 1 over all nodes that could be answered."""

    code: str
    text: str
    confidence: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """``missing`` is "" or why the knowledge is not there: "not_held" (the bank has it, this user
    does not) or "unknown" (nobody has it). ``helpful`` names scopes that would help."""

    text: str
    answers: tuple[Choice, ...]
    coverage: float
    missing: str
    helpful: tuple[str, ...]
    as_of: str
    view: str


def answer(
    federation: Federation,
    view: View,
    texts: Sequence[str],
    *,
    temperature: float,
    unknown: float,
    whole: View,
    as_of: str,
    top_k: int,
    level: str = "",
    base: Weights | None = None,
) -> tuple[Answer, ...]:
    """Answers of ``view``; ``whole`` is the same view with every module held, for coverage, and
    ``base`` the adapted base of the state, if it has one.

    Raises UnknownName for a level the task does not have, KnowledgeError without analytic cells.
    """
    catalogue, plan = federation.stream.catalogue, federation.plan
    if level and level not in catalogue.levels:
        raise UnknownName(f"level {level!r} was given; this task has {catalogue.levels}")
    position = catalogue.levels.index(level) if level else federation.level
    if view.head is None:
        raise KnowledgeError(
            "this bank has no analytic cells, so it cannot answer with labels; add "
            '"analytic" to knowledge.lanes'
        )
    algorithm = federation.algorithm
    assert isinstance(algorithm, FedKoLa)
    z = algorithm.embed(base or {}, reader(federation), texts)
    scores = views.scores(view.head, z, position)
    best = torch.softmax(scores / temperature, dim=1).topk(min(top_k, scores.shape[1]), dim=1)
    covered, far, scopes = _coverage(federation, view, whole, z)
    found = []
    for i, text in enumerate(texts):
        missing = ""
        if covered[i] < plan.knowledge.coverage_min:
            missing = "not_held"
        elif far[i] > unknown:
            missing = "unknown"
        choices = tuple(
            Choice(
                code=view.head.nodes[position][int(j)],
                text=catalogue.texts.get(view.head.nodes[position][int(j)], ""),
                confidence=float(p),
            )
            for p, j in zip(best.values[i], best.indices[i], strict=True)
            if float(p) > 0
        )
        found.append(
            Answer(
                text=text,
                answers=choices,
                coverage=float(covered[i]),
                missing=missing,
                helpful=scopes[i] if missing == "not_held" else (),
                as_of=as_of,
                view=view.id,
            )
        )
    return tuple(found)


def _coverage(
    federation: Federation, view: View, whole: View, z: Tensor
) -> tuple[Tensor, Tensor, list[tuple[str, ...]]]:
    """Coverage, distance to what is known, and the modules that would help, for every text."""
    if whole.router is None:
        return torch.ones(len(z)), torch.full((len(z),), float("-inf")), [()] * len(z)
    tau = federation.plan.knowledge.tau_g
    covered = router.coverage(whole.router, z, held=view.held, tau=tau)
    p = router.posterior(whole.router, z, tau=tau)
    held = set(whole.router.modules if view.held is None else view.held)
    helpful = []
    for row in p:
        order = row.argsort(descending=True)[:3].tolist()
        names = [whole.router.modules[i] for i in order if float(row[i]) > 0.1]
        helpful.append(tuple(name.rsplit("@", 1)[0] for name in names if name not in held))
    return covered, router.unknown(whole.router, z), helpful
