"""The best menu when users differ in what quality and what time are worth to them. [Z-5] [Z-IR]

With one hidden number, `demand.menu` has the best menu by sorting types. With two, V and a price of delay, no order says which
lies tempt, so the programme holds them all:

    max Σ_t f_t·(x_t·(v_t − c) − u_t)  s.t.  u_t ≥ u_s + (v_t − v_s)·x_s for all t, s (IC),  u_t ≥ 0 (IR),
    v_to = θ_t·q_o − λ_t·L_o,  x_t a lottery over offerings and nothing

(T types, O offerings; the payment is v_t·x_t − u_t). For welfare the rent u leaves the objective and profit ≥ `recover` enters.
Few of the T² constraints bind: rows are added as they are violated, and all are checked at the end. A lottery is nobody's
price list; `demand.few_tiers` looks for tiers below this bound.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy.optimize import linprog
from scipy.sparse import coo_array, csr_array, vstack

from walras.demand.menu import Certificate, Objective, value_of
from walras.demand.offerings import check_columns
from walras.errors import InfeasibleError, NotCleared, QuantityError, RecordError, SettingsError
from walras.quantities import BoolArray, IntArray
from walras.risk import FloatArray

VIOLATION = 1e-9
"""The most a type may gain by a lie: USD, or this share of the largest worth where that is less."""
ROUND_OFF = 1e-12
"""Of the largest worth: utilities that differ by less are equal."""
HOPELESS = -1e3
"""A surplus below which how low it is does not matter, in units of the largest worth; solvers mind such numbers."""
MOST_TYPES = 2_000
NEIGHBOURS, WORST = 8, 3
"""Types near each one whose constraints come first; constraints added for each type, as liar and as model, per round."""


@dataclass(frozen=True, slots=True)
class Grid:
    """Types (V, price of delay) and how likely each is; the price may be 0 throughout, and nothing need be a lattice."""

    value: FloatArray
    """θ, USD per unit of quality, ≥ 0, (T,)."""
    latency_price: FloatArray
    """λ, USD per second, ≥ 0, (T,)."""
    probability: FloatArray
    """≥ 0, sums to 1, (T,)."""

    @classmethod
    def product(
        cls, value: FloatArray, chance: FloatArray, latency_price: FloatArray, latency_chance: FloatArray
    ) -> Grid:
        """Independent V and λ: all pairs, λ running fastest."""
        pairs = np.meshgrid(value, latency_price, indexing="ij")
        return cls(pairs[0].ravel(), pairs[1].ravel(), np.outer(chance, latency_chance).ravel())

    def __post_init__(self) -> None:
        columns = {name: getattr(self, name) for name in ("value", "latency_price", "probability")}
        if not self.value.size:
            raise RecordError("the grid of types has an empty support", hint="give at least one type")
        for name, column in columns.items():
            if column.shape != (self.value.size,):
                raise QuantityError(f"types: {name} has shape {column.shape}, expected {(self.value.size,)}")
            bad = np.flatnonzero(~(np.isfinite(column) & (column >= 0)))
            if bad.size:
                problem = f"{column[bad[0]]} is not finite and ≥ 0"
                raise RecordError(problem, row=int(bad[0]) + 1, field=name)
        total = float(self.probability.sum())
        if abs(total - 1) > 1e-6:
            problem = f"probabilities sum to {total:.9g}, not 1"
            raise RecordError(problem, field="probability", hint="divide each by their sum")
        pairs = np.column_stack((self.value, self.latency_price))
        _, first, which = np.unique(pairs, axis=0, return_index=True, return_inverse=True)
        again = np.flatnonzero(first[which] != np.arange(self.value.size))
        if again.size:
            problem = f"the same type as row {first[which[again[0]]] + 1}"
            raise RecordError(problem, row=int(again[0]) + 1, hint="add up their probabilities in one row")

    def __len__(self) -> int:
        return self.value.size

    def worth(self, quality: FloatArray, seconds: FloatArray) -> FloatArray:
        """θ·q − λ·L, USD, (T, O) for offerings (O,)."""
        worth: FloatArray = np.outer(self.value, quality) - np.outer(self.latency_price, seconds)
        return worth


@dataclass(frozen=True, slots=True)
class Screening:
    """The best menu of lotteries: what each type gets and pays, and how far from the best it could be."""

    types: Grid
    names: tuple[str, ...]
    quality: FloatArray
    seconds: FloatArray
    cost: FloatArray
    objective: Objective
    recover: float
    lottery: FloatArray
    """P(type t gets offering o), (T, O); what is missing to 1 is nothing."""
    utility: FloatArray
    """u_t, USD, (T,): the least that these lotteries allow."""
    certificate: Certificate
    """Of all T² constraints, each computed."""
    bound: float
    """By weak duality no menu exceeds it, whatever the solver's accuracy, USD per request."""
    multiplier: float
    """μ of the cost-recovery row: welfare lost per dollar more to recover. 0 where there is no such row."""
    rows: int
    """IC constraints that the programme needed, of T·(T − 1)."""

    @property
    def payment(self) -> FloatArray:
        """Price of each type's lottery, USD, (T,)."""
        full: FloatArray = (self.types.worth(self.quality, self.seconds) * self.lottery).sum(axis=1)
        return full - self.utility

    @property
    def value(self) -> float:
        """Profit or welfare, USD per request."""
        return value_of(self.objective, self.certificate)

    @property
    def gap(self) -> float:
        """`bound` − `value`: what solving and repairing lost at most, USD per request."""
        return self.bound - self.value

    @property
    def recovery_price(self) -> float:
        """κ = μ/(1 + μ), the weight of profit against welfare; 1 where profit is the objective."""
        return 1.0 if self.objective == "revenue" else self.multiplier / (1 + self.multiplier)


