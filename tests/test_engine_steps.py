"""Step times: what a table must be, what fits recover from measurements that are known, and how near replays come to real runs."""

import csv
import re
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from conftest import DataDir
from walras.engine.fitting import (
    Loads,
    StepRows,
    calibrate,
    fit_closed_loop,
    fit_steps,
    read_profile,
    read_steps,
)
from walras.engine.layers import Shape, fit_layers
from walras.engine.profiles import FitError, Limits, Profile, load_profile, pairs, save_profiles, shipped
from walras.engine.replay import Replay
from walras.engine.requests import Requests
from walras.engine.settings import EngineSettings
from walras.engine.steps import StepTimes
from walras.errors import QuantityError, RecordError, SettingsError

LIMITS = Limits(kv_tokens=100_000, most_sequences=64, step_tokens=2048)


def times(**changes: object) -> StepTimes:
    """Step times of ten tokens and three sequences, with the changes."""
    columns: dict[str, object] = {
        "overhead_s": 0.5,
        "dense_s": np.arange(11.0),
        "decode_s": np.array([0.0, 1.0, 2.0, 4.0]),
        "decode_kv_s": np.array([0.0, 0.1, 0.1, 0.2]),
        "prefill_pair_s": 0.01,
    }
    # Numbers and arrays by name: which is which is for StepTimes to check, and what some tests are about.
    return StepTimes(**(columns | changes))  # type: ignore[arg-type]


def test_a_step_adds_up_its_terms() -> None:
    steps = times(mixed_s=np.array([0.0, 10.0, 20.0, 40.0]), mixed_kv_s=np.array([0.0, 1.0, 1.0, 2.0]))
    assert steps.step_s(0, 3, 50, 0) == pytest.approx(0.5 + 3 + 4 + 0.2 * 50)
    assert steps.step_s(4, 3, 50, 30.0) == pytest.approx(0.5 + 7 + 40 + 2.0 * 50 + 0.3)
    assert steps.step_s(4, 0, 0, 10.0) == pytest.approx(0.5 + 4 + 0.1)
    assert (steps.most_tokens, steps.most_sequences) == (10, 3)


def test_a_mixed_step_costs_as_a_decoding_one_where_nothing_else_is_said() -> None:
    steps = times()
    assert steps.step_s(1, 2, 30, 0) - steps.step_s(0, 2, 30, 0) == pytest.approx(1.0)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"dense_s": np.array([1.0, 2.0])}, r"dense_s\[0\] is 1\.0: nothing takes no time"),
        (
            {"decode_s": np.array([0.0, -1.0, 2.0, 4.0])},
            "decode_s has a value that is negative or not finite",
        ),
        (
            {"decode_kv_s": np.array([0.0, np.nan, 2.0, 4.0])},
            "decode_kv_s has a value that is negative or not finite",
        ),
        ({"decode_kv_s": np.array([0.0, 1.0])}, "decode_kv_s has 2 values, decode_s 4: one per batch size"),
        ({"mixed_s": np.array([0.0, 1.0])}, "mixed_s has 2 values, decode_s 4: one per batch size"),
        ({"dense_s": np.zeros(1)}, "dense_s must be one row of at least two float64"),
        ({"dense_s": np.zeros(4, dtype=np.float32)}, "dense_s must be one row of at least two float64"),
        ({"overhead_s": -1.0}, r"overhead_s is -1\.0: seconds are finite and ≥ 0"),
        ({"prefill_pair_s": np.inf}, "prefill_pair_s is inf: seconds are finite and ≥ 0"),
    ],
)
def test_what_cannot_be_step_times_is_refused(changes: dict[str, object], message: str) -> None:
    with pytest.raises(QuantityError, match=message):
        times(**changes)


# --- profiles -----------------------------------------------------------------------------------------------------------


def profile(**changes: object) -> Profile:
    columns: dict[str, object] = {
        "name": "made-up",
        "source": "a test",
        "error": FitError(0.0, 0.0, 1, "nothing"),
        "overhead_s": 0.002,
        "pair_s": 1e-9,
        "tokens": np.array([1.0, 100.0, 300.0]),
        "dense_s": np.array([0.010, 0.020, 0.060]),
        "sequences": np.array([1.0, 9.0]),
        "decode_s": np.array([0.001, 0.009]),
        "decode_kv_s": np.array([2e-7, 1e-7]),
        "mixed_s": np.array([0.002, 0.010]),
        "mixed_kv_s": np.array([4e-7, 4e-7]),
        "limits": LIMITS,
    }
    return Profile(**(columns | changes))  # type: ignore[arg-type]


