"""Routing learned from real logs, held out: above the category mean where the text says something, never below where not."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest

from conftest import DataDir
from walras.diagnosis import evaluate as evaluation
from walras.diagnosis.evaluate import Evaluation, Halves, evaluate_log
from walras.estimate.estimates import Estimates, fit_estimates
from walras.estimate.quality import Requests, fit_quality
from walras.estimate.text import read_texts
from walras.quantities import Labels
from walras.records import Log, read_log
from walras.settings import load_economy

pytestmark = pytest.mark.data

VALUES = (0.003, 0.01, 0.03, 0.1)
SEEDS = 4
STRONG, WEAK = "gpt-4-1106-preview", "mistralai/Mixtral-8x7B-Instruct-v0.1"


@pytest.fixture(scope="module", autouse=True)
def _learn_once() -> Iterator[None]:
    """What a half teaches does not depend on what quality is worth: learn it once, not for every V."""
    known: dict[tuple[Any, ...], Estimates] = {}

    def learn(log: Log, requests: Requests, *, seed: int) -> Estimates:
        key = (log.ids, log.prompts, seed)
        if key not in known:
            known[key] = fit_estimates(log, requests, seed=seed)
        return known[key]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(evaluation, "fit_estimates", learn)
        yield


def evaluate(log: Log, value: float, seeds: int = SEEDS) -> Evaluation:
    return evaluate_log(log, load_economy(None, {"value": value}), seeds=seeds)


def ahead(halves: Halves | None) -> np.ndarray:
    """Gap closed by the policy less that by the category mean, in points, one for each split."""
    assert halves is not None
    return 100 * (halves.closed(halves.policy).by_seed - halves.closed(halves.category_mean).by_seed)


# --- RouterBench, 3,150 complete requests × 11 models -----------------------------------------------------------------


@pytest.fixture(scope="module")
def routerbench(data_dir: DataDir) -> Log:
    return read_log([data_dir / "routing/routerbench_subset.parquet"], also=("prompt",))


@pytest.fixture(scope="module")
def evaluations(routerbench: Log) -> list[Evaluation]:
    return [evaluate(routerbench, value) for value in VALUES]


def test_the_policy_closes_more_of_the_gap_than_the_category_mean(evaluations: list[Evaluation]) -> None:
    gains = [ahead(e.halves).mean() for e in evaluations]
    assert np.mean(gains) >= 1.5
    assert min(gains) >= -0.5


def test_the_policy_closes_more_of_the_gap_than_the_best_fixed_model(evaluations: list[Evaluation]) -> None:
    for e in evaluations:
        assert e.halves is not None
        assert (e.halves.policy.by_seed > e.halves.best_fixed.by_seed).all()


def test_on_prompts_without_a_near_duplicate_it_is_no_worse(evaluations: list[Evaluation]) -> None:
    apart = np.mean([ahead(e.apart) for e in evaluations])
    assert apart >= -1.0
    # Else near-duplicates were not apart, and the figure would promise what new prompts do not keep.
    assert apart < np.mean([ahead(e.halves) for e in evaluations])


def test_estimates_are_calibrated(evaluations: list[Evaluation]) -> None:
    found = evaluations[0].calibration
    assert (found.error.by_seed <= 0.03).all()
    for level, share in found.coverage.items():
        assert share.mean == pytest.approx(level, abs=0.015)


@pytest.fixture(scope="module")
def silent(routerbench: Log) -> list[Evaluation]:
    """Every request with the prompt of another."""
    assert routerbench.prompts is not None
    order = np.random.default_rng(0).permutation(len(routerbench))
    shuffled = replace(routerbench, prompts=tuple(routerbench.prompts[n] for n in order))
    return [evaluate(shuffled, value, 2) for value in VALUES]


def test_text_that_says_nothing_is_not_believed(routerbench: Log, silent: list[Evaluation]) -> None:
    for value, said in zip(VALUES, silent, strict=True):
        unread = evaluate(replace(routerbench, prompts=None), value, 2)
        assert ahead(said.halves) == pytest.approx(ahead(unread.halves), abs=0.5)


def test_where_text_says_nothing_it_is_as_good_as_the_category_mean(silent: list[Evaluation]) -> None:
    assert np.mean([ahead(e.halves) for e in silent]) >= -0.5


# --- SWE-bench Verified, 500 tasks × 4 models, no text ----------------------------------------------------------------


@pytest.mark.parametrize("value", [1, 5, 20])
def test_without_text_it_is_no_worse_than_the_class_mean(data_dir: DataDir, value: float) -> None:
    found = evaluate(read_log([data_dir / "routing/swebench_verified_mini.parquet"]), value, 10)
    assert found.halves is not None
    assert (found.tasks, found.near_duplicates, found.apart) == (500, 0.0, None)
    gain = found.halves.policy.by_seed - found.halves.category_mean.by_seed
    # Splits share requests: Nadeau & Bengio (2003).
    assert gain.mean() >= -2 * gain.std(ddof=1) * np.sqrt(1 / gain.size + 1)


# --- RouteLLM's pair on MMLU, 14,042 requests -------------------------------------------------------------------------


def apgr(score: np.ndarray, quality: np.ndarray) -> float:
    """Mean share of the gap recovered as calls go to the strong model by falling score, ties in random order."""
    gain = quality[:, 0] - quality[:, 1]
    _, rank, count = np.unique(-score, return_inverse=True, return_counts=True)
    expected = np.repeat(np.bincount(rank, weights=gain) / count, count)
    return float(np.trapezoid(np.concatenate(([0.0], np.cumsum(expected))), dx=1 / gain.size) / gain.sum())


def test_average_performance_gap_recovered(data_dir: DataDir) -> None:
    columns = ["request_id", "benchmark", "task", "prompt", "model", "quality"]
    rows = pq.read_table(data_dir / "routing/routellm_evals.parquet", columns=columns).to_pylist()
    strong, weak = (
        {r["request_id"]: r for r in rows if r["benchmark"] == "mmlu" and r["model"] == m}
        for m in (STRONG, WEAK)
    )
    quality = np.array([[strong[i]["quality"], weak[i]["quality"]] for i in strong])
    names = sorted({r["task"] for r in strong.values()})
    classes = Labels(np.array([names.index(r["task"]) for r in strong.values()]), tuple(names))
    requests = Requests(read_texts([r["prompt"] for r in strong.values()]), classes)
    found = []
    for seed in range(2):
        train, test = np.split(np.random.default_rng(seed).permutation(len(requests)), 2)
        model, part = fit_quality(requests.take(train), (STRONG, WEAK), quality[train]), requests.take(test)
        by_class = model.means.mean[model.class_codes(part.task_class)]
        found.append([apgr(q[:, 0] - q[:, 1], quality[test]) for q in (model.predict(part).mean, by_class)])
    ours, by_class = np.mean(found, axis=0)
    assert ours >= by_class - 0.005
    assert ours > 0.663  # TF-IDF and logistic regression, learned from the same benchmark
