"""Small tables a menu is made of, or checked against: types, offerings, menus. CSV; a menu also as JSON. [Z-5]

Row 1 is the first record after the header. Header names are matched in any case, under the names in `ALIASES`. A file is
read whole or not at all.
"""

from __future__ import annotations

import csv
import io
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any, NoReturn

import numpy as np

from walras.errors import RecordError, nearest
from walras.risk import FloatArray

TYPE = {
    "type": ("theta", "value", "value_usd", "v", "wtp", "willingness_to_pay"),
    "latency_price": ("lambda",),
    "type_from": (),
    "type_to": (),
}
TENANT = {"tenant": ("tenant_id", "team")}
LAW = {**TYPE, "probability": ("prob", "p"), "tier": ("choice",), **TENANT}
NAME = {"name": ("model", "tier")}
COST = {"cost": ("cost_usd", "usd"), "seconds": ("latency_s",)}
OFFERING = {**NAME, "quality": (), **COST, "risk": ()}
MENU = {
    **NAME,
    "quality": (),
    "price": ("price_usd",),
    **TYPE,
    "cost": ("cost_usd",),
    "seconds": ("latency_s",),
}
LARGEST = 1e12
"""No amount is larger: what is, is a slip, and its square would be lost to rounding."""
SUM = 1e-6
"""Probabilities may miss 1 by this much: they were rounded when they were written down."""

Cell = Any
"""Text of a CSV file, or a JSON value."""


@dataclass(frozen=True, slots=True)
class LawTable:
    """A law of types."""

    value: FloatArray
    """θ, USD per unit of quality, ≥ 0, ascending, (T,)."""
    probability: FloatArray
    """> 0, sums to 1, (T,)."""
    latency_price: FloatArray | None
    """λ₀, USD per second, ≥ 0, (T,): then the pairs (θ, λ₀) ascend and θ alone may repeat. None: nobody minds delay."""


@dataclass(frozen=True, slots=True)
class SampleTable:
    """Willingness to pay, one row a request, in any order."""

    value: FloatArray
    """θ, USD per unit of quality, ≥ 0, (N,)."""
    tenant: tuple[str, ...] | None


@dataclass(frozen=True, slots=True)
class RangeTable:
    """What past choices revealed of each request's type."""

    low: FloatArray
    """θ is at least this, ≥ 0, (N,)."""
    high: FloatArray
    """θ is at most this, ≥ `low`, may be ∞, (N,)."""
    tenant: tuple[str, ...] | None


@dataclass(frozen=True, slots=True)
class ChoiceTable:
    """Which tier of an offered menu each request took."""

    tier: tuple[str, ...]
    """Its name, "" where the user took nothing, (N,)."""
    tenant: tuple[str, ...] | None


TypeTable = LawTable | SampleTable | RangeTable | ChoiceTable


@dataclass(frozen=True, slots=True)
class OfferingTable:
    """What can be given, and what that costs."""

    name: tuple[str, ...]
    quality: FloatArray
    """In [0, 1], (I,)."""
    cost: FloatArray
    """USD per request, ≥ 0, (I,)."""
    seconds: FloatArray
    """≥ 0, (I,); zeros where the file has none."""
    risk: FloatArray
    """USD of expected loss, ≥ 0, (I,); zeros where the file has none."""
    amounts: Mapping[str, FloatArray] = field(default_factory=dict)
    """All other numeric columns, each (I,): physical amounts of resources."""


@dataclass(frozen=True, slots=True)
class MenuTable:
    """A menu as it was published, K tiers in the order of the file."""

    name: tuple[str, ...]
    quality: FloatArray
    """In [0, 1], or ≥ 0 where `quality_cost` is "quadratic", (K,)."""
    price: FloatArray
    """USD, ≥ 0, (K,)."""
    type_from: FloatArray | None
    """Least type the tier is meant for, (K,); None where the file does not say."""
    type_to: FloatArray | None
    """Greatest one, may be ∞, (K,)."""
    latency_price: FloatArray | None
    """λ₀ of those the tier is meant for, USD per second, (K,); None where the file does not say."""
    seconds: FloatArray
    """(K,); zeros where the file has none."""
    cost: FloatArray
    """USD to the operator, (K,); NaN where not known."""
    types: str | None = None
    """The law it was designed for, as `--types` had it."""
    quality_cost: str | None = None
    """The technology, as `--quality-cost` had it."""
    lambda0: float = 0.0
    """What a second costs all users, USD; 0 where the file does not say."""


