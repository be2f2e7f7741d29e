"""Taking back from cells: what a request or a newer version makes sites subtract, and its checks.

server:  cell <- cell + sum of (new - old addend)              withdraw
         cell <- sum of what the sites that are there added    refill, recount, collect
         counted margins of forgotten and never-seen records   residual
client:  stored embeddings are summed again and subtracted; a LoRA factor is retrained without the
         records, and the difference to its receipt is sent

Every site that answered when a cell was filled is asked, with zeros from those that lose nothing.
"""

import json
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from fedkola import wire
from fedkola.algorithms import modules, questions
from fedkola.algorithms.ask import ask
from fedkola.algorithms.questions import Loss, about_cell, addend
from fedkola.algorithms.state import Revision
from fedkola.errors import ForgetIncomplete
from fedkola.knowledge import adaptation, compact, forget, journal, membership, statistics, views
from fedkola.knowledge import bank as banks
from fedkola.knowledge.bank import Bank, Cell, CellKind, KnowledgeCell, Status
from fedkola.knowledge.journal import Place
from fedkola.knowledge.terms import Recipe, Terms, floor
from fedkola.knowledge.views import View
from fedkola.types import Aggregate, Broadcast, Catalogue, Client, Clients, Cohort, Update

PURGED = "purged"
"""Stands in place of a removal request where a purged cell is summed again."""

# --- server half ----------------------------------------------------------------------------------


def concerned(bank: Bank, names: Sequence[str]) -> list[Cell]:
    """These cells, then the scatter cells that cover them."""
    return [banks.find(bank, name) for name in names] + list(banks.covering(bank, names))


def revisable(
    terms: Terms, bank: Bank, votes: Aggregate
) -> tuple[Revision, tuple[tuple[int, int], ...]]:
    """The old versions that can be taken back in a round, and their places.

    Unless the data is declared public, old versions in one place stay until k_min sites have some:
    the difference of the two sums would show those of a single site. Those in a cell that was
    purged from cold storage stay while a site that filled it is away.
    """
    stale, holders = votes.words["stale"].tolist(), votes.words["stale_holders"].tolist()
    enough = 1 if terms.public_reference else terms.k_min
    sealed, scopes = list(questions.sealed(terms.catalogue, bank)), terms.catalogue.scopes()
    away = _out_of_reach(terms.catalogue, bank, votes.cohort)
    chosen = [
        i
        for i, place in enumerate(sealed)
        if stale[i] and holders[i] >= enough and place not in away
    ]
    places = tuple(sealed[i] for i in chosen)
    records = sum(stale[i] for i in chosen)
    found = Revision(
        sites=votes.cohort if places else (),
        places=tuple((round, scopes[scope]) for round, scope in places),
        records=records,
        waiting=sum(stale) - records,
        repeats=int(votes.words["repeats"]),
    )
    return found, places


def withdraw(
    terms: Terms, bank: Bank, cells: Sequence[Cell], loss: Loss, cohort: Cohort, clients: Clients
) -> tuple[Bank, frozenset[str]]:
    """The bank after these cells lost what they must, and the sites that did not answer.

    Scatter cells come last. What remaining sites put into a cell that is revoked waits for the next
    one, so it leaves the Gram too. If one of these sites is not asked, the Gram is revoked: the
    next one sums it again. Raises ForgetIncomplete for a negative count.
    """
    before = bank
    for cell in cells:
        about, live = cell.about, {held.about.id for held in bank.cells}
        under = [held.about for held in banks.covered(before, about)]
        revoked = [held for held in under if held.id not in live]
        if any(not set(held.cohort) <= set(cohort) for held in revoked):
            bank = banks.revoke(bank, about.id)
            continue
        asked = about_cell(
            terms,
            "revise" if loss.number else "remove",
            about,
            questions.places(terms.catalogue, before, about),
            loss=loss,
            whole=[questions.place(terms.catalogue, held) for held in revoked],
        )
        members = tuple(site for site in cohort if site in about.cohort)
        delta = clients.sum(members, replace(asked, weightless=True))
        if delta.cohort != members:
            return before, frozenset(members) - frozenset(delta.cohort)
        total = wire.add(cell.total, replace(delta, grid=cell.total.grid))
        counts = total.words.get(statistics.COUNTS, total.words[wire.WEIGHT])
        if int(counts.min()) < 0:
            raise ForgetIncomplete(
                f"cell {about.id} would hold a negative count; a journal does not match its "
                "contribution, nothing was changed"
            )
        covers = tuple(held.id for held in under if held.id in live)
        bank = _left(terms, bank, cell, total, covers)
    return bank, frozenset()


