"""The record of a run: a SQLite file with one transaction per round, beside a folder of tensors.

``kill -9`` at any instant leaves round n or round n+1. Tensors are written first, each to a file
named by the hash of its content, flushed and renamed; the transaction that names them comes last.
Knowledge events are append-only and chained by hash, so an altered one is found by ``verify``.

The folder of a run holds one run::

    ledger.db            runs, rounds, events, blobs, removals (WAL, synchronous=FULL)
    blobs/<sha-256>      safetensors files of one tensor "x"
"""

import hashlib
import json
import os
from collections.abc import Iterator, Mapping, MutableMapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import sqlalchemy as sa
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from sqlalchemy.exc import DBAPIError
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from fedkola.errors import BlobMissing, ChainBroken, LedgerError, RunNotFound
from fedkola.files import flush
from fedkola.types import Event

SCHEMA = 1
_DATABASE = "ledger.db"
_BLOBS = "blobs"
_GENESIS = bytes(32)
_EVENT_TAG = b"fedkola/event/1\0"
# A mapping costs a system call and a page; small tensors are cheaper to copy.
_MAP_FROM = 1 << 20


# --- what is read back ----------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class RunRow:
    """``state`` is new, running, stopped, done or failed; ``round`` the last one committed."""

    id: str
    plan: Mapping[str, Any]
    plan_hash: str
    state: str
    round: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Saved:
    """The last committed round: all that resuming needs."""

    number: int
    state: Mapping[str, Any]
    tensors: Mapping[str, Tensor]
    report: Mapping[str, Any]
    sampler: Mapping[str, Any]
    chain_head: str


@dataclass(frozen=True, slots=True, kw_only=True)
class RoundRow:
    """One round without its tensors; ``committed_at`` in seconds."""

    number: int
    report: Mapping[str, Any]
    sampler: Mapping[str, Any]
    committed_at: float
    chain_head: str


@dataclass(frozen=True, slots=True, kw_only=True)
class EventRow:
    """One knowledge event; ``prev`` and ``hash`` in hex, ``at`` in seconds."""

    seq: int
    round: int
    kind: str
    subject: str
    body: Mapping[str, Any]
    prev: str
    hash: str
    at: float


# --- the tables -----------------------------------------------------------------------------------


class _Document(sa.types.TypeDecorator[Any]):
    """Canonical JSON kept as text: hashes are over these very bytes."""

    impl = sa.Text
    cache_ok = True

    def process_bind_param(self, value: Any, dialect: sa.Dialect) -> str | None:
        return None if value is None else _canonical(value, "a document")

    def process_result_value(self, value: str | None, dialect: sa.Dialect) -> Any:
        try:
            return None if value is None else json.loads(value)
        except ValueError as error:
            raise LedgerError(
                f"a document of the ledger is not JSON ({error}): the file was altered; restore it"
                " from a copy"
            ) from error


