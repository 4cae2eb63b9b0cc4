"""The running process as a stranger meets it: odd HTTP, odd bodies, other people's data, signals, kill -9, full disks."""

from __future__ import annotations

import http.client
import json
import resource
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Iterator
from contextlib import closing, suppress
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis.errors import Unsatisfiable
from schemathesis import GenerationMode
from schemathesis.checks import (
    content_type_conformance,
    response_schema_conformance,
    status_code_conformance,
)

from gateways import WALRAS, Service, running
from inprocess import CHAT, Got, parse, request
from walras.ledger import open_store, verify

BODY = json.dumps(CHAT | {"max_tokens": 5}).encode()
CALL = "/v1/chat/completions"


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    with running(tmp_path_factory.mktemp("service")) as it:
        yield it
        assert "Traceback" not in it.log.read_text()


def address(service: Service) -> tuple[str, int]:
    parts = urlsplit(service.url)
    return str(parts.hostname), int(parts.port or 0)


def send(service: Service, data: bytes, within_s: float = 10.0) -> Got:
    """Send bytes, read until the service closes; status 0 where it says nothing."""
    with closing(socket.create_connection(address(service), within_s)) as sock:
        got = b""
        try:
            sock.sendall(data)
            while more := sock.recv(65536):
                got += more
        except ConnectionError:
            pass
    return parse(got)


def ask(service: Service, path: str, body: bytes = b"", key: str | None = None, **headers: str) -> Got:
    return send(service, request(path, body, service.key if key is None else key, **headers), 30.0)


# --- odd requests -----------------------------------------------------------------------------------------------------------


def with_body(body: bytes, path: str = CALL) -> tuple[bytes, str]:
    return body, path


BODIES: dict[str, tuple[bytes, str]] = {
    "empty object": with_body(b"{}"),
    "not JSON": with_body(b"{"),
    "a list": with_body(b"[]"),
    "null": with_body(b"null"),
    "NaN": with_body(b'{"model":"auto","messages":[{"role":"user","content":NaN}]}'),
    "not UTF-8": with_body(b'{"model":"\xff\xfe"}'),
    "half a character": with_body(b'{"model":"\\ud800","messages":[{"role":"user","content":"a"}]}'),
    "a NUL in the model": with_body(b'{"model":"a\\u0000b","messages":[{"role":"user","content":"a"}]}'),
    "deep": with_body(b'{"messages":' + b"[" * 100_000 + b"]" * 100_000 + b"}"),
    "messages a text": with_body(b'{"model":"auto","messages":"hi"}'),
    "messages empty": with_body(b'{"model":"auto","messages":[]}'),
    "messages of numbers": with_body(b'{"model":"auto","messages":[1,2]}'),
    "model a number": with_body(b'{"model":7,"messages":[{"role":"user","content":"a"}]}'),
    "unknown model": with_body(b'{"model":"gpt","messages":[{"role":"user","content":"a"}]}'),
    "stream a text": with_body(b'{"stream":"yes","messages":[{"role":"user","content":"a"}]}'),
    "max_tokens 0": with_body(BODY.replace(b'"max_tokens": 5', b'"max_tokens": 0')),
    "max_tokens below 0": with_body(BODY.replace(b'"max_tokens": 5', b'"max_tokens": -5')),
    "max_tokens a float": with_body(BODY.replace(b'"max_tokens": 5', b'"max_tokens": 1e3')),
    "max_tokens true": with_body(BODY.replace(b'"max_tokens": 5', b'"max_tokens": true')),
    "n absurd": with_body(BODY.replace(b'"max_tokens": 5', b'"n": 1000000000')),
    "messages without cap": with_body(BODY.replace(b'"max_tokens": 5', b'"x": 5'), "/v1/messages"),
    "input missing": with_body(b'{"model":"auto"}', "/v1/responses"),
    "input a number": with_body(b'{"model":"auto","input":3}', "/v1/embeddings"),
    "quality above 1": with_body(b'{"request_id":"x","quality":2}', "/v1/outcomes"),
    "outcome of nothing": with_body(b'{"request_id":"x","quality":1}', "/v1/outcomes"),
    "outcome of half a character": with_body(b'{"request_id":"\\udc00","quality":1}', "/v1/outcomes"),
    "no uses": with_body(b'{"uses":[]}', "/v1/decide"),
    "uses too large": with_body(
        b'{"value_usd":1e308,"uses":[{"name":"a","quality":1e308,"usd":-1e308}]}', "/v1/decide"
    ),
}


