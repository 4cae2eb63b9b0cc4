"""The synthetic sample: its laws for any size and seed, its files, and the economics a reader should find in it."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import cache
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from walras.errors import SettingsError
from walras.simulate import SAMPLE_SCHEMA, day, sample, sample_batches, sample_log, write_sample

MODELS = ["nano", "small", "medium", "large", "frontier"]
SEEDS = range(4)
any_tasks = st.integers(1, 200)
any_seed = st.integers(0, 2**64)


class Log:
    """A sample as arrays of shape (tasks, 5); columns that a request has once, as (tasks,)."""

    def __init__(self, table: pa.Table) -> None:
        self.table = table
        self.tenant, self.kind, self.value, self.time = map(
            self.once, ("tenant", "class", "value_usd", "time_s")
        )
        self.chosen, self.quality, self.cost = map(self.all, ("chosen", "quality", "cost_usd"))
        self.latency, self.risk, self.propensity = map(self.all, ("latency_s", "risk", "propensity"))
        lists = table["risk_scenarios"].combine_chunks()
        self.scenarios = lists.flatten().to_numpy().reshape(-1, 5, 16)
        self.net = self.value[:, None] * self.quality - self.cost - self.risk  # [Z-1] at λ0 = 0, ρ0 = 1
        self.best = np.maximum(self.net.max(axis=1), 0.0)  # deferring is open
        self.regret = self.best - self.net[self.chosen]

    def all(self, column: str) -> npt.NDArray[np.generic]:
        return self.table[column].to_numpy().reshape(-1, 5)

    def once(self, column: str) -> npt.NDArray[np.generic]:
        rows = self.all(column)
        assert (rows == rows[:, :1]).all()
        return rows[:, 0]


@cache
def log(seed: int = 0, tasks: int = 2000) -> Log:
    return Log(sample_log(tasks, seed))


# ---- Laws, for any size and seed ----


@settings(deadline=None, max_examples=25)
@given(tasks=any_tasks, seed=any_seed, batch_tasks=st.integers(1, 250))
def test_batches_of_any_size_hold_the_same_log(tasks: int, seed: int, batch_tasks: int) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(day, "BLOCK_TASKS", 64)  # so that a small log has several blocks
        batches = list(sample_batches(tasks, seed, batch_tasks))
        whole = sample_log(tasks, seed)
    assert pa.Table.from_batches(batches).equals(whole, check_metadata=True)
    assert {len(batch) for batch in batches[:-1]} <= {5 * batch_tasks}
    assert 0 < len(batches[-1]) <= 5 * batch_tasks


def test_the_seed_decides_the_log() -> None:
    assert sample_log(50, 7).equals(sample_log(50, 7))
    for column in ("time_s", "value_usd", "quality", "latency_s"):
        assert not sample_log(50, 7)[column].equals(sample_log(50, 8)[column])


@settings(deadline=None, max_examples=40)
@given(tasks=any_tasks, seed=any_seed)
def test_every_row_is_lawful(tasks: int, seed: int) -> None:
    one = Log(sample_log(tasks, seed))
    assert one.table.schema.equals(SAMPLE_SCHEMA)
    assert one.once("request_id").tolist() == [f"req-{i:07d}" for i in range(1, tasks + 1)]
    assert (one.all("model") == MODELS).all()
    assert (np.diff(one.time) >= 0).all()
    assert one.time[0] >= 0
    assert one.time[-1] <= 86_400
    assert (one.chosen.sum(axis=1) == 1).all()
    assert (one.propensity > 0).all()
    np.testing.assert_allclose(one.propensity.sum(axis=1), 1.0, rtol=1e-12)
    assert ((one.quality >= 0) & (one.quality <= 1)).all()
    for positive in (one.value, one.cost, one.latency):
        assert (np.isfinite(positive) & (positive > 0)).all()
    assert all(column.null_count == 0 for column in one.table.columns)


@settings(deadline=None, max_examples=40)
@given(tasks=any_tasks, seed=any_seed)
def test_tokens_are_parts_of_their_wholes_and_make_the_cost(tasks: int, seed: int) -> None:
    for row in sample_log(tasks, seed).slice(0, 20).to_pylist():
        model = day.MODELS[MODELS.index(row["model"])]
        assert 0 <= row["cached_input_tokens"] <= row["input_tokens"]
        assert 0 <= row["reasoning_tokens"] < row["output_tokens"]
        fresh = row["input_tokens"] - row["cached_input_tokens"]
        usd = fresh * model.input_usd + row["cached_input_tokens"] * model.cached_usd
        assert row["cost_usd"] == pytest.approx(
            (usd + row["output_tokens"] * model.output_usd) / 1e6, rel=1e-12
        )


@settings(deadline=None, max_examples=40)
@given(tasks=any_tasks, seed=any_seed)
def test_risk_is_the_mean_of_its_scenarios_and_reading_has_none(tasks: int, seed: int) -> None:
    one = Log(sample_log(tasks, seed))
    acts = np.isin(one.kind, ["code-edit", "transfer"])
    assert (one.risk[acts] > 0).all()
    assert (one.risk[~acts] == 0).all()
    assert (one.scenarios >= 0).all()
    np.testing.assert_allclose(one.scenarios.mean(axis=2), one.risk, rtol=1e-12, atol=0)


def test_parameters_make_sense() -> None:
    assert sum(tenant.share for tenant in day.TENANTS) == pytest.approx(1)
    for tenant in day.TENANTS:
        assert sum(tenant.mix) == pytest.approx(1)
        assert len(tenant.mix) == len(day.CLASSES)
    load = day.diurnal_load(np.linspace(0, day.DAY_S, 1441))
    assert load.min() > 0
    assert load.max() * max(model.utilisation for model in day.MODELS) < 1
    for rising in ("strength", "input_usd", "output_usd", "first_token_s", "decode_s"):
        steps = [getattr(model, rising) for model in day.MODELS]
        assert steps == sorted(set(steps))


@pytest.mark.parametrize(
    ("key", "call"),
    [
        ("tasks", lambda: sample_log(0)),
        ("seed", lambda: sample_log(1, -1)),
        ("batch_tasks", lambda: sample_batches(1, 0, 0)),
        ("--output", lambda: write_sample(Path("sample.xlsx"), 1, 0)),
    ],
)
def test_what_cannot_be_sampled_is_refused_by_name(key: str, call: Callable[[], object]) -> None:
    with pytest.raises(SettingsError) as refused:
        call()
    assert refused.value.key == key


# ---- Files ----


def test_arrow_and_parquet_say_that_they_are_synthetic(tmp_path: Path) -> None:
    write_sample(tmp_path / "s.parquet", 10, 42)
    expected = {b"walras.synthetic": b"true", b"walras.seed": b"42"}
    assert sample_log(10, 42).schema.metadata == expected
    assert pa.parquet.read_schema(tmp_path / "s.parquet").metadata == expected
    assert SAMPLE_SCHEMA.metadata == {b"walras.synthetic": b"true"}


def test_the_three_formats_hold_the_same_log(tmp_path: Path) -> None:
    whole = sample_log(30, 1)
    for name in ("s.parquet", "s.csv", "S.JSONL"):
        done: list[int] = []
        write_sample(tmp_path / name, 30, 1, on_batch=done.append)
        assert sum(done) == 30
    assert pa.parquet.read_table(tmp_path / "s.parquet").equals(whole)
    lines = (tmp_path / "S.JSONL").read_text(encoding="utf-8").splitlines()
    assert [json.loads(line) for line in lines] == whole.to_pylist()
    flat = whole.drop_columns(["risk_scenarios"])
    types = pa.csv.ConvertOptions(column_types=flat.schema)
    assert pa.csv.read_csv(tmp_path / "s.csv", convert_options=types).equals(flat)


def test_files_have_the_permissions_of_any_new_file(tmp_path: Path) -> None:
    (tmp_path / "other").touch()
    write_sample(tmp_path / "s.csv", 1, 0)
    assert (tmp_path / "s.csv").stat().st_mode == (tmp_path / "other").stat().st_mode


@pytest.mark.parametrize("stop", [OSError("no space left"), KeyboardInterrupt()])
@pytest.mark.parametrize("suffix", [".parquet", ".csv", ".jsonl"])
def test_a_failed_write_leaves_what_was_there(tmp_path: Path, suffix: str, stop: BaseException) -> None:
    target = tmp_path / f"s{suffix}"
    target.write_text("before")
    seen: list[list[Path]] = []

    def fail(_: int) -> None:
        seen.append(list(tmp_path.iterdir()))
        raise stop

    with pytest.raises(type(stop)):
        write_sample(target, 5, 0, on_batch=fail)
    assert len(seen[0]) == 2  # it did fail midway, with a partial file beside the target
    assert list(tmp_path.iterdir()) == [target]
    assert target.read_text() == "before"


def test_a_block_that_fails_leaves_no_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    block = sample.draw_block

    def fails_later(rng: np.random.Generator, first: int, *rest: object) -> pa.RecordBatch:
        if first > 1:
            raise MemoryError
        return block(rng, first, *rest)

    monkeypatch.setattr(day, "BLOCK_TASKS", 8)
    monkeypatch.setattr(sample, "draw_block", fails_later)
    with pytest.raises(MemoryError):
        write_sample(tmp_path / "s.parquet", 20, 0)
    assert list(tmp_path.iterdir()) == []


def test_errors_of_the_file_system_pass_through(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        write_sample(tmp_path / "absent" / "s.csv", 1, 0)
    (tmp_path / "folder.csv").mkdir()
    with pytest.raises(OSError, match=r"folder\.csv"):
        write_sample(tmp_path / "folder.csv", 1, 0)
    assert list(tmp_path.iterdir()) == [tmp_path / "folder.csv"]


# ---- The statistics of the log ----


def test_arrivals_are_poisson_with_a_diurnal_rate() -> None:
    tasks = 20_000  # more than one block
    share = day.diurnal_share(log(0, tasks).time)
    # In the clock of expected arrivals the process is homogeneous: uniform counts, exponential gaps.
    counts = np.histogram(share, bins=24, range=(0, 1))[0]
    assert ((counts - tasks / 24) ** 2 / (tasks / 24)).sum() < 50  # χ², 23 degrees of freedom: P < 0.001
    gaps = np.diff(share) * tasks
    assert gaps.mean() == pytest.approx(1, abs=0.03)
    assert gaps.std() == pytest.approx(1, abs=0.05)
    hours = np.histogram(log(0, tasks).time, bins=24, range=(0, 86_400))[0]
    assert hours[11:16].mean() > 3 * hours[0:5].mean()


def test_the_logged_policy_draws_what_its_propensities_say() -> None:
    one = log(0, 20_000)
    for tenant in np.unique(one.tenant):
        p, drawn = (x[one.tenant == tenant] for x in (one.propensity, one.chosen))
        error = (drawn - p).sum(axis=0) / np.sqrt((p * (1 - p)).sum(axis=0))
        assert (np.abs(error) < 4).all()


@pytest.mark.parametrize("seed", SEEDS)
def test_tails_are_heavy_and_tenants_uneven(seed: int) -> None:
    one = log(seed)
    for heavy in (
        one.value,
        one.all("output_tokens").ravel(),
        one.all("input_tokens")[:, 0],
        one.latency.ravel(),
    ):
        assert np.quantile(heavy, 0.99) > 8 * np.median(heavy)
    at_stake = one.risk[one.risk[:, 0] > 0, 0]
    assert at_stake.mean() > 2 * np.median(at_stake)
    shares = np.sort([(one.tenant == name).mean() for name in np.unique(one.tenant)])
    assert len(shares) == 4
    assert shares[-1] > 3 * shares[0]


@pytest.mark.parametrize("seed", SEEDS)
def test_larger_models_are_slower_dearer_and_safer(seed: int) -> None:
    one = log(seed)
    assert (np.diff(one.latency.mean(axis=0)) > 0).all()
    assert (np.diff(one.cost.mean(axis=0)) > 0).all()
    assert (np.diff(one.risk.mean(axis=0)) < 0).all()


def test_the_busy_hours_are_slower() -> None:
    one = log(0, 20_000)
    busy = np.abs(one.time / 3600 - 13) < 2
    night = one.time < 4 * 3600
    per_token = one.latency / one.all("output_tokens")
    assert (np.median(per_token[busy], axis=0) > 1.1 * np.median(per_token[night], axis=0)).all()


@pytest.mark.parametrize("seed", SEEDS)
def test_strength_pays_most_on_hard_tasks(seed: int) -> None:
    one = log(seed)
    gain = {
        kind: np.subtract(*one.quality[one.kind == kind].mean(axis=0)[[4, 0]]) for kind in np.unique(one.kind)
    }
    assert min(gain["code-edit"], gain["data-analysis"]) > max(gain["chat"], gain["extraction"]) + 0.1


def test_the_class_tells_only_part_of_the_difficulty() -> None:
    one = log(0, 20_000)
    for kind in np.unique(one.kind):  # what it leaves open is shared by the models
        correlation = np.corrcoef(one.quality[one.kind == kind].T)
        assert correlation[np.triu_indices(5, 1)].min() > 0.02
        assert correlation[0, 1] > 0.1


# ---- The economics ----


@pytest.mark.parametrize("seed", SEEDS)
def test_no_model_is_best_everywhere(seed: int) -> None:
    one = log(seed)
    best_of_class = {one.net[one.kind == kind].mean(axis=0).argmax() for kind in np.unique(one.kind)}
    assert len(best_of_class) >= 3
    served = one.net.max(axis=1) > 0
    wins = np.bincount(one.net[served].argmax(axis=1), minlength=5) / served.sum()
    assert wins.min() > 0.02
    assert wins.max() < 0.5
    best_fixed = one.net.mean(axis=0).max()
    assert best_fixed < 0.9 * one.net.max(axis=1).mean()
    assert one.net[one.chosen].mean() < 0.9 * one.best.mean()
    assert 0.9 < served.mean() < 1  # some tasks are worth no model


def test_what_a_router_can_see_is_worth_something() -> None:
    one = log(0, 20_000)
    half = np.arange(len(one.value)) % 2 == 0  # learn on one half, earn on the other
    surplus = 0.0
    for kind in np.unique(one.kind):
        here = one.kind == kind
        valuable = one.value > np.median(one.value[here])
        for cell in (here & valuable, here & ~valuable):
            pick = one.net[cell & half].mean(axis=0).argmax()
            surplus += one.net[cell & ~half, pick].sum()
    fixed = one.net[~half].mean(axis=0).max()
    assert surplus / (~half).sum() > 1.05 * fixed
    assert surplus / (~half).sum() < one.best[~half].mean()


@pytest.mark.parametrize("seed", SEEDS)
def test_engineering_over_routes(seed: int) -> None:
    """FM-1: the frontier by default, where a cheaper use has the higher net value."""
    one = log(seed)
    here = one.tenant == "engineering"
    assert one.chosen[here, 4].mean() > 0.85
    habit = here & one.chosen[:, 4]
    assert (one.net[habit, :4].max(axis=1) > one.net[habit, 4]).mean() > 0.6
    assert one.net[here].mean(axis=0).argmax() in (3, 4)  # not absurd on the whole: its work is hard
    assert one.regret[here].sum() > 0.2 * one.regret.sum()


@pytest.mark.parametrize("seed", SEEDS)
def test_backoffice_under_routes_where_value_is_high(seed: int) -> None:
    """FM-2 and P2: regret of the cost minimiser sits on few high-value requests, and rises faster than V."""
    one = log(seed)
    here = one.tenant == "backoffice"
    assert one.chosen[here, 0].mean() > 0.85
    habit = here & one.chosen[:, 0]
    top = one.value > np.quantile(one.value[here], 0.9)
    assert one.regret[here & top].sum() > 0.6 * one.regret[here].sum()
    high = one.value > np.median(one.value[here])
    per_value = [one.regret[habit & part].sum() / one.value[habit & part].sum() for part in (high, ~high)]
    assert per_value[0] > 1.2 * per_value[1]


@pytest.mark.parametrize("seed", SEEDS)
def test_losses_share_shocks_so_portfolio_risk_remains(seed: int) -> None:
    one = log(seed)

    def worst(losses: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
        return np.sort(losses, axis=-1)[..., -4:].mean(axis=-1)  # CVaR at 75%: the worst 4 of 16

    losses = one.scenarios[one.chosen]
    portfolio = worst(losses.sum(axis=0))
    assert portfolio > 1.5 * losses.mean(axis=1).sum()  # pooling does not average the shocks away
    assert portfolio < 0.98 * worst(losses).sum()  # yet tasks are not hit all alike


def stated_figures() -> dict[str, list[float]]:
    assert sample.__doc__ is not None
    rows = sample.__doc__.partition("logged      best\n")[2].splitlines()
    return {row.rsplit(maxsplit=2)[0].strip(): [float(x) for x in row.split()[-2:]] for row in rows if row}


def test_the_figures_in_the_docs_are_those_of_the_log() -> None:
    one = log()
    served = one.net.max(axis=1) > 0
    best = (one.net == one.net.max(axis=1, keepdims=True)) & served[:, None]
    assert best.sum() == served.sum()

    def figures(picked: npt.NDArray[np.bool_]) -> list[float]:
        n, seconds = len(picked), one.latency[picked]
        usd, risk = one.cost[picked].sum() / n, one.risk[picked].sum() / n
        return [one.net[picked].sum() / n, usd, seconds.mean(), float(np.quantile(seconds, 0.95)), risk]

    stated = stated_figures()
    assert list(stated) == ["surplus_usd", "mean cost_usd", "mean latency_s", "p95 latency_s", "mean risk"]
    for row, logged, ideal in zip(stated.values(), figures(one.chosen), figures(best), strict=True):
        assert row == pytest.approx([logged, ideal], rel=2e-3)


def test_every_bound_can_bind_without_deferring_all() -> None:
    """Two thirds of what the ex-post best uses is a bound that binds, and serving every task can meet it."""
    one, stated = log(), stated_figures()
    least = [one.cost.min(axis=1).mean(), one.latency.min(axis=1).mean()]
    least += [np.quantile(one.latency.min(axis=1), 0.95), one.risk.min(axis=1).mean()]
    for name, amount in zip(list(stated)[1:], least, strict=True):
        assert amount < 2 / 3 * stated[name][1]