_HASH = sa.LargeBinary(32)
_TABLES = sa.MetaData()
_runs = sa.Table(
    "runs",
    _TABLES,
    sa.Column("id", sa.Text, primary_key=True),
    sa.Column("plan_json", _Document, nullable=False),
    sa.Column("plan_hash", _HASH, nullable=False),
    sa.Column("created_at", sa.BigInteger, nullable=False),
    sa.Column("state", sa.Text, nullable=False),
    sa.Column("round", sa.Integer, nullable=False),
)
_rounds = sa.Table(
    "rounds",
    _TABLES,
    sa.Column("run", sa.ForeignKey("runs.id"), primary_key=True),
    sa.Column("number", sa.Integer, primary_key=True),
    sa.Column("state", _Document, nullable=False),  # {"state": ..., "tensors": {name: blob}}
    sa.Column("state_hash", _HASH, nullable=False),
    sa.Column("sampler", _Document, nullable=False),
    sa.Column("report", _Document, nullable=False),
    sa.Column("committed_at", sa.BigInteger, nullable=False),
    sa.Column("chain_head", _HASH, nullable=False),
)
_events = sa.Table(
    "events",
    _TABLES,
    sa.Column("seq", sa.BigInteger, primary_key=True, autoincrement=False),
    sa.Column("run", sa.ForeignKey("runs.id"), nullable=False),
    sa.Column("round", sa.Integer, nullable=False),
    sa.Column("kind", sa.Text, nullable=False),
    sa.Column("subject", sa.Text, nullable=False),
    sa.Column("body", _Document, nullable=False),
    sa.Column("prev", _HASH, nullable=False),
    sa.Column("hash", _HASH, nullable=False, unique=True),
    sa.Column("at", sa.BigInteger, nullable=False),
)
_blobs = sa.Table(
    "blobs",
    _TABLES,
    sa.Column("hash", _HASH, primary_key=True),
    sa.Column("bytes", sa.BigInteger, nullable=False),
    sa.Column("kind", sa.Text, nullable=False),
    sa.Column("at", sa.BigInteger, nullable=False),
    sa.Column("purged_at", sa.BigInteger),
)
_removals = sa.Table(
    "removals",
    _TABLES,
    sa.Column("id", sa.Integer, primary_key=True),
    sa.Column("run", sa.ForeignKey("runs.id"), nullable=False),
    sa.Column("scope_hash", _HASH, nullable=False),
    sa.Column("state", sa.Text, nullable=False),
    sa.Column("receipt", _Document, nullable=False),
    sa.Column("at", sa.BigInteger, nullable=False),
)
for _change in ("UPDATE", "DELETE"):
    sa.event.listen(
        _events,
        "after_create",
        sa.DDL(  # type: ignore[no-untyped-call]
            f"CREATE TRIGGER events_no_{_change.lower()} BEFORE {_change} ON events "
            "BEGIN SELECT RAISE(ABORT, 'events are append-only'); END"
        ),
    )


# --- the ledger -----------------------------------------------------------------------------------


