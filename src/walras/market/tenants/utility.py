"""What tenants want: demand at prices, its slopes, and the least expenditure that reaches a utility. [Z-GE]

A utility is ordinal. CES and linear ones are measured by what they cost at prices of 1, so that utility = free income /
price index. Every closed form is checked in the tests against a numerical maximiser.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
from scipy.optimize import brentq

from walras.errors import SettingsError, nearest
from walras.quantities import BoolArray
from walras.risk import FloatArray

SAME_WORTH = 1e-12
"""Goods whose weight per price differs by less, relatively, are tied in a linear demand."""
MAX_STEPS = 100
STEP = 1e-6
"""Relative step of the central differences by which a user's demand is differentiated."""

Fault = tuple[str, int | None]
"""What is wrong with a utility, and the good it is wrong about (None: no single one)."""


class Utility(Protocol):
    """What a tenant wants of G goods."""

    def demand(self, p: FloatArray, income: float) -> FloatArray:
        """(G,) units; ∞ of a good that is wanted without end and free."""
        ...

    def slopes(self, p: FloatArray, income: float) -> tuple[FloatArray, FloatArray]:
        """∂demand/∂p at given income, (G, G) one row a good demanded, and ∂demand/∂income, (G,)."""
        ...

    def utility(self, x: FloatArray) -> float: ...

    def expenditure(self, p: FloatArray, u: float) -> float:
        """The least income that reaches utility u; NaN where the utility is not known."""
        ...

    def wanted(self, n_goods: int) -> BoolArray:
        """(G,) goods of which more is better."""
        ...

    def faults(self, n_goods: int) -> Iterator[Fault]: ...


# --- constant elasticity of substitution ------------------------------------------------------------------------


def unit_demand(shares: FloatArray, elasticity: FloatArray, p: FloatArray) -> FloatArray:
    """CES demand per unit of income, (N, G): α_c p_c^(−σ) / Σ_k α_k p_k^(1−σ). Shares (N, G), elasticity (N,)."""
    wanted = shares > 0
    cheapest = np.where(wanted, p, np.inf).min(axis=1, initial=np.inf, keepdims=True)
    if (cheapest > 0).all():
        weight = shares * (cheapest / np.where(wanted, p, 1.0)) ** elasticity[:, None]
        return np.asarray(weight / (weight @ p)[:, None])
    return _with_free_goods(shares, elasticity, p)


def _with_free_goods(shares: FloatArray, elasticity: FloatArray, p: FloatArray) -> FloatArray:
    """`unit_demand` where some good costs nothing: ∞ of those that are bought, unless one is dear and σ = 0."""
    wanted = shares > 0
    free = wanted & (p <= 0)
    leontief = np.where(elasticity == 0, shares @ p, 0.0)[:, None]
    with np.errstate(divide="ignore", invalid="ignore"):
        without_end = np.where(free, np.inf, 0.0)
        kept = np.where(leontief > 0, shares / leontief, without_end)
        plain = unit_demand(shares, elasticity, np.where(p > 0, p, 1.0))
    return np.where(free.any(axis=1, keepdims=True), kept, plain)


def power_mean(values: FloatArray, weights: FloatArray, exponent: float) -> float:
    """(Σ w v^r)^(1/r) for weights that sum to 1; r = 0 the geometric mean, r = −∞ the least value."""
    values, weights = values[weights > 0], weights[weights > 0]
    pivot = float(values.min() if exponent < 0 else values.max())
    if pivot <= 0 or not np.isfinite(pivot) or exponent == -np.inf:
        return pivot
    with np.errstate(divide="ignore"):
        logs = np.log(values / pivot)
    if exponent == 0:
        return pivot * float(np.exp(weights @ logs))
    # Near r = 0 the sum is near 1, and only what it differs by is known well; elsewhere the sum itself is.
    rest = float(weights @ np.expm1(exponent * logs))
    log = np.log1p(rest) if rest > -0.5 else np.log(weights @ np.exp(exponent * logs))
    return pivot * float(np.exp(log / exponent))


