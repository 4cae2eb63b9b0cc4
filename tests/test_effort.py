"""Policies as tiers: each is held against a law that is known, and what is believed never sees what it is judged on."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from numpy.testing import assert_allclose, assert_array_equal

from logs import walras, write_jsonl
from routers import fitted
from walras.demand.effort import Policies, cross_fitted, cross_fitted_uses, policies
from walras.demand.menu import design
from walras.demand.offerings import Offerings
from walras.errors import QuantityError, RecordError, SettingsError
from walras.estimate.type_laws import LogNormal
from walras.records import UNKNOWN, Log, read_log

EFFORTS = ("low", "high")
COST = np.array([0.1, 0.5])
SWEEP = np.geomspace(0.05, 10.0, 60)


def world(n: int, seed: int = 0) -> tuple[Log, np.ndarray]:
    """SIMULATED: low effort is right as often as the first look was sure, high effort nine times in ten; and those odds."""
    rng = np.random.default_rng(seed)
    sure = rng.random(n)
    odds = np.column_stack((sure, np.full(n, 0.9)))
    log = Log(
        ids=tuple(map(str, range(n))),
        models=EFFORTS,
        per_use={
            "quality": (rng.random((n, 2)) < odds).astype(float),
            "cost_usd": np.tile(COST, (n, 1)),
        },
        losses=None,
        chosen=np.full(n, UNKNOWN),
        value=None,
        time=None,
        tenant=None,
        task_class=None,
        rows=2 * n,
        synthetic=True,
        certainty=sure,
    )
    return log, odds


@pytest.fixture(scope="module")
def known() -> tuple[Log, np.ndarray, np.ndarray, np.ndarray]:
    """A log, its odds, and what is believed of it out of fold."""
    log, odds = world(3000)
    return log, odds, *cross_fitted(log)


# --- the sweep --------------------------------------------------------------------------------------------------------


def test_by_hand() -> None:
    """At v = 1 the easy request gets low effort and the hard one nothing; at v = 5 the hard one gets high effort."""
    quality = np.array([[0.8, 0.9], [0.1, 0.7]])
    cost = np.tile([0.2, 1.2], (2, 1))
    found = policies(quality, cost, quality, cost, np.array([1.0, 5.0]))
    assert found.offerings.names == ("routed at 1", "routed at 5")
    assert_allclose(found.offerings.quality, [0.4, 0.75])
    assert_allclose(found.offerings.cost, [0.1, 0.7])
    assert_allclose(found.quality_error, [0.4, 0.05])
    assert_allclose(found.cost_error, [0.1, 0.5])
    assert_allclose(found.shares, [[0.5, 0.0], [0.5, 0.5]])
    assert_array_equal(found.value, [1.0, 5.0])


def test_what_was_believed_is_not_what_is_counted() -> None:
    rng = np.random.default_rng(1)
    quality_hat, quality = rng.random((2, 500, 3))
    cost_hat, cost = rng.random((2, 500, 3))
    found = policies(quality_hat, cost_hat, quality, cost, np.array([2.0]))
    worth = np.column_stack((np.zeros(500), 2.0 * quality_hat - cost_hat))
    use, rows = worth.argmax(axis=1), np.arange(500)
    assert_allclose(found.offerings.quality, [np.column_stack((np.zeros(500), quality))[rows, use].mean()])
    assert_allclose(found.offerings.cost, [np.column_stack((np.zeros(500), cost))[rows, use].mean()])


@given(
    arrays(float, (6, 3), elements=st.integers(0, 40).map(lambda k: k / 40)),
    arrays(float, (6, 3), elements=st.integers(1, 40).map(lambda k: k / 40)),
    st.lists(st.floats(0.01, 100), min_size=1, max_size=6),
)
def test_perfect_belief_is_the_best_technology(
    quality: np.ndarray, cost: np.ndarray, values: list[float]
) -> None:
    """For every v that was tried the policies hold what E[max(v·q − c, 0)] allows, and no more; on a convex hull."""
    v = np.array(values)
    bound = np.maximum(v[:, None, None] * quality - cost, 0.0).max(axis=2).mean(axis=1)
    if not bound.any():
        return
    found = policies(quality, cost, quality, cost, v).offerings
    got = v[:, None] * found.quality - found.cost
    assert_allclose(np.maximum(got.max(axis=1), 0.0), bound, atol=1e-9)
    slopes = np.diff(found.cost, prepend=0.0) / np.diff(found.quality, prepend=0.0)
    assert (np.diff(slopes) > -1e-9).all()
    assert_array_equal(found.hull, np.arange(found.quality.size))


def test_standard_errors_are_what_new_requests_would_show() -> None:
    """SIMULATED: means over 400 fresh logs scatter as far as one log says they do."""
    v = np.array([1.0])

    def once(seed: int) -> Policies:
        log, odds = world(200, seed)
        return policies(odds, np.tile(COST, (200, 1)), log.per_use["quality"], log.per_use["cost_usd"], v)

    many = [once(seed) for seed in range(400)]
    for mean, error in (
        ([p.offerings.quality[0] for p in many], [p.quality_error[0] for p in many]),
        ([p.offerings.cost[0] for p in many], [p.cost_error[0] for p in many]),
    ):
        assert np.std(mean) == pytest.approx(np.mean(error), rel=0.12)


# --- learned from a log -------------------------------------------------------------------------------------------------


def test_certainty_moves_the_frontier(known: tuple[Log, np.ndarray, np.ndarray, np.ndarray]) -> None:
    """SIMULATED: close to the policies of one who knows the odds, and well past one effort for all."""
    log, odds, quality_hat, cost_hat = known
    assert_allclose(cost_hat, np.tile(COST, (len(log), 1)), atol=1e-9)
    assert np.abs(quality_hat - odds).mean() < 0.03
    quality, cost = log.per_use["quality"], log.per_use["cost_usd"]
    learned, ideal = (policies(q, cost_hat, quality, cost, SWEEP) for q in (quality_hat, odds))
    fixed = Offerings(EFFORTS, quality.mean(axis=0), cost.mean(axis=0))
    for objective in ("revenue", "welfare"):
        worth = [design(LogNormal(1.0, 0.7), t, objective=objective).value for t in (
            fixed, learned.offerings, ideal.offerings
        )]  # fmt: skip
        assert worth[1] > 1.05 * worth[0]
        assert worth[1] == pytest.approx(worth[2], rel=0.02)


def test_noise_moves_nothing() -> None:
    """SIMULATED: certainty that tells nothing leaves the policies at one effort for all, to sampling error."""
    log, odds = world(2000, 3)
    rng = np.random.default_rng(4)
    quality = (rng.random(odds.shape) < [0.5, 0.9]).astype(float)
    blind = replace(log, per_use={**log.per_use, "quality": quality})
    found = policies(*cross_fitted(blind), quality, blind.per_use["cost_usd"], SWEEP)
    fixed = Offerings(EFFORTS, quality.mean(axis=0), COST)
    for v in (0.5, 1.0, 2.0, 5.0):
        best = [(v * o.quality - o.cost).max() for o in (found.offerings, fixed)]
        assert best[0] == pytest.approx(best[1], abs=3 * v * found.quality_error.max())
        assert best[0] < best[1] + 1e-2


def test_no_request_is_judged_by_itself() -> None:
    log, _ = world(150, 7)
    first = cross_fitted(log, 5, 1)[0]
    turned = log.per_use["quality"].copy()
    turned[17] = 1 - turned[17]
    quality = log.per_use["quality"]
    assert isinstance(quality, np.ndarray)
    quality[:] = turned
    second = cross_fitted(log, 5, 1)[0]
    assert_array_equal(first[17], second[17])
    assert not np.array_equal(first, second)


def test_a_family_is_not_told_apart() -> None:
    """Its members lie in one fold: what happened to one is not seen when the others are judged."""
    log, _ = world(150, 8)
    family = np.arange(150) // 3 * 7
    first = cross_fitted(log, 5, 1, family=family)[0]
    log.per_use["quality"][30] = 1 - log.per_use["quality"][30]
    second = cross_fitted(log, 5, 1, family=family)[0]
    assert_array_equal(first[30:33], second[30:33])
    assert not np.array_equal(first, second)


def test_every_amount_stays_with_its_request() -> None:
    """Folds are put back in the log's order, with the amounts that other prices will be paid for."""
    log, _ = world(120, 10)
    log = replace(
        log,
        per_use={**log.per_use, "latency_s": 2 * np.tile(COST, (120, 1)), "gpu": 3 * np.tile(COST, (120, 1))},
    )
    uses = cross_fitted_uses(log, 3, 2, resources={"gpu_s": "gpu"})
    quality_hat, cost_hat = cross_fitted(log, 3, 2)
    assert_array_equal(uses.quality, quality_hat)
    assert_array_equal(uses.amount("usd"), cost_hat)
    assert_allclose(uses.seconds, 2 * cost_hat)
    assert_allclose(uses.amount("gpu_s"), 3 * cost_hat)
    assert log.certainty is not None
    assert np.corrcoef(quality_hat[:, 0], log.certainty)[0, 1] > 0.9
    with pytest.raises(SettingsError, match="without 'tpu'"):
        cross_fitted_uses(log, 3, resources={"tpu_s": "tpu"})


