"""How good a state is: one question for every algorithm, over test records that may be asked.

A record may be asked once its label has arrived anywhere. Answers compete among the nodes of the
reported level that have arrived by then, for every method alike.
"""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from fedkola.algorithms.fedkola import FedKoLa
from fedkola.algorithms.fedkola import State as BankState
from fedkola.algorithms.local import Local
from fedkola.algorithms.local import State as LocalState
from fedkola.errors import KnowledgeError
from fedkola.knowledge import router, views
from fedkola.knowledge.views import View
from fedkola.server import Federation
from fedkola.training import evaluate
from fedkola.types import Catalogue, Dataset


@dataclass(frozen=True, slots=True, kw_only=True)
class Accuracy:
    """Shares of right answers. ``scopes`` maps a scope to (right, asked) at top-1."""

    top1: float
    top5: float
    asked: int
    nodes: int
    scopes: Mapping[str, tuple[int, int]] = field(default_factory=dict)


def askable(test: Dataset, window: int) -> Dataset:
    """Test records whose label has arrived by this window."""
    return test.take([i for i, first in enumerate(test.windows) if first <= window])


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

    ``local`` states hold one model per site; their accuracies are averaged over sites.
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
    if isinstance(state, LocalState):
        models = _local_scores(federation, state, test, nodes)
    else:
        models = [scores_of(federation, state, test, nodes)]
    place = {record: i for i, record in enumerate(test.records)}
    found = {}
    for name, part in parts.items():
        rows = torch.tensor([place[record] for record in part.records], dtype=torch.int64)
        measured = [measure(federation, scores[rows], part, nodes) for scores in models]
        found[name] = measured[0] if len(measured) == 1 else _average(measured, len(nodes))
    return found


def scores_of(federation: Federation, state: Any, test: Dataset, nodes: Sequence[str]) -> Tensor:
    """Scores (n, len(nodes)) of one model; -inf where the model does not know a node."""
    if isinstance(state, BankState):
        algorithm = federation.algorithm
        assert isinstance(algorithm, FedKoLa)
        if not state.bank.cells:
            return torch.full((len(test), len(nodes)), float("-inf"))
        return _view_scores(federation, algorithm.view(state), test, nodes)
    logits = evaluate.scores(
        federation.foundation, state.weights, test.texts, scale=federation.trainer.scale
    )
    known = federation.stream.catalogue.nodes(federation.level)
    place = {node: i for i, node in enumerate(known)}
    return logits[:, [place[node] for node in nodes]]


def perplexity(federation: Federation, state: Any, test: Dataset) -> dict[str, float]:
    """Loss per token, and its exponential, of a causal language model on texts.

    A bank's LoRA modules are composed per text with the router's gate; without a router every
    module has the same weight.
    """
    foundation, scale = federation.foundation, federation.trainer.scale
    if not isinstance(state, BankState):
        found = evaluate.perplexity(foundation, state.weights, test.texts, scale=scale)
        return _per_token(found)
    algorithm = federation.algorithm
    assert isinstance(algorithm, FedKoLa)
    view = algorithm.view(state) if state.bank.cells else None
    if view is None or not view.adapters:
        return _per_token(evaluate.perplexity(foundation, {}, test.texts, scale=scale))
    modules = tuple(view.adapters)
    gate = module_gates(federation, view, test, modules)
    slots = views.slots(view, modules)
    found = evaluate.perplexity(foundation, slots, test.texts, scale=scale, gate=gate)
    return _per_token(found)


def module_gates(
    federation: Federation, view: View, test: Dataset, modules: Sequence[str]
) -> Tensor:
    """Weights (n, K) of the modules for each text; rows sum to 1."""
    knowledge = federation.plan.knowledge
    if view.router is None:
        return torch.full((len(test), len(modules)), 1 / len(modules))
    z = federation.trainer.cache.integers(test.texts)
    p = router.posterior(view.router, z, tau=knowledge.tau_g)
    order = [view.router.modules.index(module) for module in modules]
    return router.gates(p[:, order], top_k=knowledge.top_k)


def truth(catalogue: Catalogue, level: int, test: Dataset) -> list[str]:
    """The node of every test record at a level."""
    path = {label.code: label.path[level] for label in catalogue.labels}
    return [path[code] for code in test.labels]


# --- private --------------------------------------------------------------------------------------


def _view_scores(federation: Federation, view: View, test: Dataset, nodes: Sequence[str]) -> Tensor:
    if view.head is None:
        raise KnowledgeError(
            "this bank has no analytic cells, so it cannot answer with labels; add "
            '"analytic" to knowledge.lanes'
        )
    place = {node: i for i, node in enumerate(view.head.nodes[federation.level])}
    known = [i for i, node in enumerate(nodes) if node in place]
    scores = torch.full((len(test), len(nodes)), float("-inf"))
    columns = [place[nodes[i]] for i in known]
    z = federation.trainer.cache.integers(test.texts)
    for start in range(0, len(test), 4096):
        part = views.scores(view.head, z[start : start + 4096], federation.level)
        scores[start : start + 4096, known] = part[:, columns]
    return scores


def _local_scores(
    federation: Federation, state: LocalState, test: Dataset, nodes: Sequence[str]
) -> list[Tensor]:
    algorithm = federation.algorithm
    assert isinstance(algorithm, Local)
    found = []
    for site, bank in state.sites.items():
        if bank.cells:
            found.append(_view_scores(federation, algorithm.view(state, site), test, nodes))
        else:
            found.append(torch.full((len(test), len(nodes)), float("-inf")))
    return found


def measure(
    federation: Federation, scores: Tensor, test: Dataset, nodes: Sequence[str]
) -> Accuracy:
    catalogue = federation.stream.catalogue
    place = {node: i for i, node in enumerate(nodes)}
    # A label that was asked about but never arrived counts as wrong, not as absent.
    wanted = torch.tensor(
        [place.get(node, -1) for node in truth(catalogue, federation.level, test)]
    )
    best = scores.topk(min(5, scores.shape[1]), dim=1) if len(test) else None
    hits = torch.zeros(len(test), 1, dtype=torch.bool)
    if best is not None:
        hits = (best.indices == wanted[:, None]) & best.values.isfinite()
    scope_of = {label.code: label.scope for label in catalogue.labels}
    scopes: dict[str, list[int]] = defaultdict(lambda: [0, 0])
    for code, right in zip(test.labels, hits[:, 0].tolist(), strict=True):
        scopes[scope_of[code]][0] += right
        scopes[scope_of[code]][1] += 1
    count = max(len(test), 1)
    return Accuracy(
        top1=float(hits[:, 0].sum()) / count,
        top5=float(hits.any(1).sum()) / count,
        asked=len(test),
        nodes=len(nodes),
        scopes={scope: (right, asked) for scope, (right, asked) in scopes.items()},
    )


def _average(found: Sequence[Accuracy], nodes: int) -> Accuracy:
    return Accuracy(
        top1=sum(a.top1 for a in found) / len(found),
        top5=sum(a.top5 for a in found) / len(found),
        asked=found[0].asked,
        nodes=nodes,
    )


def _per_token(found: Mapping[str, float]) -> dict[str, float]:
    loss = found["loss"] / max(found["tokens"], 1.0)
    exponential = float(torch.tensor(loss, dtype=torch.float64).exp())
    return {"loss": loss, "perplexity": exponential, "tokens": found["tokens"]}
