"""What a use of the engine costs everyone else: the delay of others, measured by running the same future twice. [Z §3.3] [FM-5]

    cost to others = Σ_{j≠i} λ_j·seconds of j in the engine with i − the same without i,        over a horizon

Both futures see the same arrivals, so that the difference is the effect of i alone. What i delays beyond the horizon is not counted,
and in a closed loop a later call is not a delay: a price found here is a lower bound where either matters.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from walras.engine.generated import Lengths
from walras.engine.replay import Replay
from walras.engine.requests import Requests
from walras.errors import SettingsError

FloatArray = NDArray[np.float64]


def cost_to_others(replay: Replay, requests: Requests, horizon_s: float) -> FloatArray:
    """(N,) what each of the requests would cost others within the horizon from now, if it alone came as well.

    In USD where requests have prices of delay, else in seconds. The replay itself stays where it is.
    """
    return _with_one_more(replay, requests, horizon_s)[0]


def _with_one_more(replay: Replay, requests: Requests, horizon_s: float) -> tuple[FloatArray, FloatArray]:
    """The cost to others of each request, and its own seconds in the engine, within the horizon."""
    now, own = replay.now_s, replay.fed
    base = replay.snapshot().run(now + horizon_s).delay_cost(now)
    costs, seconds = np.empty(len(requests)), np.empty(len(requests))
    for row in range(len(requests)):
        branch = replay.branch(add=_one(requests, row)).run(now + horizon_s)
        served = branch.served()
        costs[row] = branch.delay_cost(now, without=[own]) - base
        ended = np.append(served.end_s[served.request == own], now + horizon_s)[0]
        seconds[row] = ended - requests.arrival_s[row]
    return costs, seconds


def _one(requests: Requests, row: int) -> Requests:
    offsets, ids = requests.prefix_offsets, requests.prefix_ids
    if offsets is not None and ids is not None:
        ids = ids[offsets[row] : offsets[row + 1]]
        offsets = np.array([0, len(ids)])
    price = requests.delay_price
    return Requests(
        requests.arrival_s[row : row + 1],
        requests.input_tokens[row : row + 1],
        requests.output_tokens[row : row + 1],
        offsets,
        ids,
        None if price is None else price[row : row + 1],
    )


@dataclass(frozen=True, slots=True)
class ResourcePrices:
    """Cost to others of one unit more: mean over the probes, and standard error of it. USD, or seconds of others' delay. SIMULATED."""

    prefill_token: float
    """Of a prompt that is not in memory."""
    decode_token: float
    """Its share of the steps it takes part in; the memory it holds is charged apart."""
    kv_block_s: float
    """Of a KV block held for a second."""
    errors: tuple[float, float, float]
    """Standard errors of the three."""
    probes: int
    horizon_s: float


def resource_prices(
    replay: Replay,
    lengths: Lengths,
    until_s: float,
    *,
    probes: int = 64,
    horizon_s: float = 60.0,
    seed: int = 0,
) -> ResourcePrices:
    """Prices of the three resources over the time from now until `until_s`, through which the replay is run.

    At random times the future is run again with a prompt more, with that prompt and an answer, and with a quarter of the free memory
    taken out. Prompt and answer are as long as `lengths` draws them.

    Raises:
        SettingsError: no time to probe, or fewer than two probes.
    """
    if not (np.isfinite(until_s) and until_s > replay.now_s and horizon_s > 0):
        raise SettingsError(f"{until_s} s from {replay.now_s:g} s on", key="until_s", hint="a time after now")
    if probes < 2:
        raise SettingsError(f"{probes} tell no error", key="probes", hint="at least 2")
    random = np.random.default_rng(seed)
    times = np.sort(random.uniform(replay.now_s, until_s, probes))
    rows = random.integers(0, len(lengths.input_tokens), probes)
    found = np.empty((probes, 3))
    for k, (time, row) in enumerate(zip(times, rows, strict=True)):
        replay.run(float(time))
        prompt, answer = int(lengths.input_tokens[row]), int(lengths.output_tokens[row])
        found[k] = _probe(replay, prompt, answer, horizon_s)
    replay.run(until_s)
    prefill, decode, kv = (float(mean) for mean in found.mean(axis=0))
    errors = (float(error) for error in found.std(axis=0, ddof=1) / np.sqrt(probes))
    return ResourcePrices(prefill, decode, kv, (next(errors), next(errors), next(errors)), probes, horizon_s)


def _probe(replay: Replay, prompt: int, answer: int, horizon_s: float) -> tuple[float, float, float]:
    """Cost to others of a prefill token, of a decode token, and of a block held for a second, at this moment."""
    now, block, kv = replay.now_s, replay.settings.block_tokens, 0.0
    out = replay.free_blocks // 4
    if out.any():
        base = replay.snapshot().run(now + horizon_s).delay_cost(now)
        tight = replay.branch(block=out.tolist()).run(now + horizon_s).delay_cost(now)
        kv = (tight - base) / (float(out.sum()) * horizon_s)
    extra = Requests(np.full(2, now), np.full(2, prompt), np.array([1, answer + 1]))
    (short, whole), (brief, long) = _with_one_more(replay, extra, horizon_s)
    held = kv * prompt / block * brief
    more = kv * (prompt / block * (long - brief) + answer / 2 / block * (long - brief))
    return (short - held) / prompt, (whole - short - more) / answer, kv