def test_from_a_file_to_a_decision(tmp_path: Path) -> None:
    """`walras fit` and `walras route --jsonl`: the surer the first look, the less effort; and the router is read back."""
    log, _ = world(400, 9)
    assert log.certainty is not None
    rows = [
        {
            "request_id": name, "model": effort, "quality": log.per_use["quality"][k, i], "cost_usd": COST[i],
            "certainty": log.certainty[k],
        }
        for k, name in enumerate(log.ids)
        for i, effort in enumerate(EFFORTS)
    ]  # fmt: skip
    path = write_jsonl(tmp_path / "log.jsonl", rows)
    assert_allclose(read_log([path]).certainty, log.certainty)
    asked = [{"prompt": "", "certainty": c} for c in (0.05, 0.3, 0.7, 1.0)]
    ran = walras("route", "--router", fitted(path), "--value", 1, "--json", "--jsonl",
                 write_jsonl(tmp_path / "q.jsonl", asked))  # fmt: skip
    assert [r["model"] for r in ran.data["routes"]] == ["high", "high", "low", "low"]


# --- bad input --------------------------------------------------------------------------------------------------------


def test_tables_that_do_not_fit() -> None:
    good, v = np.full((4, 2), 0.5), np.array([1.0])
    with pytest.raises(QuantityError, match=r"cost_hat has shape \(4, 3\)"):
        policies(good, np.ones((4, 3)), good, good, v)
    with pytest.raises(QuantityError, match="N ≥ 2"):
        policies(good[:1], good[:1], good[:1], good[:1], v)
    hole = good.copy()
    hole[2, 1] = np.nan
    with pytest.raises(QuantityError, match="quality of request 2, use 1 is nan"):
        policies(good, good, hole, good, v)


@pytest.mark.parametrize("values", [[], [0.0], [-1.0, 2.0], [np.nan], [np.inf], [[1.0]]])
def test_values_nobody_has(values: list[float]) -> None:
    good = np.full((4, 2), 0.5)
    with pytest.raises(QuantityError, match="values must be one or more finite numbers > 0"):
        policies(good, good, good, good, np.array(values))


def test_nothing_is_worth_its_cost() -> None:
    good = np.full((4, 2), 0.5)
    with pytest.raises(QuantityError, match="none has any quality"):
        policies(good, good, good, good, np.array([0.1]))


def test_folds_that_cannot_be() -> None:
    log, _ = world(30)
    with pytest.raises(SettingsError, match="folds"):
        cross_fitted(log, 1)
    with pytest.raises(RecordError, match="4 requests that differ are too few for 5 folds"):
        cross_fitted(log, family=np.arange(30) % 4)
