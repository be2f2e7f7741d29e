"""Views: a model as a pure function of live cells, as of a world time and a knowledge time.

Read-outs from summed statistics alone (mu_c = s_c / n_c, C labels)::

    S_w    = ( G - sum_c s_c s_c^T / n_c ) / n        G, s, n over what scatter cells cover
    pooled : H = sum_c mu_c mu_c^T + C S_w;  V = (H + lam diag_mean(H) I)^-1 [mu_1 .. mu_C]
    lda    : V = (S_w + lam diag_mean(S_w) I)^-1 [mu_c];  score_c = V_c' phi - mu_c' V_c / 2
    root   : V = (G + lam diag_mean(G) I)^-1 [ s_c / sqrt(n_c) ],  G = n S_w + sum_c n_c mu_c mu_c^T
    tree   : pooled at every level of the label tree; a node's score is its own, plus ``down``
             times the best score below it, plus ``up`` times its ancestors' scores

``pooled`` equals the 1/n_c-weighted ridge when classes share their within-class covariance, but
stays a function of sums. S_w is a nuisance statistic that all labels share and that changes
slowly: labels newer than the last scatter cell, and held sets, use the S_w there is; before the
first one S_w is zero and a ridge is all that shrinks. LoRA cells of one module merge by
B = (sum S)(sum Gamma + lam tau I)^-1 (Gram merge; LoRM, ICLR 2025, with A shared) or by the mean
of B.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from fedkola.errors import BasisMismatch, KnowledgeError, UnknownCell
from fedkola.knowledge import basis
from fedkola.knowledge.bank import (
    Bank,
    Cell,
    CellKind,
    FusedAdapter,
    KnowledgeCell,
    all_then,
    answers_then,
    covered,
    find_module,
    select,
    valid_labels,
    weight,
)
from fedkola.knowledge.router import Part, Router, gates
from fedkola.knowledge.router import build as build_router
from fedkola.knowledge.statistics import COUNTS, GRAM, SUMS, expand, unpack
from fedkola.types import Catalogue, Weights

CODE = "fedkola/view/1"
RECENT = 3
_RECENT: dict[str, "View"] = {}  # A view is a function of its id, so a repeated one is not solved.

CHUNK = 4096


@dataclass(frozen=True, slots=True, kw_only=True)
class Rule:
    """How cells become a model; part of the view's identity.

    ``up`` and ``down`` are constants of the tree read-out, chosen by ``benchmarks/readout.py``.
    ``spread`` is how much the scatter of records about the mean of their label counts: less than
    1 where whoever asks words things otherwise than whoever filed them.
    """

    readout: str = "tree"
    lam: float = 1e-4
    spread: float = 1.0
    up: float = 0.2
    down: float = 1.0
    merge: str = "gram"
    merge_lam: float = 1e-3
    half_life: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Head:
    """Linear read-outs on phi, one per level of the label tree (level 0 holds the labels).

    ``weights[l]`` is (p, C_l) float32, ``bias[l]`` (C_l,), ``parents[l]`` (C_0,) gives the node of
    each label at level l, ``live`` (C_0,) whether a label may be answered, ``successor`` (C_0,) the
    label that answers for it (itself unless retired and replaced; -1 if nobody does).
    """

    features: int
    bits: int
    seed: int
    nodes: tuple[tuple[str, ...], ...]
    weights: tuple[Tensor, ...]
    bias: tuple[Tensor, ...]
    parents: tuple[Tensor, ...]
    successor: Tensor
    up: float
    down: float


@dataclass(frozen=True, slots=True, kw_only=True)
class View:
    """A model computed from ``cells``: head, router and adapters, with its provenance.

    ``gates`` names the modules that a fused adapter stands for; any other adapter has the name of
    its module.
    """

    id: str
    cells: tuple[str, ...]
    modules: tuple[str, ...]
    rule: Rule
    valid_at: float | None
    known_at: int | None
    held: tuple[str, ...] | None
    head: Head | None
    router: Router | None
    adapters: Mapping[str, Weights]
    gates: Mapping[str, tuple[str, ...]] = field(default_factory=dict)


def compute(
    bank: Bank,
    catalogue: Catalogue,
    rule: Rule,
    *,
    now: int,
    targets: Mapping[str, tuple[int, int]] | None = None,
    valid_at: float | None = None,
    known_at: int | None = None,
    held: Sequence[str] | None = None,
) -> View:
    """The model that the live cells stand for. ``now`` (a round) only dates half-life weights;
    ``targets`` (layer -> (d_out, d_in)) is needed for LoRA cells, whose A comes from the basis.

    Every cell weighs its quality times its freshness (``bank.weight``), as of ``known_at`` if that
    is given. Raises UnknownCell if no cell is live at that time, BasisMismatch if cells of one kind
    were opened with different recipes, KnowledgeError for a time, or held modules, that a sum of
    cells or a fused adapter is only partly of.
    """
    moment = now if known_at is None else min(now, known_at)
    weights: dict[str, float] = {}
    chosen: dict[CellKind, tuple[Cell, ...]] = {}
    for kind in CellKind:
        found = select(bank, kind, valid_at=valid_at, known_at=known_at, held=held)
        for cell in found:
            # The scatter is that of the records it was summed over, all alike.
            weights[cell.about.id] = (
                1.0
                if kind is CellKind.SCATTER
                else weight(bank, cell, now=moment, half_life=rule.half_life)
            )
        chosen[kind] = tuple(cell for cell in found if weights[cell.about.id] > 0)
    fused = _fused(bank, valid_at=valid_at, known_at=known_at, held=held)
    if not chosen[CellKind.ANALYTIC]:
        chosen[CellKind.SCATTER] = ()
    if not any(chosen.values()) and not fused:
        raise UnknownCell(
            f"no cell is live at that time (valid_at {valid_at}, known_at {known_at}) among the "
            f"modules held ({'all' if held is None else ', '.join(held) or 'none'}); "
            "`fedkola bank ls` shows what there is"
        )
    answers = valid_labels(bank, valid_at=valid_at, known_at=known_at)
    analytic, routers, loras, scatters = (chosen[kind] for kind in CellKind)
    name = identity(
        [c for cells in chosen.values() for c in cells],
        rule,
        answers,
        held=held,
        weights=weights,
        fused=[(each.id, [(c.id, c.words) for c in _parts(bank, each)]) for each in fused],
        levels=[label.path for label in catalogue.labels],
    )
    if name in _RECENT:
        return replace(_RECENT[name], valid_at=valid_at, known_at=known_at)
    view = View(
        id=name,
        cells=tuple(c.about.id for cells in chosen.values() for c in cells),
        modules=tuple(
            dict.fromkeys(
                [c.about.module for c in (*analytic, *routers, *loras)]
                + [module for each in fused for module in each.modules]
            )
        ),
        rule=rule,
        valid_at=valid_at,
        known_at=known_at,
        held=None if held is None else tuple(held),
        head=_head(bank, analytic, scatters, catalogue, rule, answers, weights)
        if analytic
        else None,
        router=router_of(routers, weights) if routers else None,
        adapters=adapters(loras, rule, weights, targets or {})
        | {each.id: dict(each.adapter) for each in fused},
        gates={each.id: each.modules for each in fused},
    )
    while len(_RECENT) >= RECENT:
        del _RECENT[next(iter(_RECENT))]
    _RECENT[name] = view
    return view


def identity(
    cells: Sequence[Cell],
    rule: Rule,
    answers: Mapping[str, Sequence[str]],
    *,
    held: Sequence[str] | None,
    weights: Mapping[str, float],
    fused: Sequence[tuple[str, Sequence[tuple[str, str]]]] = (),
    levels: Sequence[Sequence[str]],
) -> str:
    """The view's name: a hash over integers, so it is the same wherever the sums are the same.

    ``levels`` is the label tree of the catalogue, ``weights`` those of the cells, ``fused`` names
    adapters and the (cell, hash) pairs they were made from.
    """
    filled: set[str] = set()
    for cell in cells:
        counts = cell.total.words.get(COUNTS)
        if counts is not None:
            filled.update(c for c, n in zip(cell.about.labels, counts.tolist(), strict=True) if n)
    about = {
        "code": CODE,
        "cells": sorted((cell.about.id, cell.about.words) for cell in cells),
        "rule": asdict(rule),
        "answers": sorted((c, sorted(answers.get(c, ()))) for c in filled),
        "held": None if held is None else sorted(held),
        "weights": sorted(
            (cell.about.id, weights[cell.about.id])
            for cell in cells
            if weights[cell.about.id] != 1.0
        ),
        "fused": sorted((name, sorted(parts)) for name, parts in fused),
        "levels": [list(path) for path in levels],
    }
    return hashlib.sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()


def scores(head: Head, z: Tensor, level: int) -> Tensor:
    """Scores (n, C_level) of integer embeddings z (n, d); -inf for nodes without a live label."""
    phi = expand(z, features=head.features, bits=head.bits, seed=head.seed)
    raw = [
        phi @ weights + bias if weights.numel() else None
        for weights, bias in zip(head.weights, head.bias, strict=True)
    ]
    labels = raw[0]
    assert labels is not None
    answering = torch.nonzero(head.successor >= 0).flatten()
    target = head.successor[answering]
    best = torch.full_like(labels, float("-inf"))
    best.scatter_reduce_(1, target.expand(len(z), -1), labels[:, answering], reduce="amax")
    if level == 0:
        score = best
        above = range(1, len(raw))
        of = {a: head.parents[a] for a in above}
    else:
        width = len(head.nodes[level])
        below = torch.full((len(z), width), float("-inf"))
        below.scatter_reduce_(1, head.parents[level].expand(len(z), -1), best, reduce="amax")
        own = raw[level]
        score = below if own is None else own + head.down * below
        above = range(level + 1, len(raw))
        first = _first_label(head, level)
        of = {a: head.parents[a][first] for a in above}
    for a in above:
        higher = raw[a]
        if higher is not None:
            score = score + head.up * higher[:, of[a]]
    return score


def adapters(
    cells: Sequence[Cell],
    rule: Rule,
    weights: Mapping[str, float],
    targets: Mapping[str, tuple[int, int]],
) -> dict[str, dict[str, Tensor]]:
    """The adapter of every module from its LoRA cells, by ``weights`` of the cells' ids."""
    by_module: dict[str, list[Cell]] = {}
    for cell in cells:
        by_module.setdefault(cell.about.module, []).append(cell)
    return {module: _merge(group, rule, weights, targets) for module, group in by_module.items()}


