"""How much of the truth an attack recovered: tokens, places, whole sequences, n-grams.

Sequences are matched to the truth by an assignment that maximises the tokens in common; ROUGE
(Lin, 2004) is computed on token ids, so no tokenizer and no normalisation flatter a score.
"""

import math
from collections import Counter
from collections.abc import Mapping, Sequence

import numpy as np
from scipy.optimize import linear_sum_assignment

from fedkola.audit.evidence import Sequences

METRICS = (
    "token_recall",
    "token_precision",
    "place_recall",
    "exact",
    "rouge_1",
    "rouge_2",
    "rouge_l",
)


def scores(got: Sequences, truth: Sequences, *, bag: Sequence[int] = ()) -> dict[str, float]:
    """One update's METRICS. ``got`` are hypotheses, best first: no more than there are truths
    count, so that an attack gains nothing by guessing often.

    ``bag`` are tokens the attack claims were used beside those of its sequences; recall and
    precision are of distinct tokens. An empty truth scores 0.
    """
    kept = got[: len(truth)]
    claimed = set(bag) | {token for row in kept for token in row}
    used = {token for row in truth for token in row}
    pairs = _matched(kept, truth)
    total = sum(map(len, truth))
    placed = sum(a == b for g, t in pairs for a, b in zip(g, t, strict=False))
    count = max(len(truth), 1)
    return {
        "token_recall": _share(len(used & claimed), len(used)),
        "token_precision": _share(len(used & claimed), len(claimed)),
        "place_recall": _share(placed, total),
        "exact": sum(g == t for g, t in pairs) / count,
        "rouge_1": math.fsum(rouge_n(g, t, 1) for g, t in pairs) / count,
        "rouge_2": math.fsum(rouge_n(g, t, 2) for g, t in pairs) / count,
        "rouge_l": math.fsum(rouge_l(g, t) for g, t in pairs) / count,
    }


def rouge_n(got: Sequence[int], truth: Sequence[int], n: int) -> float:
    """F-measure of shared n-grams; 1 where neither has any and they are equal."""
    a, b = _grams(got, n), _grams(truth, n)
    if not a and not b:
        return float(tuple(got) == tuple(truth))
    return 2 * sum((a & b).values()) / (sum(a.values()) + sum(b.values()))


def rouge_l(got: Sequence[int], truth: Sequence[int]) -> float:
    """F-measure of the longest common subsequence."""
    if not got and not truth:
        return 1.0
    row = [0] * (len(truth) + 1)
    for token in got:
        last, row = row, [0]
        for place, other in enumerate(truth):
            row.append(last[place] + 1 if token == other else max(row[-1], last[place + 1]))
    return 2 * row[-1] / (len(got) + len(truth))


def overlap(one: Sequence[int], other: Sequence[int]) -> int:
    """Tokens in common, each as often as in both."""
    return sum((Counter(one) & Counter(other)).values())


def mean(rows: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """The mean of each metric over updates; empty for none."""
    return {key: math.fsum(row[key] for row in rows) / len(rows) for key in rows[0]} if rows else {}


# --- private --------------------------------------------------------------------------------------


def _matched(got: Sequences, truth: Sequences) -> list[tuple[tuple[int, ...], tuple[int, ...]]]:
    """Every truth with its hypothesis, so that most tokens are in place or at least in common."""
    if not got or not truth:
        return [((), t) for t in truth]
    worth = np.array(
        [
            [sum(a == b for a, b in zip(g, t, strict=False)) + overlap(g, t) for t in truth]
            for g in got
        ]
    )
    rows, columns = linear_sum_assignment(worth, maximize=True)
    taken = dict(zip(columns.tolist(), rows.tolist(), strict=True))
    return [(got[taken[j]] if j in taken else (), t) for j, t in enumerate(truth)]


def _grams(row: Sequence[int], n: int) -> Counter[tuple[int, ...]]:
    return Counter(tuple(row[i : i + n]) for i in range(len(row) - n + 1))


def _share(part: int, whole: int) -> float:
    return part / whole if whole else 0.0
