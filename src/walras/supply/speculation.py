"""Speculative decoding as make or buy: draft tokens only while they cost less than generating them. [Z §3.3]

A step with k drafts gives each of n sequences  E_k = 1 + α + … + αᵏ  tokens and takes T_k seconds. At the prices v of a decode
token and w of a prefill token the engine makes

    R_k = (n·E_k·v + p·w) / T_k        USD per second,

and the best k makes most. Said as a price comparison: R* is what a second of the engine is worth, and the (k+1)th draft is made while
n·αᵏ⁺¹·v > (T_{k+1} − T_k)·R*. Drafts are nearly free where a step waits for memory (few sequences) and dear where it waits for
arithmetic (many), so the answer changes with the load, and drafting goes off where k = 0 is best.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import brentq
from scipy.special import betaincinv

from walras.engine.steps import StepTimes
from walras.errors import QuantityError, SettingsError

FloatArray = NDArray[np.float64]
MOST_DRAFTS = 8
HALF_LIFE_S = 60.0
CONFIDENCE = 0.95


@dataclass(frozen=True, slots=True)
class Batch:
    """What is in a step of one worker, on average."""

    sequences: int
    """That decode, ≥ 1."""
    kv_tokens: float
    """KV tokens that they read, summed over them."""
    prefill_tokens: float = 0.0
    """New prompt tokens in the same step."""


def rates(
    steps: StepTimes,
    batch: Batch,
    acceptance: float,
    draft_cost: float,
    *,
    most: int = MOST_DRAFTS,
    decode_token: float = 1.0,
    prefill_token: float = 0.0,
) -> FloatArray:
    """(K+1,) R_k for k = 0 … K drafts, in the unit of the prices per second; K is `most`, or less where step times end.

    Args:
        acceptance: α, that a draft is right where those before it were.
        draft_cost: seconds to draft one token for all, per second of a step that only decodes.
        decode_token, prefill_token: their prices; by default R_k is decoded tokens per second.

    Raises:
        QuantityError: a number out of range, or more in a step than the step times know.
    """
    n, p = batch.sequences, batch.prefill_tokens
    numbers = {"acceptance": acceptance, "draft_cost": draft_cost, "kv_tokens": batch.kv_tokens}
    numbers |= {"prefill_tokens": p, "decode_token": decode_token, "prefill_token": prefill_token}
    for key, number in numbers.items():
        if not (np.isfinite(number) and number >= 0):
            raise QuantityError(f"{key} is {number}: it must be finite and ≥ 0")
    if acceptance > 1:
        raise QuantityError(f"acceptance is {acceptance}: a probability is at most 1")
    if not 1 <= n <= steps.most_sequences or n + p > steps.most_tokens:
        raise QuantityError(
            f"{n} sequences and {p:g} prompt tokens: step times are known for 1 to {steps.most_sequences} sequences, "
            f"{steps.most_tokens} tokens"
        )
    most = min(most, int((steps.most_tokens - p) // n) - 1)
    k = np.arange(most + 1)
    tokens = np.cumsum(acceptance**k)
    return np.asarray(
        (n * tokens * decode_token + p * prefill_token) / _seconds(steps, batch, k, draft_cost),
        dtype=np.float64,
    )


def _seconds(steps: StepTimes, batch: Batch, k: NDArray[np.int64], draft_cost: float) -> FloatArray:
    """(K+1,) T_k, as the replay counts them."""
    n, p, kv = batch.sequences, batch.prefill_tokens, batch.kv_tokens
    new = n * (k + 1)
    fixed, per_kv = (
        (steps.mixed_s[n], steps.mixed_kv_s[n]) if p else (steps.decode_s[n], steps.decode_kv_s[n])
    )
    dense = np.interp(new + p, np.arange(len(steps.dense_s)), steps.dense_s)
    drafting = k * draft_cost * (steps.dense_s[new] + steps.decode_s[n] + steps.decode_kv_s[n] * kv)
    return np.asarray(steps.overhead_s + dense + fixed + per_kv * kv + drafting, dtype=np.float64)


# --- measured acceptance ------------------------------------------------------------------------------------------------


@dataclass(slots=True)
class Acceptance:
    """α from what an engine counts, the older the less, with its interval.

    A run of drafts ends at the first wrong one, so of `accepted` tokens and `rejected` runs (those that did not get to their end)
    each is one trial: α̂ = accepted / (accepted + rejected), the likeliest value; the interval is Jeffreys'.
    """

    half_life_s: float = HALF_LIFE_S
    accepted: float = 0.0
    rejected: float = 0.0

    def count(self, runs: float, accepted_by_place: Sequence[float], seconds: float) -> None:
        """What was drafted in the last `seconds`: runs, and how many of them had place 1, 2, … accepted.

        Raises:
            QuantityError: counts that cannot be: negative, or more accepted at a place than at the one before.
        """
        falling = [runs, *accepted_by_place]
        if not np.isfinite(falling).all() or min(falling) < 0 or (np.diff(falling) > 0).any():
            raise QuantityError(
                f"{runs:g} runs with {list(accepted_by_place)} accepted by place: counts are ≥ 0 and cannot rise from place to place"
            )
        kept = 0.5 ** (seconds / self.half_life_s)
        self.accepted = kept * self.accepted + sum(accepted_by_place)
        self.rejected = kept * self.rejected + (runs - accepted_by_place[-1] if accepted_by_place else 0.0)

    def count_total(self, runs: float, drafts: int, accepted: float, seconds: float) -> None:
        """The same from an engine that has no counts by place: those that α would give."""
        if not (runs > 0 and 0 <= accepted <= runs * drafts):
            raise QuantityError(f"{accepted:g} accepted of {runs:g} runs of {drafts}")
        places = np.arange(1, drafts + 1)
        mean = accepted / runs
        alpha = 1.0 if mean == drafts else brentq(lambda a: float((a**places).sum()) - mean, 0.0, 1.0)
        self.count(runs, (runs * alpha**places).tolist(), seconds)

    @property
    def trials(self) -> float:
        return self.accepted + self.rejected

    @property
    def mean(self) -> float:
        """α̂; one half where nothing was counted."""
        return self.accepted / self.trials if self.trials else 0.5

    @property
    def interval(self) -> tuple[float, float]:
        """Jeffreys' 95% interval; trials far back count for less."""
        tail = (1 - CONFIDENCE) / 2
        a, b = self.accepted + 0.5, self.rejected + 0.5
        return float(betaincinv(a, b, tail)), float(betaincinv(a, b, 1 - tail))