def router_of(cells: Sequence[Cell], weights: Mapping[str, float]) -> Router:
    """The router of these cells, by ``weights`` of their ids."""
    parts = [
        Part(
            module=cell.about.module,
            labels=cell.about.labels,
            words=cell.total.words,
            weight=weights[cell.about.id],
        )
        for cell in cells
    ]
    return build_router(parts, width=cells[0].total.words[SUMS].shape[1])


def slots(view: View, modules: Sequence[str]) -> dict[str, Tensor]:
    """One adapter of rank K r whose slots are these modules, in order: A stacked, B side by side.

    A gate over slots turns it into the soft composition y = W x + s B_cat (g * (A_cat x)).
    """
    parts: dict[str, list[Tensor]] = {}
    for module in modules:
        for name, value in view.adapters[module].items():
            parts.setdefault(name, []).append(value)
    return {
        name: torch.cat(values, 0 if name.endswith(".lora_A") else 1)
        for name, values in parts.items()
    }


def gate(view: View, p: Tensor, *, top_k: int) -> Tensor:
    """Weights (n, K) of the view's adapters, in order, from the posterior p (n, M) of its router.

    A fused adapter takes the probability of all modules it stands for; rows sum to 1.
    """
    assert view.router is not None
    place = {module: i for i, module in enumerate(view.router.modules)}
    columns = [
        p[:, [place[module] for module in view.gates.get(name, (name,)) if module in place]].sum(1)
        for name in view.adapters
    ]
    return gates(torch.stack(columns, 1), top_k=top_k)


