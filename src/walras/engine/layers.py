"""A profile from the times of single layers: what a step adds up to, and what unequal contexts cost on top of it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray
from scipy.optimize import nnls

from walras.engine.profiles import FitError, Limits, Profile, pairs
from walras.engine.steps import FloatArray
from walras.errors import RecordError

IntArray = NDArray[np.int64]
BoolArray = NDArray[np.bool_]

LAYER_KNOTS = np.array([1, 8, 16, 32, 64, 128, 192, 256, 384, 512, 768, 1024, 1280, 1536, 1792, 2048.0])
ONCE = ("embedding", "final_layernorm")
TWICE = ("layernorm",)
"""Layers that run once a step, and twice in every transformer layer; all others once in each."""
SHORT_CHUNK, LONG_CHUNK = 16, 256
"""Prefill chunks, tokens: one that leaves a GPU idle, and the least that fills it."""
UNSPLIT = 1.6
"""Decode attention splits long reads over processors while sequences × KV heads fill less than this many of them all."""
SPLIT_SKEW = 0.03
"""What a split read still costs of the difference between the longest context and the mean."""
LEAST_LENGTHS = 4
LEAST_KV, MOST_KV = 128, 1 << 18
"""KV tokens, of one sequence and of all, between which the error of a fit is taken."""


@dataclass(frozen=True, slots=True)
class Shape:
    """What the layer files do not say about a model on its GPUs."""

    layers: int
    kv_heads: int
    """KV heads on one GPU."""
    processors: int
    """Streaming multiprocessors of the GPU."""
    ranks: int = 1
    """Data-parallel ranks that step together; the replica is all of them, decoding spread evenly, a prompt on one."""
    more_s: Callable[[FloatArray], FloatArray] | None = None
    """Seconds a step, by its tokens (of all ranks), of what was not timed: experts, collectives."""
    spread: float = 0.15
    """The longest of n contexts counts as 1 + spread · ln n times their mean: what it reads beyond the others it reads alone,
    as slowly as a short prefill. 0.15 met two measured runs of chat requests best."""


@dataclass(frozen=True, slots=True)
class _Attention:
    """Seconds of one layer's attention: at `sequences` decoding, alone or beside a prompt; and of the prompt itself."""

    sequences: FloatArray
    alone_s: FloatArray
    alone_kv_s: FloatArray
    mixed_s: FloatArray
    mixed_kv_s: FloatArray
    pair_s: float
    prompt_s: float
    reach_s: float
    """Per KV token, of a prefill too short to fill the GPU."""

    def predict(self, chunk: FloatArray, cached: FloatArray, n: FloatArray, kv: FloatArray) -> FloatArray:
        """Seconds by prefill chunk, KV tokens before it, decoding sequences and KV tokens of each."""
        alone = (
            np.interp(n, self.sequences, self.alone_s)
            + np.interp(n, self.sequences, self.alone_kv_s) * n * kv
        )
        mixed = (
            np.interp(n, self.sequences, self.mixed_s)
            + np.interp(n, self.sequences, self.mixed_kv_s) * n * kv
        )
        decode = np.where(n == 0, np.where(chunk > 0, self.prompt_s, 0.0), np.where(chunk > 0, mixed, alone))
        return np.asarray(decode + self.pair_s * pairs(chunk, cached), dtype=np.float64)


