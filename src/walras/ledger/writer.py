"""Group commit: one thread writes whatever has come in since its last commit as one transaction.

With little to do, a record is written at once; under load, batches grow by themselves. Nothing waits on a timer. What one
round of an event loop submits is handed over together: to wake the thread for each record would cost more than to write it.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Sequence
from contextlib import suppress
from queue import Empty, SimpleQueue
from typing import Literal, NamedTuple, Protocol

from walras.errors import OutputError, WalrasError
from walras.ledger.entry import Record

MOST = 1024
"""Records at which a transaction takes no more: that would gain nothing and make the first ones wait."""
PROBE_S = 0.25
"""Seconds between tries to write while writing fails and nobody asks for it."""


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

    __slots__ = ("_hand_over", "done", "error", "record", "waiters")

    def __init__(self, record: Record, hand_over: Callable[[], None]) -> None:
        self.record = record
        self._hand_over = hand_over
        self.done = False
        self.error: WalrasError | None = None
        self.waiters: list[asyncio.Future[None] | threading.Event] = []

    def wait(self, seconds: float | None = None) -> None:
        """Block until it is durable. Raises what `written` raises."""
        self._hand_over()  # the loop that would do it may be the one that this blocks
        event = threading.Event()
        self.waiters.append(event)
        if not self.done and not event.wait(seconds):
            raise OutputError(f"the ledger did not answer within {seconds} s")
        self.check()

    def check(self) -> None:
        if self.error is not None:
            raise self.error


class Writer:
    """The thread, its queue, and whether writing works."""

    def __init__(self, backend: Backend, state: State) -> None:
        self.state = state
        self._backend = backend
        self._queue: SimpleQueue[list[Ticket] | None] = SimpleQueue()
        self._submitted: list[Ticket] = []
        self._stopping = False
        self._ending = threading.Lock()
        """So that nothing is queued behind the end, where nobody would answer it."""
        self._thread = threading.Thread(target=self._run, name="walras-ledger", daemon=True)
        self._thread.start()

    def submit(self, record: Record) -> Ticket:
        """Queue it; returns at once.

        Raises:
            OutputError: the ledger is closed.
        """
        ticket = Ticket(record, self._hand_over)
        with self._ending:
            if self._stopping:
                raise OutputError("the ledger is closed; open it again to write")
            self._submitted.append(ticket)
        try:
            asyncio.get_running_loop().call_soon(self._hand_over)
        except RuntimeError:  # not in a loop
            self._hand_over()
        return ticket

    def _hand_over(self) -> None:
        """Queue what was submitted since the last time."""
        if self._submitted:
            with self._ending:
                batch, self._submitted = self._submitted, []
                self._queue.put(batch)

    def stop(self) -> None:
        """Write what is queued, then close."""
        with self._ending:
            if not self._stopping:
                self._stopping = True
                self._queue.put(self._submitted)
                self._submitted = []
                self._queue.put(None)
        self._thread.join()

    def _run(self) -> None:
        while True:
            batch, last = self._next()
            if batch:
                self._resolve(batch, self._attempt([ticket.record for ticket in batch]))
            elif not last:
                self._probe()
            if last:
                break
        self._backend.shut()
        self.state = State("closed", "The ledger is closed.")

    def _next(self) -> tuple[list[Ticket], bool]:
        """What is queued, up to a batch, and whether the end is reached."""
        batch: list[Ticket] = []
        wait = None if self.state is HEALTHY else PROBE_S
        while len(batch) < MOST:
            try:
                more = self._queue.get(not batch, wait)
            except Empty:
                break
            if more is None:
                return batch, True
            batch += more
        return batch, False

    def _attempt(self, records: Sequence[Record]) -> list[WalrasError | None]:
        """Write them; a batch that is refused is halved until the culprit stands alone."""
        try:
            try:
                errors = self._backend.write(records)
            except Refused as why:
                if len(records) > 1:
                    half = len(records) // 2
                    return self._attempt(records[:half]) + self._attempt(records[half:])
                errors = [self._backend.explain(records[0], why)]
            self.state = HEALTHY
            return errors
        except Unwritable as why:
            self.state = why.state
        except Exception as error:  # a bug must not leave requests waiting for a dead thread
            self.state = _broken(error)
        return [OutputError(self.state.sentence) for _ in records]

    def _probe(self) -> None:
        try:
            self._backend.probe()
            self.state = HEALTHY
        except Unwritable as why:
            self.state = why.state
        except Exception as error:
            self.state = _broken(error)

    @staticmethod
    def _resolve(batch: Sequence[Ticket], errors: Sequence[WalrasError | None]) -> None:
        waking: dict[asyncio.AbstractEventLoop, list[asyncio.Future[None]]] = {}
        for ticket, error in zip(batch, errors, strict=True):
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
