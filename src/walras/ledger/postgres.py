"""The shared store: PostgreSQL, for several gateways at once. Batches come in by COPY; entries lie in a partition a month (UTC).

Each writer has a number, and keeps an advisory lock on it as long as it is connected: open holds of a number that nobody
locks have lost their process. Everything lies in the schema `walras`.
"""

from __future__ import annotations

import re
import secrets
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from typing import Any

import msgspec

from walras.errors import OutputError, RecordError, SettingsError, WalrasError
from walras.ledger import sql
from walras.ledger.entry import Correction, Entry, Hold, Outcome, Record
from walras.ledger.writer import HEALTHY, Durable, Refused, State, Unwritable, Writer

try:
    import psycopg
except ImportError as error:
    raise SettingsError(
        "a ledger in PostgreSQL needs psycopg 3", hint="pip install 'walras[postgres]'"
    ) from error

_ENTRY_NAMES = ", ".join(sql.ENTRY_COLUMNS)
_HOLD_NAMES = ", ".join(sql.HOLD_COLUMNS)
_ENTRY_TYPES = sql.ENTRY_COLUMNS_1.format(bytes="bytea")

MIGRATIONS: tuple[tuple[str, tuple[str, ...]], ...] = (
    (
        "the ledger",
        (
            f"""CREATE TABLE holds ({sql.HOLD_COLUMNS_1}, closed bigint NOT NULL DEFAULT 0, writer bigint NOT NULL,
                PRIMARY KEY (request_id, id))""",
            "CREATE INDEX open_holds ON holds (request_id) WHERE closed = 0",
            # Partitions cannot promise that a request is unique among all of them; this table can.
            "CREATE TABLE requests (request_id text PRIMARY KEY)",
            "CREATE SEQUENCE entries_seq",
            f"""CREATE TABLE entries (seq bigint NOT NULL DEFAULT nextval('entries_seq'), {_ENTRY_TYPES}, {sql.OVERRUN_1},
                PRIMARY KEY (seq, at_ns)) PARTITION BY RANGE (at_ns)""",
            "CREATE INDEX entries_by_request ON entries (request_id)",
            "CREATE INDEX entries_by_time ON entries (at_ns, tenant, key_id, charged_nano)",
            *sql.SMALL_TABLES_1,
            "CREATE TABLE probe (at_ns bigint)",
            f"""CREATE FUNCTION settle(me bigint) RETURNS void LANGUAGE plpgsql AS $$ BEGIN
                IF EXISTS (SELECT 1 FROM new_holds n JOIN requests r USING (request_id)) THEN
                    RAISE integrity_constraint_violation USING MESSAGE = 'the request is settled'; END IF;
                INSERT INTO holds ({_HOLD_NAMES}, writer) SELECT {_HOLD_NAMES}, me FROM new_holds;
                INSERT INTO requests SELECT request_id FROM new_entries;
                IF EXISTS (SELECT 1 FROM new_entries n WHERE reserved_nano <> (SELECT coalesce(sum(amount_nano), 0)
                        FROM holds h WHERE h.request_id = n.request_id AND closed = 0)) THEN
                    RAISE integrity_constraint_violation USING MESSAGE = 'reserved is not what is held'; END IF;
                INSERT INTO entries ({_ENTRY_NAMES}) SELECT {_ENTRY_NAMES} FROM new_entries;
                UPDATE holds h SET closed = 1 FROM new_entries n WHERE h.request_id = n.request_id; END $$""",
            """CREATE FUNCTION stay() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN
                RAISE integrity_constraint_violation USING MESSAGE = tg_table_name || ' are not changed'; END $$""",
            *(
                f"CREATE TRIGGER {table}_stay BEFORE UPDATE {of}ON {table} FOR EACH ROW EXECUTE FUNCTION stay()"
                for table, of in (
                    ("entries", ""),
                    ("outcomes", ""),
                    ("corrections", ""),
                    ("holds", f"OF {_HOLD_NAMES} "),
                )
            ),
        ),
    ),
)
"""See `sqlite.MIGRATIONS`."""

