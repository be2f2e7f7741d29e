"""How good a state is: one question for every algorithm, over test records that may be asked.

A record may be asked once its label has arrived anywhere. Answers compete among the nodes of the
reported level that have arrived by then, for every method alike.
"""

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from fedkola.federation import Federation
from fedkola.training.reader import BaseReader
from fedkola.types import Catalogue, Dataset


@dataclass(frozen=True, slots=True, kw_only=True)
class Accuracy:
    """Shares of right answers. ``concepts`` maps a concept to (right, asked) at top-1.

    ``former`` counts the records asked whose answer was another one before, ``stale`` those that
    were given such an answer; ``late_former`` and ``late_stale`` count where the present answer
    became right in an earlier window.
    """

    top1: float
    top5: float
    asked: int
    nodes: int
    concepts: Mapping[str, tuple[float, int]] = field(default_factory=dict)
    former: int = 0
    stale: float = 0
    late_former: int = 0
    late_stale: float = 0


def askable(test: Dataset, window: int, *, ends: Mapping[str, int] | None = None) -> Dataset:
    """Test records whose label has arrived by this window and that are not past their end."""
    last = ends or {}
    return test.take(
        [
            i
            for i, first in enumerate(test.windows)
            if first <= window <= last.get(test.records[i], window)
        ]
    )


def arrived(federation: Federation, window: int) -> tuple[str, ...]:
    """Nodes of the reported level with at least one record anywhere by this window."""
    seen: set[str] = set()
    for data in federation.stream.sites.values():
        seen.update(code for code, w in zip(data.labels, data.windows, strict=True) if w <= window)
    level = federation.level
    labels = federation.stream.catalogue.labels
    return tuple(dict.fromkeys(e.path[level] for e in labels if e.code in seen))


def accuracy(federation: Federation, state: Any, test: Dataset, *, window: int) -> Accuracy:
    """Top-1 and top-5 of a state on ``test``, which must be askable at ``window``.

    Where every site has a model of its own, accuracies are averaged over the sites that are part
    of the federation in this window.
    """
    return accuracies(federation, state, test, {"all": test}, window=window)["all"]


def accuracies(
    federation: Federation,
    state: Any,
    test: Dataset,
    parts: Mapping[str, Dataset],
    *,
    window: int,
) -> dict[str, Accuracy]:
    """The accuracy on several parts of one test; every text is scored once."""
    nodes = arrived(federation, window)
    sites: tuple[str, ...] = ("",)
    if getattr(federation.algorithm, "personal", False):
        sites = _members(federation, window)
    models = [scores_of(federation, state, test, nodes, site=site) for site in sites]
    place = {record: i for i, record in enumerate(test.records)}
    found = {}
    for name, part in parts.items():
        rows = torch.tensor([place[record] for record in part.records], dtype=torch.int64)
        measured = [
            measure(federation, scores[rows], part, nodes, window=window) for scores in models
        ]
        found[name] = measured[0] if len(measured) == 1 else _average(measured, len(nodes))
    return found


def scores_of(
    federation: Federation, state: Any, test: Dataset, nodes: Sequence[str], *, site: str = ""
) -> Tensor:
    """Scores (n, len(nodes)) of one model; -inf where the model does not know a node.

    The algorithm's own ``answer`` if it has one, else one adapter with one head; ``site`` names
    the model of a method with one for each. An oracle's ``routed`` is told the true scopes.
    """
    algorithm: Any = federation.algorithm
    base = reader(federation)
    if hasattr(algorithm, "routed"):
        found: Tensor = algorithm.routed(state, base, test.questions, _scopes(base.catalogue, test))
    elif hasattr(algorithm, "answer"):
        found = algorithm.answer(state, base, test.questions, site=site)
    else:
        found = base.scores(state.weights, test.questions)
    place = {node: i for i, node in enumerate(base.nodes)}
    return found[:, [place[node] for node in nodes]]


def perplexity(federation: Federation, state: Any, test: Dataset) -> dict[str, float]:
    """Loss per token, and its exponential, of a causal language model on texts after prompts."""
    nats, tokens = (math.fsum(column) for column in losses(federation, state, test).T.tolist())
    loss = nats / max(tokens, 1.0)
    exponential = float(torch.tensor(loss, dtype=torch.float64).exp())
    return {"loss": loss, "perplexity": exponential, "tokens": tokens}


