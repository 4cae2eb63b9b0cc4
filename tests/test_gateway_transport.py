"""The HTTP client over real sockets: reuse, framings, limits, time, back-pressure, cancellation and TLS."""

from __future__ import annotations

import asyncio
import shutil
import socket
import ssl
import subprocess
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
import uvloop

from responder import Peer, Script, serve
from walras.errors import SettingsError
from walras.gateway.transport import (
    HIGH_WATER,
    Cut,
    Endpoint,
    Garbled,
    HttpTransport,
    Limits,
    Request,
    TimedOut,
    Timeouts,
    TooLarge,
    TransportError,
    Unreachable,
    read_body,
)

SECRET = "sk-very-secret"
OK = b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nok"
LOOPS = [pytest.param(asyncio.new_event_loop, id="asyncio"), pytest.param(uvloop.new_event_loop, id="uvloop")]

Loop = Callable[[], asyncio.AbstractEventLoop]


@asynccontextmanager
async def client(
    limits: Limits | None = None, tls: ssl.SSLContext | None = None
) -> AsyncIterator[HttpTransport]:
    transport = HttpTransport(limits, tls)
    try:
        yield transport
    finally:
        await transport.aclose()
        assert transport.connections() == (0, 0)


def run(main: Coroutine[Any, Any, None], loop: Loop = uvloop.new_event_loop) -> None:
    with asyncio.Runner(loop_factory=loop) as runner:
        runner.run(asyncio.wait_for(main, 10))


def request(url: str, body: bytes = b"{}", *, resend: bool = False, **seconds: float) -> Request:
    endpoint = Endpoint.of("POST", url, [("authorization", f"Bearer {SECRET}")])
    extra = (("x-extra", "1"), ("x-broken", "a\r\nx-smuggled: 1"))
    return Request(endpoint, body, Timeouts(**seconds), extra, resend)


def scripted(*pieces: bytes | float, close: bool = False) -> Script:
    """Writes pieces in order; a number waits that long."""

    async def script(peer: Peer, body: bytes) -> None:
        for piece in pieces:
            if isinstance(piece, float):
                await asyncio.sleep(piece)
            else:
                peer.socket.write(piece)
        if close:
            peer.socket.close()

    return script


async def failing(transport: HttpTransport, what: Request) -> TransportError:
    """The error of an exchange, wherever it comes; it must not hold the key."""
    with pytest.raises(TransportError) as caught:
        await read_body(await transport.send(what))
    chain: BaseException | None = caught.value
    while chain is not None:
        assert SECRET not in f"{chain} {chain!r} {vars(chain)}"
        chain = chain.__cause__ or chain.__context__
    return caught.value


@pytest.mark.parametrize("loop", LOOPS)
def test_keep_alive_uses_one_connection_again(loop: Loop) -> None:
    async def main() -> None:
        async with serve(OK) as server, client() as transport:
            for _ in range(5):
                response = await transport.send(request(server.url))
                assert (response.status, await read_body(response)) == (200, b"ok")
                assert response.headers == {"content-length": "2"}
            assert len(server.peers) == 1
            assert transport.connections() == (1, 1)
            head = server.peers[0].headers
            assert head[b"authorization"] == f"Bearer {SECRET}".encode()
            assert head[b"content-length"] == b"2"
            assert head[b"accept-encoding"] == b"identity"
            assert head[b"x-extra"] == b"1"
            assert not {b"x-broken", b"x-smuggled"} & head.keys()

    run(main(), loop)


@pytest.mark.parametrize("loop", LOOPS)
def test_bodies_arrive_whole_in_every_framing(loop: Loop) -> None:
    chunked = b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n"
    pieces = [b"5\r\nhello\r\n", b"6\r\n wor", b"ld\r\n0\r\n", b"x-trailer: 1\r\n\r\n"]
    cases: list[tuple[Script, int]] = [
        (scripted(chunked, *pieces), 1),
        (scripted(b"HTTP/1.1 200 OK\r\ncontent-length: 11\r\n\r\nhello", 0.01, b" world"), 1),
        (scripted(b"HTTP/1.1 200 OK\r\n\r\nhello", 0.01, b" world", close=True), 0),
        (scripted(b"HTTP/1.0 200 OK\r\ncontent-length: 11\r\n\r\nhello world"), 0),
        (scripted(b"HTTP/1.1 200 OK\r\nconnection: close\r\ncontent-length: 11\r\n\r\nhello world"), 0),
        (
            scripted(
                b"HTTP/1.1 100 Continue\r\n\r\n", b"HTTP/1.1 200 OK\r\ncontent-length: 11\r\n\r\nhello world"
            ),
            1,
        ),
    ]

    async def main() -> None:
        for script, kept in cases:
            async with serve(script) as server, client() as transport:
                response = await transport.send(request(server.url))
                assert await read_body(response) == b"hello world"
                assert transport.connections() == (kept, kept)

    run(main(), loop)


