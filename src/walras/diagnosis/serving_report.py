"""A replay for people and for programs: latencies, load, memory, and which resource is short. SIMULATED."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from rich.console import Group, RenderableType
from rich.markup import escape
from rich.text import Text

from walras.diagnosis.serving import Engine, Latencies, Played, Resource, Sweep, Timeline, Traffic, Worth
from walras.diagnosis.terminal import table
from walras.diagnosis.words import count, number, percent, usd
from walras.engine.profiles import Profile

RESOURCES: dict[Resource, tuple[str, str]] = {
    "prefill": ("prefill", "a prompt token computed"),
    "decode": ("decoding", "an output token"),
    "kv": ("KV memory", "a KV block for a second"),
}
REMEDIES: dict[Resource, str] = {
    "prefill": "add workers, send prompts where they are in memory (--routing kv), or shorten prompts",
    "decode": "add workers, or shorten answers",
    "kv": "give the KV cache more memory, add workers, or shorten what is held",
}
MANY = 1e6
FULL = 0.95
"""KV use from which requests soon wait for memory, or push each other out."""
APART: dict[Resource, str] = {"prefill": "workers that prefill", "decode": "workers that decode"}
"""What to add more of, where prefill and decoding are apart."""


@dataclass(frozen=True, slots=True)
class Report:
    """Everything about one replay."""

    traffic: Traffic
    engine: Engine
    played: Played
    worth: Worth | None
    """None: not asked for."""
    sweep: Sweep | None


# --- for programs -------------------------------------------------------------------------------------------------------


def replay_data(found: Report) -> dict[str, Any]:
    """What `walras replay --json` prints. Seconds, tokens, shares; what is unknown is null once it is JSON."""
    played, timeline = found.played, found.played.timeline
    return {
        "simulated": True,
        "traffic": found.traffic.name,
        "generated": found.traffic.trace is None,
        "requests": played.requests,
        "requests_per_cpu_s": requests_per_cpu_s(played),
        "cpu_s": played.cpu_s,
        **_latencies(played),
        "kv_hit_ratio": played.kv_hit_ratio,
        "preemptions": played.preemptions,
        "turned_away": played.turned_away,
        "throughput": {
            "arrivals_per_s": played.arrivals_per_s,
            "completed_per_s": played.completed_per_s,
            "input_tokens_per_s": played.input_tokens_per_s,
            "output_tokens_per_s": played.output_tokens_per_s,
            "end_s": played.end_s,
        },
        **{key: _spread(timeline, key) for key in ("running", "waiting", "kv_use")},
        "resource_prices": None if found.worth is None else _worth_data(found.worth),
        "sweep": None if found.sweep is None else _sweep_data(found.sweep),
        "profile": profile_data(found.engine.profile),
        "engine": engine_data(found.engine),
    }


def requests_per_cpu_s(played: Played) -> float:
    """Requests over processor seconds; unknown where the replay was over before the clock moved."""
    return played.requests / played.cpu_s if played.cpu_s > 0 else math.nan


def _latencies(played: Played) -> dict[str, Any]:
    found = {
        "ttft_s": played.ttft,
        "tpot_s": played.tpot,
        "queue_s": played.queue,
        "latency_s": played.latency,
    }
    return {key: _quantiles(seconds) for key, seconds in found.items()}


def _quantiles(seconds: Latencies) -> dict[str, float]:
    p50, p95, p99 = seconds.quantiles(np.array([0.5, 0.95, 0.99])).tolist()
    return {"mean": seconds.mean, "p50": p50, "p95": p95, "p99": p99, "max": seconds.most}


def _spread(timeline: Timeline | None, key: str) -> dict[str, float] | None:
    if timeline is None or not len(timeline):
        return None
    column = getattr(timeline, key)
    return {"mean": float(column.mean()), "max": float(column.max())}


def _worth_data(found: Worth) -> dict[str, Any]:
    prices = found.prices
    return {
        "unit": found.unit,
        "prefill_token": prices.prefill_token,
        "decode_token": prices.decode_token,
        "kv_block_s": prices.kv_block_s,
        "standard_errors": dict(
            zip(("prefill_token", "decode_token", "kv_block_s"), prices.errors, strict=True)
        ),
        "cost_per_s": dict(found.per_s),
        "short": found.short,
        "short_is_sure": found.sure,
        "probes": prices.probes,
        "horizon_s": prices.horizon_s,
    }


def _sweep_data(found: Sweep) -> dict[str, Any]:
    rows = [
        {
            "factor": factor,
            "requests": run.requests,
            "arrivals_per_s": run.arrivals_per_s,
            "completed_per_s": run.completed_per_s,
            **_latencies(run),
        }
        for factor, run in zip(found.factors, found.runs, strict=True)
    ]
    return {"rates": rows, "knee": rows[found.knee] if found.bracketed else None}


def profile_data(profile: Profile) -> dict[str, Any]:
    return {
        "name": profile.name,
        "source": profile.source,
        "error": asdict(profile.error),
        "limits": asdict(profile.limits),
    }


def engine_data(engine: Engine) -> dict[str, Any]:
    settings, schedule = asdict(engine.settings), engine.settings.schedule
    return {
        "routing": engine.routing.name,
        **settings,
        "schedule": schedule.order,
        "admission": schedule.admission,
    }


# --- words --------------------------------------------------------------------------------------------------------------


def seconds_text(seconds: float) -> str:
    """1.54 s, 19.3 ms, 812 µs; 0 s below a nanosecond."""
    for scale, unit in ((1.0, "s"), (1e3, "ms")):
        if seconds * scale >= 0.9995 or math.isnan(seconds):
            return f"{number(seconds * scale)} {unit}"
    return "0 s" if seconds < 1e-9 else f"{number(seconds * 1e6)} µs"


def cost_text(cost: float, unit: str) -> str:
    """A cost to others: dollars, or seconds of their delay."""
    if unit == "usd":
        return usd(cost)
    return ("−" if cost < 0 else "") + seconds_text(abs(cost))


def advice(found: Report) -> str:
    """One sentence: which resource is short, and what would help."""
    what = found.worth
    if what is None:
        return "Which resource is short was not asked (--probes 0)."
    if what.short is None:
        return "Nothing is short: one use more delays nobody."
    name, _ = RESOURCES[what.short]
    if not what.sure:
        return f"Perhaps short: {name}, but its price is less than twice its standard error; more --probes would tell.{_full(found)}"
    rest = REMEDIES[what.short]
    if found.engine.settings.disaggregation is not None and what.short in APART:
        rest = rest.replace("workers", APART[what.short], 1)
    cost = cost_text(what.per_s[what.short], what.unit)
    unit = "of others’ delay " if what.unit == "s" else ""
    return f"Short: {name}. Its use costs {cost} {unit}in each second; {rest}.{_full(found)}"


def _full(found: Report) -> str:
    """What is plain without prices."""
    use = _spread(found.played.timeline, "kv_use")
    return f" KV memory was {percent(use['max'])} full at times." if use and use["max"] > FULL else ""


def size_text(found: Report) -> str:
    settings = found.engine.settings
    workers = count(settings.workers, "workers")
    if settings.disaggregation is not None:
        workers += f", {settings.prefilling} of them prefill"
    schedule = settings.schedule
    order = "" if schedule.order == "fcfs" else f" · {schedule.order}"
    admission = " · admission" if schedule.admission else ""
    return f"{count(found.played.requests, 'requests')} · {workers} · {found.engine.routing.name}{order}{admission}"


def profile_text(profile: Profile) -> str:
    """How far its step times are off, on what was left out of the fit."""
    error = profile.error
    return (
        f"Profile {profile.name}: off by {percent(error.median)} in the median and {percent(error.p95)} at the 95% quantile, "
        f"on {count(error.rows, 'measurements')} left out of the fit"
    )


# --- for people ---------------------------------------------------------------------------------------------------------


def replay_screen(found: Report) -> RenderableType:
    """The answer first: what is short; then what requests wait for."""
    head = Text.assemble(
        ("Walras ", "bold"), (f"replay of {found.traffic.name}", "bold"), f" · {size_text(found)}"
    )
    head.append(" · SIMULATED", style="bold yellow")
    parts = [head, Text(advice(found), style="bold"), latency_table(found.played), _load_table(found.played)]
    if found.worth is not None:
        parts.append(_worth_table(found.worth))
    if found.sweep is not None:
        parts += [_sweep_table(found.sweep), Text(knee_text(found.sweep))]
    played = found.played
    fast = f"{number(requests_per_cpu_s(played))} requests per CPU-second" if played.cpu_s > 0 else ""
    return Group(*parts, Text(), Text(profile_text(found.engine.profile) + "."), Text(fast, style="dim"))


def latency_table(played: Played) -> RenderableType:
    rows = []
    for name, seconds in latency_rows(played):
        if seconds.count:
            values = _quantiles(seconds)
            rows.append((name, *(seconds_text(values[key]) for key in ("mean", "p50", "p95", "p99", "max"))))
    return table("Latency", ("", "mean", "p50", "p95", "p99", "longest"), rows)


def latency_rows(played: Played) -> tuple[tuple[str, Latencies], ...]:
    return (
        ("in line", played.queue),
        ("first token (TTFT)", played.ttft),
        ("per output token (TPOT)", played.tpot),
        ("whole answer", played.latency),
    )


def _load_table(played: Played) -> RenderableType:
    return table("Load", ("", "mean", "most"), load_rows(played))


def load_rows(played: Played) -> list[tuple[str, str, str]]:
    """(name, mean, most) of load and memory."""
    rows = [
        ("requests completed per second", number(played.completed_per_s), ""),
        ("prompt tokens per second", number(played.input_tokens_per_s), ""),
        ("output tokens per second", number(played.output_tokens_per_s), ""),
    ]
    for name, key, text in (
        ("running", "running", number),
        ("waiting", "waiting", number),
        ("KV use", "kv_use", percent),
    ):
        values = _spread(played.timeline, key)
        if values is not None:
            rows.append((name, text(values["mean"]), text(values["max"])))
    rows.append(("prompt tokens found in memory", percent(played.kv_hit_ratio), ""))
    rows.append(("preemptions, in all", f"{played.preemptions:,}", ""))
    if played.turned_away:
        rows.append(("turned away, in all", f"{played.turned_away:,}", ""))
    return rows


def _worth_table(found: Worth) -> RenderableType:
    return table(f"What a use costs the others, {unit_text(found)}", worth_head(found), worth_rows(found))


def unit_text(found: Worth) -> str:
    return "seconds of their delay" if found.unit == "s" else "USD"


def worth_head(found: Worth) -> tuple[str, ...]:
    """Dollars by the million, as providers quote them; seconds by the unit."""
    return ("", "price" if found.unit == "s" else "price of a million", "± error", "in each second", "")


def worth_rows(found: Worth) -> list[tuple[str, str, str, str, str]]:
    many = MANY if found.unit == "usd" else 1.0
    return [
        (
            RESOURCES[resource][1],
            cost_text(many * found.price(resource), found.unit),
            cost_text(many * found.error(resource), found.unit),
            cost_text(found.per_s[resource], found.unit),
            ("short" if found.sure else "perhaps short") if resource == found.short else "",
        )
        for resource in RESOURCES
    ]


def _sweep_table(found: Sweep) -> RenderableType:
    return table(
        "Load against latency",
        ("rate", "arrivals/s", "completed/s", "TTFT", "TTFT p95", "TPOT", "whole answer", ""),
        sweep_rows(found),
    )


def sweep_rows(found: Sweep) -> list[tuple[str, ...]]:
    return [
        (
            f"{factor:g}×",
            number(run.arrivals_per_s),
            number(run.completed_per_s),
            seconds_text(run.ttft.mean),
            seconds_text(run.ttft.quantile(0.95)),
            seconds_text(run.tpot.mean),
            seconds_text(run.latency.mean),
            "knee" if found.bracketed and k == found.knee else "",
        )
        for k, (factor, run) in enumerate(zip(found.factors, found.runs, strict=True))
    ]


def knee_text(found: Sweep) -> str:
    """Where latency begins to cost more than throughput gains."""
    factor, run = found.factors[found.knee], found.runs[found.knee]
    if not found.bracketed:
        where = "faster" if found.knee else "slower"
        return f"No knee from {found.factors[0]:g}× to {found.factors[-1]:g}× of this rate: it lies at {where} arrivals."
    return (
        f"The knee is at {factor:g}× of this rate, {number(run.completed_per_s)} requests completed per second: there throughput "
        "over mean latency is largest. Beyond it, latency grows faster than throughput."
    )


# --- profiles -----------------------------------------------------------------------------------------------------------


def profiles_screen(profiles: list[Profile]) -> RenderableType:
    rows = [
        (
            escape(profile.name),
            percent(profile.error.median),
            percent(profile.error.p95),
            f"{profile.error.rows:,}",
            f"{profile.limits.kv_tokens:,}",
            f"{profile.limits.most_sequences:,}",
            f"{profile.limits.step_tokens:,}",
        )
        for profile in profiles
    ]
    head = ("profile", "error", "p95", "held out", "KV tokens", "sequences", "step tokens")
    said = "Errors are those on measurements left out of the fit: median and 95% quantile. --json has the sources."
    return Group(Text(said), table("Profiles", head, rows))
