"""A replay behind the metrics endpoint of a serving engine: the names are the engine's, every number is SIMULATED.

Gauges are of the moment, counters of the last whole interval of the replay. All counters rise as tokens are made, also those that
SGLang and TensorRT-LLM raise at the end of a request only.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from walras.engine.externality import gauges
from walras.engine.replay import Replay
from walras.errors import SettingsError

As = Literal["vllm", "sglang", "trtllm"]
PATHS: dict[As, str] = {"vllm": "/metrics", "sglang": "/metrics", "trtllm": "/prometheus/metrics"}
MODEL = "simulated"
COUNTED = ("output_tokens", "prompt_tokens", "hit_tokens", "preemptions", "finished")

Numbers = NDArray[np.float64] | NDArray[np.int64]


class Exporter(Collector):
    """The page of a replay, which goes on as time does. Used from one thread at a time.

    Raises:
        SettingsError: replicas that the engine would not report at one address.
    """

    def __init__(self, replay: Replay, kind: As) -> None:
        workers = replay.settings.workers
        if kind == "trtllm" and workers > 1:
            what = f"{workers} workers, but TensorRT-LLM reports one replica at an address"
            raise SettingsError(what, key="--as", hint="--workers 1, or --as vllm")
        self._replay, self._kind = replay, kind
        self._counts = {name: np.zeros(workers) for name in COUNTED}
        self._started_s = time.time()
        self._registry = CollectorRegistry()
        self._registry.register(self)

    def page(self, at_s: float) -> bytes:
        """What the endpoint says when `at_s` seconds of the replay have passed; time does not go back."""
        self._replay.run(max(at_s, self._replay.now_s))
        past = self._replay.take_intervals()
        self._replay.take()
        for name in COUNTED:
            self._counts[name] += getattr(past, name).sum(axis=0)
        return generate_latest(self._registry)

    def collect(self) -> Iterable[Metric]:
        """For the client library."""
        running, waiting, kv_use = gauges(self._replay)
        yield GaugeMetricFamily("walras_simulated", "SIMULATED: a replay, no engine", 1.0)
        yield GaugeMetricFamily("process_start_time_seconds", "When the replay began", self._started_s)
        of = {"vllm": self._vllm, "sglang": self._sglang, "trtllm": self._trtllm}
        yield from of[self._kind](running, waiting, kv_use)

    def _vllm(self, running: Numbers, waiting: Numbers, kv_use: Numbers) -> Iterator[Metric]:
        at = [("engine", str(w)) for w in range(len(running))]
        yield _each("vllm:num_requests_running", at, running)
        yield _each("vllm:num_requests_waiting", at, waiting)
        yield _each("vllm:kv_cache_usage_perc", at, kv_use)
        n = self._counts
        whole = n["prompt_tokens"] + n["hit_tokens"]
        yield _each("vllm:prompt_tokens", at, whole, CounterMetricFamily)
        yield _each("vllm:prompt_tokens_cached", at, n["hit_tokens"], CounterMetricFamily)
        yield _each("vllm:prefix_cache_queries", at, whole, CounterMetricFamily)
        yield _each("vllm:prefix_cache_hits", at, n["hit_tokens"], CounterMetricFamily)
        yield _each("vllm:generation_tokens", at, n["output_tokens"], CounterMetricFamily)
        yield _each("vllm:num_preemptions", at, n["preemptions"], CounterMetricFamily)
        ended = [(a, ("finished_reason", "stop")) for a in at]
        yield _labelled("vllm:request_success", ended, n["finished"], CounterMetricFamily)
        engine = self._replay.settings
        limits = (("block_size", str(engine.block_tokens)), ("num_gpu_blocks", str(engine.kv_blocks + 1)))
        yield _labelled("vllm:cache_config_info", [(*limits, a) for a in at], np.ones(len(at)))

    def _sglang(self, running: Numbers, waiting: Numbers, kv_use: Numbers) -> Iterator[Metric]:
        at = [("dp_rank", str(w)) for w in range(len(running))]
        yield _each("sglang:num_running_reqs", at, running)
        yield _each("sglang:num_queue_reqs", at, waiting)
        yield _each("sglang:token_usage", at, kv_use)
        n, engine = self._counts, self._replay.settings
        modes = {"prefill_compute": "prompt_tokens", "prefill_cache": "hit_tokens", "decode": "output_tokens"}
        tokens = CounterMetricFamily(
            "sglang:realtime_tokens", "SIMULATED", labels=("model_name", "dp_rank", "mode")
        )
        for mode, name in modes.items():
            for (_, rank), value in zip(at, n[name].tolist(), strict=True):
                tokens.add_metric((MODEL, rank, mode), value)
        yield tokens
        yield _each("sglang:num_retracted_requests", at, n["preemptions"], CounterMetricFamily)
        yield _labelled("sglang:num_requests", [()], n["finished"].sum(keepdims=True), CounterMetricFamily)
        yield _each(
            "sglang:max_total_num_tokens", at, np.full(len(at), engine.kv_blocks * engine.block_tokens)
        )
        yield _each("sglang:page_size", at, np.full(len(at), engine.block_tokens))
        yield _each("sglang:num_pages", at, np.full(len(at), engine.kv_blocks))

    def _trtllm(self, running: Numbers, waiting: Numbers, kv_use: Numbers) -> Iterator[Metric]:
        n, engine = self._counts, self._replay.settings
        gauges_ = {
            "num_requests_running": running,
            "num_requests_waiting": waiting,
            "kv_cache_utilization": kv_use,
            "kv_cache_max_blocks": np.array([engine.kv_blocks]),
            "kv_cache_tokens_per_block": np.array([engine.block_tokens]),
            "max_batch_size_runtime": np.array([engine.max_sequences]),
            "max_num_tokens_runtime": np.array([engine.max_batched_tokens]),
        }
        for name, values in gauges_.items():
            yield _labelled(f"trtllm_{name}", [()], values)
        counters = {
            "prompt_tokens": n["prompt_tokens"] + n["hit_tokens"],
            "prompt_cached_tokens": n["hit_tokens"],
            "generation_tokens": n["output_tokens"],
        }
        for name, values in counters.items():
            yield _labelled(f"trtllm_{name}", [()], values, CounterMetricFamily)
        yield _labelled(
            "trtllm_request_success", [(("finished_reason", "stop"),)], n["finished"], CounterMetricFamily
        )


Family = type[GaugeMetricFamily] | type[CounterMetricFamily]


def _each(
    name: str, at: list[tuple[str, str]], values: Numbers, family: Family = GaugeMetricFamily
) -> Metric:
    return _labelled(name, [(a,) for a in at], values, family)


def _labelled(
    name: str,
    labels: Sequence[tuple[tuple[str, str], ...]],
    values: Numbers,
    family: Family = GaugeMetricFamily,
) -> Metric:
    """A family with a sample for each of the labels, besides the model's."""
    found = family(name, "SIMULATED", labels=("model_name", *(key for key, _ in labels[0])))
    for own, value in zip(labels, values.tolist(), strict=True):
        found.add_metric((MODEL, *(v for _, v in own)), value)
    return found


@contextmanager
def serving(
    exporter: Exporter, kind: As, port: int, at_s: Callable[[], float], host: str = "127.0.0.1"
) -> Iterator[str]:
    """Serve the page for as long as the block takes; yields its URL.

    Args:
        port: 0 takes a free one.
        at_s: seconds of the replay that have passed.

    Raises:
        SettingsError: the port cannot be listened on.
    """
    lock = threading.Lock()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            known = self.path == PATHS[kind]
            with lock:
                body = exporter.page(at_s()) if known else f"the metrics are at {PATHS[kind]}\n".encode()
            self.send_response(200 if known else 404)
            self.send_header("content-type", "text/plain; version=0.0.4; charset=utf-8")
            self.send_header("content-length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: object) -> None:
            """Nothing: a poller comes every second."""

    try:
        server = ThreadingHTTPServer((host, port), Handler)
    except OSError as error:
        what = f"{host}:{port} cannot be listened on: {error.strerror or error}"
        raise SettingsError(what, key="--serve", hint="take another port; 0 takes a free one") from error
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
    thread.start()
    try:
        yield f"http://{host}:{server.server_address[1]}{PATHS[kind]}"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
