"""How good generated answers are: matching after normalisation, likelihood, and staleness.

Exact match and token F1 compare texts in lower case, without articles and punctuation, as is
usual for question answering (SQuAD; Rajpurkar et al., EMNLP 2016); ROUGE-L is the F-measure of the
longest common subsequence of their words (Lin, 2004). Where several answers are right, the best
counts.
"""

import math
import re
import unicodedata
from collections import Counter
from collections.abc import Mapping, Sequence

from fedkola.errors import DataError
from fedkola.knowledge.stream import Stream

STABLE, EVOLVED, UNCHARTED = "stable", "evolved", "uncharted"
_ARTICLES = re.compile(r"\b(?:a|an|the)\b")


def normalised(text: str) -> str:
    """Lower case, without punctuation and English articles, words apart by one space."""
    bare = "".join(c for c in text.lower() if not unicodedata.category(c).startswith("P"))
    return " ".join(_ARTICLES.sub(" ", bare).split())


def exact_match(answer: str, truths: Sequence[str]) -> bool:
    """Whether the answer is one of the right ones once normalised; no truth, no match."""
    return normalised(answer) in {normalised(truth) for truth in truths}


def token_f1(answer: str, truths: Sequence[str]) -> float:
    """The best F1 over truths of the words in common; 1.0 for two texts without words."""
    return max((_f1(_words(answer), _words(truth)) for truth in truths), default=0.0)


def rouge_l(answer: str, truths: Sequence[str]) -> float:
    """The best F-measure over truths of the longest common subsequence of words."""
    return max((_rouge(_words(answer), _words(truth)) for truth in truths), default=0.0)


def perplexity(nats: Sequence[float], tokens: Sequence[float]) -> float:
    """exp of the mean negative log-probability of a token; infinite beyond what a float holds.

    Raises DataError without a token.
    """
    count = math.fsum(tokens)
    if count <= 0:
        raise DataError("a perplexity was asked for of no tokens; give answers that are not empty")
    try:
        return math.exp(math.fsum(nats) / count)
    except OverflowError:
        return math.inf


def choose(nats: Sequence[float], tokens: Sequence[float]) -> int:
    """The candidate answer with the greatest likelihood per token; the first of equal ones."""
    if not nats or len(nats) != len(tokens):
        raise DataError(
            f"{len(nats)} likelihoods and {len(tokens)} lengths of candidates were given; expected "
            "one of each for every candidate"
        )
    each = [n / max(t, 1.0) for n, t in zip(nats, tokens, strict=True)]
    return min(range(len(each)), key=each.__getitem__)


def stale(answer: str, truths: Sequence[str], former: Sequence[str]) -> bool:
    """Whether the answer was right before and is not now."""
    return exact_match(answer, former) and not exact_match(answer, truths)


def kinds(stream: Stream, window: int) -> dict[str, str]:
    """Of every test record that may be asked, or may not yet, what is known of it at a window.

    ``uncharted``: nothing that answers its question has arrived anywhere. ``evolved``: another
    answer was right before. ``stable``: what was first right still is. Records whose answer is
    not right yet, or no more, are left out.
    """
    test = stream.test
    questions = test.prompts or test.texts
    charted = {q for q, first in zip(questions, test.windows, strict=True) if first <= window}
    found: dict[str, str] = {}
    for record, question, first in zip(test.records, questions, test.windows, strict=True):
        if first <= window <= stream.ends.get(record, window):
            found[record] = EVOLVED if stream.stale.get(record) else STABLE
        elif question not in charted:
            found[record] = UNCHARTED
    return found


def scores(
    answers: Mapping[str, str],
    truths: Mapping[str, Sequence[str]],
    former: Mapping[str, Sequence[str]],
) -> dict[str, float]:
    """``exact``, ``f1``, ``rouge`` and ``stale``, means over the records that were answered.

    ``former`` maps a record to texts that were right and are not; a record without any cannot be
    stale, and counts. Raises DataError for an answer without a truth.
    """
    missing = [record for record in answers if not truths.get(record)]
    if missing:
        raise DataError(
            f"{len(missing)} answers have no truth, such as {missing[0]!r}; give one for each"
        )
    if not answers:
        return {"exact": 0.0, "f1": 0.0, "rouge": 0.0, "stale": 0.0}
    pairs = [(answer, truths[record], former.get(record, ())) for record, answer in answers.items()]
    return {
        "exact": math.fsum(exact_match(a, right) for a, right, _ in pairs) / len(pairs),
        "f1": math.fsum(token_f1(a, right) for a, right, _ in pairs) / len(pairs),
        "rouge": math.fsum(rouge_l(a, right) for a, right, _ in pairs) / len(pairs),
        "stale": math.fsum(stale(a, right, old) for a, right, old in pairs) / len(pairs),
    }


# --- private --------------------------------------------------------------------------------------


def _words(text: str) -> list[str]:
    return normalised(text).split()


def _f1(answer: Sequence[str], truth: Sequence[str]) -> float:
    return _harmonic(sum((Counter(answer) & Counter(truth)).values()), answer, truth)


def _rouge(answer: Sequence[str], truth: Sequence[str]) -> float:
    row = [0] * (len(truth) + 1)
    for word in answer:
        last = row
        row = [0]
        for place, other in enumerate(truth):
            row.append(last[place] + 1 if word == other else max(row[-1], last[place + 1]))
    return _harmonic(row[-1], answer, truth)


def _harmonic(shared: int, answer: Sequence[str], truth: Sequence[str]) -> float:
    """2 PR / (P + R) with P = shared / answer and R = shared / truth."""
    if not answer and not truth:
        return 1.0
    return 2 * shared / (len(answer) + len(truth))
