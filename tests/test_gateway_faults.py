"""What goes wrong inside and behind the service: bugs, full disks, bad upstreams, clients that leave, budgets under load."""

from __future__ import annotations

import asyncio
import json
import random
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest

from inprocess import CHAT, Live, live, request
from walras.gateway.dialects import Stream, read_call
from walras.gateway.metering import STEP
from walras.gateway.protocol import sweep
from walras.gateway.simulated import SimulatedTransport
from walras.gateway.wire import Stamp, Usage, sse
from walras.ledger import Hold
from walras.ledger.store import open_store
from walras.ledger.writer import State, Unwritable
from walras.settings import Economy

MESSAGES = {"model": "simulated-small", "max_tokens": 40, "messages": CHAT["messages"]}
RESPONSES = {"model": "simulated-small", "max_output_tokens": 40, "input": "hello there"}
DIALECTS = {
    "/v1/chat/completions": CHAT | {"max_tokens": 40},
    "/v1/messages": MESSAGES,
    "/v1/responses": RESPONSES,
}
Test = Callable[[Live], Awaitable[None]]


def run(
    folder: Path,
    test: Test,
    transport: SimulatedTransport | None = None,
    economy: Economy | None = None,
) -> None:
    async def whole() -> None:
        async with live(folder, transport, economy) as service:
            await test(service)

    asyncio.run(whole())


