"""Noise for tests: each kind a pure function of the records, a rate and a seed.

Whether and how a record is corrupted depends on its own identifier alone, so the noise of one
record does not move when another is withdrawn. The truth is the dataset that was given: identifiers
and order stay.
"""

from collections.abc import Sequence
from dataclasses import replace
from hashlib import sha256

from fedkola.errors import PlanError
from fedkola.types import Dataset


def symmetric(data: Dataset, rate: float, codes: Sequence[str], seed: int) -> Dataset:
    """Each label replaced with probability ``rate`` by another of ``codes``, all equally likely.

    Raises PlanError for a rate outside [0, 1] and where no label could take another's place.
    """
    if not 0.0 <= rate <= 1.0:
        raise PlanError(f"a noise rate of {rate} was given; set a share of labels from 0 to 1")
    choices = sorted(set(codes))
    if rate > 0 and data.labels and len(choices) < 2:
        raise PlanError(
            f"label noise needs two labels to mix up and {len(choices)} was given; "
            "take the site out of scenario.noisy"
        )
    labels = []
    for record, label in zip(data.records, data.labels, strict=True):
        digest = sha256(f"symmetric/{seed}/{record}".encode("utf-8", "surrogatepass")).digest()
        if int.from_bytes(digest[:6]) / 2**48 < rate:
            others = [code for code in choices if code != label]
            labels.append(others[int.from_bytes(digest[8:16]) % len(others)])
        else:
            labels.append(label)
    return replace(data, labels=tuple(labels))
