"""Clearing as a protocol: the operator quotes prices, tenants answer with what they would take, until supply meets demand. [Z-GE] [OP-6]

    Quote(round, prices)  →  tenants, each in its own time  →  Answer(round, amounts)

Nobody shows a utility or a budget. Answers may be late, lost, lumpy or false: a round ends when the operator says so, whoever has
answered by then. A tenant that has not is taken to spend on each resource what it spent in its latest answer; while prices settle
that guess becomes exact. Where supply meets demand the same prices are quoted until everybody has answered them (but nobody is waited for
longer than `patience` rounds), so that what is late delays the market and does not bend it. Otherwise prices move by

    log p_j  ←  log p_j + log(demand_j / supply_j) / ε_j

where ε_j ≥ 1 is how strongly demand is taken to answer a price: doubled when its excess changes sign, lowered while it keeps it. With
budgets and ε = 1 one round finds the prices of Cobb–Douglas tenants; demand under gross substitutes converges (Cole & Fleischer 2008);
elsewhere there is no promise, and the number of rounds is bounded.

`Market` does no input or output: `in_process` drives it with callables, `walras.market.tenants.wire` over sockets.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

import msgspec
import numpy as np
from numpy.typing import NDArray

from walras.errors import QuantityError

FloatArray = NDArray[np.float64]
Status = Literal["going on", "cleared", "out of rounds"]
LEAST_PRICE = 1e-12
"""Of the quotes that a market began with: what nobody wants is nearly free."""
LARGEST_STEP = np.log(8.0)
"""Of a log price in one round."""
MOST_ELASTIC = 4096.0
RELAX = 0.8
"""ε after a round in which the excess keeps its sign."""


class Quote(msgspec.Struct, frozen=True, tag="quote"):
    """Prices that hold for one round."""

    market: str
    round: int
    prices: dict[str, float]
    """USD per unit of each resource."""


class Answer(msgspec.Struct, frozen=True, tag="answer"):
    """What a tenant would take at a quote."""

    market: str
    tenant: str
    round: int
    """Of the quote that is answered."""
    amounts: dict[str, float]
    """Units of each resource; what is left out is 0."""


class Refusal(msgspec.Struct, frozen=True, tag="refusal"):
    """Why an answer does not count, in a sentence."""

    tenant: str
    round: int
    reason: str


@dataclass(slots=True)
class Conduct:
    """How one tenant has answered."""

    answers: int = 0
    late: int = 0
    """Answers to an earlier quote than the one that was out."""
    missing: int = 0
    """Rounds that ended without an answer to their prices."""
    silent: int = 0
    """Of them, those since its latest answer."""
    refused: int = 0
    inconsistent: int = 0
    """Answers with the budget of an earlier one that take more of what had become dearer alone (weak axiom of revealed preference)."""


@dataclass(slots=True)
class _Known:
    """A tenant's latest answer."""

    round: int
    prices: FloatArray
    amounts: FloatArray


@dataclass(frozen=True, slots=True)
class Cleared:
    """How a market ended."""

    status: Status
    prices: dict[str, float]
    demands: dict[str, FloatArray]
    """(G,) of each tenant: its latest answer."""
    excess: FloatArray
    """(G,) relative excess demand at the last quote: demand / supply − 1."""
    error: float
    """Largest relative excess, and largest share of all spending that goes for what is left over."""
    lump: float
    """Largest share of a supply in one tenant's answer: where demand jumps, nothing clears better than by a few of these."""
    stale: int
    """Tenants whose latest answer is not to these prices."""
    rounds: int
    messages: int
    """Quotes sent and answers received."""
    conduct: dict[str, Conduct]


