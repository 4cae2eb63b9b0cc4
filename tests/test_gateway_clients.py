"""Unchanged clients against the running service: openai, anthropic, langchain, pydantic-ai, openai-agents, litellm, curl.

Each is used as its own documentation shows, with nothing changed but the base URL and the key. Names are not resolved during
these tests, so that a client that calls home is found out.
"""

from __future__ import annotations

import asyncio
import base64
import json
import shutil
import socket
import subprocess
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest
from pydantic import BaseModel, TypeAdapter

from gateways import Service, running

SMALL = "simulated-small"
EMBEDDINGS = "simulated-embeddings"
HELLO = [{"role": "user", "content": "hello"}]
SCHEMA = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
WEATHER = {"name": "weather", "description": "The weather of a city", "parameters": SCHEMA}
TOOLS = [{"type": "function", "function": WEATHER}]
POOR_NANO = 1_000
"""A millionth of a dollar: too little for any request."""
PNG = "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNk+M9QDwADhgGAWjR9awAAAABJRU5ErkJggg=="
DATA_URL = f"data:image/png;base64,{PNG}"


class Place(BaseModel):
    city: str
    count: int


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    with running(tmp_path_factory.mktemp("clients")) as service:
        yield service


@pytest.fixture(scope="module")
def poor(service: Service) -> str:
    """A key whose budget is too small for any request."""
    return service.make_key("poor", budget_nano=POOR_NANO, period="day")


