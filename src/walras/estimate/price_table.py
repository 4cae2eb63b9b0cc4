"""What a token costs: a dated table of list prices, as data. [Z §3.1]

USD per million tokens. Cached tokens are part of the input, reasoning tokens part of the output (as in the record
schema). A model has one entry for each date its price changed; an entry holds until the next.
"""

from __future__ import annotations

import datetime as dt
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from walras.errors import QuantityError, SettingsError, nearest
from walras.risk import FloatArray

PER_TOKEN = 1e-6
_AMOUNTS = ("input", "cached_input", "output", "reasoning", "cache_write")
_MODEL_KEYS = ("provider", "aliases", "prices")


def _bill(
    price: TokenPrice | Rates,
    input_tokens: ArrayLike,
    cached_input_tokens: ArrayLike,
    output_tokens: ArrayLike,
    reasoning_tokens: ArrayLike,
    cache_write_tokens: ArrayLike,
) -> FloatArray:
    """USD; every argument broadcasts. NaN tokens are unknown, and so is their bill."""
    sent, cached, given, hidden, written = (
        np.asarray(t, dtype=np.float64)
        for t in (input_tokens, cached_input_tokens, output_tokens, reasoning_tokens, cache_write_tokens)
    )
    for what, part, whole in (
        ("cached and written tokens are part of the input", cached + written, sent),
        ("reasoning tokens are part of the output", hidden, given),
    ):
        if np.any(part > whole * (1 + 1e-12)):
            raise QuantityError(f"{what}, but there are more of them; count them in the total too")
    for name, tokens in (("input", sent), ("cached", cached), ("reasoning", hidden), ("written", written)):
        if np.any(tokens < 0):
            raise QuantityError(f"{name} tokens must be ≥ 0")
    usd: FloatArray = (
        (sent - cached - written) * price.input
        + cached * price.cached_input
        + written * price.cache_write
        + (given - hidden) * price.output
        + hidden * price.reasoning
    ) * PER_TOKEN
    return usd


@dataclass(frozen=True, slots=True)
class TokenPrice:
    """One model's price from one date on, USD per million tokens."""

    model: str
    valid_from: dt.date
    input: float
    output: float
    cached_input: float
    """Input read from a cache; the price of input where the source gives none."""
    reasoning: float
    """Hidden reasoning; the price of output where it is not billed apart."""
    cache_write: float
    """Input written to a cache; the price of input where writing is free."""
    source: str


@dataclass(frozen=True, slots=True)
class Rates:
    """Prices of I models side by side, each (I,), USD per million tokens: what a live decision looks up once."""

    models: tuple[str, ...]
    input: FloatArray
    cached_input: FloatArray
    output: FloatArray
    reasoning: FloatArray
    cache_write: FloatArray

    def usd(
        self,
        *,
        input_tokens: ArrayLike,
        cached_input_tokens: ArrayLike = 0.0,
        output_tokens: ArrayLike = 0.0,
        reasoning_tokens: ArrayLike = 0.0,
        cache_write_tokens: ArrayLike = 0.0,
    ) -> FloatArray:
        """USD of each request on each model, (M, I); arguments broadcast to that."""
        return _bill(
            self, input_tokens, cached_input_tokens, output_tokens, reasoning_tokens, cache_write_tokens
        )


@dataclass(frozen=True, slots=True)
class PriceTable:
    """Dated prices of models by name."""

    prices: Mapping[str, tuple[TokenPrice, ...]]
    """By model, oldest first."""
    names: Mapping[str, str]
    """Every accepted spelling in lower case → model."""

    def price(self, model: str, on: dt.date) -> TokenPrice:
        """The price in force on a day. `gpt-5@high` is `gpt-5`; `openai/gpt-5` is `gpt-5` where OpenAI serves it.

        Raises:
            SettingsError: an unknown model, or a day before its first price.
        """
        name = self.names.get(model.split("@", maxsplit=1)[0].lower())
        if name is None:
            raise SettingsError(
                f"no price of '{model}'; put it into a price table of your own ({nearest(model, self.names)})"
            )
        dated = [price for price in self.prices[name] if price.valid_from <= on]
        if not dated:
            first = self.prices[name][0].valid_from
            raise SettingsError(f"'{model}' has no price on {on}; its first is from {first}")
        return dated[-1]

    def rates(self, models: Sequence[str], on: dt.date) -> Rates:
        """Prices of these models on a day, as arrays."""
        found = [self.price(model, on) for model in models]
        columns = {amount: np.array([getattr(price, amount) for price in found]) for amount in _AMOUNTS}
        return Rates(models=tuple(models), **columns)

    def usd(
        self,
        model: str,
        on: dt.date,
        *,
        input_tokens: ArrayLike,
        cached_input_tokens: ArrayLike = 0.0,
        output_tokens: ArrayLike = 0.0,
        reasoning_tokens: ArrayLike = 0.0,
    ) -> FloatArray:
        """USD at list price; arguments broadcast. Cached tokens are part of the input, reasoning of the output.

        Raises:
            QuantityError: a part larger than its whole, or a negative count.
        """
        price = self.price(model, on)
        return _bill(price, input_tokens, cached_input_tokens, output_tokens, reasoning_tokens, 0.0)


