"""Forgetting: take what was asked for out of the last committed state, with a receipt.

A request is carried out at once where the data is public, else together with others, so that two
states of the bank do not show what a single site took back.
"""

import time
from collections.abc import Collection, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from typing import Any

from fedkola import wire
from fedkola.algorithms.fedkola import FedKoLa
from fedkola.algorithms.fedkola import State as BankState
from fedkola.client import Site
from fedkola.errors import ForgetIncomplete, KnowledgeError, UnknownCell
from fedkola.federation import Federation, load_state, settle_revision, sweep
from fedkola.knowledge import availability, forget, journal, membership
from fedkola.knowledge import bank as banks
from fedkola.knowledge.bank import CellKind, KnowledgeCell
from fedkola.knowledge.forget import (
    CellOutcome,
    Foreseen,
    ForgetReceipt,
    Part,
    Request,
    Waiting,
)
from fedkola.knowledge.journal import Place
from fedkola.knowledge.membership import Evidence
from fedkola.ledger import EventRow, Ledger
from fedkola.plan import Plan
from fedkola.types import Cohort

Given = Mapping[str, Mapping[Place, frozenset[str]]]
"""Site -> place -> ids of the records that it takes back there."""


def remove(
    federation: Federation,
    ledger: Ledger,
    request: Request,
    *,
    recount: bool = False,
    absent: bool = False,
) -> ForgetReceipt:
    """Carry out one request in the last committed state, now; see :func:`remove_together`.

    What the bank held before and holds afterwards differs by what one site had added: use it
    where the data is public or where that difference may be seen, else :func:`request_removal`.
    """
    return remove_together(federation, ledger, (request,), recount=recount, absent=absent)[0]


def remove_together(
    federation: Federation,
    ledger: Ledger,
    requests: Sequence[Request],
    *,
    recount: bool = False,
    absent: bool = False,
    released: Mapping[str, tuple[str, int]] | None = None,
) -> tuple[ForgetReceipt, ...]:
    """Forget in the last committed state what these requests name; a receipt for each of them.

    The sites accept the requests, every site of the roster answers the removal (zeros where it
    has nothing), the new integers are committed, and only then are the sites' own rows deleted.
    What was forgotten before gives the receipt it had. Raises UnknownCell if a request concerns
    nothing that was contributed, ForgetIncomplete if a site does not answer.

    ``recount`` also asks the remaining sites to sum their journals again and compares; it shows
    the difference of two sums, so it is for public data and for tests. ``absent`` removes a site
    that cannot answer any more: every cell it may have added to is dropped, and the others send
    their stored addends again. ``released`` tells the receipt why each request is carried out now
    and how many rounds it waited.
    """
    algorithm, name = _forgetting(federation), federation.plan.run.name
    if absent and [request.kind for request in requests] != ["site"]:
        raise KnowledgeError(
            "only a whole site can be removed while it is away; wait for its return"
        )
    finish(federation, ledger)
    done = _removed(federation, ledger)
    asked = [_addressed(federation, request) for request in requests]
    earlier = _earlier(federation, asked, done)
    new = {request.id: request for request in asked if earlier[request.id] is None}
    if new:
        state, number = load_state(federation, ledger)
        settle_revision(federation, state)
        if number == 0:
            raise UnknownCell(
                "no round is committed yet, so there is nothing to forget; run it first"
            )
        why = "public" if federation.plan.knowledge.public_reference else "operator"
        parts = tuple(
            Part(
                request=request.id,
                kind=request.kind,
                site=request.site,
                released=(released or {}).get(request.id, (why, 0))[0],
                waited=(released or {}).get(request.id, (why, 0))[1],
            )
            for request in new.values()
        )
        roster = _roster(federation, number, tuple(new.values()))
        removed, after = _subtract(
            federation, state, tuple(new.values()), roster, recount=recount, absent=absent
        )
        batch = forget.together(list(new))
        alone = len(parts) == 1
        receipt = replace(
            removed,
            request=batch,
            kind=parts[0].kind if alone else "batch",
            site=parts[0].site if alone else "",
            parts=parts,
        )
        document, tensors = wire.dump(after)
        written = forget.document(receipt)
        event = {"kind": "FORGET", "subject": batch, "body": written}
        ledger.amend(
            name,
            number,
            state=document,
            tensors=tensors,
            events=(*algorithm.events(state, after), event),
            removal={**written, "scope": {"request": batch}},
            now=time.time(),
        )
        _settle(federation, tuple(new.values()), batch)
        ledger.purge(name, now=time.time())
        sweep(federation, after)
        earlier |= {request: receipt.of(request) for request in new}
    # A request under which nothing was left may still wait at its site.
    _settle(federation, [r for r in asked if r.id not in new], "")
    return tuple(found for r in asked if (found := earlier[r.id]) is not None)


