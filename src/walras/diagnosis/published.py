"""A menu to publish: what requests are worth, what quality costs, the tiers that follow, and how sure one can be. [Z-5]

Both may come from a table, or from a log: what requests are worth from its values, what quality costs from its models, or
from a learned router that takes each tier's type for what the request is worth.
"""

from __future__ import annotations

import csv
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from walras.demand.check import Checked, check
from walras.demand.effort import Policies, cross_fitted_uses, policies
from walras.demand.few_tiers import CappedMenu, cap
from walras.demand.menu import Menu, design
from walras.demand.menu_spread import MenuSpread, menu_spread
from walras.demand.offerings import Offerings, Quadratic, Technology
from walras.demand.screening import Grid, screen
from walras.diagnosis.case import build_case
from walras.equation import net_value
from walras.errors import RecordError, SettingsError
from walras.estimate.estimates import requests_of
from walras.estimate.near import families
from walras.estimate.type_laws import LAWS, Atoms, TypeLaw, parse_law
from walras.estimate.willingness import (
    Evidence,
    Family,
    FittedLaw,
    bootstrap_laws,
    choices_to_evidence,
    fit_law,
)
from walras.prices import Prices
from walras.quantities import Tasks, Uses
from walras.records import Log
from walras.records.menus import (
    ChoiceTable,
    LawTable,
    OfferingTable,
    RangeTable,
    SampleTable,
    read_menu,
    read_offerings,
    read_types,
)
from walras.risk import FloatArray
from walras.settings import Economy, MenuSettings

DRAWS = 100
"""Bootstrap laws under which a menu is designed anew."""
POLICIES = 60
"""Values at which a router is tried as a tier."""

OnStep = Callable[[str], None]
ReadLog = Callable[[Path, Economy, bool], Log]
"""A log, with prompts where the flag says so."""


@dataclass(frozen=True, slots=True)
class Whose:
    """What requests are worth: a law, or the types on a grid, and what that rests on."""

    spec: str
    law: TypeLaw | Grid
    evidence: Evidence | None = None
    fitted: FittedLaw | None = None
    synthetic: bool = False


@dataclass(frozen=True, slots=True)
class Made:
    """What quality costs, and what that rests on."""

    spec: str
    technology: Technology
    errors: tuple[FloatArray, FloatArray] | None = None
    """Standard errors of quality and cost, (I,) each, where a log was read."""
    synthetic: bool = False


@dataclass(frozen=True, slots=True)
class Published:
    """What `walras menu` reports."""

    menu: Menu | CappedMenu
    whose: Whose
    made: Made
    checked: Checked | None
    """Found anew from the tiers alone, with who is downgraded; None on a grid, whose menu is checked type by type."""
    spread: MenuSpread | None
    """How the menu moves with the error of an estimated law."""
    idle: tuple[str, ...]
    """Offerings that are never worth a tier: a mixture of others costs less."""

    @property
    def synthetic(self) -> bool:
        """Whether any of it comes from a log that was made up."""
        return self.whose.synthetic or self.made.synthetic


def publish(
    economy: Economy,
    read: ReadLog,
    *,
    prices: Prices | None = None,
    offered: Path | None = None,
    routed: bool = False,
    seed: int = 0,
    on_step: OnStep | None = None,
) -> Published:
    """Design the menu that the settings' table `menu` asks for.

    Args:
        read: reads a log; the command line shows its progress.
        prices: live prices of what offerings take; by default money and resources at what the settings declare.
        offered: the menu past choices were made from, where `types` is a table of choices.
        routed: tiers route inside, by a router learned from the log that `quality_cost` names.

    Raises:
        SettingsError, RecordError: no types or no technology, or such as cannot be read.
        InfeasibleError: no menu recovers the cost.
    """
    step, wanted = on_step or (lambda _: None), economy.menu
    whose = _whose(economy, read, offered)
    step("what quality costs")
    made = _made(economy, read, prices or Prices(declared=economy.declared()), routed, seed)
    technology = made.technology
    step("designing")
    if isinstance(whose.law, Grid):
        best = _on_grid(whose.law, technology, wanted)
        return Published(best, whose, made, None, None, ())

    def once(law: TypeLaw) -> Menu:
        return design(
            law,
            technology,
            objective=wanted.objective,
            tiers=wanted.tiers,
            recover=wanted.recover_usd,
        )

    menu = once(whose.law)
    spread = None
    if whose.evidence is not None and whose.fitted is not None:
        step(f"designing again under {DRAWS} resampled laws")
        laws = bootstrap_laws(whose.evidence, whose.fitted.family, DRAWS, seed)
        spread = menu_spread(once, menu, laws)
    checked = check(menu.tiers, whose.law, technology, latency_price=technology.latency_price)
    idle: tuple[str, ...] = ()
    if isinstance(technology, Offerings):
        idle = tuple(n for i, n in enumerate(technology.names) if i not in technology.hull)
    return Published(menu, whose, made, checked, spread, idle)


