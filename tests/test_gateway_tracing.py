"""Spans, as a real collector receives them: what is in them, whose children they are, and that a dead collector harms no call."""

from __future__ import annotations

import asyncio
import http.client
import json
import subprocess
import sys
import threading
import time
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from unittest.mock import patch
from urllib.parse import urlsplit

import pytest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import (
    ExportTraceServiceRequest,
    ExportTraceServiceResponse,
)

from gateways import running
from inprocess import CHAT, Live, live, raw, request
from walras.errors import SettingsError
from walras.gateway import serve, tracing
from walras.gateway.simulated import EMBEDDING, SimulatedTransport
from walras.gateway.transport import Request, Response
from walras.gateway.wire import sse
from walras.settings import Economy

CALL = "/v1/chat/completions"
SERVER, CLIENT, ERROR = 2, 3, 2
TRACE, SPAN = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
PROMPT, ANSWER, SECRET = "the prompt nobody may see", "an answer of no concern", "sk-very-secret-upstream"
Test = Callable[[Live], Awaitable[None]]


@dataclass
class Sent:
    """One span as it was received."""

    name: str
    kind: int
    trace: str
    id: str
    parent: str
    state: str
    failed: bool
    seconds: float
    said: dict[str, Any]
    events: list[tuple[str, dict[str, Any]]]
    service: dict[str, Any]


def plain(value: Any) -> Any:
    kind = value.WhichOneof("value")
    got = getattr(value, kind)
    return [plain(v) for v in got.values] if kind == "array_value" else got


def table(attributes: Any) -> dict[str, Any]:
    return {a.key: plain(a.value) for a in attributes}


@dataclass
class Collector:
    """Takes OTLP over HTTP. While `hangs`, it takes connections and answers none."""

    url: str = ""
    bodies: list[bytes] = field(default_factory=list)
    hangs: threading.Event | None = None

    def spans(self, kind: int | None = None) -> list[Sent]:
        """By the time they began."""
        found = []
        for body in self.bodies:
            for resource in ExportTraceServiceRequest.FromString(body).resource_spans:
                service = table(resource.resource.attributes)
                for s in (s for scope in resource.scope_spans for s in scope.spans):
                    seconds = (s.end_time_unix_nano - s.start_time_unix_nano) / 1e9
                    events = [(e.name, table(e.attributes)) for e in s.events]
                    found.append((s.start_time_unix_nano, Sent(
                        s.name, s.kind, s.trace_id.hex(), s.span_id.hex(), s.parent_span_id.hex(), s.trace_state,
                        s.status.code == ERROR, seconds, table(s.attributes), events, service,
                    )))  # fmt: skip
        return [s for _, s in sorted(found, key=lambda pair: pair[0]) if kind in (None, s.kind)]

    def only(self, kind: int) -> Sent:
        (span,) = self.spans(kind)
        return span


