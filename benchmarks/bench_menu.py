"""What silent routing costs when users are strategic, against a published menu. RouterBench and SWE-bench Verified, held out.

    WALRAS_DATA=FOLDER python benchmarks/bench_menu.py    # three minutes; --quick prints and writes nothing

Requests, outcomes, dollars, the router and what it makes of a changed prompt are real; the users are SIMULATED: what a
request is worth to them, what they show of it, and who is willing to misreport. Rewrites its section of
docs/benchmarks.md, and docs/silent-routing.svg.
"""

from __future__ import annotations

import os

os.environ.update(
    OMP_NUM_THREADS="1", OPENBLAS_NUM_THREADS="1", NUMBA_NUM_THREADS="1"
)  # before numpy is loaded

import argparse
import time
from collections.abc import Callable
from dataclasses import astuple, dataclass, fields, replace
from itertools import product
from pathlib import Path

import numpy as np
from scipy.stats import t as student

from page import PAGE, write_section
from walras.demand.effort import cross_fitted, policies
from walras.demand.menu import design
from walras.demand.offerings import Offerings
from walras.diagnosis.evaluate import _split  # the halves of `walras evaluate`
from walras.estimate.estimates import fit_estimates, requests_of
from walras.estimate.type_laws import LogNormal
from walras.quantities import Labels
from walras.records import Log, read_log
from walras.simulate.strategic import (
    ROUNDS,
    Outcome,
    Population,
    Posted,
    beliefs,
    draw_users,
    heard,
    overtakes,
    published,
    routed,
    silent,
)

SHARES = np.linspace(0.0, 1.0, 11)
CORRELATIONS = (0.0, 0.5, 0.8, 0.95, 1.0)
SHOWN = 0.8
LEVELS = 8
OBJECTIVES = ("welfare", "revenue")
MENUS = tuple(product(("models", "routed"), OBJECTIVES))
SILENT = tuple(product(("naive", "recalibrated"), ("flat", "cost")))
FIELDS = tuple(field.name for field in fields(Outcome))
FIGURE = PAGE.with_name("silent-routing.svg")


# --- the data, and how a prompt may be sent ---------------------------------------------------------------------------

Way = Callable[[Log], Log]


def line(before: str, after: str = "") -> Way:
    """The prompt with a line before or after it."""
    return lambda log: replace(log, prompts=tuple(f"{before}{text}{after}" for text in log.prompts or ()))


def claim(name: str) -> Way:
    """The request under another class."""

    def sent(log: Log) -> Log:
        assert log.task_class is not None
        names = log.task_class.names
        return replace(log, task_class=Labels(np.full(len(log), names.index(name)), names))

    return sent


LINES: dict[str, Way] = {
    "“hard” before": line(
        "This is an unusually hard problem: reason step by step and check the answer twice.\n"
    ),
    "“hard” after": line(
        "", "\nGet this right, please: the last two models failed on it, and my job depends on it."
    ),
    "code before": line(
        "Write a Python function that passes these tests.\nassert solve([3, 1, 2]) == [1, 2, 3]\n"
    ),
    "choices after": line(
        "", "\nA) the first\nB) the second\nC) both of them\nD) neither of them\nAnswer with one letter."
    ),
    "blank after": line(
        "", "\nFill in the blank _ with the option that makes sense: 1. the former 2. the latter"
    ),
}


@dataclass(frozen=True)
class Case:
    """A log whose outcomes are all known, and the users imagined for it."""

    title: str
    log: Log
    law: LogNormal
    each: int
    """Simulated users of each held-out request."""
    per: int
    """Requests that money is quoted for."""
    ways: dict[str, Way]

    @classmethod
    def read(cls, title: str, path: Path, law: LogNormal, each: int, per: int, lines: dict[str, Way]) -> Case:
        log = read_log([path], also=("prompt",) if lines else ())
        known = ~np.isnan(log.per_use["quality"] + log.per_use["cost_usd"]).any(axis=1)
        log = log.take(np.flatnonzero(known), np.arange(len(log.models)))
        assert log.task_class is not None
        claims = {f"as {name}": claim(name) for name in log.task_class.names}
        return cls(title, log, law, each, per, {"as it is": lambda log: log, **lines, **claims})


