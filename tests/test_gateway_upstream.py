"""Providers: what an attempt may cost, when it may be tried again, breakers, keys, faults; over real and simulated roads."""

from __future__ import annotations

import asyncio
import json
import math
import statistics
from collections.abc import AsyncIterator, Coroutine, Mapping
from contextlib import aclosing
from fractions import Fraction
from random import Random
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from responder import Peer, serve
from walras.errors import SettingsError
from walras.gateway.calls import _dearest
from walras.gateway.dialects import Stream, read_call
from walras.gateway.simulated import (
    EMBEDDING,
    MODELS,
    Fault,
    SimulatedTransport,
    difficulty,
    quality,
    simulated_settings,
)
from walras.gateway.transport import Cut, HttpTransport, Request, Timeouts, TransportError, Unreachable
from walras.gateway.upstream import (
    Answer,
    Breaker,
    BreakerPolicy,
    Failure,
    Secret,
    Served,
    TokenPrices,
    Upstream,
    UpstreamSettings,
    backoff_s,
    retry_after_s,
)
from walras.gateway.wire import Call, RequestError, Stamp, Usage

SECRET = "sk-very-secret"
STAMP = Stamp("0", 1_700_000_000, "m")
PRICES = TokenPrices(input=2_000_000_000, output=8_000_000_000, cached_input=500_000_000)
Json = dict[str, Any]

REPLY = json.dumps(
    {
        "id": "c", "object": "chat.completion", "model": "m",
        "choices": [{"index": 0, "message": {"role": "assistant", "content": "hello"}, "finish_reason": "stop"}],
        "usage": {"prompt_tokens": 10, "completion_tokens": 5, "total_tokens": 15},
    }
).encode()  # fmt: skip


def ask(stream: bool = False, model: str = "m", **fields: Any) -> Call:
    body = {"model": model, "stream": stream, "messages": [{"role": "user", "content": "Why?"}], **fields}
    return read_call("chat", json.dumps(body).encode())


def run(main: Coroutine[Any, Any, None]) -> None:
    asyncio.run(asyncio.wait_for(main, 10))


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


class Said:
    """A response of a scripted transport."""

    def __init__(self, status: int, headers: Mapping[str, str], chunks: list[bytes | TransportError]) -> None:
        self.status, self.headers, self._chunks, self.closed = status, headers, chunks, False

    async def __aiter__(self) -> AsyncIterator[bytes]:
        for chunk in self._chunks:
            if isinstance(chunk, TransportError):
                raise chunk
            yield chunk

    async def aclose(self) -> None:
        self.closed = True


class Scripted:
    """A transport that gives one prepared answer after the other, and keeps what it was sent."""

    def __init__(self, *answers: Said | type[TransportError] | None) -> None:
        self.answers, self.sent = list(answers), list[Request]()

    async def send(self, request: Request) -> Said:
        self.sent.append(request)
        answer = self.answers.pop(0) if self.answers else said()
        if answer is None:
            await asyncio.sleep(60)
        if isinstance(answer, type):
            raise (
                answer(request.endpoint.origin, "x")
                if answer is Unreachable
                else answer(request.endpoint.origin)
            )
        assert isinstance(answer, Said)
        return answer

    async def aclose(self) -> None:
        pass


def said(status: int = 200, body: bytes = REPLY, **headers: str) -> Said:
    return Said(status, {k.replace("_", "-"): v for k, v in headers.items()}, [body])


def events(*chunks: bytes | TransportError) -> Said:
    return Said(200, {"content-type": "text/event-stream"}, list(chunks))


def provider(transport: Any, *, n_keys: int = 1, clock: Clock | None = None, **fields: Any) -> Upstream:
    data: Json = {
        "name": "acme", "kind": "openai", "base_url": "https://api.acme.test/v1",
        "keys": [f"{SECRET}-{k}" for k in range(n_keys)],
        "models": [{"name": "m", "upstream_model": "acme-m", "prices": msgspec.to_builtins(PRICES)}],
    }  # fmt: skip
    return Upstream(UpstreamSettings.of(data | fields), transport, env={}, clock=clock or Clock())


