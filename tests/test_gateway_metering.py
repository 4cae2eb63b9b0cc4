"""Metering: bills exact, lengths learned with cuts in them, no token emitted unreserved, and a price that keeps the pace."""

from __future__ import annotations

import asyncio
import datetime as dt
import math
import random
from bisect import bisect_left
from collections.abc import Coroutine
from fractions import Fraction
from typing import Any, TypeVar

import pytest
from hypothesis import given
from hypothesis import strategies as st

from walras.errors import QuantityError
from walras.estimate.price_table import TokenPrice
from walras.gateway.escrow import LocalEscrow, Refused, Standing
from walras.gateway.metering import (
    _EDGES,
    _GROUPS,
    AHEAD,
    GAIN,
    GRACE,
    MOST,
    STEP,
    Call,
    Job,
    Lengths,
    Meter,
    Tariff,
    scarcity,
)

T = TypeVar("T")
DOLLAR = 1_000_000_000
TARIFF = Tariff(input=DOLLAR, output=10 * DOLLAR)


def done(coroutine: Coroutine[Any, Any, T]) -> T:
    return asyncio.run(coroutine)


def meter_with(budget: int | None) -> Meter:
    escrow = LocalEscrow()
    escrow.set_budget("key", budget, "none", 0)
    return Meter(escrow)


async def opened(meter: Meter, job: Job) -> Call:
    call = await meter.open(["key"], job, 0)
    assert isinstance(call, Call), call
    return call


async def expected(meter: Meter, job: Job) -> int:
    """What is set aside for it where money is no object: its mean cost."""
    call = await opened(meter, job)
    await call.release()
    return call.reserved_nano


def job(given_tokens: int = 100, most: int = 4096, *, metered: bool = True, task_class: str = "c") -> Job:
    return Job("m", task_class, TARIFF, given_tokens, most, metered)


# --- tariffs --------------------------------------------------------------------------------------------------------


@given(st.integers(0, 10**11), st.integers(1, 10**11), st.integers(0, 10**7), st.integers(0, 10**7))
def test_a_bill_is_exact_and_rounded_up_once(input_rate: int, output_rate: int, sent: int, got: int) -> None:
    tariff = Tariff(input_rate, output_rate)
    cost = tariff.cost(sent, got)
    assert cost == math.ceil(Fraction(sent * input_rate + got * output_rate, 10**6))
    most = tariff.affordable(cost, sent)
    assert tariff.cost(sent, most) <= cost < tariff.cost(sent, most + 1)


def test_a_tariff_takes_the_dearest_kind_of_each_token() -> None:
    price = TokenPrice("m", dt.date(2026, 1, 1), 3.0, 15.0, 0.3, 20.0, 3.75, "a test")
    assert Tariff.of(price) == Tariff(3_750_000_000, 20_000_000_000)
    cheap = TokenPrice("m", dt.date(2026, 1, 1), 0.0159, 0.0375, 0.01, 0.0375, 0.0159, "a test")
    assert Tariff.of(cheap) == Tariff(15_900_000, 37_500_000), "decimal, not what a float makes of it"


# --- lengths --------------------------------------------------------------------------------------------------------

CASES = st.lists(st.tuples(st.integers(1, 5000), st.booleans()), min_size=1, max_size=60)


def edge(length: int) -> int:
    return _EDGES[bisect_left(_EDGES, length)]


def survival(cases: list[tuple[int, bool]]) -> list[tuple[int, Fraction]]:
    """Kaplan–Meier by its definition: after each length, the product of 1 − ended/at risk, cuts after ends in a tie."""
    curve, left = [], Fraction(1)
    for at in sorted({length for length, _ in cases}):
        at_risk = sum(length >= at for length, _ in cases)
        left *= 1 - Fraction(sum(length == at and ended for length, ended in cases), at_risk)
        curve.append((at, left))
    return [*curve[:-1], (curve[-1][0], Fraction(0))]