def refill(
    terms: Terms, bank: Bank, cells: Sequence[Cell], request: str, cohort: Cohort, clients: Clients
) -> Bank:
    """The bank with these cells dropped and summed once more by the sites of this cohort, but for
    what the requests concern. Raises ForgetIncomplete if one of them does not answer."""
    for cell in cells:
        live = {held.about.id for held in bank.cells}
        covers = tuple(name for name in cell.about.covers if name in live)
        if cell.about.covers and not covers:
            bank = banks.revoke(bank, cell.about.id)
            continue
        members = tuple(site for site in cohort if site in cell.about.cohort)
        total = _again(terms, bank, replace(cell.about, covers=covers), request, members, clients)
        if total.cohort != members:
            raise ForgetIncomplete(
                f"{sorted(set(members) - set(total.cohort))} did not send a cell again; "
                "nothing was changed, ask again when they are back"
            )
        bank = _left(terms, bank, cell, replace(total, grid=cell.total.grid), covers)
    return bank


def recount(
    terms: Terms, bank: Bank, names: Sequence[str], request: str, cohort: Cohort, clients: Clients
) -> bool:
    """Whether the journals of these sites, summed again, give the live cells' exact integers."""
    live = {cell.about.id: cell for cell in bank.cells}
    for name in names:
        if name in live:
            about = live[name].about
            members = tuple(site for site in cohort if site in about.cohort)
            again = _again(terms, bank, about, request, members, clients)
            if banks.content(about.labels, again) != about.words:
                return False
    return True


def collect(
    terms: Terms, bank: Bank, cohort: Cohort, clients: Clients, about: KnowledgeCell
) -> Cell:
    """A cell that was purged from the archive, summed again by every site that filled it.

    It shows nothing new: it is the very sum that was sealed, which its hash proves. Raises
    ForgetIncomplete if a site is away or a journal does not give the same integers.
    """
    members = tuple(site for site in cohort if site in about.cohort)
    away = sorted(set(about.cohort) - set(members))
    if not away:
        again = _again(terms, bank, about, PURGED, members, clients)
        away = sorted(set(members) - set(again.cohort))
        if not away and banks.content(about.labels, again) == about.words:
            places = questions.places(terms.catalogue, bank, about)
            grid = about_cell(terms, "fill", about, places).grid
            return Cell(about=about, total=replace(again, grid=grid))
    why = f"{away} do not answer" if away else "their journals give other integers"
    raise ForgetIncomplete(
        f"cell {about.id} of {about.module}, round {about.round}, was purged from the archive "
        f"and cannot be summed again: {why}; nothing was changed, ask again when they are "
        "back, or forget the whole module"
    )


def residual(
    terms: Terms,
    view: View,
    number: int,
    codes: Sequence[str],
    request: str,
    cohort: Cohort,
    clients: Clients,
) -> Tensor:
    """Counts (GROUPS, BINS) of the margins by which a view scores the records that requests
    concern, beside never-seen ones of the same sites, on the labels ``codes``."""
    position = {code: i for i, code in enumerate(terms.catalogue.codes())}
    document, tensors = views.to_tensors(view)
    tensors |= {
        "about": questions.as_bytes(json.dumps(document)),
        "labels": torch.tensor([position[code] for code in codes], dtype=torch.int64),
        "request": questions.as_bytes(request),
        **adaptation.carried(terms.factors),
    }
    asked = ask(terms.spec, "residual", number, tensors, word=32, scale={"margins": 0})
    # The weight counts forgotten records; beside them a site counts those it never gave.
    asked = replace(asked, weightless=True)
    return clients.sum(cohort, asked).words["margins"].to(torch.int64)


def _out_of_reach(catalogue: Catalogue, bank: Bank, cohort: Cohort) -> set[tuple[int, int]]:
    """Places of cells that cannot be changed: of what was purged with them, a site is away."""
    lost = {
        about.id
        for about in bank.cold
        if about.status is Status.PURGED and not set(about.cohort) <= set(cohort)
    }
    if not lost:
        return set()
    return {
        questions.place(catalogue, about)
        for about in banks.origins(bank)
        if about.kind is not CellKind.SCATTER and lost & set(compact.needed(bank, [about.id]))
    }


def _left(terms: Terms, bank: Bank, cell: Cell, total: Aggregate, covers: tuple[str, ...]) -> Bank:
    return banks.withdraw(
        bank,
        cell.about.id,
        total,
        records=int(total.words[wire.WEIGHT]),
        contributors=int(total.words[wire.METRIC + "contributors"]),
        k_min=terms.k_min,
        floor=floor(terms, cell.about.kind),
        covers=covers,
    )


def _again(
    terms: Terms,
    bank: Bank,
    about: KnowledgeCell,
    request: str,
    members: Cohort,
    clients: Clients,
) -> Aggregate:
    places = questions.places(terms.catalogue, bank, about)
    asked = about_cell(terms, "recount", about, places, loss=Loss(request=request))
    return clients.sum(members, asked)


# --- client half ----------------------------------------------------------------------------------


def start_over(client: Client, asked: Broadcast) -> None:
    """Forget the journal of attempts that were never sealed with this site's addend, and LoRA
    factors retrained for a revision that never came about."""
    mine = asked.tensors["members"][:, asked.cohort.index(client.name)]
    scopes = client.catalogue.scopes()
    sealed = {(round, scopes[scope]) for round, scope in asked.tensors["sealed"][mine].tolist()}
    journal.reconcile(client.store, sealed, round=asked.round)
    modules.drop_drafts(client.store)


