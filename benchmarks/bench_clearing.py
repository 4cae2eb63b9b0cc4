"""What clearing across tenants costs: beside Clarabel, as it grows, and with ten million requests' menus.

    python benchmarks/bench_clearing.py            # three quarters of an hour; --quick for a first look, nothing written

Markets are random (seeded): lognormal budgets and weights, 8 resources. Clarabel (`pip install clarabel`) gets the
conic programme that suits it best, each run in a process of its own, with supplies and the mean budget scaled to 1,
without which it fails on large markets. Both are timed in CPU seconds of their process on one core: others on the machine do not count.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import resource
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

import numpy as np
from scipy import sparse

from page import spread, write_section
from walras.market.tenants.fairness import envy, shares
from walras.market.tenants.fisher import FisherMarket, solve
from walras.market.tenants.menus import RequestMenus, clear_menus

RESOURCES = 8
KINDS = {
    "linear": ("perfect substitutes", np.inf, np.inf),
    "quasi-linear": ("perfect substitutes, money kept", np.inf, 1.0),
    "CES 0.5": ("CES, σ = 0.5", 0.5, np.inf),
    "CES 3": ("CES, σ = 3", 3.0, np.inf),
}
"""What it is, σ, and the worth of utility where money may be kept."""
TOLERANCE, TIME_S, MEMORY_GB = 1e-6, 300.0, 16
"""Of Clarabel: accuracy asked for, wall time, and address space."""


# --- markets ---------------------------------------------------------------------------------------------------------


def market(kind: str, n: int, seed: int = 0) -> FisherMarket:
    """Supplies 1 and budgets of mean 1; where money may be kept, a fifth or so is."""
    rng = np.random.default_rng(seed)
    _, elasticity, worth = KINDS[kind]
    budgets, weights = rng.lognormal(0, 1, n), rng.lognormal(0, 1, (n, RESOURCES))
    if np.isfinite(worth):
        weights *= 2 * budgets.mean() / RESOURCES
    supply = rng.uniform(0.5, 2, RESOURCES) * n / RESOURCES
    weights = weights * supply if np.isinf(elasticity) else weights
    total = budgets.mean() if np.isinf(worth) else 1.0
    return FisherMarket(
        budgets / total, weights, np.ones(RESOURCES), np.array([elasticity]), np.array([worth])
    )


def requests(tenants: int, each: int, *, budgets: bool) -> RequestMenus:
    """float32, drawn in place: 4 uses, 3 resources."""
    rng, n = np.random.default_rng(0), tenants * each

    def plane(scale: float) -> np.ndarray:
        flat = rng.standard_normal(n * 4, dtype=np.float32)
        np.exp(flat, out=flat)
        flat *= np.float32(scale)
        return flat.reshape(n, 4)

    quality = rng.random(n * 4, dtype=np.float32).reshape(n, 4)
    own = rng.uniform(0.005, 0.05, tenants) * each if budgets else None
    amounts = tuple(plane(0.3) for _ in range(3))
    names = ("prefill", "decode", "KV")
    return RequestMenus(
        np.repeat(np.arange(tenants), each), rng.lognormal(0, 1, n), quality, plane(0.02), amounts, names, own
    )


CAPACITY = np.array([0.1, 0.08, 0.2])
FRONTIER = np.array([[0.2, 0.02, 0.2], [0.15, 0.1, 0.2], [0.1, 0.13, 0.2], [0.02, 0.15, 0.2]])
"""Units a request; the frontier trades prefill against decode."""


# --- Clarabel --------------------------------------------------------------------------------------------------------


def _triples(a: Any, b: Any, c: Any) -> Any:
    """Rows of three matrices, in turn: one cone of three after another."""
    rows = a.shape[0]
    stacked = sparse.vstack([a, b, c], format="csr")
    return stacked[np.arange(3 * rows).reshape(3, rows).T.ravel()]


def cones(m: FisherMarket, unit: np.ndarray) -> tuple[Any, np.ndarray, np.ndarray, list[Any]]:
    """min q·z with A z + s = b, s in cones: the dual of perfect substitutes, with logs as exponential cones; Σ B log U of CES,
    as power cones."""
    import clarabel  # noqa: PLC0415 — optional

    n, g = m.weights.shape
    ng, sigma = n * g, float(m.elasticity[0])
    eye, kron = sparse.identity, sparse.kron
    of_tenant, of_good = kron(eye(n), np.ones((1, g))), kron(np.ones((1, n)), eye(g))
    ones = np.ravel(np.column_stack((np.zeros(n), np.ones(n), np.zeros(n))))
    if np.isinf(sigma):  # z = prices, 1/C of each tenant in some unit, the log of that
        money = bool(np.isfinite(m.worth[0]))
        rows = np.arange(ng)
        worth = (m.weights * unit[:, None]).ravel()
        dear = sparse.csr_matrix(
            (np.append(worth, -np.ones(ng)), (np.tile(rows, 2), np.append(g + rows // g, rows % g))),
            shape=(ng, g + 2 * n),
        )
        beta = sparse.hstack([sparse.csr_matrix((n, g)), eye(n), sparse.csr_matrix((n, n))], format="csr")
        logs = sparse.hstack([sparse.csr_matrix((n, g + n)), eye(n)], format="csr")
        parts = [dear, *([sparse.diags(unit) @ beta] if money else [])]
        matrix = sparse.vstack(
            [*parts, _triples(-logs, sparse.csr_matrix((n, g + 2 * n)), -beta)], format="csc"
        )
        limits = np.concatenate((np.zeros(ng), np.ones(n if money else 0), ones))
        cost = np.concatenate((m.supply, np.zeros(n), -m.budgets))
        return (
            matrix,
            limits,
            cost,
            [clarabel.NonnegativeConeT(ng + n * money)] + [clarabel.ExponentialConeT()] * n,
        )
    share = (m.weights / m.weights.sum(axis=1, keepdims=True)).ravel()
    rho, total = (sigma - 1) / sigma, 2 * ng + 2 * n  # z = bundles, parts of u, u, log u
    wide = eye(total, format="csr")
    x, part, u, logs = wide[:ng], wide[ng : 2 * ng], wide[2 * ng : 2 * ng + n], wide[2 * ng + n :]
    each_u, sum_part = kron(eye(n), np.ones((g, 1))) @ u, of_tenant @ part
    sums = sum_part - u if sigma < 1 else u - sum_part
    if sigma < 1:  # part^σ · x^(1−σ) ≥ α u, parts sum to at most u
        power, exponent = _triples(-part, -x, -sparse.diags(share) @ each_u), sigma
    else:  # x^ρ · u^(1−ρ) ≥ α^(−1/σ) part, parts sum to at least u
        power, exponent = _triples(-x, -each_u, -sparse.diags(share ** (-1 / sigma)) @ part), rho
    rows = [of_good @ x, sums, power, _triples(-logs, sparse.csr_matrix((n, total)), -u)]
    limits = np.concatenate((m.supply, np.zeros(n + 3 * ng), ones))
    cost = np.concatenate((np.zeros(2 * ng + n), -m.budgets))
    kinds = [clarabel.NonnegativeConeT(g + n)] + [clarabel.PowerConeT(exponent)] * ng
    return sparse.vstack(rows, format="csc"), limits, cost, kinds + [clarabel.ExponentialConeT()] * n


def clarabel_run(kind: str, n: str, seed: str) -> dict[str, Any]:
    """CPU seconds of its solver, without setting up matrices; what it says of itself, and how far its prices are off."""
    import clarabel  # noqa: PLC0415 — optional

    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_GB << 30, MEMORY_GB << 30))
    m = market(kind, int(n), int(seed))
    settings = clarabel.DefaultSettings()
    settings.verbose, settings.max_threads, settings.time_limit = False, 1, TIME_S
    settings.tol_gap_abs = settings.tol_gap_rel = settings.tol_feas = TOLERANCE
    # It loses its way on some markets with perfect substitutes: other units of 1/C are tried until it does not.
    units = (np.ones(len(m)), m.budgets, 1 / m.weights.max(axis=1))
    for unit in units if np.isinf(m.elasticity[0]) else units[:1]:
        matrix, limits, cost, kinds = cones(m, unit)
        nothing = sparse.csc_matrix((cost.size, cost.size))
        solver = clarabel.DefaultSolver(nothing, cost, matrix, limits, kinds, settings)
        began = time.process_time()
        found = solver.solve()
        seconds = time.process_time() - began
        if str(found.status) == "Solved":
            break
    prices = np.array(found.x if np.isinf(m.elasticity[0]) else found.z)[:RESOURCES]
    exact = solve(m)
    return {
        "seconds": seconds,
        "status": str(found.status),
        "steps": int(found.iterations),
        "off": float(np.abs(prices / exact.prices - 1).max()),
        "memory": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6,
    }


# --- measuring -------------------------------------------------------------------------------------------------------


def child(*arguments: Any) -> Any:
    """What a function of `CHILDREN` returns in a process of its own; None if that failed or took too long."""
    command = [sys.executable, __file__, "--child", *map(str, arguments)]
    alone = dict.fromkeys(("OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS", "RAYON_NUM_THREADS"), "1")
    try:
        done = subprocess.run(
            command, stdout=subprocess.PIPE, env=os.environ | alone, check=True, text=True, timeout=3 * TIME_S
        )
    except (subprocess.CalledProcessError, subprocess.TimeoutExpired):
        return None
    return json.loads(done.stdout.splitlines()[-1])


def ours(kind: str, n: int, seed: int, times: int) -> dict[str, Any]:
    """CPU seconds of `solve`, checks and certificate included, and what the certificate says."""
    m, seconds = market(kind, n, seed), []
    for _ in range(times):
        began = time.process_time()
        cleared = solve(m)
        seconds.append(time.process_time() - began)
    return {"seconds": seconds, "worst": cleared.certificate.worst, "passes": cleared.passes}


def beside(sizes: list[int], seeds: int) -> list[str]:
    lines = [
        "| utilities | tenants | Walras, CPU s | certified to | Clarabel, CPU s | its steps | its prices are off by | ratio | GB |",
        "| :--- | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for kind, (title, _, _) in KINDS.items():
        for n in sizes:
            own, theirs, ratios = [], [], []
            for seed in range(seeds if n < 100_000 else 1):
                before = ours(kind, n, seed, 3)
                peer = child("clarabel_run", kind, n, seed)
                after = ours(kind, n, seed, 3)
                mean = float(np.median(before["seconds"] + after["seconds"]))
                own.append((mean, after["worst"]))
                if peer is not None and peer["status"] == "Solved":
                    theirs.append(peer)
                    ratios.append(peer["seconds"] / mean)
                    continue
                print(f"Clarabel on {n:,} {title}: {peer and peer['status']}", flush=True)
            cells = ["fails"] + ["–"] * 4
            if theirs:
                cells = [spread([t["seconds"] for t in theirs]), spread([t["steps"] for t in theirs], ".0f")]
                cells += [f"{max(t['off'] for t in theirs):.0e}", f"**{spread(ratios, ',.0f')}**"]
                cells.append(f"{max(t['memory'] for t in theirs):.1f}")
            lines.append(
                f"| {title} | {n:,} | {spread([s for s, _ in own])} | {max(w for _, w in own):.0e} | {' | '.join(cells)} |"
            )
            print(lines[-1], flush=True)
    return lines


def power(x: list[int], y: list[float]) -> tuple[float, float]:
    """The exponent of y ∝ x^e by least squares on logarithms, and its standard error."""
    u, v = np.log(x) - np.log(x).mean(), np.log(y)
    slope = float(u @ v / (u @ u))
    left = v - v.mean() - slope * u
    return slope, float(np.sqrt(left @ left / max(u.size - 2, 1) / (u @ u)))


def growth(sizes: list[int]) -> list[str]:
    lines = [
        "| utilities | CPU seconds at each size | exponent | certified to |",
        "| :--- | :--- | ---: | ---: |",
    ]
    for kind, (title, _, _) in KINDS.items():
        runs = [ours(kind, n, 0, 3) for n in sizes]
        best = [min(run["seconds"]) for run in runs]
        slope, error = power(sizes, best)
        each = ", ".join(f"{n:,}: {s:.2g}" for n, s in zip(sizes, best, strict=True))
        lines.append(
            f"| {title} | {each} | {slope:.2f} ± {error:.2f} | {max(r['worst'] for r in runs):.0e} |"
        )
        print(lines[-1], flush=True)
    return lines


def menus_run(tenants: str, each: str, budgets: str, chooses: str) -> dict[str, Any]:
    clear_menus(requests(20, 50, budgets=budgets == "True"), CAPACITY * 1000)
    m = requests(int(tenants), int(each), budgets=budgets == "True")
    supply = (FRONTIER if chooses == "True" else CAPACITY) * len(m)
    cpu, wall = time.process_time(), time.perf_counter()
    cleared = clear_menus(m, supply)
    whole = cleared.whole
    return {
        "cpu": time.process_time() - cpu,
        "wall": time.perf_counter() - wall,
        "passes": cleared.passes,
        "gap": cleared.gap,
        "excess": cleared.excess,
        "loss": whole.loss,
        "allowed": whole.allowed_loss,
        "over": whole.excess,
        "dropped": whole.dropped,
        "split": whole.split,
        "memory": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6,
    }


def menu_table(tenants: int, each: int) -> list[str]:
    lines = [
        "| tenants' budgets | operator | wall s | CPU s | passes | gap | over capacity | whole uses: loss | allowed | split, at most | over capacity, before | dropped | GB |",
        "| :--- | :--- " + "| ---: " * 11 + "|",
    ]
    for budgets in (False, True):
        for chooses in (False, True):
            r = child("menus_run", tenants, each, budgets, chooses)
            if r is None:
                raise RuntimeError("clearing the menus failed")
            lines.append(
                f"| {'one each' if budgets else 'none'} | {'frontier of 4 vertices' if chooses else 'capacity'} | {r['wall']:.0f} "
                f"| {r['cpu']:.0f} | {r['passes']} | {abs(r['gap']):.0e} | {r['excess']:.0e} | {r['loss']:.1e} | {r['allowed']:.1e} "
                f"| {r['split']:,} | {r['over']:.0e} | {r['dropped']} | {r['memory']:.1f} |"
            )
            print(lines[-1], flush=True)
    return lines


def views(n: int) -> str:
    m = market("CES 0.5", n)
    cleared = solve(m)
    times = []
    works: list[Callable[[], object]] = [lambda: envy(m, cleared, look_at=64), lambda: shares(m, cleared)]
    for work in works:
        began = time.process_time()
        work()
        times.append(time.process_time() - began)
    return (
        f"Fairness for all of {n:,} tenants (CES, σ = 0.5): envy towards a sample of 64 others {times[0]:.1f} CPU seconds; "
        f"shares, and gains over equal split, budget split and one price {times[1]:.1f}."
    )


CHILDREN: dict[str, Callable[..., Any]] = {"clarabel_run": clarabel_run, "menus_run": menus_run}


def main() -> None:
    if sys.argv[1:2] == ["--child"]:
        print(json.dumps(CHILDREN[sys.argv[2]](*sys.argv[3:])))
        return
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--write", action="store_true", help="put the tables on the page of benchmarks")
    options = parser.parse_args()
    sizes = [1_000, 10_000] if options.quick else [1_000, 10_000, 100_000]
    for kind in KINDS:
        ours(kind, 2_000, 0, 1)  # kernels are there
    lines = [
        "## Clearing across tenants",
        "",
        f"Fisher markets of {RESOURCES} resources, SIMULATED: lognormal budgets and weights. CPU seconds of each process on one "
        f"core, medians of {options.seeds} seeds (one at 100,000 tenants) with the range; ours with checks and certificate, "
        f"Clarabel's its solver alone, asked for {TOLERANCE:g}, within {TIME_S:.0f} s and {MEMORY_GB} GB: of perfect substitutes the dual, which it "
        "solves sooner and more surely than Eisenberg–Gale, in the first of three units of 1/C that it solves (failed ones are not counted); of CES Eisenberg–Gale in power cones. *Certified to*: the "
        "worst of duality gap, excess demand, what is left idle at a price, utility missed, and budgets not accounted for.",
        "",
    ]
    if importlib.util.find_spec("clarabel"):
        lines += beside(sizes, options.seeds)
    else:
        lines.append("Clarabel is not installed (`pip install clarabel`).")
    lines += ["", "### Growth", "", "Best of 3, one seed. Log-log fits, ± standard error.", ""]
    lines += growth(
        [10_000, 30_000, 100_000] if options.quick else [10_000, 30_000, 100_000, 300_000, 1_000_000]
    )
    lines += ["", views(10_000 if options.quick else 100_000)]
    tenants, each = (100, 1_000) if options.quick else (10_000, 1_000)
    lines += [
        "",
        "### Requests with discrete menus",
        "",
        f"{tenants:,} tenants with {each:,} requests each, 4 uses × 3 resources, float32; shares of the bound. *Whole uses* gives each "
        "request one use, within all budgets and, after the cheapest were dropped, within what is produced; *allowed* is what "
        "Shapley and Folkman's lemma lets the best such allocation lose.",
        "",
        *menu_table(tenants, each),
    ]
    text = "\n".join(lines)
    if options.write:
        write_section("clearing", text)


if __name__ == "__main__":
    main()