async def failing(upstream: Upstream, call: Call | None = None, **options: Any) -> Failure:
    """The failure of an attempt, of its stream too. It must hold no key, and leave no key in use."""

    async def attempt() -> None:
        async for _ in await upstream.ask(call or ask(), "m", STAMP, **options):
            pass

    with pytest.raises(Failure) as caught:
        await attempt()
    error = caught.value
    assert SECRET not in f"{error} {error!r} {vars(error)}"
    assert all(route.in_flight == 0 for route in upstream.health())
    return error


# Settings and secrets.


def test_keys_are_shown_nowhere() -> None:
    transport = Scripted(said(401, b'{"error":{"message":"Incorrect key sk-very-secret-0"}}'),
                         said(400, b'{"error":{"message":"Bad; key sk-very-secret-0 was used","type":"t"}}'))  # fmt: skip
    upstream = provider(transport, breaker={"not_served_s": 0.001}, clock=(clock := Clock()))
    shown = (
        f"{upstream!r} {upstream.settings!r} {upstream.settings.keys} {upstream.health()} {Secret(SECRET)!s}"
    )
    assert SECRET not in shown

    async def main() -> None:
        error = await failing(upstream)
        assert error.error.message == ""  # a client need not know of our keys
        clock.now += 1
        error = await failing(upstream)
        assert error.error.message == "Bad; key *** was used"

    run(main())
    assert SECRET not in repr(transport.sent)
    assert b"Bearer sk-very-secret-0" in transport.sent[0].endpoint.head


def test_keys_come_from_the_environment() -> None:
    data = msgspec.to_builtins(simulated_settings()) | {"kind": "openai", "key_variables": ["ACME_KEY"]}
    transport = Scripted()
    upstream = Upstream(UpstreamSettings.of(data), transport, env={"ACME_KEY": SECRET})
    run(upstream.check())
    assert f"authorization: Bearer {SECRET}".encode() in transport.sent[0].endpoint.head
    with pytest.raises(SettingsError, match="ACME_KEY is not set"):
        Upstream(UpstreamSettings.of(data), transport, env={})


@pytest.mark.parametrize(
    ("fields", "match"),
    [
        ({"colour": "red"}, "colour"),
        ({"kind": "other"}, "kind"),
        ({"keys": [3]}, "keys"),
        ({"models": []}, "at least one model"),
        ({"models": [{"name": "m", "prices": {"input": -1, "output": 1}}]}, "prices.input"),
        ({"models": [{"name": "m", "prices": {"input": 0.5, "output": 1}}]}, "prices.input"),
        ({"timeouts": {"first_bite": 3}}, "first_bite"),
        ({"timeouts": {"connect": 0}}, "timeouts.connect"),
        ({"breaker": {"share": 2}}, "breaker.share"),
        ({"base_url": ""}, "base_url"),
        ({"base_url": "ftp://x"}, "http"),
        ({"keys": [f"{SECRET}\r\nx: y"]}, "authorization"),
    ],
)
def test_settings_that_could_not_be_meant_are_refused(fields: Json, match: str) -> None:
    with pytest.raises(SettingsError, match=match) as caught:
        provider(Scripted(), **fields)
    assert SECRET not in str(caught.value)


# Money.

TOKENS = st.integers(0, 10**7)
USAGES = st.builds(Usage, *[TOKENS] * 5)
A_PRICE = st.integers(0, 10**11)
PRICE_TABLES = st.builds(
    TokenPrices, input=A_PRICE, output=A_PRICE, cached_input=st.none() | A_PRICE, cache_write=st.none() | A_PRICE,
    reasoning=st.none() | A_PRICE, request_nano=st.integers(0, 10**9),
)  # fmt: skip


@given(PRICE_TABLES, USAGES)
def test_cost_is_exact_and_never_above_the_cap(prices: TokenPrices, usage: Usage) -> None:
    def of(own: int | None, other: int) -> int:
        return other if own is None else own

    exact = Fraction(
        usage.input * prices.input
        + usage.cached_input * of(prices.cached_input, prices.input)
        + usage.cache_write * of(prices.cache_write, prices.input)
        + usage.output * prices.output
        + usage.reasoning * of(prices.reasoning, prices.output),
        10**6,
    )
    cost = prices.cost_nano(usage)
    assert type(cost) is int
    assert cost == prices.request_nano + math.ceil(exact)
    assert cost <= _dearest(prices).cost(usage.prompt, usage.completion)