@dataclass(frozen=True)
class Half:
    """What one half of a log taught, and the other half to judge it on, each request as often as it has users."""

    quality: np.ndarray
    """What came out, (N, M)."""
    cost: np.ndarray
    expected: np.ndarray
    """q̂ and ĉ in each way, (2, N, K, M)."""
    strongest: int
    posted: dict[tuple[str, str], Posted]

    @classmethod
    def of(cls, case: Case, seed: int) -> Half:
        everyone = np.arange(len(case.log.models))
        train, test = (case.log.take(rows, everyone) for rows in _split(np.arange(len(case.log)), seed))
        estimates = fit_estimates(train, seed=seed)
        offers = [estimates.offer(requests_of(way(test))).uses for way in case.ways.values()]
        expected = np.stack([(uses.quality, uses.amounts[:, :, 0]) for uses in offers], axis=2)
        sent = np.tile(np.arange(len(test)), case.each)
        expected = expected[:, sent]
        quality, cost = train.per_use["quality"], train.per_use["cost_usd"]
        models = Offerings(case.log.models, quality.mean(axis=0), cost.mean(axis=0))
        values = case.law.median * np.geomspace(0.1, 100.0, 61)
        found = policies(*cross_fitted(train, seed=seed), quality, cost, values)
        posted = {}
        for kind, objective in MENUS:
            offered = models if kind == "models" else found.offerings
            tiers = design(case.law, offered, objective=objective, tiers=4).tiers
            which = np.array([offered.names.index(tier.name) for tier in tiers])
            model = np.broadcast_to(which, (*expected.shape[1:3], which.size))
            if kind == "routed":
                model = routed(found.value[which], *expected)
            published_quality, price = np.array([(tier.quality, tier.price) for tier in tiers]).T
            posted[kind, objective] = Posted(published_quality, price, model)
        outcomes = (test.per_use[name][sent] for name in ("quality", "cost_usd"))
        return cls(*outcomes, expected, int(models.quality.argmax()), posted)

    def population(self, law: LogNormal, correlation: float, seed: int) -> Population:
        rng = np.random.default_rng(seed)
        users = draw_users(law, len(self.quality), correlation=correlation, levels=LEVELS, rng=rng)
        return Population(users, *self.expected, self.quality, self.cost)

    def moves(self, case: Case, population: Population) -> dict[str, tuple[float, ...]]:
        """What one change of an honest report does: share whose model changes, share moved to the strongest of those not there, USD."""
        users, at = population.users, np.arange(len(self.quality))
        belief = beliefs(*heard(users.value, users.signal, np.ones(at.size), users.levels))
        choice = routed(belief, *self.expected)
        base = choice[at, 0, users.signal]
        named = list(case.ways)
        lines, claims = (
            [k for k, name in enumerate(named) if (name in LINES) is is_line and k]
            for is_line in (True, False)
        )
        sent = choice[at, :, users.signal]
        reach = {name: sent[:, [k]] for k, name in enumerate(named) if k in lines}
        if lines:
            reach["any of the lines"] = sent[:, lines]
        reach["another class"] = sent[:, claims]
        reach["another signal"] = choice[:, 0]
        reach["any of all these"] = choice.reshape(at.size, -1)
        out, away = {}, base != self.strongest
        for name, models in reach.items():
            up = (models == self.strongest).any(axis=1)
            to = np.where(up, self.strongest, models[:, 0] if models.shape[1] == 1 else base)
            added = self.cost[at, to] - self.cost[at, base]
            changed = (models != base[:, None]).any(axis=1)
            out[name] = (changed.mean(), up[away].mean(), added.mean())
        return out


