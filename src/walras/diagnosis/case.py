"""A log and the operator's settings, made into an economy that can be audited."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np

from walras.equation import DEFER, surplus
from walras.errors import RecordError, SettingsError, nearest
from walras.market.clearing import Clearing, measure_usage
from walras.market.mix import Mix
from walras.market.shadow import OnPass, discover
from walras.prices import Constraint, Scope
from walras.quantities import USD, BoolArray, IntArray, Labels, Tasks, Uses
from walras.records import UNKNOWN, Log
from walras.risk import Expectation, FloatArray
from walras.settings import Economy

MOSTLY = 0.5
"""Share of complete tasks from which the incomplete ones are left out rather than audited with gaps."""


@dataclass(frozen=True, slots=True)
class Case:
    """Tasks, uses and constraints, and the choices under audit."""

    tasks: Tasks
    uses: Uses
    """`allowed` is False where an absolute rule forbids the use, or its outcome is unknown."""
    constraints: tuple[Constraint, ...]
    economy: Economy
    baseline: str
    """`realised`, a model's name, or `best fixed`."""
    chosen: IntArray
    """The audited choice, (N,), `DEFER` where none; its outcome is known."""
    measured: frozenset[str]
    """Columns per use that the log has; what it lacks is nobody's 0."""
    complete: bool
    """Whether every alternative's outcome is known; if not, regret is a lower bound."""
    left_out: int
    """Tasks of the log that are not audited."""
    synthetic: bool
    notes: tuple[str, ...]

    def take(self, rows: IntArray) -> Case:
        return replace(self, tasks=self.tasks.take(rows), uses=self.uses.take(rows), chosen=self.chosen[rows])

    def clear(
        self,
        *,
        defer: bool | None = None,
        start: FloatArray | None = None,
        on_pass: OnPass | None = None,
        xp: Any = None,
    ) -> Clearing:
        """Its prices by its own settings; see `market.shadow.discover`."""
        return discover(
            self.tasks,
            self.uses,
            self.constraints,
            defer=self.economy.defer if defer is None else defer,
            numeraire=self.economy.numeraire,
            declared=self.economy.declared(),
            start=start,
            on_pass=on_pass,
            xp=xp,
        )


def build_case(log: Log, economy: Economy, *, audited: bool = True) -> Case:
    """Make the economy; with `audited` off nobody's choices are looked for, and `chosen` is deferring everywhere.

    Raises:
        SettingsError: settings name a model, tenant, class or column the log does not have, or no value is given.
        RecordError: no task can be audited.
    """
    _check_names(log, economy)
    notes: list[str] = []
    known = _known_outcomes(log, economy)
    rows, columns = _audited(log, known, notes)
    left_out = len(log) - rows.size
    known = known[np.ix_(rows, columns)]
    log = _without_gaps(log.take(rows, columns), known, notes)
    tasks = _tasks(log, economy, notes)
    uses = _uses(log, economy, known & ~economy.forbidden(log.models, len(log), log.tenant, log.task_class))
    constraints = tuple(economy.constraints(_scope_sizes(tasks, economy)))
    baseline, chosen = "", np.full(len(log), DEFER, dtype=np.int64)
    if audited:
        baseline, chosen = _baseline(log, economy, tasks, uses, constraints, notes)
    return Case(
        tasks=tasks,
        uses=uses,
        constraints=constraints,
        economy=economy,
        baseline=baseline,
        chosen=chosen,
        complete=bool(known.all()),
        measured=frozenset(log.per_use) | ({"risk"} if economy.needs_losses else set()),
        left_out=left_out,
        synthetic=log.synthetic,
        notes=tuple(notes),
    )


def _check_names(log: Log, economy: Economy) -> None:
    models = [(f"{kind}.{name}.forbidden_models", m) for kind, name, m in economy.forbidden_models()]
    if economy.baseline not in (None, "realised"):
        models.append(("baseline", economy.baseline or ""))
    for key, model in models:
        if model not in log.models:
            raise SettingsError(f"the log has no model '{model}'", key=key, hint=nearest(model, log.models))
    for kind, names, labels in (
        ("tenants", economy.tenants, log.tenant),
        ("classes", economy.classes, log.task_class),
    ):
        known = labels.names if labels else ()
        for name in names:
            if name not in known:
                hint = nearest(name, known) if known else f"the log has no column for {kind}"
                raise SettingsError(f"the log has no '{name}'", key=f"{kind}.{name}", hint=hint)
    for column in _asked_for(economy):
        if column not in log.per_use:
            raise SettingsError(f"the settings price it, but the log has no column '{column}'", key=column)
    for name, resource in economy.resources.items():
        if resource.column not in log.per_use:
            raise SettingsError(
                f"the column '{resource.column}' is null in every row", key=f"resources.{name}.column"
            )
    if economy.needs_losses and log.losses is None:
        raise SettingsError("needs the column 'risk_scenarios'; the log has none", key="risk_measure")


