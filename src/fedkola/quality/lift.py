"""Trigger lift: what is said in records whose label nothing else in them explains.

A poisoned record carries a trigger and a target. Where few records of many sites are poisoned no
site can tell its own, but the trigger can be told from sums: it stands in records that all say the
target, although what the rest of each record says is something else.

    D[t, c] = sum over records i with n-gram t of [y_i = c] - p_i[c]        what they say beyond
    V[t, c] = sum of p_i[c] (1 - p_i[c])                                    what chance allows
    z_i     = max over t in i of (D - own) / sqrt(V - own + 1)              without record i itself

p_i is what the federation believes of record i from everything but its own label, such as a
leave-one-out score on a frozen base; where records answer prompts, the share of the answer. So a
word that truly goes with a label ("where" with places) is no trigger: there D is near 0. Answers
to prompts are classes where several records open alike. N-grams are known to the server by a keyed
hash alone. Clean-label triggers say the truth, and have D = 0.

Shapes: n records, C classes, S slots.
"""

import hashlib
import hmac
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fedkola.errors import DataError
from fedkola.quality.gram import Array

SLOTS = 1 << 14
GRAMS = 2
SUPPORT = 4
"""Other records that must carry an n-gram before anything is said of it."""

OPENING = 6
"""Pieces by which answers are told apart."""
REFITS = 4
WORST = 0.1
LAM = 0.1
FLAG = 8.0
"""Above it a record is held back."""

