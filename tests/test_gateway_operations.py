"""What an operator declares and mends: kinds and prices of models, regions, corrections of the ledger, and what a restart must not forget."""

from __future__ import annotations

import asyncio
import json
from collections import Counter
from collections.abc import Awaitable, Callable
from contextlib import AsyncExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from inprocess import CHAT, Live, live
from ledgers import entry, hold
from logs import Ran, walras
from responder import Peer, Responder, serve
from walras.equation import terms
from walras.errors import SettingsError
from walras.gateway.board import Board
from walras.gateway.clearer import clear
from walras.gateway.metering import Call as Money
from walras.gateway.metering import Job, Tariff
from walras.gateway.offers import Asked, tasks_of, uses_of
from walras.gateway.serve import build_upstreams, demo_economy, open_service
from walras.gateway.simulated import SimulatedTransport
from walras.gateway.transport import Request, Response
from walras.gateway.wire import Usage
from walras.ledger import Filter, open_store, verify
from walras.prices import Prices
from walras.settings import Economy, load_economy

TWO_KINDS: dict[str, Any] = {
    "value": 0.02,
    "lambda0": 0.0001,
    "budget_usd": 0.002,
    "tenants": {"acme": {"forbidden_models": ["large"], "sla_s": 3.0}},
    "classes": {"index": {"budget_usd": 0.00001}, "code": {"rho0": 2.0}},
    "upstreams": {"simulated": {"kind": "simulated"}},
    "models": {
        "small": {"upstream": "simulated", "input_usd": 0.2, "output_usd": 0.8, "quality": 0.5, "seconds": 1.0},
        "large": {"upstream": "simulated", "input_usd": 4, "output_usd": 20, "quality": 0.9, "risk_usd": 0.001},
        "metered": {"upstream": "simulated", "input_usd": 0, "output_usd": 0, "request_usd": 0.001, "quality": 0.6},
        "vectors": {
            "upstream": "simulated", "kind": "embeddings", "input_usd": 0.02, "output_usd": 0, "quality": 1.0,
            "seconds": 0.1,
        },
        "fine-vectors": {
            "upstream": "simulated", "kind": "embeddings", "input_usd": 0.13, "output_usd": 5, "quality": 1.0,
            "quality_by_class": {"index": 0.4}, "seconds": 0.2,
        },
    },
}  # fmt: skip
Test = Callable[[Live], Awaitable[None]]


def run(folder: Path, test: Test, economy: Economy | None = None, **faults: float) -> None:
    """Run a test inside a service in `folder`."""

    async def whole() -> None:
        transport = SimulatedTransport(time_scale=0.0, faults=faults)  # type: ignore[arg-type]
        async with live(folder, transport, economy) as service:
            await test(service)

    asyncio.run(whole())


# --- kinds of models ------------------------------------------------------------------------------------------------------


def priced_board() -> Board:
    """A board whose prices were found from both kinds of requests."""
    board = Board(Economy.model_validate(TWO_KINDS))
    for k in range(60):
        board.asked(0.02, 100.0 + 40 * k, ("acme", "other")[k % 2], ("code", "")[k % 3 == 0], "chat")
        board.asked(0.02, 500.0, "other", "index", "embeddings")
    board.came_back("small", "code", 900.0, 2.5)
    board.judged("large", "", 1.0)
    found = clear(board.economy, *board.latest(), ())
    prices = Prices.from_json(found["prices"])
    assert any(p.multiplier > 0 for p in prices.discovered), "else nothing is priced"
    board.post(replace(board.standing, prices=prices))
    return board


BOARD = priced_board()


@given(
    value=st.floats(0, 10),
    tokens=st.floats(0, 200_000),
    tenant=st.sampled_from(["acme", "other", ""]),
    task_class=st.sampled_from(["code", "index", ""]),
    kind=st.sampled_from(["chat", "embeddings"]),
)
@settings(max_examples=200, deadline=None, suppress_health_check=list(HealthCheck))
def test_a_decision_is_what_the_equation_says(
    value: float, tokens: float, tenant: str, task_class: str, kind: Any
) -> None:
    """The compiled decision against [Z-1] over the same uses: each term of each use, and which are open."""
    decided = BOARD.decide(value, tokens, tenant=tenant, task_class=task_class, kind=kind)
    asked, (_, known) = [Asked(value, tokens, tenant, task_class, kind)], BOARD.latest()
    uses = uses_of(BOARD.economy, asked, known)
    parts = terms(tasks_of(BOARD.economy, asked), uses, BOARD.standing.prices)
    assert {a.use for a in decided.ranked} == {
        n for n, ok in zip(uses.names, uses.allowed[0], strict=True) if ok
    }
    for a in decided.ranked:
        at = uses.names.index(a.use)
        said = [float(column[0, at]) for column in (parts.value, parts.compute, parts.latency, parts.risk)]
        np.testing.assert_allclose([a.value, a.compute, a.latency, a.risk], said, rtol=1e-9, atol=1e-15)
    assert [a.net for a in decided.ranked] == sorted((a.net for a in decided.ranked), reverse=True)


