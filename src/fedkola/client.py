"""One site: what it holds, and how a question in bytes becomes an answer in bytes.

``answer`` is the whole interface to the outside: unpack the broadcast, rebuild the algorithm from
the closed table, run the step it names on the site's own records, put the addend on the grid, keep
the answer in the outbox, return it. What goes wrong leaves as a code and nothing else; the text of
an error stays in the site's own log.
"""

import hashlib
import json
import logging
import math
import shutil
import time
import traceback
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from fedkola import wire
from fedkola.algorithms import rebuild
from fedkola.algorithms.robust_lora import MOMENTUM
from fedkola.errors import DataError, FedKolaError, GuardMissing, UnknownCell, UnknownName
from fedkola.files import write_private
from fedkola.knowledge import forget, journal, windows
from fedkola.knowledge.journal import Place
from fedkola.knowledge.stream import Records
from fedkola.plan import Demands
from fedkola.privacy import behind, policy
from fedkola.privacy.answering import Answering
from fedkola.privacy.behind import Behind
from fedkola.privacy.member import Member
from fedkola.privacy.sampling import Sequences
from fedkola.training import evaluate, features, fit, packing, per_unit, pretraining, whole
from fedkola.training.model import Foundation, encode
from fedkola.types import (
    Broadcast,
    Catalogue,
    Client,
    Course,
    Dataset,
    Penalty,
    Reply,
    Update,
    Weights,
)

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class Trainer:
    """What every site of one machine shares: the frozen base, its cache, and LoRA's scale."""

    foundation: Foundation
    cache: features.FeatureCache
    targets: Mapping[str, tuple[int, int]]
    scale: float
    clip: float


