"""The service as an ASGI application: who calls what, in which shape errors come back, and everything but the calls themselves."""

from __future__ import annotations

import asyncio
import json
from base64 import b64encode
from collections.abc import Awaitable, Callable
from contextlib import suppress
from decimal import Decimal
from hashlib import sha256
from importlib.resources import files
from typing import Annotated, Any, get_args

import msgspec

from walras.errors import OutputError, QuantityError, RecordError, SettingsError, WalrasError
from walras.gateway.board import Board, Standing, standing_json
from walras.gateway.calls import LONGEST, Calls, id_headers, new_id
from walras.gateway.dialects import error_body
from walras.gateway.escrow import LocalEscrow
from walras.gateway.http import EVENTS, Gone, HttpError, Receive, Request, Scope, Send, log_bug
from walras.gateway.keys import Key, KeyStore, accounts_of
from walras.gateway.metering import scarcity
from walras.gateway.metrics import Metrics
from walras.gateway.openapi import OPENAPI
from walras.gateway.wire import Dialect
from walras.ledger import (
    Conflict,
    Correction,
    Entry,
    Filter,
    Nano,
    Outcome,
    Row,
    Store,
    Ticket,
    UnknownRequest,
    nano,
    unpack,
    usd,
)
from walras.ledger.entry import Settled

PAGE = files("walras.gateway").joinpath("page.html").read_bytes()


def _sha256(tag: bytes) -> bytes:
    """How a content security policy names what stands inside the page's one element of this tag."""
    inside = PAGE.split(b"<" + tag + b">")[1].split(b"</" + tag + b">")[0]
    return b"'sha256-" + b64encode(sha256(inside).digest()) + b"'"


