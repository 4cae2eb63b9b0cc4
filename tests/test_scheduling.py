"""Who goes first and who is not let in: against a simulator that moves every token by itself, and by laws."""

from __future__ import annotations

from dataclasses import replace
from itertools import permutations
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engines import Case, flat_steps, random_case
from logs import walras
from token_by_token import Engine
from walras.engine.replay import Replay, Served
from walras.engine.requests import MOST_TENANTS, Requests
from walras.engine.settings import EngineSettings, Order, Schedule
from walras.errors import RecordError, SettingsError
from walras.supply.resource_prices import Amounts, live_prices, quote
from walras.supply.scheduling import run_at_prices, schedule_at
from walras.supply.state import EngineState

SEEDS, SIZES = st.integers(0, 2**32 - 1), st.integers(1, 40)
ORDERS: tuple[Order, ...] = ("fcfs", "shortest", "priced", "vtc")
ONE_AT_A_TIME = EngineSettings(kv_blocks=10_000, block_tokens=1, max_sequences=1, prefix_caching=False)
ROOMY = EngineSettings(
    kv_blocks=4096, block_tokens=1, max_batched_tokens=64, max_sequences=4, prefix_caching=False
)
STEPS = flat_steps(8192, 8, overhead_s=0.01, token_s=0.001)


def scheduled(seed: int, n: int, order: Order, admission: bool) -> Case:
    """A random case with tenants, values and expectations, and random numbers in its schedule."""
    case, rng = random_case(seed, n), np.random.default_rng(seed)
    w = case.settings.workers
    schedule = Schedule(
        order,
        admission=admission,
        prompt_token=rng.uniform(0.1, 1, w),
        pair=rng.uniform(0, 0.01, w),
        line=rng.uniform(0, 0.1, w),
        output_token=rng.uniform(0, 3, w),
        held_token=rng.uniform(0, 0.1, w),
        quote=rng.uniform(0, 0.01, w),
        prompt_token_s=rng.uniform(0, 0.01, w),
        pair_s=rng.uniform(0, 1e-4, w),
        output_token_s=rng.uniform(0, 0.01, w),
        token_s=rng.uniform(0, 0.1, w),
        aging=float(rng.choice([0.0, 1.0])),
    )
    requests = replace(
        case.requests,
        tenant=rng.integers(0, 4, n),
        value=rng.choice([0.0, 1.0, 2.0, 5.0, 100.0], n),
        expected_output=rng.uniform(1, 60, n),
    )
    return replace(case, settings=replace(case.settings, schedule=schedule), requests=requests)


def replayed(case: Case, **options: Any) -> Replay:
    return Replay(case.settings, case.steps, case.routing, case.requests, **options)


@pytest.mark.parametrize(
    ("order", "admission"), [(order, admit) for order in ORDERS for admit in (False, True)][:-1]
)
@given(SEEDS, SIZES)
@settings(max_examples=20)
def test_agrees_with_a_simulator_that_moves_every_token_by_itself(
    order: Order, admission: bool, seed: int, n: int
) -> None:
    case = scheduled(seed, n, order, admission)
    engine = Engine(case.settings, case.steps, case.routing, case.requests, 1e9)
    engine.run()
    replay = replayed(case, interval_s=None).run()
    served = replay.served()
    assert replay.turned_away().tolist() == sorted(engine.turned_away)
    assert served.request.tolist() == sorted(engine.served)
    for key in ("queue_s", "ttft_s", "end_s", "cached_tokens", "preemptions", "worker"):
        expected = [engine.served[row][key] for row in served.request.tolist()]
        np.testing.assert_allclose(getattr(served, key), expected, rtol=1e-9, atol=1e-9, err_msg=key)
    counted = np.zeros((case.settings.workers, 4))
    for w, worker in enumerate(engine.workers):
        for tenant, service in worker.service.items():
            counted[w, tenant] = service
    if order == "vtc":
        np.testing.assert_allclose(replay.service, counted[:, : replay.service.shape[1]])


# --- laws of order ------------------------------------------------------------------------------------------------------


def same(left: Served, right: Served) -> bool:
    """To the bit."""
    return all(np.array_equal(getattr(left, key), getattr(right, key)) for key in Served.__slots__)


def at_once(prompts: list[int], answers: list[int], **columns: Any) -> Requests:
    return Requests(np.zeros(len(prompts)), np.array(prompts), np.array(answers), **columns)


