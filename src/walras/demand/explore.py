"""Exploring at a price: a choice that is sometimes not the best one, its exact probability, and what that costs.

A router that always takes the use it believes best never finds out that it is wrong. Exploring costs regret, which is
known beforehand at the estimates:  Σ_i p_i·(v_best − v_i)  USD. So it is bought like everything else: at most `cap`
per request, and at most what a `Wallet` holds. What is drawn from is always

    p = floor + (1 − K·floor)·((1 − w)·greedy + w·policy),        K open uses,

with the largest weight w ≤ 1 that the cap pays for. The floor keeps every open use possible, so that any other policy
can be valued from the log later (inverse propensity weights need p > 0); its regret counts against the cap, and where
the cap does not pay for it there is none. The draw takes one number per request, a hash of seed and request id: with
the logged probabilities, anybody can repeat it.
"""

from __future__ import annotations

import hashlib
import math
import threading
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import numpy as np

from walras.equation import DEFER, ROUND_OFF, TIE
from walras.errors import QuantityError
from walras.market.online import compiled
from walras.quantities import BoolArray, IntArray
from walras.risk import FloatArray

TAIL = 6.5
"""Standard errors beyond which an estimate is taken not to lie; the two tails hold 8e-11."""
PANEL = 3.0
"""Width of a panel of the quadrature, in the least standard error that is at work there; errs by 5e-9."""
_NODES, _WEIGHTS = np.polynomial.legendre.leggauss(8)
_SHADE = 1.0 - 1e-12
"""Regret is kept this far under a cap, so that round-off never carries it over."""
_GREEDY, _SOFTMAX, _THOMPSON = 0, 1, 2


@dataclass(frozen=True, slots=True)
class Greedy:
    """The best use; ties are drawn evenly, as in `equation.choose`. With a floor this is ε-greedy."""


@dataclass(frozen=True, slots=True)
class Softmax:
    """p ∝ exp(value/τ), τ in USD > 0: uses that differ by much less than τ are tried alike. ∞ is uniform."""

    temperature: float

    def __post_init__(self) -> None:
        if not self.temperature > 0:
            raise QuantityError(f"the temperature must be > 0 USD, got {self.temperature}; use Greedy for 0")


@dataclass(frozen=True, slots=True)
class Thompson:
    """The probability that a use is the best, if true values are independent N(value, error²) (Thompson 1933)."""


Policy = Greedy | Softmax | Thompson


@dataclass(frozen=True, slots=True)
class Exploration:
    """N draws. K is I uses, and deferring last where it is open."""

    use: IntArray
    """Column drawn, `DEFER` for none, (N,)."""
    propensity: FloatArray
    """Probability of what was drawn, (N,). Log it: without it the outcome cannot be used to value other policies."""
    probability: FloatArray
    """Of every use, (N, K); 0 where not open."""
    regret: FloatArray
    """Expected loss against the best, at the given values, USD, (N,); a tie costs nothing."""
    weight: FloatArray
    """w, the weight of the policy against greedy, (N,); below 1 where the cap or the wallet binds."""
    floored: BoolArray
    """Whether every open use has at least the floor, (N,); False where there is none or it could not be paid."""


