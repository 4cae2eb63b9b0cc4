"""Every equilibrium of a small economy, with proof that there is no other. [Z-GE]

Take goods Z that cost nothing and activities S that run, so make no profit: p_Z = 0, B_Sᵀp = 0. Exact elimination leaves n
goods F whose prices are free, p = N p_F, and since NᵀB_S = 0 markets clear where the *reduced* excess demand ζ(p_F) = Nᵀz(N p_F)
is 0. That is again an exchange economy, of n goods: p_F·ζ = 0, and only price ratios count. So one search serves for every Z
and S, and with both empty it is exchange.

The search halves boxes of log ratios between goods ordered by price, d_l = ln(p_(l+1)/p_(l)) ∈ [−∞, 0], for each order: ratios
of two small prices stay sharp, and all positive prices are covered, down to 0. A box goes when bounds on ζ leave out 0, when
an activity must profit or run backwards, or when the Krawczyk operator misses it; an equilibrium is proved, and proved the
only one of its box, when that operator maps the box into its inside (Krawczyk 1969; Moore 1977). What is left is reported.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction
from itertools import combinations, permutations
from math import factorial
from typing import Any

import numpy as np

from walras.errors import QuantityError
from walras.market.tenants.economy import Economy
from walras.market.tenants.enclosures import (
    TINY,
    Demanded,
    Interval,
    Ratios,
    demand_of_ces,
    demand_of_quasi_linear,
)
from walras.market.tenants.utility import CES, QuasiLinear, Utility
from walras.quantities import BoolArray, IntArray
from walras.risk import FloatArray

GOODS = 6
"""More goods than these are refused: the boxes grow with a power of their number."""
CHUNK = 2048
"""Boxes bounded at once."""
NARROW = 1e-7
"""A box of log ratios this narrow that is still open is not halved again."""
SPECK = 1e-200
"""A price ratio below this is not halved again, either."""
ENDLESS = 2e-3
"""As wide as this a side counts that has no end."""
COARSE = 1e-3
"""Nor is the rest of a box with an endless side when it is this narrow."""
SHRUNK = 0.5
"""A box of which Krawczyk's operator leaves less than this on some side is tested again before it is halved."""
SHARPENINGS = 6
"""Rounds of Krawczyk's operator on a box with a zero: each squares the width."""
BEYOND = 1.25
"""A box is widened by this before the Krawczyk test, so that an equilibrium on its face is inside."""
ROUND = 2.0**-47
"""Relative allowance for the rounding of a product of matrices up to 5 × 5."""


@dataclass(frozen=True, slots=True, eq=False)
class CertifiedEquilibrium:
    """An equilibrium that exists, alone, within the bounds; prices sum to 1."""

    prices: FloatArray
    """(G,), the middle of the bounds."""
    price_bounds: FloatArray
    """(G, 2)."""
    activities: FloatArray
    """(A,) levels, the middle of the bounds."""
    activity_bounds: FloatArray
    """(A, 2)."""
    index: int
    """Sign of det(−∂ζ/∂p_F), one good and its price left out."""


@dataclass(frozen=True, slots=True, eq=False)
class Enclosed:
    """All equilibria, as far as proved. In doubt nothing is claimed: what is not excluded and not proved is in `undecided`."""

    equilibria: tuple[CertifiedEquilibrium, ...]
    """By the price of the first good, rising."""
    complete: bool
    """Proved: there is no other within the box, at however small prices."""
    undecided: FloatArray
    """(U, G, 2) bounds on prices that sum to 1, within which nothing was proved."""
    volume: float
    """Share of price space left undecided, measured in ratios of successive prices and summed over `sets`; 0 for points."""
    boxes: int
    """Boxes bounded."""
    sets: int
    """Sets of free goods and running activities searched."""

    @property
    def index_sum(self) -> int:
        """1 where all were found (Poincaré–Hopf; with activities, Kehoe 1980): a check, not used for the proof."""
        return sum(e.index for e in self.equilibria)


