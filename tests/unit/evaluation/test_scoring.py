"""States answer through one interface: the algorithm's own answer, or one adapter with one head."""

from dataclasses import replace
from pathlib import Path

import pytest
import small_federation as small
import torch

from fedkola.evaluation import scoring
from fedkola.federation import Federation, initial_weights


def local(folder: Path, *settings: str) -> Federation:
    return small.assemble(folder, "algorithm.name=local", *settings)


def test_a_method_with_a_model_per_site_is_averaged_over_the_sites_there_are(tmp_path: Path):
    federation = local(tmp_path, "scenario.late={west=3}", "scenario.leave={east=1}")
    state = small.run(federation)
    test = scoring.askable(federation.stream.test, 3)
    nodes = scoring.arrived(federation, 3)
    each = {
        site: scoring.measure(
            federation,
            scoring.scores_of(federation, state, test, nodes, site=site),
            test,
            nodes,
            window=3,
        ).top1
        for site in small.SITES
    }
    there = [site for site in small.SITES if site != "east"]
    found = scoring.accuracy(federation, state, test, window=3).top1
    assert found == pytest.approx(sum(each[site] for site in there) / 4)
    # In window 2 the late site is not there yet, and the early one has left.
    early = scoring.askable(federation.stream.test, 2)
    two = scoring.accuracy(federation, state, early, window=2)
    nodes = scoring.arrived(federation, 2)
    alone = [
        scoring.measure(
            federation,
            scoring.scores_of(federation, state, early, nodes, site=site),
            early,
            nodes,
            window=2,
        ).top1
        for site in ("north", "south", "centre")
    ]
    assert two.top1 == pytest.approx(sum(alone) / 3)


def test_a_site_without_a_model_knows_nothing(tmp_path: Path):
    federation = local(tmp_path)
    state = small.run(federation)
    nodes = scoring.arrived(federation, 3)
    scores = scoring.scores_of(federation, state, federation.stream.test, nodes, site="nowhere")
    assert bool((scores == float("-inf")).all())


def test_one_adapter_with_one_head_is_scored_as_the_site_would_score_it(tmp_path: Path):
    federation = small.assemble(tmp_path, "algorithm.name=fedit", "algorithm.epochs=3")
    state = small.run(federation)
    test = federation.stream.test
    nodes = scoring.arrived(federation, 3)
    found = scoring.accuracy(federation, state, test, window=3)
    site = federation.sites["north"]
    known = federation.stream.catalogue.nodes(federation.level)
    at_site = site.evaluate(state.weights, test, classes=known)
    assert set(nodes) == set(known)
    assert found.top1 == at_site["correct"] / at_site["count"]


def test_a_bank_without_cells_answers_nothing(tmp_path: Path):
    federation = small.assemble(tmp_path)
    empty = federation.algorithm.start({})
    nodes = scoring.arrived(federation, 3)
    scores = scoring.scores_of(federation, empty, federation.stream.test, nodes)
    assert scores.shape == (30, len(nodes))
    assert bool((scores == float("-inf")).all())


def test_texts_under_slots_with_an_open_gate_read_as_under_the_sum_of_the_slots(tmp_path: Path):
    federation = small.assemble(tmp_path)
    reader = scoring.reader(federation)
    texts = federation.stream.test.texts[:9]
    weights = {
        name: value + 0.2 * torch.randn(value.shape, generator=torch.Generator().manual_seed(i))
        for i, (name, value) in enumerate(initial_weights(federation).items())
        if "lora" in name
    }
    whole = reader.embeddings(weights, texts)
    # Two slots of rank 1 each: both open is the adapter, none open is the base.
    torch.testing.assert_close(
        reader.embeddings(weights, texts, gate=torch.ones(9, 2)), whole, rtol=1e-4, atol=1e-5
    )
    base = reader.embeddings({}, texts)
    torch.testing.assert_close(
        reader.embeddings(weights, texts, gate=torch.zeros(9, 2)), base, rtol=1e-4, atol=1e-5
    )
    # A gate is its text's own, wherever the text stands.
    gate = torch.rand(9, 2, generator=torch.Generator().manual_seed(5))
    order = torch.tensor([4, 0, 8, 1, 7, 2, 6, 3, 5])
    found = reader.embeddings(weights, texts, gate=gate)
    shuffled = reader.embeddings(weights, [texts[i] for i in order], gate=gate[order])
    torch.testing.assert_close(shuffled, found[order], rtol=1e-4, atol=1e-5)
    assert not torch.allclose(found, whole, atol=1e-3)


def test_another_cache_of_features_gives_the_same_scores(tmp_path: Path):
    federation = small.assemble(tmp_path, small_lanes := 'knowledge.lanes=["analytic", "router"]')
    state = small.run(federation)
    nodes = scoring.arrived(federation, 3)
    other = small.assemble(tmp_path / "other", small_lanes)
    scorer = replace(federation, trainer=other.trainer)
    one = scoring.scores_of(federation, state, federation.stream.test, nodes)
    assert torch.equal(scoring.scores_of(scorer, state, federation.stream.test, nodes), one)