class Ledger:
    """One open run folder. A context manager; every failure of the disk is a LedgerError."""

    def __init__(self, folder: Path, engine: sa.Engine) -> None:
        self.folder = folder
        self._engine = engine
        # Tensors already hashed, by identity: (version, sum of words, blob). Most tensors of a
        # round are those of the round before.
        self._hashed: MutableMapping[Tensor, tuple[int, int, str]] = WeakTensorKeyDictionary()

    @classmethod
    def open(cls, folder: Path, *, create: bool = False) -> Self:
        """The ledger of a run folder, made if ``create``; a folder without one is RunNotFound.

        A folder that cannot be written is opened for reading. A newer schema is a LedgerError.
        """
        database = folder / _DATABASE
        if create:
            try:
                (folder / _BLOBS).mkdir(parents=True, exist_ok=True)
            except OSError as error:
                raise LedgerError(
                    f"run folder {folder} cannot be made ({error.strerror}); give another folder"
                ) from error
        elif not database.is_file():
            raise RunNotFound(
                f"no run in {folder}: expected a file {_DATABASE}; give the folder of a run"
            )
        ledger = cls(folder, _engine(database))
        try:
            ledger._prepare(create=create)
        except BaseException:
            ledger.close()
            raise
        return ledger

    def close(self) -> None:
        self._engine.dispose()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    # --- writing ---

    def start(self, run: str, plan: Mapping[str, Any], plan_hash: str, *, now: float) -> None:
        """Enter the run. Again with the same plan hash (in hex) nothing changes; another run or
        another plan in this folder is a LedgerError."""
        row = {
            "id": run,
            "plan_json": plan,
            "plan_hash": _binary(plan_hash),
            "created_at": _micros(now),
            "state": "new",
            "round": 0,
        }
        with self._write("the start of a run") as connection:
            old = connection.execute(sa.select(_runs.c.id, _runs.c.plan_hash)).first()
            if old is None:
                connection.execute(_runs.insert(), row)
            elif (old.id, old.plan_hash) != (run, row["plan_hash"]):
                raise LedgerError(
                    f"run {run!r} with plan {plan_hash[:8]} was given, but {self.folder} holds run"
                    f" {old.id!r} with plan {old.plan_hash.hex()[:8]}; resume that one or give"
                    " another folder"
                )
        # What a killed writer left; its round was never named by a transaction.
        with _disk(self.folder / _BLOBS, "the start of a run"):
            for leftover in (self.folder / _BLOBS).glob("*.tmp"):
                leftover.unlink(missing_ok=True)

    def commit(
        self,
        run: str,
        number: int,
        *,
        state: Mapping[str, Any],
        tensors: Mapping[str, Tensor],
        report: Mapping[str, Any],
        sampler: Mapping[str, Any],
        events: Sequence[Event],
        now: float,
    ) -> str:
        """Save one round in one transaction; returns the head of the event chain in hex.

        Rounds follow each other without gaps, from 0 or 1. The same round again is accepted if its
        state has the same hash, and changes nothing. ``report`` and ``sampler`` may hold NaN, the
        other documents may not. If the disk is full or read-only, LedgerError: the previous round
        stands.
        """
        names = self._hashes(tensors)
        document = {"state": state, "tensors": names}
        state_hash = _state_hash(document)
        with self._read() as connection:
            head = self._settled(connection, run, number, state_hash)
        if head is not None:
            return head
        sizes = self._store(tensors, names)
        with self._write(f"round {number}") as connection:
            head = self._settled(connection, run, number, state_hash)
            if head is not None:
                return head
            _note(connection, sizes, now)
            chain_head = _chain(connection, run, number, events, now)
            row = {
                "run": run,
                "number": number,
                "state": document,
                "state_hash": state_hash,
                "sampler": sampler,
                "report": report,
                "committed_at": _micros(now),
                "chain_head": chain_head,
            }
            connection.execute(_rounds.insert(), row)
            connection.execute(_runs.update().values(round=number, state="running"))
        return chain_head.hex()

    def append(self, run: str, number: int, events: Sequence[Event], *, now: float) -> str:
        """Events after the last round, which is ``number``; returns the head of the chain."""
        with self._write(f"events after round {number}") as connection:
            self._demand_last(connection, run, number)
            head = _chain(connection, run, number, events, now)
            connection.execute(_rounds.update().where(_this(run, number)).values(chain_head=head))
        return head.hex()

    def amend(
        self,
        run: str,
        number: int,
        *,
        state: Mapping[str, Any],
        tensors: Mapping[str, Tensor],
        events: Sequence[Event],
        removal: Mapping[str, Any] | None,
        now: float,
    ) -> str:
        """Replace the state of the last round after a removal, with its events and its receipt.

        One transaction; returns the head of the chain. ``removal`` is kept as the receipt, its
        ``scope`` names what was removed and its ``state`` is "done" unless it says otherwise. What
        only earlier states held stays on disk until ``purge``.
        """
        names = self._hashes(tensors)
        document = {"state": state, "tensors": names}
        state_hash = _state_hash(document)
        with self._read() as connection:
            self._demand_last(connection, run, number)
        sizes = self._store(tensors, names)
        with self._write(f"the removal after round {number}") as connection:
            self._demand_last(connection, run, number)
            _note(connection, sizes, now)
            head = _chain(connection, run, number, events, now)
            connection.execute(
                _rounds.update()
                .where(_this(run, number))
                .values(state=document, state_hash=state_hash, chain_head=head)
            )
            if removal is not None:
                scope = _canonical(removal.get("scope", removal), "the scope of a removal")
                row = {
                    "run": run,
                    "scope_hash": hashlib.sha256(scope.encode()).digest(),
                    "state": str(removal.get("state", "done")),
                    "receipt": removal,
                    "at": _micros(now),
                }
                connection.execute(_removals.insert(), row)
        return head.hex()

    def finish(self, run: str, state: str) -> None:
        """Note how the run ended: done, failed or stopped."""
        if state not in ("done", "failed", "stopped"):
            raise LedgerError(f"state {state!r} was given; expected done, failed or stopped")
        with self._write("the end of a run") as connection:
            self._demand_run(connection, run)
            connection.execute(_runs.update().values(state=state))

    def purge(self, run: str, *, now: float) -> int:
        """Delete tensors that the last round does not name; returns the bytes freed.

        A removal is on disk only after this. Reports, events and receipts of all rounds stay.
        """
        with self._write("a purge") as connection:
            self._demand_run(connection, run)
            last = connection.execute(_last(run)).first()
            keep = set(last.state["tensors"].values()) if last is not None else set()
            connection.execute(
                _blobs.update()
                .where(_blobs.c.hash.not_in([bytes.fromhex(name) for name in keep]))
                .where(_blobs.c.purged_at.is_(None))
                .values(purged_at=_micros(now))
            )
        freed = 0
        with _disk(self.folder / _BLOBS, "a purge"):
            for path in (self.folder / _BLOBS).iterdir():
                if path.name not in keep:
                    freed += path.stat().st_size
                    path.unlink()
            flush(self.folder / _BLOBS)
        return freed

    # --- reading ---

    def run(self) -> RunRow:
        """The run of this folder; RunNotFound if none was started."""
        with self._read() as connection:
            row = connection.execute(sa.select(_runs)).first()
        if row is None:
            raise RunNotFound(f"no run was started in {self.folder}; start one or give its folder")
        return RunRow(
            id=row.id,
            plan=row.plan_json,
            plan_hash=row.plan_hash.hex(),
            state=row.state,
            round=row.round,
        )

    def last(self, run: str) -> Saved | None:
        """The last committed round, or None before the first.

        Every tensor is checked against its hash: BlobMissing if its file is absent or altered.
        Large tensors are mapped from their files, private to this process.
        """
        with self._read() as connection:
            self._demand_run(connection, run)
            row = connection.execute(_last(run)).first()
        if row is None:
            return None
        if _state_hash(row.state) != row.state_hash:
            raise LedgerError(
                f"the state of round {row.number} in {self._path} does not match its hash: the"
                " file was altered; restore it from a copy"
            )
        names = row.state["tensors"]
        loaded = {blob: self._load(blob) for blob in sorted(set(names.values()))}
        return Saved(
            number=row.number,
            state=row.state["state"],
            tensors={name: loaded[blob] for name, blob in names.items()},
            report=row.report,
            sampler=row.sampler,
            chain_head=row.chain_head.hex(),
        )

    def rounds(self, run: str) -> tuple[RoundRow, ...]:
        """Every round in order, without state and tensors."""
        columns = (c for c in _rounds.c if c.name not in ("state", "state_hash"))
        query = sa.select(*columns).where(_rounds.c.run == run).order_by(_rounds.c.number)
        with self._read() as connection:
            self._demand_run(connection, run)
            rows = connection.execute(query).all()
        return tuple(
            RoundRow(
                number=row.number,
                report=row.report,
                sampler=row.sampler,
                committed_at=row.committed_at / 1e6,
                chain_head=row.chain_head.hex(),
            )
            for row in rows
        )

    def events(self, run: str) -> tuple[EventRow, ...]:
        """Every knowledge event in order; ``verify`` says whether they are as they were written."""
        query = sa.select(_events).where(_events.c.run == run).order_by(_events.c.seq)
        with self._read() as connection:
            self._demand_run(connection, run)
            rows = connection.execute(query).all()
        return tuple(
            EventRow(
                seq=row.seq,
                round=row.round,
                kind=row.kind,
                subject=row.subject,
                body=row.body,
                prev=row.prev.hex(),
                hash=row.hash.hex(),
                at=row.at / 1e6,
            )
            for row in rows
        )

    def removals(self, run: str) -> tuple[Mapping[str, Any], ...]:
        """Every removal in order: id, scope_hash (hex), state, receipt, at (seconds)."""
        query = sa.select(_removals).where(_removals.c.run == run).order_by(_removals.c.id)
        with self._read() as connection:
            self._demand_run(connection, run)
            rows = connection.execute(query).all()
        return tuple(
            {
                "id": row.id,
                "scope_hash": row.scope_hash.hex(),
                "state": row.state,
                "receipt": row.receipt,
                "at": row.at / 1e6,
            }
            for row in rows
        )

    def verify(self, run: str) -> str:
        """Recompute the chain of events; returns its head in hex.

        Raises ChainBroken naming the first event that is not as it was written, or the round whose
        recorded head the chain does not reach (events cut off or put in front).
        """
        text = sa.LargeBinary()
        query = sa.select(
            _events.c.seq,
            _events.c.round,
            _events.c.at,
            _events.c.prev,
            _events.c.hash,
            # Bytes, so that a column that is no longer UTF-8 is named and not an error of decoding.
            *(
                sa.cast(sa.type_coerce(_events.c[name], sa.Text), text).label(name)
                for name in ("run", "kind", "subject", "body")
            ),
        ).order_by(_events.c.seq)
        try:
            with self._read() as connection:
                self._demand_run(connection, run)
                rows = connection.execute(query).all()
                heads = connection.execute(
                    sa.select(_rounds.c.number, _rounds.c.chain_head)
                    .where(_rounds.c.run == run)
                    .order_by(_rounds.c.number)
                ).all()
        except RunNotFound:
            raise
        except LedgerError as error:
            raise ChainBroken(f"the events of run {run!r} cannot be read: {error}") from error
        head, reached = _GENESIS, {0: _GENESIS}
        for seq, row in enumerate(rows, start=1):
            head = _verified(row, seq, run, head)
            reached[row.round] = head
        return _reconciled(run, heads, reached, head)

    # --- inside ---

    @property
    def _path(self) -> Path:
        return self.folder / _DATABASE

    def _prepare(self, *, create: bool) -> None:
        with self._read() as connection:
            version = connection.exec_driver_sql("PRAGMA user_version").scalar_one()
        if version > SCHEMA:
            raise LedgerError(
                f"{self._path} has schema {version}, this fedkola knows up to {SCHEMA}; upgrade"
                " fedkola"
            )
        if version == 0 and not create:
            raise RunNotFound(f"no run in {self.folder}: {_DATABASE} is empty; start the run again")
        if version == 0:
            with self._write("the making of the ledger") as connection:
                if connection.exec_driver_sql("PRAGMA user_version").scalar_one() == 0:
                    _TABLES.create_all(connection)
                    connection.exec_driver_sql(f"PRAGMA user_version = {SCHEMA}")

    @contextmanager
    def _read(self) -> Iterator[sa.Connection]:
        with _disk(self._path, "reading"), self._engine.begin() as connection:
            yield connection

    @contextmanager
    def _write(self, what: str) -> Iterator[sa.Connection]:
        with _disk(self._path, what), self._engine.connect() as connection:
            connection = connection.execution_options(fedkola_writes=True)
            with connection.begin():
                yield connection

    def _demand_run(self, connection: sa.Connection, run: str) -> None:
        if connection.execute(sa.select(_runs.c.id).where(_runs.c.id == run)).first() is None:
            held = connection.execute(sa.select(_runs.c.id)).scalars().first()
            raise RunNotFound(
                f"run {run!r} was given, but {self.folder} holds"
                f" {'no run' if held is None else f'run {held!r}'}; give the folder of that run"
            )

    def _demand_last(self, connection: sa.Connection, run: str, number: int) -> None:
        self._demand_run(connection, run)
        last = _latest(connection, run)
        if number != last:
            raise LedgerError(
                f"round {number} was given, but the last round of {run!r} is"
                f" {'none' if last is None else last}; only the last can be changed"
            )

    def _settled(
        self, connection: sa.Connection, run: str, number: int, state_hash: bytes
    ) -> str | None:
        """The chain head of a round that is already saved with this state, None if it comes next;
        any other number is refused."""
        self._demand_run(connection, run)
        query = sa.select(_rounds.c.state_hash, _rounds.c.chain_head).where(_this(run, number))
        old = connection.execute(query).first()
        if old is not None and old.state_hash == state_hash:
            return str(old.chain_head.hex())
        if old is not None:
            raise LedgerError(
                f"round {number} of {run!r} is already saved with another state; load the last"
                " round and go on from there"
            )
        last = _latest(connection, run)
        if number not in ((0, 1) if last is None else (last + 1,)):
            raise LedgerError(
                f"round {number} was given after {'none' if last is None else f'round {last}'} of"
                f" {run!r}; expected {1 if last is None else last + 1}"
            )
        return None

    def _hashes(self, tensors: Mapping[str, Tensor]) -> dict[str, str]:
        return {name: self._hash(name, tensor) for name, tensor in tensors.items()}

    def _hash(self, name: str, tensor: Tensor) -> str:
        try:
            content = _bytes(tensor)
        except (RuntimeError, TypeError) as error:
            raise LedgerError(
                f"tensor {name!r} ({tensor.dtype}, {tensor.layout}, {tensor.device}) cannot be"
                f" saved: {error}; give a dense tensor with data"
            ) from error
        # The version counter sees torch's own changes in place. The sum of words also sees those
        # made through numpy or .data, at the speed of memory rather than of SHA-256.
        version = -1 if tensor.is_inference() else tensor._version
        guard = _sum_of_words(content)
        known = self._hashed.get(tensor)
        if known is not None and known[:2] == (version, guard):
            return known[2]
        name = _content_hash(tensor, content)
        self._hashed[tensor] = (version, guard, name)
        return name

    def _store(self, tensors: Mapping[str, Tensor], names: Mapping[str, str]) -> dict[str, int]:
        """Files for tensors that have none, durable on return; the size of every blob."""
        folder = self.folder / _BLOBS
        missing: dict[str, Tensor] = {}
        sizes: dict[str, int] = {}
        for name, tensor in tensors.items():
            blob = names[name]
            # A file that lost its end is written again; other damage is found by last().
            sizes[blob] = tensor.numel() * tensor.element_size()
            path = folder / blob
            if not path.is_file() or path.stat().st_size <= sizes[blob]:
                missing[blob] = tensor
        for blob, tensor in missing.items():
            _save(folder / blob, tensor)
        if missing:
            with _disk(folder, "saving tensors"):
                flush(folder)
        return sizes

    def _load(self, blob: str) -> Tensor:
        path = self.folder / _BLOBS / blob
        try:
            with safe_open(path, framework="pt") as file:
                tensor: Tensor = file.get_tensor("x")
        except FileNotFoundError as error:
            raise BlobMissing(
                f"tensor file {path} is absent; restore it from a copy of the run folder"
            ) from error
        except (SafetensorError, OSError) as error:
            raise BlobMissing(
                f"tensor file {path} cannot be read ({error}); restore it from a copy"
            ) from error
        content = _bytes(tensor)
        if _content_hash(tensor, content) != blob:
            raise BlobMissing(
                f"tensor file {path} was altered: its content does not have the hash of its name;"
                " restore it from a copy of the run folder"
            )
        if content.numel() < _MAP_FROM:
            tensor = tensor.clone()
        self._hashed[tensor] = (tensor._version, _sum_of_words(_bytes(tensor)), blob)
        return tensor


