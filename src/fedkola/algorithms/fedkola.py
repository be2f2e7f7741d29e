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

import hashlib
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import ClassVar, Self

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from fedkola import wire
from fedkola.algorithms.ask import LOCAL, ask
from fedkola.algorithms.setting import Setting
from fedkola.algorithms.setting import rule as planned_rule
from fedkola.errors import CohortTooSmall, ForgetIncomplete, Incompatible, KnowledgeError
from fedkola.knowledge import (
    adaptation,
    archive,
    basis,
    candidates,
    compact,
    forget,
    journal,
    membership,
    novelty,
    router,
    statistics,
    upkeep,
    views,
    windows,
)
from fedkola.knowledge import bank as banks
from fedkola.knowledge.bank import Bank, Cell, CellKind, KnowledgeCell, Status
from fedkola.knowledge.compact import Policy
from fedkola.knowledge.journal import Place
from fedkola.knowledge.novelty import Thresholds
from fedkola.knowledge.stream import Records
from fedkola.knowledge.views import Rule, View
from fedkola.types import (
    Aggregate,
    Broadcast,
    Catalogue,
    Client,
    Clients,
    Cohort,
    Dataset,
    Event,
    Reader,
    Scalar,
    Steps,
    Update,
    Visibility,
    Weights,
)

FRACTION = 10
TEMPERATURES = tuple(0.01 * 10 ** (k / 6) for k in range(13))
UNKNOWN_BINS = 512
UNKNOWN_RANGE = (-4.0, 12.0)  # of the relative distance, in multiples of the width
CALIBRATION_RECORDS = 32