def all_equilibria(economy: Economy, *, box: FloatArray | None = None, work: int = 500_000) -> Enclosed:
    """Find every equilibrium and prove that there is no other, within `box` (G, 2), bounds on prices that sum to 1.

    Default: at all prices, those of 0 included. The proof is about the numbers that the economy's doubles are. After `work`
    boxes the search stops and says what it did not decide. What is degenerate stays undecided: a singular Jacobian, and a
    running activity's level, an idle one's profit, or what is left over of a free good, that is next to 0. A tenant whose
    subsistence costs more than its income is in no equilibrium, and one without income takes nothing that is free.

    Raises:
        QuantityError: too many goods, a sector, or a demand that has no bounds.
    """
    n_goods = len(economy.goods)
    limits = np.tile([0.0, 1.0], (n_goods, 1)) if box is None else np.asarray(box, dtype=np.float64)
    _refuse(economy, limits)
    roots, left = [], [np.zeros((0, n_goods, 2))]
    boxes, sets, volume = 0, 0, 0.0
    for reduced in _reductions(economy):
        search = _Search(economy, reduced, limits)
        search.run(work - boxes)
        roots += search.roots
        left += search.left
        boxes, sets, volume = boxes + search.boxes, sets + 1, volume + search.volume
    undecided = np.concatenate(left)
    found = sorted((r.equilibrium for r in roots), key=lambda e: float(e.prices[0]))
    return Enclosed(tuple(found), not len(undecided), undecided, volume, boxes, sets)


def _refuse(economy: Economy, limits: FloatArray) -> None:
    n_goods = len(economy.goods)
    if n_goods > GOODS:
        raise QuantityError(
            f"{n_goods} goods: all equilibria are searched for up to {GOODS} (clear finds one)"
        )
    if economy.sectors:
        raise QuantityError(
            f"sector '{economy.sectors[0].name}' changes its inputs with prices: all equilibria are searched for with fixed"
            " activities only (write it as several activities, or let clear find one)"
        )
    for tenant in economy.tenants:
        if not isinstance(tenant.utility, CES | QuasiLinear):
            raise QuantityError(
                f"tenant '{tenant.name}': the demand of a {type(tenant.utility).__name__} utility cannot be bounded over a box"
                " of prices (CES and QuasiLinear can; clear finds one equilibrium)"
            )
    if limits.shape != (n_goods, 2) or not (limits[:, 0] <= limits[:, 1]).all():
        raise QuantityError(
            f"box must be a least and a greatest price, of prices that sum to 1, for each of {n_goods} goods"
        )


# --- what runs and what is free ------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, eq=False)
class _Reduction:
    """The exchange economy that is left when the goods Z cost nothing and the activities of one span run: p = N p_F."""

    gone: list[int]
    """Z."""
    free: list[int]
    """F, n goods."""
    tied: list[int]
    """D, the other goods, whose prices follow: p_D = M p_F."""
    follow: Interval
    """M, (|D|, n)."""
    idle: Interval
    """Profits B_aᵀN of the activities outside the span, (·, n)."""
    running: list[tuple[list[int], Interval]]
    """Each independent set S of the span, and (B_DS)⁻¹, (k, k), which gives its levels from z_D."""
    loose: bool
    """Activities of the span can run beside S and change only what goods of Z are left over: S alone settles nothing."""


def _reductions(economy: Economy) -> Iterator[_Reduction]:
    n_goods = len(economy.goods)
    exact = [[Fraction(float(v)) for v in column] for column in economy.activities.T]
    for k in range(n_goods):
        for gone in combinations(range(n_goods), k):
            if not any(
                _without_end(t.utility, w, list(gone))
                for t, w in zip(economy.tenants, economy.owned, strict=True)
            ):
                yield from _spans(exact, list(gone), [g for g in range(n_goods) if g not in gone])


