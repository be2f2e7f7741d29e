"""What a site finds in the windows of its own records before they are summed, and remembers.

A vote carries down what sums have taught (:class:`Known`). The site compares every window with it
and decides: a *hit* is summed with its scope's module, a *conflict* contradicts it and would open
a new version, a *stale* window agrees with what the site itself gave to an older version and waits.
A declared scope is believed: a window that does not fit it is a finding for its owner, in
``findings/`` of the site's folder, and is counted, never moved. How often labels agreed with the
view before they were summed is kept by record, so that a removal takes it back.
"""

import json
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from fedkola.files import settle, write_private
from fedkola.knowledge import novelty
from fedkola.knowledge.bank import Bank, CellKind, ModuleState, origins
from fedkola.knowledge.journal import Entry
from fedkola.knowledge.novelty import Distance, Reference, Thresholds
from fedkola.knowledge.router import Part
from fedkola.knowledge.statistics import expand, pack, unpack
from fedkola.knowledge.views import View
from fedkola.types import Catalogue, Dataset, Weights

HIT, CONFLICT, STALE = "hit", "conflict", "stale"
RECENT = 32
"""Windows, newest first, that a site reports on: thresholds follow how windows are today."""
STALE_SHARE = 0.5
USUAL_MIN = 30
"""Labels asked before the usual share of a scope counts for anything."""
AGAINST = "against_"
MISFITS = "misfits"
RIGHT, ASKED = "right", "asked"
LABEL_WRONG, LABEL_ASKED, LABEL_ASKERS = "label_wrong", "label_asked", "label_askers"
WRONG_BEFORE, ASKED_BEFORE = "label_wrong_before", "label_asked_before"
COUNTS = ("holders", "records", "label_holders", "label_records")
SCALE: Mapping[str, int] = {
    **dict.fromkeys((*COUNTS, *(AGAINST + name for name in COUNTS)), 0),
    **dict.fromkeys((MISFITS, RIGHT, ASKED, LABEL_WRONG, LABEL_ASKED, LABEL_ASKERS), 0),
    **dict.fromkeys((WRONG_BEFORE, ASKED_BEFORE, novelty.WINDOWS, novelty.HISTOGRAM), 0),
    novelty.EXCESS: novelty.EXCESS_BITS,
}
"""Fractional bits of everything a vote says of windows."""
_KNOWN = "known."


@dataclass(frozen=True, slots=True, kw_only=True)
class Known:
    """What a vote carries down. ``versions`` is the version in force by scope, ``sealed`` the
    version that each (round, scope) was summed into, ``usual`` (S, 2) the summed right and asked
    labels by scope, ``view`` the view that the site must hold to judge labels."""

    reference: Reference | None
    learnt: Thresholds
    versions: Mapping[str, int]
    sealed: Mapping[tuple[int, str], int]
    usual: Tensor
    view: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """One window of one scope. ``nearest`` is the module it resembles most; ``distance`` and
    ``limit`` are those of its declared module (0 if nothing is known of it); ``right`` of
    ``asked`` labels agree with the view, where ``usual`` is the share among earlier windows."""

    scope: str
    records: int
    decision: str = HIT
    nearest: str = ""
    distance: float = 0.0
    limit: float = 0.0
    right: int = 0
    asked: int = 0
    usual: float = 0.0

    @property
    def misfit(self) -> bool:
        return self.distance > self.limit

    @property
    def note(self) -> str:
        """One sentence for the owner of the records; empty if there is nothing to tell."""
        share = f"{self.right} of {self.asked} labels agree with the shared view"
        if self.decision == CONFLICT:
            return (
                f"the labels of these {self.records} records contradict {self.scope}: {share}, "
                f"usual is {self.usual:.0%}; they wait until enough sites say so, or correct them"
            )
        if self.decision == STALE:
            return (
                f"these {self.records} records of {self.scope} agree with what this site gave to a "
                "version that was superseded; they wait, bring them up to date"
            )
        if self.misfit:
            return (
                f"these {self.records} records are declared {self.scope} but lie "
                f"{self.distance / self.limit:.1f} times as far from it as windows may; the "
                f"nearest is {self.nearest}; they were summed as declared, check their scope"
            )
        return ""


