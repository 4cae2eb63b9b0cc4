"""Profiles fitted to whole steps (a user's own, or published), and to latencies of closed loops at several batch sizes.

Both are one non-negative least squares, in relative error. The token-wise work of t tokens is a sum of shapes that GPUs are
known to give it: in proportion to t; 1 − exp(−t/τ), as weights of experts that some token has touched are read once; and
more steeply above where arithmetic takes over from memory. What is left out of a fit says how well it holds.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray
from scipy.optimize import brentq, nnls

from walras.engine.profiles import FitError, Limits, Profile, load_profile, pairs
from walras.engine.replay import Replay
from walras.engine.requests import Requests
from walras.engine.settings import EngineSettings
from walras.engine.steps import FloatArray
from walras.errors import RecordError
from walras.records.read import columns_of, read_records

IntArray = NDArray[np.int64]
BoolArray = NDArray[np.bool_]

TOUCHED = (4.0, 16.0, 64.0, 256.0)
"""τ, tokens."""
BUSY = (512.0, 2048.0)
"""Tokens above each of which the work may grow more steeply."""
KNOTS = np.unique(np.geomspace(1, 1 << 15, 46).round())
"""Where the fitted curve is written down."""
FOLDS = 5
LEAST_FACTOR, CLOSE = 0.1, 1e-4
"""A profile is not wrong by more than this, nor known to more than that."""
CALM = 8
"""Steps full of prompts: a closed loop whose users together bring no more has no queue worth the name."""


@dataclass(frozen=True, slots=True)
class StepRows:
    """Measured steps, (N,) columns; `group` numbers the conditions that held-out error keeps together."""

    prefill: FloatArray
    """New prompt tokens."""
    pairs: FloatArray
    """(new token × KV token) pairs of their attention."""
    sequences: FloatArray
    kv: FloatArray
    seconds: FloatArray
    group: IntArray

    def design(self) -> FloatArray:
        """(N, unknowns) what each is multiplied by: overhead, sequences, KV tokens, pairs, then those of `_work`."""
        first = np.column_stack([np.ones(len(self.prefill)), self.sequences, self.kv, self.pairs])
        return np.concatenate([first, _work(self.prefill + self.sequences)], axis=1)


def _work(tokens: FloatArray) -> FloatArray:
    """(N, shapes) token-wise work."""
    touched = [-np.expm1(-tokens / tau) for tau in TOUCHED]
    return np.column_stack([tokens, *touched, *(np.maximum(0.0, tokens - above) for above in BUSY)])


STEP_COLUMNS = {
    "prefill_tokens": "new prompt tokens in the step",
    "sequences": "decoding sequences in the step, each with one new token",
    "kv_tokens": "KV tokens that these sequences read, summed over them",
    "seconds": "how long the step took",
    "cached_tokens": "KV tokens before the new prompt tokens, summed over prompts; left out, none",
    "prompts": "prompts that the new prompt tokens belong to, all alike; left out, one",
}
"""A user's own profile, one measured step a row: column → meaning. The last two may be left out."""


def read_profile(which: str) -> Profile:
    """What `--profile` names: a shipped profile, one that was saved (.json), or measured steps (.csv, .parquet, .jsonl).

    A profile of measured steps has the limits that were measured up to.

    Raises:
        SettingsError: no such name; names the nearest.
        RecordError: a file that is no profile; names row and column.
    """
    path = Path(which)
    if path.suffix not in (".csv", ".parquet", ".pq", ".jsonl", ".ndjson", ".gz"):
        return load_profile(which)
    rows = read_steps(path)
    limits = Limits(
        kv_tokens=int(max(rows.kv.max(), rows.prefill.max())),
        most_sequences=int(rows.sequences.max()),
        step_tokens=int((rows.prefill + rows.sequences).max()),
    )
    return fit_steps(path.stem, f"steps measured in {path.name}", rows, limits, path=path)