def test_the_cost_of_an_answer() -> None:
    async def main() -> None:
        answer = await provider(Scripted()).ask(ask(), "m", STAMP)
        # 10 tokens at 2 USD and 5 at 8 USD per million: 60 millionths of a USD
        assert answer.usage is not None
        assert PRICES.cost_nano(answer.usage) == 60_000
        assert answer.reply is not None
        assert answer.reply.body == REPLY
        assert (answer.finished, answer.usage) == (True, Usage(input=10, output=5))

    run(main())


# Breaker.


def test_a_breaker_opens_by_failures_in_a_row_and_tries_one() -> None:
    clock = Clock()
    breaker = Breaker(BreakerPolicy(in_row=3, open_s=5, longest_s=15), clock)
    for _ in range(2):
        breaker.failed(breaker.take())
    breaker.succeeded(breaker.take())
    for _ in range(3):
        assert breaker.state == "closed"
        breaker.failed(breaker.take())
    for open_s in (5, 10, 15, 15):  # doubled with each failed trial, up to the longest
        assert (breaker.state, breaker.wait_s, breaker.passes) == ("open", open_s, False)
        clock.now += open_s
        assert (breaker.state, breaker.passes) == ("half-open", True)
        trial = breaker.take()
        assert trial
        assert not breaker.passes  # one trial at a time
        breaker.failed(trial)
    clock.now += 15
    breaker.released(breaker.take())  # the client went away: nothing is known
    assert breaker.passes
    breaker.succeeded(breaker.take())
    assert (breaker.state, breaker.wait_s) == ("closed", 0.0)
    for _ in range(3):
        breaker.failed(breaker.take())
    assert breaker.wait_s == 5  # a closed breaker has forgotten


def test_a_breaker_opens_by_the_share_of_failures() -> None:
    breaker = Breaker(BreakerPolicy(in_row=100, window=10, share=0.5), Clock())
    for k in range(10):
        assert breaker.passes
        trial = breaker.take()
        (breaker.failed if k % 2 else breaker.succeeded)(trial)
    assert breaker.state == "open"


def test_a_late_failure_of_an_earlier_request_does_not_prolong_the_opening() -> None:
    clock = Clock()
    breaker = Breaker(BreakerPolicy(in_row=2, open_s=5), clock)
    late = breaker.take()
    for _ in range(2):
        breaker.failed(breaker.take())
    clock.now += 3
    breaker.failed(late)
    assert breaker.wait_s == 2
    clock.now += 2
    trial = breaker.take()
    breaker.succeeded(late)  # nor does a late success end the trial
    assert not breaker.passes
    breaker.succeeded(trial)
    assert breaker.state == "closed"


@given(
    st.lists(st.sampled_from(["take", "succeed", "fail", "release", "block", "wait"]), max_size=80), st.data()
)
def test_no_request_passes_an_open_breaker_and_one_a_half_open_one(
    steps: list[str], data: st.DataObject
) -> None:
    clock = Clock()
    breaker = Breaker(BreakerPolicy(in_row=2, window=4, open_s=3, longest_s=9), clock)
    under_way: list[bool] = []
    for step in steps:
        if step == "wait":
            clock.now += data.draw(st.floats(0, 5))
        elif step == "take":
            if breaker.passes:
                state = breaker.state
                trial = breaker.take()
                assert state != "open"
                assert trial == (state == "half-open")
                under_way.append(trial)
        elif under_way:
            trial = under_way.pop(data.draw(st.integers(0, len(under_way) - 1)))
            end = {"succeed": breaker.succeeded, "fail": breaker.failed, "release": breaker.released}.get(
                step
            )
            if end is None:
                breaker.blocked(trial, 4.0)
                assert breaker.wait_s >= 4.0
            else:
                end(trial)
        assert sum(under_way) <= 1
        assert breaker.wait_s <= 9.0
    clock.now += 10
    for trial in under_way:
        breaker.released(trial)
    assert breaker.passes  # it never sticks


# What may be tried again, and what may have been charged.