def read_types(path: Path) -> TypeTable:
    """Types, in one of four forms that the header tells apart.

    `type`, `probability` [, `latency_price`]: a law. `type`: a sample. `type_from`, `type_to` (empty: unbounded): what
    choices revealed. `tier` (empty: took nothing): choices from a menu. The last three may have a `tenant`.

    Raises:
        RecordError: names the file, the row and the column.
    """
    table = _csv(path, LAW, other=False, rows="types", none="an empty support: no types")
    form = sorted(set(table.columns) - {"tenant"})
    match form:
        case ["probability", "type"] | ["latency_price", "probability", "type"] if (
            "tenant" not in table.columns
        ):
            return _law(table)
        case ["type"]:
            return SampleTable(table.amounts("type"), table.texts("tenant"))
        case ["type_from", "type_to"]:
            low, high = _range(table)
            return RangeTable(low, high, table.texts("tenant"))
        case ["tier"]:
            return ChoiceTable(table.texts("tier") or (), table.texts("tenant"))
    what = ", ".join(table.columns) or "none"
    forms = "type, probability [, latency_price]; or type; or type_from, type_to; or tier; the last three [, tenant]"
    raise RecordError(f"these columns together are not a table of types: {what}", path=path, hint=forms)


def read_offerings(path: Path) -> OfferingTable:
    """What can be given: `quality`, `cost`, and where known `name`, `seconds`, `risk` and amounts of resources.

    Columns of text other than the name are passed over. An offering worse than another is no error here.

    Raises:
        RecordError: names the file, the row and the column.
    """
    table = _csv(path, OFFERING, other=True, rows="offerings", none="has no offerings")
    table.needs("quality", "cost")
    names, quality = table.names("offering"), table.amounts("quality", most=1.0)
    if not quality.any():
        table.fail("is 0 throughout", None, "quality", "one offering at least must give something")
    others = {name: table.amounts_or_text(name) for name in table.columns if name not in OFFERING}
    return OfferingTable(
        names,
        quality,
        table.amounts("cost"),
        table.amounts("seconds", absent=0.0),
        table.amounts("risk", absent=0.0),
        {name: amounts for name, amounts in others.items() if amounts is not None},
    )


def read_menu(path: Path) -> MenuTable:
    """A menu: JSON (an object with `tiers`, as `walras menu --json` prints it, or a list of tiers) or CSV.

    A tier has `quality` and `price`, and where known `name`, whom it is meant for (`type_from` and `type_to`, empty or
    null for unbounded; or `type`; and `latency_price`), `seconds` and `cost`. Other columns are passed over. Where
    `latency_price` is a least and a greatest, as for types on a grid, ranges overlap and tell nothing: they are passed over.

    Raises:
        RecordError: names the file, the row, the tier and the column. A tier that nobody can want, because another is
            no worse in anything and better in something, is an error; so are types that do not ascend with quality.
    """
    text = _text(path)
    table, about = (
        _json(path, text)
        if text.lstrip()[:1] in ("{", "[")
        else (_csv(path, MENU, True, "tiers", "has no tiers"), {})
    )
    table.needs("quality", "price")
    table = table.called(table.names("tier"))
    types, quality_cost = _said(path, about, "types"), _said(path, about, "quality_cost")
    lambda0 = float(_Table(path, {"lambda0": [about.get("lambda0") or 0.0]}).amounts("lambda0")[0])
    quality = table.amounts("quality", most=LARGEST if quality_cost == "quadratic" else 1.0)
    low, high, delay = _meant_for(table)
    menu = MenuTable(
        table.labels,
        quality,
        table.amounts("price"),
        low,
        high,
        delay,
        table.amounts("seconds", absent=0.0),
        table.amounts("cost", absent=math.nan, empty=math.nan),
        types,
        quality_cost,
        lambda0,
    )
    _ascending(table, menu)
    _undominated(table, menu)
    return menu


