"""A site's half of a LoRA cell: train B from zero in the pinned slot, and keep what was added.

The addend is (B Gamma, Gamma) by layer, Gamma = sum z z^T over the records. Training does not
repeat bit for bit on every machine, so the site keeps the integers it sent as a receipt: removal
subtracts these, never a recomputation.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from fedkola import wire
from fedkola.files import settle
from fedkola.knowledge import basis, journal
from fedkola.knowledge.journal import Entry
from fedkola.knowledge.terms import Recipe
from fedkola.types import Broadcast, Client, Dataset, Update


def addend(
    recipe: Recipe, client: Client, entry: Entry | None, *, slot: int, seed: int
) -> dict[str, Tensor]:
    """(B Gamma, Gamma) by layer for a B trained from zero; the local head is thrown away."""
    zeros: dict[str, Tensor] = {}
    for layer, (d_out, _) in client.targets.items():
        zeros[f"{layer}.lora_B"] = torch.zeros(d_out, recipe.rank)
        if recipe.merge == "gram":
            zeros[f"{layer}.gram"] = torch.zeros(recipe.rank, recipe.rank, dtype=torch.float64)
    if entry is None:
        return zeros
    pinned = basis.slot(client.targets, index=slot, rank=recipe.rank, seed=recipe.basis_seed)
    data = _training_data(client, entry, most=recipe.lora_records)
    start = {name: value for name, value in zeros.items() if name.endswith(".lora_B")}
    codes = tuple(dict.fromkeys(data.labels))
    if len(codes) > 1:
        start |= _prototypes(entry, codes)
    trained = client.fit(
        start,
        data,
        steps=recipe.lora_steps or math.ceil(len(data) / recipe.batch),
        batch=recipe.batch,
        lr=recipe.lr,
        seed=seed,
        classes=codes,
        pinned=pinned,
    )
    factors = {name: trained[name].to(torch.float64) for name in zeros if name in trained}
    if recipe.merge == "mean":
        return {name: len(entry) * b for name, b in factors.items()}
    grams = client.grams(trained, data, pinned=pinned)
    found: dict[str, Tensor] = {}
    for layer in client.targets:
        gram = grams[f"{layer}.gram"]
        found[f"{layer}.gram"] = gram
        found[f"{layer}.lora_B"] = factors[f"{layer}.lora_B"] @ gram
    return found


def words(recipe: Recipe, asked: Broadcast, update: Update) -> dict[str, Tensor]:
    """An addend as integers on the cell's own grid."""
    scale = {
        name: recipe.fraction if name.endswith((".lora_B", ".gram")) else bits
        for name, bits in asked.grid.scale.items()
    }
    return wire.words(update, replace(asked.grid, scale=scale), asked.cohort)


def update(client: Client, integers: Mapping[str, Tensor]) -> Update:
    """These integers as an answer, to a question whose grid has no fractional bits."""
    tensors = {
        name: value
        for name, value in integers.items()
        if name != wire.WEIGHT and not name.startswith(wire.METRIC)
    }
    return Update(
        client=client.name,
        weight=float(integers[wire.WEIGHT]),
        tensors=tensors,
        metrics={"contributors": float(integers[wire.METRIC + "contributors"])},
    )


def read_receipt(client: Client, asked: Broadcast) -> dict[str, Tensor]:
    """The integers this site sent for the cell."""
    return load_file(_receipt(client, asked))


def keep_receipt(client: Client, asked: Broadcast, integers: Mapping[str, Tensor]) -> None:
    """Keep what this site is about to send."""
    path = _receipt(client, asked)
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_suffix(".tmp")
    save_file(dict(integers), draft)
    settle(draft, path)


def draft_receipt(
    client: Client, asked: Broadcast, integers: Mapping[str, Tensor], *, suffix: str
) -> None:
    """Keep what will stand for the receipt once a removal or a revision is settled."""
    save_file(dict(integers), _receipt(client, asked, suffix=suffix))


def drop_drafts(store: Path) -> None:
    """Forget factors retrained for a revision that never came about."""
    for draft in (store / "receipts").glob(f"*.{journal.REVISION}*"):
        draft.unlink()


# --- private --------------------------------------------------------------------------------------


def _receipt(client: Client, asked: Broadcast, *, suffix: str = ".safetensors") -> Path:
    scope = int(asked.tensors["places"][0, 1])
    return client.store / "receipts" / f"{asked.round:06d}-{scope}{suffix}"


def _training_data(client: Client, entry: Entry, *, most: int) -> Dataset:
    """The entry's records with their texts, capped by a fixed order of record ids."""
    whole = client.knowledge.versions()
    row = {at: i for i, at in enumerate(zip(whole.records, whole.windows, strict=True))}
    summed = sorted(zip(entry.records, entry.windows, strict=True))
    chosen = [row[version] for version in summed if version in row]
    if most:
        step = max(1, len(chosen) // most)
        chosen = chosen[::step][:most]
    return whole.take(chosen)


def _prototypes(entry: Entry, codes: Sequence[str]) -> dict[str, Tensor]:
    """A local head at the class means of the frozen embeddings."""
    position = {code: i for i, code in enumerate(codes)}
    kept = [i for i, code in enumerate(entry.labels) if code in position]
    rows = torch.tensor([position[entry.labels[i]] for i in kept])
    e = entry.z[kept].to(torch.float32) / 1024
    sums = torch.zeros(len(codes), e.shape[1]).index_add_(0, rows, e)
    means = torch.nn.functional.normalize(sums, dim=1)
    return {"head.weight": means, "head.bias": torch.zeros(len(codes))}
