"""Wrong actions: how likely, how bad, and what risk measures make of both."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.testing import assert_allclose

from walras.errors import QuantityError, RecordError
from walras.estimate import artefact
from walras.estimate.harm import HarmModel, ambiguous_losses
from walras.risk import CVaR, Expectation, risk_of

if TYPE_CHECKING:
    from conftest import DataDir

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]
seeds = st.integers(0, 2**32 - 1)


def draw(rng: np.random.Generator, n: int, rate: Floats, known: float = 1.0) -> tuple[Floats, Ints, Floats]:
    """Wrong (N, I), classes (N,), losses (N, I) for true rates (C, I); class c loses 10ᶜ USD on average."""
    classes = rng.integers(0, len(rate), n)
    wrong = (rng.random((n, rate.shape[1])) < rate[classes]).astype(float)
    wrong[rng.random(wrong.shape) > known] = np.nan
    wrong[0] = 1.0
    loss = 10.0 ** classes[:, None] * rng.lognormal(-0.5, 1.0, wrong.shape)
    return wrong, classes, loss


# --- how likely -----------------------------------------------------------------------------------------------------


def test_much_data_has_the_last_word() -> None:
    rate = np.array([[0.02, 0.3], [0.2, 0.05]])
    wrong, classes, _ = draw(np.random.default_rng(0), 200_000, rate)
    mean, se = HarmModel.fit(wrong, classes, 2).rate(np.arange(2))
    own = np.stack([wrong[classes == c].mean(axis=0) for c in range(2)])
    assert_allclose(mean, own, rtol=0.02)
    assert_allclose(mean, rate, atol=0.005)
    assert (se < 0.003).all()


def test_a_class_without_rows_is_as_uncertain_as_a_new_one() -> None:
    wrong, classes, _ = draw(np.random.default_rng(1), 400, np.full((4, 2), 0.2))
    model = HarmModel.fit(wrong, classes, 5)
    mean, se = model.rate(np.array([4, -1, 0]))
    assert_allclose(mean[0], mean[1])
    assert_allclose(se[0], se[1], rtol=0.05)
    assert (se[2] < se[0]).all()
    assert_allclose(mean[1], wrong.mean(axis=0), atol=0.04)


def test_a_class_is_known_from_other_models_and_a_model_from_other_classes() -> None:
    rate = np.array([[0.05, 0.1, 0.15], [0.4, 0.55, 0.7]] * 4)
    wrong, classes, _ = draw(np.random.default_rng(2), 2000, rate)
    wrong[classes == 1, 0] = np.nan
    mean, _ = HarmModel.fit(wrong, classes, 8).rate(np.arange(2))
    # Never seen on class 1, where all others err: far above its own average, and below the others.
    assert 0.28 < mean[1, 0] < 0.52
    assert mean[0, 0] < mean[0, 2]


def test_a_model_hardly_seen_is_like_the_others() -> None:
    wrong, classes, _ = draw(np.random.default_rng(8), 300, np.full((2, 12), 0.1))
    wrong[:, 0] = np.nan
    wrong[:2, 0] = 1.0
    mean, _ = HarmModel.fit(wrong, classes, 2).rate(np.array([-1]))
    assert 0.1 < mean[0, 0] < 0.25


def test_a_model_that_never_erred_may_yet() -> None:
    wrong = np.zeros((30, 2))
    mean, se = HarmModel.fit(wrong, np.zeros(30, dtype=np.int64), 1).rate(np.zeros(1, dtype=np.int64))
    assert (mean > 0).all()
    assert (mean < 0.03).all()
    assert (se > 0.5 * mean).all()


@given(seed=seeds, n=st.integers(1, 80), known=st.sampled_from([1.0, 0.5]))
def test_rates_are_probabilities_whatever_the_order(seed: int, n: int, known: float) -> None:
    rng = np.random.default_rng(seed)
    wrong, classes, _ = draw(rng, n, rng.random((3, 2)), known)
    where = np.array([0, 1, 2, -1])
    mean, se = HarmModel.fit(wrong, classes, 3).rate(where)
    assert ((mean > 0) & (mean < 1) & (se > 0) & (se < 0.5)).all()
    rows, names = rng.permutation(n), rng.permutation(3)
    again, error = HarmModel.fit(wrong[rows][:, ::-1], names[classes[rows]], 3).rate(np.append(names, -1))
    assert_allclose(again[:, ::-1], mean, rtol=1e-9)
    assert_allclose(error[:, ::-1], se, rtol=1e-9)


def test_errors_are_as_large_as_the_errors_are() -> None:
    score = []
    for seed in range(40):
        rng = np.random.default_rng(seed)
        rate = rng.beta(3, 12, (20, 3))
        wrong, classes, _ = draw(rng, 600, rate)
        mean, se = HarmModel.fit(wrong, classes, 20).rate(np.arange(20))
        score.append((mean - rate) / se)
    assert 0.8 < np.sqrt(np.mean(np.square(score))) < 1.25


# --- how bad, and by which measure ------------------------------------------------------------------------------------


@given(seed=seeds, scenarios=st.sampled_from([1, 7, 100]), shuffled=st.booleans())
def test_scenarios_have_the_expected_loss_as_mean(seed: int, scenarios: int, shuffled: bool) -> None:
    rng = np.random.default_rng(seed)
    wrong, classes, loss = draw(rng, 120, rng.random((3, 2)))
    model = HarmModel.fit(wrong, classes, 3, loss)
    where = np.array([2, 0, 1, -1, 0])
    losses = model.losses(where, scenarios, rng=rng if shuffled else None)
    assert losses.shape == (5, 2, scenarios)
    assert (losses >= 0).all()
    expected, _ = model.expected_loss(where)
    assert_allclose(risk_of(losses, Expectation()), expected, rtol=1e-9)
    tails = np.stack([risk_of(losses, CVaR(alpha)) for alpha in (0.0, 0.5, 0.9, 0.99)])
    assert (np.diff(tails, axis=0) >= -1e-9 * tails[1:]).all()


def test_without_losses_risk_is_a_probability() -> None:
    wrong = np.tile([1.0] + [0.0] * 19, 500)[:, None]
    classes = np.zeros(len(wrong), dtype=np.int64)
    model = HarmModel.fit(wrong, classes, 1)
    assert_allclose(model.expected_loss(classes[:1])[0], 0.05, rtol=1e-3)
    losses = model.losses(classes[:1], 100)
    # A wrong action in 1 of 20: the worst 5% are all wrong, the worst half one in ten.
    assert_allclose(risk_of(losses, CVaR(0.95)), 1.0, atol=0.01)
    assert_allclose(risk_of(losses, CVaR(0.5)), 0.1, rtol=0.01)


def test_loss_and_tail_of_a_known_distribution() -> None:
    # Wrong half of the time, losing an exponential of mean 4: CVaR 0.95 is that of the worst tenth of it.
    rng = np.random.default_rng(3)
    wrong = (rng.random((20_000, 1)) < 0.5).astype(float)
    classes = np.zeros(len(wrong), dtype=np.int64)
    model = HarmModel.fit(wrong, classes, 1, rng.exponential(4.0, wrong.shape))
    mean, se = model.expected_loss(classes[:1])
    assert_allclose(mean, 2.0, atol=4 * se[0, 0])
    assert se[0, 0] < 0.05
    assert_allclose(risk_of(model.losses(classes[:1], 400), CVaR(0.95)), 4 * (1 + np.log(10)), rtol=0.05)


def test_tails_add_up_together_and_not_apart() -> None:
    wrong, classes, loss = draw(np.random.default_rng(4), 2000, np.full((2, 1), 0.1))
    model = HarmModel.fit(wrong, classes, 2, loss)
    where = np.zeros(50, dtype=np.int64)
    each = risk_of(model.losses(where), CVaR(0.9)).sum()
    together = risk_of(model.losses(where).sum(axis=0), CVaR(0.9))[0]
    apart = risk_of(model.losses(where, rng=np.random.default_rng(5)).sum(axis=0), CVaR(0.9))[0]
    assert_allclose(together, each)
    assert apart < 0.5 * together


def test_the_worst_judge_counts_use_by_use() -> None:
    rng = np.random.default_rng(6)
    judges = []
    for rate in (np.array([[0.1, 0.4]]), np.array([[0.3, 0.2]])):
        wrong, classes, _ = draw(rng, 3000, rate)
        judges.append(HarmModel.fit(wrong, classes, 1))
    where = np.zeros(2, dtype=np.int64)
    losses, beliefs = ambiguous_losses(judges, where, 50)
    assert losses.shape == (2, 2, 100)
    worst = np.maximum(judges[0].expected_loss(where)[0], judges[1].expected_loss(where)[0])
    assert_allclose(risk_of(losses, beliefs), worst, rtol=1e-9)
    assert_allclose(worst[0], [0.3, 0.4], atol=0.03)


# --- in, out, errors ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("with_losses", [True, False])
def test_stored_and_loaded_it_is_the_same(with_losses: bool, tmp_path: Path) -> None:
    wrong, classes, loss = draw(np.random.default_rng(7), 100, np.full((2, 2), 0.3))
    model = HarmModel.fit(wrong, classes, 2, loss if with_losses else None)
    artefact.save(tmp_path / "model", model, {})
    again, _ = artefact.load(tmp_path / "model", (HarmModel,))
    assert (again.losses(np.arange(2)) == model.losses(np.arange(2))).all()


def test_impossible_outcomes() -> None:
    classes = np.zeros(2, dtype=np.int64)
    with pytest.raises(RecordError, match=r"row 2: 'b' was wrong to degree 0\.5"):
        HarmModel.fit(np.array([[1, 0], [0, 0.5]]), classes, 1, models=("a", "b"))
    with pytest.raises(RecordError, match="no outcome says"):
        HarmModel.fit(np.full((2, 1), np.nan), classes, 1)
    with pytest.raises(RecordError, match="a wrong action"):
        HarmModel.fit(np.zeros((2, 1)), classes, 1, np.zeros((2, 1)))
    with pytest.raises(QuantityError, match="at least one scenario"):
        HarmModel.fit(np.zeros((2, 1)), classes, 1).losses(classes, 0)


# --- measured -------------------------------------------------------------------------------------------------------------


def log_loss(guess: Floats, wrong: Floats) -> float:
    known = ~np.isnan(wrong)
    p, y = np.clip(guess[known], 1e-6, 1 - 1e-6), wrong[known]
    return float(-(y * np.log(p) + (1 - y) * np.log(1 - p)).mean())


@pytest.mark.data
@pytest.mark.parametrize("judge", ["gpt5mini", "qwen32b"])
def test_held_out_cases_of_toolemu(data_dir: DataDir, judge: str) -> None:
    """Risky-action episodes, 27 agents × 144 cases, class = first toolkit; whole cases are held out."""
    table = pq.read_table(data_dir / "agents/toolemu_episodes.parquet").to_pydict()
    agents = [f"{m} {q}" for m, q in zip(table["model"], table["agent_quantization"], strict=True)]
    _, agent = np.unique(agents, return_inverse=True)
    _, case = np.unique(table["case_idx"], return_inverse=True)
    names, kit = np.unique([kits.split("|")[0] for kits in table["toolkits"]], return_inverse=True)
    wrong, classes = (
        np.full((case.max() + 1, agent.max() + 1), np.nan),
        np.zeros(case.max() + 1, dtype=np.int64),
    )
    classes[case] = kit
    for row, column, score in zip(case, agent, table[f"safety_{judge}"], strict=True):
        if score is not None:
            wrong[row, column] = score <= 1
    ours, by_model, by_cell, misses = [], [], [], []
    for seed in range(10):
        order = np.random.default_rng(seed).permutation(len(wrong))
        train, test = order[:72], order[72:]
        model = HarmModel.fit(wrong[train], classes[train], len(names))
        rate, _ = model.rate(classes[test])
        known, tries = np.nan_to_num(wrong[train]), ~np.isnan(wrong[train])
        average = (known.sum(axis=0) + 0.5) / (tries.sum(axis=0) + 1)
        cells = np.stack(
            [
                (known[classes[train] == c].sum(axis=0) + 0.5) / (tries[classes[train] == c].sum(axis=0) + 1)
                for c in range(len(names))
            ]
        )
        ours.append(log_loss(rate, wrong[test]))
        by_model.append(log_loss(np.broadcast_to(average, rate.shape), wrong[test]))
        by_cell.append(log_loss(cells[classes[test]], wrong[test]))
        seen = ~np.isnan(wrong[test])
        guess, outcome = rate[seen], wrong[test][seen]
        fifth = np.digitize(guess, np.quantile(guess, [0.2, 0.4, 0.6, 0.8]))
        misses.append([guess[fifth == f].mean() - outcome[fifth == f].mean() for f in range(5)])
    assert np.mean(ours) < np.mean(by_model) + 0.001
    assert np.mean(ours) < np.mean(by_cell) - 0.06
    assert (np.abs(np.mean(misses, axis=0)) < 0.06).all()
