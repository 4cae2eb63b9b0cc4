"""Spans of calls, for OpenTelemetry: where a call's time and money went, next to what its caller and its provider say.

    SERVER  chat auto                one for each call that could be read
     └ CLIENT  chat first-mini-2026  one for each attempt at an upstream, which is told its `traceparent`

Attributes are named by OpenTelemetry's conventions for generative AI (semantic-conventions-genai, docs/gen-ai/
client-inference.md; still in development) and, for what these have no word for, under `walras.`. Neither prompts nor
answers nor keys are in a span. What is sent where is said by the variables that OpenTelemetry's SDK reads.

Spans leave in batches from a thread of the SDK. Its queue is bounded: when nobody takes spans, the oldest are dropped.
This module is loaded only where spans are sent.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import wraps
from typing import Any, Concatenate, ParamSpec, TypeVar
from urllib.parse import urlsplit

from walras.errors import SettingsError
from walras.gateway.calls import SHOWN
from walras.gateway.http import Gone, HttpError, log_bug
from walras.gateway.runs import Attempt, Run
from walras.gateway.upstream import Answer, Failure, Upstream, UpstreamSettings
from walras.gateway.wire import RequestError, to_json
from walras.ledger import Entry

try:
    from opentelemetry.context import Context
    from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
    from opentelemetry.sdk.resources import SERVICE_NAME, Resource
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.export import BatchSpanProcessor
    from opentelemetry.trace import Span, SpanKind, Status, StatusCode, set_span_in_context
    from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator
except ImportError as error:
    raise SettingsError(
        "spans cannot be sent: OpenTelemetry's SDK and its OTLP exporter over HTTP are not installed",
        key="OTEL_EXPORTER_OTLP_ENDPOINT",
        hint="pip install 'walras[otel]', or unset it",
    ) from error

FLUSH_S = 2.0
"""Most seconds that spans are waited for when the service stops."""
PROTOCOL = "http/protobuf"
TERMS = ("value", "compute", "congestion", "latency", "risk", "net")
CHARACTERS = 256
"""Most of a name that an attribute holds."""

Headers = tuple[tuple[str, str], ...]
_Given = ParamSpec("_Given")
_Got = TypeVar("_Got")
_Attributes = dict[str, Any]

_w3c = TraceContextTextMapPropagator()


class Tracer:
    """Makes the spans of calls and sends them, as OpenTelemetry's environment variables say."""

    def __init__(self, upstreams: Mapping[str, Upstream]) -> None:
        """Starts the thread that sends.

        Raises:
            SettingsError: a variable says what cannot be done.
        """
        for name in ("OTEL_EXPORTER_OTLP_TRACES_PROTOCOL", "OTEL_EXPORTER_OTLP_PROTOCOL"):
            if (said := os.environ.get(name, "").strip()) not in ("", PROTOCOL):
                hint = f"set it to {PROTOCOL}; collectors take that at port 4318"
                raise SettingsError(f"spans cannot be sent by '{said}'", key=name, hint=hint)
        resource = Resource.create()
        if str(resource.attributes[SERVICE_NAME]).startswith("unknown_service"):
            resource = resource.merge(Resource({SERVICE_NAME: "walras"}))
        try:
            # Its own hook at exit would wait for half a minute.
            self._provider = TracerProvider(resource=resource, shutdown_on_exit=False)
            self._provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter()))
        except ValueError as error:
            raise SettingsError(str(error), key="OTEL_*") from error
        self.spans = self._provider.get_tracer("walras.gateway")
        self.upstreams = upstreams
        self.places = {name: _places(upstream.settings) for name, upstream in upstreams.items()}
        """Host and port of each region of each upstream."""

    def begin(self, run: Run) -> Trace | None:
        """The trace of a call that has just been read."""
        try:
            return Trace(self, run)
        except Exception as error:
            log_bug(error)
            return None

    def close(self) -> None:
        """Send what is left; a collector that does not take it holds nobody for longer than `FLUSH_S`."""
        sending = threading.Thread(target=self._provider.shutdown, daemon=True)
        sending.start()
        sending.join(FLUSH_S)


def _harmless(
    step: Callable[Concatenate[Trace, _Given], _Got],
) -> Callable[Concatenate[Trace, _Given], _Got | None]:
    """A bug in a trace is logged, and its call goes on."""

    @wraps(step)
    def safe(trace: Trace, /, *args: _Given.args, **kwargs: _Given.kwargs) -> _Got | None:
        try:
            return step(trace, *args, **kwargs)
        except Exception as error:
            log_bug(error)
            return None

    return safe


