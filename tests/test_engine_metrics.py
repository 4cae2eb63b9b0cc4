"""Metrics of serving engines: read by name and version, made into rates, states and prices, and charged on the board."""

from __future__ import annotations

import asyncio
import json
import math
import socket
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from inprocess import Live, live
from logs import walras
from walras import replay_commands
from walras.engine.generated import Lengths, Sessions
from walras.engine.profiles import load_profile
from walras.engine.replay import Replay
from walras.engine.requests import Requests
from walras.engine.settings import EngineSettings, Routing
from walras.equation import terms
from walras.errors import RecordError, SettingsError
from walras.gateway.board import Board, standing_json
from walras.gateway.clearer import clear
from walras.gateway.offers import CONGESTION, Asked, tasks_of, uses_of
from walras.prices import Prices
from walras.settings import Economy, EngineLink
from walras.simulate.engine_metrics import Exporter, serving
from walras.supply.engines import IDLE, RESOURCES, EngineNow, EngineReader, History, Load, watch
from walras.supply.exposition import ALL, Page, parse, read_page
from walras.supply.names import ENGINES, MEANING, formula
from walras.supply.poll import MOST, fetch, whole_url
from walras.supply.resource_prices import expected_amounts, live_prices, quote
from walras.supply.state import EngineState, state_of

PROFILE = "h100-qwen3-32b-tp8"
LIMITS = load_profile(PROFILE).limits
STEP_LIMITS = (LIMITS.step_tokens, LIMITS.most_sequences)
WHOLE = EngineSettings(
    LIMITS.kv_tokens // 16, max_batched_tokens=LIMITS.step_tokens, max_sequences=LIMITS.most_sequences
)
"""The profile's own limits."""

# --- goldens: what engines say, by version --------------------------------------------------------------------------------

