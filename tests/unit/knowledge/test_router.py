"""The router finds the module of an input, says how much of it is held, and what it never saw."""

import pytest
import torch
from small_bank import WIDTH, embeddings, total

from fedkola.knowledge import router
from fedkola.knowledge.bank import CellKind
from fedkola.knowledge.router import Part

HEART, LUNG = ("heart-1", "heart-2"), ("lung-1", "lung-2")


def part(module: str, labels: tuple[str, ...], codes: list[str], *, seed: int = 0) -> Part:
    z = embeddings(codes, seed=seed)
    words = total(CellKind.ROUTER, labels, codes, z).words
    return Part(module=module, labels=labels, words=words, weight=1.0)


PARTS = (
    part("heart@1", HEART, ["heart-1"] * 40 + ["heart-2"] * 40, seed=1),
    part("lung@1", LUNG, ["lung-1"] * 20 + ["lung-2"] * 20, seed=2),
)
BUILT = router.build(PARTS, width=WIDTH)


def test_an_input_goes_to_the_module_that_it_resembles():
    asked = embeddings(["heart-1", "heart-2", "lung-1", "lung-2"] * 5, seed=9)
    p = router.posterior(BUILT, asked, tau=1.0)
    assert torch.allclose(p.sum(1), torch.ones(20))
    assert p.argmax(1).tolist() == [0, 0, 1, 1] * 5


def test_the_prior_is_the_share_of_records():
    assert BUILT.log_prior.exp().tolist() == pytest.approx([2 / 3, 1 / 3])


def test_coverage_is_the_posterior_of_what_is_held():
    asked = embeddings(["heart-1", "lung-1"], seed=9)
    p = router.posterior(BUILT, asked, tau=1.0)
    only_heart = router.coverage(BUILT, asked, held=["heart@1"], tau=1.0)
    assert torch.allclose(only_heart, p[:, 0])
    assert float(only_heart[0]) > 0.5 > float(only_heart[1])
    assert torch.allclose(router.coverage(BUILT, asked, held=None, tau=1.0), torch.ones(2))
    assert router.coverage(BUILT, asked, held=[], tau=1.0).tolist() == [0.0, 0.0]


def test_what_no_site_ever_showed_lies_further_out_than_what_they_did():
    seen = router.unknown(BUILT, embeddings(["heart-1", "lung-2"] * 10, seed=9))
    never = router.unknown(BUILT, embeddings(["bone-7"] * 20, seed=9))
    assert float(never.min()) > float(seen.max())


def test_gates_keep_the_best_and_sum_to_one():
    p = torch.tensor([[0.5, 0.3, 0.2], [0.1, 0.1, 0.8]])
    assert torch.allclose(
        router.gates(p, top_k=2), torch.tensor([[0.625, 0.375, 0.0], [1 / 9, 0.0, 8 / 9]])
    )
    assert torch.allclose(router.gates(p, top_k=9), p)


def test_a_stream_of_windows_gives_the_router_of_one_shot():
    codes = ["heart-1"] * 9 + ["heart-2"] * 6
    z = embeddings(codes, seed=3)
    rows = [slice(0, None, 2), slice(1, None, 2)]
    stream = [
        Part(
            module="heart@1",
            labels=HEART,
            words=total(CellKind.ROUTER, HEART, codes[some], z[some]).words,
            weight=1.0,
        )
        for some in rows
    ]
    once = part("heart@1", HEART, codes, seed=3)
    left, right = (router.build([*parts, PARTS[1]], width=WIDTH) for parts in (stream, [once]))
    for name in ("means", "label_means", "centre", "within", "by_label", "background"):
        assert torch.equal(getattr(left, name), getattr(right, name))


def test_weights_of_cells_reach_means_and_covariances_alike():
    codes = ["heart-1"] * 9 + ["heart-2"] * 6
    one = part("heart@1", HEART, codes, seed=3)
    doubled = Part(module="heart@1", labels=HEART, words=one.words, weight=2.0)
    left = router.build([doubled, PARTS[1]], width=WIDTH)
    right = router.build([one, one, PARTS[1]], width=WIDTH)
    for name in ("log_prior", "means", "label_means", "within", "by_label", "background"):
        assert torch.equal(getattr(left, name), getattr(right, name))
    assert bool((torch.linalg.eigvalsh(left.by_label.double()) > 0).all())


def test_a_label_row_without_records_changes_nothing():
    wide = part("lung@1", (*LUNG, "lung-9"), ["lung-1"] * 20 + ["lung-2"] * 20, seed=2)
    assert torch.equal(router.build([PARTS[0], wide], width=WIDTH).label_means, BUILT.label_means)
