"""RealTime QA 2020-2023: the quizzes of four news sources, week by week, with choices.

Source: Kasai et al., RealTime QA: What's the Answer Right Now?, NeurIPS 2023 (data sets), the
quizzes without their evidence. The repository has no licence file: for internal tests only, never
passed on. Each news source is a site, and a question is asked from its window on, with its choices.
"""

from collections import Counter
from collections.abc import Mapping

from fedkola.errors import DataError, PlanError
from fedkola.evaluation.tasks import corpora, questions
from fedkola.evaluation.tasks.corpora import TRAIN
from fedkola.evaluation.tasks.questions import Told
from fedkola.knowledge.stream import Stream
from fedkola.plan import Task
from fedkola.quality.intake import plain

NAME = "realtimeqa"
FILE = "rtqa_2020_2023.jsonl.gz"
SOURCES: Mapping[str, str] = {
    "CNN": "cnn",
    "DelawareOnline": "delaware-online",
    "THE WEEK": "the-week",
    "USAtoday": "usa-today",
}


def load(task: Task, *, seed: int) -> Stream:
    """The stream of quizzes; reads ``period``. It is the same for every seed; ``sites`` and
    ``windows`` are not read."""
    if task.level not in ("", "answer"):
        raise PlanError(f'task.level = {task.level!r} is no level of {NAME}; set "answer"')
    excluded = {TRAIN: Counter[str]()}
    path = corpora.folder(task, NAME) / FILE
    rows = [
        row
        for row in corpora.read(path, "date", "source", "question", "choices", "answer")
        if _usable(row, excluded[TRAIN])
    ]
    if not rows:
        raise DataError(f"no usable question in {FILE}; copy the corpus again")
    windows = corpora.calendar([str(row["date"]) for row in rows], task.period)
    number = {name: n for n, name in enumerate(windows, start=1)}
    return questions.build(
        [_told(row, number[corpora.within(str(row["date"]), task.period)]) for row in rows],
        system=NAME,
        specialties={site: source for source, site in SOURCES.items()},
        windows=windows,
        excluded=excluded,
    )


def _usable(row: Mapping[str, object], excluded: Counter[str]) -> bool:
    problem = plain(row["question"])[1]
    reason = (
        f"{problem} text"
        if problem
        else "unknown source"
        if row["source"] not in SOURCES
        else "bad date"
        if not corpora.is_date(str(row["date"]))
        else "no answer"
        if not _texts(row["answer"])
        else ""
    )
    if reason:
        excluded[reason] += 1
    return not reason


def _told(row: Mapping[str, object], window: int) -> Told:
    return Told(
        question=plain(row["question"])[0],
        answer=_texts(row["answer"])[0],
        site=SOURCES[str(row["source"])],
        window=window,
        choices=_texts(row["choices"]),
    )


def _texts(value: object) -> tuple[str, ...]:
    found = [plain(item)[0] for item in value] if isinstance(value, list) else []
    return tuple(text for text in found if text)
