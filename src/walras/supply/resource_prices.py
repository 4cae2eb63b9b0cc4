"""Prices of an engine's resources, from its gauges and step times alone: the delay that a use imposes on others. [Z §3.3] [FM-5]

A second of work delays three groups: those who run meanwhile (`present`), those who come and wait before the line is gone (`behind`), and,
as a long prompt is a line of its own, those who come while it is computed. Own delay is charged nowhere. docs/resource-prices.md derives
each term.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from walras.engine.settings import EngineSettings
from walras.engine.steps import StepTimes
from walras.errors import QuantityError
from walras.supply.state import EngineState

FloatArray = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Calibration:
    """Pure numbers that the model leaves open, fitted on the first half of two traces: benchmarks/bench_externality.py --calibrate."""

    behind: float = 1.59
    """Requests that find a line, over those of a fluid: it is longer than its requests by what is left of a prompt at work."""
    lull: float = 0.285
    """Longest line that is still counted, as a share of the horizon: it ends in a lull."""


CALIBRATION = Calibration()
RELATIVE_ERROR = 0.29
_FULL = 0.9
"""Memory is full where one prompt more would use this share of it: what waits rarely fits to the block."""
_LEAST_IDLE = 0.05
"""Share of the time that counts as idle at most load. Not fitted: loads above 0.95 were not measured."""
_SHORTEST_S = 1e-9
"""A step that takes no time at all would make rates infinite."""


@dataclass(frozen=True, slots=True)
class ResourcePrices:
    """USD per unit that others lose, by delay."""

    prefill_token: float
    """Of a prompt token that is computed, not found in memory."""
    decode_token: float
    kv_block_s: float
    """Of a KV block held for a second."""
    transferred_byte: float
    """Between a worker that prefills and one that decodes."""
    relative_error: float
    """Median |quote / truth − 1| of a request, where it was calibrated."""
    reasons: tuple[str, str, str, str]
    """Why each of the four is what it is."""
    attention_pair: float = 0.0
    """Of a (new token × KV token) pair of prefill attention."""
    line_token_s: float = 0.0
    """Seconds for which a prefill token holds up the line."""
    line_pair_s: float = 0.0
    """Seconds for which a pair does."""
    line_s2: float = 0.0
    """USD per squared second that a request holds up the line: those who come meanwhile wait for the rest."""


@dataclass(frozen=True, slots=True)
class Amounts:
    """What a request takes of an engine, or is expected to take."""

    prefill_tokens: float
    """Prompt tokens that are computed, not found in memory."""
    decode_tokens: float
    """Of the answer, but for the first, which the prompt's last step gives."""
    kv_block_s: float
    """KV blocks held × seconds."""
    transferred_bytes: float = 0.0
    attention_pairs: float = 0.0
    """(new token × KV token) pairs of its prefill attention."""


def quote(prices: ResourcePrices, amounts: Amounts) -> float:
    """USD that the request costs others: amounts × prices, and what its own prompt, as a line, costs those who come meanwhile."""
    line_s = prices.line_token_s * amounts.prefill_tokens + prices.line_pair_s * amounts.attention_pairs
    return (
        prices.prefill_token * amounts.prefill_tokens
        + prices.attention_pair * amounts.attention_pairs
        + prices.decode_token * amounts.decode_tokens
        + prices.kv_block_s * amounts.kv_block_s
        + prices.transferred_byte * amounts.transferred_bytes
        + prices.line_s2 * line_s * line_s
    )


def amounts_of(
    settings: EngineSettings,
    prompt_tokens: float,
    output_tokens: float,
    *,
    cached_tokens: float = 0.0,
    prefill_s: float,
    decode_s: float,
) -> Amounts:
    """The amounts of a request that took, or is expected to take, so many seconds of prefill and of decoding (not of waiting)."""
    new, block = prompt_tokens - cached_tokens, settings.block_tokens
    held = (prompt_tokens + cached_tokens) / 2 * prefill_s + (prompt_tokens + output_tokens / 2) * decode_s
    apart = settings.disaggregation
    moved = apart.bytes_per_token * prompt_tokens if apart is not None and output_tokens > 1 else 0.0
    pairs = new * (cached_tokens + 0.5 * (new + 1))
    return Amounts(new, np.maximum(0.0, output_tokens - 1), held / block, moved, pairs)