def _without_end(utility: Utility, owned: FloatArray, gone: list[int]) -> bool:
    """That the tenant surely demands goods without bound when `gone` cost nothing and the others something."""
    wanted = utility.wanted(owned.size)
    if not wanted[gone].any():
        return False
    if not isinstance(utility, CES) or utility.elasticity > 1:
        return True
    left = np.delete(owned - utility.subsistence, gone)
    rich = utility.elasticity > 0 and bool((left >= 0).all() and (left > 0).any())
    return rich or not np.delete(wanted, gone).any()


def _spans(exact: list[list[Fraction]], gone: list[int], kept: list[int]) -> Iterator[_Reduction]:
    """One for each span of independent activities, as far as goods that cost something go; exact in the doubles given."""
    priced = [[b[g] for g in kept] for b in exact]
    spans: dict[tuple[tuple[Fraction, ...], ...], list[list[int]]] = {}
    for k in range(min(len(exact), len(kept) - 1) + 1):
        for subset in combinations(range(len(exact)), k):
            rows, pivots, _ = _eliminate([priced[a] for a in subset])
            if len(pivots) == k:
                spans.setdefault(tuple(tuple(row) for row in rows), []).append(list(subset))
    for span, subsets in spans.items():
        yield _reduction(exact, gone, kept, [list(row) for row in span], subsets)


def _reduction(
    exact: list[list[Fraction]],
    gone: list[int],
    kept: list[int],
    span: list[list[Fraction]],
    subsets: list[list[int]],
) -> _Reduction:
    pivots = _eliminate(span)[1]
    tied, rest = [kept[i] for i in pivots], [i for i in range(len(kept)) if i not in pivots]
    free, follow = [kept[i] for i in rest], [[-row[i] for i in rest] for row in span]
    profits = [
        [
            b[f] + sum((b[d] * m[i] for d, m in zip(tied, follow, strict=True)), Fraction(0))
            for i, f in enumerate(free)
        ]
        for b in exact
    ]
    idle = [row for row in profits if any(row)]
    return _Reduction(
        gone,
        free,
        tied,
        _enclosed(follow, (len(tied), len(free))),
        _enclosed(idle, (len(idle), len(free))),
        [
            (s, _enclosed(_inverse([[exact[a][d] for a in s] for d in tied]), (len(s), len(s))))
            for s in subsets
        ],
        bool(gone) and len(exact) - len(idle) > len(tied),
    )


def _eliminate(rows: list[list[Fraction]]) -> tuple[list[list[Fraction]], list[int], int]:
    """Reduced echelon form without its zero rows, its pivot columns, and the sign of the product of the pivots."""
    rows, sign = [list(row) for row in rows], 1
    pivots: list[int] = []
    for column in range(len(rows[0]) if rows else 0):
        at = len(pivots)
        below = [r for r in range(at, len(rows)) if rows[r][column]]
        if not below:
            continue
        if below[0] != at:
            rows[at], rows[below[0]], sign = rows[below[0]], rows[at], -sign
        pivot = rows[at][column]
        sign = sign if pivot > 0 else -sign
        rows[at] = [v / pivot for v in rows[at]]
        for r in range(len(rows)):
            if r != at and rows[r][column]:
                rows[r] = [v - rows[r][column] * u for v, u in zip(rows[r], rows[at], strict=True)]
        pivots.append(column)
    return rows[: len(pivots)], pivots, sign


def _inverse(matrix: list[list[Fraction]]) -> list[list[Fraction]]:
    k = len(matrix)
    rows, _, _ = _eliminate([row + [Fraction(int(i == j)) for j in range(k)] for i, row in enumerate(matrix)])
    return [row[k:] for row in rows]


def _enclosed(values: list[list[Fraction]], shape: tuple[int, int]) -> Interval:
    """Doubles on both sides of exact numbers; the number itself where it is a double."""
    near = np.array([[float(v) for v in row] for row in values]).reshape(shape)
    same = np.array([[Fraction(float(v)) == v for v in row] for row in values], dtype=np.bool_).reshape(shape)
    return Interval(
        np.where(same, near, np.nextafter(near, -np.inf)), np.where(same, near, np.nextafter(near, np.inf))
    )


