"""Streaming prices: the guard's law, the same bits by every road, regret that falls, forgetting, and what it certifies."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from walras.errors import QuantityError
from walras.market.dual import solve
from walras.market.memory import Memory
from walras.market.online import POINTS, OnlineMarket
from walras.market.planes import Planes, Rows

LIMITS, SLA = np.array([0.04, 0.0, 0.2]), 1.2
"""Per request: USD, seconds over the bound, late answers (a row with a level)."""
ROUND_OFF = 1e-9

Array = NDArray[Any]


def rows_of(n: int) -> Rows:
    return Rows(
        plane=np.array([0, 1, 1]),
        level=np.array([np.nan, np.nan, 2.0]),
        offset=np.array([0.0, SLA, 0.0]),
        limits=LIMITS * n,
        exactly=np.zeros(3, dtype=np.bool_),
        scoped=np.array([False, False, True]),
    )


def stream(n: int, seed: int, width: int = 5, dtype: type = np.float32, worth: float = 1.0) -> Planes:
    """Random requests; some uses are not allowed, and half the requests are outside the third row."""
    rng = np.random.default_rng(seed)
    quality = np.where(rng.random((n, width)) < 0.1, np.nan, rng.random((n, width)))
    amounts = (0.1 * rng.lognormal(0, 1, (n, width)), rng.lognormal(0, 1, (n, width)))
    return Planes(
        worth * rng.lognormal(0, 1, n),
        quality.astype(dtype),
        tuple(a.astype(dtype) for a in amounts),
        (np.ones(1), rng.random(n) * 0.01),
        np.ones(1),
        (4 * rng.integers(0, 2, n)).astype(np.uint64),
    )


def tables(planes: Planes) -> tuple[Array, Array]:
    """Worth (N, I) and charges (N, K, I) as a caller of `decide` would write them."""
    usd, seconds = (a.astype(np.float64) for a in planes.amounts)
    worth = planes.value[:, None] * planes.quality - planes.declared[0] * usd
    worth -= planes.declared[1][:, None] * seconds
    late = np.where((planes.member & 4 > 0)[:, None], (seconds > 2.0) * 1.0, 0.0)
    return worth, np.stack((usd, seconds - SLA, late), axis=1)


def collected(planes: Planes, use: Array) -> tuple[float, Array]:
    """Worth of what was chosen, and the charges of each request, (N, K)."""
    worth, charges = tables(planes)
    served = use >= 0
    at = np.arange(len(use)), np.maximum(use, 0)
    return float(worth[at][served].sum()), np.where(served[:, None], charges[at[0], :, at[1]], 0.0)


def regret(planes: Planes, market: OnlineMarket) -> float:
    """As a share of the offline optimum of the same stream."""
    use = market.decide_batch(planes, rows_of(len(planes)))
    optimum = solve(Memory(planes, rows_of(len(planes)))).objective
    return 1 - collected(planes, use)[0] / optimum


# --- the same by every road -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("given_as", [{"horizon": 700}, {"window": 100, "tolerance": [4.0, 50.0, 20.0]}])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_one_by_one_in_one_batch_and_in_pieces_are_the_same_bits(given_as: Any, dtype: type) -> None:
    planes, rows = stream(700, 1, dtype=dtype), rows_of(700)
    whole, pieces, single = (OnlineMarket(LIMITS, **given_as) for _ in range(3))
    use = whole.decide_batch(planes, rows)
    parts = [pieces.decide_batch(planes.part(lo, lo + 70), rows) for lo in range(0, 700, 70)]
    ones = [single.decide(w, c) for w, c in zip(*tables(planes), strict=True)]
    assert 0 < (use >= 0).mean() < 1
    for other, uses in ((pieces, np.concatenate(parts)), (single, np.array(ones))):
        np.testing.assert_array_equal(use, uses)
        np.testing.assert_array_equal(whole.prices, other.prices)
        assert repr(whole.certificate) == repr(other.certificate)
        np.testing.assert_array_equal(whole.certificate.trajectory.spent, other.certificate.trajectory.spent)


def test_a_run_repeats_itself_bit_for_bit() -> None:
    planes, rows = stream(3000, 2), rows_of(3000)
    first, again = OnlineMarket(LIMITS, horizon=3000), OnlineMarket(LIMITS, horizon=3000)
    for batch in (1, 7):
        uses = [m.decide_batch(planes, rows, batch=batch) for m in (first, again)]
        np.testing.assert_array_equal(*uses)
        np.testing.assert_array_equal(first.prices, again.prices)


def test_the_layout_of_planes_does_not_matter() -> None:
    planes, rows = stream(500, 3), rows_of(500)
    by_use = Planes(
        planes.value,
        np.asfortranarray(planes.quality),
        (np.asfortranarray(planes.amounts[0]), planes.amounts[1].astype(np.float64)),
        planes.declared,
        np.ones(500),
        planes.member,
    )
    uses = [OnlineMarket(LIMITS, horizon=500).decide_batch(p, rows) for p in (planes, by_use)]
    np.testing.assert_array_equal(*uses)


def test_free_of_rows_that_bind_each_request_gets_its_best_use() -> None:
    planes = stream(400, 4)
    use = OnlineMarket(np.full(3, 1e9), horizon=400).decide_batch(planes, rows_of(400))
    worth = np.nan_to_num(tables(planes)[0], nan=-np.inf)
    np.testing.assert_array_equal(use, np.where(worth.max(axis=1) > 0, worth.argmax(axis=1), -1))


def test_units_do_not_matter() -> None:
    worth, charges = tables(stream(500, 5))
    unit = np.array([2.0**10, 2.0**-7, 2.0**3])
    plain, scaled = OnlineMarket(LIMITS, horizon=500), OnlineMarket(LIMITS * unit, horizon=500)
    uses = [
        [m.decide(w * cents, c * u[:, None]) for w, c in zip(worth, charges, strict=True)]
        for m, u, cents in ((plain, np.ones(3), 1.0), (scaled, unit, 128.0))
    ]
    assert uses[0] == uses[1]
    np.testing.assert_allclose(plain.prices, scaled.prices * unit / 128.0, rtol=1e-12)


# --- the guard --------------------------------------------------------------------------------------------------------

amount = st.one_of(st.just(0.0), st.floats(-5.0, 5.0), st.floats(-1e6, 1e6))
worth_of_use = st.one_of(st.just(np.nan), st.just(-np.inf), st.floats(-1e3, 1e3), st.floats(0.0, 10.0))


@st.composite
def adversarial(draw: st.DrawFn) -> tuple[Array, Array, Array, Array]:
    """Worth (N, I), charges (N, K, I), limits and tolerances (K,) that a malicious crowd could send."""
    n, k, i = draw(st.integers(1, 40)), draw(st.integers(1, 3)), draw(st.integers(1, 3))
    worth = draw(st.lists(worth_of_use, min_size=n * i, max_size=n * i))
    charges = draw(st.lists(amount, min_size=n * k * i, max_size=n * k * i))
    limits = draw(st.lists(st.floats(0.0, 3.0), min_size=k, max_size=k))
    tolerance = draw(st.lists(st.floats(0.01, 20.0), min_size=k, max_size=k))
    return np.reshape(worth, (n, i)), np.reshape(charges, (n, k, i)), np.array(limits), np.array(tolerance)


def spending(market: OnlineMarket, worth: Array, charges: Array) -> Array:
    """(N, K) charges of what was chosen."""
    uses = [market.decide(w, c) for w, c in zip(worth, charges, strict=True)]
    return np.array(
        [np.zeros(len(market)) if use < 0 else c[:, use] for use, c in zip(uses, charges, strict=True)]
    )


@given(adversarial(), st.booleans())
@settings(max_examples=150)
def test_with_a_horizon_no_moment_is_over_budget(
    case: tuple[Array, Array, Array, Array], exact: bool
) -> None:
    worth, charges, limits, tolerance = case
    tolerance = tolerance * (not exact)
    market = OnlineMarket(limits, horizon=len(worth), tolerance=tolerance)
    spent = np.cumsum(spending(market, worth, charges), axis=0)
    size = np.abs(charges).sum() + 1
    assert (spent <= limits * len(worth) + tolerance + ROUND_OFF * size).all()
    np.testing.assert_allclose(market.certificate.spent, spent[-1], atol=ROUND_OFF * size)


@given(adversarial(), st.integers(1, 30))
@settings(max_examples=150)
def test_without_one_no_stretch_is_over_its_rate(
    case: tuple[Array, Array, Array, Array], window: int
) -> None:
    worth, charges, limits, tolerance = case
    market = OnlineMarket(limits, window=window, tolerance=tolerance)
    total = np.vstack((np.zeros(limits.size), np.cumsum(spending(market, worth, charges), axis=0)))
    size = np.abs(charges).sum() + 1
    for length in range(1, len(worth) + 1):
        stretch = total[length:] - total[:-length]
        assert (stretch <= limits * length + tolerance + ROUND_OFF * size).all()


@given(adversarial())
@settings(max_examples=50)
def test_what_is_not_allowed_or_not_worth_it_is_never_used(case: tuple[Array, Array, Array, Array]) -> None:
    worth, charges, limits, _ = case
    charges = np.abs(charges)  # nothing is paid for making room
    charges[~(worth[:, None] > -np.inf) & np.ones(charges.shape, dtype=bool)] = np.nan
    market = OnlineMarket(limits, horizon=len(worth))
    for w, c in zip(worth, charges, strict=True):
        use = market.decide(w, c)
        assert use == -1 or w[use] > 0


def test_soft_rows_are_kept_by_prices_alone() -> None:
    n, soft = 20_000, np.array([True, False, True])
    planes = stream(n, 6)
    market = OnlineMarket(LIMITS, horizon=n, hard=soft)
    spent = np.cumsum(collected(planes, market.decide_batch(planes, rows_of(n)))[1], axis=0)
    assert (spent[:, soft] <= LIMITS[soft] * n * (1 + ROUND_OFF)).all()
    assert spent[:, 1].max() > 0  # over for a while, as a hard row never is …
    assert spent[-1, 1] < 0.003 * SLA * n  # … and about met in the end


def test_a_closed_guard_raises_prices() -> None:
    market = OnlineMarket([1.0], horizon=10)
    uses = [market.decide([10.0], [[4.0]]) for _ in range(10)]
    assert uses.count(0) == 2
    assert market.prices[0] > 0
    assert market.certificate.guarded > 0


def test_after_the_horizon_only_what_is_left_may_be_spent() -> None:
    market = OnlineMarket([1.0], horizon=2)
    assert [market.decide([9.0], [[1.0]]) for _ in range(5)].count(0) <= 2
    assert market.certificate.spent[0] <= 2


# --- how well ---------------------------------------------------------------------------------------------------------


def test_regret_falls_with_the_length_of_the_stream() -> None:
    lost = [
        np.mean([regret(stream(n, seed), OnlineMarket(LIMITS, horizon=n)) for seed in range(3)])
        for n in (1_000, 10_000, 100_000)
    ]
    assert lost[0] < 0.05
    assert lost[1] < 0.5 * lost[0]
    assert lost[2] < 0.5 * lost[1]


def test_a_warm_start_helps() -> None:
    n, past = 1_000, stream(20_000, 99)
    start = solve(Memory(past, rows_of(20_000))).multipliers
    cold, warm = (
        np.mean([regret(stream(n, seed), OnlineMarket(LIMITS, horizon=n, **how)) for seed in range(12)])
        for how in ({}, {"start": start})
    )
    assert warm < cold


def test_trusted_prices_ride_out_a_day_that_the_log_has_seen() -> None:
    """Costs swing twofold, as they did in the past: prices that hardly move lose less than ones that follow."""
    n = 20_000
    wave = np.exp(0.7 * np.sin(6 * np.pi * np.arange(n) / n))
    days = [stream(n, seed) for seed in (20, 21)]
    days = [Planes(d.value * wave, d.quality, d.amounts, d.declared, d.weight, d.member) for d in days]
    start = solve(Memory(days[0], rows_of(n))).multipliers
    follows, trusts = (
        regret(days[1], OnlineMarket(LIMITS, horizon=n, start=start, trust=trust)) for trust in (300, n)
    )
    assert trusts < 0.5 * follows


def test_a_tiny_first_charge_sets_no_scale() -> None:
    planes = stream(5_000, 7)
    planes.amounts[1][0] = SLA + 1e-7
    assert regret(planes, OnlineMarket(LIMITS, horizon=5_000)) < 0.02


def test_micro_batches_cost_little() -> None:
    n, planes = 20_000, stream(20_000, 7)
    worths = [
        collected(planes, OnlineMarket(LIMITS, horizon=n).decide_batch(planes, rows_of(n), batch=b))[0]
        for b in (1, 64)
    ]
    assert worths[1] > 0.98 * worths[0]


def test_forgetting_follows_a_shift() -> None:
    """Answers are worth four times as much: a window finds the new prices and keeps the rate; without one it takes longer."""
    n, window, tolerance = 50_000, 2_000, np.array([0.04, SLA, 0.2]) * 2_000
    before, after = stream(n, 8), stream(n, 9, worth=4.0)
    best = solve(Memory(after, rows_of(n))).multipliers
    market = OnlineMarket(LIMITS, window=window, tolerance=tolerance)
    market.decide_batch(before, rows_of(n))
    spent = collected(after, market.decide_batch(after, rows_of(n)))[1]
    assert spent[n // 2 :].mean(axis=0)[0] == pytest.approx(LIMITS[0], rel=0.05)
    found = []
    for length in (window, 100 * n):
        market = OnlineMarket(LIMITS, window=length, tolerance=tolerance)
        market.decide_batch(before, rows_of(n))
        market.decide_batch(after.part(0, window), rows_of(window))
        found.append(market.prices[0])
    assert abs(found[0] - best[0]) < abs(found[1] - best[0])


# --- the certificate --------------------------------------------------------------------------------------------------


def test_the_estimate_covers_the_truth_on_an_exchangeable_stream() -> None:
    n = 20_000
    for seed in range(10):
        planes, market = stream(n, seed), OnlineMarket(LIMITS, horizon=n)
        worth, _ = collected(planes, market.decide_batch(planes, rows_of(n)))
        seen = market.certificate
        true_gap = solve(Memory(planes, rows_of(n))).objective / n - worth / n
        assert seen.objective == pytest.approx(worth / n)
        assert seen.dual == pytest.approx(seen.objective + seen.gap)
        assert true_gap <= seen.gap + 4 * seen.standard_error
        assert seen.gap <= true_gap + 0.02 * seen.objective + 4 * seen.standard_error  # and it says something


def test_the_certificate_counts() -> None:
    planes, market = stream(3_000, 10), OnlineMarket(LIMITS, horizon=3_000)
    use = market.decide_batch(planes, rows_of(3_000))
    seen, (_, spent) = market.certificate, collected(planes, use)
    trail, total = seen.trajectory, np.cumsum(spent, axis=0)
    assert (seen.requests, seen.served) == (3_000, (use >= 0).sum())
    assert trail.requests[-1] == 3_000
    assert len(trail.requests) <= POINTS + 1
    assert (np.diff(trail.requests) > 0).all()
    np.testing.assert_allclose(trail.spent, total[trail.requests - 1], atol=1e-9)
    np.testing.assert_allclose(trail.allowed, trail.requests[:, None] * LIMITS)


def test_a_window_certifies_about_the_last_one() -> None:
    market = OnlineMarket([1.0], window=50)
    for worth in [1.0] * 500 + [3.0] * 500:
        market.decide([worth], [[0.1]])
    seen = market.certificate
    assert seen.objective == pytest.approx(3.0, rel=1e-3)
    assert seen.gap == pytest.approx(0.0, abs=1e-9)


def test_a_single_request_has_no_standard_error() -> None:
    market = OnlineMarket([1.0], horizon=5)
    market.decide([1.0], [[0.5]])
    assert np.isnan(market.certificate.standard_error)


# --- bad input --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("limits", "how", "says"),
    [
        ([1.0, -1.0], {"horizon": 5}, "limit of row 1"),
        ([np.nan], {"horizon": 5}, "limit of row 0"),
        ([[1.0]], {"horizon": 5}, "limit has shape"),
        ([], {"horizon": 5}, "limit has shape"),
        ([1.0], {}, "a horizon, a window, or both"),
        ([1.0], {"horizon": 0}, "horizon must be at least 1"),
        ([1.0], {"window": -3}, "window must be at least 1"),
        ([1.0], {"horizon": 5, "start": [1.0], "trust": 0}, "trust must be at least 1"),
        ([1.0], {"horizon": 5, "start": [1.0, 2.0]}, "start has shape"),
        ([1.0], {"horizon": 5, "start": [np.inf]}, "start of row 0"),
        ([1.0], {"horizon": 5, "tolerance": [-1.0]}, "tolerance of row 0"),
        ([1.0], {"horizon": 5, "hard": [True, True]}, "hard has shape"),
        ([1.0, 0.0], {"window": 5}, "row 1 is hard and has no horizon"),
    ],
)
def test_a_market_that_makes_no_sense_is_refused(limits: Any, how: dict[str, Any], says: str) -> None:
    with pytest.raises(QuantityError, match=says):
        OnlineMarket(limits, **how)


@pytest.mark.parametrize(
    ("worth", "charges", "says"),
    [
        ([1.0, np.inf], [[0.0, 0.0]], "worth of request 1, use 1 is not finite"),
        ([1.0, 2.0], [[0.0, np.nan]], "charge of row 0 of request 1, use 1 is not finite"),
        ([1.0, 2.0], [[-np.inf, 0.0]], "charge of row 0 of request 1, use 0 is not finite"),
        ([1.0, 2.0], [[0.0]], "request 1: worth"),
        (1.0, [[0.0]], "request 1: worth"),
    ],
)
def test_a_bad_request_is_named_and_changes_nothing(worth: Any, charges: Any, says: str) -> None:
    market = OnlineMarket([1.0], horizon=5)
    market.decide([1.0, 2.0], [[0.5, 0.9]])
    before = repr(market.certificate)
    with pytest.raises(QuantityError, match=says):
        market.decide(worth, charges)
    assert repr(market.certificate) == before


def test_a_bad_batch_is_named_and_changes_nothing() -> None:
    rows, market = rows_of(100), OnlineMarket(LIMITS, horizon=100)
    for column, value, says in (
        ("quality", np.inf, "quality of request 42, use 1"),
        ("amount", np.nan, "plane 1 of request 42, use 1"),
        ("value", np.nan, "the value or a declared price of request 42"),
    ):
        planes = stream(100, 11)
        planes.quality[42, 1] = 0.5
        {"quality": planes.quality[:, 1], "amount": planes.amounts[1][:, 1], "value": planes.value}[column][
            42
        ] = value
        with pytest.raises(QuantityError, match=says):
            market.decide_batch(planes, rows)
    with pytest.raises(QuantityError, match="nothing to certify"):
        _ = market.certificate


def test_columns_that_do_not_fit_together_are_refused() -> None:
    rows, market = rows_of(10), OnlineMarket(LIMITS, horizon=10)
    p = stream(10, 14)
    for planes, says in (
        (Planes(p.value[:9], p.quality, p.amounts, p.declared, p.weight, p.member), "value is"),
        (Planes(p.value, p.quality[:, :4], p.amounts, p.declared, p.weight, p.member), "plane 0 is"),
        (Planes(p.value, p.quality, p.amounts, (np.ones(1), np.ones(3)), p.weight, p.member), "declared is"),
        (Planes(p.value, p.quality, p.amounts, p.declared, p.weight, p.member[:3]), "member is"),
        (
            Planes(p.value, p.quality, p.amounts[:1], p.declared[:1], p.weight, p.member),
            "row 1 charges a plane",
        ),
    ):
        with pytest.raises(QuantityError, match=says):
            market.decide_batch(planes, rows)


def test_rows_and_weights_that_a_stream_cannot_have_are_refused() -> None:
    planes, rows = stream(10, 12), rows_of(10)
    market = OnlineMarket(LIMITS, horizon=10)
    equal = Rows(
        rows.plane, rows.level, rows.offset, rows.limits, np.array([False, True, False]), rows.scoped
    )
    heavy = Planes(
        planes.value, planes.quality, planes.amounts, planes.declared, np.full(1, 2.0), planes.member
    )
    with pytest.raises(QuantityError, match="row 1 asks for equality"):
        market.decide_batch(planes, equal)
    with pytest.raises(QuantityError, match="request 0 has a weight"):
        market.decide_batch(heavy, rows)
    with pytest.raises(QuantityError, match="3 rows for a market of 1"):
        OnlineMarket([1.0], horizon=10).decide_batch(planes, rows)
    with pytest.raises(QuantityError, match="batch must be at least 1"):
        market.decide_batch(planes, rows, batch=0)


def test_nothing_is_a_stream_too() -> None:
    assert OnlineMarket(LIMITS, horizon=10).decide_batch(stream(0, 13), rows_of(0)).size == 0