VLLM = """\
# HELP vllm:num_requests_running Number of requests in model execution batches.
# TYPE vllm:num_requests_running gauge
vllm:num_requests_running{engine="0",model_name="m"} 12.0
vllm:num_requests_running{engine="1",model_name="m"} 3.0
# TYPE vllm:num_requests_waiting gauge
vllm:num_requests_waiting{engine="0",model_name="m"} 4.0
vllm:num_requests_waiting{engine="1",model_name="m"} 0.0
vllm:num_requests_waiting_by_reason{engine="0",model_name="m",reason="capacity"} 4.0
# TYPE vllm:kv_cache_usage_perc gauge
vllm:kv_cache_usage_perc{engine="0",model_name="m"} 0.71
vllm:kv_cache_usage_perc{engine="1",model_name="m"} 0.05
# TYPE vllm:request_success_total counter
vllm:request_success_total{engine="0",finished_reason="stop",model_name="m"} 90.0
vllm:request_success_total{engine="0",finished_reason="length",model_name="m"} 10.0
vllm:request_success_total{engine="1",finished_reason="stop",model_name="m"} 7.0
vllm:request_success_created{engine="1",finished_reason="stop",model_name="m"} 1.79e+09
# TYPE vllm:prompt_tokens_total counter
vllm:prompt_tokens_total{engine="0",model_name="m"} 5.0e+05
vllm:prompt_tokens_total{engine="1",model_name="m"} 3000.0
vllm:prompt_tokens_by_source_total{engine="0",model_name="m",source="local_compute"} 4.0e+05
vllm:prompt_tokens_cached_total{engine="0",model_name="m"} 1.0e+05
vllm:prompt_tokens_cached_total{engine="1",model_name="m"} 0.0
vllm:generation_tokens_total{engine="0",model_name="m"} 20000.0
vllm:generation_tokens_total{engine="1",model_name="m"} 900.0
vllm:num_preemptions_total{engine="0",model_name="m"} 2.0
vllm:num_preemptions_total{engine="1",model_name="m"} 0.0
# TYPE vllm:time_to_first_token_seconds histogram
vllm:time_to_first_token_seconds_bucket{engine="0",le="0.01",model_name="m"} 1.0
vllm:time_to_first_token_seconds_count{engine="0",model_name="m"} 100.0
vllm:cache_config_info{block_size="16",cache_dtype="auto",engine="0",num_gpu_blocks="573"} 1.0
vllm:cache_config_info{block_size="16",cache_dtype="auto",engine="1",num_gpu_blocks="573"} 1.0
process_start_time_seconds 1.79e+09
"""
VLLM_010 = """\
vllm:num_requests_running{engine="0",model_name="m"} 1.0
vllm:num_requests_waiting{engine="0",model_name="m"} 0.0
vllm:gpu_cache_usage_perc{engine="0",model_name="m"} 0.25
vllm:gpu_prefix_cache_queries_total{engine="0",model_name="m"} 40.0
vllm:gpu_prefix_cache_hits_total{engine="0",model_name="m"} 10.0
vllm:request_success_total{engine="0",finished_reason="stop",model_name="m"} 1.0
vllm:prompt_tokens_total{engine="0",model_name="m"} 64.0
vllm:generation_tokens_total{engine="0",model_name="m"} 8.0
vllm:num_preemptions_total{engine="0",model_name="m"} 0.0
vllm:cache_config_info{block_size="16",engine="0",num_gpu_blocks="None"} 1.0
"""
VLLM_V0 = """\
vllm:num_requests_running{model_name="m"} 2.0
vllm:num_requests_waiting{model_name="m"} 1.0
vllm:gpu_cache_usage_perc{model_name="m"} 0.5
vllm:gpu_prefix_cache_hit_rate{model_name="m"} 0.3
vllm:request_success_total{finished_reason="stop",model_name="m"} 5.0
vllm:prompt_tokens_total{model_name="m"} 100.0
vllm:generation_tokens_total{model_name="m"} 50.0
vllm:num_preemptions_total{model_name="m"} 0.0
"""
SGLANG = """\
sglang:num_running_reqs{dp_rank="0",model_name="m",pp_rank="0",priority="",tp_rank="0"} 8.0
sglang:num_running_reqs{dp_rank="0",model_name="m",pp_rank="0",priority="5",tp_rank="0"} 6.0
sglang:num_running_reqs{dp_rank="0",model_name="m",pp_rank="0",priority="",tp_rank="1"} 8.0
sglang:num_running_reqs{dp_rank="1",model_name="m",pp_rank="0",priority="",tp_rank="2"} 4.0
sglang:num_queue_reqs{dp_rank="0",model_name="m",pp_rank="0",priority="",tp_rank="0"} 1.0
sglang:num_queue_reqs{dp_rank="1",model_name="m",pp_rank="0",priority="",tp_rank="2"} 0.0
sglang:token_usage{dp_rank="0",model_name="m",pp_rank="0",tp_rank="0"} 0.6
sglang:token_usage{dp_rank="1",model_name="m",pp_rank="0",tp_rank="2"} 0.2
sglang:realtime_tokens_total{dp_rank="0",mode="prefill_compute",model_name="m"} 900.0
sglang:realtime_tokens_total{dp_rank="0",mode="prefill_cache",model_name="m"} 100.0
sglang:realtime_tokens_total{dp_rank="0",mode="decode",model_name="m"} 70.0
sglang:realtime_tokens_total{dp_rank="1",mode="prefill_compute",model_name="m"} 500.0
sglang:num_requests_total{is_streaming="true",model_name="m"} 6.0
sglang:num_requests_total{is_streaming="false",model_name="m"} 4.0
sglang:num_retracted_requests_total{dp_rank="0",model_name="m"} 3.0
sglang:max_total_num_tokens{dp_rank="0",model_name="m"} 4096.0
sglang:page_size{dp_rank="0",model_name="m"} 1.0
sglang:num_pages{dp_rank="0",model_name="m"} 4096.0
"""
SGLANG_EARLIER = """\
# HELP sglang:prompt_tokens_total Number of prefill tokens processed.
# TYPE sglang:prompt_tokens_total counter
sglang:prompt_tokens_total{model_name="m"} 8.128902e+06
# TYPE sglang:generation_tokens_total counter
sglang:generation_tokens_total{model_name="m"} 7.557572e+06
# TYPE sglang:token_usage gauge
sglang:token_usage{model_name="m"} 0.28
# TYPE sglang:cache_hit_rate gauge
sglang:cache_hit_rate{model_name="m"} 0.0075
sglang:e2e_request_latency_seconds_count{model_name="m"} 11228.0
sglang:num_running_reqs{model_name="m"} 162.0
sglang:num_queue_reqs{model_name="m"} 2826.0
"""
TRTLLM = """\
trtllm_num_requests_running{engine_type="trtllm",model_name="m"} 7.0
trtllm_num_requests_waiting{engine_type="trtllm",model_name="m"} 2.0
trtllm_kv_cache_utilization{engine_type="trtllm",model_name="m"} 0.4
trtllm_request_success_total{engine_type="trtllm",finished_reason="stop",model_name="m"} 20.0
trtllm_prompt_tokens_total{engine_type="trtllm",model_name="m"} 8000.0
trtllm_prompt_cached_tokens_total{engine_type="trtllm",model_name="m"} 2000.0
trtllm_generation_tokens_total{engine_type="trtllm",model_name="m"} 4000.0
trtllm_kv_cache_max_blocks{engine_type="trtllm",model_name="m"} 1000.0
trtllm_kv_cache_tokens_per_block{engine_type="trtllm",model_name="m"} 32.0
trtllm_max_batch_size_runtime{engine_type="trtllm",model_name="m"} 64.0
trtllm_max_num_tokens_runtime{engine_type="trtllm",model_name="m"} 8192.0
"""
TRTLLM_BY_DYNAMO = """\
trtllm:request_success_total{finished_reason="stop",model_name="m"} 20.0
trtllm:e2e_request_latency_seconds_count{model_name="m"} 20.0
"""
TRITON = """\
nv_inference_request_success{model="ensemble",version="1"} 9
nv_inference_request_success{model="tensorrt_llm",version="1"} 9
nv_trt_llm_request_metrics{model="tensorrt_llm",request_type="scheduled",version="1"} 5
nv_trt_llm_request_metrics{model="tensorrt_llm",request_type="active",version="1"} 6
nv_trt_llm_request_metrics{model="tensorrt_llm",request_type="max",version="1"} 512
nv_trt_llm_kv_cache_block_metrics{kv_cache_block_type="tokens_per",model="tensorrt_llm",version="1"} 64
nv_trt_llm_kv_cache_block_metrics{kv_cache_block_type="used",model="tensorrt_llm",version="1"} 1560
nv_trt_llm_kv_cache_block_metrics{kv_cache_block_type="max",model="tensorrt_llm",version="1"} 6240
"""
DYNAMO = """\
dynamo_frontend_inflight_requests{model="m"} 12
dynamo_frontend_inflight_requests{model="other"} 100
dynamo_frontend_queued_requests{model="m"} 5
dynamo_frontend_requests_total{endpoint="chat_completions",model="m",request_type="stream",status="success"} 30
dynamo_frontend_output_tokens_total{model="m"} 6000
dynamo_frontend_input_sequence_tokens_sum{model="m"} 90000
dynamo_frontend_cached_tokens_sum{model="m"} 45000
dynamo_frontend_model_total_kv_blocks{model="m"} 2000
dynamo_frontend_model_kv_cache_block_size{model="m"} 16
dynamo_frontend_model_max_num_seqs{model="m"} 256
dynamo_frontend_model_max_num_batched_tokens{model="m"} 8192
"""
WORKER = 'dynamo_component_gpu_cache_usage_percent{dynamo_component="backend"} 0.7\n' + VLLM_V0
GOLDENS: list[tuple[str, str, str, dict[str, dict[str, float]], dict[str, int], set[str]]] = [
    (
        "vLLM",
        VLLM,
        "vllm",
        {
            "0": {
                "running": 12,
                "waiting": 4,
                "kv_use": 0.71,
                "finished": 100,
                "prompt_tokens": 500_000,
                "output_tokens": 20_000,
                "preemptions": 2,
                "hit_share": 0.2,
            },
            "1": {"running": 3, "finished": 7, "hit_share": 0.0, "kv_use": 0.05},
        },
        {"kv_blocks": 572, "block_tokens": 16},
        {"max_sequences", "max_batched_tokens"},
    ),
    (
        "vLLM up to 0.11",
        VLLM_010,
        "vllm",
        {"0": {"kv_use": 0.25, "hit_share": 0.25, "prompt_tokens": 64}},
        {"block_tokens": 16},
        {"kv_blocks", "max_sequences", "max_batched_tokens"},
    ),
    (
        "vLLM before V1",
        VLLM_V0,
        "vllm",
        {ALL: {"running": 2, "waiting": 1, "kv_use": 0.5, "hit_share": 0.3}},
        {},
        {"kv_blocks", "block_tokens", "max_sequences", "max_batched_tokens"},
    ),
    (
        "SGLang",
        SGLANG,
        "sglang",
        {
            "0": {
                "running": 8,
                "waiting": 1,
                "kv_use": 0.6,
                "prompt_tokens": 1000,
                "hit_share": 0.1,
                "output_tokens": 70,
                "finished": 5,
                "preemptions": 3,
            },
            "1": {"running": 4, "prompt_tokens": 500, "hit_share": 0.0, "output_tokens": 0, "finished": 5},
        },
        {"kv_blocks": 4096, "block_tokens": 1},
        {"max_sequences", "max_batched_tokens"},
    ),
    (
        "SGLang, earlier",
        SGLANG_EARLIER,
        "sglang",
        {ALL: {"running": 162, "waiting": 2826, "hit_share": 0.0075, "finished": 11228, "kv_use": 0.28}},
        {},
        {"preemptions", "kv_blocks", "block_tokens", "max_sequences", "max_batched_tokens"},
    ),
    (
        "TensorRT-LLM",
        TRTLLM,
        "trtllm",
        {ALL: {"running": 7, "waiting": 2, "kv_use": 0.4, "hit_share": 0.25, "prompt_tokens": 8000}},
        {"kv_blocks": 1000, "block_tokens": 32, "max_sequences": 64, "max_batched_tokens": 8192},
        {"preemptions"},
    ),
    (
        "TensorRT-LLM with its first metrics, through Dynamo",
        TRTLLM_BY_DYNAMO,
        "trtllm",
        {ALL: {"finished": 20}},
        {},
        set(MEANING) - {"finished"},
    ),
    (
        "Triton",
        TRITON,
        "triton",
        {ALL: {"running": 5, "waiting": 1, "kv_use": 0.25, "finished": 9}},
        {"kv_blocks": 6240, "block_tokens": 64, "max_sequences": 512},
        {"prompt_tokens", "output_tokens", "preemptions", "hit_share", "max_batched_tokens"},
    ),
    (
        "Dynamo frontend",
        DYNAMO,
        "dynamo",
        {ALL: {"running": 7, "waiting": 5, "hit_share": 0.5, "prompt_tokens": 90_000, "output_tokens": 6000}},
        {"kv_blocks": 2000, "block_tokens": 16, "max_sequences": 256, "max_batched_tokens": 8192},
        {"kv_use", "preemptions"},
    ),
    (
        "a Dynamo worker is its engine",
        WORKER,
        "vllm",
        {ALL: {"running": 2, "kv_use": 0.5}},
        {},
        {"kv_blocks", "block_tokens", "max_sequences", "max_batched_tokens"},
    ),
]


