"""Try, verify, escalate, stop: the use of several models in turn, priced as optimal search. [Z-1]

Each model is a box (Weitzman 1979): opening it pays its full price, money, delay and risk at the prices that hold, and
puts one answer on the table. A verifier may be paid to pass or fail the answer; it errs. At any time the search may
stop with the answer most likely right, or go on: what continuing is worth at these prices decides, not the next step
alone. Two ways to decide:

- **the index**: each box has a reservation value, known without looking at the others. Opening them in its order is optimal
  for independent boxes that are always looked into. Here outcomes go together (`demand.outcomes`), so every signal moves
  the beliefs about the models not tried yet, and the indices are computed anew after it. A good rule, no longer the best.
- **the dynamic programme**: backwards over all histories of passes and fails, 3^I of them. The best there is under the
  joint law.

Plans use the programme for up to `EXACT_UP_TO` models and the index above. Taking one model unverified, or none, is among
the choices at every step, so under the joint law no plan is worth less than the one-shot choice.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from walras.equation import DEFER, ROUND_OFF, terms
from walras.errors import QuantityError
from walras.estimate.outcomes import Joint
from walras.prices import Prices
from walras.quantities import IntArray, Tasks, Uses
from walras.risk import FloatArray

EXACT_UP_TO = 6
"""Models up to which all 3^I histories are gone through: 729 of them."""
MOST_EXACT = 10
"""Models above which going through all histories is refused: 59,049 of them take seconds."""
DEEPEST = 8
"""Verified answers after which the index takes what it has: plans stay trees that can be stored."""

STOP, TAKE, VERIFY = 0, 1, 2
"""What a node of a plan does: keep the best answer there is (or none); open a model and keep it unread; open and verify."""


# --- what things cost, and what they are worth --------------------------------------------------------------------


def full_prices(tasks: Tasks, uses: Uses, prices: Prices) -> FloatArray:
    """κ = π_C·ΔC + π_L·ΔL + π_R·ΔR of each use in USD, (N, I); ∞ where not allowed. Priced by `equation.terms`."""
    paid = terms(tasks, uses, prices)
    return np.where(uses.allowed, paid.compute + paid.latency + paid.risk, np.inf)


@dataclass(frozen=True, slots=True)
class Verifier:
    """How often a verifier is right: P(pass | right answer) and P(fail | wrong answer)."""

    sensitivity: float
    specificity: float

    def __post_init__(self) -> None:
        for name in ("sensitivity", "specificity"):
            if not 0 <= getattr(self, name) <= 1:
                raise QuantityError(f"verifier: {name} is {getattr(self, name)}; it must lie in [0, 1]")
        if self.sensitivity + self.specificity < 1:
            raise QuantityError(
                f"verifier: sensitivity {self.sensitivity:g} and specificity {self.specificity:g} sum to less than 1: "
                "it passes wrong answers more often than right ones; read its pass as a fail"
            )

    @classmethod
    def accurate(cls, accuracy: float) -> Verifier:
        """Right answers pass and wrong ones fail with the same probability."""
        return cls(accuracy, accuracy)

    @property
    def given_wrong(self) -> float:
        """P(pass | wrong answer)."""
        return 1.0 - self.specificity

    def __str__(self) -> str:
        return f"sensitivity {self.sensitivity:g}, specificity {self.specificity:g}"


@dataclass(frozen=True, slots=True)
class Index:
    """Reservation values, and how each is reached."""

    value: FloatArray
    """z, USD: an answer in hand worth this much makes opening the box a matter of indifference."""
    verify: NDArray[np.bool_]
    """Whether the box is worth more with its answer verified."""


def reservation_index(
    value: FloatArray | float,
    right: FloatArray,
    cost: FloatArray | float,
    verifier: Verifier,
    verifier_cost: FloatArray | float = 0.0,
) -> Index:
    """Weitzman's index z of boxes, in USD: κ = E[(X − z)⁺]. All arguments broadcast.

    A verified answer is worth X = V·P(right | pass) =: a with probability p = P(pass), else V·P(right | fail) =: b ≤ a.
    E[(X − z)⁺] = max(0, p·(a − z), E[X] − z), so z = max(a − κ/p, V·q − κ) with κ = κ_m + κ_v. Left unverified, X = V·q
    is certain and z = V·q − κ_m, never less than the second branch. So z = max(V·q − κ_m, a − (κ_m + κ_v)/p).

    Args:
        value: V, USD per right answer.
        right: P(right) of each box.
        cost: κ_m, full price of opening, USD; ∞ where not allowed.
        verifier_cost: κ_v, full price of verifying, USD.
    """
    p = right * verifier.sensitivity + (1 - right) * verifier.given_wrong
    unread = value * right - cost
    with np.errstate(divide="ignore", invalid="ignore"):
        passed = (value * verifier.sensitivity * right - cost - verifier_cost) / p
    passed = np.where(p > 0, passed, -np.inf)
    verify = passed > unread + ROUND_OFF * np.abs(value)
    return Index(np.where(verify, passed, unread), verify)


# --- beliefs ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Beliefs:
    """Beliefs after any history; one is a status for each model: 0 not tried, 1 passed, 2 failed."""

    weight: FloatArray
    """P(type), (G, K)."""
    signal: FloatArray
    """P(signal | type), 1 where none was seen, (3, I, K)."""
    right: FloatArray
    """P(right | type, signal), (3, I, K)."""

    @classmethod
    def of(cls, joint: Joint, verifier: Verifier, rows: IntArray) -> _Beliefs:
        q = joint.right.T
        hit, miss = q * verifier.sensitivity, (1 - q) * verifier.given_wrong
        passed = hit + miss
        safe = np.where(passed > 0, passed, 1.0), np.where(passed < 1, 1 - passed, 1.0)
        right = np.stack((q, hit / safe[0], (q - hit) / safe[1]))
        return cls(joint.weight[rows], np.stack((np.ones(q.shape), passed, 1 - passed)), right)

    def after(self, status: NDArray[np.int8]) -> tuple[FloatArray, FloatArray]:
        """P(right) of each model's answer, P(pass) of a first look at it, each (G, I), after `status` (G, I) or (I,)."""
        model = np.arange(status.shape[-1])
        types = self.weight * self.signal[status, model].prod(axis=-2)
        total = types.sum(axis=1, keepdims=True)
        # What a sure verifier rules out is asked about as well; nobody gets there.
        types = np.where(total > 0, types / np.where(total > 0, total, 1.0), self.weight)
        return (types[:, None] * self.right[status, model]).sum(axis=2), types @ self.signal[1].T