def to_tensors(view: View) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """A view as a JSON document and its tensors: what is published, and what is saved."""
    tensors: dict[str, Tensor] = {}
    document: dict[str, Any] = {
        "id": view.id,
        "cells": list(view.cells),
        "modules": list(view.modules),
        "rule": asdict(view.rule),
        "valid_at": view.valid_at,
        "known_at": view.known_at,
        "held": None if view.held is None else list(view.held),
        "adapters": list(view.adapters),
        "gates": {name: list(modules) for name, modules in view.gates.items()},
    }
    if view.head:
        head = view.head
        document["head"] = {name: getattr(head, name) for name in _HEAD_NUMBERS}
        document["head"]["nodes"] = [list(nodes) for nodes in head.nodes]
        for level in range(len(head.nodes)):
            tensors[f"head.weights.{level}"] = head.weights[level]
            tensors[f"head.bias.{level}"] = head.bias[level]
            tensors[f"head.parents.{level}"] = head.parents[level]
        tensors["head.successor"] = head.successor
    if view.router:
        document["router"] = list(view.router.modules)
        tensors |= {f"router.{name}": getattr(view.router, name) for name in _ROUTER_TENSORS}
    for index, adapter in enumerate(view.adapters.values()):
        tensors |= {f"adapters.{index}.{name}": value for name, value in adapter.items()}
    return document, tensors