def test_a_profile_is_straight_between_its_knots_and_on_from_the_last() -> None:
    steps = profile().steps(step_tokens=500, most_sequences=20)
    assert steps.dense_s[[0, 1, 100, 200, 300, 500]] == pytest.approx(
        [0.0, 0.010, 0.020, 0.040, 0.060, 0.100]
    )
    assert steps.decode_s[[0, 1, 5, 9, 20]] == pytest.approx([0.0, 0.001, 0.005, 0.009, 0.020])
    assert steps.decode_kv_s[[0, 1, 9, 20]] == pytest.approx(
        [0.0, 2e-7, 1e-7, 1e-7]
    )  # falling: not on below it
    assert steps.most_tokens >= 500
    assert steps.most_sequences == 20


@given(st.floats(0.1, 10.0), st.integers(0, 300), st.integers(0, 64), st.integers(0, 9999))
def test_a_scaled_profile_scales_every_step(factor: float, prefill: int, n: int, kv: int) -> None:
    plain, scaled = profile().steps(400), profile().scaled(factor).steps(400)
    assert scaled.step_s(prefill, n, kv, 77.0) == pytest.approx(factor * plain.step_s(prefill, n, kv, 77.0))


def test_a_profile_survives_being_written(tmp_path: Path) -> None:
    save_profiles([profile()], tmp_path / "mine.json")
    again, before = read_profile(str(tmp_path / "mine.json")), profile()
    assert (again.name, again.source, again.error, again.limits) == (
        "made-up",
        "a test",
        before.error,
        LIMITS,
    )
    for name in ("dense_s", "decode_s", "decode_kv_s", "mixed_s", "mixed_kv_s"):
        assert getattr(again.steps(500), name) == pytest.approx(getattr(before.steps(500), name), rel=1e-5)


def test_a_file_that_is_no_profile_says_so(tmp_path: Path) -> None:
    path = tmp_path / "mine.json"
    path.write_text('[{"name": "x"}]', encoding="utf-8")
    with pytest.raises(RecordError, match=r"mine\.json: not a profile"):
        load_profile(str(path))
    with pytest.raises(RecordError, match=r"none\.json: not a profile"):
        load_profile(str(tmp_path / "none.json"))


def test_an_unknown_profile_names_the_nearest() -> None:
    with pytest.raises(
        SettingsError, match=r"no profile 'rtx4090-llama' \(did you mean 'rtx4090-llama3\.1-8b'\?\)"
    ):
        read_profile("rtx4090-llama")


@pytest.mark.parametrize("name", shipped())
def test_shipped_profiles_are_sane(name: str) -> None:
    found = load_profile(name)
    assert re.search(r"\(.+(MIT|Apache-2\.0)\)", found.source)
    assert 0 < found.error.median < 0.10
    steps = found.steps()
    assert (
        np.diff(steps.dense_s[1:]) >= -1e-3 * steps.dense_s[-1]
    ).all()  # measured kernels may be a hair faster for more
    one, many = steps.step_s(0, 1, 1000, 0), steps.step_s(0, 32, 32_000, 0)
    assert (
        0.003 < one < many < 32 * one
    )  # a batch takes longer than one sequence, and less than all one by one
    assert steps.step_s(2048, 0, 0, pairs(np.array(2048.0), np.array(0.0)).item()) > one
    assert found.limits.most_sequences * 1000 < 40 * found.limits.kv_tokens


def test_shipped_names_are_distinct() -> None:
    assert len(set(shipped())) == len(shipped()) > 10


# --- fits of what is known ----------------------------------------------------------------------------------------------


def known_step_s(prefill: float, pair: float, n: float, kv: float) -> float:
    """A step of the kind the fit knows: 5 ms, experts touched, 40 µs a token, 30 µs a sequence, 90 ns a KV token."""
    tokens = prefill + n
    return 5e-3 + 8e-3 * (1 - np.exp(-tokens / 16)) + 4e-5 * tokens + 3e-5 * n + 9e-8 * kv + 2e-9 * pair


