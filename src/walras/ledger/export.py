"""The ledger as records, for `walras audit` and `walras fit`."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from walras.errors import OutputError
from walras.ledger.entry import Outcome, unpack
from walras.ledger.money import usd
from walras.ledger.sql import ALL, Filter, Query, Row, pages, read_outcomes
from walras.ledger.store import Store
from walras.records.schema import SCHEMA

_COLUMNS = (
    "request_id",
    "model",
    "quality",
    "cost_usd",
    "latency_s",
    "risk",
    "loss_usd",
    "chosen",
    "propensity",
    "value_usd",
    "tenant",
    "class",
    "prompt",
    "time_s",
    "input_tokens",
    "cached_input_tokens",
    "output_tokens",
    "reasoning_tokens",
)
PAGE = 1_000


@dataclass(frozen=True, slots=True)
class Exported:
    """What went into the file, and what could not."""

    requests: int
    rows: int
    with_quality: int
    """Requests that have an outcome; without any, an audit has nothing to compare."""
    left_out: int
    """Requests for which nothing was chosen, or nobody knows what: refused, or settled after a crash."""


def export(
    store: Store, path: Path, *, where: Filter = ALL, alternatives: bool = False, synthetic: bool = False
) -> Exported:
    """Write entries as Parquet in the record schema, whole or not at all.

    `quality` and `loss_usd` are those of the request's latest outcome, `cost_usd` is what was paid after corrections, and `risk`
    is ρΔR at the ρ₀ of the day.

    Args:
        alternatives: add the uses that were considered and not chosen, as rows without outcomes.
        synthetic: the traffic or the providers were simulated; the file says so.

    Raises:
        OutputError: the file cannot be written.
    """
    schema = pa.schema([SCHEMA.field(name) for name in _COLUMNS])
    if synthetic:
        schema = schema.with_metadata({b"walras.synthetic": b"true"})
    fresh = path.with_name(f".{path.name}.new")
    requests = rows = with_quality = left_out = 0
    try:
        with store.snapshot() as query, pq.ParquetWriter(fresh, schema) as writer:
            start = _first_ns(query, where)
            for page in pages(query, where, PAGE):
                known = [row for row in page if row.entry.use is not None]
                outcomes = read_outcomes(query, [row.entry.request_id for row in known])
                records = [record for row in known for record in _records(row, outcomes, start, alternatives)]
                writer.write_table(pa.Table.from_pylist(records, schema=schema))
                requests, rows = requests + len(known), rows + len(records)
                with_quality, left_out = with_quality + len(outcomes), left_out + len(page) - len(known)
        fresh.replace(path)
    except OSError as error:
        raise OutputError(f"{path}: cannot be written: {error.strerror or error}") from error
    finally:
        fresh.unlink(missing_ok=True)
    return Exported(requests, rows, with_quality, left_out)


def _first_ns(query: Query, where: Filter) -> int:
    condition, values = where.where()
    return int(query(f"SELECT min(e.at_ns) FROM entries e WHERE 1 = 1{condition}", values)[0][0] or 0)


def _records(
    row: Row, outcomes: dict[str, list[Outcome]], start_ns: int, alternatives: bool
) -> Iterator[dict[str, Any]]:
    entry = row.entry
    outcome = outcomes[entry.request_id][-1] if entry.request_id in outcomes else None
    request = {
        "request_id": entry.request_id,
        "value_usd": entry.value_usd,
        "tenant": entry.tenant,
        "class": entry.task_class,
        "prompt": entry.prompt,
        "time_s": (entry.at_ns - start_ns) / 1e9,
    }
    yield request | {
        "model": entry.use,
        "quality": outcome and outcome.quality,
        "cost_usd": usd(row.paid_nano),
        "latency_s": entry.seconds,
        "risk": usd(entry.risk_nano),
        "loss_usd": outcome and outcome.loss_usd,
        "chosen": True,
        "propensity": entry.propensity,
        "input_tokens": entry.input_tokens,
        "cached_input_tokens": entry.cached_input_tokens,
        "output_tokens": entry.output_tokens,
        "reasoning_tokens": entry.reasoning_tokens,
    }
    if alternatives:
        others = {alternative.use: None for alternative in unpack(entry.alternatives)}
        yield from (request | {"model": use, "chosen": False} for use in others if use != entry.use)
