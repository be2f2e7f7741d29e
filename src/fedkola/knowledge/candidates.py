"""Answers of the analytic lane as text: what a bank says, and how likely it finds each answer.

A language model's vocabulary is too large for a head cell, but the answers of a federation are a
list: its labels. With scores f from the analytic cells (label rows are sums over the states of
prompts, s_v = sum h) the probability of an answer y to a prompt x is a mixture of two models of
whole answers, each closed by its end::

    p(y | x) = (1 - c(x)) p_LM(y | x) + c(x) sum over labels v with text y of softmax(f(x) / T)_v

T is calibrated on sums; c(x) is TRUST, or 1 - TRUST where the router finds x unlike all it knows.
Revising or removing a record changes f exactly, so a former answer leaves no trace in it.
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

TRUST = 0.95  # The share of the sites' own records that the calibrated threshold calls known.


def replies(scores: Tensor, nodes: Sequence[str], texts: Mapping[str, str]) -> list[str]:
    """The text of the best node of each row of ``scores`` (n, nodes); "" where none is known."""
    known = scores.isfinite().any(dim=1).tolist()
    best = scores.argmax(dim=1).tolist() if len(nodes) else [0] * len(scores)
    return [
        texts.get(nodes[place], nodes[place]) if there else ""
        for place, there in zip(best, known, strict=True)
    ]


def mixed(
    nats: Tensor,
    scores: Tensor,
    answers: Sequence[str],
    names: Sequence[str],
    *,
    temperature: float,
    known: Tensor,
) -> Tensor:
    """Nats (n,) of each answer under the mixture; ``nats`` are those of the language model.

    ``scores`` (n, len(names)) belong to labels with the texts ``names``, -inf for labels that are
    not known; ``known`` (n,) says of each prompt whether the router has seen its like. Rows
    without a known label keep the language model's probability.
    """
    there = scores.isfinite().any(dim=1)
    share = torch.where(known, TRUST, 1 - TRUST).to(torch.float64) * there
    log_p = torch.log_softmax(scores.double() / temperature, dim=1)
    same = torch.tensor([[name == answer for name in names] for answer in answers])
    log_label = log_p.masked_fill(~same.reshape(log_p.shape), float("-inf")).logsumexp(dim=1)
    log_label = log_label.masked_fill(~there, float("-inf"))
    return -torch.logaddexp(share.log() + log_label, torch.log1p(-share) - nats)
