"""Read an economy from TOML or JSON: Walras's own format, and published exchange and activity-analysis files as they are.

Our own:

    goods = ["prefill", "decode", "gpu"]
    supply = { gpu = 8 }                       # what the operator sells for the tenants' budgets

    [[tenants]]
    name = "search"
    budget = 25                                # USD; and, or instead, endowment = { gpu = 1 }
    utility = { kind = "ces", shares = { prefill = 0.7, decode = 0.3 }, elasticity = 0.5 }

    [[activities]]                             # net output of one unit; inputs negative
    name = "prefill engine"
    net = { gpu = -1, prefill = 8000 }

    [[sectors]]                                # Q = φ [Σ δ F^((σ−1)/σ)]^(σ/(σ−1)), at least cost
    name = "decode engine"
    output = "decode"
    phi = 900
    delta = { gpu = 0.6, prefill = 0.4 }
    elasticity = 0.5

    [[engines]]                                # the corners of a serving engine's frontier, one worker for a second
    name = "h100"
    profile = "h100-qwen3-32b-tp8"             # of `walras profiles`
    input = "gpu"                              # a unit is one worker
    prefill = "prefill"                        # tokens a second
    decode = "decode"
    context = 2000                             # KV tokens of a decoding sequence

Utilities: "ces" (shares, elasticity, and if need be subsistence), "cobb-douglas" (shares), "leontief" (shares: units used
together), "linear" (weights), "quasi-linear" (sum, like "gpu - (1/8) decode^(-8)"). Amounts go by the names of goods, or as a
list of one number a good. Every error names file and field.
"""

from __future__ import annotations

import json
import tomllib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from walras.engine.profiles import load_profile
from walras.engine.settings import EngineSettings
from walras.errors import QuantityError, RecordError, SettingsError, WalrasError, nearest
from walras.market.tenants.economy import Economy, Sector, Tenant
from walras.market.tenants.frontier import engine_frontier
from walras.market.tenants.utility import CES, Linear, QuasiLinear, Utility
from walras.risk import FloatArray

UTILITIES = ("ces", "cobb-douglas", "leontief", "linear", "quasi-linear")


def read_economies(path: Path) -> dict[str, Economy]:
    """The economies of a file by name; only a published Fisher file holds more than one.

    Raises:
        RecordError: the file cannot be read, or is not TOML or JSON.
        SettingsError: a field is missing, unknown or of the wrong kind.
        QuantityError: the numbers cannot be an economy.
    """
    top = _Fields(path.name, "", _document(path))
    try:
        kind = top.text("kind") if "kind" in top.table else "tenants"
        if kind not in _FORMATS:
            raise top.wrong("kind", f"'{kind}' is no kind of economy", nearest(kind, _FORMATS))
        return dict(_FORMATS[kind](top))
    except QuantityError as error:
        raise QuantityError(f"{path.name}: {error}") from error


def _document(path: Path) -> dict[str, Any]:
    try:
        text = path.read_text(encoding="utf-8")
        document = tomllib.loads(text) if path.suffix == ".toml" else json.loads(text)
    except OSError as error:
        raise RecordError(f"cannot be read: {error.strerror}", path=path) from error
    except UnicodeDecodeError as error:
        raise RecordError("is not text in UTF-8", path=path) from error
    except ValueError as error:
        raise RecordError(
            f"is not {'TOML' if path.suffix == '.toml' else 'JSON'}: {error}", path=path
        ) from error
    if not isinstance(document, dict):
        raise RecordError("holds no table of fields", path=path, hint="see the tenants format")
    return document


