"""The same read-out on another representation: a trained adapter's features instead of frozen ones.

Joint training gets the strongest head we have, so that the comparison is about representations.
"""

from typing import Any

import torch

from fedkola.evaluation import scoring
from fedkola.federation import Federation
from fedkola.knowledge import bank as banks
from fedkola.knowledge import statistics, views
from fedkola.knowledge.views import Rule
from fedkola.training import evaluate, features
from fedkola.types import Dataset, Weights


def adapted_accuracy(federation: Federation, weights: Weights, test: Dataset) -> dict[str, Any]:
    """Top-1, top-5 and accuracy by concept of the tree read-out on features under an adapter, over
    all records.

    The federation must hold the union of records at one site.
    """
    (site,) = federation.sites.values()
    data = site.knowledge.until(federation.rounds)
    knowledge, catalogue = federation.plan.knowledge, federation.stream.catalogue
    z = _integers(federation, weights, data)
    position = {code: i for i, code in enumerate(catalogue.codes())}
    codes = tuple(dict.fromkeys(data.labels))
    row = {code: i for i, code in enumerate(sorted(codes, key=position.__getitem__))}
    words = statistics.analytic(
        z,
        torch.tensor([row[code] for code in data.labels]),
        num_rows=len(row),
        features=knowledge.features,
        bits=knowledge.bits,
        seed=knowledge.basis_seed,
    )
    recipe = {
        "features": knowledge.features,
        "bits": knowledge.bits,
        "seed": knowledge.basis_seed,
    }
    bank = banks.alone("adapted", words, tuple(row), recipe)
    view = views.compute(bank, catalogue, Rule(lam=knowledge.lam, spread=knowledge.spread), now=1)
    assert view.head is not None
    nodes = view.head.nodes[federation.level]
    z_test = _integers(federation, weights, test)
    scores = torch.cat(
        [views.scores(view.head, part, federation.level) for part in torch.split(z_test, 4096)]
    )
    window = len(federation.stream.windows)
    found = scoring.measure(federation, scores, test, nodes, window=window)
    return {
        "top1": found.top1,
        "top5": found.top5,
        "asked": found.asked,
        "concepts": {name: right / asked for name, (right, asked) in found.concepts.items()},
    }


def _integers(federation: Federation, weights: Weights, data: Dataset) -> torch.Tensor:
    e = evaluate.embeddings(
        federation.foundation, weights, data.texts, scale=federation.trainer.scale
    )
    return features.integer_embeddings(e)