@pytest.mark.parametrize(
    ("text", "kind", "values", "limits", "missing"), [g[1:] for g in GOLDENS], ids=[g[0] for g in GOLDENS]
)
def test_what_an_engine_says_is_read_by_its_names(
    text: str, kind: str, values: dict[str, dict[str, float]], limits: dict[str, int], missing: set[str]
) -> None:
    page = read_page(parse(text.encode()), None, "m" if "dynamo_frontend" in text else None)
    assert page.kind == kind
    assert page.values.keys() == values.keys()
    for replica, wanted in values.items():
        read = {name: page.values[replica][name].now for name in wanted}  # type: ignore[index] # names of quantities
        assert read == pytest.approx(wanted)
    assert page.limits == limits
    assert page.missing.keys() == missing
    assert page.read_by.keys() == set(MEANING) - missing
    assert not page.simulated


def test_openmetrics_is_read_as_the_older_format_is_and_no_clock_but_ours_counts() -> None:
    text = """\
# TYPE vllm:num_requests_running gauge
vllm:num_requests_running{engine="0"} 3.0 4102444800.0
# TYPE vllm:request_success counter
vllm:request_success_total{engine="0"} 9.0 1.0 # {trace_id="x"} 1.0
# TYPE vllm:time_to_first_token_seconds histogram
vllm:time_to_first_token_seconds_bucket{le="+Inf"} 9.0
vllm:time_to_first_token_seconds_count 9.0
vllm:time_to_first_token_seconds_sum 1.5
# EOF
"""
    page = read_page(parse(text.encode(), "application/openmetrics-text; version=1.0.0"))
    assert {q: v.now for q, v in page.values["0"].items()} == {"running": 3.0, "finished": 9.0}
    with pytest.raises(RecordError, match="no Prometheus page"):
        parse(text.removesuffix("# EOF\n").encode(), "application/openmetrics-text; version=1.0.0")


def test_formulas_are_sums_of_series() -> None:
    assert formula("a{x=1,y=2} + b:c − 3 / d@e").text == "a{x=1,y=2} + b:c − 3 / d@e"
    one = formula("a{x=1,y=2} + b:c − 3 / d@e")
    assert [(s.name, s.labels, s.label, s.factor) for s in (*one.above, *one.below)] == [
        ("a", (("x", "1"), ("y", "2")), "", 1.0),
        ("b:c", (), "", 1.0),
        ("", (), "", -3.0),
        ("d", (), "e", 1.0),
    ]


# --- what is wrong with a page --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("body", "kind", "says"),
    [
        (b'[{"iter": 3}]', None, "JSON.*/prometheus/metrics"),
        (b"<!doctype html><p>hello", None, "HTML"),
        (b"vllm:num_requests_running{engine= 3\n", None, "no Prometheus page"),
        (b"\xff\xfe\x00", None, "no Prometheus page"),
        (b"", None, "no metrics of a serving engine.*vLLM, SGLang"),
        (b"python_info 1\nhttp_requests_total 7\n", "vllm", "no metrics.*--disable-log-stats"),
        (b"http_requests_total 7\n", "sglang", "--enable-metrics"),
        (SGLANG.encode(), "vllm", 'looks like SGLang, not vLLM.*kind = "sglang"'),
        (b"vllm:some_new_thing 1\n", None, "says nothing of requests"),
    ],
)
def test_a_page_that_is_none_says_what_it_looks_like(body: bytes, kind: Any, says: str) -> None:
    with pytest.raises(RecordError, match=says):
        read_page(parse(body), kind)


def test_a_model_that_is_not_there_leaves_nothing() -> None:
    with pytest.raises(RecordError, match="of model 'other'"):
        read_page(parse(VLLM_V0.encode()), None, "other")


@pytest.mark.parametrize("value", ["NaN", "+Inf", "-Inf", "-3"])
def test_a_number_that_cannot_be_is_missing_with_the_reason(value: str) -> None:
    text = VLLM_V0.replace(
        'num_requests_waiting{model_name="m"} 1.0', f'num_requests_waiting{{model_name="m"}} {value}'
    )
    page = read_page(parse(text.encode()))
    assert "waiting" not in page.values[ALL]
    assert "vllm:num_requests_waiting is" in page.missing["waiting"]


