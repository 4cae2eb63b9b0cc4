"""The clearing protocol: prices from quotes and answers, with late, lost, lumpy, dead and lying tenants, in process and over sockets."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from walras.errors import QuantityError, SettingsError
from walras.market.tenants.protocol import Answer, Demand, Market, Unreliable, in_process
from walras.market.tenants.wire import Closed, Join, Operator, take_part

RESOURCES = ("prefill", "decode", "kv")
SUPPLY = {"prefill": 100.0, "decode": 20.0, "kv": 300.0}


def spender(budget: float, shares: Any, elasticity: float = 1.0) -> Demand:
    """A tenant with a budget and constant elasticity of substitution."""

    def demand(prices: Mapping[str, float]) -> dict[str, float]:
        p = np.array([prices[r] for r in RESOURCES])
        weight = shares * p**-elasticity
        return dict(zip(RESOURCES, (budget * weight / (weight @ p)).tolist(), strict=True))

    return demand


def crowd(n: int, elasticity: float, seed: int) -> dict[str, Demand]:
    rng = np.random.default_rng(seed)
    return {f"t{k}": spender(float(rng.lognormal()), rng.dirichlet(np.ones(3)), elasticity) for k in range(n)}


def test_fixed_shares_clear_at_the_known_prices() -> None:
    """Cobb–Douglas: p_j = Σ B_i·a_ij / s_j, in one move and one look."""
    shares, budgets = np.array([[0.5, 0.3, 0.2], [0.1, 0.1, 0.8]]), [3.0, 1.0]
    demands = {f"t{k}": spender(budgets[k], shares[k]) for k in range(2)}
    first = dict.fromkeys(RESOURCES, 0.02)
    found = in_process(Market("m", SUPPLY, list(demands), prices=first), demands)
    assert found.status == "cleared"
    assert found.rounds == 2
    for j, resource in enumerate(RESOURCES):
        assert found.prices[resource] == pytest.approx(np.dot(budgets, shares[:, j]) / SUPPLY[resource])
    assert found.messages == 2 * found.rounds * 2


@settings(max_examples=25)
@given(st.floats(0.5, 4), st.integers(0, 10_000))
def test_what_is_late_or_lost_does_not_bend_prices(elasticity: float, seed: int) -> None:
    """A third of the answers late or lost: within 1% of the prices of a market where all answer at once."""
    demands = crowd(15, elasticity, seed)
    one = in_process(Market("m", SUPPLY, list(demands), tolerance=1e-4), demands)
    market = Market("m", SUPPLY, list(demands), tolerance=1e-4)
    other = in_process(market, demands, Unreliable(0.15, 0.15, seed=seed))
    assert one.status == other.status == "cleared"
    assert other.stale == 0
    assert other.rounds <= 4 * one.rounds + 20
    for resource in RESOURCES:
        assert other.prices[resource] == pytest.approx(one.prices[resource], rel=0.01)
    assert sum(conduct.missing for conduct in other.conduct.values()) > 0
    assert sum(conduct.inconsistent for conduct in other.conduct.values()) == 0


def test_the_silent_are_not_waited_for_forever() -> None:
    demands = crowd(9, 1.0, 0)
    alive = in_process(Market("m", SUPPLY, list(demands)), demands)

    def run(dead_after: int) -> Any:
        market = Market("m", SUPPLY, [*demands, "dead"], patience=5)
        spends = spender(2.0, np.array([0.4, 0.3, 0.3]))
        while market.status == "going on":
            quote = market.quote
            for name, demand in (demands | {"dead": spends}).items():
                if name != "dead" or quote.round <= dead_after:
                    market.receive(Answer("m", name, quote.round, dict(demand(quote.prices))))
            market.close_round()
        return market.result()

    never, once = run(0), run(1)
    assert never.status == once.status == "cleared"
    assert never.stale == once.stale == 1
    # Who never answered takes nothing; who fell silent goes on spending.
    assert never.prices["kv"] == pytest.approx(alive.prices["kv"], rel=1e-2)
    assert once.prices["kv"] == pytest.approx(alive.prices["kv"] + 2.0 * 0.3 / 300, rel=1e-2)


def test_lumps_are_cleared_up_to_a_lump_and_it_says_so() -> None:
    """Each of 40 tenants takes one whole bundle while it is worth its price, or nothing."""
    rng = np.random.default_rng(3)
    worth = rng.lognormal(size=40)

    def taker(value: float) -> Demand:
        def demand(prices: Mapping[str, float]) -> dict[str, float]:
            price = sum(prices[r] * SUPPLY[r] / 20 for r in RESOURCES)
            return {r: SUPPLY[r] / 20 for r in RESOURCES} if value > price else {}

        return demand

    demands = {f"t{k}": taker(float(v)) for k, v in enumerate(worth)}
    found = in_process(Market("m", SUPPLY, list(demands), rounds=120), demands)
    assert found.lump == pytest.approx(1 / 20)
    assert found.error <= 2 * found.lump
    # The 20 that value it most: the price of a bundle lies between the 20th and the 21st.
    price = sum(found.prices[r] * SUPPLY[r] / 20 for r in RESOURCES)
    ranked = np.sort(worth)[::-1]
    assert ranked[21] <= price <= ranked[18]


def test_a_liar_who_contradicts_itself_is_counted() -> None:
    """Answers that swap what is dear for what is cheap the wrong way round break the weak axiom."""
    demands = crowd(6, 1.0, 1)
    before: dict[str, float] = {}

    def contrary(prices: Mapping[str, float]) -> dict[str, float]:
        risen = max(RESOURCES, key=lambda r: prices[r] / before[r] if before else prices[r])
        before.update(prices)
        return {risen: 1.0 / prices[risen]}

    first = {"prefill": 0.001, "decode": 0.5, "kv": 0.004}
    market = Market("m", SUPPLY, [*demands, "liar"], rounds=40, prices=first)
    found = in_process(market, demands | {"liar": contrary})
    assert found.conduct["liar"].inconsistent > 0
    assert all(found.conduct[name].inconsistent == 0 for name in demands)


@pytest.mark.parametrize(
    ("answer", "words"),
    [
        (Answer("other", "a", 1, {}), "market 'other'"),
        (Answer("m", "nobody", 1, {}), "tenant 'nobody'"),
        (Answer("m", "a", 2, {}), "round 2"),
        (Answer("m", "a", 0, {}), "round 0"),
        (Answer("m", "a", 1, {"gold": 1.0}), "'gold'"),
        (Answer("m", "a", 1, {"kv": -1.0}), "-1.0 of 'kv'"),
        (Answer("m", "a", 1, {"kv": float("nan")}), "nan of 'kv'"),
    ],
)
def test_an_answer_that_cannot_be_is_refused_and_the_last_good_one_stands(answer: Answer, words: str) -> None:
    market = Market("m", SUPPLY, ["a"])
    assert market.receive(Answer("m", "a", 1, {"kv": 30.0})) is None
    refusal = market.receive(answer)
    assert refusal is not None
    assert words in refusal.reason
    assert market.result().demands["a"].tolist() == [0.0, 0.0, 30.0]


def test_an_older_answer_does_not_replace_a_newer_one() -> None:
    market = Market("m", SUPPLY, ["a", "b"])
    market.receive(Answer("m", "a", 1, {"kv": 900.0}))
    market.close_round()
    market.receive(Answer("m", "a", 2, {"kv": 10.0}))
    market.receive(Answer("m", "a", 1, {"kv": 20.0}))
    assert market.result().demands["a"].tolist() == [0.0, 0.0, 10.0]
    assert market.conduct["a"].late == 1


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"supply": {"kv": 0.0}}, "'kv': supply"),
        ({"supply": {}}, "no resources"),
        ({"prices": {"kv": 1.0}}, "first price"),
        ({"tenants": []}, "at least one"),
        ({"tenants": ["a", "a"]}, "no name twice"),
        ({"tolerance": 0.0}, "tolerance"),
    ],
)
def test_a_market_that_cannot_be_is_refused(changes: dict[str, Any], words: str) -> None:
    arguments: dict[str, Any] = {"name": "m", "supply": SUPPLY, "tenants": ["a"]} | changes
    with pytest.raises(QuantityError, match=words):
        Market(**arguments)


def test_every_tenant_needs_something_to_ask() -> None:
    with pytest.raises(QuantityError, match="'b' has no demand"):
        in_process(Market("m", SUPPLY, ["a", "b"]), {"a": spender(1.0, np.ones(3) / 3)})


# --- between processes --------------------------------------------------------------------------------------------------

TENANT = """
import asyncio, sys
from walras.market.tenants.wire import Join, take_part
calls = 0
def demand(prices):
    global calls
    calls += 1
    if calls == 3 and sys.argv[2] == "dies":
        import os, signal
        os.kill(os.getpid(), signal.SIGKILL)
    return {name: 1.0 / 3 / price for name, price in prices.items()}
