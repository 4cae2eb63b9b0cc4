"""Seconds until an answer, from tokens and the state of the engine: queue, prefill, decode. [Z-9]

    L = queue + base + prefill · uncached input + time per output token · output

A live engine reports the coefficients (`EngineState`); where there is only a log of seconds and tokens they are fitted
(`LatencyModel`). Output is not known beforehand, so being late is a matter of the output's tail: P(L > s) comes from
the distribution of tokens, not from its mean.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy.optimize import nnls

from walras.errors import QuantityError, RecordError
from walras.estimate.usage import UsageModel, equal_slices
from walras.quantities import IntArray
from walras.risk import FloatArray

SCENARIOS = 32
"""Equally likely ratios of observed to fitted seconds that stand for what tokens do not explain."""
TERMS = ("base", "uncached input", "output", "output × running")
HUBER = 2.0
"""Relative residuals beyond this many robust standard deviations weigh less (Huber 1964)."""
ROUNDS = 8


@dataclass(frozen=True, slots=True)
class EngineState:
    """What I models' engines are doing now; each (I,), NaN where not reported."""

    ttft_s: FloatArray
    """Seconds to the first token of a short prompt that does not wait."""
    prefill_s: FloatArray
    """Seconds per input token that is not cached."""
    tpot_s: FloatArray
    """Seconds per output token at the present load."""
    queue_s: FloatArray
    """Seconds a request waits before it is scheduled; NaN to have it worked out from the two counts."""
    running: FloatArray
    waiting: FloatArray
    """Requests in the batch, and before it."""
    noise: FloatArray
    """Observed over expected seconds of service, equally likely, (I, S); all 1 where service is as expected."""

    @classmethod
    def of(
        cls,
        *,
        ttft_s: FloatArray,
        prefill_s: FloatArray,
        tpot_s: FloatArray,
        queue_s: FloatArray | None = None,
        running: FloatArray | None = None,
        waiting: FloatArray | None = None,
        noise: FloatArray | None = None,
    ) -> EngineState:
        """With defaults: nobody waits, service is as expected.

        Raises:
            QuantityError: a coefficient that is negative or unknown, or requests waiting on an engine that runs none.
        """
        none = np.zeros(len(ttft_s))
        running, waiting = none if running is None else running, none if waiting is None else waiting
        if queue_s is None:
            queue_s = none if not waiting.any() else np.full(len(ttft_s), np.nan)
        for name, column in (("ttft_s", ttft_s), ("prefill_s", prefill_s), ("tpot_s", tpot_s)):
            if not (np.isfinite(column) & (column >= 0)).all():
                raise QuantityError(f"engine state: {name} must be known and ≥ 0 for every model")
        stuck = np.flatnonzero(np.isnan(queue_s) & (waiting > 0) & ~(running > 0))
        if stuck.size:
            raise QuantityError(
                f"engine state: model {stuck[0]} has requests waiting and none running; give queue_s"
            )
        noise = np.ones((len(ttft_s), 1)) if noise is None else noise
        return cls(ttft_s, prefill_s, tpot_s, queue_s, running, waiting, noise)

    def wait(self, service_s: FloatArray) -> FloatArray:
        """Seconds in the queue, (M, I).

        Reported ones where they are; else by Little's law: with R running for `service_s` each, R/`service_s` leave a
        second, and W waiting take W·`service_s`/R.
        """
        by_counts = self.waiting / np.maximum(self.running, 1.0) * service_s
        queue: FloatArray = np.where(np.isnan(self.queue_s), by_counts, self.queue_s)
        return queue

    def seconds(self, uncached_input_tokens: FloatArray, output_tokens: FloatArray) -> FloatArray:
        """Expected seconds until the answer is complete, (M, I), from tokens (M, I); output is the expected one."""
        begin = self.ttft_s + self.prefill_s * uncached_input_tokens
        service = (begin + self.tpot_s * output_tokens) * self.noise.mean(axis=1)
        whole: FloatArray = service + self.wait(service)
        return whole

    def late(
        self,
        within_s: float,
        uncached_input_tokens: FloatArray,
        usage: UsageModel,
        classes: IntArray,
        length: FloatArray | None = None,
    ) -> FloatArray:
        """P(L > `within_s`), (M, I): what `Uses.late` needs to price a quantile SLA.

        Args:
            usage: distribution of output tokens; `classes` (M,) and `length` (M,) as in `UsageModel.predict`.
        """
        begin = self.ttft_s + self.prefill_s * uncached_input_tokens
        expected = (begin + self.tpot_s * usage.mean(classes, length)) * self.noise.mean(axis=1)
        left = np.maximum(within_s - self.wait(expected), 0.0)
        # Every ratio of the noise in one call: (S, M, I) → (S·M, I).
        spare = left / self.noise.T[:, None, :] - begin
        room = np.divide(spare, self.tpot_s, out=np.full_like(spare, np.inf), where=self.tpot_s > 0)
        count, n, i = spare.shape
        of_length = None if length is None else np.tile(length, count)
        over = usage.exceed(np.maximum(room, 0.0).reshape(-1, i), np.tile(classes, count), of_length)
        # Fewer tokens than none: late whatever the answer.
        late: FloatArray = np.where(spare < 0, 1.0, over.reshape(count, n, i)).mean(axis=0)
        return late