@pytest.mark.parametrize(
    ("status", "reason", "may_retry", "charged", "client_status"),
    [
        (400, "refused", False, False, 400),
        (422, "refused", False, False, 422),
        (413, "refused", False, False, 413),
        (401, "not served", True, False, 502),
        (403, "not served", True, False, 502),
        (404, "not served", True, False, 502),
        (408, "server error", True, False, 502),
        (429, "rate limited", True, False, 429),
        (500, "server error", True, False, 502),
        (502, "server error", True, True, 502),
        (503, "server error", True, False, 502),
        (504, "server error", True, True, 502),
        (529, "server error", True, False, 502),
    ],
)
def test_what_a_status_means(
    status: int, reason: str, may_retry: bool, charged: bool, client_status: int
) -> None:
    async def main() -> None:
        error = await failing(provider(Scripted(said(status, b"{}"))))
        found = (error.status, error.reason, error.may_retry, error.charged, error.client_status)
        assert found == (status, reason, may_retry, charged, client_status)

    run(main())


def test_what_a_broken_exchange_means() -> None:
    half = b'data: {"choices":[{"index":0,"delta":{"content":"x"}}]}\n\n'
    origin = provider(Scripted())._routes[0].endpoints["chat"].origin
    late = half + b'data: {"error":{"message":"sk-very-secret-0 died","type":"t"}}\n\n'
    whole: list[tuple[Any, str, bool, bool]] = [
        (Unreachable, "unreachable", True, False),
        (Cut, "cut", True, True),
        (said(body=b"<html>"), "garbled", True, True),
        (Said(200, {}, [REPLY[:9], Cut(origin)]), "cut", True, True),
    ]
    streams: list[tuple[Any, str, bool, bool]] = [
        (said(content_type="application/json"), "garbled", True, True),
        (events(Cut(origin)), "cut", True, True),
        (events(half, Cut(origin)), "cut", False, True),
        (events(half), "cut", False, True),
        (events(b"data: nonsense\n\n"), "garbled", True, True),
        (events(half, b"data: nonsense\n\n"), "garbled", False, True),
        (events(late), "server error", True, True),
    ]

    async def main() -> None:
        for call, cases in ((ask(), whole), (ask(stream=True), streams)):
            for answer, reason, may_retry, charged in cases:
                upstream = provider(Scripted(answer))
                error = await failing(upstream, call)
                assert (error.reason, error.may_retry, error.charged) == (reason, may_retry, charged)
                assert upstream.health()[0].failures_in_row == 1
                if isinstance(answer, Said):
                    assert answer.closed

    run(main())


def test_what_cannot_be_asked_is_not_sent() -> None:
    async def main() -> None:
        transport = Scripted()
        upstream = provider(transport, kind="anthropic")
        with pytest.raises(RequestError):
            await upstream.ask(ask(n=2), "m", STAMP, max_tokens=9)
        with pytest.raises(SettingsError, match="did you mean"):
            await upstream.ask(ask(), "mm", STAMP)
        assert transport.sent == []
        assert upstream.health()[0].in_flight == 0

    run(main())


@pytest.mark.parametrize(
    ("headers", "seconds"),
    [
        ({}, None),
        ({"retry-after": "7"}, 7.0),
        ({"retry-after": "0.5"}, 0.5),
        ({"retry-after-ms": "250", "retry-after": "1"}, 0.25),
        ({"retry-after": "999999999"}, 3600.0),
        ({"retry-after": "Wed, 21 Oct 2015 07:28:30 GMT", "date": "Wed, 21 Oct 2015 07:28:00 GMT"}, 30.0),
        ({"retry-after": "Wed, 21 Oct 2015 07:28:00 GMT", "date": "Wed, 21 Oct 2015 07:28:30 GMT"}, 0.0),
        ({"retry-after": "Wed, 21 Oct 2015 07:28:30 GMT"}, None),
        ({"retry-after": "soon"}, None),
        ({"retry-after": "-5"}, None),
        ({"retry-after-ms": "nan"}, None),
    ],
)
def test_retry_after(headers: dict[str, str], seconds: float | None) -> None:
    assert retry_after_s(headers) == seconds


def test_backoff_has_full_jitter_and_a_bound() -> None:
    rng = Random(0)
    for failures, longest in ((0, 0.0), (1, 0.25), (2, 0.5), (4, 2.0), (20, 8.0), (10_000, 8.0)):
        drawn = [backoff_s(failures, rng) for _ in range(2000)]
        assert all(0 <= wait <= longest for wait in drawn)
        assert statistics.mean(drawn) == pytest.approx(longest / 2, rel=0.06)
    assert backoff_s(3, Random(1)) == backoff_s(3, Random(1))


