"""Long records gathered into tasks × models: the shape in which everything is priced."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray
from pyarrow import RecordBatch

from walras.errors import RecordError
from walras.quantities import BoolArray, IntArray, Labels
from walras.records.read import OnRows, read_records
from walras.records.schema import BY_NAME
from walras.risk import FloatArray

UNKNOWN = -1
"""No choice is recorded for the task."""

_PER_USE = ("quality", "cost_usd", "latency_s", "risk", "irreversible_risk")
_PER_TASK = ("value_usd", "time_s", "certainty")
_LABELS = ("tenant", "class")
_TEXTUAL = ("prompt", "embedding")
"""Columns about a request's text, taken from its first row that has any."""
_OF_ANSWERS = "how sure each answer was is known too late to choose by: give that column another name"
_REQUEST, _MODEL = "\0request", "\0model"
"""Codes, kept beside the columns by name: a log may well have a column `request`."""


@dataclass(frozen=True, slots=True)
class Log:
    """N tasks × I models. Columns the records lack are None; single unknown values are NaN."""

    ids: tuple[str, ...]
    models: tuple[str, ...]
    per_use: Mapping[str, FloatArray]
    """quality, cost_usd, and where recorded latency_s, risk, irreversible_risk and extra columns, (N, I)."""
    losses: FloatArray | None
    """Loss by scenario, (N, I, S)."""
    chosen: IntArray
    """Column of the model that was used, (N,), or `UNKNOWN`."""
    value: FloatArray | None
    time: FloatArray | None
    tenant: Labels | None
    task_class: Labels | None
    rows: int
    synthetic: bool
    prompts: tuple[str | None, ...] | None = None
    """Each request's text, where it was asked for and is recorded."""
    embeddings: FloatArray | None = None
    """Each request's vector, (N, D), NaN where unknown; where it was asked for and is recorded."""
    facts: Mapping[str, Labels] = field(default_factory=dict)
    """Further columns of text that were asked for, by name."""
    certainty: FloatArray | None = None
    """How sure a first look at each request was, 0 to 1, NaN where unknown, (N,)."""

    def __len__(self) -> int:
        return len(self.ids)

    def take(self, tasks: IntArray, uses: IntArray) -> Log:
        """The given tasks and models, in that order."""
        position = np.full(len(self.models) + 1, UNKNOWN, dtype=np.int64)
        position[uses] = np.arange(uses.size)
        grid = np.ix_(tasks, uses)
        return Log(
            ids=tuple(self.ids[t] for t in tasks),
            models=tuple(self.models[u] for u in uses),
            per_use={name: column[grid] for name, column in self.per_use.items()},
            losses=None if self.losses is None else self.losses[grid],
            chosen=position[self.chosen[tasks]],
            value=None if self.value is None else self.value[tasks],
            time=None if self.time is None else self.time[tasks],
            tenant=self.tenant and self.tenant.take(tasks),
            task_class=self.task_class and self.task_class.take(tasks),
            rows=self.rows,
            synthetic=self.synthetic,
            prompts=self.prompts and tuple(self.prompts[t] for t in tasks),
            embeddings=None if self.embeddings is None else self.embeddings[tasks],
            facts={name: labels.take(tasks) for name, labels in self.facts.items()},
            certainty=None if self.certainty is None else self.certainty[tasks],
        )