def from_tensors(document: Mapping[str, Any], tensors: Weights) -> View:
    """The inverse of ``to_tensors``."""
    head = router = None
    if "head" in document:
        about = document["head"]
        levels = range(len(about["nodes"]))
        head = Head(
            **{name: about[name] for name in _HEAD_NUMBERS},
            nodes=tuple(tuple(nodes) for nodes in about["nodes"]),
            weights=tuple(tensors[f"head.weights.{level}"] for level in levels),
            bias=tuple(tensors[f"head.bias.{level}"] for level in levels),
            parents=tuple(tensors[f"head.parents.{level}"] for level in levels),
            successor=tensors["head.successor"],
        )
    if "router" in document:
        parts = {name: tensors[f"router.{name}"] for name in _ROUTER_TENSORS}
        router = Router(modules=tuple(document["router"]), **parts)
    held = document["held"]
    return View(
        id=document["id"],
        cells=tuple(document["cells"]),
        modules=tuple(document["modules"]),
        rule=Rule(**document["rule"]),
        valid_at=document["valid_at"],
        known_at=document["known_at"],
        held=None if held is None else tuple(held),
        head=head,
        router=router,
        adapters={
            module: {
                name.removeprefix(f"adapters.{index}."): value
                for name, value in tensors.items()
                if name.startswith(f"adapters.{index}.")
            }
            for index, module in enumerate(document["adapters"])
        },
        gates={name: tuple(modules) for name, modules in document["gates"].items()},
    )


def answer(view: View, z: Tensor, nodes: Sequence[str], level: int) -> Tensor:
    """Scores (n, len(nodes)) of integer embeddings; -inf for nodes that the view does not know.

    Raises KnowledgeError for a view without analytic cells.
    """
    if view.head is None:
        raise KnowledgeError(
            "this bank has no analytic cells, so it cannot answer with labels; add "
            '"analytic" to knowledge.lanes'
        )
    place = {node: i for i, node in enumerate(view.head.nodes[level])}
    known = [i for i, node in enumerate(nodes) if node in place]
    columns = [place[nodes[i]] for i in known]
    found = torch.full((len(z), len(nodes)), float("-inf"))
    for start in range(0, len(z), CHUNK):
        part = scores(view.head, z[start : start + CHUNK], level)
        found[start : start + CHUNK, known] = part[:, columns]
    return found


def save(view: View, folder: Path, provenance: Mapping[str, Any]) -> None:
    """Write the artefact of a view: ``view.safetensors`` and ``view.json`` with provenance."""
    folder.mkdir(parents=True, exist_ok=True)
    document, tensors = to_tensors(view)
    save_file({k: v.contiguous() for k, v in tensors.items()}, folder / "view.safetensors")
    text = json.dumps(document | {"provenance": dict(provenance)}, indent=1, sort_keys=True)
    (folder / "view.json").write_text(text)


