"""The replay gives what a simulator gives that moves every token by itself; it stops and branches anywhere; bad input is named."""

from __future__ import annotations

import tracemalloc
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from engines import Case, flat_steps, random_case
from token_by_token import Engine
from walras.engine.externality import resource_prices
from walras.engine.generated import Bursty, Diurnal, Lengths, Poisson, Sessions, Switching, generate
from walras.engine.replay import Intervals, Replay, Served, stream
from walras.engine.requests import Requests
from walras.engine.settings import Disaggregation, EngineSettings, Routing, Speculation
from walras.errors import RecordError, SettingsError

INTERVAL_S = 0.37
COUNTS = ("output_tokens", "prompt_tokens", "hit_tokens", "preemptions", "finished")
SMALL = EngineSettings(kv_blocks=64, block_tokens=4, max_batched_tokens=64, max_sequences=8)
SEEDS, SIZES = st.integers(0, 2**32 - 1), st.integers(1, 40)


def replayed(case: Case, **options: Any) -> Replay:
    return Replay(case.settings, case.steps, case.routing, case.requests, **options)


def by_token(case: Case) -> tuple[dict[str, Any], dict[str, Any], Engine]:
    """What became of the requests, and of the intervals, when every token is moved by itself."""
    engine = Engine(case.settings, case.steps, case.routing, case.requests, INTERVAL_S)
    engine.run()
    rows = [engine.served[row] for row in range(len(case.requests))]
    served = {key: np.array([row[key] for row in rows]) for key in rows[0]}
    shape = (len(engine.samples), case.settings.workers)
    samples = {
        key: np.array([[worker[key] for worker in sample] for sample in engine.samples], dtype=float).reshape(
            shape
        )
        for key in ("running", "waiting", "kv_blocks", *COUNTS)
    }
    for key in COUNTS:
        samples[key] = np.diff(samples[key], axis=0, prepend=0.0)
    samples["kv_use"] = samples.pop("kv_blocks") / case.settings.kv_blocks
    return served, samples, engine


def same(left: Served, right: Served) -> bool:
    """To the bit."""
    return all(np.array_equal(getattr(left, key), getattr(right, key)) for key in Served.__slots__)


@given(SEEDS, SIZES)
@example(1161, 17)  # routing looks at memory in the middle of a run that throws out what it looks for
@example(1043, 30)  # sequences that end together give their blocks back in the order in which they came
@example(10, 29)  # a slot is given back one step late, with someone waiting for it
@settings(max_examples=150)
def test_agrees_with_a_simulator_that_moves_every_token_by_itself(seed: int, n: int) -> None:
    case = random_case(seed, n)
    replay = replayed(case, interval_s=INTERVAL_S).run()
    found, passed = replay.served(), replay.intervals()
    served, samples, _ = by_token(case)
    assert found.request.tolist() == list(range(n))
    for key, column in served.items():
        np.testing.assert_allclose(getattr(found, key), column, rtol=1e-9, atol=1e-9, err_msg=key)
    for key, column in samples.items():
        np.testing.assert_allclose(getattr(passed, key), column, err_msg=key)


@pytest.mark.parametrize("seed", [3, 8])
def test_a_crowd_larger_than_the_first_tables_agrees_too(seed: int) -> None:
    case = random_case(seed, 700)
    requests = replace(case.requests, arrival_s=np.zeros(700), after=None)
    engine = replace(case.settings, workers=3, disaggregation=Disaggregation(1, 1.0, 1e4))
    crowd = Case(engine, case.steps, Routing.kv(4), requests)
    found = replayed(crowd).run().served()
    served, _, _ = by_token(crowd)
    np.testing.assert_allclose(found.end_s, served["end_s"], rtol=1e-9)