def _law(table: _Table) -> LawTable:
    value, p = table.amounts("type"), table.amounts("probability")
    delay = table.amounts("latency_price") if "latency_price" in table.columns else None
    zero = np.flatnonzero(p == 0)
    if zero.size:
        table.fail("is 0, and must be greater", int(zero[0]) + 1, "probability", "drop the row")
    pairs = list(zip(value.tolist(), (value * 0 if delay is None else delay).tolist(), strict=True))
    for row, (before, here) in enumerate(pairwise(pairs), start=2):
        if here <= before:
            shown = [f"{x:g}" if delay is None else f"({x:g}, {l:g})" for x, l in (here, before)]
            what = "type" if delay is None else "(type, latency_price)"
            table.fail(
                f"{what} {shown[0]} comes after {shown[1]}", row, "type", "sort by type, each only once"
            )
    total = math.fsum(p.tolist())
    if abs(total - 1) > SUM:
        over = np.flatnonzero(np.cumsum(p) > 1 + SUM)
        row = int(over[0]) + 1 if over.size else len(p)
        hint = "divide each by the sum, or add the types that are missing"
        table.fail(f"probabilities sum to {total:.9g}, not to 1", row, "probability", hint)
    return LawTable(value, p / total, delay)


def _range(table: _Table) -> tuple[FloatArray, FloatArray]:
    """`type_from` and `type_to`, the latter ∞ where empty."""
    low = table.amounts("type_from")
    high = table.amounts("type_to", most=math.inf, empty=math.inf)
    wrong = np.flatnonzero(low > high)
    if wrong.size:
        i = int(wrong[0])
        hint = "exchange them; an empty type_to is unbounded"
        table.fail(f"types out of order: from {low[i]:g} to {high[i]:g}", i + 1, "type_to", hint)
    return low, high


def _meant_for(table: _Table) -> tuple[FloatArray | None, FloatArray | None, FloatArray | None]:
    """Least and greatest type, and λ₀, of those each tier is meant for, (K,) each; None where the file does not say."""
    said = {name for name in TYPE if not table.is_blank(name)}
    if "type_from" in said and "type_to" in table.columns:
        said.add("type_to")  # all empty: all unbounded
    if "latency_price" in said and all(isinstance(cell, list) for cell in table.columns["latency_price"]):
        return None, None, None  # a least and a greatest, of types that differ in both: such spans overlap
    types = sorted(said - {"latency_price"})
    if types not in ([], ["type"], ["type_from", "type_to"]):
        hint = "give type, or type_from and type_to, for all tiers or for none"
        table.fail(f"has {' and '.join(types)}", None, None, hint)
    delay = table.amounts("latency_price") if "latency_price" in said else None
    if delay is not None and not types:
        what = "says whom a tier is meant for, but there is no type"
        table.fail(what, None, "latency_price", "add a column type")
    if "type" in said:
        value = table.amounts("type")
        return value, value, delay
    return (*_range(table), delay) if types else (None, None, None)


def _ascending(table: _Table, menu: MenuTable) -> None:
    """Types of tiers ascend with quality, among tiers meant for users with the same price of delay."""
    if menu.type_from is None or menu.type_to is None:
        return
    delay = np.zeros(len(menu.name)) if menu.latency_price is None else menu.latency_price
    order = np.lexsort((menu.type_from, menu.quality, delay))
    for i, j in pairwise(order.tolist()):
        if delay[i] == delay[j] and menu.type_from[j] < menu.type_to[i]:
            mine, other = (f"{menu.type_from[k]:g} to {menu.type_to[k]:g}" for k in (j, i))
            what = f"types out of order: {mine}, but tier '{menu.name[i]}' (row {i + 1}), of no higher quality, has {other}"
            table.fail(what, j + 1, "type_from", "a tier of higher quality is for higher types")