def test_a_percentage_is_no_share() -> None:
    page = read_page(parse(VLLM_V0.replace('perc{model_name="m"} 0.5', 'perc{model_name="m"} 50').encode()))
    assert page.missing["kv_use"].endswith("50, which is no share")


# --- rates ---------------------------------------------------------------------------------------------------------------


def vllm_page(
    finished: float,
    prompt: float,
    hits: float,
    output: float,
    inside: tuple[float, float],
    start: float = 1.0,
) -> Page:
    text = f"""\
vllm:num_requests_running {inside[0]}
vllm:num_requests_waiting {inside[1]}
vllm:kv_cache_usage_perc 0.5
vllm:request_success_total {finished}
vllm:prompt_tokens_total {prompt}
vllm:prompt_tokens_cached_total {hits}
vllm:generation_tokens_total {output}
vllm:num_preemptions_total 0
process_start_time_seconds {start}
"""
    return read_page(parse(text.encode()))


counts = st.integers(0, 10_000).map(float)
steps_of_time = st.tuples(
    st.floats(0.1, 2), counts, counts, st.floats(0, 1), counts, counts, counts, st.booleans()
)


@given(st.lists(steps_of_time, min_size=1, max_size=12))
@settings(max_examples=40)
def test_rates_are_increments_over_our_own_seconds_and_never_negative(polls: list[Any]) -> None:
    """Against the same sums by hand, with restarts in between: after one there is no rate until a second page."""
    history, now, total, past = History(3.0), 0.0, np.zeros(4), list[Any]()
    for seconds, finished, prompt, share, output, running, waiting, restart in polls:
        now += seconds
        if restart and past and total.any():
            total, past = np.zeros(4), []
        else:
            total = total + np.array([finished, prompt, np.floor(share * prompt), output])
        history.add(now, vllm_page(*total.tolist(), (running, waiting)))
        past.append((now, total, running + waiting))
        past = [
            p
            for k, p in enumerate(past)
            if k + 1 == len(past) or past[k + 1][0] > now - 3.0 or len(past) - k <= 2
        ]
        states = history.states(0.0)
        if len(past) < 2:
            assert states is None
            continue
        assert states is not None
        (state,), (t0, first, inside0) = states.values(), past[0]
        d = (total - first) / (now - t0)
        arrivals = max(0.0, d[0] + (running + waiting - inside0) / (now - t0))
        assert state.arrivals_per_s == pytest.approx(arrivals)
        assert state.prompt_tokens_per_s == pytest.approx(d[1] - d[2], abs=1e-6)
        assert state.output_tokens_per_s == pytest.approx(d[3])
        assert state.hit_share == pytest.approx(d[2] / d[1] if d[1] else 0.0)
        assert min(asdict(state).values()) >= 0


def test_a_restart_is_seen_by_a_counter_or_by_the_start_of_the_process() -> None:
    by_counter, by_start, neither = History(30.0), History(30.0), History(30.0)
    for history, second, start in ((by_counter, 50.0, 1.0), (by_start, 200.0, 2.0), (neither, 200.0, 1.0)):
        history.add(0.0, vllm_page(100, 100, 0, 100, (1, 0)))
        history.add(2.0, vllm_page(second, second, 0, second, (1, 0), start))
    assert by_counter.states(0.0) is None
    assert by_start.states(0.0) is None
    assert by_counter.restarts == by_start.restarts == 1
    assert neither.restarts == 0
    by_counter.add(4.0, vllm_page(60, 60, 0, 70, (1, 0)))
    (state,) = (by_counter.states(0.0) or {}).values()
    assert (state.arrivals_per_s, state.output_tokens_per_s) == (5.0, 10.0)


def test_however_often_it_is_read_a_window_keeps_few_pages() -> None:
    history = History(60.0)
    for k in range(1200):
        history.add(0.1 * k, vllm_page(k, 10 * k, 0, 5 * k, (1, 0)))
    assert len(history._pages) <= 70
    (state,) = (history.states(0.0) or {}).values()
    assert state.arrivals_per_s == pytest.approx(10.0)


# --- an engine: prices, what cannot be told, and what happens when it is not read -------------------------------------------


class Clock:
    """Seconds that a test sets."""

    def __init__(self) -> None:
        self.s = 1000.0

    def __call__(self) -> float:
        return self.s


def canned(*answers: str | RecordError) -> Callable[[str, float], Awaitable[tuple[bytes, str]]]:
    """What one poll after the other gets; the last for ever."""
    left = list(answers)

    async def get(_: str, __: float) -> tuple[bytes, str]:
        answer = left.pop(0) if len(left) > 1 else left[0]
        if isinstance(answer, RecordError):
            raise answer
        return answer.encode(), "text/plain"

    return get


def text_of(n: float, extra: str = "") -> str:
    return f"""\
vllm:num_requests_running 20
vllm:num_requests_waiting 5
vllm:kv_cache_usage_perc 0.5
vllm:request_success_total {n}
vllm:prompt_tokens_total {1000 * n}
vllm:prompt_tokens_cached_total {400 * n}
vllm:generation_tokens_total {200 * n}
vllm:num_preemptions_total 0
{extra}"""


def polled(link: dict[str, Any], at: list[float], *answers: str | RecordError) -> list[EngineNow]:
    """What an engine is after each poll, at these seconds."""
    clock = Clock()
    whole = EngineLink.model_validate({"urls": ("http://x",), "profile": PROFILE} | link)
    reader = EngineReader("big", whole, get=canned(*answers), clock=clock, monotonic=clock)

    async def run() -> list[EngineNow]:
        found = []
        for s in at:
            clock.s = 1000.0 + s
            found.append(await reader.poll(0.01))
        return found

    return asyncio.run(run())


def test_prices_are_those_of_the_state_that_was_read() -> None:
    first, second = polled({}, [0, 10], text_of(0), text_of(100))
    assert [p.read_usd for p in first.prices] == [None] * 6
    assert "rates need a second reading" in first.prices[0].reason
    state = EngineState(1010.0, 20, 5, 0.5, 10.0, 6000.0, 2000.0, 0.4, 0.0, 1000.0, 200.0)
    assert second.states == {"0": state}
    wanted = live_prices(state, WHOLE, load_profile(PROFILE).steps(*STEP_LIMITS), 0.01)
    six = [getattr(wanted, name) for name in RESOURCES.values()]
    assert [p.usd for p in second.prices] == [p.read_usd for p in second.prices] == pytest.approx(six)
    assert [p.reason for p in second.prices[:4]] == list(wanted.reasons)
    assert min(six[:2]) > 0


