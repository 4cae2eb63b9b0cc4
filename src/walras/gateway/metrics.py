"""What the service counts for Prometheus: money in USD, time in seconds.

Counting is on the path of every request, so it is an addition to a dict; the client library gives it form when it is asked for.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import defaultdict
from collections.abc import Iterable
from itertools import accumulate
from typing import TYPE_CHECKING

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector

if TYPE_CHECKING:
    from walras.gateway.board import Standing

COUNTERS = {
    "requests": ("Requests by what they used and how they ended", ("use", "status")),
    "attempts": ("Calls of upstreams by how they ended", ("upstream", "outcome")),
    "tokens": ("Tokens by kind", ("use", "kind")),
    "charged_usd": ("USD charged by upstreams", ("use",)),
    "hedges": ("Second attempts beside a slow one, by whether they were first", ("use", "outcome")),
    "refused": ("Requests refused, by why", ("why",)),
    "surplus_usd": ("Expected net value of what was chosen, USD", ("use",)),
    "named_regret_usd": ("Expected net value lost because clients named their models, USD", ("use",)),
}
"""Labels are models, upstreams and ways to end: what clients send is never one."""
LONG = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0)
SHORT = (0.0001, 0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.1)
GAUGES = {
    "price": ("Multiplier of a constraint", ("constraint",)),
    "prices_version": ("Version of the prices", ()),
    "engine_price": ("USD of others' delay per unit of an engine's resource", ("engine", "resource")),
    "engine_age_seconds": ("Since an engine was last read", ("engine",)),
    "engine_readable": ("Whether an engine's last reading succeeded", ("engine",)),
    "engine_running": ("Sequences in an engine's batch", ("engine", "replica")),
    "engine_waiting": ("Requests in line at an engine", ("engine", "replica")),
    "engine_kv_use": ("Share of an engine's KV blocks that sequences hold", ("engine", "replica")),
}
HISTOGRAMS = {
    "request_seconds": ("Whole requests", ("use",), LONG),
    "first_byte_seconds": ("Until an answer began", ("use",), LONG),
    "own_seconds": ("What the gateway took before it called an upstream", (), SHORT),
}
Labels = tuple[str, ...]


class Metrics(Collector):
    """Counters of one service."""

    def __init__(self) -> None:
        self._sums: defaultdict[tuple[str, Labels], float] = defaultdict(float)
        self._buckets: dict[tuple[str, Labels], list[int]] = {}
        self._gauges: dict[tuple[str, Labels], float] = {}
        self._registry = CollectorRegistry()
        self._registry.register(self)

    def count(self, name: str, *labels: str, by: float = 1.0) -> None:
        """Add to one of `COUNTERS`."""
        self._sums[name, labels] += by

    def observe(self, name: str, seconds: float, *labels: str) -> None:
        """Add to one of `HISTOGRAMS`."""
        edges = HISTOGRAMS[name][2]
        buckets = self._buckets.get((name, labels))
        if buckets is None:
            buckets = self._buckets[name, labels] = [0] * (len(edges) + 1)
        buckets[bisect_left(edges, seconds)] += 1
        self._sums[name, labels] += seconds

    def prices(self, standing: Standing) -> None:
        """The prices of now; those of before are gone."""
        discovered = standing.prices.discovered
        self._gauges = {("price", (p.constraint.name,)): p.multiplier for p in discovered}
        self._gauges["prices_version", ()] = standing.version
        for e in standing.engines:
            one = (e.engine,)
            self._gauges["engine_readable", one] = e.problem is None
            self._gauges |= {("engine_price", (*one, p.resource)): p.usd for p in e.prices}
            if e.age_s is not None:
                self._gauges["engine_age_seconds", one] = e.age_s
            for replica, state in e.states.items():
                for name in ("running", "waiting", "kv_use"):
                    self._gauges[f"engine_{name}", (*one, replica)] = getattr(state, name)

    def page(self) -> bytes:
        """What `GET /metrics` answers."""
        return generate_latest(self._registry)

    def collect(self) -> Iterable[Metric]:
        """For the client library."""
        for name, (what, labels) in COUNTERS.items():
            family = CounterMetricFamily(f"walras_{name}", what, labels=labels)
            for (own, values), total in list(self._sums.items()):
                if own == name:
                    family.add_metric(values, total)
            yield family
        for name, (what, labels, edges) in HISTOGRAMS.items():
            histogram = HistogramMetricFamily(f"walras_{name}", what, labels=labels)
            for (own, values), buckets in list(self._buckets.items()):
                if own == name:
                    upto = zip((*map(str, edges), "+Inf"), map(float, accumulate(buckets)), strict=True)
                    histogram.add_metric(values, list(upto), self._sums[name, values])
            yield histogram
        for name, (what, labels) in GAUGES.items():
            gauge = GaugeMetricFamily(f"walras_{name}", what, labels=labels)
            for (own, values), value in self._gauges.items():
                if own == name:
                    gauge.add_metric(values, value)
            yield gauge
