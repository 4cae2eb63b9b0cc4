"""A provider of models: its keys and regions, what it charges, how it is, and one attempt at a time.

`Upstream.ask` makes one attempt. It never retries by itself: a retry is a use like any other, so whoever prices uses
decides, from what a `Failure` says: may it be tried again, may it have been charged.

    provider's answer            charged   try again
    not reached, 408, 409, 425   no        yes
    429                          no        yes, elsewhere or after retry-after
    401, 402, 403, 404           no        yes, elsewhere: this key or model is not served
    other 4xx                    no        no: the request itself is at fault
    500, 501, 503, 529           no        yes
    502, 504, other 5xx          maybe     yes: an intermediary lost the answer
    time out, cut, garbled       maybe     yes, unless part of the answer has been passed on
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
import os
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Mapping
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from random import Random
from typing import Annotated, Any, Literal

import msgspec

from walras.errors import SettingsError, WalrasError, nearest
from walras.gateway.dialects import (
    ProviderError,
    Reply,
    Spoken,
    Stream,
    read_error,
    translate_reply,
    write_call,
)
from walras.gateway.logs import event
from walras.gateway.transport import (
    Cut,
    Endpoint,
    Garbled,
    Request,
    Response,
    Seconds,
    TimedOut,
    Timeouts,
    TooLarge,
    Transport,
    TransportError,
    Unreachable,
    read_body,
)
from walras.gateway.wire import Call, ReplyError, Stamp, Usage

Nano = int
"""Money in nano-USD, 1e-9 USD."""
Kind = Literal["openai", "anthropic", "simulated"]
Whole = Annotated[int, msgspec.Meta(ge=0)]
NotNegative = Annotated[float, msgspec.Meta(ge=0)]
State = Literal["closed", "open", "half-open"]
Reason = Literal[
    "no route", "unreachable", "timed out", "cut", "garbled", "too large",
    "rate limited", "not served", "refused", "server error",
]  # fmt: skip

_log = logging.getLogger("walras.gateway")
MILLION = 1_000_000
LONGEST_RETRY_AFTER_S = 3600.0
DRAIN_S = 0.05
"""How long the end of a finished stream is waited for, so that its connection can be used again."""
MOST_ANSWERS = 2048
"""Of the last answers that a breaker remembers."""


class Secret:
    """A key that no repr, log or error shows."""

    __slots__ = ("_value",)

    def __init__(self, value: str) -> None:
        self._value = value

    def reveal(self) -> str:
        """The key itself: for the header it is sent in, nowhere else."""
        return self._value

    def __repr__(self) -> str:
        return "Secret(***)"


class TokenPrices(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """What a model charges: nano-USD per million tokens, so that 0.0375 USD is a whole number."""

    input: Whole
    output: Whole
    cached_input: Whole | None = None
    """Prompt tokens read from a cache; None: as `input`."""
    cache_write: Whole | None = None
    """Prompt tokens written to a cache; None: as `input`."""
    reasoning: Whole | None = None
    """None: as `output`."""
    request_nano: Whole = 0
    """Nano-USD for each request, besides its tokens."""

    def cost_nano(self, usage: Usage) -> Nano:
        """What `usage` costs; a fraction of a nano-USD is rounded up, once."""

        cached, written, reasoned = self.cached_input, self.cache_write, self.reasoning
        total = usage.input * self.input + usage.output * self.output
        total += usage.cached_input * (self.input if cached is None else cached)
        total += usage.cache_write * (self.input if written is None else written)
        total += usage.reasoning * (self.output if reasoned is None else reasoned)
        return self.request_nano - (-total // MILLION)


class Served(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """One model a provider serves."""

    name: str
    """As clients and settings call it."""
    prices: TokenPrices
    upstream_model: str = ""
    """As the provider calls it; empty: the same."""
    first_byte_s: NotNegative = 1.0
    """Expected seconds until the answer begins, before any is measured."""


class BreakerPolicy(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """When a key stops being used, and for how long."""

    in_row: Annotated[int, msgspec.Meta(ge=1)] = 5
    """Failures one after the other."""
    window: Annotated[int, msgspec.Meta(ge=1)] = 20
    """Answers over which the share of failures is taken, and as many more as are under way."""
    share: Annotated[float, msgspec.Meta(gt=0, le=1)] = 0.5
    """Share of failures in a full window."""
    open_s: Seconds = 5.0
    """Seconds it stays open first; doubled each time the trial request fails."""
    longest_s: Seconds = 60.0
    limited_s: Seconds = 1.0
    """Seconds after a 429 that names no time."""
    not_served_s: Seconds = 60.0
    """Seconds after the provider refused the key."""


class UpstreamSettings(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Settings data of one provider."""

    name: str
    kind: Kind
    models: tuple[Served, ...]
    base_url: str = ""
    """OpenAI: up to and with /v1. Anthropic: the host is enough."""
    regions: dict[str, str] = {}
    """Further base URLs by region; requests are spread over all."""
    keys: tuple[Secret, ...] = ()
    key_variables: tuple[str, ...] = ()
    """Environment variables that hold keys."""
    timeouts: Timeouts = Timeouts()
    breaker: BreakerPolicy = BreakerPolicy()

    @classmethod
    def of(cls, data: Mapping[str, Any]) -> UpstreamSettings:
        """Settings from plain data, as TOML gives it.

        Raises:
            SettingsError: an unknown or missing key, or a value of the wrong type; no value is repeated.
        """
        key = f"upstreams.{data['name']}" if isinstance(data.get("name"), str) else "upstreams"
        try:
            return msgspec.convert(dict(data), cls, dec_hook=_secret)
        except msgspec.ValidationError as error:
            raise SettingsError(str(error).replace("`$.", "`"), key=key) from error