# --- below the ledger -----------------------------------------------------------------------------


def _engine(database: Path) -> sa.Engine:
    pragmas = ["busy_timeout = 5000", "foreign_keys = ON"]
    if database.is_file() and not os.access(database.parent, os.W_OK):
        # A folder that cannot be written has no place for the files of WAL. Without the log of a
        # live writer the database cannot change either, and SQLite may be told so.
        query = {"uri": "true", "mode": "ro"}
        if not database.with_name(f"{_DATABASE}-wal").exists():
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


@contextmanager
def _disk(path: Path, what: str) -> Iterator[None]:
    try:
        yield
    except DBAPIError as error:
        raise LedgerError(
            f"{what} failed in {path}: {error.orig}; check free space, permissions and that no"
            " other process writes this run, then resume"
        ) from error
    except OSError as error:
        raise LedgerError(
            f"{what} failed in {error.filename or path}: {error.strerror}; check free space and"
            " permissions, then resume"
        ) from error


def _save(path: Path, tensor: Tensor) -> None:
    temporary = path.with_name(f"{path.name}.tmp")
    try:
        save_file({"x": tensor.detach().cpu().contiguous()}, temporary)
        flush(temporary)
        os.replace(temporary, path)
    except (OSError, SafetensorError) as error:
        raise LedgerError(
            f"saving a tensor failed in {path}: {error}; check free space and permissions, then"
            " resume"
        ) from error
    finally:
        if temporary.exists():
            temporary.unlink()