@pytest.mark.parametrize(("tokens", "output"), [(0, 0), (1, 1), (2000, 300), (30_000, 50)])
def test_a_request_pays_its_expected_amounts_at_the_prices(tokens: float, output: float) -> None:
    """What the service charges in a dozen multiplications is `quote` of `expected_amounts`."""
    (_, now) = polled({}, [0, 10], text_of(0), text_of(100))
    state, steps = now.states["0"], load_profile(PROFILE).steps(*STEP_LIMITS)
    prices = live_prices(state, WHOLE, steps, 0.01)
    amounts = expected_amounts(state, WHOLE, steps, tokens, output_tokens=output)
    assert now.load.congestion(tokens, output, 1e9) == pytest.approx(quote(prices, amounts))


def test_limits_are_declared_else_exported_else_the_profiles() -> None:
    extra = 'vllm:cache_config_info{block_size="32",num_gpu_blocks="101"} 1\n'
    for link, blocks, block in (({}, 100, 32), ({"kv_blocks": 7, "block_tokens": 8}, 7, 8)):
        (_, now) = polled(link, [0, 10], text_of(0, extra), text_of(100, extra))
        assert now.load.block_tokens == block
        engine = replace(WHOLE, kv_blocks=blocks, block_tokens=block)
        wanted = live_prices(now.states["0"], engine, load_profile(PROFILE).steps(*STEP_LIMITS), 0.01)
        assert now.prices[2].usd == pytest.approx(wanted.kv_block_s)


def test_several_replicas_are_kept_apart_and_weigh_by_what_arrives() -> None:
    def two(n: float) -> str:
        one, other = (text_of(k * n).replace(" ", f'{{engine="{e}"}} ') for e, k in ((0, 3), (1, 1)))
        return one + other

    (_, both) = polled({}, [0, 10], two(0), two(100))
    assert both.states.keys() == {"0", "1"}
    assert (both.states["0"].arrivals_per_s, both.states["1"].arrivals_per_s) == (30.0, 10.0)
    (_, one), (_, other) = (polled({}, [0, 10], text_of(0), text_of(k * 100)) for k in (3, 1))
    mean = 0.75 * one.prices[0].usd + 0.25 * other.prices[0].usd
    assert both.prices[0].usd == pytest.approx(mean)
    (_, summed) = polled({"replicas": 2}, [0, 10], text_of(0), text_of(100))
    assert (summed.states["0"].running, summed.states["0"].arrivals_per_s) == (10, 5.0)


def test_what_is_missing_says_which_price_cannot_be_told() -> None:
    def less(text: str, *names: str) -> str:
        return "\n".join(line for line in text.splitlines() if not any(n in line for n in names)) + "\n"

    (_, now) = polled({}, [0, 10], *(less(text_of(n), "kv_cache", "preemptions", "cached") for n in (0, 100)))
    told = [p.read_usd is not None for p in now.prices]
    assert told == [True, True, False, True, True, True]
    assert "share of KV blocks that sequences hold: not exported" in now.prices[2].reason
    assert [n.partition(":")[0] for n in now.notes] == [
        MEANING[q] for q in ("kv_use", "hit_share", "preemptions")
    ]
    assert now.load.hit_share == 0
    (_, now) = polled({"kv_block_s_usd": 0.5}, [0, 10], *(less(text_of(n), "generation") for n in (0, 100)))
    assert [p.read_usd for p in now.prices] == [None] * 6
    assert now.prices[2].usd == 0.5
    assert "output tokens: not exported" in now.prices[0].reason
    (_, now) = polled({"profile": None}, [0, 10], text_of(0), text_of(100))
    assert "step times are not declared" in now.prices[0].reason
    assert now.states, "the state is known all the same"


def test_prices_hold_then_decay_to_the_fallback_and_say_so() -> None:
    gone = RecordError("cannot be reached: Connection refused")
    link = {"stale_s": 10.0, "prefill_usd": 2.0}
    _, fresh, held, late, long_after, back, again = polled(
        link,
        [0, 10, 19, 30, 1000, 1002, 1004],
        text_of(0),
        text_of(100),
        gone,
        gone,
        gone,
        text_of(5),
        text_of(25),
    )
    read, fallback = fresh.prices[0].usd, 2.0 / 1e6
    assert fresh.problem is None
    assert held.prices == fresh.prices
    assert held.problem == "cannot be reached: Connection refused"
    left = math.exp(-1.0)
    assert late.prices[0].usd == pytest.approx(left * read + (1 - left) * fallback)
    assert "last read 20 s ago: 37%" in late.prices[0].reason
    assert (late.age_s, long_after.age_s) == (20.0, 990.0)
    assert long_after.prices[0].usd == pytest.approx(fallback)
    assert back.prices[0].usd == fallback
    assert "rates need a second reading" in back.prices[0].reason
    assert back.notes == ("restarted 1 time since it is watched",)
    assert again.prices[0].read_usd is not None


def test_a_clock_that_is_set_changes_nothing() -> None:
    """Rates and ages are by the monotonic clock, whatever the wall clock or the engine's says."""
    wall, own = Clock(), Clock()
    link = EngineLink(urls=("http://x",), profile=PROFILE)
    stamped = text_of(100).replace("running 20", "running 20 99999999999999")
    reader = EngineReader("x", link, get=canned(text_of(0), stamped), clock=wall, monotonic=own)

    async def run() -> EngineNow:
        await reader.poll(0.01)
        wall.s, own.s = wall.s - 900, own.s + 10
        return await reader.poll(0.01)

    skewed, (_, straight) = asyncio.run(run()), polled({}, [0, 10], text_of(0), text_of(100))
    assert skewed.prices == straight.prices
    assert skewed.age_s == 0
    assert skewed.states["0"].arrivals_per_s == 10


def test_one_dead_address_of_two_leaves_the_other() -> None:
    clock, answers = Clock(), {"http://a/metrics": 0.0, "http://b/metrics": 0.0}

    async def get(url: str, _: float) -> tuple[bytes, str]:
        if url == "http://b/metrics" and clock.s > 1005:
            raise RecordError("gives no whole answer within 1 s")
        answers[url] += 50
        return text_of(answers[url]).encode(), ""

    link = EngineLink(urls=("http://a", "http://b"), profile=PROFILE, stale_s=5)
    reader = EngineReader("two", link, get=get, clock=clock, monotonic=clock)

    async def run() -> list[EngineNow]:
        found = []
        for s in (0, 4, 8, 16):
            clock.s = 1000.0 + s
            found.append(await reader.poll(0.01))
        return found

    _, both, one_old, one = asyncio.run(run())
    assert both.states.keys() == one_old.states.keys() == {"http://a/metrics", "http://b/metrics"}
    assert one_old.problem == "http://b/metrics gives no whole answer within 1 s"
    assert one.states.keys() == {"http://a/metrics"}
    assert one.age_s == 0