@pytest.mark.parametrize("order", ORDERS)
@given(SEEDS, SIZES)
@settings(max_examples=15)
def test_no_worker_rests_while_someone_waits(order: Order, seed: int, n: int) -> None:
    case = scheduled(seed, n, order, admission=False)
    if case.settings.disaggregation is None:
        replay = replayed(case, interval_s=0.01).run()
        passed = replay.intervals()
        assert not ((passed.running == 0) & (passed.waiting > 0)).any()
        assert len(replay.served()) == n


@given(SEEDS, SIZES)
@settings(max_examples=15)
def test_equals_go_as_they_come(seed: int, n: int) -> None:
    """Of one λ and one size, whatever the prices, and with everything let in that is worth anything."""
    case = scheduled(seed, n, "priced", admission=False)
    if case.settings.disaggregation is not None:
        return  # where transfers end the line is by ranks that were set elsewhere
    alike = replace(
        case.requests,
        input_tokens=np.full(n, 20),
        output_tokens=np.full(n, 7),
        expected_output=None,
        delay_price=np.full(n, 0.3),
        prefix_offsets=None,
        prefix_ids=None,
        value=np.full(n, 1e9),
    )
    roomy = replace(case.settings, kv_blocks=max(case.settings.kv_blocks, 60), chunked_prefill=True)
    fcfs = replace(roomy, schedule=Schedule())
    plain = Replay(fcfs, case.steps, case.routing, alike).run().served()
    for order, admission in (("priced", False), ("priced", True), ("shortest", True)):
        schedule = replace(case.settings.schedule, order=order, admission=admission)
        ours = replace(roomy, schedule=schedule)
        assert same(Replay(ours, case.steps, case.routing, alike).run().served(), plain)


@given(
    st.lists(st.tuples(st.integers(1, 60), st.integers(2, 60), st.floats(0.01, 5)), min_size=2, max_size=5)
)
@settings(max_examples=20)
def test_priority_is_the_best_of_all_orders_where_one_goes_at_a_time(
    jobs: list[tuple[int, int, float]],
) -> None:
    """Cox and Smith: λ over service time first costs least of all orders. Against every permutation, by arithmetic."""
    prompts, answers, prices = (np.array(column) for column in zip(*jobs, strict=True))
    seconds = 0.001 * (prompts + answers - 1)  # the first token comes with the prompt
    orders = [list(order) for order in permutations(range(len(jobs)))]
    least = min(float((prices[order] * np.cumsum(seconds[order])).sum()) for order in orders)
    # The first to arrive finds the worker at rest, so one that costs nothing comes before them all.
    requests = Requests(
        np.append(0.0, np.full(len(jobs), 0.0005)),
        np.append(1, prompts),
        np.append(1, answers),
        delay_price=np.append(0.0, prices),
        expected_output=np.append(1, answers - 1),
    )
    schedule = Schedule("priced", prompt_token=0.001, output_token=0.001)
    engine = replace(ONE_AT_A_TIME, schedule=schedule)
    served = Replay(engine, flat_steps(8192, 8, 0.0, 0.001), None, requests).run().served()
    assert float((prices * (served.end_s[1:] - served.end_s[0])).sum()) == pytest.approx(least)


def test_with_aging_nobody_waits_for_those_who_come_much_later() -> None:
    """One of little λ among a stream of urgent ones: without aging it is the last, with it none that comes `rank / aging` later
    goes before it."""
    n, aging = 400, 0.5
    prices = np.full(n, 1.0)
    prices[3] = 0.0
    stream = Requests(0.05 * np.arange(n), np.full(n, 30), np.full(n, 3), delay_price=prices)
    schedule = Schedule("priced", prompt_token=0.001, output_token=0.011)
    highest = 1.0 / (0.001 * 30 + 0.011 * 3)
    starved, aged = (
        Replay(
            replace(ONE_AT_A_TIME, schedule=replace(schedule, aging=one)),
            flat_steps(8192, 8, 0.02, 0.001),
            None,
            stream,
        )
        .run()
        .served()
        for one in (0.0, aging)
    )
    start = starved.arrival_s + starved.queue_s
    assert np.argmax(start) == 3
    start = aged.arrival_s + aged.queue_s
    overtook = np.flatnonzero(start < start[3])
    assert aged.arrival_s[overtook].max() <= aged.arrival_s[3] + highest / aging + 1e-9


# --- fair shares --------------------------------------------------------------------------------------------------------


def crowd(seed: int) -> Requests:
    """Three tenants in line from the beginning: one with many requests before the others' first, of all sizes."""
    rng = np.random.default_rng(seed)
    tenant = np.repeat([0, 1, 2], [60, 30, 30])
    n = len(tenant)
    return at_once(rng.integers(1, 60, n).tolist(), rng.integers(1, 40, n).tolist(), tenant=tenant)