def test_a_request_takes_models_of_its_kind_only() -> None:
    economy = Economy.model_validate(TWO_KINDS)
    asked = [Asked(1.0, 1000.0, t, "", k) for t in ("acme", "other") for k in ("chat", "embeddings")]  # type: ignore[arg-type]
    uses = uses_of(economy, asked, {})
    assert uses.names == ("small", "large", "metered", "vectors", "fine-vectors")
    assert uses.allowed.tolist() == [
        [True, False, True, False, False],
        [False, False, False, True, True],
        [True, True, True, False, False],
        [False, False, False, True, True],
    ]
    np.testing.assert_allclose(uses.amounts[0, :, 0], [0.0006, 0.014, 0.001, 0.00002, 0.00013])


def test_what_embeddings_cost_moves_no_price_that_is_not_theirs() -> None:
    """A budget of the class 'code' alone: its price is that of its own requests, whatever else is asked."""
    declared = TWO_KINDS | {"budget_usd": None, "tenants": {}, "classes": {"code": {"budget_usd": 0.004}}}
    economy = Economy.model_validate(declared)
    chats = [Asked(0.05, 50.0 * k, "", "code") for k in range(40)]
    vectors = [Asked(5.0, 1e6, "", "", "embeddings")] * 40
    alone, mixed = (Prices.from_json(clear(economy, a, {}, ())["prices"]) for a in (chats, chats + vectors))
    (before,), (after,) = alone.discovered, mixed.discovered
    assert before.multiplier > 0
    assert after.multiplier == pytest.approx(before.multiplier, rel=1e-6)


def test_the_process_that_finds_prices_knows_the_kinds(tmp_path: Path) -> None:
    async def test(service: Live) -> None:
        board = service.calls.board
        for k in range(30):
            board.asked(0.02, 100.0 * k, "other", "code")
            board.asked(0.02, 2000.0 + k, "other", "index", "embeddings")
        await service.service.clearer.once()
        assert board.standing.problem is None
        here = Prices.from_json(clear(board.economy, *board.latest(), ())["prices"])
        found = [p.multiplier for p in board.standing.prices.discovered]
        assert found == pytest.approx([p.multiplier for p in here.discovered])
        assert max(found) > 0

    run(tmp_path, test, Economy.model_validate(TWO_KINDS))


@pytest.mark.parametrize("defer", [True, False])
def test_a_request_that_nothing_is_open_to_does_not_stop_prices(defer: bool) -> None:
    rules = {"acme": {"forbidden_models": ["vectors", "fine-vectors"]}}
    economy = Economy.model_validate(TWO_KINDS | {"defer": defer, "tenants": rules})
    refused = [Asked(0.02, 100.0, "acme", "", "embeddings")] * 5
    others = [Asked(0.02, 100.0 * k, "other", "code") for k in range(30)]
    assert clear(economy, refused + others, {}, ()) == clear(economy, others, {}, ())
    assert "no model is open" in clear(economy, refused, {}, ())["problem"]


def test_auto_and_names_keep_to_their_kind(tmp_path: Path) -> None:
    async def test(service: Live) -> None:
        vectors = await service.ask("/v1/embeddings", {"model": "auto", "input": "hello"})
        assert vectors.status == 200
        assert vectors.headers["x-walras-use"] == "vectors"  # the same quality for less
        chat = await service.ask("/v1/chat/completions", CHAT | {"model": "simulated-small"})
        assert chat.status == 404
        named = CHAT | {"model": "vectors"}
        for path, body in (
            ("/v1/chat/completions", named),
            ("/v1/messages", named | {"max_tokens": 5}),
            ("/v1/responses", {"model": "vectors", "input": "a"}),
        ):
            got = await service.ask(path, body)
            assert got.status == 400
            assert "of kind 'embeddings'" in got.json()["error"]["message"]
            assert "takes a model of kind 'chat'" in got.json()["error"]["message"]
        got = await service.ask("/v1/embeddings", {"model": "small", "input": "a"})
        assert got.status == 400
        assert got.json()["error"]["param"] == "model"
        entries = service.audit()
        assert [(e.use, e.output_tokens) for e in entries] == [("vectors", 0)]
        assert entries[0].alternatives.count(b"vectors") == 2
        assert b"small" not in entries[0].alternatives

    run(tmp_path, test, Economy.model_validate(TWO_KINDS))


@pytest.mark.parametrize(
    ("kind", "path"), [("chat", "/v1/embeddings"), ("embeddings", "/v1/chat/completions")]
)
def test_without_a_model_of_the_kind_it_says_so(kind: str, path: str, tmp_path: Path) -> None:
    models = {n: m for n, m in TWO_KINDS["models"].items() if m.get("kind", "chat") == kind}
    other = "chat" if kind == "embeddings" else "embeddings"

    async def test(service: Live) -> None:
        got = await service.ask(path, CHAT | {"model": "auto", "input": "a"})
        assert got.status == 404
        assert f"no model of kind '{other}' is served" in got.json()["error"]["message"]
        assert f'kind = "{other}"' in got.json()["error"]["message"]
        assert service.entries() == []
        assert service.calls.board.latest()[0] == [], "prices are not found from what nobody serves"

    run(tmp_path, test, Economy.model_validate(TWO_KINDS | {"models": models, "tenants": {}}))


