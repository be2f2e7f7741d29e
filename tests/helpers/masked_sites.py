"""Sites that answer given integers under MaskedSum, without a model or records."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from torch import Tensor

from fedkola import wire
from fedkola.engines.in_process import InProcess
from fedkola.errors import FedKolaError, Unreachable
from fedkola.privacy import secure_sum
from fedkola.privacy.member import ASK, REVEAL, Member, Rules
from fedkola.privacy.secure_sum import Enrolled, SecureSum
from fedkola.types import Broadcast, Grid, Reply

RULES = Rules(plan_hash=bytes([1]) * 32, manifest_hash=bytes([2]) * 32)
Answer = Callable[[bytes], bytes]


@dataclass(kw_only=True)
class MaskedSite:
    """A site with an addend; ``away`` names the messages of the protocol that never reach it."""

    name: str
    member: Member
    addend: Mapping[str, Tensor]
    away: set[str] = field(default_factory=set)
    words: Callable[[bytes], Mapping[str, Tensor]] | None = None
    heard: list[tuple[Broadcast, bytes, bytes]] = field(default_factory=list)
    refused: list[str] = field(default_factory=list)

    def answer(self, message: bytes) -> bytes:
        asked = wire.unpack_broadcast(message)
        if asked.step in self.away:
            raise Unreachable("this site is away")
        try:
            answer = self.member.answer(asked, message, self.words or self._given)
        except FedKolaError as error:
            why = error.code or type(error).__name__
            self.refused.append(why)
            return wire.pack_reply(Reply(client=self.name, refused=why))
        self.heard.append((asked, message, answer))
        return answer

    def _given(self, question: bytes) -> Mapping[str, Tensor]:
        return self.addend

    def last(self, step: str) -> tuple[Broadcast, bytes, bytes]:
        """The last question of this step, its bytes, and what was answered."""
        return next(h for h in reversed(self.heard) if h[0].step == step)


@dataclass(kw_only=True)
class Masked:
    """Some sites of one roster, and the sum over them."""

    sites: dict[str, MaskedSite]
    enrolled: Enrolled
    clients: SecureSum
    folder: Path

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(self.sites)

    def restart(self, name: str) -> None:
        """The site's process dies and starts again from what lies on its disk."""
        site = self.sites[name]
        site.member = self.enrolled.member(name, self.folder / name)


def names(count: int) -> tuple[str, ...]:
    return tuple(f"site-{i:03d}" for i in range(count))


def masked(
    folder: Path,
    addends: Sequence[Mapping[str, Tensor]],
    *,
    order: int = 0,
    exchanges: int = 4,
    rules: Rules = RULES,
) -> Masked:
    """As many sites as there are addends, enrolled in ``folder``."""
    stores = {name: folder / name for name in names(len(addends))}
    enrolled = secure_sum.enrol(folder / "server", stores, rules)
    sites = {
        name: MaskedSite(name=name, member=enrolled.member(name, store), addend=addend)
        for (name, store), addend in zip(stores.items(), addends, strict=True)
    }
    engine = InProcess({name: site.answer for name, site in sites.items()}, order=order)
    clients = SecureSum(
        engine,
        roster=enrolled.roster,
        key=enrolled.key,
        folder=enrolled.folder,
        rules=rules,
        exchanges=exchanges,
    )
    return Masked(sites=sites, enrolled=enrolled, clients=clients, folder=folder)


def question(cohort: Sequence[str], *, word: int = 32, round: int = 1, bits: int = 0) -> Broadcast:
    """A question for a tensor x, the weight and a metric n."""
    grid = Grid(word=word, bits=bits or word, scale={"weight": 0, "x": 0, "metric/n": 0})
    return Broadcast(
        run="masked",
        round=round,
        step="add",
        cohort=tuple(cohort),
        tensors={"theta": torch.zeros(3)},
        grid=grid,
        algorithm={"name": "Addition"},
    )


def addend(x: Sequence[int], *, word: int = 32, weight: int = 1, n: int = 0) -> dict[str, Tensor]:
    """An addend as the wire makes it of integers."""
    kind = {16: torch.int16, 24: torch.int32, 32: torch.int32}.get(word, torch.int64)
    values = {"x": x, "weight": weight, "metric/n": n}
    return {name: torch.tensor(value, dtype=kind) for name, value in values.items()}


def message(asked: Broadcast, **changes: bytes) -> bytes:
    """A message of the protocol with other frames."""
    tensors = {
        name: torch.frombuffer(bytearray(changes.get(name, b"")), dtype=torch.uint8)
        if name in changes
        else value
        for name, value in asked.tensors.items()
    }
    return wire.pack_broadcast(replace(asked, tensors=tensors))


__all__ = ["ASK", "REVEAL", "MaskedSite", "addend", "masked", "message", "names", "question"]
