"""The market as the kernels read it: a few planes of amounts, and rows that charge them. [Z-1] [Z-3]

A *plane* is one physical amount of every use of every task, (N, I): money, seconds, risk. A *row* (one constraint)
charges a plane, or whether it is above a level, less an offset:

    charge_kxi = amount_p(k),xi − offset_k     or     [amount_p(k),xi > level_k] − offset_k

so a use's net value needs each plane once, however many rows charge it:

    v_xi = V_x·q_xi − Σ_p (declared_px + Σ_{k on p} μ_k)·amount_pxi + Σ_k μ_k·offset_k        (k over the rows x is in)

Nothing here copies a plane that is already in the right form: contiguous, float32 or float64.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
from numpy.typing import NDArray

from walras.errors import QuantityError, SettingsError
from walras.prices import Constraint, Numeraire
from walras.quantities import USD, BoolArray, IntArray, Tasks, Uses
from walras.risk import FloatArray

MAX_ROWS = 64
"""Rows that each task tests for itself (one bit each)."""

Plane = NDArray[Any]
"""(N, I), float32 or float64, contiguous."""


@dataclass(frozen=True, slots=True)
class Rows:
    """K rows of the programme; `limits` are totals over tasks."""

    plane: IntArray
    """(K,) which plane is charged."""
    level: FloatArray
    """(K,) NaN: the amount itself is charged; else whether it is above this level."""
    offset: FloatArray
    """(K,) taken off each charge: an SLA's bound."""
    limits: FloatArray
    exactly: BoolArray
    """(K,) whether the row must be met with equality; its price may then be negative."""
    scoped: BoolArray
    """(K,) whether only tasks with the row's bit in `Planes.member` are charged."""

    def __len__(self) -> int:
        return int(self.plane.size)

    def first(self, k: int) -> Rows:
        """The first k rows."""
        return Rows(*(getattr(self, f.name)[:k] for f in fields(self)))


@dataclass(frozen=True, slots=True)
class Planes:
    """The columns of N tasks and I uses. Columns of length 1 hold for every task."""

    value: FloatArray
    """V, USD per unit of quality, (N,)."""
    quality: Plane
    """NaN where the use is not allowed."""
    amounts: tuple[Plane, ...]
    declared: tuple[FloatArray, ...]
    """USD per unit of each plane at declared prices, (N,) or (1,)."""
    weight: FloatArray
    """(N,) or (1,)."""
    member: NDArray[np.uint64]
    """Bit k: the task is in scope of row k, (N,) or (1,)."""

    def __len__(self) -> int:
        return int(self.quality.shape[0])

    @property
    def width(self) -> int:
        return int(self.quality.shape[1])

    @property
    def nbytes(self) -> int:
        columns = (self.value, self.quality, *self.amounts, *self.declared, self.weight, self.member)
        return sum(c.nbytes for c in columns)

    def take(self, rows: IntArray) -> Planes:
        """The tasks at `rows`, copied."""

        def of(column: NDArray[Any]) -> NDArray[Any]:
            return column if column.size == 1 else column[rows]

        return Planes(
            self.value[rows],
            _take(self.quality, rows),
            tuple(_take(a, rows) for a in self.amounts),
            tuple(of(d) for d in self.declared),
            of(self.weight),
            of(self.member),
        )

    def part(self, lo: int, hi: int) -> Planes:
        """The tasks lo…hi − 1, not copied."""

        def of(column: NDArray[Any]) -> NDArray[Any]:
            return column if column.size == 1 else column[lo:hi]

        return Planes(
            self.value[lo:hi],
            self.quality[lo:hi],
            tuple(a[lo:hi] for a in self.amounts),
            tuple(of(d) for d in self.declared),
            of(self.weight),
            of(self.member),
        )

    @classmethod
    def concatenate(cls, parts: Iterable[Planes]) -> Planes:
        """All tasks of all parts, in order. Parts that come from an iterator are not all held beside the whole."""
        rest, planes = [], []
        for p in parts:
            rest.append((len(p), p.value, p.declared, p.weight, p.member))
            planes.append([p.quality, *p.amounts])
        lengths, values, declared, weights, members = zip(*rest, strict=True)

        def join(columns: Sequence[NDArray[Any]]) -> NDArray[Any]:
            if all(c.size == 1 and c[0] == columns[0][0] for c in columns):
                return columns[0]
            return np.concatenate([np.broadcast_to(c, n) for c, n in zip(columns, lengths, strict=True)])

        usd = tuple(join(prices) for prices in zip(*declared, strict=True))
        quality, *amounts = [_stack([own.pop(0) for own in planes]) for _ in range(len(planes[0]))]
        return cls(np.concatenate(values), quality, tuple(amounts), usd, join(weights), join(members))

    def total_weight(self) -> float:
        return float(self.weight[0]) * len(self) if self.weight.size == 1 else float(self.weight.sum())


def _take(plane: Plane, rows: IntArray) -> Plane:
    """Some tasks of a plane, in its own layout."""
    by_use = plane.strides[0] < plane.strides[1]
    taken: Plane = np.take(plane.T, rows, axis=1).T if by_use else np.take(plane, rows, axis=0)
    return taken