@pytest.mark.parametrize("case", BODIES)
def test_an_odd_body_gets_a_clean_answer(case: str, service: Service) -> None:
    body, path = BODIES[case]
    got = ask(service, path, body)
    assert got.status in (400, 404), got
    said = got.json()["error"]
    assert said["message"]
    assert ("type" in got.json()) == (path == "/v1/messages")


HEAD = b"GET /healthz HTTP/1.1\r\nhost: a\r\nconnection: close\r\n"
POST = (
    b"POST " + CALL.encode() + b" HTTP/1.1\r\nhost: a\r\nconnection: close\r\nauthorization: Bearer KEY\r\n"
)
HTTP: dict[str, tuple[bytes, set[int]]] = {
    "plain": (HEAD + b"\r\n", {200}),
    "HTTP/1.0": (b"GET /healthz HTTP/1.0\r\n\r\n", {200}),
    "HTTP/0.9": (b"GET /healthz\r\n\r\n", {0, 200, 400}),
    "HEAD": (HEAD.replace(b"GET", b"HEAD") + b"\r\n", {200}),
    "OPTIONS": (HEAD.replace(b"GET", b"OPTIONS") + b"\r\n", {405}),
    "TRACE": (HEAD.replace(b"GET", b"TRACE") + b"\r\n", {405}),
    "an unknown method": (HEAD.replace(b"GET", b"BREW") + b"\r\n", {400, 405}),
    "no host": (b"GET /healthz HTTP/1.1\r\nconnection: close\r\n\r\n", {200, 400}),
    "no such path": (HEAD.replace(b"/healthz", b"/v1/nothing") + b"\r\n", {404}),
    "odd path": (HEAD.replace(b"/healthz", b"/%ff%00/../..%2f") + b"\r\n", {404}),
    "odd query": (HEAD.replace(b"/healthz", b"/healthz?%ff=%00&&==") + b"\r\n", {200}),
    "a bare LF": (b"GET /healthz HTTP/1.1\nhost: a\nconnection: close\n\n", {200, 400}),
    "a space before the colon": (HEAD + b"x : y\r\n\r\n", {400, 200}),
    "a NUL in a header": (HEAD + b"x: a\x00b\r\n\r\n", {400}),
    "two lengths": (POST + b"content-length: 2\r\ncontent-length: 3\r\n\r\n{}", {400}),
    "a length and chunks": (POST + b"content-length: 2\r\ntransfer-encoding: chunked\r\n\r\n0\r\n\r\n", {400}),
    "a length below 0": (POST + b"content-length: -1\r\n\r\n", {400}),
    "a length of 5,000 digits": (POST + b"content-length: " + b"9" * 5000 + b"\r\n\r\n", {400, 413}),
    "a length above the limit": (POST + b"content-length: 999999999999\r\n\r\n", {413}),
    "a bad chunk": (POST + b"transfer-encoding: chunked\r\n\r\nzz\r\n", {400}),
    "in chunks": (
        POST + b"transfer-encoding: chunked\r\n\r\n" + b"".join(b"1\r\n" + bytes([c]) + b"\r\n" for c in BODY) + b"0\r\n\r\n",
        {200},
    ),
    "expect": (POST + b"expect: 100-continue\r\ncontent-length: %d\r\n\r\n" % len(BODY) + BODY, {100}),
    "a long head": (HEAD + b"x: " + b"a" * 400_000 + b"\r\n\r\n", {0, 431}),
    "a long path": (b"GET /" + b"a" * 400_000 + b" HTTP/1.1\r\n\r\n", {0, 431}),
    "many headers": (HEAD + b"x: y\r\n" * 50_000 + b"\r\n", {0, 431}),
    "upgrade": (HEAD.replace(b"close", b"close, upgrade") + b"upgrade: websocket\r\n\r\n", {200, 400, 426}),
    "h2c": (b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", {0, 400}),
    "TLS": (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03", {0, 400}),
    "two keys": (POST.replace(b"KEY", b"no") + b"authorization: Bearer KEY\r\ncontent-length: 2\r\n\r\n{}", {400, 401}),
}  # fmt: skip


@pytest.mark.parametrize("case", HTTP)
def test_odd_http_gets_a_clean_answer(case: str, service: Service) -> None:
    sent, statuses = HTTP[case]
    got = send(service, sent.replace(b"KEY", service.key.encode()))
    assert got.status in statuses, got
    if case == "HEAD":
        assert got.body == b""


@pytest.mark.parametrize(
    ("name", "value", "status"),
    [
        ("x_walras_value", "nan", 400), ("x_walras_value", "-1", 400), ("x_walras_value", "inf", 400),
        ("x_walras_value", "1e300", 400), ("x_walras_value", "a", 400), ("x_walras_value", "", 400),
        ("x_walras_value", "0.01", 200), ("x_walras_deadline", "nan", 400), ("x_walras_deadline", "0", 504),
        ("x_walras_deadline", "1e300", 200), ("x_walras_class", "a" * 300, 400), ("x_walras_class", "a\tb", 400),
        ("x_walras_class", "caf\xe9", 200), ("x_walras_session", "\x7f", 400), ("x_walras_session", "'; DROP", 200),
    ],
)  # fmt: skip
def test_headers_are_checked(name: str, value: str, status: int, service: Service) -> None:
    got = ask(service, CALL, BODY.replace(b"simulated-small", b"auto"), **{name: value})
    assert got.status == status, got
    if got.headers["content-type"] == "application/json" and status == 400:
        assert got.json()["error"]["param"] == name.replace("_", "-")


def test_a_prompt_of_10_mb(service: Service) -> None:
    words = json.dumps(
        CHAT | {"max_tokens": 1, "messages": [{"role": "user", "content": "word " * 2_000_000}]}
    )
    assert ask(service, CALL, words.encode()).status == 200
    with closing(http.client.HTTPConnection(*address(service), timeout=30)) as client:
        client.request(
            "POST", CALL, words.encode() + b" " * 8_000_000, {"authorization": f"Bearer {service.key}"}
        )
        assert client.getresponse().status == 413


def test_pipelined_requests_are_answered_in_order(service: Service) -> None:
    plain = b"GET /healthz HTTP/1.1\r\nhost: a\r\n\r\n"
    with closing(socket.create_connection(address(service), 10)) as sock:
        sock.sendall(plain * 9 + HEAD + b"\r\n")
        got = b""
        while more := sock.recv(65536):
            got += more
    assert got.count(b"HTTP/1.1 200") == 10


def test_10_000_idle_connections(service: Service) -> None:
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    many = min(10_000, most - 500)
    before = rss(service)
    idle = []
    try:
        for n in range(many):
            sock = socket.create_connection(address(service), 10)
            if n % 2:
                sock.sendall(b"GET /healthz HTTP/1.1\r\nhost: a\r\n\r\n")
            idle.append(sock)
        began = time.perf_counter()
        assert ask(service, CALL, BODY).status == 200
        assert time.perf_counter() - began < 5
        assert rss(service) - before < 150 << 20
    finally:
        for sock in idle:
            sock.close()
    assert many == 10_000


def rss(service: Service) -> int:
    lines = Path(f"/proc/{service.process.pid}/status").read_text().splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith("VmRSS"))


# --- the API's own description -------------------------------------------------------------------------------------------------


CHECKS = [status_code_conformance, content_type_conformance, response_schema_conformance]


@pytest.mark.parametrize("mode", [GenerationMode.POSITIVE, GenerationMode.NEGATIVE])
def test_what_is_described_is_what_is_served(mode: GenerationMode, service: Service) -> None:
    """Requests made from the description, good or bad: no 500, and no answer that the description does not know."""
    described = schemathesis.openapi.from_dict(ask(service, "/openapi.json").json())
    operations = [found.ok() for found in described.get_all_operations()]
    operations = [o for o in operations if o.path != "/v1/prices/stream"]  # it has no end
    each_s = 6.0 / len(operations)
    tried: dict[str, int] = {}
    for operation in operations:
        _try(operation, mode, service, tried, time.monotonic() + each_s)
    assert len(tried) >= (14 if mode is GenerationMode.POSITIVE else 8), tried


def _try(operation: Any, mode: GenerationMode, service: Service, tried: dict[str, int], ends: float) -> None:
    @settings(
        max_examples=20,
        deadline=None,
        database=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(case=operation.as_strategy(generation_mode=mode))
    def once(case: Any) -> None:
        if time.monotonic() > ends:
            return
        tried[operation.label] = tried.get(operation.label, 0) + 1
        headers = {"authorization": f"Bearer {service.key}", "x-walras-value": "0.0003"}  # a small model does
        got = case.call(base_url=service.url, headers=headers, timeout=20)
        assert got.status_code not in (500, 501, 505), (case.as_curl_command(), got.content)
        case.validate_response(got, checks=CHECKS)

    with suppress(Unsatisfiable):  # nothing can be wrong with a request that has no parts
        once()


# --- whose data ---------------------------------------------------------------------------------------------------------------


def test_a_tenant_sees_only_its_own(service: Service) -> None:
    keys = {t: service.make_key(t, budget_nano=10**9) for t in ("alice", "bob")}
    looker = service.make_key("eve", scope="read-only")
    ids = {}
    for tenant, key in keys.items():
        got = ask(service, CALL, BODY, key)
        assert got.status == 200
        ids[tenant] = got.headers["x-request-id"]
    for tenant, key in keys.items():
        rows = ask(service, "/v1/requests", b"", key).json()["data"]
        assert {row["tenant"] for row in rows} == {tenant}
        accounts = {row["account"] for row in ask(service, "/v1/budgets", b"", key).json()["data"]}
        assert f"tenant:{tenant}" in accounts
        assert len(accounts) == 2
        assert ask(service, "/metrics", b"", key).status == 403
    said = json.dumps({"request_id": ids["bob"], "quality": 1.0}).encode()
    assert ask(service, "/v1/outcomes", said, keys["alice"]).status == 404
    assert ask(service, "/v1/outcomes", said, looker).status == 403
    assert ask(service, "/v1/outcomes", said, keys["bob"]).status == 200
    assert ask(service, CALL, BODY, looker).status == 403
    assert ask(service, "/metrics", b"", looker).status == 200


@pytest.mark.parametrize(
    "path",
    ["/v1/models", "/v1/prices", "/v1/prices/stream", "/v1/menu", "/v1/budgets", "/v1/requests", "/metrics"],
)
def test_nothing_is_told_without_a_key(path: str, service: Service) -> None:
    for key in ("", "no", service.key[:-1] + "!", "wl-" + "a" * 52):
        got = ask(service, path, b"", key)
        assert got.status == 401
        assert got.headers["www-authenticate"] == "Bearer"


def test_secrets_stay_secret(tmp_path: Path) -> None:
    prompt = "my-own-prompt-4711"
    body = json.dumps(
        {"model": "auto", "messages": [{"role": "user", "content": prompt}], "max_tokens": 5}
    ).encode()
    with running(tmp_path) as own:
        assert ask(own, CALL, body).status == 200
        seen = [
            ask(own, path).body for path in ("/metrics", "/v1/requests", "/v1/budgets", "/", "/openapi.json")
        ]
        seen += [ask(own, CALL, body, own.key[:-1] + "x").body, ask(own, CALL, b"{" + own.key.encode()).body]
        assert own.stop() == 0
    files = [path.read_bytes() for path in own.data.iterdir() if path.is_file()]
    for told in (*seen, *files, own.log.read_bytes()):
        assert own.key.encode() not in told
        assert prompt.encode() not in told


# --- the end, and after it --------------------------------------------------------------------------------------------------------

LONG = json.dumps(
    {"model": "simulated-medium", "stream": True, "max_tokens": 100, "messages": CHAT["messages"]}
).encode()


def in_threads(service: Service, many: int, body: bytes) -> tuple[list[threading.Thread], list[Got]]:
    found: list[Got] = []
    threads = [threading.Thread(target=lambda: found.append(ask(service, CALL, body))) for _ in range(many)]
    for thread in threads:
        thread.start()
    return threads, found


def holds(service: Service) -> int:
    store = open_store(service.data / "ledger.sqlite", read_only=True)
    try:
        return len(store.open_holds())
    finally:
        store.stop()


def wait_for_holds(service: Service, many: int) -> None:
    ends = time.monotonic() + 20
    while holds(service) < many:
        assert time.monotonic() < ends
        time.sleep(0.02)


def books(service: Service) -> list[Any]:
    store = open_store(service.data / "ledger.sqlite", read_only=True)
    try:
        found = verify(store)
        assert found.ok, found.violations
        assert found.open_nano == 0
        return [row.entry for row in store.entries(None, 100_000)]
    finally:
        store.stop()


def test_asked_to_end_it_lets_calls_finish(tmp_path: Path) -> None:
    with running(tmp_path) as own:
        stream = socket.create_connection(address(own), 30)
        stream.sendall(request("/v1/prices/stream", b"", own.key))
        threads, found = in_threads(own, 5, LONG)
        wait_for_holds(own, 5)
        own.process.send_signal(signal.SIGTERM)
        time.sleep(0.3)
        with pytest.raises(ConnectionError):
            socket.create_connection(address(own), 5)
        assert own.process.wait(40) == 0
        stream.close()
        for thread in threads:
            thread.join()
    assert [got.status for got in found] == [200] * 5, found
    assert all(got.body.endswith(b"data: [DONE]\n\n") for got in found)
    assert [e.status for e in books(own)] == ["ok"] * 5


def test_a_second_signal_ends_it_at_once(tmp_path: Path) -> None:
    with running(tmp_path) as own:
        threads, _ = in_threads(own, 5, LONG.replace(b'"max_tokens": 100', b'"max_tokens": 4000'))
        wait_for_holds(own, 5)
        own.process.send_signal(signal.SIGTERM)
        time.sleep(0.2)
        own.process.send_signal(signal.SIGTERM)
        began = time.monotonic()
        assert own.process.wait(20) == 0
        assert time.monotonic() - began < 3
        for thread in threads:
            thread.join()
    entries = books(own)
    assert [e.settled for e in entries] == ["cap"] * 5
    assert {e.status for e in entries} == {"cut"}


def test_after_kill_9_the_books_balance_and_budgets_go_on(tmp_path: Path) -> None:
    with running(tmp_path) as own:
        first, key = own.key, own.make_key("acme", budget_nano=10**9, period="month")
        assert ask(own, CALL, BODY, key).status == 200
        spent = ask(own, "/v1/budgets", b"", key).json()["spent_usd"]
        assert spent > 0
        own.key = key
        threads, _ = in_threads(own, 8, LONG)
        wait_for_holds(own, 8)
        own.kill()
        for thread in threads:
            thread.join()
    with running(tmp_path, key=first) as again:
        told = ask(again, "/v1/budgets", b"", key).json()
        assert told["reserved_usd"] == 0
        assert ask(again, CALL, BODY, key).status == 200
        assert again.stop() == 0
    entries = books(own)
    assert [e.settled for e in entries].count("cap") == 8
    assert all(e.status == "unknown" for e in entries if e.settled == "cap")
    assert round(told["spent_usd"] * 1e9) == sum(e.charged_nano for e in entries[:-1])
    checked = subprocess.run([WALRAS, "ledger", "verify", "--data", str(own.data)], check=False, timeout=60)
    assert checked.returncode == 0


def test_a_disk_that_takes_no_more_is_survived(tmp_path: Path) -> None:
    """The process may write files no larger than they are, as on a full disk, and then may again."""
    with running(tmp_path) as own:
        assert ask(own, CALL, BODY).status == 200
        pid = own.process.pid
        before = resource.prlimit(pid, resource.RLIMIT_FSIZE)
        resource.prlimit(pid, resource.RLIMIT_FSIZE, (0, before[1]))
        assert (
            ask(own, CALL, BODY).status == 200
        )  # its entry is safe in the journal, which has had its room all along
        ends = time.monotonic() + 5
        while ask(own, "/readyz").status != 503:
            assert time.monotonic() < ends
            time.sleep(0.01)
        statuses = [ask(own, CALL, BODY).status for _ in range(5)]
        assert statuses == [503] * 5
        ready = ask(own, "/readyz")
        assert ready.status == 503
        assert "ledger" in ready.json()["problem"]
        assert str(tmp_path) not in ready.json()["problem"]
        resource.prlimit(pid, resource.RLIMIT_FSIZE, before)
        ends = time.monotonic() + 5
        while ask(own, "/readyz").status != 200:
            assert time.monotonic() < ends
            time.sleep(0.05)
        assert ask(own, CALL, BODY).status == 200
        assert own.stop() == 0
    assert sum(e.charged_nano > 0 for e in books(own)) == 3