# --- the study --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Study:
    """What every mechanism brings, by seed, misreporting share and field of `Outcome`."""

    case: Case
    menus: dict[tuple[str, str], np.ndarray]
    """By kind and objective, (seeds, A, F). What signals say does not matter."""
    silent: dict[tuple[float, str, str], np.ndarray]
    """By correlation, operator and billing, (seeds, A, F)."""
    known: np.ndarray
    """Welfare of a router that is told the true V of honest users, (seeds,)."""
    moved: dict[str, np.ndarray]
    """By what is changed: changed models, moved to the strongest of those not there, USD added, (seeds, 3)."""

    @classmethod
    def run(cls, case: Case, seeds: int) -> Study:
        menus: dict[tuple[str, str], list[list[Outcome]]] = {}
        quiet: dict[tuple[float, str, str], list[list[Outcome]]] = {}
        moved: dict[str, list[tuple[float, ...]]] = {}
        known, began = [], time.perf_counter()
        for seed in range(seeds):
            half = Half.of(case, seed)
            for r in CORRELATIONS:
                population = half.population(case.law, r, seed)
                for operator, billing in SILENT:
                    got = [silent(population, a, billing=billing, operator=operator) for a in SHARES]
                    quiet.setdefault((r, operator, billing), []).append(got)
                if r == SHOWN:
                    known.append(told(population))
                    for what, found in half.moves(case, population).items():
                        moved.setdefault(what, []).append(found)
                    for key, posted in half.posted.items():
                        menus.setdefault(key, []).append([published(population, a, posted) for a in SHARES])
            print(f"{case.title}: seed {seed}, {time.perf_counter() - began:.0f} s", flush=True)
        return cls(
            case, *map(tables, (menus, quiet)), np.array(known), {k: np.array(v) for k, v in moved.items()}
        )

    def print_all(self) -> None:
        """Every cell: mean and half-width of the 95% interval of each field."""
        print("data,mechanism,signal correlation,misreporting," + ",".join(f"{f},±" for f in FIELDS))
        rows = [(f"menu of {k} ({o})", "", of) for (k, o), of in self.menus.items()]
        rows += [(f"silent {o} billed {b}", f"{r:g}", of) for (r, o, b), of in self.silent.items()]
        for name, r, of in rows:
            for a, share in enumerate(SHARES):
                cells = [f"{x:.6g}" for f in range(len(FIELDS)) for x in interval(of[:, a, f])]
                print(f"{self.case.title},{name},{r},{share:.1f},{','.join(cells)}")


def tables(found: dict) -> dict:
    return {key: np.array([[astuple(o) for o in row] for row in rows]) for key, rows in found.items()}


def told(population: Population) -> float:
    """Welfare of [Z-4] at every user's true V, all honest."""
    users, at = population.users, np.arange(len(population.quality))
    net = users.value[:, None] * population.expected[:, 0] - population.expected_cost[:, 0]
    best = net.argmax(axis=1)
    return float((users.value * population.quality[at, best] - population.cost[at, best]).mean())


def interval(values: np.ndarray) -> tuple[float, float]:
    """Mean over seeds and half-width of its 95% interval (Student)."""
    n = len(values)
    return float(values.mean()), float(student.ppf(0.975, n - 1) * values.std(ddof=1) / np.sqrt(n))


def within(values: np.ndarray, digits: str = ".3f") -> str:
    mean, half = interval(values)
    return f"{round(mean, 3) + 0.0:{digits}} ± {half:{digits.lstrip('+')}}"  # no −0


def crossing(menu: np.ndarray, quiet: np.ndarray) -> str:
    """α* of the mean welfare by seed (seeds, A), and 95% of its bootstrap over seeds."""
    gap, rng = menu - quiet, np.random.default_rng(0)
    draws = rng.integers(len(gap), size=(2000, len(gap)))
    tried = np.sort([overtakes(SHARES, gap[rows].mean(axis=0)) for rows in draws])
    low, high = tried[int(0.025 * tried.size)], tried[int(0.975 * tried.size) - 1]
    at = overtakes(SHARES, gap.mean(axis=0))
    ends = worded(low), worded(high)
    return worded(at) if ends[0] == ends[1] == worded(at) else f"{worded(at)} ({ends[0]} to {ends[1]})"


def worded(share: float) -> str:
    return "never" if np.isinf(share) else "from the start" if share == 0 else f"{share:.2f}"


