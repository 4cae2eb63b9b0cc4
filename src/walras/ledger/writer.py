"""Group commit: one thread writes whatever has come in since its last commit as one transaction.

With little to do, a record is written at once; under load, batches grow by themselves. What one round of an event loop submits
is handed over together: to wake the thread for each record would cost more than to write it. What a journal has made safe
already waits for some company.
"""

from __future__ import annotations

import asyncio
import logging
import threading
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Literal, NamedTuple, Protocol

from walras.errors import OutputError, WalrasError
from walras.ledger.entry import Record
from walras.ledger.journal import Journal

Durable = Literal["journal", "normal", "full"]
"""When a record is acknowledged; see the stores."""
MOST = 1024
"""Records at which a transaction takes no more: that would gain nothing and make the first ones wait."""
GATHER_S = 0.005
"""Seconds for which records that nobody waits for are gathered."""
PROBE_S = 0.25
"""Seconds between tries to write while writing fails and nobody asks for it."""
FLUSH_S = 1.0
"""Most seconds that a read waits for what was acknowledged before it; longer only where the database is held up."""


class State(NamedTuple):
    """Whether the ledger can be written, and a sentence for people."""

    name: Literal["healthy", "read-only", "disk full", "unreachable", "failed", "closed"]
    sentence: str


HEALTHY = State("healthy", "The ledger is written.")


class Refused(Exception):
    """The database refuses a record of a batch; the batch was rolled back."""


class Unwritable(Exception):
    """Nothing can be written now; the batch was rolled back."""

    def __init__(self, state: State) -> None:
        self.state = state
        super().__init__(state.sentence)


class Backend(Protocol):
    """What the thread calls, and nobody else does."""

    def write(self, records: Sequence[Record]) -> list[WalrasError | None]:
        """Commit all of them; what is wrong with single ones is returned. Raises Refused, Unwritable."""

    def explain(self, record: Record, why: Refused) -> WalrasError | None:
        """Why this one is refused; None if the ledger already says the same. Raises Unwritable."""

    def probe(self) -> None:
        """Write something that does not count. Raises Unwritable."""

    def shut(self) -> None:
        """Let the database go."""


class Ticket:
    """A record on its way to the ledger."""

    __slots__ = ("_hurry", "done", "error", "record", "safe", "waiters")

    def __init__(self, record: Record | None, hurry: Callable[[], None]) -> None:
        self.record = record
        """None: only what was submitted before it is waited for."""
        self._hurry = hurry
        self.safe = False
        """It is in the journal: done, whenever the database gets it."""
        self.done = False
        """It is durable, or refused."""
        self.error: WalrasError | None = None
        self.waiters: list[asyncio.Future[None] | threading.Event] = []

    def wait(self, seconds: float | None = None) -> None:
        """Block until it is durable. Raises what `written` raises."""
        self._hurry()  # the loop that would do it may be the one that this blocks
        event = threading.Event()
        self.waiters.append(event)
        if not self.done and not event.wait(seconds):
            raise OutputError(f"the ledger did not answer within {seconds} s")
        self.check()

    def check(self) -> None:
        if self.error is not None:
            raise self.error


