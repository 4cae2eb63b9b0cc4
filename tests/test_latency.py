"""Seconds until an answer: coefficients recovered, lateness from the tail, queues by Little's law, measured engines."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.testing import assert_allclose

from walras.errors import QuantityError, RecordError
from walras.estimate.latency import EngineState, LatencyModel
from walras.estimate.usage import UsageModel

if TYPE_CHECKING:
    from conftest import DataDir

Floats = npt.NDArray[np.float64]
seeds = st.integers(0, 2**32 - 1)
UNSEEN = np.array([-1])
TRUE = np.array([1.5, 2e-4, 0.02, 1e-4])


def log(rng: np.random.Generator, n: int, noise: float = 0.3) -> tuple[Floats, Floats, Floats, Floats]:
    """Seconds, uncached input, output, running, all (n, 1), from `TRUE` with relative noise of mean 1."""
    sent, out = rng.uniform(10, 20_000, (n, 1)), rng.lognormal(5, 1, (n, 1))
    running = rng.integers(1, 100, (n, 1)).astype(float)
    seconds = TRUE[0] + TRUE[1] * sent + (TRUE[2] + TRUE[3] * running) * out
    return seconds * rng.gamma(1 / noise**2, noise**2, (n, 1)), sent, out, running


def engine(**more: Floats) -> EngineState:
    return EngineState.of(
        ttft_s=np.array([0.5, 1.0]), prefill_s=np.array([1e-3, 1e-4]), tpot_s=np.array([0.02, 0.05]), **more
    )


# --- a live engine ------------------------------------------------------------------------------------------------


def test_seconds_by_hand() -> None:
    tokens = np.array([[1000.0, 1000.0]]), np.array([[100.0, 200.0]])
    assert_allclose(engine().seconds(*tokens), [[0.5 + 1 + 2, 1 + 0.1 + 10]])
    assert_allclose(engine(queue_s=np.array([3.0, 0.0])).seconds(*tokens), [[6.5, 11.1]])


def test_the_queue_empties_at_the_rate_of_service() -> None:
    # 8 run for 3.5 s each: 16/7 leave a second, and 16 waiting take 7 s.
    counts = {"running": np.array([8.0, 1.0]), "waiting": np.array([16.0, 0.0])}
    tokens = np.array([[1000.0, 1000.0]]), np.array([[100.0, 200.0]])
    assert_allclose(engine(**counts).seconds(*tokens), [[3.5 + 7, 11.1]])
    reported = engine(**counts, queue_s=np.array([np.nan, 2.0]))
    assert_allclose(reported.seconds(*tokens), [[3.5 + 7, 13.1]])


@given(seed=seeds, bound=st.floats(0, 60), sent=st.floats(0, 1e5), queue=st.floats(0, 20))
def test_late_is_the_tail_of_the_tokens(seed: int, bound: float, sent: float, queue: float) -> None:
    tokens = np.random.default_rng(seed).lognormal(5, 1, (100, 2))
    usage = UsageModel.fit(tokens, np.full(100, -1), 0)
    state = engine(queue_s=np.full(2, queue))
    late = state.late(bound, np.full((1, 2), sent), usage, UNSEEN)
    room = (max(bound - queue, 0) - state.ttft_s - state.prefill_s * sent) / state.tpot_s
    expected = np.where(room < 0, 1.0, usage.exceed(np.maximum(room, 0)[None], UNSEEN))
    assert_allclose(late, expected, atol=1e-12)
    more = state.late(bound + 1, np.full((1, 2), sent), usage, UNSEEN)
    longer = state.late(bound, np.full((1, 2), sent + 500), usage, UNSEEN)
    assert (more <= late + 1e-12).all()
    assert (longer >= late - 1e-12).all()


def test_late_counts_what_tokens_do_not_explain() -> None:
    rng = np.random.default_rng(0)
    seconds, sent, out, running = log(rng, 20_000, noise=0.5)
    model = LatencyModel.fit(seconds, sent, out, running=running)
    usage = UsageModel.fit(out, np.full(len(out), -1), 0)
    state = model.state(running=np.array([50.0]))
    fresh = rng.permutation(len(out))[:4000]
    service = TRUE[0] + TRUE[1] * 5000.0 + (TRUE[2] + TRUE[3] * 50) * out[fresh]
    drawn = service * rng.gamma(4, 0.25, service.shape)
    for bound in (4.0, 8.0, 20.0):
        late = state.late(bound, np.array([[5000.0]]), usage, UNSEEN)
        assert_allclose(late[0, 0], (drawn > bound).mean(), atol=0.02)


def test_each_class_is_late_by_its_own_tokens() -> None:
    classes = np.repeat([0, 1], 300)
    tokens = np.random.default_rng(1).lognormal(4 + classes[:, None], 0.3, (600, 2))
    usage = UsageModel.fit(tokens, classes, 2)
    late = engine().late(4.0, np.zeros((2, 2)), usage, np.arange(2))
    assert (late[1] > late[0] + 0.05).all()


@pytest.mark.parametrize("bad", [-1.0, np.nan, np.inf])
def test_an_engine_without_a_speed(bad: float) -> None:
    with pytest.raises(QuantityError, match="tpot_s must be known"):
        EngineState.of(ttft_s=np.ones(1), prefill_s=np.ones(1), tpot_s=np.array([bad]))


def test_a_queue_that_never_moves() -> None:
    with pytest.raises(QuantityError, match="model 1 has requests waiting and none running"):
        engine(running=np.array([1.0, 0.0]), waiting=np.array([1.0, 1.0]))


# --- from a log ---------------------------------------------------------------------------------------------------


def test_coefficients_are_recovered_within_their_errors() -> None:
    score, miss = [], []
    for seed in range(40):
        seconds, sent, out, running = log(np.random.default_rng(seed), 800)
        model = LatencyModel.fit(seconds, sent, out, running=running)
        score.append((model.coefficients[0] * model.noise.mean() - TRUE) / model.standard_errors[0])
        miss.append(model.coefficients[0] * model.noise.mean() / TRUE - 1)
    assert_allclose(np.median(miss, axis=0), 0, atol=0.03)
    assert (np.sqrt(np.mean(np.square(score), axis=0)) < 1.5).all()
    assert (np.sqrt(np.mean(np.square(score), axis=0)) > 0.7).all()


def test_outliers_do_not_bend_the_line_but_are_paid_for() -> None:
    rng = np.random.default_rng(2)
    seconds, sent, out, running = log(rng, 2000, noise=0.1)
    hit = rng.random(2000) < 0.03
    seconds[hit] *= 20
    model = LatencyModel.fit(seconds, sent, out, running=running)
    assert_allclose(model.coefficients[0], TRUE, rtol=0.12)
    assert_allclose(model.noise.mean(), 1 + 0.03 * 19, rtol=0.15)


@given(seed=seeds)
def test_coefficients_are_never_negative(seed: int) -> None:
    rng = np.random.default_rng(seed)
    shape = (30, 2)
    model = LatencyModel.fit(rng.exponential(size=shape), rng.uniform(0, 9, shape), rng.uniform(0, 9, shape))
    assert (model.coefficients >= 0).all()
    assert (np.diff(model.noise, axis=1) >= -1e-12).all()
    expected = model.state().seconds(rng.uniform(0, 9, shape), rng.uniform(0, 9, shape))
    assert np.isfinite(expected).all()


def test_the_mean_is_kept() -> None:
    seconds, sent, out, running = log(np.random.default_rng(3), 3000, noise=0.8)
    model = LatencyModel.fit(seconds, sent, out, running=running)
    fitted = (
        np.stack((np.ones_like(out), sent, out, out * running), axis=2) @ model.coefficients[0]
    ) * model.noise.mean()
    assert_allclose(fitted.mean(), seconds.mean(), rtol=0.03)


def test_too_little_known() -> None:
    seconds, sent, out, _ = log(np.random.default_rng(4), 50)
    out[19:] = np.nan
    with pytest.raises(RecordError, match="only 19 rows say how long 'slow' took"):
        LatencyModel.fit(seconds, sent, out, models=("slow",))


# --- measured ---------------------------------------------------------------------------------------------------------


def explained(actual: Floats, guess: Floats) -> float:
    return float(1 - ((actual - guess) ** 2).sum() / ((actual - actual.mean()) ** 2).sum())


@pytest.mark.data
def test_held_out_sessions_of_a_hosted_model(data_dir: DataDir) -> None:
    """Coding sessions with measured server time; families of sessions are held out whole."""
    columns = ["session", "model", "input_tokens", "output_tokens", "lcp_prev_blocks", "api_s"]
    table = pq.read_table(data_dir / "serving/agentic_claude_code_kv.parquet", columns=columns).to_pydict()
    sessions = pq.read_table(data_dir / "serving/agentic_claude_code_sessions.parquet").to_pydict()
    family = dict(zip(sessions["session"], sessions["family"], strict=True))
    train = np.array([int(family[s][:8], 16) % 2 == 0 for s in table["session"]])
    names = ("claude-opus-4-5-20251101", "claude-opus-4-6", "claude-sonnet-4-20250514")
    of = np.array([[model == name for name in names] for model in table["model"]])
    seconds, sent, out, same = (np.array(table[name], dtype=np.float64) for name in ("api_s", *columns[2:5]))
    uncached = np.maximum(sent - 64 * same, 0)
    wide = [np.where(of, column[:, None], np.nan) for column in (seconds, uncached, out)]
    model = LatencyModel.fit(*(column[train] for column in wide), models=names)
    usage = UsageModel.fit(wide[2][train], np.full(train.sum(), -1), 0, models=names)
    state, r2 = model.state(), []
    for i in range(len(names)):
        rows = ~train & of[:, i] & (seconds > 0)
        prompt = np.repeat(uncached[rows, None], len(names), axis=1)
        guess = state.seconds(prompt, np.repeat(out[rows, None], len(names), axis=1))[:, i]
        r2.append(explained(seconds[rows], guess))
        assert abs(guess.mean() / seconds[rows].mean() - 1) < 0.08
        for bound, slack in ((10.0, 0.04), (30.0, 0.015), (60.0, 0.012)):
            late = state.late(bound, prompt, usage, np.full(len(prompt), -1))[:, i].mean()
            assert abs(late - (seconds[rows] > bound).mean()) < slack
    assert min(r2) > 0.78
    assert np.mean(r2) > 0.85


@pytest.mark.data
def test_a_saturated_engine_needs_its_state(data_dir: DataDir) -> None:
    """A measured vLLM run that queues for minutes: every other request, from the load it met on arrival."""
    table = pq.read_table(data_dir / "serving/vllm_measured_requests.parquet").to_pydict()
    mine = np.array(table["run"]) == "rtx4090_llama31_8b_tp1"
    arrival, queue, prefill, decode, sent, out = (
        np.array(table[name], dtype=np.float64)[mine]
        for name in ("arrival_s", "queue_s", "prefill_s", "decode_s", "input_tokens", "output_tokens")
    )
    start, service = arrival + queue, prefill + decode
    end = start + service

    def load(at: Floats) -> Floats:
        return np.array([((start < t) & (end > t)).sum() for t in at], dtype=np.float64)

    waiting = np.array([((arrival < t) & (start > t)).sum() for t in arrival], dtype=np.float64)
    train = np.arange(len(arrival)) % 2 == 0
    model = LatencyModel.fit(
        service[train, None], sent[train, None], out[train, None], running=load(start)[train, None]
    )
    running, guess, idle = load(arrival), [], []
    for row in np.flatnonzero(~train):
        prompt, answer = sent[[row], None], out[[row], None]
        guess.append(model.state(running[[row]], waiting[[row]]).seconds(prompt, answer)[0, 0])
        idle.append(model.state().seconds(prompt, answer)[0, 0])
    actual = (queue + service)[~train]
    assert explained(actual, np.array(guess)) > 0.75
    assert abs(np.mean(guess) / actual.mean() - 1) < 0.1
    assert explained(actual, np.array(idle)) < 0