def request_removal(
    federation: Federation, ledger: Ledger, request: Request
) -> ForgetReceipt | Waiting:
    """Accept a request, and carry it out once its difference is one of enough sites.

    It is carried out with others as soon as every cell concerned gives back to
    ``knowledge.removal_batch`` sites (0: k_min) together, or after ``knowledge.removal_wait``
    rounds on its own; at once where the data is public. From now on its records are not
    contributed any more. Raises what :func:`remove_together` does, but for ForgetIncomplete.
    """
    if federation.plan.knowledge.public_reference:
        return remove(federation, ledger, request)
    _forgetting(federation)
    finish(federation, ledger)
    asked = _addressed(federation, request)
    done = _removed(federation, ledger)
    if (earlier := _earlier(federation, (asked,), done)[asked.id]) is not None:
        return earlier
    _, number = load_state(federation, ledger)
    _accept(federation, (asked,))
    if asked.id not in {event.subject for event in _requested(federation, ledger)}:
        body = {"kind": asked.kind, "site": asked.site}
        event = {"kind": "REQUEST", "subject": asked.id, "body": body}
        ledger.append(federation.plan.run.name, number, [event], now=time.time())
    _release(federation, ledger, number)
    if asked.id in (done := _removed(federation, ledger)):
        return done[asked.id]
    return next(w for w in waiting(federation, ledger) if w.request == asked.id)


def waiting(federation: Federation, ledger: Ledger) -> tuple[Waiting, ...]:
    """Accepted requests that wait for others, oldest first."""
    held = _held(federation, ledger)
    _, lacking = forget.ripe(
        {name: _places(federation, (request,)) for name, (request, _) in held.items()},
        least=_batch_of(federation.plan),
    )
    return tuple(
        Waiting(
            request=name,
            kind=request.kind,
            site=request.site,
            since=since,
            until=since + federation.plan.knowledge.removal_wait,
            lacking=lacking.get(name, 0),
        )
        for name, (request, since) in held.items()
    )


def foresee(federation: Federation, ledger: Ledger, request: Request) -> tuple[Foreseen, ...]:
    """The cells that a request concerns, with class and cost; nothing is accepted or changed.

    Raises UnknownCell if nobody has a record under it.
    """
    asked = _addressed(federation, request)
    state, _ = load_state(federation, ledger)
    algorithm = _forgetting(federation).on(state.base)
    given = _given(federation, (asked,))
    roster = _roster(federation, state.number, (asked,))
    touched = {place for own in given.values() for place in own}
    grams = [cell.about for cell in banks.of_kind(state.bank, CellKind.SCATTER)]
    found = []
    for about in (*_concerned(state, given), *grams):
        places = _places_of(state, about)
        if places.isdisjoint(touched):
            continue
        sites = [name for name in given if not places.isdisjoint(given[name])]
        whole = _whole(federation, given, places)
        outcome = forget.classify(about.kind, whole=whole, adapted=bool(state.base))
        members = [name for name in roster if name in about.cohort]
        found.append(
            Foreseen(
                cell=about.id,
                module=about.module,
                kind=about.kind.value,
                round=about.round,
                outcome=outcome,
                records=sum(len(given[s][at]) for s in sites for at in given[s].keys() & places),
                sites=len(sites),
                asked=len(members),
                bytes_up=len(members) * algorithm.addend_bytes(about),
                retrained=len(sites) if outcome == "E2" else 0,
            )
        )
    return tuple(found)


def accept(
    federation: Federation, state: BankState, requests: Sequence[Request]
) -> tuple[list[str], Cohort, str]:
    """Accept requests without carrying them out: the cells they concern, the sites that stay, and
    the text under which these sum their journals without the records concerned."""
    asked = [_addressed(federation, request) for request in requests]
    given = _accept(federation, asked)
    leaving = {request.site for request in asked if request.kind == "site"}
    staying = tuple(name for name in federation.clients.roster() if name not in leaving)
    names = [about.id for about in _concerned(state, given)]
    return names, staying, "+".join(sorted(request.id for request in asked))


