"""Does setting effort by certainty pay? Attempts at mathematics problems, held out, and the menu over what results. [OP-3]

    WALRAS_DATA=FOLDER python benchmarks/bench_effort.py    # two minutes; --quick prints and writes nothing

The pass rates are measured: one model, 128 attempts a prompt. What an attempt costs was not, and is nominal. The first look is
drawn from the measured counts. Rewrites its section of docs/benchmarks.md.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
from scipy.stats import hypergeom

from page import write_section
from walras.demand.effort import Policies, policies
from walras.demand.menu import Menu, design
from walras.demand.offerings import Offerings
from walras.estimate.estimates import fit_estimates, requests_of
from walras.estimate.type_laws import LogNormal
from walras.records import UNKNOWN, Log

USD = 0.001
LEVELS = np.array([1, 2, 4, 8, 16, 32, 64])
LOOK, ATTEMPTS = 4, 128
VALUES = (0.01, 0.03, 0.1, 0.3, 1.0)
SWEEP = np.unique([float(f"{v:.2g}") for v in np.geomspace(1e-3, 30.0, 120)])
LAW = LogNormal(0.1, 1.0)
SUBSETS = ("uniform", "skew_easy", "skew_difficult")


# --- the outcomes -------------------------------------------------------------------------------------------------------


def counts(path: Path, subset: str) -> np.ndarray:
    """Right answers out of 128 to each prompt of a subset that occurs once, (N,)."""
    table = pq.read_table(path, columns=["prompt_sha", "n_correct", f"in_{subset}"])
    _, code, times = np.unique(table["prompt_sha"].to_numpy(), return_inverse=True, return_counts=True)
    keep = (times[code] == 1) & table[f"in_{subset}"].to_numpy()
    return table["n_correct"].to_numpy()[keep].astype(np.int64)


def passes(correct: np.ndarray, of: int, levels: np.ndarray) -> np.ndarray:
    """Odds that k attempts, drawn without replacement, hold a right one, (N, I): exact for what was measured."""
    table = hypergeom.sf(0, of, np.arange(ATTEMPTS + 1)[:, None].clip(max=of), levels)
    return np.where(levels == 0, 0.0, table)[correct]


@dataclass(frozen=True)
class Way:
    """What each effort gives after a first look, which is paid whatever follows."""

    levels: np.ndarray
    """Attempts after the look."""
    quality: np.ndarray
    certainty: np.ndarray

    @property
    def cost(self) -> np.ndarray:
        """USD of what follows the look, (N, I): the whole budget is spent, as a reasoning budget is."""
        return np.broadcast_to(self.levels * USD, self.quality.shape)

    @classmethod
    def within(cls, correct: np.ndarray, look: np.ndarray) -> Way:
        """The look's attempts count: a right one among them is kept, and no effort is below the look."""
        levels = LEVELS[LEVELS >= LOOK] - LOOK
        rest = passes(correct, ATTEMPTS - LOOK, levels)
        return cls(levels, np.where(look[:, None] > 0, 1.0, rest), look / LOOK)

    @classmethod
    def besides(cls, correct: np.ndarray, look: np.ndarray) -> Way:
        """The look's answers are thrown away: it only tells how hard the prompt is."""
        return cls(LEVELS, passes(correct - look, ATTEMPTS - LOOK, LEVELS), look / LOOK)

    def log(self, rows: np.ndarray) -> Log:
        return Log(
            ids=tuple(map(str, rows)),
            models=tuple(f"{k} more" for k in self.levels),
            per_use={"quality": self.quality[rows], "cost_usd": self.cost[rows]},
            losses=None,
            chosen=np.full(rows.size, UNKNOWN),
            value=None,
            time=None,
            tenant=None,
            task_class=None,
            rows=rows.size * self.levels.size,
            synthetic=False,
            certainty=self.certainty[rows],
        )

    def learned(self, train: np.ndarray, test: np.ndarray, seed: int) -> tuple[np.ndarray, np.ndarray]:
        """q̂ and ĉ on one half from the other, (N, I), by Walras' own estimates."""
        offer = fit_estimates(self.log(train), seed=seed).offer(requests_of(self.log(test)))
        return offer.uses.quality, offer.uses.amounts[:, :, 0]

    def dealt(self, seed: int) -> Way:
        """The placebo: the same certainties, dealt out at random."""
        mixed = np.random.default_rng(seed).permutation(self.certainty)
        return Way(self.levels, self.quality, mixed)


def surplus(value: float, quality: np.ndarray, cost: np.ndarray, use: np.ndarray) -> np.ndarray:
    """V·q − c at each prompt's use, 0 where it is −1, (N,)."""
    got = (value * quality - cost)[np.arange(use.size), np.maximum(use, 0)]
    return np.where(use < 0, 0.0, got)


