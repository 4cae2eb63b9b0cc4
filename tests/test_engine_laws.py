"""Laws of the replay: of queues, of memory, of order and of scale; and the queues whose answer is known."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engines import Case, flat_steps, random_case
from walras.engine.externality import ResourcePrices, cost_to_others, resource_prices
from walras.engine.generated import Bursty, Lengths, Poisson, Sessions, generate
from walras.engine.replay import Intervals, Replay, Served
from walras.engine.requests import Requests
from walras.engine.settings import EngineSettings, Routing
from walras.engine.steps import StepTimes

SEEDS, SIZES = st.integers(0, 2**32 - 1), st.integers(1, 60)
FINE_S = 0.01
LAW = settings(max_examples=60)


def replayed(case: Case, interval_s: float = FINE_S) -> tuple[Served, Intervals]:
    replay = Replay(case.settings, case.steps, case.routing, case.requests, interval_s=interval_s).run()
    return replay.served(), replay.intervals()


@given(SEEDS, SIZES)
@LAW
def test_memory_and_batch_stay_within_their_limits_and_all_is_given_back(seed: int, n: int) -> None:
    case = random_case(seed, n)
    replay = Replay(case.settings, case.steps, case.routing, case.requests, interval_s=FINE_S).run()
    passed = replay.intervals()
    assert (passed.kv_use >= 0).all()
    assert (passed.kv_use <= 1).all()
    assert (passed.running <= case.settings.max_sequences).all()
    assert replay.in_flight == 0
    last = replay.run(replay.now_s + 2 * FINE_S).intervals()
    for state in (last.kv_use, last.running, last.waiting):
        assert (state[-1] == 0).all()


@given(SEEDS, SIZES)
@LAW
def test_every_token_is_computed_once_or_found_or_computed_again_after_a_preemption(
    seed: int, n: int
) -> None:
    case = random_case(seed, n)
    replay = Replay(case.settings, case.steps, case.routing, case.requests, interval_s=FINE_S).run()
    served = replay.served()
    passed = replay.run(replay.now_s + 2 * FINE_S).intervals()
    assert passed.output_tokens.sum() == case.requests.output_tokens.sum()
    assert passed.finished.sum() == n == len(served)
    assert passed.hit_tokens.sum() == served.cached_tokens.sum()
    assert passed.preemptions.sum() == served.preemptions.sum()
    once = case.requests.input_tokens.sum() - served.cached_tokens.sum()
    if served.preemptions.sum() == 0:
        assert passed.prompt_tokens.sum() == once
    else:
        most = case.requests.input_tokens + case.requests.output_tokens
        assert passed.prompt_tokens.sum() <= once + (served.preemptions * most).sum()


@given(SEEDS, SIZES)
@LAW
def test_no_worker_rests_while_someone_waits(seed: int, n: int) -> None:
    """Except that a prefilling worker may wait for the transfers that hold its memory, and a prompt may have just come."""
    case = random_case(seed, n)
    if case.settings.disaggregation is None:
        _, passed = replayed(case)
        assert not ((passed.running == 0) & (passed.waiting > 0)).any()


@given(SEEDS, SIZES)
@LAW
def test_no_request_ends_before_its_own_steps_are_done(seed: int, n: int) -> None:
    case = random_case(seed, n)
    served, _ = replayed(case)
    engine, steps = case.settings, case.steps
    shortest = steps.overhead_s + steps.dense_s[1]
    prompts = case.requests.input_tokens - served.cached_tokens
    pairs = prompts * (served.cached_tokens + (prompts + 1) / 2)
    first = np.ceil(prompts / engine.max_batched_tokens) * shortest + steps.prefill_pair_s * pairs
    emitted = int(np.ceil(engine.speculation.tokens_per_step)) if engine.speculation else 1
    rest = np.ceil((case.requests.output_tokens - 1) / emitted) * shortest
    assert (served.queue_s >= 0).all()
    assert (served.ttft_s >= served.queue_s + first - 1e-9).all()
    assert (served.latency_s >= served.ttft_s + rest - 1e-9).all()


@given(SEEDS, SIZES)
@LAW
def test_first_come_first_served_at_every_worker(seed: int, n: int) -> None:
    case = random_case(seed, n)
    served, _ = replayed(case)
    for worker in range(case.settings.workers):
        here = np.flatnonzero(served.prefill_worker == worker)
        order = here[np.argsort(served.arrival_s[here], kind="stable")]
        starts = served.arrival_s[order] + served.queue_s[order]
        # A call that comes at the same time as another may have come after it.
        later = np.diff(served.arrival_s[order]) > 0
        assert (np.diff(starts)[later] >= -1e-9).all()


@given(SEEDS, SIZES)
@LAW
def test_a_prefix_is_found_whole_from_its_beginning_and_only_where_it_was_computed(seed: int, n: int) -> None:
    case = random_case(seed, n)
    served, _ = replayed(case)
    offsets, ids = case.requests.prefix_offsets, case.requests.prefix_ids
    assert offsets is not None
    assert ids is not None
    chunk = case.settings.chunk_tokens
    assert (served.cached_tokens % chunk == 0).all()
    assert (served.cached_tokens < case.requests.input_tokens).all()
    starts = served.arrival_s + served.queue_s
    for row in np.flatnonzero(served.cached_tokens):
        last = ids[offsets[row] + served.cached_tokens[row] // chunk - 1]
        holders = np.repeat(np.arange(n), np.diff(offsets))[ids == last]
        earlier = (starts[holders] <= starts[row] + 1e-9) & (
            served.prefill_worker[holders] == served.prefill_worker[row]
        )
        assert (earlier & (holders != row)).any()


@given(SEEDS, SIZES)
@LAW
def test_twice_the_same_and_at_half_the_speed_all_times_double_to_the_bit(seed: int, n: int) -> None:
    case = random_case(seed, n)
    one, again = replayed(case)[0], replayed(case)[0]
    old = case.steps
    slow = StepTimes(
        2 * old.overhead_s, 2 * old.dense_s, 2 * old.decode_s, 2 * old.decode_kv_s, 2 * old.prefill_pair_s, 2 * old.mixed_s,
        2 * old.mixed_kv_s,
    )  # fmt: skip
    apart = case.settings.disaggregation
    if apart is not None:
        apart = replace(apart, bandwidth=apart.bandwidth / 2, setup_s=2 * apart.setup_s)
    engine = replace(case.settings, disaggregation=apart)
    requests = replace(case.requests, arrival_s=2 * case.requests.arrival_s)
    half = Replay(engine, slow, case.routing, requests).run().served()
    for key in Served.__slots__:
        column = getattr(one, key)
        np.testing.assert_array_equal(getattr(again, key), column)
        np.testing.assert_array_equal(
            getattr(half, key), 2 * column if key.endswith("_s") else column, err_msg=key
        )


@given(SEEDS, st.integers(4, 60))
@LAW
def test_by_turns_workers_are_engines_of_their_own(seed: int, n: int) -> None:
    case = random_case(seed, n)
    requests = replace(
        case.requests,
        after=None,
        arrival_s=np.sort(case.requests.arrival_s),
        prefix_ids=None,
        prefix_offsets=None,
    )
    workers = case.settings.workers
    engine = replace(case.settings, disaggregation=None)
    together = Replay(engine, case.steps, requests=requests).run().served()
    for worker in range(workers):
        rows = np.arange(worker, n, workers)
        own = Requests(requests.arrival_s[rows], requests.input_tokens[rows], requests.output_tokens[rows])
        alone = Replay(replace(engine, workers=1), case.steps, requests=own).run().served()
        np.testing.assert_array_equal(alone.end_s, together.end_s[rows])


def test_a_request_alone_takes_the_sum_of_its_steps() -> None:
    engine = EngineSettings(kv_blocks=100, block_tokens=4, max_batched_tokens=32, max_sequences=4)
    steps = StepTimes(0.03, 1e-3 * np.sqrt(np.arange(33.0)), np.arange(5.0) / 9, np.arange(5.0) / 700, 1e-6)
    requests = Requests(np.array([2.0]), np.array([75]), np.array([40]))
    served = Replay(engine, steps, requests=requests).run().served()
    chunks = ((0, 32), (32, 32), (64, 11))
    first = sum(steps.step_s(new, 0, 0, new * (had + (new + 1) / 2)) for had, new in chunks)
    rest = sum(steps.step_s(0, 1, 75 + k, 0.0) for k in range(39))
    assert served.ttft_s[0] == pytest.approx(first, rel=1e-12)
    assert served.end_s[0] == pytest.approx(2.0 + first + rest, rel=1e-12)
    assert served.tpot_s[0] == pytest.approx(rest / 39, rel=1e-12)


@pytest.mark.parametrize("arrivals", [Poisson(14.0), Bursty(12.0, 3.0)])
def test_littles_law(arrivals: Poisson | Bursty) -> None:
    """Time average of what is there = arrivals a second × mean time there: two counts that do not know of one another."""
    requests = next(generate(arrivals, Lengths.lognormal(60, 30, 1.0), 12_000, seed=7))
    engine = EngineSettings(
        kv_blocks=600, block_tokens=16, max_batched_tokens=256, max_sequences=32, workers=2
    )
    replay = Replay(
        engine, flat_steps(256, 32, 0.01, 2e-4), Routing.least_loaded(), requests, interval_s=0.05
    ).run()
    served, passed = replay.served(), replay.intervals()
    there = float((passed.running + passed.waiting).sum(axis=1).mean())
    span = float(passed.end_s[-1])
    assert there == pytest.approx(len(served) / span * served.latency_s.mean(), rel=0.01)
    assert passed.waiting.sum() > 0


def one_at_a_time(service_tokens: np.ndarray, gaps_s: np.ndarray, token_s: float) -> Served:
    """A queue with one server: one sequence at a time, one step for each request."""
    requests = Requests(np.cumsum(gaps_s), service_tokens, np.ones(len(gaps_s), dtype=np.int64))
    most = int(service_tokens.max())
    engine = EngineSettings(
        kv_blocks=most, block_tokens=1, max_batched_tokens=most, max_sequences=1, prefix_caching=False
    )
    return (
        Replay(engine, flat_steps(most, 1, 0.0, token_s), requests=requests, interval_s=None).run().served()
    )


@pytest.mark.parametrize("law", ["M/M/1", "M/D/1"])
def test_queues_with_one_server_have_their_known_means(law: str) -> None:
    """Mean wait ρ/(1−ρ) service times for exponential service, half of it for constant service (Pollaczek–Khinchine)."""
    random, n, load, mean = np.random.default_rng(0), 600_000, 0.4, 4000
    tokens = np.ceil(random.exponential(mean, n)).astype(np.int64) if law == "M/M/1" else np.full(n, mean)
    token_s = 1 / mean
    gaps = random.exponential(1 / load, n)
    served = one_at_a_time(tokens, gaps, token_s)
    # Lindley: the wait is how far the sum of (service − gap) is above its lowest point so far.
    walk = np.cumsum(np.append(0.0, token_s * tokens[:-1] - gaps[1:]))
    np.testing.assert_allclose(served.queue_s, walk - np.minimum.accumulate(walk), atol=1e-6)
    known = load / (1 - load) * (1.0 if law == "M/M/1" else 0.5)
    assert served.queue_s.mean() == pytest.approx(known, rel=0.01)
    assert served.latency_s.mean() == pytest.approx(known + 1, rel=0.01)
    assert (served.queue_s < 1e-9).mean() == pytest.approx(1 - load, rel=0.01)


def lindley(arrivals: np.ndarray, services: np.ndarray) -> np.ndarray:
    """When each ends in a queue with one server."""
    done = np.cumsum(services)
    ends: np.ndarray = done + np.maximum.accumulate(arrivals - (done - services))
    return ends


def test_what_a_request_costs_others_is_what_the_queue_with_one_server_says() -> None:
    random, n, token_s, price = np.random.default_rng(4), 400, 1e-3, 0.25
    tokens, arrivals = random.integers(100, 1500, n), np.cumsum(random.exponential(1.0, n))
    requests = Requests(arrivals, tokens, np.ones(n, dtype=np.int64), delay_price=np.full(n, price))
    engine = EngineSettings(
        kv_blocks=1500, block_tokens=1, max_batched_tokens=1500, max_sequences=1, prefix_caching=False
    )
    replay = Replay(engine, flat_steps(1500, 1, 0.0, token_s), requests=requests, interval_s=None)
    now, horizon = 150.3, 400.0
    replay.run(now)
    extra = Requests(
        np.array([now + 1, now + 2]), np.array([1400, 200]), np.array([1, 1]), delay_price=np.ones(2)
    )
    found = cost_to_others(replay, extra, horizon)
    without = lindley(arrivals, token_s * tokens)
    for row in range(2):
        at = int(np.searchsorted(arrivals, extra.arrival_s[row]))
        services = np.insert(token_s * tokens, at, token_s * extra.input_tokens[row])
        ends = np.delete(lindley(np.insert(arrivals, at, extra.arrival_s[row]), services), at)
        assert found[row] == pytest.approx(price * (ends - without).sum(), rel=1e-6)
        assert found[row] > 0
    assert replay.now_s == now


def test_prices_are_nothing_in_an_idle_engine_and_rise_with_load() -> None:
    engine = EngineSettings(kv_blocks=2000, block_tokens=16, max_batched_tokens=256, max_sequences=32)
    lengths, steps = Lengths.lognormal(200, 50, 0.7), flat_steps(256, 32, 0.01, 1e-4)

    def prices(rate: float) -> ResourcePrices:
        requests = next(generate(Poisson(rate), lengths, 2000, seed=1))
        replay = Replay(engine, steps, requests=requests, interval_s=None)
        return resource_prices(replay, lengths, float(requests.arrival_s[1900]), probes=60, horizon_s=20.0)

    idle, light, heavy = prices(0.001), prices(5.0), prices(25.0)
    assert (idle.prefill_token, idle.decode_token, idle.kv_block_s) == (0.0, 0.0, 0.0)
    assert 0 < light.prefill_token < heavy.prefill_token
    assert 0 < light.decode_token < heavy.decode_token
    assert light.prefill_token > 3 * light.errors[0]
    assert heavy.prefill_token - light.prefill_token > 3 * np.hypot(light.errors[0], heavy.errors[0])


def test_memory_has_a_price_where_it_binds_and_none_where_it_does_not() -> None:
    lengths, steps = Lengths.lognormal(200, 50, 0.7), flat_steps(256, 32, 0.01, 1e-4)
    requests = next(generate(Poisson(10.0), lengths, 1500, seed=1))

    def price(kv_blocks: int) -> ResourcePrices:
        engine = EngineSettings(kv_blocks, 16, max_batched_tokens=256, max_sequences=32, prefix_caching=False)
        replay = Replay(engine, steps, requests=requests, interval_s=None)
        return resource_prices(replay, lengths, float(requests.arrival_s[-1]), probes=60, horizon_s=20.0)

    prices = [price(blocks) for blocks in (220, 260, 300, 5000)]
    assert [of.kv_block_s for of in prices] == sorted((of.kv_block_s for of in prices), reverse=True)
    assert prices[1].kv_block_s > 3 * prices[1].errors[2]
    assert prices[-1].kv_block_s == pytest.approx(0.0, abs=1e-12)


def test_sessions_keep_their_prefix_and_later_calls_find_it() -> None:
    sessions = Sessions(
        calls=8, think_s=1.0, added=Lengths.lognormal(300, 60, 0.6), system_tokens=512, longest=20_000
    )
    requests = sessions.starting(np.arange(40) * 2.0, 3, 64)
    engine = EngineSettings(kv_blocks=40_000, block_tokens=16, prefix_tokens=64, max_sequences=64)
    served = Replay(engine, flat_steps(8192, 64, 0.005, 1e-5), requests=requests).run().served()
    assert requests.after is not None
    calls = np.flatnonzero(requests.after >= 0)
    before = requests.input_tokens[requests.after[calls]]
    assert (served.cached_tokens[calls] == before // 64 * 64).all()
    first = np.setdiff1d(np.arange(len(requests)), calls)
    assert served.cached_tokens[first[0]] == 0
    assert (served.cached_tokens[first[1:]] == 512).all()
