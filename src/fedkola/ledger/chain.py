"""Knowledge events chained by hash, each over its predecessor."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import Any

import sqlalchemy as sa

from fedkola.errors import ChainBroken, LedgerError
from fedkola.ledger import documents, tables
from fedkola.types import Event

GENESIS = bytes(32)
_EVENT_TAG = b"fedkola/event/1\0"


def extended(
    connection: sa.Connection,
    run: str,
    number: int,
    events: Sequence[Event],
    now: float,
) -> bytes:
    last = connection.execute(
        sa.select(tables.events.c.seq, tables.events.c.hash)
        .order_by(tables.events.c.seq.desc())
        .limit(1)
    ).first()
    seq, head = (0, GENESIS) if last is None else (last.seq, last.hash)
    rows = []
    for event in events:
        if not set(event) <= {"kind", "subject", "body"} or "kind" not in event:
            raise LedgerError(
                f"event with {sorted(event)} was given; expected kind, subject and body"
            )
        row = {
            "seq": (seq := seq + 1),
            "run": run,
            "round": number,
            "kind": str(event["kind"]),
            "subject": str(event.get("subject", "")),
            "body": event.get("body", {}),
            "at": documents.micros(now),
        }
        prev, head = head, event_hash(row, head)
        rows.append({**row, "prev": prev, "hash": head})
    if rows:
        connection.execute(tables.events.insert(), rows)
    return head


def state_hash(document: Mapping[str, Any]) -> bytes:
    return hashlib.sha256(documents.strict(document, "the state").encode()).digest()


def verified(row: Any, seq: int, run: str, head: bytes) -> bytes:
    """The hash of one event as it should be; ChainBroken if the row differs from it anywhere."""
    try:
        text = row.body.decode()
        event = {
            "seq": row.seq,
            "run": row.run.decode(),
            "round": row.round,
            "kind": row.kind.decode(),
            "subject": row.subject.decode(),
            "body": json.loads(text),
            "at": row.at,
        }
        expected = event_hash(event, head)
        intact = (
            (row.seq, event["run"], row.prev, row.hash) == (seq, run, head, expected)
            # Other spacing or a doubled key would read as the same body.
            and text == documents.strict(event["body"], "the body")
        )
    except (ValueError, TypeError, AttributeError, LedgerError) as error:
        raise ChainBroken(f"event {seq} of {run!r} cannot be read: {error}") from error
    if not intact:
        raise ChainBroken(
            f"event {seq} of {run!r} is not as it was written; restore the ledger from a copy"
        )
    return expected


def reconciled(run: str, heads: Sequence[Any], reached: Mapping[int, bytes], head: bytes) -> str:
    """The head, if every round recorded the head that the chain had after its events."""
    expected = GENESIS
    for number, recorded in heads:
        expected = reached.get(number, expected)
        if recorded != expected:
            raise ChainBroken(
                f"round {number} of {run!r} recorded another chain head than its events give:"
                " events were cut off or replaced; restore the ledger from a copy"
            )
    if heads and head != expected:
        raise ChainBroken(f"events of {run!r} follow a round that was never committed")
    return head.hex()


def event_hash(event: Mapping[str, Any], prev: bytes) -> bytes:
    text = documents.strict(event, f"event {event['kind']}")
    return hashlib.sha256(_EVENT_TAG + prev + text.encode()).digest()