def test_whatever_goes_wrong_in_a_reading_prices_decay() -> None:
    clock = Clock()

    async def get(_: str, __: float) -> tuple[bytes, str]:
        raise ZeroDivisionError("a bug")

    reader = EngineReader("x", EngineLink(urls=("http://x",)), get=get, clock=clock, monotonic=clock)
    assert asyncio.run(reader.poll(1.0)).problem == "a bug"


@pytest.mark.parametrize(
    ("link", "says"),
    [
        ({"urls": ("ftp://x",)}, "engines.e.urls: 'ftp://x' is no address"),
        ({"urls": ("http://",)}, "is no address"),
        ({"urls": ("http://x:99999",)}, "is no address"),
        ({"urls": ("http://x y",)}, "is no address"),
        ({"urls": ("http://x",), "profile": "h100-qwen3-32b-tp9"}, "engines.e.profile.*did you mean"),
    ],
)
def test_settings_that_cannot_be_read_by_are_named(link: dict[str, Any], says: str) -> None:
    with pytest.raises(SettingsError, match=says):
        EngineReader("e", EngineLink.model_validate(link))
    assert whole_url("https://x:1/", "/metrics", "") == "https://x:1/metrics"
    assert whole_url("https://x:1/own", "/metrics", "") == "https://x:1/own"


# --- over a socket ---------------------------------------------------------------------------------------------------------


@asynccontextmanager
async def answering(*parts: bytes, pause_s: float = 0.0) -> AsyncIterator[str]:
    """Somebody at an address, who says this whatever is asked."""

    writers = list[asyncio.StreamWriter]()

    async def talk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writers.append(writer)
        await reader.readuntil(b"\r\n\r\n")
        with suppress(ConnectionError):
            for part in parts:
                writer.write(part)
                await writer.drain()
                await asyncio.sleep(pause_s)
        writer.close()

    server = await asyncio.start_server(talk, "127.0.0.1", 0)
    async with server:
        try:
            yield f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}/metrics"
        finally:
            for writer in writers:
                writer.transport.abort()


OK = b"HTTP/1.1 200 OK\r\ncontent-type: text/plain\r\n"
CHUNK = b"10000\r\n" + b"x" * 0x10000 + b"\r\n"