# The page's own script and style are inside it; nothing else may run, load or frame it.
PAGE_HEADERS = [
    (b"content-type", b"text/html; charset=utf-8"),
    (
        b"content-security-policy",
        b"default-src 'none'; script-src " + _sha256(b"script") + b"; style-src " + _sha256(b"style") + b"; "
        b"connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    ),
    (b"x-content-type-options", b"nosniff"),
    (b"referrer-policy", b"no-referrer"),
]
DIALECTS: dict[str, Dialect] = {
    "/v1/chat/completions": "chat",
    "/v1/messages": "messages",
    "/v1/responses": "responses",
    "/v1/embeddings": "embeddings",
}
SHOWN = 40
"""Requests shown where no limit is given."""
MOST_SHOWN = 500
MOST_USES = 1000
"""Uses that are priced in one call."""
MOST_AMOUNT = 1e9
"""Of USD, seconds and the like: what is larger is a mistake."""
HEARTBEAT_S = 15.0
"""Seconds of silence on the stream of prices before a comment keeps it open."""

Handler = Callable[[Request, Key], Awaitable[None]]


_Amount = Annotated[float, msgspec.Meta(ge=-MOST_AMOUNT, le=MOST_AMOUNT)]


class _OutcomeBody(msgspec.Struct):
    """What `POST /v1/outcomes` takes."""

    request_id: str
    quality: float
    loss_usd: _Amount | None = None
    source: Annotated[str, msgspec.Meta(max_length=LONGEST)] = "user"


class _ChargeBody(msgspec.Struct):
    """What `POST /v1/reconcile` takes."""

    request_id: str
    charged_usd: Decimal
    source: Annotated[str, msgspec.Meta(max_length=LONGEST)] = "upstream"


class _UseBody(msgspec.Struct, forbid_unknown_fields=True):
    """One use to be priced, in physical amounts."""

    name: str
    quality: _Amount = 0.0
    usd: _Amount = 0.0
    seconds: _Amount = 0.0
    risk: _Amount = 0.0


class _DecideBody(msgspec.Struct, forbid_unknown_fields=True):
    """What `POST /v1/decide` takes."""

    uses: Annotated[list[_UseBody], msgspec.Meta(max_length=MOST_USES)]
    value_usd: _Amount | None = None
    task_class: str = ""


class Gateway:
    """The application. `ready` is set once it may be called."""

    def __init__(
        self, board: Board, calls: Calls, keys: KeyStore, store: Store, escrow: LocalEscrow, metrics: Metrics
    ) -> None:
        self.board, self.calls, self.keys, self.store = board, calls, keys, store
        self.escrow, self.metrics = escrow, metrics
        self.ready = False
        self.stopping = asyncio.Event()
        """Set when the service is to end: calls under way go on, new ones are refused."""
        self._correcting = asyncio.Lock()
        self._routes: dict[tuple[str, str], Handler] = {
            ("GET", "/v1/models"): self._models,
            ("GET", "/v1/prices"): self._prices,
            ("GET", "/v1/prices/stream"): self._prices_stream,
            ("GET", "/v1/menu"): self._menu,
            ("GET", "/v1/budgets"): self._budgets,
            ("GET", "/v1/requests"): self._requests,
            ("POST", "/v1/outcomes"): self._outcomes,
            ("POST", "/v1/decide"): self._decide,
            ("POST", "/v1/reconcile"): self._reconcile,
            ("GET", "/metrics"): self._metrics,
        }

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """ASGI."""
        if scope["type"] != "http":
            return
        request = Request(scope, receive, send)
        dialect: Dialect = "messages" if _anthropic(request) else DIALECTS.get(request.path, "chat")
        request_id = new_id(self.board.clock())
        try:
            await self._dispatch(request, request_id)
        except Gone:
            return
        except HttpError as error:
            body = error_body(dialect, error.status, str(error), code=error.code, param=error.param)
            await self._fail(request, request_id, error.status, body, list(error.headers))
        except asyncio.CancelledError:
            if not self.stopping.is_set() or request.started:
                raise
            body = error_body(dialect, 503, "the service is stopping", code="unavailable")
            await self._fail(request, request_id, 503, body, [(b"retry-after", b"1")])
        except OutputError:
            body = error_body(dialect, 503, "the ledger cannot be written now", code="unavailable")
            await self._fail(request, request_id, 503, body, [(b"retry-after", b"1")])
        except Exception as error:
            log_bug(error)
            if not request.started:  # where an answer had begun, its connection is closed
                body = error_body(dialect, 500, "a bug in the gateway; its log says where", code="internal")
                await self._fail(request, request_id, 500, body, [])

    async def _fail(
        self, request: Request, request_id: str, status: int, body: bytes, headers: list[tuple[bytes, bytes]]
    ) -> None:
        own = [(b"content-type", b"application/json"), *id_headers(request_id)]
        await request.answer(status, body, [*own, *headers])

    async def _dispatch(self, request: Request, request_id: str) -> None:
        method, path = request.method, request.path
        dialect = DIALECTS.get(path)
        if self.stopping.is_set() and path not in ("/healthz", "/readyz"):
            raise HttpError(
                503,
                "the service is stopping",
                code="unavailable",
                headers=((b"retry-after", b"1"), (b"connection", b"close")),
            )
        if dialect is not None and method == "POST":
            await self.calls.handle(request, dialect, self._caller(request, "tenant"), request_id)
            return
        if method in ("GET", "HEAD") and path in ("/", "/healthz", "/readyz", "/openapi.json"):
            await self._open(request)
            return
        handler = self._routes.get((method, path))
        if handler is None and method == "GET" and path.startswith("/v1/models/"):
            handler = self._model
        if handler is not None:
            await handler(request, self._caller(request, "any" if method == "GET" else "tenant"))
            return
        known = {p for _, p in self._routes} | set(DIALECTS) | {"/", "/healthz", "/readyz", "/openapi.json"}
        if path in known:
            allowed = sorted(
                {m for m, p in self._routes if p == path}
                or ({"POST"} if path in DIALECTS else {"GET", "HEAD"})
            )
            raise HttpError(
                405,
                f"{path} takes {', '.join(allowed)}",
                code="method_not_allowed",
                headers=((b"allow", ", ".join(allowed).encode()),),
            )
        raise HttpError(404, f"there is no {path}", code="not_found")

    def _caller(self, request: Request, wanted: str) -> Key:
        """Whose key this is.

        Raises:
            HttpError: 401 without a key that is known, 403 with one that may not do this.
        """
        given = request.headers.get(b"authorization", b"")
        secret = (
            given[7:].strip() if given[:7].lower() == b"bearer " else request.headers.get(b"x-api-key", b"")
        )
        key = self.keys.find(secret, self.board.clock()) if secret else None
        if key is None:
            what = "no API key was given" if not secret else "this API key is not known"
            hint = "send it as 'Authorization: Bearer …' or 'x-api-key'; `walras keys create` makes one"
            raise HttpError(
                401, f"{what}: {hint}", code="invalid_api_key", headers=((b"www-authenticate", b"Bearer"),)
            )
        if wanted == "tenant" and key.scope == "read-only":
            raise HttpError(403, "a read-only key only looks", code="permission_denied")
        return key

    # --- open to all ------------------------------------------------------------------------------------------------

    async def _open(self, request: Request) -> None:
        match request.path:
            case "/":
                await request.answer(200, PAGE, list(PAGE_HEADERS))
            case "/healthz":
                await request.json({"status": "ok"})
            case "/readyz":
                why = self._problem()
                await request.json({"ready": why is None, "problem": why}, 200 if why is None else 503)
            case _:
                await request.json(OPENAPI)

    def _problem(self) -> str | None:
        """Why calls are not taken, without paths and addresses: anybody may ask."""
        if self.stopping.is_set() or not self.ready:
            return "stopping" if self.stopping.is_set() else "starting"
        if self.calls.books.problem is None:
            return None
        name = self.store.state().name
        return f"the ledger cannot be written: {name}" if name != "healthy" else "entries are being written"

    # --- models, prices, menu ---------------------------------------------------------------------------------------

    def _model_data(self, name: str) -> dict[str, Any]:
        """A model in OpenAI's words and in Anthropic's: the path is the same, and neither minds the other's fields."""
        owner = self.board.economy.models[name].upstream if name in self.board.models else "walras"
        plain = {"id": name, "object": "model", "created": 0, "owned_by": owner}
        theirs = {"type": "model", "display_name": name, "lifecycle": "active"}
        return plain | theirs | {"created_at": "1970-01-01T00:00:00Z"}  # which says that it is not known

    async def _models(self, request: Request, _: Key) -> None:
        names = ["auto", *self.calls.tiers, *self.board.models]
        data = [self._model_data(name) for name in names]
        pages = {"has_more": False, "first_id": names[0], "last_id": names[-1]}
        await request.json({"object": "list", "data": data, **pages})

    async def _model(self, request: Request, _: Key) -> None:
        name = request.path.removeprefix("/v1/models/")
        if name not in ("auto", *self.calls.tiers, *self.board.models):
            raise HttpError(404, f"there is no model '{name}'", code="model_not_found", param="model")
        await request.json(self._model_data(name))

    async def _prices(self, request: Request, _: Key) -> None:
        await request.json(standing_json(self.board.standing, self.board.clock()))

    async def _prices_stream(self, request: Request, _: Key) -> None:
        """Server-sent events: the vector now, and whenever it changes; only the latest where the client is slow."""
        news: asyncio.Queue[Standing] = asyncio.Queue(maxsize=1)

        def post(standing: Standing) -> None:
            if news.full():
                news.get_nowait()
            news.put_nowait(standing)

        post(self.board.standing)
        stop = self.board.watch(post)
        ends = {asyncio.create_task(request.hung_up()), asyncio.create_task(self.stopping.wait())}
        try:
            await request.start(200, list(EVENTS))
            while not any(end.done() for end in ends):
                waiting = asyncio.create_task(news.get())
                await asyncio.wait({*ends, waiting}, timeout=HEARTBEAT_S, return_when=asyncio.FIRST_COMPLETED)
                if waiting.done():
                    data = json.dumps(standing_json(waiting.result(), self.board.clock()))
                    await request.write(f"event: prices\ndata: {data}\n\n".encode())
                else:
                    waiting.cancel()
                    await request.write(b": still here\n\n")
            await request.write(b"", more=False)
        finally:
            stop()
            for end in ends:
                end.cancel()

    async def _menu(self, request: Request, _: Key) -> None:
        if self.calls.menu is None:
            hint = "`walras menu --json > menu.json`, then `walras serve --menu menu.json`"
            raise HttpError(404, f"no menu is served: {hint}", code="not_found")
        await request.json(self.calls.menu)

    # --- budgets, requests, outcomes --------------------------------------------------------------------------------

    async def _budgets(self, request: Request, key: Key) -> None:
        now = self.board.clock()
        keys = [key] if key.scope == "tenant" else [k for k in self.keys.list() if k.revoked_ns is None]
        accounts: dict[str, str | None] = {account: k.tenant for k in keys for account in k.accounts}
        accounts.pop("global", None)
        if key.scope != "tenant":
            accounts["global"] = None
        data = [await self._standing(a, now) | {"tenant": tenant} for a, tenant in accounts.items()]
        own = await self._standing(key.accounts[0], now)
        await request.json({**own, "data": data})

    async def _standing(self, account: str, now: int) -> dict[str, Any]:
        s = await self.escrow.standing(account, now)
        return {
            "account": account,
            "budget_usd": None if s.budget_nano is None else usd(s.budget_nano),
            "spent_usd": usd(s.spent_nano),
            "reserved_usd": usd(s.reserved_nano),
            "remaining_usd": None if s.remaining_nano is None else usd(s.remaining_nano),
            "multiplier": scarcity(s, now),
            "resets_at": None if s.resets_at_ns is None else s.resets_at_ns / 1e9,
        }

    async def _requests(self, request: Request, key: Key) -> None:
        said = request.query.get("limit", str(SHOWN))
        if not said.isdecimal() or not 1 <= int(said) <= MOST_SHOWN:
            raise HttpError(400, f"limit must be from 1 to {MOST_SHOWN}", code="invalid_value", param="limit")
        settled, reconciled = request.query.get("settled"), request.query.get("reconciled")
        for name, given, known in (
            ("settled", settled, get_args(Settled)),
            ("reconciled", reconciled, ("true", "false")),
        ):
            if given is not None and given not in known:
                what = f"{name} must be one of {', '.join(known)}"
                raise HttpError(400, what, code="invalid_value", param=name)
        where = Filter(
            tenant=key.tenant if key.scope == "tenant" else None,
            settled=settled,
            reconciled=None if reconciled is None else reconciled == "true",
        )
        rows = await asyncio.to_thread(self.store.entries, None, int(said), where, newest=True)
        await request.json({"object": "list", "data": [_row_data(row) for row in rows]})

    async def _outcomes(self, request: Request, key: Key) -> None:
        said = await self._read(request, _OutcomeBody)
        if not 0 <= said.quality <= 1:
            raise HttpError(400, "quality must be from 0 to 1", code="invalid_value", param="quality")
        rows = await asyncio.to_thread(self.store.entries, None, 1, Filter(request_id=said.request_id))
        entry = rows[0].entry if rows else None
        if entry is None or (key.scope == "tenant" and entry.tenant != key.tenant):
            raise HttpError(
                404, f"there is no request '{said.request_id}'", code="not_found", param="request_id"
            )
        outcome = Outcome(said.request_id, self.board.clock(), said.quality, said.loss_usd, said.source)
        known = await asyncio.to_thread(self.store.outcomes, [said.request_id])
        same = [o for o in known.get(said.request_id, []) if o.source == said.source]
        if same and (same[0].quality, same[0].loss_usd) != (said.quality, said.loss_usd):
            raise HttpError(409, "another outcome was recorded for this request and source", code="conflict")
        if not same:
            await self._amended(self.store.outcome(outcome))
            if entry.use in self.board.models:
                self.board.judged(entry.use, self.calls.priced_as(entry.task_class or ""), said.quality)
        await request.json({"request_id": said.request_id, "recorded": True})

    async def _reconcile(self, request: Request, key: Key) -> None:
        """What a request cost that was settled at its cap, or estimated; budgets of its period follow."""
        if key.scope != "admin":
            raise HttpError(403, "reconciling needs a key with scope admin", code="permission_denied")
        said = await self._read(request, _ChargeBody)
        try:
            charged = nano(said.charged_usd)
        except QuantityError as error:
            raise HttpError(400, str(error), code="invalid_value", param="charged_usd") from error
        async with self._correcting:  # two at once would both count from the same amount
            where = Filter(request_id=said.request_id)
            rows = await asyncio.to_thread(self.store.entries, None, 1, where)
            if not rows:
                what = f"there is no request '{said.request_id}'"
                raise HttpError(404, what, code="not_found", param="request_id")
            row = rows[0]
            if row.corrected_nano != charged:
                correction = Correction(said.request_id, self.board.clock(), charged, said.source)
                await self._amended(self.store.reconcile(correction))
                self._respend(row.entry, charged - row.paid_nano)
        answer = {
            "request_id": said.request_id,
            "charged_usd": usd(charged),
            "before_usd": usd(row.paid_nano),
        }
        await request.json(answer)

    def _respend(self, entry: Entry, more: Nano) -> None:
        """Budgets hear that so much more, or less, was spent in the period of a request."""
        for account in accounts_of(entry.key_id, entry.tenant):
            with suppress(SettingsError):  # an account that comes later is told what the ledger has then
                self.escrow.load(account, entry.at_ns, more)

    async def _amended(self, ticket: Ticket) -> None:
        """Return when it is durable.

        Raises:
            HttpError: 404 for a request that is not there, 409 for what contradicts the ledger.
        """
        try:
            await self.store.written(ticket)
        except UnknownRequest as error:
            raise HttpError(404, str(error), code="not_found") from error
        except Conflict as error:
            raise HttpError(409, str(error), code="conflict") from error

    async def _decide(self, request: Request, key: Key) -> None:
        said = await self._read(request, _DecideBody)
        if not said.uses:
            raise HttpError(400, "give at least one use", code="invalid_value", param="uses")
        value = said.value_usd if said.value_usd is not None else self.calls.value_of(key, said.task_class)
        if value is None:
            raise HttpError(
                400,
                "give value_usd, or a key or settings with a value",
                code="invalid_value",
                param="value_usd",
            )
        try:
            found = self.board.price(
                [(u.name, u.quality, u.usd, u.seconds, u.risk) for u in said.uses],
                value,
                key.tenant,
                said.task_class,
            )
        except WalrasError as error:
            raise HttpError(400, str(error), code="invalid_value", param="uses") from error
        best = found.ranked[0]
        await request.json(
            {
                "choice": best.use if best.net > 0 or not self.board.economy.defer else None,
                "surplus": found.surplus,
                "prices_version": found.version,
                "uses": [
                    {
                        "use": a.use,
                        "value": a.value,
                        "compute": a.compute,
                        "latency": a.latency,
                        "risk": a.risk,
                        "net": a.net,
                    }
                    for a in found.ranked
                ],
            }
        )

    async def _metrics(self, request: Request, key: Key) -> None:
        if key.scope == "tenant":
            raise HttpError(403, "metrics need a key with scope admin or read-only", code="permission_denied")
        page = self.metrics.page()
        await request.answer(200, page, [(b"content-type", b"text/plain; version=0.0.4; charset=utf-8")])

    async def _read(self, request: Request, kind: type[Any]) -> Any:
        body = await request.body(self.board.economy.gateway.body_bytes)
        try:
            return msgspec.json.decode(body, type=kind)
        except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
            raise HttpError(400, f"the body cannot be read: {error}", code="invalid_body") from error


def _anthropic(request: Request) -> bool:
    """Whether the client speaks Anthropic's API, also where it asks for what there is not."""
    return b"anthropic-version" in request.headers or request.path.startswith("/v1/messages")


def _row_data(row: Row) -> dict[str, Any]:
    e = row.entry
    return {
        "request_id": e.request_id,
        "at": e.at_ns / 1e9,
        "tenant": e.tenant,
        "class": e.task_class,
        "session": e.session,
        "model": e.model_asked,
        "use": e.use,
        "upstream": e.upstream,
        "status": e.status,
        "http_status": e.http_status,
        "settled": e.settled,
        "charged_usd": usd(e.charged_nano),
        "paid_usd": usd(row.paid_nano),
        "reconciled": row.corrected_nano is not None,
        "reserved_usd": usd(e.reserved_nano),
        "value_usd": e.value_usd,
        "propensity": e.propensity,
        "prices_version": e.prices_version,
        "input_tokens": e.input_tokens,
        "cached_input_tokens": e.cached_input_tokens,
        "output_tokens": e.output_tokens,
        "reasoning_tokens": e.reasoning_tokens,
        "seconds": e.seconds,
        "seconds_to_first": e.seconds_to_first,
        "alternatives": [
            {
                "use": a.use,
                "value": usd(a.value_nano),
                "compute": usd(a.compute_nano),
                "latency": usd(a.latency_nano),
                "risk": usd(a.risk_nano),
                "net": usd(a.net_nano),
            }
            for a in _alternatives(e.alternatives)
        ],
    }


def _alternatives(stored: bytes) -> list[Any]:
    try:
        return unpack(stored)
    except RecordError:
        return []