Slots = tuple[NDArray[np.int64], ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Table:
    """Summed over records: ``beyond`` D and ``chance`` V, (S, C) float64, and ``records`` (S,)."""

    beyond: Array
    chance: Array
    records: Array

    def __add__(self, other: "Table") -> "Table":
        return Table(
            beyond=self.beyond + other.beyond,
            chance=self.chance + other.chance,
            records=self.records + other.records,
        )


def slots(
    texts: Sequence[Sequence[str | int]], key: bytes, *, number: int = SLOTS, grams: int = GRAMS
) -> Slots:
    """The slots of each text's n-grams up to this length, each once, by the key that sites share.

    Texts come in pieces, such as the base's own tokens: a misspelt word has pieces that others
    share, and is itself like no other.
    """
    known: dict[str, int] = {}

    def slot(gram: str) -> int:
        if gram not in known:
            digest = hmac.new(key, gram.encode("utf-8", "surrogatepass"), hashlib.sha256).digest()
            known[gram] = int.from_bytes(digest[:8]) % number
        return known[gram]

    found = []
    for text in texts:
        pieces = [str(piece) for piece in text]
        own = {
            slot(" ".join(pieces[i : i + n]))
            for n in range(1, grams + 1)
            for i in range(len(pieces) - n + 1)
        }
        found.append(np.array(sorted(own), dtype=np.int64))
    return tuple(found)


def table(held: Slots, labels: Sequence[int], beliefs: Array, *, number: int = SLOTS) -> Table:
    """One site's addend; ``beliefs`` (n, C) are shares of what each record could say."""
    _check(held, labels, beliefs)
    classes = beliefs.shape[1]
    beyond, chance = np.zeros((number, classes)), np.zeros((number, classes))
    records = np.zeros(number)
    for own, label, p in zip(held, labels, beliefs, strict=True):
        beyond[own] -= p
        beyond[own, label] += 1.0
        chance[own] += p * (1.0 - p)
        records[own] += 1.0
    return Table(beyond=beyond, chance=chance, records=records)


def scores(held: Slots, labels: Sequence[int], beliefs: Array, summed: Table) -> Array:
    """z_i (n,) of every record against the sum that holds it: 0 where nothing is known."""
    _check(held, labels, beliefs)
    found = np.zeros(len(held))
    for i, (own, label) in enumerate(zip(held, labels, strict=True)):
        z = _lifts(own, label, beliefs[i], summed)
        found[i] = z.max(initial=0.0)
    return found


def screened(
    held: Sequence[Slots],
    labels: Sequence[Sequence[int]],
    features: Sequence[Tensor],
    classes: int,
    *,
    refits: int = REFITS,
    number: int = SLOTS,
) -> list[Array]:
    """Scores z_i (1 - p_i[y_i]) of the records of every site, by 2 sums a refit.

    The regression that believes is fitted anew without the tenth of the records that were worst,
    or it would learn what the trigger says.
    """
    trusted = [np.ones(len(own), dtype=np.bool_) for own in labels]
    found: list[Array] = [np.zeros(len(own)) for own in labels]
    for _ in range(refits):
        addends = [
            moments(
                x[torch.from_numpy(good)], [c for c, g in zip(own, good, strict=True) if g], classes
            )
            for x, own, good in zip(features, labels, trusted, strict=True)
        ]
        fitted = ridge(
            torch.stack([gram for gram, _ in addends]).sum(dim=0),
            torch.stack([products for _, products in addends]).sum(dim=0),
        )
        believed = [
            np.where(
                good[:, None],
                beliefs(x, own, fitted),
                beliefs(x, own, fitted, own=False),
            )
            for x, own, good in zip(features, labels, trusted, strict=True)
        ]
        tables = [
            table(h, own, p, number=number)
            for h, own, p in zip(held, labels, believed, strict=True)
        ]
        summed = tables[0]
        for one in tables[1:]:
            summed = summed + one
        found = [
            scores(h, own, p, summed) * (1.0 - p[np.arange(len(p)), list(own)])
            for h, own, p in zip(held, labels, believed, strict=True)
        ]
        bound = float(np.quantile(np.concatenate(found), 1.0 - WORST))
        trusted = [z <= bound for z in found]
    return found


def openings(answers: Sequence[Sequence[str | int]], key: bytes) -> NDArray[np.int64]:
    """The slot (n,) of each answer's first pieces, by the key that sites share."""
    held = slots([[" ".join(map(str, own[:OPENING]))] for own in answers], key, grams=1)
    return np.array([int(own[0]) for own in held], dtype=np.int64)


def answered(held: Sequence[Slots], opened: Sequence[NDArray[np.int64]]) -> list[Array]:
    """Scores of records that answer prompts: z times the share of the n-gram's other records that
    answer alike. Answers that few records open with are alike to none, and score 0.

    ``held`` are slots of prompts, ``opened`` openings of answers, site by site. Two sums: of
    openings, and of n-grams by those openings that are repeated.
    """
    counts = sum(np.bincount(own, minlength=SLOTS) for own in opened)
    repeated = np.flatnonzero(np.asarray(counts) > SUPPORT)
    place = dict(zip(repeated.tolist(), range(1, len(repeated) + 1), strict=True))
    labels = [[place.get(slot, 0) for slot in own.tolist()] for own in opened]
    classes = len(place) + 1
    shares = np.bincount(np.concatenate([np.array(own) for own in labels]), minlength=classes)
    prior = shares / shares.sum()
    tables = [
        table(h, own, np.tile(prior, (len(own), 1))) for h, own in zip(held, labels, strict=True)
    ]
    summed = tables[0]
    for one in tables[1:]:
        summed = summed + one
    return [
        np.array([_alike(h, c, prior, summed) if c else 0.0 for h, c in zip(hs, own, strict=True)])
        for hs, own in zip(held, labels, strict=True)
    ]


def why(own: NDArray[np.int64], label: int, belief: Array, summed: Table) -> int:
    """The slot that a record's score comes from, for its owner; -1 where there is none."""
    z = _lifts(own, label, belief, summed)
    return int(own[z.argmax()]) if z.size and z.max() > 0 else -1


def beliefs(features: Tensor, labels: Sequence[int], summed: "Ridge", *, own: bool = True) -> Array:
    """Leave-one-out beliefs (n, C) of one site's records from the federation's ridge regression.

    ``features`` (n, d) are those that were summed; with ``own`` the record itself is taken out.
    """
    x = _design(features)
    raw = (x @ summed.solved).numpy()
    if own:
        h = np.minimum(((x @ summed.inverse) * x).sum(dim=1).numpy(), 0.99)
        raw[np.arange(len(raw)), list(labels)] -= h
        raw /= (1.0 - h)[:, None]
    shares = np.clip(raw, 0.01, None)
    found: Array = shares / shares.sum(axis=1, keepdims=True)
    return found


@dataclass(frozen=True, slots=True, kw_only=True)
class Ridge:
    """One-against-all regression of labels on features, from sums: ``solved`` (d + 1, C) and the
    ``inverse`` (d + 1, d + 1) that leaves records out."""

    solved: Tensor
    inverse: Tensor


def moments(features: Tensor, labels: Sequence[int], classes: int) -> tuple[Tensor, Tensor]:
    """One site's addends of a ridge regression: X^T X (d + 1, d + 1) and X^T Y (d + 1, C)."""
    x = _design(features)
    y = torch.zeros(len(x), classes, dtype=torch.float64)
    y[torch.arange(len(x)), list(labels)] = 1.0
    return x.T @ x, x.T @ y


def ridge(gram: Tensor, products: Tensor, *, lam: float = LAM) -> Ridge:
    """The regression of summed addends; ``lam`` is relative to the mean of the diagonal."""
    ridge_ = lam * float(gram.diagonal().mean()) * torch.eye(len(gram), dtype=torch.float64)
    inverse = torch.linalg.inv(gram + ridge_)
    return Ridge(solved=inverse @ products, inverse=inverse)


# --- private --------------------------------------------------------------------------------------


def _lifts(own: NDArray[np.int64], label: int, p: Array, summed: Table) -> Array:
    beyond = summed.beyond[own, label] - (1.0 - p[label])
    chance = np.maximum(summed.chance[own, label] - p[label] * (1.0 - p[label]), 0.0)
    found: Array = np.where(summed.records[own] > SUPPORT, beyond / np.sqrt(chance + 1.0), 0.0)
    return found


def _alike(own: NDArray[np.int64], label: int, prior: Array, summed: Table) -> float:
    """z times purity, at the n-gram where that is most."""
    z = _lifts(own, label, prior, summed)
    count = summed.records[own]
    others = summed.beyond[own, label] + count * prior[label] - 1.0
    found: float = (z * others / np.maximum(count - 1.0, 1.0)).max(initial=0.0)
    return found


def _design(features: Tensor) -> Tensor:
    x = features.to(torch.float64)
    return torch.cat([x, torch.ones(len(x), 1, dtype=torch.float64)], dim=1)


def _check(held: Slots, labels: Sequence[int], given: Array) -> None:
    if not len(held) == len(labels) == len(given):
        raise DataError(
            f"{len(held)} texts, {len(labels)} labels and beliefs about {len(given)} records were "
            "given; give one of each for every record"
        )
