"""Where records of the quality suite come from: real and made-up noise, sites, checked records."""

from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from fedkola.errors import UnknownName
from fedkola.evaluation.tasks import corpora, icd10cm
from fedkola.knowledge.stream import Stream, hash_share, seeded
from fedkola.plan import Task
from fedkola.quality.corrupt import KINDS, Known, likest
from fedkola.types import Catalogue, Dataset, Label

SITES = 10
KINDS_USED = ("none", "symmetric", "shift", "confusable")
ICD = {"icd-22": 2, "icd-278": 1, "icd-1918": 0}
Embed = Callable[[Sequence[str]], NDArray[np.float64]]
Pairs = list[tuple[str, str]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Scene:
    """Sites whose records may be wrong. ``truth`` maps a record to the label that is right,
    ``checked`` the records that a person has looked at, by site, to theirs."""

    stream: Stream
    truth: Mapping[str, str]
    checked: Mapping[str, Mapping[str, str]]


def scene(
    name: str,
    kind: str,
    *,
    rate: float,
    partition: str,
    records: int,
    tests: int,
    trusted: int,
    seed: int,
    embed: Embed,
) -> Scene:
    """A scene of the stream ``name`` under a kind of noise, drawn from the seed.

    ``kind`` "real" takes the labels that came with the data. ``records`` 0 takes all. Raises
    UnknownName for a stream that does not exist, DataError where its files are absent.
    """
    train, test, names, real = _source(name, seed)
    chance = seeded(seed, "quality", name)
    order = chance.sample(range(len(train)), len(train))[: records + trusted if records else None]
    train = [train[i] for i in order]
    given = [real[i] for i in order] if real else [label for _, label in train]
    ids = [f"r-{i:05d}" for i in range(len(train))]
    texts = [text for text, _ in train]
    truth = dict(zip(ids, (label for _, label in train), strict=True))
    codes = tuple(sorted(set(truth.values()) | set(given)))
    site_of = _divided([truth[i] for i in ids], partition, chance.randint(0, 2**31))
    data = Dataset(
        records=tuple(ids),
        texts=tuple(texts),
        labels=tuple(truth[i] for i in ids),
        patients=tuple(ids),
        windows=(1,) * len(ids),
    )
    if kind == "real":
        data = replace(data, labels=tuple(given))
    elif kind != "none":
        near = likest(embed(texts), data.labels, codes) if kind == "confusable" else {}
        data = KINDS[kind](data, rate, seed, Known(codes=codes, likest=near)).data
    looked = set(chance.sample(ids, min(trusted, len(ids) // 4)))
    catalogue = Catalogue(
        system=name,
        levels=("label",),
        labels=tuple(Label(code=code, path=(code,), scope="all") for code in codes),
        texts={code: names[code] for code in codes if code in names},
    )
    rows: defaultdict[str, list[int]] = defaultdict(list)
    for i, site in enumerate(site_of):
        rows[site].append(i)
    sites = {site: data.take(rows[site]) for site in sorted(rows)}
    asked = [(text, label) for text, label in test if label in set(codes)]
    asked = chance.sample(asked, min(tests or len(asked), len(asked)))
    return Scene(
        stream=Stream(
            catalogue=catalogue,
            sites=sites,
            test=Dataset(
                records=tuple(f"t-{i}" for i in range(len(asked))),
                texts=tuple(text for text, _ in asked),
                labels=tuple(label for _, label in asked),
                patients=("",) * len(asked),
                windows=(1,) * len(asked),
            ),
            windows=("now",),
        ),
        truth=truth,
        checked={
            site: {record: truth[record] for record in held.records if record in looked}
            for site, held in sites.items()
        },
    )


def _source(name: str, seed: int) -> tuple[Pairs, Pairs, dict[str, str], list[str]]:
    """(train, test, label texts, real noisy labels or nothing) of a stream."""
    if name in ICD:
        return _icd(ICD[name])
    if name == "agnews":
        train = _read("cl_benchmark", "agnews_train.jsonl.gz")
        return train, _read("cl_benchmark", "agnews_dev.jsonl.gz"), {}, []
    if name == "trec":
        train = _read("sentence_tasks", "trec_train.jsonl.gz")
        return train, _read("sentence_tasks", "trec_test.jsonl.gz"), {}, []
    if name == "yoruba":
        where = corpora.folder(Task(name="yoruba"), "noisy_news_yoruba")
        found = corpora.read(
            where / "train_clean_and_noisy.jsonl.gz", "text", "label", "noisy_label"
        )
        train = [(str(row["text"]), str(row["label"])) for row in found]
        test = _read("noisy_news_yoruba", "test.jsonl.gz")
        return train, test, {}, [str(row["noisy_label"]) for row in found]
    if name == "isbook":
        return _votes()
    known = ", ".join([*ICD, "agnews", "trec", "yoruba", "isbook"])
    raise UnknownName(f"stream {name!r} was given; the suite quality has {known}")


def _icd(level: int) -> tuple[Pairs, Pairs, dict[str, str], list[str]]:
    """Descriptions train, synonyms of the untouched part test; a label's texts are all titles
    below it."""
    catalogue, codes = icd10cm.tabular()
    path = {label.code: label.path for label in catalogue.labels}
    train = [(code.text, path[code.category][level]) for code in codes]
    known = {code.text for code in codes}
    test = [
        (text, path[code.category][level])
        for code in codes
        for text in code.synonyms
        if text not in known and hash_share(text) >= 0.3
    ]
    titles: defaultdict[str, dict[str, None]] = defaultdict(dict)
    for steps in path.values():
        for node in steps[: level + 1]:
            titles[steps[level]][catalogue.texts.get(node, node)] = None
    return train, test, {label: "\n".join(lines) for label, lines in titles.items()}, []


def _votes() -> tuple[Pairs, Pairs, dict[str, str], list[str]]:
    """One vote a record, the gold label as its truth."""
    where = corpora.folder(Task(name="isbook"), "crowd_amazon_isbook")
    train, votes = [], []
    for row in corpora.read(where / "train_votes.jsonl.gz", "text", "gold", "votes"):
        given = row["votes"]
        assert isinstance(given, list)
        first = min(given, key=lambda vote: hash_share(f"{vote[0]}/{row['text']}"))
        train.append((str(row["text"]), str(row["gold"])))
        votes.append(str(first[1]))
    return train, _read("crowd_amazon_isbook", "test.jsonl.gz"), {}, votes


def _read(folder: str, file: str) -> Pairs:
    found = corpora.read(corpora.folder(Task(name=folder), folder) / file, "text", "label")
    return [(str(row["text"]), str(row["label"])) for row in found]


def _divided(labels: Sequence[str], partition: str, seed: int) -> list[str]:
    """The site of every record: "iid", or "dirichlet:0.1" by label."""
    generator = np.random.default_rng(seed)
    names = [f"site-{i:02d}" for i in range(SITES)]
    if partition == "iid":
        return [names[i] for i in generator.integers(SITES, size=len(labels))]
    spread = float(partition.partition(":")[2])
    shares = {label: generator.dirichlet([spread] * SITES) for label in sorted(Counter(labels))}
    return [names[int(generator.choice(SITES, p=shares[label]))] for label in labels]
