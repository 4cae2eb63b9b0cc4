"""Constraints and the prices they make. [Z-3]

Everything decides with  V·ΔQ − π_C·ΔC − π_L·ΔL − π_R·ΔR,  where

    π_C = 1 + μ_C    π_L = λ₀ + μ_L    π_R = ρ₀ + μ_R        (numéraire USD)

The first parts are declared: money counts itself, and λ₀ and ρ₀ travel with the tasks. The μ are discovered, one for
each constraint, and a price always carries the constraint that makes it. A constraint says what a use takes out of
it (`charge`) and for whom it holds (`scope`); a use pays  μ · charge.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

import numpy as np

from walras.errors import NumeraireError, QuantityError, SettingsError, nearest
from walras.quantities import USD, BoolArray, Labels, Tasks, Uses
from walras.risk import CVaR, Expectation, FloatArray, MaxMin, RiskMeasure

Kind = Literal["budget", "mean_sla", "quantile_sla", "risk_envelope", "portfolio_envelope"]
Layer = Literal["compute", "latency", "risk"]
Numeraire = Literal["usd", "compute"]

_LAYER: dict[str, Layer] = {
    "budget": "compute",
    "mean_sla": "latency",
    "quantile_sla": "latency",
    "risk_envelope": "risk",
    "portfolio_envelope": "risk",
}


@dataclass(frozen=True, slots=True)
class Scope:
    """For whom a constraint holds. None means everybody; a window is [start, end) in seconds."""

    tenant: str | None = None
    task_class: str | None = None
    window: tuple[float, float] | None = None

    def __post_init__(self) -> None:
        if self.window is not None and not (
            np.isfinite(self.window).all() and self.window[0] < self.window[1]
        ):
            raise SettingsError(f"a time window must be finite and end after its start, got {self.window}")

    def members(self, tasks: Tasks) -> BoolArray | None:
        """Which tasks it covers, (N,); None when it covers all."""
        masks: list[BoolArray] = []
        if self.tenant is not None:
            masks.append(_labelled(tasks.tenant, self.tenant, "tenant"))
        if self.task_class is not None:
            masks.append(_labelled(tasks.task_class, self.task_class, "class"))
        if self.window is not None:
            if tasks.time is None:
                raise SettingsError(f"{self}: a time window needs tasks with a time column")
            start, end = self.window
            masks.append((tasks.time >= start) & (tasks.time < end))
        return np.logical_and.reduce(masks) if masks else None

    def __str__(self) -> str:
        parts = [self.tenant and f"tenant {self.tenant}", self.task_class and f"class {self.task_class}"]
        if self.window:
            parts.append(f"{self.window[0]:g}–{self.window[1]:g} s")
        return ", ".join(p for p in parts if p) or "all"


def _labelled(labels: Labels | None, name: str, what: str) -> BoolArray:
    if labels is None:
        raise SettingsError(f"a constraint names {what} '{name}', but the records have no {what}")
    return labels.equal(name)


@dataclass(frozen=True, slots=True)
class Constraint:
    """One row of the operator's programme:  Σ_x w_x Σ_i share_xi · charge_xi  ≤  limit.

    Kinds, `bound` and what is charged, per task in scope (mean):

    - ``budget``: at most `bound` units of `resource` per task.
    - ``mean_sla``: mean seconds over *served* tasks at most `bound`; charge = seconds − bound, limit 0.
    - ``quantile_sla``: share of served tasks later than `seconds` at most 1 − `quantile`;
      charge = P(seconds_xi > seconds) − (1 − quantile), limit 0; `bound` is the quantile's 1 − q.
    - ``risk_envelope``: mean risk per task at most `bound` (each use's own risk measure: conservative for CVaR).
    - ``portfolio_envelope``: `measure` of the whole portfolio's mean loss at most `bound`
      (Rockafellar–Uryasev for CVaR); charge = Σ_s density_s · loss_xis, the density found with the price.
    """

    kind: Kind
    bound: float
    scope: Scope = Scope()
    resource: str = USD
    seconds: float = 0.0
    measure: RiskMeasure | None = None
    density: tuple[float, ...] | None = None
    hard: bool = False
    """Lexicographic [Z-LEX]: met first, and never the one that an infeasible programme asks to relax."""
    exactly: bool = False
    """The bound must be met with equality (capacity that is paid for anyway); its price may then be negative."""

    def __post_init__(self) -> None:
        if self.kind not in _LAYER:
            raise SettingsError(f"'{self.kind}' is no kind of constraint", hint=nearest(self.kind, _LAYER))
        if not np.isfinite(self.bound) or self.bound < 0:
            raise SettingsError(f"the bound must be finite and ≥ 0, got {self.bound}", key=self.name)
        if self.kind == "quantile_sla" and not (0 < self.bound < 1 and self.seconds > 0):
            raise SettingsError(
                "a quantile SLA needs seconds > 0 and a quantile inside (0, 1)", key=self.name
            )
        if self.kind == "portfolio_envelope" and self.measure is None:
            raise SettingsError("a portfolio envelope needs a risk measure", key=self.name)

    @property
    def layer(self) -> Layer:
        """Which of the three prices of [Z-1] it adds to."""
        return _LAYER[self.kind]

    @property
    def unit(self) -> str:
        """Unit of its multiplier."""
        if self.kind == "budget":
            return "USD per USD" if self.resource == USD else f"USD per {self.resource}"
        return {
            "mean_sla": "USD per second",
            "quantile_sla": "USD per expected breach",
            "risk_envelope": "USD per unit of risk",
            "portfolio_envelope": "USD per USD of tail loss",
        }[self.kind]

    @property
    def name(self) -> str:
        """One readable line that identifies it."""
        what = ("exactly " if self.exactly else "") + {
            "budget": f"budget {self.bound:g} {self.resource}/task",
            "mean_sla": f"mean latency ≤ {self.bound:g} s",
            "quantile_sla": f"P(latency > {self.seconds:g} s) ≤ {self.bound:g}",
            "risk_envelope": f"risk ≤ {self.bound:g}/task",
            "portfolio_envelope": f"portfolio {_measure_name(self.measure)} ≤ {self.bound:g}/task",
        }[self.kind]
        return what if self.scope == Scope() else f"{what} ({self.scope})"

    def charge(self, uses: Uses) -> FloatArray:
        """What one unit of each use takes out of the constraint, (N, I), before the scope is applied."""
        match self.kind:
            case "budget":
                return uses.amount(self.resource)
            case "mean_sla":
                return uses.seconds - self.bound
            case "quantile_sla":
                return uses.late_share(self.seconds) - self.bound
            case "risk_envelope":
                return uses.risk
            case "portfolio_envelope":
                if uses.losses is None or self.density is None:
                    raise QuantityError(f"{self.name}: needs losses by scenario and a density")
                weighted: FloatArray = uses.losses @ np.asarray(self.density)
                return weighted

    @property
    def per_task_limit(self) -> float:
        """Right-hand side per task in scope: `bound` for what is summed, 0 for an SLA over served tasks."""
        return 0.0 if self.layer == "latency" else self.bound


def _measure_name(measure: RiskMeasure | None) -> str:
    match measure:
        case CVaR(alpha):
            return f"CVaR {alpha:g}"
        case MaxMin(beliefs):
            return f"max–min over {len(beliefs)} beliefs"
        case _:
            return "expected loss"


@dataclass(frozen=True, slots=True)
class Price:
    """A multiplier and the constraint that makes it."""

    constraint: Constraint
    multiplier: float

    def __post_init__(self) -> None:
        if not np.isfinite(self.multiplier) or (self.multiplier < 0 and not self.constraint.exactly):
            raise QuantityError(
                f"price of '{self.constraint.name}' is {self.multiplier}; it must be finite and ≥ 0"
            )


@dataclass(frozen=True, slots=True)
class Prices:
    """The price vector: declared prices of resources, plus one multiplier for each constraint.

    `numeraire="usd"` is the exact form: money counts itself, π_C = 1 + μ_C. `numeraire="compute"` is the paper's pure
    form π_C = μ_C with λ₀ = ρ₀ = 0, in which only a binding budget makes money scarce. `unit` is how many USD one
    unit of account is worth: it divides V and every price alike, so it changes no decision.
    """

    discovered: tuple[Price, ...] = ()
    declared: tuple[tuple[str, float], ...] = ((USD, 1.0),)
    """Declared USD per unit of each resource; resources not named here cost nothing by themselves."""
    numeraire: Numeraire = "usd"
    unit: float = 1.0

    def __post_init__(self) -> None:
        if not (np.isfinite(self.unit) and self.unit > 0):
            raise NumeraireError(f"the unit of account must be worth more than 0 USD, got {self.unit}")
        if self.numeraire not in ("usd", "compute"):
            raise QuantityError(f"the numéraire is 'usd' or 'compute', not '{self.numeraire}'")
        for resource, price in self.declared:
            if not (np.isfinite(price) and price >= 0):
                raise QuantityError(f"declared price of '{resource}' is {price}; it must be finite and ≥ 0")

    def multiplier(self, layer: Layer) -> float:
        """μ_C, μ_L or μ_R of the constraints that hold for everybody; scoped ones are listed in `discovered`."""
        everybody = (p for p in self.discovered if p.constraint.scope == Scope())
        return float(
            sum(
                p.multiplier
                for p in everybody
                if p.constraint.layer == layer and (layer != "compute" or p.constraint.resource == USD)
            )
        )

    @property
    def compute_price(self) -> float:
        """π_C, USD of surplus per USD of compute."""
        own = dict(self.declared).get(USD, 0.0) if self.numeraire == "usd" else 0.0
        return own + self.multiplier("compute")

    def normalised(self) -> Prices:
        """The display form (1, λ, ρ): the same prices with compute as the unit of account, V divided too.

        Raises:
            NumeraireError: when π_C = 0, as in the pure form with a slack budget.
        """
        if self.compute_price <= 0:
            raise NumeraireError(
                "compute has no price (μ_C = 0: its budget is slack), so it cannot be the numéraire; "
                "use numéraire usd, or declare a budget that binds"
            )
        return replace(self, unit=self.compute_price)

    def to_json(self) -> str:
        """Exact: floats are written so that reading gives back the same bits."""
        return json.dumps(asdict(self, dict_factory=_plain), allow_nan=False, ensure_ascii=False)

    @classmethod
    def from_json(cls, text: str) -> Prices:
        """Inverse of `to_json`.

        Raises:
            QuantityError: if the text is not a price vector.
        """
        try:
            data = json.loads(text)
            return cls(
                discovered=tuple(_price(p) for p in data["discovered"]),
                declared=tuple((name, price) for name, price in data["declared"]),
                numeraire=data["numeraire"],
                unit=data["unit"],
            )
        except (KeyError, TypeError, ValueError) as error:
            raise QuantityError(f"not a price vector: {error}") from error


def _plain(items: list[tuple[str, Any]]) -> dict[str, Any]:
    return dict(items)


def _price(data: dict[str, Any]) -> Price:
    row = dict(data["constraint"])
    window = row["scope"]["window"]
    row["scope"] = Scope(
        row["scope"]["tenant"], row["scope"]["task_class"], window and (window[0], window[1])
    )
    row["density"] = None if row["density"] is None else tuple(row["density"])
    row["measure"] = _measure(row["measure"])
    return Price(Constraint(**row), data["multiplier"])


def _measure(data: dict[str, Any] | None) -> RiskMeasure | None:
    if data is None:
        return None
    if "alpha" in data:
        return CVaR(data["alpha"])
    if "beliefs" in data:
        return MaxMin(tuple(tuple(row) for row in data["beliefs"]))
    return Expectation()