def expected_amounts(
    state: EngineState,
    settings: EngineSettings,
    steps: StepTimes,
    prompt_tokens: float,
    *,
    cached_tokens: float | None = None,
    output_tokens: float | None = None,
) -> Amounts:
    """Ex ante: an answer as long as the mean, and memory that has the usual share of the prompt, where nothing else is known."""
    cached = state.hit_share * prompt_tokens if cached_tokens is None else cached_tokens
    output = state.mean_output_tokens if output_tokens is None else output_tokens
    model = EngineModel.of(state, settings, steps)
    new = prompt_tokens - cached
    prefill_s = model.line_token_s * new + model.pair_s * new * (cached + new / 2)
    return amounts_of(
        settings,
        prompt_tokens,
        output,
        cached_tokens=cached,
        prefill_s=prefill_s,
        decode_s=output * model.token_s,
    )


def live_prices(
    state: EngineState,
    settings: EngineSettings,
    steps: StepTimes,
    delay_price: float,
    *,
    horizon_s: float = 300.0,
) -> ResourcePrices:
    """Prices now, for one request more. What is delayed after `horizon_s` does not count.

    Args:
        delay_price: what a second of delay costs the others on average, USD per second.

    Raises:
        QuantityError: a price of delay, or a horizon, that is negative or not finite.
    """
    if not (np.isfinite(delay_price) and delay_price >= 0):
        raise QuantityError(f"delay price is {delay_price}; it must be finite and ≥ 0")
    if not (np.isfinite(horizon_s) and horizon_s > 0):
        raise QuantityError(f"horizon is {horizon_s} s; it must be finite and > 0")
    model = EngineModel.of(state, settings, steps)
    return model.prices(delay_price, horizon_s, CALIBRATION)


