"""Speculation as make or buy: rates against the replay, the price comparison, measured acceptance, and the law against flapping."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from engines import steps_up_to
from walras.engine.profiles import load_profile
from walras.engine.replay import Replay
from walras.engine.requests import Requests
from walras.engine.settings import EngineSettings, Speculation
from walras.errors import QuantityError, SettingsError
from walras.supply.speculation import Acceptance, Batch, Drafting, rates

MOST = 4
STEPS = steps_up_to(64, 8, seed=1)
LLAMA = load_profile("a100-80gb-llama2-70b-tp8").steps(2048, 64)


def log_rates(steps, batch, alpha, cost=0.05):
    return np.log(rates(steps, batch, alpha, cost, most=MOST))


@pytest.mark.parametrize("drafts", [0, 1, 3])
def test_a_rate_is_what_the_replay_needs_for_its_tokens(drafts: int) -> None:
    """Two roads: tokens per second of a batch that only decodes, priced and replayed."""
    sequences, prompt, answer, cost = 6, 16, 400, 0.05
    plain = EngineSettings(kv_blocks=4000, max_batched_tokens=64, max_sequences=8, prefix_caching=False)
    alpha = 0.6
    settings = replace(plain, speculation=Speculation(drafts, alpha, cost)) if drafts else plain
    no_kv = replace(STEPS, decode_kv_s=0 * STEPS.decode_kv_s, mixed_kv_s=0 * STEPS.mixed_kv_s)
    requests = Requests(np.zeros(sequences), np.full(sequences, prompt), np.full(sequences, answer))
    served = Replay(settings, no_kv, requests=requests, interval_s=None).run().served()
    # The last to begin sees nothing but decoding, and at the end some are gone: the first half of its tokens is judged by tpot.
    made = rates(no_kv, Batch(sequences, 0.0), alpha, cost, most=MOST)[drafts]
    assert sequences / served.tpot_s.max() == pytest.approx(made, rel=0.02)


@given(
    st.integers(1, 8),
    st.floats(0, 500),
    st.floats(0, 1),
    st.floats(0, 0.5),
    st.floats(0, 20),
    st.floats(0.1, 5),
    st.floats(0, 5),
)
def test_the_best_length_is_where_drafts_cost_less_than_the_engine_is_worth(
    n, kv, alpha, cost, p, v, w
) -> None:
    """R* = max_k N_k/T_k, if and only if the best k maximises N_k − R*·T_k, which is 0 there (Dinkelbach 1967)."""
    made = rates(STEPS, Batch(n, kv, p), alpha, cost, most=MOST, decode_token=v, prefill_token=w)
    k = np.arange(len(made))
    value = n * np.cumsum(alpha**k) * v + p * w
    seconds = value / made
    gain = value - made.max() * seconds
    assert gain.max() == pytest.approx(0, abs=1e-9 * value.max())
    assert gain[made.argmax()] == pytest.approx(0, abs=1e-9 * value.max())


def test_drafts_pay_in_small_batches_and_not_in_large_ones() -> None:
    def best(n: int, alpha: float) -> int:
        return int(rates(LLAMA, Batch(n, 500.0 * n), alpha, 0.1).argmax())

    found = [best(n, 0.6) for n in (1, 8, 64)]
    assert found == sorted(found, reverse=True)
    assert found[0] > found[-1] > 0
    assert best(1, 0.8) > best(1, 0.4)
    assert best(64, 0.1) == 0


@given(st.floats(0.05, 0.95), st.integers(1, 6), st.integers(0, 10_000))
def test_acceptance_is_found_from_counts(alpha: float, drafts: int, seed: int) -> None:
    runs = 20_000
    ended = np.random.default_rng(seed).geometric(1 - alpha, runs) - 1
    by_place = [float((ended > k).sum()) for k in range(drafts)]
    found = Acceptance()
    found.count(runs, by_place, 0.0)
    low, high = found.interval
    assert low < found.mean < high
    assert abs(found.mean - alpha) < 5 * (high - low) / 4
    total = Acceptance()
    total.count_total(runs, drafts, sum(by_place), 0.0)
    assert total.mean == pytest.approx(found.mean, abs=0.02)


def test_old_counts_are_forgotten() -> None:
    found = Acceptance(half_life_s=10)
    found.count(1000, [900.0], 0.0)
    assert found.mean == 0.9
    for _ in range(20):
        found.count(1000, [100.0], 10.0)
    assert found.mean == pytest.approx(0.1, abs=1e-3)


@pytest.mark.parametrize(
    ("runs", "by_place"), [(10, [11.0]), (10, [3.0, 4.0]), (-1, []), (10, [float("nan")])]
)
def test_counts_that_cannot_be_are_refused(runs: float, by_place: list[float]) -> None:
    with pytest.raises(QuantityError, match="counts"):
        Acceptance().count(runs, by_place, 1.0)


@pytest.mark.parametrize(
    ("batch", "alpha", "words"),
    [
        (Batch(0, 0.0), 0.5, "0 sequences"),
        (Batch(9, 0.0), 0.5, "9 sequences"),
        (Batch(1, float("nan")), 0.5, "kv_tokens"),
        (Batch(1, 0.0), 1.5, "acceptance"),
        (Batch(1, 0.0, 64.0), 0.5, "prompt tokens"),
    ],
)
def test_a_load_that_cannot_be_is_refused(batch: Batch, alpha: float, words: str) -> None:
    with pytest.raises(QuantityError, match=words):
        rates(STEPS, batch, alpha, 0.1)


@pytest.mark.parametrize(
    ("key", "value"), [("band", 0.0), ("band", float("nan")), ("probe_every", 1), ("most", 0)]
)
def test_a_controller_that_would_flap_is_refused(key: str, value: float) -> None:
    with pytest.raises(SettingsError, match=key):
        Drafting(STEPS, 0.1, **{key: value})


@given(st.integers(0, 2**32 - 1), st.floats(0, 0.15), st.floats(0.001, 0.05))
def test_changes_are_no_more_than_the_load_explains(seed: int, step: float, error: float) -> None:
    """The law of `Drafting`: changes < (D + 2M)/(band − 2ε), and band + 2ε bounds what is lost, whatever load and errors do."""
    rng = np.random.default_rng(seed)
    looks = 80
    n = np.clip(4 + np.cumsum(rng.integers(-1, 2, looks)), 1, 8)
    alpha = np.clip(0.5 + np.cumsum(rng.normal(0, step, looks)), 0.02, 0.98)
    believed = np.clip(alpha + rng.uniform(-error, error, looks), 0.0, 1.0)
    true = np.array([log_rates(STEPS, Batch(int(k), 50.0 * k), a) for k, a in zip(n, alpha, strict=True)])
    seen = np.array([log_rates(STEPS, Batch(int(k), 50.0 * k), a) for k, a in zip(n, believed, strict=True)])
    epsilon = float(np.abs(true - seen).max())
    band = 2 * epsilon + 0.02
    control = Drafting(STEPS, 0.05, MOST, band=band, probe_every=10**9)
    lost = []
    for k, a, made in zip(n, believed, true, strict=True):
        control.acceptance = Acceptance(accepted=1e9 * a, rejected=1e9 * (1 - a))
        control.look(Batch(int(k), 50.0 * k))
        lost.append(made.max() - made[control.drafts])
    spread = float(np.ptp(true[0]))
    moved = float(np.abs(np.diff(true, axis=0)).max(axis=1).sum())
    assert control.changes < (spread + 2 * moved) / (band - 2 * epsilon) + 1e-9
    assert max(lost) <= band + 2 * epsilon + 1e-9


@pytest.mark.parametrize("alpha", [0.2, 0.5, 0.8])
def test_drafting_does_not_undo_its_own_reason(alpha: float) -> None:
    """The loads that two draft lengths settle at (Little's law) prefer the same one, so that no cycle runs through them."""
    n = np.arange(1, 65)
    made = np.array([rates(LLAMA, Batch(int(k), 500.0 * k), alpha, 0.1, most=3) for k in n])
    for arrivals in np.linspace(0.05, 0.9, 12) * made[-1].min():  # tokens per second
        settled = [int(np.searchsorted(made[:, k], arrivals)) for k in range(made.shape[1])]
        preferred = {int(made[at].argmax()) for at in settled}
        best = made[settled[0]].argmax()
        assert abs(np.log(made[settled[0]].max() / made[settled[0], list(preferred)])).max() < 0.05, (
            best,
            preferred,
        )


def test_it_learns_again_while_nothing_is_drafted() -> None:
    control = Drafting(LLAMA, 0.1, probe_every=10)
    batch = Batch(4, 2000.0)
    asked = [control.look(batch) for _ in range(21)]
    assert [k for k, drafts in enumerate(asked) if drafts] == [0, 10, 20]
    control.acceptance.count(1000, [900.0], 1.0)
    assert control.look(batch) > 1
    control.acceptance = Acceptance()
    control.acceptance.count(1000, [5.0], 1.0)
    control.look(batch)
    assert control.drafts == 0
    assert control.changes == 2
