"""FedKoLa: an additive, deletable, versioned bank of knowledge, learnt from sums alone.

server:  votes  <- sum of { holders, records, label counts, old versions }     what do you see?
         cell   <- cell + sum of (new - old addend), where records changed     revise
         cell   <- sum of addends, for every scope that enough sites hold      fill
         Gram   <- one sum over the records of all cells that have none yet    fill
         view   <- pure function of live cells; calibration <- sum      publish
         cell   <- cell + sum of (new - old addend)                     remove
client:  analytic addend (s, n), router addend (sum z z', sum z, n) of new records;
         LoRA addend (B Gamma, Gamma, n) of a B trained from 0 in the module's pinned slot;
         scatter addend G of the journalled records of all cells that it covers

Use it when knowledge arrives over time, differs between sites, and must be removable: every
long-lived number is an integer sum, so add, merge, replay, late arrival and removal are one
operation. Every site answers every open cell, with zeros where it has nothing, so who contributed
stays hidden from whoever sees only sums. Sources: the module store of HPFL (Shen et al., ICLR
2025), analytic federated learning (He et al., AFL, CVPR 2025), Gram merge (LoRM, ICLR 2025).
"""

# Its parts stand beside this file: questions (one cell between server and site), modules (a site's
# LoRA half), forgetting (revise, remove and their checks), state. Rules that need no site are in
# knowledge: terms, openings, calibration, reading.

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from functools import partial
from pathlib import Path
from typing import ClassVar, Self

import torch
from torch import Tensor

from fedkola import wire
from fedkola.algorithms import forgetting, modules, questions
from fedkola.algorithms.ask import LOCAL, ask, spec
from fedkola.algorithms.quality_scan import QualityScan
from fedkola.algorithms.questions import Loss
from fedkola.algorithms.setting import Setting
from fedkola.algorithms.setting import rule as planned_rule
from fedkola.algorithms.state import Revision, events, heard
from fedkola.algorithms.state import State as State
from fedkola.errors import CohortTooSmall, ForgetIncomplete, Incompatible, KnowledgeError
from fedkola.knowledge import (
    adaptation,
    archive,
    basis,
    calibration,
    journal,
    openings,
    reading,
    statistics,
    upkeep,
    views,
    windows,
)
from fedkola.knowledge import bank as banks
from fedkola.knowledge.bank import Bank, Cell, CellKind, KnowledgeCell
from fedkola.knowledge.calibration import TEMPERATURES, Calibration
from fedkola.knowledge.compact import Policy
from fedkola.knowledge.openings import Opening
from fedkola.knowledge.terms import Recipe, Terms, addend_bytes, floor
from fedkola.knowledge.views import Rule, View
from fedkola.quality import kept
from fedkola.types import (
    Aggregate,
    Broadcast,
    Catalogue,
    Client,
    Clients,
    Cohort,
    Event,
    Reader,
    Steps,
    Update,
    Visibility,
    Weights,
)

FRACTION = 10