_STAGING = (
    f"CREATE TEMP TABLE new_holds ({sql.HOLD_COLUMNS_1}) ON COMMIT DELETE ROWS",
    f"CREATE TEMP TABLE new_entries ({_ENTRY_TYPES}) ON COMMIT DELETE ROWS",
)
_READ = "BEGIN ISOLATION LEVEL REPEATABLE READ READ ONLY"
_SCHEMA_LOCK = 0x77616C726173
"""Advisory lock of whoever changes tables."""
_PARTITION = re.compile(r"entries_(\d{4})(\d{2})")


class PostgresStore(sql.SqlStore):
    """See `store.Store`.

    Args:
        durable: "full" insists on the server's `synchronous_commit`; the others leave it as the server has it.
        read_only: only look.

    Raises:
        SettingsError: psycopg is not installed.
        RecordError: a newer Walras wrote it.
        OutputError: the server cannot be reached, or does not let us write.
    """

    def __init__(self, url: str, *, durable: Durable = "normal", read_only: bool = False) -> None:
        self._url = url
        self._idle: list[psycopg.Connection[Any]] = []
        self._backend = _Backend(url, durable)
        if read_only:
            with self.snapshot() as query:
                sql.known_version(query, len(MIGRATIONS), _NAME)
            return
        try:
            self._backend.connected()
        except Unwritable as why:
            raise OutputError(why.state.sentence) from why
        self._writer = Writer(self._backend, HEALTHY)

    def orphans(self) -> list[Hold]:
        """Open holds of writers that are no longer connected."""
        with self.snapshot() as query:
            rows = query(
                """SELECT id, request_id, at_ns, key_id, tenant, amount_nano FROM holds WHERE closed = 0 AND writer NOT IN
                    (SELECT (classid::bigint << 32) | objid::bigint FROM pg_locks WHERE locktype = 'advisory' AND objsubid = 1
                        AND database = (SELECT oid FROM pg_database WHERE datname = current_database()))
                    ORDER BY at_ns, id"""
            )
        return [Hold(*row) for row in rows]

    def stop(self) -> None:
        while self._idle:
            self._idle.pop().close()
        if self._writer is not None:
            self._writer.stop()

    @contextmanager
    def snapshot(self) -> Iterator[sql.Query]:
        db = self._begun()
        try:
            yield lambda statement, values=(): _rows(db, statement, values)
            db.execute("ROLLBACK")
        except psycopg.Error as error:
            if db.closed:
                raise OutputError(_state(error, db).sentence) from error
            db.close()
            raise RecordError(f"cannot be read: {error}", path=_NAME) from error
        except BaseException:
            db.close()
            raise
        self._idle.append(db)

    def _begun(self) -> psycopg.Connection[Any]:
        """A connection in a transaction. One that lay idle may have lost its server since."""
        with suppress(IndexError):
            while True:
                db = self._idle.pop()
                with suppress(psycopg.Error):
                    db.execute(_READ)
                    return db
                db.close()
        try:
            db = _connect(self._url)
            db.execute(_READ)
        except psycopg.Error as error:
            raise OutputError(_state(error, None).sentence) from error
        return db

    def damage(self) -> list[str]:
        """Nothing: a server checks its own pages."""
        return []

    def size(self) -> int:
        with self.snapshot() as query:
            of = "SELECT sum(pg_total_relation_size(oid)) FROM pg_class WHERE relkind = 'r' AND relnamespace = 'walras'::regnamespace"
            return int(query(of)[0][0])

    def retain(self, before_ns: int) -> int:
        """Whole months before `before_ns` go, each by dropping its partition."""
        if self._writer is None:
            raise OutputError("the ledger was opened to be read only; open it for writing")
        with self.snapshot() as query:
            tables = query(
                "SELECT c.relname FROM pg_inherits i JOIN pg_class c ON c.oid = i.inhrelid WHERE i.inhparent = 'entries'::regclass"
            )
        try:
            with _connect(self._url) as db:
                old = sorted(name for (name,) in tables if _bounds(*_month_of(name))[1] <= before_ns)
                return sum(_drop(db, name) for name in old)
        except psycopg.Error as error:
            raise OutputError(_state(error, None).sentence) from error