@given(CASES, st.sampled_from([0.1, 0.5, 0.8, 0.95]))
def test_quantiles_and_mean_are_kaplan_and_meier_s(cases: list[tuple[int, bool]], level: float) -> None:
    lengths = Lengths(None, guess=256)
    for length, ended in cases:
        lengths.observe(length, ended=ended)
    curve = survival([(edge(256), True), *((edge(length), ended) for length, ended in cases)])
    assert lengths.quantile(level) in {  # either side, where round-off decides
        next(at for at, left in curve if left <= Fraction(1 - level) + slack)
        for slack in (Fraction(-1, 10**6), Fraction(1, 10**6))
    } | ({curve[-1][0]} if level > 1 - 1e-6 else set())
    lefts = [Fraction(1), *(left for _, left in curve)]
    middles = [(at + max((e for e in _EDGES if e < at), default=1)) / 2 for at, _ in curve]
    mean = sum(float(a - b) * m for a, b, m in zip(lefts, lefts[1:], middles, strict=False))
    assert abs(lengths.mean() - mean) <= 1


def test_cuts_do_not_make_long_answers_look_rare() -> None:
    rng = random.Random(3)
    true, learned, naive = [], Lengths(None), Lengths(None)
    for _ in range(1500):
        length, cut = int(rng.lognormvariate(5, 1.2)) + 1, int(rng.expovariate(1 / 300)) + 1
        true.append(length)
        learned.observe(min(length, cut), ended=length <= cut)
        if length <= cut:
            naive.observe(length, ended=True)
    median = sorted(true)[750]
    assert 0.85 * median < learned.quantile(0.5) < 1.25 * median
    assert naive.quantile(0.5) < 0.75 * median


def test_a_new_class_is_like_its_use_until_it_says_otherwise_and_a_change_is_followed() -> None:
    meter = meter_with(None)
    for _ in range(6000):
        meter.learn("m", "short", 20, ended=True)
        meter.learn("other", "c", 4000, ended=True)
    assert done(expected(meter, job(0, task_class="new"))) < TARIFF.cost(0, 100)
    for _ in range(40):
        meter.learn("m", "long", 3000, ended=True)
    assert done(expected(meter, job(0, task_class="long"))) > TARIFF.cost(0, 2000)
    for _ in range(6000):
        meter.learn("m", "short", 900, ended=True)
    assert TARIFF.cost(0, 800) < done(expected(meter, job(0, task_class="short"))) < TARIFF.cost(0, 1000)
    assert done(expected(meter, job(50, 10))) == TARIFF.cost(50, 10), "never beyond the most it may return"


def test_classes_that_clients_make_up_do_not_fill_the_memory() -> None:
    meter = meter_with(None)
    for k in range(_GROUPS + 500):
        meter.learn(f"m{k}", f"class {k}", 100, ended=True)
        meter.learn_tokens(f"m{k}", 4000, 1000)
    assert len(meter._classes) == len(meter._uses) == len(meter._texts) == _GROUPS
    assert done(expected(meter, job(0, task_class="one more"))) < TARIFF.cost(0, 150), (
        "it learns all the same"
    )


def test_tokens_of_a_text_are_learned_and_hardly_exceeded() -> None:
    meter, rng = meter_with(None), random.Random(5)
    assert 1000 < meter.tokens("m", 4000) < 1600, "about three bytes a token before anything is known"
    texts = [(size := rng.randint(300, 9000), round(size * rng.uniform(0.2, 0.3))) for _ in range(800)]
    for size, tokens in texts[:400]:
        meter.learn_tokens("m", size, tokens)
    within = sum(tokens <= meter.tokens("m", size) for size, tokens in texts[400:]) / 400
    assert 0.85 < within <= 1
    assert meter.tokens("m", 8000) < 8000 * 0.33
    meter.learn_tokens("m", 0, 0)
    assert meter.tokens("m", 0) > 0, "a prompt without text still has its fixed tokens"


# --- calls ----------------------------------------------------------------------------------------------------------


@given(
    st.integers(0, 4 * STEP * 10_000),
    st.integers(0, 3000),
    st.integers(1, 3000),
    st.lists(st.integers(1, 2 * STEP), min_size=1, max_size=40),
    st.booleans(),
)
def test_nothing_is_emitted_that_is_not_reserved(
    budget: int, given_tokens: int, most: int, chunks: list[int], metered: bool
) -> None:
    async def stream() -> None:
        meter = meter_with(budget)
        call = await meter.open(["key"], job(given_tokens, most, metered=metered), 0)
        if isinstance(call, Refused):
            assert call.remaining_nano < TARIFF.cost(given_tokens, min(300, most))
            return
        assert call.max_tokens <= most
        assert call.reserved_nano <= budget
        for tokens in chunks:
            before = call.emitted_tokens
            refused = await call.emit(tokens)
            total = before + tokens
            if refused is None:
                assert call.emitted_tokens == total
                ahead = max(total, min(total + AHEAD, call.max_tokens))
                assert call.reserved_nano >= TARIFF.cost(given_tokens, ahead)
            else:
                assert call.emitted_tokens == before
                assert TARIFF.cost(given_tokens, total + AHEAD) > budget, "cut only when no money is left"
                break
        standing = await meter.escrow.standing("key", 0)
        assert standing.reserved_nano == call.reserved_nano <= budget
        assert call.emitted_nano == TARIFF.cost(given_tokens, call.emitted_tokens) <= call.reserved_nano
        assert await call.settle(call.emitted_nano, ended=False) == 0
        standing = await meter.escrow.standing("key", 0)
        assert (standing.spent_nano, standing.reserved_nano) == (call.emitted_nano, 0)

    done(stream())