def _this(run: str, number: int) -> sa.ColumnElement[bool]:
    return sa.and_(_rounds.c.run == run, _rounds.c.number == number)


def _last(run: str) -> sa.Select[Any]:
    return sa.select(_rounds).where(_rounds.c.run == run).order_by(_rounds.c.number.desc()).limit(1)


def _latest(connection: sa.Connection, run: str) -> int | None:
    query = sa.select(sa.func.max(_rounds.c.number)).where(_rounds.c.run == run)
    return connection.execute(query).scalar()


def _note(connection: sa.Connection, sizes: Mapping[str, int], now: float) -> None:
    """Rows for blobs that have none; one that was purged and is written again counts as new."""
    for name, size in sizes.items():
        row = {"hash": bytes.fromhex(name), "bytes": size, "kind": "state", "at": _micros(now)}
        again = _blobs.update().where(_blobs.c.hash == row["hash"]).values(purged_at=None)
        if connection.execute(again).rowcount == 0:
            connection.execute(_blobs.insert(), row)


def _chain(
    connection: sa.Connection,
    run: str,
    number: int,
    events: Sequence[Event],
    now: float,
) -> bytes:
    last = connection.execute(
        sa.select(_events.c.seq, _events.c.hash).order_by(_events.c.seq.desc()).limit(1)
    ).first()
    seq, head = (0, _GENESIS) if last is None else (last.seq, last.hash)
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
            "at": _micros(now),
        }
        prev, head = head, _event_hash(row, head)
        rows.append({**row, "prev": prev, "hash": head})
    if rows:
        connection.execute(_events.insert(), rows)
    return head