@contextmanager
def listening(answer: Callable[[BaseHTTPRequestHandler, bytes], None]) -> Iterator[str]:
    """The URL of a server on a thread of its own."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self) -> None:
            answer(self, self.rfile.read(int(self.headers["content-length"])))

        def log_message(self, *args: Any) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}"
        finally:
            server.shutdown()
            thread.join()


def reply(handler: BaseHTTPRequestHandler, status: int, kind: str, body: bytes) -> None:
    handler.send_response(status)
    handler.send_header("content-type", kind)
    handler.send_header("content-length", str(len(body)))
    handler.send_header("connection", "close")
    handler.end_headers()
    handler.wfile.write(body)
    handler.close_connection = True


@pytest.fixture
def collector(monkeypatch: pytest.MonkeyPatch) -> Iterator[Collector]:
    it = Collector()

    def take(handler: BaseHTTPRequestHandler, body: bytes) -> None:
        if it.hangs is not None:
            it.hangs.wait(30.0)
        assert handler.path == "/v1/traces"
        it.bodies.append(body)
        with suppress(ConnectionError):  # who waited may have left
            reply(handler, 200, "application/x-protobuf", ExportTraceServiceResponse().SerializeToString())

    with listening(take) as it.url:
        monkeypatch.setenv("NO_PROXY", "127.0.0.1")
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", it.url)
        yield it
        if it.hangs is not None:
            it.hangs.set()


def run(
    folder: Path, test: Test, transport: SimulatedTransport | None = None, economy: Economy | None = None
) -> None:
    """Serve, test, stop: whatever spans there are have then been sent."""

    async def whole() -> None:
        async with live(folder, transport, economy) as service:
            await test(service)

    asyncio.run(whole())


# --- the running process ----------------------------------------------------------------------------------------------------


@dataclass
class Provider:
    """Speaks OpenAI's API; what it is asked at /down/ fails."""

    url: str = ""
    seen: list[tuple[str, str | None]] = field(default_factory=list)
    """Path and `traceparent`."""

    def answer(self, handler: BaseHTTPRequestHandler, body: bytes) -> None:
        asked = json.loads(body)
        self.seen.append((handler.path, handler.headers["traceparent"]))
        if handler.path.startswith("/down/"):
            reply(handler, 500, "application/json", b'{"error": {"message": "no", "code": "broken"}}')
            return
        usage = {
            "prompt_tokens": 9,
            "completion_tokens": 7,
            "prompt_tokens_details": {"cached_tokens": 4},
            "completion_tokens_details": {"reasoning_tokens": 2},
        }
        head = {"id": "c1", "created": 1, "model": asked["model"]}
        if asked.get("stream"):
            delta = {"index": 0, "delta": {"role": "assistant", "content": ANSWER}, "finish_reason": None}
            last = {"index": 0, "delta": {}, "finish_reason": "stop"}
            chunk = head | {"object": "chat.completion.chunk"}
            events = [chunk | {"choices": [delta]}, chunk | {"choices": [last]}]
            told = b"".join(map(sse, events)) + sse(chunk | {"choices": [], "usage": usage})
            reply(handler, 200, "text/event-stream", told + b"data: [DONE]\n\n")
            return
        choice = {
            "index": 0,
            "message": {"role": "assistant", "content": ANSWER},
            "finish_reason": "stop",
        }
        whole = head | {"object": "chat.completion", "choices": [choice], "usage": usage}
        reply(handler, 200, "application/json", json.dumps(whole).encode())


SETTINGS = """
value = 0.5
[upstreams.first]
kind = "openai"
base_url = "{url}/down/v1"
key_env = ["FIRST_KEY"]
[upstreams.second]
kind = "openai"
base_url = "{url}/up/v1"
key_env = ["FIRST_KEY"]
[models.large]
upstream = "first"
input_usd = 1.0
output_usd = 1.0
quality = 0.9
[models.small]
upstream = "second"
upstream_model = "small-2026"
input_usd = 1.0
output_usd = 2.0
quality = 0.8
"""


def post(url: str, key: str, body: dict[str, Any], **headers: str) -> tuple[int, dict[str, str], bytes]:
    parts = urlsplit(url)
    connection = http.client.HTTPConnection(str(parts.hostname), parts.port, timeout=30.0)
    try:
        named = {name.replace("_", "-"): value for name, value in headers.items()}
        connection.request("POST", CALL, json.dumps(body), {"authorization": f"Bearer {key}"} | named)
        got = connection.getresponse()
        return got.status, {k.lower(): v for k, v in got.getheaders()}, got.read()
    finally:
        connection.close()


