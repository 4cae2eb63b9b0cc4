"""`walras evaluate`: what it says of logs whose answer is known, and of logs that cannot answer."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from logs import Ran, walras, write_jsonl
from routers import RECORDS, SETTINGS, refused, settings
from walras.diagnosis import evaluate as evaluation
from walras.diagnosis.evaluate import evaluate_log
from walras.quantities import BoolArray
from walras.records import read_log
from walras.risk import FloatArray
from walras.settings import Economy
from walras.simulate import write_sample

MODELS = ("nano", "small", "medium", "large", "frontier")
BIG = 800
"""Requests of a production log: a fifth of them tell of a policy, and 100 must."""


def evaluate(*options: object) -> Ran:
    return walras("evaluate", *options)


def found(*options: object) -> Any:
    return evaluate(*options, "--json").data


@pytest.fixture(scope="module")
def sample(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("sample") / "sample.parquet"
    write_sample(path, 300, seed=0)
    return path


def changed(path: Path, to: Path, **columns: Any) -> Path:
    """The same log with these columns in place of its own; None drops one."""
    table = pq.read_table(path)
    for name, values in columns.items():
        if values is None:
            table = table.drop_columns([name])
        else:
            array = pa.array(values, from_pandas=True)
            table = table.set_column(table.schema.get_field_index(name), name, array)
    pq.write_table(table, to)
    return to


def kept(path: Path, to: Path, rows: BoolArray) -> Path:
    pq.write_table(pq.read_table(path).filter(pa.array(rows)), to)
    return to


def column(path: Path, name: str) -> Any:
    return pq.read_table(path)[name].to_numpy().copy()


# --- logs whose answer is known ---------------------------------------------------------------------------------------


def two_classes(path: Path, seed: int, n: int = 400, *, says: str = "class") -> Path:
    """Each of two models is nearly always right on its own class, and seldom on the other's; both cost 0.1."""
    rng = np.random.default_rng(seed)
    rows = []
    for k in range(n):
        topic = ("sums", "poems")[rng.integers(2)]
        for model, own in (("reckoner", "sums"), ("poet", "poems")):
            right = float(rng.random() < (0.95 if topic == own else 0.15))
            rows.append(
                {"request_id": f"r{k}", "model": model, "quality": right, "cost_usd": 0.1, says: topic}
            )
    return write_jsonl(path, rows)


def test_a_log_in_which_classes_tell_everything(tmp_path: Path) -> None:
    """Oracle 1 − .05·.85 right; class means .95; one model for all .55. A router must not do worse than a table."""
    data = found(two_classes(tmp_path / "log.jsonl", 0), "--value", 1, "--seeds", 4)
    assert (data["tasks"], data["classes"], data["left_out"]) == (400, 2, 0)
    assert data["models"] == ["reckoner", "poet"]
    assert data["surplus"] == pytest.approx(0.95 - 0.1, abs=0.03)
    assert data["oracle"] == pytest.approx(1 - 0.05 * 0.85 - 0.1, abs=0.03)
    assert data["best_fixed"] == pytest.approx(0.55 - 0.1, abs=0.06)
    assert data["gap_closed"]["mean"] == pytest.approx(data["category_mean"]["mean"], abs=1e-9)
    assert data["gap_closed"]["mean"] == pytest.approx(0.98, abs=0.03)
    assert data["advantage"]["mean"] == pytest.approx(0.0, abs=1e-9)
    assert data["surplus_over_fixed"]["mean"] > 0.3
    assert data["regret"]["mean"] == pytest.approx(data["oracle"] - data["surplus"], abs=0.01)
    assert data["regret"]["ci"][0] < data["regret"]["mean"] < data["regret"]["ci"][1]
    assert sum(data["picks"].values()) == pytest.approx(1.0)
    assert data["picks"]["poet"] == pytest.approx(0.5, abs=0.07)
    assert data["off_policy"] is None
    assert data["synthetic"] is False