@pytest.fixture(autouse=True)
def offline(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """What users switch off too, and a check that nothing else looks for the network."""
    for name, value in (
        ("OPENAI_AGENTS_DISABLE_TRACING", "1"),
        ("LITELLM_LOCAL_MODEL_COST_MAP", "True"),
        ("LANGSMITH_TRACING", "false"),
    ):
        monkeypatch.setenv(name, value)
    wanted: list[str] = []
    resolve = socket.getaddrinfo

    def only_loopback(host: Any, *args: Any, **options: Any) -> Any:
        if host not in ("127.0.0.1", "localhost", None):
            wanted.append(str(host))
            raise socket.gaierror(socket.EAI_NONAME, "no names in these tests")
        return resolve(host, *args, **options)

    monkeypatch.setattr(socket, "getaddrinfo", only_loopback)
    yield
    assert wanted == []


def get(service: Service, path: str) -> Any:
    asked = urllib.request.Request(service.url + path, headers={"authorization": f"Bearer {service.key}"})
    with urllib.request.urlopen(asked, timeout=10) as answer:
        return json.load(answer)


# --- openai-python ------------------------------------------------------------------------------------------------------


@pytest.fixture
def client(service: Service) -> Iterator[Any]:
    import openai

    with openai.OpenAI(base_url=f"{service.url}/v1", api_key=service.key) as client:
        yield client


def test_openai_answers_and_the_ledger_knows_the_request(service: Service, client: Any) -> None:
    said = client.chat.completions.create(model="auto", messages=HELLO, max_tokens=8)
    raw = client.chat.completions.with_raw_response.create(
        model=SMALL, messages=HELLO, max_completion_tokens=8
    )
    named = raw.parse()

    assert said.choices[0].message.content.startswith("SIMULATED answer")
    assert said.usage.total_tokens == said.usage.prompt_tokens + said.usage.completion_tokens
    assert said.usage.completion_tokens == 8
    assert named.choices[0].finish_reason == "length"
    assert named.model == SMALL
    assert named.id != said.id
    assert raw.headers["x-walras-use"] == SMALL
    assert float(raw.headers["x-walras-surplus"]) > 0
    kept = {row["request_id"]: row for row in get(service, "/v1/requests?limit=20")["data"]}
    assert kept[said._request_id]["model"] == "auto"
    assert kept[named._request_id]["output_tokens"] == 8


def test_openai_streams_piece_by_piece(client: Any) -> None:
    began = time.monotonic()
    first = None
    chunks = []
    with client.chat.completions.create(
        model=SMALL, messages=HELLO, max_tokens=64, stream=True, stream_options={"include_usage": True},
        extra_headers={"x-walras-class": "long"},
    ) as stream:  # fmt: skip
        for chunk in stream:
            if first is None and chunk.choices and chunk.choices[0].delta.content:
                first = time.monotonic() - began
            chunks.append(chunk)
    text = [c.choices[0].delta.content or "" for c in chunks if c.choices]
    usage = chunks[-1].usage

    assert chunks[-1].choices == []
    assert sum(1 for piece in text if piece) == usage.completion_tokens
    assert chunks[-2].choices[0].finish_reason in ("stop", "length")
    # The simulated model takes 4 ms a token: what came in one piece at the end would have no first one before.
    assert first is not None
    assert time.monotonic() - began - first >= 0.001 * (usage.completion_tokens - 1)


def test_openai_stream_has_no_usage_unless_asked_for(client: Any) -> None:
    with client.chat.completions.create(model=SMALL, messages=HELLO, max_tokens=4, stream=True) as stream:
        chunks = list(stream)

    assert all(chunk.choices and chunk.usage is None for chunk in chunks)


def test_openai_tools_there_and_back(client: Any) -> None:
    messages: list[Any] = list(HELLO)
    ids = set()
    for _ in range(2):
        choice = client.chat.completions.create(model=SMALL, messages=messages, tools=TOOLS).choices[0]
        call = choice.message.tool_calls[0]
        assert choice.finish_reason == "tool_calls"
        assert "city" in json.loads(call.function.arguments)
        messages += [choice.message, {"role": "tool", "tool_call_id": call.id, "content": "sun"}]
        ids.add(call.id)
        said = client.chat.completions.create(model=SMALL, messages=messages, tools=TOOLS, max_tokens=8)
        assert said.choices[0].message.content.startswith("SIMULATED answer")
        messages += [said.choices[0].message, *HELLO]

    assert len(ids) == 2  # agents keep calls by their ids


def test_openai_json_mode_and_schemas(client: Any) -> None:
    import openai

    free = client.chat.completions.create(
        model=SMALL, messages=HELLO, response_format={"type": "json_object"}
    )
    parsed = client.chat.completions.parse(model=SMALL, messages=HELLO, response_format=Place)
    with client.chat.completions.stream(
        model=SMALL, messages=HELLO, tools=[openai.pydantic_function_tool(Place)]
    ) as stream:
        kinds = [event.type for event in stream]
        called = stream.get_final_completion().choices[0].message.tool_calls[0]

    assert isinstance(json.loads(free.choices[0].message.content), dict)
    assert parsed.choices[0].message.parsed == Place(city="SIMULATED hello", count=1)
    assert "tool_calls.function.arguments.done" in kinds
    assert isinstance(called.function.parsed_arguments, Place)


def test_openai_async_many_at_once(service: Service) -> None:
    import openai

    async def main() -> tuple[list[Any], list[Any]]:
        async with openai.AsyncOpenAI(base_url=f"{service.url}/v1", api_key=service.key) as client:
            create = client.chat.completions.create
            whole = asyncio.gather(*(create(model=SMALL, messages=HELLO, max_tokens=4) for _ in range(20)))
            stream = await create(model=SMALL, messages=HELLO, max_tokens=4, stream=True)
            chunks = [chunk async for chunk in stream]
            return await whole, chunks

    whole, chunks = asyncio.run(main())

    assert len({answer.id for answer in whole}) == 20
    assert {answer.usage.completion_tokens for answer in whole} <= {1, 2, 3, 4}
    assert chunks[-1].choices[0].finish_reason in ("stop", "length")


def test_openai_responses(client: Any) -> None:
    said = client.responses.create(model=SMALL, input="hello", instructions="Be brief", max_output_tokens=16)
    parsed = client.responses.parse(model=SMALL, input="hello", text_format=Place)
    tool = {"type": "function", "strict": False, **WEATHER}
    called = client.responses.create(model=SMALL, input="hello", tools=[tool])
    call = called.output[0]
    result = {"type": "function_call_output", "call_id": call.call_id, "output": "sun"}
    after = client.responses.create(
        model=SMALL, input=[*HELLO, *called.output, result], tools=[tool], max_output_tokens=16,
        store=False, include=["reasoning.encrypted_content"],
    )  # fmt: skip

    assert said.output_text.startswith("SIMULATED answer")
    assert said.usage.total_tokens == said.usage.input_tokens + said.usage.output_tokens
    assert said.max_output_tokens == 16
    assert parsed.output_parsed == Place(city="SIMULATED hello", count=1)
    assert (call.type, call.name) == ("function_call", "weather")
    assert call.call_id.startswith("call_simulated")
    assert after.output_text.startswith("SIMULATED answer")


def test_openai_responses_stream(client: Any) -> None:
    import openai

    with client.responses.create(model=SMALL, input="hello", max_output_tokens=16, stream=True) as stream:
        events = list(stream)
    with client.responses.stream(model=SMALL, input="hello", text_format=Place) as stream:
        list(stream)
        parsed = stream.get_final_response().output_parsed
    deltas = "".join(event.delta for event in events if event.type == "response.output_text.delta")

    with pytest.raises(openai.BadRequestError, match="stored"):
        client.responses.create(model=SMALL, input="hello", previous_response_id="resp_1")
    assert [event.sequence_number for event in events] == list(range(len(events)))
    assert [event.type for event in events[:2]] == ["response.created", "response.in_progress"]
    assert events[-1].type in ("response.completed", "response.incomplete")
    assert events[-1].response.output_text == deltas
    assert parsed == Place(city="SIMULATED hello", count=1)


def test_openai_embeddings(client: Any) -> None:
    packed = client.embeddings.create(
        model=EMBEDDINGS, input=["one", "two"]
    )  # asks for base64, and unpacks it
    plain = client.embeddings.create(model=EMBEDDINGS, input="one", encoding_format="float")
    tokens = client.embeddings.create(model=EMBEDDINGS, input=[[1, 2, 3]])

    assert len(packed.data) == 2
    assert packed.data[0].embedding == pytest.approx(plain.data[0].embedding, abs=1e-6)
    assert plain.usage.prompt_tokens == plain.usage.total_tokens > 0
    assert len(tokens.data) == 1


def test_openai_models(client: Any) -> None:
    models = {model.id: model for model in client.models.list()}

    assert {"auto", SMALL} <= set(models)
    assert models["auto"].owned_by == "walras"
    assert client.models.retrieve(SMALL).id == SMALL


@pytest.fixture
def counted(service: Service) -> Iterator[Callable[[str], tuple[Any, list[str]]]]:
    """A client for a key, and the paths of the HTTP requests that it has made."""
    import openai

    opened = []

    def make(key: str) -> tuple[Any, list[str]]:
        seen: list[str] = []
        http = openai.DefaultHttpxClient(event_hooks={"request": [lambda r: seen.append(r.url.path)]})
        opened.append(openai.OpenAI(base_url=f"{service.url}/v1", api_key=key, http_client=http))
        return opened[-1], seen

    yield make
    for client in opened:
        client.close()


def test_openai_errors_are_its_own_and_are_not_tried_again(service: Service, counted: Any, poor: str) -> None:
    import openai

    reader = service.make_key("reader", scope="read-only")
    # Worth nothing: no use pays.
    worthless = {"extra_headers": {"x-walras-value": "0.0000000001"}}
    for key, error, status, code, options in (
        ("wl-unknown", openai.AuthenticationError, 401, "invalid_api_key", {}),
        (reader, openai.PermissionDeniedError, 403, "permission_denied", {}),
        (service.key, openai.NotFoundError, 404, "model_not_found", {"model": "no-such-model"}),
        (service.key, openai.BadRequestError, 400, "invalid_request", {"messages": []}),
        (poor, openai.RateLimitError, 429, "insufficient_quota", {}),
        (poor, openai.RateLimitError, 429, "insufficient_quota", {"stream": True}),
        (service.key, openai.APIStatusError, 402, "not_worth_its_price", {"model": "auto", **worthless}),
    ):
        client, seen = counted(key)
        with pytest.raises(error) as caught:
            client.chat.completions.create(**({"model": SMALL, "messages": HELLO} | options))
        assert (caught.value.status_code, caught.value.code) == (status, code)
        assert caught.value.request_id.startswith("req_")
        assert seen == ["/v1/chat/completions"], code


def test_openai_responses_and_embeddings_meet_the_budget_too(counted: Any, poor: str) -> None:
    import openai

    client, seen = counted(poor)
    with pytest.raises(openai.RateLimitError, match="budget"):
        client.responses.create(model=SMALL, input="hello")
    with pytest.raises(openai.RateLimitError, match="budget"):
        client.embeddings.create(model=EMBEDDINGS, input="hello " * 1000)

    assert seen == ["/v1/responses", "/v1/embeddings"]


# --- anthropic-python ---------------------------------------------------------------------------------------------------

ANTHROPIC_TOOLS = [{"name": "weather", "description": "The weather of a city", "input_schema": SCHEMA}]


@pytest.fixture
def claude(service: Service) -> Iterator[Any]:
    import anthropic

    with anthropic.Anthropic(base_url=service.url, api_key=service.key) as client:
        yield client


def test_anthropic_answers(service: Service, claude: Any) -> None:
    import anthropic

    said = claude.messages.create(model="auto", max_tokens=8, system="Be brief", messages=HELLO)
    parsed = claude.messages.parse(model=SMALL, max_tokens=100, messages=HELLO, output_format=Place)

    async def bearer() -> Any:
        async with anthropic.AsyncAnthropic(
            base_url=service.url, auth_token=service.key, api_key=None
        ) as client:
            return await client.messages.create(model=SMALL, max_tokens=8, messages=HELLO)

    assert said.content[0].text.startswith("SIMULATED answer")
    assert said.usage.output_tokens == 8
    assert said.stop_reason == "max_tokens"
    assert said._request_id in {row["request_id"] for row in get(service, "/v1/requests?limit=20")["data"]}
    assert parsed.parsed_output == Place(city="SIMULATED hello", count=1)
    assert asyncio.run(bearer()).role == "assistant"


def test_anthropic_streams(claude: Any) -> None:
    with claude.messages.stream(model=SMALL, max_tokens=16, messages=HELLO) as stream:
        text = "".join(stream.text_stream)
        said = stream.get_final_message()
    with claude.messages.stream(
        model=SMALL, max_tokens=100, messages=HELLO, tools=ANTHROPIC_TOOLS,
        tool_choice={"type": "tool", "name": "weather"},
    ) as stream:  # fmt: skip
        kinds = [event.type for event in stream]
        called = stream.get_final_message()

    assert text.startswith("SIMULATED answer")
    assert said.content[0].text == text
    assert said.usage.input_tokens > 0
    assert 0 < said.usage.output_tokens <= 16
    assert (kinds[0], kinds[-1]) == ("message_start", "message_stop")
    assert called.stop_reason == "tool_use"
    assert called.content[0].input == {"city": "SIMULATED hello"}


def test_anthropic_tools_there_and_back(claude: Any) -> None:
    asked = {"model": SMALL, "max_tokens": 16, "tools": ANTHROPIC_TOOLS}
    called = claude.messages.create(messages=HELLO, **asked)
    result = {"type": "tool_result", "tool_use_id": called.content[0].id, "content": "sun"}
    said = claude.messages.create(
        messages=[
            *HELLO,
            {"role": "assistant", "content": called.content},
            {"role": "user", "content": [result]},
        ],
        **asked,
    )

    assert called.stop_reason == "tool_use"
    assert said.content[0].text.startswith("SIMULATED answer")


def test_anthropic_models(claude: Any) -> None:
    models = {model.id: model for model in claude.models.list()}

    assert {"auto", SMALL} <= set(models)
    assert (models[SMALL].type, models[SMALL].display_name) == ("model", SMALL)
    assert claude.models.retrieve("auto").created_at.year == 1970


def test_anthropic_errors_are_its_own_and_are_not_tried_again(service: Service, poor: str) -> None:
    import anthropic

    for key, error, kind, options in (
        ("wl-unknown", anthropic.AuthenticationError, "authentication_error", {}),
        (service.key, anthropic.NotFoundError, "not_found_error", {"model": "no-such-model"}),
        (service.key, anthropic.BadRequestError, "invalid_request_error", {"messages": []}),
        (poor, anthropic.RateLimitError, "rate_limit_error", {}),
    ):
        seen: list[str] = []
        http = anthropic.DefaultHttpxClient(
            event_hooks={"request": [lambda r, seen=seen: seen.append(r.url.path)]}
        )
        with (
            anthropic.Anthropic(base_url=service.url, api_key=key, http_client=http) as client,
            pytest.raises(error) as caught,
        ):
            client.messages.create(**({"model": SMALL, "max_tokens": 8, "messages": HELLO} | options))
        assert caught.value.body["error"]["type"] == kind
        assert caught.value.request_id.startswith("req_")
        assert seen == ["/v1/messages"], kind
    with (
        anthropic.Anthropic(base_url=service.url, api_key=service.key) as client,
        pytest.raises(anthropic.NotFoundError) as caught,
    ):
        client.messages.count_tokens(model=SMALL, messages=HELLO)
    assert caught.value.body["type"] == "error"  # in its shape where there is no such path, too


# --- shapes -------------------------------------------------------------------------------------------------------------


def post(service: Service, path: str, body: dict[str, Any]) -> bytes:
    asked = urllib.request.Request(
        service.url + path, json.dumps(body).encode(), headers={"authorization": f"Bearer {service.key}"}
    )
    with urllib.request.urlopen(asked, timeout=20) as answer:
        return bytes(answer.read())


def check_shapes(service: Service, model: str) -> None:
    """Answers against the SDKs' own types, with validation, which the SDKs themselves leave out."""
    from anthropic.types import Message, RawMessageStreamEvent
    from openai.types.chat import ChatCompletion, ChatCompletionChunk
    from openai.types.responses import Response, ResponseStreamEvent

    asked: list[tuple[str, dict[str, Any], Any, Any, list[dict[str, Any]]]] = [
        ("chat/completions", {"messages": HELLO, "max_tokens": 8}, ChatCompletion, ChatCompletionChunk,
         [{}, {"tools": TOOLS}, {"stream_options": {"include_usage": True}}]),
        ("responses", {"input": "hello", "max_output_tokens": 8}, Response, ResponseStreamEvent,
         [{}, {"tools": [{"type": "function", **WEATHER}]}]),
        ("messages", {"messages": HELLO, "max_tokens": 8}, Message, RawMessageStreamEvent,
         [{}, {"tools": ANTHROPIC_TOOLS}]),
    ]  # fmt: skip

    def check(case: tuple[str, dict[str, Any], Any, Any]) -> None:
        path, given, whole, event = case
        if "stream_options" not in given:
            TypeAdapter(whole).validate_json(post(service, f"/v1/{path}", given))
        lines = post(service, f"/v1/{path}", given | {"stream": True}).splitlines()
        events = [line[6:] for line in lines if line.startswith(b"data: ") and line != b"data: [DONE]"]
        assert len(events) > 1
        for told in events:
            TypeAdapter(event).validate_json(told)

    cases = [
        (path, {"model": model, **body, **option}, whole, event)
        for path, body, whole, event, options in asked
        for option in options
    ]
    with ThreadPoolExecutor(len(cases)) as pool:
        list(pool.map(check, cases))


def test_answers_have_every_field_the_sdks_promise(service: Service) -> None:
    from anthropic.types import ModelInfo
    from openai.types import CreateEmbeddingResponse, Model

    check_shapes(service, SMALL)
    vectors = post(service, "/v1/embeddings", {"model": EMBEDDINGS, "input": "hello"})
    TypeAdapter(CreateEmbeddingResponse).validate_json(vectors)
    for model in get(service, "/v1/models")["data"]:
        TypeAdapter(Model).validate_python(model)
        TypeAdapter(ModelInfo).validate_python(model)


# --- frameworks ---------------------------------------------------------------------------------------------------------


def test_langchain(service: Service, poor: str) -> None:
    import httpx
    import openai
    from langchain_core.messages import HumanMessage, ToolMessage
    from langchain_core.tools import tool
    from langchain_openai import ChatOpenAI, OpenAIEmbeddings

    @tool
    def weather(city: str) -> str:
        """The weather of a city."""
        return f"sun in {city}"

    with httpx.Client() as http:

        def chat(**options: Any) -> Any:
            given = {"api_key": service.key, "model": SMALL, "max_tokens": 16} | options
            return ChatOpenAI(base_url=f"{service.url}/v1", http_client=http, **given)

        said = chat(model="auto").invoke("hello")
        pieces = list(chat(stream_usage=True).stream("hello"))
        whole = sum(pieces[1:], pieces[0])
        helped = chat().bind_tools([weather])
        called = helped.invoke("hello")
        result = weather.invoke(called.tool_calls[0])
        after = helped.invoke([HumanMessage("hello"), called, result])
        shaped = [
            chat().with_structured_output(Place, method=m).invoke("hello")
            for m in ("json_schema", "function_calling")
        ]
        responses = chat(use_responses_api=True)
        told, streamed = responses.invoke("hello"), list(responses.stream("hello"))
        vectors = OpenAIEmbeddings(
            base_url=f"{service.url}/v1", api_key=service.key, model=EMBEDDINGS, http_client=http,
            check_embedding_ctx_length=False,
        ).embed_documents(["one", "two"])  # fmt: skip
        with pytest.raises(openai.RateLimitError):
            chat(api_key=poor).invoke("hello")

    assert said.content.startswith("SIMULATED answer")
    assert len([piece for piece in pieces if piece.content]) > 1
    assert whole.usage_metadata["total_tokens"] > whole.usage_metadata["output_tokens"] > 0
    assert isinstance(result, ToolMessage)
    assert after.content.startswith("SIMULATED answer")
    assert shaped == [Place(city="SIMULATED hello", count=1)] * 2
    assert told.text.startswith("SIMULATED answer")
    assert "".join(piece.text for piece in streamed).startswith("SIMULATED answer")
    assert len(vectors) == 2


@pytest.mark.parametrize("api", ["OpenAIChatModel", "OpenAIResponsesModel"])
def test_pydantic_ai(service: Service, poor: str, api: str) -> None:
    from openai import AsyncOpenAI
    from pydantic_ai import Agent, BinaryContent
    from pydantic_ai.exceptions import ModelHTTPError
    from pydantic_ai.models import openai
    from pydantic_ai.providers.openai import OpenAIProvider

    async def main() -> None:
        url = f"{service.url}/v1"
        async with (
            AsyncOpenAI(base_url=url, api_key=service.key) as client,
            AsyncOpenAI(base_url=url, api_key=poor) as without_money,
        ):
            model = getattr(openai, api)(SMALL, provider=OpenAIProvider(openai_client=client))
            broke = getattr(openai, api)(SMALL, provider=OpenAIProvider(openai_client=without_money))
            settings: Any = {"max_tokens": 16}
            agent = Agent(model, model_settings=settings)
            asked: list[str] = []

            @agent.tool_plain
            def weather(city: str) -> str:
                """The weather of a city."""
                asked.append(city)
                return "sun"

            image = BinaryContent(base64.b64decode(PNG), media_type="image/png")
            ran = await agent.run(["hello", image])
            async with Agent(model, model_settings=settings).run_stream("hello") as streamed:
                text = "".join([piece async for piece in streamed.stream_text(delta=True, debounce_by=None)])
            shaped = await Agent(model, output_type=Place).run("hello")
            with pytest.raises(ModelHTTPError) as caught:
                await Agent(broke, model_settings=settings).run("hello")

            assert asked == ["SIMULATED hello"]
            assert ran.output.startswith("SIMULATED answer")
            assert ran.usage.requests == 2
            assert text.startswith("SIMULATED answer")
            assert shaped.output == Place(city="SIMULATED hello", count=1)
            assert caught.value.status_code == 429

    asyncio.run(main())


@pytest.mark.parametrize("api", ["OpenAIChatCompletionsModel", "OpenAIResponsesModel"])
def test_openai_agents(service: Service, poor: str, api: str) -> None:
    import agents
    import openai

    asked: list[str] = []

    @agents.function_tool
    def weather(city: str) -> str:
        """The weather of a city."""
        asked.append(city)
        return "sun"

    async def main() -> None:
        url = f"{service.url}/v1"
        async with (
            openai.AsyncOpenAI(base_url=url, api_key=service.key) as client,
            openai.AsyncOpenAI(base_url=url, api_key=poor) as without_money,
        ):
            model = getattr(agents, api)(model=SMALL, openai_client=client)
            helped = agents.Agent(name="helped", instructions="Be brief", model=model, tools=[weather])
            ran = await agents.Runner.run(helped, "hello")
            streamed = agents.Runner.run_streamed(helped, "hello")
            kinds = {event.type async for event in streamed.stream_events()}
            places = agents.Agent(name="places", model=model, output_type=Place)
            first = agents.Agent(name="first", model=model, handoffs=[places])
            handed = await agents.Runner.run(first, "hello")
            broke = agents.Agent(
                name="broke", model=getattr(agents, api)(model=SMALL, openai_client=without_money)
            )
            with pytest.raises(openai.RateLimitError):
                await agents.Runner.run(broke, "hello")

            assert ran.final_output.startswith("SIMULATED answer")
            assert sum(reply.usage.total_tokens for reply in ran.raw_responses) > 0
            assert streamed.final_output.startswith("SIMULATED answer")
            assert kinds >= {"raw_response_event", "run_item_stream_event"}
            assert handed.last_agent is places
            assert isinstance(handed.final_output, Place)

    asyncio.run(main())
    assert len(asked) == 2


def test_litellm(service: Service, poor: str) -> None:
    import litellm

    litellm.suppress_debug_info = True
    given = {"api_base": f"{service.url}/v1", "api_key": service.key, "max_tokens": 8}
    named = {"model": f"openai/{SMALL}", "messages": HELLO}
    said = litellm.completion(**named | given | {"model": "openai/auto"})
    chunks = list(litellm.completion(stream=True, stream_options={"include_usage": True}, **named, **given))
    called = litellm.completion(tools=TOOLS, **named, **given).choices[0].message.tool_calls[0]
    native = litellm.completion(**named | given | {"model": f"anthropic/{SMALL}", "api_base": service.url})
    vectors = litellm.embedding(
        model=f"openai/{EMBEDDINGS}", input=["one"], api_base=given["api_base"], api_key=service.key
    )
    told = litellm.responses(
        model=f"openai/{SMALL}", input="hello", api_base=given["api_base"], api_key=service.key
    )
    for key, model, error in (
        (poor, SMALL, litellm.RateLimitError),
        ("wl-unknown", SMALL, litellm.AuthenticationError),
        (service.key, "no-such-model", litellm.NotFoundError),
    ):
        with pytest.raises(error):
            litellm.completion(**named | given | {"model": f"openai/{model}", "api_key": key})

    assert said.choices[0].message.content.startswith("SIMULATED answer")
    assert said.usage.completion_tokens == 8
    text = "".join(c.choices[0].delta.content or "" for c in chunks if c.choices)
    assert text.startswith("SIMULATED answer")
    assert called.function.name == "weather"
    assert native.choices[0].message.content.startswith("SIMULATED answer")
    assert vectors.usage.prompt_tokens > 0
    assert told.output[0].content[0].text.startswith("SIMULATED answer")


# --- curl ---------------------------------------------------------------------------------------------------------------


def curl(*arguments: str, given: str | None = None) -> str:
    command = ["curl", "--silent", "--show-error", "--max-time", "20", *arguments]
    done = subprocess.run(command, input=given, capture_output=True, text=True, timeout=30, check=True)
    return done.stdout


@pytest.mark.skipif(shutil.which("curl") is None, reason="there is no curl")
def test_curl(service: Service) -> None:
    body = {"model": SMALL, "max_tokens": 8, "messages": HELLO}
    chat = f"{service.url}/v1/chat/completions"
    bearer = ("-H", f"authorization: Bearer {service.key}")
    plain = curl("-i", chat, *bearer, "-d", json.dumps(body))
    stream = curl("-N", chat, *bearer, "-d", json.dumps(body | {"stream": True}))
    message = curl(f"{service.url}/v1/messages", "-H", f"x-api-key: {service.key}", "-d", json.dumps(body))
    # Longer than curl sends at once: it waits for "100 Continue".
    long = json.dumps(body | {"messages": [{"role": "user", "content": "long " * 500_000}]})
    large = curl(chat, *bearer, "-H", "content-type: application/json", "-d", "@-", given=long)
    nobody = curl("-o", "-", "-w", "%{http_code}", chat, "-d", json.dumps(body))

    head, _, said = plain.partition("\n\n")
    assert head.startswith("HTTP/1.1 200")
    assert f"x-walras-use: {SMALL}" in head
    assert json.loads(said)["choices"][0]["message"]["content"].startswith("SIMULATED answer")
    assert stream.endswith("data: [DONE]\n\n")
    assert json.loads(message)["type"] == "message"
    assert json.loads(large)["usage"]["prompt_tokens"] > 100_000
    assert nobody.endswith("401")


# --- what reaches the provider, and what comes of its faults ------------------------------------------------------------


class Provider(ThreadingHTTPServer):
    """It keeps the bodies it is sent. To OpenAI's API it answers with what it is told to, to Anthropic's as `claude_says`."""

    daemon_threads = True
    request_queue_size = 32
    block_on_close = False

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Answering)
        self.bodies: list[dict[str, Any]] = []
        self.status, self.text, self.close = 200, "", False