def _on_grid(types: Grid, technology: Technology, wanted: MenuSettings) -> CappedMenu:
    if not isinstance(technology, Offerings):
        raise SettingsError("types that mind delay need offerings with seconds", key="quality_cost")
    if technology.latency_price:
        raise SettingsError("says what delay costs users, and so does the table of types", key="lambda0")
    best = screen(
        types,
        technology.quality,
        technology.seconds,
        technology.cost,
        objective=wanted.objective,
        recover=wanted.recover_usd,
        names=technology.names,
    )
    return cap(best, wanted.tiers)


def check_file(path: Path, economy: Economy, read: ReadLog, tolerance: float) -> Checked:
    """Check a menu in a file, at the types and the technology of the settings, or else of the file.

    Raises:
        RecordError: a file that is no menu; names the row and the tier.
        SettingsError: types or a technology that do not fit the menu.
    """
    menu = read_menu(path)
    types, made = economy.menu.types, economy.menu.quality_cost
    if types is None and menu.types is not None and menu.types.partition(":")[0] in LAWS:
        types = menu.types
    if made is None and menu.quality_cost == "quadratic":
        made = menu.quality_cost
    both = economy.menu.model_copy(update={"types": types, "quality_cost": made})
    delay = _or(economy.lambda0, menu.lambda0)
    economy = economy.model_copy(update={"menu": both, "lambda0": delay})
    law = None if types is None else _whose(economy, read, None).law
    technology = None
    if made is not None:
        technology = _made(economy, read, Prices(declared=economy.declared()), False, 0).technology
    return check(menu, law, technology, latency_price=delay, tolerance=tolerance)


# --- what requests are worth ------------------------------------------------------------------------------------------


def _law_of(spec: str) -> TypeLaw | None:
    """The law that `spec` spells out; None where it names a file."""
    return parse_law(spec) if spec.partition(":")[0] in LAWS or not Path(spec).suffix else None


def _whose(economy: Economy, read: ReadLog, offered: Path | None) -> Whose:
    spec, family = economy.menu.types, economy.menu.family
    if spec is None:
        hint = "uniform:LOW:HIGH, exponential:MEAN, lognormal:MEDIAN:SIGMA, a table of types or a log with values"
        raise SettingsError("says what requests are worth, and is missing", key="types", hint=hint)
    law: TypeLaw | Grid | None = _law_of(spec)
    if law is None:
        path = Path(spec)
        log = read(path, economy, False) if _is_log(path) else None
        table = read_types(path) if log is None else _values(log, economy)
        if offered is not None and not isinstance(table, ChoiceTable):
            raise SettingsError("is for a table of choices, with a column tier", key="offered")
        if not isinstance(table, LawTable):
            try:
                whose = _fitted(spec, _evidence(table, offered), family)
            except RecordError as error:
                if error.path is None:
                    raise RecordError(str(error), path=path) from error
                raise
            return replace(whose, synthetic=log is not None and log.synthetic)
        if table.latency_price is not None:
            law = Grid(table.value, table.latency_price, table.probability)
        else:
            law = Atoms(table.value, table.probability, spec)
    if family is not None:
        raise SettingsError("is for a sample or for choices, and these types are a law", key="family")
    if offered is not None:
        raise SettingsError("is for a table of choices, with a column tier", key="offered")
    return Whose(spec, law)