def test_a_service_its_caller_its_provider_and_a_collector(
    tmp_path: Path, collector: Collector, monkeypatch: pytest.MonkeyPatch
) -> None:
    provider = Provider()
    monkeypatch.setenv("FIRST_KEY", SECRET)
    body = {"messages": [{"role": "user", "content": PROMPT}], "max_tokens": 50}
    with listening(provider.answer) as provider.url:
        with running(tmp_path, SETTINGS.format(url=provider.url)) as service:
            named = body | {"model": "small"}
            status, _, _ = post(
                service.url, service.key, named, traceparent=f"00-{TRACE}-{SPAN}-01", tracestate="vendor=1"
            )
            assert status == 200
            status, _, got = post(service.url, service.key, named | {"stream": True}, x_walras_session="s-1")
            assert status == 200
            assert got.endswith(b"data: [DONE]\n\n")
            status, headers, _ = post(
                service.url, service.key, body | {"model": "auto"}, x_walras_class="review"
            )
            assert status == 200
            assert headers["x-walras-use"] == "small"
            secret = service.key
        assert "Traceback" not in service.log.read_text()
    whole, stream, retried = collector.spans(SERVER)
    first, second, failed, again = collector.spans(CLIENT)

    assert (whole.trace, whole.parent, whole.state) == (TRACE, SPAN, "vendor=1")
    assert whole.name == "chat small"
    assert not whole.failed
    assert whole.service["service.name"] == "walras"
    assert (first.name, first.trace, first.parent) == ("chat small-2026", TRACE, whole.id)
    assert 0 < first.seconds < whole.seconds
    usage = {
        "gen_ai.usage.input_tokens": 9,
        "gen_ai.usage.cache_read.input_tokens": 4,
        "gen_ai.usage.output_tokens": 7,
        "gen_ai.usage.reasoning.output_tokens": 2,
    }
    cost = 9 * 1000 + 7 * 2000
    host, port = urlsplit(provider.url).hostname, urlsplit(provider.url).port
    assert first.said.pop("walras.reserved_nano") >= cost
    assert first.said == usage | {
        "gen_ai.operation.name": "chat",
        "gen_ai.provider.name": "openai",
        "gen_ai.request.model": "small-2026",
        "gen_ai.response.finish_reasons": ["stop"],
        "server.address": host,
        "server.port": port,
        "walras.use": "small",
        "walras.upstream": "second",
        "walras.charged_nano": cost,
    }
    assert whole.said.pop("walras.reserved_nano") >= cost
    assert whole.said.pop("walras.request_id").startswith("req_")
    assert whole.said.pop("walras.surplus_usd") == pytest.approx(0.4, abs=0.01)
    assert whole.said == usage | {
        "gen_ai.operation.name": "chat",
        "gen_ai.provider.name": "openai",
        "gen_ai.request.model": "small",
        "gen_ai.response.model": "small",
        "http.response.status_code": 200,
        "walras.tenant": "default",
        "walras.value_usd": 0.5,
        "walras.use": "small",
        "walras.prices_version": "1",
        "walras.status": "ok",
        "walras.settled": "exact",
        "walras.charged_nano": cost,
    }
    ((name, told),) = whole.events
    uses = json.loads(told["walras.uses"])
    assert name == "walras.decision"
    assert {u["use"] for u in uses} == {"large", "small"}
    for u in uses:
        assert u["net_usd"] == pytest.approx(
            u["value_usd"] - u["compute_usd"] - u["latency_usd"] - u["risk_usd"]
        )

    assert stream.parent == ""
    assert stream.said["gen_ai.conversation.id"] == second.said["gen_ai.conversation.id"] == "s-1"
    assert stream.said["gen_ai.request.stream"] is second.said["gen_ai.request.stream"] is True
    assert second.said["gen_ai.response.finish_reasons"] == ["stop"]
    assert 0 < second.said["gen_ai.response.time_to_first_chunk"] < stream.seconds
    assert second.said["gen_ai.usage.output_tokens"] == stream.said["gen_ai.usage.output_tokens"] == 7

    assert retried.name == "chat auto"
    assert retried.said["walras.class"] == "review"
    assert retried.said["gen_ai.response.model"] == "small"
    assert not retried.failed
    assert len(retried.events) == 2, "a decision for each attempt"
    assert {failed.parent, again.parent} == {retried.id}
    assert {failed.trace, again.trace} == {retried.trace}
    assert (failed.name, failed.failed, failed.said["error.type"]) == ("chat large", True, "server_error")
    assert failed.said["http.response.status_code"] == 500
    assert failed.said["walras.charged_nano"] == 0
    assert (again.name, again.failed) == ("chat small-2026", False)

    asked = [("up", first), ("up", second), ("down", failed), ("up", again)]
    told = [(f"/{where}/v1/chat/completions", f"00-{s.trace}-{s.id}") for where, s in asked]
    seen = [(path, str(parent).rpartition("-")) for path, parent in provider.seen]
    assert [(path, ids) for path, (ids, _, _) in seen] == told, (
        "each attempt's own span is its upstream's parent"
    )
    assert all(int(flags, 16) & 1 for _, (_, _, flags) in seen), "sampled"
    everything = b"".join(collector.bodies)
    for private in (PROMPT, ANSWER, SECRET, secret):
        assert private.encode() not in everything


def test_a_collector_that_hangs_stops_nothing(
    tmp_path: Path, collector: Collector, monkeypatch: pytest.MonkeyPatch
) -> None:
    collector.hangs = threading.Event()
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_TIMEOUT", "60")
    for name, number in (("SCHEDULE_DELAY", 10), ("MAX_EXPORT_BATCH_SIZE", 2), ("MAX_QUEUE_SIZE", 4)):
        monkeypatch.setenv(f"OTEL_BSP_{name}", str(number))
    with running(tmp_path) as service:
        for _ in range(5):
            began = time.monotonic()
            assert post(service.url, service.key, CHAT | {"max_tokens": 5})[0] == 200
            assert time.monotonic() - began < 20.0
        began = time.monotonic()
        assert service.stop() == 0
        assert time.monotonic() - began < 20.0
        assert "Traceback" not in service.log.read_text()


