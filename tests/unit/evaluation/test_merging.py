"""Two runs that grew apart become one folder that answers, forgets and tells its past."""

import json
import shutil
from pathlib import Path

import pytest
import small_federation as small

from fedkola import removal
from fedkola.errors import Incompatible, KnowledgeError, LedgerError
from fedkola.evaluation import lineage, merging
from fedkola.federation import Federation, load_state
from fedkola.knowledge import bank as banks
from fedkola.knowledge.bank import CellKind
from fedkola.knowledge.forget import Request
from fedkola.ledger import Ledger

FAST = ('knowledge.lanes=["analytic", "router"]', "knowledge.features=16", "knowledge.hot_cells=9")


def forgotten(federation: Federation, patient: str) -> bool | None:
    with Ledger.open(federation.folder) as ledger:
        request = Request(kind="patient", site="north", name=patient)
        return removal.remove(federation, ledger, request, recount=True).recount


def rows(state) -> dict[str, str]:  # type: ignore[no-untyped-def]
    """The integers of every cell but the Grams, which a merge names anew."""
    kept = [a for a in banks.origins(state.bank) if a.kind is not CellKind.SCATTER]
    return {about.id: about.words for about in kept}


def test_a_run_that_forgot_and_a_run_that_learnt_more_merge_to_one_that_did_both(tmp_path: Path):
    left, right, both = (tmp_path / name for name in ("left", "right", "both"))
    trunk = small.assemble(left, *FAST, rounds=2)
    small.run(trunk)
    shutil.copytree(left, right)
    small.run(small.assemble(right, *FAST, rounds=3))
    assert forgotten(trunk, "north-p3")
    third = small.assemble(right, *FAST, rounds=3)
    state = merging.merge_runs(
        left, right, both, stream=third.stream, foundation=small.foundation()
    )
    single = small.assemble(tmp_path / "single", *FAST, rounds=3)
    small.run(single)
    forgotten(single, "north-p3")
    with Ledger.open(single.folder) as ledger:
        assert rows(state) == rows(load_state(single, ledger)[0])
    assert state.calibration.records > 0
    merged = small.assemble(both, *FAST, "run.name=both", rounds=3)
    with Ledger.open(both) as ledger:
        events = ledger.events("both")
        assert ledger.verify("both") == events[-1].hash
        loaded, number = load_state(merged, ledger)
    assert (number, small.fingerprint(loaded)) == (3, small.fingerprint(state))
    told = [(e.kind, e.subject, e.body) for e in events]
    assert banks.fold(told) == json.loads(json.dumps(banks.metadata(state.bank)))
    assert [m["id"] for m in lineage.as_of(events, round=1)["modules"]] == ["heart@1"]
    # The sites of the merged run hold what its cells rest on: a further removal is exact.
    assert forgotten(merged, "north-p4")


def test_runs_that_do_not_belong_together_are_not_merged(tmp_path: Path):
    left, right = tmp_path / "left", tmp_path / "right"
    first = small.assemble(left, *FAST, rounds=1)
    small.run(first)
    sites = small.without(small.data(), "north", patients=("north-p0",))
    small.run(small.assemble(right, *FAST, sites=sites, rounds=1))
    given = {"stream": first.stream, "foundation": small.foundation()}
    with pytest.raises(KnowledgeError, match="neither replaced the other"):
        merging.merge_runs(left, right, tmp_path / "both", **given)
    other = small.assemble(tmp_path / "other", *FAST, "task.windows=5", rounds=1)
    small.run(other)
    with pytest.raises(Incompatible, match=r"different \[task\] sections"):
        merging.merge_runs(left, tmp_path / "other", tmp_path / "both", **given)
    with pytest.raises(LedgerError, match="is not empty"):
        merging.merge_runs(left, right, left, **given)
    local = small.assemble(tmp_path / "local", *FAST, "algorithm.name=local", rounds=1)
    small.run(local)
    with pytest.raises(KnowledgeError, match="used local; only banks of fedkola merge"):
        merging.merge_runs(left, tmp_path / "local", tmp_path / "both", **given)
