"""Knowledge as it arrives: the records of every site, window by window, and the test beside them.

A stream is the whole of a task: the public catalogue of labels, each site's records with the
window in which they reached it, and held-out records to ask about. Window 1 is the first round.
"""

import random
from collections import Counter, defaultdict
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from hashlib import sha256
from typing import Any

from fedkola.errors import PlanError
from fedkola.types import Catalogue, Dataset


@dataclass(frozen=True, slots=True, kw_only=True)
class Stream:
    """A task, ready to run.

    ``test.windows`` holds the window in which the label of a test record first arrives at any
    site (that of its scope where the label itself never does). ``about`` says per site what the
    records cannot: ``specialty`` and ``scopes`` at least. ``excluded`` counts records left out by
    site (``test`` for the test, ``train`` before records were given to sites) and reason;
    ``notices`` are sentences about what was found odd but kept.

    ``ends`` names the last window in which a test record is asked (absent: to the end), for
    knowledge that changes or is tested before it is learnt; ``stale`` the labels that were right
    before and are wrong now; ``concepts`` the concept of a test record where it is not its scope;
    ``choices`` the candidate texts that a causal model ranks.
    """

    catalogue: Catalogue
    sites: Mapping[str, Dataset]
    test: Dataset
    windows: tuple[str, ...]
    about: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    excluded: Mapping[str, Mapping[str, int]] = field(default_factory=dict)
    notices: tuple[str, ...] = ()
    ends: Mapping[str, int] = field(default_factory=dict)
    stale: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    concepts: Mapping[str, str] = field(default_factory=dict)
    choices: Mapping[str, tuple[str, ...]] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Records:
    """A site's own records as they arrive: :class:`fedkola.types.Knowledge` over a dataset.

    A row is one version of a record: an id that arrives again in a later window with another text,
    label, prompt or patient replaces the version before it. Of rows with one id and one window the
    last counts. A version that says what the one before it said is no version: a window delivered
    twice changes nothing.

    A window spans ``rounds`` rounds, and its records arrive in the first one.
    """

    data: Dataset
    rounds: int = 1

    def at(self, round: int) -> Dataset:
        """Versions that reached the site in this round."""
        window = self._arriving(round)
        newest = self._newest(window) if window else ()
        return self.data.take(sorted(i for i in newest if self.data.windows[i] == window))

    def until(self, round: int) -> Dataset:
        """The newest version of every record that reached the site in this round or before it."""
        return self.data.take(sorted(self._newest(window_of(round, self.rounds))))

    def versions(self) -> Dataset:
        """Every row that counts, one of each record and window."""
        rows = dict(
            zip(
                zip(self.data.records, self.data.windows, strict=True),
                range(len(self.data)),
                strict=True,
            )
        )
        return self.data.take(sorted(rows.values()))

    def repeats(self, round: int) -> int:
        """Rows that arrived in this round and changed nothing."""
        window = self._arriving(round)
        return sum(w == window for w in self.data.windows) - len(self.at(round))

    def of(self, data: Dataset) -> "Records":
        """Other records, as they arrive by the same calendar."""
        return replace(self, data=data)

    def without(
        self, *, patients: Collection[str] = (), records: Collection[str] = ()
    ) -> "Records":
        """The same without these patients and records, in all their versions: what was once a
        patient's goes with the patient. Names not held change nothing, so that a removal may be
        asked for twice."""
        gone_patients, gone = frozenset(patients), set(records)
        pairs = zip(self.data.records, self.data.patients, strict=True)
        gone |= {record for record, patient in pairs if patient in gone_patients}
        kept = [i for i, record in enumerate(self.data.records) if record not in gone]
        return self.of(self.data.take(kept))

    def _arriving(self, round: int) -> int:
        """The window that begins with this round; 0 where none does."""
        window = window_of(round, self.rounds)
        return window if round == first_round(window, self.rounds) else 0

    def _newest(self, window: int) -> list[int]:
        """Rows of the newest versions as of a window."""
        arrived = [i for i, w in enumerate(self.data.windows) if w <= window]
        newest: dict[str, int] = {}
        for i in sorted(arrived, key=lambda i: (self.data.windows[i], i)):
            known = newest.get(self.data.records[i])
            if known is None or self._said(known) != self._said(i):
                newest[self.data.records[i]] = i
        return list(newest.values())

    def _said(self, row: int) -> tuple[str, ...]:
        data = self.data
        prompt = data.prompts[row] if data.prompts else ""
        return data.texts[row], data.labels[row], data.patients[row], prompt


