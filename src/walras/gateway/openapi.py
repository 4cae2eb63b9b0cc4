"""The service's API as OpenAPI 3.1: what `GET /openapi.json` answers, and what its tests are generated from."""

from __future__ import annotations

from typing import Any

_TEXT = {"type": "string"}
_NUMBER = {"type": "number"}
_AMOUNT = {"type": "number", "minimum": -1e9, "maximum": 1e9}
_OBJECT = {"type": "object"}
_ERRORS = {
    "type": "object",
    "required": ["error"],
    "properties": {"error": {"type": "object", "required": ["message", "type"]}},
}


def _answer(what: str, schema: dict[str, Any] | None = None) -> dict[str, Any]:
    return {"description": what, "content": {"application/json": {"schema": schema or _OBJECT}}}


def _operation(
    summary: str,
    *,
    body: dict[str, Any] | None = None,
    parameters: tuple[dict[str, Any], ...] = (),
    also: dict[str, dict[str, Any]] | None = None,
    open_to_all: bool = False,
) -> dict[str, Any]:
    errors = ("400", "401", "402", "403", "404", "405", "408", "409", "413", "429", "502", "503", "504")
    found: dict[str, Any] = {
        "summary": summary,
        "responses": {
            "200": _answer("done"),
            **{code: _answer("an error", _ERRORS) for code in errors},
            **(also or {}),
        },
    }
    if body is not None:
        found["requestBody"] = {"required": True, "content": {"application/json": {"schema": body}}}
    if parameters:
        found["parameters"] = list(parameters)
    if open_to_all:
        found["security"] = []
    return found


def _header(name: str, what: str, schema: dict[str, Any]) -> dict[str, Any]:
    return {"name": name, "in": "header", "required": False, "description": what, "schema": schema}


def _choice(name: str, what: str, *values: str) -> dict[str, Any]:
    schema = {**_TEXT, "enum": list(values)}
    return {"name": name, "in": "query", "required": False, "description": what, "schema": schema}


_CALL_HEADERS = (
    _header(
        "x-walras-value",
        "V: what the request is worth, USD per unit of quality",
        {**_NUMBER, "minimum": 0, "maximum": 1e6},
    ),
    _header("x-walras-class", "Kind of task", {**_TEXT, "maxLength": 256}),
    _header("x-walras-session", "Session it belongs to", {**_TEXT, "maxLength": 256}),
    _header("x-walras-deadline", "Seconds it may take", {**_NUMBER, "minimum": 0}),
)
_MESSAGES = {"type": "array", "minItems": 1, "items": _OBJECT}
_CAP = {"type": "integer", "minimum": 1}
_STREAM = {"200": {"description": "the answer, or its stream of events"}}


def _call(summary: str, properties: dict[str, Any], required: list[str]) -> dict[str, Any]:
    body = {"type": "object", "required": required, "properties": properties}
    return _operation(summary, body=body, parameters=_CALL_HEADERS, also=_STREAM)


_COMMON = {"model": _TEXT, "stream": {"type": "boolean"}}
_CHAT = {
    **_COMMON,
    "messages": _MESSAGES,
    "max_tokens": _CAP,
    "max_completion_tokens": _CAP,
    "n": {**_CAP, "maximum": 128},
}
_USE = {
    "type": "object",
    "required": ["name"],
    "additionalProperties": False,
    "properties": {"name": _TEXT, "quality": _AMOUNT, "usd": _AMOUNT, "seconds": _AMOUNT, "risk": _AMOUNT},
}

OPENAPI: dict[str, Any] = {
    "openapi": "3.1.0",
    "info": {
        "title": "Walras gateway",
        "version": "1",
        "description": "Model calls at live prices, with what each was worth and what it paid.",
    },
    "components": {"securitySchemes": {"key": {"type": "http", "scheme": "bearer"}}},
    "security": [{"key": []}],
    "paths": {
        "/v1/chat/completions": {"post": _call("OpenAI chat completions", _CHAT, ["messages"])},
        "/v1/messages": {
            "post": _call(
                "Anthropic messages",
                {**_COMMON, "messages": _MESSAGES, "max_tokens": _CAP},
                ["messages", "max_tokens"],
            )
        },
        "/v1/responses": {
            "post": _call(
                "OpenAI responses",
                {**_COMMON, "input": {"type": ["string", "array"]}, "max_output_tokens": _CAP},
                ["input"],
            )
        },
        "/v1/embeddings": {
            "post": _call(
                "OpenAI embeddings",
                {"model": _TEXT, "input": {"type": ["string", "array"]}},
                ["model", "input"],
            )
        },
        "/v1/models": {"get": _operation("Models, tiers and auto")},
        "/v1/models/{model}": {
            "get": _operation(
                "One model", parameters=({"name": "model", "in": "path", "required": True, "schema": _TEXT},)
            )
        },
        "/v1/prices": {"get": _operation("The price vector, its certificate, its age")},
        "/v1/prices/stream": {
            "get": _operation(
                "The price vector whenever it changes, as server-sent events",
                also={"200": {"description": "events"}},
            )
        },
        "/v1/menu": {"get": _operation("The menu of tiers")},
        "/v1/budgets": {"get": _operation("What the key, and others it may see, has spent and may spend")},
        "/v1/requests": {
            "get": _operation(
                "The latest requests, each decision taken apart",
                parameters=(
                    {
                        "name": "limit",
                        "in": "query",
                        "required": False,
                        "schema": {"type": "integer", "minimum": 1, "maximum": 500},
                    },
                    _choice("settled", "How its charge is known", "exact", "estimated", "cap", "none"),
                    _choice("reconciled", "Whether somebody has said what it cost", "true", "false"),
                ),
            )
        },
        "/v1/outcomes": {
            "post": _operation(
                "How good an answer was; the same again changes nothing",
                body={
                    "type": "object",
                    "required": ["request_id", "quality"],
                    "properties": {
                        "request_id": _TEXT,
                        "quality": {**_NUMBER, "minimum": 0, "maximum": 1},
                        "loss_usd": _AMOUNT,
                        "source": {**_TEXT, "maxLength": 256},
                    },
                },
            )
        },
        "/v1/reconcile": {
            "post": _operation(
                "What a request cost that was settled at its cap, or estimated; needs scope admin",
                body={
                    "type": "object",
                    "required": ["request_id", "charged_usd"],
                    "properties": {
                        "request_id": _TEXT,
                        "charged_usd": {**_NUMBER, "minimum": 0, "exclusiveMaximum": 9e9},
                        "source": {**_TEXT, "maxLength": 256},
                    },
                },
            )
        },
        "/v1/decide": {
            "post": _operation(
                "Price any set of uses",
                body={
                    "type": "object",
                    "required": ["uses"],
                    "additionalProperties": False,
                    "properties": {
                        "uses": {"type": "array", "minItems": 1, "maxItems": 1000, "items": _USE},
                        "value_usd": _AMOUNT,
                        "task_class": _TEXT,
                    },
                },
            )
        },
        "/metrics": {"get": _operation("Prometheus", also={"200": {"description": "text"}})},
        "/healthz": {"get": _operation("Whether the process is up", open_to_all=True)},
        "/readyz": {"get": _operation("Whether it may be called", open_to_all=True)},
        "/": {"get": _operation("A page", also={"200": {"description": "HTML"}}, open_to_all=True)},
        "/openapi.json": {"get": _operation("This", open_to_all=True)},
    },
}