def known_rows(noise: float = 0.0) -> StepRows:
    rng = np.random.default_rng(1)
    rows = [(p, 0.0, 0.0) for p in (16, 64, 300, 900, 1800)] + [
        (p, n, n * kv) for p in (0, 200, 1000) for n in (1, 3, 8, 20, 60) for kv in (100, 900, 3000)
    ]
    columns = np.array([(p, p * (p + 1) / 2, n, kv) for p, n, kv in rows], dtype=float)
    seconds = np.array([known_step_s(*row) for row in columns]) * rng.normal(1, noise, len(rows))
    return StepRows(*columns.T, seconds, np.arange(len(rows)))


def test_steps_of_a_known_kind_are_recovered() -> None:
    fitted = fit_steps("x", "a test", known_rows(), LIMITS)
    assert fitted.error.p95 < 1e-3
    steps = fitted.steps()
    for p, n, kv in ((0, 5, 4000), (0, 40, 90_000), (700, 10, 12_000), (1500, 0, 0)):
        pair = p * (p + 1) / 2
        assert steps.step_s(p, n, kv, pair) == pytest.approx(known_step_s(p, pair, n, kv), rel=0.01)


def test_the_error_of_a_fit_is_that_of_the_noise_and_not_less() -> None:
    fitted = fit_steps("x", "a test", known_rows(noise=0.05), LIMITS)
    assert (
        0.02 < fitted.error.median < 0.08
    )  # |normal| of 5%: the median is 3.4%, and a little more out of sample
    assert fitted.error.rows == len(known_rows().seconds)


def layer_tables() -> tuple[pa.Table, pa.Table, pa.Table]:
    """One layer of a made-up GPU: attention and token-wise work in straight lines, no splits and no stragglers."""
    dense = [
        {"layer": layer, "tokens": t, "time_us": base + slope * t}
        for layer, base, slope in (
            ("qkv_proj", 50.0, 0.4),
            ("layernorm", 2.0, 0.01),
            ("embedding", 3.0, 0.02),
        )
        for t in (1, 256, 2048)
    ]
    attention = [
        {"prefill_chunk": c, "kv_prefill": k, "n_decode": n, "kv_decode": kv, "time_us": 5.0 + n * (0.5 + 0.002 * kv) * (2 if c else 1) + 1e-4 * (c * k + c * (c + 1) / 2)}
        for c in (0, 16, 256, 1024)
        for k in ((0, 512, 4096) if c else (0,))
        for n in (0, 1, 8, 64)
        for kv in ((128, 512, 1024, 4096) if n else (0,))
        if c or n
    ]  # fmt: skip
    heads = [{"layer": "lm_head", "sequences": n, "time_us": 700.0 + n} for n in (1, 64)]
    return pa.Table.from_pylist(dense), pa.Table.from_pylist(attention), pa.Table.from_pylist(heads)


def test_layers_add_up_to_steps() -> None:
    fitted = fit_layers(
        "x", "a test", layer_tables(), Shape(layers=10, kv_heads=8, processors=10_000, spread=0.0), LIMITS
    )
    steps = fitted.steps()

    def by_hand(p: int, n: int, kv: int, pair: float) -> float:
        tokens = p + n
        dense = 10 * (50.0 + 0.4 * tokens + 2 * (2.0 + 0.01 * tokens)) + 3.0 + 0.02 * tokens
        decode = 10 * (5.0 + (2 if p else 1) * (0.5 * n + 0.002 * kv))
        return (dense + decode + 10 * 1e-4 * pair + 700.0 + n) * 1e-6

    for p, n, kv, pair in (
        (0, 1, 500, 0.0),
        (0, 64, 70_000, 0.0),
        (1024, 8, 9000, 1024 * 1025 / 2),
        (256, 64, 9000, 9e5),
    ):
        assert steps.step_s(p, n, kv, pair) == pytest.approx(by_hand(p, n, kv, pair), rel=2e-3)
    assert fitted.error.p95 < 1e-3


