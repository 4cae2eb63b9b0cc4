"""Does a router learned from a log beat what needs no learning? RouterBench and RouteLLM's pair, held out.

    WALRAS_DATA=FOLDER python benchmarks/bench_routing.py    # five minutes; --quick prints and writes nothing

WALRAS_PEER_PYTHON names the interpreter of an environment with `litellm` and `scikit-learn`, so that the peers run on the
same halves; without it their columns say "not run". One core. Rewrites its section of docs/benchmarks.md.
"""

from __future__ import annotations

import os

os.environ.update(
    OMP_NUM_THREADS="1", OPENBLAS_NUM_THREADS="1", MKL_NUM_THREADS="1", NUMBA_NUM_THREADS="1"
)  # before numpy is loaded: times are of one core

import argparse
import json
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq

from page import write_section
from walras.diagnosis.evaluate import (
    Evaluation,
    Halves,
    Spread,
    _split,  # the peers are judged on the very halves that `walras evaluate` takes
    evaluate_log,
)
from walras.estimate.estimates import fit_estimates, requests_of
from walras.estimate.near import families
from walras.estimate.quality import QualityModel, Requests, fit_quality, one_request
from walras.estimate.text import read_texts
from walras.quantities import Labels
from walras.records import Log, read_log
from walras.settings import load_economy

VALUES = (0.003, 0.01, 0.03, 0.1)
LEVELS = (0.8, 0.9, 0.95)
BINS = 10
PREDICT_BAR_US, FIT_BAR_S = 200, 60
STRONG, WEAK = "gpt-4-1106-preview", "mistralai/Mixtral-8x7B-Instruct-v0.1"
GOLD = 1_500
"""Outcomes of MMLU questions in RouteLLM's training data, about."""


def percent(spread: Spread) -> str:
    return f"{100 * spread.mean:.1f} ± {100 * spread.sd:.1f}"


# --- RouterBench: the peers -------------------------------------------------------------------------------------------

PEER = """
import json, os, sys
os.environ["LITELLM_LOCAL_MODEL_COST_MAP"] = "True"  # nothing is looked up on the network
from importlib.metadata import version
from pathlib import Path
import numpy as np
from litellm.router_strategy.complexity_router.complexity_router import ComplexityRouter
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression

folder = Path(sys.argv[1])
prompts = json.loads((folder / "prompts.json").read_text())
given = np.load(folder / "given.npz")
quality, train = given["quality"], given["train"]
router = ComplexityRouter("any", None)
tiers = [str(router.classify(prompt)[0]) for prompt in prompts]
right = np.full((*train.shape, quality.shape[1]), np.nan)
for s, rows in enumerate(train):
    words = TfidfVectorizer(sublinear_tf=True, min_df=2, ngram_range=(1, 2))
    seen = words.fit_transform([prompts[n] for n in np.flatnonzero(rows)])
    new = words.transform([prompts[n] for n in np.flatnonzero(~rows)])
    for m, column in enumerate(quality[rows].T):
        right[s, ~rows, m] = LogisticRegression(solver="liblinear").fit(seen, column).predict_proba(new)[:, 1]
np.savez(folder / "found.npz", tiers=tiers, right=right,
         versions=[f"{name} {version(name)}" for name in ("litellm", "scikit-learn")])
"""


@dataclass(frozen=True)
class Peers:
    """What the peers say of every request, before any price."""

    tiers: np.ndarray
    """LiteLLM's tier, as a code, (N,)."""
    right: np.ndarray
    """TF-IDF + logistic regression: probability that each model is right, by split, (S, N, M)."""
    versions: str

    @classmethod
    def run(cls, log: Log, trains: list[np.ndarray]) -> Peers | None:
        """In a process of its own, with the interpreter that WALRAS_PEER_PYTHON names."""
        python = os.environ.get("WALRAS_PEER_PYTHON")
        if not python:
            return None
        train = np.zeros((len(trains), len(log)), dtype=np.bool_)
        for mask, rows in zip(train, trains, strict=True):
            mask[rows] = True
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            (folder / "prompts.json").write_text(json.dumps(log.prompts), encoding="utf-8")
            np.savez(folder / "given.npz", quality=log.per_use["quality"], train=train)
            subprocess.run([python, "-c", PEER, name], check=True)
            found = np.load(folder / "found.npz")
            _, tiers = np.unique(found["tiers"], return_inverse=True)
            return cls(tiers, found["right"], ", ".join(found["versions"].tolist()))


