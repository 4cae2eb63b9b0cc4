"""What the options of `walras route` mean: who asks, what is true now, how far to explore."""

from __future__ import annotations

import datetime as dt
import json
import math
import sys
from pathlib import Path

import numpy as np

from walras.demand.explore import Greedy, Policy, Softmax, Thompson
from walras.errors import SettingsError
from walras.estimate.estimates import Estimates, Live
from walras.estimate.price_table import load_price_table
from walras.prices import Prices
from walras.records.asks import Asked, read_asks


def read_asked(
    prompt: str | None, jsonl: Path | None, task_class: str | None, tenant: str | None, warm: list[str] | None
) -> list[Asked]:
    """The requests to route: one from the options, or a file of them."""
    if (prompt is None) == (jsonl is None):
        raise SettingsError("give one of the two", key="--prompt or --jsonl")
    if jsonl is not None:
        if task_class or tenant or warm:
            raise SettingsError(
                "belong to --prompt; in a file each request has its own", key="--class, --tenant, --warm"
            )
        return read_asks(jsonl)
    if prompt == "-":
        prompt = sys.stdin.buffer.read().decode("utf-8", "replace")
    cached = dict(_tokens(item) for item in warm or ())
    return [Asked("prompt", prompt or "", task_class, tenant, cached_tokens=cached or None)]


def _tokens(item: str) -> tuple[str, float]:
    model, equals, tokens = item.rpartition("=")
    try:
        count = float(tokens)
    except ValueError:
        count = -1.0
    if not (model and equals and math.isfinite(count) and count >= 0):
        raise SettingsError(f"'{item}' is not MODEL=TOKENS", key="--warm")
    return model, count


def read_live(estimates: Estimates, price_table: Path | None, list_prices: bool, load: list[str]) -> Live:
    """What is true now: today's prices, and the load of each engine."""
    counts = np.zeros((2, len(estimates.models)))
    for item in load:
        model, _, numbers = item.rpartition("=")
        parts = numbers.split(":")
        if not model or len(parts) > 2 or not all(part.isdecimal() for part in parts):
            raise SettingsError(f"'{item}' is not MODEL=RUNNING[:WAITING]", key="--load")
        column = estimates.column_of(model)
        counts[: len(parts), column] = [float(part) for part in parts]
    running, waiting = counts if load else (None, None)
    today = dt.datetime.now(dt.UTC).date()
    return Live(load_price_table(price_table), today, list_prices, running=running, waiting=waiting)


def read_policy(text: str | None) -> Policy:
    """How to explore: `softmax:USD` or `thompson`, the best use if not given."""
    if text is None:
        return Greedy()
    kind, _, temperature = text.partition(":")
    if kind == "thompson" and not temperature:
        return Thompson()
    try:
        if kind == "softmax":
            return Softmax(float(temperature))
    except ValueError:
        pass
    raise SettingsError(f"'{text}' is neither softmax:USD nor thompson", key="--explore")


def read_live_prices(path: Path) -> Prices:
    """A price vector, bare or as `walras prices --json` prints it."""
    try:
        text = path.read_text(encoding="utf-8")
        data = json.loads(text)
    except OSError as error:
        raise SettingsError(f"cannot be read: {error.strerror}", key=str(path)) from error
    except ValueError as error:
        raise SettingsError(f"is not JSON: {error}", key=str(path)) from error
    vector = data.get("price_vector", data) if isinstance(data, dict) else data
    return Prices.from_json(json.dumps(vector))