@dataclass(frozen=True, slots=True)
class EngineModel:
    """The engine as a fluid: requests of mean size come evenly, a batch of k emits `rate(k)` tokens a second."""

    state: EngineState
    settings: EngineSettings
    usual: float
    """Sequences that run on average at these rates."""
    elasticity: float
    """Of the tokens emitted a second by the sequences running: 1 where steps are as long whatever the batch."""
    utilisation: float
    """Share of its capacity that arrivals of mean size take, coming evenly."""
    request_s: float
    """Seconds of the bottleneck for one request in line."""
    prefill_s: float
    """By which a prefill token lengthens a step."""
    pair_s: float
    sequence_s: float
    """By which a decoding sequence lengthens a step, but for what it reads."""
    read_s: float
    """By which a KV block held for a second lengthens the steps of that second."""
    line_token_s: float
    """Seconds of the line for a prefill token."""
    slot_s: float
    """Seconds of the line for a decode token: 0 while there is room in the batch."""
    block_s: float
    """Seconds of the line for a KV block-second: 0 while there is room in memory."""
    token_s: float
    """Seconds between two tokens of a sequence."""

    @classmethod
    def of(cls, state: EngineState, settings: EngineSettings, steps: StepTimes) -> EngineModel:
        budget, most = settings.max_batched_tokens, settings.max_sequences
        memory = settings.kv_blocks * settings.block_tokens
        arrivals, kv = state.arrivals_per_s, state.kv_use * memory
        prompt = state.prompt_tokens_per_s / arrivals if arrivals > 0 else 0.0
        fluid = _Fluid.of(state, settings, steps, prompt)
        usual = float(np.interp(state.output_tokens_per_s, np.maximum.accumulate(fluid.rate), fluid.k))
        batch = max(state.running, usual, 1.0)
        n = min(round(batch), most)
        if state.running < 1:
            kv = min(memory, usual * fluid.context)
        rate_low, rate_high = np.interp([batch / 1.1, batch * 1.1], fluid.k, fluid.rate)
        elasticity = max(1e-3, float(np.log(rate_high / rate_low) / np.log(1.21))) if rate_low > 0 else 1.0
        pairs_s = steps.prefill_pair_s * state.mean_prompt_tokens / 2
        alone, mixed = fluid.step_s(n, kv, 0), fluid.step_s(n, kv, fluid.chunk)
        waits = state.waiting > 0
        busy = 1.0 if waits else min(1.0, state.prompt_tokens_per_s / fluid.chunk * mixed)
        full = memory < (kv + state.mean_prompt_tokens) / _FULL and waits
        slots = state.running >= most and waits
        slope = float(steps.dense_s[budget] - steps.dense_s[n]) / (budget - n) if budget > n else 0.0
        line = (fluid.step_s(n, kv, budget) - pairs_s * budget) / budget
        high = min(most, 2 * n)
        low = high // 2
        grown = steps.dense_s[high] + steps.decode_s[high] - steps.dense_s[low] - steps.decode_s[low]
        read = busy * steps.mixed_kv_s[n] / mixed + (1 - busy) * steps.decode_kv_s[n] / alone
        return cls(
            state=state,
            settings=settings,
            usual=usual,
            elasticity=elasticity,
            utilisation=arrivals * fluid.request_s,
            request_s=fluid.request_s if full or slots else prompt * (line + pairs_s),
            prefill_s=slope,
            pair_s=steps.prefill_pair_s,
            sequence_s=max(0.0, float(grown) / max(high - low, 1)),
            read_s=float(read) * settings.block_tokens,
            line_token_s=slope if full or slots else line,
            slot_s=alone / most if slots else 0.0,
            block_s=1 / settings.kv_blocks if full else 0.0,
            token_s=busy * mixed + (1 - busy) * alone,
        )

    @property
    def idle(self) -> float:
        """Share of its capacity that arrivals leave. A second's delay costs 1 / idle seconds: those who come meanwhile are delayed, too."""
        return max(_LEAST_IDLE, 1 - self.utilisation)

    def behind(self, of: Calibration, horizon_s: float) -> float:
        """Requests that come while there is a line, and so wait for a second of work that is put at its end now."""
        ahead_s = of.behind * self.state.waiting * self.request_s
        most = of.lull * horizon_s / max(self.request_s, _SHORTEST_S)  # that can be served meanwhile
        return float(-most * np.expm1(-self.state.arrivals_per_s * ahead_s / (self.idle * most)))

    def prices(self, delay_price: float, horizon_s: float, of: Calibration) -> ResourcePrices:
        """As `live_prices`."""
        state, behind, multiplier = self.state, self.behind(of, horizon_s), 1 / self.idle
        # While an answer is given, the batch of now goes over into the usual one.
        stays = -np.expm1(-self.elasticity) / self.elasticity
        beside = self.usual + stays * (state.running - self.usual)
        link, link_why = _link(state, self.settings)
        present, decoding = delay_price * state.running * multiplier, delay_price * beside * multiplier
        rest = delay_price * behind
        return ResourcePrices(
            prefill_token=present * self.prefill_s + rest * self.line_token_s,
            decode_token=(decoding + rest) * self.sequence_s + rest * self.slot_s,
            kv_block_s=(decoding + rest) * self.read_s + rest * self.block_s,
            transferred_byte=delay_price * link,
            relative_error=RELATIVE_ERROR,
            reasons=(
                f"{state.running:.0f} run beside it, {behind:.0f} will wait behind it",
                f"lengthens the steps of {beside:.0f} others",
                "memory is full: those in line wait for its blocks" if self.block_s else "read in each step",
                link_why,
            ),
            attention_pair=(present + rest) * self.pair_s,
            line_token_s=self.line_token_s,
            line_pair_s=self.pair_s,
            line_s2=delay_price * of.behind * state.arrivals_per_s * multiplier / 2,
        )