def test_prompts_that_tell_more_than_classes(tmp_path: Path) -> None:
    """With the kind of task in the text alone, class means are one model for all, and the router is not."""
    rng = np.random.default_rng(0)
    word = {"sums": "add", "poems": "rhyme"}
    rows = []
    for k in range(300):
        topic = ("sums", "poems")[rng.integers(2)]
        prompt = " ".join(f"{word[topic]}{w}" for w in rng.integers(0, 5000, 12))
        for model, own in (("reckoner", "sums"), ("poet", "poems"), ("neither", "")):
            right = float(rng.random() < (0.95 if topic == own else 0.15))
            rows.append(
                {"request_id": f"r{k}", "model": model, "quality": right, "cost_usd": 0.1, "prompt": prompt}
            )
    data = found(write_jsonl(tmp_path / "log.jsonl", rows), "--value", 1, "--seeds", 2)
    assert abs(data["category_mean"]["mean"]) < 0.15
    assert data["gap_closed"]["mean"] > 0.7
    assert data["advantage"]["mean"] > 4 * data["advantage"]["sd"]
    assert data["picks"]["neither"] < 0.02


def test_noise_is_called_noise(tmp_path: Path) -> None:
    """Coins: no policy beats one model for all, and nothing is claimed."""
    rng = np.random.default_rng(1)
    rows = [
        {
            "request_id": f"r{k}",
            "model": m,
            "quality": float(rng.random() < 0.5),
            "cost_usd": 0.1,
            "prompt": " ".join(f"w{w}" for w in rng.integers(0, 5000, 12)),
        }
        for k in range(240)
        for m in "abcd"
    ]
    data = found(write_jsonl(tmp_path / "log.jsonl", rows), "--value", 1, "--seeds", 3)
    assert data["near_duplicates"] == {"share": 0.0, "kept_together": None}
    assert data["gap_closed"]["mean"] < 0.05
    assert data["noise_ceiling"]["mean"] < 0.1
    assert data["surplus"] == pytest.approx(0.4, abs=0.05)
    assert data["oracle"] == pytest.approx(1 - 0.5**4 - 0.1, abs=0.03)


def test_calibration(sample: Path) -> None:
    data = found(sample, "--seeds", 3)["calibration"]
    bins = [b for b in data["bins"] if b["count"]]
    assert len(data["bins"]) == 10
    assert sum(b["count"] for b in bins) == 3 * 150 * 5
    error = sum(b["count"] * abs(b["predicted"] - b["observed"]) for b in bins) / (3 * 150 * 5)
    assert error <= data["ece"]["mean"] + 1e-9  # signs of different splits may cancel in a bin
    assert data["ece"]["mean"] < 0.1
    assert [row["level"] for row in data["coverage"]] == [0.8, 0.9, 0.95]
    for row in data["coverage"]:
        assert row["mean"] == pytest.approx(row["level"], abs=0.05)