class _Answering(BaseHTTPRequestHandler):
    server: Provider

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["content-length"])))
        self.server.bodies.append(body)
        # Several are answered at a time.
        text = claude_says(body) if self.path == "/v1/messages" else self.server.text
        kind = "text/event-stream" if text.startswith(("data", "event")) else "application/json"
        self.send_response(self.server.status)
        self.send_header("content-type", kind)
        # A length longer than what follows: the connection ends in the middle of the answer.
        self.send_header("content-length", str(len(text) + 100 * self.server.close))
        self.end_headers()
        self.wfile.write(text.encode())
        self.close_connection = True

    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002 (the name in the base class)
        """Nothing on stderr."""


def claude_says(body: dict[str, Any]) -> str:
    """Thoughts, then words, or a call where there are tools: as Anthropic's API answers, whole or as a stream."""
    last = (
        {"type": "tool_use", "id": "toolu_1", "name": "weather", "input": {"city": "Bern"}}
        if body.get("tools")
        else {"type": "text", "text": "a dot"}
    )
    blocks = [{"type": "thinking", "thinking": "Well.", "signature": "c2ln"}, last]
    stop = {"stop_reason": "tool_use" if body.get("tools") else "end_turn", "stop_sequence": None}
    usage = {
        "input_tokens": 3,
        "cache_read_input_tokens": 4,
        "cache_creation_input_tokens": 0,
        "output_tokens": 5,
    }
    head = {"id": "msg_1", "type": "message", "role": "assistant", "model": "theirs", "usage": usage}
    if not body.get("stream"):
        return json.dumps(head | stop | {"content": blocks})
    starts = [{"type": "thinking", "thinking": "", "signature": ""}, last | {"input": {}} | {"text": ""}]
    deltas = [
        {"type": "thinking_delta", "thinking": "Well."},
        {"type": "input_json_delta", "partial_json": '{"city": "Bern"}'}
        if body.get("tools")
        else {"type": "text_delta", "text": "a dot"},
    ]
    events: list[dict[str, Any]] = [
        {
            "type": "message_start",
            "message": head | {"content": [], "stop_reason": None, "stop_sequence": None},
        }
    ]
    for at, (start, delta) in enumerate(zip(starts, deltas, strict=True)):
        events.append({"type": "content_block_start", "index": at, "content_block": start})
        events.append({"type": "content_block_delta", "index": at, "delta": delta})
        events.append({"type": "content_block_stop", "index": at})
    events.append({"type": "message_delta", "delta": stop, "usage": {"output_tokens": 5}})
    events.append({"type": "message_stop"})
    return "".join(f"event: {event['type']}\ndata: {json.dumps(event)}\n\n" for event in events)


