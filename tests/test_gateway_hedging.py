"""A second attempt beside a slow one: when it is worth its price, who wins, and that all of it is paid for."""

from __future__ import annotations

import asyncio
import gc
import json
from collections.abc import Awaitable, Callable
from contextlib import suppress
from pathlib import Path
from random import Random
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from inprocess import Live, live, request
from walras.gateway.board import Alternative
from walras.gateway.calls import Attempt, Calls, Run
from walras.gateway.hedging import Waits, best_hedge
from walras.gateway.serve import demo_economy
from walras.gateway.simulated import SimulatedTransport
from walras.gateway.transport import Request, Response
from walras.settings import Economy

CHAT = {"model": "auto", "messages": [{"role": "user", "content": "hello"}], "max_tokens": 40}
PATH = "/v1/chat/completions"


class Held(SimulatedTransport):
    """SIMULATED: the first request is answered after `seconds`, or fails then; all others at once."""

    def __init__(self, seconds: float, *, fails: bool = False, others: float = 0.0) -> None:
        super().__init__(time_scale=0.0)
        self.seconds, self.fails, self.others, self.asked = seconds, fails, others, list[str]()

    async def send(self, sent: Request) -> Response:
        self.asked.append(json.loads(sent.body)["model"])
        first = len(self.asked) == 1
        await asyncio.sleep(self.seconds if first else self.others)
        if first and self.fails:
            self.faults = {"500": 1.0}
            try:
                return await super().send(sent)
            finally:
                self.faults = {}
        return await super().send(sent)


def economy(**more: Any) -> Economy:
    """Two models of like worth, and a second that costs a dollar."""
    model = {"upstream": "s", "input_usd": 1, "output_usd": 4, "seconds": 0.03, "output_tokens": 40}
    data = {
        "value": 1.0,
        "lambda0": 1.0,
        "models": {
            "simulated-small": model | {"quality": 0.6},
            "simulated-medium": model | {"quality": 0.59},
        },
        "upstreams": {"s": {"kind": "simulated"}},
    }
    return demo_economy(Economy.model_validate(data | more))


def run(
    folder: Path,
    transport: SimulatedTransport,
    test: Callable[[Live], Awaitable[None]],
    settings: Economy | None = None,
) -> None:
    async def whole() -> None:
        async with live(folder, transport, settings or economy()) as service:
            # A stream is expected to begin as soon as a whole answer comes.
            service.calls.waits._expected_s = lambda use, stream: 0.03
            await test(service)
            await service.calls.ended()

    asyncio.run(whole())


# --- what it is worth -------------------------------------------------------------------------------------------------


def use(name: str, value: float = 1.0, compute: float = 0.0, risk: float = 0.0) -> Alternative:
    return Alternative(name, value, compute, 0.0, risk)


def test_a_hedge_must_save_more_delay_than_it_costs() -> None:
    """Waiting for 3 s at 0.1 USD a second, or for 1 s: saves 0.2 USD."""
    first = use("a")
    for cost, found in ((0.19, "b"), (0.21, None)):
        best = best_hedge([use("b", compute=cost)], first, 0.1, 3.0, lambda _: 1.0)
        assert (best and best.use) == found


def test_a_worse_answer_sooner_may_not_be_worth_it() -> None:
    assert best_hedge([use("b", value=0.7)], use("a"), 0.1, 3.0, lambda _: 1.0) is None
    assert best_hedge([use("b", value=0.9)], use("a"), 0.1, 3.0, lambda _: 1.0) is not None


def test_an_answer_after_its_deadline_is_worth_nothing() -> None:
    first, other = use("a"), use("b", compute=0.5)
    assert best_hedge([other], first, 0.0, 3.0, lambda _: 1.0) is None
    assert best_hedge([other], first, 0.0, 3.0, lambda _: 1.0, deadline_left_s=2.0) == other
    assert best_hedge([other], first, 0.0, 3.0, lambda _: 1.0, deadline_left_s=0.5) is None


money = st.floats(0, 10)