def fit_layers(
    name: str,
    source: str,
    tables: tuple[pa.Table, pa.Table, pa.Table],
    shape: Shape,
    limits: Limits,
) -> Profile:
    """A profile from the times of single layers of one GPU, model and degree, in the columns of LLMServingSim's files.

    Args:
        tables: dense (`layer`, `tokens`, `time_us`), attention (`prefill_chunk`, `kv_prefill`, `n_decode`, `kv_decode`:
            each sequence's, `time_us`), per sequence (`layer`, `sequences`, `time_us`).

    The error is that of a layer (attention and token-wise work), at KV lengths left out of the fit, as far as memory goes.

    Raises:
        RecordError: a table with too few points: names the column.
    """
    dense, attention, per_sequence = tables
    layer_s, once_s = _dense_at(dense, LAYER_KNOTS)
    chunk, cached, n, kv, us = (
        attention[key].to_numpy().astype(np.float64)
        for key in ("prefill_chunk", "kv_prefill", "n_decode", "kv_decode", "time_us")
    )
    lengths = np.unique(kv[n > 0])
    if len(lengths) < LEAST_LENGTHS:
        raise RecordError(
            f"{len(lengths)} KV length(s): {LEAST_LENGTHS} are needed, half of them to test on",
            field="kv_decode",
        )
    rest = np.interp(chunk + n, LAYER_KNOTS, layer_s)
    real = (us * 1e-6, rest)
    held = np.isin(kv, lengths[1::2]) & (n > 0)
    usual = held & (kv >= LEAST_KV) & (n * kv + cached + chunk <= min(limits.kv_tokens, MOST_KV))
    tried = _fit_attention(chunk, cached, n, kv, real, ~held)
    error = FitError.of(
        tried.predict(chunk, cached, n, kv)[usual] + rest[usual], (us * 1e-6 + rest)[usual], "KV length"
    )
    found = _fit_attention(chunk, cached, n, kv, real, np.ones(len(us), dtype=np.bool_))
    return _assemble(name, source, error, (layer_s, once_s), found, per_sequence, shape, limits)


def _dense_at(dense: pa.Table, at: FloatArray) -> tuple[FloatArray, FloatArray]:
    """Seconds of the token-wise work of one transformer layer, and of what runs once a step, at so many tokens."""
    layer_s, once_s = np.zeros(len(at)), np.zeros(len(at))
    names = np.asarray(dense["layer"].to_pylist())
    tokens, us = dense["tokens"].to_numpy(), dense["time_us"].to_numpy()
    for layer in np.unique(names):
        mine = np.flatnonzero(names == layer)
        mine = mine[np.argsort(tokens[mine], kind="stable")]
        if len(mine) < 2:
            raise RecordError(
                f"layer '{layer}' has {len(mine)} point: two are needed to see how its time grows",
                field="tokens",
            )
        seconds = np.interp(at, tokens[mine], us[mine]) * 1e-6
        if layer in ONCE:
            once_s += seconds
        else:
            layer_s += seconds * (2 if layer in TWICE else 1)
    return layer_s, once_s


def _fit_attention(
    chunk: FloatArray,
    cached: FloatArray,
    n: FloatArray,
    kv: FloatArray,
    real: tuple[FloatArray, FloatArray],
    use: BoolArray,
) -> _Attention:
    """Lines in KV tokens for each number of sequences, weighted by the time of the whole layer (attention, rest)."""
    seconds, weight = real[0], 1 / (real[0] + real[1])
    prompts = use & (n == 0) & (chunk >= LONG_CHUNK)
    prompt_s, pair_s = _line(
        pairs(chunk, cached)[prompts], seconds[prompts], weight[prompts], "prefill_chunk"
    )
    short = use & (n == 0) & (chunk == SHORT_CHUNK)
    _, reach_s = _line(cached[short], seconds[short], weight[short], "kv_prefill")
    alone = use & (n > 0) & (chunk == 0)
    mixed = use & (n > 0) & (chunk >= LONG_CHUNK)
    sequences, alone_s, alone_kv_s = _lines(n, kv, seconds, weight, alone)
    beside = seconds - pair_s * pairs(chunk, cached)
    few, few_s, few_kv_s = _lines(n, kv, beside, weight, mixed)
    mixed_s = np.interp(sequences, few, few_s) * np.maximum(1.0, sequences / few[-1])
    mixed_kv_s = np.interp(sequences, few, few_kv_s)
    return _Attention(sequences, alone_s, alone_kv_s, mixed_s, mixed_kv_s, pair_s, prompt_s, reach_s)


