"""Profiles: step times of a replica with their source and error. Shipped ones by name, a user's from a file.

A profile keeps curves of a few knots, what they were fitted to, and how well they met what was left out of the fit.
Those in profiles.json are fitted numbers with their sources, not copies of the measurements.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from walras.engine.steps import FloatArray, StepTimes
from walras.errors import RecordError, SettingsError, nearest

SHIPPED = Path(__file__).with_name("profiles.json")
CURVES = ("decode_s", "decode_kv_s", "mixed_s", "mixed_kv_s")


@dataclass(frozen=True, slots=True)
class FitError:
    """Relative error |predicted/measured − 1| on measurements left out of the fit."""

    median: float
    p95: float
    rows: int
    held_out_by: str
    """Rows that share this are never on both sides."""

    @classmethod
    def of(cls, predicted: FloatArray, measured: FloatArray, held_out_by: str) -> FitError:
        off = np.abs(predicted / measured - 1)
        return cls(float(np.median(off)), float(np.percentile(off, 95)), len(off), held_out_by)


@dataclass(frozen=True, slots=True)
class Limits:
    """What a replica holds and takes into a step."""

    kv_tokens: int
    """KV tokens in its memory."""
    most_sequences: int
    """Sequences it runs at once."""
    step_tokens: int
    """New tokens in one step."""
    steps_ahead: int = 1
    """Steps by which composing a step runs ahead of results: 1 under asynchronous scheduling, else 0."""


@dataclass(frozen=True, slots=True)
class Profile:
    """Step times of one replica as curves with a few knots, straight between them and beyond the last."""

    name: str
    source: str
    """Whose measurements, of what, under which licence."""
    error: FitError
    overhead_s: float
    pair_s: float
    """As `StepTimes.prefill_pair_s`."""
    tokens: FloatArray
    dense_s: FloatArray
    """At `tokens` new tokens in the step."""
    sequences: FloatArray
    decode_s: FloatArray
    decode_kv_s: FloatArray
    mixed_s: FloatArray
    mixed_kv_s: FloatArray
    """At `sequences` decoding sequences."""
    limits: Limits

    def steps(self, step_tokens: int | None = None, most_sequences: int | None = None) -> StepTimes:
        """Tables for steps of up to so many new tokens and decoding sequences; left out, the profile's own limits."""
        sequences = most_sequences or self.limits.most_sequences
        tokens = (step_tokens or self.limits.step_tokens) + sequences
        return StepTimes(
            overhead_s=self.overhead_s,
            dense_s=_table(self.tokens, self.dense_s, tokens),
            prefill_pair_s=self.pair_s,
            **{name: _table(self.sequences, getattr(self, name), sequences) for name in CURVES},
        )

    def scaled(self, factor: float) -> Profile:
        """The same with every second times `factor`: what whole runs say the parts left out."""
        seconds = ("overhead_s", "pair_s", "dense_s", *CURVES)
        return dataclasses.replace(self, **{name: getattr(self, name) * factor for name in seconds})


def pairs(chunk: FloatArray, cached: FloatArray) -> FloatArray:
    """(new token × KV token) pairs of a chunk after so many cached tokens."""
    return np.asarray(chunk * cached + chunk * (chunk + 1) / 2, dtype=np.float64)


def _table(knots: FloatArray, values: FloatArray, most: int) -> FloatArray:
    """(most+1,) values at 0, 1, …: 0 at 0, straight between knots, and on with the last slope where it rises."""
    at = np.arange(most + 1, dtype=np.float64)
    table = np.interp(at, knots, values)
    slope = max(0.0, float((values[-1] - values[-2]) / (knots[-1] - knots[-2])))
    table += slope * np.maximum(0.0, at - knots[-1])
    table[0] = 0.0
    return np.asarray(table, dtype=np.float64)


def shipped() -> list[str]:
    """Names of the profiles that come with Walras."""
    return [record["name"] for record in _shipped()]


def load_profile(which: str) -> Profile:
    """A shipped profile by its name, or one that `save_profiles` wrote, by its path.

    Raises:
        SettingsError: no such name; names the nearest.
        RecordError: a file that is not a profile.
    """
    if which.endswith(".json"):
        path = Path(which)
        try:
            (record,) = json.loads(path.read_text(encoding="utf-8"))
            return _from_record(record)
        except (OSError, ValueError, TypeError, KeyError) as problem:
            raise RecordError(
                f"not a profile: {problem}",
                path=path,
                hint="write one with walras.engine.profiles.save_profiles",
            ) from problem
    for record in _shipped():
        if record["name"] == which:
            return _from_record(record)
    raise SettingsError(f"no profile '{which}'", key="--profile", hint=nearest(which, shipped()))


def save_profiles(profiles: Iterable[Profile], path: Path) -> None:
    """Write profiles as JSON, numbers to six digits."""
    lines = ",\n".join(json.dumps(_to_record(profile), ensure_ascii=False) for profile in profiles)
    path.write_text(f"[\n{lines}\n]\n", encoding="utf-8")


def _shipped() -> list[dict[str, Any]]:
    records: list[dict[str, Any]] = json.loads(SHIPPED.read_text(encoding="utf-8"))
    return records


def _to_record(profile: Profile) -> dict[str, Any]:
    record: dict[str, Any] = _rounded(dataclasses.asdict(profile))
    return record


def _rounded(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _rounded(item) for key, item in value.items()}
    if isinstance(value, np.ndarray):
        return [_rounded(item) for item in value.tolist()]
    return float(f"{value:.6g}") if isinstance(value, float) else value


def _from_record(record: Mapping[str, Any]) -> Profile:
    columns: dict[str, Any] = {
        key: np.array(value, dtype=np.float64) if isinstance(value, list) else value
        for key, value in record.items()
    }
    return Profile(**{**columns, "error": FitError(**record["error"]), "limits": Limits(**record["limits"])})
