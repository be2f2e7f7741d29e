"""QualityScan: which records are wrong, by sums that no record is judged by its own part of.

enrol:   sum of { G, label counts, moments of z, checked pairs }           what is there?
names:   sum of { G, s, n } of the catalogue's own texts, if they are read
move:    sum of region sums, a few times                                   a public codebook
trial:   sum of log-likelihoods of checked labels                          what is evidence worth?
refit:   sum of { s, N, table, scores of trusted records } under beliefs   what should records say?
rank:    sum of { records below the trusted ranks }                        is there noise at all?
verdict: sum of the statistics of what is kept; findings stay at the site  act, if the gate is open

Beliefs (``quality.belief``) start as the labels that were given; trial and refit alternate. Of the
records that a person has checked, two in five choose weights and the first table, the others
calibrate; none is fitted to. Ranks and gate: ``quality.trusted``. Use it alone for a report, or
as a method that learns from what it keeps. Every exchange is a sum, so it runs under masks. The
geometry is that of FedRG (CVPR 2026); leave-one-out sums, beliefs and gate are ours.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import ClassVar, Self

import torch
from torch import Tensor

from fedkola.algorithms import scan_site
from fedkola.algorithms.ask import LOCAL, ask
from fedkola.algorithms.setting import Setting
from fedkola.errors import CohortTooSmall
from fedkola.knowledge import statistics, views
from fedkola.knowledge.statistics import COUNTS, GRAM, SUMS
from fedkola.quality import actions, belief, findings, geometry, kept, margin, trusted
from fedkola.types import (
    Broadcast,
    Client,
    Clients,
    Cohort,
    Dataset,
    Event,
    Reader,
    Steps,
    Update,
    Visibility,
    Weights,
)

MOVES = 5
CHUNK = 4096
WIDE = 64
BOOK_SEED = 7


@dataclass(frozen=True, slots=True, kw_only=True)
class State:
    """The sums of the last scan and what came of it; ``report`` holds numbers only."""

    number: int = 0
    sums: Mapping[str, Tensor] = field(default_factory=dict)
    report: Mapping[str, float] = field(default_factory=dict)
    why: str = ""

    @property
    def weights(self) -> Weights:
        return {}


@dataclass(frozen=True, kw_only=True)
class QualityScan:
    needs: ClassVar[Visibility] = Visibility.SUM
    features: int
    bits: int
    feature_seed: int
    mode: str
    alpha: float
    names: bool
    kappa: float
    min_peers: int
    absorb: bool
    act_above: float = field(metadata=LOCAL, default=0.05)
    trusted_min: int = field(metadata=LOCAL, default=100)
    regions: int = field(metadata=LOCAL, default=512)
    refits: int = field(metadata=LOCAL, default=5)
    k_min: int = field(metadata=LOCAL, default=3)
    lam: float = field(metadata=LOCAL, default=1e-4)
    readout: str = field(metadata=LOCAL, default="pooled")
    level: int = field(metadata=LOCAL, default=0)

    @classmethod
    def of(cls, setting: Setting) -> Self:
        k, q = setting.plan.knowledge, setting.plan.quality
        statistics.check_exact(
            width=setting.width, features=k.features, bits=k.bits, seed=k.basis_seed
        )
        return cls(
            features=k.features,
            bits=k.bits,
            feature_seed=k.basis_seed,
            mode=q.mode,
            alpha=q.alpha,
            names=q.names,
            kappa=q.kappa,
            min_peers=q.min_peers,
            absorb=q.absorb,
            act_above=q.act_above,
            trusted_min=q.trusted_min,
            regions=q.regions,
            refits=q.refits,
            k_min=k.k_min,
            lam=k.lam,
            readout="pooled" if k.readout == "tree" else k.readout,
            level=setting.level,
        )

    # --- server half ------------------------------------------------------------------------------

    def start(self, weights: Weights) -> State:
        return State()

    def round(self, number: int, state: State, cohort: Cohort, clients: Clients) -> State:
        """One scan of all records that have arrived. Raises CohortTooSmall if a site vanishes on
        the way, or if fewer than ``k_min`` answer: a scan is of one moment and one cohort."""
        if len(cohort) < self.k_min:
            raise CohortTooSmall(
                f"{len(cohort)} sites were asked for a scan, {self.k_min} are needed; wait for "
                "more sites or lower knowledge.k_min"
            )
        first = self._sum(number, clients, cohort, "enrol", {}, _ENROL, word=WIDE)
        counts = first[COUNTS]
        if not int(counts.sum()):
            return State(number=number, why="no records were there to scan")
        said = self._said(number, clients, cohort)
        packed = first[GRAM] + said[GRAM]
        gram = statistics.unpack(packed.to(torch.float64), self.features) / self._unit**2
        inverse = margin.inverse(gram)
        public = {
            "centre": _centre(first),
            "known": counts > 0,
            "counts": torch.where(counts >= self.min_peers, counts, 0),
            "inverse": inverse.to(torch.float32),
        }
        public["codebook"] = self._codebook(number, clients, cohort, first, public)
        table = first_table = belief.first_table(first["checked"], counts)
        sums = self._sum(
            number, clients, cohort, "refit", {**public, "turn": torch.tensor(0)}, _REFIT
        )
        carried, asked = sums["by_region"], {}
        for turn in range(1, self.refits + 1):
            summed = sums[SUMS] + belief.UNIT * said[SUMS]
            head = inverse @ (summed.T.to(torch.float64) / (belief.UNIT * self._unit))
            asked = {
                **public,
                "turn": torch.tensor(turn),
                "head": head.to(torch.float32),
                "by_region": sums["by_region"],
            }
            likely = self._sum(number, clients, cohort, "trial", asked, {"likelihood": 20})
            mix = belief.chosen(likely["likelihood"])
            asked |= {
                "mix": torch.tensor(mix, dtype=torch.float64),
                "table": table.to(torch.float32),
            }
            sums = self._sum(number, clients, cohort, "refit", asked, _REFIT)
            table = belief.next_table(sums["written"], first_table)
        calibrated = sums["trusted"]
        ranked = self._sum(
            number,
            clients,
            cohort,
            "rank",
            {"turn": torch.tensor(self.refits), "trusted": calibrated},
            {"low": 0, "flagged": 0},
        )
        gate = trusted.gate(
            int(ranked["low"]),
            int(counts.sum()),
            int(calibrated.sum()),
            at_least=self.act_above,
            trusted_min=self.trusted_min,
        )
        told = {
            **public,
            "turn": torch.tensor(self.refits),
            "trusted": calibrated,
            "open": torch.tensor(gate.open),
            "noise": torch.tensor([gate.noise_low, gate.noise_high], dtype=torch.float64),
            "carried": torch.where(
                carried >= self.min_peers * geometry.PARTS * belief.UNIT, carried, 0
            ),
        }
        del told["inverse"]
        final = self._sum(number, clients, cohort, "verdict", told, _VERDICT, word=WIDE)
        return State(
            number=number,
            sums={name: final[name] + belief.UNIT * said[name] for name in (GRAM, SUMS, COUNTS)},
            report={
                "records": float(counts.sum()),
                "trusted": float(gate.trusted),
                "noise_low": gate.noise_low,
                "noise_high": gate.noise_high,
                "open": float(gate.open),
                "flagged": float(ranked["flagged"].sum()),
                "acted": float(final["acted"]),
            },
            why=gate.why,
        )

    def _said(self, number: int, clients: Clients, cohort: Cohort) -> Weights:
        """Statistics of what the catalogue says of labels, each text once; zeros without names.

        Every site answers the same public numbers, so their sum is so many times one of them.
        """
        if not self.names:
            zero = torch.zeros(1, dtype=torch.int64)
            return {GRAM: zero, SUMS: zero, COUNTS: zero}
        scale = dict.fromkeys((GRAM, SUMS, COUNTS), 0)
        total = self._sum(number, clients, cohort, "names", {}, scale, word=WIDE)
        return {name: total[name] // len(cohort) for name in scale}

    def events(self, before: State, after: State) -> tuple[Event, ...]:
        """What the ledger records of one scan: counts over the cohort, no site and no record."""
        return ({"kind": "SCAN", "subject": f"round {after.number}", "body": dict(after.report)},)

    def answer(
        self, state: State, reader: Reader, texts: Sequence[str], *, site: str = ""
    ) -> Tensor:
        """Scores (n, nodes) of a read-out from the statistics that the last scan kept."""
        found = torch.full((len(texts), len(reader.nodes)), float("-inf"))
        if not state.sums or not bool(state.sums[COUNTS].any()):
            return found
        place = {node: i for i, node in enumerate(reader.nodes)}
        owner = torch.tensor([place[label.path[self.level]] for label in reader.catalogue.labels])
        solved, bias, known = head(
            state.sums, owner, num_nodes=len(place), lam=self.lam, rule=self.readout
        )
        z = reader.features(texts)
        for start in range(0, len(texts), CHUNK):
            phi = self._expand(z[start : start + CHUNK]) * self._unit
            found[start : start + CHUNK, known] = phi @ solved + bias
        return found

    def _sum(
        self,
        number: int,
        clients: Clients,
        cohort: Cohort,
        step: str,
        tensors: Weights,
        scale: Mapping[str, int],
        *,
        word: int = 32,
    ) -> Weights:
        """The summed answers to one question, real where they are on a grid of fractions."""
        question = ask(self, step, number, tensors, word=word, scale=scale)
        total = clients.sum(cohort, question)
        if total.cohort != cohort:
            gone = ", ".join(sorted(set(cohort) - set(total.cohort)))
            raise CohortTooSmall(
                f"{gone} did not answer step {step} of the scan; nothing was acted on, scan again"
            )
        return {
            name: value.to(torch.int64) if not scale.get(name) else value.to(torch.float64)
            for name, value in total.words.items()
        }

    def _codebook(
        self, number: int, clients: Clients, cohort: Cohort, first: Weights, public: Weights
    ) -> Tensor:
        """R unit vectors: drawn from the summed covariance, moved by steps of spherical k-means."""
        size = max(1, min(self.regions, int(first[COUNTS].sum()) // 4))
        width = len(first["total"])
        n = float(first[COUNTS].sum())
        mean = first["total"].to(torch.float64) / n
        spread = statistics.unpack(first["moment"].to(torch.float64), width) / n
        spread = spread - torch.outer(mean, mean)
        values, vectors = torch.linalg.eigh(spread)
        generator = torch.Generator().manual_seed(BOOK_SEED)
        noise = torch.randn(size, width, generator=generator, dtype=torch.float64)
        drawn = (noise * values.clamp(min=0).sqrt()) @ vectors.T
        book = torch.nn.functional.normalize(drawn, dim=1).to(torch.float32)
        for turn in range(MOVES):
            asked = {"centre": public["centre"], "codebook": book, "turn": torch.tensor(turn)}
            moved = self._sum(number, clients, cohort, "move", asked, {"moved": 0})["moved"]
            book = geometry.settled(book, moved)
        return book

    # --- client half ------------------------------------------------------------------------------

    def steps(self) -> Steps:
        return {
            "enrol": self.enrol,
            "names": self.said,
            "move": self.move,
            "trial": self.trial,
            "refit": self.refit,
            "rank": self.rank,
            "verdict": self.verdict,
        }

    def enrol(self, client: Client, asked: Broadcast) -> Update:
        """Gram, counts and moments of the records to scan; pairs of those that guide the scan."""
        data, z, rows = scan_site.scanned(client, asked)
        guide = scan_site.checked(client, asked, judges=False)
        size = len(client.catalogue.labels)
        pairs = torch.zeros(size, size, dtype=torch.int64)
        pairs.index_put_(
            (scan_site.rows(client, guide.right), scan_site.rows(client, guide.data.labels)),
            torch.ones(len(guide.data), dtype=torch.int64),
            accumulate=True,
        )
        moments = statistics.router(z, torch.zeros(len(z), dtype=torch.int64), num_rows=1)
        return Update(
            client=client.name,
            weight=len(data),
            tensors={
                **statistics.scatter(z, **self._recipe),
                COUNTS: torch.bincount(rows, minlength=size),
                "moment": moments[GRAM],
                "total": moments[SUMS][0],
                "checked": pairs,
            },
        )

    def said(self, client: Client, asked: Broadcast) -> Update:
        """The statistics of the catalogue's own texts; they tell nothing of this site."""
        z, owner = scan_site.texts(client)
        size = len(client.catalogue.labels)
        return Update(
            client=client.name,
            weight=1,
            tensors=statistics.analytic(z, owner, num_rows=size, **self._recipe),
        )

    def move(self, client: Client, asked: Broadcast) -> Update:
        """Which region's records go where: one step of spherical k-means."""
        data, z, _ = scan_site.scanned(client, asked)
        directions = geometry.directions(z, asked.tensors["centre"])
        sums, _ = geometry.moved(asked.tensors["codebook"], directions)
        return Update(client=client.name, weight=len(data), tensors={"moved": sums})

    def trial(self, client: Client, asked: Broadcast) -> Update:
        """How likely the labels of the guiding records are, for every weight of the evidence."""
        guide = scan_site.checked(client, asked, judges=False)
        parts = self._evidence(client, asked, guide.data, client.features(guide.data), None)
        found = belief.likelihoods(
            parts, scan_site.rows(client, guide.right), asked.tensors["known"].to(torch.bool)
        )
        return Update(client=client.name, weight=len(guide.data), tensors={"likelihood": found})

    def refit(self, client: Client, asked: Broadcast) -> Update:
        """What the site's records should say as far as all others tell, as statistics; turn 0 takes
        their labels as they are. And how the judging records score by the same evidence."""
        data, z, rows = scan_site.scanned(client, asked)
        turn, size = int(asked.tensors["turn"]), len(client.catalogue.labels)
        histogram = torch.zeros(trusted.BINS, dtype=torch.int64)
        if turn == 0:
            targets = belief.UNIT * torch.nn.functional.one_hot(rows, size)
        else:
            before = kept.targets(client.store, self._part(asked, turn - 1), data.records)
            found = self._believed(client, asked, data, z, rows, before)
            targets = belief.whole(found)
            scores = found.gather(1, rows[:, None])[:, 0]
            kept.keep_scores(client.store, self._part(asked, turn), data.records, scores)
            judge = scan_site.checked(client, asked, judges=True)
            right = scan_site.rows(client, judge.right)
            theirs = self._believed(client, asked, judge.data, client.features(judge.data), right)
            histogram = trusted.histogram(theirs.gather(1, right[:, None])[:, 0])
        kept.keep_targets(client.store, self._part(asked, turn), data.records, targets)
        book = asked.tensors["codebook"]
        gamma, regions = geometry.assign(
            geometry.directions(z, asked.tensors["centre"]), book, kappa=self.kappa
        )
        return Update(
            client=client.name,
            weight=len(data),
            tensors={
                SUMS: scan_site.row_sums(z, targets, **self._recipe),
                "by_region": geometry.counts(gamma, regions, targets, size=len(book)),
                "written": belief.written(targets, rows),
                "trusted": histogram,
            },
        )

    def rank(self, client: Client, asked: Broadcast) -> Update:
        """How many records lie below the level of the gate, and below alpha by label."""
        data, _, rows = scan_site.scanned(client, asked)
        u = self._ranks(client, asked, data)
        size = len(client.catalogue.labels)
        return Update(
            client=client.name,
            weight=len(data),
            tensors={
                "low": (u <= trusted.LEVEL).sum(),
                "flagged": torch.bincount(rows[u <= self.alpha], minlength=size),
            },
        )

    def verdict(self, client: Client, asked: Broadcast) -> Update:
        """Decide on every record, keep the findings here, and answer the statistics of the rest."""
        data, z, rows = scan_site.scanned(client, asked)
        part, codes = self._part(asked, int(asked.tensors["turn"])), client.catalogue.codes()
        targets = kept.targets(client.store, part, data.records)
        book = asked.tensors["codebook"]
        gamma, regions = geometry.assign(
            geometry.directions(z, asked.tensors["centre"]), book, kappa=self.kappa
        )
        own = belief.UNIT * torch.nn.functional.one_hot(rows, len(codes))
        mine = geometry.counts(gamma, regions, own, size=len(book))
        evidence = actions.Evidence(
            records=data.records,
            given=rows,
            ranks=self._ranks(client, asked, data),
            scores=kept.scores(client.store, part, data.records),
            targets=targets,
            near=findings.neighbours(asked.tensors["carried"], mine, gamma, regions),
            peers=asked.tensors["counts"] - torch.bincount(rows, minlength=len(codes)),
        )
        scan = actions.Scan(
            id=part,
            mode=self.mode,
            absorb=self.absorb,
            alpha=self.alpha,
            min_peers=self.min_peers,
            open=bool(asked.tensors["open"]),
            noise=tuple(asked.tensors["noise"].tolist()),
            trusted=int(asked.tensors["trusted"].sum()),
        )
        found = actions.decide(evidence, kept.decisions(client.store), scan)
        kept.keep_findings(client.store, findings.document(found, evidence, scan, client.catalogue))
        gone = [i for i, each in enumerate(found) if each.weight == 0]
        kept.leave_out(client.store, [data.records[i] for i in gone])
        kept.drop_targets(client.store)
        final = actions.final_targets(found, evidence, scan)
        return Update(
            client=client.name,
            weight=len(data),
            tensors={
                GRAM: scan_site.gram(z, final.sum(1), **self._recipe),
                SUMS: scan_site.row_sums(z, final, **self._recipe),
                COUNTS: final.sum(0),
                "acted": torch.tensor(sum(each.acts for each in found)),
            },
        )

    def _believed(
        self,
        client: Client,
        asked: Broadcast,
        data: Dataset,
        z: Tensor,
        rows: Tensor,
        before: Tensor | None = None,
    ) -> Tensor:
        """t (n, C): what records should say; ``before`` is their own part in the sums, if any."""
        parts = self._evidence(client, asked, data, z, before)
        known = asked.tensors["known"].to(torch.bool)
        log_p = belief.blend(parts, asked.tensors["mix"].tolist(), known)
        return belief.believed(log_p, asked.tensors["table"], rows)

    def _evidence(
        self, client: Client, asked: Broadcast, data: Dataset, z: Tensor, before: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """What ridge, regions and label names say of each record, itself left out."""
        given, size = asked.tensors, len(client.catalogue.labels)
        own = torch.zeros(len(z), size, dtype=torch.int64) if before is None else before
        phi = self._expand(z)
        ridge = (phi @ given["head"]).to(torch.float64)
        if before is not None:
            leverage = margin.leverage(phi, given["inverse"].to(torch.float64))
            ridge = margin.without_self(ridge, leverage, own.to(torch.float64) / belief.UNIT)
        gamma, regions = geometry.assign(
            geometry.directions(z, given["centre"]), given["codebook"], kappa=self.kappa
        )
        near = geometry.label_map(given["by_region"], gamma, regions, own, unit=belief.UNIT)
        return ridge, torch.log(near.clamp(min=belief.LEAST)), self._named(client, z)

    def _named(self, client: Client, z: Tensor) -> Tensor | None:
        """How near each record is to what the catalogue says of each label, line by line."""
        if not self.names:
            return None
        said, owner = scan_site.texts(client)
        if not len(said):
            return None
        return belief.nearest_names(z, said, owner, num_labels=len(client.catalogue.labels))

    def _ranks(self, client: Client, asked: Broadcast, data: Dataset) -> Tensor:
        part = self._part(asked, int(asked.tensors["turn"]))
        scores = kept.scores(client.store, part, data.records)
        return trusted.ranks(scores, asked.tensors["trusted"])

    def _part(self, asked: Broadcast, turn: int) -> str:
        return f"scan-{asked.round:06d}-{turn}"

    @property
    def _recipe(self) -> dict[str, int]:
        return {"features": self.features, "bits": self.bits, "seed": self.feature_seed}

    @property
    def _unit(self) -> int:
        """The largest feature: phi / unit lies in [0, 1]."""
        return (1 << self.bits) - 1

    def _expand(self, z: Tensor) -> Tensor:
        return statistics.expand(z, **self._recipe) / self._unit


_ENROL = dict.fromkeys((GRAM, COUNTS, "moment", "total", "checked"), 0)
_REFIT = dict.fromkeys((SUMS, "by_region", "written", "trusted"), 0)
_VERDICT = dict.fromkeys((GRAM, SUMS, COUNTS, "acted"), 0)


def head(
    sums: Weights, owner: Tensor, *, num_nodes: int, lam: float, rule: str
) -> tuple[Tensor, Tensor, Tensor]:
    """V (p, C) and bias (C,) float32 of the C nodes that have records, and their positions (C,).

    ``owner`` (labels,) gives each label's node; sums are those of records times their weights.
    """
    p = sums[SUMS].shape[1]
    counts = torch.zeros(num_nodes, dtype=torch.float64)
    counts.index_add_(0, owner, sums[COUNTS].to(torch.float64))
    rows = torch.zeros(num_nodes, p, dtype=torch.float64)
    rows.index_add_(0, owner, sums[SUMS].to(torch.float64))
    known = torch.nonzero(counts >= belief.UNIT / 2).flatten()
    gram = statistics.unpack(sums[GRAM].to(torch.float64), p)
    within = views.scatter(gram, rows, counts)
    records = float(counts.sum()) / belief.UNIT
    ridge = views.ridge(lam, features=p, records=records)
    solved, bias = views.read_out(within, rows[known], counts[known], rule=rule, lam=ridge)
    return solved, bias, known


def _centre(first: Weights) -> Tensor:
    """The mean (d,) of the integer embeddings, rounded to whole numbers."""
    total = first["total"].to(torch.float64) / max(float(first[COUNTS].sum()), 1.0)
    return total.round().to(torch.float32)