@pytest.mark.parametrize(
    ("parts", "says"),
    [
        ((OK + b"content-length: 3\r\n\r\nabc",), None),
        ((OK + b"transfer-encoding: chunked\r\n\r\n1\r\na\r\n", b"2\r\nbc\r\n0\r\n\r\n"), None),
        ((OK + b"\r\nab", b"c"), None),
        ((b"HTTP/1.1 404 Not Found\r\ncontent-length: 0\r\n\r\n",), "answers 404"),
        ((b"HTTP/1.1 503 Busy\r\ncontent-length: 0\r\n\r\n",), "answers 503"),
        ((b"HTTP/1.1 302 Found\r\nlocation: /other\r\ncontent-length: 0\r\n\r\n",), "302; it is at /other"),
        ((OK + b"content-length: 9\r\n\r\nabc",), "in the middle"),
        ((b"SSH-2.0-OpenSSH_9.6\r\n",), "does not speak HTTP"),
        ((), "in the middle"),
        ((OK + b"transfer-encoding: chunked\r\n\r\n", *[CHUNK] * (MOST // 0x10000 + 1)), "more than 16 MiB"),
    ],
    ids=("length", "chunks", "to the end", "404", "503", "302", "cut", "ssh", "nothing", "huge"),
)
def test_an_answer_is_whole_or_says_what_is_wrong(parts: tuple[bytes, ...], says: str | None) -> None:
    async def run() -> tuple[bytes, str]:
        async with answering(*parts) as url:
            return await fetch(url, 20.0)

    if says is None:
        assert asyncio.run(run()) == (b"abc", "text/plain")
        return
    with pytest.raises(RecordError, match=says):
        asyncio.run(run())


def test_a_slow_answer_is_given_up_and_nobody_there_is_said() -> None:
    async def slow() -> None:
        async with answering(OK + b"content-length: 100\r\n\r\n", *[b"x"] * 90, pause_s=0.05) as url:
            await fetch(url, 0.2)

    with pytest.raises(RecordError, match=r"no whole answer within 0\.2 s"):
        asyncio.run(slow())
    with pytest.raises(RecordError, match="cannot be reached: Connection refused"):
        asyncio.run(fetch("http://127.0.0.1:9/metrics", 1.0))
    with pytest.raises(RecordError, match="cannot be reached"):
        asyncio.run(fetch("http://nobody.invalid/metrics", 5.0))


# --- from a replay over HTTP to the board ------------------------------------------------------------------------------------

ENGINE = EngineSettings(kv_blocks=6_000, max_sequences=128, prefix_tokens=64)
STEPS = load_profile(PROFILE).steps(8192, 128)
LINK: dict[str, Any] = {
    "profile": PROFILE,
    "max_sequences": 128,
    "max_batched_tokens": 8192,
    "window_s": 25.0,
    "timeout_s": 60.0,
}


def traffic() -> Requests:
    sessions = Sessions(8, 5.0, Lengths.lognormal(1024, 256, 1.0, 0))
    return sessions.starting(np.sort(np.random.default_rng(0).uniform(0, 200, 200)), 0, 64, 0)


def replaying(workers: int = 1) -> Replay:
    return Replay(replace(ENGINE, workers=workers), STEPS, Routing.round_robin(), traffic(), interval_s=0.5)


@pytest.mark.parametrize(("kind", "workers"), [("vllm", 2), ("sglang", 1), ("trtllm", 1)])
def test_the_state_read_over_http_is_the_replays_own(kind: Any, workers: int) -> None:
    """Replay → exposition → socket → names → rates against `state_of`, and so are the prices."""
    clock = Clock()
    clock.s = 0.0

    async def run(url: str) -> EngineNow:
        reader = EngineReader(
            "e", EngineLink.model_validate({"urls": (url,)} | LINK), clock=clock, monotonic=clock
        )
        for s in (10.0, 20.0, 30.0, 40.0):
            clock.s = s
            now = await reader.poll(0.002)
            assert now.problem is None
        return now

    with serving(Exporter(replaying(workers), kind), kind, 0, clock) as url:
        now = asyncio.run(run(url))
    assert now.kind == kind
    assert now.simulated
    twin = replaying(workers).run(40.0)
    prices = []
    for w in range(workers):
        wanted = state_of(twin, w, 30.0)
        read = now.states[str(w)]
        assert asdict(read) == pytest.approx(asdict(wanted))
        assert wanted.prompt_tokens_per_s > 0
        prices.append(live_prices(wanted, ENGINE, STEPS, 0.002))
    arrivals = np.array([s.arrivals_per_s for s in now.states.values()])
    mean = np.average([p.prefill_token for p in prices], weights=arrivals)
    assert now.prices[0].usd == pytest.approx(mean)


def test_tensorrt_llm_reports_one_replica() -> None:
    with pytest.raises(SettingsError, match="one replica"):
        Exporter(replaying(2), "trtllm")


ECONOMY: dict[str, Any] = {
    "value": 0.05,
    "lambda0": 0.002,
    "tenants": {"patient": {"lambda0": 0.0}},
    "upstreams": {"s": {"kind": "simulated"}},
    "models": {
        "busy": {
            "upstream": "s",
            "upstream_model": "simulated-small",
            "input_usd": 1,
            "output_usd": 2,
            "quality": 0.8,
            "seconds": 4.0,
            "engine": "e",
        },
        "other": {
            "upstream": "s",
            "upstream_model": "simulated-medium",
            "input_usd": 1,
            "output_usd": 3,
            "quality": 0.8,
            "seconds": 4.0,
        },
    },
    "engines": {"e": {"urls": ("http://127.0.0.1:9",)} | LINK},
}


def economy(**engine: Any) -> Economy:
    return Economy.model_validate(ECONOMY | {"engines": {"e": ECONOMY["engines"]["e"] | engine}})


def congested(load: Load) -> EngineNow:
    """An engine in which a request adds this to the delay of others."""
    (now,) = polled({}, [0], text_of(0))
    return replace(now, engine="e", load=load)


loads = st.tuples(
    st.floats(0, 1),
    st.sampled_from([1.0, 16.0]),
    st.sampled_from([0.0, 0.02]),
    *[st.floats(0, 1e-5), st.floats(0, 1e-9), st.floats(0, 1e-6), st.floats(0, 1e-5)],
    *[st.floats(0, 1e-6), st.floats(0, 1e-10), st.floats(0, 1e-3)],
).map(lambda ten: Load(*ten))


@given(loads, st.floats(0, 1), st.floats(0, 100_000), st.sampled_from(["patient", "acme"]))
@settings(max_examples=25)
def test_a_use_pays_for_the_delay_of_others_once_and_for_its_own_as_before(
    load: Load, value: float, tokens: float, tenant: str
) -> None:
    """The live decision, against the equation over the same uses with congestion as a resource at price 1."""
    board = Board(economy())
    before = {a.use: a for a in board.decide(value, tokens, tenant=tenant).ranked}
    board.congested((congested(load),))
    after = board.decide(value, tokens, tenant=tenant)
    asked = [Asked(value, tokens, tenant, "")]
    uses = uses_of(board.economy, asked, {}, board.loads)
    parts = terms(tasks_of(board.economy, asked), uses, Prices(declared=(("usd", 1.0), (CONGESTION, 1.0))))
    for a in after.ranked:
        i, was = uses.names.index(a.use), before[a.use]
        assert a.compute == pytest.approx(parts.compute[0, i])
        assert (a.value, a.latency, a.risk) == (was.value, was.latency, was.risk)
        assert a.compute - a.congestion == pytest.approx(was.compute)
        assert a.net == pytest.approx(was.net - a.congestion)
        own = load.congestion(tokens, 500.0, 4.0) if a.use == "busy" else 0.0
        assert a.congestion == pytest.approx(own)
    assert [a.use for a in after.ranked] == sorted(
        before, key=lambda u: -next(a.net for a in after.ranked if a.use == u)
    )


def test_prices_are_cleared_with_congestion_in_what_uses_take() -> None:
    """Where others' delay makes the cheap model unusable, a dollar of the budget buys less: the other one is dearer."""
    data = ECONOMY | {"budget_usd": 0.0012, "lambda0": 0.0}
    board = Board(Economy.model_validate(data))
    for k in range(40):
        board.asked(0.05, 100.0 + 10 * k, "acme", "")
    free = Prices.from_json(clear(board.economy, *board.latest(), ())["prices"])
    heavy = {"busy": IDLE._replace(decode_token=1.0)}
    dear = Prices.from_json(clear(board.economy, *board.latest(), (), heavy)["prices"])
    assert dear.declared == free.declared == board.economy.declared()
    assert 0 < dear.discovered[0].multiplier < free.discovered[0].multiplier - 1
    nothing = clear(board.economy, *board.latest(), (), {"busy": IDLE})
    assert Prices.from_json(nothing["prices"]).discovered[0].multiplier == pytest.approx(
        free.discovered[0].multiplier
    )


def test_the_delay_of_others_costs_what_the_latest_requests_say() -> None:
    board = Board(economy())
    assert board.others_delay_price() == 0.002
    for tenant in ("patient", "patient", "patient", "acme"):
        board.asked(0.05, 100.0, tenant, "")
    assert board.others_delay_price() == pytest.approx(0.0005)


def test_new_clearings_leave_the_engines_and_engines_leave_the_prices() -> None:
    board, seen = Board(economy()), list[int]()
    board.watch(lambda s: seen.append(len(s.engines)))
    board.congested((congested(IDLE._replace(prefill_token=1e-6)),))
    board.post(replace(board.standing, version=7, engines=()))
    board.congested((congested(IDLE._replace(prefill_token=2e-6)),))
    assert seen == [1, 1, 1]
    assert board.standing.version == 7
    assert board.loads["busy"].prefill_token == 2e-6


async def congestion_is_felt(service: Live, clock: Clock) -> None:
    """From the replay's socket to decisions, `/v1/prices`, `/metrics`; and then the engine is gone."""
    board = service.service.gateway.board
    ask = {"model": "auto", "messages": [{"role": "user", "content": "hello " * 300}]}
    (reader,) = service.service.engines
    assert (await service.ask("/v1/chat/completions", ask)).headers["x-walras-use"] == "busy"
    for s in (10.0, 40.0):
        clock.s = s
        now = await reader.poll(board.others_delay_price())
    board.congested((now,))
    best, worse = board.decide(0.05, 400.0).ranked
    assert best.use == "other"
    assert worse.congestion > 0
    assert (await service.ask("/v1/chat/completions", ask)).headers["x-walras-use"] == "other"
    got = (await service.ask("/v1/prices")).json()
    assert {"version", "prices", "certificate", "problem", "engines"} <= got.keys()
    (engine,) = got["engines"]
    assert engine["problem"] is None
    assert engine["prices"][0]["constraint"] == "congestion of engine e"
    assert engine["prices"][0]["price"] == now.prices[0].usd
    assert all(p["reason"] for p in engine["prices"])
    page = (await service.ask("/metrics")).body.decode()
    assert f'walras_engine_price{{engine="e",resource="prefill token"}} {now.prices[0].usd}' in page
    assert 'walras_engine_readable{engine="e"} 1.0' in page
    assert 'walras_engine_running{engine="e",replica="0"}' in page


def test_a_route_leaves_an_engine_that_is_congested_and_comes_back_when_nothing_is_known(
    tmp_path: Path,
) -> None:
    clock = Clock()
    clock.s = 0.0
    crowded = Requests(np.zeros(400), np.full(400, 4000), np.full(400, 400))
    replay = Replay(ENGINE, STEPS, Routing.round_robin(), crowded, interval_s=0.5)

    async def whole(url: str) -> None:
        async with live(tmp_path, economy=economy(urls=(url,), poll_s=0.1, stale_s=1.0)) as service:
            (reader,) = service.service.engines
            reader._clock = reader._monotonic = clock  # type: ignore[assignment] # the replay's time
            await congestion_is_felt(service, clock)

    async def gone(url: str) -> None:
        async with live(tmp_path, economy=economy(urls=(url,), poll_s=0.1, stale_s=1.0)) as service:
            board = service.service.gateway.board
            watching = asyncio.create_task(service.service.watch_engines())
            while not board.standing.engines:
                await asyncio.sleep(0.01)
            watching.cancel()
            (engine,) = standing_json(board.standing, board.clock())["engines"]
            assert engine["problem"] == "cannot be reached: Connection refused"
            assert engine["age_s"] is None
            assert {p["price"] for p in engine["prices"]} == {0.0}
            json.dumps(engine, allow_nan=False)
            assert board.decide(0.05, 400.0).ranked[0].use == "busy"
            page = (await service.ask("/metrics")).body.decode()
            assert 'walras_engine_readable{engine="e"} 0.0' in page

    with serving(Exporter(replay, "vllm"), "vllm", 0, clock) as url:
        asyncio.run(whole(url))
    asyncio.run(gone(url))


def test_engines_are_polled_side_by_side_at_their_own_intervals() -> None:
    times: dict[str, list[float]] = {"quick": [], "slow": []}

    async def run() -> list[tuple[str, ...]]:
        loop, posted = asyncio.get_running_loop(), list[tuple[str, ...]]()

        def reader(name: str, poll_s: float, answers_s: float) -> EngineReader:
            async def get(_: str, __: float) -> tuple[bytes, str]:
                times[name].append(loop.time())
                await asyncio.sleep(answers_s)
                return text_of(1).encode(), ""

            return EngineReader(name, EngineLink(urls=("http://x",), poll_s=poll_s), get=get)

        both = [reader("quick", 0.1, 0.0), reader("slow", 0.1, 0.6)]
        task = asyncio.create_task(
            watch(both, lambda: 1.0, lambda es: posted.append(tuple(e.engine for e in es)))
        )
        await asyncio.sleep(1.0)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        return posted

    posted = asyncio.run(run())
    assert len(times["quick"]) >= 4 > len(times["slow"])
    gaps = np.diff(times["quick"])
    assert gaps.min() >= 0.089
    assert len(set(gaps.round(6))) > 1, "intervals are not all alike"
    assert posted[0] == ("quick",)
    assert posted[-1] == ("quick", "slow")


def test_a_model_names_an_engine_that_is_there() -> None:
    bad = ECONOMY | {"engines": {"f": ECONOMY["engines"]["e"]}}
    with pytest.raises(ValueError, match=r"models\.busy: no engine 'e'; there are: f"):
        Economy.model_validate(bad)


# --- the command line ------------------------------------------------------------------------------------------------------


def test_walras_engines_shows_a_live_one_and_a_dead_one_with_its_reason() -> None:
    clock = iter(np.arange(20.0, 2000.0, 20.0))
    with serving(Exporter(replaying(), "sglang"), "sglang", 0, lambda: float(next(clock))) as url:
        args = ["engines", "--engine", url, "--engine", "http://127.0.0.1:9", "--profile", PROFILE]
        args += ["--lambda0", "0.01", "--interval", "0.1"]
        shown, plain = walras(*args), walras(*args, "--json")
    assert (shown.code, plain.code) == (3, 3)
    assert "1 engine of 2 cannot be read: 127.0.0.1:9" in shown.err
    for word in ("is SIMULATED", "refused"):
        assert word in shown.out
    data = json.loads(plain.out)
    alive, dead = data["engines"]
    assert alive["kind"] == "sglang"
    assert alive["problem"] is None
    assert alive["prices"][0]["price"] > 0
    assert dead["states"] == {}
    assert alive["prices"][0]["unit"] == "USD per prefill token"


def test_walras_replay_is_an_engine_that_is_simulated(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    pages = list[Page]()

    class Interrupted:
        def wait(self) -> None:
            body, _ = asyncio.run(fetch(f"http://127.0.0.1:{port}/prometheus/metrics", 60.0))
            pages.append(read_page(parse(body)))
            raise KeyboardInterrupt

    monkeypatch.setattr(replay_commands, "threading", SimpleNamespace(Event=Interrupted))
    args = (
        "replay",
        "--generate",
        "poisson:20",
        "--requests",
        50,
        "--serve",
        port,
        "--as",
        "trtllm",
        "--speed",
        1000,
    )
    ran = walras(*args)
    assert (ran.code, ran.out) == (130, "")
    assert f"SIMULATED TensorRT-LLM: http://127.0.0.1:{port}/prometheus/metrics" in ran.err
    (page,) = pages
    assert page.simulated
    assert page.kind == "trtllm"


@pytest.mark.parametrize(
    ("args", "says"),
    [
        ((), "there are none to read"),
        (("--engine", "http://x,vlm"), "no engine type 'vlm'"),
        (("--engine", "x"), "'x' is no address"),
        (("--engine", "http://x", "--profile", "nothing"), "no profile 'nothing'"),
    ],
)
def test_walras_engines_names_what_is_wrong_with_its_options(args: tuple[str, ...], says: str) -> None:
    ran = walras("engines", *args)
    assert ran.code == 4
    assert says in ran.err


def test_every_engine_says_how_its_metrics_are_turned_on_and_has_every_quantity() -> None:
    for engine in ENGINES.values():
        assert engine.turn_on
        assert engine.formulas.keys() == MEANING.keys()
        assert engine.formulas["running"]