@given(
    st.lists(st.tuples(money, money, money, money), max_size=6),
    money,
    money,
    money,
    st.none() | st.floats(0, 10),
)
def test_it_is_the_best_of_all_that_can_be_done(
    others: list[tuple[float, float, float, float]],
    value: float,
    price: float,
    left: float,
    deadline: float | None,
) -> None:
    """Against every use written out."""
    offered = [use(str(k), v, c, r) for k, (v, c, r, _) in enumerate(others)]
    waits = {str(k): w for k, (_, _, _, w) in enumerate(others)}

    def late(seconds: float) -> bool:
        return deadline is not None and seconds > deadline

    alone = (0.0 if late(left) else value) - price * left
    worth = {
        a.use: (0.0 if late(waits[a.use]) else a.value) - price * waits[a.use] - a.compute - a.risk
        for a in offered
        if waits[a.use] < left
    }
    best = best_hedge(offered, use("a", value), price, left, waits.__getitem__, deadline)
    assert (alone if best is None else worth[best.use]) == max([alone, *worth.values()])


def test_who_waits_longer_than_anybody_has_waits_on() -> None:
    waits = Waits(lambda use, stream: 1.0)
    for k in range(1, 101):
        waits.learn("a", False, k / 100, ended=True)
    assert waits.left("a", False) == pytest.approx(0.5, rel=0.1)
    assert waits.left("a", False, 0.5) == pytest.approx(0.25, rel=0.15)
    assert waits.left("a", False, 30.0) == pytest.approx(30.0)
    for _ in range(100):  # what was given up at 0.2 s would have been longer
        waits.learn("b", False, 0.1, ended=True)
        waits.learn("b", False, 0.2, ended=False)
    assert waits.left("b", False, 0.3) > 0.3


# --- in the service ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stream", [False, True])
def test_the_hedge_answers_where_the_first_is_slow(stream: bool, tmp_path: Path) -> None:
    transport = Held(30.0)

    async def test(service: Live) -> None:
        got = await service.ask(PATH, CHAT | {"stream": stream})
        assert got.status == 200
        assert not stream or b"[DONE]" in got.body
        assert transport.asked == ["simulated-small", "simulated-medium"]
        assert got.headers["x-walras-use"] == "simulated-medium"
        (entry,) = service.audit()
        assert (entry.use, entry.status, entry.settled) == ("simulated-medium", "ok", "estimated")
        assert entry.charged_nano > 0
        assert entry.seconds is not None
        assert entry.seconds < 10
        assert (
            b'walras_hedges_total{outcome="first",use="simulated-medium"} 1.0' in service.calls.metrics.page()
        )

    run(tmp_path, transport, test)


@pytest.mark.parametrize("stream", [False, True])
def test_the_first_may_still_be_first(stream: bool, tmp_path: Path) -> None:
    transport = Held(0.3, others=30.0)

    async def test(service: Live) -> None:
        got = await service.ask(PATH, CHAT | {"stream": stream})
        assert got.status == 200
        assert got.headers["x-walras-use"] == "simulated-small"
        assert len(transport.asked) == 2
        (entry,) = service.audit()
        assert (entry.use, entry.settled) == (
            "simulated-small",
            "estimated",
        )  # nobody knows what the second cost
        assert b'outcome="second"' in service.calls.metrics.page()

    run(tmp_path, transport, test)


def test_a_first_that_fails_leaves_it_to_the_hedge(tmp_path: Path) -> None:
    transport = Held(0.2, fails=True, others=0.4)

    async def test(service: Live) -> None:
        got = await service.ask(PATH, CHAT)
        assert (got.status, got.headers["x-walras-use"]) == (200, "simulated-medium")
        assert len(transport.asked) == 2  # the hedge, and no retry
        (entry,) = service.audit()
        assert entry.settled == "exact"  # what fails with 500 is not charged

    run(tmp_path, transport, test)


@pytest.mark.parametrize(
    "settings",
    [
        economy(lambda0=0.0),  # time costs nothing
        economy(lambda0=1e-9),  # or less than a second attempt
        economy(tenants={"acme": {"forbidden_models": ["simulated-medium"]}}),
    ],
)
def test_where_it_is_not_worth_its_price_nobody_else_is_asked(settings: Economy, tmp_path: Path) -> None:
    transport = Held(0.4)

    async def test(service: Live) -> None:
        key = service.make_key().secret
        got = await service.ask(PATH, CHAT, key=key)
        assert got.status == 200
        assert transport.asked == ["simulated-small"]
        assert [e.settled for e in service.audit()] == ["exact"]

    run(tmp_path, transport, test, settings)