def losses(federation: Federation, state: Any, test: Dataset) -> Tensor:
    """(n, 2) float64: nats and tokens of each text after its prompt, by the algorithm's own
    ``losses`` if it has them, else under one adapter."""
    algorithm: Any = federation.algorithm
    base = reader(federation)
    if hasattr(algorithm, "routed_losses"):
        scopes = _scopes(base.catalogue, test)
        found: Tensor = algorithm.routed_losses(state, base, test.prompts, test.texts, scopes)
    elif hasattr(algorithm, "losses"):
        found = algorithm.losses(state, base, test.prompts, test.texts)
    else:
        found = base.losses(state.weights, test.prompts, test.texts)
    return found


def reader(federation: Federation) -> BaseReader:
    """The federation's frozen base, as states read it when they answer."""
    catalogue = federation.stream.catalogue
    return BaseReader(
        catalogue=catalogue,
        nodes=catalogue.nodes(federation.level),
        foundation=federation.foundation,
        cache=federation.trainer.cache,
        scale=federation.trainer.scale,
    )


def truth(catalogue: Catalogue, level: int, test: Dataset) -> list[str]:
    """The node of every test record at a level."""
    path = {label.code: label.path[level] for label in catalogue.labels}
    return [path[code] for code in test.labels]


def measure(
    federation: Federation, scores: Tensor, test: Dataset, nodes: Sequence[str], *, window: int
) -> Accuracy:
    """How right and how current answers are, from scores (n, len(nodes)) of the test's texts."""
    stream, level = federation.stream, federation.level
    place = {node: i for i, node in enumerate(nodes)}
    # A label that was asked about but never arrived counts as wrong, not as absent.
    wanted = torch.tensor([place.get(node, -1) for node in truth(stream.catalogue, level, test)])
    best = scores.topk(min(5, scores.shape[1]), dim=1) if scores.numel() else None
    hits = torch.zeros(len(test), 1, dtype=torch.bool)
    given: list[str] = [""] * len(test)
    if best is not None:
        hits = (best.indices == wanted[:, None]) & best.values.isfinite()
        given = [
            nodes[i] if known else ""
            for i, known in zip(
                best.indices[:, 0].tolist(), best.values[:, 0].isfinite().tolist(), strict=True
            )
        ]
    node_of = {label.code: label.path[level] for label in stream.catalogue.labels}
    scope_of = {label.code: label.scope for label in stream.catalogue.labels}
    concepts: dict[str, list[int]] = defaultdict(lambda: [0, 0])
    former = stale = late_former = late_stale = 0
    for i, (record, code, right) in enumerate(
        zip(test.records, test.labels, hits[:, 0].tolist(), strict=True)
    ):
        concept = concepts[stream.concepts.get(record, scope_of[code])]
        concept[0] += right
        concept[1] += 1
        if superseded := stream.stale.get(record):
            wrong_now = {node_of.get(old, old) for old in superseded} - {node_of[code]}
            outdated, late = given[i] in wrong_now, test.windows[i] < window
            former, stale = former + 1, stale + outdated
            late_former, late_stale = late_former + late, late_stale + (late and outdated)
    count = max(len(test), 1)
    return Accuracy(
        top1=float(hits[:, 0].sum()) / count,
        top5=float(hits.any(1).sum()) / count,
        asked=len(test),
        nodes=len(nodes),
        concepts={name: (right, asked) for name, (right, asked) in concepts.items()},
        former=former,
        stale=stale,
        late_former=late_former,
        late_stale=late_stale,
    )


# --- private --------------------------------------------------------------------------------------


def _scopes(catalogue: Catalogue, test: Dataset) -> list[str]:
    scope = {label.code: label.scope for label in catalogue.labels}
    return [scope[code] for code in test.labels]


def _average(found: Sequence[Accuracy], nodes: int) -> Accuracy:
    return Accuracy(
        top1=sum(a.top1 for a in found) / len(found),
        top5=sum(a.top5 for a in found) / len(found),
        asked=found[0].asked,
        nodes=nodes,
        concepts={
            name: (sum(a.concepts[name][0] for a in found) / len(found), asked)
            for name, (_, asked) in found[0].concepts.items()
        },
        former=found[0].former,
        stale=sum(a.stale for a in found) / len(found),
        late_former=found[0].late_former,
        late_stale=sum(a.late_stale for a in found) / len(found),
    )


def _members(federation: Federation, window: int) -> tuple[str, ...]:
    """Sites that are part of the last round of this window, those that miss it included."""
    late, left = federation.plan.scenario.late, federation.plan.scenario.gone
    number = window * federation.plan.run.rounds_per_window
    return tuple(
        site
        for site in federation.stream.sites
        if late.get(site, 1) <= number <= left.get(site, number)
    )