@dataclass(frozen=True)
class Bench:
    """The complete requests of RouterBench, and the halves."""

    log: Log
    splits: list[tuple[np.ndarray, np.ndarray]]
    """Random halves, then halves that no near-duplicates straddle: (train, test)."""
    twins: dict[str, float]
    """Share of each class's requests that have a near-duplicate."""

    @classmethod
    def read(cls, path: Path, seeds: int) -> Bench:
        log = read_log([path], also=("prompt",))
        known = ~np.isnan(log.per_use["quality"] + log.per_use["cost_usd"]).any(axis=1)
        log = log.take(np.flatnonzero(known), np.arange(len(log.models)))
        family = families(requests_of(log).texts)
        apart = np.bincount(family)[family] > 1
        assert log.task_class is not None
        twins = {name: float(apart[log.task_class.equal(name)].mean()) for name in log.task_class.names}
        ways = (np.arange(len(log)), family)
        return cls(log, [_split(of, seed) for of in ways for seed in range(seeds)], twins)

    def closed(self, value: float, halves: Halves, first: int, choose: Callable[..., np.ndarray]) -> Spread:
        """Gap closed by a peer on the halves from `first` on; `choose(s, worth, train, test)` gives models, (M,)."""
        worth = value * self.log.per_use["quality"] - self.log.per_use["cost_usd"]
        shares = []
        for s, best in enumerate(halves.best_fixed.by_seed, first):
            train, test = self.splits[s]
            true = worth[test]
            fixed, oracle = true.mean(axis=0).max(), true.max(axis=1).mean()
            np.testing.assert_allclose(fixed, best)  # the same halves, and the same money
            got = true[np.arange(test.size), choose(s, worth, train, test)].mean()
            shares.append((got - fixed) / (oracle - fixed))
        return Spread(np.array(shares))

    def by_tier(self, peers: Peers) -> Callable[..., np.ndarray]:
        """Each tier gets the model that was best for it on the training half."""

        def choose(_: int, worth: np.ndarray, train: np.ndarray, test: np.ndarray) -> np.ndarray:
            return group_means(worth, peers.tiers, train)[peers.tiers[test]].argmax(axis=1)

        return choose

    def by_logistic(self, peers: Peers, value: float) -> Callable[..., np.ndarray]:
        """The best model by predicted quality, less its class's mean cost on the training half."""
        assert self.log.task_class is not None
        classes, cost = self.log.task_class.codes, self.log.per_use["cost_usd"]

        def choose(s: int, _: np.ndarray, train: np.ndarray, test: np.ndarray) -> np.ndarray:
            spent = group_means(cost, classes, train)[classes[test]]
            return (value * peers.right[s, test] - spent).argmax(axis=1)

        return choose