def test_a_deadline_is_worth_a_hedge_where_time_costs_nothing(tmp_path: Path) -> None:
    transport = Held(30.0)

    async def test(service: Live) -> None:
        got = await service.ask(PATH, CHAT, **{"x-walras-deadline": "2"})
        assert (got.status, len(transport.asked)) == (200, 2)
        service.audit()

    run(tmp_path, transport, test, economy(lambda0=0.0))


def test_a_model_that_is_named_is_asked_again_only_by_another_road(tmp_path: Path) -> None:
    for regions, asked in (({}, 1), ({"eu": "http://eu.invalid/v1"}, 2)):
        transport = Held(0.4)

        async def test(service: Live, transport: Held = transport, asked: int = asked) -> None:
            got = await service.ask(PATH, CHAT | {"model": "simulated-small"})
            assert got.status == 200
            assert transport.asked == ["simulated-small"] * asked
            service.audit()

        upstreams = {"s": {"kind": "simulated", "regions": regions}}
        run(tmp_path / str(asked), transport, test, economy(upstreams=upstreams))


def test_a_budget_that_has_no_room_for_two_has_one(tmp_path: Path) -> None:
    transport = Held(0.3)

    async def test(service: Live) -> None:
        key = service.make_key(budget_usd=0.0004).secret  # one call reserves 0.00025
        got = await service.ask(PATH, CHAT, key=key)
        assert (got.status, len(transport.asked)) == (200, 1)
        service.audit()

    run(tmp_path, transport, test)


@pytest.mark.parametrize("after_s", [0.01, 0.05, 0.1, 0.3])
@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_leaves_ends_both(stream: bool, after_s: float, tmp_path: Path) -> None:
    transport = Held(30.0, others=30.0)

    async def test(service: Live) -> None:
        _, writer = await asyncio.open_connection("127.0.0.1", service.port)
        writer.write(request(PATH, json.dumps(CHAT | {"stream": stream}).encode(), service.key))
        await asyncio.sleep(after_s)
        with suppress(ConnectionError):
            writer.transport.abort()
        async with asyncio.timeout(5):
            while service.calls.open or transport.open:
                await asyncio.sleep(0.01)
        await service.calls.ended()
        (entry,) = service.audit()
        assert (entry.status, entry.settled) == ("cut", "cap")
        assert len(transport.asked) == 2 or after_s < 0.3

    run(tmp_path, transport, test)


def test_many_races_leave_no_money_behind(tmp_path: Path) -> None:
    """Both come at about the same moment, again and again."""

    luck = Random(5)

    class Racing(SimulatedTransport):
        async def send(self, sent: Request) -> Response:
            await asyncio.sleep(luck.choice((0.0, 0.05, 0.15)) + luck.uniform(0.0, 0.02))
            return await super().send(sent)

    transport = Racing(time_scale=0.0)

    async def test(service: Live) -> None:
        asked, page = 0, b""
        while asked < 120 or not (b'outcome="first"' in page and b'outcome="second"' in page):
            asks = [service.ask(PATH, CHAT | {"stream": bool(k % 2)}) for k in range(20)]
            assert {got.status for got in await asyncio.gather(*asks)} == {200}
            asked += 20
            assert asked < 1200, "a race that always ends alike is none"
            page = service.calls.metrics.page()
        await service.calls.ended()
        assert len(service.audit()) == asked

    run(tmp_path, transport, test)


# --- when several things happen at once -------------------------------------------------------------------------------