def read_log(
    paths: Sequence[Path],
    *,
    names: Mapping[str, str] | None = None,
    extra: Sequence[str] = (),
    losses: bool = False,
    also: Sequence[str] = (),
    facts: Sequence[str] = (),
    on_rows: OnRows | None = None,
) -> Log:
    """Read one or more files of records into a `Log`.

    Peak memory is the codes and numbers of all rows (about 40 bytes a row) plus the tables built from them.

    Args:
        names: schema column → column of the files, where they differ.
        extra: further numeric columns wanted per use (amounts of other resources).
        losses: whether losses by scenario are wanted.
        also: further columns of the schema that are wanted: `prompt`, `embedding`, `propensity`, or token counts.
        facts: further columns of text, by request.

    Raises:
        RecordError: see `read_records`; also for a (request, model) pair that occurs twice, for a request whose
            rows disagree about its value, tenant, class, time, certainty or facts, and for a fact that is a number.
    """
    wrong = next((name for name in facts if name in BY_NAME and BY_NAME[name].type != pa.string()), None)
    if wrong is not None:
        raise RecordError(
            "is a column of numbers, not of text", field=wrong, hint="a fact tells requests apart"
        )
    wanted = ["request_id", "model", *_PER_USE, "chosen", *_PER_TASK, *_LABELS]
    wanted += ["risk_scenarios"] if losses else []
    gather = _Gather((*extra, *(name for name in also if name not in _TEXTUAL)), tuple(facts))
    for path in paths:
        for first, batch in read_records(path, [*wanted, *also], names, extra, on_rows, facts):
            gather.add(path, first, batch)
    return gather.log(all(_is_synthetic(path) for path in paths))


def _is_synthetic(path: Path) -> bool:
    if path.suffix.lower() not in (".parquet", ".pq"):
        return False
    metadata = pq.read_schema(path).metadata or {}
    return metadata.get(b"walras.synthetic") == b"true"


class _Codes:
    """Names to consecutive integers, in order of first appearance."""

    def __init__(self) -> None:
        self.of: dict[str, int] = {}

    def encode(self, array: Any) -> IntArray:
        """(n,) codes; -1 for null."""
        encoded = array.dictionary_encode()
        own = np.array(
            [-1 if n is None else self.of.setdefault(n, len(self.of)) for n in encoded.dictionary.to_pylist()]
            + [-1],
            dtype=np.int64,
        )
        index = encoded.indices.fill_null(-1).to_numpy(zero_copy_only=False)
        codes: IntArray = own[index]
        return codes


def _fill(kept: list[Any], request: NDArray[Any], column: Any) -> None:
    """Keep what a batch says of requests of which nothing is known yet."""
    known = np.flatnonzero(column.is_valid().to_numpy(zero_copy_only=False))
    who, first = np.unique(request[known], return_index=True)
    new = [k for k, code in enumerate(who.tolist()) if kept[code] is None]
    for code, value in zip(who[new], column.take(known[first[new]]).to_pylist(), strict=True):
        kept[code] = value


