"""Entries on their way into the ledger: while the process lives, none is forgotten."""

from __future__ import annotations

import asyncio

from msgspec import structs

from walras.errors import OutputError
from walras.gateway.http import log_bug
from walras.ledger import Conflict, Entry, Nano, Store

AGAIN_S = 0.25
"""Seconds between tries while the ledger cannot be written."""


class Books:
    """The ledger, and the entries it still owes."""

    def __init__(self, store: Store) -> None:
        self.store = store
        self._owed: dict[str, Entry] = {}
        self._paying: asyncio.Task[None] | None = None

    @property
    def problem(self) -> str | None:
        """Why nothing new may be begun: what cannot be written must not be spent."""
        state = self.store.state()
        if state.name != "healthy":
            return state.sentence
        return f"{len(self._owed)} entries are still to be written" if self._owed else None

    async def close(self, entry: Entry) -> None:
        """Return when the entry is durable.

        Raises:
            OutputError: it cannot be written now. It is kept, and written as soon as it can be.
            RecordError: the ledger refuses it; or any bug. Its money is written without the rest.
        """
        try:
            await self._write(entry)
        except (OutputError, asyncio.CancelledError):
            self._keep(entry)
            raise
        except Exception:
            self._keep(_plain(entry))
            raise

    async def paid(self, within_s: float) -> int:
        """Wait until nothing is owed; how many entries are, after so many seconds."""
        if self._paying is not None:
            await asyncio.wait({self._paying}, timeout=within_s)
            self._paying.cancel()
        return len(self._owed)

    async def _write(self, entry: Entry) -> None:
        ticket = self.store.close(entry)
        if ticket.done and ticket.error is None:
            return
        try:
            await self.store.written(ticket)
        except Conflict:
            held = await asyncio.to_thread(self._held, entry.request_id)
            if held == entry.reserved_nano:
                raise
            settled = "estimated" if entry.settled == "cap" else entry.settled
            await self.store.written(
                self.store.close(structs.replace(entry, reserved_nano=held, settled=settled))
            )

    def _held(self, request_id: str) -> Nano:
        """What the ledger has open. A server that died as it wrote a hold may have it, though it could not say so."""
        return sum(hold.amount_nano for hold in self.store.open_holds() if hold.request_id == request_id)

    def _keep(self, entry: Entry) -> None:
        self._owed[entry.request_id] = entry
        if self._paying is None or self._paying.done():
            self._paying = asyncio.create_task(self._pay())

    async def _pay(self) -> None:
        while self._owed:
            for entry in tuple(self._owed.values()):
                try:
                    await self._write(entry)
                except OutputError:
                    await asyncio.sleep(AGAIN_S)
                    break
                except Exception as error:
                    if (plain := _plain(entry)) != entry:
                        self._owed[entry.request_id] = plain
                        continue
                    log_bug(error)
                del self._owed[entry.request_id]


def _plain(entry: Entry) -> Entry:
    """What must be known of a request in any case: whose it is, and its money."""
    return Entry(
        request_id=entry.request_id,
        at_ns=entry.at_ns,
        tenant=entry.tenant,
        key_id=entry.key_id,
        status=entry.status,
        settled=entry.settled,
        compute_nano=entry.charged_nano,
        reserved_nano=entry.reserved_nano,
        charged_nano=entry.charged_nano,
    )
