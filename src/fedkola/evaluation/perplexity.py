"""What a pre-trained model is worth: held-out perplexity by site, samples, and a folder of it.

Held-out texts are packed like those that were trained on. The perplexity of all of them is that of
their tokens together, sites weighing by their held-out text; the worst site stands beside it.
"""

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fedkola.algorithms.diloco import DiLoCo, State
from fedkola.errors import KnowledgeError, ModelMismatch
from fedkola.federation import Federation
from fedkola.files import write_text
from fedkola.knowledge.stream import Stream
from fedkola.training import generate, packing, whole
from fedkola.training.model import Foundation
from fedkola.types import Dataset, Weights

SAMPLES = "samples.json"
ROOM = 40  # tokens that a sample adds to its prompt


def is_whole(federation: Federation) -> bool:
    """Whether the run trains every parameter of its model."""
    return bool(getattr(federation.algorithm, "whole", False))


def held_out(stream: Stream) -> dict[str, Dataset]:
    """Test records by site, where the task tells which site they are of; else all together."""
    places: dict[str, list[int]] = {}
    for row, record in enumerate(stream.test.records):
        name = stream.concepts.get(record, "")
        places.setdefault(name if name in stream.sites else "held-out", []).append(row)
    return {name: stream.test.take(rows) for name, rows in sorted(places.items())}


def perplexities(
    base: Foundation, stream: Stream, weights: Weights, *, length: int, rows: int = 0
) -> dict[str, tuple[float, float]]:
    """Nats and predicted tokens of each part of the test, over its first ``rows`` sequences (0:
    all)."""
    found = {}
    for name, part in held_out(stream).items():
        sequences, _ = packing.pack(base, part.texts, part.patients, length=length, apart=False)
        nats, tokens = whole.nll(base, weights, sequences[: rows or None]).sum(0).tolist()
        found[name] = (nats, tokens)
    return found


def figures(found: Mapping[str, tuple[float, float]]) -> dict[str, float]:
    """``perplexity`` of all tokens, of the worst site, and of each site."""
    nats = math.fsum(n for n, _ in found.values())
    tokens = math.fsum(t for _, t in found.values())
    each = {name: _perplexity(n, t) for name, (n, t) in found.items() if t}
    return {
        "loss": nats / max(tokens, 1.0),
        "perplexity": _perplexity(nats, tokens),
        "worst": max(each.values(), default=float("nan")),
        **{f"perplexity/{name}": value for name, value in each.items()},
    }


def measure(federation: Federation, state: State, number: int) -> dict[str, float]:
    """The metrics of a round: perplexity, tokens trained on in it, and what the grid cut off."""
    found = figures(_perplexities(federation, state, federation.plan.pretrain.measured))
    return {**found, **trained(federation, state, number)}


def trained(federation: Federation, state: State, number: int) -> dict[str, float]:
    """Of a round's metrics those that need no held-out text."""
    algorithm = federation.algorithm
    if not isinstance(algorithm, DiLoCo):
        return {}
    course = algorithm.course(number)
    return {
        "tokens": float(course.steps * course.batch * course.length * len(state.holders)),
        "clipped": max(state.clipped.values(), default=0.0),
        "range_exceeded": float(state.exceeded),
    }


def sample(federation: Federation, state: State, number: int) -> None:
    """Let the model continue the plan's prompts, and keep what it says beside the run."""
    prompts, base = federation.plan.pretrain.prompts, federation.foundation
    if not prompts or base.kind != "causal":
        return
    room = min(ROOM, base.max_tokens // 2)
    with whole.holding(base, state.weights):
        said = generate.generate(base, {}, prompts, max_new_tokens=room, scale=1.0)
    kept = {entry["round"]: entry for entry in samples(federation.folder)}
    kept[number] = {"round": number, "prompts": list(prompts), "texts": said}
    write_text(federation.folder / SAMPLES, json.dumps([kept[n] for n in sorted(kept)], indent=1))


def samples(folder: Path) -> list[dict[str, Any]]:
    """What the model said after each round: round, prompts, texts."""
    path = folder / SAMPLES
    found: list[dict[str, Any]] = json.loads(path.read_text("utf-8")) if path.exists() else []
    return found


def export(federation: Federation, state: State, to: Path, *, number: int) -> Path:
    """Write the trained model with its tokenizer as a folder that transformers loads.

    Raises KnowledgeError if the run trained no whole model or no round of it is done,
    ModelMismatch if the folder is not empty.
    """
    if not is_whole(federation) or not number:
        raise KnowledgeError(
            f"run {federation.plan.run.name} has trained no whole model yet; run a plan with "
            'algorithm.name = "diloco" for a round at least'
        )
    if to.exists() and any(to.iterdir()):
        raise ModelMismatch(f"{to} is not empty; give a new folder")
    to.mkdir(parents=True, exist_ok=True)
    whole.save(federation.foundation, state.weights, to)
    about = {
        "run": federation.plan.run.name,
        "round": number,
        "base": federation.foundation.hash,
        "figures": figures(_perplexities(federation, state, 0)),
    }
    (to / "provenance.json").write_text(json.dumps(about, indent=1), encoding="utf-8")
    return to


def curves(rounds: Sequence[Mapping[str, Any]]) -> dict[str, list[tuple[float, float]]]:
    """Perplexity over tokens trained on, of the whole and of every site, from reports of rounds."""
    found: dict[str, list[tuple[float, float]]] = {}
    tokens = 0.0
    for report in rounds:
        metrics = report["metrics"]
        tokens += metrics.get("tokens", 0.0)
        for key, value in metrics.items():
            if key == "perplexity" or key.startswith("perplexity/"):
                name = key.partition("/")[2] or "all"
                found.setdefault(name, []).append((tokens, value))
    return found


# --- private --------------------------------------------------------------------------------------


def _perplexities(
    federation: Federation, state: State, rows: int
) -> dict[str, tuple[float, float]]:
    length = federation.plan.pretrain.length
    base, stream = federation.foundation, federation.stream
    return perplexities(base, stream, state.weights, length=length, rows=rows)


def _perplexity(nats: float, tokens: float) -> float:
    return math.exp(min(nats / max(tokens, 1.0), 100.0))
