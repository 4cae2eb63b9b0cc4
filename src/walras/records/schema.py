"""The one record schema: what happened, or would have happened, when a request met a model.

Long format, one row per (request, model). The row of the model that was used has `chosen`; the other rows, where
there are any, hold what the alternatives would have given. A value that is not known is null, never a guess.
"""

from __future__ import annotations

from dataclasses import dataclass

import pyarrow as pa


@dataclass(frozen=True, slots=True)
class Column:
    """One column of the schema."""

    name: str
    type: pa.DataType
    meaning: str
    aliases: tuple[str, ...] = ()
    """Other names it is read under, tried in this order when no mapping is given."""
    required: bool = False
    low: float | None = None
    """Values below this are an error."""
    high: float | None = None


COLUMNS = (
    Column("request_id", pa.string(), "Who asked: one task", ("id", "sample_id", "trace_id"), required=True),
    Column("model", pa.string(), "The use: which model (or plan) answered", ("use",), required=True),
    Column(
        "quality",
        pa.float64(),
        "What it gave, 0 to 1; null = unknown",
        ("score",),
        required=True,
        low=0,
        high=1,
    ),
    Column(
        "cost_usd", pa.float64(), "USD paid for it; null = unknown", ("cost", "spend"), required=True, low=0
    ),
    Column("latency_s", pa.float64(), "Seconds until the answer, queueing included", ("seconds",), low=0),
    Column("risk", pa.float64(), "USD of expected loss from wrong actions", (), low=0),
    Column("irreversible_risk", pa.float64(), "The part of `risk` that cannot be undone, USD", (), low=0),
    Column("loss_usd", pa.float64(), "USD lost in fact by wrong actions; 0 = none were", (), low=0),
    Column(
        "risk_scenarios", pa.list_(pa.float64()), "USD of loss by equally likely joint scenario", (), low=0
    ),
    Column("chosen", pa.bool_(), "True on the row that was used", ("is_chosen",)),
    Column("propensity", pa.float64(), "Probability with which it was chosen", (), low=0, high=1),
    Column("value_usd", pa.float64(), "V of the task, USD per unit of quality", ("value",), low=0),
    Column("tenant", pa.string(), "Who pays", ("tenant_id", "team")),
    Column("class", pa.string(), "Kind of task", ("task_class", "benchmark", "repo", "task")),
    Column("prompt", pa.string(), "The request's text, as it was sent", ("text",)),
    Column("embedding", pa.list_(pa.float64()), "A vector of the prompt, the caller's own", ("vector",)),
    Column(
        "certainty",
        pa.float64(),
        "How sure a first look was, 0 to 1: self-reported confidence, vote share; known before the model is chosen",
        (),
        low=0,
        high=1,
    ),
    Column("time_s", pa.float64(), "Arrival, seconds from the log's start", ("arrival_s",)),
    Column("input_tokens", pa.float64(), "Prompt tokens, cached ones included", ("prompt_tokens",), low=0),
    Column("cached_input_tokens", pa.float64(), "Prompt tokens read from a cache", (), low=0),
    Column(
        "output_tokens", pa.float64(), "Generated tokens, reasoning included", ("completion_tokens",), low=0
    ),
    Column("reasoning_tokens", pa.float64(), "Generated tokens that were hidden reasoning", (), low=0),
)

BY_NAME = {column.name: column for column in COLUMNS}

SCHEMA = pa.schema([pa.field(c.name, c.type, metadata={"meaning": c.meaning}) for c in COLUMNS])
"""The same as an Arrow schema, with meanings as field metadata."""