# Keys and regions.


def test_keys_and_regions_are_used_in_turn_and_a_limited_one_rests() -> None:
    async def main() -> None:
        clock = Clock()
        transport = Scripted()
        upstream = provider(transport, n_keys=2, clock=clock, regions={"eu": "https://eu.acme.test/v1"})

        def used(n: int) -> set[tuple[str, bytes]]:
            heads = [
                (str(r.endpoint.origin), r.endpoint.head.split(b"Bearer ")[1]) for r in transport.sent[-n:]
            ]
            return {(origin, head.split(b"\r\n")[0]) for origin, head in heads}

        for _ in range(8):
            await upstream.ask(ask(), "m", STAMP)
        assert len(used(4)) == len(used(8)) == 4
        transport.answers = [said(429, b"{}", retry_after="30")]
        error = await failing(upstream)
        assert error.retry_after_s == 30
        limited = used(1)
        for _ in range(9):
            await upstream.ask(ask(), "m", STAMP)
        assert len(used(9)) == 3
        assert not used(9) & limited
        assert upstream.passing == 3, "the other keys are free"
        clock.now += 30
        for _ in range(4):
            await upstream.ask(ask(), "m", STAMP)
        assert limited <= used(4)

    run(main())


def test_the_least_busy_key_is_used() -> None:
    async def main() -> None:
        transport = Scripted(None, said(), said(), said())
        upstream = provider(transport, n_keys=2)
        task = asyncio.create_task(upstream.ask(ask(), "m", STAMP))
        await asyncio.sleep(0.01)
        for _ in range(3):
            await upstream.ask(ask(), "m", STAMP)
        heads = [request.endpoint.head for request in transport.sent]
        assert heads[0] not in heads[1:]
        assert sorted(route.in_flight for route in upstream.health()) == [0, 1]
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert [route.in_flight for route in upstream.health()] == [0, 0]
        assert [route.failures_in_row for route in upstream.health()] == [0, 0]

    run(main())


def test_with_every_key_resting_nothing_is_sent(caplog: pytest.LogCaptureFixture) -> None:
    async def main() -> None:
        clock = Clock()
        transport = Scripted(
            said(429, b'{"error":{"code":"insufficient_quota","message":"Pay"}}', retry_after="1"),
            said(401, b"{}"),
        )
        upstream = provider(transport, n_keys=2, clock=clock)
        for _ in range(2):
            await failing(upstream)
        error = await failing(upstream)
        assert (error.reason, error.may_retry, error.charged) == ("no route", True, False)
        assert (error.retry_after_s, error.client_status) == (60.0, 503)
        assert len(transport.sent) == 2
        told = [
            record for record in caplog.records if record.getMessage() == "upstream left alone for a while"
        ]
        fields = [vars(record)["walras_fields"] for record in told]
        assert [(f["status"], f["seconds"]) for f in fields] == [(429, 60.0), (401, 60.0)]
        assert sorted(f["key"] for f in fields) == [1, 2]
        assert not upstream.passing
        clock.now += 60
        assert (await upstream.ask(ask(), "m", STAMP)).finished

    run(main())


def test_a_dead_provider_is_left_alone_and_tried_again() -> None:
    async def main() -> None:
        clock = Clock()
        transport = Scripted(*[Unreachable] * 6)
        upstream = provider(transport, clock=clock)
        reasons = [(await failing(upstream)).reason for _ in range(10)]
        assert reasons == ["unreachable"] * 5 + ["no route"] * 5
        clock.now += 5
        assert (await failing(upstream)).reason == "unreachable"  # the trial
        assert (await failing(upstream)).retry_after_s == 10
        clock.now += 10
        await upstream.ask(ask(), "m", STAMP)
        assert upstream.health()[0].state == "closed"

    run(main())