@given(SEEDS)
@settings(max_examples=8)
def test_fair_shares_of_tenants_in_line_stay_within_vtcs_bound(seed: int) -> None:
    """Lemma 4.3: |service_i − service_j| ≤ max(w_p·longest prompt, w_q·tokens of a batch) while both have someone in line."""
    requests = crowd(seed)
    bound = max(60, 2 * 4 * (60 + 40))
    vtc = Replay(replace(ROOMY, schedule=Schedule("vtc")), STEPS, None, requests)
    tenant = requests.tenant
    assert tenant is not None
    time, most = 0.0, 0.0
    served = Replay(replace(ROOMY, schedule=Schedule("vtc")), STEPS, None, requests).run().served()
    starts = served.arrival_s + served.queue_s
    last = np.array([starts[tenant == k].max() for k in range(3)])
    while time < np.sort(last)[1]:
        service = vtc.run(time).service[0][last > time]
        most = max(most, float(np.ptp(service)))
        time += 0.05
    assert 0 < most <= bound
    plain = Replay(ROOMY, STEPS, None, requests).run().served()
    given_first = (requests.input_tokens + 2 * requests.output_tokens)[tenant == 0].sum()
    assert plain.queue_s[tenant == 1].min() >= plain.queue_s[tenant == 0].max()
    assert given_first > bound, (
        "first come first served gives the first more than the bound before the others get anything"
    )


def test_who_comes_back_is_lifted_to_the_others() -> None:
    requests = Requests(
        np.array([0.0] * 20 + [2.0] * 5),
        np.full(25, 30),
        np.full(25, 20),
        tenant=np.array([0] * 20 + [1] * 5),
    )
    replay = Replay(replace(ROOMY, max_sequences=1, schedule=Schedule("vtc")), STEPS, None, requests)
    before = replay.run(1.99).service[0]
    after = replay.run(2.0).service[0]
    assert before[1] == 0 < before[0] <= after[0]
    assert after[1] == after[0], "lifted to the least of those in line, not to what it saved up"
    served = replay.run().served()
    start = served.arrival_s + served.queue_s
    order = np.array(requests.tenant)[np.argsort(start, kind="stable")]
    turns = order[np.flatnonzero(np.sort(start) >= 2.0)][:8]
    assert sorted(turns.tolist()) == [0] * 4 + [1] * 4, "by turns from there on"


# --- admission ----------------------------------------------------------------------------------------------------------


@given(SEEDS, SIZES, st.sampled_from(["fcfs", "shortest", "priced"]))
@settings(max_examples=15)
def test_at_zero_prices_nobody_worth_its_own_delay_is_turned_away(seed: int, n: int, order: Order) -> None:
    case = scheduled(seed, n, order, admission=True)
    free = replace(case.settings.schedule, quote=0.0)
    assert case.requests.delay_price is not None
    seconds = 0.01 * 60 + 0.1 * 60 + n * 0.01 * 120  # own, and at most everybody's work ahead
    worth = replace(case.requests, value=case.requests.delay_price * seconds)
    settled = replace(case.settings, schedule=free)
    replay = Replay(settled, case.steps, case.routing, worth).run()
    assert replay.turned_away().size == 0
    assert len(replay.served()) == n


def test_what_is_worth_less_than_it_costs_is_turned_away_and_its_session_goes_on() -> None:
    schedule = Schedule("fcfs", admission=True, prompt_token=1.0, output_token=1.0, quote=0.01)
    requests = Requests(
        np.array([0.0, 0.0, 1.0]),
        np.array([50, 50, 50]),
        np.array([10, 10, 10]),
        value=np.array([0.59, 0.61, 0.61]),
        after=np.array([-1, -1, 0]),
        delay_price=np.zeros(3),
    )
    replay = Replay(replace(ROOMY, schedule=schedule), STEPS, None, requests).run()
    assert replay.turned_away().tolist() == [0]
    served = replay.served()
    assert served.request.tolist() == [1, 2]
    assert served.arrival_s.tolist() == [0.0, 1.0]