def screen(
    types: Grid,
    quality: FloatArray,
    seconds: FloatArray,
    cost: FloatArray,
    *,
    objective: Objective = "revenue",
    recover: float = 0.0,
    names: Sequence[str] = (),
) -> Screening:
    """The menu of lotteries over offerings that no other beats.

    Args:
        quality, seconds, cost: of each offering, ≥ 0, (O,); cost in USD per request.
        objective: "revenue" for most profit; "welfare" for most welfare with profit ≥ `recover`.
        recover: USD per request.
        names: of the offerings; numbered where not given.

    Raises:
        InfeasibleError: no menu recovers that much; names the most profit possible.
        QuantityError, SettingsError: offerings or dollars that make no sense.
        NotCleared: the solver failed.
    """
    names = tuple(names) or tuple(f"offering {o + 1}" for o in range(quality.size))
    check_columns(names, quality=quality, seconds=seconds, cost=cost)
    if len(types) > MOST_TYPES:
        problem = f"{len(types):,} types that mind delay are too many: every pair of them is a constraint"
        raise QuantityError(f"{problem} (at most {MOST_TYPES:,}; merge types that are alike)")
    if not 0 <= recover < np.inf:
        raise SettingsError(f"{recover} USD to recover", key="recover", hint="finite and ≥ 0")
    programme = _Programme.of(types, quality, seconds, cost, recover if objective == "welfare" else None)
    found = programme.solve()
    if found is None:
        most = screen(types, quality, seconds, cost, names=names).certificate.profit
        raise InfeasibleError(
            f"cost recovery: no menu makes {recover:g} USD per request; the most is {most:.6g}",
            constraint="cost recovery",
            bound=recover,
            least=most,
        )
    lottery, utility, bound, multiplier, rows = found
    lottery, utility = _repair(types, lottery, quality, seconds)
    certificate = certified(types, lottery @ quality, lottery @ seconds, lottery @ cost, utility)
    return Screening(
        types,
        names,
        quality,
        seconds,
        cost,
        objective,
        recover,
        lottery,
        utility,
        certificate,
        bound,
        multiplier,
        rows,
    )


