"""The first look at a record: is there a text, a label of the catalogue, an identity of its own?

Shared by the sources of records. What cannot be used is counted under a reason, never dropped in
silence; a stored text loses the blanks around it and is not changed otherwise.
"""

from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from math import isnan

# What spreadsheets and data frames write where there is nothing. "None" and "null" are words too,
# so as labels they stand.
NO_NUMBER = frozenset({"nan", "<na>"})
NO_TEXT = frozenset({"none", "null"})


@dataclass(frozen=True, slots=True, kw_only=True)
class Admitted:
    """The usable rows, column by column; ``rows`` are their positions in what was given.

    ``excluded`` counts the other rows by reason, each row under the first that applies.
    """

    rows: tuple[int, ...]
    records: tuple[str, ...]
    texts: tuple[str, ...]
    labels: tuple[str, ...]
    excluded: Mapping[str, int]


def admit(
    records: Sequence[object],
    texts: Sequence[object],
    labels: Sequence[object] | None,
    *,
    known: Collection[str] | None = None,
) -> Admitted:
    """Check columns of equal length as they were read, in their order.

    ``labels`` None is unlabelled text and gives labels "". ``known`` are the labels that count
    (None: all of them). Of records with one identifier the first usable one is kept. Reasons are
    ``<problem> text``, ``<problem> label`` and ``<problem> record`` with the problems of
    :func:`plain`, ``unknown label`` and ``duplicate id``.
    """
    excluded: Counter[str] = Counter()
    kept: list[tuple[int, str, str, str]] = []
    seen: set[str] = set()
    for i, (raw_record, raw_text) in enumerate(zip(records, texts, strict=True)):
        text, text_problem = plain(raw_text)
        if text.lower() in NO_TEXT:
            text_problem = "missing"
        label, label_problem = ("", "") if labels is None else plain(labels[i])
        record, record_problem = plain(raw_record)
        if text_problem:
            excluded[f"{text_problem} text"] += 1
        elif label_problem:
            excluded[f"{label_problem} label"] += 1
        elif known is not None and labels is not None and label not in known:
            excluded["unknown label"] += 1
        elif record_problem:
            excluded[f"{record_problem} record"] += 1
        elif record in seen:
            excluded["duplicate id"] += 1
        else:
            seen.add(record)
            kept.append((i, record, text, label))
    return Admitted(
        rows=tuple(i for i, _, _, _ in kept),
        records=tuple(record for _, record, _, _ in kept),
        texts=tuple(text for _, _, text, _ in kept),
        labels=tuple(label for _, _, _, label in kept),
        excluded=dict(sorted(excluded.items())),
    )


def plain(value: object) -> tuple[str, str]:
    """A value as text without surrounding blanks, and what is wrong with it ("" if nothing).

    Numbers become text, whole ones without a fraction. Problems: ``missing`` (null), ``NaN``,
    ``empty``, ``nested`` (a list, an object, bytes) and ``broken`` (not valid Unicode).
    """
    if value is None:
        return "", "missing"
    if isinstance(value, float):
        if isnan(value):
            return "", "NaN"
        return (str(int(value)) if value.is_integer() else str(value)), ""
    if isinstance(value, (Mapping, bytes)) or (
        isinstance(value, Collection) and not isinstance(value, str)
    ):
        return "", "nested"
    text = str(value).strip()
    if not text:
        return "", "empty"
    if text.lower() in NO_NUMBER:
        return "", "NaN"
    try:
        text.encode()
    except UnicodeEncodeError:
        return "", "broken"
    return text, ""
