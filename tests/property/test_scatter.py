"""Rounds and removals in any order: every sum is over what is left, and covered at most once."""

import tempfile
from collections import Counter
from pathlib import Path

import small_federation as small
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fedkola.algorithms.fedkola import FedKoLa, State
from fedkola.errors import UnknownCell
from fedkola.evaluation import oneshot
from fedkola.federation import Federation, settle_revision
from fedkola.knowledge import bank as banks
from fedkola.knowledge.bank import CellKind
from fedkola.knowledge.forget import Request

FAST = ('knowledge.lanes=["analytic"]', "knowledge.features=8")
cohorts = st.just(list(small.SITES)) | st.lists(
    st.sampled_from(small.SITES), min_size=3, unique=True
)
removals = st.builds(
    Request,
    kind=st.sampled_from(["site", "patient", "record"]),
    site=st.sampled_from(small.SITES),
    name=st.integers(0, 29).map(str),
)


def named(request: Request) -> Request:
    """The request for a patient or record that the small federation may hold."""
    number = int(request.name)
    names = {
        "site": "",
        "patient": f"{request.site}-p{number % 7}",
        "record": f"{request.site}-{number}",
    }
    return Request(kind=request.kind, site=request.site, name=names[request.kind], key="00" * 32)


def data() -> dict[str, small.Dataset]:
    """Five sites hold heart, four lung, three bone; some records arrive anew.

    So a cell may be revoked while the Gram over it stands.
    """
    lacks = {"north": ("bone",), "south": ("bone", "lung")}
    found = {}
    for site, whole in small.revised(small.data()).items():
        scopes = [label.split("-")[0] for label in whole.labels]
        kept = [i for i, scope in enumerate(scopes) if scope not in lacks.get(site, ())]
        found[site] = whole.take(kept)
    return found


def removed(federation: Federation, state: State, request: Request, cohort: list[str]) -> State:
    """The state without what is requested; only some of the other sites are there to be asked."""
    method, site = federation.algorithm, federation.sites[request.site]
    assert isinstance(method, FedKoLa)
    try:
        places = site.post(request)
    except UnknownCell:
        return state
    cells = [
        cell.about.id
        for cell in state.bank.cells
        if (cell.about.round, banks.scope(cell.about)) in places
        and request.site in cell.about.cohort
    ]
    asked = tuple(name for name in small.SITES if name in cohort or name == request.site)
    leavers = (request.site,) if request.kind == "site" else ()
    after, _, _ = method.remove(
        state, cells, request.id, asked, federation.clients, leavers=leavers
    )
    site.settle(request)
    return after


def check(federation: Federation, state: State) -> None:
    if not state.bank.cells:
        return
    live = {cell.about.id for cell in state.bank.cells}
    times = Counter(c for cell in state.bank.cells for c in cell.about.covers)
    assert set(times) <= live
    assert set(times.values()) <= {1}
    for scatter in banks.select(state.bank, CellKind.SCATTER):
        under = banks.covered(state.bank, scatter.about)
        assert scatter.about.records == sum(cell.about.records for cell in under)
        assert scatter.about.contributors >= 3
    assert oneshot.compare(federation, state).equal


@given(
    steps=st.lists(st.tuples(cohorts, st.none() | removals), min_size=2, max_size=5),
    share=st.sampled_from([0.0, 0.5, 1.0]),
    every=st.sampled_from([0, 2]),
)
@settings(max_examples=12, deadline=None)
def test_after_any_rounds_and_removals_every_sum_is_over_exactly_what_is_left(steps, share, every):
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        schedule = (f"knowledge.scatter_share={share}", f"knowledge.scatter_every={every}")
        settings = (*FAST, *schedule)
        federation = small.assemble(Path(folder), *settings, sites=data())
        state, gone = federation.algorithm.start({}), set()
        for number, (present, request) in enumerate(steps, start=1):
            cohort = tuple(site for site in small.SITES if site in present and site not in gone)
            if len(cohort) >= 3:
                state = federation.algorithm.round(number, state, cohort, federation.clients)
                settle_revision(federation, state)
                check(federation, state)
            if request and request.site not in gone:
                state = removed(federation, state, named(request), present)
                check(federation, state)
                gone |= {request.site} if request.kind == "site" else set()
        cohort = tuple(site for site in small.SITES if site not in gone)
        if len(cohort) >= 3:
            state = federation.algorithm.round(9, state, cohort, federation.clients)
            settle_revision(federation, state)
            assert state.revision.waiting == 0
            check(federation, state)
