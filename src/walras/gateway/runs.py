"""What is known of a call while it is under way: what was asked, what was tried for it, and what became of it."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from walras.gateway.board import Alternative, Decision
from walras.gateway.http import Request
from walras.gateway.keys import Key
from walras.gateway.metering import Call as Money
from walras.gateway.upstream import Answer
from walras.gateway.wire import Call, Usage
from walras.ledger import Nano, Ticket
from walras.ledger.entry import Settled, Status
from walras.settings import Kind

if TYPE_CHECKING:
    from walras.gateway.tracing import Trace


@dataclass(slots=True)
class Ask:
    """One request, as far as it is known before it is answered."""

    request_id: str
    key: Key
    call: Call
    at_ns: int
    began: float
    value: float
    task_class: str
    """As the client says."""
    priced_as: str
    """The class whose prices and experience it has."""
    session: str | None
    deadline: float | None
    text_bytes: int
    prompt: str | None
    kind: Kind
    """Of the models that can answer."""
    down: Sequence[str] = ()
    """Models whose upstream took no request when it was decided."""
    tokens: int = 0
    """Of the prompt, before it is known which model counts them."""

    @property
    def elapsed(self) -> float:
        return time.perf_counter() - self.began


@dataclass(slots=True)
class Attempt:
    """One use that was tried: its money, and what came of it."""

    use: str
    upstream: str
    money: Money
    held: Nano = 0
    """What the ledger has of its holds."""
    writing: tuple[Ticket, Nano] | None = None
    """A hold that is on its way there."""
    asked: bool = False
    """Whether the upstream may have got it."""
    charged: Nano = 0
    output: int | None = None
    """Tokens, as its upstream counted them; None: as they went out."""
    ended: bool = False
    """Whether the model had finished."""
    began: float = 0.0
    done: bool = False
    """Whether it is known what it is charged. The budgets learn it when the entry is written."""
    unused: bool = False
    """Whether it cost nothing."""
    capped: bool = False
    """Whether nobody knows what it cost: it is charged what was held."""


@dataclass(slots=True)
class Hedge:
    """A second attempt beside one that keeps its client waiting."""

    main: asyncio.Task[None]
    """That waits for the first attempt."""
    timer: asyncio.TimerHandle | None = None
    """When it is looked at next whether one is worth its price."""
    task: asyncio.Task[None] | None = None
    """That asks."""
    attempt: Attempt | None = None
    chosen: Alternative | None = None
    answer: Answer | None = None
    """It was first."""

    def stop(self) -> None:
        """It wakes nobody from now on."""
        if self.timer is not None:
            self.timer.cancel()
        if self.task is not None:
            self.task.cancel()


@dataclass(slots=True)
class Told:
    """What became of a request, for its entry."""

    status: Status
    settled: Settled
    http_status: int
    usage: Usage | None = None
    first: float | None = None


@dataclass(slots=True)
class Run:
    """A request under way."""

    request: Request
    ask: Ask
    attempts: list[Attempt] = field(default_factory=list)
    decision: Decision | None = None
    chosen: Alternative | None = None
    answer: Answer | None = None
    began: float = 0.0
    """When the last attempt was begun that is not a hedge."""
    ending: bool = False
    """Its entry is being made: a client that leaves changes nothing any more."""
    written: bool = False
    """Its entry is on its way to the ledger."""
    gone: bool = False
    asked: Attempt | None = None
    """Whose answer it is or would be; not a hedge, unless it was first."""
    hedge: Hedge | None = None
    """What runs beside it."""
    trace: Trace | None = None

    def sums(self) -> tuple[Nano, Nano, bool]:
        """What all attempts are charged, what they hold, and whether any of it is a guess."""
        charged, held, capped = 0, 0, False
        for attempt in self.attempts:
            charged += attempt.charged
            held += attempt.held
            capped = capped or attempt.capped
        return charged, held, capped

    def hang_up(self, task: asyncio.Task[None]) -> None:
        """The client has left: what is still being done for it ends."""
        if not self.ending:
            self.gone = True
            task.cancel()