@dataclass(slots=True)
class _Client:
    """The span of one attempt, and what became of it."""

    span: Span
    attempt: Attempt
    answer: Answer | None = None
    failure: Failure | RequestError | None = None
    ended_ns: int | None = None


class Trace:
    """The spans of one call, told what happens to it. They are filled in when it has ended."""

    __slots__ = (
        "_call", "_clients", "_inside", "_run", "_server", "_tracer", "entry",
    )  # fmt: skip

    def __init__(self, tracer: Tracer, run: Run) -> None:
        ask = run.ask
        self._tracer, self._run = tracer, run
        self._call: _Attributes = {
            "gen_ai.operation.name": "embeddings" if ask.call.dialect == "embeddings" else "chat"
        }
        if ask.session:
            self._call["gen_ai.conversation.id"] = ask.session
        if ask.call.stream:
            self._call["gen_ai.request.stream"] = True
        said = {name: run.request.header(name.encode()) for name in ("traceparent", "tracestate")}
        caller = _w3c.extract({name: value for name, value in said.items() if value})
        self._server = self._start(ask.call.model or "auto", SpanKind.SERVER, caller, ask.at_ns)
        self._inside = set_span_in_context(self._server)
        self.entry: Entry | None = None
        """What the ledger is told."""
        self._clients: list[_Client] = []
        """In the order in which they were asked; a hedge runs beside the one before it."""

    def _start(self, model: str, kind: SpanKind, parent: Context, at_ns: int) -> Span:
        model = model[:CHARACTERS]
        name = f"{self._call['gen_ai.operation.name']} {model}"
        known = self._call | {"gen_ai.request.model": model}
        return self._tracer.spans.start_span(name, parent, kind, known, start_time=at_ns)

    def _now(self) -> int:
        return self._run.ask.at_ns + round(self._run.ask.elapsed * 1e9)

    @_harmless
    def asking(self, attempt: Attempt) -> Headers:
        """An attempt goes out now: the headers that tell its upstream which span it belongs to."""
        if not self._server.is_recording():
            return _traceparent(self._server)
        now, upstream = self._now(), self._tracer.upstreams[attempt.upstream]
        model = upstream.models[attempt.use].upstream_model or attempt.use
        span = self._start(model, SpanKind.CLIENT, self._inside, now)
        self._clients.append(_Client(span, attempt))
        self._tell_uses(now)
        return _traceparent(span)

    @_harmless
    def answered(self, attempt: Attempt, answer: Answer) -> None:
        """The attempt's answer has come to its end, or was ended."""
        for client in self._clients:
            if client.attempt is attempt:
                client.answer, client.ended_ns = answer, client.ended_ns or self._now()

    @_harmless
    def failed(self, attempt: Attempt, failure: Failure | RequestError) -> None:
        """The attempt has failed."""
        for client in self._clients:
            if client.attempt is attempt:
                client.failure, client.ended_ns = failure, self._now()

    @_harmless
    def end(self, error: BaseException | None) -> None:
        """The call has ended and its client been told; with what was raised, if anything was."""
        run, span = self._run, self._server
        run.trace = None  # or the two would hold each other until a collection
        if not span.is_recording():
            return
        now, why = self._now(), self._why(error)
        for client in self._clients:
            self._end_attempt(client, why)
        if not run.attempts:
            self._tell_uses(now)
        found = self._of_call()
        if isinstance(error, HttpError):
            found["http.response.status_code"] = error.status
        span.set_attributes(found)
        _end_badly(span, why)
        span.end(now)

    def _why(self, error: BaseException | None) -> str | None:
        """Why the call did not end well: the code its client was told, or a word of our own."""
        match error:
            case None:
                status = "ok" if self.entry is None else self.entry.status
                asked = (c.failure for c in self._clients if c.attempt is self._run.asked)
                own = _reason(next(asked, None)) or ("cut" if status == "cut" else "internal")
                return None if status == "ok" else own
            case HttpError():
                return error.code
            case Gone():
                return "client_gone"
            case Exception():
                return "internal"
            case _:  # cancelled
                return "stopping"

    def _end_attempt(self, client: _Client, why: str | None) -> None:
        """Fill in an attempt and end it. `why`: what the call ended with, if badly."""
        serves = client.attempt is self._run.asked
        answer = client.answer or (self._run.answer if serves else None)
        found = self._of_attempt(client, answer)
        if serves and answer is not None and self.entry is not None:
            found |= self._of_answer(answer, self.entry)
        client.span.set_attributes(found)
        whole = answer is not None and answer.finished
        cut = (why if serves else None) or "called_off"
        _end_badly(client.span, _reason(client.failure) or (None if whole else cut))
        client.span.end(client.ended_ns or self._now())

    # --- what spans say -----------------------------------------------------------------------------------------------

    def _of_call(self) -> _Attributes:
        run, ask, entry = self._run, self._run.ask, self.entry
        found: _Attributes = {
            "walras.request_id": ask.request_id,
            "walras.tenant": ask.key.tenant,
            "walras.value_usd": ask.value,
        }
        if ask.task_class:
            found["walras.class"] = ask.task_class
        if run.decision is not None:
            found["walras.prices_version"] = str(run.decision.version)
        if run.chosen is not None and run.asked is not None:
            found |= {
                "gen_ai.provider.name": self._tracer.upstreams[run.asked.upstream].settings.kind,
                "gen_ai.response.model": run.chosen.use,
                "walras.use": run.chosen.use,
                "walras.surplus_usd": run.chosen.net,
            }
        if entry is not None:
            found |= _usage(entry) | {
                "walras.status": entry.status,
                "walras.settled": entry.settled,
                "walras.reserved_nano": entry.reserved_nano,
                "walras.charged_nano": entry.charged_nano,
            }
            if entry.http_status is not None:
                found["http.response.status_code"] = entry.http_status
        return found

    def _of_attempt(self, client: _Client, answer: Answer | None) -> _Attributes:
        call, attempt, failure = self._run.ask.call, client.attempt, client.failure
        found: _Attributes = {
            "gen_ai.provider.name": self._tracer.upstreams[attempt.upstream].settings.kind,
            "walras.use": attempt.use,
            "walras.upstream": attempt.upstream,
            "walras.reserved_nano": attempt.held,
            "walras.charged_nano": attempt.charged,
        }
        if call.choices != 1:
            found["gen_ai.request.choice.count"] = call.choices
        places = self._tracer.places[attempt.upstream]
        if answer is not None or len(places) == 1:
            region = next(iter(places)) if answer is None else answer.region
            found["server.address"], found["server.port"] = places[region]
        if isinstance(failure, Failure) and failure.status is not None:
            found["http.response.status_code"] = failure.status
        return found

    def _of_answer(self, answer: Answer, entry: Entry) -> _Attributes:
        """Of the last attempt: its tokens are the entry's."""
        call, found, usage = self._run.ask.call, _usage(entry), answer.usage
        if entry.settled == "exact" and usage is not None and usage.cache_write:
            found["gen_ai.usage.cache_write.input_tokens"] = usage.cache_write
        if call.stream and entry.seconds_to_first is not None:
            found["gen_ai.response.time_to_first_chunk"] = entry.seconds_to_first
        told = answer.reply or answer.stream
        if told is not None and call.choices == 1 and call.dialect != "embeddings":
            found["gen_ai.response.finish_reasons"] = [told.finish or "error"]
        return found

    def _tell_uses(self, now: int) -> None:
        """The decision taken apart, as an event: a JSON list, the best use first."""
        decision = self._run.decision
        if decision is None:
            return
        # As lists these made a quarter of what a trace costs, and no store of traces looks into lists either.
        uses = [
            {"use": a.use} | {f"{term}_usd": getattr(a, term) for term in TERMS}
            for a in decision.ranked[:SHOWN]
        ]
        self._server.add_event("walras.decision", {"walras.uses": to_json(uses).decode()}, now)