def test_a_call_grows_by_steps_and_up_to_its_most() -> None:
    async def stream() -> None:
        call = await opened(meter_with(None), job(100, 4 * STEP))
        sizes = {call.reserved_nano}
        for _ in range(4 * STEP):
            assert await call.emit(1) is None
            sizes.add(call.reserved_nano)
        assert 4 <= len(sizes) <= 6
        assert max(sizes) == TARIFF.cost(100, 4 * STEP)
        assert await call.emit(5) is None, "an upstream that ignores the limit is metered, not trusted"
        assert call.reserved_nano == TARIFF.cost(100, 4 * STEP + 5)

    done(stream())


def test_a_short_budget_lowers_max_tokens_and_refuses_a_call_that_would_likely_be_cut() -> None:
    async def calls() -> None:
        meter = meter_with(TARIFF.cost(100, 250))
        for length in (100, 200, 300, 400, 500) * 40:
            meter.learn("m", "c", length, ended=True)
        likely = await opened(meter, job(100, 10))
        assert (likely.max_tokens, likely.reserved_nano) == (10, TARIFF.cost(100, 10))
        await likely.release()
        # The mean, 300, does not fit: all that is left is reserved. But the median must.
        refused = await meter.open(["key"], job(100), 0)
        assert refused == Refused("key", TARIFF.cost(100, 250), None)
        meter.learn("m", "c", 1, ended=True)
        for length in (60, 100, 120) * 60:
            meter.learn("m", "c", length, ended=True)
        for _ in range(60):
            meter.learn("m", "c", 4000, ended=True)
        squeezed = await opened(meter, job(100))
        assert (squeezed.max_tokens, squeezed.reserved_nano) == (250, TARIFF.cost(100, 250))
        for _ in range(25):
            assert await squeezed.emit(10) is None
        assert isinstance(await squeezed.emit(10), Refused)
        assert await squeezed.settle(squeezed.emitted_nano, ended=False) == 0

    done(calls())


def test_what_cannot_be_cut_reserves_all_it_may_cost() -> None:
    async def calls() -> None:
        meter = meter_with(TARIFF.cost(100, 5000))
        whole = await opened(meter, job(100, 4000, metered=False))
        assert whole.reserved_nano == TARIFF.cost(100, 4000)
        less = await opened(meter, job(100, 4000, metered=False))
        assert less.max_tokens == 990, "the input costs as much as ten tokens of output"

    done(calls())


def test_a_call_ends_once() -> None:
    async def calls() -> None:
        meter = meter_with(None)
        before = await expected(meter, job())
        call = await opened(meter, job())
        await call.emit(3)
        await call.release()
        assert await call.settle(9, 4000, ended=True) == 0
        assert await expected(meter, job()) == before, "a call that never was teaches nothing"
        with pytest.raises(QuantityError, match="emits nothing more"):
            await call.emit(5000)
        call = await opened(meter, job())
        assert await call.settle(9, 4000, ended=True) == 0
        learned = await expected(meter, job())
        assert learned > before
        assert await call.settle(9, 4000, ended=True) == 0
        await call.release()
        assert await expected(meter, job()) == learned
        assert (await meter.escrow.standing("key", 0)).spent_nano == 9
        free = await opened(meter, Job("m", "c", Tariff(0, 0), 100, 4096))
        assert await free.emit(10_000) is None
        assert free.reserved_nano == 0

    done(calls())


# --- scarcity -------------------------------------------------------------------------------------------------------

DAY = 86_400 * DOLLAR


def day(spent: int, budget: int | None = 10**6, reserved: int = 0) -> Standing:
    return Standing(budget, spent, reserved, 0, DAY)