class Market:
    """One market of G resources and its tenants.

    Args:
        supply: units of each resource, > 0.
        prices: the first quote, > 0; 1 each where not given.
        tolerance: of `Cleared.error`.
        rounds: at most so many.
        patience: a tenant that has been silent for more rounds is not waited for; its latest answer stands, and if it never gave one it
            takes nothing.

    Raises:
        QuantityError: naming the resource or tenant: no supply, no tenants, two of one name, a price or tolerance out of range.
    """

    def __init__(
        self,
        name: str,
        supply: Mapping[str, float],
        tenants: Sequence[str],
        *,
        prices: Mapping[str, float] | None = None,
        tolerance: float = 1e-3,
        rounds: int = 400,
        patience: int = 20,
    ) -> None:
        self.name, self.resources = name, tuple(supply)
        self.tolerance, self.most_rounds, self.patience = tolerance, rounds, patience
        self._supply = self._positive(supply, "supply")
        self._log_p = np.log(self._positive(prices or dict.fromkeys(supply, 1.0), "first price"))
        self._least = self._log_p + np.log(LEAST_PRICE)
        if not tenants or len(set(tenants)) != len(tenants):
            raise QuantityError("tenants need names, at least one, and no name twice")
        if not (0 < tolerance < 1 and rounds >= 1 and patience >= 1):
            raise QuantityError(
                f"tolerance {tolerance}, {rounds} rounds, patience {patience}: need one inside (0, 1), and at least 1 of the others"
            )
        self.conduct = {tenant: Conduct() for tenant in tenants}
        self._known: dict[str, _Known] = {}
        self._quoted: list[FloatArray] = []
        self._elastic = np.ones(len(self.resources))
        self._sign = np.zeros(len(self.resources))
        self._messages = 0
        self.status: Status = "going on"
        self._open()

    def _positive(self, numbers: Mapping[str, float], what: str) -> FloatArray:
        found = np.array([numbers.get(resource, np.nan) for resource in self.resources], dtype=np.float64)
        for resource, number in zip(self.resources, found.tolist(), strict=True):
            if not (np.isfinite(number) and number > 0):
                raise QuantityError(
                    f"resource '{resource}': {what} is {number}, and must be finite and above 0"
                )
        if not self.resources or len(numbers) != len(self.resources):
            raise QuantityError(
                f"{what}: one number for each of {', '.join(self.resources) or 'no resources'}"
            )
        return found

    # --- a round ---

    @property
    def round(self) -> int:
        """Of the quote that is out, from 1."""
        return len(self._quoted)

    @property
    def quote(self) -> Quote:
        """The one that is out."""
        prices = dict(zip(self.resources, self._quoted[-1].tolist(), strict=True))
        return Quote(self.name, self.round, prices)

    @property
    def waiting_for(self) -> set[str]:
        """Tenants that have not answered these prices."""
        now = self._quoted[-1]
        return {
            tenant
            for tenant in self.conduct
            if tenant not in self._known or not np.array_equal(self._known[tenant].prices, now)
        }

    def receive(self, answer: Answer) -> Refusal | None:
        """Take an answer to any quote so far; the newest of a tenant counts. Returns why it does not count, if so."""
        self._messages += 1
        reason = self._wrong(answer)
        who = self.conduct.get(answer.tenant)
        if reason is not None:
            if who is not None:
                who.refused += 1
            return Refusal(answer.tenant, answer.round, reason)
        assert who is not None
        amounts = np.array(
            [answer.amounts.get(resource, 0.0) for resource in self.resources], dtype=np.float64
        )
        prices, before = self._quoted[answer.round - 1], self._known.get(answer.tenant)
        who.answers, who.silent = who.answers + 1, 0
        who.late += answer.round < self.round
        if before is not None:
            who.inconsistent += _inconsistent(before, prices, amounts)
        if before is None or before.round <= answer.round:
            self._known[answer.tenant] = _Known(answer.round, prices, amounts)
        return None

    def _wrong(self, answer: Answer) -> str | None:
        """What is wrong with an answer, in a sentence."""
        if answer.market != self.name:
            return f"market '{answer.market}' is not this one, '{self.name}'"
        if answer.tenant not in self.conduct:
            return f"tenant '{answer.tenant}' is not in this market"
        if not 1 <= answer.round <= self.round:
            return f"tenant '{answer.tenant}' answers round {answer.round}; quotes went out for 1 to {self.round}"
        for resource, amount in answer.amounts.items():
            if resource not in self.resources:
                return (
                    f"tenant '{answer.tenant}' asks for '{resource}'; there are {', '.join(self.resources)}"
                )
            if not (np.isfinite(amount) and amount >= 0):
                return (
                    f"tenant '{answer.tenant}' asks for {amount} of '{resource}': amounts are finite and ≥ 0"
                )
        return None

    def close_round(self) -> Status:
        """End the round with the answers there are: clear, or move prices and quote again."""
        if self.status != "going on":
            return self.status
        waiting = self.waiting_for
        for tenant in waiting:
            self.conduct[tenant].missing += 1
            self.conduct[tenant].silent += 1
        demand = self._demand()
        clears = self._error(demand) <= self.tolerance
        if clears and all(self.conduct[tenant].silent > self.patience for tenant in waiting):
            self.status = "cleared"
        elif self.round >= self.most_rounds:
            self.status = "out of rounds"
        else:
            if not clears:
                self._log_p = np.maximum(self._log_p + self._step(demand), self._least)
            self._open()
        return self.status

    def _demand(self) -> FloatArray:
        """(G,) of all tenants at the quote that is out; who has not answered it spends as in its latest answer."""
        now, total, heard = self._quoted[-1], np.zeros(len(self.resources)), len(self._known)
        for known in self._known.values():
            total += known.amounts * (known.prices / now)
        # Those that may still answer are taken to be like those that have.
        coming = sum(
            conduct.silent <= self.patience
            for tenant, conduct in self.conduct.items()
            if tenant not in self._known
        )
        return total * (1 + coming / heard) if heard else self._supply.copy()

    def _step(self, demand: FloatArray) -> FloatArray:
        """(G,) by which log prices move."""
        wanted = np.log(np.maximum(demand, 1e-300) / self._supply)
        sign = np.sign(wanted)
        turned = sign * self._sign < 0
        self._elastic = np.clip(np.where(turned, 2.0, RELAX) * self._elastic, 1.0, MOST_ELASTIC)
        self._sign = sign
        return np.clip(wanted / self._elastic, -LARGEST_STEP, LARGEST_STEP)

    def _open(self) -> None:
        self._quoted.append(np.exp(self._log_p))
        self._messages += len(self.conduct)

    # --- the end ---

    def _error(self, demand: FloatArray) -> float:
        prices = self._quoted[-1]
        over = demand / self._supply - 1
        spent = max(float(prices @ demand), float(prices @ self._supply) * self.tolerance, 1e-300)
        left = prices * np.maximum(self._supply - demand, 0) / spent
        return float(max(over.max(), left.max(), 0.0))

    def result(self) -> Cleared:
        """Where it stands."""
        demand = self._demand()
        largest = [float((known.amounts / self._supply).max()) for known in self._known.values()]
        return Cleared(
            status=self.status,
            prices=self.quote.prices,
            demands={tenant: known.amounts for tenant, known in self._known.items()},
            excess=demand / self._supply - 1,
            error=self._error(demand),
            lump=max(largest, default=0.0),
            stale=len(self.waiting_for),
            rounds=self.round,
            messages=self._messages,
            conduct=self.conduct,
        )


