"""The audit on measured outcomes: the numbers BASELINES.md and the issues quote, and rows on derived seconds."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest

from conftest import DataDir
from logs import assert_certified, assert_contract, walras

pytestmark = pytest.mark.data

SWE_BENCH = "routing/swebench_verified_mini.parquet"


def audit(path: Path, *options: object) -> Any:
    return walras("audit", path, "--json", *options).data


def prices(path: Path, *options: object) -> Any:
    return walras("prices", path, "--json", *options).data


# --- SWE-bench Verified, 500 tasks × 4 models ---------------------------------------------------------------------


@pytest.fixture(scope="module")
def swe_bench(data_dir: DataDir) -> Path:
    return data_dir / SWE_BENCH


@pytest.fixture(scope="module")
def at_five(swe_bench: Path) -> Any:
    return audit(swe_bench, "--value", 5)


@pytest.fixture(scope="module")
def with_budget(swe_bench: Path) -> Any:
    return audit(swe_bench, "--value", 5, "--budget-usd", 0.05)


def test_the_contract(at_five: Any, with_budget: Any) -> None:
    for data in (at_five, with_budget):
        assert_contract(data)
        assert data["n_tasks"] == 500
        assert data["prices"]["latency"] | data["prices"]["risk"] | {"value": 0} == {
            **data["prices"]["risk"], "value": 0,
        }  # fmt: skip


def test_best_fixed_and_oracles(at_five: Any) -> None:
    assert at_five["best_fixed"]["surplus"] == pytest.approx(2.9717, abs=1e-4)
    assert at_five["oracle"]["surplus"] == pytest.approx(3.8822, abs=1e-4)
    assert at_five["oracle_with_defer"]["surplus"] == pytest.approx(3.8889, abs=1e-4)
    assert at_five["multipliers"] == {"compute": 0, "latency": 0, "risk": 0}
    assert_certified(at_five)


def test_the_numbers_by_hand(swe_bench: Path, at_five: Any) -> None:
    """The same three, from the table alone."""
    table = pq.read_table(swe_bench, columns=["request_id", "model", "quality", "cost_usd"])
    assert pc.count_distinct(table["request_id"]).as_py() == 500
    table = table.set_column(1, "model", table["model"].cast(pa.string()))
    table = table.sort_by([("request_id", "ascending"), ("model", "ascending")])
    worth = (5 * table["quality"].to_numpy() - table["cost_usd"].to_numpy()).reshape(500, 4)
    assert at_five["best_fixed"]["surplus"] == pytest.approx(worth.mean(axis=0).max())
    assert at_five["oracle"]["surplus"] == pytest.approx(worth.max(axis=1).mean())
    assert at_five["oracle_with_defer"]["surplus"] == pytest.approx(np.maximum(worth.max(axis=1), 0).mean())


def test_what_can_be_had_is_between_one_model_and_hindsight(at_five: Any) -> None:
    """BASELINES.md: a mean by repository earns 3.035 on held-out halves, where the best fixed model earns 2.979."""
    attainable = at_five["attainable"]
    assert attainable["surplus"] == pytest.approx(3.035, abs=0.08)
    assert attainable["surplus"] < at_five["oracle"]["surplus"]
    assert attainable["ci"][0] < attainable["surplus"] < attainable["ci"][1]


def test_regret_is_what_hindsight_adds(at_five: Any) -> None:
    assert at_five["baseline"] == "best fixed"
    regret = at_five["regret"]
    added = at_five["oracle_with_defer"]["surplus"] - at_five["best_fixed"]["surplus"]
    assert regret["mean"] == pytest.approx(added, abs=1e-9)
    assert regret["total"] == pytest.approx(500 * added, abs=1e-6)
    failures = at_five["failures"]
    assert failures["FM-1"]["total"] + failures["FM-2"]["total"] == pytest.approx(regret["total"])
    assert sum(row["total"] for row in regret["by_class"]) == pytest.approx(regret["total"])


def test_budget(with_budget: Any) -> None:
    assert with_budget["multipliers"]["compute"] == pytest.approx(11.22, abs=5e-3)
    assert with_budget["prices"]["compute"]["value"] == pytest.approx(12.22, abs=5e-3)
    assert with_budget["certificate"]["objective"] == pytest.approx(3.6425, abs=5e-5)
    assert with_budget["oracle_with_defer"]["surplus"] == pytest.approx(3.6425, abs=5e-5)
    assert with_budget["oracle"]["surplus"] == pytest.approx(3.4777, abs=5e-5)
    (row,) = with_budget["constraints"]
    assert row["used"] == pytest.approx(0.05, rel=1e-6)
    assert_certified(with_budget)


def test_budget_without_deferring(swe_bench: Path) -> None:
    data = prices(swe_bench, "--value", 5, "--budget-usd", 0.05, "--no-defer")
    assert data["multipliers"]["compute"] == pytest.approx(19.52, abs=5e-3)
    assert data["certificate"]["objective"] == pytest.approx(3.4777, abs=5e-5)
    assert data["constraints"][0]["used"] == pytest.approx(0.05, rel=1e-6)
    assert_certified(data)


@pytest.mark.parametrize("options", [(), ("--no-defer",)])
def test_the_price_is_the_slope_of_surplus_against_the_budget(
    swe_bench: Path, options: tuple[str, ...]
) -> None:
    """μ_C lies between the one-sided slopes, taken from two other runs."""
    step = 1e-4 * 0.05
    below, at, above = (
        prices(swe_bench, "--value", 5, "--budget-usd", budget, *options)
        for budget in (0.05 - step, 0.05, 0.05 + step)
    )
    surplus = [data["certificate"]["objective"] for data in (below, at, above)]
    left, right = (surplus[1] - surplus[0]) / step, (surplus[2] - surplus[1]) / step
    # Each surplus is certified to its gap; what is left is round-off over a step of 5e-6 USD.
    slack = 1e-8 + sum(data["certificate"]["gap"] for data in (below, at, above)) / step
    assert slack < 1e-3
    assert right - slack <= at["multipliers"]["compute"] <= left + slack
    assert left > 0


def test_a_budget_given_as_a_sum(swe_bench: Path, with_budget: Any) -> None:
    data = prices(swe_bench, "--value", 5, "--budget-total-usd", 25)
    assert data["multipliers"] == with_budget["multipliers"]
    assert data["certificate"]["objective"] == with_budget["certificate"]["objective"]
    assert data["constraints"][0]["bound"] == 0.05


def test_a_budget_below_the_least(swe_bench: Path) -> None:
    options = ("--value", 5, "--no-defer", "--json")
    ran = walras("prices", swe_bench, *options, "--budget-usd", 0.03)
    assert (ran.code, ran.out) == (5, "")
    assert "the least bound that would do is 0.03522" in ran.err
    assert walras("prices", swe_bench, *options, "--budget-usd", 0.03522).code == 0
    assert walras("prices", swe_bench, *options, "--budget-usd", 0.03521).code == 5


def test_one_model_can_be_audited(swe_bench: Path, at_five: Any) -> None:
    data = audit(swe_bench, "--value", 5, "--baseline", "gpt-5-mini")
    assert data["baseline"] == "gpt-5-mini"
    assert data["oracle"] == at_five["oracle"]
    added = at_five["oracle_with_defer"]["surplus"] - data["realised"]["surplus"]
    assert data["regret"]["mean"] == pytest.approx(added, abs=1e-9)


# --- RouterBench --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("value", "best_fixed", "oracle"),
    [
        (0.003, 0.001990, 0.002761),
        (0.01, 0.007401, 0.009556),
        (0.03, 0.022861, 0.029058),
        (0.1, 0.082921, 0.097347),
    ],
)
def test_router_bench(data_dir: DataDir, value: float, best_fixed: float, oracle: float) -> None:
    """BASELINES.md, Demand: whole file, complete requests only, no defer."""
    path = data_dir / "routing/routerbench_subset.parquet"
    data = audit(path, "--value", value, "--no-defer")
    assert_contract(data)
    assert (data["n_tasks"], data["left_out"]) == (3150, 14)
    assert data["best_fixed"]["surplus"] == pytest.approx(best_fixed, abs=1e-6)
    assert data["oracle"]["surplus"] == pytest.approx(oracle, abs=1e-6)
    # By class it closes the share of the gap that BASELINES.md measures on held-out halves, ± 3 sd.
    closed = {0.003: 0.126, 0.01: 0.161, 0.03: 0.165, 0.1: 0.045}[value]
    assert data["attainable"]["gap_closed"] == pytest.approx(closed, abs=0.06)


# --- files with gaps ----------------------------------------------------------------------------------------------


def test_swe_bench_pro(data_dir: DataDir) -> None:
    """Costs are recorded for two of nine runs: those two are audited, on the tasks where both are known."""
    path = data_dir / "routing/swebench_pro.parquet"
    data = audit(path, "--value", 50)
    assert_contract(data)
    assert set(data["shares"]["chosen"]) == {"claude-45sonnet", "gpt-5", "defer"}
    assert (data["n_tasks"], data["left_out"]) == (616, 354)
    (dropped,) = [note for note in data["notes"] if "no complete record" in note]
    assert "gptoss" in dropped
    by_run = audit(path, "--value", 50, "--map", "model=run")
    assert set(by_run["shares"]["chosen"]) == {
        "claude-45sonnet-10132025",
        "gpt-5-250-turns-10132025",
        "defer",
    }
    for key in ("n_tasks", "oracle", "oracle_with_defer", "certificate"):
        assert by_run[key] == data[key]


def test_route_llm(data_dir: DataDir) -> None:
    """No cost was recorded at all: said at once, instead of a price for nothing."""
    ran = walras("audit", data_dir / "routing/routellm_evals.parquet", "--value", 1)
    assert (ran.code, ran.out) == (3, "")
    assert "column 'cost_usd': is null in every row" in ran.err


# --- derived seconds ----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def derived(data_dir: DataDir, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """DERIVED, not measured end to end: SWE-bench outcomes with the seconds of one generated answer.

    seconds = TTFT + TPOT · output tokens, from runs measured on real engines (aggregated, 1,024 output tokens). Each
    of the four SWE-bench models is given one served model from the table, the dearer the slower, at random one of its
    measured batch sizes for each task: the load a request happens to meet. It joins two sources that have nothing to do with
    one another, and says so in its name and in the class of every row.
    """
    runs = pq.read_table(data_dir / "serving/silicon_ttft_tpot.parquet")
    runs = runs.filter(
        (pc.field("mode") == "agg") & (pc.field("osl") == 1024) & pc.field("silicon_ttft_ms").is_valid()
    )
    seconds = (
        runs["silicon_ttft_ms"].to_numpy() + runs["silicon_tpot_ms"].to_numpy() * runs["osl"].to_numpy()
    ) / 1e3
    names = np.array(runs["model_path"].to_pylist())
    served = [name for name in np.unique(names) if (names == name).sum() >= 20]
    slow_last = sorted(served, key=lambda name: float(np.median(seconds[names == name])))
    stand_in = dict(
        zip(
            ("gpt-5-mini", "gpt-5", "sonnet-4", "sonnet-4-5"),
            np.array(slow_last)[[0, 1, -2, -1]],
            strict=True,
        )
    )
    log = pq.read_table(data_dir / SWE_BENCH)
    rng = np.random.default_rng(0)
    drawn = [rng.choice(seconds[names == stand_in[model]]) for model in log["model"].to_pylist()]
    log = log.drop_columns(["latency_s"]).append_column("latency_s", pa.array(drawn))
    log = log.append_column("class", pa.array(["derived-seconds"] * len(log)))
    path = tmp_path_factory.mktemp("derived") / "swebench_with_derived_seconds.parquet"
    pq.write_table(log, path)
    return path


@pytest.fixture(scope="module")
def unbounded(derived: Path) -> float:
    """Mean seconds over served tasks when nobody minds them."""
    return float(prices(derived, "--value", 5, "--sla-s", 1e6)["constraints"][0]["used"])


def test_a_mean_sla_binds_on_derived_seconds(derived: Path, unbounded: float) -> None:
    bound = 0.8 * unbounded
    data = prices(derived, "--value", 5, "--sla-s", bound)
    (row,) = data["constraints"]
    assert row["kind"] == "mean_sla"
    assert row["used"] == pytest.approx(bound, rel=1e-6)
    assert data["multipliers"]["latency"] > 0
    assert data["prices"]["latency"]["unit"] == "USD per second"
    assert 0.5 < row["service_rate"] <= 1
    assert_certified(data)


def test_a_quantile_sla_binds_on_derived_seconds(derived: Path, unbounded: float) -> None:
    data = prices(derived, "--value", 5, "--sla-s", unbounded, "--sla-quantile", 0.9)
    (row,) = data["constraints"]
    assert (row["kind"], row["bound"]) == ("quantile_sla", pytest.approx(0.1))
    assert row["used"] == pytest.approx(0.1, rel=1e-6)
    assert data["multipliers"]["latency"] > 0
    assert data["prices"]["latency"]["unit"] == "USD per expected breach"
    assert_certified(data)


def test_budget_and_sla_bind_together_on_derived_seconds(derived: Path, unbounded: float) -> None:
    data = audit(derived, "--value", 5, "--sla-s", 0.8 * unbounded, "--budget-usd", 0.05)
    assert_contract(data)
    assert_certified(data)
    assert data["multipliers"]["compute"] > 0
    assert data["multipliers"]["latency"] > 0
    assert [row["name"] for row in data["regret"]["by_class"]] == ["derived-seconds"]