def _undominated(table: _Table, menu: MenuTable) -> None:
    q, p, s = menu.quality, menu.price, menu.seconds
    for i in range(len(q)):
        no_worse = (q >= q[i]) & (p <= p[i]) & (s <= s[i])
        over = np.flatnonzero(no_worse & ((q > q[i]) | (p < p[i]) | (s < s[i])))
        if over.size:
            j = int(over[0])
            what = f"dominated by '{menu.name[j]}' (row {j + 1}): quality {q[i]:g} and {q[j]:g}, price {p[i]:g} and {p[j]:g}"
            what += f", seconds {s[i]:g} and {s[j]:g}" if s.any() else ""
            table.fail(what, i + 1, None, "nobody would take it; drop it, or make it better or cheaper")


@dataclass(frozen=True, slots=True)
class _Table:
    """Columns of cells under their own names; every fault is found and named here."""

    path: Path
    columns: Mapping[str, Sequence[Cell]]
    """Same length each, (N,)."""
    labels: tuple[str, ...] = ()
    """What the rows are called, (N,), once that is known."""

    def called(self, labels: tuple[str, ...]) -> _Table:
        return _Table(self.path, self.columns, labels)

    def fail(self, problem: str, row: int | None, column: str | None, hint: str) -> NoReturn:
        who = f"tier '{self.labels[row - 1]}': " if self.labels and row else ""
        raise RecordError(who + problem, path=self.path, row=row, field=column, hint=hint)

    def needs(self, *names: str) -> None:
        for name in names:
            if name not in self.columns:
                raise RecordError("is missing", path=self.path, field=name, hint=nearest(name, self.columns))

    def amounts(
        self, name: str, most: float = LARGEST, absent: float | None = None, empty: float | None = None
    ) -> FloatArray:
        """A column of numbers from 0 to `most`, (N,).

        `absent` stands for the whole column where the file has none, `empty` for an empty cell.
        """
        if absent is not None and name not in self.columns:
            return np.full(len(next(iter(self.columns.values()))), absent)
        out = np.empty(len(self.columns[name]))
        for i, cell in enumerate(self.columns[name]):
            if _is_empty(cell):
                if empty is None:
                    self.fail("is missing", i + 1, name, "every row needs one")
                out[i] = empty
                continue
            number = _number(cell)
            if number is None:
                self.fail(
                    f"is {cell!r:.40}, expected a number",
                    i + 1,
                    name,
                    "plain digits: 0.25, no signs or units",
                )
            if not 0 <= number <= (most if number == most else min(most, LARGEST)):
                wanted = f"a number from 0 to {most:g}" if most < np.inf else "a number ≥ 0"
                self.fail(
                    f"is {number:g}, expected {wanted}", i + 1, name, "correct the row, or leave it out"
                )
            out[i] = number
        return out

    def amounts_or_text(self, name: str) -> FloatArray | None:
        """A column of numbers ≥ 0, or None where no cell is a number: one typing error must not hide a column."""
        found = [_number(cell) is not None for cell in self.columns[name]]
        return self.amounts(name) if any(found) else None

    def is_blank(self, name: str) -> bool:
        """Whether there is no such column, or nothing in it."""
        return all(map(_is_empty, self.columns.get(name, ())))

    def texts(self, name: str) -> tuple[str, ...] | None:
        return None if name not in self.columns else tuple(map(_word, self.columns[name]))

    def names(self, word: str) -> tuple[str, ...]:
        """What each row is called: its own name, or `word` and its number. No two alike."""
        n = len(next(iter(self.columns.values())))
        names = self.texts("name") or tuple(f"{word} {row}" for row in range(1, n + 1))
        first: dict[str, int] = {}
        for row, name in enumerate(names, start=1):
            if not name:
                self.fail("is missing", row, "name", f"every {word} needs one")
            if name in first:
                self.fail(f"'{name}' is also row {first[name]}", row, "name", "give each its own")
            first[name] = row
        return names


def _is_empty(cell: Cell) -> bool:
    return cell is None or (isinstance(cell, str) and not cell.strip())


def _word(cell: Cell) -> str:
    return "" if cell is None else str(cell).strip()


def _number(cell: Cell) -> float | None:
    if isinstance(cell, bool) or not isinstance(cell, str | int | float):
        return None
    try:
        return float(cell)
    except ValueError:
        return None
    except OverflowError:
        return math.inf


