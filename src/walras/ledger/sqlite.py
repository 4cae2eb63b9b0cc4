"""The embedded store: one SQLite file in WAL mode, written by one thread of one process, read by any.

What is acknowledged survives the death of the process. With `durable="normal"` it is in the operating system's hands,
so a power cut may take what the last checkpoint has not synced (at most some megabytes of the newest rows; the file stays
whole); with "full" every commit is synced first. With "journal" a hold or an entry is acknowledged as soon as it is in a file in
memory (`ledger.journal`), which is as safe as "normal" and waits for nobody; one that contradicts the ledger is then logged.
"""

from __future__ import annotations

import logging
import os
import sqlite3
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import cache
from itertools import chain
from pathlib import Path
from shutil import disk_usage
from typing import Any

import msgspec

from walras.errors import OutputError, RecordError, WalrasError
from walras.ledger import sql
from walras.ledger.entry import Correction, Entry, Hold, Outcome, Record
from walras.ledger.journal import Journal, left
from walras.ledger.writer import HEALTHY, Durable, Refused, State, Unwritable, Writer

MIGRATIONS: tuple[tuple[str, tuple[str, ...]], ...] = (
    (
        "the ledger",
        (
            f"""CREATE TABLE holds ({sql.HOLD_COLUMNS_1}, closed bigint NOT NULL DEFAULT 0,
                PRIMARY KEY (request_id, id)) WITHOUT ROWID""",
            "CREATE INDEX open_holds ON holds (request_id) WHERE closed = 0",
            f"""CREATE TABLE entries (seq integer PRIMARY KEY AUTOINCREMENT, {sql.ENTRY_COLUMNS_1.format(bytes="blob")},
                {sql.OVERRUN_1})""",
            "CREATE UNIQUE INDEX entries_by_request ON entries (request_id)",
            "CREATE INDEX entries_by_time ON entries (at_ns, tenant, key_id, charged_nano)",
            *sql.SMALL_TABLES_1,
            "CREATE TABLE probe (filler blob)",
            # An entry closes its holds, and must own up to all of them; a settled request cannot be held again.
            """CREATE TRIGGER entry_owns_its_holds BEFORE INSERT ON entries WHEN new.reserved_nano <>
                (SELECT coalesce(sum(amount_nano), 0) FROM holds WHERE request_id = new.request_id AND closed = 0)
                BEGIN SELECT raise(ABORT, 'reserved is not what is held'); END""",
            """CREATE TRIGGER entry_closes_its_holds AFTER INSERT ON entries WHEN new.reserved_nano > 0 OR EXISTS
                (SELECT 1 FROM holds WHERE request_id = new.request_id)
                BEGIN UPDATE holds SET closed = 1 WHERE request_id = new.request_id; END""",
            """CREATE TRIGGER hold_before_entry BEFORE INSERT ON holds
                WHEN EXISTS (SELECT 1 FROM entries WHERE request_id = new.request_id)
                BEGIN SELECT raise(ABORT, 'the request is settled'); END""",
            *(
                f"CREATE TRIGGER {table}_stay BEFORE UPDATE {of}ON {table} BEGIN SELECT raise(ABORT, '{table} are not changed'); END"
                for table, of in (
                    ("entries", ""),
                    ("outcomes", ""),
                    ("corrections", ""),
                    ("holds", f"OF {', '.join(sql.HOLD_COLUMNS)} "),
                )
            ),
        ),
    ),
)
"""Applied in order, each in one transaction. A step that was released is never edited; the next one changes what it made."""

ROWS = 64
"""Most rows of one INSERT. A statement gives up Python's lock once, however many rows it has."""
RETIRE_ROWS = 500
"""Requests retired in one transaction, between which the writer gets its turn."""
BUSY_S = 10.0
WAL_BYTES = 64 << 20
"""What is left of a WAL that grew while somebody read for long."""