class Site:
    """A client of the federation with its own records and its own private folder."""

    def __init__(
        self,
        name: str,
        data: Dataset,
        *,
        catalogue: Catalogue,
        trainer: Trainer,
        store: Path,
        held_out: Dataset | None = None,
        remembers: Callable[[int], bool] | None = None,
        demands: Demands | None = None,
        member: Member | None = None,
        rounds: int = 1,
        budget: float = math.inf,
    ) -> None:
        """``remembers`` says of a round whether the site keeps what stood behind its answers, for
        an audit of a recorded run; None keeps nothing. ``demands`` None are the strict ones. With
        ``member`` the site answers under secure aggregation and in no other way. ``budget`` is the
        epsilon that the site spends at most, whatever a plan allows."""
        self.name = name
        self.held_out = held_out or data.take(())
        self.catalogue = catalogue
        self.store = store
        self.targets = trainer.targets
        self._trainer = trainer
        self._data = data
        self._remembers = remembers
        self._demands = demands or Demands()
        self._behind = Behind()
        self._member = member
        self._packed: tuple[Any, tuple[list[list[int]], list[str]]] | None = None
        self._rounds = rounds
        self._budget = budget
        self._guarded: Answering | None = None
        self._scopes = {label.code: label.scope for label in catalogue.labels}
        store.mkdir(parents=True, exist_ok=True)

    @property
    def knowledge(self) -> Records:
        """The site's records, without those it was asked to forget."""
        data = self._data.take(self._kept()) if self._accepted() else self._data
        return Records(data, self._rounds)

    def answer(self, message: bytes) -> bytes:
        """The answer to one question, the same bytes whenever the same question is asked again."""
        try:
            asked = wire.unpack_broadcast(message)
            if self._member is not None:
                return self._member.answer(asked, message, self._words)
            kept = self._outbox(asked, message)
            if kept.exists():
                return kept.read_bytes()
            answer = wire.pack_reply(self._reply(asked, message, kept))
            write_private(kept, answer, durable=False)
        except FedKolaError as error:
            self._log(f"{type(error).__name__}: {error}")
            why = error.code or type(error).__name__
            return wire.pack_reply(Reply(client=self.name, refused=why))
        except Exception:  # the boundary: no text of an error may leave the site
            self._log(traceback.format_exc())
            return wire.pack_reply(Reply(client=self.name, refused="StepFailed"))
        return answer

    def fit(
        self,
        weights: Weights,
        data: Dataset,
        *,
        steps: int,
        batch: int,
        lr: float,
        seed: int,
        classes: Sequence[str] = (),
        pinned: Weights | None = None,
        penalty: Penalty | None = None,
    ) -> Weights:
        """Train on this site's records; an encoder without a head has nothing to learn from."""
        if self._trainer.foundation.kind == "causal":
            # Its answers are text: a head of labels is no part of what it computes.
            weights = {name: v for name, v in weights.items() if not name.startswith("head.")}
        labels = self._targets(weights, data, classes, pinned)
        if self._trainer.foundation.kind == "encoder" and labels is None:
            return dict(weights)
        self._note("adapter", data.texts, steps=steps)
        return fit.fit(
            self._trainer.foundation,
            weights,
            data.texts,
            labels,
            steps=steps,
            batch=batch,
            lr=lr,
            seed=self._own_seed(seed),
            scale=self._trainer.scale,
            pinned=pinned,
            prompts=data.prompts,
            penalty=penalty,
        )

    def gradients(
        self,
        weights: Weights,
        data: Dataset,
        *,
        classes: Sequence[str],
    ) -> Weights:
        return fit.gradients(
            self._trainer.foundation,
            weights,
            data.questions,
            self._rows(data, classes),
            scale=self._trainer.scale,
        )

    def importance(
        self,
        weights: Weights,
        data: Dataset,
        *,
        seed: int,
        records: int,
        classes: Sequence[str] = (),
        pinned: Weights | None = None,
    ) -> Weights:
        return fit.importance(
            self._trainer.foundation,
            weights,
            data.texts,
            self._targets(weights, data, classes, pinned),
            records=records,
            seed=self._own_seed(seed),
            scale=self._trainer.scale,
            pinned=pinned,
            prompts=data.prompts,
        )

    def grams(self, weights: Weights, data: Dataset, *, pinned: Weights) -> Weights:
        factors = {name: value for name, value in weights.items() if name.endswith(".lora_B")}
        return fit.grams(
            self._trainer.foundation,
            factors,
            data.texts,
            pinned=pinned,
            scale=self._trainer.scale,
            clip=self._trainer.clip,
            prompts=data.prompts,
        )

    def features(self, data: Dataset, *, adapter: Weights | None = None) -> Tensor:
        """Of the prompts where there are some: what is known before the answer."""
        cache = self._trainer.cache.under(adapter or {}, scale=self._trainer.scale)
        return cache.integers(data.questions)

    def evaluate(
        self, weights: Weights, data: Dataset, *, classes: Sequence[str] = ()
    ) -> Mapping[str, float]:
        labels = self._rows(data, classes) if "head.weight" in weights else None
        foundation, scale = self._trainer.foundation, self._trainer.scale
        if labels is None:
            return evaluate.perplexity(
                foundation, weights, data.texts, scale=scale, prompts=data.prompts
            )
        return evaluate.classify(foundation, weights, data.questions, labels, scale=scale)

    def pretrain(
        self,
        weights: Weights,
        data: Dataset,
        course: Course,
        *,
        kept: Weights,
        seed: int,
    ) -> tuple[Weights, Weights]:
        """Train the whole model on packed texts; with noise where the question says so."""
        own = self._own_seed(seed)
        if self._guarded is not None and self._guarded.trains_under():
            return self._pretrain_noisily(self._guarded, weights, data, course, kept, own)
        sequences = self._sequences(data, course.length)[0]
        batches = pretraining.drawn(sequences, course, kept=kept, seed=own)
        self._behind = self._behind.and_then(
            Behind(
                kind="whole",
                sequences=tuple(tuple(row) for batch in batches for row in batch),
                steps=course.steps,
                adaptive=course.optimiser == "adamw",
            )
        )
        return pretraining.advance(
            self._trainer.foundation, weights, batches, course, kept=kept, seed=own
        )

    def clipped(self, weights: Weights, data: Dataset, *, length: int) -> Weights:
        """Raises GuardMissing for a question without a guard that samples and clips units."""
        if self._guarded is None or not self._guarded.unit:
            raise GuardMissing(
                "clipped gradients were asked for without a guard for single units; set "
                "privacy.epsilon and privacy.level"
            )
        taken, seed = self._guarded.sampled(self._units(data, length, self._guarded.unit))
        foundation, shorten = self._trainer.foundation, self._guarded.shorten
        return per_unit.clipped_sum(foundation, weights, taken, shorten, seed=seed)[0]

    def nll(self, weights: Weights, data: Dataset, *, length: int, rows: int) -> Tensor:
        sequences = self._sequences(data, length)[0][:rows]
        return whole.nll(self._trainer.foundation, weights, sequences)

    def tokens(self, data: Dataset, *, length: int) -> int:
        return sum(map(len, self._sequences(data, length)[0]))

    def concerned(self, *requests: forget.Request) -> list[dict[Place, frozenset[str]]]:
        """(round, scope) -> records concerned, request by request; empty where there are none."""
        entries = journal.entries(self.store)
        found = []
        for request in requests:
            if request.site not in ("", self.name):
                raise DataError(f"this is {self.name}, the request is for {request.site}")
            try:
                found.append(forget.concerned(self.store, request, entries))
            except UnknownCell:
                found.append({})
        return found

    def holds(self, request: forget.Request) -> bool:
        """Whether the site has a record under the request, contributed or still waiting."""
        if request.site not in ("", self.name):
            return False
        return len(forget.left(self._data, (request,), self._scopes)) < len(self._data)

    def post(self, *requests: forget.Request) -> dict[Place, frozenset[str]]:
        """Accept removals: from now on these records are never contributed again.

        Returns (round, scope) -> records concerned, none where all of them still wait; raises
        UnknownCell if the site has no record under one of the requests.
        """
        chosen: dict[Place, frozenset[str]] = {}
        for request, places in zip(requests, self.concerned(*requests), strict=True):
            if not places and not self.holds(request):
                forget.concerned(self.store, request)
            for place, records in places.items():
                chosen[place] = chosen.get(place, frozenset()) | records
        forget.post(self.store, *requests)
        # Answers to a round that is not committed hold the records; they are computed anew.
        self._drop_outbox()
        return chosen

    def forgotten(self, request: forget.Request) -> forget.Request | None:
        """The earlier request under which these records were forgotten already, if there is one."""
        return forget.covering(self._data, request, self._accepted(), self._scopes)

    def revise(self, places: Collection[tuple[int, str]], *, round: int) -> None:
        """Let go of old versions that a committed round has taken out of these places."""
        journal.revise(self.store, places, round=round)
        forget.adopt(self.store, journal.revision(round))

    def finish(self) -> None:
        """Drop kept answers and secrets when a run is done: nothing will be asked again."""
        self._drop_outbox()
        shutil.rmtree(self.store / MOMENTUM, ignore_errors=True)
        if self._member is not None:
            self._member.finish()

    def settle(self, *requests: forget.Request, batch: str = "") -> None:
        """Delete what the site kept about removed records, after the bank has changed."""
        forget.settle(self.store, *requests, batch=batch)
        kept = set(self._kept())
        windows.retain(self.store, records={self._data.records[i] for i in kept})
        gone = [text for i, text in enumerate(self._data.questions) if i not in kept]
        self._trainer.cache.forget(gone)
        behind.erase(self.store)
        self._drop_outbox()

    # --- private ----------------------------------------------------------------------------------

    def _reply(self, asked: Broadcast, message: bytes, kept: Path) -> Reply:
        """A new answer, paid for; to be kept under this path."""
        self._behind = Behind()
        self._guarded = Answering(
            asked, store=self.store, key=kept.with_suffix(".key"), budget=self._budget
        )
        update = self._guarded.update(_step(asked)(self, asked))
        self._gate(asked, update)
        words = self._guarded.words(wire.words(update, asked.grid, asked.cohort))
        self._remember(asked, message, words)
        self._guarded.charge()
        return Reply(
            client=self.name,
            question=wire.question(message),
            words=words,
            word=asked.grid.word,
        )

    def _words(self, question: bytes) -> Weights:
        """The integers that a masked answer hides: the same whenever the same question comes, also
        in another exchange."""
        asked = wire.unpack_broadcast(question)
        kept = self._outbox(asked, question)
        if kept.exists():
            return wire.unpack_reply(kept.read_bytes()).words
        reply = self._reply(asked, question, kept)
        write_private(kept, wire.pack_reply(reply), durable=False)
        return reply.words

    def _targets(
        self, weights: Weights, data: Dataset, classes: Sequence[str], pinned: Weights | None
    ) -> list[int] | None:
        """Rows of the head to be learnt, None where there is no head."""
        if "head.weight" not in {**weights, **(pinned or {})}:
            return None
        return self._rows(data, classes)

    def _note(self, kind: behind.Kind, texts: Sequence[str], *, steps: int) -> None:
        """Note what an answer is trained on, by an optimiser of Adam's kin."""
        # An encoder's adapter is under no gate, so its texts are encoded for an audit alone.
        if self._remembers is None and self._trainer.foundation.kind == "encoder":
            return
        rows = encode(self._trainer.foundation, texts)
        self._behind = self._behind.and_then(
            Behind(kind=kind, sequences=tuple(map(tuple, rows)), steps=steps, adaptive=True)
        )

    def _gate(self, asked: Broadcast, update: Update) -> None:
        """Raises PolicyRefused for a trained answer that must not leave."""
        if not self._behind.kind:
            return
        foundation = self._trainer.foundation
        tables = whole.tables(foundation) if self._behind.kind == "whole" else frozenset()
        ranks = [min(v.shape) for n, v in update.tensors.items() if n.endswith(".lora_B")]
        policy.gate(
            self._demands,
            policy.Answer(
                sites=len(asked.cohort),
                masked=self._member is not None,
                noisy=bool(asked.guards),
                tables=tuple(name for name in update.tensors if name in tables),
                width=foundation.width,
                # An encoder's adapter learns labels; only that of a language model is text.
                rank=max(ranks, default=0) if foundation.kind == "causal" else 0,
                behind=self._behind,
            ),
            protocol=policy.protocol_hash(asked.algorithm, asked.guards),
            rehearsal=_rehearsal(self.store / policy.REHEARSAL),
            now=time.time(),
        )

    def _remember(self, asked: Broadcast, message: bytes, words: Weights) -> None:
        if self._remembers is not None and self._behind.kind and self._remembers(asked.round):
            behind.keep(
                self.store,
                round=asked.round,
                step=asked.step,
                question=wire.question(message),
                behind=self._behind,
                words=words,
            )

    def _pretrain_noisily(
        self,
        guarded: Answering,
        weights: Weights,
        data: Dataset,
        course: Course,
        kept: Weights,
        seed: int,
    ) -> tuple[Weights, Weights]:
        """DP-SGD in place of the plain gradient; the budget is asked before the first step."""
        foundation = self._trainer.foundation

        def summed(held: Weights, units: Sequence[Sequences], own: int) -> Weights:
            return per_unit.clipped_sum(foundation, held, units, guarded.shorten, seed=own)[0]

        units = self._units(data, course.length, guarded.unit)
        noisy = guarded.gradient(units, course.steps, summed)
        nothing: list[list[Sequence[int]]] = [[] for _ in range(course.steps)]
        found = pretraining.advance(
            foundation, weights, nothing, course, kept=kept, seed=seed, gradient=noisy
        )
        noisy.done()
        read = tuple(tuple(row) for row in noisy.read)
        self._behind = self._behind.and_then(
            Behind(
                kind="whole",
                sequences=read,
                steps=course.steps,
                adaptive=course.optimiser == "adamw",
            )
        )
        return found

    def _units(self, data: Dataset, length: int, unit: str) -> list[list[list[int]]]:
        """The sequences of every patient, or of every record; a record without one stands alone."""
        pairs = zip(data.patients, data.records, strict=True)
        owners = [patient or record for patient, record in pairs]
        if unit == "record":
            owners = list(data.records)
        held: dict[str, list[list[int]]] = {}
        for sequence, owner in zip(*self._sequences(data, length, owners), strict=True):
            held.setdefault(owner, []).append(sequence)
        return list(held.values())

    def _sequences(
        self, data: Dataset, length: int, owners: Sequence[str] = ()
    ) -> tuple[list[list[int]], list[str]]:
        """Packed texts and, where there are owners, whose each is, so that none mixes two of them;
        the last ones are kept, as rounds ask again."""
        key = (data.texts, tuple(owners), length)
        if self._packed is None or self._packed[0] != key:
            found = packing.pack(
                self._trainer.foundation,
                data.texts,
                owners or data.patients,
                length=length,
                apart=bool(owners),
            )
            self._packed = (key, found)
        return self._packed[1]

    def _accepted(self) -> tuple[forget.Request, ...]:
        return forget.accepted(self.store)

    def _kept(self) -> list[int]:
        return forget.left(self._data, self._accepted(), self._scopes)

    def _rows(self, data: Dataset, classes: Sequence[str]) -> list[int]:
        """The head's row of every record: the one class among the label and its ancestors."""
        row = {name: i for i, name in enumerate(classes)}
        path = {label.code: label.path for label in self.catalogue.labels}
        return [next(row[node] for node in path[code] if node in row) for code in data.labels]

    def _own_seed(self, seed: int) -> int:
        digest = hashlib.sha256(f"fedkola/site/1/{seed}/{self.name}".encode()).digest()
        return int.from_bytes(digest[:8], "little") >> 2

    def _outbox(self, asked: Broadcast, message: bytes) -> Path:
        """Where the answer to this question is kept.

        Answers of earlier rounds are dropped, and those of this round to another cohort: a round
        that is voted on again with fewer sites starts over, in the journal too.
        """
        folder = self.store / "outbox"
        cohort = hashlib.sha256(json.dumps(asked.cohort).encode()).hexdigest()[:16]
        current = folder / f"{cohort}-{asked.round}"
        if folder.exists():
            for old in folder.iterdir():
                if old != current and int(old.name.split("-", 1)[1]) <= asked.round:
                    shutil.rmtree(old)
        return current / hashlib.sha256(message).hexdigest()

    def _drop_outbox(self) -> None:
        if (self.store / "outbox").exists():
            shutil.rmtree(self.store / "outbox")

    def _log(self, text: str) -> None:
        logger.warning("site %s: %s", self.name, text)
        with (self.store / "site.log").open("a", encoding="utf-8") as file:
            file.write(text.rstrip() + "\n")


def _step(asked: Broadcast) -> Callable[[Client, Broadcast], Update]:
    steps = rebuild(asked.algorithm).steps()
    if asked.step not in steps:
        raise UnknownName(f"{asked.algorithm.get('name')} has no step {asked.step!r}")
    return steps[asked.step]


def _rehearsal(path: Path) -> Mapping[str, Any] | None:
    """What the operator put into the site's folder, None where there is nothing to be read."""
    try:
        found = json.loads(path.read_bytes())
    except (OSError, ValueError):
        return None
    return found if isinstance(found, dict) else None