def test_a_stream_that_began_lets_others_pass_before_it_ends() -> None:
    async def main() -> None:
        clock = Clock()
        transport = Scripted(said(429, b"{}"), events(b": still thinking\n\n"))
        upstream = provider(transport, clock=clock)
        await failing(upstream)
        clock.now += 1
        answer = await upstream.ask(ask(stream=True), "m", STAMP)
        assert (await upstream.ask(ask(), "m", STAMP)).finished
        await answer.aclose()
        assert upstream.health()[0].in_flight == 0

    run(main())


# Over real sockets.


def test_requests_as_the_two_apis_document_them() -> None:
    message = b'{"type":"message","content":[{"type":"text","text":"hello"}],"stop_reason":"end_turn","usage":{"input_tokens":3,"output_tokens":2}}'
    seen: list[tuple[bytes, dict[bytes, bytes], Any]] = []

    async def script(peer: Peer, body: bytes) -> None:
        seen.append((peer.target, dict(peer.headers), json.loads(body) if body else None))
        answer = message if b"messages" in peer.target else REPLY
        peer.socket.write(b"HTTP/1.1 200 OK\r\ncontent-length: %d\r\n\r\n" % len(answer) + answer)

    async def main() -> None:
        async with serve(script) as server:
            transport = HttpTransport()
            root = server.url.removesuffix("/x")
            acme = provider(transport, base_url=root)
            await acme.ask(ask(), "m", STAMP, max_tokens=70)
            host = provider(transport, kind="anthropic", base_url=root)
            answer = await host.ask(ask(), "m", STAMP, max_tokens=70, headers=(("anthropic-beta", "x-1"),))
            assert answer.reply is not None
            assert json.loads(answer.reply.body)["choices"][0]["message"]["content"] == "hello"
            assert answer.usage == Usage(input=3, output=2)
            assert [await u.check() for u in (acme, host)] == [[("default, key 1", "")]] * 2
            await transport.aclose()

    run(main())
    (target, headers, body), (target2, headers2, body2), (models, *_), (models2, *_) = seen
    assert (target, headers[b"authorization"]) == (b"/v1/chat/completions", b"Bearer sk-very-secret-0")
    assert (body["model"], body["max_completion_tokens"]) == ("acme-m", 70)
    assert (target2, headers2[b"x-api-key"]) == (b"/v1/messages", b"sk-very-secret-0")
    assert b"authorization" not in headers2
    assert (headers2[b"anthropic-version"], headers2[b"anthropic-beta"]) == (b"2023-06-01", b"x-1")
    assert (body2["model"], body2["max_tokens"]) == ("acme-m", 70)
    assert models == models2 == b"/v1/models"


def test_a_finished_stream_gives_its_connection_back_and_a_cancelled_one_closes_it() -> None:
    head = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n"
    delta = b'data: {"choices":[{"index":0,"delta":{"content":"x"}}]}\n\n'
    ended = delta + b"data: [DONE]\n\n"

    async def script(peer: Peer, body: bytes) -> None:
        text = ended if b"whole" in body else delta
        peer.socket.write(head + b"%x\r\n" % len(text) + text + b"\r\n")
        if b"whole" in body:
            await asyncio.sleep(0.01)
            peer.socket.write(b"0\r\n\r\n")

    async def main() -> None:
        async with serve(script) as server:
            transport = HttpTransport()
            upstream = provider(transport, base_url=server.url.removesuffix("/x"))
            for _ in range(3):
                answer = await upstream.ask(ask(stream=True, user="whole"), "m", STAMP)
                assert b"".join([part async for part in answer]) == ended
            assert len(server.peers) == 1
            assert transport.connections() == (1, 1)

            async def read(answer: Answer) -> None:
                async for _ in answer:
                    pass

            task = asyncio.create_task(read(await upstream.ask(ask(stream=True), "m", STAMP)))
            await asyncio.sleep(0.02)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            await asyncio.wait_for(server.peers[0].lost, 0.5)
            assert upstream.health()[0].in_flight == 0
            assert upstream.health()[0].failures_in_row == 0
            error = await failing(upstream, ask(stream=True), within_s=0.1)
            assert (error.reason, error.client_status, error.charged) == ("timed out", 504, True)
            await transport.aclose()

    run(main())


# Simulated providers.


def simulated(
    seed: int = 0, fault: Fault | None = None, time_scale: float = 0.0
) -> tuple[Upstream, SimulatedTransport]:
    transport = SimulatedTransport(seed, time_scale=time_scale, faults={} if fault is None else {fault: 1.0})
    return Upstream(simulated_settings(), transport, env={}), transport