def due(federation: Federation, ledger: Ledger, state: Any, number: int, *, last: bool) -> Any:
    """Carry out removals of sites that left up to this round, and requests that need not wait."""
    if not number or not isinstance(federation.algorithm, FedKoLa):
        return state
    before = set(_removed(federation, ledger))
    held = set(_held(federation, ledger))
    for site, until in sorted(federation.plan.scenario.leave.items()):
        request = Request(kind="site", site=site)
        if until > number or request.id in before | held:
            continue
        # A site that left before anything of it was sealed has nothing to take back.
        with suppress(UnknownCell):
            if federation.plan.knowledge.public_reference:
                remove(federation, ledger, request, recount=True)
            else:
                request_removal(federation, ledger, request)
    _release(federation, ledger, number, last=last)
    changed = set(_removed(federation, ledger)) != before
    return load_state(federation, ledger)[0] if changed else state


def finish(federation: Federation, ledger: Ledger) -> None:
    """Settle and purge what was committed when the process was killed before it could do so."""
    done = _removed(federation, ledger)
    for site in federation.sites.values():
        for request in forget.posted(site.store):
            if request.id in done:
                parts = done[request.id].parts
                site.settle(request, batch=forget.together([part.request for part in parts]))
    if done:
        ledger.purge(federation.plan.run.name, now=time.time())
    sweep(federation, load_state(federation, ledger)[0])


# --- private --------------------------------------------------------------------------------------


def _subtract(
    federation: Federation,
    state: BankState,
    requests: Sequence[Request],
    roster: Cohort,
    *,
    recount: bool,
    absent: bool,
) -> tuple[ForgetReceipt, BankState]:
    """The state after a removal, and its receipt but for who asked."""
    began = time.perf_counter()
    algorithm, clients = _forgetting(federation).on(state.base), federation.clients
    leaving = {request.site for request in requests if request.kind == "site"}
    staying = tuple(name for name in roster if name not in leaving)
    request = "+".join(sorted(r.id for r in requests))
    given = {} if absent else _given(federation, requests)
    if absent:
        away = requests[0].site
        names = [about.id for about in _parts(state) if away in about.cohort]
        if not names:
            raise UnknownCell(f"site {away} was asked for none of the live cells")
        forget.post(federation.sites[away].store, *requests)
        ask, cohort = algorithm.refill, staying
    else:
        names = [about.id for about in _concerned(state, given)]
        _accept(federation, requests)
        ask, cohort = algorithm.remove, roster
    after, before, records = ask(state, names, request, cohort, clients, leavers=sorted(leaving))
    after = _closed(after, requests)
    if state.base:
        # Nothing has been consolidated, so the next round does it, without these records.
        after = replace(after, consolidated=0)
    same = None
    if recount:
        names = [cell.about.id for cell in before]
        same = algorithm.recount(after, names, request, staying, clients)
    after = algorithm.calibrate(after, staying, clients)
    live = {cell.about.id: cell.about for cell in after.bank.cells}
    outcomes = []
    for cell in before:
        places = _places_of(state, cell.about)
        whole = _whole(federation, given, places)
        outcomes.append(
            CellOutcome(
                cell=cell.about.id,
                module=cell.about.module,
                kind=cell.about.kind.value,
                outcome=forget.classify(
                    cell.about.kind, whole=whole, absent=absent, adapted=bool(state.base)
                ),
                before=cell.about.words,
                after=live[cell.about.id].words if cell.about.id in live else "revoked",
                sites=sum(not places.isdisjoint(own) for own in given.values()),
            )
        )
    k_min = federation.plan.knowledge.k_min
    kept = [live[cell.cell] for cell in outcomes if cell.cell in live]
    receipt = ForgetReceipt(
        request="",
        kind="",
        site="",
        records=records,
        cells=tuple(outcomes),
        view_before=algorithm.view(state).id if state.bank.cells else "",
        view_after=algorithm.view(after).id if after.bank.cells else "",
        recount=same,
        seconds=time.perf_counter() - began,
        floors={
            "sites": all(about.contributors >= k_min for about in kept),
            "records": all(about.records >= algorithm.floor(about.kind) for about in kept),
            "difference": all(cell.sites >= k_min for cell in outcomes),
        },
        residual=_residual(federation, algorithm, state, after, request, roster),
        not_covered=forget.NOT_COVERED + ((forget.BASE,) if state.base else ()),
    )
    clients.tally()
    return receipt, after