# --- where it is off --------------------------------------------------------------------------------------------------------

OFF: dict[str, dict[str, str]] = {
    "nothing is said": {},
    "said empty": {"OTEL_EXPORTER_OTLP_ENDPOINT": ""},
    "disabled": {"OTEL_SDK_DISABLED": " True"},
    "no exporter": {"OTEL_TRACES_EXPORTER": "none"},
}


@pytest.mark.parametrize("case", OFF)
def test_off_unless_the_environment_says_where(
    case: str, tmp_path: Path, collector: Collector, monkeypatch: pytest.MonkeyPatch
) -> None:
    if case == "nothing is said":
        monkeypatch.delenv("OTEL_EXPORTER_OTLP_ENDPOINT")
    for name, value in OFF[case].items():
        monkeypatch.setenv(name, value)

    async def test(service: Live) -> None:
        assert service.calls.tracer is None
        assert (await service.ask(CALL, CHAT)).status == 200

    run(tmp_path, test)
    assert collector.bodies == []


def test_what_is_off_is_not_loaded() -> None:
    code = "import sys, walras.gateway.process; sys.exit(any(m.startswith('opentelemetry') for m in sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], check=False, timeout=60).returncode == 0


def test_without_the_extra_it_says_what_to_install(
    tmp_path: Path, collector: Collector, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "opentelemetry.exporter.otlp.proto.http.trace_exporter", None)
    monkeypatch.delitem(sys.modules, "walras.gateway.tracing")
    with pytest.raises(SettingsError, match=r"OTEL_EXPORTER_OTLP_ENDPOINT.*not installed.*walras\[otel\]"):
        serve.open_service(serve.demo_economy(Economy()), tmp_path)


@pytest.mark.parametrize(
    ("name", "value"), [("OTEL_EXPORTER_OTLP_PROTOCOL", "grpc"), ("OTEL_BSP_MAX_QUEUE_SIZE", "0")]
)
def test_what_cannot_be_done_is_said_at_the_start(
    name: str, value: str, tmp_path: Path, collector: Collector, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(name, value)
    with pytest.raises(SettingsError, match="OTEL_"):
        serve.open_service(serve.demo_economy(Economy()), tmp_path)


# --- what goes wrong --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fault", "stream", "why"),
    [
        ("500", False, "server_error"),
        ("429", True, "rate_limited"),
        ("dead", False, "unreachable"),
        ("bad-json", False, "garbled"),
        ("cut", False, "cut"),
        ("cut", True, "cut"),
        ("stream-error", True, "server_error"),
    ],
)
def test_a_failure_is_an_error_of_its_type(
    fault: Any, stream: bool, why: str, tmp_path: Path, collector: Collector
) -> None:
    async def test(service: Live) -> None:
        with patch("walras.gateway.calls.backoff_s", return_value=0.0):
            await service.ask(CALL, CHAT | {"stream": stream, "max_tokens": 40})
        service.audit()

    run(tmp_path, test, SimulatedTransport(time_scale=0.0, faults={fault: 1.0}))
    call, attempts = collector.only(SERVER), collector.spans(CLIENT)
    assert attempts
    assert all(a.failed and a.parent == call.id for a in attempts)
    assert {a.said["error.type"] for a in attempts} <= {why, "no_route"}
    assert attempts[0].said["error.type"] == why
    assert call.failed
    assert call.said["walras.status"] == "error"
    assert call.said["error.type"]
    charged = sum(a.said["walras.charged_nano"] for a in attempts)
    assert charged == call.said["walras.charged_nano"]


def test_a_stream_that_breaks_after_its_hedge_was_called_off(tmp_path: Path, collector: Collector) -> None:
    """The call ended as the first attempt did, though the second was asked last."""

    class SlowThenCut(SimulatedTransport):
        async def send(self, sent: Request) -> Response:
            first, self.faults = not self.requests, {"cut": 1.0}
            await asyncio.sleep(0.2 if first else 30.0)
            return await super().send(sent)

    async def test(service: Live) -> None:
        service.calls.waits._expected_s = lambda use, stream: 0.03
        await service.ask(CALL, CHAT | {"model": "auto", "stream": True, "max_tokens": 40})
        service.audit()

    model = {"upstream": "s", "input_usd": 1, "output_usd": 4, "seconds": 0.03, "output_tokens": 40}
    settings = Economy.model_validate(
        {
            "value": 1.0,
            "lambda0": 1.0,
            "models": {
                "simulated-small": model | {"quality": 0.6},
                "simulated-medium": model | {"quality": 0.59},
            },
            "upstreams": {"s": {"kind": "simulated"}},
        }
    )
    run(tmp_path, test, SlowThenCut(time_scale=0.0), settings)
    call, attempts = collector.only(SERVER), collector.spans(CLIENT)
    told = {a.said["walras.use"]: a.said["error.type"] for a in attempts}
    assert told == {"simulated-small": "cut", "simulated-medium": "called_off"}
    assert call.said["error.type"] == "cut"
    assert call.said["walras.use"] == "simulated-small"