def _places(settings: UpstreamSettings) -> dict[str, tuple[str, int]]:
    """Host and port by region; of the base URL, by ""."""
    regions = ({"": settings.base_url} if settings.base_url else {}) | settings.regions
    parts = {region: urlsplit(url) for region, url in regions.items()}
    return {
        region: (p.hostname or "", p.port or (443 if p.scheme == "https" else 80))
        for region, p in parts.items()
    }


def _traceparent(span: Span) -> Headers:
    own = span.get_span_context()
    return (("traceparent", f"00-{own.trace_id:032x}-{own.span_id:016x}-{own.trace_flags:02x}"),)


def _usage(entry: Entry) -> _Attributes:
    found = {
        "gen_ai.usage.input_tokens": entry.input_tokens,
        "gen_ai.usage.cache_read.input_tokens": entry.cached_input_tokens,
        "gen_ai.usage.output_tokens": entry.output_tokens,
        "gen_ai.usage.reasoning.output_tokens": entry.reasoning_tokens,
    }
    return {name: tokens for name, tokens in found.items() if tokens is not None}


def _reason(failure: Failure | RequestError | None) -> str | None:
    """One of few words for why an attempt failed."""
    if failure is None:
        return None
    return failure.reason.replace(" ", "_") if isinstance(failure, Failure) else "unsuited"


def _end_badly(span: Span, why: str | None) -> None:
    if why is not None:
        span.set_attribute("error.type", why)
        span.set_status(Status(StatusCode.ERROR))