def load(folder: Path) -> tuple[View, dict[str, Any]]:
    """A saved view and its provenance; raises UnknownCell if the folder holds none."""
    path = folder / "view.json"
    if not path.exists():
        raise UnknownCell(f"{folder} holds no view.json; run `fedkola run` or `fedkola demo` first")
    document = json.loads(path.read_text())
    view = from_tensors(document, load_file(folder / "view.safetensors"))
    return view, document["provenance"]


def scatter(gram: Tensor, sums: Tensor, counts: Tensor) -> Tensor:
    """S_w (p, p) from G (p, p), s (C, p), n (C,) of the same records; zeros without records."""
    if not bool(counts.any()):
        return torch.zeros_like(gram)
    filled = counts > 0
    sums, counts = sums[filled], counts[filled]
    return torch.addmm(gram, sums.T / counts, sums, alpha=-1).div_(counts.sum())


def read_out(
    within: Tensor, sums: Tensor, counts: Tensor, *, rule: str, lam: float, spread: float = 1.0
) -> tuple[Tensor, Tensor]:
    """V (p, C) and bias (C,) float32 from S_w (p, p), s (C, p), n (C,), all float64, n > 0.

    Rule "pooled" solves (spread C S_w + M^T M) V = M^T for the label means M: at ``spread`` 1 the
    ridge that weighs every label alike, below it one that trusts the means more than the spread of
    records about them. ``within`` is overwritten.
    """
    num_labels = len(counts)
    means = sums / counts[:, None]
    bias = torch.zeros(num_labels, dtype=torch.float32)
    if rule == "root":
        gram = within.mul_(counts.sum()).addmm_(sums.T / counts, sums)
        return _solve(gram, (sums / counts.sqrt()[:, None]).T, lam), bias
    if rule == "lda":
        # One record per label leaves no scatter at all; the ridge then needs a floor of its own.
        size = float((within.diagonal() * counts.sum() + (means * sums).sum(0)).mean())
        weights = _solve(within, means.T, lam, floor=1e-6 * size / within.shape[0])
        return weights, -(means.to(torch.float32) * weights.T).sum(1) / 2
    within.mul_(spread * num_labels).addmm_(means.T, means)
    return _solve(within, means.T, lam), bias


def ridge(lam: float, *, features: int, records: float) -> float:
    """The ridge for a scatter of this many records: lam + (p / 2n)^2.

    Near n = p a ridge that suits many records interpolates noise (double descent): at p = 1024 and
    n = 1,116 lam = 1e-4 gives less than half the accuracy of lam = 0.3, at n = 18,806 they lose
    nothing to each other the other way round. The rule is measured by ``benchmarks/readout.py``.
    """
    return lam + (features / (2 * max(records, 1.0))) ** 2


# --- private --------------------------------------------------------------------------------------

_HEAD_NUMBERS = ("features", "bits", "seed", "up", "down")
_ROUTER_TENSORS = (
    "log_prior",
    "means",
    "label_means",
    "centre",
    "within",
    "by_label",
    "background",
)


def _parts(bank: Bank, fused: FusedAdapter) -> tuple[KnowledgeCell, ...]:
    """The cold cells a fused adapter was made from."""
    return tuple(about for about in bank.cold if about.id in fused.cells)


def _fused(
    bank: Bank, *, valid_at: float | None, known_at: int | None, held: Sequence[str] | None
) -> tuple[FusedAdapter, ...]:
    """Fused adapters that a view reads: those all of whose cells and modules it would read."""
    chosen = []
    for each in bank.fused:
        then = [
            answers_then(module, valid_at=valid_at, known_at=known_at)
            and all_then(bank, part, valid_at=valid_at, known_at=known_at)
            and (held is None or module.id in held)
            for part in _parts(bank, each)
            for module in [find_module(bank, part.module)]
        ]
        if any(then) and not all(then):
            raise KnowledgeError(
                f"adapter {each.id} was fused from modules of which this view reads only some; "
                "take it apart first (archive.as_of)"
            )
        if all(then):
            chosen.append(each)
    return tuple(chosen)