# --- bugs -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "place",
    [
        "board.decide", "board.expected", "board.came_back", "meter.tokens", "meter.open", "meter.learn_tokens",
        "store.hold", "store.close", "metrics.observe", "escrow.settle",
    ],
)  # fmt: skip
def test_a_bug_leaves_no_money_behind(place: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    async def test(service: Live) -> None:
        owner, name = place.split(".")
        target = type(getattr(service.calls, owner))
        shapes = []
        times = [0]
        sound = getattr(target, name)

        def broken(*args: Any, **kwargs: Any) -> Any:
            times[0] += 1
            if times[0] == 1:
                raise ZeroDivisionError("said wl-secret")
            return sound(*args, **kwargs)

        for path, body in DIALECTS.items():
            for stream in (False, True):
                times[0] = 0
                await until(lambda: service.calls.books.problem is None)
                with patch.object(target, name, broken):
                    got = await service.ask(path, body | {"stream": stream})
                assert times[0], "never reached"
                if not stream:
                    assert got.status == 500
                    shapes.append("type" in got.json() and got.json()["type"] == "error")
                assert b"wl-secret" not in got.body
                assert got.status == 500 or (b"error" in got.body and b"internal" in got.body + b"internal")
        assert shapes == [False, True, False]
        await until(lambda: service.calls.books.problem is None)
        entries = service.audit()
        entered = place in ("store.close", "escrow.settle")  # by then the entry was made
        assert {e.status for e in entries} == {"ok" if entered else "error"}
        assert len(entries) == 6

    run(tmp_path, test)
    assert "ZeroDivisionError" in caplog.text
    assert "wl-secret" not in caplog.text


# --- a ledger that cannot be written ----------------------------------------------------------------------------------------


@contextmanager
def full_disk(service: Live) -> Iterator[None]:
    """Writing fails as on a full disk until the block ends."""
    backend: Any = service.service.store._writer._backend  # type: ignore[attr-defined]
    why = Unwritable(State("disk full", "/secret/path: the disk is full"))
    with (
        patch.object(type(backend), "write", side_effect=why),
        patch.object(type(backend), "probe", side_effect=why),
    ):
        yield


def no_journal() -> Any:
    """Each record waits for its commit, as it does in PostgreSQL."""
    return patch("walras.gateway.serve.open_store", lambda url, durable: open_store(url))


async def until(true: Callable[[], bool], within_s: float = 5.0) -> None:
    async with asyncio.timeout(within_s):
        while not true():
            await asyncio.sleep(0.01)


def test_nothing_is_spent_that_cannot_be_written(tmp_path: Path) -> None:
    transport = SimulatedTransport(time_scale=0.0)

    async def test(service: Live) -> None:
        with full_disk(service):
            assert (
                await service.ask("/v1/chat/completions", CHAT)
            ).status == 200  # in the journal; then it shows
            await until(lambda: service.calls.books.problem is not None)
            before = transport.requests
            for path, body in DIALECTS.items():
                got = await service.ask(path, body)
                assert got.status == 503
                assert got.headers["retry-after"] == "1"
                assert b"/secret/path" not in got.body
            assert transport.requests == before
            ready = await service.ask("/readyz")
            assert ready.status == 503
            assert ready.json() == {"ready": False, "problem": "the ledger cannot be written: disk full"}
            assert (await service.ask("/healthz")).status == 200
        await until(lambda: service.calls.books.problem is None)
        assert (await service.ask("/v1/chat/completions", CHAT)).status == 200
        await until(lambda: service.calls.books.problem is None)
        assert {e.charged_nano for e in service.audit() if e.status != "ok"} <= {0}

    run(tmp_path, test, transport)


@pytest.mark.parametrize("stream", [False, True])
def test_a_full_disk_keeps_nothing_from_a_client_that_is_in_the_journal(stream: bool, tmp_path: Path) -> None:
    """The disk fills while the upstream answers: what is in the journal is safe, and the next call is refused."""

    async def test(service: Live) -> None:
        asking = asyncio.create_task(
            service.ask("/v1/chat/completions", CHAT | {"stream": stream, "max_tokens": 40})
        )
        await until(lambda: len(service.service.store.open_holds()) == 1)
        with full_disk(service):
            got = await asking
            assert got.status == 200
            assert not stream or b"[DONE]" in got.body
            await until(lambda: service.calls.books.problem is not None)
            assert service.entries() == []
            assert (await service.ask("/v1/chat/completions", CHAT)).status == 503
        await until(lambda: len(service.entries()) == 1)
        assert service.audit()[0].charged_nano > 0

    run(tmp_path, test, SimulatedTransport(time_scale=0.5))


@pytest.mark.parametrize("stream", [False, True])
def test_an_entry_is_kept_until_the_disk_has_room(stream: bool, tmp_path: Path) -> None:
    """Without a journal: the client learns it, and the entry is written later."""

    async def test(service: Live) -> None:
        asking = asyncio.create_task(
            service.ask("/v1/chat/completions", CHAT | {"stream": stream, "max_tokens": 40})
        )
        await until(lambda: len(service.service.store.open_holds()) == 1)
        with full_disk(service):
            got = await asking
            if stream and got.status == 200:
                assert b'"code":"unavailable"' in got.body
                assert b"[DONE]" not in got.body
            else:
                assert got.status == 503
            assert service.entries() == []
            assert (await service.ask("/v1/chat/completions", CHAT)).status == 503
        await until(lambda: len(service.entries()) == 1)
        entry = service.audit()[0]
        assert entry.charged_nano > 0

    with no_journal():
        run(tmp_path, test, SimulatedTransport(time_scale=0.5))


@pytest.mark.parametrize("stream", [False, True])
def test_a_hold_that_was_written_though_nobody_could_say_so_is_closed(stream: bool, tmp_path: Path) -> None:
    """A server that dies as it commits leaves open whether it did."""

    async def test(service: Live) -> None:
        backend: Any = service.service.store._writer._backend  # type: ignore[attr-defined]
        write, lost = type(backend).write, []

        def lose(self: Any, records: Any) -> Any:
            done = write(self, records)
            if not lost and any(isinstance(record, Hold) for record in records):
                lost.extend(records)
                raise Unwritable(State("unreachable", "the server does not answer"))
            return done

        with patch.object(type(backend), "write", lose):
            got = await service.ask("/v1/chat/completions", CHAT | {"stream": stream})
            assert got.status == 503
            assert lost
            await until(lambda: service.calls.books.problem is None)
        assert (await service.ask("/v1/chat/completions", CHAT)).status == 200
        first, second = service.audit()
        assert (first.status, first.settled, first.charged_nano) == ("error", "none", 0)
        assert first.reserved_nano > 0
        assert second.status == "ok"

    with no_journal():
        run(tmp_path, test)


# --- clients that leave -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("after_s", [0.0, 0.001, 0.003, 0.01, 0.05, 0.3])
@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_leaves_ends_its_call(stream: bool, after_s: float, tmp_path: Path) -> None:
    transport = SimulatedTransport(time_scale=1.0)

    async def test(service: Live) -> None:
        body = json.dumps(CHAT | {"stream": stream}).encode()
        for _ in range(8):
            reader, writer = await asyncio.open_connection("127.0.0.1", service.port)
            writer.write(request("/v1/chat/completions", body, service.key))
            await asyncio.sleep(after_s)
            with suppress(ConnectionError):
                writer.transport.abort()
            del reader
        await until(lambda: service.calls.open == 0 and transport.open == 0)
        await service.calls.ended()
        entries = service.audit()
        assert all(e.status == "cut" for e in entries)
        if after_s >= 0.05:
            assert {e.settled for e in entries} == {"cap"}
            assert all(e.charged_nano == e.reserved_nano > 0 for e in entries)

    run(tmp_path, test, transport)


def test_a_client_that_leaves_disturbs_no_other(tmp_path: Path) -> None:
    """Requests one after the other on one connection, while others are cut off."""

    async def test(service: Live) -> None:
        async def leaver() -> None:
            body = json.dumps(CHAT | {"stream": True}).encode()
            for _ in range(20):
                _, writer = await asyncio.open_connection("127.0.0.1", service.port)
                writer.write(request("/v1/chat/completions", body, service.key))
                await asyncio.sleep(random.Random(0).uniform(0, 0.02))
                writer.transport.abort()

        async def stayer() -> list[int]:
            body = json.dumps(CHAT | {"max_tokens": 5}).encode()
            sent = request("/v1/chat/completions", body, service.key).replace(b"connection: close\r\n", b"")
            reader, writer = await asyncio.open_connection("127.0.0.1", service.port)
            statuses = []
            for _ in range(20):
                writer.write(sent)
                head = await reader.readuntil(b"\r\n\r\n")
                statuses.append(int(head.split()[1]))
                lengths = [line for line in head.lower().split(b"\r\n") if line.startswith(b"content-length")]
                await reader.readexactly(int(lengths[0].split(b":")[1]))
            writer.close()
            return statuses

        _, first, second = await asyncio.gather(leaver(), stayer(), stayer())
        assert first == second == [200] * 20
        await until(lambda: service.calls.open == 0)
        await service.calls.ended()
        statuses = [e.status for e in service.audit()]
        assert statuses.count("ok") >= 40  # one who leaves may have been answered before it showed
        assert set(statuses) <= {"ok", "cut"}

    run(tmp_path, test, SimulatedTransport(time_scale=0.02))


@pytest.mark.parametrize(("after_s", "status", "asked"), [(0.15, "cut", 0), (0.45, "ok", 1)])
def test_a_client_that_leaves_while_the_ledger_writes(
    after_s: float, status: str, asked: int, tmp_path: Path
) -> None:
    """During the hold nothing was asked yet, and nothing is; during the entry it stays as it is."""
    transport = SimulatedTransport(time_scale=0.0)

    async def test(service: Live) -> None:
        store = type(service.service.store)
        sound = store.written

        async def slow(self: Any, ticket: Any) -> None:
            await asyncio.sleep(0.3)
            await sound(self, ticket)

        with patch.object(store, "written", slow):
            _, writer = await asyncio.open_connection("127.0.0.1", service.port)
            writer.write(request("/v1/chat/completions", json.dumps(CHAT).encode(), service.key))
            await asyncio.sleep(after_s)
            writer.transport.abort()
            await until(lambda: service.calls.open == 0)
            await service.calls.ended()
        await until(lambda: len(service.entries()) == 1)
        assert [e.status for e in service.audit()] == [status]
        assert transport.requests == asked

    with no_journal():
        run(tmp_path, test, transport)


# --- clients that are slow ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "dripped",
    [b"", b"GET /healthz HTTP/1.1\r\nx: ", b"\r\n", b"POST / HTTP/1.1\r\ncontent-length: 99999\r\n\r\n"],
)
def test_a_client_that_drips_is_let_go(dripped: bytes, tmp_path: Path) -> None:
    """Slow-loris: in silence, in the head, between requests, in the body."""

    async def test(service: Live) -> None:
        sweeping = asyncio.create_task(sweep(service.server.server_state.connections))
        reader, writer = await asyncio.open_connection("127.0.0.1", service.port)
        if dripped == b"\r\n":
            writer.write(b"GET /healthz HTTP/1.1\r\nhost: a\r\n\r\n")
            await reader.readuntil(b'"ok"}')
        loop = asyncio.get_running_loop()
        began = loop.time()
        writer.write(dripped)
        with suppress(ConnectionError):
            while loop.time() - began < 3:
                if dripped and dripped != b"\r\n":
                    writer.write(b"a")
                try:
                    async with asyncio.timeout(0.05):
                        if not await reader.read(100):
                            break
                except TimeoutError:
                    continue
        assert loop.time() - began < 2
        writer.close()
        sweeping.cancel()
        assert (await service.ask("/healthz")).status == 200

    with patch.multiple("walras.gateway.protocol", HEAD_S=0.3, BODY_S=0.3, SWEEP_S=0.05):
        run(tmp_path, test)


