"""What cells are opened and asked for under: the recipe of an addend, and the floors of a sum.

The recipe is what every addend to a cell must share; it stands on the cell's record, and sites read
it from the question. The floors are the server's own: how many sites and records it takes.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field

from fedkola.knowledge import statistics
from fedkola.knowledge.bank import CellKind, KnowledgeCell
from fedkola.types import Catalogue, Scalar, Spec, Weights


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """How a site turns records into an addend.

    ``width`` is that of a frozen embedding, ``base`` the digest of the adapted base ("" is none).
    ``fraction`` counts the fractional bits of a LoRA cell's grid.
    """

    width: int
    features: int
    bits: int
    feature_seed: int
    rank: int
    scale: float
    basis_seed: int
    merge: str
    lora_records: int
    lora_steps: int
    batch: int
    lr: float
    clip: float
    fraction: int
    base: str = ""

    @property
    def inputs(self) -> int:
        """Numbers of an embedding that enters cells: the frozen one, and the adapted beside it."""
        return 2 * self.width if self.base else self.width


@dataclass(frozen=True, slots=True, kw_only=True)
class Terms:
    """Recipe, floors, and what else a question about a cell names.

    ``spec`` is the algorithm that sites rebuild, ``factors`` adapt the base, ``model`` is the hash
    of the frozen one; ``kinds`` are those of the cells that a scope gets.
    """

    spec: Spec
    recipe: Recipe
    kinds: tuple[CellKind, ...]
    catalogue: Catalogue
    targets: Mapping[str, tuple[int, int]]
    k_min: int
    label_floor: int
    public_reference: bool
    scatter_share: float
    scatter_every: int
    lora_floor: int
    model: str = ""
    factors: Weights = field(default_factory=dict)


def floor(terms: Terms, kind: CellKind | None = None) -> int:
    """The least records a cell of this kind may hold; without one, the cells of a scope."""
    recipe = terms.recipe
    if terms.public_reference:
        return 1
    if kind is CellKind.SCATTER:
        return statistics.records_floor(recipe.features, recipe.inputs)
    # Label rows have floors of their own; d records give a router's moment its full rank.
    floors = {
        CellKind.ANALYTIC: 1,
        CellKind.ROUTER: recipe.inputs,
        CellKind.LORA: 16 * recipe.rank,
    }
    return max(floors[kind] for kind in terms.kinds)


def row_floor(terms: Terms) -> int:
    """The least records of a label row: ``label_floor``, and more where p features are many.

    n records have n d unknowns and their sum gives p equations: at least p / d of them, so that
    more features do not undo what the floor is for. A heuristic, as for a Gram.
    """
    return max(terms.label_floor, -(-terms.recipe.features // terms.recipe.inputs))


def shared(recipe: Recipe, kind: CellKind) -> dict[str, Scalar]:
    """What every addend to a cell of this kind must share."""
    base: dict[str, Scalar] = {"base": recipe.base} if recipe.base else {}
    if kind in (CellKind.ANALYTIC, CellKind.SCATTER):
        features = {"features": recipe.features, "bits": recipe.bits, "seed": recipe.feature_seed}
        return {**features, **base}
    if kind is CellKind.ROUTER:
        return base
    return {
        "rank": recipe.rank,
        "scale": recipe.scale,
        "basis_seed": recipe.basis_seed,
        "merge": recipe.merge,
        "records": recipe.lora_records,
        "steps": recipe.lora_steps,
        "batch": recipe.batch,
        "lr": recipe.lr,
        "clip": recipe.clip,
        "fraction": recipe.fraction,
    }


def rules(terms: Terms) -> dict[str, Scalar]:
    """What a cell is opened under; it stays on its record."""
    return {
        "k_min": terms.k_min,
        "label_floor": row_floor(terms),
        "public_reference": terms.public_reference,
    }


def word(recipe: Recipe, about: KnowledgeCell) -> int:
    """Bits of a word of a sum over the records of a cell; a vote has counted them."""
    if about.kind is CellKind.LORA:
        return 32
    if about.kind is CellKind.ROUTER:
        return statistics.word(statistics.EMBEDDING**2, records=about.records)
    most = 2**recipe.bits - 1
    if about.kind is CellKind.SCATTER:
        return statistics.word(most**2, records=about.records)
    # The weight counts all records of the cell, a row only those of its label.
    rows = statistics.word(most, records=about.deepest or about.records)
    return max(rows, statistics.word(1, records=about.records))


def addend_bytes(terms: Terms, about: KnowledgeCell) -> int:
    """Bytes of what one site sends for a cell, without the message around them."""
    recipe = terms.recipe
    rows, p, d = len(about.labels), recipe.features, recipe.inputs
    numbers = {
        CellKind.ANALYTIC: rows * (p + 1),
        CellKind.SCATTER: p * (p + 1) // 2,
        CellKind.ROUTER: d * (d + 1) // 2 + rows * (d + 1),
        CellKind.LORA: sum(
            d_out * recipe.rank + (recipe.rank**2 if recipe.merge == "gram" else 0)
            for d_out, _ in terms.targets.values()
        ),
    }
    return numbers[about.kind] * word(recipe, about) // 8