@dataclass(frozen=True, slots=True)
class _Fluid:
    """Requests of mean size, evenly: what a batch of k = 0, 1, … sequences makes of its seconds."""

    steps: StepTimes
    settings: EngineSettings
    prompt_pairs: float
    """Attention pairs of a new token."""
    context: float
    """KV tokens of a sequence."""
    chunk: int
    """New tokens of a step that has some."""
    k: FloatArray
    rate: FloatArray
    """(B+1,) tokens a second of a batch of k."""
    request_s: float
    """Seconds of the bottleneck (line, memory or batch) for one request."""

    @classmethod
    def of(cls, state: EngineState, settings: EngineSettings, steps: StepTimes, prompt: float) -> _Fluid:
        budget, most = settings.max_batched_tokens, settings.max_sequences
        memory = settings.kv_blocks * settings.block_tokens
        context = min(max(state.mean_prompt_tokens + state.mean_output_tokens / 2, 1.0), memory)
        answer, pairs = max(1.0, state.mean_output_tokens), state.mean_prompt_tokens / 2
        chunk = int(min(max(prompt, 1.0), budget))
        k = np.arange(most + 1, dtype=np.float64)
        bare = cls(steps, settings, pairs, context, chunk, k, k, 0.0)
        kv = np.minimum(k * context, memory)
        mixed, alone = (bare.steps_s(kv, new) for new in (chunk, 0))
        busy = np.minimum(1.0, state.prompt_tokens_per_s / chunk * mixed)
        rate = k * bare.emitted * (busy / mixed + (1 - busy) / alone)
        batch = int(max(1.0, min(most, memory / context, answer * budget / max(prompt, 1.0))))
        steps_of = prompt / budget
        request_s = steps_of * float(bare.steps_s(kv, budget)[batch])
        request_s += max(0.0, answer / bare.emitted / batch - steps_of) * float(alone[batch])
        return cls(steps, settings, pairs, context, chunk, k, rate, request_s)

    @property
    def emitted(self) -> float:
        """Tokens of a sequence in a step."""
        return self.settings.speculation.tokens_per_step if self.settings.speculation else 1.0

    def steps_s(self, kv: FloatArray, new: int) -> FloatArray:
        """(B+1,) seconds of a step of k sequences that read `kv`, with so many new tokens of prompts."""
        of, speculation = self.steps, self.settings.speculation
        drafting = speculation.drafts * speculation.draft_cost if speculation else 0.0
        b = np.arange(len(kv))
        verified = b * self.settings.verified_tokens
        alone = of.dense_s[verified] + of.decode_s[b] + of.decode_kv_s[b] * kv
        if new:
            dense = of.dense_s[np.minimum(new + verified, self.settings.max_batched_tokens)]
            own = dense + of.mixed_s[b] + of.mixed_kv_s[b] * kv + of.prefill_pair_s * self.prompt_pairs * new
        else:
            own = alone
        return np.asarray(np.maximum(of.overhead_s + own + drafting * alone, _SHORTEST_S))

    def step_s(self, n: int, kv: float, new: int) -> float:
        """Seconds of a step of n sequences."""
        return float(self.steps_s(np.full(n + 1, kv), new)[n])


def _link(state: EngineState, settings: EngineSettings) -> tuple[float, str]:
    """Seconds of others' delay per byte on the link of a prefilling worker, as an M/D/1 queue, and why."""
    apart = settings.disaggregation
    if apart is None:
        return 0.0, "nothing is transferred"
    transfer_s = apart.setup_s + apart.bytes_per_token * state.mean_prompt_tokens / apart.bandwidth
    busy = min(state.arrivals_per_s * transfer_s, 1 - _LEAST_IDLE)
    return busy / (2 * (1 - busy) ** 2) / apart.bandwidth, f"the link is {busy:.0%} busy"