def best(worth: np.ndarray) -> np.ndarray:
    """argmax, or −1 where nothing is above 0, along the last axis."""
    return np.where(worth.max(axis=-1) > 0, worth.argmax(axis=-1), -1)


# --- one split ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Split:
    """What is learned on one random half, and judged on the other."""

    train: np.ndarray
    test: np.ndarray
    fixed: np.ndarray
    """pass@k of every prompt without a look, (N, I)."""
    stopped: np.ndarray
    """USD where attempts stop at the first right answer, (N, I)."""
    ways: dict[str, Way]
    believed: dict[str, tuple[np.ndarray, np.ndarray]]

    @classmethod
    def of(cls, correct: np.ndarray, seed: int) -> Split:
        rng = np.random.default_rng(seed)
        train, test = np.array_split(rng.permutation(correct.size), 2)
        look = rng.hypergeometric(correct, ATTEMPTS - correct, LOOK)
        ways = {"within": Way.within(correct, look), "besides": Way.besides(correct, look)}
        ways["placebo"] = ways["besides"].dealt(seed)
        # The j-th attempt is made where the j before it were all wrong.
        made = np.cumsum(1 - passes(correct, ATTEMPTS, np.arange(LEVELS[-1])), axis=1)
        return cls(
            train,
            test,
            passes(correct, ATTEMPTS, LEVELS),
            USD * made[:, LEVELS - 1],
            ways,
            {name: way.learned(train, test, seed) for name, way in ways.items()},
        )

    def one_for_all(self, value: float, cost: np.ndarray) -> np.ndarray:
        """Surplus of the effort that was best for all on the first half, (test,)."""
        use = best((value * self.fixed - cost)[self.train].mean(axis=0))
        return surplus(value, self.fixed[self.test], cost[self.test], np.full(self.test.size, use))

    def by_certainty(self, name: str, value: float) -> np.ndarray:
        way, (quality_hat, cost_hat) = self.ways[name], self.believed[name]
        use = best(value * quality_hat - cost_hat)
        return surplus(value, way.quality[self.test], way.cost[self.test], use) - LOOK * USD

    def oracle(self, value: float) -> np.ndarray:
        """Knows each prompt's pass rate, and needs no look."""
        worth = (value * self.fixed - LEVELS * USD)[self.test]
        return np.maximum(worth.max(axis=1), 0.0)

    def swept(self, name: str) -> Policies:
        way = self.ways[name]
        return policies(*self.believed[name], way.quality[self.test], way.cost[self.test], SWEEP)

    def frontier(self, name: str = "") -> Offerings:
        """Efforts for all, and with a `name` the policies that set them by certainty as well."""
        names, quality = [f"{k} for all" for k in LEVELS], self.fixed[self.test].mean(axis=0)
        if name == "stopped":
            return Offerings(tuple(names), quality, self.stopped[self.test].mean(axis=0))
        cost = LEVELS * USD
        if name:
            found = self.swept(name).offerings
            names += found.names
            quality, cost = (
                np.append(quality, found.quality),
                np.append(cost, found.cost + LOOK * USD),
            )
        return Offerings(tuple(names), quality, cost)


# --- tables -------------------------------------------------------------------------------------------------------------


def halves(figures: Sequence[float]) -> str:
    """The mean, and the range over the halves."""
    return f"{np.mean(figures):+.2f} ({min(figures):+.2f} to {max(figures):+.2f})"


def surplus_lines(subset: str, splits: list[Split]) -> list[str]:
    """Thousandths of a USD per task, by V."""
    lines = []
    for value in VALUES:
        plain = [
            s.one_for_all(value, np.broadcast_to(LEVELS * USD, s.fixed.shape)).mean() * 1e3 for s in splits
        ]
        gains = {
            name: [s.by_certainty(name, value).mean() * 1e3 - p for s, p in zip(splits, plain, strict=True)]
            for name in ("within", "besides", "placebo")
        }
        oracle = np.mean([s.oracle(value).mean() for s in splits]) * 1e3
        stopped = np.mean([s.one_for_all(value, s.stopped).mean() for s in splits]) * 1e3
        cells = " | ".join(halves(gain) for gain in gains.values())
        lines.append(
            f"| {subset} | {value:g} | {np.mean(plain):.2f} | {cells} | {oracle - np.mean(plain):+.2f} | {stopped - np.mean(plain):+.2f} |"
        )
        print(lines[-1], flush=True)
    return lines


FRONTIERS = {
    "": "one effort for all",
    "within": "by certainty, look within the budget",
    "besides": "by certainty, look paid besides",
    "placebo": "the same, certainty dealt at random",
    "stopped": "one cap for all, stopped when right",
}


