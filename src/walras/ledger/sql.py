"""The tables both databases have, and what is read and written in the same way in both.

Statements here are in the SQL that SQLite and PostgreSQL share, with `?` for a parameter. Tables:

    holds        one row per hold; `closed` is 1 once its request has an entry
    entries      one row per request
    outcomes     one row per (request, source)
    corrections  what a request really cost, and the difference to what the ledger said before
    control      running totals by writer, added to in the transaction that adds the rows: rows that vanish or change show
    retired      sums by day, tenant and key of what retention removed
    migrations   which steps of the schema this database has taken
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from typing import Any

import msgspec

from walras.errors import OutputError, RecordError, WalrasError
from walras.ledger.entry import Conflict, Correction, Entry, Hold, Outcome, Record, UnknownRequest
from walras.ledger.money import Nano
from walras.ledger.writer import HEALTHY, State, Ticket, Writer, written

Query = Callable[..., Sequence[tuple[Any, ...]]]
"""(sql, parameters) → rows."""

DAY_NS = 86_400 * 1_000_000_000

HOLD_COLUMNS_1 = """
    request_id text NOT NULL, id text NOT NULL, at_ns bigint NOT NULL CHECK (at_ns >= 0), key_id text NOT NULL,
    tenant text NOT NULL, amount_nano bigint NOT NULL CHECK (amount_nano >= 0)"""

ENTRY_COLUMNS_1 = """
    request_id text NOT NULL, at_ns bigint NOT NULL CHECK (at_ns >= 0), tenant text NOT NULL, key_id text NOT NULL,
    status text NOT NULL CHECK (status IN ('ok', 'error', 'cut', 'refused', 'unknown')),
    settled text NOT NULL CHECK (settled IN ('exact', 'estimated', 'cap', 'none')),
    session text, task_class text, model_asked text, use text, upstream text, http_status bigint,
    value_usd double precision NOT NULL, quality_expected double precision, value_nano bigint NOT NULL,
    compute_nano bigint NOT NULL, latency_nano bigint NOT NULL, risk_nano bigint NOT NULL, alternatives {bytes} NOT NULL,
    propensity double precision CHECK (propensity >= 0 AND propensity <= 1), prices_version text,
    input_tokens bigint, cached_input_tokens bigint, output_tokens bigint, reasoning_tokens bigint,
    reserved_nano bigint NOT NULL CHECK (reserved_nano >= 0), charged_nano bigint NOT NULL CHECK (charged_nano >= 0),
    seconds_to_first double precision, seconds double precision, own_delay_nano bigint NOT NULL, prompt text"""

OVERRUN_1 = """
    overrun_nano bigint GENERATED ALWAYS AS
        (CASE WHEN charged_nano > reserved_nano THEN charged_nano - reserved_nano ELSE 0 END) STORED"""

SMALL_TABLES_1 = (
    """CREATE TABLE outcomes (request_id text NOT NULL, at_ns bigint NOT NULL,
        quality double precision NOT NULL CHECK (quality >= 0 AND quality <= 1), loss_usd double precision CHECK (loss_usd >= 0),
        source text NOT NULL, PRIMARY KEY (request_id, source))""",
    """CREATE TABLE corrections (request_id text NOT NULL, nth bigint NOT NULL, at_ns bigint NOT NULL,
        charged_nano bigint NOT NULL CHECK (charged_nano >= 0), delta_nano bigint NOT NULL, source text NOT NULL,
        PRIMARY KEY (request_id, nth))""",
    """CREATE TABLE control (writer bigint PRIMARY KEY, holds bigint NOT NULL, held_nano bigint NOT NULL,
        entries bigint NOT NULL, charged_nano bigint NOT NULL)""",
    """CREATE TABLE retired (day_ns bigint NOT NULL, tenant text NOT NULL, key_id text NOT NULL, holds bigint NOT NULL,
        held_nano bigint NOT NULL, entries bigint NOT NULL, charged_nano bigint NOT NULL, corrected_nano bigint NOT NULL,
        PRIMARY KEY (day_ns, tenant, key_id))""",
)

HOLD_COLUMNS = ("request_id", "id", "at_ns", "key_id", "tenant", "amount_nano")
ENTRY_COLUMNS = tuple(Entry.__struct_fields__)
_ENTRY = ", ".join(f"e.{name}" for name in ENTRY_COLUMNS)

COUNT = """INSERT INTO control VALUES (?, ?, ?, ?, ?) ON CONFLICT (writer) DO UPDATE SET holds = control.holds + excluded.holds,
    held_nano = control.held_nano + excluded.held_nano, entries = control.entries + excluded.entries,
    charged_nano = control.charged_nano + excluded.charged_nano"""

RETIRE = (
    """INSERT INTO retired
        SELECT e.at_ns / 86400000000000 * 86400000000000, e.tenant, e.key_id, sum(coalesce(h.n, 0)), sum(coalesce(h.nano, 0)),
            count(*), sum(e.charged_nano), sum(coalesce(c.nano, 0))
        FROM retiring r JOIN entries e ON e.request_id = r.request_id
        LEFT JOIN (SELECT request_id, count(*) AS n, sum(amount_nano) AS nano FROM holds
            WHERE request_id IN (SELECT request_id FROM retiring) GROUP BY request_id) h ON h.request_id = e.request_id
        LEFT JOIN (SELECT request_id, sum(delta_nano) AS nano FROM corrections
            WHERE request_id IN (SELECT request_id FROM retiring) GROUP BY request_id) c ON c.request_id = e.request_id
        GROUP BY 1, 2, 3
        ON CONFLICT (day_ns, tenant, key_id) DO UPDATE SET holds = retired.holds + excluded.holds,
            held_nano = retired.held_nano + excluded.held_nano, entries = retired.entries + excluded.entries,
            charged_nano = retired.charged_nano + excluded.charged_nano,
            corrected_nano = retired.corrected_nano + excluded.corrected_nano""",
    *(
        f"DELETE FROM {table} WHERE request_id IN (SELECT request_id FROM retiring)"
        for table in ("holds", "outcomes", "corrections")
    ),
)
"""Sums of the requests named in the table `retiring`, then all their rows but the entries."""


class Filter(msgspec.Struct, frozen=True):
    """Which entries; None asks for nothing."""

    request_id: str | None = None
    tenant: str | None = None
    key_id: str | None = None
    session: str | None = None
    use: str | None = None
    status: str | None = None
    settled: str | None = None
    since_ns: int | None = None
    until_ns: int | None = None
    """Before this."""
    reconciled: bool | None = None
    """Whether somebody has said what it really cost."""

    def where(self) -> tuple[str, list[Any]]:
        """SQL and its parameters; begins with AND where there is anything."""
        given = {name: value for name in self.__struct_fields__ if (value := getattr(self, name)) is not None}
        reconciled = given.pop("reconciled", None)
        bounds = {"since_ns": "at_ns >= ?", "until_ns": "at_ns < ?"}
        sql = "".join(f" AND e.{bounds.get(name, f'{name} = ?')}" for name in given)
        if reconciled is not None:
            any_ = "EXISTS" if reconciled else "NOT EXISTS"
            sql += f" AND {any_} (SELECT 1 FROM corrections k WHERE k.request_id = e.request_id)"
        return sql, list(given.values())


class Row(msgspec.Struct, frozen=True):
    """An entry with its place in the ledger, and what is known of it since."""

    seq: int
    entry: Entry
    corrected_nano: Nano | None
    """What it really cost, if it was corrected."""

    @property
    def paid_nano(self) -> Nano:
        return self.entry.charged_nano if self.corrected_nano is None else self.corrected_nano


def known_version(query: Query, known: int, where: str) -> int:
    """How many migrations the database has taken, if we know them all.

    Raises:
        RecordError: a newer Walras wrote it.
    """
    taken = int(query("SELECT coalesce(max(number), 0) FROM migrations")[0][0])
    if taken > known:
        what = f"was written by a newer Walras (schema {taken}; this one knows {known})"
        raise RecordError(what, path=where, hint="update walras")
    return taken


def hold_row(hold: Hold) -> tuple[Any, ...]:
    return (hold.request_id, hold.id, hold.at_ns, hold.key_id, hold.tenant, hold.amount_nano)


def counts(writer: int, holds: Sequence[Hold], entries: Sequence[Entry]) -> tuple[int, ...]:
    """Parameters of COUNT."""
    held, charged = sum(h.amount_nano for h in holds), sum(e.charged_nano for e in entries)
    return (writer, len(holds), held, len(entries), charged)


# --- reading --------------------------------------------------------------------------------------------------------


def read_entries(query: Query, after: int | None, limit: int, where: Filter, newest: bool) -> list[Row]:
    sql, values = where.where()
    if after is not None:
        sql += " AND e.seq < ?" if newest else " AND e.seq > ?"
        values.append(after)
    rows = query(
        f"""SELECT e.seq, {_ENTRY}, (SELECT c.charged_nano FROM corrections c WHERE c.request_id = e.request_id
            ORDER BY c.nth DESC LIMIT 1) FROM entries e WHERE 1 = 1{sql} ORDER BY e.seq {"DESC" if newest else ""} LIMIT ?""",
        [*values, limit],
    )
    return [Row(row[0], Entry(*row[1:-1]), row[-1]) for row in rows]


def read_outcomes(query: Query, request_ids: Sequence[str]) -> dict[str, list[Outcome]]:
    found: dict[str, list[Outcome]] = {}
    marks = ", ".join("?" * len(request_ids))
    sql = f"""SELECT request_id, at_ns, quality, loss_usd, source FROM outcomes WHERE request_id IN ({marks})
        ORDER BY at_ns, source"""
    for row in query(sql, request_ids) if request_ids else ():
        found.setdefault(row[0], []).append(Outcome(*row))
    return found


def read_open(query: Query) -> list[Hold]:
    rows = query(
        "SELECT id, request_id, at_ns, key_id, tenant, amount_nano FROM holds WHERE closed = 0 ORDER BY at_ns, id"
    )
    return [Hold(*row) for row in rows]


def read_spent(query: Query, since_ns: int, tenant: str | None, key_id: str | None) -> Nano:
    own, values = Filter(tenant=tenant, key_id=key_id).where()
    # What retention removed is known by whole days: the day of `since_ns` counts in full, never too little.
    parts = (
        ("sum(e.charged_nano) FROM entries e WHERE e.at_ns >= ?", since_ns),
        (
            "sum(c.delta_nano) FROM corrections c JOIN entries e ON e.request_id = c.request_id WHERE e.at_ns >= ?",
            since_ns,
        ),
        (
            "sum(e.charged_nano + e.corrected_nano) FROM retired e WHERE e.day_ns >= ?",
            since_ns // DAY_NS * DAY_NS,
        ),
    )
    return sum(int(query(f"SELECT {part}{own}", [since, *values])[0][0] or 0) for part, since in parts)


# --- writing what is not in the fast path -----------------------------------------------------------------------------


def amend(query: Query, record: Outcome | Correction) -> WalrasError | None:
    """Write one outcome or correction inside the transaction of `query`; what is wrong with it is returned."""
    if isinstance(record, Outcome):
        return _add_outcome(query, record)
    return _add_correction(query, record)


def _add_outcome(query: Query, outcome: Outcome) -> WalrasError | None:
    known = query(
        "SELECT quality, loss_usd FROM outcomes WHERE request_id = ? AND source = ?",
        [outcome.request_id, outcome.source],
    )
    if known:
        if known[0] == (outcome.quality, outcome.loss_usd):
            return None
        what = f"request '{outcome.request_id}' has another outcome from '{outcome.source}': quality {known[0][0]:g}"
        return Conflict(what, hint="outcomes are not changed; name another source")
    if not query("SELECT 1 FROM entries WHERE request_id = ?", [outcome.request_id]):
        return _unknown(outcome.request_id)
    query("INSERT INTO outcomes VALUES (?, ?, ?, ?, ?)", msgspec.structs.astuple(outcome))
    return None


def _add_correction(query: Query, correction: Correction) -> WalrasError | None:
    entry = query("SELECT settled, charged_nano FROM entries WHERE request_id = ?", [correction.request_id])
    if not entry:
        return _unknown(correction.request_id)
    settled, before = entry[0]
    if settled not in ("cap", "estimated"):
        what = f"request '{correction.request_id}' was settled '{settled}'"
        return Conflict(what, hint="only what was settled at its cap or estimated is corrected")
    last = query(
        "SELECT nth, charged_nano FROM corrections WHERE request_id = ? ORDER BY nth DESC LIMIT 1",
        [correction.request_id],
    )
    nth, before = last[0] if last else (0, before)
    if correction.charged_nano != before or not last:
        delta = correction.charged_nano - before
        values = [
            correction.request_id,
            nth + 1,
            correction.at_ns,
            correction.charged_nano,
            delta,
            correction.source,
        ]
        query("INSERT INTO corrections VALUES (?, ?, ?, ?, ?, ?)", values)
    return None


def _unknown(request_id: str) -> UnknownRequest:
    return UnknownRequest(f"the ledger has no request '{request_id}'", hint="it may have been retired")


def explain(query: Query, record: Record, why: Exception) -> WalrasError | None:
    """Why the database refused this one record; None if it has the very same already, so that a retry does no harm."""
    name = f"request '{record.request_id}'"
    if isinstance(record, Hold):
        rows = query(
            "SELECT id, request_id, at_ns, key_id, tenant, amount_nano FROM holds WHERE request_id = ?",
            [record.request_id],
        )
        if any(Hold(*row) == record for row in rows):
            return None
        if any(row[0] == record.id for row in rows):
            return Conflict(
                f"{name} has another hold '{record.id}'", hint="give each hold of a request its own id"
            )
        if query("SELECT 1 FROM entries WHERE request_id = ?", [record.request_id]):
            return Conflict(f"{name} is settled already", hint="a request is held before its entry")
    if isinstance(record, Entry):
        known = read_entries(query, None, 1, Filter(request_id=record.request_id), newest=True)
        if known:
            return (
                None
                if known[0].entry == record
                else Conflict(f"{name} has another entry", hint="entries are not changed")
            )
        rows = query(
            "SELECT sum(amount_nano) FROM holds WHERE request_id = ? AND closed = 0", [record.request_id]
        )
        if (held := int(rows[0][0] or 0)) != record.reserved_nano:
            return Conflict(
                f"{name} holds {held} nano-USD, its entry says {record.reserved_nano}",
                hint="close what was held",
            )
    return Conflict(f"{name} cannot be written: {why}")


ALL = Filter()


class SqlStore(ABC):
    """What the stores have in common: records go to the writer, and are read from one consistent view at a time."""

    _writer: Writer | None = None
    """None where the ledger was opened to be read only."""

    @abstractmethod
    def snapshot(self) -> AbstractContextManager[Query]:
        """A view that stays the same while it is used."""

    def _submit(self, record: Record) -> Ticket:
        if self._writer is None:
            raise OutputError("the ledger was opened to be read only; open it for writing")
        return self._writer.submit(record)

    def hold(self, hold: Hold) -> Ticket:
        return self._submit(hold)

    def close(self, entry: Entry) -> Ticket:
        return self._submit(entry)

    def outcome(self, outcome: Outcome) -> Ticket:
        return self._submit(outcome)

    def reconcile(self, correction: Correction) -> Ticket:
        return self._submit(correction)

    async def written(self, ticket: Ticket) -> None:
        await written(ticket)

    def state(self) -> State:
        return HEALTHY if self._writer is None else self._writer.state

    def entries(
        self, after: int | None = None, limit: int = 500, where: Filter = ALL, *, newest: bool = False
    ) -> list[Row]:
        with self.snapshot() as query:
            return read_entries(query, after, limit, where, newest)

    def outcomes(self, request_ids: Sequence[str]) -> dict[str, list[Outcome]]:
        with self.snapshot() as query:
            return read_outcomes(query, request_ids)

    def open_holds(self) -> list[Hold]:
        with self.snapshot() as query:
            return read_open(query)

    def spent(self, since_ns: int, *, tenant: str | None = None, key_id: str | None = None) -> Nano:
        with self.snapshot() as query:
            return read_spent(query, since_ns, tenant, key_id)


def pages(query: Query, where: Filter = ALL, size: int = 2_000) -> Iterator[list[Row]]:
    """All entries that match, a page at a time, from one snapshot."""
    after: int | None = None
    while page := read_entries(query, after, size, where, newest=False):
        yield page
        after = page[-1].seq