@dataclass(frozen=True, slots=True)
class CES:
    """x_c = γ_c + (I − p·γ) α_c p_c^(−σ) / Σ_k α_k p_k^(1−σ). σ = 1: Cobb–Douglas. σ = 0: Leontief.

    An income below p·γ buys the same share of every γ_c: a market that clears there is refused (`clear`).
    """

    shares: FloatArray
    """α, (G,) ≥ 0; only their ratios matter. For Leontief, the units used together."""
    elasticity: float
    """σ ≥ 0 between any two goods."""
    subsistence: FloatArray = field(default_factory=lambda: np.zeros(1))
    """γ, (G,) units bought first (Stone–Geary), or (1,) for the same of each good; utility counts from there."""

    @property
    def weights(self) -> FloatArray:
        weights: FloatArray = np.asarray(self.shares / self.shares.sum())
        return weights

    def committed(self, p: FloatArray) -> float:
        """p·γ, what subsistence costs."""
        return float(np.sum(self.subsistence * p))

    def price_index(self, p: FloatArray) -> float:
        """(Σ α p^(1−σ))^(1/(1−σ)) with α summing to 1: what a unit of utility costs."""
        return power_mean(p, self.weights, 1.0 - self.elasticity)

    def demand(self, p: FloatArray, income: float) -> FloatArray:
        alone = np.array([self.elasticity]), self.subsistence[None], p, np.array([income])
        return np.asarray(ces_demand(self.shares[None], *alone)[0])

    def slopes(self, p: FloatArray, income: float) -> tuple[FloatArray, FloatArray]:
        need, cost = self.subsistence + np.zeros_like(p), self.committed(p)
        if income < cost:
            return -income / cost**2 * np.outer(need, need), need / cost
        sigma, d = self.elasticity, unit_demand(self.shares[None], np.array([self.elasticity]), p)[0]
        free = income - cost
        return -free * (np.diag(sigma * d / p) + (1 - sigma) * np.outer(d, d)) - np.outer(d, need), d

    def utility(self, x: FloatArray) -> float:
        """Least 0 where subsistence is not reached."""
        weights, sigma = self.weights, self.elasticity
        with np.errstate(divide="ignore", invalid="ignore"):
            per_share = np.maximum(x - self.subsistence, 0.0) / weights
        return power_mean(per_share, weights, -np.inf if sigma == 0 else (sigma - 1) / sigma)

    def expenditure(self, p: FloatArray, u: float) -> float:
        return self.committed(p) + u * self.price_index(p)

    def wanted(self, n_goods: int) -> BoolArray:
        return (self.shares > 0) & np.ones(n_goods, dtype=np.bool_)

    def faults(self, n_goods: int) -> Iterator[Fault]:
        yield from _numbers("shares", self.shares, n_goods)
        if not np.any(self.shares > 0):
            yield "all its shares are 0: it wants nothing, so it is satiated at any income", None
        if not (np.isfinite(self.elasticity) and self.elasticity >= 0):
            yield (
                f"the elasticity must be a number ≥ 0, not {self.elasticity}; use Linear for perfect substitutes",
                None,
            )
        if self.subsistence.shape != (1,):
            yield from _numbers("subsistence", self.subsistence, n_goods)
        elif not (np.isfinite(self.subsistence[0]) and self.subsistence[0] >= 0):
            yield "subsistence must be a number ≥ 0", None


def ces_demand(
    shares: FloatArray, elasticity: FloatArray, subsistence: FloatArray, p: FloatArray, income: FloatArray
) -> FloatArray:
    """Demand of N tenants, (N, G). Shares and subsistence (N, G), elasticity and income (N,), p (G,)."""
    need = subsistence + np.zeros_like(shares)
    committed = need @ p
    free = np.maximum(income - committed, 0.0)
    met = np.divide(income, committed, out=np.ones_like(income), where=committed > income)
    unit = unit_demand(shares, elasticity, p)
    # Of a free good everybody takes without end, whatever the income.
    bought = np.where(np.isinf(unit), np.inf, free[:, None] * np.where(np.isinf(unit), 0.0, unit))
    return np.asarray(met[:, None] * need + bought)


def ces_jacobian(
    shares: FloatArray,
    elasticity: FloatArray,
    subsistence: FloatArray,
    endowment: FloatArray,
    p: FloatArray,
) -> FloatArray:
    """∂(Σ_i demand_i)/∂p, (G, G), of N tenants whose incomes are endowment (N, G) @ p."""
    need = subsistence + np.zeros_like(shares)
    income, committed = endowment @ p, need @ p
    free, short = np.maximum(income - committed, 0.0), committed > income
    d = unit_demand(shares, elasticity, p)
    own = -np.diag((free * elasticity) @ d / p) - (d.T * (free * (1 - elasticity))) @ d
    rich = d[~short].T @ (endowment - need)[~short]
    met = need[short] / committed[short, None]
    poor = met.T @ (endowment[short] - (income[short] / committed[short])[:, None] * need[short])
    jacobian: FloatArray = own + rich + poor
    return jacobian