def test_anthropic_has_no_embeddings() -> None:
    upstream = {"kind": "anthropic", "base_url": "https://x.example"}
    model = {"upstream": "a", "kind": "embeddings", "input_usd": 1, "output_usd": 0}
    with pytest.raises(ValueError, match=r"models\.m: Anthropic's API has no embeddings"):
        Economy.model_validate({"upstreams": {"a": upstream}, "models": {"m": model}})


# --- prices and limits of models --------------------------------------------------------------------------------------------

ALL_PRICES = {
    "upstream": "simulated", "input_usd": 0.8, "cached_input_usd": 0.2, "cache_write_usd": 1.0, "output_usd": 3.2,
    "reasoning_usd": 6.4, "request_usd": 0.000_5, "max_output_tokens": 50,
}  # fmt: skip


def one_model(**model: Any) -> Economy:
    """The model that reasons, at these prices."""
    return Economy.model_validate(
        {
            "value": 1.0,
            "upstreams": {"simulated": {"kind": "simulated"}},
            "models": {"simulated-medium": ALL_PRICES | model},
        }
    )


def test_every_kind_of_token_and_the_request_have_their_price(tmp_path: Path) -> None:
    economy = one_model()
    upstream = build_upstreams(economy, SimulatedTransport(), SimulatedTransport())["simulated"]
    prices = upstream.models["simulated-medium"].prices
    assert prices.cost_nano(Usage(10, 20, 30, 40, 50)) == 500_000 + 8_000 + 4_000 + 30_000 + 128_000 + 320_000
    plain = one_model(cached_input_usd=None, cache_write_usd=None, reasoning_usd=None, request_usd=0.0)
    upstream = build_upstreams(plain, SimulatedTransport(), SimulatedTransport())["simulated"]
    assert (
        upstream.models["simulated-medium"].prices.cost_nano(Usage(10, 20, 30, 40, 50))
        == 60 * 800 + 90 * 3200
    )

    async def test(service: Live) -> None:
        for stream in (False, True):
            assert (
                await service.ask("/v1/chat/completions", CHAT | {"model": "auto", "stream": stream})
            ).status == 200
        for e in service.audit():
            assert e.input_tokens is not None
            assert e.output_tokens is not None
            assert e.reasoning_tokens
            made = (e.output_tokens - e.reasoning_tokens) * 3200 + e.reasoning_tokens * 6400
            assert e.charged_nano == 500_000 + e.input_tokens * 800 + made
            assert e.reserved_nano >= e.charged_nano
            assert e.output_tokens <= 50

    run(tmp_path, test, economy)


def test_the_price_of_a_request_is_set_aside_too(tmp_path: Path) -> None:
    async def test(service: Live) -> None:
        poor, able = (
            service.make_key("poor", budget_usd=0.000_49),
            service.make_key("able", budget_usd=0.001_2),
        )
        body = CHAT | {"max_tokens": 5}
        assert (
            await service.ask("/v1/chat/completions", body | {"model": "auto"}, poor.secret)
        ).status == 429
        got = await service.ask("/v1/chat/completions", body | {"model": "auto"}, able.secret)
        assert got.status == 200
        assert service.audit()[-1].charged_nano > 500_000

    run(tmp_path, test, one_model(reasoning_usd=None))


def test_a_tariff_with_a_price_by_request() -> None:
    tariff = Tariff(1_000_000, 2_000_000, 300)
    assert tariff.cost(10, 5) == 320
    assert tariff.affordable(320, 10) == 5
    assert tariff.affordable(319, 10) == 4


def answer(**more: Any) -> bytes:
    """What an upstream answers to a chat."""
    usage = {"prompt_tokens": 9, "completion_tokens": 3, "total_tokens": 12}
    message = {"role": "assistant", "content": "here you are"}
    choices = [{"index": 0, "message": message, "finish_reason": "stop"}]
    body = json.dumps(
        {
            "id": "c",
            "object": "chat.completion",
            "created": 1,
            "model": "m",
            "choices": choices,
            "usage": usage,
        }
        | more
    )
    return f"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: {len(body)}\r\n\r\n{body}".encode()


def provider(url: str, **model: Any) -> dict[str, Any]:
    """Settings of one OpenAI-compatible upstream."""
    return {
        "value": 1.0,
        "upstreams": {"first": {"base_url": url.removesuffix("/x")}},
        "models": {"m": {"upstream": "first", "input_usd": 1, "output_usd": 2} | model},
    }


