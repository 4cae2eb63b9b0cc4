"""A seeded sample log, for the demo and the tests. It is SYNTHETIC: all of it is drawn from the tables in
`walras.simulate.day`.

One row per (request, model), over one day: what each model would have given, and which one the logged policy
used. Arrow tables and Parquet files say what they are in their schema metadata (`walras.synthetic` = "true",
`walras.seed`); CSV and JSONL have no place for it. The columns, in order:

    request_id            "req-0000001", in order of arrival
    time_s                arrival, seconds from the start of the day; sorted, busiest in the early afternoon
    tenant, class         four tenants with uneven shares, six classes of task
    value_usd             V, USD per unit of quality; lognormal, so a few requests hold much of the value
    model                 five made-up names, from weakest to strongest
    chosen                true once per request
    propensity            probability with which the logged policy picks this model; sums to 1 in a request
    quality               0 or 1 where the class can be checked, else a score in [0, 1] in steps of 0.01
    cost_usd              tokens at list prices: uncached input, cached input, output
    latency_s             queue + time to first token + output tokens × time per token
    risk                  USD of expected loss from wrong autonomous actions; 0 in classes that only read
    risk_scenarios        USD of loss in 16 equally likely joint futures; their mean is `risk` (not in CSV)
    input_tokens          cached ones included
    cached_input_tokens   part of input_tokens
    output_tokens         reasoning included
    reasoning_tokens      part of output_tokens

Scenario s is the same future in every row, so losses add up by scenario and a portfolio CVaR has a meaning.

What there is to find. Difficulty is latent and only partly told by the class; a stronger model gains most on
hard tasks. `engineering` uses the frontier model by default (FM-1: a cheaper one would often do), `backoffice`
the cheapest (FM-2, P2: its regret sits on its few high-value requests); `support` and `research` weigh
V·q̂ − c − r on a noisy view of difficulty and pick by softmax. A tenth of all traffic is routed at random.

Where bounds bind. Per task in `sample_log()` (2,000 tasks, seed 0), for the logged choices and for the ex-post
best at λ₀ = 0, ρ₀ = 1, where a task may be deferred; seconds are over the tasks that are served. A bound below
the right column binds; from two thirds of it up, every task can still be served.

                       logged      best
    surplus_usd        0.6789    0.8929
    mean cost_usd     0.07624   0.01442
    mean latency_s      42.67     16.29
    p95 latency_s      189.12     64.04
    mean risk         0.03234   0.00694
"""

from __future__ import annotations

import json
import uuid
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet

from walras.errors import SettingsError
from walras.simulate import day
from walras.simulate.day import MODELS, arrivals, block_times, draw_block, scenario_shocks

WriteBatch = Callable[[pa.RecordBatch], Any]

_ARRIVALS, _SHOCKS, _FIRST_BLOCK = 0, 1, 2

_COLUMNS: dict[str, pa.DataType] = {
    "request_id": pa.string(),
    "time_s": pa.float64(),
    "tenant": pa.string(),
    "class": pa.string(),
    "value_usd": pa.float64(),
    "model": pa.string(),
    "chosen": pa.bool_(),
    "propensity": pa.float64(),
    "quality": pa.float64(),
    "cost_usd": pa.float64(),
    "latency_s": pa.float64(),
    "risk": pa.float64(),
    "risk_scenarios": pa.list_(pa.float64()),
    "input_tokens": pa.int64(),
    "cached_input_tokens": pa.int64(),
    "output_tokens": pa.int64(),
    "reasoning_tokens": pa.int64(),
}
SAMPLE_SCHEMA = pa.schema(_COLUMNS, metadata={b"walras.synthetic": b"true"})


# ---- What callers use ----


def sample_log(tasks: int = 2000, seed: int = 0) -> pa.Table:
    """The whole synthetic log as one table of tasks × 5 rows."""
    return pa.Table.from_batches(sample_batches(tasks, seed))


def sample_batches(tasks: int, seed: int, batch_tasks: int = 50_000) -> Iterator[pa.RecordBatch]:
    """The synthetic log in batches of `batch_tasks` tasks; the rows depend on `tasks` and `seed` only."""
    for key, number, least in (("tasks", tasks, 1), ("seed", seed, 0), ("batch_tasks", batch_tasks, 1)):
        if number < least:
            raise SettingsError(f"{number} is below {least}, the least a sample can have", key=key)
    return _rebatch(_blocks(tasks, seed), batch_tasks * len(MODELS))


