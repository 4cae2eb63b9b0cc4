"""economy.toml: what tasks are worth, what may be spent, how late and how risky an answer may be.

The models below are the one table of settings: their fields' descriptions are the help of the command line, the
page docs/settings.md, and the validation.
"""

from __future__ import annotations

import tomllib
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from walras.errors import SettingsError, nearest
from walras.prices import Constraint, Numeraire, Scope
from walras.quantities import USD, BoolArray, Labels
from walras.risk import CVaR, Expectation, FloatArray, MaxMin, RiskMeasure

Amount = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Kind = Literal["chat", "embeddings"]
"""What a model makes. A request takes models of one kind only."""
EngineKind = Literal["vllm", "sglang", "trtllm", "triton", "dynamo"]
"""A serving engine whose metrics can be read."""


class _Table(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Group(_Table):
    """Worth and limits of some tasks: everybody's at the top level, or one tenant's or class's."""

    value: Amount | None = Field(None, description="V, what a task is worth: USD per unit of quality")
    lambda0: Amount | None = Field(
        None, description="λ₀, declared price of delay, USD per second (default 0)"
    )
    rho0: Amount | None = Field(
        None, description="ρ₀, declared price of risk, USD per unit of risk (default 1)"
    )
    rho_irr: Amount | None = Field(
        None, description="ρ_irr, declared extra price of irreversible risk, USD per unit (default 0) [Z-7b]"
    )
    budget_usd: Amount | None = Field(None, description="Budget, mean USD per task")
    budget_total_usd: Amount | None = Field(None, description="Budget, USD for all tasks together")
    sla_s: Amount | None = Field(
        None, description="SLA: mean seconds over served tasks, or a bound with sla_quantile"
    )
    sla_quantile: Annotated[float, Field(gt=0, lt=1)] | None = Field(
        None, description="Makes sla_s a quantile SLA: at least this share of served tasks within sla_s"
    )
    risk: Amount | None = Field(None, description="Risk envelope, mean risk per task (USD of expected loss)")

    @model_validator(mode="after")
    def _consistent(self) -> Group:
        if self.budget_usd is not None and self.budget_total_usd is not None:
            raise ValueError("give budget_usd (per task) or budget_total_usd (sum), not both")
        if self.sla_quantile is not None and not self.sla_s:
            raise ValueError("sla_quantile needs sla_s > 0, the bound it is about")
        return self


class Tenant(Group):
    """One tenant's own worth and limits."""

    forbidden_models: tuple[str, ...] = Field(
        (), description="Models no price can buy for this tenant [Z-LEX]"
    )


class TaskClass(Group):
    """One task class's own worth and limits."""

    forbidden_models: tuple[str, ...] = Field(
        (), description="Models no price can buy for this class [Z-LEX]"
    )


class Resource(_Table):
    """An amount per use besides money, read from a column of the log."""

    column: str = Field(description="Column of the log that holds the amount")
    price_usd: Amount = Field(0.0, description="Declared price, USD per unit")
    limit: Amount | None = Field(None, description="Most of it per task (mean)")
    hard: bool = Field(False, description="An absolute cap [Z-LEX]: met first, never relaxed")


class UpstreamSettings(_Table):
    """Who produces the tokens."""

    kind: Literal["openai", "anthropic", "simulated"] = Field(
        "openai", description="What it speaks; 'simulated' answers by itself, without a network"
    )
    base_url: str | None = Field(None, description="Where it is: https://api.example.com/v1")
    regions: dict[Annotated[str, Field(min_length=1)], str] = Field(
        default_factory=dict,
        description='Further such places by region, used in turn: { eu = "https://eu.api.example.com/v1" }',
    )
    key_env: tuple[str, ...] = Field(
        (), description="Environment variables that hold its API keys; used in turn"
    )
    connect_s: Amount = Field(5.0, description="Most seconds to connect")
    first_byte_s: Amount = Field(120.0, description="Most seconds until an answer begins")
    idle_s: Amount = Field(60.0, description="Most seconds between two bytes of an answer")
    total_s: Amount = Field(600.0, description="Most seconds for an answer")


class ModelSettings(_Table):
    """A model the gateway may use, and what is expected of it before it was seen at work."""

    upstream: str = Field(description="Name of the upstream that has it")
    upstream_model: str | None = Field(None, description="What it is called there (default: the same)")
    input_usd: Amount = Field(description="USD per million input tokens")
    cached_input_usd: Amount | None = Field(
        None, description="USD per million input tokens read from a cache (default: as input)"
    )
    cache_write_usd: Amount | None = Field(
        None, description="USD per million input tokens written to a cache (default: as input)"
    )
    output_usd: Amount = Field(description="USD per million output tokens")
    reasoning_usd: Amount | None = Field(
        None, description="USD per million output tokens of reasoning (default: as output)"
    )
    request_usd: Amount = Field(0.0, description="USD per request, besides its tokens")
    max_output_tokens: Annotated[int, Field(ge=1, le=1_000_000)] = Field(
        16_384, description="Most output tokens it makes: what is reserved, and asked for, at most"
    )
    kind: Kind = Field("chat", description="What it makes: answers, or embeddings for /v1/embeddings")
    engine: str | None = Field(
        None, description="Engine that runs it: a use pays for the delay of others there"
    )
    quality: Annotated[float, Field(ge=0, le=1)] = Field(0.5, description="Expected quality, 0 to 1")
    quality_by_class: dict[str, Annotated[float, Field(ge=0, le=1)]] = Field(
        default_factory=dict, description="The same by task class"
    )
    output_tokens: Amount = Field(500.0, description="Expected output tokens of a request")
    seconds: Amount = Field(5.0, description="Expected seconds of a request")
    risk_usd: Amount = Field(0.0, description="USD of expected loss from wrong actions in a request")


class EngineLink(_Table):
    """A serving engine whose congestion is priced."""

    urls: Annotated[tuple[str, ...], Field(min_length=1)] = Field(
        description="Where its metrics are, an address for each replica: http://127.0.0.1:8000"
    )
    kind: EngineKind | None = Field(None, description="What it is (default: what its metrics look like)")
    model: str | None = Field(None, description="Only metrics of this model count, of those that name one")
    profile: str | None = Field(
        None, description="Its step times: a name from `walras profiles`, or a file of measured steps"
    )
    kv_blocks: Annotated[int, Field(ge=1)] | None = Field(
        None, description="KV blocks of a replica (default: as exported, else the profile's)"
    )
    block_tokens: Annotated[int, Field(ge=1)] | None = Field(
        None, description="Tokens of a KV block (default: as exported, else 16)"
    )
    max_sequences: Annotated[int, Field(ge=1)] | None = Field(
        None, description="Sequences a replica runs at once (default: as exported, else the profile's)"
    )
    max_batched_tokens: Annotated[int, Field(ge=1)] | None = Field(
        None, description="New tokens in a step (default: as exported, else the profile's)"
    )
    replicas: Annotated[int, Field(ge=1)] = Field(
        1, description="Replicas that one address sums up, as a Dynamo frontend does"
    )
    poll_s: Annotated[float, Field(ge=0.1, le=3600)] = Field(2.0, description="Seconds between two readings")
    timeout_s: Annotated[float, Field(gt=0, le=60)] = Field(1.0, description="Most seconds for a reading")
    window_s: Annotated[float, Field(gt=0, le=3600)] = Field(
        30.0, description="Seconds that rates are taken over"
    )
    stale_s: Annotated[float, Field(gt=0, le=3600)] = Field(
        10.0, description="Seconds that prices hold after the last reading; then they decay to the fallback"
    )
    prefill_usd: Amount = Field(
        0.0, description="Fallback: USD of others' delay per million prompt tokens computed"
    )
    decode_usd: Amount = Field(0.0, description="Fallback: USD of others' delay per million output tokens")
    kv_block_s_usd: Amount = Field(
        0.0, description="Fallback: USD of others' delay per KV block held for a second"
    )


class GatewaySettings(_Table):
    """The service that `walras serve` runs."""

    host: str = Field("127.0.0.1", description="Address it listens on")
    port: Annotated[int, Field(ge=0, le=65535)] = Field(8790, description="Port; 0 takes a free one")
    budget_usd: Amount | None = Field(None, description="Most USD of all keys together by period")
    period: Literal["none", "minute", "hour", "day", "week", "month"] = Field(
        "day", description="Period of budgets, in UTC"
    )
    reclear_s: Annotated[float, Field(gt=0)] = Field(
        5.0, description="Seconds between two clearings of prices"
    )
    window: Annotated[int, Field(ge=1)] = Field(
        2000, description="Latest requests that prices are found from"
    )
    body_bytes: Annotated[int, Field(ge=1024)] = Field(16_000_000, description="Largest request body")
    log_level: Literal["debug", "info", "warning", "error"] = Field(
        "warning", description="What is logged: from 'info' on each request, as JSON on standard error"
    )
    keep_prompts: bool = Field(False, description="Whether the ledger keeps prompts, after redaction")
    redact: tuple[str, ...] = Field(
        (),
        description="Regular expressions of what else is blanked in kept prompts: secrets, e-mail addresses and card numbers always are",
    )


class MenuSettings(_Table):
    """The tiers to design [Z-5]."""

    types: str | None = Field(
        None,
        description="What requests are worth to users: uniform:LOW:HIGH, exponential:MEAN, lognormal:MEDIAN:SIGMA, "
        "or a file",
    )
    quality_cost: str | None = Field(
        None, description="What quality costs: quadratic (q²/2), a file of offerings, or a log"
    )
    objective: Literal["welfare", "revenue"] = Field(
        "welfare", description="What is made as large as possible: welfare, or revenue less cost"
    )
    tiers: Annotated[int, Field(ge=1, le=100)] = Field(4, description="Most tiers; people read 3 to 5")
    recover_usd: Amount = Field(
        0.0, description="Profit that objective 'welfare' must leave, USD per request: fixed costs"
    )
    family: Literal["empirical", "lognormal", "exponential", "uniform"] | None = Field(
        None, description="Law fitted to a sample of types (default empirical) or to choices (lognormal)"
    )


class Economy(Group):
    """Everything an operator declares."""

    value_column: str | None = Field(None, description="Column of the log that holds each task's value")
    defer: bool = Field(True, description="Whether a task may get no use at all, at surplus 0")
    baseline: str | None = Field(
        None, description="What is audited: a model's name, or 'realised' for the choices in the log"
    )
    numeraire: Numeraire = Field(
        "usd", description="'usd' (money counts itself) or 'compute' (the pure form)"
    )
    risk_measure: Literal["expectation", "cvar", "max-min"] = Field(
        "expectation", description="How losses by scenario are valued [Z-K]"
    )
    risk_alpha: Annotated[float, Field(ge=0, lt=1)] = Field(0.95, description="α of risk_measure 'cvar'")
    risk_beliefs: tuple[tuple[Amount, ...], ...] | None = Field(
        None, description="Scenario distributions of risk_measure 'max-min', one row each"
    )
    risk_over: Literal["use", "portfolio"] = Field(
        "use",
        description="Whether the measure values each use (conservative) or the envelope's whole portfolio",
    )
    tenants: dict[str, Tenant] = Field(default_factory=dict, description="Tables by tenant")
    classes: dict[str, TaskClass] = Field(default_factory=dict, description="Tables by task class")
    resources: dict[str, Resource] = Field(default_factory=dict, description="Tables by resource")
    models: dict[str, ModelSettings] = Field(default_factory=dict, description="Tables by model")
    upstreams: dict[str, UpstreamSettings] = Field(default_factory=dict, description="Tables by upstream")
    engines: dict[str, EngineLink] = Field(default_factory=dict, description="Tables by serving engine")
    gateway: GatewaySettings = Field(
        default_factory=lambda: GatewaySettings.model_validate({}), description="Table of the service"
    )
    menu: MenuSettings = Field(
        default_factory=lambda: MenuSettings.model_validate({}), description="Table of the menu to design"
    )
    columns: dict[str, str] = Field(
        default_factory=dict, description="Names of the log's columns: schema column = column of the log"
    )

    @model_validator(mode="after")
    def _measure_complete(self) -> Economy:
        if self.risk_measure == "max-min" and not self.risk_beliefs:
            raise ValueError("risk_measure 'max-min' needs risk_beliefs")
        for name, model in self.models.items():
            if model.upstream not in self.upstreams:
                raise ValueError(
                    f"models.{name}: no upstream '{model.upstream}'; there are: {', '.join(self.upstreams) or 'none'}"
                )
            if model.engine is not None and model.engine not in self.engines:
                there = ", ".join(self.engines) or "none"
                raise ValueError(f"models.{name}: no engine '{model.engine}'; there are: {there}")
            if model.kind == "embeddings" and self.upstreams[model.upstream].kind == "anthropic":
                raise ValueError(f"models.{name}: Anthropic's API has no embeddings; name another upstream")
        for name, upstream in self.upstreams.items():
            if upstream.kind != "simulated" and not (upstream.base_url or upstream.regions):
                what = "needs base_url, for example https://api.example.com/v1, or regions"
                raise ValueError(f"upstreams.{name}: {what}")
        if USD in self.resources:
            raise ValueError("the resource 'usd' is the column cost_usd; use budget_usd")
        return self

    @property
    def measure(self) -> RiskMeasure:
        """The risk measure that was asked for."""
        match self.risk_measure:
            case "cvar":
                return CVaR(self.risk_alpha)
            case "max-min":
                return MaxMin(self.risk_beliefs or ())
            case "expectation":
                return Expectation()

    @property
    def needs_losses(self) -> bool:
        """Whether losses by scenario are read at all."""
        return self.risk_measure != "expectation"

    def declared(self) -> tuple[tuple[str, float], ...]:
        """Declared USD per unit of each resource, money first."""
        return ((USD, 1.0), *((name, r.price_usd) for name, r in self.resources.items()))

    def per_task(
        self, key: str, default: float, n: int, tenant: Labels | None, task_class: Labels | None
    ) -> FloatArray:
        """One declared number per task, (N,): the class's own, else the tenant's, else everybody's."""
        everybody = getattr(self, key)
        column = np.full(n, default if everybody is None else everybody)
        for labels, groups in ((tenant, self.tenants), (task_class, self.classes)):
            for name, group in groups.items():
                own = getattr(group, key)
                if own is not None and labels is not None:
                    column[labels.equal(name)] = own
        return column

    def forbidden_models(self) -> list[tuple[str, str, str]]:
        """(kind of group, its name, model) of each absolute rule."""
        kinds = (("tenants", self.tenants), ("classes", self.classes))
        return [
            (kind, name, m)
            for kind, groups in kinds
            for name, g in groups.items()
            for m in g.forbidden_models
        ]

    def forbidden(
        self, models: Sequence[str], n: int, tenant: Labels | None, task_class: Labels | None
    ) -> BoolArray:
        """[Z-LEX] uses no price can buy, (N, I)."""
        mask = np.zeros((n, len(models)), dtype=np.bool_)
        for kind, name, model in self.forbidden_models():
            labels = tenant if kind == "tenants" else task_class
            if labels is not None and model in models:
                mask[labels.equal(name), models.index(model)] = True
        return mask

    def constraints(self, tasks_in: dict[Scope, float]) -> list[Constraint]:
        """The rows these settings ask for. `tasks_in` gives how many tasks a scope holds (budgets given as sums)."""
        rows: list[Constraint] = []
        scopes: list[tuple[Scope, Group]] = [(Scope(), self)]
        scopes += [(Scope(tenant=name), group) for name, group in self.tenants.items()]
        scopes += [(Scope(task_class=name), group) for name, group in self.classes.items()]
        for scope, group in scopes:
            rows += self._rows(scope, group, tasks_in.get(scope, 0.0))
        for name, resource in self.resources.items():
            if resource.limit is not None:
                rows.append(Constraint("budget", resource.limit, resource=name, hard=resource.hard))
        return rows

    def _rows(self, scope: Scope, group: Group, tasks: float) -> list[Constraint]:
        rows = []
        budget = group.budget_usd
        if group.budget_total_usd is not None and tasks:
            budget = group.budget_total_usd / tasks
        if budget is not None:
            rows.append(Constraint("budget", budget, scope))
        if group.sla_s is not None and group.sla_quantile is None:
            rows.append(Constraint("mean_sla", group.sla_s, scope))
        elif group.sla_s is not None and group.sla_quantile is not None:
            rows.append(Constraint("quantile_sla", 1 - group.sla_quantile, scope, seconds=group.sla_s))
        if group.risk is not None and self.risk_over == "portfolio" and self.needs_losses:
            rows.append(Constraint("portfolio_envelope", group.risk, scope, measure=self.measure))
        elif group.risk is not None:
            rows.append(Constraint("risk_envelope", group.risk, scope))
        return rows


def load_economy(path: Path | None, overrides: dict[str, Any]) -> Economy:
    """Settings from a file, if any, with `overrides` (the command line) on top; None overrides nothing.

    Overrides of the tables `columns` and `menu` are merged key by key.

    Raises:
        SettingsError: unreadable file, unknown key (with the nearest known one), or a value out of range.
    """
    data: dict[str, Any] = {}
    if path is not None:
        try:
            data = tomllib.loads(path.read_text(encoding="utf-8"))
        except OSError as error:
            raise SettingsError(f"cannot be read: {error.strerror}", key=str(path)) from error
        except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
            raise SettingsError(f"is not TOML: {error}", key=str(path)) from error
    given = {key: value for key, value in overrides.items() if value is not None}
    # The command line may state the same limit in the other unit: the file's one gives way.
    for a, b in (("budget_usd", "budget_total_usd"), ("budget_total_usd", "budget_usd")):
        if a in given and b not in given:
            data.pop(b, None)
    if path is not None:
        _beside(path, data.get("menu"))
    for table in ("columns", "menu"):
        own = given.pop(table, {})
        if own:
            in_file = data.get(table, {})
            data[table] = {**in_file, **own} if isinstance(in_file, dict) else in_file
    try:
        return Economy.model_validate({**data, **given})
    except ValidationError as error:
        raise _explain(error, path, given) from error


def _beside(path: Path, menu: object) -> None:
    """Files that the menu's table names lie beside the settings file, wherever the command is run."""
    if isinstance(menu, dict):
        for key in ("types", "quality_cost"):
            if isinstance(menu.get(key), str) and (path.parent / menu[key]).is_file():
                menu[key] = str(path.parent / menu[key])


def _explain(error: ValidationError, path: Path | None, options: Collection[str]) -> SettingsError:
    first = error.errors()[0]
    where = [str(part) for part in first["loc"]]
    key = f"{path}: {'.'.join(where)}" if path else ".".join(where)
    if len(where) == 1 and where[0] in options:
        key = "--" + where[0].replace("_", "-")
    if first["type"] == "extra_forbidden":
        table: type[BaseModel] = Economy
        tables: dict[str, type[BaseModel]] = {
            "tenants": Tenant,
            "classes": TaskClass,
            "resources": Resource,
            "models": ModelSettings,
            "upstreams": UpstreamSettings,
            "engines": EngineLink,
            "gateway": GatewaySettings,
            "menu": MenuSettings,
        }
        for part in where[:-1]:
            table = tables.get(part, table)
        return SettingsError("unknown setting", key=key, hint=nearest(where[-1], table.model_fields))
    return SettingsError(
        first["msg"].removeprefix("Value error, "), key=key if where else str(path or "settings")
    )


def settings_rows() -> list[tuple[str, str, str, str]]:
    """(key, type, default, meaning) of every setting, tables included: the docs page and `walras settings`."""
    rows = _describe(Economy, "")
    for prefix, table in (
        ("tenants.NAME.", Tenant),
        ("classes.NAME.", TaskClass),
        ("resources.NAME.", Resource),
        ("menu.", MenuSettings),
        ("models.NAME.", ModelSettings),
        ("upstreams.NAME.", UpstreamSettings),
        ("engines.NAME.", EngineLink),
        ("gateway.", GatewaySettings),
    ):
        rows += _describe(table, prefix)
    return rows


def _describe(table: type[BaseModel], prefix: str) -> list[tuple[str, str, str, str]]:
    rows = []
    properties = table.model_json_schema()["properties"]
    for name, info in table.model_fields.items():
        schema = properties[name]
        types = [s.get("type", "table") for s in schema.get("anyOf", [schema])]
        choices = schema.get("enum")
        kind = " | ".join(map(str, choices)) if choices else " | ".join(t for t in types if t != "null")
        empty = (
            info.is_required()
            or info.default is None
            or info.default_factory is not None
            or info.default == ()
        )
        default = (
            ""
            if empty
            else str(info.default).lower()
            if isinstance(info.default, bool)
            else str(info.default)
        )
        rows.append((prefix + name, kind.replace("object", "table"), default, info.description or ""))
    return rows
