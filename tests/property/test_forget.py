"""Whatever is removed, in whatever order, the bank is the one that never had it."""

import tempfile
from pathlib import Path

import small_federation as small
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fedkola import removal
from fedkola.federation import load_state
from fedkola.knowledge.forget import Request
from fedkola.ledger import Ledger

FAST = ('knowledge.lanes=["analytic", "router"]', "knowledge.features=16")


def view_and_cells(folder: Path, sites: small.Data, requests: list[Request]):
    federation = small.assemble(folder, *FAST, sites=sites)
    state = small.run(federation)
    with Ledger.open(folder) as ledger:
        for request in requests:
            receipt = removal.remove(federation, ledger, request, recount=True)
            assert receipt.recount is True
        state, _ = load_state(federation, ledger)
        ledger.verify("small")
    return federation.algorithm.view(state).id, small.cells(state), state


patients = st.tuples(st.sampled_from(small.SITES), st.integers(0, 6))


@given(chosen=st.lists(patients, min_size=1, max_size=3, unique=True))
@settings(max_examples=4, deadline=None)
def test_removing_patients_of_any_sites_equals_never_having_had_them(chosen):
    torch.set_num_threads(1)
    requests = [Request(kind="patient", site=s, name=f"{s}-p{n}") for s, n in chosen]
    never = small.data()
    for request in requests:
        never = small.without(never, request.site, patients=(request.name,))
    with tempfile.TemporaryDirectory() as one, tempfile.TemporaryDirectory() as other:
        removed = view_and_cells(Path(one), small.data(), requests)
        clean = view_and_cells(Path(other), never, [])
    assert removed[:2] == clean[:2]
    assert removed[2].calibration == clean[2].calibration
