"""Silent routing against a published menu when users are strategic: the requests may be real, the users are SIMULATED. [Z-5]

A silent router guesses what a request is worth, V̂(s) = E[V | signal s], and takes argmax_m V̂·q̂_m(x) − ĉ_m. An honest user
sends her prompt and her true signal. A strategic one sends whatever serves her best: any signal level, and any of finitely
many changes of the prompt, run through the same router. A menu asks instead, by its prices.

Shapes: N users with one request each, M models, K ways to send a prompt (the first: as it is), S signal levels, T tiers.
Expectations are the router's own for the true prompt; what is reported comes from the outcomes. USD per request.
"""

from __future__ import annotations

from dataclasses import astuple, dataclass, replace
from typing import Literal

import numpy as np
from scipy.special import ndtr

from walras.errors import QuantityError
from walras.estimate.type_laws import LogNormal
from walras.quantities import BoolArray, IntArray
from walras.risk import FloatArray

Billing = Literal["flat", "cost"]
"""One price a request that recovers the mean cost, or the cost of the model that was chosen."""
Operator = Literal["naive", "recalibrated"]
"""Reads signals as if all were honest, or as the users who send them now."""

SETTLE, ROUNDS = 12, 32
"""Rounds in which a recalibrated operator forgets the ones before; all rounds."""


@dataclass(frozen=True, slots=True)
class Users:
    """SIMULATED: what requests are worth to those who send them, and what they show of it."""

    value: FloatArray
    """V, USD per unit of quality, (N,)."""
    signal: IntArray
    """Level of the true signal, (N,), 0…S − 1."""
    levels: int
    """S."""
    lot: FloatArray
    """Uniform on [0, 1), (N,): where a share α misreports it is those below α, so that the groups are nested."""


def draw_users(law: LogNormal, n: int, *, correlation: float, levels: int, rng: np.random.Generator) -> Users:
    """V from `law`, and a signal whose logarithm is normal and correlated with log V, on equally likely levels.

    Args:
        correlation: of log s and log V, in [0, 1]. The same generator gives the same V and lots at any of them.
    """
    if not 0 <= correlation <= 1 or levels < 1:
        what = (
            f"draw_users: correlation {correlation:g} and {levels} levels; from 0 to 1, and one level or more"
        )
        raise QuantityError(what)
    own, noise = rng.standard_normal((2, n))
    lot = rng.random(n)
    shown = correlation * own + np.sqrt(1 - correlation**2) * noise
    level = np.minimum((ndtr(shown) * levels).astype(np.int64), levels - 1)
    return Users(law.median * np.exp(law.sigma * own), level, levels, lot)