def test_money_on_pace_or_unlimited_has_no_price_beyond_itself() -> None:
    assert scarcity(day(10**9, None), DAY // 2) == 0
    assert scarcity(day(500_000), DAY // 2) == 0
    assert scarcity(day(100_000), DAY // 2) == 0
    assert scarcity(day(0), 0) == 0
    assert scarcity(day(10**6), DAY) == 0, "all spent at the very end"
    assert scarcity(day(10**6), DAY // 2) == MOST
    assert scarcity(day(0, 0), DAY // 2) == MOST
    assert scarcity(day(300_000, reserved=400_000), DAY // 2) == scarcity(day(700_000), DAY // 2) > 0


@given(st.integers(0, 10**6), st.integers(0, 10**6), st.integers(-DAY, 2 * DAY), st.integers(0, DAY))
def test_the_price_rises_with_spending_and_falls_with_time(
    spent: int, more: int, now_ns: int, later: int
) -> None:
    price = scarcity(day(spent), now_ns)
    assert 0 <= price <= scarcity(day(min(spent + more, 10**6)), now_ns) <= MOST
    assert scarcity(day(spent), now_ns + later) <= price


def test_a_budget_without_period_is_priced_in_its_last_tenth() -> None:
    price = [scarcity(Standing(1000, spent, 0, 0, None), 10**18) for spent in (0, 900, 950, 990, 1000)]
    assert price == pytest.approx([0, 0, 1, 9, MOST])


def test_the_closed_form_is_mirror_descent_on_the_pace() -> None:
    """ln π by small steps of GAIN·(spent/left − elapsed/remaining) along a random spending path that overspends."""
    rng, steps, log_price, spent = random.Random(7), 200_000, 0.0, 0.0
    for k in range(int(0.6 * steps)):
        bought = rng.random() * 3.2 / steps * (1 - k / steps)
        left, time = 1 - spent, 1 - k / steps
        log_price += GAIN * (bought / (left + GRACE) - 1 / steps / (time + GRACE))
        spent += bought
    standing = day(round(spent * 10**12), 10**12)
    assert math.log1p(scarcity(standing, int(0.6 * DAY))) == pytest.approx(log_price, rel=0.01)
    assert log_price > 0.5


USES = ((0.5, 0.002), (0.65, 0.01), (0.8, 0.04), (0.9, 0.2))
"""Quality and USD of four models."""


def one_day(values: list[float], budget: float, priced: bool) -> tuple[float, float, float]:
    """SIMULATED: requests spread over a day. (Surplus in USD, share of the budget spent, when the first was refused.)"""
    escrow, meant = LocalEscrow(), int(budget * DOLLAR)
    escrow.set_budget("key", meant, "day", 0)

    async def run() -> tuple[float, float, float]:
        surplus, first_refused = 0.0, 1.0
        for k, value in enumerate(values):
            now = k * DAY // len(values)
            mu = scarcity(await escrow.standing("key", now), now) if priced else 0.0
            net, worth, usd = max((value * q - (1 + mu) * c, value * q - c, c) for q, c in USES)
            if net <= 0:
                continue
            got = await escrow.reserve(["key"], int(usd * DOLLAR), now)
            if isinstance(got, Refused):
                first_refused = min(first_refused, k / len(values))
                continue
            await escrow.settle(got, int(usd * DOLLAR))
            surplus += worth
        return surplus, (await escrow.standing("key", DAY - 1)).spent_nano / meant, first_refused

    return done(run())


@pytest.mark.parametrize("short_by", [2, 4, 20])
def test_cheaper_uses_win_before_the_hard_stop(short_by: int) -> None:
    """Priced, a budget several times too small lasts the day and earns nearly what hindsight could; unpriced, it stops."""
    rng = random.Random(11)
    values = [rng.lognormvariate(-0.5, 1) for _ in range(6000)]
    wanted = sum(max((value * q - c, c) for q, c in USES)[1] for value in values)
    budget = wanted / short_by
    bound = min(
        sum(max(0.0, *(value * q - (1 + mu) * c for q, c in USES)) for value in values) + mu * budget
        for mu in (1.25**k - 1 for k in range(40))
    )
    earned, used, stopped = one_day(values, budget, priced=True)
    unpriced, _, early = one_day(values, budget, priced=False)
    assert used > 0.95
    assert stopped > 0.97
    assert early < 1.2 / short_by
    assert earned > 0.93 * bound
    assert earned > 1.1 * unpriced
