"""Escrow: a stateful machine against sums over every reservation ever made, calendars, refusals, and 256 streams at once."""

from __future__ import annotations

import asyncio
import datetime as dt
import random
from collections.abc import Coroutine
from dataclasses import dataclass, field
from typing import Any, TypeVar

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from walras.errors import QuantityError, SettingsError
from walras.gateway.escrow import (
    KEPT,
    PERIODS,
    Escrow,
    LocalEscrow,
    Period,
    Refused,
    Reservation,
    period_of,
)
from walras.gateway.metering import AHEAD, STEP, Job, Meter, Tariff

T = TypeVar("T")
SECOND = 1_000_000_000
START = int(dt.datetime(2026, 11, 27, 23, 59, 50, tzinfo=dt.UTC).timestamp()) * SECOND
"""A Friday night in the last days of a month."""


def at_once(coroutine: Coroutine[Any, Any, T]) -> T:
    """The result of a coroutine that never waits: nothing can come between its check and its change."""
    try:
        coroutine.send(None)
    except StopIteration as done:
        return done.value  # type: ignore[no-any-return]
    raise AssertionError("it waited")


def granted(got: Reservation | Refused) -> Reservation:
    assert isinstance(got, Reservation), got
    return got


# --- the machine ----------------------------------------------------------------------------------------------------


