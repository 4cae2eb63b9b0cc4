"""What serving engines call their gauges and counters, by version.

A formula is a sum of series: `name{label=value} + name − 1`, with `/` between two sums; `name@label` is the number in a label; after ` ; `
stand the versions that have it. Of the formulas of a quantity the first that a page has counts, so current names stand first. Read from
the engines' own sources in November 2026: vLLM `v1/metrics/loggers.py`, SGLang `srt/observability/metrics_collector.py`, TensorRT-LLM
`metrics/collector.py`, the Triton backend's `custom_metrics_reporter.cc`, Dynamo `metrics/prometheus_names.rs`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from walras.errors import SettingsError
from walras.settings import EngineKind

Gauge = Literal["running", "waiting", "kv_use"]
Counter = Literal["finished", "prompt_tokens", "output_tokens", "preemptions"]
Limit = Literal["kv_blocks", "block_tokens", "max_sequences", "max_batched_tokens"]
Quantity = Gauge | Counter | Limit | Literal["hit_share"]
"""`hit_share` is a gauge, or one counter over another. Prompt tokens are all of them, found in memory or not."""

MEANING: dict[Quantity, str] = {
    "running": "sequences in the batch",
    "waiting": "requests in line",
    "kv_use": "share of KV blocks that sequences hold",
    "finished": "requests that ended",
    "prompt_tokens": "prompt tokens",
    "output_tokens": "output tokens",
    "preemptions": "preemptions",
    "hit_share": "share of prompt tokens found in memory",
    "kv_blocks": "KV blocks of a replica",
    "block_tokens": "tokens of a KV block",
    "max_sequences": "sequences it runs at once",
    "max_batched_tokens": "new tokens in a step",
}
LIMITS: tuple[Limit, ...] = ("kv_blocks", "block_tokens", "max_sequences", "max_batched_tokens")
COUNTED: frozenset[Quantity] = frozenset(
    ("finished", "prompt_tokens", "output_tokens", "preemptions", "hit_share")
)
SHARES: frozenset[Quantity] = frozenset(("kv_use", "hit_share"))
"""Of several replicas each has its own, or all have the same; everything else adds up."""


@dataclass(frozen=True, slots=True)
class Series:
    """One term of a formula."""

    name: str
    """Of a sample; "" for the number 1."""
    labels: tuple[tuple[str, str], ...] = ()
    """That a sample must have."""
    label: str = ""
    """Whose number is meant; "" for the sample's own value."""
    factor: float = 1.0


@dataclass(frozen=True, slots=True)
class Formula:
    """A sum, or one over another."""

    text: str
    above: tuple[Series, ...]
    below: tuple[Series, ...] = ()
    versions: str = ""
    """Of the engine that have it, where it is not the latest."""


@dataclass(frozen=True, slots=True)
class Engine:
    """How an engine's exposition is read."""

    title: str
    path: str
    """Where it is, if an address has no path."""
    prefixes: tuple[str, ...]
    """Of its names, by which it is known."""
    replica: tuple[str, ...]
    """Labels that tell replicas at one address apart."""
    copies: tuple[str, ...]
    """Labels of processes that each report the same replica: the first of them counts."""
    only: tuple[tuple[str, str], ...]
    """Labels of which, where they are there, only this value counts: the sum over the others."""
    turn_on: str
    formulas: Mapping[Quantity, tuple[Formula, ...]]


_TERM = re.compile(r"\s*([+−]?)\s*(?:([\d.]+)|([A-Za-z_:]\w*(?::\w+)*)(?:\{([^}]*)\})?(?:@(\w+))?)")


def _sum(text: str) -> tuple[Series, ...]:
    found, at = [], 0
    while at < len(text.rstrip()):
        term = _TERM.match(text, at)
        assert term is not None, text
        sign, constant, name, labels, label = term.groups()
        factor = (-1.0 if sign == "−" else 1.0) * float(constant or 1)
        pairs = tuple(tuple(pair.split("=")) for pair in (labels or "").split(",") if pair)
        found.append(Series(name or "", pairs, label or "", factor))
        at = term.end()
    return tuple(found)


