"""The command line: contract, options, every kind of row on sample data, and what people see."""

from __future__ import annotations

import json
import math
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest

from logs import (
    HEADER,
    PAIR,
    assert_certified,
    assert_contract,
    walras,
    walras_script,
    write_csv,
)
from walras.prices import Prices
from walras.simulate import write_sample

TASKS = 400


@pytest.fixture(scope="module")
def sample(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("sample") / "sample.parquet"
    write_sample(path, TASKS, seed=0)
    return path


@pytest.fixture(scope="module")
def everything(sample: Path) -> Any:
    """An audit with a row of every layer."""
    rows = ("--budget-usd", 0.01, "--sla-s", 12, "--risk", 0.005)
    return walras("audit", sample, "--json", *rows).data


@pytest.fixture(scope="module")
def table(sample: Path) -> dict[str, np.ndarray]:
    """The sample as (tasks, models) arrays, read without walras."""
    log = pq.read_table(sample)
    names = ("quality", "cost_usd", "latency_s", "risk", "value_usd", "chosen")
    return {name: log[name].to_numpy().reshape(TASKS, 5) for name in names}


def prices(path: Path, *options: object) -> Any:
    return walras("prices", path, "--json", *options).data


def economy(folder: Path, text: str) -> tuple[str, Path]:
    path = folder / "economy.toml"
    path.write_text(text, encoding="utf-8")
    return "--settings", path


# --- the contract -------------------------------------------------------------------------------------------------


def test_the_contract(everything: Any) -> None:
    assert_contract(everything)
    assert_certified(everything)
    assert everything["n_tasks"] == TASKS
    assert everything["synthetic"] is True
    assert everything["seconds"] > 0
    assert everything["passes"] >= 1


def test_prices_are_the_first_part_of_an_audit(sample: Path, everything: Any) -> None:
    data = prices(sample, "--budget-usd", 0.01, "--sla-s", 12, "--risk", 0.005)
    for key in ("n_tasks", "prices", "multipliers", "certificate", "price_vector", "left_out", "notes"):
        assert data[key] == everything[key]
    for row, more in zip(data["constraints"], everything["constraints"], strict=True):
        assert row.items() <= more.items()


def test_the_price_vector_reads_back(everything: Any) -> None:
    vector = Prices.from_json(json.dumps(everything["price_vector"]))
    assert vector.multiplier("compute") == everything["multipliers"]["compute"]
    assert vector.multiplier("risk") == everything["multipliers"]["risk"]


def test_prices_are_declared_plus_discovered(sample: Path, tmp_path: Path) -> None:
    data = prices(
        sample, "--budget-usd", 0.01, "--sla-s", 12, "--risk", 0.005, "--lambda0", 0.0005, "--rho0", 0.5
    )
    declared = {"compute": 1.0, "latency": 0.0005, "risk": 0.5}
    for layer, price in data["prices"].items():
        assert price["declared"] == pytest.approx(declared[layer])
        assert price["value"] == pytest.approx(declared[layer] + data["multipliers"][layer])
        assert price["constraint"] is not None


def test_realised_is_what_the_log_says(everything: Any, table: dict[str, np.ndarray]) -> None:
    worth = table["value_usd"] * table["quality"] - table["cost_usd"] - table["risk"]
    chosen = table["chosen"]
    realised = everything["realised"]
    assert realised["surplus"] == pytest.approx(worth[chosen].mean())
    assert realised["cost_usd"] == pytest.approx(table["cost_usd"][chosen].mean())
    assert realised["latency_s"] == pytest.approx(table["latency_s"][chosen].mean())
    assert realised["risk"] == pytest.approx(table["risk"][chosen].mean())
    assert realised["ci"][0] < realised["surplus"] < realised["ci"][1]
    assert everything["baseline"] == "realised"


def test_unbounded_bests_are_what_the_log_says(sample: Path, table: dict[str, np.ndarray]) -> None:
    data = walras("audit", sample, "--json").data
    worth = table["value_usd"] * table["quality"] - table["cost_usd"] - table["risk"]
    assert data["oracle"]["surplus"] == pytest.approx(worth.max(axis=1).mean())
    assert data["oracle_with_defer"]["surplus"] == pytest.approx(np.maximum(worth.max(axis=1), 0).mean())
    assert data["best_fixed"]["surplus"] == pytest.approx(worth.mean(axis=0).max())
    assert data["multipliers"] == {"compute": 0, "latency": 0, "risk": 0}
    assert data["regret"]["mean"] == pytest.approx(
        (np.maximum(worth.max(axis=1), 0) - worth[table["chosen"]]).mean()
    )


def test_the_accounts_of_the_report_add_up(everything: Any) -> None:
    """Regret = surplus not earned + what was overdrawn, at its prices; an SLA counts served tasks."""
    regret = everything["regret"]
    overdrawn = 0.0
    for row in everything["constraints"]:
        served = everything["realised"]["served"] if row["kind"].endswith("sla") else 1.0
        overdrawn += row["multiplier"] * served * (row["used_by_baseline"] - row["bound"])
    scale = everything["oracle"]["surplus"]
    assert regret["overdrawn_at_prices"] == pytest.approx(overdrawn, abs=1e-6 * scale)
    assert regret["mean"] == pytest.approx(regret["surplus_not_earned"] + overdrawn, abs=1e-6 * scale)
    at = everything["realised"]["at_prices"]
    assert at["value"] - at["compute"] - at["latency"] - at["risk"] <= everything["realised"]["surplus"]
    for name in ("by_tenant", "by_class", "by_value_decile"):
        assert sum(row["total"] for row in regret[name]) == pytest.approx(regret["total"])
    assert sum(f["total"] for f in everything["failures"].values()) == pytest.approx(regret["total"])


def test_shares_are_shares(everything: Any) -> None:
    for shares in everything["shares"].values():
        assert set(shares) == {"nano", "small", "medium", "large", "frontier", "defer"}
        assert sum(shares.values()) == pytest.approx(1)
        assert min(shares.values()) >= 0


def test_the_answer_moves_with_its_inputs(everything: Any) -> None:
    names = [s["name"] for s in everything["sensitivity"]]
    assert names[0] == "as declared"
    assert {"V − 50%", "V + 50%", "ρ − 50%", "ρ + 50%"} <= set(names)
    assert any("quality" in name for name in names)
    by_name = {s["name"]: s for s in everything["sensitivity"]}
    assert by_name["as declared"]["surplus"] == pytest.approx(everything["certificate"]["objective"])
    assert by_name["as declared"]["regret"] == pytest.approx(everything["regret"]["mean"], rel=1e-6)
    assert by_name["V − 50%"]["surplus"] < by_name["as declared"]["surplus"] < by_name["V + 50%"]["surplus"]
    for row in everything["constraints"]:
        low, high = row["multiplier_ci"]
        assert 0 <= low <= row["multiplier"] <= high


def test_half_the_value_is_what_v_minus_half_says(sample: Path) -> None:
    """The sensitivity line against the audit of another log."""
    full, half = (walras("audit", sample, "--json", "--value", v, "--budget-usd", 0.01).data for v in (2, 1))
    moved = {s["name"]: s for s in full["sensitivity"]}["V − 50%"]
    assert moved["surplus"] == pytest.approx(half["certificate"]["objective"], rel=1e-6)
    assert moved["regret"] == pytest.approx(half["regret"]["mean"], rel=1e-6)
    (mu,) = moved["multipliers"].values()
    assert mu == pytest.approx(half["multipliers"]["compute"], rel=1e-6)


def test_the_curve_has_the_price_as_its_slope(everything: Any) -> None:
    budget, surplus, mu = (np.array(everything["curve"][k]) for k in ("budget_usd", "surplus", "multiplier"))
    slope = np.diff(surplus) / np.diff(budget)
    slack = 1e-6 * surplus.max() / np.diff(budget)
    assert (np.diff(budget) > 0).all()
    assert (mu[1:] <= slope + slack).all()
    assert (slope <= mu[:-1] + slack).all()
    at = int(np.argmin(np.abs(budget - 0.01)))
    assert surplus[at] == pytest.approx(everything["certificate"]["objective"], rel=1e-6)


def test_the_same_seed_gives_the_same_audit(sample: Path, everything: Any) -> None:
    rows = ("--budget-usd", 0.01, "--sla-s", 12, "--risk", 0.005)
    again = walras("audit", sample, "--json", *rows).data
    other = walras("audit", sample, "--json", "--seed", 1, *rows).data
    assert again | {"seconds": 0} == everything | {"seconds": 0}
    assert other["regret"]["ci"] != everything["regret"]["ci"]
    assert other["regret"]["mean"] == everything["regret"]["mean"]


# --- every kind of row binds --------------------------------------------------------------------------------------


def binds(data: Any, layer: str, kind: str, bound: float) -> Any:
    (row,) = data["constraints"]
    assert row["kind"] == kind
    assert row["used"] == pytest.approx(bound, rel=1e-6)
    assert row["multiplier"] > 0
    assert data["multipliers"][layer] == row["multiplier"]
    assert_certified(data)
    return row


def test_mean_sla(sample: Path) -> None:
    binds(prices(sample, "--sla-s", 8), "latency", "mean_sla", 8)


def test_quantile_sla(sample: Path) -> None:
    row = binds(prices(sample, "--sla-s", 40, "--sla-quantile", 0.97), "latency", "quantile_sla", 0.03)
    assert row["unit"] == "USD per expected breach"


def test_risk_envelope(sample: Path) -> None:
    binds(prices(sample, "--risk", 0.003), "risk", "risk_envelope", 0.003)


def test_cvar_of_each_use(sample: Path) -> None:
    plain = prices(sample, "--risk", 0.01)
    data = prices(sample, "--risk", 0.01, "--risk-measure", "cvar", "--risk-alpha", 0.9)
    binds(data, "risk", "risk_envelope", 0.01)
    assert plain["certificate"]["objective"] > data["certificate"]["objective"], "a tail is worse than a mean"


def test_cvar_of_each_use_at_level_0_is_the_expectation(sample: Path) -> None:
    plain = prices(sample, "--risk", 0.003)
    data = prices(sample, "--risk", 0.003, "--risk-measure", "cvar", "--risk-alpha", 0)
    assert data["multipliers"]["risk"] == pytest.approx(plain["multipliers"]["risk"], rel=1e-6)
    assert data["certificate"]["objective"] == pytest.approx(plain["certificate"]["objective"], rel=1e-9)


def test_cvar_of_the_portfolio(sample: Path) -> None:
    options = ("--risk", 0.006, "--risk-measure", "cvar", "--risk-alpha", 0.9)
    data = prices(sample, *options, "--risk-over", "portfolio")
    binds(data, "risk", "portfolio_envelope", 0.006)
    each = prices(sample, *options)
    # Tails of single uses add up to more than the tail of the whole: the same bound is tighter there.
    assert each["certificate"]["objective"] < data["certificate"]["objective"]


def test_max_min_over_beliefs(sample: Path, tmp_path: Path) -> None:
    uniform, late = [1 / 16] * 16, [0.0] * 8 + [1 / 8] * 8
    text = f"risk = 0.003\nrisk_measure = 'max-min'\nrisk_beliefs = [{uniform}, {late}]"
    data = prices(sample, *economy(tmp_path, text))
    binds(data, "risk", "risk_envelope", 0.003)
    alone = prices(sample, *economy(tmp_path, text.replace(f", {late}", "")))
    plain = prices(sample, "--risk", 0.003)
    assert alone["certificate"]["objective"] == pytest.approx(plain["certificate"]["objective"], rel=1e-9)
    assert data["certificate"]["objective"] < alone["certificate"]["objective"]


def test_max_min_over_beliefs_about_the_portfolio(sample: Path, tmp_path: Path) -> None:
    uniform, late = [1 / 16] * 16, [0.0] * 8 + [1 / 8] * 8
    text = (
        f"risk = 0.003\nrisk_over = 'portfolio'\nrisk_measure = 'max-min'\nrisk_beliefs = [{uniform}, {late}]"
    )
    binds(prices(sample, *economy(tmp_path, text)), "risk", "portfolio_envelope", 0.003)


def test_the_pure_form(sample: Path) -> None:
    data = walras("audit", sample, "--json", "--budget-usd", 0.01, "--numeraire", "compute").data
    assert_contract(data)
    assert_certified(data)
    assert data["prices"]["compute"]["value"] == data["multipliers"]["compute"] > 0
    assert (
        data["best_fixed"]["surplus"] <= data["oracle_with_defer"]["surplus"]
        or not data["best_fixed"]["feasible"]
    )


# --- tables by tenant, class and resource -------------------------------------------------------------------------

TABLES = """
[tenants.backoffice]
value = 3.0
budget_usd = 0.01

[tenants.engineering]
budget_total_usd = 1.5
forbidden_models = ["frontier", "large"]

[classes.transfer]
value = 1e9
forbidden_models = ["nano"]

[resources.tokens]
column = "output_tokens"
price_usd = 1e-6
limit = 600
hard = true
"""


def test_tables(sample: Path, tmp_path: Path) -> None:
    data = walras("audit", sample, "--json", *economy(tmp_path, TABLES)).data
    assert_contract(data)
    assert data["certificate"]["gap"] <= 1e-6 * data["certificate"]["objective"]
    rows = {(row["tenant"], row["resource"]): row for row in data["constraints"]}
    assert set(rows) == {("backoffice", "usd"), ("engineering", "usd"), (None, "tokens")}
    log = pq.read_table(sample, columns=["tenant"])["tenant"].to_pylist()[::5]
    assert rows["engineering", "usd"]["bound"] == pytest.approx(1.5 / log.count("engineering"))
    for row in rows.values():
        assert row["used"] <= row["bound"] * (1 + 1e-6)
    assert rows[None, "tokens"]["hard"] is True
    assert rows[None, "tokens"]["unit"] == "USD per tokens"
    assert data["multipliers"]["compute"] == 0, "it belongs to everybody's budget, and there is none"


@pytest.mark.parametrize("value", [0.1, 1e9])
def test_no_value_buys_a_forbidden_model(sample: Path, tmp_path: Path, value: float) -> None:
    """[Z-LEX] at any price: engineering may not use the two largest, and everybody else wants them."""
    tenants = "\n".join(
        f"[tenants.{name}]\nforbidden_models = ['frontier', 'large']"
        for name in ("engineering", "support", "research")
    )
    data = walras("audit", sample, "--json", "--value", value, *economy(tmp_path, tenants)).data
    log = pq.read_table(sample)
    free = np.array(log["tenant"].to_pylist()[::5]) == "backoffice"
    for kind in ("declared prices", "discovered prices"):
        assert data["shares"][kind]["large"] + data["shares"][kind]["frontier"] <= free.mean() + 1e-12
    assert data["best_fixed"]["use"] not in ("large", "frontier")
    everything = walras("audit", sample, "--json", "--value", value).data
    assert everything["oracle_with_defer"]["surplus"] > data["oracle_with_defer"]["surplus"]


def test_a_price_of_a_resource_is_paid(sample: Path, tmp_path: Path) -> None:
    text = "[resources.tokens]\ncolumn = 'output_tokens'\nprice_usd = {}"
    free, dear = (prices(sample, *economy(tmp_path, text.format(price))) for price in (0.0, 1e-4))
    assert dear["certificate"]["objective"] < free["certificate"]["objective"]
    assert free["certificate"]["objective"] == prices(sample)["certificate"]["objective"]


def test_options_override_the_file(sample: Path, tmp_path: Path) -> None:
    file = economy(tmp_path, "value = 100.0\nbudget_usd = 0.001\nbaseline = 'nano'\ndefer = false")
    data = walras(
        "audit", sample, "--json", *file, "--value", 2, "--budget-usd", 0.02, "--defer", "--baseline", "small"
    )
    plain = walras("audit", sample, "--json", "--value", 2, "--budget-usd", 0.02, "--baseline", "small")
    assert data.data | {"seconds": 0} == plain.data | {"seconds": 0}
    assert data.data["baseline"] == "small"


def test_files_and_mapped_columns(tmp_path: Path) -> None:
    header = "rid,engine,grade,cost_usd,worth"
    first = write_csv(tmp_path / "a.csv", "r1,cheap,0,.01,2\nr1,dear,1,.1,2\n", header=header)
    second = write_csv(tmp_path / "b.csv", "r2,cheap,1,.01,3\nr2,dear,1,.1,3\n", header=header)
    maps = [x for pair in ("request_id=rid", "model=engine", "quality=grade") for x in ("--map", pair)]
    data = walras("audit", first, second, "--json", "--value-column", "worth", *maps).data
    assert data["n_tasks"] == 2
    assert data["oracle"]["surplus"] == pytest.approx(((2 - 0.1) + (3 - 0.01)) / 2)
    assert data["best_fixed"] == {"use": "dear", "surplus": pytest.approx(2.4), "feasible": True}
    assert data["attainable"] is None, "two tasks are too few to say"


def test_a_production_log(tmp_path: Path) -> None:
    """Only what was chosen is known: regret is a lower bound, said as such, and nothing is made up."""
    body = "".join(f"r{k},{'cheap' if k % 2 else 'dear'},{k % 3 > 0:d},{0.1 + k / 1000}\n" for k in range(40))
    path = write_csv(tmp_path / "log.csv", body)
    data = walras("audit", path, "--json", "--value", 1).data
    assert (data["complete"], data["attainable"], data["baseline"]) == (False, None, "realised")
    assert any("lower bound" in note for note in data["notes"])
    screen = walras("audit", path, "--value", 1)
    assert "at least" in screen.out
    assert screen.err == ""


# --- what people see ----------------------------------------------------------------------------------------------


def test_the_screen_leads_with_the_answer(sample: Path) -> None:
    ran = walras_script("audit", sample, "--budget-usd", 0.01, env={"COLUMNS": "110", "LANG": "C.UTF-8"})
    assert (ran.code, ran.err) == (0, "")
    lines = ran.out.splitlines()
    assert len(lines) <= 50, "it fits a screen"
    assert max(map(len, lines)) <= 110
    assert "SYNTHETIC LOG" in lines[0]
    assert "lost $" in lines[1]
    data = walras("audit", sample, "--json", "--budget-usd", 0.01).data
    top = "\n".join(lines[:20])
    assert f"{data['multipliers']['compute']:.4g}" in top
    assert f"${data['regret']['total']:.2f}" in top
    for change in data["changes"]:
        assert change["from"] in ran.out
        assert change["to"] in ran.out
    assert len(data["changes"]) == 3


def test_prices_screen(sample: Path) -> None:
    ran = walras("prices", sample, "--risk", 0.003)
    assert ran.code == 0
    assert "risk ≤" in ran.out
    assert "Certificate: gap" in ran.out
    assert "lost" not in ran.out


def test_names_are_not_markup(tmp_path: Path) -> None:
    body = "r1,[red]cheap[/],1,.01,[bold]x\nr1,[/nope],1,.1,[bold]x\n" * 1
    path = write_csv(tmp_path / "[log].csv", body, header=HEADER + ",tenant")
    ran = walras("audit", path, "--value", 1, "--budget-usd", 0.005)
    assert ran.code == 0, ran.err
    assert "[red]cheap[/]" in ran.out
    assert "[log].csv" in ran.out


def test_html(sample: Path, tmp_path: Path) -> None:
    path = tmp_path / "report.html"
    ran = walras("audit", sample, "--budget-usd", 0.01, "--html", path)
    assert (ran.code, ran.err) == (0, "")
    assert "Report:" in ran.out
    text = path.read_text(encoding="utf-8")
    assert text.lstrip().lower().startswith("<!doctype html>")
    assert "sample.parquet" in text
    assert list(tmp_path.iterdir()) == [path]


def test_infinite_and_unknown_numbers_are_null(tmp_path: Path) -> None:
    """Strict JSON: a parser that refuses NaN and Infinity reads every report."""
    ran = walras("audit", write_csv(tmp_path / "log.csv", PAIR), "--json", "--value", 1, "--no-defer")

    def refuse(word: str) -> None:
        raise AssertionError(word)

    data = json.loads(ran.out, parse_constant=refuse)
    assert data["n_tasks"] == 1
    assert all(math.isfinite(x) for x in data["regret"]["ci"])


def test_version_and_help() -> None:
    assert walras("--version").out == f"walras {version('walras')}\n"
    top = walras("--help").out
    for command in ("audit", "prices", "sample", "settings"):
        assert command in top
        assert walras(command, "--help").code == 0


def test_sample_is_seeded(tmp_path: Path) -> None:
    names = [tmp_path / f"{name}.parquet" for name in "abc"]
    for path, seed in zip(names, (1, 1, 2), strict=True):
        ran = walras("sample", "-o", path, "--tasks", 50, "--seed", seed)
        assert (ran.code, ran.out) == (0, "")
        assert f"a synthetic log of 50 requests (seed {seed})" in ran.err
    first, again, other = (pq.read_table(path) for path in names)
    assert first.equals(again)
    assert not first.equals(other)