# --- bounds over boxes --------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, eq=False)
class _Boxes:
    """N boxes of d, in which d_l = ln(p_(l+1)/p_(l)) of the free goods as ordered."""

    lo: FloatArray
    """(N, n − 1), −∞ allowed."""
    hi: FloatArray
    order: IntArray
    """(N, n) positions in F, dearest first."""

    def __len__(self) -> int:
        return len(self.order)

    def take(self, rows: Any) -> _Boxes:
        return _Boxes(self.lo[rows], self.hi[rows], self.order[rows])

    @classmethod
    def join(cls, parts: list[_Boxes]) -> _Boxes:
        return cls(*(np.concatenate([getattr(p, name) for p in parts]) for name in ("lo", "hi", "order")))

    @classmethod
    def everything(cls, n: int) -> _Boxes:
        order = np.array(list(permutations(range(n))), dtype=np.int64)
        return cls(np.full((len(order), n - 1), -np.inf), np.zeros((len(order), n - 1)), order)

    @property
    def bounded(self) -> BoolArray:
        finite: BoolArray = np.asarray(np.isfinite(self.lo).all(axis=1))
        return finite

    @property
    def share(self) -> float:
        """Of price space, measured in the ratios e^d ∈ (0, 1] of each order."""
        with np.errstate(under="ignore"):
            sizes = (np.exp(self.hi) - np.exp(self.lo)).prod(axis=1)
        return float(sizes.sum()) / factorial(self.order.shape[1])

    def log_ratios(self) -> Interval:
        """ln(p_i/p_j) of the free goods, (N, n, n)."""
        n = self.order.shape[1]
        low, high = np.zeros((len(self), n, n)), np.zeros((len(self), n, n))
        for i in range(1, n):
            for j in range(i):
                part = Interval(self.lo[:, j:i], self.hi[:, j:i]).sum(1) if i - j > 1 else self._step(j)
                low[:, i, j], high[:, i, j] = part.lo, part.hi
                low[:, j, i], high[:, j, i] = -part.hi, -part.lo
        rank = np.argsort(self.order, axis=1)
        at = (np.arange(len(self))[:, None, None], rank[:, :, None], rank[:, None, :])
        return Interval(low[at], high[at])

    def _step(self, j: int) -> Interval:
        return Interval(self.lo[:, j], self.hi[:, j])


@dataclass(frozen=True, slots=True, eq=False)
class _Bounds:
    """What holds over N boxes."""

    open: BoolArray
    """(N,) False where there surely is no equilibrium."""
    proved: BoolArray
    """(N,) True where a zero of ζ surely is an equilibrium."""
    prices: Interval
    """(N, G), of sum 1."""
    levels: Interval
    """(N, A)."""
    zeta: Interval
    """ζ of the free goods by order, (N, n)."""
    slopes: Interval
    """∂ζ/∂d, (N, n, n − 1), where asked for."""