def _text(path: Path) -> str:
    try:
        return path.read_bytes().decode("utf-8-sig")
    except OSError as error:
        raise RecordError(
            f"cannot be read: {error.strerror}", path=path, hint="is the path right?"
        ) from error
    except UnicodeDecodeError as error:
        raise RecordError("is not UTF-8 text", path=path, hint="save it as UTF-8") from error


def _csv(path: Path, known: Mapping[str, tuple[str, ...]], other: bool, rows: str, none: str) -> _Table:
    """The file's columns under the names of `known`; with `other`, also columns that are not in it."""
    reader = csv.reader(io.StringIO(_text(path), newline=""), strict=True)
    records: list[list[str]] = []
    try:
        header = next(reader, [])
        if len(header) == 1 and (";" in header[0] or "\t" in header[0]):
            raise RecordError("has no commas between its columns", path=path, hint="save it with commas")
        for cells in reader:
            if not cells and len(header) > 1:
                continue
            if len(cells) != len(header):
                problem = (
                    f"has {len(cells)} cells and the header {len(header)}" if cells else "is a blank line"
                )
                hint = (
                    "quote text that holds a comma"
                    if cells
                    else 'drop it; an empty cell that stands alone is ""'
                )
                raise RecordError(problem, path=path, row=len(records) + 1, hint=hint)
            records.append(cells)
    except csv.Error as error:
        raise RecordError(
            f"is not CSV: {error}", path=path, row=len(records) + 1, hint="mend the row"
        ) from error
    names = _headers(path, header, known, other)
    if not records:
        raise RecordError(none, path=path, hint=f"a header, then one row for each of the {rows}")
    return _Table(path, dict(zip(names, zip(*records, strict=True), strict=True)))


def _headers(
    path: Path, given: Sequence[str], known: Mapping[str, tuple[str, ...]], other: bool
) -> list[str]:
    own = {alias: name for name, aliases in known.items() for alias in (name, *aliases)}
    names: list[str] = []
    for header in given:
        plain = header.strip()
        name = own.get(plain.lower(), plain if other else None)
        if name is None:
            raise RecordError("is not known", path=path, field=plain, hint=nearest(plain.lower(), known))
        if name in names:
            first = given[names.index(name)].strip()
            what = "is there twice" if first == plain else f"says the same as '{first}'"
            raise RecordError(what, path=path, field=plain, hint="keep one of them")
        names.append(name)
    return names


def _json(path: Path, text: str) -> tuple[_Table, Mapping[str, Any]]:
    """The tiers as columns, and what else the object says."""

    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) < len(pairs):
            names = [name for name, _ in pairs]
            twice = next(name for name in names if names.count(name) > 1)
            raise RecordError("is there twice in an object", path=path, field=twice, hint="keep one of them")
        return found

    try:
        said = json.loads(text, object_pairs_hook=once)
    except (ValueError, RecursionError) as error:
        raise RecordError(
            f"is not JSON: {error}", path=path, hint="as `walras menu --json` prints it"
        ) from error
    tiers = said.get("tiers") if isinstance(said, dict) else said
    shape = '{"tiers": [{"name": …, "quality": …, "price": …}]}'
    if not isinstance(tiers, list) or not tiers:
        raise RecordError("has no tiers", path=path, hint=shape)
    found: list[dict[str, Any]] = []
    for row, tier in enumerate(tiers, start=1):
        if not isinstance(tier, dict):
            raise RecordError(f"is {tier!r:.40}, expected an object", path=path, row=row, hint=shape)
        try:
            found.append(dict(zip(_headers(path, list(tier), MENU, other=True), tier.values(), strict=True)))
        except RecordError as error:
            raise RecordError(
                "names a thing twice", path=path, row=row, field=error.field, hint=error.hint
            ) from error
    names = dict.fromkeys(name for tier in found for name in tier)
    columns = {name: [tier.get(name) for tier in found] for name in names}
    return _Table(path, columns), said if isinstance(said, dict) else {}


def _said(path: Path, about: Mapping[str, Any], key: str) -> str | None:
    value = about.get(key)
    if value is not None and not isinstance(value, str):
        raise RecordError(
            f"is {value!r:.40}, expected text", path=path, field=key, hint="as `walras menu --json` prints it"
        )
    return value