def begins(period: Period, at_ns: int) -> dt.datetime:
    """Start of the calendar period, by fields of a date."""
    at = dt.datetime.fromtimestamp(at_ns // SECOND, dt.UTC)
    match period:
        case "none":
            return dt.datetime.fromtimestamp(0, dt.UTC)
        case "minute":
            return at.replace(second=0)
        case "hour":
            return at.replace(minute=0, second=0)
        case "day":
            return dt.datetime.combine(at.date(), dt.time(), dt.UTC)
        case "week":
            year, week, _ = at.isocalendar()
            return dt.datetime.combine(dt.date.fromisocalendar(year, week, 1), dt.time(), dt.UTC)
        case "month":
            return dt.datetime(at.year, at.month, 1, tzinfo=dt.UTC)


@dataclass
class Pot:
    """An account's period in the model: what it holds is summed from the log of reservations each time."""

    highest_budget: int | None
    corrected: int = 0


@dataclass
class Account:
    budget: int | None
    period: Period
    pots: dict[dt.datetime, Pot] = field(default_factory=dict)

    def pot(self, now: int) -> Pot:
        start = begins(self.period, now)
        if self.pots:
            start = max(start, min(self.pots))
        pot = self.pots.setdefault(start, Pot(self.budget))
        while len(self.pots) > KEPT:
            del self.pots[min(self.pots)]
        if pot.highest_budget is not None:
            pot.highest_budget = None if self.budget is None else max(pot.highest_budget, self.budget)
        return pot


@dataclass
class Made:
    pots: list[Pot]
    accounts: list[str]
    amount: int
    charged: int | None = None
    """None while it is open."""


NAMES = ("key", "tenant", "global")
AMOUNTS = st.one_of(st.integers(0, 40), st.integers(0, 400))
STEPS = st.sampled_from([1, 9, 60, 3_000, 86_400, 9 * 86_400, 40 * 86_400])


class Machine(RuleBasedStateMachine):
    """Every result and every standing must be what brute-force sums over the whole history say."""

    def __init__(self) -> None:
        super().__init__()
        self.escrow = LocalEscrow()
        self.now = START
        self.accounts: dict[str, Account] = {}
        self.log: list[Made] = []
        self.held: list[tuple[Reservation, Made]] = []
        for name, budget, period in (
            ("key", 100, "minute"),
            ("tenant", 300, "day"),
            ("global", None, "none"),
        ):
            self.escrow.set_budget(name, budget, period, self.now)  # type: ignore[arg-type]
            self.accounts[name] = Account(budget, period)  # type: ignore[arg-type]

    def sums(self, pot: Pot) -> tuple[int, int, int]:
        """(spent, reserved, overrun)."""
        of = [made for made in self.log if any(p is pot for p in made.pots)]
        spent = sum(made.charged for made in of if made.charged is not None)
        overrun = sum(max(made.charged - made.amount, 0) for made in of if made.charged is not None)
        return spent + pot.corrected, sum(made.amount for made in of if made.charged is None), overrun

    def room(self, name: str, pot: Pot) -> float:
        budget = self.accounts[name].budget
        spent, reserved, _ = self.sums(pot)
        return float("inf") if budget is None else max(budget - spent - reserved, 0)

    def expect_refusal(self, refused: Refused, pots: dict[str, Pot], amount: int) -> None:
        short = {name: self.room(name, pot) for name, pot in pots.items() if self.room(name, pot) < amount}
        assert refused.account in short
        assert refused.remaining_nano == min(short.values())

    @rule(names=st.sets(st.sampled_from(NAMES), min_size=1), amount=AMOUNTS)
    def reserve(self, names: set[str], amount: int) -> None:
        order = sorted(names)
        pots = {name: self.accounts[name].pot(self.now) for name in order}
        fits = all(self.room(name, pot) >= amount for name, pot in pots.items())
        got = at_once(self.escrow.reserve(order, amount, self.now))
        assert isinstance(got, Reservation) == fits
        if isinstance(got, Refused):
            self.expect_refusal(got, pots, amount)
            return
        self.log.append(Made(list(pots.values()), order, amount))
        self.held.append((got, self.log[-1]))

    @precondition(lambda self: self.held)
    @rule(which=st.integers(0), extra=AMOUNTS)
    def extend(self, which: int, extra: int) -> None:
        reservation, made = self.held[which % len(self.held)]
        if made.charged is not None:
            with pytest.raises(QuantityError):
                at_once(self.escrow.extend(reservation, extra))
            return
        pots = dict(zip(made.accounts, made.pots, strict=True))
        fits = all(self.room(name, pot) >= extra for name, pot in pots.items())
        refused = at_once(self.escrow.extend(reservation, extra))
        assert (refused is None) == fits
        if refused is None:
            made.amount += extra
        else:
            self.expect_refusal(refused, pots, extra)

    @precondition(lambda self: self.held)
    @rule(which=st.integers(0), charge=st.one_of(st.none(), st.integers(0, 120)))
    def end(self, which: int, charge: int | None) -> None:
        """Settle at a share of the reservation, in %, or release; again, if it is closed already."""
        reservation, made = self.held[which % len(self.held)]
        charged = 0 if charge is None else made.amount * charge // 100
        again = made.charged is not None
        if not again:
            made.charged = charged
        if charge is None:
            at_once(self.escrow.release(reservation))
        else:
            overrun = at_once(self.escrow.settle(reservation, charged))
            assert overrun == (0 if again else max(charged - made.amount, 0))

    @rule(seconds=STEPS, back=st.booleans())
    def clock(self, seconds: int, back: bool) -> None:
        self.now += -seconds * SECOND if back else seconds * SECOND

    @rule(name=st.sampled_from(NAMES), budget=st.one_of(st.none(), st.integers(0, 500)))
    def budget(self, name: str, budget: int | None) -> None:
        account = self.accounts[name]
        self.escrow.set_budget(name, budget, account.period, self.now)
        account.budget = budget

    @rule(name=st.sampled_from(NAMES), period=st.sampled_from(PERIODS))
    def period(self, name: str, period: Period) -> None:
        account = self.accounts[name]
        self.escrow.set_budget(name, account.budget, period, self.now)
        if period != account.period:
            account.pots = {begins(period, self.now): account.pot(self.now)}
            account.period = period

    @rule(name=st.sampled_from(NAMES), back=st.sampled_from([0, 60, 86_400]), spent=st.integers(0, 50))
    def load(self, name: str, back: int, spent: int) -> None:
        account, at = self.accounts[name], self.now - back * SECOND
        self.escrow.load(name, at, spent)
        pot = account.pot(at)
        if min(account.pots) <= begins(account.period, at):
            pot.corrected += spent

    @invariant()
    def agrees(self) -> None:
        for name, account in self.accounts.items():
            pot = account.pot(self.now)
            spent, reserved, overrun = self.sums(pot)
            standing = at_once(self.escrow.standing(name, self.now))
            assert (standing.spent_nano, standing.reserved_nano) == (spent, reserved)
            assert standing.budget_nano == account.budget
            if pot.highest_budget is not None:
                assert spent + reserved <= pot.highest_budget + overrun + pot.corrected
            balance = self.escrow.balance(name)
            assert balance.reserved_nano == balance.settled_nano + balance.released_nano + balance.open_nano
            mine = [made for made in self.log if name in made.accounts]
            assert balance.reserved_nano == sum(made.amount for made in mine)
            assert balance.open_nano == sum(made.amount for made in mine if made.charged is None)
            assert balance.overrun_nano == sum(max((made.charged or 0) - made.amount, 0) for made in mine)


Machine.TestCase.settings = settings(max_examples=120, stateful_step_count=40)
TestMachine = Machine.TestCase


# --- periods --------------------------------------------------------------------------------------------------------


@given(st.sampled_from(PERIODS), st.integers(-(10**9), 8 * 10**9), st.integers(0, SECOND - 1))
def test_a_period_is_the_calendar_s_and_its_end_begins_the_next(
    period: Period, second: int, nano: int
) -> None:
    start, end = period_of(period, second * SECOND + nano)
    assert start == int(begins(period, second * SECOND).timestamp()) * SECOND
    if period != "none":
        assert start <= second * SECOND + nano < end
        assert period_of(period, end - 1) == (start, end)
        assert period_of(period, end)[0] == end


def test_a_reservation_is_charged_to_the_period_it_was_made_in() -> None:
    escrow, midnight = LocalEscrow(), START + 10 * SECOND
    escrow.set_budget("key", 100, "day", START)
    old = granted(at_once(escrow.reserve(["key"], 60, START)))
    new = granted(at_once(escrow.reserve(["key"], 100, midnight)))
    refused = at_once(escrow.extend(old, 41))
    assert isinstance(refused, Refused)
    assert (refused.remaining_nano, refused.resets_at_ns) == (40, midnight)
    assert at_once(escrow.extend(old, 40)) is None
    at_once(escrow.settle(old, 90))
    assert at_once(escrow.standing("key", midnight)).spent_nano == 0
    at_once(escrow.settle(new, 70))
    assert at_once(escrow.standing("key", midnight)).spent_nano == 70
    assert at_once(escrow.standing("key", START)).spent_nano == 90


def test_a_clock_that_jumps_never_opens_a_spent_period_again() -> None:
    escrow, minute = LocalEscrow(), 60 * SECOND
    escrow.set_budget("key", 10, "minute", START)
    for k in range(3 * KEPT):
        at_once(escrow.settle(granted(at_once(escrow.reserve(["key"], 10, START + k * minute))), 10))
    assert len(escrow._accounts["key"].windows) == KEPT, "memory does not grow with time"
    for k in range(-5, 3 * KEPT):
        assert isinstance(at_once(escrow.reserve(["key"], 1, START + k * minute)), Refused)
    assert isinstance(at_once(escrow.reserve(["key"], 10, START + 3 * KEPT * minute)), Reservation)


def test_a_jump_forward_and_back_does_not_lock_the_budget_out() -> None:
    escrow = LocalEscrow()
    escrow.set_budget("key", 10, "day", START)
    at_once(escrow.settle(granted(at_once(escrow.reserve(["key"], 10, START + 400 * 86_400 * SECOND))), 10))
    assert isinstance(at_once(escrow.reserve(["key"], 10, START)), Refused), (
        "older than all that is remembered"
    )
    escrow = LocalEscrow()
    escrow.set_budget("key", 10, "day", START)
    granted(at_once(escrow.reserve(["key"], 4, START)))
    granted(at_once(escrow.reserve(["key"], 10, START + 400 * 86_400 * SECOND)))
    granted(at_once(escrow.reserve(["key"], 6, START)))


# --- refusals and mistakes ------------------------------------------------------------------------------------------


def test_all_accounts_or_none_and_the_refusal_names_the_one_that_resets_last() -> None:
    escrow, names, minute = LocalEscrow(), ["key", "tenant", "global"], 60 * SECOND
    for name, budget, period in zip(names, (5, 7, 50), ("minute", "day", "none"), strict=True):
        escrow.set_budget(name, budget, period, START)  # type: ignore[arg-type]
    early = START - minute
    assert at_once(escrow.reserve(names, 6, early)) == Refused("key", 5, early + 10 * SECOND)
    assert at_once(escrow.reserve(names, 8, early)) == Refused("tenant", 5, START + 10 * SECOND)
    assert at_once(escrow.reserve(names, 51, early)) == Refused("global", 5, None)
    for name in ("key", "tenant", "global"):
        assert at_once(escrow.standing(name, START)).reserved_nano == 0
    granted(at_once(escrow.reserve(["key", "tenant", "key"], 5, START)))
    assert at_once(escrow.standing("key", START)).reserved_nano == 5, "named twice, reserved once"
    granted(at_once(escrow.reserve(["key"], 0, START)))


def test_what_is_free_is_never_refused_and_a_lower_budget_grants_nothing_more() -> None:
    escrow = LocalEscrow()
    escrow.set_budget("key", 10, "none", START)
    held = granted(at_once(escrow.reserve(["key"], 10, START)))
    escrow.set_budget("key", 3, "none", START)
    assert at_once(escrow.settle(held, 12)) == 2
    assert at_once(escrow.standing("key", START)).remaining_nano == 0
    granted(at_once(escrow.reserve(["key"], 0, START)))
    assert at_once(escrow.reserve(["key"], 1, START)) == Refused("key", 0, None)


def test_mistakes_are_named() -> None:
    escrow = LocalEscrow()
    with pytest.raises(SettingsError, match="key:x: has no budget"):
        at_once(escrow.reserve(["key:x"], 1, START))
    with pytest.raises(SettingsError, match="at least 0, not -1"):
        escrow.set_budget("key:x", -1, "day", START)
    with pytest.raises(SettingsError, match="did you mean 'month'"):
        escrow.set_budget("key:x", 1, "months", START)  # type: ignore[arg-type]
    escrow.set_budget("key:x", 9, "day", START)
    with pytest.raises(QuantityError, match="at least 0, not -2"):
        at_once(escrow.reserve(["key:x"], -2, START))
    held = granted(at_once(escrow.reserve(["key:x"], 2, START)))
    with pytest.raises(QuantityError, match="at least 0, not -3"):
        at_once(escrow.settle(held, -3))
    with pytest.raises(QuantityError, match="cannot grow by -1"):
        at_once(escrow.extend(held, -1))
    at_once(escrow.settle(held, 2))
    with pytest.raises(QuantityError, match="settled or released"):
        at_once(escrow.extend(held, 1))


# --- 256 streams at once --------------------------------------------------------------------------------------------

TARIFF = Tariff(input=1_000_000_000, output=10_000_000_000)
LONGEST = 8192
CHUNK = 16


@dataclass
class Tally:
    finished: int = 0
    cut: int = 0
    refused: int = 0
    disconnected: int = 0
    failed: int = 0
    billed: int = 0
    """By the simulated upstream, nano-USD."""


class Streams:
    """SIMULATED clients, 256 at a time, whose answers are lognormal in length; some leave, some upstreams fail.

    When it is cut or left, the upstream has made up to `AHEAD` tokens more, and bills them.
    """

    def __init__(self, requests: int, short_by: float, seed: int) -> None:
        rng = random.Random(seed)
        self.rng = random.Random(seed + 1)
        self.asked = [
            (rng.randint(50, 2000), min(int(rng.lognormvariate(5, 1.3)) + 1, LONGEST))
            for _ in range(requests)
        ]
        self.budget = int(sum(TARIFF.cost(*each) for each in self.asked) / short_by)
        self.escrow = LocalEscrow()
        self.escrow.set_budget("tenant", self.budget, "day", START)
        self.escrow.set_budget("global", None, "none", START)
        self.meter = Meter(self.escrow)
        self.tally = Tally()
        self.most = 0

    def watch(self) -> None:
        standing = at_once(self.escrow.standing("tenant", START))
        self.most = max(self.most, standing.spent_nano + standing.reserved_nano)

    async def metered(self, prompt: int, length: int) -> None:
        call = await self.meter.open(("tenant", "global"), Job("m", "c", TARIFF, prompt, LONGEST), START)
        if isinstance(call, Refused):
            self.tally.refused += 1
            return
        if self.rng.random() < 0.05:
            self.tally.failed += 1
            await call.release()
            return
        length = min(length, call.max_tokens)
        leaves = self.rng.randrange(length) if self.rng.random() < 0.1 else length
        made, early = 0, False
        while made < length and not early:
            step = min(CHUNK, length - made)
            if made >= leaves:
                self.tally.disconnected += 1
                early = True
            elif await call.emit(step):
                self.tally.cut += 1
                early = True
            else:
                made += step
                for _ in range(self.rng.randrange(3)):
                    await asyncio.sleep(0)
        self.tally.finished += not early
        made = min(length, made + self.rng.randint(0, AHEAD)) if early else made
        self.tally.billed += (bill := TARIFF.cost(prompt, made))
        assert await call.settle(bill, made, ended=not early and length < call.max_tokens) == 0
        assert await call.settle(bill, made, ended=True) == 0

    async def reserve_max(self, prompt: int, length: int) -> None:
        """What gateways do that never overspend: set aside the price of the longest answer."""
        got = await self.escrow.reserve(["tenant"], TARIFF.cost(prompt, LONGEST), START)
        if isinstance(got, Refused):
            self.tally.refused += 1
            return
        for _ in range(length // CHUNK):
            await asyncio.sleep(0)
        self.tally.finished += 1
        await self.escrow.settle(got, TARIFF.cost(prompt, length))

    async def run(self, metered: bool) -> float:
        """Share of the budget that was spent."""
        waiting = iter(self.asked)

        async def client() -> None:
            for prompt, length in waiting:
                await (self.metered if metered else self.reserve_max)(prompt, length)
                self.watch()
                await asyncio.sleep(0)

        await asyncio.gather(*(client() for _ in range(256)))
        return at_once(self.escrow.standing("tenant", START)).spent_nano / self.budget


@pytest.mark.parametrize(("requests", "short_by", "seed"), [(1500, 1.5, 1), (600, 1.3, 2), (3000, 4.0, 3)])
def test_256_streams_use_the_budget_and_never_more(requests: int, short_by: float, seed: int) -> None:
    streams = Streams(requests, short_by, seed)
    used = asyncio.run(streams.run(metered=True))
    tally = streams.tally
    assert 0.95 <= used <= 1
    assert streams.most <= streams.budget, "not even by the one metering step that would be allowed"
    assert min(tally.cut, tally.disconnected, tally.failed, tally.finished) > 0
    standing = at_once(streams.escrow.standing("tenant", START))
    assert (standing.spent_nano, standing.reserved_nano) == (tally.billed, 0)
    balance = streams.escrow.balance("tenant")
    assert balance.reserved_nano == balance.settled_nano + balance.released_nano
    assert (balance.settled_nano, balance.open_nano, balance.overrun_nano) == (tally.billed, 0, 0)


@pytest.mark.parametrize("seed", range(4))
def test_256_requests_at_once_and_no_more_to_come_use_the_budget_too(seed: int) -> None:
    """Who reserves more than the mean refuses calls that would have fitted, and nobody comes later to use what is left."""
    streams = Streams(256, 1.4, seed)
    for _, length in Streams(1000, 1.0, 99).asked:
        streams.meter.learn("m", "c", length, ended=True)
    assert asyncio.run(streams.run(metered=True)) > 0.95
    assert streams.most <= streams.budget


def test_to_reserve_the_longest_answer_wastes_most_of_the_budget() -> None:
    ours, theirs = (Streams(1500, 1.5, 1) for _ in range(2))
    used, wasted = asyncio.run(ours.run(metered=True)), asyncio.run(theirs.run(metered=False))
    assert wasted < 0.25
    assert used > 0.95
    assert theirs.tally.finished < ours.tally.finished / 4


def test_an_upstream_that_charges_more_than_was_metered_overruns_by_just_that() -> None:
    escrow: Escrow = LocalEscrow()
    assert isinstance(escrow, LocalEscrow)
    escrow.set_budget("key", TARIFF.cost(100, 10 * STEP), "day", START)
    call = at_once(Meter(escrow).open(["key"], Job("m", "c", TARIFF, 100, LONGEST), START))
    assert not isinstance(call, Refused)
    while at_once(call.emit(CHUNK)) is None:
        pass
    held = at_once(escrow.standing("key", START))
    assert held.remaining_nano is not None
    assert held.remaining_nano < TARIFF.cost(0, CHUNK), "cut only when no money is left"
    assert at_once(call.settle(call.reserved_nano + 77, ended=False)) == 77
    assert escrow.balance("key").overrun_nano == 77
    assert at_once(escrow.standing("key", START)).spent_nano == call.reserved_nano + 77