# --- perfect substitutes ----------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Linear:
    """u = Σ w_c x_c. Demand is a set: everything that spends the income on goods of the highest w_c/p_c."""

    weights: FloatArray
    """(G,) ≥ 0, utility per unit."""

    def best(self, p: FloatArray) -> FloatArray:
        """(G,) 1 for the goods of the highest weight per price, free ones before any."""
        with np.errstate(divide="ignore", invalid="ignore"):
            worth = np.where(self.weights > 0, self.weights / p, 0.0)
        best: FloatArray = (worth >= worth.max() * (1 - SAME_WORTH)).astype(np.float64)
        return best

    def demand(self, p: FloatArray, income: float) -> FloatArray:
        """One of the demands: the income in equal parts on the best goods."""
        best = self.best(p)
        with np.errstate(divide="ignore", invalid="ignore"):
            return np.where(best > 0, income / best.sum() / p, 0.0)

    def slopes(self, p: FloatArray, income: float) -> tuple[FloatArray, FloatArray]:
        """Of the demand that `demand` selects."""
        best = self.best(p)
        unit = best / best.sum() / p
        return np.diag(-income * unit / p), unit

    def utility(self, x: FloatArray) -> float:
        return float(self.weights @ x)

    def expenditure(self, p: FloatArray, u: float) -> float:
        some = self.weights > 0
        return u * float((p[some] / self.weights[some]).min())

    def wanted(self, n_goods: int) -> BoolArray:
        return (self.weights > 0) & np.ones(n_goods, dtype=np.bool_)

    def faults(self, n_goods: int) -> Iterator[Fault]:
        yield from _numbers("weights", self.weights, n_goods)
        if not np.any(self.weights > 0):
            yield "all its weights are 0: it wants nothing, so it is satiated at any income", None


# --- quasi-linear -----------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Term:
    """c · x^e of one good: increasing and concave, so c·e > 0 and e < 1."""

    good: int
    coefficient: float
    exponent: float