def _is_log(path: Path) -> bool:
    """Whether a file is a log rather than a table: by its suffix, or by a CSV's columns."""
    if path.suffix.lower() != ".csv":
        return True
    try:
        with path.open(encoding="utf-8-sig", errors="replace", newline="") as file:
            header = {name.strip().lower() for name in next(csv.reader(file), [])}
    except OSError as error:
        raise RecordError(f"cannot be read: {error.strerror}", path=path) from error
    return {"request_id", "model"} <= header


def _values(log: Log, economy: Economy) -> SampleTable:
    """What each task of a log is worth, by the settings or by the log."""
    tasks = build_case(log, economy, audited=False).tasks
    tenant = None
    if tasks.tenant is not None and len(tasks.tenant.names) > 1:
        tenant = tuple(tasks.tenant.names[c] if c >= 0 else "" for c in tasks.tenant.codes)
    return SampleTable(tasks.value, tenant)


def _evidence(table: SampleTable | RangeTable | ChoiceTable, offered: Path | None) -> Evidence:
    tenant = None
    if table.tenant is not None:
        names = sorted(set(table.tenant) - {""})
        at = {name: code for code, name in enumerate(names)} | {"": -1}
        tenant = np.array([at[name] for name in table.tenant], dtype=np.int64)
    if isinstance(table, SampleTable):
        return Evidence.exact(table.value, tenant)
    if isinstance(table, RangeTable):
        return Evidence(table.low, table.high, tenant)
    if offered is None:
        raise SettingsError(
            "is missing: choices say nothing without the menu they were made from", key="offered"
        )
    menu = read_menu(offered)
    order = np.argsort(menu.quality, kind="stable")
    names_of = [menu.name[i] for i in order]
    chosen = np.full(len(table.tier), -1, dtype=np.int64)
    for row, name in enumerate(table.tier):
        if name and name not in names_of:
            raise RecordError(f"'{name}' is not a tier of {offered}", row=row + 1, field="tier")
        chosen[row] = names_of.index(name) if name else -1
    return choices_to_evidence(chosen, menu.quality[order], menu.price[order], names_of, tenant)


def _fitted(spec: str, evidence: Evidence, family: Family | None) -> Whose:
    exact = bool((evidence.low == evidence.high).all())
    found = fit_law(evidence, family or ("empirical" if exact else "lognormal"))
    return Whose(spec, found.law, evidence, found)


# --- what quality costs -----------------------------------------------------------------------------------------------


def _made(economy: Economy, read: ReadLog, prices: Prices, routed: bool, seed: int) -> Made:
    spec = economy.menu.quality_cost
    if spec is None:
        hint = "quadratic, a table with quality and cost, or a log"
        raise SettingsError("says what quality costs, and is missing", key="quality_cost", hint=hint)
    if spec == "quadratic":
        if routed:
            raise SettingsError("needs a log for its quality and cost", key="routed")
        return Made(spec, Quadratic(_or(economy.lambda0, 0.0)))
    path = Path(spec)
    if _is_log(path):
        return _from_log(spec, read(path, economy, routed), economy, prices, routed, seed)
    if routed:
        raise SettingsError("needs a log for its quality and cost", key="routed")
    return Made(spec, _priced(read_offerings(path), economy, prices))


def _priced(table: OfferingTable, economy: Economy, prices: Prices) -> Offerings:
    """A table of offerings at the given prices of what they take.

    Raises:
        SettingsError: a resource is priced that the table has no column for, or prices pay for taking an offering.
    """
    amounts = [table.cost]
    for name, resource in economy.resources.items():
        if resource.column not in table.amounts:
            what = f"the table of offerings has no column '{resource.column}'"
            raise SettingsError(what, key=f"resources.{name}.column")
        amounts.append(table.amounts[resource.column])
    uses = Uses(
        names=table.name,
        quality=table.quality[None],
        amounts=np.stack(amounts, axis=1)[None],
        resources=("usd", *economy.resources),
        seconds=table.seconds[None],
        risk=table.risk[None],
    )
    task = Tasks(value=np.zeros(1), risk_price=np.array([_or(economy.rho0, 1.0)]))
    cost = -net_value(task, uses, prices)[0]
    return _offerings(table.name, table.quality, cost, table.seconds, economy)