@pytest.mark.parametrize(("who", "why"), [("client", "client_gone"), ("service", "stopping")])
def test_a_stream_that_somebody_leaves(who: str, why: str, tmp_path: Path, collector: Collector) -> None:
    async def test(service: Live) -> None:
        body = json.dumps(CHAT | {"stream": True, "max_tokens": 4000}).encode()
        reader, writer = await asyncio.open_connection("127.0.0.1", service.port)
        writer.write(request(CALL, body, service.key))
        await reader.readuntil(b"data: ")
        if who == "service":
            for task in service.server.server_state.tasks:
                task.cancel()
            await reader.read()
        writer.close()
        await writer.wait_closed()
        async with asyncio.timeout(30.0):
            while service.calls.open:
                await asyncio.sleep(0.01)

    run(tmp_path, test, SimulatedTransport(time_scale=1.0, faults={"endless": 1.0}))
    call, attempt = collector.only(SERVER), collector.only(CLIENT)
    assert call.failed
    assert attempt.failed
    assert call.said["error.type"] == attempt.said["error.type"] == why
    assert attempt.said["gen_ai.response.finish_reasons"] == ["error"]
    assert call.said["walras.status"] == "cut"
    assert call.said["walras.charged_nano"] == attempt.said["walras.charged_nano"] > 0
    assert call.seconds >= attempt.seconds > 0


def test_a_stream_cut_by_its_budget(tmp_path: Path, collector: Collector) -> None:
    async def test(service: Live) -> None:
        key = service.make_key(budget_usd=0.0002).secret
        got = await service.ask(CALL, CHAT | {"stream": True, "max_tokens": 100_000}, key)
        assert got.status == 200

    run(tmp_path, test, SimulatedTransport(time_scale=0.0, faults={"endless": 1.0}))
    call, attempt = collector.only(SERVER), collector.only(CLIENT)
    assert call.failed
    assert call.said["error.type"] == attempt.said["error.type"] == "cut"
    assert call.said["gen_ai.usage.output_tokens"] > 0


def test_a_bug_behind_a_stream_is_told(tmp_path: Path, collector: Collector) -> None:
    async def test(service: Live) -> None:
        with patch.object(type(service.calls.board), "came_back", side_effect=ZeroDivisionError):
            got = await service.ask(CALL, CHAT | {"stream": True, "max_tokens": 40})
        assert got.status == 200
        assert b"internal" in got.body

    run(tmp_path, test)
    call, attempt = collector.only(SERVER), collector.only(CLIENT)
    assert call.failed
    assert call.said["error.type"] == "internal"
    assert not attempt.failed, "the upstream did what it was asked"


def test_a_call_that_is_refused(tmp_path: Path, collector: Collector) -> None:
    async def test(service: Live) -> None:
        got = await service.ask(CALL, CHAT | {"model": "auto"}, x_walras_value="1e-9")
        assert got.status == 402
        poor = service.make_key(budget_usd=0.0).secret
        assert (await service.ask(CALL, CHAT, poor)).status == 429

    run(tmp_path, test)
    worth, budget = collector.spans(SERVER)
    assert collector.spans(CLIENT) == []
    for span, code, status in ((worth, "not_worth_its_price", 402), (budget, "insufficient_quota", 429)):
        assert span.failed
        assert span.said["error.type"] == code
        assert span.said["http.response.status_code"] == status
        assert span.said["walras.status"] == "refused"
        assert "walras.use" not in span.said
    ((_, told),) = worth.events
    assert max(u["net_usd"] for u in json.loads(told["walras.uses"])) < 0


