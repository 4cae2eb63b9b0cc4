"""Prices that are old and noisy: what they still are worth, and whether routes swing. SIMULATED.

    WALRAS_DATA=FOLDER PYTHONPATH=studies python -m signals runs.jsonl           # --write: its section of docs/two-layers.md

One model on four engines, alike or not, and every request is served. A router sees gauges as they were `delay` seconds ago, and costs times
exp(σz − σ²/2), z drawn anew for each engine and tenth of a second. What is judged is Σ λ·latency. Resumable, as `two_layers` is.
"""

from __future__ import annotations

import argparse
import bisect
import json
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import lru_cache
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np

from two_layers.play import Pool, latencies, live_seconds
from two_layers.policies import charge
from two_layers.report import PAGE, read, section
from two_layers.world import Coupling, FloatArray, Plant, Window, busy_s, plant, window
from walras.supply.damping import Turns, nowcast, shares, stay, temperature
from walras.supply.resource_prices import EngineModel
from walras.supply.state import EngineState

DELAYS_S, NOISES = (0.0, 0.1, 1.0, 5.0, 30.0), (0.0, 0.25, 0.5, 1.0)
SIGNALS = [*((delay, 0.0) for delay in DELAYS_S), *((1.0, noise) for noise in NOISES[1:])]
"""Delays without noise, and all noises at one delay."""
PLANTS = {"alike": "alike", "unlike": "sized"}
ROUTERS = ("flat", "least-loaded", "argmin", "logit", "nowcast", "both")
TICK_S, COUNT, LOAD, TRACE = 0.1, 400, 0.8, "mooncake"


@dataclass
class Signal:
    """Gauges as they were read, and what was sent since."""

    delay_s: float
    noise: float
    random: np.random.Generator
    at_s: list[float] = field(default_factory=list)
    models: list[list[EngineModel]] = field(default_factory=list)
    sent: list[list[tuple[float, float]]] = field(default_factory=lambda: [[] for _ in range(4)])
    tick: int = -1
    z: FloatArray = field(default_factory=lambda: np.zeros(4))

    def poll(self, pool: Pool, until_s: float) -> None:
        """Bring the engines to `until_s`, and read them on the way when a reading will be just old enough."""
        if pool.replays[0].now_s < until_s - self.delay_s < until_s:
            pool.run(until_s - self.delay_s)
            self.note(pool, until_s - self.delay_s)
        pool.run(until_s)
        self.note(pool, until_s)

    def note(self, pool: Pool, now: float) -> None:
        if self.at_s and self.at_s[-1] == now:
            # Arrivals at one instant: the gauges know those before.
            self.models[-1] = pool.models()
        else:
            self.at_s.append(now)
            self.models.append(pool.models())

    def read(self, now: float) -> list[EngineModel]:
        """The newest reading that is `delay_s` old; before there is one, engines are as at the start."""
        return self.models[max(bisect.bisect_right(self.at_s, now - self.delay_s) - 1, 0)]

    def since(self, m: int, state: EngineState) -> tuple[FloatArray, FloatArray]:
        """When engine m was sent something after the reading, and how large it was beside the mean."""
        first = bisect.bisect_right(self.sent[m], (state.at_s, np.inf))
        sent = np.array(self.sent[m][first:]).reshape(-1, 2)
        return sent[:, 0], sent[:, 1] / max(state.mean_prompt_tokens, 1.0)

    def blur(self, costs: FloatArray, now: float) -> FloatArray:
        if int(now / TICK_S) != self.tick:
            self.tick = int(now / TICK_S)
            self.z = self.random.normal(size=len(costs))
        return costs * np.exp(self.noise * self.z - self.noise**2 / 2)


def seconds(plant: Plant, models: list[EngineModel], prompt: float, answer: float) -> FloatArray:
    of = live_seconds(plant, models, np.ones((len(models), 1)))
    return of.base + of.prompt * prompt + of.output * answer


def costs_of(pool: Pool, stream: Window, n: int, models: list[EngineModel]) -> FloatArray:
    """(M,) own delay and the quoted delay of others, USD."""
    prompt, answer = float(stream.prompt[n]), float(stream.answers[n].mean())
    price = float(stream.delay_price[: n + 1].mean())
    quoted = np.array([charge(model, prompt, answer, price) for model in models])
    return np.asarray(stream.delay_price[n] * seconds(pool.plant, models, prompt, answer) + quoted)