def test_unequal_contexts_cost_more_where_reads_are_not_split() -> None:
    even, uneven = (
        fit_layers("x", "a test", layer_tables(), Shape(10, 8, 100, spread=spread), LIMITS).steps()
        for spread in (0.0, 0.3)
    )
    # 1.6 × 100 processors hold 20 sequences of 8 heads: with fewer, reads are split and differences cost next to nothing.
    extra = [uneven.step_s(0, n, 1000 * n, 0) - even.step_s(0, n, 1000 * n, 0) for n in (8, 64)]
    straggler = (
        10 * 1000 * 0.3 * np.log(64) * 1e-4 * 16 * 1e-6
    )  # layers · KV of the mean · spread · ln n · µs a KV token
    assert extra[1] == pytest.approx(straggler, rel=0.02)
    assert 0 < extra[0] < extra[1] / 4
    assert uneven.step_s(1, 1, 1000, 1) == even.step_s(1, 1, 1000, 1)  # one sequence has no other to wait for


def test_two_ranks_share_the_decoding_and_not_the_prompt() -> None:
    shape = Shape(10, 8, 10_000, spread=0.0)
    one = fit_layers("x", "a test", layer_tables(), shape, LIMITS).steps()
    two = fit_layers("x", "a test", layer_tables(), Shape(10, 8, 10_000, ranks=2, spread=0.0), LIMITS).steps(
        2048, 64
    )
    assert two.step_s(0, 64, 64_000, 0) == pytest.approx(one.step_s(0, 32, 32_000, 0), rel=0.01)
    assert two.step_s(1024, 0, 0, 0) == pytest.approx(one.step_s(1024 - 32, 0, 0, 0), rel=0.01)


@pytest.mark.parametrize(
    ("table", "keep", "message"),
    [
        (0, pc.field("tokens") == 1, "column 'tokens': layer 'embedding' has 1 point"),
        (1, pc.field("kv_decode") <= 128, r"column 'kv_decode': 1 KV length\(s\): 4 are needed"),
        (
            1,
            pc.field("prefill_chunk") != 0,
            "column 'prefill_chunk': no prefill chunk of 256 tokens, or none without",
        ),
        (1, pc.field("prefill_chunk") != 16, "column 'kv_prefill': 0 point to fit a line"),
    ],
)
def test_layers_with_one_point_are_refused(table: int, keep: pc.Expression, message: str) -> None:
    tables = list(layer_tables())
    tables[table] = tables[table].filter(keep)
    with pytest.raises(RecordError, match=message):
        fit_layers("x", "a test", (tables[0], tables[1], tables[2]), Shape(10, 8, 100), LIMITS)


def test_a_closed_loop_of_a_known_kind_is_recovered() -> None:
    points = np.array([(i, o, b) for i in (500.0, 1500.0) for o in (400.0, 2000.0) for b in (1, 4, 16, 48.0)])
    zero = np.zeros(len(points))
    truth = fit_steps("x", "a test", known_rows(), LIMITS)
    unknowns = Loads(*points.T, zero + 1.0, zero + 1.0)
    design, _ = unknowns.equations(LIMITS.step_tokens)
    seconds = design @ np.array([5e-3, 3e-5, 9e-8, 2e-9, 4e-5, 0, 8e-3, 0, 0, 0, 0, 0.040])
    loads = Loads(*points.T, seconds[: len(points)], np.maximum(seconds[len(points) :], 1e-9))
    found, outside = fit_closed_loop("x", "a test", loads, LIMITS)
    assert found.error.p95 < 0.01
    assert outside == pytest.approx(0.040, rel=0.05)
    for p, n, kv in ((0, 5, 4000), (0, 40, 70_000), (500, 10, 12_000)):
        got = found.steps().step_s(p, n, kv, p * (p + 1) / 2)
        assert got == pytest.approx(truth.steps().step_s(p, n, kv, p * (p + 1) / 2), rel=0.03)
    with pytest.raises(RecordError, match="column 'batch_size': 2 batch sizes: three are needed"):
        fit_closed_loop("x", "a test", loads.take(np.isin(loads.batch, (1, 4))), LIMITS)