@dataclass(frozen=True, slots=True)
class QuasiLinear:
    """u = x_money + Σ_j c_j x_j^e_j, x ≥ 0. Where income is short no money is kept and the marginal value of income
    rises above 1/p_money."""

    money: int
    """The good that counts as it is."""
    terms: tuple[Term, ...]

    @classmethod
    def parse(cls, text: str, goods: Sequence[str]) -> QuasiLinear:
        """Read "x1 - (1/8) x2^(-8)". Goods go by name, or as x1, x2, …

        Raises:
            SettingsError: the text is not such a sum.
        """
        return _parse(text, goods)

    @property
    def _arrays(self) -> tuple[list[int], FloatArray, FloatArray]:
        terms = self.terms
        return (
            [t.good for t in terms],
            np.array([t.coefficient for t in terms]),
            np.array([t.exponent for t in terms]),
        )

    def _bundle(self, p: FloatArray, value: float) -> FloatArray:
        """(J,) c e x^(e−1) = value · p_j: what is bought where a unit of income is worth `value`."""
        at, c, e = self._arrays
        bundle: FloatArray = np.exp(np.log(value * p[at] / (c * e)) / (e - 1))
        return bundle

    def _value_of_income(self, p: FloatArray, income: float) -> float:
        """Least value of income, at least 1/p_money, at which the bundle is no dearer than the income."""
        at, c, e = self._arrays
        g, t = 1 / (e - 1), -np.log(p[self.money])
        logs = np.log(p[at]) + g * np.log(p[at] / (c * e)) - np.log(income)
        # log(cost / income) is convex and falling in t = log(value): Newton steps from below never overshoot.
        for _ in range(MAX_STEPS):
            spent = np.exp(logs + g * t)
            with np.errstate(divide="ignore"):
                over = float(np.log(spent.sum()))
            if not over > SAME_WORTH:
                break
            t -= over * spent.sum() / float(g @ spent)
        return float(np.exp(t))

    def demand(self, p: FloatArray, income: float) -> FloatArray:
        x = np.zeros_like(p)
        wanted = self.wanted(p.size)
        if (p[wanted] <= 0).any():
            return np.where(wanted & (p <= 0), np.inf, 0.0)
        if income <= 0:
            return x
        at, _, _ = self._arrays
        value = self._value_of_income(p, income)
        x[at] = self._bundle(p, value)
        if value * p[self.money] <= 1 + SAME_WORTH:  # else the rest of the income is round-off
            x[self.money] = max(0.0, income - float(p @ x)) / p[self.money]
        return x

    def slopes(self, p: FloatArray, income: float) -> tuple[FloatArray, FloatArray]:
        (at, _, e), m, n = self._arrays, self.money, p.size
        x, g = self.demand(p, income), 1 / (e - 1)
        own, by_income = np.zeros((n, n)), np.zeros(n)
        # d ln x_j = g_j (d ln value + d ln p_j), and the budget, or the price of money, says what the value does.
        if x[m] > 0:
            by_value = np.zeros(n)
            by_value[m] = -1 / p[m]
        else:
            spent = p[at] * x[at]
            by_value = np.zeros(n)
            by_value[at] = -(1 + g) * x[at] / (g @ spent)
            by_income[at] = g * x[at] / (g @ spent)
        own[at] = (g * x[at])[:, None] * by_value
        own[at, at] += g * x[at] / p[at]
        if x[m] > 0:
            own[m] = -(x + p @ own) / p[m]
            by_income[m] = 1 / p[m]
        return own, by_income

    def utility(self, x: FloatArray) -> float:
        at, c, e = self._arrays
        with np.errstate(divide="ignore"):
            return float(x[self.money] + c @ np.maximum(x[at], 0.0) ** e)

    def expenditure(self, p: FloatArray, u: float) -> float:
        at, c, e = self._arrays
        if u == -np.inf:
            return 0.0
        if not (e < 0).any() and u <= 0:
            return 0.0

        def over(log: float) -> float:
            return float(c @ self._bundle(p, float(np.exp(log))) ** e) - u

        log = -float(np.log(p[self.money]))
        short = -over(log)
        if short < 0:  # more than is asked even with no money: income is worth more than 1/p_money
            high = log + 1
            while over(high) > 0:
                high += 2
            log = float(brentq(over, log, high, xtol=1e-15, rtol=1e-15))
        bundle = self._bundle(p, float(np.exp(log)))
        return float(p[at] @ bundle + p[self.money] * max(0.0, short))

    def wanted(self, n_goods: int) -> BoolArray:
        wanted = np.zeros(n_goods, dtype=np.bool_)
        wanted[[self.money, *(t.good for t in self.terms)]] = True
        return wanted

    def faults(self, n_goods: int) -> Iterator[Fault]:
        used = [self.money, *(t.good for t in self.terms)]
        if not all(0 <= good < n_goods for good in used):
            yield f"it wants a good beyond the {n_goods} there are", None
            return
        if len(set(used)) < len(used):
            yield "it names a good twice", next(good for good in used if used.count(good) > 1)
        for term in self.terms:
            if not (np.isfinite(term.coefficient) and term.coefficient * term.exponent > 0):
                yield "more of it must be better: coefficient times exponent must be > 0", term.good
            if not term.exponent < 1:
                yield (
                    f"its marginal value must fall: the exponent must be < 1, not {term.exponent}",
                    term.good,
                )


_NUMBER = r"\d+(?:\.\d*)?(?:[eE][+-]?\d+)?|\.\d+(?:[eE][+-]?\d+)?"
_FRACTION = rf"(?:{_NUMBER})(?:\s*/\s*(?:{_NUMBER}))?"
_TERM = re.compile(
    rf"\s*(?P<sign>[+−-])?\s*(?:(?:\(\s*(?P<inside>{_FRACTION})\s*\)|(?P<plain>{_FRACTION}))\s*[*·]?\s*)?"
    rf"(?P<good>[^\W\d]\w*)\s*"
    rf"(?:(?:\^|\*\*)\s*(?:\(\s*(?P<in_exponent>[+−-]?\s*{_FRACTION})\s*\)|(?P<exponent>[+−-]?(?:{_NUMBER}))))?"
    rf"\s*(?=[+−-]|$)"
)