# --- what the vote carries down -------------------------------------------------------------------


def known(
    bank: Bank,
    *,
    learnt: Thresholds,
    usual: Mapping[str, tuple[int, int]],
    view: str,
    scopes: Sequence[str],
    width: int,
) -> Known:
    """What live router cells and the sums of earlier votes say; ``usual`` is right and asked.

    A scope whose next version is open already has no version in force: its windows are not judged,
    they belong to the next one. Modules that not every site may hold lend no means: the question
    goes to all.
    """
    in_force = {
        m.id: m for m in bank.modules if m.state in (ModuleState.ACTIVE, ModuleState.COMPACTED)
    }
    turning = {m.scope for m in bank.modules if m.state is ModuleState.CANDIDATE}
    open_to_all = {name for name, module in in_force.items() if not module.access}
    parts = [
        Part(module=c.about.module, labels=c.about.labels, words=c.total.words, weight=1.0)
        for c in bank.cells
        if c.about.kind is CellKind.ROUTER and c.about.module in open_to_all
    ]
    scoped = [about for about in origins(bank) if about.kind is not CellKind.SCATTER]
    return Known(
        reference=novelty.reference(parts, width=width) if parts else None,
        learnt=learnt,
        versions={m.scope: m.version for m in in_force.values() if m.scope not in turning},
        sealed={
            (about.round, _scope(about.module)[0]): _scope(about.module)[1] for about in scoped
        },
        usual=torch.tensor([usual.get(scope, (0, 0)) for scope in scopes], dtype=torch.int64),
        view=view,
    )


def to_tensors(known: Known, scopes: Sequence[str]) -> dict[str, Tensor]:
    """``known`` as tensors of a broadcast; scopes by their position, numbers as they are used."""
    place = {scope: i for i, scope in enumerate(scopes)}
    number = torch.int64
    reference, learnt = known.reference, known.learnt
    tensors = {
        "excess": learnt.excess,
        "windows": learnt.windows,
        "kappa": torch.tensor(learnt.kappa, dtype=torch.float64),
        "versions": torch.tensor([known.versions.get(s, 0) for s in scopes], dtype=number),
        "sealed": torch.tensor(
            [[at, place[scope], version] for (at, scope), version in known.sealed.items()],
            dtype=number,
        ).reshape(-1, 3),
        "usual": known.usual,
        "view": torch.tensor(list(known.view.encode()), dtype=torch.uint8),
    }
    if reference is not None:
        modules = [_scope(module) for module in reference.modules]
        tensors |= {
            "modules": torch.tensor(
                [[place[scope], version] for scope, version in modules], dtype=number
            ),
            "counts": reference.counts,
            "means": reference.means.to(torch.float32),
            "precision": pack(reference.precision.to(torch.float32)),
            "effective": torch.tensor(reference.effective, dtype=torch.float64),
        }
    return {_KNOWN + name: value for name, value in tensors.items()}


def from_tensors(tensors: Weights, scopes: Sequence[str]) -> Known:
    """The inverse of :func:`to_tensors`."""
    found = {n.removeprefix(_KNOWN): v for n, v in tensors.items() if n.startswith(_KNOWN)}
    reference = None
    if "means" in found:
        width = found["means"].shape[1]
        reference = Reference(
            modules=tuple(f"{scopes[s]}@{version}" for s, version in found["modules"].tolist()),
            counts=found["counts"],
            means=found["means"].to(torch.float64),
            precision=unpack(found["precision"], width).to(torch.float64),
            effective=float(found["effective"]),
        )
    return Known(
        reference=reference,
        learnt=Thresholds(
            excess=found["excess"], windows=found["windows"], kappa=float(found["kappa"])
        ),
        versions=dict(zip(scopes, found["versions"].tolist(), strict=True)),
        sealed={(at, scopes[s]): version for at, s, version in found["sealed"].tolist()},
        usual=found["usual"],
        view=bytes(found["view"].tolist()).decode(),
    )


