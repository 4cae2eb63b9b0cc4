"""The service put together: settings, upstreams, keys, ledger, board; started, drained, stopped."""

from __future__ import annotations

import asyncio
import gc
import json
import logging
import os
import signal
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import uvicorn

from walras.errors import OutputError, SettingsError, nearest
from walras.gateway.app import Gateway
from walras.gateway.board import Board
from walras.gateway.calls import AUTO, Calls
from walras.gateway.clearer import Clearer
from walras.gateway.escrow import LocalEscrow, period_of
from walras.gateway.keys import Key, KeyStore
from walras.gateway.logs import event
from walras.gateway.metering import Meter
from walras.gateway.metrics import Metrics
from walras.gateway.protocol import Protocol, sweep
from walras.gateway.simulated import EMBEDDING, MODELS, SimulatedTransport
from walras.gateway.transport import HttpTransport, Timeouts, Transport
from walras.gateway.upstream import Served, TokenPrices, Upstream, UpstreamSettings
from walras.gateway.warm import warm
from walras.ledger import Store, nano, open_store, recover
from walras.settings import Economy, ModelSettings
from walras.supply.engines import EngineReader, watch

if TYPE_CHECKING:
    from walras.gateway.tracing import Tracer

_log = logging.getLogger("walras.gateway")
DRAIN_S = 30
"""Most seconds that calls under way are waited for when the service stops."""
WRITE_S = 5.0
"""Most seconds that a ledger which cannot be written is waited for then."""
CUT_S = 5.0
"""Most seconds for calls that are cut off to settle."""
YOUNG = 20_000
"""New objects at which those in cycles are looked for."""
MEGA = 1_000_000_000
"""Nano-USD per USD: a price per million tokens in USD is this many nano-USD."""


def demo_economy(base: Economy) -> Economy:
    """The settings with SIMULATED providers where they name no models, and a worth where they name none."""
    if base.models or base.upstreams:  # a file that means to serve must not be answered by simulations
        return base
    models: dict[str, dict[str, Any]] = {
        m.name: {
            "upstream": "simulated",
            "input_usd": m.prices.input / MEGA,
            "cached_input_usd": (m.prices.cached_input or m.prices.input) / MEGA,
            "output_usd": m.prices.output / MEGA,
            "quality": round(1 / (1 + 2.718281828 ** (2 - m.skill)), 2),
            "output_tokens": m.tokens,
            "seconds": round(m.first_byte_s + m.token_s * m.tokens, 2),
        }
        for m in MODELS
    }
    models[EMBEDDING.name] = {
        "upstream": "simulated",
        "kind": "embeddings",
        "input_usd": EMBEDDING.prices.input / MEGA,
        "output_usd": 0,
        "seconds": EMBEDDING.first_byte_s,
    }
    data = base.model_dump() | {"models": models, "upstreams": {"simulated": {"kind": "simulated"}}}
    if base.value is None:
        data["value"] = 0.02
    return Economy.model_validate(data)


def build_upstreams(economy: Economy, transport: Transport, simulated: Transport) -> dict[str, Upstream]:
    """One for each table of the settings.

    Raises:
        SettingsError: an upstream without a model, a URL or a key that is not there; a rule about no model.
    """
    _named(economy)
    found = {}
    for name, table in economy.upstreams.items():
        own = {m: s for m, s in economy.models.items() if s.upstream == name}
        url = "http://simulated.invalid/v1" if table.kind == "simulated" else table.base_url
        timeouts = Timeouts(table.connect_s, table.first_byte_s, table.idle_s, table.total_s)
        settings = UpstreamSettings(
            name=name,
            kind=table.kind,
            models=tuple(_served(m, s) for m, s in own.items()),
            base_url=url or "",
            regions=table.regions,
            key_variables=table.key_env,
            timeouts=timeouts,
        )
        found[name] = Upstream(settings, simulated if table.kind == "simulated" else transport)
    return found


def _named(economy: Economy) -> None:
    """Raises SettingsError for a model that no client could name, and for a rule about a model that is not there."""
    for name in set(AUTO) & set(economy.models):
        hint = "rename it: upstream_model says what it is called there"
        raise SettingsError(
            f"'{name}' asks for any model, so none has that name", key=f"models.{name}", hint=hint
        )
    for kind, group, model in economy.forbidden_models():
        if model not in economy.models:
            where = f"{kind}.{group}.forbidden_models"
            raise SettingsError(
                f"there is no model '{model}'", key=where, hint=nearest(model, economy.models)
            )