def test_figures_are_those_of_the_halves(sample: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Recomputed from the log with a policy of our own in place of the learned one: always the first model."""
    monkeypatch.setattr(evaluation, "_choices", always_first)
    data = found(sample, "--seeds", 2)
    names = ("quality", "cost_usd", "risk", "value_usd")
    quality, cost, risk, value = (column(sample, name).reshape(300, 5) for name in names)
    true = value * quality - cost - risk
    shares, bests, means = [], [], []
    for seed in range(2):
        test = np.setdiff1d(np.arange(300), np.random.default_rng(seed).permutation(300)[:150])
        best, oracle = true[test].mean(axis=0).max(), true[test].max(axis=1).mean()
        shares.append((true[test, 0].mean() - best) / (oracle - best))
        bests.append(best)
        means.append(true[test, 0].mean())
    assert data["gap_closed"]["mean"] == pytest.approx(np.mean(shares))
    assert data["gap_closed"]["sd"] == pytest.approx(np.std(shares, ddof=1))
    assert data["best_fixed"] == pytest.approx(np.mean(bests))
    assert data["surplus"] == pytest.approx(np.mean(means))
    assert data["picks"] == {name: float(name == "nano") for name in MODELS}


def always_first(study: Any, estimates: Any, rows: Any) -> Any:
    return np.zeros(rows.size, dtype=np.int64), study.case.uses.take(rows)


def test_one_split_has_no_spread(sample: Path) -> None:
    data = found(sample, "--seeds", 1)
    for key in ("gap_closed", "category_mean", "advantage", "noise_ceiling", "surplus_over_fixed"):
        assert math.isfinite(data[key]["mean"])
        assert data[key]["sd"] is None
    ran = evaluate(sample, "--seeds", 1)
    assert ran.code == 0
    assert "nan" not in ran.out.replace("nano", "")


def test_same_log_same_figures(sample: Path) -> None:
    assert found(sample, "--seeds", 2) == found(sample, "--seeds", 2)


def test_the_screen_answers_first(sample: Path) -> None:
    ran = evaluate(sample, "--seeds", 2)
    assert (ran.code, ran.err) == (0, "")
    lines = ran.out.splitlines()
    assert "300 tasks × 5 models" in lines[0]
    assert "SYNTHETIC LOG" in lines[0]
    assert lines[1].startswith("A router learned from this log ")
    for word in ("class means", "oracle: luck included", "Regret", "Calibration", "Picks:", "note:"):
        assert word in ran.out


def test_all_quality_zero(sample: Path, tmp_path: Path) -> None:
    """Nothing is ever right: all that is left to choose is what costs and harms least."""
    path = changed(sample, tmp_path / "zero.parquet", quality=np.zeros(1500), risk=np.zeros(1500))
    data = found(path, "--seeds", 2)
    assert data["picks"]["nano"] == 1.0
    cost = column(path, "cost_usd").reshape(300, 5)
    assert data["surplus"] == pytest.approx(-cost[:, 0].mean(), rel=0.1)
    assert data["calibration"]["ece"]["mean"] == pytest.approx(0.0, abs=1e-9)


def test_all_models_the_same(sample: Path, tmp_path: Path) -> None:
    """No gap to close: no share of it is claimed, and nothing is divided by it."""
    same = {"quality": np.full(1500, 0.5), "cost_usd": np.full(1500, 0.01), "risk": np.zeros(1500)}
    data = found(changed(sample, tmp_path / "same.parquet", **same), "--seeds", 2)
    assert data["gap_closed"] == {"mean": 0.0, "sd": 0.0}
    assert data["oracle"] == pytest.approx(data["best_fixed"])
    assert data["regret"]["mean"] == pytest.approx(0.0, abs=1e-12)


def test_near_duplicates_are_told_and_kept_together(tmp_path: Path) -> None:
    """Every prompt is sent twice with the same outcomes; who has seen one knows the other, and only then."""
    rng = np.random.default_rng(0)
    rows = []
    for k in range(100):
        prompt = " ".join(f"w{w}" for w in rng.integers(0, 5000, 20))
        luck = rng.random(3) < 0.5
        for again in range(2):
            rows += [
                {
                    "request_id": f"r{k}.{again}",
                    "model": m,
                    "quality": float(right),
                    "cost_usd": 0.1,
                    "prompt": prompt,
                }
                for m, right in zip("abc", luck, strict=True)
            ]
    data = found(write_jsonl(tmp_path / "log.jsonl", rows), "--value", 1, "--seeds", 2)
    assert data["near_duplicates"]["share"] == 1.0
    apart = data["near_duplicates"]["kept_together"]
    assert data["advantage"]["mean"] > 0.3
    assert abs(apart["advantage"]["mean"]) < 0.1


def test_a_tail_measure_is_the_policys_too(tmp_path: Path) -> None:
    """Equal in expectation, `calm` always loses 0.3 and `wild` 3 in one future of ten: by CVaR only one is bearable."""
    rows = [
        {
            "request_id": f"r{k}", "model": m, "quality": q, "cost_usd": 0.1, "risk": 0.3, "value_usd": 1.0,
            "risk_scenarios": losses,
        }
        for k in range(120)
        for m, q, losses in (("calm", 0.8, [0.3] * 10), ("wild", 0.9, [0.0] * 9 + [3.0]))
    ]  # fmt: skip
    path = write_jsonl(tmp_path / "log.jsonl", rows)
    assert found(path, "--seeds", 2)["picks"] == {"calm": 0.0, "wild": 1.0}
    tail = found(path, "--seeds", 2, "--risk-measure", "cvar", "--risk-alpha", 0.9)
    assert tail["picks"] == {"calm": 1.0, "wild": 0.0}
    assert tail["surplus"] == pytest.approx(0.8 - 0.1 - 0.3)


# --- settings ---------------------------------------------------------------------------------------------------------


def test_forbidden_models_are_nobodys(sample: Path, tmp_path: Path) -> None:
    """Not the router's, the table's or hindsight's; the best fixed model is one that is open to all."""
    table = '[classes.chat]\nforbidden_models = ["large", "medium"]\n'
    data = found(sample, "--seeds", 2, *settings(tmp_path / "e.toml", table))
    names = ("quality", "cost_usd", "risk", "value_usd")
    quality, cost, risk, value = (column(sample, name).reshape(300, 5) for name in names)
    chat = column(sample, "class")[::5] == "chat"
    true = value * quality - cost - risk
    true[np.ix_(chat, [2, 3])] = -np.inf
    assert data["oracle"] == pytest.approx(true.max(axis=1).mean(), rel=0.15)
    assert data["best_fixed"] == pytest.approx(true.mean(axis=0)[[0, 1, 4]].max(), rel=0.15)
    assert data["oracle"] < found(sample, "--seeds", 2)["oracle"]
    assert math.isfinite(data["gap_closed"]["mean"])


def test_no_model_open_to_all(sample: Path, tmp_path: Path) -> None:
    table = f"[classes.chat]\nforbidden_models = {list(MODELS[:3])}\n[classes.transfer]\nforbidden_models = {list(MODELS[3:])}\n"
    ran = evaluate(sample, *settings(tmp_path / "e.toml", table))
    refused(ran, SETTINGS, "forbidden_models", "no model for every request")


def test_two_models_have_no_half_to_know(sample: Path, tmp_path: Path) -> None:
    path = kept(sample, tmp_path / "two.parquet", np.tile([True, False, False, False, True], 300))
    data = found(path, "--seeds", 2)
    assert data["noise_ceiling"]["mean"] == 0.0
    assert any("what is not luck is not estimated" in note for note in data["notes"])


@pytest.mark.parametrize(
    "table",
    ["budget_usd = 1", "budget_total_usd = 1", "sla_s = 9", "risk = 1", "[tenants.growth]\nbudget_total_usd = 1",
     "[classes.chat]\nrisk = 1", '[resources.t]\ncolumn = "latency_s"\nlimit = 3'],
)  # fmt: skip
def test_limits_are_for_others(sample: Path, tmp_path: Path, table: str) -> None:
    ran = evaluate(sample, *settings(tmp_path / "e.toml", table))
    refused(ran, SETTINGS, "evaluate compares policies at declared prices", "walras audit")


def test_limits_are_no_options(sample: Path) -> None:
    assert evaluate(sample, "--budget-usd", 1).code == 2


def test_delay_at_its_price(sample: Path) -> None:
    """Dear seconds make the fast models the best ones."""
    patient, hurried = found(sample, "--seeds", 1), found(sample, "--seeds", 1, "--lambda0", 0.5)
    assert hurried["picks"]["nano"] > patient["picks"]["nano"] + 0.2
    assert hurried["oracle"] < patient["oracle"]


# --- logs that cannot answer ------------------------------------------------------------------------------------------


def test_one_model(sample: Path, tmp_path: Path) -> None:
    path = kept(sample, tmp_path / "one.parquet", np.tile([True, False, False, False, False], 300))
    refused(evaluate(path), RECORDS, "one model only, nano", "nothing to route between")


@pytest.mark.parametrize("production", [False, True])
def test_too_few_requests(sample: Path, tmp_path: Path, production: bool) -> None:
    rows = np.arange(1500) < 60 * 5
    path = kept(sample, tmp_path / "few.parquet", rows & (column(sample, "chosen") if production else True))
    refused(evaluate(path), RECORDS, "60", "too few to split", "80 are needed")


def test_a_priced_column_with_a_gap(sample: Path, tmp_path: Path) -> None:
    seconds = column(sample, "latency_s")
    seconds[77] = np.nan
    path = changed(sample, tmp_path / "gap.parquet", latency_s=seconds)
    assert found(path, "--seeds", 1)["tasks"] == 300
    refused(evaluate(path, "--lambda0", 0.1), RECORDS, "unknown", "leave them out", "latency_s")


def test_incomplete_requests_are_left_out(sample: Path, tmp_path: Path) -> None:
    quality = column(sample, "quality")
    quality[:250] = np.where(np.arange(250) % 5 == 2, np.nan, quality[:250])
    data = found(changed(sample, tmp_path / "gaps.parquet", quality=quality), "--seeds", 2)
    assert (data["tasks"], data["left_out"]) == (250, 50)


def test_a_task_without_a_value(sample: Path, tmp_path: Path) -> None:
    path = changed(sample, tmp_path / "free.parquet", value_usd=None)
    refused(evaluate(path), SETTINGS, "value", "--value")
    assert found(path, "--seeds", 1, "--value", 1)["tasks"] == 300


# --- production logs: only what was chosen is known -------------------------------------------------------------------


def production(
    sample: Path, to: Path, seed: int, *, whole: bool, share: Sequence[float] = (0.2,) * 5
) -> Path:
    """What a policy with known propensities would have logged of the sample.

    Args:
        whole: whether the other models' rows are there with their propensities, and nothing else.
    """
    rng = np.random.default_rng(seed)
    drawn = rng.choice(5, BIG, p=share)
    chosen = np.zeros((BIG, 5), dtype=np.bool_)
    chosen[np.arange(BIG), drawn] = True
    flat = chosen.ravel()
    columns: dict[str, Any] = {"chosen": flat, "propensity": np.tile(share, BIG)}
    for name in ("quality", "cost_usd", "latency_s", "risk"):
        columns[name] = np.where(flat, column(sample, name), np.nan)
    path = changed(sample, to, **columns, risk_scenarios=None)
    return path if whole else kept(path, path, flat)


@pytest.fixture(scope="module")
def big(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("big") / "big.parquet"
    write_sample(path, BIG, seed=1)
    return path


@pytest.mark.parametrize("whole", [False, True])
def test_the_interval_covers_the_truth(
    big: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, whole: bool
) -> None:
    """What the learned policy would have earned is known here: the full sample has every outcome."""
    names = ("quality", "cost_usd", "risk", "value_usd")
    quality, cost, risk, value = (column(big, name).reshape(BIG, 5) for name in names)
    true = value * quality - cost - risk
    policies: list[FloatArray] = []
    estimate = evaluation.evaluate_policy

    def watched(logged: Any, policy: FloatArray, model: FloatArray) -> Any:
        policies.append(policy)
        return estimate(logged, policy, model)

    monkeypatch.setattr(evaluation, "evaluate_policy", watched)
    covered = 0
    for seed in range(3):
        path = production(big, tmp_path / f"{seed}.parquet", seed, whole=whole)
        log = read_log([path], also=("prompt", "propensity"))
        result = evaluate_log(log, Economy())
        assert result.off_policy is not None
        assert result.gain is not None
        order = [MODELS.index(name) for name in log.models]
        truth = float((policies[-1] * true[:, order]).sum(axis=1).mean())
        for name, guess in result.off_policy.estimates.items():
            assert abs(guess.value - truth) < 4 * guess.se, name
        best = result.off_policy.best
        covered += best.interval[0] <= truth <= best.interval[1]
        logged = true[np.arange(BIG), np.array(order)[log.chosen]].mean()
        assert abs(result.gain.value - (truth - logged)) < 4 * result.gain.se
        assert (result.halves, result.apart, result.regret) == (None, None, None)
    assert covered >= 2


def test_a_production_log_on_the_command_line(big: Path, tmp_path: Path) -> None:
    path = production(big, tmp_path / "log.parquet", 0, whole=False)
    data = found(path)
    for key in (
        "gap_closed",
        "category_mean",
        "advantage",
        "noise_ceiling",
        "best_fixed",
        "oracle",
        "surplus",
        "regret",
    ):
        assert data[key] is None
    off = data["off_policy"]
    assert set(off["estimates"]) == {"ips", "snips", "dr", "switch_dr"}
    assert off["recommended"] in off["estimates"]
    for guess in off["estimates"].values():
        assert guess["interval"][0] < guess["value"] < guess["interval"][1]
    assert off["overlap"]["ess"] > 100
    assert off["overlap"]["mean_weight"] == pytest.approx(1.0, abs=0.2)
    assert off["gain"]["interval"][0] > 0  # against models drawn by lot
    ran = evaluate(path)
    assert (ran.code, ran.err) == (0, "")
    for word in ("earns more than the logged choices", "Off policy", f"effective of {BIG} rows", "note:"):
        assert word in " ".join(ran.out.split())


def test_without_propensities_nothing_is_said(big: Path, tmp_path: Path) -> None:
    path = production(big, tmp_path / "log.parquet", 0, whole=False)
    changed(path, path, propensity=None)
    refused(evaluate(path), RECORDS, "no propensities", "`chosen` and `propensity`", "walras route --explore")


@pytest.mark.parametrize(("wrong", "how"), [(0.0, "is 0 for"), (np.nan, "is unknown for")])
def test_a_propensity_that_cannot_be_names_its_request(
    big: Path, tmp_path: Path, wrong: float, how: str
) -> None:
    path = production(big, tmp_path / "log.parquet", 0, whole=False)
    propensity, quality = column(path, "propensity"), column(path, "quality")
    quality[:20] = np.nan  # rows that are left out must not shift the blame
    propensity[[5, 123, 400]] = wrong
    changed(path, path, propensity=propensity, quality=quality)
    refused(
        evaluate(path),
        RECORDS,
        "column 'propensity'",
        column(path, "request_id")[123],
        how,
        "2 such requests",
    )


def test_propensities_that_do_not_sum_to_one(big: Path, tmp_path: Path) -> None:
    path = production(big, tmp_path / "log.parquet", 0, whole=True)
    propensity = column(path, "propensity")
    propensity[50:55] = 0.1
    changed(path, path, propensity=propensity)
    refused(
        evaluate(path),
        RECORDS,
        "column 'propensity'",
        column(path, "request_id")[50],
        "sums to 0.5",
        "must be 1",
    )


def test_a_complete_log_is_judged_whatever_its_propensities(sample: Path, tmp_path: Path) -> None:
    path = changed(sample, tmp_path / "log.parquet", propensity=np.full(1500, 0.0))
    data = found(path, "--seeds", 1)
    assert data["off_policy"] is None
    assert math.isfinite(data["gap_closed"]["mean"])
    assert any("nothing is estimated off policy" in note and "is 0 for" in note for note in data["notes"])


def test_a_log_that_hardly_tried_what_is_wanted(big: Path, tmp_path: Path) -> None:
    path = production(big, tmp_path / "log.parquet", 0, whole=False, share=(0.96, 0.01, 0.01, 0.01, 0.01))
    refused(evaluate(path), RECORDS, "never takes", "log some exploration: take '")


def test_choices_that_are_forbidden_now_were_made_all_the_same(big: Path, tmp_path: Path) -> None:
    """They still count as what the log earned, and the policy does not make them."""
    path = production(big, tmp_path / "log.parquet", 0, whole=False)
    table = "".join(
        f'[classes.{name}]\nforbidden_models = ["frontier"]\n' for name in sorted(set(column(path, "class")))
    )
    data = found(path, *settings(tmp_path / "e.toml", table))
    assert data["picks"]["frontier"] == 0.0
    worth = (
        column(path, "value_usd") * column(path, "quality") - column(path, "cost_usd") - column(path, "risk")
    )
    off = data["off_policy"]
    logged = off["estimates"]["dr"]["value"] - off["gain"]["value"]
    assert logged == pytest.approx(worth.mean())


def test_a_report_is_written(sample: Path, big: Path, tmp_path: Path) -> None:
    logs = (sample, production(big, tmp_path / "log.parquet", 0, whole=False))
    for path, title in zip(logs, ("sample.parquet", "log.parquet"), strict=True):
        report = tmp_path / "report.html"
        ran = evaluate(path, "--seeds", 1, "--html", report)
        assert ran.code == 0, ran.err
        assert f"Report: {report}" in ran.out.replace("\n", "")
        text = report.read_text(encoding="utf-8")
        assert f"evaluation of {title}" in text
        assert 'id="calibration"' in text
    assert evaluate(sample, "--html", tmp_path / "no" / "report.html").code == 7