class Writer:
    """The thread, what it is to write, and whether writing works."""

    def __init__(self, backend: Backend, state: State) -> None:
        self.state = state
        self._backend = backend
        self._journal: Journal | None = None
        self._submitted: list[Ticket] = []
        self._lock = threading.Lock()
        """Of what is submitted, the journal, and the end: nothing is queued behind it, where nobody would answer."""
        self._stopping = False
        self._work, self._hurried = threading.Event(), threading.Event()
        self._thread = threading.Thread(target=self._run, name="walras-ledger", daemon=True)
        self._thread.start()

    def keep_in(self, journal: Journal) -> None:
        """From now on, a hold or an entry is acknowledged when it is in the journal."""
        with self._lock:
            self._journal = journal

    def submit(self, record: Record) -> Ticket:
        """Take it; returns at once.

        Raises:
            OutputError: the ledger is closed.
        """
        ticket = Ticket(record, self._hurried.set)
        with self._lock:
            if self._stopping:
                raise OutputError("the ledger is closed; open it again to write")
            if self._journal is not None:
                ticket.done = ticket.safe = self._journal.append(record)
            idle = not self._submitted
            self._submitted.append(ticket)
        if idle:
            self._work.set()
        if not ticket.safe and not self._hurried.is_set():
            try:
                asyncio.get_running_loop().call_soon(self._hurried.set)
            except RuntimeError:  # not in a loop
                self._hurried.set()
        return ticket

    def flush(self) -> None:
        """Block until what is in the journal is in the database, or cannot be written now, or takes too long."""
        if self._journal is None:
            return
        ticket = Ticket(None, self._hurried.set)
        with self._lock:
            if self._stopping or self.state is not HEALTHY:
                return
            self._submitted.append(ticket)
        self._work.set()
        with suppress(OutputError):
            ticket.wait(FLUSH_S)

    def stop(self) -> None:
        """Write what is left, then close."""
        with self._lock:
            self._stopping = True
        self._hurried.set()
        self._work.set()
        self._thread.join()

    def _run(self) -> None:
        kept: list[Ticket] = []  # safe in the journal, and still to be written
        while True:
            self._work.wait(None if self.state is HEALTHY and not kept else PROBE_S)
            self._hurried.wait(GATHER_S)
            with self._lock:
                stopping, batch = self._stopping, self._take(kept)
            if not batch and self.state is not HEALTHY:
                self._probe()
            late, kept = bool(kept), self._write(batch)
            if late and not kept:  # the half that is being filled holds some of what is written: empty it too
                self._work.set()
            if stopping:
                break
        self._backend.shut()
        self.state = State("closed", "The ledger is closed.")
        if self._journal is not None:
            self._journal.close(empty=not kept)

    def _take(self, kept: list[Ticket]) -> list[Ticket]:
        """What is to be written now, in the order in which it came; with the lock held."""
        batch = [*kept, *self._submitted]
        self._submitted = []
        self._work.clear()
        self._hurried.clear()
        if self._journal is not None and not kept:
            self._journal.turn()
        return batch

    def _write(self, batch: list[Ticket]) -> list[Ticket]:
        """Write and answer; what is safe and could not be written is returned."""
        for start in range(0, len(batch), MOST):
            part = batch[start : start + MOST]
            records = [ticket.record for ticket in part if ticket.record is not None]
            errors = self._attempt(records) if records else []
            if self.state is not HEALTHY:
                rest = batch[start:]
                failed = [ticket for ticket in rest if not ticket.safe]
                self._resolve(failed, [OutputError(self.state.sentence) for _ in failed])
                return [ticket for ticket in rest if ticket.safe]
            told = iter(errors)
            self._resolve(part, [None if ticket.record is None else next(told) for ticket in part])
        if self._journal is not None:
            self._journal.drained()
        return []

    def _attempt(self, records: Sequence[Record]) -> list[WalrasError | None]:
        """Write them; a batch that is refused is halved until the culprit stands alone. Nothing where nothing could be."""
        try:
            try:
                errors = self._backend.write(records)
            except Refused as why:
                if len(records) > 1:
                    half = len(records) // 2
                    done = self._attempt(records[:half])
                    return done + self._attempt(records[half:]) if self.state is HEALTHY else []
                errors = [self._backend.explain(records[0], why)]
            self._now(HEALTHY)
            return errors
        except Unwritable as why:
            self._now(why.state)
        except Exception as error:  # a bug must not leave requests waiting for a dead thread
            self._now(_broken(error))
        return []

    def _now(self, state: State) -> None:
        """How writing goes; a change is logged."""
        if state.name != self.state.name:
            level = logging.WARNING if state is HEALTHY else logging.ERROR
            logging.getLogger("walras.ledger").log(level, state.sentence)
        self.state = state

    def _probe(self) -> None:
        try:
            self._backend.probe()
            self._now(HEALTHY)
        except Unwritable as why:
            self._now(why.state)
        except Exception as error:
            self._now(_broken(error))

    @staticmethod
    def _resolve(batch: Sequence[Ticket], errors: Sequence[WalrasError | None]) -> None:
        waking: dict[asyncio.AbstractEventLoop, list[asyncio.Future[None]]] = {}
        for ticket, error in zip(batch, errors, strict=True):
            if ticket.safe:
                if error is not None:  # it was acknowledged: nobody waits to hear of it
                    logging.getLogger("walras.ledger").error("%s", error)
                continue
            ticket.error = error
            ticket.done = True
            for waiter in ticket.waiters:
                if isinstance(waiter, threading.Event):
                    waiter.set()
                else:
                    waking.setdefault(waiter.get_loop(), []).append(waiter)
        for loop, futures in waking.items():
            with suppress(RuntimeError):  # a loop that has ended waits for nothing
                loop.call_soon_threadsafe(_wake, futures)


async def written(ticket: Ticket) -> None:
    """Return once the record is committed.

    Raises:
        OutputError: the ledger cannot be written now (its state says why). The record is the caller's to submit again.
        Conflict, UnknownRequest: this record is wrong.
    """
    if not ticket.done:
        future = asyncio.get_running_loop().create_future()
        ticket.waiters.append(future)
        # The writer sets `done` before it looks for waiters, so one of the two sees the other.
        if not ticket.done:
            await future
    ticket.check()


def _broken(error: Exception) -> State:
    return State("failed", f"The ledger failed: {type(error).__name__}: {error}")


def _wake(futures: Sequence[asyncio.Future[None]]) -> None:
    for future in futures:
        if not future.done():
            future.set_result(None)