def _secret(kind: type, value: object) -> Secret:
    if kind is not Secret or not isinstance(value, str):
        raise TypeError("a key must be a text")
    return Secret(value)


# Circuit breaker.


class Breaker:
    """Closed: requests pass. Open: none. Half-open: one passes, and its end decides."""

    def __init__(self, policy: BreakerPolicy, clock: Callable[[], float]) -> None:
        self._policy, self._clock = policy, clock
        self.failures_in_row = 0
        self._recent = 0  # one bit for each of the last answers, 1 a failure
        self._seen = 0
        self._until: float | None = None
        self._trial = False
        self._openings = 0

    @property
    def state(self) -> State:
        """Where it stands now."""
        if self._until is None:
            return "closed"
        return "open" if self._clock() < self._until else "half-open"

    @property
    def wait_s(self) -> float:
        """Seconds until a request may pass; 0 now."""
        return 0.0 if self._until is None else max(0.0, self._until - self._clock())

    @property
    def passes(self) -> bool:
        """Whether a request may pass now."""
        return self._until is None or (self.state == "half-open" and not self._trial)

    def take(self) -> bool:
        """Lets a request pass, where `passes`; says whether it is the trial. Its end must be told."""
        self._trial = trial = self.state == "half-open"
        return trial

    def succeeded(self, trial: bool) -> None:
        """A request was answered."""
        if trial:
            self._until, self._trial = None, False
            self._openings = self._recent = self._seen = 0
        self._note(0)
        self.failures_in_row = 0

    def failed(self, trial: bool, in_flight: int = 0) -> None:
        """A request failed, by the provider's fault. Failures come before answers, which take their time: so of many
        that are `in_flight`, a few do not speak for the rest."""
        self._note(1)
        self.failures_in_row += 1
        policy = self._policy
        size = min(policy.window + in_flight, MOST_ANSWERS)
        failures = (self._recent & ((1 << size) - 1)).bit_count()
        often = self._seen >= size and failures >= policy.share * size
        row = self.failures_in_row >= max(policy.in_row, policy.share * in_flight)
        if trial or (self._until is None and (often or row)):
            self._trial = False
            self._until = self._clock() + min(policy.open_s * 2.0**self._openings, policy.longest_s)
            self._openings = min(self._openings + 1, 16)

    def blocked(self, trial: bool, seconds: float) -> None:
        """The provider said when to come back: that is no failure of its service."""
        if trial:
            self._trial = False
        self._until = max(self._until or 0.0, self._clock() + seconds)

    def released(self, trial: bool) -> None:
        """A request was given up before its end: it says nothing."""
        if trial:
            self._trial = False

    def _note(self, failure: int) -> None:
        self._recent = (self._recent << 1 | failure) & ((1 << MOST_ANSWERS) - 1)
        self._seen += 1


