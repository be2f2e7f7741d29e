"""Pictures from gradients of a small vision transformer."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from fedkola.audit import patches
from fedkola.audit.evidence import Known, Sighting
from fedkola.audit.patches import Patches
from fedkola.errors import DataError, Incompatible, NotFinite
from fedkola.training.model import Foundation
from fedkola.training.vision import small_vit


@pytest.fixture(scope="module")
def vit() -> Foundation:
    return small_vit(image=28, patch=4, width=64)


def drawn(number: int) -> tuple[int, ...]:
    """A bright disc on a dark ground, at another place for every number."""
    at = torch.arange(28.0)
    far = (at[:, None] - 8 - number) ** 2 + (at[None] - 18 + number) ** 2
    noise = torch.rand(28, 28, generator=torch.Generator().manual_seed(number))
    return tuple((255 * (0.8 * (far < 40) + 0.2 * noise)).round().int().flatten().tolist())


def pixels(*pictures: tuple[int, ...]) -> Tensor:
    return (torch.tensor(pictures).double().reshape(-1, 1, 28, 28) / 255 - 0.5) / 0.5


def seen(vit: Foundation, pictures: tuple[tuple[int, ...], ...], number: int = 0) -> Sighting:
    weights = {n: p.detach().clone() for n, p in vit.model.named_parameters()}
    labels = [number + i for i in range(len(pictures))]
    return Sighting(
        round=number,
        who="site",
        sites=1,
        before=weights,
        change=patches.gradient(vit.model, weights, pixels(*pictures), labels),
        protocol={"name": "gradient", "batch": len(pictures)},
    )


def test_one_gradient_is_the_picture(vit: Foundation) -> None:
    picture = drawn(1)
    got = Patches().recover(vit, seen(vit, (picture,)))
    truth = pixels(picture)[0]
    assert float((got - truth).norm() / truth.norm()) < 1e-2


def test_both_controls_come_with_the_evidence(vit: Foundation) -> None:
    shown = [(drawn(i),) for i in range(4)]
    sightings = [seen(vit, pictures, i) for i, pictures in enumerate(shown)]
    truth = {(i, "site"): pictures for i, pictures in enumerate(shown)}
    evidence = Patches().run(sightings, Known(foundation=vit, texts=()), truth)
    assert evidence.control.passed
    assert evidence.measures["exact"].value == 1.0
    assert evidence.measures["exact"].null == 0.0
    assert evidence.measures["patch_recall"].value == 1.0


def test_many_pictures_in_one_gradient_blur(vit: Foundation) -> None:
    pictures = tuple(drawn(i) for i in range(8))
    evidence = Patches().run(
        [seen(vit, pictures)], Known(foundation=vit, texts=()), {(0, "site"): pictures}
    )
    assert evidence.control.passed
    assert evidence.measures["exact"].value == 0.0


def test_patches_put_together_wrongly_break_the_control(
    vit: Foundation, monkeypatch: pytest.MonkeyPatch
) -> None:
    right = patches._joined
    monkeypatch.setattr(patches, "_joined", lambda parts: right(parts.flip(0)))
    pictures = (drawn(2),)
    evidence = Patches().run(
        [seen(vit, pictures)], Known(foundation=vit, texts=()), {(0, "site"): pictures}
    )
    assert not evidence.control.passed


def test_frozen_patches_cannot_be_tried(vit: Foundation) -> None:
    sighting = seen(vit, (drawn(0),))
    change = {n: v for n, v in sighting.change.items() if "patch_embeddings" not in n}
    with pytest.raises(DataError, match="patches or positions were frozen"):
        Patches().recover(vit, replace(sighting, change=change))


def test_a_change_that_is_not_finite_is_refused(vit: Foundation) -> None:
    sighting = seen(vit, (drawn(0),))
    change = {n: v.clone() for n, v in sighting.change.items()}
    next(iter(change.values())).flatten()[0] = float("nan")
    with pytest.raises(NotFinite):
        Patches().recover(vit, replace(sighting, change=change))


def test_more_patches_than_the_width_are_refused() -> None:
    narrow = small_vit(image=28, patch=4, width=32)
    with pytest.raises(Incompatible, match="49 patches and a width of 32"):
        Patches().recover(narrow, seen(narrow, (drawn(0),)))


def test_pictures_of_another_size_are_refused(vit: Foundation) -> None:
    with pytest.raises(DataError, match="the model reads 784"):
        Patches().run(
            [seen(vit, (drawn(0),))], Known(foundation=vit, texts=()), {(0, "site"): ((1, 2, 3),)}
        )


def test_patches_that_do_not_fit_are_refused() -> None:
    with pytest.raises(Incompatible, match="divide the picture"):
        small_vit(image=28, patch=5, width=64)
