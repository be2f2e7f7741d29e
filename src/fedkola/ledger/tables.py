"""The tables of a ledger, its SQLite file, and short questions to it."""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import sqlalchemy as sa

from fedkola.errors import LedgerError
from fedkola.ledger import documents

SCHEMA = 1
DATABASE = "ledger.db"


class Document(sa.types.TypeDecorator[Any]):
    """Canonical JSON kept as text: hashes are over these very bytes."""

    impl = sa.Text
    cache_ok = True

    def process_bind_param(self, value: Any, dialect: sa.Dialect) -> str | None:
        return None if value is None else documents.canonical(value, "a document")

    def process_result_value(self, value: str | None, dialect: sa.Dialect) -> Any:
        try:
            return None if value is None else json.loads(value)
        except ValueError as error:
            raise LedgerError(
                f"a document of the ledger is not JSON ({error}): the file was altered; restore it"
                " from a copy"
            ) from error


HASH = sa.LargeBinary(32)
TABLES = sa.MetaData()

runs = sa.Table(
    "runs",
    TABLES,
    sa.Column("id", sa.Text, primary_key=True),
    sa.Column("plan_json", Document, nullable=False),
    sa.Column("plan_hash", HASH, nullable=False),
    sa.Column("created_at", sa.BigInteger, nullable=False),
    sa.Column("state", sa.Text, nullable=False),
    sa.Column("round", sa.Integer, nullable=False),
)

rounds = sa.Table(
    "rounds",
    TABLES,
    sa.Column("run", sa.ForeignKey("runs.id"), primary_key=True),
    sa.Column("number", sa.Integer, primary_key=True),
    sa.Column("state", Document, nullable=False),  # {"state": ..., "tensors": {name: blob}}
    sa.Column("state_hash", HASH, nullable=False),
    sa.Column("sampler", Document, nullable=False),
    sa.Column("report", Document, nullable=False),
    sa.Column("committed_at", sa.BigInteger, nullable=False),
    sa.Column("chain_head", HASH, nullable=False),
)

events = sa.Table(
    "events",
    TABLES,
    sa.Column("seq", sa.BigInteger, primary_key=True, autoincrement=False),
    sa.Column("run", sa.ForeignKey("runs.id"), nullable=False),
    sa.Column("round", sa.Integer, nullable=False),
    sa.Column("kind", sa.Text, nullable=False),
    sa.Column("subject", sa.Text, nullable=False),
    sa.Column("body", Document, nullable=False),
    sa.Column("prev", HASH, nullable=False),
    sa.Column("hash", HASH, nullable=False, unique=True),
    sa.Column("at", sa.BigInteger, nullable=False),
)

blobs = sa.Table(
    "blobs",
    TABLES,
    sa.Column("hash", HASH, primary_key=True),
    sa.Column("bytes", sa.BigInteger, nullable=False),
    sa.Column("kind", sa.Text, nullable=False),
    sa.Column("at", sa.BigInteger, nullable=False),
    sa.Column("purged_at", sa.BigInteger),
)

removals = sa.Table(
    "removals",
    TABLES,
    sa.Column("id", sa.Integer, primary_key=True),
    sa.Column("run", sa.ForeignKey("runs.id"), nullable=False),
    sa.Column("scope_hash", HASH, nullable=False),
    sa.Column("state", sa.Text, nullable=False),
    sa.Column("receipt", Document, nullable=False),
    sa.Column("at", sa.BigInteger, nullable=False),
)
for _change in ("UPDATE", "DELETE"):
    sa.event.listen(
        events,
        "after_create",
        sa.DDL(  # type: ignore[no-untyped-call]
            f"CREATE TRIGGER events_no_{_change.lower()} BEFORE {_change} ON events "
            "BEGIN SELECT RAISE(ABORT, 'events are append-only'); END"
        ),
    )


def engine(database: Path) -> sa.Engine:
    pragmas = ["busy_timeout = 5000", "foreign_keys = ON"]
    if database.is_file() and not os.access(database.parent, os.W_OK):
        # A folder that cannot be written has no place for the files of WAL. Without the log of a
        # live writer the database cannot change either, and SQLite may be told so.
        query = {"uri": "true", "mode": "ro"}
        if not database.with_name(f"{DATABASE}-wal").exists():
            query["immutable"] = "1"
        url = sa.URL.create("sqlite", database=database.resolve().as_uri(), query=query)
    else:
        url = sa.URL.create("sqlite", database=str(database))
        pragmas += ["journal_mode = WAL", "synchronous = FULL"]
    engine = sa.create_engine(url)

    @sa.event.listens_for(engine, "connect")
    def connected(connection: Any, record: Any) -> None:
        connection.isolation_level = None  # transactions begin where we say, below
        for pragma in pragmas:
            connection.execute(f"PRAGMA {pragma}").fetchall()

    @sa.event.listens_for(engine, "begin")
    def begun(connection: sa.Connection) -> None:
        # A writer takes its lock at once: two writers wait for each other instead of failing late.
        writes = connection.get_execution_options().get("fedkola_writes", False)
        connection.exec_driver_sql("BEGIN IMMEDIATE" if writes else "BEGIN")

    return engine


def this(run: str, number: int) -> sa.ColumnElement[bool]:
    return sa.and_(rounds.c.run == run, rounds.c.number == number)


def last(run: str) -> sa.Select[Any]:
    return sa.select(rounds).where(rounds.c.run == run).order_by(rounds.c.number.desc()).limit(1)


def latest(connection: sa.Connection, run: str) -> int | None:
    query = sa.select(sa.func.max(rounds.c.number)).where(rounds.c.run == run)
    return connection.execute(query).scalar()


def note(connection: sa.Connection, sizes: Mapping[str, int], now: float) -> None:
    """Rows for blobs that have none; one that was purged and is written again counts as new."""
    for name, size in sizes.items():
        row = {
            "hash": bytes.fromhex(name),
            "bytes": size,
            "kind": "state",
            "at": documents.micros(now),
        }
        again = blobs.update().where(blobs.c.hash == row["hash"]).values(purged_at=None)
        if connection.execute(again).rowcount == 0:
            connection.execute(blobs.insert(), row)