# Failures.


class Failure(WalrasError):
    """An attempt that brought no complete answer. Its text holds no key and no prompt."""

    def __init__(
        self,
        upstream: str,
        reason: Reason,
        problem: str,
        *,
        may_retry: bool,
        charged: bool,
        status: int | None = None,
        retry_after_s: float | None = None,
        error: ProviderError | None = None,
    ) -> None:
        self.upstream, self.reason, self.status = upstream, reason, status
        self.may_retry = may_retry
        """Whether another attempt, here or elsewhere, could do better; never once part of an answer was passed on."""
        self.charged = charged
        """Whether this attempt may have been charged: settle it at its cap."""
        self.retry_after_s = retry_after_s
        """What the provider, or its breaker, asked to wait; another provider need not."""
        self.error = error or ProviderError("", "", "")
        """What the provider said to the client, keys removed; empty where it is not the client's to know."""
        super().__init__(f"upstream '{upstream}': {problem}")

    @property
    def client_status(self) -> int:
        """The HTTP status a client should see."""
        match self.reason:
            case "refused":
                return self.status or 400
            case "rate limited" | "no route":
                return 429 if self.reason == "rate limited" else 503
            case "timed out":
                return 504
            case _:
                return 502


def _classify(status: int) -> tuple[Reason, bool, bool]:
    """(reason, may be tried again, may have been charged) of an HTTP status: the table at the top."""
    if status == 429:
        return "rate limited", True, False
    if status in (401, 402, 403, 404):
        return "not served", True, False
    if status in (408, 409, 425):
        return "server error", True, False
    if 400 <= status < 500:
        return "refused", False, False
    return "server error", True, status not in (500, 501, 503, 529)


def _of_transport(error: TransportError) -> Reason:
    match error:
        case Unreachable():
            return "unreachable"
        case TimedOut():
            return "timed out"
        case TooLarge():
            return "too large"
        case Garbled():
            return "garbled"
        case Cut():
            return "cut"
        case _:
            return "unreachable"


def retry_after_s(headers: Mapping[str, str]) -> float | None:
    """Seconds the provider asks to wait, at most an hour; None where it does not say.

    A date is taken against the answer's own `date`, so that no clock but the provider's counts.
    """
    try:
        if "retry-after-ms" in headers:
            seconds = float(headers["retry-after-ms"]) / 1000
        elif headers.get("retry-after", "").strip()[:1].isdigit():
            seconds = float(headers["retry-after"])
        else:
            moments = [parsedate_to_datetime(headers[name]) for name in ("retry-after", "date")]
            seconds = (moments[0] - moments[1]).total_seconds()
    except (KeyError, ValueError, TypeError):
        return None
    return None if math.isnan(seconds) else min(max(seconds, 0.0), LONGEST_RETRY_AFTER_S)


def backoff_s(failures: int, rng: Random, *, base_s: float = 0.25, longest_s: float = 8.0) -> float:
    """Seconds to wait after `failures` in a row: exponential, with full jitter."""
    longest = min(longest_s, base_s * 2.0 ** min(failures - 1, 30)) if failures > 0 else 0.0
    return rng.uniform(0.0, longest)


# The provider.


