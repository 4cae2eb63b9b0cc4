"""The service on a real PostgreSQL server: calls, budgets and outcomes; kill -9 of the service and of the server; no server at all."""

from __future__ import annotations

import asyncio
import json
import subprocess
import time
import urllib.request
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.error import HTTPError

import pytest

from crowds import STEP_NANO, Crowd, audit, settings
from gateways import WALRAS, Service, running, start
from ledgers import Cluster, postgres_binaries, postgres_cluster
from walras.ledger import Store, open_store

pytestmark = pytest.mark.postgres


@pytest.fixture(scope="module")
def server() -> Iterator[Cluster]:
    binaries = postgres_binaries()
    if binaries is None:
        pytest.skip("no PostgreSQL server is installed (initdb and pg_ctl were not found)")
    with postgres_cluster(binaries) as cluster:
        yield cluster


@pytest.fixture
def url(server: Cluster) -> str:
    """Of a server without a ledger."""
    import psycopg  # noqa: PLC0415 - an extra

    with psycopg.connect(server.url, autocommit=True) as db:
        db.execute("DROP SCHEMA IF EXISTS walras CASCADE")
    return server.url


@contextmanager
def reading(url: str) -> Iterator[Store]:
    store = open_store(url, read_only=True)
    try:
        yield store
    finally:
        store.stop()


def ask(service: Service, path: str, key: str, body: Any = None) -> tuple[int, Any]:
    """Status and JSON; of a stream, its text."""
    data = None if body is None else json.dumps(body).encode()
    sent = urllib.request.Request(service.url + path, data, {"authorization": f"Bearer {key}"})
    try:
        with urllib.request.urlopen(sent, timeout=30) as answer:
            text = answer.read().decode()
            told = json.loads(text) if answer.headers["content-type"] == "application/json" else text
            return answer.status, (answer.headers["x-request-id"], told)
    except HTTPError as error:
        with error:
            return error.code, (None, json.loads(error.read()))


def scenario(test: Callable[[str], Awaitable[None]], piece_s: float = 0.001) -> None:
    """Run with settings that name an upstream."""

    async def whole() -> None:
        async with settings(piece_s) as toml:
            await test(toml)

    asyncio.run(whole())


async def until(true: Callable[[], bool], within_s: float = 15.0) -> None:
    ends = time.monotonic() + within_s
    while not await asyncio.to_thread(true):
        assert time.monotonic() < ends
        await asyncio.sleep(0.05)


CALL = {"model": "auto", "messages": [{"role": "user", "content": "hello there"}]}
COMPLETIONS = "/v1/chat/completions"


def test_calls_streams_budgets_and_outcomes_and_a_clean_restart(url: str, tmp_path: Path) -> None:
    async def test(toml: str) -> None:
        await asyncio.to_thread(calls, toml)

    def calls(toml: str) -> None:
        with running(tmp_path, toml, ledger=url) as service:
            admin, key = service.key, service.make_key("acme", budget_nano=10**9, period="month")
            status, (first, answer) = ask(service, COMPLETIONS, key, CALL)
            assert (status, answer["choices"][0]["finish_reason"]) == (200, "stop")
            status, (_, text) = ask(service, COMPLETIONS, key, CALL | {"stream": True})
            assert (status, text.strip().rsplit("\n", 1)[-1]) == (200, "data: [DONE]")
            judged = {"request_id": first, "quality": 0.75}
            assert [ask(service, "/v1/outcomes", key, judged)[0] for _ in range(2)] == [200, 200]
            assert ask(service, "/v1/outcomes", key, judged | {"quality": 0.5})[0] == 409
            _, (_, listed) = ask(service, "/v1/requests", key)
            assert [row["status"] for row in listed["data"]] == ["ok", "ok"]
            exact = {"request_id": first, "charged_usd": 0.01}
            assert ask(service, "/v1/reconcile", admin, exact)[0] == 409, "its charge was known"
            small = service.make_key("small", budget_nano=1)
            assert ask(service, COMPLETIONS, small, CALL)[0] == 429
            spent, command = ask(service, "/v1/budgets", key)[1][1]["spent_usd"], service.command()
            assert service.stop() == 0
        with running(tmp_path, ledger=url, command=command) as again:
            told = ask(again, "/v1/budgets", key)[1][1]
            assert (told["spent_usd"], told["reserved_usd"]) == (spent, 0)
        with reading(url) as store:
            entries = audit(store, set())
            assert [e.status for e in entries] == ["ok", "ok", "refused"]
            assert round(spent * 1e9) == sum(e.charged_nano for e in entries)
            assert [o.quality for o in store.outcomes([first])[first]] == [0.75]
        assert not (tmp_path / "data" / "ledger.sqlite").exists()

    scenario(test)