def write_sample(path: Path, tasks: int, seed: int, on_batch: Callable[[int], None] | None = None) -> None:
    """Write the synthetic log to a .parquet, .csv or .jsonl file, whole or not at all.

    `on_batch` is called with the number of tasks in each batch written. Memory does not grow with `tasks`.
    """
    writer = _WRITERS.get(path.suffix.lower())
    if writer is None:
        raise SettingsError(f"{path.name!r} does not end in {', '.join(_WRITERS)}", key="--output")
    batches = sample_batches(tasks, seed)
    # In the same folder, because a rename is atomic only inside one file system.
    partial = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.partial")
    try:
        with partial.open("xb") as sink, writer(sink, _schema(seed)) as write:
            for batch in batches:
                write(batch)
                if on_batch is not None:
                    on_batch(batch.num_rows // len(MODELS))
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


# ---- Files and batches ----


@contextmanager
def _parquet(sink: BinaryIO, schema: pa.Schema) -> Iterator[WriteBatch]:
    with pyarrow.parquet.ParquetWriter(sink, schema, compression="zstd") as writer:
        yield writer.write_batch


@contextmanager
def _csv(sink: BinaryIO, schema: pa.Schema) -> Iterator[WriteBatch]:
    flat = pa.schema([field for field in schema if not pa.types.is_list(field.type)])
    with pyarrow.csv.CSVWriter(sink, flat) as writer:
        yield lambda batch: writer.write_batch(batch.select(flat.names))


@contextmanager
def _jsonl(sink: BinaryIO, _schema: pa.Schema) -> Iterator[WriteBatch]:
    encode = json.JSONEncoder(separators=(",", ":")).encode

    def write(batch: pa.RecordBatch) -> None:
        # Python objects are some twenty times larger than the columns, so only a slice is unpacked at a time.
        for start in range(0, batch.num_rows, 4096):
            rows = batch.slice(start, 4096).to_pylist()
            sink.write("".join(encode(row) + "\n" for row in rows).encode())

    yield write


_WRITERS: dict[str, Callable[[BinaryIO, pa.Schema], AbstractContextManager[WriteBatch]]] = {
    ".parquet": _parquet,
    ".csv": _csv,
    ".jsonl": _jsonl,
}


def _schema(seed: int) -> pa.Schema:
    return SAMPLE_SCHEMA.with_metadata({**SAMPLE_SCHEMA.metadata, b"walras.seed": str(seed).encode()})


def _rebatch(blocks: Iterator[pa.RecordBatch], rows: int) -> Iterator[pa.RecordBatch]:
    """The same rows in batches of `rows`, the last one shorter."""
    held: list[pa.RecordBatch] = []
    missing = rows
    for block in blocks:
        start = 0
        while len(block) - start >= missing:
            yield _joined([*held, block.slice(start, missing)])
            start += missing
            held, missing = [], rows
        if start < len(block):
            held.append(block.slice(start))
            missing -= len(block) - start
    if held:
        yield _joined(held)


def _joined(batches: list[pa.RecordBatch]) -> pa.RecordBatch:
    return pa.Table.from_batches(batches).combine_chunks().to_batches()[0]


def _blocks(tasks: int, seed: int) -> Iterator[pa.RecordBatch]:
    schema = _schema(seed)
    shocks = scenario_shocks(_stream(seed, _SHOCKS))
    elapsed = block_times(tasks, _stream(seed, _ARRIVALS))
    for k, start in enumerate(range(0, tasks, day.BLOCK_TASKS)):
        rng = _stream(seed, _FIRST_BLOCK + k)
        count = min(day.BLOCK_TASKS, tasks - start)
        times = arrivals(rng, count, elapsed[k], elapsed[k + 1], last=start + count == tasks)
        yield draw_block(rng, start + 1, times, shocks, schema)


def _stream(seed: int, key: int) -> np.random.Generator:
    return np.random.default_rng(np.random.SeedSequence(seed, spawn_key=(key,)))
