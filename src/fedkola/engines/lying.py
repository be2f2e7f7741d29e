"""Sites that lie, for rehearsals in one process: what they send in place of their own answers.

A lie is told as if the liar had bypassed its own library: what is too large for a word is sent as
the largest, NaN as NaN. Liars know the honest answers to the question, which sites keep and give
again; so nothing is computed twice.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from fedkola import wire
from fedkola.engines.in_process import Answer
from fedkola.quality.lies import LIES
from fedkola.types import Broadcast, Grid, Reply, Update


def lying(sites: Mapping[str, Answer], liars: Mapping[str, str]) -> dict[str, Answer]:
    """The same sites, those named in ``liars`` under the lie of that name."""
    honest = {name: answer for name, answer in sites.items() if name not in liars}

    def told(name: str, message: bytes) -> bytes:
        answer = sites[name](message)
        own = wire.unpack_reply(answer)
        if own.refused:
            return answer
        asked = wire.unpack_broadcast(message)
        cohort = asked.cohort or tuple(sites)
        others = [wire.unpack_reply(honest[other](message)) for other in cohort if other in honest]
        lie = LIES[liars[name]](
            wire.single(own, asked.grid),
            [wire.single(other, asked.grid) for other in others if not other.refused],
            sum(other in liars for other in cohort),
        )
        return wire.pack_reply(
            Reply(client=name, question=wire.question(message), words=forged(lie, asked))
        )

    def liar(name: str) -> Answer:
        return lambda message: told(name, message)

    return {name: liar(name) if name in liars else answer for name, answer in sites.items()}


def forged(update: Update, asked: Broadcast) -> dict[str, Tensor]:
    """An update as words, without any of the checks of an honest site."""
    reals = {
        **update.tensors,
        wire.WEIGHT: torch.tensor(update.weight, dtype=torch.float64),
        **{
            wire.METRIC + name: torch.tensor(value, dtype=torch.float64)
            for name, value in update.metrics.items()
        },
    }
    return {name: _word(name, value.to(torch.float64), asked.grid) for name, value in reals.items()}


def _word(name: str, value: Tensor, grid: Grid) -> Tensor:
    if bool(value.isnan().any()):
        return value
    kind = torch.int16 if grid.word == 16 else torch.int32 if grid.word <= 32 else torch.int64
    largest = float(2 ** (min(grid.word, 52) - 1) - 1)
    scaled = torch.round(value * 2.0 ** grid.scale.get(name, 0))
    return scaled.clamp(-largest, largest).to(kind)