def _state_hash(document: Mapping[str, Any]) -> bytes:
    return hashlib.sha256(_strict(document, "the state").encode()).digest()


def _verified(row: Any, seq: int, run: str, head: bytes) -> bytes:
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
        expected = _event_hash(event, head)
        intact = (
            (row.seq, event["run"], row.prev, row.hash) == (seq, run, head, expected)
            # Other spacing or a doubled key would read as the same body.
            and text == _strict(event["body"], "the body")
        )
    except (ValueError, TypeError, AttributeError, LedgerError) as error:
        raise ChainBroken(f"event {seq} of {run!r} cannot be read: {error}") from error
    if not intact:
        raise ChainBroken(
            f"event {seq} of {run!r} is not as it was written; restore the ledger from a copy"
        )
    return expected


def _reconciled(run: str, heads: Sequence[Any], reached: Mapping[int, bytes], head: bytes) -> str:
    """The head, if every round recorded the head that the chain had after its events."""
    expected = _GENESIS
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


def _event_hash(event: Mapping[str, Any], prev: bytes) -> bytes:
    text = _strict(event, f"event {event['kind']}")
    return hashlib.sha256(_EVENT_TAG + prev + text.encode()).digest()


def _strict(document: Any, what: str) -> str:
    return _canonical(document, what, finite=True)