# --- tables -----------------------------------------------------------------------------------------------------------

BILLED = {"flat": "one price", "cost": "at cost"}
WELFARE, REVENUE, PROFIT, REGRET, HONEST, SERVED, SWING = range(len(FIELDS))


def mechanisms(study: Study) -> dict[str, np.ndarray]:
    menus = {f"menu of {kind}, most {objective}": of for (kind, objective), of in study.menus.items()}
    return menus | {
        f"silent, {operator}, billed {BILLED[billing]}": study.silent[SHOWN, operator, billing]
        for operator, billing in SILENT
    }


def unit(case: Case) -> str:
    return "USD per request" if case.per == 1 else f"USD per {case.per:,} requests"


def welfare_table(study: Study) -> list[str]:
    lines = [
        f"| {study.case.title}, {unit(study.case)} | welfare, α = 0 | α = 0.5 | α = 1 | revenue, α = 0.5 | profit, α = 0.5 | "
        "regret of honest users, α = 0.5 | served, α = 0.5 |",
        "| :--- | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for name, of in mechanisms(study).items():
        usd = study.case.per * of
        cells = [within(usd[:, a, WELFARE]) for a in (0, 5, 10)]
        cells += [within(usd[:, 5, field]) for field in (REVENUE, PROFIT, REGRET)]
        lines.append(f"| {name} | {' | '.join(cells)} | {of[:, 5, SERVED].mean():.1%} |")
    return [*lines, f"| told the true V, all honest | {within(study.case.per * study.known)} | | | | | | |"]


def paired_table(study: Study) -> list[str]:
    heads = [f"{kind}, α = {SHARES[a]:g}" for kind in ("models", "routed") for a in (0, 5, 10)]
    lines = [
        f"| menu − silent, {unit(study.case)} | {' | '.join(heads)} | honest users, routed, α = 0.5 |",
        f"| :--- | {'---: | ' * (len(heads) + 1)}".rstrip(),
    ]
    for operator, billing in SILENT:
        quiet = study.silent[SHOWN, operator, billing]
        gaps = {
            kind: study.case.per * (study.menus[kind, "welfare"] - quiet) for kind in ("models", "routed")
        }
        cells = [within(gaps[kind][:, a, WELFARE], "+.3f") for kind in gaps for a in (0, 5, 10)]
        cells.append(within(gaps["routed"][:, 5, HONEST], "+.3f"))
        lines.append(f"| {operator}, billed {BILLED[billing]} | {' | '.join(cells)} |")
    return lines


def crossing_table(study: Study) -> list[str]:
    heads = [f"{operator}, {BILLED[billing]}" for operator, billing in SILENT]
    lines = [
        f"| {study.case.title}: menu of | r | {' | '.join(heads)} |",
        "| :--- | ---: | ---: | ---: | ---: | ---: |",
    ]
    for kind, r in product(("models", "routed"), CORRELATIONS):
        menu = study.menus[kind, "welfare"][:, :, WELFARE]
        cells = [crossing(menu, study.silent[r, *key][:, :, WELFARE]) for key in SILENT]
        lines.append(f"| {kind} | {r:g} | {' | '.join(cells)} |")
    return lines


def moves_table(study: Study) -> list[str]:
    lines = [
        f"| {study.case.title}: one change of an honest report | another model | to the strongest, of those not there | "
        f"added, {unit(study.case)} |",
        "| :--- | ---: | ---: | ---: |",
    ]
    for what, of in study.moved.items():
        shares = [f"{mean:.1%} ± {half:.1%}" for mean, half in map(interval, of[:, :2].T)]
        lines.append(f"| {what} | {' | '.join(shares)} | {within(study.case.per * of[:, 2], '+.3f')} |")
    return lines


def unsettled(study: Study) -> str:
    """How many runs of the recalibrated operator came to no rest, and how much it mattered."""
    of = {
        b: [x for (_, o, billed), x in study.silent.items() if (o, billed) == ("recalibrated", b)]
        for b in BILLED
    }
    swing = {b: np.array(x)[..., SWING] for b, x in of.items()}
    welfare = np.array(of["flat"])[..., WELFARE]
    share = (swing["flat"] / welfare)[swing["flat"] > 0]
    return (
        f"{study.case.title}: {(swing['flat'] > 0).mean():.0%} of the runs with one price and {(swing['cost'] > 0).mean():.0%} of "
        f"those at cost; with one price welfare moves by {np.median(share):.2%} in the median of these, {share.max():.1%} at most"
    )


# --- the figure -------------------------------------------------------------------------------------------------------

STYLE = """
  text { font: 13px system-ui, sans-serif; fill: #333 } .grid { stroke: #ddd } .axis { stroke: #888 }
  path { fill: none; stroke-width: 2; stroke-linejoin: round } .s4 { stroke-dasharray: 5 4 }
  .s0 { stroke: #6b7280 } .s1 { stroke: #c2410c } .s2 { stroke: #1d63c4 } .s3 { stroke: #0d7d56 } .s4 { stroke: #8b3fb0 }
  .b0 { fill: #6b7280 } .b1 { fill: #c2410c } .b2 { fill: #1d63c4 } .b3 { fill: #0d7d56 } .b4 { fill: #8b3fb0 }
  .band { opacity: .12; stroke: none }
  @media (prefers-color-scheme: dark) {
    text { fill: #ddd } .grid { stroke: #444 } .axis { stroke: #999 }
    .s0 { stroke: #a3aab5 } .s1 { stroke: #fb8b4d } .s2 { stroke: #6ba6f5 } .s3 { stroke: #3fc294 } .s4 { stroke: #cf93ea }
    .b0 { fill: #a3aab5 } .b1 { fill: #fb8b4d } .b2 { fill: #6ba6f5 } .b3 { fill: #3fc294 } .b4 { fill: #cf93ea }
    .band { opacity: .18 }
  }
"""
WIDTH, HEIGHT, LEFT, GAP, TOP, BOTTOM = 760, 420, 52, 60, 124, 48
PANEL = (WIDTH - LEFT - GAP - 16) / 2


def drawn_lines(study: Study) -> dict[str, np.ndarray]:
    """Welfare over that of a router told the true V, by seed and share: what is common to a seed cancels."""
    found = {
        "menu of models": study.menus["models", "welfare"],
        "menu of routed tiers": study.menus["routed", "welfare"],
        "silent, one price, naive": study.silent[SHOWN, "naive", "flat"],
        "silent, one price, recalibrated": study.silent[SHOWN, "recalibrated", "flat"],
        "silent, billed at cost, recalibrated": study.silent[SHOWN, "recalibrated", "cost"],
    }
    return {name: 100 * of[:, :, WELFARE] / study.known[:, None] for name, of in found.items()}


def panel(study: Study, left: float) -> list[str]:
    lines = {
        name: (of.mean(axis=0), np.array([interval(x)[1] for x in of.T]))
        for name, of in drawn_lines(study).items()
    }
    step = 2.0
    low = step * np.floor(min((mean - half).min() for mean, half in lines.values()) / step)
    high = step * np.ceil(max((mean + half).max() for mean, half in lines.values()) / step)

    def at(x: float, y: float) -> tuple[float, float]:
        return left + x * PANEL, HEIGHT - BOTTOM - (y - low) / (high - low) * (HEIGHT - TOP - BOTTOM)

    def path(ys: np.ndarray) -> list[str]:
        return [f"{x:.1f},{y:.1f}" for x, y in (at(*p) for p in zip(SHARES, ys, strict=True))]

    parts = [f'<text x="{left:.1f}" y="{TOP - 14}">{study.case.title}</text>']
    for tick in np.arange(low, high + step / 2, step):
        x, y = at(0.0, tick)
        parts.append(
            f'<line class="{"axis" if tick == low else "grid"}" x1="{x:.1f}" x2="{x + PANEL:.1f}" y1="{y:.1f}" y2="{y:.1f}"/>'
            f'<text x="{x - 8:.1f}" y="{y + 4:.1f}" text-anchor="end">{tick:g}%</text>'
        )
    for tick in SHARES[::2]:
        x, y = at(tick, low)
        parts.append(f'<text x="{x:.1f}" y="{y + 18:.1f}" text-anchor="middle">{tick:.1f}</text>')
    for k, (mean, half) in enumerate(lines.values()):
        parts.append(
            f'<path class="band b{k}" d="M{" L".join(path(mean + half) + path(mean - half)[::-1])} Z"/>'
        )
    return parts + [
        f'<path class="s{k}" d="M{" L".join(path(mean))}"/>' for k, (mean, _) in enumerate(lines.values())
    ]


def figure(studies: list[Study]) -> str:
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-labelledby="t">',
        '<title id="t">Welfare of silent routing and of menus against the share of users that misreports</title>',
        f"<style>{STYLE}</style>",
        f'<text x="{LEFT}" y="20">Welfare, % of a router that is told the true V by all (simulated users, r = {SHOWN:g}; shaded: 95%)</text>',
    ]
    for k, name in enumerate(drawn_lines(studies[0])):
        x, y = LEFT + (k % 3) * 232, 44 + 22 * (k // 3)
        parts.append(f'<path class="s{k}" d="M{x},{y} h22"/><text x="{x + 28}" y="{y + 4}">{name}</text>')
    for p, study in enumerate(studies):
        parts += panel(study, LEFT + p * (PANEL + GAP))
    parts.append(
        f'<text x="{WIDTH / 2}" y="{HEIGHT - 8}" text-anchor="middle">α, share of users that sends the best report there is</text>'
    )
    return "\n".join([*parts, "</svg>", ""])


# --- the page ---------------------------------------------------------------------------------------------------------


def section(studies: list[Study], seeds: int) -> str:
    bench, swe = studies
    about = "; ".join(
        f"{s.case.title}, {len(s.case.log):,} requests × {len(s.case.log.models)} models, median V {s.case.law.median:g} USD, "
        f"{s.case.each} user{'s' * (s.case.each > 1)} for each held-out request"
        for s in studies
    )
    tables = (
        "\n\n".join("\n".join(of(study)) for study in studies)
        for of in (welfare_table, paired_table, crossing_table, moves_table)
    )
    welfare, paired, crossings, moves = tables
    quiet, menus = bench.silent, {kind: bench.menus[kind, "welfare"] for kind in ("models", "routed")}
    one_price, at_cost = (quiet[SHOWN, "recalibrated", billing].mean(axis=0) for billing in ("flat", "cost"))
    models, routed_tiers = (menus[kind].mean(axis=0) for kind in ("models", "routed"))
    lost = 1 - one_price[-1, WELFARE] / one_price[0, WELFARE]
    blind = 1 - models[0, WELFARE] / at_cost[0, WELFARE]
    overtaking = crossing(menus["models"][:, :, WELFARE], quiet[SHOWN, "recalibrated", "flat"][:, :, WELFARE])
    earned = bench.menus["models", "revenue"].mean(axis=0)[0]
    return f"""\
## Silent routing against a menu

Requests, outcomes, dollars, the router and what it makes of a changed prompt are real; **the users are SIMULATED**. What a request
is worth to its user, V, is drawn apart from its outcome: lognormal, σ = 1, with the median about where the strongest model
overtakes the next ({about}). The router sees one of {LEVELS} signal levels (think of urgency, tenant, history) whose
logarithm is correlated r with that of V. A share α of the users misreports. All is learned on one random half and judged on
the other, {seeds} halves with a draw of users each; ± is a 95% interval over them (Student). Halves share requests: Nadeau and Bengio's
correction, if all of the spread came from the halves, would widen it {np.sqrt(1 + seeds):.1f} times.

*Silent*: the router of `walras fit` takes argmax_m E[V | signal]·q̂_m(x) − ĉ_m. *One price* recovers the mean cost of those who come,
iterated to the fixed point with those who stay away; *at cost* bills each the model she was given. An honest user sends her prompt and
her signal. A strategic one sends whatever is best for V·q̂(true prompt) − payment, run through the router itself: any signal level, any
of the lines below, another class (SWE-bench's records have no prompts: there it is the signal and the repository). A line is taken
not to change what a model answers or costs. A *naive* operator reads signals as if all were honest; a *recalibrated* one uses E[V | reported
signal] of those who come now, and the two sides answer one another until that rests. It does not always, and then the operator
reads all reports so far, and means over the last half of {ROUNDS} rounds are shown. No rest: {". ".join(map(unsettled, studies))}.

*Menus* have at most 4 tiers, designed on the learning half for the true law of V: single *models*, or *routed* tiers, "route at
value v", with the cross-fitted quality and cost of each v. Users choose by V and the published quality. In a routed tier the prompt still
matters, so a strategic user also changes it, and takes the tier where that pays most. *Regret* of honest users is what their best misreport
would have added to the utility they expected, all others as they are.

### What comes of it

![Welfare against the share of users that misreports](silent-routing.svg)

Signals of r = {SHOWN:g}. The benchmark prints every r and α.

{welfare}

- **With one price lies cost {lost:.1%} of RouterBench's welfare, and knowing of them saves nothing**: the price rises with everybody's wish for the
  strongest model, and honest users pay it too.
- **A menu of single models cannot be gamed, and cannot read**: it gives up {blind:.1%} of welfare from the start, and is ahead of one price only from
  α = {overtaking} on.
- **Routed tiers are about level with honest silent routing, and ahead of one price once some lie**; but a changed prompt or
  class games them from inside, and the operator pays: {1000 * routed_tiers[5, PROFIT]:+.2f} USD per 1,000 requests at α = 0.5, {1000 * routed_tiers[10, PROFIT]:+.2f} at α = 1.
- **Where silent routing wins: billed at cost.** On RouterBench it is then ahead of the menu of models whatever α, level with routed tiers where all
  are honest, and further ahead of them the more lie. Who pays for what she is given gains nothing by claiming a value she does not
  have, so lies only correct the guess. That is a menu too, of every model at its cost, with the router as adviser. What
  invites lies is not the silence but the one price.
- On SWE-bench little is certain: up to α = 0.5 the menu of models is ahead of silent routing, routed tiers are not apart from either. A router that knows only the repository, from
  {len(swe.case.log) // 2} tasks, does not beat single models, and at these V the strongest model is seldom a waste, so lies cost next to nothing.
- Menus for most revenue serve {earned[SERVED]:.0%} on RouterBench and earn {1000 * earned[PROFIT]:.1f} USD per 1,000 requests; they cost
  {1 - earned[WELFARE] / models[0, WELFARE]:.0%} of the welfare of the other menu of models.

### Menu less silent routing, paired

Welfare by halves and draws, r = {SHOWN:g}, menus for most welfare. Last column: what honest users get in fact, V·quality − payment; in routed
tiers some of that is the operator's loss.

{paired}

### α*: the misreporting share from which on the menu is ahead

Of the mean welfare, with 95% of its bootstrap over halves and draws; an interval from the start to never decides nothing.

{crossings}

### How far one change of a report moves the router

Honest users with signals of r = {SHOWN:g} under a naive operator. *Added* is what it costs to let all make that change who reach the
strongest model by it (for a single line: all, whichever way it moves them). The strongest is the best on the learning half.

{moves}
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="three seeds, nothing written")
    quick = parser.parse_args().quick
    if "WALRAS_DATA" not in os.environ:
        raise SystemExit("WALRAS_DATA is not set: it names the folder of the shared data sets")
    data = Path(os.environ["WALRAS_DATA"]) / "routing"
    cases = [
        Case.read("RouterBench", data / "routerbench_subset.parquet", LogNormal(0.04, 1.0), 1, 1000, LINES),
        Case.read(
            "SWE-bench Verified", data / "swebench_verified_mini.parquet", LogNormal(5.0, 1.0), 4, 1, {}
        ),
    ]
    seeds = 3 if quick else 10
    studies = [Study.run(case, seeds) for case in cases]
    for study in studies:
        study.print_all()
    written = section(studies, seeds)
    print(written)
    if not quick:
        FIGURE.write_text(figure(studies), encoding="utf-8")
        write_section("menu", written)


if __name__ == "__main__":
    main()
