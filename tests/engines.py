"""Small random engines and requests, with every feature of the replay in some of them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from walras.engine.requests import Requests
from walras.engine.settings import Disaggregation, EngineSettings, Routing, Speculation
from walras.engine.steps import StepTimes


@dataclass(frozen=True)
class Case:
    settings: EngineSettings
    steps: StepTimes
    routing: Routing
    requests: Requests


def steps_up_to(tokens: int, sequences: int, seed: int) -> StepTimes:
    """Random step times, longer for more tokens and for more sequences."""
    rng = np.random.default_rng(seed)

    def rising(n: int) -> Any:
        return np.append(0.0, np.cumsum(rng.uniform(0, 0.002, n)))

    def per_kv() -> Any:
        return np.append(0.0, rng.uniform(0, 1e-4, sequences))

    return StepTimes(
        overhead_s=float(rng.uniform(0.001, 0.05)),
        dense_s=rising(tokens),
        decode_s=rising(sequences),
        decode_kv_s=per_kv(),
        prefill_pair_s=float(rng.uniform(0, 1e-5)),
        mixed_s=rising(sequences),
        mixed_kv_s=per_kv(),
    )


def flat_steps(tokens: int, sequences: int, overhead_s: float = 0.0, token_s: float = 0.0) -> StepTimes:
    """A step takes so many seconds, and so many more for each new token."""
    none = np.zeros(sequences + 1)
    return StepTimes(overhead_s, token_s * np.arange(tokens + 1), none, none, 0.0)


def routing_of(rng: np.random.Generator, settings: EngineSettings) -> Routing:
    weights = {
        key: rng.uniform(0, scale, settings.workers)
        for key, scale in (
            ("delay_s", 1.0),
            ("token_delay_s", 0.1),
            ("request_delay_s", 0.1),
            ("token_price", 0.1),
            ("block_price", 0.1),
            ("output_price", 0.1),
        )
    }
    known = [
        Routing.round_robin(),
        Routing.least_loaded(),
        Routing.kv(settings.block_tokens),
        Routing(**weights),
    ]
    return known[int(rng.integers(len(known)))]


def prefixes_of(rng: np.random.Generator, prompts: Any, tokens: int) -> tuple[Any, Any]:
    """Prefix ids from a tree of few branches, so that many prompts begin alike; some prompts have fewer ids than chunks."""
    offsets, ids = [0], list[int]()
    tree = dict[Any, int]()
    for prompt in prompts:
        chunks = -(-int(prompt) // tokens)
        if rng.random() < 0.2:
            chunks = int(rng.integers(0, chunks + 1))
        path: tuple[int, ...] = ()
        for _ in range(chunks):
            path = (*path, int(rng.choice([0, 0, 0, 1, 2])))
            ids.append(tree.setdefault(path, len(tree) + 1))
        offsets.append(len(ids))
    return np.array(offsets), np.array(ids, dtype=np.int64)


def arrivals_of(rng: np.random.Generator, n: int) -> tuple[Any, Any]:
    """Arrivals, crowded or thin, some at the same time; and which calls follow which."""
    arrival = np.sort(rng.uniform(0, n * rng.choice([0.003, 0.03, 0.3]), n))
    if rng.random() < 0.3:
        arrival = np.floor(arrival * 5) / 5
    after = np.full(n, -1)
    if rng.random() < 0.3:
        for k in range(1, n):
            if rng.random() < 0.5:
                after[k] = rng.integers(0, k)
                arrival[k] = rng.uniform(0, 0.5) if rng.random() < 0.8 else 0.0
    return arrival, after


def random_case(seed: int, n: int) -> Case:
    rng = np.random.default_rng(seed)

    def chance(share: float) -> bool:
        return bool(rng.random() < share)

    block, per_chunk = int(rng.choice([1, 2, 4, 16])), int(rng.choice([1, 2, 4]))
    sequences, workers = int(rng.integers(1, 9)), int(rng.integers(1, 5))
    speculation = disaggregation = None
    if chance(0.25):
        speculation = Speculation(
            int(rng.integers(1, 4)), float(rng.uniform(0, 1)), float(rng.uniform(0, 0.3))
        )
    if workers > 1 and chance(0.3):
        bandwidth, setup_s = float(rng.choice([10, 100, 1e9])), float(rng.uniform(0, 0.1))
        disaggregation = Disaggregation(int(rng.integers(1, workers)), 1.0, bandwidth, setup_s)
    prompts = rng.integers(1, 60, n)
    answers = rng.choice([1, 8, 25], n) if chance(0.5) else rng.integers(1, 60, n)
    verified = 1 + (speculation.drafts if speculation else 0)
    need = int(np.ceil((prompts + answers + verified).max() / block))
    chunked = chance(0.8)
    budget = max(sequences * verified, int(rng.integers(4, 120)), 0 if chunked else 120)
    settings = EngineSettings(
        kv_blocks=int(need * rng.choice([1, 1.2, 1.5, 2, 4])),
        block_tokens=block,
        prefix_tokens=block * per_chunk,
        max_batched_tokens=budget,
        max_sequences=sequences,
        chunked_prefill=chunked,
        prefix_caching=chance(0.8),
        reserve_prompt=chance(0.5),
        schedule_ahead=chance(0.4),
        workers=workers,
        disaggregation=disaggregation,
        speculation=speculation,
    )
    arrival, after = arrivals_of(rng, n)
    offsets, ids = prefixes_of(rng, prompts, block * per_chunk)
    requests = Requests(arrival, prompts, answers, offsets, ids, rng.uniform(0, 2, n), after)
    return Case(settings, steps_up_to(budget, sequences, seed), routing_of(rng, settings), requests)