@dataclass(frozen=True, slots=True)
class Population:
    """N requests, what is expected of them, and what came out."""

    users: Users
    expected: FloatArray
    """q̂ of the prompt as it is sent in each way, (N, K, M); [:, 0] of the true prompt."""
    expected_cost: FloatArray
    """ĉ, USD, (N, K, M)."""
    quality: FloatArray
    """What came out, in [0, 1], (N, M). How a prompt was sent is taken not to change the outcome."""
    cost: FloatArray
    """USD, ≥ 0, (N, M)."""

    def __post_init__(self) -> None:
        n, m = self.quality.shape
        shape = (n, *self.expected.shape[1:])
        for name, wanted in (("expected", shape), ("expected_cost", shape), ("cost", (n, m))):
            column: FloatArray = getattr(self, name)
            if column.shape != wanted or column.shape[-1] != m:
                raise QuantityError(f"population: {name} has shape {column.shape}, {n} requests × {m} models")
            if not (np.isfinite(column) & (column >= 0)).all():
                raise QuantityError(f"population: every {name} must be finite and ≥ 0")
        if self.users.value.shape != (n,) or self.users.signal.shape != (n,):
            raise QuantityError(f"population: {self.users.value.size} users for {n} requests; one each")
        if not ((self.users.signal >= 0) & (self.users.signal < self.users.levels)).all():
            raise QuantityError(f"population: every signal must be a level from 0 to {self.users.levels - 1}")


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a mechanism brings. USD per request of the whole population, those not served included."""

    welfare: float
    """V·quality − cost."""
    revenue: float
    profit: float
    regret: float
    """Of honest users: what their best misreport would have added to the utility they expected; NaN without any."""
    honest: float
    """Utility of honest users, V·quality − payment; NaN without any."""
    served: float
    """Share of requests."""
    swing: float = 0.0
    """Largest less smallest welfare of the rounds that this is the mean over; 0 where users and operator settled."""


# --- silent routing -----------------------------------------------------------------------------------------------------


def silent(population: Population, share: float, *, billing: Billing, operator: Operator) -> Outcome:
    """Silent routing when a `share` of the users sends the best report there is.

    A recalibrated operator and its users answer one another in turn, honest reports first. It reads the last reports,
    and where that has not settled after `SETTLE` rounds all reports since: where no pure equilibrium exists, the
    frequencies of such play approach a mixed one (fictitious play, Brown 1951). Then the mean over the last half of
    the rounds is returned, and how much they differ.
    """
    users = population.users
    lies = users.lot < share
    mass, total = heard(users.value, users.signal, np.ones(lies.size), users.levels)
    belief = beliefs(mass, total)
    played: list[Outcome] = []
    for _ in range(1 if operator == "naive" else ROUNDS):
        level, deal = _answer(population, belief, lies, billing)
        played.append(_outcome(population, lies, deal))
        new = heard(users.value, level, deal.present, users.levels)
        kept = len(played) > SETTLE
        mass, total = kept * mass + new[0], kept * total + new[1]
        before, belief = belief, beliefs(mass, total)
        if np.array_equal(before, belief):
            return played[-1]
    return _mean(played[len(played) // 2 :])


def _mean(played: list[Outcome]) -> Outcome:
    mean = Outcome(*np.mean([astuple(outcome) for outcome in played], axis=0).tolist())
    return replace(mean, swing=float(np.ptp([outcome.welfare for outcome in played])))


def heard(
    value: FloatArray, level: IntArray, present: FloatArray, levels: int
) -> tuple[FloatArray, FloatArray]:
    """How many report each level, and the sum of their V, (S,) each; of all users where none came."""
    weight = present if present.any() else np.ones_like(present)
    mass, total = np.zeros((2, levels))
    np.add.at(mass, level, weight)
    np.add.at(total, level, weight * value)
    return mass, total


def beliefs(mass: FloatArray, total: FloatArray) -> FloatArray:
    """E[V | reported level], (S,); E[V] for a level that nobody reports."""
    belief = np.full(mass.size, total.sum() / mass.sum())
    np.divide(total, mass, out=belief, where=mass > 0)
    return belief


def routed(worth: FloatArray, expected: FloatArray, expected_cost: FloatArray) -> IntArray:
    """argmax_m v·q̂_m − ĉ_m for each v of `worth` (S,): shape (…, S) for expectations (…, M). [Z-4]"""
    return np.stack([(v * expected - expected_cost).argmax(axis=-1) for v in worth], axis=-1)


def flat_price(worth: FloatArray, cost: FloatArray) -> tuple[float, FloatArray]:
    """The lowest price at which those who come pay exactly what they cost, and the share of each that comes, (N,).

    A user comes if `worth` (N,), what she expects to get, is at least the price. One who is indifferent may come in
    part: without her the price would be too high for the cost, and with her too low.
    """
    order = np.argsort(-worth, kind="stable")
    ranked, total = worth[order], np.append(0.0, np.cumsum(cost[order]))
    pays = ranked * np.arange(1, worth.size + 1) >= total[1:]
    k = int(np.flatnonzero(pays)[-1]) + 1 if pays.any() else 0
    present = np.zeros(worth.size)
    present[order[:k]] = 1.0
    if k < worth.size and ranked[k] * k >= total[k]:
        price = float(ranked[k])
        present[order[k]] = (price * k - total[k]) / (cost[order[k]] - price)
        return price, present
    return float(total[k] / k), present


def _answer(
    population: Population, belief: FloatArray, lies: BoolArray, billing: Billing
) -> tuple[IntArray, _Deal]:
    """What everybody reports at one belief, (N,), and what follows."""
    users, at = population.users, np.arange(lies.size)
    choice = routed(belief, population.expected, population.expected_cost)
    worth = users.value[:, None] * population.expected[:, 0]
    if billing == "cost":
        worth = worth - population.expected_cost[:, 0]
    way, told = best_report(worth, choice, users.signal)
    best, true = choice[at, way, told], choice[at, 0, users.signal]
    model = np.where(lies, best, true)
    cost, expects = population.cost[at, model], worth[at, model]
    price, payment, present = 0.0, cost, (expects >= 0).astype(np.float64)
    if billing == "flat":
        price, present = flat_price(expects, cost)
        payment = np.full(at.size, price)
    forgone = np.maximum(worth[at, best], price) - np.maximum(worth[at, true], price)
    return np.where(lies, told, users.signal), _Deal(model, payment, present, forgone)


def best_report(worth: FloatArray, choice: IntArray, signal: IntArray) -> tuple[IntArray, IntArray]:
    """The way to send the prompt and the level to report that serve each user best, (N,) each.

    Of equals the smallest lie: the prompt as it is before any change of it, then the level nearest to the true one.

    Args:
        worth: of each model to each user, (N, M).
        choice: model given for each way and level, (N, K, S).
    """
    n, k, s = choice.shape
    got = np.take_along_axis(worth, choice.reshape(n, -1), axis=1)
    lie = np.abs(np.arange(s) - signal[:, None])[:, None, :] + s * np.arange(k)[:, None]
    tied = got >= got.max(axis=1, keepdims=True)
    best = np.where(tied, lie.reshape(n, -1), k * s).argmin(axis=1)
    return best // s, best % s


# --- the menu -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Posted:
    """A menu as users meet it."""

    quality: FloatArray
    """Published, in [0, 1], (T,)."""
    price: FloatArray
    """USD, (T,)."""
    model: IntArray
    """What each tier gives for each way to send the prompt, (N, K, T); the same in all K where nothing can be gamed."""


def published(population: Population, share: float, posted: Posted) -> Outcome:
    """A menu when a `share` of the users sends her prompt as serves her best.

    Users choose a tier, or none, by its published quality and price. A strategic one adds to that quality what a
    changed prompt gains on her own request, q̂ of the model it gets her less q̂ of the one she would have had, and
    chooses tier and prompt together.
    """
    users, tiers = population.users, posted.price.size
    lies, at = users.lot < share, np.arange(users.lot.size)
    own = np.take_along_axis(population.expected[:, :1], posted.model, axis=2)
    utility = users.value[:, None, None] * (posted.quality + (own - own[:, :1])) - posted.price
    utility = utility.reshape(at.size, -1)
    true, best = utility[:, :tiers].argmax(axis=1), utility.argmax(axis=1)
    sent = np.where(lies, best, true)
    way, tier = np.divmod(sent, tiers)
    deal = _Deal(
        model=posted.model[at, way, tier],
        payment=posted.price[tier],
        present=(utility[at, sent] >= 0).astype(np.float64),
        forgone=np.maximum(utility[at, best], 0.0) - np.maximum(utility[at, true], 0.0),
    )
    return _outcome(population, lies, deal)


# --- what it brings -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Deal:
    """What each user gets and pays."""

    model: IntArray
    payment: FloatArray
    """USD if she comes, (N,)."""
    present: FloatArray
    """Share of each user that comes, (N,)."""
    forgone: FloatArray
    """What the best report adds to the expected utility of the true one, USD, (N,)."""


def _outcome(population: Population, lies: BoolArray, deal: _Deal) -> Outcome:
    at = np.arange(lies.size)
    worth = population.users.value * population.quality[at, deal.model]
    cost, present = population.cost[at, deal.model], deal.present
    revenue = float((present * deal.payment).mean())

    def of_honest(column: FloatArray) -> float:
        return float("nan") if lies.all() else float(column[~lies].mean())

    return Outcome(
        welfare=float((present * (worth - cost)).mean()),
        revenue=revenue,
        profit=revenue - float((present * cost).mean()),
        regret=of_honest(deal.forgone),
        honest=of_honest(present * (worth - deal.payment)),
        served=float(present.mean()),
    )


def overtakes(shares: FloatArray, ahead: FloatArray) -> float:
    """The share from which on `ahead` (A,) stays ≥ 0, between two of `shares` in proportion.

    0 where it always is, ∞ where it is not at the last share.
    """
    behind = np.flatnonzero(ahead < 0)
    if not behind.size:
        return float(shares[0])
    i = int(behind[-1])
    if i + 1 == shares.size:
        return float("inf")
    step = ahead[i] / (ahead[i] - ahead[i + 1])
    return float(shares[i] + step * (shares[i + 1] - shares[i]))