def _served(name: str, model: ModelSettings) -> Served:
    def mega(price: float | None) -> int | None:
        return None if price is None else round(price * MEGA)

    prices = TokenPrices(
        input=round(model.input_usd * MEGA),
        output=round(model.output_usd * MEGA),
        cached_input=mega(model.cached_input_usd),
        cache_write=mega(model.cache_write_usd),
        reasoning=mega(model.reasoning_usd),
        request_nano=nano(model.request_usd),
    )
    return Served(name=name, prices=prices, upstream_model=model.upstream_model or "")


@dataclass(slots=True)
class Service:
    """Everything that runs, and how it ends."""

    economy: Economy
    gateway: Gateway
    keys: KeyStore
    store: Store
    transport: HttpTransport
    clearer: Clearer
    engines: tuple[EngineReader, ...]
    """Whose congestion is priced."""

    async def watch_engines(self) -> None:
        """Keep the prices of the engines' resources on the board, for ever."""
        board = self.gateway.board
        await watch(self.engines, board.others_delay_price, board.congested)

    async def stop(self) -> None:
        """After the last call: what is owed is written, and files are closed.

        Raises:
            OutputError: the ledger cannot be written; the next start settles what is open at its cap.
        """
        calls = self.gateway.calls
        await calls.ended()
        owed = await calls.books.paid(WRITE_S)
        await self.clearer.stop()
        await self.transport.aclose()
        await asyncio.to_thread(self.store.stop)
        self.keys.close()
        if calls.tracer is not None:
            await asyncio.to_thread(calls.tracer.close)
        if owed:
            raise OutputError(
                f"{owed} entries could not be written; the next start settles them at their caps"
            )


def open_service(
    economy: Economy, data: Path, ledger: str | None = None, menu: Path | None = None
) -> Service:
    """Open the state under `data` (made if there is none) and put the service together. Call it inside a running loop.

    Raises:
        SettingsError: settings that cannot serve. OutputError, RecordError: state that cannot be opened.
    """
    try:
        data.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputError(f"{data}: cannot be made: {error.strerror or error}") from error
    board, metrics, escrow = Board(economy), Metrics(), LocalEscrow()
    engines = tuple(EngineReader(name, link) for name, link in economy.engines.items())
    transport = HttpTransport()
    upstreams = build_upstreams(economy, transport, SimulatedTransport())
    tracer = _tracer(upstreams)
    store = open_store(ledger or data / "ledger.sqlite", durable="journal")
    try:
        recover(store)
        keys = KeyStore(data / "keys.sqlite", _Budgets(economy, escrow, store))
    except BaseException:
        store.stop()
        raise
    board.watch(metrics.prices)
    calls = Calls(board, Meter(escrow), escrow, store, upstreams, metrics, _read_menu(menu))
    hidden = [t["name"] for t in (calls.menu or {}).get("tiers", ()) if t["name"] in economy.models]
    if hidden:
        event(_log, logging.WARNING, "tiers named as models are: the name means the model", tiers=hidden)
    warm(calls, store, economy.gateway.window)
    calls.tracer = tracer
    gateway = Gateway(board, calls, keys, store, escrow, metrics)
    return Service(economy, gateway, keys, store, transport, Clearer(board), engines)


def _tracer(upstreams: dict[str, Upstream]) -> Tracer | None:
    """Where OpenTelemetry's own variables name a collector, spans are sent there."""
    said = os.environ.get
    collector = said("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT") or said("OTEL_EXPORTER_OTLP_ENDPOINT")
    off = said("OTEL_SDK_DISABLED", "").strip().lower() == "true"
    if not collector or off or said("OTEL_TRACES_EXPORTER", "otlp").strip() == "none":
        return None
    from walras.gateway.tracing import Tracer  # noqa: PLC0415 - an extra

    return Tracer(upstreams)