def _bounds(
    economy: Economy, reduced: _Reduction, limits: FloatArray, boxes: _Boxes, with_slopes: bool
) -> _Bounds:
    ratios, moved, no = _ratios(reduced, boxes, len(economy.goods))
    excess, slopes = -Interval.thin(economy.owned).sum(0), Interval.thin(0.0)
    yes = ~no
    for demanded in _demands(economy, reduced.gone, ratios):
        excess = excess + demanded.amount
        slopes = slopes + demanded.slopes() if with_slopes else slopes
        no, yes = no | (demanded.least_free.hi < 0), yes & (demanded.least_free.lo >= 0)
    zeta = _reduce(reduced, excess)
    by_d = _reduce(reduced, (slopes[:, :, :, None] * moved[:, None]).sum(2)) if with_slopes else zeta
    prices = Interval.thin(1.0).over(ratios.ratio.sum(1)).clip(0.0, 1.0)
    prices.lo[:, reduced.gone], prices.hi[:, reduced.gone] = 0.0, 0.0
    inside = (prices.lo >= limits[:, 0]) & (prices.hi <= limits[:, 1])
    outside = (prices.hi < limits[:, 0]) | (prices.lo > limits[:, 1])
    profits = (reduced.idle[None, :, :, None] * ratios.ratio[:, None, reduced.free][..., reduced.free]).sum(2)
    levels, runs, stands = _levels(economy, reduced, excess)
    no = no | stands | outside.any(axis=1) | ((zeta.lo > 0) | (zeta.hi < 0)).any(axis=1)
    no = no | (profits.lo > 0).any(axis=(1, 2))
    loses: BoolArray = np.asarray((profits.hi < 0).any(axis=2))
    yes = yes & runs & inside.all(axis=1) & loses.all(axis=1)
    row = np.arange(len(boxes))[:, None]
    return _Bounds(~no, yes, prices, levels, zeta[row, boxes.order], by_d[row, boxes.order])


def _demands(economy: Economy, gone: list[int], at: Ratios) -> Iterator[Demanded]:
    """What is owned of a good that costs nothing is no income."""
    worth = economy.owned.copy()
    worth[:, gone] = 0.0
    ces = [(t.utility, w) for t, w in zip(economy.tenants, worth, strict=True) if isinstance(t.utility, CES)]
    if ces:
        yield demand_of_ces([u for u, _ in ces], np.array([w for _, w in ces]), at)
    for tenant, owned in zip(economy.tenants, worth, strict=True):
        if isinstance(tenant.utility, QuasiLinear):
            yield demand_of_quasi_linear(tenant.utility, owned, at)


def _ratios(reduced: _Reduction, boxes: _Boxes, n_goods: int) -> tuple[Ratios, Interval, BoolArray]:
    """Ratios of all prices, ∂ln p/∂d (N, G, n − 1), and where some tied price is not > 0 (N,)."""
    gone, free, tied, n = reduced.gone, reduced.free, reduced.tied, len(reduced.free)
    log = boxes.log_ratios()
    ratio = log.exp().where(~np.eye(n, dtype=np.bool_), Interval.thin(1.0))
    rank = np.argsort(boxes.order, axis=1)
    tail = Interval.thin((rank[:, :, None] > np.arange(n - 1)).astype(np.float64))
    if not tied and not gone:
        return Ratios(log, ratio), tail, np.zeros(len(boxes), dtype=np.bool_)
    follow = reduced.follow[None, :, :, None]
    to_free = (follow * ratio[:, None]).sum(2)
    no: BoolArray = np.asarray((to_free.hi <= 0).any(axis=(1, 2)))
    row, dearest = np.arange(len(boxes)), boxes.order[:, 0]
    through = to_free[row, :, dearest][:, :, None] * ratio[row, dearest][:, None]
    to_free = to_free.meet(through).clip(0.0, np.inf)
    from_free = Interval.thin(1.0).over(to_free).transposed
    among = (follow * from_free[:, None]).sum(2).clip(0.0, np.inf)
    among = among.where(~np.eye(len(tied), dtype=np.bool_), Interval.thin(1.0))
    moved = ((reduced.follow * from_free.transposed)[:, :, :, None] * tail[:, None]).sum(2)
    kept, endless = free + tied, Interval.thin(np.inf)
    logs = [(free, free, log), (tied, free, to_free.log()), (free, tied, -to_free.log().transposed), (tied, tied, among.log()),
            (kept, gone, endless), (gone, kept, -endless), (gone, gone, Interval(-endless.lo, endless.hi))]  # fmt: skip
    full = [(free, free, ratio), (tied, free, to_free), (free, tied, from_free), (tied, tied, among),
            (kept, gone, endless), (gone, gone, Interval(np.zeros(1), endless.hi))]  # fmt: skip
    every, shape = list(range(n - 1)), (len(boxes), n_goods)
    return (
        Ratios(_placed(logs, (*shape, n_goods)), _placed(full, (*shape, n_goods))),
        _placed([(free, every, tail), (tied, every, moved)], (*shape, n - 1)),
        no,
    )