def test_the_random_engines_have_every_feature_and_preempt() -> None:
    """Without this the agreement above could be about easy cases only."""
    cases = [random_case(seed, 30) for seed in range(40)]
    engines = [case.settings for case in cases]
    assert any(engine.speculation for engine in engines)
    assert any(engine.disaggregation for engine in engines)
    assert any(not engine.chunked_prefill for engine in engines)
    assert any(engine.schedule_ahead and engine.workers > 1 for engine in engines)
    ends = [replayed(case).run().served() for case in cases]
    assert sum(end.preemptions.sum() > 0 for end in ends) > 10
    assert sum(end.cached_tokens.sum() > 0 for end in ends) > 10


def test_preempted_sequence_finds_what_is_left_of_its_own_memory() -> None:
    """Two sequences outgrow ten blocks of four: when both need a sixth, the second is thrown out, with 20 tokens in memory and 9
    emitted. When the first has ended, at 24 tokens, its one block more was the last of the second's: four are left."""
    requests = Requests(np.zeros(2), np.array([12, 12]), np.array([13, 13]))
    for caching, recomputed in ((True, 21 - 16), (False, 21)):
        engine = replace(SMALL, kv_blocks=10, prefix_caching=caching)
        replay = Replay(engine, flat_steps(64, 8, 1.0), requests=requests).run()
        assert replay.served().preemptions.tolist() == [0, 1]
        assert replay.intervals().prompt_tokens.sum() == 24 + recomputed
        assert replay.served().end_s.tolist() == [13.0, 13.0 + 1.0 + 3.0]


@given(SEEDS, st.integers(2, 40), st.floats(0.05, 0.95))
@settings(max_examples=40)
def test_a_run_in_two_pieces_a_snapshot_and_a_fed_tail_are_the_same_to_the_bit(
    seed: int, n: int, share: float
) -> None:
    case = random_case(seed, n)
    whole = replayed(case).run()
    half = replayed(case).run(share * float(whole.served().end_s.max()))
    before = half.served()
    copy = half.snapshot().run()
    after = copy.served()
    assert len(before) + len(after) == n
    assert same(half.run().served(), whole.served())
    assert sorted([*before.request, *after.request]) == list(range(n))
    np.testing.assert_array_equal(after.end_s, whole.served().end_s[after.request])
    joined = np.concatenate(
        [half.intervals().running[: -len(copy.intervals().running) or None], copy.intervals().running]
    )
    np.testing.assert_array_equal(joined, whole.intervals().running)


def test_fed_in_chunks_it_is_the_same_and_hands_out_what_has_ended() -> None:
    chunks = list(generate(Poisson(40.0), Lengths.lognormal(30, 8, 0.8), 600, seed=3, chunk=97))
    engine = replace(SMALL, kv_blocks=300, workers=2)
    steps = flat_steps(64, 8, 0.004, 1e-4)
    pieces = list(stream(engine, steps, chunks))
    whole = Requests(
        np.concatenate([chunk.arrival_s for chunk in chunks]),
        np.concatenate([chunk.input_tokens for chunk in chunks]),
        np.concatenate([chunk.output_tokens for chunk in chunks]),
    )
    at_once = Replay(engine, steps, requests=whole).run().served()
    ends = np.concatenate([piece.end_s for piece in pieces])
    order = np.concatenate([piece.request for piece in pieces])
    assert sum(len(piece) > 0 for piece in pieces) > 5
    np.testing.assert_array_equal(ends[np.argsort(order)], at_once.end_s)


def test_sessions_fed_in_chunks_are_the_same() -> None:
    sessions = Sessions(
        calls=6, think_s=0.5, added=Lengths.lognormal(20, 6, 0.7), system_tokens=40, longest=900
    )
    starts = np.sort(np.random.default_rng(1).uniform(0, 40, 60))
    engine = replace(SMALL, kv_blocks=700, prefix_tokens=8)
    steps = flat_steps(64, 8, 0.004, 1e-4)
    parts = [sessions.starting(starts[at : at + 20], 5, 8, at) for at in (0, 20, 40)]
    ends = [piece.end_s for piece in stream(engine, steps, parts, Routing.kv(4))]
    one = Replay(engine, steps, Routing.kv(4))
    for part in parts:
        one.feed(part)
    at_once = one.run().served()
    assert len(at_once) == sum(map(len, parts))
    np.testing.assert_array_equal(np.sort(np.concatenate(ends)), np.sort(at_once.end_s))
    assert at_once.cached_tokens.sum() > 0