@dataclass(frozen=True, kw_only=True)
class FedKoLa:
    needs: ClassVar[Visibility] = Visibility.SUM
    lanes: str
    width: int
    features: int
    bits: int
    feature_seed: int
    rank: int
    scale: float
    basis_seed: int
    merge: str
    lora_records: int
    lora_steps: int
    batch: int
    lr: float
    clip: float
    fraction: int
    level: int
    base: str = ""
    # The server's own: opening rules and the public label list.
    k_min: int = field(metadata=LOCAL, default=3)
    label_floor: int = field(metadata=LOCAL, default=16)
    public_reference: bool = field(metadata=LOCAL, default=False)
    scatter_share: float = field(metadata=LOCAL, default=0.0)
    scatter_every: int = field(metadata=LOCAL, default=0)
    slots_max: int = field(metadata=LOCAL, default=48)
    lora_floor: int = field(metadata=LOCAL, default=0)
    rule: Rule = field(metadata=LOCAL, default_factory=Rule)
    catalogue: Catalogue | None = field(metadata=LOCAL, default=None)
    targets: Mapping[str, tuple[int, int]] = field(metadata=LOCAL, default_factory=dict)
    policy: Policy = field(metadata=LOCAL, default_factory=Policy)
    cold: Path | None = field(metadata=LOCAL, default=None)
    model: str = field(metadata=LOCAL, default="")
    access: Mapping[str, Sequence[str]] = field(metadata=LOCAL, default_factory=dict)
    tau_g: float = field(metadata=LOCAL, default=1.0)
    top_k: int = field(metadata=LOCAL, default=3)
    factors: Weights = field(metadata=LOCAL, default_factory=dict)
    scan: QualityScan | None = field(metadata=LOCAL, default=None)

    @classmethod
    def of(cls, setting: Setting) -> Self:
        """Raises Incompatible for sums or slots that the model has no room for."""
        k, a = setting.plan.knowledge, setting.plan.algorithm
        if "analytic" in k.lanes:
            statistics.check_exact(
                width=setting.width, features=k.features, bits=k.bits, seed=k.basis_seed
            )
        room = basis.capacity(setting.targets, rank=a.rank)
        if "lora" in k.lanes and k.slots_max > room:
            raise Incompatible(
                f"knowledge.slots_max = {k.slots_max} slots of rank {a.rank} do not fit the model, "
                f"which has room for {room}"
            )
        return cls(
            lanes=",".join(k.lanes),
            width=setting.width,
            features=k.features,
            bits=k.bits,
            feature_seed=k.basis_seed,
            rank=a.rank,
            scale=setting.scale,
            basis_seed=k.basis_seed,
            merge=k.merge,
            lora_records=k.lora_records,
            lora_steps=k.lora_steps,
            batch=a.batch,
            lr=a.lr,
            clip=setting.clip,
            fraction=FRACTION,
            level=setting.level,
            k_min=k.k_min,
            label_floor=k.label_floor,
            public_reference=k.public_reference,
            scatter_share=k.scatter_share,
            scatter_every=k.scatter_every,
            slots_max=k.slots_max,
            lora_floor=k.lora_floor,
            rule=planned_rule(setting.plan),
            catalogue=setting.catalogue,
            targets=setting.targets,
            policy=Policy(hot_cells=k.hot_cells, eps=k.compact_eps, slots_max=k.slots_max),
            cold=setting.cold,
            model=setting.base,
            access=setting.plan.scenario.access,
            tau_g=k.tau_g,
            top_k=k.top_k,
            scan=QualityScan.of(setting) if setting.plan.quality.mode != "off" else None,
        )

    # --- server half ------------------------------------------------------------------------------

    def start(self, weights: Weights) -> State:
        return State()

    def on(self, base: Weights) -> Self:
        """The same method where sites embed under the base that is adapted by ``base``."""
        return replace(self, base=adaptation.digest(base), factors=base) if base else self

    def round(self, number: int, state: State, cohort: Cohort, clients: Clients) -> State:
        """Vote, revise, fill what enough sites hold, publish. Sites that vanish mid-way are left
        out."""
        after, survivors = self.on(state.base).collect(number, state, cohort, clients)
        return self.calibrate(after, survivors, clients)

    def collect(
        self, number: int, state: State, cohort: Cohort, clients: Clients
    ) -> tuple[State, Cohort]:
        """The state after a vote and its fills, its bank within bounds; and the sites that answered
        all of them. Where the plan scans records, that comes first; sites vote with the rest."""
        if self.scan is not None:
            self.scan.round(number, self.scan.start({}), cohort, clients)
        after, survivors = self._vote_and_fill(number, state, cohort, clients)
        while survivors != cohort:
            cohort = survivors
            after, survivors = self._vote_and_fill(number, state, cohort, clients)
        return replace(after, bank=self._tidied(number, after.bank, cohort, clients)), cohort

    def _vote_and_fill(
        self, number: int, state: State, cohort: Cohort, clients: Clients
    ) -> tuple[State, Cohort]:
        """The state after one vote and its fills, and the sites that answered all of them.

        If a voter misses a fill, no sum of this vote is kept: the round votes again without it,
        so no cell is opened with fewer contributors than were counted.
        """
        vote = self._ask_vote(number, state, cohort)
        votes = clients.sum(cohort, vote)
        if len(votes.cohort) < self.k_min:
            raise CohortTooSmall(
                f"{len(votes.cohort)} sites voted, {self.k_min} are needed for any sum to be "
                "opened; wait for more sites or lower knowledge.k_min"
            )
        if votes.cohort != cohort:
            return state, votes.cohort
        bank, revision, missing = self._revise(number, state.bank, votes, clients)
        if missing:
            return state, tuple(site for site in cohort if site not in missing)
        opened, parked = self.openings(votes, bank)
        scopes = tuple(dict.fromkeys(opening.scope for opening in opened))
        deep = [opening.scope for opening in opened if opening.kind is CellKind.LORA]
        bank = self._parted(number, bank, cohort, clients, scopes=deep)
        access = openings.readers(self.access, scopes, clients.roster())
        bank = banks.open_modules(
            bank, scopes, round=number, slots_max=self.slots_max, access=access
        )
        for scope in dict.fromkeys(opening.scope for opening in opened if opening.against):
            bank = banks.supersede(bank, scope, round=number, slots_max=self.slots_max)
        for opening in opened:
            module = banks.module_of(bank, opening.scope)
            assert module is not None
            slot = -1 if module.slot is None else module.slot
            opening = replace(opening, module=module.id, slot=slot)
            about = openings.described(self.terms, number, opening, cohort)
            bank, survivors = self._fill(
                bank, about, cohort, clients, vote=vote, against=opening.against
            )
            if survivors != cohort:
                return state, survivors
        pooled = self.pooling(number, bank, cohort)
        if pooled:
            bank, survivors = self._fill(bank, pooled, cohort, clients, vote=vote)
            if survivors != cohort:
                return state, survivors
        bank = openings.retired(bank, self._catalogue(), number)
        after = replace(state, bank=bank, parked=parked, number=number, revision=revision)
        return heard(after, votes, self._catalogue(), k_min=self.k_min), cohort

    def _ask_vote(self, number: int, state: State, cohort: Cohort) -> Broadcast:
        """Ask for counts, and tell which sums came about: a site may not know (see journal)."""
        bank = state.bank
        scopes = self._catalogue().scopes()
        known = windows.known(
            bank,
            learnt=state.learnt,
            usual=state.usual,
            view=state.published,
            scopes=scopes,
            width=self.inputs,
        )
        sealed = questions.sealed(self._catalogue(), bank)
        members = [[site in of for site in cohort] for of in sealed.values()]
        tensors = {
            "sealed": torch.tensor(list(sealed), dtype=torch.int64).reshape(-1, 2),
            "members": torch.tensor(members, dtype=torch.bool).reshape(-1, len(cohort)),
            **windows.to_tensors(known, scopes),
            **adaptation.carried(self.factors),
        }
        scale = {**windows.SCALE, **dict.fromkeys(("stale_holders", "stale", "repeats"), 0)}
        # A site without new records still counts those that wait.
        asked = ask(self, "vote", number, tensors, word=64, scale=scale)
        return replace(asked, weightless=True)

    def _revise(
        self, number: int, bank: Bank, votes: Aggregate, clients: Clients
    ) -> tuple[Bank, Revision, frozenset[str]]:
        """The bank without old versions of records that arrived anew, and who did not answer."""
        terms = self.terms
        found, places = forgetting.revisable(terms, bank, votes)
        if not places:
            return bank, found, frozenset()
        names = [
            about.id
            for about in banks.origins(bank)
            if about.kind is not CellKind.SCATTER
            and questions.place(terms.catalogue, about) in places
        ]
        bank = self._touched(bank, names, votes.cohort, clients)
        cells = forgetting.concerned(bank, names)
        loss = Loss(request=journal.revision(number), number=number, places=places)
        bank, missing = forgetting.withdraw(terms, bank, cells, loss, votes.cohort, clients)
        return bank, found, missing

    def openings(self, votes: Aggregate, bank: Bank) -> tuple[tuple[Opening, ...], dict[str, int]]:
        """Cells to fill and scopes to park (scope -> records): a pure function of sums."""
        return openings.openings(self.terms, votes, bank)

    def _fill(
        self,
        bank: Bank,
        about: KnowledgeCell,
        cohort: Cohort,
        clients: Clients,
        *,
        vote: Broadcast,
        against: bool = False,
    ) -> tuple[Bank, Cohort]:
        """The bank with this cell sealed, if everybody answers; and who answered.

        The question names its ``vote``: a site that votes anew starts its journal of the round
        over, so an answer that it kept from before must not stand for a new one.
        """
        places = questions.places(self._catalogue(), bank, about)
        asked = questions.about_cell(self.terms, "fill", about, places, against=against)
        name = hashlib.sha256(wire.pack_broadcast(vote)).digest()
        tensors = {**asked.tensors, "vote": torch.tensor(list(name), dtype=torch.uint8)}
        asked = replace(asked, tensors=tensors)
        total = clients.sum(cohort, asked)
        if total.cohort != cohort:
            return bank, total.cohort
        sealed = replace(
            about,
            contributors=int(total.words[wire.METRIC + "contributors"]),
            records=int(total.words[wire.WEIGHT]),
        )
        if about.covers and sealed.records != about.records:
            # A site's journal is not what it contributed: the Gram is of no use, the rows are.
            return bank, cohort
        return banks.seal(bank, sealed, total), cohort

    def pooling(self, number: int, bank: Bank, cohort: Cohort) -> KnowledgeCell | None:
        """The scatter cell to fill at the end of a round, if one is due."""
        return openings.pooled(self.terms, number, bank, cohort)

    def calibrate(self, state: State, cohort: Cohort, clients: Clients) -> State:
        """Publish the view; sites answer how well it scores their shortened records, as sums.

        Sites that may not hold every module get the view of those they may.
        """
        if state.base and not self.base:
            return self.on(state.base).calibrate(state, cohort, clients)
        state = replace(state, calibration=Calibration())
        if "analytic" not in self.lanes or not state.bank.cells:
            return state
        likelihood = torch.zeros(len(TEMPERATURES), dtype=torch.int64)
        histogram = torch.zeros(calibration.UNKNOWN_BINS, dtype=torch.int64)
        records, name = 0, ""
        for held, group in calibration.audiences(state.bank, cohort, k_min=self.k_min):
            document, tensors = views.to_tensors(self.view(state, held=held))
            name = name or document["id"]
            asked = ask(
                self,
                "publish",
                state.number,
                {
                    **tensors,
                    "about": questions.as_bytes(json.dumps(document)),
                    "name": questions.as_bytes(name),
                    **adaptation.carried(self.factors),
                },
                word=64,
                scale={"likelihood": 20, "unknown": 0},
            )
            answer = clients.sum(group, asked)
            likelihood += answer.words["likelihood"]
            histogram += answer.words["unknown"]
            records += int(answer.words[wire.WEIGHT])
        state = replace(state, published=name)
        if not records:
            return state
        chosen = calibration.chosen(likelihood, histogram, records, width=self.inputs)
        return replace(state, calibration=chosen)

    def remove(
        self,
        state: State,
        cells: Sequence[str],
        request: str,
        cohort: Cohort,
        clients: Clients,
        *,
        leavers: Sequence[str] = (),
    ) -> tuple[State, tuple[Cell, ...], int]:
        """Subtract what sites have been asked to forget from these cells; ``request`` joins the
        ids of the requests that are carried out together by "+".

        Every site of the cohort that answered when a cell was filled is asked, with zeros from
        those that have nothing to forget; then the scatter cells that cover them, which also lose
        all of a cell that is revoked. ``leavers`` are sites whose every record goes. Returns the
        new state, the cells as they were, and the number of records removed. Raises
        ForgetIncomplete if a site does not answer or a count would fall below zero.
        """
        apart = self._touched(state.bank, cells, cohort, clients)
        before = forgetting.concerned(apart, cells)
        loss = Loss(request=request)
        bank, missing = forgetting.withdraw(self.terms, apart, before, loss, cohort, clients)
        if missing:
            raise ForgetIncomplete(
                f"{sorted(missing)} did not answer the removal; nothing was changed, ask again "
                "when they are back"
            )
        return self._removed(state, bank, before, leavers)

    def refill(
        self,
        state: State,
        cells: Sequence[str],
        request: str,
        cohort: Cohort,
        clients: Clients,
        *,
        leavers: Sequence[str] = (),
    ) -> tuple[State, tuple[Cell, ...], int]:
        """Drop these cells and sum once more what the sites of this cohort had added to them, but
        for what the requests concern; then the scatter cells that cover them.

        For leavers that cannot answer. Returns and raises what ``remove`` does.
        """
        bank = self._touched(state.bank, cells, cohort, clients)
        before = forgetting.concerned(bank, cells)
        bank = forgetting.refill(self.terms, bank, before, request, cohort, clients)
        return self._removed(state, bank, before, leavers)

    def recount(
        self, state: State, cells: Sequence[str], request: str, cohort: Cohort, clients: Clients
    ) -> bool:
        """Whether the journals of these sites, summed again, give the cells' exact integers."""
        return forgetting.recount(self.terms, state.bank, cells, request, cohort, clients)

    def residual(
        self, state: State, codes: Sequence[str], request: str, cohort: Cohort, clients: Clients
    ) -> Tensor:
        """How the view of this state scores the records that requests concern, beside never-seen
        ones of the same sites: counts (GROUPS, BINS) of margins.

        ``codes`` are the labels to compare on. They must be those of a view that has seen neither:
        a label that is known because of a forgotten record would set the two apart.
        """
        view = self.view(state)
        return forgetting.residual(self.terms, view, state.number, codes, request, cohort, clients)

    def _removed(
        self, state: State, bank: Bank, before: Sequence[Cell], leavers: Sequence[str]
    ) -> tuple[State, tuple[Cell, ...], int]:
        records = {held.about.id: held.about.records for held in bank.cells}
        removed = sum(
            cell.about.records - records.get(cell.about.id, 0)
            for cell in before
            if cell.about.kind is self.kinds()[0]
        )
        for site in leavers:
            bank = banks.leave(bank, site)
        return replace(state, bank=bank), tuple(before), removed

    def _touched(self, bank: Bank, cells: Sequence[str], cohort: Cohort, clients: Clients) -> Bank:
        """The bank with these cells live and apart from any sum or fused adapter."""
        collect = partial(forgetting.collect, self.terms, bank, cohort, clients)
        return upkeep.touch(bank, cells, self.cold, collect)

    def _parted(
        self,
        number: int,
        bank: Bank,
        cohort: Cohort,
        clients: Clients,
        *,
        scopes: Sequence[str] = (),
    ) -> Bank:
        """The bank without closed modules, and modules of these scopes, in fused adapters."""
        return upkeep.parted(
            bank,
            self.policy,
            self.cold,
            partial(forgetting.collect, self.terms, bank, cohort, clients),
            now=number,
            rule=self.rule,
            targets=self.targets,
            scopes=scopes,
        )

    def _tidied(self, number: int, bank: Bank, cohort: Cohort, clients: Clients) -> Bank:
        """The bank within its bounds; without a folder for cold cells it only grows."""
        if self.cold is None:
            return bank
        bank = self._parted(number, bank, cohort, clients)
        return upkeep.tidy(
            bank, self.policy, self.cold, now=number, rule=self.rule, targets=self.targets
        )

    # --- what the bank says -----------------------------------------------------------------------

    def view(
        self,
        state: State,
        *,
        valid_at: float | None = None,
        known_at: int | None = None,
        held: Sequence[str] | None = None,
    ) -> View:
        """The model the bank stands for, as of a world time and a knowledge time.

        Cells that such a time reads apart come back from cold storage for it.
        """
        bank = state.bank
        if self.cold is not None:
            bank = archive.as_of(bank, self.cold, valid_at=valid_at, known_at=known_at, held=held)
        return views.compute(
            bank,
            self._catalogue(),
            self.rule,
            now=state.number,
            targets=self.targets,
            valid_at=valid_at,
            known_at=known_at,
            held=held,
        )

    def answer(
        self, state: State, reader: Reader, texts: Sequence[str], *, site: str = ""
    ) -> Tensor:
        """Scores (n, nodes) of what a site may hold, "" is everything; -inf for nodes that no live
        cell of it knows."""
        held = banks.held(state.bank, site) if site else None
        if not any(held is None or cell.about.module in held for cell in state.bank.cells):
            return torch.full((len(texts), len(reader.nodes)), float("-inf"))
        z = self.embed(state.base, reader, texts)
        return views.answer(self.view(state, held=held), z, reader.nodes, self.level)

    def embed(self, base: Weights, reader: Reader, texts: Sequence[str]) -> Tensor:
        """Integer embeddings as sites sum them: frozen, and under an adapted base beside it."""
        return reading.embed(base, reader, texts)

    def losses(
        self, state: State, reader: Reader, prompts: Sequence[str], texts: Sequence[str]
    ) -> Tensor:
        """(n, 2) nats and tokens of the bank's modules, mixed with the labels of analytic cells."""
        if not state.bank.cells:
            return reader.losses({}, prompts, texts)
        return reading.losses(
            self.view(state),
            reader,
            prompts,
            texts,
            base=state.base,
            calibration=state.calibration,
            level=self.level,
            tau=self.tau_g,
            top_k=self.top_k,
        )

    def generate(
        self, state: State, reader: Reader, prompts: Sequence[str], *, max_new_tokens: int
    ) -> list[str]:
        """The text of the best label where there are analytic cells, else what modules generate."""
        if not state.bank.cells:
            return reader.generate({}, prompts, max_new_tokens=max_new_tokens)
        return reading.generate(
            self.view(state),
            reader,
            prompts,
            base=state.base,
            level=self.level,
            tau=self.tau_g,
            top_k=self.top_k,
            max_new_tokens=max_new_tokens,
        )

    def events(self, before: State, after: State) -> tuple[Event, ...]:
        """What the ledger records of one round: the difference of two banks, and what waits."""
        return events(before, after)

    # --- client half ------------------------------------------------------------------------------

    def steps(self) -> Steps:
        return {
            "vote": self.vote,
            "fill": self.fill,
            "publish": self.publish,
            "revise": self.subtract,
            "remove": self.subtract,
            "recount": self.again,
            "residual": self.margins,
        }

    def vote(self, client: Client, asked: Broadcast) -> Update:
        """Holders and records by scope and by label, of what has arrived and is not summed yet;
        and old versions that are summed, by place."""
        forgetting.start_over(client, asked)
        newest = client.knowledge.until(asked.round)
        data = kept.learnable(
            client.store, journal.pending(client.store, newest, round=asked.round)
        )
        old = journal.superseded(client.store, newest, before=asked.round)
        journal.mark(client.store, old, round=asked.round)
        places = questions.named(asked, client.catalogue, "sealed")
        stale = torch.tensor([len(old.get(place, ())) for place in places], dtype=torch.int64)
        known = windows.from_tensors(asked.tensors, client.catalogue.scopes())
        history = journal.entries(client.store)
        judged = windows.survey(
            data,
            partial(questions.embedded, client, asked),
            catalogue=client.catalogue,
            known=known,
            asking=windows.read_answers(client.store, known.view),
            history=history,
            revised=frozenset().union(*old.values()),
        )
        windows.remember(client.store, asked.round, judged)
        return Update(
            client=client.name,
            weight=len(data),
            tensors={
                "stale_holders": (stale > 0).to(torch.int64),
                "stale": stale,
                "repeats": torch.tensor(client.knowledge.repeats(asked.round)),
                **windows.ballot(data, judged, client.catalogue),
                **windows.evidence(client.store, known, history, judged, client.catalogue),
            },
        )

    def fill(self, client: Client, asked: Broadcast) -> Update:
        """Embed or train on the new records of one scope, journal them, and answer the addend.

        A scatter cell sums what the journal holds of the cells it covers.
        """
        if questions.kind(asked) is CellKind.SCATTER:
            entries = questions.entries(client, asked).values()
            return questions.addend(self.recipe, client, asked, entries)
        ((_, scope),) = questions.named(asked, client.catalogue)
        codes = questions.codes(asked, client.catalogue)
        data = journal.pending(client.store, client.knowledge.until(asked.round), round=asked.round)
        data = kept.learnable(client.store, data)
        found = windows.findings(client.store, asked.round).get(scope)
        asked_for = windows.CONFLICT if bool(asked.tensors["against"]) else windows.HIT
        wanted = set(codes) if not found or found.decision == asked_for else set()
        mine = data.take([i for i, code in enumerate(data.labels) if code in wanted])
        entry = None
        if len(mine):
            entry = journal.Entry(
                round=asked.round,
                scope=scope,
                records=mine.records,
                patients=mine.patients,
                labels=mine.labels,
                windows=mine.windows,
                z=questions.embedded(client, asked, mine),
            )
            journal.write(client.store, entry)
        update = questions.addend(self.recipe, client, asked, [entry] if entry else [])
        if questions.kind(asked) is CellKind.LORA and entry:
            modules.keep_receipt(client, asked, modules.words(self.recipe, asked, update))
        return update

    def publish(self, client: Client, asked: Broadcast) -> Update:
        """Score shortened records of the journal under the view that was just published."""
        _, tensors = adaptation.split(asked.tensors)
        document = json.loads(bytes(tensors.pop("about").numpy()))
        name = bytes(tensors.pop("name").tolist()).decode()
        view = views.from_tensors(document, tensors)
        if answers := windows.answers(view, self.level):
            windows.keep_answers(client.store, replace(answers, view=name))
        whole = client.knowledge.until(asked.round)
        data = calibration.shortened(client.store, whole, round=asked.round, seed=asked.seed)
        likelihood = torch.zeros(len(TEMPERATURES), dtype=torch.float64)
        histogram = torch.zeros(calibration.UNKNOWN_BINS, dtype=torch.int64)
        counted = 0
        if len(data) and view.head:
            z = questions.embedded(client, asked, data)
            likelihood, histogram, counted = calibration.scored(
                view, z, data.labels, client.catalogue, level=self.level
            )
        return Update(
            client=client.name,
            weight=counted,
            tensors={"likelihood": likelihood, "unknown": histogram},
        )

    def subtract(self, client: Client, asked: Broadcast) -> Update:
        """New minus old addend of one cell; zeros where nothing is to be taken back."""
        return forgetting.subtract(self.recipe, client, asked)

    def again(self, client: Client, asked: Broadcast) -> Update:
        """The addend of one cell once more, from the journal (or the receipt of a LoRA cell)."""
        return forgetting.again(self.recipe, client, asked)

    def margins(self, client: Client, asked: Broadcast) -> Update:
        """Counted margins of this site's forgotten records and of its never-seen ones; zeros if it
        has none of the former. Only labels in question count."""
        return forgetting.margins(client, asked)

    # --- what cells are made under ----------------------------------------------------------------

    def kinds(self) -> tuple[CellKind, ...]:
        return tuple(kind for kind in CellKind if kind.value in self.lanes.split(","))

    def floor(self, kind: CellKind | None = None) -> int:
        """The least records a cell of this kind may hold; without one, the cells of a scope."""
        return floor(self.terms, kind)

    def addend_bytes(self, about: KnowledgeCell) -> int:
        """Bytes of what one site sends for a cell, without the message around them."""
        return addend_bytes(self.terms, about)

    @property
    def inputs(self) -> int:
        """Numbers of an embedding that enters cells: the frozen one, and the adapted beside it."""
        return self.recipe.inputs

    @property
    def recipe(self) -> Recipe:
        """How a site turns records into an addend."""
        return Recipe(**{f.name: getattr(self, f.name) for f in fields(Recipe)})

    @property
    def terms(self) -> Terms:
        """What cells are opened and asked for under; it takes the server's half."""
        return Terms(
            spec=spec(self),
            recipe=self.recipe,
            kinds=self.kinds(),
            catalogue=self._catalogue(),
            targets=self.targets,
            k_min=self.k_min,
            label_floor=self.label_floor,
            public_reference=self.public_reference,
            scatter_share=self.scatter_share,
            scatter_every=self.scatter_every,
            lora_floor=self.lora_floor,
            model=self.model,
            factors=self.factors,
        )

    def _catalogue(self) -> Catalogue:
        if self.catalogue is None:
            raise KnowledgeError("the server half needs the task's catalogue of labels")
        return self.catalogue