def _or(declared: float | None, default: float) -> float:
    return default if declared is None else declared


def _offerings(
    names: tuple[str, ...], quality: FloatArray, cost: FloatArray, seconds: FloatArray, economy: Economy
) -> Offerings:
    if (cost < 0).any():
        what = f"'{names[int(cost.argmin())]}' costs {cost.min():g} USD at these prices: an SLA pays for taking it"
        raise SettingsError(what, key="prices", hint="price a menu without the SLA")
    return Offerings(names, quality, cost, seconds, _or(economy.lambda0, 0.0))


def _from_log(spec: str, log: Log, economy: Economy, prices: Prices, routed: bool, seed: int) -> Made:
    """Models by their means over the requests that all of them answered, or policies of a learned router."""
    known = [~np.isnan(log.per_use[name]) for name in ("quality", "cost_usd")]
    whole = log.take(np.flatnonzero((known[0] & known[1]).all(axis=1)), np.arange(len(log.models)))
    if len(whole) < 2:
        what = "no two requests have every model's quality and cost, so models cannot be compared"
        raise RecordError(what, path=spec, hint="give a table of offerings")
    valued = economy.model_copy(update={"value": 1.0, "value_column": None, "baseline": None})
    case = build_case(whole, valued, audited=False)
    if case.uses.shape != whole.per_use["quality"].shape:
        raise RecordError("what is priced is unknown for some outcomes", path=spec, hint=case.notes[0])
    open_to_all = np.flatnonzero(case.uses.allowed.all(axis=0))
    tasks = replace(
        case.tasks, value=np.zeros(len(whole)), latency_price=np.zeros(1)
    )  # what uses cost, no more
    quality, cost = case.uses.quality[:, open_to_all], -net_value(tasks, case.uses, prices)[:, open_to_all]
    if routed:
        resources = {name: resource.column for name, resource in economy.resources.items()}
        family = families(requests_of(whole).texts)
        believed = cross_fitted_uses(whole, seed=seed, family=family, resources=resources)
        expected = believed.quality[:, open_to_all], -net_value(tasks, believed, prices)[:, open_to_all]
        found = _policies(expected, (quality, cost), case.uses.seconds[:, open_to_all])
        offered = found.offerings
        made = _offerings(offered.names, offered.quality, offered.cost, offered.seconds, economy)
        return Made(spec, made, (found.quality_error, found.cost_error), log.synthetic)
    names = tuple(whole.models[i] for i in open_to_all)
    seconds = case.uses.seconds[:, open_to_all].mean(axis=0)
    made = _offerings(names, quality.mean(axis=0), cost.mean(axis=0), seconds, economy)
    errors = (_standard_error(quality), _standard_error(cost))
    return Made(spec, made, errors, log.synthetic)


def _standard_error(column: FloatArray) -> FloatArray:
    error: FloatArray = column.std(axis=0, ddof=1) / np.sqrt(len(column))
    return error


def _policies(
    expected: tuple[FloatArray, FloatArray], true: tuple[FloatArray, FloatArray], seconds: FloatArray
) -> Policies:
    """Routers at values from where the cheapest model is first worth taking to where only quality counts."""
    quality, cost = (column.mean(axis=0) for column in true)
    alone = Offerings(tuple(map(str, range(cost.size))), quality, cost)
    steps = np.diff(cost[alone.hull], prepend=0.0) / np.diff(quality[alone.hull], prepend=0.0)
    positive = steps[steps > 0]
    low, high = (float(positive.min()), float(positive.max())) if positive.size else (1.0, 1.0)
    return policies(*expected, *true, np.geomspace(low / 10, high * 10, POLICIES), seconds=seconds)
