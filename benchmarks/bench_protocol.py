"""The clearing protocol: rounds and messages with late and lost answers, and what a tenant gains by asking for less than it wants.

Tenants and their connection are SIMULATED. `--write` puts the tables into docs/benchmarks.md.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from page import spread, write_section
from walras.market.tenants.protocol import Cleared, Demand, Market, Unreliable, in_process

RESOURCES = ("prefill", "decode", "kv")
TOLERANCE = 1e-4
SEEDS = 10
TENANTS = 100
CONNECTIONS = {
    "all in time": Unreliable(),
    "30% late": Unreliable(late=0.3),
    "30% lost": Unreliable(lost=0.3),
    "15% late, 15% lost": Unreliable(lost=0.15, late=0.15),
    "30% late, 30% lost": Unreliable(lost=0.3, late=0.3),
}
SIZES = (2, 4, 8, 16, 32, 64, 128, 256)
HELD_BACK = np.linspace(0, 0.6, 61)


def by_name(amounts: Any) -> dict[str, float]:
    return dict(zip(RESOURCES, amounts.tolist(), strict=True))


def asker(demand: Callable[[Any], Any]) -> Demand:
    return lambda prices: by_name(demand(np.array([prices[r] for r in RESOURCES])))


def spender(rng: np.random.Generator, elasticity: float) -> Demand:
    """A budget, and constant elasticity of substitution."""
    budget, shares = rng.lognormal(), rng.dirichlet(np.ones(3))

    def demand(p: Any) -> Any:
        weight = shares * p**-elasticity
        return budget * weight / (weight @ p)

    return asker(demand)


def saver(rng: np.random.Generator) -> Demand:
    """Utility Σ a·log(1 + x) − p·x: money kept has value."""
    a = rng.lognormal(size=3)
    return asker(lambda p: np.maximum(a / p - 1, 0))


KINDS: dict[str, Callable[[np.random.Generator], Demand]] = {
    "Leontief": lambda rng: spender(rng, 0.0),
    "CES, elasticity 0.5": lambda rng: spender(rng, 0.5),
    "Cobb–Douglas": lambda rng: spender(rng, 1.0),
    "CES, elasticity 3": lambda rng: spender(rng, 3.0),
    "quasi-linear": saver,
}


def supply(n: int) -> dict[str, float]:
    return by_name(n * np.array([1.0, 0.3, 4.0]))


def away(found: Cleared, other: Cleared, goods: Mapping[str, float]) -> float:
    """Largest difference of what a supply is worth, in shares of what all are worth: prices of free goods count as they do in a bill."""
    value = sum(found.prices[r] * goods[r] for r in RESOURCES)
    return max(abs(found.prices[r] - other.prices[r]) * goods[r] for r in RESOURCES) / value


def connections() -> list[str]:
    lines = [
        "| tenants | " + " | ".join(CONNECTIONS) + " |",
        "|---|" + "---|" * len(CONNECTIONS),
    ]
    for name, kind in KINDS.items():
        rounds: dict[str, list[float]] = {how: [] for how in CONNECTIONS}
        messages: dict[str, list[float]] = {how: [] for how in CONNECTIONS}
        differ: dict[str, list[float]] = {how: [] for how in CONNECTIONS}
        for seed in range(SEEDS):
            rng, goods = np.random.default_rng(seed), supply(TENANTS)
            demands = {f"t{k}": kind(rng) for k in range(TENANTS)}
            first: Cleared | None = None
            for how, connection in CONNECTIONS.items():
                network = Unreliable(connection.lost, connection.late, seed=seed)
                found = in_process(Market("m", goods, list(demands), tolerance=TOLERANCE), demands, network)
                if found.status != "cleared" or found.stale:
                    raise SystemExit(f"{name}, {how}, seed {seed}: {found.status}, {found.stale} stale")
                first = first or found
                rounds[how].append(found.rounds)
                messages[how].append(found.messages / TENANTS)
                differ[how].append(away(first, found, goods))
        cells = [
            f"{spread(rounds[how], '.0f')}; {np.median(messages[how]):.0f}; {100 * max(differ[how]):.2f}%"
            for how in CONNECTIONS
        ]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
        print(lines[-1], flush=True)
    return lines


def gain(n: int, seed: int) -> tuple[float, float]:
    """(share that is held back, gain of utility) of one of n quasi-linear tenants that does what is best for it."""
    rng, goods = np.random.default_rng((seed, n)), supply(n)
    a = rng.lognormal(size=(n, 3))
    a[0] = np.exp(0.5)  # the mean tenant

    def utility(held_back: float) -> float:
        mine = asker(lambda p: (1 - held_back) * np.maximum(a[0] / p - 1, 0))
        others = asker(lambda p: np.maximum(a[1:] / p - 1, 0).sum(axis=0))
        market = Market("m", goods, ["mine", "others"], tolerance=1e-7)
        found = in_process(market, {"mine": mine, "others": others})
        x, p = found.demands["mine"], np.array(list(found.prices.values()))
        return float((a[0] * np.log1p(x)).sum() - p @ x)

    values = np.array([utility(float(share)) for share in HELD_BACK])
    best = int(values.argmax())
    return float(HELD_BACK[best]), float(values[best] / values[0] - 1)


def strategic() -> list[str]:
    lines = ["| tenants | holds back, best for it | gains |", "|---|---|---|"]
    for n in SIZES:
        found = [gain(n, seed) for seed in range(SEEDS)]
        back, gained = ([100 * pair[k] for pair in found] for k in range(2))
        lines.append(f"| {n} | {spread(back, '.0f')}% | {spread(gained, '.2g')}% |")
        print(lines[-1], flush=True)
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--write", action="store_true")
    wanted = parser.parse_args()
    body = "\n".join(
        [
            "## The clearing protocol",
            "",
            f"{TENANTS} SIMULATED tenants, 3 resources, to a relative excess demand of {TOLERANCE:g}, {SEEDS} seeds; a late answer comes 1 to 3 rounds later. Each cell: rounds, "
            "median and range; messages per tenant, median; largest difference of prices from those where all answer in time, in shares of the value of all supply.",
            "",
            *connections(),
            "",
            "### What asking for less gains",
            "",
            f"Quasi-linear tenants (Σ a·log(1 + x) − p·x), supply in step with their number. One of them answers every quote with a share of its true demand, chosen best for itself "
            f"knowing all; the others answer truly. Median and range over {SEEDS} markets.",
            "",
            *strategic(),
        ]
    )
    if wanted.write:
        write_section("protocol", body)
    else:
        print(body)


if __name__ == "__main__":
    main()