@dataclass(slots=True)
class _Route:
    """One key at one region."""

    region: str
    key: int
    endpoints: dict[str, Endpoint]
    breaker: Breaker
    in_flight: int = 0


@dataclass(frozen=True, slots=True)
class RouteHealth:
    """How one key at one region is doing."""

    region: str
    key: int
    """Which key, counted from 1; 0: none is needed."""
    state: State
    in_flight: int
    failures_in_row: int
    wait_s: float


_PATHS: dict[Spoken, dict[str, str]] = {
    "chat": {"chat": "/chat/completions", "embeddings": "/embeddings", "models": "/models"},
    "messages": {"chat": "/v1/messages", "models": "/v1/models"},
}


class Upstream:
    """One provider."""

    def __init__(
        self,
        settings: UpstreamSettings,
        transport: Transport,
        *,
        env: Mapping[str, str] = os.environ,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Reads the keys and renders the heads of requests.

        Raises:
            SettingsError: no URL, no model, a variable that is not set, a key or URL that cannot be sent.
        """
        self.settings, self.name = settings, settings.name
        self.spoken: Spoken = "messages" if settings.kind == "anthropic" else "chat"
        self._transport, self.now = transport, clock
        self.models = {served.name: served for served in settings.models}
        if not self.models:
            raise SettingsError("needs at least one model", key=f"upstreams.{self.name}.models")
        self._keys = [*settings.keys, *(self._from(env, v) for v in settings.key_variables)]
        self._routes = self._make_routes()
        self._turn = 0

    def __repr__(self) -> str:
        return f"Upstream({self.name!r}, {self.settings.kind}, {len(self._routes)} routes)"

    def _from(self, env: Mapping[str, str], variable: str) -> Secret:
        if not env.get(variable):
            raise SettingsError(
                f"the environment variable {variable} is not set", key=f"upstreams.{self.name}.key_env"
            )
        return Secret(env[variable])

    def _make_routes(self) -> list[_Route]:
        settings = self.settings
        regions = ({"": settings.base_url} if settings.base_url else {}) | settings.regions
        if not regions:
            raise SettingsError("needs a base_url, or regions", key=f"upstreams.{self.name}.base_url")
        routes = []
        for region, url in regions.items():
            for number, key in enumerate(self._keys, 1) if self._keys else [(0, None)]:
                breaker = Breaker(settings.breaker, self.now)
                try:
                    endpoints = self._endpoints(url, key)
                except SettingsError as error:
                    if error.key != "base_url":
                        raise
                    where = f"upstreams.{self.name}." + (f"regions.{region}" if region else "base_url")
                    raise SettingsError(str(error).removeprefix("base_url: "), key=where) from error
                routes.append(_Route(region, number, endpoints, breaker))
        return routes

    def _endpoints(self, url: str, key: Secret | None) -> dict[str, Endpoint]:
        headers = [("content-type", "application/json"), ("user-agent", "walras")]
        root = url.rstrip("/")
        if self.spoken == "messages":
            root = root.removesuffix("/v1")
            headers.append(("anthropic-version", "2023-06-01"))
        if key is not None:
            secret = key.reveal()
            headers.append(
                ("x-api-key", secret) if self.spoken == "messages" else ("authorization", f"Bearer {secret}")
            )
        return {
            use: Endpoint.of("GET" if use == "models" else "POST", root + path, headers)
            for use, path in _PATHS[self.spoken].items()
        }

    def served(self, model: str) -> Served:
        """What is known of a model.

        Raises:
            SettingsError: it is not served here.
        """
        if model not in self.models:
            raise SettingsError(f"'{model}' is not served by '{self.name}'", hint=nearest(model, self.models))
        return self.models[model]

    @property
    def passing(self) -> int:
        """Keys at regions that may be used now."""
        return sum(route.breaker.passes for route in self._routes)

    @property
    def up(self) -> bool:
        """Whether any key may be used, if only for a trial."""
        first, *others = self._routes  # the first is asked at every decision
        return first.breaker.state != "open" or any(route.breaker.state != "open" for route in others)

    def health(self) -> list[RouteHealth]:
        """How each key at each region is doing."""
        return [
            RouteHealth(
                r.region, r.key, r.breaker.state, r.in_flight, r.breaker.failures_in_row, r.breaker.wait_s
            )
            for r in self._routes
        ]

    async def ask(
        self,
        call: Call,
        model: str,
        stamp: Stamp,
        *,
        max_tokens: int | None = None,
        within_s: float | None = None,
        headers: tuple[tuple[str, str], ...] = (),
    ) -> Answer:
        """One attempt at one model. `within_s` shortens the time it may take in all.

        Raises:
            RequestError: the model's API has no place for the request; nothing was sent.
            Failure: no answer. A stream's `Answer` may still raise it while it is read.
        """
        body = write_call(call, self.spoken, self.served(model).upstream_model or model, max_tokens)
        timeouts = self.settings.timeouts
        if within_s is not None and within_s < timeouts.total:
            timeouts = Timeouts(
                timeouts.connect, timeouts.first_byte, timeouts.between_bytes, max(within_s, 0.001)
            )
        lease = self._lease()
        use = "embeddings" if call.dialect == "embeddings" else "chat"
        started = self.now()
        try:
            response = await self._transport.send(
                Request(lease.route.endpoints[use], body, timeouts, headers, resend=True)
            )
            first_byte_s = self.now() - started
            if not 200 <= response.status < 300:
                raise await self._refused(response, lease)
            answer = Answer(self, model, call, stamp, response, lease, started, first_byte_s)
            if call.stream and use == "chat":
                return await answer.expect_events()
            await answer.read_whole()
        except TransportError as error:
            raise lease.lost(error) from error
        except BaseException:
            lease.release()
            raise
        return answer

    def _lease(self) -> _Lease:
        """The least busy key that may be used, turn by turn among equals."""
        if len(self._routes) == 1 and self._routes[0].breaker.passes:
            return _Lease(self, self._routes[0])
        self._turn = turn = (self._turn + 1) % len(self._routes)
        order = self._routes[turn:] + self._routes[:turn]
        passing = [route for route in order if route.breaker.passes]
        if not passing:
            wait = min(route.breaker.wait_s for route in order)
            raise Failure(
                self.name, "no route", "no key may be used now: the provider failed or is rate limited",
                may_retry=True, charged=False, retry_after_s=wait,
            )  # fmt: skip
        return _Lease(self, min(passing, key=lambda route: route.in_flight))

    async def _refused(self, response: Response, lease: _Lease) -> Failure:
        """The failure an HTTP status stands for, told to the breaker."""
        status, told = response.status, retry_after_s(response.headers)
        with contextlib.suppress(TransportError):
            text = await read_body(response)
            return lease.refused(status, told, read_error(text))
        return lease.refused(status, told, ProviderError("", "", ""))

    def redacted(self, error: ProviderError) -> ProviderError:
        """What a provider said, without our keys and at most 500 characters."""
        message = error.message[:500]
        for key in self._keys:
            message = message.replace(key.reveal(), "***")
        return ProviderError(message, error.type[:100], error.code[:100])

    async def check(self) -> list[tuple[str, str]]:
        """Asks each key at each region for its list of models: (region and key, what is wrong; empty where nothing)."""
        return await asyncio.gather(*(self._check(route) for route in self._routes))

    async def _check(self, route: _Route) -> tuple[str, str]:
        label = ", ".join([route.region or "default", *([self._key_name(route.key)] if route.key else [])])
        timeouts = self.settings.timeouts
        request = Request(
            route.endpoints["models"], b"", Timeouts(timeouts.connect, 10.0, 10.0, 15.0), resend=True
        )
        try:
            response = await self._transport.send(request)
            await read_body(response)
        except TransportError as error:
            return label, str(error)
        return label, "" if response.status == 200 else f"answers with HTTP status {response.status}"

    def _key_name(self, number: int) -> str:
        """How the settings call a key."""
        of_variable = number - 1 - len(self.settings.keys)
        return f"key {number}" if of_variable < 0 else self.settings.key_variables[of_variable]


class _Lease:
    """A key in use by one attempt. Its end is told to the breaker once."""

    def __init__(self, upstream: Upstream, route: _Route) -> None:
        self._upstream, self.route = upstream, route
        self._trial = route.breaker.take()
        self._held = True
        route.in_flight += 1

    def _end(self) -> bool:
        held, self._held = self._held, False
        self.route.in_flight -= held
        return held

    def _failed(self) -> None:
        breaker, was = self.route.breaker, self.route.breaker.state
        breaker.failed(self._trial, self.route.in_flight)
        if was != "open" and breaker.state == "open":
            self._left_alone(failures_in_row=breaker.failures_in_row)

    def _blocked(self, status: int, seconds: float) -> None:
        breaker, was = self.route.breaker, self.route.breaker.state
        breaker.blocked(self._trial, seconds)
        if was != "open":
            self._left_alone(status=status)

    def _left_alone(self, **why: int) -> None:
        event(
            _log,
            logging.WARNING,
            "upstream left alone for a while",
            upstream=self._upstream.name,
            region=self.route.region,
            key=self.route.key,
            seconds=round(self.route.breaker.wait_s, 3),
            **why,
        )

    def done(self) -> None:
        if self._end():
            self.route.breaker.succeeded(self._trial)

    def proved(self) -> None:
        """A stream has begun: a trial need not last until its end to let others pass, and failures are not in a row,
        which come at once while answers take their time."""
        self.route.breaker.failures_in_row = 0
        if self._trial:
            self.route.breaker.succeeded(True)
            self._trial = False

    def release(self) -> None:
        if self._end():
            self.route.breaker.released(self._trial)

    def lost(self, error: TransportError, *, begun: bool = False) -> Failure:
        """The failure of a broken exchange."""
        return self.failed(_of_transport(error), str(error), charged=error.sent, begun=begun)

    def failed(
        self, reason: Reason, problem: str, *, charged: bool, begun: bool = False, error: ProviderError | None = None
    ) -> Failure:  # fmt: skip
        """A failure by the provider's fault."""
        if self._end():
            self._failed()
        return Failure(
            self._upstream.name, reason, problem, may_retry=not begun, charged=charged, error=error
        )

    def refused(self, status: int, told_s: float | None, error: ProviderError) -> Failure:
        """The failure of an HTTP status."""
        reason, may_retry, charged = _classify(status)
        policy = self._upstream.settings.breaker
        breaker = self.route.breaker
        if self._end():
            if reason == "rate limited" and error.code != "insufficient_quota":
                self._blocked(status, policy.limited_s if told_s is None else told_s)
            elif status in (401, 402, 403, 429):
                self._blocked(status, policy.not_served_s)
            elif reason == "server error":
                self._failed()
                if told_s is not None:
                    breaker.blocked(False, told_s)
            else:  # it answered: the request or the model is at fault
                breaker.succeeded(self._trial)
        said = self._upstream.redacted(error) if reason in ("refused", "rate limited") else None
        return Failure(
            self._upstream.name, reason, f"answered with HTTP status {status}",
            may_retry=may_retry, charged=charged, status=status, retry_after_s=told_s, error=said,
        )  # fmt: skip


class Answer:
    """An answer in the client's dialect: whole in `reply`, or read with `async for`, which ends when it is complete.

    Close it in every case: closing early cancels the provider's work. A key stays in use until then.
    """

    def __init__(
        self, upstream: Upstream, model: str, call: Call, stamp: Stamp, response: Response, lease: _Lease,
        started: float, first_byte_s: float,
    ) -> None:  # fmt: skip
        self.model, self.upstream = model, upstream.name
        self.region, self.key = lease.route.region, lease.route.key
        self.first_byte_s = first_byte_s
        """Seconds until the head of the answer; of a stream, until its first text."""
        self.reply: Reply | None = None
        self.stream: Stream | None = None
        self._upstream, self._call, self._stamp = upstream, call, stamp
        self._response, self._lease, self._started = response, lease, started
        self._silent = True
        self._chunks: AsyncIterator[bytes]
        """Of a stream: what is still to come."""
        self._early = b""
        """Of a stream: its first bytes."""

    @property
    def usage(self) -> Usage | None:
        """As the provider counted it; None: not said (yet), or not believable."""
        if self.stream is not None:
            return self.stream.usage
        return self.reply.usage if self.reply is not None else None

    @property
    def finished(self) -> bool:
        """Whether the answer is complete. For a stream, true before its last bytes are handed over."""
        return self.reply is not None or (self.stream is not None and self.stream.finished)

    @property
    def headers(self) -> Mapping[str, str]:
        """The provider's headers."""
        return self._response.headers

    async def read_whole(self) -> None:
        body = await read_body(self._response)
        try:
            self.reply = translate_reply(self._call, self._upstream.spoken, body, self._stamp)
        except ReplyError as error:
            raise self._lease.failed("garbled", str(error), charged=True) from error
        self._lease.done()

    async def expect_events(self) -> Answer:
        """Wait for the first bytes of a stream."""
        if not self._response.headers.get("content-type", "").lower().startswith("text/event-stream"):
            await self._response.aclose()
            raise self._lease.failed("garbled", "answered a stream with something else", charged=True)
        self._lease.proved()
        self.stream = Stream(self._call, self._upstream.spoken, self._stamp)
        self._chunks = aiter(self._response)
        try:
            self._early = await anext(self._chunks, b"")
        except BaseException:
            await self._response.aclose()
            raise
        return self

    async def __aiter__(self) -> AsyncGenerator[bytes, None]:
        """The client's bytes; `Failure` where the answer does not come to its end."""
        stream = self.stream
        if stream is None:
            return
        begun = False
        try:
            data = self._early
            while data or (data := await anext(self._chunks, b"")):
                out = stream.feed(data)
                data = b""
                if stream.error is not None:
                    break
                if self._silent and stream.pieces:
                    self._silent = False
                    self.first_byte_s = self._upstream.now() - self._started
                if stream.finished:
                    self._lease.done()
                if out:
                    begun = True
                    yield out
                if stream.finished:
                    await _drain(self._chunks)
                    return
            last = stream.close()
            if stream.error is not None:
                said = ProviderError(stream.error.text, stream.error.name, "")
                raise self._lease.failed(
                    "server error", f"reported an error inside the stream ({said.type[:100]})",
                    charged=True, begun=begun, error=self._upstream.redacted(said),
                )  # fmt: skip
            if not stream.finished:
                raise self._lease.failed("cut", "ended the stream before its end", charged=True, begun=begun)
            self._lease.done()
            if last:
                yield last
        except TransportError as error:
            raise self._lease.lost(error, begun=begun) from error
        except ReplyError as error:
            raise self._lease.failed("garbled", str(error), charged=True, begun=begun) from error
        finally:
            await self.aclose()

    def fail(self, failure: Failure) -> bytes:
        """What tells a client whose stream has begun that it will not be completed."""
        assert self.stream is not None
        code = failure.reason.replace(" ", "_")
        return self.stream.fail("the model's answer broke off", "api_error", f"upstream_{code}")

    async def aclose(self) -> None:
        """Ends the attempt; before the answer's end, the provider's work is cancelled."""
        self._lease.release()
        await self._response.aclose()


async def _drain(chunks: AsyncIterator[bytes]) -> None:
    with contextlib.suppress(TimeoutError, TransportError):
        async with asyncio.timeout(DRAIN_S):
            async for _ in chunks:
                pass