def test_memory_does_not_grow_with_the_trace() -> None:
    """Numpy tells tracemalloc what it holds."""
    engine, steps = replace(SMALL, kv_blocks=2000), flat_steps(64, 8, 1e-4, 1e-6)
    lengths = Lengths.lognormal(30, 3, 0.5)

    def served(count: int) -> int:
        chunks = generate(Poisson(500.0), lengths, count, 1, 4096)
        return sum(len(piece) for piece in stream(engine, steps, chunks))

    def peak(count: int) -> int:
        tracemalloc.start()
        assert served(count) == count
        _, most = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        return most

    assert served(8192) == 8192  # compiles what is not compiled yet
    assert peak(160_000) < 1.2 * peak(20_000)


def test_branch_with_nothing_changed_is_the_same_and_leaves_its_parent_alone() -> None:
    case = random_case(11, 40)
    parent = replayed(case).run(0.1)
    twin = parent.branch().run().served()
    parent.branch(routing=Routing.least_loaded()).run()
    rest = parent.run().served()
    np.testing.assert_array_equal(twin.end_s, rest.end_s[np.isin(rest.request, twin.request)])


def busy(workers: int = 2) -> tuple[Replay, Requests]:
    requests = next(generate(Poisson(30.0), Lengths.lognormal(40, 20, 0.5), 300, seed=2))
    engine = replace(SMALL, kv_blocks=300, workers=workers)
    return Replay(engine, flat_steps(64, 8, 0.01, 2e-4), Routing.least_loaded(), requests), requests


def test_one_more_request_delays_others_and_one_less_gives_the_delay_back() -> None:
    replay, _ = busy(workers=1)
    replay.run(2.0)
    base = replay.branch().run().served()
    extra = Requests(np.array([2.0]), np.array([60]), np.array([60]))
    more = replay.branch(add=extra).run().served()
    assert len(more) == len(base) + 1
    assert more.request[-1] == 300
    others = np.isin(more.request, base.request)
    assert more.latency_s[others].sum() > base.latency_s.sum()
    coming = int(base.request[base.arrival_s > 2.0][0])
    less = replay.branch(drop=[coming]).run().served()
    assert coming not in less.request
    kept = np.isin(base.request, less.request)
    assert less.latency_s.sum() < base.latency_s[kept].sum()


def test_adding_to_a_branch_is_the_same_as_having_had_the_request_from_the_start() -> None:
    replay, requests = busy()
    extra = Requests(np.array([2.0]), np.array([60]), np.array([60]))
    at = int(np.searchsorted(requests.arrival_s, 2.0))
    whole = Requests(
        np.insert(requests.arrival_s, at, 2.0),
        np.insert(requests.input_tokens, at, 60),
        np.insert(requests.output_tokens, at, 60),
    )
    from_start = Replay(replay.settings, replay.steps, replay.routing, whole).run().served()
    branched = replay.run(1.9).branch(add=extra).run().served()
    ends = np.sort(from_start.end_s)[-len(branched) :]
    np.testing.assert_allclose(np.sort(branched.end_s), ends, rtol=1e-12)


def test_a_closed_worker_ends_what_it_began_and_hands_on_what_waits() -> None:
    replay, _ = busy()
    replay.run(2.0)
    branch = replay.branch(close=[0]).run()
    served = branch.served()
    base = replay.branch().run().served()
    assert np.array_equal(np.sort(served.request), np.sort(base.request))
    late = served.arrival_s > 2.0
    assert (served.worker[late] == 1).all()
    assert served.latency_s.sum() > base.latency_s.sum()
    began = served.arrival_s + served.queue_s <= 2.0
    assert (served.worker[began] == 0).any()


