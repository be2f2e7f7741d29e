"""Wrappers that record what passes, at the two places where an observer may stand.

``Tap`` stands at an engine, where wire and server are: it sees every message to and from every
site, masked or not. ``SumTap`` stands outside secure aggregation, where the algorithm is: it sees
questions and sums. A recorded stack reads ``Guarded(SumTap(SecureSum(Tap(engine))))``. Neither
changes a bit of what passes.

An engine hands over messages decoded. Packing is a function of the message, so packing it again
gives the bytes that travelled: an answer proves it by carrying the hash of its question, and a
payload by the checksum inside it. An answer that was no message at all is recorded as the refusal
that the engine made of it.
"""

from collections.abc import Iterator

from fedkola import wire
from fedkola.audit.transcript import Transcript
from fedkola.errors import ChainBroken
from fedkola.types import Aggregate, Broadcast, Clients, Cohort, Engine, Reply, Tally, Update


class Tap:
    """An engine that records every message that ``inner`` carries."""

    def __init__(self, inner: Engine, transcript: Transcript) -> None:
        self._inner = inner
        self._transcript = transcript
        self._left_out: dict[str, str] = {}

    def roster(self) -> Cohort:
        return self._inner.roster()

    def replies(self, cohort: Cohort, broadcast: Broadcast) -> Iterator[Reply]:
        """The replies of ``inner``, each recorded before it is handed on."""
        message = wire.pack_broadcast(broadcast)
        question = wire.question(message)
        for peer in cohort:
            self._transcript.append(
                message,
                at="wire",
                direction="down",
                peer=peer,
                round=broadcast.round,
                step=broadcast.step,
                question=question,
                sites=cohort,
            )
        for reply in self._inner.replies(cohort, broadcast):
            if reply.question not in ("", question):
                raise ChainBroken(
                    f"{reply.client} answered question {reply.question} and {question} was "
                    "recorded: the engine sent other bytes than it was given; do not audit it"
                )
            self._transcript.append(
                wire.pack_reply(reply),
                at="wire",
                direction="up",
                peer=reply.client,
                round=broadcast.round,
                step=broadcast.step,
                question=question,
                sites=(reply.client,),
                refused=reply.refused,
            )
            yield reply

    def sum(self, cohort: Cohort, broadcast: Broadcast) -> Aggregate:
        found = wire.total(self.replies(cohort, broadcast), broadcast.grid, cohort)
        self._left_out |= wire.left_out(found, cohort)
        return found

    def each(self, cohort: Cohort, broadcast: Broadcast) -> Iterator[Update]:
        return wire.singles(self.replies(cohort, broadcast), broadcast.grid)

    def tally(self) -> Tally:
        """Traffic and refusals of ``inner``, and sites whose answer was left out of a sum."""
        found = self._inner.tally()
        refused = {**self._left_out, **found.refused}
        self._left_out = {}
        return Tally(bytes_down=found.bytes_down, bytes_up=found.bytes_up, refused=refused)


class SumTap:
    """Clients that record every sum with the question it answers."""

    def __init__(self, inner: Clients, transcript: Transcript) -> None:
        self._inner = inner
        self._transcript = transcript

    def roster(self) -> Cohort:
        return self._inner.roster()

    def sum(self, cohort: Cohort, broadcast: Broadcast) -> Aggregate:
        message = wire.pack_broadcast(broadcast)
        question = wire.question(message)
        self._transcript.append(
            message,
            at="sums",
            direction="down",
            peer="sum",
            round=broadcast.round,
            step=broadcast.step,
            question=question,
            sites=cohort,
        )
        found = self._inner.sum(cohort, broadcast)
        self._transcript.append(
            wire.pack_reply(Reply(client="sum", question=question, words=found.words)),
            at="sums",
            direction="up",
            peer="sum",
            round=broadcast.round,
            step=broadcast.step,
            question=question,
            sites=found.cohort,
        )
        return found

    def each(self, cohort: Cohort, broadcast: Broadcast) -> Iterator[Update]:
        """Single answers are recorded where they travel."""
        return self._inner.each(cohort, broadcast)

    def tally(self) -> Tally:
        return self._inner.tally()