def group_means(columns: np.ndarray, group: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """Means of `columns` (N, M) over `rows` by group, (G, M); the overall mean where a group has no row."""
    means = np.tile(columns[rows].mean(axis=0), (int(group.max()) + 1, 1))
    for g in np.unique(group[rows]):
        means[g] = columns[rows[group[rows] == g]].mean(axis=0)
    return means


# --- RouterBench: tables ----------------------------------------------------------------------------------------------


def difference(found: list[Halves]) -> tuple[Spread, float, float]:
    """Gap closed by the policy less the category mean, averaged over V; its standard error, naive and corrected.

    Splits share requests, so that sd/√S is too small; Nadeau & Bengio (2003) add n_test/n_train = 1 to 1/S.
    """
    each = [h.closed(h.policy).by_seed - h.closed(h.category_mean).by_seed for h in found]
    mean = Spread(np.mean(each, axis=0))
    return mean, mean.sd / np.sqrt(mean.by_seed.size), mean.sd * np.sqrt(1 + 1 / mean.by_seed.size)


def gap_table(bench: Bench, peers: Peers | None, found: dict[float, Halves], first: int) -> list[str]:
    """One line a value of V; the peers on the halves from `first` on."""
    lines = [
        "| V, USD | best fixed, USD | oracle, USD | category mean | LiteLLM, tiers fitted | TF-IDF + logistic | "
        "**Walras** | Walras − category mean | s.e. | corrected | knows half of the models |",
        "| ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for value, halves in found.items():
        others = ["not run"] * 2
        if peers is not None:
            ways = bench.by_tier(peers), bench.by_logistic(peers, value)
            others = [percent(bench.closed(value, halves, first, way)) for way in ways]
        gain, naive, corrected = difference([halves])
        lines.append(
            f"| {value:g} | {halves.best_fixed.mean:.5f} | {halves.oracle.mean:.5f} | "
            f"{percent(halves.closed(halves.category_mean))} | {others[0]} | {others[1]} | "
            f"**{percent(halves.closed(halves.policy))}** | {100 * gain.mean:+.1f} ± {100 * gain.sd:.1f} | "
            f"{100 * naive:.1f} | {100 * corrected:.1f} | {percent(halves.ceiling)} |"
        )
        print(lines[-1], flush=True)
    gain, naive, corrected = difference(list(found.values()))
    lines.append(
        f"| average | | | | | | | **{100 * gain.mean:+.1f} ± {100 * gain.sd:.1f}** | {100 * naive:.1f} | "
        f"{100 * corrected:.1f} | |"
    )
    print(lines[-1], flush=True)
    return lines


def routerbench(bench: Bench, seeds: int) -> tuple[list[str], Evaluation]:
    """The section's first part, and an evaluation: calibration is the same for every V."""
    began = time.perf_counter()
    peers = Peers.run(bench.log, [train for train, _ in bench.splits])
    print(f"peers: {time.perf_counter() - began:.0f} s", flush=True)
    found = {
        value: evaluate_log(bench.log, load_economy(None, {"value": value}), seeds=seeds) for value in VALUES
    }
    print(f"evaluations: {time.perf_counter() - began:.0f} s", flush=True)
    together = {value: e.halves for value, e in found.items() if e.halves is not None}
    apart = {value: e.apart for value, e in found.items() if e.apart is not None}
    tables = gap_table(bench, peers, together, 0), gap_table(bench, peers, apart, seeds)
    gains = [difference(list(of.values()))[0].mean for of in (together, apart)]
    last = found[VALUES[-1]]
    where = ", ".join(f"{share:.0%} of {name}" for name, share in bench.twins.items())
    tried = f"Peers: {peers.versions}." if peers else "The peers were not run here."
    return [
        f"RouterBench subset: {last.tasks:,} requests with all outcomes × {len(last.models)} models, "
        f"{last.classes} classes. All is learned on one half and judged on the other, {seeds} random halves. *Gap closed*, in %: "
        "(policy − best fixed)/(oracle − best fixed), mean ± sd over the halves; *best fixed* is the model that turns out best on "
        "the held-out half, and the *oracle* knows every outcome, luck included. The *category mean* gives each request "
        "the model that was best on average for its benchmark. *LiteLLM, tiers fitted* is its ComplexityRouter: each tier "
        "gets the model that was best for it on the training half. *TF-IDF + logistic* is one regression a model on words "
        "and pairs of words, priced like ours, with the mean cost of the class. The standard error of the paired difference is sd/√"
        f"{seeds}, and *corrected* for halves that share requests (Nadeau & Bengio 2003). {tried}",
        "",
        "The last column estimates how much of the gap is not luck. The models are divided at random in two; a policy that "
        "chooses within one part knows how the other part did *on that very request* (a ridge within each benchmark), and its gap closed "
        "within that part is shown, both ways averaged. No router has that knowledge before answering. It is an "
        "estimate from below of what the request itself decides, not a bound, and of a market of half as many models.",
        "",
        *tables[0],
        "",
        "### The same, with near-duplicates kept in one half",
        "",
        f"{last.near_duplicates:.0%} of the requests have a near-duplicate in the log ({where}): Winogrande's sentences "
        "come in twins that differ in a word. Walras remembers what happened to a twin, and **that is where most of the gain comes "
        f"from: {100 * gains[0]:+.1f} points over the category mean with twins on both sides, {100 * gains[1]:+.1f} without.** On "
        "prompts that are really new the text adds about nothing here, and is made to cost about nothing. Whether traffic "
        "repeats itself is a property of the traffic; `walras evaluate` prints both figures.",
        "",
        *tables[1],
    ], last


# --- RouteLLM's pair --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Pair:
    """Requests answered by a strong and a weak model."""

    requests: Requests
    quality: np.ndarray
    """Strong, weak, (N, 2)."""
    benchmark: Labels

    @classmethod
    def read(cls, path: Path) -> Pair:
        columns = ["request_id", "benchmark", "task", "prompt", "model", "quality"]
        rows = pq.read_table(path, columns=columns).to_pylist()
        strong, weak = ({r["request_id"]: r for r in rows if r["model"] == m} for m in (STRONG, WEAK))
        quality = np.array([[strong[i]["quality"], weak[i]["quality"]] for i in strong])

        def labels(column: str) -> Labels:
            names = sorted({r[column] for r in strong.values()})
            return Labels(np.array([names.index(r[column]) for r in strong.values()]), tuple(names))

        texts = read_texts([r["prompt"] for r in strong.values()])
        return cls(Requests(texts, labels("task")), quality, labels("benchmark"))

    def nameless(self) -> Requests:
        """The requests, without their class."""
        return Requests(self.requests.texts, Labels.none(len(self.requests)))

    def rows(self, benchmark: str) -> np.ndarray:
        return np.flatnonzero(self.benchmark.equal(benchmark))


SHARES = ("APGR", "CPT(50%)", "CPT(80%)", "95% of strong")


def measures(score: np.ndarray, quality: np.ndarray) -> np.ndarray:
    """APGR; the share of calls to the strong model for 50% and 80% of the gap, and for 95% of its quality, (4,).

    Calls go to the strong model by falling `score`; equal ones in a random order, of which this is the expectation.
    """
    gain = quality[:, 0] - quality[:, 1]
    _, rank, count = np.unique(-score, return_inverse=True, return_counts=True)
    expected = np.bincount(rank, weights=gain) / count
    recovered = np.concatenate(([0.0], np.cumsum(np.repeat(expected, count)))) / gain.sum()
    share = np.linspace(0.0, 1.0, recovered.size)
    high, low = quality.mean(axis=0)
    levels = (0.5, 0.8, (0.95 * high - low) / (high - low))
    return np.array([np.trapezoid(recovered, share), *(reached(share, recovered, at) for at in levels)])


def reached(share: np.ndarray, recovered: np.ndarray, level: float) -> float:
    """The least share at which `level` of the gap is recovered, between two calls in proportion."""
    at = int((recovered >= level).argmax())
    if at == 0:
        return 0.0
    low, high = recovered[at - 1 : at + 1]
    return float(share[at] - (high - level) / (high - low) * (share[at] - share[at - 1]))


PUBLISHED = {
    "mmlu": [
        "| RouteLLM's best, Arena only: matrix factorisation | 0.524 | 45.0% | 76.9% | |",
        "| RouteLLM's best, + 1,500 MMLU outcomes: SW ranking | 0.603 | 35.4% | 71.6% | |",
    ],
    "gsm8k": [
        "| RouteLLM's best, Arena only: SW ranking | 0.475 | 54.4% | 82.1% | |",
        "| RouteLLM's best, + GPT-4 as a judge: causal LLM | 0.622 | 33.6% | 63.3% | |",
    ],
    "mt_bench": [
        "| RouteLLM's best, Arena only: SW ranking | 0.610 | 37.9% | 59.0% | |",
        "| RouteLLM's best, + GPT-4 as a judge: matrix factorisation | 0.802 | 13.4% | 31.3% | |",
    ],
}
"""Tables 1–3 of Ong et al. (2024), arXiv 2406.18665: the router with the best APGR of each kind of training data."""


def pair_halves(
    pair: Pair, benchmark: str, seeds: int, size: int | None = None
) -> Iterator[tuple[np.ndarray, ...]]:
    """Rows to learn from and to judge on: random halves, or `size` rows and the rest."""
    rows = pair.rows(benchmark)
    for seed in range(seeds):
        order = np.random.default_rng(seed).permutation(rows)
        train, test = np.split(order, [size or rows.size // 2])
        yield train, test


def pair_table(pair: Pair, benchmark: str, seeds: int, tally: list[np.ndarray]) -> list[str]:
    """Random halves of one benchmark; what was said of the held-out ones is added to `tally`."""
    found: dict[str, list[np.ndarray]] = {
        "random": [],
        "class mean": [],
        "**Walras**": [],
        "Walras, class not told": [],
    }
    for train, test in pair_halves(pair, benchmark, seeds):
        true = pair.quality[test]
        found["random"].append(measures(np.zeros(test.size), true))
        for name, requests in (("**Walras**", pair.requests), ("Walras, class not told", pair.nameless())):
            part, model = requests.take(test), learned(requests, pair.quality, train)
            found[name].append(measures(score(model, part), true))
            if requests is pair.requests:
                means = model.means.mean[model.class_codes(part.task_class)]
                found["class mean"].append(measures(means[:, 0] - means[:, 1], true))
                tally.append(calibration(model, part, true))
    if benchmark == "mmlu":
        name = f"Walras, {GOLD:,} outcomes only"
        found[name] = [
            measures(
                score(learned(pair.requests, pair.quality, train), pair.requests.take(test)),
                pair.quality[test],
            )
            for train, test in pair_halves(pair, benchmark, seeds, GOLD)
        ]
    high, low = pair.quality[pair.rows(benchmark)].mean(axis=0)
    title = f"{benchmark}: {pair.rows(benchmark).size:,} requests, strong {high:.3f}, weak {low:.3f}"
    lines = [f"| {title} | {' | '.join(SHARES)} |", "| :--- | ---: | ---: | ---: | ---: |"]
    for name, rows in found.items():
        mean, sd = np.mean(rows, axis=0), np.std(rows, axis=0, ddof=1) if len(rows) > 1 else np.zeros(4)
        cells = [f"{mean[0]:.3f} ± {sd[0]:.3f}"]
        cells += [f"{100 * m:.1f}% ± {100 * s:.1f}" for m, s in zip(mean[1:], sd[1:], strict=True)]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    lines += PUBLISHED[benchmark]
    print("\n".join(lines), flush=True)
    return [*lines, ""]


def learned(requests: Requests, quality: np.ndarray, train: np.ndarray) -> QualityModel:
    return fit_quality(requests.take(train), (STRONG, WEAK), quality[train])


def score(model: QualityModel, requests: Requests) -> np.ndarray:
    """How much better the strong model is expected to be, (N,)."""
    mean = model.predict(requests).mean
    return mean[:, 0] - mean[:, 1]


def transfer_table(pair: Pair, draws: int) -> list[str]:
    """Learn on all of one benchmark, judge on all of another; errors by the bootstrap over requests."""
    lines = [
        f"| learned on | judged on | {' | '.join(SHARES)} |",
        "| :--- | :--- | ---: | ---: | ---: | ---: |",
    ]
    told, plain = pair.requests, pair.nameless()
    for source, target in (("mmlu", "gsm8k"), ("gsm8k", "mmlu")):
        for name, requests in ((f"{source}, class told", told), (f"{source}, class not told", plain)):
            rows = pair.rows(target)
            said, true = (
                score(learned(requests, pair.quality, pair.rows(source)), requests.take(rows)),
                pair.quality[rows],
            )
            rng = np.random.default_rng(0)
            again = [
                measures(said[d], true[d])
                for d in (rng.integers(rows.size, size=rows.size) for _ in range(draws))
            ]
            mean, sd = measures(said, true), np.std(again, axis=0)
            cells = [f"{mean[0]:.3f} ± {sd[0]:.3f}"]
            cells += [f"{100 * m:.1f}% ± {100 * s:.1f}" for m, s in zip(mean[1:], sd[1:], strict=True)]
            lines.append(f"| {name} | {target} | {' | '.join(cells)} |")
            print(lines[-1], flush=True)
    return lines


def routellm(pair: Pair, seeds: int, draws: int) -> tuple[list[str], np.ndarray]:
    tally: list[np.ndarray] = []
    tables = [
        line for name in PUBLISHED for line in pair_table(pair, name, seeds, tally if name == "mmlu" else [])
    ]
    return [
        f"GPT-4 (1106-preview) and Mixtral 8x7B, {len(pair.requests):,} requests of RouteLLM's evaluation. Requests go to the strong "
        f"model by falling q̂ₛ − q̂ᵥ, learned on one half of the benchmark and judged on the other, {seeds} random halves, ± sd. "
        "*APGR* is the mean share of the quality gap recovered over all shares of strong calls; *CPT(x)* the share of strong calls "
        "that recovers x of the gap; the last column the share that reaches 95% of the strong model's quality. "
        "RouteLLM's figures are published ones (Ong et al. 2024, arXiv 2406.18665, tables 1–3). **They are not of the same "
        "contest:** its routers learned from Chatbot Arena preferences, with a few MMLU outcomes or a judge's labels added, and are "
        "judged on whole benchmarks less contaminated prompts; ours learned from outcomes of the same benchmark, which is "
        "what a log has.",
        "",
        *tables,
        "Learned on one benchmark, judged on another; ± is a bootstrap error over requests. Classes do not carry over: a request "
        "of a class that was never seen gets the overall mean and the text model of all classes together. What carries over is "
        "the text:",
        "",
        *transfer_table(pair, draws),
    ], np.array(tally)


# --- calibration and speed --------------------------------------------------------------------------------------------


def calibration(model: QualityModel, requests: Requests, outcome: np.ndarray) -> np.ndarray:
    """Expected calibration error, and coverage at `LEVELS`, (4,)."""
    found, lot = model.predict(requests), np.random.default_rng(0).random(len(requests))
    bins = np.minimum((found.mean.ravel() * BINS).astype(np.int64), BINS - 1)
    off = np.bincount(bins, weights=(found.mean - outcome).ravel(), minlength=BINS)
    inside = []
    for level in LEVELS:
        low, high = model.interval(found, level, lot)
        inside.append(((outcome >= low) & (outcome <= high)).mean())
    return np.array([np.abs(off).sum() / outcome.size, *inside])


def calibration_table(last: Evaluation, tally: np.ndarray) -> list[str]:
    lines = [
        f"| | ECE | {' | '.join(f'coverage at {level:.0%}' for level in LEVELS)} |",
        "| :--- | ---: | ---: | ---: | ---: |",
    ]
    own = [last.calibration.error, *(last.calibration.coverage[level] for level in LEVELS)]
    for name, spreads in (("RouterBench", own), ("RouteLLM's pair, MMLU", [Spread(c) for c in tally.T])):
        cells = [f"{spreads[0].mean:.4f} ± {spreads[0].sd:.4f}"]
        cells += [f"{100 * s.mean:.2f}% ± {100 * s.sd:.2f}" for s in spreads[1:]]
        lines.append(f"| {name} | {' | '.join(cells)} |")
        print(lines[-1], flush=True)
    return lines


def timed(work: Callable[[], object]) -> float:
    """Seconds."""
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def microseconds(predict: Callable[[Requests], object], prompts: list[tuple[str, str]]) -> float:
    """Median of single requests, reading the prompt included."""
    spent = np.empty(len(prompts))
    for n, (prompt, task_class) in enumerate(prompts):
        began = time.perf_counter()
        predict(one_request(prompt, task_class))
        spent[n] = 1e6 * (time.perf_counter() - began)
    return float(np.median(spent))


def speed_table(bench_file: Path, pair_file: Path, rounds: int) -> list[str]:
    log, pair = read_log([bench_file], also=("prompt",)), Pair.read(pair_file)
    fit_estimates(log.take(np.arange(500), np.arange(len(log.models))))  # compiled now
    everyone = np.arange(len(pair.requests))
    rows = {
        "RouterBench": (
            len(log.models) * len(log),
            timed(lambda: read_log([bench_file], also=("prompt",))),
            timed(lambda: fit_estimates(log)),
        ),
        "RouteLLM's pair": (
            2 * len(pair.requests),
            timed(lambda: Pair.read(pair_file)),
            timed(lambda: learned(pair.requests, pair.quality, everyone)),
        ),
    }
    lines = ["| | measured | bar | |", "| :--- | ---: | ---: | :--- |"]
    for name, (n, reading, fitting) in rows.items():
        lines.append(
            f"| reading and learning from {name}, {n:,} rows | {reading:.2f} + {fitting:.1f} s | {FIT_BAR_S} s | "
            f"{met(reading + fitting, FIT_BAR_S)} |"
        )
    estimates = fit_estimates(log)
    usual, *very_long = one_prompts(log, 200).items()
    kinds = [("q̂ of 11 models", estimates.quality.predict, kind) for kind in (usual, *very_long)]
    kinds.append(("q̂, money and their errors", estimates.offer, usual))
    medians = [[microseconds(predict, prompts) for _, predict, (_, prompts) in kinds] for _ in range(rounds)]
    for (what, _, (title, _)), each in zip(kinds, np.transpose(medians), strict=True):
        lines.append(
            f"| {what} for one request, {title} | {each.min():.0f} µs ({each.max():.0f}) | {PREDICT_BAR_US} µs | "
            f"{met(each.min(), PREDICT_BAR_US)} |"
        )
    print("\n".join(lines), flush=True)
    return lines


def met(measured: float, bar: float) -> str:
    return "met" if measured <= bar else "**missed**"


def one_prompts(log: Log, repeats: int) -> dict[str, list[tuple[str, str]]]:
    """Logged prompts, and very long ones, each with its class."""
    assert log.prompts is not None
    assert log.task_class is not None
    rows = np.random.default_rng(0).integers(len(log), size=repeats)
    classes = [log.task_class.names[log.task_class.codes[n]] for n in rows]
    typical = [log.prompts[n] or "" for n in rows]
    long = [(p * (200_000 // max(len(p), 1) + 1))[:200_000] for p in typical]
    kinds = {
        f"a logged prompt (median {np.median([len(p) for p in typical]):.0f} characters)": typical,
        "200,000 characters of ASCII": long,
        "200,000 characters, not all ASCII": ["é" + p[1:] for p in long],
    }
    return {title: list(zip(prompts, classes, strict=True)) for title, prompts in kinds.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="two halves, nothing written")
    quick = parser.parse_args().quick
    if "WALRAS_DATA" not in os.environ:
        raise SystemExit("WALRAS_DATA is not set: it names the folder of the shared data sets")
    folder = Path(os.environ["WALRAS_DATA"]) / "routing"
    files = folder / "routerbench_subset.parquet", folder / "routellm_evals.parquet"
    seeds = 2 if quick else 10
    speed = speed_table(*files, 2 if quick else 20)
    first, last = routerbench(Bench.read(files[0], seeds), seeds)
    second, tally = routellm(Pair.read(files[1]), seeds, 20 if quick else 200)
    text = "\n".join(
        [
            "## Routing that learns from logs",
            "",
            *first,
            "",
            "### RouteLLM's pair",
            "",
            *second,
            "",
            "### Calibration",
            "",
            f"*ECE*: mean |q̂ − outcome| of {BINS} equal bins of q̂, weighted by size. *Coverage*: how often a conformal interval of "
            "that level holds the held-out outcome, ties broken by lot. Mean ± sd over the halves.",
            "",
            *calibration_table(last, tally),
            "",
            "### Speed, one core",
            "",
            "Kernels are compiled once for each machine, not counted. Predicting includes reading the prompt: the median of 200 "
            "requests, in the quietest of 20 rounds and in brackets in the busiest, as the machine is shared.",
            "",
            *speed,
        ]
    )
    if quick:
        print(text)
    else:
        write_section("routing", text)


if __name__ == "__main__":
    main()