def test_a_price_on_one_workers_blocks_moves_requests_to_the_other() -> None:
    replay, _ = busy()
    priced = replace(Routing.least_loaded(), block_price=np.array([1.0, 0.0]))
    base, moved = replay.branch().run().served(), replay.branch(routing=priced).run().served()
    assert (moved.worker == 0).mean() < (base.worker == 0).mean() / 2


def test_transfers_take_their_time_and_queue_on_the_link() -> None:
    engine = replace(SMALL, workers=2, disaggregation=Disaggregation(1, 2.0, 10.0, 0.5))
    requests = Requests(np.zeros(2), np.array([20, 20]), np.array([2, 2]))
    served = Replay(engine, flat_steps(64, 8, 1.0), requests=requests).run().served()
    transfer = 0.5 + 20 * 2.0 / 10.0
    np.testing.assert_allclose(served.ttft_s, [1.0, 1.0])
    np.testing.assert_allclose(served.end_s, [1.0 + transfer + 1.0, 1.0 + 2 * transfer + 1.0])
    assert served.prefill_worker.tolist() == [0, 0]
    assert served.worker.tolist() == [1, 1]


def test_speculation_pays_while_drafts_are_accepted_and_costs_when_they_are_not() -> None:
    requests = Requests(np.zeros(4), np.full(4, 10), np.full(4, 200))
    engine, steps = replace(SMALL, kv_blocks=400), flat_steps(64, 8, 0.01, 1e-4)

    def end(acceptance: float) -> float:
        speculating = replace(engine, speculation=Speculation(4, acceptance, 0.05))
        return float(Replay(speculating, steps, requests=requests).run().served().end_s.max())

    alone = float(Replay(engine, steps, requests=requests).run().served().end_s.max())
    ends = [end(acceptance) for acceptance in (0.0, 0.3, 0.6, 0.9)]
    assert ends == sorted(ends, reverse=True)
    assert ends[-1] < alone < ends[0]
    assert Speculation(4, 0.5, 0.0).tokens_per_step == pytest.approx((1 - 0.5**5) / 0.5)


@pytest.mark.parametrize(
    ("arrivals", "cv"),
    [(Poisson(50.0), 1.0), (Bursty(50.0, 3.0), 3.0), (Switching((20.0, 125.0), (5.0, 2.0)), None)],
)
def test_generated_arrivals_have_their_rate_and_their_spread(arrivals: Any, cv: float | None) -> None:
    chunks = list(generate(arrivals, Lengths.lognormal(100, 10, 1.0), 120_000, seed=1, chunk=50_000))
    assert [len(chunk) for chunk in chunks] == [50_000, 50_000, 20_000]
    times = np.concatenate([chunk.arrival_s for chunk in chunks])
    gaps = np.diff(times)
    assert (gaps >= 0).all()
    assert gaps.mean() == pytest.approx(1 / 50, rel=0.05)
    if cv is None:
        assert gaps.std() / gaps.mean() > 1.1
    else:
        assert gaps.std() / gaps.mean() == pytest.approx(cv, rel=0.05)
    lengths = np.concatenate([chunk.input_tokens for chunk in chunks])
    assert lengths.mean() == pytest.approx(100.5, rel=0.03)
    again = next(generate(arrivals, Lengths.lognormal(100, 10, 1.0), 120_000, seed=1, chunk=50_000))
    np.testing.assert_array_equal(again.arrival_s, chunks[0].arrival_s)