closed = asyncio.run(take_part("127.0.0.1", int(sys.argv[1]), Join("gpu", sys.argv[2], "secret"), demand))
print(closed.status)
"""


def test_processes_clear_over_sockets_and_outlive_one_that_is_killed() -> None:
    market = Market("gpu", SUPPLY, ["lives", "dies", "slow"], patience=3, tolerance=1e-4)
    operator = Operator(market, dict.fromkeys(market.conduct, "secret"), round_s=0.3)
    ports: list[int] = []

    async def run() -> tuple[Any, Closed, list[bytes]]:
        task = asyncio.create_task(operator.run(on_listening=ports.append))
        while not ports:
            await asyncio.sleep(0.01)
        processes = [
            await asyncio.create_subprocess_exec(
                sys.executable, "-c", TENANT, str(ports[0]), name, stdout=subprocess.PIPE
            )
            for name in ("lives", "dies")
        ]
        slow = asyncio.create_task(
            take_part(
                "127.0.0.1",
                ports[0],
                Join("gpu", "slow", "secret"),
                spender(5.0, np.array([0.6, 0.3, 0.1]), 2.0),
            )
        )
        out = [(await process.communicate())[0] for process in processes]
        return await task, await slow, out

    found, closed, out = asyncio.run(run())
    assert found.status == closed.status == "cleared"
    assert out == [b"cleared\n", b""]
    assert found.stale == 1
    assert found.conduct["dies"].answers == 2
    assert found.error <= 1e-4
    assert closed.prices == found.prices


def talk(lines: list[bytes]) -> list[dict[str, Any]]:
    """What the operator of a market of one tenant says to these lines, before the tenant itself ends the market."""

    async def run() -> list[dict[str, Any]]:
        ports: list[int] = []
        operator = Operator(Market("gpu", SUPPLY, ["a"]), {"a": "secret"}, round_s=0.2)
        task = asyncio.create_task(operator.run(on_listening=ports.append))
        while not ports:
            await asyncio.sleep(0.01)
        reader, writer = await asyncio.open_connection("127.0.0.1", ports[0])
        writer.write(b"".join(lines))
        said = [json.loads(await asyncio.wait_for(reader.readline(), 5)) for _ in lines]
        writer.close()
        await take_part("127.0.0.1", ports[0], Join("gpu", "a", "secret"), spender(1.0, np.ones(3) / 3))
        await task
        return said

    return asyncio.run(run())


JOIN = b'{"type":"join","market":"gpu","tenant":"a","token":"secret"}\n'


@pytest.mark.parametrize(
    ("lines", "words"),
    [
        ([b"hello\n"], "first a join"),
        ([JOIN.replace(b"gpu", b"cpu")], "first a join"),
        ([JOIN.replace(b"secret", b"guess")], "not its token"),
        ([JOIN.replace(b'"a"', b'"b"')], "no such tenant"),
        ([JOIN, b"[1, 2\n"], "not an answer"),
        ([JOIN, b'{"type":"answer","market":"gpu","tenant":"b","round":1,"amounts":{}}\n'], "you are 'a'"),
        ([JOIN, b'{"type":"answer","market":"gpu","tenant":"a","round":9,"amounts":{}}\n'], "round 9"),
    ],
)
def test_the_operator_refuses_in_words_and_goes_on(lines: list[bytes], words: str) -> None:
    said = [message for message in talk(lines) if message["type"] == "refusal"]
    assert any(words in message["reason"] for message in said), said
    assert "secret" not in json.dumps(said)


def test_a_tenant_is_told_what_is_wrong_with_its_market() -> None:
    with pytest.raises(QuantityError, match="no market at 127"):
        asyncio.run(take_part("127.0.0.1", 1, Join("gpu", "a", "x"), dict))
    with pytest.raises(SettingsError, match="'a' has no token"):
        Operator(Market("gpu", SUPPLY, ["a"]), {})
