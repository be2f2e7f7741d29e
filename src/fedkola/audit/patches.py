"""A9, patches: the picture behind one gradient of a vision transformer, in closed form.

Lu et al., "APRIL: Finding the Achilles' heel on privacy for vision transformers" (CVPR 2022), in
the form that needs no attention layer. With learned positions the gradient of the position table
holds the error d_p of every place, and that of the patch projection is sum_p d_p x_p^T. Hence for
one picture X = pinv(D) dW, exact as long as there are no more patches than the model is wide and
their errors are independent. More pictures in one gradient share the table and blur.

Pictures are sequences of pixels 0..255, row by row, channel by channel.
"""

import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn

from fedkola.audit import layers, trial
from fedkola.audit.evidence import Control, Evidence, Known, Sequences, Sighting, Truth
from fedkola.audit.intervals import mean_interval, rate_interval
from fedkola.errors import DataError, Incompatible
from fedkola.training.model import Foundation
from fedkola.types import Weights

_TABLE, _WEIGHT = "position_embeddings", "patch_embeddings.projection.weight"
_NULLS = 3
_STEP = 0.5 / 255


@dataclass(frozen=True, slots=True, kw_only=True)
class Patches:
    """``mean`` and ``std`` are the public normalisation of pixels: x = (pixel / 255 - mean) / std.

    A patch counts as recovered if its relative error is below ``near``; the control must bring the
    mean error of single pictures below 0.01, that is ``fidelity``, 1 - error, above 0.99.
    """

    name: ClassVar[str] = "patches"
    mean: float = 0.5
    std: float = 0.5
    near: float = 0.1
    controls: int = 3
    floor: float = 0.99

    def quick(self) -> "Patches":
        """The same attack with one picture in its control."""
        return replace(self, controls=1)

    def run(self, seen: Sequence[Sighting], known: Known, truth: Truth) -> Evidence:
        """Attack every sighting. Raises Incompatible for a model without patches and learned
        positions, DataError where no truth or no such change is given."""
        began = time.perf_counter()
        require_vision(known.foundation)
        targets = [s for s in seen if truth.get((s.round, s.who))]
        if not targets:
            raise DataError(
                f"attack {self.name} was given {len(seen)} changes and the pictures behind none of "
                "them; give the pixels behind at least one"
            )
        truths = [self._pictures(truth[(s.round, s.who)], known) for s in targets]
        got = [self.recover(known.foundation, s) for s in targets]
        rows = [self._scores(g, t, known) for g, t in zip(got, truths, strict=True)]
        nulls = self._null(targets, truths, got, known)
        hits = sum(row["exact"] == 1.0 for row in rows)
        return Evidence(
            attack=self.name,
            target="single" if all(s.sites == 1 for s in targets) else "sum",
            updates=len(targets),
            measures={
                "exact": rate_interval(hits, len(rows), null=nulls["exact"]),
                "patch_recall": mean_interval(
                    [row["patch_recall"] for row in rows], null=nulls["patch_recall"]
                ),
                "fidelity": mean_interval(
                    [row["fidelity"] for row in rows], null=nulls["fidelity"]
                ),
            },
            control=self._control(targets[0], truths, known),
            seconds=time.perf_counter() - began,
            notes=f"one picture for each gradient; {truths[0].shape[1:]} pixels",
            settings=asdict(self),
        )

    def recover(self, foundation: Foundation, sighting: Sighting) -> Tensor:
        """The picture (channels, height, width), normalised; of several, a mixture of them."""
        table, weight = _names(foundation.model)
        layers.require_finite(sighting.change)
        missing = [name for name in (table, weight) if name not in sighting.change]
        if missing:
            raise DataError(
                f"the change lacks {missing[0]}: patches or positions were frozen or not due in "
                "this round; attack one that sends both"
            )
        errors = sighting.change[table].double()[0]
        errors = errors[errors.shape[0] - _places(foundation.model) :]
        outer = sighting.change[weight].double()
        wide, channels, side, _ = outer.shape
        if len(errors) > wide:
            raise Incompatible(
                f"{len(errors)} patches and a width of {wide}: the closed form needs no more "
                "patches than the model is wide"
            )
        rows = torch.linalg.lstsq(errors.T, outer.reshape(wide, -1), driver="gelsd").solution
        patches = cast(Tensor, rows).reshape(-1, channels, side, side)
        return _joined(patches)

    def _pictures(self, rows: Sequences, known: Known) -> Tensor:
        """Normalised pictures (n, channels, height, width) from pixels."""
        config: Any = known.foundation.model.config
        shape = (config.num_channels, config.image_size, config.image_size)
        count = shape[0] * shape[1] * shape[2]
        if any(len(row) != count for row in rows):
            raise DataError(
                f"pictures of {len(rows[0])} pixels were given; the model reads {count}, channel "
                "by channel, row by row"
            )
        pixels = torch.tensor(rows, dtype=torch.float64).reshape(-1, *shape)
        return (pixels / 255 - self.mean) / self.std

    def _scores(self, got: Tensor, truth: Tensor, known: Known) -> dict[str, float]:
        """Of one update: the best over its pictures. ``exact`` is to half a grey level."""
        side = int(cast(Any, known.foundation.model.config).patch_size)
        best = {"exact": 0.0, "patch_recall": 0.0, "fidelity": 0.0}
        for picture in truth:
            error = float((got - picture).norm() / picture.norm().clamp_min(1e-12))
            off, size = _parts(got - picture, side), _parts(picture, side)
            near = off.norm(dim=1) < self.near * size.norm(dim=1).clamp_min(1e-12)
            row = {
                "exact": float(float((got - picture).abs().max()) * self.std < _STEP),
                "patch_recall": float(near.double().mean()),
                "fidelity": max(0.0, 1.0 - error),
            }
            best = {key: max(best[key], row[key]) for key in best}
        return best

    def _null(
        self,
        targets: Sequence[Sighting],
        truths: Sequence[Tensor],
        got: Sequence[Tensor],
        known: Known,
    ) -> dict[str, float]:
        """The better of two: scored against another update's pictures, and random words."""
        others = [
            self._scores(g, truths[(i + 1) % len(truths)], known)
            for i, g in enumerate(got)
            if not torch.equal(truths[(i + 1) % len(truths)], truths[i])
        ]
        random = [
            self._scores(self.recover(known.foundation, trial.noise(s, known.seed + i)), t, known)
            for i, (s, t) in enumerate(zip(targets[:_NULLS], truths, strict=False))
        ]
        keys = ("exact", "patch_recall", "fidelity")
        return {
            key: max(sum(row[key] for row in rows) / len(rows) for rows in (others, random) if rows)
            for key in keys
        }

    def _control(self, like: Sighting, truths: Sequence[Tensor], known: Known) -> Control:
        pictures = torch.cat(list(truths))[: self.controls]
        values = []
        for number, picture in enumerate(pictures):
            change = gradient(known.foundation.model, like.before, picture[None], [number])
            recovered = self.recover(known.foundation, replace(like, change=change))
            values.append(self._scores(recovered, picture[None], known)["fidelity"])
        return Control(metric="fidelity", value=sum(values) / len(values), floor=self.floor)


