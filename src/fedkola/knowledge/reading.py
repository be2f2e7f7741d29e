"""What a view of the bank says to texts, through the reader of a model: loss and generated text.

LoRA modules are slots of one adapter, weighed for each prompt by the router; where there are
analytic cells their labels answer too (see candidates).
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from fedkola.knowledge import adaptation, candidates, router, views
from fedkola.knowledge.calibration import Calibration
from fedkola.knowledge.views import View
from fedkola.types import Reader, Weights


def embed(base: Weights, reader: Reader, texts: Sequence[str]) -> Tensor:
    """Integer embeddings as sites sum them: frozen, and under an adapted base beside it."""
    frozen = reader.features(texts)
    if not base:
        return frozen
    return adaptation.beside(frozen, reader.features(texts, adapter=base))


def composed(
    view: View, reader: Reader, prompts: Sequence[str], *, tau: float, top_k: int
) -> tuple[Weights, Tensor | None]:
    """The LoRA modules as slots, and their weights for each prompt: those of the router, or equal
    ones without a router. No modules: the base."""
    modules = tuple(view.adapters)
    if not modules:
        return {}, None
    gate = torch.full((len(prompts), len(modules)), 1 / len(modules))
    if view.router is not None:
        p = router.posterior(view.router, reader.features(prompts), tau=tau)
        gate = views.gate(view, p, top_k=top_k)
    return views.slots(view, modules), gate


def losses(
    view: View,
    reader: Reader,
    prompts: Sequence[str],
    texts: Sequence[str],
    *,
    base: Weights,
    calibration: Calibration,
    level: int,
    tau: float,
    top_k: int,
) -> Tensor:
    """(n, 2) nats and tokens of the modules, mixed with the labels of analytic cells."""
    weights, gate = composed(view, reader, prompts or texts, tau=tau, top_k=top_k)
    found = reader.losses(weights, prompts, texts, gate=gate)
    if view.head is None or not prompts:
        return found
    z, names = embed(base, reader, prompts), reader.catalogue.texts
    known = torch.ones(len(prompts), dtype=torch.bool)
    if view.router is not None:
        known = router.unknown(view.router, z) <= calibration.unknown
    found[:, 0] = candidates.mixed(
        found[:, 0],
        views.answer(view, z, reader.nodes, level),
        texts,
        [names.get(node, node) for node in reader.nodes],
        temperature=calibration.temperature,
        known=known,
    )
    return found


def generate(
    view: View,
    reader: Reader,
    prompts: Sequence[str],
    *,
    base: Weights,
    level: int,
    tau: float,
    top_k: int,
    max_new_tokens: int,
) -> list[str]:
    """The text of the best label where there are analytic cells, else what modules generate."""
    if view.head is not None:
        found = views.answer(view, embed(base, reader, prompts), reader.nodes, level)
        return candidates.replies(found, reader.nodes, reader.catalogue.texts)
    weights, gate = composed(view, reader, prompts, tau=tau, top_k=top_k)
    return reader.generate(weights, prompts, max_new_tokens=max_new_tokens, gate=gate)