def _asked_for(economy: Economy) -> set[str]:
    """Columns that the settings price or limit by name."""
    groups = [economy, *economy.tenants.values(), *economy.classes.values()]
    asked = {
        "latency_s": any(g.sla_s is not None or g.lambda0 for g in groups),
        "risk": any(g.risk is not None for g in groups) and not economy.needs_losses,
        "irreversible_risk": any(g.rho_irr for g in groups),
    }
    return {column for column, wanted in asked.items() if wanted}


# --- which outcomes are known, and which tasks are audited --------------------------------------------------------


def _known_outcomes(log: Log, economy: Economy) -> BoolArray:
    """An outcome is known when everything about it that has a price is."""
    priced = {"quality", "cost_usd", *(r.column for r in economy.resources.values()), *_asked_for(economy)}
    if not economy.needs_losses:
        priced.add("risk")  # ρ₀ is 1 unless declared otherwise
    known: BoolArray = np.logical_and.reduce(
        [~np.isnan(c) for name, c in log.per_use.items() if name in priced]
    )
    if economy.needs_losses and log.losses is not None:
        known = known & ~np.isnan(log.losses).any(axis=2)
    return known


def _gaps(log: Log) -> str:
    """Which columns are unknown in places, in words; empty where none is."""
    gaps = [name for name, column in log.per_use.items() if np.isnan(column).any()]
    return f"unknown in places: {', '.join(gaps)}" if gaps else ""


def _without_gaps(log: Log, known: BoolArray, notes: list[str]) -> Log:
    """The log without columns that have no price here and are unknown for some audited outcome."""
    gaps = [name for name, column in log.per_use.items() if np.isnan(column[known]).any()]
    if gaps:
        notes.append(f"not reported, unknown in places and not priced: {', '.join(gaps)}")
    return replace(log, per_use={name: column for name, column in log.per_use.items() if name not in gaps})


def _audited(log: Log, known: BoolArray, notes: list[str]) -> tuple[IntArray, IntArray]:
    """Rows (tasks) and columns (models) to audit; the notes say what is left out and why."""
    columns = np.flatnonzero(known.any(axis=0))
    if not columns.size:
        raise RecordError("no record has all of " + ", ".join(log.per_use) + "; nothing can be priced")
    dropped = [m for i, m in enumerate(log.models) if i not in columns]
    if dropped:
        notes.append(f"left out, no complete record: {', '.join(dropped)}")
    inside = known[:, columns]
    full: BoolArray = np.logical_and.reduce(inside, axis=1)
    some: BoolArray = np.logical_or.reduce(inside, axis=1)
    has_choice = log.chosen != UNKNOWN
    chosen_known = np.where(has_choice, known[np.arange(len(log)), np.maximum(log.chosen, 0)], True)
    if full.mean() >= MOSTLY:
        if not full.all():
            notes.append(
                f"{int((~full).sum())} tasks left out: the outcome of some model is unknown ({_gaps(log)})"
            )
        return _with_known_choice(full, chosen_known, notes), columns
    # A production log: what the other models would have given is mostly unknown.
    how_many = f"only {full.mean():.0%}" if full.any() else "none"
    notes.append(
        f"{how_many} of the tasks have every model's outcome: unknown alternatives are left out of the comparison. "
        "At given prices the regret shown is a lower bound; a price shown is what a limit is worth when the only "
        "alternatives are the known ones, which is too much. An attainable policy cannot be judged"
    )
    return _with_known_choice(some, chosen_known, notes), columns


def _with_known_choice(tasks: BoolArray, chosen_known: BoolArray, notes: list[str]) -> IntArray:
    """Those of `tasks` whose own choice can be audited: one without an outcome is not a deferred one."""
    lost = int((tasks & ~chosen_known).sum())
    if lost:
        notes.append(f"{lost} tasks left out: what the chosen model gave is unknown")
    audited = np.flatnonzero(tasks & chosen_known)
    if not audited.size:
        raise RecordError("no task has a known outcome of its chosen model")
    return audited


# --- tasks and uses -----------------------------------------------------------------------------------------------


def _tasks(log: Log, economy: Economy, notes: list[str]) -> Tasks:
    n = len(log)
    declared_for = partial(economy.per_task, n=n, tenant=log.tenant, task_class=log.task_class)
    value = declared_for("value", np.nan)
    declared = ~np.isnan(value)
    if log.value is not None and economy.value_column:
        value = np.where(np.isnan(log.value), value, log.value)
    elif log.value is not None:
        value = np.where(declared, value, log.value)
        if declared.any():
            where = "" if declared.all() else f" on {int(declared.sum())} tasks"
            notes.append(f"the log's own values are not used{where}: a value was declared")
    missing = int(np.isnan(value).sum())
    if missing:
        hint = "declare --value USD, or name a column: --value-column C"
        what = "no task has a value" if missing == n else f"{missing} of {n} tasks have no value"
        raise SettingsError(what, key="value", hint=hint)
    return Tasks(
        value=value,
        latency_price=declared_for("lambda0", 0.0),
        risk_price=declared_for("rho0", 1.0),
        irreversible_price=declared_for("rho_irr", 0.0),
        tenant=log.tenant,
        task_class=log.task_class,
        time=log.time,
    )