def formula(text: str) -> Formula:
    """A formula as this module writes them."""
    text, _, versions = text.partition(" ; ")
    above, _, below = text.partition(" / ")
    return Formula(text, _sum(above), _sum(below), versions)


def _formulas(**by_quantity: tuple[str, ...]) -> dict[Quantity, tuple[Formula, ...]]:
    return {q: tuple(map(formula, by_quantity.get(q, ()))) for q in MEANING}


_TRITON = "nv_trt_llm_request_metrics{request_type=%s}"
_BLOCKS = "nv_trt_llm_kv_cache_block_metrics{kv_cache_block_type=%s}"

ENGINES: dict[EngineKind, Engine] = {
    "vllm": Engine(
        title="vLLM",
        path="/metrics",
        prefixes=("vllm:",),
        replica=("engine",),
        copies=(),
        only=(),
        turn_on="on unless it was started with --disable-log-stats",
        formulas=_formulas(
            running=("vllm:num_requests_running",),
            waiting=("vllm:num_requests_waiting",),
            kv_use=("vllm:kv_cache_usage_perc", "vllm:gpu_cache_usage_perc ; up to 0.11"),
            finished=("vllm:request_success_total",),
            prompt_tokens=("vllm:prompt_tokens_total",),
            output_tokens=("vllm:generation_tokens_total",),
            preemptions=("vllm:num_preemptions_total",),
            hit_share=(
                "vllm:prompt_tokens_cached_total / vllm:prompt_tokens_total",
                "vllm:prefix_cache_hits_total / vllm:prefix_cache_queries_total",
                "vllm:gpu_prefix_cache_hits_total / vllm:gpu_prefix_cache_queries_total ; up to 0.11",
                "vllm:gpu_prefix_cache_hit_rate ; engine V0",
            ),
            kv_blocks=("vllm:cache_config_info@num_gpu_blocks − 1",),  # it keeps one to itself
            block_tokens=("vllm:cache_config_info@block_size",),
        ),
    ),
    "sglang": Engine(
        title="SGLang",
        path="/metrics",
        prefixes=("sglang:",),
        replica=("dp_rank",),
        copies=("tp_rank", "pp_rank", "moe_ep_rank"),
        only=(("priority", ""),),
        turn_on="start it with --enable-metrics",
        formulas=_formulas(
            running=("sglang:num_running_reqs",),
            waiting=("sglang:num_queue_reqs",),
            kv_use=("sglang:token_usage",),
            finished=("sglang:num_requests_total", "sglang:e2e_request_latency_seconds_count"),
            prompt_tokens=(
                "sglang:realtime_tokens_total{mode=prefill_compute} + sglang:realtime_tokens_total{mode=prefill_cache}",
                "sglang:prompt_tokens_total",  # counts when a request ends
            ),
            output_tokens=("sglang:realtime_tokens_total{mode=decode}", "sglang:generation_tokens_total"),
            preemptions=("sglang:num_retracted_requests_total",),
            hit_share=(
                "sglang:realtime_tokens_total{mode=prefill_cache} / "
                "sglang:realtime_tokens_total{mode=prefill_compute} + sglang:realtime_tokens_total{mode=prefill_cache}",
                "sglang:cached_tokens_total / sglang:prompt_tokens_total",
                "sglang:cache_hit_rate",
            ),
            kv_blocks=("sglang:num_pages", "sglang:max_total_num_tokens / sglang:page_size"),
            block_tokens=("sglang:page_size",),
        ),
    ),
    "trtllm": Engine(
        title="TensorRT-LLM",
        path="/prometheus/metrics",
        prefixes=("trtllm_",),
        replica=(),
        copies=(),
        only=(),
        turn_on="set return_perf_metrics: true and enable_iter_perf_stats: true in its LLM arguments",
        formulas=_formulas(
            running=("trtllm_num_requests_running",),
            waiting=("trtllm_num_requests_waiting",),
            kv_use=(
                "trtllm_kv_cache_utilization",
                "trtllm_kv_cache_used_blocks / trtllm_kv_cache_max_blocks",
            ),
            finished=("trtllm_request_success_total",),
            prompt_tokens=("trtllm_prompt_tokens_total",),
            output_tokens=("trtllm_generation_tokens_total",),
            hit_share=(
                "trtllm_prompt_cached_tokens_total / trtllm_prompt_tokens_total",
                "trtllm_kv_cache_reused_blocks_total / "
                "trtllm_kv_cache_reused_blocks_total + trtllm_kv_cache_missed_blocks_total",
                "trtllm_kv_cache_hit_rate",
            ),
            kv_blocks=("trtllm_kv_cache_max_blocks",),
            block_tokens=("trtllm_kv_cache_tokens_per_block",),
            max_sequences=("trtllm_max_batch_size_runtime", "trtllm_max_batch_size_static"),
            max_batched_tokens=("trtllm_max_num_tokens_runtime",),
        ),
    ),
    "triton": Engine(
        title="Triton with TensorRT-LLM",
        path="/metrics",
        prefixes=("nv_trt_llm_", "nv_llm_"),
        replica=(),
        copies=(),
        only=(),
        turn_on="on at port 8002 unless it was started with --allow-metrics=false",
        formulas=_formulas(
            running=(_TRITON % "scheduled",),
            waiting=(_TRITON % "waiting", f"{_TRITON % 'active'} − {_TRITON % 'scheduled'}"),
            kv_use=(_BLOCKS % "fraction", f"{_BLOCKS % 'used'} / {_BLOCKS % 'max'}"),
            finished=("nv_llm_output_token_len_count", "nv_inference_request_success{model=tensorrt_llm}"),
            prompt_tokens=("nv_llm_input_token_len_sum",),
            output_tokens=("nv_llm_output_token_len_sum",),
            hit_share=(),
            kv_blocks=(_BLOCKS % "max",),
            block_tokens=(_BLOCKS % "tokens_per",),
            max_sequences=(_TRITON % "max",),
        ),
    ),
    "dynamo": Engine(
        title="Dynamo frontend",
        path="/metrics",
        prefixes=("dynamo_",),
        replica=(),
        copies=(),
        only=(),
        turn_on="on at the frontend's own port; for workers set DYN_SYSTEM_PORT",
        formulas=_formulas(
            # A request counts as queued until its first token: prefill is in line here.
            running=("dynamo_frontend_inflight_requests − dynamo_frontend_queued_requests",),
            waiting=("dynamo_frontend_queued_requests",),
            kv_use=(
                "dynamo_component_gpu_cache_usage_percent",  # a share, its name notwithstanding
                "dynamo_component_kvstats_gpu_cache_usage_percent ; up to 0.7",
            ),
            finished=("dynamo_frontend_requests_total",),
            prompt_tokens=("dynamo_frontend_input_sequence_tokens_sum",),
            output_tokens=(
                "dynamo_frontend_output_tokens_total",
                "dynamo_frontend_output_sequence_tokens_sum",
            ),
            hit_share=(
                "dynamo_frontend_cached_tokens_sum / dynamo_frontend_input_sequence_tokens_sum",
                "dynamo_component_kvstats_gpu_prefix_cache_hit_rate ; up to 0.7",
            ),
            kv_blocks=("dynamo_frontend_model_total_kv_blocks", "dynamo_component_total_blocks"),
            block_tokens=("dynamo_frontend_model_kv_cache_block_size",),
            max_sequences=("dynamo_frontend_model_max_num_seqs",),
            max_batched_tokens=("dynamo_frontend_model_max_num_batched_tokens",),
        ),
    ),
}
"""By type. A Dynamo worker passes on its engine's own names, so it is read as that engine."""


def kind_of(names: list[str]) -> EngineKind | None:
    """The engine whose names these are; None where no engine is known by them."""
    for kind, engine in ENGINES.items():
        if any(name.startswith(engine.prefixes) for name in names):
            return kind
    return None


def engine_of(kind: str) -> EngineKind:
    """A type that somebody wrote. Raises SettingsError where there is no such."""
    for known in ENGINES:
        if kind == known:
            return known
    raise SettingsError(f"no engine type '{kind}'", key="--engine", hint=", ".join(ENGINES))