# --- on and off ---------------------------------------------------------------------------------------------------------


@dataclass(slots=True)
class Drafting:
    """How many tokens to draft, decided again each time the load is looked at; without flapping.

    It changes from k to the best k′ only where log R_k′ − log R_k > `band` as measured. Let every measured log R be within ε of the
    truth, and band > 2ε. Then

    1. each change truly gains more than band − 2ε > 0, so that at a constant load no k is left and come back to;
    2. over any time, changes < (D + 2·M) / (band − 2ε), where D is the largest true difference between two log R at the beginning and M
       the sum of the largest moves of any log R from one look to the next: as many as the load's own moves explain;
    3. after no look is more than band + 2ε of log R lost.

    Proof of 2: the true log R of what is in use rises by more than band − 2ε at each change and falls by at most M in all between
    them; but it ends at most D + M above where it began. A change for want of room in the step is not counted. That drafting
    itself changes the load does no harm: where one n* parts the loads at which k′ makes more than k, the loads that k and k′
    settle at lie on the same side of it (docs/speculation.md).

    While nothing is drafted nothing is learned of α, so the first look and every `probe_every`-th after it draft one token then.
    """

    steps: StepTimes
    draft_cost: float
    most: int = MOST_DRAFTS
    band: float = 0.05
    probe_every: int = 60
    drafts: int = 0
    """In use, when not probing."""
    acceptance: Acceptance = field(default_factory=Acceptance)
    changes: int = 0
    """So far, of the load's making."""
    _looks: int = 0

    def __post_init__(self) -> None:
        if not (np.isfinite(self.band) and self.band > 0):
            raise SettingsError(f"{self.band} leaves no room for error", key="band", hint="above 0")
        if self.probe_every < 2:
            raise SettingsError(f"{self.probe_every} would only probe", key="probe_every", hint="at least 2")
        if self.most < 1:
            raise SettingsError(f"{self.most} drafts", key="most", hint="at least 1")

    def look(self, batch: Batch, *, decode_token: float = 1.0, prefill_token: float = 0.0) -> int:
        """The load now; returns how many tokens to draft until the next look. Prices as in `rates`."""
        self._looks += 1
        if self.acceptance.trials:
            made = rates(
                self.steps,
                batch,
                self.acceptance.mean,
                self.draft_cost,
                most=self.most,
                decode_token=decode_token,
                prefill_token=prefill_token,
            )
            in_use, best = min(self.drafts, len(made) - 1), int(np.argmax(made))
            if in_use < self.drafts:
                self.drafts = best
            elif np.log(made[best] / made[in_use]) > self.band:
                self.drafts, self.changes = best, self.changes + 1
        probing = self.drafts == 0 and self._looks % self.probe_every == 1
        return 1 if probing else self.drafts