def words_in(body: bytes) -> str:
    text: str = json.loads(body)["choices"][0]["message"]["content"]
    return text


def test_simulated_models_answer_and_count_honestly() -> None:
    async def main() -> None:
        upstream, transport = simulated()
        for model in MODELS:
            whole = await upstream.ask(ask(max_tokens=200), model.name, STAMP)
            assert whole.reply is not None
            assert words_in(whole.reply.body).startswith(f"SIMULATED answer of {model.name}: ")
            assert whole.usage is not None
            assert len(words_in(whole.reply.body).split()) == whole.usage.output
            assert whole.usage.completion <= 200
            stream = await upstream.ask(ask(stream=True), model.name, STAMP)
            meter = Stream(ask(stream=True), "chat", STAMP)
            async for part in stream:
                meter.feed(part)
            assert stream.usage is not None
            assert (stream.finished, meter.finished, meter.pieces) == (True, True, stream.usage.output)
            assert (stream.usage.reasoning > 0) == (model.reasoning > 0)
        capped = await upstream.ask(ask(max_tokens=3), "simulated-small", STAMP)
        assert capped.reply is not None
        assert (capped.reply.finish, capped.usage) == ("length", Usage(5, 0, 0, 3, 0))
        assert transport.open == 0
        assert [problem for _, problem in await upstream.check()] == [""]

    run(main())


def test_simulated_answers_are_the_same_for_the_same_seed_and_have_a_heavy_tail() -> None:
    async def lengths(seed: int) -> list[int]:
        upstream, _ = simulated(seed)
        answers = [await upstream.ask(ask(), "simulated-small", STAMP) for _ in range(600)]
        return [answer.usage.completion for answer in answers if answer.usage is not None]

    first = asyncio.run(lengths(1))
    assert first == asyncio.run(lengths(1))
    assert first != asyncio.run(lengths(2))
    assert statistics.median(first) == pytest.approx(120, rel=0.15)
    assert statistics.mean(first) > 1.4 * statistics.median(first)
    assert max(first) > 8 * statistics.median(first)


def test_simulated_quality_rises_with_the_model_and_falls_with_the_task() -> None:
    texts = [f"task {k}" for k in range(300)]
    means = [statistics.mean(quality(model, text) for text in texts) for model in MODELS]
    assert 0.2 < means[0] < means[1] < means[2] < 0.95
    easy, hard = min(texts, key=difficulty), max(texts, key=difficulty)
    assert all(quality(model, easy) > quality(model, hard) for model in MODELS)

    async def main() -> None:
        answer = await simulated()[0].ask(ask(), "simulated-large", STAMP)
        assert float(answer.headers["x-simulated-quality"]) == pytest.approx(
            quality(MODELS[2], "Why?"), abs=1e-4
        )

    run(main())


def test_simulated_tools_json_and_embeddings() -> None:
    schema = {"type": "object", "properties": {"city": {"type": "string"}, "days": {"type": "integer"}}}
    tools = [{"type": "function", "function": {"name": "weather", "parameters": schema}}]

    async def main() -> None:
        upstream, _ = simulated()
        answer = await upstream.ask(ask(tools=tools), "simulated-small", STAMP)
        assert answer.reply is not None
        choice = json.loads(answer.reply.body)["choices"][0]
        called = choice["message"]["tool_calls"][0]
        assert (choice["finish_reason"], called["function"]["name"]) == ("tool_calls", "weather")
        assert json.loads(called["function"]["arguments"]) == {"city": "SIMULATED Why?", "days": 1}
        result = {"role": "tool", "tool_call_id": called["id"], "content": "rain"}
        after = [{"role": "user", "content": "Why?"}, choice["message"], result]
        answer = await upstream.ask(ask(tools=tools, messages=after), "simulated-small", STAMP)
        assert answer.reply is not None
        assert "SIMULATED answer" in words_in(answer.reply.body)
        shape = {"type": "json_schema", "json_schema": {"name": "n", "schema": schema}}
        answer = await upstream.ask(ask(response_format=shape), "simulated-small", STAMP)
        assert answer.reply is not None
        assert json.loads(words_in(answer.reply.body)) == {"city": "SIMULATED Why?", "days": 1}
        call = read_call("embeddings", b'{"model":"m","input":["abcd","abcd","efgh"]}')
        answer = await upstream.ask(call, "simulated-embeddings", STAMP)
        assert answer.reply is not None
        vectors = [row["embedding"] for row in json.loads(answer.reply.body)["data"]]
        assert vectors[0] == vectors[1] != vectors[2]
        assert answer.usage is not None
        assert EMBEDDING.prices.cost_nano(answer.usage) == 60_000_000 // 1_000_000

    run(main())


