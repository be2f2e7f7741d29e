"""A3: tokens of a change are found where it is open, and not where nothing is in it."""

from dataclasses import replace

import pytest
import torch
from small_gpt import sentences, small_gpt

from fedkola.audit import shadow
from fedkola.audit.evidence import Evidence, Known, Sighting, Truth
from fedkola.audit.presence import Presence, described, embedding
from fedkola.errors import DataError
from fedkola.training import whole
from fedkola.training.model import Foundation, encode
from fedkola.types import Scalar

PROTOCOL: dict[str, Scalar] = {"name": "diloco", "inner_steps": 2, "batch": 4, "lr": 1e-3}


@pytest.fixture(scope="module")
def gpt(tmp_path_factory: pytest.TempPathFactory) -> Foundation:
    return small_gpt(tmp_path_factory.mktemp("gpt") / "model")


@pytest.fixture(scope="module")
def known(gpt: Foundation) -> Known:
    return Known(foundation=gpt, texts=tuple(sentences(60, seed=2)))


def exchange(
    gpt: Foundation, *, sites: int = 1, seed: int = 3, still: str = "", **protocol: Scalar
) -> tuple[Sighting, Truth]:
    """A change as a site makes it, or the mean of several, with the sequences behind it."""
    before = whole.parameters(gpt)
    seen = Sighting(
        round=1,
        who=f"hospital {seed}",
        sites=sites,
        before=before,
        change={name: torch.ones_like(value) for name, value in before.items() if name != still},
        protocol={**PROTOCOL, **protocol},
    )
    records = encode(gpt, sentences(40 * sites, seed=seed))
    pools = shadow.dealt(records, sites, seed=seed)
    made = shadow.shadow(gpt, before, shadow.recipe(seen), pools, seed=seed)
    change = {name: value for name, value in made.change.items() if name != still}
    return replace(seen, change=change), {(1, seen.who): made.used}


def attacked(known: Known, *exchanges: tuple[Sighting, Truth]) -> Evidence:
    truth = {key: value for _, own in exchanges for key, value in own.items()}
    return Presence(shadows=4).run([seen for seen, _ in exchanges], known, truth)


def test_an_open_change_tells_which_tokens_a_site_used(gpt: Foundation, known: Known) -> None:
    found = attacked(known, exchange(gpt), exchange(gpt, seed=4))
    assert found.control.passed
    auc = found.measures["presence_auc"]
    assert auc.value > 0.97
    assert auc.low > max(found.measures["frequency_auc"].high, found.measures["prior_auc"].high)
    assert auc.null is not None
    assert auc.null < auc.value - 0.1
    assert found.measures["matched_auc"].low > 0.9
    assert (found.target, found.updates) == ("single", 2)


def test_a_secure_sum_of_three_tells_it_of_all_together(gpt: Foundation, known: Known) -> None:
    found = attacked(known, exchange(gpt, sites=3))
    assert found.target == "sum"
    assert found.measures["presence_auc"].low > 0.85


def test_noise_without_a_record_in_it_leaves_the_matched_score_at_one_half(
    gpt: Foundation, known: Known
) -> None:
    exchanges = []
    for seed in (3, 4, 5, 6):
        seen, truth = exchange(gpt, seed=seed)
        generator = torch.Generator().manual_seed(seed)
        noise = {n: torch.randn(v.shape, generator=generator) for n, v in seen.change.items()}
        exchanges.append((replace(seen, change=noise), truth))
    found = attacked(known, *exchanges)
    assert found.control.passed  # the attack works; there was nothing to find
    matched = found.measures["matched_auc"]
    assert abs(matched.value - 0.5) < 0.08
    assert matched.null is not None
    assert abs(matched.value - matched.null) < 0.06


def test_much_private_noise_hides_what_an_open_change_tells(gpt: Foundation, known: Known) -> None:
    found = attacked(known, exchange(gpt, sigma=4.0, units=40))
    assert found.control.passed
    assert found.measures["matched_auc"].value < 0.7


def test_a_broken_attack_is_caught_by_its_control(gpt: Foundation, known: Known) -> None:
    seen, truth = exchange(gpt)
    found = Presence(shadows=4, steps=0).run([seen], known, truth)
    assert not found.control.passed


def test_an_embedding_that_stays_is_read_through_the_other_matrices(
    gpt: Foundation, known: Known
) -> None:
    table = embedding(gpt)
    seen, truth = exchange(gpt, still=table)
    assert table not in seen.change
    found = Presence(shadows=4).run([seen], known, truth)
    assert found.control.passed
    assert "embedding stayed" in found.notes
    rows = described(seen.before, seen.change, table)
    assert rows.shape[0] == len(seen.before[table])
    assert bool(rows.isfinite().all())


def test_of_fragments_that_take_turns_only_what_was_sent_is_read(
    gpt: Foundation, known: Known
) -> None:
    table = embedding(gpt)
    seen, truth = exchange(gpt, still=table, fragments=2)
    assert shadow.recipe(seen).frozen == frozenset()
    found = Presence(shadows=2).run([seen], known, truth)
    assert found.control.passed


def test_a_quick_attack_takes_the_last_round(gpt: Foundation, known: Known) -> None:
    first, truth = exchange(gpt)
    second, other = exchange(gpt, seed=4)
    later = replace(second, round=2, who="b")
    both = {**truth, (2, "b"): other[(1, second.who)]}
    found = Presence().quick().run([first, later], known, both)
    assert found.updates == 1
    assert found.measures["presence_auc"].value > 0.9


def test_nothing_is_tried_where_no_token_is_absent(gpt: Foundation, known: Known) -> None:
    seen, _ = exchange(gpt)
    everything = (tuple(range(len(seen.before[embedding(gpt)]))),)
    with pytest.raises(DataError, match="larger vocabulary"):
        Presence().run([seen], known, {(1, seen.who): everything})


def test_a_protocol_that_cannot_be_shadowed_is_named(gpt: Foundation, known: Known) -> None:
    seen, truth = exchange(gpt)
    with pytest.raises(DataError, match="inner_steps"):
        Presence().run([replace(seen, protocol={"name": "fedit", "lr": 1.0})], known, truth)
    with pytest.raises(DataError, match="public text"):
        Presence().run([seen], replace(known, texts=()), truth)


def test_the_same_seed_gives_the_same_evidence(gpt: Foundation, known: Known) -> None:
    seen, truth = exchange(gpt)
    first, second = (Presence(shadows=2).run([seen], known, truth) for _ in range(2))
    assert first.measures == second.measures