class _Budgets:
    """Tells the escrow the budgets of keys, and what was spent of them before."""

    def __init__(self, economy: Economy, escrow: LocalEscrow, store: Store) -> None:
        self._economy, self._escrow, self._store = economy, escrow, store
        self._known: set[str] = set()

    def __call__(self, keys: tuple[Key, ...]) -> None:
        now, whole = time.time_ns(), self._economy.gateway
        total = None if whole.budget_usd is None else nano(whole.budget_usd)
        self._set("global", total, whole.period, now, {})
        for key in keys:
            _, tenant, _ = key.accounts
            self._set(f"key:{key.id}", key.budget_nano, key.period, now, {"key_id": key.id})
            group = self._economy.tenants.get(key.tenant)
            own = None if group is None or group.budget_total_usd is None else nano(group.budget_total_usd)
            self._set(tenant, own, whole.period, now, {"tenant": key.tenant})

    def _set(self, account: str, budget: int | None, period: Any, now: int, where: dict[str, str]) -> None:
        self._escrow.set_budget(account, budget, period, now)
        if account not in self._known:
            start, _ = period_of(period, now)
            self._escrow.load(account, now, self._store.spent(start, **where))
            self._known.add(account)


def _read_menu(path: Path | None) -> dict[str, Any] | None:
    if path is None:
        return None
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise SettingsError(f"cannot be read: {error.strerror}", key=str(path)) from error
    except ValueError as error:
        raise SettingsError(f"is not JSON: {error}", key=str(path)) from error
    tiers = data.get("tiers") if isinstance(data, dict) else None
    if not isinstance(tiers, list) or not all(
        isinstance(t, dict) and "name" in t and "type_from" in t for t in tiers
    ):
        raise SettingsError("is no menu", key=str(path), hint="`walras menu --json` prints one")
    return dict(data)


async def serve(
    economy: Economy,
    data: Path,
    *,
    ledger: str | None = None,
    menu: Path | None = None,
    on_ready: Callable[[str, KeyStore], None],
) -> None:
    """Serve until a signal says to stop; then calls under way are finished, and all is written.

    Args:
        on_ready: told the URL once calls are accepted.
    """
    service = open_service(economy, data, ledger, menu)
    settings = economy.gateway
    try:
        sock = _bind(settings.host, settings.port)
    except BaseException:
        await service.stop()
        raise
    server = server_of(service.gateway)
    _on_signals(server, service.gateway)
    running = asyncio.create_task(server.serve(sockets=[sock]))
    clearing = asyncio.create_task(service.clearer.run())
    sweeping = asyncio.create_task(sweep(server.server_state.connections))
    watching = asyncio.create_task(service.watch_engines())
    try:
        while not server.started and not running.done():
            await asyncio.sleep(0.005)
        _settle_memory()
        host, port = sock.getsockname()[:2]
        service.gateway.ready = True
        event(_log, logging.INFO, "serving", host=host, port=port, models=list(economy.models))
        on_ready(f"http://{f'[{host}]' if ':' in host else host}:{port}", service.keys)
        await running
    finally:
        for task in (clearing, sweeping, watching):
            task.cancel()
            with suppress(asyncio.CancelledError):
                await task
        left = set(server.server_state.tasks)
        for task in left:  # those that took longer than the drain, or all after a second signal
            task.cancel()
        if left:
            await asyncio.wait(left, timeout=CUT_S)
        await service.stop()
        event(_log, logging.INFO, "stopped")


def _settle_memory() -> None:
    """What is loaded by now stays: the collector need not look at it again. A request's own garbage is seldom in cycles."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(YOUNG)


def server_of(app: Any) -> uvicorn.Server:
    """uvicorn with the limits and timeouts that the service has."""
    config = uvicorn.Config(
        app,
        loop="none",
        http=Protocol,
        ws="none",
        lifespan="off",
        access_log=False,
        log_config=None,
        server_header=False,
        proxy_headers=False,
        timeout_keep_alive=75,
        timeout_graceful_shutdown=DRAIN_S,
        backlog=4096,
    )
    return _Server(config)


class _Server(uvicorn.Server):
    """Signals are ours: uvicorn would end the process by them before the ledger is closed."""

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


def _on_signals(server: uvicorn.Server, gateway: Gateway) -> None:
    """The first asks calls to finish, the second cuts them off."""

    def stop() -> None:
        server.force_exit = server.should_exit
        server.should_exit = True
        gateway.stopping.set()

    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stop)


def _bind(host: str, port: int) -> socket.socket:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    sock = socket.socket(family, socket.SOCK_STREAM)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        sock.bind((host, port))
    except OSError as error:
        sock.close()
        what = f"{host}:{port} cannot be listened on: {error.strerror or error}"
        raise SettingsError(what, key="gateway.port", hint="take another --port or --host") from error
    return sock