def _parse(text: str, goods: Sequence[str]) -> QuasiLinear:
    known = {f"x{k + 1}": k for k in range(len(goods))} | {name: k for k, name in enumerate(goods)}
    at, terms = 0, []
    while at < len(text.rstrip()):
        found = _TERM.match(text, at)
        if not found:
            raise SettingsError(
                f"'{text[at:].strip()}' cannot be read as a term of a utility",
                hint="write sums like x1 - (1/8) x2^(-8)",
            )
        if found["good"] not in known:
            raise SettingsError(
                f"utility '{text}' names the good '{found['good']}'", hint=nearest(found["good"], known)
            )
        coefficient = _fraction(found["inside"] or found["plain"] or "1")
        exponent = _fraction(found["in_exponent"] or found["exponent"] or "1")
        terms.append(
            Term(known[found["good"]], -coefficient if found["sign"] in ("-", "−") else coefficient, exponent)
        )
        at = found.end()
    money = [t for t in terms if t.exponent == 1]
    if len(money) != 1 or not money[0].coefficient > 0:
        raise SettingsError(
            f"utility '{text}' needs exactly one good that counts as it is, with a coefficient > 0",
            hint="like x1 in x1 - (1/8) x2^(-8)",
        )
    unit = money[0].coefficient
    rest = tuple(Term(t.good, t.coefficient / unit, t.exponent) for t in terms if t is not money[0])
    return QuasiLinear(money[0].good, rest)


def _fraction(text: str) -> float:
    above, _, below = text.replace("−", "-").replace(" ", "").partition("/")
    return float(above) / (float(below) if below else 1.0)


# --- anything else ----------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Demand:
    """A user's own demand function (p (G,), income) → (G,). Its utility is not known, so no utility gap is."""

    function: Callable[[FloatArray, float], FloatArray]

    def demand(self, p: FloatArray, income: float) -> FloatArray:
        return np.asarray(self.function(p, income), dtype=np.float64)

    def slopes(self, p: FloatArray, income: float) -> tuple[FloatArray, FloatArray]:
        """By central differences: about nine digits."""
        own = np.empty((p.size, p.size))
        for k, step in enumerate(STEP * p):
            to = np.zeros_like(p)
            to[k] = step
            own[:, k] = (self.demand(p + to, income) - self.demand(p - to, income)) / (2 * step)
        h = STEP * max(income, np.finfo(float).tiny)
        return own, (self.demand(p, income + h) - self.demand(p, income - h)) / (2 * h)

    def utility(self, x: FloatArray) -> float:  # noqa: ARG002 - it has none to tell
        return np.nan

    def expenditure(self, p: FloatArray, u: float) -> float:  # noqa: ARG002
        return np.nan

    def wanted(self, n_goods: int) -> BoolArray:
        return np.ones(n_goods, dtype=np.bool_)

    def faults(self, n_goods: int) -> Iterator[Fault]:
        """Asked at a few prices: an answer per good, no NaN, nothing negative, income spent, only ratios counting."""
        rng = np.random.default_rng(0)
        for p in (np.full(n_goods, 1 / n_goods), *rng.dirichlet(np.ones(n_goods), 4)):
            x = self.demand(p.copy(), 1.0)
            if x.shape != (n_goods,):
                yield f"its demand has shape {x.shape}, but there are {n_goods} goods", None
                return
            for bad, said in ((~np.isfinite(x), "is not a finite number"), (x < 0, "is negative")):
                if bad.any():
                    good = int(np.argmax(bad))
                    yield f"its demand {said} ({x[good]}) at prices {np.round(p, 3).tolist()}", good
                    return
            if abs(p @ x - 1.0) > 1e-6:
                left, good = 1.0 - float(p @ x), int(np.argmax(x))
                why = "it is satiated" if left > 0 else "it buys more than it can pay"
                yield (
                    f"of an income of 1 it spends {p @ x:.6g}, most on this good: {why}, so Walras' law is broken",
                    good,
                )
                return
            doubled = self.demand(2 * p, 2.0)
            if not np.allclose(doubled, x, rtol=1e-6, atol=1e-9):
                good = int(np.argmax(np.abs(doubled - x)))
                yield (
                    "its demand changes when prices and income double: it must depend on their ratios only",
                    good,
                )
                return


def _numbers(name: str, values: FloatArray, n_goods: int) -> Iterator[Fault]:
    """Not one number ≥ 0 for each good."""
    if values.shape != (n_goods,):
        yield f"{values.size} {name} for {n_goods} goods", None
        return
    for bad, said in ((~np.isfinite(values), "not finite"), (values < 0, "negative")):
        if bad.any():
            good = int(np.argmax(bad))
            yield f"{name} must be numbers ≥ 0, and this one is {said} ({values[good]})", good
