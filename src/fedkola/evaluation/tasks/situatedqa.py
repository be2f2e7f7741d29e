"""SituatedQA: open questions whose answers depend on the year they are asked in.

Source: Zhang and Choi, SituatedQA: Incorporating Extra-Linguistic Contexts into QA, EMNLP 2021, the
temporal part, both splits (they share no question). The repository has no licence file: for
internal tests only, never passed on. A question is at one site, drawn by ``task.partition``. The
last window is the last year; every window is one year, and the first holds all years before too. Of
several right answers the one that was right before stays the label, else the most frequent.
"""

import re
from collections import Counter, defaultdict

from fedkola.errors import DataError, PlanError
from fedkola.evaluation.tasks import corpora, questions
from fedkola.evaluation.tasks.corpora import TRAIN
from fedkola.evaluation.tasks.questions import Told, label
from fedkola.knowledge.stream import Stream, deal, numbered
from fedkola.plan import Task
from fedkola.quality.intake import plain

NAME = "situatedqa_temporal"
FILES = ("train.jsonl.gz", "dev.jsonl.gz")
SYSTEM = "situatedqa"
Timeline = list[tuple[tuple[int, int, int], list[str]]]
MONTHS = (
    *("January", "February", "March", "April", "May", "June"),
    *("July", "August", "September", "October", "November", "December"),
)


def load(task: Task, *, seed: int) -> Stream:
    """The stream of questions; reads ``sites``, ``windows`` and ``partition``."""
    if task.level not in ("", "answer"):
        raise PlanError(f'task.level = {task.level!r} is no level of {SYSTEM}; set "answer"')
    excluded = {TRAIN: Counter[str]()}
    asked = _timelines(task, excluded[TRAIN])
    if not asked:
        raise DataError(f"no usable question in {', '.join(FILES)}; copy the corpus again")
    last = max(date[0] for timeline in asked.values() for date, _ in timeline)
    first = last - task.windows + 1
    names = numbered(task.sites)
    chosen = {question: _chosen(timeline) for question, timeline in asked.items()}
    drawn = deal(
        [label(timeline[0][1]) for timeline in chosen.values()],
        names,
        partition=task.partition,
        seed=seed,
    )
    return questions.build(
        [
            Told(
                question=question,
                answer=answer,
                site=site,
                window=max(1, year - first + 1),
            )
            for (question, timeline), site in zip(chosen.items(), drawn, strict=True)
            for year, answer in timeline
        ],
        system=SYSTEM,
        specialties=dict.fromkeys(names, f"simulated, {task.partition}"),
        windows=[
            f"until {first}" if year == first else str(year) for year in range(first, last + 1)
        ],
        excluded=excluded,
    )


def date(text: str) -> tuple[int, int, int] | None:
    """Year, month and day of "2018" (before all its days) or "March 21, 2021"; None for others."""
    if re.fullmatch(r"\d{4}", text):
        return int(text), 0, 0
    match = re.fullmatch(r"([A-Z][a-z]+) (\d{1,2}), (\d{4})", text)
    if match is None or match[1] not in MONTHS:
        return None
    return int(match[3]), MONTHS.index(match[1]) + 1, int(match[2])


def _timelines(task: Task, excluded: Counter[str]) -> dict[str, Timeline]:
    """Dated answers to every question, in order of time."""
    found: defaultdict[str, Timeline] = defaultdict(list)
    for file in FILES:
        path = corpora.folder(task, NAME) / file
        for row in corpora.read(path, "question", "date", "answer"):
            question, problem = plain(row["question"])
            answers = row["answer"] if isinstance(row["answer"], list) else []
            usable = [" ".join(text.split()) for text in map(_text, answers) if text]
            when = date(str(row["date"]))
            if problem or not usable or when is None:
                reason = f"{problem} text" if problem else "bad date" if usable else "no answer"
                excluded[reason] += 1
            else:
                found[question].append((when, usable))
    return {question: sorted(timeline, key=lambda t: t[0]) for question, timeline in found.items()}


def _text(value: object) -> str:
    return plain(value)[0]


def _chosen(timeline: Timeline) -> list[tuple[int, str]]:
    """(year, answer) with one answer a date."""
    found: list[tuple[int, str]] = []
    before = ""
    for when, answers in timeline:
        if label(before) not in {label(answer) for answer in answers}:
            counts = Counter(label(answer) for answer in answers)
            before = max(answers, key=lambda answer: counts[label(answer)])
        found.append((when[0], before))
    return found