def _residual(
    federation: Federation,
    algorithm: FedKoLa,
    before: BankState,
    after: BankState,
    request: str,
    roster: Cohort,
) -> Evidence | None:
    """What the views before and after tell of the forgotten records; None without a control: no
    records held out, too few of either, or nothing left to ask."""
    if not federation.plan.knowledge.held_out or not after.bank.cells:
        return None
    # The whole view is for those who may hold the whole bank.
    asked = tuple(name for name in roster if banks.held(after.bank, name) is None)
    view = algorithm.view(after)
    if not asked or view.head is None:
        return None
    codes = view.head.nodes[0]
    found = [
        algorithm.residual(state, codes, request, asked, federation.clients)
        for state in (before, after)
    ]
    return membership.evidence(*found)


def _forgetting(federation: Federation) -> FedKoLa:
    algorithm = federation.algorithm
    if not isinstance(algorithm, FedKoLa):
        raise KnowledgeError(
            f"{federation.plan.algorithm.name} keeps no cells, so nothing can be subtracted; only "
            "fedkola can forget without training again"
        )
    return algorithm


def _addressed(federation: Federation, request: Request) -> Request:
    """The request, checked and named under the key of its site."""
    checked = forget.checked(request, federation.sites)
    return forget.keyed(federation.sites[checked.site].store, checked) if checked.site else checked


def _earlier(
    federation: Federation, requests: Sequence[Request], done: Mapping[str, ForgetReceipt]
) -> dict[str, ForgetReceipt | None]:
    """By request, the receipt under which all that it concerns was forgotten already, or None."""
    found: dict[str, ForgetReceipt | None] = {r.id: done.get(r.id) for r in requests}
    for name, site in federation.sites.items():
        own = [r for r in requests if r.site == name and found[r.id] is None]
        for request, places in zip(own, site.concerned(*own) if own else (), strict=True):
            other = None if places else site.forgotten(request)
            found[request.id] = done.get(other.id) if other else None
    return {name: held and replace(held, already=True) for name, held in found.items()}


def _given(federation: Federation, requests: Sequence[Request]) -> Given:
    """What every site takes back, nothing where records still wait for their cell; raises
    UnknownCell if nobody has a record under a request."""
    given: dict[str, dict[Place, frozenset[str]]] = {}
    met: set[str] = set()
    for name, site in federation.sites.items():
        mine = [request for request in requests if request.site in ("", name)]
        for request, places in zip(mine, site.concerned(*mine), strict=True):
            for place, records in places.items():
                met.add(request.id)
                own = given.setdefault(name, {})
                own[place] = own.get(place, frozenset()) | records
    for request in requests:
        if request.id not in met and not any(s.holds(request) for s in federation.sites.values()):
            who = f"site {request.site}" if request.site else "every site"
            raise UnknownCell(
                f"{who} has no record for {request.subject}; check the identifier as it stands in "
                "the sites' data"
            )
    return given


def _accept(federation: Federation, requests: Sequence[Request]) -> Given:
    given = _given(federation, requests)
    for name, site in federation.sites.items():
        mine = [r for r, found in _mine(site, name, requests) if found or site.holds(r)]
        if mine:
            site.post(*mine)
    return given


def _mine(
    site: Site, name: str, requests: Sequence[Request]
) -> list[tuple[Request, Mapping[Place, frozenset[str]]]]:
    own = [request for request in requests if request.site in ("", name)]
    return list(zip(own, site.concerned(*own), strict=True))


def _places(federation: Federation, requests: Sequence[Request]) -> dict[Place, set[str]]:
    """Which sites take something back where."""
    places: dict[Place, set[str]] = {}
    for name, site in federation.sites.items():
        for _, found in _mine(site, name, requests):
            for place in found:
                places.setdefault(place, set()).add(name)
    return places


def _place(about: KnowledgeCell) -> Place:
    return about.round, banks.scope(about)


def _places_of(state: BankState, about: KnowledgeCell) -> set[Place]:
    """Where the records that a cell sums stand in journals."""
    if about.kind is not CellKind.SCATTER:
        return {_place(about)}
    sealed = {origin.id: origin for origin in banks.origins(state.bank)}
    sums = {cell.about.id: cell.about.sources for cell in state.bank.cells}
    names = [part for name in about.covers for part in sums.get(name) or (name,)]
    return {_place(sealed[name]) for name in names if name in sealed}