def test_diurnal_load_is_lowest_at_midnight_and_highest_at_noon() -> None:
    times = np.concatenate(
        [chunk.arrival_s for chunk in generate(Diurnal(2.0, 0.8), Lengths.lognormal(9, 9, 1), 172_800, 4)]
    )
    by_hour = np.histogram(times % 86_400, bins=24, range=(0, 86_400))[0] / 3600
    expected = 2.0 * (1 - 0.8 * np.cos(2 * np.pi * (np.arange(24) + 0.5) / 24))
    np.testing.assert_allclose(by_hour, expected, rtol=0.15)


def test_a_closed_loop_never_has_more_in_flight_than_clients_and_thinks_between_calls() -> None:
    sessions = Sessions(calls=20, think_s=0.3, added=Lengths.lognormal(20, 10, 0.5), longest=2000)
    requests = sessions.starting(np.zeros(5), 1, 4)
    replay = Replay(
        replace(SMALL, kv_blocks=600), flat_steps(64, 8, 0.01, 1e-4), requests=requests, interval_s=0.05
    ).run()
    passed, served = replay.intervals(), replay.served()
    assert (passed.running + passed.waiting).max() <= 5
    assert requests.after is not None
    calls = np.flatnonzero(requests.after >= 0)
    gap = served.arrival_s[calls] - served.end_s[requests.after[calls]]
    np.testing.assert_allclose(gap, requests.arrival_s[calls], atol=1e-9)
    assert requests.arrival_s[calls].mean() == pytest.approx(0.3, rel=0.4)


def columns(**changes: Any) -> dict[str, Any]:
    return {
        "arrival_s": np.array([0.0, 1.0, 2.0]),
        "input_tokens": np.array([8, 8, 8]),
        "output_tokens": np.array([2, 2, 2]),
    } | changes


def prefixes(*rows: list[int]) -> dict[str, Any]:
    offsets = np.cumsum([0, *map(len, rows)])
    return {
        "prefix_offsets": offsets,
        "prefix_ids": np.array([chunk for row in rows for chunk in row], dtype=np.int64),
    }


@pytest.mark.parametrize(
    ("changes", "row", "column"),
    [
        ({"arrival_s": np.array([-1.0, 1.0, 2.0])}, 1, "arrival_s"),
        ({"arrival_s": np.array([0.0, np.nan, 2.0])}, 2, "arrival_s"),
        ({"arrival_s": np.array([0.0, 3.0, 2.0])}, 3, "arrival_s"),
        ({"input_tokens": np.array([8, 0, 8])}, 2, "input_tokens"),
        ({"output_tokens": np.array([1, 1, -2])}, 3, "output_tokens"),
        ({"output_tokens": np.array([1.0, 1.5, 2.0])}, None, "output_tokens"),
        ({"output_tokens": np.array([1, 1])}, None, "output_tokens"),
        ({"names": np.array(["a", "b", "a"])}, 3, "names"),
        ({"delay_price": np.array([0.0, -1.0, 0.0])}, 2, "delay_price"),
        ({"after": np.array([-1, 1, 0])}, 2, "after"),
        (prefixes([1, 2], [1, 3], [3, 2]), 3, "prefix_ids"),
        (prefixes([1, 2], [7, 2], [1]), 2, "prefix_ids"),
        (prefixes([1, 1], [2], [3]), 1, "prefix_ids"),
        ({"prefix_ids": np.array([1])}, None, "prefix_offsets"),
        ({"prefix_ids": np.array([1]), "prefix_offsets": np.array([0, 1])}, None, "prefix_offsets"),
        ({"prefix_ids": np.array([1]), "prefix_offsets": np.array([0, 2, 1, 1])}, 2, "prefix_offsets"),
        ({key: np.array([]) for key in ("arrival_s", "input_tokens", "output_tokens")}, None, "arrival_s"),
    ],
)
def test_bad_requests_are_named_by_row_and_column(
    changes: dict[str, Any], row: int | None, column: str
) -> None:
    with pytest.raises(RecordError) as caught:
        Requests(**columns(**changes))
    assert (caught.value.row, caught.value.field) == (row, column)