def test_kill_9_in_the_middle_of_32_streams(url: str, tmp_path: Path) -> None:
    budget = 32 * 60_000 + 100_000

    async def test(toml: str) -> None:
        crowd = Crowd()
        with running(tmp_path, toml, ledger=url) as service, reading(url) as store:
            admin, key = service.key, service.make_key("acme", budget_nano=budget, period="none")
            await crowd_for(crowd, service, key, 8, 0.5)
            ends = asyncio.Event()
            clients = [asyncio.create_task(crowd.calls(service, key, ends, stream=True)) for _ in range(32)]
            await until(lambda: len({hold.request_id for hold in store.open_holds()}) >= 24)
            command = service.command()
            service.process.kill()
            ends.set()
            await asyncio.gather(*clients)
        with running(tmp_path, None, admin, url, command) as service, reading(url) as store:
            unknown = [e for e in audit(store, crowd.acknowledged) if e.status == "unknown"]
            assert store.open_holds() == []
            assert 16 <= len(unknown) <= 32
            assert {e.settled for e in unknown} == {"cap"}
            await asyncio.to_thread(corrected, service, admin, key, unknown[0])
            await crowd_for(crowd, service, key, 32, 1.5)
            assert await asyncio.to_thread(service.stop) == 0
            audit(store, crowd.acknowledged)
            assert store.open_holds() == []
            spent = store.spent(0, tenant="acme")
        assert crowd.statuses[429] > 0, "the budget was not spent"
        assert spent <= budget + STEP_NANO
        assert crowd.acknowledged

    scenario(test, 0.04)
    verified = subprocess.run(
        [WALRAS, "ledger", "verify", "--json", "--ledger", url],
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
    )
    assert json.loads(verified.stdout)["ok"]


def corrected(service: Service, admin: str, key: str, unknown: Any) -> None:
    """An invoice says what one of them cost, and its budget follows."""
    before = ask(service, "/v1/budgets", key)[1][1]["spent_usd"]
    said = {"request_id": unknown.request_id, "charged_usd": 0.000002}
    assert ask(service, "/v1/reconcile", admin, said)[0] == 200
    after = ask(service, "/v1/budgets", key)[1][1]["spent_usd"]
    assert round((before - after) * 1e9) == unknown.charged_nano - 2_000


async def crowd_for(crowd: Crowd, service: Service, key: str, many: int, seconds: float) -> None:
    ends = asyncio.Event()
    clients = [asyncio.create_task(crowd.calls(service, key, ends)) for _ in range(many)]
    await asyncio.sleep(seconds)
    ends.set()
    await asyncio.gather(*clients)


def test_a_server_that_crashes_under_load_and_comes_back(server: Cluster, url: str, tmp_path: Path) -> None:
    async def test(toml: str) -> None:
        crowd, ends = Crowd(), asyncio.Event()
        with running(tmp_path, toml, ledger=url) as service:
            key = service.make_key("acme", budget_nano=10**9)

            async def status(path: str, key: str, body: Any = None) -> int:
                return (await asyncio.to_thread(ask, service, path, key, body))[0]

            async def some_more() -> None:
                enough = len(crowd.acknowledged) + 20
                await until(lambda: len(crowd.acknowledged) > enough)

            clients = [asyncio.create_task(crowd.calls(service, key, ends)) for _ in range(16)]
            for life in range(2):
                await some_more()
                await asyncio.to_thread(server.stop)
                await until(lambda: ask(service, "/readyz", "")[0] == 503)
                late = service.make_key(f"late-{life}")
                assert await status(COMPLETIONS, late, CALL) == 503
                assert await status("/v1/requests", key) == 503
                await asyncio.to_thread(server.start)
                await until(lambda: ask(service, "/readyz", "")[0] == 200)
                assert await status("/v1/requests", key) == 200
                assert await status(COMPLETIONS, late, CALL) == 200
            await some_more()
            ends.set()
            await asyncio.gather(*clients)
            assert await asyncio.to_thread(service.stop) == 0
        assert set(crowd.statuses) <= {0, 200, 503}, crowd.statuses
        assert crowd.statuses[503] > 0
        log = service.log.read_text()
        assert not [said for said in ("Traceback", "ASGI") if said in log], log
        with reading(url) as store:
            audit(store, crowd.acknowledged)
            assert store.open_holds() == []

    scenario(test)


def test_without_a_server_it_says_so_and_ends(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError) as told:
        start(tmp_path, ledger="postgresql://walras:pass-word@127.0.0.1:1/x")
    assert "exit code 7" in str(told.value)
    assert "the ledger in PostgreSQL: the server does not answer" in str(told.value)
    assert "Traceback" not in str(told.value)
    assert "pass-word" not in str(told.value)
