"""The question about one cell of the bank, and the addend that answers it.

A site finds the records of a cell in its journal, by the places (round, scope) that the question
names. It answers with zeros where it has none.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fedkola.algorithms import modules
from fedkola.algorithms.ask import ask
from fedkola.knowledge import adaptation, journal, statistics
from fedkola.knowledge import bank as banks
from fedkola.knowledge.bank import Bank, CellKind, KnowledgeCell
from fedkola.knowledge.journal import Entry, Place
from fedkola.knowledge.terms import Recipe, Terms, word
from fedkola.types import Broadcast, Catalogue, Client, Cohort, Dataset, Update


@dataclass(frozen=True, slots=True, kw_only=True)
class Loss:
    """What cells lose: the records of a removal request, or in round ``number`` the old versions
    in ``places`` (the number of a round and of a scope)."""

    request: str
    number: int = 0
    places: tuple[tuple[int, int], ...] = ()


NOTHING = Loss(request="")

# --- server half ----------------------------------------------------------------------------------


def about_cell(
    terms: Terms,
    step: str,
    about: KnowledgeCell,
    places: Sequence[tuple[int, int]],
    *,
    loss: Loss = NOTHING,
    whole: Sequence[tuple[int, int]] = (),
    against: bool = False,
) -> Broadcast:
    """Ask for one cell, the sum over ``places``: (round, scope) in a site's journal.

    Under a ``loss`` answers are integers on the cell's grid, and all of the places ``whole`` goes
    besides.
    """
    recipe = terms.recipe
    position = {code: i for i, code in enumerate(terms.catalogue.codes())}
    cell = [tuple(CellKind).index(about.kind), -1 if about.slot is None else about.slot]
    if about.kind is CellKind.LORA:
        factors = ("lora_B", "gram") if recipe.merge == "gram" else ("lora_B",)
        names = [f"{layer}.{factor}" for layer in terms.targets for factor in factors]
        scale = dict.fromkeys(names, 0 if loss.request else recipe.fraction)
    else:
        rows = (statistics.SUMS, statistics.COUNTS)
        parts = {
            CellKind.ANALYTIC: rows,
            CellKind.SCATTER: (statistics.GRAM,),
            CellKind.ROUTER: (statistics.GRAM, *rows),
        }
        scale = dict.fromkeys(parts[about.kind], 0)
    tensors = {
        "cell": torch.tensor(cell, dtype=torch.int64),
        "places": torch.tensor(places, dtype=torch.int64).reshape(-1, 2),
        "whole": torch.tensor(whole, dtype=torch.int64).reshape(-1, 2),
        "part": torch.tensor(loss.places, dtype=torch.int64).reshape(-1, 2),
        "number": torch.tensor(loss.number),
        "labels": torch.tensor([position[code] for code in about.labels], dtype=torch.int64),
        "against": torch.tensor(against),
        # Two removals from one cell are two questions, so the outbox keeps them apart.
        "request": as_bytes(loss.request),
    }
    if step == "fill" and about.kind in (CellKind.ANALYTIC, CellKind.ROUTER):
        tensors |= adaptation.carried(terms.factors)
    return ask(
        terms.spec,
        step,
        about.round,
        tensors,
        word=word(recipe, about),
        scale=scale,
        metrics={"contributors": 0},
        bounded=about.kind is not CellKind.LORA,
    )


def place(catalogue: Catalogue, about: KnowledgeCell) -> tuple[int, int]:
    """Where the records of a cell stand in a journal: its round and the number of its scope."""
    return about.round, catalogue.scopes().index(banks.scope(about))


def places(catalogue: Catalogue, bank: Bank, about: KnowledgeCell) -> list[tuple[int, int]]:
    """The places of a cell's records; of a scatter cell, those of all cells that it covers."""
    if about.kind is not CellKind.SCATTER:
        return [place(catalogue, about)]
    home = {a.id: a for a in (*(cell.about for cell in bank.cells), *bank.cold)}
    covered = [home[name] for name in about.covers]
    return [place(catalogue, part) for each in covered for part in banks.parts_of(bank, each)]


def sealed(catalogue: Catalogue, bank: Bank) -> dict[tuple[int, int], Cohort]:
    """The sites asked, by the place whose records are summed, in cold storage too."""
    summed = [about for about in banks.origins(bank) if about.kind is not CellKind.SCATTER]
    return {place(catalogue, about): about.cohort for about in summed}


def as_bytes(text: str) -> Tensor:
    """Text as a tensor of a question."""
    if not text:
        return torch.zeros(0, dtype=torch.uint8)
    return torch.frombuffer(bytearray(text.encode()), dtype=torch.uint8)


# --- client half ----------------------------------------------------------------------------------


def kind(asked: Broadcast) -> CellKind:
    """The kind of the cell a question is about."""
    return tuple(CellKind)[int(asked.tensors["cell"][0])]


def codes(asked: Broadcast, catalogue: Catalogue) -> tuple[str, ...]:
    """The labels a question names."""
    return tuple(catalogue.labels[i].code for i in asked.tensors["labels"].tolist())


def named(asked: Broadcast, catalogue: Catalogue, name: str = "places") -> tuple[Place, ...]:
    """Round and scope of the journal entries that a question is about."""
    scopes = catalogue.scopes()
    return tuple((round, scopes[scope]) for round, scope in asked.tensors[name].tolist())


def entries(client: Client, asked: Broadcast) -> dict[Place, Entry]:
    """What this site put into the cell, by place."""
    found = {at: journal.read(client.store, *at) for at in named(asked, client.catalogue)}
    return {at: entry for at, entry in found.items() if entry}


def embedded(client: Client, asked: Broadcast, data: Dataset) -> Tensor:
    """What enters cells of these records, under the base that the question names."""
    frozen = client.features(data)
    base, _ = adaptation.split(asked.tensors)
    if not base:
        return frozen
    return adaptation.beside(frozen, client.features(data, adapter=base))


def addend(recipe: Recipe, client: Client, asked: Broadcast, found: Iterable[Entry]) -> Update:
    """One site's contribution to one cell; zeros without entries."""
    entry, of = journal.join(tuple(found)), kind(asked)
    features = {"features": recipe.features, "bits": recipe.bits, "seed": recipe.feature_seed}
    z = entry.z if entry else torch.zeros(0, recipe.inputs, dtype=torch.int16)
    if of is CellKind.LORA:
        slot = int(asked.tensors["cell"][1])
        tensors = modules.addend(recipe, client, entry, slot=slot, seed=asked.seed)
    elif of is CellKind.SCATTER:
        tensors = statistics.scatter(z, **features)
    else:
        position = {code: i for i, code in enumerate(codes(asked, client.catalogue))}
        labels = entry.labels if entry else ()
        rows = torch.tensor([position[code] for code in labels], dtype=torch.int64)
        tensors = (
            statistics.by_label(z, rows, num_rows=len(position), **features)
            if of is CellKind.ANALYTIC
            else statistics.router(z, rows, num_rows=len(position))
        )
    return Update(
        client=client.name,
        weight=len(entry) if entry else 0,
        tensors=tensors,
        metrics={"contributors": 1.0 if entry else 0.0},
    )
