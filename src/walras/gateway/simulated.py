"""SIMULATED providers: models that cost, take time and answer, but do not think. For trying things out, and for tests.

`SimulatedTransport` stands where `HttpTransport` does and answers in OpenAI's API without a socket, so that all else is
the real road. Its answers say that they are simulated; their lengths are heavy-tailed, and their usage is honest unless
a fault is asked for.
"""

from __future__ import annotations

import asyncio
import base64
import math
import struct
import zlib
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass
from random import Random
from typing import Any, Literal

import msgspec

from walras.gateway import chat
from walras.gateway.transport import Cut, Origin, Request, Response, TimedOut, Unreachable
from walras.gateway.upstream import Served, TokenPrices, UpstreamSettings
from walras.gateway.wire import Json, Usage, sse, to_json

Fault = Literal[
    "dead",
    "500",
    "429",
    "401",
    "slow",
    "bad-json",
    "wrong-usage",
    "no-usage",
    "cut",
    "endless",
    "stream-error",
]
"""slow: never answers. cut: ends in the middle. endless: a stream that goes on until it is closed."""

WORDS = ("value", "price", "budget", "task", "token", "answer", "latency", "risk", "market", "surplus")
CREATED = 1_700_000_000


@dataclass(frozen=True, slots=True)
class SimulatedModel:
    """One simulated model."""

    name: str
    prices: TokenPrices
    first_byte_s: float
    """Median seconds until the answer begins."""
    token_s: float
    """Seconds per output token."""
    skill: float
    """Log-odds of a right answer to the easiest task."""
    tokens: float
    """Median length of an answer, in tokens."""
    reasoning: float = 0.0
    """Share of the tokens that is reasoning."""


MODELS = (
    SimulatedModel(
        "simulated-small",
        TokenPrices(input=100_000_000, output=400_000_000, cached_input=25_000_000),
        0.2, 0.004, 1.0, 120.0,
    ),
    SimulatedModel(
        "simulated-medium",
        TokenPrices(input=800_000_000, output=3_200_000_000, cached_input=200_000_000),
        0.4, 0.010, 2.5, 160.0, 0.2,
    ),
    SimulatedModel(
        "simulated-large",
        TokenPrices(input=4_000_000_000, output=20_000_000_000, cached_input=400_000_000),
        0.8, 0.020, 4.0, 240.0, 0.5,
    ),
)  # fmt: skip
EMBEDDING = Served(
    name="simulated-embeddings", prices=TokenPrices(input=20_000_000, output=0), first_byte_s=0.05
)
TAIL = 1.0
"""σ of the lognormal law of lengths: the mean is 1.6 medians, one answer in a hundred is longer than 10."""


def simulated_settings(name: str = "simulated") -> UpstreamSettings:
    """Settings of the provider that serves the simulated models; give its `Upstream` a `SimulatedTransport`."""
    served = [Served(name=m.name, prices=m.prices, first_byte_s=m.first_byte_s) for m in MODELS]
    return UpstreamSettings(
        name=name, kind="simulated", base_url="http://simulated.invalid/v1", models=(*served, EMBEDDING)
    )


def difficulty(text: str) -> float:
    """How hard a prompt is, in [0, 1): drawn from its text, so that all models find the same prompts hard."""
    return zlib.crc32(text.encode()) / 2**32


def quality(model: SimulatedModel, text: str) -> float:
    """Probability that `model` answers `text` rightly."""
    return 1 / (1 + math.exp(6 * difficulty(text) - model.skill - 1))