def slope_of(stream: Window, n: int, models: list[EngineModel]) -> float:
    """g: by how much one mean request more in line raises a cost, in the mean over engines, USD."""
    price = float(stream.delay_price[: n + 1].mean())
    line = np.array([model.request_s for model in models])
    per_request = [model.state.arrivals_per_s * model.request_s / model.idle for model in models]
    return float(np.mean(line * (stream.delay_price[n] + price * np.array(per_request))))


def router(kind: str, signal: Signal) -> Callable[[Pool, Window, int], int]:
    turns = Turns(4)

    def decide(pool: Pool, stream: Window, n: int) -> int:
        now = float(stream.arrival_s[n])
        if kind == "flat":
            return n % len(pool.plant)
        models = signal.read(now)
        read_s = models[0].state.at_s
        if kind == "least-loaded":
            load = np.array([model.state.running + model.state.waiting for model in models])
            return cheapest(signal.blur(1.0 + load, now), signal.random)
        seen = models
        if kind in ("nowcast", "both"):
            # Arrivals at one instant: the gauges of that instant know those before.
            states = [
                nowcast(model, *signal.since(m, model.state), now) if read_s < now else model.state
                for m, model in enumerate(models)
            ]
            seen = [
                EngineModel.of(s, model.settings, pool.plant.steps[m])
                for m, (s, model) in enumerate(zip(states, models, strict=True))
            ]
        costs = signal.blur(costs_of(pool, stream, n, seen), now)
        if kind in ("logit", "both"):
            m = turns.take(shares(costs, warmth(stream, n, models, costs, signal.noise)))
        else:
            m = cheapest(costs, signal.random)
        signal.sent[m].append((now, float(stream.prompt[n])))
        return m

    return decide


def warmth(stream: Window, n: int, models: list[EngineModel], costs: FloatArray, noise: float) -> float:
    """Temperature for costs of this age and noise."""
    now, engines = float(stream.arrival_s[n]), len(models)
    return temperature(
        now - models[0].state.at_s,
        arrivals_per_s=n / now if now > 0 else 0.0,
        slope=slope_of(stream, n, models),
        stay_s=float(np.mean([stay(model) for model in models])),
        engines=engines,
        error=float(np.sqrt(np.expm1(noise**2)) * costs.mean()),
    )


def cheapest(costs: FloatArray, random: np.random.Generator) -> int:
    return int(random.choice(len(costs), p=shares(costs, 0.0)))


@lru_cache(maxsize=2)
def stage(engines: str, seed: int) -> tuple[Plant, Window]:
    """Four engines at `LOAD` of what they sustain together on this window."""
    four = plant(PLANTS[engines], (1,) * 4)
    stream = window(TRACE, Coupling(), 1.0, COUNT, seed)
    rate = LOAD * sum(sustained(four, m, stream) for m in range(4))
    return four, window(TRACE, Coupling(), rate, COUNT, seed)


def sustained(four: Plant, m: int, stream: Window) -> float:
    """Requests a second of one engine that has all of the window to do."""
    return len(stream) / float(busy_s(four, stream, np.full(len(stream), m))[m])


def run(engines: str, kind: str, delay_s: float, noise: float, seed: int) -> dict[str, Any]:
    four, stream = stage(engines, seed)
    signal = Signal(delay_s, noise, np.random.default_rng((seed, 9)))
    decide = router(kind, signal)
    pool, choice = Pool.of(four), np.empty(len(stream), np.int64)
    for n in range(len(stream)):
        signal.poll(pool, float(stream.arrival_s[n]))
        choice[n] = decide(pool, stream, n)
        pool.send(int(choice[n]), n, stream)
    pool.run()
    latency = latencies(pool, len(stream))
    return {
        "engines": engines,
        "router": kind,
        "delay_s": delay_s,
        "noise": noise,
        "seed": seed,
        "cost": float((stream.delay_price * latency).sum() / stream.value.sum()),
        "latency_s": float(latency.mean()),
        "p95_s": float(np.percentile(latency, 95)),
        "amplitude": amplitude(choice, 4),
        "choice": choice.tolist() if seed == 1 and noise == 0 else None,
    }


BIN = 16
"""Requests over which route shares are taken."""