@dataclass
class _Gather:
    """Batches, reduced to codes and numbers as they come."""

    extra: tuple[str, ...]
    facts: tuple[str, ...] = ()
    textual: dict[str, list[Any]] = field(default_factory=lambda: {name: [] for name in _TEXTUAL})
    """Of each request, None where unknown."""
    requests: _Codes = field(default_factory=_Codes)
    models: _Codes = field(default_factory=_Codes)
    labels: dict[str, _Codes] = field(default_factory=dict)
    batches: dict[str, list[NDArray[Any]]] = field(default_factory=dict)
    origin: list[tuple[Path, int, int]] = field(default_factory=list)
    """(file, its first row, rows before it) of each batch, to name a row again."""
    rows: int = 0
    scenarios: int | None = None
    """How many losses a row has; None until a row has any."""

    def add(self, path: Path, first: int, batch: RecordBatch) -> None:
        self.origin.append((path, first, self.rows))
        columns: dict[str, NDArray[Any]] = {
            _REQUEST: self.requests.encode(batch.column("request_id")).astype(np.int32),
            _MODEL: self.models.encode(batch.column("model")).astype(np.int32),
        }
        for name in (*_PER_USE, *_PER_TASK, *self.extra):
            if name in batch.schema.names:
                columns[name] = batch.column(name).to_numpy(zero_copy_only=False).astype(np.float64)
        for name in (*_LABELS, *self.facts):
            if name in batch.schema.names:
                codes = self.labels.setdefault(name, _Codes())
                columns[name] = codes.encode(batch.column(name)).astype(np.int32)
        for name, kept in self.textual.items():
            if name in batch.schema.names:
                kept.extend([None] * (len(self.requests.of) - len(kept)))
                _fill(kept, columns[_REQUEST], batch.column(name))
        if "chosen" in batch.schema.names:
            flag: Any = batch.column("chosen")
            columns["chosen"] = flag.cast(pa.int8()).fill_null(-1).to_numpy(zero_copy_only=False)
        if "risk_scenarios" in batch.schema.names:
            columns["risk_scenarios"] = self._scenarios(path, first, batch.column("risk_scenarios"))
        for name, column in columns.items():
            self.batches.setdefault(name, []).append(column)
        self.rows += batch.num_rows

    def _scenarios(self, path: Path, first: int, lists: Any) -> FloatArray:
        lengths = lists.value_lengths().fill_null(-1).to_numpy(zero_copy_only=False)
        known = lengths >= 0
        if self.scenarios is None and known.any():
            self.scenarios = int(lengths[known][0])
        wrong = np.flatnonzero(known & ((lengths != self.scenarios) | (lengths < 1)))
        if wrong.size:
            problem = f"holds {lengths[wrong[0]]} scenarios; every row needs the same number, at least one"
            if lengths[wrong[0]] != self.scenarios:
                problem += f" (the first row that has any holds {self.scenarios})"
            raise RecordError(problem, path=path, row=first + int(wrong[0]), field="risk_scenarios")
        out = np.full((len(lists), self.scenarios or 0), np.nan)
        if known.any():
            out[known] = lists.flatten().to_numpy(zero_copy_only=False).reshape(-1, out.shape[1])
        return out

    def log(self, synthetic: bool) -> Log:
        request, model = self._whole(_REQUEST), self._whole(_MODEL)
        assert request is not None
        assert model is not None
        shape = (len(self.requests.of), len(self.models.of))
        self._refuse_duplicates(request.astype(np.int64) * shape[1] + model, shape[1])
        per_use = {}
        for name in (*_PER_USE, *self.extra):
            column = self._whole(name)
            if column is not None and not np.isnan(column).all():
                per_use[name] = np.full(shape, np.nan)
                per_use[name][request, model] = column
        for name in ("quality", "cost_usd"):
            if name not in per_use:
                raise RecordError("is null in every row", path=self.origin[0][0], field=name)
        # Batches before the first known losses did not know how many scenarios there are.
        for k, part in enumerate(self.batches.get("risk_scenarios", [])):
            if part.shape[1] != (self.scenarios or 0):
                self.batches["risk_scenarios"][k] = np.full((len(part), self.scenarios or 0), np.nan)
        scenarios = self._whole("risk_scenarios")
        losses = None
        if scenarios is not None and self.scenarios is not None:
            losses = np.full((*shape, scenarios.shape[1]), np.nan)
            losses[request, model] = scenarios
        return Log(
            ids=tuple(self.requests.of),
            models=tuple(self.models.of),
            per_use=per_use,
            losses=losses,
            chosen=self._choices(request, model, shape[0]),
            value=self._per_task("value_usd", request, shape[0]),
            time=self._per_task("time_s", request, shape[0]),
            tenant=self._labels("tenant", request, shape[0]),
            task_class=self._labels("class", request, shape[0]),
            rows=self.rows,
            synthetic=synthetic,
            prompts=self._prompts(),
            embeddings=self._embeddings(),
            facts={
                name: labels
                for name in self.facts
                if (labels := self._labels(name, request, shape[0])) is not None
            },
            certainty=self._per_task("certainty", request, shape[0]),
        )

    def _whole(self, name: str) -> NDArray[Any] | None:
        """A column over all batches; the batches are let go."""
        parts = self.batches.pop(name, [])
        if not parts:
            return None
        if sum(len(part) for part in parts) != self.rows:
            if all((np.isnan(part) if part.dtype.kind == "f" else part < 0).all() for part in parts):
                return None
            raise RecordError("is in some of the files only", path=self.origin[-1][0], field=name)
        return np.concatenate(parts)

    def _of_requests(self, name: str) -> list[Any] | None:
        """A textual column by request; None where nobody has any."""
        kept = self.textual[name]
        kept += [None] * (len(self.requests.of) - len(kept))
        return kept if any(value is not None for value in kept) else None

    def _prompts(self) -> tuple[str | None, ...] | None:
        kept = self._of_requests("prompt")
        return None if kept is None else tuple(kept)

    def _embeddings(self) -> FloatArray | None:
        kept = self._of_requests("embedding")
        if kept is None:
            return None
        size = next(len(v) for v in kept if v is not None)
        if not size or any(len(v) != size for v in kept if v is not None):
            what = f"every vector needs as many numbers as the first, {size}, and at least one"
            raise RecordError(what, path=self.origin[0][0], field="embedding")
        return np.array([[np.nan] * size if v is None else v for v in kept], dtype=np.float64)

    def _blame(self, row: int) -> tuple[Path, int]:
        path, first, before = next(o for o in reversed(self.origin) if o[2] <= row)
        return path, first + row - before

    def _refuse_duplicates(self, pair: IntArray, width: int) -> None:
        order = np.argsort(pair, kind="stable")
        again = np.flatnonzero(np.diff(pair[order]) == 0)
        if not again.size:
            return
        row = int(order[again + 1].min())
        request, model = list(self.requests.of)[pair[row] // width], list(self.models.of)[pair[row] % width]
        path, number = self._blame(row)
        raise RecordError(
            f"(request '{request}', model '{model}') occurs a second time",
            path=path,
            row=number,
            hint="where runs differ, name the column that tells them apart: --map model=COLUMN",
        )

    def _choices(self, request: IntArray, model: IntArray, n: int) -> IntArray:
        """From `chosen`; without it, a log with one row for every request is a log of what was used."""
        flag = self._whole("chosen")
        chosen = np.full(n, UNKNOWN, dtype=np.int64)
        if flag is None or (flag < 0).all():
            if request.size == n:
                chosen[request] = model
            return chosen
        rows = np.flatnonzero(flag > 0)
        twice = np.flatnonzero(np.bincount(request[rows], minlength=n) > 1)
        if twice.size:
            path, number = self._blame(int(rows[request[rows] == twice[0]][1]))
            raise RecordError(
                "marks a second model of the same request", path=path, row=number, field="chosen"
            )
        chosen[request[rows]] = model[rows]
        return chosen

    def _per_task(self, name: str, request: IntArray, n: int) -> FloatArray | None:
        column = self._whole(name)
        if column is None or np.isnan(column).all():
            return None
        out = np.full(n, np.nan)
        out[request[::-1]] = column[::-1]  # the first row of a request wins …
        self._refuse_disagreement(name, ~np.isclose(column, out[request], rtol=0, atol=0, equal_nan=True))
        return out

    def _labels(self, name: str, request: IntArray, n: int) -> Labels | None:
        codes = self._whole(name)
        if codes is None or (codes < 0).all():
            return None
        out = np.full(n, -1, dtype=np.int64)
        out[request[::-1]] = codes[::-1]
        self._refuse_disagreement(name, codes != out[request])
        return Labels(out, tuple(self.labels[name].of))

    def _refuse_disagreement(self, name: str, differs: BoolArray) -> None:
        if differs.any():  # … and the others must say the same.
            path, number = self._blame(int(np.argmax(differs)))
            raise RecordError(
                "differs from an earlier row of the same request",
                path=path,
                row=number,
                field=name,
                hint=_OF_ANSWERS if name == "certainty" else None,
            )
