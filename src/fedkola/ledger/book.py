"""The ledger of a run folder."""

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import sqlalchemy as sa
from torch import Tensor

from fedkola.errors import ChainBroken, LedgerError, RunNotFound
from fedkola.ledger import chain, documents, tables
from fedkola.ledger.blobs import BLOBS, Blobs, disk
from fedkola.ledger.chain import GENESIS
from fedkola.ledger.rows import EventRow, RoundRow, RunRow, Saved
from fedkola.ledger.tables import DATABASE, SCHEMA, TABLES
from fedkola.types import Event


class Ledger:
    """One open run folder. A context manager; every failure of the disk is a LedgerError."""

    def __init__(self, folder: Path, engine: sa.Engine) -> None:
        self.folder = folder
        self._engine = engine
        self._blobs = Blobs(folder / BLOBS)

    @classmethod
    def open(cls, folder: Path, *, create: bool = False) -> Self:
        """The ledger of a run folder, made if ``create``; a folder without one is RunNotFound.

        A folder that cannot be written is opened for reading. A newer schema is a LedgerError.
        """
        database = folder / DATABASE
        if create:
            try:
                (folder / BLOBS).mkdir(parents=True, exist_ok=True)
            except OSError as error:
                raise LedgerError(
                    f"run folder {folder} cannot be made ({error.strerror}); give another folder"
                ) from error
        elif not database.is_file():
            raise RunNotFound(
                f"no run in {folder}: expected a file {DATABASE}; give the folder of a run"
            )
        ledger = cls(folder, tables.engine(database))
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
            "plan_hash": documents.binary(plan_hash),
            "created_at": documents.micros(now),
            "state": "new",
            "round": 0,
        }
        with self._write("the start of a run") as connection:
            old = connection.execute(sa.select(tables.runs.c.id, tables.runs.c.plan_hash)).first()
            if old is None:
                connection.execute(tables.runs.insert(), row)
            elif (old.id, old.plan_hash) != (run, row["plan_hash"]):
                raise LedgerError(
                    f"run {run!r} with plan {plan_hash[:8]} was given, but {self.folder} holds run"
                    f" {old.id!r} with plan {old.plan_hash.hex()[:8]}; resume that one or give"
                    " another folder"
                )
        # What a killed writer left; its round was never named by a transaction.
        self._blobs.sweep()

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
        names = self._blobs.names(tensors)
        document = {"state": state, "tensors": names}
        state_hash = chain.state_hash(document)
        with self._read() as connection:
            head = self._settled(connection, run, number, state_hash)
        if head is not None:
            return head
        sizes = self._blobs.store(tensors, names)
        with self._write(f"round {number}") as connection:
            head = self._settled(connection, run, number, state_hash)
            if head is not None:
                return head
            tables.note(connection, sizes, now)
            chain_head = chain.extended(connection, run, number, events, now)
            row = {
                "run": run,
                "number": number,
                "state": document,
                "state_hash": state_hash,
                "sampler": sampler,
                "report": report,
                "committed_at": documents.micros(now),
                "chain_head": chain_head,
            }
            connection.execute(tables.rounds.insert(), row)
            connection.execute(tables.runs.update().values(round=number, state="running"))
        return chain_head.hex()

    def append(self, run: str, number: int, events: Sequence[Event], *, now: float) -> str:
        """Events after the last round, which is ``number``; returns the head of the chain."""
        with self._write(f"events after round {number}") as connection:
            self._demand_last(connection, run, number)
            head = chain.extended(connection, run, number, events, now)
            connection.execute(
                tables.rounds.update().where(tables.this(run, number)).values(chain_head=head)
            )
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
        names = self._blobs.names(tensors)
        document = {"state": state, "tensors": names}
        state_hash = chain.state_hash(document)
        with self._read() as connection:
            self._demand_last(connection, run, number)
        sizes = self._blobs.store(tensors, names)
        with self._write(f"the removal after round {number}") as connection:
            self._demand_last(connection, run, number)
            tables.note(connection, sizes, now)
            head = chain.extended(connection, run, number, events, now)
            connection.execute(
                tables.rounds.update()
                .where(tables.this(run, number))
                .values(state=document, state_hash=state_hash, chain_head=head)
            )
            if removal is not None:
                scope = documents.canonical(removal.get("scope", removal), "the scope of a removal")
                row = {
                    "run": run,
                    "scope_hash": hashlib.sha256(scope.encode()).digest(),
                    "state": str(removal.get("state", "done")),
                    "receipt": removal,
                    "at": documents.micros(now),
                }
                connection.execute(tables.removals.insert(), row)
        return head.hex()

    def finish(self, run: str, state: str) -> None:
        """Note how the run ended: done, failed or stopped."""
        if state not in ("done", "failed", "stopped"):
            raise LedgerError(f"state {state!r} was given; expected done, failed or stopped")
        with self._write("the end of a run") as connection:
            self._demand_run(connection, run)
            connection.execute(tables.runs.update().values(state=state))

    def purge(self, run: str, *, now: float) -> int:
        """Delete tensors that the last round does not name; returns the bytes freed.

        A removal is on disk only after this. Reports, events and receipts of all rounds stay.
        """
        with self._write("a purge") as connection:
            self._demand_run(connection, run)
            last = connection.execute(tables.last(run)).first()
            keep = set(last.state["tensors"].values()) if last is not None else set()
            connection.execute(
                tables.blobs.update()
                .where(tables.blobs.c.hash.not_in([bytes.fromhex(name) for name in keep]))
                .where(tables.blobs.c.purged_at.is_(None))
                .values(purged_at=documents.micros(now))
            )
        return self._blobs.keep_only(keep)

    # --- reading ---

    def run(self) -> RunRow:
        """The run of this folder; RunNotFound if none was started."""
        with self._read() as connection:
            row = connection.execute(sa.select(tables.runs)).first()
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
            row = connection.execute(tables.last(run)).first()
        if row is None:
            return None
        if chain.state_hash(row.state) != row.state_hash:
            raise LedgerError(
                f"the state of round {row.number} in {self._path} does not match its hash: the"
                " file was altered; restore it from a copy"
            )
        names = row.state["tensors"]
        loaded = {blob: self._blobs.load(blob) for blob in sorted(set(names.values()))}
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
        columns = (c for c in tables.rounds.c if c.name not in ("state", "state_hash"))
        query = (
            sa.select(*columns).where(tables.rounds.c.run == run).order_by(tables.rounds.c.number)
        )
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
        query = (
            sa.select(tables.events).where(tables.events.c.run == run).order_by(tables.events.c.seq)
        )
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
        query = (
            sa.select(tables.removals)
            .where(tables.removals.c.run == run)
            .order_by(tables.removals.c.id)
        )
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
            tables.events.c.seq,
            tables.events.c.round,
            tables.events.c.at,
            tables.events.c.prev,
            tables.events.c.hash,
            # Bytes, so that a column that is no longer UTF-8 is named and not an error of decoding.
            *(
                sa.cast(sa.type_coerce(tables.events.c[name], sa.Text), text).label(name)
                for name in ("run", "kind", "subject", "body")
            ),
        ).order_by(tables.events.c.seq)
        try:
            with self._read() as connection:
                self._demand_run(connection, run)
                rows = connection.execute(query).all()
                heads = connection.execute(
                    sa.select(tables.rounds.c.number, tables.rounds.c.chain_head)
                    .where(tables.rounds.c.run == run)
                    .order_by(tables.rounds.c.number)
                ).all()
        except RunNotFound:
            raise
        except LedgerError as error:
            raise ChainBroken(f"the events of run {run!r} cannot be read: {error}") from error
        head, reached = GENESIS, {0: GENESIS}
        for seq, row in enumerate(rows, start=1):
            head = chain.verified(row, seq, run, head)
            reached[row.round] = head
        return chain.reconciled(run, heads, reached, head)

    # --- inside ---

    @property
    def _path(self) -> Path:
        return self.folder / DATABASE

    def _prepare(self, *, create: bool) -> None:
        with self._read() as connection:
            version = connection.exec_driver_sql("PRAGMA user_version").scalar_one()
        if version > SCHEMA:
            raise LedgerError(
                f"{self._path} has schema {version}, this fedkola knows up to {SCHEMA}; upgrade"
                " fedkola"
            )
        if version == 0 and not create:
            raise RunNotFound(f"no run in {self.folder}: {DATABASE} is empty; start the run again")
        if version == 0:
            with self._write("the making of the ledger") as connection:
                if connection.exec_driver_sql("PRAGMA user_version").scalar_one() == 0:
                    TABLES.create_all(connection)
                    connection.exec_driver_sql(f"PRAGMA user_version = {SCHEMA}")

    @contextmanager
    def _read(self) -> Iterator[sa.Connection]:
        with disk(self._path, "reading"), self._engine.begin() as connection:
            yield connection

    @contextmanager
    def _write(self, what: str) -> Iterator[sa.Connection]:
        with disk(self._path, what), self._engine.connect() as connection:
            connection = connection.execution_options(fedkola_writes=True)
            with connection.begin():
                yield connection

    def _demand_run(self, connection: sa.Connection, run: str) -> None:
        if (
            connection.execute(sa.select(tables.runs.c.id).where(tables.runs.c.id == run)).first()
            is None
        ):
            held = connection.execute(sa.select(tables.runs.c.id)).scalars().first()
            raise RunNotFound(
                f"run {run!r} was given, but {self.folder} holds"
                f" {'no run' if held is None else f'run {held!r}'}; give the folder of that run"
            )

    def _demand_last(self, connection: sa.Connection, run: str, number: int) -> None:
        self._demand_run(connection, run)
        last = tables.latest(connection, run)
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
        query = sa.select(tables.rounds.c.state_hash, tables.rounds.c.chain_head).where(
            tables.this(run, number)
        )
        old = connection.execute(query).first()
        if old is not None and old.state_hash == state_hash:
            return str(old.chain_head.hex())
        if old is not None:
            raise LedgerError(
                f"round {number} of {run!r} is already saved with another state; load the last"
                " round and go on from there"
            )
        last = tables.latest(connection, run)
        if number not in ((0, 1) if last is None else (last + 1,)):
            raise LedgerError(
                f"round {number} was given after {'none' if last is None else f'round {last}'} of"
                f" {run!r}; expected {1 if last is None else last + 1}"
            )
        return None
