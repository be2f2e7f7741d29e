"""Questions whose answers change: what is asked, what is true when, and what has become wrong.

Shared by the tasks that stream questions and answers. The label of a record is its answer, and its
identifier names the question, so a changed answer arrives as a revision of the record that the
site holds. A question is asked in the words in which it was told, in every window in which an
answer to it is known; the truth is the answer of that window. The question is the prompt and the
answer the text, so an encoder classifies the question and a causal model answers it. ``stale``
holds labels, ``choices`` texts.

The concept of a question is *stable* (one answer, known in window 1), *evolved* (its answer
changes) or *uncharted* (nobody knows its one answer in window 1).
"""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from hashlib import sha256

from fedkola.evaluation.tasks import corpora
from fedkola.evaluation.tasks.corpora import Row
from fedkola.knowledge.stream import Stream
from fedkola.types import Catalogue, Label

STABLE, EVOLVED, UNCHARTED = "stable", "evolved", "uncharted"


@dataclass(frozen=True, slots=True, kw_only=True)
class Told:
    """An answer as a site hears it."""

    question: str
    answer: str
    site: str
    window: int
    choices: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Version:
    """An answer to one question from a window on, up to and including ``last`` (None: the end)."""

    told: Told
    window: int
    last: int | None
    stale: tuple[str, ...]


def build(
    told: Sequence[Told],
    *,
    system: str,
    specialties: Mapping[str, str],
    windows: Sequence[str],
    excluded: Mapping[str, Mapping[str, int]],
) -> Stream:
    """The stream of what the sites were told, in order; a later answer of one window wins."""
    texts: dict[str, str] = {}
    for item in told:
        texts.setdefault(label(item.answer), item.answer)
    by_question: defaultdict[str, list[Told]] = defaultdict(list)
    for item in told:
        by_question[item.question].append(item)
    train: list[Row] = []
    test: list[Row] = []
    ends: dict[str, int] = {}
    stale: dict[str, tuple[str, ...]] = {}
    concepts: dict[str, str] = {}
    choices: dict[str, tuple[str, ...]] = {}
    for question, items in by_question.items():
        own = versions(items)
        train += _revisions(question, items)
        for version in own:
            asked = f"{identifier(question)}@{version.window}"
            test.append(_row(asked, version))
            concepts[asked] = (
                EVOLVED if len(own) > 1 else STABLE if version.window == 1 else UNCHARTED
            )
            if version.last is not None:
                ends[asked] = version.last
            if version.stale:
                stale[asked] = version.stale
            if version.told.choices:
                choices[asked] = version.told.choices
    return corpora.stream(
        catalogue=Catalogue(
            system=system,
            levels=("answer",),
            labels=tuple(Label(code=code, path=(code,), scope=system) for code in sorted(texts)),
            texts=texts,
        ),
        specialties=specialties,
        train=train,
        test=test,
        windows=windows,
        excluded=excluded,
        ends=ends,
        stale=stale,
        concepts=concepts,
        choices=choices,
    )


def versions(items: Sequence[Told]) -> list[Version]:
    """The answers to one question, in order of time; of one window the last told counts."""
    latest = {item.window: item for item in items}
    changes = [latest[window] for window in sorted(latest)]
    changes = [
        item
        for before, item in zip([None, *changes], changes, strict=False)
        if before is None or label(before.answer) != label(item.answer)
    ]
    found = []
    for i, item in enumerate(changes):
        now = label(item.answer)
        earlier = dict.fromkeys(label(other.answer) for other in changes[:i])
        found.append(
            Version(
                told=item,
                window=item.window,
                last=changes[i + 1].window - 1 if i + 1 < len(changes) else None,
                stale=tuple(code for code in earlier if code != now),
            )
        )
    return found


def label(answer: str) -> str:
    """The label of an answer: lower case, single blanks."""
    return " ".join(answer.lower().split())


def identifier(question: str) -> str:
    """The identifier of a question's records: equal for equal words."""
    return "q-" + sha256(label(question).encode("utf-8", "surrogatepass")).hexdigest()[:12]


def _revisions(question: str, items: Sequence[Told]) -> list[Row]:
    """The records of one question: one at every site that heard of it, again at every change."""
    by_site: defaultdict[str, list[Told]] = defaultdict(list)
    for item in items:
        by_site[item.site].append(item)
    return [
        replace(_row(identifier(question), version), site=site)
        for site, own in by_site.items()
        for version in versions(own)
    ]


def _row(record: str, version: Version) -> Row:
    return Row(
        record=record,
        text=version.told.answer,
        label=label(version.told.answer),
        window=version.window,
        prompt=version.told.question,
    )
