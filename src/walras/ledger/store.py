"""What a ledger can do, whichever database keeps it."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Protocol

from walras.errors import SettingsError
from walras.ledger.entry import Correction, Entry, Hold, Outcome
from walras.ledger.money import Nano
from walras.ledger.sql import ALL, Filter, Query, Row
from walras.ledger.sqlite import SqliteStore
from walras.ledger.writer import Durable, State, Ticket

LEDGER = "WALRAS_LEDGER"
"""Environment variable with the URL of a ledger. It may hold a password, and everybody on a machine sees arguments."""


class Store(Protocol):
    """A ledger.

    Writes return at once; a `Ticket` is durable when `written` (or `Ticket.wait`) returns, which raises `OutputError` if the
    ledger cannot be written now, and `Conflict` or `UnknownRequest` (both `RecordError`) if the record contradicts it;
    of a record in a journal, that is only logged. A read sees what was acknowledged before it, unless writing fails or is held
    up. Whatever raised was not written. The very same record again is accepted and changes nothing. Reads block: call them
    from a thread where a loop runs.
    """

    def hold(self, hold: Hold) -> Ticket:
        """Set money aside, before the upstream is called."""

    def close(self, entry: Entry) -> Ticket:
        """Write the entry and close its holds at once. One without holds (a refusal) reserves 0."""

    def outcome(self, outcome: Outcome) -> Ticket:
        """Say how good an answer was; once for each (request, source)."""

    def reconcile(self, correction: Correction) -> Ticket:
        """Say what a request settled at its cap, or estimated, really cost."""

    async def written(self, ticket: Ticket) -> None:
        """Return when it is durable."""

    def state(self) -> State:
        """Whether writing works, as of the last try; while it does not, one is made four times a second."""

    def entries(
        self, after: int | None = None, limit: int = 500, where: Filter = ALL, *, newest: bool = False
    ) -> list[Row]:
        """A page: the entries behind the one with seq `after`, in the order written, or the newest first."""

    def outcomes(self, request_ids: Sequence[str]) -> dict[str, list[Outcome]]:
        """By request, oldest first."""

    def open_holds(self) -> list[Hold]:
        """Holds without an entry."""

    def orphans(self) -> list[Hold]:
        """Open holds whose process is dead."""

    def spent(self, since_ns: int, *, tenant: str | None = None, key_id: str | None = None) -> Nano:
        """Charged to requests that came since then, corrections included, open holds not.

        Exact as far back as entries are kept; before that by whole UTC days, the first one in full.
        """

    def retain(self, before_ns: int) -> int:
        """Remove what is older, holds and outcomes with it, and keep sums by day, tenant and key. How many entries went."""

    def snapshot(self) -> AbstractContextManager[Query]:
        """A view that stays the same while it is used: for reports."""

    def damage(self) -> list[str]:
        """What the database finds wrong with its own file."""

    def size(self) -> int:
        """Bytes on disk."""

    def stop(self) -> None:
        """Write what is queued, and close."""


def open_store(url: str | Path, *, durable: Durable = "normal", read_only: bool = False) -> Store:
    """`postgresql://…`, or the path of a SQLite file, made if there is none. See `SqliteStore`, `PostgresStore`."""
    if str(url).startswith(("postgresql://", "postgres://")):
        from walras.ledger.postgres import PostgresStore  # noqa: PLC0415 - an extra

        return PostgresStore(str(url), durable=durable, read_only=read_only)
    if "://" in str(url):
        raise SettingsError("a ledger is at postgresql://…, or in a file", key="--ledger")
    return SqliteStore(url, durable=durable, read_only=read_only)