def window_of(round: int, rounds: int) -> int:
    """The window that a round belongs to, where each window spans so many rounds."""
    return -(-round // rounds)


def first_round(window: int, rounds: int) -> int:
    """The round in which a window begins, where each spans so many rounds."""
    return (window - 1) * rounds + 1


def in_rounds(catalogue: Catalogue, rounds: int) -> Catalogue:
    """The same labels, valid from and to the first rounds of the windows that they name."""
    if rounds == 1:
        return catalogue
    labels = tuple(
        replace(
            label,
            valid_from=(label.valid_from - 1) * rounds + 1,
            valid_to=None if label.valid_to is None else (label.valid_to - 1) * rounds + 1,
        )
        for label in catalogue.labels
    )
    return replace(catalogue, labels=labels)


def split_test(stream: Stream, share: float = 0.3) -> tuple[Dataset, Dataset]:
    """Test records to choose hyper-parameters on, about ``share`` of them, and the untouched rest.

    Decided by a hash of the text, or of the prompt where there is one: the same on every machine,
    for every seed and subset, and equal questions stay on one side.
    """
    if not 0.0 <= share <= 1.0:
        raise PlanError(f"a share of {share} of the test was asked for; give one from 0 to 1")
    dev = [i for i, text in enumerate(stream.test.questions) if hash_share(text) < share]
    chosen = set(dev)
    rest = [i for i in range(len(stream.test)) if i not in chosen]
    return stream.test.take(dev), stream.test.take(rest)


def hash_share(text: str) -> float:
    """A number in [0, 1) that depends on ``text`` alone, as if drawn uniformly."""
    return int.from_bytes(sha256(text.encode("utf-8", "surrogatepass")).digest()[:6]) / 2**48


def seeded(seed: int, *names: str) -> random.Random:
    """A source of randomness of its own for each seed and purpose."""
    return random.Random("/".join((str(seed), *names)))


def arrivals(sizes: Mapping[str, int], *, windows: int, seed: int) -> dict[str, int]:
    """A window from 1 to ``windows`` for every group, balanced by size, in a mixed order.

    Largest first into the window that holds least. Sizes are perturbed by up to a fifth, so that
    seeds differ in which groups share a window. Raises PlanError where a window would stay empty.
    """
    if not 1 <= windows <= len(sizes):
        raise PlanError(
            f"{windows} windows were asked for {len(sizes)} groups of labels; "
            f"set task.windows from 1 to {len(sizes)}"
        )
    chance = seeded(seed, "arrivals")
    felt = {group: (1 + size) * chance.uniform(0.8, 1.2) for group, size in sizes.items()}
    names = list(range(1, windows + 1))
    chance.shuffle(names)
    load = dict.fromkeys(names, 0.0)
    window: dict[str, int] = {}
    for group in sorted(felt, key=lambda g: (-felt[g], g)):
        window[group] = min(load, key=lambda w: load[w])
        load[window[group]] += felt[group]
    return window


def deal(labels: Sequence[str], names: Sequence[str], *, partition: str, seed: int) -> list[str]:
    """One of the sites ``names`` for each record, whose label is given.

    ``partition`` is "iid" (shares of equal size), "by-label" (whole labels dealt out; sites share
    a label where labels are fewer), or "dirichlet:" and a concentration (drawn from shares of each
    label's own).
    """
    chance = seeded(seed, "sites")
    if partition == "iid":
        drawn = [names[i % len(names)] for i in range(len(labels))]
        chance.shuffle(drawn)
        return drawn
    distinct = sorted(set(labels))
    chance.shuffle(distinct)
    if partition == "by-label":
        homes = {
            label: names[i % len(names) :: len(distinct)]
            if len(distinct) < len(names)
            else [names[i % len(names)]]
            for i, label in enumerate(distinct)
        }
        passed: Counter[str] = Counter()
        drawn = []
        for label in labels:
            drawn.append(homes[label][passed[label] % len(homes[label])])
            passed[label] += 1
        return drawn
    alpha = float(partition.removeprefix("dirichlet:"))
    # A tiny concentration underflows to zero everywhere; the floor keeps the shares a distribution.
    shares = {
        label: [max(chance.gammavariate(alpha, 1.0), 1e-300) for _ in names] for label in distinct
    }
    return [chance.choices(names, shares[label])[0] for label in labels]


def numbered(sites: int) -> list[str]:
    """Names for simulated sites, of equal length: site-01 to site-12."""
    width = len(str(sites))
    return [f"site-{number:0{width}d}" for number in range(1, sites + 1)]


def first_windows(catalogue: Catalogue, sites: Mapping[str, Dataset]) -> dict[str, int]:
    """Window in which each label first arrives at any site; that of its scope where it never does.

    A label whose whole scope never arrives gets window 1: it counts from the start, as a miss.
    """
    first: dict[str, int] = {}
    for data in sites.values():
        for code, window in zip(data.labels, data.windows, strict=True):
            first[code] = min(window, first.get(code, window))
    scope_first: dict[str, int] = {}
    for label in catalogue.labels:
        if label.code in first:
            window = first[label.code]
            scope_first[label.scope] = min(window, scope_first.get(label.scope, window))
    return {
        label.code: first.get(label.code, scope_first.get(label.scope, 1))
        for label in catalogue.labels
    }


def cap(
    train: Sequence[str], test: Sequence[str], *, per_label: int, seed: int
) -> tuple[list[int], list[int]]:
    """Rows to keep so that no label has more than ``per_label`` training rows (0: all of them).

    ``train`` and ``test`` name the label of every row. The test shrinks in proportion, to no less
    than one row of a label. Positions come back in order.
    """
    if not per_label:
        return list(range(len(train))), list(range(len(test)))
    groups, asked = _positions(train), _positions(test)
    kept_train: list[int] = []
    kept_test: list[int] = []
    for label, rows in groups.items():
        chance = seeded(seed, "cap", label)
        keep = min(len(rows), per_label)
        kept_train += chance.sample(rows, keep)
        tests = asked.get(label, [])
        kept_test += chance.sample(tests, min(len(tests), -(-len(tests) * keep // len(rows))))
    for label, rows in asked.items():
        if label not in groups:
            kept_test += rows
    return sorted(kept_train), sorted(kept_test)


def _positions(labels: Sequence[str]) -> dict[str, list[int]]:
    rows: defaultdict[str, list[int]] = defaultdict(list)
    for i, label in enumerate(labels):
        rows[label].append(i)
    return dict(rows)