@dataclass(frozen=True, slots=True)
class _Fields:
    """A table of a file, which knows where it stands."""

    file: str
    at: str
    table: Mapping[str, Any]

    def wrong(self, key: str, problem: str, hint: str | None = None) -> SettingsError:
        return SettingsError(problem, key=f"{self.file}, {self.at}{key}", hint=hint)

    def get(self, key: str) -> Any:
        if key not in self.table:
            raise self.wrong(key, "is missing", f"there are: {', '.join(self.table) or 'no fields'}")
        return self.table[key]

    def only(self, *known: str) -> None:
        for key in self.table:
            if key not in known:
                raise self.wrong(key, "is not a field of the format", nearest(key, known))

    def text(self, key: str) -> str:
        value = self.get(key)
        if not isinstance(value, str):
            raise self.wrong(key, f"must be text, not {value!r}")
        return value

    def number(self, key: str, default: float | None = None) -> float:
        return _number(self, key, self.get(key) if default is None or key in self.table else default)

    def inner(self, key: str) -> _Fields:
        value = self.get(key)
        if not isinstance(value, dict):
            raise self.wrong(key, f"must be a table of fields, not {value!r}")
        return _Fields(self.file, f"{self.at}{key}.", value)

    def rows(self, key: str) -> Iterator[_Fields]:
        """A list of tables; none where it is missing."""
        value = self.table.get(key, [])
        if not isinstance(value, list) or not all(isinstance(row, dict) for row in value):
            raise self.wrong(key, "must be a list of tables of fields")
        return (_Fields(self.file, f"{self.at}{key}[{k + 1}].", row) for k, row in enumerate(value))

    def names(self, key: str, word: str) -> tuple[str, ...]:
        """A list of names, or how many there are."""
        value = self.get(key)
        if isinstance(value, int) and not isinstance(value, bool) and value > 0:
            return tuple(f"{word} {k + 1}" for k in range(value))
        if not isinstance(value, list) or not value or not all(isinstance(name, str) for name in value):
            raise self.wrong(key, "must be a list of names, or their number")
        return tuple(value)

    def amounts(self, key: str, goods: tuple[str, ...], *, needed: bool = True) -> FloatArray:
        """(G,) a number a good, from a list or a table by names (0 where not named)."""
        value = self.get(key) if needed else self.table.get(key, {})
        if isinstance(value, dict):
            for name in value:
                if name not in goods:
                    raise self.wrong(f"{key}.{name}", "is not a good", nearest(name, goods))
            return np.array([_number(self, f"{key}.{name}", value.get(name, 0.0)) for name in goods])
        if not isinstance(value, list):
            raise self.wrong(key, f"must be amounts by good, not {value!r}")
        if len(value) != len(goods):
            raise self.wrong(key, f"has {len(value)} numbers for {len(goods)} goods")
        return self.numbers(key)

    def numbers(self, key: str, width: int | None = None) -> FloatArray:
        """A list of numbers, `width` of them if that is known."""
        value = self.get(key)
        if not isinstance(value, list) or (width is not None and len(value) != width):
            raise self.wrong(key, f"must be a list of {width or 'some'} numbers, not {value!r}")
        return np.array([_number(self, f"{key}[{k + 1}]", entry) for k, entry in enumerate(value)])

    def matrix(self, key: str, width: int | None = None) -> FloatArray:
        """A list of rows of numbers, all as long as `width`, or as the first."""
        value = self.get(key)
        if not isinstance(value, list) or not value or not all(isinstance(row, list) for row in value):
            raise self.wrong(key, "must be a list of rows of numbers")
        width = len(value[0]) if width is None else width
        for k, row in enumerate(value):
            if len(row) != width:
                raise self.wrong(f"{key}[{k + 1}]", f"has {len(row)} numbers, not {width}")
        rows = ([_number(self, f"{key}[{k + 1}]", entry) for entry in row] for k, row in enumerate(value))
        return np.array(list(rows)).reshape(len(value), width)


