"""Budgets that concurrency cannot overspend: reserve before the call, extend during it, settle after.

An account (a key, a tenant, the whole service) has a budget for each calendar period. In every account and period, at
every moment and to the last nano-USD:

    spent + reserved ≤ budget + overrun        once granted: reserved = settled + released + open

Proof: only `reserve` and `extend` raise the left side, and they refuse what does not fit; `settle` moves from reserved
to spent and `release` lowers it. Nothing awaits between the check and the change, so no other task comes between. A
stream asks before it emits (`metering`), so it never emits what it has not reserved: the overrun is only what an
upstream charged beyond what was metered, and it is counted apart. A budget lowered below what is already granted
grants nothing more; what was granted stands.
"""

from __future__ import annotations

import datetime as dt
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import count
from typing import Literal, Protocol, get_args

import msgspec

from walras.errors import QuantityError, SettingsError, nearest
from walras.ledger.money import Nano

Period = Literal["none", "minute", "hour", "day", "week", "month"]
PERIODS: tuple[Period, ...] = get_args(Period)

_SECOND = 1_000_000_000
_LENGTH = {
    "minute": 60 * _SECOND,
    "hour": 3_600 * _SECOND,
    "day": 86_400 * _SECOND,
    "week": 604_800 * _SECOND,
}
_MONDAY = 4 * _LENGTH["day"]
"""1970-01-05."""
_NEVER = 2**63 - 1
KEPT = 8
"""Periods of an account that are remembered: a clock that jumps finds what it spent there."""


class Reservation(msgspec.Struct, frozen=True):
    """Money set aside in each of `accounts`, in the period in which it was made."""

    id: int
    accounts: tuple[str, ...]
    amount_nano: Nano
    """At first, before any extension."""


@dataclass(frozen=True, slots=True)
class Refused:
    """It did not fit into `account`: of those into which it did not fit, the one that resets last."""

    account: str
    remaining_nano: Nano
    """The least that is left in any of them."""
    resets_at_ns: int | None
    """UNIX time; None: never."""


class Standing(msgspec.Struct, frozen=True):
    """One account in its current period."""

    budget_nano: Nano | None
    """None: unlimited."""
    spent_nano: Nano
    reserved_nano: Nano
    starts_at_ns: int
    resets_at_ns: int | None
    """UNIX time; None: never."""

    @property
    def remaining_nano(self) -> Nano | None:
        """What can still be reserved; None: anything."""
        if self.budget_nano is None:
            return None
        return max(self.budget_nano - self.spent_nano - self.reserved_nano, 0)


@dataclass(frozen=True, slots=True)
class Balance:
    """All of an account's reservations since the start: reserved = settled + released + open [balance]."""

    reserved_nano: Nano
    settled_nano: Nano
    released_nano: Nano
    open_nano: Nano
    """Summed over the open reservations, not derived from the other three."""
    overrun_nano: Nano
    """Charged beyond what was reserved; not part of settled."""


class Escrow(Protocol):
    """Where money is set aside. Every method is atomic, also over several accounts: all of them or none."""

    async def reserve(self, accounts: Sequence[str], amount_nano: Nano, now_ns: int) -> Reservation | Refused:
        """Set `amount_nano` aside in each account."""

    async def extend(self, reservation: Reservation, extra_nano: Nano) -> Refused | None:
        """Set more aside, in the period of the reservation; None when granted.

        Raises:
            QuantityError: it was settled or released.
        """

    async def settle(self, reservation: Reservation, charged_nano: Nano) -> Nano:
        """Spend what was charged, give back the rest; the overrun. A second time does nothing and returns 0."""

    async def release(self, reservation: Reservation) -> None:
        """Give all of it back. A second time does nothing, also after `settle`."""

    async def standing(self, account: str, now_ns: int) -> Standing:
        """What is spent and reserved in the period of `now_ns`."""

    async def standings(self, accounts: Sequence[str], now_ns: int) -> list[Standing]:
        """The same of several at once."""


