"""FedKoLa on an adapted base: consolidation, its timing, what is summed under which base."""

from pathlib import Path

import pytest
import small_federation as small
import torch

from fedkola.errors import Incompatible
from fedkola.evaluation import oneshot, scoring
from fedkola.federation import initial_weights
from fedkola.knowledge import adaptation
from fedkola.knowledge import bank as banks
from fedkola.knowledge.bank import CellKind
from fedkola.training import adapters
from fedkola.types import Dataset

SETTINGS = (
    "algorithm.name=adapted",
    'knowledge.lanes=["analytic", "router"]',
    "knowledge.adapt_rank=2",
    "algorithm.exchanges=2",
)


def finished(folder: Path, *settings: str):
    federation = small.assemble(folder, *SETTINGS, *settings)
    return federation, small.run(federation)


def test_everything_is_summed_under_the_newest_base(tmp_path: Path):
    federation, state = finished(tmp_path, "knowledge.adapt_share=0")
    bases = {cell.about.recipe["base"] for cell in state.bank.cells}
    assert bases == {adaptation.digest(state.base)}
    assert any(bool(factor.any()) for factor in state.base.values())
    total = sum(len(data) for data in federation.stream.sites.values())
    assert banks.records(state.bank) == total == state.consolidated
    assert {cell.about.round for cell in state.bank.cells} == {3}
    assert oneshot.compare(federation, state).equal


def test_consolidation_waits_until_the_records_have_grown(tmp_path: Path):
    federation, state = finished(tmp_path, "knowledge.adapt_share=1000")
    # Once in the first round, never again; what came later is summed under that base.
    assert {cell.about.round for cell in state.bank.cells} == {1, 2, 3}
    assert state.consolidated < banks.records(state.bank)
    assert {cell.about.recipe["base"] for cell in state.bank.cells} == {
        adaptation.digest(state.base)
    }
    assert oneshot.compare(federation, state).equal


def test_a_site_that_was_away_is_summed_when_it_returns(tmp_path: Path):
    _, away = finished(tmp_path, "knowledge.adapt_share=0", "scenario.late={west=3}")
    assert banks.records(away.bank) == sum(len(data) for data in small.data().values())


def test_no_gram_is_sent_for_cells_that_are_summed_anew_at_once(tmp_path: Path):
    _, state = finished(tmp_path, "knowledge.adapt_share=0")
    revoked = [about.kind for about in state.bank.revoked]
    # Rounds 1 and 2 consolidated to one Gram each; round 3 sent no Gram before it consolidated.
    assert revoked.count(CellKind.SCATTER) == 2


def test_a_base_that_needs_less_is_summed_under_a_smaller_rank(tmp_path: Path):
    settings = ("knowledge.adapt_rank=4", "knowledge.adapt_energy=0.3", "run.rounds=1")
    federation, state = finished(tmp_path, *settings)
    ranks = {len(value) for name, value in state.base.items() if name.endswith("lora_A")}
    assert len(ranks) == 1
    assert max(ranks) < 4
    assert {cell.about.recipe["base"] for cell in state.bank.cells} == {
        adaptation.digest(state.base)
    }
    assert oneshot.compare(federation, state).equal


def test_an_adapter_and_module_slots_do_not_share_a_base(tmp_path: Path):
    with pytest.raises(Incompatible, match="lora"):
        small.assemble(tmp_path, "algorithm.name=adapted", 'knowledge.lanes=["analytic", "lora"]')


def test_summed_gradients_are_those_of_one_site_with_all_records(tmp_path: Path):
    federation = small.assemble(tmp_path, *SETTINGS)
    algorithm, sites = federation.algorithm, federation.sites
    union = small.assemble(
        tmp_path / "union", *SETTINGS, sites={"union": joined(small.data())}
    ).sites["union"]
    weights = initial_weights(federation) | adapters.weights_template(
        federation.foundation, rank=2, seed=1
    )
    nodes = federation.stream.catalogue.nodes(0)
    parts = [
        site.gradients(weights, site.knowledge.until(3), classes=nodes) for site in sites.values()
    ]
    whole = union.gradients(weights, union.knowledge.until(3), classes=nodes)
    for name, gradient in whole.items():
        torch.testing.assert_close(sum(p[name] for p in parts), gradient, rtol=1e-4, atol=1e-5)
    assert algorithm.exchanges == 2


def joined(sites: dict[str, Dataset]) -> Dataset:
    return Dataset(
        records=tuple(r for data in sites.values() for r in data.records),
        texts=tuple(t for data in sites.values() for t in data.texts),
        labels=tuple(c for data in sites.values() for c in data.labels),
        patients=tuple(p for data in sites.values() for p in data.patients),
        windows=tuple(w for data in sites.values() for w in data.windows),
    )


def test_answers_are_read_under_the_base_that_sums_were_made_under(tmp_path: Path):
    federation, state = finished(tmp_path, "knowledge.adapt_share=0", "knowledge.features=256")
    test = scoring.askable(federation.stream.test, 3)
    found = scoring.accuracy(federation, state, test, window=3)
    plain = small.assemble(tmp_path / "plain", "knowledge.features=256")
    before = scoring.accuracy(plain, small.run(plain), test, window=3)
    assert found.top1 > before.top1 - 0.1
    reader = scoring.reader(federation)
    z = federation.algorithm.embed(state.base, reader, test.texts)
    assert z.shape == (len(test), 2 * federation.foundation.width)
    assert torch.equal(z[:, : federation.foundation.width], reader.features(test.texts))


def test_the_federation_that_never_had_a_site_consolidates_to_the_same_bits(tmp_path: Path):
    sites = {name: data for name, data in small.data().items() if name != "west"}
    first = small.assemble(tmp_path / "a", *SETTINGS, "knowledge.adapt_share=0", sites=sites)
    again = small.assemble(tmp_path / "b", *SETTINGS, "knowledge.adapt_share=0", sites=sites)
    assert small.fingerprint(small.run(first)) == small.fingerprint(small.run(again))
