"""What a site has for a scan: its records apart from checked ones, label texts, exact statistics.

The site's half of :mod:`fedkola.algorithms.quality_scan` that knows nothing of its exchanges.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fedkola.errors import DataError
from fedkola.knowledge import statistics
from fedkola.quality import kept
from fedkola.types import Broadcast, Client, Dataset

CHUNK = 4096


@dataclass(frozen=True, slots=True, kw_only=True)
class Checked:
    """Records that a person has looked at, and the label that is right for each."""

    data: Dataset
    right: tuple[str, ...]


def scanned(client: Client, asked: Broadcast) -> tuple[Dataset, Tensor, Tensor]:
    """The records to scan, their embeddings (n, d), and the rows (n,) of their labels."""
    data = client.knowledge.until(asked.round)
    known = kept.checked(client.store)
    data = data.take([i for i, record in enumerate(data.records) if record not in known])
    return data, client.features(data), rows(client, data.labels)


def checked(client: Client, asked: Broadcast, *, judges: bool) -> Checked:
    """The checked records that judge, about three in five, or those that guide; by a hash."""
    data, right = client.knowledge.until(asked.round), kept.checked(client.store)
    chosen = [
        i
        for i, record in enumerate(data.records)
        if record in right and (hashlib.sha256(record.encode()).digest()[0] % 5 < 3) == judges
    ]
    mine = data.take(chosen)
    return Checked(data=mine, right=tuple(right[record] for record in mine.records))


def rows(client: Client, labels: Sequence[str]) -> Tensor:
    """The positions (n,) of labels in the catalogue; raises DataError for one that is not there."""
    place = {code: i for i, code in enumerate(client.catalogue.codes())}
    for label in labels:
        if label not in place:
            raise DataError(
                f"label {label!r} is in no catalogue of this run; correct the record or the "
                "checked label"
            )
    return torch.tensor([place[label] for label in labels], dtype=torch.int64)


def texts(client: Client) -> tuple[Tensor, Tensor]:
    """Embeddings (m, d) of the lines that the catalogue says, and the row (m,) of each."""
    lines = [
        (i, line)
        for i, code in enumerate(client.catalogue.codes())
        for line in client.catalogue.texts.get(code, "").split("\n")
        if line.strip()
    ]
    said = tuple(line for _, line in lines)
    nobody = ("",) * len(said)
    data = Dataset(
        records=said, texts=said, labels=nobody, patients=nobody, windows=(0,) * len(said)
    )
    return client.features(data), torch.tensor([i for i, _ in lines], dtype=torch.int64)


def row_sums(z: Tensor, targets: Tensor, *, features: int, bits: int, seed: int) -> Tensor:
    """s (C, p) int64 = t' phi, exact: products stay below 2^24 in blocks of 4,096 records."""
    sums = torch.zeros(targets.shape[1], features, dtype=torch.int64)
    for part, shares in zip(torch.split(z, CHUNK), torch.split(targets, CHUNK), strict=True):
        phi = statistics.expand(part, features=features, bits=bits, seed=seed).to(torch.float64)
        sums += (shares.T.to(torch.float64) @ phi).to(torch.int64)
    return sums


def gram(z: Tensor, weights: Tensor, *, features: int, bits: int, seed: int) -> Tensor:
    """The packed Gram of records weighted by whole numbers (n,), int64 and exact."""
    total = torch.zeros(features, features, dtype=torch.int64)
    for part, share in zip(torch.split(z, CHUNK), torch.split(weights, CHUNK), strict=True):
        phi = statistics.expand(part, features=features, bits=bits, seed=seed).to(torch.float64)
        total += ((phi * share[:, None]).T @ phi).to(torch.int64)
    return statistics.pack(total)