def period_of(period: Period, at_ns: int) -> tuple[int, int]:
    """[start, end) of the UTC calendar period around a UNIX time, ns; weeks start on Monday."""
    if period == "none":
        return 0, _NEVER
    if period == "month":
        day = dt.datetime.fromtimestamp(at_ns // _SECOND, dt.UTC)
        start = day.replace(day=1, hour=0, minute=0, second=0)
        end = start.replace(year=start.year + start.month // 12, month=start.month % 12 + 1)
        return int(start.timestamp()) * _SECOND, int(end.timestamp()) * _SECOND
    length, shift = _LENGTH[period], _MONDAY if period == "week" else 0
    start_ns = (at_ns - shift) // length * length + shift
    return start_ns, start_ns + length


@dataclass(slots=True)
class _Window:
    """One account in one period. A reservation holds on to its windows, so it settles where it was made."""

    start_ns: int
    end_ns: int
    spent: Nano = 0
    reserved: Nano = 0


@dataclass(slots=True)
class _Account:
    name: str
    budget: Nano | None
    period: Period
    windows: dict[int, _Window]
    """By start."""
    current: _Window | None = None
    reserved: Nano = 0
    settled: Nano = 0
    released: Nano = 0
    overrun: Nano = 0

    def window(self, at_ns: int) -> _Window:
        """The window of a time. None opens before the oldest that is remembered: it may have been spent."""
        now = self.current
        if now is not None and now.start_ns <= at_ns < now.end_ns:
            return now
        start, end = period_of(self.period, at_ns)
        if self.windows and start < (oldest := min(self.windows)):
            start = oldest
        now = self.windows.get(start)
        if now is None:
            now = self.windows[start] = _Window(start, end)
            if len(self.windows) > KEPT:
                del self.windows[min(self.windows)]
        self.current = now
        return now

    def room(self, window: _Window) -> Nano:
        """What can still be reserved; an unlimited account has room for anything."""
        if self.budget is None:
            return _NEVER
        return max(self.budget - window.spent - window.reserved, 0)


_Place = tuple[_Account, _Window]


@dataclass(slots=True)
class _Open:
    places: list[_Place]
    amount: Nano


class LocalEscrow:
    """The escrow of one process, for one event loop: not safe to share between threads.

    An account that was never given a budget is an error, so that a mistyped name cannot spend without limit; give
    None to one that has no limit.
    """

    def __init__(self) -> None:
        self._accounts: dict[str, _Account] = {}
        self._open: dict[int, _Open] = {}
        self._ids = count(1)

    def set_budget(self, account: str, budget_nano: Nano | None, period: Period, now_ns: int) -> None:
        """Open an account, or change its budget; None: unlimited. A new period begins with what the current one has.

        Raises:
            SettingsError: a negative budget or an unknown period.
        """
        if budget_nano is not None and budget_nano < 0:
            raise SettingsError(f"a budget must be at least 0, not {budget_nano}", key=account)
        if period not in PERIODS:
            raise SettingsError(f"'{period}' is no period", key=account, hint=nearest(period, PERIODS))
        own = self._accounts.setdefault(account, _Account(account, budget_nano, period, {}))
        own.budget = budget_nano
        if own.period != period:
            window = own.current = own.window(now_ns)
            window.start_ns, window.end_ns = period_of(period, now_ns)
            own.period, own.windows = period, {window.start_ns: window}

    def load(self, account: str, at_ns: int, spent_nano: Nano) -> None:
        """Add what was spent in the period around `at_ns`: before the start, as the ledger has it for the current period
        and later ones; or, above or below 0, a correction. A period that is no longer remembered is left alone.

        Raises:
            SettingsError: an unknown account.
        """
        window = self._account(account).window(at_ns)
        if window.start_ns <= at_ns:
            window.spent += spent_nano

    async def reserve(self, accounts: Sequence[str], amount_nano: Nano, now_ns: int) -> Reservation | Refused:
        if amount_nano < 0:
            raise QuantityError(f"an amount to reserve must be at least 0, not {amount_nano}")
        names = tuple(dict.fromkeys(accounts))
        places = []
        for name in names:
            own = self._account(name)
            places.append((own, own.window(now_ns)))
        if refused := _take(places, amount_nano):
            return refused
        reservation = Reservation(next(self._ids), names, amount_nano)
        self._open[reservation.id] = _Open(places, amount_nano)
        return reservation

    async def extend(self, reservation: Reservation, extra_nano: Nano) -> Refused | None:
        own = self._open.get(reservation.id)
        if own is None or extra_nano < 0:
            what = "is settled or released" if own is None else f"cannot grow by {extra_nano}"
            raise QuantityError(f"reservation {reservation.id} {what}")
        if refused := _take(own.places, extra_nano):
            return refused
        own.amount += extra_nano
        return None

    async def settle(self, reservation: Reservation, charged_nano: Nano) -> Nano:
        if charged_nano < 0:
            raise QuantityError(f"a charge must be at least 0, not {charged_nano}")
        own = self._open.pop(reservation.id, None)
        if own is None:
            return 0
        settled = min(charged_nano, own.amount)
        for account, window in own.places:
            window.reserved -= own.amount
            window.spent += charged_nano
            account.settled += settled
            account.released += own.amount - settled
            account.overrun += charged_nano - settled
        return charged_nano - settled

    async def release(self, reservation: Reservation) -> None:
        await self.settle(reservation, 0)

    async def standing(self, account: str, now_ns: int) -> Standing:
        (found,) = await self.standings((account,), now_ns)
        return found

    async def standings(self, accounts: Sequence[str], now_ns: int) -> list[Standing]:
        found = []
        for account in accounts:
            own = self._account(account)
            window = own.window(now_ns)
            resets = None if window.end_ns == _NEVER else window.end_ns
            found.append(Standing(own.budget, window.spent, window.reserved, window.start_ns, resets))
        return found

    def balance(self, account: str) -> Balance:
        """The identity of the account's reservations. Takes time proportional to what is open."""
        own = self._account(account)
        held = sum(r.amount for r in self._open.values() if any(a is own for a, _ in r.places))
        return Balance(own.reserved, own.settled, own.released, held, own.overrun)

    def _account(self, name: str) -> _Account:
        own = self._accounts.get(name)
        if own is None:
            raise SettingsError("has no budget: set one, or None for no limit", key=name)
        return own


def _take(places: Sequence[_Place], amount: Nano) -> Refused | None:
    """Reserve in all places, or in none and say which did not fit."""
    for account, window in places:
        if amount > account.room(window):
            return _refused(places, amount)
    for account, window in places:
        window.reserved += amount
        account.reserved += amount
    return None


def _refused(places: Sequence[_Place], amount: Nano) -> Refused:
    short = [(account, window) for account, window in places if amount > account.room(window)]
    account, window = max(short, key=lambda place: place[1].end_ns)
    resets = None if window.end_ns == _NEVER else window.end_ns
    return Refused(account.name, min(a.room(w) for a, w in short), resets)