class _Backend:
    """The writing connection, used by one thread at a time."""

    def __init__(self, url: str, durable: str) -> None:
        self._url, self._durable = url, durable
        self._number = secrets.randbits(62)
        self._db: psycopg.Connection[Any] | None = None
        self._months: set[tuple[int, int]] = set()

    def connected(self) -> psycopg.Connection[Any]:
        if self._db is None:
            try:
                db = _connect(self._url)
            except psycopg.Error as error:
                raise Unwritable(_state(error, None)) from error
            try:
                _migrate(db)
                if self._durable == "full":
                    db.execute("SET synchronous_commit = on")
                # A batch is small beside the tables: always look up its requests, whatever statistics say.
                db.execute("SET enable_hashjoin = off")
                db.execute("SET enable_mergejoin = off")
                for statement in _STAGING:
                    db.execute(statement)
                # Of a connection that was lost, the server may still hold the lock for a moment.
                db.execute("SET lock_timeout = '5s'")
                db.execute("SELECT pg_advisory_lock(%s)", [self._number])
            except BaseException as error:
                db.close()
                if isinstance(error, psycopg.Error):
                    raise Unwritable(_state(error, None)) from error
                raise
            self._db = db
        return self._db

    def write(self, records: Sequence[Record]) -> list[WalrasError | None]:
        holds = [record for record in records if isinstance(record, Hold)]
        entries = [record for record in records if isinstance(record, Entry)]
        errors: list[WalrasError | None] = [None] * len(records)
        with self._transaction() as db:
            if holds or entries:
                self._make_partitions(db, entries)
                _copy(db, f"new_holds ({_HOLD_NAMES})", [sql.hold_row(hold) for hold in holds])
                _copy(
                    db, f"new_entries ({_ENTRY_NAMES})", [msgspec.structs.astuple(entry) for entry in entries]
                )
                db.execute("SELECT settle(%s)", [self._number])
                _rows(db, sql.COUNT, sql.counts(self._number, holds, entries))
            for k, record in enumerate(records):
                if isinstance(record, Outcome | Correction):
                    # Two gateways may speak of the same request at once.
                    db.execute("SELECT 1 FROM requests WHERE request_id = %s FOR UPDATE", [record.request_id])
                    errors[k] = sql.amend(self._query, record)
        return errors

    def explain(self, record: Record, why: Refused) -> WalrasError | None:
        try:
            return sql.explain(self._query, record, why)
        except (UnicodeEncodeError, psycopg.DataError):
            return RecordError("holds what is no text", field="request_id")
        except psycopg.Error as error:
            raise Unwritable(_state(error, self._db)) from error

    def probe(self) -> None:
        with self._transaction() as db:
            db.execute("DELETE FROM probe")
            db.execute("INSERT INTO probe VALUES (0)")

    def shut(self) -> None:
        if self._db is not None:
            self._db.close()

    def _query(self, statement: str, values: Sequence[Any] = ()) -> list[tuple[Any, ...]]:
        return _rows(self.connected(), statement, values)

    @contextmanager
    def _transaction(self) -> Iterator[psycopg.Connection[Any]]:
        db = self.connected()
        try:
            with db.transaction():
                yield db
        except Exception as error:
            self._months.clear()  # what this transaction made is gone
            if db.closed:
                self._db = None
            if isinstance(error, _WRONG_RECORD):
                raise Refused(str(error).partition("\n")[0]) from error
            if isinstance(error, psycopg.Error):
                raise Unwritable(_state(error, db)) from error
            raise

    def _make_partitions(self, db: psycopg.Connection[Any], entries: Sequence[Entry]) -> None:
        missing = {_month(entry.at_ns) for entry in entries} - self._months
        if missing:
            db.execute("SELECT pg_advisory_xact_lock(%s)", [_SCHEMA_LOCK])
        for year, month in sorted(missing):
            first, end = _bounds(year, month)
            name = f"entries_{year:04}{month:02}"
            db.execute(
                f"CREATE TABLE IF NOT EXISTS {name} PARTITION OF entries FOR VALUES FROM ({first}) TO ({end})".encode()
            )
        self._months |= missing