class SimulatedTransport:
    """A `Transport` to simulated models. The same seed and requests in the same order give the same answers."""

    def __init__(
        self, seed: int = 0, *, time_scale: float = 1.0, faults: Mapping[Fault, float] | None = None
    ) -> None:
        self._rng = Random(seed)
        self._time_scale = time_scale
        self.faults: Mapping[Fault, float] = faults or {}
        """Probability of each fault, per request."""
        self.requests = 0
        self.open = 0
        """Answers being read."""

    async def send(self, request: Request) -> Response:
        """Answers as a provider would; see `Transport`."""
        self.requests += 1
        origin, seconds = request.endpoint.origin, request.timeouts
        fault = self._fault()
        if fault == "dead":
            raise Unreachable(origin, "SIMULATED fault")
        if fault == "slow":
            limit = min(seconds.first_byte, seconds.total)
            await asyncio.sleep(limit)
            raise TimedOut(origin, "first byte", limit)
        if fault in ("500", "429", "401"):
            return self._error(request, int(fault), "SIMULATED fault")
        target = request.endpoint.target.partition("?")[0]
        if target.endswith("/models"):
            data = [{"id": served.name, "object": "model"} for served in (*MODELS, EMBEDDING)]
            return self._json(request, {"object": "list", "data": data})
        asked: Any = msgspec.json.decode(request.body)
        if target.endswith("/embeddings"):
            await self._wait(EMBEDDING.first_byte_s)
            return self._json(request, _embeddings(asked))
        model = next((m for m in MODELS if m.name == asked["model"]), None)
        if model is None:
            return self._error(request, 404, "no such SIMULATED model")
        return await self._chat(request, model, asked, fault)

    async def aclose(self) -> None:
        """Nothing is held open."""

    def _fault(self) -> Fault | None:
        draw = self._rng.random()
        for fault, probability in self.faults.items():
            draw -= probability
            if draw < 0:
                return fault
        return None

    def _json(self, request: Request, body: Json) -> Response:
        return _Answer(self, request, 200, {"content-type": "application/json"}, _once(to_json(body)))

    def _error(self, request: Request, status: int, message: str) -> Response:
        error = {"message": message, "type": "simulated_error", "param": None, "code": None}
        headers = {"content-type": "application/json"} | ({"retry-after": "1"} if status == 429 else {})
        return _Answer(self, request, status, headers, _once(to_json({"error": error})))

    async def _chat(
        self, request: Request, model: SimulatedModel, asked: Json, fault: Fault | None
    ) -> Response:
        try:
            text = _prompt(asked["messages"])
            said = _said(model, asked, text, self._rng, self.requests)
        except (AttributeError, KeyError, TypeError, IndexError):
            return self._error(
                request, 400, "the request does not have the shape its API documents (SIMULATED)"
            )
        headers = {"content-type": "application/json", "x-simulated-quality": f"{quality(model, text):.4f}"}
        await self._wait(model.first_byte_s * self._rng.lognormvariate(0, 0.3))
        if asked.get("stream"):
            headers["content-type"] = "text/event-stream"
            return _Answer(
                self, request, 200, headers, self._events(request.endpoint.origin, model, asked, said, fault)
            )
        await self._wait(model.token_s * said.usage.completion)
        choice = {"index": 0, "message": said.message(), "logprobs": None, "finish_reason": said.finish}
        whole = _head(model, said, "chat.completion") | {
            "choices": [choice],
            "usage": _table(said.usage, fault),
        }
        body = to_json(whole)
        if fault == "bad-json":
            body = body[: len(body) // 2]
        chunks = _cut(body, request.endpoint.origin) if fault == "cut" else _once(body)
        return _Answer(self, request, 200, headers, chunks)

    async def _events(
        self, origin: Origin, model: SimulatedModel, asked: Json, said: _Said, fault: Fault | None
    ) -> AsyncIterator[bytes]:
        head = _head(model, said, "chat.completion.chunk")

        def chunk(delta: Json, finish: str | None = None) -> bytes:
            return sse(head | {"choices": [{"index": 0, "delta": delta, "finish_reason": finish}]})

        await self._wait(model.token_s * said.usage.reasoning)
        yield chunk({"role": "assistant", "content": ""})
        deltas = said.deltas()
        for at, delta in enumerate(deltas):
            if at == len(deltas) // 2:
                if fault == "cut":
                    raise Cut(origin)
                if fault == "bad-json":
                    yield b'data: {"choices": [{\n\n'
                if fault == "stream-error":
                    yield sse({"error": {"message": "SIMULATED fault", "type": "simulated_error"}})
            await self._wait(model.token_s)
            yield chunk(delta)
        while fault == "endless":
            await self._wait(model.token_s)
            await asyncio.sleep(0)
            yield chunk({"content": " endless"})
        yield chunk({}, said.finish)
        if (asked.get("stream_options") or {}).get("include_usage"):
            yield sse(head | {"choices": [], "usage": _table(said.usage, fault)})
        yield b"data: [DONE]\n\n"

    async def _wait(self, seconds: float) -> None:
        if self._time_scale:
            await asyncio.sleep(seconds * self._time_scale)


def _embeddings(asked: Json) -> Json:
    """Vectors drawn from the texts; the same text has the same vector."""
    given = asked["input"] if isinstance(asked["input"], list) else [asked["input"]]
    data: list[Json] = []
    for index, text in enumerate(given):
        rng = Random(str(text))
        vector = [rng.gauss(0, 1) for _ in range(8)]
        vector = [x / math.hypot(*vector) for x in vector]
        packed = base64.b64encode(struct.pack("<8f", *vector)).decode()
        shown = packed if asked.get("encoding_format") == "base64" else vector
        data.append({"object": "embedding", "index": index, "embedding": shown})
    tokens = sum(_tokens(str(text)) for text in given)
    usage = {"prompt_tokens": tokens, "total_tokens": tokens}
    return {"object": "list", "model": asked["model"], "data": data, "usage": usage}


class _Answer:
    """A `Response` from an iterator."""

    def __init__(
        self,
        transport: SimulatedTransport,
        request: Request,
        status: int,
        headers: Mapping[str, str],
        chunks: AsyncIterator[bytes],
    ) -> None:
        self.status, self.headers = status, headers
        self._transport, self._request, self._chunks = transport, request, chunks
        self._ends = asyncio.get_running_loop().time() + request.timeouts.total
        self._open, self._reading = True, False
        transport.open += 1

    def __aiter__(self) -> AsyncIterator[bytes]:
        return self

    async def __anext__(self) -> bytes:
        if not self._open:
            raise Cut(self._request.endpoint.origin)
        if asyncio.get_running_loop().time() > self._ends:
            total = self._request.timeouts.total
            raise TimedOut(self._request.endpoint.origin, "total", total)
        self._reading = True
        try:
            return await anext(self._chunks)
        finally:
            self._reading = False

    async def aclose(self) -> None:
        if self._open:
            self._open = False
            self._transport.open -= 1
            if self._reading:  # from another task, which gets no more
                return
            # An iterator need not have `aclose`; these are generators, all of them.
            await self._chunks.aclose()  # type: ignore[attr-defined]


async def _once(body: bytes) -> AsyncIterator[bytes]:
    yield body


async def _cut(body: bytes, origin: Origin) -> AsyncIterator[bytes]:
    yield body[: len(body) // 2]
    raise Cut(origin)


def _head(model: SimulatedModel, said: _Said, kind: str) -> Json:
    return {
        "id": f"chatcmpl-simulated-{said.number}",
        "object": kind,
        "created": CREATED,
        "model": model.name,
    }


def _table(usage: Usage, fault: Fault | None) -> Json | None:
    if fault == "no-usage":
        return None
    table = chat.usage_table(usage)
    return table | {"prompt_tokens": -1, "completion_tokens": 10**12} if fault == "wrong-usage" else table


# What they say.


@dataclass(frozen=True, slots=True)
class _Said:
    """One answer: words, or calls of tools."""

    words: tuple[str, ...]
    calls: tuple[tuple[str, str], ...]
    """(name, arguments)."""
    finish: str
    usage: Usage
    number: int
    """Of the request: clients tell answers and calls apart by their ids."""

    def message(self) -> Json:
        """As the message of a whole answer."""
        said: Json = {"role": "assistant", "content": "".join(self.words) or None, "refusal": None}
        calls = [{k: v for k, v in call.items() if k != "index"} for call in self._tool_calls()]
        return said | ({"tool_calls": calls} if calls else {})

    def deltas(self) -> list[Json]:
        """As the deltas of a stream, one for each token or call."""
        return [{"content": word} for word in self.words] + [{"tool_calls": [c]} for c in self._tool_calls()]

    def _tool_calls(self) -> list[Json]:
        return [
            {
                "index": k,
                "id": f"call_simulated_{self.number}_{k}",
                "type": "function",
                "function": {"name": n, "arguments": a},
            }
            for k, (n, a) in enumerate(self.calls)
        ]


def _said(model: SimulatedModel, asked: Json, text: str, rng: Random, number: int) -> _Said:
    """An answer: a call where tools are offered and none has answered yet, JSON where asked for, else words."""
    caps = [asked[n] for n in ("max_tokens", "max_completion_tokens") if asked.get(n)]
    cap = min(caps) if caps else 10**6
    drawn = max(1, round(model.tokens * rng.lognormvariate(0, TAIL)))
    length = min(drawn, cap)
    reasoning = int(length * model.reasoning)
    prompt = _tokens(text) + 4 * len(asked["messages"])
    tools, shape = asked.get("tools") or [], asked.get("response_format") or {}
    if tools and asked.get("tool_choice") != "none" and asked["messages"][-1].get("role") != "tool":
        function = _chosen(tools, asked.get("tool_choice"))
        arguments = to_json(_example(function.get("parameters") or {}, text)).decode()
        usage = Usage(prompt, 0, 0, _tokens(arguments), 0)
        return _Said((), ((function["name"], arguments),), "tool_calls", usage, number)
    if shape.get("type") in ("json_object", "json_schema"):
        schema = (shape.get("json_schema") or {}).get("schema") or {
            "type": "object",
            "properties": {"simulated": {}},
        }
        answer = to_json(_example(schema, text)).decode()
        return _Said((answer,), (), "stop", Usage(prompt, 0, 0, _tokens(answer), 0), number)
    opening = ["SIMULATED ", "answer ", "of ", f"{model.name}: "]
    words = opening + [f"{rng.choice(WORDS)} " for _ in range(max(0, length - reasoning - len(opening)))]
    words = words[: length - reasoning]
    return _Said(
        tuple(words),
        (),
        "length" if drawn > cap else "stop",
        Usage(prompt, 0, 0, len(words), reasoning),
        number,
    )


def _chosen(tools: list[Json], choice: Any) -> Json:
    named = choice["function"]["name"] if isinstance(choice, dict) and "function" in choice else None
    functions: list[Json] = [tool["function"] for tool in tools if "function" in tool]
    return next((f for f in functions if f["name"] == named), functions[0])


def _example(schema: Json, text: str) -> Any:
    """A value of a JSON schema; strings echo the prompt."""
    if schema.get("enum"):
        return schema["enum"][0]
    match schema.get("type"):
        case "object":
            return {name: _example(inner, text) for name, inner in (schema.get("properties") or {}).items()}
        case "array":
            return [_example(schema.get("items") or {}, text)]
        case "integer" | "number":
            return 1
        case "boolean":
            return True
        case _:
            return f"SIMULATED {text[-100:]}".strip()


def _prompt(messages: list[Json]) -> str:
    texts: list[str] = []
    for message in messages:
        content = message.get("content")
        if isinstance(content, str):
            texts.append(content)
        elif isinstance(content, list):
            texts += [part["text"] for part in content if isinstance(part.get("text"), str)]
    return "\n".join(texts)


def _tokens(text: str) -> int:
    return max(1, len(text) // 4)