@pytest.mark.parametrize("factor", [0.8, 1.3])
def test_calibration_meets_the_run(factor: float) -> None:
    rng = np.random.default_rng(3)
    requests = Requests(np.sort(rng.uniform(0, 20, 60)), rng.integers(50, 900, 60), rng.integers(20, 200, 60))
    settings = EngineSettings(kv_blocks=6000, max_batched_tokens=2048, max_sequences=64)

    def tpot(tried: Profile) -> float:
        return float(Replay(settings, tried.steps(2048, 64), None, requests).run().served().tpot_s.mean())

    goal = factor * tpot(profile())
    met = calibrate(profile(), settings, requests, goal)
    assert tpot(met) == pytest.approx(goal, rel=2e-3)
    assert (met.overhead_s > profile().overhead_s) == (factor > 1)
    assert (met.pair_s < profile().pair_s) == (factor < 1)


# --- a user's own steps -------------------------------------------------------------------------------------------------

STEPS = ("prefill_tokens", "sequences", "kv_tokens", "seconds")


def write_steps(path: Path, rows: list[tuple[object, ...]], columns: tuple[str, ...] = STEPS) -> Path:
    with path.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([columns, *rows])
    return path


def good_rows() -> list[tuple[object, ...]]:
    rows = known_rows()
    return [
        (int(p), int(n), int(kv), f"{s:.9f}")
        for p, n, kv, s in zip(rows.prefill, rows.sequences, rows.kv, rows.seconds, strict=True)
    ]


def test_a_users_own_steps_make_a_profile(tmp_path: Path) -> None:
    found = read_profile(str(write_steps(tmp_path / "mine.csv", good_rows())))
    assert found.name == "mine"
    assert found.error.p95 < 0.01
    assert found.limits == Limits(kv_tokens=180_000, most_sequences=60, step_tokens=1800)
    assert found.steps().step_s(0, 20, 18_000, 0) == pytest.approx(known_step_s(0, 0, 20, 18_000), rel=0.01)


def test_cached_tokens_and_prompts_make_pairs(tmp_path: Path) -> None:
    columns = ("prefill_tokens", "cached_tokens", "prompts", "sequences", "kv_tokens", "seconds")
    rows = [(100, 0, 1, 0, 0, 0.1), (100, 60, 1, 0, 0, 0.1), (100, 60, 2, 0, 0, 0.1), (0, 0, 1, 4, 9, 0.1)]
    found = read_steps(write_steps(tmp_path / "mine.csv", rows, columns))  # type: ignore[arg-type]
    assert found.pairs.tolist() == [5050.0, 11_050.0, 2 * (50 * 30 + 50 * 51 / 2), 0.0]
    assert len(set(found.group.tolist())) == 4


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ((0, 3, 10, 0.0), "row 2, column 'seconds': is 0: every step takes time"),
        ((0, 3, 10, -0.1), "row 2, column 'seconds': is -0.1, which must be finite and ≥ 0"),
        ((0, 3, 10, ""), "row 2, column 'seconds': is missing"),
        ((0, "three", 10, 0.1), "row 2, column 'sequences': is 'three', expected a number"),
        ((0, 0, 0, 0.1), "row 2, column 'sequences': is 0, and so is prefill_tokens"),
    ],
)
def test_a_bad_step_is_named(tmp_path: Path, row: tuple[object, ...], message: str) -> None:
    rows = good_rows()
    rows[1] = row
    with pytest.raises(RecordError, match=message) as caught:
        read_profile(str(write_steps(tmp_path / "mine.csv", rows)))
    assert str(caught.value).startswith(str(tmp_path / "mine.csv"))


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([(100, 0, 0, 0.1)], r"mine\.csv, column 'prefill_tokens': has 1 size\(s\) of steps that prefill"),
        (
            [(100, 0, 0, 0.1), (200, 0, 0, 0.1)],
            r"mine\.csv, column 'sequences': has 0 size\(s\) of steps that only decode",
        ),
        ([], r"mine\.csv: has no records"),
    ],
)
def test_a_profile_of_one_point_is_refused(
    tmp_path: Path, rows: list[tuple[object, ...]], message: str
) -> None:
    with pytest.raises(RecordError, match=message):
        read_profile(str(write_steps(tmp_path / "mine.csv", rows)))