def load_price_table(path: Path | str | None = None) -> PriceTable:
    """Read a price table; None reads the one that comes with Walras (list prices, each with its source).

    Raises:
        SettingsError: naming the file and the key that is wrong.
    """
    file = files("walras.estimate") / "model_prices.toml" if path is None else Path(path)
    where = "model_prices.toml" if path is None else str(path)
    try:
        data = tomllib.loads(file.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise SettingsError(f"{where} cannot be read: {error}") from error
    except tomllib.TOMLDecodeError as error:
        raise SettingsError(f"{where} is not TOML: {error}") from error
    prices: dict[str, tuple[TokenPrice, ...]] = {}
    names: dict[str, str] = {}
    for model, entry in data.items():
        key = f"{where}: {model}"
        prices[model] = _model(model, entry, key)
        for name in _spellings(model, entry, key):
            if names.setdefault(name, model) != model:
                raise SettingsError(f"'{name}' already means {names[name]}", key=f"{key}.aliases")
    return PriceTable(prices, names)


def _spellings(model: str, entry: dict[str, Any], key: str) -> list[str]:
    aliases = entry.get("aliases", [])
    provider = entry.get("provider")
    if not isinstance(aliases, list) or not all(isinstance(alias, str) for alias in aliases):
        raise SettingsError("must be a list of names", key=f"{key}.aliases")
    if not isinstance(provider, str | None):
        raise SettingsError("must be a name", key=f"{key}.provider")
    names = [name.lower() for name in (model, *aliases)]
    return names + [f"{provider}/{name}".lower() for name in names if provider]


def _model(model: str, entry: Any, key: str) -> tuple[TokenPrice, ...]:
    if not isinstance(entry, dict):
        raise SettingsError("must be a table with a list of prices", key=key)
    _known(entry, _MODEL_KEYS, key)
    rows = entry.get("prices")
    if not isinstance(rows, list) or not rows:
        raise SettingsError("needs at least one dated price", key=f"{key}.prices")
    dated = [_entry(model, row, f"{key}.prices[{at}]") for at, row in enumerate(rows)]
    dated.sort(key=lambda price: price.valid_from)
    days = [price.valid_from for price in dated]
    if len(set(days)) < len(days):
        twice = next(day for day in days if days.count(day) > 1)
        raise SettingsError(f"two prices from {twice}; keep one", key=f"{key}.prices")
    return tuple(dated)


def _entry(model: str, row: Any, key: str) -> TokenPrice:
    if not isinstance(row, dict):
        raise SettingsError("must be a table", key=key)
    _known(row, ("valid_from", "source", *_AMOUNTS), key)
    for need in ("valid_from", "source", "input", "output"):
        if need not in row:
            raise SettingsError("is missing", key=f"{key}.{need}")
    day = row["valid_from"]
    if isinstance(day, dt.datetime) or not isinstance(day, dt.date):
        raise SettingsError("must be a date, such as 2025-08-07", key=f"{key}.valid_from")
    if not isinstance(row["source"], str):
        raise SettingsError("must say in words where the price is from", key=f"{key}.source")
    for amount in _AMOUNTS:
        value = row.get(amount, 0.0)
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < np.inf:
            raise SettingsError(f"is {value!r}; a price is finite and ≥ 0", key=f"{key}.{amount}")
    default = {"cached_input": row["input"], "cache_write": row["input"], "reasoning": row["output"]}
    amounts = {amount: float((default | row)[amount]) for amount in _AMOUNTS}
    return TokenPrice(model=model, valid_from=day, source=row["source"], **amounts)


def _known(table: dict[str, Any], keys: Sequence[str], key: str) -> None:
    for name in table:
        if name not in keys:
            raise SettingsError("unknown key", key=f"{key}.{name}", hint=nearest(name, keys))
