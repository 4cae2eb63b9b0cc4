"""One call from its first byte to its last: decide, set money aside, write the hold, ask an upstream, meter, settle, write the entry.

What a client is told comes after what is written: the last byte of an answer leaves when its entry is durable. An attempt that
fails before a byte went out leaves the request open to the next best use, if that is worth its price: a retry is a use.
"""

from __future__ import annotations

import asyncio
import logging
import math
import secrets
import sys
import time
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from contextlib import aclosing, suppress
from dataclasses import dataclass, field
from functools import partial
from random import Random
from typing import TYPE_CHECKING, Any

from msgspec import structs

from walras.errors import OutputError
from walras.gateway.board import Alternative, Board, Decision
from walras.gateway.books import Books
from walras.gateway.dialects import prompt_text, read_call
from walras.gateway.escrow import LocalEscrow, Refused, Standing
from walras.gateway.hedging import Waits, best_hedge
from walras.gateway.http import EVENTS, JSON, Gone, HttpError, Request, log_bug
from walras.gateway.keys import Key
from walras.gateway.logs import event
from walras.gateway.metering import Call as Money
from walras.gateway.metering import Job, Meter, Tariff, scarcity
from walras.gateway.metrics import Metrics
from walras.gateway.redaction import redaction
from walras.gateway.runs import Ask, Attempt, Hedge, Run, Told
from walras.gateway.upstream import Answer, Failure, TokenPrices, Upstream, backoff_s
from walras.gateway.wire import Call, Dialect, RequestError, Stamp, Usage
from walras.ledger import Alternative as Written
from walras.ledger import Entry, Hold, Nano, Store, pack, priced
from walras.ledger.entry import Settled, Status
from walras.ledger.money import NANO_PER_USD
from walras.settings import Kind

if TYPE_CHECKING:
    from walras.gateway.tracing import Tracer

_log = logging.getLogger("walras.gateway")
AUTO = ("auto", "walras/auto", "")
SHOWN = 8
"""Alternatives an entry keeps, the best first."""
LOOK_S = 0.02
"""Least seconds until a slow attempt is looked at, whether another beside it is worth its price."""
TRIES = 4
"""Attempts at one request, all uses together."""
AGAIN = 0.5
"""What a use is still expected to be worth after each of its failures on this request."""
CHARACTERS = 3
"""Of generated text for each token, where an upstream does not report usage: fewer than is usual, so that the charge is not low."""
MOST_CHOICES = 128
MOST_USD = 1e6
"""Largest value of a request per unit of quality."""
RUNAWAY = 1024
"""Tokens beyond twice its cap at which a stream is cut, and above which usage is not believed."""
UNSEEN = 100_000
"""Prompt tokens beyond one for each byte that usage may claim: for images and files that are named by URL."""
CLASSES = 1000
"""Classes of tasks that are priced apart; a client may invent names, and memory must not grow with them."""
LONGEST = 256
"""Characters of a class or session."""


def _random_hex() -> Iterator[str]:
    """Six random bytes after the other, drawn in bulk: a system call lets go of Python's lock, which is slow to come back."""
    while True:
        bulk = secrets.token_hex(6 * 512)
        yield from (bulk[k : k + 12] for k in range(0, len(bulk), 12))


_random = _random_hex()


def new_id(at_ns: int) -> str:
    """Ids that grow with time and cannot be guessed."""
    return f"req_{at_ns:016x}{next(_random)}"


def id_headers(request_id: str) -> tuple[tuple[bytes, bytes], ...]:
    """The id under the names that OpenAI's clients and Anthropic's look for."""
    told = request_id.encode()
    return (b"x-request-id", told), (b"request-id", told)


