"""The leakage gate: what a site demands before an answer that was trained enters its outbox.

It is a heuristic floor against attacks that are known to work, not a guarantee. It governs answers
behind which training stands: of a whole model, and of adapters of a language model on text of its
own. Analytic statistics (Grams, counts, embeddings) and adapters that learn labels are under other
rules: floors on sites and records, which the bank of knowledge checks.

======================  ============================================================================
code                    refused unless
======================  ============================================================================
``gate_cohort``         at least ``minimum`` sites are asked under secure aggregation, or ``plain``
``gate_span``           noise is added, or at least 4 d tokens stand behind the answer (d the width
                        of the model), H >= 8 steps, and the optimiser is adaptive
``gate_embedding``      no embedding or head is in the answer, or noise is added, or ``embedding``
                        is "presence-disclosed"
``gate_adapters``       noise is added, or at least 4 x rank tokens stand behind the answer
``gate_rehearsal``      an audit of the same protocol on rehearsal data passed, at most
                        ``rehearsal_days`` ago
======================  ============================================================================

A layer's gradient has the span of the tokens it read for row space: below d tokens that betrays
each of them. Embedding rows move when their token occurs.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from fedkola.errors import PolicyRefused
from fedkola.plan import Demands
from fedkola.privacy.behind import Behind
from fedkola.types import Spec

DISCLOSED = "presence-disclosed"
REHEARSAL = "rehearsal.json"
LEAST_STEPS = 8
PER_WIDTH = PER_RANK = 4
DAY = 86400.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """What is about to leave: how many sites are asked, whether a mask and noise lie over it, which
    of its tensors are ``tables`` (embeddings and head), the model's ``width``, the ``rank`` of its
    adapters, and what stands behind it."""

    sites: int
    masked: bool
    noisy: bool
    tables: tuple[str, ...]
    width: int
    rank: int
    behind: Behind


def gate(
    demands: Demands,
    answer: Answer,
    *,
    protocol: str,
    rehearsal: Mapping[str, Any] | None,
    now: float,
) -> None:
    """Raise PolicyRefused, with the code of the first rule that refuses.

    ``demands`` are the site's; their defaults are strict. ``protocol`` is the hash of the
    question's protocol, ``rehearsal`` the audit document that the site holds of a rehearsal, None
    for none.
    """
    if answer.behind.kind == "whole":
        _cohort(demands, answer)
        _span(demands, answer)
        _embedding(demands, answer)
        _rehearsed(demands, protocol, rehearsal, now)
    elif answer.behind.kind == "adapter" and answer.rank:
        _adapters(demands, answer)


def protocol_hash(algorithm: Spec, guards: Sequence[Spec]) -> str:
    """What a rehearsal and a run must have in common: name, hyper-parameters and guards."""
    told = {"algorithm": dict(algorithm), "guards": [dict(guard) for guard in guards]}
    text = json.dumps(told, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


# --- private --------------------------------------------------------------------------------------


def _cohort(demands: Demands, answer: Answer) -> None:
    if demands.plain or (answer.masked and answer.sites >= demands.minimum):
        return
    how = f"{answer.sites} sites are asked {'under' if answer.masked else 'without'} secure sum"
    raise PolicyRefused(
        f"{how}, this site demands {demands.minimum} under it: set privacy.secure_sum = true and "
        "ask more sites, or let the site name plain runs (site.plain = true)",
        code="gate_cohort",
    )


def _span(demands: Demands, answer: Answer) -> None:
    if answer.noisy or "gate_span" in demands.waive:
        return
    behind, least = answer.behind, PER_WIDTH * answer.width
    short = []
    if behind.tokens < least:
        short.append(f"{behind.tokens} tokens where {least} are needed (4 x the model's width)")
    if behind.steps < LEAST_STEPS:
        short.append(f"{behind.steps} local steps where {LEAST_STEPS} are needed")
    if not behind.adaptive:
        short.append("an optimiser that is not adaptive")
    if short:
        raise PolicyRefused(
            f"{'; '.join(short)}: the text could be read from the span of this answer; raise "
            "pretrain.inner_steps or pretrain.batch, or set a privacy.epsilon",
            code="gate_span",
        )


def _embedding(demands: Demands, answer: Answer) -> None:
    if answer.noisy or not answer.tables or demands.embedding == DISCLOSED:
        return
    raise PolicyRefused(
        f"{', '.join(answer.tables[:3])} would leave, and rows of embeddings tell which words were "
        "used: freeze them, set a privacy.epsilon, or let the site disclose it "
        f'(site.embedding = "{DISCLOSED}")',
        code="gate_embedding",
    )


def _adapters(demands: Demands, answer: Answer) -> None:
    if answer.noisy or "gate_adapters" in demands.waive:
        return
    if answer.behind.tokens < PER_RANK * answer.rank:
        raise PolicyRefused(
            f"{answer.behind.tokens} tokens behind adapters of rank {answer.rank}, "
            f"{PER_RANK * answer.rank} are needed: give more records, or lower algorithm.rank",
            code="gate_adapters",
        )


def _rehearsed(
    demands: Demands, protocol: str, rehearsal: Mapping[str, Any] | None, now: float
) -> None:
    if not demands.rehearsal_days:
        return
    if rehearsal is None:
        why = f"no {REHEARSAL} lies in the site's folder"
    elif rehearsal.get("protocol") != protocol:
        why = "the rehearsal that lies there was of another protocol"
    elif not rehearsal.get("passed"):
        why = "the rehearsal did not pass"
    elif not 0 <= now - float(rehearsal.get("at", 0)) <= demands.rehearsal_days * DAY:
        why = f"the rehearsal is not of the last {demands.rehearsal_days:g} days"
    else:
        return
    raise PolicyRefused(
        f"{why}: run fedkola audit --rehearse on this plan and put its audit.json there as "
        f"{REHEARSAL}",
        code="gate_rehearsal",
    )