# --- the site -------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class Window:
    """The waiting records of one scope at one site, embedded: z int16 (n, d). ``nodes`` names
    each record's label at the level that the view is asked on, "" where it is not asked."""

    scope: str
    records: tuple[str, ...]
    nodes: tuple[str, ...]
    z: Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class Judged:
    """A window's finding, and for every record whether its label agreed (None: not asked)."""

    finding: Finding
    agreed: tuple[bool | None, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Answers:
    """The read-out of one level of a published view: weights (p, C), bias (C,), a node a column."""

    view: str
    level: int
    nodes: tuple[str, ...]
    features: int
    bits: int
    seed: int
    weights: Tensor
    bias: Tensor


def answers(view: View, level: int) -> Answers | None:
    """The read-out that labels are compared with: of this level, or of the leaves where the rule
    of the view has none of its own; None without a head."""
    if view.head is None:
        return None
    head = view.head
    level = level if head.weights[level].numel() else 0
    return Answers(
        view=view.id,
        level=level,
        nodes=head.nodes[level],
        features=head.features,
        bits=head.bits,
        seed=head.seed,
        weights=head.weights[level],
        bias=head.bias[level],
    )


def judge(
    window: Window,
    known: Known,
    *,
    allowed: Collection[str] = (),
    asking: Answers | None = None,
    earlier: Mapping[str, Tensor] | None = None,
    usual: float = 0.0,
) -> Judged:
    """Compare one window with what is known.

    Labels are believed without ``asking``; else the view chooses among the nodes ``allowed`` (those
    of the scope). ``usual`` is the share of labels that agreed in earlier windows. ``earlier`` are
    this site's own node means (d,) under a superseded version, if it has given nothing since.
    """
    version = known.versions.get(window.scope, 0)
    agreed: tuple[bool | None, ...] = (None,) * len(window.records)
    nearest, distance, limit = "", 0.0, 0.0
    if known.reference is not None:
        found = novelty.distances(known.reference, window.z)
        nearest = novelty.nearest(found).module
        for own in found:
            if own.module == f"{window.scope}@{version}":
                distance, limit = own.observed, novelty.limit(known.learnt, own)
    if asking is not None and version:
        agreed = _agreed(window, asking, allowed)
    right, asked = sum(a is True for a in agreed), sum(a is not None for a in agreed)
    decision = HIT
    if novelty.contradicts(right, asked, usual):
        decision = STALE if earlier and _is_stale(window, earlier) else CONFLICT
    finding = Finding(
        scope=window.scope,
        records=len(window.records),
        decision=decision,
        nearest=nearest,
        distance=distance,
        limit=limit,
        right=right,
        asked=asked,
        usual=usual,
    )
    return Judged(finding=finding, agreed=agreed)


def survey(
    data: Dataset,
    embed: Callable[[Dataset], Tensor],
    *,
    catalogue: Catalogue,
    known: Known,
    asking: Answers | None,
    history: Sequence[Entry],
    revised: Collection[str] = (),
) -> tuple[tuple[Window, Judged], ...]:
    """The waiting records of a site, one window by scope, each compared with what is known.

    The labels of records ``revised`` by their own site are no evidence against the view, which
    still holds their older versions.
    """
    scope = {label.code: label.scope for label in catalogue.labels}
    nodes = {label.code: label.path[asking.level if asking else 0] for label in catalogue.labels}
    found = []
    for place, name in enumerate(catalogue.scopes()):
        mine = data.take([i for i, code in enumerate(data.labels) if scope[code] == name])
        if not len(mine):
            continue
        judged = known.reference is not None or asking is not None
        window = Window(
            scope=name,
            records=mine.records,
            nodes=tuple(
                "" if record in revised else nodes[code]
                for record, code in zip(mine.records, mine.labels, strict=True)
            ),
            z=embed(mine) if judged else torch.zeros(0, 0, dtype=torch.int16),
        )
        right, asked = known.usual[place].tolist()
        answer = judge(
            window,
            known,
            allowed={nodes[code] for code, owner in scope.items() if owner == name},
            asking=asking,
            earlier=node_means(superseded(known, history, name), nodes),
            usual=right / asked if asked >= USUAL_MIN else 0.0,
        )
        found.append((window, answer))
    return tuple(found)


def ballot(
    data: Dataset, judged: Sequence[tuple[Window, Judged]], catalogue: Catalogue
) -> dict[str, Tensor]:
    """What one site says of its windows, as addends: holders and records by scope and by label of
    what it would sum, the same of what contradicts its module (``against_``), windows that do not
    fit, and by label how often the view was asked and wrong. A stale window only waits."""
    labels, scopes = catalogue.labels, catalogue.scopes()
    position = {label.code: i for i, label in enumerate(labels)}
    place = {scope: i for i, scope in enumerate(scopes)}
    owner = torch.tensor([place[label.scope] for label in labels])
    code = dict(zip(data.records, data.labels, strict=True))
    rows = {choice: torch.zeros(len(labels), dtype=torch.int64) for choice in (HIT, CONFLICT)}
    stale, misfits = (torch.zeros(len(scopes), dtype=torch.int64) for _ in range(2))
    wrong, asked = (torch.zeros(len(labels), dtype=torch.int64) for _ in range(2))
    for window, answer in judged:
        finding = answer.finding
        misfits[place[window.scope]] += finding.misfit
        if finding.decision == STALE:
            stale[place[window.scope]] += len(window.records)
            continue
        for record, agreed in zip(window.records, answer.agreed, strict=True):
            row = position[code[record]]
            rows[finding.decision][row] += 1
            asked[row] += agreed is not None
            wrong[row] += agreed is False
    words: dict[str, Tensor] = {}
    for choice, prefix in ((HIT, ""), (CONFLICT, AGAINST)):
        records = torch.zeros(len(scopes), dtype=torch.int64).index_add_(0, owner, rows[choice])
        words |= {
            f"{prefix}holders": (records > 0).to(torch.int64),
            f"{prefix}records": records,
            f"{prefix}label_holders": (rows[choice] > 0).to(torch.int64),
            f"{prefix}label_records": rows[choice],
        }
    words[f"{AGAINST}records"] = words[f"{AGAINST}records"] + stale
    return words | {
        MISFITS: misfits,
        LABEL_WRONG: wrong,
        LABEL_ASKED: asked,
        LABEL_ASKERS: (asked > 0).to(torch.int64),
    }


def evidence(
    store: Path,
    known: Known,
    history: Sequence[Entry],
    judged: Sequence[tuple[Window, Judged]],
    catalogue: Catalogue,
) -> dict[str, Tensor]:
    """What one site's windows teach, as addends: distances of those that are summed, and how often
    labels agreed before they were summed, by scope (waiting hits included) and by label."""
    labels, scopes = catalogue.labels, catalogue.scopes()
    agreed = agreement(store, known, history)
    for window, answer in judged:
        finding = answer.finding
        if finding.decision == HIT:
            right, asked = agreed.get(window.scope, (0, 0))
            agreed[window.scope] = (right + finding.right, asked + finding.asked)
    before = wrong_before(store, history)
    by_scope = torch.tensor([agreed.get(s, (0, 0)) for s in scopes], dtype=torch.int64)
    by_label = torch.tensor([before.get(x.code, (0, 0)) for x in labels], dtype=torch.int64)
    return {
        **novelty.tally(accepted(known, history), known.learnt),
        RIGHT: by_scope[:, 0].contiguous(),
        ASKED: by_scope[:, 1].contiguous(),
        WRONG_BEFORE: by_label[:, 0].contiguous(),
        ASKED_BEFORE: by_label[:, 1].contiguous(),
    }


def doubtful(words: Weights, *, k_min: int) -> list[int]:
    """Positions of labels that the summed votes flag: enough of their waiting records disagree,
    and most earlier ones did not: a label that the view was never asked about, or never got right,
    has not been seen to change its meaning."""
    flagged = novelty.doubtful(
        words[LABEL_WRONG], words[LABEL_ASKED], words[LABEL_ASKERS], k_min=k_min
    )
    usual = 2 * words[WRONG_BEFORE] < words[ASKED_BEFORE]
    return [int(i) for i in torch.nonzero(flagged & usual).flatten()]


def accepted(known: Known, history: Sequence[Entry]) -> tuple[Distance, ...]:
    """This site's newest summed windows against the modules in force, each without itself."""
    if known.reference is None:
        return ()
    found = []
    for entry in sorted(history, key=lambda entry: -entry.round)[:RECENT]:
        version = known.sealed.get((entry.round, entry.scope), 0)
        module = f"{entry.scope}@{version}"
        if version == known.versions.get(entry.scope) and module in known.reference.modules:
            found.append(novelty.accepted(known.reference, module, entry.z))
    return tuple(distance for distance in found if distance is not None)


def superseded(known: Known, history: Sequence[Entry], scope: str) -> tuple[Entry, ...]:
    """What this site gave to older versions of a scope, if it has given the present one nothing."""
    version = known.versions.get(scope, 0)
    mine = [entry for entry in history if entry.scope == scope]
    given = {known.sealed.get((entry.round, scope), 0) for entry in mine}
    return () if version in given else tuple(mine)


def node_means(entries: Sequence[Entry], nodes: Mapping[str, str]) -> dict[str, Tensor]:
    """Mean embedding (d,) by node of the records of journal entries; ``nodes`` by label."""
    rows: dict[str, list[Tensor]] = {}
    for entry in entries:
        for code, z in zip(entry.labels, entry.z.to(torch.float32), strict=True):
            rows.setdefault(nodes[code], []).append(z)
    return {node: torch.stack(some).mean(0) for node, some in rows.items()}


# --- what the site remembers ----------------------------------------------------------------------


def keep_answers(store: Path, found: Answers) -> None:
    """Keep the newest published read-out, whole or not at all."""
    about = {name: getattr(found, name) for name in ("view", "level", "features", "bits", "seed")}
    path = store / "view.safetensors"
    draft = path.with_suffix(".tmp")
    metadata = {"about": json.dumps(about | {"nodes": found.nodes})}
    save_file({"weights": found.weights, "bias": found.bias}, draft, metadata=metadata)
    settle(draft, path)


def read_answers(store: Path, view: str) -> Answers | None:
    """The kept read-out if it is that of this view; None if the site was absent when it came."""
    path = store / "view.safetensors"
    if not view or not path.exists():
        return None
    try:
        with safe_open(path, framework="pt") as file:
            about = json.loads(file.metadata()["about"])
            if about["view"] != view:
                return None
            weights, bias = file.get_tensor("weights"), file.get_tensor("bias")
    except (SafetensorError, OSError):
        return None  # It can be had again: the next view is published at the end of the round.
    nodes = tuple(about.pop("nodes"))
    return Answers(nodes=nodes, weights=weights, bias=bias, **about)


def remember(store: Path, round: int, windows: Sequence[tuple[Window, Judged]]) -> None:
    """Keep what was decided in this round's vote; the same round again replaces it."""
    folder = store / "findings"
    folder.mkdir(parents=True, exist_ok=True)
    rows = []
    for window, judged in windows:
        answered = list(zip(window.records, judged.agreed, strict=True))
        kept = {
            "agreed": [record for record, answer in answered if answer is True],
            "disagreed": [record for record, answer in answered if answer is False],
        }
        rows.append({**asdict(judged.finding), "note": judged.finding.note, **kept})
    path = folder / f"{round:06d}.json"
    write_private(path, json.dumps({"round": round, "windows": rows}, indent=1).encode())


def findings(store: Path, round: int) -> dict[str, Finding]:
    """What was decided in the vote of a round, by scope."""
    path = store / "findings" / f"{round:06d}.json"
    if not path.exists():
        return {}
    names = Finding.__dataclass_fields__
    rows = json.loads(path.read_text(encoding="utf-8"))["windows"]
    return {row["scope"]: Finding(**{name: row[name] for name in names}) for row in rows}


def agreement(store: Path, known: Known, history: Sequence[Entry]) -> dict[str, tuple[int, int]]:
    """Right and asked labels by scope, over the windows summed into the versions in force, as they
    were before they were summed. Records that have left the journal do not count."""
    found: dict[str, tuple[int, int]] = {}
    for entry, right, wrong in _remembered(store, history):
        version = known.sealed.get((entry.round, entry.scope), 0)
        if version and version == known.versions.get(entry.scope):
            before = found.get(entry.scope, (0, 0))
            asked = len(right) + len(wrong)
            found[entry.scope] = (before[0] + len(right), before[1] + asked)
    return found


def wrong_before(store: Path, history: Sequence[Entry]) -> dict[str, tuple[int, int]]:
    """Wrong and asked records by label, over all windows that were summed."""
    found: dict[str, tuple[int, int]] = {}
    for entry, right, wrong in _remembered(store, history):
        label = dict(zip(entry.records, entry.labels, strict=True))
        for record in (*right, *wrong):
            missed, asked = found.get(label[record], (0, 0))
            found[label[record]] = (missed + (record in wrong), asked + 1)
    return found


def retain(store: Path, *, records: Collection[str]) -> None:
    """Name no other records in any finding; part of the last step of a removal.

    Records that only waited are dropped too. What was counted stays at the site.
    """
    kept = frozenset(records)
    for path in sorted((store / "findings").glob("*.json")):
        document = json.loads(path.read_text(encoding="utf-8"))
        held = [
            record for row in document["windows"] for record in row["agreed"] + row["disagreed"]
        ]
        if kept.issuperset(held):
            continue
        for row in document["windows"]:
            for name in ("agreed", "disagreed"):
                row[name] = [record for record in row[name] if record in kept]
        write_private(path, json.dumps(document, indent=1).encode())


# --- private --------------------------------------------------------------------------------------


def _remembered(
    store: Path, history: Sequence[Entry]
) -> Iterator[tuple[Entry, frozenset[str], frozenset[str]]]:
    """Journal entries with their records whose labels agreed and disagreed when they were new."""
    entries = {(entry.round, entry.scope): entry for entry in history}
    for path in sorted((store / "findings").glob("*.json")):
        document = json.loads(path.read_text(encoding="utf-8"))
        for row in document["windows"]:
            entry = entries.get((document["round"], row["scope"]))
            if entry is not None:
                kept = frozenset(entry.records)
                right, wrong = frozenset(row["agreed"]), frozenset(row["disagreed"])
                yield entry, kept & right, kept & wrong


def _agreed(window: Window, asking: Answers, allowed: Collection[str]) -> tuple[bool | None, ...]:
    columns = [i for i, node in enumerate(asking.nodes) if node in set(allowed)]
    names = [asking.nodes[i] for i in columns]
    answerable = set(names)
    if not names:
        return (None,) * len(window.records)
    phi = expand(window.z, features=asking.features, bits=asking.bits, seed=asking.seed)
    scores = phi @ asking.weights[:, columns] + asking.bias[columns]
    return tuple(
        names[best] == node if node in answerable else None
        for best, node in zip(scores.argmax(1).tolist(), window.nodes, strict=True)
    )


def _is_stale(window: Window, earlier: Mapping[str, Tensor]) -> bool:
    """Whether the window's labels agree with the nearest of the site's own earlier means."""
    names = list(earlier)
    rows = [i for i, node in enumerate(window.nodes) if node in earlier]
    if not rows:
        return False
    means = torch.stack([earlier[name] for name in names])
    best = torch.cdist(window.z[rows].to(torch.float32), means).argmin(1).tolist()
    right = sum(names[k] == window.nodes[i] for i, k in zip(rows, best, strict=True))
    return bool(right >= STALE_SHARE * len(rows))


def _scope(module: str) -> tuple[str, int]:
    scope, _, version = module.rpartition("@")
    return scope, int(version)