def _parts(state: BankState) -> list[KnowledgeCell]:
    """Cells of one place as they were sealed, wherever their integers are now."""
    every = banks.origins(state.bank)
    return [about for about in every if about.kind is not CellKind.SCATTER]


def _concerned(state: BankState, given: Given) -> list[KnowledgeCell]:
    """Cells that a site which takes something back was asked for."""
    return [
        about
        for about in _parts(state)
        if any(_place(about) in places and name in about.cohort for name, places in given.items())
    ]


def _whole(federation: Federation, given: Given, places: Collection[Place]) -> bool:
    """Whether every site that takes something back here takes back all it added."""
    for name, own in given.items():
        for place in own.keys() & places:
            entry = journal.read(federation.sites[name].store, *place)
            if entry is None or not own[place] >= set(entry.records):
                return False
    return True


def _roster(federation: Federation, number: int, requests: Sequence[Request]) -> Cohort:
    """Sites that can answer a removal: those that are there, and those that it is about."""
    scenario, roster = federation.plan.scenario, federation.clients.roster()
    there = availability.cohort(
        roster, size=0, seed=0, round=number, late=scenario.late, left=scenario.gone
    )
    about = {request.site for request in requests}
    return tuple(name for name in roster if name in there or name in about)


def _closed(state: BankState, requests: Sequence[Request]) -> BankState:
    """Labels and modules that were forgotten everywhere are retired, where they were opened."""
    bank, number = state.bank, state.number
    opened = {entry.code for entry in bank.labels}
    for request in requests:
        if request.kind == "label" and not request.site and request.name in opened:
            bank = banks.retire(bank, request.name, valid_to=float(number))
        if request.kind == "module" and not request.site:
            for module in [m.id for m in bank.modules if m.scope == request.name]:
                bank = banks.retire_module(bank, module, round=number)
    return replace(state, bank=bank)


def _settle(federation: Federation, requests: Sequence[Request], batch: str) -> None:
    for name, site in federation.sites.items():
        held = {request.id for request in forget.posted(site.store)}
        mine = [r for r in requests if r.site in ("", name) and r.id in held]
        if mine:
            site.settle(*mine, batch=batch)


def _release(federation: Federation, ledger: Ledger, number: int, *, last: bool = False) -> None:
    """Carry out, together, the waiting requests that are enough or have waited long enough.

    When a run ends (``last``) no later round can release a request, so none is left waiting.
    """
    held = _held(federation, ledger)
    if not held:
        return
    wanted = {name: _places(federation, (request,)) for name, (request, _) in held.items()}
    enough, _ = forget.ripe(wanted, least=_batch_of(federation.plan))
    longest = federation.plan.knowledge.removal_wait
    released = {
        name: ("batch" if name in enough else "wait", number - since)
        for name, (_, since) in held.items()
        if last or name in enough or number - since >= longest
    }
    chosen = [held[name][0] for name in released]
    if chosen:
        # A site that does not answer now is asked again after the next round.
        with suppress(ForgetIncomplete):
            remove_together(federation, ledger, chosen, released=released)


def _held(federation: Federation, ledger: Ledger) -> dict[str, tuple[Request, int]]:
    """Requests that wait, by id, with the round in which they were made."""
    since = {event.subject: event.round for event in _requested(federation, ledger)}
    done = _removed(federation, ledger)
    found: dict[str, tuple[Request, int]] = {}
    for site in federation.sites.values():
        for request in forget.posted(site.store):
            if request.id in since and request.id not in done:
                found[request.id] = (request, since[request.id])
    return dict(sorted(found.items(), key=lambda item: (item[1][1], item[0])))


def _requested(federation: Federation, ledger: Ledger) -> list[EventRow]:
    name = federation.plan.run.name
    return [event for event in ledger.events(name) if event.kind == "REQUEST"]


def _batch_of(plan: Plan) -> int:
    return plan.knowledge.removal_batch or plan.knowledge.k_min


def _removed(federation: Federation, ledger: Ledger) -> dict[str, ForgetReceipt]:
    """Receipts of the removals that are committed, by request."""
    rows = ledger.removals(federation.plan.run.name)
    receipts = [forget.receipt_from(row["receipt"]) for row in rows]
    return {part.request: r.of(part.request) for r in receipts for part in r.parts}