def test_what_an_engine_cannot_serve_is_named_before_it_runs() -> None:
    steps = flat_steps(64, 8, 1.0)
    long = Requests(**columns(input_tokens=np.array([8, 300, 8])))
    with pytest.raises(RecordError, match="301 KV tokens, a worker has 256") as caught:
        Replay(SMALL, steps, requests=long)
    assert (caught.value.row, caught.value.field) == (2, "input_tokens")
    with pytest.raises(RecordError, match="one step of 64 tokens"):
        Replay(
            replace(SMALL, chunked_prefill=False),
            steps,
            requests=Requests(**columns(input_tokens=np.array([8, 70, 8]))),
        )
    with pytest.raises(RecordError, match="more ids than the prompt has chunks"):
        Replay(SMALL, steps, requests=Requests(**columns(**prefixes([1, 2, 3], [1], [1]))))
    replay = Replay(SMALL, steps, requests=Requests(**columns())).run()
    with pytest.raises(RecordError, match="in order of arrival"):
        replay.feed(Requests(**columns()))
    with pytest.raises(RecordError, match="branch from an earlier time"):
        replay.branch(add=Requests(**columns()))
    with pytest.raises(RecordError, match="request 1 is not among"):
        replay.branch(drop=[1])
    with pytest.raises(SettingsError, match="no worker would be left"):
        replay.branch(close=[0])
    with pytest.raises(SettingsError, match="there is no worker 3"):
        replay.branch(close=[3])
    with pytest.raises(SettingsError, match=r"\[65\] of \[64\] free blocks"):
        replay.branch(block=[65])
    with pytest.raises(SettingsError, match="a time after now"):
        resource_prices(replay, Lengths.lognormal(9, 9, 1), 0.5)
    with pytest.raises(SettingsError, match="tell no error"):
        resource_prices(replay, Lengths.lognormal(9, 9, 1), 500.0, probes=1)


@pytest.mark.parametrize(
    ("changes", "key"),
    [
        ({"kv_blocks": 0}, "kv_blocks"),
        ({"prefix_tokens": 6}, "prefix_tokens"),
        ({"max_batched_tokens": 4}, "max_batched_tokens"),
        ({"speculation": Speculation(9, 0.5, 0.1)}, "max_batched_tokens"),
        ({"disaggregation": Disaggregation(1, 1.0, 1.0)}, "prefill_workers"),
    ],
)
def test_engines_that_cannot_be_are_refused(changes: dict[str, Any], key: str) -> None:
    with pytest.raises(SettingsError) as caught:
        replace(SMALL, **changes)
    assert caught.value.key == key


def test_step_times_and_weights_must_reach_the_engine() -> None:
    with pytest.raises(SettingsError, match="known up to 32 tokens"):
        Replay(SMALL, flat_steps(32, 8, 1.0))
    with pytest.raises(SettingsError, match="known up to 4 sequences"):
        Replay(SMALL, flat_steps(64, 4, 1.0))
    with pytest.raises(SettingsError, match="token_price"):
        Replay(SMALL, flat_steps(64, 8, 1.0), Routing(token_price=np.zeros(3)))
    with pytest.raises(SettingsError, match="interval_s"):
        Replay(SMALL, flat_steps(64, 8, 1.0), interval_s=0.0)


def test_intervals_handed_out_are_not_handed_out_again() -> None:
    replay, _ = busy()
    first = replay.run(3.0).take_intervals()
    second = replay.run(6.0).take_intervals()
    assert first.end_s.tolist() == [1.0, 2.0, 3.0]
    assert second.end_s.tolist() == [4.0, 5.0, 6.0]
    whole: Intervals = busy()[0].run(6.0).intervals()
    for key in Intervals.__slots__:
        together = np.concatenate([getattr(first, key), getattr(second, key)])
        np.testing.assert_array_equal(together, getattr(whole, key), err_msg=key)