def _lines(
    n: FloatArray, kv: FloatArray, seconds: FloatArray, weight: FloatArray, use: BoolArray
) -> tuple[FloatArray, FloatArray, FloatArray]:
    """Numbers of sequences, and for each the intercept and slope in the KV tokens that they read together."""
    counts = np.unique(n[use])
    if not counts.size:
        raise RecordError(
            f"no prefill chunk of {LONG_CHUNK} tokens, or none without a prefill", field="prefill_chunk"
        )
    found = np.empty((2, len(counts)))
    for i, count in enumerate(counts):
        mine = use & (n == count)
        found[:, i] = _line((n * kv)[mine], seconds[mine], weight[mine], "kv_decode")
    return counts, found[0], found[1]


def _line(x: FloatArray, y: FloatArray, weight: FloatArray, column: str) -> tuple[float, float]:
    """Intercept and slope, both ≥ 0, by weighted least squares."""
    if len(np.unique(x)) < 2:
        raise RecordError(
            f"{len(np.unique(x))} point to fit a line: two are needed to see how time grows", field=column
        )
    design = np.column_stack([np.ones(len(x)), x]) * weight[:, None]
    scale = np.linalg.norm(design, axis=0)
    found, _ = nnls(design / scale, y * weight)
    return float(found[0] / scale[0]), float(found[1] / scale[1])


def _assemble(
    name: str,
    source: str,
    error: FitError,
    dense: tuple[FloatArray, FloatArray],
    attention: _Attention,
    per_sequence: pa.Table,
    shape: Shape,
    limits: Limits,
) -> Profile:
    """One rank's layers, times layers and ranks, plus heads and what contexts of unequal length cost."""
    unsplit = UNSPLIT * shape.processors / shape.kv_heads
    n = np.unique(np.concatenate([attention.sequences, [np.floor(unsplit), np.floor(unsplit) + 1]]))
    n = n[n <= attention.sequences[-1]]
    alone_s, alone_kv_s, mixed_s, mixed_kv_s = (
        np.interp(n, attention.sequences, line)
        for line in (attention.alone_s, attention.alone_kv_s, attention.mixed_s, attention.mixed_kv_s)
    )
    beyond = shape.spread * np.log(n)
    straggle = attention.reach_s * beyond / n
    alone_kv_s = alone_kv_s + np.where(n >= unsplit, straggle, SPLIT_SKEW * beyond * alone_kv_s)
    mixed_kv_s = mixed_kv_s + np.minimum(straggle, beyond * mixed_kv_s)
    head = _head_at(per_sequence, n)
    of_all = LAYER_KNOTS * shape.ranks
    by_prompt = np.minimum(of_all, limits.most_sequences) / shape.ranks + np.maximum(
        0.0, of_all - limits.most_sequences
    )
    layer_s, once_s = (np.interp(by_prompt, LAYER_KNOTS, curve) for curve in dense)
    more_s = shape.more_s(of_all) if shape.more_s else np.zeros(len(of_all))
    return Profile(
        name=name,
        source=source,
        error=error,
        overhead_s=float(head[0]),
        pair_s=attention.pair_s * shape.layers,
        tokens=of_all,
        dense_s=layer_s * shape.layers + once_s + more_s,
        sequences=n * shape.ranks,
        decode_s=alone_s * shape.layers + head - head[0],
        decode_kv_s=alone_kv_s * shape.layers / shape.ranks,
        mixed_s=mixed_s * shape.layers + head - head[0],
        mixed_kv_s=mixed_kv_s * shape.layers / shape.ranks,
        limits=limits,
    )


def _head_at(per_sequence: pa.Table, n: FloatArray) -> FloatArray:
    """Seconds of the head and the sampler by sequences."""
    names = np.asarray(per_sequence["layer"].to_pylist())
    sequences, us = per_sequence["sequences"].to_numpy(), per_sequence["time_us"].to_numpy()
    total = np.zeros(len(n))
    for layer in np.unique(names):
        mine = np.flatnonzero(names == layer)
        mine = mine[np.argsort(sequences[mine], kind="stable")]
        total += np.interp(n, sequences[mine], us[mine]) * 1e-6
    return total