def test_chunks_are_handed_over_as_they_come() -> None:
    async def main() -> None:
        go = asyncio.Event()

        async def script(peer: Peer, body: bytes) -> None:
            peer.socket.write(b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n3\r\none\r\n")
            await go.wait()
            peer.socket.write(b"3\r\ntwo\r\n0\r\n\r\n")

        async with serve(script) as server, client() as transport:
            response = await transport.send(request(server.url))
            got = []
            async for chunk in response:
                got.append(chunk)
                go.set()  # the second chunk is only sent once the first has been read
            assert got == [b"one", b"two"]

    run(main())


def test_an_answer_without_body_and_repeated_headers() -> None:
    async def main() -> None:
        head = b"HTTP/1.1 204 No Content\r\nX-A: 1\r\nx-a: 2\r\n\r\n"
        async with serve(head) as server, client() as transport:
            response = await transport.send(request(server.url))
            assert (response.status, response.headers, await read_body(response)) == (
                204,
                {"x-a": "1, 2"},
                b"",
            )
            assert transport.connections() == (1, 1)

    run(main())


@pytest.mark.parametrize("loop", LOOPS)
@pytest.mark.parametrize(
    "answer",
    [
        b"",
        b"HTTP/1.1 200 OK\r\ncontent-le",
        b"HTTP/1.1 200 OK\r\ncontent-length: 9\r\n\r\nhalf",
        b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n4\r\nhalf\r\n",
    ],
)
def test_an_early_close_is_cut_and_not_sent_again(loop: Loop, answer: bytes) -> None:
    async def main() -> None:
        async with serve(scripted(answer, close=True)) as server, client() as transport:
            error = await failing(transport, request(server.url, resend=True))
            assert isinstance(error, Cut)
            assert error.sent
            assert not error.stale
            assert len(server.peers) == 1
            assert transport.connections() == (0, 0)

    run(main(), loop)


@pytest.mark.parametrize("loop", LOOPS)
@pytest.mark.parametrize("resend", [True, False])
def test_only_a_request_that_may_be_is_sent_again_on_a_stale_connection(loop: Loop, resend: bool) -> None:
    """The second request on a connection finds it closed, which the client cannot know before it writes."""

    async def main() -> None:
        bodies: list[bytes] = []

        async def script(peer: Peer, body: bytes) -> None:
            bodies.append(body)
            if bodies.count(b"second") == 1:
                peer.socket.abort()
            else:
                peer.socket.write(OK)

        async with serve(script) as server, client() as transport:
            await read_body(await transport.send(request(server.url, b"first")))
            if resend:
                response = await transport.send(request(server.url, b"second", resend=True))
                assert await read_body(response) == b"ok"
                assert (bodies.count(b"second"), len(server.peers)) == (2, 2)
            else:
                error = await failing(transport, request(server.url, b"second"))
                assert isinstance(error, Cut)
                assert error.stale
                assert not error.sent
                assert bodies.count(b"second") == 1

    run(main(), loop)


@pytest.mark.parametrize("pause", [0.0, 0.1])
def test_a_reused_connection_that_began_to_answer_or_took_its_time_is_not_stale(pause: float) -> None:
    async def main() -> None:
        async def script(peer: Peer, body: bytes) -> None:
            if body == b"second":
                await asyncio.sleep(pause)
                peer.socket.write(b"" if pause else b"HTTP/1.1 2")
                peer.socket.close()
            else:
                peer.socket.write(OK)

        async with serve(script) as server, client() as transport:
            await read_body(await transport.send(request(server.url, b"first")))
            error = await failing(transport, request(server.url, b"second", resend=True))
            assert isinstance(error, Cut)
            assert error.sent
            assert len(server.peers) == 1

    run(main())


def test_idle_connections_close_in_time_and_beyond_their_number() -> None:
    async def main() -> None:
        limits = Limits(idle=2, idle_s=0.05)
        async with serve(scripted(0.01, OK)) as server, client(limits) as transport:
            sent = [transport.send(request(server.url)) for _ in range(4)]
            for response in await asyncio.gather(*sent):
                await read_body(response)
            assert transport.connections() == (2, 2)
            await asyncio.sleep(0.12)
            assert transport.connections() == (0, 0)
            await asyncio.gather(*(peer.lost for peer in server.peers))

    run(main())


def test_a_connection_the_provider_closed_while_idle_is_not_used() -> None:
    async def main() -> None:
        async with serve(OK) as server, client() as transport:
            await read_body(await transport.send(request(server.url)))
            server.peers[0].socket.close()
            await asyncio.sleep(0.05)
            assert transport.connections() == (0, 0)
            assert await read_body(await transport.send(request(server.url))) == b"ok"

    run(main())


def test_more_requests_than_connections_wait_in_line() -> None:
    async def main() -> None:
        async with serve(scripted(0.005, OK)) as server, client(Limits(connections=3)) as transport:

            async def one() -> bytes:
                return await read_body(await transport.send(request(server.url)))

            assert await asyncio.gather(*(one() for _ in range(30))) == [b"ok"] * 30
            assert len(server.peers) == 3
        async with serve(scripted(0.5, OK)) as server, client(Limits(connections=1)) as transport:
            holder = asyncio.create_task(transport.send(request(server.url)))
            await asyncio.sleep(0.05)
            error = await failing(transport, request(server.url, connect=0.05))
            assert isinstance(error, TimedOut)
            assert (error.stage, error.sent) == ("pool", False)
            # Whoever gives up in line, or on the wire, leaves the place to the next.
            waiting = asyncio.create_task(transport.send(request(server.url)))
            await asyncio.sleep(0.01)
            holder.cancel()
            assert await read_body(await waiting) == b"ok"

    run(main())


@pytest.mark.parametrize("loop", LOOPS)
@pytest.mark.parametrize(
    ("script", "stage"),
    [
        (scripted(), "first byte"),
        # a slow-loris: a byte now and then, for ever
        (scripted(*[b"HTTP/1.1 200 OK\r\n"], *[b"x", 0.03] * 60), "first byte"),
        (scripted(b"HTTP/1.1 200 OK\r\ncontent-length: 9\r\n\r\nhalf"), "between bytes"),
        (scripted(b"HTTP/1.1 200 OK\r\n\r\n", *[b"x", 0.03] * 60), "total"),
    ],
)
def test_each_stage_has_its_time(loop: Loop, script: Script, stage: str) -> None:
    async def main() -> None:
        async with serve(script) as server, client() as transport:
            begun = asyncio.get_running_loop().time()
            what = request(server.url, first_byte=0.15, between_bytes=0.1, total=0.3)
            error = await failing(transport, what)
            assert isinstance(error, TimedOut)
            assert (error.stage, error.sent) == (stage, True)
            assert asyncio.get_running_loop().time() - begun < 0.5
            await server.peers[0].lost
            assert transport.connections() == (0, 0)

    run(main(), loop)


def test_a_slow_consumer_stops_the_reading_and_is_not_blamed_on_the_provider() -> None:
    async def main() -> None:
        size = 40 * HIGH_WATER
        written = []

        async def script(peer: Peer, body: bytes) -> None:
            peer.socket.set_write_buffer_limits(high=65536)
            peer.socket.write(b"HTTP/1.1 200 OK\r\ncontent-length: %d\r\n\r\n" % size)
            for _ in range(size // 65536):
                while peer.socket.get_write_buffer_size() > 65536:
                    await asyncio.sleep(0.005)
                peer.socket.write(b"x" * 65536)
                written.append(65536)

        async with serve(script) as server, client() as transport:
            response = await transport.send(request(server.url, between_bytes=0.1))
            await asyncio.sleep(0.3)
            # What has left the server sits in the kernel's buffers and in ours: not the whole 10 MB.
            assert sum(written) < size * 0.9
            total = 0
            async for chunk in response:
                total += len(chunk)
            assert total == size
            assert transport.connections() == (1, 1)
            assert await read_body(await transport.send(request(server.url))) == b"x" * size

    run(main())


def test_a_connection_whose_answer_ends_while_reading_is_stopped_is_read_again() -> None:
    """Layers below may hold bytes back and deliver them after the stop; here the test does."""

    async def main() -> None:
        size = 3 * HIGH_WATER

        async def script(peer: Peer, body: bytes) -> None:
            head = b"HTTP/1.1 200 OK\r\ncontent-length: %d\r\n\r\n" % size
            peer.socket.write(head + b"x" * (size - 2))

        async with serve(script) as server, client() as transport:
            response = await transport.send(request(server.url))
            (pool,) = transport._pools.values()
            (connection,) = pool.all
            while connection._socket.is_reading():
                await asyncio.sleep(0.01)
            left = size - response._body
            connection.data_received(b"y" * left)
            assert connection._socket.is_reading()  # the next exchange may take it before this one is read
            assert transport.connections() == (1, 1)
            assert len(await read_body(response)) == size

    run(main())


@pytest.mark.parametrize("loop", LOOPS)
@pytest.mark.parametrize(
    "script",
    [
        scripted(*[b"HTTP/1.1 200 OK\r\n"], *[b"x-a: " + b"a" * 500 + b"\r\n"] * 10),
        scripted(b"HTTP/1.1 200 OK\r\nx-a: " + b"a" * 5000),
        scripted(b"HTTP/1.1 200 OK\r\nx-a: " + b"a" * 5000 + b"\r\ncontent-length: 2\r\n\r\nok"),
        scripted(*[b"HTTP/1.1 100 Continue\r\n\r\n"] * 100),
        scripted(b"HTTP/1.1 200 OK\r\ncontent-length: 999999\r\n\r\n"),
        scripted(b"HTTP/1.1 200 OK\r\n\r\n", *[b"x" * 1000, 0.001] * 5),
        scripted(b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n1;", b"x" * 2000, 0.01, b"y" * 2000),
        scripted(
            b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n0\r\nx-a: ", b"x" * 2000, 0.01, b"y" * 2000
        ),
    ],
)
def test_heads_and_bodies_without_end_are_refused(loop: Loop, script: Script) -> None:
    async def main() -> None:
        limits = Limits(head_bytes=1500, body_bytes=3000)
        async with serve(script) as server, client(limits) as transport:
            assert isinstance(await failing(transport, request(server.url)), TooLarge)
            await server.peers[0].lost

    run(main(), loop)


def test_one_byte_chunks_are_framing_not_an_attack() -> None:
    async def main() -> None:
        head = b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n"
        async with (
            serve(head + b"1\r\nx\r\n" * 2000 + b"0\r\n\r\n") as server,
            client(Limits(head_bytes=1500)) as transport,
        ):
            assert await read_body(await transport.send(request(server.url))) == b"x" * 2000

    run(main())


@pytest.mark.parametrize(
    "answer",
    [b"SSH-2.0-OpenSSH\r\n", b"HTTP/1.1 200 OK\r\ncontent-length: 1, 2\r\n\r\n", b"\x16\x03\x01\x00"],
)
def test_what_is_not_http_is_garbled(answer: bytes) -> None:
    async def main() -> None:
        async with serve(answer) as server, client() as transport:
            assert isinstance(await failing(transport, request(server.url)), Garbled)

    run(main())


def test_bytes_behind_an_answer_never_reach_the_next_one() -> None:
    async def main() -> None:
        for extra in (OK, b"garbage\r\n\r\n"):
            async with serve(OK + extra) as server, client() as transport:
                for _ in range(2):
                    assert await read_body(await transport.send(request(server.url))) == b"ok"
                assert len(server.peers) == 2

        async def late(peer: Peer, body: bytes) -> None:
            peer.socket.write(OK)
            await asyncio.sleep(0.02)
            peer.socket.write(b"HTTP/1.1 200 OK\r\ncontent-length: 3\r\n\r\nbad")

        async with serve(late) as server, client() as transport:
            assert await read_body(await transport.send(request(server.url))) == b"ok"
            await asyncio.sleep(0.05)
            assert transport.connections() == (0, 0)

    run(main())


@pytest.mark.parametrize("loop", LOOPS)
def test_cancellation_closes_the_connection_at_once(loop: Loop) -> None:
    async def main() -> None:
        stream = scripted(b"HTTP/1.1 200 OK\r\ncontent-length: 9\r\n\r\nhalf")
        for script in (scripted(), stream):
            async with serve(script) as server, client() as transport:

                async def whole(url: str, transport: HttpTransport) -> None:
                    async for _ in await transport.send(request(url)):
                        pass

                task = asyncio.create_task(whole(server.url, transport))
                await asyncio.sleep(0.05)
                task.cancel()
                with pytest.raises(asyncio.CancelledError):
                    await task
                assert transport.connections() == (0, 0)
                await asyncio.wait_for(server.peers[0].lost, 0.5)
        async with serve(stream) as server, client() as transport:
            response = await transport.send(request(server.url))
            await response.aclose()  # no reader at all
            assert transport.connections() == (0, 0)
            await asyncio.wait_for(server.peers[0].lost, 0.5)

    run(main(), loop)


@pytest.mark.parametrize("loop", LOOPS)
def test_no_connection_is_unreachable_and_holds_no_place(loop: Loop) -> None:
    async def main() -> None:
        async with serve(OK) as server:
            url = server.url
        async with client(Limits(connections=1)) as transport:
            for _ in range(3):
                error = await failing(transport, request(url))
                assert isinstance(error, Unreachable)
                assert not error.sent
            assert transport.connections() == (0, 0)

    run(main(), loop)


@pytest.mark.parametrize("loop", LOOPS)
def test_connecting_takes_no_longer_than_it_may(loop: Loop) -> None:
    async def main() -> None:
        # The kernel takes the connection; nobody answers the handshake of TLS.
        with socket.create_server(("127.0.0.1", 0)) as listener:
            url = f"https://127.0.0.1:{listener.getsockname()[1]}/"
            async with client() as transport:
                error = await failing(transport, request(url, connect=0.1))
                assert isinstance(error, TimedOut)
                assert (error.stage, error.sent) == ("connect", False)
            await asyncio.sleep(0.05)

    run(main(), loop)


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A certificate authority and a certificate of 'localhost' signed by it."""
    if shutil.which("openssl") is None:
        pytest.skip("needs the openssl command")
    folder = tmp_path_factory.mktemp("tls")
    ec = "-newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes"
    for command in (
        f"req -x509 {ec} -keyout ca.key -out ca.pem -days 2 -subj /CN=walras-test",
        f"req {ec} -keyout server.key -out server.csr -subj /CN=localhost",
        "x509 -req -in server.csr -CA ca.pem -CAkey ca.key -CAcreateserial -out server.pem -days 2 -extfile san",
    ):
        (folder / "san").write_text("subjectAltName=DNS:localhost\n")
        subprocess.run(["openssl", *command.split()], cwd=folder, check=True, capture_output=True)
    return folder


@pytest.mark.parametrize("loop", LOOPS)
def test_tls_is_verified(loop: Loop, authority: Path) -> None:
    async def main() -> None:
        server_tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        server_tls.load_cert_chain(authority / "server.pem", authority / "server.key")
        trusting = ssl.create_default_context(cafile=str(authority / "ca.pem"))
        async with serve(OK, server_tls) as server:
            async with client(tls=trusting) as transport:
                for _ in range(2):
                    assert await read_body(await transport.send(request(server.url))) == b"ok"
                assert len(server.peers) == 1
                wrong_name = server.url.replace("localhost", "127.0.0.1")
                assert isinstance(await failing(transport, request(wrong_name)), Unreachable)
            async with client() as transport:
                error = await failing(transport, request(server.url))
                assert isinstance(error, Unreachable)
                assert "certificate" in str(error).lower()

    run(main(), loop)


@pytest.mark.parametrize(
    ("url", "headers"),
    [
        ("ftp://host/", []),
        ("http:///path", []),
        ("http://host:port/", []),
        ("http://user:pass@host/", []),
        ("http://host/", [("authorization", f"Bearer {SECRET}\r\nx-smuggled: 1")]),
        ("http://host/a b\r\n", [("x", "é")]),
    ],
)
def test_endpoints_that_could_not_be_meant_are_refused(url: str, headers: list[tuple[str, str]]) -> None:
    with pytest.raises(SettingsError) as caught:
        Endpoint.of("POST", url, headers)
    assert SECRET not in str(caught.value)


def test_a_key_is_not_in_any_repr() -> None:
    what = request("http://host/v1", SECRET.encode())
    assert SECRET not in repr(what)
    assert "host" in repr(what)