class SqliteStore(sql.SqlStore):
    """See `store.Store`. The folder must be on a local disk; `PATH-lock` beside the file keeps second writers out, and
    `PATH-ahead` holds what is acknowledged and not in the file yet.

    Args:
        read_only: only look; several processes may, also while another one writes.

    Raises:
        RecordError: not a ledger, or one that a newer Walras wrote.
        OutputError: another process writes it, or it cannot be made, or what a dead process had acknowledged cannot be
            written now. Else one that exists and cannot be written now is opened, and its state says so.
    """

    def __init__(self, path: Path | str, *, durable: Durable = "normal", read_only: bool = False) -> None:
        self.path = Path(path)
        self._idle: list[sqlite3.Connection] = []
        self._backend = _Backend(self.path, durable)
        self._orphans: set[str] = set()
        self._ahead = self.path.with_name(self.path.name + "-ahead")
        if read_only:
            if not self.path.exists():
                raise RecordError("no such ledger", path=self.path)
            if self._ahead.exists():
                with suppress(OutputError):  # somebody writes it now, or nobody can
                    SqliteStore(self.path).stop()
            with self.snapshot() as query:
                _version(query, self.path)
            return
        try:
            state = self._begin()
        except BaseException:
            self._backend.shut()
            raise
        self._writer = Writer(self._backend, state)
        try:
            self._catch_up()
            if durable == "journal" and state is HEALTHY:
                # Where there can be no journal, each record waits for its commit. macOS has no such call.
                with suppress(OSError, AttributeError):
                    self._writer.keep_in(Journal(self._ahead))
            if self.path.exists():
                # Nobody else writes, and we have not begun to: what is open now has lost its process.
                self._orphans = {hold.request_id for hold in self.open_holds()}
        except BaseException:
            self._writer.stop()
            raise

    def _begin(self) -> State:
        """Whether it can be written."""
        try:
            self._backend.connected()
            state = HEALTHY
        except Unwritable as why:
            state = why.state
        if state.name == "failed" or not self.path.exists():
            raise OutputError(state.sentence)
        if state is not HEALTHY:
            try:
                self.open_holds()
            except RecordError as error:  # on a full disk, SQLite cannot even begin to read
                raise OutputError(state.sentence) from error
        return state

    def _catch_up(self) -> None:
        """Write what a process that died had acknowledged.

        Raises:
            OutputError: it cannot be written now. It stays where it is.
        """
        assert self._writer is not None
        for ticket in [self._writer.submit(record) for record in left(self._ahead)]:
            try:
                ticket.wait()
            except RecordError as error:
                logging.getLogger("walras.ledger").error("%s", error)
        if self._writer.state is HEALTHY:
            self._ahead.unlink(missing_ok=True)

    def orphans(self) -> list[Hold]:
        return [hold for hold in self.open_holds() if hold.request_id in self._orphans]

    def stop(self) -> None:
        while self._idle:
            self._idle.pop().close()
        if self._writer is not None:
            self._writer.stop()

    @contextmanager
    def snapshot(self) -> Iterator[sql.Query]:
        if self._writer is not None:
            self._writer.flush()
        try:
            db = self._idle.pop()
        except IndexError:
            db = _reader(self.path)
        try:
            db.execute("BEGIN")
            yield lambda statement, values=(): db.execute(statement, values).fetchall()
            db.execute("ROLLBACK")
        except sqlite3.Error as error:
            db.close()
            raise RecordError(f"cannot be read: {error}", path=self.path) from error
        except BaseException:
            db.close()
            raise
        self._idle.append(db)

    def damage(self) -> list[str]:
        try:
            with self.snapshot() as query:
                return [row[0] for row in query("PRAGMA quick_check") if row[0] != "ok"]
        except RecordError as error:  # too broken to be looked at
            return [str(error)]

    def size(self) -> int:
        files = (self.path, self.path.with_name(self.path.name + "-wal"))
        return sum(file.stat().st_size for file in files if file.exists())

    def retain(self, before_ns: int) -> int:
        """Whole UTC days before `before_ns` go; the file keeps its size and is filled again."""
        if self._writer is None:
            raise OutputError("the ledger was opened to be read only; open it for writing")
        removed = 0
        db = sqlite3.connect(self.path, isolation_level=None, timeout=BUSY_S)
        try:
            db.execute("CREATE TEMP TABLE retiring (request_id text PRIMARY KEY)")
            while count := _retire(db, before_ns // sql.DAY_NS * sql.DAY_NS):
                removed += count
        except sqlite3.Error as error:
            raise OutputError(f"{self.path}: retention stopped after {removed} entries: {error}") from error
        finally:
            db.close()
        return removed


class _Backend:
    """The writing connection, used by one thread at a time: whoever opens the store, then its writer."""

    def __init__(self, path: Path, durable: Durable) -> None:
        self.path, self._durable = path, durable
        self._lock: sqlite3.Connection | None = None
        self._db: sqlite3.Connection | None = None

    def connected(self) -> sqlite3.Connection:
        """The connection, with the newest schema; nobody else has one."""
        if self._db is None:
            try:
                self._lock = self._lock or _only_writer(self.path)
                self._db = _writer(self.path, self._durable)
            except sqlite3.Error as error:
                raise Unwritable(_state(self.path, error)) from error
        return self._db

    def write(self, records: Sequence[Record]) -> list[WalrasError | None]:
        db = self.connected()
        holds = [record for record in records if isinstance(record, Hold)]
        entries = [record for record in records if isinstance(record, Entry)]
        errors: list[WalrasError | None] = [None] * len(records)
        with self._transaction(db):
            _insert(db, "holds", sql.HOLD_COLUMNS, [sql.hold_row(hold) for hold in holds])
            _insert(db, "entries", sql.ENTRY_COLUMNS, [msgspec.structs.astuple(entry) for entry in entries])
            if holds or entries:
                db.execute(sql.COUNT, sql.counts(0, holds, entries))
            if len(holds) + len(entries) < len(records):
                for k, record in enumerate(records):
                    if isinstance(record, Outcome | Correction):
                        errors[k] = sql.amend(self._query, record)
        return errors

    def explain(self, record: Record, why: Refused) -> WalrasError | None:
        try:
            return sql.explain(self._query, record, why)
        except UnicodeEncodeError:
            return RecordError("holds half a character", field="request_id")
        except sqlite3.Error as error:
            raise Unwritable(_state(self.path, error)) from error

    def probe(self) -> None:
        db = self.connected()
        with self._transaction(db):
            db.execute("INSERT INTO probe VALUES (zeroblob(65536))")
        with self._transaction(db):
            db.execute("DELETE FROM probe")

    def shut(self) -> None:
        for db in (self._db, self._lock):
            if db is not None:
                db.close()

    def _query(self, statement: str, values: Sequence[Any] = ()) -> list[tuple[Any, ...]]:
        return self.connected().execute(statement, values).fetchall()

    @contextmanager
    def _transaction(self, db: sqlite3.Connection) -> Iterator[None]:
        try:
            db.execute("BEGIN IMMEDIATE")
            yield
            db.execute("COMMIT")
        except Exception as error:
            if db.in_transaction:
                db.execute("ROLLBACK")
            if isinstance(error, _WRONG_RECORD):
                raise Refused(str(error)) from error
            if isinstance(error, sqlite3.Error):
                raise Unwritable(_state(self.path, error)) from error
            raise


_WRONG_RECORD = (
    sqlite3.IntegrityError,
    sqlite3.DataError,
    sqlite3.InterfaceError,
    sqlite3.ProgrammingError,
    OverflowError,
    UnicodeEncodeError,
)
"""What comes of a record that breaks a rule, or holds what no column can."""


def _insert(
    db: sqlite3.Connection, table: str, columns: Sequence[str], rows: Sequence[tuple[Any, ...]]
) -> None:
    """In statements of 64, 32, … rows: few to run, and few to keep prepared."""
    start = 0
    while left := len(rows) - start:
        size = min(ROWS, 1 << left.bit_length() - 1)
        values = list(chain.from_iterable(rows[start : start + size]))
        db.execute(_insertion(table, tuple(columns), size), values)
        start += size


@cache
def _insertion(table: str, columns: tuple[str, ...], rows: int) -> str:
    row = f"({', '.join('?' * len(columns))})"
    return f"INSERT INTO {table} ({', '.join(columns)}) VALUES {', '.join([row] * rows)}"


def _retire(db: sqlite3.Connection, before_ns: int) -> int:
    db.execute("BEGIN IMMEDIATE")
    db.execute("DELETE FROM retiring")
    found = db.execute(
        "INSERT INTO retiring SELECT request_id FROM entries WHERE at_ns < ? ORDER BY at_ns LIMIT ?",
        (before_ns, RETIRE_ROWS),
    )
    if found.rowcount:
        for statement in sql.RETIRE:
            db.execute(statement)
        db.execute("DELETE FROM entries WHERE request_id IN (SELECT request_id FROM retiring)")
    db.execute("COMMIT")
    return found.rowcount


# --- opening ----------------------------------------------------------------------------------------------------------


def _only_writer(path: Path) -> sqlite3.Connection:
    """A lock that ends with the process, on every system that SQLite knows."""
    lock = sqlite3.connect(
        path.with_name(path.name + "-lock"), isolation_level=None, timeout=0, check_same_thread=False
    )
    try:
        lock.execute("BEGIN EXCLUSIVE")
    except BaseException:
        lock.close()
        raise
    return lock


def _writer(path: Path, durable: Durable) -> sqlite3.Connection:
    db = sqlite3.connect(path, isolation_level=None, timeout=BUSY_S, check_same_thread=False)
    try:
        db.execute("PRAGMA journal_mode = WAL")
        db.execute(f"PRAGMA synchronous = {'full' if durable == 'full' else 'normal'}")
        db.execute(f"PRAGMA journal_size_limit = {WAL_BYTES}")
        _migrate(db, path)
    except BaseException:
        db.close()
        raise
    return db


def _migrate(db: sqlite3.Connection, path: Path) -> None:
    if not db.execute("SELECT 1 FROM sqlite_master").fetchone():
        db.execute("CREATE TABLE migrations (number integer PRIMARY KEY, name text NOT NULL)")
    taken = _version(lambda statement: db.execute(statement).fetchall(), path)
    for number, (name, statements) in enumerate(MIGRATIONS[taken:], start=taken + 1):
        db.execute("BEGIN IMMEDIATE")
        try:
            for statement in statements:
                db.execute(statement)
            db.execute("INSERT INTO migrations VALUES (?, ?)", (number, name))
            db.execute("COMMIT")
        except BaseException:
            if db.in_transaction:
                db.execute("ROLLBACK")
            raise


def _version(query: sql.Query, path: Path) -> int:
    """How many migrations it has taken."""
    if not query("SELECT 1 FROM sqlite_master WHERE name = 'migrations'"):
        raise RecordError("is no ledger of Walras", path=path, hint="name another file")
    return sql.known_version(query, len(MIGRATIONS), str(path))


def _reader(path: Path) -> sqlite3.Connection:
    """A connection that cannot write."""
    wal = path.with_name(path.name + "-wal")
    # A disk that cannot be written has no place for the WAL's index; without a WAL none is needed.
    still = not os.access(path.parent, os.W_OK) and not (wal.exists() and wal.stat().st_size)
    uri = f"{path.resolve().as_uri()}?{'immutable=1' if still else 'mode=ro'}"
    return sqlite3.connect(uri, uri=True, isolation_level=None, timeout=BUSY_S, check_same_thread=False)


def _state(path: Path, error: sqlite3.Error) -> State:
    code = getattr(error, "sqlite_errorname", "")
    locked_folder = path.exists() and not os.access(path.parent, os.W_OK)
    # The WAL's index that cannot grow is told as an I/O error.
    if code == "SQLITE_FULL" or (code.startswith("SQLITE_IOERR") and disk_usage(path.parent).free < 1 << 16):
        return State("disk full", f"{path}: the disk is full; make room, and the ledger goes on by itself.")
    if code.startswith("SQLITE_READONLY") or (code == "SQLITE_CANTOPEN" and locked_folder):
        return State("read-only", f"{path}: cannot be written; make the disk and the file writable.")
    if code == "SQLITE_BUSY":
        return State(
            "failed", f"{path}: another process writes it; stop that one, or open the ledger to be read only."
        )
    return State("failed", f"{path}: cannot be written: {error}")