def menu_lines(splits: list[Split]) -> tuple[list[str], dict[str, Menu]]:
    """What four tiers are worth over each frontier, thousandths of a USD per request; and the menus of the first half."""
    lines, shown = [], {}
    for objective in ("revenue", "welfare"):
        base: dict[str, list[float]] = {}
        for name, title in FRONTIERS.items():
            menus = [design(LAW, s.frontier(name), objective=objective, tiers=4) for s in splits]  # type: ignore[arg-type]
            if objective == "revenue":
                shown[name] = menus[0]
            cells = []
            for figure in ("welfare", "profit", "information_rent"):
                got = [getattr(m.certificate, figure) * 1e3 for m in menus]
                before = base.setdefault(figure, got)
                gain = "" if not name else f" {halves([g - b for g, b in zip(got, before, strict=True)])}"
                cells.append(f"{np.mean(got):.2f}{gain}")
            lines.append(
                f"| {'profit' if objective == 'revenue' else objective} | {title} | {' | '.join(cells)} |"
            )
            print(lines[-1], flush=True)
    return lines, shown


def tier_lines(menus: dict[str, Menu]) -> list[str]:
    return [
        f"| {FRONTIERS[name]} | {tier.name} | {tier.quality:.3f} | {tier.price * 1e3:.2f} | {tier.cost * 1e3:.2f} | "
        f"{tier.type_from:.3f} | {tier.share:.0%} |"
        for name in ("", "within", "besides")
        for tier in menus[name].tiers
    ]


# --- the page -----------------------------------------------------------------------------------------------------------


def section(path: Path, seeds: int, subsets: Sequence[str]) -> str:
    lines: list[str] = []
    sizes, splits = [], []
    for subset in reversed(subsets):
        correct = counts(path, subset)
        splits = [Split.of(correct, seed) for seed in range(seeds)]
        sizes.append(f"{correct.size:,} {subset}")
        lines = surplus_lines(subset, splits) + lines
    menus, shown = menu_lines(splits)
    return f"""\
## Effort

Effort is a number of attempts, {", ".join(map(str, LEVELS))}, with a checker that knows a right answer: quality is the exact odds that a right one is
among them, from {ATTEMPTS} measured attempts of one 7B model at each prompt of subsets of DeepScaleR ({", ".join(reversed(sizes))}; prompts that occur
twice are dropped). **Tokens were not recorded: {USD:g} USD per attempt is nominal**, so only V over that price means anything. The whole
budget is spent, as a reasoning budget is, unless said otherwise.

Certainty is the share right among {LOOK} first attempts, **drawn from the measured counts** (SIMULATED look at real outcomes), and only its {LOOK + 1}
values are known; `certainty` in a log of Walras' own records, `fit_estimates` on one half, judged on the other, {seeds} random halves.
*Within*: the {LOOK} attempts are the first of the budget, and a right one is kept, so the checker's verdict itself stops the effort. *Besides*: they
are paid on top ({LOOK * USD:g} USD), and thrown away. *Placebo*: besides, with the certainties dealt out at random.

### One effort for all, or by certainty

Surplus per task, thousandths of a USD, and gains over the best effort for all, which the first half chose: means, and the range over the
halves. The *oracle* knows each prompt's pass rate, but not, as *within* does, how the first attempts ended. *Stopped* has one cap for all,
and stops at the first right answer: those still at work then all look alike, so certainty could add nothing to it.

| subset | V, USD | one for all | within | besides | placebo | oracle | stopped |
| :--- | ---: | ---: | ---: | ---: | ---: | ---: | ---: |
{chr(10).join(lines)}

### The menu over it

Four tiers, designed on the held-out half's means ({subsets[0]}) for types {LAW.spec}; certainty only adds policies to the efforts for all, so
it cannot lose but by noise, which the placebo measures. Thousandths of a USD per request, and the gain over the first line.

| designed for | tiers made of | welfare | profit | information rent |
| :--- | :--- | ---: | ---: | ---: |
{chr(10).join(menus)}

The menus of the first half, designed for profit; `routed at x` routes as if quality were worth x USD, which is no price to anyone.
Thousandths of a USD.

| tiers made of | tier | quality | price | cost | types from, USD | share |
| :--- | :--- | ---: | ---: | ---: | ---: | ---: |
{chr(10).join(tier_lines(shown))}
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="two halves of one subset, nothing written")
    quick = parser.parse_args().quick
    if "WALRAS_DATA" not in os.environ:
        raise SystemExit("WALRAS_DATA is not set: it names the folder of the shared data sets")
    path = Path(os.environ["WALRAS_DATA"]) / "capital" / "deepscaler_pass_rates.parquet"
    written = section(path, 2, SUBSETS[:1]) if quick else section(path, 10, SUBSETS)
    if quick:
        print(written)
        return
    write_section("effort", written)


if __name__ == "__main__":
    main()