@dataclass(frozen=True, slots=True)
class LatencyModel:
    """Coefficients of `TERMS` for I models, learned from a log, with what they leave unexplained."""

    coefficients: FloatArray
    """Seconds, seconds per token, seconds per token, seconds per token and running request; ≥ 0, (I, 4)."""
    standard_errors: FloatArray
    """Of the coefficients before the bound at 0, robust to uneven variance (HC1; White 1980), (I, 4)."""
    noise: FloatArray
    """Observed over fitted seconds, equally likely, ascending, (I, SCENARIOS)."""

    @classmethod
    def fit(
        cls,
        latency_s: FloatArray,
        uncached_input_tokens: FloatArray,
        output_tokens: FloatArray,
        *,
        running: FloatArray | None = None,
        models: Sequence[str] | None = None,
    ) -> LatencyModel:
        """Learn from a log, all (N, I), NaN where unknown. `latency_s` is without the queue where that is known.

        Least squares with coefficients ≥ 0, on relative errors (a long answer may be late by more), by reweighting;
        outliers weigh less, and `noise` carries the mean they leave out.

        Raises:
            RecordError: a model with fewer than 20 rows whose seconds and tokens are known.
        """
        names = models or [f"model {i}" for i in range(latency_s.shape[1])]
        parts: list[tuple[FloatArray, FloatArray, FloatArray]] = []
        for i, name in enumerate(names):
            load = np.zeros(len(latency_s)) if running is None else running[:, i]
            out = output_tokens[:, i]
            table = np.stack((np.ones_like(out), uncached_input_tokens[:, i], out, out * load), axis=1)
            known = np.isfinite(table).all(axis=1) & (latency_s[:, i] > 0) & np.isfinite(latency_s[:, i])
            if known.sum() < 20:
                raise RecordError(
                    f"only {known.sum()} rows say how long '{name}' took for how many tokens; 20 are needed"
                )
            parts.append(_fit(table[known], latency_s[known, i]))
        coefficients, errors, noise = (np.stack(part) for part in zip(*parts, strict=True))
        return cls(coefficients, errors, noise)

    def state(
        self,
        running: FloatArray | None = None,
        waiting: FloatArray | None = None,
        queue_s: FloatArray | None = None,
    ) -> EngineState:
        """The engines at this load, each (I,); None reads an idle engine."""
        base, prefill, decode, congestion = self.coefficients.T
        load = np.zeros(len(base)) if running is None else running
        return EngineState.of(
            ttft_s=base,
            prefill_s=prefill,
            tpot_s=decode + congestion * load,
            queue_s=queue_s,
            running=load,
            waiting=waiting,
            noise=self.noise,
        )


def _fit(table: FloatArray, seconds: FloatArray) -> tuple[FloatArray, FloatArray, FloatArray]:
    """Coefficients, standard errors, noise of one model from its terms (n, 4) and seconds (n,)."""
    scale = np.maximum(np.abs(table).max(axis=0), 1e-300)
    x = table / scale
    weight = 1 / seconds
    beta = np.zeros(x.shape[1])
    for _ in range(ROUNDS):
        beta = nnls(x * weight[:, None], seconds * weight)[0]
        fitted = np.maximum(x @ beta, 0.01 * np.median(seconds))
        relative = seconds / fitted - 1
        usual = HUBER * 1.4826 * np.median(np.abs(relative - np.median(relative)))
        trust = np.minimum(usual / np.maximum(np.abs(relative), 1e-12), 1.0) if usual > 0 else 1.0
        weight = np.sqrt(trust) / fitted
    fitted = np.maximum(x @ beta, 0.01 * np.median(seconds))
    xw, miss = x * weight[:, None], (seconds - x @ beta) * weight
    inverse = np.linalg.pinv(xw.T @ xw)
    meat = (xw * miss[:, None]).T @ (xw * miss[:, None])
    n, k = x.shape
    variance = np.diag(inverse @ meat @ inverse) * n / max(n - k, 1)
    return (
        beta / scale,
        np.sqrt(np.maximum(variance, 0.0)) / scale,
        equal_slices(seconds / fitted, count=SCENARIOS),
    )