def test_a_missing_column_is_named(tmp_path: Path) -> None:
    path = write_steps(tmp_path / "mine.csv", [(1, 2, 3)], STEPS[:3])
    with pytest.raises(RecordError, match=r"mine\.csv: no column 'seconds'"):
        read_profile(str(path))


# --- measured runs ------------------------------------------------------------------------------------------------------


def run_of(data_dir: DataDir, name: str, kind: str) -> dict[str, np.ndarray]:
    table = pq.read_table(data_dir / f"serving/vllm_measured_{kind}.parquet")
    table = table.filter(pc.field("run") == name)
    return {key: table[key].to_numpy() for key in table.column_names if key not in ("run", "request_id")}


def measured_layers(data_dir: DataDir, gpu: str) -> tuple[pa.Table, pa.Table, pa.Table]:
    """The public layer times of Llama 3.1 8B on one GPU."""
    tables = []
    for kind in ("dense", "attention", "per_sequence"):
        table = pq.read_table(data_dir / f"serving/gpu_profile_{kind}_us.parquet")
        mine = (
            (pc.field("gpu") == gpu)
            & (pc.field("model") == "meta-llama/Llama-3.1-8B")
            & (pc.field("tp") == 1)
        )
        tables.append(table.filter(mine))
    return tables[0], tables[1], tables[2]


@pytest.mark.data
def test_a_shipped_profile_is_the_fit_of_its_source(data_dir: DataDir) -> None:
    kept = load_profile("rtx4090-llama3.1-8b")
    fitted = fit_layers(
        kept.name, kept.source, measured_layers(data_dir, "RTX4090"), Shape(32, 8, 128), kept.limits
    )
    for name in ("tokens", "dense_s", "sequences", "decode_s", "decode_kv_s", "mixed_s", "mixed_kv_s"):
        assert getattr(kept, name) == pytest.approx(getattr(fitted, name), rel=1e-4)
    assert (kept.overhead_s, kept.pair_s) == pytest.approx((fitted.overhead_s, fitted.pair_s), rel=1e-4)
    assert kept.error.median == pytest.approx(fitted.error.median, rel=1e-4)


@pytest.mark.data
@pytest.mark.parametrize(
    ("run", "gpu", "processors", "spread", "limits"),
    [
        ("rtx4090_llama31_8b_tp1", "RTX4090", 128, 0.05, Limits(2587 * 16, 256, 2048)),
        ("rtxpro6000_llama31_8b_tp1", "RTXPRO6000", 188, 0.2, Limits(560_000, 128, 2048)),
    ],
)
def test_layers_predict_measured_runs(
    data_dir: DataDir, run: str, gpu: str, processors: int, spread: float, limits: Limits
) -> None:
    """Layers timed alone, and the spread of contexts that fits the other run best: nothing is fitted to the run itself."""
    shape = Shape(32, 8, processors, spread=spread)
    fitted = fit_layers(run, "a test", measured_layers(data_dir, gpu), shape, limits)
    q = run_of(data_dir, run, "requests")
    settings = EngineSettings(
        limits.kv_tokens // 16,
        max_batched_tokens=2048,
        max_sequences=limits.most_sequences,
        schedule_ahead=True,
    )
    replay = Replay(
        settings, fitted.steps(), None, Requests(q["arrival_s"], q["input_tokens"], q["output_tokens"])
    ).run()
    served = replay.served()
    tpot = q["decode_s"] / (q["output_tokens"] - 1)
    ttft = q["queued_s"] - q["arrival_s"] + q["queue_s"] + q["prefill_s"]
    assert served.tpot_s.mean() == pytest.approx(tpot.mean(), rel=0.03)
    assert served.ttft_s.mean() == pytest.approx(ttft.mean(), rel=0.10)
    assert np.percentile(served.tpot_s, 95) == pytest.approx(np.percentile(tpot, 95), rel=0.15)
    assert np.percentile(served.ttft_s, 95) == pytest.approx(np.percentile(ttft, 95), rel=0.15)
    series = run_of(data_dir, run, "timeseries")
    if series["kv_cache_pct"].any():
        intervals = replay.intervals()
        use = np.interp(series["t"], intervals.end_s, 100 * intervals.kv_use[:, 0])
        assert np.abs(use - series["kv_cache_pct"]).mean() < 5