def _inconsistent(before: _Known, prices: FloatArray, amounts: FloatArray) -> bool:
    """Whether each of two answers could have bought the other for less, and neither did (weak axiom, Samuelson 1938)."""
    spent, other = float(prices @ amounts), float(before.prices @ before.amounts)
    slack = 1e-9 * max(spent, other)
    return float(prices @ before.amounts) < spent - slack and float(before.prices @ amounts) < other - slack


Demand = Callable[[Mapping[str, float]], Mapping[str, float]]
"""Prices by resource to amounts by resource."""


@dataclass(slots=True)
class Unreliable:
    """A SIMULATED connection: each answer is lost, or comes rounds later, with these probabilities."""

    lost: float = 0.0
    late: float = 0.0
    most_rounds_late: int = 3
    seed: int = 0
    _random: np.random.Generator = field(init=False)

    def __post_init__(self) -> None:
        self._random = np.random.default_rng(self.seed)

    def delay(self) -> int | None:
        """Rounds until an answer is there; None: never."""
        draw = float(self._random.random())
        if draw < self.lost:
            return None
        return int(self._random.integers(1, self.most_rounds_late + 1)) if draw < self.lost + self.late else 0


def in_process(market: Market, demands: Mapping[str, Demand], network: Unreliable | None = None) -> Cleared:
    """Run a market with callables for tenants, to its end.

    Raises:
        QuantityError: a tenant without a callable.
    """
    missing = sorted(set(market.conduct) - set(demands))
    if missing:
        raise QuantityError(f"tenant '{missing[0]}' has no demand to ask")
    network, under_way = network or Unreliable(), []
    while market.status == "going on":
        quote = market.quote
        for tenant in market.conduct:
            rounds = network.delay()
            if rounds is not None:
                answer = Answer(market.name, tenant, quote.round, dict(demands[tenant](quote.prices)))
                under_way.append((quote.round + rounds, answer))
        for due, answer in under_way:
            if due <= quote.round:
                market.receive(answer)
        under_way = [(due, answer) for due, answer in under_way if due > quote.round]
        market.close_round()
    return market.result()
