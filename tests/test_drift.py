"""Drift: no false alarms to speak of however long and often one looks, and changes found while they matter."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.testing import assert_allclose, assert_array_equal
from numpy.typing import NDArray

from walras.errors import QuantityError
from walras.estimate.drift import BETS, FIRST_STARTS, Alarm, Drift, DriftMonitor
from walras.quantities import Labels

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]
MODELS, CLASSES = ("nano", "small", "large", "frontier"), ("code", "chat", "sums")
ALPHA = 0.05


def labels(codes: Ints, names: tuple[str, ...]) -> Labels:
    return Labels(np.asarray(codes, np.int64), names)


def monitor(**more: Any) -> DriftMonitor:
    return DriftMonitor(ALPHA, MODELS, CLASSES, **more)


def feed(to: DriftMonitor, model: Ints, task_class: Ints, predicted: Floats, observed: Floats) -> Drift:
    to.update_batch(labels(model, MODELS), labels(task_class, CLASSES), predicted, observed)
    return to.report()


def one_cell(predicted: Floats, observed: Floats, **more: Any) -> Drift:
    """A stream of one model whose class is not known: its pooled cell alone."""
    zero = np.zeros(len(predicted), np.int64)
    return feed(monitor(**more), zero, zero - 1, predicted, observed)


# --- false alarms -----------------------------------------------------------------------------------------------


def test_false_alarms_over_whole_streams() -> None:
    """600 streams of 4,000 outcomes and requests, looked at after every row. Measured: 1 in 600 where 30 are allowed."""
    rng = np.random.default_rng(1)
    mix, false = np.array([0.6, 0.3, 0.1]), 0
    for _ in range(600):
        model, task_class = rng.integers(0, 4, 4000), rng.choice(3, 4000, p=mix)
        quality = rng.uniform(0.02, 0.98, (4, 3))[model, task_class]
        watch = monitor(mix=rng.multinomial(500, mix))
        watch.update_requests(labels(task_class, CLASSES))
        false += feed(watch, model, task_class, quality, (rng.random(4000) < quality).astype(float)).refit
    assert false <= ALPHA * 600


def test_outcomes_may_do_what_they_like_within_the_tolerance() -> None:
    """True quality reacts to the past and keeps off the prediction by as much as is allowed; outcomes are not 0 or 1."""
    rng, false, tolerance = np.random.default_rng(2), 0, 0.05
    for _ in range(200):
        predicted, observed, last = rng.uniform(0.2, 0.8, 1500), np.empty(1500), 0.0
        for t in range(1500):
            sign = 1.0 if last > 0 else -1.0  # what was good gets better
            mean = predicted[t] + sign * tolerance
            observed[t] = rng.beta(3 * mean, 3 * (1 - mean))
            last = observed[t] - predicted[t]
        false += one_cell(predicted, observed, tolerance=tolerance).refit
        # Without the tolerance the same kind of stream, one way all along, is drift.
    assert false / 200 <= ALPHA
    steady = rng.beta(3 * (predicted + tolerance), 3 * (1 - predicted - tolerance))
    assert one_cell(predicted, steady).refit


# --- detection --------------------------------------------------------------------------------------------------

# Rows of the cell from the change to the alarm, median and 9th decile of 100 streams, 4 models × 3 classes, α = 0.05.
DELAYS = [
    # quality, drop, rows before, median ≤, 9th decile ≤
    (0.8, 0.1, 0, 400, 700),
    (0.8, 0.1, 1000, 620, 950),
    (0.8, 0.2, 0, 130, 220),
    (0.8, 0.2, 1000, 210, 310),
    (0.8, 0.2, 10_000, 330, 440),
    (0.6, 0.1, 1000, 850, 1350),
    (0.6, 0.2, 1000, 260, 390),
    (0.5, -0.2, 1000, 280, 400),
]


@pytest.mark.parametrize(("quality", "drop", "before", "median", "decile"), DELAYS)
def test_a_change_is_found(quality: float, drop: float, before: int, median: int, decile: int) -> None:
    rng, delays, since = np.random.default_rng(3), [], []
    for _ in range(100):
        n = before + 3000
        truth = np.where(np.arange(n) < before, quality, quality - drop)
        found = one_cell(np.full(n, quality), (rng.random(n) < truth).astype(float)).alarms[0]
        delays.append(found.found - before)
        since.append(found.since - before)
        assert np.sign(found.mean_residual) == -np.sign(drop)
    assert np.mean(np.array(delays) < 0) <= ALPHA
    assert np.median(delays) <= median
    assert np.quantile(delays, 0.9) <= decile
    assert abs(np.median(since)) <= max(before // 8, 50) + 50


def test_intervals_hold_the_truth_wherever_they_begin() -> None:
    """300 streams whose quality falls midway; the interval is read at the alarm and at the end."""
    rng, missed = np.random.default_rng(4), 0
    for _ in range(300):
        truth = np.where(np.arange(2000) < 800, 0.7, 0.7 - rng.uniform(0.1, 0.3))
        observed = (rng.random(2000) < truth).astype(float)
        alarm = one_cell(np.full(2000, 0.7), observed).alarms[0]
        first = one_cell(np.full(2000, 0.7)[: int(alarm.found) + 1], observed[: int(alarm.found) + 1]).alarms[
            0
        ]
        for a in (alarm, first):
            rows = slice(int(a.since), int(a.since) + a.rows)
            assert_allclose(a.mean_residual, (observed[rows] - 0.7).mean(), atol=1e-12)
            low, high = a.interval
            assert not low <= 0 <= high  # that is what an alarm means
            missed += not low <= (truth[rows] - 0.7).mean() <= high
    assert missed / 600 <= 2 * ALPHA


def test_a_model_that_slips_everywhere_is_found_before_its_cells_are() -> None:
    rng = np.random.default_rng(5)
    task_class = rng.integers(0, 3, 400)
    observed = (rng.random(400) < 0.55).astype(float)
    alarms = feed(monitor(), np.full(400, 2), task_class, np.full(400, 0.8), observed).alarms
    assert alarms[0].model == "large"
    assert alarms[0].task_class is None
    assert {a.model for a in alarms} == {"large"}
    cells = [a.found for a in alarms if a.task_class]
    assert all(alarms[0].found < found for found in cells)


# --- laws -------------------------------------------------------------------------------------------------------


def by_hand(residual: Floats, tolerance: float) -> tuple[float, int]:
    """log of the highest weighted wealth of any bet from any start, and where that start is: every sum written out."""
    starts, at = [], 0
    while at < len(residual):
        starts.append(at)
        at += max(FIRST_STARTS, at // 8)
    best = (-math.inf, 0)
    for bet in BETS:
        growth = np.log((1 + bet * residual) / (1 + abs(bet) * tolerance))
        for k, start in enumerate(starts):
            path = np.cumsum(growth[start:]) - math.log((k + 1) * (k + 2) * BETS.size)
            best = max(best, (float(path.max()), start))
    return best


@given(seed=st.integers(0, 2**32 - 1), n=st.integers(60, 400), tolerance=st.sampled_from([0.0, 0.05]))
def test_evidence_is_the_best_of_all_bets_and_starts(seed: int, n: int, tolerance: float) -> None:
    rng = np.random.default_rng(seed)
    predicted = rng.random(n)
    truth = np.where(np.arange(n) < rng.integers(0, n), predicted, rng.random())
    observed = np.where(rng.random(n) < 0.5, truth, (rng.random(n) < truth).astype(float))
    watch = DriftMonitor(0.999, ("one",), ("all",), tolerance=tolerance)
    watch.update_batch(Labels(np.zeros(n, np.int64), ("one",)), Labels.none(n), predicted, observed)
    log_wealth, since = by_hand(observed - predicted, tolerance)
    cells = 3  # model × class, model, unseen classes
    alarms = watch.report().alarms
    assert bool(alarms) == (log_wealth >= math.log(cells / 0.999))
    if alarms:
        assert_allclose(math.log(alarms[0].evidence), log_wealth - math.log(cells), rtol=1e-9)
        assert alarms[0].since == since


@given(seed=st.integers(0, 2**32 - 1))
def test_good_news_is_bad_news_upside_down(seed: int) -> None:
    rng = np.random.default_rng(seed)
    predicted, observed = rng.uniform(0.1, 0.5, 300), rng.uniform(0.4, 1.0, 300)
    up, down = one_cell(predicted, observed).alarms[0], one_cell(1 - predicted, 1 - observed).alarms[0]
    assert_allclose(down.interval, (-up.interval[1], -up.interval[0]), atol=1e-9)
    assert_allclose(down.mean_residual, -up.mean_residual, atol=1e-12)
    assert_allclose(math.log(down.evidence), math.log(up.evidence), rtol=1e-9)


@given(seed=st.integers(0, 2**32 - 1), pieces=st.integers(1, 5))
def test_one_by_one_in_pieces_and_after_a_rest_are_the_same_bits(seed: int, pieces: int) -> None:
    rng = np.random.default_rng(seed)
    n = 120
    model, task_class = rng.integers(0, 4, n), rng.integers(-1, 3, n)
    predicted = rng.uniform(0.1, 0.5, n)
    observed = predicted + rng.uniform(0.3, 0.5, n)
    mix = np.array([50, 30, 20])
    whole, single, rested = monitor(mix=mix), monitor(mix=mix), monitor(mix=mix)
    whole.update_requests(labels(task_class, CLASSES))
    feed(whole, model, task_class, predicted, observed)
    for t in range(n):
        c = CLASSES[task_class[t]] if task_class[t] >= 0 else None
        single.update_requests(labels(task_class[t : t + 1], CLASSES))
        single.update(MODELS[model[t]], c, predicted[t], observed[t])
    for rows in np.array_split(np.arange(n), pieces):
        rested.update_requests(labels(task_class[rows], CLASSES))
        feed(rested, model[rows], task_class[rows], predicted[rows], observed[rows])
        state = rested.state()
        rested = monitor(mix=mix)
        rested.restore(state)
    assert whole.report().alarms
    for other in (single, rested):
        assert other.report() == whole.report()
        for name, array in whole.state().items():
            assert_array_equal(other.state()[name], array)


def test_a_cell_knows_only_its_own_rows() -> None:
    rng = np.random.default_rng(6)
    n = 2000
    model, task_class, time = rng.integers(0, 4, n), rng.integers(0, 3, n), np.sort(rng.random(n)) * 3600
    predicted = np.full(n, 0.8)
    observed = (rng.random(n) < np.where((model == 1) & (task_class == 2), 0.2, 0.8)).astype(float)

    def cell(rows: NDArray[np.bool_], names: tuple[str, ...]) -> Alarm:
        watch = monitor()
        codes = model if names == MODELS else 3 - model
        watch.update_batch(
            labels(codes[rows], names),
            labels(task_class[rows], CLASSES),
            predicted[rows],
            observed[rows],
            time=time[rows],
        )
        return next(a for a in watch.report().alarms if a.task_class)

    together = cell(np.ones(n, bool), MODELS)
    assert (together.model, together.task_class) == ("small", "sums")
    assert cell((model == 1) & (task_class == 2), MODELS) == together
    assert cell(np.ones(n, bool), MODELS[::-1]) == together  # names, not codes


def test_an_alarm_stays() -> None:
    rng = np.random.default_rng(7)
    bad, good = (rng.random(400) < 0.3).astype(float), (rng.random(4000) < 0.7).astype(float)
    zero = np.zeros(400, np.int64)
    watch = monitor()
    before = feed(watch, zero, zero - 1, np.full(400, 0.7), bad)
    zero = np.zeros(4000, np.int64)
    after = feed(watch, zero, zero - 1, np.full(4000, 0.7), good)
    assert after.refit
    assert (after.alarms[0].since, after.alarms[0].found) == (before.alarms[0].since, before.alarms[0].found)
    assert after.alarms[0].evidence >= before.alarms[0].evidence


# --- inputs -----------------------------------------------------------------------------------------------------


def test_a_shift_of_the_class_mix_is_found() -> None:
    rng, found = np.random.default_rng(8), []
    log = rng.multinomial(2000, [0.6, 0.3, 0.1])
    for _ in range(50):
        watch = monitor(mix=log)
        task_class = np.concatenate(
            (rng.choice(3, 1000, p=[0.6, 0.3, 0.1]), rng.choice(3, 1500, p=[0.4, 0.3, 0.3]))
        )
        watch.update_requests(labels(task_class, CLASSES))
        alarms = watch.report().alarms
        assert {(a.kind, a.model) for a in alarms} == {("class mix", None)}
        assert {a.task_class for a in alarms} >= {"code", "sums"}
        found.append(min(a.found for a in alarms) - 1000)
    assert min(found) > 0
    assert np.median(found) < 300


def test_an_unseen_class_is_drift_once_it_is_more_than_a_trickle() -> None:
    rng = np.random.default_rng(9)
    for share, drifts in ((0.005, False), (0.05, True)):
        codes = np.where(rng.random(3000) < share, 3, rng.integers(0, 3, 3000))
        watch = monitor(mix=[100, 100, 100])
        watch.update_requests(labels(codes, (*CLASSES, "poetry")))
        report = watch.report()
        assert report.unseen_classes == (("poetry", int((codes == 3).sum())),)
        assert report.refit == drifts
        assert [a.kind for a in report.alarms] == ["unseen"] * drifts
    assert "unseen classes" in report.reason


def test_an_unseen_model_is_a_reason_by_itself_and_moves_nothing_else() -> None:
    watch = monitor()
    for _ in range(200):
        watch.update("gigantic", "code", 0.5, 1.0)
    report = watch.report()
    assert report.unseen_models == (("gigantic", 200),)
    assert report.refit
    assert not report.alarms
    assert "gigantic has outcomes and no estimates" in report.reason
    assert not watch.state()["seen"].any()


def test_many_unseen_names_fill_no_memory() -> None:
    watch = monitor()
    watch.update_requests(labels(np.arange(5000), tuple(f"class {i}" for i in range(5000))))
    assert len(watch.report().unseen_classes) == 100
    assert watch.report().refit


# --- bad input --------------------------------------------------------------------------------------------------

HALF = np.full(2, 0.5)
TWO = Labels(np.zeros(2, np.int64), ("nano",))


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda: DriftMonitor(0.0, MODELS, CLASSES), "false-alarm rate"),
        (lambda: DriftMonitor(0.1, (), CLASSES), "at least one model"),
        (lambda: DriftMonitor(0.1, ("a", "a"), CLASSES), "named once"),
        (lambda: monitor(tolerance=np.zeros((3, 4))), r"shape \(4, 3\)"),
        (lambda: monitor(tolerance=-0.1), "tolerance must be"),
        (lambda: monitor(mix=[1, 2]), "each of the 3 classes"),
        (lambda: monitor(mix=[0, 0, 0]), "not all 0"),
        (lambda: monitor(unseen_share=1.0), "unseen_share"),
        (lambda: monitor().update("nano", "code", 0.5, 1.5), "observed of row 0 is 1.5"),
        (lambda: monitor().update("nano", "code", math.nan, 1), "predicted of row 0 is nan"),
        (lambda: monitor().update_batch(TWO, TWO, HALF, HALF[:1]), "columns have shapes"),
        (lambda: monitor().update_batch(TWO, Labels.none(3), HALF, HALF), "columns have shapes"),
        (lambda: monitor().update_batch(Labels.none(2), TWO, HALF, HALF), "row 0 has no model"),
        (lambda: monitor().update_batch(TWO, TWO, HALF, HALF, time=HALF * math.nan), "finite"),
        (lambda: monitor().update_requests(TWO, time=HALF[:1]), r"must be \(2,\)"),
        (lambda: monitor().restore(DriftMonitor(0.1, ("a",), ("b",)).state()), "another monitor's"),
        (lambda: monitor().restore({}), "state has no 'wealth'"),
    ],
)
def test_bad_input_is_named(call: Any, says: str) -> None:
    with pytest.raises(QuantityError, match=says):
        call()


def test_a_refused_batch_changes_nothing() -> None:
    watch = monitor()
    before = watch.state()
    with pytest.raises(QuantityError):
        watch.update_batch(TWO, TWO, HALF, np.array([0.5, 7.0]))
    for name, array in watch.state().items():
        assert_array_equal(array, before[name])
    assert watch.report().reason == "No drift in 0 rows."


# --- real outcomes ----------------------------------------------------------------------------------------------


@pytest.mark.data
def test_a_swapped_model_is_found_on_routerbench(data_dir: Any) -> None:
    """Class means of one half predict the other, in random order; midway code-llama answers as gpt-4, or nothing happens.

    Measured over 20 orders with a tolerance of two standard errors: no alarm without the swap; with it found every time,
    after 230 requests at most, and no other model accused.
    """
    path = data_dir / "routing/routerbench_subset.parquet"
    table = pq.read_table(path, columns=["request_id", "model", "benchmark", "quality"]).to_pydict()
    ids, row = np.unique(table["request_id"], return_inverse=True)
    models, column = np.unique(table["model"], return_inverse=True)
    quality, task_class = np.full((len(ids), len(models)), np.nan), np.empty(len(ids), np.int64)
    quality[row, column] = np.array(table["quality"], float)
    kinds, codes = np.unique(table["benchmark"], return_inverse=True)
    task_class[row] = codes
    whole = np.isfinite(quality).all(axis=1)
    quality, task_class = quality[whole], task_class[whole]
    names = tuple(models.tolist())
    old, new = names.index("meta/code-llama-instruct-34b-chat"), names.index("gpt-4-1106-preview")
    rng, half, delays = np.random.default_rng(0), len(quality) // 2, []
    for _ in range(20):
        order = rng.permutation(len(quality))
        c, y = task_class[order], quality[order]
        count = np.bincount(c[:half], minlength=3)
        mean = np.array([y[:half][c[:half] == k].mean(axis=0) for k in range(3)])
        error = np.sqrt(mean * (1 - mean) / count[:, None])
        for swap in (False, True):
            stream, asked = y[half:].copy(), c[half:]
            if swap:
                stream[half // 2 :, old] = stream[half // 2 :, new]
            watch = DriftMonitor(ALPHA, names, tuple(kinds.tolist()), tolerance=2 * error.T, mix=count)
            watch.update_requests(labels(asked, tuple(kinds.tolist())))
            watch.update_batch(
                labels(np.tile(np.arange(len(names)), len(asked)), names),
                labels(np.repeat(asked, len(names)), tuple(kinds.tolist())),
                mean[asked].ravel(),
                stream.ravel(),
                time=np.repeat(np.arange(len(asked), dtype=float), len(names)),
            )
            alarms = watch.report().alarms
            assert {a.model for a in alarms} == ({names[old]} if swap else set())
            if swap:
                delays.append(min(a.found for a in alarms) - half // 2)
    assert min(delays) > 0
    assert np.median(delays) < 220
    assert max(delays) < 350