WHOLE = {
    "id": "chatcmpl-1",
    "object": "chat.completion",
    "created": 1,
    "model": "theirs",
    "choices": [
        {"index": 0, "message": {"role": "assistant", "content": "a dot"}, "finish_reason": "stop"},
    ],
    "usage": {"prompt_tokens": 3, "completion_tokens": 2, "total_tokens": 5},
}


@pytest.fixture(scope="module")
def provider() -> Iterator[Provider]:
    with Provider() as provider:
        thread = threading.Thread(target=provider.serve_forever, kwargs={"poll_interval": 0.05})
        thread.start()
        yield provider
        provider.shutdown()
        thread.join()


@pytest.fixture(scope="module")
def through(provider: Provider, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    """A service in front of that provider, which speaks OpenAI's API and Anthropic's; `auto` is the former's model."""
    root = f"http://127.0.0.1:{provider.server_address[1]}"
    settings = f"""
        value = 1.0
        classes.secret.forbidden_models = ["claude"]
        [upstreams.elsewhere]
        base_url = "{root}/v1"
        [upstreams.claude]
        kind = "anthropic"
        base_url = "{root}"
        [models.ours]
        upstream = "elsewhere"
        upstream_model = "theirs"
        quality = 0.9
        input_usd = 1.0
        output_usd = 2.0
        [models.claude]
        upstream = "claude"
        upstream_model = "theirs"
        quality = 0.1
        input_usd = 1.0
        output_usd = 2.0
        """
    with running(tmp_path_factory.mktemp("through"), settings) as service:
        yield service


def test_images_and_unknown_fields_reach_the_provider(provider: Provider, through: Service) -> None:
    import anthropic
    import openai

    provider.status, provider.text, provider.close = 200, json.dumps(WHOLE), False
    provider.bodies.clear()
    image: Any = {"type": "image_url", "image_url": {"url": DATA_URL, "detail": "low"}}
    words: Any = {"type": "text", "text": "What is this?"}
    with openai.OpenAI(base_url=f"{through.url}/v1", api_key=through.key) as client:
        said = client.chat.completions.create(
            model="auto", messages=[{"role": "user", "content": [words, image]}], seed=7,
            logit_bias={"1": -1}, extra_body={"of_this_vendor_only": {"x": [1, None]}},
        )  # fmt: skip
        parts: Any = [
            {"type": "input_text", "text": "What is this?"},
            {"type": "input_image", "image_url": DATA_URL, "detail": "low"},
        ]
        told = client.responses.create(model="ours", input=[{"role": "user", "content": parts}])
    source: Any = {"type": "base64", "media_type": "image/png", "data": PNG}
    with anthropic.Anthropic(base_url=through.url, api_key=through.key) as client:
        spoken = client.messages.create(
            model="ours",
            max_tokens=50,
            messages=[{"role": "user", "content": [words, {"type": "image", "source": source}]}],
        )
    chat, responses, messages = provider.bodies

    assert chat["model"] == responses["model"] == messages["model"] == "theirs"
    assert chat["messages"] == [{"role": "user", "content": [words, image]}]
    assert (chat["seed"], chat["logit_bias"], chat["of_this_vendor_only"]) == (7, {"1": -1}, {"x": [1, None]})
    assert responses["messages"][-1]["content"][1] == image
    assert messages["messages"][-1]["content"][1]["image_url"]["url"] == DATA_URL
    answers = (said.choices[0].message.content, told.output_text, spoken.content[0].text)
    assert answers == ("a dot",) * 3


def test_answers_of_anthropics_api_have_every_field_the_sdks_promise(
    provider: Provider, through: Service
) -> None:
    import openai

    provider.status, provider.close = 200, False
    check_shapes(through, "claude")
    with openai.OpenAI(base_url=f"{through.url}/v1", api_key=through.key) as client:
        said = client.chat.completions.create(model="claude", messages=HELLO)
        with client.chat.completions.stream(model="claude", messages=HELLO, tools=TOOLS) as stream:
            call = stream.get_final_completion().choices[0].message.tool_calls[0]
        told = client.responses.create(model="claude", input="hello")

    assert said.choices[0].message.content == told.output_text == "a dot"
    assert (call.function.name, json.loads(call.function.arguments)) == ("weather", {"city": "Bern"})
    assert (said.usage.prompt_tokens, said.usage.completion_tokens) == (7, 5)
    assert said.usage.prompt_tokens_details.cached_tokens == 4
    assert told.usage.input_tokens_details.cached_tokens == 4


def test_a_stream_cut_by_the_provider_is_an_error_of_the_client(provider: Provider, through: Service) -> None:
    import anthropic
    import openai

    chunk = {**WHOLE, "object": "chat.completion.chunk", "usage": None}
    chunk["choices"] = [{"index": 0, "delta": {"role": "assistant", "content": "a d"}, "finish_reason": None}]
    provider.status, provider.text, provider.close = 200, f"data: {json.dumps(chunk)}\n\n", True
    pieces = []
    with openai.OpenAI(base_url=f"{through.url}/v1", api_key=through.key) as client:
        with client.chat.completions.create(model="ours", messages=HELLO, stream=True) as stream:
            pieces.append(next(stream))
            with pytest.raises(openai.APIError):
                pieces += stream
        with client.responses.create(model="ours", input="hello", stream=True) as stream:
            last = list(stream)[-1]
    with (
        anthropic.Anthropic(base_url=through.url, api_key=through.key) as client,
        client.messages.stream(model="ours", max_tokens=50, messages=HELLO) as stream,
        pytest.raises(anthropic.APIStatusError),
    ):
        stream.until_done()

    assert [piece.choices[0].delta.content for piece in pieces] == ["a d"]
    assert last.type == "error"


def test_a_provider_that_fails_is_not_tried_without_end(provider: Provider, through: Service) -> None:
    import openai

    provider.bodies.clear()
    provider.status, provider.text, provider.close = 500, '{"error": {"message": "broken"}}', False
    with (
        openai.OpenAI(base_url=f"{through.url}/v1", api_key=through.key, max_retries=1) as client,
        pytest.raises(openai.InternalServerError) as caught,
    ):
        client.chat.completions.create(model="ours", messages=HELLO)

    assert caught.value.status_code in (500, 502, 503)
    assert 2 <= len(provider.bodies) <= 8  # at most four attempts by the service for each of the client's two


def test_a_named_model_is_not_replaced_by_another(provider: Provider, through: Service) -> None:
    """Whatever stands in its way is said, and the other model is not asked."""
    import openai

    provider.bodies.clear()
    provider.status, provider.text, provider.close = 200, json.dumps(WHOLE), False
    with openai.OpenAI(base_url=f"{through.url}/v1", api_key=through.key, max_retries=0) as client:
        create = client.chat.completions.create
        with pytest.raises(openai.PermissionDeniedError, match="forbid 'claude'"):
            create(model="claude", messages=HELLO, extra_headers={"x-walras-class": "secret"})
        with pytest.raises(openai.InternalServerError, match="expected to answer within") as late:
            create(model="claude", messages=HELLO, extra_headers={"x-walras-deadline": "0.001"})

    assert late.value.status_code == 504
    assert provider.bodies == []
