"""Does trying a cheap model first pay? Search, best fixed model, cascade and oracle on a real log, held out.

    WALRAS_DATA=FOLDER python benchmarks/bench_escalation.py    # three minutes; --quick prints and writes nothing

The log is SWE-bench Verified, 4 models × 500 tasks, USD per run. It has no verifier's verdicts: the verifier is SIMULATED.
Rewrites its section of docs/benchmarks.md, and docs/escalation.svg.
"""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from itertools import permutations, product
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq

from page import PAGE, spread, write_section
from walras.demand.escalation import BreakEven, Escalation, best_fixed, break_even, fit_escalation, simulate
from walras.demand.search import Plan, Verifier, plan_search
from walras.estimate.outcomes import Joint, fit_joint

VALUES, ACCURACIES, COSTS = (1.0, 5.0, 20.0), (1.0, 0.9, 0.75), (0.0, 0.01, 0.05, 0.2)
CHEAP, STRONG = "gpt-5-mini", "sonnet-4-5"
FIGURE = PAGE.with_name("escalation.svg")


# --- the log ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Log:
    names: tuple[str, ...]
    outcomes: np.ndarray
    costs: np.ndarray
    classes: np.ndarray
    n_classes: int

    @classmethod
    def read(cls, path: Path) -> Log:
        rows = pq.read_table(path).to_pylist()
        tasks, names, repos = (sorted({row[c] for row in rows}) for c in ("request_id", "model", "repo"))
        outcomes, costs = np.full((2, len(tasks), len(names)), np.nan)
        classes = np.zeros(len(tasks), dtype=np.int64)
        places = {task: n for n, task in enumerate(tasks)}
        for row in rows:
            at = places[row["request_id"]], names.index(row["model"])
            outcomes[at], costs[at] = row["quality"], row["cost_usd"]
            classes[at[0]] = repos.index(row["repo"])
        return cls(tuple(names), outcomes, costs, classes, len(repos))

    def worth(self, value: float) -> np.ndarray:
        return value * self.outcomes - self.costs

    def cascade(self, order: tuple[int, int], value: float, accuracy: float, check: float) -> np.ndarray:
        """The first model, verified; after a fail the second, whose answer is kept."""
        a, b = order
        on = np.where(self.outcomes[:, a] > 0, 1 - accuracy, accuracy)
        quality = (1 - on) * self.outcomes[:, a] + on * self.outcomes[:, b]
        return value * quality - self.costs[:, a] - check - on * self.costs[:, b]