def _placed(parts: list[tuple[list[int], list[int], Interval]], shape: tuple[int, int, int]) -> Interval:
    low, high = np.zeros(shape), np.zeros(shape)
    for rows, columns, part in parts:
        at = (slice(None), np.array(rows, dtype=np.int64)[:, None], np.array(columns, dtype=np.int64))
        low[at], high[at] = part.lo, part.hi
    return Interval(low, high)


def _reduce(reduced: _Reduction, goods: Interval) -> Interval:
    """Nᵀ applied to axis 1, (N, G, …) → (N, n, …)."""
    free = goods[:, reduced.free]
    if not reduced.tied:
        return free
    follow = reduced.follow.transposed[(None, ..., *[None] * (goods.lo.ndim - 2))]
    return free + (follow * goods[:, None, reduced.tied]).sum(2)


def _levels(economy: Economy, reduced: _Reduction, excess: Interval) -> tuple[Interval, BoolArray, BoolArray]:
    """y from B_DS y = z_D, (N, A); where some S of the span surely runs and leaves goods of Z over; where surely none."""
    count, gone = len(excess.lo), reduced.gone
    nil = np.zeros((count, economy.activities.shape[1]))
    levels, runs, stands = Interval(nil, nil), np.zeros(count, dtype=np.bool_), np.ones(count, dtype=np.bool_)
    for subset, inverse in reduced.running:
        y = (inverse * excess[:, None, reduced.tied]).sum(2)
        made = (Interval.thin(economy.activities[gone][:, subset]) * y[:, None]).sum(2)
        spare = made - excess[:, gone]
        here = Interval(nil.copy(), nil.copy())
        here.lo[:, subset], here.hi[:, subset] = y.lo, y.hi
        levels = levels.where(runs[:, None], here)
        runs = runs | ((y.lo > 0).all(axis=1) & (spare.lo > 0).all(axis=1))
        stands = stands & ((y.hi < 0).any(axis=1) | (spare.hi < 0).any(axis=1))
    return levels, runs, stands & (not reduced.loose)


# --- the search ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, eq=False)
class _Krawczyk:
    """K(X) = c − Y ζ(c) + (I − Y ζ′(X))(X − c) for N boxes X = c ± r: every zero of ζ in X lies in K(X)."""

    image: Interval
    """(N, n − 1)."""
    inside: BoolArray
    """(N,) K(X) in the inside of X: one zero there, and no more."""
    preconditioner: FloatArray
    """Y, (N, n − 1, n − 1)."""

    @classmethod
    def of(cls, centre: FloatArray, radius: FloatArray, zeta: Interval, slopes: Interval) -> _Krawczyk:
        """`zeta` (N, n) at c, `slopes` (N, n, n − 1) over X. The dearest good's market then clears too (Walras' law)."""
        (f, f_off), (J, J_off) = _ball(zeta[:, 1:]), _ball(slopes[:, 1:])
        known: BoolArray = np.asarray(np.isfinite(J_off).all(axis=(1, 2)) & np.isfinite(f_off).all(axis=1))
        f, f_off, J, J_off = (np.where(_along(known, x), x, 0.0) for x in (f, f_off, J, J_off))
        identity = np.eye(J.shape[-1])
        Y = np.linalg.inv(np.where(_along(np.abs(np.linalg.det(J)) > TINY, J), J, identity))
        size = np.abs(Y)
        off = np.abs(identity - Y @ J) + size @ J_off + ROUND * (identity + size @ (np.abs(J) + J_off))
        reach = off @ radius[..., None] + size @ (f_off + ROUND * np.abs(f))[..., None]
        reach = np.where(known[:, None], reach[..., 0] * (1 + ROUND) + ROUND * np.abs(centre), np.inf)
        move = (Y @ f[..., None])[..., 0]
        inside: BoolArray = np.asarray((np.abs(move) + reach < radius).all(axis=1))
        return cls(Interval(centre - move - reach, centre - move + reach), inside, Y)