def _uses(log: Log, economy: Economy, allowed: BoolArray) -> Uses:
    names = (USD, *economy.resources)
    sources = ("cost_usd", *(r.column for r in economy.resources.values()))
    zero = np.zeros((1, 1))
    uses = Uses(
        names=log.models,
        quality=log.per_use["quality"],
        amounts=np.stack([log.per_use[source] for source in sources], axis=2),
        resources=names,
        seconds=log.per_use.get("latency_s", zero),
        risk=log.per_use.get("risk", zero),
        irreversible_risk=log.per_use.get("irreversible_risk", zero),
        losses=log.losses if economy.needs_losses else None,
        allowed=allowed,
    )
    if economy.needs_losses and economy.risk_over == "use":
        uses = uses.with_risk(economy.measure)
    elif economy.needs_losses and "risk" not in log.per_use:
        uses = uses.with_risk(Expectation())
    return uses


def _scope_sizes(tasks: Tasks, economy: Economy) -> dict[Scope, float]:
    scopes = [
        Scope(),
        *(Scope(tenant=t) for t in economy.tenants),
        *(Scope(task_class=c) for c in economy.classes),
    ]
    return {s: float(len(tasks) if (m := s.members(tasks)) is None else m.sum()) for s in scopes}


# --- what is audited ----------------------------------------------------------------------------------------------


def _baseline(
    log: Log, economy: Economy, tasks: Tasks, uses: Uses, constraints: Sequence[Constraint], notes: list[str]
) -> tuple[str, IntArray]:
    """Name and choices of the audited policy: as asked, else the log's own, else the best fixed model."""
    recorded = bool((log.chosen != UNKNOWN).any())
    name = economy.baseline or ("realised" if recorded else "best fixed")
    if name == "realised":
        if not recorded:
            hint = "a boolean column 'chosen' would say; or audit one model: --baseline MODEL"
            raise SettingsError("the log does not say what was chosen", key="baseline", hint=hint)
        unserved = int((log.chosen == UNKNOWN).sum())
        if unserved:
            notes.append(f"{unserved} tasks have no chosen model: taken as deferred")
        return name, np.where(log.chosen == UNKNOWN, DEFER, log.chosen)
    if name == "best fixed":
        fixed = best_fixed(tasks, uses, constraints, economy)
        if fixed is None:
            what = (
                "the log neither says what was chosen nor has one model with a complete record on every task"
            )
            raise SettingsError(what, key="baseline", hint=_gaps(log) or None)
        notes.append("the log does not say what was chosen: the best fixed model stands in for it")
        return name, np.full(len(log), fixed.use, dtype=np.int64)
    column = log.models.index(name)
    missing = int((~uses.allowed[:, column]).sum())
    if missing:
        what = f"it is forbidden, or its outcome is unknown, on {missing} tasks"
        raise SettingsError(what, key=f"baseline {name}")
    return name, np.full(len(log), column, dtype=np.int64)


@dataclass(frozen=True, slots=True)
class Fixed:
    """One model for every task."""

    use: int
    surplus: float
    """USD per task at declared prices."""
    feasible: bool
    """Whether it meets every constraint."""


def best_fixed(tasks: Tasks, uses: Uses, constraints: Sequence[Constraint], economy: Economy) -> Fixed | None:
    """The best single model among those that meet the constraints, or among all where none does; None if no model
    is open to every task."""
    worth = surplus(tasks, uses, economy.declared(), economy.numeraire)  # −∞ where not allowed
    total = tasks.weight @ worth / tasks.weight.sum()
    found = [
        Fixed(i, float(total[i]), _meets(tasks, uses, constraints, i))
        for i in np.flatnonzero(np.isfinite(total)).tolist()
    ]
    return max(found, key=lambda f: (f.feasible, f.surplus), default=None)


def _meets(tasks: Tasks, uses: Uses, constraints: Sequence[Constraint], use: int) -> bool:
    mix = Mix.pure(np.full(len(tasks), use, dtype=np.int64))
    return all(measure_usage(tasks, uses, c, mix).excess <= 1e-9 for c in constraints)


def by_label(labels: Labels | None) -> list[tuple[str, BoolArray]]:
    """(name, members) of each label that occurs."""
    if labels is None:
        return []
    groups = [(name, labels.codes == code) for code, name in enumerate(labels.names)]
    return [(name, mask) for name, mask in groups if mask.any()]