def read_steps(path: Path) -> StepRows:
    """Measured steps from a file with the columns of `STEP_COLUMNS`; equal contents are one condition.

    Raises:
        RecordError: no such column, a value that is missing, negative or not finite, a step of no content or no time.
    """
    names = columns_of(path)
    have = [name for place, name in enumerate(STEP_COLUMNS) if place < 4 or name in names]
    batches = [batch for _, batch in read_records(path, (), extra=have)]
    column = {name: pa.chunked_array([batch.column(name) for batch in batches]).to_numpy() for name in have}
    one, none = np.ones(len(column["seconds"])), np.zeros(len(column["seconds"]))
    prompts, cached = column.get("prompts", one), column.get("cached_tokens", none)
    prefill, sequences = column["prefill_tokens"], column["sequences"]
    for name, wrong, problem in (
        *((name, np.isnan(values), "is missing") for name, values in column.items()),
        ("seconds", column["seconds"] == 0, "is 0: every step takes time"),
        ("sequences", sequences + prefill == 0, "is 0, and so is prefill_tokens"),
        ("prompts", prompts == 0, "is 0"),
    ):
        if wrong.any():
            raise RecordError(problem, path=path, row=int(np.argmax(wrong)) + 1, field=name)
    content = np.column_stack([prefill, cached, prompts, sequences, column["kv_tokens"]])
    _, group = np.unique(content, axis=0, return_inverse=True)
    return StepRows(
        prefill=prefill,
        pairs=prompts * pairs(prefill / prompts, cached / prompts),
        sequences=sequences,
        kv=column["kv_tokens"],
        seconds=column["seconds"],
        group=group.reshape(-1).astype(np.int64),
    )


def fit_steps(
    name: str,
    source: str,
    rows: StepRows,
    limits: Limits,
    *,
    held_out_by: str = "content",
    path: Path | None = None,
) -> Profile:
    """A profile from measured whole steps.

    Raises:
        RecordError: fewer than two different steps that prefill, or that only decode; names the file, where given.
    """
    prefills, decodes = rows.prefill > 0, (rows.prefill == 0) & (rows.sequences > 0)
    for what, column, values in (
        ("that prefill", "prefill_tokens", rows.prefill[prefills]),
        ("that only decode", "sequences", (rows.sequences + rows.kv)[decodes]),
    ):
        if len(np.unique(values)) < 2:
            raise RecordError(
                f"has {len(np.unique(values))} size(s) of steps {what}: fixed time and work cannot be told apart",
                path=path,
                field=column,
                hint="measure at least two sizes",
            )
    design = rows.design()
    predicted = np.empty(len(rows.seconds))
    folds = _folds(rows.group)
    for fold in range(folds.max() + 1):
        out = folds == fold
        predicted[out] = design[out] @ _solve(design[~out], rows.seconds[~out])
    error = FitError.of(predicted, rows.seconds, held_out_by)
    return _from_solution(name, source, error, _solve(design, rows.seconds), limits)


def _folds(group: IntArray) -> IntArray:
    """A fold for each row: groups dealt out in turn, so that every group is held out once."""
    _, place = np.unique(group, return_inverse=True)
    return np.asarray(place % min(FOLDS, place.max() + 1), dtype=np.int64)


def _solve(design: FloatArray, seconds: FloatArray) -> FloatArray:
    """The unknowns ≥ 0 of least squared relative error."""
    weighted = design / seconds[:, None]
    scale = np.maximum(np.linalg.norm(weighted, axis=0), 1e-300)
    found, _ = nnls(weighted / scale, np.where(design.any(axis=1), 1.0, 0.0))
    return np.asarray(found / scale, dtype=np.float64)


def _from_solution(name: str, source: str, error: FitError, found: FloatArray, limits: Limits) -> Profile:
    overhead_s, each_s, kv_s, pair_s = found[:4]
    ends = np.array([1.0, float(max(2, limits.most_sequences))])
    return Profile(
        name=name,
        source=source,
        error=error,
        overhead_s=float(overhead_s),
        pair_s=float(pair_s),
        tokens=KNOTS,
        dense_s=_work(KNOTS) @ found[4:],
        sequences=ends,
        decode_s=each_s * ends,
        decode_kv_s=np.full(2, kv_s),
        mixed_s=each_s * ends,
        mixed_kv_s=np.full(2, kv_s),
        limits=limits,
    )