@pytest.mark.parametrize("order", ["priced", "vtc"])
def test_in_pieces_and_in_branches_it_is_the_same(order: Order) -> None:
    case = scheduled(5, 60, order, admission=order == "priced")
    requests = replace(case.requests, after=None, arrival_s=np.linspace(0, 3, 60))
    whole = Replay(case.settings, case.steps, case.routing, requests)
    parts = Replay(case.settings, case.steps, case.routing)
    for begin, tenants in ((0, 1), (20, 2), (40, 4)):
        rows = slice(begin, begin + 20)
        offsets, ids = requests.prefix_offsets, requests.prefix_ids
        assert offsets is not None
        assert ids is not None
        columns = {
            key: getattr(requests, key)[rows]
            for key in (
                "arrival_s",
                "input_tokens",
                "output_tokens",
                "delay_price",
                "value",
                "expected_output",
            )
        }
        tenant = np.array(requests.tenant)
        tenant[rows] %= tenants
        requests = replace(requests, tenant=tenant)
        cut = offsets[begin : begin + 21]
        piece = Requests(
            **columns, tenant=tenant[rows], prefix_offsets=cut - cut[0], prefix_ids=ids[cut[0] : cut[-1]]
        )
        parts.feed(piece)
    whole = Replay(case.settings, case.steps, case.routing, requests).run(1.0)
    branch = whole.branch().run()
    found, apart = whole.run(), parts.run()
    assert same(found.served(), apart.served())
    assert found.turned_away().tolist() == apart.turned_away().tolist()
    assert (order == "priced") == (found.turned_away().size > 0)
    late = found.served().end_s > 1.0
    assert branch.served().request.tolist() == found.served().request[late].tolist()


# --- prices -------------------------------------------------------------------------------------------------------------

STATE = EngineState(10.0, 3.0, 2.0, 0.5, 4.0, 200.0, 30.0, 0.25, 0.0, 80.0, 8.0)


def test_a_mean_request_is_charged_its_quote_and_takes_its_engine_seconds() -> None:
    steps = replace(STEPS, prefill_pair_s=1e-6)
    prices = live_prices(STATE, ROOMY, steps, 0.01)
    schedule = schedule_at([STATE], [prices], ROOMY, steps, Schedule("priced", admission=True))
    prompt_token, pair, line, output_token, held, level, *seconds = schedule.weights(1)[0]
    prompt_token_s, pair_s, output_token_s, token_s = seconds
    pairs = sum(range(21, 81))  # 20 of 80 tokens are in memory
    prompt_s = prompt_token_s * 60 + pair_s * pairs
    takes = prompt_token * 60 + pair * pairs + line * prompt_s**2 + (output_token + held * (80 + 4)) * 8
    amounts = Amounts(60, 8, 84 / ROOMY.block_tokens * 8 * token_s, 0.0, pairs)
    assert level * takes == pytest.approx(quote(prices, amounts), rel=0.01)
    assert takes == pytest.approx(prompt_s + output_token_s * 8, rel=0.01)
    assert output_token_s == pytest.approx((0.01 + 0.001 * 3) / 3), "a step of the three that run, shared"
    assert (schedule.order, schedule.admission) == ("priced", True)
    free = schedule_at([STATE], [live_prices(STATE, ROOMY, steps, 0.0)], ROOMY, steps, schedule)
    assert free.weights(1)[0].tolist() == [
        prompt_token_s,
        pair_s,
        0,
        output_token_s,
        0,
        0,
        prompt_token_s,
        pair_s,
        output_token_s,
        token_s,
    ]


def test_prices_change_nothing_where_nobody_looks_at_them() -> None:
    case = scheduled(11, 40, "fcfs", admission=False)
    priced = run_at_prices(replayed(case, interval_s=0.1), every_s=0.05)
    assert same(priced.served(), replayed(case).run().served())


def test_at_live_prices_the_urgent_go_first_and_the_worthless_stay_away() -> None:
    rng, n = np.random.default_rng(0), 400
    urgent = rng.random(n) < 0.3
    requests = Requests(
        np.sort(rng.uniform(0, 60, n)),
        rng.integers(200, 400, n),
        rng.integers(5, 20, n),
        delay_price=np.where(urgent, 0.1, 0.001),
        value=np.where(rng.random(n) < 0.5, 0.0, 1e9),
    )
    steps = flat_steps(8192, 8, overhead_s=0.01, token_s=0.0008)

    def run(order: Order, admission: bool) -> Replay:
        schedule = Schedule.of(order, steps, ROOMY, admission=admission)
        replay = Replay(replace(ROOMY, schedule=schedule), steps, None, requests, interval_s=1.0)
        return run_at_prices(replay, every_s=2.0, window_s=10.0)

    fcfs, priced = run("fcfs", False).served(), run("priced", False).served()
    assert priced.latency_s[urgent].mean() < 0.5 * fcfs.latency_s[urgent].mean()
    away = run("priced", True).turned_away()
    assert away.tolist() == np.flatnonzero(np.array(requests.value) == 0).tolist()