def _number(fields: _Fields, key: str, value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise fields.wrong(key, f"must be a number, not {value!r}")
    return float(value)


# --- Walras's own format ----------------------------------------------------------------------------------------


def _tenants(top: _Fields) -> Iterator[tuple[str, Economy]]:
    top.only("kind", "name", "goods", "supply", "tenants", "activities", "engines", "sectors")
    goods = top.names("goods", "good")
    tenants = tuple(_tenant(row, goods) for row in top.rows("tenants"))
    activities = [
        (_only(row, "name", "net").text("name"), row.amounts("net", goods)) for row in top.rows("activities")
    ]
    for row in top.rows("engines"):
        activities += _engine(row, goods)
    columns = np.array([net for _, net in activities]).reshape(-1, len(goods)).T
    yield (
        _name(top),
        Economy(
            goods,
            tenants,
            activities=columns,
            activity_names=tuple(name for name, _ in activities),
            sectors=tuple(_sector(row, goods) for row in top.rows("sectors")),
            supply=top.amounts("supply", goods, needed=False),
        ),
    )


def _name(top: _Fields) -> str:
    return top.text("name") if "name" in top.table else Path(top.file).stem


def _only(row: _Fields, *known: str) -> _Fields:
    row.only(*known)
    return row


def _tenant(row: _Fields, goods: tuple[str, ...]) -> Tenant:
    row.only("name", "budget", "endowment", "utility")
    endowment = row.amounts("endowment", goods, needed=False)
    return Tenant(
        row.text("name"), _utility(row.inner("utility"), goods), endowment, row.number("budget", 0.0)
    )


def _utility(row: _Fields, goods: tuple[str, ...]) -> Utility:
    kind = row.text("kind")
    if kind == "linear":
        return Linear(_only(row, "kind", "weights").amounts("weights", goods))
    if kind == "quasi-linear":
        return _sum(_only(row, "kind", "sum"), "sum", goods)
    if kind == "ces":
        row.only("kind", "shares", "elasticity", "subsistence")
        elasticity = row.number("elasticity")
    elif kind in UTILITIES:
        row.only("kind", "shares", "subsistence")
        elasticity = 1.0 if kind == "cobb-douglas" else 0.0
    else:
        raise row.wrong("kind", f"'{kind}' is no utility", nearest(kind, UTILITIES))
    return CES(row.amounts("shares", goods), elasticity, row.amounts("subsistence", goods, needed=False))


def _sum(row: _Fields, key: str, goods: tuple[str, ...]) -> QuasiLinear:
    try:
        return QuasiLinear.parse(row.text(key), goods)
    except WalrasError as error:
        raise row.wrong(key, str(error)) from error


def _engine(row: _Fields, goods: tuple[str, ...]) -> Iterator[tuple[str, FloatArray]]:
    """One activity for each corner of the frontier."""
    row.only("name", "profile", "input", "prefill", "decode", "context")
    name, named = row.text("name"), [row.text(key) for key in ("input", "prefill", "decode")]
    for key, good in zip(("input", "prefill", "decode"), named, strict=True):
        if good not in goods:
            raise row.wrong(key, f"'{good}' is not a good", nearest(good, goods))
    try:
        profile = load_profile(row.text("profile"))
        limits = profile.limits
        settings = EngineSettings(
            kv_blocks=limits.kv_tokens,
            block_tokens=1,
            max_batched_tokens=limits.step_tokens,
            max_sequences=limits.most_sequences,
        )
        steps = profile.steps(settings.max_batched_tokens, settings.max_sequences)
        corners = engine_frontier(settings, steps, row.number("context"))
    except (QuantityError, SettingsError) as error:
        raise row.wrong("profile", str(error)) from error
    for k, (prefill, decode) in enumerate(corners.tolist()):
        net = np.zeros(len(goods))
        for good, amount in zip(named, (-1.0, prefill, decode), strict=True):
            net[goods.index(good)] += amount
        yield f"{name} {k + 1}", net


def _sector(row: _Fields, goods: tuple[str, ...]) -> Sector:
    row.only("name", "output", "phi", "delta", "elasticity")
    output = row.text("output")
    if output not in goods:
        raise row.wrong("output", f"'{output}' is not a good", nearest(output, goods))
    return _made(
        row, row.text("name"), goods.index(output), row.amounts("delta", goods), row.number("elasticity")
    )


def _made(row: _Fields, name: str, output: int, delta: FloatArray, elasticity: float) -> Sector:
    phi = row.number("phi")
    if not phi > 0:
        raise row.wrong("phi", f"must be > 0, not {phi}")
    if not (delta >= 0).all() or not delta.any() or not elasticity >= 0:
        raise row.wrong("delta", "and the elasticity must be ≥ 0, and some input used")
    return Sector.of_production(name, output, phi, delta, elasticity)


# --- published formats ------------------------------------------------------------------------------------------


def _consumers(top: _Fields) -> Iterator[tuple[str, Economy]]:
    """Exchange, or activities given by rows: consumers by name of utility."""
    goods = top.names("goods", "good")
    tenants = tuple(_consumer(row, f"consumer {k + 1}", goods) for k, row in enumerate(top.rows("consumers")))
    columns = top.matrix("activities", len(goods)).T if "activities" in top.table else np.zeros((0, 0))
    yield _name(top), Economy(goods, tenants, activities=columns)


def _consumer(row: _Fields, name: str, goods: tuple[str, ...]) -> Tenant:
    kind = row.text("utility")
    utility: Utility
    if kind == "leontief":
        shares = np.zeros(len(goods))
        wants = row.numbers("wants")
        if not np.isin(wants, np.arange(len(goods))).all():
            raise row.wrong(
                "wants", f"must be numbers of goods, 0 to {len(goods) - 1}, not {row.get('wants')}"
            )
        shares[wants.astype(np.int64)] = row.numbers("weights", wants.size)
        utility = CES(shares, 0.0)
    elif kind == "cobb-douglas":
        utility = CES(row.amounts("shares", goods), 1.0)
    else:
        utility = _sum(row, "utility", goods)
    return Tenant(name, utility, row.amounts("endowment", goods))


def _activity_analysis(top: _Fields) -> Iterator[tuple[str, Economy]]:
    """Scarf and Hansen's tables, goods by consumer and goods by activity; or consumers as in exchange."""
    if "activity_matrix" not in top.table:
        yield from _consumers(top)
        return
    goods = top.names("goods", "good")
    elasticities = top.numbers("elasticities").tolist()
    owned = top.matrix("endowments_good_by_consumer", len(elasticities)).T
    wanted = top.matrix("reference_demand_good_by_consumer", len(elasticities)).T
    tenants = tuple(
        Tenant(f"consumer {k + 1}", CES(wanted[k], sigma), owned[k]) for k, sigma in enumerate(elasticities)
    )
    columns = top.matrix("activity_matrix")
    names = top.names("activities_names", "activity") if "activities_names" in top.table else ()
    yield _name(top), Economy(goods, tenants, activities=columns, activity_names=names)


def _production(top: _Fields) -> Iterator[tuple[str, Economy]]:
    """Sectors that make goods from factors; consumers that own factors and want goods."""
    made, factors = top.names("goods", "good"), top.names("factors", "factor")
    goods, none = made + factors, np.zeros(len(made))
    sectors = []
    for name in (n for n in top.inner("production").table if n != "form"):
        row = top.inner("production").inner(name)
        output = next(
            (k for k, good in enumerate(made) if good.replace("-", "") == name.replace("-", "")), None
        )
        if output is None:
            raise top.wrong(f"production.{name}", "is not a good", nearest(name, made))
        if len(factors) != 2:
            raise top.wrong("factors", f"must be two for a share delta and its rest, not {len(factors)}")
        delta = row.number("delta")
        shares = np.concatenate((none, [delta, 1 - delta]))
        sectors.append(_made(row, name, output, shares, row.number("sigma")))
    tenants = []
    for name in top.inner("consumers").table:
        row = top.inner("consumers").inner(name)
        shares = np.concatenate((row.amounts("alpha", made), np.zeros(len(factors))))
        owned = np.concatenate((none, [row.number(factor) for factor in factors]))
        tenants.append(Tenant(name, CES(shares, row.number("sigma")), owned))
    yield _name(top), Economy(goods, tuple(tenants), sectors=tuple(sectors))


def _fisher(top: _Fields) -> Iterator[tuple[str, Economy]]:
    """Markets of budgets for one supply; each by its utilities."""
    supply = top.numbers("supply")
    goods = tuple(f"good {k + 1}" for k in range(supply.size))
    for name in ("linear", "cobb_douglas"):
        if name not in top.table:
            continue
        row = top.inner(name)
        budgets = row.numbers("budgets")
        wanted = row.matrix("valuations" if name == "linear" else "shares", supply.size)
        if len(wanted) != budgets.size:
            raise row.wrong("budgets", f"has {budgets.size} numbers for {len(wanted)} tenants")
        tenants = tuple(
            Tenant(
                f"tenant {i + 1}",
                Linear(w) if name == "linear" else CES(w, 1.0),
                np.zeros(supply.size),
                float(b),
            )
            for i, (w, b) in enumerate(zip(wanted, budgets, strict=True))
        )
        yield name, Economy(goods, tenants, supply=supply)


_FORMATS = {
    "tenants": _tenants,
    "exchange": _consumers,
    "activity analysis": _activity_analysis,
    "production": _production,
    "fisher": _fisher,
}