def _stack(planes: list[Plane]) -> Plane:
    by_use = planes[0].strides[0] < planes[0].strides[1]
    stacked: Plane = np.concatenate([p.T for p in planes], axis=1).T if by_use else np.concatenate(planes)
    return stacked


# --- from an economy -----------------------------------------------------------------------------------------------


def planes_of(
    tasks: Tasks,
    uses: Uses,
    constraints: Sequence[Constraint],
    declared: Sequence[tuple[str, float]] = ((USD, 1.0),),
    numeraire: Numeraire = "usd",
) -> tuple[Planes, Rows]:
    """The market of `equation.surplus` and `equation.Charge`; no plane is copied that is contiguous and allowed.

    Raises:
        SettingsError: more than `MAX_ROWS` constraints.
    """
    if len(constraints) > MAX_ROWS:
        raise SettingsError(
            f"{len(constraints)} constraints at once; at most {MAX_ROWS} can be priced together"
        )
    found: dict[Any, tuple[Plane, FloatArray]] = {}
    if numeraire == "usd":
        for name, usd in declared:
            if usd:
                found[name] = (uses.amount(name), np.array([usd]))
        for key, price, amount in (
            ("·seconds", tasks.latency_price, uses.seconds),
            ("·risk", tasks.risk_price, uses.risk),
            ("·irreversible", tasks.irreversible_price, uses.irreversible_risk),
        ):
            empty = amount.strides == (0, 0) and not amount[:1, :1].any()
            if price.any() and not empty:
                found[key] = (amount, _column(price))
    rows, member = [], np.zeros(1, dtype=np.uint64)
    for k, constraint in enumerate(constraints):
        key, plane, level = _charged(constraint, uses)
        found.setdefault(key, (plane, np.zeros(1)))
        inside = constraint.scope.members(tasks)
        weight = tasks.weight if inside is None else tasks.weight[inside]
        if inside is not None:
            member = member | (inside.astype(np.uint64) << np.uint64(k))
        offset = constraint.bound if constraint.layer == "latency" else 0.0
        limit = constraint.per_task_limit * float(weight.sum())
        at = list(found).index(key)
        rows.append((at, level, offset, limit, constraint.exactly, inside is not None))
    columns = zip(*rows, strict=True) if rows else [()] * 6
    types = (np.int64, float, float, float, np.bool_, np.bool_)
    table = Rows(*(np.array(c, dtype=t) for c, t in zip(columns, types, strict=True)))
    single = all(c.dtype == np.float32 for c in (uses.quality, *(plane for plane, _ in found.values())))
    number = np.float32 if single else np.float64
    quality = uses.quality if uses.allowed.all() else np.where(uses.allowed, uses.quality, np.nan)
    amounts = tuple(np.asarray(plane, dtype=number) for plane, _ in found.values())
    planes = Planes(
        tasks.value,
        np.asarray(quality, dtype=number),
        amounts,
        tuple(price for _, price in found.values()),
        _column(tasks.weight),
        member,
    )
    return planes, table


def _charged(constraint: Constraint, uses: Uses) -> tuple[Any, Plane, float]:
    """The plane a constraint charges, under a name, and its level."""
    match constraint.kind:
        case "budget":
            return constraint.resource, uses.amount(constraint.resource), np.nan
        case "mean_sla":
            return "·seconds", uses.seconds, np.nan
        case "quantile_sla":
            seconds = constraint.seconds
            if seconds in uses.late:
                return ("·late", seconds), uses.late[seconds], np.nan
            return "·seconds", uses.seconds, seconds
        case "risk_envelope":
            return "·risk", uses.risk, np.nan
        case "portfolio_envelope":
            if uses.losses is None or constraint.density is None:
                raise QuantityError(f"{constraint.name}: needs losses by scenario and a density")
            weighted: Plane = uses.losses @ np.asarray(constraint.density)
            return ("·losses", constraint.density), weighted, np.nan


def _column(values: FloatArray) -> FloatArray:
    """A column that is the same for every task, as one number."""
    same = values.size and values.strides == (0,)
    column: FloatArray = values[:1].copy() if same else np.ascontiguousarray(values)
    return column


def tables(p: Planes, rows: Rows) -> tuple[FloatArray, FloatArray, FloatArray]:
    """Of few tasks, in float64: worth at declared prices (N, I), −∞ where not allowed; charges (K, N, I); scopes (K, N)."""
    n, allowed = len(p), ~np.isnan(p.quality)
    worth = p.value[:, None] * p.quality.astype(np.float64)
    for usd, amount in zip(p.declared, p.amounts, strict=True):
        worth -= np.where(allowed, np.broadcast_to(usd, n)[:, None] * amount, 0.0)
    charges, inside = np.zeros((len(rows), n, p.width)), np.ones((len(rows), n))
    for k in range(len(rows)):
        amount = p.amounts[rows.plane[k]].astype(np.float64)
        charge = (amount if np.isnan(rows.level[k]) else (amount > rows.level[k])) - rows.offset[k]
        if rows.scoped[k]:
            inside[k] = (np.broadcast_to(p.member, n) >> np.uint64(k)) & np.uint64(1)
        charges[k] = np.where(allowed & (inside[k] > 0)[:, None], charge, 0.0)
    return np.where(allowed, worth, -np.inf), charges, inside