class Wallet:
    """USD that may be lost to exploration in a period; what is left over is not carried on. Safe between threads.

    It is charged expected regret. What is lost in fact, at the same values, differs from that by a martingale, so in
    expectation it is never more than the wallet held; and once the wallet is empty every draw is greedy.
    """

    def __init__(
        self,
        usd_per_period: float,
        period_seconds: float = math.inf,
        *,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        if not (math.isfinite(usd_per_period) and usd_per_period >= 0):
            raise QuantityError(f"a wallet holds a finite sum ≥ 0 USD, got {usd_per_period}")
        if not period_seconds > 0:
            raise QuantityError(f"a wallet's period must be > 0 seconds, got {period_seconds}")
        self._usd, self._seconds, self._clock = usd_per_period, period_seconds, clock
        self._left, self._start = usd_per_period, clock()
        self._lock = threading.Lock()

    @property
    def left(self) -> float:
        """USD left in the period."""
        with self._lock:
            return self._renewed()

    def charge(self, spend: Callable[[float], float]) -> None:
        """Call `spend` with what is left, and take what it says it spent; one caller at a time. USD."""
        with self._lock:
            left = self._renewed()
            self._left = max(left - spend(left), 0.0)

    def _renewed(self) -> float:
        periods = math.floor((self._clock() - self._start) / self._seconds)
        if periods > 0:
            self._start += periods * self._seconds
            self._left = self._usd
        return self._left


def uniforms(seed: int, ids: Iterable[str]) -> FloatArray:
    """One number in [0, 1) per request id, (N,): the top 53 of 64 bits of BLAKE2b keyed with the seed.

    The same seed and id always give the same number, on every machine; so a request that is repeated under its id is
    routed alike. Keep the seed secret from whoever chooses ids.

    Raises:
        QuantityError: the seed is not in [0, 2⁶⁴), or `ids` is one text instead of several.
    """
    if not 0 <= seed < 1 << 64:
        raise QuantityError(f"the seed must be in [0, 2⁶⁴), got {seed}")
    if isinstance(ids, str):
        raise QuantityError("ids must be a list of texts, one per request, not one text")
    blank = hashlib.blake2b(digest_size=8, key=seed.to_bytes(8, "big"), person=b"walras.explore")
    bits = []
    for name in ids:
        state = blank.copy()
        state.update(name.encode())
        bits.append(int.from_bytes(state.digest(), "big") >> 11)
    return np.array(bits, dtype=np.float64) * 2.0**-53


def explore(  # noqa: PLR0913 - what is given, then how to draw
    values: FloatArray,
    policy: Policy,
    uniform: FloatArray,
    *,
    errors: FloatArray | None = None,
    greedy: FloatArray | None = None,
    defer: bool = True,
    cap: float = math.inf,
    floor: float = 0.0,
    wallet: Wallet | None = None,
) -> Exploration:
    """Draw one use per request and say how likely it was.

    Args:
        values: net values at prices, (N, I), USD; −∞ where a use is not allowed.
        uniform: from `uniforms`, (N,).
        errors: standard error of each value, (N, I), USD; Thompson needs them. 0 is certain.
        greedy: probabilities of the best uses where a market mixes the tied ones, (N, K); even if not given.
        defer: whether a request may get no use, worth exactly 0.
        cap: most expected regret per request, USD.
        floor: least probability of each open use, deferring included.
        wallet: pays for the requests in order; each may cost what is left after the ones before.

    Raises:
        QuantityError: columns that do not fit together, are NaN or out of range, or a request with nothing open.
    """
    values, uniform = np.atleast_2d(np.asarray(values, np.float64)), np.asarray(uniform, np.float64)
    kind, temperature = _rule(policy, errors)
    errors = np.zeros((0, values.shape[1])) if kind != _THOMPSON else np.asarray(errors, np.float64)
    if uniform.shape != values.shape[:1] or (kind == _THOMPSON and errors.shape != values.shape):
        raise QuantityError(
            f"explore: values have shape {values.shape}, uniform {uniform.shape}, errors {errors.shape}; "
            "there must be one uniform per row and one error per value"
        )
    if greedy is not None and greedy.shape != (values.shape[0], values.shape[1] + defer):
        raise QuantityError(f"explore: greedy has shape {greedy.shape}, values {values.shape}, defer {defer}")
    if not (cap >= 0 and floor >= 0):
        raise QuantityError(f"explore: cap and floor must be ≥ 0, got {cap} and {floor}")
    _refuse(values, errors, uniform, defer, floor)
    n, k = values.shape[0], values.shape[1] + defer
    result = Exploration(
        np.empty(n, np.int64), np.empty(n), np.empty((n, k)), np.empty(n), np.empty(n), np.empty(n, np.bool_)
    )
    columns = (
        result.use,
        result.propensity,
        result.probability,
        result.regret,
        result.weight,
        result.floored,
    )

    mixed = np.zeros((0, k)) if greedy is None else np.ascontiguousarray(greedy, dtype=np.float64)

    def spend(left: float) -> float:
        return _draw_all(values, errors, uniform, mixed, (kind, temperature, cap, floor, left), columns)

    if wallet is None:
        spend(math.inf)
    else:
        wallet.charge(spend)
    return result


def redraw(probability: FloatArray, uniform: FloatArray, *, defer: bool = True) -> IntArray:
    """What a logged draw must have been, (N,): the audit of `Exploration.use` from (N, K) and `uniforms`."""
    drawn = np.array([_pick(row, u) for row, u in zip(probability, uniform, strict=True)], dtype=np.int64)
    return np.where(drawn == probability.shape[1] - 1, DEFER, drawn) if defer else drawn


def _rule(policy: Policy, errors: FloatArray | None) -> tuple[int, float]:
    match policy:
        case Greedy():
            return _GREEDY, 1.0
        case Softmax(temperature):
            return _SOFTMAX, temperature
        case Thompson():
            if errors is None:
                raise QuantityError("Thompson sampling needs the standard error of each value: pass errors")
            return _THOMPSON, 1.0


def _refuse(values: FloatArray, errors: FloatArray, uniform: FloatArray, defer: bool, floor: float) -> None:
    row, fault = _first_fault(values, errors, uniform, defer, floor)
    if fault:
        says = (
            "a value is NaN or +∞; a use that is not allowed is −∞",
            "an error is not finite or below 0",
            "no use is open and it may not defer",
            f"a floor of {floor:g} for each open use sums to more than 1",
            "the uniform number is not in [0, 1)",
        )[fault - 1]
        raise QuantityError(f"explore: request {row}: {says}")


@compiled
def _first_fault(
    values: FloatArray, errors: FloatArray, uniform: FloatArray, defer: bool, floor: float
) -> tuple[int, int]:
    for n in range(values.shape[0]):
        k = 1 if defer else 0
        for i in range(values.shape[1]):
            if not values[n, i] < np.inf:
                return n, 1
            if values[n, i] > -np.inf:
                k += 1
                if errors.shape[0] and not 0.0 <= errors[n, i] < np.inf:
                    return n, 2
        if k == 0:
            return n, 3
        if k * floor > 1.0:
            return n, 4
        if not 0.0 <= uniform[n] < 1.0:
            return n, 5
    return 0, 0


@compiled
def _draw_all(
    values: FloatArray,
    errors: FloatArray,
    uniform: FloatArray,
    mixed: FloatArray,
    rules: tuple[int, float, float, float, float],
    columns: tuple[IntArray, FloatArray, FloatArray, FloatArray, FloatArray, BoolArray],
) -> float:
    """Fill the columns of an `Exploration`, row by row; returns the regret charged, USD."""
    kind, temperature, cap, floor, left = rules
    use, propensity, probability, regret, weight, floored = columns
    n_uses, k = values.shape[1], probability.shape[1]
    value, error, greedy, gap = np.zeros(k), np.zeros(k), np.empty(k), np.empty(k)
    spent = 0.0
    for n in range(values.shape[0]):
        value[:n_uses] = values[n]
        p = probability[n]
        _gaps(value, greedy, gap)
        if mixed.shape[0]:
            greedy[:] = mixed[n]
        if kind == _GREEDY:
            p[:] = greedy
        elif kind == _SOFTMAX:
            _soften(gap, temperature, p)
        else:
            error[:n_uses] = errors[n]
            argmax_odds(value, error, p)
        purse = left - spent
        regret[n], weight[n], floored[n] = _afford(p, greedy, gap, floor, min(cap, purse) * _SHADE)
        # A request that takes all there is leaves nothing, not the shade.
        spent = left if weight[n] < 1.0 and purse <= cap else spent + regret[n]
        drawn = _pick(p, uniform[n])
        propensity[n] = p[drawn]
        use[n] = drawn if drawn < n_uses else DEFER
    return spent


@compiled
def _gaps(value: FloatArray, greedy: FloatArray, gap: FloatArray) -> None:
    """Greedy probabilities, and what each use falls short of the best, ∞ where not open; ties as in `choose`."""
    best, largest, least = -np.inf, 0.0, np.inf
    for v in value:
        if v > -np.inf:
            best, largest = max(best, v), max(largest, abs(v))
    for v in value:
        if v > -np.inf and abs(v) > ROUND_OFF * largest:
            least = min(least, abs(v))
    width = TIE * least if least < np.inf else 0.0
    n_tied = 0
    for i, v in enumerate(value):
        tied = v >= best - width
        n_tied += tied
        greedy[i] = 1.0 if tied else 0.0
        gap[i] = 0.0 if tied else best - v
    greedy /= n_tied


@compiled
def _soften(gap: FloatArray, temperature: float, p: FloatArray) -> None:
    for i, g in enumerate(gap):
        p[i] = math.exp(-g / temperature) if g < np.inf else 0.0
    p /= p.sum()


@compiled
def _afford(
    p: FloatArray, greedy: FloatArray, gap: FloatArray, floor: float, room: float
) -> tuple[float, float, bool]:
    """Mix the policy p with greedy and the floor, in place, so as to cost at most `room`: (regret, w, floored)."""
    wanted, everything, k = 0.0, 0.0, 0
    for i, g in enumerate(gap):
        if g < np.inf:
            wanted, everything, k = wanted + p[i] * g, everything + g, k + 1
    floored = floor > 0.0 and floor * everything <= room
    if not floored:
        floor = 0.0
    rest = 1.0 - k * floor
    room -= floor * everything
    w = 1.0 if rest * wanted <= room else room / (rest * wanted)
    regret = 0.0
    for i, g in enumerate(gap):
        if g < np.inf:
            p[i] = floor + rest * ((1.0 - w) * greedy[i] + w * p[i])
            regret += p[i] * g
    return regret, w, floored


@compiled
def _pick(p: FloatArray, uniform: float) -> int:
    """The first use whose cumulated probability exceeds `uniform`."""
    total, last = 0.0, 0
    for i in range(p.size):
        if p[i] > 0.0:
            total, last = total + p[i], i
            if total > uniform:
                break
    return last


@compiled
def argmax_odds(mean: FloatArray, error: FloatArray, odds: FloatArray) -> None:
    """P(k is the largest of independent N(mean, error²)), written to `odds` (K,); −∞ never is. Within 1e-6.

    P(k) = ∫ φ_k(x)·Π_{j≠k} Φ_j(x) dx, for all k at once, by Gauss–Legendre on panels as narrow as the sharpest factor
    that still moves there. Certain values (error 0) bound the integral from below and share evenly what lies under.
    """
    best = mean.max()
    certain, low, n_certain = -np.inf, -np.inf, 0
    top = np.full(mean.size, -np.inf)
    for i in range(mean.size):
        d = mean[i] - best
        odds[i] = 0.0
        if d == -np.inf:
            continue
        if error[i] <= ROUND_OFF * abs(d) + 1e-300:  # below that 1/error overflows
            n_certain = 1 if d > certain else n_certain + (d == certain)
            certain = max(certain, d)
        else:
            top[i] = d + TAIL * error[i]
            low = max(low, d - TAIL * error[i])
    low = max(low, certain)
    below = 1.0  # probability that all uncertain values lie under the certain one
    for i in range(mean.size):
        if top[i] > certain > -np.inf:
            below *= _normal_below((certain - mean[i] + best) / error[i])
    for i in range(mean.size):
        if mean[i] - best == certain > -np.inf and top[i] == -np.inf:
            odds[i] = below / n_certain
    highest = top.max()
    while low < highest:
        low = _add_panel(mean - best, error, top, low, odds)
    odds /= odds.sum()


@compiled
def _add_panel(mean: FloatArray, error: FloatArray, top: FloatArray, low: float, odds: FloatArray) -> float:
    """Add to `odds` what is won in the panel that begins at `low`, and return where it ends.

    What tops out below `low` is under the maximum for certain, so it neither wins here nor makes the panel narrow.
    """
    sharpest = np.inf
    for i in range(mean.size):
        if top[i] > low:
            sharpest = min(sharpest, error[i])
    half = PANEL * sharpest / 2.0
    share = np.empty(mean.size)
    for node in range(_NODES.size):
        x, all_below = low + half * (1.0 + _NODES[node]), half * _WEIGHTS[node]
        for i in range(mean.size):
            if top[i] > low:
                z = (x - mean[i]) / error[i]
                below = _normal_below(z)
                all_below *= below
                share[i] = math.exp(-0.5 * z * z) / (error[i] * math.sqrt(2.0 * math.pi) * below)
        for i in range(mean.size):
            if top[i] > low:
                odds[i] += share[i] * all_below
    return low + 2.0 * half


@compiled
def _normal_below(z: float) -> float:
    return 0.5 * math.erfc(-z * math.sqrt(0.5))