def test_a_collector_that_is_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with listening(lambda handler, body: None) as url:
        pass
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", url)
    monkeypatch.setenv("OTEL_BSP_SCHEDULE_DELAY", "10")
    monkeypatch.setattr(tracing, "FLUSH_S", 0.2)

    async def test(service: Live) -> None:
        got = await asyncio.gather(*(service.ask(CALL, CHAT) for _ in range(30)))
        assert {g.status for g in got} == {200}
        assert len(service.audit()) == 30

    run(tmp_path, test)


def test_what_nobody_takes_is_dropped(
    tmp_path: Path, collector: Collector, monkeypatch: pytest.MonkeyPatch
) -> None:
    collector.hangs = threading.Event()
    monkeypatch.setenv("OTEL_BSP_MAX_QUEUE_SIZE", "16")
    monkeypatch.setenv("OTEL_BSP_MAX_EXPORT_BATCH_SIZE", "16")

    async def test(service: Live) -> None:
        got = await asyncio.gather(*(service.ask(CALL, CHAT) for _ in range(60)))
        assert {g.status for g in got} == {200}
        assert collector.hangs is not None
        collector.hangs.set()

    run(tmp_path, test)
    assert 16 <= len(collector.spans()) <= 32, "a batch that hung, and a full queue"


@pytest.mark.parametrize("step", ["__init__", "asking", "answered", "end"])
def test_a_bug_in_tracing_harms_no_call(
    step: str, tmp_path: Path, collector: Collector, caplog: pytest.LogCaptureFixture
) -> None:
    inner = {"asking": "_tell_uses", "answered": "_now", "end": "_of_call"}.get(step, step)

    async def test(service: Live) -> None:
        with patch.object(tracing.Trace, inner, side_effect=ZeroDivisionError):
            for stream in (False, True):
                assert (await service.ask(CALL, CHAT | {"stream": stream})).status == 200
        assert {e.status for e in service.audit()} == {"ok"}

    run(tmp_path, test)
    assert "ZeroDivisionError" in caplog.text


# --- what the standard variables and headers say --------------------------------------------------------------------------


def test_names_and_samplers_are_the_sdks(
    tmp_path: Path, collector: Collector, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OTEL_SERVICE_NAME", "gate")
    monkeypatch.setenv("OTEL_TRACES_SAMPLER", "parentbased_always_off")

    async def test(service: Live) -> None:
        parents = {
            "sampled": f"00-{TRACE}-{SPAN}-01",
            "not": f"00-{TRACE}-{SPAN}-00",
            "odd": f"00-{'0' * 32}-x-01",
        }
        for session, parent in parents.items():
            got = await service.ask(CALL, CHAT, traceparent=parent, x_walras_session=session)
            assert got.status == 200

    run(tmp_path, test)
    span = collector.only(SERVER)
    assert span.said["gen_ai.conversation.id"] == "sampled"
    assert span.service["service.name"] == "gate"
    assert collector.only(CLIENT).parent == span.id


def test_names_of_clients_are_sent_as_they_are(tmp_path: Path, collector: Collector) -> None:
    async def test(service: Live) -> None:
        sent = request(
            CALL, json.dumps(CHAT).encode(), service.key, x_walras_session="séance", x_walras_class="c" * 256
        )
        assert (await raw(service.port, sent)).status == 200
        body = {"model": EMBEDDING.name, "input": "hello"}
        assert (await service.ask("/v1/embeddings", body)).status == 200

    run(tmp_path, test)
    chat, embedding = collector.spans(SERVER)
    assert chat.said["gen_ai.conversation.id"] == "séance"
    assert chat.said["walras.class"] == "c" * 256
    assert embedding.name == f"embeddings {EMBEDDING.name}"
    assert embedding.said["gen_ai.operation.name"] == "embeddings"


@pytest.mark.parametrize("fault", ["none", "dead"])
def test_an_address_is_told_where_it_is_known(fault: str, tmp_path: Path, collector: Collector) -> None:
    base = serve.demo_economy(Economy()).model_dump()
    base["upstreams"]["simulated"]["regions"] = {"eu": "http://eu.invalid:81/v1"}
    transport = SimulatedTransport(time_scale=0.0, faults={"dead": 1.0} if fault == "dead" else {})

    async def test(service: Live) -> None:
        for _ in range(2):
            await service.ask(CALL, CHAT)

    with patch("walras.gateway.calls.backoff_s", return_value=0.0):
        run(tmp_path, test, transport, Economy.model_validate(base))
    places = {(s.said.get("server.address"), s.said.get("server.port")) for s in collector.spans(CLIENT)}
    known = {("simulated.invalid", 80), ("eu.invalid", 81)}
    assert places == (known if fault == "none" else {(None, None)})
