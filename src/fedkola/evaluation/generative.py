"""Streams with prompts: what a state answers in a window, and how good that is.

A method answers through its own ``generate`` if it has one. Of one adapter on a causal model the
answer is generated, of a method that composes several and only tells losses it is the likeliest
candidate, of an encoder the text of the likeliest label. A question is asked while its answer is
right; candidate answers, where a stream has them, are also ranked by their likelihood per token.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from fedkola.evaluation import scoring, text
from fedkola.federation import Federation
from fedkola.knowledge import candidates
from fedkola.knowledge.stream import Stream
from fedkola.types import Dataset

ROOM = 4  # tokens that an answer may be longer than the longest right one


def asked(stream: Stream, window: int) -> Dataset:
    """Test records whose answer is right in this window."""
    known = text.kinds(stream, window)
    rows = [i for i, record in enumerate(stream.test.records) if known.get(record) in _CHARTED]
    return stream.test.take(rows)


def answers(federation: Federation, state: Any, test: Dataset) -> dict[str, str]:
    """What a state says to each test record: record -> text ("" if it knows nothing)."""
    algorithm: Any = federation.algorithm
    reader = scoring.reader(federation)
    if hasattr(algorithm, "generate"):
        found = algorithm.generate(state, reader, test.questions, max_new_tokens=_room(federation))
    elif hasattr(algorithm, "losses") or hasattr(algorithm, "routed_losses"):
        return dict.fromkeys(test.records, "") | likeliest(federation, state, test)
    elif federation.foundation.kind == "causal":
        found = reader.generate(state.weights, test.questions, max_new_tokens=_room(federation))
    else:
        scores = scoring.scores_of(federation, state, test, reader.nodes)
        found = candidates.replies(scores, reader.nodes, federation.stream.catalogue.texts)
    return dict(zip(test.records, found, strict=True))


def measure(federation: Federation, state: Any, window: int) -> dict[str, float]:
    """Metrics of a state on the questions of a window.

    ``exact``, ``f1``, ``rouge`` and ``stale`` over all of them and, as ``exact/evolved``, over
    those of one kind; ``exact/age-K`` and ``stale/age-K`` over answers that became right K windows
    ago and were not right from the start. Of a causal model also ``perplexity``, ``loss`` and
    ``tokens`` of the right answers and ``choice``, the share where the right candidate is the
    likeliest. ``asked/SCOPE`` and ``right/SCOPE`` count by scope, or by concept where the stream
    has concepts.
    """
    stream = federation.stream
    test = asked(stream, window)
    if not len(test):
        return {"asked": 0.0}
    said = answers(federation, state, test)
    names = stream.catalogue.texts
    former = {
        record: tuple(names.get(label, label) for label in labels)
        for record, labels in stream.stale.items()
    }
    truths = {record: (right,) for record, right in zip(test.records, test.texts, strict=True)}
    found = {"asked": float(len(test)), **text.scores(said, truths, former)}
    for name, part in _parts(stream, test, window).items():
        scores = text.scores({record: said[record] for record in part}, truths, former)
        found |= {f"exact/{name}": scores["exact"], f"stale/{name}": scores["stale"]}
    for scope, records in _scopes(stream, test).items():
        right = sum(text.exact_match(said[record], truths[record]) for record in records)
        found |= {f"asked/{scope}": float(len(records)), f"right/{scope}": float(right)}
    if federation.foundation.kind == "causal":
        found |= likelihood(federation, state, test)
    return found


def likelihood(federation: Federation, state: Any, test: Dataset) -> dict[str, float]:
    """``loss``, ``perplexity`` and ``tokens`` of the right answers; ``choice``, the share of right
    ones among the likeliest candidates, where there are any."""
    found = dict(scoring.perplexity(federation, state, test))
    chosen = likeliest(federation, state, test)
    truths = dict(zip(test.records, test.texts, strict=True))
    if chosen:
        right = sum(text.exact_match(said, [truths[record]]) for record, said in chosen.items())
        found["choice"] = right / len(chosen)
    return found


def likeliest(federation: Federation, state: Any, test: Dataset) -> dict[str, str]:
    """Of each test record with candidates, the one of the greatest likelihood per token."""
    choices = federation.stream.choices
    rows = [i for i, record in enumerate(test.records) if choices.get(record)]
    pairs = [(i, own) for i in rows for own in choices[test.records[i]]]
    if not pairs:
        return {}
    every = replace(test.take([i for i, _ in pairs]), texts=tuple(own for _, own in pairs))
    scored = iter(scoring.losses(federation, state, every).tolist())
    found = {}
    for i in rows:
        own = choices[test.records[i]]
        nats, tokens = zip(*(next(scored) for _ in own), strict=True)
        found[test.records[i]] = own[text.choose(nats, tokens)]
    return found


# --- private --------------------------------------------------------------------------------------

_CHARTED = (text.STABLE, text.EVOLVED)


def _room(federation: Federation) -> int:
    """New tokens that an answer may have: those of the longest candidate, and some more."""
    if federation.foundation.kind != "causal":
        return ROOM
    tokenizer = federation.foundation.tokenizer
    texts = sorted(set(federation.stream.test.texts))
    return ROOM + max((len(ids) for ids in tokenizer(texts)["input_ids"]), default=0)


def _parts(stream: Stream, test: Dataset, window: int) -> dict[str, list[str]]:
    """Records by kind, and those that became right later than the question by their age."""
    known = text.kinds(stream, window)
    found: dict[str, list[str]] = {}
    for record, since in zip(test.records, test.windows, strict=True):
        found.setdefault(known[record], []).append(record)
        if known[record] == text.EVOLVED:
            found.setdefault(f"age-{window - since}", []).append(record)
    return found


def _scopes(stream: Stream, test: Dataset) -> Mapping[str, Sequence[str]]:
    scope_of = {label.code: label.scope for label in stream.catalogue.labels}
    found: dict[str, list[str]] = {}
    for record, label in zip(test.records, test.labels, strict=True):
        found.setdefault(stream.concepts.get(record, scope_of.get(label, "")), []).append(record)
    return found