def require_vision(foundation: Foundation) -> None:
    """Raise Incompatible unless the model cuts pictures into patches and learns their places."""
    _names(foundation.model)


def gradient(
    model: nn.Module, weights: Weights, pictures: Tensor, labels: Sequence[int]
) -> dict[str, Tensor]:
    """The gradient at ``weights`` of the mean classification loss of pictures (n, C, H, W).

    Labels are taken modulo the number of classes.
    """
    own = dict(model.named_parameters())
    held: Mapping[str, Tensor] = {
        name: weights.get(name, own[name]).detach().clone().requires_grad_(True) for name in own
    }
    given = (pictures.float(),)
    logits = cast(Any, torch.func.functional_call(model, dict(held), given)).logits
    wanted = torch.tensor([label % logits.shape[-1] for label in labels])
    loss = nn.functional.cross_entropy(logits, wanted)
    found = torch.autograd.grad(loss, list(held.values()), allow_unused=True)
    return {
        name: torch.zeros_like(value) if g is None else g
        for (name, value), g in zip(held.items(), found, strict=True)
    }


# --- private --------------------------------------------------------------------------------------


def _names(model: nn.Module) -> tuple[str, str]:
    """The names of the position table and of the patch projection's weight."""
    names = [name for name, _ in model.named_parameters()]
    table = next((name for name in names if name.endswith(_TABLE)), None)
    weight = next((name for name in names if name.endswith(_WEIGHT)), None)
    if table is None or weight is None:
        raise Incompatible(
            f"a {type(model).__name__} has no patch projection with learned positions; this attack "
            "reads vision transformers"
        )
    return table, weight


def _places(model: nn.Module) -> int:
    config: Any = model.config
    return int((config.image_size // config.patch_size) ** 2)


def _joined(patches: Tensor) -> Tensor:
    """A picture (C, H, W) from its patches (p, C, s, s), row by row."""
    count = round(len(patches) ** 0.5)
    _, channels, side, _ = patches.shape
    grid = patches.reshape(count, count, channels, side, side).permute(2, 0, 3, 1, 4)
    return grid.reshape(channels, count * side, count * side)


def _parts(picture: Tensor, side: int) -> Tensor:
    """Patches (p, C s s) of a picture."""
    channels, height, width = picture.shape
    grid = picture.reshape(channels, height // side, side, width // side, side)
    return grid.permute(1, 3, 0, 2, 4).reshape(-1, channels * side * side)