async def leave(service: Live, body: dict[str, Any], when: Callable[[], bool]) -> None:
    """A client that asks, and hangs up as soon as `when`."""
    _, writer = await asyncio.open_connection("127.0.0.1", service.port)
    writer.write(request(PATH, json.dumps(body).encode(), service.key))
    async with asyncio.timeout(5):
        while not when():
            await asyncio.sleep(0.005)
    with suppress(ConnectionError):
        writer.transport.abort()
    async with asyncio.timeout(5):
        while service.calls.open:
            await asyncio.sleep(0.01)
    await service.calls.ended()


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_may_leave_while_the_second_is_called_off(
    stream: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    transport, entered, real = Held(0.2, others=30.0), asyncio.Event(), Calls._call_off

    async def slow(calls: Calls, run: Any, hedge: Any) -> None:
        if not entered.is_set():
            entered.set()
            await asyncio.sleep(30.0)
        await real(calls, run, hedge)

    monkeypatch.setattr(Calls, "_call_off", slow)

    async def test(service: Live) -> None:
        await leave(service, CHAT | {"stream": stream}, entered.is_set)
        assert transport.open == 0
        assert [h.in_flight for u in service.calls.upstreams.values() for h in u.health()] == [0]
        (entry,) = service.audit()
        assert (entry.use, entry.status) == ("simulated-small", "cut")
        # What the first made is known where it came in one piece, what the second made never is.
        assert entry.settled == ("cap" if stream else "estimated")

    run(tmp_path, transport, test)


def test_an_entry_names_the_upstream_of_its_use(tmp_path: Path) -> None:
    transport = Held(30.0, others=30.0)
    plain = economy().model_dump(include={"models"})["models"]
    plain["simulated-medium"]["upstream"] = "t"
    settings = economy(models=plain, upstreams={"s": {"kind": "simulated"}, "t": {"kind": "simulated"}})

    async def test(service: Live) -> None:
        await leave(service, CHAT, lambda: len(transport.asked) == 2)
        (entry,) = service.audit()
        assert (entry.use, entry.upstream) == ("simulated-small", "s")

    run(tmp_path, transport, test, settings)


def test_a_second_that_fails_is_counted_and_changes_nothing(tmp_path: Path) -> None:
    class Failing(Held):
        async def send(self, sent: Request) -> Response:
            second = bool(self.asked)
            self.faults = {"500": 1.0} if second else {}
            try:
                return await super().send(sent)
            finally:
                if second:
                    self.faults = {}

    transport = Failing(0.3)

    async def test(service: Live) -> None:
        got = await service.ask(PATH, CHAT)
        assert (got.status, got.headers["x-walras-use"]) == (200, "simulated-small")
        (entry,) = service.audit()
        assert entry.settled == "exact"
        page = service.calls.metrics.page()
        assert b'walras_attempts_total{outcome="server error",upstream="s"} 1.0' in page
        assert b'outcome="failed",use="simulated-medium"' in page

    run(tmp_path, transport, test)


def test_a_bug_in_a_second_is_logged_without_its_words(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    class Broken(Held):
        async def send(self, sent: Request) -> Response:
            if self.asked:
                raise ZeroDivisionError("a secret")
            return await super().send(sent)

    async def test(service: Live) -> None:
        got = await service.ask(PATH, CHAT)
        assert (got.status, got.headers["x-walras-use"]) == (200, "simulated-small")
        service.audit()

    run(tmp_path, Broken(0.3), test)
    gc.collect()
    assert "ZeroDivisionError in" in caplog.text
    assert "secret" not in caplog.text


def test_a_bug_in_looking_is_logged_without_its_words(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: Any) -> None:
        raise ZeroDivisionError("a secret")

    monkeypatch.setattr("walras.gateway.calls.best_hedge", broken)

    async def test(service: Live) -> None:
        assert (await service.ask(PATH, CHAT)).status == 200
        service.audit()

    run(tmp_path, Held(0.3), test)
    assert "ZeroDivisionError in" in caplog.text
    assert "secret" not in caplog.text


@pytest.mark.parametrize("seconds", [0.0, 0.3])
def test_a_call_that_is_over_is_let_go_at_once(seconds: float, tmp_path: Path) -> None:
    """With a second attempt or without: collections would hold up whoever comes next."""

    async def test(service: Live) -> None:
        reader, writer = await asyncio.open_connection("127.0.0.1", service.port)
        asking = request(PATH, json.dumps(CHAT).encode(), service.key).replace(b"connection: close\r\n", b"")
        for k in range(2):
            if k:
                gc.collect()
                gc.disable()
            writer.write(asking)
            await reader.readuntil(b"}}")
            await asyncio.sleep(0.05)
        try:
            assert not [o for o in gc.get_objects() if type(o) in (Run, Attempt)]
        finally:
            gc.enable()
            writer.close()
            await writer.wait_closed()

    class Always(Held):
        async def send(self, sent: Request) -> Response:
            self.asked.clear()
            return await super().send(sent)

    run(tmp_path, Always(seconds), test)