def test_a_client_that_does_not_read_is_let_go(tmp_path: Path) -> None:
    async def test(service: Live) -> None:
        sweeping = asyncio.create_task(sweep(service.server.server_state.connections))
        body = json.dumps(CHAT | {"stream": True, "max_tokens": 100_000}).encode()
        _, writer = await asyncio.open_connection("127.0.0.1", service.port, limit=1024)
        writer.write(request("/v1/chat/completions", body, service.key))
        await until(lambda: service.calls.open == 1)
        await until(lambda: service.calls.open == 0, 10)
        await service.calls.ended()
        assert [e.status for e in service.audit()] == ["cut"]
        sweeping.cancel()
        writer.transport.abort()

    endless = SimulatedTransport(time_scale=0.0, faults={"endless": 1.0})
    with patch("walras.gateway.protocol.WRITE_S", 0.3), patch("walras.gateway.protocol.SWEEP_S", 0.05):
        run(tmp_path, test, endless)


# --- clocks that jump -----------------------------------------------------------------------------------------------------------


def test_a_clock_that_jumps_gives_no_money_twice(tmp_path: Path) -> None:
    day = 86_400 * 10**9
    now = [1_800_000_000 * 10**9]

    async def test(service: Live) -> None:
        service.service.gateway.board.clock = lambda: now[0]
        key = service.make_key(budget_usd=0.0002, period="day")
        body = CHAT | {"max_tokens": 200}
        for jump in (0, 1, 0, -1, 1, 0, 40, -40, 0):
            now[0] = (1_800_000_000 + jump * 86_400) * 10**9
            statuses = [
                (await service.ask("/v1/chat/completions", body, key=key.secret)).status for _ in range(9)
            ]
            assert statuses[-1] == 429
            assert set(statuses) <= {200, 429}
        entries = service.audit()
        days = {e.at_ns // day for e in entries}
        for at in days:
            assert sum(e.charged_nano for e in entries if e.at_ns // day == at) <= 200_000
        assert len({e.request_id for e in entries}) == len(entries)

    run(tmp_path, test)


# --- streams that are cut -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("budget_usd", "cap"), [(0.0004, 4000), (1.0, 200)])
@pytest.mark.parametrize("path", DIALECTS)
def test_a_stream_without_end_ends_as_if_its_cap_were_reached(
    path: str, budget_usd: float, cap: int, tmp_path: Path
) -> None:
    """The upstream ignores its cap: the first has no money left after 1,000 tokens, the second runs away."""

    async def test(service: Live) -> None:
        key = service.make_key(budget_usd=budget_usd)
        longer = {k: cap for k in ("max_tokens", "max_output_tokens") if k in DIALECTS[path]}
        body = DIALECTS[path] | {"stream": True} | longer
        found = [await service.ask(path, body, key=key.secret) for _ in range(2)]
        entries = {e.request_id: e for e in service.audit()}
        cut = [got.body for got in found if entries[got.headers["x-request-id"]].status == "cut"]
        assert cut
        if budget_usd < 1:
            assert found[1].status == 429
            assert found[1].json()["error"]["type"] == "rate_limit_error"
            assert found[1].headers["x-should-retry"] == "false"
        for told in cut:
            match path:
                case "/v1/chat/completions":
                    assert told.endswith(b"data: [DONE]\n\n")
                    assert b'"finish_reason":"length"' in told
                case "/v1/messages":
                    assert told.count(b'"type":"message_start"') == told.count(b'"type":"message_stop"') == 1
                    assert b'"stop_reason":"max_tokens"' in told
                case _:
                    assert b'"status":"incomplete"' in told
                    assert told.count(b"event: response.created") == 1
        assert sum(e.charged_nano for e in entries.values()) <= budget_usd * 1e9 + STEP * 400

    run(tmp_path, test, SimulatedTransport(time_scale=0.0, faults={"endless": 1.0}))


def test_a_message_passed_through_is_ended_where_it_was() -> None:
    """Provider and client speak alike: the events of the cut go on where the provider's own ended."""
    call = read_call("messages", json.dumps(MESSAGES | {"stream": True}).encode())
    start = {
        "id": "m",
        "type": "message",
        "role": "assistant",
        "content": [],
        "usage": {"input_tokens": 3, "output_tokens": 1},
    }
    said = [
        {"type": "message_start", "message": start},
        {"type": "content_block_start", "index": 0, "content_block": {"type": "text", "text": ""}},
        {"type": "content_block_delta", "index": 0, "delta": {"type": "text_delta", "text": "so"}},
    ]
    for many in (1, 2, 3):
        stream = Stream(call, "messages", Stamp("x", 0, "m"))
        told = b"".join(stream.feed(sse(event, str(event["type"]))) for event in said[:many])
        told += stream.cut(Usage(3, output=1))
        kinds = [json.loads(line[5:])["type"] for line in told.split(b"\n") if line.startswith(b"data:")]
        closed = ["content_block_stop"] if many > 1 else []
        assert kinds == [e["type"] for e in said[:many]] + closed + ["message_delta", "message_stop"]


# --- bad upstreams --------------------------------------------------------------------------------------------------------------

CHUNK = b'data: {"id":"c","object":"chat.completion.chunk","created":1,"model":"m","choices":[{"index":0,"delta":{"content":"word "},"finish_reason":null}]}\n\n'
WHOLE = {
    "id": "c", "object": "chat.completion", "created": 1, "model": "m",
    "choices": [{"index": 0, "message": {"role": "assistant", "content": "word " * 20}, "finish_reason": "stop"}],
}  # fmt: skip
ENDED = CHUNK.replace(b'"finish_reason":null', b'"finish_reason":"stop"') + b"data: [DONE]\n\n"


def answer(
    status: int, body: bytes = b'{"error":{"message":"no"}}', kind: str = "application/json", **headers: str
) -> bytes:
    lines = [f"HTTP/1.1 {status} X", f"content-type: {kind}", f"content-length: {len(body)}"]
    lines += [f"{name.replace('_', '-')}: {value}" for name, value in headers.items()]
    return "\r\n".join([*lines, "", ""]).encode() + body


def usage(prompt: int, completion: int) -> dict[str, Any]:
    return {
        "usage": {
            "prompt_tokens": prompt,
            "completion_tokens": completion,
            "total_tokens": prompt + completion,
        }
    }


EVENTS = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\nconnection: close\r\n\r\n"
BAD: dict[str, tuple[bytes | None, bytes | None, set[int]]] = {
    # what it sends for a whole answer, for a stream (None: nothing, for ever), and what a client that named it may see
    "dead": (b"", b"", {502}),
    "slow": (None, None, {504}),
    "bad json": (answer(200, b'{"choices": [{'), EVENTS + b'data: {"choices": [{\n\n', {502}),
    "a web page": (answer(200, b"<html>", "text/html"), answer(200, b"<html>", "text/html"), {502}),
    "no usage": (answer(200, json.dumps(WHOLE).encode()), EVENTS + CHUNK * 5 + ENDED, {200}),
    "negative usage": (answer(200, json.dumps(WHOLE | usage(-5, 10)).encode()), EVENTS + CHUNK + ENDED, {200}),
    "absurd usage": (answer(200, json.dumps(WHOLE | usage(10, 10**12)).encode()), EVENTS + CHUNK + ENDED, {200}),
    "empty answer": (answer(200, b""), EVENTS, {502}),
    "empty stream": (answer(200, b"{}"), EVENTS + b"data: [DONE]\n\n", {200, 502}),
    "cut": (answer(200, json.dumps(WHOLE).encode())[:-50], EVENTS + CHUNK * 3, {200, 502}),
    "cut head": (b"HTTP/1.1 200 OK\r\ncontent-ty", b"HTTP/1.1 200 OK\r\ncontent-ty", {502}),
    "no http": (b"\x00\x01\x02" * 50, b"\x00\x01\x02" * 50, {502}),
    "429": (answer(429, retry_after="7"), answer(429, retry_after="7"), {429}),
    "401": (answer(401), answer(401), {502}),
    "404": (answer(404), answer(404), {502}),
    "400": (answer(400), answer(400), {400}),
    "500": (answer(500), answer(500), {502}),
    "502": (answer(502, b"<html>"), answer(502, b"<html>"), {502}),
    "529": (answer(529), answer(529), {502}),
    "302": (answer(302, b"", location="http://127.0.0.1:1/"), answer(302, b""), {502}),
    "huge head": (b"HTTP/1.1 200 OK\r\nx: " + b"a" * 300_000, b"HTTP/1.1 200 OK\r\nx: " + b"a" * 300_000, {502}),
    "an error inside": (answer(200, b'{"error":{"message":"no"}}'), EVENTS + CHUNK + b'data: {"error":{"message":"no"}}\n\n', {200, 502}),
}  # fmt: skip


@pytest.fixture(scope="module")
def faults_tried() -> Iterator[list[str]]:
    """A table of what was tried, shown at the end with -s."""
    lines: list[str] = []
    yield lines
    print("\n".join(["", f"{'upstream':18}{'asked':8}{'named, auto':14}lost", *lines]))  # noqa: T201


@pytest.mark.parametrize("fault", BAD)
def test_a_bad_upstream_loses_no_request(fault: str, tmp_path: Path, faults_tried: list[str]) -> None:
    whole, events, statuses = BAD[fault]

    async def peer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with suppress(ConnectionError, asyncio.IncompleteReadError):
            head = await reader.readuntil(b"\r\n\r\n")
            length = int(head.lower().partition(b"content-length:")[2].split(b"\r\n")[0])
            sent = (
                events if b'"stream":true' in (await reader.readexactly(length)).replace(b" ", b"") else whole
            )
            if sent is None:
                await reader.read()
            else:
                writer.write(sent)
                await writer.drain()
        writer.close()

    async def test() -> None:
        server = await asyncio.start_server(peer, "127.0.0.1", 0)
        port = server.sockets[0].getsockname()[1]
        upstreams = {
            "bad": {"base_url": f"http://127.0.0.1:{port}/v1", "first_byte_s": 0.2, "connect_s": 0.2},
            "good": {"kind": "simulated"},
        }
        prices = {"input_usd": 0.1, "output_usd": 0.4, "output_tokens": 50.0}
        models = {
            "worse": {"upstream": "bad", "quality": 0.9, **prices},
            "simulated-small": {"upstream": "good", "quality": 0.5, **prices},
        }
        economy = Economy.model_validate({"value": 1.0, "models": models, "upstreams": upstreams})
        async with live(tmp_path, economy=economy) as service, server:
            for stream in (False, True):
                body = CHAT | {"stream": stream, "max_tokens": 60}
                for route in [r for u in service.calls.upstreams.values() for r in u._routes]:
                    route.breaker._until = None  # each is tried afresh
                auto = await service.ask("/v1/chat/completions", body | {"model": "auto"})
                for route in [r for u in service.calls.upstreams.values() for r in u._routes]:
                    route.breaker._until = None
                named = await service.ask("/v1/chat/completions", body | {"model": "worse"})
                assert named.status in statuses, named.body
                assert auto.status == (400 if fault == "400" else 200), auto.body
                if named.status != 200:
                    assert named.json()["error"]["message"]
                    assert str(port) not in named.body.decode()
                if fault == "429":
                    assert named.headers["retry-after"] == "7"
                faults_tried.append(
                    f"{fault:18}{'stream' if stream else 'whole':8}{named.status}, {auto.status:<8} 0"
                )
            await service.calls.ended()
            entries = service.audit()
            assert len(entries) == 4
            assert all(e.charged_nano <= 2 * max(e.reserved_nano, 1) for e in entries)

    asyncio.run(test())


# --- budgets ----------------------------------------------------------------------------------------------------------------------


def test_256_streams_cannot_overspend(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Heavy-tailed lengths, upstream 500s and cuts, clients that leave at random, until the money is gone."""
    budget_usd = 0.025
    step = STEP * 400
    worst = [0]

    async def test(service: Live) -> None:
        key = service.make_key("acme", budget_usd=budget_usd)
        account, now = key.key.accounts[0], service.service.gateway.board.clock
        rng = random.Random(7)
        done = asyncio.Event()
        body = json.dumps(CHAT | {"stream": True}).encode()

        async def watch() -> None:
            while not done.is_set():
                standing = await service.calls.escrow.standing(account, now())
                worst[0] = max(worst[0], standing.spent_nano + standing.reserved_nano)
                await asyncio.sleep(0.002)

        async def client() -> None:
            refused = 0
            while refused < 2:
                if rng.random() < 0.1:
                    _, writer = await asyncio.open_connection("127.0.0.1", service.port)
                    writer.write(request("/v1/chat/completions", body, key.secret))
                    await asyncio.sleep(rng.expovariate(20))
                    writer.transport.abort()
                    continue
                got = await service.ask("/v1/chat/completions", json.loads(body), key=key.secret)
                refused += got.status == 429
                assert got.status in (200, 429, 502, 503), got
                if got.status == 503:
                    await asyncio.sleep(0.05)

        watching = asyncio.create_task(watch())
        await asyncio.gather(*(client() for _ in range(256)))
        await until(lambda: service.calls.open == 0)
        await service.calls.ended()
        done.set()
        await watching
        entries = service.audit()
        spent = sum(e.charged_nano for e in entries)
        budget = round(budget_usd * 1e9)
        ways = {s: sum(e.status == s for e in entries) for s in ("ok", "cut", "error", "refused")}
        with capsys.disabled():
            print(f"\n{len(entries)} requests {ways}: spent {spent / budget:.4%} of the budget, at most "  # noqa: T201
                  f"{worst[0] / budget:.4%} spent or reserved; one step is {step / budget:.4%}")  # fmt: skip
        standing = await service.calls.escrow.standing(account, now())
        assert standing.spent_nano == spent
        assert worst[0] <= budget + step
        assert spent <= budget + step
        assert spent >= 0.95 * budget

    transport = SimulatedTransport(seed=11, time_scale=0.05, faults={"500": 0.05, "cut": 0.02})
    run(tmp_path, test, transport)