# --- bad input ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("column", "bad"),
    [
        ("tenant", -1),
        ("tenant", MOST_TENANTS),
        ("value", np.nan),
        ("value", -1.0),
        ("delay_price", np.inf),
        ("expected_output", 0.5),
        ("expected_output", np.nan),
    ],
)
def test_a_bad_row_is_named(column: str, bad: float) -> None:
    values = np.ones(3) if column != "tenant" else np.ones(3, np.int64)
    values[1] = bad
    with pytest.raises(RecordError, match=rf"row 2, column '{column}'"):
        at_once([5, 5, 5], [1, 1, 1], **{column: values})
    with pytest.raises(RecordError, match=rf"column '{column}': 2 values for 3"):
        at_once([5, 5, 5], [1, 1, 1], **{column: values[:2]})


def test_a_schedule_that_cannot_be_is_refused() -> None:
    for bad in ({"order": "vtc", "admission": True}, {"aging": -1.0}, {"answer_weight": np.nan}):
        with pytest.raises(SettingsError):
            Schedule(**bad)
    for numbers in (
        {"prompt_token": -1.0},
        {"prompt_token": 0.0, "output_token": 0.0},
        {"quote": np.ones(2)},
    ):
        with pytest.raises(SettingsError, match=next(iter(numbers))):
            Schedule("priced", **numbers).weights(1)
    replay = Replay(ROOMY, STEPS)
    with pytest.raises(SettingsError, match="begin a replay with it"):
        replay.reschedule(Schedule("vtc"))
    for key in ("every_s", "window_s"):
        with pytest.raises(SettingsError, match=key):
            run_at_prices(replay, **{key: 0.0})


# --- the command --------------------------------------------------------------------------------------------------------

HEAD = "arrival_s,input_tokens,output_tokens,tenant,value,delay_price,expected_output\n"


@pytest.fixture
def trace(tmp_path: Path) -> Path:
    path = tmp_path / "trace.csv"
    rows = [
        f"{0.02 * k:.2f},{900 + 40 * (k % 7)},{5 + k % 9},{'ab'[k % 3 == 0]},{k % 4},{0.01 * (k % 5)},8"
        for k in range(60)
    ]
    path.write_text(HEAD + "\n".join(rows) + "\n", encoding="utf-8")
    return path


@pytest.mark.parametrize(
    ("options", "title"),
    [
        (["--schedule", "fcfs"], ""),
        (["--schedule", "shortest"], " · shortest"),
        (["--schedule", "vtc"], " · vtc"),
        (["--schedule", "priced"], " · priced"),
        (["--schedule", "priced", "--admission"], " · priced · admission"),
    ],
)
def test_replay_takes_every_schedule(trace: Path, options: list[str], title: str) -> None:
    ran = walras("replay", trace, *options, "--probes", 0, "--json")
    assert (ran.code, ran.err) == (0, ""), ran.err
    assert ran.data["engine"]["schedule"] == options[1]
    assert (ran.data["turned_away"] > 0) == ("--admission" in options), "some are worth nothing"
    shown = walras("replay", trace, *options, "--probes", 0)
    assert f"1 worker · round-robin{title} · SIMULATED" in " ".join(shown.out.split())
    assert ("turned away, in all" in shown.out) == ("--admission" in options)


def test_the_command_names_what_a_schedule_lacks(trace: Path, tmp_path: Path) -> None:
    def refused(*options: object) -> str:
        ran = walras("replay", *options, "--probes", 0)
        assert ran.code not in (0, 1), ran.err
        assert ran.out == ""
        assert "Traceback" not in ran.err
        return ran.err

    plain = tmp_path / "plain.csv"
    plain.write_text("arrival_s,input_tokens,output_tokens\n0,10,1\n", encoding="utf-8")
    assert "no column 'tenant'" in refused(plain, "--schedule", "vtc")
    assert "no column 'value'" in refused(plain, "--admission")
    assert "a tenant, for --schedule vtc" in refused("--generate", "poisson:1", "--schedule", "vtc")
    assert "a value, for --admission" in refused("--generate", "poisson:1", "--admission")
    assert "fair shares turn nobody away" in refused(trace, "--schedule", "vtc", "--admission")
    text = trace.read_text(encoding="utf-8")
    for old, new, where in (
        (",0.04,8", ",-0.04,8", "row 5, column 'delay_price'"),
        (",0.04,8", ",0.04,", "row 5, column 'expected_output'"),
        (",a,1,", ",,1,", "row 2, column 'tenant'"),
    ):
        broken = tmp_path / "broken.csv"
        broken.write_text(text.replace(old, new, 1), encoding="utf-8")
        assert f"broken.csv, {where}" in refused(broken, "--schedule", "priced")