# --- the programme ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Programme:
    """The linear programme in units of the largest worth; columns x (T·O), then E[q] (T), E[L] (T) and u (T)."""

    types: Grid
    quality: FloatArray
    seconds: FloatArray
    surplus: FloatArray
    """v − c, (T, O)."""
    recover: float | None
    """None where profit is the objective."""
    unit: float
    """USD."""

    @classmethod
    def of(
        cls, types: Grid, quality: FloatArray, seconds: FloatArray, cost: FloatArray, recover: float | None
    ) -> _Programme:
        most, longest = float(quality.max()) or 1.0, float(seconds.max()) or 1.0
        unit = largest_worth(types, quality)
        scaled = Grid(types.value * most / unit, types.latency_price * longest / unit, types.probability)
        quality, seconds = quality / most, seconds / longest
        with np.errstate(over="ignore"):
            surplus = np.maximum(scaled.worth(quality, seconds) - cost / unit, HOPELESS)
        return cls(scaled, quality, seconds, surplus, None if recover is None else recover / unit, unit)

    def solve(self) -> tuple[FloatArray, FloatArray, float, float, int] | None:
        """(lottery, u, bound and multiplier in USD, IC rows); None where recovery is infeasible."""
        t, o = self.surplus.shape
        fixed = self._fixed()
        asked = _nearest(self.types)
        while True:
            answer = self._answer(fixed, asked)
            if answer is None:
                return None
            x, mean_q, mean_l, u = np.split(answer.x, [t * o, t * o + t, t * o + 2 * t])
            worth = self.types.worth(mean_q, mean_l)
            gain = u + worth - np.diag(worth) - u[:, None]
            fresh = _worst(gain) & (gain > VIOLATION) & ~asked
            if not fresh.any():
                break
            asked |= fresh
        x = np.maximum(x.reshape(t, o), 0.0)
        duals = np.maximum(-answer.ineqlin.marginals, 0.0)
        bound, mu = self._bound(asked, duals)
        return x / np.maximum(x.sum(axis=1, keepdims=True), 1.0), u, bound * self.unit, mu, int(asked.sum())

    def _fixed(self) -> tuple[FloatArray, csr_array, FloatArray, csr_array]:
        """(objective to minimise, rows other than IC ≤, their bounds, equalities that define E[q] and E[L])."""
        t, o = self.surplus.shape
        i, x = np.arange(t), np.arange(t * o)
        of = np.repeat(i, o)
        f = self.types.probability
        surplus = (f[:, None] * self.surplus).ravel()
        revenue = self.recover is None
        objective = np.concatenate((-surplus, np.zeros(2 * t), f if revenue else np.zeros(t)))
        rows, bounds = _rows(of, x, np.ones(t * o), (t, t * o + 3 * t)), np.ones(t)
        if self.recover is not None:
            profit = np.concatenate((-surplus, np.zeros(2 * t), f))
            rows, bounds = vstack([rows, csr_array(profit[None])]).tocsr(), np.append(bounds, -self.recover)
        means = _rows(
            np.concatenate((of, of + t, np.arange(2 * t))),
            np.concatenate((x, x, t * o + np.arange(2 * t))),
            np.concatenate((np.tile(self.quality, t), np.tile(self.seconds, t), -np.ones(2 * t))),
            (2 * t, t * o + 3 * t),
        )
        return objective, rows, bounds, means

    def _answer(self, fixed: tuple[FloatArray, csr_array, FloatArray, csr_array], asked: BoolArray) -> Any:
        """HiGHS on the rows asked for; None where infeasible."""
        (t, o), types = self.surplus.shape, self.types
        objective, rows, bounds, means = fixed
        liar, model = np.nonzero(asked)
        k, at = np.arange(liar.size), t * o
        truth = _rows(
            np.tile(k, 4),
            np.concatenate((at + model, at + t + model, at + 2 * t + model, at + 2 * t + liar)),
            np.concatenate(
                (
                    types.value[liar] - types.value[model],
                    types.latency_price[model] - types.latency_price[liar],
                    np.ones(k.size),
                    -np.ones(k.size),
                )
            ),
            (k.size, at + 3 * t),
        )
        programme: Any = {
            "A_ub": vstack([rows, truth]).tocsr(),
            "b_ub": np.concatenate((bounds, np.zeros(k.size))),
            "A_eq": means,
            "b_eq": np.zeros(2 * t),
            "method": "highs",
        }
        tight = {"primal_feasibility_tolerance": 1e-10, "dual_feasibility_tolerance": 1e-10}
        answer: Any = linprog(objective, **programme | {"options": tight})
        if answer.status not in (0, 2):  # the repair and the bound also stand on a looser solution
            answer = linprog(objective, **programme)
        if answer.status == 2 and self.recover is not None:
            return None
        if answer.status:
            raise NotCleared(
                f"the menu's linear programme was not solved: {answer.message}", certificate=None
            )
        return answer

    def _bound(self, asked: BoolArray, duals: FloatArray) -> tuple[float, float]:
        """(Lagrangian bound, μ) at multipliers ≥ 0, valid for any such.

        A price below cost may be raised to it: who stays with it or leaves adds to welfare, and no profit is lost. So
        u_t ≤ max_o v_to − c_o may be assumed, and what solver tolerance leaves on u is bounded by that.
        """
        t, f = len(self.types), self.types.probability
        mu, truth = (0.0, duals[t:]) if self.recover is None else (float(duals[t]), duals[t + 1 :])
        on_worth, on_rent = (1.0, 1.0) if self.recover is None else (1 + mu, mu)
        y = np.zeros((t, t))
        y[asked] = truth

        def lies(column: FloatArray) -> FloatArray:
            tempted: FloatArray = y.T @ column - y.sum(axis=0) * column
            return tempted

        reduced = on_worth * f[:, None] * self.surplus
        reduced = reduced - np.outer(lies(self.types.value), self.quality)
        reduced = reduced + np.outer(lies(self.types.latency_price), self.seconds)
        on_u = y.sum(axis=1) - y.sum(axis=0) - on_rent * f
        most = np.maximum(self.surplus.max(axis=1), 0.0)
        bound = np.maximum(reduced.max(axis=1), 0.0).sum() + np.maximum(on_u, 0.0) @ most
        return float(bound - mu * (self.recover or 0.0)), mu