def _canonical(document: Any, what: str, *, finite: bool = False) -> str:
    """JSON with sorted keys and without spaces."""
    try:
        text = json.dumps(
            document,
            sort_keys=True,
            separators=(",", ":"),
            ensure_ascii=False,
            allow_nan=not finite,
            default=_mapping,
        )
        text.encode()
    except (TypeError, ValueError) as error:
        raise LedgerError(
            f"{what} cannot be written as JSON: {error}; give texts, numbers, lists and maps"
        ) from error
    return text


def _mapping(value: Any) -> dict[str, Any]:
    if isinstance(value, Mapping):
        return dict(value)
    raise TypeError(f"a {type(value).__name__} has no JSON form")


def _content_hash(tensor: Tensor, content: Tensor) -> str:
    shape = ",".join(str(size) for size in tensor.shape)
    digest = hashlib.sha256(f"{str(tensor.dtype).removeprefix('torch.')}|{shape}|".encode())
    digest.update(content.numpy().data)
    return digest.hexdigest()


def _bytes(tensor: Tensor) -> Tensor:
    """The content as a flat uint8 tensor, without a copy if it is contiguous and on the CPU."""
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)


def _sum_of_words(content: Tensor) -> int:
    whole = content.numel() // 8 * 8
    if content.data_ptr() % 8:
        return int(content.sum())
    words = int(content[:whole].view(torch.int64).sum())
    return words ^ int(content[whole:].sum())


def _binary(plan_hash: str) -> bytes:
    try:
        return bytes.fromhex(plan_hash)
    except ValueError as error:
        raise LedgerError(f"plan hash {plan_hash!r} was given; expected hex digits") from error


def _micros(seconds: float) -> int:
    return round(seconds * 1_000_000)