def _ball(x: Interval) -> tuple[FloatArray, FloatArray]:
    """Centre, and a radius around it that covers."""
    with np.errstate(invalid="ignore"):
        middle = x.lo + (x.hi - x.lo) / 2
        return middle, np.maximum(x.hi - middle, middle - x.lo) * (1 + ROUND)


def _along(told: BoolArray, x: FloatArray) -> BoolArray:
    """`told` (N,) with as many axes as x."""
    return told.reshape(-1, *[1] * (x.ndim - 1))


@dataclass(frozen=True, slots=True, eq=False)
class _Root:
    """The only zero of ζ within `alone`; it lies within `at`."""

    alone: _Boxes
    at: Interval
    """ln(p_i/p_j) of the free goods, (n, n)."""
    proved: bool
    """It is an equilibrium; else that stays open, a level, a profit or a price bound being next to 0."""
    equilibrium: CertifiedEquilibrium

    def is_at(self, other: Interval) -> bool:
        """That `other`, log ratios (n, n), lies where this is the only zero."""
        order = self.alone.order[0]
        low, high = other.lo[order[1:], order[:-1]], other.hi[order[1:], order[:-1]]
        return bool((low >= self.alone.lo[0]).all() and (high <= self.alone.hi[0]).all())

    def meets(self, other: Interval) -> bool:
        return bool((self.at.lo <= other.hi).all() and (self.at.hi >= other.lo).all())


