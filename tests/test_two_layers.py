"""The first thesis test's parts, and routing by old and noisy prices: laws by hand and by two roads."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engines import flat_steps
from two_layers.planner import Came, Future, fortified, tried
from two_layers.play import DEFER, PENALTY, Pool, Run, Seconds, bounds, play, welfare
from two_layers.policies import Beliefs, board, isolated, selfish
from two_layers.report import share
from two_layers.run import cells
from two_layers.world import Coupling, Plant, Window, outcomes, plant, window
from walras.engine.requests import Requests
from walras.engine.settings import EngineSettings
from walras.errors import QuantityError
from walras.supply.damping import Turns, nowcast, shares, temperature
from walras.supply.resource_prices import EngineModel
from walras.supply.state import EngineState

# --- old and noisy prices ------------------------------------------------------------------------------------------------


@settings(max_examples=50)
@given(st.lists(st.floats(0, 100), min_size=1, max_size=8), st.floats(0, 50), st.floats(-50, 50))
def test_shares_follow_costs_and_not_their_level(costs: list[float], warm: float, level: float) -> None:
    of = np.array(costs)
    found = shares(of, warm)
    assert found.sum() == pytest.approx(1)
    assert (np.diff(found[np.argsort(of, kind="stable")]) <= 1e-12).all()
    if warm > 1e-3:
        np.testing.assert_allclose(shares(of + level, warm), found, atol=1e-9)


def test_without_temperature_equals_share_the_cheapest_place() -> None:
    np.testing.assert_array_equal(shares(np.array([2.0, 1.0, 1.0]), 0.0), [0.0, 0.5, 0.5])


@settings(max_examples=30)
@given(st.integers(1, 6), st.integers(0, 10**6))
def test_turns_follow_shares(engines: int, seed: int) -> None:
    turns, random = Turns(engines), np.random.default_rng(seed)
    wanted, got = np.zeros(engines), np.zeros(engines)
    for _ in range(60):
        part = random.dirichlet(np.full(engines, random.choice([0.1, 1.0])))
        wanted += part
        got[turns.take(part)] += 1
        assert (got < wanted + 1 + 1e-9).all()
    even = Turns(engines)
    for _ in range(3):
        assert sorted(even.take(np.full(engines, 1 / engines)) for _ in range(engines)) == [*range(engines)]


def swing(warm: float, age: int, stay: int, arrivals: float, engines: int) -> tuple[float, float]:
    """Widest difference of loads at the start, and late: `engines` queues of which a share leaves each tick, costs 1 a request."""
    load = np.tile(arrivals * stay / engines * (1 + 0.1 * np.linspace(-1, 1, engines)), (age + 1, 1))
    history = [*load]
    for _ in range(60 * max(age, 1) + 20 * stay):
        now = history[-1]
        history.append(now + arrivals * shares(history[-1 - age], warm) - now / stay)
    late = np.array(history[-(4 * age + 10) :])
    return float(np.ptp(load[0])), float(np.ptp(late, axis=1).max())


@settings(max_examples=10, deadline=None)
@given(st.integers(8, 20), st.integers(20, 80), st.floats(0.5, 20), st.integers(2, 5))
def test_routes_come_to_rest_at_the_temperature_and_swing_without(
    age: int, stay: int, arrivals: float, engines: int
) -> None:
    warm = temperature(age, arrivals_per_s=arrivals, slope=1.0, stay_s=stay, engines=engines)
    begin, end = swing(warm, age, stay, arrivals, engines)
    assert end < 0.05 * begin
    assert swing(0.0, age, stay, arrivals, engines)[1] > 0.5 * begin


def test_temperature_by_hand() -> None:
    def of(age: float, error: float = 0.0) -> float:
        return temperature(age, arrivals_per_s=8, slope=0.5, stay_s=6, engines=4, error=error)

    assert of(0) == 0
    assert of(1) == pytest.approx(math.e)
    assert of(100) == pytest.approx(0.5 * 2 * 6)  # of an old reading, all that an engine holds
    assert of(0, math.pi) == pytest.approx(math.sqrt(6))


@pytest.mark.parametrize(
    ("key", "value"), [("age_s", -1.0), ("slope", math.nan), ("error", math.inf), ("engines", 0)]
)
def test_bad_temperatures_are_named(key: str, value: float) -> None:
    good = {"age_s": 1.0, "arrivals_per_s": 1.0, "slope": 1.0, "stay_s": 1.0, "engines": 2}
    with pytest.raises(QuantityError, match=key):
        temperature(**{**good, key: value})  # type: ignore[arg-type]


def reading(**of: float) -> EngineModel:
    settings = EngineSettings(kv_blocks=1000, max_batched_tokens=100, max_sequences=10)
    state = {
        "at_s": 10.0,
        "running": 0.0,
        "waiting": 3.0,
        "kv_use": 0.0,
        "arrivals_per_s": 0.01,
        "prompt_tokens_per_s": 1.0,
        "output_tokens_per_s": 0.0,
        "hit_share": 0.0,
        "preemptions_per_s": 0.0,
        "mean_prompt_tokens": 100.0,
        "mean_output_tokens": 1.0,
        **of,
    }
    return EngineModel.of(EngineState(**state), settings, flat_steps(100, 10, token_s=0.02))


def test_nowcast_by_hand() -> None:
    read = reading()
    model = dataclasses.replace(read, request_s=2.0)
    assert nowcast(model, np.array([]), np.array([]), 10.0) == read.state
    # 3 in line: at 12 s two, and one of double size is four; at 15 s two and a half.
    later = nowcast(model, np.array([12.0]), np.array([2.0]), 15.0)
    assert (later.at_s, later.waiting) == (15.0, pytest.approx(2.5))
    # Nobody in line, and the one sent at 11 s is gone by 30 s.
    assert nowcast(model, np.array([11.0]), np.array([1.0]), 30.0).waiting == 0


@pytest.mark.parametrize(("sent", "now"), [(9.0, 12.0), (13.0, 12.0), (11.0, 9.5)])
def test_nowcast_refuses_other_times(sent: float, now: float) -> None:
    with pytest.raises(QuantityError, match="sent"):
        nowcast(reading(), np.array([sent]), np.array([1.0]), now)


# --- the study -----------------------------------------------------------------------------------------------------------


def small(value: float = 1.0) -> tuple[Plant, Window]:
    """Two engines, one twice as fast; six requests of 50 prompt tokens and five of answer."""
    settings = EngineSettings(kv_blocks=100, max_batched_tokens=100, max_sequences=4, prefix_caching=False)
    fast, slow = (flat_steps(100, 4, 0.01, token_s) for token_s in (0.001, 0.002))
    n = 6
    return Plant((settings, settings), (fast, slow)), Window(
        arrival_s=0.02 * np.arange(n),
        prompt=np.full(n, 50),
        output=np.full(n, 5),
        answers=np.full((n, 2), 5),
        task_class=np.zeros(n, np.int64),
        outcome=np.tile([1.0, 0.0], (n, 1)),
        q=np.tile([0.7, 0.9], (n, 1)),
        q_true=np.tile([0.6, 0.9], (n, 1)),
        value=np.full(n, value),
        delay_price=np.full(n, 0.1),
        list_usd=np.array([[0.001, 0.0], [0.002, 0.01]]),
    )


def test_welfare_by_hand() -> None:
    _, stream = small(value=10.0)
    run = Run(np.array([0, 1, DEFER, 0, 0, 0]), np.array([1.0, 2.0, 0.0, 1.0, 1.0, 1.0]))
    found = welfare(stream, run, sla_s=1.5, avoidable=0.5)
    assert found[0] == pytest.approx(10 * 0.6 - 0.5 * 0.05 - 0.1)
    assert found[1] == pytest.approx(10 * (0.9 - PENALTY) - 0.5 * 0.15 - 0.2)
    assert found[2] == 0
    assert welfare(stream, run, 1.5, 0.5, luck=True)[0] == pytest.approx(found[0] + 4)


def test_a_lone_router_takes_what_its_list_says() -> None:
    engines, stream = small()
    at_once = Seconds(np.zeros(2), np.zeros(2), np.zeros(2), np.ones((2, 1)))
    beliefs = Beliefs(1.0, 1.0, at_once, np.ones((2, 1)), 0.0)
    # V·q − list price: 0.7 − 0.05 < 0.9 − 0.15, and for little value nobody is worth it.
    assert play(engines, stream, isolated(beliefs)).choice.tolist() == [1] * 6
    poor = dataclasses.replace(stream, value=np.full(6, 0.05))
    assert play(engines, poor, isolated(beliefs)).choice.tolist() == [DEFER] * 6


@pytest.mark.parametrize("price", [0.0, 4.0])
def test_only_the_delay_of_others_parts_the_board_from_the_selfish(price: float) -> None:
    engines, stream = small()
    crowd = dataclasses.replace(
        stream, arrival_s=np.zeros(6), delay_price=np.full(6, price), list_usd=np.zeros((2, 2))
    )
    beliefs = Beliefs(1e6, 1.0, Seconds(*np.zeros((3, 2)), np.ones((2, 1))), np.ones((2, 1)), 0.0)
    alone, together = (play(engines, crowd, who(beliefs)).choice.tolist() for who in (selfish, board))
    assert (alone == together) == (price == 0)


def test_a_trial_is_own_delay_and_that_of_others() -> None:
    """Two roads: the planner's branches, and two whole replays with and without the request."""
    engines, stream = small()
    pool = Pool.of(engines)
    for n in range(3):
        pool.run(float(stream.arrival_s[n]))
        pool.send(0, n, stream)
    now, until = float(stream.arrival_s[3]), 100.0
    pool.run(now)
    later = Future(stream.arrival_s[4:], np.array([4, 5]), np.array([0, 1]), stream)
    sla_s = 0.3
    beliefs = Beliefs(sla_s, 1.0, Seconds(*np.zeros((3, 2)), np.ones((2, 1))), np.ones((2, 1)), 0.0)
    found = tried(pool, stream, 3, 0, later, 5, until, beliefs)

    def lost(rows: list[int]) -> float:
        requests = Requests(stream.arrival_s[rows], stream.prompt[rows], stream.output[rows])
        latency = engines.replay(0, requests).run().served().latency_s
        return float((0.1 * latency + PENALTY * (latency > sla_s)).sum())

    assert found == pytest.approx(lost([0, 1, 2, 3, 4]) - lost([0, 1, 2, 4]))