def subtract(recipe: Recipe, client: Client, asked: Broadcast) -> Update:
    """New minus old addend of one cell; zeros where nothing is to be taken back."""
    entries, gone = questions.entries(client, asked), _gone(client, asked)
    lost = [journal.only(e, records=gone[at]) for at, e in entries.items() if at in gone]
    if not any(len(entry) for entry in lost):
        return addend(recipe, client, asked, [])
    rest = [journal.keep(e, without=gone.get(at, ())) for at, e in entries.items()]
    if questions.kind(asked) is CellKind.LORA:
        old = modules.read_receipt(client, asked)
        new = modules.words(recipe, asked, addend(recipe, client, asked, rest))
        suffix = f".{forget.together(_requests(asked))}{forget.NEXT}"
        modules.draft_receipt(client, asked, new, suffix=suffix)
        return modules.update(client, {name: new[name] - old[name] for name in old})
    less = addend(recipe, client, asked, lost)
    negative = {name: -value for name, value in less.tensors.items()}
    metrics = {"contributors": 0.0 if any(len(entry) for entry in rest) else -1.0}
    return Update(client=client.name, weight=-less.weight, tensors=negative, metrics=metrics)


def again(recipe: Recipe, client: Client, asked: Broadcast) -> Update:
    """The addend of one cell once more, from the journal (or the receipt of a LoRA cell)."""
    entries, gone = questions.entries(client, asked), _gone(client, asked)
    rest = [journal.keep(e, without=gone.get(at, ())) for at, e in entries.items()]
    if questions.kind(asked) is CellKind.LORA:
        if entries and not gone:
            return modules.update(client, modules.read_receipt(client, asked))
        update = addend(recipe, client, asked, rest)
        return modules.update(client, modules.words(recipe, asked, update))
    return addend(recipe, client, asked, rest)


def margins(client: Client, asked: Broadcast) -> Update:
    """Counted margins of this site's forgotten records and of its never-seen ones; zeros if it has
    none of the former. Only labels in question count."""
    _, tensors = adaptation.split(asked.tensors)
    document = json.loads(bytes(tensors.pop("about").numpy()))
    requests, codes = _mine(client, asked), set(questions.codes(asked, client.catalogue))
    names = forget.names(requests, journal.owners(client.store) if requests else ())
    entries = [] if not requests else journal.entries(client.store)
    lost = journal.join([journal.only(e, records=forget.under(e, names)) for e in entries])
    counts = torch.zeros(membership.GROUPS, membership.BINS, dtype=torch.int64)
    if lost is not None:
        scopes = {label.code: label.scope for label in client.catalogue.labels}
        view = views.from_tensors(document, tensors)
        wide = client.knowledge.of(client.held_out).until(asked.round)
        # A window, a label or a module is compared with records that could be of it.
        public = [request for request in requests if request.kind in forget.SHARED]
        free = set(forget.left(wide, public, scopes)) if len(public) == len(requests) else set()
        never = wide.take([i for i in range(len(wide)) if i not in free])
        rows = [i for i, code in enumerate(lost.labels) if code in codes]
        parts = [(lost.z[rows], [lost.labels[i] for i in rows])]
        for half in membership.halves(never.records):
            part = never.take([i for i in half if never.labels[i] in codes])
            z = questions.embedded(client, asked, part) if len(part) else lost.z[:0]
            parts.append((z, list(part.labels)))
        for group, (z, labels) in enumerate(parts):
            counts[group] = membership.counted(membership.margins(view, z, labels))
    return Update(client=client.name, weight=int(counts[0].sum()), tensors={"margins": counts})


def _requests(asked: Broadcast) -> tuple[str, ...]:
    """Ids of the requests that a removal carries out together, or the name of a revision."""
    return tuple(bytes(asked.tensors["request"].tolist()).decode().split("+"))


def _mine(client: Client, asked: Broadcast) -> list[forget.Request]:
    """The requests asked about that were posted here."""
    ids = _requests(asked)
    return [request for request in forget.posted(client.store) if request.id in ids]


def _gone(client: Client, asked: Broadcast) -> dict[Place, frozenset[str]]:
    """Record ids to subtract, by place: those of the request, if it was posted here, old versions
    under a revision, and all of the places that go whole."""
    mine, entries = _mine(client, asked), questions.entries(client, asked)
    names = forget.names(mine, journal.owners(client.store) if mine else ())
    found = {at: forget.under(entry, names) for at, entry in entries.items()}
    gone = {at: records for at, records in found.items() if records}
    if number := int(asked.tensors["number"]):
        part = questions.named(asked, client.catalogue, "part")
        old = journal.marked(client.store, round=number)
        gone = {place: old[place] for place in part if place in old}
    whole = questions.named(asked, client.catalogue, "whole")
    return gone | {at: frozenset(entries[at].records) for at in whole if at in entries}