@dataclass(frozen=True, slots=True)
class _Problem:
    """What a plan is made for: G rows, each with its V, its class's law and its prices."""

    value: FloatArray
    costs: FloatArray
    verifier_cost: FloatArray
    rows: IntArray
    """Class of each row, (G,)."""
    joint: Joint
    verifier: Verifier

    def ends(
        self, right: FloatArray, tried: NDArray[np.bool_]
    ) -> tuple[FloatArray, NDArray[np.int8], IntArray]:
        """The best way to end at beliefs (G, I): its value, whether STOP or TAKE, and the answer kept, each (G,)."""
        kept = np.where(tried, self.value[:, None] * right, -np.inf)
        taken = np.where(tried, -np.inf, self.value[:, None] * right - self.costs)
        use = np.column_stack((kept.argmax(axis=1), taken.argmax(axis=1)))
        row = np.arange(len(use))
        held = np.maximum(kept[row, use[:, 0]], 0.0)
        best = taken[row, use[:, 1]]
        take = best > held + ROUND_OFF * self.value
        stop = np.where(tried.any(axis=1), use[:, 0], DEFER)
        kind = np.where(take, TAKE, STOP).astype(np.int8)
        return np.where(take, best, held), kind, np.where(take, use[:, 1], stop)


# --- two ways to decide ---------------------------------------------------------------------------------------------


