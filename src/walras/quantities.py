"""Tasks and the uses they could be given: columns of physical amounts, before any price. [Z §2]

N tasks × I uses, columnar. A use is described by what it would do (quality, seconds, risk, amounts of each
resource), never by what that costs: one price vector can then reprice everything. One live request is N = 1.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from walras.errors import QuantityError
from walras.risk import FloatArray, RiskMeasure, risk_of

IntArray = NDArray[np.int64]
BoolArray = NDArray[np.bool_]

USD = "usd"
"""The resource every economy has: money paid for the use itself."""


@dataclass(frozen=True, slots=True)
class Labels:
    """A text column as codes into names: `codes` (N,), -1 where absent."""

    codes: IntArray
    names: tuple[str, ...]

    @classmethod
    def none(cls, n: int) -> Labels:
        return cls(np.full(n, -1, dtype=np.int64), ())

    def equal(self, name: str) -> BoolArray:
        """Which rows carry `name`, (N,)."""
        code = self.names.index(name) if name in self.names else -2
        mask: BoolArray = self.codes == code
        return mask

    def take(self, rows: IntArray) -> Labels:
        return Labels(self.codes[rows], self.names)


@dataclass(frozen=True, slots=True)
class Tasks:
    """What is asked for. One row a task; scalars broadcast to all rows."""

    value: FloatArray
    """V, USD per unit of quality, ≥ 0, (N,)."""
    latency_price: FloatArray = field(default_factory=lambda: np.zeros(1))
    """λ₀, declared price of delay, USD per second, ≥ 0, (N,)."""
    risk_price: FloatArray = field(default_factory=lambda: np.ones(1))
    """ρ₀, declared price of risk, USD per unit of risk, ≥ 0, (N,). 1 is risk-neutral when risk is in USD."""
    irreversible_price: FloatArray = field(default_factory=lambda: np.zeros(1))
    """ρ_irr, declared extra price of the unrecoverable part of risk [Z-7b], USD per unit, ≥ 0, (N,)."""
    weight: FloatArray = field(default_factory=lambda: np.ones(1))
    """How many identical tasks the row stands for, > 0, (N,)."""
    tenant: Labels | None = None
    task_class: Labels | None = None
    time: FloatArray | None = None
    """Arrival, seconds, (N,); needed only by constraints scoped to a time window."""

    def __post_init__(self) -> None:
        n = self.value.shape[0]
        for name in ("value", "latency_price", "risk_price", "irreversible_price", "weight"):
            column = _to_shape(np.asarray(getattr(self, name), dtype=np.float64), (n,), f"tasks: {name}")
            object.__setattr__(self, name, column)
            bad = np.flatnonzero(~(np.isfinite(column) & (column >= 0)))
            if bad.size:
                raise QuantityError(
                    f"tasks: {name} of task {bad[0]} is {column[bad[0]]}; it must be finite and ≥ 0"
                )
        if self.weight.size and not (self.weight > 0).all():
            raise QuantityError("tasks: every weight must be > 0")
        if self.time is not None and self.time.shape != (n,):
            raise QuantityError(f"tasks: time has shape {self.time.shape}, expected ({n},)")
        for name, labels in (("tenant", self.tenant), ("class", self.task_class)):
            if labels is not None and labels.codes.shape != (n,):
                raise QuantityError(f"tasks: {name} has shape {labels.codes.shape}, expected ({n},)")

    def __len__(self) -> int:
        return int(self.value.shape[0])

    def take(self, rows: IntArray) -> Tasks:
        """The tasks at `rows`, in that order."""
        return replace(
            self,
            value=self.value[rows],
            latency_price=self.latency_price[rows],
            risk_price=self.risk_price[rows],
            irreversible_price=self.irreversible_price[rows],
            weight=self.weight[rows],
            tenant=self.tenant and self.tenant.take(rows),
            task_class=self.task_class and self.task_class.take(rows),
            time=None if self.time is None else self.time[rows],
        )


@dataclass(frozen=True, slots=True)
class Uses:
    """What the next tokens could be spent on, per task, in physical units. All columns (N, I)."""

    names: tuple[str, ...]
    quality: FloatArray
    """ΔQ, unitless, usually in [0, 1]."""
    amounts: FloatArray
    """Amount of each resource, (N, I, K); `usd` is money paid for the use."""
    resources: tuple[str, ...] = (USD,)
    seconds: FloatArray = field(default_factory=lambda: np.zeros((1, 1)))
    """ΔL, seconds until the answer that this use adds, queueing included."""
    risk: FloatArray = field(default_factory=lambda: np.zeros((1, 1)))
    """ΔR in the economy's risk unit (USD of expected loss by default); negative for a verifier's increment."""
    irreversible_risk: FloatArray = field(default_factory=lambda: np.zeros((1, 1)))
    """ΔR_irr, the part of the risk that cannot be undone, same unit."""
    losses: FloatArray | None = None
    """Loss in USD by equally likely joint scenario, (N, I, S), where known: what CVaR and max–min need [Z-K]."""
    late: Mapping[float, FloatArray] = field(default_factory=dict)
    """P(L > s) by s, (N, I), where it is estimated; elsewhere `seconds` is taken as certain."""
    allowed: BoolArray = field(default_factory=lambda: np.ones((1, 1), dtype=np.bool_))
    """False masks a use that no price can buy [Z-LEX], or whose outcome is unknown."""

    def __post_init__(self) -> None:
        if self.quality.ndim != 2:
            raise QuantityError(f"uses: quality has shape {self.quality.shape}, expected (tasks, uses)")
        n, i = self.quality.shape
        if len(self.names) != i:
            raise QuantityError(f"uses: {len(self.names)} names for {i} columns")
        if self.amounts.shape != (n, i, len(self.resources)):
            raise QuantityError(
                f"uses: amounts has shape {self.amounts.shape}, expected {(n, i, len(self.resources))}"
            )
        if self.losses is not None and self.losses.shape[:2] != (n, i):
            raise QuantityError(f"uses: losses has shape {self.losses.shape}, expected ({n}, {i}, S)")
        for name in ("allowed", "seconds", "risk", "irreversible_risk"):
            object.__setattr__(self, name, _to_shape(getattr(self, name), (n, i), f"uses: {name}"))
        late = {s: _to_shape(share, (n, i), f"uses: late[{s:g}]") for s, share in self.late.items()}
        object.__setattr__(self, "late", late)
        columns = {
            c: getattr(self, c) for c in ("quality", "seconds", "risk", "irreversible_risk", "amounts")
        }
        columns |= {f"late[{s:g}]": share for s, share in late.items()}
        if self.losses is not None:
            columns["losses"] = self.losses
        for name, column in columns.items():
            if np.isfinite(column).all():
                continue
            finite = np.isfinite(column).reshape(n, i, -1).all(axis=2)
            bad = np.argwhere(~finite & self.allowed)
            if bad.size:
                task, use = bad[0]
                raise QuantityError(f"uses: {name} of task {task}, use '{self.names[use]}' is not finite")

    @property
    def shape(self) -> tuple[int, int]:
        n, i = self.quality.shape
        return n, i

    def amount(self, resource: str) -> FloatArray:
        """Amount of one resource, (N, I)."""
        if resource not in self.resources:
            raise QuantityError(f"uses: no resource '{resource}'; there are {', '.join(self.resources)}")
        column: FloatArray = self.amounts[:, :, self.resources.index(resource)]
        return column

    def late_share(self, seconds: float) -> FloatArray:
        """P(L > seconds), (N, I)."""
        if seconds in self.late:
            return self.late[seconds]
        return (self.seconds > seconds).astype(np.float64)

    def each(self, change: Callable[[FloatArray], FloatArray]) -> dict[str, Any]:
        """Every column of amounts after `change`, by name; what is allowed is not an amount."""
        names = ("quality", "amounts", "seconds", "risk", "irreversible_risk")
        columns: dict[str, Any] = {name: change(getattr(self, name)) for name in names}
        columns["losses"] = None if self.losses is None else change(self.losses)
        columns["late"] = {s: change(share) for s, share in self.late.items()}
        return columns

    def take(self, rows: IntArray) -> Uses:
        """The uses of the tasks at `rows`, in that order."""
        return replace(self, **self.each(lambda column: column[rows]), allowed=self.allowed[rows])

    def pick(self, use: IntArray) -> Uses:
        """One use per task, (N, 1): column `use` of each row; −1 (defer) gives a use of nothing."""
        column, nothing = np.maximum(use, 0)[:, None], use < 0

        def at(values: FloatArray) -> FloatArray:
            picked = np.take_along_axis(values, column.reshape(-1, 1, *[1] * (values.ndim - 2)), axis=1)
            picked[nothing] = 0.0
            return picked

        return Uses(names=("picked",), resources=self.resources, **self.each(at))

    def with_risk(self, measure: RiskMeasure) -> Uses:
        """The same uses, each one's risk set to `measure` of its own losses (conservative: tails add up) [Z-K]."""
        if self.losses is None:
            raise QuantityError("uses: a risk measure other than the expectation needs losses by scenario")
        known = np.where(self.allowed[:, :, None], self.losses, 0.0)
        return replace(self, risk=risk_of(known, measure))


def _to_shape(column: NDArray[Any], shape: tuple[int, ...], what: str) -> NDArray[Any]:
    if column.shape == shape:
        return column
    try:
        return np.broadcast_to(column, shape)
    except ValueError:
        raise QuantityError(f"{what} has shape {column.shape}, expected {shape}") from None


def whole_plans(increments: Uses) -> Uses:
    """Turn a chain of increments (column k adds to columns 0…k−1) into whole plans: column k does all of 0…k.

    Choosing among whole plans is exact whatever the chain's shape; `equation.choose_increments` gives the same
    answer by marginal value. A plan is allowed only if every step of it is.
    """
    columns = increments.each(lambda column: np.cumsum(column, axis=1))
    columns["late"] = {}  # probabilities of breach do not add over increments
    return replace(increments, **columns, allowed=np.logical_and.accumulate(increments.allowed, axis=1))