def largest_worth(types: Grid, quality: FloatArray) -> float:
    return float(types.value.max() * quality.max()) or 1.0


def _rows(row: IntArray, column: IntArray, data: FloatArray, shape: tuple[int, int]) -> csr_array:
    matrix: csr_array = coo_array((data, (row, column)), shape=shape).tocsr()
    return matrix


def _nearest(types: Grid) -> BoolArray:
    """Pairs of types near one another, (T, T)."""
    axes = [types.value, types.latency_price]
    spread = [axis / (float(np.ptp(axis)) or 1.0) for axis in axes]
    distance = sum(np.square(axis[:, None] - axis) for axis in spread) + np.diag(np.full(len(types), np.inf))
    near = np.zeros(distance.shape, dtype=np.bool_)
    np.put_along_axis(near, np.argsort(distance, axis=1, kind="stable")[:, :NEIGHBOURS], True, axis=1)
    pairs: BoolArray = (near | near.T) & ~np.eye(len(types), dtype=np.bool_)
    return pairs


def _worst(gain: FloatArray) -> BoolArray:
    """Each type's most tempting lies, and the most tempted of each model, (T, T)."""
    worst = np.zeros(gain.shape, dtype=np.bool_)
    for axis in (0, 1):
        top = np.argsort(-gain, axis=axis, kind="stable").take(np.arange(min(WORST, len(gain))), axis=axis)
        np.put_along_axis(worst, top, True, axis=axis)
    return worst


def _repair(
    types: Grid, lottery: FloatArray, quality: FloatArray, seconds: FloatArray
) -> tuple[FloatArray, FloatArray]:
    """(lottery, u) with the least u that is truthful, and no violation above `VIOLATION` whatever the solver's tolerance.

    The least u is the longest path from nothing through chains of lies. Where round-off in the lotteries closes a cycle
    that gains, chains stop after T steps, and who still gains takes what it envies.
    """
    unit = largest_worth(types, quality)
    worth = types.worth(lottery @ quality, lottery @ seconds)
    own = np.diag(worth)
    u = np.zeros(len(types))
    for _ in range(len(types)):
        longer = np.maximum(u, (u - own + worth).max(axis=1))
        settled = bool((longer - u).max() <= ROUND_OFF * unit)
        u = longer
        if settled:
            break
    offered = u - own + worth
    taken = np.where(
        offered.max(axis=1) - u > VIOLATION / 2 * min(1.0, unit),
        offered.argmax(axis=1),
        np.arange(len(types)),
    )
    return lottery[taken], offered[np.arange(len(types)), taken]


def certified(
    types: Grid, quality: FloatArray, seconds: FloatArray, cost: FloatArray, utility: FloatArray
) -> Certificate:
    """All IC and IR constraints, where type t gets E[q], E[L] at E[c] and keeps `utility`, all (T,)."""
    worth, f = types.worth(quality, seconds), types.probability
    payment = np.diag(worth) - utility
    welfare, rent = float(f @ (np.diag(worth) - cost)), float(f @ utility)
    return Certificate(
        worst_ic_violation=max(0.0, float((worth - payment - utility[:, None]).max())),
        worst_ir_violation=max(0.0, -float(utility.min())),
        information_rent=rent,
        revenue=float(f @ payment),
        profit=welfare - rent,
        welfare=welfare,
    )