@dataclass(slots=True)
class Calls:
    """The road that every call takes."""

    board: Board
    meter: Meter
    escrow: LocalEscrow
    store: Store
    upstreams: Mapping[str, Upstream]
    metrics: Metrics
    menu: dict[str, Any] | None = None
    open: int = 0
    """Calls under way."""
    tracer: Tracer | None = None
    """Where spans are sent."""
    rng: Random = field(default_factory=Random)
    """Of backoffs."""
    books: Books = field(init=False)
    _endings: set[asyncio.Task[None]] = field(init=False, default_factory=set)
    """Requests that were cut off and are being settled."""
    _classes: set[str] = field(init=False, default_factory=set)
    _redacted: Callable[[str], str] = field(init=False)
    waits: Waits = field(init=False)
    tiers: tuple[str, ...] = field(init=False)
    """Tiers of the menu that is served, which clients may name as models."""
    _prices: dict[str, TokenPrices] = field(init=False)
    _tariffs: dict[str, Tariff] = field(init=False)

    def __post_init__(self) -> None:
        self.books = Books(self.store)
        names = () if self.menu is None else (t["name"] for t in self.menu["tiers"])
        self.tiers = tuple(name for name in names if name not in self.board.models)
        self._classes.update(self.board.economy.classes)
        self._redacted = redaction(self.board.economy.gateway.redact)
        self._prices = {name: self._upstream(name).models[name].prices for name in self.board.models}
        self.waits = Waits(self._expected_wait)
        self._tariffs = {name: _dearest(p) for name, p in self._prices.items()}

    def _expected_wait(self, use: str, stream: bool) -> float:
        if stream:
            return self._upstream(use).models[use].first_byte_s
        return self.board.economy.models[use].seconds

    def _upstream(self, use: str) -> Upstream:
        return self.upstreams[self.board.economy.models[use].upstream]

    def value_of(self, key: Key, task_class: str) -> float | None:
        """V of a request that does not say: the key's, else the settings'."""
        if key.value_usd is not None:
            return key.value_usd
        return self.board.value_of(key.tenant, task_class)

    async def handle(self, request: Request, dialect: Dialect, key: Key, request_id: str) -> None:
        """Answer one call. Errors before the first byte are raised as `HttpError`; the entry is written in any case.

        Raises:
            HttpError: what to tell the client. Gone: it has left. OutputError: the ledger cannot be written.
        """
        if self.books.problem is not None:
            raise _unwritable()
        began, at_ns = time.perf_counter(), self.board.clock()
        body = await request.body(self.board.economy.gateway.body_bytes)
        run = Run(request, self._ask(request, dialect, key, request_id, body, at_ns, began))
        if self.tracer is not None:
            run.trace = self.tracer.begin(run)
        self.open += 1
        task = asyncio.current_task()
        assert task is not None
        request.on_leave(partial(run.hang_up, task))
        try:
            await self._answer(run)
        except asyncio.CancelledError:
            await self._abandon(run, "cut", 499)
            if not run.gone:
                raise  # the service itself is stopping
            task.uncancel()
            raise Gone("the client hung up") from None
        except HttpError as error:
            if run.attempts:
                await self._abandon(run, "error", error.status)
            raise
        except Exception as error:
            full = isinstance(error, OutputError)
            await self._abandon(run, "error", 503 if full else 500)
            if run.request.started:
                await self._break_off(run, error)
                return
            if full:
                raise _unwritable() from error
            raise
        finally:
            run.ending = True
            request.on_leave(None)  # or the two would hold each other until a collection
            self.open -= 1
            if run.trace is not None:
                run.trace.end(sys.exception())

    async def _break_off(self, run: Run, error: Exception) -> None:
        """Tell the reader of a stream that it ends here."""
        what, code = str(_unwritable()), "unavailable"
        if not isinstance(error, OutputError):
            log_bug(error)
            what, code = "the answer broke off inside the gateway", "internal"
        answer = run.answer
        if answer is not None and answer.stream is not None:
            await run.request.write(answer.stream.fail(what, "api_error", code), more=False)

    async def _abandon(self, run: Run, status: Status, http_status: int) -> None:
        """End a request that did not come to its own end, in a task of its own: nothing may cancel that."""
        run.ending = True
        if run.written:
            await _surely(self._pay(run))
            return
        ending = asyncio.create_task(self._wind_up(run, status, http_status))
        self._endings.add(ending)
        ending.add_done_callback(self._endings.discard)
        await asyncio.shield(ending)

    async def _wind_up(self, run: Run, status: Status, http_status: int) -> None:
        """What was made is paid for; what cannot be known, as it was reserved."""
        if run.hedge is not None:
            await _surely(self._call_off(run, run.hedge))
        answer = run.answer
        usage = None if answer is None else answer.usage
        for attempt in run.attempts:
            await _surely(self._landed(attempt))
        if answer is not None:
            await _surely(answer.aclose())
        for attempt in run.attempts:
            if not attempt.done:
                made = usage if attempt is run.asked else None
                await _surely(self._settle_unfinished(run, attempt, made))
        if not run.attempts and status == "error" and http_status == 503:
            return  # nothing was begun, and nothing can be written
        told = Told(status, "exact" if any(a.charged for a in run.attempts) else "none", http_status, usage)
        with suppress(OutputError):  # it is kept, and written later
            try:
                entry = self._entry(run, told)
            except Exception as error:
                log_bug(error)
                entry = _least_entry(run, told)
            await self._enter(run, entry)

    async def _settle_unfinished(self, run: Run, attempt: Attempt, usage: Usage | None) -> None:
        usage = self._believed(run.ask, attempt, usage)
        if not attempt.asked:
            self._release(attempt)
        elif usage is None:
            self._cap(attempt)
        else:
            self._settle(run, attempt, usage, ended=False)

    async def ended(self) -> None:
        """Return when what was cut off is settled too."""
        while self._endings:
            await asyncio.wait(self._endings)

    # --- what is asked ----------------------------------------------------------------------------------------------

    def _ask(
        self,
        request: Request,
        dialect: Dialect,
        key: Key,
        request_id: str,
        body: bytes,
        at_ns: int,
        began: float,
    ) -> Ask:
        try:
            call = read_call(dialect, body)
            keep = self.board.economy.gateway.keep_prompts
            prompt = self._redacted(prompt_text(call)) if keep else None
        except RequestError as error:
            raise HttpError(
                400, str(error), code=error.code or "invalid_request", param=error.param
            ) from error
        if call.choices > MOST_CHOICES:
            raise HttpError(400, f"'n' must be at most {MOST_CHOICES}", code="invalid_value", param="n")
        self._check_model(call)
        task_class = _name(request, b"x-walras-class") or key.task_class or ""
        value = _amount(request, b"x-walras-value", MOST_USD)
        if value is None:
            value = (
                self._tier_value(call.model) if call.model in self.tiers else self.value_of(key, task_class)
            )
        return Ask(
            request_id,
            key,
            call,
            at_ns,
            began,
            value or 0.0,
            task_class,
            self.priced_as(task_class),
            _name(request, b"x-walras-session"),
            _amount(request, b"x-walras-deadline"),
            len(body),
            prompt,
            "embeddings" if dialect == "embeddings" else "chat",
        )

    def _check_model(self, call: Call) -> None:
        """There must be such a model, and it must make what is asked for."""
        wanted: Kind = "embeddings" if call.dialect == "embeddings" else "chat"
        named = self.board.economy.models.get(call.model)
        if named is not None:
            if named.kind != wanted:
                what = f"'{call.model}' is of kind '{named.kind}', and this takes a model of kind '{wanted}'"
                raise HttpError(400, what, code="unsuited", param="model")
        elif self._named(call.model):
            what = f"there is no model '{call.model}'; /v1/models lists them"
            raise HttpError(404, what, code="model_not_found", param="model")
        elif not self.board.of(wanted):
            what = f"no model of kind '{wanted}' is served here; in the settings: [models.NAME] kind = \"{wanted}\""
            raise HttpError(404, what, code="model_not_found", param="model")

    def priced_as(self, task_class: str) -> str:
        """The class itself, or none where too many are known."""
        if task_class not in self._classes:
            if len(self._classes) >= CLASSES:
                return ""
            self._classes.add(task_class)
        return task_class

    def _tier_value(self, name: str) -> float:
        """A tier of the menu routes as if quality were worth the least type that takes it."""
        assert self.menu is not None
        return float(next(t["type_from"] for t in self.menu["tiers"] if t["name"] == name))

    # --- which use ----------------------------------------------------------------------------------------------------

    async def _decide(self, ask: Ask, failed: Mapping[str, int]) -> tuple[Decision, list[Alternative]]:
        """All uses at their prices, and those that may be tried, in this order. One that failed is worth less."""
        model, now = ask.call.model, self.board.clock()
        scarce, ask.down = 0.0, self._down()
        for standing in await self.escrow.standings(ask.key.accounts, now):
            scarce += scarcity(standing, now)
        decision = self.board.decide(
            ask.value,
            ask.tokens,
            tenant=ask.key.tenant,
            task_class=ask.priced_as,
            kind=ask.kind,
            scarcity=scarce,
            without=ask.down if not failed else [*ask.down, *(u for u, n in failed.items() if n >= TRIES)],
            deadline=None if ask.deadline is None else ask.deadline - ask.elapsed,
        )
        if self._named(model):
            return decision, [a for a in decision.ranked if a.use == model]
        if not ask.value:
            hint = "send x-walras-value (USD per unit of quality), or give the key or the settings one"
            what = f"'auto' needs a request that is worth more than 0: {hint}"
            raise HttpError(400, what, code="value_missing", param="model")
        ranked = decision.ranked
        if failed:
            again = (structs.replace(a, value=a.value * AGAIN ** failed.get(a.use, 0)) for a in ranked)
            ranked = tuple(sorted(again, key=lambda a: -a.net))
        return decision, [a for a in ranked if a.net > 0] if self.board.economy.defer else list(ranked)

    def _named(self, model: str) -> bool:
        """Whether the client says which model; if not, prices do."""
        return model not in AUTO and model not in self.tiers

    def _down(self) -> list[str]:
        """Models whose upstream takes no request now."""
        down = {name for name, upstream in self.upstreams.items() if not upstream.up}
        models = self.board.economy.models.items() if down else ()
        return [name for name, model in models if model.upstream in down]

    def _job(self, ask: Ask, use: str) -> Job:
        call, most = ask.call, self.board.economy.models[use].max_output_tokens
        # What comes in one piece is seen when it is paid for, so all that it may cost is set aside.
        return Job(
            use,
            ask.priced_as,
            self._tariffs[use],
            self.meter.tokens(use, ask.text_bytes),
            0 if ask.kind == "embeddings" else min(call.max_tokens or most, most) * call.choices,
            metered=call.stream,
        )

    # --- the call -----------------------------------------------------------------------------------------------------

    async def _answer(self, run: Run) -> None:
        ask, failed = run.ask, dict[str, int]()
        last: Failure | RequestError | None = None
        ask.tokens = self.meter.tokens(ask.call.model, ask.text_bytes)
        self.board.asked(ask.value, ask.tokens, ask.key.tenant, ask.priced_as, ask.kind)
        while True:
            run.decision, open_to = await self._decide(ask, failed)
            may = len(run.attempts) < TRIES and (
                last is None or isinstance(last, RequestError) or last.may_retry
            )
            run.chosen, got = await self._reserve(ask, open_to if may else [])
            if run.chosen is None or not isinstance(got, Money):
                raise await self._no_use(run, got, last)
            use = run.chosen.use
            attempt = run.asked = Attempt(use, self._upstream(use).name, got)
            run.attempts.append(attempt)
            if isinstance(last, Failure) and failed.get(use):
                await asyncio.sleep(backoff_s(failed[use], self.rng))
            try:
                await self._try(run, attempt)
                return
            except RequestError as error:  # this model's API has no place for it; another's may
                last, failed[use] = last or error, TRIES
                if run.trace is not None:
                    run.trace.failed(attempt, error)
                self._release(attempt)
            except Failure as failure:
                last = failure
                # What rests a key says nothing against the model while another key of it works.
                own = failure.status in (401, 402, 403, 429) and self._upstream(use).passing
                failed[use] = failed.get(use, 0) + (not own)
                self._failed(run, attempt, failure)

    def _failed(self, run: Run, attempt: Attempt, failure: Failure) -> None:
        if run.trace is not None:
            run.trace.failed(attempt, failure)
        event(
            _log,
            logging.INFO,
            "attempt failed",
            request_id=run.ask.request_id,
            use=attempt.use,
            upstream=attempt.upstream,
            reason=failure.reason,
            status=failure.status,
        )
        self.metrics.count("attempts", attempt.upstream, failure.reason)
        (self._cap if failure.charged else self._release)(attempt)

    async def _reserve(
        self, ask: Ask, open_to: list[Alternative]
    ) -> tuple[Alternative | None, Money | Refused | None]:
        """The first use that the budgets can pay, and its money."""
        refused: Refused | None = None
        for alternative in open_to:
            got = await self.meter.open(ask.key.accounts, self._job(ask, alternative.use), ask.at_ns)
            if not isinstance(got, Refused):
                return alternative, got
            refused = got
        return None, refused

    async def _no_use(
        self, run: Run, refused: Money | Refused | None, last: Failure | RequestError | None
    ) -> HttpError:
        """Why nothing could be done, written down."""
        run.chosen = None
        status: Status = "error"
        if isinstance(last, Failure):
            code = last.error.code or last.reason.replace(" ", "_")
            # What the provider said of the request; what else went wrong names addresses, which are not the client's.
            message = last.error.message or f"upstream '{last.upstream}' failed: {last.reason}"
            error = HttpError(last.client_status, message, code=code, headers=_retry(last.retry_after_s))
        elif last is not None:
            error = HttpError(400, str(last), code=last.code or "unsuited", param=last.param)
        elif isinstance(refused := refused or await self._spent(run), Refused):
            status, error = "refused", self._no_money(refused, run.ask.key)
        else:
            error = self._none_open(run.ask, run.decision, await self._shortest(run.ask))
            status = "error" if error.status == 503 else "refused"
        self.metrics.count("refused", error.code if last is None else "failed")
        await self._close(run, Told(status, "none", error.status))
        return error

    async def _spent(self, run: Run) -> Refused | None:
        """Why the budgets could not pay for any use, whatever it is worth; None where they could."""
        ask, decision = run.ask, run.decision
        if decision is None or not decision.ranked:
            return None
        _, got = await self._reserve(ask, list(decision.ranked))
        if isinstance(got, Money):
            await got.release()
            return None
        return got

    async def _shortest(self, ask: Ask) -> tuple[str, Standing] | None:
        """Of the budgets that pay, the one whose money is dearest; none where a dollar counts as a dollar."""
        now = self.board.clock()
        accounts = ask.key.accounts
        standing = dict(zip(accounts, await self.escrow.standings(accounts, now), strict=True))
        dearest = max(standing, key=lambda account: scarcity(standing[account], now))
        return (dearest, standing[dearest]) if scarcity(standing[dearest], now) > 0 else None

    def _none_open(
        self, ask: Ask, decision: Decision | None, short: tuple[str, Standing] | None
    ) -> HttpError:
        """Of the uses that were asked for none is worth its price, or up, or fast enough, or allowed."""
        named = self._named(ask.call.model)
        wanted = {ask.call.model} if named else set(self.board.of(ask.kind))
        who = f"'{ask.call.model}'" if named else "all models"
        if decision is not None and decision.ranked and not named:
            best = decision.ranked[0]
            what = (
                f"no use is worth its price: the best, {best.use}, is worth {best.value:.3g} USD and costs "
                f"{best.value - best.net:.3g} at prices version {decision.version}"
            )
            wait = None
            if short is not None:
                when, wait = self._resets(short[1].resets_at_ns)
                what += f", and the budget of {short[0]} is short; {when}"
            return HttpError(402, what, code="not_worth_its_price", headers=(*_retry(wait), _FINAL))
        if wanted <= set(ask.down):
            what = "no upstream is up for this request"
            return HttpError(503, what, code="unavailable", headers=_retry(5.0))
        if ask.deadline is not None:
            what = f"no use is expected to answer within {ask.deadline:g} s"
            return HttpError(504, what, code="deadline", headers=(_FINAL,))
        what = f"the settings forbid {who} to this tenant or class"
        return HttpError(403, what, code="permission_denied", param="model")

    def _no_money(self, refused: Refused, key: Key) -> HttpError:
        when, wait = self._resets(refused.resets_at_ns)
        left = f"{refused.remaining_nano / 1e9:.9f} USD left, too little for this request"
        if refused.account == "global" and key.scope == "tenant":  # not the tenant's to know
            left = "too little left for this request"
        return HttpError(
            429,
            f"the budget of {refused.account} has {left}; {when}",
            code="insufficient_quota",
            headers=(*_retry(wait), _FINAL),
        )

    def _resets(self, at_ns: Nano | None) -> tuple[str, float | None]:
        """When a budget does, in words and seconds."""
        if at_ns is None:
            return "it does not reset", None
        wait = max((at_ns - self.board.clock()) / 1e9, 0.0)
        return f"it resets in {math.ceil(wait)} s", wait

    async def _try(self, run: Run, attempt: Attempt) -> None:
        """One attempt. Raises `Failure` if it failed and the client has seen nothing of it."""
        run.answer = None
        await self._hold(run, attempt)
        self.metrics.observe("own_seconds", run.ask.elapsed)
        run.began = time.perf_counter()
        hedge = run.hedge = self._may_hedge(run, attempt)
        if hedge is None:
            answer = run.answer = await self._ask_upstream(run, attempt)
        else:
            attempt, answer = await self._first_of_two(run, attempt, hedge)
        try:
            if answer.reply is None:
                await self._stream(run, attempt, answer)
            else:
                await self._whole(run, attempt, answer)
        finally:
            await answer.aclose()
        run.answer = None

    async def _ask_upstream(self, run: Run, attempt: Attempt) -> Answer:
        """A whole answer, or the begin of a stream."""
        ask, money, attempt.began = run.ask, attempt.money, time.perf_counter()
        traceparent = () if run.trace is None else run.trace.asking(attempt) or ()
        attempt.asked, ended = True, False
        try:
            answer = await self._upstream(attempt.use).ask(
                ask.call,
                attempt.use,
                Stamp(ask.request_id, ask.at_ns // 1_000_000_000, attempt.use),
                # It is the cap of each choice.
                max_tokens=max(money.max_tokens // ask.call.choices, 1) if money.max_tokens else None,
                within_s=None if ask.deadline is None else ask.deadline - ask.elapsed,
                headers=traceparent,
            )
            ended = True
            return answer
        except RequestError:
            attempt.asked = False
            raise
        finally:
            self.waits.learn(attempt.use, ask.call.stream, time.perf_counter() - attempt.began, ended=ended)

    # --- a second attempt beside the first ----------------------------------------------------------------------------

    def _may_hedge(self, run: Run, attempt: Attempt) -> Hedge | None:
        """Look again when the attempt has taken as long as was expected; not where time costs nothing."""
        ask = run.ask
        if ask.deadline is None and not self.board.delay_price(ask.key.tenant, ask.priced_as, ask.kind):
            return None
        main = asyncio.current_task()
        assert main is not None
        hedge = Hedge(main)
        expected = self.waits.left(attempt.use, ask.call.stream)
        self._look_in(run, attempt, hedge, max(expected, LOOK_S))
        return hedge

    def _look_in(self, run: Run, attempt: Attempt, hedge: Hedge, seconds: float) -> None:
        loop = asyncio.get_running_loop()
        hedge.timer = loop.call_later(seconds, self._look, run, attempt, hedge)

    def _look(self, run: Run, attempt: Attempt, hedge: Hedge) -> None:
        try:
            self._consider(run, attempt, hedge)
        except Exception as error:  # the loop would tell what it said
            log_bug(error)

    def _consider(self, run: Run, attempt: Attempt, hedge: Hedge) -> None:
        """Ask a second use if that is worth its price by now; else look again later."""
        ask, chosen, decision = run.ask, run.chosen, run.decision
        assert chosen is not None
        assert decision is not None
        waited = time.perf_counter() - run.began
        offered = [
            a
            for a in decision.ranked
            if self._upstream(a.use).passing > (a.use == attempt.use)
            and (a.use == ask.call.model or not self._named(ask.call.model))
        ]
        hedge.chosen = best_hedge(
            offered,
            chosen,
            self.board.delay_price(ask.key.tenant, ask.priced_as, ask.kind),
            self.waits.left(attempt.use, ask.call.stream, waited),
            lambda use: self.waits.left(use, ask.call.stream),
            None if ask.deadline is None else ask.deadline - ask.elapsed,
        )
        if hedge.chosen is None:
            self._look_in(run, attempt, hedge, max(waited / 4, LOOK_S))
        elif len(run.attempts) < TRIES:
            hedge.task = asyncio.create_task(self._hedge(run, hedge, hedge.chosen))

    async def _hedge(self, run: Run, hedge: Hedge, chosen: Alternative) -> None:
        """The second attempt. If it is first, what waits for the other is woken."""
        job = self._job(run.ask, chosen.use)
        money = await self.meter.open(run.ask.key.accounts, job, run.ask.at_ns)
        if isinstance(money, Refused):
            return
        attempt = hedge.attempt = Attempt(chosen.use, self._upstream(chosen.use).name, money)
        run.attempts.append(attempt)
        try:
            await self._hold(run, attempt)
            hedge.answer = await self._ask_upstream(run, attempt)
        except Failure as failure:
            self._failed(run, attempt, failure)
        except (RequestError, OutputError) as problem:
            if run.trace is not None and isinstance(problem, RequestError):
                run.trace.failed(attempt, problem)
            self._release(attempt)
        if hedge.answer is None:
            self.metrics.count("hedges", chosen.use, "failed")
        else:
            hedge.main.cancel()

    async def _first_of_two(self, run: Run, attempt: Attempt, hedge: Hedge) -> tuple[Attempt, Answer]:
        """The attempt's answer, or that of its hedge where this came first. The other one is called off."""
        failure: Failure | None = None
        try:
            try:
                run.answer = await self._ask_upstream(run, attempt)
            except Failure as problem:
                failure = problem
                if hedge.task is not None:
                    await asyncio.wait({hedge.task})  # it cancels this where it has an answer
                raise
        except asyncio.CancelledError:
            other, first = hedge.attempt, hedge.answer
            if other is None or first is None or hedge.main.uncancel() > 0:
                raise  # the call ends, and its hedge with it
            run.chosen, run.asked, run.answer, run.hedge = hedge.chosen, other, first, None
            if failure is None:
                await self._settle_unfinished(run, attempt, None)
            else:
                self._failed(run, attempt, failure)
            self.metrics.count("hedges", other.use, "first")
            return other, first
        except Exception:
            await self._call_off(run, hedge)
            raise
        finally:
            hedge.stop()
        await self._call_off(run, hedge)
        return attempt, run.answer

    async def _call_off(self, run: Run, hedge: Hedge) -> None:
        """End a second attempt that is not needed; cut short, it may be called again. What cannot be known of its cost is capped."""
        hedge.stop()
        if hedge.task is None:
            return
        await asyncio.wait({hedge.task})
        if not hedge.task.cancelled() and (bug := hedge.task.exception()) is not None:
            log_bug(bug)
        answer, hedge.answer = hedge.answer, None
        if answer is not None:
            await answer.aclose()
        if hedge.attempt is not None and not hedge.attempt.done:
            await _surely(self._landed(hedge.attempt))
            await self._settle_unfinished(run, hedge.attempt, None if answer is None else answer.usage)
            self.metrics.count("hedges", hedge.attempt.use, "second")

    async def _whole(self, run: Run, attempt: Attempt, answer: Answer) -> None:
        reply = answer.reply
        assert reply is not None
        if run.trace is not None:
            run.trace.answered(attempt, answer)
        ask = run.ask
        usage = self._believed(ask, attempt, reply.usage)
        told = Told("ok", "exact" if usage else "estimated", 200, usage, answer.first_byte_s)
        if usage is None:
            made = min(-(-reply.characters // CHARACTERS), attempt.money.max_tokens)
            told.usage = usage = Usage(self.meter.tokens(attempt.use, ask.text_bytes), output=made)
        run.ending = True
        self._settle(run, attempt, usage, ended=reply.finish != "length")
        await self._close(run, told)
        self.metrics.count("attempts", answer.upstream, "ok")
        await run.request.answer(200, reply.body, [JSON, *self._headers(run)])

    async def _stream(self, run: Run, attempt: Attempt, answer: Answer) -> None:
        """Pass a stream on, paying before each piece; its last bytes wait until the entry is written."""
        request, stream, money = run.request, answer.stream, attempt.money
        assert stream is not None
        told, metered, out = Told("ok", "exact", 200), 0, b""
        most, signs = 2 * money.max_tokens + RUNAWAY, self.meter.signs(attempt.use)
        try:
            async with aclosing(answer.__aiter__()) as pieces:
                async for out in pieces:
                    if told.first is None:
                        told.first = time.perf_counter() - run.began
                    seen = max(stream.pieces, -(-stream.characters // CHARACTERS))
                    tokens = signs.tokens(stream.pieces, stream.characters)
                    if answer.finished:  # the rest of the loop lets the connection be used again
                        await self._last(run, attempt, answer, told, out, max(tokens, metered))
                        continue
                    if tokens > metered and (
                        seen > most or await self._refused(run, attempt, tokens - metered)
                    ):
                        told.status, metered = (
                            "cut",
                            tokens,
                        )  # the upstream has made them: they go out and are paid
                        break
                    metered = max(metered, tokens)
                    if not request.started:
                        await request.start(200, [*EVENTS, *self._headers(run)])
                    await request.write(out)
        except Failure as failure:
            if not request.started:
                raise
            self.metrics.count("attempts", answer.upstream, failure.reason)
            told.status, told.settled = "error", "cap"
            if run.trace is not None:
                run.trace.failed(attempt, failure)
            await self._last(run, attempt, answer, told, answer.fail(failure), metered)
            return
        if told.status == "cut":
            usage = Usage(self.meter.tokens(attempt.use, run.ask.text_bytes), output=metered)
            await self._last(run, attempt, answer, told, out + stream.cut(usage), metered)

    async def _last(
        self, run: Run, attempt: Attempt, answer: Answer, told: Told, out: bytes, metered: int
    ) -> None:
        """Settle a stream, write its entry, and only then send its last bytes."""
        run.ending = True
        stream, request = answer.stream, run.request
        assert stream is not None
        if run.trace is not None:
            run.trace.answered(attempt, answer)
        told.usage = self._believed(run.ask, attempt, stream.usage)
        if told.usage is not None:
            told.settled = "exact"
        elif told.settled != "cap":
            told.settled = "estimated"
            told.usage = Usage(self.meter.tokens(attempt.use, run.ask.text_bytes), output=metered)
        if told.usage is None:
            self._cap(attempt)
        else:
            ended = told.status == "ok" and stream.finish != "length"
            self._settle(run, attempt, told.usage, ended=ended)
        if told.status == "ok":
            if told.settled == "exact" and told.usage is not None:
                signs = self.meter.signs(attempt.use)
                signs.learn(stream.pieces, stream.characters, told.usage.completion)
            self.metrics.count("attempts", answer.upstream, "ok")
        try:
            await self._close(run, told)
        except OutputError:
            if not request.started:
                raise
            out = stream.fail(str(_unwritable()), "api_error", "unavailable")
        if not request.started:
            await request.start(200, [*EVENTS, *self._headers(run)])
        await request.write(out, more=False)

    async def _refused(self, run: Run, attempt: Attempt, tokens: int) -> bool:
        """Whether the stream must be cut before these tokens go out; what they may cost is written first."""
        signs = self.meter.signs(attempt.use)
        signs.came(tokens)
        attempt.money.ahead = signs.ahead
        refused = await attempt.money.emit(tokens)
        if refused is None and attempt.money.needed_nano > attempt.held:
            await self._hold(run, attempt)
        return refused is not None

    def _believed(self, ask: Ask, attempt: Attempt, usage: Usage | None) -> Usage | None:
        """What an upstream counted, unless it cannot be: more output than asked for, more prompt than was sent."""
        if usage is None:
            return None
        most = 2 * attempt.money.max_tokens + RUNAWAY if ask.kind == "chat" else 0
        return None if usage.completion > most or usage.prompt > ask.text_bytes + UNSEEN else usage

    # --- money and memory ---------------------------------------------------------------------------------------------

    async def _hold(self, run: Run, attempt: Attempt) -> None:
        """Write down what the next step may cost, before it is taken."""
        ask, total = run.ask, attempt.money.at_stake_nano
        amount = total - attempt.held
        own_id = f"{ask.request_id}.{run.attempts.index(attempt) + 1}.{total}"
        hold = Hold(own_id, ask.request_id, ask.at_ns, ask.key.id, ask.key.tenant, amount)
        ticket = self.store.hold(hold)
        if ticket.done and ticket.error is None:
            attempt.held += amount
        else:
            attempt.writing = (ticket, amount)
            await self._landed(attempt)

    async def _landed(self, attempt: Attempt) -> None:
        """Wait for the hold that is being written. One that was not written is not held."""
        if attempt.writing is None:
            return
        ticket, amount = attempt.writing
        try:
            await self.store.written(ticket)
        finally:  # it may be written even if this was cancelled
            if ticket.done:
                attempt.writing = None
                attempt.held += amount if ticket.error is None else 0

    def _release(self, attempt: Attempt) -> None:
        """It cost nothing."""
        attempt.done = attempt.unused = True

    def _cap(self, attempt: Attempt) -> None:
        """Nobody can say what it cost: all that is held is taken for it."""
        attempt.capped, attempt.charged = True, attempt.held
        attempt.done = True

    def _settle(self, run: Run, attempt: Attempt, usage: Usage, *, ended: bool) -> None:
        ask, use = run.ask, attempt.use
        attempt.charged = self._prices[use].cost_nano(usage)
        attempt.output, attempt.ended, attempt.done = usage.completion, ended, True
        self.meter.learn_tokens(use, ask.text_bytes, usage.prompt)
        self.board.came_back(use, ask.priced_as, usage.completion, time.perf_counter() - attempt.began)

    async def _close(self, run: Run, told: Told) -> None:
        """Write the entry, and return when it is durable."""
        run.ending = True
        entry = self._entry(run, told)
        await self._enter(run, entry)
        self._count(run, entry)

    async def _enter(self, run: Run, entry: Entry) -> None:
        """The ledger first, then the budgets: after a death they must have room for all that it holds."""
        run.written = True
        if run.trace is not None:
            run.trace.entry = entry
        try:
            await self.books.close(entry)
        finally:
            await self._pay(run)

    async def _pay(self, run: Run) -> None:
        for attempt in run.attempts:
            if attempt.unused:
                await attempt.money.release()
            else:
                await attempt.money.settle(attempt.charged, attempt.output, ended=attempt.ended)

    def _entry(self, run: Run, told: Told) -> Entry:
        ask, decision, use = run.ask, run.decision, run.chosen.use if run.chosen else None
        usage, seconds, (charged, reserved, capped) = told.usage, ask.elapsed, run.sums()
        quality = self.board.expected(use, ask.priced_as).quality if use is not None else None
        delay_price = self.board.delay_price(ask.key.tenant, ask.priced_as, ask.kind)
        delay = 0 if use is None else priced(seconds, delay_price)
        return Entry(
            request_id=ask.request_id,
            at_ns=ask.at_ns,
            tenant=ask.key.tenant,
            key_id=ask.key.id,
            status=told.status,
            settled=_settled(told, charged, reserved, capped),
            session=ask.session,
            task_class=ask.task_class or None,
            model_asked=ask.call.model or None,
            use=use,
            upstream=run.asked.upstream if run.asked is not None else None,
            http_status=told.http_status,
            value_usd=ask.value,
            quality_expected=quality,
            value_nano=0 if quality is None else priced(quality, ask.value),
            compute_nano=charged,
            latency_nano=delay,
            risk_nano=0 if run.chosen is None else priced(1.0, max(run.chosen.risk, 0.0)),
            alternatives=b"" if decision is None else _written(decision.ranked[:SHOWN]),
            propensity=1.0 if use is not None else None,
            prices_version=None if decision is None else str(decision.version),
            input_tokens=None if usage is None else usage.prompt,
            cached_input_tokens=None if usage is None else usage.cached_input,
            output_tokens=None if usage is None else usage.completion,
            reasoning_tokens=None if usage is None else usage.reasoning,
            reserved_nano=reserved,
            charged_nano=charged,
            seconds_to_first=told.first,
            seconds=seconds,
            own_delay_nano=delay,
            prompt=ask.prompt,
        )

    def _count(self, run: Run, entry: Entry) -> None:
        use, chosen, m = entry.use or "none", run.chosen, self.metrics
        m.count("requests", use, entry.status)
        if _log.isEnabledFor(logging.INFO):
            _tell(entry)
        if chosen is None or run.decision is None or entry.seconds is None:
            return
        m.count("charged_usd", use, by=entry.charged_nano / 1e9)
        m.count("surplus_usd", use, by=chosen.net)
        if run.decision.ranked and entry.model_asked in self.board.economy.models:
            m.count("named_regret_usd", use, by=max(run.decision.surplus - chosen.net, 0.0))
        m.count("tokens", use, "input", by=entry.input_tokens or 0)
        m.count("tokens", use, "output", by=entry.output_tokens or 0)
        m.observe("request_seconds", entry.seconds, use)
        if entry.seconds_to_first is not None:
            m.observe("first_byte_seconds", entry.seconds_to_first, use)

    def _headers(self, run: Run) -> list[tuple[bytes, bytes]]:
        assert run.chosen is not None
        assert run.decision is not None
        return [
            *id_headers(run.ask.request_id),
            (b"x-walras-use", run.chosen.use.encode("ascii", "replace")),
            (b"x-walras-surplus", f"{run.chosen.net:.9f}".encode()),
            (b"x-walras-prices-version", str(run.decision.version).encode()),
        ]


def _settled(told: Told, charged: Nano, reserved: Nano, capped: bool) -> Settled:
    """How sure the charge is: 'cap' says that all of it, and all that was held, is a guess."""
    if capped:
        return "cap" if charged == reserved else "estimated"
    return told.settled if charged or told.settled == "estimated" or told.usage else "none"


def _least_entry(run: Run, told: Told) -> Entry:
    """What must be known of a request in any case: whose it is, and its money."""
    ask, (charged, reserved, capped) = run.ask, run.sums()
    return Entry(
        request_id=ask.request_id,
        at_ns=ask.at_ns,
        tenant=ask.key.tenant,
        key_id=ask.key.id,
        status=told.status,
        settled=_settled(told, charged, reserved, capped),
        http_status=told.http_status,
        compute_nano=charged,
        reserved_nano=reserved,
        charged_nano=charged,
    )


async def _surely(step: Awaitable[None]) -> None:
    """What goes wrong here keeps nothing that follows from being done."""
    try:
        await step
    except OutputError:
        pass
    except Exception as error:
        log_bug(error)


def _unwritable() -> HttpError:
    what = "the ledger cannot be written now, and what cannot be written is not spent"
    return HttpError(503, what, code="unavailable", headers=_retry(1.0))


def _written(ranked: Sequence[Alternative]) -> bytes:
    """As the ledger keeps them."""
    n, rows = NANO_PER_USD, []
    for a in ranked:
        value, compute, latency, risk = (
            round(a.value * n),
            round(a.compute * n),
            round(a.latency * n),
            round(a.risk * n),
        )
        rows.append(Written(a.use, value, compute, latency, risk, value - compute - latency - risk))
    return pack(rows)


def _tell(entry: Entry) -> None:
    event(
        _log,
        logging.INFO,
        "request",
        request_id=entry.request_id,
        tenant=entry.tenant,
        key_id=entry.key_id,
        use=entry.use,
        status=entry.status,
        http_status=entry.http_status,
        charged_nano=entry.charged_nano,
        seconds=entry.seconds,
    )


def _dearest(prices: TokenPrices) -> Tariff:
    """The most a token can be billed, whatever its kind, and what a request costs besides."""
    inputs = (prices.input, prices.cached_input or 0, prices.cache_write or 0)
    return Tariff(max(inputs), max(prices.output, prices.reasoning or 0), prices.request_nano)


def _amount(request: Request, name: bytes, most: float = math.inf) -> float | None:
    said = request.header(name)
    if said is None:
        return None
    try:
        value = float(said)
    except ValueError:
        value = math.nan
    if not 0 <= value <= most or math.isinf(value):
        limit = "" if math.isinf(most) else f" and at most {most:,.0f}"
        what = f"'{name.decode()}' must be a finite number of at least 0{limit}"
        raise HttpError(400, what, code="invalid_value", param=name.decode())
    return value


def _name(request: Request, header: bytes) -> str | None:
    said = request.header(header)
    if said and (len(said) > LONGEST or not said.isprintable()):
        what = f"'{header.decode()}' must be at most {LONGEST} printable characters"
        raise HttpError(400, what, code="invalid_value", param=header.decode())
    return said or None


_FINAL = (b"x-should-retry", b"false")


def _retry(seconds: float | None) -> tuple[tuple[bytes, bytes], ...]:
    return () if seconds is None else ((b"retry-after", str(math.ceil(seconds)).encode()),)