class _Search:
    """Branch and bound over the prices of one reduction."""

    def __init__(self, economy: Economy, reduced: _Reduction, limits: FloatArray) -> None:
        self.economy, self.reduced, self.limits = economy, reduced, limits
        self.boxes, self.volume = 0, 0.0
        self.left: list[FloatArray] = []
        self.roots: list[_Root] = []

    def run(self, work: int) -> None:
        """Fill `roots`; what `work` boxes do not decide goes to `left` and `volume`."""
        queue = _Boxes.everything(len(self.reduced.free))
        while len(queue) and self.boxes < work:
            now, queue = queue.take(slice(CHUNK)), queue.take(slice(CHUNK, None))
            self.boxes += len(now)
            now = now.take(self.bounds(now).open)
            halves = self.halve(now.take(~now.bounded))
            queue = _Boxes.join([queue, halves, self.test(now.take(now.bounded))])
        self.give_up(queue)
        for root in self.roots:
            if not root.proved:
                self.left.append(root.equilibrium.price_bounds[None])
        self.roots = [root for root in self.roots if root.proved]

    def bounds(self, boxes: _Boxes, *, slopes: bool = False) -> _Bounds:
        with np.errstate(over="ignore", under="ignore", invalid="ignore"):
            return _bounds(self.economy, self.reduced, self.limits, boxes, slopes)

    def krawczyk(self, centre: FloatArray, radius: FloatArray, order: IntArray) -> tuple[_Bounds, _Krawczyk]:
        wide = radius + ROUND * (radius + np.abs(centre))
        over = self.bounds(_Boxes(centre - wide, centre + wide, order), slopes=True)
        at = self.bounds(_Boxes(centre, centre, order))
        return over, _Krawczyk.of(centre, radius, at.zeta, over.slopes)

    def test(self, boxes: _Boxes) -> _Boxes:
        """Settle the bounded boxes that can be; the rest shrunk or halved."""
        centre = (boxes.lo + boxes.hi) / 2
        radius = np.maximum(BEYOND * (boxes.hi - boxes.lo) / 2, NARROW / 8)
        over, k = self.krawczyk(centre, radius, boxes.order)
        if k.inside.any():
            inner = radius * (1 - ROUND) - ROUND * np.abs(centre)
            only = _Boxes(centre - inner, centre + inner, boxes.order)
            image = _Boxes(k.image.lo, k.image.hi, boxes.order)
            self.settle(only.take(k.inside), image.take(k.inside), k.preconditioner[k.inside])
        low, high = np.maximum(boxes.lo, k.image.lo), np.minimum(boxes.hi, k.image.hi)
        rest = over.open & ~k.inside & (low <= high).all(axis=1)
        shrunk = ((high - low) < SHRUNK * (boxes.hi - boxes.lo)).any(axis=1)
        boxes = _Boxes(low, high, boxes.order)
        return _Boxes.join([boxes.take(rest & shrunk), self.halve(boxes.take(rest & ~shrunk))])

    def halve(self, boxes: _Boxes) -> _Boxes:
        """Each box cut in two where it is widest; those too small to cut are given up."""
        endless = np.isneginf(boxes.lo)
        # An endless side counts by what ratios up to e^hi may still do: much at first, and never too little to be cut.
        still = np.where(boxes.hi > np.log(SPECK), np.maximum(4 * np.exp(boxes.hi / 4), ENDLESS), 0.0)
        width = np.where(endless, still, boxes.hi - boxes.lo)
        least = np.where(endless.any(axis=1), COARSE, NARROW)
        small = (width < least[:, None]).all(axis=1)
        self.give_up(boxes.take(small))
        boxes, width = boxes.take(~small), width[~small]
        row = np.arange(len(boxes))
        at = width.argmax(axis=1) if len(boxes) else row
        low, high = boxes.lo[row, at], boxes.hi[row, at]
        cut = np.where(np.isneginf(low), 2 * high - 2, (low + high) / 2)
        below, above = boxes.hi.copy(), boxes.lo.copy()
        below[row, at], above[row, at] = cut, cut
        return _Boxes.join([_Boxes(boxes.lo, below, boxes.order), _Boxes(above, boxes.hi, boxes.order)])

    def settle(self, alone: _Boxes, found: _Boxes, preconditioner: FloatArray) -> None:
        """One zero is in each box `found`, and no other in `alone`: bound it as sharply as doubles allow, and judge it."""
        low, high = found.lo, found.hi
        for _ in range(SHARPENINGS):
            centre = (low + high) / 2
            _, k = self.krawczyk(centre, (high - low) / 2 * (1 + ROUND) + ROUND * np.abs(centre), found.order)
            low, high = np.maximum(low, k.image.lo), np.minimum(high, k.image.hi)
        found = _Boxes(low, high, found.order)
        last, ratios = self.bounds(found), found.log_ratios()
        for i in map(int, np.flatnonzero(last.open)):
            at = ratios[i]
            if any(root.is_at(at) for root in self.roots):
                continue
            clear = bool(last.proved[i]) and not any(root.meets(at) for root in self.roots)
            only = alone.take(slice(i, i + 1))
            self.roots.append(_Root(only, at, clear, _certified(last, i, preconditioner[i])))

    def give_up(self, boxes: _Boxes) -> None:
        for start in range(0, len(boxes), CHUNK):
            part = boxes.take(slice(start, start + CHUNK))
            over = self.bounds(part)
            self.left.append(np.stack([over.prices.lo, over.prices.hi], axis=-1)[over.open])
            self.volume += part.take(over.open).share


def _certified(bounds: _Bounds, i: int, preconditioner: FloatArray) -> CertifiedEquilibrium:
    """The slopes' determinant has the sign of Y's: no matrix between Y ζ′ and the identity is singular."""
    prices, levels = bounds.prices[i], bounds.levels[i]
    exact = [[Fraction(float(v)) for v in row] for row in preconditioner]
    sign = _eliminate(exact)[2]
    return CertifiedEquilibrium(
        (prices.lo + prices.hi) / 2,
        np.column_stack([prices.lo, prices.hi]),
        (levels.lo + levels.hi) / 2,
        np.column_stack([levels.lo, levels.hi]),
        sign * (-1) ** len(exact),
    )
