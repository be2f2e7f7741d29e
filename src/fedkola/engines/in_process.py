"""The default engine: sites share this process, their messages cross the same codec as anywhere.

Every question is packed to bytes once; every site unpacks it, answers in bytes, and the words are
added one reply at a time, so memory does not grow with the cohort.
"""

import logging
import random
from collections.abc import Callable, Iterator, Mapping

from fedkola import wire
from fedkola.errors import EngineError, StaleUpdate, Unreachable, WireError
from fedkola.types import Aggregate, Broadcast, Cohort, Reply, Tally, Update

logger = logging.getLogger(__name__)

Answer = Callable[[bytes], bytes]


class InProcess:
    """An engine over ``sites``: name -> a function from message bytes to message bytes.

    ``order`` 0 asks sites in the order of the cohort; any other number shuffles the order in which
    replies arrive, which must not change a bit of the result. ``most`` is the number of records
    that one site may answer for (0: any), ``max_bytes`` the longest answer that is read.
    """

    def __init__(
        self,
        sites: Mapping[str, Answer],
        *,
        order: int = 0,
        most: int = 0,
        max_bytes: int = wire.MAX_BODY_BYTES,
    ) -> None:
        if not sites:
            raise Unreachable("an engine needs at least one site")
        self._sites = dict(sites)
        self._arrival = random.Random(order) if order else None
        self._most, self._max_bytes = most, max_bytes
        self._down = self._up = 0
        self._refused: dict[str, str] = {}

    def roster(self) -> Cohort:
        return tuple(self._sites)

    def replies(self, cohort: Cohort, broadcast: Broadcast) -> Iterator[Reply]:
        """One reply per site of the cohort, as they arrive."""
        message = wire.pack_broadcast(broadcast)
        order = list(cohort)
        if self._arrival:
            self._arrival.shuffle(order)
        for name in order:
            yield self._ask(name, message, broadcast)

    def sum(self, cohort: Cohort, broadcast: Broadcast) -> Aggregate:
        found = wire.total(self.replies(cohort, broadcast), broadcast.grid, cohort)
        self._refused = {**wire.left_out(found, cohort), **self._refused}
        return found

    def each(self, cohort: Cohort, broadcast: Broadcast) -> Iterator[Update]:
        return wire.singles(self.replies(cohort, broadcast), broadcast.grid)

    def tally(self) -> Tally:
        """Traffic and refusals since the last call; the counters start again."""
        found = Tally(bytes_down=self._down, bytes_up=self._up, refused=dict(self._refused))
        self._down = self._up = 0
        self._refused = {}
        return found

    def _ask(self, name: str, message: bytes, asked: Broadcast) -> Reply:
        """One site's answer; what goes wrong is a refusal of that site, never of the round."""
        try:
            reply = self._read(name, message, asked)
        except (EngineError, StaleUpdate) as error:
            logger.warning("site %s: %s: %s", name, type(error).__name__, error)
            reply = Reply(client=name, refused=type(error).__name__)
        if reply.refused:
            self._refused[name] = reply.refused
        return reply

    def _read(self, name: str, message: bytes, asked: Broadcast) -> Reply:
        if name not in self._sites:
            raise Unreachable(f"no site {name!r}")
        self._down += len(message)
        try:
            answer = self._sites[name](message)
        except Exception as error:  # a site answers bytes; one that raises is as good as gone
            raise Unreachable(f"it raised {error!r}") from error
        self._up += len(answer)
        reply = wire.unpack_reply(answer, max_bytes=self._max_bytes)
        if reply.client != name:
            raise WireError(f"it answered as {reply.client!r:.80}")
        if not reply.refused and reply.question != wire.question(message):
            raise StaleUpdate(
                "it answered another question, as of an earlier round or a cell that is closed; "
                "not summed"
            )
        wire.check_reply(reply, asked, most=self._most)
        return reply