PURGED = "purged"
"""Stands in place of a removal request where a purged cell is summed again."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Calibration:
    """From sums over shortened records: softmax temperature, and what counts as never seen.

    ``unknown`` is the relative distance that 5 % of the sites' own records exceed.
    """

    temperature: float = 1.0
    unknown: float = float("1e30")
    records: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Revision:
    """What a round took back because newer versions had arrived: the old versions of ``records``
    at ``sites`` (all that were asked) in ``places``, (round, scope). ``waiting`` old versions are
    still summed, as fewer than k_min sites have any in their place; ``repeats`` rows changed
    nothing."""

    sites: Cohort = ()
    places: tuple[tuple[int, str], ...] = ()
    records: int = 0
    waiting: int = 0
    repeats: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class State:
    """The bank, its calibration, the scopes that wait for enough sites (scope -> records), and what
    the last round revised.

    ``learnt``, ``usual`` (scope -> labels that agreed, labels asked), ``misfits`` (scope -> windows
    that do not fit it) and ``doubtful`` (labels) are what the sums of the last vote say of windows;
    ``published`` names the view that sites hold.
    """

    bank: Bank = field(default_factory=Bank)
    calibration: Calibration = field(default_factory=Calibration)
    parked: Mapping[str, int] = field(default_factory=dict)
    number: int = 0
    revision: Revision = field(default_factory=Revision)
    base: Mapping[str, Tensor] = field(default_factory=dict)
    consolidated: int = 0
    learnt: Thresholds = field(default_factory=Thresholds)
    usual: Mapping[str, tuple[int, int]] = field(default_factory=dict)
    misfits: Mapping[str, int] = field(default_factory=dict)
    doubtful: tuple[str, ...] = ()
    published: str = ""

    @property
    def weights(self) -> Weights:
        return {}


@dataclass(frozen=True, slots=True, kw_only=True)
class Opening:
    """One cell to fill: scope and label positions in the catalogue, and its place in the bank.

    ``against`` says that it is filled with what contradicts the version in force, which its module
    supersedes.
    """

    scope: str
    module: str
    kind: CellKind
    slot: int
    labels: tuple[int, ...]
    records: int
    against: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Loss:
    """What cells lose: the records of a removal request, or in round ``number`` the old versions
    in ``places`` (the number of a round and of a scope)."""

    request: str
    number: int = 0
    places: tuple[tuple[int, int], ...] = ()


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
        all of them."""
        after, survivors = self._vote_and_fill(number, state, cohort, clients)
        while survivors != cohort:
            cohort = survivors
            after, survivors = self._vote_and_fill(number, state, cohort, clients)
        return replace(after, bank=self._tidied(number, after.bank, cohort, clients)), cohort

    def openings(self, votes: Aggregate, bank: Bank) -> tuple[tuple[Opening, ...], dict[str, int]]:
        """Cells to fill and scopes to park (scope -> records): a pure function of sums.

        A scope opens at k_min holders. Unless the data is declared public, each label row needs
        k_min holders and ``label_floor`` records, and the cell the records floor of its kinds. What
        contradicts a module opens its next version by the same rules if more sites say so than
        bring records that agree with it; those then wait for one round.
        """
        opened: list[Opening] = []
        parked: dict[str, int] = {}
        for_it, against = self._counted(votes, ""), self._counted(votes, windows.AGAINST)
        for index, scope in enumerate(self._catalogue().scopes()):
            module = banks.module_of(bank, scope)
            more = against.holders[index] > for_it.holders[index]
            turns = module is not None and more and bool(against.kinds[index])
            counted = against if turns else for_it
            total = sum(counted.rows[index].values()) if counted.kinds[index] else 0
            waiting = for_it.records[index] + against.records[index] - total
            if waiting:
                parked[scope] = waiting
            newest = max((m.version for m in bank.modules if m.scope == scope), default=0)
            held = module if module and not turns else None
            opened += [
                Opening(
                    scope=scope,
                    module=held.id if held else f"{scope}@{newest + 1}",
                    kind=kind,
                    slot=held.slot if held and held.slot is not None else -1,
                    labels=tuple(counted.rows[index]),
                    records=total,
                    against=turns,
                )
                for kind in counted.kinds[index]
            ]
        return tuple(opened), parked

    def pooling(self, number: int, bank: Bank, cohort: Cohort) -> KnowledgeCell | None:
        """The scatter cell to fill at the end of a round, if one is due.

        It covers every analytic cell without a Gram whose whole cohort is asked, so that the sums
        of both are over the same records. It is due at the records floor (waived for public data)
        and at ``scatter_share`` times the records covered so far: at 0 every round has one, at 1
        they come at growing intervals, and views use the Gram there is in the meantime.
        """
        waiting = [
            cell.about for cell in banks.uncovered(bank) if set(cell.about.cohort) <= set(cohort)
        ]
        records = sum(about.records for about in waiting)
        scatters = banks.of_kind(bank, CellKind.SCATTER)
        due = self.scatter_share * sum(cell.about.records for cell in scatters)
        if not waiting or records < max(due, self.floor(CellKind.SCATTER)):
            return None
        recipe = self._recipe(CellKind.SCATTER)
        return KnowledgeCell(
            id=banks.cell_id(
                module=banks.POOL, kind=CellKind.SCATTER, round=number, slot=None, recipe=recipe
            ),
            module=banks.POOL,
            kind=CellKind.SCATTER,
            round=number,
            valid=(0.0, None),
            slot=None,
            recipe=recipe,
            labels=(),
            cohort=cohort,
            contributors=0,
            records=records,
            words="",
            covers=tuple(about.id for about in waiting),
            privacy=self._rules(),
            base=self.model,
        )

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
        histogram = torch.zeros(UNKNOWN_BINS, dtype=torch.int64)
        records, name = 0, ""
        for held, group in self._audiences(state.bank, cohort):
            document, tensors = views.to_tensors(self.view(state, held=held))
            name = name or document["id"]
            about = torch.frombuffer(bytearray(json.dumps(document).encode()), dtype=torch.uint8)
            asked = ask(
                self,
                "publish",
                state.number,
                {
                    **tensors,
                    "about": about,
                    "name": torch.tensor(list(name.encode()), dtype=torch.uint8),
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
        low, high = UNKNOWN_RANGE
        exceeded = histogram.flip(0).cumsum(0).flip(0) > 0.05 * int(histogram.sum())
        edge = (int(exceeded.sum()) / UNKNOWN_BINS) * (high - low) + low
        calibration = Calibration(
            temperature=TEMPERATURES[int(likelihood.argmax())],
            unknown=edge * self.inputs,
            records=records,
        )
        return replace(state, calibration=calibration)

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
        before = [banks.find(apart, name) for name in cells]
        before += banks.covering(apart, cells)
        loss = Loss(request=request)
        bank, missing = self._withdraw(apart, before, loss, cohort, clients)
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
        before = [banks.find(bank, name) for name in cells]
        before += banks.covering(bank, cells)
        for cell in before:
            live = {held.about.id for held in bank.cells}
            covers = tuple(name for name in cell.about.covers if name in live)
            if cell.about.covers and not covers:
                bank = banks.revoke(bank, cell.about.id)
                continue
            members = tuple(site for site in cohort if site in cell.about.cohort)
            places = self._places(bank, replace(cell.about, covers=covers))
            asked = self._about_cell("recount", cell.about, places, loss=Loss(request=request))
            total = clients.sum(members, asked)
            if total.cohort != members:
                raise ForgetIncomplete(
                    f"{sorted(set(members) - set(total.cohort))} did not send a cell again; "
                    "nothing was changed, ask again when they are back"
                )
            bank = self._left(bank, cell, replace(total, grid=cell.total.grid), covers)
        return self._removed(state, bank, before, leavers)

    def residual(
        self, state: State, codes: Sequence[str], request: str, cohort: Cohort, clients: Clients
    ) -> Tensor:
        """How the view of this state scores the records that requests concern, beside never-seen
        ones of the same sites: counts (GROUPS, BINS) of margins.

        ``codes`` are the labels to compare on. They must be those of a view that has seen neither:
        a label that is known because of a forgotten record would set the two apart.
        """
        position = {label.code: i for i, label in enumerate(self._catalogue().labels)}
        document, tensors = views.to_tensors(self.view(state))
        tensors |= {
            "about": torch.frombuffer(bytearray(json.dumps(document).encode()), dtype=torch.uint8),
            "labels": torch.tensor([position[code] for code in codes], dtype=torch.int64),
            "request": torch.tensor(list(request.encode()), dtype=torch.uint8),
        }
        asked = ask(
            self,
            "residual",
            state.number,
            {**tensors, **adaptation.carried(self.factors)},
            word=32,
            scale={"margins": 0},
        )
        return clients.sum(cohort, asked).words["margins"].to(torch.int64)

    def recount(
        self, state: State, cells: Sequence[str], request: str, cohort: Cohort, clients: Clients
    ) -> bool:
        """Whether the journals of these sites, summed again, give the cells' exact integers."""
        live = {cell.about.id: cell for cell in state.bank.cells}
        for name in cells:
            if name in live:
                about = live[name].about
                places = self._places(state.bank, about)
                asked = self._about_cell("recount", about, places, loss=Loss(request=request))
                again = clients.sum(tuple(s for s in cohort if s in about.cohort), asked)
                if banks.content(about.labels, again) != about.words:
                    return False
        return True

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
        frozen = reader.features(texts)
        if not base:
            return frozen
        return adaptation.beside(frozen, reader.features(texts, adapter=base))

    def losses(
        self, state: State, reader: Reader, prompts: Sequence[str], texts: Sequence[str]
    ) -> Tensor:
        """(n, 2) nats and tokens of the bank's modules, mixed with the labels of analytic cells."""
        if not state.bank.cells:
            return reader.losses({}, prompts, texts)
        view = self.view(state)
        weights, gate = self._composed(view, reader, prompts or texts)
        found = reader.losses(weights, prompts, texts, gate=gate)
        if view.head is None or not prompts:
            return found
        z, names = self.embed(state.base, reader, prompts), reader.catalogue.texts
        known = torch.ones(len(prompts), dtype=torch.bool)
        if view.router is not None:
            known = router.unknown(view.router, z) <= state.calibration.unknown
        found[:, 0] = candidates.mixed(
            found[:, 0],
            views.answer(view, z, reader.nodes, self.level),
            texts,
            [names.get(node, node) for node in reader.nodes],
            temperature=state.calibration.temperature,
            known=known,
        )
        return found

    def generate(
        self, state: State, reader: Reader, prompts: Sequence[str], *, max_new_tokens: int
    ) -> list[str]:
        """The text of the best label where there are analytic cells, else what modules generate."""
        if not state.bank.cells:
            return reader.generate({}, prompts, max_new_tokens=max_new_tokens)
        view = self.view(state)
        if view.head is not None:
            z = self.embed(state.base, reader, prompts)
            found = views.answer(view, z, reader.nodes, self.level)
            return candidates.replies(found, reader.nodes, reader.catalogue.texts)
        weights, gate = self._composed(view, reader, prompts)
        return reader.generate(weights, prompts, max_new_tokens=max_new_tokens, gate=gate)

    def events(self, before: State, after: State) -> tuple[Event, ...]:
        """What the ledger records of one round: the difference of two banks, and what waits."""
        parked = tuple(
            {"kind": "PARK", "subject": scope, "body": {"records": records}}
            for scope, records in after.parked.items()
            if before.parked.get(scope) != records
        )
        revised = tuple(
            {"kind": "REVISE", "subject": scope, "body": {"round": round}}
            for round, scope in after.revision.places
            if after.number != before.number
        )
        misfits = tuple(
            {"kind": "MISFIT", "subject": scope, "body": {"windows": num}}
            for scope, num in after.misfits.items()
            if before.misfits.get(scope) != num
        )
        doubts = tuple(
            {"kind": "DOUBT", "subject": code, "body": {"round": after.number}}
            for code in after.doubtful
            if code not in before.doubtful
        )
        found = banks.events(before.bank, after.bank)
        return revised + found + parked + misfits + doubts

    def kinds(self) -> tuple[CellKind, ...]:
        return tuple(kind for kind in CellKind if kind.value in self.lanes.split(","))

    def floor(self, kind: CellKind | None = None) -> int:
        """The least records a cell of this kind may hold; without one, the cells of a scope."""
        if self.public_reference:
            return 1
        if kind is CellKind.SCATTER:
            return statistics.records_floor(self.features, self.inputs)
        # Label rows have floors of their own; d records give a router's moment its full rank.
        floors = {
            CellKind.ANALYTIC: 1,
            CellKind.ROUTER: self.inputs,
            CellKind.LORA: 16 * self.rank,
        }
        return max(floors[kind] for kind in self.kinds())

    def addend_bytes(self, about: KnowledgeCell) -> int:
        """Bytes of what one site sends for a cell, without the message around them."""
        rows, p, d = len(about.labels), self.features, self.inputs
        numbers = {
            CellKind.ANALYTIC: rows * (p + 1),
            CellKind.SCATTER: p * (p + 1) // 2,
            CellKind.ROUTER: d * (d + 1) // 2 + rows * (d + 1),
            CellKind.LORA: sum(
                d_out * self.rank + (self.rank**2 if self.merge == "gram" else 0)
                for d_out, _ in self.targets.values()
            ),
        }
        return numbers[about.kind] * self._word(about) // 8

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
        self._reconcile(client, asked)
        newest = client.knowledge.until(asked.round)
        data = journal.pending(client.store, newest, round=asked.round)
        old = journal.superseded(client.store, newest, before=asked.round)
        journal.mark(client.store, old, round=asked.round)
        places = _asked_places(asked, client.catalogue, "sealed")
        stale = torch.tensor([len(old.get(place, ())) for place in places], dtype=torch.int64)
        known = windows.from_tensors(asked.tensors, client.catalogue.scopes())
        history = journal.entries(client.store)
        judged = windows.survey(
            data,
            partial(self._embedded, client, asked),
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
        if _kind(asked) is CellKind.SCATTER:
            return self._addend(client, asked, self._entries(client, asked).values())
        ((_, scope),) = _asked_places(asked, client.catalogue)
        codes = self._codes(client, asked)
        data = journal.pending(client.store, client.knowledge.until(asked.round), round=asked.round)
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
                z=self._embedded(client, asked, mine),
            )
            journal.write(client.store, entry)
        update = self._addend(client, asked, [entry] if entry else [])
        self._keep_receipt(client, asked, update)
        return update

    def publish(self, client: Client, asked: Broadcast) -> Update:
        """Score shortened records of the journal under the view that was just published.

        Half of the words of each record are dropped, as a clinician's wording is shorter than,
        and different from, the official one; the full texts were trained on.
        """
        _, tensors = adaptation.split(asked.tensors)
        document = json.loads(bytes(tensors.pop("about").numpy()))
        name = bytes(tensors.pop("name").tolist()).decode()
        view = views.from_tensors(document, tensors)
        if answers := windows.answers(view, self.level):
            windows.keep_answers(client.store, replace(answers, view=name))
        data = self._shortened(client, asked)
        likelihood = torch.zeros(len(TEMPERATURES), dtype=torch.float64)
        histogram = torch.zeros(UNKNOWN_BINS, dtype=torch.int64)
        counted = 0
        if len(data) and view.head:
            z = self._embedded(client, asked, data)
            path = {label.code: label.path[self.level] for label in client.catalogue.labels}
            place = {node: i for i, node in enumerate(view.head.nodes[self.level])}
            rows = [i for i, code in enumerate(data.labels) if path[code] in place]
            truth = torch.tensor([place[path[data.labels[i]]] for i in rows], dtype=torch.int64)
            scores = views.scores(view.head, z[torch.tensor(rows, dtype=torch.int64)], self.level)
            for k, temperature in enumerate(TEMPERATURES):
                chosen = torch.log_softmax(scores / temperature, 1)[torch.arange(len(rows)), truth]
                likelihood[k] = chosen.clamp(min=-50).sum()
            counted = len(rows)
            if view.router:
                low, high = UNKNOWN_RANGE
                share = (router.unknown(view.router, z) / self.inputs - low) / (high - low)
                bins = (share * UNKNOWN_BINS).floor().clamp(0, UNKNOWN_BINS - 1).to(torch.int64)
                histogram = torch.bincount(bins, minlength=UNKNOWN_BINS)
        return Update(
            client=client.name,
            weight=counted,
            tensors={"likelihood": likelihood, "unknown": histogram},
        )

    def subtract(self, client: Client, asked: Broadcast) -> Update:
        """New minus old addend of one cell; zeros where nothing is to be taken back."""
        entries, gone = self._entries(client, asked), self._gone(client, asked)
        lost = [journal.only(e, records=gone[at]) for at, e in entries.items() if at in gone]
        if not any(len(entry) for entry in lost):
            return self._addend(client, asked, [])
        rest = [journal.keep(e, without=gone.get(at, ())) for at, e in entries.items()]
        if _kind(asked) is CellKind.LORA:
            old = load_file(_receipt(client, asked))
            new = self._words(client, asked, self._addend(client, asked, rest))
            save_file(new, _receipt(client, asked, suffix=f".{_batch(asked)}{forget.NEXT}"))
            return _integer_update(client, {name: new[name] - old[name] for name in old})
        less = self._addend(client, asked, lost)
        negative = {name: -value for name, value in less.tensors.items()}
        metrics = {"contributors": 0.0 if any(len(entry) for entry in rest) else -1.0}
        return Update(client=client.name, weight=-less.weight, tensors=negative, metrics=metrics)

    def again(self, client: Client, asked: Broadcast) -> Update:
        """The addend of one cell once more, from the journal (or the receipt of a LoRA cell)."""
        entries, gone = self._entries(client, asked), self._gone(client, asked)
        rest = [journal.keep(e, without=gone.get(at, ())) for at, e in entries.items()]
        if _kind(asked) is CellKind.LORA:
            if entries and not gone:
                return _integer_update(client, load_file(_receipt(client, asked)))
            words = self._words(client, asked, self._addend(client, asked, rest))
            return _integer_update(client, words)
        return self._addend(client, asked, rest)

    def margins(self, client: Client, asked: Broadcast) -> Update:
        """Counted margins of this site's forgotten records and of its never-seen ones; zeros if it
        has none of the former. Only labels in question count."""
        _, tensors = adaptation.split(asked.tensors)
        document = json.loads(bytes(tensors.pop("about").numpy()))
        requests, codes = self._mine(client, asked), set(self._codes(client, asked))
        names = forget.names(requests, journal.owners(client.store) if requests else ())
        entries = [] if not requests else journal.entries(client.store)
        lost = journal.join([journal.only(e, records=forget.under(e, names)) for e in entries])
        counts = torch.zeros(membership.GROUPS, membership.BINS, dtype=torch.int64)
        if lost is not None:
            scopes = {label.code: label.scope for label in client.catalogue.labels}
            view = views.from_tensors(document, tensors)
            wide = Records(client.held_out).until(asked.round)
            # A window, a label or a module is compared with records that could be of it.
            public = [request for request in requests if request.kind in forget.SHARED]
            free = set(forget.left(wide, public, scopes)) if len(public) == len(requests) else set()
            never = wide.take([i for i in range(len(wide)) if i not in free])
            rows = [i for i, code in enumerate(lost.labels) if code in codes]
            parts = [(lost.z[rows], [lost.labels[i] for i in rows])]
            for half in membership.halves(never.records):
                part = never.take([i for i in half if never.labels[i] in codes])
                z = self._embedded(client, asked, part) if len(part) else lost.z[:0]
                parts.append((z, list(part.labels)))
            for group, (z, labels) in enumerate(parts):
                counts[group] = membership.counted(membership.margins(view, z, labels))
        return Update(client=client.name, weight=int(counts[0].sum()), tensors={"margins": counts})

    # --- private, server --------------------------------------------------------------------------

    def _composed(
        self, view: View, reader: Reader, prompts: Sequence[str]
    ) -> tuple[Weights, Tensor | None]:
        """The LoRA modules as slots, and their weights for each prompt: those of the router, or
        equal ones without a router. No modules: the base."""
        modules = tuple(view.adapters)
        if not modules:
            return {}, None
        gate = torch.full((len(prompts), len(modules)), 1 / len(modules))
        if view.router is not None:
            p = router.posterior(view.router, reader.features(prompts), tau=self.tau_g)
            gate = views.gate(view, p, top_k=self.top_k)
        return views.slots(view, modules), gate

    @property
    def inputs(self) -> int:
        """Numbers of an embedding that enters cells: the frozen one, and the adapted beside it."""
        return 2 * self.width if self.base else self.width

    def _catalogue(self) -> Catalogue:
        if self.catalogue is None:
            raise KnowledgeError("the server half needs the task's catalogue of labels")
        return self.catalogue

    def _counted(self, votes: Aggregate, prefix: str) -> "_Counted":
        """Holders and records by scope, with the rows and the kinds of cells that may open."""
        place = {scope: i for i, scope in enumerate(self._catalogue().scopes())}
        holders, records, label_holders, label_records = (
            votes.words[prefix + name].tolist() for name in windows.COUNTS
        )
        rows: list[dict[int, int]] = [{} for _ in place]
        for i, label in enumerate(self._catalogue().labels):
            enough = label_holders[i] >= self.k_min and label_records[i] >= self.label_floor
            if label_records[i] > 0 and (self.public_reference or enough):
                rows[place[label.scope]][i] = label_records[i]
        kinds: list[tuple[CellKind, ...]] = []
        for index, mine in enumerate(rows):
            total = sum(mine.values())
            open_ = holders[index] >= self.k_min and total >= self.floor()
            deep = total >= self.lora_floor
            allowed = [kind for kind in self.kinds() if deep or kind is not CellKind.LORA]
            kinds.append(tuple(allowed) if open_ else ())
        return _Counted(holders=holders, records=records, rows=rows, kinds=kinds)

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
        sealed = self._sealed(bank)
        members = [[site in of for site in cohort] for of in sealed.values()]
        tensors = {
            "sealed": torch.tensor(list(sealed), dtype=torch.int64).reshape(-1, 2),
            "members": torch.tensor(members, dtype=torch.bool).reshape(-1, len(cohort)),
            **windows.to_tensors(known, scopes),
            **adaptation.carried(self.factors),
        }
        scale = {**windows.SCALE, **dict.fromkeys(("stale_holders", "stale", "repeats"), 0)}
        return ask(self, "vote", number, tensors, word=64, scale=scale)

    def _heard(self, state: State, votes: Aggregate) -> State:
        """The state with what these votes say of windows."""
        scopes, codes = self._catalogue().scopes(), self._catalogue().codes()
        real = wire.reals(votes)
        right, asked = (votes.words[name].tolist() for name in (windows.RIGHT, windows.ASKED))
        misfits = votes.words[windows.MISFITS].tolist()
        return replace(
            state,
            learnt=novelty.learn(real),
            usual={s: (r, a) for s, r, a in zip(scopes, right, asked, strict=True) if a},
            misfits={scope: num for scope, num in zip(scopes, misfits, strict=True) if num},
            doubtful=tuple(codes[i] for i in windows.doubtful(votes.words, k_min=self.k_min)),
        )

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
        access = self._readers(scopes, clients.roster())
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
            about = self._describe(number, opening, cohort)
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
        after = replace(
            state, bank=self._retired(bank, number), parked=parked, number=number, revision=revision
        )
        return self._heard(after, votes), cohort

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
        places = self._places(bank, about)
        asked = self._about_cell("fill", about, places, against=against)
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

    def _sealed(self, bank: Bank) -> dict[tuple[int, int], Cohort]:
        """The sites asked, by the place whose records are summed, in cold storage too."""
        summed = [about for about in banks.origins(bank) if about.kind is not CellKind.SCATTER]
        return {self._place(about): about.cohort for about in summed}

    def _revise(
        self, number: int, bank: Bank, votes: Aggregate, clients: Clients
    ) -> tuple[Bank, Revision, frozenset[str]]:
        """The bank without the old versions of records that arrived anew, and who did not answer.

        Unless the data is declared public, old versions in one place stay until k_min sites have
        some: the difference of the two sums would show those of a single site. Those in a cell that
        was purged from cold storage stay while a site that filled it is away.
        """
        stale, holders = votes.words["stale"].tolist(), votes.words["stale_holders"].tolist()
        repeats = int(votes.words["repeats"])
        enough = 1 if self.public_reference else self.k_min
        sealed = list(self._sealed(bank))
        away = self._out_of_reach(bank, votes.cohort)
        chosen = [
            i
            for i, place in enumerate(sealed)
            if stale[i] and holders[i] >= enough and place not in away
        ]
        places = tuple(sealed[i] for i in chosen)
        records = sum(stale[i] for i in chosen)
        found = Revision(waiting=sum(stale) - records, repeats=repeats)
        if not places:
            return bank, found, frozenset()
        names = [
            about.id
            for about in banks.origins(bank)
            if about.kind is not CellKind.SCATTER and self._place(about) in places
        ]
        bank = self._touched(bank, names, votes.cohort, clients)
        cells = [banks.find(bank, name) for name in names]
        cells += banks.covering(bank, names)
        loss = Loss(request=journal.revision(number), number=number, places=places)
        bank, missing = self._withdraw(bank, cells, loss, votes.cohort, clients)
        scopes = self._catalogue().scopes()
        found = replace(
            found,
            sites=votes.cohort,
            places=tuple((round, scopes[scope]) for round, scope in places),
            records=records,
        )
        return bank, found, missing

    def _withdraw(
        self, bank: Bank, cells: Sequence[Cell], loss: Loss, cohort: Cohort, clients: Clients
    ) -> tuple[Bank, frozenset[str]]:
        """The bank after these cells lost what they must, and the sites that did not answer.

        Scatter cells come last. What remaining sites put into a cell that is revoked waits for the
        next one, so it leaves the Gram too. If one of these sites is not asked, the Gram is
        revoked: the next one sums it again. Raises ForgetIncomplete for a negative count.
        """
        before = bank
        for cell in cells:
            about, live = cell.about, {held.about.id for held in bank.cells}
            under = [held.about for held in banks.covered(before, about)]
            revoked = [held for held in under if held.id not in live]
            if any(not set(held.cohort) <= set(cohort) for held in revoked):
                bank = banks.revoke(bank, about.id)
                continue
            whole = [self._place(held) for held in revoked]
            asked = self._about_cell(
                "revise" if loss.number else "remove",
                about,
                self._places(before, about),
                loss=loss,
                whole=whole,
            )
            members = tuple(site for site in cohort if site in about.cohort)
            delta = clients.sum(members, asked)
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
            bank = self._left(bank, cell, total, covers)
        return bank, frozenset()

    def _left(self, bank: Bank, cell: Cell, total: Aggregate, covers: tuple[str, ...]) -> Bank:
        return banks.withdraw(
            bank,
            cell.about.id,
            total,
            records=int(total.words[wire.WEIGHT]),
            contributors=int(total.words[wire.METRIC + "contributors"]),
            k_min=self.k_min,
            floor=self.floor(cell.about.kind),
            covers=covers,
        )

    def _removed(
        self, state: State, bank: Bank, before: Sequence[Cell], leavers: Sequence[str]
    ) -> tuple[State, tuple[Cell, ...], int]:
        removed = sum(
            cell.about.records - _records(bank, cell.about.id)
            for cell in before
            if cell.about.kind is self.kinds()[0]
        )
        for site in leavers:
            bank = banks.leave(bank, site)
        return replace(state, bank=bank), tuple(before), removed

    def _retired(self, bank: Bank, number: int) -> Bank:
        """The bank with every open label closed whose end in the catalogue has come."""
        still_open = {entry.code for entry in bank.labels if entry.valid_to is None}
        for label in self._catalogue().labels:
            ended = label.valid_to is not None and label.valid_to <= number
            if ended and label.code in still_open:
                assert label.valid_to is not None
                bank = banks.retire(
                    bank, label.code, valid_to=label.valid_to, replaced_by=label.replaced_by
                )
        return bank

    def _describe(self, number: int, opening: Opening, cohort: Cohort) -> KnowledgeCell:
        recipe = self._recipe(opening.kind)
        slot = opening.slot if opening.kind is CellKind.LORA else None
        labels = self._catalogue().labels
        return KnowledgeCell(
            id=banks.cell_id(
                module=opening.module, kind=opening.kind, round=number, slot=slot, recipe=recipe
            ),
            module=opening.module,
            kind=opening.kind,
            round=number,
            valid=(float(number), None),
            slot=slot,
            recipe=recipe,
            labels=tuple(labels[i].code for i in opening.labels),
            cohort=cohort,
            contributors=0,
            records=opening.records,
            words="",
            privacy=self._rules(),
            base=self.model,
        )

    def _rules(self) -> dict[str, Scalar]:
        """What a cell is opened under; it stays on its record."""
        return {
            "k_min": self.k_min,
            "label_floor": self.label_floor,
            "public_reference": self.public_reference,
        }

    def _audiences(self, bank: Bank, cohort: Cohort) -> list[tuple[tuple[str, ...] | None, Cohort]]:
        """Held sets and the sites of the cohort that have them, at least ``k_min`` each.

        Fewer sites than that share what all of them may hold; sites that are still too few, or
        may hold no live cell, are not asked.
        """
        groups: dict[tuple[str, ...] | None, list[str]] = {}
        for site in cohort:
            groups.setdefault(banks.held(bank, site), []).append(site)
        if None in groups and len(groups) == 1:
            return [(None, cohort)]
        few = [held for held, sites in groups.items() if len(sites) < self.k_min]
        if few:
            every = tuple(module.id for module in bank.modules)
            rest = [site for held in few for site in groups.pop(held)]
            common = tuple(m for m in every if all(held is None or m in held for held in few))
            groups.setdefault(common, []).extend(rest)
        live = {cell.about.module for cell in bank.cells}
        return [
            (held, tuple(site for site in cohort if site in sites))
            for held, sites in groups.items()
            if len(sites) >= self.k_min and (held is None or live & set(held))
        ]

    def _readers(self, scopes: Sequence[str], roster: Cohort) -> dict[str, Cohort]:
        """The sites that may hold each scope, where some may not."""
        found = {
            scope: tuple(s for s in roster if scope in self.access.get(s, (scope,)))
            for scope in scopes
        }
        # No name at all would mean everybody; nobody is called "".
        return {scope: sites or ("",) for scope, sites in found.items() if sites != roster}

    def _touched(self, bank: Bank, cells: Sequence[str], cohort: Cohort, clients: Clients) -> Bank:
        """The bank with these cells live and apart from any sum or fused adapter."""
        collect = partial(self._collect, bank, cohort, clients)
        return upkeep.touch(bank, cells, self.cold, collect)

    def _out_of_reach(self, bank: Bank, cohort: Cohort) -> set[tuple[int, int]]:
        """Places of cells that cannot be changed: of what was purged with them, a site is away."""
        lost = {
            about.id
            for about in bank.cold
            if about.status is Status.PURGED and not set(about.cohort) <= set(cohort)
        }
        if not lost:
            return set()
        return {
            self._place(about)
            for about in banks.origins(bank)
            if about.kind is not CellKind.SCATTER and lost & set(compact.needed(bank, [about.id]))
        }

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
            partial(self._collect, bank, cohort, clients),
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

    def _collect(self, bank: Bank, cohort: Cohort, clients: Clients, about: KnowledgeCell) -> Cell:
        """A cell that was purged from the archive, summed again by every site that filled it.

        It shows nothing new: it is the very sum that was sealed, which its hash proves. Raises
        ForgetIncomplete if a site is away or a journal does not give the same integers.
        """
        members = tuple(site for site in cohort if site in about.cohort)
        away = sorted(set(about.cohort) - set(members))
        if not away:
            places = self._places(bank, about)
            asked = self._about_cell("recount", about, places, loss=Loss(request=PURGED))
            again = clients.sum(members, asked)
            away = sorted(set(members) - set(again.cohort))
            if not away and banks.content(about.labels, again) == about.words:
                grid = self._about_cell("fill", about, places).grid
                return Cell(about=about, total=replace(again, grid=grid))
        why = f"{away} do not answer" if away else "their journals give other integers"
        raise ForgetIncomplete(
            f"cell {about.id} of {about.module}, round {about.round}, was purged from the archive "
            f"and cannot be summed again: {why}; nothing was changed, ask again when they are "
            "back, or forget the whole module"
        )

    def _recipe(self, kind: CellKind) -> dict[str, Scalar]:
        """What every addend to a cell of this kind must share."""
        base: dict[str, Scalar] = {"base": self.base} if self.base else {}
        if kind in (CellKind.ANALYTIC, CellKind.SCATTER):
            return {"features": self.features, "bits": self.bits, "seed": self.feature_seed, **base}
        if kind is CellKind.ROUTER:
            return base
        return {
            "rank": self.rank,
            "scale": self.scale,
            "basis_seed": self.basis_seed,
            "merge": self.merge,
            "records": self.lora_records,
            "steps": self.lora_steps,
            "batch": self.batch,
            "lr": self.lr,
            "clip": self.clip,
            "fraction": self.fraction,
        }

    def _about_cell(
        self,
        step: str,
        about: KnowledgeCell,
        places: Sequence[tuple[int, int]],
        *,
        loss: Loss | None = None,
        whole: Sequence[tuple[int, int]] = (),
        against: bool = False,
    ) -> Broadcast:
        """Ask for one cell, the sum over ``places``: (round, scope) in a site's journal.

        Under a ``loss`` answers are integers on the cell's grid, and all of the places ``whole``
        goes besides.
        """
        loss = loss or Loss(request="")
        position = {label.code: i for i, label in enumerate(self._catalogue().labels)}
        cell = [tuple(CellKind).index(about.kind), -1 if about.slot is None else about.slot]
        if about.kind is CellKind.LORA:
            factors = ("lora_B", "gram") if self.merge == "gram" else ("lora_B",)
            names = [f"{layer}.{factor}" for layer in self.targets for factor in factors]
            scale = dict.fromkeys(names, 0 if loss.request else self.fraction)
        else:
            rows = (statistics.SUMS, statistics.COUNTS)
            parts = {
                CellKind.ANALYTIC: rows,
                CellKind.SCATTER: (statistics.GRAM,),
                CellKind.ROUTER: (statistics.GRAM, *rows),
            }
            scale = dict.fromkeys(parts[about.kind], 0)
        tensors = {
            "cell": torch.tensor(cell, dtype=torch.int64),
            "places": torch.tensor(places, dtype=torch.int64).reshape(-1, 2),
            "whole": torch.tensor(whole, dtype=torch.int64).reshape(-1, 2),
            "part": torch.tensor(loss.places, dtype=torch.int64).reshape(-1, 2),
            "number": torch.tensor(loss.number),
            "labels": torch.tensor([position[c] for c in about.labels], dtype=torch.int64),
            "against": torch.tensor(against),
            # Two removals from one cell are two questions, so the outbox keeps them apart.
            "request": torch.tensor(list(loss.request.encode()), dtype=torch.uint8),
        }
        if step == "fill" and about.kind in (CellKind.ANALYTIC, CellKind.ROUTER):
            tensors |= adaptation.carried(self.factors)
        return ask(
            self,
            step,
            about.round,
            tensors,
            word=self._word(about),
            scale=scale,
            metrics={"contributors": 0},
            bounded=about.kind in (CellKind.ANALYTIC, CellKind.SCATTER),
        )

    def _word(self, about: KnowledgeCell) -> int:
        """Bits of a word of a sum over the records of a cell; a vote has counted them."""
        if about.kind is CellKind.ROUTER:
            return 64
        if about.kind is CellKind.LORA:
            return 32
        part = statistics.GRAM if about.kind is CellKind.SCATTER else statistics.SUMS
        return statistics.word(part, bits=self.bits, records=about.records)

    def _place(self, about: KnowledgeCell) -> tuple[int, int]:
        """Where the records of a cell stand in a journal: its round and the number of its scope."""
        return about.round, self._catalogue().scopes().index(banks.scope(about))

    def _places(self, bank: Bank, about: KnowledgeCell) -> list[tuple[int, int]]:
        if about.kind is not CellKind.SCATTER:
            return [self._place(about)]
        home = {a.id: a for a in (*(cell.about for cell in bank.cells), *bank.cold)}
        covered = [home[name] for name in about.covers]
        return [self._place(part) for each in covered for part in banks.parts_of(bank, each)]

    # --- private, client --------------------------------------------------------------------------

    def _reconcile(self, client: Client, asked: Broadcast) -> None:
        """Forget the journal of attempts that were never sealed with this site's addend, and LoRA
        factors retrained for a revision that never came about."""
        mine = asked.tensors["members"][:, asked.cohort.index(client.name)]
        scopes = client.catalogue.scopes()
        sealed = {(round, scopes[scope]) for round, scope in asked.tensors["sealed"][mine].tolist()}
        journal.reconcile(client.store, sealed, round=asked.round)
        for draft in (client.store / "receipts").glob(f"*.{journal.REVISION}*"):
            draft.unlink()

    def _codes(self, client: Client, asked: Broadcast) -> tuple[str, ...]:
        return tuple(client.catalogue.labels[i].code for i in asked.tensors["labels"].tolist())

    def _embedded(self, client: Client, asked: Broadcast, data: Dataset) -> Tensor:
        """What enters cells of these records, under the base that the question names."""
        frozen = client.features(data)
        base, _ = adaptation.split(asked.tensors)
        if not base:
            return frozen
        return adaptation.beside(frozen, client.features(data, adapter=base))

    def _entries(self, client: Client, asked: Broadcast) -> dict[Place, journal.Entry]:
        """What this site put into the cell, by place."""
        found = {
            place: journal.read(client.store, *place)
            for place in _asked_places(asked, client.catalogue)
        }
        return {place: entry for place, entry in found.items() if entry}

    def _mine(self, client: Client, asked: Broadcast) -> list[forget.Request]:
        """The requests asked about that were posted here."""
        ids = _requests(asked)
        return [request for request in forget.posted(client.store) if request.id in ids]

    def _gone(self, client: Client, asked: Broadcast) -> dict[Place, frozenset[str]]:
        """Record ids to subtract, by place: those of the request, if it was posted here, old
        versions under a revision, and all of the places that go whole."""
        mine, entries = self._mine(client, asked), self._entries(client, asked)
        names = forget.names(mine, journal.owners(client.store) if mine else ())
        found = {at: forget.under(entry, names) for at, entry in entries.items()}
        gone = {at: records for at, records in found.items() if records}
        if number := int(asked.tensors["number"]):
            part = _asked_places(asked, client.catalogue, "part")
            old = journal.marked(client.store, round=number)
            gone = {place: old[place] for place in part if place in old}
        whole = _asked_places(asked, client.catalogue, "whole")
        return gone | {at: frozenset(entries[at].records) for at in whole if at in entries}

    def _addend(self, client: Client, asked: Broadcast, entries: Iterable[journal.Entry]) -> Update:
        """One site's contribution to one cell; zeros without entries."""
        kind, entry = _kind(asked), journal.join(tuple(entries))
        recipe = {"features": self.features, "bits": self.bits, "seed": self.feature_seed}
        z = entry.z if entry else torch.zeros(0, self.inputs, dtype=torch.int16)
        if kind is CellKind.LORA:
            tensors = self._lora(client, asked, entry)
        elif kind is CellKind.SCATTER:
            tensors = statistics.scatter(z, **recipe)
        else:
            codes = self._codes(client, asked)
            position = {code: i for i, code in enumerate(codes)}
            labels = entry.labels if entry else ()
            rows = torch.tensor([position[code] for code in labels], dtype=torch.int64)
            tensors = (
                statistics.by_label(z, rows, num_rows=len(codes), **recipe)
                if kind is CellKind.ANALYTIC
                else statistics.router(z, rows, num_rows=len(codes))
            )
        return Update(
            client=client.name,
            weight=len(entry) if entry else 0,
            tensors=tensors,
            metrics={"contributors": 1.0 if entry else 0.0},
        )

    def _lora(
        self, client: Client, asked: Broadcast, entry: journal.Entry | None
    ) -> dict[str, Tensor]:
        """(B Gamma, Gamma) by layer for a B trained from zero; the local head is thrown away."""
        zeros: dict[str, Tensor] = {}
        for layer, (d_out, _) in client.targets.items():
            zeros[f"{layer}.lora_B"] = torch.zeros(d_out, self.rank)
            if self.merge == "gram":
                zeros[f"{layer}.gram"] = torch.zeros(self.rank, self.rank, dtype=torch.float64)
        if entry is None:
            return zeros
        slot = int(asked.tensors["cell"][1])
        pinned = basis.slot(client.targets, index=slot, rank=self.rank, seed=self.basis_seed)
        data = self._training_data(client, entry)
        start = {name: value for name, value in zeros.items() if name.endswith(".lora_B")}
        codes = tuple(dict.fromkeys(data.labels))
        if len(codes) > 1:
            start |= _prototypes(entry, codes)
        steps = self.lora_steps or math.ceil(len(data) / self.batch)
        trained = client.fit(
            start,
            data,
            steps=steps,
            batch=self.batch,
            lr=self.lr,
            seed=asked.seed,
            classes=codes,
            pinned=pinned,
        )
        factors = {name: trained[name].to(torch.float64) for name in zeros if name in trained}
        if self.merge == "mean":
            return {name: len(entry) * b for name, b in factors.items()}
        grams = client.grams(trained, data, pinned=pinned)
        addend: dict[str, Tensor] = {}
        for layer in client.targets:
            gram = grams[f"{layer}.gram"]
            addend[f"{layer}.gram"] = gram
            addend[f"{layer}.lora_B"] = factors[f"{layer}.lora_B"] @ gram
        return addend

    def _training_data(self, client: Client, entry: journal.Entry) -> Dataset:
        """The entry's records with their texts, capped by a fixed order of record ids."""
        whole = client.knowledge.versions()
        row = {at: i for i, at in enumerate(zip(whole.records, whole.windows, strict=True))}
        summed = sorted(zip(entry.records, entry.windows, strict=True))
        chosen = [row[version] for version in summed if version in row]
        if self.lora_records:
            step = max(1, len(chosen) // self.lora_records)
            chosen = chosen[::step][: self.lora_records]
        return whole.take(chosen)

    def _words(self, client: Client, asked: Broadcast, update: Update) -> dict[str, Tensor]:
        """An addend on the cell's own grid."""
        scale = {
            name: self.fraction if name.endswith((".lora_B", ".gram")) else bits
            for name, bits in asked.grid.scale.items()
        }
        return wire.words(update, replace(asked.grid, scale=scale), asked.cohort)

    def _keep_receipt(self, client: Client, asked: Broadcast, update: Update) -> None:
        if _kind(asked) is CellKind.LORA and update.weight:
            path = _receipt(client, asked)
            path.parent.mkdir(parents=True, exist_ok=True)
            draft = path.with_suffix(".tmp")
            save_file(self._words(client, asked, update), draft)
            journal.settle(draft, path)

    def _shortened(self, client: Client, asked: Broadcast) -> Dataset:
        summed = journal.used(client.store, before=asked.round + 1)
        whole = client.knowledge.until(asked.round)
        # Of what is held now: records under a removal must not even take a place in the draw.
        versions = zip(whole.records, whole.windows, strict=True)
        ids = sorted(record for record, window in versions if summed.get(record) == window)
        generator = torch.Generator().manual_seed(asked.seed % 2**63)
        order = torch.randperm(len(ids), generator=generator)[:CALIBRATION_RECORDS]
        chosen = {ids[int(i)] for i in order}
        data = whole.take([i for i, record in enumerate(whole.records) if record in chosen])
        return replace(data, texts=tuple(_shorten(text, generator) for text in data.texts))


@dataclass(frozen=True, slots=True, kw_only=True)
class _Counted:
    """Summed votes by position of the scope: sites, records, records by label row that may open,
    and the kinds of cells that may."""

    holders: Sequence[int]
    records: Sequence[int]
    rows: Sequence[Mapping[int, int]]
    kinds: Sequence[tuple[CellKind, ...]]


def _records(bank: Bank, cell: str) -> int:
    return sum(held.about.records for held in bank.cells if held.about.id == cell)


def _kind(asked: Broadcast) -> CellKind:
    """The kind of the cell a broadcast is about."""
    return tuple(CellKind)[int(asked.tensors["cell"][0])]


def _asked_places(
    asked: Broadcast, catalogue: Catalogue, name: str = "places"
) -> tuple[Place, ...]:
    """Round and scope of the journal entries a broadcast is about."""
    scopes = catalogue.scopes()
    return tuple((round, scopes[scope]) for round, scope in asked.tensors[name].tolist())


def _requests(asked: Broadcast) -> tuple[str, ...]:
    """Ids of the requests that a removal carries out together, or the name of a revision."""
    return tuple(bytes(asked.tensors["request"].tolist()).decode().split("+"))


def _batch(asked: Broadcast) -> str:
    return forget.together(_requests(asked))


def _receipt(client: Client, asked: Broadcast, *, suffix: str = ".safetensors") -> Path:
    scope = int(asked.tensors["places"][0, 1])
    return client.store / "receipts" / f"{asked.round:06d}-{scope}{suffix}"


def _integer_update(client: Client, words: Mapping[str, Tensor]) -> Update:
    tensors = {
        name: value
        for name, value in words.items()
        if name != wire.WEIGHT and not name.startswith(wire.METRIC)
    }
    return Update(
        client=client.name,
        weight=float(words[wire.WEIGHT]),
        tensors=tensors,
        metrics={"contributors": float(words[wire.METRIC + "contributors"])},
    )


def _prototypes(entry: journal.Entry, codes: Sequence[str]) -> dict[str, Tensor]:
    """A local head at the class means of the frozen embeddings."""
    position = {code: i for i, code in enumerate(codes)}
    kept = [i for i, code in enumerate(entry.labels) if code in position]
    rows = torch.tensor([position[entry.labels[i]] for i in kept])
    e = entry.z[kept].to(torch.float32) / 1024
    sums = torch.zeros(len(codes), e.shape[1]).index_add_(0, rows, e)
    means = torch.nn.functional.normalize(sums, dim=1)
    return {"head.weight": means, "head.bias": torch.zeros(len(codes))}


def _shorten(text: str, generator: torch.Generator) -> str:
    words = text.split()
    kept = max(1, math.ceil(len(words) / 2))
    order = sorted(torch.randperm(len(words), generator=generator)[:kept].tolist())
    return " ".join(words[i] for i in order)