@pytest.mark.parametrize(
    ("said", "sent", "reserved"),
    [
        ({}, 1000, 1000), ({"max_tokens": 4000}, 1000, 1000), ({"max_tokens": 10}, 10, 10),
        ({"max_completion_tokens": 4000, "n": 3}, 1000, 3000), ({"n": 2, "max_tokens": 7}, 7, 14),
    ],
)  # fmt: skip
def test_a_model_is_asked_for_no_more_than_it_makes(
    said: dict[str, Any], sent: int, reserved: int, tmp_path: Path
) -> None:
    bodies = []

    async def script(peer: Peer, body: bytes) -> None:
        bodies.append(json.loads(body))
        peer.socket.write(answer())

    async def whole() -> None:
        async with serve(script) as upstream:
            economy = Economy.model_validate(provider(upstream.url, max_output_tokens=1000))
            async with live(tmp_path, economy=economy) as service:
                got = await service.ask(
                    "/v1/chat/completions", {"model": "auto", "messages": CHAT["messages"]} | said
                )
                assert got.status == 200
                kept = service.audit()[0]
        caps = {bodies[0].get("max_tokens"), bodies[0].get("max_completion_tokens")} - {None}
        assert caps == {sent}
        assert reserved * 2000 < kept.reserved_nano < (reserved + 200) * 2000

    asyncio.run(whole())


def test_several_choices_share_what_is_affordable(tmp_path: Path) -> None:
    bodies = []

    async def script(peer: Peer, body: bytes) -> None:
        bodies.append(json.loads(body))
        peer.socket.write(answer())

    async def whole() -> None:
        async with serve(script) as upstream:
            economy = Economy.model_validate(provider(upstream.url))
            async with live(tmp_path, economy=economy) as service:
                key = service.make_key(budget_usd=0.003).secret
                got = await service.ask("/v1/chat/completions", CHAT | {"model": "m", "n": 4}, key)
                assert got.status == 200
                kept = service.audit()[0]
        assert kept.reserved_nano <= 3_000_000
        assert 4 * bodies[0]["max_completion_tokens"] * 2000 <= kept.reserved_nano

    asyncio.run(whole())


# --- regions and keys ---------------------------------------------------------------------------------------------------------


def regions_toml(urls: list[str]) -> str:
    home, eu, us = (url.removesuffix("/x") for url in urls)
    return f"""
value = 1.0
[upstreams.first]
base_url = "{home}"
regions = {{ eu = "{eu}", us = "{us}" }}
key_env = ["WALRAS_TEST_A", "WALRAS_TEST_B"]
[models.m]
upstream = "first"
input_usd = 1
output_usd = 2
"""


def test_regions_and_keys_are_used_turn_by_turn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WALRAS_TEST_A", "sk-a")
    monkeypatch.setenv("WALRAS_TEST_B", "sk-b")
    used: Counter[tuple[str, str]] = Counter()

    async def whole() -> None:
        async with AsyncExitStack() as stack:
            places: dict[str, Responder] = {}

            def at(name: str) -> Callable[[Peer, bytes], Awaitable[None]]:
                async def script(peer: Peer, _: bytes) -> None:
                    used[name, peer.headers[b"authorization"].decode()] += 1
                    peer.socket.write(answer())

                return script

            for name in ("home", "eu", "us"):
                places[name] = await stack.enter_async_context(serve(at(name)))
            file = tmp_path / "economy.toml"
            file.write_text(regions_toml([p.url for p in places.values()]))
            async with live(tmp_path / "data", economy=load_economy(file, {})) as service:
                for _ in range(18):
                    assert (await service.ask("/v1/chat/completions", CHAT | {"model": "m"})).status == 200
            assert used == {(n, f"Bearer sk-{k}"): 3 for n in places for k in "ab"}
            checked = await asyncio.to_thread(walras, "check", "--settings", file, "--json")
            assert [row["route"] for row in checked.data["upstreams"]] == [
                f"{region}, WALRAS_TEST_{k}" for region in ("default", "eu", "us") for k in "AB"
            ]
            assert {row["problem"] for row in checked.data["upstreams"]} == {None}
            assert "sk-" not in checked.out + checked.err

    asyncio.run(whole())


def test_a_region_that_is_down_is_named_and_the_others_answer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WALRAS_TEST_A", "sk-a")
    monkeypatch.setenv("WALRAS_TEST_B", "sk-b")

    async def whole() -> Ran:
        async with serve(answer()) as well:
            file = tmp_path / "economy.toml"
            file.write_text(regions_toml([well.url, well.url, "http://127.0.0.1:1/v1/x"]))
            async with live(tmp_path / "data", economy=load_economy(file, {})) as service:
                for _ in range(12):
                    assert (await service.ask("/v1/chat/completions", CHAT | {"model": "m"})).status == 200
                assert {e.status for e in service.audit()} == {"ok"}
            return await asyncio.to_thread(walras, "check", "--settings", file)

    ran = asyncio.run(whole())
    assert ran.code == 4
    assert "first (us, WALRAS_TEST_A)" in ran.err
    assert "first (eu" not in ran.err