@dataclass(frozen=True, slots=True)
class Loads:
    """Closed loops of `batch` users who ask anew when answered: lengths, and mean latencies measured, (N,) columns."""

    input_tokens: FloatArray
    output_tokens: FloatArray
    batch: FloatArray
    tpot_s: FloatArray
    ttft_s: FloatArray

    def take(self, rows: BoolArray) -> Loads:
        return Loads(
            self.input_tokens[rows],
            self.output_tokens[rows],
            self.batch[rows],
            self.tpot_s[rows],
            self.ttft_s[rows],
        )

    def equations(self, step_tokens: int) -> tuple[FloatArray, FloatArray]:
        """(2N, unknowns) design and (2N,) seconds: of the mean step, and of the first token of a loop that has no queue.

        While a user is answered, every other prompt is computed once: chunks of prompts share `output_tokens` steps, one in
        each as long as there are more steps than chunks. A first token waits for one step and its own chunks; the last
        unknown is what it waits for outside of the engine. Rows that would queue are zero.
        """
        zero, none = np.zeros(len(self.batch)), np.zeros(len(self.batch), dtype=np.int64)
        kv = self.batch * (self.input_tokens + self.output_tokens / 2)
        chunks = np.ceil(self.input_tokens / step_tokens)
        alone = StepRows(zero, zero, self.batch, kv, self.tpot_s, none).design()
        share = np.minimum(1.0, self.batch * chunks / self.output_tokens)
        each = self.batch / (self.output_tokens * share)
        pair = pairs(self.input_tokens, zero)
        mixed = StepRows(each * self.input_tokens, each * pair, self.batch, kv, self.tpot_s, none).design()
        own = StepRows(self.input_tokens / chunks, pair / chunks, self.batch, kv, self.tpot_s, none).design()
        mean = (1 - share)[:, None] * alone + share[:, None] * mixed
        calm = (self.batch * self.input_tokens <= CALM * step_tokens) | (self.batch == self.batch.min())
        first = np.column_stack([alone + chunks[:, None] * own, np.ones(len(calm))]) * calm[:, None]
        design = np.concatenate([np.column_stack([mean, zero]), first])
        return design, np.concatenate([self.tpot_s, self.ttft_s])


def fit_closed_loop(name: str, source: str, loads: Loads, limits: Limits) -> tuple[Profile, float]:
    """A profile from mean latencies of closed loops at several batch sizes; and what a first token waits for outside, seconds.

    The error is that of the time per output token at each batch size but the least and the greatest, left out in turn.

    Raises:
        RecordError: fewer than three batch sizes.
    """
    sizes = np.unique(loads.batch)
    if len(sizes) < 3:
        raise RecordError(f"{len(sizes)} batch sizes: three are needed, to leave one out", field="batch_size")
    design, _ = loads.equations(limits.step_tokens)
    predicted = np.zeros(len(loads.batch))
    for size in sizes[1:-1]:
        out = loads.batch == size
        found = _solve(*loads.take(~out).equations(limits.step_tokens))
        predicted[out] = (design[: len(out)] @ found)[out]
    inner = predicted > 0
    error = FitError.of(predicted[inner], loads.tpot_s[inner], "batch size")
    found = _solve(*loads.equations(limits.step_tokens))
    return _from_solution(name, source, error, found[:-1], limits), float(found[-1])


def calibrate(profile: Profile, settings: EngineSettings, requests: Requests, tpot_s: float) -> Profile:
    """The profile with what a measured run says it left out: seconds more in each step, or all of them less by a factor.

    Args:
        requests: what the run served; `tpot_s` is the mean time per output token that it measured.
    """

    def off(tried: Profile) -> float:
        steps = tried.steps(settings.max_batched_tokens, settings.max_sequences)
        return float(Replay(settings, steps, None, requests).run().served().tpot_s.mean()) - tpot_s

    if off(profile) > 0:
        factor = brentq(lambda one: off(profile.scaled(one)), LEAST_FACTOR, 1.0, xtol=CLOSE)
        return profile.scaled(float(factor))
    more = brentq(lambda one: off(_longer(profile, one * tpot_s)), 0.0, 1.0, xtol=CLOSE)
    return _longer(profile, float(more) * tpot_s)


def _longer(profile: Profile, seconds: float) -> Profile:
    return dataclasses.replace(profile, overhead_s=profile.overhead_s + seconds)