_WRONG_RECORD = (psycopg.IntegrityError, psycopg.DataError, UnicodeEncodeError, OverflowError, ValueError)
_NAME = "the ledger in PostgreSQL"


def _connect(url: str) -> psycopg.Connection[Any]:
    db = psycopg.connect(url, autocommit=True)
    try:
        db.execute("SET search_path = walras")
        db.execute("SET client_min_messages = warning")
    except BaseException:
        db.close()
        raise
    return db


def _rows(db: psycopg.Connection[Any], statement: str, values: Sequence[Any] = ()) -> list[tuple[Any, ...]]:
    cursor = db.execute(statement.replace("?", "%s").encode(), values or None)
    return cursor.fetchall() if cursor.description else []


def _copy(db: psycopg.Connection[Any], into: str, rows: Sequence[tuple[Any, ...]]) -> None:
    if rows:
        with db.cursor() as cursor, cursor.copy(f"COPY {into} FROM STDIN".encode()) as copy:
            for row in rows:
                copy.write_row(row)


def _migrate(db: psycopg.Connection[Any]) -> None:
    with db.transaction():
        db.execute("SELECT pg_advisory_xact_lock(%s)", [_SCHEMA_LOCK])
        db.execute("CREATE SCHEMA IF NOT EXISTS walras")
        db.execute("CREATE TABLE IF NOT EXISTS migrations (number bigint PRIMARY KEY, name text NOT NULL)")
        taken = sql.known_version(lambda statement: _rows(db, statement), len(MIGRATIONS), _NAME)
        for number, (name, statements) in enumerate(MIGRATIONS[taken:], start=taken + 1):
            for statement in statements:
                db.execute(statement.encode())
            db.execute("INSERT INTO migrations VALUES (%s, %s)", [number, name])


def _drop(db: psycopg.Connection[Any], name: str) -> int:
    with db.transaction():
        db.execute(f"CREATE TEMP TABLE retiring ON COMMIT DROP AS SELECT request_id FROM {name}".encode())
        for statement in sql.RETIRE:
            db.execute(statement.encode())
        gone = db.execute(
            "DELETE FROM requests WHERE request_id IN (SELECT request_id FROM retiring)"
        ).rowcount
        db.execute(f"DROP TABLE {name}".encode())
    return gone


def _month(at_ns: int) -> tuple[int, int]:
    day = datetime.fromtimestamp(at_ns // 1_000_000_000, UTC)
    return day.year, day.month


def _month_of(partition: str) -> tuple[int, int]:
    found = _PARTITION.fullmatch(partition)
    if found is None:
        raise RecordError(f"entries have a partition '{partition}' that Walras did not make", path=_NAME)
    return int(found[1]), int(found[2])


def _bounds(year: int, month: int) -> tuple[int, int]:
    """First nanosecond, and the next month's first."""
    after = (year + month // 12, month % 12 + 1)
    first, end = (int(datetime(y, m, 1, tzinfo=UTC).timestamp()) for y, m in ((year, month), after))
    return first * 1_000_000_000, end * 1_000_000_000


def _state(error: psycopg.Error, db: psycopg.Connection[Any] | None) -> State:
    if isinstance(error, psycopg.errors.DiskFull):
        return State(
            "disk full", f"{_NAME}: the server's disk is full; make room, and the ledger goes on by itself."
        )
    if isinstance(error, psycopg.errors.ReadOnlySqlTransaction):
        return State("read-only", f"{_NAME}: the server only lets it be read; connect to the primary.")
    what = str(error).strip().partition("\n")[0]
    if db is None or db.closed:
        return State("unreachable", f"{_NAME}: the server does not answer: {what}")
    return State("failed", f"{_NAME}: cannot be written: {what}")