def test_penalties_count_those_still_inside() -> None:
    engines, stream = small()
    replay = engines.replay(0, Requests(stream.arrival_s, stream.prompt, stream.output))
    came = Came(np.arange(6), stream.arrival_s, np.ones(6))
    assert came.penalty(replay, 5.0, 1.0) == pytest.approx(6 * PENALTY)  # nothing has run yet
    replay.run()
    assert came.penalty(replay, 5.0, 10.0) == 0


def test_a_planner_leaves_the_board_only_when_sure() -> None:
    better = np.array([[1.0, 1.5, 0.0], [1.0, 1.6, 0.0], [1.0, 1.4, 0.0]])
    assert fortified(better, 0) == 1
    unsure = np.array([[1.0, 9.0, 0.0], [1.0, -4.0, 0.0], [1.0, 0.0, 0.0]])
    assert fortified(unsure, 0) == 0
    assert fortified(-better, 0) == DEFER
    assert fortified(-better, DEFER) == DEFER


def test_a_ratio_needs_a_planner_who_gains() -> None:
    some = np.array([1.0, 2.0, 3.0, 2.0, 2.5])
    assert share(some, np.array([1.0, -1.0, 0.5, -0.6, 0.1])) == "planner's gain is not told from 0"
    assert share(some, 2 * some) == "0.50 (0.50 to 0.50)"
    assert share(some[:4], some[:4]) == "too few windows"