@pytest.mark.parametrize(
    ("table", "says"),
    [
        ({"kind": "openai"}, "needs base_url"),
        ({"regions": {"": "https://x.example"}}, "at least 1 character"),
        ({"regions": {"eu": 3}}, "valid string"),
    ],
)
def test_regions_are_checked(table: dict[str, Any], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        Economy.model_validate({"upstreams": {"first": table}})


def test_a_region_needs_a_url() -> None:
    table = {"regions": {"eu": "ftp://x.example"}}
    model = {"upstream": "first", "input_usd": 1, "output_usd": 1}
    economy = Economy.model_validate({"upstreams": {"first": table}, "models": {"m": model}})
    with pytest.raises(SettingsError, match="must be http"):
        build_upstreams(economy, SimulatedTransport(), SimulatedTransport())


# --- what a client is told ---------------------------------------------------------------------------------------------


def test_where_a_budget_makes_it_dear_the_client_is_told_which_and_until_when(tmp_path: Path) -> None:
    async def test(service: Live) -> None:
        hour = 1_800_000_000 // 3600 * 3600 * 10**9
        service.service.gateway.board.clock = lambda: hour
        poor = service.make_key("acme", budget_usd=0.001, period="hour")
        service.calls.escrow.load(
            poor.key.accounts[0], hour, 600_000
        )  # most of it, and the hour has just begun
        got = await service.ask(CALL, CHAT | {"model": "auto"}, poor.secret, x_walras_value="0.001")
        assert (got.status, got.json()["error"]["code"]) == (402, "not_worth_its_price")
        assert f"the budget of key:{poor.key.id} is short; it resets in" in got.json()["error"]["message"]
        assert 0 < int(got.headers["retry-after"]) <= 3600
        with_room = service.make_key("acme", budget_usd=0.001, period="hour").secret
        paid = await service.ask(CALL, CHAT | {"model": "auto"}, with_room, x_walras_value="0.001")
        assert paid.status == 200
        rich = await service.ask(CALL, CHAT | {"model": "auto"}, x_walras_value="1e-9")
        assert rich.status == 402
        assert "budget" not in rich.json()["error"]["message"]
        assert "retry-after" not in rich.headers

    run(tmp_path, test)


def test_a_tier_that_is_named_as_a_model_is_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    menu = tmp_path / "menu.json"
    tiers = [{"name": name, "type_from": 0.1} for name in ("simulated-small", "gold")]
    menu.write_text(json.dumps({"tiers": tiers}))

    async def main() -> tuple[str, ...]:
        service = open_service(demo_economy(Economy()), tmp_path / "data", menu=menu)
        await service.stop()
        return service.gateway.calls.tiers

    assert asyncio.run(main()) == ("gold",)
    told = next(r for r in caplog.records if "tiers named as models" in r.getMessage())
    assert vars(told)["walras_fields"] == {"tiers": ["simulated-small"]}


# --- corrections ---------------------------------------------------------------------------------------------------------------

CALL = "/v1/chat/completions"
LONG = CHAT | {"max_tokens": 400}


async def capped(service: Live, key: str | None = None) -> str:
    """The id of a stream whose provider broke off: nobody knows what it charged, so all that was held was."""
    got = await service.ask(CALL, LONG | {"stream": True}, key)
    assert got.status == 200
    return got.headers["x-request-id"]


async def spent(service: Live, key: str) -> dict[str, int]:
    """Nano-USD by account."""
    told = (await service.ask("/v1/budgets", key=key)).json()
    return {row["account"]: round(row["spent_usd"] * 1e9) for row in told["data"]}


def test_budgets_follow_a_correction_at_once_and_after_a_restart(tmp_path: Path) -> None:
    made: list[Any] = []
    last: list[dict[str, int]] = []

    async def test(service: Live) -> None:
        team = service.make_key("acme", budget_usd=1.0)
        request_id = await capped(service, team.secret)
        cap = service.audit()[0].charged_nano
        assert cap > 10_000
        before = await spent(service, service.key)
        assert {before[a] for a in (f"key:{team.key.id}", "tenant:acme", "global")} == {cap}

        for amount, paid in ((0.000_123_456, 123_456), (0.5, 500_000_000), (0, 0), (0.000_000_7, 700)):
            body = {"request_id": request_id, "charged_usd": amount, "source": "invoice 7"}
            for again in (False, True):
                got = await service.ask("/v1/reconcile", body)
                assert got.status == 200, got
                assert got.json()["charged_usd"] == amount
                assert (got.json()["before_usd"] == amount) is again
                now = await spent(service, service.key)
                assert {now[a] for a in (f"key:{team.key.id}", "tenant:acme", "global")} == {paid}
            assert verify(service.service.store).paid_nano == paid
        row = service.service.store.entries(None, 1)[0]
        assert (row.entry.charged_nano, row.corrected_nano) == (cap, 700)
        made.append(team)
        last.append(now)

    async def again(service: Live) -> None:
        now = await spent(service, service.key)
        assert {a: n for a, n in now.items() if a in last[0]} == last[0]
        assert verify(service.service.store).to_reconcile == 0

    run(tmp_path, test, cut=1.0)
    run(tmp_path, again)


def test_corrections_at_once_add_up(tmp_path: Path) -> None:
    async def test(service: Live) -> None:
        team = service.make_key("acme", budget_usd=1.0)
        ids = [await capped(service, team.secret) for _ in range(2)]
        bodies = [{"request_id": ids[k % 2], "charged_usd": k / 1000} for k in range(1, 17)]
        answers = await asyncio.gather(*(service.ask("/v1/reconcile", body) for body in bodies))
        assert {got.status for got in answers} == {200}
        paid = verify(service.service.store).paid_nano
        assert (await spent(service, team.secret))[f"key:{team.key.id}"] == paid

    run(tmp_path, test, cut=1.0)


def test_a_correction_counts_in_the_period_of_its_request(tmp_path: Path) -> None:
    async def test(service: Live) -> None:
        board = service.service.gateway.board
        now = board.clock()
        team = service.make_key("acme", budget_usd=1.0, period="day")
        request_id = await capped(service, team.secret)
        board.clock = lambda: now + 86_400 * 10**9
        today = await spent(service, team.secret)
        assert today[f"key:{team.key.id}"] == 0
        assert (
            await service.ask("/v1/reconcile", {"request_id": request_id, "charged_usd": 0.9})
        ).status == 200
        assert await spent(service, team.secret) == today
        await capped(service, team.secret)  # today's budget is whole

    run(tmp_path, test, cut=1.0)


def test_only_what_was_a_guess_is_corrected_and_only_by_an_admin(tmp_path: Path) -> None:
    async def test(service: Live) -> None:
        known = (await service.ask(CALL, LONG)).headers["x-request-id"]
        fine = {"request_id": known, "charged_usd": 0.1}
        tenant, looker = service.make_key("acme").secret, service.make_key("eve", scope="read-only").secret
        for body, key, status, says in (
            (fine, tenant, 403, "scope admin"),
            (fine, looker, 403, "read-only"),
            (fine, "", 401, "no API key"),
            (fine, None, 409, "settled 'exact'"),
            (fine | {"request_id": "req_0"}, None, 404, "req_0"),
            (fine | {"charged_usd": -0.1}, None, 400, "at least 0"),
            (fine | {"charged_usd": 1e300}, None, 400, "below 9e9"),
            (fine | {"charged_usd": "much"}, None, 400, "charged_usd"),
            (fine | {"source": "x" * 300}, None, 400, "source"),
            ({"request_id": known}, None, 400, "charged_usd"),
        ):
            got = await service.ask("/v1/reconcile", body, key)
            assert got.status == status, got
            assert says in got.json()["error"]["message"]
        service.audit()

    run(tmp_path, test)


def test_what_is_to_reconcile_can_be_found(tmp_path: Path) -> None:
    async def test(service: Live) -> None:
        team, other = service.make_key("acme").secret, service.make_key("other").secret
        ids = [await capped(service, k) for k in (team, team, other)]
        service.calls.upstreams["simulated"]._transport.faults = {}  # type: ignore[attr-defined]
        fine = (await service.ask(CALL, LONG, team)).headers["x-request-id"]

        async def found(query: str, key: str | None = None) -> list[str]:
            data = (await service.ask(f"/v1/requests{query}", key=key)).json()["data"]
            return [row["request_id"] for row in data]

        assert await found("", team) == [fine, ids[1], ids[0]]
        assert await found("?settled=cap", team) == [ids[1], ids[0]]
        assert await found("?settled=cap") == ids[::-1]
        assert await found("?settled=exact") == [fine]
        await service.ask("/v1/reconcile", {"request_id": ids[0], "charged_usd": 0.0025})
        assert await found("?settled=cap&reconciled=false", team) == [ids[1]]
        assert await found("?settled=cap&reconciled=true") == [ids[0]]
        row = (await service.ask("/v1/requests?reconciled=true")).json()["data"][0]
        assert (row["settled"], row["reconciled"], row["paid_usd"]) == ("cap", True, 0.0025)
        assert row["charged_usd"] not in (0, 0.0025)
        for query in ("settled=never", "reconciled=maybe"):
            got = await service.ask(f"/v1/requests?{query}")
            assert got.status == 400
            assert got.json()["error"]["param"] == query.partition("=")[0]

    run(tmp_path, test, cut=1.0)


# --- corrections by a file -----------------------------------------------------------------------------------------------------


@pytest.fixture
def books(tmp_path: Path) -> Path:
    """A folder with a ledger: three requests that were guessed, one that was estimated, one that is known."""
    store = open_store(tmp_path / "ledger.sqlite")
    for name, settled in (("a", "cap"), ("b", "cap"), ("c", "cap"), ("d", "estimated"), ("e", "exact")):
        store.hold(hold(name)).wait()
        store.close(entry(name, 1_000, settled=settled)).wait()
    store.stop()
    return tmp_path


def reconcile(books: Path, file: Path, *more: object) -> Ran:
    return walras("ledger", "reconcile", file, "--data", books, *more)


def test_a_file_of_charges_corrects_the_ledger_once(books: Path) -> None:
    before = walras("ledger", "stats", "--data", books, "--json").data
    assert (before["to_reconcile"], before["to_reconcile_nano"]) == (3, 3_000)
    assert "3, charged $0.00000300" in walras("ledger", "stats", "--data", books).out
    file = books / "invoice.csv"
    file.write_text("request_id,model,charged_usd\na,m,0.0000004\nb,m,0.000002\nd,m,0.000001\n")
    ran = reconcile(books, file, "--source", "invoice 7")
    assert ran.code == 0, ran.err
    assert "3 requests corrected, 0 unchanged: $4.00e-07 more than the ledger said" in " ".join(
        ran.err.split()
    )
    again = reconcile(books, file, "--json").data
    assert again == {"corrected": 0, "unchanged": 3, "difference_nano": 0, "refused": []}
    store = open_store(books / "ledger.sqlite", read_only=True)
    try:
        assert [row.paid_nano for row in store.entries()] == [400, 2_000, 1_000, 1_000, 1_000]
        assert verify(store).ok
        assert {row.entry.request_id for row in store.entries(where=Filter(reconciled=True))} == {
            "a",
            "b",
            "d",
        }
    finally:
        store.stop()
    after = walras("ledger", "stats", "--data", books, "--json").data
    assert (after["to_reconcile"], after["corrections"]) == (1, 3)


ROWS = {
    "csv": "request_id,charged_usd,charged_nano\na,,7\nnone,1,\ne,1,\n,1,\nb,1,1\nb,,\nb,-1,\nb,x,\nb,,1.5\nb,,99999999999999999999\na,,8\nc,1e-9,\n",
    "jsonl": """{"request_id": "a", "charged_nano": 7}
{"request_id": "none", "charged_usd": 1}

{"request_id": "e", "charged_usd": 1}
{"charged_usd": 1}
{"request_id": "b", "charged_usd": 1, "charged_nano": 1}
{"request_id": "b"}
{"request_id": "b", "charged_usd": -1}
{"request_id": "b", "charged_usd": "x"}
{"request_id": "b", "charged_nano": 1.5}
{"request_id": "b", "charged_nano": 99999999999999999999}
{"request_id": "a", "charged_nano": 8}
{"request_id": "c", "charged_usd": 0.000000001}
""",
}
SAYS = {
    2: "no request 'none'", 3: "settled 'exact'", 4: "request_id", 5: "either", 6: "either", 7: "at least 0",
    8: "charged_usd", 9: "charged_nano", 10: "below 9e9", 11: "row 1 has this request too",
}  # fmt: skip


@pytest.mark.parametrize("ending", ROWS)
def test_rows_that_cannot_be_are_refused_by_number(ending: str, books: Path) -> None:
    file = books / f"charges.{ending}"
    file.write_text(ROWS[ending])
    ran = reconcile(books, file, "--json")
    assert ran.code == 3
    assert "10 rows refused" in ran.err
    found = json.loads(ran.out)
    assert (found["corrected"], found["unchanged"], found["difference_nano"]) == (2, 0, 7 - 1_000 + 1 - 1_000)
    assert {row["row"]: row["problem"] for row in found["refused"]}.keys() == SAYS.keys()
    for row in found["refused"]:
        assert SAYS[row["row"]] in row["problem"], row
    shown = reconcile(books, file)
    assert shown.code == 3
    assert "row 2: none: " in shown.err
    store = open_store(books / "ledger.sqlite", read_only=True)
    try:
        assert [row.corrected_nano for row in store.entries()] == [7, None, 1, None, None]
    finally:
        store.stop()


@pytest.mark.parametrize(
    ("name", "content", "code", "says"),
    [
        ("a.parquet", b"", 3, "neither .csv nor .jsonl"),
        ("a.csv", b"", 3, "needs the columns request_id and charged_usd or charged_nano"),
        ("a.csv", b"request_id,cost\na,1\n", 3, "it has request_id, cost"),
        ("a.csv", b"request_id,charged_usd\n\xff\xfe,1\n", 3, "cannot be read"),
        ("a.jsonl", b'[1]\n{\nnull\n{"request_id": "\xff"}\n', 3, "4 rows refused"),
        ("missing.csv", None, 3, "No such file"),
    ],
)
def test_files_that_cannot_be_read_say_why(
    name: str, content: bytes | None, code: int, says: str, books: Path
) -> None:
    if content is not None:
        (books / name).write_bytes(content)
    ran = reconcile(books, books / name)
    assert ran.code == code
    assert says in " ".join(ran.err.split())
    assert "Traceback" not in ran.err


def test_many_rows_are_written_in_batches(books: Path) -> None:
    store = open_store(books / "ledger.sqlite")
    for k in range(2_500):
        store.hold(hold(f"r{k}"))
        ticket = store.close(entry(f"r{k}", 1_000, settled="cap"))
    ticket.wait()
    store.stop()
    file = books / "many.csv"
    file.write_text("request_id,charged_nano\n" + "".join(f"r{k},{k}\n" for k in range(2_500)))
    done = reconcile(books, file, "--json").data
    assert (done["corrected"], done["difference_nano"]) == (2_500, sum(range(2_500)) - 2_500_000)


# --- a restart --------------------------------------------------------------------------------------------------------------------


def far_off() -> Economy:
    """Settings that expect what is not so: long answers, and none that is any good."""
    economy = demo_economy(Economy(value=0.02, budget_usd=0.000_5))
    models = {n: m.model_dump() | {"output_tokens": 4000, "quality": 0.1} for n, m in economy.models.items()}
    return Economy.model_validate(economy.model_dump() | {"models": models})


async def known_of(service: Live) -> dict[str, Any]:
    """What decides: expectations and prices, and what would be set aside."""
    board, meter = service.calls.board, service.calls.meter
    job = Job("simulated-small", "code", Tariff(0, 1_000_000), 0, 16_384)
    prices = Prices.from_json(clear(board.economy, *board.latest(), ())["prices"])
    expected = board.expected("simulated-small", "code")
    money = await meter.open(["global"], job, board.clock())
    assert isinstance(money, Money)
    await money.release()
    return {
        "kinds": Counter(a.kind for a in board.latest()[0]),
        "output": expected.output_tokens,
        "quality": expected.quality,
        "quality of another class": board.expected("simulated-small", "").quality,
        "set aside": money.reserved_nano,
        "price": [p.multiplier for p in prices.discovered],
        "net": [round(a.net, 9) for a in board.decide(0.02, 50.0, task_class="code").ranked],
    }


def test_a_restarted_service_prices_and_reserves_like_before(tmp_path: Path) -> None:
    seen: list[dict[str, Any]] = []

    async def before(service: Live) -> None:
        text = {"messages": [{"role": "user", "content": "how is it done? " * 40}]}
        for k in range(60):
            headers = {"x_walras_class": "code"} if k % 3 else {}
            body = CHAT | text | {"stream": k % 2 == 0}
            got = await service.ask(CALL, body, **headers)
            assert got.status == 200
            if k % 3 == 1:
                await service.ask("/v1/outcomes", {"request_id": got.headers["x-request-id"], "quality": 0.9})
        for _ in range(5):
            assert (await service.ask("/v1/embeddings", {"model": "auto", "input": "a"})).status == 200
        refused = CHAT | text | {"model": "auto"}
        assert (await service.ask(CALL, refused, x_walras_value="0.000000001")).status == 402
        seen.append(await known_of(service))

    async def cold(service: Live) -> None:
        service.calls.board.asked(0.02, 50.0, "tester", "code")
        seen.append(await known_of(service))

    async def after(service: Live) -> None:
        seen.append(await known_of(service))

    run(tmp_path / "a", before, far_off())
    run(tmp_path / "b", cold, far_off())
    run(tmp_path / "a", after, far_off())
    then, never, now = seen
    assert now.pop("price") == pytest.approx(
        then["price"], rel=0.01
    )  # it was found from estimates of prompts
    assert now == {name: pytest.approx(what) for name, what in then.items() if name != "price"}
    assert now["kinds"] == {"chat": 61, "embeddings": 5}
    for name in ("output", "quality", "set aside"):
        assert abs(never[name] - then[name]) > 0.1 * then[name], "else it would be no matter"
    assert never["price"] != pytest.approx(then["price"], rel=0.5)


# --- refusals ---------------------------------------------------------------------------------------------------------


def test_a_budget_that_has_room_for_no_use_says_so_whoever_chooses(tmp_path: Path) -> None:
    """Its price has risen until no use is worth it; what stops the request is that the money is gone."""

    async def test(service: Live) -> None:
        key = service.make_key(budget_usd=1e-7).secret
        for model in ("auto", "simulated-small"):
            got = await service.ask(CALL, CHAT | {"model": model}, key=key)
            assert (got.status, got.json()["error"]["code"]) == (429, "insufficient_quota")
        service.audit()

    run(tmp_path, test)


def test_a_field_that_prices_nothing_is_refused(tmp_path: Path) -> None:
    async def test(service: Live) -> None:
        uses = [{"name": "a", "quality": 0.7, "usd": 0.01}]
        for body in ({"value": 2, "uses": uses}, {"value_usd": 2, "uses": [uses[0] | {"cost_usd": 1}]}):
            got = await service.ask("/v1/decide", body)
            assert got.status == 400
            assert b"unknown field" in got.body
        assert (await service.ask("/v1/decide", {"value_usd": 2, "uses": uses})).status == 200

    run(tmp_path, test)


class DeadKey(SimulatedTransport):
    """SIMULATED: the first request meets a key that is not taken."""

    def __init__(self, name: str) -> None:
        super().__init__(time_scale=0.0)
        self.name, self.asked = name, list[str]()

    async def send(self, sent: Request) -> Response:
        self.asked.append(json.loads(sent.body)["model"])
        self.faults = {"401": 1.0} if len(self.asked) == 1 else {}
        return await super().send(sent)


def test_a_dead_key_says_nothing_against_a_model_that_has_another(tmp_path: Path) -> None:
    model = {"upstream": "s", "input_usd": 1, "output_usd": 4}
    other = model | {"upstream": "t", "quality": 0.6}
    models = {"simulated-small": model | {"quality": 0.9}, "simulated-medium": other}
    for regions, second in (
        ({}, "simulated-medium"),
        ({"eu": "http://eu.invalid/v1"}, "simulated-small"),
    ):
        transport = DeadKey(second)
        upstreams = {"s": {"kind": "simulated", "regions": regions}, "t": {"kind": "simulated"}}
        economy = Economy.model_validate({"value": 1.0, "models": models, "upstreams": upstreams})

        async def whole(economy: Economy = economy, transport: DeadKey = transport) -> None:
            async with live(tmp_path / transport.name, transport, economy) as service:
                assert (await service.ask(CALL, CHAT | {"model": "auto"})).status == 200

        asyncio.run(whole())
        assert transport.asked == ["simulated-small", second]