def amplitude(choice: Any, engines: int) -> float:
    """How far route shares swing: root mean square of the share of each `BIN` requests in a row, from its mean over the run, less what
    as many draws at those mean shares would give."""
    whole = choice[: len(choice) // BIN * BIN].reshape(-1, BIN)
    share = np.stack([(whole == m).mean(axis=1) for m in range(engines)], axis=1)
    mean = share.mean(axis=0)
    chance = (mean * (1 - mean)).sum() / BIN
    return float(np.sqrt(max(((share - mean) ** 2).sum(axis=1).mean() - chance, 0.0)))


FIGURE = PAGE.with_name("herding.svg")


def table(rows: list[dict[str, Any]], engines: str) -> str:
    """Σ λ·latency, % of ΣV, and in brackets how far route shares swing: means over seeds."""
    names = [name for name in ROUTERS if name != "flat"]
    mine = [row for row in rows if row["engines"] == engines]
    flat = [100 * row["cost"] for row in mine if row["router"] == "flat"]
    lines = [f"| {engines}: delay, noise | " + " | ".join(names) + " |", "|---|" + "---|" * len(names)]
    for delay, noise in SIGNALS:
        cells = []
        for name in names:
            some = [r for r in mine if (r["router"], r["delay_s"], r["noise"]) == (name, delay, noise)]
            swing = np.mean([row["amplitude"] for row in some]) if some else np.nan
            cost = np.mean([100 * row["cost"] for row in some]) if some else np.nan
            cells.append(f"{cost:.1f} ({swing:.2f})" if some else "–")
        lines.append(f"| {delay:g} s, {noise:g} | {' | '.join(cells)} |")
    seeds = len({row["seed"] for row in mine})
    lines.append(f"\nFlat prices, in turns: {np.mean(flat):.1f}. Windows: {seeds}." if flat else "")
    return "\n".join(lines)


def write(path: Path) -> None:
    rows = read([path])
    section(PAGE, "signals", "\n\n".join(table(rows, engines) for engines in PLANTS))
    FIGURE.write_text(figure(rows), encoding="utf-8")


WIDTH, HEIGHT, SHOWN_S = 720, 150, 5.0
INKS = ("#0b6e4f", "#c05621", "#3b5b92", "#b0b0b0")


def figure(rows: list[dict[str, Any]]) -> str:
    """Route shares of four like engines over time, stacked, with costs `SHOWN_S` old: undamped and damped."""
    panels = [
        row
        for name in ("argmin", "logit", "both")
        for row in rows
        if (row["engines"], row["router"], row["delay_s"], row["noise"], row["seed"])
        == ("alike", name, SHOWN_S, 0.0, 1)
    ]
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT * len(panels)}" role="img" '
        'aria-labelledby="t" font-family="sans-serif" font-size="12">',
        '<title id="t">Share of requests that each of four like engines gets, over time</title>',
        f'<rect width="{WIDTH}" height="{HEIGHT * len(panels)}" fill="#fff"/>',
    ]
    for k, row in enumerate(panels):
        choice = np.array(row["choice"])
        whole = choice[: len(choice) // BIN * BIN].reshape(-1, BIN)
        step, top = (WIDTH - 20) / len(whole), HEIGHT * k + 24
        parts.append(
            f'<text x="10" y="{top - 8}">{row["router"]}, costs {SHOWN_S:g} s old: swing {row["amplitude"]:.2f}, '
            f"Σλ·latency {100 * row['cost']:.1f}% of ΣV</text>"
        )
        for n, part in enumerate(whole):
            at = 0.0
            for m, ink in enumerate(INKS):
                height = float((part == m).mean()) * (HEIGHT - 34)
                parts.append(
                    f'<rect x="{10 + n * step:.1f}" y="{top + at:.1f}" width="{step:.1f}" height="{height:.1f}" fill="{ink}"/>'
                )
                at += height
    return "\n".join([*parts, "</svg>", ""])


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("runs", type=Path)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--write", action="store_true")
    given = parser.parse_args()
    if given.write:
        write(given.runs)
        return
    key = ("engines", "router", "delay_s", "noise", "seed")
    there = read([given.runs]) if given.runs.exists() else []
    done = {tuple(row[k] for k in key) for row in there}
    for seed, engines, (delay, noise), kind in product(range(1, given.seeds + 1), PLANTS, SIGNALS, ROUTERS):
        one = (engines, kind, delay, noise, seed)
        # Turns look at nothing, so that one run is as good as another.
        if one in done or (kind == "flat" and (delay, noise) != (0.0, 0.0)):
            continue
        began = time.process_time()
        row = run(*one)
        row["cpu_s"] = time.process_time() - began
        with given.runs.open("a") as file:
            file.write(json.dumps(row) + "\n")


if __name__ == "__main__":
    main()