def _dynamic(problem: _Problem, beliefs: _Beliefs) -> NDArray[np.int8]:
    """The model to open and verify after each history (−1: none), (G, 3^I): backwards over all of them.

    A history's number is Σ_m status_m · 3^m, so what follows it has a higher one.
    """
    g, i = problem.costs.shape
    digit = 3 ** np.arange(i)
    worth = np.zeros((g, 3**i))
    go = np.full((g, 3**i), -1, dtype=np.int8)
    price = problem.costs + problem.verifier_cost[:, None]
    for code in range(3**i - 1, -1, -1):
        status = (code // digit % 3).astype(np.int8)
        right, passing = beliefs.after(status)
        end, _, _ = problem.ends(right, np.broadcast_to(status > 0, (g, i)))
        worth[:, code] = end
        untried = np.flatnonzero(status == 0)
        if not untried.size:
            continue
        p = passing[:, untried]
        after = p * worth[:, code + digit[untried]] + (1 - p) * worth[:, code + 2 * digit[untried]]
        after -= price[:, untried]
        best = after.argmax(axis=1)
        value = after[np.arange(g), best]
        better = value > end + ROUND_OFF * problem.value
        worth[better, code] = value[better]
        go[better, code] = untried[best[better]]
    return go


def _by_index(problem: _Problem, beliefs: _Beliefs, status: NDArray[np.int8]) -> IntArray:
    """The model that the index opens and verifies after `status` (G, I); −1 where it ends the search, (G,)."""
    right, _ = beliefs.after(status)
    index = reservation_index(
        problem.value[:, None], right, problem.costs, problem.verifier, problem.verifier_cost[:, None]
    )
    tried = status > 0
    held = np.where(tried, problem.value[:, None] * right, 0.0).max(axis=1)
    open_to = np.where(tried, -np.inf, index.value)
    best = open_to.argmax(axis=1)
    row = np.arange(len(best))
    return np.where((open_to[row, best] > held) & index.verify[row, best], best, -1)


# --- plans ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Plan:
    """What to do next after each history, for G rows (classes, or tasks), as binary trees of T nodes.

    Node 0 is the start; after node t a pass leads to 2t + 1 and a fail to 2t + 2. All but `kind` and `use` is expected
    under the joint law and the verifier that the plan was made for.
    """

    names: tuple[str, ...]
    verifier: Verifier
    kind: NDArray[np.int8]
    """STOP, TAKE or VERIFY, (G, T)."""
    use: NDArray[np.int8]
    """The model opened, or whose answer is kept where the node stops (`DEFER`: none), (G, T)."""
    reach: FloatArray
    """P(the search comes to the node), (G, T)."""
    right: FloatArray
    """P(right) of the answer of `use`, before it is verified, (G, T)."""
    value: FloatArray
    """What continuing from the node is worth, USD, answers in hand included and what was paid before not, (G, T)."""
    ending: FloatArray
    """What ending at the node would be worth, USD, (G, T): `value` − `ending` is the gain of going on."""
    costs: FloatArray
    """κ_m, USD, (G, I)."""
    verifier_cost: FloatArray
    """κ_v, USD, (G,)."""
    bound: FloatArray
    """No plan can be worth more under the joint law, USD, (G,)."""
    exact: bool
    """Made by the dynamic programme: `bound` is its own value. Else by the index, and `bound` is a clairvoyant's."""

    @property
    def surplus(self) -> FloatArray:
        """Expected V·quality − what is paid, USD, (G,)."""
        return self.value[:, 0]

    @property
    def one_shot(self) -> FloatArray:
        """The same without a verifier: the best single model, or none, USD, (G,)."""
        return self.ending[:, 0]

    @property
    def quality(self) -> FloatArray:
        """P(the answer kept is right), (G,)."""
        kept = (self.kind != VERIFY) & (self.use != DEFER)
        right: FloatArray = (self.reach * self.right * kept).sum(axis=1)
        return right

    @property
    def cost(self) -> FloatArray:
        """Expected spending, models and verifier, USD, (G,)."""
        opened = np.take_along_axis(self.costs, np.maximum(self.use, 0), axis=1)
        paid = np.where(self.kind != STOP, opened, 0.0)
        paid += np.where(self.kind == VERIFY, self.verifier_cost[:, None], 0.0)
        spent: FloatArray = np.where(self.reach > 0, self.reach * paid, 0.0).sum(axis=1)
        return spent

    def text(self, row: int) -> str:
        """The plan of one row as people read it, a line a node."""
        head = (
            f"expected surplus {_usd(self.value[row, 0])} (one-shot {_usd(self.ending[row, 0])}), "
            f"cost {_usd(self.cost[row])}, right {self.quality[row]:.1%}; verifier: {self.verifier}"
        )
        return "\n".join((head, *self._lines(row, 0, "")))

    def _lines(self, row: int, node: int, indent: str) -> list[str]:
        use, right = int(self.use[row, node]), self.right[row, node]
        if use == DEFER:
            return [f"{indent}take no model"]
        name, cost = self.names[use], _usd(self.costs[row, use])
        if self.kind[row, node] == STOP:
            return [f"{indent}stop with {name}, right {right:.1%}"]
        if self.kind[row, node] == TAKE:
            return [f"{indent}take {name} ({cost}) unverified, right {right:.1%}"]
        going_on = _usd(self.value[row, node] - self.ending[row, node])
        lines = [
            f"{indent}try {name} ({cost}), right {right:.1%}, and verify ({_usd(self.verifier_cost[row])}); "
            f"going on is worth {going_on}"
        ]
        for signal, child in (("pass", 2 * node + 1), ("fail", 2 * node + 2)):
            chance = self.reach[row, child] / self.reach[row, node]
            if chance > 0:
                first, *rest = self._lines(row, child, indent + "    ")
                lines += [f"{indent}  {signal} {chance:.1%}: {first.strip()}", *rest]
        return lines


def _usd(amount: float) -> str:
    return f"${amount:,.4g}"


def plan_search(
    joint: Joint,
    names: tuple[str, ...],
    value: FloatArray | float,
    costs: FloatArray,
    verifier: Verifier,
    verifier_cost: FloatArray | float = 0.0,
    *,
    classes: IntArray | None = None,
    exact: bool | None = None,
) -> Plan:
    """The plan of each row at the prices given. Rows with the same V, class and prices need be given only once.

    Each answer is verified at most once. Given the outcomes a verifier's errors are taken to be independent, and what a model
    costs is taken not to depend on what was seen before.

    Args:
        value: V, USD per right answer, (G,) or one for all.
        costs: κ_m, full price of each model (`full_prices`), USD, (G, I); ∞ where not allowed.
        verifier_cost: κ_v, full price of a verification, USD, its seconds included, (G,) or one for all.
        classes: each row's class in `joint`, (G,); by default row g is class g.
        exact: the dynamic programme or the index; by default the programme for up to `EXACT_UP_TO` models.

    Raises:
        QuantityError: shapes that do not fit, a V or price that is negative or not a number, or the programme asked for
            with more than `MOST_EXACT` models.
    """
    if exact and len(names) > MOST_EXACT:
        raise QuantityError(
            f"search: {len(names)} models have 3^{len(names)} histories; use the index (exact=False)"
        )
    problem = _checked(joint, names, value, costs, verifier, verifier_cost, classes)
    beliefs = _Beliefs.of(joint, verifier, problem.rows)
    exact = len(names) <= EXACT_UP_TO if exact is None else exact
    g, i = costs.shape
    size = 2 ** (min(i, i if exact else DEEPEST) + 1) - 1
    go = np.full((g, size), -1, dtype=np.int8)
    status = np.zeros((g, size, i), dtype=np.int8)
    best = _dynamic(problem, beliefs) if exact else None
    for t in range(size // 2):
        rows = np.arange(g) if t == 0 else np.flatnonzero(go[:, (t - 1) // 2] >= 0)
        if best is not None:
            go[rows, t] = best[rows, status[rows, t] @ 3 ** np.arange(i)]
        else:
            go[rows, t] = _by_index(problem, beliefs, status[:, t])[rows]
        rows = rows[go[rows, t] >= 0]
        for signal in (1, 2):
            status[:, 2 * t + signal] = status[:, t]
            status[rows, 2 * t + signal, go[rows, t]] = signal
    return _planned(problem, beliefs, names, go, status, exact)


def _planned(
    problem: _Problem,
    beliefs: _Beliefs,
    names: tuple[str, ...],
    go: NDArray[np.int8],
    status: NDArray[np.int8],
    exact: bool,
) -> Plan:
    """Values backwards over the tree; where going on is worth less than ending, the plan ends. Then reach forwards."""
    g, size = go.shape
    kind, use = np.zeros((g, size), dtype=np.int8), np.full((g, size), DEFER, dtype=np.int8)
    value, ending, chance, right, reach = (np.zeros((g, size)) for _ in range(5))
    row = np.arange(g)
    for t in range(size - 1, -1, -1):
        p, passing = beliefs.after(status[:, t])
        ending[:, t], kind[:, t], use[:, t] = problem.ends(p, status[:, t] > 0)
        value[:, t] = ending[:, t]
        if t < size // 2:
            m = np.maximum(go[:, t], 0)
            chance[:, t] = passing[row, m]
            on = chance[:, t] * value[:, 2 * t + 1] + (1 - chance[:, t]) * value[:, 2 * t + 2]
            on -= problem.costs[row, m] + problem.verifier_cost
            better = (go[:, t] >= 0) & (on > ending[:, t] + ROUND_OFF * problem.value)
            value[better, t], kind[better, t], use[better, t] = on[better], VERIFY, go[better, t]
        right[:, t] = np.where(use[:, t] == DEFER, 0.0, p[row, np.maximum(use[:, t], 0)])
    reach[:, 0] = 1.0
    for t in range(size // 2):
        # Nodes after an end are not there; those the verifier is sure never to lead to are (a worse one may).
        ended = kind[:, t] != VERIFY
        through = np.where(ended, 0.0, reach[:, t])
        for child, share in ((2 * t + 1, chance[:, t]), (2 * t + 2, 1 - chance[:, t])):
            reach[:, child] = through * share
            kind[ended, child], use[ended, child] = STOP, DEFER
            value[ended, child] = ending[ended, child] = right[ended, child] = 0.0
    bound = value[:, 0] if exact else _clairvoyant(problem)
    return Plan(
        names,
        problem.verifier,
        kind,
        use,
        reach,
        right,
        value,
        ending,
        problem.costs,
        problem.verifier_cost,
        bound,
        exact,
    )


def _clairvoyant(problem: _Problem) -> FloatArray:
    """E[max(0, max_m V·X_m − κ_m)], (G,): what knowing all outcomes for nothing would be worth."""
    order = np.argsort(problem.costs, axis=1)
    gain = np.maximum(problem.value[:, None] - np.take_along_axis(problem.costs, order, axis=1), 0.0)
    q = problem.joint.right.T[order]  # (G, I, K), cheapest first
    none_before = np.concatenate((np.ones_like(q[:, :1]), np.cumprod(1 - q, axis=1)[:, :-1]), axis=1)
    bound: FloatArray = np.einsum("gk,gik,gi->g", problem.joint.weight[problem.rows], q * none_before, gain)
    return bound


def _checked(
    joint: Joint,
    names: tuple[str, ...],
    value: FloatArray | float,
    costs: FloatArray,
    verifier: Verifier,
    verifier_cost: FloatArray | float,
    classes: IntArray | None,
) -> _Problem:
    c, i = joint.weight.shape[0], joint.right.shape[1]
    if costs.ndim != 2 or costs.shape[1] != i or len(names) != i:
        raise QuantityError(
            f"search: costs has shape {costs.shape} and there are {len(names)} names; the joint law has {i} models"
        )
    g = costs.shape[0]
    rows = np.arange(g) if classes is None else classes
    if rows.shape != (g,) or (g and not 0 <= rows.min() <= rows.max() < c):
        raise QuantityError(f"search: {g} rows need one class each in 0…{c - 1}; give `classes`")
    columns = {"value": value, "costs": costs, "verifier_cost": verifier_cost}
    for name, given in columns.items():
        column = np.asarray(given, dtype=np.float64)
        if not (column >= 0).all() or (name != "costs" and not np.isfinite(column).all()):
            raise QuantityError(f"search: {name} must be finite and ≥ 0 (a cost of ∞ forbids the model)")
        if name != "costs" and column.shape not in ((), (g,)):
            raise QuantityError(f"search: {name} has shape {column.shape}, expected ({g},)")
    worth, checking = (np.broadcast_to(np.asarray(x, np.float64), (g,)) for x in (value, verifier_cost))
    return _Problem(worth, costs, checking, rows, joint, verifier)
