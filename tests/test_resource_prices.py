"""Prices of an engine's resources: laws, engines small enough to work out by hand, and quotes against the perturbed replay."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import spearmanr

from engines import flat_steps
from walras.engine.externality import cost_to_others, externality, futures
from walras.engine.generated import Lengths, Poisson, Sessions, generate
from walras.engine.profiles import load_profile
from walras.engine.replay import Replay
from walras.engine.requests import Requests
from walras.engine.settings import Disaggregation, EngineSettings
from walras.errors import QuantityError
from walras.supply.resource_prices import (
    CALIBRATION,
    Amounts,
    EngineModel,
    amounts_of,
    expected_amounts,
    live_prices,
    quote,
)
from walras.supply.state import EngineState, state_of

PROFILE = load_profile("rtxpro6000-llama3.1-8b")
SETTINGS = EngineSettings(35_000, max_batched_tokens=2048, max_sequences=128)
STEPS = PROFILE.steps()
EMPTY = EngineState(0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0)
BUSY = EngineState(0, 6, 3, 0.2, 0.4, 4000, 120, 0.1, 0, 11_000, 300)


def loaded(running: float, waiting: float, kv_use: float, rate: float) -> EngineState:
    """Requests of 4,000 and 200 tokens."""
    return EngineState(0, running, waiting, kv_use, rate, 4000 * rate, 200 * rate, 0.0, 0.0, 4000, 200)


states = st.builds(
    loaded, st.integers(0, 128), st.integers(0, 500), st.floats(0, 1), st.floats(0, 10, allow_subnormal=False)
)
tokens = st.builds(Amounts, *(st.floats(0, 1e5) for _ in range(3)), st.just(0.0), st.floats(0, 1e9))


@given(states, tokens, st.floats(0, 10))
def test_a_quote_is_not_negative_and_goes_with_the_price_of_delay(
    state: EngineState, amounts: Amounts, delay_price: float
) -> None:
    one = quote(live_prices(state, SETTINGS, STEPS, 1.0), amounts)
    assert np.isfinite(one)
    assert one >= 0
    assert quote(live_prices(state, SETTINGS, STEPS, delay_price), amounts) == pytest.approx(
        delay_price * one, rel=1e-9
    )


@given(tokens)
def test_an_idle_engine_to_which_nobody_comes_costs_nothing(amounts: Amounts) -> None:
    assert quote(live_prices(EMPTY, SETTINGS, STEPS, 1.0), amounts) == 0.0


@given(
    st.integers(1, 100), st.integers(0, 400), st.floats(0.01, 0.2), st.floats(0.01, 1.0), st.floats(1.01, 3.0)
)
def test_a_quote_rises_with_all_that_makes_an_engine_busy(
    running: int, waiting: int, kv_use: float, rate: float, more: float
) -> None:
    steps = flat_steps(2048, 128, 0.01, 4e-5)  # measured tables are not always monotone in the batch
    prompt = amounts_of(SETTINGS, 4000, 1, prefill_s=0.0, decode_s=0.0)

    def cost(state: EngineState) -> float:
        return quote(live_prices(state, SETTINGS, steps, 1.0), prompt)

    base = cost(loaded(running, waiting, kv_use, rate))
    assert base > 0
    assert cost(loaded(running, waiting + 1, kv_use, rate)) >= base * (1 - 1e-9)
    assert cost(loaded(min(128, running * 2), waiting, kv_use, rate)) >= base * (1 - 1e-9)
    assert cost(loaded(running, waiting, kv_use, rate * more)) >= base * (1 - 1e-9)


@given(st.integers(1, 100), st.floats(0.01, 0.9))
def test_a_delay_of_the_running_goes_on_to_those_who_come(running: int, load: float) -> None:
    steps = flat_steps(2048, 128, 0.01, 4e-5)
    one = EngineModel.of(loaded(running, 0, 0.1, 1.0), SETTINGS, steps)
    state = loaded(running, 0, 0.1, load / one.utilisation)
    assert EngineModel.of(state, SETTINGS, steps).utilisation == pytest.approx(load)
    prices = live_prices(state, SETTINGS, steps, 1.0)
    # A token lengthens one step of all: each is 4e-5 s later, and 1 / (1 − load) times that in all, as in any work-conserving line.
    assert prices.prefill_token == pytest.approx(running * 4e-5 / (1 - load))


def test_a_line_without_end_is_cut_by_the_horizon_and_never_cheaper() -> None:
    steps = flat_steps(2048, 128, 0.01, 4e-5)
    found = []
    for waiting in (10, 100, 1000, 10**4, 10**6):
        model = EngineModel.of(loaded(20, waiting, 0.1, 50.0), SETTINGS, steps)
        assert model.idle == 0.05
        found.append(model.behind(CALIBRATION, 300.0))
        assert found[-1] <= CALIBRATION.lull * 300.0 / model.request_s
    assert found == sorted(found)
    assert found[-1] == pytest.approx(CALIBRATION.lull * 300.0 / model.request_s)


def test_full_memory_has_a_price_of_its_own() -> None:
    room, full = (
        live_prices(replace(BUSY, waiting=40, kv_use=share), SETTINGS, STEPS, 1.0) for share in (0.5, 0.97)
    )
    assert full.kv_block_s > 1.2 * room.kv_block_s
    assert "full" in full.reasons[2]
    assert "full" not in room.reasons[2]
    nobody = live_prices(replace(BUSY, kv_use=0.97, waiting=0), SETTINGS, STEPS, 1.0)
    assert "full" not in nobody.reasons[2]


def running_sequences(count: int, token_s: float) -> tuple[Replay, EngineState]:
    """So many that decode for long, nobody else, after 0.5 s."""
    settings = EngineSettings(4000, max_batched_tokens=512, max_sequences=8, prefix_caching=False)
    ones = np.ones(count, np.int64)
    replay = Replay(
        settings, flat_steps(512, 8, 0.01, token_s), None, Requests(np.zeros(count), ones, 400 * ones)
    )
    replay.run(0.5)
    tokens_per_s = count / (0.01 + count * token_s)
    return replay, replace(
        EMPTY, running=count, kv_use=0.01, output_tokens_per_s=tokens_per_s, mean_output_tokens=400
    )


@pytest.mark.parametrize(("prompt", "answer"), [(200, 1), (1, 30), (200, 30)])
def test_hand_replay_and_closed_form_agree_where_nobody_comes(prompt: int, answer: int) -> None:
    others, token_s = 3, 1e-4
    replay, state = running_sequences(others, token_s)
    request = Requests(np.array([0.5]), np.array([prompt]), np.array([answer]))
    # Each prompt token, and each later token of the answer, lengthens a step that all others are in.
    by_hand = others * (prompt + answer - 1) * token_s
    assert cost_to_others(replay, request, 60.0)[0] == pytest.approx(by_hand, rel=1e-9)
    prices = live_prices(state, replay.settings, replay.steps, 1.0)
    took = amounts_of(replay.settings, prompt, answer, prefill_s=0.0, decode_s=0.0)
    assert quote(prices, took) == pytest.approx(by_hand, rel=1e-9)


def test_a_long_prompt_is_a_line_of_its_own() -> None:
    prices = live_prices(replace(BUSY, running=0, waiting=0, kv_use=0), SETTINGS, STEPS, 1.0)
    short, long = (
        quote(prices, amounts_of(SETTINGS, p, 1, prefill_s=0.0, decode_s=0.0)) for p in (4000, 40_000)
    )
    assert prices.line_s2 > 0
    assert long > 50 * short > 0


def test_the_link_is_a_queue() -> None:
    apart = Disaggregation(1, bytes_per_token=1000.0, bandwidth=1e7)
    settings = replace(SETTINGS, workers=2, disaggregation=apart)
    state = loaded(1, 0, 0.1, 1.0)
    prices = live_prices(state, settings, STEPS, 2.0)
    # 4,000 tokens of 1,000 bytes at 10 MB/s: 0.4 s each second; M/D/1: λ·dW/dλ = ρ·s / (2 (1 − ρ)²), s = bytes / bandwidth.
    assert prices.transferred_byte == pytest.approx(2.0 * 0.4 / (2 * 0.6**2) / 1e7)
    assert amounts_of(settings, 4000, 10, prefill_s=1, decode_s=1).transferred_bytes == 4e6
    assert live_prices(state, SETTINGS, STEPS, 2.0).transferred_byte == 0.0


def test_amounts_are_what_memory_and_attention_saw() -> None:
    took = amounts_of(SETTINGS, 160, 33, cached_tokens=32, prefill_s=2.0, decode_s=10.0)
    assert took.prefill_tokens == 128
    assert took.decode_tokens == 32
    assert took.kv_block_s == pytest.approx(((160 + 32) / 2 * 2 + (160 + 16.5) * 10) / 16)
    assert took.attention_pairs == sum(32 + k for k in range(1, 129))
    ante = expected_amounts(BUSY, SETTINGS, STEPS, 1000)
    assert ante.prefill_tokens == pytest.approx(900)
    assert ante.decode_tokens == 299
    assert ante.kv_block_s > 0


@pytest.mark.parametrize(
    ("change", "what"),
    [
        ({"kv_use": 40.0}, "percentage"),
        ({"waiting": float("nan")}, "waiting"),
        ({"running": -1.0}, "running"),
    ],
)
def test_a_state_that_cannot_be_says_what_is_wrong(change: dict[str, float], what: str) -> None:
    with pytest.raises(QuantityError, match=what):
        replace(EMPTY, **change)


def test_prices_of_delay_and_horizons_are_checked() -> None:
    with pytest.raises(QuantityError, match="delay price"):
        live_prices(EMPTY, SETTINGS, STEPS, -1.0)
    with pytest.raises(QuantityError, match="horizon"):
        live_prices(EMPTY, SETTINGS, STEPS, 1.0, horizon_s=0.0)


# --- from a replay ----------------------------------------------------------------------------------------------------


def traffic(rate: float, count: int, seed: int = 0) -> Requests:
    (requests,) = generate(Poisson(rate), Lengths.lognormal(4000, 150, 1.5, seed), count, seed)
    return requests


def test_the_state_is_that_of_the_replay() -> None:
    replay = Replay(SETTINGS, STEPS, None, traffic(2.0, 400)).run(150.25)
    state, past = state_of(replay, 0, 60.0), replay.intervals()
    assert state.running + state.waiting == replay.in_flight
    assert state.kv_use == pytest.approx(1 - replay.free_blocks[0] / SETTINGS.kv_blocks)
    assert state.prompt_tokens_per_s * 60 == pytest.approx(past.prompt_tokens[-60:].sum())
    assert state.output_tokens_per_s * 60 == pytest.approx(past.output_tokens[-60:].sum())
    assert state.arrivals_per_s == pytest.approx(2.0, rel=0.4)
    assert state.mean_prompt_tokens == pytest.approx(4000, rel=0.6)
    assert state_of(Replay(SETTINGS, STEPS), 0, 60.0) == EMPTY
    with pytest.raises(QuantityError, match="no worker 1"):
        state_of(replay, 1, 60.0)


@given(st.integers(0, 2**32 - 1), st.floats(1, 400), st.integers(2, 12))
def test_futures_are_stretches_of_the_trace(seed: int, horizon_s: float, count: int) -> None:
    trace = traffic(2.0, 200)
    drawn = futures(trace, count, 7.0, horizon_s, np.random.default_rng(seed))
    assert len(drawn) == count
    lengths = list(zip(trace.input_tokens.tolist(), trace.output_tokens.tolist(), strict=True))
    for future in drawn:
        if future is None:
            continue
        assert future.arrival_s[0] >= 7.0
        assert future.arrival_s[-1] <= 7.0 + horizon_s
        got = list(zip(future.input_tokens.tolist(), future.output_tokens.tolist(), strict=True))
        first = [k for k in range(len(lengths)) if lengths[k] == got[0]]
        assert any(got == [lengths[(k + j) % len(lengths)] for j in range(len(got))] for k in first)
    longest = sum(0 if future is None else len(future) for future in drawn)
    assert longest == pytest.approx(2.0 * horizon_s * count, rel=0.5, abs=40)


def test_a_future_shares_only_prefixes_that_are_common() -> None:
    sessions = Sessions(3, 1.0, Lengths.lognormal(300, 50, 0.5), system_tokens=512)
    trace = sessions.starting(np.arange(1000) / 2.0, 0, 512)
    trace = replace(trace, arrival_s=np.sort(trace.arrival_s), after=None)
    one, two = futures(trace, 2, 0.0, 40.0, np.random.default_rng(0))
    assert one is not None
    assert two is not None
    assert one.prefix_ids is not None
    assert two.prefix_ids is not None
    assert trace.prefix_ids is not None
    counts = np.bincount(trace.prefix_ids)
    common = set(np.flatnonzero(counts >= 0.01 * len(trace)).tolist())
    assert 0 < len(common) < len(np.flatnonzero(counts)) / 10
    assert set(one.prefix_ids.tolist()) & set(trace.prefix_ids.tolist()) <= common
    assert set(one.prefix_ids.tolist()) & set(two.prefix_ids.tolist()) <= common
    assert int(counts.argmax()) in one.prefix_ids


def test_an_externality_is_the_mean_of_single_futures() -> None:
    trace = traffic(1.5, 300)
    past = int(np.searchsorted(trace.arrival_s, 60.0))
    begun = Requests(trace.arrival_s[:past], trace.input_tokens[:past], trace.output_tokens[:past])
    replay = Replay(SETTINGS, STEPS, None, begun).run(60.0)
    extra = Requests(np.full(2, 60.0), np.array([5000, 300]), np.array([40, 4]))
    coming = futures(trace, 4, 60.0, 20.0, np.random.default_rng(1))
    of = externality(replay, extra, coming, 20.0)
    for f, future in enumerate(coming):
        start = replay.snapshot()
        start.feed(future) if future is not None else None
        assert of.costs[f] == pytest.approx(cost_to_others(start, extra, 20.0))
    assert of.mean == pytest.approx(of.costs.mean(axis=0))
    assert of.error == pytest.approx(np.std(of.costs, axis=0, ddof=1) / 2)
    assert (of.worker == 0).all()
    assert (of.prefill_s > 0).all()


def test_quotes_rank_requests_as_the_perturbed_replay_does() -> None:
    trace = traffic(1.2, 600, seed=3)
    replay, fed = Replay(SETTINGS, STEPS), 0
    quoted, truth = [], []
    for row in range(200, 320, 4):
        now = float(trace.arrival_s[row])
        replay.feed(
            Requests(trace.arrival_s[fed:row], trace.input_tokens[fed:row], trace.output_tokens[fed:row])
        )
        fed = row
        replay.run(now)
        one = Requests(np.array([now]), trace.input_tokens[row : row + 1], trace.output_tokens[row : row + 1])
        coming = futures(trace, 6, now, 60.0, np.random.default_rng(row))
        truth.append(externality(replay, one, coming, 60.0).mean[0])
        state = state_of(replay, 0, 120.0)
        ante = expected_amounts(
            state, SETTINGS, STEPS, float(one.input_tokens[0]), output_tokens=float(one.output_tokens[0])
        )
        quoted.append(quote(live_prices(state, SETTINGS, STEPS, 1.0, horizon_s=60.0), ante))
    assert spearmanr(quoted, truth).statistic > 0.8
    assert 0.5 < np.mean(quoted) / np.mean(truth) < 2
