"""Draft lengths chosen by prices, against every draft length replayed. SIMULATED.

Requests arrive at shares of the rate that the engine sustains without drafts. Every draft length is replayed at every load; the one that
`walras.supply.speculation` chooses from gauges (sequences, KV use, token rates) of the replay that it is in is compared with the best.
`--write` puts the table into docs/benchmarks.md.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass, replace

import numpy as np

from page import write_section
from walras.engine.generated import Lengths, Poisson, generate
from walras.engine.profiles import load_profile
from walras.engine.replay import Replay
from walras.engine.requests import Requests
from walras.engine.settings import EngineSettings, Routing, Speculation
from walras.engine.steps import StepTimes
from walras.supply.speculation import Acceptance, Batch, Drafting, rates

PROFILES = ("rtx4090-llama3.1-8b", "h100-qwen3-32b-tp8", "a100-80gb-llama2-70b-tp8")
ACCEPTANCES = (0.1, 0.3, 0.6, 0.8)
LOADS = (0.1, 0.3, 0.6, 0.85, 1.0, 1.2)
DRAFT_COST = 0.1
MOST, COUNT, SEED = 6, 6000, 5
LENGTHS = Lengths.lognormal(800, 300, 0.8, seed=3)


@dataclass(frozen=True, slots=True)
class Seen:
    """One replay: what requests waited, and what gauges showed."""

    latency_s: float
    batch: Batch


def run(settings: EngineSettings, steps: StepTimes, requests: Requests) -> Seen:
    replay = Replay(settings, steps, Routing.round_robin(), requests).run()
    served, intervals = replay.served(), replay.intervals()
    middle = slice(len(intervals.end_s) // 10, max(2, len(intervals.end_s) * 9 // 10))
    running = float(intervals.running[middle].mean())
    n = max(1, round(running))
    context = float(intervals.kv_use[middle].mean()) * settings.kv_blocks * settings.block_tokens
    prompt_per_s = float(intervals.prompt_tokens[middle].sum()) / float(np.ptp(intervals.end_s[middle]) + 1)
    room = steps.most_tokens // 2
    batch = Batch(n, context)
    # Prompt tokens come by the second; in a step there are as many as come in its time.
    step_s = n / rates(steps, batch, 0.0, 0.0, most=0)[0]
    return Seen(float(served.latency_s.mean()), Batch(n, context, min(prompt_per_s * step_s, room)))


def sustained(settings: EngineSettings, steps: StepTimes) -> float:
    """Requests per second that end while there is always more to do."""
    burst = next(generate(Poisson(1e6), LENGTHS, COUNT, SEED))
    served = Replay(settings, steps, Routing.round_robin(), burst, interval_s=None).run().served()
    ends = np.sort(served.end_s)
    a, b = len(ends) // 5, len(ends) * 4 // 5
    return (b - a) / float(ends[b] - ends[a])


def chosen(seen: list[Seen], steps: StepTimes, alpha: float) -> tuple[int, int]:
    """Where the choice settles that begins without drafts, and changes on the way."""
    control = Drafting(steps, DRAFT_COST, MOST, band=0.03, probe_every=10**9)
    control.acceptance = Acceptance(accepted=1e6 * alpha, rejected=1e6 * (1 - alpha))
    for _ in range(20):
        control.look(seen[control.drafts].batch)
    return control.drafts, control.changes


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--write", action="store_true")
    wanted = parser.parse_args()
    lines = [
        "| profile | α | " + " | ".join(f"load {load:g}" for load in LOADS) + " |",
        "|---|---|" + "---|" * len(LOADS),
    ]
    lost, gained, switches = [], [], []
    for name in PROFILES:
        profile = load_profile(name)
        limits = profile.limits
        tokens = max(limits.step_tokens, limits.most_sequences * (MOST + 1))
        plain = EngineSettings(
            kv_blocks=limits.kv_tokens // 16,
            max_batched_tokens=min(tokens, 8192),
            max_sequences=min(limits.most_sequences, 8192 // (MOST + 1)),
            prefix_caching=False,
        )
        steps = profile.steps(plain.max_batched_tokens, plain.max_sequences)
        rate = sustained(plain, steps)
        for alpha in ACCEPTANCES:
            cells = []
            for load in LOADS:
                requests = next(generate(Poisson(load * rate), LENGTHS, COUNT, SEED))
                engines = [plain] + [
                    replace(plain, speculation=Speculation(k, alpha, DRAFT_COST)) for k in range(1, MOST + 1)
                ]
                seen = [run(engine, steps, requests) for engine in engines]
                latency = np.array([s.latency_s for s in seen])
                best, (k, changes) = int(latency.argmin()), chosen(seen, steps, alpha)
                lost.append(latency[k] / latency[best])
                gained.append(latency[k] / latency[0])
                switches.append(changes)
                cells.append(
                    f"{k} ({best}) {latency[k] / latency[0]:.2f}×, {latency[k] / latency[best]:.2f}×"
                )
            lines.append(f"| `{name}` | {alpha:g} | " + " | ".join(cells) + " |")
            print(lines[-1], flush=True)
    fixed = f"Against the best draft length of each case the choice loses {100 * (np.mean(lost) - 1):.1f}% of latency in the mean and {100 * (max(lost) - 1):.1f}% at most; "
    fixed += f"against no drafts it takes {np.mean(gained):.2f}× in the mean, {max(gained):.2f}× at most. Changes on the way to where it settles: at most {max(switches)}."
    body = "\n".join(
        [
            "## Speculation: make or buy",
            "",
            f"SIMULATED: {COUNT:,} independent requests (mean prompt 800, mean answer 300), one worker, load in shares of what it sustains without drafts; a draft costs 0.1 of a step. "
            "Each cell: drafts chosen by prices from gauges (in brackets the best of 0 to 6, by mean latency of the replay), its latency over that of no drafts, and over "
            "that of the best.",
            "",
            *lines,
            "",
            fixed,
        ]
    )
    if wanted.write:
        write_section("speculation", body)
    else:
        print(body)


if __name__ == "__main__":
    main()