@pytest.mark.parametrize(
    ("fault", "whole", "stream"),
    [
        ("dead", "unreachable", "unreachable"),
        ("500", "server error", "server error"),
        ("429", "rate limited", "rate limited"),
        ("401", "not served", "not served"),
        ("cut", "cut", "cut"),
        ("bad-json", "garbled", "garbled"),
        ("stream-error", None, "server error"),
        ("slow", "timed out", "timed out"),
        ("endless", None, "timed out"),
    ],
)
def test_simulated_faults(fault: Fault, whole: str | None, stream: str) -> None:
    async def main() -> None:
        for call, reason in ((ask(), whole), (ask(stream=True), stream)):
            if reason is None:
                continue
            transport = SimulatedTransport(time_scale=0.0, faults={fault: 1.0})
            served = Served(name="m", upstream_model="simulated-small", prices=PRICES)
            settings = msgspec.structs.replace(
                simulated_settings(), models=(served,), timeouts=Timeouts(total=0.1)
            )
            error = await failing(Upstream(settings, transport, env={}), call)
            assert error.reason == reason
            assert transport.open == 0

    run(main())


def test_a_usage_that_cannot_be_true_is_none_and_half_of_requests_may_fail() -> None:
    async def main() -> None:
        lies: tuple[Fault, ...] = ("wrong-usage", "no-usage")
        for fault in lies:
            upstream, _ = simulated(fault=fault)
            for call in (ask(), ask(stream=True)):
                answer = await upstream.ask(call, "simulated-small", STAMP)
                async for _ in answer:
                    pass
                assert (answer.finished, answer.usage) == (True, None)
        transport = SimulatedTransport(time_scale=0.0, faults={"500": 0.25, "dead": 0.25})
        policy = BreakerPolicy(in_row=1000, share=1.0, window=1000)
        upstream = Upstream(msgspec.structs.replace(simulated_settings(), breaker=policy), transport, env={})
        reasons = []
        for _ in range(400):
            try:
                await upstream.ask(ask(), "simulated-small", STAMP)
            except Failure as failure:
                reasons.append(failure.reason)
        assert 70 < reasons.count("server error") < 130
        assert 70 < reasons.count("unreachable") < 130

    run(main())


def test_an_endless_stream_stops_when_the_client_goes() -> None:
    async def main() -> None:
        upstream, transport = simulated(fault="endless")
        answer = await upstream.ask(ask(stream=True), "simulated-small", STAMP)
        async with aclosing(aiter(answer)) as parts:
            count = 0
            async for _ in parts:
                count += 1
                if count > 1000:
                    break
        assert answer.stream is not None
        assert answer.stream.characters > 1000
        await answer.aclose()  # again: nothing is given back twice
        assert transport.open == 0
        assert upstream.health()[0].in_flight == 0
        assert not answer.finished

    run(main())


def test_simulated_answers_take_their_time() -> None:
    async def main() -> None:
        upstream, _ = simulated(time_scale=0.1)
        loop = asyncio.get_running_loop()
        begun = loop.time()
        answer = await upstream.ask(ask(max_tokens=50), "simulated-medium", STAMP)
        assert answer.usage is not None
        took = loop.time() - begun
        assert took >= 0.1 * 0.010 * answer.usage.completion
        begun = loop.time()
        answer = await upstream.ask(ask(stream=True, max_tokens=50), "simulated-medium", STAMP)
        async for _ in answer:
            if answer.stream is not None and answer.stream.pieces == 1:
                first = loop.time() - begun
        assert answer.usage is not None
        assert loop.time() - begun - first >= 0.1 * 0.010 * (answer.usage.output - 1)

    run(main())
