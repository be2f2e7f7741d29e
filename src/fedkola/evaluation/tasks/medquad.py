"""MedQuAD: medical answers of six NIH sources, each a site; which type of question do they answer?

Source: Ben Abacha and Demner-Fushman, A question-entailment approach to question answering, BMC
Bioinformatics 2019 (CC BY 4.0). The text is the answer, the label one of fifteen types of question;
the question would give its type away by its first words. With ``task.unlabelled`` the question is
the prompt and the answer the text of a causal language model. A source's articles arrive in the
order of its file; all answers of one article are withdrawn together, as the records of a patient.
Sources join late by ``scenario.late``.
"""

from collections import Counter
from collections.abc import Mapping

from fedkola.errors import PlanError
from fedkola.evaluation.tasks import corpora
from fedkola.evaluation.tasks.corpora import TEST, TRAIN, Row
from fedkola.knowledge.stream import Stream, hash_share
from fedkola.plan import Task
from fedkola.types import Catalogue, Label

NAME = "medquad"
LEVELS = ("type",)
SOURCES: Mapping[str, tuple[str, str]] = {
    "cancergov": ("1_CancerGov_QA", "National Cancer Institute"),
    "gard": ("2_GARD_QA", "Genetic and Rare Diseases Information Center"),
    "ghr": ("3_GHR_QA", "Genetics Home Reference"),
    "mplus": ("4_MPlus_Health_Topics_QA", "MedlinePlus Health Topics"),
    "niddk": ("5_NIDDK_QA", "National Institute of Diabetes and Digestive and Kidney Diseases"),
    "ninds": ("6_NINDS_QA", "National Institute of Neurological Disorders and Stroke"),
}


def load(task: Task, *, seed: int) -> Stream:
    """The stream of the six sources; reads ``level``, ``windows``, ``test_share`` (decided by a
    hash of the answer), ``per_label`` and ``unlabelled``. ``sites`` is not read."""
    if task.level not in ("", *LEVELS):
        raise PlanError(f'task.level = {task.level!r} is no level of {NAME}; set "{LEVELS[0]}"')
    if not 0 < task.test_share < 1:
        raise PlanError(f"task.test_share = {task.test_share}; set a share between 0 and 1")
    excluded = {TRAIN: Counter[str](), TEST: Counter[str]()}
    rows = [row for site in SOURCES for row in _rows(task, site, excluded[TRAIN])]
    train = [row for row in rows if hash_share(row.text) >= task.test_share]
    test = [row for row in rows if hash_share(row.text) < task.test_share]
    train, test, notices = corpora.capped(train, test, per_label=task.per_label, seed=seed)
    codes = sorted({row.label for row in rows})
    return corpora.stream(
        catalogue=Catalogue(
            system=NAME,
            levels=LEVELS,
            labels=tuple(Label(code=code, path=(code,), scope=NAME) for code in codes),
        ),
        specialties={site: source for site, (_, source) in SOURCES.items()},
        train=train,
        test=[_asked(row) for row in test],
        windows=[f"window {number}" for number in range(1, task.windows + 1)],
        excluded=excluded,
        notices=notices,
        concepts={row.record: row.site for row in test},
    )


def _rows(task: Task, site: str, excluded: Counter[str]) -> list[Row]:
    path = corpora.folder(task, NAME) / f"{SOURCES[site][0]}.jsonl.gz"
    read = corpora.read(path, "qid", "qtype", "question", "answer")
    usable = corpora.admitted(read, excluded, text="answer", label="qtype")
    articles = [str(read[i]["qid"]).rsplit("-", 1)[0] for i, _, _ in usable]
    place = {article: n for n, article in enumerate(dict.fromkeys(articles))}
    return [
        Row(
            record=f"{site}-{i + 1}",
            text=text,
            label=NAME if task.unlabelled else label,
            site=site,
            window=1 + place[article] * task.windows // len(place),
            patient=f"{site}/{article}",
            prompt=str(read[i]["question"]) if task.unlabelled else "",
        )
        for (i, text, label), article in zip(usable, articles, strict=True)
    ]


def _asked(row: Row) -> Row:
    """A test row: asked once its label has arrived anywhere."""
    return Row(record=row.record, text=row.text, label=row.label, prompt=row.prompt)
