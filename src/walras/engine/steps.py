"""How long one step of a serving engine takes, from what is in it.

A step takes `overhead_s + dense_s[p + n] + decode_s[n] + decode_kv_s[n]·kv + prefill_pair_s·pairs` seconds, with p new
prefill tokens, n decoding sequences, kv the KV tokens these read (summed over them), and pairs the sum over prefill
chunks of new tokens × KV tokens each reads: c new tokens after k others make c·k + c·(c + 1)/2. When p > 0, `mixed_s` and
`mixed_kv_s` stand in for `decode_s` and `decode_kv_s`: an engine runs another attention kernel then. The sum is affine in kv
for fixed n on purpose: k steps that only decode then have a closed form, so work is done per change of batch and not per
token.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from walras.errors import QuantityError

FloatArray = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class StepTimes:
    """Seconds of a step by its content, for one replica. Arrays are float64, finite and ≥ 0.

    Raises:
        QuantityError: an array of the wrong shape, or with a value that is negative or not finite.
    """

    overhead_s: float
    """Seconds of every step whatever is in it."""
    dense_s: FloatArray
    """(T+1,) seconds of the token-wise work by new tokens in the step, prefill and decode together; [0] is 0."""
    decode_s: FloatArray
    """(B+1,) seconds by decoding sequences: their attention's fixed part, and sampling; [0] is 0."""
    decode_kv_s: FloatArray
    """(B+1,) seconds per KV token read, by decoding sequences; [0] is 0."""
    prefill_pair_s: float
    """Seconds per (new token × KV token) pair of prefill attention."""
    mixed_s: FloatArray = field(default_factory=lambda: np.empty(0))
    """(B+1,) in place of `decode_s` in steps that also prefill; left out, the same."""
    mixed_kv_s: FloatArray = field(default_factory=lambda: np.empty(0))
    """(B+1,) in place of `decode_kv_s` in steps that also prefill; left out, the same."""

    def __post_init__(self) -> None:
        for mixed, alone in (("mixed_s", "decode_s"), ("mixed_kv_s", "decode_kv_s")):
            if not getattr(self, mixed).size:
                object.__setattr__(self, mixed, getattr(self, alone))
        for name in ("dense_s", "decode_s", "decode_kv_s", "mixed_s", "mixed_kv_s"):
            column = getattr(self, name)
            if column.ndim != 1 or column.dtype != np.float64 or len(column) < 2:
                raise QuantityError(f"{name} must be one row of at least two float64")
            if column[0] != 0:
                raise QuantityError(f"{name}[0] is {column[0]}: nothing takes no time")
            if not (np.isfinite(column) & (column >= 0)).all():
                raise QuantityError(f"{name} has a value that is negative or not finite")
            if name != "dense_s" and len(column) != len(self.decode_s):
                raise QuantityError(
                    f"{name} has {len(column)} values, decode_s {len(self.decode_s)}: one per batch size"
                )
        for name in ("overhead_s", "prefill_pair_s"):
            if not (np.isfinite(getattr(self, name)) and getattr(self, name) >= 0):
                raise QuantityError(f"{name} is {getattr(self, name)}: seconds are finite and ≥ 0")

    @property
    def most_tokens(self) -> int:
        """Most new tokens in a step that the table knows."""
        return len(self.dense_s) - 1

    @property
    def most_sequences(self) -> int:
        """Most decoding sequences in a step that the table knows."""
        return len(self.decode_s) - 1

    def step_s(self, prefill_tokens: int, sequences: int, kv_tokens: int, pairs: float) -> float:
        """Seconds of one step."""
        fixed, per_kv = (
            (self.mixed_s, self.mixed_kv_s) if prefill_tokens else (self.decode_s, self.decode_kv_s)
        )
        return float(
            self.overhead_s
            + self.dense_s[prefill_tokens + sequences]
            + fixed[sequences]
            + per_kv[sequences] * kv_tokens
            + self.prefill_pair_s * pairs
        )
