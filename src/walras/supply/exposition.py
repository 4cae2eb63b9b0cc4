"""What an engine's metrics endpoint says at one moment: its page, read by the names of its type and version."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

from prometheus_client import Metric, parser
from prometheus_client.openmetrics import parser as openmetrics_parser

from walras.errors import RecordError
from walras.settings import EngineKind
from walras.supply.names import (
    COUNTED,
    ENGINES,
    LIMITS,
    MEANING,
    SHARES,
    Formula,
    Limit,
    Quantity,
    Series,
    kind_of,
)

Labels = tuple[tuple[str, str], ...]
Samples = Mapping[str, Mapping[Labels, float]]
"""By name, then by sorted labels."""
STARTED = "process_start_time_seconds"
SIMULATED = "walras_simulated"
ALL = ""
"""The replica of what an endpoint says of all together, or of its only one."""


def parse(body: bytes, content_type: str = "") -> Samples:
    """The samples of a page in Prometheus's text format, or in OpenMetrics' where its type says so.

    Timestamps are left out, since the clock of an engine may be wrong.

    Raises:
        RecordError: not such a page; says what it looks like.
    """
    start = body[:200].lstrip().lower()
    if start.startswith((b"{", b"[")):
        hint = "TensorRT-LLM has its Prometheus page at /prometheus/metrics"
        raise RecordError("answers JSON, which is no Prometheus page", hint=hint)
    if start.startswith(b"<"):
        raise RecordError(
            "answers HTML, which is no Prometheus page", hint="most engines have it at /metrics"
        )
    found: dict[str, dict[Labels, float]] = {}
    try:
        for family in _families(body.decode(), content_type):
            for sample in family.samples:
                name = sample.name.replace("trtllm:", "trtllm_", 1)  # as Dynamo wrote it up to 0.7
                found.setdefault(name, {})[tuple(sorted(sample.labels.items()))] = float(sample.value)
    except Exception as error:  # the client library's parsers raise whatever goes wrong in them
        raise RecordError(f"is no Prometheus page: {error}") from error
    return found


def _families(text: str, content_type: str) -> Iterable[Metric]:
    """OpenMetrics is parsed whole, as it must be. Of the older format only what is read: most lines of a page are buckets, and the
    parser is slow."""
    if "openmetrics" in content_type:
        # prometheus-client declares no types here.
        whole: Iterable[Metric] = openmetrics_parser.text_string_to_metric_families(text)  # type: ignore[no-untyped-call]
        return whole
    wanted = (line for line in text.split("\n") if line[:1] != "#" and "_bucket{" not in line)
    return parser.text_string_to_metric_families("\n".join(wanted))


@dataclass(frozen=True, slots=True)
class Value:
    """A quantity at one moment, or two counters one of which is over the other."""

    above: float
    below: float | None = None

    @property
    def now(self) -> float:
        return self.above if self.below is None else self.above / self.below if self.below else 0.0


@dataclass(frozen=True, slots=True)
class Page:
    """An engine at one moment: quantities by replica, and what cannot be read, with the reason."""

    kind: EngineKind
    values: Mapping[str, Mapping[Quantity, Value]]
    """By replica, then by quantity. Counters are as they stand, since the start of the engine."""
    read_by: Mapping[Quantity, str]
    """The formula that each was read by."""
    missing: Mapping[Quantity, str]
    limits: Mapping[Limit, int]
    """Of one replica."""
    started_s: float | None
    """When the process says that it began: tells a restart, and nothing else."""
    simulated: bool


def read_page(samples: Samples, kind: EngineKind | None = None, model: str | None = None) -> Page:
    """What the samples say of an engine of this type, else of the one they look like.

    Args:
        model: only series of this model count, of those that name one.

    Raises:
        RecordError: no engine's metrics, or those of another; no replica in them.
    """
    looks = kind_of(list(samples))
    if looks is None:
        raise RecordError("has no metrics of a serving engine", hint=_how(kind))
    names = [name for name in samples if name.startswith(ENGINES[kind or looks].prefixes)]
    if not names:
        hint = f'say kind = "{looks}"'
        raise RecordError(f"looks like {ENGINES[looks].title}, not {ENGINES[kind or looks].title}", hint=hint)
    kind = kind or looks
    kept = {name: _kept(kind, series, model) for name, series in samples.items()}
    found, read_by, missing = _quantities(kind, kept)
    replicas = sorted({r for by in found.values() for r in by if r != ALL}) or [ALL]
    if not found:
        named = f" of model '{model}'" if model else ""
        raise RecordError(f"says nothing of requests{named}", hint=_how(kind))
    values = {r: _of_replica(found, r, len(replicas)) for r in replicas}
    limits = {q: int(values[replicas[0]][q].now) for q in LIMITS if q in values[replicas[0]]}
    started = max(samples.get(STARTED, {}).values(), default=math.nan)
    return Page(
        kind=kind,
        values=values,
        read_by=read_by,
        missing=missing,
        limits={q: n for q, n in limits.items() if n > 0},
        started_s=started if math.isfinite(started) else None,
        simulated=SIMULATED in samples,
    )


def _how(kind: EngineKind | None) -> str:
    if kind is None:
        return "the engines that can be read are " + ", ".join(e.title for e in ENGINES.values())
    return f"{ENGINES[kind].title}: {ENGINES[kind].turn_on}"


def _kept(
    kind: EngineKind, series: Mapping[Labels, float], model: str | None
) -> list[tuple[dict[str, str], float]]:
    """Series that count, once each."""
    engine, kept = ENGINES[kind], dict[Labels, tuple[dict[str, str], float]]()
    for pairs, value in sorted(series.items()):
        labels = dict(pairs)
        named = labels.get("model_name", labels.get("model"))
        if model is not None and named is not None and named != model:
            continue
        if any(labels.get(label, value_) != value_ for label, value_ in engine.only):
            continue
        kept.setdefault(tuple(p for p in pairs if p[0] not in engine.copies), (labels, value))
    return list(kept.values())


Kept = Mapping[str, list[tuple[dict[str, str], float]]]
ByReplica = dict[str, Value]


def _quantities(
    kind: EngineKind, samples: Kept
) -> tuple[dict[Quantity, ByReplica], dict[Quantity, str], dict[Quantity, str]]:
    """Each quantity by replica, the formula it was read by, and why others cannot be."""
    found: dict[Quantity, ByReplica] = {}
    read_by: dict[Quantity, str] = {}
    missing: dict[Quantity, str] = {}
    for quantity, formulas in ENGINES[kind].formulas.items():
        missing[quantity] = "not exported"
        for formula in formulas:
            if not all(_there(s, quantity, samples) for s in (*formula.above, *formula.below)):
                continue
            values = _evaluate(kind, formula, samples)
            problem = _wrong(quantity, values.values())
            if problem:
                missing[quantity] = f"{formula.text} is {problem}"
                continue
            found[quantity], read_by[quantity] = values, formula.text
            del missing[quantity]
            break
    return found, read_by, missing


def _there(series: Series, quantity: Quantity, samples: Kept) -> bool:
    """Whether there is such a sample. Of counters that engines make at the first use, another label stands for a count of 0."""
    found = samples.get(series.name, ())
    if quantity in COUNTED:
        return bool(found)
    return not series.name or any(_is(labels, series) for labels, _ in found)


def _is(labels: Mapping[str, str], series: Series) -> bool:
    return all(labels.get(name) == wanted for name, wanted in series.labels)


def _wrong(quantity: Quantity, values: Iterable[Value]) -> str | None:
    """Why values cannot be those of this quantity."""
    for value in values:
        if not math.isfinite(value.now):
            return f"{value.now}"
        if value.now < 0:
            return f"{value.now:g}, which is negative"
        if quantity in SHARES and value.below is None and value.now > 1 + 1e-6:
            return f"{value.now:g}, which is no share"
    return None


def _evaluate(kind: EngineKind, formula: Formula, samples: Kept) -> ByReplica:
    above = _total(kind, formula.above, samples)
    if not formula.below:
        return {r: Value(v) for r, v in above.items()}
    below = _total(kind, formula.below, samples)
    return {r: Value(above.get(r, 0.0), below[r]) for r in below}


def _total(kind: EngineKind, terms: tuple[Series, ...], samples: Kept) -> dict[str, float]:
    """The sum of the terms by replica."""
    total: dict[str, float] = {}
    for term in terms:
        for replica, value in _term(kind, term, samples):
            total[replica] = total.get(replica, 0.0) + term.factor * value
    for replica in total:
        total[replica] += sum(term.factor for term in terms if not term.name)
    return total


def _term(kind: EngineKind, term: Series, samples: Kept) -> Iterator[tuple[str, float]]:
    for labels, value in samples.get(term.name, ()):
        replica = next((labels[name] for name in ENGINES[kind].replica if labels.get(name)), ALL)
        if not _is(labels, term):
            yield replica, 0.0
        elif not term.label:
            yield replica, value
        else:
            try:
                yield replica, float(labels.get(term.label, ""))
            except ValueError:
                yield replica, math.nan


def _of_replica(found: Mapping[Quantity, ByReplica], replica: str, replicas: int) -> dict[Quantity, Value]:
    """What one replica has: its own, else its even part of what is said of all."""
    own: dict[Quantity, Value] = {}
    for quantity, by in found.items():
        if replica in by:
            own[quantity] = by[replica]
        elif ALL in by:
            whole = by[ALL]
            part = 1 if quantity in SHARES or quantity in LIMITS else replicas
            own[quantity] = Value(whole.above / part, None if whole.below is None else whole.below / part)
    return own


def lacking(page: Page, quantity: Quantity) -> str:
    """Why a quantity is not there, as a sentence without its end."""
    return f"{MEANING[quantity]}: {page.missing.get(quantity, 'not of this replica')}"