@dataclass(frozen=True)
class Split:
    train: np.ndarray
    test: np.ndarray
    learned: Escalation

    @classmethod
    def of(cls, log: Log, seed: int) -> Split:
        # The halves that the baselines of other sections are quoted on.
        order = np.random.RandomState(seed).permutation(len(log.classes))
        train, test = np.split(order, [len(order) // 2])
        fitted = fit_escalation(
            log.outcomes[train], log.costs[train], log.names, log.classes[train], log.n_classes
        )
        return cls(train, test, fitted)

    def surplus(self, log: Log, plan: Plan, value: float) -> np.ndarray:
        return simulate(
            plan, log.classes[self.test], log.outcomes[self.test], log.costs[self.test], value
        ).surplus

    def fixed(self, log: Log, value: float) -> np.ndarray:
        use = best_fixed(log.outcomes[self.train], log.costs[self.train], value)
        return log.worth(value)[self.test, use]


def paired(gains: list[np.ndarray], splits: list[Split], n: int) -> tuple[float, float]:
    """Mean gain per held-out task, and its standard error: a task is held out by several splits and counts once."""
    mean = float(np.concatenate(gains).mean())
    total = np.zeros(n)
    for gain, split in zip(gains, splits, strict=True):
        total[split.test] += gain - mean
    return mean, float(np.sqrt((total**2).sum()) / sum(map(len, gains)))


# --- tables -----------------------------------------------------------------------------------------------------------


def held_out_tables(log: Log, splits: list[Split]) -> tuple[list[str], list[str]]:
    """Surplus by V, accuracy and cost; and what a guard on the cross-fitted gain would have done."""
    lines = [
        "| V | accuracy | verifier, USD | search | best fixed | its hindsight | cascade | learned cascade | oracle | search − best fixed |",
        "| ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    quoted = log.names.index(CHEAP), log.names.index(STRONG)
    n = len(log.classes)
    rules: dict[str, list[float]] = {"always": [], "if its cross-fitted gain > 0": [], "if > 1 se": []}
    worst = dict.fromkeys(rules, 0.0)
    below = dict.fromkeys(rules, 0)
    for value, accuracy, check in product(VALUES, ACCURACIES, COSTS):
        verifier = Verifier.accurate(accuracy)
        plans = [split.learned.plan(value, verifier, check) for split in splits]
        got = [split.surplus(log, plan, value) for split, plan in zip(splits, plans, strict=True)]
        fixed = [split.fixed(log, value) for split in splits]
        gains = [g - f for g, f in zip(got, fixed, strict=True)]
        mean, error = paired(gains, splits, n)
        worth = log.worth(value)
        tests = np.concatenate([split.test for split in splits])
        hindsight = np.mean([worth[split.test].mean(axis=0).max() for split in splits])
        cascades = {
            order: log.cascade(order, value, accuracy, check)
            for order in permutations(range(len(log.names)), 2)
        }
        learned = [
            max(cascades.values(), key=lambda of, rows=split.train: of[rows].mean())[split.test]
            for split in splits
        ]
        oracle = np.maximum(worth[tests].max(axis=1), 0.0).mean()
        lines.append(
            f"| {value:g} | {accuracy:g} | {check:g} | {np.mean(got):.3f} | {np.mean(fixed):.3f} | {hindsight:.3f} | "
            f"{cascades[quoted][tests].mean():.3f} | {np.mean(learned):.3f} | {oracle:.3f} | {mean:+.4f} ± {error:.4f} |"
        )
        print(lines[-1], flush=True)
        judged = [split.learned.gain(value, verifier, check) for split in splits]
        for rule, asked in zip(rules, (-np.inf, 0.0, 1.0), strict=True):
            used = [g if j.mean > asked * j.error else 0.0 * g for g, j in zip(gains, judged, strict=True)]
            mean, error = paired(used, splits, n)
            rules[rule].append(mean)
            worst[rule] = min(worst[rule], mean)
            below[rule] += mean < -error
    guard = [
        "| the plan is used | mean gain, USD per task | worst cell, USD per task | cells more than 1 se below |",
        "| :--- | ---: | ---: | ---: |",
        *(
            f"| {rule} | {np.mean(gains):.4f} | {worst[rule]:.4f} | {below[rule]} of {len(gains)} |"
            for rule, gains in rules.items()
        ),
    ]
    return lines, guard


def index_table(log: Log, splits: list[Split], laws: int) -> list[str]:
    """What the index loses to the programme under the joint law, in % of the one-shot surplus plus search's gain."""
    lines = [
        "| problems | models | alike | mean loss | worst loss | index / programme, ms per plan |",
        "| :--- | ---: | ---: | ---: | ---: | ---: |",
    ]

    def line(title: str, models: int, problems: list[Callable[[bool], Plan]]) -> None:
        seconds, surplus = np.zeros((2, len(problems))), np.zeros((2, len(problems)))
        for p, make in enumerate(problems):
            for way, exact in enumerate((False, True)):
                began = time.perf_counter()
                surplus[way, p] = make(exact).surplus.mean()
                seconds[way, p] = time.perf_counter() - began
        loss = np.where(surplus[1] > 0, 1 - surplus[0] / np.where(surplus[1] > 0, surplus[1], 1.0), 0.0)
        ms = np.median(seconds, axis=1) * 1e3
        lines.append(
            f"| {title} | {models} | {(loss < 1e-9).mean():.0%} | {loss.mean():.3%} | {loss.max():.2%} | {ms[0]:.1f} / {ms[1]:.1f} |"
        )
        print(lines[-1], flush=True)

    def of_the_log(split: Split, value: float, accuracy: float, check: float) -> Callable[[bool], Plan]:
        law, part = split.learned.joint, split.learned.whole.costs
        return lambda exact: plan_search(
            law, log.names, value, part, Verifier.accurate(accuracy), check, exact=exact
        )

    cells = list(product(splits, VALUES, ACCURACIES, COSTS))
    line("this log", len(log.names), [of_the_log(*cell) for cell in cells])

    def of_chance(models: int, seed: int) -> Callable[[bool], Plan]:
        rng = np.random.default_rng(seed)
        law = Joint.declared(rng.dirichlet(np.ones(3))[None], rng.random((3, models)))
        costs, verifier = rng.exponential(0.5, (1, models)), Verifier(*rng.uniform(0.6, 1.0, 2))
        names, check = tuple(map(str, range(models))), rng.exponential(0.05)
        return lambda exact: plan_search(law, names, 5.0, costs, verifier, check, exact=exact)

    for models in (2, 3, 4, 5, 6):
        line("random laws, V = 5", models, [of_chance(models, seed) for seed in range(laws)])
    return lines


def break_even_table(found: BreakEven) -> list[str]:
    lines = [
        "| V | accuracy | search buys up to, USD | and gains held out up to, USD |",
        "| ---: | ---: | ---: | ---: |",
    ]
    for (v, value), (a, accuracy) in product(enumerate(found.values), enumerate(found.accuracies)):
        if accuracy in (0.6, 0.7, 0.75, 0.8, 0.9, 0.95, 1.0):
            both = " | ".join(quantiles(column[:, v, a]) for column in (found.priced, found.held_out))
            lines.append(f"| {value:g} | {accuracy:g} | {both} |")
    return lines


def quantiles(values: np.ndarray) -> str:
    low, middle, high = np.quantile(values, [0.1, 0.5, 0.9])
    return f"{middle:.3f} ({low:.3f}–{high:.3f})"


# --- the figure -------------------------------------------------------------------------------------------------------

STYLE = """
  text { font: 13px system-ui, sans-serif; fill: #333 } .grid { stroke: #ddd } .axis { stroke: #888 }
  path { fill: none; stroke-width: 2; stroke-linejoin: round } .held { stroke-dasharray: 5 4 }
  .s0 { stroke: #6b7280 } .s1 { stroke: #c2410c } .s2 { stroke: #1d63c4 } .s3 { stroke: #0d7d56 }
  .b0 { fill: #6b7280 } .b1 { fill: #c2410c } .b2 { fill: #1d63c4 } .b3 { fill: #0d7d56 } .band { opacity: .13; stroke: none }
  @media (prefers-color-scheme: dark) {
    text { fill: #ddd } .grid { stroke: #444 } .axis { stroke: #999 }
    .s0 { stroke: #a3aab5 } .s1 { stroke: #fb8b4d } .s2 { stroke: #6ba6f5 } .s3 { stroke: #3fc294 }
    .b0 { fill: #a3aab5 } .b1 { fill: #fb8b4d } .b2 { fill: #6ba6f5 } .b3 { fill: #3fc294 } .band { opacity: .2 }
  }
"""
WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 680, 400, 62, 70, 46, 52


def figure(found: BreakEven) -> str:
    """The break-even cost as a share of V: one line for each V, with the range over halves."""
    share = 100.0 / np.array(found.values)[:, None]
    low, middle, high = np.quantile(found.priced, [0.1, 0.5, 0.9], axis=0) * share
    held = np.median(found.held_out, axis=0) * share
    top = 2.0 * np.ceil(high.max() / 2)
    x0, x1 = found.accuracies[0], found.accuracies[-1]

    def at(x: float, y: float) -> tuple[float, float]:
        return (
            LEFT + (x - x0) / (x1 - x0) * (WIDTH - LEFT - RIGHT),
            HEIGHT - BOTTOM - y / top * (HEIGHT - TOP - BOTTOM),
        )

    def line(ys: np.ndarray) -> str:
        return " L".join(
            f"{x:.1f},{y:.1f}" for x, y in (at(*p) for p in zip(found.accuracies, ys, strict=True))
        )

    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-labelledby="t">',
        '<title id="t">The dearest verifier worth buying, as a share of a right answer\'s value, against its accuracy'
        "</title>",
        f"<style>{STYLE}</style>",
        f'<text x="{LEFT}" y="20">Dearest verifier worth buying, % of V per verification (simulated verifier)</text>',
        f'<text x="{LEFT}" y="37">solid: bought; shaded: 10–90% of halves; dashed: still gains on the other half</text>',
    ]
    for tick in np.arange(0.0, top + 1, 2.0):
        x, y = at(x0, tick)
        parts.append(
            f'<line class="grid" x1="{x:.1f}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>'
            f'<text x="{x - 8:.1f}" y="{y + 4:.1f}" text-anchor="end">{tick:g}%</text>'
        )
    for tick in np.arange(x0, x1 + 0.01, 0.1):
        x, y = at(tick, 0.0)
        parts.append(f'<text x="{x:.1f}" y="{y + 20:.1f}" text-anchor="middle">{tick:.1f}</text>')
    (x, y), (right, _) = at(x0, 0.0), at(x1, 0.0)
    parts.append(f'<line class="axis" x1="{x:.1f}" x2="{right:.1f}" y1="{y:.1f}" y2="{y:.1f}"/>')
    parts.append(
        f'<text x="{(x + right) / 2:.1f}" y="{HEIGHT - 10}" text-anchor="middle">accuracy of the verifier '
        "(sensitivity = specificity)</text>"
    )
    for v, value in enumerate(found.values):
        back = " L".join(reversed(line(low[v]).split(" L")))
        x, y = at(x1, middle[v, -1])
        parts += [
            f'<path class="band b{v}" d="M{line(high[v])} L{back} Z"/>',
            f'<path class="s{v} held" d="M{line(held[v])}"/>',
            f'<path class="s{v}" d="M{line(middle[v])}"/>',
            f'<text x="{x + 8:.1f}" y="{y + 4:.1f}">V = ${value:g}</text>',
        ]
    return "\n".join([*parts, "</svg>", ""])


# --- the page -----------------------------------------------------------------------------------------------------------


def section(log: Log, seeds: int, laws: int, step: float) -> tuple[str, str]:
    splits = [Split.of(log, seed) for seed in range(seeds)]
    table, guard = held_out_tables(log, splits)
    accuracies = tuple(np.round(np.arange(0.5, 1 + step / 2, step), 3).tolist())
    found = break_even(
        log.outcomes, log.costs, log.names, (1.0, 2.0, 5.0, 20.0), accuracies, splits=2 * seeds
    )
    index = index_table(log, splits, laws)
    law = fit_joint(log.outcomes, np.zeros(len(log.classes), dtype=np.int64), 1)
    whole = plan_search(
        law, log.names, 5.0, log.costs.mean(axis=0, keepdims=True), Verifier.accurate(0.9), 0.05
    )
    types = spread([split.learned.joint.right.shape[0] for split in splits], ".0f")
    written = f"""\
## Escalation

Try a model, verify, escalate or stop: SWE-bench Verified, {len(log.names)} models × {len(log.classes)} tasks, USD per run. The
log has no verifier's verdicts, so **the verifier is simulated**: it errs independently of the task and of the model, which real
ones do not; what it would gain here is an upper estimate. Expectations over its errors are exact. All is learned on one
half (the repository is the only feature) and judged on the other, {seeds} random halves; USD per task.

The joint law needs {types} types of task. On all tasks, V = 5, accuracy 0.9, 0.05 USD per verification, the plan is:

```text
{whole.text(0)}
```

### Search, best fixed model, cascade, oracle

*Best fixed* is chosen on the training half, *its hindsight* on the held-out one. The *cascade* is {CHEAP}, verified, then
{STRONG}, a pair chosen with hindsight; the *learned cascade* is the pair of models that was best on the training half. The
*oracle* knows every outcome. ± is one standard error of the paired difference, each task counted once though several halves hold
it out.

{chr(10).join(table)}

Where verifications are dear and V is 5 the learned cascade is ahead of search by up to 2%: two stages have fewer choices to get wrong
from {len(splits[0].train)} tasks. At V = 1 nothing beats the best fixed model by more than its error.

A guard that uses the plan only where it gained in cross-fitting on the training half, measured in the same runs (paired se):

{chr(10).join(guard)}

Near break-even the guard's figure is luck, and halves that were lucky in training are unlucky held out: it gives up gains at
V = 5 and 20 and does not save what is lost at V = 1. So plans are used as they are, and `Escalation.gain` is only reported.

### Where it stops paying

The dearest verifier that a plan buys, and the dearest with which it still beats the best fixed model on the other half: median
and 10–90% of {2 * seeds} halves.

![Break-even cost of a verifier against its accuracy](escalation.svg)

{chr(10).join(break_even_table(found))}

### The index against the dynamic programme

Loss of expected surplus under the joint law; *alike*: plans worth the same. Up to 6 models plans come from the programme.

{chr(10).join(index)}
"""
    return written, figure(found)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="few halves, nothing written")
    quick = parser.parse_args().quick
    if "WALRAS_DATA" not in os.environ:
        raise SystemExit("WALRAS_DATA is not set: it names the folder of the shared data sets")
    log = Log.read(Path(os.environ["WALRAS_DATA"]) / "routing" / "swebench_verified_mini.parquet")
    written, drawn = section(log, 2, 10, 0.1) if quick else section(log, 10, 200, 0.025)
    if quick:
        print(written)
        return
    FIGURE.write_text(drawn, encoding="utf-8")
    write_section("escalation", written)


if __name__ == "__main__":
    main()