def test_seeds_come_first() -> None:
    some = list(cells(["azure"], 2, 5))
    assert len(some) == len({cell.key for cell in some}) == 2 * (10 + 5)
    assert [cell.seed for cell in some[:20]] == [1] * 10 + [2] * 10


@pytest.mark.data
def test_bounds_hold_and_halves_are_apart() -> None:
    rows = outcomes()
    assert (rows.list_usd * 1e6)[3] == pytest.approx([10, 30], rel=0.05)  # the list price of that model
    engines = plant("sized", (1, 1, 1, 1))
    learned, judged = (window("azure", Coupling(), 5.0, 40, 3, train=train) for train in (True, False))
    assert not set(learned.prompt[:-1] * 1e5 + learned.prompt[1:]) & set(
        judged.prompt[:-1] * 1e5 + judged.prompt[1:]
    )
    still = Seconds(np.zeros(4), np.zeros(4), np.zeros(4), np.ones((4, 1)))
    run = play(engines, judged, isolated(Beliefs(2.0, 1.0, still, np.ones((4, 1)), 0.0)))
    known, likely = bounds(judged, engines, 2.0, 1.0)
    assert likely < known
    assert welfare(judged, run, 2.0, 1.0, luck=True).sum() <= known
    assert welfare(judged, run, 2.0, 1.0).sum() <= likely