def _recipe(cells: Sequence[Cell], names: Sequence[str]) -> dict[str, Any]:
    found = {tuple((name, cell.about.recipe[name]) for name in names) for cell in cells}
    if len(found) != 1:
        raise BasisMismatch(f"cells of one view were opened with different recipes: {found}")
    return dict(found.pop())


def _head(
    bank: Bank,
    cells: Sequence[Cell],
    scatters: Sequence[Cell],
    catalogue: Catalogue,
    rule: Rule,
    answers: Mapping[str, Sequence[str]],
    shares: Mapping[str, float],
) -> Head:
    recipe = _recipe([*cells, *scatters], ("features", "bits", "seed"))
    p = int(recipe["features"])
    sums, counts = _rows(cells, [shares[cell.about.id] for cell in cells], catalogue, p)
    filled = torch.nonzero((counts > 0) & _enough(cells, catalogue)).flatten()
    labels = [catalogue.labels[int(i)] for i in filled]
    sums, counts = sums[filled], counts[filled]
    # Half-lives age the means; the scatter is that of the records it was summed over, all alike.
    under = [cell for held in scatters for cell in covered(bank, held.about)]
    pool_sums, pool_counts = _rows(under, [1.0] * len(under), catalogue, p)
    packed = torch.zeros(p * (p + 1) // 2, dtype=torch.float64)
    for held in scatters:
        packed += held.total.words[GRAM]
    gram = unpack(packed, p)
    records = float(pool_counts.sum()) or float(counts.sum())
    lam = ridge(rule.lam, features=p, records=records)
    nodes, parents, weights, biases = [], [], [], []
    levels = len(catalogue.levels)
    for level in range(levels):
        order = {name: i for i, name in enumerate(dict.fromkeys(e.path[level] for e in labels))}
        names = tuple(order)
        index = torch.tensor([order[label.path[level]] for label in labels])
        nodes.append(names)
        parents.append(index)
        if level == 0 or rule.readout == "tree":
            node_sums = torch.zeros(len(names), p, dtype=torch.float64).index_add_(0, index, sums)
            node_counts = torch.zeros(len(names), dtype=torch.float64).index_add_(0, index, counts)
            kind = "pooled" if rule.readout == "tree" else rule.readout
            within = scatter(gram, *_by_node(pool_sums, pool_counts, catalogue, level))
            spread = rule.spread if rule.readout == "tree" else 1.0
            solved, bias = read_out(
                within, node_sums, node_counts, rule=kind, lam=lam, spread=spread
            )
        else:
            solved, bias = torch.zeros(0), torch.zeros(0)
        weights.append(solved)
        biases.append(bias)
    return Head(
        features=p,
        bits=int(recipe["bits"]),
        seed=int(recipe["seed"]),
        nodes=tuple(nodes),
        weights=tuple(weights),
        bias=tuple(biases),
        parents=tuple(parents),
        successor=_successors([label.code for label in labels], answers),
        up=rule.up,
        down=rule.down,
    )


def _rows(
    cells: Sequence[Cell], weights: Sequence[float], catalogue: Catalogue, features: int
) -> tuple[Tensor, Tensor]:
    """s (C, p) and n (C,) float64 over all labels of the catalogue, weighted by cell."""
    position = {label.code: i for i, label in enumerate(catalogue.labels)}
    sums = torch.zeros(len(position), features, dtype=torch.float64)
    counts = torch.zeros(len(position), dtype=torch.float64)
    for cell, share in zip(cells, weights, strict=True):
        index = torch.tensor([position[code] for code in cell.about.labels], dtype=torch.int64)
        # Weighted integers stay exact in float64 when the weight is 1.
        sums.index_add_(0, index, cell.total.words[SUMS].to(torch.float64) * share)
        counts.index_add_(0, index, cell.total.words[COUNTS].to(torch.float64) * share)
    return sums, counts


def _enough(cells: Sequence[Cell], catalogue: Catalogue) -> Tensor:
    """Which labels (C,) have the records that their rows were opened for; a removal may leave too
    few of them, whose mean a view must not show."""
    position = {label.code: i for i, label in enumerate(catalogue.labels)}
    held = torch.zeros(len(position), dtype=torch.int64)
    floors = torch.zeros(len(position), dtype=torch.int64)
    for cell in cells:
        index = torch.tensor([position[code] for code in cell.about.labels], dtype=torch.int64)
        held.index_add_(0, index, cell.total.words[COUNTS].to(torch.int64))
        rules = cell.about.privacy
        if not rules.get("public_reference"):
            floors[index] = floors[index].clamp(min=int(rules.get("label_floor") or 0))
    return held >= floors


def _by_node(
    sums: Tensor, counts: Tensor, catalogue: Catalogue, level: int
) -> tuple[Tensor, Tensor]:
    """Rows by label added up to rows by node of a level."""
    order = {name: i for i, name in enumerate(catalogue.nodes(level))}
    index = torch.tensor([order[label.path[level]] for label in catalogue.labels])
    node_sums = torch.zeros(len(order), sums.shape[1], dtype=torch.float64)
    node_counts = torch.zeros(len(order), dtype=torch.float64)
    return node_sums.index_add_(0, index, sums), node_counts.index_add_(0, index, counts)


def _successors(codes: Sequence[str], answers: Mapping[str, Sequence[str]]) -> Tensor:
    position = {code: i for i, code in enumerate(codes)}
    target = torch.full((len(codes),), -1, dtype=torch.int64)
    for code, speaks_for in answers.items():
        if code in position:
            for old in speaks_for:
                # Of the successors of a label that was split, the one opened first answers for it.
                if old in position and target[position[old]] < 0:
                    target[position[old]] = position[code]
    return target


def _first_label(head: Head, level: int) -> Tensor:
    """For every node of a level, one label below it (its ancestors are the node's ancestors)."""
    first = torch.zeros(len(head.nodes[level]), dtype=torch.int64)
    first.scatter_(0, head.parents[level].flip(0), torch.arange(len(head.parents[level])).flip(0))
    return first


def _merge(
    cells: Sequence[Cell],
    rule: Rule,
    weights: Mapping[str, float],
    targets: Mapping[str, tuple[int, int]],
) -> dict[str, Tensor]:
    """One module's adapter: pinned A of its slot, merged B by layer."""
    recipe = _recipe(cells, ("rank", "basis_seed"))
    rank, slot = int(recipe["rank"]), cells[0].about.slot
    assert slot is not None
    decoded: dict[str, Tensor] = {}
    for cell in cells:
        share = weights[cell.about.id]
        for name, words in cell.total.words.items():
            value = words.to(torch.float64) * (share / 2 ** cell.total.grid.scale[name])
            decoded[name] = decoded[name] + value if name in decoded else value
    layers = sorted(name.removesuffix(".lora_B") for name in decoded if name.endswith(".lora_B"))
    merged: dict[str, Tensor] = {}
    for layer in layers:
        total = decoded[f"{layer}.lora_B"]
        if rule.merge == "gram":
            gram = decoded[f"{layer}.gram"]
            # A cell without activations has a zero Gram and a zero S: its B is zero.
            tau = gram.trace() / rank if gram.any() else torch.tensor(1.0, dtype=torch.float64)
            ridge = rule.merge_lam * tau * torch.eye(rank, dtype=torch.float64)
            # S = sum_k B_k Gamma_k; the sum of Grams is symmetric, so solve on the transpose.
            b = torch.linalg.solve(gram + ridge, total.T).T
        else:
            b = total / decoded["weight"]
        merged[f"{layer}.lora_B"] = b.to(torch.float32).contiguous()
    pinned = basis.slot(targets, index=slot, rank=rank, seed=int(recipe["basis_seed"]))
    return merged | pinned


def _solve(matrix: Tensor, right: Tensor, lam: float, *, floor: float = 0.0) -> Tensor:
    """(M + (lam diag_mean(M) + floor) I)^-1 right, float32; ``matrix`` is overwritten.

    Row by row in memory, as a view that was saved or published is: products of another layout
    round differently.
    """
    matrix.diagonal().add_(lam * float(matrix.diagonal().mean()) + floor)
    factor = torch.linalg.cholesky(matrix)
    return torch.cholesky_solve(right.contiguous(), factor).to(torch.float32).contiguous()
